"""Emu3.5's image tokenizer against an independent VQGAN."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.published import randomise
from tests.support.vqgan import VQGAN, ibq, write_ibq
from tokenshuffle_core import checkpoints
from tokenshuffle_core.checkpoints import native, vq
from tokenshuffle_core.checkpoints.checkpoint import fill, skeleton
from tokenshuffle_core.checkpoints.source import Source
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.engine import strips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "Emu3.5-VisionTokenizer"
    write_ibq(ibq(), path)
    return path


def in_float64(model: VQGAN, path):
    save_file(model.state_dict(), path)
    config, weights = vq.image_tokenizer(Source(path), quantizer="dot")
    return fill(skeleton(config), weights, "ibq: ", "cpu", torch.float64)


SHAPES = [
    {},
    {"attended": ()},
    {"attended": (0, 1)},
    {"channels": 64, "multipliers": (1, 2), "blocks": 2, "attended": (0,)},
    {"multipliers": (1, 1, 2, 1, 3), "blocks": 2, "attended": (3, 4)},
]


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_computes_what_a_vqgan_does(shape, tmp_path):
    theirs = randomise(VQGAN(**shape).double())
    ours = in_float64(theirs, tmp_path / "a.safetensors")
    stride = ours.config.stride
    pictures = torch.rand(2, 3, 2 * stride, 3 * stride, dtype=torch.float64)
    latent = ours.latent(pictures)
    torch.testing.assert_close(latent, theirs.latent(pictures * 2 - 1), rtol=1e-10, atol=1e-10)
    codes = theirs.codes(pictures * 2 - 1)
    assert torch.equal(ours.encode(pictures), codes)
    found, expected = ours.pixels(ours.quantizer.vectors(codes)), (theirs.pixels(codes) + 1) / 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@torch.inference_mode()
@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("room", [0, 10**9])
def test_large_pictures_with_attention_above_the_lowest_level(hold, room, tmp_path, monkeypatch):
    theirs = randomise(VQGAN(attended=(0, 1)).double())
    ours = in_float64(theirs, tmp_path / "a.safetensors")
    monkeypatch.setattr(strips, "STRIP", 500)
    plan, pictures = strips.Plan(room, bf16=False, hold=hold), torch.rand(2, 3, 20, 12).double()
    latent = ours.latent(pictures, plan)
    torch.testing.assert_close(latent, theirs.latent(pictures * 2 - 1), rtol=1e-4, atol=1e-5)
    codes = theirs.codes(pictures * 2 - 1)
    found = ours.pixels(ours.quantizer.vectors(codes), plan)
    torch.testing.assert_close(found, (theirs.pixels(codes) + 1) / 2, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("how", ["folder", "file", "prefixed", "sharded"])
def test_however_it_lies_there(how, folder, tmp_path):
    theirs, path = ibq(), folder
    weights = theirs.state_dict()
    if how == "file":
        path = folder / "model.ckpt"
    elif how != "folder":  # of `transformers`' remote code
        path = tmp_path
        weights = {f"model.{name}": x for name, x in weights.items()}
        (path / "config.json").write_text("{}")
        if how == "prefixed":
            save_file(weights, path / "model.safetensors")
        else:
            index = {name: f"{i % 2}.safetensors" for i, name in enumerate(weights)}
            for file in set(index.values()):
                save_file({n: weights[n] for n in weights if index[n] == file}, path / file)
            text = json.dumps({"weight_map": index})
            (path / "model.safetensors.index.json").write_text(text)
    ours = checkpoints.load_image_tokenizer(path)
    assert ours.config.quantizer == "dot"
    pictures = torch.rand(1, 3, 16, 24)
    assert torch.equal(ours.encode(pictures), theirs.codes(pictures * 2 - 1))


def test_convert_info_encode_decode(folder, tmp_path, capsys):
    picture, converted = tmp_path / "a.png", tmp_path / "ibq.safetensors"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)).save(picture)
    assert main(["convert", str(folder), "-o", str(converted)]) == 0
    made = []
    for model in map(str, (folder, converted)):
        codes, again = tmp_path / "codes.npy", tmp_path / "again.png"
        assert main(["encode", str(picture), "-o", str(codes), "--model", model]) == 0
        assert main(["decode", str(codes), "-o", str(again), "--model", model]) == 0
        made.append((np.load(codes), np.asarray(Image.open(again))))
        capsys.readouterr()
        assert main(["info", model]) == 0
        told = capsys.readouterr().out
        assert "codebook_size: 131072" in told
        assert "multiples of 4 pixels" in told
    assert made[0][0].shape == (1, 4, 6)
    assert made[0][0].max() > 2**16
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))


def test_a_vqgan_that_may_be_another_is_ibq_if_its_owner_says_so(tmp_path):
    theirs, path = randomise(VQGAN()), tmp_path / "a.safetensors"
    save_file(theirs.state_dict(), path)
    with pytest.raises(ValueError, match=r"a VQGAN with 64 codes, .* --family ibq"):
        checkpoints.load_image_tokenizer(path)
    assert (
        main(["convert", str(path), "-o", str(tmp_path / "b.safetensors"), "--family", "ibq"]) == 0
    )
    pictures = torch.rand(1, 3, 8, 8)
    codes = checkpoints.load_image_tokenizer(tmp_path / "b.safetensors").encode(pictures)
    assert torch.equal(codes, theirs.codes(pictures * 2 - 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.up.0.attn.0.q.weight": torch.zeros(1)}, "up.0.attn.0.q.weight has no place"),
        (
            {"encoder.down.1.downsample.conv.weight": None},
            r"down\.1\.downsample\.conv\.weight is m",
        ),
        ({"quantize.embedding.weight": torch.zeros(2**17)}, "has the shape"),
        ({"decoder.conv_out.weight": torch.zeros(4, 32, 3, 3)}, "has shape"),
        ({"model.quantize.embedding.weight": torch.zeros(2, 2)}, "named as in ibq, not as in vq"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, message, tmp_path):
    weights = ibq().state_dict() | change
    save_file({n: x for n, x in weights.items() if x is not None}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        checkpoints.load_image_tokenizer(tmp_path / "a.safetensors")


def test_one_of_another_family_is_refused(folder, tmp_path):
    names = {n: n.replace(".down.", ".conv_blocks.") for n in ibq().state_dict()}
    torch.save({names[n]: x for n, x in ibq().state_dict().items()}, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match="named as in vq, not as in ibq"):
        checkpoints.load_image_tokenizer(tmp_path / "vq.pt", family="ibq")
    with pytest.raises(ValueError, match="named as in ibq, not as in vq"):
        checkpoints.load_image_tokenizer(folder, family="vq")
    with pytest.raises(ValueError, match=r"a model's family is one of .*, not ibq"):
        checkpoints.read(folder)


def test_a_folder_without_its_weights(tmp_path):
    (tmp_path / "config.yaml").write_text("n_embed: 131072\n")
    with pytest.raises(FileNotFoundError, match=r"none of .*model\.ckpt"):
        checkpoints.load_image_tokenizer(tmp_path)


@pytest.mark.parametrize(("older", "levels"), [(True, (0,)), (False, ()), (None, (0,))])
def test_older_files_of_ours(older, levels, tmp_path):
    """Which say only whether there is attention at the lowest level, or nothing of it."""
    theirs, new, old = (tmp_path / f"{name}.safetensors" for name in ("theirs", "new", "old"))
    save_file(ibq(attended=(2,) if levels else ()).state_dict(), theirs)
    checkpoints.convert(theirs, new)
    with safe_open(new, "pt") as file:
        fields = json.loads(file.metadata()[native.IMAGE_TOKENIZER])
    assert tuple(fields.pop("attention_levels")) == levels
    fields |= {} if older is None else {"level_attention": older}
    save_file(load_file(new), old, {native.IMAGE_TOKENIZER: json.dumps(fields)})
    ours = checkpoints.load_image_tokenizer(old)
    assert ours.config.attention_levels == levels
    codes = torch.randint(0, 2**17, (1, 3, 2))
    with torch.inference_mode():
        expected = checkpoints.load_image_tokenizer(new).decode(codes)
        assert torch.equal(ours.decode(codes), expected)


@pytest.mark.parametrize("attended", [(4,), (3, 4)])
def test_at_its_true_size(attended):
    with torch.device("meta"):
        theirs = VQGAN(256, (1, 1, 2, 2, 4), 4, attended, 256, (131_072, 256))
    weights = theirs.state_dict()

    class Shapes(dict):
        path, shapes = "ibq", {name: tuple(x.shape) for name, x in weights.items()}
        shape_of, count = Source.shape_of, Source.count

    config, ours = vq.image_tokenizer(Shapes(weights), quantizer="dot")
    sizes = {name: tuple(x.shape) for name, x in skeleton(config).state_dict().items()}
    assert sorted(sizes.values()) == sorted(Shapes.shapes.values())
    assert sizes.keys() == ours.keys()
    assert sizes["quantizer.codebook.weight"] == (131_072, 256)
    assert config.stride == 16
    assert config.attention_levels == tuple(4 - level for level in reversed(attended))
