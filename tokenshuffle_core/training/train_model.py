"""Training of the unified model on codes that are extracted once and cached."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .. import checkpoint
from ..config import Config
from ..files import atomic_path
from ..image_tokenizer import ImageTokenizer
from ..model import TokenShuffleModel
from ..sampler import decode, pad_left
from ..text_tokenizer import TextTokenizer
from . import captions
from .emoji import read_manifest
from .loop import LoopConfig, batch_indices, fit, generator
from .pictures import BACKGROUNDS, composite, load_rgba, pad_to, sheet_of

CPU = torch.device("cpu")
DROP_PROMPT = 0.1  # the share of captions dropped, which teaches the unconditional branch
WHITE_SHARE = 0.8  # the share of pictures on white; the rest spreads over the other colours
VALIDATION_PICTURES = 64


class ModelTask:
    """Cross-entropy on the codes; optionally z-loss and a text loss."""

    def __init__(
        self,
        data: Path,
        directory: Path,
        parts: checkpoint.Checkpoint,
        loop: LoopConfig,
        *,
        context_noise: float,
        z_loss: float,
        text_loss: float,
        sizes: list[tuple[int, int]] | None,
        device: torch.device,
    ):
        records = read_manifest(data)
        self.parts = parts
        self.loop = loop
        self.device = device
        self.context_noise, self.z_loss, self.text_loss = context_noise, z_loss, text_loss
        self.codes = extract_codes(
            data, directory, records, parts.image_tokenizer, sizes, parts.config.pixels_per_window
        )
        self.records = records
        self.train = [i for i, r in enumerate(records) if r["split"] == "train"]
        self.held_out = [i for i, r in enumerate(records) if r["split"] == "held-out"]

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """text (B, T), padding (B,), codes (B, H, W) of step `step`, all of one size."""
        index = batch_indices(len(self.train), self.loop.batch, step, self.loop.seed)
        rng = random.Random(self.loop.seed * 1_000_003 + step)
        size_codes = self.codes[rng.randrange(len(self.codes))]
        grid = self._grid(size_codes)
        colours = list(BACKGROUNDS)
        ids, codes = [], []
        for i in index.tolist():
            white = rng.random() < WHITE_SHARE
            background = 0 if white else rng.randrange(1, len(colours))
            record = self.records[self.train[i]]
            caption = captions.write(record, colours[background], rng)
            ids.append(self._frame("" if rng.random() < DROP_PROMPT else caption, grid))
            codes.append(size_codes[background, self.train[i]])
        text, padding = pad_left(ids, self.parts.text_tokenizer.pad, self.device)
        return text, padding, torch.stack(codes).long().to(self.device)

    def loss(self, module: TokenShuffleModel, step: int):
        text, padding, codes = self.batch(step)
        context = self._foreign_windows(codes, step) if self.context_noise else codes
        logits = module(text, padding, context, with_text=self.text_loss > 0)
        code_loss = F.cross_entropy(logits.codes.flatten(0, 2), module.targets(codes).flatten())
        loss, metrics = code_loss, {"code_loss": code_loss.detach()}
        if self.z_loss:
            z = logits.codes.logsumexp(-1).square().mean()
            loss = loss + self.z_loss * z
            metrics["z"] = z.detach()
        if self.text_loss:
            targets = text[:, 1:].masked_fill(
                torch.arange(text.shape[1] - 1, device=text.device) < padding[:, None], -100
            )
            text_loss = F.cross_entropy(logits.text[:, :-1].flatten(0, 1), targets.flatten())
            loss = loss + self.text_loss * text_loss
            metrics["text_loss"] = text_loss.detach()
        return loss, metrics

    def _foreign_windows(self, codes: Tensor, step: int) -> Tensor:
        """The codes (B, H, W) with some windows of each picture taken from its neighbour.

        A small data set is memorised: without this the model learns to recognise the picture by
        its first windows and to ignore the prompt, and when it samples, one wrong window leads
        into another picture. The idea is that of scheduled sampling (arXiv 1506.03099). Each
        picture has its own share of foreign windows, up to `context_noise`, so that a clean
        context is trusted.
        """
        random = generator(self.loop.seed + 3, step)
        rows, columns = self._grid(codes)
        share = self.context_noise * torch.rand(len(codes), 1, 1, generator=random)
        foreign = torch.rand(len(codes), rows, columns, generator=random) < share
        window = self.parts.config.model.window
        foreign = foreign.repeat_interleave(window, 1).repeat_interleave(window, 2)
        return torch.where(foreign.to(codes.device), codes.roll(1, 0), codes)

    def validate(self, module: TokenShuffleModel) -> dict[str, float]:
        """Nats per code on white, in the first size: held-out pairs, and trained ones beside."""
        return {
            "validation_loss": self._loss_of(module, self.held_out[:VALIDATION_PICTURES]),
            "trained_loss": self._loss_of(module, self.train[:VALIDATION_PICTURES]),
        }

    def _loss_of(self, module: TokenShuffleModel, index: list[int]) -> float:
        if not index:
            return float("nan")
        records = [self.records[i] for i in index]
        grid = self._grid(self.codes[0])
        ids = [self._frame(captions.prompt(r["subject"], r["style"]), grid) for r in records]
        text, padding = pad_left(ids, self.parts.text_tokenizer.pad, self.device)
        codes = self.codes[0][0, index].long().to(self.device)
        logits = module(text, padding, codes).codes
        return F.cross_entropy(logits.flatten(0, 2), module.targets(codes).flatten()).item()

    def sheet(self, module: TokenShuffleModel) -> Image.Image:
        """Twelve trained pairs and four held-out ones, sampled with the default settings in the
        last size."""
        spread = self.train[:: max(1, len(self.train) // 12)][:12] + self.held_out[:4]
        records = [self.records[i] for i in spread]
        grid = self._grid(self.codes[-1])
        prompts = [self._frame(captions.prompt(r["subject"], r["style"]), grid) for r in records]
        settings = self.parts.config.generation
        generators = [torch.Generator(self.device).manual_seed(i) for i in range(len(prompts))]
        *_, last = decode(
            module, prompts, [self._frame("", grid)] * len(prompts), grid, settings,
            generators, self.parts.text_tokenizer.pad,
        )  # fmt: skip
        return sheet_of(self.parts.image_tokenizer.decode(last.codes.cpu()), columns=8)

    def save(self, module: TokenShuffleModel, path: Path) -> None:
        stride = self.parts.config.image_tokenizer.stride
        sizes = [f"{c.shape[-1] * stride}x{c.shape[-2] * stride}" for c in self.codes]
        card = self.parts.card | {checkpoint.SIZES: ", ".join(sizes)}
        checkpoint.save(path, replace(self.parts, model=module, card=card))

    def _grid(self, codes: Tensor) -> tuple[int, int]:
        height, width = codes.shape[-2:]
        window = self.parts.config.model.window
        return height // window, width // window

    def _frame(self, caption: str, grid: tuple[int, int]) -> list[int]:
        tokenizer = self.parts.text_tokenizer
        return tokenizer.frame(tokenizer.encode(caption), *grid)


@torch.inference_mode()
def extract_codes(
    data: Path,
    directory: Path,
    records: list[dict],
    image_tokenizer: ImageTokenizer,
    sizes: list[tuple[int, int]] | None,
    unit: int,
) -> list[Tensor]:
    """For each size (width, height), codes int16 (backgrounds, N, H, W) of every picture in the
    middle of every background; `sizes` None is the pictures' own size.

    The codes are cached on disk, for the same pictures and the same image tokenizer. Raises
    ValueError for a size that the pictures do not fit into or that is no multiple of `unit`.
    """
    rgba = load_rgba(data, records)
    least = tuple(rgba.shape[:1:-1])
    sizes = sizes or [least]
    for width, height in sizes:
        if width % unit or height % unit or width < least[0] or height < least[1]:
            raise ValueError(
                f"size {width}x{height} does not fit: each side must be a multiple of {unit} and "
                f"the pictures are {least[0]}x{least[1]}"
            )
    digest = hashlib.sha256()
    for name, weight in image_tokenizer.state_dict().items():
        digest.update(name.encode() + weight.numpy().tobytes())
    for record in records:
        digest.update(record["image"].encode() + (data / record["image"]).read_bytes())
    directory.mkdir(parents=True, exist_ok=True)
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.uint8)
    extracted = []
    for width, height in sizes:
        path = directory / f"codes-{width}x{height}-{digest.hexdigest()[:16]}.safetensors"
        if not path.exists():
            codes = []
            total = len(colours) * len(rgba)
            bar = tqdm(total=total, desc=f"{width}x{height}", unit="picture", disable=None)
            for colour in colours:
                parts = []
                for part in rgba.split(32):
                    images = composite(pad_to(part, width, height), colour.expand(len(part), 3))
                    parts.append(image_tokenizer.encode(images))
                    bar.update(len(part))
                codes.append(torch.cat(parts).to(torch.int16))
            bar.close()
            with atomic_path(path) as temporary:
                save_file({"codes": torch.stack(codes)}, temporary)
        extracted.append(load_file(path)["codes"])
    return extracted


def train_text_tokenizer(records: list[dict], vocabulary: int, max_grid: int) -> TextTokenizer:
    """A tokenizer trained on a few thousand captions, every record in every background."""
    rng = random.Random(0)
    texts = [captions.write(record, colour, rng) for record in records for colour in BACKGROUNDS]
    texts += [name for record in records for names in record["names"].values() for name in names]
    return TextTokenizer.train(texts, vocabulary, max_grid)


def fresh_parts(
    data: Path, image_tokenizer: Path, config: Config, text_tokenizer: Path | None
) -> checkpoint.Checkpoint:
    """A model with fresh weights, with the tokenizers that it is to be trained with."""
    images = checkpoint.load_image_tokenizer(image_tokenizer)
    max_grid = config.model.max_grid
    text = (
        TextTokenizer.from_file(text_tokenizer, max_grid)
        if text_tokenizer
        else train_text_tokenizer(read_manifest(data), config.model.text_vocabulary, max_grid)
    )
    config = Config(
        images.config, replace(config.model, text_vocabulary=len(text)), config.generation
    )
    module = TokenShuffleModel(config.model)
    module.initialise()
    return checkpoint.Checkpoint(config, module, images, text, {})


def train_model(
    data: Path,
    image_tokenizer: Path | None,
    directory: Path,
    config: Config,
    loop: LoopConfig,
    *,
    init: Path | None = None,
    sizes: list[tuple[int, int]] | None = None,
    card: dict[str, str] | None = None,
    text_tokenizer: Path | None = None,
    context_noise: float = 0.0,
    z_loss: float = 0.0,
    text_loss: float = 0.0,
    resume: bool = False,
    device: torch.device = CPU,
) -> Path:
    """Train a model on the data set in `data`; returns the path of the finished checkpoint.

    Either fresh weights over the image tokenizer in `image_tokenizer`, or all of the checkpoint
    `init`: its weights, its shape and its tokenizers, so that `config` and `text_tokenizer` do
    not count. A step takes one of `sizes` (width, height) at random, the pictures' own where
    None. `config.model.text_vocabulary` is an upper bound: the model gets as many embeddings as
    the text tokenizer has tokens.
    """
    torch.manual_seed(loop.seed)
    if init:
        parts = checkpoint.load(init)
    else:
        parts = fresh_parts(data, image_tokenizer, config, text_tokenizer)
    parts = replace(parts, card=card or {})
    module = parts.model
    task = ModelTask(
        data,
        directory,
        parts,
        loop,
        context_noise=context_noise,
        z_loss=z_loss,
        text_loss=text_loss,
        sizes=sizes,
        device=device,
    )
    module.to(device)
    return fit(module, task, loop, directory, resume)
