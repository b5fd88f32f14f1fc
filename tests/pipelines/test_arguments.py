"""Arguments as rows: found by comparing calls, taken, parted and put together again, whatever tree they stand in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stereoclinic.pipelines import arguments as tree

Make = Callable[[int], Any]


@dataclass(frozen=True)
class Leaf:
    """How a leaf looks in a call for some pictures: row i holds i + 1, and what rows share holds 0."""

    kind: str  # tensor, list, shared, number
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def make(self, count: int) -> Any:
        shape, rows = (*self.before, count, *self.after), torch.arange(1.0, count + 1)
        if self.kind == "tensor":
            return rows.view(*[1] * len(self.before), count, *[1] * len(self.after)).expand(shape).clone()
        if self.kind == "list":
            return [torch.full((*self.before, *self.after), float(i)) for i in rows]
        return torch.zeros((*self.before, *self.after)) if self.kind == "shared" else 0.5

    @property
    def axis(self) -> int | None:
        return len(self.before) if self.kind == "tensor" else None


SIZES = st.lists(st.integers(1, 3), max_size=2).map(tuple)
LEAVES = st.builds(Leaf, st.sampled_from(["tensor", "list", "shared", "number"]), SIZES, SIZES)
# A list of leaves is never empty, nor can it double: what doubles is a list with one entry a row.
TREES = st.dictionaries(
    st.sampled_from("abcd"),
    st.recursive(
        LEAVES,
        lambda inner: st.dictionaries(st.sampled_from("xyz"), inner) | st.lists(inner, min_size=1, max_size=3),
        max_leaves=5,
    ),
    min_size=1,
)


def made(template: Any, count: int) -> Any:
    if isinstance(template, dict):
        return {name: made(each, count) for name, each in template.items()}
    if isinstance(template, list):
        return [made(each, count) for each in template]
    return template.make(count)


def axes_of(template: Any, path: tree.Path = ()) -> dict[tree.Path, int | None]:
    if isinstance(template, Leaf):
        return {path: template.axis} if template.kind in ("tensor", "list") else {}
    pairs = template.items() if isinstance(template, dict) else enumerate(template)
    return {key: axis for name, each in pairs for key, axis in axes_of(each, (*path, name)).items()}


def taken(arguments: Any, axes: tree.Axes, rows: list[int]) -> Any:
    return tree.changed(arguments, lambda path, x: tree.take(x, axes[path], rows) if path in axes else x, axes)


def alike(one: Any, two: Any) -> bool:
    """Equal as trees, tensors bit for bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(alike(one[name], two[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(alike, one, two))
    return tree.same(one, two)


@given(TREES)
def test_rows_are_found_by_comparing_a_call_for_one_with_a_call_for_two(template: dict) -> None:
    assert tree.row_axes(made(template, 1), made(template, 2)) == axes_of(template)
    assert tree.row_axes(made(template, 2), made(template, 4)) == axes_of(template)


@given(TREES, st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_taking_rows_takes_them_everywhere_and_leaves_what_they_share(template: dict, rows: list[int]) -> None:
    axes = axes_of(template)
    whole = made(template, 5)
    some = taken(whole, axes, rows)
    for path, leaf in tree.leaves(some, axes):
        if path not in axes:
            assert leaf is tree.get(whole, path)
            continue
        assert tree.length(leaf, axes[path]) == len(rows)
        each = leaf if axes[path] is None else leaf.unbind(axes[path])
        assert all((row == number + 1).all() for row, number in zip(each, rows, strict=True))


@given(TREES, st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_parts_put_together_are_the_whole(template: dict, sizes: list[int]) -> None:
    axes, count = axes_of(template), sum(sizes)
    whole, starts = made(template, count), [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [taken(whole, axes, list(range(i, i + n))) for i, n in zip(starts, sizes, strict=True)]

    def join(path: tree.Path, leaf: Any) -> Any:
        return tree.joined([tree.get(part, path) for part in parts], axes[path]) if path in axes else leaf

    assert alike(tree.changed(parts[0], join, axes), whole)


@given(TREES)
def test_a_change_is_a_copy_and_leaves_are_those_that_it_meets(template: dict) -> None:
    axes, whole = axes_of(template), made(template, 2)
    met: list[tree.Path] = []
    copy = tree.changed(whole, lambda path, leaf: met.append(path) or leaf, axes)
    assert alike(copy, whole) and copy is not whole
    assert met == [path for path, _ in tree.leaves(whole, axes)]
    for path in met:
        tree.put(copy, path, "another")
        assert tree.get(copy, path) == "another"
        assert not isinstance(tree.get(whole, path), str)


def test_all_rows_in_their_order_are_the_leaf_itself() -> None:
    x, each = torch.randn(2, 3), [torch.randn(1), torch.randn(1)]
    assert tree.take(x, 0, range(2)) is x and tree.take(each, None, [0, 1]) is each
    assert tree.take(x, 1, [2, 0]).tolist() == x[:, [2, 0]].tolist()
    assert tree.joined([x], 0) is x


def test_what_does_not_double_in_one_dimension_alone_holds_no_rows() -> None:
    one, two = torch.zeros(2, 3), torch.zeros(4, 6)
    assert tree.row_axes({"x": one}, {"x": two}) == {}
    assert tree.row_axes({"x": torch.zeros(0, 3)}, {"x": torch.zeros(0, 3)}) == {}
    assert tree.row_axes({"x": one, "gone": one}, {"x": torch.zeros(2, 3, 1)}) == {}
    assert tree.row_axes({"x": []}, {"x": []}) == {}


@pytest.mark.parametrize(
    ("one", "two", "equal"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(1), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), 1.0, False),
        (3, 3.0, True),
        (None, 0, False),
        ([torch.ones(2)], (torch.ones(2),), True),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], False),
        ([[torch.ones(2)], None], [[torch.ones(2)], None], True),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), False),
    ],
)
def test_leaves_are_the_same_bit_for_bit(one: Any, two: Any, equal: bool) -> None:
    assert tree.same(one, two) == tree.same(two, one) == equal


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"timestep": torch.tensor(500)}, 500.0),
        ({"timestep": torch.tensor([0.25, 0.25])}, 0.25),
        ({"t": 3}, 3.0),
        ({"timestep": None, "timesteps": torch.tensor([7])}, 7.0),
        ({"time": 3}, None),
    ],
)
def test_the_timestep_goes_by_several_names(given: dict, expected: float | None) -> None:
    assert tree.timestep_of(given) == expected


def test_timesteps_that_differ_within_a_batch_are_no_timestep() -> None:
    with pytest.raises(ValueError, match=r"timesteps \[1.0, 2.0\] differ within a batch"):
        tree.timestep_of({"timestep": torch.tensor([1.0, 2.0])})


class Network(nn.Module):
    def forward(self, latents: Tensor, timestep: Tensor, *, text: Any = None, **more: Any) -> tuple[Tensor, str]:
        return latents, "more"


def test_arguments_go_by_the_names_of_forward_however_they_are_given() -> None:
    network, x, t = Network(), torch.ones(1), torch.tensor(5)
    expected = {"latents": x, "timestep": t, "text": 3, "extra": 4}
    for args, kwargs in (((x, t), {}), ((x,), {"timestep": t}), ((), {"latents": x, "timestep": t})):
        for each in (network, torch.compile(network, backend="eager")):
            assert tree.named(each, args, {**kwargs, "text": 3, "extra": 4}) == expected
            assert tree.first_name(each) == "latents"
    assert tree.named(network, (x, t), {}) == {"latents": x, "timestep": t}
    assert tree.inner(torch.compile(network)) is network is tree.inner(network)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x, "more"),
        lambda x: UNet2DConditionOutput(sample=x),
        lambda x: (list(x.unbind(0)), "more"),
        lambda x: UNet2DConditionOutput(sample=list(x.unbind(0))),
    ],
)
def test_the_prediction_in_an_output_can_be_replaced(form: Callable[[Tensor], Any]) -> None:
    """In a tensor, a tuple or an output object; as a tensor, or as a list of one a row."""
    x, other = torch.randn(2, 3), torch.randn(2, 3)
    output = form(x)
    assert torch.equal(tree.stacked(tree.sample_of(output)), x)
    new = tree.with_sample(output, tree.like(tree.sample_of(output), other))
    assert type(new) is type(output) and type(tree.sample_of(new)) is type(tree.sample_of(output))
    assert torch.equal(tree.stacked(tree.sample_of(new)), other)
    assert torch.equal(tree.stacked(tree.sample_of(output)), x)
    assert not isinstance(output, tuple) or new[1:] == output[1:]
