"""The cost of watching a pipeline's call without changing it, against the same call without watching.

    python benchmarks/speed/watching.py --json watching.json                # portraits, on the CPU
    python benchmarks/speed/watching.py --model FOLDER --device cuda --steps 20 --guidance 7.5

Both draw the same pictures, bit for bit, or the script stops. They run in turn; the figure is the median of the pairs'
ratios with its bootstrap interval. What the toolkit learns about a pipeline once is not timed.
"""

import argparse
import sys
from statistics import median
from typing import Any

import measure
import torch

from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.images import as_tensor
from stereoclinic.pipelines.intercept import call_pipeline
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import generator, load_prompts, with_seeds

GOAL = 1.02


def compare(options: argparse.Namespace, guidance: float) -> dict[str, Any]:
    """The ratio at a guidance scale."""
    model = open_model(options.model, options.device, str(measure.dtype_of(options)).removeprefix("torch."))
    prompts = load_prompts("portraits")
    rows = list(with_seeds(prompts, 0, -(-options.batch // len(prompts))))[: options.batch]
    texts, steps = [row["prompt"] for row in rows], options.steps or model.defaults.steps

    def bare() -> Any:
        generators = [generator(row, "noise") for row in rows]
        return call_pipeline(model, None, texts, generators, steps, guidance, "pil")

    def watched() -> Any:
        return Walk(model, rows, steps, guidance).run("pil")

    if not torch.equal(as_tensor(bare()), as_tensor(watched())):
        raise RuntimeError("the watched call draws other pictures")
    plain, seen = measure.paired(bare, watched, options.pairs, options.device)
    return {
        "guidance": guidance,
        "steps": steps,
        "time": measure.ratio(seen, plain),
        "bare_seconds": median(plain),
        "watched_seconds": median(seen),
    }


def job(options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own."""
    return {"rows": [compare(options, guidance) for guidance in options.guidance or [1.0, 2.0]]}


def main(arguments: list[str] | None = None) -> None:
    parser = measure.parser(__doc__, batch=8, pairs=20)
    parser.add_argument("--model", default="portraits", help="a built-in model, or a pipeline's folder")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance", type=float, action="append", help="repeatable; default: 1 and 2")
    options = measure.parsed(parser, job, arguments)
    found = measure.in_own_process(__file__, "draw", options)
    if "error" in found:
        sys.exit(found["error"])
    title = f"{options.model}: watched call / bare call, {options.pairs} pairs"
    measure.show_by_guidance(options, title, found["rows"], GOAL, ("bare", "watched"))
    measure.write(options, model=options.model, **found)


if __name__ == "__main__":
    main()
