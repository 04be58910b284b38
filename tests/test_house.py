"""The rules of the house that code can check: which file imports which, and what each is for."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "tokenshuffle_core",
    "nodes",
    "scripts",
    "tests",
    "benchmarks",
    "experiments",
    "api",
)
SOURCES = [ROOT / "__init__.py", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py")))]
CORE = [path for path in SOURCES if "tokenshuffle_core" in path.parts]
# From the prompt to the picture, in the order in which to read them.
STORY = (
    *("config", "pipeline", "text_tokenizer", "class_names", "sampler", "guidance", "model"),
    *("shuffle", "transformer", "image_tokenizer", "quantizers"),
)


def imports(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Modules that a file imports, relative ones as paths from the repository's root. `at_run_time`
    leaves out those for type checkers alone and those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_run_time else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT).parent.parts
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The folder of the core that a module lies in, "" for its root, where the story is."""
    first, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if first == "tokenshuffle_core" and (ROOT / first / room).is_dir() else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_over_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_story_can_be_read_in_one_sitting():
    files = [ROOT / "tokenshuffle_core" / f"{name}.py" for name in STORY]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < 2500


@pytest.mark.parametrize("name", STORY)
def test_the_story_needs_no_engine(name):
    """But for the decode loop and large pictures, which enter it by one name each."""
    entered = {"sampler": {"engine"}, "image_tokenizer": {"engine.strips"}}
    found = {
        module.removeprefix("tokenshuffle_core.")
        for module in imports(ROOT / "tokenshuffle_core" / f"{name}.py")
        if room_of(module) == "engine"
    }
    assert {each for each in found if each != "engine" or name == "sampler"} == entered.get(
        name, set()
    )


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_room_of_the_core_may_enter(path):
    entered = {room_of(module) for module in imports(path)} - {"", "weights"}
    outside = {"nodes", "comfy", "comfy_api", "folder_paths", "server", "scripts", "tests"}
    assert not outside & {module.partition(".")[0] for module in imports(path)}
    may = {
        "": {"engine", "checkpoints"},
        "engine": {"engine"},
        "checkpoints": {"checkpoints", "engine"},
        "adapt": {"adapt", "checkpoints", "engine"},
        "data": {"data", "checkpoints"},
        "evaluation": {"evaluation", "data", "engine"},
        "training": {"training", "data", "adapt", "checkpoints", "engine"},
    }
    room = room_of(name_of(path)) if name_of(path) != "tokenshuffle_core.__main__" else "cli"
    assert room == "cli" or entered <= may[room]


def test_no_circle():
    names = {name_of(path): path for path in CORE}
    graph = {
        name: {
            module
            for imported in imports(path, at_run_time=True)
            for module in (imported, *ancestors(imported))
            if module in names and module != name and module not in ancestors(name)
        }
        for name, path in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def ancestors(module: str) -> list[str]:
    """The packages that are imported on the way to a module."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


ROOMS = [p for p in (ROOT / "tokenshuffle_core").rglob("__init__.py") if p.parent.name != "weights"]


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: name_of(path))
def test_a_room_exports_what_it_is_for(path):
    room = import_module(name_of(path))
    assert room.__doc__
    assert room.__all__ == sorted(room.__all__)
    assert all(hasattr(room, name) for name in room.__all__)


def test_help_needs_no_torch():
    """Which takes seconds to import: neither the door nor the command line does it by itself."""
    code = "import sys, tokenshuffle_core.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_only_the_host_folder_touches_comfyui():
    for path in sorted((ROOT / "nodes").rglob("*.py")):
        touched = {m for m in imports(path) if m.partition(".")[0] in ("comfy", "folder_paths")}
        assert not touched or path.parent.name == "host", path


def test_the_tree_in_contributing_is_the_real_one():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"^```\n(__init__\.py.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    listed, folders = set(), []
    for line in tree.splitlines():
        name = re.match(r"( *)(\S+)", line)
        depth = len(name[1]) // 2
        folders = [*folders[:depth], name[2]]
        listed.add("".join(folders))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    real = {Path(line) for line in tracked.stdout.splitlines()}
    for folder in [each for each in listed if each.endswith("/")]:
        assert any(path.is_relative_to(folder) for path in real), f"{folder} does not exist"
    files = {path.as_posix() for path in real if path.suffix == ".py"}
    missing = [
        file for file in files if file.startswith(("tokenshuffle_core/", "nodes/"))
        and not file.endswith("__init__.py") and file not in listed
    ]  # fmt: skip
    assert not missing
    assert {each for each in listed if not each.endswith("/")} <= {p.as_posix() for p in real}
    top = {path.parts[0] for path in real if len(path.parts) > 1 and path.parts[0][0] != "."}
    assert top <= {each.rstrip("/") for each in listed}
