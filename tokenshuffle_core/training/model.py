"""Training of the model on image codes that were extracted once."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import checkpoints, engine
from ..adapt.lora import add_lora, save_lora
from ..config import ModelConfig
from ..data.shards import CodeShards, fingerprint
from ..engine.quantize import check_whole
from ..files import sha256
from ..image_tokenizer import ImageTokenizer
from ..images import sheet_of
from ..model import TokenShuffleModel
from ..pipeline import Pipeline, decode_codes
from ..sampler import sample
from ..shuffle import shuffle
from .feed import Feed
from .loop import Task, fit
from .settings import LoopConfig, Recipe

CPU = torch.device("cpu")
VALIDATION_PICTURES = 64
VALIDATION_CODES = 8192  # per batch
VALIDATION_LOGITS = 2**27  # per batch: one for each code and each entry of the codebook
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
        self.idle_parameters = len(self.windows) > 1  # those of the other windows
        self.about = {
            "codes": sha256([json.dumps(shards.index).encode()]),
            "text tokenizer": sha256([pipeline.text_tokenizer.to_json().encode()]),
        }
        frozen = [(n, p) for n, p in pipeline.model.named_parameters() if not p.requires_grad]
        if frozen:
            self.about["weights that are not trained"] = fingerprint(frozen)
        shape = pipeline.config.model
        self.feed = Feed(
            shards, pipeline.text_tokenizer, shape.max_prompt, shape.windows, loop, recipe, device
        )
        self.trained, self.held_out = _spread(self.feed.trained), _spread(self.feed.held_out)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """text (B, T), padding (B,), codes (B, H, W) of step `step`, all of one size, and the
        window to train with."""
        whole = self.feed.piece(step, 0, 1)
        return whole.text, whole.padding, whole.codes, whole.window

    def loss(self, module: nn.Module, step: int, piece: int = 0, pieces: int = 1):
        """The mean loss on the pictures [piece::pieces] of the step's batch."""
        window, text, padding, codes, context, predicted = self.feed.piece(step, piece, pieces)
        with_text = self.recipe.text_loss > 0
        logits = module(text, padding, context, window, targets=codes, with_text=with_text)
        loss, metrics = self.code_loss(logits.codes, module.targets(codes, window))
        if with_text:
            targets = text[:, 1:].masked_fill(
                torch.arange(text.shape[1] - 1, device=text.device) < padding[:, None], -100
            )
            text_logits = logits.text[:, :-1].flatten(0, 1).float()
            text_loss = F.cross_entropy(text_logits, targets.flatten(), reduction="sum") / predicted
            loss = loss + self.recipe.text_loss * text_loss
            metrics["text_loss"] = text_loss.detach()
        return loss, metrics

    def compile(self, module: nn.Module, compiled: Callable) -> None:
        module.embed_codes = compiled(module.embed_codes)
        states = compiled(module.code_states)
        # Their strides depend on the length of the text, which would be one more shape.
        module.code_states = lambda hidden, window: states(hidden.contiguous(), window)
        module.code_logits = compiled(module.code_logits)
        self.code_loss = compiled(self.code_loss)

    def code_loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on logits (B, windows, s * s, codebook_size) of codes (B, windows, s * s)."""
        logits = logits.float()
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        metrics = {"code_loss": loss.detach()}
        if self.recipe.z_loss:
            z = logits.logsumexp(-1).square().mean()
            loss = loss + self.recipe.z_loss * z
            metrics["z"] = z.detach()
        return loss, metrics

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
        visits, area = self.feed.visits, self.shards.stride**2
        total = sum(map(len, visits.values()))
        return [(w * h // area, len(of_size) / total) for (w, h), of_size in visits.items()]

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
        codes = min(VALIDATION_CODES, VALIDATION_LOGITS // self.pipeline.config.model.codebook_size)
        for size in self.shards.sizes:
            of_size, grid = self._of_size(indices, size), self._grid(size, window)
            pixels = self.shards.stride * window
            batch = max(1, min(16, codes * self.shards.stride**2 // math.prod(size)))
            for start in range(0, len(of_size), batch):
                part = of_size[start : start + batch]
                captions = self.feed.captions.first[part]
                framed = self.feed.captions.rows(captions, grid, pixels=pixels)
                tensors = *framed, self.shards.gather(part)
                text, padding, codes = (tensor.to(self.device).long() for tensor in tensors)
                logits = module(text, padding, codes, window).codes.flatten(0, 2)
                targets = shuffle(codes[..., None], window).flatten()
                total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
                count += codes.numel()
        return total / count

    def sheet(self, module: nn.Module) -> Image.Image:
        """Pictures sampled from the first captions of twelve trained and four held-out pictures of
        the first size (of fewer if they are large), with the default settings."""
        size, window = next(iter(self.feed.visits)), self.windows[0]
        grid, pixels = self._grid(size, window), self.shards.stride * window
        quarter = max(1, min(4, SHEET_POSITIONS // (4 * math.prod(grid))))
        prompts = []
        for pool, count in ((self.trained, 3 * quarter), (self.held_out, quarter)):
            of_size = self._of_size(pool, size)[:count]
            prompts += [self.feed.captions.prompt(index, grid, pixels) for index in of_size]
        frame = partial(self.pipeline.text_tokenizer.frame, pixels=pixels, negative=True)
        negative = self.pipeline.encode_prompt("", negative=True)
        generators = [torch.Generator(self.device).manual_seed(i) for i in range(len(prompts))]
        settings = replace(self.pipeline.config.generation, window=window)
        negatives = [frame(negative, *grid, len(prompt)) for prompt in prompts]
        *_, last = sample(
            module, prompts, negatives, grid, settings, generators,
            self.pipeline.text_tokenizer.pad, ahead=1,
        )  # fmt: skip
        engine.release(module)
        images = [
            decode_codes(self.pipeline.image_tokenizer, codes[None], save_memory=True)
            for codes in last.codes
        ]
        return sheet_of(torch.cat(images).movedim(-1, 1), columns=8)

    def save(self, module: nn.Module, path: Path) -> None:
        sizes = ", ".join(f"{width}x{height}" for width, height in self.feed.visits)
        card = self.pipeline.card | {checkpoints.SIZES: sizes}
        replace(self.pipeline, model=module, card=card).save(path)

    def _of_size(self, indices: list[int], size: tuple[int, int]) -> list[int]:
        return [i for i in indices if tuple(self.shards.record(i)["bucket"]) == size]

    def _grid(self, size: tuple[int, int], window: int) -> tuple[int, int]:
        """Rows and columns of windows in a picture of `size` (width, height) pixels."""
        width, height = (side // (window * self.shards.stride) for side in size)
        return height, width


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
            if max(rows, columns) > shape.max_grid or (
                shape.positions(rows, columns) > shape.max_positions
            ):
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

    Parameters whose names start with one of `freeze` do not change. The model's weights become
    float32, since 16 bits would lose small steps. Raises ValueError for quantised weights, and as
    `frozen_names`, `check_codes` and `fit`.
    """
    module = pipeline.model
    check_whole(module)
    engine.release(module)
    module.float()
    for name in frozen_names(module, freeze):
        module.get_parameter(name).requires_grad_(False)
    if lora:
        add_lora(module, lora)
    kind = LoraTask if lora else ModelTask
    task = kind(shards, pipeline, loop, recipe, device)
    module.to(device)
    return fit(module, task, loop, directory, resume)
