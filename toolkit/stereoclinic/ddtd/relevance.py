"""Relevance while it is summed (`RelevanceSums`) and when it is done (`Relevance`, a file).

Every tensor is a float64 sum over samples, so ranks and batches add up exactly. Its size does not grow with the number
of prompts: there is a row for each label (an occupation) and timestep bin, not for each sample. Leans are small, so
they are also kept for each measured timestep: the lean curve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.metadata import LONGEST_TEXT, check_metadata
from stereoclinic.io.reading import MOST_BINS, MOST_GROUPS, is_name
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.pipelines.memory import memory_of
from stereoclinic.pipelines.sites import Site, check_sites

if TYPE_CHECKING:
    from stereoclinic.ddtd.step import Measured

KIND, VERSION = "relevance", 2
SKETCHES = 4  # independent sums of off-axis rows by label and bin; more of them estimate ||V lambda||^2 better


def shapes_of(labels: int, bins: int, groups: int, neurons: int, steps: int) -> dict[str, tuple[int, ...]]:
    """The shape of every sum: P labels, T bins, K groups, N neurons, M measured steps."""
    return {
        "count": (labels, bins),
        "lean_sum": (labels, bins, groups),
        "lean_sq": (labels, bins, groups),
        "relevance_sum": (labels, bins, groups, neurons),
        "stereotype_sum": (labels, bins, neurons),
        "stereotype_sq": (bins, neurons),
        "collateral": (labels, bins, SKETCHES, neurons),
        "root_sum": (groups, bins, neurons),
        "value_sum": (labels, bins, groups),
        "curve_count": (labels, steps),
        "curve_sum": (labels, steps, groups),
        "curve_sq": (labels, steps, groups),
    }


STATES = tuple(shapes_of(0, 0, 0, 0, 0))
#: Those with a row for each label.
BY_LABEL = tuple(name for name in STATES if name not in ("stereotype_sq", "root_sum"))


class RelevanceSums:
    """Sums of leans, relevance, collateral and group activations; arguments as in `shapes_of`.

    Attributes:
        tensors: The sums by name, float64 whatever the precision of the run.

    Raises:
        InputError: They would not fit in memory.
    """

    def __init__(self, labels: int, bins: int, groups: int, neurons: int, steps: int) -> None:
        self.shapes = shapes_of(labels, bins, groups, neurons, steps)
        self._check_room(labels, torch.device("cpu"))
        self.tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.shapes.items()}

    @property
    def labels(self) -> int:
        """Number of rows."""
        return len(self.tensors["count"])

    def update(self, labels: Tensor, seeds: Tensor, bin_: int, step: int, measured: "Measured") -> None:
        """Add one step of a batch; samples with faults are left out.

        Args:
            labels: (B,) row of each sample.
            seeds: (B,) seed of each sample, which chooses the sketch of its off-axis row.
            bin_: Timestep bin of the step.
            step: Which of the measured steps it is.
            measured: The step. Its collateral has random signs, so that one sum stands for all samples.
        """
        kept: Tensor | slice = slice(None)
        if measured.faults:
            whole = [i for i in range(len(labels)) if i not in measured.faults]
            kept = torch.tensor(whole, dtype=torch.int64, device=labels.device)
        labels, seeds, sums = labels[kept], seeds[kept], self.tensors
        lean, value = (x.double().T[kept] for x in (measured.lean, measured.value))  # (B, K)
        relevance = measured.relevance.double().transpose(0, 1)[kept]  # (B, K, N)
        tilt = (value.sign()[..., None] * relevance).mean(1)  # (B, N): carries "more stereotyped", whichever way
        one = torch.ones_like(lean[:, 0])
        for place, name, values in (
            (bin_, "count", one),
            (bin_, "lean_sum", lean),
            (bin_, "lean_sq", lean.square()),
            (step, "curve_count", one),
            (step, "curve_sum", lean),
            (step, "curve_sq", lean.square()),
            (bin_, "value_sum", value),
            (bin_, "relevance_sum", relevance),
            (bin_, "stereotype_sum", tilt),
        ):
            sums[name][:, place].index_add_(0, labels, values)
        sums["stereotype_sq"][bin_] += tilt.square().sum(0)
        collateral = measured.collateral.double()[kept]
        sums["collateral"][:, bin_].index_put_((labels, seeds % SKETCHES), collateral, accumulate=True)
        sums["root_sum"][:, bin_] += measured.means.double()[:, kept].sum(1)

    def relabel(self, places: list[int], labels: int) -> None:
        """Make it `labels` rows; the present row i goes to places[i].

        Raises:
            InputError: As when it is made.
        """
        self._check_room(labels, self.tensors["count"].device)
        self.tensors |= {name: placed(self.tensors[name], places, labels) for name in BY_LABEL}

    def to(self, device: torch.device | str) -> Self:
        """Move the sums.

        Raises:
            InputError: As when it is made.
        """
        self._check_room(self.labels, torch.device(device))
        self.tensors = {name: value.to(device) for name, value in self.tensors.items()}
        return self

    def _check_room(self, labels: int, device: torch.device) -> None:
        """Refuse sums that would not fit: a row of a large model is 25 MB, and each prompt may be a label."""
        row = 8 * sum(math.prod(self.shapes[name][1:]) for name in BY_LABEL)
        if labels * row > memory_of(device) / 2:
            raise InputError(
                f"{labels} labels of {row / 2**20:.1f} MiB each do not fit in memory: results are kept by label; give"
                " the prompts a column `occupation` with fewer values, or a --limit"
            )


def placed(tensor: Tensor, places: list[int], rows: int) -> Tensor:
    """`rows` rows of zeros, but for those of the tensor, row i at places[i]."""
    whole = tensor.new_zeros(rows, *tensor.shape[1:])
    whole[places] = tensor[: len(places)]
    return whole


_NONE = torch.zeros(0, dtype=torch.float64)  # of sums that may be left out


@dataclass(frozen=True)
class Relevance:
    """The result of `stereo locate`. Sizes: P labels, T timestep bins, K groups, N neurons.

    Args:
        sites: The layers, in the order in which their neurons are concatenated.
        groups: K names.
        labels: P names, such as occupations.
        bin_edges: (T + 1,) descending timesteps; bin i holds edges[i] > t >= edges[i + 1].
        count: (P, T) number of (sample, step) summed. The other sums are as in `RelevanceSums`.
        metadata: Plain data: model, digests, axis, composite, steps, seeds, versions.
        value_sum: (P, T, K), what relevance adds up to (but for biases): leans, the default, or another target.
        timesteps: (M,) measured timesteps, noisiest first; with none there is no lean curve.
        curve_count: (P, M) number of samples, and their leans in `curve_sum` and `curve_sq`, (P, M, K).
    """

    sites: list[Site]
    groups: tuple[str, ...]
    labels: list[str]
    bin_edges: Tensor
    count: Tensor
    lean_sum: Tensor
    lean_sq: Tensor
    relevance_sum: Tensor
    stereotype_sum: Tensor
    stereotype_sq: Tensor
    collateral: Tensor
    root_sum: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)
    value_sum: Tensor = _NONE
    timesteps: Tensor = _NONE
    curve_count: Tensor = _NONE
    curve_sum: Tensor = _NONE
    curve_sq: Tensor = _NONE

    def __post_init__(self) -> None:
        shapes = self._shapes()
        if self.value_sum is _NONE:
            object.__setattr__(self, "value_sum", self.lean_sum)
        for name in STATES:
            if getattr(self, name) is _NONE and math.prod(shapes[name]) == 0:
                object.__setattr__(self, name, torch.zeros(shapes[name], dtype=torch.float64))
            if not torch.isfinite(getattr(self, name)).all():
                raise InputError(f"relevance: {name} is not finite; was the model run in too low a precision?")
        self._check(("relevance_sum", "stereotype_sum", "value_sum", "curve_sum"), shapes)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        labels, bins, groups = len(self.labels), len(self.bin_edges) - 1, len(self.groups)
        neurons = sum(site.width for site in self.sites)
        shapes = shapes_of(labels, bins, groups, neurons, len(self.timesteps))
        if self.collateral.ndim == 4 and self.collateral.shape[2] > 0:  # a file may have more sketches, or fewer
            shapes["collateral"] = (labels, bins, self.collateral.shape[2], neurons)
        return shapes

    def _check(self, names: Sequence[str], shapes: dict[str, tuple[int, ...]]) -> None:
        for name in names:
            if (found := tuple(getattr(self, name).shape)) != shapes[name]:
                raise InputError(f"relevance: {name} of shape {found}, expected {shapes[name]}; locate again")

    def lean(self) -> Tensor:
        """Mean lean by label, bin and group: (P, T, K); NaN where nothing was measured."""
        return self.lean_sum / self.count[..., None]

    def lean_stderr(self) -> Tensor:
        """Standard error of `lean`: (P, T, K).

        Every measured step counts as an observation. Steps of one sample are alike, so this is a lower bound where a
        bin holds several steps; `curve_stderr` has no such bias.
        """
        return _stderr(self.lean_sum, self.lean_sq, self.count[..., None])

    def curve(self) -> Tensor:
        """Mean lean by label, measured timestep and group: (P, M, K); NaN where nothing was measured."""
        return self.curve_sum / self.curve_count[..., None]

    def curve_stderr(self) -> Tensor:
        """Standard error of `curve` over samples, which are independent at one timestep: (P, M, K)."""
        return _stderr(self.curve_sum, self.curve_sq, self.curve_count[..., None])

    def rows(self) -> Tensor:
        """Mean relevance by label, bin and group: (P, T, K, N)."""
        return self.relevance_sum / self.count[..., None, None]

    def stereotype(self) -> tuple[Tensor, Tensor]:
        """sign(S) R averaged over groups and samples, and its standard error: (T, N) each.

        The error is clustered by label. The question is whether other occupations would agree; samples of one
        occupation, and steps of one sample, are not independent evidence of that. With m_p the mean of label p, and as
        many samples of each of P labels, it is std(m_p) / sqrt(P). In a bin with a single label it is the spread over
        samples and steps, a lower bound.
        """
        n = self.count.sum(0)[:, None]  # (T, 1)
        mean = self.stereotype_sum.sum(0) / n
        labels = (self.count > 0).sum(0)[:, None]  # (T, 1), P
        left = self.stereotype_sum - self.count[..., None] * mean  # (P, T, N), n_p (m_p - mean)
        clustered = left.square().sum(0) * labels / (labels - 1) / n.square()
        variance = (self.stereotype_sq / n - mean.square()).clamp_min(0) * n / (n - 1)
        return mean, torch.where(labels > 1, clustered, variance / n).sqrt()

    def roots(self) -> Tensor:
        """Mean activation in each group's passes: (K, T, N)."""
        return self.root_sum / self.count.sum(0)[:, None]

    def save(self, path: str | Path) -> None:
        """Write .safetensors (or .pt), sums in float32: their sampling error is far larger than rounding."""
        tensors = {name: getattr(self, name).float() for name in STATES if not name.endswith("count")}
        tensors |= {name: getattr(self, name).double() for name in ("count", "curve_count", "bin_edges", "timesteps")}
        head = {
            **self.metadata,
            "sites": [[site.name, site.kind, site.width] for site in self.sites],
            "groups": list(self.groups),
            "labels": self.labels,
        }
        save_tensors(path, KIND, VERSION, tensors, head)

    @classmethod
    def load(cls, path: str | Path) -> "Relevance":
        """Read what `save` wrote.

        Raises:
            InputError: As `io.tensors.load_tensors`, or a part is missing or of another form.
        """
        tensors, head = load_tensors(path, KIND, VERSION)
        try:
            sites = [Site(*row) for row in head.pop("sites")]
            groups, labels = tuple(head.pop("groups")), list(head.pop("labels"))
            sums = {name: tensors[name].double() for name in STATES}
            edges, timesteps = tensors["bin_edges"].double(), tensors["timesteps"].double()
            check_sites(sites, "relevance")
            check_metadata(head)
            if not 0 < len(groups) <= MOST_GROUPS or not all(map(is_name, groups)):
                raise InputError(f"groups {groups!r:.80}; expected up to {MOST_GROUPS} names")
            if not labels or not all(isinstance(label, str) and len(label) <= LONGEST_TEXT for label in labels):
                raise InputError(f"labels {labels!r:.80}; expected texts of up to {LONGEST_TEXT} characters")
            rows = edges.ndim == timesteps.ndim == 1
            if not rows or not 2 <= len(edges) <= MOST_BINS + 1 or len(timesteps) > MOST_BINS:
                raise InputError(f"bin_edges and timesteps must be rows of up to {MOST_BINS:,} numbers")
            found = cls(sites, groups, labels, edges, **sums, metadata=head, timesteps=timesteps)
            found._check(STATES, found._shapes())
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"relevance file {path} is not complete ({error}); make it again") from error


def _stderr(total: Tensor, squares: Tensor, n: Tensor) -> Tensor:
    """Standard error of the mean of n values, from their sum and their sum of squares; NaN for fewer than two."""
    variance = (squares / n - (total / n).square()).clamp_min(0) * n / (n - 1)
    return (variance / n).sqrt()
