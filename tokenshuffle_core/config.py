"""A model's shape and its sampling settings, described once.

Every dataclass validates itself on construction and raises a `ValueError` that names the field.
`Config` is what a checkpoint stores as JSON.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field

from .checks import check_choice, check_flag, check_number, check_whole

SCHEDULES = ("constant", "linear", "half-linear")
QUANTIZERS = ("normalised", "dot", "fsq")
WEIGHT_KINDS = ("int8", "fp8", "int4")  # the kinds of quantised weights
FAMILIES = (  # checkpoints published by other projects
    "llamagen", "janus", "simplear", "wallaroo", "emu3.5", "llama", "vq", "cosmos", "ibq",
)  # fmt: skip
MAX_PIXELS = 8192 * 8192
# Without these limits an untrusted file could make its reader run forever.
MAX_LAYERS, MAX_COUNT = 10_000, 2**28
# Those of other fields: windows a side, tokens, resolutions, characters.
MOST = {"max_grid": 4096, "max_prompt": 8192, "channel_multipliers": 10, "template": 1000} | (
    dict.fromkeys(("layers", "res_blocks", "fuse_blocks"), MAX_LAYERS)
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_whole(config, least: int, *names: str) -> None:
    for name in names:
        check_whole(name, getattr(config, name), least, MOST.get(name, MAX_COUNT))


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Shape of the VQGAN image tokenizer. The defaults are LlamaGen's VQ-16 (arXiv 2406.06525).

    `quantizer` is one of QUANTIZERS: a codebook of vectors of length 1, one of vectors as they are,
    or finite scalar quantisation with so many `levels` in each dimension. Squares of `patch` x
    `patch` pixels are packed into channels before the first layer. Attention follows each block of
    the `attention_levels`, 0 the lowest resolution; `video` has what one picture needs of a
    tokenizer of videos: pointwise layers in the middle and before the decoder's second upsampling.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    norm_groups: int = 32
    latent_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    quantizer: str = "normalised"
    levels: tuple[int, ...] = ()
    patch: int = 1
    attention_levels: tuple[int, ...] = (0,)
    video: bool = False

    def __post_init__(self):
        for name in ("channel_multipliers", "levels", "attention_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_whole(
            self, 1, "channels", "res_blocks", "norm_groups",
            "latent_channels", "codebook_size", "codebook_dim",
        )  # fmt: skip
        levels = len(self.channel_multipliers)
        check_whole("the number of channel_multipliers", levels, 1, MOST["channel_multipliers"])
        for multiplier in self.channel_multipliers:
            check_whole("each of channel_multipliers", multiplier, 1, MAX_COUNT)
            channels = self.channels * multiplier
            _require(
                channels % self.norm_groups == 0,
                f"norm_groups {self.norm_groups} must divide the {channels} channels of each level",
            )
        check_choice("quantizer", self.quantizer, QUANTIZERS)
        check_choice("patch", self.patch, (1, 2, 4, 8))
        for level in self.attention_levels:
            check_whole("each of attention_levels", level, 0, levels - 1)
        check_flag("video", self.video)
        _require(levels > 2 or not self.video, "video needs three channel_multipliers or more")
        for level in self.levels:
            check_whole("each of levels", level, 2, 2**16)
        if self.quantizer == "fsq":
            _require(
                math.prod(self.levels) == self.codebook_size
                and len(self.levels) == self.codebook_dim,
                f"levels {self.levels!r:.80} must be codebook_dim numbers whose product is "
                "codebook_size",
            )
        else:
            _require(not self.levels, "levels are those of the quantizer fsq")

    @classmethod
    def from_fields(cls, fields: dict) -> "ImageTokenizerConfig":
        """What a file stores. Raises ValueError, or TypeError for others."""
        fields = dict(fields)
        if "level_attention" in fields:  # in older files
            fields["attention_levels"] = (0,) if fields.pop("level_attention") else ()
        return cls(**fields)

    @property
    def blocks(self) -> int:
        """Residual blocks on each side, at least; each has several tensors."""
        return self.res_blocks * len(self.channel_multipliers)

    @property
    def stride(self) -> int:
        """Pixels per code along each side."""
        return self.patch * 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the unified model: LLaMA blocks over text tokens and fused image tokens.

    `dim` is the paper's d, `windows` the values of its s that the model supports, the default
    first; `fuse_blocks` is its n, the residual MLP blocks on each side. `window_head` is the hidden
    size of the head that predicts codes autoregressively within the window; 0 predicts them
    independently. `context` counts transformer positions (text and fused image tokens together).

    For published models: `head_hidden` is the size of a hidden layer before the head, both with
    biases; 0 is a linear head. `rope_axes` 2 uses the row and column of a window as its position,
    and gives text none; 1 counts tokens. `rope_scaling` is Llama 3's: factor, low and high
    frequency factor, original context. `text_head` is an output layer for text that is separate
    from the text embedding. `head_dim` is the size of an attention head, dim / heads if None;
    `qkv_bias` gives the projections to queries, keys and values biases (as in Qwen2), and `qk_norm`
    normalises each head of queries and keys by RMSNorm before the rotary embedding (as in Qwen3).
    `row_end` is the id of a text token that follows each row of windows but the last.
    """

    text_vocabulary: int
    codebook_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    windows: tuple[int, ...] = (2,)
    fuse_blocks: int = 2
    window_head: int = 0
    context: int = 1024
    max_prompt: int = 128
    max_grid: int = 128
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    head_hidden: int = 0
    rope_axes: int = 1
    rope_scaling: tuple[float, float, float, float] | None = None
    text_head: bool = False
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    row_end: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "windows", tuple(self.windows))
        _check_whole(
            self, 1, "text_vocabulary", "codebook_size", "dim", "layers", "heads", "kv_heads",
            "hidden", "context", "max_prompt", "max_grid", "rope_axes",
        )  # fmt: skip
        _check_whole(self, 0, "fuse_blocks", "window_head", "head_hidden")
        for name in ("text_head", "qkv_bias", "qk_norm"):
            check_flag(name, getattr(self, name))
        for window in self.windows:
            check_whole("each of windows", window, 1, MAX_COUNT)
        _require(
            0 < len(set(self.windows)) == len(self.windows),
            f"windows must be distinct integers of at least 1, not {self.windows!r:.80}",
        )
        if self.head_dim is None:
            _require(
                self.dim % (2 * self.heads) == 0,
                f"dim {self.dim} must be an even multiple of heads {self.heads}",
            )
        else:
            check_whole("head_dim", self.head_dim, 2, MAX_COUNT)
            _require(self.head_dim % 2 == 0, f"head_dim must be even, not {self.head_dim}")
        _require(
            self.rope_axes == 1 or (self.rope_axes == 2 and self.head_size % 4 == 0),
            f"rope_axes must be 1, or 2 with a head size divisible by 4, not {self.rope_axes!r}",
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}",
        )
        for window in self.windows:
            _require(
                self.dim % window**2 == 0,
                f"dim {self.dim} must be a multiple of window squared ({window**2})",
            )
        _require(
            self.max_positions > 0,
            f"context {self.context} has no room beside max_prompt {self.max_prompt}",
        )
        if self.row_end is not None:
            check_whole("row_end", self.row_end, 0, self.text_vocabulary - 1)
            _require(self.rope_axes == 1, "row_end needs rope_axes 1")
        check_number("rope_theta", self.rope_theta, 1, 1e12)
        check_number("norm_eps", self.norm_eps, 1e-12, 1)
        if self.rope_scaling is not None:
            scaling = tuple(self.rope_scaling)
            object.__setattr__(self, "rope_scaling", scaling)
            for number in scaling:
                check_number("each of rope_scaling", number, 1e-6, MAX_COUNT)
            _require(
                len(scaling) == 4 and scaling[1] < scaling[2],
                f"rope_scaling must be four numbers, the third above the second, not {scaling}",
            )

    @property
    def blocks(self) -> int:
        """Residual blocks; each has several tensors."""
        return self.layers + 2 * self.fuse_blocks * sum(window > 1 for window in self.windows)

    @property
    def window(self) -> int:
        """The default window."""
        return self.windows[0]

    @property
    def head_size(self) -> int:
        """The size of an attention head."""
        return self.head_dim or self.dim // self.heads

    @property
    def max_positions(self) -> int:
        """Positions of the largest picture that fits beside the longest prompt."""
        return self.context - self.max_prompt - 4  # begin, rows, columns, image start

    def positions(self, rows: int, columns: int) -> int:
        """Those of a picture of so many windows."""
        return rows * columns + (0 if self.row_end is None else rows - 1)


@dataclass(frozen=True)
class PromptConfig:
    """How a prompt is framed.

    The pieces of `template` are special tokens, <...>, and text; one piece of text has {prompt} in
    it. In the others, {rows} and {columns} are the picture's size in windows, {height} and {width}
    that in pixels. `pad` is the token that pads shorter prompts on the left.

    The unconditional prompt is the template without the piece of {prompt}; or with
    `padded_negative`, the conditional prompt with all tokens except the first and last replaced by
    `pad`; or, where there is a template of its own, `negative`, with the negative prompt in it, for
    which `negative_text` stands if it is empty.
    """

    template: tuple[str, ...] = (
        "<|begin|>", "{prompt}", "<|rows:{rows}|>", "<|columns:{columns}|>", "<|image_start|>"
    )  # fmt: skip
    pad: str = "<|pad|>"
    padded_negative: bool = False
    negative: tuple[str, ...] = ()
    negative_text: str = ""

    def __post_init__(self):
        object.__setattr__(self, "template", tuple(self.template))
        object.__setattr__(self, "negative", tuple(self.negative))
        texts = self.pad, self.negative_text, *self.template, *self.negative
        _require(
            {type(text) for text in texts} == {str}
            and len(texts) + sum(map(len, texts)) <= MOST["template"],
            f"the prompt's template and pad must be strings of {MOST['template']} characters at "
            "most",
        )
        check_flag("padded_negative", self.padded_negative)
        for template in (self.template, *([self.negative] if self.negative else [])):
            _require(
                [piece.count("{prompt}") for piece in template if "{prompt}" in piece] == [1],
                f"the prompt's template must contain {{prompt}} once, not {template!r:.200}",
            )
        _require(
            not self.negative or not self.padded_negative,
            "padded_negative is for a prompt without a negative template",
        )
        _require(
            bool(self.negative) or not self.negative_text,
            "negative_text needs a negative template",
        )


@dataclass(frozen=True)
class GenerationConfig:
    """How one picture is sampled. A checkpoint stores its own defaults.

    `width` and `height` are in pixels; `cfg` is the guidance scale (1 turns guidance off); `top_k`
    0 and `top_p` 1 turn the filters off; `temperature` 0 is greedy decoding. `window` is one that
    the model supports, or None for its default; a larger one is faster and coarser. `any_size` also
    allows sizes that the model was not trained at.
    """

    width: int = 256
    height: int = 256
    cfg: float = 4.0
    schedule: str = "half-linear"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    window: int | None = None
    any_size: bool = False

    def __post_init__(self):
        for name in ("width", "height", "top_k", "window"):
            if getattr(self, name) is not None or name != "window":
                check_whole(name, getattr(self, name), int(name != "top_k"), MAX_COUNT)
        for name, most in (("cfg", 100), ("temperature", 100), ("top_p", 1)):
            check_number(name, getattr(self, name), 0, most)
        _require(
            self.width * self.height <= MAX_PIXELS,
            f"{self.width}x{self.height} exceeds the limit of {MAX_PIXELS} pixels",
        )
        check_choice("schedule", self.schedule, SCHEDULES)
        _require(self.top_p > 0, "top_p must be above 0")
        check_flag("any_size", self.any_size)


@dataclass(frozen=True)
class Config:
    """All that is needed to rebuild a checkpoint's modules, and its sampling defaults."""

    image_tokenizer: ImageTokenizerConfig
    model: ModelConfig
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)

    def __post_init__(self):
        _require(
            self.image_tokenizer.codebook_size == self.model.codebook_size,
            f"codebook_size differs: {self.image_tokenizer.codebook_size} in the image tokenizer, "
            f"{self.model.codebook_size} in the model",
        )

    @property
    def pixels_per_window(self) -> int:
        """Width and height must be multiples of this many pixels, with the default window."""
        return self.image_tokenizer.stride * self.model.window

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Raises ValueError for text that is not a configuration or has unknown fields."""
        try:
            parts = json.loads(text)
            model = parts["model"]
            if "width" in model and "dim" not in model:  # its name in older files
                model["dim"] = model.pop("width")
            return cls(
                ImageTokenizerConfig.from_fields(parts["image_tokenizer"]),
                ModelConfig(**model),
                GenerationConfig(**parts["generation"]),
                PromptConfig(**parts.get("prompt", {})),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the configuration is not one of this version: {error}") from None


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "128x128, 192x128" -> [(128, 128), (192, 128)]; "" -> []. Raises ValueError."""
    try:
        pairs = [part.split("x") for part in text.split(",") if part.strip()]
        sizes = [(int(width), int(height)) for width, height in pairs]
    except ValueError:
        raise ValueError(f"sizes must be like 128x128, 192x128, not {text!r:.80}") from None
    for width, height in sizes:
        GenerationConfig(width, height)  # which checks them
    return sizes
