"""Models, LoRAs and codes in ComfyUI's folders."""

import os
import re
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG

import folder_paths

from ...tokenshuffle_core.checkpoints import BUNDLED, PICKLES
from ...tokenshuffle_core.checks import check_text
from ...tokenshuffle_core.files import sha256

FOLDER, OTHERS, LORAS = "tokenshuffle", "checkpoints", "loras"
SAVED_CODES = "codes"  # in the output folder, by default
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
# After the user's own folders, whose files take precedence.
folder_paths.add_model_folder_path(FOLDER, str(BUNDLED.parent))

COSMOS = (
    "a folder Cosmos-1.0-Tokenizer-DV8x16x16 with encoder.jit and decoder.jit (0.2 GB) of "
    "https://huggingface.co/nvidia/Cosmos-1.0-Tokenizer-DV8x16x16 (NVIDIA Open Model License)"
)
IBQ = (
    "a folder Emu3.5-VisionTokenizer with all files of "
    "https://huggingface.co/BAAI/Emu3.5-VisionTokenizer"
)
ANY = "put its file or folder there"
# What to do for a model that is missing, by how its name starts: the first that fits. A page is
# named where its authors name it; sizes are the hub's, or those of the parameters in 16 bits.
HOW_TO_GET = {
    r"(?i).*\.safetensors$": ANY,
    r"c2i_([BL]_256|(B|L|XL|XXL|3B)_384)\.pt$": "download {name}{size} and vq_ds16_c2i.pt (0.3 GB) "
    "into that folder from https://huggingface.co/FoundationVision/LlamaGen (MIT licence)",
    r"Janus-Pro-1B$": "make a folder {name} there and download config.json, tokenizer.json and "
    "pytorch_model.bin{size} into it from https://huggingface.co/deepseek-ai/{name} (DeepSeek "
    "Model License)",
    r"Janus-(Pro-7B|1\.3B)$": "make a folder {name} there with all files of "
    "https://huggingface.co/deepseek-ai/{name} (DeepSeek Model License)",
    r"SimpleAR-(0\.5B|1\.5B)-(SFT|RL)$": "make a folder {name} there with all files{size} of "
    "https://huggingface.co/Daniel0724/{name} (its code is under MIT, see that page for the "
    f"weights), and beside it {COSMOS}",
    r"Emu3\.5(-Image)?$": "make a folder {name} there with all files{size} of "
    "https://huggingface.co/BAAI/{name} (its code is under Apache-2.0, see that page for the "
    "weights) and emu3.tiktoken of "
    "https://github.com/baaivision/Emu3.5/tree/main/src/tokenizer_emu3_ibq, and beside it "
    f"{IBQ}",
    r"(?i)wallaroo$": "make a folder {name} there with the one file of "
    "https://huggingface.co/jiezhueval/Wallaroo (its code is under Apache-2.0, see that page for "
    "the weights), tokenizer.json and config.json of "
    "https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, and vq_ds16_t2i.pt (0.3 GB) of "
    "https://huggingface.co/peizesun/llamagen_t2i",
    r"(?i).*wallaroo": "put its file there, and beside it tokenizer.json, config.json and "
    "vq_ds16_t2i.pt",
    r"(?i).*janus(?!flow)": "put its folder there, with config.json, tokenizer.json and the "
    "weights",
    r"c2i_": "put its file there, and vq_ds16_c2i.pt beside it",
    r"(?i).*simplear": f"put its folder there, and beside it {COSMOS}",
    r"(?i).*emu3\.5": f"put its folder there, emu3.tiktoken into it, and beside it {IBQ}",
    r"": ANY,
}
SIZES = {
    "c2i_L_384.pt": "1.37",
    "Janus-Pro-1B": "4.18",
    "SimpleAR-0.5B-SFT": "1.1",
    "SimpleAR-0.5B-RL": "1.1",
    "SimpleAR-1.5B-SFT": "3.3",
    "SimpleAR-1.5B-RL": "3.3",
    "Emu3.5": "68",
    "Emu3.5-Image": "68",
}
TEXTS = (".json", ".txt", ".tiktoken")  # files of text tokenizers


def checkpoints() -> list[str]:
    """Checkpoints of our own, and models as published: LlamaGen's files and folders with a
    config.json. Of ComfyUI's other checkpoints, only those whose names `_recognised` accepts."""
    ours = _models(FOLDER)
    return ours + [name for name in _models(OTHERS) if name not in ours and _recognised(name)]


def _models(folder: str) -> list[str]:
    names = folder_paths.get_filename_list(folder)
    inside = {os.path.dirname(name) for name in names} - {""}
    tokenizers = {name for name in inside if _is_image_tokenizer(name)}
    folders = {name for name in inside if _folder(folder, name)} - tokenizers
    files = [
        name
        for name in names
        if name.lower().endswith((".safetensors", *PICKLES))
        and os.path.dirname(name) not in folders | tokenizers
        and not _is_image_tokenizer(name)
    ]
    return sorted([*files, *folders])


def _folder(folder: str, name: str) -> Path | None:
    """The folder of a published model, which has a config.json."""
    path = name and folder_paths.get_full_path(folder, os.path.join(name, "config.json"))
    return Path(path).parent if path else None


def _called(name: str) -> str:
    """The last part of a name, or the model's in Hugging Face's cache."""
    *folders, last = Path(name).parts or ("",)
    return folders[-2].rpartition("--")[2] if folders[1:] and folders[-1] == "snapshots" else last


def _is_image_tokenizer(name: str) -> bool:
    """Whether a published file or folder, perhaps in Hugging Face's cache, is the image tokenizer
    of the models beside it."""
    *_, last = parts = Path(name.lower()).parts
    folders = (part.rpartition("--")[2] for part in parts)
    return last.startswith("vq_") or any(
        re.match(r"cosmos-.*tokenizer|emu3\.5-visiontokenizer", folder) for folder in folders
    )


def _recognised(name: str) -> bool:
    name = _called(name).lower()
    known = "janus", "tokenshuffle", "simplear", "wallaroo", "emu3.5"
    return name.startswith("c2i_") or any(each in name for each in known)


def checkpoint_path(name: str) -> Path:
    """The file or the folder behind one of `checkpoints`. Raises FileNotFoundError."""
    for folder in (FOLDER, OTHERS) if _recognised(name) else (FOLDER,):
        path = folder_paths.get_full_path(folder, name) or _folder(folder, name)
        if path:
            return Path(path)
    raise FileNotFoundError(
        f"{name} is not in ComfyUI/models/{FOLDER}: {_how_to_get(name)}, then press R"
    )


def _how_to_get(name: str) -> str:
    name = _called(name)
    how = next(how for start, how in HOW_TO_GET.items() if re.match(start, name))
    return how.format(name=name, size=f" ({SIZES[name]} GB)" if name in SIZES else "")


def version(path: Path) -> str:
    """A text that is another one when a file of the checkpoint or LoRA has been written again, or
    one of the tokenizers that it may be read with, inside it or beside it."""
    places = {path.parent, path.resolve().parent}
    places |= {place.parents[1] for place in places if place.name == "snapshots"}
    around = {each for place in places for each in place.glob("*")}
    found = {path} if path.is_file() else {*path.glob("*")}
    for each in found | around:
        if _is_image_tokenizer(each.name):
            found |= {each, *each.rglob("*")}
    if path.suffix.lower() in PICKLES:
        found |= {each for each in around if each.suffix.lower() in TEXTS}
    written = [(file.name, *_written(file)) for file in sorted(found)]
    return sha256([repr(written).encode()])[:16]


def _written(path: Path) -> tuple[int, int]:
    """Size and time of a file; zeros for a folder and for what cannot be looked at."""
    with suppress(OSError):
        found = path.stat()
        if S_ISREG(found.st_mode):
            return found.st_size, found.st_mtime_ns
    return 0, 0


def loras() -> list[str]:
    names = folder_paths.get_filename_list(LORAS)
    return [name for name in names if name.lower().endswith(".safetensors")]


def saved_codes() -> list[str]:
    """Files in the input folder, and in the output folder, where Save Codes writes."""
    outputs = _numpy_files(folder_paths.get_output_directory())
    return _numpy_files(folder_paths.get_input_directory()) + [f"{n} [output]" for n in outputs]


def _numpy_files(folder: str) -> list[str]:
    return sorted(
        (Path(inside) / name).relative_to(folder).as_posix()
        for inside, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(".npy")
    )


def codes_path(name: str) -> Path:
    """The file behind one of `saved_codes`, checked since ComfyUI 0.3 does not check lists."""
    if name not in saved_codes():
        raise ValueError(f"file {name!r} is neither in the input folder nor in the output folder")
    return Path(folder_paths.get_annotated_filepath(name))


def output_path(prefix: str, suffix: str, width: int, height: int) -> tuple[Path, dict[str, str]]:
    """A new file in the output folder, numbered and with %...% replaced as in the names of
    pictures: its path, and its name as ComfyUI's API gives theirs. Raises ValueError."""
    check_text("filename_prefix", prefix)
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    # A batch is one file, the first.
    name = f"{name.replace('%batch_num%', '0')}_{counter:05}_{suffix}"
    return Path(folder) / name, {"filename": name, "subfolder": subfolder, "type": "output"}


def lora_path(name: str) -> Path:
    """Raises FileNotFoundError."""
    return Path(folder_paths.get_full_path_or_raise(LORAS, name))
