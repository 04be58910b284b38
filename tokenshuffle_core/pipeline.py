"""Prompts to pictures, and pictures to codes and back: the interface that Python, the command line
and the ComfyUI nodes use."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import checkpoints, engine
from .checks import check_codes, check_given, check_pictures, check_sides, check_text, check_whole
from .config import Config, GenerationConfig
from .image_tokenizer import ImageTokenizer
from .model import TokenShuffleModel
from .reading import Reader, Reading
from .sampler import Progress, sample
from .text_tokenizer import PromptEncoder
from .vocabulary import Vocabulary

MAX_SEED = 2**64
MAX_PICTURES = 10**6  # of one call: each has a seed in memory


class Pictures(NamedTuple):
    """Finished pictures, on the CPU."""

    images: Tensor  # (B, height, width, 3) float32 in 0..1
    codes: Tensor  # (B, rows, columns) int64


def load(
    path: str | Path = checkpoints.BUNDLED,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    image_tokenizer: str | Path | None = None,
    weights: str | None = None,
) -> "Pipeline":
    """Load the bundled model, a checkpoint, or a model of another family as published, onto
    `device`.

    `path` is a file or a folder. `dtype` applies to the model: by default `default_dtype(device)`,
    except that on an x86 CPU, linear layers stay in the 16 bits of their file and compute in
    float32. The image tokenizer, which is small, is float32. `image_tokenizer` is the image
    tokenizer's file where the model does not include it: a LLaMA needs one. `weights` is a kind of
    small weights, which the model's become as they are read. Raises FileNotFoundError, or
    ValueError with one sentence that names the file.
    """
    checkpoint = checkpoints.read(path, image_tokenizer=image_tokenizer)
    if weights:
        dtype = dtype or checkpoints.default_dtype(device)
        checkpoint = checkpoint.quantized(weights, dtype)
    return Pipeline(
        checkpoint.config,
        checkpoint.load_model(device, dtype),
        checkpoint.load_image_tokenizer(device),
        checkpoint.text_tokenizer,
        checkpoint.card,
        checkpoint.vocabulary,
    )


@dataclass
class Pipeline:
    """A model in memory: its modules, prompt encoder, model card and, if closed, vocabulary."""

    config: Config
    model: TokenShuffleModel
    image_tokenizer: ImageTokenizer
    text_tokenizer: PromptEncoder
    card: dict[str, str]
    vocabulary: Vocabulary | None = None

    def generate(
        self,
        prompt: str,
        negative: str = "",
        settings: GenerationConfig | None = None,
        *,
        seed: int = 0,
        count: int = 1,
        save_memory: bool = False,
    ) -> Pictures:
        """Draw `count` pictures; picture i depends on seed + i only, not on the batch size.

        `settings` default to the checkpoint's; `save_memory` as in `decode`. Raises ValueError with
        one sentence for anything that the model does not support.
        """
        *_, last = self.stream(prompt, negative, settings, seed=seed, count=count)
        return Pictures(self.decode(last.codes, save_memory), last.codes.cpu())

    def stream(
        self,
        prompt: str,
        negative: str = "",
        settings: GenerationConfig | None = None,
        *,
        seed: int = 0,
        count: int = 1,
    ) -> Iterator[Progress]:
        """As `generate`, but yields after each window, with code 0 in unfinished ones. The last
        result holds all codes, for `decode`."""
        settings, seeds = settings or self.config.generation, seeds_from(seed, count)
        prompts = [self.encode_prompt(prompt)] * count
        negative_ids = self.encode_prompt(negative, negative=True)
        return self.sample(prompts, negative_ids, settings, seeds)

    def sample(
        self,
        prompts: list[list[int]],
        negative: list[int],
        settings: GenerationConfig,
        seeds: list[int],
        *,
        given: Tensor | None = None,
        device: torch.device | None = None,
        ahead: int | None = None,
        engine: bool = True,
    ) -> Iterator[Progress]:
        """As `stream`, with the ids (from `encode_prompt`) and the seed of each picture.

        `given` (B, H, W) int64 holds codes to keep, and -1 in the windows to sample. `device`, here
        and below, is the one to compute on, for a host that keeps weights on another. `ahead` and
        `engine` only change speed: see `sampler.sample`. Raises ValueError.
        """
        for seed in seeds:
            check_seed(seed)
        if len(prompts) != len(seeds):
            raise ValueError(f"there are {len(prompts)} prompts for {len(seeds)} seeds")
        grid = self.grid(settings)
        device = device or self.model.head.weight.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        if given is not None:
            window, codes = self.window(settings), self.config.model.codebook_size
            check_given(given, (len(seeds), *(side * window for side in grid)), codes, window)
            given = given.to(device)
        frame = partial(
            self.text_tokenizer.frame, rows=grid[0], columns=grid[1],
            pixels=self.config.image_tokenizer.stride * self.window(settings),
        )  # fmt: skip
        framed = [frame(ids) for ids in prompts]
        return sample(
            self.model,
            framed,
            [frame(negative, length=len(each), negative=True) for each in framed],
            grid,
            settings,
            generators,
            self.text_tokenizer.pad,
            given,
            ahead,
            engine,
        )

    def encode_prompt(self, text: str, *, negative: bool = False) -> list[int]:
        """Token ids of a prompt, or of a negative one; "" asks for any picture. A model that reads
        classes takes the number or the name of one.

        Raises ValueError for what is no text or has more tokens than the model reads.
        """
        name = "the negative prompt" if negative else "the prompt"
        check_text(name, text)
        ids, most = self.text_tokenizer.encode(text, negative), self.config.model.max_prompt
        if len(ids) > most:
            raise ValueError(
                f"{name} has {len(ids)} tokens, this model reads at most {most}: shorten it"
            )
        return ids

    def encode_class(self, name: str) -> list[int]:
        """As `encode_prompt`, for what only a model that reads classes may draw."""
        if self.text_tokenizer.kind != "classes":
            raise ValueError("this model reads text, not classes: give it a prompt")
        check_text("the class", name)
        return self.encode_prompt(name)

    def read_prompt(self, text: str, language: str | None = None) -> Reading:
        """What a model with a closed vocabulary recognises in a prompt, with the names of subjects
        in `language`; an empty reading for any other model. Raises ValueError for no text."""
        check_text("the prompt", text)
        if not self.vocabulary:
            return Reading()
        return Reader(self.vocabulary, self.text_tokenizer.normalise).read(text, language)

    def window(self, settings: GenerationConfig) -> int:
        """The window to sample with. Raises ValueError if the model does not support it."""
        windows = self.config.model.windows
        if settings.window not in (None, *windows):
            raise ValueError(
                f"window {settings.window} is not one of this model's: "
                f"{', '.join(map(str, windows))}"
            )
        return settings.window or self.config.model.window

    def grid(self, settings: GenerationConfig) -> tuple[int, int]:
        """The picture's (rows, columns) in windows. Raises ValueError naming the nearest sizes."""
        checkpoints.check_size(self.config, self.card, settings)
        model, width, height = self.config.model, settings.width, settings.height
        unit = self.config.image_tokenizer.stride * self.window(settings)
        check_sides(width, height, unit)
        for name, value in (("width", width), ("height", height)):
            if value > unit * model.max_grid:
                raise ValueError(
                    f"{name} {value} is too large: this model has size tokens for at most "
                    f"{unit * model.max_grid} pixels"
                )
        rows, columns = height // unit, width // unit
        positions = model.positions(rows, columns)
        if positions > model.max_positions:
            share = (model.max_positions / positions) ** 0.5
            sides = [max(1, int(side * share)) * unit for side in (columns, rows)]
            raise ValueError(
                f"{width}x{height} takes {positions} positions, this model's context has "
                f"{model.max_positions} beside the prompt: choose a smaller size, such as "
                f"{sides[0]}x{sides[1]}, or a larger window"
            )
        return rows, columns

    def decode(
        self, codes: Tensor, save_memory: bool = False, device: torch.device | None = None
    ) -> Tensor:
        """Codes int64 (B, h, w) -> images float32 (B, H, W, 3) in 0..1, on the CPU. `save_memory`
        is slower for large pictures. Raises ValueError for codes of another model."""
        return decode_codes(self.image_tokenizer, codes, save_memory, device)

    def encode(self, images: Tensor, device: torch.device | None = None) -> Tensor:
        """Images float (B, H, W, 3) in 0..1 -> codes int64 (B, h, w), on the CPU. Raises ValueError
        for sizes that are not multiples of the image tokenizer's stride."""
        return encode_images(self.image_tokenizer, images, device)

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint file; `dtype` converts all but quantised weights, and is by default
        the type that the model computes in. Raises OSError."""
        checkpoints.save(path, **vars(self), dtype=dtype)


def seeds_from(seed: int, count: int) -> list[int]:
    """The seeds of `count` pictures: seed, seed + 1, ..., wrapping at 2^64. Raises ValueError."""
    check_seed(seed)
    check_whole("the number of pictures", count, 1, MAX_PICTURES)
    return [(seed + i) % MAX_SEED for i in range(count)]


def check_seed(seed: int) -> None:
    check_whole("seed", seed, 0, MAX_SEED - 1)


@torch.inference_mode()
def decode_codes(
    image_tokenizer: ImageTokenizer,
    codes: Tensor,
    save_memory: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """As `Pipeline.decode`, without a model."""
    check_codes(codes)
    device = device or image_tokenizer.quantizer.codebook.weight.device
    with engine.threads(image_tokenizer, device)(codes.numel()):
        images = image_tokenizer.decode(codes.to(device, torch.int64), save_memory)
    return images.movedim(1, -1).float().cpu()


@torch.inference_mode()
def encode_images(
    image_tokenizer: ImageTokenizer, images: Tensor, device: torch.device | None = None
) -> Tensor:
    """As `Pipeline.encode`, without a model."""
    check_pictures(images)
    weight = image_tokenizer.quantizer.codebook.weight
    images = images.movedim(-1, 1).to(device or weight.device, weight.dtype)
    codes = images[:, 0].numel() // image_tokenizer.config.stride**2
    with engine.threads(image_tokenizer, images.device)(codes):
        return image_tokenizer.encode(images).cpu()
