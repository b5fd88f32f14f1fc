"""Composition: factors multiply, roots meet in between, and neither the order nor the grouping matters."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.compose import compose
from stereoclinic.sns.mask import NeuronMask

SITES = [Site("a.ff.net.2", "ff", 3), Site("b.to_out.0", "attention", 2), Site("c.conv2", "conv", 2)]
few = settings(max_examples=25)
GENDER, AGE = ("female", "male"), ("old", "middle", "young")


@st.composite
def masks(draw, rooted=None, groups=(), everywhere=False):
    """Masks over some of the sites, with bins of their own; factors often exactly 0 or 1."""
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    sites = SITES if everywhere else draw(st.lists(st.sampled_from(SITES), min_size=1, unique=True))
    inner = draw(st.lists(st.sampled_from([900, 700, 500, 300]), unique=True))
    edges = torch.tensor(sorted([draw(st.sampled_from([1000, 950])), *inner, draw(st.sampled_from([0, 100]))])).flip(0)
    shape = (len(edges) - 1, sum(site.width for site in sites))
    if groups:
        shape = (len(groups), *shape)
    kind = torch.rand(shape, generator=generator)
    factors = torch.where(kind < 0.2, 0.0, torch.where(kind < 0.5, 1.0, torch.rand(shape, generator=generator)))
    rooted = draw(st.booleans()) if rooted is None else rooted
    roots = torch.randn(shape, generator=generator) if rooted else None
    return NeuronMask(sites, edges.double(), factors, roots, metadata={"seed": seed}, groups=groups)


def line(mask, site, t):
    """(s, (1 - s) r) of a site at a timestep, groups first: what the mask does to an activation there."""
    bin_ = mask.bin_of(t)
    span = {own.name: span for own, span in mask.spans()}.get(site.name)
    if span is None or bin_ is None:
        return torch.ones(site.width).double(), torch.zeros(site.width).double()
    s = mask.factors[..., bin_, span].double()
    return s, (1 - s) * (0.0 if mask.roots is None else mask.roots[..., bin_, span].double())


def everywhere():
    return itertools.product(SITES, (1200, 1000, 960, 920, 650, 300, 299, 150, 50, 0, -5))


def same(one, two, exact=False, atol=1e-6):
    for site, t in everywhere():
        for a, b in zip(line(one, site, t), line(two, site, t), strict=True):
            if exact:
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@few
@given(st.lists(masks(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_the_order_is_free_bit_for_bit(several, random):
    shuffled = random.sample(several, len(several))
    same(compose(several), compose(shuffled), exact=True)


@few
@given(masks(rooted=False), masks(rooted=False), masks(rooted=False))
def test_factors_multiply_however_they_are_grouped(a, b, c):
    together = compose([a, b, c])
    for site, t in everywhere():
        product = line(a, site, t)[0] * line(b, site, t)[0] * line(c, site, t)[0]
        torch.testing.assert_close(line(together, site, t)[0], product, atol=1e-7, rtol=1e-6)
    assert together.roots is None
    same(compose([compose([a, b]), c]), together)
    same(compose([a, compose([b, c])]), together)


@few
@given(masks(), masks(), masks())
def test_roots_group_freely_where_at_most_one_mask_silences(a, b, c):
    together, grouped = compose([a, b, c]), compose([compose([a, b]), c])
    for site, t in everywhere():
        one = sum((line(mask, site, t)[0] == 0).int() for mask in (a, b, c)) <= 1
        for got, want in zip(line(grouped, site, t), line(together, site, t), strict=True):
            torch.testing.assert_close(got[one], want[one], atol=1e-5, rtol=1e-4)


@few
@given(masks(rooted=True, everywhere=True), masks(rooted=False))
def test_masks_of_equal_roots_nest_as_they_compose(a, b):
    """a <- s_2 (s_1 a + (1 - s_1) r) + (1 - s_2) r, with one root for all neurons."""
    root = 0.7
    pair = [
        NeuronMask(mask.sites, mask.bin_edges, mask.factors, torch.full_like(mask.factors, root)) for mask in (a, b)
    ]
    together = compose(pair)
    for site, t in everywhere():
        (s1, o1), (s2, o2) = (line(mask, site, t) for mask in pair)
        s, o = line(together, site, t)
        torch.testing.assert_close(s, s1 * s2, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(o, s2 * o1 + o2, atol=1e-6, rtol=1e-5)


@few
@given(masks(), st.floats(0, 1))
def test_one_mask_alone_is_itself_and_ones_and_strength_zero_change_nothing(mask, strength):
    same(compose([mask]), mask, exact=True)
    still = NeuronMask(SITES, torch.tensor([1000.0, 0.0]), torch.ones(1, 7), torch.randn(1, 7))
    same(compose([mask, still]), mask)
    same(compose([mask, mask], [1.0, 0.0]), mask)
    scaled = compose([mask], [strength])
    for site, t in everywhere():
        s, o = line(mask, site, t)
        torch.testing.assert_close(line(scaled, site, t)[0], 1 - strength * (1 - s), atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(line(scaled, site, t)[1], strength * o, atol=1e-6, rtol=1e-5)


def of(factor, root):
    return NeuronMask(
        [Site("c.conv2", "conv", 1)], torch.tensor([1000.0, 0.0]), *(torch.tensor([[v]]) for v in (factor, root))
    )


def test_who_damps_harder_draws_nearer_and_who_silences_holds():
    assert compose([of(0.5, 1.0), of(0.5, 3.0)]).roots.item() == pytest.approx(2.0)
    assert compose([of(0.5, 1.0), of(0.25, 4.0)]).roots.item() == pytest.approx(3.0)  # it pulls twice as hard
    light = compose([of(0.99, 1.0), of(0.98, 4.0)]).roots.item()
    assert light == pytest.approx((0.01 * 1 + 0.02 * 4) / 0.03, rel=1e-2)  # about the mean weighed by 1 - s
    assert compose([of(0.5, 1.0), of(0.0, 4.0)]).roots.item() == 4.0
    assert compose([of(0.5, 1.0), of(0.0, 4.0), of(0.0, 2.0)]).roots.item() == 3.0
    assert compose([of(1.0, 1.0), of(1.0, 4.0)]).roots.item() == 0.0


@few
@given(masks(groups=GENDER), masks(groups=AGE), masks(), st.permutations([0, 1, 2]))
def test_allocating_masks_compose_to_every_combination_of_their_groups(gender, age, plain, order):
    several = [(gender, age, plain)[i] for i in order]
    together = compose(several)
    first = [mask.groups for mask in several if mask.allocates]
    assert together.groups == tuple(f"{one}+{two}" for one, two in itertools.product(*first))
    for one, two in itertools.product(GENDER, AGE):
        name = f"{one}+{two}" if first[0] == GENDER else f"{two}+{one}"
        same(together.group(name), compose([gender.group(one), age.group(two), plain]), exact=True)


@few
@given(masks(groups=GENDER), masks(groups=GENDER[::-1]))
def test_masks_of_the_same_groups_go_by_one_allotment(one, two):
    together = compose([one, two])
    assert together.groups == GENDER
    for name in GENDER:
        same(together.group(name), compose([one.group(name), two.group(name)]), exact=True)


def test_a_composition_says_what_it_was_made_of(tmp_path):
    shared = {"unet_shapes": "s", "unet_weights": "w", "model": "portraits"}
    edges = torch.tensor([1000.0, 0.0])
    parts = [
        NeuronMask(SITES, edges, torch.rand(1, 7), metadata={**shared, "axis": axis, "selection": {"k": k}})
        for axis, k in (("gender", 3), ("age", 5))
    ]
    parts.append(NeuronMask(SITES, edges, torch.rand(1, 7), metadata={"model": "portraits"}))  # made by hand
    together = compose(parts, [1.0, 0.5, 0.0])
    assert {key: together.metadata[key] for key in (*shared, "axis")} == {**shared, "axis": "gender+age"}
    assert together.metadata["selection"]["strengths"] == [1.0, 0.5, 0.0]
    assert together.metadata["selection"]["of"] == [part.metadata for part in parts]
    json.dumps(together.metadata)
    together.save(tmp_path / "m.pt")
    assert torch.equal(NeuronMask.load(tmp_path / "m.pt").factors, together.factors)


def plain(**changes):
    sites = changes.pop("sites", SITES[:1])
    fields = {"sites": sites, "bin_edges": torch.tensor([1000.0, 0.0]), "factors": torch.ones(1, 3)}
    return NeuronMask(**{**fields, **changes})


def grouped(*groups):
    return plain(factors=torch.ones(len(groups), 1, 3), groups=groups)


@pytest.mark.parametrize(
    ("several", "strengths", "match"),
    [
        ([], None, "no masks"),
        ([plain()], [1.0, 0.5], "2 strengths for 1 masks"),
        ([plain()], [1.1], "strength 1.1"),
        ([plain()], [float("nan")], "strength nan"),
        ([plain(), plain(branch="conditional")], None, "--branch conditional -o NEW"),
        ([plain(), plain(sites=[Site("a.ff.net.2", "conv", 3)])], None, "is ff with 3 neurons in one, conv"),
        ([plain(metadata={"unet_shapes": "one"}), plain(metadata={"unet_shapes": "two"})], None, "different shapes"),
        ([plain(metadata={"unet_weights": "one"}), plain(metadata={"unet_weights": "two"})], None, "or force"),
        ([grouped("a", "b"), grouped("b", "c")], None, "share 'b' but not all"),
        ([grouped("a+x", "b+x"), grouped("a", "b")], None, "also within compositions"),
    ],
)
def test_masks_that_do_not_fit_together(several, strengths, match):
    with pytest.raises(InputError, match=match) as caught:
        compose(several, strengths)
    assert "\n" not in str(caught.value)


def test_force_composes_masks_of_different_weights():
    several = [plain(metadata={"unet_weights": name}) for name in ("one", "two")]
    assert "unet_weights" not in compose(several, force=True).metadata
