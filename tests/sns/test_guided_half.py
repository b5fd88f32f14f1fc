"""A mask of the conditional branch: the unconditional half of a guided batch is left alone."""

import pytest
import torch
from tests.pipelines.tiny import build
from tests.pipelines.tiny_table import SMALL
from tests.sns.conftest import random_mask, run

from stereoclinic.errors import InputError
from stereoclinic.sns.damp import suppress


@pytest.mark.parametrize("rooted", [False, True])
def test_the_conditional_branch_leaves_the_unconditional_half_bit_identical(network, inputs, rooted):
    mask = random_mask(network, rooted=rooted, branch="conditional")
    before = run(network, inputs)
    with suppress(network, random_mask(network, rooted=rooted)):
        both = run(network, inputs)
    with suppress(network, mask, guided=True):
        after = run(network, inputs)
    assert torch.equal(after[:2], before[:2])
    torch.testing.assert_close(after[2:], both[2:])
    # Without guidance the whole batch is conditional.
    for guided in (None, False):
        with suppress(network, mask, guided=guided):
            assert torch.equal(run(network, inputs), both)


@pytest.fixture(scope="module")
def pipe():
    return build("sd1")


def first_prediction(pipe, guidance):
    """Of the denoiser in the pipeline's own call, all rows."""
    seen = []
    with pipe.unet.register_forward_hook(lambda module, args, output: seen.append(output[0])):
        noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
        prompts = ["a photo of a doctor", "a photo of a nurse"]
        options = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "latent", **SMALL}
        pipe(prompts, generator=noise, **options)
    return seen[0]


def test_a_pipeline_s_guidance_is_found_out_at_every_call(pipe):
    mask, both = random_mask(pipe.unet, branch="conditional"), random_mask(pipe.unet)
    before, after, treated = {}, {}, {}
    for guidance in (3.0, 1.0):
        before[guidance] = first_prediction(pipe, guidance)
        with suppress(pipe, both):
            treated[guidance] = first_prediction(pipe, guidance)
    with suppress(pipe, mask):
        for guidance in (3.0, 1.0, 3.0):
            after[guidance] = first_prediction(pipe, guidance)
    assert torch.equal(after[3.0][:2], before[3.0][:2])
    torch.testing.assert_close(after[3.0][2:], treated[3.0][2:])
    assert torch.equal(after[1.0], treated[1.0])
    assert not torch.allclose(after[1.0], before[1.0], atol=1e-3)
    with suppress(pipe, mask, guided=False):  # the word of the caller goes first
        assert torch.equal(first_prediction(pipe, 3.0), treated[3.0])


def test_guidance_that_cannot_be_is_refused(network, inputs):
    three = tuple(value[:3] for value in inputs)
    mask = random_mask(network, branch="conditional")
    with suppress(network, mask, guided=True), pytest.raises(InputError, match="batch of 3 has no two halves"):
        run(network, three)
