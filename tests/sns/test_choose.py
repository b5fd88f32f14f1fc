"""Choosing by settings is choosing by hand; a mask changed step by step is one changed at once."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stereoclinic.calls.locate import LocateSettings
from stereoclinic.calls.mask import MaskSettings
from stereoclinic.calls.settings import Option
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.errors import InputError
from stereoclinic.pipelines.sites import Site
from stereoclinic.sns.linear import adjusted, choose, forecast, static_mask, treatment_plan
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.select import Selection, top_k

SITES = [Site("a.ff.net.2", "ff", 6), Site("b.conv2", "conv", 4)]
P, T, K, N = 3, 4, 2, 10
EDGES = torch.tensor([1000.0, 800.0, 600.0, 300.0, 0.0])


@pytest.fixture(scope="module")
def relevance():
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lean = random(P, T, 1) * torch.tensor([1.0, -1.0])
    return Relevance(
        SITES, ("female", "male"), ["doctor", "nurse", "judge"], EDGES, torch.full((P, T), 5.0, dtype=torch.float64),
        5 * lean, 5 * lean.square(), 5 * random(P, T, K, N), 5 * random(P, T, N), 25 + random(T, N).abs(),
        random(P, T, 2, N), 5 * random(K, T, N), {"axis": "gender"},
    )  # fmt: skip


def equal(a, b):
    roots = a.roots is b.roots is None or torch.equal(a.roots, b.roots)
    return torch.equal(a.factors, b.factors) and roots and a.metadata == b.metadata and a.branch == b.branch


def test_the_defaults_are_those_of_locate():
    assert LocateSettings().selection() == MaskSettings().selection() == Selection()
    for name in ("until", "branch"):  # None where not given: a mask keeps its own
        (option,) = (each for each in LocateSettings.model_fields[name].metadata if isinstance(each, Option))
        assert option.default == f"{getattr(Selection(), name):{'g' if name == 'until' else ''}}"


def test_a_plan(relevance):
    assert equal(choose(relevance, Selection()), treatment_plan(relevance, 1.0, window=(1000.0, 600.0), per_bin=False))
    chosen = choose(
        relevance,
        Selection(
            mu=0.1, overshoot=0.5, at_most=3, since=900, until=0, kinds=("ff",), root="balanced", per_bin=True,
            branch="conditional",
        ),
    )  # fmt: skip
    by_hand = treatment_plan(
        relevance, 0.1, overshoot=0.5, at_most=3, window=(900, 0), kinds=("ff",), root="balanced", per_bin=True
    )
    assert equal(chosen, replace(by_hand, branch="conditional"))


def test_top_k(relevance):
    chosen = choose(relevance, Selection("top-k", top=2.0, z=0.0))
    assert equal(chosen, top_k(relevance, 2, window=(1000.0, 600.0), z=0.0))
    chosen = choose(relevance, Selection("top-k", top=0.3, per_bin=True, until=0))
    assert equal(chosen, top_k(relevance, 0.3, window=(1000.0, 0), per_bin=True))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"select": "best"}, "select 'best': expected plan or top-k"),
        ({"branch": "left"}, "branch 'left': expected conditional or both"),
        ({"z": float("nan")}, "z nan"),
        ({"until": 1000}, "from 1000 until 1000: nothing is left to damp; timesteps run from 1000 down to 0"),
        ({"since": 500}, "from 500 until 600: nothing is left"),
        ({"kinds": ("mlp",)}, "'mlp' is not known"),
        ({"root": "x"}, "root 'x'"),
        ({"select": "top-k", "top": 11}, "expected 1 to 10"),
    ],
)
def test_settings_that_do_not_fit_are_refused(relevance, settings, says):
    with pytest.raises(InputError, match=says):
        choose(relevance, Selection(**settings))


def mask():
    factors = torch.rand(T, N, generator=torch.Generator().manual_seed(1))
    selection = {"method": "plan", "mu": 1.0, "bins": [{}] * T}
    return NeuronMask(SITES, EDGES, factors, factors + 1, "conditional", {"axis": "gender", "selection": selection})


@given(st.floats(0, 1), st.floats(0, 1))
def test_strengths_multiply(one, other):
    twice = adjusted(adjusted(mask(), one), other)
    torch.testing.assert_close(twice.factors, adjusted(mask(), one * other).factors)
    assert (twice.factors >= mask().factors - 1e-6).all()


def test_full_strength_at_all_timesteps_is_the_mask_itself():
    made = mask()
    assert adjusted(made) is made
    assert torch.equal(adjusted(made, 0.0).damping, torch.zeros(T, N))


def test_narrowing_and_scaling_go_in_any_order_and_say_so():
    made = mask()
    one = adjusted(adjusted(made, 0.5), window=(900, 600))
    other = adjusted(adjusted(made, window=(900, 600)), 0.5)
    both = adjusted(made, 0.5, (900, 600))
    assert torch.equal(one.factors, other.factors)
    assert torch.equal(one.factors, both.factors)
    assert torch.equal(both.factors, 1 - 0.5 * made.windowed((900, 600)).damping)
    assert (both.branch, both.metadata["axis"]) == ("conditional", "gender")
    assert both.metadata["selection"] == {"method": "plan", "mu": 1.0}  # what the plan forecast is no longer so
    assert both.metadata["adjusted"] == [{"strength": 0.5, "window": [900, 600]}]
    assert one.metadata["adjusted"] == [{"strength": 0.5, "window": None}, {"strength": 1.0, "window": [900, 600]}]
    assert "bins" in made.metadata["selection"]


def test_an_allocating_mask_is_adjusted_for_every_group():
    factors = torch.rand(K, T, N, generator=torch.Generator().manual_seed(2))
    made = NeuronMask(SITES, EDGES, factors, groups=("female", "male"))
    for name in made.groups:
        whole = adjusted(made, 0.5, (900, 0)).group(name)
        assert torch.equal(whole.factors, adjusted(made.group(name), 0.5, (900, 0)).factors)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(InputError, match=r"expected 0 \(no damping\) to 1"):
        adjusted(mask(), strength)


@pytest.mark.parametrize("per_bin", [True, False])
def test_a_plan_s_forecast_is_that_of_its_mask(relevance, per_bin):
    mask = treatment_plan(relevance, 0.1, window=(1000.0, 600.0), per_bin=per_bin)
    for line, planned in zip(forecast(relevance, mask), mask.metadata["selection"]["bins"], strict=True):
        if planned["lean_after"] is None:  # outside the window the plan says nothing; the mask does nothing
            assert line["lean_after"] == line["lean_before"] and line["off_axis"] == 0
        else:
            assert line == pytest.approx(planned, rel=1e-5)
    with pytest.raises(InputError, match="has other sites than the mask"):
        forecast(relevance, replace(mask, sites=[Site("a.ff.net.2", "ff", N)]))


@pytest.mark.parametrize("groups", [(), ("female", "male")])
@pytest.mark.parametrize("rooted", [False, True])
def test_a_static_mask_is_the_nearest_that_weights_can_hold(groups, rooted):
    g = torch.Generator().manual_seed(1)
    shape = (*([2] if groups else []), T, N)
    factors = torch.rand(shape, generator=g)
    factors[..., 2:, :] = 1.0  # damps from 1000 to 600
    roots = torch.randn(shape, generator=g) if rooted else None
    mask = NeuronMask(SITES, EDGES, factors, roots, "conditional", {"selection": {"bins": []}}, groups)
    made = static_mask(mask)
    assert (made.branch, made.groups, made.bin_edges.tolist()) == ("both", (), [1000, 0])
    assert made.metadata["adjusted"][-1]["static"] is True and "bins" not in made.metadata["selection"]

    def distance(s: torch.Tensor, offset: torch.Tensor | None) -> float:
        """Of `s a + offset` from what the mask does where it acts, on activations of mean 0 and variance 1."""
        apart = (factors[..., :2, :] - s).square()
        if roots is not None:
            apart = apart + ((1 - factors) * roots)[..., :2, :].sub(offset).square()
        return float((apart * torch.tensor([200.0, 200.0])[:, None]).sum())

    offset = None if made.roots is None else (1 - made.factors) * made.roots
    least = distance(made.factors, offset)
    for _ in range(5):
        noise = 0.05 * torch.randn(2, 1, N, generator=g)
        assert least < distance(made.factors + noise[0], None if offset is None else offset + noise[1])
    again = static_mask(made)
    assert torch.equal(again.factors, made.factors)


def test_a_static_mask_of_one_that_is_the_same_where_it_acts_damps_just_so(relevance):
    mask = treatment_plan(relevance, 0.1, window=(1000.0, 600.0), per_bin=False)
    made = static_mask(mask)
    assert torch.equal(made.factors[0], mask.factors[0])
    assert [line["lean_after"] for line in forecast(relevance, made)][:2] == [
        line["lean_after"] for line in forecast(relevance, mask)
    ][:2]
