"""`stereo bench --baseline`: other methods beside a mask, made on seeds that are not judged."""

import json
from pathlib import Path

SMALL = ("--limit", 2, "--images", 2, "--group-images", 1, "--steps", 2, "--quiet", "--baseline-seeds", 1)


def test_other_methods_stand_beside_the_mask_with_what_they_cost(stereo, model, located, tmp_path: Path):
    arguments = ("bench", "--model", model, "--mask", located, "-o", tmp_path, *SMALL)
    result = stereo(*arguments, "--baseline", "prompt", "--baseline", "equisteer")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "results.json").read_text())["experiments"][0]
    names = list(found["baselines"])
    assert len(names) == 2 and set(names) < set(found["arms"]) and set(names) < set(found["group_prompts"])
    prompt, steering = (found["baselines"][name] for name in names)
    assert prompt["forward"] == 0 and steering["forward"] > 0 and steering["source"] and steering["needs"]
    # What practice does is the allocation oracle, on neutral prompts.
    oracle = found["arms"]["allocation oracle"]
    assert found["arms"][names[0]]["prompts"] == oracle["prompts"]
    assert "Other methods" in result.stdout and names[1] in result.stdout


def test_what_baselines_refuse(stereo, model, tmp_path: Path):
    arguments = ("bench", "--model", model, "-o", tmp_path, *SMALL)
    for given, says in (
        (("--baseline", "nothing"), "choose from prompt"),
        (("--baseline", "uce", "--baseline", "uce"), "given twice"),
        (("--baseline", "prompt", "--seed", 99), "seed 100 is judged"),
        (("--baseline", "prompt", "--devices", 2), "give --devices 1"),
    ):
        result = stereo(*arguments, *given)
        assert result.exit_code == 2 and says in result.stderr, result.stderr
