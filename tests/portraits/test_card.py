"""The model card: a table that stays a table, and figures that keep their verdict."""

from stereoclinic.portraits.card import Line, at_least, at_most, card
from stereoclinic.portraits.denoisers import DENOISERS


def test_the_card_holds_every_figure_in_well_formed_rows() -> None:
    lines = [
        at_least("right", 0.98, 100, 0.97),
        at_most("|drawn - planted|", 0.2, 50, 0.1),
        Line("gap", 0.3, 10, 0.2, 0.4),
    ]
    shares = [
        {
            "axis": "age",
            "group": "old",
            "occupation": "judge",
            "planted": 0.9,
            "early_lean": 0.8,
            "generated": {"1": 0.9},
        }
    ]
    about = {"name": "w", "parameters": 1.0, "steps": 20, "guidance": 2.0, "hardware": "h", "samples": "s", "images": 4}
    about |= DENOISERS["flow"].about | {"kind": "flow", "call": "", "first_seed": 7}
    text = card(lines, shares, **about)
    table = text[text.index("| figure") : text.index("## Planted")].strip().splitlines()
    assert len(table) == 2 + 3
    assert {line.replace("\\|", "").count("|") for line in table} == {7}
    assert "| 0.980 |  | 100 | >= 0.97 | met |" in text
    assert "| 0.200 |  | 50 | <= 0.1 | **not met** |" in text
    assert "| 0.300 | 0.200 to 0.400 | 10 |  |  |" in text
    assert "| age (old) | judge | 0.90 | +0.80 | +0.80 | 0.90 |" in text
