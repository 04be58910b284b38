"""Trains and scores the models that the tables compare, and writes docs/experiments.md.

    python -m experiments.run windows elastic -o WORK --seeds 0,1,2
    python -m experiments.run windows elastic -o WORK --times

The data set, the codes and the checkpoints go to WORK, the scores to experiments/results. Existing
results are kept unless their recipe has changed; an interrupted training resumes. Only one run at a
time may write to a WORK. `--times` measures instead how long a training step and a picture take,
all rows in turn, on an idle machine.
"""

import argparse
import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.measure import seconds_of, write_json
from tokenshuffle_core import checkpoints
from tokenshuffle_core.data.emoji import build as emoji
from tokenshuffle_core.data.emoji import folder
from tokenshuffle_core.data.emoji.pictures import on_white
from tokenshuffle_core.data.extraction import extract
from tokenshuffle_core.data.shards import INDEX, CodeShards
from tokenshuffle_core.evaluation.reconstruction import psnr
from tokenshuffle_core.evaluation.retrieval import choose, retrieval
from tokenshuffle_core.files import sha256
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.training import state
from tokenshuffle_core.training.loop import FINAL
from tokenshuffle_core.training.model import CPU, ModelTask, train_model, training_flops
from tokenshuffle_core.training.stages import parse_stages, stage_pipeline

from .tables import (
    ORDER,
    OWN,
    ROOT,
    TIMES,
    Row,
    read_json,
    read_table,
    recipe_values,
    result_path,
    write_document,
)

STYLES, SIZE = ("3d", "flat"), 128
BUILT = {  # data set -> share of held-out subject-style pairs, number of compositions, their kinds
    "singles": (0.1, 160, ("single",)),
    "compositions": (0.0, 8000, ("single", "count", "single", "beside", "above")),
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
    """The folder of a data set's codes at `size` pixels, beside the data set; both are built if
    they do not exist."""
    data, codes = work / name, work / f"{name}-codes{'' if size == SIZE else f'-{size}'}"
    if not (codes / INDEX).exists():
        held_out, count, kinds = BUILT[name]
        subjects = str(ROOT / "subjects.txt")
        emoji.build(data, subjects=subjects, styles=STYLES, languages=("en",), held_out=held_out)
        folder.build(data, count, kinds=kinds)
        tokenizer = checkpoints.load_image_tokenizer(checkpoints.BUNDLED)
        extract(data / folder.FOLDER, codes, tokenizer, [(size, size)])
    return codes


def measure(row: Row, data: str, seed: int, work: Path) -> None:
    """Train the row's variant on `data` with `seed`, and score it with the row's settings, unless
    the results exist."""
    variant = recipe_values(row.variant, data)
    path = result_path(row.variant, data, seed)
    result = read_json(path)
    if result.get("recipe") != variant:
        folder = train(row.variant, data, seed, work)
        result = {"recipe": variant, "losses": losses_of(folder)}
        write_json(path, result)
    if data == "singles":
        scores = result.setdefault("scores", [])
        settings = {"window": row.window, "generation": row.generation}
        if settings not in [{key: score[key] for key in settings} for score in scores]:
            folder = train(row.variant, data, seed, work)
            scores.append(settings | score(folder / FINAL, work / data, seed, row))
            write_json(path, result)
    print(f"{row.label}: {path.name}", flush=True)


def train(name: str, data: str, seed: int, work: Path) -> Path:
    """The folder of the trained variant, which is trained if it does not exist."""
    variant = recipe_values(name, data)
    digest = sha256([json.dumps(variant, sort_keys=True).encode()])
    folder = work / f"{name}-{data}-{seed}-{digest[:8]}"
    if not (folder / FINAL).exists():
        before = train(variant["after"], data, seed, work) / FINAL if "after" in variant else None
        shards, pipeline, stage = start(variant, data, seed, work, before)
        if "rank" in variant:
            limit_rank(pipeline.model, variant["rank"])
        resume = state.latest(folder) is not None
        train_model(shards, folder, pipeline, stage.loop, stage.recipe, resume=resume)
    return folder


def start(variant: dict, data: str, seed: int, work: Path, before: Path | None = None) -> tuple:
    """The codes, the new model, which continues `before`, and the only stage of a training."""
    codes = build_data(data, work, variant.get("size", SIZE))
    values = {key: value for key, value in variant.items() if key not in OWN}
    recipe = parse_stages(values | {"stage": [{"codes": str(codes), "seed": seed}]})
    shards = CodeShards(codes)
    return shards, stage_pipeline(recipe, 0, before, shards), recipe.stages[0]


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
    """Squeeze the code embeddings and the head's input through `rank` dimensions: the product of
    two linear layers, d -> rank -> d."""
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
    """Split -> [pictures whose nearest reference is the prompted subject, all pictures]; "psnr" in
    dB between the generated pictures of the training split and their originals."""
    loaded = load(path)
    changes = recipe_values(row.variant, "singles")["generation"] | row.generation
    settings = replace(loaded.config.generation, window=row.window, **changes)
    results = {}
    for split in ("train", "held-out"):
        records = choose(emoji.read_manifest(data), split, None, seed)
        scores, images = retrieval(loaded, data, records, settings, seed=1000 * seed, batch=48)
        results[split] = [sum(score["top-1"] for score in scores), len(records)]
        if split == "train":
            originals = torch.cat(list(on_white(data, records)))
            results["psnr"] = psnr(torch.stack(images), originals).mean().item()
    return results


def measure_times(rows: list[Row], work: Path) -> None:
    """Writes the seconds of a training step and of sampling one picture for each variant and
    window: medians of rounds in which all take turns. Also the FLOPs of training on a picture."""
    timed: dict[str, list[dict]] = {}
    for _ in range(ROUNDS):
        for row in rows:
            for window, seconds in times_of(row.variant, work).items():
                timed.setdefault(f"{row.variant} at {window}", []).append(seconds)
    medians = {
        key: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        for key, rounds in timed.items()
    }
    write_json(TIMES, read_json(TIMES) | medians)


def times_of(name: str, work: Path) -> dict[int, dict[str, float]]:
    """Window -> one measurement with new weights."""
    variant = recipe_values(name, "singles")
    shards, pipeline, stage = start(variant, "singles", 0, work)
    task = ModelTask(shards, pipeline, stage.loop, stage.recipe, CPU)
    prompt = pipeline.encode_prompt("a red apple, 3d style")
    times = {}
    for window in pipeline.config.model.windows:
        settings = replace(pipeline.config.generation, window=window)
        sampled = pipeline.sample([prompt], [], settings, [0])
        picture = seconds_of(lambda: list(sampled), "cpu")  # noqa: B023
        steps = [step for step in range(50) if task.batch(step)[-1] == window][:2]
        training = pipeline.model.train()
        step = seconds_of(lambda: [task.loss(training, s)[0].backward() for s in steps], "cpu")  # noqa: B023
        times[window] = {
            "picture": picture,
            "step": step / len(steps),
            "flops": training_flops(pipeline.model, (variant.get("size", SIZE) // 8) ** 2, window),
        }
        pipeline.model.eval()
    return times


if __name__ == "__main__":
    main()
