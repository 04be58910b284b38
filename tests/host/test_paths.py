"""Models in ComfyUI's folders: which the loader lists, how to get one that is missing, and whether
one has been written again. In this process, with a host's own `folder_paths`."""

import importlib
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts import comfyui
from tests.support.public_models import COSMOS

HUB = "https://huggingface.co/"


@pytest.fixture(
    scope="module", params=comfyui.hosts() or [None], ids=lambda host: getattr(host, "name", "")
)
def modules(request):
    """The host's module and ours, without the rest of the pack, which needs all of the host."""
    if request.param is None:
        pytest.skip(f"no ComfyUI host: {comfyui.HOW_TO_GET_ONE}")
    before = dict(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(request.param.clone))
        for name in ("pack", "pack.nodes", "pack.nodes.host"):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(comfyui.PACK.joinpath(*name.split(".")[1:]))]
        theirs = importlib.import_module("folder_paths")
        yield theirs, importlib.import_module("pack.nodes.host.paths")
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


@pytest.fixture
def paths(modules, tmp_path, monkeypatch):
    """Our module, where the host has two folders of models, `own` and `extra`, and `others`."""
    theirs, ours = modules
    folders = {"tokenshuffle": ["own"], "checkpoints": ["others"]}
    found = {
        name: ([str(tmp_path / each) for each in each_of], theirs.folder_names_and_paths[name][1])
        for name, each_of in folders.items()
    }
    for name in ("own", "others", "extra"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(theirs, "folder_names_and_paths", found)
    monkeypatch.setattr(theirs, "filename_list_cache", {})
    theirs.add_model_folder_path("tokenshuffle", str(tmp_path / "extra"))  # extra_model_paths.yaml
    return ours


def told(paths, name: str) -> str:
    with pytest.raises(FileNotFoundError) as error:
        paths.checkpoint_path(name)
    return str(error.value)


LLAMAGEN = ("vq_ds16_c2i.pt (0.3 GB)", "FoundationVision/LlamaGen", "MIT licence")
OF_COSMOS = (
    f"folder {COSMOS}", "encoder.jit and decoder.jit", f"nvidia/{COSMOS}",
    "NVIDIA Open Model License",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("c2i_L_384.pt", ("c2i_L_384.pt (1.37 GB)", *LLAMAGEN)),
        ("c2i_3B_384.pt", ("download c2i_3B_384.pt and", *LLAMAGEN)),
        ("Janus-Pro-1B", ("deepseek-ai/Janus-Pro-1B (DeepSeek Model License)", "4.18 GB")),
        ("sub/Janus-Pro-7B", ("folder Janus-Pro-7B", "deepseek-ai/Janus-Pro-7B (DeepSeek")),
        ("Janus-1.3B", ("deepseek-ai/Janus-1.3B (DeepSeek Model License)",)),
        ("SimpleAR-0.5B-SFT", ("Daniel0724/SimpleAR-0.5B-SFT", "(1.1 GB)", *OF_COSMOS)),
        ("SimpleAR-1.5B-RL", ("Daniel0724/SimpleAR-1.5B-RL", "code is under MIT", *OF_COSMOS)),
        (
            "models--Daniel0724--SimpleAR-1.5B-SFT/snapshots/0a1b",
            ("folder SimpleAR-1.5B-SFT", "Daniel0724/SimpleAR-1.5B-SFT", "(3.3 GB)"),
        ),
        ("Emu3.5-Image", ("BAAI/Emu3.5-Image", "emu3.tiktoken", "BAAI/Emu3.5-VisionTokenizer")),
        ("Emu3.5", ("BAAI/Emu3.5 (", "(68 GB)", "code is under Apache-2.0")),
        *(
            (
                name,
                (
                    "jiezhueval/Wallaroo", "Qwen/Qwen2.5-VL-7B-Instruct", "vq_ds16_t2i.pt (0.3 GB)",
                    "peizesun/llamagen_t2i", "tokenizer.json and config.json", "folder Wallaroo",
                ),
            )
            for name in ("Wallaroo", "mine/Wallaroo")
        ),
    ],
)  # fmt: skip
def test_how_to_get_a_published_model(paths, name, words):
    sentence = told(paths, name)
    assert sentence.startswith(f"{name} is not in ComfyUI/models/tokenshuffle: ")
    assert sentence.endswith(", then press R")
    for each in words:
        assert each in sentence
    assert not set("{}") & set(sentence)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SimpleAR-1.5B-RL-mine", OF_COSMOS),
        ("my-simplear", OF_COSMOS),
        ("c2i_mine_256.pt", ("vq_ds16_c2i.pt",)),
        ("Emu3.5-Image-tuned", ("BAAI/Emu3.5-VisionTokenizer", "emu3.tiktoken")),
        ("JanusFlow-1.3B", ()),
        ("janus-pro-1b", ("config.json", "tokenizer.json")),
        ("wallaroo_7b.ckpt", ("tokenizer.json", "config.json", "vq_ds16_t2i.pt")),
        ("SimpleAR-1.5B-RL.safetensors", ()),  # converted: nothing beside it
        ("wallaroo.safetensors", ()),
        ("mine.ckpt", ()),
        ("", ()),
    ],
)
def test_no_address_is_made_from_a_name(paths, name, words):
    sentence = told(paths, name)
    for each in words:
        assert each in sentence
    of_tokenizers = [word for word in words if "/" in word]
    assert re.findall(HUB, sentence) == [HUB] * len(of_tokenizers)
    if not words:
        assert "put its file or folder there" in sentence


# The files of each model and image tokenizer as published. Only their names matter here.
PUBLISHED = {
    "SimpleAR-1.5B-RL": ("config.json", "model.safetensors", "vocab.json", "merges.txt"),
    "Emu3.5-Image": ("config.json", "model-00001-of-00002.safetensors", "emu3.tiktoken"),
    "Wallaroo": ("config.json", "wallaroo.ckpt", "tokenizer.json", "vq_ds16_t2i.pt"),
    "llamagen": ("c2i_B_256.pt", "vq_ds16_c2i.pt"),
    COSMOS: ("config.json", "encoder.jit", "decoder.jit", "model.safetensors"),
    "Emu3.5-VisionTokenizer": ("config.json", "model.safetensors", "model.ckpt"),
}
LISTED = ["Emu3.5-Image", "SimpleAR-1.5B-RL", "Wallaroo", "llamagen/c2i_B_256.pt"]
PLACES = pytest.mark.parametrize("place", ["own", "extra", "others"])


def write(folder: Path, *names: str) -> None:
    for name in names:
        folder.joinpath(name).mkdir(parents=True)
        for file in PUBLISHED[name]:
            folder.joinpath(name, file).write_text(file)


def cache(folder: Path, name: str) -> Path:
    """Its files as they lie in Hugging Face's cache: blobs, and a snapshot of links to them."""
    model = folder / f"models--author--{name}"
    snapshot = model / "snapshots" / "0a1b"
    for each in (snapshot, model / "blobs"):
        each.mkdir(parents=True)
    for number, file in enumerate(PUBLISHED[name]):
        model.joinpath("blobs", str(number)).write_text(file)
        snapshot.joinpath(file).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def check(paths, folder: Path, names: list[str]) -> None:
    assert paths.checkpoints() == names
    for name in names:
        assert paths.checkpoint_path(name) == folder / name


@PLACES
def test_models_are_listed_and_their_image_tokenizers_are_not(paths, tmp_path, place):
    write(tmp_path / place, *PUBLISHED)
    write(tmp_path / place / "cosmos-and-others", "SimpleAR-1.5B-RL")
    check(paths, tmp_path / place, sorted([*LISTED, "cosmos-and-others/SimpleAR-1.5B-RL"]))


@PLACES
def test_folders_of_hugging_faces_cache(paths, tmp_path, place):
    folders = [cache(tmp_path / place, name) for name in PUBLISHED if name != "llamagen"]
    models = [path for path in folders if path.parents[1].name.rpartition("--")[2] in LISTED]
    check(paths, tmp_path / place, sorted(os.path.relpath(x, tmp_path / place) for x in models))


@PLACES
def test_links_to_models(paths, tmp_path, place):
    """Of folders, of each file in one, and of a file; in the folder itself."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / place
    write(elsewhere, *PUBLISHED)
    for name in (COSMOS, "SimpleAR-1.5B-RL"):
        folder.joinpath(name).symlink_to(elsewhere / name, target_is_directory=True)
    folder.joinpath("Emu3.5-Image").mkdir()
    for file in PUBLISHED["Emu3.5-Image"]:
        folder.joinpath("Emu3.5-Image", file).symlink_to(elsewhere / "Emu3.5-Image" / file)
    for file in PUBLISHED["llamagen"]:
        folder.joinpath(file).symlink_to(elsewhere / "llamagen" / file)
    check(paths, folder, ["Emu3.5-Image", "SimpleAR-1.5B-RL", "c2i_B_256.pt"])


def test_the_users_own_folder_goes_first(paths, tmp_path):
    for place in ("others", "extra", "own"):
        write(tmp_path / place, "SimpleAR-1.5B-RL")
        assert paths.checkpoints() == ["SimpleAR-1.5B-RL"]
        assert paths.checkpoint_path("SimpleAR-1.5B-RL").parent == tmp_path / place


def replace(folder: Path) -> None:
    """As a download does: other files of the same names and sizes."""
    for file in folder.iterdir():
        target, before = file.resolve(), file.stat()
        target.unlink()
        target.write_text(file.name)
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


@pytest.mark.parametrize("how", ["beside", "inside", "linked", "cached", "converted"])
@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [("SimpleAR-1.5B-RL", COSMOS), ("Emu3.5-Image", "Emu3.5-VisionTokenizer")],
)
def test_a_replaced_image_tokenizer_is_noticed(paths, tmp_path, model, tokenizer, how):
    folder, path = tmp_path, tmp_path / model
    if how == "cached":
        path, replaced = (cache(folder, name) for name in (model, tokenizer))
    else:
        write(folder, model)
        folder = path if how == "inside" else folder
        write(folder, tokenizer)
        replaced = folder / tokenizer
    if how == "linked":
        path = tmp_path / "own" / "link"
        path.symlink_to(tmp_path / model, target_is_directory=True)
    if how == "converted":
        shutil.rmtree(replaced)
        replaced = tmp_path / f"{tokenizer}.safetensors"
        replaced.write_text("")
    before = paths.version(path)
    assert paths.version(path) == before
    if how == "converted":
        replaced.write_text("other")
    else:
        replace(replaced)
    assert paths.version(path) != before


def test_files_beside_wallaroo_are_noticed(paths, tmp_path):
    write(tmp_path, "Wallaroo")
    path = tmp_path / "Wallaroo" / "wallaroo.ckpt"
    for file in PUBLISHED["Wallaroo"]:
        before = paths.version(path)
        path.with_name(file).write_text("other")
        assert paths.version(path) != before


def test_what_concerns_another_model_is_not(paths, tmp_path):
    write(tmp_path, "SimpleAR-1.5B-RL", "Emu3.5-Image", "llamagen")
    path = tmp_path / "SimpleAR-1.5B-RL"
    before = paths.version(path)
    replace(tmp_path / "Emu3.5-Image")
    replace(tmp_path / "llamagen")
    assert paths.version(path) == before
