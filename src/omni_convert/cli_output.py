"""What every command shares: results on stdout, as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from omni_convert.formats.layout import MANIFEST_NAME

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def note_local(source: Path) -> None:
    """Say that a folder or file here was meant, where a repository on the Hub could have been."""
    from omni_convert.converter.hub_repo import parse_repo

    ours = (source / MANIFEST_NAME).exists()  # nobody takes that for a repository
    if parse_repo(str(source)) and source.exists() and not ours:
        click.echo(f"Note: {source} is what lies here, not the repository of that name on the Hub.", err=True)


def print_result(result: str | dict[str, Any]) -> None:
    click.echo(result if isinstance(result, str) else json.dumps(result, indent=2, allow_nan=False))
