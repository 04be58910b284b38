"""The page of a real ComfyUI: workflows that are dropped, panels, templates, help."""

import re

import pytest

from scripts import comfyui, workflows
from tokenshuffle_core.guidance import scale_at

from .pages import EXTENSIONS, NODE, SECOND
from .test_workflows import FIRST_VERSION, RUNNABLE

EXAMPLES = [path.with_suffix(".png") for path in RUNNABLE]
TEXT_TO_IMAGE = workflows.WORKFLOWS / "Text to image.png"
# Through the API all of them run by default.
DROPPED = [
    pytest.param(path, marks=[pytest.mark.slow] * (path != TEXT_TO_IMAGE))
    for path in EXAMPLES + FIRST_VERSION
]


# Nodes grow by their pictures.
COVERED = """() => {
    const boxes = window.app.graph._nodes.map((node) => [node.title, ...node.boundingRect])
    const meet = ([, x, y, w, h], [, left, top, width, height]) =>
        x < left + width && left < x + w && y < top + height && top < y + h
    return boxes.flatMap((one, i) => boxes.slice(i + 1)
        .filter((other) => meet(one, other)).map((other) => `${one[0]} and ${other[0]}`))
}"""


@pytest.mark.parametrize("path", DROPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_dropped_workflow_runs(page, path):
    page.drop(path)
    graph = page.page.evaluate("() => JSON.parse(JSON.stringify(window.app.graph.serialize()))")
    nodes = {node["id"]: node for node in graph["nodes"]}
    for _, origin, out, *_, kind in graph["links"]:  # of old workflows, too
        if nodes[origin]["type"].startswith("TokenShuffle"):
            assert kind == nodes[origin]["outputs"][out]["type"]
    page.press_run()
    page.wait_for_the_end()
    shown = page.page.evaluate(
        """() => window.app.graph._nodes.filter((node) => node.type === 'SaveImage')
            .map((node) => window.app.nodeOutputs[node.id]?.images?.length)"""
    )
    assert shown
    assert all(shown)
    page.page.wait_for_timeout(SECOND)
    if path in EXAMPLES:
        assert page.page.evaluate(COVERED) == []
    page.screenshot(f"{path.parent.name}-{path.stem}")


def test_picture_grows_while_sampling(page):
    page.drop(workflows.WORKFLOWS / "Text to image.json")
    page.page.evaluate(
        f"""() => {{
            const options = window.LiteGraph.createNode('TokenShuffleOptions')
            window.app.graph.add(options)
            options.connect(0, ({NODE})('TokenShuffleSampler'), 'options')
        }}"""
    )
    page.fill("TokenShuffleSampler", width=320, height=320, seed=5)
    refused = page.page.locator(".tokenshuffle-panel .warning", has_text="needs any_size")
    refused.wait_for()
    page.fill("TokenShuffleOptions", any_size=True)
    page.page.get_by_text("The model was not trained at this size.").first.wait_for()
    assert refused.count() == 0
    page.press_run()
    page.page.wait_for_function("() => window.previews.length >= 2", timeout=60 * SECOND)
    page.screenshot("sampling")
    page.wait_for_the_end()
    assert len(set(page.page.evaluate("() => window.previews"))) >= 3
    facts = page.page.locator(".tokenshuffle-panel .facts").all_inner_texts()
    assert any("400 positions · about" in text for text in facts), facts


@pytest.mark.slow
def test_a_name_in_a_strangers_workflow_is_shown_and_runs_nothing(page):
    page.drop(workflows.WORKFLOWS / "Text to image.json")
    page.page.evaluate(
        f"""() => {{
            const save = window.LiteGraph.createNode('TokenShuffleSaveCodes')
            window.app.graph.add(save)
            ;({NODE})('TokenShuffleSampler').connect(0, save, 'codes')
            window.app.api.addEventListener('executed', ({{ detail }}) => {{
                window.saved = detail.output?.codes?.[0].filename ?? window.saved
            }})
        }}"""
    )
    name = f"{page.look} &lt;b&gt; <i>c<img src=x onerror=window.harmed=1>"
    page.fill("TokenShuffleSaveCodes", filename_prefix=name)
    page.press_run()
    page.wait_for_the_end()
    saved = page.page.wait_for_function("() => window.saved").json_value()
    page.page.wait_for_function(
        """saved => [...document.querySelectorAll('span, textarea')].some(
            (shown) => (shown.value ?? shown.textContent).replaceAll('\u2060', '') === saved
        )""",
        arg=saved,
    )
    page.page.wait_for_timeout(SECOND)
    page.screenshot("name-of-a-stranger")
    assert page.page.evaluate("() => window.harmed") is None


def test_preset_sets_the_size_and_the_size_snaps(page):
    page.drop(workflows.WORKFLOWS / "Text to image.json")
    select = page.page.locator(".tokenshuffle-panel select")
    sizes = select.locator("option").evaluate_all("options => options.map((o) => o.value)")
    assert len(sizes) >= 3
    assert sizes[0] == "128x128"
    select.select_option(sizes[1])
    values = page.values("TokenShuffleSampler")
    assert f"{values['width']}x{values['height']}" == sizes[1] != sizes[0]
    page.fill("TokenShuffleSampler", width=135, height=4)
    values = page.values("TokenShuffleSampler")
    assert (values["width"], values["height"]) == (128, 16)
    page.page.get_by_text("8 positions", exact=False).first.wait_for()


def test_options_take_over_the_samplers_widgets(page):
    page.drop(workflows.WORKFLOWS / "Several sizes.json")
    script = f"""() => ({NODE})('TokenShuffleSampler').widgets
        .filter((widget) => widget.disabled).map((widget) => widget.name)"""
    page.page.wait_for_function(f"() => ({script})().length")
    assert page.page.evaluate(script) == ["schedule", "temperature", "top_k", "top_p"]
    curve = page.page.locator(".tokenshuffle-panel polyline").first
    before = curve.get_attribute("points")
    page.fill("TokenShuffleOptions", schedule="constant")
    page.page.wait_for_timeout(SECOND)
    after = curve.get_attribute("points")
    assert before != after
    assert len({point.split(",")[1] for point in after.split()}) == 1, "a constant is a flat line"


@pytest.mark.parametrize("schedule", ["constant", "linear", "half-linear"])
def test_curve_is_what_the_sampler_applies(page, schedule):
    script = f"""async ([schedule, cfg, positions]) => {{
        const {{ scaleAt }} = await import('{EXTENSIONS}/guidance.js')
        return Array.from({{length: positions}}, (_, i) => scaleAt(schedule, cfg, i, positions))
    }}"""
    for positions in (1, 2, 7, 64):
        drawn = page.page.evaluate(script, [schedule, 5.5, positions])
        applied = [scale_at(schedule, 5.5, position, positions) for position in range(positions)]
        assert drawn == pytest.approx(applied)


def test_tokens_are_counted_while_typing(page):
    page.drop(workflows.WORKFLOWS / "Text to image.json")
    page.fill("TokenShufflePrompt", text="apple " * 80)
    page.page.get_by_text("80 / 64 tokens: shorten the prompt").wait_for()
    page.fill("TokenShufflePrompt", text="")
    none = page.page.get_by_text("0 / 64 tokens", exact=True)
    none.wait_for()
    assert none.count() == 1


def test_loader_shows_the_model_card(page):
    page.drop(workflows.WORKFLOWS / "Text to image.json")
    panel = page.page.locator(".tokenshuffle-panel", has_text="Token-Shuffle Emoji")
    panel.wait_for()
    assert "Apache-2.0" in panel.inner_text()
    page.fill("TokenShuffleLoader", checkpoint="broken.safetensors")
    page.page.get_by_text("broken.safetensors is not a readable safetensors file").wait_for()


def test_template_browser_lists_the_workflows_with_the_first_first(page):
    page.command("Comfy.BrowseTemplates")
    dialog = page.page.get_by_role("dialog")
    dialog.get_by_text(comfyui.PACK_NAME).click()
    for path in workflows.PATHS:
        title = re.compile(path.stem.replace("_", "[ _]"), re.IGNORECASE)
        entry = dialog.get_by_text(title).first
        entry.wait_for()
        entry.scroll_into_view_if_needed()
        assert entry.is_visible()
    most = len(workflows.PATHS)
    least = 2 if page.look.startswith("0.3.") else most  # it holds only the pictures in view
    page.page.wait_for_function(
        """([width, least, most]) => {
            const images = [...document.querySelectorAll('[role=dialog] img')]
            const count = images.filter((image) => image.naturalWidth === width).length
            return least <= count && count <= most
        }""",
        arg=[workflows.THUMBNAIL[0], least, most],
    )
    titles = [path.stem for path in workflows.PATHS]
    shown = page.page.evaluate(
        """titles => [...document.querySelectorAll('[role=dialog] *')]
            .filter((element) => !element.children.length)
            .map((element) => element.textContent.trim())
            .filter((text) => titles.includes(text))""",
        titles,
    )
    assert shown[0] == "Text to image"
    others = list(dict.fromkeys(shown))[1:]
    assert others == sorted(others)
    assert not any("_" in title for title in titles)
    page.screenshot("templates")
    page.page.keyboard.press("Escape")


def test_help_page_opens(page):
    page.drop(workflows.WORKFLOWS / "Text to image.json")
    script = f"() => window.app.canvas.selectNode(({NODE})('TokenShuffleSampler'))"
    page.page.evaluate(script)
    page.page.get_by_test_id("info-button").click()
    text = page.page.get_by_text("Cancelling stops after the current step")
    text.wait_for()
    page.screenshot("help")
    assert text.is_visible()


@pytest.mark.slow
def test_reload_finds_the_graph_as_it_was(page, server):
    page.drop(workflows.WORKFLOWS / "Complete a picture.json")
    page.fill("TokenShuffleComplete", keep_top=32, cfg=3.5)
    page.page.evaluate("() => window.app.graph.change?.()")
    snapshot = """() => {
        const { nodes, links } = window.app.graph.serialize()
        return [nodes.map((n) => [n.id, n.type, n.pos, n.widgets_values]), links]
    }"""
    page.page.mouse.click(700, 950)  # the page notes changes after a click
    page.page.wait_for_timeout(3 * SECOND)
    before = page.page.evaluate(snapshot)
    page.open(server.url)
    assert page.page.evaluate(snapshot) == before
    assert page.values("TokenShuffleComplete")["keep_top"] == 32


def test_missing_model_is_offered_for_download(page):
    page.drop(workflows.WORKFLOWS / "Beside a diffusion model.png")
    page.page.get_by_text("v1-5-pruned-emaonly-fp16.safetensors").first.wait_for()
    details = page.page.get_by_role("button", name="View details")
    if details.count():  # of ComfyUI 0.33; 0.3 offers it at once
        details.click()
    download = page.page.get_by_role("button", name=re.compile("download", re.IGNORECASE)).first
    download.wait_for()
    page.screenshot("missing-model")
    assert download.is_enabled()
    page.page.keyboard.press("Escape")
