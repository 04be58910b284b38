"""From a prompt to image codes."""

from dataclasses import replace

import torch
from comfy_api.latest import io

from ..tokenshuffle_core import checkpoints
from ..tokenshuffle_core.class_names import imagenet
from ..tokenshuffle_core.config import GenerationConfig
from ..tokenshuffle_core.pipeline import seeds_from
from . import host, inputs
from .latents import codes_of, kept_by, latent_of
from .preview import Preview
from .types import CATEGORY, Codes, Model, Options, Prompt, PromptText


class TokenShufflePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShufflePrompt",
            display_name="Token-Shuffle Prompt",
            category=CATEGORY,
            description=(
                "Turns text into the model's text tokens, for a positive or negative prompt. A "
                "model knows only what it was trained on: see its model card."
            ),
            inputs=[
                Model.Input("model", tooltip="The model whose text tokenizer reads the prompt."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip=(
                        "What the picture shows. Works best in the style of the captions that the "
                        "model was trained on; the model card on the loader says more."
                    ),
                ),
            ],
            outputs=[
                Prompt.Output(display_name="prompt", tooltip="Connect to positive or negative.")
            ],
            **host.search_aliases(
                "prompt, text encode, clip text encode, positive prompt, negative prompt",
                "提示词, 文本编码, 正向提示词, 负面提示词",
                "プロンプト, テキストエンコード",
            ),
        )

    @classmethod
    def execute(cls, model: host.Loaded, text: str) -> io.NodeOutput:
        kind = model.pipeline.text_tokenizer.kind
        try:
            model.pipeline.encode_prompt(text)  # what is wrong with it is this node's error
        except ValueError as error:
            if kind != "classes":
                raise
            raise ValueError(
                f"{model.name} reads classes, which the Class node lists, not text: {error}"
            ) from None
        return io.NodeOutput(PromptText(text, kind, model.name))


class TokenShuffleClass(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleClass",
            display_name="Token-Shuffle ImageNet Class",
            category=CATEGORY,
            description=(
                "An ImageNet class as the prompt for a class-conditional model, such as LlamaGen. "
                "Token-Shuffle Prompt also accepts the name or number of a class."
            ),
            inputs=[
                Model.Input("model", tooltip="A class-conditional model."),
                io.Combo.Input(
                    "name",
                    options=imagenet(),
                    default=imagenet()[207],
                    tooltip="What the picture shows. Type a few letters to search.",
                ),
            ],
            outputs=[
                Prompt.Output(display_name="prompt", tooltip="Connect to positive or negative.")
            ],
            **host.search_aliases(
                "imagenet, class, label, class conditional, llamagen class",
                "类别, 类别条件",
                "クラス, クラス条件",
            ),
        )

    @classmethod
    def execute(cls, model: host.Loaded, name: str) -> io.NodeOutput:
        model.pipeline.encode_class(name)
        return io.NodeOutput(PromptText(name, model.pipeline.text_tokenizer.kind, model.name))


class TokenShuffleSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleSampler",
            display_name="Token-Shuffle Sampler",
            category=CATEGORY,
            description=(
                "Generates a picture as image codes, one window of codes per step, row by row. "
                "Decode them with Token-Shuffle VQ Decode."
            ),
            inputs=[
                Model.Input("model", tooltip="The model that generates the codes."),
                inputs.positive(),
                inputs.negative(),
                inputs.pixels("width"),
                inputs.pixels("height"),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="How many pictures to generate at once: with seed, seed + 1, ...",
                ),
                inputs.seed(),
                inputs.cfg(),
                *inputs.options(),
                inputs.window(),
                Options.Input(
                    "options",
                    optional=True,
                    tooltip="Replaces schedule, temperature, top_k and top_p of this node, and "
                    "can allow any size.",
                ),
            ],
            outputs=[Codes.Output(display_name="codes", tooltip="For VQ Decode.")],
            **host.search_aliases(
                "sampler, ksampler, text to image autoregressive, text to image, generate image",
                "采样器, 采样",
                "サンプラー, サンプリング",
            ),
        )

    @classmethod
    def execute(
        cls,
        model: host.Loaded,
        positive: PromptText,
        negative: PromptText | None = None,
        options: dict | None = None,
        *,
        batch_size: int = 1,
        seed: int = 0,
        window: int = 0,
        **settings,
    ) -> io.NodeOutput:
        own = replace(model.pipeline.config.generation, window=window or None, **settings)
        settings = replace(own, **options or {})  # what they replace has been checked as well
        codes = draw(model, positive, negative, settings, seed, batch_size)
        return io.NodeOutput(latent_of(codes, model.codebook))


class TokenShuffleOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleOptions",
            display_name="Token-Shuffle Options",
            category=CATEGORY,
            description=(
                "How codes are sampled from the model's predictions and how guidance grows: one "
                "place to set this for several samplers."
            ),
            inputs=[
                *inputs.options(),
                io.Boolean.Input(
                    "any_size",
                    default=False,
                    optional=True,
                    tooltip="Also allow sizes that the model was not trained at. Most models draw "
                    "noise there.",
                ),
            ],
            outputs=[Options.Output(display_name="options", tooltip="For the samplers.")],
            **host.search_aliases(
                "temperature, top k, top p, sampling options, guidance schedule, any size",
                "温度, 采样选项, 引导调度, 任意尺寸",
                "サンプリング設定, ガイダンス, 任意のサイズ",
            ),
        )

    @classmethod
    def execute(cls, **options) -> io.NodeOutput:
        replace(GenerationConfig(), **options)  # a bad value is this node's error, not a sampler's
        return io.NodeOutput(options)


class TokenShuffleComplete(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleComplete",
            display_name="Token-Shuffle Complete Image",
            category=CATEGORY,
            description=(
                "Keeps the top or left part of a picture and generates the rest. The model works "
                "row by row from the top left and sees only what comes before: it cannot fill in "
                "above or to the left of the kept part, nor match what is kept further down."
            ),
            inputs=[
                Model.Input("model", tooltip="The model that generates the codes."),
                inputs.positive(),
                inputs.negative(),
                Codes.Input(
                    "codes",
                    tooltip="The picture to complete, from VQ Encode or a sampler. A noise mask "
                    "on it says what to keep in place of keep_top and keep_left.",
                ),
                inputs.pixels(
                    "keep_top",
                    default=64,
                    minimum=0,
                    tooltip="Rows to keep, a multiple of the window.",
                ),
                inputs.pixels(
                    "keep_left",
                    default=0,
                    minimum=0,
                    tooltip="Columns to keep, a multiple of the window. Each row continues its "
                    "own kept part, which the rows above it do not see.",
                ),
                inputs.seed(),
                inputs.cfg(),
                Options.Input(
                    "options", optional=True, tooltip="If not connected, the model's own settings."
                ),
            ],
            outputs=[Codes.Output(display_name="codes", tooltip="For VQ Decode.")],
            **host.search_aliases(
                "complete image, outpaint, outpainting, inpaint, inpainting, extend image",
                "图像补全, 补全, 扩图, 局部重绘",
                "画像補完, アウトペイント, インペイント",
            ),
        )

    @classmethod
    def execute(
        cls,
        model: host.Loaded,
        positive: PromptText,
        codes: dict,
        keep_top: int = 64,
        keep_left: int = 0,
        seed: int = 0,
        negative: PromptText | None = None,
        options: dict | None = None,
        **cfg,
    ) -> io.NodeOutput:
        pipeline, mask = model.pipeline, codes.get("noise_mask")
        codes = codes_of(codes, model.codebook)
        count, rows, columns = codes.shape
        size = {"width": columns * model.stride, "height": rows * model.stride}
        settings = replace(pipeline.config.generation, **size, **cfg, **options or {})
        unit = model.stride * pipeline.window(settings)
        if mask is not None:
            keep_top, keep_left = (unit * kept for kept in kept_by(mask, *pipeline.grid(settings)))
        for name, value in (("keep_top", keep_top), ("keep_left", keep_left)):
            if value % unit:
                lower = value // unit * unit
                raise ValueError(
                    f"{name} {value} does not fit: this model needs a multiple of {unit}, the "
                    f"nearest are {lower} and {lower + unit}"
                )
        if keep_top >= settings.height or keep_left >= settings.width:
            raise ValueError(
                f"keep_top {keep_top} and keep_left {keep_left} leave nothing to generate in a "
                f"picture of {settings.width}x{settings.height}: keep less"
            )
        given = torch.full_like(codes, -1)
        top, left = keep_top // model.stride, keep_left // model.stride
        given[:, :top] = codes[:, :top]
        given[:, :, :left] = codes[:, :, :left]
        drawn = draw(model, positive, negative, settings, seed, count, given)
        return io.NodeOutput(latent_of(drawn, model.codebook))


def draw(
    model: host.Loaded,
    positive: PromptText,
    negative: PromptText | None,
    settings: GenerationConfig,
    seed: int,
    count: int,
    given: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes (count, H, W) int64 of pictures drawn before the user's eyes."""
    ids = read(model, positive)
    negative = negative or replace(positive, text="")
    negative_ids = read(model, negative, negative=True)
    pipeline = model.pipeline
    rows, columns = pipeline.grid(settings)
    untrained = not checkpoints.is_trained_at(pipeline.config, pipeline.card, settings)
    note = f"{settings.width}x{settings.height}, {rows * columns} positions"
    note += ", a size that the model was not trained at" if untrained else ""
    host.say(note)
    model.with_model(settings, count)
    steps = pipeline.sample(
        [ids] * count,
        negative_ids,
        settings,
        seeds_from(seed, count),
        given=given,
        device=model.model.load_device,
    )
    preview = None
    if host.previews_wanted():
        preview = Preview(pipeline, model.colours, model.vq.load_device)
    codes = host.follow(model.name, steps, preview).codes.cpu()
    if untrained:
        host.say(note)  # the picture may need this explanation
    return codes


def read(model: host.Loaded, prompt: PromptText, *, negative: bool = False) -> list[int]:
    """Token ids of a prompt or a negative one, whichever model it was made with. Raises
    ValueError."""
    kind = model.pipeline.text_tokenizer.kind
    if prompt.kind != kind:
        raise ValueError(
            f"the prompt was made with {prompt.model}, which reads {prompt.kind}, and {model.name} "
            f"reads {kind}: connect both nodes to the same model"
        )
    return model.pipeline.encode_prompt(prompt.text, negative=negative)
