"""The mitigation benchmarks: what they make of `stereo bench`'s results."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.mask import NeuronMask

MITIGATION = Path(__file__).parents[2] / "benchmarks" / "mitigation"


@pytest.fixture(scope="module")
def loaded():
    sys.path.insert(0, str(MITIGATION))
    try:
        yield {name: importlib.import_module(name) for name in ("pareto", "map", "fronts", "gate")}
    finally:
        sys.path.remove(str(MITIGATION))
        for name in ("pareto", "show", "map", "fronts", "gate"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def pareto(loaded):
    return loaded["pareto"]


def results(folder: Path, gap: float) -> Path:
    """One seed set of one mask, whose drift has a noise of its own."""

    def arm(estimate: float, **more: object) -> dict:
        ratio = {"estimate": 3.0, "low": 2.0, "high": 4.5}
        each = {"parity_gap": {"estimate": estimate}, "frechet_within_groups_ratio": ratio, "unsure": 0.0}
        return each | {"drift": {"age": 0.1}, **more}

    experiment = {
        "axis": "gender", "images_per_prompt": 4, "steps": 20, "guidance": 2.0, "masks": ["m"],
        "noise_floor": {"parity_gap": {"mean": 0.1, "upper": 0.2}, "drift.age": {"mean": gap / 2, "upper": gap}},
        "arms": {"untreated": arm(0.4), "m": arm(gap, allotment_obeyed={"estimate": 0.9})},
        "group_prompts": {"m": {"all": {"estimate": 0.95}}},
    }  # fmt: skip
    path = folder / f"{gap}.json"
    path.write_text(json.dumps({"experiments": [experiment]}))
    return path


def test_seed_sets_are_averaged_arm_by_arm(pareto, tmp_path: Path) -> None:
    found, masks, about = pareto.collect([results(tmp_path, 0.1), results(tmp_path, 0.2)])
    arms = found[2.0]
    assert masks == ["m"] and about["steps"] == 20
    assert pareto.values(arms["m"], "parity_gap") == [0.1, 0.2]
    assert pareto.values(arms["m"], "frechet_within_groups_ratio") == pytest.approx([3, 3])
    assert (
        pareto.values(arms["m"], "obeyed") == [0.95, 0.95]
        and np.isnan(pareto.values(arms["untreated"], "obeyed")).all()
    )
    assert pareto.said(arms["m"], "parity_gap").startswith("0.150 ±")
    assert pareto.said(arms["untreated"], "allotment_obeyed") == ""
    (table,) = pareto.tables(found, about)
    assert table.row_count == 2
    pareto.figure(found, masks, about).savefig(tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 0


def test_seed_sets_of_other_sizes_are_not_averaged(pareto, tmp_path: Path) -> None:
    paths = [results(tmp_path, 0.1), results(tmp_path, 0.2)]
    for key, value in (("images_per_prompt", 8), ("noise_floor", {"parity_gap": {"mean": 0.2, "upper": 0.3}})):
        data = json.loads(paths[0].read_text())
        data["experiments"][0][key] = value
        (other := tmp_path / "other.json").write_text(json.dumps(data))
        with pytest.raises(SystemExit, match="is of another axis, number of images or steps"):
            pareto.collect([paths[1], other])


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_a_front_is_what_no_other_beats(loaded, points: dict[str, tuple[int, int]]) -> None:
    best = loaded["fronts"].front(points)
    assert [points[name] for name in best] == sorted(points[name] for name in best)
    for name, (gap, cost) in points.items():
        beaten = [(x, y) for x, y in points.values() if (x < gap and y <= cost) or (x <= gap and y < cost)]
        assert (name in best) == (not beaten)
        assert any(points[other][0] <= gap and points[other][1] <= cost for other in best)  # none is left uncovered


def test_a_front_is_drawn_of_masks_alone(loaded, tmp_path: Path) -> None:
    path = results(tmp_path, 0.1)
    points, masks, floor = loaded["fronts"].prices(path)
    within, asked = points.values()
    assert masks == {"m"} and floor == 0.2
    assert within == {"untreated": (0.4, 3.0), "m": (0.1, 3.0)} and asked == {"m": (0.1, pytest.approx(0.05))}
    loaded["fronts"].figure([path]).savefig(tmp_path / "fronts.png")  # without oracles, if there are none
    assert (tmp_path / "fronts.png").stat().st_size > 0


def test_parts_of_a_planned_mask_are_parts_of_it(loaded) -> None:
    sites = [Site("ff", "ff", 6), Site("out", "attention", 2), Site("conv2", "conv", 2)]
    drawn = torch.Generator().manual_seed(0)
    factors = torch.rand(2, 3, 10, generator=drawn)
    whole = NeuronMask(sites, torch.tensor([1000.0, 700, 500, 400]), factors, branch="conditional", groups=("a", "b"))
    parts = loaded["map"].varied("m", whole)
    assert len(parts) == 9
    kinds = [parts[f"m, {name} only"].damping for name in ("feed-forward", "attention", "convolutions")]
    assert torch.allclose(sum(kinds), whole.damping)
    assert torch.equal(kinds[1][..., 6:8], whole.damping[..., 6:8]) and kinds[1][..., :6].max() == 0
    most = parts["m, its most damped 10 %"].damping
    assert (most.sum((0, 1)) > 0).nonzero().flatten().tolist() == [int(whole.damping.sum((0, 1)).argmax())]
    assert torch.allclose(parts["m, strength 0.5"].damping, whole.damping / 2, atol=1e-6)
    assert parts["m, both halves"].branch == "both" and torch.equal(parts["m, both halves"].factors, whole.factors)
    early = parts["m, t >= 800"]
    assert early.damping[:, early.bin_of(900)].sum() > 0 and early.damping[:, early.bin_of(600)].sum() == 0


def test_condensed_results_say_the_same(pareto, tmp_path: Path) -> None:
    path = results(tmp_path, 0.1)
    data = json.loads(path.read_text())
    data["provenance"] = {"model": str(tmp_path / "harbour"), "command": f"stereo bench -o {tmp_path}"}
    data["experiments"][0]["arms"]["m"]["prompts"] = [{"label": "doctor"}]
    small = tmp_path / "small.json"
    small.write_text(json.dumps(found := pareto.condensed(data)))
    assert str(tmp_path) not in small.read_text() and found["provenance"]["model"] == "harbour"
    assert "prompts" not in found["experiments"][0]["arms"]["m"]
    assert pareto.collect([small]) == pareto.collect([path])


def test_a_lean_near_one_at_every_step_looks_like_a_wish(loaded) -> None:
    by_lean = loaded["gate"].by_lean
    leans = torch.tensor(
        [
            [[1.0, 0.2, 1.05, torch.nan, -1.0], [-1.0, -0.2, -1.05, torch.nan, 1.0]],
            [[0.95, 1.0, 0.2, 1.0, -1.0], [-0.95, -1.0, -0.2, -1.0, 1.0]],
        ]
    )  # (2, 2, 5)
    assert by_lean(leans, 0.1).tolist() == [True, False, False, False, True]
    assert by_lean(leans[:1], 0.1).tolist() == [True, False, True, False, True]
    assert by_lean(leans, 10).tolist() == [True, True, True, False, True]


def test_a_lean_that_goes_from_one_group_to_another_is_no_wish(loaded) -> None:
    leans = torch.tensor([[[1.0], [-1.0]], [[-1.0], [1.0]]])
    assert loaded["gate"].by_lean(leans, 0.2).tolist() == [False]


@given(steps=st.integers(1, 4), groups=st.integers(2, 4), prompts=st.integers(0, 5))
def test_a_wider_bound_takes_in_no_fewer_and_more_steps_no_more(loaded, steps: int, groups: int, prompts: int) -> None:
    by_lean = loaded["gate"].by_lean
    leans = 1 + torch.randn(steps, groups, prompts, generator=torch.Generator().manual_seed(steps))
    for narrow, wide in ((0.01, 0.1), (0.1, 1.0)):
        assert (by_lean(leans, narrow) <= by_lean(leans, wide)).all()
        assert (by_lean(leans, wide) <= by_lean(leans[:1], wide)).all()
        assert len(by_lean(leans, wide)) == prompts
