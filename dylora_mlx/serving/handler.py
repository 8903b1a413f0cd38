"""The HTTP side: mlx_lm.server's handler behind checks of the client, with errors in OpenAI's form.

Python's own `http.server` reads the requests. A connection serves one request.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from mlx_lm.server import APIHandler

from dylora_mlx.errors import Failure, UserError
from dylora_mlx.generation.routed_text import route_text
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.serving.access import Access, Slots
from dylora_mlx.serving.engine import Engine
from dylora_mlx.serving.errors import ApiError
from dylora_mlx.serving.generation import SOCKET_SECONDS, RowGeneration
from dylora_mlx.serving.models import ServedModels
from dylora_mlx.serving.page import page_headers, web_page
from dylora_mlx.serving.requests import Prepared, RequestReader

KEYLESS = ("/", "/health")
"""Paths that need no API key."""


class Service(NamedTuple):
    """Everything that a handler needs."""

    run: OpenedRun
    models: ServedModels
    engine: Engine
    reader: RequestReader
    access: Access
    slots: Slots


class RunHandler(APIHandler):
    """Handles one connection.

    Args:
        service: What it serves.
    """

    server_version, sys_version = "dylora", ""
    timeout = SOCKET_SECONDS
    _headers_sent = False
    _prepared: Prepared | None = None

    def __init__(self, service: Service, *args: Any, **kwargs: Any):
        self._service = service
        super().__init__(service.engine, *args, **kwargs)

    # Requests

    def do_GET(self) -> None:
        routes = {"/": self._page, "/health": self._health, "/v1/models": self._models}
        self._answer(routes, {"/v1/models/": self._model}, needs_key=self.path.partition("?")[0] not in KEYLESS)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._answer(
            {
                "/v1/completions": self._complete,
                "/v1/chat/completions": self._complete,
                "/chat/completions": self._complete,
                "/v1/route": self._route,
            },
            {},
        )

    def do_OPTIONS(self) -> None:
        def preflight() -> None:
            if self.headers.get("Origin") is None:
                raise ApiError(404, "nothing here", "not_found")
            super(RunHandler, self).do_OPTIONS()

        self._answer({self.path: preflight}, {}, needs_key=False)

    def _answer(
        self,
        routes: dict[str, Callable[[], None]],
        prefixes: dict[str, Callable[[], None]],
        needs_key: bool = True,
    ) -> None:
        """Check the client and answer its request; what goes wrong becomes a JSON error."""
        self.path = path = self.path.partition("?")[0]
        started = time.monotonic()
        try:
            access, headers = self._service.access, self.headers
            access.check_client(headers.get("Host"), headers.get("Origin"))
            if needs_key:
                access.check_key(headers.get("Authorization"))
            work = routes.get(path) or next((w for start, w in prefixes.items() if path.startswith(start)), None)
            if work is None:
                raise ApiError(404, f"nothing at {self.command} {path[:80]}", "not_found")
            work()
        except ApiError as error:
            self._send_error(error)
        except (ConnectionError, TimeoutError):
            logging.info("%s left after %.1f s", self.client_address[0], time.monotonic() - started)
            self.close_connection = True
        except Exception as error:
            logging.error(
                "%s: %s", type(error).__name__, error, exc_info=logging.getLogger().isEnabledFor(logging.DEBUG)
            )
            unavailable = isinstance(error, Failure) or not self._service.engine.is_alive
            self._send_error(ApiError(503 if unavailable else 500, "the server failed at this request", "server_error"))

    def _body(self) -> bytes:
        """Return the request's body. Raises ApiError for a missing, a wrong or too large a length."""
        limit, length = self._service.reader.limits.max_body_bytes, self.headers.get("Content-Length")
        if length is None:
            raise ApiError(411, "a Content-Length header is needed", "length_required")
        if not (length.isascii() and length.isdecimal() and len(length) < 16):
            raise ApiError(400, "Content-Length is not a number", "invalid_length")
        if int(length) > limit:
            raise ApiError(413, f"the body has more than {limit} bytes", "too_long")
        parts, missing, deadline = [], int(length), time.monotonic() + SOCKET_SECONDS
        while missing:
            part = self.rfile.read1(min(missing, 1 << 16))  # type: ignore[attr-defined]
            if not part or time.monotonic() > deadline:
                raise ConnectionError("the body did not arrive")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _complete(self) -> None:
        service, raw = self._service, self._body()
        with service.slots.take():
            prepared = service.reader.text(raw) if self.path == "/v1/completions" else service.reader.chat(raw)
            self._prepared = prepared
            self.response_generator: Any = RowGeneration(
                service.engine, prepared, lambda ids: service.models.row(prepared.model, ids), self.connection
            )
            # mlx-lm's handler reads the body once more, now with nothing in it that was not checked.
            clean = json.dumps(prepared.body).encode()
            self.rfile = io.BytesIO(clean)  # type: ignore[assignment]
            self.headers.replace_header("Content-Length", str(len(clean)))
            super().do_POST()

    def _route(self) -> None:
        service, raw = self._service, self._body()
        with service.slots.take():
            text = service.reader.route(raw)
            try:
                routed = service.engine.submit(lambda: route_text(service.run, text))
            except UserError as error:
                raise ApiError(400, str(error), "invalid_value", "text") from error
        gates = [[round(float(gate), 4) for gate in row] for row in routed.gates]
        self._send_json({
            "object": "route", "model": service.models.name, "names": routed.names, "tokens": routed.tokens,
            "experts": routed.experts, "gates": gates, "shares": routed.shares,
        })  # fmt: skip

    def _page(self) -> None:
        """Send the page, which says nothing of the run: it asks the API, with a key if one is needed."""
        content = web_page()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        for name, value in page_headers().items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _health(self) -> None:
        alive = self._service.engine.is_alive
        self._send_json({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)

    def _models(self) -> None:
        models = self._service.models
        data = [self._describe(name) for name in models.names]
        self._send_json({"object": "list", "data": data, "experts": models.experts})

    def _model(self) -> None:
        name = unquote(self.path.removeprefix("/v1/models/"))
        self._send_json(self._describe(self._service.models.find(name).name))

    def _describe(self, name: str) -> dict[str, Any]:
        models = self._service.models
        form = models.prompt_format(models.find(name), raw=False)
        kind = "chat" if form.is_chat else "text"
        return {"id": name, "object": "model", "created": self.created, "owned_by": "dylora", "format": kind}

    # Answers

    def _send_json(self, body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self._set_completion_headers(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_error(self, error: ApiError) -> None:
        """Send an error, as the last event of a stream that has begun."""
        self.close_connection = True
        try:
            if self._headers_sent:
                self.wfile.write(f"data: {json.dumps(error.body())}\n\n".encode())
                return
            self._headers_buffer: list[bytes] = []
            self.send_response(error.status)
            self.send_header("Content-Type", "application/json")
            content = json.dumps(error.body()).encode()
            for name, value in error.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except OSError:
            pass  # the client has left

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send what `http.server` finds wrong with a request, which is HTML there."""
        self.request_version = self.protocol_version  # an unreadable request counts as HTTP/0.9, which has no headers
        self._send_error(ApiError(int(code), message or "the request is not understood", "bad_request"))

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if status_code >= 400 and self._prepared is not None:
            # mlx-lm's handler is about to write an error of its own form.
            cause = sys.exc_info()[1]
            status = 503 if not self._service.engine.is_alive else 500 if status_code == 404 else status_code
            raise ApiError(
                status, f"the request failed ({cause})"[:300] if cause else "the request failed", "server_error"
            )
        super()._set_completion_headers(status_code)

    def _set_cors_headers(self) -> None:
        origin = self.headers.get("Origin")
        if origin in self._service.access.origins:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "GET, POST")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")
            self.send_header("Vary", "Origin")

    def end_headers(self) -> None:
        self._headers_sent = True
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def generate_response(self, text: str, finish_reason: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return mlx-lm's response, with log probabilities in OpenAI's form, and the gates of its tokens if they were asked for."""
        response = super().generate_response(text, finish_reason, *args, **kwargs)
        choice = response["choices"][0]
        if self._prepared is not None and self._prepared.routing:
            # A field that OpenAI does not have, so that only who asks for it gets it. In a stream it comes with the text of the
            # tokens; a second pass over the text (/v1/route) would come late, and see the tokens of the whole text anew.
            choice["routing"] = [self._shown_gates(gates) for gates in self.response_generator.take_gates()]
        if self._prepared is not None and self._prepared.top_logprobs is not None and kwargs.get("tokens"):
            logprobs, tops = kwargs.get("token_logprobs") or [], kwargs.get("top_tokens") or []
            choice["logprobs"] = self._logprobs(kwargs["tokens"], logprobs, tops, response["object"])
        return response

    def completion_usage_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return mlx-lm's last event of a stream, whose `object` is there that of a whole chat."""
        return {**super().completion_usage_response(*args, **kwargs), "object": self.object_type}

    def _shown_gates(self, gates: np.ndarray) -> dict[str, float]:
        """Return the gates of a token by expert, the largest first, without those that are 0."""
        names = self._service.models.experts
        return {names[i]: round(float(gates[i]), 4) for i in np.argsort(-gates, kind="stable") if gates[i] >= 5e-5}

    def _logprobs(self, ids: list[int], logprobs: list[float], tops: list[Any], kind: str) -> dict[str, Any]:
        decode = self._service.run.base.tokenizer.decode
        texts = [decode([token]) for token in ids]
        tops = [[(decode([top["id"]]), top["logprob"]) for top in tokens] for tokens in tops] or [[] for _ in ids]
        if kind == "text_completion":
            offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
            top_logprobs = [dict(top) for top in tops]
            return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": top_logprobs, "text_offset": offsets}

        def entry(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            {**entry(text, logprob), "top_logprobs": [entry(*one) for one in sorted(top, key=lambda item: -item[1])]}
            for text, logprob, top in zip(texts, logprobs, tops, strict=True)
        ]
        return {"content": content}

    def log_message(self, format: str, *args: Any) -> None:
        logging.info("%s %s", self.client_address[0], format % args)
