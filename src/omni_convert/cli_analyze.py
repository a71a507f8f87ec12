"""``omni-convert analyze``, and the options with which a conversion does the same before it begins."""

from __future__ import annotations

from pathlib import Path

import click

from omni_convert.cli_output import check_place, json_option, note_local, print_result, write_text
from omni_convert.converter.files import parse_size
from omni_convert.formats import FORMATS
from omni_convert.formats.errors import UsageError
from omni_convert.formats.target import DEFAULT_TARGET, TARGETS

auto_ignore_option = click.option(
    "--auto-ignore",
    metavar="sqnr>=DB",
    help="Keep layers such that every other has at least this signal-to-noise ratio. Reads the weights to choose.",
)
budget_option = click.option(
    "--budget",
    metavar="size<=SHARE",
    help="Keep layers for the least error within this share of the source's bytes. Reads the weights to choose.",
)


def split_methods(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """``a,b`` -> a, b."""
    return tuple(text for part in (value or "").split(",") if (text := part.strip()))


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


@click.command(short_help="Show what every method would cost every layer, and choose what to keep.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--methods",
    callback=split_methods,
    metavar="METHOD,...",
    help=f"Of {', '.join(FORMATS)}; with options as in fp8:channel, fp8:128x128, mxfp4:balanced "
    "(default: the first four that the target can load).",
)
@auto_ignore_option
@budget_option
@click.option(
    "--recipe-out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With these two: write the choice as a recipe in YAML, to be read, edited and converted with (--recipe); "
    "replaces a file.",
)
@click.option(
    "--layer", "layers", multiple=True, metavar="PATTERN=METHOD", help="As in a conversion: a layer's own method."
)
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Keep matching layers, as in a conversion.")
@click.option("--ignore-whole-group", is_flag=True, help="Keep all of what the engine fuses with an ignored layer.")
@click.option("--no-default-ignore", is_flag=True, help="Also measure layers that are kept by default.")
@click.option(
    "--target", type=click.Choice(list(TARGETS)), help=f"The engine that is to load the result ({DEFAULT_TARGET})."
)
@click.option("--component", "components", multiple=True, metavar="NAME", help="Of a pipeline: measure this component.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Worker threads; default: all processors.")
@click.option(
    "--memory", callback=_size, metavar="SIZE", help="Limit of the memory beyond libraries (default: 400MiB)."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML page; replaces a file."
)
@json_option
def analyze(
    model: Path, methods: tuple[str, ...], auto_ignore: str | None, budget: str | None, recipe_out: Path | None,
    layers: tuple[str, ...], ignore: tuple[str, ...], ignore_whole_group: bool, no_default_ignore: bool,
    target: str | None, components: tuple[str, ...], threads: int | None, memory: int | None, output: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure what each of several methods would do to every layer of MODEL, in one pass; nothing is converted."""
    from omni_convert.converter.analyze import analyze as analyze_model
    from omni_convert.converter.choose import parse_conditions
    from omni_convert.converter.show_analysis import analysis_text, choice_dict, choice_text, recipe_yaml

    note_local(model)
    conditions = parse_conditions(auto_ignore, budget)
    if recipe_out and conditions is None:
        raise UsageError("--recipe-out writes a choice, expected --auto-ignore or --budget beside it.")
    for option, path in (("--recipe-out", recipe_out), ("-o", output)):
        if path:
            check_place(path, option, outside=[model])
    found = analyze_model(
        model, methods, auto_ignore=auto_ignore, budget=budget, threads=threads, memory=memory, progress=True,
        layers=layers, ignore=ignore, ignore_whole_group=ignore_whole_group, components=components, target=target,
        default_ignore=not no_default_ignore,
    )  # fmt: skip
    for warning in dict.fromkeys(warning for plan in found.plans for warning in plan.warnings):
        click.echo(f"Warning: {warning}", err=True)
    choice = refused = None
    if conditions:
        try:
            choice = found.choose(auto_ignore=auto_ignore, budget=budget)
        except UsageError as error:
            refused = error  # what was measured is shown first
    if output:
        from omni_convert.quality.analysis_page import analysis_page

        write_text(output, analysis_page(found, choice))
    if choice and recipe_out:
        write_text(recipe_out, recipe_yaml(choice))
    if as_json:
        print_result({**found.to_dict(), **({"choice": choice_dict(choice)} if choice else {})})
    else:
        chosen = [choice_text(choice), recipe_yaml(choice).rstrip()] if choice else []
        print_result("\n\n".join([analysis_text(found), *chosen]))
    if refused:
        raise refused
