"""The LLaMA blocks for a few rows on a CPU: what `Transformer` computes, with less around it.

Between two multiplications a step does little, but the weights that are read push all of it, code
and data, out of the processor's caches. So there are as few operations as possible: the weights are
looked up once for a picture, and those with the same input are one matrix.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transformer import KVCache, Transformer, rotary_angles, rotate
from .cpu_linear import Linear, row_major
from .quantize import QuantizedLinear


class FewRows:
    """Computes as the transformer does, for one decoding: a host may change weights between two."""

    def __init__(self, transformer: Transformer):
        self.transformer, self.config = transformer, transformer.config
        inputs = []
        for block in transformer.blocks:
            attention, mlp = block.attention, block.mlp
            inputs += [
                (attention.q_proj, attention.k_proj, attention.v_proj),
                (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj),
                (mlp.down_proj,),
            ]
        # The kernels' packing uses one thread, and memory for two more forms of a matrix.
        with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
            products = list(pool.map(lambda layers: layers[0].product(layers), inputs))
        self.rows = min(product.rows for product in products)
        self.blocks = [
            (
                block.attention_norm.weight.detach(),
                block.mlp_norm.weight.detach(),
                products[i : i + 4],
            )
            for i, block in zip(range(0, len(products), 4), transformer.blocks, strict=True)
        ]
        self.norm = transformer.norm.weight.detach()

    @classmethod
    def of(cls, transformer: Transformer, device: torch.device) -> "FewRows | None":
        """For a CPU and layers that are known here, in float32."""
        layers = [
            layer
            for block in transformer.blocks
            for part in (block.attention, block.mlp)
            for layer in part.children()
        ]
        if (
            device.type != "cpu"
            or transformer.norm.weight.dtype != torch.float32
            or any(type(layer) not in (Linear, QuantizedLinear) for layer in layers)
        ):
            return None
        return cls(transformer)

    def __call__(self, x: Tensor, cache: KVCache) -> Tensor:
        """As `Transformer.forward` with a cache; too many rows are left to it."""
        if x.shape[0] * x.shape[1] > self.rows:
            return self.transformer(x, cache=cache)
        shape, config = x.shape, self.config
        positions, mask = cache.places(shape[1])
        if mask is not None:  # torch would do this in each layer
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        angles = rotary_angles(positions, config)
        rotated = config.heads + config.kv_heads
        grouped, causal = config.heads != config.kv_heads, mask is None and shape[1] > 1
        x = x.reshape(-1, shape[2])
        for layer, (norm1, norm2, (qkv, o, gate_up, down)) in enumerate(self.blocks):
            h = row_major(qkv.of(self._normalised(x, norm1)))
            h = h.view(*shape[:2], -1, config.head_size).transpose(1, 2)
            qk = rotate(h[:, :rotated], *angles)
            k, v = cache.update(layer, qk[:, config.heads :], h[:, rotated:])
            h = F.scaled_dot_product_attention(
                qk[:, : config.heads], k, v, mask, is_causal=causal, enable_gqa=grouped
            )
            x = x + o.of(h.transpose(1, 2).reshape(x.shape))
            gate, up = gate_up.of(self._normalised(x, norm2)).chunk(2, dim=1)
            x = x + down.of(row_major(F.silu(gate) * up))
        cache.advance(shape[1])
        return self._normalised(x, self.norm).view(shape)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[1]).add_(self.config.norm_eps).rsqrt_()
        return (x * scale).mul_(weight)
