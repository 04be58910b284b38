"""Trains and scores what the tables compare, and writes docs/experiments.md.

    python -m experiments.run windows elastic -o WORK --seeds 0,1,2
    python -m experiments.run windows elastic -o WORK --times

The data set, the codes and the checkpoints go to WORK, the scores to experiments/results. What is
there already is kept, unless its recipe has changed; an interrupted training goes on. One run at a
time writes to a WORK. `--times` measures instead how long a training step and a picture take, all
rows in turn, on an idle machine.
"""

import argparse
import csv
import hashlib
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tokenshuffle_core import checkpoints
from tokenshuffle_core.data.emoji import build as emoji
from tokenshuffle_core.data.emoji import compose
from tokenshuffle_core.data.emoji.pictures import on_white
from tokenshuffle_core.data.shards import INDEX, CodeShards, extract
from tokenshuffle_core.evaluation.reconstruction import psnr
from tokenshuffle_core.evaluation.retrieval import choose, retrieval
from tokenshuffle_core.files import atomic_path
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.training import state
from tokenshuffle_core.training.loop import FINAL
from tokenshuffle_core.training.model import CPU, ModelTask, train_model, training_flops
from tokenshuffle_core.training.stages import Stages, parse_stages, stage_pipeline

from .tables import (
    ORDER,
    OWN,
    ROOT,
    TIMES,
    Row,
    read_table,
    recipe_values,
    result_path,
    write_document,
)

STYLES, SIZE = ("3d", "flat"), 128
BUILT = {  # data set -> share of the subject-style pairs held out, compositions and their kinds
    "singles": (0.1, 160, ("single",)),
    "compositions": (0.0, 8000, compose.KINDS),
}
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=ORDER, metavar="TABLE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="WORK")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--times", action="store_true", help="measure times instead")
    options = parser.parse_args()
    tables = [read_table(name) for name in options.tables]
    if options.times:
        measure_times([row for table in tables for row in table.rows], options.output)
    else:
        for seed in map(int, options.seeds.split(",")):
            for table in tables:
                for row in table.rows:
                    for data in table.data:
                        measure(row, data, seed, options.output)
    write_document()


def build_data(name: str, work: Path, size: int = SIZE) -> Path:
    """The folder of the codes of a data set at `size` pixels, which lies beside it."""
    data, codes = work / name, work / f"{name}-codes{'' if size == SIZE else f'-{size}'}"
    if not (codes / INDEX).exists():
        held_out, count, kinds = BUILT[name]
        subjects = str(ROOT / "subjects.txt")
        emoji.build(data, subjects=subjects, styles=STYLES, languages=("en",), held_out=held_out)
        compose.build(data, count, kinds=kinds)
        tokenizer = checkpoints.load_image_tokenizer(checkpoints.BUNDLED)
        extract(data / compose.FOLDER, codes, tokenizer, [(size, size)])
    return codes


def measure(row: Row, data: str, seed: int, work: Path) -> None:
    """Train the row's variant on `data` with `seed`, and score it as the row asks, unless that is
    done."""
    variant = recipe_values(row.variant, data)
    path = result_path(row.variant, data, seed)
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if result.get("recipe") != variant:
        folder = train(row.variant, data, seed, work)
        result = {"recipe": variant, "losses": losses_of(folder)}
        write(path, result)
    if data == "singles":
        scores = result.setdefault("scores", [])
        asked = {"window": row.window, "generation": row.generation}
        if asked not in [{key: score[key] for key in asked} for score in scores]:
            folder = train(row.variant, data, seed, work)
            scores.append(asked | score(folder / FINAL, work / data, seed, row))
            write(path, result)
    print(f"{row.label}: {path.name}", flush=True)


def train(name: str, data: str, seed: int, work: Path) -> Path:
    """The folder of the trained variant, which is trained if it is not there."""
    variant = recipe_values(name, data)
    codes = build_data(data, work, variant.get("size", SIZE))
    digest = hashlib.sha256(json.dumps(variant, sort_keys=True).encode()).hexdigest()
    folder = work / f"{name}-{data}-{seed}-{digest[:8]}"
    if not (folder / FINAL).exists():
        before = train(variant["after"], data, seed, work) if "after" in variant else None
        recipe = recipe_of(variant, seed, codes)
        shards = CodeShards(codes)
        pipeline = stage_pipeline(recipe, 0, before and before / FINAL, shards)
        if "rank" in variant:
            limit_rank(pipeline.model, variant["rank"])
        stage = recipe.stages[0]
        resume = state.latest(folder) is not None
        train_model(shards, folder, pipeline, stage.loop, stage.recipe, resume=resume)
    return folder


def recipe_of(variant: dict, seed: int, codes: Path) -> Stages:
    """A variant's values as a recipe of one stage."""
    values = {key: value for key, value in variant.items() if key not in OWN}
    return parse_stages(values | {"stage": [{"codes": str(codes), "seed": seed}]})


class LowRank(nn.Module):
    """A weight (n, d) as the product of two matrices (n, rank) and (rank, d)."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Random factors whose product has the weight's scale."""
        left = torch.randn(len(weight), self.rank) * weight.std()
        return left, torch.randn(self.rank, weight.shape[1]) * self.rank**-0.5


def limit_rank(model: nn.Module, rank: int) -> None:
    """Squeeze the code embeddings and the head's input through `rank` dimensions: two linear
    layers, d -> rank -> d, that are multiplied out."""
    for part in (model.code_embedding, model.head):
        parametrize.register_parametrization(part, "weight", LowRank(rank))


def losses_of(folder: Path) -> dict[str, list[list[float]]]:
    """Name -> [step, nats per code] of every validation, as logged."""
    losses: dict[str, list[list[float]]] = {}
    with open(folder / "log.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["name"].startswith(("validation_loss", "trained_loss")):
                losses.setdefault(row["name"], []).append([int(row["step"]), float(row["value"])])
    return losses


def score(path: Path, data: Path, seed: int, row: Row) -> dict:
    """Split -> pictures whose nearest reference is the prompted subject, and how many there are;
    "psnr" of the training pictures drawn again, in dB."""
    pipeline = load(path)
    asked = recipe_values(row.variant, "singles")["generation"] | row.generation
    settings = replace(pipeline.config.generation, window=row.window, **asked)
    found = {}
    for split in ("train", "held-out"):
        records = choose(emoji.read_manifest(data), split, None, seed)
        scores, images = retrieval(pipeline, data, records, settings, seed=1000 * seed, batch=48)
        found[split] = [round(scores["top-1"] * len(records)), len(records)]
        if split == "train":
            learnt = torch.cat(list(on_white(data, records)))
            found["psnr"] = psnr(torch.stack(images), learnt).mean().item()
    return found


def measure_times(rows: list[Row], work: Path) -> None:
    """Seconds of a training step, and of sampling one picture, by variant and window:
    medians of rounds in which all take turns. Also the FLOPs of training on a picture."""
    timed: dict[str, dict] = {}
    for _ in range(ROUNDS):
        for row in rows:
            for window, seconds in times_of(row.variant, work).items():
                known = timed.setdefault(f"{row.variant} at {window}", {})
                for name, value in seconds.items():
                    known.setdefault(name, []).append(value)
    medians = {key: {n: statistics.median(v) for n, v in of.items()} for key, of in timed.items()}
    before = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    write(TIMES, before | medians)


def times_of(name: str, work: Path) -> dict[int, dict[str, float]]:
    """Window -> what is measured once, with fresh weights."""
    variant = recipe_values(name, "singles")
    size = variant.get("size", SIZE)
    codes = build_data("singles", work, size)
    recipe = recipe_of(variant, 0, codes)
    stage = recipe.stages[0]
    shards = CodeShards(codes)
    pipeline = stage_pipeline(recipe, 0, None, shards)
    task = ModelTask(shards, pipeline, stage.loop, stage.recipe, CPU)
    shape = pipeline.config.model
    prompt = pipeline.encode_prompt("a red apple, 3d style")
    found = {}
    for window in shape.windows:
        settings = replace(pipeline.config.generation, window=window)
        started = time.perf_counter()
        *_, _ = pipeline.sample([prompt], [], settings, [0])
        picture = time.perf_counter() - started
        steps = [step for step in range(50) if task.batch(step)[-1] == window][:2]
        started = time.perf_counter()
        for step in steps:
            task.loss(pipeline.model.train(), step)[0].backward()
        found[window] = {
            "picture": picture,
            "step": (time.perf_counter() - started) / len(steps),
            "flops": training_flops(pipeline.model, (size // 8) ** 2, window),
        }
        pipeline.model.eval()
    return found


def write(path: Path, value) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
