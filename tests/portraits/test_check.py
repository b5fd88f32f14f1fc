"""The check's gaps have intervals that hold at parity, and its leans are those that relevance is made of."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.cli.conftest import write_model

from stereoclinic.ddtd.trajectory import Measured, Settings, walk
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.portraits.check import Checker
from stereoclinic.portraits.world import World
from stereoclinic.prompts.axes import load_axis
from stereoclinic.statistics.intervals import bootstrap_interval, share_statistic
from stereoclinic.statistics.shares import parity_gap


@pytest.fixture
def checker() -> Checker:
    """A checker of 20 images an occupation, without a model: what is drawn shows parity in every occupation."""
    made = object.__new__(Checker)
    made.world, made.images, made.guidances, made.floor = World.load(), 20, (1.0, 2.0), 0.1
    made.model = SimpleNamespace()
    occupations = len(made.world.names)
    made.n = 20 * occupations
    made.rows = [
        {"prompt": name, "label": name, "seed": seed, "pattern": "{person}", "article": "", "person": name}
        for seed in range(20)
        for name in made.world.names
    ]
    fair = torch.eye(2)[torch.arange(20) % 2].repeat_interleave(occupations, 0)  # seed by seed
    made.draw = lambda prompts, guidance, oracle=None, rows=None: {"gender": fair[: len(rows or made.rows)]}
    return made


def test_the_interval_of_a_gap_that_was_not_there_reaches_it(checker: Checker):
    axis = load_axis("gender")
    reads = checker.draw(None, 1.0)["gender"]
    lines = [*checker.group_lines(axis, {1.0: reads, 2.0: reads}), checker.balanced_line(axis)]
    gaps = [line for line in lines if "parity gap" in line.name]
    assert len(gaps) == 3
    for line in gaps:
        assert line.value == line.low == 0 < line.high
    # What it replaced lay above: resampling noise raises a gap.
    assert bootstrap_interval(checker.by_occupation(reads), share_statistic(parity_gap)).low > 0.01


def test_early_leans_are_those_that_relevance_is_made_of(tmp_path: Path):
    """Over the first third of the steps, meaned over seeds."""
    write_model(tmp_path / "tiny", seed=0)
    (tmp_path / "tiny" / "stereoclinic.json").write_text('{"steps": 6, "guidance": 2.0}')
    model, axis, measured = open_model(tmp_path / "tiny"), load_axis("gender"), list[Measured]()
    checker = Checker(model, World.load(), 2)
    walk(model, find_sites(model.network)[:1], axis, checker.rows, Settings(steps=6, bins=1), measured.append)
    expected = torch.stack([each.lean[0] for each in measured[:2]]).mean(0).unflatten(0, (2, -1)).mean(0)
    assert torch.allclose(checker.early_lean(axis), expected.float(), atol=1e-5)
    reads = checker.draw(None, 2.0, oracle=axis, rows=checker.rows[:3])
    assert reads["gender"].shape == (3, 2) and not torch.equal(reads["gender"], checker.draw(None, 2.0)["gender"][:3])
