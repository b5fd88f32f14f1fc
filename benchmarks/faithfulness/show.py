"""The faithfulness results as tables and one figure.

    python benchmarks/faithfulness/show.py portraits.json harbour.json --figure docs/faithfulness.png

Figures are means over the repetitions, +- half the 95 % t interval; differences are paired within a repetition.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import as_text, interval, legend, parser, ticks

REFERENCE = "epsilon-cp"
DRAWN = {
    "epsilon-cp": "C0",
    "epsilon-cp rooted": "C9",
    "epsilon-attnlrp": "C4",
    "zplus-cp": "C6",
    "gradient": "C1",
    "integrated gradients": "C2",
    "CAD": "C5",
    "|difference|": "C3",
    "random": "0.6",
}


def abpc(repetition: dict, name: str) -> float:
    """Area between the curves of least and most relevant first, over log share, in units of the untreated tilt."""
    curve = repetition["rankings"][name]
    gaps = [least["tilt"] - most["tilt"] for least, most in zip(curve["least"], curve["most"], strict=True)]
    shares = np.log([each["share"] for each in curve["most"]])
    return float(np.trapezoid(gaps, shares) / (shares[-1] - shares[0]) / repetition["untreated"]["tilt"])


def at(repetition: dict, name: str, share: float, what: str) -> float:
    """A figure of the deletion curve, most relevant first, at one share of the neurons."""
    return next(each[what] for each in repetition["rankings"][name]["most"] if each["share"] == share)


def rankings(found: dict) -> Table:
    sets, once = found["sets"], found.get("once", {})
    untreated = as_text([each["untreated"]["lean"] for each in sets])
    alone = once.get("single neurons", {})
    kinds, singles = list(alone.get("neurons", {})), alone.get("pearson", {})
    table = Table(
        "method", "ABPC", "tilt, 0.5 % out", "off axis", "inserted 4 %", *(f"r {kind}" for kind in kinds), "seeds",
        "prompts", "random w.",
        title=f"Rankings: {found['settings']['model']}, {len(sets)} repetitions; untreated |lean| {untreated}",
    )  # fmt: skip
    for name in sorted(sets[0]["rankings"], key=lambda name: -np.mean([abpc(each, name) for each in sets])):
        single = singles.get(name, {})
        stable = found.get("stability", {}).get(name, {}).get("spearman")
        halves, wrong = once.get("halves of the prompts", {}).get(name), once.get("random weights", {}).get("all", {})
        table.add_row(
            name,
            as_text([abpc(each, name) for each in sets]),
            as_text([at(each, name, 0.005, "tilt") / each["untreated"]["tilt"] for each in sets]),
            as_text([at(each, name, 0.005, "off_axis") for each in sets]),
            as_text([each["rankings"][name]["inserted"][1]["tilt"] / each["untreated"]["tilt"] for each in sets]),
            *(f"{single[kind]:.2f}" if kind in single else "" for kind in kinds),
            *(f"{each:.2f}" if each is not None else "" for each in (stable, halves, wrong.get(name))),
        )
    return table


def plans(found: dict) -> Table:
    sets = found["sets"]
    prices = [each["mu"] for each in next(iter(sets[0]["plans"].values()))]
    heads = [f"{what}, mu {mu:g}" for mu in prices for what in ("|lean|", "off axis")]
    table = Table("rows of", *heads, "parity gap", f"minus {REFERENCE}", "Frechet", "right", "unsure",
                  title=f"Treatment plans: {found['settings']['model']}")  # fmt: skip

    def gap(name: str) -> list[float]:
        return [each["images"].get(f"plan: {name}", {}).get("parity_gap", np.nan) for each in sets]

    for name in sets[0]["plans"]:
        cells = []
        for i in range(len(prices)):
            cells += [as_text([each["plans"][name][i][what] for each in sets]) for what in ("lean", "off_axis")]
        images = [each["images"].get(f"plan: {name}", {}) for each in sets]
        cells.append(as_text(gap(name), 3))
        cells.append("" if name == REFERENCE else as_text(np.subtract(gap(name), gap(REFERENCE)), 3, sign=True))
        cells += [as_text([e.get(k, np.nan) for e in images]) for k in ("frechet", "occupation_right", "unsure")]
        table.add_row(name, *cells)
    return table


def images(found: dict) -> Table:
    sets = found["sets"]
    each = found["settings"]["images"]
    table = Table("mask", "parity gap", "minus untreated", "minus the plan of its rows", "Frechet", "right", "unsure",
                  title=f"Images: {found['settings']['model']}, {each} a prompt and repetition")  # fmt: skip
    for name in sets[0]["images"]:
        rows = [repetition["images"][name] for repetition in sets]
        change = [r["images"][name]["parity_gap"] - r["images"]["untreated"]["parity_gap"] for r in sets]
        plan = "plan: " + name.partition(": ")[2]
        beside = [r["images"][plan]["parity_gap"] for r in sets if plan in r["images"] and plan != name]
        table.add_row(
            name, as_text([r["parity_gap"] for r in rows], 3), as_text(change, 3, sign=True),
            as_text(np.subtract([r["parity_gap"] for r in rows], beside), 3, sign=True) if beside else "",
            *(as_text([r[key] for r in rows]) for key in ("frechet", "occupation_right", "unsure")),
        )  # fmt: skip
    return table


def variants(found: dict) -> Table:
    table = Table("epsilon-cp plan, mu 1", "|lean|", "off axis", title=f"Bins and sites: {found['settings']['model']}")
    for name in found["sets"][0]["variants"]:
        rows = [repetition["variants"][name] for repetition in found["sets"]]
        table.add_row(name, *(as_text([r[key] for r in rows]) for key in ("lean", "off_axis")))
    return table


def figure(results: list[dict]) -> Figure:
    drawing = Figure(figsize=(12.5, 3.9 * len(results)), layout="constrained")
    panels = drawing.subplots(len(results), 3, squeeze=False)
    for (deletion, insertion, plan), found in zip(panels, results, strict=True):
        sets, model = found["sets"], Path(found["settings"]["model"]).name
        for name, color in DRAWN.items():
            if name not in sets[0]["rankings"]:
                continue
            curves = {
                side: np.array([[e["tilt"] / r["untreated"]["tilt"] for e in r["rankings"][name][side]] for r in sets])
                for side in ("most", "least", "inserted")
            }
            shares = [100 * e["share"] for e in sets[0]["rankings"][name]["most"]]
            line = "--" if name == "epsilon-attnlrp" else "-"  # all but the same as epsilon-cp
            deletion.plot(shares, curves["most"].mean(0), color=color, label=name, linestyle=line)
            deletion.plot(shares, curves["least"].mean(0), color=color, linestyle=":")
            shares = [100 * e["share"] for e in sets[0]["rankings"][name]["inserted"]]
            insertion.plot(shares, curves["inserted"].mean(0), line, color=color, marker="o", markersize=3)
            if name in sets[0]["plans"]:
                for i, _ in enumerate(sets[0]["plans"][name]):
                    x, dx = interval([r["plans"][name][i]["off_axis"] for r in sets])
                    y, dy = interval([r["plans"][name][i]["lean"] for r in sets])
                    plan.errorbar(x, y, xerr=dx, yerr=dy, color=color, marker="os"[i % 2], markersize=4, capsize=2)
        deletion.set(xscale="log", xlabel="neurons silenced (%)", ylabel="tilt left (1 = untreated)", ylim=(-3, 4.5))
        for panel, over in ((deletion, "most"), (insertion, "inserted")):
            shares = [100 * e["share"] for e in sets[0]["rankings"]["random"][over]]
            panel.set_xscale("log")
            ticks(panel, shares)
        deletion.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        deletion.set_title(f"{model}: most (solid) and least (dotted) relevant first", fontsize=9, loc="left")
        insertion.set(xlabel="neurons given back (%)", ylabel="tilt restored")
        insertion.set_title("insertion into the balanced point", fontsize=9, loc="left")
        plan.set(xscale="log", xlabel="movement off the axis (||d||)", ylabel="mean |lean|")
        ticks(plan, [0.5, 1, 2, 5, 10, 20])
        plan.set_title("treatment plans, held-out seeds: mu 0.1 (dots), 1 (squares)", fontsize=9, loc="left")
    legend(drawing, panels[0][:1])
    return drawing


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("results", type=Path, nargs="+")
    arguments.add_argument("--figure", type=Path)
    options = arguments.parse_args()
    results = [json.loads(path.read_text()) for path in options.results]
    console = Console(width=170)
    for found in results:
        for table in (rankings(found), plans(found), images(found), variants(found)):
            console.print(table)
    if options.figure:
        figure(results).savefig(options.figure, dpi=130)


if __name__ == "__main__":
    main()
