"""The pack in Chinese and Japanese: every text that the page looks up, and none too many."""

import re
from collections.abc import Iterator

import pytest

from scripts import comfyui, workflows

from .pages import EXTENSIONS, SECOND

HAN, KANA = re.compile("[\u4e00-\u9fff]"), re.compile("[\u3041-\u30fa]")
MESSAGE_SYNTAX = set("{}@|")  # the page's translator, vue-i18n, reads these as instructions


@pytest.fixture(params=["zh", "ja"])
def locale(request):
    return request.param


@pytest.fixture(scope="module")
def nodes(server) -> dict[str, dict]:
    """The pack's nodes by their ids, with their English texts in the shape of a nodeDefs.json."""
    info = server.get("/object_info").items()
    return {name: texts_of(node) for name, node in info if name.startswith("TokenShuffle")}


def texts_of(node: dict) -> dict:
    inputs = {}
    for name, (_, options) in workflows.inputs_of(node):
        inputs[name] = named(name, options.get("tooltip"))
        if options.get("control_after_generate"):
            inputs["control_after_generate"] = named("control_after_generate")  # the page's own
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": inputs,
        "outputs": {str(i): named(*output) for i, output in enumerate(outputs)},
    }


def named(name: str, tooltip: str | None = None) -> dict[str, str]:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def flat(tree: dict, path: str = "") -> Iterator[tuple[str, str]]:
    for key, branch in tree.items():
        if isinstance(branch, dict):
            yield from flat(branch, f"{path}{key}.")
        else:
            yield path + key, branch


def is_written_in(locale: str, text: str) -> bool:
    if locale == "ja":
        return KANA.search(text) is not None
    return HAN.search(text) is not None and KANA.search(text) is None


def test_every_text_has_its_translation_and_no_other(server, nodes, locale):
    translations = server.get("/i18n")[locale]["nodeDefs"]
    assert {name for name, _ in flat(translations)} == {name for name, _ in flat(nodes)}


def test_translations_are_in_their_language(server, locale):
    for name, text in flat(server.get("/i18n")[locale]["nodeDefs"]):
        assert text.strip(), name
        assert not MESSAGE_SYNTAX & set(text), name
        if not name.endswith(".name"):  # of those, some are technical words: cfg, top_k
            assert is_written_in(locale, text), f"{name}: {text}"


def test_every_node_has_a_help_page_in_the_language(server, nodes, locale):
    translations = server.get("/i18n")[locale]["nodeDefs"]
    for name, node in nodes.items():
        # The page asks for this first, and for docs/NODE.md where there is none.
        path = f"/extensions/{comfyui.PACK_NAME}/docs/{name}/{locale}.md"
        title, _, text = workflows.http(server.url + path).decode().partition("\n")
        assert title == f"# {translations[name]['display_name']}"
        assert is_written_in(locale, text)
        for input_name in node["inputs"].keys() - {"control_after_generate"}:
            assert f"`{input_name}`" in text, path


def test_no_help_page_without_a_node(nodes, locale):
    pages = (comfyui.PACK / "web" / "docs").glob(f"*/{locale}.md")
    assert {page.parent.name for page in pages} == nodes.keys()


PROSE = ("description", "usage_hint", "limits", "license", "author", "training")
CARDS = {  # and what is prose on them; the author of others is a name
    "emoji.safetensors": PROSE,
    "llamagen/c2i_B_256.pt": ("description",),
    "Janus-Pro-1B": ("description",),
    "SimpleAR-1.5B-RL": ("description", "license"),
    "Wallaroo": ("description", "license"),
    "Emu3.5-Image": ("description", "license"),
}


@pytest.fixture
def page_in(page, locale):
    page.set("Comfy.Locale", locale)
    page.page.wait_for_timeout(2 * SECOND)  # the page loads its graph again
    yield page
    page.set("Comfy.Locale", "en")
    page.page.wait_for_timeout(2 * SECOND)


def test_model_cards_are_in_the_language(page_in, server, locale):
    script = f"""async texts => {{
        const {{ translated }} = await import('{EXTENSIONS}/texts.js')
        return texts.map(translated)
    }}"""
    texts = []
    for name, keys in CARDS.items():
        card = server.get(f"/tokenshuffle/model?checkpoint={name}").get("card", {})
        texts += [card[key] for key in keys]
    for text in page_in.page.evaluate(script, texts):
        assert is_written_in(locale, text), text


@pytest.mark.slow
def test_progress_is_in_the_language(page_in, locale):
    page_in.drop(workflows.WORKFLOWS / "Text to image.json")
    done, seed = {"zh": ("64 / 64 个位置，", 8101), "ja": ("64 / 64 ポジション、", 8102)}[locale]
    page_in.fill(
        "TokenShuffleSampler", seed=seed
    )  # which no test has drawn: the host keeps results
    page_in.page.evaluate("() => window.app.queuePrompt(0)")
    shown = """text => window.app.graph._nodes.some((node) =>
        node.widgets?.some((widget) => String(widget.value).startsWith(text)))"""
    page_in.page.wait_for_function(shown, arg=done, timeout=60 * SECOND)
    page_in.screenshot(f"progress-{locale}")
