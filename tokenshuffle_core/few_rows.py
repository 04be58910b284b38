"""The LLaMA blocks for a few rows on a CPU: what `Transformer` computes, with less around it.

Between two multiplications a step does little, but the weights that are read push all of it, code
and data, out of the processor's caches. So there are as few operations as possible: the weights are
looked up once for a picture, and those with the same input are one matrix.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import MANY, Linear, few_rows, row_major
from .quantize import QuantizedLinear, multiply
from .transformer import KVCache, Transformer, rotary_angles, rotate


class FewRows:
    """Computes as the transformer does, for one decoding: a host may change weights between two."""

    def __init__(self, transformer: Transformer):
        self.config = transformer.config
        self.blocks = [
            (
                block.attention_norm.weight.detach(),
                _product(block.attention.q_proj, block.attention.k_proj, block.attention.v_proj),
                _product(block.attention.o_proj),
                block.mlp_norm.weight.detach(),
                _product(block.mlp.gate_proj, block.mlp.up_proj),
                _product(block.mlp.down_proj),
            )
            for block in transformer.blocks
        ]
        self.norm = transformer.norm.weight.detach()

    @staticmethod
    def suits(transformer: Transformer, cache: KVCache, length: int) -> bool:
        """Whether steps of `length` positions are few rows, of layers that are known here."""
        layers = [
            layer
            for block in transformer.blocks
            for part in (block.attention, block.mlp)
            for layer in part.children()
        ]
        return (
            cache.padding.device.type == "cpu"
            and cache.keys[0].dtype == torch.float32
            and len(cache.padding) * length <= MANY
            and all(type(layer) in (Linear, QuantizedLinear) for layer in layers)
        )

    def __call__(self, x: Tensor, cache: KVCache) -> Tensor:
        """As `Transformer.forward` with a cache that holds the prompt."""
        shape, config = x.shape, self.config
        index, mask = cache.places(shape[1])
        if mask is not None:  # torch would do this in each layer
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        angles = rotary_angles(index, config.head_size, config.rope_theta)
        rotated = config.heads + config.kv_heads
        grouped = config.heads != config.kv_heads
        x = x.reshape(-1, shape[2])
        for layer, (norm1, qkv, o, norm2, gate_up, down) in enumerate(self.blocks):
            h = row_major(qkv(self._normalised(x, norm1)))
            h = h.view(*shape[:2], -1, config.head_size).transpose(1, 2)
            qk = rotate(h[:, :rotated], *angles)
            k, v = cache.update(layer, qk[:, config.heads :], h[:, rotated:])
            h = F.scaled_dot_product_attention(
                qk[:, : config.heads], k, v, attn_mask=mask, enable_gqa=grouped
            )
            x = x + o(h.transpose(1, 2).reshape(x.shape))
            gate, up = gate_up(self._normalised(x, norm2)).chunk(2, dim=1)
            x = x + down(row_major(F.silu(gate) * up))
        cache.advance(shape[1])
        return self._normalised(x, self.norm).view(shape)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[1]).add_(self.config.norm_eps).rsqrt_()
        return (x * scale).mul_(weight)


def _product(*layers: nn.Module) -> Callable[[Tensor], Tensor]:
    """x (rows, columns) -> what the layers make of it side by side, (rows, sum of out)."""
    if type(layers[0]) is QuantizedLinear:
        return partial(multiply, layers)
    weight = layers[0].blocks() if len(layers) == 1 else _joined([x.weight for x in layers])
    weight = weight.detach()
    return lambda x: few_rows(x, weight)


def _joined(weights: Sequence[nn.Parameter]) -> Tensor:
    """The weights one under the other; they are moved to where they stand so, the first time."""
    ends = [weight.data_ptr() + weight.nbytes for weight in weights[:-1]]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(storages) > 1 or ends != [weight.data_ptr() for weight in weights[1:]]:
        with torch.inference_mode(weights[0].is_inference()):  # others may be trained again
            whole = torch.cat([weight.detach() for weight in weights])
        parts = whole.split([len(weight) for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part
    rows, first = sum(map(len, weights)), weights[0]
    return first.detach().as_strided((rows, first.shape[1]), first.stride())
