"""What the speed benchmarks measure with, on tiny denoisers. How long anything took is no business of a test."""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.cli.conftest import write_model

from stereoclinic.calls.cost import drawing
from stereoclinic.ddtd.trajectory import Settings
from stereoclinic.evaluation.arms import Protocol
from stereoclinic.evaluation.experiment import arms_of
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.opening import open_model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds
from stereoclinic.sns.mask import NeuronMask

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"
NAMES = (
    "measure",
    "problems",
    "step",
    "watching",
    "adapters",
    "peers",
    "locate",
    "suppression",
    "treatments",
    "fullsize",
)


@pytest.fixture(scope="module")
def speed() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules; they find each other beside themselves, as when one is run."""
    sys.path.insert(0, str(SPEED))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(SPEED))
        for name in NAMES:
            sys.modules.pop(name, None)


def within(monkeypatch: pytest.MonkeyPatch, speed: dict[str, ModuleType], name: str) -> None:
    """Run a script's parts here instead of in processes of their own, each of which would import everything anew."""
    monkeypatch.setattr(
        speed["measure"],
        "in_own_process",
        lambda script, part, options, **more: speed[name].job(
            argparse.Namespace(**{**vars(options), "part": part, **more})
        ),
    )


def test_step_prints_a_row_a_composite_and_writes_its_figures(speed, monkeypatch, capsys, tmp_path) -> None:
    within(monkeypatch, speed, "step")
    file = tmp_path / "step.json"
    asked = ["epsilon-cp", "zplus-cp", "gradient"]
    options = ["--model", "tiny", "--batch", "1", "--pairs", "2", "--threads", "1", "--json", str(file)]
    speed["step"].main(options + [word for name in asked for word in ("--composite", name)])
    shown, written = capsys.readouterr().out, json.loads(file.read_text())
    assert [row["composite"] for row in written["rows"]] == asked
    for row in written["rows"]:
        assert row["error"] is None and row["composite"] in shown
        assert 0 < row["time"]["low"] <= row["time"]["median"] <= row["time"]["high"] < math.inf
        assert 0 < row["plain_seconds"] < math.inf and 0 < row["rule_seconds"] < math.inf
        assert 0 < row["peak"] < math.inf
    assert {"torch", "device", "dtype", "threads", "load"} <= set(written["environment"])


@pytest.mark.parametrize("model", ["tiny", "portraits", "portraits-flow"])
def test_a_problem_asks_for_the_gradient_at_every_site(speed, model) -> None:
    problem = speed["problems"].build(model, 2)
    sites = find_sites(problem.network)
    activations, grads = speed["problems"].differentiate(problem, sites, nullcontext)
    assert set(activations) == set(grads) == {site.layer for site in sites}
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads.values())


def test_watching_is_compared_with_the_call_that_nobody_watches(speed, monkeypatch, capsys, tmp_path) -> None:
    within(monkeypatch, speed, "watching")
    write_model(tmp_path / "tiny", seed=0)
    file, watching, calls = tmp_path / "watching.json", speed["watching"], []
    call_pipeline = watching.call_pipeline
    monkeypatch.setattr(watching, "call_pipeline", lambda *how: calls.append(how[1]) or call_pipeline(*how))
    arguments = "--batch 2 --steps 2 --pairs 2 --threads 1 --guidance 2 --json"
    watching.main(["--model", str(tmp_path / "tiny"), *arguments.split(), str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert row["guidance"] == 2 and 0 < row["time"]["low"] <= row["time"]["median"] <= row["time"]["high"]
    assert calls == [None] * 5 and "1.02" in capsys.readouterr().out  # once to compare, twice to warm up, two pairs

    def other(*how):
        torch.manual_seed(1)
        return call_pipeline(*how[:3], [torch.Generator().manual_seed(5) for _ in how[3]], *how[4:])

    monkeypatch.setattr(watching, "call_pipeline", other)
    with pytest.raises(RuntimeError, match="draws other pictures"):
        watching.main(["--model", str(tmp_path / "tiny"), *arguments.split(), str(file)])


def test_what_raises_costs_its_own_row_alone(speed, monkeypatch, capsys, tmp_path) -> None:
    failing = tmp_path / "script.py"
    failing.write_text("import sys\nsys.exit('no such thing')\n")
    parser = speed["measure"].parser("", 1, 1)
    options = speed["measure"].parsed(parser, lambda options: {}, [])
    assert speed["measure"].in_own_process(str(failing), "time", options) == {"error": "no such thing"}

    def part(options: argparse.Namespace) -> dict:
        raise ValueError("first line\nsecond line")

    with pytest.raises(SystemExit):
        speed["measure"].parsed(parser, part, ["--job", json.dumps({"threads": torch.get_num_threads()})])
    assert json.loads(capsys.readouterr().out) == {"error": "ValueError: first line"}
    speed["step"].show("tiny", [{"composite": "gamma-cp", "error": "ValueError: first line"}], options)
    assert "gamma-cp: ValueError: first line" in capsys.readouterr().out


def test_pairs_alternate_who_goes_first(speed) -> None:
    calls: list[str] = []
    first, second = speed["measure"].paired(lambda: calls.append("a"), lambda: calls.append("b"), 4, warm=1)
    assert "".join(calls) == "ab" + "abbaabba" and len(first) == len(second) == 4


def test_a_constant_ratio_has_no_spread(speed) -> None:
    found = speed["measure"].ratio([3.0, 6.0, 1.5], [2.0, 4.0, 1.0])
    assert found == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_peak_is_what_is_held_at_a_time(speed) -> None:
    size = 2**18
    peak = speed["measure"].peak_allocated

    def together() -> None:
        a, b = torch.empty(size), torch.empty(size)
        del a, b

    def in_turn() -> None:
        for _ in range(2):
            a = torch.empty(size)
            del a

    assert peak(together) == 2 * peak(in_turn) == 2 * 4 * size


def test_relevance_of_the_three_inputs_conserves(speed) -> None:
    peers, problem = speed["peers"], speed["problems"].build("tiny", 2)
    assert peers.conservation_error(problem, peers.PEERS["ours epsilon-cp"][1]) < 1e-9
    assert peers.conservation_error(problem, peers.plain) > 0.01


def test_sampling_is_the_trajectory_that_locate_walks(speed, monkeypatch) -> None:
    locate = speed["locate"]
    rows = with_seeds(load_prompts("portraits", 2), 0, 1)
    model, visited = Model(locate.random_text("tiny", "cpu", torch.float64), "tiny"), list[torch.Tensor]()
    scheduler = type(model.pipe.scheduler)
    step = scheduler.step

    def kept(*args, **named):
        found = step(*args, **named)
        visited.extend(found[:1] if len(found[0]) == 2 else ())  # texts are encoded by a call of more rows
        return found

    settings = Settings(steps=3, guidance=3.0, every=2, bins=1)
    settings.timesteps(model)  # is learnt now
    monkeypatch.setattr(scheduler, "step", kept)
    found = locate.walk_against_sampling(model, rows, 2, settings, 1, "cpu")
    assert all(math.isfinite(value) for value in found["time"].values())
    walks = torch.stack(visited).unflatten(0, (-1, 3))  # both, twice: one pair warms up
    assert len(walks) == 4
    for walk in walks[1:]:
        torch.testing.assert_close(walk, walks[0])


def test_every_kind_of_mask_acts_while_it_is_timed_and_leaves_no_trace(speed) -> None:
    suppression = speed["suppression"]
    problem = suppression.guided("tiny", 4)
    untouched = problem.predict(problem.latents, problem.states)
    for kind in suppression.KINDS[1:]:
        mask = suppression.mask_of(kind, problem)
        with suppression.treated(kind, mask, problem):
            assert not torch.equal(problem.predict(problem.latents, problem.states), untouched), kind
        assert torch.equal(problem.predict(problem.latents, problem.states), untouched), kind


def test_figures_are_over_processes(speed, monkeypatch, tmp_path, capsys) -> None:
    within(monkeypatch, speed, "suppression")
    file = tmp_path / "times.json"
    arguments = "--model tiny --kind nothing --kind allotted --batch 4 --pairs 1 --processes 2 --threads 1 --json"
    speed["suppression"].main([*arguments.split(), str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["kind"], len(row["processes"])) for row in rows] == [("nothing", 2), ("allotted", 2)]
    assert "2 processes of 1 pairs" in capsys.readouterr().out
    assert all(0 < each["in_hooks"] < 1 for row in rows for each in row["processes"])
    assert speed["measure"].over_processes([3.0, 1.0, 1.5]) == {"median": 1.5, "low": 1.0, "high": 3.0}


def test_what_hooks_take_is_watched_and_nothing_else_is(speed, monkeypatch) -> None:
    suppression, clock = speed["suppression"], [0.0]
    monkeypatch.setattr(suppression.time, "perf_counter", lambda: clock[0])
    problem = suppression.guided("tiny", 4)
    (site, *_), inner = find_sites(problem.network), problem.network.conv_in

    def taking(seconds: float):
        def hook(*_: object) -> None:
            clock[0] += seconds

        return hook

    handles = [
        problem.network.get_submodule(site.layer).register_forward_pre_hook(taking(2.0)),
        problem.network.register_forward_pre_hook(taking(3.0)),
        inner.register_forward_hook(taking(50.0)),  # what the network itself takes
    ]
    with suppression.timed(problem) as spent:
        problem.predict(problem.latents, problem.states)
    assert sum(spent) == 5.0 and len(spent) == 1 + len(find_sites(problem.network))
    for handle in handles:
        handle.remove()
    spent.clear()
    problem.predict(problem.latents, problem.states)
    assert not spent  # the watch is gone


def test_treatments_act_while_pictures_are_drawn(speed, monkeypatch, tmp_path) -> None:
    treatments, drawn = speed["treatments"], {}
    draw = treatments.draw

    def kept(*args):
        drawn.setdefault(tuple(acting), []).append(draw(*args))

    acting: list[str] = []
    compare = treatments.compare

    def noted(options, model, rows, treatment) -> float:
        acting[:] = [treatment.name]
        return compare(options, model, rows, treatment)

    monkeypatch.setattr(treatments, "draw", kept)
    monkeypatch.setattr(treatments, "compare", noted)
    within(monkeypatch, speed, "treatments")
    file = tmp_path / "times.json"
    arguments = "--baseline equisteer --batch 2 --steps 2 --pairs 1 --processes 1 --threads 1 --json"
    treatments.main([*arguments.split(), str(file)])
    assert list(json.loads(file.read_text())["ratios"]) == ["nothing", "EquiSteer"]
    for name, alike in (("nothing", True), ("EquiSteer", False)):  # with it and without, in turn
        assert torch.equal(drawn[(name,)][0], drawn[(name,)][1]) is alike


def test_full_size_counts_the_arms_that_a_bench_draws(speed, tmp_path) -> None:
    write_model(tmp_path / "tiny", seed=0)
    model, axis = open_model(tmp_path / "tiny"), load_axis("gender")
    sites = find_sites(model.network)
    mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), torch.ones(1, sum(site.width for site in sites)))
    protocol = Protocol(axis, load_prompts("portraits", 3))
    counted = drawing(model, [protocol], arms_of(model, protocol, {"m": mask}, force=True))
    full = speed["fullsize"]
    assert counted.arms == full.ARMS and counted.oracle == 0
    assert counted.grouped == full.GROUPED_ARMS * len(axis) * protocol.group_images
    one = full.FullSize("one", counted.neurons, 1.0, 8)
    pictures = 3 * (full.ARMS * protocol.images + counted.grouped)
    assert full.costs(one, 3, None)["bench"].plain == pictures * full.STEPS * full.BLOCKS
