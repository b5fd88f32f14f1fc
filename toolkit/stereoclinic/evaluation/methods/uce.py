"""Unified Concept Editing: keys and values of cross-attention, edited in closed form until images are balanced.

Reference: Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024 (arXiv 2308.14761), for debiasing.

    W   = (sum_E v* c^T + sum_P W_old c c^T + lambda W_old) (sum_E c c^T + sum_P c c^T + lambda 1)^-1
    v*  = W_old c + sum_p alpha_p ||W_old c|| u_p / ||u_p||,      u_p = W_old a_p

for each edited c, where a_p is the same text with attribute p. alpha starts at 0. Images are drawn with the edited
weights and read, and alpha_p += eta (tau_p - r_p) for each prompt whose shares r are further than a tolerance from the
target tau; then W is computed anew from W_old. lambda and the scale of the attributes' values are those of the authors'
code. Its eta is 0.1, for up to 30 rounds; a larger one takes fewer and ends coarser.

c are the text states of a neutral prompt that keys and values are computed from, from its last word to the end, as in
the authors' first code; a_p are those of the group prompts, aligned at their own last word. Preserved (P) are the empty
prompt and all states of the group prompts: our choice, so that "a female doctor" stays what it was.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.evaluation.methods.base import Batch
from stereoclinic.evaluation.methods.baseline import Baseline, attention_blocks, check_strength
from stereoclinic.evaluation.methods.calibration import Look, Run
from stereoclinic.pipelines.model import network_of
from stereoclinic.prompts.sets import Row


@dataclass(frozen=True)
class EditSettings:
    """Args: most rounds of drawing; eta; tolerance of shares; lambda; weight of what is kept; strength up to 1."""

    rounds: int = 10
    eta: float = 0.3
    tolerance: float = 0.05
    lamb: float = 0.1
    preserve: float = 0.1
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.rounds < 1 or min(self.eta, self.lamb) <= 0 or self.preserve < 0:
            raise InputError("UCE: rounds must be 1 or more, eta and lambda above 0, preserve 0 or more")
        check_strength("UCE", self.strength, 1)


class UnifiedConceptEditing(Baseline):
    """Arguments as of `Baseline`, and `edited`: module path -> its weight (O, D), used within the context."""

    title, source = "UCE", "Gandikota et al. 2024, arXiv 2308.14761"
    needs = "group prompts, labels of own images"
    defaults: ClassVar[EditSettings] = EditSettings()
    fitted = ("edited",)
    by_prompt = True
    edited: dict[str, Tensor]

    def __init__(self, *common: Any, **fitted: Any) -> None:
        super().__init__(*common, **fitted)
        self._originals: dict[str, Tensor] = {}

    @classmethod
    def _fit(cls, run: Run, settings: EditSettings) -> Self:
        blocks = attention_blocks(run.network, cross=True, who="UCE")
        if not all(hasattr(block, part) for block in blocks.values() for part in ("to_k", "to_v")):
            raise InputError(f"UCE: the cross-attention of this {type(run.network).__name__} has no keys and values")
        names = [f"{name}.{part}" for name in blocks for part in ("to_k", "to_v")]
        old = {name: _weight(run.network, name).detach().clone() for name in names}
        made = cls._made(run, settings, edited=old)
        prompts = list(dict.fromkeys(run.neutral))
        groups = [dict(zip(run.neutral, run.group(k), strict=True)) for k in range(len(run.axis))]
        c, a = _concepts(run, blocks, prompts, [[group[each] for each in prompts] for group in groups])
        kept = [*dict.fromkeys(text for group in groups for text in group.values()), ""]
        p = _states(run, blocks, kept).double().flatten(0, 1)
        alpha = torch.zeros(len(prompts), len(run.axis), dtype=torch.float64)
        for _ in range(settings.rounds):
            with made:
                made.begin(run.rows)
                shares = run.shares(run.read(run.draw(run.neutral)))
            off = run.target - torch.stack([shares[prompt] for prompt in prompts])  # tau - r, (P, K)
            off[off.abs().amax(1) < settings.tolerance] = 0
            if not off.any():
                break
            alpha += settings.eta * off
            made.edited = {}
            for name, weight in old.items():
                w = weight.double()
                v = [target_values(w, c_i, a_i, alpha_i) for c_i, a_i, alpha_i in zip(c, a, alpha, strict=True)]
                new = closed_form(w, torch.cat(c), torch.cat(v), p, settings.lamb, settings.preserve)
                made.edited[name] = torch.lerp(w, new, settings.strength).to(weight)
        return made

    def begin(self, rows: list[Row]) -> Batch:
        return Batch([row["prompt"] for row in rows])

    def __enter__(self) -> Self:
        super().__enter__()
        for name, weight in self.edited.items():
            parameter = _weight(network_of(self.model), name)
            self._originals[name] = parameter.data
            parameter.data = weight.to(parameter)
        return self

    def __exit__(self, *error: Any) -> None:
        for name, weight in self._originals.items():
            parameter = _weight(network_of(self.model), name)
            parameter.data = weight.to(parameter)  # a no-op, unless the model was moved meanwhile
        self._originals.clear()
        super().__exit__(*error)


def closed_form(w: Tensor, c: Tensor, v: Tensor, p: Tensor, lamb: float, preserve: float) -> Tensor:
    """The W that minimises sum ||W c - v||^2 + preserve sum ||(W - w) p||^2 + lamb ||W - w||^2.

    Args:
        w: (O, D), the weight as it was.
        c: (n, D) texts that are edited.
        v: (n, O) what they are to give.
        p: (m, D) texts that are kept.
        lamb: lambda, above 0.
        preserve: Weight of what is kept.

    Returns:
        (O, D).
    """
    kept = preserve * p.T @ p + lamb * torch.eye(w.shape[1]).to(w)  # (D, D), symmetric
    solved: Tensor = torch.linalg.solve(c.T @ c + kept, (v.T @ c + w @ kept).T)
    return solved.T


def target_values(w: Tensor, c: Tensor, a: Tensor, alpha: Tensor) -> Tensor:
    """v* of one prompt: w (O, D), c (n, D), a (K, n, D), alpha (K,) -> (n, O)."""
    u = a @ w.T
    u = u / u.norm(dim=(1, 2), keepdim=True)
    values = c @ w.T
    target: Tensor = values + values.norm() * (alpha[:, None, None] * u).sum(0)
    return target


def _weight(network: nn.Module, name: str) -> nn.Parameter:
    weight: nn.Parameter = network.get_submodule(name).weight  # type: ignore[assignment]
    return weight


def _states(run: Run, blocks: dict[str, nn.Module], texts: list[str]) -> Tensor:
    """(n, L, D) text states as cross-attention reads them; raises InputError if blocks read different ones."""
    first, found, seen = next(iter(blocks)), dict[int, Tensor](), list[Tensor]()

    def reduce(name: str, states: Tensor) -> Tensor:
        if name == first:
            seen[:] = [states]
            return states
        if not seen or states.shape != seen[0].shape or not torch.equal(states, seen[0]):
            raise InputError(
                f"UCE: the blocks of this {type(run.network).__name__} read different text states; they must read"
                " the same"
            )
        return states.new_empty(len(states))

    def keep(samples: list[int], step: int, name: str, states: Tensor) -> None:
        if name == first:
            found.update(zip(samples, states, strict=True))

    rows = [{"prompt": text, "seed": 0} for text in texts]
    keys = {name: block.get_submodule("to_k") for name, block in blocks.items()}
    run.first(rows, texts, Look(keys, reduce, keep, inputs=True))
    return torch.stack([found[number] for number in range(len(texts))]).to(_weight(run.network, f"{first}.to_k").device)


def _concepts(
    run: Run, blocks: dict[str, nn.Module], prompts: list[str], groups: list[list[str]]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each prompt c (n, D) and a (K, n, D), from the last word to the end of the text."""

    def last(text: str) -> int:  # the token before the one that ends the text
        return len(run.model.pipe.tokenizer(text, truncation=True).input_ids) - 2

    c, a = [], []
    for prompt, *own in zip(prompts, *groups, strict=True):
        states = _states(run, blocks, [prompt, *own]).double()
        starts = [last(text) for text in (prompt, *own)]
        count = states.shape[1] - max(starts)
        aligned = torch.stack([each[start : start + count] for each, start in zip(states, starts, strict=True)])
        c.append(aligned[0])
        a.append(aligned[1:])
    return c, a
