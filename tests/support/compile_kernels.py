"""Compiles the kernels of the engine for a GPU that need not be there, with the shapes of the 2.7 B
model: `python compile_kernels.py 90 2,64` prints a line of JSON for each, of 2 and of 64 rows."""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokenshuffle_core.engine import triton_kernels as kernels

PLAIN, EIGHT, FOUR = (kind.value for kind in (kernels.PLAIN, kernels.EIGHT_BITS, kernels.FOUR_BITS))
BF16, FP32, INT64 = "*bf16", "*fp32", "*i64"
COUNTS = dict.fromkeys(kernels.COUNTS, "i32")
STORED = {PLAIN: (BF16, BF16), EIGHT: ("*i8", FP32), FOUR: ("*u8", BF16)}


def compiled(kernel, types: dict, constants: dict, capability: int, **options) -> None:
    names = kernel.arg_names
    types = {name: kind for name, kind in (types | COUNTS).items() if name in names}
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types.get(name, "").startswith("*")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    result = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    ptx = result.asm["ptx"]
    about = {"shared": result.metadata.shared, "products": ptx.count("mma.sync")}
    about |= {"loads ahead": ptx.count("cp.async.cg"), "registers": ".local" not in ptx}
    print(json.dumps({"kernel": kernel.fn.__name__} | constants | about), flush=True)


def sizes(rows: int, outputs: int, columns: int, kind: int, **more) -> tuple[dict, dict]:
    tile = kernels.tile(rows, outputs, columns, kind, 2, **more)
    return tile, {name: tile.pop(name) for name in ("num_stages", "num_warps")}


def linear(rows: int, outputs: int, columns: int, kind: int, capability: int, **more) -> None:
    weight, scale = STORED[kind]
    types = dict.fromkeys(("x", "norm", "residual", "out"), BF16) | {"eps": "fp32"}
    types |= {"w": weight, "second": weight, "scales": scale, "second_scales": scale}
    tile, options = sizes(rows, outputs, columns, kind)
    constants = {"outputs": outputs, "columns": columns, "kind": kind}
    constants |= {"normalised": False, "gated": False, "added": False} | more | tile
    compiled(kernels._linear, types, constants, capability, **options)


def main(capability: int, numbers: list[int]) -> None:
    for kind in (PLAIN, EIGHT, FOUR):
        for rows in numbers:
            linear(rows, 8192, 3072, kind, capability, normalised=True, gated=True)
            linear(rows, 3072, 8192, kind, capability, added=True)
    linear(2, 16384, 3072, PLAIN, capability)
    names = ("x", "wq", "wk", "wv", "q_scales", "k_scales", "v_scales", "norm", "queries")
    names += ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "keys", "values")
    types = dict.fromkeys(names, BF16) | {"cos": FP32, "sin": FP32}
    types |= {"shift": INT64, "position": INT64, "eps": "fp32"}
    for rows in numbers:
        for more in ({"biased": False, "head_norm": False}, {"biased": True, "head_norm": True}):
            tile, options = sizes(rows, 64, 3072, PLAIN, whole=more["head_norm"])
            constants = {"heads": 24, "kv_heads": 24, "half": 64, "columns": 3072, "kind": PLAIN}
            constants |= tile | more
            compiled(kernels._queries_keys_values, types, constants, capability, **options)
    shape = {"heads": 24, "size": 128, "splits": 17, "split": kernels.SPLIT}
    types = dict.fromkeys(("queries", "keys", "values"), BF16) | {"scale": "fp32"}
    types |= {"padding": INT64, "position": INT64, "out": FP32, "tops": FP32, "sums": FP32}
    constants = shape | {"kv_heads": 24, "block_q": 16, "block_t": kernels.KEYS}
    compiled(kernels._attend, types, constants, capability, num_stages=2)
    types = {"parts": FP32, "tops": FP32, "sums": FP32, "position": INT64, "out": BF16}
    compiled(kernels._combine, types, shape, capability)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(part) for part in sys.argv[2].split(",")])
