import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.loras import write_random_lora
from tests.support.models import random_checkpoint
from tokenshuffle_core import engine
from tokenshuffle_core.adapt.lora import METADATA, add_lora, merge_lora, read_lora, save_lora
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.presets import PRESETS
from tokenshuffle_core.sampler import pad_left

TEXT, PADDING = pad_left([[1, 5, 2]], 0, "cpu")
CODES = torch.arange(16).view(1, 4, 4)


def base() -> TokenShuffleModel:
    torch.manual_seed(0)
    model = TokenShuffleModel(PRESETS["tiny"].model)
    model.initialise()
    return model


def logits(model):
    with torch.inference_mode():
        return model(TEXT, PADDING, CODES).codes


@pytest.fixture
def trained(tmp_path):
    """A model with a LoRA of rank 3 that has changed something, and its file."""
    model = add_lora(base(), 3, alpha=6.0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "lora.safetensors"
    save_lora(path, model)
    return model, path


def test_a_model_that_has_sampled_takes_a_lora(trained):
    """The engine has then replaced some of its layers."""
    before, after = base(), base()
    merge_lora(before, trained[1])
    engine.prepare(after, torch.device("cpu"))
    merge_lora(after, trained[1])
    assert torch.equal(logits(before), logits(after))
    engine.prepare(after, torch.device("cpu"))
    assert add_lora(after, 3).head.down.shape == (3, 32)


def test_it_starts_without_effect_and_trains_alone():
    model = base()
    before = logits(model)
    add_lora(model, 4)
    torch.testing.assert_close(logits(model), before)
    trainable = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"down", "up"}
    model(TEXT, PADDING, CODES).codes.sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "base" in n)
    assert any(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("up"))


def test_merged_it_computes_the_same(trained):
    model, path = trained
    merged = base()
    assert not torch.allclose(logits(merged), logits(model), atol=1e-3)
    merge_lora(merged, path)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5, -1.0])
def test_merged_weight_is_the_formula(trained, strength):
    model, path = trained
    merged, before = base(), base()
    merge_lora(merged, path, strength)
    layer = "transformer.blocks.1.mlp.down_proj"
    change = model.get_submodule(layer)
    expected = before.get_submodule(layer).weight + strength * 2.0 * change.up @ change.down
    torch.testing.assert_close(merged.get_submodule(layer).weight, expected)


def test_merged_into_16_bits_it_loses_nothing(tmp_path):
    path, lora = tmp_path / "half.safetensors", tmp_path / "lora.safetensors"
    random_checkpoint().save(path, torch.bfloat16)
    write_random_lora(lora, path)
    half, whole = load(path).model, load(path, dtype=torch.float32).model
    for model in (half, whole):
        merge_lora(model, lora)
    for name, weight in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name].float(), weight), name


def test_file_has_the_usual_names(trained):
    _, path = trained
    tensors = load_file(path)
    layer = "transformer.blocks.0.attention.q_proj"
    assert tensors[f"{layer}.lora_down.weight"].shape == (3, 32)
    assert tensors[f"{layer}.lora_up.weight"].shape == (32, 3)
    assert tensors[f"{layer}.alpha"] == 6.0


def rewritten(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {METADATA: json.dumps({})})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("head.alpha"), "head.alpha is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra does not belong"),
        (lambda t: t.update({"head.lora_up.weight": torch.ones(64, 5)}), "do not match"),
        (lambda t: t.update({"head.lora_up.weight": torch.ones(9, 3)}), "another model"),
        (lambda t: t.update({"head.lora_up.weight": torch.ones(64, 0),
                             "head.lora_down.weight": torch.ones(0, 32)}), "do not match"),
        (lambda t: t.update({"head.lora_down.weight": torch.tensor(1.0)}), "do not match"),
        (lambda t: t["head.lora_up.weight"][5, 2].fill_(torch.nan), "head holds .* not finite"),
        (lambda t: t["head.lora_down.weight"][0, 9].fill_(-torch.inf), "head holds .* not finite"),
        (lambda t: t["head.alpha"].fill_(torch.nan), "head holds .* not finite"),
        (lambda t: t["head.lora_up.weight"].fill_(3e38), "head holds .* too large"),
        (
            lambda t: t.update({f"x.{n}": t[f"head.{n}"].clone() for n in
                                ("lora_up.weight", "lora_down.weight", "alpha")}),
            "does not exist",
        ),
    ],
)  # fmt: skip
def test_file_that_does_not_fit(trained, change, words):
    _, path = trained
    rewritten(path, change)
    model = base()
    before = logits(model)
    with pytest.raises(ValueError, match=words):
        merge_lora(model, path)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 101.0, -101.0, True, "1", None])
def test_strength_that_is_none(trained, strength):
    _, path = trained
    model = base()
    with pytest.raises(ValueError, match=f"{path.name}: the strength of a LoRA must be a number "):
        merge_lora(model, path, strength)
    assert torch.equal(logits(model), logits(base()))


def test_strength_that_is_too_much_for_the_file(trained):
    _, path = trained
    rewritten(path, lambda tensors: tensors["head.lora_up.weight"].fill_(1e5))
    read_lora(path, base(), 0.01)
    with pytest.raises(ValueError, match=r"head holds .* too large at the strength 100"):
        read_lora(path, base(), 100)


def test_checkpoint_is_no_lora(tiny):
    with pytest.raises(ValueError, match="is not a LoRA"):
        read_lora(tiny, base())


def test_rank_below_1():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        add_lora(base(), 0)
