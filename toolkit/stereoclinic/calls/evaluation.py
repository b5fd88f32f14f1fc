"""An evaluation that was checked: it draws, reads, compares and writes."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from stereoclinic.calls.evaluate_settings import EvaluateSettings
from stereoclinic.calls.inputs import relevance_near
from stereoclinic.calls.work import Reporter, claimed
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.evaluation.arms import Experiment, Protocol
from stereoclinic.evaluation.experiment import arms_of, run
from stereoclinic.evaluation.instruments import Instruments
from stereoclinic.evaluation.methods import baseline_class, calibration_samples
from stereoclinic.evaluation.methods.calibration import Calibration
from stereoclinic.evaluation.methods.checkpoint import kept_baselines
from stereoclinic.evaluation.protocols import PublishedProtocol
from stereoclinic.evaluation.provenance import provenance
from stereoclinic.evaluation.readers import Reader
from stereoclinic.evaluation.results import Results
from stereoclinic.pipelines.model import Model
from stereoclinic.report.loggers import Log, log_figures
from stereoclinic.report.report import IMAGES, write_results
from stereoclinic.runtime.devices import hush_lightning, strategy_for, threads_for
from stereoclinic.runtime.ranks import is_rank_zero
from stereoclinic.sns.mask import NeuronMask

References = dict[str, Callable[[Experiment], dict[str, Any]]]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that was checked and has not begun.

    Args:
        model: The pipeline.
        masks: By the name of their arm.
        files: Of the masks that were read from one.
        protocols: One for each guidance scale.
        published: The published protocol that is followed.
        reader: Of the images.
        instruments: What else images are measured with.
        references: Name -> further figures of an experiment.
        relevance: What the first mask was chosen from, if it was given.
        settings: With what a published protocol sets.
        out: Folder of the results.
        device: By torch's name.
        logs: Where figures and sheets are logged too.
        command: The command line, kept in the results.
    """

    model: Model
    masks: dict[str, NeuronMask]
    files: dict[str, Path]
    protocols: list[Protocol]
    published: PublishedProtocol | None
    reader: Reader
    instruments: Instruments
    references: References
    relevance: Relevance | None
    settings: EvaluateSettings
    out: Path
    device: str
    logs: list[Log]
    command: str | None = None

    @property
    def images(self) -> int:
        """Number of images to draw."""
        count = 0
        for protocol in self.protocols:
            arms = arms_of(self.model, protocol, self.masks, self.settings.strength, self.settings.force)
            grouped = len(protocol.axis) * protocol.group_images
            unrelated = len(protocol.unrelated or ()) * protocol.unrelated_images
            baseline = len(protocol.prompts) * (protocol.images + grouped) + unrelated
            count += arms.images + len(self.settings.baselines) * baseline
        return count

    @property
    def description(self) -> str:
        first, scales = self.protocols[0], ", ".join(f"{each.guidance:g}" for each in self.protocols)
        return (
            f"draw {self.images} images ({len(first.prompts)} prompts, {len(self.masks)} mask(s), {first.steps} steps,"
            f" guidance {scales}) on {self.settings.ranks} device(s), {self.device}, and write {self.out}"
        )

    def run(self, reporter: Reporter) -> Results | None:
        """Draw, read, compare and write; returns what results.json holds, or None on every rank but the first."""
        parts = self.settings.parts or self.out / "bench-parts"
        own_parts = [] if self.settings.parts else [parts]
        with claimed(reporter, self.out / "results.json", self.out / IMAGES, *own_parts):
            hush_lightning()
            experiments = self._experiments(parts, reporter)
            if not experiments:
                return None
            source, relevance = self._provenance()
            write_results(self.out, experiments, source, self.masks, relevance)
            figures = [experiment.results for experiment in experiments]
            log_figures(self.logs, figures, self.out)
            for folder in own_parts:
                shutil.rmtree(folder, ignore_errors=True)
        return Results.of(figures, source)

    def _experiments(self, parts: Path, reporter: Reporter) -> list[Experiment]:
        """One experiment for each guidance scale; none on every rank but the first."""
        experiments, settings = [], self.settings
        title = f"judging {self.protocols[0].axis.name}"
        with threads_for(self.device, self.settings.ranks), reporter.progress(self.images, title) as advance:
            for protocol in self.protocols:

                def drew(arm: str, count: int, guidance: float = protocol.guidance) -> None:
                    advance(count * self.settings.ranks, f"guidance {guidance:g}: {arm}")

                baselines = self._baselines(protocol, parts, reporter)
                experiment = run(
                    self.model, self.reader, protocol, self.masks, settings.strength, drew, settings.force, parts,
                    reporter.warn, baselines, self.instruments, accelerator=self.device, devices=settings.devices,
                    num_nodes=settings.num_nodes, strategy=strategy_for(settings.strategy, self.settings.ranks),
                )  # fmt: skip
                if experiment is not None:
                    if self.published is not None:
                        experiment.results["published"] = _published_figures(self.published, experiment)
                    experiment.results |= {name: figures(experiment) for name, figures in self.references.items()}
                    experiments.append(experiment)
        return experiments

    def _baselines(self, protocol: Protocol, parts: Path, reporter: Reporter) -> list[Any]:
        """Other methods, read from the folder of parts or made on seeds that are not judged.

        Under a published protocol they are made on its calibration prompts. Methods that are fitted per prompt need the
        judged prompts, so they are fitted on those.
        """
        made, settings, published = [], self.settings, self.published
        batch_size = min(Calibration.batch_size, protocol.batch_size)
        calibration = Calibration(protocol.steps, protocol.guidance, self.reader, protocol.shares, batch_size)
        for name in settings.baselines:
            held_out = published is not None and not baseline_class(name).by_prompt
            prompts = published.calibration() if published is not None and held_out else protocol.prompts
            samples = baseline_samples(prompts, protocol, settings)

            def making(name: str, count: int = len(samples)) -> None:
                reporter.status(f"making baseline {name} on {count} samples, guidance {protocol.guidance:g}")

            made += kept_baselines(
                [name], self.model, protocol.axis, samples, calibration, parts, is_rank_zero(), making
            )
        return made

    def _provenance(self) -> tuple[dict[str, Any], Relevance | None]:
        """Where the figures come from, and the relevance that the first mask was chosen from, if it is known."""
        settings, protocol = self.settings, self.protocols[0]
        source = provenance(
            self.model, protocol.axis.name, protocol.prompts, self.masks, self.files, settings.strength, self.reader,
            self.published,
        )  # fmt: skip
        file, relevance = settings.relevance, self.relevance
        if relevance is None and (first := next(iter(self.masks), None)) in self.files:
            file, relevance = relevance_near(self.files[str(first)], protocol.axis.groups, source) or (None, None)
        asked = {"clip_score": settings.clip_score, "reference": settings.reference, "confusion": settings.confusion}
        asked |= {"relevance": file, "command": self.command}
        source |= {name: str(value) for name, value in asked.items() if value is not None}
        return {**source, "features": settings.features}, relevance


def baseline_samples(prompts: Dataset, protocol: Protocol, settings: EvaluateSettings) -> list[Any]:
    """What other methods are made on; raises InputError where a seed is judged too, or is of `other seeds`."""
    most = max(protocol.images, protocol.group_images)
    judged = range(protocol.seed, protocol.seed + 2 * most)
    return calibration_samples(prompts, settings.baseline_seed, settings.baseline_seeds, judged)


def _published_figures(published: PublishedProtocol, experiment: Experiment) -> dict[str, Any]:
    """The figure of a published protocol for each arm, and what a fair model shows of it by chance."""
    floor = published.floor(experiment.protocol.images)
    return {
        "name": published.name,
        "figure": published.says()["figure"],
        "arms": {arm.name: published.figure(arm.reads) for arm in experiment.neutral},
        "noise_floor": {"mean": floor.mean, "upper": floor.upper},
    }
