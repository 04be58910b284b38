"""What flows between the nodes. `host.Loaded` is the value of both Model and VQ."""

from comfy_api.latest import io

CATEGORY = "TokenShuffle"

Model = io.Custom("TOKENSHUFFLE_MODEL")
VQ = io.Custom("TOKENSHUFFLE_VQ")
Prompt = io.Custom("TOKENSHUFFLE_PROMPT")  # list[int]: token ids
Codes = io.Custom("TOKENSHUFFLE_CODES")  # int64 tensor (B, H / stride, W / stride)
Options = io.Custom("TOKENSHUFFLE_OPTIONS")  # dict: fields of GenerationConfig
