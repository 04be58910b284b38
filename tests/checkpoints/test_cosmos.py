"""The folded image tokenizer against the published layers in three dimensions."""

import copy
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support.cosmos import Cosmos, write_cosmos
from tests.support.published import llama, randomise, write_llama
from tokenshuffle_core import checkpoints
from tokenshuffle_core.checkpoints import cosmos, image_tokenizers
from tokenshuffle_core.checkpoints.checkpoint import fill, skeleton
from tokenshuffle_core.checkpoints.source import Source
from tokenshuffle_core.cli import main


@pytest.fixture(scope="module")
def theirs():
    return randomise(Cosmos().double())


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("cosmos") / "tokenizer.safetensors"
    save_file(theirs.state_dict(), path)
    config, weights = cosmos.image_tokenizer(Source(path))
    return fill(skeleton(config), weights, "cosmos: ", "cpu", torch.float64)


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(32, 48), (16, 16)])
def test_it_computes_what_the_published_layers_do(theirs, ours, height, width):
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, height, width, dtype=torch.float64)
    expected = theirs.latent(pictures * 2 - 1)
    found = ours.latent(pictures)
    assert found.shape == expected.shape == (2, 6, height // 16, width // 16)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    codes = ours.encode(pictures)
    vectors = ours.quantizer.vectors(codes)
    expected = (theirs.pixels(vectors.double()) + 1) / 2
    torch.testing.assert_close(ours.pixels(vectors.double()), expected, rtol=1e-10, atol=1e-10)


def test_converted_it_is_an_image_tokenizer_as_any_other(theirs, tmp_path):
    published, converted = tmp_path / "cosmos.safetensors", tmp_path / "ours.safetensors"
    save_file({name: x.bfloat16() for name, x in theirs.state_dict().items()}, published)
    checkpoints.convert(published, converted)
    pictures = torch.rand(1, 3, 32, 48)
    expected = checkpoints.load_image_tokenizer(published).encode(pictures)
    ours = checkpoints.load_image_tokenizer(converted)
    assert torch.equal(ours.encode(pictures), expected)
    assert ours.decode(expected).shape == pictures.shape


def test_another_number_of_levels_is_refused(theirs, tmp_path):
    weights = theirs.state_dict()
    weights["quant_conv.conv3d.weight"] = weights["quant_conv.conv3d.weight"][:4].clone()
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="codes of 4 numbers instead of 6"):
        checkpoints.load_image_tokenizer(tmp_path / "a.safetensors")


def test_at_its_true_size_it_is_a_quarter_smaller():
    with torch.device("meta"):
        theirs = Cosmos(128, 16)
    weights = theirs.state_dict()
    assert sum(x.numel() for x in weights.values()) == 112_472_182  # as published

    class Shapes(dict):
        path, shapes = "cosmos", {name: tuple(x.shape) for name, x in weights.items()}
        shape_of, count = Source.shape_of, Source.count

    config, ours = cosmos.image_tokenizer(Shapes(weights))
    count = sum(x.numel() for x in skeleton(config).state_dict().values())
    assert count - 6 * 64_000 == pytest.approx(82.3e6, rel=1e-3)
    assert config.stride == 16
    assert len(ours) > 100


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("Cosmos-1.0-Tokenizer-DV8x16x16", "1.0"),
        ("Cosmos-0.1-Tokenizer-DV8x16x16", "0.1"),
        ("Cosmos-Tokenizer-DV8x16x16", "0.1"),
        ("models--nvidia--Cosmos-1.0-Tokenizer-DV8x16x16/snapshots/0a1b", "1.0"),
        ("Cosmos-Tokenize1-DV8x16x16-720p", "Tokenize1"),
        ("Cosmos-Tokenizer/pretrained", None),
        ("Cosmos-Tokenizer-DV8x16x16/Cosmos-1.0-Tokenizer-DV8x16x16", "1.0"),
    ],
)
def test_which_version_it_is_is_told_by_names(name, version, tmp_path):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    assert cosmos.version_of(folder) == cosmos.version_of(folder / "encoder.jit") == version


@pytest.fixture(scope="module")
def published(theirs, tmp_path_factory):
    """The folder, and one file of the same tensors."""
    model, folder = copy.deepcopy(theirs).float(), tmp_path_factory.mktemp("published")
    save_file(model.state_dict(), folder / "one.safetensors")
    return write_cosmos(model, folder / "Cosmos-0.1-Tokenizer-DV8x16x16")


def test_the_published_folder(published, tmp_path, capsys):
    """The same image tokenizer as from one file of its tensors, through every door."""
    folder = shutil.copytree(published, tmp_path / published.name)
    shutil.copy(published.parent / "one.safetensors", tmp_path)
    expected = checkpoints.load_image_tokenizer(tmp_path / "one.safetensors").state_dict()
    for path in (folder, folder / "encoder.jit", folder / "decoder.jit"):
        found = checkpoints.load_image_tokenizer(path).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    converted = tmp_path / "ours.safetensors"
    assert main(["convert", str(folder), "-o", str(converted)]) == 0
    for path in (folder, converted):
        assert main(["info", str(path)]) == 0
        printed = capsys.readouterr().out
        assert "version: 0.1\nnote: SimpleAR needs Cosmos-1.0-Tokenizer-DV8x16x16" in printed
        assert image_tokenizers.is_alone(path)
    Image.new("RGB", (32, 48), (200, 90, 10)).save(tmp_path / "a.png")
    for path in (folder, converted):
        codes, picture = (str(tmp_path / f"{path.stem}{end}") for end in (".npy", ".png"))
        given = ["--model", str(path)]
        assert main(["encode", str(tmp_path / "a.png"), "-o", codes, *given]) == 0
        assert main(["decode", codes, "-o", picture, *given]) == 0
        assert Image.open(picture).size == (32, 48)
    (folder / "decoder.jit").unlink()
    for path in (folder, folder / "encoder.jit"):
        with pytest.raises(FileNotFoundError, match=r"decoder\.jit"):
            checkpoints.load_image_tokenizer(path)


def test_a_llama_starts_with_it(published, tmp_path):
    write_llama(llama(True), tmp_path / "llama")
    start = checkpoints.read(tmp_path / "llama", image_tokenizer=published)
    assert start.config.model.codebook_size == 64_000
