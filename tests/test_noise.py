"""Samples: every prompt meets every seed, and noise follows from prompt and seed alone."""

import pytest
import torch

from stereoclinic.prompts.sets import (
    COLUMNS,
    load_prompts,
    noise,
    with_seeds,
)


def test_every_prompt_meets_every_seed():
    samples = with_seeds(load_prompts("portraits", 2), 5, 3)
    assert [row["seed"] for row in samples] == [5, 5, 6, 6, 7, 7]
    assert [row["prompt"] for row in samples] == ["a photo of a doctor", "a photo of a nurse"] * 3
    assert [row["number"] for row in samples] == list(range(len(samples)))
    assert all(set(COLUMNS) <= set(row) for row in samples)
    assert samples[-1] == samples[5] and samples[2:4] == [samples[2], samples[3]]
    left = samples.without([0, 4])
    assert list(left) == [samples[number] for number in (1, 2, 3, 5)] and left.labels == samples.labels
    with pytest.raises(IndexError):
        samples[6]


def test_noise_follows_from_prompt_and_seed_alone():
    samples = with_seeds(load_prompts("portraits", 2), 0, 2)
    whole = [noise(row, (2, 4, 4)) for row in samples]
    backwards = [noise(row, (2, 4, 4)) for row in reversed(list(samples))]
    assert all(torch.equal(a, b) for a, b in zip(whole, reversed(backwards), strict=True))
    torch.manual_seed(3)
    bare = {"prompt": samples[0]["prompt"], "seed": samples[0]["seed"]}
    assert torch.equal(noise(bare, (2, 4, 4)), whole[0])  # no other column matters
    assert not any(torch.equal(whole[i], whole[j]) for i in range(4) for j in range(i))
    assert not torch.equal(noise(bare, (2, 4, 4), "another purpose"), whole[0])


def test_noise_is_the_same_whatever_the_default_dtype():
    row = {"prompt": "p", "seed": 1}
    expected = noise(row, (8,))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(noise(row, (8,)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_noise_is_standard_normal():
    values = noise({"prompt": "p", "seed": 1}, (100_000,))
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise({"prompt": "p", "seed": 1}, (4,))
    assert torch.equal(torch.get_rng_state(), before)
