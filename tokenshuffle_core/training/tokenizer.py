"""Training of the image tokenizer on random crops of pictures.

It is convolutional, so it learns from crops what it would from whole pictures, at a fraction of
the cost. The last part of the training uses whole pictures, because GroupNorm and attention depend
on the size.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import checkpoints
from ..config import ImageTokenizerConfig
from ..data.buckets import scale_and_crop
from ..data.sources import Item, read_items
from ..files import sha256
from ..image_tokenizer import ImageTokenizer
from ..images import sheet_of, to_tensor
from .batches import Batches
from .distributed import max_of_all, rank
from .loop import Task, fit, generator
from .settings import LoopConfig

CPU = torch.device("cpu")
WHOLE_SHARE = 0.15  # share of the steps, at the end, that use whole pictures
UNQUANTISED = 200  # first steps, as a plain autoencoder: its latents initialise the codebook
UNQUANTISED_SHARE = 0.1  # of a short training
REVIVE_EVERY = 100  # steps between replacements of unused codes
VALIDATION_PICTURES = 64
READERS = 8  # threads that decode and scale pictures, for which Pillow releases the GIL


class TokenizerTask(Task):
    """L1 + L2 + edge (finite difference) reconstruction losses, and the codebook's."""

    idle_parameters = True  # the codebook's, in the first steps

    def __init__(
        self,
        items: list[Item],
        config: LoopConfig,
        crop: int,
        side: int,
        codebook_size: int,
        device: torch.device,
        trained: bool = False,
    ):
        """A codebook that is already `trained` is used from the first step on."""
        super().__init__()
        self.config, self.crop, self.side, self.device = config, crop, side, device
        self.train = [item for item in items if item.split == "train"]
        self.unreadable: set[str] = set()  # keys
        self.about = {"pictures": sha256(["\n".join(item.key for item in self.train).encode()])}
        held_out = [item for item in items if item.split == "held-out"] or self.train
        step = max(1, len(held_out) // VALIDATION_PICTURES)
        places = range(0, len(held_out), step)[:VALIDATION_PICTURES]
        self.validation = to_tensor([self._square(held_out, i) for i in places]).to(device)
        visits = [i for i, item in enumerate(self.train) for _ in range(item.repeats)]
        self.batches = Batches([torch.tensor(visits)], config.batch, config.seed)
        self.readers = ThreadPoolExecutor(READERS)
        self.unquantised = 0 if trained else UNQUANTISED
        self.revived = None  # the last step in which unused codes were replaced
        self.state = {"used": torch.zeros(codebook_size, dtype=torch.uint8, device=device)}

    def batch(self, step: int, piece: int, pieces: int) -> Tensor:
        """The pictures [piece::pieces] of the step, (n, 3, crop, crop) in 0..1; near the end fewer
        but whole pictures, at least one for each of the `pieces`."""
        crop, count = self._crop(), self._count(pieces)
        _, indices = self.batches.at(step)
        random = generator(self.config.seed + 1, step)
        room = self.side - crop + 1
        corners = torch.randint(0, room, (count, 2), generator=random).tolist()
        places = indices[:count].tolist()[piece::pieces]
        pictures = self.readers.map(lambda i: self._square(self.train, i), places)
        crops = [
            picture.crop((left, top, left + crop, top + crop))
            for picture, (left, top) in zip(pictures, corners[piece::pieces], strict=True)
        ]
        return to_tensor(crops).to(self.device)

    def _crop(self) -> int:
        return self.side if self.progress >= 1 - WHOLE_SHARE else self.crop

    def _count(self, pieces: int) -> int:
        """Pictures in a step: about as many pixels in every step, for the same memory and time."""
        return max(pieces, self.config.batch * self.crop**2 // self._crop() ** 2)

    def _square(self, items: list[Item], i: int) -> Image.Image:
        """The centre of the picture of item i, scaled, or of the next one that can be read."""
        for place in range(i, i + len(items)):
            item = items[place % len(items)]
            if item.key in self.unreadable:
                continue
            try:
                return scale_and_crop(item.picture(), (self.side, self.side))
            except ValueError as error:
                if rank() == 0:
                    print(f"note: {error}: another one is used instead", file=sys.stderr)
                self.unreadable.add(item.key)
        raise ValueError("none of the pictures can be read")

    def loss(self, module: ImageTokenizer, step: int, piece: int, pieces: int):
        if step % REVIVE_EVERY == 0 and step != self.revived:
            self._revive(module, step, pieces)
        images = self.batch(step, piece, pieces)
        latent = module.latent(images)
        quantized = module.quantizer(latent)
        continuous = step < self.unquantised and self.progress < UNQUANTISED_SHARE
        vectors = F.normalize(latent, dim=1) if continuous else quantized.vectors
        reconstruction = module.pixels(vectors)
        if not continuous:
            self.state["used"][quantized.codes.flatten()] = 1
            max_of_all(self.state["used"])
        l1 = F.l1_loss(reconstruction, images)
        l2 = F.mse_loss(reconstruction, images)
        edges = sum(
            F.l1_loss(reconstruction.diff(dim=dim), images.diff(dim=dim)) for dim in (-1, -2)
        )
        loss = l1 + 4 * l2 + edges + (0 if continuous else quantized.loss)
        psnr = -10 * l2.detach().log10()
        share = len(images) * pieces / self._count(pieces)  # whole pictures may not divide evenly
        return loss * share, {"psnr": psnr, "codebook_loss": quantized.loss.detach()}

    @torch.no_grad()
    def _revive(self, module: ImageTokenizer, step: int, pieces: int) -> None:
        """Replace codes that were not used for REVIVE_EVERY steps by random latents of the whole
        batch, the same in all processes."""
        if step and self.progress <= 0.5:
            dead = (self.state["used"] == 0).nonzero().flatten()
            parts = [module.latent(self.batch(step, piece, pieces)) for piece in range(pieces)]
            in_order = [parts[i % pieces][i // pieces] for i in range(self._count(pieces))]
            latent = torch.stack(in_order).float().movedim(1, -1).flatten(0, 2)
            pick = torch.randint(
                0, len(latent), (len(dead),), generator=generator(self.config.seed + 2, step)
            )
            module.quantizer.codebook.weight[dead] = F.normalize(latent[pick], dim=-1)
        self.state["used"].zero_()
        self.revived = step

    def validate(self, module: ImageTokenizer) -> dict[str, float]:
        codes = torch.cat([module.encode(part) for part in self.validation.split(16)])
        images = torch.cat([module.decode(part) for part in codes.split(16)])
        error = (images - self.validation).square().mean((1, 2, 3))
        return {
            "validation_psnr": (-10 * error.log10()).mean().item(),
            "codes_used": float(codes.unique().numel()),
        }

    def sheet(self, module: ImageTokenizer) -> Image.Image:
        images = self.validation[:24]
        decoded = module.decode(module.encode(images))
        return sheet_of(torch.stack([images, decoded], 1).flatten(0, 1), columns=12)

    def save(self, module: ImageTokenizer, path: Path) -> None:
        checkpoints.save_image_tokenizer(path, module)


def train_tokenizer(
    source: Path,
    directory: Path,
    config: ImageTokenizerConfig,
    loop: LoopConfig,
    *,
    init: Path | None = None,
    crop: int = 64,
    side: int = 128,
    resume: bool = False,
    device: torch.device = CPU,
) -> Path:
    """Train an image tokenizer on the pictures of `source` and return the path of its weights.

    It is a new one of the shape `config`, or the one in the file `init`. Pictures are scaled and
    cropped to squares of `side` pixels. Raises as `read_items` and `fit`, and ValueError for sizes
    that do not fit.
    """
    torch.manual_seed(loop.seed)
    if init:
        module = checkpoints.load_image_tokenizer(init)
    else:
        module = ImageTokenizer(config)
        nn.init.normal_(module.quantizer.codebook.weight)
    if (kind := module.config.quantizer) != "normalised":
        raise ValueError(f"an image tokenizer with the quantizer {kind} cannot be trained further")
    stride = module.config.stride
    for name, size in (("crop", crop), ("side", side)):
        if size < 1 or size % stride or size < crop:
            raise ValueError(
                f"{name} {size} does not fit: it must be a multiple of {stride} pixels, and side "
                "must not be smaller than crop"
            )
    module.to(device)
    items = read_items(source, captioned=False)
    if all(item.split == "held-out" for item in items):
        raise ValueError(f"all pictures in {source} are held out, so there are none to train on")
    size = module.config.codebook_size
    task = TokenizerTask(items, loop, crop, side, size, device, trained=init is not None)
    return fit(module, task, loop, directory, resume)
