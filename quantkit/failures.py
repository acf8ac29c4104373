"""How a command fails: one line on stderr, or one JSON object on stdout, and an exit code.

What is raised below the command line, and what the parser of its options says. Of several processes that a launcher
started, one says it.
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from quantkit import display
from quantkit.errors import QuantkitError, QuantkitWarning, TeamError, UsageError

if TYPE_CHECKING:
    from quantkit.calibrate.team import Team


class OneLine(TyperGroup):
    """The commands; what the parser refuses is told as every other error is."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **more: Any) -> Any:  # noqa: ANN401  as the base's
        """Parse and run; exit with the code of the error if there is one."""
        given = list(sys.argv[1:] if args is None else args)
        if not given:  # then the help is shown
            return super().main(given, *rest, **more)
        try:
            code = super().main(given, *rest, **{**more, "standalone_mode": False})
        except typer.Abort:
            sys.exit(1)
        except Exception as error:
            # the parser's own errors have no public name in typer
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            where = context.command_path if context else "quantkit"
            message = error.format_message().rstrip(".")
            link = " See" if message.endswith("?") else "; see"
            if leads():
                display.failed(f"{message}{link} {where} --help", UsageError.exit_code, as_json="--json" in given)
            sys.exit(UsageError.exit_code)
        sys.exit(code)


def _quiet_libraries() -> None:
    """Keep advisory messages of libraries off the terminal; their errors reach the user as ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Show an error of the user's as one line, or one JSON object, and exit with its code."""
    _quiet_libraries()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", QuantkitWarning)
            warnings.showwarning = lambda message, *_: display.warned(str(message))
            yield
    except QuantkitError as error:
        display.failed(_with_notes(str(error), error), error.exit_code, as_json=as_json)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as error:
        kept = _with_notes("interrupted", error)
        display.failed(kept if ";" in kept else f"{kept}; nothing was written", 130, as_json=as_json)
        raise typer.Exit(130) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
            raise
        hint = "lower --samples, --seqlen or --batch-size (quantkit quantize --dry-run predicts the peak)"
        display.failed(_with_notes(f"out of memory; {hint}", error), 1, as_json=as_json)
        raise typer.Exit(1) from None


def _with_notes(message: str, error: BaseException) -> str:
    """Return the message with what the error's notes say of going on."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


def leads() -> bool:
    """Return whether this process is alone or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def launched() -> Iterator["Team | None"]:
    """Join the processes that a launcher started, None without one; of those that fail, one is left to say why."""
    if os.environ.get("WORLD_SIZE", "1") == "1":  # nothing to import torch for
        yield None
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is told in one line, below
    from quantkit.calibrate.team import Team
    from quantkit.keeping import Stopped

    with Team.join() as team:
        try:
            yield team
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which has seen that one of us ended
            cause = isinstance(error, Stopped) or not isinstance(error, TeamError | KeyboardInterrupt)
            missing = team.farewell(cause=cause)
            if missing is None:
                raise typer.Exit(getattr(error, "exit_code", 1)) from None
            if len(missing) == 1 and not cause:
                raise TeamError(
                    f"process {missing[0]} of {team.size}, counted from 0, ended; start the same command again"
                ) from error
            raise


@contextmanager
def alone() -> Iterator[None]:
    """Refuse to be one of several processes.

    Raises:
        UsageError: a launcher started others beside this one.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and not leads():
        raise typer.Exit(UsageError.exit_code)
    if size != "1":
        raise UsageError(f"this command runs in one process, not in {size}; start it without the launcher")
    yield
