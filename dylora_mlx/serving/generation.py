"""One request's way through the engine: as a row of the batch, up to a stop string or until the client leaves."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from mlx_lm.server import ModelDescription

from dylora_mlx.errors import Failure
from dylora_mlx.generation.stream import StopStrings
from dylora_mlx.serving.engine import Engine, RowRequest
from dylora_mlx.serving.gate_trace import GateTrace
from dylora_mlx.serving.models import Row
from dylora_mlx.serving.requests import Prepared

SOCKET_SECONDS = 60.0
"""Seconds that a client may be silent, or read nothing, before it is given up; also for a whole request to arrive."""
MODEL = ModelDescription("run", "default_model", None)  # type: ignore[arg-type]
"""What every request's model is to the engine, so that all share one batch."""


class RowGeneration:
    """The engine as the handler of one request sees it.

    Args:
        engine: The engine.
        prepared: The request.
        find_row: Returns how the tokens of a prompt are computed.
        connection: The client's socket.
    """

    def __init__(
        self, engine: Engine, prepared: Prepared, find_row: Callable[[list[int]], Row], connection: socket.socket
    ):
        self._engine, self._prepared, self._find_row, self._connection = engine, prepared, find_row, connection
        self._trace = GateTrace(len(prepared.ids) - 1) if prepared.routing else None
        self._known: list[np.ndarray] = []
        self._count = self._held = 0

    @property
    def cli_args(self) -> Any:
        return self._engine.cli_args

    def generate(self, request: Any, args: Any, progress_callback: Any = None) -> tuple[Any, Iterator[Any]]:
        """Return mlx-lm's context of a generation, and its responses as they come. Raises Failure if the engine has ended."""
        if not self._engine.is_alive:
            raise Failure("the engine has ended")
        row_request = RowRequest("text", "", [], None, None, self._prepared.ids, self._row)
        args = replace(args, model=MODEL, stop_words=self._prepared.markers)

        def progress(*counts: int) -> None:
            self._check_client()
            if progress_callback is not None and self._prepared.body["stream"]:
                progress_callback(*counts)  # sends a comment, which keeps the connection alive

        context, responses = self._engine.generate(row_request, args, progress)
        return context, self._cut(responses)

    def take_gates(self) -> list[np.ndarray]:
        """Return the gates [E] of the tokens that were yielded since the last call, if the request asks for them."""
        count = len(self._known) - self._held
        taken, self._known = self._known[:count], self._known[count:]
        return taken

    def _row(self, ids: list[int]) -> Row:
        return self._find_row(ids)._replace(trace=self._trace)

    def _receive(self, responses: Iterator[Any]) -> Iterator[Any]:
        """Yield the responses, with the gates of each token taken before, while the client is there."""
        for response in responses:
            self._check_client()
            if self._trace is not None:
                self._known.append(self._trace.take(self._count))
            self._count += 1
            yield response

    def _cut(self, responses: Iterator[Any]) -> Iterator[Any]:
        """Yield the responses up to the first stop string, wherever the tokens are divided.

        mlx-lm itself stops only where the tokens are those of the stop string alone.
        """
        if not self._prepared.stops:
            yield from self._receive(responses)
            return
        # One response waits: the handler drops the text of one that stops, so what precedes a stop string goes before it.
        stopper, waiting = StopStrings(self._prepared.stops), None
        for response in self._receive(responses):
            text = stopper.push(response.text)
            if stopper.stopped:
                response = replace(response, finish_reason="stop")
            elif response.finish_reason is not None:
                text += stopper.rest()
            if response.finish_reason == "stop":
                if waiting is not None or text:
                    last = waiting or replace(response, text="", finish_reason=None)
                    yield replace(last, text=last.text + text)
                yield replace(response, text="")
                return
            if waiting is not None:
                self._held = int(self._trace is not None)  # the gates of the response that waits next
                yield waiting
                self._held = 0
            waiting = replace(response, text=text)
        if waiting is not None:
            yield waiting

    def _check_client(self) -> None:
        """Raise ConnectionError if the client has closed its connection."""
        self._connection.setblocking(False)
        try:
            if not self._connection.recv(1, socket.MSG_PEEK):
                raise ConnectionError("the client has left")
        except BlockingIOError:
            pass
        finally:
            self._connection.settimeout(SOCKET_SECONDS)
