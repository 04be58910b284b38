"""A model of Janus-Pro-1B's size with random weights: conversion, memory, and the time for a
picture against `transformers`' own loop in the same run.

    python -m benchmarks.janus --width 384 --height 384 --json janus.json

Both draw with guidance, in the same dtype (float32 on a CPU), from the same published folder in
bfloat16. Ours is the whole first picture; `--tokens` ends their loop sooner, whose first steps are
its fastest.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from tokenshuffle_core import checkpoints
from tokenshuffle_core.checkpoints.janus import PROMPT
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.text_tokenizer import TextTokenizer

from .measure import columns, in_a_process, machine, peak_mib, seconds_of, write_json

DRAWN = "a red fox in deep snow at sunrise"


def make(folder: Path, tokens: int) -> None:
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    text = LlamaConfig(
        vocab_size=102_400, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=16_384,
        rms_norm_eps=1e-6, bos_token_id=0, pad_token_id=2,
    )  # fmt: skip
    # The part that sees pictures does not draw them: it stays small.
    vision = JanusVisionConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_image_tokens=tokens,
        projection_dim=2048,
    )  # fmt: skip
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=JanusVQVAEConfig())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    JanusForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = TextTokenizer.train([DRAWN], 320, max_grid=1).tokenizer
    tokenizer.add_special_tokens([*PROMPT.template[::2], PROMPT.pad])
    tokenizer.save(str(folder / "tokenizer.json"))


def ours(converted: Path, options) -> tuple[dict, list[int]]:
    """The results of this project, and the framed prompt."""
    started = time.perf_counter()
    pipeline = load(converted, options.device)
    results = {"load": time.perf_counter() - started}
    settings = GenerationConfig(options.width, options.height, cfg=5.0, schedule="constant")
    ids = pipeline.encode_prompt(DRAWN)
    started = time.perf_counter()
    for progress in pipeline.sample([ids], [], settings, [0]):
        if progress.position == 1:
            results["first_step"] = time.perf_counter() - started
    results["ours"] = (time.perf_counter() - started) / progress.positions
    results["steps"] = progress.positions
    results["vq_decode"] = seconds_of(lambda: pipeline.decode(progress.codes), options.device)
    results["peak_mib"] = peak_mib(options.device)
    return results, pipeline.text_tokenizer.frame(ids, *pipeline.grid(settings))


@torch.inference_mode()
def theirs(folder: Path, device: str, framed: list[int], tokens: int) -> float:
    """Seconds a step in `transformers`."""
    from transformers import JanusForConditionalGeneration

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config.generation_kwargs = {"boi_token_id": framed[-1]}
    ids = torch.tensor([framed], device=device)
    options = {"generation_mode": "image", "do_sample": True, "guidance_scale": 5}
    mask = torch.ones_like(ids)
    return seconds_of(lambda: model.generate(ids, attention_mask=mask, **options), device) / tokens


def table(run: dict) -> str:
    rows = {
        "convert": f"{run['convert']:.1f} s",
        "load": f"{run['load']:.1f} s",
        f"a picture of {run['steps']} steps": f"{run['ours'] * run['steps']:.0f} s",
        "of which the first step": f"{run['first_step']:.0f} s",
        "a step": f"{1e3 * run['ours']:.0f} ms",
        f"a step of `transformers`, {run['tokens']} tokens": f"{1e3 * run['theirs']:.0f} ms",
        "x transformers": f"{run['ratio']:.2f}",
        "VQ decode": f"{run['vq_decode']:.1f} s",
        "memory at most": f"{run['peak_mib'] / 1024:.1f} GiB",
    }
    return columns(run["device"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=576, help="that `transformers` draws")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, converted = Path(temporary) / "janus", Path(temporary) / "janus.safetensors"
        in_a_process(make, folder, options.tokens)
        results = {"convert": seconds_of(lambda: checkpoints.convert(folder, converted), "cpu")}
        seconds, framed = ours(converted, options)
        results |= seconds
        print(json.dumps(results, indent=1), flush=True)
        results["theirs"] = theirs(folder, options.device, framed, options.tokens)
    results["tokens"] = options.tokens
    results["ratio"] = results["theirs"] / results["ours"]
    print(json.dumps(results, indent=1))
    if options.json:
        write_json(options.json, machine(options.device) | results)


if __name__ == "__main__":
    main()
