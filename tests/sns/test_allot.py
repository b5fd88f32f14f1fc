"""Allotting: each sample of a batch gets its own group's factors, and one that gets none is left alone."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sns.conftest import GROUPS, random_mask, run

from stereoclinic.errors import InputError
from stereoclinic.sns.damp import suppress


def signed_zeros(mask):
    """The same mask with every second root a zero of either sign, where an offset could change a sign."""
    roots = mask.roots.clone()
    roots[..., ::4], roots[..., 2::4] = 0.0, -0.0
    return replace(mask, roots=roots)


entries = st.lists(st.sampled_from([*GROUPS, None]), min_size=2, max_size=2)


@settings(max_examples=12)
@given(entries, entries, st.booleans(), st.sampled_from(["conditional", "both"]))
def test_each_sample_gets_its_own_whatever_its_batch_mates_get(network, inputs, one, two, rooted, branch):
    """And one that is left alone comes out bit for bit as in the batch untreated."""
    mask = random_mask(network, 0, rooted, GROUPS, branch=branch)
    untreated = run(network, inputs)
    alone = {None: untreated}
    for group in GROUPS:
        with suppress(network, mask.group(group), guided=True):
            alone[group] = run(network, inputs)
    with suppress(network, mask, guided=True) as suppression:
        for samples in (one, two):
            suppression.allot(samples)
            got = run(network, inputs)
            for i, name in enumerate(samples):
                assert torch.equal(got[2 + i], alone[name][2 + i])
                assert torch.equal(got[i], alone[name][i])  # untreated, if the branch is the conditional one
                assert branch == "both" or torch.equal(got[i], untreated[i])


@pytest.mark.parametrize("branch", ["conditional", "both"])
@pytest.mark.parametrize("guided", [False, True])
def test_allotting_a_group_to_all_is_that_groups_mask(network, inputs, guided, branch):
    mask = random_mask(network, rooted=True, groups=GROUPS, branch=branch)
    with suppress(network, mask.group("b"), guided=guided):
        expected = run(network, inputs)
    for samples in ("b", ["b"], ["b"] * (2 if guided else 4)):
        with suppress(network, mask, guided=guided) as suppression:
            suppression.allot(samples)
            assert torch.equal(run(network, inputs), expected)


def test_left_alone_nothing_is_computed(network, inputs, monkeypatch):
    before = run(network, inputs)
    monkeypatch.setattr("stereoclinic.sns.damp.damp", None)  # it would raise
    for mask in (
        random_mask(network, rooted=True, groups=GROUPS),
        random_mask(network, rooted=True),
        random_mask(network, branch="conditional"),
    ):
        with suppress(network, mask, guided=True) as suppression:
            for samples in (None, False, [None], [False, None], torch.tensor([False, False])):
                suppression.allot(samples)
                assert torch.equal(run(network, inputs), before)


def test_a_gate_leaves_samples_of_a_plain_mask_alone(network, inputs):
    before = run(network, inputs)
    with suppress(network, random_mask(network, rooted=True)) as suppression:
        treated = run(network, inputs)
        suppression.allot([True, False, None, True])
        got = run(network, inputs)
        suppression.allot(True)
        assert torch.equal(run(network, inputs), treated)
    assert torch.equal(got, torch.stack([treated[0], before[1], before[2], treated[3]]))


def test_roots_of_either_zero_leave_untouched_samples_alone(network, inputs):
    before = run(network, inputs)
    with suppress(network, signed_zeros(random_mask(network, rooted=True, groups=GROUPS))) as suppression:
        suppression.allot(["a", None, "b", None])
        got = run(network, inputs)
    assert torch.equal(got[1::2], before[1::2])
    assert not torch.equal(got[::2], before[::2])


def test_what_cannot_be_allotted(network, inputs):
    with suppress(network, random_mask(network, groups=GROUPS)) as suppression:
        with pytest.raises(InputError, match=r"images to a, b, c, and nothing was allotted yet; call allot"):
            run(network, inputs)
        for samples in (["a", "d"], [True], [3]):
            with pytest.raises(InputError, match=r"not known; choose from a, b, c, or None"):
                suppression.allot(samples)
        with pytest.raises(InputError, match="no sample"):
            suppression.allot([])
        suppression.allot(["a", "b"])
        with pytest.raises(InputError, match=r"2 samples are allotted, but the call draws 4;"):
            run(network, inputs)
    with suppress(network, random_mask(network, groups=GROUPS), guided=True) as suppression:
        suppression.allot(["a", "b", "c", None])
        with pytest.raises(InputError, match=r"4 samples are allotted, but the call draws 2;"):
            run(network, inputs)
    with (
        suppress(network, random_mask(network)) as suppression,
        pytest.raises(InputError, match="no groups; expected True"),
    ):
        suppression.allot(["a"])


def test_samples_treated_differently_need_the_batch_whole(network, inputs):
    blocks = [module for module in network.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block.set_chunk_feed_forward(1, 0)
    try:
        with suppress(network, random_mask(network)) as suppression:
            run(network, inputs)
            suppression.allot([True, False, True, True])
            with pytest.raises(InputError, match="ran on 1 rows of a batch of 4"):
                run(network, inputs)
    finally:
        for block in blocks:
            block.set_chunk_feed_forward(None)
