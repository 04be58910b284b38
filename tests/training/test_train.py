"""Both trainings on the tiny preset: they learn, resume exactly, and end in a usable file."""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.models import LOOP, TINY
from tests.support.pairs import noise
from tokenshuffle_core import checkpoints
from tokenshuffle_core.adapt.grow import grow
from tokenshuffle_core.adapt.lora import merge_lora
from tokenshuffle_core.data.emoji.pictures import composite
from tokenshuffle_core.data.extraction import extract
from tokenshuffle_core.data.shards import CodeShards
from tokenshuffle_core.data.sources import read_items
from tokenshuffle_core.pipeline import Pipeline, load
from tokenshuffle_core.training.model import ModelTask, check_codes, train_model
from tokenshuffle_core.training.settings import LoopConfig, Recipe
from tokenshuffle_core.training.start import Changes, new_pipeline
from tokenshuffle_core.training.tokenizer import train_tokenizer

CPU = torch.device("cpu")
SHORT = LoopConfig(steps=8, batch=4, learning_rate=1e-3, warmup=1)


def log_of(directory, *names):
    rows = (line.split(",") for line in (directory / "log.csv").read_text().splitlines()[1:])
    return [(int(step), name, float(value)) for step, name, value in rows if name in names]


def pipeline_of(codes, image_tokenizer, **changes) -> Pipeline:
    return new_pipeline(CodeShards(codes), image_tokenizer, TINY, Changes(**changes))


def interrupted(function, monkeypatch, owner, at, *arguments, **settings):
    """Run a training and press Ctrl-C in step `at`."""
    original = owner.loss

    def loss(self, module, step, *piece):
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return original(self, module, step, *piece)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "loss", loss)
        with pytest.raises(KeyboardInterrupt):
            function(*arguments, **settings)


def unigram_entropy(shards: CodeShards) -> float:
    """Nats per code of the best prediction that is the same for every code."""
    codes = torch.cat([shards.codes(i).flatten() for i in range(len(shards))])
    shares = codes.unique(return_counts=True)[1] / len(codes)
    return -(shares * shares.log()).sum().item()


def test_the_image_tokenizer_learns(composed, image_tokenizer):
    """More than the best picture of one colour, which is the mean of all pixels."""
    module = checkpoints.load_image_tokenizer(image_tokenizer)
    pixels = np.stack([np.array(item.picture()) for item in read_items(composed)])
    images = torch.from_numpy(pixels).movedim(-1, 1) / 255
    codes = module.encode(images)
    assert codes.shape == (24, 8, 8)
    errors = module.decode(codes) - images, images.mean((0, 2, 3), keepdim=True) - images
    psnr, constant = (-10 * error.square().mean().log10() for error in errors)
    assert psnr > constant + 0.2


def test_an_image_tokenizer_is_trained_on(composed, image_tokenizer, tmp_path):
    sizes = {"crop": 16, "side": 32}
    config, loop = TINY.image_tokenizer, replace(SHORT, learning_rate=1e-6)
    again = train_tokenizer(composed, tmp_path, config, loop, init=image_tokenizer, **sizes)
    before, after = load_file(image_tokenizer), load_file(again)
    name = "image_tokenizer.encoder.conv_in.weight"
    assert not torch.equal(before[name], after[name])
    torch.testing.assert_close(before[name], after[name], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_a_trained_codebook_is_used_from_the_first_step_on(composed, image_tokenizer, tmp_path):
    """Codes that pictures use do not change, except for some that the crops of 100 steps did not
    use; a new codebook is initialised at that step."""
    sizes = {"crop": 16, "side": 32}
    loop = replace(LOOP, steps=110, learning_rate=1e-6, validate_every=110)
    config, name = TINY.image_tokenizer, "image_tokenizer.quantizer.codebook.weight"
    again = train_tokenizer(composed, tmp_path / "on", config, loop, init=image_tokenizer, **sizes)
    before, after = load_file(image_tokenizer)[name], load_file(again)[name]
    module = checkpoints.load_image_tokenizer(image_tokenizer)
    pictures = [item.picture().resize((32, 32)) for item in read_items(composed)]
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])
    used = module.encode(pixels.movedim(-1, 1) / 255).unique()
    assert len(used) > 3
    stayed = (after[used] - before[used]).abs().amax(dim=1) < 1e-3
    assert stayed.float().mean() > 0.8


def test_pictures_that_cannot_be_read_are_replaced(image_tokenizer, tmp_path, capsys):
    """And pictures need no captions."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(4):
        noise(40, 40, seed=i).save(source / f"{i}.png")
    whole = (source / "2.png").read_bytes()
    (source / "2.png").write_bytes(whole[: len(whole) // 2])
    (source / "3.png").write_bytes(b"text")
    config = TINY.image_tokenizer
    path = train_tokenizer(source, tmp_path / "run", config, SHORT, crop=16, side=32)
    assert checkpoints.load_image_tokenizer(path).config == config
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert sorted(line.split()[2] for line in notes) == ["2", "3"]
    for i in range(2):
        (source / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the pictures can be read"):
        train_tokenizer(source, tmp_path / "2", config, SHORT, crop=16, side=32)


@pytest.mark.parametrize(("crop", "side"), [(18, 32), (16, 30), (32, 16)])
def test_sizes_that_the_image_tokenizer_cannot_have(composed, tmp_path, crop, side):
    with pytest.raises(ValueError, match="multiple of 4 pixels"):
        train_tokenizer(composed, tmp_path, TINY.image_tokenizer, SHORT, crop=crop, side=side)


def test_the_model_learns_and_resumes_exactly(codes, image_tokenizer, tmp_path, monkeypatch):
    recipe = Recipe(context_noise=0.5, z_loss=1e-4, text_loss=0.1)
    card = {"modelspec.title": "test"}

    def start():
        return pipeline_of(codes, image_tokenizer, card=card)

    whole = train_model(CodeShards(codes), tmp_path / "whole", start(), LOOP, recipe)
    losses = log_of(tmp_path / "whole", "validation_loss", "trained_loss")
    assert len(losses) == 2
    assert all(loss < 0.8 * unigram_entropy(CodeShards(codes)) for _, _, loss in losses)
    broken = CodeShards(codes), tmp_path / "broken"
    interrupted(train_model, monkeypatch, ModelTask, 73, *broken, start(), LOOP, recipe)
    resumed = train_model(*broken, start(), LOOP, recipe, resume=True)
    names = ("loss", "code_loss", "z", "text_loss", "validation_loss", "trained_loss")
    assert log_of(tmp_path / "broken", *names) == log_of(tmp_path / "whole", *names)
    expected, found = load_file(whole), load_file(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    pipeline = load(whole)
    assert pipeline.card["modelspec.title"] == "test"
    assert pipeline.card[checkpoints.SIZES] == "32x32"
    assert pipeline.generate("a red apple, 3d style", seed=1).images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_trained_on(stored, codes, image_tokenizer, tmp_path):
    pipeline = pipeline_of(codes, image_tokenizer)
    whole = train_model(CodeShards(codes), tmp_path / "1", pipeline, SHORT, Recipe())
    first = tmp_path / "first.safetensors"
    checkpoints.convert(whole, first, dtype=stored)
    second = train_model(CodeShards(codes), tmp_path / "2", load(first), SHORT, Recipe())
    before, after = load_file(first), load_file(second)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    frozen = [name for name in before if name.startswith("image_tokenizer.")]
    assert len(frozen) > 0
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert load(first).text_tokenizer.encode("apple") == load(second).text_tokenizer.encode("apple")
    moved = (before["model.head.weight"] - after["model.head.weight"]).abs().mean()
    assert 0 < moved < before["model.head.weight"].abs().mean()


def test_the_pieces_of_a_batch_have_its_mean_loss(codes, image_tokenizer):
    pipeline = pipeline_of(codes, image_tokenizer, windows=(2, 4), window_head=8)
    recipe = Recipe(context_noise=0.5, z_loss=1e-2, text_loss=0.5)
    task = ModelTask(CodeShards(codes), pipeline, LOOP, recipe, CPU)
    for step in range(4):
        whole, _ = task.loss(pipeline.model, step)
        for pieces in (2, 4):
            part = [task.loss(pipeline.model, step, piece, pieces)[0] for piece in range(pieces)]
            torch.testing.assert_close(torch.stack(part).mean(), whole)


def test_the_loss_is_the_formula(codes, image_tokenizer):
    pipeline = pipeline_of(codes, image_tokenizer)
    recipe = Recipe(context_noise=0.0, z_loss=0.01, text_loss=0.5)
    task = ModelTask(CodeShards(codes), pipeline, LOOP, recipe, CPU)
    loss, metrics = task.loss(pipeline.model, 3)
    text, padding, picture, _ = task.batch(3)
    logits = pipeline.model(text, padding, picture, with_text=True)
    log_z = logits.codes.exp().sum(-1).log()
    chosen = pipeline.model.targets(picture)[..., None]
    code_loss = (log_z - logits.codes.gather(-1, chosen)[..., 0]).mean()
    words = [
        F.cross_entropy(logits.text[row, p:-1], text[row, p + 1 :], reduction="sum")
        for row, p in enumerate(padding.tolist())
    ]
    text_loss = sum(words) / (text.shape[1] - 1 - padding).sum()
    torch.testing.assert_close(metrics["code_loss"], code_loss.detach())
    torch.testing.assert_close(loss, code_loss + 0.01 * log_z.square().mean() + 0.5 * text_loss)


def test_every_window_of_an_elastic_model_is_trained_in_its_share(codes, image_tokenizer, tmp_path):
    pipeline = pipeline_of(codes, image_tokenizer, windows=(2, 1, 4))
    recipe = Recipe(window_mix=(2, 1, 1))
    task = ModelTask(CodeShards(codes), pipeline, LOOP, recipe, CPU)
    windows = [task.batch(step)[-1] for step in range(200)]
    assert {window: round(windows.count(window) / 200, 1) for window in (2, 1, 4)} == {
        2: pytest.approx(0.5, abs=0.1), 1: pytest.approx(0.25, abs=0.1),
        4: pytest.approx(0.25, abs=0.1),
    }  # fmt: skip
    path = train_model(CodeShards(codes), tmp_path / "run", pipeline, SHORT, recipe)
    names = {
        name for _, name, _ in log_of(path.parent, *(f"trained_loss_window_{w}" for w in "124"))
    }
    assert len(names) == 3
    with pytest.raises(ValueError, match="window_mix has 2 shares for the windows 2, 1, 4"):
        train_model(CodeShards(codes), tmp_path / "no", pipeline, SHORT, Recipe(window_mix=(1, 1)))


def test_a_grown_model_is_trained_on(codes, image_tokenizer, tmp_path):
    pipeline = pipeline_of(codes, image_tokenizer, windows=(1,))
    grown = grow(pipeline, (2, 1))
    path = train_model(CodeShards(codes), tmp_path / "run", grown, SHORT, Recipe())
    assert load(path).config.model.windows == (2, 1)


def test_a_lora_is_trained_and_saved_alone(codes, image_tokenizer, tmp_path):
    base = train_model(
        CodeShards(codes), tmp_path / "base", pipeline_of(codes, image_tokenizer), SHORT, Recipe()
    )
    loop = replace(LOOP, learning_rate=1e-2)
    path = train_model(CodeShards(codes), tmp_path / "lora", load(base), loop, Recipe(), lora=4)
    assert path.stat().st_size < base.stat().st_size
    changed = load(base)
    task = ModelTask(CodeShards(codes), changed, loop, Recipe(), CPU)
    with torch.inference_mode():
        before = task.validate(changed.model)["trained_loss"]
        merge_lora(changed.model, path)
        after = task.validate(changed.model)["trained_loss"]
    (logged,) = [value for _, _, value in log_of(path.parent, "trained_loss")]
    assert after < 0.9 * unigram_entropy(CodeShards(codes)) < before
    assert after == pytest.approx(logged, rel=1e-4)


def test_frozen_parts_stay(codes, image_tokenizer, tmp_path):
    pipeline = pipeline_of(codes, image_tokenizer)
    before = {name: weight.clone() for name, weight in pipeline.model.state_dict().items()}
    freeze = ("transformer", "text_embedding")
    path = train_model(
        CodeShards(codes), tmp_path / "run", pipeline, SHORT, Recipe(), freeze=freeze
    )
    after = load(path).model.state_dict()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == name.startswith(freeze), name
    with pytest.raises(ValueError, match="no part 'nothing', only text_embedding"):
        train_model(
            CodeShards(codes), tmp_path / "no", pipeline, SHORT, Recipe(), freeze=("nothing",)
        )


class Waits(TorchDispatchMode):
    """Counts the values that the host reads from tensors, for which it waits on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_do_not_wait_for_the_device(codes, image_tokenizer, tmp_path, optimizer):
    """Only what is logged and validated at the end is read."""
    counts = []
    for steps in (2, 12):
        loop = replace(SHORT, steps=steps, optimizer=optimizer)
        pipeline = pipeline_of(codes, image_tokenizer)
        recipe = Recipe(text_loss=0.1, z_loss=1e-4)
        with Waits() as waits:
            train_model(CodeShards(codes), tmp_path / str(steps), pipeline, loop, recipe)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


def test_codes_of_another_image_tokenizer(codes, tiny, tmp_path):
    with pytest.raises(ValueError, match="another image tokenizer"):
        train_model(CodeShards(codes), tmp_path / "run", load(tiny), SHORT, Recipe())


def test_a_training_resumes_only_with_what_it_started_with(codes, image_tokenizer, tmp_path):
    """Not on other codes, with another text tokenizer or with other frozen weights."""
    loop, frozen = replace(SHORT, steps=4), {"freeze": ("transformer",)}
    pipeline = pipeline_of(codes, image_tokenizer)
    train_model(CodeShards(codes), tmp_path / "run", pipeline, loop, Recipe(), **frozen)
    again = partial(train_model, directory=tmp_path / "run", loop=SHORT, recipe=Recipe())
    again = partial(again, resume=True, **frozen)
    other = shutil.copytree(codes, tmp_path / "codes")
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(index | {"background": "black"}))
    with pytest.raises(ValueError, match="was saved with other codes: resume with the same"):
        again(CodeShards(other), pipeline=pipeline_of(codes, image_tokenizer))
    with pytest.raises(ValueError, match="was saved with other weights that are not trained: r"):
        again(CodeShards(codes), pipeline=pipeline_of(codes, image_tokenizer, seed=1))
    with pytest.raises(ValueError, match="was saved with other text tokenizer and weights that"):
        again(CodeShards(codes), pipeline=pipeline_of(codes, image_tokenizer, vocabulary=300))
    assert again(CodeShards(codes), pipeline=pipeline_of(codes, image_tokenizer)).exists()


def test_pictures_that_are_larger_than_the_model_has_room_for(codes, image_tokenizer):
    pipeline = pipeline_of(codes, image_tokenizer)
    for change in ({"max_grid": 3}, {"context": pipeline.config.model.max_prompt + 4 + 15}):
        shape = replace(pipeline.config.model, **change)
        with pytest.raises(ValueError, match="pictures of 32x32 are 4 x 4 positions at window 2"):
            check_codes(CodeShards(codes), pipeline.image_tokenizer, shape, Recipe())


def test_window_that_does_not_fit_the_pictures(composed, image_tokenizer, tmp_path):
    images = checkpoints.load_image_tokenizer(image_tokenizer)
    extract(composed, tmp_path / "codes", images, [(36, 36)])
    pipeline = pipeline_of(tmp_path / "codes", image_tokenizer)
    with pytest.raises(ValueError, match=r"36x36 do not fit window 2: .* multiples of 8"):
        train_model(CodeShards(tmp_path / "codes"), tmp_path / "run", pipeline, SHORT, Recipe())


def test_captions_are_cut_to_what_the_model_reads(codes, image_tokenizer, capsys):
    pipeline = pipeline_of(codes, image_tokenizer)
    shape = replace(pipeline.config.model, max_prompt=3)
    pipeline = replace(pipeline, config=replace(pipeline.config, model=shape))
    task = ModelTask(CodeShards(codes), pipeline, LOOP, Recipe(drop_prompt=0), CPU)
    texts = [task.batch(step)[0] for step in range(5)]
    assert {text.shape[1] for text in texts} == {3 + 4}  # begin, rows, columns, image start
    end = pipeline.text_tokenizer.tokenizer.token_to_id("<|image_start|>")
    assert all((text[:, -1] == end).all() for text in texts)
    (note,) = capsys.readouterr().err.splitlines()
    assert "tokens, the model reads 3" in note


@pytest.mark.parametrize("mix", [(0.0, 0.0), (1.0, -0.5)])
def test_shares_of_windows_out_of_range(mix):
    with pytest.raises(ValueError, match="window_mix must be shares"):
        Recipe(window_mix=mix)


@pytest.mark.parametrize("field", ["drop_prompt", "context_noise", "z_loss", "text_loss"])
def test_recipe_out_of_range(field):
    with pytest.raises(ValueError, match=field):
        Recipe(**{field: -0.1})


def test_composite_is_the_over_operator():
    rgba = torch.tensor([200, 100, 0, 51], dtype=torch.uint8).view(1, 4, 1, 1)
    background = torch.tensor([[0, 255, 255]], dtype=torch.uint8)
    expected = torch.tensor([200 * 0.2, 100 * 0.2 + 255 * 0.8, 255 * 0.8]) / 255
    torch.testing.assert_close(composite(rgba, background).flatten(), expected)
