"""The map of the commands, and the one place where errors become sentences."""

import errno
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.exceptions import TyperException

from clipft import __version__
from clipft.cli.console import print_error, silence_broken_pipe
from clipft.core.errors import (
    ClipftError,
    MemoryShortage,
    NotReady,
    StorageError,
    UsageError,
    first_line,
)

if TYPE_CHECKING:
    from clipft.cli.options import Command

from rich.markup import escape
from typer.core import TyperCommand, TyperGroup


class _Helpful:
    help: str | None
    params: list[Any]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.help = escape(self.help or "")
        for param in self.params:  # rich would take [default: none] for markup, and drop it
            param.help = escape(param.help or "")

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = param.metavar or ""  # typer would write <bool>
        return params


class HelpfulCommand(_Helpful, TyperCommand):
    """A command."""


class HelpfulGroup(_Helpful, TyperGroup):
    """``clipft`` itself."""


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
"""What a disk says that is full, read-only or broken."""

COMMANDS = {
    "demo": "See it all in a minute: no network, no data, no GPU.",
    "doctor": "Say whether this machine is ready, and what to do if not.",
    "sync": "Bring the pairs from a bucket to --data-dir, or send them.",
    "pack": "Make shards (WebDataset) from files, a table or shards.",
    "inspect": "Say what is in a catalogue and what is wrong with it.",
    "find-batch-size": "Find the micro-batch that fits and is fastest here.",
    "train": "Fine-tune CLIP under one scenario and show the gain.",
    "resume": "Go on with a run that was stopped.",
    "evaluate": "Measure a tuned model beside the untouched one.",
    "zero-shot": "Measure a model as it is: retrieval and classification.",
    "ablate": "Run scenarios x settings x seeds, and show which to take.",
    "report": "Make one page of a run or an ablation.",
    "export": "Hand a tuned model to other libraries, with a model card.",
    "search": "Find pictures by words or by another picture.",
    "settings": "Print the settings as TOML, each with its source.",
}
"""Each with the first sentence of its help. ``clipft --help`` needs no more of them."""

_SHARED_MODULES = {"resume": "train", "find-batch-size": "train", "zero-shot": "evaluate"}
"""Commands that share a module with a sibling; the others have a module of their own name."""


def command_of(name: str) -> "Command":
    """The command of that name, from the module of that name."""
    function = name.replace("-", "_")
    module = import_module(f"clipft.cli.commands.{_SHARED_MODULES.get(name, function)}")
    command: Command = getattr(module, function)
    return command


def app_with(wanted: Collection[str]) -> typer.Typer:
    """All commands, those named in ``wanted`` with their options: to load all takes longer than
    the help of one."""
    app = typer.Typer(
        name="clipft",
        cls=HelpfulGroup,
        help="Fine-tune CLIP on your image-text pairs, and know that the result is better.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            # --s3_bucket is --s3-bucket
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )
    for name, summary in COMMANDS.items():
        function = command_of(name).function if name in wanted else _named
        app.command(name, cls=HelpfulCommand, help=None if name in wanted else summary)(function)
    app.callback(invoke_without_command=True)(_root)
    return app


def _named() -> None:
    """Of a command that is not called."""


def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _called(args: Sequence[str]) -> set[str]:
    """The commands that ``args`` may call; all, where the shell asks what to complete."""
    if "_CLIPFT_COMPLETE" in os.environ:
        return set(COMMANDS)
    return {arg.replace("_", "-") for arg in args}


def main() -> None:
    """Run the command line; every way out has its exit code (see ``clipft.core.errors``)."""
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        app = app_with(_called(args))
        return int(app(args, standalone_mode=False, prog_name="clipft", obj=args) or 0)
    except ClipftError as error:
        known = error
    except TyperException as error:
        if not error.format_message():  # no command at all: the help was printed
            return UsageError.exit_code
        known = _usage(error)
    except BrokenPipeError:
        silence_broken_pipe(sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        known = _unforeseen(error)
    if "--debug" in args:
        traceback.print_exception(known)
    from clipft.cli.launch import told_launcher

    if not known.said and not told_launcher(known):
        print_error(known, as_json="--json" in args)
    return known.exit_code


def _usage(error: Any) -> UsageError:
    command = error.ctx.command_path if getattr(error, "ctx", None) else "clipft"
    message = error.format_message()
    return UsageError(message[0].lower() + message[1:], f"see `{command} --help`")


def _is_memory(error: Exception) -> bool:
    """By name and text: torch is not imported to ask."""
    named = type(error).__name__ in {"OutOfMemoryError", "MemoryError"}
    return named or "can't allocate memory" in str(error)


def _is_library(error: Exception) -> bool:
    """Of an installation that does not fit together; clipft's own modules are there."""
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("clipft")
    return "operator torchvision::" in str(error)


def _unforeseen(error: Exception) -> ClipftError:
    if isinstance(error, OSError) and error.errno in _DISK:
        from clipft.core.files import disk_hint

        where = f" at {error.filename}" if error.filename else ""
        return StorageError(
            f"the disk takes no more{where}: {error.strerror}",
            disk_hint(error),
        )
    if _is_memory(error):
        return MemoryShortage(
            f"memory ran out: {first_line(error)}",
            "use a smaller --micro-batch-size or fewer --num-workers; `clipft resume` goes on "
            "from the last checkpoint",
        )
    if _is_library(error):
        return NotReady(
            f"a library does not load: {first_line(error)}",
            "`clipft doctor` says which one, and how to mend it",
        )
    bug = ClipftError(
        f"unexpected {type(error).__name__}: {error}",
        "this is a bug: run again with --debug and report the traceback",
    )
    bug.__cause__ = error
    return bug
