"""Networks that other papers measure distances with, on request: Inception for FID and KID, LPIPS for pairs.

torchmetrics brings both, and both need torchvision, which this package does without: beside a CPU build of torch the
one from the registry keeps torchmetrics itself from being imported. So they are extras, opened before anything is
drawn. A figure named FID elsewhere is of 10,000 pictures and more; at the sizes of a bench its floor is what counts.

References: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017 (FID); Zhang et al., The
Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018 (LPIPS).
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError, first_line

READER = "reader"

_TOGETHER = 32  # pictures at once, so that memory stays flat


def open_features(name: str, device: str = "cpu") -> nn.Module | None:
    """The network that distances between sets of pictures are taken in; None for the reader's own features.

    Args:
        name: "reader", or one of `FEATURES`.
        device: Where it runs.

    Raises:
        InputError: No such network, or what it needs is not installed or cannot be fetched.
    """
    if name == READER:
        return None
    if name not in FEATURES:
        raise InputError(f"unknown features {name!r}; choose from {', '.join([READER, *FEATURES])}")
    return FEATURES[name]().eval().to(device)


def open_inception() -> nn.Module:
    """Inception v3 with the weights of the original FID: (n, 3, H, W) uint8 -> (n, 2048).

    Raises:
        InputError: torch-fidelity or a torchvision that fits is not there, or the weights cannot be fetched.
    """

    def make() -> nn.Module:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048).inception

    return _opened("--features inception", "torch_fidelity", "inception", make)


def open_lpips(device: str = "cpu") -> nn.Module:
    """LPIPS on AlexNet: two (n, 3, H, W) in [0, 1] -> (n,), 0 for the same picture.

    Raises:
        InputError: A torchvision that fits is not there, or the weights cannot be fetched.
    """

    def make() -> nn.Module:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="none", normalize=True)

    return _opened("--lpips", "torchvision", "lpips", make).eval().to(device)


#: How `--features` names a network -> what opens it. It takes uint8 and has `num_features`, as torchmetrics' FID asks.
FEATURES: dict[str, Callable[[], nn.Module]] = {"inception": open_inception}


@torch.no_grad()
def extracted(network: nn.Module, images: Tensor) -> Tensor:
    """Features of pictures.

    Args:
        network: Of `open_features`.
        images: (..., 3, H, W) uint8.

    Returns:
        (..., num_features) float32, on the CPU.

    Raises:
        InputError: The network gives another shape.
    """
    device = _device(network)
    found = torch.cat([network(part.to(device)).float().cpu() for part in images.flatten(0, -4).split(_TOGETHER)])
    if found.shape != (len(found), network.num_features):
        raise InputError(f"the network gives features {tuple(found.shape)}; expected (n, {network.num_features})")
    whole: Tensor = found.unflatten(0, images.shape[:-3])
    return whole


@torch.no_grad()
def perceptual_distance(network: nn.Module, pictures: Tensor, others: Tensor) -> Tensor:
    """LPIPS of each picture with its other.

    Args:
        network: Of `open_lpips`.
        pictures: (..., 3, H, W) uint8.
        others: The same shape.

    Returns:
        (...) float64, on the CPU.

    Raises:
        InputError: The two differ in shape.
    """
    if pictures.shape != others.shape:
        raise InputError(f"pictures {tuple(pictures.shape)} and {tuple(others.shape)}; expected two sets of one shape")
    device = _device(network)
    sides = [each.flatten(0, -4).split(_TOGETHER) for each in (pictures, others)]
    found = [
        # A single pair comes without its dimension.
        network(one.to(device).float() / 255, other.to(device).float() / 255).double().cpu().reshape(len(one))
        for one, other in zip(*sides, strict=True)
    ]
    return torch.cat(found).reshape(pictures.shape[:-3])


def _opened(option: str, package: str, extra: str, make: Callable[[], nn.Module]) -> nn.Module:
    advice = f"pip install 'stereoclinic[{extra}]', with a torchvision that fits torch {torch.__version__}"
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{option} needs the package {package}: {advice}")
    try:
        return make()
    except ImportError as error:
        raise InputError(f"{option} needs what cannot be imported ({first_line(error)}): {advice}") from error
    except (OSError, RuntimeError) as error:  # no network; a torchvision of another torch
        raise InputError(
            f"{option} cannot be opened ({first_line(error)}); it fetches weights, and needs {advice}"
        ) from error


def _device(network: nn.Module) -> torch.device:
    return next((each.device for each in network.parameters()), torch.device("cpu"))
