from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tokenshuffle_core.checkpoints import SIZES
from tokenshuffle_core.class_names import ClassNames
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
        (250, 16, "width 250 does not fit: .* multiples of 8 .* are 248x16 and 256x16$"),
        (250, 13, "width 250 does not fit: .* are 248x8 and 256x16$"),
        (16, 3, "height 3 does not fit: .* are 16x8$"),
        (8192, 8, "width 8192 is too large: .* at most 512 pixels"),
        (512, 512, "takes 4096 positions, this model's context has 1132 .* such as 264x264, or"),
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
        ("height", 10**7), ("any_size", "yes"), ("any_size", 1), ("any_size", None),
        *((field, value) for field in ("cfg", "temperature", "top_p", "top_k", "width", "window")
          for value in (True, "3", [3], 10**400, 1e400, -1)),
        *((field, None) for field in ("cfg", "top_k", "width")), ("top_k", 3.0), ("window", 0),
        ("schedule", ["linear"]), ("schedule", None),
    ],
)  # fmt: skip
def test_generation_settings_validate_themselves(field, value):
    with pytest.raises(ValueError, match=f"^{field}" if field != "height" else "pixels") as error:
        replace(SETTINGS, **{field: value})
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.5, "3", None, float("nan")])
def test_seeds_that_are_none(pipeline, seed):
    for draw in (pipeline.generate, pipeline.stream):
        with pytest.raises(ValueError, match=r"^seed must be a whole number from 0 to "):
            draw("a", settings=SETTINGS, seed=seed)
    with pytest.raises(ValueError, match=r"^seed must be"):
        pipeline.sample([[]], [], SETTINGS, [seed])


@pytest.mark.parametrize("count", [0, True, 1.5, 10**9])
def test_numbers_of_pictures_that_are_none(pipeline, count):
    with pytest.raises(ValueError, match=r"^the number of pictures must be a whole number from 1 "):
        pipeline.generate("a", settings=SETTINGS, count=count)


@pytest.mark.parametrize("text", ["a \ud800 b", "\udcff", "a\0b", None, 3, ["a"]])
def test_prompts_that_are_no_text(pipeline, text):
    for name, call in {
        "the prompt": lambda: pipeline.stream(text, settings=SETTINGS),
        "the negative prompt": lambda: pipeline.stream("a", text, SETTINGS),
        "the prompt ": lambda: pipeline.read_prompt(text),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()} (contains|must be text)"):
            call()


def test_a_class_is_only_for_a_model_that_reads_classes(pipeline):
    with pytest.raises(ValueError, match="this model reads text, not classes"):
        pipeline.encode_class("207")
    classes = replace(pipeline, text_tokenizer=ClassNames(["tench", "hen"]))
    assert classes.encode_class("hen") == classes.encode_class("1") == [1]
    with pytest.raises(ValueError, match="'a red apple' is not the name of a class"):
        classes.encode_class("a red apple")


def test_codes_and_pictures_go_both_ways(pipeline):
    images = torch.rand(2, 16, 24, 3)
    codes = pipeline.encode(images)
    assert codes.shape == (2, 4, 6)
    assert pipeline.decode(codes).shape == images.shape
    with pytest.raises(ValueError, match="must be RGB"):
        pipeline.encode(torch.rand(1, 16, 24, 4))
    with pytest.raises(ValueError, match=r"width 1 does not fit: .* are 4x4$"):
        pipeline.encode(torch.rand(1, 1, 1, 3))
    with pytest.raises(ValueError, match=r"height 15 does not fit: .* are 16x12 and 16x16$"):
        pipeline.encode(torch.rand(1, 15, 16, 3))
    with pytest.raises(ValueError, match="codes must be from 0 to 63"):
        pipeline.decode(codes + 64)
    with pytest.raises(ValueError, match="codes must be whole numbers"):
        pipeline.decode(codes.float())


def test_a_loaded_checkpoint_draws_the_same_picture(pipeline, tiny):
    expected = pipeline.generate("a red apple", settings=SETTINGS, seed=4).images
    found = load(tiny).generate("a red apple", settings=SETTINGS, seed=4).images
    assert torch.equal(found, expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_on_a_cpu_linear_layers_stay_in_the_16_bits_of_their_file(stored, pipeline, tmp_path):
    path = tmp_path / "half.safetensors"
    pipeline.save(path, stored)
    small, whole = load(path), load(path, dtype=torch.float32)
    linear = {f"{n}.weight" for n, m in small.model.named_modules() if isinstance(m, nn.Linear)}
    own = stored if "fbgemm" in torch.backends.quantized.supported_engines else torch.float32
    for name, weight in small.model.state_dict().items():
        assert weight.dtype == (own if name in linear else torch.float32), name
        assert torch.equal(weight.float(), whole.model.state_dict()[name]), name
    small.save(tmp_path / "again.safetensors")
    assert {x.dtype for x in load_file(tmp_path / "again.safetensors").values()} == {torch.float32}
    prompts = [small.encode_prompt("a red apple")], small.encode_prompt("")
    for engine in (True, False):
        found, expected = (
            list(each.sample(*prompts, SETTINGS, [4], engine=engine))[-1].codes
            for each in (small, whole)
        )
        assert torch.equal(found, expected)
