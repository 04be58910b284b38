"""Image codes on disk, in the format that the command line's `encode` writes."""

from comfy_api.latest import io

from ..tokenshuffle_core.images import read_codes, write_codes
from . import host
from .latents import codes_of, latent_of
from .types import CATEGORY, VQ, Codes


class TokenShuffleSaveCodes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleSaveCodes",
            display_name="Save Codes (Token-Shuffle)",
            category=CATEGORY,
            description="Saves image codes to a .npy file, the whole batch in one file.",
            inputs=[
                Codes.Input("codes", tooltip="From the sampler or from VQ Encode."),
                io.String.Input(
                    "filename_prefix",
                    default=f"{host.SAVED_CODES}/TokenShuffle",
                    tooltip="In ComfyUI's output folder; a number is added. It may contain what "
                    "Save Image replaces, such as %date:yyyy-MM-dd% or %width%.",
                ),
                VQ.Input(
                    "vq",
                    optional=True,
                    tooltip="The image tokenizer, for a latent of ComfyUI's VAE Encode, which does "
                    "not say what encoded it.",
                ),
            ],
            is_output_node=True,
            **host.search_aliases(
                "save codes, save tokens, save latent, npy",
                "保存图像码",
                "コードを保存",
            ),
        )

    @classmethod
    def execute(
        cls, codes: dict, filename_prefix: str, vq: host.Loaded | None = None
    ) -> io.NodeOutput:
        if vq is not None:
            host.check_ours(vq)
        book = vq.codebook if vq else codes.get("codebook")
        codes = codes_of(codes, book)
        rows, columns = (side * (book.stride if book else 1) for side in codes.shape[1:])
        path, saved = host.output_path(filename_prefix, ".npy", columns, rows)
        write_codes(path, codes)
        host.say(path.name)
        return io.NodeOutput(ui={"codes": [saved]})


class TokenShuffleLoadCodes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenShuffleLoadCodes",
            display_name="Load Codes (Token-Shuffle)",
            category=CATEGORY,
            description="Loads image codes from a .npy file.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.saved_codes(),
                    tooltip="A .npy file in ComfyUI's input folder, or in its output folder, where "
                    "codes are saved.",
                )
            ],
            outputs=[Codes.Output(display_name="codes", tooltip="For VQ Decode.")],
            **host.search_aliases(
                "load codes, load tokens, load latent, npy",
                "加载图像码",
                "コードを読み込む",
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> float:
        return host.codes_path(file).stat().st_mtime

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(latent_of(read_codes(host.codes_path(file)), None))
