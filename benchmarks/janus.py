"""A model of Janus-Pro-1B's size with random weights: conversion, memory, and the time of a picture
against `transformers`' own loop in the same run.

    python -m benchmarks.janus --width 384 --height 384 --json janus.json

Both draw with guidance, in the same dtype (float32 on a CPU), from the same published folder in
bfloat16. Ours is the whole first picture; `--tokens` ends their loop sooner, whose first steps are
its fastest.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch

from tests.support.published import SPECIAL, randomise, write_tokenizer
from tokenshuffle_core import checkpoints
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.pipeline import load

from .decode import about
from .parts import peak

PROMPT = "a red fox in deep snow at sunrise"


def make(folder: Path, tokens: int) -> None:
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    text = LlamaConfig(
        vocab_size=102_400, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=16_384,
        rms_norm_eps=1e-6, bos_token_id=0, pad_token_id=2,
    )  # fmt: skip
    # What sees pictures does not draw them: it is left small.
    vision = JanusVisionConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_image_tokens=tokens,
        projection_dim=2048,
    )  # fmt: skip
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=JanusVQVAEConfig())
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    model = randomise(model.to(torch.bfloat16).to_empty(device="cpu"), std=0.02)
    model.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json", SPECIAL)


@torch.inference_mode()
def theirs(folder: Path, device: str, framed: list[int]) -> float:
    """Seconds a step of `transformers`."""
    from transformers import JanusForConditionalGeneration

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config.generation_kwargs = {"boi_token_id": SPECIAL.index("<begin_of_image>")}
    ids = torch.tensor([framed], device=device)
    started = time.perf_counter()
    codes = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=True,
        guidance_scale=5,
    )  # fmt: skip
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / codes.shape[1]


def table(found: dict) -> str:
    rows = {
        "convert": f"{found['convert']:.1f} s",
        "load": f"{found['load']:.1f} s",
        f"a picture of {found['steps']} steps": f"{found['ours'] * found['steps']:.0f} s",
        "of which the first step": f"{found['first_step']:.0f} s",
        "a step": f"{1e3 * found['ours']:.0f} ms",
        f"a step of `transformers`, {found['tokens']} tokens": f"{1e3 * found['theirs']:.0f} ms",
        "x transformers": f"{found['ratio']:.2f}",
        "VQ decode": f"{found['vq_decode']:.1f} s",
        "memory at most": f"{found['peak_mib'] / 1024:.1f} GiB",
    }
    head = f"| {found['device']} | |\n| --- | --- |\n"
    return head + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=576, help="that `transformers` draws")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "janus"
        # In a process of its own, whose memory is not this one's.
        process = multiprocessing.get_context("spawn").Process(
            target=make, args=(folder, options.tokens)
        )
        process.start()
        process.join()
        converted = Path(temporary) / "janus.safetensors"
        started = time.perf_counter()
        checkpoints.convert(folder, converted)
        found = {"convert": time.perf_counter() - started}
        started = time.perf_counter()
        pipeline = load(converted, options.device)
        found["load"] = time.perf_counter() - started
        settings = GenerationConfig(options.width, options.height, cfg=5.0, schedule="constant")
        ids = pipeline.encode_prompt(PROMPT)
        framed = pipeline.text_tokenizer.frame(ids, *pipeline.grid(settings))
        started = time.perf_counter()
        for progress in pipeline.sample([ids], [], settings, [0]):
            if progress.position == 1:
                found["first_step"] = time.perf_counter() - started
        found["ours"] = (time.perf_counter() - started) / progress.positions
        found["steps"] = progress.positions
        started = time.perf_counter()
        pipeline.decode(progress.codes)
        found["vq_decode"] = time.perf_counter() - started
        found["peak_mib"] = peak(options.device)
        print(json.dumps(found, indent=1), flush=True)
        del pipeline, progress
        found["theirs"], found["tokens"] = theirs(folder, options.device, framed), options.tokens
    found["ratio"] = found["theirs"] / found["ours"]
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(about(options.device) | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
