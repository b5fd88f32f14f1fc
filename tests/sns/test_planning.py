"""A plan that was cut off goes on; samples that do not fit in memory together are walked fewer at a time."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from stereoclinic.errors import InputError
from stereoclinic.io.files import load_tensors, save_tensors
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.sets import Samples, load_prompts, with_seeds
from stereoclinic.sns.dose import find_dose
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import KIND, VERSION, plan_stepwise
from stereoclinic.sns.stepwise import Stepwise

AXIS = load_axis("gender")
QUICK: dict[str, Any] = {"steps": 4, "until": 500.0, "guidance": 1.0, "mu": 0.01, "keep": 0.0}


@pytest.fixture(scope="module")
def samples() -> Samples:
    return with_seeds(load_prompts("portraits", 2), 0, 2)


def cut_off(little: Model, samples: Samples, settings: Stepwise, path: Path, after: int) -> None:
    """A plan that is interrupted after so many of its four steps: two for each group."""
    ticks: list[int] = []

    def interrupt(count: int) -> None:
        ticks.append(count)
        if len(ticks) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_stepwise(little, AXIS, samples, settings, allocate=True, progress=interrupt, unfinished=path)
    assert len(load_tensors(path, KIND, VERSION)[0]["factors"]) == after


def same(one: NeuronMask | None, two: NeuronMask | None) -> bool:
    assert one is not None and two is not None
    roots = (one.roots is None and two.roots is None) or torch.equal(one.roots, two.roots)
    return torch.equal(one.factors, two.factors) and roots and one.metadata == two.metadata


@pytest.mark.parametrize("root", ["zero", "group"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_plan_that_was_cut_off_goes_on(
    little: Model, samples: Samples, root: str, after: int, tmp_path: Path
) -> None:
    settings, path = Stepwise(root=root, **QUICK), tmp_path / "cut.safetensors"
    whole = plan_stepwise(little, AXIS, samples, settings, allocate=True)
    cut_off(little, samples, settings, path, after)
    ticks: list[int] = []
    rest = plan_stepwise(little, AXIS, samples, settings, allocate=True, progress=ticks.append, unfinished=path)
    assert same(whole, rest)
    assert ticks == [after * len(samples), *[len(samples)] * (4 - after)]
    # All of it lies there now, and nothing is planned again.
    ticks.clear()
    assert same(whole, plan_stepwise(little, AXIS, samples, settings, True, progress=ticks.append, unfinished=path))
    assert ticks == [4 * len(samples)]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"settings": Stepwise(**{**QUICK, "mu": 0.02})}, "mu was 0.01 and is 0.02"),
        ({"stay": [Axis("age", ("young", "old"), ("young", "old"))]}, "stay was .* and is"),
        ({"samples": with_seeds(load_prompts("portraits", 2), 1, 2)}, r"seeds was \[0, 1\] and is \[1, 2\]"),
        ({"candidates": True}, "candidates was None and is"),
        ({"allocate": False}, "allocate was True and is False"),
    ],
    ids=["settings", "what is to stay", "samples", "candidates", "balancing"],
)
def test_another_plan_does_not_go_on_with_it(
    little: Model, samples: Samples, changed: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "cut.safetensors"
    cut_off(little, samples, Stepwise(**QUICK), path, 1)
    before = path.read_bytes()
    if "candidates" in changed:
        changed = {"candidates": torch.ones(sum(site.width for site in find_sites(little.network)), dtype=torch.bool)}
    given = {"samples": samples, "settings": Stepwise(**QUICK), "allocate": True, **changed}
    with pytest.raises(InputError, match=f"made in another configuration: .*{says}"):
        plan_stepwise(little, AXIS, unfinished=path, **given)
    assert path.read_bytes() == before
    # In other batches it may.
    assert plan_stepwise(little, AXIS, samples, Stepwise(batch_size=3, **QUICK), True, unfinished=path) is not None


@pytest.mark.parametrize(
    "wrong", ["fewer rows", "other neurons", "too many steps", "no steps", "no factors", "integers", "no lean"]
)
def test_a_file_that_holds_other_steps(little: Model, samples: Samples, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    cut_off(little, samples, Stepwise(**QUICK), path, 2)
    tensors, about = load_tensors(path, KIND, VERSION)
    factors = tensors["factors"]
    tensors["factors"] = {"fewer rows": factors[1:], "other neurons": factors[:, 1:], "integers": factors.long()}.get(
        wrong, factors
    )
    if wrong == "too many steps":
        tensors["factors"], about["steps"] = torch.cat([factors] * 3), about["steps"] * 3
    if wrong == "no steps":
        about["steps"] = None
    if wrong == "no lean":
        del about["steps"][1]["after"]
    if wrong == "no factors":
        tensors["others"] = tensors.pop("factors")
    save_tensors(path, KIND, VERSION, tensors, about)
    with pytest.raises(InputError, match="holds other steps than it should; remove it to start anew"):
        plan_stepwise(little, AXIS, samples, Stepwise(**QUICK), True, unfinished=path)


@pytest.mark.parametrize("root", ["zero", "group"])
def test_samples_that_do_not_fit_in_memory_together(little: Model, samples: Samples, root: str) -> None:
    settings = Stepwise(root=root, **QUICK)
    one_by_one = plan_stepwise(little, AXIS, samples, Stepwise(root=root, batch_size=1, **QUICK))
    said: list[str] = []

    def fits_one(network: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if len(kwargs["sample"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with little.network.register_forward_pre_hook(fits_one, with_kwargs=True):
        parted = plan_stepwise(little, AXIS, samples, settings, warn=said.append)
    assert same(parted, one_by_one)
    assert said == ["4 samples at a time do not fit in memory; going on with 1"]


def blind(unet: torch.nn.Module) -> None:
    """It does not read the text."""
    for name, layer in unet.named_modules():
        if name.endswith("attn2.to_v"):
            layer.weight.data.zero_()


def broken(unet: torch.nn.Module) -> None:
    unet.conv_out.bias.data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (blind, "predicts the same for every group's prompt, so the axis has no direction"),
        (broken, "predictions are not finite; try --dtype float32"),
    ],
)
def test_where_there_is_no_lean_the_sample_is_named(little: Model, samples: Samples, change: Any, says: str) -> None:
    mask = plan_stepwise(little, AXIS, samples, Stepwise(**QUICK))
    model = Model(copy.deepcopy(little.pipe), "other")
    change(model.network)
    says = rf"at timestep 999 of '{samples[0]['prompt']}', seed 0, .*{says}"
    for guidance in (1.0, 3.0):
        with pytest.raises(InputError, match=says):
            plan_stepwise(model, AXIS, samples, Stepwise(**{**QUICK, "guidance": guidance}))
        with pytest.raises(InputError, match=says):
            find_dose(model, AXIS, samples, mask, 10.0, 4, guidance, force=True)
