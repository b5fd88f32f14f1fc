"""A mask: one damping factor for each neuron and timestep bin, with a record of how it was made.

    a_j  <-  r_j + s_j (a_j - r_j),      0 <= s_j <= 1

A factor s_j of 1 leaves the neuron unchanged, 0 holds it at its root r_j. An allocating mask has such factors for each
of K groups: an image allotted to a group gets that group's factors. Files hold tensors and plain metadata only.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.metadata import check_metadata
from stereoclinic.io.reading import LONGEST_NAME, MOST_BINS, MOST_GROUPS, is_name
from stereoclinic.io.tensors import ENDINGS, load_tensors, save_tensors
from stereoclinic.pipelines.bins import Window, bin_within, bins_in
from stereoclinic.pipelines.sites import Site, check_sites, spans
from stereoclinic.sns.hub import FILENAME, Judged, hub_errors, upload, write_card

if TYPE_CHECKING:
    from stereoclinic.sns.export import Exported

KIND = "mask"
VERSION = 2
BRANCHES = ("conditional", "both")


@dataclass(frozen=True, eq=False)
class NeuronMask:
    """Damping factors. Sizes: T timestep bins, N neurons (those of each site, one site after the other), K groups.

    Args:
        sites: The layers, in order.
        bin_edges: (T + 1,) descending timesteps; bin i holds edges[i] > t >= edges[i + 1], bin 0 also t >= edges[0].
        factors: (T, N) in [0, 1], or (K, T, N) if there are groups; kept in float32.
        roots: What a neuron is damped toward, of the factors' shape, kept in float32; None for zero.
        branch: "conditional" damps only the conditional half of a guided batch, "both" all of it.
        metadata: Plain data; `unet_shapes` and `unet_weights` are the digests of the model it was made for.
        groups: Names of two or more groups that images are allotted to; none for a plain mask.

    Raises:
        InputError: The values do not fit together.

    Examples:
        >>> mask = NeuronMask([Site("ff.net.2", "ff", 3)], torch.tensor([1000.0, 0.0]), torch.tensor([[1, 0.5, 0]]))
        >>> mask.damping.tolist(), mask.allocates
        ([[0.0, 0.5, 1.0]], False)
    """

    sites: list[Site]
    bin_edges: Tensor
    factors: Tensor
    roots: Tensor | None = None
    branch: Literal["conditional", "both"] = "both"
    metadata: dict[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", list(self.sites))
        if not self.sites:
            raise InputError("mask: no sites; a mask needs at least one layer")
        check_sites(self.sites, "mask")
        if len({site.name for site in self.sites}) < len(self.sites):
            raise InputError("mask: a site is named twice; each layer may appear once")
        if self.branch not in BRANCHES:
            raise InputError(f"mask: branch {self.branch!r:.40} is not known; choose from {', '.join(BRANCHES)}")
        try:
            check_metadata(self.metadata)
        except InputError as error:
            raise InputError(f"mask: {error}") from error
        edges = _checked_edges(self.bin_edges)
        object.__setattr__(self, "bin_edges", edges)
        object.__setattr__(self, "groups", _checked_groups(self.groups))
        shape: tuple[int, ...] = (len(edges) - 1, sum(site.width for site in self.sites))
        sizes = "timestep bins x neurons of the sites"
        if self.groups:
            shape, sizes = (len(self.groups), *shape), f"groups x {sizes}"
        for name, value in (("factors", self.factors), ("roots", self.roots)):
            if value is None and name == "roots":
                continue
            tensor = _finite(name, value).float()
            if tuple(tensor.shape) != shape:
                raise InputError(f"mask: {name} of shape {tuple(tensor.shape)}; expected {shape}, {sizes}")
            object.__setattr__(self, name, tensor)
        low, high = self.factors.min().item(), self.factors.max().item()
        if low < 0 or high > 1:
            raise InputError(f"mask: factors from {low:.4g} to {high:.4g}; expected 0 (silenced) to 1 (untouched)")

    @property
    def damping(self) -> Tensor:
        """1 - factors: (T, N), or (K, T, N)."""
        return 1 - self.factors

    @property
    def allocates(self) -> bool:
        """Whether images are allotted to groups."""
        return bool(self.groups)

    @property
    def origins(self) -> list[dict[str, Any]]:
        """The metadata of every mask that this one is composed of; of this mask alone if it is not a composition."""
        return [metadata for metadata in self._history() if _parts(metadata) is None]

    @property
    def made_on(self) -> list[list[int]]:
        """The ranges of seeds, [first, last], that the mask, and any it is composed of, was planned and dosed on."""
        records = self._history()
        for record in records:  # also those of a dose, and of the dose before it
            records += [part for part in (record.get("dose"), record.get("earlier")) if isinstance(part, dict)]
        ranges = [record["seeds"] for record in records if isinstance(record.get("seeds"), list)]
        return [seeds for seeds in ranges if len(seeds) == 2 and all(isinstance(seed, int) for seed in seeds)]

    def _history(self) -> list[dict[str, Any]]:
        """The metadata of this mask, of those it is composed of, of those these are composed of, and so on."""
        found = [self.metadata]
        for metadata in found:
            found += [part for part in _parts(metadata) or [] if isinstance(part, dict)]
        return found

    def group(self, name: str) -> Self:
        """The plain mask that images allotted to a group get.

        Raises:
            InputError: There is no such group.
        """
        if name not in self.groups:
            known = f"choose from {', '.join(self.groups)}" if self.groups else "this mask has none"
            raise InputError(f"group {name!r} is not known; {known}")
        k = self.groups.index(name)
        roots = None if self.roots is None else self.roots[k]
        return replace(self, factors=self.factors[k], roots=roots, groups=())

    def spans(self) -> Iterator[tuple[Site, slice]]:
        """Each site with its slice of the N neurons."""
        return spans(self.sites)

    def bin_of(self, timestep: float) -> int | None:
        """The bin that holds a timestep; None below the last edge, where nothing is damped."""
        return bin_within(timestep, self.bin_edges)

    def windowed(self, window: Window) -> Self:
        """The same mask, damping only within a window of timesteps; bins that it cuts are split.

        Raises:
            InputError: The window is empty or meets no bin.
        """
        bins_in(self.bin_edges, window)  # refuses a window that meets no bin
        first, last = self.bin_edges[0].item(), self.bin_edges[-1].item()
        cuts = {float(t) for t in window if first > t > last}
        edges = torch.tensor(sorted({*self.bin_edges.tolist(), *cuts}, reverse=True), dtype=torch.float64)
        old = [self.bin_of(low) for low in edges[1:].tolist()]
        inside = bins_in(edges, window)[:, None]
        factors = torch.where(inside, self.factors[..., old, :], 1.0)
        roots = None if self.roots is None else self.roots[..., old, :]
        return replace(self, bin_edges=edges, factors=factors, roots=roots)

    def save(self, path: str | Path) -> None:
        """Write .pt or .safetensors, by the ending, whole or not at all.

        Raises:
            InputError: The ending is another, or the file cannot be written there.
        """
        tensors = {"bin_edges": self.bin_edges, "factors": self.factors}
        if self.roots is not None:
            tensors["roots"] = self.roots
        sites = [[site.name, site.kind, site.width] for site in self.sites]
        head = {"sites": sites, "branch": self.branch, "groups": list(self.groups), "metadata": self.metadata}
        save_tensors(path, KIND, VERSION, tensors, head)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: As `io.tensors.load_tensors`, or the contents are not a valid mask.
        """
        tensors, head = load_tensors(path, KIND, VERSION)
        try:
            return cls(
                [Site(*row) for row in head["sites"]],
                tensors["bin_edges"],
                tensors["factors"],
                tensors.get("roots"),
                head["branch"],
                head["metadata"],
                head["groups"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"mask file {path} is not complete ({error}); make it again") from error
        except InputError as error:
            raise InputError(f"mask file {path}: {str(error).removeprefix('mask: ')}") from error

    def export(self, pipe: Any, path: str | Path, *how: Any, **options: Any) -> "Exported":
        """Write it as a LoRA, as full differences or as (IA)^3 of peft, for a pipeline; arguments as of `export`."""
        from stereoclinic.sns.export import export

        return export(pipe, self, path, *how, **options)

    def save_pretrained(
        self,
        save_directory: str | Path,
        filename: str = FILENAME,
        results: Judged | None = None,
        license: str | None = None,
        base_model: str | None = None,
        repo_id: str | None = None,
    ) -> Path:
        """Write into a folder, which is made if need be, with a model card; it may hold a pipeline's files too.

        A README.md of somebody else that is there stays, and no card is written.

        Args:
            save_directory: The folder.
            filename: The mask's file there.
            results: Of a bench, for the card: `stereoclinic.judged("stereo-bench")`.
            license: Of the mask, by the hub's name, such as apache-2.0.
            base_model: On the hub, "owner/name"; by default the model it was made for, where that is one.
            repo_id: What the card calls the repository; the folder's name by default.

        Returns:
            The file.

        Raises:
            InputError: As `save`; results are of another mask, or license or base model is no name.
        """
        folder = Path(save_directory)
        write_card(folder, self, filename, repo_id or str(save_directory), results, license, base_model)
        self.save(folder / filename)
        return folder / filename

    @classmethod
    def from_pretrained(cls, pretrained: str | Path, filename: str = FILENAME, **options: Any) -> Self:
        """Read a mask from a folder, or from a repository on the Hugging Face hub.

        Args:
            pretrained: A folder, or the file itself, read without the network; or "owner/name" on the hub.
            filename: The mask's file there.
            **options: Given to `huggingface_hub.hf_hub_download`: revision, cache_dir, token, local_files_only.

        Raises:
            InputError: There is no such folder, repository or file, or the file is not a mask.
        """
        folder = Path(pretrained)
        if folder.is_dir():
            if not (folder / filename).is_file():
                others = ", ".join(sorted(path.name for ending in ENDINGS for path in folder.glob(f"*{ending}"))[:4])
                raise InputError(f"folder {folder} holds no {filename}; pass filename= (it holds {others or 'none'})")
            return cls.load(folder / filename)
        if folder.is_file():
            return cls.load(folder)
        from huggingface_hub import hf_hub_download

        with hub_errors(f"mask {str(pretrained)!r} is not a folder, and cannot be downloaded from the hub"):
            path = hf_hub_download(str(pretrained), filename, **options)
        return cls.load(path)

    def push_to_hub(
        self,
        repo_id: str,
        filename: str = FILENAME,
        private: bool | None = None,
        token: str | bool | None = None,
        results: Judged | None = None,
        license: str | None = None,
        base_model: str | None = None,
        **options: Any,
    ) -> str:
        """Upload with a model card to a repository on the Hugging Face hub, which is made if need be.

        Args:
            repo_id: "owner/name".
            filename: The mask's file there.
            private: Whether a new repository is private; None for the owner's default.
            token: Of the hub; None for that of `hf auth login`.
            results: As `save_pretrained`.
            license: As there, also base_model.
            **options: Given to `huggingface_hub.HfApi.upload_folder`: revision, commit_message, create_pr.

        Returns:
            The commit's address.

        Raises:
            InputError: As `save_pretrained`, or the hub refuses, or cannot be reached.
        """
        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder, hub_errors(f"mask cannot be pushed to {repo_id!r}"):
            card = (filename, results, license, base_model)
            self.save_pretrained(folder, *card, repo_id)  # what is refused is refused before a repository is made
            api = HfApi(token=token)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            self.save_pretrained(folder, *card, repo)
            return upload(api, folder, filename, repo, **options)


def check_strength(strength: float) -> None:
    """Refuse a strength that is not a number from 0 to 1, with an InputError."""
    if not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise InputError(f"strength {strength!r}; expected 0 (no damping) to 1 (the mask unchanged)")


def check_not_negative(**values: float) -> None:
    """Refuse a value that is negative or not finite, with an InputError."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} {value}: expected 0 or a positive number")


def in_unit(timestep: float, first: float) -> float:
    """A timestep on a scale of 1000, in the unit of a scheduler whose first timestep is `first`."""
    return timestep * first / 1000 if first < 10 else timestep


def _parts(metadata: dict[str, Any]) -> list[Any] | None:
    """The metadata of the masks that a mask is composed of; None if it is not a composition."""
    parts = (metadata.get("selection") or {}).get("of")
    return parts if isinstance(parts, list) else None


def _checked_edges(bin_edges: Tensor) -> Tensor:
    edges = _finite("bin_edges", bin_edges).double()
    if edges.ndim != 1 or len(edges) < 2 or not (edges[:-1] > edges[1:]).all():
        raise InputError("mask: bin_edges must be two or more timesteps that descend, such as [1000, 500, 0]")
    if len(edges) > MOST_BINS + 1:
        raise InputError(f"mask: {len(edges) - 1:,} timestep bins; expected up to {MOST_BINS:,}")
    return edges


def _checked_groups(groups: object) -> tuple[str, ...]:
    if not isinstance(groups, tuple | list) or len(groups) > MOST_GROUPS or not all(map(is_name, groups)):
        expected = f"up to {MOST_GROUPS} names of up to {LONGEST_NAME} characters"
        raise InputError(f"mask: groups {groups!r:.80}; expected names, such as ('female', 'male'), {expected}")
    if len(groups) == 1 or len(set(groups)) < len(groups):
        raise InputError(f"mask: groups {', '.join(groups):.200}; expected two or more that differ, or none")
    return tuple(groups)


def _finite(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise InputError(f"mask: {name} must be a tensor of floating point numbers")
    if not torch.isfinite(value).all():
        raise InputError(f"mask: {name} holds NaN or infinity; was the model run in too low a precision?")
    return value.detach().cpu()
