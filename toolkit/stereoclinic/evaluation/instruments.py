"""Measurements of images besides their reader: other features for FID and KID, LPIPS, SSIM and CLIPScore.

Structural similarity (SSIM) to the untreated image of the same seed is always measured: 1 is the same image, and
two seeds of one prompt show what no relation gives. It says how much changed, not whether for the worse.

The others are on request, and opened before anything is drawn. Inception and LPIPS come with torchmetrics and need
torchvision, which is an extra: next to a CPU build of torch, torchvision from the registry breaks torchmetrics.

References: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE TIP 2004; Heusel
et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017 (FID); Zhang et al., The Unreasonable Effectiveness
of Deep Features as a Perceptual Metric, CVPR 2018 (LPIPS); Hessel et al., CLIPScore, EMNLP 2021, section 3 (there
scaled by 2.5 instead of 100).
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stereoclinic.errors import InputError, first_line
from stereoclinic.evaluation.arms import Drawn, Experiment
from stereoclinic.evaluation.readers.clip import DEFAULT
from stereoclinic.evaluation.readers.pretrained import open_model, open_part, open_pictures
from stereoclinic.prompts.sets import write

if TYPE_CHECKING:
    from datasets import Dataset

READER = "reader"
SMALLEST = 11  # pixels of the window that SSIM compares pictures through

_TOGETHER = 32  # pictures at once, so that memory stays flat
_SIDE = 256  # pixels of the shorter side from which on SSIM averages pictures down, as its authors' code does
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


def open_features(name: str, device: str = "cpu") -> nn.Module | None:
    """The feature extractor for FID and KID; None for the reader's own features.

    Args:
        name: "reader", or one of `FEATURES`.
        device: Where it runs.

    Raises:
        InputError: No such network, or what it needs is not installed or cannot be downloaded.
    """
    if name == READER:
        return None
    if name not in FEATURES:
        raise InputError(f"unknown features {name!r}; choose from {', '.join([READER, *FEATURES])}")
    return FEATURES[name]().eval().to(device)


def open_inception() -> nn.Module:
    """Inception v3 with the weights of the original FID: (n, 3, H, W) uint8 -> (n, 2048)."""

    def make() -> nn.Module:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048).inception

    return _opened("--features inception", "torch_fidelity", "inception", make)


def open_lpips(device: str = "cpu") -> nn.Module:
    """LPIPS on AlexNet: two (n, 3, H, W) in [0, 1] -> (n,), 0 for the same image.

    Raises:
        InputError: torchvision is missing or does not fit torch, or the weights cannot be downloaded.
    """

    def make() -> nn.Module:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="none", normalize=True)

    return _opened("--lpips", "torchvision", "lpips", make).eval().to(device)


#: Name of `--features` -> what opens it. A network takes uint8 and has `num_features`, as for torchmetrics' FID.
FEATURES: dict[str, Callable[[], nn.Module]] = {"inception": open_inception}


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
            f"{option} cannot be opened ({first_line(error)}); it downloads weights, and needs {advice}"
        ) from error


def open_clip(name: str = DEFAULT, device: str = "cpu") -> tuple[Any, Any]:
    """A CLIPModel and its processor.

    Args:
        name: A hub id or a folder; "clip" is `readers.clip.DEFAULT`.
        device: Where it runs.

    Raises:
        InputError: Nothing can be opened under this name, or it is no CLIP.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPModel, CLIPProcessor

    name, asked = (DEFAULT if name == "clip" else name), f"CLIPScore by {name!r}"
    if (kind := open_part(AutoConfig, name, asked).model_type) != "clip":
        raise InputError(f"{asked}: the model is a {kind}, no CLIP")
    tokenizer = open_part(AutoTokenizer, name, asked)
    model = open_model(CLIPModel, name, asked).to(device)
    return model, CLIPProcessor(open_pictures(name, asked), tokenizer)


@torch.no_grad()
def extracted(network: nn.Module, images: Tensor) -> Tensor:
    """Features of images: (..., 3, H, W) uint8 -> (..., num_features) float32, on the CPU.

    Raises:
        InputError: The network of `open_features` gives another shape.
    """
    device = _device(network)
    found = torch.cat([network(part.to(device)).float().cpu() for part in images.flatten(0, -4).split(_TOGETHER)])
    if found.shape != (len(found), network.num_features):
        raise InputError(f"the network gives features {tuple(found.shape)}; expected (n, {network.num_features})")
    whole: Tensor = found.unflatten(0, images.shape[:-3])
    return whole


@torch.no_grad()
def perceptual_distance(network: nn.Module, pictures: Tensor, others: Tensor) -> Tensor:
    """LPIPS of pairs, by a network of `open_lpips`: (..., 3, H, W) uint8, twice -> (...) float64, on the CPU.

    Raises:
        InputError: The two differ in shape.
    """
    device = _device(network)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        found: Tensor = network(one.to(device).float() / 255, other.to(device).float() / 255)
        return found

    return _in_pairs(distance, pictures, others)


def structural_similarity(pictures: Tensor, others: Tensor) -> Tensor:
    """SSIM of pairs: (..., 3, H, W) uint8 or floating point in [0, 1], twice -> (...) float64, at most 1.

    Raises:
        InputError: The two differ in shape or type, or are smaller than the window of 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if pictures.dim() >= 3 and min(pictures.shape[-2:]) < SMALLEST:
        raise InputError(f"images of {tuple(pictures.shape[-2:])} pixels; expected {SMALLEST} or more each way")

    def similarity(one: Tensor, other: Tensor) -> Tensor:
        return torch.as_tensor(
            structural_similarity_index_measure(_luma(one), _luma(other), data_range=1.0, reduction="none")
        )

    return _in_pairs(similarity, pictures, others)


def _in_pairs(measure: Callable[[Tensor, Tensor], Tensor], pictures: Tensor, others: Tensor) -> Tensor:
    """A number for each image and its other, (..., 3, H, W) -> (...) float64, in batches."""
    if pictures.shape != others.shape or pictures.dtype != others.dtype or pictures.dim() < 3:
        raise InputError(
            f"images {tuple(pictures.shape)} {pictures.dtype} and {tuple(others.shape)} {others.dtype}; expected two"
            " sets of one shape (..., 3, H, W) and one type"
        )
    sides = [each.reshape(-1, *each.shape[-3:]).split(_TOGETHER) for each in (pictures, others)]
    found = [measure(one, other).double().cpu().reshape(len(one)) for one, other in zip(*sides, strict=True)]
    return torch.cat(found).reshape(pictures.shape[:-3])


def _luma(pictures: Tensor) -> Tensor:
    """(n, 3, H, W) -> luma (n, 1, h, w) in [0, 1], averaged down to about 256 pixels."""
    values = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
    luma = (values * torch.tensor(_LUMA, device=values.device)[:, None, None]).sum(1, keepdim=True)
    factor = max(1, round(min(luma.shape[-2:]) / _SIDE))
    return functional.avg_pool2d(luma, factor) if factor > 1 else luma


def _device(network: nn.Module) -> torch.device:
    return next((each.device for each in network.parameters()), torch.device("cpu"))


@torch.no_grad()
def clip_scores(
    images: Tensor,
    prompts: Sequence[str],
    clip: str | tuple[Any, Any] = DEFAULT,
    warn: Callable[[str], None] = warnings.warn,
) -> Tensor:
    """CLIPScore of each image with its prompt, max(100 cos(E_image, E_text), 0).

    Args:
        images: (n, 3, H, W) uint8.
        prompts: n texts; what is longer than CLIP reads is cut off.
        clip: A hub id or folder of a CLIPModel, or (model, processor).
        warn: Called for prompts that are too long.

    Returns:
        (n,) between 0 and 100, float64.

    Raises:
        InputError: No CLIP under this name, images of another form, or another number of prompts.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise InputError(f"images {tuple(images.shape)} {images.dtype}; expected (n, 3, H, W) uint8")
    if len(images) != len(prompts) or len(prompts) == 0:
        raise InputError(f"{len(images)} images and {len(prompts)} prompts; expected one prompt for each image")
    model, processor = open_clip(clip) if isinstance(clip, str) else clip
    model, longest = model.eval(), model.config.text_config.max_position_embeddings
    texts = list(dict.fromkeys(prompts))
    if long := [text for text in texts if len(processor(text=[text])["input_ids"][0]) > longest]:
        more = f" ({len(long)} prompts are)" if len(long) > 1 else ""
        warn(f"CLIPScore: prompt {long[0]!r} is longer than the {longest} tokens that CLIP reads{more}; its end is cut")
    # One by one, so that a score does not depend on its batch. Truncation keeps the end-of-text token, which the
    # embedding is read at; torchmetrics' CLIPScore cuts it off.
    embedded = {}
    for text in texts:
        tokens = processor(text=[text], return_tensors="pt", truncation=True, max_length=longest)
        embedded[text] = model.get_text_features(**tokens.to(model.device)).pooler_output
    scores = []
    for picture, prompt in zip(images.cpu(), prompts, strict=True):
        values = processor(images=[picture], return_tensors="pt").to(model.device)
        seen = model.get_image_features(**values).pooler_output
        scores.append(100 * functional.cosine_similarity(seen, embedded[prompt]).clamp_min(0))
    return torch.cat(scores).double().cpu()


@dataclass(frozen=True)
class Instruments:
    """What to measure images with on request.

    Args:
        clip: (model, processor) of `open_clip`, for CLIPScore.
        features: Network of `open_features`, for FID and KID; None: the reader's own features.
        lpips: Network of `open_lpips`.
        features_name: Name of `features` in results.
    """

    clip: tuple[Any, Any] | None = None
    features: nn.Module | None = None
    lpips: nn.Module | None = None
    features_name: str = READER


def measure(experiment: Experiment, instruments: Instruments, warn: Callable[[str], None] = warnings.warn) -> None:
    """Measure every arm of neutral and unrelated prompts.

    The CLIPScore is with the neutral prompt, also of images that were drawn from another one.
    """
    protocol = experiment.protocol
    _measure(experiment.neutral, protocol.prompts, instruments, warn)
    if protocol.unrelated is not None:
        _measure(experiment.unrelated, protocol.unrelated, instruments, warn)
    if instruments.features is not None and experiment.reference is not None:
        experiment.reference.features = extracted(instruments.features, experiment.reference.images)


def _measure(arms: list[Drawn], rows: "Dataset", instruments: Instruments, warn: Callable[[str], None]) -> None:
    """The arms of one set of prompts, of which the untreated one is the first."""
    before, prompts = arms[0], [write(row) for row in rows]
    for arm in arms:
        if instruments.clip is not None:
            count = arm.images.shape[1]
            asked = [prompt for prompt in prompts for _ in range(count)]
            once = warn if arm is before else lambda warning: None
            arm.clip = clip_scores(arm.images.flatten(0, 1), asked, instruments.clip, once).unflatten(0, (-1, count))
        if instruments.lpips is not None and arm is not before:
            arm.lpips = perceptual_distance(instruments.lpips, arm.images, before.images)
        if instruments.features is not None:
            arm.features = extracted(instruments.features, arm.images)
