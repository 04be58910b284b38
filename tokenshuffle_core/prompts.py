"""Files of prompts: one a line, as JSON with settings or as plain text."""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from .bulk import Job
from .config import GenerationConfig
from .files import check_name, json_lines, text_lines
from .images import PICTURES, check_fits
from .pipeline import Pipeline, check_seed

SETTINGS = [field.name for field in fields(GenerationConfig)]
KEYS = {"prompt": str, "negative": str, "seed": int, "file": str}
EXPECTED = 'a JSON object such as {"prompt": "a red apple"}'


def read_prompts(
    pipeline: Pipeline, path: Path, output: Path, settings: GenerationConfig, seed: int = 0
) -> list[Job]:
    """The jobs in a file of JSON lines, or in a .txt file with one prompt a line. A line of JSON
    has a "prompt", and may have "negative", "seed", "file" and fields of `GenerationConfig`, which
    replace those of `settings`.

    Line i, from 0, is drawn with seed + i and becomes `OUTPUT/0000i.png` unless it says otherwise;
    blank lines are left out. Raises FileNotFoundError, or ValueError that names the line, also if
    the model cannot draw it.
    """
    jobs: dict[str, Job] = {}
    for i, entry in _entries(path):
        where = f"{path}, line {i + 1}"
        try:
            job = _job(pipeline, entry, i, output, settings, seed)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None
        # What is one name on a file system that knows no capitals, or only composed letters.
        name = unicodedata.normalize("NFC", job.path.name.casefold())
        if name in jobs:
            other = jobs[name].path.name
            same = other == job.path.name
            reason = "" if same else f", which is the same as {other} on some systems"
            raise ValueError(f"{where}: {job.path.name} is the file of another line{reason}")
        jobs[name] = job
    if not jobs:
        raise ValueError(f"{path} has no prompts")
    return list(jobs.values())


def _entries(path: Path) -> Iterator[tuple[int, dict]]:
    if path.suffix.lower() != ".txt":
        yield from json_lines(path, EXPECTED)
        return
    for i, line in text_lines(path):
        if line.startswith('{"'):
            raise ValueError(f"{path}, line {i + 1} is JSON: a file of JSON lines ends in .jsonl")
        yield i, {"prompt": line}


def _job(
    pipeline: Pipeline, entry: dict, i: int, output: Path, settings: GenerationConfig, seed: int
) -> Job:
    if "prompt" not in entry:
        raise ValueError(f"expected {EXPECTED}")
    keys = [*KEYS, *SETTINGS]
    if unknown := [key for key in entry if key not in keys]:
        raise ValueError(f"there is no key {unknown[0]!r}, only {', '.join(keys)}")
    for key, kind in KEYS.items():
        if key in entry and type(entry[key]) is not kind:
            raise ValueError(
                f"{key} must be {'text' if kind is str else 'a whole number'}, not {entry[key]!r}"
            )
    changes = {key: entry[key] for key in SETTINGS if key in entry}
    for key, value in changes.items():
        if isinstance(value, bool) and key != "any_size":  # which Python takes for 0 or 1
            raise ValueError(f"{key} must be a number, not {json.dumps(value)}")
    name = entry.get("file", f"{i:05}.png")
    check_name(name)
    if Path(name).suffix.lower() not in PICTURES:
        raise ValueError(f"file must be a name that ends in {' or '.join(PICTURES)}, not {name!r}")
    job = Job(
        prompt=entry["prompt"],
        seed=entry.get("seed", seed + i),
        path=output / name,
        settings=replace(settings, **changes),
        negative=entry.get("negative", ""),
    )
    check_seed(job.seed)
    pipeline.grid(job.settings)
    check_fits(job.path, job.about)
    pipeline.encode_prompt(job.prompt)
    pipeline.encode_prompt(job.negative, negative=True)
    return job
