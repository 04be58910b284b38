"""Codes of composed pictures: composed and encoded on a device, without pictures on disk."""

import copy
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...files import sha256
from ...image_tokenizer import ImageTokenizer
from ..buckets import Size
from ..shards import Shard
from ..writing import Extraction, check_counts, settings_of, split_of, write_shards
from .build import read_manifest
from .compose import Composition, square_in
from .folder import Descriptions, size_of
from .pictures import BACKGROUNDS, read, resize, sent, stacked
from .plan import Jitter, Planned, plan
from .recolour import Tone, recoloured

CPU = torch.device("cpu")
CORES = os.cpu_count() or 1
BATCH = 16  # pictures that are encoded at once
VALUES = 2**27  # the same on CUDA, in values of the largest maps, in float16


def extract_compositions(
    data: str | Path,
    count: int,
    directory: str | Path,
    image_tokenizer: ImageTokenizer,
    sizes: list[Size] | None = None,
    *,
    first_share: float | None = None,
    white_repeats: int = 8,
    jitter: float = 0.0,
    seed: int = 0,
    held_out: float = 0.0,
    shard_size: int = 8192,
    batch: int | None = None,
    device: torch.device = CPU,
    rank: int = 0,
    world: int = 1,
) -> Extraction:
    """What `folder.build` and then `extract` make of the data set in `data`: codes and records of
    `count` compositions, in shards in `directory`.

    On a CPU the codes are equal but for the rounding of other batches. On CUDA the image tokenizer
    computes in float16: with the bundled one, 0.2 % of the codes differ. A share `jitter` of the
    compositions is jittered (see `plan.Jitter`); the boxes in the records say where subjects are.
    All pictures of the data set are in the device's memory in each size that subjects have, at 4
    bytes a pixel. For the other settings see `plan.plan` and `extract`. Raises as they do.
    """
    data = Path(data)
    records = read_manifest(data)
    sizes = sizes or [size_of(data, records)]
    settings = settings_of(image_tokenizer, sizes, "white")
    check_counts(shard_size, 1 if batch is None else batch, held_out)
    moved = Jitter(jitter, image_tokenizer.config.stride)
    planned = plan(records, count, sizes, first_share=first_share, jitter=moved, seed=seed)
    describe = Descriptions.of(records, sizes, white_repeats, seed)
    keys = [describe.file_name(i, *each[:2]).removesuffix(".png") for i, each in enumerate(planned)]
    order = sorted(range(count), key=keys.__getitem__)
    jobs = [
        [(i, keys[i], planned[i]) for i in order[start : start + shard_size]]
        for start in range(0, count, shard_size)
    ]
    workers = min(len(jobs), CORES)
    with ProcessPoolExecutor(workers) as pool:
        # First of all, so that the processes write captions while this one goes on.
        described = (pool.map if workers > 1 else map)(partial(_records, describe, held_out), jobs)
        pictures = (data / record["image"] for record in records)
        source = json.dumps([settings, sha256(path.read_bytes() for path in pictures)])
        image_tokenizer.to(device)
        composer = Composer(data, records, planned, device)
        batches = {size: batch or _batch(image_tokenizer, size, device) for size in sizes}
        encode = partial(_shard, composer, encoders(image_tokenizer, device), batches, settings)

        def parts() -> Iterator[tuple[str, Callable]]:
            for job, lines in zip(jobs, described, strict=True):
                made_from = sha256(text.encode() for text in (source, *lines))
                yield made_from, partial(encode, [each for *_, each in job], lines, made_from)

        return write_shards(parts(), count, directory, settings, rank, world)


def _records(
    describe: Descriptions, held_out: float, job: list[tuple[int, str, Planned]]
) -> list[str]:
    """The records of a shard, as `extract` writes them."""
    lines = []
    for i, key, planned in job:
        extra = describe(i, *planned)
        record = {"key": key, **{name: extra.pop(name) for name in ("captions", "repeats")}}
        record["split"] = split_of(key, extra.pop("split"), held_out)
        lines.append(json.dumps(record | {"extra": extra, "bucket": planned[1]}))
    return lines


class Composer:
    """Draws compositions on a device, where it has the cut-outs of all of them in each size."""

    def __init__(
        self, data: Path, records: list[dict], planned: list[Planned], device: torch.device
    ):
        self.device = device
        tones = {(r["subject"], r["style"]): r.get("tone") for r in records}
        self.tones = {key: Tone(*tone) for key, tone in tones.items() if tone}
        self.rows: dict[int, dict] = defaultdict(dict)  # side -> (subject, style) -> row
        for composition, size, _ in planned:
            for subject, box in zip(composition.subjects, composition.boxes, strict=True):
                of_side = self.rows[square_in(box, size)[2]]
                of_side.setdefault((subject, composition.style), len(of_side))
        used = {key for of_side in self.rows.values() for key in of_side}
        records = [r for r in records if (r["subject"], r["style"]) in used]
        with ThreadPoolExecutor(CORES) as pool:  # Pillow releases the GIL
            pictures = pool.map(partial(read, data), records)
            originals = {
                (r["subject"], r["style"]): p for r, p in zip(records, pictures, strict=True)
            }
            self.cut_outs = {
                side: stacked(
                    pool.map(lambda key, side=side: resize(originals[key], side), of_side)
                ).to(device)
                for side, of_side in self.rows.items()
            }

    def __call__(self, compositions: list[Composition], size: Size) -> Tensor:
        """The pictures of `compose.render`, float32 (B, 3, H, W) in 0..1."""
        places = defaultdict(list)  # side -> picture, row, left, top, mirrored
        colours = defaultdict(list)  # side -> place, tone, colour
        for picture, shown in enumerate(compositions):
            parts = (shown.subjects, shown.boxes, shown.colours, shown.mirrored)
            for subject, box, colour, mirrored in zip(*parts, strict=True):
                left, top, side = square_in(box, size)
                row = self.rows[side][subject, shown.style]
                if colour:
                    tone = self.tones[subject, shown.style]
                    colours[side].append((len(places[side]), tone, colour))
                places[side].append((picture, row, left, top, mirrored))
        backgrounds = [BACKGROUNDS[shown.background] for shown in compositions]
        canvas = sent(backgrounds, self.device).float()[:, :, None, None]
        canvas = canvas.expand(-1, -1, size[1], size[0]).clone()
        channels = torch.arange(3, device=self.device)[:, None, None]
        for side, of_side in places.items():
            picture, row, left, top, mirrored = sent(of_side, self.device).T[..., None, None]
            span = torch.arange(side, device=self.device)
            at = picture[:, None], channels, (top + span[:, None])[:, None], (left + span)[:, None]
            cut_out = self.cut_outs[side][row.flatten()]
            if colours[side]:
                which, tones, names = zip(*colours[side], strict=True)
                which = sent(list(which), self.device)
                cut_out[which] = recoloured(cut_out[which], list(tones), list(names))
            cut_out = torch.where(mirrored[:, None] > 0, cut_out.flip(-1), cut_out).float()
            colour, alpha = cut_out[:, :3], cut_out[:, 3:]
            # Subjects do not overlap, so those of one picture can be put in at once.
            canvas[at] = ((colour * alpha + canvas[at] * (255 - alpha)) / 255).round()
        return canvas / 255


Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def encoders(image_tokenizer: ImageTokenizer, device: torch.device) -> list[Encode]:
    """Images float32 (B, 3, H, W) -> codes, and whether all latents were finite. The first is the
    fastest; a picture whose numbers it cannot hold is for the next."""

    def whole(images: Tensor) -> tuple[Tensor, Tensor]:
        return image_tokenizer.encode(images), torch.ones((), dtype=torch.bool, device=device)

    if device.type != "cuda":
        return [whole]
    half = copy.deepcopy(image_tokenizer).half().to(memory_format=torch.channels_last)

    def in_half(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.half().contiguous(memory_format=torch.channels_last)
        latent = half.latent(images).float()
        return image_tokenizer.codes_of(latent), latent.isfinite().all()

    return [in_half, whole]


def _batch(image_tokenizer: ImageTokenizer, size: Size, device: torch.device) -> int:
    if device.type != "cuda":
        return BATCH
    shape = image_tokenizer.config
    return max(1, VALUES // (math.prod(size) * shape.channels * shape.channel_multipliers[0]))


@torch.inference_mode()
def _shard(
    composer: Composer,
    encoders: list[Encode],
    batches: dict[Size, int],
    settings: dict,
    planned: list[Planned],
    records: list[str],
    source: str,
    bar,
) -> Shard:
    """Pictures of one size are composed and encoded in batches. Nothing waits for the device before
    the end."""
    of_size = defaultdict(list)
    for i, (_, size, _) in enumerate(planned):
        of_size[size].append(i)
    for encode in encoders:
        codes: list[Tensor] = [torch.empty(0)] * len(planned)
        finite = []
        for size, members in of_size.items():
            for start in range(0, len(members), batches[size]):
                part = members[start : start + batches[size]]
                found, good = encode(composer([planned[i][0] for i in part], size))
                finite.append(good)
                for i, picture in zip(part, found, strict=True):
                    codes[i] = picture
                if encode is encoders[0]:
                    bar.update(len(part))
        if torch.stack(finite).all():
            break
    return Shard.of(codes, records, [], source, settings["codebook_size"])
