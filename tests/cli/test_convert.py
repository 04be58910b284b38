"""From a published file to a picture, on the command line."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.published import (
    janus,
    llama,
    llamagen,
    llamagen_vq,
    write_janus,
    write_llama,
    write_llamagen,
    write_original_janus,
)
from tokenshuffle_core import checkpoints
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.pipeline import load


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    torch.save({"model": llamagen_vq()}, folder / "vq.pt")
    return {
        "llamagen": write_llamagen(folder),
        "janus": write_janus(janus(), folder / "janus"),
        "original": write_original_janus(janus(), folder / "original"),
        "llama": write_llama(llama(True), folder / "llama"),
        "vq": folder / "vq.pt",
    }


def size_options(width: int, height: int) -> list[str]:
    return ["--width", str(width), "--height", str(height)]


@pytest.mark.parametrize(
    ("family", "prompt"),
    [
        ("llamagen", ["--class", "golden retriever"]),
        ("llamagen", ["207"]),
        ("janus", ["a red apple"]),
        ("original", ["a red apple"]),
        ("llama", ["a red apple"]),
    ],
)
def test_convert_info_generate(family, prompt, sources, tmp_path, capsys):
    output = tmp_path / "converted.safetensors"
    options = ["--image-tokenizer", str(sources["vq"])] if family == "llama" else []
    assert main(["convert", str(sources[family]), "-o", str(output), *options]) == 0
    assert main(["info", str(output)]) == 0
    told = capsys.readouterr().out
    assert "codebook_size: 64" in told
    made = []
    for model in [output, *([sources[family]] if family != "llama" else [])]:
        picture, codes = tmp_path / "a.png", tmp_path / "codes.npy"
        assert main([
            "generate", *prompt, "-o", str(picture), "--model", str(model), "--greedy",
            "--save-codes", str(codes), *size_options(16, 24), "--overwrite",
        ]) == 0  # fmt: skip
        assert Image.open(picture).size == (16, 24)
        made.append(np.load(codes))
        assert made[-1].shape == (1, 6, 4)
    assert all(np.array_equal(made[0], other) for other in made)


@pytest.mark.parametrize("options", [[], ["--family", "vq"]])
@pytest.mark.parametrize("wrapper", ["model", "ema", "state_dict"])
def test_an_image_tokenizer_however_it_is_wrapped(wrapper, options, sources, tmp_path):
    torch.save({wrapper: llamagen_vq()}, tmp_path / "vq.pt")
    output = tmp_path / "vq.safetensors"
    assert main(["convert", str(tmp_path / "vq.pt"), "-o", str(output), *options]) == 0
    expected = checkpoints.load_image_tokenizer(sources["vq"]).state_dict()
    converted = checkpoints.load_image_tokenizer(output).state_dict()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_a_start_from_a_damaged_image_tokenizer_is_refused(sources, tmp_path, capsys):
    vq, broken = tmp_path / "vq.safetensors", tmp_path / "broken.safetensors"
    assert main(["convert", str(sources["vq"]), "-o", str(vq)]) == 0
    with safe_open(vq, "pt") as file:
        names = [name for name in file.keys() if "quant_conv.weight" not in name]  # noqa: SIM118
        save_file({name: file.get_tensor(name) for name in names}, broken, file.metadata())
    command = ["convert", str(sources["llama"]), "-o", str(tmp_path / "start.safetensors")]
    assert main([*command, "--image-tokenizer", str(broken)]) == 2
    assert "image_tokenizer.post_quant_conv.weight is missing" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llamagen", "janus", "vq"])
def test_its_image_tokenizer_alone(family, sources, tmp_path):
    """Codes and back, with the file as it came and with what `convert` made of it."""
    picture, converted = tmp_path / "a.png", tmp_path / "vq.safetensors"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)).save(picture)
    assert main(["convert", str(sources[family]), "-o", str(converted)]) == 0
    made = []
    for model in (sources[family], converted):
        codes, again = tmp_path / "codes.npy", tmp_path / "again.png"
        options = ["--model", str(model)]
        assert main(["encode", str(picture), "-o", str(codes), *options]) == 0
        assert main(["decode", str(codes), "-o", str(again), *options]) == 0
        made.append((np.load(codes), np.asarray(Image.open(again))))
    assert made[0][0].shape == (1, 4, 8)
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("family", ["llamagen", "janus"])
def test_growing(family, sources, tmp_path, capsys):
    """A window of 2 is there to be trained; the parent's own window computes as before."""
    output = tmp_path / "grown.safetensors"
    assert main(["grow", str(sources[family]), "--windows", "2,1", "-o", str(output)]) == 0
    assert "window 2: keeps" in capsys.readouterr().out
    parent, grown = load(sources[family]), load(output)
    text, codes = torch.tensor([[5, 3]]), torch.randint(0, 64, (1, 4, 4))
    padding = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        before = parent.model(text, padding, codes, 1).codes
        torch.testing.assert_close(grown.model(text, padding, codes, 1).codes, before)
        logits = grown.model.train()(text, padding, codes, 2).codes
    assert logits.shape == (1, 4, 4, 64)
    assert logits.isfinite().all()
    assert main(["generate", "", "-o", str(tmp_path / "a.png"), "--model", str(output),
                 *size_options(16, 16)]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{llamagen}", "--side", "0"], "--side must be a whole number from 1"),
        (["convert", "{llama}"], "name the image tokenizer"),
        (["convert", "{janus}", "--windows", "2"], "windows can only be set for a LLaMA"),
        (["convert", "{janus}", "--image-tokenizer", "{vq}"], "Janus includes its image tokenizer"),
        (["convert", "nothing.pt"], "nothing.pt does not exist"),
        (["convert", "{llamagen}", "--family", "janus"], "generation_embeddings.weight is"),
        (["convert", "{llama}", "--image-tokenizer", "{vq}", "--windows", "x"], "must be like 2"),
    ],
)
def test_wrong_inputs(arguments, message, sources, tmp_path, capsys):
    names = {name: str(path) for name, path in sources.items()}
    output = tmp_path / "made.safetensors"
    arguments = [argument.format(**names) for argument in arguments]
    assert main([*arguments, "-o", str(output)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_size_that_the_model_was_not_trained_at_is_noted(sources, tmp_path, capsys):
    options = ["--model", str(sources["llamagen"]), "-o", str(tmp_path / "a.png")]
    assert main(["generate", "--class", "3", *options, *size_options(16, 16)]) == 0
    assert "trained on 256x256, not on 16x16" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bfloat16"]])
@pytest.mark.parametrize(
    ("family", "kind"), [("original", "int4"), ("llama", "int8"), ("llamagen", "fp8")]
)
def test_small_weights_on_the_way_are_those_of_quantize_afterwards(
    family, kind, dtype, sources, tmp_path
):
    whole, after, at_once = (tmp_path / f"{name}.safetensors" for name in "abc")
    options = ["--image-tokenizer", str(sources["vq"])] if family == "llama" else []
    convert = ["convert", str(sources[family]), *options, *dtype]
    torch.manual_seed(0)  # the new layers of a LLaMA's start are random
    assert main([*convert, "-o", str(whole)]) == 0
    assert main(["quantize", "--model", str(whole), "--weights", kind, "-o", str(after)]) == 0
    torch.manual_seed(0)
    assert main([*convert, "--weights", kind, "-o", str(at_once)]) == 0
    contents = []
    for path in (after, at_once):
        with safe_open(path, "pt") as file:  # which has the metadata in no particular order
            contents.append((file.metadata(), path.read_bytes()))
    (before, expected), (metadata, found) = contents
    header = 8 + int.from_bytes(expected[:8], "little")
    assert metadata == before
    assert found[header:] == expected[header:]
    assert load_file(at_once).keys() == load_file(after).keys()
    quantized = quantize(load(whole).model, kind).state_dict()
    found = load(at_once).model.state_dict()
    assert all(torch.equal(found[name].float(), x.float()) for name, x in quantized.items())


def test_what_cannot_become_small_is_refused(sources, tmp_path, capsys):
    broken = write_llamagen(tmp_path / "broken")
    weights = torch.load(broken)
    weights["model"]["layers.1.feed_forward.w2.weight"][3, 4] = torch.inf
    torch.save(weights, broken)
    output = tmp_path / "made.safetensors"
    for source, message in (
        (sources["vq"], "is an image tokenizer: its weights cannot be int4"),
        (broken, "down_proj.weight holds numbers that are not finite"),
    ):
        assert main(["convert", str(source), "--weights", "int4", "-o", str(output)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
        assert str(source) in line
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("kind", [pytest.param(None, marks=pytest.mark.slow), "int4"])
def test_weights_go_through_memory_one_by_one(kind, tmp_path):
    """Of 400 MB never more than 1.3 times a third, beyond what was there before; and loading takes
    the file and one tensor."""
    wide = {"hidden": 8192, "layers": 3, "dim": 1024}
    weights = llamagen(**wide)
    torch.save({"model": weights}, tmp_path / "c2i_B_256.pt")
    torch.save({"model": llamagen_vq()}, tmp_path / "vq_ds16_c2i.pt")
    size = (tmp_path / "c2i_B_256.pt").stat().st_size
    largest = max(x.numel() for x in weights.values())
    del weights
    converted = tmp_path / "c2i.safetensors"
    most = most_memory(
        lambda: checkpoints.convert(tmp_path / "c2i_B_256.pt", converted, weights=kind)
    )
    assert most < 1.3 * size / 3
    checkpoint = checkpoints.read(converted)
    most = most_memory(lambda: checkpoint.load_model("cpu", torch.float32))
    assert most < converted.stat().st_size + 4 * largest


def most_memory(work: Callable[[], object]) -> int:
    """The most bytes beyond what was there before."""
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    kept = work()
    done.set()
    thread.join()
    del kept
    return most - before


def anonymous() -> int:
    """Bytes of this process's memory that no file is behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell")
