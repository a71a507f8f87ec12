"""The command line: a thin layer over the functions of the same names. Results on stdout, all else on stderr."""

from __future__ import annotations

import difflib
import os
import signal
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from omni_convert import __version__
from omni_convert.cli_analyze import analyze
from omni_convert.cli_compare import compare
from omni_convert.cli_convert import convert
from omni_convert.cli_hub import push
from omni_convert.cli_look import inspect, models, verify
from omni_convert.cli_output import WRITTEN
from omni_convert.cli_quality import report
from omni_convert.formats.errors import OmniConvertError, UsageError

_EPILOG = """\b
Examples:
  omni-convert --method int8 model/ out/
  omni-convert --method int8 --ignore img_mlp --dry-run Qwen-Image/ out/
  omni-convert --method fp8 --granularity channel --quality balanced model/ out/
  omni-convert --method int8 --ignore 're:blocks\\.[01]\\.' --link pipeline/ out/
  omni-convert --method fp8 Qwen/Qwen-Image out/
  omni-convert --recipe recipe.yaml model/ out/
  omni-convert analyze model/ --methods int8,fp8:channel --budget "size<=0.6"
  omni-convert models
  omni-convert inspect out/
  omni-convert verify out/ --source model/
  omni-convert report out/ -o report.html
  omni-convert push out/ me/Qwen-Image-INT8
  omni-convert compare --reference model/ --candidate out/ --task t2i --prompt 'a cup of coffee' --gate smoke
  omni-convert --method int8 Qwen/Qwen-Image hub:me/Qwen-Image-INT8
"""


class _Failure(click.ClickException):
    """One paragraph on stderr and exit status 1."""


class _WrongUsage(click.ClickException):
    """One paragraph on stderr and exit status 2."""

    exit_code = 2


class _DefaultGroup(click.Group):
    """A group whose bare form is a command: ``omni-convert --method int8 model/ out/``.

    Only a first argument that is exactly a subcommand's name selects it; a folder of that name is ``./verify``.
    """

    default = "convert"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {option for param in self.get_params(ctx) for option in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            close = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
            if close and not Path(args[0]).exists():
                ctx.fail(f"There is no command or folder {args[0]!r}. Did you mean {close[0]!r}?")
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Errors that the user can act on become one paragraph and an exit status; a signal, a tidy end."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, _interrupt)
        try:
            return super().invoke(ctx)
        except PermissionError as error:
            raise _Failure(f"{error.filename}: cannot be read ({error.strerror}). Check its rights.") from error
        except UsageError as error:
            raise _WrongUsage(str(error)) from error
        except OmniConvertError as error:
            raise _Failure(str(error)) from error
        except KeyboardInterrupt as interrupt:
            kept = f" Nothing {'else ' if ctx.meta.get(WRITTEN) else ''}of this run is kept."
            raise _Failure(f"Interrupted.{str(interrupt) or kept}") from None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        bare = self.commands[self.default]
        return super().shell_complete(ctx, incomplete) + bare.shell_complete(click.Context(bare), incomplete)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("omni-convert", "[OPTIONS] MODEL OUT")
        formatter.write_usage("omni-convert", "COMMAND [ARGS]...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        convert_command = self.commands[self.default]
        convert_command.format_options(click.Context(convert_command, parent=ctx), formatter)
        rows = [(name, cmd.get_short_help_str(90)) for name, cmd in self.commands.items() if name != self.default]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(*_: object) -> None:
    """The first signal ends the run; those that follow must not disturb it while it tidies up."""
    for number in _SIGNALS:
        signal.signal(number, _overhear)
    raise KeyboardInterrupt


def _overhear(*_: object) -> None:
    """What SIG_IGN does, also for a signal that came at the same moment."""


@click.group(cls=_DefaultGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="omni-convert")
def main() -> None:
    """Convert a BF16 checkpoint once into a quantized checkpoint that inference engines load unchanged.

    MODEL is a diffusers pipeline folder, one component's folder, a transformers folder, a .safetensors file, or
    org/name[@revision] on the Hugging Face Hub. OUT is a new folder with the same layout, or hub:org/name. Exit
    status: 0 done, 1 failed, 2 wrong usage.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what is worth telling of the Hub, this program tells


for _command in (convert, analyze, models, inspect, verify, report, compare, push):
    main.add_command(_command)
