"""However many processes measure, on one machine or two, what is found is what one finds.

Lightning starts its ranks by running the command again, and torchrun runs commands, so each run is one as a user's.
Samples walk one by one, and on one thread: rounding within a batch depends on who else is in it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.cli.test_resume import figures

from stereoclinic.ddtd.checkpoint import Shards
from stereoclinic.ddtd.locate import run_ddtd
from stereoclinic.ddtd.relevance import STATES, Relevance
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.pipelines import open_model
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds
from stereoclinic.sns.mask import NeuronMask

pytestmark = pytest.mark.slow
NAMES = ("doctor", "nurse", "teacher", "chef", "pilot")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "five.csv"
    path.write_text("prompt,occupation\n" + "".join(f"a photo of a {name},{name}\n" for name in NAMES))
    return path


def command(model: Path, prompts: Path, out: Path, *more: object) -> list[str]:
    arguments = (
        "locate", "--model", model, "--prompts", prompts, "--seeds", 1, "--every", 1, "--bins", 2, "--batch-size", 1,
        "--accelerator", "cpu", "--json", "-o", out, *more,
    )  # fmt: skip
    return ["-m", "stereo_cli", *map(str, arguments)]


def found(out: Path) -> Relevance:
    return Relevance.load(out.with_name(f"{out.stem}.relevance.safetensors"))


@pytest.fixture(scope="module")
def alone(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Relevance:
    out = tmp_path_factory.mktemp("alone") / "gender.pt"
    run(command(model, prompts, out), out)
    return found(out)


def run(arguments: list[str], out: Path) -> str:
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["files"]["mask"] == str(out)  # one rank prints, and once
    return ended.stderr


def check(one: Relevance, two: Relevance, within: float = 1e-6) -> None:
    """The same sums; rows of a stream come in another order."""
    order = [one.labels.index(label) for label in two.labels]
    assert sorted(one.labels) == sorted(two.labels) == sorted(NAMES)
    assert one.metadata["samples"] == two.metadata["samples"] == len(NAMES)
    for name in STATES:
        a, b = getattr(one, name), getattr(two, name)
        a = a[order] if a.shape[0] == len(NAMES) else a
        assert torch.allclose(a, b, rtol=0, atol=within * float(b.abs().max())), name


@pytest.mark.parametrize(
    "more",
    [(), ("--stream",), ("--strategy", "fsdp")],
    ids=["all prompts", "a stream", "each with a third of the weights"],
)
def test_several_devices_find_what_one_finds(model, prompts, alone: Relevance, more: tuple, tmp_path: Path):
    """Five samples: of three ranks, one has fewer than the others."""
    out = tmp_path / "gender.pt"
    said = run(command(model, prompts, out, "--devices", 3, *more), out)
    assert more or "10 of 10" in said
    # Shared-out weights lie elsewhere in memory, which changes rounding; leans of a random model magnify that.
    check(alone, found(out), 1e-4 if "fsdp" in more else 1e-6)


def test_several_devices_plan_what_one_plans(model, prompts, tmp_path: Path):
    """Five samples, each walked by itself; one problem is solved for all."""
    arguments = (
        "plan", "--model", model, "--prompts", prompts, "--seeds", 1, "--steps", 3, "--until", 600, "--mu", 0.01,
        "--keep", 0.01, "--guidance", 2, "--stay", "age", "--root", "group", "--replans", 1, "--check", 0,
        "--batch-size", 1, "--accelerator", "cpu",
    )  # fmt: skip
    masks = []
    for number in (1, 3):
        out = tmp_path / f"{number}.pt"
        command = [sys.executable, "-m", "stereo_cli", *map(str, arguments), "--devices", str(number), "-o", str(out)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("wrote ") == 1 and "20 of 20" in ended.stderr  # one rank speaks, and for all
        masks.append(NeuronMask.load(out))
        assert list(tmp_path.glob("*.unfinished.safetensors")) == []
    one, two = masks
    assert (one.factors < 1).any() and one.metadata["samples"] == two.metadata["samples"] == len(NAMES)
    # Rounding in float32 alone, of texts that are encoded and latents that are stepped in other company.
    assert torch.allclose(one.factors, two.factors, rtol=0, atol=5e-4)
    assert one.roots is not None and two.roots is not None
    assert torch.allclose(one.roots, two.roots, rtol=0, atol=1e-5)


def test_a_run_goes_on_where_fewer_samples_are_left_than_devices(model, prompts, alone: Relevance, tmp_path: Path):
    """Four of five were measured when it was cut off."""
    out = tmp_path / "gender.pt"
    opened, samples = open_model(str(model)), with_seeds(load_prompts(prompts), 0, 1)
    done: list[int] = []

    def until_the_fifth(count: int) -> None:
        done.append(count)
        if len(done) > 4 * alone.metadata["steps"]:
            raise KeyboardInterrupt

    settings = Settings(steps=alone.metadata["steps"], bins=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        write = Shards.write
        patch.setattr(Shards, "write", lambda self, *what, last=True: write(self, *what[:5], last=True))
        run_ddtd(
            opened, load_axis("gender"), samples, settings, batch_size=1, progress=until_the_fifth,
            shards=out.with_suffix(".shards"), accelerator="cpu", devices=1,
        )  # fmt: skip
    run(command(model, prompts, out, "--devices", 3, "--resume"), out)
    check(alone, found(out))


def test_apply_draws_the_same_on_two_devices(model, located, tmp_path: Path):
    drawn = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        arguments = (
            "-m", "stereo_cli", "apply", "a photo of a doctor", "a photo of a nurse", "--mask", located,
            "--model", model,
            "-n", 2, "--batch-size", 2, "--accelerator", "cpu", "--devices", devices, "-o", out,
        )  # fmt: skip
        command = [sys.executable, *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
        assert ended.returncode == 0 and "8 of 8" in ended.stderr, ended.stderr
        assert not (out / "bench-parts").exists()
        drawn.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*.png")})
    assert drawn[0] == drawn[1] and len(drawn[0]) == 9  # eight pictures and a sheet


def test_bench_judges_other_methods_on_two_devices_as_on_one(model, located, tmp_path: Path):
    """One that is made, one that is made by what a reader sees, one that is not; at two scales, so made twice.

    Lightning starts the other rank after the first making, torchrun before it.
    """
    arguments = (
        "bench", "--model", model, "--mask", located, "--limit", 2, "--images", 2, "--group-images", 1, "--steps", 2,
        "--baseline", "prompt", "--baseline", "equisteer", "--baseline", "uce", "--baseline-seeds", 1,
        "--guidance", 1, "--guidance", 2, "--batch-size", 2, "--accelerator", "cpu",
    )  # fmt: skip
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    results = []
    for number, (start, devices) in enumerate((((), 1), ((), 2), (torchrun, 2))):
        out, parts = tmp_path / f"out {number}", tmp_path / f"parts {number}"
        more = ("--devices", devices, "--parts", parts, "-o", out)
        command = [sys.executable, *map(str, (*start, "-m", "stereo_cli", *arguments, *more))]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
        assert ended.returncode == 0 and ended.stderr.count("making baseline") == 4, ended.stderr  # the first rank's
        assert len(list(parts.glob("*-*.safetensors"))) == 4
        results.append(figures(json.loads((out / "results.json").read_text())))
    assert results[0] == results[1] == results[2]


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: processes in them meet as those of two machines do."""
    tag = f"sc{os.getpid() % 100000}"
    names, ends = [f"{tag}a", f"{tag}b"], [f"{tag}x", f"{tag}y"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    if shutil.which("ip") is None or sys.platform != "linux":
        pytest.skip("network namespaces need Linux and iproute2")
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "link", "set", end, "name", "wire")
                ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", "wire")
                ip("-n", name, "link", "set", "wire", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_machines_find_what_one_finds(model, prompts, alone: Relevance, machines: list[str], tmp_path: Path):
    out = tmp_path / "gender.pt"
    running = []
    for rank, machine in enumerate(machines):
        torchrun = (
            "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank),
            "--master-addr", "10.213.7.1", "--master-port", "29533",
        )  # fmt: skip
        locate = command(model, prompts, out, "--num-nodes", 2, "--devices", 1)
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", machine, sys.executable, *torchrun, *locate],
                env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "wire"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    assert json.loads(said[0][0])["files"]["mask"] == str(out) and said[1][0] == ""  # the first rank prints
    check(alone, found(out))
