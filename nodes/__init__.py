"""The ComfyUI nodes: each has a schema, calls the core and returns what it gave."""

from comfy_api.latest import ComfyExtension, io

from .charts import TokenShuffleCFGPlot, TokenShuffleXYSheet
from .codes import TokenShuffleLoadCodes, TokenShuffleSaveCodes
from .image_tokenizer import TokenShuffleVQDecode, TokenShuffleVQEncode
from .loader import TokenShuffleLoader
from .lora import TokenShuffleLoraLoader
from .sampling import (
    TokenShuffleClass,
    TokenShuffleComplete,
    TokenShuffleOptions,
    TokenShufflePrompt,
    TokenShuffleSampler,
)
from .stopwatch import TokenShuffleStopwatch


class TokenShuffleExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            TokenShuffleLoader,
            TokenShuffleLoraLoader,
            TokenShufflePrompt,
            TokenShuffleClass,
            TokenShuffleSampler,
            TokenShuffleOptions,
            TokenShuffleComplete,
            TokenShuffleVQDecode,
            TokenShuffleVQEncode,
            TokenShuffleSaveCodes,
            TokenShuffleLoadCodes,
            TokenShuffleXYSheet,
            TokenShuffleCFGPlot,
            TokenShuffleStopwatch,
        ]
