"""Captions: what a picture may be called, in several languages, with or without its style."""

import random

STYLE_NAMES = {
    "3d": {"en": "3d", "zh": "3D"},
    "modern": {"en": "modern", "zh": "现代"},
    "flat": {"en": "flat", "zh": "扁平"},
    "noto": {"en": "noto", "zh": "Noto"},
}
BACKGROUND_NAMES = {
    "white": {"en": "white", "zh": "白色"},
    "black": {"en": "black", "zh": "黑色"},
    "grey": {"en": "grey", "zh": "灰色"},
    "red": {"en": "red", "zh": "红色"},
    "orange": {"en": "orange", "zh": "橙色"},
    "yellow": {"en": "yellow", "zh": "黄色"},
    "green": {"en": "green", "zh": "绿色"},
    "blue": {"en": "blue", "zh": "蓝色"},
    "purple": {"en": "purple", "zh": "紫色"},
    "pink": {"en": "pink", "zh": "粉色"},
}
UNSTYLED = 0.1  # the share of captions that name no style, so that such prompts work too
CHINESE = 0.25
KEYWORD = 0.2  # the share of captions that use another name than the first


def prompt(subject: str, style: str | None, background: str = "white", language: str = "en") -> str:
    """The canonical caption: "a red apple, 3d style, on a blue background"."""
    if language == "zh":
        parts = [subject]
        if style:
            parts.append(f"{STYLE_NAMES[style]['zh']}风格")
        if background != "white":
            parts.append(f"{BACKGROUND_NAMES[background]['zh']}背景")
        return "，".join(parts)
    article = "an" if subject[:1].lower() in "aeiou" else "a"
    parts = [f"{article} {subject}"]
    if style:
        parts.append(f"{STYLE_NAMES[style]['en']} style")
    if background != "white":
        parts.append(f"on a {BACKGROUND_NAMES[background]['en']} background")
    return ", ".join(parts)


def write(record: dict, background: str, rng: random.Random) -> str:
    """One caption for a manifest record, drawn from many ways to say it."""
    language = "zh" if "zh" in record["names"] and rng.random() < CHINESE else "en"
    names = record["names"][language]
    subject = rng.choice(names) if rng.random() < KEYWORD else names[0]
    style = None if rng.random() < UNSTYLED else record["style"]
    form = rng.random()
    if form < 0.6 or language == "zh":
        return prompt(subject, style, background, language)
    behind = "" if background == "white" else f" on {BACKGROUND_NAMES[background]['en']}"
    if form < 0.8 and style:
        return f"{STYLE_NAMES[style]['en']} {subject}{behind}"
    return f"{subject}{f', {style} style' if style else ''}{behind}"
