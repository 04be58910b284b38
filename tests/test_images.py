import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from tokenshuffle_core.files import atomic_path, remove_leftovers
from tokenshuffle_core.images import read_codes, read_image, write_codes, write_png


def test_png_round_trip_with_its_text(tmp_path):
    image = torch.randint(0, 256, (6, 5, 3)).float() / 255
    write_png(tmp_path / "a.png", image, prompt="红苹果", seed=7, cfg=2.5)
    torch.testing.assert_close(read_image(tmp_path / "a.png")[0], image)
    text = Image.open(tmp_path / "a.png").text
    assert json.loads(text["tokenshuffle"]) == {"prompt": "红苹果", "seed": 7, "cfg": 2.5}
    assert text["Description"] == "红苹果"
    assert not {"prompt", "workflow", "parameters"} & set(text)  # ComfyUI's own


def test_transparency_needs_a_background(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(path)
    with pytest.raises(ValueError, match=r"a\.png is transparent: .*--background white"):
        read_image(path)
    assert read_image(path, "#00ff00")[0, 0, 0].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="background 'nocolour' is not a colour"):
        read_image(path, "nocolour")


def test_what_is_opaque_is_not_transparent(tmp_path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    for mode in ("RGBA", "LA", "P"):
        more = {"transparency": b"\xff" * 256} if mode == "P" else {}
        image.convert(mode).save(tmp_path / "a.png", **more)
        found = read_image(tmp_path / "a.png")[0]
        expected = np.asarray(image.convert(mode).convert("RGB"), np.float32) / 255
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photo_is_upright(turn, tmp_path):
    """Against what each number means in EXIF: the corner where the picture's own corner is."""
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read_image(tmp_path / "a.png")[0]
    assert pixels.shape[:2] == ((8, 16) if turn < 5 else (16, 8))
    row, column = ((0, 0), (0, -1), (-1, -1), (-1, 0), (0, 0), (0, -1), (-1, -1), (-1, 0))[turn - 1]
    corners = {(r, c): pixels[r, c].sum().item() > 0 for r in (0, -1) for c in (0, -1)}
    assert [corner for corner, white in corners.items() if white] == [(row, column)]


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_formats_that_are_read(kind, tmp_path):
    Image.new("RGB", (8, 4), (200, 10, 60)).save(tmp_path / "a", kind)
    pixels = read_image(tmp_path / "a")[0] * 255
    assert pixels.shape == (4, 8, 3)
    assert (pixels - torch.tensor([200, 10, 60])).abs().max() < 6


def test_a_format_that_starts_another_program_is_not_read(tmp_path, monkeypatch):
    """Ghostscript, which is the first `gs` on the path."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(ValueError, match=r"a\.png is not a picture in BMP or GIF or JPEG or PNG"):
        read_image(tmp_path / "a.png")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused(dtype, tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif has more than 8 bits per channel"):
        read_image(tmp_path / "deep.tif")


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileNotFoundError, match=r"pipe\.png does not exist or is not a file"):
        read_image(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text\.png is not a picture in"):
        read_image(tmp_path / "text.png")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    with pytest.raises(
        ValueError, match=r"bomb\.png cannot be read: 144000000 pixels in \d+ bytes"
    ):
        read_image(tmp_path / "bomb.png")


def test_codes_round_trip_and_refusals(tmp_path):
    codes = torch.randint(0, 99, (1, 3, 4))
    write_codes(tmp_path / "c.npy", codes)
    assert torch.equal(read_codes(tmp_path / "c.npy"), codes)
    np.save(tmp_path / "flat.npy", np.zeros(4, np.int64))
    np.save(tmp_path / "float.npy", np.zeros((4, 4)))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", np.zeros((4, 4), np.int64))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    np.save(tmp_path / "none.npy", np.zeros((0, 4), np.int64))
    np.save(tmp_path / "time.npy", np.zeros((4, 4), "m8[s]"))
    headers = {
        "huge": ("'<i8'", "(1, 1000000, 1000000)"),
        "overflow": ("'<i8'", "(4294967296, 4294967296)"),
        "negative": ("'<i8'", "(-1, 8)"),
        "nested": ("'<i8'", "(" * 60_000),
        "digits": ("'<i8'", f"({'9' * 5000}, 1)"),
        "inner": ("('<i8', (100000,))", "(1, 8)"),
    }
    for name, (kind, shape) in headers.items():
        text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
        start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        (tmp_path / f"{name}.npy").write_bytes(start + text + bytes(64))
    (tmp_path / "text.npy").write_text("text")
    files = [path for path in tmp_path.glob("*.npy") if path.name != "c.npy"]
    assert len(files) == 7 + len(headers)
    for path in files:
        with pytest.raises(ValueError, match=path.name) as error:
            read_codes(path)
        assert len(str(error.value)) < 400


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    with (
        pytest.raises(FileNotFoundError, match="nowhere does not exist"),
        atomic_path(tmp_path / "nowhere" / "file"),
    ):
        pass


@pytest.mark.parametrize("name", ["a.png", "红" * 83 + ".png"])
def test_what_a_killed_process_left_is_removed(name, tmp_path):
    path = tmp_path / name
    for other in (".a.png", ".a.png.part", ".a.png.mine.png", ".b.png.abcdefgh.part", "a.part"):
        (tmp_path / other).touch()
    before = sorted(tmp_path.iterdir())
    with atomic_path(path) as temporary:
        left = temporary.name
    path.unlink()
    (tmp_path / left).touch()
    remove_leftovers([path])
    assert sorted(tmp_path.iterdir()) == before
