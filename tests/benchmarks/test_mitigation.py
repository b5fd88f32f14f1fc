"""The mitigation benchmarks: what they make of `stereo bench`'s results."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

MITIGATION = Path(__file__).parents[2] / "benchmarks" / "mitigation"


@pytest.fixture(scope="module")
def pareto():
    sys.path.insert(0, str(MITIGATION))
    try:
        yield importlib.import_module("pareto")
    finally:
        sys.path.remove(str(MITIGATION))
        for name in ("pareto", "show"):
            sys.modules.pop(name, None)


def results(folder: Path, gap: float) -> Path:
    """One seed set of one mask."""

    def arm(estimate: float, **more: object) -> dict:
        ratio = {"estimate": 3.0, "low": 2.0, "high": 4.5}
        each = {"parity_gap": {"estimate": estimate}, "frechet_within_groups_ratio": ratio, "unsure": 0.0}
        return each | {"drift": {"age": 0.1}, **more}

    experiment = {
        "axis": "gender", "images_per_prompt": 4, "steps": 20, "guidance": 2.0, "masks": ["m"],
        "noise_floor": {"parity_gap": {"mean": 0.1, "upper": 0.2}},
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
