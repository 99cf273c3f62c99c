"""The page to try a model with, in a real browser."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from llama import Llama
from tests.server.test_faults import until
from tests.support.serving import Served, serving, tiny_llama

api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.soak

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = """<script>window.ran = 1</script><img src=x onerror="window.ran = 1">
**bold <b onmouseover=alert(1)>x</b>** `<i>code</i>` [click](javascript:window.ran=1) [real](https://example.org/a"b)
| <iframe src="javascript:window.ran=1"> | b |
|---|---|
| <svg onload=window.ran=1> | `c` |
```html
<script>window.ran = 1</script>
```
"""
MARKDOWN = """# Title

First *line* of **two**,
with `code` and https://example.org/x.

1. One
   - inner
2. Two

> quoted

| Name | Count |
|:--|--:|
| a | 1 |

```python
def f(x):
    return x
```

---
snake_case_name and 2 * 3 * 4
"""
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    if not CHROMIUM:
        pytest.skip("no chromium is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def own(tmp_path: Path) -> Llama:
    """A model for a test that has it give a certain answer."""
    return tiny_llama(tmp_path)


def given(llama: Llama, answer: str | re.Pattern) -> Llama:
    """The model, which can answer nothing else."""
    regex = answer.pattern if isinstance(answer, re.Pattern) else re.escape(answer)
    llama.chat_requests = partial(llama.chat_requests, regex=regex)  # type: ignore[method-assign]
    return llama


@pytest.fixture
def open_page(browser: api.Browser) -> Iterator[Callable[..., api.Page]]:
    """Opens the page of a server. At the end: nothing but the server was asked, and nothing went wrong."""
    contexts, urls, faults = [], [], []

    def open_page(url: str, **options) -> api.Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: urls.append(request.url))
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(url)
        api.expect(page.get_by_label("Message")).to_be_focused()
        asked.append(url)
        return page

    asked: list[str] = []
    yield open_page
    for context in contexts:
        context.close()
    assert all(url.startswith(tuple(asked)) for url in urls)
    assert not [fault for fault in faults if "a status of 401" not in fault]


def ask(page: api.Page, text: str) -> api.Locator:
    """Type and send; the article of the answer that begins."""
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    return page.locator("article.assistant").last


def ended(page: api.Page) -> None:
    api.expect(page.get_by_role("button", name="Send")).to_be_enabled(timeout=60_000)


def picture(page: api.Page, name: str) -> None:
    """Kept where SCREENSHOTS names a folder, to be looked at."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_answers_stream_and_stop(own: Llama, open_page) -> None:
    with serving(given(own, re.compile("[a-z ]{3000}"))) as served:
        page = open_page(served.url)
        answer = ask(page, "Tell me more")
        api.expect(answer.locator("p").first).not_to_be_empty()  # though it has not ended
        assert served.busy
        api.expect(page.get_by_role("button", name="Send")).to_be_disabled()
        page.keyboard.press("Escape")
        ended(page)
        until(lambda: not served.busy)
        api.expect(page.get_by_role("status")).to_have_text("Stopped.")
        api.expect(page.locator("article.user > div")).to_have_text("Tell me more")
        # The conversation goes on, by keyboard alone: the focus is where one types.
        answer = ask(page, "And then?")
        api.expect(answer.locator("p").first).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()
        ended(page)
        assert page.evaluate("messages.map(message => message.role)") == ["user", "assistant"] * 2
        ask(page, "A last one")
        page.get_by_role("button", name="New chat").click()
        ended(page)
        until(lambda: not served.busy)
        assert page.locator("article").count() == page.evaluate("messages.length") == 0


def test_hostile_answers_stay_text(own: Llama, open_page) -> None:
    with serving(given(own, HOSTILE)) as served:
        page = open_page(served.url)
        answer = ask(page, "<img src=y onerror='window.ran = 1'>")
        ended(page)
        api.expect(page.locator("article.user > div")).to_have_text("<img src=y onerror='window.ran = 1'>")
        made = answer.locator("*").evaluate_all("nodes => [...new Set(nodes.map(node => node.localName))]")
        assert not {"script", "img", "iframe", "svg", "b", "i"} & set(made)
        attributes = answer.locator("div *").evaluate_all(
            "nodes => [...new Set(nodes.flatMap(node => node.getAttributeNames()))]"
        )
        assert set(attributes) <= {"href", "rel", "target", "class", "tabindex"}
        assert answer.locator("a").evaluate_all("links => links.map(a => a.href)") == [
            "https://example.org/a%22b"
        ]
        api.expect(answer).to_contain_text("javascript:window.ran=1")
        assert page.evaluate("window.ran") is None
        picture(page, "hostile")


def test_nothing_but_the_pages_own_script_may_run(served: Served, browser: api.Browser) -> None:
    """Even if a text became HTML."""
    page = browser.new_page()
    page.goto(served.url)
    blocked = page.evaluate(
        """async () => {
            const blocked = [], node = document.createElement("div");
            document.onsecuritypolicyviolation = event => blocked.push(event.violatedDirective);
            node.innerHTML = "<img src='https://example.org/x'><img src='data:,' onerror='window.ran = 1'>";
            node.append(Object.assign(document.createElement("script"), { text: "window.ran = 1" }));
            document.body.append(node);
            await fetch("https://example.org/").catch(() => 0);
            await new Promise(later => setTimeout(later, 200));
            return [...blocked, window.ran];
        }"""
    )
    assert sorted(blocked[:-1]) == ["connect-src", "img-src", "script-src-attr", "script-src-elem"]
    assert blocked[-1] is None
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_markdown(scheme: str, own: Llama, open_page) -> None:
    with serving(given(own, MARKDOWN)) as served:
        page = open_page(served.url, color_scheme=scheme, viewport={"width": 900, "height": 1000})
        answer = ask(page, "Show me all that Markdown can do.")
        ended(page)
        picture(page, f"markdown-{scheme}")
        for selector, text in (
            ("h3", "Title"),
            ("p em", "line"),
            ("p strong", "two"),
            ("p code", "code"),
            ("ol > li ul > li", "inner"),
            ("ol > li:last-child", "Two"),
            ("blockquote p", "quoted"),
            ("th:last-child", "Count"),
            ("td:last-child", "1"),
            ("pre > code", "def f(x):\n    return x"),
            ("hr + p", "snake_case_name and 2 * 3 * 4"),
        ):
            api.expect(answer.locator(selector)).to_have_text(text)
        api.expect(answer.locator("p a")).to_have_attribute("href", "https://example.org/x")
        assert answer.locator("ol").count() == 1


def test_settings_and_tools_reach_the_model(served: Served, open_page) -> None:
    page = open_page(served.url)
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("7")
    page.get_by_label("Message").focus()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hi")
    ended(page)
    body = sent.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert (body["temperature"], body["max_tokens"], body["top_p"]) == (0, 7, 0.9)
    api.expect(page.get_by_role("status")).to_contain_text("7 tokens in")

    page.get_by_label("Tools").fill("nonsense")
    page.get_by_label("Message").focus()
    ask(page, "Weather?")
    api.expect(page.locator("article.error")).to_contain_text("Tools must be a JSON list")
    api.expect(page.get_by_label("Message")).to_have_value("Weather?")  # to be sent again
    picture(page, "settings")


def test_calls_are_shown_and_answered(own: Llama, open_page) -> None:
    with serving(own) as served:
        page = open_page(served.url)
        # The random model would hardly think of it.
        page.route(
            "**/v1/chat/completions",
            lambda route: route.continue_(
                post_data={**route.request.post_data_json, "tool_choice": "required"}
            ),
        )
        page.get_by_text("Settings").click()
        page.get_by_label("Tools").fill(json.dumps(TOOLS))
        page.get_by_label("Message").focus()
        answer = ask(page, "Weather?")
        ended(page)
        api.expect(answer.locator(".call strong").first).to_have_text("Calls weather")
        api.expect(answer.locator(".call code").first).to_have_text('{\n  "city": "Oslo"\n}')
        picture(page, "tools")
        for _ in range(answer.locator(".call").count()):
            api.expect(page.get_by_label("Result of weather")).to_be_focused()
            with page.expect_request("**/v1/chat/completions") as sent:
                ask(page, "12 °C")
        last = sent.value.post_data_json["messages"][-1]
        assert (last["role"], last["content"]) == ("tool", "12 °C")
        ended(page)


def test_a_key_is_asked_for(own: Llama, open_page) -> None:
    with serving(given(own, "Well."), keys=["secret"]) as served:
        page = open_page(served.url)
        api.expect(page.get_by_role("status")).to_contain_text("a valid API key is needed")
        page.get_by_label("API key").fill("secret")
        page.get_by_label("Message").focus()
        answer = ask(page, "Hi")
        api.expect(answer.locator("p")).to_have_text("Well.")
        api.expect(page.locator("h1")).to_have_text("tiny")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_assistive_technology(scheme: str, own: Llama, open_page) -> None:
    """By the rules of axe, with all there can be on the page, in both colour schemes."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with serving(given(own, MARKDOWN)) as served:
        page = open_page(served.url, color_scheme=scheme)
        page.get_by_text("Settings").click()
        page.get_by_label("Message").focus()
        ask(page, "Hi")
        ended(page)
        found = axe.run(page)
        assert not found.response["violations"], found.generate_report()
        spoken = page.locator("[aria-live=polite]")
        api.expect(spoken).to_contain_text("snake_case_name")  # all of it at once, after it has ended


def test_keys_lead_everywhere(served: Served, open_page) -> None:
    page = open_page(served.url)
    names = []
    for _ in range(14):
        page.keyboard.press("Shift+Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.localName"))
    assert names[:4] == ["summary", "log", "clear", "body"]
    page.get_by_label("Message").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "system"
    page.get_by_label("Message").focus()
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    api.expect(page.get_by_label("Message")).to_have_value("two\nlines")
