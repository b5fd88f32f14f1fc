"""How to use the cores: images per second of the denoiser by batch size, threads and processes.

    python benchmarks/speed/threads.py --json threads.json

    1 thread              one process of one thread
    2 threads             one process of two threads
    2 processes           two processes of one thread each, at once; images of both count

Images per second are compared with those of one thread at the first batch size. All ways run once in each round, in
turn, so that the machine's other work falls on all of them alike; a figure is the median over rounds of ratios within a
round. Nothing else should run meanwhile. A pass is of images without guidance, at the noisiest timestep.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
from rich import box
from rich.console import Console
from rich.table import Table

#: Name -> threads of a process, processes.
WAYS = {"1 thread": (1, 1), "2 threads": (2, 1), "2 processes": (1, 2)}


def worker(model: str, batch: int, threads: int) -> None:
    """Draw noise, warm up, then answer each line of a number of passes by the seconds that they took."""
    import torch

    from stereoclinic.pipelines import open_model
    from stereoclinic.pipelines.call import Call
    from stereoclinic.pipelines.intercept import Left
    from stereoclinic.pipelines.watch import Walk
    from stereoclinic.prompts.sets import load_prompts, with_seeds

    torch.set_num_threads(threads)
    opened, prompts = open_model(model), load_prompts("portraits")
    rows = list(with_seeds(prompts, 0, -(-batch // len(prompts))))[:batch]

    def visit(call: Call) -> None:
        call.predict()
        print("ready", flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            for _ in range(int(line)):
                call.predict()
            print(time.perf_counter() - began, flush=True)
        raise Left

    with torch.no_grad():
        Walk(opened, rows, opened.defaults.steps, 1.0, visit=visit).run()


class Workers:
    """Processes that wait for passes to make."""

    def __init__(self, model: str, batch: int, threads: int, processes: int) -> None:
        self.batch = batch
        words = [sys.executable, __file__, "--worker", json.dumps([model, batch, threads])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.processes = [
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(processes)
        ]
        for process in self.processes:
            if self._line(process) != "ready":
                sys.exit("a worker failed; its error is above")

    def images_per_second(self, passes: int) -> float:
        """Of all processes together, until the last one is done."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{passes}\n")
            process.stdin.flush()
        seconds = [float(self._line(process)) for process in self.processes]
        return len(seconds) * passes * self.batch / max(seconds)

    def close(self) -> None:
        for process in self.processes:
            process.communicate()

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()


def compare(model: str, batches: Sequence[int], images: int, rounds: int) -> list[dict[str, Any]]:
    """Images per second of every way and batch size, and their ratio to the first."""
    crews = {(name, batch): Workers(model, batch, *WAYS[name]) for batch in batches for name in WAYS}
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in crews}
    for number in range(rounds):
        order = list(crews) if number % 2 == 0 else list(crews)[::-1]
        for key in order:
            rates[key].append(crews[key].images_per_second(max(1, round(images / key[1]))))
    for crew in crews.values():
        crew.close()
    first = rates["1 thread", batches[0]]
    return [
        {"way": name, "batch": batch, "ratio": measure.ratio(own, first), "images_per_second": own}
        for (name, batch), own in rates.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="portraits", help="a built-in model, or a pipeline's folder")
    parser.add_argument("--batch", type=int, action="append", help="repeatable; default: 12, 25, 50 and 100")
    parser.add_argument("--images", type=int, default=200, help="of each way in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return worker(*json.loads(options.worker))
    batches, load = options.batch or [12, 25, 50, 100], os.getloadavg()[0]
    rows = compare(options.model, batches, options.images, options.rounds)
    table = Table(
        "", "batch", f"images/s over 1 thread, batch {batches[0]}", "95 %", box=box.SIMPLE_HEAD, show_edge=False
    )
    for row in rows:
        table.add_row(row["way"], str(row["batch"]), *measure.as_text(row["ratio"]))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"{options.model}, {options.rounds} rounds of {options.images} images, load {load:.1f} at the start")
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "load": load, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
