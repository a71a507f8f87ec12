"""Commands that write to the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omni_convert.cli_output import json_option, print_result
from omni_convert.formats.errors import UsageError

if TYPE_CHECKING:
    from omni_convert.hub.push import Change, Confirm


@click.command(short_help="Publish a converted checkpoint on the Hugging Face Hub, with a model card.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--create-pr", is_flag=True, help="Leave the pull request open instead of merging it.")
@click.option(
    "--card",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Publish this README.md instead of the one that is written from the manifest.",
)
@click.option("--base-model", metavar="ORG/NAME", help="What was converted, if it was a local folder.")
@click.option("--message", metavar="TEXT", help="Title of the commit.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def push(out: Path, repo: str, yes: bool, as_json: bool, **choices: Any) -> None:
    """Publish the converted checkpoint OUT as ORG/NAME: verify it, show what will be uploaded, ask, upload.

    The repository shows all of it or what it showed before. The token is that of 'hf auth login', or HF_TOKEN.
    """
    from omni_convert.hub.push import push as push_folder

    result = push_folder(out, repo, progress=True, confirm=_asking(yes), **choices)
    if result is None:
        click.echo("Nothing was uploaded.", err=True)
        sys.exit(1)
    print_result(result.to_dict() if as_json else result.url)


def _asking(yes: bool) -> Confirm:
    """Shows what an upload would change, and asks, unless ``yes``."""

    def confirm(url: str, changes: tuple[Change, ...]) -> bool:
        from omni_convert.hub.push import changes_text

        click.echo(changes_text(url, changes), err=True)
        if yes or all(change.state == "unchanged" for change in changes):
            return True
        if not sys.stdin.isatty():
            raise UsageError("Nobody can be asked whether to upload that: pass --yes.")
        return click.confirm("Upload?", err=True)

    return confirm
