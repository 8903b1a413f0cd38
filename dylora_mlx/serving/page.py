"""The page at /: one HTML file with its style and script, which a browser runs without any other file.

It is the same for every run and tells nothing of it; what it shows comes from the API.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache

from dylora_mlx.assets import PAGE
from dylora_mlx.reporting.style import css_classes, theme_variables
from dylora_mlx.system.palette import RGB


@cache
def web_page() -> bytes:
    """Return the page."""
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    for place, content in (("__COLORS__", str(len(RGB))), ("__STYLE__", _style()), ("__SCRIPT__", _script())):
        page = page.replace(place, content, 1)
    return page.encode()


@cache
def page_headers() -> dict[str, str]:
    """Return the headers of the page: only its own style and script, requests to this server alone, and in no frame."""
    policy = (
        "default-src 'none'", f"script-src '{_hash(_script())}'", f"style-src '{_hash(_style())}'", "connect-src 'self'",
        "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )  # fmt: skip
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


def _style() -> str:
    """Return the CSS: the report's themes and colours, with a choice of the theme, and the page's own rules."""
    light, dark = (f"color-scheme:{name};{theme_variables(name == 'dark')}" for name in ("light", "dark"))
    themes = (
        f":root{{{light}}}@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f":root[data-theme=dark]{{{dark}}}{css_classes()}\n"
    )
    return themes + (PAGE / "page.css").read_text(encoding="utf-8")


def _script() -> str:
    return (PAGE / "page.js").read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """Return the hash by which a policy allows a style or a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
