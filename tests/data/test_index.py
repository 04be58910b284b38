"""Shards and an index that others made: what does not fit is refused in a sentence, another's files
are not replaced."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support.pairs import encoded, noise, write_folder
from tokenshuffle_core.data import CodeShards, extract
from tokenshuffle_core.data.shards import Shard
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.presets import PRESETS

SIZES = [(32, 32), (48, 24)]


@pytest.fixture(scope="module")
def image_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    module = ImageTokenizer(PRESETS["tiny"].image_tokenizer)
    torch.nn.init.normal_(module.quantizer.codebook.weight)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    pairs = {f"{i}.png": (encoded(noise(*SIZES[i % 2], seed=i)), [f"{i}"]) for i in range(5)}
    return write_folder(tmp_path_factory.mktemp("source"), pairs)


@pytest.fixture(scope="module")
def made(source, image_tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "out"
    extract(source, directory, image_tokenizer, SIZES, shard_size=3)
    return directory


@pytest.fixture
def codes(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "codes")


DEEP = "[" * 200_000
FIRST = "codes-00000.safetensors"


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": value} for value in (None, 3, [], {}, {"a": 1}, {FIRST: None}, {FIRST: "x"})
    ]
    + [{"shards": {name: "x"}} for name in ("../out/x", "/etc/passwd", "", "codes-1", "a\0b")]
    + [{"stride": value} for value in (None, 0, -4, 3, 8, 4.0, True, "4", 10**30, [4])]
    + [{"codebook_size": value} for value in (None, 0, 5, -1, "64", 64.0)]
    + [
        {"sizes": value}
        for value in (None, [], "32x32", [3], ["32"], ["0x0"], ["-32x32"], ["9" * 5000 + "x1"],
                      ["32x32"], [f"{10**30}x8"])
    ]
    + [{"pictures": value} for value in (None, 0, 4, 6, -1, 1e300)]
    + [{"held_out": None}, {"image_tokenizer": 7}],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_an_index_that_does_not_fit(changes, codes):
    index = json.loads((codes / "index.json").read_text())
    (codes / "index.json").write_text(json.dumps(index | changes))
    with pytest.raises(ValueError, match=r"index\.json|codes-00000") as refused:
        CodeShards(codes)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '"x"', DEEP, '{"shards": ' + DEEP, "\xff", "1e999"]
)
def test_what_is_no_index(text, codes):
    (codes / "index.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"index\.json is not an index of code shards"):
        CodeShards(codes)


def forged(codes: Path, change) -> CodeShards:
    """The reader after a change of the first shard, whose checksums all fit."""
    from tokenshuffle_core.data.shards import read_shard

    shard = read_shard(codes / FIRST)[0]
    shard = Shard(shard.codes.clone(), shard.grid.clone(), shard.records, [], "source")
    change(shard)
    shard.write(codes / FIRST)
    index = json.loads((codes / "index.json").read_text())
    index["shards"][FIRST] = shard.sha256
    (codes / "index.json").write_text(json.dumps(index))
    return CodeShards(codes)


def set_to(name: str, value):
    return lambda shard: setattr(shard, name, value)


@pytest.mark.parametrize(
    "change",
    [
        set_to("codes", torch.zeros(3, dtype=torch.int16)),
        set_to("codes", torch.zeros(8, 8, dtype=torch.int16)),
        set_to("codes", torch.zeros(224)),
        set_to("grid", torch.zeros(3, dtype=torch.int32)),
        set_to("grid", torch.ones(2, 2, dtype=torch.int32)),
        set_to("grid", torch.full((3, 2), 2**31 - 1, dtype=torch.int32)),
        set_to("grid", torch.tensor([[-8, -8], [6, 12], [8, 8]], dtype=torch.int32)),
        set_to("grid", torch.tensor([[4, 16], [6, 12], [8, 8]], dtype=torch.int32)),
        set_to("records", []),
        set_to("broken", 3),
        set_to("source", None),
        lambda shard: shard.codes.fill_(-1),
        lambda shard: shard.codes.fill_(64),
    ],
    ids=range(13),
)
def test_a_shard_that_does_not_fit(change, codes):
    with pytest.raises(ValueError, match=r"codes-00000\.safetensors|index\.json does not fit"):
        forged(codes, change)


@pytest.mark.parametrize(
    "changes",
    [
        {"captions": None}, {"captions": "a"}, {"captions": [3]}, {"captions": ["\ud800"]},
        {"repeats": 0}, {"repeats": 10**12}, {"repeats": True}, {"split": "test"}, {"split": []},
        {"bucket": [32, 48]}, {"bucket": None}, {"key": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_is_none(changes, codes):
    def change(shard: Shard) -> None:
        shard.records[1] = json.dumps(json.loads(shard.records[1]) | changes)

    reader = forged(codes, change)
    assert reader.record(0)["key"] == "0"
    with pytest.raises(ValueError, match="picture 1 of the codes has a record that is none"):
        reader.record(1)


@pytest.mark.parametrize("record", ["", "3", "{}", DEEP])
def test_a_record_that_is_no_object(record, codes):
    reader = forged(codes, lambda shard: shard.records.__setitem__(1, record))
    with pytest.raises(ValueError, match="picture 1 of the codes has a record that is none"):
        reader.record(1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
@pytest.mark.parametrize("name", [FIRST, "index.json"])
def test_a_pipe_in_the_place_of_a_file(name, source, image_tokenizer, codes):
    (codes / name).unlink()
    os.mkfifo(codes / name)
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        CodeShards(codes)
    with pytest.raises(FileExistsError, match=f"{name} is not from"):
        extract(source, codes, image_tokenizer, SIZES, shard_size=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name", [FIRST, "index.json", "broken-00000.txt", "codes-00007.safetensors"]
)
def test_files_of_others_are_not_replaced(name, source, image_tokenizer, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}')
    before = contents(out)
    with pytest.raises(FileExistsError, match=f"{name} is not from `tokenshuffle data codes`"):
        extract(source, out, image_tokenizer, SIZES)
    assert contents(out) == before


@pytest.mark.parametrize("name", [FIRST, "index.json"])
def test_nor_among_those_of_an_extraction(name, source, image_tokenizer, codes):
    if name == FIRST:
        save_file({"weight": torch.ones(3)}, codes / name)
    else:
        (codes / name).write_text("[1, 2]")
    before = contents(codes)
    with pytest.raises(FileExistsError, match=f"{name} is not from `tokenshuffle data codes`"):
        extract(source, codes, image_tokenizer, SIZES, shard_size=2)
    assert contents(codes) == before


def test_other_names_are_nobodys_business(source, made, image_tokenizer, tmp_path):
    out, mine = tmp_path / "out", {"broken-hearts.txt": b"", "codes-a.safetensors": b"", "x": b""}
    out.mkdir()
    for name, content in mine.items():
        (out / name).write_bytes(content)
    extract(source, out, image_tokenizer, SIZES, shard_size=3)
    assert contents(out) == mine | contents(made)


def test_a_set_of_which_nothing_can_be_read(image_tokenizer, tmp_path):
    source = write_folder(tmp_path / "s", {f"{i}.png": (b"text", ["a"]) for i in range(3)})
    for _ in range(2):  # the second time, its shards are complete
        with pytest.raises(
            ValueError, match=r"none of the 3 pictures can be read: .*broken-\*\.txt"
        ):
            extract(source, tmp_path / "out", image_tokenizer, SIZES, shard_size=2)
        assert not (tmp_path / "out" / "index.json").exists()
        lists = [path.read_text() for path in sorted((tmp_path / "out").glob("broken-*"))]
        assert [len(text.splitlines()) for text in lists] == [2, 1]


def test_sizes_that_no_memory_holds(source, image_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="size 80000x80000 is above 16384 pixels a side"):
        extract(source, tmp_path / "out", image_tokenizer, [(80_000, 80_000)])
    assert not (tmp_path / "out").exists()


def test_the_codes_are_the_stored_ones(codes):
    """What all these checks let through."""
    reader = CodeShards(codes)
    assert len(reader) == 5
    assert all(reader.codes(i).numel() == math.prod(SIZES[i % 2]) // 16 for i in range(5))
    assert np.all(reader.gather(reader.indices[32, 32]).numpy() >= 0)
