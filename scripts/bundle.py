"""Scores a trained checkpoint and writes it, with its model card, as the bundled model.

    python -m scripts.bundle RUN/final.safetensors DATA --cfg 4 --training "one sentence on compute"

DATA is a folder of `data emoji`; of `--compositions` where the model was trained on them. The
card's scores are measured on the bundled file itself, which is stored in float16. Also writes the
picture sheets of the README into docs/ and the list of subjects into the prompt node's help.
"""

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path

import torch

from tokenshuffle_core import checkpoints
from tokenshuffle_core.config import parse_sizes
from tokenshuffle_core.data.emoji.build import read_manifest
from tokenshuffle_core.data.emoji.compose import FOLDER
from tokenshuffle_core.evaluation.compositional import SCORES, choose_compositions, compositional
from tokenshuffle_core.evaluation.retrieval import choose, reconstruction_psnr, retrieval
from tokenshuffle_core.files import atomic_path
from tokenshuffle_core.images import sheet_of
from tokenshuffle_core.pipeline import Pipeline, load

ROOT = Path(__file__).resolve().parent.parent
HELP = ROOT / "web" / "docs" / "TokenShufflePrompt.md"
MARKER = "## Subjects of the bundled model"
LARGEST = 256, 128  # of the sizes it is trained at
PAIRS = (
    "two robots, flat style", "two hearts, 3d style", "two suns, 3d style", "two owls, flat style",
    "two tulips, noto style", "two police cars, 3d style", "two sunflowers, 3d style",
    "two tigers, 3d style",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--training", required=True, help="for the card: compute and settings")
    parser.add_argument("--cfg", type=float, required=True)
    parser.add_argument("--schedule", default="half-linear")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    options = parser.parse_args()
    records = read_manifest(options.data)
    summary = json.loads((options.data / "dataset.json").read_text(encoding="utf-8"))
    parts = load(options.checkpoint)
    names = ("cfg", "schedule", "temperature", "top_k", "top_p")
    chosen = {name: getattr(options, name) for name in names}
    parts.config = replace(parts.config, generation=replace(parts.config.generation, **chosen))
    sizes = parts.card[checkpoints.SIZES]
    composed = (options.data / FOLDER).is_dir()
    parts.card = card_of(summary, records, options.training, sizes, composed)
    parts.save(checkpoints.BUNDLED, torch.float16)
    parts.card["tokenshuffle.scores"] = ", ".join(score(options.data, records, composed))
    parts.save(checkpoints.BUNDLED, torch.float16)
    write_subjects(records)
    draw_largest()
    print(parts.card["tokenshuffle.scores"])


def card_of(
    summary: dict, records: list[dict], training: str, sizes: str, composed: bool
) -> dict[str, str]:
    sources = "; ".join(
        f"{s['package']} {s['version']} ({s['licence']}, {s['by']})" for s in summary["sources"]
    )
    subjects = list(dict.fromkeys(record["subject"] for record in records))
    return {
        "modelspec.title": "Token-Shuffle Emoji 128",
        "modelspec.author": "the ComfyUI-TokenShuffle developers",
        "modelspec.license": "Apache-2.0; trained on pictures under MIT and Apache-2.0",
        "modelspec.date": datetime.date.today().isoformat(),
        "modelspec.resolution": f"{summary['size']}x{summary['size']}",
        "modelspec.description": (
            f"A small Token-Shuffle model that draws {summary['subjects']} subjects as emoji in "
            f"{len(summary['styles'])} styles{', alone, counted or two together' * composed}, from "
            f"prompts in {len(summary['languages'])} languages ({', '.join(summary['languages'])})."
        ),
        "modelspec.usage_hint": (
            '"a SUBJECT, STYLE style" with a style of '
            f'{", ".join(summary["styles"])}; optionally "on a COLOUR background"'
            + '; also "three SUBJECTS", "a SUBJECT left of a SUBJECT"' * composed
            + "; in other languages names without an article"
        ),
        "tokenshuffle.data": (
            f"{summary['pictures']} pictures, {summary['held_out']} subject-style pairs held out; "
            f"{sources}"
        ),
        "tokenshuffle.training": training,
        checkpoints.SIZES: sizes,
        "tokenshuffle.limits": (
            "It has memorised its small data set and knows no other subject; pairs it never saw "
            "come out as another subject more often; on coloured backgrounds and in counts "
            "subjects come out rough, two together as blobs; it draws at the sizes listed; fine "
            "detail is blurred by the image tokenizer."
        ),
        "tokenshuffle.subjects": ", ".join(subjects),
    }


def score(data: Path, records: list[dict], composed: bool) -> list[str]:
    pipeline = load()
    settings = pipeline.config.generation
    docs = ROOT / "docs"
    lines = []
    for split, count in (("train", 200), ("held-out", None)):
        part = choose(records, split, count, seed=0)
        name = "trained" if split == "train" else split
        for language in records[0]["names"]:
            found, images = retrieval(pipeline, data, part, settings, language=language)
            top = " ".join(f"{key} {value:.3f}" for key, value in found.items())
            lines.append(f"{name} {language} {top} (n={len(part)})")
            if language in ("en", "zh") and (split == "train" or language == "en"):
                with atomic_path(docs / f"{name}-{language}.png") as temporary:
                    sheet_of(images[:60], columns=12).save(temporary, "PNG")
        lines.append(f"{name} PSNR {reconstruction_psnr(pipeline, data, part):.1f} dB")
        if composed:
            lines += compositional_scores(pipeline, data, split)
    return lines


def compositional_scores(pipeline: Pipeline, data: Path, split: str) -> list[str]:
    """50 compositions of each kind; a sheet shows ten trained ones of each but the single ones."""
    lines, shown = [], []
    chosen = choose_compositions(data, split, 50, seed=0)
    sizes = parse_sizes(pipeline.card[checkpoints.SIZES])
    for kind, names in SCORES.items():
        part = [composition for composition in chosen if composition.kind == kind]
        found, images = compositional(pipeline, data, part, pipeline.config.generation, sizes=sizes)
        shares = [f"{name} {sum(s[name] for s in found) / len(found):.2f}" for name in names]
        name = "trained" if split == "train" else split
        lines.append(f"{name} {kind}: {' '.join(shares)} (n={len(part)})")
        if kind != "single":
            shown += images[:10]
    if split == "train":
        with atomic_path(ROOT / "docs" / "composed.png") as temporary:
            sheet_of(shown, columns=10).save(temporary, "PNG")
    return lines


def draw_largest() -> None:
    pipeline = load()
    width, height = LARGEST
    settings = replace(pipeline.config.generation, width=width, height=height)
    images = [pipeline.generate(text, settings=settings).images[0].movedim(-1, 0) for text in PAIRS]
    with atomic_path(ROOT / "docs" / "largest.png") as temporary:
        sheet_of(torch.stack(images), columns=4).save(temporary, "PNG")


def write_subjects(records: list[dict]) -> None:
    subjects = list(dict.fromkeys(record["subject"] for record in records))
    text = HELP.read_text(encoding="utf-8").partition(MARKER)[0].rstrip()
    with atomic_path(HELP) as temporary:
        temporary.write_text(f"{text}\n\n{MARKER}\n\n{', '.join(subjects)}.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
