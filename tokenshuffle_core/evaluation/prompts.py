"""Public prompt sets: draws their pictures in the layout that the official scorers read.

GenEval (arXiv 2310.11513) and GenAI-Bench (arXiv 2406.13743). This package contains neither their
prompts nor their pictures: the prompt files come from their authors.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from ..bulk import Job, Run, Summary, claim, draw, share
from ..files import json_lines, read_text, write_text
from ..pipeline import Pipeline
from .intervals import Estimate, mean

Scorer = Callable[[list[Path], list[str]], list[float]]


def read_geneval(path: Path) -> list[dict]:
    """The lines of GenEval's `evaluation_metadata.jsonl`. Raises FileNotFoundError, ValueError."""
    kinds = {"tag": str, "prompt": str}
    return _json_lines(path, kinds, "a JSON object with tag and prompt")


def read_genai_bench(path: Path) -> dict[str, str]:
    """Id -> prompt from GenAI-Bench's `genai_image.json`. Raises as `read_geneval`."""
    try:
        prompts = {name: entry["prompt"] for name, entry in json.loads(read_text(path)).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{path} is not a prompt file of GenAI-Bench: expected "
            '{"00000": {"prompt": ...}, ...}'
        ) from None
    for name in prompts:
        if name != Path(name).name or not isinstance(prompts[name], str):
            raise ValueError(f"{path}: {name!r} is not an id with a prompt")
    return prompts


def draw_geneval(
    pipeline: Pipeline, entries: list[dict], output: Path, run: Run, samples: int = 4
) -> Summary:
    """Write `OUTPUT/00000/metadata.jsonl` and `samples/0000.png`, ... for every entry.

    Sample k of entry i is drawn with seed + i * samples + k. Existing pictures are kept. Raises
    ValueError if they were drawn with other settings.
    """
    claim(output, run, [entry["prompt"] for entry in entries], samples=samples)
    jobs = []
    for i, entry in share(list(enumerate(entries)), run.rank, run.world):
        folder = output / f"{i:05}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_text(folder / "metadata.jsonl", json.dumps(entry) + "\n")
        for k in range(samples):
            path = folder / "samples" / f"{k:04}.png"
            seed = run.seed + i * samples + k
            jobs.append(Job(entry["prompt"], seed, path, run.settings))
    return draw(pipeline, jobs, run.batch)


def draw_genai_bench(
    pipeline: Pipeline, prompts: dict[str, str], output: Path, run: Run
) -> Summary:
    """Write `OUTPUT/ID.png` for every prompt; prompt i is drawn with seed + i. Otherwise as
    `draw_geneval`."""
    claim(output, run, list(prompts.values()))
    jobs = [
        Job(prompt, run.seed + i, output / f"{name}.png", run.settings)
        for i, (name, prompt) in enumerate(prompts.items())
    ]
    return draw(pipeline, share(jobs, run.rank, run.world), run.batch)


def geneval_scores(path: Path) -> dict[str, Estimate]:
    """Each task's score and the overall score from the official `results.jsonl`.

    The share of correct pictures, with the interval over prompts, because the pictures of a prompt
    are alike; overall is the mean over tasks. Raises FileNotFoundError, ValueError.
    """
    tasks: dict[str, dict[str, list[bool]]] = {}
    kinds = {"tag": str, "metadata": str, "correct": bool}
    expected = "tag, metadata and correct, as GenEval's evaluate_images.py writes them"
    for result in _json_lines(path, kinds, expected):
        prompts = tasks.setdefault(result["tag"], {})
        prompts.setdefault(result["metadata"], []).append(result["correct"])
    if not tasks:
        raise ValueError(f"{path} holds no results")
    estimates = {
        tag: mean([sum(correct) / len(correct) for correct in prompts.values()])
        for tag, prompts in tasks.items()
    }
    each = list(estimates.values())
    value = sum(e.value for e in each) / len(each)
    half = math.hypot(*(e.high - e.value for e in each)) / len(each)
    total = sum(e.n for e in each)
    return estimates | {"overall": Estimate(value, value - half, value + half, total)}


def score_genai_bench(
    prompts: dict[str, str], output: Path, scorer: Scorer, batch: int = 16
) -> dict[str, float]:
    """Id -> the scorer's value for each picture and its prompt.

    Raises FileNotFoundError if pictures are missing, ValueError for a result that is not a score.
    """
    paths = {name: output / f"{name}.png" for name in prompts}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} pictures are missing, the first is {missing[0]}: "
            "draw them all before scoring"
        )
    names = list(prompts)
    scores: dict[str, float] = {}
    for start in tqdm(range(0, len(names), batch), desc="scoring", disable=None):
        part = names[start : start + batch]
        results = scorer([paths[name] for name in part], [prompts[name] for name in part])
        values = [float(value) for value in results]
        if len(values) != len(part) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"the scorer returned {values} for {len(part)} pictures: expected as many numbers"
            )
        scores |= zip(part, values, strict=True)
    return scores


def skill_scores(scores: dict[str, float], skills: Path | None) -> dict[str, Estimate]:
    """The mean score of each skill, and of all prompts that have a skill.

    `skills` is GenAI-Bench's `genai_skills.json`, skill -> numbers of prompts; without it there is
    only the mean over all prompts. Raises FileNotFoundError, ValueError.
    """
    if skills is None:
        return {"all": mean(list(scores.values()))}
    try:
        estimates, tagged = {}, set()
        for skill, numbers in json.loads(read_text(skills)).items():
            names = [f"{number:05}" for number in numbers]
            estimates[skill] = mean([scores[name] for name in names])
            tagged |= {*names}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{skills} does not go with the prompts: expected skills, each with numbers of prompts"
        ) from None
    return estimates | {"all": mean([scores[name] for name in sorted(tagged)])}


def load_scorer(name: str) -> Scorer:
    """The callable "MODULE:FUNCTION", or "vqascore". Raises ValueError if it does not exist."""
    if name == "vqascore":
        return vqascore
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"scorer {name!r} is not a MODULE:FUNCTION to import: {error}") from None


def vqascore(images: list[Path], texts: list[str]) -> list[float]:
    """VQAScore with CLIP-FlanT5 XXL, GenAI-Bench's own score. Raises ValueError if its package is
    missing."""
    dataset = [
        {"images": [str(image)], "texts": [text]} for image, text in zip(images, texts, strict=True)
    ]
    return _vqascore_model().batch_forward(dataset=dataset, batch_size=len(dataset)).flatten()


@lru_cache(maxsize=1)
def _vqascore_model():
    try:
        import t2v_metrics
    except ModuleNotFoundError as error:
        raise ValueError(
            f"vqascore needs {error.name}: install t2v_metrics, or name another scorer"
        ) from None
    return t2v_metrics.VQAScore(model="clip-flant5-xxl")


def _json_lines(path: Path, kinds: dict[str, type], expected: str) -> list[dict]:
    """The objects of a file with one JSON object a line, each with values of these `kinds`."""
    entries = []
    for number, entry in json_lines(path, expected):
        if not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
            raise ValueError(f"{path}, line {number + 1}: expected {expected}")
        entries.append(entry)
    return entries
