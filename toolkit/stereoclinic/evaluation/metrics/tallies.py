"""Side effects accumulated over batches and ranks: obeyed group prompts, drift of another axis, unsure reads, features.

Each is a thin shell: it adds up counts (`sums.Sums`), and a pure function of `bias`, `statistics` or `quality` makes
the figure of them. KID has no such shell, for its kernel compares every picture with every other: it needs all features
(`kernel.kernel_distance`).
"""

import torch
from torch import Tensor

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.evaluation.intervals.statistics import wilson_interval
from stereoclinic.evaluation.metrics.bias import distribution, sdtv, top_group
from stereoclinic.evaluation.metrics.quality import frechet_distance
from stereoclinic.evaluation.metrics.sums import Sums


class GroupFidelity(Sums):
    """How often pictures of prompts that name a group show it.

    Args:
        num_groups: K, number of groups of the axis.

    Examples:
        >>> fidelity = GroupFidelity(num_groups=2)
        >>> fidelity.update(torch.tensor([0, 1]), torch.tensor([[0.9, 0.1], [0.7, 0.3]]))
        >>> fidelity.compute()["groups"].tolist()
        [1.0, 0.0]
    """

    obeyed: Tensor  # (K,) pictures that show the group asked for
    asked: Tensor  # (K,) pictures it was asked for

    def __init__(self, num_groups: int) -> None:
        if num_groups < 2:
            raise InputError(f"{num_groups} groups; expected two or more")
        super().__init__(obeyed=(num_groups,), asked=(num_groups,))

    def update(self, wanted: Tensor, probabilities: Tensor) -> None:
        """Add a batch.

        Args:
            wanted: (B,) integer group that each picture's prompt names.
            probabilities: (B, K) class probabilities.

        Raises:
            InputError: If shapes or values are not of that form.
        """
        reads = _reads(probabilities, len(wanted), len(self.asked)).to(self.asked.device)
        wanted = _indices(wanted, len(self.asked), "groups").to(self.asked.device)
        hits = top_group(reads).gather(1, wanted[:, None])[:, 0]
        self.obeyed.index_add_(0, wanted, hits)
        self.asked.index_add_(0, wanted, torch.ones_like(hits))

    def compute(self) -> dict[str, Tensor]:
        """Rates so far: ``all`` (3,) the estimate and the ends of its Wilson interval, and ``groups`` (K,).

        Raises:
            Incomplete: If a group has not been asked for yet.
        """
        if bool((self.asked == 0).any()):
            missing = (self.asked == 0).nonzero().flatten().tolist()
            raise Incomplete(f"no picture of a prompt that names groups {missing}; add one or more of every group")
        whole = wilson_interval(float(self.obeyed.sum()), int(self.asked.sum()))
        return {
            "all": torch.tensor([whole.estimate, whole.low, whole.high], dtype=torch.float64),
            "groups": self.obeyed / self.asked,
        }


class AxisDrift(Sums):
    """How far the shares of an axis that is not treated move: mean over prompts of their total variation.

    Args:
        num_prompts: P.
        num_groups: K, of that axis.
    """

    before: Tensor  # (P, K) pictures counted for their top group, untreated
    after: Tensor  # (P, K) treated

    def __init__(self, num_prompts: int, num_groups: int) -> None:
        if num_prompts < 1 or num_groups < 2:
            raise InputError(f"{num_prompts} prompts and {num_groups} groups; expected at least one and two")
        super().__init__(before=(num_prompts, num_groups), after=(num_prompts, num_groups))

    def update(self, prompts: Tensor, probabilities: Tensor, treated: bool) -> None:
        """Add a batch of reads of treated or of untreated pictures.

        Args:
            prompts: (B,) integer index of each picture's prompt.
            probabilities: (B, K) class probabilities.
            treated: Which side they are of.

        Raises:
            InputError: If shapes or values are not of that form.
        """
        side = self.after if treated else self.before
        reads = _reads(probabilities, len(prompts), side.shape[1]).to(side.device)
        side.index_add_(0, _indices(prompts, len(side), "prompts").to(side.device), top_group(reads))

    def compute(self) -> Tensor:
        """The drift so far, from 0 to 1.

        Raises:
            Incomplete: If a prompt has no picture on one of the sides.
        """
        counts = [side.sum(1, keepdim=True) for side in (self.before, self.after)]
        if any(bool((each == 0).any()) for each in counts):
            raise Incomplete("a prompt has no picture before or after; add one or more of every prompt to both sides")
        return sdtv(self.after / counts[1], self.before / counts[0]).mean()


class UnsureRate(Sums):
    """Share of pictures whose group the reader is unsure of; see ``bias.unsure_rate``.

    Args:
        high: Probability from which on a read is sure.
    """

    unsure: Tensor  # ()
    read: Tensor  # ()

    def __init__(self, high: float = 0.8) -> None:
        if not 0 < high <= 1:
            raise InputError(f"high is {high}; expected a probability above 0 and at most 1, such as 0.8")
        super().__init__(unsure=(), read=())
        self.high = high

    def update(self, probabilities: Tensor) -> None:
        """Add a batch of (B, K) class probabilities."""
        self.unsure += (distribution(probabilities, "reads").amax(-1) < self.high).sum().to(self.unsure.device)
        self.read += len(probabilities)

    def compute(self) -> Tensor:
        """The rate so far.

        Raises:
            Incomplete: If no picture was read yet.
        """
        if not bool(self.read > 0):
            raise Incomplete("no picture was read; add one or more")
        return self.unsure / self.read


class FrechetFeatures(Sums):
    """The Frechet distance of two sets of features that need never be held at once.

    Args:
        num_features: d.
    """

    count: Tensor  # (2,)
    total: Tensor  # (2, d)
    squares: Tensor  # (2, d, d)

    def __init__(self, num_features: int) -> None:
        if num_features < 1:
            raise InputError(f"{num_features} features; expected one or more")
        super().__init__(count=(2,), total=(2, num_features), squares=(2, num_features, num_features))

    def update(self, features: Tensor, reference: bool) -> None:
        """Add a batch of features (B, d) to the reference or to what is compared with it.

        Raises:
            InputError: If they have another width.
        """
        if features.dim() != 2 or features.shape[1] != self.total.shape[1]:
            raise InputError(f"features have shape {tuple(features.shape)}; expected (B, {self.total.shape[1]})")
        rows, side = features.to(self.total), int(reference)
        self.count[side] += len(rows)
        self.total[side] += rows.sum(0)
        self.squares[side] += rows.T @ rows

    def compute(self) -> Tensor:
        """The distance so far.

        Raises:
            Incomplete: If a side has fewer than two pictures.
        """
        if bool((self.count < 2).any()):
            raise Incomplete(f"{self.count.int().tolist()} pictures on the two sides; add two or more to each")
        n = self.count[:, None, None]
        means = self.total / self.count[:, None]
        covariances = (self.squares - n * means[:, :, None] * means[:, None, :]) / (n - 1)
        distance = frechet_distance(means[0], covariances[0], means[1], covariances[1])
        return torch.tensor(distance, dtype=torch.float64)


def _reads(probabilities: Tensor, rows: int, groups: int) -> Tensor:
    if probabilities.shape != (rows, groups):
        raise InputError(f"probabilities have shape {tuple(probabilities.shape)}; expected ({rows}, {groups})")
    return distribution(probabilities, "reads")


def _indices(values: Tensor, number: int, what: str) -> Tensor:
    if values.is_floating_point() or (len(values) and not 0 <= int(values.min()) <= int(values.max()) < number):
        raise InputError(f"{what} {values.tolist()}; expected integers from 0 to {number - 1}")
    return values.long()
