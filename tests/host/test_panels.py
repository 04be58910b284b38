"""What the nodes' panels say of a model, a prompt and the time that a picture will take."""

import re
import time

import pytest

from scripts import workflows

from .pages import EXTENSIONS, NODE, SECOND

TEXT_TO_IMAGE = workflows.WORKFLOWS / "Text to image.json"
OWN = ("width", "height", "cfg", "schedule", "temperature", "top_k", "top_p")


def own_settings(server, checkpoint: str) -> dict:
    generation = server.get(f"/tokenshuffle/model?checkpoint={checkpoint}")["generation"]
    return {name: generation[name] for name in OWN}


def settings(page, kind: str = "TokenShuffleSampler") -> dict:
    return {name: value for name, value in page.values(kind).items() if name in OWN}


def until(page, kind: str, expected: dict) -> None:
    """Waits until the node's widgets have these values."""
    script = f"""([kind, expected]) => Object.entries(expected).every(([name, value]) =>
        ({NODE})(kind).widgets.find((widget) => widget.name === name).value === value)"""
    page.page.wait_for_function(script, arg=[kind, expected])


def add(page, kind: str) -> None:
    """A new node of a kind, the only one, with the loader's model."""
    page.page.evaluate(
        f"""kind => {{
            const {{ graph }} = window.app
            for (const old of graph._nodes.filter((node) => node.type === kind)) graph.remove(old)
            const made = window.LiteGraph.createNode(kind)
            graph.add(made)
            ;({NODE})('TokenShuffleLoader').connect(0, made, 0)
        }}""",
        kind,
    )


def test_the_prompt_says_what_the_model_draws_and_does_not_know(page):
    page.drop(TEXT_TO_IMAGE)
    said = page.page.locator(".tokenshuffle-panel")
    page.fill("TokenShufflePrompt", text="A helicoptr over Paris and a fox, 3D style!")
    said.get_by_text("draws: fox, 3d style").wait_for()
    said.get_by_text("does not know: helicoptr (near: helicopter), paris").wait_for()
    page.fill("TokenShufflePrompt", text="two foxes, flat style")
    said.get_by_text("draws: fox, flat style").wait_for()
    assert said.get_by_text("does not know").count() == 0
    page.screenshot("prompt")
    page.fill("TokenShuffleLoader", checkpoint="tiny.safetensors")  # which has no vocabulary
    said.get_by_text("tokens").first.wait_for()
    page.page.wait_for_timeout(SECOND)
    assert said.get_by_text("draws:").count() == 0
    assert said.locator("input:visible").count() == 0


def test_all_that_is_said_of_a_prompt_is_in_view(page):
    page.drop(TEXT_TO_IMAGE)
    page.fill("TokenShufflePrompt", text="a fox over Paris")
    panel = page.page.locator(".tokenshuffle-panel", has_text="does not know: paris")
    panel.wait_for()
    assert panel.locator("input").is_visible()
    assert panel.evaluate("panel => panel.scrollHeight <= panel.clientHeight")
    page.fill("TokenShufflePrompt", text="q" * 500)
    panels = page.page.locator(".tokenshuffle-panel")
    panels.get_by_text(f"does not know: {'q' * 40}…", exact=True).wait_for()


def test_a_subject_is_picked_from_a_list(page):
    page.drop(TEXT_TO_IMAGE)
    page.fill("TokenShufflePrompt", text="")
    picker = page.page.locator(".tokenshuffle-panel input")
    picker.wait_for()
    names = page.page.locator(".tokenshuffle-panel datalist option")
    listed = names.evaluate_all("options => options.map((option) => option.value)")
    assert len(listed) > 300
    assert listed == sorted(listed, key=str.casefold)
    picker.fill("red apple")
    picker.blur()
    until(page, "TokenShufflePrompt", {"text": "red apple"})
    assert picker.input_value() == ""
    example = page.page.evaluate(
        f"() => ({NODE})('TokenShufflePrompt').widgets[0].element.placeholder"
    )
    assert ", " in example


@pytest.mark.parametrize("kind", ["Sampler", "XYSheet", "Options", "Complete"])
def test_a_new_node_takes_the_models_settings(page, server, kind):
    page.drop(TEXT_TO_IMAGE)
    page.fill("TokenShuffleLoader", checkpoint="tiny.safetensors")
    kind = f"TokenShuffle{kind}"
    add(page, kind)
    tiny, bundled = (own_settings(server, f"{name}.safetensors") for name in ("tiny", "emoji"))
    names = settings(page, kind).keys()
    assert tiny != bundled
    until(page, kind, {name: tiny[name] for name in names})
    page.fill("TokenShuffleLoader", checkpoint="emoji.safetensors")
    until(page, kind, {name: bundled[name] for name in names})


def test_what_the_user_has_set_stays_and_goes_back_by_a_click(page, server):
    page.drop(TEXT_TO_IMAGE)
    add(page, "TokenShuffleSampler")
    bundled, tiny = (own_settings(server, f"{name}.safetensors") for name in ("emoji", "tiny"))
    until(page, "TokenShuffleSampler", bundled)
    page.fill("TokenShuffleSampler", cfg=7.5)
    page.page.get_by_text(f"The model's own: cfg {bundled['cfg']:g}").wait_for()
    page.fill("TokenShuffleLoader", checkpoint="tiny.safetensors")
    until(page, "TokenShuffleSampler", tiny | {"cfg": 7.5})
    link = page.page.get_by_text(f"The model's own: cfg {tiny['cfg']:g}")
    link.click()
    until(page, "TokenShuffleSampler", tiny)
    link.wait_for(state="hidden")
    assert settings(page) == tiny


def test_a_workflow_keeps_its_settings(page):
    page.drop(TEXT_TO_IMAGE)
    page.fill("TokenShuffleSampler", cfg=1.5, temperature=0.4)
    page.page.get_by_text("The model's own: cfg").wait_for()
    saved = page.page.evaluate("() => window.app.graph.serialize()")
    page.page.evaluate("saved => window.app.loadGraphData(saved)", saved)
    page.page.get_by_text("The model's own: cfg").wait_for()
    assert page.values("TokenShuffleSampler")["cfg"] == 1.5
    assert page.values("TokenShuffleSampler")["temperature"] == 0.4


def test_a_broken_model_is_not_called_a_missing_one(page):
    page.drop(TEXT_TO_IMAGE)
    page.fill("TokenShuffleLoader", checkpoint="broken.safetensors")
    panels = page.page.locator(".tokenshuffle-panel")
    panels.get_by_text("broken.safetensors is not a readable safetensors file").wait_for()
    panels.get_by_text("The model cannot be read: its loader says why.").wait_for()
    assert panels.get_by_text("Connect a model").count() == 0


def test_panels_are_there_after_nodes_went_into_a_subgraph(page):
    if page.look.startswith("0.3."):
        pytest.skip("this page's subgraphs are made otherwise")
    page.drop(TEXT_TO_IMAGE)
    page.page.get_by_text("64 positions").wait_for()
    page.page.evaluate(
        """() => {
            const { canvas, graph } = window.app
            const kinds = ['TokenShuffleSampler', 'TokenShufflePrompt']
            canvas.selectItems(graph._nodes.filter((node) => kinds.includes(node.type)))
        }"""
    )
    page.command("Comfy.Graph.ConvertToSubgraph")
    page.page.wait_for_timeout(SECOND)
    page.page.evaluate(
        """() => {
            const { canvas, graph } = window.app
            const holder = graph._nodes.find((node) => node.subgraph)
            canvas.openSubgraph(holder.subgraph, holder)
        }"""
    )
    page.page.get_by_text("64 positions").wait_for()
    page.page.get_by_text("draws: red apple").wait_for()
    page.screenshot("subgraph")


def test_estimates_are_those_of_a_linear_cost(page):
    """Of steps that cost a + b n seconds for n pictures, after two runs with other numbers of
    pictures, and of a decoding that costs as much for each pixel."""
    script = f"""async ([model, positions, pictures, pixels]) => {{
        const {{ estimate }} = await import('{EXTENSIONS}/durations.js')
        return estimate(model, positions, pictures, pixels) ?? null
    }}"""

    def cost(pictures: int, positions: int, pixels: int) -> float:
        return positions * (0.003 + 0.001 * pictures) + 2e-7 * pictures * pixels

    model = {"stride": 8, "unit": 16, "sampled": [], "decoded": [[1000, 2e-4]]}
    assert page.page.evaluate(script, [model, 64, 1, 128**2]) is None
    for n, positions in ((1, 64), (4, 128)):
        model["sampled"].append([2, n, positions, cost(n, positions, 0)])
    model["sampled"].append([4, 1, 16, 99.0])  # another window
    for n, positions, pixels in ((1, 64, 128**2), (2, 128, 2 * 128**2), (16, 64, 128**2)):
        found = page.page.evaluate(script, [model, positions, n, pixels])
        assert found == pytest.approx(cost(n, positions, pixels)), n
    # What was measured of the same kind counts, whatever came after it.
    model["sampled"] += [[2, 1, 1024, 50.0], [2, 1, 256, 7.0]]
    model["decoded"].append([4096, 3.0])
    assert page.page.evaluate(script, [model, 1024, 1, 4096]) == pytest.approx(53.0)


def about(page) -> float:
    """The seconds that the sampler's or the sheet's panel announces."""
    facts = page.page.locator(".tokenshuffle-panel .facts").get_by_text("about")
    return float(re.search(r"about ([\d.]+) s", facts.inner_text())[1])


def timed(page) -> float:
    """Seconds of a run, as the page sees it."""
    started = time.perf_counter()
    page.press_run()
    page.wait_for_the_end()
    seconds = time.perf_counter() - started
    page.page.wait_for_timeout(SECOND)
    return seconds


@pytest.mark.slow
def test_the_announced_time_is_that_of_the_next_run(page):
    page.drop(TEXT_TO_IMAGE)
    for _ in range(2):  # of another kind
        timed(page)
    page.fill("TokenShuffleSampler", width=256, batch_size=12)
    for _ in range(2):
        timed(page)
    announced = about(page)
    assert 1 / 1.5 < announced / timed(page) < 1.5


@pytest.mark.slow
def test_the_announced_time_of_a_sheet_is_that_of_all_its_pictures(page):
    page.drop(workflows.WORKFLOWS / "Compare seeds and guidance.json")
    for seed in (10, 20):
        page.fill("TokenShuffleXYSheet", seed=seed)
        timed(page)
    announced = about(page)
    page.fill("TokenShuffleXYSheet", seed=30)
    assert 1 / 1.5 < announced / timed(page) < 1.5
