"""The data of an experiment: its protocol, its arms, and what each arm drew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.prompts.axes import Axis
from stereoclinic.sns.allocate import shares_of

if TYPE_CHECKING:
    from datasets import Dataset

SCHEMA = 2
UNTREATED, RANDOM, OTHER = "untreated", "random", "other seeds"
BALANCED, ALLOCATION = "balanced oracle", "allocation oracle"
REFERENCE = "reference"


@dataclass(frozen=True)
class Protocol:
    """What is drawn.

    Args:
        axis: The bias axis.
        prompts: Neutral prompts, P of them.
        images: Images per prompt, n.
        group_images: Images per group prompt; 0 leaves group prompts out.
        seed: The first judged seed. Masks are made on other seeds.
        steps: Of the scheduler.
        guidance: Scale of classifier-free guidance.
        batch_size: Images drawn together.
        shares: Target shares, of allocation and of every gap; uniform if empty.
        others: Further axes that the reader knows, which a treatment should leave as they are.
        unrelated: Prompts that have nothing to do with the axis (`load_plain_prompts`); None leaves them out.
        unrelated_images: Images per unrelated prompt.
        figures: Which figures are computed: "default", "all", or names of further ones, separated by commas.
        all_arms: Also draw the balanced oracle, and the untreated model on other seeds.
    """

    axis: Axis
    prompts: "Dataset"
    images: int = 25
    group_images: int = 4
    seed: int = 5000
    steps: int = 20
    guidance: float = 1.0
    batch_size: int = 50
    shares: Mapping[str, float] = field(default_factory=dict)
    others: tuple[Axis, ...] = ()
    unrelated: "Dataset | None" = None
    unrelated_images: int = 4
    figures: str = "default"
    all_arms: bool = False

    @property
    def target(self) -> Tensor:
        """(K,) target shares."""
        return shares_of(self.axis.groups, [self.shares] if self.shares else [])

    def __post_init__(self) -> None:
        if self.images < 2:
            raise InputError(f"{self.images} images per prompt; an interval needs 2 or more")
        if min(self.steps, self.batch_size) < 1 or self.group_images < 0 or self.guidance < 0:
            raise InputError("steps and batch size must be 1 or more, group images and guidance 0 or more")
        if self.unrelated is not None and len(self.unrelated) * self.unrelated_images < 2:
            raise InputError("unrelated prompts: a distance between sets of images needs 2 images or more in each")
        _ = self.target  # refuses shares that do not fit


@dataclass
class Drawn:
    """The images of one arm and what was read of them: P prompts, n images, K groups, F features.

    An image that shows no group still counts in every share, by its reads; `no_group` says how probable that is.
    """

    name: str
    reads: Tensor  # (P, n, K) probabilities
    right: Tensor | None  # (P, n) whether the prompt's own occupation was read; NaN if the reader lacks it (None: all)
    features: Tensor  # (P, n, F)
    images: Tensor  # (P, n, 3, H, W) uint8
    seconds: float | None  # of sampling alone; None where arms were drawn on devices of different kinds
    others: dict[str, Tensor] = field(default_factory=dict)  # axis -> (P, n, its groups), as reads
    allotted: Tensor | None = None  # (P, n) group of each image, -1 where it was left alone; None without allocation
    by_reader: dict[str, Tensor] = field(default_factory=dict)  # of several readers: name -> (P, n, K), as reads
    lpips: Tensor | None = None  # (P, n) LPIPS to the untreated picture of the same place; None where not asked for
    clip: Tensor | None = None  # (P, n) CLIPScore with the neutral prompt; None where it was not asked for
    memory: int | None = None  # most bytes on a GPU while it was drawn; None where that is not known
    no_group: Tensor | None = None  # (P, n) probability that no group was seen; None if the reader cannot say so
    remarks: np.ndarray | None = None  # (P, n) texts: what the reader says of each image; None where it says nothing
    seeds: tuple[int, ...] = ()  # (n,) of its images; empty where they are the protocol's, one after the other
    blank: int = 0  # pictures that showed nothing; their seeds are left out, here and in all arms of the same prompts

    def only(self, places: Sequence[int]) -> "Drawn":
        """The arm with some seeds alone."""
        kept = {each.name: _only(getattr(self, each.name), places) for each in fields(self) if each.name != "seeds"}
        return replace(self, **kept, seeds=tuple(self.seeds[place] for place in places))

    def seeds_from(self, first: int) -> Sequence[int]:
        """The seeds of its images, of which the protocol's first is known."""
        return self.seeds or range(first, first + self.images.shape[1])

    @property
    def seen(self) -> Tensor:
        """(P, n, K) probabilities of the groups among all that was seen, where `reads` sum to 1 without no group."""
        return self.reads if self.no_group is None else self.reads * (1 - self.no_group[..., None])


def _only(value: Any, places: Sequence[int]) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        return value[:, list(places)]
    return {name: _only(each, places) for name, each in value.items()} if isinstance(value, dict) else value


@dataclass
class Experiment:
    """Everything that was drawn, and the figures made of it (plain data, as in results.json)."""

    protocol: Protocol
    neutral: list[Drawn]
    grouped: list[Drawn] = field(default_factory=list)
    reference: Drawn | None = None
    unrelated: list[Drawn] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def arm(self, name: str) -> Drawn:
        return next(arm for arm in self.neutral if arm.name == name)

    @property
    def distant(self) -> Drawn | None:
        """The untreated arm on other seeds, if it was drawn."""
        return next((arm for arm in self.neutral if arm.name == OTHER), None)
