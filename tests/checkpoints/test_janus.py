"""Against the `transformers` library's Janus with random weights, in float32."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.support.published import janus, write_janus, write_original_janus
from tokenshuffle_core import checkpoints, pipeline
from tokenshuffle_core.checkpoints.janus import PROMPT
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.text_tokenizer import TextTokenizer

TEXT = "A red Apple, 3d"
CHAT = "<|User|>: A red Apple, 3d\n\n<|Assistant|>:<begin_of_image>"


@pytest.fixture(scope="module")
def theirs():
    return janus()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return write_janus(theirs, tmp_path_factory.mktemp("janus-pro"))


@pytest.fixture(scope="module", params=["transformers", "original", "converted"])
def ours(request, theirs, folder, tmp_path_factory):
    path = folder
    if request.param == "original":
        path = write_original_janus(theirs, tmp_path_factory.mktemp("janus") / "original-pro")
    if request.param == "converted":
        path = tmp_path_factory.mktemp("janus") / "janus.safetensors"
        checkpoints.convert(folder, path)
    return load(path)


@torch.inference_mode()
def test_codes_and_pixels(theirs, ours):
    images = torch.rand(2, 3, 32, 16)
    vq = theirs.model.vqmodel
    codes = vq.encode(images * 2 - 1).image_tokens.view(2, 8, 4)
    assert torch.equal(ours.image_tokenizer.encode(images), codes)
    square = codes[:, :4]
    pixels = vq.decode(square.flatten(1))
    expected = ((pixels + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(ours.image_tokenizer.decode(square), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_prompt_is_framed_as_the_authors_do(folder, ours):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    expected = tokenizer.encode("<｜begin▁of▁sentence｜>" + CHAT, add_special_tokens=False)
    framed = ours.text_tokenizer.frame(ours.encode_prompt(f" {TEXT} \n"), 4, 4)
    assert framed == expected
    pads = [tokenizer.convert_tokens_to_ids("<｜▁pad▁｜>")] * (len(expected) - 2)
    negative = ours.text_tokenizer.frame(ours.encode_prompt(""), 4, 4, len(framed))
    assert negative == [expected[0], *pads, expected[-1]]


def test_roles_that_are_special_tokens_are_framed_as_such(folder, tmp_path):
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    fast.add_special_tokens({"additional_special_tokens": ["<|User|>", "<|Assistant|>"]})
    fast.save_pretrained(tmp_path)
    tokenizer = TextTokenizer.from_json((tmp_path / "tokenizer.json").read_text(), PROMPT)
    expected = fast.encode("<｜begin▁of▁sentence｜>" + CHAT, add_special_tokens=False)
    assert tokenizer.frame(tokenizer.encode(TEXT), 4, 4) == expected


@torch.inference_mode()
def test_image_logits(theirs, ours):
    framed = torch.tensor([ours.text_tokenizer.frame(ours.encode_prompt(TEXT), 4, 4)])
    codes = torch.randint(0, 64, (1, 4, 4))
    embedded = torch.cat(
        [
            theirs.get_input_embeddings()(framed),
            theirs.prepare_embeddings_for_image_generation(codes.flatten(1)),
        ],
        dim=1,
    )
    hidden = theirs.model.language_model(inputs_embeds=embedded).last_hidden_state
    expected = theirs.model.generation_head(hidden)[:, framed.shape[1] - 1 : -1]
    found = ours.model(framed, torch.zeros(1, dtype=torch.int64), codes).codes.flatten(1, 2)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@torch.inference_mode()
@pytest.mark.parametrize("engine", [True, False])
def test_greedy_steps_with_guidance(theirs, ours, engine):
    framed = ours.text_tokenizer.frame(ours.encode_prompt(TEXT), 4, 4)
    expected = theirs.generate(
        torch.tensor([framed]), attention_mask=torch.ones(1, len(framed), dtype=torch.int64),
        generation_mode="image", do_sample=False, guidance_scale=5,
    )  # fmt: skip
    settings = pipeline.GenerationConfig(16, 16, cfg=5.0, schedule="constant", temperature=0)
    ahead = 3 if engine else 1
    ids = ours.encode_prompt(TEXT)
    *_, last = ours.sample([ids], [], settings, [0], ahead=ahead, engine=engine)
    assert last.codes.flatten().tolist() == expected.flatten().tolist()


@torch.inference_mode()
def test_the_first_janus_has_other_roles(theirs, tmp_path):
    made = load(write_janus(theirs, tmp_path / "Janus-1.3B"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "Janus-1.3B/tokenizer.json"))
    chat = "<｜begin▁of▁sentence｜>User: a fox\n\nAssistant:<begin_of_image>"
    framed = made.text_tokenizer.frame(made.encode_prompt("a fox"), 4, 4)
    assert framed == tokenizer.encode(chat, add_special_tokens=False)


def test_its_own_settings(ours):
    settings = ours.config.generation
    assert (settings.width, settings.cfg, settings.schedule) == (384, 5.0, "constant")
    assert ours.config.model.windows == (1,)
