"""EquiSteer: cross-attention's outputs are cleared of the axis, and one group's direction is put back.

Reference: Gaintseva et al., EquiSteer: Cross-Attention Steering Towards a Fairer Text-Guided Image Generation, ECCV
2026 (arXiv 2607.01147); numbers of equations as the authors' repository gives them. For layer l and timestep t, with
o the output of cross-attention at one position:

    s_k  = mean o under group prompts - mean o under neutral prompts, brought to length 1     CASteer, arXiv 2503.09630
    gate   closed (the image is left alone) if max over positions <o, s_k> exceeds thr_k for any k, at one layer and the
           first timestep; thr_k is midway between the means under group prompts and under neutral ones        eq. 5
    o_   = o - projection on span(s_1 .. s_K)                                                              eq. 7
    o'   = o_ + strength alpha_k s_k,  alpha_k = mean <o, s_k> under group k's prompts                     eq. 8
    o   <- o' ||o|| / ||o'||                                                                               eq. 3

k is the image's allotted group. The gate's layer is the one that tells group prompts from neutral ones best (area under
the ROC curve); the authors choose it by hand and offer this. Their vectors come from a distilled one-step model, ours
from the model's own steps. The layers before the gate's run untreated at the first timestep, as theirs do.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from stereoclinic.evaluation.methods.base import Batch
from stereoclinic.evaluation.methods.baseline import Baseline, attended, attention_blocks, check_strength, unit
from stereoclinic.evaluation.methods.calibration import Look, Run
from stereoclinic.prompts.sets import Row


@dataclass(frozen=True)
class SteerSettings:
    """Args: strength of what is put back.

    The paper's strength is 1. Of 1, 2, 4 and 8 on the embedded model, 4 set more groups than 2, and 8 hardly more.
    """

    strength: float = 4.0

    def __post_init__(self) -> None:
        check_strength("EquiSteer", self.strength)


class EquiSteer(Baseline):
    """Arguments as of `Baseline`, and the calibrated vectors."""

    title, source = "EquiSteer", "Gaintseva et al. 2026, arXiv 2607.01147"
    needs = "group prompts"
    defaults: ClassVar[SteerSettings] = SteerSettings()
    fitted = ("directions", "sizes", "gate", "thresholds")
    directions: dict[str, Tensor]  # layer -> (T, K, C), s_k
    sizes: dict[str, Tensor]  # layer -> (T, K), alpha_k
    gate: str  # the gate's layer
    thresholds: Tensor  # (K,)

    def __init__(self, *common: Any, **fitted: Any) -> None:
        super().__init__(*common, **fitted)
        self._bases = {name: torch.stack([basis(s) for s in each]) for name, each in self.directions.items()}
        self._open = torch.empty(0, dtype=torch.long)  # (B,) 1 or 0, or -1 before the gate

    @classmethod
    def _fit(cls, run: Run, settings: SteerSettings) -> Self:
        layers = attention_blocks(run.network, cross=True, who="EquiSteer")
        timesteps, kinds = run.timesteps(), [run.neutral, *(run.group(k) for k in range(len(run.axis)))]
        sums: list[dict[str, Tensor]] = []  # of each kind of prompt: layer -> (T, C)

        def keep(samples: list[int], step: int, name: str, o: Tensor) -> None:
            if name not in sums[-1]:
                sums[-1][name] = torch.zeros(len(timesteps), o.shape[-1])
            sums[-1][name][step] += o.sum(0)

        for prompts in kinds:
            sums.append({})
            run.draw(prompts, Look(layers, lambda name, o: attended(f"EquiSteer: {name}", o).float().mean(1), keep))
        means = {name: torch.stack([each[name] for each in sums]) / len(run.rows) for name in layers}  # (1 + K, T, C)
        directions = {name: unit(mean[1:] - mean[:1]).transpose(0, 1).contiguous() for name, mean in means.items()}
        sizes = {name: (mean[1:].transpose(0, 1) * directions[name]).sum(-1) for name, mean in means.items()}
        first = {name: s[0] for name, s in directions.items()}
        neutral, *groups = (_responses(run, prompts, layers, first) for prompts in kinds)
        gate, thresholds = chosen_gate(neutral, groups)
        fitted = {"directions": directions, "sizes": sizes, "gate": gate, "thresholds": thresholds}
        return cls._made(run, settings, timesteps, **fitted)

    def modules(self) -> dict[str, str]:
        return {name: name for name in self.directions}

    def begin(self, rows: list[Row]) -> Batch:
        self._open = torch.full((len(rows),), -1)
        return super().begin(rows)

    def steer(self, name: str, x: Tensor, output: Tensor, groups: Tensor, images: Tensor) -> Tensor:
        s, t = self.directions[name].to(output), self._step
        at_gate = self._open[images] < 0
        if name == self.gate and at_gate.any():
            below = (response(output, s[0]) <= self.thresholds.to(output)).all(1).cpu()
            self._open[images[at_gate]] = below[at_gate].long()
        is_open = self._open[images] > 0
        if not is_open.any():
            return output
        back = self.strength * self.sizes[name].to(output)[t, groups, None] * s[t, groups]  # (B, C)
        steered = cleared(output, self._bases[name].to(output)[t]) + back[:, None]
        steered = unit(steered) * output.norm(dim=-1, keepdim=True)
        return torch.where(is_open.to(output.device)[:, None, None], steered, output)


def basis(s: Tensor) -> Tensor:
    """An orthonormal basis of what directions (K, C) span: (K, C), rows of zeros where they span less."""
    _, size, rows = torch.linalg.svd(s.double(), full_matrices=False)
    spanned: Tensor = rows * (size > 1e-6 * size.max().clamp_min(1e-12))[:, None]
    return spanned.to(s.dtype)


def cleared(o: Tensor, rows: Tensor) -> Tensor:
    """What of o (..., C) is orthogonal to an orthonormal basis (K, C), whose rows may be zero."""
    return o - (o @ rows.T) @ rows


def response(o: Tensor, s: Tensor) -> Tensor:
    """Largest <o, s_k> over positions: o (B, L, C), s (K, C) -> (B, K)."""
    return (o @ s.T).amax(1)


def chosen_gate(neutral: dict[str, Tensor], groups: list[dict[str, Tensor]]) -> tuple[str, Tensor]:
    """The layer that tells group prompts from neutral ones best, and the thresholds there.

    Args:
        neutral: layer -> (N, K) responses of neutral prompts.
        groups: for each group k, layer -> (N, K) responses of its prompts.

    Returns:
        The first layer of the largest mean area under the ROC curve, and (K,).
    """

    def area(name: str) -> float:
        pairs = [k[name][:, None, i] - neutral[name][None, :, i] for i, k in enumerate(groups)]
        return sum(((each > 0).double() + (each == 0).double() / 2).mean().item() for each in pairs)

    name = max(neutral, key=area)
    own = torch.stack([k[name][:, i].mean() for i, k in enumerate(groups)])
    return name, (own + neutral[name].mean(0)) / 2


def _responses(run: Run, prompts: list[str], layers: dict[str, nn.Module], s: dict[str, Tensor]) -> dict[str, Tensor]:
    """layer -> (N, K) at the first timestep of every sample."""
    found = {name: torch.zeros(len(run.rows), len(directions)) for name, directions in s.items()}

    def keep(samples: list[int], step: int, name: str, each: Tensor) -> None:
        found[name][samples] = each

    run.first(run.rows, prompts, Look(layers, lambda name, o: response(o.float(), s[name].to(o.device)), keep))
    return found
