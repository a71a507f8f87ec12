"""Commands and options that write to the Hugging Face Hub."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omni_convert.cli_output import json_option, print_result
from omni_convert.formats.errors import UsageError

if TYPE_CHECKING:
    from omni_convert.hub.push import Change, Confirm
    from omni_convert.hub.transfer import Target

HUB = "hub:"
"""Before ORG/NAME, where OUT may be a folder too."""


def hub_options(prefix: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How something is published. ``prefix``: of the help texts."""
    options = (
        click.option("--private", is_flag=True, help=f"{prefix}Make the repository private, if it is made."),
        click.option("--create-pr", is_flag=True, help=f"{prefix}Leave the pull request open instead of merging it."),
        click.option(
            "--card",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE",
            help=f"{prefix}Publish this README.md instead of the one that is written from the manifest.",
        ),
        click.option("--base-model", metavar="ORG/NAME", help=f"{prefix}What was converted, if it was a local folder."),
        click.option("--message", metavar="TEXT", help=f"{prefix}Title of the commit."),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def hub_target(out: Path, work: Path | None, **choices: Any) -> Target | None:
    """Where OUT says that a conversion is to be published; None if it is a folder.

    Raises:
        UsageError: choices of how to publish, for a folder.
    """
    if str(out).startswith(HUB):
        from omni_convert.hub.transfer import Target

        return Target(repo_id=str(out).removeprefix(HUB), work=work, **choices)
    given = {"work": work} | choices
    if unused := next((name for name, value in given.items() if value), None):
        raise UsageError(
            f"--{unused.replace('_', '-')}: OUT is the folder {out}, which is not published. Give {HUB}ORG/NAME, or "
            "leave out the option."
        )
    return None


@click.command(short_help="Publish a converted checkpoint on the Hugging Face Hub, with a model card.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@hub_options()
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
        try:
            return click.confirm("Upload?", err=True)
        except click.Abort:
            raise KeyboardInterrupt from None

    return confirm
