"""The cost of parity by treatment, for each map, and the treatments that no other beats on both.

    python benchmarks/mitigation/fronts.py results/map-*.json --figure docs/fronts.png

Each file is one that `map.py` wrote and gives a column of the figure. The rows are two costs: the shift within groups,
and group prompts that are no longer followed. The line is the Pareto front of the masks.
The table names the masks on each front.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pareto import CEILINGS, collect, cost_grid, legend, parser, values
from rich.console import Console
from rich.table import Table

COSTS = {
    "shift within groups": lambda arms: values(arms, "frechet_within_groups_ratio")[0],
    "group prompts not followed": lambda arms: 1 - values(arms, "obeyed")[0],
}
#: Part of a mask's name -> its name in the legend.
KINDS = {"allocated": "allocating, and parts of it", "top": "balancing, top k", "": "balancing, planned"}
MARKS = dict(zip(KINDS.values(), (("o", "C1"), ("D", "C2"), ("s", "C0")), strict=True))


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names whose (gap, cost) no other point is as low as on both and lower on one, by rising gap."""

    def beaten(name: str) -> bool:
        gap, cost = points[name]
        return any(
            x <= gap and y <= cost and (x, y) != (gap, cost) for other, (x, y) in points.items() if other != name
        )

    return sorted((name for name in points if not beaten(name)), key=lambda name: (points[name], name))


def prices(path: Path) -> tuple[dict[str, dict[str, tuple[float, float]]], set[str], float]:
    """Cost -> arm -> (gap, cost), which arms are masks, and the gap that a fair model stays below."""
    found, masks, about = collect([path])
    if len(found) != 1:
        raise SystemExit(f"{path} is of {len(found)} guidance scales: a map is of one")
    (arms,) = found.values()
    points = {
        label: {
            name: (values(each, "parity_gap")[0], cost(each)) for name, each in arms.items() if not np.isnan(cost(each))
        }
        for label, cost in COSTS.items()
    }
    return points, set(masks), about["noise_floor"]["upper"]


def figure(paths: list[Path]) -> Figure:
    maps = [prices(path) for path in paths]
    titles = [path.stem.removeprefix("map-") for path in paths]
    drawing, panels = cost_grid(titles, list(COSTS), [floor for _, _, floor in maps], [1, 2, 4])
    for column, (points, masks, _) in zip(panels.T, maps, strict=True):
        for panel, arms in zip(column, points.values(), strict=True):
            for name, (gap, cost) in arms.items():
                if name in masks:
                    shown = next(shown for part, shown in KINDS.items() if part in name)
                    marker, color = MARKS[shown]
                    panel.plot(gap, cost, marker, color=color, ms=4, label=shown)
                elif name in CEILINGS:
                    panel.plot(gap, cost, CEILINGS[name], color="0.3", label=name)
            best = [arms[name] for name in front({name: arms[name] for name in masks})]
            panel.plot(*zip(*best, strict=True), color="0.6", linewidth=0.8, zorder=0, drawstyle="steps-post")
    legend(drawing, panels[0], 4)
    return drawing


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("maps", type=Path, nargs="+")
    arguments.add_argument("--figure", type=Path)
    options = arguments.parse_args()
    table = Table("map", *COSTS, title="Masks that no other beats on gap and cost (gap; cost)")
    for path in options.maps:
        points, masks, _ = prices(path)
        told = []
        for each in points.values():
            best = front({name: each[name] for name in masks})
            told.append("\n".join(f"{name} ({each[name][0]:.2f}; {each[name][1]:.2f})" for name in best))
        table.add_row(path.stem.removeprefix("map-"), *told, end_section=True)
    Console(width=150).print(table)
    if options.figure:
        figure(options.maps).savefig(options.figure, dpi=130)


if __name__ == "__main__":
    main()
