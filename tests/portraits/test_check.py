"""The check's gaps have intervals that hold at parity."""

from types import SimpleNamespace

import pytest
import torch

from stereoclinic.axes import load_axis
from stereoclinic.evaluation.intervals.statistics import bootstrap_interval, share_statistic
from stereoclinic.evaluation.metrics.bias import parity_gap
from stereoclinic.portraits.check import Checker
from stereoclinic.portraits.world import World


@pytest.fixture
def checker() -> Checker:
    """A checker of 20 images an occupation, without a model: what is drawn shows parity in every occupation."""
    made = object.__new__(Checker)
    made.world, made.images, made.guidances, made.floor = World.load(), 20, (1.0, 2.0), 0.1
    made.denoiser = SimpleNamespace()
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
