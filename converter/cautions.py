"""What a plan warns of: why the target may not load the result, and what stays that one may expect to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omni_convert.converter.decide import View, holds_experts
from omni_convert.converter.pipeline import encoder_layers, is_known
from omni_convert.formats.errors import printable
from omni_convert.formats.layout import CONFIG_NAME
from omni_convert.formats.patterns import Pattern

if TYPE_CHECKING:
    from omni_convert.converter.checkpoint import Checkpoint, Component
    from omni_convert.converter.plan import TensorPlan
    from omni_convert.converter.recipe import Recipe

_CONSIDERABLE = 0.1


def target_cautions(views: Sequence[View], checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Why the target may not load the result, or on what condition; and of each, what to do, if anything."""
    rules = [rule for view in views for rule in view.target.cautions if rule.holds(view.architecture, view.kind)]
    return [
        *_unknown_classes(views, checkpoint),
        *((f"{rule.reason}.", "") for rule in dict.fromkeys(rules)),
        *((_no_encoder(view), "Convert the whole pipeline.") for view in views
          if encoder_layers(view, checkpoint) is None),
    ]  # fmt: skip


def _unknown_classes(views: Sequence[View], checkpoint: Checkpoint) -> list[tuple[str, str]]:
    unknown = [view for view in views if not is_known(view, checkpoint)]
    if not unknown:
        return []
    title = unknown[0].target.title
    classes = ", ".join(dict.fromkeys(printable(view.component.class_name) for view in unknown))
    caution = (
        f"it is not known which layers {title} can run quantized (class: {classes}), so it may not load the result."
    )
    advice = "'omni-convert models' lists what is known; --dry-run shows the layers."
    # A format that writes something else for fused layers needs to know them.
    if any(view.config.format.fused() != view.config.format for view in unknown):
        caution += f" Where it fuses layers (q, k, v), {unknown[0].kind} is wrong on CUDA."
        advice += " Keep fused layers with --ignore."
    return [(caution, advice)]


def _no_encoder(view: View) -> str:
    """Of a transformer that is converted without the text encoder that shares its config."""
    return (
        f"{view.target.title} builds the text encoder of {view.architecture} with the transformer's "
        "quantization_config, which must list the encoder's layers, and this source has no text encoder."
    )


def kept_experts(tensors: Sequence[TensorPlan], recipe: Recipe) -> list[str]:
    """A warning if experts, in most models that have some nearly all of the weights, stay unquantized unasked."""
    kept = [
        tensor
        for tensor in tensors
        if holds_experts(tensor.name, tensor.source.spec)
        and not tensor.decision.format
        and not tensor.decision.reason.startswith(("--ignore", "--layer"))
        and not any(pattern.matches(tensor.layer) for pattern in _unquantized(recipe))
    ]
    share = sum(tensor.bytes_after for tensor in kept) / sum(tensor.source.spec.nbytes for tensor in tensors)
    if share <= _CONSIDERABLE:
        return []
    first = kept[0]
    return [
        f"{share:.0%} of the bytes stay {first.source.spec.dtype}: the experts are not quantized (such as "
        f"{printable(first.layer)}: {first.decision.reason})."
    ]


def _unquantized(recipe: Recipe) -> list[Pattern]:
    """The patterns of what is to stay as it is."""
    rules = [rule.name for part in recipe.parts.values() for rule in part.layers if rule.format is None]
    return [
        Pattern(text) for text in (*rules, *(name for part in recipe.parts.values() for name in part.ignored_layers))
    ]


def unheard(component: Component) -> str:
    """A warning of a config that would have engines quantize these weights while they load."""
    asks = f"{component.folder / CONFIG_NAME} asks engines to quantize while they load"
    return f"{asks}; what it says does not count here: give --method, --ignore and the like."
