"""What the components of a pipeline are to each other in the target: which it can load quantized, and with whom."""

from __future__ import annotations

from collections.abc import Sequence

from omni_convert.converter.checkpoint import DEFAULT_COMPONENTS, Checkpoint
from omni_convert.converter.decide import View
from omni_convert.formats.architectures import Architecture
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.layout import CONFIG_NAME
from omni_convert.formats.target import names_of_encoder


def check_component(view: View, checkpoint: Checkpoint, views: Sequence[View]) -> None:
    """Whether the target would read the config of this component, in a pipeline that it knows.

    Raises:
        UsageError: it builds the component without a quantization config, or with another component's.
    """
    name, table = view.component.name, _transformer(view, checkpoint)
    is_transformer = not name or name in DEFAULT_COMPONENTS
    if is_transformer or table is None or view.target.architectures is None or not view.target.knows(table):
        return
    encoder = table.text_encoder
    remedy = f"Leave {name} as it is, or convert for another engine: --target omni-convert."
    if encoder is None or encoder.component != name or not encoder.may_be_quantized:
        raise UsageError(
            f"--component {name}: {view.target.title} reads the quantization config of a {table.name} transformer "
            f"only, and would take quantized weights of {name} for others. {remedy}"
        )
    transformer = next((other for other in views if other.component.name == DEFAULT_COMPONENTS[0]), None)
    if transformer is None or transformer.config.format.config(()) != view.config.format.config(()):
        raise UsageError(
            f"--component {name}: {view.target.title} builds it with the quantization config of the transformer, which "
            f"must be quantized too, with the same method: add --component {DEFAULT_COMPONENTS[0]}. {remedy}"
        )


def is_known(view: View, checkpoint: Checkpoint) -> bool:
    """Whether it is known what the target can run of this component."""
    table = _transformer(view, checkpoint)
    encoder = table.text_encoder if table else None
    return view.target.knows(view.table) or (encoder is not None and encoder.component == view.component.name)


def encoder_layers(view: View, checkpoint: Checkpoint) -> set[str] | None:
    """The linears of a text encoder that the target builds with this component's config; None if the checkpoint has no
    such encoder.

    Raises:
        OmniConvertError: its config is missing, or does not say how many layers it has.
    """
    encoder = view.table.text_encoder if view.table else None
    if view.table is None or encoder is None:
        return set()
    path = checkpoint.root / encoder.component / CONFIG_NAME
    config = checkpoint.component_config(encoder.component)
    if config is None:
        if path.parent.is_dir():
            raise OmniConvertError(
                f"{path}: is missing, expected a text encoder's. The download is incomplete: fetch it."
            )
        return None
    try:
        return set(names_of_encoder(view.table, config))
    except KeyError as error:
        raise OmniConvertError(
            f"{path}: has no number of layers {error.args[0]}, expected one, because {view.target.title} builds this "
            "text encoder with the transformer's quantization_config. The download is damaged: fetch it again."
        ) from error


def _transformer(view: View, checkpoint: Checkpoint) -> Architecture | None:
    """The class of the pipeline's diffusion transformer, as the target knows it."""
    config = checkpoint.component_config(DEFAULT_COMPONENTS[0])
    return view.target.find(config, (), checkpoint.pipeline_class) if config else None
