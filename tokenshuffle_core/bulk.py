"""Pictures for many prompts: in batches, on one process or many, each picture once."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from .config import GenerationConfig
from .files import sha256, write_text
from .images import write_png
from .pipeline import Pipeline, check_seed

RUN = "run.json"  # in the output folder: the model and settings of its pictures
SETTINGS = [field.name for field in fields(GenerationConfig)]
KEYS = {"prompt": str, "negative": str, "seed": int, "file": str}


@dataclass(frozen=True)
class Run:
    """How pictures are drawn; `model` identifies the weights, in JSON's types.

    Process `rank` of `world` draws its own share of the prompts.
    """

    model: dict
    settings: GenerationConfig
    seed: int = 0
    batch: int = 16
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    prompt: str
    seed: int
    path: Path
    settings: GenerationConfig
    negative: str = ""


@dataclass
class Summary:
    """What one process did: pictures drawn, existing pictures kept, and prompts cut to the length
    that the model reads."""

    drawn: int = 0
    kept: int = 0
    cut: int = 0


def read_prompts(
    pipeline: Pipeline, path: Path, output: Path, settings: GenerationConfig, seed: int = 0
) -> list[Job]:
    """The jobs in a file of JSON lines. Each line has a "prompt", and may have "negative", "seed",
    "file" and fields of `GenerationConfig`, which replace those of `settings`.

    Line i, from 0, is drawn with seed + i and becomes `OUTPUT/0000i.png` unless it says otherwise.
    Raises FileNotFoundError, or ValueError that names the line, also if the model cannot draw it.
    """
    jobs: dict[Path, Job] = {}
    # Not splitlines, which also splits at characters that a JSON string may contain.
    for i, line in enumerate(read_text(path).removesuffix("\n").split("\n")):
        if not line.strip():
            raise ValueError(f"{path}, line {i + 1} is empty")
        try:
            job = _job(pipeline, json.loads(line), i, output, settings, seed)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {i + 1}: {error}") from None
        if job.path in jobs:
            raise ValueError(f"{path}, line {i + 1}: {job.path.name} is the file of another line")
        jobs[job.path] = job
    return list(jobs.values())


def read_text(path: Path) -> str:
    """Raises FileNotFoundError, or ValueError for text that is not in UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None


def _job(
    pipeline: Pipeline, entry, i: int, output: Path, settings: GenerationConfig, seed: int
) -> Job:
    if not isinstance(entry, dict) or "prompt" not in entry:
        raise ValueError('expected a JSON object such as {"prompt": "a red apple"}')
    keys = [*KEYS, *SETTINGS]
    if unknown := [key for key in entry if key not in keys]:
        raise ValueError(f"there is no key {unknown[0]!r}, only {', '.join(keys)}")
    for key, kind in KEYS.items():
        if key in entry and type(entry[key]) is not kind:
            raise ValueError(
                f"{key} must be {'text' if kind is str else 'a whole number'}, not {entry[key]!r}"
            )
    name = entry.get("file", f"{i:05}.png")
    if name != Path(name).name or Path(name).suffix != ".png":
        raise ValueError(f"file must be a name that ends in .png, not {name!r}")
    changes = {key: entry[key] for key in SETTINGS if key in entry}
    job = Job(
        prompt=entry["prompt"],
        seed=entry.get("seed", seed + i),
        path=output / name,
        settings=replace(settings, **changes),
        negative=entry.get("negative", ""),
    )
    check_seed(job.seed)
    pipeline.grid(job.settings)
    for text in (job.prompt, job.negative):
        pipeline.encode_prompt(text)
    return job


def claim(output: Path, run: Run, prompts: list, **more: int) -> None:
    """Record in the folder how its pictures are drawn, or check that an earlier run did the same.

    `prompts` and `more`, anything else that the pictures depend on, are of JSON's types. Raises
    ValueError if the folder belongs to a different run.
    """
    settings = asdict(run.settings)
    del settings["any_size"]  # which changes no picture
    record = {
        "model": run.model,
        "prompts": sha256([json.dumps(prompts).encode()]),
        "seed": run.seed,
        **more,
        "settings": settings,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / RUN
    text = json.dumps(record, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise ValueError(
            f"{output} holds pictures of other prompts, another model, seed or setting: choose "
            f"another folder ({path.name} says which they are)"
        )
    write_text(path, text)


def share(items: Sequence, rank: int, world: int) -> Sequence:
    """The consecutive `items` of process `rank` of `world`; every item belongs to one process."""
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def draw(pipeline: Pipeline, jobs: list[Job], batch: int = 16, *, cut: bool = False) -> Summary:
    """Draw the jobs whose pictures do not exist yet, up to `batch` of them at once.

    Raises ValueError for a prompt that is longer than the model reads, unless it may be `cut`, and
    for settings that do not fit the model.
    """
    summary = Summary()
    longest = pipeline.config.model.max_prompt
    # The jobs of a batch have the same settings and the same negative prompt.
    alike: dict[tuple[GenerationConfig, str], list[tuple[Job, list[int]]]] = {}
    for job in jobs:
        encode = pipeline.text_tokenizer.encode if cut else pipeline.encode_prompt
        ids = encode(job.prompt)
        summary.cut += len(ids) > longest
        if job.path.exists():
            summary.kept += 1
        else:
            alike.setdefault((job.settings, job.negative), []).append((job, ids[:longest]))
    total = sum(map(len, alike.values()))
    with tqdm(total=total, desc="drawing", unit="picture", disable=None) as bar:
        for (settings, negative), todo in alike.items():
            prompts, seeds = [ids for _, ids in todo], [job.seed for job, _ in todo]
            negative_ids = pipeline.encode_prompt(negative)
            images = pictures(pipeline, prompts, seeds, settings, negative_ids, batch)
            for (job, _), image in zip(todo, images, strict=True):
                texts = {"prompt": job.prompt, "negative": negative}
                write_png(job.path, image, **texts, seed=job.seed, **asdict(settings))
                summary.drawn += 1
                bar.update()
    return summary


def pictures(
    pipeline: Pipeline,
    prompts: list[list[int]],
    seeds: list[int],
    settings: GenerationConfig,
    negative: Sequence[int] = (),
    batch: int = 16,
) -> Iterator[Tensor]:
    """A picture float32 (H, W, 3) in 0..1 for each prompt, in order. `prompts` and `negative` are
    text ids; up to `batch` pictures are sampled at once."""
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        part_seeds = seeds[start : start + batch]
        *_, last = pipeline.sample(part, list(negative), settings, part_seeds)
        for codes in last.codes:
            # One at a time: in a batch, convolutions may round differently.
            yield pipeline.decode(codes[None])[0]
