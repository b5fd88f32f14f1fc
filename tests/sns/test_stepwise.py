"""The stepwise plan: its rows are derivatives, its masks do what it planned, and it stays where it is told to."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import PNDMScheduler
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.denoisers.sampling import sample

from stereoclinic.axes import Axis, load_axis
from stereoclinic.ddtd.target import group_directions, lean, off_axis
from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts import group_prompts, load_prompts, with_seeds
from stereoclinic.sns.damp import suppress
from stereoclinic.sns.damped import Damped
from stereoclinic.sns.dose import lean_left
from stereoclinic.sns.planning import plan_stepwise
from stereoclinic.sns.stepwise import Stepwise, Walk
from stereoclinic.sns.treat import Treatment

AXIS = load_axis("gender")
# A random model's leans are of any size: half a thousand is a small price here.
QUICK = {"steps": 4, "until": 500.0, "cotangents": 1, "guidance": 1.0, "mu": 0.01, "keep": 0.0}


@pytest.fixture
def denoiser(little: Denoiser) -> Denoiser:
    return little


@pytest.fixture(scope="module")
def samples() -> Dataset:
    return with_seeds(load_prompts("portraits", 2), 0, 2)


@pytest.mark.parametrize("rooted", [False, True])
def test_rows_are_derivatives_by_the_damping_at_a_treated_point(denoiser: Denoiser, rooted: bool) -> None:
    sites = find_sites(denoiser.unet)
    neurons = sum(site.width for site in sites)
    generator = torch.Generator().manual_seed(0)
    factor = torch.rand(neurons, generator=generator, dtype=torch.float64)
    factor[5] = 0.0  # a silenced neuron has a derivative too
    root = torch.randn(neurons, generator=generator, dtype=torch.float64) if rooted else None
    rows = list(with_seeds(load_prompts("portraits", 1), 0, 1))
    timestep = denoiser.timesteps(4)[1]
    latents, states = denoiser.noise(rows), denoiser.encode([rows[0]["prompt"]])
    cotangent = torch.randn(latents.shape, generator=generator, dtype=torch.float64)

    def value(at: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), Damped(denoiser.unet, sites, at, root):
            return (denoiser.predict(latents, timestep, states) * cotangent).sum()

    with torch.enable_grad(), Damped(denoiser.unet, sites, factor, root) as watch:
        prediction = denoiser.predict(latents.requires_grad_(), timestep, states)
        inputs = [watch.damped[site.name] for site in sites]
    row = -watch.relevance(torch.autograd.grad(prediction, inputs, cotangent))[0]
    for neuron in (0, 5, neurons // 2, neurons - 1):
        moved = [factor.clone(), factor.clone()]
        moved[0][neuron] -= 1e-5  # more damping
        moved[1][neuron] += 1e-5
        expected = (value(moved[0]) - value(moved[1])) / 2e-5
        assert row[neuron].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("allocate", [False, True])
@pytest.mark.parametrize("root", ["zero", "group"])
def test_every_step_comes_closer_to_its_target(denoiser: Denoiser, samples: Dataset, allocate: bool, root: str) -> None:
    ticks: list[int] = []
    mask = plan_stepwise(denoiser, AXIS, samples, Stepwise(root=root, **QUICK), allocate, progress=ticks.append)
    said = mask.metadata["selection"]["steps"]
    for steps in said if allocate else [said]:
        assert [each["timestep"] for each in steps] == [999.0, 749.0]
        assert all(each["after"] < 0.9 * each["before"] and each["damping"] > 0 for each in steps)
    assert ticks == [len(samples)] * 2 * (len(AXIS) if allocate else 1)
    assert mask.groups == (AXIS.groups if allocate else ()) and mask.branch == "conditional"
    assert (mask.roots is None) == (root == "zero")
    assert mask.metadata["seeds"] == [0, 1] and mask.metadata["axis"] == "gender"


def test_the_mask_does_what_was_planned(denoiser: Denoiser, samples: Dataset) -> None:
    """Leans of the first step, under the mask as anyone applies it, are those that the plan says it leaves."""
    mask = plan_stepwise(denoiser, AXIS, samples, Stepwise(**QUICK), allocate=True)
    rows = list(samples)
    timestep = denoiser.timesteps(4)[0]
    latents, neutral = denoiser.noise(rows), denoiser.encode([row["prompt"] for row in rows])
    texts = [group_prompts(row, AXIS) for row in rows]
    passes = [denoiser.predict(latents, timestep, denoiser.encode([each[k] for each in texts])) for k in range(2)]
    balanced, directions = group_directions(torch.stack(passes))
    for k, group in enumerate(AXIS.groups):
        with suppress(denoiser.unet, mask.group(group)):
            found = lean(denoiser.predict(latents, timestep, neutral), balanced, directions)
        goal = lean(balanced + directions[k], balanced, directions)
        planned = mask.metadata["selection"]["steps"][k][0]["after"]
        assert (found - goal).abs().mean().item() == pytest.approx(planned, rel=1e-4)


def test_batches_change_nothing_but_rounding(denoiser: Denoiser, samples: Dataset) -> None:
    settings = {**QUICK, "guidance": 2.0}
    one = plan_stepwise(denoiser, AXIS, samples, Stepwise(**settings), stay=[load_axis("age")])
    two = plan_stepwise(denoiser, AXIS, samples, Stepwise(**settings, batch_size=3), stay=[load_axis("age")])
    torch.testing.assert_close(one.factors, two.factors, rtol=0, atol=1e-3)
    assert one.metadata["selection"]["stay"] == ["age"]


def test_a_high_price_leaves_the_model_alone(denoiser: Denoiser, samples: Dataset) -> None:
    dear = plan_stepwise(denoiser, AXIS, samples, Stepwise(**{**QUICK, "mu": 1e9}))
    assert dear.damping.mean() < 1e-3
    cheap = plan_stepwise(denoiser, AXIS, samples, Stepwise(**QUICK))
    assert cheap.damping.mean() > 10 * dear.damping.mean()


def test_a_high_price_of_what_is_to_stay_keeps_it_there(denoiser: Denoiser, samples: Dataset) -> None:
    """Along the age axis, as far as it is not the gender axis too; without it nothing holds that."""
    rows, timestep = list(samples), denoiser.timesteps(4)[0]
    latents, neutral = denoiser.noise(rows), denoiser.encode([row["prompt"] for row in rows])

    def directions(axis: Axis) -> torch.Tensor:
        texts = [group_prompts(row, axis) for row in rows]
        passes = [denoiser.predict(latents, timestep, denoiser.encode([each[k] for each in texts])) for k in range(2)]
        return group_directions(torch.stack(passes))[1]

    age = load_axis("age")
    along = off_axis(directions(age)[0], directions(AXIS))
    untreated, moved = denoiser.predict(latents, timestep, neutral), []
    for stay in ([age], []):
        mask = plan_stepwise(denoiser, AXIS, samples, Stepwise(**{**QUICK, "keep": 1e4}), stay=stay)
        with suppress(denoiser.unet, mask):
            change = denoiser.predict(latents, timestep, neutral) - untreated
        moved.append((change * along).flatten(1).sum(1).abs().mean().item())
    assert moved[0] < 0.2 * moved[1]


def test_only_candidates_are_damped(denoiser: Denoiser, samples: Dataset) -> None:
    neurons = sum(site.width for site in find_sites(denoiser.unet))
    candidates = torch.zeros(neurons, dtype=torch.bool)
    candidates[::3] = True
    mask = plan_stepwise(denoiser, AXIS, samples, Stepwise(**QUICK), candidates=candidates)
    assert (mask.factors[:, ~candidates] == 1).all() and (mask.factors[:, candidates] < 1).any()
    with pytest.raises(InputError, match=f"expected \\({neurons},\\)"):
        plan_stepwise(denoiser, AXIS, samples, Stepwise(**QUICK), candidates=candidates[1:])


def test_finer_samplers_are_treated_over_the_same_window(denoiser: Denoiser, samples: Dataset) -> None:
    mask = plan_stepwise(denoiser, AXIS, samples, Stepwise(**QUICK))
    assert mask.bin_edges.tolist() == [1000.0, 874.0, 624.0]
    assert [mask.bin_of(t) for t in (999, 900, 800, 700, 624, 600)] == [0, 0, 1, 1, 1, None]


def test_a_timestep_that_a_sampler_comes_back_to_has_one_damping(
    denoiser: Denoiser, samples: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is all that a mask can hold, so that the treated trajectory is the planned one."""
    solve, solved = Walk._solve, list[float]()

    def counted(walk: Walk, step: Any, timestep: torch.Tensor, root: torch.Tensor | None) -> Any:
        solved.append(float(timestep))
        return solve(walk, step, timestep, root)

    monkeypatch.setattr(Walk, "_solve", counted)
    pipe = denoiser.pipe
    kept, pipe.scheduler = pipe.scheduler, PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    try:
        timesteps = [float(t) for t in denoiser.timesteps(4)]
        treated = [t for t in timesteps if t >= 500]
        assert len(set(treated)) < len(treated)
        mask = plan_stepwise(denoiser, AXIS, samples, Stepwise(**QUICK))
        steps = mask.metadata["selection"]["steps"]
        left = lean_left(denoiser, AXIS, samples, mask, 1.0, 4, 1.0)
    finally:
        pipe.scheduler = kept
    assert [each["timestep"] for each in steps] == sorted(set(treated), reverse=True)
    assert [mask.bin_of(t) for t in sorted(set(treated), reverse=True)] == list(range(len(mask.factors)))
    assert solved == sorted(set(treated), reverse=True)  # each once, and what was planned is walked again
    assert left.mean().item() < sum(each["before"] for each in steps) / len(steps)


@pytest.mark.parametrize("overshoot", [0.0, 0.5])
def test_what_is_said_of_a_plan_is_measured_to_the_target(
    denoiser: Denoiser, samples: Dataset, overshoot: float
) -> None:
    """And not to what is aimed at beyond it."""
    mask = plan_stepwise(denoiser, AXIS, samples, Stepwise(**QUICK, overshoot=overshoot))
    steps = mask.metadata["selection"]["steps"]
    said = sum(each["after"] for each in steps) / len(steps)
    assert lean_left(denoiser, AXIS, samples, mask, 1.0, 4, 1.0).mean().item() == pytest.approx(said, rel=1e-3)


def test_a_treated_picture_depends_on_its_own_row_alone(denoiser: Denoiser, samples: Dataset) -> None:
    mask = plan_stepwise(denoiser, AXIS, samples, Stepwise(**QUICK), allocate=True)
    rows = [{"prompt": "a photo of a doctor", "seed": seed} for seed in range(4)]
    rows.append({"prompt": "a photo of a female doctor", "seed": 0})

    def draw(part: list[dict]) -> torch.Tensor:
        with Treatment(denoiser.pipe, mask, [AXIS], guided=True) as treatment:
            treatment.begin(part)
            return sample(denoiser, part, [row["prompt"] for row in part], 4, 2.0)

    together = draw(rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(draw([row])[0], together[i], rtol=0, atol=1e-9)
    untreated = sample(denoiser, rows, [row["prompt"] for row in rows], 4, 2.0)
    assert torch.equal(together[4], untreated[4])  # it names a group
    assert not torch.allclose(together[0], untreated[0])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mu": -1.0}, "mu -1.0: expected 0 or a positive number"),
        ({"root": "balanced"}, "expected zero or group"),
        ({"replans": 0}, "replans 0: expected 1 or more"),
        ({"shrink": 2.0}, "shrink 2.0: expected 0 to 1"),
    ],
)
def test_settings_out_of_range(wrong: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Stepwise(**wrong)


@pytest.mark.parametrize(("number", "cotangents", "each"), [(2, 1, 2), (3, 1, 1), (12, 1, 1), (12, 2, 2), (12, 9, 4)])
def test_samples_are_asked_about_all_directions_as_often(
    denoiser: Denoiser, number: int, cotangents: int, each: int
) -> None:
    """Of which there are three here, and a random one: more at each sample where samples are few."""
    rows = list(with_seeds(load_prompts("portraits", number), 0, 1))
    stay = [Axis(f"other {k}", ("a", "b", "c")[:k], ("x", "y", "z")[:k]) for k in (2, 2)]
    settings = Stepwise(guidance=2.0, cotangents=cotangents)
    sites = find_sites(denoiser.unet)
    walk = Walk(denoiser, AXIS, rows, settings, sites, stay)
    assert walk.directions == 4
    for step in range(3):
        asked = walk._asked(step)
        assert asked.shape == (max(each, -(-4 // number)), number)
        assert all(len(set(column)) == len(column) for column in asked.T.tolist())
        often = asked.flatten().bincount(minlength=4)
        assert often.min() >= 1 and often.max() - often.min() <= 1
    assert torch.equal(walk._asked(0), walk._asked(1)) == (each == 4)


def test_a_direction_that_is_asked_about_is_off_the_axis_and_the_others_make_up_for_the_rest(
    denoiser: Denoiser,
) -> None:
    """Each sample's row of what is to stay is that which it had when it was asked about everything."""
    rows, age = list(with_seeds(load_prompts("portraits", 3), 0, 1)), load_axis("age")
    found = {}
    for cotangents in (1, 9):
        settings = Stepwise(guidance=2.0, cotangents=cotangents, steps=4)
        walk = Walk(denoiser, AXIS, rows, settings, find_sites(denoiser.unet), [age])
        timestep, latents = denoiser.timesteps(4)[1], denoiser.noise(rows)
        asked = walk._asked(1)
        step, _ = walk._prepare(latents, timestep, walk._predict(latents, timestep, walk.empty), asked)
        found[cotangents] = {
            (which, b): each[b]
            for who, each in zip(asked.tolist(), step.cotangents[len(AXIS) - 1 :], strict=True)
            for b, which in enumerate(who)
        }
        for each in step.cotangents[len(AXIS) - 1 :]:
            along = (each[None] * step.directions).flatten(2).sum(2)
            assert along.abs().max() < 1e-9 * step.directions.flatten(2).norm(dim=2).max()
    assert len(found[1]) < len(found[9]) == len(rows) * walk.directions
    for key, each in found[1].items():
        torch.testing.assert_close(each, found[9][key], rtol=1e-9, atol=1e-12)


def test_a_window_without_steps(denoiser: Denoiser, samples: Dataset) -> None:
    with pytest.raises(InputError, match="no step lies above it"):
        plan_stepwise(denoiser, AXIS, samples, Stepwise(steps=2, until=1000.0))


def test_three_groups(denoiser: Denoiser, samples: Dataset) -> None:
    three = Axis("age", ("young", "middle", "old"), ("young", "middle-aged", "old"))
    mask = plan_stepwise(denoiser, three, samples, Stepwise(**QUICK), allocate=True)
    assert mask.factors.shape[0] == 3
    for steps in mask.metadata["selection"]["steps"]:
        assert all(each["after"] < each["before"] for each in steps)
