"""The LLaMA blocks for a few rows on a CPU: a second form of `Transformer` that computes the same
with less overhead.

A step does little between two matrix products, but reading their weights evicts all of its code
and data from the processor's caches. So it uses as few operations as possible, and weights with the
same input are one product.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformer import KVCache, Layout, Transformer, rotary_angles, rotate
from .cpu_linear import Product, product, row_major
from .swapped import Swapped


class CpuTransformer(Swapped):
    """Replaces a transformer and shares its blocks. Input with many rows, without a cache or with
    gradients goes to the original, and so does everything once a weight has changed."""

    def __init__(self, plain: Transformer):
        super().__init__(plain)
        self.config = plain.config
        # Packing runs on one thread and needs memory for two more copies of a matrix.
        with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
            self.products: list[Product] = list(pool.map(product, self._inputs()))
        self.rows = min(product.rows for product in self.products)

    def _inputs(self) -> list[tuple[nn.Module, ...]]:
        """The layers of all blocks, those with the same input together."""
        inputs = []
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            inputs += [
                (attention.q_proj, attention.k_proj, attention.v_proj),
                (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj),
                (mlp.down_proj,),
            ]
        return inputs

    @classmethod
    def takes(cls, plain: Transformer, device: torch.device) -> bool:
        return plain.norm.weight.dtype == torch.float32

    def is_current(self) -> bool:
        same = self._inputs() == [product.layers for product in self.products]
        return same and all(product.is_current() for product in self.products)

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None = None,
        cache: KVCache | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """As `Transformer.forward`."""
        if cache is not None and not cache.length and not self.is_current():
            self.rows = 0  # asked at the start of a sequence, which costs nothing in its steps
        if cache is None or x.shape[0] * x.shape[1] > self.rows or torch.is_grad_enabled():
            return self.plain[0](x, padding, cache, layout)
        shape, config = x.shape, self.config
        positions, mask = cache.places(shape[1])
        if mask is not None:  # otherwise torch converts it in each layer
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        angles = rotary_angles(positions, config)
        rotated = config.heads + config.kv_heads
        causal = mask is None and shape[1] > 1
        # Heads that share keys are so many more queries of one head, which reads them once.
        heads = config.heads if causal else config.kv_heads
        if mask is not None:
            mask = mask.repeat(1, 1, config.heads // heads, 1)
        x = x.reshape(-1, shape[2])
        for layer, block in enumerate(self.blocks):
            qkv, o, gate_up, down = self.products[4 * layer : 4 * layer + 4]
            attention = block.attention
            h = row_major(qkv.of(self._normalised(x, block.attention_norm.weight)))
            if config.qkv_bias:
                h += torch.cat([layer.bias for layer in qkv.layers])
            h = h.view(*shape[:2], -1, config.head_size).transpose(1, 2)
            qk = h[:, :rotated]
            if config.qk_norm:
                q, k = qk.split((config.heads, config.kv_heads), 1)
                q = self._normalised(q, attention.q_norm.weight)
                k = self._normalised(k, attention.k_norm.weight)
                qk = torch.cat([q, k], 1)
            qk = rotate(qk, *angles)
            k, v = cache.update(layer, qk[:, config.heads :], h[:, rotated:])
            q = qk[:, : config.heads].reshape(shape[0], heads, -1, config.head_size)
            h = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, enable_gqa=heads != config.kv_heads
            )
            h = h.reshape(shape[0], config.heads, -1, config.head_size)
            x = x + o.of(h.transpose(1, 2).reshape(len(x), -1))
            gate, up = gate_up.of(self._normalised(x, block.mlp_norm.weight)).chunk(2, dim=1)
            x = x + down.of(row_major(F.silu(gate) * up))
        cache.advance(shape[1])
        return self._normalised(x, self.norm.weight).view(shape)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(self.config.norm_eps).rsqrt_()
        return (x * scale).mul_(weight)
