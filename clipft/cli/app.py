"""The map of the commands, and the one place where errors become sentences."""

import errno
import sys
import traceback
from typing import Any

import typer
from typer.exceptions import TyperException

from clipft import __version__
from clipft.cli.ablate import ablate
from clipft.cli.console import print_error, silence_broken_pipe
from clipft.cli.demo import demo
from clipft.cli.doctor import doctor
from clipft.cli.evaluate import evaluate
from clipft.cli.export import export
from clipft.cli.find_batch_size import find_batch_size
from clipft.cli.help import HelpfulCommand, HelpfulGroup
from clipft.cli.inspect import inspect
from clipft.cli.launching import told_launcher
from clipft.cli.pack import pack
from clipft.cli.report import report
from clipft.cli.resume import resume
from clipft.cli.search import search
from clipft.cli.settings import settings
from clipft.cli.sync import sync
from clipft.cli.train import train
from clipft.cli.zero_shot import zero_shot
from clipft.errors import ClipftError, MemoryShortage, StorageError, UsageError, first_line

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
"""What a disk says that is full, read-only or broken."""

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
COMMANDS = (
    demo,
    doctor,
    sync,
    pack,
    inspect,
    find_batch_size,
    train,
    resume,
    evaluate,
    zero_shot,
    ablate,
    report,
    export,
    search,
    settings,
)
for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"), cls=HelpfulCommand)(command)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; every way out has its exit code (see ``clipft.errors``)."""
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        return int(app(args, standalone_mode=False, prog_name="clipft", obj=args) or 0)
    except ClipftError as error:
        known = error
    except TyperException as error:
        if not error.format_message():  # no command at all: the help was printed
            return UsageError.exit_code
        known = _usage(error)
    except BrokenPipeError:
        silence_broken_pipe()
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        known = _unforeseen(error)
    if "--debug" in args:
        traceback.print_exception(known)
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


def _unforeseen(error: Exception) -> ClipftError:
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f" at {error.filename}" if error.filename else ""
        return StorageError(
            f"the disk takes no more{where}: {error.strerror}",
            "make room or write to another place; what was there before is untouched",
        )
    if _is_memory(error):
        return MemoryShortage(
            f"memory ran out: {first_line(error)}",
            "use a smaller --micro-batch-size or fewer --num-workers; `clipft resume` goes on "
            "from the last checkpoint",
        )
    bug = ClipftError(
        f"unexpected {type(error).__name__}: {error}",
        "this is a bug: run again with --debug and report the traceback",
    )
    bug.__cause__ = error
    return bug
