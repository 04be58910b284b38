"""Pictures about pictures: a sheet of variants with labels, and a curve."""

from dataclasses import replace

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont

from ..tokenshuffle_core.guidance import scale_at
from . import host, inputs
from .sampling import draw
from .types import CATEGORY, VQ, Model, Options, PromptText

INK, PAPER, LINE, ACCENT = (32, 32, 32), (255, 255, 255), (208, 208, 208), (36, 99, 235)
MARGIN = 8  # pixels around labels
CURVE = (640, 360)  # pixels of the guidance curve


class TokenShuffleXYSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleXYSheet",
            display_name="Token-Shuffle XY Sheet",
            category=CATEGORY,
            description="Runs one prompt with several seeds and guidance scales, side by side.",
            inputs=[
                Model.Input("model", tooltip="The model that generates the codes."),
                VQ.Input("vq", tooltip="The image tokenizer that turns the codes into pixels."),
                inputs.positive(),
                inputs.negative(),
                inputs.pixels("width"),
                inputs.pixels("height"),
                inputs.seed(),
                io.Int.Input(
                    "seeds",
                    default=4,
                    min=1,
                    max=16,
                    optional=True,
                    tooltip="Columns: seed, seed + 1, ...",
                ),
                io.String.Input(
                    "cfgs",
                    default="1, 2, 4, 8",
                    optional=True,
                    tooltip="Rows: guidance scales, comma-separated.",
                ),
                io.String.Input(
                    "windows",
                    default="",
                    optional=True,
                    tooltip="More rows: window sizes that the model supports, comma-separated. "
                    "If empty, the model's default.",
                ),
                Options.Input(
                    "options", optional=True, tooltip="If not connected, the model's own settings."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="All pictures, labelled."),
                io.Image.Output(display_name="images", tooltip="The pictures, row by row."),
            ],
            **host.search_aliases(
                "xy plot, xyz plot, grid, compare seeds, compare cfg, contact sheet",
                "对比图, 网格图, 比较",
                "比較, グリッド",
            ),
        )

    @classmethod
    def execute(
        cls,
        model: host.Loaded,
        vq: host.Loaded,
        positive: PromptText,
        negative: PromptText | None = None,
        options: dict | None = None,
        *,
        seed: int = 0,
        seeds: int = 4,
        cfgs: str = "1, 2, 4, 8",
        windows: str = "",
        **size: int,
    ) -> io.NodeOutput:
        host.check_ours(vq)
        model.codebook.check(vq.codebook)
        own = model.pipeline.config.generation
        settings = replace(own, **size, **options or {})
        sizes = read_numbers("windows", windows, int) if windows.strip() else [own.window]
        all_settings = [  # bad ones fail at once
            replace(settings, cfg=scale, window=size)
            for scale in read_numbers("cfgs", cfgs, float)
            for size in sizes
        ]
        for one in all_settings:
            model.pipeline.grid(one)
        codes = torch.cat(
            [draw(model, positive, negative, row, seed, seeds) for row in all_settings]
        )
        rows = [vq.decode_codes(part) for part in codes.split(seeds)]
        columns = [f"seed {(seed + i) % 2**64}" for i in range(seeds)]
        titles = [
            f"cfg {one.cfg:g}" + (f", window {one.window}" if windows.strip() else "")
            for one in all_settings
        ]
        sheet = label(rows, titles, columns)
        return io.NodeOutput(sheet, torch.cat(rows))


class TokenShuffleCFGPlot(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleCFGPlot",
            display_name="Token-Shuffle CFG Plot",
            category=CATEGORY,
            description="Plots the guidance scale over the positions of a picture.",
            inputs=[inputs.cfg(), inputs.schedule()],
            outputs=[io.Image.Output(display_name="image", tooltip="The curve.")],
            is_deprecated=True,
        )

    @classmethod
    def execute(cls, cfg: float = 3.0, schedule: str = "half-linear") -> io.NodeOutput:
        return io.NodeOutput(to_tensor(curve(cfg, schedule)))


def read_numbers(name: str, text: str, kind: type) -> list:
    try:
        numbers = [kind(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"{name} must be numbers separated by commas, such as 1, 4, not {text!r}")
    return numbers


def label(pictures: list[torch.Tensor], rows: list[str], columns: list[str]) -> torch.Tensor:
    """Rows of pictures (n, H, W, 3) -> one sheet (1, H', W', 3) with a label for each row and
    column."""
    height, width = pictures[0].shape[1:3]
    font = ImageFont.load_default(max(12, min(height, width) // 16))
    left = round(max(map(font.getlength, rows))) + 2 * MARGIN
    top = round(font.size) + 2 * MARGIN
    # A column is as wide as its label where that is wider than the picture.
    step = max(width, round(max(map(font.getlength, columns)))) + MARGIN
    sheet = Image.new(
        "RGB", (left + len(columns) * step, top + len(rows) * (height + MARGIN)), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for x, text in enumerate(columns):
        pen.text((left + x * step + width / 2, top / 2), text, INK, font, anchor="mm")
    for y, (text, images) in enumerate(zip(rows, pictures, strict=True)):
        upper = top + y * (height + MARGIN)
        pen.text((MARGIN, upper + height / 2), text, INK, font, anchor="lm")
        for x, image in enumerate(images):
            pixels = (image * 255).clamp(0, 255).to(torch.uint8).numpy()
            sheet.paste(Image.fromarray(pixels), (left + x * step, upper))
    return to_tensor(sheet)


def curve(cfg: float, schedule: str) -> Image.Image:
    """The guidance scale over a picture, drawn with its axes."""
    positions = 256
    scales = [scale_at(schedule, cfg, position, positions) for position in range(positions)]
    width, height = CURVE
    left, top, right, bottom = 56, 40, width - 24, height - 48
    low, high = min(*scales, 0.0), max(*scales, 1.0)
    font = ImageFont.load_default(16)
    picture = Image.new("RGB", CURVE, PAPER)
    pen = ImageDraw.Draw(picture)

    def place(share: float, scale: float) -> tuple[float, float]:
        return (
            left + share * (right - left),
            bottom - (scale - low) / (high - low) * (bottom - top),
        )

    for scale in sorted({low, 1.0, scales[-1], high}):
        pen.line([place(0, scale), place(1, scale)], LINE)
        pen.text((left - MARGIN, place(0, scale)[1]), f"{scale:g}", INK, font, anchor="rm")
    for share in (0, 0.5, 1):
        pen.text((place(share, low)[0], bottom + 16), f"{share:.0%}", INK, font, anchor="mm")
    points = [place(i / (positions - 1), scale) for i, scale in enumerate(scales)]
    pen.line(points, ACCENT, width=3)
    pen.text((left, 20), f"guidance scale, {schedule}, cfg {cfg:g}", INK, font, anchor="lm")
    pen.text(((left + right) / 2, height - 12), "position in the picture", INK, font, anchor="mm")
    return picture


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
