"""How different the pictures of the same prompt and group are: a treatment may give each group one face.

    D = mean over cells of the mean distance ||f_i - f_j|| over pairs i < j of the cell's pictures

Cells are prompt x group. A cell counts as much as the treated pictures that are in it, on both sides, so a change of
groups alone moves the figure and its reference alike. (The same mean with LPIPS as the distance is what papers on
multimodal generation call LPIPS diversity.)

Reference: Zhu et al., Toward Multimodal Image-to-Image Translation, NeurIPS 2017, section 5 (mean distance of pairs).
"""

import torch
from torch import Tensor

from stereoclinic.errors import InputError


def pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance over pairs of rows: (n, d), n >= 2.

    Raises:
        InputError: If there are fewer than two rows.
    """
    if features.dim() != 2 or len(features) < 2:
        raise InputError(f"features have shape {tuple(features.shape)}; expected (n, d) with at least two images")
    return torch.nn.functional.pdist(features.double()).mean().item()


def diversity_within(
    features: Tensor, cells: Tensor, reference: Tensor, reference_cells: Tensor
) -> tuple[float, float]:
    """Diversity within cells, and that of a reference in the same cells.

    Args:
        features: (n, d) of the pictures that are judged.
        cells: (n,) integer cell of each.
        reference: (m, d) of other pictures.
        reference_cells: (m,).

    Returns:
        Both diversities, over the cells of which both sides have two or more pictures; NaN where there is none.

    Raises:
        InputError: If features and cells do not fit together.
    """
    for rows, own in ((features, cells), (reference, reference_cells)):
        if rows.dim() != 2 or own.shape != rows.shape[:1] or own.is_floating_point():
            raise InputError(
                f"features have shape {tuple(rows.shape)}, cells {tuple(own.shape)}; expected (n, d) and integers (n,)"
            )
    total, judged, compared = 0, 0.0, 0.0
    for cell in cells.unique().tolist():
        here, there = features[cells == cell], reference[reference_cells == cell]
        if min(len(here), len(there)) >= 2:
            total += len(here)
            judged += len(here) * pairwise_distance(here)
            compared += len(here) * pairwise_distance(there)
    return (judged / total, compared / total) if total else (float("nan"), float("nan"))
