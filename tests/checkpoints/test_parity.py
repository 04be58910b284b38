"""Logits, codes and text ids of SimpleAR, Wallaroo and Emu3.5 against `transformers`, `tiktoken`
and whole prompts; how a folder is recognised."""

import base64
import json
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from tests.checkpoints.test_public_models import TEXT, drawn, tokenizer_of
from tests.support.public_models import (
    COSMOS,
    OF_QWEN,
    OF_SIMPLEAR,
    greedy,
    write_emu,
    write_simplear,
    write_wallaroo,
)
from tests.support.published import llama, write_llama, write_tokenizer
from tokenshuffle_core import checkpoints
from tokenshuffle_core.checkpoints.source import Source
from tokenshuffle_core.checkpoints.tokenizer_files import SPECIAL, text_tokenizer_of
from tokenshuffle_core.checkpoints.wallaroo import SPECIAL as OF_WALLAROO
from tokenshuffle_core.pipeline import load

BOOK = "quantize.embedding.weight"
PATTERN = (  # of Emu3.5's tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def emu(tmp_path_factory):
    path = tmp_path_factory.mktemp("emu") / "Emu3.5-Image"
    return path, write_emu(path)


@pytest.fixture(scope="module")
def wallaroo(tmp_path_factory):
    path = tmp_path_factory.mktemp("wallaroo") / "model" / "wallaroo.ckpt"
    theirs = write_wallaroo(path.parent)
    file = path.parent / "vq_ds16_t2i.pt"
    weights = torch.load(file)["model"]
    weights[BOOK] *= 0.5 + torch.rand(len(weights[BOOK]), 1)  # of which only the directions count
    torch.save({"model": weights}, file)
    return path, theirs


def book_of(path: Path) -> torch.Tensor:
    """The vectors that its image tokenizer gives for codes."""
    return F.normalize(torch.load(path.parent / "vq_ds16_t2i.pt")["model"][BOOK], dim=-1)


@pytest.fixture(scope="module")
def simplear(tmp_path_factory):
    path = tmp_path_factory.mktemp("simplear") / "SimpleAR"
    return path, write_simplear(path, tied=False)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def ours_of(pipeline, text: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return pipeline.model(text, torch.zeros(1, dtype=torch.int64), codes).codes[0, :, 0]


@torch.inference_mode()
def theirs_of(language, text, codes, embed, head, row_end) -> torch.Tensor:
    """Logits of all codes (rows, columns) of a picture, from one pass with ends of rows."""
    words, parts, places = language.get_input_embeddings(), [], []
    place = text.shape[1] - 1  # which predicts the first code
    for row in codes[0]:
        parts += [embed(row), words(torch.tensor([row_end]))]
        places += range(place, place + len(row))
        place += len(row) + 1
    x = torch.cat([words(text[0]), *parts[:-1]])[None]
    body = language.model if hasattr(language, "model") else language
    return head(body(inputs_embeds=x).last_hidden_state[0, places])


def test_emus_logits_are_those_of_a_qwen3(emu):
    path, theirs = emu
    ours = load(path, dtype=torch.float32)
    first, end = ours.config.model.text_vocabulary, ours.config.model.row_end
    text, codes = torch.randint(0, first, (1, 9)), torch.randint(0, 96, (1, 4, 3))
    expected = theirs_of(
        theirs, text, codes, lambda x: theirs.get_input_embeddings()(x + first),
        lambda x: theirs.lm_head(x)[:, first:], end,
    )  # fmt: skip
    close(ours_of(ours, text, codes), expected)


def test_untied_simplears_logits(simplear):
    path, theirs = simplear
    ours = load(path, dtype=torch.float32)
    first = ours.config.model.text_vocabulary
    text, codes = torch.randint(0, first, (1, 7)), torch.randint(0, 64_000, (1, 3, 4))
    with torch.inference_mode():
        expected = theirs(torch.cat([text, codes.flatten(1) + first], 1)).logits[0, 6:-1, first:]
    close(ours_of(ours, text, codes), expected)


@pytest.mark.parametrize("kind", ["older", "newer", "none"])
def test_wallaroos_logits_are_those_of_a_qwen2_5_vl(wallaroo, tmp_path, kind):
    """Its positions have three axes, which `transformers` fills by itself for text."""
    path, theirs = wallaroo
    shutil.copytree(path.parent, tmp_path / "w")
    path, file = tmp_path / "w" / path.name, tmp_path / "w" / "config.json"
    config = json.loads(file.read_text())
    mrope = config.pop("rope_scaling")
    if kind == "newer":
        config.pop("rope_theta")
        rope = {"rope_type": "default", "rope_theta": 1e4, **mrope}
        rope.pop("type")
        config = {"text_config": config | {"rope_parameters": rope}}
    elif kind == "older":
        config |= {"rope_scaling": mrope}
    file.write_text(json.dumps(config))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "rms_norm_eps")  # fmt: skip
    shape = {name: getattr(theirs.language.config, name) for name in names}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    language = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(**shape, rope_parameters=rope, pad_token_id=0)
    ).eval()
    language.load_state_dict(theirs.language.model.state_dict())
    ours = load(path, dtype=torch.float32)
    book = book_of(path)
    text = torch.randint(0, 300, (1, 9))
    codes = torch.randint(0, len(book), (1, 4, 3))
    expected = theirs_of(
        language, text, codes, lambda x: theirs.gen_input_adpater(book[x]),
        theirs.gen_image_head, ours.config.model.row_end,
    )  # fmt: skip
    close(ours_of(ours, text, codes), expected)


@torch.inference_mode()
def test_wallaroos_codes_at_a_size_of_its_own(wallaroo):
    path, theirs = wallaroo
    pipeline, width, height = load(path, dtype=torch.float32), 352, 384
    book = book_of(path)
    tokenizer = tokenizer_of(path.parent, OF_QWEN + OF_WALLAROO)
    frame = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        'Generate an image with resolution 352x384 based on the prompt: "{}"<|im_end|>\n '
        "<indicator:384><indicator:352><|im_start|>assistant\n<|generate_start|>"
    )
    words, model = theirs.language.get_input_embeddings(), theirs.language.model
    end = tokenizer.convert_tokens_to_ids("<|end_of_line>|")
    rows = [
        (words(torch.tensor([tokenizer(frame.format(text)).input_ids])), DynamicCache())
        for text in (TEXT, "ugly")
    ]
    inputs, expected = [x for x, _ in rows], []
    for place in range(22 * 24):
        hidden = [
            model(inputs_embeds=x, past_key_values=cache, use_cache=True)
            for x, (_, cache) in zip(inputs, rows, strict=True)
        ]
        c, u = (theirs.gen_image_head(x.last_hidden_state[0, -1]) for x in hidden)
        expected.append(int((u + 3 * (c - u)).argmax()))
        parts = [theirs.gen_input_adpater(book[expected[-1:]])]
        if place % 22 == 21:
            parts.append(words(torch.tensor([end])))
        inputs = [torch.cat(parts)[None]] * 2
    settings = replace(
        pipeline.config.generation, height=height, width=width, temperature=0, top_k=0,
        any_size=True,
    )  # fmt: skip
    ids = pipeline.encode_prompt(TEXT), pipeline.encode_prompt("ugly", negative=True)
    *_, last = pipeline.sample([ids[0]], ids[1], settings, [0])
    assert last.codes[0].flatten().tolist() == expected


def emu_encoding(path: Path):
    """Emu3.5's tokenizer as its authors build it, and the number of text tokens."""
    tiktoken = pytest.importorskip("tiktoken")
    lines = (line.split() for line in (path / "emu3.tiktoken").read_text().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    encoding = tiktoken.Encoding(
        "emu", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    return encoding, len(ranks) + len(special)


@pytest.mark.parametrize("negative", ["", "ugly"])
def test_emus_prompts_are_those_of_tiktoken(emu, negative):
    path, theirs = emu
    encoding, first = emu_encoding(path)
    picture = "<|extra_100|><|image start|>3*2<|image token|>"
    start = "<|extra_203|>You are a helpful assistant"
    texts = (
        f"{start} for t2i task. USER: {TEXT} ASSISTANT: {picture}",
        f"{start}. USER: {negative} ASSISTANT: {picture}",
    )
    prompts = [
        encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all") for text in texts
    ]
    pipeline = load(path, dtype=torch.float32)
    for ids, text, of in zip(prompts, (TEXT, negative), (False, True), strict=True):
        found = pipeline.encode_prompt(text, negative=of)
        assert pipeline.text_tokenizer.frame(found, 3, 2, negative=of) == ids
    expected = greedy(
        theirs, prompts, (3, 2), 5.0,
        lambda codes: theirs.get_input_embeddings()(codes + first),
        lambda hidden: theirs.lm_head(hidden)[first:], encoding._special_tokens["<|extra_200|>"],
    )  # fmt: skip
    assert torch.equal(drawn(pipeline, (3, 2), negative), expected)


@pytest.mark.parametrize("token", ["<|extra_200|>", "<|image end|>"])
def test_a_text_tokenizer_without_row_ends(emu, tmp_path, token):
    path, _ = emu
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    parts = json.loads(text_tokenizer_of(Source(path)))
    parts["added_tokens"] = [x for x in parts["added_tokens"] if x["content"] != token]
    renamed = {("<|gap|>" if x == token else x): i for x, i in parts["model"]["vocab"].items()}
    parts["model"]["vocab"] = renamed
    (copy / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match="its text tokenizer has no token") as caught:
        checkpoints.read(copy, image_tokenizer=path.parent / "Emu3.5-VisionTokenizer")
    assert str(caught.value).endswith(token)


def test_simplear_with_tokenizer_json(simplear, tmp_path):
    path, _ = simplear
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    tokenizer_of(path, OF_QWEN + OF_SIMPLEAR).save_pretrained(copy)
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (copy / name).unlink(missing_ok=True)
    assert (copy / "tokenizer.json").is_file()
    other = load(copy, dtype=torch.float32, image_tokenizer=path.parent / COSMOS)
    pipeline = load(path, dtype=torch.float32)
    assert other.config == pipeline.config
    for text in (TEXT, "", "<|soi|> é ﷺ 红苹果"):
        assert other.encode_prompt(text) == pipeline.encode_prompt(text)
    assert torch.equal(drawn(other, (2, 2), "ugly"), drawn(pipeline, (2, 2), "ugly"))


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer.json", "tokenizer_config.json"])
def test_simplear_that_calls_itself_a_qwen2(simplear, tmp_path, file):
    path, theirs = simplear
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    (copy / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    listed = json.loads((copy / "added_tokens.json").read_text())
    if file == "tokenizer.json":
        text = text_tokenizer_of(Source(path))
        (copy / file).write_text(text)
    elif file == "tokenizer_config.json":
        decoder = {id: {"content": token, "special": True} for token, id in listed.items()}
        (copy / file).write_text(json.dumps({"added_tokens_decoder": decoder}))
    if file != "added_tokens.json":
        (copy / "added_tokens.json").unlink()
    found = checkpoints.read(copy, image_tokenizer=path.parent / COSMOS)
    assert found.config == checkpoints.read(path).config


@pytest.mark.parametrize(
    ("kind", "rows", "token"),
    [("Llama", 64_400, "<|soi|>"), ("Qwen2", 64_400, "</s>"), ("Qwen3", 64_400, "<|soi|>"),
     ("Qwen2", 400, "<|soi|>")],
)  # fmt: skip
def test_a_start_is_a_llama(tmp_path, kind, rows, token):
    """Without room for SimpleAR's codes, without its token, or of another kind."""
    folder = write_llama(llama(True, kind, vocab_size=rows, hidden_size=32), tmp_path / "it")
    write_tokenizer(folder / "tokenizer.json", ["<s>", token])
    with pytest.raises(ValueError, match="is a LLaMA: name the image tokenizer to use"):
        checkpoints.read(folder)
