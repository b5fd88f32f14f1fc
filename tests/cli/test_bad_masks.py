"""Masks that a command refuses: damaged, of another kind, model or axis, given twice."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stereoclinic.calls.apply import axes_of
from stereoclinic.pipelines.sites import Site
from stereoclinic.prompts.axes import load_axis
from stereoclinic.sns.compose import compose
from stereoclinic.sns.mask import NeuronMask


@pytest.mark.parametrize("command", [("bench",), ("apply", "a photo of a doctor")])
def test_a_mask_for_another_model(refused, model, located, tmp_path: Path, command: tuple):
    mask = NeuronMask.load(located)
    other = NeuronMask(mask.sites, mask.bin_edges, mask.factors, metadata={**mask.metadata, "unet_weights": "0" * 64})
    other.save(tmp_path / "weights.pt")
    assert "other weights" in refused(*command, "--model", model, "--mask", "weights.pt")
    (site, *rest) = mask.sites
    moved = NeuronMask([type(site)("elsewhere.conv2", site.kind, site.width), *rest], mask.bin_edges, mask.factors)
    moved.save(tmp_path / "shapes.pt")
    for flags in ((), ("--force",)):
        assert "does not fit" in refused(*command, "--model", model, "--mask", "shapes.pt", *flags)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.98])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_truncated_mask(refused, model, located, tmp_path: Path, part: float, ending: str):
    path = tmp_path / f"m.{ending}"
    NeuronMask.load(located).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    says = "is empty" if part == 0 else "is truncated"
    assert says in refused("bench", "--model", model, "--mask", path)
    assert says in refused("inspect", path)


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def test_a_pickle_that_would_run_code(refused, model, tmp_path: Path):
    trace = tmp_path / "ran"
    torch.save({"stereoclinic": Payload(trace)}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(trace)))
    for name in ("zip.pt", "bare.pt"):
        for command in (("bench", "--mask"), ("inspect",), ("apply", "a photo of a doctor", "--mask")):
            flags = () if command == ("inspect",) else ("--model", model)
            assert name in refused(*command, name, *flags)
            assert not trace.exists()


def test_a_file_of_another_kind(refused, model, located):
    relevance = located.with_name("gender.relevance.safetensors")
    assert "is a relevance file; expected a mask file" in refused("bench", "--model", model, "--mask", relevance)


def test_seeds_that_the_mask_was_made_on(refused, model, located):
    line = refused("bench", "--model", model, "--mask", located, "--seed", 1, "--images", 3)
    assert "seeds 1 to 4 overlap seeds 0 to 1" in line
    assert "--seed 2" in line


def test_a_mask_given_twice(refused, model, located):
    assert "given twice" in refused("bench", "--model", model, *("--mask", located) * 2)
    assert "given twice" in refused("apply", "a photo of a doctor", "--model", model, *("--mask", located) * 2)


def test_a_mask_of_an_axis_that_only_has_a_shipped_name(refused, model, located, tmp_path: Path):
    mask = NeuronMask.load(located)
    own = {**mask.metadata, "words": ["agender", "bigender"]}
    NeuronMask(mask.sites, mask.bin_edges, mask.factors, metadata=own).save(tmp_path / "own.pt")
    assert "--axis gender.toml" in refused("bench", "--model", model, "--mask", "own.pt")
    (gate,) = axes_of(NeuronMask.load(tmp_path / "own.pt"))
    assert gate.words == ("agender", "bigender")


def test_a_mask_of_several_axes_is_judged_on_one(refused, model, located, tmp_path: Path):
    mask = NeuronMask.load(located)
    aged = {**mask.metadata, "axis": "age", "words": list(load_axis("age").words)}
    other = NeuronMask(mask.sites, mask.bin_edges, mask.factors, metadata=aged)
    compose([mask, other]).save(tmp_path / "both.pt")
    for command in ("bench", "--mask"), ("mask", "--dose", 0.3, "-o", "dosed.pt"):
        line = refused(*command, "both.pt", "--model", model)
        assert "choose one: --axis gender or --axis age" in line


def test_a_mask_of_other_layers(refused, opening, located, tmp_path: Path):
    mask = NeuronMask.load(located)
    own = {name: mask.metadata[name] for name in ("axis", "words", "seeds")}
    layer = Site("transformer_blocks.0.attn.to_out.0", "attention", 32)
    NeuronMask([layer], mask.bin_edges, mask.factors[:, :32], metadata=own).save(tmp_path / "other.pt")
    renamed = [replace(site, name=site.name.replace("down_blocks.1", "down_blocks.7")) for site in mask.sites]
    NeuronMask(renamed, mask.bin_edges, mask.factors, metadata=own).save(tmp_path / "renamed.pt")
    cut = [replace(mask.sites[0], width=mask.sites[0].width - 1), *mask.sites[1:]]
    NeuronMask(cut, mask.bin_edges, mask.factors[:, 1:], metadata=own).save(tmp_path / "cut.pt")
    for name, says in (
        ("other.pt", "has no site 'transformer_blocks.0.attn.to_out.0'"),
        ("renamed.pt", "has no site 'down_blocks.7"),
        ("cut.pt", f"has {cut[0].width} neurons in the mask, {cut[0].width + 1} in this UNet2DConditionModel"),
    ):
        commands = [each for each in opening if located in each]
        assert [each[0] for each in commands] == ["mask", "bench", "apply"]
        for command in commands:
            assert says in refused(*(name if each == located else each for each in command)), command
