"""SimpleAR, Wallaroo and Emu3.5 against the `transformers` library, with prompts written out as the
authors' programs have them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AddedToken, Qwen2Tokenizer

from tests.support.public_models import (
    COSMOS,
    OF_QWEN,
    OF_SIMPLEAR,
    greedy,
    write_emu,
    write_simplear,
    write_wallaroo,
)
from tokenshuffle_core import checkpoints
from tokenshuffle_core.checkpoints.tokenizer_files import SPECIAL
from tokenshuffle_core.checkpoints.wallaroo import SPECIAL as OF_WALLAROO
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.pipeline import load

NEGATIVE = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad "
    "hands, bad teeth, bad eyes, bad limbs, distortion"
)
TEXT = 'a "red" apple, 2 houses'


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, torch.nn.Module]]:
    """What to load of each family, and the model of `transformers`."""
    root = tmp_path_factory.mktemp("public")
    made = {
        "simplear": root / "simplear" / "SimpleAR-0.5B-RL",
        "untied": root / "simplear" / "untied",
        "emu3.5": root / "emu" / "Emu3.5-Image",
        "wallaroo": root / "wallaroo" / "wallaroo.ckpt",
    }
    return {
        "simplear": (made["simplear"], write_simplear(made["simplear"])),
        "untied": (made["untied"], write_simplear(made["untied"], tied=False)),
        "emu3.5": (made["emu3.5"], write_emu(made["emu3.5"])),
        "wallaroo": (made["wallaroo"], write_wallaroo(made["wallaroo"].parent)),
    }


def tokenizer_of(folder: Path, special: list[str]) -> Qwen2Tokenizer:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split()) for line in merges if not line.startswith("#version")]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    added = [AddedToken(token, special=True) for token in special]
    tokenizer.add_tokens([token for token in added if token.content not in tokenizer.get_vocab()])
    return tokenizer


def drawn(pipeline, grid: tuple[int, int], negative: str = "") -> torch.Tensor:
    side = pipeline.config.image_tokenizer.stride
    settings = replace(
        pipeline.config.generation, height=grid[0] * side, width=grid[1] * side, temperature=0,
        top_k=0, any_size=True,
    )  # fmt: skip
    for engine in (False, True):
        ids = pipeline.encode_prompt(TEXT), pipeline.encode_prompt(negative, negative=True)
        *_, last = pipeline.sample([ids[0]], ids[1], settings, [0], engine=engine)
    return last.codes[0]


@pytest.mark.parametrize("name", ["simplear", "untied"])
@pytest.mark.parametrize("negative", ["", "ugly"])
def test_simplear_draws_what_its_authors_program_does(folders, name, negative):
    path, theirs = folders[name]
    tokenizer = tokenizer_of(path, OF_QWEN + OF_SIMPLEAR)
    first = len(tokenizer)
    assert theirs.config.vocab_size == first + 64_000
    texts = f"A highly realistic image of {TEXT}", negative or NEGATIVE
    prompts = tuple(tokenizer(f"<|t2i|>{text}<|soi|>").input_ids for text in texts)
    expected = greedy(
        theirs, prompts, (2, 3), 6.0,
        lambda codes: theirs.get_input_embeddings()(codes + first),
        lambda hidden: theirs.lm_head(hidden)[first:],
    )  # fmt: skip
    pipeline = load(path, dtype=torch.float32)
    assert pipeline.config.generation.cfg == 6
    assert torch.equal(drawn(pipeline, (2, 3), negative), expected)
    ids = pipeline.encode_prompt(TEXT)
    assert pipeline.text_tokenizer.frame(ids, 2, 3) == prompts[0]


def test_simplears_logits_are_those_of_a_qwen2(folders):
    path, theirs = folders["simplear"]
    ours = load(path, dtype=torch.float32)
    first = ours.config.model.text_vocabulary
    text, codes = torch.randint(0, first, (1, 7)), torch.randint(0, 64_000, (1, 3, 4))
    with torch.inference_mode():
        found = ours.model(text, torch.zeros(1, dtype=torch.int64), codes).codes[0, :, 0]
        ids = torch.cat([text, codes.flatten(1) + first], 1)
        expected = theirs(ids).logits[0, 6:-1, first:]
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_wallaroo_draws_what_its_authors_program_does(folders):
    path, theirs = folders["wallaroo"]
    pipeline = load(path, dtype=torch.float32)
    tokenizer = tokenizer_of(path.parent, OF_QWEN + OF_WALLAROO)
    book = F.normalize(pipeline.image_tokenizer.quantizer.codebook.weight, dim=-1)
    frame = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        'Generate an image with resolution 384x352 based on the prompt: "{}"<|im_end|>\n '
        "<indicator:352><indicator:384><|im_start|>assistant\n<|generate_start|>"
    )
    prompts = tuple(tokenizer(frame.format(text)).input_ids for text in (TEXT, ""))
    grid = 352 // 16, 384 // 16
    ids = [pipeline.encode_prompt(TEXT), pipeline.encode_prompt("", negative=True)]
    for number, negative in enumerate((False, True)):
        framed = pipeline.text_tokenizer.frame(ids[number], *grid, pixels=16, negative=negative)
        assert framed == prompts[number]
    end = tokenizer.convert_tokens_to_ids("<|end_of_line>|")
    # Of a picture of that size, whole passes would take minutes: the same prompt for a small one.
    expected = greedy(
        theirs.language, prompts, (3, 2), 3.0, lambda codes: theirs.gen_input_adpater(book[codes]),
        theirs.gen_image_head, end,
    )  # fmt: skip
    model = pipeline.model
    with torch.inference_mode():
        codes = torch.zeros(1, 3, 2, dtype=torch.int64)
        for t in range(6):
            scores = [
                model(torch.tensor([each]), torch.zeros(1, dtype=torch.int64), codes).codes[0, t, 0]
                for each in prompts
            ]
            codes[0, t // 2, t % 2] = (scores[1] + 3 * (scores[0] - scores[1])).argmax()
    assert torch.equal(codes[0], expected)


def test_wallaroos_folder_is_its_file(folders):
    path, _ = folders["wallaroo"]
    alone, folder = load(path, dtype=torch.float32), load(path.parent, dtype=torch.float32)
    assert alone.config == folder.config
    for name, weight in alone.model.state_dict().items():
        assert torch.equal(folder.model.state_dict()[name], weight)


def test_emu_draws_what_its_authors_program_does(folders):
    path, theirs = folders["emu3.5"]
    ranks = len((path / "emu3.tiktoken").read_text().splitlines())
    pipeline = load(path, dtype=torch.float32)
    tokenizer, first = pipeline.text_tokenizer, ranks + len(SPECIAL)
    id_of = {token: ranks + i for i, token in enumerate(SPECIAL)}
    assert pipeline.config.model.row_end == id_of["<|extra_200|>"]

    def ids(text: str) -> list[int]:  # of text without special tokens, as test_tokenizer_files has
        return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids

    prompts = tuple(
        [id_of["<|extra_203|>"], *ids(text), id_of["<|extra_100|>"], id_of["<|image start|>"],
         *ids("3*2"), id_of["<|image token|>"]]
        for text in (
            f"You are a helpful assistant for t2i task. USER: {TEXT} ASSISTANT: ",
            "You are a helpful assistant. USER:  ASSISTANT: ",
        )
    )  # fmt: skip
    expected = greedy(
        theirs, prompts, (3, 2), 5.0,
        lambda codes: theirs.get_input_embeddings()(codes + first),
        lambda hidden: theirs.lm_head(hidden)[first:], id_of["<|extra_200|>"],
    )  # fmt: skip
    assert torch.equal(drawn(pipeline, (3, 2)), expected)


@pytest.mark.parametrize("name", ["simplear", "emu3.5", "wallaroo"])
def test_convert_info_and_generate(folders, tmp_path, capsys, name):
    path, _ = folders[name]
    converted, picture = tmp_path / "a.safetensors", tmp_path / "a.png"
    assert main(["info", str(path)]) == 0
    told = capsys.readouterr().out
    assert main(["convert", str(path), "-o", str(converted)]) == 0
    assert main(["info", str(converted)]) == 0
    again = capsys.readouterr().out
    for line in told.splitlines():
        if line.startswith(("model", "image tokenizer", "generation", "size")):
            assert line in again
    # Wallaroo has tokens for some sizes alone.
    width, height = {"simplear": (48, 32), "emu3.5": (48, 32), "wallaroo": (352, 352)}[name]
    size = ["--width", str(width), "--height", str(height), "--any-size"]
    for number, model in enumerate((path, converted)):
        options = ["-o", str(picture.with_stem(f"{number}")), "--model", str(model)]
        assert main(["generate", TEXT, *size, *options]) == 0
    found, expected = (Image.open(picture.with_stem(f"{number}")) for number in (1, 0))
    assert found.size == (width, height)
    assert found.tobytes() == expected.tobytes()
    if name != "wallaroo":
        published, ours = load(path, dtype=torch.float32), load(converted, dtype=torch.float32)
        assert torch.equal(drawn(published, (2, 3)), drawn(ours, (2, 3)))


def test_emu_becomes_small_on_the_way(folders, tmp_path):
    path, _ = folders["emu3.5"]
    output = tmp_path / "a.safetensors"
    assert main(["convert", str(path), "-o", str(output), "--weights", "int4"]) == 0
    small = load(output, dtype=torch.float32)
    expected = load(path, dtype=torch.float32, weights="int4")
    assert torch.equal(drawn(small, (2, 2)), drawn(expected, (2, 2)))


def test_another_version_of_cosmos_is_refused(folders, tmp_path):
    path, _ = folders["simplear"]
    other = tmp_path / "Cosmos-0.1-Tokenizer-DV8x16x16"
    shutil.copytree(path.parent / COSMOS, other)
    with pytest.raises(ValueError, match=r"is version 0.1, .* SimpleAR needs Cosmos-1.0"):
        checkpoints.read(path, image_tokenizer=other)


@pytest.mark.parametrize(
    ("name", "missing", "sentence"),
    [
        ("simplear", "vocab.json", "has no text tokenizer"),
        ("emu3.5", "emu3.tiktoken", "has no text tokenizer"),
        ("wallaroo", "vq_ds16_t2i.pt", "needs its image tokenizer: put vq_ds16_t2i.pt beside it"),
        ("wallaroo", "vocab.json", "has no text tokenizer"),
        ("simplear", f"../{COSMOS}", f"put the folder {COSMOS} beside it"),
        ("emu3.5", "../Emu3.5-VisionTokenizer", "put the folder Emu3.5-VisionTokenizer beside it"),
    ],
)
def test_what_is_missing_is_named(folders, tmp_path, name, missing, sentence):
    path, _ = folders[name]
    folder = path if path.is_dir() else path.parent
    copy = tmp_path / "root" / folder.name
    shutil.copytree(folder, copy)
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder and name != "wallaroo" and other.name != "untied":
            shutil.copytree(other, copy.parent / other.name)
    gone = copy / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        checkpoints.read(copy if path.is_dir() else copy / path.name)


def test_both_in_the_cache_of_hugging_face(folders, tmp_path):
    path, _ = folders["simplear"]
    for folder, owner in ((path, "Daniel0724"), (path.parent / COSMOS, "nvidia")):
        snapshot = tmp_path / f"models--{owner}--{folder.name}" / "snapshots" / "0a1b"
        shutil.copytree(folder, snapshot)
    cached = checkpoints.read(tmp_path / f"models--Daniel0724--{path.name}")
    assert cached.config == checkpoints.read(path).config


def test_a_linked_folder_with_its_image_tokenizer_beside_the_link(folders, tmp_path):
    path, _ = folders["simplear"]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(path, elsewhere / path.name)
    linked = tmp_path / "models"
    shutil.copytree(path.parent / COSMOS, linked / COSMOS)
    (linked / path.name).symlink_to(elsewhere / path.name, target_is_directory=True)
    assert checkpoints.read(linked / path.name).config == checkpoints.read(path).config


def test_too_few_rows_for_the_codes(folders, tmp_path):
    path, _ = folders["simplear"]
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    ids = json.loads((copy / "added_tokens.json").read_text())
    (copy / "added_tokens.json").write_text(json.dumps(ids | {"<|more|>": max(ids.values()) + 1}))
    with pytest.raises(ValueError, match=r"text tokens and 64000 image codes are more than the"):
        checkpoints.read(copy, image_tokenizer=path.parent / COSMOS)
