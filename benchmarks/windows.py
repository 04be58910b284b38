"""The time of sampling one picture by window, with random weights: windows in turn, medians.

    python benchmarks/windows.py --width 768 --layers 12 --size 256

Codes of 16 pixels from a codebook of 16,384; no decoding to pixels.
"""

import argparse
import statistics
import time

import torch

from tokenshuffle_core.config import LLAMAGEN_VQ16, Config, GenerationConfig, ModelConfig
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.text_tokenizer import TextTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pipelines = {window: random_pipeline(window, options) for window in (1, 2, 4)}
    seconds: dict[int, list[float]] = {window: [] for window in pipelines}
    for _ in range(options.rounds):
        for window, pipeline in pipelines.items():
            started = time.perf_counter()
            *_, _ = pipeline.sample([1, 2], [], pipeline.config.generation, seed=0)
            seconds[window].append(time.perf_counter() - started)
    base = statistics.median(seconds[1])
    for window, pipeline in pipelines.items():
        count = sum(parameter.numel() for parameter in pipeline.model.parameters())
        median = statistics.median(seconds[window])
        print(
            f"window {window}: {count / 1e6:.0f} M parameters, {median:.2f} s, "
            f"{median / base:.3f} of window 1"
        )


def random_pipeline(window: int, options) -> Pipeline:
    heads = options.width // 64
    text = TextTokenizer.train(["a red apple"], 1024, max_grid=128)
    shape = ModelConfig(
        text_vocabulary=len(text), codebook_size=LLAMAGEN_VQ16.codebook_size, windows=(window,),
        width=options.width, layers=options.layers, heads=heads, kv_heads=heads,
        hidden=options.width * 8 // 3 // 64 * 64, context=16640, max_grid=128,
    )  # fmt: skip
    settings = GenerationConfig(options.size, options.size, cfg=options.cfg)
    model = TokenShuffleModel(shape).eval()
    model.initialise()
    images = ImageTokenizer(LLAMAGEN_VQ16)
    return Pipeline(Config(LLAMAGEN_VQ16, shape, settings), model, images, text, {})


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
