"""`stereo inspect`: what a mask or relevance file holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@common.guarded
def inspect(
    file: Annotated[Path, typer.Argument(help="A mask or relevance file, .pt or .safetensors.", show_default=False)],
    picture: Annotated[
        Path | None, typer.Option(help="Also draw sites by timestep to this PNG.", show_default=False)
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """Say what a file holds: how much is damped, or where relevance sits, by kind of layer, site and timestep."""
    from stereoclinic.errors import InputError
    from stereoclinic.files import kind_of, write_whole

    if picture is not None:
        common.check_target(picture, "--picture", (".png",))
    kind = kind_of(file)
    if kind == "mask":
        from stereoclinic.evaluation.summary import mask_summary
        from stereoclinic.sns.mask import NeuronMask

        summary, of = mask_summary(NeuronMask.load(file)), "damping"
    elif kind == "relevance":
        from stereoclinic.ddtd.relevance import Relevance
        from stereoclinic.evaluation.summary import lean_summary, relevance_summary

        relevance = Relevance.load(file)
        summary, of = relevance_summary(relevance), "share"
        leans = lean_summary(relevance)
    else:
        raise InputError(f"{file} is a {kind} file; expected a mask or relevance")
    if picture is not None:
        figure = draw_sites(summary, of, file.name)
        write_whole(picture, lambda path: figure.savefig(path, format="png", dpi=150))

    if as_json:
        common.print_json({"file": str(file), "kind": kind, **summary, **({"lean": leans} if of == "share" else {})})
        return
    from stereo_cli import tables

    console = common.stdout()
    if of == "damping":
        console.print(tables.mask_table(summary))
    else:
        console.print(tables.lean_table(leans))
        console.print(tables.relevance_table(summary))
        console.print(tables.neurons_table(summary))
    console.print(tables.sites_table(summary, of))
    console.print(tables.metadata_table(summary["metadata"]))
    if picture is not None:
        common.say(f"wrote {picture}")


def draw_sites(summary: dict[str, Any], of: str, title: str) -> "Figure":
    """A heat map: sites, in the order that data meets them, by timestep bin, noise at the left."""
    import numpy as np
    from matplotlib.figure import Figure

    from stereo_cli.tables import short_site

    # Modules list the middle block last; the data meets it between the way down and the way up.
    order = {"down": 0, "mid": 1, "up": 2}
    sites = sorted(summary["sites"], key=lambda site: order.get(site["name"].split("_")[0], 1))
    bins = summary["bins"]
    neurons = np.array([[site["neurons"]] for site in sites])
    values = np.array([[np.nan if each is None else each for each in site["bins"]] for site in sites], dtype=float)
    # A wide layer has more to damp: what compares is the part of it. Relevance already comes as shares.
    values = 100 * (values / neurons if of == "damping" else values)
    what = "neurons damped away (%)" if of == "damping" else "share of |relevance| (%)"

    figure = Figure(figsize=(4.6 + 0.75 * len(bins), 1.9 + 0.27 * len(sites)), layout="constrained")
    axes = figure.add_subplot()
    top = max(float(np.nanmax(values)), 1e-9)
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top)
    axes.set_yticks(range(len(sites)), [short_site(site["name"]) for site in sites], fontsize=8)
    axes.set_xticks(range(len(bins)), [f"{row['from']:.0f}-{row['to']:.0f}" for row in bins], fontsize=8)
    axes.set_xlabel("timestep (noise at the left)")
    axes.set_title(f"{title}: {what}", fontsize=10, loc="left")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if value < top / 2 else "black"
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=40).ax.tick_params(labelsize=8)
    return figure
