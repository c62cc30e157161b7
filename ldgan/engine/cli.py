"""What every command shares: errors that fit on one line, and the exit status that goes with them.

A command is a file with a function ``main``, that raises, and ``command``, that exits: `command` makes one of the
other, for ``if __name__ == "__main__"`` and for installed scripts. Before its imports, a file that is run as a script
puts the checkout's root first on sys.path. Python has put the file's own folder there, where our modules would shadow
libraries of the same name (`evaluate`, say) for every dependency.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NoReturn

MAX_MESSAGE_CHARACTERS = 5000


class UserError(Exception):
    """Something the person at the keyboard can mend.

    The message is one line that says what was wrong, where, and what to do. Commands print it without a
    traceback and exit with status 2. It may quote what a stranger wrote: line breaks become spaces, and codes that
    would steer the terminal are spelt out, and what goes on for screens is cut. The ``parameter`` at fault, if it is
    one, stands before it: by its name in Python, as the command's flag in `as_of_command`.
    """

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        self.parameter = parameter
        shown = message if len(message) <= MAX_MESSAGE_CHARACTERS else f"{message[:MAX_MESSAGE_CHARACTERS]}..."
        super().__init__("".join(map(_printable, shown)))

    def __str__(self) -> str:
        return f"{self.parameter}: {self.args[0]}" if self.parameter else self.args[0]

    def as_of_command(self) -> str:
        """The message to who has typed flags."""
        return f"--{self.parameter.replace('_', '-')}: {self.args[0]}" if self.parameter else self.args[0]


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()


def positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's ``main`` and exit: 0 when it returns, 2 on a `UserError`, 130 on Ctrl-C.

    A run that was sent SIGTERM or SIGUSR1 saves itself first and exits with 143 or 138; see `Session.steps`.
    """
    try:
        main()
    except UserError as error:
        _fail(error.as_of_command(), status=2)
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(
            f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command",
            2,
        )
    finally:
        _leave_processes()
    sys.exit(0)


def command(main: Callable[[], None]) -> Callable[[], NoReturn]:
    """The entry point of a command: calls its ``main`` by `run`."""
    return partial(run, main)


def _leave_processes() -> None:
    """Close the connections to the other processes of a command.

    Left to the interpreter's end, a thread that still listens to one that has ended may abort this process.
    """
    distributed = sys.modules.get("torch.distributed")  # not imported here, as it takes seconds
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        with suppress(RuntimeError):  # of one that is gone already
            distributed.destroy_process_group()


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
