"""Baselines: each changes pictures inside and leaves the model bit for bit as it was; keys, costs, groups, errors."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.evaluation.methods.conftest import AXIS, GROUPED, SMALL, STEPS, draw, untreated
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.evaluation.methods import (
    BASELINES,
    baseline_class,
    calibration_samples,
    check_names,
    concept_prune,
    equisteer,
    h_space,
    icm,
    uce,
)
from stereoclinic.evaluation.methods.calibration import Calibration, Look, Run
from stereoclinic.evaluation.methods.oracles import AllocationOracle
from stereoclinic.io.digest import weights_digest
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.intercept import Left
from stereoclinic.pipelines.watch import Walk
from stereoclinic.prompts.sets import group_prompts, load_prompts

names = pytest.mark.parametrize("name", list(BASELINES))
steered = pytest.mark.parametrize("name", [name for name in BASELINES if name != "prompt"])


@names
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pictures_change_inside_and_the_model_is_as_it_was_outside(model, fitted, rows, name, guidance):
    digest, before, mitigation = weights_digest(model.network), untreated(model, rows, guidance), fitted(name)
    inside = draw(model, mitigation, rows, guidance)
    assert inside.shape == before.shape and inside.isfinite().all() and not torch.equal(inside, before)
    assert torch.equal(untreated(model, rows, guidance), before) and weights_digest(model.network) == digest
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.network.modules())
    assert torch.equal(draw(model, mitigation, rows, guidance), inside)


@steered
def test_the_model_is_as_it_was_after_an_exception_and_cannot_be_entered_twice(model, fitted, rows, name):
    digest, mitigation = weights_digest(model.network), fitted(name)
    with pytest.raises(ZeroDivisionError), mitigation:
        with pytest.raises(RuntimeError, match="active already"):
            mitigation.__enter__()
        raise ZeroDivisionError
    assert weights_digest(model.network) == digest
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.network.modules())


@pytest.mark.parametrize("name", ["conceptprune", "uce", "h-space", "icm"])  # equisteer clears the axis all the same
def test_a_strength_of_nothing_changes_nothing(model, samples, calibration, rows, name):
    kind = baseline_class(name)
    nothing = replace(SMALL.get(name, kind.defaults), strength=0.0)
    mitigation = kind.fit(model, AXIS, samples, calibration, settings=nothing)
    assert torch.allclose(draw(model, mitigation, rows), untreated(model, rows), atol=1e-5)


@names
def test_a_picture_depends_on_its_own_row_alone(model, fitted, rows, name):
    """Also where its batch does not fit in memory, and is parted."""
    together, mitigation = draw(model, fitted(name), rows), fitted(name)
    alone = torch.cat([draw(model, mitigation, [row]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, draw(model, mitigation, rows, most=3), atol=1e-4)


@names
def test_a_fit_is_the_same_again_and_says_what_it_cost(model, fitted, samples, calibration, name):
    first, counted = fitted(name), []
    settings = SMALL.get(name)
    again = baseline_class(name).fit(model, AXIS, samples, calibration, lambda *done: counted.append(done), settings)
    assert first.key() == again.key() and first.cost.images == again.cost.images
    assert sum(count for _, count in counted) == again.cost.images
    assert {who for who, _ in counted} <= {again.name} and again.needs and again.source
    drawn = {"prompt": 0, "conceptprune": 3, "uce": 2, "h-space": 2, "equisteer": 3, "icm": 1}[name]
    assert again.cost.images == drawn * len(samples)
    # The gate's; the updates'; the texts': two prompts, each with those of its groups, and what is kept.
    extra = {"equisteer": 3 * len(samples), "h-space": 2 * (1 + 3 * 2), "uce": 2 * (1 + 2) + (2 * 2 + 1)}
    assert again.cost.forward == again.cost.images * STEPS * 2 + extra.get(name, 0)
    assert again.cost.backward == (2 * 3 * 2 if name == "h-space" else 0)


def test_keys_tell_comparators_apart_and_follow_what_changes_pictures(model, fitted, samples, calibration):
    keys = {name: fitted(name).key() for name in BASELINES}
    assert len(set(keys.values())) == len(keys)
    for name in BASELINES:
        kind = baseline_class(name)
        uneven = replace(calibration, shares={"female": 0.3, "male": 0.7})
        other = kind.fit(model, AXIS, samples, uneven, settings=SMALL.get(name))
        assert other.key() != keys[name], name
    for name in ("h-space", "icm", "equisteer", "conceptprune"):
        mitigation = fitted(name)
        kept, mitigation.strength = mitigation.strength, mitigation.strength + 0.5
        assert mitigation.key() != keys[name]
        mitigation.strength = kept
        tensor = list(mitigation.state()[0].values())[-1]
        before = tensor.clone()
        tensor.copy_(tensor.logical_not() if tensor.dtype == torch.bool else tensor + 1)
        assert mitigation.key() != keys[name]
        tensor.copy_(before)
        mitigation.name, kept = "of another name", mitigation.name
        assert mitigation.key() == keys[name]  # the same pictures
        mitigation.name = kept


def test_allotments_follow_the_shares_from_each_rows_own_seed(model, samples, calibration):
    uneven = replace(calibration, shares={"female": 1.0, "male": 0.0})
    for name in ("prompt", "h-space", "equisteer", "icm"):
        made = baseline_class(name).fit(model, AXIS, samples, uneven, settings=SMALL.get(name))
        assert made.begin(samples).allotted.tolist() == [0] * len(samples)


def test_prompt_allocation_is_the_oracle_but_for_prompts_that_name_a_group(fitted, rows):
    oracle, mitigation = AllocationOracle(AXIS), fitted("prompt")
    assert mitigation.begin(rows).prompts == oracle.begin(rows).prompts
    assert torch.equal(mitigation.begin(rows).allotted, oracle.begin(rows).allotted)
    assert mitigation.key() != oracle.key()  # they differ on these:
    named = [{**row, "prompt": prompt} for row in rows for prompt in group_prompts(row, AXIS)]
    batch = mitigation.begin(named)
    assert batch.prompts == [row["prompt"] for row in named] and (batch.allotted == -1).all()


def test_concept_prune_leaves_balanced_and_unknown_prompts_alone(model, fitted, rows):
    mitigation = fitted("conceptprune")
    kept, mitigation.over = mitigation.over, {rows[0]["prompt"]: 0}
    try:
        drawn, before = draw(model, mitigation, rows), untreated(model, rows)
        same = [torch.equal(a, b) for a, b in zip(drawn, before, strict=True)]
        assert same == [row["prompt"] != rows[0]["prompt"] for row in rows]
        # A group's prompt is drawn with the weights of its neutral one.
        assert mitigation.begin([{**rows[0], "prompt": GROUPED}]).prompts == [GROUPED]
        assert mitigation._groups.tolist() == [0]
    finally:
        mitigation.over = kept


def test_equisteers_gate_leaves_prompts_over_a_threshold_alone_bit_for_bit(model, fitted, rows):
    mitigation = fitted("equisteer")
    kept = mitigation.thresholds
    try:
        mitigation.thresholds = torch.full_like(kept, -1e9)
        assert torch.equal(draw(model, mitigation, rows), untreated(model, rows))
        mitigation.thresholds = torch.full_like(kept, 1e9)
        assert not torch.equal(draw(model, mitigation, rows), untreated(model, rows))
    finally:
        mitigation.thresholds = kept


def test_only_the_images_that_were_begun_are_reached(model, fitted, rows):
    """In no pass that is for comparison, nor in any that nobody watches."""
    mitigation, seen = fitted("h-space"), []

    def visit(call: Call) -> None:
        seen.append([call.predict(treated=treated) for treated in (True, False)])
        raise Left

    with mitigation, torch.no_grad():
        mitigation.begin(rows)
        Walk(model, rows, STEPS, 2.0, visit=visit).run()
        mitigation.begin(rows[:-1])
        with pytest.raises(InputError, match="4 images are drawn, and 3 were begun"):
            Walk(model, rows, STEPS, 2.0).run()
        with pytest.raises(InputError, match=r"h-space acts on images that `pipelines.images.draw` draws"):
            model.pipe("a photo of a doctor", num_inference_steps=1)
    with torch.no_grad():
        Walk(model, rows, STEPS, 2.0, visit=visit).run()
    (inside, compared), (outside, _) = seen
    assert torch.equal(compared, outside) and not torch.equal(inside, outside)


def test_a_pass_that_ran_out_of_memory_is_not_counted(model, samples, calibration):
    """Its rows go through once more, and what is kept of each sample is kept once."""

    def kept(most: int | None, fails: bool) -> Tensor:
        run = Run("test", model, AXIS, samples, calibration)
        run.portions.most = most
        name = next(name for name, _ in model.network.named_modules() if name.endswith("attn1"))
        total = torch.zeros(len(samples))

        def keep(samples: list[int], step: int, name: str, found: Tensor) -> None:
            total.index_add_(0, torch.tensor(samples), found)

        def fail(module, args, output) -> None:
            if fails and len(output) > 4:
                raise torch.OutOfMemoryError

        look = Look({name: model.network.get_submodule(name)}, lambda name, o: o.flatten(1).norm(dim=1), keep)
        with model.network.conv_out.register_forward_hook(fail) if fails else nullcontext():
            run.draw(run.neutral, look)
        assert run.cost.forward == 2 * STEPS * len(samples)
        return total

    whole = kept(None, fails=False)
    assert (whole > 0).all()
    assert torch.allclose(kept(None, fails=True), whole) and torch.allclose(kept(1, fails=False), whole)


def test_names_seeds_and_samples_that_do_not_serve(model, samples, calibration):
    with pytest.raises(InputError, match="'ours' is not known; choose from prompt, conceptprune"):
        check_names(["ours"])
    with pytest.raises(InputError, match="'uce' is given twice"):
        check_names(["uce", "icm", "uce"])
    prompts = load_prompts("portraits", 2)
    with pytest.raises(InputError, match="seed 5000 is judged"):
        calibration_samples(prompts, 4999, 2, range(5000, 5010))
    with pytest.raises(InputError, match="0 calibration seeds"):
        calibration_samples(prompts, 0, 0, range(5))
    with pytest.raises(InputError, match="no calibration samples"):
        baseline_class("equisteer").fit(model, AXIS, [], calibration)
    with pytest.raises(InputError, match="needs labels of the model's own images"):
        baseline_class("icm").fit(model, AXIS, samples, replace(calibration, reader=None))
    with pytest.raises(InputError, match=r"1 of 1 calibration images show 'female'; a probe needs at least 2"):
        baseline_class("icm").fit(model, AXIS, samples[:1], calibration)
    with pytest.raises(InputError, match="shares add up to"):
        baseline_class("prompt").fit(model, AXIS, samples, replace(calibration, shares={"female": 0.9, "male": 0.3}))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Calibration(0, 1.0),
        lambda: concept_prune.PruneSettings(fraction=0.0),
        lambda: concept_prune.PruneSettings(strength=1.5),
        lambda: uce.EditSettings(rounds=0),
        lambda: h_space.DirectionSettings(rate=0),
        lambda: h_space.DirectionSettings(strength=-1),
        lambda: equisteer.SteerSettings(strength=float("nan")),
        lambda: icm.ProbeSettings(start=1.0),
    ],
)
def test_settings_out_of_range_are_refused_where_they_are_made(wrong):
    with pytest.raises(InputError):
        wrong()


def test_names_are_known_without_torch():
    code = "import sys, stereoclinic.evaluation.methods as b; assert b.BASELINES and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
