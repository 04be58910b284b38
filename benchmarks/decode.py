"""How close decoding comes to the limit of the memory, and to the plain loop and `transformers`.

    python -m benchmarks.decode --models 111m --windows 1,2,4 --sizes 256 --json decode.json

A step reads each weight and the KV cache once. These bytes divided by the measured bandwidth (of a
sum over as many bytes on a CPU, of a copy on a GPU) are the floor. Everything is measured in turn
in one process; times are medians of the rounds. "x plain" is the speed relative to the core's loop
without its engine; "x transformers" to that library's `generate` with a LLaMA of the same size and
as many steps and rows; "x whole", for quantised weights, to the same model before quantisation.
Random weights, guidance on (two rows a picture), 16 pixels to a code.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from tokenshuffle_core.config import WEIGHT_KINDS
from tokenshuffle_core.engine import prepare
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.transformer import KVCache

from .measure import machine, numbers, seconds_of, write_rows
from .models import SHAPES, random_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="111m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--windows", type=numbers, default="1,2,4")
    parser.add_argument("--sizes", type=numbers, default="256", help="pixels a side")
    parser.add_argument("--batches", type=numbers, default="1", help="pictures at once")
    parser.add_argument(
        "--stored", choices=("float32", "float16", "bfloat16"), default="float32",
        help="round the weights to what a file in this dtype holds",
    )  # fmt: skip
    parser.add_argument("--weights", choices=WEIGHT_KINDS, help="quantised weights")
    parser.add_argument("--ahead", type=int, default=1, help="windows that a step samples")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain loop")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kinds = {name: getattr(options, name) for name in ("stored", "weights", "ahead")}
    write_rows(HEADER, line, rows(options), options.json, **machine(options.device), **kinds)


def rows(options) -> Iterator[dict]:
    for name, window in product(options.models.split(","), options.windows):
        pipeline = random_pipeline(name, window, options.device)
        dtype = pipeline.model.code_embedding.weight.dtype
        pipeline.model.to(getattr(torch, options.stored)).to(dtype)
        whole = None
        if options.weights:
            whole = replace(pipeline, model=copy.deepcopy(pipeline.model))
            quantize(pipeline.model, options.weights)
        for size, batch in product(options.sizes, options.batches):
            yield {"model": name} | measure(pipeline, whole, size, batch, options)


def measure(pipeline: Pipeline, whole: Pipeline | None, size: int, batch: int, options) -> dict:
    """One row of the table: times in seconds, medians of the rounds, and the bytes of a step.

    `whole` is the model before quantisation.
    """
    model = pipeline.model
    window = model.config.window
    steps, read = bytes_of_a_step(model, size, batch, getattr(torch, options.stored).itemsize)
    llama = None if options.no_transformers else llama_of(model, options.device)

    def turn(size: int, steps: int) -> dict[str, float]:
        seconds = {"picture": picture(pipeline, size, batch, options.ahead, True)}
        seconds["floor"] = read / bandwidth(read, options.device)
        if not options.no_plain:
            seconds["plain"] = picture(pipeline, size, batch, 1, False)
        if whole:
            seconds["whole"] = picture(whole, size, batch, options.ahead, True)
        if llama:
            seconds["transformers"] = llama_picture(llama, steps, 2 * batch)
        return seconds

    turn(32 * window, 4)  # a picture of four windows, to load libraries and prepare the weights
    turns = [turn(size, steps) for _ in range(options.rounds)]
    medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    return {
        "window": window, "size": size, "batch": batch,
        "parameters": sum(p.numel() for p in (whole or pipeline).model.parameters()),
        "steps": steps,
        "step": medians["picture"] / steps, "bytes": read,
        "plain": None, "transformers": None, "whole": None,
    } | medians  # fmt: skip


def bytes_of_a_step(model, size: int, batch: int, stored: int = 4) -> tuple[int, int]:
    """The steps of a picture, and the bytes that each must read: all weights but the embeddings,
    in at most `stored` bytes each, as their file may hold them, and on average the keys and values
    of half of the positions."""
    steps = (size // 16 // model.config.window) ** 2
    weights = sum(
        min(weight.itemsize, stored) * weight.numel()
        for name, weight in model.state_dict().items()
        if "embedding" not in name
    )
    dtype = model.code_embedding.weight.dtype
    return steps, weights + KVCache.nbytes(model.config, 2 * batch, steps // 2, dtype)


def picture(pipeline: Pipeline, size: int, batch: int, ahead: int | None, engine: bool) -> float:
    """Seconds to sample the codes of a batch of pictures."""
    settings = replace(pipeline.config.generation, width=size, height=size)
    prompts = [pipeline.encode_prompt("a red apple")] * batch
    device = pipeline.model.code_embedding.weight.device
    if engine:  # prepared once for many pictures
        prepare(pipeline.model, device)
    seeds = list(range(batch))
    steps = pipeline.sample(prompts, [], settings, seeds, ahead=ahead, engine=engine)
    return seconds_of(lambda: list(steps), device)


def llama_of(model, device: str):
    """`transformers`' LLaMA of the same size as a model, with its codes as the vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = model.config
    config = LlamaConfig(
        vocab_size=shape.codebook_size, hidden_size=shape.dim,
        intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(model.code_embedding.weight.dtype).eval()


@torch.inference_mode()
def llama_picture(llama, steps: int, rows: int) -> float:
    """Seconds to generate as many tokens as a batch of pictures has steps."""
    prompt = torch.ones(rows, 8, dtype=torch.int64, device=llama.device)
    options = {"do_sample": True, "top_k": 0, "min_new_tokens": steps, "max_new_tokens": steps}
    mask = torch.ones_like(prompt)
    return seconds_of(lambda: llama.generate(prompt, attention_mask=mask, **options), llama.device)


def bandwidth(size: int, device: str) -> float:
    """Bytes per second, the median of ten measurements: of a sum over `size` bytes on a CPU, of a
    copy on a GPU."""
    memory = torch.ones(min(size, 2**31) // 4, device=device)
    target = torch.empty_like(memory) if memory.is_cuda else None
    use = (lambda: target.copy_(memory)) if memory.is_cuda else memory.sum
    seconds = [seconds_of(use, device) for _ in range(11)]
    return memory.nbytes * (2 if memory.is_cuda else 1) / statistics.median(seconds[1:])


HEADER = """\
| model | window | pixels | batch | steps | pictures / min | ms / step | MB / step | floor, ms \
| share of the floor | x plain | x transformers | x whole |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(row: dict) -> str:
    baselines = [row.get(name) for name in ("plain", "transformers", "whole")]
    cells = [
        f"{row['model']} ({row['parameters'] / 1e6:.0f} M)",
        *(row[name] for name in ("window", "size", "batch", "steps")),
        f"{60 * row['batch'] / row['picture']:.3g}", f"{1e3 * row['step']:.1f}",
        f"{row['bytes'] / 1e6:.0f}", f"{1e3 * row['floor']:.1f}",
        f"{row['floor'] / row['step']:.0%}",
        *(f"{seconds / row['picture']:.2f}" if seconds else "" for seconds in baselines),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
