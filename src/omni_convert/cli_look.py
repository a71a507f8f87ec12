"""Commands that look at models and checkpoints and write nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from omni_convert.cli_output import json_option, note_local, print_result


@click.command(short_help="Show which models each target can load, with which methods.")
@json_option
def models(as_json: bool) -> None:
    """Show which models each target is known to load, with which methods, and what it keeps by default."""
    from omni_convert.converter.models import models_dict, models_text

    print_result(models_dict() if as_json else models_text())


@click.command(short_help="Show what is in a checkpoint, quantized or not (headers only).")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what is in the checkpoint at PATH, or in org/name[@revision] on the Hub: classes, dtypes, sizes, quantized
    and kept layers."""
    from omni_convert.converter.inspect import inspect as inspect_checkpoint

    note_local(path)
    summary = inspect_checkpoint(path)
    print_result(summary.to_dict() if as_json else summary.to_text())


@click.command(short_help="Check a converted checkpoint against its manifest, its format and its source.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="Measure every layer's error against this model.")
@json_option
def verify(out: Path, source: Path | None, as_json: bool) -> None:
    """Check OUT: file hashes against the manifest, tensors against the format, and errors against the source."""
    from omni_convert.converter.verify import verify as verify_output

    result = verify_output(out, source=source, progress=True)
    print_result(result.to_dict() if as_json else result.to_text())
    if not result.ok:
        sys.exit(1)
