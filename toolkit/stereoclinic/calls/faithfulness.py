"""Which composite is faithful on a model: say what measuring takes, measure, and keep what `locate` chose."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stereoclinic.calls.duration import timed
from stereoclinic.calls.work import Reporter
from stereoclinic.ddtd.rules.composites import COMPOSITES
from stereoclinic.ddtd.step import StepSettings
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.errors import InputError
from stereoclinic.evaluation.compare import is_significant
from stereoclinic.evaluation.faithfulness import Ranked, Silencing, Trial
from stereoclinic.evaluation.wording import spelt
from stereoclinic.io.files import check_same, sole_writer, write_text
from stereoclinic.io.metadata import Form, parse
from stereoclinic.io.reading import read_json
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.call import Call
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.record import made_by
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.pipelines.watch import Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Samples
from stereoclinic.sns.stepwise import Stepwise
from stereoclinic.statistics.intervals import Interval


@dataclass(frozen=True)
class Faithfulness:
    """How faithful each composite is on a model.

    Attributes:
        best: The composite to take.
        ranking: All that can be measured, most faithful first.
        refused: Composite -> why it cannot be measured.
        axis: The bias axis.
        samples: Number of samples.
        guidance: Guidance scale of the trajectory.
        timesteps: Of the points.
        sizes: Numbers of neurons that are silenced together.
        neurons: All neurons.
        groups: Number of groups of each size, for each sample and timestep.
        forward: Forward passes of one sample.
        backward: Backward passes of one sample.
    """

    best: str
    ranking: list[Ranked]
    refused: dict[str, str]
    axis: str
    samples: int
    guidance: float
    timesteps: list[float]
    sizes: list[int]
    neurons: int
    groups: int
    forward: int
    backward: int


def rank_composites(
    model: Model,
    axis: Axis,
    samples: Samples,
    walk: Settings,
    reporter: Reporter,
    batch_size: int,
    more: Iterable[str] = (),
    trial: Trial = Trial(),  # noqa: B008 (frozen)
) -> Faithfulness:
    """Say what it takes, then silence random groups of neurons and rank the composites by their forecasts.

    Args:
        model: The pipeline.
        axis: The bias axis.
        samples: The trial takes some of them.
        walk: Steps, guidance, sites and root; its composite and target do not matter: it is the lean that is measured.
        reporter: Told what it takes; gets progress.
        batch_size: Samples run together; fewer where memory runs out.
        more: Further composites: TOML files.
        trial: What is silenced.

    Raises:
        InputError: No composite fits the model, or it predicts the same for all groups' prompts.
    """
    sites, rows, groups = find_sites(inner(model.network), patterns=walk.sites), trial.rows(samples), len(axis)
    timesteps = schedule_of(model, walk.steps, walk.guidance).timesteps
    steps = trial.steps(len(Stepwise().treated(timesteps)))
    composites, refused = dict[str, StepSettings](), dict[str, str]()
    for name in dict.fromkeys([*COMPOSITES, *more]):
        try:
            composites[name] = replace(replace(walk, composite=name, target="lean").for_step(model.network), off_axis=0)
        except InputError as error:
            refused[name] = str(error)
    silences, points = trial.groups * len(trial.sizes), len(rows) * len(steps)
    forward = points * (1 + groups + silences + len(composites) * (1 + groups))
    backward = points * len(composites) * (1 if groups == 2 else groups)
    one, relevance = timed(model, sites, rows[:1], axis, replace(walk, composite="gradient", target="lean"))
    seconds = points * ((1 + groups + silences) * one + len(composites) * relevance)
    reporter.status(
        f"faithfulness: {len(rows)} samples at {len(steps)} steps, {silences} random groups each, {len(composites)}"
        f" composites: {forward:,} forward and {backward:,} backward passes of one sample; a forward pass takes"
        f" {one:.2g} s here, a relevance step {relevance:.2g} s: up to {max(1, round(seconds / 60)):,} min"
    )
    total = points * (silences + len(composites))
    with reporter.progress(total, "silencing groups of neurons") as advance:
        found = Silencing(model, sites, rows, composites, trial, steps, groups, advance)
        portions = AdaptiveBatch(batch_size, reporter.warn)

        def visit(call: Call) -> None:
            if call.step in steps:
                portions.each(lambda part: found.at(call, conditions, part), len(rows))

        trajectory = Walk(model, rows, walk.steps, walk.guidance, visit=visit, portions=portions, last=steps[-1] + 1)
        (conditions,) = encode_groups(trajectory, rows, [axis])
        trajectory.run()
    ranking, neurons = found.ranking(), sum(site.width for site in sites)
    return Faithfulness(
        ranking[0].composite, ranking, refused | found.refused, axis.name, len(rows), walk.guidance,
        [timesteps[step] for step in steps], [max(1, round(size * neurons)) for size in trial.sizes], neurons,
        trial.groups, forward, backward,
    )  # fmt: skip


def chosen_composite(
    model: Model, axis: Axis, samples: Samples, walk: Settings, reporter: Reporter, batch_size: int, kept: Path | None
) -> dict[str, Any]:
    """The composite that `locate --composite auto` takes, and why, as plain data for a file's metadata.

    The first rank that comes measures; the others, and a resumed run, read what it kept.

    Args:
        model: As of `rank_composites`.
        axis: As there.
        samples: As there.
        walk: As there.
        reporter: As there.
        batch_size: As there.
        kept: Where the choice is kept; None measures without keeping.

    Raises:
        InputError: What is kept was chosen in another configuration; or as `rank_composites`.
    """

    def measured() -> _Choice:
        found = rank_composites(model, axis, samples, walk, reporter, batch_size)
        first, *others = found.ranking
        return _Choice(
            composite=first.composite,
            correlation=first.correlation.estimate,
            interval=[first.correlation.low, first.correlation.high] if first.correlation.has_ends else [],
            no_significant_difference=[
                each.composite for each in others if each.difference and not is_significant(each.difference)
            ],
            refused=sorted(found.refused),
            samples=found.samples,
            timesteps=found.timesteps,
            groups=found.groups,
        )

    if kept is None:
        choice = measured()
    else:
        about = made_by(model, axis, samples, walk.steps, walk.guidance)
        about = json.loads(json.dumps({**about, "sites": walk.sites, "root": walk.root, "trial": asdict(Trial())}))
        with sole_writer(kept, wait=True):
            if not kept.is_file():
                write_text(kept, _Kept(made=about, choice=measured()).model_dump_json(indent=1))
            found = parse(_Kept, read_json(kept, "chosen composite"), f"chosen composite {kept}")
        check_same(kept, found.made, about)
        choice = found.choice
    reporter.note(
        f"composite {choice.composite}, chosen by auto: the correlation of its forecasts with the true effect of"
        f" silencing neurons is {spelt(Interval(choice.correlation, *choice.interval))}"
    )
    return choice.model_dump()


class _Choice(Form):
    """As in the metadata of relevance."""

    by: str = "auto"
    composite: Literal[tuple(COMPOSITES)]  # type: ignore[valid-type]
    correlation: float
    interval: list[float]
    no_significant_difference: list[str]
    refused: list[str]
    samples: int
    timesteps: list[float]
    groups: int


class _Kept(Form):
    """The file beside an unfinished mask."""

    made: dict[str, Any]
    choice: _Choice
