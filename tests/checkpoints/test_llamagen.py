"""Against LlamaGen's model as its paper and its code describe it (arXiv 2406.06525)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.published import janus, llamagen, llamagen_vq, write_llamagen
from tokenshuffle_core import checkpoints
from tokenshuffle_core.checkpoints.llamagen import imagenet
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.pipeline import load

HEADS = 2  # of 64


def theirs(weights: dict[str, Tensor], classes: Tensor, codes: Tensor, side: int) -> Tensor:
    """Logits (B, 1 + n, codes) after a class and n codes of pictures with `side` codes a side."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    # Complex numbers that turn neighbouring pairs: the first half of these by the row, the second
    # by the column; those of the class are 0.
    frequencies = 10000.0 ** -(torch.arange(16) / 16)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], 1)
    turns = torch.cat([torch.zeros(1, 32), torch.polar(torch.ones_like(angles), angles)])
    x = torch.cat(
        [
            weights["cls_embedding.embedding_table.weight"][classes][:, None],
            weights["tok_embeddings.weight"][codes],
        ],
        dim=1,
    )
    length, width = x.shape[1:]
    turns = turns[:length, None]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    for i in range(2):
        layer = f"layers.{i}"
        qkv = norm(x, f"{layer}.attention_norm") @ weights[f"{layer}.attention.wqkv.weight"].T
        q, k, v = (part.unflatten(-1, (HEADS, 64)) for part in qkv.split(width, -1))
        scores = torch.einsum("bihd,bjhd->bhij", turned(q), turned(k)) / 8
        scores += torch.full((length, length), -torch.inf).triu(1)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + mixed @ weights[f"{layer}.attention.wo.weight"].T
        h = norm(x, f"{layer}.ffn_norm")
        w1, w2, w3 = (weights[f"{layer}.feed_forward.w{j}.weight"] for j in (1, 2, 3))
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, "norm") @ weights["output.weight"].T


@pytest.fixture(scope="module", params=["model", "module", "state_dict", "", "converted", "fsdp"])
def ours(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamagen")
    wrapper = "model" if request.param in ("converted", "fsdp") else request.param
    path = write_llamagen(folder, wrapper)
    if request.param == "fsdp":
        wrapped = "layers.0._fsdp_wrapped_module."
        torch.save({n.replace("layers.0.", wrapped): x for n, x in llamagen().items()}, path)
    if request.param == "converted":
        checkpoints.convert(path, folder / "c2i.safetensors")
        path = folder / "c2i.safetensors"
    return load(path)


@torch.inference_mode()
def test_logits(ours):
    codes = torch.randint(0, 64, (2, 4, 4))
    classes = torch.tensor([207, 1000])
    found = ours.model(classes[:, None], torch.zeros(2, dtype=torch.int64), codes).codes
    expected = theirs(llamagen(), classes, codes.flatten(1), 4)[:, :-1]
    assert (found.flatten(1, 2) - expected).norm() < 1e-4 * expected.norm()


@torch.inference_mode()
@pytest.mark.parametrize("side", [4, 6])
def test_greedy_steps_with_guidance(ours, side):
    codes = torch.zeros(2, 0, dtype=torch.int64)
    for _ in range(side**2):
        logits = theirs(llamagen(), torch.tensor([207, 1000]), codes, side)[:, -1]
        chosen = (logits[1] + 4.0 * (logits[0] - logits[1])).argmax()
        codes = torch.cat([codes, chosen.expand(2, 1)], 1)
    settings = GenerationConfig(4 * side, 4 * side, cfg=4.0, schedule="constant", temperature=0)
    ids = ours.encode_prompt("Golden Retriever")
    *_, last = ours.sample([ids], [], settings, [0])
    assert last.codes.flatten().tolist() == codes[0].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("wrapper", ["model", "ema"])
def test_the_image_tokenizer_alone(wrapper, tmp_path):
    other = {name: torch.zeros_like(x) for name, x in llamagen_vq().items()}
    path = tmp_path / "vq_ds16_c2i.pt"
    torch.save({"model": other, wrapper: llamagen_vq()}, path)
    ours, vq = checkpoints.load_image_tokenizer(path), janus().model.vqmodel
    images = torch.rand(1, 3, 16, 16)
    codes = vq.encode(images * 2 - 1).image_tokens.view(1, 4, 4)
    assert torch.equal(ours.encode(images), codes)


@pytest.mark.parametrize(
    ("file", "side"), [("c2i_L_384.pt", 384), ("c2i_B_256.pt", 256), ("c2i_XL.pt", 256)]
)
def test_the_size_is_in_the_name(file, side, tmp_path):
    path = write_llamagen(tmp_path).rename(tmp_path / file)
    published = checkpoints.read(path)
    assert (published.config.generation.width, published.config.generation.top_k) == (side, 2000)


def test_without_its_image_tokenizer(tmp_path):
    path = write_llamagen(tmp_path)
    (tmp_path / "vq_ds16_c2i.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"put vq_ds16_c2i\.pt beside it"):
        checkpoints.read(path)


def test_imagenets_classes():
    names = imagenet()
    assert len(names) == len(set(names)) == 1000
    known = {207: "golden retriever", 360: "otter", 88: "macaw", 979: "valley", 417: "balloon"}
    assert {i: names[i] for i in known} == known


@pytest.mark.parametrize(
    ("text", "found"), [("207", 207), (" Golden  retriever", 207), ("golden ret", 207), ("0", 0)]
)
def test_a_class_by_number_name_or_start(ours, text, found):
    assert ours.encode_prompt(text) == [found]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1000", "classes 0 to 999"),
        ("goldn retriver", r"golden retriever \(207\)"),
        ("retriever", r"golden retriever \(207\)"),
        ("a red apple 3d", "not the name of a class"),
        ("-1", "not the name"),
    ],
)
def test_what_is_no_class(ours, text, message):
    with pytest.raises(ValueError, match=message):
        ours.encode_prompt(text)
