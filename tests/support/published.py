"""Random weights in the layouts that other projects published, small unless told otherwise."""

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from tokenshuffle_core.checkpoints.tokenizer_files import BYTES
from tokenshuffle_core.known_tokenizers import QWEN

SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"]


# Of a Qwen, and of SimpleAR.
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|t2i|>", "<|soi|>", "<tool_call>"]


def write_tokenizer(path: Path, special: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["<|User|>: a red apple\n\n<|Assistant|>:"] * 3, trainer)
    tokenizer.save(str(path))


def write_merges(folder: Path, texts: list[str], listed: str = "") -> Tokenizer:
    """vocab.json and merges.txt of a Qwen trained on the texts; ADDED is in the file `listed`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.save(str(folder))
    ids = {token: tokenizer.get_vocab_size() + i for i, token in enumerate(ADDED)}
    if listed == "added_tokens.json":
        (folder / listed).write_text(json.dumps(ids))
        special = json.dumps({"additional_special_tokens": ADDED})
        (folder / "special_tokens_map.json").write_text(special)
    elif listed:
        decoder = {id: {"content": token, "special": True} for token, id in ids.items()}
        config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
        (folder / listed).write_text(json.dumps(config))
    return tokenizer


def write_ranks(folder: Path, texts: list[str]) -> dict[bytes, int]:
    """The same vocabulary as Emu's ranks."""
    vocabulary = write_merges(folder, texts).get_vocab()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    byte = {character: byte for byte, character in BYTES.items()}
    ranks = {bytes(byte[c] for c in token): rank for token, rank in vocabulary.items()}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "emu3.tiktoken").write_text("".join(lines))
    return ranks


def randomise(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Weights large enough that what a layer does matters; norms around one."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean, std)
    return module.eval()


def janus(levels: tuple[int, ...] = (1, 1, 2), **changes):
    """A `transformers` Janus; its pictures are 16 pixels a side, 4 x 4 codes."""
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    text = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "bos_token_id": 0, "pad_token_id": 2,
    } | changes  # fmt: skip
    width = text["hidden_size"]
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4,
        num_image_tokens=16, projection_dim=width,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=levels, num_res_blocks=1, latent_channels=16,
        num_embeddings=64, projection_dim=width, image_token_embed_dim=width,
    )  # fmt: skip
    config = JanusConfig(text_config=LlamaConfig(**text), vision_config=vision, vq_config=vq)
    model = randomise(JanusForConditionalGeneration(config))
    # On vectors of length 1 the library, which measures distances, agrees with the authors' angles.
    book = model.model.vqmodel.quantize.embedding.weight
    book.data = nn.functional.normalize(book.data, dim=-1)
    model.generation_config.pad_token_id = 2
    model.generation_config.bos_token_id = 0
    model.generation_config.generation_kwargs = {"boi_token_id": SPECIAL.index("<begin_of_image>")}
    return model


def write_janus(model, folder: Path) -> Path:
    """In the layout of `transformers`."""
    model.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json", SPECIAL)
    return folder


def write_original_janus(model, folder: Path, shards: int = 2) -> Path:
    """In the layout of the authors, in shards that are pickles."""
    folder.mkdir()
    weights = {original_name(name): x for name, x in model.state_dict().items()}
    weights = {name: x.clone() for name, x in weights.items()}
    names = sorted(weights)
    index = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save({name: weights[name] for name in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    text = model.config.text_config.to_dict()
    config = {"model_type": "multi_modality", "language_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json", SPECIAL)
    return folder


def original_name(name: str) -> str:
    """Of a weight of the authors' Janus, from that of `transformers`."""
    for theirs, original in {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.generation_embeddings.": "gen_embed.",
        "model.generation_aligner.fc1.": "gen_aligner.layers.0.",
        "model.generation_aligner.hidden_layers.0.": "gen_aligner.layers.2.",
        "model.generation_head.proj_out.": "gen_head.output_mlp_projector.",
        "model.generation_head.": "gen_head.",
        "model.vqmodel.": "gen_vision_model.",
        "model.": "",
    }.items():
        if name.startswith(theirs):
            name = original + name.removeprefix(theirs)
            break
    if name.startswith("gen_vision_model."):
        for theirs, original in {
            "encoder.down.": "encoder.conv_blocks.", "decoder.up.": "decoder.conv_blocks.",
            ".block.": ".res.", "mid.block_1": "mid.0", "mid.attn_1": "mid.1",
            "mid.block_2": "mid.2",
        }.items():  # fmt: skip
            name = name.replace(theirs, original)
    return name


def llama(tied: bool, kind: str = "Llama", **changes):
    """A LLaMA, or another `kind` of the library, such as Qwen2."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 330, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "tie_word_embeddings": tied, "pad_token_id": 0,
        } | changes
    )  # fmt: skip
    return randomise(getattr(transformers, f"{kind}ForCausalLM")(config))


def llamagen_vq(levels: tuple[int, ...] = (1, 1, 2)) -> dict[str, Tensor]:
    """The state dict of a LlamaGen image tokenizer; by default a code stands for 4 pixels."""
    model = janus(levels).model.vqmodel
    weights = {original_name(f"model.vqmodel.{name}"): x for name, x in model.state_dict().items()}
    weights = {name.removeprefix("gen_vision_model."): x for name, x in weights.items()}
    return weights | {"quantize.codebook_used": torch.zeros(65536)}


def llamagen(
    dim: int = 128, layers: int = 2, hidden: int = 192, codes: int = 64, classes: int = 1000
) -> dict[str, Tensor]:
    """The state dict of a LlamaGen model, key by key and shape by shape as published."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    weights = {
        "cls_embedding.embedding_table.weight": normal(classes + 1, dim),
        "tok_embeddings.weight": normal(codes, dim),
        "norm.weight": 1 + normal(dim),
        "output.weight": normal(codes, dim),
        "freqs_cis": normal(257, dim // 2, 2),  # a buffer in some files
    }
    for i in range(layers):
        start = f"layers.{i}."
        weights |= {
            f"{start}attention.wqkv.weight": normal(3 * dim, dim),
            f"{start}attention.wo.weight": normal(dim, dim),
            f"{start}feed_forward.w1.weight": normal(hidden, dim),
            f"{start}feed_forward.w3.weight": normal(hidden, dim),
            f"{start}feed_forward.w2.weight": normal(dim, hidden),
            f"{start}attention_norm.weight": 1 + normal(dim),
            f"{start}ffn_norm.weight": 1 + normal(dim),
        }
    return weights


def write_llamagen(folder: Path, wrapper: str = "model") -> Path:
    """A model's file and, beside it, that of its image tokenizer."""
    folder.mkdir(exist_ok=True)
    torch.save({"model": llamagen_vq()}, folder / "vq_ds16_c2i.pt")
    torch.save({wrapper: llamagen()} if wrapper else llamagen(), folder / "c2i_B_256.pt")
    return folder / "c2i_B_256.pt"


def write_shards(weights: dict[str, Tensor], folder: Path, shards: int) -> None:
    """So many files and their index, or one without."""
    names, index = sorted(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: weights[name].clone() for name in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_llama(model, folder: Path, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    write_shards(weights, folder, shards)
    write_tokenizer(folder / "tokenizer.json", ["<s>", "</s>"])
    return folder
