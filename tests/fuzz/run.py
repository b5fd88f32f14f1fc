"""Fuzzing of every file that the commands read: `nox -s fuzz`.

    python -m tests.fuzz.run                        all cases of all kinds, and a table
    python -m tests.fuzz.run --kinds mask.pt axis   of these kinds alone
    python -m tests.fuzz.run --kinds axis --case 7  one case, with what it raises

Every case either is read or raises a one-line `InputError`, in bounded time and memory. Anything else is a failure, and
named by its kind and number; a case of a number is always the same.
"""

import argparse
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.samples import KINDS, write_case

from stereoclinic.errors import InputError

#: Seconds of the processor and bytes that a case may take, and bytes that a process may.
SECONDS, MEMORY, PROCESS = 10.0, 2**28, 2**35
_CHUNK = 100


class Slow(BaseException):
    """Not an `Exception`, so that nobody takes it for what a file is refused with."""


@dataclass
class Outcome:
    """What came of cases of a kind."""

    cases: int = 0
    read: int = 0
    slowest: float = 0.0
    most: int = 0
    failures: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Outcome") -> "Outcome":
        self.cases, self.read = self.cases + other.cases, self.read + other.read
        self.slowest, self.most = max(self.slowest, other.slowest), max(self.most, other.most)
        self.failures += other.failures
        return self


def run_case(name: str, number: int) -> Outcome:
    """Read the case of a number."""
    kind, found = KINDS[name], Outcome(1)
    with TemporaryDirectory() as folder:
        path = write_case(kind, name, number, Path(folder))
        before, began = _peak(), time.process_time()
        try:
            with _limited():
                kind.read(path)
            found.read = 1
        except InputError as error:
            line = str(error)
            printed = line.encode(errors="replace").decode() == line
            if not line or "\n" in line or len(line) >= 4000 or not printed:
                found.failures.append(f"{name} {number}: an error of {len(line)} characters: {line[:200]!r}")
        except (Exception, Slow) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error}"[:300]
            found.failures.append(f"{name} {number}: {what} ({where.filename}:{where.lineno})")
        found.slowest, found.most = time.process_time() - began, _peak() - before
        if found.most > MEMORY:
            found.failures.append(f"{name} {number}: took {found.most:,} bytes")
    return found


def run_cases(name: str, first: int, last: int) -> Outcome:
    """Read cases of a kind in a process of its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (PROCESS, hard))
    whole = Outcome()
    for number in range(first, last):
        whole += run_case(name, number)
    return whole


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Slow(f"not done after {SECONDS:g} s")

    old = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def check_whole(name: str) -> None:
    """The file that cases are made from is read, or nothing is found by damaging it."""
    with TemporaryDirectory() as folder:
        KINDS[name].read(KINDS[name].write(Path(folder), None))


def _print_row(name: str, found: Outcome) -> None:
    refused = found.cases - found.read - len(found.failures)
    row = f"{name:24}{found.cases:8}{found.read:8}{refused:9}{found.slowest:8.2f} s{found.most / 2**20:6.0f} MB"
    print(row + f"  {len(found.failures)} FAILED" * bool(found.failures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--case", type=int, help="read this one alone, here, and let it fail")
    parser.add_argument("--times", type=float, default=1.0, help="so many times the number of cases")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.case is not None:
        with TemporaryDirectory() as folder:
            for name in options.kinds:
                KINDS[name].read(write_case(KINDS[name], name, options.case, Path(folder)))
        return
    found = {name: Outcome() for name in options.kinds}
    began = time.perf_counter()
    print(f"{'kind':24}{'cases':>8}{'read':>8}{'refused':>9}{'slowest':>10}{'most':>9}", flush=True)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        jobs = []
        for name in options.kinds:
            check = pool.submit(check_whole, name)
            total = max(1, round(options.times * KINDS[name].cases))
            parts = range(0, total, _CHUNK)
            jobs.append((name, check, [pool.submit(run_cases, name, i, min(i + _CHUNK, total)) for i in parts]))
        for name, check, parts in jobs:
            try:
                check.result()
                for each in parts:
                    found[name] += each.result()
            except Exception as error:  # the process died, or the whole file was not read
                found[name].failures.append(f"{name}: {type(error).__name__}: {error}")
            _print_row(name, found[name])
    cases = sum(each.cases for each in found.values())
    print(f"{cases} cases in {time.perf_counter() - began:.0f} s")
    failures = [line for each in found.values() for line in each.failures]
    for line in failures[:100]:
        print(line)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
