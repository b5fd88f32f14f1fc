"""What the documentation shows is true: its commands parse, its Python runs, its manifests say one thing throughout."""

import importlib.util
import re
import shlex
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from tests.pipelines.tiny import build

import stereoclinic
from stereo_cli.main import app
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines import open_pipeline
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.axes import load_axis
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.policy import is_neutral

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (
    ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")),
)}  # fmt: skip
_SPEC = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
assert _SPEC is not None and _SPEC.loader is not None
hooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hooks)
COMMANDS: dict[str, Any] = hooks.leaves(typer.main.get_command(app))


def blocks(page: str, *languages: str) -> list[str]:
    """The blocks of code of a page, unindented."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", PAGES[page], re.MULTILINE | re.DOTALL)
    return [
        "\n".join(line.removeprefix(indent) for line in text.splitlines())
        for indent, language, text in found
        if language in languages
    ]


def manifests(page: str) -> list[dict]:
    return [each for text in blocks(page, "yaml") for each in yaml.safe_load_all(text)]


def shown() -> list[tuple[str, str]]:
    """Every `stereo COMMAND ...` of the pages, with the page: in blocks, in manifests, and within a line."""
    found = []
    for page, text in PAGES.items():
        lines = [line for block in blocks(page, "bash", "yaml") for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
        lines += [line for each in manifests(page) for line in _strings(each)]
        lines += re.findall(r"`([^`\n]*\bstereo [^`\n]*)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
        for line in chain.from_iterable(line.split("&&") for line in lines):
            match = re.search(r"(?:^|[\s/])stereo ((?:" + "|".join(COMMANDS) + r") .*)$", line.strip())
            # COMMAND, A and BOUND stand for something; a sentence goes on with dots.
            if match and not re.search(r"\.\.\.|\b[A-Z]+\b(?!\.)(?!=)", re.sub(r'"[^"]*"', "", match[1])):
                found.append((page, match[1]))
    return list(dict.fromkeys(found))


def _strings(value: Any) -> list[str]:
    """The texts in a manifest; a list that starts with a command is one text."""
    if isinstance(value, list) and value[:1] == ["stereo"]:
        return [shlex.join(value)]
    if isinstance(value, dict | list):
        return list(chain.from_iterable(map(_strings, value.values() if isinstance(value, dict) else value)))
    return [value] if isinstance(value, str) else []


def test_commands_are_found_in_every_form() -> None:
    texts = [text for _, text in shown()]
    assert "locate --dry-run" in texts  # a line of a block
    assert any(text.startswith("bench --model model --reader reader") for text in texts)  # a workflow
    assert any("--devices=4 --num-nodes=2" in text for text in texts)  # a list in a manifest
    assert any(text.startswith("apply") and page == "README.md" for page, text in shown())  # within a line
    assert len(texts) > 30


@pytest.mark.parametrize(("page", "text"), shown())
def test_a_command_that_is_shown_is_one(page: str, text: str) -> None:
    name = max((name for name in COMMANDS if f"{text} ".startswith(f"{name} ")), key=len)
    arguments = shlex.split(text.split("   ")[0], comments=True)[len(name.split()) :]
    try:
        COMMANDS[name].make_context(name, arguments)  # parses, and runs nothing
    except Exception as error:
        # Within a line only what matters there is said.
        if type(error).__name__ != "MissingParameter" or f"`stereo {text}`" not in PAGES[page]:
            raise


def test_the_reference_has_every_command_and_option() -> None:
    sections = dict(re.findall(r"^## stereo ([\w ]+)\n(.*?)(?=^## |\Z)", hooks.commands(), re.MULTILINE | re.DOTALL))
    assert list(sections) == list(COMMANDS)
    for name, command in COMMANDS.items():
        for flag in (flag for each in command.params for flag in each.opts if flag.startswith("-")):
            assert f"`{flag}`" in sections[name], (name, flag)
    assert "[`suppress`][stereoclinic.sns.damp.suppress]" in hooks.public_names()
    assert hooks.link_fault("https://kubernetes.io/docs/") is None and hooks.link_fault("method.md#the-lean") is None
    assert hooks.link_fault("http://kubernetes.io/") and hooks.link_fault("https://localhost/x")


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the pages are looked at when they are built."""
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES["README.md"])
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / link.split("#")[0]).exists(), link


def flags(arguments: str, *names: str) -> list[int]:
    return [int(re.search(rf"--{name}[= ](\d+)", arguments)[1]) for name in names]  # type: ignore[index]


def test_a_slurm_job_and_its_commands_agree() -> None:
    (script,) = (each for each in blocks("docs/guides/devices/slurm.md", "bash") if "#SBATCH" in each)
    asked = flags(script, "ntasks-per-node", "nodes")
    assert asked == flags(script, "gpus-per-node", "nodes")
    commands = [text for page, text in shown() if page.endswith("slurm.md") and "--devices" in text]
    assert len(commands) == 2
    assert all(flags(text, "devices", "num-nodes") == asked for text in commands)


def test_manifests_and_their_commands_agree() -> None:
    service, job, training = manifests("docs/guides/devices/kubernetes.md")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert flags(shlex.join(container["command"]), "devices", "num-nodes") == [gpus, job["spec"]["completions"]]
    assert job["spec"]["parallelism"] == job["spec"]["completions"]  # they wait for one another
    (port,) = (each["port"] for each in service["spec"]["ports"])
    said = {each["name"]: each.get("value") for each in container["env"]}
    assert said["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert said["MASTER_PORT"] == str(port) and pod["subdomain"] == service["metadata"]["name"] and "NODE_RANK" in said

    replicas = training["spec"]["pytorchReplicaSpecs"]
    (container,) = replicas["Worker"]["template"]["spec"]["containers"]
    pods = sum(each["replicas"] for each in replicas.values())
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert flags(container["args"][0], "devices", "num-nodes") == [gpus, pods]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_is_python(page: str) -> None:
    for text in blocks(page, "python"):
        compile(text, page, "exec")


def run(page: str, *changes: tuple[str, str]) -> dict[str, Any]:
    """Run the Python of a page, one block after the other, with what is too large or not here changed."""
    text, names = "\n".join(blocks(page, "python")), {"stereoclinic": stereoclinic}
    for old, new in changes:
        assert old in text, f"{page} no longer says {old}"
        text = text.replace(old, new)
    exec(compile(text, page, "exec"), names)
    return names


def test_the_axis_of_the_page_is_one(tmp_path: Path) -> None:
    (text,) = blocks("docs/guides/your-axis.md", "toml")
    (tmp_path / "age3.toml").write_text(text)
    axis = load_axis(tmp_path / "age3.toml")
    assert set(axis.also) == set(axis.phrases) == set(axis.classes) == set(axis.groups) and axis.unless
    assert not is_neutral("a photo of an elderly doctor", axis) and is_neutral("an old photo of a doctor", axis)


def test_the_python_of_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/reference/method.md")
    (block,) = blocks("docs/reference/method.md", "python")
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# (.+)$", block, re.MULTILINE)


def halving(unet: torch.nn.Module, *groups: str, axis: str = "gender") -> NeuronMask:
    """A mask that fits a model and damps all of it by half."""
    sites = find_sites(unet)
    factors = torch.full((len(groups) or 1, 1, sum(site.width for site in sites)), 0.5)
    about = {"unet_shapes": shapes_digest(unet), "unet_weights": weights_digest(unet), "axis": axis}
    branch = "conditional" if groups else "both"  # as `stereo plan` and `stereo locate` have it
    return NeuronMask(
        sites, torch.tensor([1000.0, 0.0]), factors if groups else factors[0], None, branch, about, groups
    )


def test_the_python_of_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unet = open_pipeline("portraits").unet
    halving(unet).save("gender.pt")
    halving(unet, "female", "male").save("gender-allocated.pt")
    made = run("docs/tutorial.md", ("num_inference_steps=20", "num_inference_steps=2"))
    assert len(made["images"]) == 3 and made["images"][0].size == (64, 64)
    assert made["groups"][-1] is None and all(made["groups"][:-1])  # the last prompt names one
    assert weights_digest(made["pipe"].unet) == weights_digest(unet)


def test_the_python_of_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mask = halving(open_pipeline("portraits").unet)
    mask.save("one.pt")
    made = run("docs/guides/export.md", ("num_inference_steps=20", "num_inference_steps=2"))
    assert made["image"].size == (64, 64) and type(made["pipe"].unet).__name__ == "PeftModel"


#: Settings that make a call quick.
LOCATE = "settings=stereoclinic.LocateSettings(limit=2, seeds=1, steps=5, every=1)"
PLAN = "settings=stereoclinic.PlanSettings(limit=2, seeds=1, steps=5, replans=1, check=0)"
EVALUATE = "settings=stereoclinic.EvaluateSettings(limit=2, images=2, group_images=1, steps=2)"


def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unet = open_pipeline("portraits").unet
    made = run(
        "README.md",
        ('locate("portraits", "gender")', f'locate("portraits", "gender", {LOCATE})'),
        ("relevance=relevance", f"relevance=relevance, {PLAN}"),
        ('{"gender": mask}', f'{{"gender": mask}}, {EVALUATE}'),
        ("num_inference_steps=20", "num_inference_steps=2"),
    )
    assert made["mask"].allocates and made["mask"].metadata["axis"] == "gender"
    assert len(made["images"]) == 4
    assert weights_digest(made["pipe"].unet) == weights_digest(unet)
    assert (tmp_path / "stereo-bench" / "report.html").is_file()


def test_the_python_of_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = run(
        "docs/reference/api/index.md",
        ("settings=LocateSettings(seeds=16)", LOCATE),
        ("settings=PlanSettings(guidance=2.0)", PLAN),
        ("settings=EvaluateSettings(images=25)", EVALUATE),
    )
    assert made["mask"].allocates and (tmp_path / "stereo-bench" / "results.json").is_file()


@pytest.mark.slow
def test_the_python_of_your_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of that family, tiny and random, and fewer prompts."""
    monkeypatch.chdir(tmp_path)
    model = build("sdxl")
    model.save_pretrained("models/sdxl")
    halving(model.unet.to(torch.bfloat16), "female", "male").save("gender-allocated.pt")
    made = run(
        "docs/guides/your-model.md",
        ("seeds=4", "limit=2, seeds=1"),
        ('accelerator="gpu"', 'accelerator="cpu"'),
        ('.to("cuda")', ""),
        ("in seeds]).images", "in seeds], num_inference_steps=2).images"),
    )
    assert len(made["images"]) == 4 and made["pipe"].unet.dtype == torch.bfloat16
