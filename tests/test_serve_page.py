"""The page for people in a headless Chromium: typed, streamed, stopped, a probability read. LM_JAX_PICTURES=FOLDER: pictures."""

import os
import pathlib
import re
import shutil

import pytest

pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
browsers = pytest.importorskip("playwright.sync_api", reason="pip install playwright, and a chromium")
from serving import exported, serving  # noqa: E402

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("tokenizers")
    with serving(exported(tmp_path_factory.mktemp("exported") / "small")) as one:
        yield one


@pytest.fixture
def page(server):
    with browsers.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 900, "height": 640})
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(server.url)
        yield page
        assert page.faults == []
        chromium.close()


def picture(page, name: str) -> None:
    if folder := os.environ.get("LM_JAX_PICTURES"):
        page.screenshot(path=str(pathlib.Path(folder) / f"{name}.png"))


def test_a_completion_is_typed_streamed_and_its_probabilities_read(page, server):
    page.wait_for_function("document.title !== 'lm_jax'")
    page.select_option("#mode", "text")
    page.fill("#max_tokens", "24")
    page.focus("#prompt")
    page.keyboard.type("import os")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelectorAll('.token').length === 24 && !document.querySelector('#send').disabled"
    )
    page.hover(".token >> nth=3")
    assert re.match(r'".*" [\d.e-]+%   instead: ".*" [\d.e-]+%', page.inner_text("#details")), page.inner_text(
        "#details"
    )
    before = page.inner_text("#details")
    assert page.locator("#key_label").is_hidden()
    page.focus("#log")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#details") != before and page.locator(".token.chosen").count() == 1
    picture(page, "completion")


def test_a_conversation_is_stopped_by_the_keyboard_and_goes_on(page, server):
    page.wait_for_function("document.title !== 'lm_jax'")
    page.fill("#temperature", "0")  # drawn, the first token may be the end
    page.fill("#max_tokens", "4")
    page.fill("#prompt", "What is a class?")
    page.click("#send")
    page.wait_for_function(
        "document.querySelectorAll('.token').length > 0 && !document.querySelector('#send').disabled"
    )
    page.route("**/v1/chat/completions", lambda route: None)  # never answers
    page.fill("#prompt", "And?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:not([disabled])")
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelector('#details').textContent.startsWith('stopped')")
    page.unroute("**/v1/chat/completions")
    page.fill("#max_tokens", "1000")
    page.fill("#prompt", "too long")
    page.keyboard.press("Enter")
    page.wait_for_selector("#details.error")
    assert "64 tokens" in page.inner_text("#details")
    picture(page, "conversation")
    page.click("#clear")
    assert page.locator(".said").count() == 0
    assert server.metric("slots_busy") == 0
