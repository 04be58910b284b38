"""The example workflows as the page shows them: wires, templates, and models that are missing."""

import io
import itertools
import json
import re
import shutil

import pytest
from PIL import Image

from scripts import workflows

from .pages import SECOND
from .test_workflows import PATHS

OWN_TYPES = ("MODEL", "PROMPT", "OPTIONS")  # codes and image tokenizers have ComfyUI's
FIRST = "Text to image"
# Workflow -> the files that a user has to get, their sizes, the folder and the licence.
NEEDED = {
    "Janus-Pro": (
        "config.json", "tokenizer.json", "pytorch_model.bin", "4.18 GB",
        "huggingface.co/deepseek-ai/Janus-Pro-1B", "models/tokenshuffle", "DeepSeek Model License",
    ),
    "SimpleAR": (
        "huggingface.co/Daniel0724/SimpleAR-1.5B-RL", "encoder.jit", "decoder.jit",
        "huggingface.co/nvidia/Cosmos-1.0-Tokenizer-DV8x16x16", "models/tokenshuffle", "MIT",
        "NVIDIA Open Model License",
    ),
    "LlamaGen": (
        "c2i_L_384.pt", "1.37 GB", "vq_ds16_c2i.pt", "0.3 GB",
        "huggingface.co/FoundationVision/LlamaGen", "models/tokenshuffle", "MIT",
    ),
}  # fmt: skip

# Where a wire comes within 4 pixels of a node that it does not start or end at, or crosses one of
# these two other than at its edge.
BEHIND = """() => {
    const { graph, canvas } = window.app
    canvas.draw(true, true)
    const pen = document.createElement('canvas').getContext('2d')
    pen.lineWidth = 8
    const found = []
    for (const link of graph.links.values()) {
        const paths = partsOf(link).map((part) => part.path).filter(Boolean)
        if (!paths.length) found.push(`${link.origin_id} -> ${link.target_id} is not drawn`)
        for (const node of graph._nodes) {
            const isEnd = node.id == link.origin_id || node.id == link.target_id
            if (pointsOf(node, isEnd ? 24 : 0).some(([x, y]) =>
                paths.some((path) => pen.isPointInStroke(path, x, y))))
                found.push(`${link.origin_id} -> ${link.target_id} behind ${node.title}`)
        }
    }
    return found

    function partsOf(link) {
        const parts = [link]
        for (let id = link.parentId; id; id = parts.at(-1).parentId)
            parts.push(graph.reroutes.get(id))
        return parts
    }

    function pointsOf(node, inset) {
        const [left, top, width, height] = node.boundingRect
        const points = []
        for (let x = left + inset; x <= left + width - inset; x += 6)
            for (let y = top + inset; y <= top + height - inset; y += 6) points.push([x, y])
        return points
    }
}"""


@pytest.fixture
def without_models(page, server, tmp_path):
    """The page of a user who has not got the models of these workflows."""
    models = server.base / "models"
    names = "Janus-Pro-1B", "SimpleAR-1.5B-RL"
    paths = [
        *(models / "tokenshuffle" / name for name in names),
        models / "checkpoints" / "c2i_L_384.pt",
    ]
    for path in paths:
        shutil.move(path, tmp_path / path.name)
    page.open(server.url)
    yield page
    for path in paths:
        shutil.move(tmp_path / path.name, path)
    page.open(server.url)


def links_of(note: str) -> list[str]:
    return re.findall(r"\((https://\S+)\)", note)


def note_of(name: str) -> str:
    workflow = json.loads((workflows.WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    return note["widgets_values"][0]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem != FIRST)) for p in PATHS],
    ids=lambda path: path.stem,
)
def test_no_wire_behind_a_node(page, path):
    page.drop(path)
    page.page.keyboard.press("Escape")  # a dialog about missing models
    page.page.wait_for_timeout(SECOND)
    found = page.page.evaluate(BEHIND)
    page.screenshot(f"wires-{path.stem.replace(' ', '-')}")
    assert found == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_type_of_wire_has_a_colour(page, theme):
    page.set("Comfy.ColorPalette", theme)
    page.page.wait_for_timeout(SECOND)
    colours, slots, ground = page.page.evaluate(
        """() => [{ ...window.LGraphCanvas.link_type_colors },
            { ...window.app.canvas.default_connection_color_byType },
            window.app.canvas.clear_background_color]"""
    )
    own = {kind: colours[f"TOKENSHUFFLE_{kind}"] for kind in OWN_TYPES}
    others = {colour.lower() for kind, colour in colours.items() if "TOKENSHUFFLE" not in kind}
    assert len(set(own.values())) == len(OWN_TYPES)
    assert not others & set(own.values())
    assert own == {kind: slots[f"TOKENSHUFFLE_{kind}"] for kind in OWN_TYPES}
    ground = {"lightgray": "#d3d3d3", "#222": "#222222"}.get(ground, ground)
    for kind, colour in own.items():
        assert contrast(colour, ground) >= 2, f"{kind} on {ground}"
    for one, other in itertools.combinations(own.values(), 2):
        distance = sum(abs(int(one[i : i + 2], 16) - int(other[i : i + 2], 16)) for i in (1, 3, 5))
        assert distance > 60, f"{one} looks like {other}"
    page.set("Comfy.ColorPalette", page.look.rpartition("-")[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_user_is_told_how_to_get_a_missing_model(without_models, name):
    without_models.drop(workflows.WORKFLOWS / f"{name}.png")
    without_models.page.keyboard.press("Escape")  # a dialog, which another test reads
    red = without_models.page.locator(".tokenshuffle-panel .warning", has_text="is not in")
    red.wait_for()
    for words in NEEDED[name]:
        assert words in red.inner_text()
    note = note_of(name)
    for words in NEEDED[name]:
        assert words in note
    for address in links_of(note):
        link = without_models.page.locator(f'a[href="{address}"]').first
        link.wait_for()
        assert link.is_visible()
    without_models.screenshot(f"missing-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_dialog_about_missing_models(without_models, name):
    if name != "LlamaGen":
        pytest.skip("the page looks for missing files, and this model is a folder")
    without_models.drop(workflows.WORKFLOWS / f"{name}.png")
    page = without_models.page
    details = page.get_by_role("button", name="View details")
    if not without_models.look.startswith("0.3."):
        details.click()
    download = page.get_by_role("button", name=re.compile("download", re.IGNORECASE)).first
    without_models.screenshot("missing-LlamaGen-dialog")
    download.wait_for()
    shown = page.locator("body").inner_text()
    assert "c2i_L_384.pt" in shown
    if without_models.look.startswith("0.3."):
        assert "vq_ds16_c2i.pt" in page.get_by_role("dialog").inner_text()
        page.keyboard.press("Escape")
        pytest.skip("ComfyUI 0.3 names both files, and downloads no .pt")
    assert download.is_enabled()
    page.keyboard.press("Escape")


@pytest.mark.parametrize(
    ("missing", "workflow"),
    [
        ("Janus-Pro-1B", "Janus-Pro"),
        ("SimpleAR-1.5B-RL", "SimpleAR"),
        ("c2i_L_384.pt", "LlamaGen"),
    ],
)
def test_api_is_told_too(server, prompt, missing, workflow):
    prompt["loader"]["inputs"]["checkpoint"] = f"elsewhere/{missing}"
    told = json.dumps(server.refusal(prompt)["node_errors"]["loader"])
    for words in (missing, *NEEDED[workflow]):
        assert words in told


def test_model_that_nobody_knows(server, prompt):
    prompt["loader"]["inputs"]["checkpoint"] = "mine.safetensors"
    told = json.dumps(server.refusal(prompt)["node_errors"]["loader"])
    assert "mine.safetensors is not in ComfyUI/models/tokenshuffle" in told


def test_first_workflow_ends_in_a_picture_that_one_can_see(server):
    workflow = json.loads((workflows.WORKFLOWS / f"{FIRST}.json").read_text(encoding="utf-8"))
    prompt = workflows.to_api(workflow, server.get("/object_info"))
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    (saver,) = (name for name, node in prompt.items() if node["class_type"] == "SaveImage")
    (png,) = workflows.images(server.url, entry, saver)
    assert min(Image.open(io.BytesIO(png)).size) >= 512


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_thumbnail_is_filled_by_its_picture(path):
    picture = Image.open(path.with_suffix(".jpg")).convert("L")
    left, top, right, bottom = picture.point(lambda value: 255 * (value < 240)).getbbox()
    sides = sorted((right - left, bottom - top))
    least = (0.95, 0.95) if path.stem in workflows.NEEDS_DOWNLOAD else (0.25, 0.6)  # on white
    assert all(side > share * 400 for side, share in zip(sides, least, strict=True))
