"""The command line: a thin layer over the functions of the same names. Results on stdout, all else on stderr."""

from __future__ import annotations

import difflib
import gc
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from omni_convert import __version__
from omni_convert.converter.files import parse_size
from omni_convert.formats import FORMATS, format_label
from omni_convert.formats.base import QUALITIES, SCALE_RULES
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.int8 import FUSED_SCALES
from omni_convert.formats.target import DEFAULT_TARGET, TARGETS

_EPILOG = """\b
Examples:
  omni-convert --method int8 model/ out/
  omni-convert --method int8 --ignore img_mlp --dry-run Qwen-Image/ out/
  omni-convert --method fp8 --granularity channel --quality balanced model/ out/
  omni-convert --method int8 --ignore 're:blocks\\.[01]\\.' --link pipeline/ out/
  omni-convert --recipe recipe.yaml model/ out/
  omni-convert models
  omni-convert inspect out/
  omni-convert verify out/ --source model/
"""


class _Failure(click.ClickException):
    """One paragraph on stderr and exit status 1."""


class _WrongUsage(click.ClickException):
    """One paragraph on stderr and exit status 2."""

    exit_code = 2


class _DefaultGroup(click.Group):
    """A group whose bare form is a command: ``omni-convert --method int8 model/ out/``.

    Only a first argument that is exactly a subcommand's name selects it; a folder of that name is ``./verify``.
    """

    default = "convert"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {option for param in self.get_params(ctx) for option in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            close = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
            if close and not Path(args[0]).exists():
                ctx.fail(f"There is no command or folder {args[0]!r}. Did you mean {close[0]!r}?")
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Errors that the user can act on become one paragraph and an exit status; a signal, a tidy end."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, _interrupt)
        try:
            return super().invoke(ctx)
        except PermissionError as error:
            raise _Failure(f"{error.filename}: cannot be read ({error.strerror}). Check its rights.") from error
        except UsageError as error:
            raise _WrongUsage(str(error)) from error
        except OmniConvertError as error:
            raise _Failure(str(error)) from error
        except KeyboardInterrupt as interrupt:
            raise _Failure(f"Interrupted.{str(interrupt) or ' Nothing of this run is kept.'}") from None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        bare = self.commands[self.default]
        return super().shell_complete(ctx, incomplete) + bare.shell_complete(click.Context(bare), incomplete)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("omni-convert", "[OPTIONS] MODEL OUT")
        formatter.write_usage("omni-convert", "COMMAND [ARGS]...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        convert_command = self.commands[self.default]
        convert_command.format_options(click.Context(convert_command, parent=ctx), formatter)
        rows = [(name, cmd.get_short_help_str(90)) for name, cmd in self.commands.items() if name != self.default]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(*_: object) -> None:
    """The first signal ends the run; those that follow must not disturb it while it tidies up."""
    for number in _SIGNALS:
        signal.signal(number, _overhear)
    raise KeyboardInterrupt


def _overhear(*_: object) -> None:
    """What SIG_IGN does, also for a signal that came at the same moment."""


@click.group(cls=_DefaultGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="omni-convert")
def main() -> None:
    """Convert a BF16 checkpoint once into a quantized checkpoint that inference engines load unchanged.

    MODEL is a diffusers pipeline folder, one component's folder, a transformers folder, or a .safetensors file.
    OUT is a new folder with the same layout. Exit status: 0 done, 1 failed, 2 wrong usage.
    """


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@main.command(short_help="Convert a checkpoint (the same without the word convert).")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--method",
    type=click.Choice(list(FORMATS)),
    metavar="FORMAT",
    help=f"Format of the quantized weights: {', '.join(FORMATS)}.",
)
@click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Methods, rules and components from a YAML file, or from the omni_convert.json of an earlier conversion.",
)
@click.option(
    "--granularity",
    type=click.Choice(["tensor", "channel", "block"]),
    help="What shares a scale: the weight, a row, or a block (fp8; int8 is always channel).",
)
@click.option("--block-size", metavar="NxK", help="Rows x columns of a block, for example 128x128 (fp8).")
@click.option(
    "--activation-scheme",
    type=click.Choice(["dynamic", "static"]),
    help="Activation scales measured while running, or recorded in advance (fp8 per tensor).",
)
@click.option(
    "--activation-scales",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Recorded scales for static activations: a JSON object, layer name to number.",
)
@click.option(
    "--scale-rule",
    type=click.Choice(SCALE_RULES),
    help="How a block's power-of-two scale is chosen (mxfp8: rceil; mxfp4: even).",
)
@click.option(
    "--quality",
    type=click.Choice(QUALITIES),
    help="Scales from the largest weight (fast, default), or searched for least error: same size and speed after.",
)
@click.option(
    "--fused-scale",
    type=click.Choice(FUSED_SCALES),
    help="Scales of layers that vLLM-Omni fuses (int8): one, as it needs on CUDA, or all, for Ascend NPUs only.",
)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="PATTERN=METHOD",
    help="Quantize matching layers with another method, or keep them (none). The first match decides. Repeatable.",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="PATTERN",
    help="Keep matching layers: part of a name, glob over the whole name, or re:REGEX. Repeatable.",
)
@click.option(
    "--ignore-whole-group",
    is_flag=True,
    help="Keep all of what the engine fuses (to_q, to_k, to_v) if --ignore names a part of it.",
)
@click.option(
    "--no-default-ignore",
    is_flag=True,
    help="Also quantize layers that are kept by default because the method costs the model too much there.",
)
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    help=f"The engine that is to load OUT (default: {DEFAULT_TARGET}); 'omni-convert models' shows what each can load.",
)
@click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME[=METHOD]",
    help="Quantize this component of a pipeline instead of its diffusion transformers. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan; read only headers, write nothing.")
@click.option("--link", is_flag=True, help="Hard-link files that arrive unchanged instead of copying them.")
@click.option(
    "--resume", is_flag=True, help="Only go on with this job's unfinished output (done unasked if OUT holds it)."
)
@click.option("--overwrite", is_flag=True, help="Replace the conversion that OUT holds, finished or not.")
@click.option("--durable", is_flag=True, help="Have the disk confirm every file: safe from a loss of power, slower.")
@click.option("--hash-source", is_flag=True, help="Record the sha256 of every source file.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="Convert in this process, or on a Ray cluster (RAY_ADDRESS, or the one that runs here).",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="Worker threads; default: all processors. With ray: of every task; default: 1.",
)
@click.option(
    "--memory", callback=_size, metavar="SIZE", help="Limit of the run's memory beyond libraries (default: 400MiB)."
)
@click.option(
    "--device", default="cpu", metavar="DEVICE", help="Quantize on cuda, cuda:N, npu or npu:N; the bytes are the same."
)
@_json_option
def convert(
    model: Path, out: Path, method: str | None, recipe: Path | None, granularity: str | None, block_size: str | None,
    activation_scheme: str | None, activation_scales: Path | None, scale_rule: str | None, quality: str | None,
    fused_scale: str | None, layers: tuple[str, ...], ignore: tuple[str, ...], ignore_whole_group: bool,
    no_default_ignore: bool, target: str | None, components: tuple[str, ...], dry_run: bool, link: bool,
    resume: bool, overwrite: bool, durable: bool, hash_source: bool, engine: str, threads: int | None,
    memory: int | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Convert MODEL into OUT."""
    from omni_convert.converter import show
    from omni_convert.converter.convert import Means, device_need, needs, plan, refusal, run
    from omni_convert.converter.recipe import parse_block_size, read_input_scales, read_recipe

    started = time.perf_counter()
    with _uncollected():
        planned = plan(
            model, method=method, recipe=read_recipe(recipe) if recipe else None, granularity=granularity,
            block_size=parse_block_size(block_size) if block_size else None, activation_scheme=activation_scheme,
            scale_rule=scale_rule, quality=quality, fused_scale=fused_scale, layers=layers, ignore=ignore,
            ignore_whole_group=ignore_whole_group,
            components=components, input_scales=read_input_scales(activation_scales) if activation_scales else None,
            target=target, default_ignore=not no_default_ignore,
        )  # fmt: skip
    for warning in planned.warnings:
        click.echo(f"Warning: {warning}", err=True)
    for label in [format_label(fmt) for fmt in planned.recipe.formats if fmt.quality != "fast" and not fmt.is_searched]:
        click.echo(f"Note: {label} has no better scales to search for; the result is that of --quality fast.", err=True)
    means = Means(
        threads=threads, memory=memory, device=device, link=link, durable=durable, overwrite=overwrite, resume=resume,
        hash_source=hash_source, engine=engine,
    )  # fmt: skip
    if dry_run:
        if obstacle := refusal(planned, out, means):
            click.echo(f"Note: this conversion would be refused now. {obstacle}", err=True)
        needed = (*needs(planned, means), device_need(planned, means))
        _print(show.plan_dict(planned, *needed) if as_json else show.plan_text(planned, *needed))
        return
    report = run(planned, out, means, progress=True, started=started)
    _print(report.to_dict() if as_json else show.report_text(report))


@main.command(short_help="Show which models each target can load, with which methods.")
@_json_option
def models(as_json: bool) -> None:
    """Show which models each target is known to load, with which methods, and what it keeps by default."""
    from omni_convert.converter.models import models_dict, models_text

    _print(models_dict() if as_json else models_text())


@main.command(short_help="Show what is in a checkpoint, quantized or not (headers only).")
@click.argument("path", type=click.Path(path_type=Path))
@_json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what is in the checkpoint at PATH: classes, dtypes, sizes, quantized and kept layers."""
    from omni_convert.converter.inspect import inspect as inspect_checkpoint

    summary = inspect_checkpoint(path)
    _print(summary.to_dict() if as_json else summary.to_text())


@main.command(short_help="Check a converted checkpoint against its manifest, its format and its source.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="Measure every layer's error against this model.")
@_json_option
def verify(out: Path, source: Path | None, as_json: bool) -> None:
    """Check OUT: file hashes against the manifest, tensors against the format, and errors against the source."""
    from omni_convert.converter.verify import verify as verify_output

    result = verify_output(out, source=source, progress=True)
    _print(result.to_dict() if as_json else result.to_text())
    if not result.ok:
        sys.exit(1)


@contextmanager
def _uncollected() -> Iterator[None]:
    """For a plan: some hundred objects to a tensor, none of them garbage, which collections would walk in vain."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _print(result: str | dict[str, Any]) -> None:
    click.echo(result if isinstance(result, str) else json.dumps(result, indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
