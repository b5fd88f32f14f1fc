"""Which rule goes where, and a user's own choice of them."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from stereoclinic.ddtd.propagate import propagate
from stereoclinic.ddtd.rules import functions as rules
from stereoclinic.ddtd.rules import layers as layer_rules
from stereoclinic.ddtd.rules.composites import COMPOSITES, Choice, Composite, get_composite
from stereoclinic.ddtd.rules.order import find_layers
from stereoclinic.errors import InputError
from stereoclinic.pipelines.hooks import Watch
from stereoclinic.pipelines.sites import find_sites, neuron_relevance


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def relevance(unet: UNet2DConditionModel, inputs: tuple, composite: str | Path | Composite) -> torch.Tensor:
    sites = find_sites(unet)
    with Watch(unet, sites) as watch:
        with propagate(composite, unet):
            out = unet(*inputs).sample
        grads = watch.grads(out, out.detach(), retain=False)
    return neuron_relevance(watch.activations, grads, sites)


def test_layers_come_in_the_order_that_the_data_meets_them(unet: UNet2DConditionModel) -> None:
    layers = find_layers(unet)
    ran: list[str] = []
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    text = torch.randn(1, 3, unet.config.cross_attention_dim, dtype=unet.dtype)
    size = unet.config.sample_size
    unet(torch.randn(1, unet.config.in_channels, size, size, dtype=unet.dtype), 500, text)
    blocks = [name.split(".")[0] for name in dict.fromkeys(ran)]
    met = [layer.name.split(".")[0] for layer in layers]
    order = ["conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out"]
    assert list(dict.fromkeys(met)) == order and set(blocks) == set(order)
    assert {layer.name for layer in layers} == set(ran)
    assert (layers[0].name, layers[0].depth) == ("conv_in", 0.0)
    assert (layers[-1].name, layers[-1].depth) == ("conv_out", 1.0)
    depths = [layer.depth for layer in layers]
    assert depths == sorted(depths)

    def parts(names: list[str]) -> list[str]:  # within a block: resnet, attention, resnet, ..., then the resampler
        found = (re.match(r"(down|mid|up)_block.*?(resnets|attentions|(down|up)samplers)\.\d+", name) for name in names)
        return list(dict.fromkeys(match[0] for match in found if match))

    assert parts([layer.name for layer in layers]) == parts(ran)
    assert "mid_block.attentions.0" in parts(ran)


def test_deep_taylor_treats_the_first_layer_alone_by_its_weights_squared(unet: UNet2DConditionModel) -> None:
    assigned = COMPOSITES["deep-taylor"].assign(unet)
    assert [(weight is unet.conv_in.weight, rule) for weight, rule in assigned] == [(True, layer_rules.w_squared)]


def test_deep_taylor_is_zplus_behind_the_first_layer_and_passes_all_of_it_on(unet, inputs) -> None:
    kept: list[Tensor] = []
    unet.conv_in.register_forward_hook(lambda module, args, out: kept.append(out))

    def passed(composite: str) -> tuple[Tensor, Tensor]:
        """Relevance (B,) of the first layer's output and of its input."""
        kept.clear()
        latent = inputs[0].clone().requires_grad_()
        with propagate(composite, unet):
            out = unet(latent, *inputs[1:]).sample
        grads = torch.autograd.grad(out, [kept[0], latent], out.detach())
        after, before = ((x * g).detach().flatten(1).sum(1) for x, g in zip((kept[0], latent), grads, strict=True))
        return after, before

    after, before = passed("deep-taylor")
    assert unet.conv_in.bias.abs().min() > 0  # the bias and the padding take nothing
    torch.testing.assert_close(before, after)
    after_zplus, before_zplus = passed("zplus-cp")
    assert torch.equal(after_zplus, after) and not torch.allclose(before_zplus, before)


def test_the_first_choice_that_fits_is_taken(unet: UNet2DConditionModel) -> None:
    choices = (
        Choice(layer_rules.z_plus, "mid_block.*"),
        Choice(layer_rules.gamma(0.5), "*.conv2"),
        Choice(layer_rules.epsilon(0.1), depth=(0.5, 1.0)),
    )
    assigned = Composite("mine", COMPOSITES["epsilon-cp"].rules, layers=choices).assign(unet)
    rule_of = {id(weight): rule for weight, rule in assigned}
    for layer in find_layers(unet):
        wanted = (
            layer_rules.z_plus
            if layer.name.startswith("mid_block.")
            else layer_rules.gamma(0.5)
            if layer.name.endswith(".conv2")
            else layer_rules.epsilon(0.1)
            if layer.depth >= 0.5
            else None
        )
        assert rule_of.get(id(layer.weight)) == wanted


@pytest.mark.parametrize(("end", "name"), [(0.0, "conv_in"), (1.0, "conv_out")])
def test_depth_includes_both_its_ends(unet: UNet2DConditionModel, end: float, name: str) -> None:
    choice = Choice(layer_rules.z_plus, depth=(end, end))
    ((weight, _),) = Composite("mine", {}, layers=(choice,)).assign(unet)
    assert weight is unet.get_submodule(name).weight


def test_a_wrapped_model_has_the_layers_of_the_model(unet: UNet2DConditionModel) -> None:
    wrapper = nn.Module()
    wrapper._orig_mod = unet  # as torch.compile wraps it
    assert find_layers(wrapper) == find_layers(unet)


def test_an_adapter_s_layers_keep_the_name_of_what_they_adapt(unet: UNet2DConditionModel) -> None:
    peft = pytest.importorskip("peft")
    names = {layer.name for layer in find_layers(unet)}
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "ff.net.2"]))
    found = find_layers(unet)
    assert {layer.name for layer in found} == names and len(found) > len(names)
    assigned = Composite("mine", {}, layers=(Choice(layer_rules.z_plus, "mid_block.*.attn2.to_q"),)).assign(unet)
    adapted = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    expected = (adapted.base_layer, *adapted.lora_A.values(), *adapted.lora_B.values())
    assert {id(weight) for weight, _ in assigned} == {id(layer.weight) for layer in expected}


def test_rules_by_layer_need_the_model() -> None:
    with pytest.raises(InputError, match=r"deep-taylor.*chooses rules by layer.*propagate\(composite, model\)"):
        propagate("deep-taylor")
    assert propagate("zplus-cp").composite is COMPOSITES["zplus-cp"]


def test_rules_by_layer_change_what_passes_those_layers(unet: UNet2DConditionModel, inputs: tuple, tmp_path) -> None:
    path = written(tmp_path, 'name = "mine"\n[[layers]]\npattern = "*.conv2"\nrule = "gamma"\ngamma = 0.25\n')
    plain, changed = relevance(unet, inputs, "epsilon-cp"), relevance(unet, inputs, path)
    assert not torch.allclose(plain, changed)
    choice = Choice(layer_rules.gamma(0.25), "*.conv2")
    same = Composite("same", COMPOSITES["epsilon-cp"].rules, layers=(choice,))
    assert torch.equal(relevance(unet, inputs, same), changed)


def test_a_file_that_spells_a_built_in_composite_is_that_composite(unet, inputs, tmp_path) -> None:
    spelt = written(
        tmp_path, 'name = "mine"\n[rules]\nattention = "attnlrp"\nconvolution = { rule = "gamma", gamma = 0.25 }'
    )
    assert torch.equal(relevance(unet, inputs, spelt), relevance(unet, inputs, "gamma-attnlrp"))
    bare = written(tmp_path, 'name = "mine"\n')
    assert torch.equal(relevance(unet, inputs, bare), relevance(unet, inputs, "epsilon-cp"))
    assert get_composite(bare).rules == COMPOSITES["epsilon-cp"].rules


def test_epsilon_cp_spelt_out_is_epsilon_cp(unet, inputs, tmp_path) -> None:
    """``linear`` and ``convolution`` are native when left out, and with an epsilon or a gamma of 0."""
    spelt = """
        name = "mine"
        root = "plain"
        modulation = "constant"
        [rules]
        convolution = { rule = "gamma", gamma = 0 }
        linear = { rule = "epsilon", epsilon = 0.0 }
        attention = "cp"
        silu = "gate"
        gelu = "gate"
        tanh = "gate"
        sigmoid = "constant"
        group_norm = "constant_std"
        layer_norm = "constant_std"
        rms_norm = "constant_std"
        product = "halves"
        division = "constant_divisor"
        [[layers]]
        pattern = "*.to_v"
        depth = [0, 1]
        rule = "native"
    """
    path = written(tmp_path, spelt)
    assert torch.equal(relevance(unet, inputs, path), relevance(unet, inputs, "epsilon-cp"))
    swapped = written(tmp_path, spelt.replace('silu = "gate"', 'silu = "native"'))
    assert not torch.allclose(relevance(unet, inputs, swapped), relevance(unet, inputs, "epsilon-cp"))


def test_equal_composites_have_one_digest_and_no_two_others_share_it() -> None:
    def make(value: float, pattern: str, depth: tuple[float, float], backwards: bool = False) -> Composite:
        by_kind = {"silu": rules.silu, "linear": layer_rules.gamma(value)}
        choices = (Choice(layer_rules.z_plus, pattern, depth), Choice(layer_rules.w_squared, "*.to_v"))
        return Composite("mine", by_kind, layers=choices[::-1] if backwards else choices)

    one = make(1.0, "*.conv1", (0.0, 1.0))
    same = Composite("mine", dict(reversed(one.rules.items())), layers=one.layers, source="mine.toml")
    for other in (same, make(1, "*.conv1", (0, 1))):
        assert other == one and other.describe() == one.describe() and other.digest() == one.digest()
    assert json.loads(json.dumps(one.describe())) == one.describe()  # plain data, with nothing of this session in it
    others = [
        make(2.0, "*.conv1", (0.0, 1.0)),
        make(1.0, "*.conv2", (0.0, 1.0)),
        make(1.0, "*.conv1", (0.0, 0.5)),
        make(1.0, "*.conv1", (0.0, 1.0), backwards=True),
        Composite("mine", one.rules),
        Composite("mine", one.rules, root="rooted", layers=one.layers),
        Composite("mine", one.rules, modulation="halves", layers=one.layers),
        Composite("mine", {**one.rules, "silu": rules.native}, layers=one.layers),
    ]
    assert len({one.digest(), *(other.digest() for other in others)}) == 1 + len(others)


def test_the_description_says_which_rules_they_are(tmp_path) -> None:
    digests = {name: composite.digest() for name, composite in COMPOSITES.items()}
    assert len(set(digests.values())) == len(digests)
    text = 'name = "mine"\nroot = "rooted"\n[rules]\nlinear = {{ rule = "epsilon", epsilon = {} }}'
    first, again = (get_composite(written(tmp_path, text.format(0.25))) for _ in range(2))
    assert first.digest() == again.digest() and first.root == "rooted"
    assert get_composite(written(tmp_path, 'name = "mine"\nmodulation = "halves"')).modulation == "halves"
    assert first.describe()["rules"]["linear"] == {"rule": "epsilon", "epsilon": 0.25}
    assert get_composite(written(tmp_path, text.format(0.5))).digest() != first.digest()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "composite file .*mine.toml: "),
        ("", "name is missing"),
        ('name = " "', "name: expected a name"),
        ('name = "gradient"', "is that of a built-in composite"),
        ('name = "m"\ncolour = 1', "unknown key 'colour'; the keys are name, root, modulation, rules, layers"),
        ('name = "m"\nroot = "up"', "root = 'up': expected 'plain' or 'rooted'"),
        ('name = "m"\nmodulation = "half"', "modulation = 'half': expected 'constant' or 'halves'"),
        ('name = "m"\n[rules]\nsigmoid = "gate"', "rules.sigmoid = 'gate': expected 'constant' or 'native'"),
        ('name = "m"\n[rules]\nsoft = "cp"', "unknown key 'rules.soft'"),
        ('name = "m"\n[rules]\nattention = "lrp"', "rules.attention = 'lrp': expected 'cp' or 'attnlrp'"),
        ('name = "m"\n[rules]\nlinear = "delta"', "rules.linear.rule = 'delta': expected 'native', 'epsilon'"),
        ('name = "m"\n[rules]\nlinear = { rule = "gamma", gamma = -1 }', "rules.linear.gamma = -1: expected"),
        ('name = "m"\n[rules]\nlinear = "gamma"', "rules.linear: rule 'gamma' needs gamma"),
        ('name = "m"\n[rules]\nlinear = { rule = "epsilon", epsilon = true }', "rules.linear.epsilon = True: expected"),
        ('name = "m"\n[rules]\nlinear = { rule = "epsilon", epsilon = inf }', "rules.linear.epsilon = inf: expected"),
        (
            f'name = "m"\n[rules]\nlinear = {{ rule = "gamma", gamma = 1{"0" * 400} }}',
            "a number does not fit into 64 bits",
        ),
        ('name = "m"\n[rules]\nlinear = 3', "rules.linear = 3: expected a table"),
        ('name = "m"\n[rules]\nsilu = "z_plus"', "rules.silu = 'z_plus': expected 'gate' or 'native'"),
        ('name = "m"\nrules = 1', "rules = 1: expected a table"),
        ('name = "m"\nlayers = [1]', "layers.1 = 1: expected a table"),
        ('name = "m"\n[[layers]]\npattern = 1\nrule = "z_plus"', "layers.1.pattern = 1: expected"),
        ('name = "m"\n[[layers]]\npattern = ""\nrule = "z_plus"', "layers.1.pattern = ''"),
        ('name = "m"\n[[layers]]\npattern = "*"', "layers.1.rule is missing"),
        ('name = "m"\n[[layers]]\ndepth = 0.5\nrule = "z_plus"', "layers.1.depth = 0.5: expected"),
        ('name = "m"\n[[layers]]\ndepth = [0.5]\nrule = "z_plus"', "layers.1.depth.2 is missing"),
        ('name = "m"\n[[layers]]\ndepth = [0, true]\nrule = "z_plus"', "layers.1.depth.2 = True: expected"),
        ('name = "m"\n[[layers]]\ndepth = [0, 1.5]\nrule = "z_plus"', "layers.1: depth .* 0 <= from <= to <= 1"),
        ('name = "m"\n[[layers]]\ndepth = [nan, 1]\nrule = "z_plus"', "0 <= from <= to <= 1"),
        ('name = "m"\n[[layers]]\npattern = "*"\nrule = "gamma"\ngamma = -1', "layers.1.gamma = -1: expected"),
        ('name = "m"\n[[layers]]\nrule = "z_plus"', "layers.1: expected a pattern, a depth"),
        ('name = "m"\n[[layers]]\ndepth = [0.5, 0.1]\nrule = "z_plus"', "0 <= from <= to <= 1"),
        ('name = "m"\n[[layers]]\npattern = "*"\nrule = "z_plus"\ngamma = 1', "rule 'z_plus' takes no gamma"),
        ('name = "m"\n[[layers]]\npattern = "*"\nrule = "z_plus"\ndelta = 1', "unknown key 'layers.1.delta'"),
    ],
)
def test_a_mistake_in_a_file_is_one_clear_line(tmp_path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        get_composite(written(tmp_path, text))
    assert "mine.toml" in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there_and_a_pattern_that_fits_nothing(unet: UNet2DConditionModel, tmp_path) -> None:
    with pytest.raises(InputError, match=r"none\.toml"):
        get_composite(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes('name = "\xe9"'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.toml cannot be read: it is not text in UTF-8"):
        get_composite(tmp_path / "latin.toml")
    assert get_composite(Path("epsilon-cp")) is COMPOSITES["epsilon-cp"]
    path = written(tmp_path, 'name = "m"\n[[layers]]\npattern = "encoder.*"\nrule = "z_plus"')
    with pytest.raises(InputError, match=r"mine.toml: layers entry 1 .*'encoder.\*'.* fits none of the"):
        propagate(path, unet)


def test_plain_gradients_have_no_rules() -> None:
    assert not COMPOSITES["gradient"].rules and not COMPOSITES["gradient"].strict
    assert COMPOSITES["epsilon-cp"].rules["attention"] is rules.attention_cp
