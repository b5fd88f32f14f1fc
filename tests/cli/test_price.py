"""What commands would take: what is counted beforehand is what runs, and --dry-run and doctor say it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from stereoclinic.calls.cost import drawing, locating, planning
from stereoclinic.calls.doctor import DoctorSettings
from stereoclinic.calls.duration import Speed, bench_offer, estimate, locate_offer, offer
from stereoclinic.calls.evaluate import prepare_evaluation
from stereoclinic.calls.evaluate_settings import EvaluateSettings
from stereoclinic.calls.locate import LocateSettings, prepare_locate
from stereoclinic.calls.plan import PlanSettings, prepare_plan
from stereoclinic.calls.work import Reporter
from stereoclinic.evaluation.experiment import arms_of
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts

SPEED = Speed(0.01, 0.02, 1000, 1, True)


@dataclass
class Passes:
    """Of one sample each."""

    forward: int = 0
    backward: int = 0


@contextmanager
def watched(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    """Count the rows that go through a denoiser, and those that are passed back."""
    seen, grads = Passes(), Watch.grads

    def forward(module: torch.nn.Module, args: object, output: object) -> None:
        seen.forward += len(tree.sample_of(output))

    def backward(self: Watch, prediction: torch.Tensor, *args: object, **how: object) -> object:
        seen.backward += len(prediction)
        return grads(self, prediction, *args, **how)

    monkeypatch.setattr(Watch, "grads", backward)
    handle = tree.inner(model.network).register_forward_hook(forward)
    yield seen
    handle.remove()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("axis", ["gender", "age"])
def test_locate_makes_the_passes_that_were_counted(model, monkeypatch, axis: str, guidance: float) -> None:
    settings = LocateSettings(seeds=2, limit=2, steps=5, every=2, bins=2, guidance=guidance, batch_size=3)
    job = prepare_locate(open_model(model), axis, "portraits", settings, None, None, Reporter())
    cost = locating(job.model, job.axis, job.samples, job.walk, settings.batch_size).cost()
    with watched(job.model, monkeypatch) as seen:
        job.run(Reporter())
    assert (seen.forward, seen.backward) == (cost.forward, cost.backward)


@pytest.mark.parametrize("allocate", [True, False])
def test_plan_makes_no_more_passes_than_were_counted(model, monkeypatch, allocate: bool) -> None:
    settings = PlanSettings(seeds=2, limit=2, steps=4, guidance=2.0, allocate=allocate, mu=0.0001, keep=0.0001)
    job = prepare_plan(open_model(model), "gender", "portraits", None, settings, None, Reporter())
    cost = planning(job.model, job.axis, job.samples, job.stepwise, allocate, job.stay, 1.0, settings.check).cost()
    with watched(job.model, monkeypatch) as seen:
        job.run(Reporter())
    assert 0.3 * cost.backward < seen.backward <= cost.backward
    assert 0.4 * cost.forward < seen.forward < 1.3 * cost.forward


def test_bench_draws_what_was_counted(model, located, monkeypatch, tmp_path: Path) -> None:
    for masks, settings in (
        ([located], EvaluateSettings(images=2, limit=2, steps=3, guidance=(1.0, 2.0), group_images=1)),
        ([], EvaluateSettings(images=2, limit=2, steps=3, guidance=(2.0,), group_images=0, all_arms=True)),
    ):
        out = tmp_path / str(len(masks))
        job = prepare_evaluation(str(model), masks, "gender", "portraits", settings, out, Reporter())
        work = drawing(job.model, job.protocols, arms_of(job.model, job.protocols[0], job.masks))
        assert work.pictures * work.scales == job.images
        with watched(job.model, monkeypatch) as seen:
            job.run(Reporter())
        warm_up = sum(2 * (1 if scale == 1 else 2) for scale in settings.guidance)
        assert seen.forward == work.cost().forward + warm_up
        assert bench_offer(job)[0].price.disk == 2 * job.images * work.picture


def test_the_bytes_of_a_picture_are_those_that_are_drawn(model) -> None:
    from stereoclinic.calls.cost import _picture
    from stereoclinic.pipelines.images import draw

    opened, prompts = open_model(model), load_prompts("portraits", limit=1)
    row = {**prompts[0], "prompt": "a photo of a doctor", "seed": 0}
    assert draw(opened, [row], 2, 1.0).to(torch.uint8)[0].nbytes == _picture(opened)


def test_an_option_that_halves_is_the_first_and_largest_that_does(model) -> None:
    settings = LocateSettings(seeds=5, limit=2, steps=8, every=1, bins=2)
    job = prepare_locate(open_model(model), "gender", "portraits", settings, None, None, Reporter())
    work = locating(job.model, job.axis, job.samples, job.walk, 1)
    found = offer(job.model, work, SPEED)
    assert found.option == "--seeds 2" and found.halved is not None
    assert found.halved.minutes == pytest.approx(found.price.minutes * 2 / 5)
    assert found.price.minutes == pytest.approx((0.01 * found.price.forward + 0.02 * found.price.backward) / 60)
    one = replace(work, seeds=1, prompts=1)
    assert offer(job.model, one, SPEED).option == "--every 3"
    assert offer(job.model, replace(one, every=4), SPEED).option == ""  # two bins need two measured steps
    assert offer(job.model, work, SPEED, ranks=2).price.minutes == pytest.approx(found.price.minutes / 2)


def test_a_plan_among_fewer_neurons_holds_less(model) -> None:
    settings = PlanSettings(seeds=4, limit=2, steps=4)
    job = prepare_plan(open_model(model), "gender", "portraits", None, settings, None, Reporter())
    whole, half = (planning(job.model, job.axis, job.samples, job.stepwise, True, (), x, 0).cost() for x in (1.0, 0.5))
    assert half.held < whole.held and half.forward == whole.forward


@pytest.mark.parametrize(
    "command", [("locate", "--every", 1, "--bins", 2), ("plan", "--until", 0), ("bench", "--images", 4)]
)
def test_a_dry_run_says_what_the_command_would_take(model, stereo, monkeypatch, tmp_path: Path, command: tuple) -> None:
    monkeypatch.chdir(tmp_path)
    result = stereo(*command, "--model", model, "--steps", 2, "--limit", 2, "--dry-run")
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert re.search(
        r"it would take less than a minute, [\d.]+ [MG]iB of memory, [\d.]+ \w+ on disk; with --\w+ \d", said
    )
    assert re.search(r"counted: [\d,]+ forward passes .* a forward pass takes [\d.e-]+ s here", said)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_has_no_size_to_price(model, stereo, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("prompt,occupation\na photo of a doctor,doctor\n")
    result = stereo(
        "locate", "--model", model, "--prompts", "p.csv", "--stream", "--every", 1, "--bins", 2, "--dry-run"
    )
    assert result.exit_code == 0 and "would take" not in result.stdout


def test_doctor_prices_the_commands_at_their_own_settings(model) -> None:
    opened, axis, prompts = open_model(model), load_axis("gender"), load_prompts("portraits", limit=3)

    def counts(**given: int) -> dict[str, float]:
        found = estimate(opened, axis, prompts, DoctorSettings(**given), "gradient")
        assert found.speed is not None and found.speed.forward > 0 and found.why == ""
        return {name: each.price.forward + each.price.backward for name, each in found.commands.items()}

    own, fewer = counts(), counts(seeds=2, images=4)
    assert fewer["locate"] == pytest.approx(own["locate"] * 2 / LocateSettings().seeds)
    assert fewer["plan"] < own["plan"] and fewer["bench"] < own["bench"]


def test_a_relevance_step_that_cannot_be_made_is_said(model) -> None:
    same = replace(load_axis("gender"), words=("flying", "flying"))
    prompts: Dataset = load_prompts("portraits", limit=1)
    time = estimate(open_model(model), same, prompts, DoctorSettings(seeds=1), "gradient")
    assert time.commands == {} and "predicts the same for every group" in time.why


def test_a_slow_model_is_timed_by_one_pass(model, monkeypatch) -> None:
    monkeypatch.setattr("stereoclinic.calls.duration.SHORT", 0.0)
    settings = LocateSettings(seeds=1, limit=1, steps=2, every=1, bins=2)
    job = prepare_locate(open_model(model), "gender", "portraits", settings, None, None, Reporter())
    with watched(job.model, monkeypatch) as seen:
        _, speed = locate_offer(job)
    assert (seen.forward, seen.backward) == (1, 0)
    assert not speed.measured and speed.backward == 2 * speed.forward
