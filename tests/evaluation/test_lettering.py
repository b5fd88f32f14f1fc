"""Names in pictures: any name makes a picture of bounded size, without boxes and without formulas."""

import io
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageChops
from tests.evaluation.test_atlas import TRANSFORMERS, mask_of, unet_sites

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site
from stereoclinic.report.atlas import MOST_CELLS, MOST_LINES, mask_map
from stereoclinic.report.pictures import font, lettered
from stereoclinic.report.report import SheetRow, side_by_side
from stereoclinic.report.responses import Response, View, draw
from stereoclinic.report.summary import mask_summary

HOSTILE = "$x_{$ \x1b[31m\u202e\u4e2d\U0001f9d1 [/x] \\frac $$"
NAMES = {
    "letters": "W" * 4_900,
    "words": "a photo of a person " * 245,
    "hostile": HOSTILE,
    "a line": "a\n\n\nb",
    "": "",
}


@given(st.text(), st.integers(3, 60))
def test_a_name_is_written_in_signs_of_the_font_and_no_longer_than_it_may_be(text: str, most: int) -> None:
    shown = lettered(text, most)
    assert len(shown) <= most
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"):
        assert all(FT2Font(fonts / name).get_char_index(ord(sign)) for sign in shown)
    if len(text) <= most and text.isascii() and text.isprintable():
        assert shown == text


def test_a_sign_that_the_font_has_not_is_no_box() -> None:
    def drawn(text: str) -> bytes:
        return bytes(font(18).getmask(text))

    assert drawn("\u4e2d") == drawn("\uffff")  # the font's box
    shown = lettered("a \u4e2d\u6587 \U0001f9d1 \u0434\u00e9\u03b1", 60)
    assert shown == r"a \u4e2d\u6587 \U0001f9d1 " + "\u0434\u00e9\u03b1"
    assert drawn("\uffff") not in [drawn(sign) for sign in shown]


def tiles(count: int) -> list[torch.Tensor]:
    return [torch.full((3, 64, 64), 100, dtype=torch.uint8)] * count


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("name", NAMES)
def test_a_sheet_is_as_wide_as_its_pictures_and_a_column_of_labels(name: str, count: int) -> None:
    rows = [SheetRow(each, tiles(count), tiles(count)) for each in ("doctor", NAMES[name])]
    sheet = side_by_side(rows, ("untreated", f"mask {NAMES[name]}"))
    pictures = 2 * count * 132
    assert pictures < sheet.width <= pictures + 520 and sheet.height < 400


def test_a_label_stays_beside_its_own_pictures() -> None:
    rows = [SheetRow(each, tiles(1), tiles(1)) for each in ("W" * 4_900, "")]
    sheet = side_by_side(rows, ("a", "b"))
    below = sheet.crop((0, sheet.height - 12 - 128, sheet.width - 2 * 132 - 30, sheet.height))
    assert below.convert("L").getextrema() == (255, 255)  # the second row's label is empty, and white


def test_signs_that_nobody_has_are_written_out_on_a_sheet() -> None:
    def sheet(label: str) -> Image.Image:
        return side_by_side([SheetRow(label, tiles(1), tiles(1))], (label, label))

    assert ImageChops.difference(sheet("\u4e2d\x1b"), sheet(r"\u4e2d\x1b")).getbbox() is None


def test_of_very_many_rows_the_first_are_drawn() -> None:
    sheet = side_by_side([SheetRow("doctor", tiles(1), tiles(1))] * 5_000, ("a", "b"))
    assert sheet.height < 35_000


def named(name: str) -> dict:
    """A mask whose axis, groups, sites and settings have the name."""
    own = name.replace("[", "(")[:240]  # longer paths are refused where a file is read
    sites = [
        Site(f"{own}.0.{own}", "other", 4), Site(f"{own}.1.attn.to_out.0", "attention", 4), Site(own or "x", "ff", 4)
    ]  # fmt: skip
    mask = mask_of(sites, 3)
    metadata = {"axis": name, "selection": {"method": name, "root": name}}
    return mask_summary(replace(mask, metadata=metadata))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a line"])
def test_a_map_of_any_names_is_drawn(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of signs that are missing
        figure = mask_map(named(NAMES[name]), f"{NAMES[name]}.pt")
        figure.savefig(file := io.BytesIO(), format="png", dpi=50)
    width, height = Image.open(file).size
    assert width < 50 * 24 and height < 50 * 12


def test_names_stay_as_they_are_written_in_a_map() -> None:
    figure = mask_map(named("$x$"), "$y$.pt")
    said = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    assert any(text.startswith("$y$.pt: ") for text in said) and any("axis $x$" in text for text in said)
    assert not any(text.get_parse_math() for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("name", [name for name in NAMES if name])
def test_what_neurons_respond_to_is_drawn_under_any_names(name: str) -> None:
    text = NAMES[name]
    neuron = {"place": text, "neuron": 3, "stderr": 0.1, "mean": 0.5, "bin": {"from": 9.0, "to": 0.0}}
    view = View(text, text, 0, torch.rand(3, 8, 8), torch.rand(4, 4) - 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw([Response(neuron, [view])], (text, text), text)
        figure.savefig(file := io.BytesIO(), format="png", dpi=50)
    assert Image.open(file).width < 50 * 12


def test_a_map_that_would_take_minutes_is_refused_with_the_limit() -> None:
    many = [Site(f"blocks.{i}.attn.to_out.0", "attention", 1) for i in range(3_000)]
    apart = [Site(f"part{i}.0.attn.to_out.0", "attention", 1) for i in range(1_500)]
    kinds = [Site(f"blocks.{i}.layer{i}", "other", 1) for i in range(300)]
    for sites, bins in ((many, 1), (apart, 1), (kinds, 1), (unet_sites(), 3_000), (TRANSFORMERS["flux"], 200)):
        with pytest.raises(InputError, match=f"at most {MOST_LINES} layers, {MOST_CELLS} cells and 2000 square inches"):
            mask_map(mask_summary(mask_of(sites, bins)), "m.pt")
