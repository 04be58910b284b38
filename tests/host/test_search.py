"""What people type into the page's search for nodes, and which node they find."""

import pytest

# The node is the first of all.
FIRST = {
    "token shuffle": "Loader",
    "load token": "Loader",
    "load token shuffle": "Loader",
    "janus": "Loader",
    "janus pro": "Loader",
    "llamagen": "Loader",
    "text to image autoregressive": "Loader",
    "autoregressive text to image": "Loader",
    "autoregressive": "Loader",
    "next token prediction": "Loader",
    "emoji": "Loader",
    "image tokenizer": "VQDecode",
    "vqgan": "VQDecode",
    "vq decode": "VQDecode",
    "tokens to image": "VQDecode",
    "vq encode": "VQEncode",
    "imagenet": "Class",
    "class conditional": "Class",
    "complete image": "Complete",
    "temperature": "Options",
    "top k": "Options",
    "xy plot": "XYSheet",
    "compare seeds": "XYSheet",
    "save codes": "SaveCodes",
    "load codes": "LoadCodes",
}
# A node of ComfyUI or a blueprint comes before it, as it should; of this pack it is the first.
FIRST_OF_THE_PACK = {
    "text to image": "Loader",
    "txt2img": "Loader",
    "load model": "Loader",
    "ksampler": "Sampler",
    "clip text encode": "Prompt",
    "vae decode": "VQDecode",
    "vae encode": "VQEncode",
    "outpaint": "Complete",
    "inpaint": "Complete",
    "load lora": "LoraLoader",
    "load latent": "LoadCodes",
}
CHINESE = {
    "文生图": "Loader",
    "自回归": "Loader",
    "图像生成": "Loader",
    "加载模型": "Loader",
    "提示词": "Prompt",
    "采样器": "Sampler",
    "类别": "Class",
    "扩图": "Complete",
    "图像补全": "Complete",
    "图像分词器": "VQDecode",
    "温度": "Options",
    "对比图": "XYSheet",
}
JAPANESE = {
    "テキストから画像": "Loader",
    "画像生成": "Loader",
    "自己回帰": "Loader",
    "プロンプト": "Prompt",
    "サンプラー": "Sampler",
    "クラス": "Class",
    "画像補完": "Complete",
    "画像トークナイザー": "VQDecode",
    "デコード": "VQDecode",
}
# What the names alone find, without aliases.
BY_NAME = (
    "token shuffle",
    "load token",
    "load token shuffle",
    "vq decode",
    "vq encode",
    "imagenet",
)
NO_ALIASES = "ComfyUI 0.3 has no search_aliases"
HIDDEN = {"cfg plot": "CFGPlot", "stopwatch": "Stopwatch"}

SEARCH = """queries => {
    const { $pinia } = document.querySelector('#vue-app').__vue_app__.config.globalProperties
    const { nodeSearchService } = $pinia._s.get('nodeDef')
    const found = (query) => nodeSearchService.searchNode(query, [], { limit: 64 })
    return queries.map((query) => found(query).map((node) => node.name))
}"""


def search(opened, wanted: dict[str, str]) -> dict[str, tuple[str, list[str]]]:
    """Query -> the node that it should find, and what the page's search finds."""
    found = opened.page.evaluate(SEARCH, list(wanted))
    pairs = zip(wanted.items(), found, strict=True)
    return {query: (f"TokenShuffle{node}", names) for (query, node), names in pairs}


def own(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("TokenShuffle")]


@pytest.fixture
def with_aliases(page):
    if page.look.startswith("0.3."):
        pytest.skip(NO_ALIASES)
    return page


@pytest.fixture
def page_in(with_aliases, server):
    """Opens the page in a language; in the end it is English again."""

    def switch(language: str):
        with_aliases.set("Comfy.Locale", language)
        with_aliases.open(server.url)
        return with_aliases

    yield switch
    switch("en")


def test_by_name(page):
    results = search(page, {query: FIRST[query] for query in BY_NAME})
    wrong = {query: names[:3] for query, (node, names) in results.items() if names[:1] != [node]}
    assert not wrong


def test_first_of_all(with_aliases):
    results = search(with_aliases, FIRST)
    wrong = {query: names[:3] for query, (node, names) in results.items() if names[:1] != [node]}
    assert not wrong


def test_first_of_the_pack(with_aliases):
    results = search(with_aliases, FIRST_OF_THE_PACK)
    wrong = {query: own(names)[:3] for query, (node, names) in results.items()
             if own(names)[:1] != [node]}  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("queries", [CHINESE, JAPANESE], ids=["zh", "ja"])
def test_other_languages_on_an_english_page(with_aliases, queries):
    results = search(with_aliases, queries)
    wrong = {query: names[:3] for query, (node, names) in results.items() if names[:1] != [node]}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(("language", "queries"), [("zh", CHINESE), ("ja", JAPANESE)])
def test_on_a_page_in_the_language(page_in, language, queries):
    """There ComfyUI's nodes have names in it, too."""
    switched = page_in(language)
    results = search(switched, {**queries, "token shuffle": "Loader", "janus": "Loader"})
    wrong = {query: own(names)[:3] for query, (node, names) in results.items()
             if own(names)[:1] != [node]}  # fmt: skip
    assert not wrong
    switched.screenshot(f"search-{language}")


def test_deprecated_nodes_are_not_offered(page):
    for node, names in search(page, HIDDEN).values():
        assert node not in names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "node"), [("load token", "TokenShuffleLoader"), ("janus", "TokenShuffleLoader")]
)
def test_enter_in_the_search_box_adds_it(page, server, query, node):
    if page.look.startswith("0.3.") and query not in BY_NAME:
        pytest.skip(NO_ALIASES)
    page.open(server.url)
    page.page.evaluate("() => window.app.graph.clear()")
    page.command("Workspace.SearchBox.Toggle")
    page.page.wait_for_function("() => document.activeElement.tagName === 'INPUT'")
    page.page.keyboard.type(query, delay=30)
    page.page.get_by_text("Token Shuffle Model").first.wait_for()
    page.screenshot(f"search-{query.replace(' ', '-')}")
    page.page.keyboard.press("Enter")
    page.page.wait_for_function("() => window.app.graph._nodes.length")
    assert page.page.evaluate("() => window.app.graph._nodes.map((node) => node.type)") == [node]
