"""Compare treatments with each other and with the oracles, from results of `stereo bench`: a table and a figure.

    for seed in 5000 6000 7000; do
        stereo bench --mask a.pt --mask b.pt --guidance 1 --guidance 2 --all-arms --seed $seed -o judged-$seed
    done
    python benchmarks/mitigation/pareto.py judged-*/results.json --figure docs/pareto.png

The figures of docs/results/map.md are in `results`, one file for each results.json, without the figures by
prompt (`--condense FOLDER` writes such files). Every file is one seed set. Values are means over seed sets, ± half of
their 95 % t interval; with one seed set, the interval of the bench. The figure shows the parity gap against the shift
within groups, and against group prompts that are followed.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interval, legend, parser, ticks

CEILINGS = {"balanced oracle": "^", "allocation oracle": "*", "untreated": "X", "random": "."}
#: File of a mask, as the docs make it -> what it is.
MASKS = {"gender": "balancing mask", "gender-allocated": "allocating mask"}
Sets = dict[float, dict[str, list[dict]]]


def collect(paths: list[Path]) -> tuple[Sets, list[str], dict]:
    """Guidance -> arm -> its figures in each seed set; the masks' names; what is common."""
    found: Sets = defaultdict(lambda: defaultdict(list))
    masks: list[str] = []
    about: dict = {}
    for path in paths:
        for each in json.loads(path.read_text())["experiments"]:
            masks += [name for name in each["masks"] if name not in masks]
            floor = {"noise_floor": each["noise_floor"]["parity_gap"]}
            before, about = about, {name: each[name] for name in ("axis", "images_per_prompt", "steps")} | floor
            if before and before != about:
                raise SystemExit(f"{path} is of another axis, number of images or steps than those before it")
            for name, arm in each["arms"].items():
                grouped = each["group_prompts"].get(name)
                obeyed = grouped["all"] if grouped else np.nan
                found[each["guidance"]][name].append({**arm, "obeyed": obeyed})
    return found, masks, about


def condensed(data: dict) -> dict:
    """The figures of the arms, and where they come from; without those by prompt, from soft reads and pooled."""
    left_out = {"prompts", "soft", "pooled", "pooled_soft"}
    said = {"unet_weights", "versions", "created", "reader", "prompts", "device", "strength"}
    experiments = []
    for each in data["experiments"]:
        kept = {name: value for name, value in each.items() if name not in ("intersections", "unrelated")}
        arms = {
            name: {key: value for key, value in arm.items() if key not in left_out}
            for name, arm in each["arms"].items()
        }
        grouped = {name: {"all": found["all"]} for name, found in each["group_prompts"].items()}
        joint = {
            axes: {
                "noise_floor": found["noise_floor"]["parity_gap"],
                "arms": {name: arm["parity_gap"] for name, arm in found["arms"].items()},
            }
            for axes, found in each.get("intersections", {}).items()
        }
        experiments.append({**kept, "arms": arms, "group_prompts": grouped, "joint_parity_gap": joint})
    known = data.get("provenance", {})
    provenance = {name: value for name, value in known.items() if name in said}
    if "model" in known:
        provenance = {"model": Path(known["model"]).name, **provenance}
    return {"provenance": provenance, "experiments": experiments}


def values(arms: list[dict], what: str) -> list[float]:
    each = [arm.get(what, np.nan) for arm in arms]
    return [one["estimate"] if isinstance(one, dict) else np.nan if one is None else one for one in each]


def said(arms: list[dict], what: str, digits: int = 3) -> str:
    each = [value for value in values(arms, what) if not np.isnan(value)]
    if not each:
        return ""
    if len(arms) == 1 and isinstance(arms[0].get(what), dict):
        low, high = arms[0][what]["low"], arms[0][what]["high"]
        return f"{each[0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    mean, half = interval(each)
    return f"{mean:.{digits}f}" + ("" if np.isnan(half) else f" ±{half:.{digits}f}")


def bar(arms: list[dict], what: str) -> tuple[float, list[list[float]] | None]:
    """A point, and how far its error bar reaches below and above it; None where nothing is known of that."""
    mean, half = interval(values(arms, what))
    if len(arms) == 1 and isinstance(arms[0].get(what), dict):
        return mean, [[max(0.0, mean - arms[0][what]["low"])], [max(0.0, arms[0][what]["high"] - mean)]]
    return mean, None if np.isnan(half) else [[half], [half]]


def drift(arms: list[dict]) -> str:
    if not arms[0].get("drift"):
        return ""
    return " / ".join(f"{np.mean([arm['drift'][axis] for arm in arms]):.2f}" for axis in arms[0]["drift"])


def tables(found: Sets, about: dict) -> list[Table]:
    made = []
    for guidance, arms in found.items():
        floor = about["noise_floor"]
        table = Table(
            "", "parity gap", "change", "of oracle", "occupation right", "unsure", "group prompts followed",
            "allocation followed", "Frechet", "shift within groups", "drift",
            title=f"{about['axis']}, guidance {guidance:g}, {about['steps']} steps, {len(arms['untreated'])} seed"
            f" set(s) of {about['images_per_prompt']} images a prompt; a fair model: {floor['mean']:.3f}, below"
            f" {floor['upper']:.3f}",
        )  # fmt: skip
        for name, each in arms.items():
            table.add_row(
                name,
                said(each, "parity_gap"),
                said(each, "parity_gap_change"),
                said(each, "share_of_balanced_oracle", 2),
                said(each, "occupation_right"),
                said(each, "unsure"),
                said(each, "obeyed"),
                said(each, "allotment_obeyed"),
                said(each, "frechet_to_other_seeds", 2),
                said(each, "frechet_within_groups_ratio", 2),
                drift(each),
            )
        made.append(table)
    return made


def cost_grid(
    titles: list[str], costs: list[str], floors: list[float], marked: list[float]
) -> tuple[Figure, np.ndarray]:
    """A figure with a column for each title and a row for each cost over the parity gap, and its panels.

    Args:
        titles: Of the columns.
        costs: Of the rows; the first has a logarithmic axis.
        floors: The gap that a fair model stays below, for each column.
        marked: Ticks of the logarithmic axis.
    """
    drawing = Figure(figsize=(3.4 * len(titles), 6.2), layout="constrained")
    panels = drawing.subplots(len(costs), len(titles), squeeze=False, sharex=True, sharey="row")
    for column, title, floor in zip(panels.T, titles, floors, strict=True):
        column[0].set(title=title, yscale="log")
        ticks(column[0], marked, across=False)
        column[-1].set_xlabel("parity gap")
        for panel in column:
            panel.axvline(floor, color="0.85", linewidth=0.8, zorder=0)
    for panel, cost in zip(panels[:, 0], costs, strict=True):
        panel.set_ylabel(cost)
    return drawing, panels


def figure(found: Sets, masks: list[str], about: dict) -> Figure:
    floor = about["noise_floor"]["upper"]
    costs = {"shift within groups": "frechet_within_groups_ratio", "group prompts followed": "obeyed"}
    titles = [f"guidance {guidance:g}" for guidance in found]
    drawing, panels = cost_grid(titles, list(costs), [floor] * len(found), [1, 2, 4, 8, 16])
    colors = {name: f"C{i}" for i, name in enumerate(masks)}
    for column, arms in zip(panels.T, found.values(), strict=True):
        for panel, what in zip(column, costs.values(), strict=True):
            for name, arm in arms.items():
                if name == "other seeds" or np.isnan(values(arm, what)).all():
                    continue
                x, dx = bar(arm, "parity_gap")
                y, dy = bar(arm, what)
                marker, color = CEILINGS.get(name, "o"), colors.get(name, "0.3")
                shown = MASKS.get(name, f"{name} mask" if name == "random" else name)
                panel.errorbar(x, y, xerr=dx, yerr=dy, fmt=marker, color=color, label=shown, capsize=2)
    legend(drawing, panels[0], 5)
    return drawing


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("results", type=Path, nargs="+")
    arguments.add_argument("--figure", type=Path)
    arguments.add_argument("--condense", type=Path, help="folder for what this needs of each results.json")
    options = arguments.parse_args()
    if options.condense:
        options.condense.mkdir(parents=True, exist_ok=True)
        for path in options.results:
            text = json.dumps(condensed(json.loads(path.read_text())), indent=1)
            (options.condense / f"{path.parent.name}.json").write_text(text + "\n")
        return
    found, masks, about = collect(options.results)
    console = Console(width=220)
    for table in tables(found, about):
        console.print(table)
    if options.figure:
        figure(found, masks, about).savefig(options.figure, dpi=130)


if __name__ == "__main__":
    main()
