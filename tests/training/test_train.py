"""Both trainings on the tiny preset: they learn, resume exactly, and end in a usable file."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tokenshuffle_core import checkpoint
from tokenshuffle_core.config import PRESETS
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.training import captions
from tokenshuffle_core.training.emoji import read_manifest
from tokenshuffle_core.training.loop import LoopConfig
from tokenshuffle_core.training.pictures import composite
from tokenshuffle_core.training.train_model import ModelTask, train_model
from tokenshuffle_core.training.train_tokenizer import train_tokenizer

TINY = PRESETS["tiny"]
LOOP = LoopConfig(
    steps=100, batch=4, learning_rate=5e-3, warmup=5, validate_every=100, save_minutes=1e9
)


def log_of(directory, *names):
    rows = (line.split(",") for line in (directory / "log.csv").read_text().splitlines()[1:])
    return [(int(step), name, float(value)) for step, name, value in rows if name in names]


@pytest.fixture(scope="module")
def image_tokenizer(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "run"
    return train_tokenizer(data, directory, TINY.image_tokenizer, LOOP, crop=16)


def interrupted(function, monkeypatch, owner, at, *arguments, **settings):
    """Run a training and press Ctrl-C before step `at`."""
    original = owner.loss

    def loss(self, module, step):
        if step == at:
            raise KeyboardInterrupt
        return original(self, module, step)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "loss", loss)
        with pytest.raises(KeyboardInterrupt):
            function(*arguments, **settings)


def test_the_image_tokenizer_learns(image_tokenizer):
    psnr = [value for _, _, value in log_of(image_tokenizer.parent, "psnr")]
    assert psnr[-1] > psnr[0]
    images = torch.rand(1, 3, 16, 16)
    assert checkpoint.load_image_tokenizer(image_tokenizer).encode(images).shape == (1, 4, 4)


def test_the_model_learns_and_resumes_exactly(data, image_tokenizer, tmp_path, monkeypatch):
    settings = {"context_noise": 0.5, "z_loss": 1e-4, "text_loss": 0.1}
    card = {"modelspec.title": "test"}
    whole = train_model(
        data, image_tokenizer, tmp_path / "whole", TINY, LOOP, card=card, **settings
    )
    losses = [value for _, _, value in log_of(tmp_path / "whole", "code_loss")]
    assert losses[-1] < losses[0]
    arguments = (data, image_tokenizer, tmp_path / "broken", TINY, LOOP)
    interrupted(train_model, monkeypatch, ModelTask, 73, *arguments, **settings)
    resumed = train_model(*arguments, resume=True, **settings)
    names = ("loss", "code_loss", "z", "text_loss", "validation_loss", "trained_loss")
    assert log_of(tmp_path / "broken", *names) == log_of(tmp_path / "whole", *names)
    expected, found = load_file(whole), load_file(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    pipeline = load(whole)
    assert pipeline.card["modelspec.title"] == "test"
    assert pipeline.generate("a red apple, 3d style", seed=1).shape == (1, 32, 32, 3)


def test_codes_are_extracted_once(data, image_tokenizer, tmp_path):
    loop = LoopConfig(steps=1, batch=1, learning_rate=1e-3)
    train_model(data, image_tokenizer, tmp_path, TINY, loop)
    (cache,) = tmp_path.glob("codes-*.safetensors")
    codes = load_file(cache)["codes"]
    records = read_manifest(data)
    assert codes.shape == (10, len(records), 8, 8)
    written = cache.stat().st_mtime_ns
    (tmp_path / "state.pt").unlink()
    train_model(data, image_tokenizer, tmp_path, TINY, loop)
    assert cache.stat().st_mtime_ns == written


def test_a_checkpoint_is_trained_on_in_several_sizes(data, image_tokenizer, tmp_path):
    loop = LoopConfig(steps=12, batch=4, learning_rate=1e-3)
    first = train_model(data, image_tokenizer, tmp_path / "first", TINY, loop)
    sizes = [(32, 32), (48, 40)]
    second = train_model(
        data, None, tmp_path / "second", TINY, loop, init=first, sizes=sizes, context_noise=0.5
    )
    before, after = load_file(first), load_file(second)
    frozen = [name for name in before if name.startswith("image_tokenizer.")]
    assert len(frozen) > 0
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert load(first).text_tokenizer.encode("apple") == load(second).text_tokenizer.encode("apple")
    trained = [name for name in before if "embedding" in name and name not in frozen]
    assert len(trained) > 0
    for name in trained:  # the second training started from where the first one ended
        assert not torch.equal(before[name], after[name])
        moved = (before[name] - after[name]).abs().mean()
        assert moved < before[name].abs().mean()
    (cache,) = (tmp_path / "second").glob("codes-48x40-*.safetensors")
    with Image.open(data / read_manifest(data)[0]["image"]) as picture:
        canvas = Image.new("RGBA", (48, 40), "white")
        canvas.alpha_composite(picture, (8, 4))
    pixels = torch.from_numpy(np.array(canvas.convert("RGB"))).movedim(-1, 0)[None] / 255
    expected = checkpoint.load_image_tokenizer(image_tokenizer).encode(pixels)[0]
    same = load_file(cache)["codes"][0, 0] == expected
    assert same.float().mean() > 0.95  # PIL rounds the blend to whole numbers


@pytest.mark.parametrize("size", [(36, 32), (24, 32)])
def test_a_size_that_does_not_fit(data, image_tokenizer, tmp_path, size):
    loop = LoopConfig(steps=1, batch=1, learning_rate=1e-3)
    with pytest.raises(ValueError, match=f"size {size[0]}x{size[1]} does not fit"):
        train_model(data, image_tokenizer, tmp_path, TINY, loop, sizes=[size])


def test_composite_is_the_over_operator():
    rgba = torch.tensor([200, 100, 0, 51], dtype=torch.uint8).view(1, 4, 1, 1)
    background = torch.tensor([[0, 255, 255]], dtype=torch.uint8)
    expected = torch.tensor([200 * 0.2, 100 * 0.2 + 255 * 0.8, 255 * 0.8]) / 255
    torch.testing.assert_close(composite(rgba, background).flatten(), expected)


def test_captions_name_what_the_picture_shows():
    record = {
        "subject": "owl",
        "style": "flat",
        "names": {"en": ["owl", "night bird"], "zh": ["猫头鹰"]},
    }
    assert captions.prompt("owl", "flat", "blue") == "an owl, flat style, on a blue background"
    assert captions.prompt("猫头鹰", "flat", "blue", "zh") == "猫头鹰，扁平风格，蓝色背景"
    rng = random.Random(0)
    written = [captions.write(record, "blue", rng) for _ in range(300)]
    assert all("blue" in text or "蓝色" in text for text in written)
    assert all(any(name in text for name in ("owl", "night bird", "猫头鹰")) for text in written)
    assert sum("flat" in text or "扁平" in text for text in written) > 240
    assert not any("white" in captions.write(record, "white", rng) for _ in range(100))
