"""The command `tokenshuffle eval`: scores of a model, as a table and as a JSON file."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from ..config import parse_sizes
from .options import (
    add_model,
    add_sampling,
    check_batch,
    check_output,
    command,
    identity,
    load,
    process,
    run_of,
    settings_of,
)

SPLITS = {"train": "trained", "held-out": "held-out"}  # as they are called in the results


def add(commands) -> None:
    """Add the command `eval`."""
    parser = commands.add_parser("eval", help="Score a model.")
    scores = parser.add_subparsers(required=True, metavar="SCORE")

    text = "Is the nearest reference of a generated picture the prompted subject?"
    parser = command(scores, "retrieval", _retrieval, text)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of `data emoji`")
    parser.add_argument("--count", type=int, default=200, help="trained pairs to generate")
    _add_generated(parser)

    text = (
        "Does a generated picture show what its prompt composes: colour, count, subjects, places?"
    )
    parser = command(scores, "compositional", _compositional, text)
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="folder of `data emoji --compositions`"
    )
    parser.add_argument(
        "--count", type=int, default=50, help="pictures of each kind and split (default: 50)"
    )
    _add_generated(parser)

    text = "Does a generated picture show what its prompt asks for, as a person would say?"
    parser = command(scores, "understanding", _understanding, text)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of `data emoji`")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl",
        help="prompts and what they ask for, or by-hand: a hundred that come with this pack "
        "(default: made from the data set)",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=int, default=200, help="prompts of each group that is made (default: 200)"
    )
    parser.add_argument("--groups", metavar="A,B", help="of those that are made (default: all)")
    parser.add_argument("--sheet", metavar="FILE.png", help="save the generated pictures, marked")
    _add_common(parser, samples=True)

    text = "What does the image tokenizer keep of pictures, and how much of its codebook is used?"
    _add_source(command(scores, "reconstruction", _reconstruction, text))

    text = "How many nats does each code of given pictures cost the model?"
    _add_source(command(scores, "loss", _loss, text))

    text = (
        "Draw GenEval's prompts in the layout of its scorer; under torchrun, each process a share."
    )
    parser = command(scores, "geneval", _geneval, text)
    _add_prompts(parser, "GenEval's evaluation_metadata.jsonl")
    parser.add_argument("--samples", type=int, default=4, help="pictures of a prompt (default: 4)")
    parser.add_argument(
        "--results", type=Path, metavar="results.jsonl", help="of GenEval's evaluate_images.py"
    )

    text = "Draw GenAI-Bench's prompts and score them; under torchrun, each process draws a share."
    parser = command(scores, "genai-bench", _genai_bench, text)
    _add_prompts(parser, "GenAI-Bench's genai_image.json")
    parser.add_argument(
        "--scorer", metavar="NAME",
        help="vqascore (needs t2v_metrics), or MODULE:FUNCTION that takes paths and texts",
    )  # fmt: skip
    parser.add_argument("--skills", type=Path, metavar="genai_skills.json", help="scores by skill")


def _add_common(parser, *, samples: bool) -> None:
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE.json", help="write the scores and their settings")
    if samples:
        add_sampling(parser)
    add_model(parser)


def _add_generated(parser) -> None:
    parser.add_argument("--language", default="en", help="of the prompts")
    parser.add_argument("--sheet", metavar="FILE.png", help="save the generated pictures")
    _add_common(parser, samples=True)


def _add_source(parser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SOURCE",
        help="pictures with captions: a folder, an image folder, or .tar shards",
    )  # fmt: skip
    parser.add_argument("--split", default="held-out", choices=[*SPLITS])
    parser.add_argument("--count", type=int, default=200, help="pictures (default: 200)")
    parser.add_argument("--size", metavar="WxH", help="to crop to (default: the model's own)")
    _add_common(parser, samples=False)


def _add_prompts(parser, file: str) -> None:
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help=file)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--height", type=int, help="pixels")
    _add_common(parser, samples=True)


def _check(options) -> None:
    """What can be refused before the model is loaded."""
    check_batch(options)
    for name, suffix in (("json", ".json"), ("sheet", ".png")):
        if path := getattr(options, name, None):
            check_output(path, suffix)


def _report(options, pipeline, estimates: dict, settings=None, images=(), **more) -> None:
    """Print the estimates as a table, and write them with everything that they depend on; also a
    sheet of the images."""
    from ..files import atomic_path, write_text
    from ..images import sheet_of

    width = max(map(len, estimates))
    for name, e in estimates.items():
        interval = "" if math.isnan(e.low) else f"[{e.low:.3f}, {e.high:.3f}]"
        print(f"{name:<{width}}  {e.value:7.3f}  {interval:<18}  n={e.n}")
    if options.json:
        result = {
            "model": {"title": pipeline.card.get("modelspec.title", ""), **identity(options)},
            "options": {k: v for k, v in vars(options).items() if k != "run" and v is not None},
            "settings": asdict(settings) if settings else None,
            "results": {
                name: {k: v if math.isfinite(v) else None for k, v in asdict(e).items()}
                for name, e in estimates.items()
            },
            **more,
        }
        text = json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n"
        write_text(options.json, text)
    if images and options.sheet:
        with atomic_path(options.sheet) as temporary:
            sheet_of(images, columns=20).save(temporary, "PNG")


def _proportions(names: list[str], scores: list[dict[str, bool]]) -> dict:
    """The share of pictures that are right, for each name and score."""
    from ..evaluation.intervals import proportion

    right: dict[str, list[bool]] = {}
    for name, score in zip(names, scores, strict=True):
        for key, value in score.items():
            right.setdefault(name + key, []).append(value)
    return {name: proportion(sum(values), len(values)) for name, values in right.items()}


def _retrieval(options) -> None:
    from ..data.emoji.build import read_manifest
    from ..evaluation.intervals import Estimate
    from ..evaluation.retrieval import choose, reconstruction_psnr, retrieval

    _check(options)
    records = read_manifest(options.data)
    pipeline = load(options)
    settings = settings_of(options, pipeline.config.generation)
    estimates, sheet = {}, []
    for split, count in (("train", options.count), ("held-out", None)):
        part = choose(records, split, count, options.seed)
        if not part:
            continue
        scores, images = retrieval(
            pipeline, options.data, part, settings,
            seed=options.seed, batch=options.batch, language=options.language,
        )  # fmt: skip
        estimates |= _proportions([f"{SPLITS[split]} "] * len(part), scores)
        psnr = reconstruction_psnr(pipeline, options.data, part)
        psnr_estimate = Estimate(psnr, math.nan, math.nan, len(part))
        estimates[f"{SPLITS[split]} reconstruction PSNR (dB)"] = psnr_estimate
        sheet = sheet or images
    _report(options, pipeline, estimates, settings, sheet)


def _compositional(options) -> None:
    from ..checkpoints import trained_sizes
    from ..evaluation.compositional import choose_compositions, compositional

    _check(options)
    names, compositions = [], []
    for split, called in SPLITS.items():
        part = choose_compositions(options.data, split, options.count, options.seed)
        compositions += part
        names += [f"{called} {composition.kind}: " for composition in part]
    pipeline = load(options)
    settings = settings_of(options, pipeline.config.generation)
    scores, images = compositional(
        pipeline, options.data, compositions, settings,
        seed=options.seed, batch=options.batch, language=options.language,
        sizes=trained_sizes(pipeline.config, pipeline.card),
    )  # fmt: skip
    estimates = dict(sorted(_proportions(names, scores).items()))
    _report(options, pipeline, estimates, settings, images)


def _understanding(options) -> None:
    from ..checkpoints import trained_sizes
    from ..data.emoji.build import read_manifest
    from ..evaluation import understanding as scored
    from ..evaluation.matching import References
    from ..evaluation.prompt_groups import GROUPS, made
    from ..files import atomic_path

    _check(options)
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, not {options.count}")
    if options.prompts and options.groups:
        raise ValueError("--groups is for prompts that are made: leave out --prompts, or --groups")
    groups = options.groups.split(",") if options.groups else [*GROUPS]
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"there is no group {unknown[0]!r}, only {', '.join(GROUPS)}")
    references, prompts, same = References.read(options.data), [], []
    if options.prompts:
        file = scored.BY_HAND if str(options.prompts) == "by-hand" else options.prompts
        prompts = scored.read_prompts(file, references)
    else:
        records = read_manifest(options.data)
        for group in groups:
            if group == "seeds":
                count = scored.SEEDS * min(options.count, 40)
                same = made(records, references, group, count, options.seed)
            elif found := made(records, references, group, options.count, options.seed):
                prompts += found
            elif options.groups:
                raise ValueError(f"the data set allows no prompt of the group {group!r}")
    pipeline = load(options)
    settings = settings_of(options, pipeline.config.generation)
    how = {
        "seed": options.seed,
        "batch": options.batch,
        "sizes": trained_sizes(pipeline.config, pipeline.card),
    }
    images = scored.draw(pipeline, prompts, settings, **how)
    scores = scored.score_all(images, prompts, references)
    estimates = scored.shares(prompts, scores, together=bool(options.prompts))
    if same:
        estimates["distance between seeds"] = scored.diversity(
            scored.draw(pipeline, same, settings, **how)
        )
    found = [asdict(p) | {"found": s} for p, s in zip(prompts, scores, strict=True)]
    _report(options, pipeline, estimates, settings, prompts=found)
    if options.sheet and prompts:
        with atomic_path(options.sheet) as temporary:
            scored.marked_sheet(images, prompts, scores).save(temporary, "PNG")


def _source(options) -> tuple:
    """The model, the pictures and the size to crop them to."""
    from ..evaluation.items import choose

    _check(options)
    pipeline = load(options)
    items = choose(options.source, options.split, options.count, options.seed)
    generation = pipeline.config.generation
    sizes = [*parse_sizes(options.size or ""), (generation.width, generation.height)]
    return pipeline, items, sizes[0]


def _reconstruction(options) -> None:
    from ..evaluation.reconstruction import reconstruction

    pipeline, items, size = _source(options)
    _report(options, pipeline, reconstruction(pipeline, items, size, options.batch))


def _loss(options) -> None:
    from ..evaluation.items import load as load_pictures
    from ..evaluation.loss import validation_loss

    pipeline, items, size = _source(options)
    pairs = []
    for start in range(0, len(items), options.batch):
        part = items[start : start + options.batch]
        codes = pipeline.encode(load_pictures(part, size).movedim(1, -1))
        pairs += zip([item.captions[0] for item in part], codes, strict=True)
    estimates = {}
    windows = pipeline.config.model.windows
    for window in windows:
        name = f"nats per code, window {window}" if len(windows) > 1 else "nats per code"
        estimates[name] = validation_loss(pipeline, pairs, options.batch, window)
    codes = sum(codes.numel() for _, codes in pairs)
    _report(options, pipeline, estimates, codes=codes)


def _draw(options, draw, prompts, *more) -> tuple:
    """The model, how this process draws, and the number of prompts that were cut."""
    _check(options)
    pipeline, run = run_of(options)
    summary = draw(pipeline, prompts, options.output, run, *more)
    print(
        f"{summary.drawn} pictures drawn, {summary.kept} kept; {summary.cut} prompts cut to the "
        "length that the model reads",
        file=sys.stderr,
    )
    return pipeline, run, summary.cut


def _geneval(options) -> None:
    from ..evaluation.prompts import draw_geneval, geneval_scores, read_geneval

    if options.samples < 1:
        raise ValueError(f"--samples must be at least 1, not {options.samples}")
    entries = read_geneval(options.prompts)
    estimates = geneval_scores(options.results) if options.results else None
    pipeline, run, cut = _draw(options, draw_geneval, entries, options.samples)
    if estimates and run.rank == 0:
        _report(options, pipeline, estimates, run.settings, cut=cut)


def _genai_bench(options) -> None:
    from ..evaluation import prompts as bench

    prompts = bench.read_genai_bench(options.prompts)
    scorer = bench.load_scorer(options.scorer) if options.scorer else None
    if scorer and process()[1] > 1:
        raise ValueError("--scorer needs all pictures: score afterwards, in a single process")
    pipeline, run, cut = _draw(options, bench.draw_genai_bench, prompts)
    if scorer:
        scores = bench.score_genai_bench(prompts, options.output, scorer, options.batch)
        estimates = bench.skill_scores(scores, options.skills)
        _report(options, pipeline, estimates, run.settings, cut=cut, scores=scores)
