"""What a source holds besides pictures with captions is counted; image folders of `datasets`."""

import json
import os
import tarfile

import pytest

from tests.support.pairs import (
    encoded,
    noise,
    write_folder,
    write_metadata,
    write_shards,
    write_tar,
)
from tokenshuffle_core.data.sources import read_items

WRITERS = (write_folder, write_metadata, write_shards)
pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")


def left_out(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line.partition(" left out: ")[2]


@pytest.fixture
def oddities(tmp_path):
    """A folder with one picture and everything that is not one."""
    folder = write_folder(tmp_path / "f", {"a.jfif": (encoded(noise(4, 4), "JPEG"), ["a"])})
    (folder / "c.HEIC").write_bytes(b"")
    (folder / "d.txt").write_text("no picture")
    os.symlink("/no-such-file.png", folder / "e.png")
    os.symlink("f.png", folder / "f.png")
    os.mkfifo(folder / "g.png")
    os.mkfifo(folder / "g.txt")
    os.symlink(tmp_path, folder / "h")
    return folder


@pipes
def test_what_is_not_used_is_counted_by_reason(oddities, capsys):
    (item,) = read_items(oddities)
    assert (item.key, item.captions) == ("a", ("a",))
    assert left_out(capsys) == (
        "1 not a picture (c.HEIC), 1 text without a picture (d.txt), 2 broken link (e.png), "
        "2 not a file (g.png), 1 link to a folder (h)"
    )


@pipes
def test_metadata_counts_the_same_and_what_it_does_not_name(oddities, capsys):
    lines = (
        {"file_name": f"{name}", "text": "x"} for name in ("a.jfif", "e.png", "g.png", "z.png")
    )
    (oddities / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (oddities / "b.png").write_bytes(encoded(noise(4, 4)))
    (item,) = read_items(oddities)
    assert (item.key, item.captions) == ("a", ("x",))
    assert left_out(capsys) == (
        "3 not a picture (a.txt), 1 not named in metadata.jsonl (b.png), 2 broken link (e.png), "
        "2 not a file (g.png), 1 link to a folder (h), "
        "1 missing, but named in metadata.jsonl (z.png)"
    )


def test_a_tar_counts_what_it_does_not_use(tmp_path, capsys):
    png = encoded(noise(4, 4))
    path = tmp_path / "set.tar"
    members = {"photo.v1.png": png, "photo.v1.txt": b"dots", "2.gif": encoded(noise(4, 4), "GIF")}
    members |= {"2.TXT": b"two", "2.seg.png": png, "2.cls": b"7", "3.txt": b"three"}
    write_tar(path, members)
    with tarfile.open(path, "a") as tar:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("p.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    items = read_items(path)
    assert [(item.key, item.captions) for item in items] == [
        ("2", ("two",)),
        ("photo.v1", ("dots",)),
    ]
    assert all(item.picture().tobytes() for item in items)
    text = left_out(capsys).replace(f"{path}: ", "")
    assert text == (
        "1 not a picture (2.cls), 1 link (l.png), 1 not a file (p.png), "
        "1 further picture of a sample (2.seg.png), 1 text without a picture (3.txt)"
    )


@pipes
def test_a_pipe_is_no_source_and_no_shard(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(ValueError, match=r"pipe\.tar is neither a folder nor a \.tar"):
        read_items(tmp_path / "pipe.tar")
    with pytest.raises(ValueError, match=r"1 left out: 1 not a file \(pipe\.tar\)"):
        read_items(tmp_path)


def test_captions_of_a_text_file(tmp_path):
    write_folder(tmp_path, {"a.png": (encoded(noise(4, 4)), ["old"])})
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.TXT").write_text("one\u2028line\rtwo\x0b\n\nthree", "utf-8", newline="")
    (tmp_path / "a.caption").write_text("four")
    (item,) = read_items(tmp_path)
    assert sorted(item.captions) == ["four", "one\u2028line", "three", "two"]


def test_an_image_folder_with_splits(tmp_path, capsys):
    """As `datasets` has them: a listing in the folder of each split, in CSV, file names relative to
    it; a column says what a folder's name would."""
    header = "file_name,prompt,repeats,split,author\n"
    for folder, rows in {
        "train": 'a.png,"a cat, ""black""",3,,me\nx/b.png,"two\nlines",,validation,\n',
        "validation": "c.png,a dog,,,\n",
        "test-01": "d.png,an ape,,train,\n",
    }.items():
        for name in ("a.png", "x/b.png") if folder == "train" else (rows[:5],):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(encoded(noise(4, 4)))
        (tmp_path / folder / "metadata.csv").write_text(header + rows, encoding="utf-8-sig")
    test, first, second, validation = read_items(tmp_path)
    assert (first.key, first.captions, first.repeats) == ("train/a", ('a cat, "black"',), 3)
    assert (first.split, first.extra) == ("train", {"author": "me"})
    assert (second.key, second.captions, second.split) == ("train/x/b", ("two\nlines",), "held-out")
    assert (validation.key, validation.split) == ("validation/c", "held-out")
    assert (test.key, test.split) == ("test-01/d", "train")
    assert capsys.readouterr().err == "4 pictures, 1 of them held out\n"


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("train", "train"), ("my test.2", "held-out"), ("x/dev", "held-out"), ("Test", "train"),
        ("contest", "train"), ("test/train", "held-out"), ("eval_3/y", "held-out"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("write", WRITERS)
def test_folders_are_splits_by_the_words_of_datasets(folder, split, write, tmp_path):
    pair = {f"{folder}/test.png": (encoded(noise(4, 4)), ["a"])}
    (item,) = read_items(write(tmp_path / "test", pair))
    assert (item.key, item.split) == (f"{folder}/test", split)


def test_shards_in_folders_and_of_splits(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("x/train-0", "x/val-0"):
        write_tar(tmp_path / f"{name}.tar", {"0.png": encoded(noise(4, 4)), "0.txt": b"a"})
    found = [(item.key, item.split) for item in read_items(tmp_path)]
    assert found == [("x/train-0/0", "train"), ("x/val-0/0", "held-out")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,text\na.png,a\n", "the first line must name the columns"),
        ("file_name,text,text\na.png,a,b\n", "the first line must name the columns, each once"),
        ("", "the first line must name the columns"),
        ("file_name,text\na.png,a,b\n", "line 2 has more fields"),
        ('file_name,text\na.png,"a\n', "after line 1: unexpected end"),
        ("file_name,repeats\na.png,x\n", "line 2: repeats must be .* not 'x'"),
        ("file_name,text\n../a.png,a\n", r"line 2: file_name '\.\./a\.png' is outside"),
        ("file_name,text\n,a\n", "line 2: file_name must be the name of a picture, not None"),
        (f"file_name,text\na.png,{'a' * 200_000}\n", "after line 1: field larger than field limit"),
    ],
    ids=range(9),
)
def test_a_wrong_table(text, message, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise(4, 4)))
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"metadata\.csv.*{message}"):
        read_items(tmp_path)


def test_listings_that_contradict_or_cannot_be_read(tmp_path):
    write_metadata(tmp_path, {"a.png": (encoded(noise(4, 4)), ["a"])})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "metadata.csv").write_text("file_name\n")
    with pytest.raises(ValueError, match=r"both metadata\.jsonl and metadata\.csv: keep one"):
        read_items(tmp_path)
    for path in (tmp_path / "metadata.jsonl", tmp_path / "x" / "metadata.csv"):
        path.rename(path.with_name("metadata.parquet"))
    with pytest.raises(
        ValueError, match=r"metadata\.parquet cannot be read: save it as metadata\.j"
    ):
        read_items(tmp_path)


@pytest.mark.parametrize("size", [0o12, -512, 2**40])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_whose_sizes_lie_ends(kind, size, tmp_path):
    """A size below 0 would lead tarfile in a circle."""
    member = tarfile.TarInfo("a.txt")
    member.size, member.type = size, kind
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    with pytest.raises(
        ValueError, match=r"a\.tar is not a readable \.tar|has no pictures|: a\.txt is larger"
    ):
        read_items(tmp_path / "a.tar")


def test_a_tar_that_ends_in_the_middle_of_a_caption(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": encoded(noise(4, 4)), "b.txt": b"some words"})
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"some words") + 4])
    with pytest.raises(ValueError, match=r"a\.tar.*(cannot be read|not a readable)"):
        read_items(path)
