"""One training on a borrowed GPU, by the clock: compositions are drawn and encoded on it, and the
weights so far are kept where they survive a run that is killed.

    python -m benchmarks.gpu_train prepare BUILT DATA
    python -m benchmarks.gpu_train train DATA --work WORK --out OUT --until SECONDS

BUILT is a folder of `tokenshuffle data emoji`. Every minute OUT receives a checkpoint in pieces,
the log and the newest sheet of pictures: eight files with the output of `gpu.sh`. Everything else
is in WORK. What only speeds a training up, or shows it, does not end it where it fails. Needs only
the core's own requirements.
"""

import argparse
import shutil
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import nn

from tokenshuffle_core import checkpoints, load
from tokenshuffle_core.data import CodeShards
from tokenshuffle_core.data.emoji.build import read_manifest, write_lines
from tokenshuffle_core.data.emoji.codes import extract_compositions
from tokenshuffle_core.data.emoji.folder import Descriptions, size_of
from tokenshuffle_core.data.emoji.pictures import read
from tokenshuffle_core.data.emoji.plan import plan
from tokenshuffle_core.engine.quantize import QuantizedLinear
from tokenshuffle_core.files import atomic_path, write_text
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.presets import PRESETS
from tokenshuffle_core.text_tokenizer import TextTokenizer
from tokenshuffle_core.training.loop import FINAL, LATEST, fit
from tokenshuffle_core.training.model import ModelTask
from tokenshuffle_core.training.settings import LoopConfig, Recipe
from tokenshuffle_core.training.start import Changes, new_pipeline, trained_pipeline

from .pieces import split

TEXT_TOKENIZER = "text_tokenizer.json"
CAPTIONED = 20_000  # compositions whose captions train the text tokenizer
SIZES = [(256, 256), (384, 256), (256, 384), (512, 256), (256, 512), (128, 128)]
PRESET = PRESETS["emoji-256"]
SMALL = replace(PRESET.model, dim=64, layers=2, heads=2, kv_heads=2, hidden=128, window_head=32)
FIRST_SHARE = 0.6  # of the pictures, in the first size
LOOP = LoopConfig(
    batch=768, learning_rate=2.5e-3, ema=0.995, optimizer="muon", validate_every=2000,
    save_minutes=1, precision="bf16", compile=True,
)  # fmt: skip
RECIPE = Recipe(context_noise=0.7)
RESERVE = 6  # seconds for the last pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    preparing = parts.add_parser("prepare", help="a built data set -> one that is small to send")
    preparing.set_defaults(run=prepare)
    preparing.add_argument("built", type=Path, metavar="BUILT")
    training = parts.add_parser("train", help="compose, encode and train")
    training.set_defaults(run=train)
    for part in (preparing, training):
        part.add_argument("data", type=Path, metavar="DATA")
        part.add_argument("--compositions", type=int, metavar="N", default=90_000)
    option = training.add_argument
    option("--work", type=Path, required=True)
    option("--out", type=Path, required=True)
    option("--until", type=float, required=True, help="seconds since 1970 when it is over")
    option("--init", type=Path, metavar="FILE", help="checkpoint to go on from, whole or in int8")
    option("--device", default="cuda")
    option("--small", action="store_true", help="sizes for a trial on a CPU")
    option("--steps", type=int, default=0, help="instead of the time that is left, for a trial")
    options = parser.parse_args()
    options.run(options)


def prepare(options) -> None:
    """The built data set in a third less space than its PNGs, without what it was built from, and a
    text tokenizer."""
    options.data.mkdir(parents=True, exist_ok=True)
    records = read_manifest(options.built)
    for name in ("dataset.json", "LICENSES.md"):
        shutil.copy(options.built / name, options.data)
    for record in records:
        picture = read(options.built, record)
        record["image"] = str(PurePosixPath(record["image"]).with_suffix(".webp"))
        path = options.data / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, lossless=True, method=4)
    write_lines(options.data / "manifest.jsonl", records)
    sizes = [size_of(options.data, records)]
    describe = Descriptions.of(records, sizes, white_repeats=1, seed=0)
    planned = plan(records, min(CAPTIONED, options.compositions), sizes)
    captions = (text for i, each in enumerate(planned) for text in describe(i, *each)["captions"])
    shape = PRESET.model
    text_tokenizer = TextTokenizer.train(captions, shape.text_vocabulary, shape.max_grid)
    write_text(options.data / TEXT_TOKENIZER, text_tokenizer.to_json())


def train(options) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    scale = 4 if options.small else 1
    sizes = [(width // scale, height // scale) for width, height in SIZES]
    say("compositions", options)
    image_tokenizer = checkpoints.load_image_tokenizer(options.init or checkpoints.BUNDLED)
    extract_compositions(
        options.data, options.compositions, options.work / "codes", image_tokenizer, sizes,
        first_share=FIRST_SHARE, jitter=0.7, device=device,
    )  # fmt: skip
    say("codes", options)
    shards = CodeShards(options.work / "codes", verify=False)
    pipeline = start(options, shards)
    loop = LOOP
    if device.type == "cpu":
        loop = replace(loop, batch=8, precision="fp32", compile=False)
    say("captions", options)
    task = Task(shards, pipeline, loop, RECIPE, device)
    pipeline.model.to(device)
    while loop:
        loop = attempt(options, pipeline.model, task, loop)
    say("finished", options)


class Task(ModelTask):
    def sheet(self, module: nn.Module) -> Image.Image:
        try:
            return super().sheet(module)
        except RuntimeError:
            traceback.print_exc()
            return Image.new("RGB", (1, 1))


def attempt(options, module: nn.Module, task: ModelTask, loop: LoopConfig) -> LoopConfig | None:
    """Train for the time that is left. Returns the settings to go on with, from the weights so far:
    smaller pieces where the memory is full, without compiling where anything else has failed."""
    if options.steps:
        loop = replace(loop, steps=options.steps)
    else:
        loop = replace(loop, minutes=max(5, options.until - time.time() - RESERVE) / 60)
    say("training", options)
    folder = next(each for n in count(1) if not (each := options.work / f"train-{n}").exists())
    try:
        with kept(folder, options.out):
            fit(module, task, loop, folder, resume=False)
        return None
    except torch.OutOfMemoryError:
        loop = replace(loop, accumulation=2 * loop.accumulation)
        if loop.batch % loop.accumulation:
            raise
        traceback.print_exc()
    except RuntimeError:
        if not loop.compile:
            raise
        traceback.print_exc()
        loop = replace(loop, compile=False)
        torch.compiler.set_stance("force_eager")  # the blocks are compiled in place
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return loop


def start(options, shards: CodeShards) -> Pipeline:
    """The model of an earlier run, or a new one."""
    if options.init:
        pipeline = load(options.init, "cpu")
        expand(pipeline.model)
        pipeline.save(options.work / "init.safetensors")
        return trained_pipeline(options.work / "init.safetensors", shards, Changes())
    preset = replace(PRESET, model=SMALL) if options.small else PRESET
    text_tokenizer = options.data / TEXT_TOKENIZER
    changes = Changes(text_tokenizer=text_tokenizer if text_tokenizer.is_file() else None)
    return new_pipeline(shards, checkpoints.BUNDLED, preset, changes)


def expand(model: nn.Module) -> None:
    """Give int8 linear layers whole weights again: such a checkpoint is half as large to send."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, QuantizedLinear):
                rows, columns = layer.weight.shape
                whole = nn.Linear(columns, rows, layer.bias is not None)
                whole.weight.data = layer.weight.float() * layer.scale
                if layer.bias is not None:
                    whole.bias.data = layer.bias.float()
                setattr(module, name, whole)


def say(what: str, options) -> None:
    print(f"{what}: {options.until - time.time():.0f} s left", flush=True)


@contextmanager
def kept(folder: Path, out: Path):
    """While the training in `folder` goes on, and at its end however it ends, `out` receives what
    there is of it."""
    over = threading.Event()
    modified = 0.0

    def look() -> None:
        nonlocal modified
        path = next((p for name in (FINAL, LATEST) if (p := folder / name).exists()), None)
        if path is None or (now := path.stat().st_mtime) == modified:
            return
        split(path, out)
        modified = now
        copies = [(folder / "log.csv", "log.csv")]
        copies += [(path, "sheet.png") for path in sorted(folder.glob("sheet-*.png"))[-1:]]
        for source, name in copies:
            with atomic_path(out / name) as temporary:
                shutil.copyfile(source, temporary)

    def watch() -> None:
        while not over.wait(2):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()


if __name__ == "__main__":
    main()
