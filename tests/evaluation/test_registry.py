"""One edit adds a figure: it is then in the results, tables, page, schema, limits, comparison and scalars."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from tests.evaluation.test_page import Page, results

from stereo_cli.bench_tables import bench_tables
from stereo_cli.terminal import PlainConsole
from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import UNTREATED
from stereoclinic.evaluation.compare import BETTER, compare_results
from stereoclinic.evaluation.figures.case import Case
from stereoclinic.evaluation.figures.registry import (
    FIGURES,
    SHARE,
    VARIANTS,
    figure,
    figure_of,
    in_order,
    is_known,
    optional,
    requested,
    selector,
)
from stereoclinic.evaluation.figures.summarise import summarise
from stereoclinic.evaluation.figures.values import tabled, values_of
from stereoclinic.evaluation.limits import exceeded, parse_limit
from stereoclinic.evaluation.results import Results
from stereoclinic.evaluation.wording import spelt
from stereoclinic.report.page import build_page
from stereoclinic.report.tables import MAIN_ROWS, further_tables, main_table
from stereoclinic.statistics.intervals import Interval, wilson_interval


@pytest.fixture(params=["shown", "folded", "asked"])
def experiment(request, make):
    """An experiment whose results hold a figure that only these lines add."""
    made = make({"m": 0.5})

    @figure("bright pictures", SHARE, "higher", shown=request.param == "shown", asked=request.param == "asked")
    def bright(case: Case) -> Interval:
        """Images whose mean is above one half."""
        means = case.arm.images.float().mean((2, 3, 4)) / 255
        return wilson_interval(float((means > 0.5).sum()), means.numel())

    figures = "bright" if request.param == "asked" else "default"
    made.protocol = replace(made.protocol, figures=figures)
    made.results = summarise(made, ["m"])
    yield made
    del FIGURES["bright"]


def test_a_figure_that_is_registered_is_everywhere(experiment, tmp_path: Path):
    arm = experiment.results["arms"]["m"]
    text, data = spelt(Interval(**arm["bright"])), results(experiment)

    console = PlainConsole(width=400, file=io.StringIO())
    for table in bench_tables(experiment.results, "all"):
        console.print(table)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "bright pictures" in printed and text in printed

    page = Page(build_page(data)).text
    assert "bright pictures Images whose mean is above one half." in page and text in page

    schema = Results.model_json_schema()
    described = schema["$defs"]["Arm"]["properties"]["bright"]
    assert (described["title"], described["description"]) == ("bright pictures", "Images whose mean is above one half.")
    broken = json.loads(json.dumps(data))
    broken["experiments"][0]["arms"]["m"]["bright"]["low"] = -0.5
    assert Draft202012Validator(schema).is_valid(data) and not Draft202012Validator(schema).is_valid(broken)

    better = json.loads(json.dumps(data))
    better["experiments"][0]["arms"]["m"]["bright"] = {"estimate": 0.99, "low": 0.98, "high": 1.0}
    arms = compare_results(data, better)["experiments"][0]["arms"]
    (row,) = [row for each in arms if each["a"] == "m" for row in each["figures"] if row["figure"] == "bright"]
    assert (row["title"], row["verdict"]) == ("bright pictures", BETTER)

    assert values_of(experiment.results, "m")["bright"].estimate == arm["bright"]["estimate"]  # what loggers write


def test_a_figure_that_is_registered_can_have_a_limit(make):
    experiment = make({"m": 0.5})

    @figure("dark pictures", SHARE, "lower")
    def dark(case: Case) -> float:
        """Images whose mean is below one half."""
        return 0.25

    try:
        found = [summarise(experiment, ["m"])]
        assert exceeded(found, "m", [parse_limit("dark=0.3")]) == []
        assert exceeded(found, "m", [parse_limit("dark=0.2")]) == ["dark of m at guidance 2 is 0.25, above 0.2"]
    finally:
        del FIGURES["dark"]
    with pytest.raises(InputError, match="no figure 'dark'; choose one of parity_gap"):
        parse_limit("dark=0.2")


def test_limits_are_on_figures_of_which_less_is_better_also_of_families_and_variants(make):
    found = [make({"m": 0.5}, figures="soft").results]
    for text in ("drift.age=1", "soft.parity-gap=1", "unsure=0", "group_prompts.all=1", "frechet_to_untreated=-1"):
        if text.startswith("group"):
            with pytest.raises(InputError, match="no figure"):
                parse_limit(text)
        else:
            assert len(exceeded(found, "m", [parse_limit(text)])) == text.endswith("-1")
    assert exceeded(found, UNTREATED, [("frechet_to_untreated", 1.0)]) == [
        "frechet_to_untreated of untreated at guidance 2 could not be measured"
    ]


def test_figures_that_repeat_the_parity_gap_are_computed_on_request_alone(make):
    plain, some, every = (
        make({"m": 0.5}, figures=figures).results for figures in ("default", "sdtv,pooled.kl,soft", "all")
    )
    repeats = {"fairness_discrepancy", "deviation_ratio", "sdtv", "kl", "normalised_entropy", *VARIANTS}
    assert set(optional()) == repeats
    for found, there in ((plain, set()), (some, {"sdtv", "pooled", "soft"}), (every, repeats)):
        for arm in found["arms"].values():
            assert arm.keys() & repeats == there
        assert ("sdtv" in found["noise_floor"]) == ("sdtv" in there)
    assert some["arms"]["m"]["pooled"].keys() == {"kl"}
    assert some["arms"]["m"]["soft"] == every["arms"]["m"]["soft"]
    assert {key: plain["arms"]["m"][key] for key in plain["arms"]["m"]} == {
        key: value for key, value in every["arms"]["m"].items() if key not in repeats
    }


def test_names_of_figures_are_checked():
    assert requested("default") == "default" and requested("all", "sdtv") == "all"
    assert requested("default, soft.parity-gap", "sdtv") == "soft.parity_gap,sdtv"
    for name in ("beauty", "soft.occupation_right", "drift.", "pooled."):
        with pytest.raises(InputError, match=f"no figure '{name}'; choose one of default, all, "):
            requested(name)
    assert is_known("drift.age") and is_known("unrelated.clip_score") and not is_known("unrelated.unsure")
    wanted = selector("soft")
    assert wanted("unsure") and wanted("soft.kl") and not wanted("pooled.kl") and not wanted("kl")


def test_every_figure_has_a_title_a_meaning_and_a_unit():
    for name, known in FIGURES.items():
        assert known.title and (known.meaning.endswith(".") or name == "published."), name
        assert known.unit.name and ("{}" in known.title) == known.is_family, name
    titles = [each.title for each in FIGURES.values() if each.name != "unsure_interval"]
    assert len(set(titles)) == len(titles)


def test_keys_have_an_order_that_does_not_depend_on_that_of_results(make):
    keys = list(tabled(make({"m": 0.5}, figures="all").results)["m"])
    forth, back = ([key.partition(".")[0] for key in in_order(given)] for given in (keys, reversed(keys)))
    assert forth == back and in_order(["x", "parity_gap"]) == ["parity_gap", "x"]
    assert figure_of("soft.kl").title == "KL divergence, soft reads"


def test_the_page_has_one_table_of_at_most_eight_rows_and_folds_the_rest(make):
    experiment = make({"m": 0.5}, figures="all", unrelated=("a mountain", "a sea"))
    for arm in experiment.neutral:
        arm.others |= {f"axis {i}": arm.others["age"] for i in range(9)}
    experiment.results = summarise(experiment, ["m"])
    main = main_table(experiment.results)
    assert len(main.rows) == MAIN_ROWS == 8
    shown = [row.title for row in main.rows]
    assert shown[:3] == ["parity gap", "change of the gap", "occupation right"]
    folded = [row.title for table in further_tables(experiment.results) for row in table.rows]
    everything = {figure_of(key).heading for key in values_of(experiment.results, "m")}
    assert everything - {"images", "Fréchet distance within groups, two samples"} <= {*shown, *folded}
    page = build_page(results(experiment))
    before = page[: page.index("<details>")]
    assert before.count('<table class="figures') <= 1


def test_results_are_what_they_were_after_saving_and_loading(make, tmp_path: Path):
    found = Results.of([make({"m": 0.5}, figures="all").results, make(guidance=1.0).results], {"model": "x"})
    found.save(tmp_path / "results.json")
    assert Results.load(tmp_path).data == found.data
    first, second = Results.load(tmp_path).verdict.splitlines()
    assert first.startswith("Guidance 2: Mask m narrows the parity gap on gender from 0.40 to 0.00")
    assert second.startswith("Guidance 1: No mask was given.")


def test_the_schema_is_the_same_each_time():
    assert json.dumps(Results.model_json_schema()) == json.dumps(Results.model_json_schema())
