"""`apply`: draw prompts without and with masks, from the same seeds."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from stereoclinic.calls.settings import DEVICES, DRAWN, MODEL, DeviceSettings, ModelSettings, group_shares, option
from stereoclinic.calls.work import Reporter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from stereoclinic.evaluation.methods.base import Suppressed
    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.sns.mask import NeuronMask


class ApplySettings(DeviceSettings, ModelSettings):
    """What is drawn, and how the masks are applied."""

    images: int = option(6, "Number of images per prompt, without and with the mask.", ge=1, flags=("--images", "-n"))
    seed: int = option(0, "First seed.", ge=0)
    strength: float = option(1.0, "Strength of the damping, from 0 (none) to 1.", ge=0, le=1)
    shares: Annotated[tuple[dict[str, float], ...], BeforeValidator(group_shares)] = option(
        (), "Target share of images for each group, such as female=0.5,male=0.5; for allocating masks, once per axis.",
        DRAWN, advanced=True, metavar="GROUP=SHARE,...", default_text="equal shares", texts=True,
    )  # fmt: skip
    allocate: bool = option(False, "Accept only allocating masks, as `stereo plan` makes them.", DRAWN, advanced=True)
    gate: bool = option(True, "Apply no mask to prompts that name a group.", flags=("--gate/--no-gate",))
    axis: tuple[str, ...] = option(
        (), "Axis whose group words --gate looks for, a name or a TOML file; may repeat.",
        DRAWN, advanced=True, metavar="NAME", default_text="the mask's",
    )  # fmt: skip
    guidance: float | None = option(None, "Guidance scale.", MODEL, ge=0, advanced=True, default_text="the model's own")
    force: bool = option(False, "Accept masks made for other weights if all layers fit.", MODEL, advanced=True)
    batch_size: int = option(50, "Number of images in a batch on each device.", DEVICES, ge=1, advanced=True)


def apply(
    prompts: Sequence[str],
    masks: Sequence[str | Path],
    model: "str | Model | DiffusionPipeline" = "portraits",
    settings: ApplySettings | None = None,
    *,
    out: str | Path = "stereo-apply",
    reporter: Reporter | None = None,
) -> list[dict[str, Any]] | None:
    """Draw prompts without and with masks, from the same seeds, and put them side by side.

    This is `stereo apply`. It writes the images and side_by_side.png.

    Args:
        prompts: What to draw.
        masks: Files of masks; several are applied together.
        model: `portraits`, a diffusers folder, a checkpoint, a hub id; or an open pipeline, which stays where it is.
        settings: Everything else; the defaults are those of the command.
        out: Folder of the images.
        reporter: Gets notes, warnings and progress.

    Returns:
        One entry for each image: file, arm, prompt, seed and what was done; None on every rank but the first.

    Raises:
        InputError: An argument is wrong or does not fit the model; the message says what to do.
        Incomplete: Images are missing at the end.
    """
    reporter = reporter or Reporter()
    return prepare_apply(prompts, masks, model, settings, out, reporter).run(reporter)


def prepare_apply(
    prompts: Sequence[str],
    masks: Sequence[str | Path],
    model: "str | Model | DiffusionPipeline",
    settings: ApplySettings | None,
    out: str | Path,
    reporter: Reporter,
) -> "ApplyJob":
    """Check everything that `apply` needs; arguments and errors as there."""
    from stereoclinic.calls import inputs
    from stereoclinic.errors import InputError
    from stereoclinic.evaluation.methods.base import Suppressed
    from stereoclinic.pipelines.conditions import cut_prompts
    from stereoclinic.pipelines.schedule import schedule_of
    from stereoclinic.prompts.axes import load_axis
    from stereoclinic.report import report
    from stereoclinic.runtime.devices import check_whole_model, device_of, place_of
    from stereoclinic.sns.compat import check_fits

    settings, out = settings or ApplySettings(), Path(out)
    check_whole_model(settings.strategy)
    texts = checked_texts(prompts)
    if not texts:
        raise InputError("a prompt is missing or empty; give a text such as 'a photo of a doctor'")
    names, loaded, mask = load_together(masks, settings)
    if settings.axis and not settings.gate:
        raise InputError("--axis has no effect with --no-gate; leave out one of them")
    axes = [load_axis(name) for name in settings.axis] or axes_of(mask)
    report.check_folder(out)
    device = device_of(settings.accelerator)
    opened = inputs.open_named(model, settings, reporter, place_of(device))
    check_fits(mask, opened.network, settings.force)
    steps = opened.defaults.steps
    guidance = opened.defaults.guidance if settings.guidance is None else settings.guidance
    schedule_of(opened, steps, guidance)  # refused before anything is drawn
    inputs.note_cut(reporter, opened, cut_prompts(opened, texts, guidance, steps), guidance, steps)
    for name, each in zip(names, loaded, strict=True):
        inputs.note_differences(reporter, name, each, opened)
    rows = [{"prompt": text, "seed": settings.seed + i} for text in texts for i in range(settings.images)]
    gates = axes if settings.gate else []
    treated = Suppressed("treated", opened, mask, gates, settings.strength, list(settings.shares), settings.force)
    return ApplyJob(opened, settings, texts, rows, names, treated, steps, float(guidance), device, out)


def checked_texts(prompts: Sequence[str]) -> list[str]:
    """Prompts without repeats and surrounding spaces.

    Raises:
        InputError: A prompt is empty or is not UTF-8.
    """
    from stereoclinic.errors import InputError

    texts = list(dict.fromkeys(text.strip() for text in prompts))
    if odd := [text for text in texts if text != text.encode(errors="replace").decode()]:
        raise InputError(f"prompt {odd[0]!r} is not valid UTF-8; give it in UTF-8")
    if not all(texts):
        raise InputError("a prompt is missing or empty; give a text such as 'a photo of a doctor'")
    return texts


def load_together(
    masks: Sequence[str | Path], settings: ApplySettings
) -> "tuple[list[str], list[NeuronMask], NeuronMask]":
    """The masks' file names, the masks, and one mask of all of them.

    Raises:
        InputError: A file is given twice, the masks do not go together, or shares are given and nothing is allotted.
    """
    from stereoclinic.calls.inputs import check_distinct
    from stereoclinic.errors import InputError
    from stereoclinic.sns.compose import compose
    from stereoclinic.sns.mask import NeuronMask

    paths = [Path(path) for path in masks]
    check_distinct(paths, "--mask")
    loaded = [NeuronMask.load(path) for path in paths]
    mask = loaded[0] if len(loaded) == 1 else compose(loaded, force=settings.force)
    if (settings.shares or settings.allocate) and not mask.allocates:
        raise InputError(
            "--shares and --allocate need a mask that allots groups, and this one does not; make one with"
            " `stereo plan --allocate`"
        )
    return [path.name for path in paths], loaded, mask


def axes_of(mask: "NeuronMask") -> "list[Axis]":
    """The axes that a mask was made for: their words are what the gate looks for."""
    from stereoclinic.prompts.axes import made_for

    found = [axis for metadata in mask.origins if (axis := made_for(metadata)) is not None]
    return list({axis.name: axis for axis in found}.values())


@dataclass(frozen=True)
class ApplyJob:
    """What `apply` draws and writes, checked and not yet begun."""

    model: "Model"
    settings: ApplySettings
    texts: list[str]
    rows: list[dict[str, Any]]
    masks: list[str]
    treated: "Suppressed"
    steps: int
    guidance: float
    device: str
    out: Path

    @property
    def description(self) -> str:
        return (
            f"draw {2 * len(self.rows)} images in {self.steps} steps at guidance {self.guidance:g} on"
            f" {self.settings.ranks} device(s), and write {self.out}"
        )

    def run(self, reporter: Reporter) -> list[dict[str, Any]] | None:
        from stereoclinic.calls.work import claimed
        from stereoclinic.report.report import IMAGES

        unfinished = self.out / "apply-parts"
        with claimed(reporter, self.out / "side_by_side.png", self.out / IMAGES, unfinished):
            if (images := self._draw(unfinished, reporter)) is None:
                return None
            allotted = self.treated.treatment.allotment(self.rows)
            alone = [row["prompt"] for row, group in zip(self.rows, allotted, strict=True) if group is None]
            if alone:
                names = "; ".join(dict.fromkeys(alone))
                reporter.warn(f"no mask was applied to prompts that name a group (--no-gate applies it): {names}")
            entries = self._write(images, allotted)
            shutil.rmtree(unfinished, ignore_errors=True)
        return entries

    def _draw(self, folder: Path, reporter: Reporter) -> "dict[str, list[Tensor]] | None":
        """Images by arm; None on every rank but the first."""
        from stereoclinic.evaluation.draw import Part, Store, draw, model_digest
        from stereoclinic.evaluation.methods.base import Mitigation
        from stereoclinic.pipelines.images import check_blank, named
        from stereoclinic.runtime.devices import hush_lightning, strategy_for, threads_for

        hush_lightning()
        store, digest, settings, total = Store(folder), model_digest(self.model), self.settings, 2 * len(self.rows)
        starts = range(0, len(self.rows), settings.batch_size)
        parts = {
            arm.name: [
                Part(arm, self.rows[start : start + settings.batch_size], self.steps, self.guidance, digest)
                for start in starts
            ]
            for arm in (Mitigation("untreated"), self.treated)
        }
        with threads_for(self.device, settings.ranks), reporter.progress(total, "drawing") as advance:
            first = draw(
                self.model, [part for each in parts.values() for part in each], store,
                lambda arm, count: advance(count * settings.ranks, arm), reporter.warn, accelerator=self.device,
                devices=settings.devices, num_nodes=settings.num_nodes,
                strategy=strategy_for(settings.strategy, settings.ranks),
            )  # fmt: skip
        if not first:
            return None
        found = {arm: store.read(each) for arm, each in parts.items()}
        blank = [named(self.rows[at], arm) for arm, each in found.items() for at in each.blank]
        if warning := check_blank(blank, total):
            reporter.warn(warning)
        return {arm: list(each.images) for arm, each in found.items()}

    def _write(self, images: "dict[str, list[Tensor]]", allotted: Sequence[Any]) -> list[dict[str, Any]]:
        """Write the images and the sheet; returns an entry for each image."""
        from stereoclinic.io.files import whole_results, write_image
        from stereoclinic.io.text import slug
        from stereoclinic.report import report

        count, strength, entries = self.settings.images, self.settings.strength, []
        sheet = report.side_by_side(
            [
                report.SheetRow(text, *(each[p * count : (p + 1) * count] for each in images.values()))
                for p, text in enumerate(self.texts)
            ],
            ("untreated", " + ".join(self.masks) + ("" if strength == 1 else f" at {strength:g}")),
        )
        folder = self.out / report.IMAGES
        with whole_results(folder) as temporary, report.ImageFolder(temporary) as written:
            write_image(temporary / "side_by_side.png", sheet)
            for arm, drawn in images.items():
                treated = arm == "treated"
                for i, (row, image) in enumerate(zip(self.rows, drawn, strict=True)):
                    entry: dict[str, Any] = {
                        "file_name": f"{arm}/{i // count:03d}-{slug(row['prompt'])}-{row['seed']}.png",
                        "arm": arm,
                        "prompt": row["prompt"],
                        "seed": row["seed"],
                        "masks": ", ".join(self.masks) if treated else "",
                        "strength": strength if treated else 0.0,
                        "allotted": allotted[i] if treated and isinstance(allotted[i], str) else None,
                        "guidance": self.guidance,
                        "steps": self.steps,
                        "call": self.model.call,
                    }
                    written.add(entry, image)
                    entries.append({**entry, "file_name": str(folder / entry["file_name"])})
        return entries
