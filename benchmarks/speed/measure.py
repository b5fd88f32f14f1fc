"""How the speed benchmarks measure: two steps in turn, the median of the pairs' ratios, and the peak memory of a step.

Each part runs in a process of its own, so that a part that fails costs its own row only.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Any]


def wait(device: str) -> None:
    """Wait for the work that is queued on a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(step: Step, device: str = "cpu") -> float:
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def paired(
    first: Step, second: Step, pairs: int, device: str = "cpu", warm: int = 2
) -> tuple[list[float], list[float]]:
    """Seconds of both steps, run in turn. The first of a pair alternates, so that neither always finds warm caches."""
    for _ in range(warm):
        first()
        second()
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()  # a collection would be counted against whichever step runs
    try:
        for number in range(pairs):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            for which in order:
                times[which].append(seconds((first, second)[which], device))
            if number % 10 == 9:
                gc.collect()
    finally:
        gc.enable()
    return times


def median_with_interval(values: Iterable[float], draws: int = 2000) -> dict[str, float]:
    """The median and the 2.5 and 97.5 % points of its bootstrap distribution."""
    known = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = known[torch.randint(len(known), (draws, len(known)), generator=generator)].quantile(0.5, dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"median": statistics.median(known.tolist()), "low": low, "high": high}


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
    """Median ratio of pairs, with its interval."""
    return median_with_interval(a / b for a, b in zip(of, to, strict=True))


def over_processes(ratios: list[float]) -> dict[str, float]:
    """The median, minimum and maximum of one ratio per process. Six processes bracket the true median at 97 %.

    The memory layout differs between processes and moves a ratio by more than its scatter within one process.
    """
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def peak_allocated(step: Step, device: str = "cpu") -> int:
    """The most bytes that torch's allocator holds during a step, beyond those held before it."""
    if device.startswith("cuda"):
        wait(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()  # the averages that profile prints know sums, no peak
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def in_own_process(script: str, part: str, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Run one part of a benchmark script in a process of its own, which prints its result as JSON.

    A part that fails gives {"error": its message, in one line}.
    """
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    job = json.dumps({"part": part, **settings, **more})
    done = subprocess.run([sys.executable, script, "--job", job], capture_output=True, text=True)
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):  # killed, for example
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(last)


def answer(part: Callable[[argparse.Namespace], dict[str, Any]], job: str) -> None:
    """The other end of `in_own_process`: print the result of a part, or its error."""
    options = argparse.Namespace(**json.loads(job))
    torch.set_num_threads(options.threads)
    try:
        found = part(options)
    except Exception as error:  # a rule or library that fails is a result too
        message = (str(error).strip() or "no message").splitlines()[0]
        found = {"error": f"{type(error).__name__}: {message}"}
    print(json.dumps(found))


def parser(doc: str | None, batch: int, pairs: int) -> argparse.ArgumentParser:
    """The options that all speed benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--batch", type=int, default=batch)
    made.add_argument("--pairs", type=int, default=pairs)
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    made.add_argument("--job", help=argparse.SUPPRESS)  # one part, in its own process: see in_own_process
    return made


def parsed(
    made: argparse.ArgumentParser, part: Callable[[argparse.Namespace], dict[str, Any]], arguments: list[str] | None
) -> argparse.Namespace:
    """The options of a run; in a process of `in_own_process`, run its part and exit."""
    options = made.parse_args(arguments)
    if options.job:
        answer(part, options.job)
        sys.exit()
    options.environment = environment(options)
    return options


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return getattr(torch, options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32"))


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on. The load shows whether the machine was quiet."""
    cuda = options.device.startswith("cuda")
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()} CPU",
        "dtype": str(dtype_of(options)).removeprefix("torch."),
        "threads": options.threads,
        "load": os.getloadavg()[0],
    }


def show(
    options: argparse.Namespace, title: str, head: list[str], rows: list[list[str]], notes: Iterable[str] = ()
) -> None:
    """Print a table with the environment in its title, and notes below it, each once."""
    at = options.environment
    title += f"; batch {options.batch}, {at['dtype']}, {at['device']}, {at['threads']} threads, load {at['load']:.1f}"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"[bold]{title}[/]", highlight=False, soft_wrap=True)
    console.print(table)
    for note in dict.fromkeys(notes):
        console.print(f"  {note}", highlight=False, markup=False, soft_wrap=True)
    console.print()


def show_by_guidance(
    options: argparse.Namespace, title: str, rows: list[dict[str, Any]], goal: float, sides: tuple[str, str]
) -> None:
    """Print ratios with a row for each guidance scale; each side has a figure "SIDE_seconds"."""
    cells = []
    for row in rows:
        seconds = [f"{row[f'{side}_seconds']:.3f}" for side in sides]
        cells.append([f"{row['guidance']:g}", str(row["steps"]), *as_text(row["time"]), f"{goal:.2f}", *seconds])
    show(options, title, ["guidance", "steps", "time", "95 %", "goal", *(f"{side} s" for side in sides)], cells)


def write(options: argparse.Namespace, **data: Any) -> None:
    """Write the figures with their environment, if `--json` is given."""
    if options.json:
        data = {"environment": options.environment, "batch": options.batch, **data}
        options.json.write_text(json.dumps(data, indent=2))


def as_text(interval: dict[str, float]) -> list[str]:
    """A ratio and its interval as two cells."""
    return [f"{interval['median']:.3f}", f"{interval['low']:.3f}-{interval['high']:.3f}"]
