"""The tables that `stereo bench` prints: a row for each arm, a column for each figure of the registry."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from stereo_cli.tables import P, captioned, new_table, styled
from stereoclinic.evaluation.arms import BALANCED, UNTREATED
from stereoclinic.evaluation.figures.registry import UNRELATED, figure_of, in_order
from stereoclinic.evaluation.figures.values import as_value, noise_of, p_value_of, tabled
from stereoclinic.evaluation.wording import number, p_value, spelt
from stereoclinic.io.text import printable
from stereoclinic.report.tables import allotment_note, needs, prompt_labels, shown_groups
from stereoclinic.statistics.intervals import NoiseFloor

Data = dict[str, Any]

#: Parts whose figures are there only where something asks for them.
_ASKED = {"published": "Published protocol", "reference": "Compared with the reference", "option": "Options"}
_BRACKETS = "[95 % interval]; p: no change on the same seeds. Groups are perceived presentation."
_FAIR = " Sampling noise: what a fair model shows with as many images."
_NOISE = "Sampling noise: what a mask that changes nothing shows. "
_COLUMNS = 3  # of a table of further figures


def bench_tables(results: Data, figures: str = "default") -> list[Group]:
    """One table of bias and one of cost, and whatever was asked for.

    Args:
        results: Of one experiment, as in results.json.
        figures: "default", "all", or names of further figures with commas between them.
    """
    keys = in_order(dict.fromkeys(key for values in tabled(results).values() for key in values))
    shown = [key for key in keys if figure_of(key).shown]
    rest = [key for key in keys if key not in shown and figure_of(key).part not in (*_ASKED, "head")]
    names = figures.split(",")
    further = [key for key in rest if "all" in names or key in names or key.partition(".")[0] in names]
    n, (first, last) = results["images_per_prompt"], results["seeds"]
    facts = f"{len(results['labels'])} prompts, {n} images each, seeds {first} to {last}, {results['steps']} steps."
    published = results.get("published") or {}
    captions = {"published": f"{published.get('name')}: {published.get('figure')}."}
    tables = [
        _table(results, "Bias", _of_part(shown, "bias"), f"{facts} {_BRACKETS}{_FAIR}{allotment_note(results)}"),
        *(_table(results, title, _of_part(keys, part), captions.get(part, "")) for part, title in _ASKED.items()),
        _table(results, "Cost", _of_part(shown, "cost"), _NOISE + _measured(results)),
        *(_table(results, "Further figures", further[i : i + _COLUMNS]) for i in range(0, len(further), _COLUMNS)),
        _needs_table(results),
    ]
    if "all" not in names and UNRELATED in results:
        unrelated = [key for key in keys if key.startswith(f"{UNRELATED}.") and figure_of(key).part == "cost"]
        tables.append(_table(results, "Unrelated prompts", unrelated))
    if "all" in names or "corrected_shares" in results:
        tables += _prompt_tables(results)
    return [table for table in tables if table is not None]


def reader_says(provenance: Data) -> Group | None:
    """What the reader cannot tell, and how often it is known to be wrong; None where it says nothing."""
    lines = [*provenance["reader_limits"], *(f"Known error: {error}." for error in provenance["reader_errors"])]
    if not lines:
        return None
    shown = (styled(f"- {line}", "dim") for line in lines)
    return Group(styled(f"Limits of the reader: {provenance['reader']}", "bold"), *shown, "")


def _measured(results: Data) -> str:
    """What distances are measured in, and how the gate read the prompts."""
    name, gate = results.get("features", "reader"), results["gate"]
    features = "the reader's" if name == "reader" else name
    alone = f"{gate['group_prompts'] - gate['missed']} of {gate['group_prompts']} group prompts"
    alarms = f"{gate['false_alarms']} of {gate['neutral_prompts']} neutral prompts"
    return f"Distances use {features} features. The gate applies no mask to {alone} and {alarms}."


def _of_part(keys: Sequence[str], part: str) -> list[str]:
    return [key for key in keys if figure_of(key).part == part]


def _table(results: Data, title: str, keys: Sequence[str], caption: str = "") -> Group | None:
    """These figures of every arm that has one of them, and their sampling noise in the last row."""
    values = {arm: found for arm, found in tabled(results).items() if any(key in found for key in keys)}
    if not values:
        return None
    table = new_table(f"{title}: {results['axis']}, guidance {results['guidance']:g}")
    table.add_column("")
    tested = {key for key in keys if any(key in each and p_value_of(each[key]) is not None for each in values.values())}
    for key in keys:
        table.add_column(figure_of(key).heading, justify="right")
        if key in tested:
            table.add_column(P, justify="right")
    for arm, found in values.items():
        cells: list[str] = []
        for key in keys:
            value = found.get(key)
            p = None if value is None else p_value_of(value)
            cells.append("" if value is None else spelt(value, figure_of(key).unit.form))
            cells += ["" if p is None else p_value(p)] if key in tested else []
        table.add_row(printable(arm), *cells, style="bold" if arm in results["masks"] else "")
    noise = [cell for key in keys for cell in (_noise(results, key), *([""] if key in tested else []))]
    if any(noise):
        table.add_section()
        table.add_row("sampling noise", *noise, style="italic")
    return captioned(table, caption, blocks=True)


def _noise(results: Data, key: str) -> str:
    noise, form = noise_of(results, key), figure_of(key).unit.form
    if noise is None:
        return ""
    if isinstance(noise, NoiseFloor):
        return f"{number(noise.mean, form)} [below {number(noise.upper, form)}]"
    return number(noise.estimate, form)


def _needs_table(results: Data) -> Group | None:
    """What other methods need and cost."""
    rows = needs(results)
    if not rows:
        return None
    table = new_table(f"Other methods: guidance {results['guidance']:g}")
    table.add_column("")
    for heading in rows[0]["cells"]:
        is_text = heading == "needs"
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis")
    for row in rows:
        table.add_row(printable(row["name"]), *row["cells"].values())
    caption = "Passes: samples through the denoiser. Drawing time: relative to the untreated model."
    return captioned(table, caption, blocks=True)


def _prompt_tables(results: Data) -> list[Group]:
    """Shares by prompt before and after, one table for each group."""
    names = [UNTREATED, *(results["masks"] or [BALANCED])]
    noise, fixed = results["noise_floor_one_prompt"], results.get("corrected_shares")
    tables = []
    for group in shown_groups(results):
        table = new_table(f"Share of {group} by prompt: guidance {results['guidance']:g}")
        table.add_column("prompt")
        for name in names:
            table.add_column(printable(name), justify="right")
            table.add_column("corrected" if fixed else "gap", justify="right")
        for p, label in enumerate(prompt_labels(results)):
            cells: list[RenderableType] = [label]
            for name in names:
                row = results["arms"][name]["prompts"][p]
                gap = spelt(as_value(fixed[name][p][group])) if fixed else number(row["parity_gap"])
                large = row["parity_gap"] > noise["upper"]
                cells += [spelt(as_value(row["shares"][group])), Text(gap, "bold") if large else gap]
            table.add_row(*cells)
        caption = f"Bold: the gap is above {number(noise['upper'])}, larger than sampling noise explains."
        tables.append(captioned(table, caption + " Corrected: without the reader's error." * bool(fixed), blocks=True))
    return tables
