"""Write a diffusers checkpoint with masks folded into its weights: `stereo apply --fuse`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stereoclinic.calls.apply import ApplySettings, load_together
from stereoclinic.calls.inputs import call_of
from stereoclinic.calls.work import Reporter, claimed
from stereoclinic.errors import InputError
from stereoclinic.pipelines import model_folder, open_pipeline
from stereoclinic.sns.fuse import fuse, is_fusable, save_fused
from stereoclinic.sns.mask import NeuronMask


@dataclass(frozen=True)
class FuseJob:
    """A checkpoint to write, checked and not yet begun."""

    mask: NeuronMask
    model: str
    settings: ApplySettings
    out: Path

    @property
    def description(self) -> str:
        return f"fold the mask into {self.model} at strength {self.settings.strength:g}, and write {self.out}"

    def run(self, reporter: Reporter) -> None:
        with claimed(reporter, self.out):
            pipe = open_pipeline(self.model, "cpu", self.settings.dtype, self.settings.variant, reporter.note)
            fuse(pipe, self.mask, self.settings.strength, self.settings.force)
            folder = model_folder(self.model)
            # What this package knows of the model is copied too: its defaults, and its reader.
            known = [] if folder is None else [folder / name for name in ("stereoclinic.json", "reader")]
            save_fused(pipe, self.out, beside=[path for path in known if path.exists()])


def prepare_fuse(masks: Sequence[str | Path], model: str, settings: ApplySettings, out: Path | None) -> FuseJob:
    """Check that masks can be folded into a model's weights.

    A mask can be folded in when it damps toward zero, alike at all timesteps, in both halves of guidance, and allots
    nothing.

    Args:
        masks: Files of masks; several are folded in together.
        model: `portraits`, a diffusers folder, a checkpoint or a hub id.
        settings: dtype, variant, strength and force are used.
        out: A new folder for the checkpoint.

    Raises:
        InputError: A mask cannot be folded in, or a setting would change nothing.
    """
    mask = load_together(masks, settings)[2]
    if settings.shares or call_of(settings) or settings.axis:
        raise InputError("--fuse writes a checkpoint and draws nothing: give it no shares, axis or call options")
    if out is None:
        raise InputError("--fuse needs --out DIR, a new folder for the checkpoint")
    if (reason := is_fusable(mask)) is not None:
        raise InputError(f"--fuse: {reason}")
    return FuseJob(mask, model, settings, out)
