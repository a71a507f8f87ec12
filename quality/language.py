"""Language models: what they answer to a prompt is compared before any token is sampled from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.layout import CONFIG_NAME, PIPELINE_INDEX, read_json
from omni_convert.quality.request import HIDDEN, LOGITS, Answer
from omni_convert.runtime.load import import_library


def read_tokenizer(folder: Path, prompts: Sequence[str]) -> Any:
    """Of the model in ``folder``; it makes tokens of every prompt.

    Raises:
        UsageError: no folder of a language model or encoder of Transformers.
        OmniConvertError: it has no tokenizer, or Transformers is missing.
    """
    if (folder / PIPELINE_INDEX).is_file() or not (folder / CONFIG_NAME).is_file():
        raise UsageError(f"{folder}: is not the folder of one Transformers model, expected one for --task text.")
    config = read_json(folder / CONFIG_NAME)
    if "model_type" not in config or config.get("is_encoder_decoder"):
        raise UsageError(
            f"{folder}: its config.json has model_type {printable(config.get('model_type'))}, expected a language "
            "model or an encoder of Transformers for --task text."
        )
    transformers = import_library("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise OmniConvertError(
            f"{folder}: its tokenizer cannot be loaded ({printable(str(error), 200)}), expected one for --task text. "
            "Put the tokenizer's files there."
        ) from error
    for prompt in prompts:
        if not tokenizer(prompt)["input_ids"]:  # as of a model whose files are missing, which Transformers does not say
            raise OmniConvertError(
                f"{folder}: its tokenizer makes no token of {printable(prompt)!r}, expected some. Put all of the "
                "tokenizer's files there."
            )
    return tokenizer


def answers_with_hidden_states(folder: Path) -> bool:
    """Whether the model that the config names is known to have no head. False: it has one, or nobody knows."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config = read_json(folder / CONFIG_NAME)
    bare = MODEL_MAPPING_NAMES.get(str(config.get("model_type")))
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else bare
    return isinstance(name, str) and name == bare and "For" not in name  # Llama4ForConditionalGeneration has one


def ask_language_model(tokenizer: Any, model: Any, prompt: str, _counts: bool) -> Answer:
    """Logits (tokens, vocabulary) of a language model, or the last hidden states (tokens, width) of an encoder."""
    batch = tokenizer(prompt, return_tensors="pt").to(model.device)
    result = model(**batch)
    logits = getattr(result, "logits", None)
    values = (result.last_hidden_state if logits is None else logits)[0].float().cpu().numpy()
    finite = bool(np.isfinite(values).all())
    tokens = [tokenizer.decode([token]) for token in batch["input_ids"][0]]
    if logits is None:
        return Answer(output=values, kind=HIDDEN, tokens=tokens, finite=finite)
    best = [tokenizer.decode([token]) for token in values.argmax(axis=1)]
    return Answer(output=values, kind=LOGITS, tokens=tokens, best=best, finite=finite)


def language_metrics(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> dict[str, float]:
    """Of logits (tokens, vocabulary): how often the most probable token is the same, and the mean over the tokens of
    KL(reference || candidate) = sum p (log p - log q), in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), dim=-1) for logits in (reference, candidate))
    return {
        "top1_agreement": float((reference.argmax(axis=1) == candidate.argmax(axis=1)).mean()),
        "kl_divergence": max(0.0, float((p.exp() * (p - q)).sum(dim=-1).mean())),
    }
