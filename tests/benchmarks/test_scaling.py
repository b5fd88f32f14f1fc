"""The scaling benchmarks measure what they say. How long anything took is no business of a test."""

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCALING = Path(__file__).parents[2] / "benchmarks" / "scaling"


@pytest.fixture(scope="module")
def scaling() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(SCALING))
    try:
        yield {name: importlib.import_module(name) for name in ("bookkeeping", "ranks")}
    finally:
        sys.path.remove(str(SCALING))
        for name in ("bookkeeping", "ranks", "problems"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("stream", [False, True])
def test_bookkeeping_goes_through_every_prompt(scaling, stream: bool, tmp_path: Path):
    options = argparse.Namespace(prompts=30, stream=stream, batch=4)
    found = scaling["bookkeeping"].measure(options, tmp_path)
    assert found["tenths"][-1]["prompts"] == 30 and all(row["rate"] > 0 for row in found["tenths"])
    assert list((tmp_path / "shards").iterdir())


def test_the_clock_counts_nested_calls_once(scaling):
    clock = scaling["ranks"].Clock()
    inner = clock.timed(lambda: time.sleep(0.05))
    outer = clock.timed(lambda: (inner(), inner()))
    began = time.perf_counter()
    outer()
    inner()
    assert 0.15 <= clock.seconds <= time.perf_counter() - began
