import json

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
    (tmp_path / "text.npy").write_text("text")
    for name in ("flat", "float", "object", "text"):
        with pytest.raises(ValueError, match=rf"{name}\.npy"):
            read_codes(tmp_path / f"{name}.npy")


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
