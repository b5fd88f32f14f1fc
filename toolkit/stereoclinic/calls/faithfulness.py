"""Which composite is faithful on a model: say what measuring takes, measure, and keep what `locate` chose."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stereoclinic.calls.duration import timed
from stereoclinic.calls.work import Reporter
from stereoclinic.ddtd.rules.composites import COMPOSITES
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.evaluation.faithfulness import Ranked, Silencing, Trial
from stereoclinic.evaluation.wording import spelt
from stereoclinic.io.files import check_same, sole_writer, write_text
from stereoclinic.io.metadata import Form, parse
from stereoclinic.io.reading import read_json
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.record import made_by
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import Samples
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
) -> Faithfulness:
    """Say what it takes, then silence random groups of neurons and rank the composites by their forecasts.

    Args:
        model: The pipeline.
        axis: The bias axis.
        samples: The trial takes some of them.
        walk: Steps, guidance, sites and root.
        reporter: Told what it takes; gets progress.
        batch_size: Samples run together; fewer where memory runs out.
        more: Further composites: TOML files.

    Raises:
        InputError: No composite fits the model, or it predicts the same for all groups' prompts.
    """
    trial = Trial()
    rows = trial.rows(samples)
    found = Silencing(model, axis, rows, walk, dict.fromkeys([*COMPOSITES, *more]), trial)
    forward, backward = found.passes()
    plain = replace(walk, composite="gradient", target="lean")
    speed = timed(model, rows[:1], axis, plain)
    steps = found.points * len(found.composites)
    seconds = forward * speed.forward + backward * speed.backward
    reporter.status(
        f"faithfulness: {len(rows)} samples x {len(found.steps)} steps, {found.silences} random groups and"
        f" {len(found.composites)} composites at each: {forward:,} forward and {backward:,} backward passes of one"
        f" sample. A forward pass takes {speed.forward:.2g} s here, a backward pass {speed.backward:.2g} s:"
        f" up to {math.ceil(seconds / 60):,} min"
    )
    total = found.points * found.silences + steps
    with reporter.progress(total, "silencing groups of neurons") as advance:
        found.run(AdaptiveBatch(batch_size, reporter.warn), advance)
    ranking = found.ranking()
    return Faithfulness(
        ranking[0].composite, ranking, found.refused, axis.name, len(rows), walk.guidance, found.timesteps,
        trial.counts(found.neurons), found.neurons, trial.groups, forward, backward,
    )  # fmt: skip


def chosen_composite(
    model: Model, axis: Axis, samples: Samples, walk: Settings, reporter: Reporter, batch_size: int, kept: Path | None
) -> dict[str, Any]:
    """The composite that `locate --composite auto` takes, and why: plain data for the metadata of its relevance.

    The first rank that comes measures; the others, and a resumed run, read what it kept.

    Args:
        model: As the others, of `rank_composites`.
        kept: Where the choice is kept; None measures without keeping.

    Raises:
        InputError: What is kept was chosen in another configuration; or as `rank_composites`.
    """

    def measured() -> _Choice:
        first, *others = (ranked := rank_composites(model, axis, samples, walk, reporter, batch_size)).ranking
        return _Choice(
            composite=first.composite,
            correlation=round(first.correlation.estimate, 4),
            interval=[round(end, 4) for end in (first.correlation.low, first.correlation.high) if end == end],
            others={each.composite: round(each.correlation.estimate, 4) for each in others},
            samples=ranked.samples,
            timesteps=ranked.timesteps,
            groups=ranked.groups,
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
    """As in the metadata of relevance; `others` holds the correlations of the other composites."""

    by: str = "auto"
    composite: Literal[tuple(COMPOSITES)]  # type: ignore[valid-type]
    correlation: float
    interval: list[float]
    others: dict[str, float]
    samples: int
    timesteps: list[float]
    groups: int


class _Kept(Form):
    """The file beside an unfinished mask."""

    made: dict[str, Any]
    choice: _Choice
