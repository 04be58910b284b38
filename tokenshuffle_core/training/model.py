"""Training of the unified model on codes that were extracted once."""

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

from .. import checkpoints
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
VALIDATION_CODES = 8192  # at once: each takes as many logits as the codebook has codes
SHEET_POSITIONS = 8192  # of the pictures of a sheet together, which are sampled at once


class ModelTask(Task):
    """Cross-entropy on the codes; optionally z-loss and a text loss."""

    def __init__(
        self,
        shards: CodeShards,
        parts: Pipeline,
        loop: LoopConfig,
        recipe: Recipe,
        device: torch.device,
    ):
        super().__init__()
        check_codes(shards, parts.image_tokenizer, parts.config.model, recipe)
        self.shards, self.parts, self.recipe, self.device = shards, parts, recipe, device
        self.seed = loop.seed
        self.idle_parameters = len(parts.config.model.windows) > 1  # those of the other windows
        self.about = {
            "codes": sha256([json.dumps(shards.index).encode()]),
            "text tokenizer": sha256([parts.text_tokenizer.to_json().encode()]),
        }
        frozen = [(n, p) for n, p in parts.model.named_parameters() if not p.requires_grad]
        if frozen:
            self.about["weights that are not trained"] = fingerprint(frozen)
        self.visits, held_out = {}, []  # size -> indices, as often as an epoch visits them
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
        self.cuts = False  # whether a caption was too long
        self.trained = _spread(trained.tolist())
        self.held_out = _spread(held_out)
        self.latest = None  # step and batch: the pieces of a step share it

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """text (B, T), padding (B,), codes (B, H, W) of step `step`, all of one size, and the
        window it is trained with."""
        rng = random.Random(self.seed * 1_000_003 + step)
        windows = self.parts.config.model.windows
        (window,) = rng.choices(windows, self.recipe.window_mix)
        _, indices = self.batches.at(step)
        captions = []
        for record in map(self.shards.record, indices.tolist()):
            dropped = rng.random() < self.recipe.drop_prompt
            captions.append("" if dropped else rng.choice(record["captions"]))
        return *self._tensors(indices.tolist(), captions, window), window

    def loss(self, module: nn.Module, step: int, piece: int = 0, pieces: int = 1):
        """The mean loss of every `pieces`-th picture of the step's batch, from `piece` on."""
        if self.latest is None or self.latest[0] != step:
            self.latest = step, self.batch(step)
        text, padding, codes, window = self.latest[1]
        context = self.foreign_windows(codes, window, step) if self.recipe.context_noise else codes
        predicted = (text.shape[1] - 1 - padding).sum() / pieces  # text tokens of a mean piece
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
        """The codes (B, H, W) with some windows of each picture taken from its neighbour.

        A small data set is memorised: without this the model learns to recognise the picture by
        its first windows and to ignore the prompt, and when it samples, one wrong window leads
        into another picture. A large data set is not memorised and needs none of it. The idea is
        that of scheduled sampling (arXiv 1506.03099). Each picture has its own share of foreign
        windows, up to `context_noise`, so that a clean context is trusted.
        """
        random = generator(self.seed + 3, step)
        rows, columns = codes.shape[1] // window, codes.shape[2] // window
        share = self.recipe.context_noise * torch.rand(len(codes), 1, 1, generator=random)
        foreign = torch.rand(len(codes), rows, columns, generator=random) < share
        foreign = foreign.repeat_interleave(window, 1).repeat_interleave(window, 2)
        return torch.where(foreign, codes.roll(1, 0), codes)

    def codes_per_sample(self) -> float:
        return self._mean_over_visits(lambda codes: codes)

    def flops_per_sample(self) -> float:
        windows = self.parts.config.model.windows
        mix = self.recipe.window_mix or (1,) * len(windows)
        return sum(
            share * self._mean_over_visits(lambda c, w=w: training_flops(self.parts.model, c, w))
            for w, share in zip(windows, mix, strict=True)
        ) / sum(mix)

    def _mean_over_visits(self, of) -> float:
        """The mean of `of`, a function of a picture's number of codes, over an epoch."""
        stride = self.shards.stride
        counts = {s: len(visits) for s, visits in self.visits.items()}
        total = sum(n * of(w * h // stride**2) for (w, h), n in counts.items())
        return total / sum(counts.values())

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Nats per code with each picture's first caption: held-out pictures, and trained ones."""
        scores = {}
        windows = self.parts.config.model.windows
        for window in windows:
            suffix = f"_window_{window}" if len(windows) > 1 else ""
            if self.held_out:
                scores[f"validation_loss{suffix}"] = self._loss_of(module, self.held_out, window)
            scores[f"trained_loss{suffix}"] = self._loss_of(module, self.trained, window)
        return scores

    def _loss_of(self, module: nn.Module, indices: list[int], window: int) -> float:
        total, count = 0.0, 0
        for size in self.shards.sizes:
            of_size = [i for i in indices if tuple(self.shards.record(i)["bucket"]) == size]
            at_once = max(1, min(16, VALIDATION_CODES * self.shards.stride**2 // math.prod(size)))
            for start in range(0, len(of_size), at_once):
                part = of_size[start : start + at_once]
                captions = [self.shards.record(i)["captions"][0] for i in part]
                tensors = self._tensors(part, captions, window)
                text, padding, codes = (tensor.to(self.device) for tensor in tensors)
                logits = module(text, padding, codes, window).codes.flatten(0, 2)
                targets = shuffle(codes[..., None], window).flatten()
                total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
                count += codes.numel()
        return total / count

    def sheet(self, module: nn.Module) -> Image.Image:
        """Twelve trained pictures and four held-out ones of the first size, fewer of large ones,
        sampled anew from their first captions with the default settings."""
        size = next(iter(self.visits))
        window = self.parts.config.model.window
        grid = self._grid([side // self.shards.stride for side in reversed(size)], window)
        quarter = max(1, min(4, SHEET_POSITIONS // (4 * math.prod(grid))))
        chosen = [
            i
            for pool, count in ((self.trained, 3 * quarter), (self.held_out, quarter))
            for i in [i for i in pool if tuple(self.shards.record(i)["bucket"]) == size][:count]
        ]
        captions = [self.shards.record(i)["captions"][0] for i in chosen]
        prompts = [self._frame(caption, grid) for caption in captions]
        generators = [torch.Generator(self.device).manual_seed(i) for i in range(len(prompts))]
        settings = replace(self.parts.config.generation, window=window)
        *_, last = sample(
            module, prompts, [self._frame("", grid, len(p)) for p in prompts], grid, settings,
            generators, self.parts.text_tokenizer.pad, engine=False,
        )  # fmt: skip
        images = [
            decode_codes(self.parts.image_tokenizer, codes[None], save_memory=True)
            for codes in last.codes
        ]
        return sheet_of(torch.cat(images).movedim(-1, 1), columns=8)

    def save(self, module: nn.Module, path: Path) -> None:
        sizes = ", ".join(f"{width}x{height}" for width, height in self.visits)
        card = self.parts.card | {checkpoints.SIZES: sizes}
        replace(self.parts, model=module, card=card).save(path)

    def _tensors(self, indices, captions, window: int) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.stack([self.shards.codes(i) for i in indices])
        grid = self._grid(codes.shape[1:], window)
        pad = self.parts.text_tokenizer.pad
        longest = max(len(self._frame(caption, grid)) for caption in captions)
        text, padding = pad_left([self._frame(c, grid, longest) for c in captions], pad, CPU)
        return text, padding, codes

    def _grid(self, shape, window: int) -> tuple[int, int]:
        height, width = shape
        return height // window, width // window

    def _frame(self, caption: str, grid: tuple[int, int], length: int = 0) -> list[int]:
        """`length`: see TextTokenizer.frame."""
        tokenizer = self.parts.text_tokenizer
        ids, longest = tokenizer.encode(caption), self.parts.config.model.max_prompt
        if len(ids) > longest and not self.cuts and rank() == 0:
            self.cuts = True
            print(
                f"note: a caption has {len(ids)} tokens, the model reads {longest}: the ends of "
                f"such captions are cut: {caption[:60]}...",
                file=sys.stderr,
            )
        return tokenizer.frame(ids[:longest], *grid, length)


def check_codes(
    shards: CodeShards, image_tokenizer: ImageTokenizer, shape: ModelConfig, recipe: Recipe
) -> None:
    """Raises ValueError where a model of such a shape cannot be trained so on the codes."""
    shards.check(image_tokenizer)
    if recipe.window_mix and len(recipe.window_mix) != len(shape.windows):
        raise ValueError(
            f"window_mix has {len(recipe.window_mix)} shares for the windows "
            f"{', '.join(map(str, shape.windows))}"
        )
    if shards.index["held_out"] == shards.index["pictures"]:
        raise ValueError("none of the pictures is for training: all are held out")
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
                    f"{window}, the model takes {shape.max_grid} a side and {shape.max_positions} "
                    "in all: extract the codes at smaller sizes, or choose a larger window"
                )


def frozen_names(module: nn.Module, freeze: tuple[str, ...]) -> list[str]:
    """The names of the parameters that start with one of `freeze`. Raises ValueError where there
    are none of such a name."""
    names = [name for name, _ in module.named_parameters()]
    for prefix in freeze:
        if not any(name.startswith(prefix) for name in names):
            parts_of_it = ", ".join(name for name, _ in module.named_children())
            raise ValueError(f"freeze: the model has no part {prefix!r}, only {parts_of_it}")
    return [name for name in names if name.startswith(freeze)]


def training_flops(model: TokenShuffleModel, codes: int, window: int) -> float:
    """FLOPs of forward and backward for a picture of `codes` codes: 6 N T + 12 L d T^2 for T
    transformer positions (PaLM, arXiv 2204.02311, appendix B).

    N counts the weights of the matrices that one position passes, s * s times those that each of
    the window's codes passes. Text, a few dozen positions, is left out.
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
    """At most VALIDATION_PICTURES of them, from the first to the last."""
    return indices[:: -(-len(indices) // VALIDATION_PICTURES) or 1]


class LoraTask(ModelTask):
    """As `ModelTask`, of a model that `add_lora` has prepared: only the LoRA is saved."""

    def save(self, module: nn.Module, path: Path) -> None:
        save_lora(path, module, self.parts.card)


def train_model(
    shards: CodeShards,
    directory: Path,
    parts: Pipeline,
    loop: LoopConfig,
    recipe: Recipe,
    *,
    lora: int = 0,
    freeze: tuple[str, ...] = (),
    resume: bool = False,
    device: torch.device = CPU,
) -> Path:
    """Train the model of `parts` on the codes of `shards`; returns the path of the
    finished checkpoint, or of the LoRA where its rank `lora` is above 0.

    Parameters whose names start with one of `freeze` stay as they are. Raises ValueError where
    there are none of such a name.
    """
    module = parts.model
    for name in frozen_names(module, freeze):
        module.get_parameter(name).requires_grad_(False)
    if lora:
        add_lora(module, lora)
    kind = LoraTask if lora else ModelTask
    task = kind(shards, parts, loop, recipe, device)
    module.to(device)
    return fit(module, task, loop, directory, resume)
