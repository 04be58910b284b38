"""Opens mutated copies of files through the doors that users open them by, and tells how that went.

    python -m tests.support.fuzz FOLDER COUNT SEED FIRST

prints a line of JSON for each file, COUNT of each kind: how it went, and what it took. FOLDER is
what `write` made.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support.cosmos import Cosmos, write_cosmos
from tests.support.loras import write_random_lora
from tests.support.models import random_checkpoint
from tests.support.mutations import (
    Chance,
    of_bytes,
    of_json_file,
    of_metadata,
    of_pickle,
    of_pieces,
    of_tensors,
)
from tests.support.public_models import write_emu, write_simplear, write_wallaroo
from tests.support.published import (
    janus,
    llama,
    llamagen_vq,
    randomise,
    write_janus,
    write_llama,
    write_llamagen,
    write_merges,
    write_original_janus,
    write_ranks,
)
from tests.support.vqgan import ibq, write_ibq
from tokenshuffle_core import checkpoints
from tokenshuffle_core.adapt.lora import merge_lora
from tokenshuffle_core.checkpoints import native
from tokenshuffle_core.cli.main import _parser
from tokenshuffle_core.data.extraction import extract
from tokenshuffle_core.data.shards import CodeShards
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.images import write_codes
from tokenshuffle_core.pipeline import Pipeline, load
from tokenshuffle_core.vocabulary import Subject, Vocabulary

ROOT = Path(__file__).parents[2]
MEMORY = 6 * 2**30  # of address space, which is not all used: a header must not ask for more
SECONDS = 30  # for one file, on a busy machine
RUNS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
PROMPTS = ("a red apple", "x" * 40, "a " * 40 + "b", "é ﷺ 红苹果 \t\n  y", "a" * 60)


def write(folder: Path) -> Path:
    """A file or a folder of each kind."""
    write_janus(janus(), folder / "janus")
    write_original_janus(janus(), folder / "original")
    write_llama(llama(False), folder / "llama", 3)
    for name in ("merges", "ranks"):
        (write_llama(llama(False), folder / name) / "tokenizer.json").unlink()
    write_merges(folder / "merges", ["a red apple"] * 3, "added_tokens.json")
    write_ranks(folder / "ranks", ["a red apple"] * 3)
    torch.save({"model": llamagen_vq()}, folder / "vq.pt")
    write_llamagen(folder / "llamagen")
    write_simplear(folder / "simplear" / "SimpleAR")
    write_emu(folder / "emu" / "Emu3.5-Image")
    write_wallaroo(folder / "wallaroo")
    write_ibq(ibq(), folder / "ibq")
    write_cosmos(randomise(Cosmos()), folder / "cosmos")
    save_file(randomise(Cosmos()).state_dict(), folder / "cosmos.safetensors")
    words = {"flat": {"en": "flat style", "de": "flach"}}
    subjects = Subject({"en": ("apple",), "de": ("Apfel",)}, ("flat",)), Subject({"en": ("pear",)})
    pipeline = random_checkpoint()
    pipeline.card[native.SIZES] = "32x32, 16x32"
    pipeline.vocabulary = Vocabulary(subjects, words, words, counts=(2,), kinds=("single",))
    pipeline.save(folder / "native.safetensors")
    write_random_lora(folder / "lora.safetensors", folder / "native.safetensors")
    quantize(pipeline.model, "int8")
    pipeline.save(folder / "int8.safetensors")
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 90, 200)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a red apple")
    extract(pictures, folder / "shards", pipeline.image_tokenizer, [(32, 32)], shard_size=2)
    write_codes(folder / "codes.npy", torch.randint(0, 64, (1, 3, 4)))
    return folder


def command(*arguments: object) -> None:
    """A command of the command line, without what makes a sentence of its errors."""
    options = _parser().parse_args(list(map(str, arguments)))
    options.run(options)


def draw(path: Path, folder: Path) -> None:
    command("info", path)
    draw_with(load(path))


def draw_with(pipeline: Pipeline) -> None:
    is_text = pipeline.text_tokenizer.kind == "text"
    for prompt in PROMPTS if is_text else ():
        pipeline.text_tokenizer.encode(prompt)
        pipeline.read_prompt(prompt)
    side = pipeline.config.pixels_per_window
    if any("{height}" in piece for piece in pipeline.config.prompt.template):
        side = 352  # the least that such a model has tokens for
    settings = replace(pipeline.config.generation, width=side, height=side, any_size=True)
    pipeline.generate("a red apple" if is_text else "1", settings=settings)


def convert(path: Path, folder: Path) -> None:
    to = path.parent / "converted.safetensors"
    checkpoints.convert(path, to, image_tokenizer=folder / "vq.pt")
    draw(to, folder)


def decode(path: Path, folder: Path) -> None:
    model = path if path.suffix != ".npy" else folder / "native.safetensors"
    codes = path if path.suffix == ".npy" else folder / "codes.npy"
    command("decode", codes, "-o", path.with_suffix(".png"), "--model", model)


def with_lora(path: Path, folder: Path) -> None:
    pipeline = load(folder / "native.safetensors")
    merge_lora(pipeline.model, path)
    draw_with(pipeline)


def read_shards(path: Path, folder: Path) -> None:
    shards = CodeShards(path)
    for index in range(min(len(shards), 3)):
        shards.codes(index)
        shards.record(index)
    for indices in shards.indices.values():
        if len(indices):
            shards.gather(indices[:2])
    shards.check(checkpoints.load_image_tokenizer(folder / "native.safetensors"))


# What is copied from the folder, which of its files may be mutated, how, and who opens it.
KINDS: dict[str, tuple[str, str, Callable[[Path, Chance], None], Callable[[Path, Path], None]]] = {
    "native": ("native.safetensors", "*", of_bytes, draw),
    "int8": ("int8.safetensors", "*", of_bytes, draw),
    "weights": ("native.safetensors", "*", of_tensors, draw),
    "configuration": ("native.safetensors", "*", of_metadata(native.CONFIG), draw),
    "text tokenizer": ("native.safetensors", "*", of_metadata(native.TEXT_TOKENIZER), draw),
    "pieces": ("native.safetensors", "*", of_pieces, draw),
    "card": ("native.safetensors", "*", of_metadata(), draw),
    "vocabulary": ("native.safetensors", "*", of_metadata(native.VOCABULARY, native.SIZES), draw),
    "janus": ("janus", "*", of_bytes, draw),
    "janus's JSON": ("janus", "*.json", of_json_file, draw),
    "original janus": ("original", "*", of_bytes, draw),
    "code in original janus": ("original", "*.bin", of_pickle, draw),
    "llama": ("llama", "*", of_bytes, convert),
    "llama's JSON": ("llama", "*.json", of_json_file, convert),
    "merges": ("merges", "merges.txt", of_bytes, convert),
    "vocabulary's JSON": ("merges", "[av]*.json", of_json_file, convert),
    "ranks": ("ranks", "*.tiktoken", of_bytes, convert),
    "llamagen": ("llamagen", "*", of_bytes, draw),
    "code in llamagen": ("llamagen", "*.pt", of_pickle, draw),
    "image tokenizer": ("vq.pt", "*", of_bytes, decode),
    "ibq": ("ibq", "*.ckpt", of_bytes, decode),
    "code in ibq": ("ibq", "*.ckpt", of_pickle, decode),
    "torchscript": ("cosmos", "*.jit", of_bytes, decode),
    "code in torchscript": ("cosmos", "*.jit", of_pickle, decode),
    "cosmos's weights": ("cosmos.safetensors", "*", of_tensors, decode),
    "simplear": ("simplear", "SimpleAR/*", of_bytes, draw),
    "simplear's JSON": ("simplear", "SimpleAR/*.json", of_json_file, draw),
    "emu": ("emu", "Emu3.5-Image/*", of_bytes, draw),
    "emu's JSON": ("emu", "Emu3.5-Image/*.json", of_json_file, draw),
    "wallaroo": ("wallaroo", "*", of_bytes, draw),
    "wallaroo's JSON": ("wallaroo", "*.json", of_json_file, draw),
    "code in wallaroo": ("wallaroo", "wallaroo.ckpt", of_pickle, draw),
    "codes": ("codes.npy", "*", of_bytes, decode),
    "lora": ("lora.safetensors", "*", of_bytes, with_lora),
    "lora's weights": ("lora.safetensors", "*", of_tensors, with_lora),
    "data set": ("shards", "*", of_bytes, read_shards),
    "data set's index": ("shards", "index.json", of_json_file, read_shards),
}
MODELS = {  # what to open of a folder that is not one model
    "llamagen": "c2i_B_256.pt", "simplear": "SimpleAR", "emu": "Emu3.5-Image",
    "wallaroo": "wallaroo.ckpt",
}  # fmt: skip


def work(folder: Path, count: int, seed: int, first: int) -> None:
    import resource  # which Windows lacks

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    executed = []
    sys.addaudithook(lambda event, _: executed.append(event) if event in RUNS else None)
    for number in range(first, count * len(KINDS)):
        kind = list(KINDS)[number // count]
        source, names, mutate, opened = KINDS[kind]
        chance = Chance(f"{kind} {seed} {number}")
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            path = Path(temporary) / source
            (shutil.copytree if (folder / source).is_dir() else shutil.copy)(folder / source, path)
            files = sorted(path.glob(names)) if path.is_dir() else [path]
            mutate(chance.choice(files), chance)
            executed.clear()
            started = time.monotonic()
            signal.alarm(SECONDS)  # which ends the process, whatever it is doing
            how = outcome(opened, path / MODELS[source] if source in MODELS else path, folder)
            signal.alarm(0)
        took = time.monotonic() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        line = {"how": how, "executed": executed, "seconds": took, "gigabytes": memory}
        print("\n" + json.dumps(line), flush=True)


def outcome(opened: Callable[[Path, Path], None], path: Path, folder: Path) -> str:
    try:
        opened(path, folder)
    except (ValueError, OSError) as error:
        text = str(error)
        return "refused" if len(text) < 1000 and "\n" not in text else f"long: {text!r:.300}"
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.300}"
    return "read"


def fuzz(folder: Path, count: int, seed: int = 0) -> dict[str, dict]:
    """How `count` files of each kind went. A process that dies or hangs is counted and replaced."""
    found = {
        kind: {"refused": 0, "read": 0, "tracebacks": [], "died": [], "executed": []}
        | {"seconds": 0.0, "gigabytes": 0.0}
        for kind in KINDS
    }
    done = 0
    while done < count * len(KINDS):
        run = subprocess.run(
            [sys.executable, "-m", "tests.support.fuzz", *map(str, (folder, count, seed, done))],
            capture_output=True, text=True, errors="replace", cwd=ROOT, check=False,
        )  # fmt: skip
        for line in run.stdout.splitlines():
            if not line.startswith('{"how"'):
                continue
            file, of_kind = json.loads(line), found[list(KINDS)[done // count]]
            if file["how"] in ("refused", "read"):
                of_kind[file["how"]] += 1
            else:
                of_kind["tracebacks"].append(f"{done}: {file['how']}")
            of_kind["executed"] += file["executed"]
            for name in ("seconds", "gigabytes"):
                of_kind[name] = max(of_kind[name], round(file[name], 2))
            done += 1
        if run.returncode:
            how = "hangs" if run.returncode == -signal.SIGALRM else f"exit {run.returncode}"
            kind = list(KINDS)[done // count]
            found[kind]["died"].append(f"{done}: {how} {run.stderr[-300:]}")
            done += 1
    return found


if __name__ == "__main__":
    work(Path(sys.argv[1]), *map(int, sys.argv[2:]))
