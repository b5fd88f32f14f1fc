"""The Lightning loop adds up what was measured, and says what it could not use."""

import signal
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from tests.ddtd.conftest import AXIS, close

from stereoclinic.ddtd import locate as module
from stereoclinic.ddtd.locate import run_ddtd
from stereoclinic.ddtd.relevance import STATES
from stereoclinic.ddtd.step import Measured
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import Incomplete, InputError
from stereoclinic.io.digest import weights_digest
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import load_prompts, with_seeds

CPU = {"accelerator": "cpu", "devices": 1}


def test_the_predict_loop_sums_every_sample_whatever_the_batch(little: Model) -> None:
    samples = with_seeds(load_prompts("portraits", 2), 0, 3)
    settings = Settings(steps=4, bins=2)
    ticks: list[int] = []
    one = run_ddtd(little, AXIS, samples, settings, batch_size=6, progress=ticks.append, **CPU)
    two = run_ddtd(little, AXIS, samples, settings, batch_size=4, **CPU)
    assert one is not None and two is not None
    assert one.count.tolist() == [[6, 6], [6, 6]]
    assert sum(ticks) == len(samples) * settings.steps
    close(one.relevance_sum, two.relevance_sum)
    close(one.collateral, two.collateral)
    assert one.labels == ["doctor", "nurse"] and one.metadata["seeds"] == [0, 2]


def test_ranks_add_up_before_the_teardown_which_ends_their_group(
    little: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    reduce, teardown = SingleDeviceStrategy.reduce, SingleDeviceStrategy.teardown
    monkeypatch.setattr(
        SingleDeviceStrategy, "reduce", lambda self, x, **how: order.append(x.dtype) or reduce(self, x, **how)
    )
    monkeypatch.setattr(SingleDeviceStrategy, "teardown", lambda self: order.append("teardown") or teardown(self))
    run_ddtd(little, AXIS, with_seeds(load_prompts("portraits", 1), 0, 1), Settings(steps=1, bins=1), **CPU)
    assert order == [*order[: -len(STATES) - 1], *[torch.float64] * len(STATES), "teardown"]


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-5), ("bf16-true", 0.1), ("bf16-mixed", 0.1)])
def test_other_precisions_find_the_same_and_leave_the_model_as_it_was(precision: str, tolerance: float) -> None:
    """A trained model: the groups' predictions of a random one differ by less than the three digits of bf16."""
    single = open_model("portraits")
    samples, settings = with_seeds(load_prompts("portraits", 2), 0, 1), Settings(steps=2, bins=2)
    before = weights_digest(single.network)
    expected = run_ddtd(single, AXIS, samples, settings, **CPU)
    found = run_ddtd(single, AXIS, samples, settings, precision=precision, **CPU)
    assert found is not None and expected is not None
    assert (
        found.metadata["unet_weights"] == expected.metadata["unet_weights"] == before == weights_digest(single.network)
    )
    for name in ("lean_sum", "relevance_sum", "collateral"):
        one, two = getattr(found, name), getattr(expected, name)
        assert (one - two).norm() <= tolerance * two.norm(), name
    assert torch.get_default_dtype() == torch.float32
    assert {part.dtype for part in (single.pipe.vae, single.pipe.text_encoder)} == {torch.float32}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_the_keyboard_alive(
    little: Model, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, how: signal.Signals
) -> None:
    def interrupt(self, batch, batch_idx):
        signal.raise_signal(how)
        raise AssertionError("it went on")

    monkeypatch.setattr(module.DDTD, "predict_step", interrupt)
    # Processes of tests that run side by side, or in the background of a shell, are deaf to Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        run_ddtd(little, AXIS, with_seeds(load_prompts("portraits", 1), 0, 1), Settings(steps=1, bins=1), **CPU)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_missing_samples_are_not_a_result(little: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(module.DDTD):
        def predict_step(self, batch, batch_idx):
            done = super().predict_step(batch, batch_idx)
            self.samples_done.pop()
            return done

    monkeypatch.setattr(module, "DDTD", Forgetful)
    with pytest.raises(Incomplete, match="of 2 samples"):
        run_ddtd(little, AXIS, with_seeds(load_prompts("portraits", 2), 0, 1), Settings(steps=1, bins=1), **CPU)


def test_more_devices_than_samples_are_refused(little: Model) -> None:
    samples = with_seeds(load_prompts("portraits", 1), 0, 1)
    with pytest.raises(InputError, match="1 samples for 2 devices"):
        run_ddtd(little, AXIS, samples, Settings(steps=1, bins=1), accelerator="cpu", devices=2, strategy="ddp")


def test_a_strategy_that_would_lose_the_result_is_refused(little: Model) -> None:
    samples = with_seeds(load_prompts("portraits", 2), 0, 1)
    with pytest.raises(InputError, match="use 'ddp'"):
        run_ddtd(little, AXIS, samples, Settings(steps=1, bins=1), accelerator="cpu", devices=2, strategy="ddp_spawn")


@pytest.mark.parametrize(
    "set_by_launcher", [{"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, {"SLURM_STEP_NUM_TASKS": "2"}]
)
def test_a_launcher_that_started_more_than_was_asked_for_is_refused(
    little: Model, monkeypatch: pytest.MonkeyPatch, set_by_launcher: dict[str, str]
) -> None:
    for name, value in set_by_launcher.items():
        monkeypatch.setenv(name, value)
    samples = with_seeds(load_prompts("portraits", 2), 0, 1)
    with pytest.raises(InputError, match="2 processes were started, and each would do all"):
        run_ddtd(little, AXIS, samples, Settings(steps=1, bins=1), **CPU)


def test_a_gpu_without_float64_is_not_taken(little: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    samples = with_seeds(load_prompts("portraits", 1), 0, 1)
    settings = Settings(steps=1, bins=1)
    with pytest.raises(InputError, match="float64, which mps does not have"):
        run_ddtd(little, AXIS, samples, settings, accelerator="mps", devices=1)
    assert run_ddtd(little, AXIS, samples, settings, accelerator="auto", devices=1) is not None


def test_what_an_earlier_run_on_several_devices_left_behind_refuses_nothing(
    little: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    samples = with_seeds(load_prompts("portraits", 2), 0, 1)
    assert run_ddtd(little, AXIS, samples, Settings(steps=1, bins=1), **CPU) is not None


def test_what_lightning_refuses_is_a_line(little: Model) -> None:
    samples = with_seeds(load_prompts("portraits", 2), 0, 1)
    with pytest.raises(InputError, match=r"devices: .*unknown"):
        run_ddtd(little, AXIS, samples, Settings(steps=1, bins=1), accelerator="cpu", devices=1, strategy="unknown")


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every batch, the first sample's values are NaN from the second measured step on."""
    whole = module.walk

    def walk(*arguments: Any) -> None:
        *before, measured, classifier, portions = arguments
        numbers = count()

        def broken(step: Measured) -> None:
            if next(numbers):
                step.lean[:, 0] = step.relevance[:, 0] = step.collateral[0] = step.means[:, 0] = torch.nan
                step = replace(step, faults={0: "activations of mid_block"})
            measured(step)

        whole(*before, broken, classifier, portions)

    monkeypatch.setattr(module, "walk", walk)


def test_a_sample_that_broke_is_dropped_from_there_on_and_counted(
    little: Model, breaking: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_DROPPED", 0.5)
    samples, settings = with_seeds(load_prompts("portraits", 2), 0, 2), Settings(steps=4, bins=2)
    said: list[str] = []
    found = run_ddtd(little, AXIS, samples, settings, batch_size=2, warn=said.append, **CPU)
    assert found is not None
    assert found.metadata["dropped"] == 2
    assert found.curve_count.tolist() == [[2, 0, 0, 0], [2, 2, 2, 2]]  # the doctors came first in both batches
    assert found.count.tolist() == [[2, 0], [4, 4]]
    (line,) = said
    assert line.startswith("at timestep 749 of 'a photo of a doctor', seed 0, activations of mid_block are not finite")


def test_a_run_that_lost_more_than_one_in_a_hundred_is_no_result(little: Model, breaking: None) -> None:
    samples = with_seeds(load_prompts("portraits", 2), 0, 2)
    with pytest.raises(Incomplete, match=r"1 of 4 samples were dropped, more than 1%: at timestep 499 .*mid_block"):
        run_ddtd(little, AXIS, samples, Settings(steps=2, bins=2), warn=lambda text: None, **CPU)


def test_groups_that_the_words_do_not_tell_apart_stop_the_run_before_it_walks(
    little: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "walk", None)
    same = Axis("gender", ("female", "male"), ("young", "young"))
    with pytest.raises(InputError, match="has no direction"):
        run_ddtd(little, same, with_seeds(load_prompts("portraits", 1), 0, 1), Settings(steps=1, bins=1), **CPU)


def test_the_curve_adds_up_to_the_leans_of_the_bins(little: Model) -> None:
    samples = with_seeds(load_prompts("portraits", 2), 0, 2)
    settings = Settings("epsilon-cp", steps=4, bins=2, target="contrast")
    found = run_ddtd(little, AXIS, samples, settings, **CPU)
    assert found is not None
    assert found.timesteps.tolist() == settings.timesteps(little).tolist()
    for name in ("curve_sum", "curve_sq"):
        by_bin = getattr(found, name).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(by_bin, getattr(found, name.replace("curve", "lean")))
    assert not torch.allclose(
        found.value_sum, found.lean_sum
    )  # the contrast's; the lean is measured whatever is decomposed
    assert found.metadata["target"] == "contrast"
    assert (found.metadata["composite"], found.metadata["root"]) == ("epsilon-cp", "plain")
