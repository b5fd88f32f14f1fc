"""What `stereo doctor` found, as tables that are readable at 100 columns."""

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stereo_cli.tables import captioned, new_table

Data = dict[str, Any]


def doctor_tables(data: Data) -> list[RenderableType]:
    """The model, its neurons, conservation cut by cut, and what it costs here."""
    return [_model(data["model"]), _neurons(data["neurons"]), *_conservation(data), _here(data)]


def _model(model: Data) -> Group:
    table = _table(f"Model {model['name']}", "", "", header=False)
    channels, height, width = model["latents"]
    steps = f"{model['steps']} steps, guidance {model['guidance']:g}"
    kind = "draws at every step, seeded" if model["draws"] else "deterministic"
    for name, value in (
        ("family", model["family"]),
        ("lies in", model["folder"] or model["name"]),
        ("denoiser", f"{model['unet']}, {model['parameters']:,} parameters, {model['dtype']}"),
        ("latents", f"{channels} x {height} x {width}"),
        ("scheduler", f"{model['scheduler']}, predicts {model['prediction']}, {kind}; {steps}"),
    ):
        table.add_row(name, escape(value))
    return captioned(table)


def _neurons(neurons: Data) -> Group:
    table = _table("Neurons that can be watched and damped", "kind", "sites", "neurons")
    for kind, row in neurons["kinds"].items():
        table.add_row(kind, f"{row['sites']:,}", f"{row['neurons']:,}")
    table.add_section()
    table.add_row("all", f"{neurons['sites']:,}", f"{neurons['neurons']:,}")
    return captioned(table)


def _conservation(data: Data) -> list[RenderableType]:
    found, uncovered = data["conservation"], data["uncovered"]
    lines = (
        "\n".join(f"{each}: {times} times" for each, times in uncovered.items())
        or "none: every operation that mixes its inputs has a rule"
    )
    parts: list[RenderableType] = [
        Group(
            Text(f"Operations that {found['composite']} does not cover", style="bold"),
            Padding(Text(lines), (0, 0, 1, 0)),
        )
    ]
    if found["fault"]:
        parts.append(Padding(Text(f"fault: {found['fault']}", style="bold"), (0, 0, 1, 0)))
    if not found["cuts"]:
        return parts
    title = f"Conservation under {found['composite']}"
    table = _table(title, "cut before", "hidden", "skips", "time", "text", "bias", "sum", "error")
    for cut in found["cuts"]:
        shares = (_share(cut[each]) for each in ("hidden", "skips", "time", "text", "bias", "sum"))
        table.add_row(cut["before"], *shares, "-" if cut["error"] is None else f"{cut['error']:.0e}")
    caption = (
        f"Shares of the relevance that crosses each cut (hidden state, skip connections) or enters behind it, in % of"
        f" the target; {found['samples']} sample(s), timestep {found['timestep']:g}, {found['dtype']}."
        + " Time holds the added conditions (pooled text, sizes) too." * bool(data["model"]["added"])
        + " Bias holds all that layers with a rule of their own absorb." * found["absorbs"]
        + f" {found['meaning'][0].upper()}{found['meaning'][1:]}."
    )
    return [*parts, captioned(table, caption)]


def _here(data: Data) -> Group:
    memory, table = data["memory"], _table("Here", "", "", header=False)
    for device in data["devices"]:
        size = "" if device["memory"] is None else f", {_bytes(device['memory'])}"
        table.add_row(device["name"], escape(f"{device['what']}{size}") + (" (used here)" if device["used"] else ""))
    table.add_row("weights", f"{_bytes(memory['unet_weights'])} of the UNet, in {data['model']['dtype']}")
    table.add_row(
        "relevance",
        f"keeps {_bytes(memory['kept_by_a_sample'])} a sample; {_bytes(memory['batch_total'])} with the weights for"
        f" {memory['batch']} samples at a time",
    )
    return captioned(table, "Measured; what a device's own kernels need beside it is not in it.")


def _table(title: str, *columns: str, header: bool = True) -> Table:
    table = new_table(title)
    table.show_header = header
    for i, name in enumerate(columns):
        left = i == 0 or not header
        table.add_column(name, justify="left" if left else "right", no_wrap=i == 0, overflow="fold")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.1f} GiB"
