"""The report holds every figure, escapes whatever it is given, loads nothing, and bears what is absent or unknown."""

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from stereoclinic.evaluation.figures.summarise import summarise
from stereoclinic.evaluation.verdict import verdicts
from stereoclinic.pipelines.sites import Site
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.report.page import build_page
from stereoclinic.report.pictures import grids
from stereoclinic.report.summary import mask_summary
from stereoclinic.sns.mask import NeuronMask

HOSTILE = "</style></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`{{7*7}}&lt;b&gt;"
VOID = {"meta", "img", "br", "hr", "link", "input"}
SVG = {"svg", "line", "circle", "path", "rect", "text", "polygon", "polyline"}


class Page(HTMLParser):
    """A page's elements and text; fails on elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def results(*experiments) -> dict:
    provenance = {
        "model": "portraits", "unet_weights": "c0ffee", "command": "stereo bench --mask a.pt",
        "masks": {"a": {"file": "a.pt", "selection": {"method": "plan", "mu": 1.0}}}, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return {"schema": 2, "provenance": provenance, "experiments": [each.results for each in experiments]}


def some_mask(**changes) -> NeuronMask:
    sites = [Site("down_blocks.0.resnets.0.conv2", "conv", 4), Site("mid_block.attentions.0.ff.net.2", "ff", 6)]
    factors = torch.ones(2, 10)
    factors[0, :2], factors[1, 4:] = 0.0, 0.5
    edges = torch.tensor([1000.0, 500.0, 0.0], dtype=torch.float64)
    return NeuronMask(
        **{"sites": sites, "bin_edges": edges, "factors": factors, "metadata": {"axis": "gender"}} | changes
    )


def lean_of(groups: int, label: str = "doctor") -> dict:
    def row(k: int) -> dict:
        cells = [{"lean": 0.5 - 0.2 * k, "stderr": 0.1, "n": 3}, {"lean": None, "stderr": None, "n": 0}]
        return {"label": label, "curve": cells, "mean": {"lean": 0.5, "stderr": 0.1, "n": 3}}

    leans = [{"toward": f"group {k}", "rows": [row(k)]} for k in range(groups)]
    return {**leans[0], "timesteps": [900.0, 100.0], "others": leans[1:] if groups > 2 else []}


def test_the_page_says_what_the_results_hold(make):
    experiment = make({"a": 0.5, "b": 0.7})
    page = Page(build_page(results(experiment), grids([experiment]), {"a": mask_summary(some_mask())}, lean_of(2)))
    for each in verdicts(experiment.results):
        assert each.sentence in page.text
    for name, arm in experiment.results["arms"].items():
        gap = arm["parity_gap"]
        assert f"{gap['estimate']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}]" in page.text, name
    for row in experiment.results["arms"]["a"]["prompts"]:
        found = row["shares"]["female"]
        assert f"{found['estimate']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" in page.text
    assert f"below {experiment.results['noise_floor']['parity_gap']['upper']:.2f}" in page.text
    for setting in (
        "c0ffee",
        "stereo bench --mask a.pt",
        "mask a file a.pt selection.method plan",
        "2.13.0",
        "seeds 5000 to 5019",
    ):
        assert setting in page.text
    assert "8 of 10 neurons damped" in page.text and "2 of 4" in page.text and "6 of 6" in page.text
    assert "perceived presentation" in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == 3 * 3 * 4  # prompts x arms x seeds


@pytest.fixture
def whole(make) -> dict:
    """Results with two axes that meet, and another method beside the mask."""
    experiment = make({"a": 0.5})
    experiment.protocol = replace(experiment.protocol, others=(load_axis("age"),))
    experiment.results = summarise(experiment, ["a"])
    experiment.results["baselines"] = {
        "random": {
            "needs": "400 images of each group", "source": "Somebody, A Method, 2025", "seconds": 123.4, "images": 96,
            "forward": 4321, "backward": 17,
        },
    }  # fmt: skip
    experiment.results["arms"]["random"]["seconds"] = 1.83  # where untreated takes 1.5
    return results(experiment)


def test_prompts_are_tested_one_by_one_with_their_correction(whole):
    page, found = Page(build_page(whole)), whole["experiments"][0]["arms"]["a"]["prompts"]
    section = page.text[page.text.rindex("Prompts tested one by one") : page.text.rindex("Further bias figures")]
    for row in found:
        change = row["change"]
        assert f"{row['label']} {change['p_value_holm']:.3f} {change['moved']} of 20 moved;" in section
        assert f"uncorrected {change['p_value']:.3f}, BH {change['p_value_benjamini_hochberg']:.3f}" in section
    assert found[0]["change"]["p_value_holm"] != pytest.approx(found[0]["change"]["p_value"], abs=1e-3)


def test_intersections_show_their_gaps_and_the_shares_of_every_joint_group(whole):
    page, meeting = Page(build_page(whole)), whole["experiments"][0]["intersections"]["gender+age"]
    section = page.text[page.text.rindex("Where axes meet") :]
    assert f"below {meeting['noise_floor']['parity_gap']['upper']:.2f}" in section
    for arm in ("untreated", "a"):
        for gap in ("parity_gap", "deviation_ratio"):
            value = meeting["arms"][arm][gap]
            assert f"{value['estimate']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" in section
        for group, share in meeting["arms"][arm]["shares"].items():
            assert group.replace("+", ", ") in section
            assert f"{share['estimate']:.2f} [{share['low']:.2f}, {share['high']:.2f}]" in section


def test_what_other_methods_need_and_cost_is_told(whole):
    text = Page(build_page(whole)).text
    section = text[text.rindex("What each method needs") :]
    for said in ("400 images of each group", "Somebody, A Method, 2025", "123 s", "96", "4321", "17", "1.22 \u00d7"):
        assert said in section
    whole["experiments"][0].pop("baselines")
    assert "What each method needs" not in Page(build_page(whole)).text


def test_nothing_is_loaded_and_nothing_runs(make):
    experiment = make({"a": 0.5})
    text = build_page(results(experiment), grids([experiment]), {"a": mask_summary(some_mask())}, lean_of(2))
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value.startswith("data:image/" if tag == "img" else "#"), (tag, value)
    assert "url(" not in text and "@import" not in text
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.elements)


def test_hostile_names_stay_text(make):
    axis = Axis(HOSTILE, (f"one {HOSTILE}", f"two {HOSTILE}"), (HOSTILE, f"two {HOSTILE}"))
    experiment = make({HOSTILE: 0.5}, axis=axis, labels=(HOSTILE, f"{HOSTILE} 2"))
    data = results(experiment)
    data["provenance"] |= {"model": HOSTILE, HOSTILE: HOSTILE, "masks": {HOSTILE: {"file": HOSTILE}}}
    data["experiments"][0]["arms"][HOSTILE][HOSTILE] = 0.25  # a figure of that name
    summary = mask_summary(some_mask(metadata={"axis": HOSTILE, "selection": {"method": HOSTILE, "root": HOSTILE}}))
    summary["groups"] = [HOSTILE]
    harmless = make({"a": 0.5}, labels=("x", "y"))
    harmless_data = results(harmless)
    harmless_data["experiments"][0]["arms"]["a"]["x"] = 0.25
    harmless_data["provenance"] |= {"x": "x"}
    leans = lean_of(3, HOSTILE)
    leans["toward"] = HOSTILE
    page = Page(build_page(data, grids([experiment]), {HOSTILE: summary}, leans))
    other = Page(build_page(harmless_data, grids([harmless]), {"a": mask_summary(some_mask())}, lean_of(3)))
    # Whatever the names are, the elements and their attributes are the same.
    shape, other_shape = ([(tag, sorted(attributes)) for tag, attributes in each.elements] for each in (page, other))
    kinds = {tag for tag, _ in other_shape}
    assert {tag for tag, _ in shape} == kinds
    assert {(tag, tuple(names)) for tag, names in shape} == {(tag, tuple(names)) for tag, names in other_shape}
    assert page.text.count(HOSTILE) > 20  # and they are shown as they are


@pytest.mark.parametrize("groups", [3, 5])
def test_more_than_two_groups_have_a_chart_each(make, groups):
    names = tuple(f"group {k}" for k in range(groups))
    experiment = make({"a": 0.5}, axis=Axis("origin", names, names))
    page = Page(build_page(results(experiment), grids([experiment]), None, lean_of(groups)))
    for name in names:
        assert f"Share of {name} by prompt" in page.text
    charts = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("class") == "rows"]
    assert len(charts) == groups * 3
    assert not any(attributes.get("class") == "chance" for _, attributes in page.elements)  # of one share there is none
    lines = [attributes for tag, attributes in page.elements if tag == "polyline"]
    assert len(lines) == groups


def test_two_groups_have_one_chart_for_the_second_mirrors_the_first(make):
    page = Page(build_page(results(make({"a": 0.5}))))
    assert "Share of female by prompt" in page.text and "Share of male by prompt" not in page.text


def test_several_guidance_scales_are_sections_with_an_index(make):
    page = Page(build_page(results(make({"a": 0.5}, guidance=1.0), make({"a": 0.7}, guidance=7.5))))
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert len(links) == 2 and {link[1:] for link in links} <= ids
    assert "Guidance 1" in page.text and "Guidance 7.5" in page.text
    assert not any(tag == "a" for tag, _ in Page(build_page(results(make({"a": 0.5})))).elements)


def test_without_relevance_there_is_a_hint(make):
    assert "stereo bench --relevance FILE" in Page(build_page(results(make({"a": 0.5})))).text
    assert "stereo bench --relevance FILE" not in Page(build_page(results(make({"a": 0.5})), lean=lean_of(2))).text


def test_a_figure_that_nobody_knows_is_shown_under_its_name(make):
    data = copy.deepcopy(results(make({"a": 0.5})))
    data["experiments"][0]["arms"]["a"] |= {
        "new_distance": {"estimate": 0.123, "low": 0.1, "high": 0.2},
        "cost": {"peak_memory": 12345, "note": "text", "list": [1, 2]},
        "parity_gap_soft": {"estimate": 0.21, "low": 0.2, "high": 0.3},
        "absent": None,
    }
    page = Page(build_page(data))
    for text in ("new distance", "0.12 [0.10, 0.20]", "cost, peak memory", "12345", "0.21 [0.20, 0.30]"):
        assert text in page.text, text
    assert "absent" not in page.text


KEEP = {"axis", "groups", "arms", "untreated", "a", "parity_gap", "estimate", "masks", "guidance"}


def _without(data: dict) -> list[tuple[str, dict]]:
    """The experiment without each of its figures, one at a time, and without all of them."""
    arms = data["arms"]
    found = []
    for key in data.keys() - KEEP:
        found.append((key, {k: v for k, v in data.items() if k != key}))
    for key in {key for arm in arms.values() for key in arm} - KEEP:
        less = {name: {k: v for k, v in arm.items() if k != key} for name, arm in arms.items()}
        found.append((key, {**data, "arms": less}))
    bare = {name: {"parity_gap": arms[name]["parity_gap"]} for name in ("untreated", "a")}
    return [
        *found,
        ("everything", {"arms": bare, **{key: data[key] for key in ("axis", "groups", "masks", "guidance")}}),
    ]


def test_figures_that_are_absent_are_left_out(make):
    data = results(make({"a": 0.5}))
    for name, less in _without(data["experiments"][0]):
        page = Page(build_page({**data, "experiments": [json.loads(json.dumps(less))]}))
        assert "Bias" in page.text, name
        assert not re.search(r"\b(None|nan)\b", page.text), name


def test_the_file_stays_small_however_large_the_pictures(make):
    labels = tuple(f"occupation {i}" for i in range(36))
    one = make({"a": 0.5}, labels=labels, images=2, side=128)
    other = replace(one, protocol=replace(one.protocol, guidance=4.0), results={**one.results, "guidance": 4.0})
    experiments = [one, other]
    text = build_page(results(*experiments), grids(experiments))
    assert len(text.encode()) < 3_000_000
    left = int(re.search(r"(\d+) further prompts had no room", text)[1])
    assert 0 < left < 36


def test_an_axis_that_ships_makes_a_page_without_masks(make):
    page = Page(build_page(results(make(axis=load_axis("skin")))))
    assert "No mask was given" in page.text and "Where the neurons are" not in page.text
