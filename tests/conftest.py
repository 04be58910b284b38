"""A tiny checkpoint with random weights, and a tiny data set made from hand-written sources."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tokenshuffle_core import checkpoint
from tokenshuffle_core.config import PRESETS
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.model import TokenShuffleModel
from tokenshuffle_core.pipeline import Pipeline
from tokenshuffle_core.text_tokenizer import TextTokenizer
from tokenshuffle_core.training import emoji

SUBJECTS = {
    "1F34E": ("red apple", "红苹果"),
    "1F436": ("dog face", "狗脸"),
    "2B50": ("star", "星星"),
}
OTHER_LANGUAGES = {
    "ja": ("赤リンゴ", "イヌの顔", "スター"),
    "ko": ("빨간 사과", "강아지 얼굴", "별"),
    "de": ("roter Apfel", "Hundegesicht", "Stern"),
    "fr": ("pomme rouge", "tête de chien", "étoile"),
    "es": ("manzana roja", "cara de perro", "estrella"),
    "pt": ("maçã vermelha", "rosto de cachorro", "estrela"),
    "it": ("mela rossa", "muso di cane", "stella"),
    "ru": ("красное яблоко", "морда собаки", "звезда"),
}


def random_checkpoint() -> checkpoint.Checkpoint:
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    model = TokenShuffleModel(config.model)
    model.initialise()
    for parameter in model.parameters():  # logits that differ enough to matter
        parameter.data *= 2
    text = TextTokenizer.train(["a red apple"], 512, config.model.max_grid)
    card = {"modelspec.title": "tiny", "modelspec.resolution": "32x32"}
    return checkpoint.Checkpoint(config, model, ImageTokenizer(config.image_tokenizer), text, card)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    checkpoint.save(path, random_checkpoint())
    return path


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    parts = vars(random_checkpoint())
    parts["model"].eval()
    return Pipeline(**parts)


@pytest.fixture(scope="session")
def elastic(pipeline) -> Pipeline:
    """Windows 1, 2 and 4, the codes of each one after another."""
    config = replace(
        pipeline.config, model=replace(pipeline.config.model, windows=(2, 1, 4), window_head=16)
    )
    torch.manual_seed(1)
    model = TokenShuffleModel(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return Pipeline(**{**vars(pipeline), "config": config, "model": model.eval()})


def write_sources(directory: Path) -> None:
    """What `npm pack` would leave in DIR/sources: three subjects in three styles."""
    names = directory / "sources" / "emojibase-data"
    english, chinese = zip(*SUBJECTS.values(), strict=True)
    for language, labels in {"en": english, "zh": chinese, **OTHER_LANGUAGES}.items():
        (names / language).mkdir(parents=True)
        entries = [
            {"hexcode": code, "label": label, "tags": ["common", f"tag{code}"], "group": 3}
            for code, label in zip(SUBJECTS, labels, strict=True)
        ]
        (names / language / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    for package, colour in (("fluent-emoji-flat", "#ff0000"), ("noto", "#0000ff")):
        folder = directory / "sources" / f"@iconify-json+{package}"
        folder.mkdir(parents=True)
        body = f'<circle cx="16" cy="16" r="10" fill="{colour}"/>'
        icons = {f"icon-{code}": {"body": body} for code in SUBJECTS}
        icons["icon-2B50"] |= {"width": 32, "height": 64}
        (folder / "icons.json").write_text(
            json.dumps({"icons": icons, "width": 32, "height": 32}), encoding="utf-8"
        )
        chars = {code.lower(): f"icon-{code}" for code in SUBJECTS}
        (folder / "chars.json").write_text(json.dumps(chars), encoding="utf-8")
    assets = directory / "sources" / "@lobehub+fluent-emoji-3d" / "assets"
    assets.mkdir(parents=True)
    for i, code in enumerate(SUBJECTS):
        picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        picture.paste((40 * i, 255, 0, 255), (16, 16, 48, 48))
        picture.save(assets / f"{code.lower()}.webp", lossless=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A built data set of nine 32 px pictures, one of them held out."""
    directory = tmp_path_factory.mktemp("data")
    write_sources(directory)
    subjects = directory / "subjects.txt"
    subjects.write_text("".join(f"{code} {names[0]}\n" for code, names in SUBJECTS.items()))
    emoji.build(directory, size=32, subjects=str(subjects), held_out=0.1)
    return directory
