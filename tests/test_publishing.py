"""What the ComfyUI registry, a release and GitHub read: they fail on a server, and late."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tokenshuffle_core
from tokenshuffle_core.cli.main import main

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer")

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
YAML = [ROOT / ".pre-commit-config.yaml", *sorted((ROOT / ".github").rglob("*.yml"))]
# What a ComfyUI needs of the pack, with the licence and what a user reads.
SHIPPED = {
    *(
        "__init__.py",
        "nodes",
        "tokenshuffle_core",
        "web",
        "locales",
        "workflows",
        "api",
        "recipes",
    ),
    *("pyproject.toml", "requirements.txt", "LICENSE", "README.md", "README.zh.md", "CHANGELOG.md"),
}


def workflow(name: str) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def test_version_is_semantic_and_the_newest_in_the_changelog():
    number = r"(0|[1-9]\d*)"
    assert re.fullmatch(rf"{number}\.{number}\.{number}", PROJECT["version"])
    headings = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    versions = [re.match(r"\[(.*?)\]", heading)[1] for heading in headings]
    assert versions[0] == PROJECT["version"] == tokenshuffle_core.__version__
    assert versions == sorted(versions, key=lambda v: [*map(int, v.split("."))], reverse=True)
    dated = [bool(re.fullmatch(r"\[.*\] - \d{4}-\d{2}-\d{2}", heading)) for heading in headings]
    assert all(dated[1:]), "every version but the newest was released"
    assert dated[0] or headings[0].endswith(" - unreleased")
    assert all((f"[{v}]: " in CHANGELOG) == known for v, known in zip(versions, dated, strict=True))


def test_requirements_are_the_projects_dependencies():
    # Without a bound where ComfyUI's own installation must stay as it is: pip then leaves it alone.
    def name(requirement: str) -> str:
        return re.match(r"[\w-]+", requirement)[0]

    bounds = {name(dependency): dependency for dependency in PROJECT["dependencies"]}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted(map(name, lines)) == sorted(bounds)
    assert all(line in (name(line), bounds[name(line)]) for line in lines)


def test_the_icon_is_a_small_square_in_the_tree():
    owner_and_name = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    start = f"https://raw.githubusercontent.com/{owner_and_name}/main/"
    assert COMFY["Icon"].startswith(start)
    with Image.open(ROOT / COMFY["Icon"].removeprefix(start)) as icon:
        assert icon.width == icon.height <= 400


def test_what_the_registry_asks_for():
    # comfy-cli's own patterns; whatever does not match them it drops with a mere warning.
    assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"])
    assert "Operating System :: OS Independent" in PROJECT["classifiers"]
    assert not [c for c in PROJECT["classifiers"] if c.startswith("License ::")], "license says it"
    assert re.fullmatch(r"[a-z](-?[a-z0-9])*", PROJECT["name"])
    assert {"Repository", "Documentation", "Bug Tracker"} <= set(PROJECT["urls"])
    assert "web" not in COMFY, "with WEB_DIRECTORY, ComfyUI would load every script of it twice"


def test_the_archive_holds_exactly_what_ships():
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"/[\w.-]+/?", pattern) for pattern in patterns), "one of the root each"
    left_out = {pattern.strip("/") for pattern in patterns}
    tracked = {name.partition("/")[0] for name in tracked_files()}
    assert tracked - left_out == SHIPPED
    assert left_out <= tracked, "every pattern leaves out something"


def test_nothing_built_is_tracked():
    built = (".whl", ".tar", ".gz", ".zip", ".pyc", ".so", ".egg-info")
    assert not [name for name in tracked_files() if name.endswith(built)]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_parses(path):
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        assert content["permissions"] == {"contents": "read"}
    elif path.parent.name == "ISSUE_TEMPLATE" and path.name != "config.yml":
        assert {"name", "description", "body"} <= set(content)
        ids = [element["id"] for element in content["body"]]
        assert len(set(ids)) == len(ids)


def test_ruff_has_one_version():
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (hook,) = (repo for repo in config["repos"] if repo["repo"].endswith("/ruff-pre-commit"))
    dev = PROJECT["optional-dependencies"]["dev"]
    assert f"ruff=={hook['rev'].removeprefix('v')}" in dev


def test_the_oldest_comfyui_is_tested():
    oldest = COMFY["requires-comfyui"].removeprefix(">=")
    assert f"v{oldest}" in workflow("test.yml")["jobs"]["host"]["strategy"]["matrix"]["comfyui"]


def test_only_the_tag_of_the_version_is_published(tmp_path):
    steps = workflow("publish.yml")["jobs"]["publish"]["steps"]
    (check,) = (i for i, step in enumerate(steps) if step.get("shell") == "python")
    (publish,) = (i for i, step in enumerate(steps) if "publish-node-action" in str(step))
    assert check < publish

    version = PROJECT["version"]
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"), "utf-8")

    def run(tag: str, changelog: str = CHANGELOG) -> subprocess.CompletedProcess:
        (tmp_path / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
        output = tmp_path / tag
        env = {**os.environ, "GITHUB_REF_NAME": tag, "GITHUB_OUTPUT": str(output)}
        command = [sys.executable, "-c", steps[check]["run"]]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    heading = rf"^## \[{re.escape(version)}\].*$"
    dated, waiting = (
        re.sub(heading, f"## [{version}] - {date}", CHANGELOG, flags=re.MULTILINE)
        for date in ("2027-01-31", "unreleased")
    )
    assert run("v99.0.0", dated).returncode == 1
    assert run(version, dated).returncode == 1
    assert run(f"v{version}", waiting).returncode == 1
    done = run(f"v{version}", dated)
    assert done.returncode == 0, done.stderr
    name, *section, end = (tmp_path / f"v{PROJECT['version']}").read_text("utf-8").splitlines()
    assert name == f"changelog<<{end}"
    assert section[0]
    assert not [line for line in section if line.startswith(("## ", "["))]
    assert all(line in CHANGELOG for line in section)


def test_version_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"tokenshuffle {PROJECT['version']}\n"
