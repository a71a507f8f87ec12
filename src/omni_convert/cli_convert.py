"""``omni-convert convert``, which is also what the bare form means."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omni_convert.cli_analyze import auto_ignore_option, budget_option, split_methods
from omni_convert.cli_hub import hub_options, hub_target
from omni_convert.cli_output import check_place, json_option, note_local, print_result, write_text
from omni_convert.converter.files import parse_size
from omni_convert.formats import FORMATS, format_label
from omni_convert.formats.base import QUALITIES, SCALE_RULES
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.int8 import FUSED_SCALES
from omni_convert.formats.target import DEFAULT_TARGET, TARGETS

if TYPE_CHECKING:
    from omni_convert.converter.choice import Choice
    from omni_convert.converter.recipe import Choices


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


@click.command(short_help="Convert a checkpoint (the same without the word convert).")
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
@auto_ignore_option
@budget_option
@click.option(
    "--methods",
    callback=split_methods,
    metavar="METHOD,...",
    help="With these two: what to choose from in place of --method, as in analyze; for each layer if the target mixes.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan; read only headers (or what it takes to choose).")
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
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a page about every layer, measured while its weights pass by.",
)
@hub_options("To hub: ")
@click.option("--work", type=click.Path(path_type=Path), metavar="DIR", help="To hub: Where what is under way lies.")
@json_option
def convert(
    model: Path, out: Path, method: str | None, recipe: Path | None, granularity: str | None, block_size: str | None,
    activation_scheme: str | None, activation_scales: Path | None, scale_rule: str | None, quality: str | None,
    fused_scale: str | None, layers: tuple[str, ...], ignore: tuple[str, ...], ignore_whole_group: bool,
    no_default_ignore: bool, target: str | None, components: tuple[str, ...], auto_ignore: str | None,
    budget: str | None, methods: tuple[str, ...], dry_run: bool, link: bool, resume: bool, overwrite: bool,
    durable: bool, hash_source: bool, engine: str, threads: int | None, memory: int | None, device: str,
    report: Path | None, work: Path | None, as_json: bool, **publishing: Any,
) -> None:  # fmt: skip
    """Convert MODEL, a folder, a file or org/name[@revision] on the Hub, into OUT, a folder or hub:ORG/NAME."""
    from omni_convert.converter import show
    from omni_convert.converter.convert import ENGINES, Means, device_need, needs, plan, refusal, run
    from omni_convert.converter.recipe import Choices, read_input_scales, read_recipe
    from omni_convert.formats.quant_config import parse_block_size

    if report:
        if dry_run:
            raise UsageError("--report tells what a conversion measured, --dry-run converts nothing. Give one of them.")
        read = [path for path in (model, recipe, activation_scales) if path]
        check_place(report, "--report", outside=[*read, out])
    started = time.perf_counter()
    note_local(model)
    repository = hub_target(out, work, **publishing)
    if report and repository is not None:
        raise UsageError("--report reads the folder OUT, which is published here. Convert into a folder, then push it.")
    choices = Choices(
        method=method, recipe=read_recipe(recipe) if recipe else None, granularity=granularity,
        block_size=parse_block_size(block_size) if block_size else None, activation_scheme=activation_scheme,
        scale_rule=scale_rule, quality=quality, fused_scale=fused_scale, layers=layers, ignore=ignore,
        ignore_whole_group=ignore_whole_group, components=components,
        input_scales=read_input_scales(activation_scales) if activation_scales else None,
        target=target, default_ignore=not no_default_ignore,
    )  # fmt: skip
    chosen = None
    if methods or auto_ignore is not None or budget is not None:
        own = threads if engine == ENGINES[0] else None
        with repository.reading() if repository else nullcontext() as scratch:
            chosen = _choose(model, methods, auto_ignore, budget, own, memory, scratch, choices, is_dry=dry_run)
        planned = chosen.plan
    else:
        with _uncollected():
            planned = plan(model, **choices)
    for warning in planned.warnings:
        click.echo(f"Warning: {warning}", err=True)
    for label in [format_label(fmt) for fmt in planned.recipe.formats if fmt.quality != "fast" and not fmt.is_searched]:
        click.echo(f"Note: {label} has no better scales to search for; the result is that of --quality fast.", err=True)
    means = Means(
        threads=threads, memory=memory, device=device, link=link, durable=durable, overwrite=overwrite, resume=resume,
        hash_source=hash_source, engine=engine, statistics=report is not None,
    )  # fmt: skip
    if dry_run:
        if repository is None and (obstacle := refusal(planned, out, means)):
            click.echo(f"Note: this conversion would be refused now. {obstacle}", err=True)
        needed = (*needs(planned, means, kept=repository is None), device_need(planned, means))
        _print(chosen, show.plan_dict(planned, *needed) if as_json else show.plan_text(planned, *needed))
        return
    if repository is not None:
        from omni_convert.hub.transfer import transfer

        done, publication = transfer(planned, repository, means, progress=True, started=started)
        _print(chosen, {**done.to_dict(), **publication.to_dict()} if as_json else show.report_text(done))
        return
    done = run(planned, out, means, progress=True, started=started)
    if report:
        with _complete(out):
            from omni_convert.quality.report import report as layer_report

            write_text(report, layer_report(out, run=done).to_html())
    _print(chosen, done.to_dict() if as_json else show.report_text(done))


def _choose(
    model: Path, methods: tuple[str, ...], auto_ignore: str | None, budget: str | None, threads: int | None,
    memory: int | None, scratch: Path | None, choices: Choices, *, is_dry: bool,
) -> Choice:  # fmt: skip
    from omni_convert.converter.analyze import choose

    click.echo(
        "Note: reads the weights to choose what to keep" + ("." if is_dry else ", then once more to convert."), err=True
    )
    return choose(
        model, methods=methods, auto_ignore=auto_ignore, budget=budget, threads=threads, memory=memory,
        scratch=scratch, progress=True, **choices,
    )  # fmt: skip


def _print(chosen: Choice | None, result: str | dict[str, Any]) -> None:
    """The result, with what was chosen before, if anything."""
    if chosen is None:
        print_result(result)
        return
    from omni_convert.converter.show_analysis import choice_dict, choice_text

    print_result(
        f"{choice_text(chosen)}\n\n{result}" if isinstance(result, str) else {**result, "choice": choice_dict(chosen)}
    )


@contextmanager
def _complete(out: Path) -> Iterator[None]:
    """For what is done after a conversion: whatever ends it, the conversion is there."""
    said = f" {out} is complete; only the report is missing: omni-convert report {out}, with --source for all of it."
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(said) from None
    except OmniConvertError as error:
        raise type(error)(f"{error}{said}") from error.__cause__


@contextmanager
def _uncollected() -> Iterator[None]:
    """For a plan: some hundred objects to a tensor, none of them garbage, which collections would walk in vain."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
