"""Running cases in forked children of a warm process, and judging what they did.

A child runs many cases one after another and reports each on a pipe. When it dies or stalls, a new one continues, and
the case runs again alone: only what fails alone, or a death, is a failure. POSIX only.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from hostile.case import Case, Generator, Place

STALL = 60.0
"""Seconds without a report after which a child is killed: it waits for something, or the machine is very busy."""
BATCH = 100
"""Cases of one child, at most."""
LONGEST = 1000
"""Characters of a line on stderr, at most, after the name of the program."""
OVERTIME = "it was killed for its CPU time"
_ERROR = "npqwen: error: "
_PANIC = re.compile(r"\nthread '[^']*' \(\d+\) panicked at .*\n.*\nnote: run with `RUST_BACKTRACE=1`.*\n")
"""Three lines, without RUST_BACKTRACE in the environment."""
_PACE = 0.2
"""CPU seconds of the work in `_slowness` on the machine on which limits were set."""
_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024
_SUSPICIOUS = re.compile(r"Traceback \(most|^\s+File \"|Warning: |Exception ignored|panicked|RUST_BACKTRACE|dumped")


class Work(NamedTuple):
    """One case to run: the generator's category, the seed and the number determine it."""

    category: str
    seed: int
    number: int

    def __str__(self) -> str:
        return f"--category {self.category} --seed {self.seed} --case {self.number}"


class Failure(NamedTuple):
    """A case that did not end as it must."""

    work: Work
    label: str
    problem: str


class Report(NamedTuple):
    """What became of some cases."""

    counts: Counter[str]
    """Cases run, by category."""
    statuses: Counter[tuple[str, int]]
    """How many cases of a category ended with an exit status."""
    seconds: Counter[str]
    """CPU time, by category, making the files included."""
    failures: list[Failure]


class Runner:
    """Runs cases in children of this process, which must have no other threads."""

    def __init__(self, generators: dict[str, Generator], bases: Path, scratch: Path) -> None:
        self._generators = generators
        self._bases = bases
        self._scratch = scratch

    def run(self, works: Sequence[Work], jobs: int = 1, batch: int = BATCH) -> Report:
        """Run all cases, in `jobs` children at a time. batch: cases of one child, at most."""
        report = Report(Counter(work.category for work in works), Counter(), Counter(), [])
        gc.collect()
        gc.freeze()  # children's collections would look through, and copy, all that this process has
        batches = -(-len(works) // batch)
        queue = [list(works[at::batches]) for at in range(batches)]  # some of each category: all take as long
        running: list[_Child] = []
        try:
            while queue or running:
                while queue and len(running) < jobs:
                    running.append(_Child(self, queue.pop()))
                ready, _, _ = select.select([child.pipe for child in running], [], [], 1)
                for child in list(running):
                    if not child.read(child.pipe in ready):
                        continue
                    running.remove(child)
                    rest = self._settle(child, report)
                    if rest:
                        queue.append(rest)
        finally:
            for child in running:
                child.kill()
        report.failures.sort()
        return report

    def _settle(self, child: _Child, report: Report) -> list[Work]:
        """Take over what a child found that has ended; returns the cases that it has not run."""
        for work, found in zip(child.works, child.results, strict=False):
            if found["problem"] and (again := self._alone(work)) is not None:
                found = again
            report.statuses[work.category, found["status"]] += 1
            report.seconds[work.category] += found.get("seconds", 0)
            if found["problem"]:
                report.failures.append(Failure(work, found["label"], found["problem"]))
        if child.end is None:
            return child.works[len(child.results) :]
        work = child.works[len(child.results)]
        found = self._alone(work) or {"label": child.label, "status": -1, "problem": ""}
        if not found["problem"] and child.end != OVERTIME:
            first = child.works[0]
            found["problem"] = f"{child.end}, though not alone: the child had run the cases from {first} on"
        report.statuses[work.category, found["status"]] += 1
        if found["problem"]:
            report.failures.append(Failure(work, found["label"], found["problem"]))
        return child.works[len(child.results) + 1 :]

    def _alone(self, work: Work) -> dict[str, Any] | None:
        """The result of a case in a child of its own."""
        child = _Child(self, [work])
        while not child.read(bool(select.select([child.pipe], [], [], 1)[0])):
            pass
        if child.results:
            return child.results[0]
        return {"label": child.label, "status": -1, "problem": child.end or "it ended without a report"}

    def work(self, work: Work, directory: Path) -> Case:
        """Make a case in an empty directory."""
        random = Random(f"{work.category} {work.seed} {work.number}")
        return self._generators[work.category](random, Place(directory, self._bases))

    def place(self) -> Path:
        """The scratch directory of this process."""
        return self._scratch / str(os.getpid())


class _Child:
    """A forked process that runs cases."""

    def __init__(self, runner: Runner, works: list[Work]) -> None:
        self.works = works
        self.results: list[dict[str, Any]] = []
        self.label = ""
        """Of the case that it runs now."""
        self.end: str | None = None
        """Why it ended before it had run all; None if it had, or wanted to."""
        self._buffer = b""
        self._heard = time.monotonic()
        self._stalled = False
        self.pipe, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _child(runner, works, writer)
        os.close(writer)

    def read(self, ready: bool) -> bool:
        """Take what the child has reported; whether it has ended."""
        if not ready:
            if time.monotonic() - self._heard > STALL:
                self._stalled = True
                os.kill(self.pid, signal.SIGKILL)
            return False
        data = os.read(self.pipe, 1 << 16)
        self._heard = time.monotonic()
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            found = json.loads(line)
            if "problem" in found:
                self.results.append(found)
            self.label = found["label"]
        if data:
            return False
        self._reap()
        return True

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._reap()

    def _reap(self) -> None:
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            self.end = OVERTIME if name == "SIGXCPU" else f"it was killed by {name}"
            if self._stalled:
                self.end = f"it did nothing for {STALL:.0f} seconds"
        elif status:
            self.end = f"its process ended with status {os.WEXITSTATUS(status)}"


def _child(runner: Runner, works: Sequence[Work], writer: int) -> None:
    """Run cases in this process, report each as two lines of JSON, and exit."""
    status = 1
    try:
        place = runner.place()
        os.setpgid(0, 0)  # whatever the cases signal
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":  # no case shall bring the machine down
            limit = _virtual_bytes() + (4 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        warnings.simplefilter("always")
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MEMORY_UNIT
        for work in works:
            started = _cpu_seconds()
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            os.chdir(place)
            case = runner.work(work, place)
            _write(writer, {"label": case.label})
            _forget_peak()
            status, problem = _judged(case, place, base)
            os.chdir("/")
            seconds = _cpu_seconds() - started
            _write(writer, {"label": case.label, "status": status, "problem": problem, "seconds": seconds})
            if problem.startswith("it grew"):  # what comes after it cannot be measured any more
                break
        shutil.rmtree(place, ignore_errors=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _write(writer: int, report: dict[str, Any]) -> None:
    os.write(writer, json.dumps(report).encode() + b"\n")


def _judged(case: Case, place: Path, base: int) -> tuple[int, str]:
    """Run a case; its exit status, and what was wrong, "" for nothing. base: bytes of the process before all cases."""
    before = _cpu_seconds()
    with _cpu_limit(case.seconds), _environment(case.environment), _streams(place, case.stdin) as errors:
        status = run_case(case)
    seconds = _cpu_seconds() - before
    text = errors.read_bytes().decode("utf-8", "replace")
    problem = judge(status, _PANIC.sub("", text) if case.panics else text, case.statuses)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MEMORY_UNIT - base
    if not problem and seconds > case.seconds and seconds > case.seconds * _slowness():
        problem = f"it took {seconds:.1f} s of CPU time"
    if not problem and grown > case.growth:
        problem = f"it grew by {grown / 1e6:.0f} MB"
    return status, problem


def run_case(case: Case) -> int:
    """The exit status of the command, or of Python if it raises."""
    from npqwen.commands.cli import main
    from npqwen.errors import NpqwenError

    try:
        if case.call is None:
            main(case.args)
        else:
            case.call()
        return 0
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except NpqwenError as error:
        if case.call is None:
            traceback.print_exc()
            return 1
        print(f"{_ERROR}{error}", file=sys.stderr)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def judge(status: int, stderr: str, statuses: Sequence[int] = (0, 2)) -> str:
    """What is wrong with an exit status and the text on stderr; "" for nothing."""
    lines = stderr.split("\n")
    shown = next((line for line in reversed(lines) if line.strip()), "")[:300]
    if found := next((line for line in lines if _SUSPICIOUS.search(line)), None):
        return f"stderr has {found[:200]!r}, and last {shown!r}"
    if status not in statuses:
        return f"its exit status is {status}; stderr ends with {shown!r}"
    errors = [line for line in lines if line.startswith(_ERROR)]
    if len(errors) != int(status == 2):
        return f"its exit status is {status}, with {len(errors)} lines of errors; stderr ends with {shown!r}"
    if long := next((line for line in lines if len(line) > LONGEST + len(_ERROR)), None):
        return f"a line of {len(long):,} characters on stderr: {long[:100]!r}"
    if errors and lines[-2:] != [errors[0], ""]:
        return f"text after the error: {shown!r}"
    if re.search(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]", stderr):
        return f"control characters on stderr: {shown!r}"
    return ""


@contextlib.contextmanager
def _streams(place: Path, stdin: bytes) -> Iterator[Path]:
    """Standard streams of a command's own; yields the file of its stderr."""
    files = [place / ".stdin", place / ".stdout", place / ".stderr"]
    files[0].write_bytes(stdin)
    kept, streams = [os.dup(n) for n in range(3)], (sys.stdin, sys.stdout, sys.stderr)
    for n, file in enumerate(files):
        descriptor = os.open(file, os.O_RDONLY if n == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, n)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(n, "rb" if n == 0 else "wb", closefd=False), "utf-8", errors, write_through=n == 2)
        for n, errors in enumerate(("strict", "strict", "backslashreplace"))
    )
    try:
        yield files[2]
    finally:
        for n, descriptor in enumerate(kept):
            os.dup2(descriptor, n)
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = streams


@contextlib.contextmanager
def _environment(changes: Any) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Have the system end this process if it takes far more than these seconds of CPU time."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(_cpu_seconds() + 2 * seconds) + 2, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def _slowness() -> float:
    """How many times slower than the machine on which limits were set this one is now, by a piece of Python's work.

    A processor may be older, and have another process on the other half of its core.
    """
    before = _cpu_seconds()
    for _ in range(8):
        words = [f"{{{{ {number}.x }}}}" for number in range(40_000)]
        counts = {word[3:-5]: len(word) for word in words}
        "".join(sorted(words, key=lambda word: -counts[word[3:-5]])).split("x")
    return (_cpu_seconds() - before) / _PACE


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _forget_peak() -> None:
    """Have the most memory that this process had count from now on: what it took to make a case is not the command's.

    Where the system cannot, it counts.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
