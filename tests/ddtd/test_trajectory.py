"""Walking a trajectory: one sample's figures are its own, and the Lightning loop adds them up."""

import signal

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from stereoclinic.axes import Axis, load_axis
from stereoclinic.ddtd import module
from stereoclinic.ddtd.module import locate
from stereoclinic.ddtd.neurons import find_sites
from stereoclinic.ddtd.relevance import RelevanceSums
from stereoclinic.ddtd.target import group_directions, lean
from stereoclinic.ddtd.trajectory import Settings, bin_of, walk
from stereoclinic.denoisers import open_denoiser
from stereoclinic.denoisers.stable_diffusion import StableDiffusion
from stereoclinic.digest import weights_digest
from stereoclinic.errors import Incomplete, InputError
from stereoclinic.prompts import group_prompts, load_prompts, with_seeds
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.mask import NeuronMask

AXIS = load_axis("gender")
THREE = Axis("age", ("young", "middle", "old"), ("young", "middle-aged", "old"))
CPU = {"accelerator": "cpu", "devices": 1}


def rows(prompts: int = 2, seeds: int = 2) -> list[dict]:
    return list(with_seeds(load_prompts("portraits", prompts), 0, seeds))


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def test_bins_part_the_timesteps() -> None:
    edges = Settings(bins=5).edges(1000)
    assert [bin_of(t, edges) for t in (1000, 999, 800, 799, 200, 199, 0)] == [0, 0, 0, 1, 3, 4, 4]
    with pytest.raises(InputError, match="fall into 2"):
        Settings(steps=4, every=2, bins=3).check_bins(torch.tensor([999, 749, 499, 249]), edges)


@pytest.mark.parametrize("root", ["plain", "rooted"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_equals_single_samples(denoiser: StableDiffusion, root: str, guidance: float) -> None:
    sites = find_sites(denoiser.unet)
    settings = Settings(root=root, steps=4, every=2, guidance=guidance)
    together = list(walk(denoiser, sites, AXIS, rows(), settings))
    assert len(together) == settings.measured_steps == 2
    for i, row in enumerate(rows()):
        for one, all_ in zip(walk(denoiser, sites, AXIS, [row], settings), together, strict=True):
            close(one.lean[:, 0], all_.lean[:, i])
            close(one.relevance[:, 0], all_.relevance[:, i])
            close(one.collateral[0], all_.collateral[i])
            close(one.means[:, 0], all_.means[:, i])


def test_relevance_predicts_what_a_little_damping_does_to_the_lean(denoiser: StableDiffusion) -> None:
    """With plain gradients a_j g_j is the derivative of the lean in a neuron's factor: damp one site and look."""
    sites = find_sites(denoiser.unet)
    settings = Settings(composite="gradient", steps=1, bins=1)
    measured = next(walk(denoiser, sites, AXIS, rows(), settings))
    spans = torch.tensor([site.width for site in sites]).cumsum(0)
    latents = denoiser.noise(rows())
    (timestep,) = denoiser.timesteps(1)

    @torch.no_grad()
    def predict(prompts: list[str]) -> torch.Tensor:
        return denoiser.predict(latents, timestep, denoiser.encode(prompts))

    groups = group_directions(torch.stack([predict([group_prompts(row, AXIS)[k] for row in rows()]) for k in (0, 1)]))
    neutral = [row["prompt"] for row in rows()]
    before = lean(predict(neutral), *groups)[0]
    for chosen in (0, len(sites) // 2, len(sites) - 1):
        factors = torch.ones(1, int(spans[-1]))
        own = slice(int(spans[chosen]) - sites[chosen].width, int(spans[chosen]))
        factors[:, own] = 0.9999
        mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), factors, None)
        with suppress(denoiser.unet, mask):
            change = lean(predict(neutral), *groups)[0] - before
        expected = -0.0001 * measured.relevance[0][:, own].sum(1)
        torch.testing.assert_close(change, expected, rtol=0.05, atol=1e-9, check_dtype=False)


def test_three_groups_lean_to_zero_in_sum(denoiser: StableDiffusion) -> None:
    measured = next(walk(denoiser, find_sites(denoiser.unet, ("conv",)), THREE, rows(), Settings(steps=1, bins=1)))
    assert measured.relevance.shape[0] == 3
    assert measured.lean.shape == (3, 4)


def test_inference_mode_is_refused(denoiser: StableDiffusion) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode=False"):
        next(walk(denoiser, find_sites(denoiser.unet), AXIS, rows(), Settings(steps=1)))


def test_the_predict_loop_sums_every_sample_whatever_the_batch(denoiser: StableDiffusion) -> None:
    samples = with_seeds(load_prompts("portraits", 2), 0, 3)
    settings = Settings(steps=4, bins=2)
    ticks: list[int] = []
    one = locate(denoiser, AXIS, samples, settings, batch_size=6, progress=ticks.append, **CPU)
    two = locate(denoiser, AXIS, samples, settings, batch_size=4, **CPU)
    assert one is not None and two is not None
    assert one.count.tolist() == [[6, 6], [6, 6]]
    assert sum(ticks) == len(samples) * settings.measured_steps
    close(one.relevance_sum, two.relevance_sum)
    close(one.collateral, two.collateral)
    assert one.labels == ["doctor", "nurse"] and one.metadata["seeds"] == [0, 2]


def test_ranks_add_up_before_the_teardown_which_moves_their_sums(
    denoiser: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    compute, teardown = RelevanceSums.compute, SingleDeviceStrategy.teardown
    monkeypatch.setattr(RelevanceSums, "compute", lambda self: order.append("compute") or compute(self))
    monkeypatch.setattr(SingleDeviceStrategy, "teardown", lambda self: order.append("teardown") or teardown(self))
    locate(denoiser, AXIS, with_seeds(load_prompts("portraits", 1), 0, 1), Settings(steps=1, bins=1), **CPU)
    assert order == ["compute", "teardown"]


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-5), ("bf16-true", 0.1), ("bf16-mixed", 0.1)])
def test_other_precisions_find_the_same_and_leave_the_model_as_it_was(precision: str, tolerance: float) -> None:
    """A trained model: the groups' predictions of a random one differ by less than the three digits of bf16."""
    single = open_denoiser("portraits")
    samples, settings = with_seeds(load_prompts("portraits", 2), 0, 1), Settings(steps=2, bins=2)
    before = weights_digest(single.unet)
    expected = locate(single, AXIS, samples, settings, **CPU)
    found = locate(single, AXIS, samples, settings, precision=precision, **CPU)
    assert found is not None and expected is not None
    assert found.metadata["unet_weights"] == expected.metadata["unet_weights"] == before == weights_digest(single.unet)
    for name in ("lean_sum", "relevance_sum", "collateral"):
        one, two = getattr(found, name), getattr(expected, name)
        assert (one - two).norm() <= tolerance * two.norm(), name
    assert torch.get_default_dtype() == torch.float32
    assert single.encode(["a photo of a doctor"]).dtype == torch.float32


def test_an_interrupted_run_says_so_and_leaves_the_keyboard_alive(
    denoiser: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self, batch, batch_idx):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.DDTD, "predict_step", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        locate(denoiser, AXIS, with_seeds(load_prompts("portraits", 1), 0, 1), Settings(steps=1, bins=1), **CPU)
    assert signal.getsignal(signal.SIGINT) is handler


def test_missing_samples_are_not_a_result(denoiser: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(module.DDTD):
        def predict_step(self, batch, batch_idx):
            self.samples_done -= 1
            return super().predict_step(batch, batch_idx)

    monkeypatch.setattr(module, "DDTD", Forgetful)
    with pytest.raises(Incomplete, match="of 2 samples"):
        locate(denoiser, AXIS, with_seeds(load_prompts("portraits", 2), 0, 1), Settings(steps=1, bins=1), **CPU)


def test_more_devices_than_samples_are_refused(denoiser: StableDiffusion) -> None:
    samples = with_seeds(load_prompts("portraits", 1), 0, 1)
    with pytest.raises(InputError, match="1 samples for 2 devices"):
        locate(denoiser, AXIS, samples, Settings(steps=1, bins=1), accelerator="cpu", devices=2, strategy="ddp")


def test_a_strategy_that_would_lose_the_result_is_refused(denoiser: StableDiffusion) -> None:
    samples = with_seeds(load_prompts("portraits", 2), 0, 1)
    with pytest.raises(InputError, match="use 'ddp'"):
        locate(denoiser, AXIS, samples, Settings(steps=1, bins=1), accelerator="cpu", devices=2, strategy="ddp_spawn")
