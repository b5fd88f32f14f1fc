"""What `stereo doctor` found, as tables that are readable at 100 columns."""

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stereo_cli.price import size, words
from stereo_cli.tables import captioned, new_table, styled
from stereoclinic.calls.settings import call_texts
from stereoclinic.io.text import printable

Data = dict[str, Any]


def doctor_tables(data: Data) -> list[RenderableType]:
    """The model, its neurons, conservation cut by cut, memory and time here, and how faithful each composite is."""
    parts = [_model(data["model"]), _neurons(data["neurons"]), *_conservation(data), _here(data), _time(data["time"])]
    return parts if data["faithfulness"] is None else [*parts, _faithfulness(data["faithfulness"])]


def _model(model: Data) -> Group:
    table = _table(f"Model {model['name']}", "", "", header=False)
    steps = f"{model['steps']} steps, guidance {model['guidance']:g}"
    kind = "draws at every step, seeded" if model["draws"] else "deterministic"
    for name, value in (
        ("pipeline", model["family"]),
        ("lies in", model["folder"] or model["name"]),
        ("call options", " ".join(call_texts(model["call"])) or "none"),
        ("denoiser", f"{model['unet']}, {model['parameters']:,} parameters, {model['dtype']}"),
        ("latents", " x ".join(map(str, model["latents"]))),
        ("calls a step", _calls(model["calls"])),
        ("conditions", ", ".join(model["conditions"])),
        ("scheduler", f"{model['scheduler']}, predicts {model['prediction']}, {kind}; {steps}"),
        ("timesteps", _timesteps(model)),
    ):
        table.add_row(name, value)
    return captioned(table, "Conditions: the denoiser's arguments that depend on the prompt, found by comparing calls.")


def _calls(calls: list[list[bool]]) -> str:
    """How often the denoiser is called a step, and which rows of each call see the prompt."""
    said = [" then ".join("with prompt" if sees else "without" for sees in blocks) for blocks in calls]
    return f"{len(calls)}, rows: {'; '.join(said)}"


def _timesteps(model: Data) -> str:
    """The scheduler's first and last timestep, and what the denoiser gets as its timestep there."""
    timesteps, told = model["timesteps"], model["told"]
    ends = f"{timesteps[0]:g} to {timesteps[-1]:g}"
    if not told:
        return f"{ends}; the denoiser gets none"
    return f"{ends}; the denoiser gets {told[0]:g} to {told[-1]:g}"


def _neurons(neurons: Data) -> Group:
    table = _table("Neurons that can be watched and damped", "kind", "stream", "sites", "neurons")
    for row in neurons["streams"]:
        table.add_row(row["kind"], row["stream"], f"{row['sites']:,}", f"{row['neurons']:,}")
    table.add_section()
    table.add_row("all", "", f"{neurons['sites']:,}", f"{neurons['neurons']:,}")
    return captioned(table)


def _conservation(data: Data) -> list[RenderableType]:
    found, uncovered = data["conservation"], data["uncovered"]
    lines = (
        "\n".join(printable(f"{each}: {times} times") for each, times in uncovered.items())
        or "none: every operation that mixes its inputs has a rule"
    )
    parts: list[RenderableType] = [
        Group(
            styled(f"Operations that {found['composite']} does not cover", "bold"),
            Padding(Text(lines), (0, 0, 1, 0)),
        )
    ]
    if found["fault"]:
        parts.append(Padding(styled(f"fault: {found['fault']}", "bold"), (0, 0, 1, 0)))
    if not found["cuts"]:
        return parts
    title = f"Conservation under {found['composite']}"
    items = [name for name in found["cuts"][0] if name not in ("before", "error")]
    table = _table(title, "cut before", *(name.replace("_", " ") for name in items), "error")
    for cut in found["cuts"]:
        shares = (_share(cut[each]) for each in items)
        table.add_row(cut["before"], *shares, "-" if cut["error"] is None else f"{cut['error']:.0e}")
    caption = (
        f"Shares of the relevance that crosses each cut, or enters behind it, in % of the target;"
        f" {found['samples']} sample(s), timestep {found['timestep']:g}, {found['dtype']}."
        + " Time holds the added conditions (pooled text, sizes) too." * bool(data["model"]["added"])
        + " Modulation holds time, guidance and pooled text." * ("modulation" in items)
        + " Bias holds all that layers with a rule of their own absorb." * found["absorbs"]
        + f" {found['meaning'][0].upper()}{found['meaning'][1:]}."
    )
    return [*parts, captioned(table, caption, keep=[-1])]


def _here(data: Data) -> Group:
    memory, table = data["memory"], _table("Here", "", "", header=False)
    for device in data["devices"]:
        memory_of = "" if device["memory"] is None else f", {size(device['memory'])}"
        table.add_row(device["name"], f"{device['what']}{memory_of}" + (" (used here)" if device["used"] else ""))
    table.add_row("weights", f"{size(memory['unet_weights'])} of the denoiser, in {data['model']['dtype']}")
    table.add_row(
        "relevance",
        f"keeps {size(memory['kept_by_a_sample'])} a sample; {size(memory['batch_total'])} with the weights for"
        f" {memory['batch']} samples at a time",
    )
    return captioned(table, "Measured; what a device's own kernels need besides is not included.")


def _time(time: Data) -> Group:
    table = _table("Estimated time", "", "", header=False)
    if time["why"]:
        table.add_row("not measured", time["why"])
        return captioned(table)
    table.add_row("forward pass", f"{time['speed']['forward']:.3g} s for one sample")
    table.add_row("backward pass", f"{time['speed']['backward']:.3g} s for one sample")
    for name, offer in time["commands"].items():
        table.add_row(f"stereo {name}", words(offer))
    return captioned(
        table,
        "A few passes were timed and the others counted, without start-up, decoding and reading."
        f" Assumes {time['assumes']}.",
    )


def _faithfulness(found: Data) -> Group:
    from stereoclinic.evaluation.compare import NOT_SIGNIFICANT, is_significant
    from stereoclinic.evaluation.figures.values import as_value
    from stereoclinic.evaluation.wording import number, spelt

    title = f"Faithfulness for {found['axis']}: correlation of forecast and true change of the lean"
    table = _table(title, "composite", "correlation", "minus the best", *(f"{size:,}" for size in found["sizes"]))
    for row in found["ranking"]:
        change = as_value(row["difference"])
        behind = "" if change is None else spelt(change, "+.2f") if is_significant(change) else NOT_SIGNIFICANT
        table.add_row(
            printable(row["composite"]), spelt(as_value(row["correlation"])), behind, *map(number, row["by_size"])
        )
    steps = ", ".join(f"{timestep:.0f}" for timestep in found["timesteps"])
    refused = "".join(f" Not measured: {name} ({why})." for name, why in found["refused"].items())
    caption = (
        f"1 is perfect, 0 is chance. {found['groups']} random groups of each size were silenced, for each of"
        f" {found['samples']} samples at timesteps {steps}. Columns of numbers: the correlation by neurons in a group,"
        f" of {found['neurons']:,}. Intervals are over prompts."
    )
    return captioned(table, caption + refused, blocks=True)


def _table(title: str, *columns: str, header: bool = True) -> Table:
    table = new_table(title)
    table.show_header = header
    for i, name in enumerate(columns):
        left = i == 0 or not header or name == "stream"
        table.add_column(name, justify="left" if left else "right", overflow="ellipsis" if header else "fold")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
