"""What every command shares: results on stdout, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def print_result(result: str | dict[str, Any]) -> None:
    click.echo(result if isinstance(result, str) else json.dumps(result, indent=2, allow_nan=False))
