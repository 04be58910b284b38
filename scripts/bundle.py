"""Scores a trained checkpoint and writes it, with its model card, as the bundled model.

    python -m scripts.bundle RUN/final.safetensors DATA --cfg 4 --training "one sentence on compute"

DATA is a folder of `data emoji`, of whose compositions the model was trained on codes. The card's
scores are measured on the bundled file itself, which is stored in float16. Also writes the README's
picture sheets into docs/ and the list of subjects into the prompt node's help.
"""

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tokenshuffle_core.checkpoints import BUNDLED, SIZES, trained_sizes
from tokenshuffle_core.cli.options import settings_of
from tokenshuffle_core.data.emoji.build import read_manifest
from tokenshuffle_core.data.emoji.vocabulary import vocabulary_of
from tokenshuffle_core.evaluation.matching import References
from tokenshuffle_core.evaluation.prompt_groups import GROUPS, made
from tokenshuffle_core.evaluation.retrieval import choose, reconstruction_psnr, retrieval
from tokenshuffle_core.evaluation.understanding import (
    BY_HAND,
    SEEDS,
    diversity,
    draw,
    marked_sheet,
    read_prompts,
    score_all,
    shares,
)
from tokenshuffle_core.files import atomic_path, write_text
from tokenshuffle_core.images import sheet_of
from tokenshuffle_core.pipeline import load

ROOT = Path(__file__).resolve().parent.parent
HELP = ROOT / "web" / "docs" / "TokenShufflePrompt.md"
MARKER = "## Subjects of the bundled model"
SHEETS = {"canonical": "trained-en", "held-out": "held-out-en"}
LARGEST = 256, 128  # the largest of its training sizes
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
    pipeline = load(options.checkpoint)
    settings = settings_of(options, pipeline.config.generation)
    pipeline.config = replace(pipeline.config, generation=settings)
    sizes = pipeline.card[SIZES]
    subjects = ", ".join(dict.fromkeys(record["subject"] for record in records))
    pipeline.card = card_of(summary, options.training, sizes)
    pipeline.vocabulary = vocabulary_of(records)
    pipeline.save(BUNDLED, torch.float16)
    pipeline.card["tokenshuffle.scores"] = ", ".join(score(options.data, records))
    pipeline.save(BUNDLED, torch.float16)
    text = HELP.read_text(encoding="utf-8").partition(MARKER)[0].rstrip()
    write_text(HELP, f"{text}\n\n{MARKER}\n\n{subjects}.\n")
    pipeline = load()  # what was stored
    width, height = LARGEST
    settings = replace(pipeline.config.generation, width=width, height=height)
    images = [pipeline.generate(text, settings=settings).images[0].movedim(-1, 0) for text in PAIRS]
    save_sheet("largest", images, columns=4)
    print(pipeline.card["tokenshuffle.scores"])


def card_of(summary: dict, training: str, sizes: str) -> dict[str, str]:
    sources = "; ".join(
        f"{s['package']} {s['version']} ({s['licence']}, {s['by']})" for s in summary["sources"]
    )
    return {
        "modelspec.title": "Token-Shuffle Emoji 128",
        "modelspec.author": "the ComfyUI-TokenShuffle developers",
        "modelspec.license": "Apache-2.0; trained on pictures under MIT and Apache-2.0",
        "modelspec.date": datetime.date.today().isoformat(),
        "modelspec.resolution": f"{summary['size']}x{summary['size']}",
        "modelspec.description": (
            f"A small Token-Shuffle model that draws {summary['subjects']} subjects as emoji in "
            f"{len(summary['styles'])} styles, in ten colours, counted, small or big, or two "
            f"together, from prompts in {len(summary['languages'])} languages "
            f"({', '.join(summary['languages'])})."
        ),
        "modelspec.usage_hint": (
            f'"a SUBJECT, STYLE style" with a style of {", ".join(summary["styles"])}; "a COLOUR '
            'SUBJECT", "three SUBJECTS", "a SUBJECT left of a SUBJECT", "on a COLOUR background"; '
            "articles, capitals and a full stop do not matter"
        ),
        "tokenshuffle.data": (
            f"{summary['pictures']} pictures, {summary['held_out']} subject-style pairs held out; "
            f"{sources}"
        ),
        "tokenshuffle.training": training,
        SIZES: sizes,
        "tokenshuffle.limits": (
            "It has memorised its small data set and knows no other subject; it is still learning "
            "colours, backgrounds and several subjects, which come out rough, two different ones "
            "as blobs; it draws at the sizes listed; fine detail is blurred by the image tokenizer."
        ),
    }


def score(data: Path, records: list[dict]) -> list[str]:
    """The lines of the card's scores; also draws the pictures of `docs/`, of which none is picked.

    Each group of `eval understanding` with 200 prompts, the prompts by hand, retrieval from
    canonical English and Chinese prompts, and the image tokenizer alone.
    """
    pipeline = load()
    settings = pipeline.config.generation
    sizes = trained_sizes(pipeline.config, pipeline.card)
    references = References.read(data)
    lines, shown = [], []
    for group in GROUPS:
        prompts = made(records, references, group, 40 * SEEDS if group == "seeds" else 200, seed=0)
        images = draw(pipeline, prompts, settings, sizes=sizes)
        if group == "seeds":
            lines.append(f"distance between seeds {diversity(images).value:.3f}")
            continue
        scores = score_all(images, prompts, references)
        lines += [
            f"{name} {found.value:.3f} [{found.low:.2f}, {found.high:.2f}]"
            for name, found in shares(prompts, scores).items()
            if name in (group, "counts: count") or name.startswith("languages, ")
        ]
        if group in SHEETS:
            save_sheet(SHEETS[group], images[:60], columns=12)
        if group in ("counts", "pairs", "colours"):
            shown += list(zip(images[:12], prompts[:12], scores[:12], strict=True))
    save_marked("composed", *zip(*shown, strict=True))
    prompts = read_prompts(BY_HAND, references)
    images = draw(pipeline, prompts, settings, sizes=sizes)
    scores = score_all(images, prompts, references)
    save_marked("by-hand", images, prompts, scores)
    lines.append(f"by hand {sum(found['right'] for found in scores)} of {len(scores)}")
    for split, count, name in (("train", 200, "trained"), ("held-out", None, "held-out")):
        part = choose(records, split, count, seed=0)
        for language in ("en", "zh"):
            found, images = retrieval(pipeline, data, part, settings, language=language)
            top = sum(each["top-1"] for each in found) / len(found)
            lines.append(f"{name} {language} top-1 {top:.3f} (n={len(part)})")
            if (split, language) == ("train", "zh"):
                save_sheet("trained-zh", images[:60], columns=12)
        lines.append(f"{name} PSNR {reconstruction_psnr(pipeline, data, part):.1f} dB")
    return lines


def save_marked(name: str, *parts) -> None:
    """A sheet with prompts and marks, in few colours: it has many pixels."""
    with atomic_path(ROOT / "docs" / f"{name}.png") as temporary:
        marked_sheet(*parts).quantize(256).save(temporary, "PNG", optimize=True)


def save_sheet(name: str, images: list[Tensor], columns: int) -> None:
    with atomic_path(ROOT / "docs" / f"{name}.png") as temporary:
        sheet_of(images, columns).save(temporary, "PNG")


if __name__ == "__main__":
    main()
