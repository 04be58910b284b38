"""Linear layers and LLaMA blocks for decoding on a GPU, with the kernels of triton_kernels.py.

They read the parameters of the layers whose place they take where these are, so nothing is packed
or copied.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformer import KVCache, Layout, Transformer
from . import triton_kernels as kernels
from .cuda_graphs import StaticCache
from .quantize import QuantizedLinear
from .swapped import Swapped

MOST_ROWS = 1024  # of a linear layer; more compute longer than they read
MOST_TOKENS = 64  # of the transformer, in all rows of a batch

log = logging.getLogger(__name__)


def fits(layer: nn.Module, device: torch.device) -> bool:
    """Whether the kernels can multiply with the weight of a plain or quantised layer."""
    weight, columns = layer.weight, layer.weight.shape[1]
    if weight.device != device or not weight.is_contiguous() or len(weight) % 16:
        return False
    if weight.dtype == torch.uint8:
        return columns * 2 % kernels.GROUP.value == 0
    if weight.dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(device) < (8, 9):
        return False
    return columns % 16 == 0


def stored(layer: nn.Module) -> kernels.Stored:
    if isinstance(layer, QuantizedLinear):
        four = layer.weight.dtype == torch.uint8
        return layer.weight, layer.scale, (kernels.FOUR_BITS if four else kernels.EIGHT_BITS).value
    return layer.weight, layer.weight, kernels.PLAIN.value


class GpuLayer(Swapped):
    """A layer that computes as `plain` does once a kernel has failed: whether one compiles and
    fits a GPU depends on the shape of its layer as well."""

    works = True

    def attempt(self, *inputs) -> Tensor:
        if self.works:
            try:
                return self.fast(*inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # any, since Triton's have no common type
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise  # the step before has compiled all kernels
                log.warning("a layer continues without Triton: %s", str(error).split("\n")[0])
                self.works = False
        return self.plain[0](*inputs)


class GpuLinear(GpuLayer):
    """A linear layer, for up to MOST_ROWS rows."""

    @classmethod
    def takes(cls, plain: nn.Linear | QuantizedLinear, device: torch.device) -> bool:
        return fits(plain, device)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows > MOST_ROWS or torch.is_grad_enabled():
            return self.plain[0](x)
        return self.attempt(x)

    def fast(self, x: Tensor) -> Tensor:
        # A copy of a view with gaps, such as the last token of each row.
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y = kernels.linear(flat, stored(self.plain[0])).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _layers_of(transformer: nn.Module) -> list[nn.Module]:
    """The linear layers of all blocks."""
    parts = (part for block in transformer.blocks for part in (block.attention, block.mlp))
    layers = (layer for part in parts for layer in part.children())
    return [layer for layer in layers if not isinstance(layer, nn.RMSNorm)]


def _biases_of(attention: nn.Module) -> tuple[Tensor, ...] | None:
    biases = [layer.bias for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return None if biases[0] is None else tuple(biases)


class GpuTransformer(GpuLayer):
    """A transformer, for steps with a cache whose length is on the device."""

    def __init__(self, plain: Transformer):
        super().__init__(plain)
        self.config = plain.config
        self.layers = _layers_of(plain)

    @classmethod
    def takes(cls, plain: Transformer, device: torch.device) -> bool:
        layers, config = _layers_of(plain), plain.config
        same = len({(layer.weight.dtype, type(layer)) for layer in layers}) == 1
        biases = [layer.bias is not None for layer in layers]
        same &= biases == ([config.qkv_bias] * 3 + [False] * 4) * config.layers
        size = config.head_size
        whole = not config.qk_norm or size in kernels.NORMALISED_HEADS
        return same and whole and size % 32 == 0 and all(fits(layer, device) for layer in layers)

    def stops_at_length(self, tokens: int) -> bool:
        return self.works and tokens <= MOST_TOKENS

    def is_current(self) -> bool:
        return _layers_of(self) == self.layers

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None = None,
        cache: KVCache | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """As `Transformer.forward`."""
        held = isinstance(cache, StaticCache) and cache.reach is not None
        if not held or x.shape[0] * x.shape[1] > MOST_TOKENS or torch.is_grad_enabled():
            return self.plain[0](x, padding, cache, layout)
        return self.attempt(x, padding, cache, layout)

    def fast(self, x: Tensor, padding: None, cache: StaticCache, layout: None) -> Tensor:
        shape, eps = x.shape, self.config.norm_eps
        angles, shift = cache.angles, cache.shift
        x = x.reshape(-1, shape[2])
        for layer, block in enumerate(self.blocks):
            attention, mlp = block.attention, block.mlp
            keys, values = cache.keys[layer], cache.values[layer]
            q = kernels.queries_keys_values(
                x, stored(attention.q_proj), stored(attention.k_proj), stored(attention.v_proj),
                block.attention_norm.weight, eps, angles, shift, keys, values, cache.position,
                biases=_biases_of(attention),
                norms=(attention.q_norm.weight, attention.k_norm.weight)
                if self.config.qk_norm else None,
            )  # fmt: skip
            h = kernels.attend(q, keys, values, cache.padding, cache.position)
            x = kernels.linear(h, stored(attention.o_proj), residual=x)
            gate, up = stored(mlp.gate_proj), stored(mlp.up_proj)
            h = kernels.linear(x, gate, norm=block.mlp_norm.weight, eps=eps, up=up)
            x = kernels.linear(h, stored(mlp.down_proj), residual=x)
        cache.advance(shape[1])
        return self.norm(x).view(shape)


@torch.inference_mode()
def check(device: torch.device) -> None:
    """Raises an error where the kernels do not work on `device` as they should, with the largest
    tiles as well."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).half()

    for rows, outputs in ((3, 64), (40, 16384)):
        x, plain = random(rows, 256), nn.Linear(256, outputs, False, device, torch.float16)
        plain.weight.copy_(random(outputs, 256) / 16)
        torch.testing.assert_close(GpuLinear(plain).fast(x), plain(x), rtol=1e-2, atol=1e-2)
    q, keys, values = random(2, 1, 128), random(1, 1, 300, 128), random(1, 1, 300, 128)
    zero, last = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor(298, device=device)
    h = kernels.attend(q, keys, values, zero, last).view(2, 128)
    expected = F.scaled_dot_product_attention(q[1:].transpose(0, 1)[None], keys, values)
    torch.testing.assert_close(h[1:], expected.view(1, 128), rtol=1e-2, atol=1e-2)
