import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.support.pairs import (
    encoded,
    noise,
    write_folder,
    write_metadata,
    write_shards,
    write_tar,
)
from tokenshuffle_core.data.sources import Item, read_items

WRITERS = (write_folder, write_metadata, write_shards)


def item_of(path, content: bytes) -> Item:
    """The one item of a folder with a picture of this content."""
    write_folder(path, {"a.png": (content, ["a picture"])})
    (item,) = read_items(path)
    return item


@pytest.mark.parametrize("write", WRITERS)
def test_the_three_kinds_give_the_same_items(write, tmp_path):
    upright = noise(6, 9, seed=1)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    cut_out = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    pairs = {
        "zebra.webp": (encoded(noise(8, 6), "WEBP", lossless=True), ["a zebra"]),
        "animals/猫.PNG": (
            encoded(upright.rotate(90, expand=True), exif=turned),
            ["a cat", "一只猫"],
        ),
        "animals/ape.png": (encoded(cut_out), ["an ape"]),
    }
    items = read_items(write(tmp_path / "source", pairs))
    assert [item.key for item in items] == ["animals/ape", "animals/猫", "zebra"]
    assert [item.captions for item in items] == [("an ape",), ("a cat", "一只猫"), ("a zebra",)]
    assert {(item.repeats, item.split) for item in items} == {(1, "train")}
    pictures = [item.picture((0, 0, 255)) for item in items]
    assert {picture.mode for picture in pictures} == {"RGB"}
    expected = (Image.new("RGB", (4, 4), (0, 0, 255)), upright, noise(8, 6))
    assert [picture.tobytes() for picture in pictures] == [image.tobytes() for image in expected]
    assert [picture.size for picture in pictures] == [image.size for image in expected]


def test_metadata_has_repeats_split_and_fields_of_its_own(tmp_path):
    write_metadata(tmp_path, {f"{name}.png": (encoded(noise(4, 4)), [""]) for name in "ab"})
    lines = [
        {"file_name": "b.png", "text": " a bee\u2028flies ", "split": "held-out", "licence": None},
        {"file_name": "a.png", "captions": ["an ape", " "], "repeats": 3, "tags": [1, {"x": 2}]},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    first, second = read_items(tmp_path)
    assert (first.captions, first.repeats, first.split) == (("an ape",), 3, "train")
    assert first.extra == {"tags": [1, {"x": 2}]}
    assert (second.captions, second.repeats, second.split) == (("a bee\u2028flies",), 1, "held-out")
    assert second.extra == {"licence": None}


def test_a_tar_has_captions_as_text_or_json(tmp_path):
    about = {"caption": "a dog", "repeats": 2, "split": "held-out", "url": "http://x.invalid"}
    members = {
        "0.txt": b"a cat\n\n sat \n",
        "1.json": json.dumps(about).encode(),
        "./2.json": b'{"text": "from json", "width": 4}',
        "0.png": encoded(noise(4, 4)),
        "1.cls": b"7",
        "1.png": encoded(noise(4, 5)),
        "2.txt": "from text".encode("utf-8-sig"),
        "2.seg.png": b"a mask",
        "./2.JPG": encoded(noise(4, 6), "JPEG"),
        "._2.jpg": b"what macOS adds",
        "3.txt": b"no picture",
        "readme": b"",
    }
    cat, dog, text = read_items(write_tar(tmp_path / "set.tar", members))
    assert cat.captions == ("a cat", "sat")
    assert (dog.captions, dog.repeats, dog.split) == (("a dog",), 2, "held-out")
    assert dog.extra == {"url": "http://x.invalid"}
    assert (text.captions, text.extra) == (("from text",), {"width": 4})
    assert [item.picture().size for item in (cat, dog, text)] == [(4, 4), (4, 5), (4, 6)]


def test_names_in_a_tar_are_keys_and_nothing_is_unpacked(tmp_path):
    name = f"../../{tmp_path}/outside.png"
    members = {name: encoded(noise(4, 4)), name.replace(".png", ".txt"): b"a"}
    (item,) = read_items(write_tar(tmp_path / "set.tar", members))
    assert item.picture().tobytes() == noise(4, 4).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["set.tar"]


def test_hidden_files_are_not_pictures(tmp_path):
    write_folder(tmp_path, {"a.b.png": (encoded(noise(4, 4)), ["a"])})
    (tmp_path / "._a.png").write_bytes(b"what macOS adds")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "c.png").write_bytes(b"")
    (tmp_path / "a.b.txt").write_text("a\r\n\r\n  b  \r\n", encoding="utf-8-sig")
    (item,) = read_items(tmp_path)
    assert (item.key, item.captions) == ("a.b", ("a", "b"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_the_background(mode, tmp_path):
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 51))
    options = {}
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([200, 200, 200])
        options = {"transparency": b"\x33"}
    item = item_of(tmp_path, encoded(image.convert(mode), **options))
    pixels = np.asarray(item.picture((0, 100, 250)), np.float64)
    expected = 200 * 0.2 + np.array([0, 100, 250]) * 0.8
    assert np.abs(pixels - expected).max() <= 1


def bomb() -> bytes:
    """A PNG of 30000 x 30000 pixels in a few bytes."""
    content = b"\x89PNG\r\n\x1a\n"
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IEND", b"")]
    for kind, data in chunks:
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "picture a is not a picture in BMP or GIF"),
        (b"just text", "picture a is not a picture in BMP or GIF"),
        (encoded(noise(4, 4), "EPS"), "picture a is not a picture in BMP or GIF"),
        (encoded(noise(4, 4), "PPM"), "picture a is not a picture in BMP or GIF"),
        (encoded(noise(4, 4).convert("F"), "TIFF"), "picture a has more than 8 bits"),
        (encoded(noise(64, 64))[:2000], "picture a cannot be read: .*truncated"),
        (encoded(noise(64, 64), "JPEG")[:2000], "picture a cannot be read: .*truncated"),
        (bomb(), "picture a cannot be read: .*decompression bomb"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.uint16))), "picture a has more than 8 bits"),
    ],
    ids=["empty", "text", "EPS", "PPM", "float", "cut PNG", "cut JPEG", "bomb", "16 bit"],
)
def test_bad_pictures(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        item_of(tmp_path, content).picture()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_whatever_is_damaged_is_a_value_error(kind, tmp_path):
    turned = Image.Exif()
    turned[0x0112], turned[0x010E] = 6, "a description"
    content = encoded(noise(24, 16), kind, exif=turned)
    item = item_of(tmp_path, content)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 300), 4):
            damaged[place] = rng.integers(0, 256)
        item.path.write_bytes(damaged)
        try:
            assert item.picture().mode == "RGB"
        except ValueError:
            refused += 1
    assert refused > 100


def test_places_that_hold_no_items(tmp_path):
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"gone does not exist"):
        read_items(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"notes\.txt is neither a folder nor a \.tar"):
        read_items(tmp_path / "notes.txt")
    with pytest.raises(
        ValueError, match=r"has no pictures \(bmp, gif, .*, no \.tar.*; 1 left out: 1 text"
    ):
        read_items(tmp_path)


def test_pictures_and_shards_side_by_side(tmp_path):
    pair = {"a.png": (encoded(noise(4, 4)), ["a"])}
    write_folder(tmp_path, pair)
    write_tar(tmp_path / "set.tar", {"b.png": encoded(noise(4, 4)), "b.txt": b"b"})
    with pytest.raises(ValueError, match=r"has both pictures and \.tar shards"):
        read_items(tmp_path)


@pytest.mark.parametrize("write", WRITERS)
def test_pictures_without_a_caption_are_left_out_and_counted(write, tmp_path, capsys):
    captions = {"d": ["d"], "b": ["", " "], "c": [""]}
    pairs = {f"x/{name}.png": (encoded(noise(4, 4)), text) for name, text in captions.items()}
    source = write(tmp_path / "source", pairs)
    assert [item.key for item in read_items(source)] == ["x/d"]
    assert capsys.readouterr().err == "1 picture, 2 left out: 2 without a caption (x/b)\n"
    assert len(read_items(source, captioned=False)) == 3
    assert not capsys.readouterr().err


def test_pictures_of_which_none_has_a_caption(tmp_path):
    write_folder(tmp_path, {f"{name}.png": (encoded(noise(4, 4)), [" "]) for name in "ba"})
    (tmp_path / "b.txt").unlink()
    with pytest.raises(
        ValueError, match=r"none of the 2 pictures in .*'a': write one into a \.txt"
    ):
        read_items(tmp_path)


def test_two_pictures_with_one_key(tmp_path):
    png, jpg = encoded(noise(4, 4)), encoded(noise(4, 4), "JPEG")
    folder = write_folder(tmp_path / "f", {"a.png": (png, ["a"]), "a.jpg": (jpg, ["a"])})
    with pytest.raises(ValueError, match=r"two pictures with the key 'a', in .*a\.\w+ and .*a\."):
        read_items(folder)
    write_tar(tmp_path / "one.tar", {"a.png": png, "a.jpg": jpg, "a.txt": b"a"})
    with pytest.raises(ValueError, match=r"one\.tar: a\.jpg is the second picture"):
        read_items(tmp_path / "one.tar")


def test_a_caption_that_is_not_utf_8(tmp_path):
    write_folder(tmp_path, {"a.png": (encoded(noise(4, 4)), ["a"])})
    (tmp_path / "a.txt").write_bytes("Äpfel".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not text in UTF-8"):
        read_items(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: expected a JSON object such as"),
        ('{"file_name": "a.png", "text": "\\ud83d"}', "line 2 contains a lone surrogate"),
        ('{"text": "a"}', "line 2: file_name must be the name of a picture, not None"),
        ('{"file_name": "../a.png", "text": "b"}', r"'\.\./a\.png' is outside"),
        ('{"file_name": "x/../a.png", "text": "b"}', r"'x/\.\./a\.png' is outside"),
        ('{"file_name": "/etc/passwd", "text": "b"}', "'/etc/passwd' is outside"),
        ('{"file_name": "link.png", "text": "b"}', r"'link\.png' is outside"),
        ('{"file_name": "a.png", "text": 1}', "line 2: text must be a text or a list"),
        ('{"file_name": "a.png", "captions": [null]}', "line 2: captions must be a text or a list"),
        ('{"file_name": "a.png", "text": "a", "repeats": 0}', "repeats must be .* not 0"),
        ('{"file_name": "a.png", "text": "a", "repeats": 1000000000}', "from 1 to 10000, not 10"),
        ('{"file_name": "a.png", "text": "a", "repeats": true}', "repeats must be .* not True"),
        ('{"file_name": "a.png", "text": "a", "split": "tests"}', "split must be .* not 'tests'"),
        ("[" * 100_000, "line 2 is not JSON: maximum recursion"),
    ],
)
def test_a_wrong_line_of_metadata(line, message, tmp_path):
    folder = write_metadata(tmp_path / "f", {"a.png": (encoded(noise(4, 4)), ["a"])})
    (tmp_path / "outside.png").write_bytes(encoded(noise(4, 4)))
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, .*{message}"):
        read_items(folder)


def test_a_damaged_tar(tmp_path):
    members = {"a.png": encoded(noise(40, 40)), "a.txt": b"a", "b.png": encoded(noise(4, 4))}
    path = write_tar(tmp_path / "set.tar", members | {"b.txt": b"b"})
    whole = path.read_bytes()
    for damaged in (b"", b"text" * 200, whole[:3000], whole[:5632] + b"\xff" + whole[5633:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"set\.tar is not a readable \.tar without compr"):
            read_items(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__)
    with pytest.raises(ValueError, match=r"set\.tar is not a readable \.tar without compression"):
        read_items(path)


def test_a_tar_with_wrong_json(tmp_path):
    path = write_tar(tmp_path / "set.tar", {"a.json": b"{", "a.png": b""})
    with pytest.raises(ValueError, match=r"set\.tar: a\.json is not JSON"):
        read_items(path)


def test_null_is_no_caption(tmp_path):
    write_metadata(tmp_path, {"a.png": (encoded(noise(4, 4)), ["a"])})
    line = {"file_name": "a.png", "text": None, "caption": "an ape"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    assert [item.captions for item in read_items(tmp_path)] == [("an ape",)]


def test_shards_that_each_number_their_samples_from_zero(tmp_path):
    for name in ("x", "y"):
        write_tar(tmp_path / f"{name}.tar", {"0.png": encoded(noise(4, 4)), "0.txt": name.encode()})
    items = read_items(tmp_path)
    assert [(item.key, item.captions) for item in items] == [("x/0", ("x",)), ("y/0", ("y",))]
