"""In a real browser nothing of the report is wider than its page: on a phone, on a screen, and in print."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.evaluation.test_page import lean_of, some_mask

from stereoclinic.evaluation.figures.summarise import summarise
from stereoclinic.evaluation.references import amplified, corrected
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.report.page import build_page
from stereoclinic.report.pictures import grids
from stereoclinic.report.summary import mask_summary

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None and not os.environ.get("STEREOCLINIC_NEEDS_BROWSER"),  # set by `nox -s browser`
        reason="no chromium or google-chrome is on the path",
    ),
]

# The page stands in a frame, for a browser's own window is never as narrow as a phone; it forbids itself scripts, so
# that the script is the frame's parent.
MEASURE = """<!doctype html><body style="margin:0"><iframe id="f" style="width:{width}px;height:800px;border:0"
srcdoc="{page}"></iframe><pre id="found"></pre><script>
document.getElementById("f").onload = (event) => {{
  const page = event.target.contentDocument, wide = [];
  for (const each of page.querySelectorAll("body *:not(svg *)"))
    if (each.getBoundingClientRect().right > {width} + 0.5) wide.push(each.tagName + "." + each.className);
  const pictures = [...page.images];
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth, wide: wide.slice(0, 5), pictures: pictures.length,
    height: page.querySelector("main").getBoundingClientRect().height,
    drawn: pictures.filter((each) => each.complete && each.naturalWidth > 0).length,
    heading: getComputedStyle(page.querySelector(".figures thead")).display,
  }});
}};
</script>"""
PHONE, SCREEN, PAPER = 360, 1200, 703  # pixels; paper is A4 less its margins


def measured(page: str, width: int, folder: Path) -> dict:
    path = folder / "measure.html"
    path.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
    dom = browse(folder, "--dump-dom", path.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found and found[1], dom[-500:]
    return json.loads(html.unescape(found[1]))


def browse(folder: Path, *arguments: str) -> str:
    assert BROWSER is not None, "no chromium or google-chrome is on the path"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    environment = {**os.environ, "HOME": str(folder)}
    run = subprocess.run(
        [*command, "--virtual-time-budget=10000", *arguments], capture_output=True, text=True, timeout=120,
        env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def as_printed(page: str) -> str:
    """The page with its rules for print in force, and those for screens not."""
    assert "@media print" in page and "@media screen" in page
    return page.replace("@media print", "@media all").replace("@media screen", "@media not all")


@pytest.fixture(scope="module")
def page(make) -> str:
    """Long names, three groups, three masks: as wide as a page may come to be."""
    groups = ("middle-aged or thereabouts", "a-group-with-a-name-that-has-no-break-anywhere", "old")
    masks = {"gender-allocated-with-a-long-name": 0.5, "x" * 60: 0.6, "c": 0.7}
    axis = Axis("ancestry", groups, groups)
    experiments = [
        make(masks, axis=axis, labels=("doctor", "y" * 50, "chief executive officer of a company"), guidance=scale)
        for scale in (1.0, 2.0)
    ]
    for each in experiments:
        each.protocol = replace(each.protocol, others=(load_axis("age"),))
        each.results = summarise(each, list(masks))
        cost = {"seconds": 12345.6, "images": 4000, "forward": 123456, "backward": 123456}
        each.results["baselines"] = {"random": {"needs": "w" * 60, "source": "v" * 80, **cost}}
        each.results["amplification"] = amplified(each, {"doctor": dict(zip(groups, (0.2, 0.3, 0.5), strict=True))})
        each.results["corrected_shares"] = corrected(each, 1000 * torch.eye(3).double() + 1)
        floor = {"mean": 0.1, "upper": 0.2}
        arms = dict.fromkeys(each.results["arms"], 0.5)
        each.results["published"] = {"name": "u" * 60, "figure": "t" * 80, "arms": arms, "noise_floor": floor}
    provenance = {
        "model": "a/" + "z" * 80, "unet_weights": "0" * 64, "command": "stereo bench " + "--mask a.pt " * 30,
        "reader": "clip:" + "s" * 60, "reader_limits": ["r" * 80], "reader_errors": ["many words " * 40],
    }  # fmt: skip
    data = {"schema": 2, "provenance": provenance, "experiments": [each.results for each in experiments]}
    return build_page(data, grids(experiments))


@pytest.mark.parametrize(
    ("width", "printed"), [(PHONE, False), (SCREEN, False), (PAPER, True)], ids=["phone", "screen", "print"]
)
def test_nothing_is_wider_than_the_page_and_every_picture_is_there(page, width, printed, tmp_path: Path):
    page = page.replace("<details", "<details open")
    found = measured(as_printed(page) if printed else page, width, tmp_path)
    assert found["wide"] == []
    assert found["width"] <= width
    assert found["drawn"] == found["pictures"] == 2 * 3 * 4 * 4  # scales x prompts x arms x seeds
    # A phone has a block a figure; wider pages have columns, under a heading.
    assert found["heading"] == ("none" if width == PHONE else "table-header-group")


@pytest.mark.parametrize(("width", "printed"), [(SCREEN, False), (PAPER, True)], ids=["screen", "print"])
def test_many_masks_fit_too(make, width, printed, tmp_path: Path):
    experiment = make({f"mask-{i}": 0.5 for i in range(8)})
    data = {"schema": 2, "provenance": {}, "experiments": [experiment.results]}
    page = build_page(data, grids([experiment])).replace("<details", "<details open")
    found = measured(as_printed(page) if printed else page, width, tmp_path)
    assert found["wide"] == []
    assert found["width"] <= width


def test_what_is_not_folded_fits_on_two_screens(make, tmp_path: Path):
    labels = tuple(f"occupation {i}" for i in range(12))
    experiment = make({"gender": 0.6}, labels=labels, images=25, side=64)
    provenance = {
        "model": "portraits", "unet_weights": "0" * 64, "prompts": "0" * 64, "reader": "portraits",
        "reader_limits": ["It was trained on flat cartoon portraits."], "command": "stereo bench --mask gender.pt",
        "created": "2026-11-27T12:00:00+00:00", "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    data = {"schema": 2, "provenance": provenance, "experiments": [experiment.results]}
    page = build_page(data, grids([experiment]), {"gender": mask_summary(some_mask())}, lean_of(2))
    assert measured(page, 1280, tmp_path)["height"] <= 2 * 1024


def test_the_measure_sees_what_is_too_wide(page, tmp_path: Path):
    wider = page.replace("</main>", '<p style="width:500px">wide</p></main>')
    assert measured(wider, PHONE, tmp_path)["wide"] == ["P."]


def test_it_prints(page, tmp_path: Path):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}", (tmp_path / "report.html").as_uri())
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF") and len(printed) > 20_000
