"""What a step of the model reads, against the same put together picture by picture."""

import json
import random
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.models import LOOP
from tokenshuffle_core.class_names import ClassNames
from tokenshuffle_core.config import PromptConfig
from tokenshuffle_core.data.shards import CodeShards, Shard
from tokenshuffle_core.data.writing import _write_index
from tokenshuffle_core.sampler import pad_left
from tokenshuffle_core.text_tokenizer import IMAGE_START, PAD, TextTokenizer
from tokenshuffle_core.training.captions import Captions
from tokenshuffle_core.training.feed import Ahead, Feed, resident_codes
from tokenshuffle_core.training.settings import Recipe

CPU = torch.device("cpu")
TEXTS = [
    ["a red apple", "一个苹果", ""],
    ["two cats on a blue background"],
    ["  ", "A Red APPLE\n"],
]
FLAT = [text for texts in TEXTS for text in texts]


def text_tokenizer(**changes) -> TextTokenizer:
    tokenizer = TextTokenizer.train(FLAT, 400, max_grid=8)
    return TextTokenizer.from_json(tokenizer.to_json(), PromptConfig(**changes))


# As Janus does: nothing but padding between the marks of an unconditional prompt.
PADDED = {"template": ("<|begin|>", "User: {prompt} Assistant:", IMAGE_START), "pad": PAD}
TOKENIZERS = {
    "ours": text_tokenizer(),
    "padded negative": text_tokenizer(**PADDED, padded_negative=True),
}


def read(name: str, text: str, longest: int) -> list[int]:
    """The ids that a model reads of a caption and the text of its template around it."""
    tokenizer = TOKENIZERS[name]
    after = tokenizer.tokenizer.encode(" Assistant:" if name == "padded negative" else "").ids
    ids, kept = tokenizer.encode(text), max(0, longest - len(after))
    return ids if len(ids) <= longest else (ids[:kept] + after)[:longest]


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("longest", [4, 20, 100])
def test_rows_are_framed_captions_padded_on_the_left(name, longest, multiple):
    tokenizer, grid = TOKENIZERS[name], (3, 5)
    captions = Captions(TEXTS, tokenizer, longest)
    assert captions.first.tolist() == [0, 3, 4, 6]
    for chosen in ([0, 1, 2, 3, 4, 5], [3, -1], [-1, -1, 2], [5, 0, 0]):
        ids = [read(name, FLAT[i], longest) if i >= 0 else [] for i in chosen]
        length = max(len(tokenizer.frame(each, *grid)) for each in ids)
        rows = [tokenizer.frame(each, *grid, length) for each in ids]
        expected, padding = pad_left(rows, tokenizer.pad, CPU)
        text, found = captions.rows(np.array(chosen), grid, multiple)
        extra = text.shape[1] - expected.shape[1]
        assert 0 <= extra < multiple
        assert (text.shape[1] - 1) % multiple == 0
        assert torch.equal(text[:, extra:].long(), expected)
        assert (text[:, :extra] == tokenizer.pad).all()
        assert torch.equal(found - extra, padding)
    assert captions.prompt(1, grid) == tokenizer.frame(read(name, FLAT[3], longest), *grid)


def test_captions_of_a_class_conditional_model():
    names = ClassNames(["tench", "goldfish", "shark"])
    captions = Captions([["goldfish"], ["2", "tench"]], names, 1)
    text, padding = captions.rows(np.array([0, 1, -1, 2]), (2, 2))
    assert text.tolist() == [[1], [2], [3], [0]]
    assert not padding.any()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_encoded_together_as_one_by_one(name):
    tokenizer = TOKENIZERS[name]
    texts = [*FLAT, "<|pad|>", "an owl, 3d style"]
    assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]


def write_codes(directory, count: int, side: int = 8, captions: int = 3, shard: int = 64):
    """A folder of random codes (side, side) from a stride of 4 with words as captions."""
    words, rng = ["red", "apple", "owl", "two", "blue", "cat", "on", "a"], random.Random(0)
    sources = {}
    for first in range(0, count, shard):
        number = min(shard, count - first)
        records = [
            {
                "key": str(first + i),
                "captions": [" ".join(rng.choices(words, k=1 + i % 9)) for _ in range(captions)],
                "repeats": 1 + i % 2,
                "split": "held-out" if i % 10 == 9 else "train",
                "bucket": [4 * side, 4 * side],
            }
            for i in range(number)
        ]
        codes = torch.randint(0, 64, (number * side**2,), dtype=torch.int16)
        grid = torch.full((number, 2), side, dtype=torch.int32)
        path = directory / f"codes-{first // shard:05}.safetensors"
        Shard(codes, grid, list(map(json.dumps, records)), [], path.name).write(path)
        sources[path] = path.name
    sizes = [f"{4 * side}x{4 * side}"]
    about = {"stride": 4, "codebook_size": 64, "sizes": sizes, "image_tokenizer": "random"}
    _write_index(directory, sources, about)
    return CodeShards(directory)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> CodeShards:
    return write_codes(tmp_path_factory.mktemp("codes"), 200)


def feed_of(shards, recipe=None, windows=(2, 4), **changes) -> Feed:
    loop = replace(LOOP, **{"batch": 12} | changes)
    return Feed(shards, text_tokenizer(), 60, windows, loop, recipe or Recipe(), CPU)


def test_a_step_has_its_pictures_captions_and_codes(shards):
    feed = feed_of(shards, Recipe(drop_prompt=0.3))
    tokenizer = feed.captions.tokenizer
    dropped = 0
    for step in range(20):
        draw, whole = feed.draw(step), feed.piece(step, 0, 1)
        assert whole.window in (2, 4)
        grid = (8 // whole.window,) * 2
        predicted = 0
        for row, index in enumerate(draw.indices.tolist()):
            record = shards.record(index)
            assert record["split"] == "train"
            assert torch.equal(whole.codes[row], shards.codes(index))
            found = whole.text[row, whole.padding[row] :].tolist()
            choices = [tokenizer.frame(tokenizer.encode(c), *grid) for c in record["captions"]]
            empty = tokenizer.frame([], *grid)
            assert found in [*choices, empty]
            dropped += found == empty
            predicted += len(found) - 1
        assert whole.predicted == predicted
    assert dropped / 240 == pytest.approx(0.3, abs=0.1)


def test_every_caption_is_chosen_equally_often(shards):
    feed = feed_of(shards, Recipe(drop_prompt=0), windows=(2,))
    places = []
    for step in range(100):
        draw = feed.draw(step)
        for row, index in enumerate(draw.indices.tolist()):
            found = draw.text[row, draw.padding[row] :].tolist()
            tokenizer = feed.captions.tokenizer
            choices = [
                tokenizer.frame(tokenizer.encode(caption), 4, 4)
                for caption in shards.record(index)["captions"]
            ]
            if choices.count(found) == 1:
                places.append(choices.index(found))
    shares = np.bincount(places) / len(places)
    assert shares == pytest.approx([1 / 3] * 3, abs=0.06)


def test_foreign_windows_are_the_neighbours(shards):
    feed = feed_of(shards, Recipe(context_noise=0.8), windows=(4,), batch=64)
    shares = []
    for step in range(20):
        whole = feed.piece(step, 0, 1)
        windows = whole.context.unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(2, 3)
        own = whole.codes.unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(2, 3)
        is_own = (windows == own).flatten(3).all(-1)
        assert (is_own | (windows == own.roll(1, 0)).flatten(3).all(-1)).all()
        shares.append(1 - is_own.float().mean((1, 2)))
    shares = torch.cat(shares)
    assert shares.mean() == pytest.approx(0.4, abs=0.05)  # the mean of 0 to 0.8
    assert shares.std() > 0.2  # another share in each picture
    clean = feed_of(shards, Recipe(context_noise=0)).piece(0, 0, 1)
    assert torch.equal(clean.context, clean.codes)


def test_pieces_are_rows_of_the_whole(shards):
    feed = feed_of(shards)
    for step in (3, 0, 4, 5):
        whole = feed.piece(step, 0, 1)
        for pieces in (2, 4):
            for piece in range(pieces):
                part = feed.piece(step, piece, pieces)
                assert part.window == whole.window
                assert part.predicted == whole.predicted / pieces
                for name in ("text", "padding", "codes", "context"):
                    expected = getattr(whole, name)[piece::pieces]
                    assert torch.equal(getattr(part, name), expected), name


def test_a_step_depends_on_seed_and_number_alone(shards):
    steps = [40, 0, 1, 2, 0, 17]
    one, other = feed_of(shards), feed_of(shards)
    expected = {step: other.piece(step, 0, 1) for step in sorted(steps)}
    for step in steps:
        found = one.piece(step, 0, 1)
        assert all(torch.equal(a, b) for a, b in zip(found[1:5], expected[step][1:5], strict=True))
    again = feed_of(shards, seed=1).piece(0, 0, 1)
    assert not torch.equal(again.codes, expected[0].codes)


def test_codes_on_the_device_are_those_on_disk(shards):
    """As on a GPU, where the host sends only their places."""
    mapped, resident = feed_of(shards), feed_of(shards)
    resident.resident = resident_codes(shards, CPU)
    assert resident.resident[32, 32].dtype == torch.int16
    for step in range(5):
        for key in ((step, 0, 1), (step, 1, 3)):
            found, expected = resident.piece(*key), mapped.piece(*key)
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.context, expected.context)


def test_compiled_steps_have_few_lengths(shards):
    feed = feed_of(shards, compile=True)
    assert {feed.draw(step).text.shape[1] for step in range(100)} <= {17, 33, 49}


def test_what_follows_is_computed_meanwhile():
    made, go = [], threading.Event()

    def make(number):
        if number == 2:
            assert go.wait(10)
        if number == 4:
            raise ValueError("four")
        made.append((number, threading.current_thread()))
        return number

    ahead = Ahead(make, lambda number: (number + 1,))
    assert ahead(1) == 1  # returns although 2 is not finished
    go.set()
    assert ahead(2) == 2
    assert ahead(7) == 7  # not what was expected
    assert ahead(3) == 3
    assert all(thread is not threading.current_thread() for _, thread in made)
    with pytest.raises(ValueError, match="four"):
        ahead(4)


@pytest.mark.slow
def test_the_host_needs_little_time(tmp_path):
    """For a step of 768 pictures of 1,024 codes; less than to parse and tokenise their captions."""
    shards = write_codes(tmp_path, 8192, side=32, captions=8, shard=1024)
    feed = feed_of(shards, windows=(4,), batch=768)

    def seconds(work, times: int = 20) -> float:
        taken = []
        for step in range(times):
            started = time.thread_time()  # of one core, however busy it is
            work(step)
            taken.append(time.thread_time() - started)
        return sorted(taken)[times // 2]

    def naive(step):
        for index in feed.batches.at(step)[1].tolist():
            feed.captions.tokenizer.encode(shards.record(index)["captions"][0])

    found = SimpleNamespace(
        mapped=seconds(lambda step: feed._load(step, 0, 1)), naive=seconds(naive)
    )
    feed.resident, feed.drawn = resident_codes(shards, CPU), None
    found.resident = seconds(lambda step: feed._load(step, 0, 1))
    print({name: f"{1000 * value:.2f} ms" for name, value in vars(found).items()})
    assert found.mapped < 0.015
    assert found.resident < found.mapped < found.naive / 2
