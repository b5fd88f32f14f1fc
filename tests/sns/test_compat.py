"""A mask fits the model it was made for, under an adapter too, and no other."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.sns.conftest import SITES, small_mask
from torch import nn

from stereoclinic.errors import InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.compat import check_fits, has_other_weights, without_adapters


class Toy(nn.Module):
    def __init__(self, hidden=3):
        super().__init__()
        self.block = nn.Module()
        self.block.ff = nn.Module()
        self.block.ff.net = nn.ModuleList([nn.Linear(2, hidden), nn.Identity(), nn.Linear(hidden, 2)])
        self.block.to_out = nn.ModuleList([nn.Linear(2, 2)])


def test_a_cast_changes_the_weights_digest_and_not_the_shapes_digest():
    torch.manual_seed(0)
    toy = Toy()
    shapes, weights = shapes_digest(toy), weights_digest(toy)
    assert (shapes_digest(toy), weights_digest(toy)) == (shapes, weights)
    toy.half()
    assert shapes_digest(toy) == shapes
    assert weights_digest(toy) != weights
    assert shapes_digest(Toy(4)) != shapes
    with pytest.raises(InputError, match="meta"):
        weights_digest(toy.to("meta"))


def test_a_single_changed_bit_changes_the_weights_digest():
    toy = Toy()
    before = weights_digest(toy)
    with torch.no_grad():
        bias = toy.block.to_out[0].bias
        bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))
    assert weights_digest(toy) != before


def test_a_mask_fits_the_model_it_was_made_for_and_no_other():
    torch.manual_seed(0)
    toy = Toy()
    digests = {"unet_shapes": shapes_digest(toy), "unet_weights": weights_digest(toy)}
    mask = small_mask(metadata=digests)
    check_fits(mask, toy)
    check_fits(small_mask(metadata={}), Toy())  # without digests the sites decide

    other = Toy()
    with pytest.raises(InputError, match="other weights"):
        check_fits(mask, other)
    check_fits(mask, other, force=True)

    other.extra = nn.Linear(2, 2)  # a few-step sibling may have a layer more; what is damped must be the same
    with pytest.raises(InputError, match="other shapes"):
        check_fits(mask, other)
    check_fits(mask, other, force=True)
    assert has_other_weights(mask, other) and not has_other_weights(mask, toy)
    for force in (False, True):
        with pytest.raises(InputError, match="has 3 neurons in the mask, 4 in this Toy"):
            check_fits(mask, Toy(4), force)
        absent = small_mask(sites=[SITES[0], Site("far.to_out.0", "attention", 2)])
        with pytest.raises(InputError, match=r"no site 'far.to_out.0'"):
            check_fits(absent, toy, force)
        kind = small_mask(sites=[SITES[0], Site("block.to_out.0", "conv", 2)])
        with pytest.raises(InputError, match="has kind conv in the mask, and is a Linear in this Toy"):
            check_fits(kind, toy, force)


def test_adapters_round_layers_are_looked_through():
    torch.manual_seed(0)
    toy = Toy()
    mask = small_mask(metadata={"unet_shapes": shapes_digest(toy), "unet_weights": weights_digest(toy)})
    state = {name: value.clone() for name, value in toy.state_dict().items()}
    wrapped = get_peft_model(toy, LoraConfig(target_modules=["to_out.0", "net.2"])).base_model.model
    assert shapes_digest(wrapped) != mask.metadata["unet_shapes"]
    check_fits(mask, wrapped)
    bare = without_adapters(wrapped)
    assert bare.keys() == state.keys()
    assert all(torch.equal(bare[name], value) for name, value in state.items())
    with torch.no_grad():
        wrapped.block.to_out[0].base_layer.weight += 1
    with pytest.raises(InputError, match="other weights"):
        check_fits(mask, wrapped)
