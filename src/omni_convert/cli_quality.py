"""Commands that tell what quantization cost."""

from __future__ import annotations

from pathlib import Path

import click

from omni_convert.cli_output import (
    check_place,
    json_option,
    note_local,
    note_written,
    print_result,
    write_text,
    writing,
)


@click.command(short_help="Show what quantization cost every layer, as a page, as data or as pictures.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="Measure every layer anew, against this model.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Show errors on real activations too: what compare --trace-layers --output-json wrote.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML page; replaces a file."
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write PNG pictures, as for a model card; replaces files.",
)
@json_option
def report(
    out: Path, source: Path | None, trace: Path | None, output: Path | None, pictures: Path | None, as_json: bool
) -> None:
    """Show what the conversion in OUT cost: the worst layers, and what keeping them would cost.

    Without --source, from what the conversion recorded in OUT; 'omni-convert convert --report FILE' records most.
    """
    from omni_convert.quality.report import report as layer_report

    read = [path for path in (out, source, trace) if path]
    if output:
        check_place(output, "-o", outside=read)
    if pictures:
        check_place(pictures, "--pictures", outside=read, is_folder=True)
    if source:
        note_local(source)
    found = layer_report(out, source=source, trace=trace, progress=True)
    if output:
        write_text(output, found.to_html())
    if pictures:
        from omni_convert.quality.pictures import write_pictures

        with writing(pictures):
            for path in write_pictures(found, pictures):
                note_written(path)
    print_result(found.to_dict() if as_json else found.to_text())
