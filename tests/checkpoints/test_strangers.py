"""Files from strangers: each is refused with a sentence that names it, and no code runs."""

import argparse
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.fuzz import fuzz, write
from tests.support.published import llamagen, write_llamagen
from tokenshuffle_core.checkpoints import read
from tokenshuffle_core.checkpoints.source import Source
from tokenshuffle_core.pipeline import load


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def model(tmp_path) -> Path:
    return write_llamagen(tmp_path)


def refused(path: Path, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value) or "vq_ds16_c2i.pt" in str(caught.value)


def test_code_in_a_pickle_does_not_run(model, tmp_path):
    torch.save({"model": llamagen() | {"evil": Evil(tmp_path / "ran")}}, model)
    refused(model, r"c2i_B_256\.pt: the pickle asks for .*open.*could run code")
    assert not (tmp_path / "ran").exists()


def test_code_in_the_image_tokenizer_does_not_run(model, tmp_path):
    torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "vq_ds16_c2i.pt")
    refused(model, "could run code")
    assert not (tmp_path / "ran").exists()


def test_a_program_of_torchscript(model):
    """Such a file has a second pickle; older PyTorch would run it whatever is asked for."""
    with zipfile.ZipFile(model, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
    refused(model, "has 2 pickles: it is not a state dict")


def test_options_of_a_training_are_no_code(model):
    torch.save({"model": llamagen(), "args": argparse.Namespace(lr=1e-4), "steps": 3}, model)
    assert load(model)


def test_a_bare_pickle(model):
    model.write_bytes(pickle.dumps({"model": 1}))
    refused(model, "not in PyTorch's zip format")


def doubled(start: bytes, end: bytes) -> bytes:
    """A pickle of a tuple with itself twice, forty times over: a tree of 2**40 leaves."""
    levels = (b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(40))
    return b"\x80\x02" + start + b"".join(levels) + end


@pytest.mark.parametrize(
    "pickled",
    [
        doubled(b")q\0", b")R."),  # its printed form is part of an error's text
        doubled(b"X\x01\0\0\0aq\0", b"}h\x28X\x01\0\0\0as."),  # hashed as the key of a dict
        doubled(b"X\x05\0\0\0" + b"abcdeq\0", b"."),
        b"\x80\x02]q\0]q\x01h\x01a]q\x02h\x02a]q\x02h\x00a.",
        b"\x80\x02]q\0h\0a.",
        b"\x80\x02X\xff\xff\0\0" + b"a" * 65535 + b"q\0](" + b"h\0" * 10**5 + b"e)R.",
    ],
)
def test_a_pickle_that_holds_its_parts_too_often(pickled, model):
    with zipfile.ZipFile(model) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(model, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    refused(model, "pickle is damaged|not a state dict|holds no weights|cannot be read")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("a.pt", "a.safetensors"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is not a file")


def test_a_zip_that_unpacks_to_more(model):
    with zipfile.ZipFile(model, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**24)
    refused(model, "claims more data than its")


def test_a_shape_that_is_larger_than_its_numbers(model):
    weights = llamagen()
    weights["tok_embeddings.weight"] = torch.zeros(1).expand(10**12, 128)
    torch.save({"model": weights}, model)
    refused(model, r"tok_embeddings\.weight claims more data than it has: \(1000000000000, 128\)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.attention.wo.weight": None}, r"layers\.1\.attention\.wo\.weight is missing"),
        (
            {"layers.0.ffn_norm.weight": torch.ones(7)},
            r"has shape \(7,\), the configuration asks for \(128,\)",
        ),
        (
            {"norm.weight": torch.full((128,), torch.nan)},
            r"norm\.weight holds numbers that are not",
        ),
        ({"output.weight": torch.ones(64, 128, dtype=torch.int64)}, "int64, not weights"),
        ({"output.weight": torch.ones(64, 128).to_sparse()}, "asks for .*sparse"),
        ({"output.weight": torch.ones(64, 128, device="meta")}, "asks for .*meta"),
        ({"steps": bytearray(3)}, "asks for .*bytearray"),
        ({"tok_embeddings.weight": torch.ones(64)}, r"has the shape \(64,\)"),
        ({"module.norm.weight": torch.ones(128)}, r"norm\.weight occurs twice"),
    ],
)
def test_weights_that_do_not_fit(change, message, model):
    weights = llamagen() | change
    torch.save({"model": {n: x for n, x in weights.items() if x is not None}}, model)
    refused(model, message)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_download_that_broke_off(share, model):
    whole = model.read_bytes()
    model.write_bytes(whole[: int(share * len(whole))])
    refused(model, "damaged or cut short")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write(tmp_path_factory.mktemp("folders"))


def test_an_index_that_points_outside(folders, tmp_path):
    shutil.copytree(folders / "original", tmp_path / "original")
    index = tmp_path / "original" / "pytorch_model.bin.index.json"
    map_ = json.loads(index.read_text())["weight_map"]
    for name in ("../vq.pt", "/etc/passwd", "", ".."):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(map_, name)}))
        with pytest.raises(ValueError, match="leads out of the folder"):
            Source(tmp_path / "original")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(map_, "x" * 100_000)}))
    with pytest.raises(ValueError, match="is too long for a file"):
        Source(tmp_path / "original")


def test_an_index_of_a_missing_shard(folders, tmp_path):
    shutil.copytree(folders / "original", tmp_path / "original")
    (tmp_path / "original" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002\.bin does not exist"):
        Source(tmp_path / "original")


def linked(file: Path, target: Path) -> None:
    file.unlink(missing_ok=True)
    try:
        file.symlink_to(target)
    except OSError:
        pytest.skip("links need a permission here")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_link_of_a_text_to_something_else(name, folders, tmp_path):
    """As an archive can bring it: what is read and copied must be what its name says."""
    shutil.copytree(folders / "janus", tmp_path / "janus")
    shutil.copy(folders / "janus" / name, tmp_path / "credentials")
    for target in ("credentials", "../credentials"):
        linked(tmp_path / "janus" / name, (tmp_path / "janus" / target).resolve())
        shutil.copy(folders / "janus" / name, tmp_path / "janus" / "credentials")
        if target[0] == ".":
            with pytest.raises(ValueError, match=f"{name} is a link to another folder and name"):
                load(tmp_path / "janus")
        else:
            load(tmp_path / "janus")


def test_links_of_the_owner(folders, tmp_path):
    """Weights under another name, texts under their own, a whole folder; and a link to a text in
    the place of weights says nothing of it."""
    for name in ("linked", "farm"):
        (tmp_path / name).mkdir()
    for file in (folders / "janus").iterdir():
        weights = file.suffix == ".safetensors"
        shutil.copy(file, tmp_path / ("big" if weights else file.name))
        linked(tmp_path / "farm" / file.name, file)
        linked(tmp_path / "linked" / file.name, tmp_path / ("big" if weights else file.name))
    linked(tmp_path / "folder", folders / "janus")
    for name in ("linked", "farm", "folder"):
        assert load(tmp_path / name).config == load(folders / "janus").config
    (tmp_path / "secret").write_text("password=12345")
    linked(tmp_path / "farm" / "model.safetensors", tmp_path / "secret")
    with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
        load(tmp_path / "farm")
    assert "12345" not in str(caught.value)
    linked(tmp_path / "farm" / "model.safetensors", Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "farm")


@pytest.fixture
def cache(folders, tmp_path) -> Path:
    """A model in Hugging Face's cache, twice: of the first snapshot only the second one's texts."""
    model = tmp_path / "hub" / "models--deepseek-ai--Janus-Pro-1B"
    (model / "blobs").mkdir(parents=True)
    for file in (folders / "janus").iterdir():
        blob = f"{sum(map(ord, file.name)):040x}"
        shutil.copy(file, model / "blobs" / blob)
        for snapshot in ("aaaa", "bbbb"):
            (model / "snapshots" / snapshot).mkdir(parents=True, exist_ok=True)
            linked(model / "snapshots" / snapshot / file.name, Path("../../blobs", blob))
    (model / "snapshots" / "aaaa" / "model.safetensors").unlink()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("bbbb")
    return model


def test_a_cache_of_hugging_face_as_it_lies_there(cache, folders, tmp_path):
    expected = Source(folders / "janus").shapes
    for path in (cache, cache / "snapshots" / "bbbb"):
        source = Source(path)
        assert (source.shapes, source.name) == (expected, "Janus-Pro-1B")
        assert read(path).card["modelspec.title"] == "Janus-Pro-1B"
    (cache / "refs" / "main").write_text("cccc")
    with pytest.raises(ValueError, match="has 2 snapshots: give one of them"):
        read(cache)
    shutil.rmtree(cache / "snapshots" / "aaaa")
    assert read(cache)
    # A folder of ComfyUI's whose files are links to the cache's, of which blobs have other names.
    (tmp_path / "Janus").mkdir()
    for file in (cache / "snapshots" / "bbbb").iterdir():
        linked(tmp_path / "Janus" / file.name, file.resolve())
    assert read(tmp_path / "Janus")
    (cache / "snapshots" / "bbbb").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has no snapshot"):
        read(cache)


def test_a_name_in_two_shards(folders, tmp_path):
    shutil.copytree(folders / "original", tmp_path / "original")
    first, second = sorted((tmp_path / "original").glob("*.bin"))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="is also in another file of this folder"):
        Source(tmp_path / "original")


def test_another_kind_of_model(tmp_path):
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=r"not of a supported family .*conv1\.weight"):
        load(tmp_path / "resnet.pt")


@pytest.mark.parametrize("count", [1, pytest.param(150, marks=pytest.mark.slow)])
def test_mutated_files(count, folders):
    """Files of every kind that is read: their bytes, JSON, weights and pickles changed, code and
    hostile pieces put into them. What is not refused with a sentence computes as any model."""
    pytest.importorskip("resource", reason="Windows has no limit on a process's memory")
    report = fuzz(folders, count)
    print(json.dumps(report, indent=1))
    for kind, found in report.items():
        assert found["refused"] + found["read"] == count, (kind, found)
        assert found["executed"] == [], kind
        assert found["gigabytes"] < 2, kind
    refused = sum(found["refused"] for found in report.values())
    assert refused > count * len(report) / 3


def test_what_to_give_in_the_place_of_a_folder_without_a_model(folders, tiny, tmp_path):
    cache = tmp_path / "hub" / "models--deepseek-ai--Janus-1.3B"
    snapshot = shutil.copytree(folders / "original", cache / "snapshots" / "0a1b")
    run = tmp_path / "run"
    (run / "state" / "0000100").mkdir(parents=True)
    shutil.copy(tiny, run / "latest.safetensors")
    read(cache)
    for given, instead in (
        (cache.parent, snapshot),
        (snapshot.parent, snapshot),
        (run, run / "latest.safetensors"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{given} is not a model: give {instead}$"):
            read(given)
        read(instead)
    shutil.copy(tiny, run / "final.safetensors")
    with pytest.raises(FileNotFoundError, match=r": give \S+final\.safetensors$"):
        read(run)
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.index.json, [\w., ]+$"):
        read(run / "state")


def test_what_to_give_in_the_place_of_one_file_of_a_folder(folders):
    for folder in (folders / name for name in ("janus", "original", "llama")):
        for file in (*folder.glob("*.bin"), *folder.glob("*.safetensors")):
            with pytest.raises(ValueError, match=f"{file} .*: give its folder, {folder}$"):
                read(file)


@pytest.mark.parametrize("name", ["MODEL.SAFETENSORS", "c2i_B_256.PT"])
def test_suffixes_in_capitals(name, tiny, tmp_path):
    published = write_llamagen(tmp_path) if name.endswith("PT") else shutil.copy(tiny, tmp_path)
    model = Path(published).rename(tmp_path / name)
    assert read(model).load_model("cpu", torch.float32)
