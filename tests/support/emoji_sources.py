"""A tiny stand-in for the packages that the emoji data set is built from."""

import json
from pathlib import Path

from PIL import Image

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
