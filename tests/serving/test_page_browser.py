"""The page in a real browser: chat, menu, tint, side by side, keys, errors, at both widths, without a line on the console.

These tests need Chromium or Chrome and are skipped without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from dylora_mlx.data import encoding, rendering
from tests.browsers import CHROME, BrowserError, Page, open_page
from tests.serving.conftest import NAME, Server, serving
from tests.serving.test_chat import scripted
from tests.serving.test_gate_trace import EXPERTS

pytestmark = pytest.mark.skipif(CHROME is None, reason="no Chromium or Chrome on this machine")
PROMPT = "import requests\n\ndef fetch("
ANSWER = ".turn:last-child .answer"
LOOKS = {"base": ["e0"], "requests": ["e1", "p1"], "sql": ["e2", "p2"]}
SHAPES = """
[...document.querySelectorAll('button, select, textarea, input, h1, .turn, .text, .shares, #hint')].filter(e => e.getClientRects().length)
    .map(e => [e.id || e.className || e.tagName, e.getBoundingClientRect()]).filter(([, b]) => b.left < 0 || b.right > innerWidth)
    .map(([name, b]) => `${name} ${b.left} ${b.right}`)
"""
"""What sticks out of the window."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Page]:
    with ExitStack() as stack:
        try:
            page = stack.enter_context(open_page(tmp_path_factory.mktemp("browser") / "profile"))
        except (OSError, BrowserError) as error:
            pytest.skip(f"{CHROME} does not start: {error!r:.200}")
        yield page


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Page]]:
    """Returns a function that opens the page of a server; at the end nothing may be on the console."""

    def visit(server: Server, ready: str = "models.length > 0") -> Page:
        browser.size(1280)
        browser.theme("light")
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(ready)
        return browser

    browser.console.clear()
    yield visit
    browser.run("1")  # collects what came last
    assert browser.console == []


def ask(page: Page, prompt: str, max_tokens: int = 8) -> None:
    """Type a prompt, send it with Enter, and wait for the end of the answers."""
    page.run(f"$('max_tokens').value = {max_tokens}; $('prompt').focus(); void 0")
    turns = page.run("turns.length")
    page.type(prompt)
    page.press("Enter")
    page.wait(f"turns.length === {turns + 1} && running === null")


def choose(page: Page, menu: str, value: str) -> None:
    page.run(f"$('{menu}').value = {json.dumps(value)}; $('{menu}').dispatchEvent(new Event('change')); void 0")
    assert page.run(f"$('{menu}').value") == value


def tokens(page: Page, selector: str) -> list[dict[str, Any]]:
    """Return the text, the classes and the gates of the tokens in an element."""
    return page.run(
        f"[...document.querySelector({json.dumps(selector)}).querySelectorAll('span')]"
        ".map(span => ({text: span.textContent, look: [...span.classList], gates: gatesOf.get(span)}))"
    )


def texts(page: Page, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(element => element.textContent)")


def test_an_answer_streams_with_the_look_of_its_experts(visit, mixing):
    server, page = mixing, visit(mixing)
    page.run("window.seen = new Set(); new MutationObserver(() => { const block = document.querySelector('.answer .text');"
             " if (block) seen.add(block.textContent.length); }).observe($('log'), {childList: true, subtree: true}); void 0")  # fmt: skip
    ask(page, PROMPT, 12)
    assert page.run("seen.size") > 5, "the text came in pieces"
    found = tokens(page, f"{ANSWER} .text")
    text = server.text(PROMPT, max_tokens=12)
    assert "".join(token["text"] for token in found) == text
    for token in found:
        strongest = max(token["gates"], key=token["gates"].get)
        assert token["look"] == LOOKS[strongest]
    asked = server.complete(PROMPT, max_tokens=12, routing=True)["choices"][0]["routing"]
    mean = {name: sum(gates.get(name, 0) for gates in asked) / 12 for name in EXPERTS}
    shares = dict(share.removeprefix("ab").rsplit(" ", 1) for share in texts(page, f"{ANSWER} .shares li"))
    for name, share in shares.items():
        assert float(share.rstrip("%")) / 100 == pytest.approx(mean[name], abs=2e-3)
    assert "12 tokens" in texts(page, f"{ANSWER} h3 small")[0]
    assert "ended at max tokens" in texts(page, f"{ANSWER} h3 small")[0]
    assert [name.removeprefix("ab") for name in texts(page, "#legend li")] == EXPERTS
    page.wait("document.querySelectorAll('.asked span').length > 0")
    routed = server.send("POST", "/v1/route", {"text": PROMPT}).body
    prompt = tokens(page, ".asked")
    assert [token["text"] for token in prompt] == routed["tokens"]
    assert [token["look"] for token in prompt] == [LOOKS[name] for name in routed["experts"]]


def test_the_menu_has_every_model(visit, server):
    page = visit(server)
    ids = [model["id"] for model in server.send("GET", "/v1/models").body["data"]]
    assert page.run("[...$('model').options].map(option => option.value)") == ids
    assert page.run("[...$('beside').options].map(option => option.value)") == ["", *ids]
    assert page.run("$('model').options[3].textContent") == f"expert sql · {NAME}:sql"
    choose(page, "model", f"{NAME}:sql")
    ask(page, "SELECT name", 6)
    found = tokens(page, f"{ANSWER} .text")
    assert "".join(token["text"] for token in found) == server.text("SELECT name", f"{NAME}:sql", 6)
    assert {tuple(token["look"]) for token in found} == {("e2", "p2")}
    assert texts(page, f"{ANSWER} .shares li") == ["absql 100%"]
    assert texts(page, f"{ANSWER} h3")[0].startswith(f"{NAME}:sql")


def test_two_models_side_by_side_and_on_a_phone(visit, server):
    page = visit(server)
    choose(page, "beside", f"{NAME}:base")
    ask(page, PROMPT, 10)
    expected = [server.text(PROMPT, model, 10) for model in (NAME, f"{NAME}:base")]
    assert texts(page, f"{ANSWER} .text") == expected
    boxes = f"[...document.querySelectorAll('{ANSWER}')].map(e => e.getBoundingClientRect()).map(b => [b.left, b.top])"
    (left, top), (right, same) = page.run(boxes)
    assert (right > left + 400, same) == (True, top), "beside each other"
    for theme in ("light", "dark"):
        page.theme(theme)
        for width in (1280, 360):
            page.size(width, 740)
            page.wait(f"innerWidth === {width}")
            for sampling in ("true", "false"):
                page.run(f"showSampling({sampling})")
                assert page.run("document.documentElement.scrollWidth") <= width
                assert page.run(SHAPES) == []
                assert page.run("$('send').getBoundingClientRect().bottom <= innerHeight")
                assert page.run("$('log').clientHeight") > 150
    for width, height in ((320, 256), (740, 360)):  # magnified four times, and a phone on its side
        page.size(width, height)
        page.wait(f"innerWidth === {width}")
        assert page.run(SHAPES) == []
    page.size(360, 740)
    page.wait("innerWidth === 360")
    (left, top), (same, below) = page.run(boxes)
    assert (same, below > top) == (left, True), "one below the other"


def test_gates_by_pointer_and_by_keyboard(visit, server):
    page = visit(server)
    ask(page, PROMPT, 6)
    found = tokens(page, f"{ANSWER} .text")
    page.hover(f"{ANSWER} .text span:nth-child(2)")
    page.wait("!$('gates').hidden")
    shown = dict(zip(texts(page, "#gates th"), texts(page, "#gates td"), strict=True))
    assert list(shown) == [f"ab {name}" for name in found[1]["gates"]]
    page.press("Escape")
    assert page.run("$('gates').hidden")
    for _ in range(20):
        page.press("Tab")
        if page.run(f"document.activeElement.closest('{ANSWER} .text') !== null"):
            break
    assert page.run("document.activeElement.textContent") == found[0]["text"]
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run("document.activeElement.textContent") == found[2]["text"]
    assert page.run("document.activeElement.getAttribute('aria-describedby')") == "gates"
    assert len(texts(page, "#gates tr")) == len(found[2]["gates"])
    page.press("End")
    assert page.run("document.activeElement === document.activeElement.parentElement.lastElementChild")
    page.press("Tab")
    assert page.run("document.activeElement.closest('.text')") is None, "an answer is one stop"


def test_escape_and_the_button_stop(visit, server):
    page = visit(server)
    for stop in (lambda: page.press("Escape"), lambda: page.run("$('stop').click()")):
        page.run("$('max_tokens').value = 900; $('prompt').focus(); void 0")
        turns = page.run("turns.length")
        page.type(PROMPT)
        page.press("Enter")
        page.wait(f"turns.length === {turns + 1} && document.querySelectorAll('{ANSWER} .text span').length > 3")
        assert page.run("[$('send').hidden, $('stop').hidden]") == [True, False]
        stop()
        page.wait("running === null")
        assert page.run("[$('send').hidden, $('stop').hidden]") == [False, True]
        assert "stopped" in texts(page, f"{ANSWER} h3 small")[0]
        found = "".join(texts(page, f"{ANSWER} .text"))
        assert server.text(PROMPT, max_tokens=400).startswith(found)
    ask(page, "SELECT", 3)
    assert texts(page, f"{ANSWER} .text") == [server.text("SELECT", max_tokens=3)]


def test_the_end_stays_in_sight_unless_one_scrolls_up(visit, server):
    page, rest = visit(server), "$('log').scrollHeight - $('log').scrollTop - $('log').clientHeight"
    page.size(1280, 500)
    for _ in range(3):
        ask(page, PROMPT, 40)
    page.wait(f"{rest} < 2")
    assert page.run("$('log').scrollTop") > 50
    page.run("$('max_tokens').value = 900; $('prompt').focus(); void 0")
    page.type(PROMPT)
    page.press("Enter")
    page.wait("running !== null && isAtEnd")
    page.run("$('log').scrollTop = 0; void 0")
    page.wait("!isAtEnd")
    count = page.run("document.querySelectorAll('.answer .text span').length")
    page.wait(f"document.querySelectorAll('.answer .text span').length > {count} + 5")
    page.press("Escape")
    page.wait("running === null")
    assert page.run("$('log').scrollTop") == 0


def test_the_theme_is_kept(visit, server):
    page = visit(server)
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.run(back)
    page.theme("dark")
    dark = page.run(back)
    assert dark != light
    page.wait("$('theme').ariaLabel === 'Light theme'")
    page.run("$('theme').click()")
    assert page.run(back) == light
    page.open(f"http://127.0.0.1:{server.port}/?again")
    assert page.run(back) == light
    page.run("localStorage.clear()")
    refuse = (
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('off', 'SecurityError'); }})"
    )
    script = page.call("Page.addScriptToEvaluateOnNewDocument", source=refuse)["identifier"]
    page.open(f"http://127.0.0.1:{server.port}/?off")
    page.wait("models.length > 0")
    page.run("$('theme').click(); $('theme').click()")
    assert page.run(back) == dark
    page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_sampling_is_sent_and_checked(visit, server):
    page = visit(server)
    page.run("showSampling(false); $('temperature').value = 1.5; $('seed').value = 7; $('top_p').value = 0.9; void 0")
    ask(page, "SELECT", 9)
    expected = server.text("SELECT", max_tokens=9, temperature=1.5, seed=7, top_p=0.9)
    assert texts(page, f"{ANSWER} .text") == [expected]
    assert expected != server.text("SELECT", max_tokens=9)
    page.run("$('top_p').value = 7; $('prompt').focus(); void 0")
    page.type("SELECT")
    page.press("Enter")
    assert page.run("[turns.length, $('sampling').hidden, document.activeElement.id]") == [1, False, "top_p"]


def test_errors_are_one_line_and_the_prompt_comes_back(visit, opened):
    with serving(opened, max_prompt_tokens=10) as limited:
        page = visit(limited)
        page.console.clear()
        ask(page, "SELECT name " * 9)
        (line,) = texts(page, f"{ANSWER} .error")
        assert line.startswith("the prompt has ")
        assert line.endswith("at most 10 are read here; shorten it")
        assert page.run("$('prompt').value") == "SELECT name " * 9
        page.run("$('prompt').value = ''; void 0")
    ask(page, "SELECT")
    assert texts(page, f"{ANSWER} .error") == ["The server cannot be reached. Is dylora serve still running?"]
    assert all("Failed to load resource" in line for line in page.console), "the browser's own lines"
    page.console.clear()


@pytest.mark.parametrize(
    ("stream", "line"),
    [
        ('data: {"choices": []}\n\n', "The connection to the server was lost before the end of the answer."),
        ('data: {"error": {"message": "the server failed at this request"}}\n\n', "the server failed at this request"),
        (': keepalive 1/2\n\ndata: {"choices": []}\n\ndata: [DONE]\n\n', None),
    ],
)
def test_a_stream_that_breaks_off_is_an_error(visit, server, stream, line):
    page = visit(server)
    read = f"for await (const event of events(new Response({json.dumps(stream)}), () => {{}}));"
    assert (
        page.run(f"(async () => {{ try {{ {read} return null; }} catch (error) {{ return error.message; }} }})()")
        == line
    )


def test_a_key_is_asked_for_and_kept_in_memory(visit, opened):
    with serving(opened, api_key="a-key") as guarded:
        page = visit(guarded, "!$('ask-key').hidden")
        assert texts(page, "#problem") == ["The server asks for an API key."]
        assert page.run("document.activeElement.id") == "key"
        page.type("wrong")
        page.press("Enter")
        page.wait("$('problem').textContent.includes('refuses')")
        page.run("$('key').focus()")
        page.type("a-key")
        page.press("Enter")
        page.wait("models.length > 0")
        page.wait("$('ask-key').hidden && $('problem').textContent === ''")
        assert page.run("[localStorage.length, document.cookie]") == [0, ""]
        ask(page, "SELECT", 3)
        assert len(texts(page, f"{ANSWER} .text")[0]) > 0
        assert all("401" in line for line in page.console), "the browser's own lines"
        page.console.clear()
        page.open(f"http://127.0.0.1:{guarded.port}/?again")
        page.wait("!$('ask-key').hidden")
        page.console.clear()


def test_a_chat_goes_on_from_its_own_answers(visit, chat_run):
    with serving(chat_run) as server:
        page = visit(server)
        assert page.run("$('prompt').placeholder") == "Ask something"
        page.run("$('system').value = 'Be brief.'; void 0")
        choose(page, "beside", f"{NAME}:base")
        ask(page, "How is the weather?", 5)
        first = texts(page, f"{ANSWER} .text")
        ask(page, "And tomorrow?", 5)
        second = texts(page, f"{ANSWER} .text")
        for column, model in enumerate((NAME, f"{NAME}:base")):
            messages = [
                {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How is the weather?"},
                {"role": "assistant", "content": first[column]}, {"role": "user", "content": "And tomorrow?"},
            ]  # fmt: skip
            tokenizer = chat_run.base.tokenizer
            ids = encoding.prompt_ids(rendering.chat_prompt(messages, tokenizer), tokenizer, special=False).tolist()
            assert second[column] == server.text(ids, model, 5)
            assert f"prompt of {len(ids)}" in texts(page, f"{ANSWER} h3 small")[column]
        assert page.run("document.querySelector('.asked').children.length") == 0, "the rendered prompt is not this text"
        page.run("$('new').click()")
        assert page.run("[turns.length, document.querySelectorAll('.answer').length, $('empty').hidden]") == [
            0,
            0,
            False,
        ]


def test_what_a_model_writes_is_text(visit, opened, monkeypatch):
    hostile = "<img src=x onerror=alert(1)><script>document.title='no'</script>&amp;"
    tokenizer = opened.base.tokenizer
    script = [*tokenizer.encode_text(hostile), tokenizer.eos_token_id]
    scripted(monkeypatch, opened, encoding.prompt_ids("SELECT <b>", tokenizer).tolist(), script)
    with serving(opened) as server:
        page = visit(server)
        ask(page, "SELECT <b>", 60)
        assert texts(page, f"{ANSWER} .text") == [hostile]
        assert texts(page, ".asked") == ["SELECT <b>"]
        choose(page, "model", f"{NAME}:sql")
        ask(page, hostile, 2)
        assert texts(page, ".turn:last-child .asked") == [hostile]
        page.run(f"token(document.querySelector('{ANSWER} .text'), {json.dumps(hostile)}, {{sql: 1}})")
        assert texts(page, f"{ANSWER} .text span:last-child") == [hostile]
        page.run(f"showGates(document.querySelector('{ANSWER} .text span:last-child')); problem({json.dumps(hostile)})")
        assert texts(page, "#gates code") == texts(page, "#problem p") == [hostile]
        assert page.run("[document.images.length, document.scripts.length, document.title]") == [0, 1, NAME]


def test_everything_has_a_name_for_a_screen_reader(visit, server):
    page = visit(server)
    choose(page, "beside", f"{NAME}:sql")
    ask(page, PROMPT, 4)
    page.run("showSampling(true)")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored", False)
    ]
    controls = [
        (role, name)
        for role, name in named
        if role in ("button", "textbox", "combobox", "spinbutton", "group", "list", "main")
    ]
    assert all(name.strip() for _, name in controls), controls
    for control in (("combobox", "Model"), ("combobox", "Beside it"), ("textbox", "Text to continue"), ("button", "Send"),
                    ("spinbutton", "Temperature"), ("group", f"Answer of {NAME}:sql"), ("main", "Conversation"),
                    ("button", "Dark theme")):  # fmt: skip
        assert control in controls
    live = page.run(f"[...document.querySelectorAll('{ANSWER} .text')].map(e => [e.ariaLive, e.ariaBusy])")
    assert live == [["polite", "false"]] * 2
    assert page.run("$('status').textContent") == "Done."
