"""The report shows what was asked for beside its pictures: a reference, a reader's errors, a published figure."""

import json

import pytest
import torch
from tests.evaluation.test_page import HOSTILE, Page, results

from stereoclinic.evaluation.figures.values import values_of
from stereoclinic.evaluation.references import amplified, corrected
from stereoclinic.prompts.axes import Axis
from stereoclinic.report.page import build_page

TABLE = {"doctor": {"female": 0.3, "male": 0.7}, "nurse": {"female": 0.9, "male": 0.1}}
ERRS = torch.tensor([[900.0, 100.0], [50.0, 950.0]], dtype=torch.float64)
LIMITS = ["It sees " + "no more than this, " * 12 + "and says so at length.", "It knows no photograph."]
ERRORS = ["gender: right on 96.2% of FairFace (of a model, perhaps another)"]


def asked(experiment, confusion=ERRS) -> dict:
    """Results with a reference, corrected shares and a published figure, as they are written."""
    experiment.results |= {
        "amplification": amplified(experiment, TABLE),
        "corrected_shares": corrected(experiment, confusion),
        "published": {
            "name": "time", "figure": "deviation_ratio of the shares of all images of a prompt, averaged",
            "arms": {arm.name: 0.123 + i for i, arm in enumerate(experiment.neutral)},
            "noise_floor": {"mean": 0.0456, "upper": 0.0789},
        },
    }  # fmt: skip
    return json.loads(json.dumps(results(experiment)))


@pytest.fixture
def data(make) -> dict:
    return asked(make({"a": 0.5}))


def section(data: dict, start: str, end: str) -> str:
    text = Page(build_page(data)).text
    assert text.count(start) == 2  # what folds is named where it folds
    return text[text.rindex(start) :].partition(end)[0]


def bracketed(value: dict, form: str = ".2f") -> str:
    spelt = f"{value['estimate']:{form}} [{value['low']:{form}}, {value['high']:{form}}]".replace("-", "\u2212")
    return spelt.replace("\u22120.00", "0.00").replace("+0.00", "0.00")


def test_a_reference_has_its_table(data):
    said = section(data, "Compared with the reference", "Further side effects")
    for found in data["experiments"][0]["amplification"].values():
        assert bracketed(found["slope"]) in said and bracketed(found["distance"]) in said
        assert bracketed(found["excess"], "+.2f") in said


def test_a_published_figure_has_its_table_with_what_chance_shows(data):
    said = section(data, "Protocol time", "Compared with the reference")
    for value in data["experiments"][0]["published"]["arms"].values():
        assert f"{value:.3f}" in said
    assert "0.046 below 0.079" in said and "deviation_ratio of the shares of all images" in said


def test_corrected_shares_stand_beside_those_that_were_read(data):
    said, found = section(data, "Share of female without", "Prompts tested"), data["experiments"][0]
    for arm in ("untreated", "a"):
        for fixed, row in zip(found["corrected_shares"][arm], found["arms"][arm]["prompts"], strict=True):
            assert f"{bracketed(fixed['female'])} read {row['shares']['female']['estimate']:.2f}" in said
    assert "Gaps, changes and the verdict use the shares as read." in said


def test_of_more_than_two_groups_each_is_corrected(make):
    names = ("dark", "fair", "red")
    experiment = make({"a": 0.5}, axis=Axis("hair", names, names))
    experiment.results["corrected_shares"] = corrected(experiment, 100 * torch.eye(3).double() + 1)
    said = section(results(experiment), "Shares without the reader's error", "Prompts tested")
    assert all(f"doctor: {name}" in said for name in names)


def test_what_was_not_asked_for_is_left_out(make):
    text = Page(build_page(results(make({"a": 0.5})))).text
    for absent in ("Compared with the reference", "without the reader's error", "Protocol", "Limits of", "Known error"):
        assert absent not in text


def test_an_arm_that_lacks_them_bears_it(data):
    found = data["experiments"][0]
    found["corrected_shares"].pop("a")
    found["amplification"].pop("a")
    found["published"]["arms"].pop("a")
    assert "slope on the reference" in Page(build_page(data)).text


def test_figures_of_an_arm_are_its_own(data):
    found = data["experiments"][0]
    for i, name in enumerate(found["published"]["arms"]):
        values = values_of(found, name)
        assert values["published.time"].estimate == pytest.approx(0.123 + i)
        for key in ("slope", "excess", "distance"):
            assert values[f"amplification.{key}"].low == found["amplification"][name][key]["low"]
        assert not any("corrected" in key or "labels" in key for key in values)


def test_the_reader_says_above_all_figures_what_it_cannot_tell(make):
    data = results(make({"a": 0.5}, guidance=1.0), make({"a": 0.5}, guidance=2.0))
    data["provenance"] |= {"reader": "clip:model", "reader_limits": LIMITS, "reader_errors": ERRORS}
    page = Page(build_page(data))
    above = page.text[: page.text.index("Share of female by prompt")]
    assert "Limits of the reader (clip:model):" in above
    for said in LIMITS + ERRORS:
        assert said in above
    assert page.text.count("Limits of the reader") == 1 and "see the JSON" not in page.text


def test_what_the_reader_says_stays_text(data):
    harmless = build_page(data | {"provenance": data["provenance"] | {"reader_limits": ["x"], "reader_errors": ["x"]}})
    data["provenance"] |= {"reader": HOSTILE, "reader_limits": [HOSTILE], "reader_errors": [HOSTILE]}
    data["experiments"][0]["published"] |= {"name": HOSTILE, "figure": HOSTILE}
    page, other = Page(build_page(data)), Page(harmless)
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in other.elements}
    assert page.text.count(HOSTILE) >= 6
