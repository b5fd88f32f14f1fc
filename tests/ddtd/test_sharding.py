"""A UNet whose weights lie apart gives what the whole one gives, on its way forward and back, and is left whole.

Ranks are processes on a CPU that talk over gloo; each checks for itself, and fails by an exit code.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_unet
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from stereoclinic.ddtd.locate import run_ddtd
from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.sharding import Evened, check_sharded, sharded
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.io.digest import weights_digest
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.portraits import model as portraits
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds
from stereoclinic.prompts.streams import Stream
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask

SAMPLES = with_seeds(load_prompts("portraits", 5), 0, 1)
COMPOSITES = ("gradient", "epsilon-attnlrp", "gamma-cp", "zplus-cp")


def decomposed(unet: nn.Module, composite: str) -> list[Tensor]:
    """Prediction, and two gradients at every site: a pass without gradient, one with, and two ways back."""
    sites = find_sites(unet)
    latents, text = torch.randn(2, portraits.LATENT_CHANNELS, 16, 16), torch.randn(2, 3, portraits.TEXT_WIDTH)
    with torch.no_grad():
        unet(latents, torch.tensor(500), text)
    with Watch(unet, sites) as watch, propagate(composite, unet):
        prediction = unet(latents.requires_grad_(), torch.tensor(500), text).sample
        inputs = [watch.activations[site.name] for site in sites]
        first = torch.autograd.grad(prediction, inputs, prediction.detach(), retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(prediction, inputs, torch.ones_like(prediction), allow_unused=True)
    return [prediction.detach(), *(g for g in (*first, *second) if g is not None)]


def most_held(unet: nn.Module, run: Callable[[], object]) -> int:
    """The most numbers of weights that lie on this rank at any layer, on the way forward or back."""
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        held = sum(each.to_local().numel() if isinstance(each, DTensor) else each.numel() for each in unet.parameters())
        most = max(most, held)

    def follow(module: nn.Module, args: object, output: object) -> None:
        look()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(look)

    handles = [each.register_forward_hook(follow) for each in unet.modules() if not list(each.children())]
    run()
    for handle in handles:
        handle.remove()
    return most


def rank_of(rank: int, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    whole = portraits.build_unet().eval().requires_grad_(False)
    for name, module in whole.named_modules():
        if name.endswith("conv2"):  # training starts these at zero
            module.reset_parameters()
    before, total = weights_digest(whole), sum(each.numel() for each in whole.parameters())
    unet = sharded(whole, init_device_mesh("cpu", (ranks,)))

    own = sum(each.to_local().numel() for each in unet.parameters())
    assert own <= 1.05 * total / ranks
    largest = max(sum(p.numel() for p in each.parameters()) for each in whole.modules() if "Resnet" in str(type(each)))
    assert most_held(unet, lambda: decomposed(unet, "gradient")) <= own + 3 * largest < total

    for composite in COMPOSITES:
        torch.manual_seed(rank)  # samples of its own
        expected = decomposed(whole, composite)
        torch.manual_seed(rank)
        for one, two in zip(decomposed(unet, composite), expected, strict=True):
            assert (one - two).abs().max() <= 1e-5 * two.abs().max(), composite

    sites = find_sites(whole)
    mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), torch.rand(1, sum(site.width for site in sites)))
    predictions = []
    for each in (whole, unet):
        torch.manual_seed(rank)
        with suppress(each, mask):
            predictions.append(decomposed(each, "gradient")[0])
    assert torch.equal(*predictions)
    assert weights_digest(whole) == before
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_shares_give_what_the_whole_gives(tmp_path: Path) -> None:
    """On three ranks, for few weights part evenly in three."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(rank_of, (3, str(tmp_path / "meeting")), nprocs=3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
def test_all_ranks_get_as_many_samples_of_which_none_counts_twice(ranks: int) -> None:
    even = list(Evened(SAMPLES, ranks))
    assert len(even) % ranks == 0 and len(even) < len(SAMPLES) + ranks
    assert even[: len(SAMPLES)] == list(SAMPLES)
    assert all(row == {**SAMPLES[0], "number": None} for row in even[len(SAMPLES) :])


def test_a_batch_that_ranks_walk_together_is_not_parted() -> None:
    def compute(part: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(InputError, match=r"4 samples at a time do not fit .* smaller --batch-size"):
        AdaptiveBatch(parted=False).each(compute, 4)
    with pytest.raises(InputError, match="a single sample does not fit"):
        AdaptiveBatch(parted=False).each(compute, 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ranks": 1}, "give their number, 2 or more"),
        ({"ranks": "auto"}, "give their number, 2 or more"),
        ({"samples": Stream("prompts.csv", range(1))}, "a stream does not say how many it has"),
        ({"precision": "bf16-mixed"}, "a copy of the weights on every device"),
        ({"composite": "deep-taylor"}, "composite 'deep-taylor' recognises layers by their weights"),
    ],
)
def test_what_shares_cannot_do_is_refused(given: dict, says: str) -> None:
    asked = {"samples": SAMPLES, "composite": "gradient", "precision": "32-true", "ranks": 2, **given}
    with pytest.raises(InputError, match=says):
        check_sharded(tiny_unet(), **asked)


def test_one_device_is_refused_from_python_too(little: Model) -> None:
    with pytest.raises(InputError, match="2 or more"):
        run_ddtd(little, load_axis("gender"), SAMPLES, Settings(), accelerator="cpu", devices=1, strategy="fsdp")
