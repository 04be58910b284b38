"""Triton kernels for decoding on a GPU: products of a few rows that read each weight once, together
with what surrounds them, and attention over the filled part of the KV cache.

A row's result does not depend on how many rows there are: sums run over the same tiles in the same
order. So a step of many windows computes the bits that steps of one window do, also in 16 bits.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 32  # of a tile; Triton sums larger ones in another order
MEMORY = 96 * 1024  # bytes of shared memory for tiles: NVIDIA's GPUs since 2020 have more
KEYS = 64  # in a tile of attention
SPLIT = 256  # positions of the cache that one program attends to
QUERIES = 16  # in a tile of attention, however many there are: others sum in another order
NORMALISED_HEADS = (32, 64, 128, 256)  # the sizes of heads that one program computes whole
GROUP = tl.constexpr(128)  # columns with one scale in int4 weights
COUNTS = ["rows", "together", "capacity"]  # no kernel is compiled again for another number of them
PLAIN, EIGHT_BITS, FOUR_BITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _product(
    x, w, scales, norm, rows, place, m, columns: tl.constexpr, kind: tl.constexpr,
    normalised: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Rows `m` of x (rows, columns) times rows `place` of the weight, float32 (block_m, block_n);
    with `normalised`, x * norm instead of x. Also the sum of squares of each row of x."""
    sums = tl.zeros((block_m, block_n), tl.float32)
    squares = tl.zeros((block_m,), tl.float32)
    is_row = m[:, None] < rows
    if kind == FOUR_BITS:
        half: tl.constexpr = GROUP // 2
        j = tl.arange(0, half)
        for start in range(0, columns // GROUP, block_k // GROUP):
            for more in tl.static_range(block_k // GROUP):
                group = start + more
                packed = tl.load(w + place[:, None] * (columns // 2) + group * half + j[None, :])
                scale = tl.load(scales + place * (columns // GROUP) + group).to(tl.float32)
                part = tl.zeros((block_m, block_n), tl.float32)
                for high in tl.static_range(2):
                    k = group * GROUP + high * half + j
                    a = tl.load(x + m[:, None] * columns + k[None, :], mask=is_row, other=0.0)
                    if normalised:
                        wide = a.to(tl.float32)
                        squares += tl.sum(wide * wide, 1)
                        a = (wide * tl.load(norm + k).to(tl.float32)[None, :]).to(a.dtype)
                    b = ((packed >> 4) if high else (packed & 15)).to(tl.float32) - 8
                    part = tl.dot(a, tl.trans(b.to(a.dtype)), part, input_precision="ieee")
                sums += part * scale[None, :]
    else:
        for start in range(0, columns, block_k):
            k = start + tl.arange(0, block_k)
            b = tl.load(w + place[:, None] * columns + k[None, :])
            a = tl.load(x + m[:, None] * columns + k[None, :], mask=is_row, other=0.0)
            if normalised:
                wide = a.to(tl.float32)
                squares += tl.sum(wide * wide, 1)
                a = (wide * tl.load(norm + k).to(tl.float32)[None, :]).to(a.dtype)
            if kind == EIGHT_BITS:
                b = b.to(tl.float32)  # not every GPU converts float8 to bfloat16
            sums = tl.dot(a, tl.trans(b.to(a.dtype)), sums, input_precision="ieee")
        if kind == EIGHT_BITS:
            sums *= tl.load(scales + place)[None, :]
    return sums, squares


@triton.jit(do_not_specialize=COUNTS)
def _linear(
    x, w, scales, second, second_scales, norm, residual, out, rows, eps,
    outputs: tl.constexpr, columns: tl.constexpr, kind: tl.constexpr, normalised: tl.constexpr,
    gated: tl.constexpr, added: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs have the same rows of the weight, which the second finds in the cache.
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    place = n.to(tl.int64)
    y, squares = _product(
        x, w, scales, norm, rows, place, m, columns, kind, normalised, block_m, block_n, block_k
    )
    if normalised:
        inverse = tl.rsqrt(squares / columns + eps)[:, None]
        y *= inverse
    if gated:
        up, _ = _product(
            x, second, second_scales, norm, rows, place, m, columns, kind, normalised, block_m,
            block_n, block_k,
        )  # fmt: skip
        if normalised:
            up *= inverse
        y = y / (1 + tl.exp(-y)) * up
    target = m[:, None] * outputs + n[None, :]
    is_row = m[:, None] < rows
    if added:
        y += tl.load(residual + target, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out + target, y.to(out.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=COUNTS)
def _queries_keys_values(
    x, wq, wk, wv, q_scales, k_scales, v_scales, norm, q_bias, k_bias, v_bias, q_norm, k_norm,
    cos, sin, shift, position, queries, keys, values, rows, together, capacity, eps,
    heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr, columns: tl.constexpr,
    kind: tl.constexpr, biased: tl.constexpr, head_norm: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """A program computes `block_n` rotary pairs of one head: all of them with `head_norm`."""
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    head = tl.program_id(1) // (half // block_n)
    j = tl.program_id(1) % (half // block_n) * block_n + tl.arange(0, block_n)
    w, scales, bias, own = wq, q_scales, q_bias, head
    if head >= heads + kv_heads:
        w, scales, bias, own = wv, v_scales, v_bias, head - heads - kv_heads
    elif head >= heads:
        w, scales, bias, own = wk, k_scales, k_bias, head - heads
    place = (own * 2 * half + j).to(tl.int64)
    a, squares = _product(
        x, w, scales, norm, rows, place, m, columns, kind, True, block_m, block_n, block_k
    )
    b, _ = _product(
        x, w, scales, norm, rows, place + half, m, columns, kind, True, block_m, block_n, block_k
    )
    inverse = tl.rsqrt(squares / columns + eps)[:, None]
    a *= inverse
    b *= inverse
    if biased:
        a += tl.load(bias + place).to(tl.float32)[None, :]
        b += tl.load(bias + place + half).to(tl.float32)[None, :]
    is_row = m[:, None] < rows
    # Row m is token m % together of sequence m // together.
    row = (m // together).to(tl.int64)
    slot = tl.load(position) + m % together
    if head < heads + kv_heads:
        if head_norm:
            own_norm = q_norm if head < heads else k_norm
            mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half)
            inverse = tl.rsqrt(mean + eps)[:, None]
            a = a * inverse * tl.load(own_norm + j).to(tl.float32)[None, :]
            b = b * inverse * tl.load(own_norm + half + j).to(tl.float32)[None, :]
        turn = tl.maximum(slot - tl.load(shift + row, mask=m < rows, other=0), 0)
        angle = turn[:, None] * 2 * half + j[None, :]
        c = tl.load(cos + angle, mask=is_row, other=0.0)
        s = tl.load(sin + angle + half, mask=is_row, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    stored = ((row * kv_heads + own) * capacity + slot) * 2 * half
    if head < heads:
        target = queries + (m[:, None] * heads + own) * 2 * half + j[None, :]
    elif head < heads + kv_heads:
        target = keys + stored[:, None] + j[None, :]
    else:
        target = values + stored[:, None] + j[None, :]
    kind_of = queries.dtype.element_ty
    tl.store(target, a.to(kind_of), mask=is_row)
    tl.store(target + half, b.to(kind_of), mask=is_row)


@triton.jit(do_not_specialize=COUNTS)
def _attend(
    queries, keys, values, padding, position, out, tops, sums, together, capacity, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, size: tl.constexpr, splits: tl.constexpr,
    split: tl.constexpr, block_q: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    """Attention (flash-decoding) of all tokens and heads that share keys over `split` positions:
    the outputs of this part, and the largest logit and the sum of exponentials of each query."""
    # Neighbouring programs have the same keys, which the second finds in the cache.
    grouped: tl.constexpr = heads // kv_heads
    blocks = tl.cdiv(together * grouped, block_q)
    row = tl.program_id(0) // blocks // kv_heads
    kv_head = tl.program_id(0) // blocks % kv_heads
    part = tl.program_id(1)
    query = tl.program_id(0) % blocks * block_q + tl.arange(0, block_q)
    token, head = query // grouped, kv_head * grouped + query % grouped
    is_query = query < together * grouped
    d = tl.arange(0, triton.next_power_of_2(size))
    source = ((row * together + token) * heads + head)[:, None] * size + d[None, :]
    is_value = (d < size)[None, :]
    q = tl.load(queries + source, mask=is_query[:, None] & is_value, other=0.0)
    first = tl.load(padding + row)
    length = tl.load(position)
    top = tl.full((block_q,), float("-inf"), tl.float32)
    total = tl.zeros((block_q,), tl.float32)
    mixed = tl.zeros((block_q, triton.next_power_of_2(size)), tl.float32)
    base = (row.to(tl.int64) * kv_heads + kv_head) * capacity
    end = length + together
    for block in range(split // block_t):
        t = part * split + block * block_t + tl.arange(0, block_t)
        is_key = (t < end)[:, None] & is_value  # nothing is read behind the end
        where = (base + t)[:, None] * size + d[None, :]
        k = tl.load(keys + where, mask=is_key, other=0.0)
        v = tl.load(values + where, mask=is_key, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (t[None, :] <= length + token[:, None]) & (t >= first)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - finite[:, None])
        shrunk = tl.exp(top - finite)
        total = total * shrunk + tl.sum(weights, 1)
        mixed = mixed * shrunk[:, None]
        mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision="ieee")
        top = higher
    if splits == 1:
        mixed /= total[:, None]
        tl.store(out + source, mixed.to(out.dtype.element_ty), mask=is_query[:, None] & is_value)
    else:
        place = ((row * together + token) * heads + head) * splits + part
        tl.store(tops + place, top, mask=is_query)
        tl.store(sums + place, total, mask=is_query)
        tl.store(out + place[:, None] * size + d[None, :], mixed, mask=is_query[:, None] & is_value)


@triton.jit(do_not_specialize=COUNTS)
def _combine(
    parts, tops, sums, position, out, together, heads: tl.constexpr, size: tl.constexpr,
    splits: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """The parts of one query's attention, weighted."""
    query = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, triton.next_power_of_2(size))
    part = tl.arange(0, triton.next_power_of_2(splits))
    last = (tl.load(position) + (query // heads) % together) // split
    is_filled = part <= last
    place = query * splits + part
    heights = tl.load(tops + place, mask=is_filled, other=float("-inf"))
    weights = tl.exp(heights - tl.max(heights, 0))
    total = tl.sum(weights * tl.load(sums + place, mask=is_filled, other=0.0), 0)
    is_value = is_filled[:, None] & (d < size)[None, :]
    mixed = tl.load(parts + place[:, None] * size + d[None, :], mask=is_value, other=0.0)
    mixed = tl.sum(mixed * weights[:, None], 0) / total
    tl.store(out + query * size + d, mixed.to(out.dtype.element_ty), mask=d < size)


@cache
def memory_of(device: torch.device) -> int:
    """Bytes of shared memory for tiles, a few kept for other uses."""
    if device.type != "cuda":
        return MEMORY
    about = torch.cuda.get_device_properties(device)
    most = getattr(about, "shared_memory_per_block_optin", 0) or about.shared_memory_per_block
    return min(MEMORY, most - 4096)


def tile(
    rows: int,
    outputs: int,
    columns: int,
    kind: int,
    itemsize: int,
    memory: int = MEMORY,
    whole: bool = False,
) -> dict[str, int]:
    """The sizes of a product's tiles and how they are pipelined in `memory` bytes; `itemsize` is
    that of x. Only `block_m` and the stages depend on the number of rows. One tile has all
    `outputs` if `whole`."""
    block_n = 16 if outputs < 4096 else 32 if outputs < 16384 else 64
    while outputs % block_n:
        block_n //= 2
    if whole:
        block_n = outputs
    weight = {PLAIN.value: itemsize, EIGHT_BITS.value: 1, FOUR_BITS.value: 0.5}[kind]
    # At least three tiles in flight, also with the most rows.
    largest = memory / 3 / (MOST_ROWS * itemsize + block_n * weight)
    widths = (512, 384, 256, 128) if kind == FOUR_BITS.value else (256, 128, 64, 32, 16)
    block_k = next(width for width in widths if columns % width == 0 and width <= largest)
    block_m = 16 if rows <= 16 else MOST_ROWS
    flying = int(memory / (block_k * (block_m * itemsize + block_n * weight)))
    return {
        "block_m": block_m, "block_n": block_n, "block_k": block_k,
        "num_stages": min(flying, 5) + 1, "num_warps": 2 if block_n <= 16 else 4,
    }  # fmt: skip


Stored = tuple[Tensor, Tensor, int]  # a weight, its scales (or any tensor), and how it is stored


def linear(
    x: Tensor,
    weight: Stored,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    up: Stored | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x (rows, in) -> x weight^T (rows, out), or silu(x weight^T) * (x up^T); with RMSNorm of x
    before it by `norm` (in,), and `residual` (rows, out) added after it."""
    stored, scales, kind = weight
    rows, columns = x.shape
    outputs = len(stored)
    sizes = tile(rows, outputs, columns, kind, x.itemsize, memory_of(x.device))
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    second, second_scales, _ = up or weight
    _linear[(triton.cdiv(rows, sizes["block_m"]), outputs // sizes["block_n"])](
        x, stored, scales, second, second_scales, x if norm is None else norm,
        x if residual is None else residual, out, rows, eps, outputs, columns, kind,
        norm is not None, up is not None, residual is not None, **sizes,
    )  # fmt: skip
    return out


def queries_keys_values(
    x: Tensor,
    q: Stored,
    k: Stored,
    v: Stored,
    norm: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    shift: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """RMSNorm of x (rows, in), the three products, their `biases`, RMSNorm of each head of queries
    and keys by `norms` (head_size,), and the rotary embedding. Keys and values go
    into the cache of one layer (B, kv_heads, capacity, head_size) at `position` (), those of
    rows / B tokens of each sequence. `angles` are cosine and sine (capacity, head_size) as from
    `rotary_angles`; a token at place i of its sequence has those of i - shift (B,). Returns the
    queries (rows, heads, head_size)."""
    rows, columns = x.shape
    batch, kv_heads, capacity, size = keys.shape
    heads = len(q[0]) // size
    memory = memory_of(x.device)
    sizes = tile(rows, size // 2, columns, q[2], x.itemsize, memory, norms is not None)
    queries = torch.empty(rows, heads, size, dtype=x.dtype, device=x.device)
    blocks = (heads + 2 * kv_heads) * (size // 2 // sizes["block_n"])
    _queries_keys_values[(triton.cdiv(rows, sizes["block_m"]), blocks)](
        x, q[0], k[0], v[0], q[1], k[1], v[1], norm, *(biases or (x, x, x)), *(norms or (x, x)),
        *angles, shift, position, queries, keys, values, rows, rows // batch, capacity, eps, heads,
        kv_heads, size // 2, columns, q[2], biases is not None, norms is not None, **sizes,
    )  # fmt: skip
    return queries


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, padding: Tensor, position: Tensor
) -> Tensor:
    """Causal attention of queries (rows, heads, head_size), the rows / B last tokens of each
    sequence, to the keys and values of a layer as above, which include theirs, from `padding` (B,)
    on. Returns (rows, heads * head_size)."""
    rows, heads, size = queries.shape
    batch, kv_heads, capacity, _ = keys.shape
    splits = triton.cdiv(capacity, SPLIT)
    together = rows // batch
    out = torch.empty_like(queries)
    parts, tops, sums = out, out, out
    if splits > 1:
        whole = {"dtype": torch.float32, "device": queries.device}
        parts = torch.empty(rows, heads, splits, size, **whole)
        tops, sums = torch.empty(2, rows, heads, splits, **whole)
    blocks = triton.cdiv(together * heads // kv_heads, QUERIES)
    _attend[(batch * kv_heads * blocks, splits)](
        queries, keys, values, padding, position, parts, tops, sums, together, capacity,
        size**-0.5, heads, kv_heads, size, splits, SPLIT, QUERIES, KEYS, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * heads,)](
            parts, tops, sums, position, out, together, heads, size, splits, SPLIT, num_warps=4
        )
    return out.flatten(1)
