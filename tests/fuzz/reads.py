"""What a command does with each kind of file, as far as it goes before it needs a model."""

import json
from contextlib import suppress
from pathlib import Path

import torch
from tests.fuzz.made import a_mask
from typer.testing import CliRunner

from stereo_cli import inspect_tables, tables
from stereo_cli.main import app
from stereoclinic.calls.evaluate import judged_too
from stereoclinic.calls.inputs import call_of, own_axis, patterns_of
from stereoclinic.calls.settings import ModelSettings
from stereoclinic.ddtd.checkpoint import Shards
from stereoclinic.ddtd.relevance import Relevance, shapes_of
from stereoclinic.errors import InputError
from stereoclinic.evaluation.compare import compare_results
from stereoclinic.evaluation.draw import Part, Store
from stereoclinic.evaluation.methods.base import Mitigation
from stereoclinic.evaluation.protocols import load_protocol
from stereoclinic.evaluation.readers import PortraitsReader, open_reader
from stereoclinic.evaluation.readers.hugging_face import parse_classes
from stereoclinic.evaluation.results import Results
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.prompts.axes import load_axis
from stereoclinic.report.atlas import mask_map, relevance_map
from stereoclinic.report.located import relevance_summary
from stereoclinic.report.responses import axis_of, settings_of
from stereoclinic.report.summary import lean_summary, mask_summary
from stereoclinic.sns.compose import compose
from stereoclinic.sns.diff import compare
from stereoclinic.sns.linear import adjusted, choose
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.plan import Unfinished

CONFIGURATION = {"samples": 4, "axis": "gender"}
PLANNING = {"root": "group", "seeds": [0, 1]}
PART = Part(Mitigation("untreated"), [{"prompt": "a", "seed": 0}, {"prompt": "a", "seed": 1}], 2, 1.0, "m")


def read_mask(path: Path) -> None:
    """As far as the commands go with a mask before they need its model."""
    mask = NeuronMask.load(path)
    summary = mask_summary(mask)
    json.dumps([summary, mask.made_on, len(mask.origins)])
    tables.mask_table(summary)
    inspect_tables.mask_tables(summary, 3)
    inspect_tables.metadata_table(summary["metadata"])
    call_of(ModelSettings(), mask.metadata)
    patterns_of(mask.metadata)
    judged_too(load_protocol("time"), "m", mask)
    compare(mask, adjusted(mask, 0.5, (1e9, -1e9)))
    mask_map(summary, "m")
    with suppress(InputError):
        compose([mask, a_mask()], force=True)
    with suppress(InputError):
        own_axis(mask)


def read_relevance(path: Path) -> None:
    """As far as the commands go with relevance before they need its model."""
    found = Relevance.load(path)
    leans, summary = lean_summary(found), relevance_summary(found, 3)
    json.dumps([leans, summary])
    tables.lean_table(leans)
    inspect_tables.relevance_tables(summary, 3)
    inspect_tables.metadata_table(summary["metadata"])
    call_of(ModelSettings(), found.metadata)
    patterns_of(found.metadata)
    relevance_map(summary, "r")
    choose(found)
    settings_of(found)
    axis_of(found)


def read_shard(path: Path) -> None:
    kept = Shards(path.parent, CONFIGURATION).kept()
    kept.sums(["a", "b"], shapes_of(2, 2, 2, 7, 3))


def read_results(path: Path) -> None:
    found = Results.load(path).data
    json.dumps(compare_results(found, found))


def read_part(path: Path) -> None:
    Store(path.parent).read([PART])


def read_unfinished(path: Path) -> None:
    Unfinished(path, PLANNING, neurons=3, steps=4).read()


def read_options(path: Path) -> None:
    """Options of a file, as far as the command's own values; an axis that is not there ends it either way."""
    result = CliRunner().invoke(app, ["locate", "--config", str(path), "--axis", "none"])
    if not isinstance(result.exception, SystemExit):
        raise AssertionError("the command did not end by itself") from result.exception
    if result.exit_code != 2 or "internal error" in result.stderr:
        raise AssertionError(f"exit code {result.exit_code}: {result.stderr[-2000:]}")
    if "unknown axis 'none'" not in result.stderr:
        raise InputError(result.stderr.strip().splitlines()[-1])


def read_model(path: Path) -> None:
    """A model's folder, whichever of its files is odd, up to where drawing would begin."""
    folder = next(each for each in (path, *path.parents) if (each / "model_index.json").is_file())
    model = open_model(folder)
    schedule_of(model, min(model.defaults.steps, 3), 1.0)


def read_reader(path: Path) -> None:
    PortraitsReader(path.parent).read(torch.zeros(1, 3, 8, 8))


def read_classifier(path: Path) -> None:
    open_reader(f"hf:{path.parent}", [load_axis("gender")])


def read_classes(path: Path) -> None:
    parse_classes([str(path)])
