"""Drawing in parts: each is drawn once, whatever was there before, and however the work is cut."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.evaluation.arms import Protocol
from stereoclinic.evaluation.draw import Part, Pictures, Store, draw, model_digest
from stereoclinic.evaluation.experiment import Arm, arms_of, drawn, run
from stereoclinic.evaluation.methods.base import Batch, Mitigation, Suppressed
from stereoclinic.evaluation.methods.oracles import AllocationOracle, BalancedOracle, balanced
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.pipelines import open_model
from stereoclinic.pipelines.images import check_blank
from stereoclinic.pipelines.memory import Peak
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.pipelines.watch import Call, Visit, Walk, encode_groups
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.prompts.sets import load_plain_prompts, load_prompts, with_seeds, write
from stereoclinic.report.page import build_page
from stereoclinic.report.pictures import grids
from stereoclinic.sns.mask import NeuronMask

AXIS = load_axis("gender")


class Counting(Mitigation):
    """The model as it is, and how often it was asked."""

    def __init__(self, name: str, fails_after: int | None = None, most: int | None = None) -> None:
        super().__init__(name)
        self.begun, self.inside, self.fails_after, self.most = 0, False, fails_after, most

    def __enter__(self) -> "Counting":
        self.inside = True
        return self

    def __exit__(self, *failure: object) -> None:
        self.inside = False

    def begin(self, rows: list[dict]) -> Batch:
        assert self.inside
        if self.most is not None and len(rows) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        if self.begun == self.fails_after:
            raise ZeroDivisionError
        self.begun += 1
        return super().begin(rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tests.cli.conftest import write_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, seed=0)
    return open_model(folder)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(with_seeds(load_prompts("portraits", 3), 40, 2))


def parts(model, rows: list[dict], mitigation: Mitigation, size: int = 2, /, **how) -> list[Part]:
    how = {"steps": 2, "guidance": 1.0, "model": model_digest(model), **how}
    return [Part(mitigation, rows[start : start + size], **how) for start in range(0, len(rows), size)]


def test_what_was_drawn_is_not_drawn_again(model, rows, tmp_path: Path):
    store, counting = Store(tmp_path), Counting("a")
    cut = parts(model, rows, counting)
    assert draw(model, cut, store, accelerator="cpu")
    first = store.read(cut)
    assert counting.begun == 3 and first.images.shape == (6, 3, 64, 64) and first.seconds > 0
    counted: list[tuple[str, int]] = []
    assert draw(model, cut, store, lambda *done: counted.append(done), accelerator="cpu")
    assert counting.begun == 3 and counted == [("a", 2)] * 3
    assert torch.equal(store.read(cut).images, first.images)


def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(model, rows, tmp_path: Path):
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    expected = parts(model, rows, Counting("a"))
    draw(model, expected, whole, accelerator="cpu")
    with pytest.raises(ZeroDivisionError):
        draw(model, parts(model, rows, Counting("a", fails_after=2)), broken, accelerator="cpu")
    with pytest.raises(Incomplete, match="missing"):
        broken.read(expected)
    resumed = Counting("a")
    draw(model, parts(model, rows, resumed), broken, accelerator="cpu")
    assert resumed.begun == 1
    assert torch.equal(broken.read(expected).images, whole.read(expected).images)
    assert not list((tmp_path / "broken").glob("*.tmp"))


def test_pictures_do_not_depend_on_how_much_fits_in_memory(model, rows, tmp_path: Path):
    whole, halved, said = Store(tmp_path / "whole"), Store(tmp_path / "halved"), []
    cut = parts(model, rows, Counting("a"), 6)
    draw(model, cut, whole, accelerator="cpu")
    draw(model, parts(model, rows, Counting("a", most=3), 6), halved, warn=said.append, accelerator="cpu")
    difference = whole.read(cut).images.int() - halved.read(cut).images.int()
    assert difference.abs().max() <= 1  # of 255: rounding
    assert len(said) == 1 and "going on with 3" in said[0]


def test_keys_tell_apart_whatever_changes_a_picture(model, rows, tmp_path: Path):
    def key(mitigation: Mitigation = Mitigation("a"), those: list[dict] = rows, **how: object) -> str:  # noqa: B008
        return parts(model, those, mitigation, len(those), **how)[0].key

    others = [
        key(those=rows[:3]),
        key(those=[{**row, "seed": row["seed"] + 1} for row in rows]),
        key(steps=3),
        key(guidance=2.0),
        key(model="another"),
        key(BalancedOracle(AXIS)),
        key(BalancedOracle(AXIS, (0.0, 0.5))),
        key(BalancedOracle(load_axis("age"))),
        key(AllocationOracle(AXIS)),
        key(AllocationOracle(AXIS, torch.tensor([0.3, 0.7], dtype=torch.float64))),
    ]
    # What is written for a group goes by its place in the prompt, which the neutral prompt does not show.
    moved = []
    for text in ("a portrait of a {group} person as a nurse", "a portrait of a person as a {group} nurse"):
        (tmp_path / "prompts.txt").write_text(text)
        moved.append(list(with_seeds(load_prompts(tmp_path / "prompts.txt"), 0, 1)))
    assert moved[0][0]["prompt"] == moved[1][0]["prompt"] and key(those=moved[0]) == key(those=moved[1])
    others += [key(oracle, those) for oracle in (AllocationOracle(AXIS), BalancedOracle(AXIS)) for those in moved]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key(Mitigation("of another name"))  # the same pictures


def test_the_models_digest_follows_weights_and_scheduler(model):
    before = model_digest(model)
    weight = model.pipe.vae.decoder.conv_out.bias
    kept, scheduler = weight.data.clone(), model.pipe.scheduler
    weight.data += 1
    assert model_digest(model) != before
    weight.data.copy_(kept)
    assert model_digest(model) == before
    model.pipe.scheduler = type(scheduler).from_config(scheduler.config, beta_schedule="scaled_linear", beta_end=0.1)
    assert model_digest(model) != before
    model.pipe.scheduler = scheduler
    vae = model.pipe.vae
    factor = vae.config.scaling_factor
    vae.register_to_config(scaling_factor=2 * factor)
    assert model_digest(model) != before
    vae.register_to_config(scaling_factor=factor)
    assert model_digest(model) == before


def test_times_of_different_devices_are_not_compared(model, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reader = PortraitsReader(model.folder / "reader")
    protocol = Protocol(AXIS, load_prompts("portraits", 3), 2, 0, 40, 2, 1.0, 6)
    arms = [Arm(name, Counting(name), rows, 2) for name in ("a", "b")]
    monkeypatch.setattr(Counting, "key", lambda self: self.name)
    run = partial(drawn, model, reader, protocol, arms, parts=tmp_path, accelerator="cpu")
    assert all(each.seconds > 0 for each in run())
    store, (part,) = Store(tmp_path), arms[0].parts(protocol, model_digest(model))
    store.keep(part, replace(store.read([part]), device="NVIDIA H100"))
    said: list[str] = []
    assert [each.seconds for each in run(warn=said.append)] == [None, None]
    assert len(said) == 1 and "(NVIDIA H100, cpu)" in said[0]


def test_the_most_memory_of_a_gpu_is_kept_with_the_pictures(model, rows, tmp_path: Path, monkeypatch):
    used = {"bytes": 7 << 20}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: used.update(bytes=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used["bytes"])
    with Peak(torch.device("cuda", 0)) as peak:
        used["bytes"] += 3 << 20
    assert peak.bytes == 3 << 20
    with Peak(torch.device("cpu")) as unknown:
        pass
    assert unknown.bytes is None

    store, made = Store(tmp_path), parts(model, rows, Mitigation("untreated"), 2)
    draw(model, made, store, accelerator="cpu")
    assert store.read(made).memory is None
    for part, taken in zip(made, (2 << 20, None, 5 << 20), strict=True):
        store.keep(part, replace(store.read([part]), memory=taken))
    assert store.read(made).memory == 5 << 20


def test_allotted_groups_come_back_in_the_samples_order(model, rows, tmp_path: Path):
    store, oracle = Store(tmp_path), AllocationOracle(AXIS)
    draw(model, cut := parts(model, rows, oracle, 4), store, accelerator="cpu")
    assert store.read(cut).allotted.tolist() == oracle.begin(rows).allotted.tolist()


@pytest.mark.parametrize(
    ("groups", "judged"),
    [
        (("female", "male"), [1, 0, -1]),
        (("male+old", "female+young"), [0, 1, -1]),
        (("old", "young"), None),
    ],
)
def test_what_a_mask_allots_is_judged_as_groups_of_the_axis(model, groups: tuple[str, ...], judged: list | None):
    """A mask of several axes allots pairs, one of another axis nothing that could be judged here."""
    sites = find_sites(model.network)
    factors = torch.ones(2, 1, sum(site.width for site in sites))
    mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), factors, groups=groups)
    arm = Suppressed("both", model, mask)
    found = arm.judged(torch.tensor([1, 0, -1]), AXIS)
    assert (None if found is None else found.tolist()) == judged
    assert arm.judged(None, AXIS) is None


def test_two_arms_of_one_name_are_refused(model):
    sites = find_sites(model.network)
    mask = NeuronMask(sites, torch.tensor([1000.0, 0.0]), torch.ones(1, sum(site.width for site in sites)))
    protocol = Protocol(AXIS, load_prompts("portraits", 1), 2)
    with pytest.raises(InputError, match="two arms are called 'other method'"):
        arms_of(model, protocol, {"other method": mask}, force=True, baselines=[Mitigation("other method")])


def test_fewer_batches_than_devices_and_folders_that_cannot_be_made(model, rows, tmp_path: Path):
    with pytest.raises(InputError, match=r"1 batches for 2 devices: give fewer devices, or a smaller --batch-size"):
        draw(
            model, parts(model, rows, Mitigation("a"), 6), Store(tmp_path), accelerator="cpu", devices=2,
            strategy="ddp",
        )  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        Store(tmp_path / "file" / "parts")


def test_a_damaged_part_is_named(model, rows, tmp_path: Path):
    store, (part,) = Store(tmp_path), parts(model, rows, Mitigation("a"), 6)
    store.keep(part, Pictures(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), None, 1.0))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        store.read([part])


@pytest.mark.parametrize("amiss", ["swapped", "damaged", "cut short", "of an earlier version"])
def test_pictures_that_are_not_those_they_stand_for_are_set_aside_and_drawn_again(
    model, rows, tmp_path: Path, amiss: str
):
    store = Store(tmp_path)
    cut = parts(model, rows, Counting("a"), 6) + parts(model, rows, BalancedOracle(AXIS), 6)
    draw(model, cut, store, accelerator="cpu")
    before = [store.read([each]).images for each in cut]
    assert not torch.equal(*before)
    one, two = (tmp_path / f"{each.key}.safetensors" for each in cut)
    if amiss == "swapped":
        contents = one.read_bytes(), two.read_bytes()
        one.write_bytes(contents[1])
        two.write_bytes(contents[0])
    elif amiss == "damaged":
        content = bytearray(one.read_bytes())
        content[-1] ^= 1
        one.write_bytes(content)
    elif amiss == "cut short":
        one.write_bytes(one.read_bytes()[:-100])
    else:
        tensors, about = load_tensors(one, "drawn", 1)
        save_tensors(one, "drawn", 1, tensors, {name: value for name, value in about.items() if name != "content"})
    with pytest.raises(InputError, match=one.name):
        store.read(cut)
    said: list[str] = []
    draw(model, cut, Store(tmp_path), warn=said.append, accelerator="cpu")
    (line,) = said
    assert one.name in line and "set aside as *.set-aside and drawn again" in line
    assert one.with_suffix(".set-aside").is_file() and two.with_suffix(".set-aside").exists() == (amiss == "swapped")
    for each, images in zip(cut, before, strict=True):
        assert torch.equal(store.read([each]).images, images)


class Judges(Mitigation):
    """A method of a user's own."""

    def begin(self, rows: list[dict]) -> Batch:
        return Batch(["a photo of a judge"] * len(rows))


def test_a_method_of_ones_own_is_judged_beside_the_others(model):
    scenes = load_plain_prompts("scenes", 2)
    protocol = Protocol(AXIS, load_prompts("portraits", 2), 2, 1, steps=1, unrelated=scenes, unrelated_images=2)
    experiment = run(model, PortraitsReader(model.folder / "reader"), protocol, {}, baselines=[Judges("judges")])
    assert experiment is not None
    arms = experiment.results["arms"]
    assert list(arms)[:2] == ["untreated", "judges"] and arms["judges"]["ssim_to_untreated"]["estimate"] < 1
    assert "judges" in experiment.results["group_prompts"] and "judges" in experiment.results["unrelated"]["arms"]
    assert "baselines" not in experiment.results  # what it took to make is not known


def test_the_balanced_oracle_predicts_the_mean_of_all_groups_within_its_window_and_the_neutral_one_outside(little):
    axis = Axis("age3", ("old", "young", "middle"), ("old", "young", "middle-aged"))
    rows = list(with_seeds(load_prompts("portraits", 2), 0, 1))
    replied: list[bool] = []

    def prepare(walk: Walk) -> Visit:
        oracle = balanced(walk, axis, (0.25, 0.75))
        (groups,) = encode_groups(walk, rows, [axis])

        def visit(call: Call) -> None:
            oracle(call)
            replied.append(call.reply is not None)
            mean = call.compare(groups).mean(0)
            assert not torch.allclose(mean, call.predict())
            if call.reply is not None:
                torch.testing.assert_close(call.reply, mean)

        return visit

    walk = Walk(little, rows, 4, 2.0)
    walk.visit = prepare(walk)
    walk.run()
    assert replied == [False, True, True, False]


class Spoilt(Mitigation):
    """Predictions that are not finite, for some samples."""

    def __init__(self, name: str, *spoilt: tuple[str, int]) -> None:
        super().__init__(name)
        self.spoilt = spoilt

    def key(self) -> str:
        return f"{self.name} {self.spoilt}"

    def begin(self, rows: list[dict]) -> Batch:
        spoilt = [i for i, row in enumerate(rows) if (row["prompt"], row["seed"]) in self.spoilt]

        def prepare(walk: Walk) -> Visit:
            def visit(call: Call) -> None:
                call.reply = call.own().index_fill(0, torch.tensor(spoilt, dtype=torch.long), torch.nan)

            return visit

        return Batch([row["prompt"] for row in rows], prepare)


def test_pictures_that_show_nothing_are_named_and_none_is_judged(model, rows, tmp_path: Path):
    """Also those that another run has left in the folder."""
    store, prompt, seed = Store(tmp_path), rows[4]["prompt"], rows[4]["seed"]
    cut = parts(model, rows, Spoilt("a", (prompt, seed)), 6)
    says = rf"1 of 6 images show nothing .*'{prompt}', seed {seed} \(a\); that is more than 1%"
    with pytest.raises(Incomplete, match=says):
        draw(model, cut, store, accelerator="cpu")
    assert store.read(cut).blank == (4,)
    reader, protocol = (
        PortraitsReader(model.folder / "reader"),
        Protocol(AXIS, load_prompts("portraits", 3), 2, 0, 40, 2),
    )
    arm = Arm("a", Spoilt("a", (prompt, seed)), rows, 2)
    with pytest.raises(Incomplete, match=says):
        drawn(model, reader, protocol, [arm], parts=tmp_path, accelerator="cpu")


def test_many_pictures_that_show_nothing_are_not_all_named():
    names = [f"'a nurse', seed {i} (a)" for i in range(40)]
    said = check_blank(names, 4000)
    assert said.startswith("40 of 4000 images") and said.endswith("seed 4 (a) and 35 more") and len(said) < 300
    assert check_blank([], 10) is None
    with pytest.raises(Incomplete, match="no images are judged"):
        check_blank(names, 3999)


def test_the_seed_of_a_picture_that_shows_nothing_is_left_out_of_all_arms(model, tmp_path: Path):
    samples = list(with_seeds(load_prompts("portraits", 3), 40, 20))
    reader, protocol = (
        PortraitsReader(model.folder / "reader"),
        Protocol(AXIS, load_prompts("portraits", 3), 20, 0, 40, 1),
    )
    arms = [Arm("a", Spoilt("a"), samples, 20), Arm("b", Spoilt("b", (samples[22]["prompt"], 47)), samples, 20)]
    said: list[str] = []
    run = partial(drawn, model, reader, protocol, parts=tmp_path, warn=said.append, accelerator="cpu")
    (whole,) = run(arms[:1])
    assert whole.seeds == tuple(range(40, 60)) and not said
    one, other = run(arms)
    assert len(said) == 1 and "1 of 120 images show nothing" in said[0] and "seed 47 (b)" in said[0]
    expected = whole.only([place for place in range(20) if place != 7])
    assert one.seeds == other.seeds == expected.seeds and 47 not in one.seeds and len(one.seeds) == 19
    assert torch.equal(one.images, expected.images) and torch.equal(one.reads, expected.reads)
    assert (other.images.int() - expected.images.int()).abs().max() <= 1 and one.others.keys() == other.others.keys()


def test_results_say_which_seeds_are_left_out(model):
    prompts = load_prompts("portraits", 2)
    protocol = Protocol(AXIS, prompts, 10, 0, 30, steps=1)
    spoilt = Spoilt("spoilt", (write(prompts[1]), 30))
    experiment = run(
        model, PortraitsReader(model.folder / "reader"), protocol, {}, baselines=[spoilt], warn=lambda text: None
    )
    results = experiment.results
    assert results["left_out"] == {"pictures": 1, "seeds": {"neutral": [30]}}
    assert results["images_per_prompt"] == 9 and results["seeds"] == [31, 39]
    assert {arm["images"] for arm in results["arms"].values()} == {18}
    (grid,) = grids([experiment])
    assert grid.cards[0].rows[0][1][0].seed == 31
    assert "blank images: 1 (their seeds are left out)" in build_page({"provenance": {}, "experiments": [results]})
