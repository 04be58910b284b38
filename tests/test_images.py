import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokenshuffle_core.files import atomic_path
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


def test_16_bit_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits per channel"):
        read_image(tmp_path / "deep.png")


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text\.png is not a readable picture"):
        read_image(tmp_path / "text.png")


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
