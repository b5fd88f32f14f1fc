"""Networks for distances, with stubs in their place: the path is torchmetrics', and what is missing is told."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stereoclinic.errors import InputError
from stereoclinic.evaluation import instruments as extractors
from stereoclinic.evaluation.arms import OTHER, UNTREATED
from stereoclinic.evaluation.figures.summarise import summarise
from stereoclinic.evaluation.instruments import (
    Instruments,
    extracted,
    measure,
    open_features,
    open_lpips,
    perceptual_distance,
)


class Means(nn.Module):
    """Features as torchmetrics' FID takes a network for: uint8 in, `num_features` out."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


class Apart(nn.Module):
    """In the place of LPIPS; like torchmetrics', it squeezes what it gives."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        assert one.max() <= 1 and one.min() >= 0
        return (one - other).abs().mean((1, 2, 3)).squeeze()


def test_frechet_distances_are_those_of_torchmetrics_with_the_same_network(make):
    experiment = make({"m": 0.5}, side=16)
    measure(experiment, Instruments(features=Means(), features_name="means"))
    found = summarise(experiment, ["m"])["arms"]
    for name, key, other in (("m", "frechet_to_untreated", UNTREATED), ("m", "frechet_to_other_seeds", OTHER)):
        fid = FrechetInceptionDistance(feature=Means()).set_dtype(torch.float64)
        fid.update(experiment.arm(name).images.flatten(0, 1), real=False)
        fid.update(experiment.arm(other).images.flatten(0, 1), real=True)
        assert found[name][key] == pytest.approx(float(fid.compute()), rel=1e-4)
    assert experiment.reference.features.shape == (3, 20, 12)


def test_features_keep_the_place_of_each_picture_whatever_is_done_together(make, monkeypatch):
    images = make(side=16).arm(UNTREATED).images
    together = extracted(Means(), images)
    monkeypatch.setattr(extractors, "_TOGETHER", 7)
    torch.testing.assert_close(extracted(Means(), images), together)
    torch.testing.assert_close(together[1, 3], Means()(images[1, 3:4])[0])


def test_lpips_is_of_the_same_seeds_with_its_interval_and_other_seeds_show_the_floor(make):
    experiment = make({"m": 0.5}, side=16)
    experiment.arm("m").images = experiment.arm(UNTREATED).images.clone()
    experiment.arm("m").images[:, ::2] = 255 - experiment.arm("m").images[:, ::2]
    measure(experiment, Instruments(lpips=Apart()))
    arms = summarise(experiment, ["m"])["arms"]
    assert "lpips_to_untreated" not in arms[UNTREATED]
    before = experiment.arm(UNTREATED).images.double() / 255
    expected = (1 - 2 * before[:, ::2]).abs().mean() / 2  # half of the pictures are as they were
    found = arms["m"]["lpips_to_untreated"]
    assert found["estimate"] == pytest.approx(float(expected), rel=1e-4)
    assert found["low"] < found["estimate"] < found["high"] < arms[OTHER]["lpips_to_untreated"]["low"]


def test_lpips_is_symmetric_and_zero_of_the_same_picture():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(0, 256, (2, 2, 33, 3, 8, 8), generator=generator, dtype=torch.uint8)  # 33: one is left
    found = perceptual_distance(Apart(), one, other)
    assert found.shape == (2, 33) and bool((found > 0).all())
    torch.testing.assert_close(perceptual_distance(Apart(), other, one), found)
    assert not perceptual_distance(Apart(), one, one).any()
    with pytest.raises(InputError, match="one shape"):
        perceptual_distance(Apart(), one, other[:, 1:])


def test_a_network_that_gives_another_shape_is_refused(make):
    network = Means()
    network.num_features = 5
    with pytest.raises(InputError, match=r"expected \(n, 5\)"):
        extracted(network, make().arm(UNTREATED).images)


@pytest.mark.parametrize(
    ("open_it", "extra"), [(lambda: open_features("inception"), "inception"), (open_lpips, "lpips")]
)
def test_without_the_package_the_error_says_what_to_install(monkeypatch, open_it, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"pip install 'stereoclinic\[{extra}\]'"):
        open_it()


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'x'"), RuntimeError("operator torchvision::nms does not exist\nmore")],
)
def test_a_package_that_does_not_work_is_told_in_one_line(monkeypatch, error):
    def broken(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", broken)
    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", broken)
    for open_it in (lambda: open_features("inception"), open_lpips):
        with pytest.raises(InputError, match="pip install") as caught:
            open_it()
        assert str(error).splitlines()[0] in str(caught.value) and "\n" not in str(caught.value)


def test_names_of_features():
    assert open_features("reader") is None
    with pytest.raises(InputError, match="choose from reader, inception"):
        open_features("vgg")
