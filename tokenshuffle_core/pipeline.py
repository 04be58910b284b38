"""From a prompt to a picture, and between pictures and codes: what the command line and the
ComfyUI nodes both call."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import native as checkpoint
from .config import GenerationConfig
from .engine import windows_ahead
from .image_tokenizer import ImageTokenizer
from .sampler import Progress, decode

MAX_SEED = 2**64


def load(
    path: str | Path = checkpoint.BUNDLED,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> "Pipeline":
    """A pipeline from a checkpoint, the bundled model by default. Raises as `checkpoint.load`."""
    return Pipeline(**vars(checkpoint.load(path, device, dtype)))


class Pipeline(checkpoint.Checkpoint):
    """A loaded checkpoint with the methods that take a prompt to a picture."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt. The empty prompt is allowed: it asks for any picture.

        Raises ValueError where the prompt has more tokens than the model was made for.
        """
        if any("\ud800" <= c <= "\udfff" for c in text):  # half of a pair, as from a broken paste
            raise ValueError("the prompt holds a character that is no text (a lone surrogate)")
        ids = self.text_tokenizer.encode(text)
        if len(ids) > self.config.model.max_prompt:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, this model reads at most "
                f"{self.config.model.max_prompt}: shorten it"
            )
        return ids

    def window(self, settings: GenerationConfig) -> int:
        """The window that is sampled with. Raises ValueError for one that the model lacks."""
        windows = self.config.model.windows
        if settings.window not in (None, *windows):
            raise ValueError(
                f"window {settings.window} is not one that this model serves: "
                f"{', '.join(map(str, windows))}"
            )
        return settings.window or self.config.model.window

    def grid(self, settings: GenerationConfig) -> tuple[int, int]:
        """The picture's (rows, columns) in windows. Raises ValueError with the nearest sizes."""
        model, width, height = self.config.model, settings.width, settings.height
        unit = self.config.image_tokenizer.stride * self.window(settings)
        for name, value in (("width", width), ("height", height)):
            if value % unit or value < unit:
                lower, upper = value // unit * unit, (value // unit + 1) * unit
                raise ValueError(
                    f"{name} {value} does not fit: this model needs a multiple of {unit}, the "
                    f"nearest is {f'{lower} or {upper}' if lower >= unit else unit}"
                )
            if value > unit * model.max_grid:
                raise ValueError(
                    f"{name} {value} is more than the {unit * model.max_grid} pixels that this "
                    "model has size tokens for"
                )
        rows, columns = height // unit, width // unit
        if rows * columns > model.max_positions:
            raise ValueError(
                f"{width}x{height} takes {rows * columns} positions, this model's context holds "
                f"{model.max_positions} beside the prompt: choose a smaller size or a larger window"
            )
        return rows, columns

    def sample(
        self,
        prompt: list[int] | list[list[int]],
        negative: list[int],
        settings: GenerationConfig,
        *,
        seed: int | list[int],
        count: int = 1,
        given: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Iterator[Progress]:
        """Sample `count` pictures; yields after each finished window of the batch.

        `prompt` and `negative` are `encode_prompt`'s ids (a list of prompts gives each picture
        its own). Picture i is drawn with seed + i, or with its own of a list of seeds, and is
        the same in a batch of any size.
        `given` (B, H, W) int64 holds codes to keep, and -1 in the windows to sample. `device`,
        here and below, is where to compute, for a host that keeps weights elsewhere. Raises
        ValueError.
        """
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"the number of pictures must be at least 1, not {count}")
        for each in seed if isinstance(seed, list) else [seed]:
            check_seed(each)
        seeds = seed if isinstance(seed, list) else [seed + i for i in range(count)]
        grid = self.grid(settings)
        prompts = prompt if prompt and isinstance(prompt[0], list) else [prompt] * count
        if len(prompts) != count:
            raise ValueError(f"there are {len(prompts)} prompts for {count} pictures")
        device = device or self.model.head.weight.device
        generators = [torch.Generator(device).manual_seed(seed % MAX_SEED) for seed in seeds]
        if given is not None:
            self._check_given(given, grid, count, self.window(settings))
            given = given.to(device)
        framed = [self.text_tokenizer.frame(ids, *grid) for ids in prompts]
        return decode(
            self.model,
            framed,
            [self.text_tokenizer.frame(negative, *grid, len(each)) for each in framed],
            grid,
            settings,
            generators,
            self.text_tokenizer.pad,
            given,
            windows_ahead(self.model, device, count),
        )

    def _check_given(self, given: Tensor, grid: tuple[int, int], count: int, window: int) -> None:
        expected = (count, grid[0] * window, grid[1] * window)
        if given.shape != expected:
            raise ValueError(
                f"the given codes have the shape {tuple(given.shape)}, the pictures need {expected}"
            )
        if given.max() >= self.config.model.codebook_size:
            raise ValueError(
                f"the given codes go up to {given.max()}, this model's codebook ends at "
                f"{self.config.model.codebook_size - 1}: they come from another image tokenizer"
            )
        kept = given >= 0
        first = kept[:1, ::window, ::window].repeat_interleave(window, 1)
        if not torch.equal(kept, first.repeat_interleave(window, 2).expand_as(kept)):
            raise ValueError(f"the given codes must fill whole windows of {window} x {window}")

    def generate(
        self,
        prompt: str,
        negative: str = "",
        settings: GenerationConfig | None = None,
        *,
        seed: int = 0,
        count: int = 1,
        tiled: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """Prompt -> images float32 (count, height, width, 3) in 0..1, on the CPU.

        `settings` are the checkpoint's own where none are given; `progress` is called after each
        window. Raises ValueError with one sentence for whatever does not fit.
        """
        settings = settings or self.config.generation
        prompt_ids, negative_ids = self.encode_prompt(prompt), self.encode_prompt(negative)
        for step in self.sample(prompt_ids, negative_ids, settings, seed=seed, count=count):
            if progress:
                progress(step)
        return self.decode(step.codes, tiled)

    def decode(
        self, codes: Tensor, tiled: bool = False, device: torch.device | None = None
    ) -> Tensor:
        """Codes int64 (B, h, w) -> images float32 (B, H, W, 3) in 0..1, on the CPU."""
        return decode_codes(self.image_tokenizer, codes, tiled, device)

    def encode(self, images: Tensor, device: torch.device | None = None) -> Tensor:
        """Images float (B, H, W, 3) in 0..1 -> codes int64 (B, h, w), on the CPU."""
        return encode_images(self.image_tokenizer, images, device)


def check_seed(seed: int) -> None:
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed must be from 0 to {MAX_SEED - 1}, not {seed}")


@torch.inference_mode()
def decode_codes(
    image_tokenizer: ImageTokenizer,
    codes: Tensor,
    tiled: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """As `Pipeline.decode`, with an image tokenizer alone. Raises ValueError for foreign codes."""
    if codes.ndim != 3 or codes.is_floating_point():
        raise ValueError(
            f"codes must be whole numbers of shape (batch, rows, columns), not {codes.dtype} of "
            f"shape {tuple(codes.shape)}"
        )
    device = device or image_tokenizer.quantizer.codebook.weight.device
    images = image_tokenizer.decode(codes.to(device, torch.int64), tiled)
    return images.movedim(1, -1).float().cpu()


@torch.inference_mode()
def encode_images(
    image_tokenizer: ImageTokenizer, images: Tensor, device: torch.device | None = None
) -> Tensor:
    """As `Pipeline.encode`, with an image tokenizer alone."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"a picture must be RGB, with shape (batch, height, width, 3), not "
            f"{tuple(images.shape)}: flatten its alpha channel first"
        )
    weight = image_tokenizer.quantizer.codebook.weight
    images = images.movedim(-1, 1).to(device or weight.device, weight.dtype)
    return image_tokenizer.encode(images).cpu()
