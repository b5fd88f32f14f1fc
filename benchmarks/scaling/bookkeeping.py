"""Memory and time of a large prompt set without the model: `locate` on 100,000 prompts with a tiny denoiser.

    python benchmarks/scaling/bookkeeping.py --json bookkeeping.json
    python benchmarks/scaling/bookkeeping.py --stream --prompts 1000000

The pipeline has a UNet of one block and random text states; everything else is what `stereo locate` runs: the watched
call, Lightning's loop, the metric, the shards. Printed at each tenth of the prompts: the resident memory beyond that
after the first hundredth, and the rate. Memory is flat if the first figure does not grow.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
from problems import RandomText

from stereoclinic.ddtd.locate import run_ddtd
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.occupations import PORTRAITS
from stereoclinic.prompts.sets import Samples, load_prompts, with_seeds
from stereoclinic.prompts.streams import Stream


def stub() -> Model:
    """Costs next to nothing."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=2,
    )  # fmt: skip
    return Model(RandomText(unet, DDIMScheduler(), tokens=2), "stub")


def resident() -> int:
    """Bytes of this process in memory now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def write_prompts(path: Path, count: int) -> None:
    """No two the same, of the 12 occupations."""
    with path.open("w") as file:
        file.write("prompt,occupation\n")
        for number in range(count):
            name = PORTRAITS[number % len(PORTRAITS)]
            file.write(f"a photo of a {name} in place {number},{name}\n")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = folder / "prompts.csv"
    write_prompts(path, options.prompts)
    began = time.perf_counter()
    samples: Samples | Stream
    samples = Stream(path, range(1)) if options.stream else with_seeds(load_prompts(path), 0, 1)
    read = time.perf_counter() - began
    rows: list[dict[str, float]] = []
    done, first, began = 0, 0, time.perf_counter()

    def tick(count: int) -> None:
        nonlocal done, first
        before, done = done, done + count
        if before * 100 // options.prompts == 0 and done * 100 // options.prompts > 0:
            first = resident()
        if done * 10 // options.prompts > before * 10 // options.prompts:
            rate = done / (time.perf_counter() - began)
            rows.append({"prompts": done, "grown": resident() - first, "rate": rate})
            print(f"{done:9d} prompts  {rows[-1]['grown'] / 2**20:+7.1f} MiB  {rate:7.0f}/s", flush=True)

    found = run_ddtd(
        stub(), load_axis("gender"), samples, Settings(steps=1, bins=1), batch_size=options.batch,
        progress=tick, shards=folder / "shards", accelerator="cpu", devices=1,
    )  # fmt: skip
    assert found is not None and int(found.count.sum()) == options.prompts
    return {"prompts": options.prompts, "stream": options.stream, "read_seconds": read, "tenths": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--stream", action="store_true", help="read them as they are needed, as `locate --stream`")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
