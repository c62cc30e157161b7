"""Feed the toolkit files that a hostile stranger could have made, and see that nothing happens but a clear message.

    python tests/fuzz/fuzz.py --minutes 5 --seed 0
    python tests/fuzz/fuzz.py --minutes 1 --targets tars,checkpoints
    python tests/fuzz/fuzz.py --seed 0 --case tars:17          (one case again, with its traceback)

A case is good if the files are read, or refused by a `UserError`: one printable line. It is a finding if there is
another exception, or a message of many lines; if it takes more than `CASE_SECONDS`, or more memory than `MAX_GROWTH`
beyond what the process has at its start; if the process dies; and if anything is executed: a program started, a
connection made, a class looked up by a pickle, or a file touched outside the case's own folder. The exit status is 1
if there are findings.

Each target runs in a process of its own, forked from this one, so that libraries are imported once. Case N of a
target depends on the seed and N alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

# Before libraries are imported: forked processes may not share a pool of threads.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
from hostile import TARGETS, Target
from rich.console import Console
from rich.table import Table

from ldgan.engine import cli
from ldgan.engine.cli import UserError

CASE_SECONDS = 10.0
HANG_SECONDS = 30.0  # after which a process is killed that does not even heed the alarm
MAX_GROWTH = 3 << 30  # bytes of address space; an image of as many pixels as Pillow allows takes 2 GB on its way

# What no reading of data may do, by the names of Python's audit events (docs.python.org/3/library/audit_events).
FORBIDDEN_EVENTS = frozenset(
    (
        *("os.exec", "os.fork", "os.forkpty", "os.kill", "os.posix_spawn", "os.putenv", "os.spawn", "os.system"),
        *("pickle.find_class", "pty.spawn", "socket.bind", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"),
    )
)
PATH_EVENTS = frozenset(
    ("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")
)


class Outcome(NamedTuple):
    """What came of a case: "read", "refused", or a finding, whose ``detail`` says what it is."""

    number: int
    kind: str
    detail: str = ""

    @property
    def is_finding(self) -> bool:
        """Whether this should not happen."""
        return self.kind not in ("read", "refused")


class SlowError(BaseException):
    """Raised by the alarm; no Exception, which the code that is tested may handle."""


class Guard:
    """Notes and prevents what a case may not do; an audit hook, which stays for the life of the process."""

    def __init__(self) -> None:
        self.folder: str | None = None  # of the case under way
        self.seen: list[str] = []
        sys.addaudithook(self._watch)

    @contextlib.contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        """Watch while the block runs, which may write to ``folder`` alone."""
        self.folder, self.seen = os.path.realpath(folder), []
        try:
            yield
        finally:
            self.folder = None

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        touched: list[Any] = []
        if event == "open" and writes(*arguments):
            touched = [arguments[0]]
        elif event in PATH_EVENTS:
            paths = [path for path in arguments if isinstance(path, str | bytes | os.PathLike)]
            touched = [os.path.join(folder_of(arguments[-1]), os.fsdecode(path)) for path in paths]
        if event in FORBIDDEN_EVENTS or any(map(self._outside, touched)):
            self.seen.append(f"{event} {arguments!r:.200}")
            raise PermissionError(f"a case may not do this: {self.seen[-1]}")

    def _outside(self, path: Any) -> bool:
        if isinstance(path, int) or os.fspath(path) == os.devnull:
            return False
        folder, name = self.folder, os.path.abspath(os.fsdecode(path))
        return folder is not None and name != folder and not name.startswith(folder + os.sep)


def folder_of(descriptor: Any) -> str:
    """The folder that paths in an event are relative to, whose last argument is a descriptor, or -1."""
    return os.readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) and descriptor >= 0 else ""


def writes(_path: Any, mode: str | None, flags: int) -> bool:
    """Whether an "open" event is one for writing."""
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def run_case(target: Target, seed: int, number: int, guard: Guard, home: Path) -> Outcome:
    """Make case ``number`` in a new folder of ``home``, and read it."""
    folder = home / str(number)
    folder.mkdir()
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        with guard.watching(folder):
            target.run(random.Random(f"{seed}/{number}"), folder)
        kind, detail = "read", ""
    except UserError as error:
        kind, detail = judge(error)
    except SlowError:
        kind, detail = "slow", f"more than {CASE_SECONDS:g} seconds"
    except Exception as error:
        kind, detail = "exception", f"{type(error).__name__}: {str(error)[:300]}\n{traceback.format_exc()[-2500:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(number, "executed", "; ".join(guard.seen)) if guard.seen else Outcome(number, kind, detail)


def judge(error: UserError) -> tuple[str, str]:
    """Kind and detail of a refusal, which must be one line and not hide a lack of memory."""
    message = str(error)
    if not message or not message.isprintable():
        return "message", f"{message!r:.300}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return "memory", message
        cause = cause.__cause__ or cause.__context__
    return "refused", message


def child(target: Target, seed: int, first: int, home: Path, results: Connection) -> None:
    """Run cases ``first``, ``first`` + 1, ... for ever; tell of each that it begins, and its outcome."""
    prepare_process()
    guard = Guard()
    limit_memory(MAX_GROWTH)
    for number in itertools.count(first):
        results.send(number)
        results.send(run_case(target, seed, number, guard, home))


def prepare_process() -> None:
    """One thread, no output, an alarm that raises; nothing is compiled to files."""

    def alarm(*_: object) -> None:
        raise SlowError

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, alarm)
    os.environ["FUZZ_SECRET"] = "the secret of the environment"
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the life of the process


def limit_memory(growth: int) -> None:
    """Let the process have ``growth`` bytes more of address space than it has now."""
    with open("/proc/self/statm") as file:
        num_pages = int(file.read().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_pages * resource.getpagesize() + growth, hard))


def fuzz(name: str, seed: int, *, seconds: float | None = None, num_cases: int | None = None) -> list[Outcome]:
    """The outcomes of a target's cases, of the first ``num_cases`` or of so many as ``seconds`` allow."""
    outcomes: list[Outcome] = []
    until = time.monotonic() + seconds if seconds is not None else None
    with tempfile.TemporaryDirectory() as home:
        target = TARGETS[name]()
        target.prepare(Path(home))
        while not done(outcomes, until, num_cases):
            outcomes += one_process(target, seed, len(outcomes), Path(home), until, num_cases)
    return outcomes


def done(outcomes: list[Outcome], until: float | None, num_cases: int | None) -> bool:
    """Whether time or cases are used up."""
    return (until is not None and time.monotonic() > until) or (num_cases is not None and len(outcomes) >= num_cases)


def one_process(
    target: Target, seed: int, first: int, home: Path, until: float | None, num_cases: int | None
) -> list[Outcome]:
    """Outcomes of a child process until it has done enough, or dies."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(target, seed, first, home, sender), daemon=True)
    process.start()
    sender.close()
    outcomes: list[Outcome] = []
    number = first
    try:
        while not done(outcomes, until, None if num_cases is None else num_cases - first):
            if not receiver.poll(HANG_SECONDS):
                return [*outcomes, Outcome(number, "hang", f"does not end within {HANG_SECONDS:g} seconds")]
            message = receiver.recv()
            if isinstance(message, Outcome):
                outcomes.append(message)
            else:
                number = message
    except EOFError:
        process.join()
        outcomes.append(Outcome(number, "crash", f"the process ended with {process.exitcode}"))
    finally:
        process.kill()
        process.join()
    return outcomes


def table(outcomes: dict[str, list[Outcome]]) -> Table:
    """Cases by target and what came of them."""
    result = Table("target", "cases", "read", "refused", "findings", "messages", box=None, padding=(0, 2, 0, 0))
    for name, cases in outcomes.items():
        kinds = Counter(outcome.kind for outcome in cases)
        num_findings = sum(outcome.is_finding for outcome in cases)
        messages = {outcome.detail for outcome in cases if outcome.kind == "refused"}
        numbers = (len(cases), kinds["read"], kinds["refused"], num_findings, len(messages))
        result.add_row(name, *(f"{number:,}" for number in numbers))
    return result


def show_findings(name: str, outcomes: list[Outcome]) -> None:
    """Print findings, those that differ only in numbers once."""
    alike: dict[str, list[Outcome]] = {}
    for outcome in filter(lambda outcome: outcome.is_finding, outcomes):
        alike.setdefault(f"{outcome.kind}{re.sub('[0-9]+', '', outcome.detail)}", []).append(outcome)
    for first, *others in alike.values():
        print(f"{name}:{first.number} (and {len(others)} alike) {first.kind}: {first.detail}", flush=True)


def once_more(case: str, seed: int) -> None:
    """Run one case in this process, and let its exception out."""
    name, _, number = case.partition(":")
    if name not in TARGETS or not number.isdecimal():
        raise UserError(f"--case {case}: no such case; give TARGET:NUMBER, of {', '.join(TARGETS)}")
    target = TARGETS[name]()
    with tempfile.TemporaryDirectory() as home:
        target.prepare(Path(home))
        limit_memory(MAX_GROWTH)
        folder = Path(home) / number
        folder.mkdir()
        target.run(random.Random(f"{seed}/{number}"), folder)


def targets(text: str) -> list[str]:
    """Parse names of targets, for argparse."""
    names = text.split(",")
    if unknown := set(names) - set(TARGETS):
        raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {', '.join(TARGETS)}")
    return names


def parse_flags() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, metavar="N", help="in all, shared by the targets (default: 5)")
    add("--seed", type=int, default=0, help="decides what the cases are (default: 0)")
    add("--targets", type=targets, default=[*TARGETS], metavar="NAME,...", help=f"(default: {','.join(TARGETS)})")
    add("--case", metavar="TARGET:N", help="run this case alone, unguarded, and show what it raises")
    return parser.parse_args()


def main() -> None:
    """Fuzz, print what was found and a table."""
    flags = parse_flags()
    if flags.case is not None:
        once_more(flags.case, flags.seed)
        return
    seconds = flags.minutes * 60 / len(flags.targets)
    outcomes = {}
    for name in flags.targets:
        print(f"{name}: {seconds:.0f} s ...", flush=True)
        outcomes[name] = fuzz(name, flags.seed, seconds=seconds)
        show_findings(name, outcomes[name])
    Console(width=100).print(table(outcomes))
    sys.exit(any(outcome.is_finding for cases in outcomes.values() for outcome in cases))


if __name__ == "__main__":
    cli.run(main)
