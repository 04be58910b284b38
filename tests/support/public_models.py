"""SimpleAR, Wallaroo and Emu3.5 with random weights, in the layouts that their authors published,
and decoding as they describe it, by whole passes of a model of the `transformers` library."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.support.cosmos import Cosmos, write_cosmos
from tests.support.published import (
    llama,
    llamagen_vq,
    randomise,
    write_merges,
    write_ranks,
    write_shards,
)
from tests.support.vqgan import VQGAN, write_ibq

CORPUS = ["a red apple on a wooden table, an image of a house", "GENERATE 512 images"] * 4
OF_SIMPLEAR = ["<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>"]
OF_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
COSMOS = "Cosmos-1.0-Tokenizer-DV8x16x16"


def _added(folder: Path, tokens: list[str]) -> int:
    """Write added_tokens.json after vocab.json. Returns the number of all tokens."""
    first = len(json.loads((folder / "vocab.json").read_text()))
    ids = {token: first + i for i, token in enumerate(tokens)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    return first + len(tokens)


def write_simplear(folder: Path, tied: bool = True, **changes) -> nn.Module:
    """Its folder, with Cosmos' beside it. Returns the model of `transformers`."""
    folder.mkdir(parents=True)
    write_merges(folder, CORPUS)
    text = _added(folder, OF_QWEN + OF_SIMPLEAR)
    model = llama(tied, "Qwen2", vocab_size=text + 64_000, hidden_size=32, **changes)
    config = model.config.to_dict() | {"architectures": ["SimpARForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {n: x for n, x in model.state_dict().items() if not (tied and n.startswith("lm_"))}
    write_shards(weights, folder, 1)
    if not (folder.parent / COSMOS).exists():
        write_cosmos(randomise(Cosmos()), folder.parent / COSMOS)
    return model


def write_emu(folder: Path, codes: int = 96) -> nn.Module:
    """The folder of Emu3.5-Image, in shards, with its image tokenizer's beside it."""
    folder.mkdir(parents=True)
    ranks = len(write_ranks(folder, CORPUS))
    special = 3 + 205 + 3  # those of Qwen and of Emu, and three around the picture
    model = llama(
        False, "Qwen3", vocab_size=ranks + special + codes, hidden_size=64, head_dim=24,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    kind = {"model_type": "Emu3", "architectures": ["Emu3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | kind))
    write_shards(model.state_dict(), folder, 2)
    vq = randomise(VQGAN(codes=(codes, 4), multipliers=(1, 1, 1, 2, 2), attended=(4,)))
    write_ibq(vq, folder.parent / "Emu3.5-VisionTokenizer")
    return model


class Wallaroo(nn.Module):
    """Its language model and the layers that are its own."""

    def __init__(self, language: nn.Module, codes: int = 64, dim: int = 8):
        super().__init__()
        width = language.config.hidden_size
        self.language = language
        self.gen_image_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, codes, bias=False)
        )
        self.gen_input_adpater = nn.Sequential(
            nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width)
        )


def write_wallaroo(folder: Path) -> Wallaroo:
    """Its file, with all that it needs beside it, in `folder`."""
    folder.mkdir(parents=True)
    write_merges(folder, CORPUS)
    text = _added(folder, OF_QWEN)
    vq = llamagen_vq((1, 1, 1, 2, 2))
    torch.save({"model": vq}, folder / "vq_ds16_t2i.pt")
    codes, dim = vq["quantize.embedding.weight"].shape
    language = llama(False, "Qwen2", vocab_size=text + 40, hidden_size=64)
    model = randomise(Wallaroo(language, codes, dim))
    config = language.config.to_dict() | {"model_type": "qwen2_5_vl"}
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"wallaroo.{n}": x for n, x in language.state_dict().items()}
    own = {n: x for n, x in model.state_dict().items() if not n.startswith("language.")}
    edit = {n.replace("gen_image", "edit_image"): x for n, x in own.items()}
    other = {"wallaroo.visual.patch_embed.proj.weight": torch.zeros(4, 3)}
    torch.save({"state_dict": weights | own | edit | other}, folder / "wallaroo.ckpt")
    return model


@torch.inference_mode()
def greedy(
    model: nn.Module,
    prompts: tuple[list[int], list[int]],
    grid: tuple[int, int],
    cfg: float,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    row_end: int | None = None,
) -> Tensor:
    """Codes (rows, columns): the most likely ones of u + cfg (c - u), from whole passes. `embed`
    has the vectors of codes (n,), `logits` those of hidden states (d,)."""
    rows, columns = grid
    text = model.get_input_embeddings()
    found = torch.zeros(0, dtype=torch.int64)
    for place in range(rows * columns):
        parts = []
        for row in found.split(columns) if len(found) else ():
            parts.append(embed(row))
            if row_end is not None and len(row) == columns:
                parts.append(text(torch.tensor([row_end])))
        scores = []
        for ids in prompts:
            x = torch.cat([text(torch.tensor(ids)), *parts])[None]
            hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
            scores.append(logits(hidden[0, -1]).log_softmax(-1))
        conditional, unconditional = scores
        best = (unconditional + cfg * (conditional - unconditional)).argmax()
        assert len(found) == place
        found = torch.cat([found, best[None]])
    return found.view(rows, columns)
