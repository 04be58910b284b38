from dataclasses import replace

import pytest
import torch

from tokenshuffle_core.checkpoints import SIZES
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.pipeline import load

SETTINGS = GenerationConfig(width=32, height=16, cfg=2.0)


def test_generate_gives_images_in_range_and_again_the_same(pipeline):
    images, codes = pipeline.generate("a red apple", settings=SETTINGS, seed=3, count=2)
    assert torch.equal(pipeline.decode(codes), images)
    assert codes.shape == (2, 4, 8)
    assert images.shape == (2, 16, 32, 3)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    again = pipeline.generate("a red apple", settings=SETTINGS, seed=3, count=2)
    assert torch.equal(images, again.images)
    assert torch.equal(codes, again.codes)


def test_a_stream_yields_every_window_and_ends_with_what_generate_gives(pipeline):
    steps = list(pipeline.stream("a", settings=SETTINGS, seed=2**64 - 1, count=2))
    assert [step.position for step in steps] == list(range(1, 9))
    last = steps[-1].codes
    assert torch.equal(last, pipeline.generate("a", "", SETTINGS, seed=2**64 - 1, count=2).codes)
    assert torch.equal(last[1:], pipeline.generate("a", settings=SETTINGS, seed=0).codes)


def test_a_pipeline_is_saved_and_loaded(pipeline, tmp_path):
    pipeline.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config == pipeline.config
    assert torch.equal(again.generate("a").codes, pipeline.generate("a").codes)


def test_the_empty_prompt_is_allowed(pipeline):
    assert pipeline.generate("  ", settings=SETTINGS).images.shape == (1, 16, 32, 3)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (250, 16, "width 250 does not fit: .* multiple of 8, the nearest is 248 or 256"),
        (16, 3, "height 3 does not fit: .* the nearest is 8"),
        (8192, 8, "width 8192 is too large: .* at most 512 pixels"),
        (512, 512, "512x512 takes 4096 positions, this model's context has 1132"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(pipeline, width, height, message):
    with pytest.raises(ValueError, match=message):
        pipeline.generate("a", settings=replace(SETTINGS, width=width, height=height))


def test_a_size_of_no_training_is_refused_unless_any_size_allows_it(pipeline):
    sized = replace(pipeline, card=pipeline.card | {SIZES: "32x32, 16x16, 48x32, 64x16"})
    for width, height in ((32, 32), (16, 16), (48, 32), (64, 16)):  # at any window
        sized.grid(replace(SETTINGS, width=width, height=height))
    other = replace(SETTINGS, width=48, height=16)
    for draw in (sized.generate, sized.stream):
        with pytest.raises(ValueError, match=r"not trained at 48x16: choose 48x32, 64x16, 32x32, "):
            draw("a", settings=other)
    found = sized.generate("a", settings=replace(other, any_size=True)).codes
    assert torch.equal(found, pipeline.generate("a", settings=other).codes)
    with pytest.raises(ValueError, match="width 50 does not fit"):  # which no model can draw
        sized.generate("a", settings=replace(other, width=50, any_size=True))


def test_a_checkpoint_draws_its_default_size_whatever_its_card_lists(pipeline):
    sized = replace(pipeline, card={SIZES: "48x48"})
    assert sized.grid(sized.config.generation) == (4, 4)  # 32 pixels in windows of 8


def test_bad_arguments_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"the prompt has .* tokens, this model reads at most 64"):
        pipeline.generate("apple " * 100)
    with pytest.raises(ValueError, match="number of pictures must be at least 1, not 0"):
        pipeline.generate("a", settings=SETTINGS, count=0)
    with pytest.raises(ValueError, match="seed must be from 0"):
        pipeline.generate("a", settings=SETTINGS, seed=-1)
    with pytest.raises(ValueError, match="there are 1 prompts for 2 seeds"):
        pipeline.sample([[]], [], SETTINGS, [0, 1])
    given = torch.zeros(1, 4, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"given codes have the shape \(1, 3, 8\)"):
        pipeline.sample([[]], [], SETTINGS, [0], given=given[:, :3])
    with pytest.raises(ValueError, match="given codes go up to 99999"):
        pipeline.sample([[]], [], SETTINGS, [0], given=given + 99999)
    given[:, 3] = -1
    with pytest.raises(ValueError, match="whole windows of 2 x 2"):
        pipeline.sample([[]], [], SETTINGS, [0], given=given)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cfg", float("nan")), ("cfg", -1.0), ("temperature", float("inf")), ("top_p", 0.0),
        ("top_p", float("nan")), ("top_k", -1), ("schedule", "cosine"), ("width", 0),
        ("height", 10**7), ("any_size", "yes"), ("any_size", 1),
    ],
)  # fmt: skip
def test_generation_settings_validate_themselves(field, value):
    with pytest.raises(ValueError, match=field if field != "height" else "pixels"):
        replace(SETTINGS, **{field: value})


def test_codes_and_pictures_go_both_ways(pipeline):
    images = torch.rand(2, 16, 24, 3)
    codes = pipeline.encode(images)
    assert codes.shape == (2, 4, 6)
    assert pipeline.decode(codes).shape == images.shape
    with pytest.raises(ValueError, match="must be RGB"):
        pipeline.encode(torch.rand(1, 16, 24, 4))
    with pytest.raises(ValueError, match="a picture of 1x1 cannot be encoded"):
        pipeline.encode(torch.rand(1, 1, 1, 3))
    with pytest.raises(ValueError, match="codes must be from 0 to 63"):
        pipeline.decode(codes + 64)
    with pytest.raises(ValueError, match="codes must be whole numbers"):
        pipeline.decode(codes.float())


def test_a_loaded_checkpoint_draws_the_same_picture(pipeline, tiny):
    expected = pipeline.generate("a red apple", settings=SETTINGS, seed=4).images
    found = load(tiny).generate("a red apple", settings=SETTINGS, seed=4).images
    assert torch.equal(found, expected)
