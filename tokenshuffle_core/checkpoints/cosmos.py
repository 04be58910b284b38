"""NVIDIA's Cosmos-Tokenizer-DV8x16x16 (arXiv 2501.03575), a discrete tokenizer of videos, as what
it is for one picture: an image tokenizer in two dimensions, with a quarter fewer weights.

All of its convolutions over time see copies of one frame, so that each is the sum of its kernel
over time, which the convolution over space before it absorbs; attention over one frame is its
value; and the Haar wavelets at both ends are linear in the pixels of a patch.
"""

import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..config import ImageTokenizerConfig
from ..files import open_safetensors
from ..quantizers import ScalarQuantizer
from .checkpoint import Weights, check_parts, skeleton
from .source import Source

MARKS = ("encoder.conv_in.0.conv3d.weight",)
OF_SIMPLEAR = "1.0"  # the version whose codes SimpleAR draws
LEVELS = (8, 8, 8, 5, 5, 5)
PATCH = 4  # pixels along the side of what the wavelets transform at once
Affine = tuple[Tensor, Tensor]  # weight (out, in, h, w) and bias (out,), float64
# As NVIDIA's folders are called; the first had no number.
NAME = re.compile(r"cosmos[-_](?:(\d\.\d)[-_])?tokenize(r|1)[-_]dv8x16x16", re.IGNORECASE)
BITS = [(t, h, w) for t in (0, 1) for h in (0, 1) for w in (0, 1)]  # which axes a band is high in


def read(path: str | Path) -> tuple[ImageTokenizerConfig, Weights]:
    """The published folder, one of its `encoder.jit` and `decoder.jit` with the other beside it, or
    their tensors in one file. Raises FileNotFoundError or ValueError."""
    return image_tokenizer(Source(path))


def version_of(path: str | Path) -> str | None:
    """ "1.0", "0.1" or "Tokenize1": which of NVIDIA's tokenizers of this shape it is, by what its
    files, its folder or, once converted, its card call it; None if nothing does. Only names tell
    them apart, and codes of one are noise to another."""
    path = Path(path)
    title = ""
    if path.suffix.lower() == ".safetensors" and path.is_file():
        title = (open_safetensors(path).metadata() or {}).get("modelspec.title", "")
    for name in (title, *path.absolute().parts[::-1], *path.resolve().parts[::-1]):
        if match := NAME.search(name):
            return match[1] or ("0.1" if match[2] == "r" else "Tokenize1")
    return None


def image_tokenizer(source: Source) -> tuple[ImageTokenizerConfig, Weights]:
    """Its shape, inferred from the weights, and the weights. Raises ValueError."""
    channels = source.shape_of("encoder.conv_in.1.conv3d.weight", 5)[0]
    output = "encoder.down.{}.block.0.conv2.1.conv3d.weight"
    outputs = [source.shape_of(output.format(i), 5)[0] for i in range(source.count(output))]
    dim, latent = source.shape_of("quant_conv.conv3d.weight", 5)[:2]
    if dim != len(LEVELS):
        raise ValueError(f"{source.path}: codes of {dim} numbers instead of {len(LEVELS)}")
    config = ImageTokenizerConfig(
        channels=channels,
        channel_multipliers=tuple(output // channels for output in outputs),
        res_blocks=source.count("encoder.down.0.block.{}.conv2.1.conv3d.weight"),
        norm_groups=1, latent_channels=latent, codebook_size=64_000, codebook_dim=dim,
        quantizer="fsq", levels=LEVELS, patch=PATCH, attention_levels=(), video=True,
    )  # fmt: skip
    check_parts(config, source.shapes)
    weights: Weights = {
        "quantizer.codebook.weight": lambda: ScalarQuantizer(LEVELS).codebook.weight
    }

    @lru_cache(maxsize=1)  # a weight is read right before its bias
    def folded(module: str) -> Affine:
        try:
            return _folded(source, config, module)
        except (RuntimeError, IndexError):
            raise ValueError(
                f"{source.path}: the weights of {module} do not fit together"
            ) from None

    for name in skeleton(config).state_dict():
        if name not in weights:
            module, _, part = name.rpartition(".")
            weights[name] = lambda m=module, p=part: folded(m)[p == "bias"]
    return config, weights


def _folded(source: Source, config: ImageTokenizerConfig, module: str) -> Affine:
    """The weight and bias of one of our layers; those of norms have the shape (channels,)."""

    def spatial(name: str, square: bool = False) -> Affine:
        """A convolution over space, or none. Of two in a row one is square, so that both together
        are no larger than the file."""
        after, before = source.shape_of(f"{name}.conv3d.weight", 5)[:2]
        if source.shape_of(f"{name}.conv3d.bias", 1) != (after,) or (square and after != before):
            raise ValueError(f"{source.path}: the shapes of {name}.conv3d do not fit together")
        weight, bias = (source[f"{name}.conv3d.{part}"].double() for part in ("weight", "bias"))
        return weight.sum(2), bias

    def norm(name: str) -> Affine:
        return source[f"{name}.norm.weight"].double(), source[f"{name}.norm.bias"].double()

    def pair(name: str) -> Affine:
        return _then(spatial(f"{name}.0"), spatial(f"{name}.1", square=True))

    side, _, rest = module.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return spatial(side)
    last = module.rpartition(".")[2]
    if rest == "conv_in" and side == "encoder":
        patches = _patches()[:, :, None, None]
        return _then((patches, patches.new_zeros(len(patches))), pair(module))
    if rest == "conv_out" and side == "decoder":
        patches = _pixels()[:, :, None, None]
        return _then(pair(module), (patches, patches.new_zeros(len(patches))))
    if rest in ("conv_in", "conv_out"):
        return pair(module)
    if rest == "norm_out":
        return norm(module)
    theirs = _their_name(side, config, rest)
    if last in ("norm", "norm1", "norm2"):
        return norm(theirs)
    if last in ("conv1", "conv2"):
        return pair(theirs)
    if theirs.endswith("attn_1.1.conv"):  # attention over time
        block = theirs.removesuffix(".conv")
        return _then(spatial(f"{block}.v"), spatial(f"{block}.proj_out", square=True))
    if ".downsample" in theirs:
        first = spatial(f"{theirs}.conv1", square=True)
        mean = torch.zeros_like(first[0])
        mean[:, :, :2, :2] = torch.eye(len(mean), dtype=mean.dtype)[:, :, None, None] / 4
        both = first[0] + mean, first[1]
        if theirs.startswith("encoder.down.0."):  # over time as well
            both = _then(both, _plus_identity(spatial(f"{theirs}.conv2", square=True)))
        return _then(both, spatial(f"{theirs}.conv3", square=True))
    if theirs.endswith("upsample.mix"):
        return _plus_identity(spatial(theirs.replace("mix", "conv1"), square=True))
    if ".upsample" in theirs:
        both = _plus_identity(spatial(f"{theirs}.conv2", square=True))
        return _then(both, spatial(f"{theirs}.conv3", square=True))
    return spatial(theirs)


def _their_name(side: str, config: ImageTokenizerConfig, rest: str) -> str:
    """The published name of a layer of `mid` or `levels`."""
    parts = rest.split(".")
    if parts[0] == "mid":
        middle = ("block_1", "attn_1.0", "attn_1.1", "block_2")[int(parts[1])]
        name = f"{side}.mid.{middle}.{'.'.join(parts[2:])}"
    else:
        level, place = int(parts[1]), int(parts[2])
        blocks = config.res_blocks + (side == "decoder")
        if side == "decoder":
            level = len(config.channel_multipliers) - 1 - level
        where = f"{side}.{'down' if side == 'encoder' else 'up'}.{level}"
        if place < blocks:
            name = f"{where}.block.{place}.{'.'.join(parts[3:])}"
        elif side == "encoder":
            name = f"{where}.downsample"
        else:
            name = f"{where}.upsample" + (".mix" if len(parts) == 3 else "")
    return name.replace("shortcut", "nin_shortcut")


def _then(first: Affine, second: Affine) -> Affine:
    """One convolution for two in a row, of which one has a kernel of 1 x 1."""
    (a, b), (c, d) = first, second
    if c.shape[-1] == 1:
        weight = torch.einsum("om,mihw->oihw", c[:, :, 0, 0], a)
    else:
        weight = torch.einsum("omhw,mi->oihw", c, a[:, :, 0, 0])
    return weight, c.sum((2, 3)) @ b + d


def _plus_identity(layer: Affine) -> Affine:
    weight, middle = layer[0].clone(), layer[0].shape[-1] // 2
    weight[:, :, middle, middle] += torch.eye(len(weight), dtype=weight.dtype)
    return weight, layer[1]


def _waves(scale: float, last: bool) -> Tensor:
    """(8 bands, 2, 2): what a pixel of a 2 x 2 square has to do with each band."""
    bands = torch.zeros(8, 2, 2, dtype=torch.float64)
    for band, (t, h, w) in enumerate(BITS):
        # Both frames are the same, so they have no high band; of those that come out, the last.
        time = (-1) ** t if last else 1 - t
        for y in (0, 1):
            for x in (0, 1):
                bands[band, y, x] = scale * time * (-1) ** (h * y) * (-1) ** (w * x)
    return bands


def _matrix(waves: Tensor) -> Tensor:
    """Two levels of a transform: (192 bands of 3 colours, 48 pixels as `pixel_unshuffle` has)."""
    coarse = torch.einsum("fyx,gvu,cd->fgcdyvxu", waves, waves, torch.eye(3, dtype=waves.dtype))
    return coarse.reshape(192, 48)


def _patches() -> Tensor:
    """Pixels of a patch, 48, to bands, 192, of which there are four identical frames."""
    return _matrix(_waves(0.25, last=False))


def _pixels() -> Tensor:
    """Bands, 192, to the pixels of a patch, 48, in the last of four frames."""
    return _matrix(_waves(1.0, last=True)).T
