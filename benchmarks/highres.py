"""2048 x 2048 in this machine's memory: sample and decode with random weights, print the peak.

    python benchmarks/highres.py --size 2048 --width 512 --layers 8

The image tokenizer has LlamaGen's VQ-16 sizes and decodes in strips; the picture is noise. With a
window of 2 the 16,384 codes take 4,096 steps.
"""

import argparse
import resource
import sys
import time
from dataclasses import replace

import torch
from tqdm import tqdm

from tokenshuffle_core import checkpoints
from tokenshuffle_core.config import LLAMAGEN_VQ16, PRESETS, Config, GenerationConfig, ModelConfig
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.images import write_png
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.text_tokenizer import TextTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="pixels a side")
    parser.add_argument("--preset", choices=PRESETS, help="instead of --width and --layers")
    parser.add_argument("--width", type=int, default=512, help="of the transformer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("-o", "--output", help="save the picture here")
    options = parser.parse_args()
    torch.manual_seed(0)
    text = TextTokenizer.train(["a red apple"], 1024, max_grid=128)
    if options.preset:
        shape = replace(PRESETS[options.preset].model, text_vocabulary=len(text))
        images = PRESETS[options.preset].image_tokenizer
    else:
        images = LLAMAGEN_VQ16
        shape = ModelConfig(
            text_vocabulary=len(text), codebook_size=images.codebook_size, width=options.width,
            layers=options.layers, heads=options.width // 64, kv_heads=options.width // 64,
            hidden=options.width * 8 // 3 // 64 * 64, context=16640, max_grid=128,
        )  # fmt: skip
    settings = GenerationConfig(options.size, options.size, cfg=options.cfg)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = TokenShuffleModel(shape).to(checkpoints.default_dtype(device))
        image_tokenizer = ImageTokenizer(images)
    model.initialise()
    pipeline = Pipeline(Config(images, shape, settings), model, image_tokenizer, text, {})
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"model {count / 1e6:.0f} M parameters, {_peak()}")
    start = time.perf_counter()
    ids = pipeline.encode_prompt("a red apple")
    rows, columns = pipeline.grid(settings)
    steps = pipeline.sample([ids], [], settings, [0])
    for step in tqdm(steps, total=rows * columns, file=sys.stderr):  # noqa: B007
        pass
    sampled = time.perf_counter()
    print(f"sampled {step.positions} positions in {sampled - start:.1f} s, {_peak()}")
    image = pipeline.decode(step.codes, save_memory=True)
    print(f"decoded {tuple(image.shape)} in {time.perf_counter() - sampled:.1f} s, {_peak()}")
    if options.output:
        write_png(options.output, image[0])


def _peak() -> str:
    memory = f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    if torch.cuda.is_available():
        memory += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    return memory


if __name__ == "__main__":
    main()
