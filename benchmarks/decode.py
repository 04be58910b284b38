"""How near decoding comes to what the memory allows, against the plain loop and `transformers`.

    python -m benchmarks.decode --models 111m --windows 1,2,4 --sizes 256 --json decode.json

A step reads each weight once and the KV cache: these bytes over the measured bandwidth (of a sum
over as many bytes on a CPU, of a copy on a GPU) are the floor. Everything is measured in turn in
one process, medians of rounds. "x plain" is how many times faster than the core's loop without its
engine; "x transformers" than that library's `generate` of a
LLaMA of the same size with as many steps and rows; "x whole", of 8-bit weights, than the same
model before. Random weights, guidance on (two rows a picture), and codes that stand for 16 pixels
each.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tokenshuffle_core import checkpoints
from tokenshuffle_core.config import WEIGHT_KINDS, GenerationConfig
from tokenshuffle_core.engine import prepare
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.transformer import KVCache

from .models import SHAPES, random_pipeline, read_weights

PROMPT = "a red apple"


@dataclass
class Row:
    """One line of the table; times in seconds, medians of the rounds."""

    model: str
    window: int
    size: int
    batch: int
    parameters: int
    steps: int
    picture: float
    step: float
    bytes: int  # that a step reads
    floor: float
    plain: float | None
    transformers: float | None
    whole: float | None = None  # of the same model before its weights were made smaller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="111m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--windows", default="1,2,4")
    parser.add_argument("--sizes", default="256", help="pixels a side")
    parser.add_argument("--batches", default="1", help="pictures at once")
    parser.add_argument(
        "--stored", choices=("float32", "float16", "bfloat16"), default="float32",
        help="the weights are rounded to what a file of this dtype holds",
    )  # fmt: skip
    parser.add_argument("--weights", choices=WEIGHT_KINDS, help="8-bit weights")
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
    rows = []
    print(HEADER)
    for name in options.models.split(","):
        for window in numbers(options.windows):
            settings = GenerationConfig(cfg=4.0)
            dtype = checkpoints.default_dtype(options.device)
            pipeline = random_pipeline(name, window, settings, options.device, dtype)
            stored = getattr(torch, options.stored)
            pipeline.model.to(stored).to(dtype)
            whole = None
            if options.weights:
                whole = replace(pipeline, model=copy.deepcopy(pipeline.model))
                quantize(pipeline.model, options.weights)
            for size in numbers(options.sizes):
                for batch in numbers(options.batches):
                    rows.append(measure(name, pipeline, whole, stored, size, batch, options))
                    print(line(rows[-1]), flush=True)
    if options.json:
        values = about(options.device) | {"rows": [asdict(row) for row in rows]}
        values |= {name: getattr(options, name) for name in ("stored", "weights", "ahead")}
        options.json.write_text(json.dumps(values, indent=1) + "\n")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def about(device: str) -> dict:
    """What the figures of this run belong to."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": name,
        "cuda": device.startswith("cuda"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measure(
    name: str,
    pipeline: Pipeline,
    whole: Pipeline | None,
    stored: torch.dtype,
    size: int,
    batch: int,
    options,
) -> Row:
    model = pipeline.model
    window = model.config.window
    steps = (size // 16 // window) ** 2
    weights = read_weights(model, stored)
    # What a step reads is on average the keys and values of half of the positions.
    dtype = model.code_embedding.weight.dtype
    cache = KVCache.nbytes(model.config, 2 * batch, steps // 2, dtype)
    llama = None if options.no_transformers else Llama(model, options.device)

    def turn(size: int, steps: int) -> dict[str, float]:
        found = {"picture": picture(pipeline, size, batch, options.ahead, True)}
        found["floor"] = (weights + cache) / bandwidth(weights + cache, options.device)
        if not options.no_plain:
            found["plain"] = picture(pipeline, size, batch, 1, False)
        if whole:
            found["whole"] = picture(whole, size, batch, options.ahead, True)
        if llama:
            found["transformers"] = llama.picture(steps, 2 * batch)
        return found

    turn(32 * window, 4)  # a picture of four windows: libraries and weights take their places
    turns = [turn(size, steps) for _ in range(options.rounds)]
    found = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    return Row(
        name, window, size, batch, sum(p.numel() for p in model.parameters()), steps,
        found["picture"], found["picture"] / steps, weights + cache, found["floor"],
        found.get("plain"), found.get("transformers"), found.get("whole"),
    )  # fmt: skip


def picture(pipeline: Pipeline, size: int, batch: int, ahead: int, engine: bool) -> float:
    """Seconds of sampling the codes of a batch of pictures."""
    settings = GenerationConfig(size, size, cfg=pipeline.config.generation.cfg)
    prompts = [pipeline.encode_prompt(PROMPT)] * batch
    device = pipeline.model.code_embedding.weight.device
    if engine:  # which is done once for many pictures
        prepare(pipeline.model, device)
    synchronize(device)
    started = time.perf_counter()
    *_, _ = pipeline.sample(prompts, [], settings, list(range(batch)), ahead=ahead, engine=engine)
    synchronize(device)
    return time.perf_counter() - started


class Llama:
    """`transformers`' LLaMA of the size of a model's, with its codes for a vocabulary."""

    def __init__(self, model, device):
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = model.config
        config = LlamaConfig(
            vocab_size=shape.codebook_size, hidden_size=shape.dim,
            intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.context, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        with torch.device(device):
            self.llama = LlamaForCausalLM(config).to(model.code_embedding.weight.dtype).eval()
        self.device = device

    @torch.inference_mode()
    def picture(self, steps: int, rows: int) -> float:
        prompt = torch.ones(rows, 8, dtype=torch.int64, device=self.device)
        synchronize(prompt.device)
        started = time.perf_counter()
        self.llama.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0,
            min_new_tokens=steps, max_new_tokens=steps,
        )  # fmt: skip
        synchronize(prompt.device)
        return time.perf_counter() - started


def bandwidth(size: int, device: str) -> float:
    """Bytes a second, the median of ten times: of a sum over so many bytes on a CPU, of a copy on a
    GPU."""
    memory = torch.ones(min(size, 2**31) // 4, device=device)
    target = torch.empty_like(memory) if memory.is_cuda else None
    seconds = []
    for _ in range(11):
        synchronize(memory.device)
        started = time.perf_counter()
        target.copy_(memory) if memory.is_cuda else memory.sum()
        synchronize(memory.device)
        seconds.append(time.perf_counter() - started)
    return memory.nbytes * (2 if memory.is_cuda else 1) / statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


HEADER = """\
| model | window | pixels | batch | steps | pictures / min | ms / step | MB / step | floor, ms \
| share of the floor | x plain | x transformers | x whole |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(row: Row) -> str:
    cells = [
        f"{row.model} ({row.parameters / 1e6:.0f} M)", row.window, row.size, row.batch, row.steps,
        f"{60 * row.batch / row.picture:.3g}", f"{1e3 * row.step:.1f}", f"{row.bytes / 1e6:.0f}",
        f"{1e3 * row.floor:.1f}", f"{row.floor / row.step:.0%}", ratio(row.plain, row.picture),
        ratio(row.transformers, row.picture), ratio(row.whole, row.picture),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def ratio(slow: float | None, fast: float) -> str:
    return f"{slow / fast:.2f}" if slow else ""


if __name__ == "__main__":
    main()
