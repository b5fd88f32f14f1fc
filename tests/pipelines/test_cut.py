"""Where a prompt is cut is found in every family by what its denoiser is told; short prompts are not looked at."""

import pytest
from tests.pipelines.tiny import TINY, build
from tests.pipelines.tiny_parts import WORDS

from stereoclinic.pipelines import conditions as cut
from stereoclinic.pipelines.conditions import cut_prompts, first_unread
from stereoclinic.pipelines.model import Model


def text(words: int) -> str:
    return " ".join(WORDS[10:][:words])  # after the signs


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "pixart-sigma", "lumina2", "z-image"])
def test_a_prompt_is_read_up_to_one_word_and_no_further(name: str):
    model = Model(build(name), call=TINY[name].call)
    guidance, steps = TINY[name].guidance, TINY[name].steps
    guidance = model.defaults.guidance if guidance is None else guidance
    long = text(60)
    assert cut_prompts(model, ["a photo of a doctor", long, long], guidance, steps) == [long]
    number, word = first_unread(model, long, guidance, steps)
    assert word == WORDS[10:][number - 1] and 10 < number <= 60
    assert cut_prompts(model, [text(number - 1), text(number)], guidance, steps) == [text(number)]
    assert first_unread(model, text(number), guidance, steps) == (number, word)


def test_what_is_short_is_not_encoded(monkeypatch: pytest.MonkeyPatch):
    model = Model(build("sd1"), call=TINY["sd1"].call)
    monkeypatch.setattr(cut, "encode", None)
    assert cut_prompts(model, ["a doctor", "x" * 16, "x" * 5000], 1.0) == []  # a single word cannot be cut in two
    with pytest.raises(TypeError):
        cut_prompts(model, ["a photo of a nurse"], 1.0)


def test_in_a_script_without_spaces_characters_are_counted():
    prompt = "\u4e00\u4f4d \u533b\u751f\u3002x y"
    assert [prompt[:end] for end in cut._ends(prompt)] == [
        prompt[:1], prompt[:2], prompt[:4], prompt[:5], prompt[:6] + "x", prompt,
    ]  # fmt: skip
