"""A mask: one damping factor per neuron and timestep bin, with what it was made from and for.

    a_j  <-  r_j + s_j (a_j - r_j),      0 <= s_j <= 1

A factor s_j of 1 leaves the neuron alone, 0 holds it at its root r_j. An allocating mask has such factors for each of
K groups: an image that is allotted to a group gets that group's. Files hold tensors and plain metadata only.

A mask's file on the Hugging Face hub: from there, and to there.

What goes wrong is said in one line, with what to look at; huggingface_hub is imported when it is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.metadata import check_metadata
from stereoclinic.io.reading import LONGEST_NAME, MOST_BINS, MOST_GROUPS, is_name
from stereoclinic.io.tensors import ENDINGS, load_tensors, save_tensors
from stereoclinic.pipelines.sites import Site, check_sites, spans

KIND = "mask"
VERSION = 2
#: Version 1 had no groups; the rest is the same.
OLDER = (1,)
#: What a mask's file is called in a folder, or a repository, of its own.
FILENAME = "mask.safetensors"
BRANCHES = ("conditional", "both")

#: (noisiest, cleanest) timesteps: holds every t with noisiest > t >= cleanest. One that reaches the first bin
#: edge has no upper end, as the first bin has none.
Window = tuple[float, float]


@dataclass(frozen=True, eq=False)
class NeuronMask:
    """Damping factors. Sizes: T timestep bins, N neurons (those of each site, one site after the other), K groups.

    Args:
        sites: The layers, in order.
        bin_edges: (T + 1,) descending timesteps; bin i holds edges[i] > t >= edges[i + 1], bin 0 also t >=
            edges[0].
        factors: (T, N) in [0, 1], or (K, T, N) if there are groups; kept in float32.
        roots: What a neuron is damped toward, of the factors' shape, kept in float32; None for zero.
        branch: "conditional" damps the conditional half of a guided batch alone, "both" all of it.
        metadata: Plain data; `unet_shapes` and `unet_weights` are the digests of the model it was made for.
        groups: Names of two or more groups that images are allotted to; none for a plain mask.

    Raises:
        InputError: Anything does not fit together; said in one line.

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
        _check_sites(self.sites)
        if self.branch not in BRANCHES:
            raise InputError(f"mask: branch {self.branch!r:.40} is not known; choose from {', '.join(BRANCHES)}")
        try:
            check_metadata(self.metadata)
        except InputError as error:
            raise InputError(f"mask: {error}") from error
        edges = _finite("bin_edges", self.bin_edges).double()
        if edges.ndim != 1 or len(edges) < 2 or not (edges[:-1] > edges[1:]).all():
            raise InputError("mask: bin_edges must be two or more timesteps that descend, such as [1000, 500, 0]")
        if len(edges) > MOST_BINS + 1:
            raise InputError(f"mask: {len(edges) - 1:,} timestep bins; expected up to {MOST_BINS:,}")
        object.__setattr__(self, "bin_edges", edges)
        object.__setattr__(self, "groups", _checked_groups(self.groups))
        shape: tuple[int, ...] = (len(edges) - 1, sum(site.width for site in self.sites))
        sizes = "timestep bins x neurons of the sites"
        if self.groups:
            shape, sizes = (len(self.groups), *shape), f"groups x {sizes}"
        for name in ("factors", "roots"):
            value = getattr(self, name)
            if value is None and name == "roots":
                continue
            value = _finite(name, value).float()
            if tuple(value.shape) != shape:
                raise InputError(f"mask: {name} of shape {tuple(value.shape)}; expected {shape}, {sizes}")
            object.__setattr__(self, name, value)
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
        """The metadata of every mask that this one is composed of; its own alone if it is composed of none."""
        return [each for each in self._history() if _parts(each) is None]

    @property
    def made_on(self) -> list[list[int]]:
        """The ranges of seeds, [first, last], that a mask was planned and dosed on, also those it is composed of."""
        made = self._history()
        for each in made:  # of every dose, what the mask was dosed to before
            made += [part for part in (each.get("dose"), each.get("earlier")) if isinstance(part, dict)]
        ranges = [each["seeds"] for each in made if isinstance(each.get("seeds"), list) and len(each["seeds"]) == 2]
        return [seeds for seeds in ranges if all(isinstance(seed, int) for seed in seeds)]

    def _history(self) -> list[dict[str, Any]]:
        """The metadata of this mask, of those it is composed of, of those these are composed of, and so on."""
        found = [self.metadata]
        for each in found:
            found += [part for part in _parts(each) or [] if isinstance(part, dict)]
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
        return bin_of(self.bin_edges, timestep)

    def windowed(self, window: Window) -> Self:
        """The same mask, damping within a window of timesteps alone; bins that it cuts are split.

        Raises:
            InputError: The window is empty or meets no bin.
        """
        bins_in(self.bin_edges, window)  # refuses a window that meets no bin
        first, last = self.bin_edges[0].item(), self.bin_edges[-1].item()
        cuts = {float(t) for t in window if first > t > last}
        edges = torch.tensor(sorted({*self.bin_edges.tolist(), *cuts}, reverse=True), dtype=torch.float64)
        old = [self.bin_of(low) for low in edges[1:].tolist()]
        kept = bins_in(edges, window)[:, None]
        factors = torch.where(kept, self.factors[..., old, :], 1.0)
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
        """Read what `save` wrote, in this version of the format or an older one.

        Raises:
            InputError: As `stereoclinic.io.tensors.load_tensors`, or what it holds is no valid mask.
        """
        tensors, head = load_tensors(path, KIND, VERSION, *OLDER)
        try:
            sites = [Site(*row) for row in head["sites"]]
            return cls(
                sites,
                tensors["bin_edges"],
                tensors["factors"],
                tensors.get("roots"),
                head["branch"],
                head["metadata"],
                head.get("groups", ()),
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"mask file {path} is not complete ({error}); make it again") from error
        except InputError as error:
            raise InputError(f"mask file {path}: {str(error).removeprefix('mask: ')}") from error

    def save_pretrained(self, save_directory: str | Path, filename: str = FILENAME) -> Path:
        """Write into a folder, which is made if need be; beside a pipeline's own files, say.

        Returns:
            The file.

        Raises:
            InputError: As `save`.
        """
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"mask folder {folder} cannot be made ({error.strerror}); choose another") from error
        self.save(folder / filename)
        return folder / filename

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | Path,
        filename: str = FILENAME,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read a mask from a folder, or from a repository on the Hugging Face hub.

        Args:
            pretrained: A folder, or the file itself, read without the network; or "owner/name" on the hub.
            filename: The mask's file there.
            revision: Branch, tag or commit on the hub.
            cache_dir: Where downloads are kept; None for the hub's own cache.
            token: Of the hub; None for the one logged in with.
            local_files_only: Read the hub's cache alone.

        Raises:
            InputError: There is no such folder, repository or file, or the file is no mask.
        """
        folder = Path(pretrained)
        if folder.is_dir():
            if not (folder / filename).is_file():
                others = ", ".join(sorted(path.name for ending in ENDINGS for path in folder.glob(f"*{ending}"))[:4])
                raise InputError(f"folder {folder} holds no {filename}; pass filename= (it holds {others or 'none'})")
            return cls.load(folder / filename)
        if folder.is_file():
            return cls.load(folder)
        where = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        path = fetch(str(pretrained), filename, **where)
        return cls.load(path)

    def push_to_hub(
        self,
        repo_id: str,
        filename: str = FILENAME,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload to a repository on the Hugging Face hub, which is made if need be.

        Args:
            repo_id: "owner/name".
            filename: The mask's file there.
            private: Whether a new repository is; None for the owner's default.
            token: Of the hub; None for the one logged in with.
            revision: Branch to commit to.
            commit_message: None for "Upload FILENAME".
            create_pr: Open a pull request instead.

        Returns:
            The commit's address.

        Raises:
            InputError: The hub refuses, or cannot be reached.
        """
        with TemporaryDirectory() as folder:
            path = self.save_pretrained(folder, filename)
            message = commit_message or f"Upload {filename}"
            how = {"revision": revision, "commit_message": message, "create_pr": create_pr}
            return upload(path, repo_id, private, token, **how)


def bin_of(bin_edges: Tensor, timestep: float) -> int | None:
    """Bin i with edges[i] > t >= edges[i + 1]; bin 0 also above the first edge, None below the last.

    Examples:
        >>> edges = torch.tensor([1000.0, 600.0, 0.0])
        >>> [bin_of(edges, timestep) for timestep in (1000, 600, 599, -1)]
        [0, 0, 1, None]
    """
    above = int((bin_edges > timestep).sum())
    return None if above == len(bin_edges) else max(above - 1, 0)


def in_unit(timestep: float, first: float) -> float:
    """A timestep that is given as if the noisiest were 1000, in the unit of a scheduler that begins at `first`."""
    return timestep * first / 1000 if first < 10 else timestep


def bins_in(bin_edges: Tensor, window: Window | None) -> Tensor:
    """Which bins a window of timesteps meets: (T,) bool. None is all of them.

    Raises:
        InputError: The window is empty or meets no bin.
    """
    if window is None:
        return torch.ones(len(bin_edges) - 1, dtype=torch.bool)
    high, low = window
    if not high > low:
        raise InputError(f"window {high:g} to {low:g} is empty; give the noisiest timestep first, such as 1000 to 600")
    inside = (bin_edges[1:] < high) & (bin_edges[:-1] > low)
    if not inside.any():
        raise InputError(
            f"window {high:g} to {low:g} meets no timestep bin; they go from {bin_edges[0]:g} to {bin_edges[-1]:g}"
        )
    return inside


def _check_sites(sites: list[Site]) -> None:
    if not sites:
        raise InputError("mask: no sites; a mask needs at least one layer")
    check_sites(sites, "mask")
    if len({site.name for site in sites}) < len(sites):
        raise InputError("mask: a site is named twice; each layer may appear once")


def _parts(metadata: dict[str, Any]) -> list[Any] | None:
    """The metadata of the masks that one is composed of; None for one that is composed of none."""
    parts = (metadata.get("selection") or {}).get("of")
    return parts if isinstance(parts, list) else None


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


def fetch(repo_id: str, filename: str, **options: Any) -> str:
    """Download a file; options as of `hf_hub_download`.

    Returns:
        Where it is in the cache.

    Raises:
        InputError: There is no such repository or file, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return str(hf_hub_download(repo_id, filename, **options))
    except (OSError, ValueError, EntryNotFoundError) as error:
        _refuse(f"mask {repo_id!r} is no folder, and cannot be had from the hub", error)


def upload(path: Path, repo_id: str, private: bool | None, token: str | bool | None, **options: Any) -> str:
    """Upload a file under its own name, to a repository that is made if need be; options as of `HfApi.upload_file`.

    Returns:
        The commit's address.

    Raises:
        InputError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo, **options)
    except (OSError, ValueError) as error:
        _refuse(f"mask cannot be pushed to {repo_id!r}", error)
    return str(commit.commit_url)


def _refuse(what: str, error: Exception) -> NoReturn:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    raise InputError(f"{what} ({reason}); check the name, the network and `hf auth login`") from error
