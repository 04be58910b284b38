"""The prompt sets' pictures lie as the official scorers read them, each drawn exactly once.

The prompts here are written for these tests; `stand_in_scorer` takes the place of a real scorer.
"""

import importlib.util
import json
import os
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.evaluation.prompts import (
    Run,
    draw_genai_bench,
    draw_geneval,
    geneval_scores,
    load_scorer,
    read_genai_bench,
    read_geneval,
    score_genai_bench,
    skill_scores,
)

RUN = Run({"sha256": "tiny"}, GenerationConfig(width=16, height=16, cfg=1.0), seed=7, batch=3)
ENTRIES = [
    {"tag": "one", "include": [{"class": "lamp", "count": 1}], "prompt": "one blue lamp"},
    {"tag": "one", "include": [{"class": "boat", "count": 1}], "prompt": "one boat"},
    {"tag": "two", "include": [], "prompt": "a lamp and a boat"},
    {"tag": "two", "include": [], "prompt": "a boat and a lamp"},
    {"tag": "two", "include": [], "prompt": "two boats"},
]
PROMPTS = {f"{i:05}": entry["prompt"] for i, entry in enumerate(ENTRIES)}


def stand_in_scorer(images: list[Path], texts: list[str]) -> list[float]:
    """Depends on the picture and on the text, and knows nothing of either."""
    return [
        np.asarray(Image.open(image)).mean() / 255 + len(text)
        for image, text in zip(images, texts, strict=True)
    ]


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


@pytest.fixture
def geneval_file(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    return path


@pytest.fixture
def genai_file(tmp_path):
    path = tmp_path / "genai_image.json"
    entries = {name: {"id": name, "prompt": p, "models": {}} for name, p in PROMPTS.items()}
    path.write_text(json.dumps(entries))
    return path


def test_geneval_folders_are_what_its_scorer_reads(pipeline, geneval_file, tmp_path):
    output = tmp_path / "out"
    entries = read_geneval(geneval_file)
    summary = draw_geneval(pipeline, entries, output, RUN, samples=2)
    assert (summary.drawn, summary.kept, summary.cut) == (10, 0, 0)
    found = {}
    for name in os.listdir(output):  # as evaluate_images.py walks it
        if not (output / name).is_dir() or not name.isdigit():
            continue
        metadata = json.loads((output / name / "metadata.jsonl").read_text())
        samples = sorted(os.listdir(output / name / "samples"))
        assert all(re.match(r"\d+\.png", sample) for sample in samples)
        found[int(name)] = (metadata, samples)
    assert found == {i: (entry, ["0000.png", "0001.png"]) for i, entry in enumerate(ENTRIES)}
    picture = Image.open(output / "00003" / "samples" / "0001.png")
    expected = pipeline.generate(
        "a boat and a lamp", settings=RUN.settings, seed=7 + 3 * 2 + 1
    ).images
    difference = np.asarray(picture) / 255 - expected[0].numpy()
    assert np.abs(difference).max() < 0.01


@pytest.mark.parametrize("world", [2, 3, 7])
def test_each_item_is_drawn_by_exactly_one_process(pipeline, geneval_file, tmp_path, world):
    entries = read_geneval(geneval_file)
    draw_geneval(pipeline, entries, tmp_path / "alone", RUN, samples=2)
    drawn = 0
    for rank in range(world):
        share = replace(RUN, rank=rank, world=world, batch=16)
        summary = draw_geneval(pipeline, entries, tmp_path / "shared", share, samples=2)
        assert summary.kept == 0
        drawn += summary.drawn
    assert drawn == 10
    assert pictures(tmp_path / "shared").keys() == pictures(tmp_path / "alone").keys()
    folders = sorted(path.name for path in (tmp_path / "shared").iterdir() if path.is_dir())
    assert folders == [f"{i:05}" for i in range(5)]


def test_an_interrupted_run_goes_on(pipeline, genai_file, tmp_path):
    output = tmp_path / "out"
    prompts = read_genai_bench(genai_file)
    assert prompts == PROMPTS
    draw_genai_bench(pipeline, prompts, output, RUN)
    whole = pictures(output)
    assert list(whole) == [f"{i:05}.png" for i in range(5)]
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.png")}
    for name in ("00001.png", "00004.png"):
        (output / name).unlink()
        del times[output / name]
    summary = draw_genai_bench(pipeline, prompts, output, RUN)
    assert (summary.drawn, summary.kept) == (2, 3)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    for name, content in whole.items():
        before, after = Image.open(BytesIO(content)), Image.open(output / name)
        assert json.loads(after.text["tokenshuffle"])["prompt"] == PROMPTS[name[:5]]
        difference = np.asarray(before, np.int16) - np.asarray(after, np.int16)
        assert np.abs(difference).max() <= 1  # of another batch: floating-point rounding


@pytest.mark.parametrize(
    "run", [replace(RUN, seed=8), replace(RUN, model={"sha256": "other"}),
            replace(RUN, settings=replace(RUN.settings, cfg=2.0))],
)  # fmt: skip
def test_pictures_of_different_runs_are_never_mixed(pipeline, tmp_path, run):
    draw_genai_bench(pipeline, PROMPTS, tmp_path, RUN)
    with pytest.raises(ValueError, match="holds pictures of other prompts, another model, seed"):
        draw_genai_bench(pipeline, PROMPTS, tmp_path, run)
    with pytest.raises(ValueError, match="choose another folder"):
        draw_genai_bench(pipeline, PROMPTS | {"00009": "a third boat"}, tmp_path, RUN)


def test_a_long_prompt_is_cut_and_counted(pipeline, tmp_path):
    long = "a boat " * 100
    summary = draw_genai_bench(pipeline, {"00000": long, "00001": "a boat"}, tmp_path, RUN)
    assert (summary.drawn, summary.cut) == (2, 1)


def test_genai_bench_scores_pair_pictures_with_their_prompts(pipeline, tmp_path):
    draw_genai_bench(pipeline, PROMPTS, tmp_path, RUN)
    scores = score_genai_bench(PROMPTS, tmp_path, stand_in_scorer, batch=2)
    assert list(scores) == list(PROMPTS)
    for name, prompt in PROMPTS.items():
        (expected,) = stand_in_scorer([tmp_path / f"{name}.png"], [prompt])
        assert scores[name] == expected
    skills = tmp_path / "genai_skills.json"
    skills.write_text(json.dumps({"counting": [4], "basic": [0, 1, 4]}))
    by_skill = skill_scores(scores, skills)
    assert by_skill["counting"].value == scores["00004"]
    expected = (scores["00000"] + scores["00001"] + scores["00004"]) / 3
    assert by_skill["basic"].value == pytest.approx(expected)
    assert by_skill["all"] == by_skill["basic"]
    assert skill_scores(scores, None)["all"].value == pytest.approx(sum(scores.values()) / 5)
    skills.write_text(json.dumps({"counting": [77]}))
    with pytest.raises(ValueError, match=r"genai_skills\.json does not go with the prompts"):
        skill_scores(scores, skills)
    with pytest.raises(ValueError, match=r"the scorer returned \[nan, nan\] for 2 pictures"):
        score_genai_bench(PROMPTS, tmp_path, lambda images, texts: [float("nan")] * 2, batch=2)
    (tmp_path / "00002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 5 pictures are missing.*00002\.png"):
        score_genai_bench(PROMPTS, tmp_path, stand_in_scorer)


def test_geneval_results_are_summed_up_as_by_its_own_script(tmp_path):
    """Task one: 3 of 4 pictures, task two: 1 of 4; overall is the mean over tasks."""
    correct = {
        ("one", "a"): (1, 1),
        ("one", "b"): (1, 0),
        ("two", "c"): (0, 1),
        ("two", "d"): (0, 0),
    }
    path = tmp_path / "results.jsonl"
    path.write_text(
        "".join(
            json.dumps({"tag": tag, "metadata": prompt, "correct": bool(value)}) + "\n"
            for (tag, prompt), values in correct.items()
            for value in values
        )
    )  # fmt: skip
    found = geneval_scores(path)
    assert {name: e.value for name, e in found.items()} == {
        "one": 0.75,
        "two": 0.25,
        "overall": 0.5,
    }
    # Two prompts of 1 and 0.5: a standard error of 0.25, and t with one degree of freedom.
    assert found["one"].high - 0.75 == pytest.approx(12.7062 * 0.25, rel=1e-4)
    assert found["overall"].high - 0.5 == pytest.approx(12.7062 * 0.25 / 2**0.5, rel=1e-4)
    path.write_text('{"tag": "one"}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: expected tag, metadata"):
        geneval_scores(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no results"):
        geneval_scores(path)


def test_bad_prompt_files_are_named(tmp_path):
    path = tmp_path / "prompts"
    with pytest.raises(FileNotFoundError, match="prompts does not exist"):
        read_geneval(path)
    path.write_text('{"tag": "one", "prompt": "a boat"}\n["a lamp"]\n')
    with pytest.raises(ValueError, match="prompts, line 2: expected a JSON object with tag"):
        read_geneval(path)
    for content in ("[]", '{"00000": "a boat"}', "boat"):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not a prompt file of GenAI-Bench"):
            read_genai_bench(path)
    path.write_text('{"../outside": {"prompt": "a boat"}}')
    with pytest.raises(ValueError, match=r"'\.\./outside' is not an id with a prompt"):
        read_genai_bench(path)


def test_scorers_are_found_by_name():
    assert load_scorer("math:fsum")([1, 2]) == 3
    for name in ("math", "math:missing", "no_such_module:f", ":f"):
        with pytest.raises(ValueError, match=rf"scorer '{name}' is not a MODULE:FUNCTION"):
            load_scorer(name)


@pytest.mark.skipif(importlib.util.find_spec("t2v_metrics") is not None, reason="it is there")
def test_vqascore_says_what_it_needs(tmp_path):
    scorer = load_scorer("vqascore")  # nothing is imported before it is asked for a score
    with pytest.raises(ValueError, match="vqascore needs t2v_metrics: install t2v_metrics"):
        scorer([tmp_path / "a.png"], ["a boat"])
