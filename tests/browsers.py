"""A real Chromium or Chrome for tests: where it is, and a client that drives it over its debugging pipe (DevTools protocol)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
CHROME = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), str(MAC) if MAC.is_file() else None)
"""The browser; None without one. The variable CHROME may name another."""
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
]  # fmt: skip
SECONDS = 60.0
"""Seconds to wait for anything, on a machine that is busy."""
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "End": 35}


class BrowserError(Exception):
    """The browser does not answer, or refuses a command."""


class Page:
    """One tab. `console` holds what the page wrote to the console, and errors of its scripts and requests."""

    def __init__(self, pipe: Pipe, session: str):
        self._pipe, self._session = pipe, session
        self.console: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        result, events = self._pipe.call(method, params, self._session)
        self._note(events)
        return result

    def _note(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            params = event.get("params", {})
            if event["method"] == "Runtime.consoleAPICalled":
                self.console.append(f"console: {[value.get('value') for value in params['args']]}")
            elif event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.console.append(details.get("exception", {}).get("description") or details["text"])
            elif event["method"] == "Log.entryAdded":
                self.console.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str) -> Any:
        """Return the value of an expression; of a promise, what it becomes. Raises BrowserError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + SECONDS
        while not (value := self.run(condition)):
            if time.monotonic() > deadline:
                raise BrowserError(f"never true: {condition}; console: {self.console}")
            time.sleep(0.05)
        return value

    def size(self, width: int, height: int = 800) -> None:
        """Set the size of the window; below 500 pixels it is a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def theme(self, name: str) -> None:
        """Set the preferred color scheme: dark or light."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key of KEYS."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def hover(self, selector: str) -> None:
        """Move the pointer to the middle of the first element that a selector finds."""
        x, y = self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getClientRects()[0];"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


class Pipe:
    """Commands to a browser and their answers, JSON that ends with a zero byte."""

    def __init__(self, reading: int, writing: int):
        self._writing, self._count = writing, 0
        self._messages: Queue[dict[str, Any] | None] = Queue()
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()

    def _read(self, reading: int) -> None:
        rest = b""
        with suppress(OSError):
            while part := os.read(reading, 1 << 16):
                *whole, rest = (rest + part).split(b"\0")
                for message in whole:
                    self._messages.put(json.loads(message))
        self._messages.put(None)

    def call(self, method: str, params: dict[str, Any], session: str | None = None) -> tuple[Any, list[dict[str, Any]]]:
        """Return a command's result and the events that came before it. Raises BrowserError."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(self._writing, json.dumps({**message, "sessionId": session} if session else message).encode() + b"\0")
        events: list[dict[str, Any]] = []
        while True:
            try:
                answer = self._messages.get(timeout=SECONDS)
            except Empty:
                raise BrowserError(f"{method}: no answer") from None
            if answer is None:
                raise BrowserError(f"{method}: the browser has ended")
            if "method" in answer:
                events.append(answer)
            elif answer["id"] == self._count:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                return answer["result"], events


@contextmanager
def open_page(profile: Path) -> Iterator[Page]:
    """Start a browser with an empty tab within the block. Raises BrowserError or OSError if it does not start."""
    assert CHROME is not None
    reading, its_writing = os.pipe()
    its_reading, writing = os.pipe()
    # The browser reads commands from descriptor 3 and writes to 4: its ends must not be in the way.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (its_reading, its_writing)]
    errors = os.open(profile.with_suffix(".log"), os.O_WRONLY | os.O_CREAT, 0o600)
    line = [CHROME, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    actions = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip([*ends, errors], (3, 4, 2), strict=True)]
    process = os.posix_spawn(CHROME, line, os.environ, file_actions=actions)
    for end in (its_reading, its_writing, *ends, errors):
        os.close(end)
    pipe = Pipe(reading, writing)
    try:
        target = pipe.call("Target.createTarget", {"url": "about:blank"})[0]["targetId"]
        session = pipe.call("Target.attachToTarget", {"targetId": target, "flatten": True})[0]["sessionId"]
        yield Page(pipe, session)
    finally:
        with suppress(BrowserError, OSError):
            pipe.call("Browser.close", {})
        with suppress(ProcessLookupError):
            if not _has_ended(process):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        os.close(writing)
        os.close(reading)


def _has_ended(process: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if os.waitpid(process, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    return False
