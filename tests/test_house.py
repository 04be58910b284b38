"""The rules of the house that code can check: who imports whom, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tokenshuffle_core", "nodes", "scripts", "tests", "benchmarks", "experiments")
SOURCES = [ROOT / "__init__.py", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py")))]
CORE = [path for path in SOURCES if "tokenshuffle_core" in path.parts]


def imports(path: Path) -> set[str]:
    """Modules that a file imports, relative ones as paths from the repository's root."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT).parent.parts
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_over_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_prompt_to_picture_can_be_read_in_one_sitting():
    names = ("pipeline", "model", "shuffle", "transformer", "sampler", "guidance")
    files = [ROOT / "tokenshuffle_core" / f"{name}.py" for name in names]
    assert sum(len(path.read_text().splitlines()) for path in files) < 1500


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_stands_alone(path):
    inside = path.relative_to(ROOT / "tokenshuffle_core").with_suffix("").as_posix()
    for module in imports(path):
        first = module.partition(".")[0]
        assert first not in ("nodes", "comfy", "comfy_api", "folder_paths", "server", "scripts")
        if module.startswith("tokenshuffle_core.cli"):
            assert inside.startswith("cli") or inside == "__main__"
        if module.startswith(("tokenshuffle_core.training", "tokenshuffle_core.evaluation")):
            rooms = ("training", "evaluation", "cli_data", "cli_eval", "cli_training")
            assert inside.startswith(rooms)


def test_only_the_host_file_touches_comfyui():
    for path in sorted((ROOT / "nodes").glob("*.py")):
        touched = {m for m in imports(path) if m.partition(".")[0] in ("comfy", "folder_paths")}
        assert bool(touched) == (path.name == "host.py")


def test_run_time_requirements_are_those_of_the_project_file():
    names = {line.split(">")[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert names == {"torch", "numpy", "pillow", "safetensors", "einops", "tokenizers", "tqdm"}
