"""Commands that tell what quantization cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from omni_convert.cli_output import json_option, print_result
from omni_convert.formats.errors import UsageError

if TYPE_CHECKING:
    from omni_convert.quality.report import LayerReport


@click.command(short_help="Show what quantization cost every layer, as a page, as data or as pictures.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="Measure every layer anew, against this model.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Show errors on real activations too: what compare --trace-layers --output-json wrote.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML page.")
@click.option(
    "--pictures", type=click.Path(path_type=Path), metavar="DIR", help="Write PNG pictures, as for a model card."
)
@json_option
def report(
    out: Path, source: Path | None, trace: Path | None, output: Path | None, pictures: Path | None, as_json: bool
) -> None:
    """Show what the conversion in OUT cost: the worst layers, and what keeping them would cost.

    Without --source, from what the conversion recorded in OUT; 'omni-convert convert --report FILE' records most.
    """
    from omni_convert.quality.report import report as layer_report

    if output:
        check_place(output, "-o")
    found = layer_report(out, source=source, trace=trace, progress=True)
    if output:
        write_page(found, output)
    if pictures:
        from omni_convert.quality.pictures import write_pictures

        for path in write_pictures(found, pictures):
            click.echo(f"Wrote {path}", err=True)
    print_result(found.to_dict() if as_json else found.to_text())


def check_place(path: Path, option: str) -> None:
    """Raises:
    UsageError: there is no folder for ``path``, or it is one.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"found no folder {path.parent}"
        raise UsageError(f"{option} {path}: {what}, expected the name of a file to write, such as report.html.")


def write_page(found: LayerReport, path: Path) -> None:
    """The report as a page."""
    path.write_text(found.to_html(), encoding="utf-8")
    click.echo(f"Wrote {path}", err=True)
