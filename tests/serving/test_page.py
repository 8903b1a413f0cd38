"""The page at /: what is served, its headers, and what its files may not hold. test_page_browser.py drives it."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from dylora_mlx.assets import PAGE
from dylora_mlx.reporting.style import theme_variables
from dylora_mlx.system.palette import RGB
from tests.serving.conftest import serving

KEY = "a-key"


@pytest.fixture(scope="module")
def served(server):
    return server.send("GET", "/")


def test_the_page_is_one_html_file(served, server):
    assert served.status == 200
    assert served.headers["Content-Type"] == "text/html; charset=utf-8"
    assert served.body.startswith("<!DOCTYPE html>\n<html lang=")
    for name in ("page.css", "page.js"):
        assert (PAGE / name).read_text(encoding="utf-8") in served.body
    assert "__" not in re.sub(r"<script>.*</script>", "", served.body, flags=re.DOTALL), "a place that was left open"
    assert server.send("GET", "/?any=thing").body == served.body
    head = server.send("HEAD", "/")
    assert (head.status, head.body) == (200, "")
    assert head.headers["Content-Length"] == served.headers["Content-Length"] == str(len(served.body.encode()))


def test_the_policy_allows_its_own_script_and_style_alone(served):
    policy = dict(part.split(" ", 1) for part in served.headers["Content-Security-Policy"].split("; "))
    scripts = re.findall(r"<script>(.*?)</script>", served.body, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", served.body, re.DOTALL)
    assert (len(scripts), len(styles)) == (1, 1)
    for directive, content in (("script-src", scripts[0]), ("style-src", styles[0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(directive) == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'",
    }  # fmt: skip
    assert not re.search(r"<[^>]*\s(?:style|on\w+)=", served.body), "an attribute that the policy forbids"


def test_the_other_headers(served):
    assert served.headers["X-Content-Type-Options"] == "nosniff"
    assert served.headers["Cache-Control"] == "no-store"
    assert served.headers["Referrer-Policy"] == "no-referrer"
    assert served.headers["X-Frame-Options"] == "DENY"
    assert served.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in served.headers


def test_the_page_names_no_other_server(served):
    assert set(re.findall(r"\w+://[^'\"\s)]+", served.body)) == {"http://www.w3.org/2000/svg"}, (
        "a namespace, no address"
    )
    assert re.findall(r"(?:src|href|action)=\"([^\"]{5})", served.body) == ["data:"]
    assert not re.search(r"@import|url\(|importScripts|WebSocket|EventSource", served.body)


def test_text_never_becomes_html():
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\(|srcdoc", script
    )
    assert script.count("localStorage") == 2, "of the theme; the key stays in memory"
    assert "sessionStorage" not in script
    assert "cookie" not in script


def test_the_page_needs_no_key_and_is_the_same_for_every_run(chat_run, served):
    with serving(chat_run, api_key=KEY) as guarded:
        page = guarded.send("GET", "/")
        assert (page.status, page.body) == (200, served.body)
        assert guarded.send("POST", "/", {}).status == 401
        assert guarded.send("GET", "/page.js", Authorization=f"Bearer {KEY}").status == 404


def test_the_page_is_for_this_host_alone(server):
    refused = server.send("GET", "/", Host="evil.example")
    assert (refused.status, refused.body["error"]["code"]) == (403, "forbidden_host")


def test_tinted_text_can_be_read():
    """The contrast of text on the strongest tint is at least 4.5 to 1 (WCAG 2.2, 1.4.3), in both themes, for every expert."""
    tint = float(re.search(r"TINT = ([\d.]+)", (PAGE / "page.js").read_text(encoding="utf-8"))[1])

    def luminance(color: list[float]) -> float:
        linear = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for dark in (False, True):
        variables = dict(pair.split(":") for pair in theme_variables(dark).split(";") if pair)

        def hex_color(name: str, variables: dict[str, str] = variables) -> list[float]:
            digits = variables[name].removeprefix("#")
            digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
            return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]

        for number in range(len(RGB) + 1):
            color = [float(value) for value in variables[f"--r{number}"].split(",")]
            for back in (hex_color("--bg"), hex_color("--card")):
                tinted = [tint * one + (1 - tint) * two for one, two in zip(color, back, strict=True)]
                low, high = sorted([luminance(tinted), luminance(hex_color("--ink"))])
                assert (high + 0.05) / (low + 0.05) >= 4.5, (dark, number)
