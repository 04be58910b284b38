"""Training of the model on image codes that were extracted once."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import checkpoints, engine
from ..adapt.lora import add_lora, save_lora
from ..config import ModelConfig
from ..data.shards import CodeShards, fingerprint
from ..files import sha256
from ..image_tokenizer import ImageTokenizer
from ..images import sheet_of
from ..model import TokenShuffleModel
from ..pipeline import Pipeline, decode_codes
from ..sampler import pad_left, sample
from ..shuffle import shuffle
from .batches import Batches
from .distributed import rank
from .loop import Task, fit, generator
from .settings import LoopConfig, Recipe

CPU = torch.device("cpu")
VALIDATION_PICTURES = 64
VALIDATION_CODES = 8192  # per batch: each code needs one logit per entry of the codebook
SHEET_POSITIONS = 8192  # in all pictures of a sheet together, which are sampled as one batch


class ModelTask(Task):
    """Cross-entropy on the codes; optionally z-loss and a text loss."""

    def __init__(
        self,
        shards: CodeShards,
        pipeline: Pipeline,
        loop: LoopConfig,
        recipe: Recipe,
        device: torch.device,
    ):
        super().__init__()
        check_codes(shards, pipeline.image_tokenizer, pipeline.config.model, recipe)
        self.shards, self.pipeline, self.recipe, self.device = shards, pipeline, recipe, device
        self.windows = pipeline.config.model.windows
        self.seed = loop.seed
        self.idle_parameters = len(self.windows) > 1  # those of the other windows
        self.about = {
            "codes": sha256([json.dumps(shards.index).encode()]),
            "text tokenizer": sha256([pipeline.text_tokenizer.to_json().encode()]),
        }
        frozen = [(n, p) for n, p in pipeline.model.named_parameters() if not p.requires_grad]
        if frozen:
            self.about["weights that are not trained"] = fingerprint(frozen)
        self.visits, held_out = {}, []  # size -> indices, repeated as an epoch visits them
        for size, indices in shards.indices.items():
            visits = []
            for index in indices.tolist():
                record = shards.record(index)
                if record["split"] == "train":
                    visits += [index] * record["repeats"]
                else:
                    held_out.append(index)
            if visits:
                self.visits[size] = torch.tensor(visits)
        self.batches = Batches(list(self.visits.values()), loop.batch, loop.seed)
        trained = torch.cat([indices.unique() for indices in self.visits.values()])
        self.trained, self.held_out = _spread(trained.tolist()), _spread(held_out)
        self.noted = False  # whether the note on long captions has been printed
        self.latest = None  # step and batch: the pieces of a step share it

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """text (B, T), padding (B,), codes (B, H, W) of step `step`, all of one size, and the
        window to train with."""
        rng = random.Random(self.seed * 1_000_003 + step)
        (window,) = rng.choices(self.windows, self.recipe.window_mix)
        _, indices = self.batches.at(step)
        captions = []
        for record in map(self.shards.record, indices.tolist()):
            dropped = rng.random() < self.recipe.drop_prompt
            captions.append("" if dropped else rng.choice(record["captions"]))
        return *self._tensors(indices.tolist(), captions, window), window

    def loss(self, module: nn.Module, step: int, piece: int = 0, pieces: int = 1):
        """The mean loss on the pictures [piece::pieces] of the step's batch."""
        if self.latest is None or self.latest[0] != step:
            self.latest = step, self.batch(step)
        text, padding, codes, window = self.latest[1]
        context = self.foreign_windows(codes, window, step) if self.recipe.context_noise else codes
        predicted = (text.shape[1] - 1 - padding).sum() / pieces  # text tokens, in a mean piece
        text, padding, codes, context = (
            whole[piece::pieces].to(self.device) for whole in (text, padding, codes, context)
        )
        with_text = self.recipe.text_loss > 0
        logits = module(text, padding, context, window, targets=codes, with_text=with_text)
        targets = shuffle(codes[..., None], window)
        code_loss = F.cross_entropy(logits.codes.flatten(0, 2).float(), targets.flatten())
        loss, metrics = code_loss, {"code_loss": code_loss.detach()}
        if self.recipe.z_loss:
            z = logits.codes.float().logsumexp(-1).square().mean()
            loss = loss + self.recipe.z_loss * z
            metrics["z"] = z.detach()
        if with_text:
            targets = text[:, 1:].masked_fill(
                torch.arange(text.shape[1] - 1, device=text.device) < padding[:, None], -100
            )
            text_logits = logits.text[:, :-1].flatten(0, 1).float()
            text_loss = F.cross_entropy(text_logits, targets.flatten(), reduction="sum") / predicted
            loss = loss + self.recipe.text_loss * text_loss
            metrics["text_loss"] = text_loss.detach()
        return loss, metrics

    def foreign_windows(self, codes: Tensor, window: int, step: int) -> Tensor:
        """The codes (B, H, W) with some windows of each picture replaced by its neighbour's.

        Otherwise a model memorises a small data set: it learns to recognise the picture by its
        first windows and to ignore the prompt, and one wrong window while sampling leads it into
        another picture. A large data set does not need this. The idea comes from scheduled sampling
        (arXiv 1506.03099). The share of foreign windows differs from picture to picture, from 0 to
        `context_noise`, so that the model still trusts a clean context.
        """
        random = generator(self.seed + 3, step)
        rows, columns = codes.shape[1] // window, codes.shape[2] // window
        share = self.recipe.context_noise * torch.rand(len(codes), 1, 1, generator=random)
        foreign = torch.rand(len(codes), rows, columns, generator=random) < share
        foreign = foreign.repeat_interleave(window, 1).repeat_interleave(window, 2)
        return torch.where(foreign, codes.roll(1, 0), codes)

    def codes_per_sample(self) -> float:
        return sum(codes * share for codes, share in self._code_counts())

    def flops_per_sample(self) -> float:
        mix = self.recipe.window_mix or (1,) * len(self.windows)
        return sum(
            share * part * training_flops(self.pipeline.model, codes, window) / sum(mix)
            for codes, share in self._code_counts()
            for window, part in zip(self.windows, mix, strict=True)
        )

    def _code_counts(self) -> list[tuple[int, float]]:
        """For each size: the codes of a picture, and its share of the pictures of an epoch."""
        visits, area = sum(map(len, self.visits.values())), self.shards.stride**2
        return [(w * h // area, len(of_size) / visits) for (w, h), of_size in self.visits.items()]

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Nats per code, given the first caption, on held-out pictures and on trained ones."""
        scores = {}
        for window in self.windows:
            suffix = f"_window_{window}" if len(self.windows) > 1 else ""
            if self.held_out:
                scores[f"validation_loss{suffix}"] = self._loss_of(module, self.held_out, window)
            scores[f"trained_loss{suffix}"] = self._loss_of(module, self.trained, window)
        return scores

    def _loss_of(self, module: nn.Module, indices: list[int], window: int) -> float:
        total, count = 0.0, 0
        for size in self.shards.sizes:
            of_size = [i for i in indices if tuple(self.shards.record(i)["bucket"]) == size]
            batch = max(1, min(16, VALIDATION_CODES * self.shards.stride**2 // math.prod(size)))
            for start in range(0, len(of_size), batch):
                part = of_size[start : start + batch]
                captions = [self.shards.record(i)["captions"][0] for i in part]
                tensors = self._tensors(part, captions, window)
                text, padding, codes = (tensor.to(self.device) for tensor in tensors)
                logits = module(text, padding, codes, window).codes.flatten(0, 2)
                targets = shuffle(codes[..., None], window).flatten()
                total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
                count += codes.numel()
        return total / count

    def sheet(self, module: nn.Module) -> Image.Image:
        """Pictures sampled from the first captions of twelve trained and four held-out pictures of
        the first size (of fewer if they are large), with the default settings."""
        size, window = next(iter(self.visits)), self.windows[0]
        width, height = (side // (window * self.shards.stride) for side in size)
        grid = height, width
        quarter = max(1, min(4, SHEET_POSITIONS // (4 * width * height)))
        prompts = []
        for pool, count in ((self.trained, 3 * quarter), (self.held_out, quarter)):
            records = [self.shards.record(i) for i in pool]
            of_size = [record for record in records if tuple(record["bucket"]) == size]
            prompts += [self._frame(record["captions"][0], grid) for record in of_size[:count]]
        generators = [torch.Generator(self.device).manual_seed(i) for i in range(len(prompts))]
        settings = replace(self.pipeline.config.generation, window=window)
        *_, last = sample(
            module, prompts, [self._frame("", grid, len(p)) for p in prompts], grid, settings,
            generators, self.pipeline.text_tokenizer.pad, ahead=1,
        )  # fmt: skip
        engine.release(module)
        images = [
            decode_codes(self.pipeline.image_tokenizer, codes[None], save_memory=True)
            for codes in last.codes
        ]
        return sheet_of(torch.cat(images).movedim(-1, 1), columns=8)

    def save(self, module: nn.Module, path: Path) -> None:
        sizes = ", ".join(f"{width}x{height}" for width, height in self.visits)
        card = self.pipeline.card | {checkpoints.SIZES: sizes}
        replace(self.pipeline, model=module, card=card).save(path)

    def _tensors(self, indices, captions, window: int) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.stack([self.shards.codes(i) for i in indices])
        grid = codes.shape[1] // window, codes.shape[2] // window
        pad = self.pipeline.text_tokenizer.pad
        longest = max(len(self._frame(caption, grid)) for caption in captions)
        text, padding = pad_left([self._frame(c, grid, longest) for c in captions], pad, CPU)
        return text, padding, codes

    def _frame(self, caption: str, grid: tuple[int, int], length: int = 0) -> list[int]:
        """As `TextTokenizer.frame`, of a caption that is cut to what the model reads."""
        tokenizer = self.pipeline.text_tokenizer
        ids, longest = tokenizer.encode(caption), self.pipeline.config.model.max_prompt
        if len(ids) > longest and not self.noted and rank() == 0:
            self.noted = True
            print(
                f"note: a caption has {len(ids)} tokens, the model reads {longest}: the ends of "
                f"such captions are cut off: {caption[:60]}...",
                file=sys.stderr,
            )
        return tokenizer.frame(ids[:longest], *grid, length)


def check_codes(
    shards: CodeShards, image_tokenizer: ImageTokenizer, shape: ModelConfig, recipe: Recipe
) -> None:
    """Raises ValueError where a model of this shape cannot be trained on the codes in this way."""
    shards.check(image_tokenizer)
    if recipe.window_mix and len(recipe.window_mix) != len(shape.windows):
        raise ValueError(
            f"window_mix has {len(recipe.window_mix)} shares for the windows "
            f"{', '.join(map(str, shape.windows))}: give one share for each window"
        )
    if shards.index["held_out"] == shards.index["pictures"]:
        raise ValueError("all pictures are held out, so there are none to train on")
    for (width, height), indices in shards.indices.items():
        for window in shape.windows if len(indices) else ():
            unit = window * shards.stride
            rows, columns = height // unit, width // unit
            if width % unit or height % unit:
                raise ValueError(
                    f"pictures of {width}x{height} do not fit window {window}: extract the codes "
                    f"at sizes that are multiples of {unit}"
                )
            if max(rows, columns) > shape.max_grid or rows * columns > shape.max_positions:
                raise ValueError(
                    f"pictures of {width}x{height} are {columns} x {rows} positions at window "
                    f"{window}, but the model takes {shape.max_grid} per side and "
                    f"{shape.max_positions} in all: extract the codes at smaller sizes, or choose "
                    "a larger window"
                )


def frozen_names(module: nn.Module, freeze: tuple[str, ...]) -> list[str]:
    """The names of the parameters that start with one of `freeze`. Raises ValueError for a prefix
    that no parameter has."""
    names = [name for name, _ in module.named_parameters()]
    for prefix in freeze:
        if not any(name.startswith(prefix) for name in names):
            known = ", ".join(name for name, _ in module.named_children())
            raise ValueError(f"freeze: the model has no part {prefix!r}, only {known}")
    return [name for name in names if name.startswith(freeze)]


def training_flops(model: TokenShuffleModel, codes: int, window: int) -> float:
    """FLOPs of the forward and backward pass for a picture of `codes` codes: 6 N T + 12 L d T^2 for
    T transformer positions (PaLM, arXiv 2204.02311, appendix B).

    N counts the weights of the matrices that a position passes through; those that each code of a
    window of s x s passes through count s * s times. The few dozen positions of text are left out.
    """
    weights = 0
    for name, parameter in model.named_parameters():
        part, at, *_ = name.split(".")
        if part in ("shuffle", "unshuffle", "window_head") and at != str(window):
            continue
        if parameter.ndim == 2 and "embedding" not in name:
            by_code = "head" in part or name.endswith(("compress.weight", "expand.weight"))
            weights += parameter.numel() * (window**2 if by_code else 1)
    positions = codes / window**2
    config = model.config
    return 6 * weights * positions + 12 * config.layers * config.dim * positions**2


def _spread(indices: list[int]) -> list[int]:
    """At most VALIDATION_PICTURES of them, evenly spread."""
    return indices[:: -(-len(indices) // VALIDATION_PICTURES) or 1]


class LoraTask(ModelTask):
    """As `ModelTask`, for a model that `add_lora` has prepared: saves only the LoRA."""

    def save(self, module: nn.Module, path: Path) -> None:
        save_lora(path, module, self.pipeline.card)


def train_model(
    shards: CodeShards,
    directory: Path,
    pipeline: Pipeline,
    loop: LoopConfig,
    recipe: Recipe,
    *,
    lora: int = 0,
    freeze: tuple[str, ...] = (),
    resume: bool = False,
    device: torch.device = CPU,
) -> Path:
    """Train the model of `pipeline` on the codes of `shards`. Returns the path of the finished
    checkpoint, or of the LoRA if its rank `lora` is above 0.

    Parameters whose names start with one of `freeze` do not change. Raises as `frozen_names`,
    `check_codes` and `fit`.
    """
    module = pipeline.model
    engine.release(module)
    for name in frozen_names(module, freeze):
        module.get_parameter(name).requires_grad_(False)
    if lora:
        add_lora(module, lora)
    kind = LoraTask if lora else ModelTask
    task = kind(shards, pipeline, loop, recipe, device)
    module.to(device)
    return fit(module, task, loop, directory, resume)
