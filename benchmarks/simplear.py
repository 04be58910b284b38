"""A model of SimpleAR-1.5B's size with random weights, on the CPU: steps of a 1024 px picture
against `transformers`' Qwen2 in the same run, memory, and the image tokenizer.

    python -m benchmarks.simplear --json simplear.json

Both models have the same weights, in bfloat16 as the published file holds them, and two rows for
guidance. Ours computes in float32; theirs in float32, then in bfloat16. The caches are
filled with random keys and values to each length, and steps are taken in turn; a step of theirs is
the forward pass with its cache, guidance and one draw from all logits.
"""

import argparse
import json
import statistics
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tokenshuffle_core import engine
from tokenshuffle_core.checkpoints import skeleton
from tokenshuffle_core.checkpoints.native import metadata_of
from tokenshuffle_core.config import Config, GenerationConfig, ImageTokenizerConfig, ModelConfig
from tokenshuffle_core.files import Planned, write_safetensors
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.pipeline import Pipeline, load
from tokenshuffle_core.sampler import Decoding, Shape, Steps
from tokenshuffle_core.text_tokenizer import TextTokenizer

from .measure import (
    columns,
    forget_peak,
    in_a_process,
    machine,
    numbers,
    peak_anonymous,
    seconds_of,
    write_json,
)
from .models import COSMOS, SIMPLEAR

CFG, PADDING, PROMPT = 6.0, 16, 64  # the conditional prompt is the shorter one
TURN = 4  # steps: as many as the noise is drawn for at once


def weight_of(name: str, shape: torch.Size) -> torch.Tensor:
    """One of random weights in the type of the published file, the same in every call."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name == "head.weight":  # tied
        name = "code_embedding.weight"
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def weights_of(shape: ModelConfig) -> dict[str, partial]:
    tensors = skeleton(shape).state_dict().items()
    return {name: partial(weight_of, name, tensor.shape) for name, tensor in tensors}


def write(path: Path, shape: ModelConfig, images: ImageTokenizerConfig, side: int) -> None:
    """The file that `tokenshuffle convert` makes of a published model."""
    text = TextTokenizer.train(["a red apple"], 320, max_grid=side)
    tensors = {
        f"model.{name}": Planned(tuple(make.args[1]), torch.bfloat16, make)
        for name, make in weights_of(shape).items()
    }
    for name, tensor in ImageTokenizer(images).state_dict().items():
        tensors[f"image_tokenizer.{name}"] = tensor
    write_safetensors(path, tensors, metadata_of(Config(images, shape), text, {}, None, None))


def theirs(shape: ModelConfig):
    """`transformers`' model with the same weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.text_vocabulary + shape.codebook_size, hidden_size=shape.dim,
        intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context, rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    names = {
        "transformer.blocks.": "layers.", "transformer.norm.": "norm.",
        ".attention.": ".self_attn.", ".attention_norm.": ".input_layernorm.",
        ".mlp_norm.": ".post_attention_layernorm.",
    }  # fmt: skip
    weights = weights_of(shape)
    tables = [weights.pop(f"{name}.weight")() for name in ("text_embedding", "code_embedding")]
    model.model.embed_tokens.weight.copy_(torch.cat(tables))
    del weights["head.weight"]
    for name, read in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        model.model.get_parameter(name).copy_(read())
    return model


def our_steps(model, side: int) -> Steps:
    """Steps of one window of a picture of `side` x `side` codes, the whole cache filled."""
    device = torch.device("cpu")
    settings = GenerationConfig(16 * side, 16 * side, cfg=CFG, schedule="constant")
    shape = Shape(
        batch=1, grid=(side, side), window=1, prompt=PROMPT, row_ends=False, layout=None,
        settings=settings, has_given=False, dtype=torch.float32, device=device,
    )  # fmt: skip
    steps = Steps(Decoding(model.config, shape, 1), engine.Pace(1))
    text, padding = torch.ones(2, PROMPT, dtype=torch.int64), torch.tensor([PADDING, 0])
    steps.decoding.start(model, text, padding, None, [torch.Generator().manual_seed(0)])
    for memory in (*steps.decoding.cache.keys, *steps.decoding.cache.values):
        memory.normal_()
    return steps


def our_turn(model, steps: Steps, length: int) -> float:
    """Seconds a step after so many positions."""
    done = length - PROMPT + 1
    steps.decoding.cache.length = length
    steps.decoding.done.fill_(done)
    steps.decoding.noise.drawn = -(-done // TURN) * TURN  # of the windows before it, there is none

    def run() -> None:
        for i in range(TURN):
            steps.advance(model, done + i)

    return seconds_of(run, "cpu") / TURN


def their_turn(model, length: int) -> float:
    from transformers import DynamicCache

    config = model.config
    size = config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, 2, config.num_key_value_heads, length, size).to(model.dtype)
        cache.update(keys, values, layer)
    mask = torch.ones(2, length + TURN, dtype=torch.int64)
    mask[0, :PADDING] = 0
    seconds = []
    ids = torch.ones(2, 1, dtype=torch.int64)

    def step(i: int) -> torch.Tensor:
        seen = mask[:, : length + i + 1]
        logits = model(input_ids=ids, attention_mask=seen, past_key_values=cache).logits[:, -1]
        conditional, other = logits.float()
        guided = other + CFG * (conditional - other)
        return torch.multinomial(guided.softmax(-1), 1).expand(2, 1)

    for i in range(TURN):
        started = time.perf_counter()
        ids = step(i)
        seconds.append(time.perf_counter() - started)
    return statistics.mean(seconds)


def first_windows(pipeline: Pipeline, side: int, count: int) -> dict:
    """A user's first picture, whose first step packs the weights, with as many windows a step as
    the engine chooses."""
    settings = GenerationConfig(16 * side, 16 * side, cfg=CFG, schedule="constant")
    ids = pipeline.encode_prompt("a red apple")
    started = time.perf_counter()
    steps = pipeline.sample([ids], [], settings, [0])
    times = []
    for step in steps:
        times.append(time.perf_counter() - started)
        if step.position == count:
            break
    steps.close()
    pace = next(iter(engine.PACES[pipeline.model].values()))
    found = {n: min(seconds[1:] or seconds) for n, seconds in pace.seconds.items()}
    return {
        "first_step": times[0], "window": (times[-1] - times[0]) / (count - 1), "windows": count,
        "ahead": pace.chosen, "ahead_seconds": found,
    }  # fmt: skip


@torch.inference_mode()
def image_tokenizer(config: ImageTokenizerConfig, side: int) -> dict:
    """Seconds to decode, and the share of the rate of one large convolution."""
    images = ImageTokenizer(config).eval()
    codes = torch.randint(config.codebook_size, (1, side, side))
    images.decode(codes[:, :4, :4])  # libraries take what they need
    with FlopCounterMode(display=False) as counter:
        decode = seconds_of(lambda: images.decode(codes), "cpu")
    x, weight = torch.randn(1, 512, 128, 128), torch.randn(512, 512, 3, 3)
    rate = 2 * weight.numel() * 128**2
    large = min(seconds_of(lambda: F.conv2d(x, weight, padding=1), "cpu") for _ in range(5))
    flops = counter.get_total_flops()
    return {
        "vq_parameters": sum(p.numel() for p in images.parameters()), "vq_decode": decode,
        "vq_flops": flops, "vq_share": flops / decode / (rate / large),
    }  # fmt: skip


@torch.inference_mode()
def measure(options) -> dict:
    shape, images, side = SIMPLEAR, COSMOS, 64
    if options.small:
        shape = replace(
            shape, text_vocabulary=2000, dim=64, layers=2, heads=4, kv_heads=2, hidden=96
        )
        images, side = replace(images, channels=8), 16
    results = in_a_process(image_tokenizer, images, side)
    print(json.dumps(results), flush=True)
    with TemporaryDirectory() as folder:
        path = Path(folder, "simplear.safetensors")
        in_a_process(write, path, shape, images, side)
        pipeline = load(path)
    forget_peak()  # in which the file's pages would count
    model = pipeline.model
    weights = list(model.parameters())
    results["parameters"] = sum(weight.numel() for weight in weights)
    results["weights"] = sum(weight.nbytes for weight in weights)
    results |= first_windows(pipeline, side, options.steps)
    print(json.dumps(results), flush=True)
    steps = our_steps(model, side)
    our_turn(model, steps, options.lengths[0])
    packed = engine.packed_nbytes(model)
    results |= {"peak": peak_anonymous(), "packed": packed, "rows": []}
    other = theirs(shape)
    for dtype in (torch.float32, torch.bfloat16):
        other.to(dtype)
        their_turn(other, options.lengths[0])  # warms up
        for length in options.lengths:
            turns = [
                (our_turn(model, steps, length), their_turn(other, length))
                for _ in range(options.rounds)
            ]
            medians = [statistics.median(column) for column in zip(*turns, strict=True)]
            name = str(dtype).removeprefix("torch.")
            row = {"positions": length, "their_dtype": name}
            row |= zip(("ours", "theirs"), medians, strict=True)
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
    return results


def table(run: dict) -> str:
    gib = 2**30
    rows = {
        "weights in float32": f"{run['parameters'] * 4 / gib:.2f} GiB",
        "as loaded": f"{run['weights'] / gib:.2f} GiB",
        "memory at most": f"{run['peak'] / gib:.2f} GiB, "
        f"{run['peak'] / run['parameters'] / 4:.2f} x the weights in float32",
        "of which packed weights": f"{run['packed'] / gib:.2f} GiB",
        "the first step": f"{run['first_step']:.0f} s",
        f"the next {run['windows'] - 1} windows, each": f"{1e3 * run['window']:.0f} ms",
    }
    for row in run["rows"]:
        name = f"a step after {row['positions']} positions, `transformers` in {row['their_dtype']}"
        rows[name] = (
            f"{1e3 * row['ours']:.0f} ms against {1e3 * row['theirs']:.0f} ms: "
            f"{row['theirs'] / row['ours']:.2f} x"
        )
    rows["VQ decode"] = (
        f"{run['vq_decode']:.1f} s, {run['vq_share']:.0%} of the rate of a large convolution"
    )
    return columns(f"{run['device']}, {run['threads']} threads", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=numbers, default="64,2048", help="positions in the cache")
    parser.add_argument("--steps", type=int, default=12, help="of the first picture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="sizes for a trial")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = machine("cpu") | measure(options)
    print(table(results))
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
