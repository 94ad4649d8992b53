"""The table of commands, and the one place where errors become messages and exit codes."""

import errno
import io
import os
import sys
import traceback
from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
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

COMMANDS = {
    "demo": "Run everything in a minute, without network, data or GPU.",
    "doctor": "Check whether this machine is ready for a run.",
    "sync": "Download the pairs from a bucket, or upload them.",
    "pack": "Pack files, a table or shards into WebDataset shards.",
    "inspect": "Show what a data set contains, and what is wrong with it.",
    "find-batch-size": "Find the fastest micro-batch size that fits in memory.",
    "train": "Fine-tune CLIP with one scenario and show the gain.",
    "resume": "Continue a run that was stopped.",
    "evaluate": "Compare a fine-tuned model with its pretrained model.",
    "zero-shot": "Evaluate a single model: retrieval and classification.",
    "ablate": "Compare scenarios, settings and seeds, and name the best.",
    "tune": "Search for better settings within a budget.",
    "soup": "Average the weights of several runs into one model.",
    "report": "Write a page about a run or an ablation.",
    "export": "Export a model for other libraries, with a model card.",
    "search": "Find images by words or by another image.",
    "embed": "Write the embeddings of a data set as Parquet files.",
    "browse": "Search with both models of a run, and judge them blind.",
    "cache": "Show what the cache holds, and prune it.",
    "settings": "Print the settings as TOML, each with its source.",
}
"""Every command with the first sentence of its help, so that ``clipft --help`` imports none."""

_MODULES = {
    "resume": "train",
    "find-batch-size": "train",
    "zero-shot": "evaluate",
    "tune": "ablate",
    "report": "browse",
    "embed": "search",
    "cache": "doctor",
    "settings": "doctor",
}
"""Commands in the module of a related one; the others have a module of their own name."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
"""What a disk reports when it is full, read-only or broken."""


class _PlainHelp:
    """Help texts in which brackets are plain text."""

    help: str | None
    params: list[Any]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.help = escape(self.help or "")
        for param in self.params:  # rich would read [default: none] as markup, and drop it
            param.help = escape(param.help or "")

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = param.metavar or ""  # typer would write <bool>
        return params


class _PlainCommand(_PlainHelp, TyperCommand):
    pass


class _PlainGroup(_PlainHelp, TyperGroup):
    pass


def command_of(name: str) -> "Command":
    """Import the command of that name."""
    function = name.replace("-", "_")
    module = import_module(f"clipft.cli.commands.{_MODULES.get(name, function)}")
    command: Command = getattr(module, function)
    return command


def app_with(wanted: Collection[str]) -> typer.Typer:
    """The app with every command, of which only those in ``wanted`` have their options: making
    the options of all commands takes longer than showing the help of one."""
    app = typer.Typer(
        name="clipft",
        cls=_PlainGroup,
        help="Fine-tune CLIP on your image-text pairs, and measure the improvement.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            # --s3_bucket is the same as --s3-bucket
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )
    for name, summary in COMMANDS.items():
        function = command_of(name).function if name in wanted else lambda: None
        app.command(name, cls=_PlainCommand, help=None if name in wanted else summary)(function)

    @app.callback(invoke_without_command=True)
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    ) -> None:
        if version:
            print(__version__)
            raise typer.Exit

    return app


def main() -> None:
    """Run the command line and exit; ``clipft.core.errors`` lists the exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal has every character
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run one command and return its exit code."""
    # To complete a command line the shell needs the options of every command
    completes = "_CLIPFT_COMPLETE" in os.environ
    wanted = COMMANDS if completes else {arg.replace("_", "-") for arg in args}
    try:
        app = app_with(wanted)
        return int(app(args, standalone_mode=False, prog_name="clipft", obj=args) or 0)
    except ClipftError as error:
        known = error
    except TyperException as raised:
        message, context = raised.format_message(), getattr(raised, "ctx", None)
        if not message:  # no command was given, and the help was printed
            return UsageError.exit_code
        path = context.command_path if context else "clipft"
        known = UsageError(message[0].lower() + message[1:], f"see `{path} --help`")
    except BrokenPipeError:
        silence_broken_pipe(sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        known = _explained(error)
    if "--debug" in args:
        traceback.print_exception(known)
    from clipft.cli.launch import told_launcher

    if not known.said and not told_launcher(known):
        print_error(known, as_json="--json" in args)
    return known.exit_code


def _explained(error: Exception) -> ClipftError:
    """The clipft error for an exception of a library: full disk, memory, installation, or a bug.

    Libraries' errors are recognized by name and text, because importing torch takes seconds.
    """
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        from clipft.core.files import disk_hint

        where = f" to {error.filename}" if error.filename else ""
        return StorageError(f"cannot write{where}: {error.strerror}", disk_hint(error))
    out_of_memory = type(error).__name__ in {"OutOfMemoryError", "MemoryError"}
    if out_of_memory or "can't allocate memory" in str(error):
        return MemoryShortage(
            f"out of memory: {first_line(error)}",
            "use a smaller --micro-batch-size or fewer --num-workers; `clipft resume` continues "
            "from the last checkpoint",
        )
    foreign = isinstance(error, ImportError) and not (error.name or "").startswith("clipft")
    if foreign or "operator torchvision::" in str(error):
        cause = error
        while isinstance(cause.__cause__, Exception):  # transformers names only its own module
            cause = cause.__cause__
        return NotReady(
            f"a library cannot be loaded: {first_line(cause)}",
            "`clipft doctor` shows which one, and how to repair the installation",
        )
    bug = ClipftError(
        f"unexpected {type(error).__name__}: {error}",
        "this is a bug: run again with --debug and report the traceback",
    )
    bug.__cause__ = error
    return bug
