"""The emoji data set: text-image pairs under permissive licences, from packages of npm.

Subjects are matched across the sources by their code points. Pictures stay RGBA cut-outs; the
background is chosen at training time.
"""

import json
import random
import shutil
import subprocess
import tarfile
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ...files import atomic_path
from ..buckets import Size
from .phrases import PHRASES

STYLES: dict[str, tuple[str, str, str, str]] = {  # package, version, licence, made by
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Microsoft, Fluent Emoji"),
    "modern": ("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft, Fluent Emoji"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft, Fluent Emoji"),
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google, Noto Emoji"),
}
NAMES_PACKAGE = ("emojibase-data", "17.0.0", "MIT", "Miles Johnson; names from Unicode CLDR")
LANGUAGES = ("en", "zh", "ja", "ko", "de", "fr", "es", "pt", "it", "ru")
POPULAR = Path(__file__).with_name("subjects.txt")
KEYWORDS = 3  # at most this many unambiguous keywords become further names of a subject
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

    Pictures are `size` x `size` RGBA PNGs. `subjects` is "popular" (the curated list), "all", or
    a text file in that list's format. `languages` are those of `phrases.PHRASES` to name subjects
    in. A share `held_out` of the subject-style pairs is marked as never to be trained on, at most
    one style of a subject. What lies there already is kept, so an interrupted build continues.
    Raises ValueError for a bad setting or subjects file,
    FileNotFoundError where npm is needed and missing, RuntimeError where it fails.
    """
    if not 16 <= size <= 4096:
        raise ValueError(f"size must be from 16 to 4096 pixels, not {size}")
    if unknown := [style for style in styles if style not in STYLES]:
        raise ValueError(f"style {unknown[0]!r} is not one of {', '.join(STYLES)}")
    if unknown := [language for language in languages if language not in PHRASES]:
        raise ValueError(f"language {unknown[0]!r} is not one of {', '.join(PHRASES)}")
    if not styles or not 0 <= held_out < 1 / len(styles):
        raise ValueError(
            f"held_out must be at least 0 and below one in {len(styles) or 1} (the number of "
            f"styles), not {held_out}"
        )
    directory = Path(directory)
    sources = directory / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    # "modern" ships no code points of its own; "flat" has the same names, and their code points.
    needed = (*styles, "flat") if "modern" in styles else styles
    for package, version, *_ in (NAMES_PACKAGE, *(STYLES[style] for style in needed)):
        _fetch(package, version, sources)
    pictures = {style: _pictures_of(style, sources) for style in styles}
    chosen = _subjects(subjects, sources)
    for code in list(chosen):
        if missing := [style for style in styles if code not in pictures[style]]:
            if subjects != "all":
                raise ValueError(f"subject {code} has no picture in the style {missing[0]}")
            del chosen[code]
    names = {
        language: _names(chosen, language, sources, subjects == "all") for language in languages
    }
    records = []
    for code in chosen:
        subject = names["en"][code][0] if "en" in names else chosen[code][0]
        for style in styles:
            package, version, licence, _ = STYLES[style]
            records.append(
                {
                    "image": f"images/{style}/{_slug(subject) or code}.png",
                    "subject": subject,
                    "style": style,
                    "codepoints": code,
                    "split": "train",
                    "names": {language: names[language][code] for language in languages},
                    "licence": licence,
                    "source": f"{package} {version}",
                }
            )
    owners: dict[str, str] = {}
    for record in records:
        other = owners.setdefault(record["image"], record["codepoints"])
        if other != record["codepoints"]:
            raise ValueError(
                f"subjects {other} and {record['codepoints']} would both be saved as "
                f"{record['image']}: give each a first name of its own"
            )
    _hold_out(records, held_out, seed)
    _render(records, pictures, directory, size, workers)
    _write_documents(directory, size, styles, languages, records)
    with atomic_path(directory / "manifest.jsonl") as temporary:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        temporary.write_text("".join(lines), encoding="utf-8")
    return directory / "manifest.jsonl"


def read_manifest(directory: str | Path) -> list[dict]:
    """The manifest's records. Raises FileNotFoundError where there is none."""
    path = Path(directory) / "manifest.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: `tokenshuffle data emoji {directory}` builds the data set"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _fetch(package: str, version: str, sources: Path) -> None:
    """Download and unpack one package with `npm pack`, unless it lies there already."""
    target = _source(package, sources)
    if target.is_dir():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is needed to download {package}: install Node.js (its package brings npm) and "
            "run the command again"
        )
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    result = subprocess.run(
        [npm, "pack", f"{package}@{version}", "--pack-destination", str(partial)],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[0]
        raise RuntimeError(f"npm could not download {package}@{version}: {reason}")
    (archive,) = partial.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    archive.unlink()
    (partial / "package").rename(target)
    partial.rmdir()


def _source(package: str, sources: Path) -> Path:
    return sources / package.replace("/", "+")


def _key(code: str) -> str:
    """Code points as the sources agree on them: lower case, without variation selectors."""
    return code.lower().replace("-fe0f", "")


def _pictures_of(style: str, sources: Path) -> dict[str, Path | str]:
    """Code points -> a WebP file, or the text of an SVG."""
    folder = _source(STYLES[style][0], sources)
    if style == "3d":
        return {_key(path.stem): path for path in sorted((folder / "assets").glob("*.webp"))}
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    named_by = _source(STYLES["flat" if style == "modern" else style][0], sources)
    names = json.loads((named_by / "chars.json").read_text(encoding="utf-8"))
    pictures = {}
    for code, name in names.items():
        icon = icons["icons"].get(name)
        if icon:
            width = icon.get("width", icons.get("width", 16))
            height = icon.get("height", icons.get("height", 16))
            side = max(width, height)  # a square that the icon lies in the middle of
            box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
            pictures[_key(code)] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink='
                f'"http://www.w3.org/1999/xlink" viewBox="{box}">{icon["body"]}</svg>'
            )
    return pictures


def _subjects(subjects: str, sources: Path) -> dict[str, list[str]]:
    """Code points -> English names, from the list asked for."""
    if subjects == "all":
        return {
            _key(entry["hexcode"]): [entry["label"].lower()]
            for entry in _entries("en", sources)
            if entry.get("group") not in LEFT_OUT_GROUPS
        }
    path = POPULAR if subjects == "popular" else Path(subjects)
    if not path.is_file():
        raise ValueError(f'subjects must be "popular", "all" or a text file, not {subjects}')
    chosen = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        code, _, names = line.strip().partition(" ")
        if not names or not all(c in "0123456789abcdef-" for c in code.lower()):
            raise ValueError(
                f"{path}, line {number}: expected a hexcode and a name such as "
                f'"1F34E red apple", not {line!r}'
            )
        chosen[_key(code)] = [name.strip().lower() for name in names.split(",")]
    if not chosen:
        raise ValueError(f'{path} names no subject: expected lines such as "1F34E red apple"')
    return chosen


def _entries(language: str, sources: Path) -> list[dict]:
    path = _source(NAMES_PACKAGE[0], sources) / language / "data.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _names(
    chosen: dict[str, list[str]], language: str, sources: Path, label_first: bool
) -> dict[str, list[str]]:
    """Code points -> what the subject is called, best name first.

    The list's own names, the label, then keywords that no other chosen subject shares.
    """
    entries = {_key(e["hexcode"]): e for e in _entries(language, sources)}
    if missing := [code for code in chosen if code not in entries]:
        raise ValueError(f"subject {missing[0]} has no name in the language {language!r}")
    label_of = {
        code: unicodedata.normalize("NFC", entries[code]["label"]).lower() for code in chosen
    }
    taken = set(label_of.values())  # "cat face" may not be called "cat" beside a cat
    labels = {}
    for code, label in label_of.items():
        own = list(chosen[code]) if language == "en" and not label_first else []
        short = [label[:-1]] if language == "zh" and len(label) > 1 and label[-1] in "脸头" else []
        short = [name for name in short if name not in taken]
        labels[code] = list(dict.fromkeys([*own, *short, label]))
    uses = Counter(name for all_names in labels.values() for name in all_names)
    uses.update(
        tag.lower() for code in chosen for tag in set(entries[code].get("tags", ()))
        if tag.lower() not in labels[code]
    )  # fmt: skip
    names = {}
    for code in chosen:
        tags = [tag.lower() for tag in entries[code].get("tags", ())]
        unambiguous = [tag for tag in tags if uses[tag] == 1 and tag not in labels[code]]
        names[code] = labels[code][:1] + [
            name for name in [*labels[code][1:], *unambiguous[:KEYWORDS]] if uses[name] == 1
        ]
    return names


def _hold_out(records: list[dict], share: float, seed: int) -> None:
    """Mark `share` of the records as held out, at most one style of a subject."""
    by_subject: dict[str, list[dict]] = {}
    for record in records:
        by_subject.setdefault(record["codepoints"], []).append(record)
    rng = random.Random(seed)
    # The README's first command asks for a red apple in no style: it has to know them all.
    candidates = sorted(code for code in by_subject if code != "1f34e")
    rng.shuffle(candidates)
    for code in candidates[: round(share * len(records))]:
        rng.choice(by_subject[code])["split"] = "held-out"


def _render(records: list[dict], pictures: dict, directory: Path, size: int, workers: int) -> None:
    jobs = []
    for record in records:
        target = directory / record["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not is_rendered(target, (size, size)):
            jobs.append((pictures[record["style"]][record["codepoints"]], target, size))
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(_render_one, *zip(*jobs, strict=True), chunksize=8) if jobs else ()
        for _ in tqdm(done, total=len(jobs), desc="rendering", unit="picture", disable=None):
            pass


def is_rendered(path: Path, size: Size) -> bool:
    """Whether a picture of `size` (width, height) lies there already."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.size == size


def _render_one(source: Path | str, target: Path, size: int) -> None:
    if isinstance(source, Path):
        with Image.open(source) as image:
            picture = image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
            picture = picture.convert("RGBA")
    else:
        import resvg_py

        png = bytes(resvg_py.svg_to_bytes(svg_string=source, width=size, height=size))
        picture = Image.open(BytesIO(png)).convert("RGBA")
    with atomic_path(target) as temporary:
        picture.save(temporary, "PNG")


def _slug(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return "-".join("".join(c if c.isalnum() else " " for c in plain).split())


def _write_documents(directory, size, styles, languages, records) -> None:
    packages = [NAMES_PACKAGE, *(STYLES[style] for style in styles)]
    summary = {
        "name": "emoji",
        "size": size,
        "styles": list(styles),
        "languages": list(languages),
        "subjects": len({record["codepoints"] for record in records}),
        "pictures": len(records),
        "held_out": sum(record["split"] == "held-out" for record in records),
        "sources": [dict(zip(("package", "version", "licence", "by"), p)) for p in packages],  # noqa: B905
    }
    with atomic_path(directory / "dataset.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    rows = [f"| {name} {version} | {licence} | {by} |" for name, version, licence, by in packages]
    text = "\n".join(["# Licences", "", "| package | licence | by |", "| --- | --- | --- |", *rows])
    with atomic_path(directory / "LICENSES.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
