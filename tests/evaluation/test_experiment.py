"""What is judged beside what: arms, the groups that a mask allots, a method of one's own, an oracle."""

import pytest
import torch
from tests.evaluation.conftest import AXIS

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import Protocol
from stereoclinic.evaluation.experiment import arms_of, run
from stereoclinic.evaluation.methods.base import Batch, Mitigation, Suppressed
from stereoclinic.evaluation.methods.oracles import balanced
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.pipelines.watch import Call, Visit, Walk, encode_groups
from stereoclinic.prompts.axes import Axis
from stereoclinic.prompts.sets import load_plain_prompts, load_prompts, with_seeds
from stereoclinic.sns.mask import NeuronMask


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
