"""The page of a real ComfyUI in a real browser, as a user acts on it. Screenshots are kept in
screenshots/."""

import base64
import json
from pathlib import Path

from scripts import comfyui

SCREENSHOTS = comfyui.PACK / "screenshots"
EXTENSIONS = f"/extensions/{comfyui.PACK_NAME}"
NODE = "type => window.app.graph._nodes.find((node) => node.type === type)"
SECOND = 1000  # of Playwright's milliseconds


class Page:
    """ComfyUI's page, as a user acts on it."""

    def __init__(self, page, look: str):
        self.page = page
        self.look = look
        self.complaints = []  # errors that have to do with the pack
        page.set_default_timeout(20 * SECOND)
        page.on("pageerror", lambda error: self._note(f"{error} {error.stack}"))
        page.on("console", lambda m: m.type == "error" and self._note(f"{m.text} {m.location}"))

    def _note(self, text: str) -> None:
        # The page asks for a help page in its own language before it takes the common one, and
        # the registry whose nodes these are.
        own = "/en.md" in text or "api.comfy.org" in text
        if "tokenshuffle" in text.lower() and not own:
            self.complaints.append(text)

    def open(self, url: str) -> None:
        self.page.goto(url, timeout=60 * SECOND)
        self.page.wait_for_function(
            "() => window.app?.graph && window.app.extensionManager?.command.commands.length > 20"
        )
        self.page.wait_for_timeout(3 * SECOND)
        self.page.keyboard.press("Escape")  # the templates that a first visit is offered

    def set(self, setting: str, value) -> None:
        script = "([id, value]) => window.app.extensionManager.setting.set(id, value)"
        self.page.evaluate(script, [setting, value])

    def command(self, name: str) -> None:
        self.page.evaluate("id => window.app.extensionManager.command.execute(id)", name)

    def drop(self, path: Path) -> None:
        kind = "image/png" if path.suffix == ".png" else "application/json"
        transfer = self.page.evaluate_handle(
            """([data, name, type]) => {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0))
                const transfer = new DataTransfer()
                transfer.items.add(new File([bytes], name, { type }))
                return transfer
            }""",
            [base64.b64encode(path.read_bytes()).decode(), path.name, kind],
        )
        for event in ("dragover", "drop"):
            at = {"dataTransfer": transfer, "clientX": 800, "clientY": 400}
            self.page.dispatch_event("#graph-canvas", event, at)
        wanted = sorted(
            node["id"] for node in json.loads(path.with_suffix(".json").read_text())["nodes"]
        )
        self.page.wait_for_function(
            """wanted => JSON.stringify(window.app.graph._nodes.map((node) => Number(node.id))
                .sort((a, b) => a - b)) === JSON.stringify(wanted)""",
            arg=wanted,
        )
        self.page.wait_for_timeout(SECOND)
        self.command("Comfy.Canvas.FitView")

    def values(self, kind: str) -> dict:
        """The widgets of the first node of a kind."""
        script = f"kind => ({NODE})(kind).widgets.map((widget) => [widget.name, widget.value])"
        return dict(self.page.evaluate(script, kind))

    def fill(self, kind: str, **values) -> None:
        """Sets widgets as a hand does: the value, then the widget's callback."""
        script = f"""([kind, values]) => {{
            for (const widget of ({NODE})(kind).widgets) {{
                if (!(widget.name in values)) continue
                widget.value = values[widget.name]
                widget.callback?.(widget.value)
            }}
        }}"""
        self.page.evaluate(script, [kind, values])

    def press_run(self) -> None:
        self.page.evaluate(
            """() => {
                window.previews = []
                window.finished = undefined
                const { api } = window.comfyAPI.api
                api.addEventListener('b_preview', ({ detail }) => window.previews.push(detail.size))
                for (const end of ['execution_success', 'execution_error'])
                    api.addEventListener(end, () => (window.finished = end), { once: true })
            }"""
        )
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def wait_for_the_end(self) -> None:
        self.page.wait_for_function("() => window.finished", timeout=120 * SECOND)
        assert self.page.evaluate("() => window.finished") == "execution_success"

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}-{self.look}.png")
