"""Pictures for many prompts: in batches, on one process or many, each picture once."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .config import GenerationConfig
from .files import remove_leftovers, sha256, target_of, write_text
from .images import read_about, write_picture
from .pipeline import Pipeline
from .transformer import KVCache

RUN = "run.json"  # in the output folder: the model and settings of its pictures
WORKING = 64 * 2**20  # bytes: more than noise, logits and activations of a picture take
MOST = 32  # pictures at once by default: with guidance, 64 rows, the most of the engine's kernels


@dataclass(frozen=True)
class Run:
    """How pictures are drawn; `model` identifies the weights, in JSON's types.

    Process `rank` of `world` draws its own share of the prompts.
    """

    model: dict
    settings: GenerationConfig
    seed: int = 0
    batch: int | None = None
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Job:
    """One picture to draw. `model` says what draws it, for the picture's file."""

    prompt: str
    seed: int
    path: Path
    settings: GenerationConfig
    negative: str = ""
    model: dict = field(default_factory=dict)

    @property
    def about(self) -> dict:
        """What the picture's file says of it."""
        texts = {"prompt": self.prompt, "negative": self.negative}
        return {**texts, "seed": self.seed, **asdict(self.settings), **self.model}


@dataclass
class Summary:
    """What one process did: pictures drawn, existing pictures kept, and prompts cut to the length
    that the model reads."""

    drawn: int = 0
    kept: int = 0
    cut: int = 0


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


def undrawn(jobs: Sequence[Job], overwrite: bool = False, ours: bool = True) -> list[Job]:
    """The jobs whose pictures are still to be drawn: all with `overwrite`, otherwise those that are
    not there, whole and drawn by the same request.

    A file that is no picture is drawn again, which standard error says, if it is empty or the
    folder is `ours` (see `claim`). Raises ValueError for any other file in the place of a picture,
    and as `target_of`.
    """
    missing, targets = [], [target_of(job.path) for job in jobs]
    for job, target in zip(jobs, targets, strict=True):
        if overwrite or not target.exists():
            missing.append(job)
            continue
        about = read_about(target)
        if about is None and (ours or not target.stat().st_size):
            print(f"note: {job.path} is not a whole picture: drawn again", file=sys.stderr)
            missing.append(job)
        elif about is None or _request(about) != _request(job.about):
            raise ValueError(
                f"{job.path} exists and was not drawn by this command: move it away, or choose "
                "another name"
            )
    remove_leftovers(targets)
    return missing


def _request(about: dict) -> dict:
    return {name: value for name, value in about.items() if name != "any_size"}


def draw(pipeline: Pipeline, jobs: Sequence[Job], batch: int | None = None) -> Summary:
    """Draw the jobs whose pictures do not exist yet (see `undrawn`), as `draw_all`; prompts may be
    cut to the length that the model reads."""
    todo = undrawn(jobs)
    summary = Summary(kept=len(jobs) - len(todo))
    for job in jobs:
        ids = pipeline.text_tokenizer.encode(job.prompt)
        summary.cut += len(ids) > pipeline.config.model.max_prompt
    for _ in draw_all(pipeline, todo, batch, cut=True):
        summary.drawn += 1
    return summary


def draw_all(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    batch: int | None = None,
    *,
    cut: bool = False,
    save_memory: bool = False,
) -> Iterator[tuple[Job, Tensor]]:
    """Draw and save pictures, `batch` at a time, by default as many as fit. Yields each job with
    its codes int64 (h, w), on the CPU, as soon as its picture is saved.

    Raises ValueError for a prompt that is longer than the model reads, unless it may be `cut`, and
    for settings that do not fit the model; OSError where a picture cannot be saved.
    """
    longest, tokenizer = pipeline.config.model.max_prompt, pipeline.text_tokenizer
    encode = tokenizer.encode if cut else pipeline.encode_prompt
    ids = {text: tokenizer.cut(encode(text), longest) for text in {job.prompt for job in jobs}}
    # The jobs of a batch have the same settings and the same negative prompt.
    alike: dict[tuple[GenerationConfig, str], list[Job]] = {}
    for job in jobs:
        alike.setdefault((job.settings, job.negative), []).append(job)
    negatives = {text: pipeline.encode_prompt(text, negative=True) for _, text in alike}
    steps = sum(prod(pipeline.grid(settings)) * len(part) for (settings, _), part in alike.items())
    with tqdm(total=steps, desc="drawing", unit="position", disable=None) as bar:
        done = 0
        for (settings, negative), part in alike.items():
            prompts, seeds = [ids[job.prompt] for job in part], [job.seed for job in part]
            drawn = sample(
                pipeline, prompts, seeds, settings, negatives[negative], batch, bar.update
            )
            for job, codes in zip(part, drawn, strict=True):
                write_picture(job.path, decoded(pipeline, codes, save_memory), **job.about)
                done += 1
                if len(jobs) > 1:
                    bar.set_postfix_str(f"{done} of {len(jobs)} pictures")
                yield job, codes.cpu()


def decoded(pipeline: Pipeline, codes: Tensor, save_memory: bool = False) -> Tensor:
    """Codes (h, w) -> picture float32 (H, W, 3) in 0..1. Alone: in a batch, convolutions may round
    differently."""
    return pipeline.decode(codes[None], save_memory)[0]


def pictures(
    pipeline: Pipeline,
    prompts: list[list[int]],
    seeds: list[int],
    settings: GenerationConfig,
    batch: int,
) -> Iterator[Tensor]:
    """A picture float32 (H, W, 3) in 0..1 for each prompt, in order. `prompts` are text ids; up to
    `batch` pictures are sampled at once."""
    for codes in sample(pipeline, prompts, seeds, settings, (), batch):
        yield decoded(pipeline, codes)


def sample(
    pipeline: Pipeline,
    prompts: list[list[int]],
    seeds: list[int],
    settings: GenerationConfig,
    negative: Sequence[int],
    batch: int | None,
    advance: Callable[[int], object] = lambda positions: None,
) -> Iterator[Tensor]:
    """Codes int64 (h, w) for each prompt, in order. `prompts` and `negative` are text ids. Without
    a `batch`, as many are sampled at once as fit into memory; calls `advance` with the number of
    positions that are finished.

    Raises ValueError if the pictures of a batch do not fit into memory.
    """
    at_once, start = batch or fitting(pipeline, settings), 0
    while start < len(prompts):
        part = slice(start, start + at_once)
        count, finished = len(prompts[part]), 0
        try:
            for last in pipeline.sample(prompts[part], list(negative), settings, seeds[part]):
                finished = count * last.position
                advance(count)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if batch or count == 1:
                what = f"{count} pictures at once: choose a smaller --batch"
                if count == 1:
                    what = f"a picture of {settings.width}x{settings.height}"
                raise ValueError(f"there is not enough memory to draw {what}") from None
            at_once = count // 2
            advance(-finished)
            continue
        yield from last.codes
        start += count


def _out_of_memory(error: Exception) -> bool:
    # Torch has a class for it on a GPU alone.
    known = "DefaultCPUAllocator", "bad_alloc", "MPS backend out of memory"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in known
    )


def fitting(pipeline: Pipeline, settings: GenerationConfig) -> int:
    """How many pictures to sample at once: they take at most half of the memory that is free."""
    model, weight = pipeline.config.model, pipeline.model.code_embedding.weight
    rows, columns = pipeline.grid(settings)
    positions = model.max_prompt + model.positions(rows, columns)
    with_guidance = 1 if settings.cfg == 1 else 2
    cache = KVCache.nbytes(model, with_guidance, positions, weight.dtype)
    return max(1, min(MOST, free_memory(weight.device) // 2 // (cache + WORKING)))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on `device`, or 4 GiB where the system does not
    say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [4 * 2**30]
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().split("MemAvailable:")
        found[0] = int(lines[1].split()[0]) * 1024
    with suppress(OSError, ValueError):  # of a container
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{x}").read_text()) for x in ("max", "current")
        )
        found.append(limit - used)
    with suppress(ImportError, OSError, ValueError):  # `ulimit -v`
        from resource import RLIM_INFINITY, RLIMIT_AS, getpagesize, getrlimit

        limit = getrlimit(RLIMIT_AS)[0]
        if limit != RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * getpagesize()
            found.append(limit - used)
    return min(found)
