"""Embedded pictures are those of the same seeds, and stay within their budget."""

import base64
import io

import pytest
import torch
from PIL import Image

from stereoclinic.report.pictures import SEEDS, embedded, grids


def decoded(source: str) -> Image.Image:
    head, _, body = source.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(body)))


def size(found) -> int:
    cards = [card for grid in found for card in grid.cards]
    return sum(len(picture.source) for card in cards for _, row in card.rows for picture in row)


def test_pictures_are_the_arms_own_seed_by_seed(make):
    experiment = make({"a": 0.5})
    (grid,) = grids([experiment])
    assert [card.label for card in grid.cards] == ["doctor", "nurse", "chef"]
    for p, card in enumerate(grid.cards):
        assert [name for name, _ in card.rows] == ["untreated", "a"]
        for name, row in card.rows:
            arm = experiment.arm(name)
            assert [picture.seed for picture in row] == list(range(5000, 5000 + SEEDS))
            for i, picture in enumerate(row):
                shown = torch.frombuffer(bytearray(decoded(picture.source).tobytes()), dtype=torch.uint8)
                assert torch.equal(shown.reshape(8, 8, 3), arm.images[p, i].permute(1, 2, 0))
                assert picture.group == experiment.protocol.axis.groups[arm.reads[p, i].argmax()]
                assert picture.probability == pytest.approx(0.96)
                assert not picture.unsure


def test_without_a_mask_the_balanced_oracle_stands_beside_the_model(make):
    (grid,) = grids([make()])
    assert [name for name, _ in grid.cards[0].rows] == ["untreated", "balanced oracle"]


def test_fewer_seeds_and_then_fewer_prompts_keep_to_the_budget(make):
    experiments = [make({"a": 0.5}), make({"a": 0.5}, guidance=1.0)]
    whole = size(grids(experiments))
    for budget, seeds, left_out in ((whole, SEEDS, 0), (whole - 1, SEEDS - 1, 0), (whole // 6, 1, 1), (0, None, 3)):
        found = grids(experiments, budget)
        assert size(found) <= budget
        assert all(grid.left_out == left_out for grid in found)
        assert all(len(grid.cards) + grid.left_out == 3 for grid in found)
        assert {len(row) for grid in found for card in grid.cards for _, row in card.rows} == {seeds} - {None}


def test_large_pictures_become_small():
    generator = torch.Generator().manual_seed(0)
    source = embedded(torch.randint(0, 256, (3, 512, 768), generator=generator, dtype=torch.uint8))
    assert decoded(source).size == (128, 85)
    assert len(source) < 30_000


def test_an_unsure_read_is_marked(make):
    experiment = make({"a": 0.5})
    experiment.arm("a").reads[0, 0] = torch.tensor([0.45, 0.55])
    (grid,) = grids([experiment])
    first = grid.cards[0].rows[1][1][0]
    assert (first.group, first.unsure) == ("male", True)


def test_a_picture_of_no_group_is_marked_unsure(make):
    experiment = make({"a": 0.5})
    experiment.arm("a").no_group = torch.zeros(3, 20)
    experiment.arm("a").no_group[0, 0] = 0.98
    (grid,) = grids([experiment])
    first, second = grid.cards[0].rows[1][1][:2]
    assert first.unsure and first.probability == pytest.approx(0.96 * 0.02, rel=1e-4)
    assert not second.unsure and second.probability == pytest.approx(0.96)
