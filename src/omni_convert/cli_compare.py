"""``omni-convert compare``: what a quantized model generates, beside what it was made from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omni_convert.cli_output import check_place, json_option, note_local, note_written, print_result
from omni_convert.formats import FORMATS
from omni_convert.formats.errors import OmniConvertError
from omni_convert.quality.gate import GATES
from omni_convert.quality.request import DEFAULT_SEED, TASKS

if TYPE_CHECKING:
    from omni_convert.quality.compare import Comparison

_FOLDER = click.Path(path_type=Path)


@click.command(short_help="Compare what a quantized model generates with what its source does.")
@click.option(
    "--reference", type=_FOLDER, required=True, metavar="MODEL", help="The model to compare with, here or on the Hub."
)
@click.option("--candidate", type=_FOLDER, metavar="OUT", help="Its conversion.")
@click.option(
    "--quantization",
    metavar="METHOD",
    help=f"Instead of a candidate: the reference, quantized while it loads. {', '.join(FORMATS)}, also fp8:channel.",
)
@click.option("--ignore", multiple=True, metavar="PATTERN", help="With --quantization: keep these layers. Repeatable.")
@click.option(
    "--layer", "layers", multiple=True, metavar="PATTERN=METHOD", help="With --quantization: as convert has it."
)
@click.option("--ignore-whole-group", is_flag=True, help="With --quantization: as convert has it.")
@click.option("--no-default-ignore", is_flag=True, help="With --quantization: as convert has it.")
@click.option("--target", metavar="TARGET", help="With --quantization: as convert has it.")
@click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Instead of --quantization: methods and rules from a YAML file.",
)
@click.option(
    "--task", type=click.Choice(TASKS), required=True, help="Images, videos, or the logits of a language model."
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Repeatable.")
@click.option("--negative-prompt", metavar="TEXT")
@click.option("--height", type=int)
@click.option("--width", type=int)
@click.option("--num-frames", type=int)
@click.option("--num-inference-steps", type=int)
@click.option("--guidance-scale", type=float)
@click.option("--cfg-scale", type=float, help="The true_cfg_scale of Qwen-Image and FLUX.")
@click.option("--seed", type=int, default=DEFAULT_SEED, show_default=True)
@click.option("--warmup-runs", type=int, default=1, show_default=True, help="Of at most two steps, not measured.")
@click.option("--measure-runs", type=int, default=1, show_default=True, help="Of which time and memory are reported.")
@click.option("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:N, npu or npu:N.")
@click.option(
    "--gate",
    metavar="GATE",
    help=f"{', '.join(GATES)}, or conditions such as 'psnr_db>=25,mae<=6'. Exit status 1 if a prompt misses one.",
)
@click.option("--trace-layers", is_flag=True, help="Also measure every quantized layer on real activations.")
@click.option(
    "--output-json", type=_FOLDER, metavar="FILE", help="Write the result; replaces a file, as do both below."
)
@click.option("--html", "page", type=_FOLDER, metavar="FILE", help="Write a page with the outputs.")
@click.option("--save-output-dir", type=_FOLDER, metavar="FOLDER", help="Save images, frames or logits there.")
@json_option
def compare(
    reference: Path, candidate: Path | None, quantization: str | None, recipe: Path | None, ignore: tuple[str, ...],
    layers: tuple[str, ...], ignore_whole_group: bool, no_default_ignore: bool, target: str | None,
    prompts: tuple[str, ...], output_json: Path | None, page: Path | None, save_output_dir: Path | None,
    as_json: bool, **request: Any,
) -> None:  # fmt: skip
    """Generate with MODEL, then with OUT, from the same prompts and seed, and report how far apart they are.

    Exit status: 0 done, 1 failed or a condition of --gate missed, 2 wrong usage.
    """
    from omni_convert.comparing import compare as compare_outputs
    from omni_convert.converter.recipe import read_recipe

    models = [folder for folder in (reference, candidate) if folder]
    for model in models:
        note_local(model)
    for option, path in (("--output-json", output_json), ("--html", page), ("--save-output-dir", save_output_dir)):
        if path:
            check_place(path, option, outside=models, is_folder=option == "--save-output-dir")
    choices: dict[str, Any] = {
        "recipe": read_recipe(recipe) if recipe else None,
        "ignore": ignore,
        "layers": layers,
        "ignore_whole_group": ignore_whole_group,
        "target": target,
    }
    given = {name: value for name, value in choices.items() if value}
    if no_default_ignore:
        given["default_ignore"] = False
    result = compare_outputs(
        reference, candidate, quantization=quantization, prompt=prompts, progress=True, **request, **given
    )
    failures = _write(result, output_json, page, save_output_dir)
    print_result(result.to_dict() if as_json else result.to_text())
    if failures:
        raise OmniConvertError(f"{', '.join(failures)}, expected a place with room and rights. The rest is done.")
    if not result.ok:
        sys.exit(1)


def _write(result: Comparison, output_json: Path | None, page: Path | None, folder: Path | None) -> list[str]:
    """Everything that can be; returns what cannot, and why."""
    places: list[tuple[str, Path | None, Callable[[Path], object]]] = [
        ("--output-json", output_json, lambda path: path.write_text(_json(result), encoding="utf-8")),
        ("--html", page, lambda path: path.write_text(result.to_html(), encoding="utf-8")),
        ("--save-output-dir", folder, result.save_outputs),
    ]
    failures = []
    for option, path, write in places:
        try:
            if path:
                write(path)
                note_written(path)
        except OSError as error:
            failures.append(f"{option} {path} cannot be written ({error.strerror or error})")
    return failures


def _json(result: Comparison) -> str:
    return json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"
