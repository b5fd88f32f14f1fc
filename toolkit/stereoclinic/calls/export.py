"""`stereo export`: a mask as a file that other programs read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stereoclinic.calls.settings import WeightSettings, option
from stereoclinic.calls.work import Reporter, claimed

if TYPE_CHECKING:
    from stereoclinic.sns.mask import NeuronMask


class ExportSettings(WeightSettings):
    """What is written, and how."""

    format: str = option(
        "lora", "What to write: lora, diff (full differences), ia3 or checkpoint.",
        metavar="NAME",
    )  # fmt: skip
    strength: float = option(1.0, "Strength of the damping, from 0 (none) to 1.", metavar="X")
    rank: int | None = option(None, "Truncate a LoRA to this rank, and say the loss.", ge=1, default_text="exact")
    group: str | None = option(None, "Group of an allocating mask to export.", advanced=True, metavar="NAME")
    static: bool = option(False, "Export the nearest mask that treats all images and timesteps alike.")
    force: bool = option(False, "Accept masks made for other weights if all layers fit.", advanced=True)


@dataclass(frozen=True)
class ExportJob:
    """A file to write, checked and not yet begun."""

    mask: "NeuronMask"
    model: str
    settings: ExportSettings
    out: Path
    notes: list[str]  # what --static changed, and what that loses

    @property
    def description(self) -> str:
        strength = f"at strength {self.settings.strength:g}"
        return f"write {self.out}, a {self.settings.format} file of the mask {strength} for {self.model}"

    def run(self, reporter: Reporter) -> dict[str, Any]:
        """Write it; returns what was written as plain data."""
        from stereoclinic.pipelines import model_folder, open_pipeline
        from stereoclinic.sns.export import export
        from stereoclinic.sns.fuse import fuse, save_fused

        settings = self.settings
        with claimed(reporter, self.out):
            pipe = open_pipeline(self.model, "cpu", settings.dtype, settings.variant, reporter.note)
            if settings.format != "checkpoint":
                how: Any = settings.format, settings.strength, settings.rank, settings.force
                return {**asdict(export(pipe, self.mask, self.out, *how)), "path": str(self.out)}
            fuse(pipe, self.mask, settings.strength, settings.force)
            folder = model_folder(self.model)
            # What this package knows of the model is copied too: its defaults, and its reader.
            known = [] if folder is None else [folder / name for name in ("stereoclinic.json", "reader")]
            save_fused(pipe, self.out, beside=[path for path in known if path.exists()])
            return {"path": str(self.out), "readers": "diffusers"}


def mask_of(files: Sequence[Path], settings: ExportSettings) -> "NeuronMask":
    """One mask of all files, or of the group that is asked for.

    Raises:
        InputError: A file is no mask or is given twice, the masks do not go together, or have no such group.
    """
    from stereoclinic.calls.inputs import check_distinct
    from stereoclinic.sns.compose import compose
    from stereoclinic.sns.mask import NeuronMask

    check_distinct(list(files))
    loaded = [NeuronMask.load(path) for path in files]
    mask = loaded[0] if len(loaded) == 1 else compose(loaded, force=settings.force)
    return mask if settings.group is None else mask.group(settings.group)


def prepare_export(mask: "NeuronMask", file: Path, model: str, settings: ExportSettings, out: Path) -> ExportJob:
    """Check that a mask can leave this package.

    Args:
        mask: As of `mask_of`.
        file: Where it was; with --static the relevance next to it is looked at.
        model: `portraits`, a diffusers folder, a checkpoint or a hub id.
        settings: How.
        out: The file; for ia3 and checkpoint a new folder.

    Raises:
        InputError: The mask cannot be exported as it is, or a setting is out of range.
    """
    from stereoclinic.sns.export import check_exportable
    from stereoclinic.sns.linear import static_mask
    from stereoclinic.sns.mask import check_strength

    check_strength(settings.strength)
    static = static_mask(mask) if settings.static else mask
    check_exportable(static, out, settings.format, settings.rank)
    return ExportJob(static, model, settings, out, _changed(mask, static, file) if settings.static else [])


def _changed(given: "NeuronMask", static: "NeuronMask", file: Path) -> list[str]:
    """What a static mask does that the given one does not, and its leans as the relevance next to it predicts them."""
    from stereoclinic.calls.inputs import relevance_near
    from stereoclinic.sns.linear import forecast

    acting = (given.factors < 1).any(-1).reshape(-1, len(given.bin_edges) - 1).any(0).nonzero().flatten()
    lines = []
    if given.allocates:
        lines.append(f"every image gets the mean damping of {', '.join(given.groups)}")
    if given.branch != "both":
        lines.append("the half of guidance without the prompt is damped too")
    if len(acting):
        high, low = given.bin_edges[acting[0]].item(), given.bin_edges[acting[-1] + 1].item()
        within = (given.factors[..., acting, :] == given.factors[..., acting[:1], :]).all()
        every = "the damping" if within else "the mean damping"
        if not within or len(acting) < len(given.bin_edges) - 1 or low > 0:
            lines.append(f"every timestep gets {every} of timesteps {high:g} to {low:g}")
    if not lines:
        return ["--static changes nothing here"]
    notes = [f"--static: {'; '.join(lines)}"]
    near = relevance_near(file, given.metadata.get("words") or (), given.metadata)
    if near is None or near[1].sites != given.sites:
        return [*notes, "--static: what it does to leans is not known, as its relevance is not next to it; bench it"]
    after = forecast(near[1], static)
    before = [{}] * len(after) if given.allocates else forecast(near[1], given)
    for name, what in (("lean_after", "mean |lean|"), ("off_axis", "movement off the axis")):
        rows = {"untreated": [line["lean_before"] for line in after] if name == "lean_after" else []}
        rows |= {"the mask": [line.get(name) for line in before], "static": [line[name] for line in after]}
        shown = (
            f"{arm} {' '.join('-' if x is None else f'{x:.2f}' for x in values)}"
            for arm, values in rows.items()
            if any(x is not None for x in values)
        )
        bins = " ".join(f"{line['from']:g}-{line['to']:g}" for line in after)
        notes.append(f"--static: forecast of {what} at timesteps {bins}: {', '.join(shown)}")
    return notes
