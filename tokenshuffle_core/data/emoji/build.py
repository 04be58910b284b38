"""The emoji data set: text-image pairs under permissive licences, from packages of npm.

Subjects are matched across the packages by their code points. Pictures are RGBA cut-outs;
`compose` puts them on backgrounds.
"""

import json
import random
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ...files import atomic_path, write_text
from ..buckets import Size
from .phrases import PHRASES
from .pictures import read, stacked
from .recolour import tone_of

STYLES: dict[str, tuple[str, str, str, str]] = {  # package, version, licence, author
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Microsoft, Fluent Emoji"),
    "modern": ("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft, Fluent Emoji"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft, Fluent Emoji"),
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google, Noto Emoji"),
}
NAMES_PACKAGE = ("emojibase-data", "17.0.0", "MIT", "Miles Johnson; names from Unicode CLDR")
LANGUAGES = ("en", "zh", "ja", "ko", "de", "fr", "es", "pt", "it", "ru")
POPULAR = Path(__file__).with_name("subjects.txt")
# What people call a subject whose label in Unicode is stiff: "dog" for "dog face".
EVERYDAY = Path(__file__).with_name("everyday_names.tsv")
KEYWORDS = 3  # at most this many unambiguous keywords become additional names of a subject
# Each is another subject in one colour, or no longer itself in another one.
NAMED_BY_COLOUR = {"green apple", "blue heart", "green sick face"}
LEFT_OUT_GROUPS = {None, 1, 2, 8, 9}  # emojibase: letters, people, components, symbols, flags


def build(
    directory: str | Path,
    *,
    size: int = 128,
    subjects: str = "popular",
    styles: tuple[str, ...] = ("3d", "flat", "noto"),
    languages: tuple[str, ...] = LANGUAGES,
    held_out: float = 0.05,
    seed: int = 0,
    workers: int = 2,
) -> Path:
    """Build the data set in `directory` and return the path of its manifest.

    Pictures are `size` x `size` RGBA PNGs. `subjects` is "popular" (the curated list), "all", or a
    text file in the format of that list. Subjects are named in `languages`, which are keys of
    `phrases.PHRASES`. A share `held_out` of the subject-style pairs, at most one style of a
    subject, is marked as not for training. Files that are already in `directory` are kept, so an
    interrupted build continues. Raises ValueError for a bad setting or subjects file,
    FileNotFoundError where npm is needed and missing, RuntimeError where it fails.
    """
    if not 16 <= size <= 4096:
        raise ValueError(f"size must be from 16 to 4096 pixels, not {size}")
    for name, values, known in (("style", styles, STYLES), ("language", languages, PHRASES)):
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"{name} {unknown[0]!r} is not one of {', '.join(known)}")
    if not styles or not 0 <= held_out < 1 / len(styles):
        raise ValueError(
            f"held_out must be at least 0 and below 1/{len(styles) or 1} (one style of every "
            f"subject), not {held_out}"
        )
    directory = Path(directory)
    sources = directory / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    # The package of "modern" has no code points, but that of "flat" has them for the same names.
    needed = (*styles, "flat") if "modern" in styles else styles
    for package, version, *_ in (NAMES_PACKAGE, *(STYLES[style] for style in needed)):
        _fetch(package, version, sources)
    pictures = {style: _pictures_of(style, sources) for style in styles}
    selected = _subjects(subjects, sources)
    for code in list(selected):
        if missing := [style for style in styles if code not in pictures[style]]:
            if subjects != "all":
                raise ValueError(f"subject {code} has no picture in the style {missing[0]}")
            del selected[code]
    names = {
        language: _names(selected, language, sources, subjects == "all") for language in languages
    }
    records, codes = [], {}
    for code in selected:
        subject = names["en"][code][0] if "en" in names else selected[code][0]
        file_name = f"{_slug(subject) or code}.png"
        if (other := codes.setdefault(file_name, code)) != code:
            raise ValueError(
                f"subjects {other} and {code} would both be saved as {file_name}: give them "
                "different first names"
            )
        for style in styles:
            package, version, licence, _ = STYLES[style]
            records.append(
                {
                    "image": f"images/{style}/{file_name}",
                    "subject": subject,
                    "style": style,
                    "codepoints": code,
                    "split": "train",
                    "names": {language: names[language][code] for language in languages},
                    "licence": licence,
                    "source": f"{package} {version}",
                }
            )
    _hold_out(records, held_out, seed)
    jobs = [
        (directory / record["image"], (size, size), pictures[record["style"]][record["codepoints"]])
        for record in records
    ]
    render_all(_draw, jobs, workers, "rendering")
    for record in records:
        tone = None
        if record["subject"] not in NAMED_BY_COLOUR:
            tone = tone_of(stacked([read(directory, record)])[0])
        record["tone"] = tone and list(tone)
    _write_documents(directory, size, styles, languages, records)
    return write_lines(directory / "manifest.jsonl", records)


def render_all(draw: Callable, jobs: list[tuple], workers: int, doing: str) -> None:
    """Save the picture draw(size, ...) for each job (path, size, ...), in several processes, unless
    `path` already has a picture of `size` (width, height)."""
    missing = [job for job in jobs if not _is_rendered(*job[:2])]
    for folder in {path.parent for path, *_ in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    # A forked process that inherits torch's threads waits for them for ever, so it has one.
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = pool.map(partial(_save, draw), missing, chunksize=16)
        for _ in tqdm(done, total=len(missing), desc=doing, unit="picture", disable=None):
            pass


def _is_rendered(path: Path, size: Size) -> bool:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.size == size
    except OSError:  # there is none, or something else
        return False


def _save(draw: Callable, job: tuple) -> None:
    path, *arguments = job
    with atomic_path(path) as temporary:
        draw(*arguments).save(temporary, "PNG")


def write_lines(path: Path, records: list[dict]) -> Path:
    """Write records as JSON lines; returns the path."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def read_manifest(directory: str | Path) -> list[dict]:
    """The records of the manifest. Raises FileNotFoundError where there is none."""
    path = Path(directory) / "manifest.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: build it with `tokenshuffle data emoji {directory}`"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _fetch(package: str, version: str, sources: Path) -> None:
    """Download and unpack one package with `npm pack`, unless `sources` has it."""
    target = _source(package, sources)
    if target.is_dir():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is needed to download {package}: install Node.js, which includes it, and run "
            "the command again"
        )
    with tempfile.TemporaryDirectory(dir=sources) as folder:
        command = [npm, "pack", f"{package}@{version}", "--pack-destination", folder]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["it gave no reason"])[0]
            raise RuntimeError(f"npm could not download {package}@{version}: {reason}")
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        Path(folder, "package").rename(target)


def _source(package: str, sources: Path) -> Path:
    return sources / package.replace("/", "+")


def _key(code: str) -> str:
    """Code points in a form common to all packages: lower case, no variation selectors."""
    return code.lower().replace("-fe0f", "")


def _pictures_of(style: str, sources: Path) -> dict[str, Path | str]:
    """Code points -> a WebP file, or the text of an SVG."""
    folder = _source(STYLES[style][0], sources)
    if style == "3d":
        return {_key(path.stem): path for path in sorted((folder / "assets").glob("*.webp"))}
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    folder = _source(STYLES["flat" if style == "modern" else style][0], sources)
    names = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    pictures = {}
    for code, name in names.items():
        if icon := icons["icons"].get(name):
            width, height = (icon.get(s, icons.get(s, 16)) for s in ("width", "height"))
            side = max(width, height)  # of a square with the icon in its middle
            box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
            pictures[_key(code)] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink='
                f'"http://www.w3.org/1999/xlink" viewBox="{box}">{icon["body"]}</svg>'
            )
    return pictures


def _subjects(subjects: str, sources: Path) -> dict[str, list[str]]:
    """Code points -> English names, of the subjects in a list."""
    if subjects == "all":
        return {
            _key(entry["hexcode"]): [entry["label"].lower()]
            for entry in _entries("en", sources)
            if entry.get("group") not in LEFT_OUT_GROUPS
        }
    path = POPULAR if subjects == "popular" else Path(subjects)
    if not path.is_file():
        raise ValueError(f'subjects must be "popular", "all" or a text file, not {subjects}')
    selected = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        code, _, names = line.strip().partition(" ")
        if not names or not all(c in "0123456789abcdef-" for c in code.lower()):
            raise ValueError(
                f"{path}, line {number}: expected code points and a name such as "
                f'"1F34E red apple", not {line!r}'
            )
        selected[_key(code)] = [name.strip().lower() for name in names.split(",")]
    if not selected:
        raise ValueError(f'{path} names no subject: expected lines such as "1F34E red apple"')
    return selected


def _entries(language: str, sources: Path) -> list[dict]:
    path = _source(NAMES_PACKAGE[0], sources) / language / "data.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _names(
    selected: dict[str, list[str]], language: str, sources: Path, label_first: bool
) -> dict[str, list[str]]:
    """Code points -> names of the subject, the best one first.

    The names in the list, the label, then, where no list names all subjects, keywords that no other
    selected subject has. What a list calls one subject is no keyword of another, and no keyword is
    a colour. The last English name is the emoji itself.
    """
    entries = {_key(e["hexcode"]): e for e in _entries(language, sources)}
    if missing := [code for code in selected if code not in entries]:
        raise ValueError(f"subject {missing[0]} has no name in the language {language!r}")
    label_of = {
        code: unicodedata.normalize("NFC", entries[code]["label"]).lower() for code in selected
    }
    taken = set(label_of.values())  # "cat face" may not be called "cat" if there is a cat
    by_hand: dict[str, list[str]] = {}
    if not label_first:
        by_hand = selected if language == "en" else _everyday(language)
    listed = {name for code in selected for name in by_hand.get(code, ())}
    coloured = {form for forms in PHRASES[language].adjectives.values() for form in forms}
    labels, tags = {}, {}
    for code, label in label_of.items():
        names = list(by_hand.get(code, ()))
        if language != "en":
            names = [name for name in names if name == label or name not in taken]
        if language == "zh" and label[1:] and label[-1] in "脸头" and label[:-1] not in taken:
            names.append(label[:-1])
        labels[code] = list(dict.fromkeys([*names, label]))
        keywords = [tag.lower() for tag in dict.fromkeys(entries[code].get("tags", ()))]
        # A single letter, such as the T of a T-Rex, names nothing.
        keywords = [tag for tag in keywords if len(tag) > 1 or not tag.isascii()]
        known = {*labels[code], *listed, *coloured}
        tags[code] = [tag for tag in keywords if tag not in known]
        if language == "en" and not label_first:
            tags[code] = []
    uses = Counter(name for code in selected for name in (*labels[code], *tags[code]))
    names = {}
    for code, (first, *others) in labels.items():
        keywords = [tag for tag in tags[code] if uses[tag] == 1][:KEYWORDS]
        names[code] = [first, *(name for name in others if uses[name] == 1), *keywords]
        if language == "en":
            names[code].append("".join(chr(int(point, 16)) for point in code.split("-")))
    return names


@cache
def _everyday(language: str) -> dict[str, list[str]]:
    """Code points -> names, of some subjects in a language other than English."""
    header, *lines = EVERYDAY.read_text(encoding="utf-8").splitlines()
    if language not in header.split("\t"):
        return {}
    column = header.split("\t").index(language)
    rows = [line.split("\t") for line in lines]
    return {_key(row[0]): row[column].split(", ") for row in rows}


def _hold_out(records: list[dict], share: float, seed: int) -> None:
    """Mark `share` of the records as held out, at most one style of a subject."""
    rng = random.Random(seed)
    # The README's first prompt is a red apple in no style, so the model has to know all its styles.
    candidates = sorted({record["codepoints"] for record in records} - {"1f34e"})
    rng.shuffle(candidates)
    for code in candidates[: round(share * len(records))]:
        rng.choice([r for r in records if r["codepoints"] == code])["split"] = "held-out"


def _draw(size: Size, source: Path | str) -> Image.Image:
    """A WebP file, or the text of an SVG, as an RGBA picture."""
    if isinstance(source, Path):
        with Image.open(source) as image:
            return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=source, width=size[0], height=size[1]))
    return Image.open(BytesIO(png)).convert("RGBA")


def _slug(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return "-".join("".join(c if c.isalnum() else " " for c in plain).split())


def _write_documents(directory, size, styles, languages, records) -> None:
    packages = [NAMES_PACKAGE, *(STYLES[style] for style in styles)]
    keys = ("package", "version", "licence", "by")
    summary = {
        "name": "emoji",
        "size": size,
        "styles": list(styles),
        "languages": list(languages),
        "subjects": len({record["codepoints"] for record in records}),
        "pictures": len(records),
        "held_out": sum(record["split"] == "held-out" for record in records),
        "sources": [dict(zip(keys, package, strict=True)) for package in packages],
    }
    write_text(directory / "dataset.json", json.dumps(summary, indent=2) + "\n")
    rows = [f"| {name} {version} | {licence} | {by} |" for name, version, licence, by in packages]
    text = "\n".join(["# Licences", "", "| package | licence | by |", "| --- | --- | --- |", *rows])
    write_text(directory / "LICENSES.md", text + "\n")
