"""A model of SimpleAR-1.5B's size with random weights, on the CPU: steps of a 1024 px picture
against `transformers`' Qwen2 in the same run, memory, and the image tokenizer.

    python -m benchmarks.simplear --json simplear.json

Both models have the same weights, rounded to bfloat16 as the published file holds them, and two
rows for guidance. Ours computes in float32; theirs in float32, then in bfloat16. The caches are
filled with random keys and values to each length, and steps are taken in turn; a step of theirs is
the forward pass with its cache, guidance and one draw from all logits.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tokenshuffle_core import engine
from tokenshuffle_core.config import Config, GenerationConfig, ImageTokenizerConfig, ModelConfig
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.sampler import Decoding, Shape, Steps
from tokenshuffle_core.text_tokenizer import TextTokenizer

from .measure import columns, forget_peak, machine, numbers, peak_anonymous, seconds_of, write_json
from .models import COSMOS, SIMPLEAR

CFG, PADDING, PROMPT = 6.0, 16, 64  # the conditional prompt is the shorter one
TURN = 4  # steps: as many as the noise is drawn for at once


def make(shape: ModelConfig):
    """`transformers`' model, and ours with the same tensors; our head alone is a copy, as a file
    would have it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    text = shape.text_vocabulary
    config = Qwen2Config(
        vocab_size=text + shape.codebook_size, hidden_size=shape.dim,
        intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context, rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        theirs = Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    theirs.float()
    weights = theirs.model.state_dict()
    table = weights.pop("embed_tokens.weight")
    names = {
        "layers.": "transformer.blocks.", "self_attn": "attention", "norm.weight": "norm.weight",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
    }  # fmt: skip
    ours = {"transformer.norm.weight": weights.pop("norm.weight")}
    for name, weight in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        ours[name] = weight
    ours["text_embedding.weight"], ours["code_embedding.weight"] = table[:text], table[text:]
    ours["head.weight"] = table[text:].clone()
    with torch.device("meta"):
        model = TokenShuffleModel(shape).eval()
    model.load_state_dict(ours, assign=True)
    return theirs, model.requires_grad_(False)


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
    results = image_tokenizer(images, side)
    print(json.dumps(results), flush=True)
    theirs, model = make(shape)
    text = TextTokenizer.train(["a red apple"], 320, max_grid=side)
    pipeline = Pipeline(Config(images, shape), model, None, text, {})
    results["weights"] = sum(p.nbytes for p in model.parameters())
    forget_peak()
    results |= first_windows(pipeline, side, options.steps)
    print(json.dumps(results), flush=True)
    steps = our_steps(model, side)
    our_turn(model, steps, options.lengths[0])
    results |= {"peak": peak_anonymous(), "packed": engine.packed_nbytes(model), "rows": []}
    for dtype in (torch.float32, torch.bfloat16):
        theirs.to(dtype)
        their_turn(theirs, options.lengths[0])  # warms up
        for length in options.lengths:
            turns = [
                (our_turn(model, steps, length), their_turn(theirs, length))
                for _ in range(options.rounds)
            ]
            ours, other = (statistics.median(column) for column in zip(*turns, strict=True))
            name = str(dtype).removeprefix("torch.")
            row = {"positions": length, "their_dtype": name, "ours": ours, "theirs": other}
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
    return results


def table(run: dict) -> str:
    gib = 2**30
    rows = {
        "weights in float32": f"{run['weights'] / gib:.2f} GiB",
        "memory at most": f"{run['peak'] / gib:.2f} GiB, {run['peak'] / run['weights']:.2f} x",
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
