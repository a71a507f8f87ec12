"""Which weights are linears that an engine can run quantized: facts per model class, and a heuristic for the rest.

A table lists layer names as they stand in the checkpoint, ``N`` for a number. Layers that an engine fuses into
one matrix form a group: they are quantized or kept together, and the engine knows them by the group's name.
Source of the tables: vLLM-Omni 0.30 model classes, traced through its own loader.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple


class Role(NamedTuple):
    """Whether a weight may be quantized, and why."""

    is_linear: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The quantizable linears of one model class.

    ``blocks``: prefixes of repeated blocks. ``linears``: layer names below a block. ``fused``: engine name of a
    fused matrix below a block -> its member layers. ``sensitive``: method -> layers below a block that cost so much
    quality with that method that they stay unquantized.
    """

    name: str
    blocks: Sequence[str]
    linears: Sequence[str] = ()
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sensitive: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        members = [*self.linears, *(name for group in self.fused.values() for name in group)]
        return re.compile(f"(?P<block>{_alternatives(self.blocks)})\\.(?P<layer>{_alternatives(members)})")

    @cached_property
    def _group_of(self) -> Mapping[str, str]:
        return {member: group for group, members in self.fused.items() for member in members}

    def role(self, layer: str, method: str) -> Role:
        match = self._pattern.fullmatch(layer)
        if not match:
            return Role(False, f"not a quantizable linear of {self.name}")
        if match["layer"] in self.sensitive.get(method, ()):
            return Role(False, f"{method} costs {self.name} too much quality here")
        return Role(True, f"linear of {self.name}")

    def describes(self, layers: Collection[str]) -> bool:
        """Whether every linear of the table occurs in some block."""
        found = {match["layer"] for match in map(self._pattern.fullmatch, layers) if match}
        return bool(found) and found.issuperset((*self.linears, *self._group_of))

    def group(self, layer: str) -> tuple[str, tuple[str, ...]] | None:
        """Engine name and member layers of the fused matrix that ``layer`` is part of."""
        match = self._pattern.fullmatch(layer)
        group = self._group_of.get(match["layer"]) if match else None
        if match is None or group is None:
            return None
        block = match["block"]
        return f"{block}.{group}", tuple(f"{block}.{member}" for member in self.fused[group])


def _alternatives(names: Sequence[str]) -> str:
    return "|".join(re.escape(name).replace("N", r"\d+") for name in names)


_QKV = ("to_q", "to_k", "to_v")

_TABLES = (
    Architecture(
        name="QwenImageTransformer2DModel",
        blocks=("transformer_blocks.N",),
        linears=(
            "attn.to_out.0", "attn.to_add_out",
            "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
        ),
        fused={
            "attn.to_qkv": tuple(f"attn.{name}" for name in _QKV),
            "attn.add_kv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        },
    ),
    Architecture(
        name="ZImageTransformer2DModel",
        blocks=("layers.N", "noise_refiner.N", "context_refiner.N"),
        linears=("attention.to_out.0", "feed_forward.w2"),
        fused={
            "attention.to_qkv": tuple(f"attention.{name}" for name in _QKV),
            "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3"),
        },
    ),
    Architecture(
        name="BERT",
        blocks=("encoder.layer.N", "bert.encoder.layer.N"),
        linears=(
            "attention.self.query", "attention.self.key", "attention.self.value",
            "attention.output.dense", "intermediate.dense", "output.dense",
        ),
        # Value projections read a normalized stream with a few large channels. With int8 activations there, 25 of 30
        # everyday sentences keep a cosine of 0.995 to MiniLM's float32 embeddings; without, all 30 (but not all
        # single words: "Thanks!" has 0.984).
        sensitive={"int8": ("attention.self.value",)},
    ),
    # Its linears are Conv1D modules, which store (in, out): scales would run along the wrong axis.
    Architecture(name="GPT-2", blocks=()),
)  # fmt: skip

ARCHITECTURES: Mapping[str, Architecture] = {table.name: table for table in _TABLES}
"""Every known model class by the name that its config gives it."""

_HEURISTIC: Sequence[tuple[str, re.Pattern[str]]] = (
    (
        "embedding",
        re.compile(r"embed|(^|[._])emb([._]|$)|(^|\.)(wte|wpe|shared|relative_attention_bias)(\.|$)|patchify"),
    ),
    ("norm", re.compile(r"norm|adaln|modulation|(^|[._])(ln|mod)([._]|$)", re.IGNORECASE)),
    # Libraries merge experts when they load, and engines run them unquantized with int8.
    ("routed-expert", re.compile(r"(^|\.)experts(\.|$)")),
    # Mamba's module reads this weight itself, past the layer.
    ("time-step", re.compile(r"(^|\.)dt_proj$")),
    ("router", re.compile(r"router|(^|\.)(gate|wg|gate_inp)$")),
    ("output-head", re.compile(r"(^|\.)(lm_head|classifier|score|pooler)(\.|$)|^(\w+\.)?(head|cls|qa_outputs)(\.|$)")),
    ("output-head", re.compile(r"^(proj_out|final_layer|final_linear|output|out_proj|out)(\.|$)")),
    ("input-projection", re.compile(r"^(\w+_in|proj_in)(\.|$)")),
)


_MODEL_TYPES = {"bert": "BERT", "gpt2": "GPT-2", "openai-gpt": "GPT-2"}


def find_architecture(config: Mapping[str, object] | None, layers: Collection[str]) -> Architecture | None:
    """The table for a component: by diffusers' ``_class_name`` or transformers' ``model_type`` in its config, or, for
    weights without a config, the table whose every linear is among ``layers``."""
    if config is None:
        return next((table for table in _TABLES if table.describes(layers)), None)
    name = _MODEL_TYPES.get(str(config.get("model_type"))) or str(config.get("_class_name"))
    return ARCHITECTURES.get(name)


def guess_role(layer: str) -> Role:
    """For unknown classes: a matrix is a linear unless its name gives it the role of something else."""
    for role, pattern in _HEURISTIC:
        match = pattern.search(layer)
        if match:
            return Role(False, f"{role} role ({match[0].strip('.')!r} in its name)")
    return Role(True, "2-D weight with no other role in its name")
