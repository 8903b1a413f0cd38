"""Start, serve and stop: the engine of a run behind a port."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import ThreadingHTTPServer
from typing import Any, NamedTuple

from dylora_mlx.errors import Failure, UserError
from dylora_mlx.exporting import formats
from dylora_mlx.generation.decode import TokenRouted, check_has_caches
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.serving.access import Access, Slots
from dylora_mlx.serving.engine import BaseDraft, Engine, RunProvider
from dylora_mlx.serving.handler import RunHandler, Service
from dylora_mlx.serving.models import ServedModels
from dylora_mlx.serving.requests import Limits, RequestReader

IDLE_CONNECTIONS = 64
"""Connections besides those of accepted requests."""


class ServerSettings(NamedTuple):
    """Settings of a server. Those that mlx_lm.server has too have its names and defaults."""

    name: str
    """Name of the mixture in the API."""
    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes a free one."""
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    draft: bool = False
    """Whether the bare base drafts tokens. Requests are then served one after another."""
    num_draft_tokens: int = 3
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 512
    """Tokens to generate if a request does not say."""
    max_tokens_limit: int = 4096
    max_prompt_tokens: int = 1 << 20
    """The base's context is a limit too."""
    max_body_bytes: int = 1 << 22
    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    max_queue: int = 64
    """Accepted requests that wait for a row."""
    prefill_step_size: int = 2048
    prompt_cache_size: int = 10
    prompt_cache_bytes: int = 1 << 30


def engine_options(settings: ServerSettings) -> argparse.Namespace:
    """Return the options that mlx_lm.server's engine and handler read."""
    shared = {name: value for name, value in settings._asdict().items() if name not in ("host", "port", "api_key")}
    return argparse.Namespace(
        **shared, model=None, adapter_path=None, draft_model=None, pipeline=False, trust_remote_code=False,
        chat_template="", use_default_chat_template=False, chat_template_args={}, kv_bits=None, kv_group_size=64,
        quantized_kv_start=0,
    )  # fmt: skip


class RunServer(ThreadingHTTPServer):
    """Serves until `is_stopping` or the engine ends, then finishes the requests at work.

    Args:
        address: Host and port. Port 0 takes a free one.
        service: What it serves.
        is_stopping: Asked twice a second.
        max_connections: Connections at once; others are closed.

    Raises OSError if it cannot listen there.
    """

    def __init__(
        self, address: tuple[str, int], service: Service, is_stopping: Callable[[], bool], max_connections: int
    ):
        infos = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, bound = infos[0]
        self._service, self._is_stopping = service, is_stopping
        self._max_connections = max_connections
        self._open: set[socket.socket] = set()
        super().__init__(bound, lambda *args, **kwargs: RunHandler(service, *args, **kwargs))  # type: ignore[arg-type]

    # A daemon's thread that is still in MLX when the interpreter ends would abort the process.
    daemon_threads = False
    block_on_close = False

    def service_actions(self) -> None:
        if self._is_stopping() or not self._service.engine.is_alive:
            threading.Thread(target=self.shutdown, daemon=True).start()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        try:
            super().serve_forever(poll_interval)
        finally:
            self.server_close()
            self._service.slots.wait_until_free(lambda: self._service.engine.is_alive)
            for connection in list(self._open):  # of clients that have asked nothing
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= self._max_connections:
            logging.warning("more connections than allowed; one was closed")
            self.shutdown_request(request)
            return
        self._open.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a handler could not answer, in one line."""
        logging.info("%s: %s", client_address[0], sys.exc_info()[1])


def serve(
    run: OpenedRun, settings: ServerSettings, is_stopping: Callable[[], bool], announce: Callable[[str, int], None]
) -> None:
    """Serve a run until `is_stopping`, then finish the accepted requests.

    Args:
        run: The run.
        settings: Settings of the server.
        is_stopping: Asked twice a second.
        announce: Called with the host and the port once requests are accepted.

    Raises UserError for an address that cannot be used and a run that cannot be served, Failure if the engine ends.
    """
    check_has_caches(run.model, "it cannot be served")
    _check_address(settings)
    model = TokenRouted(run.model, formats.mixture_routing(run).routing)
    options, models = engine_options(settings), ServedModels(settings.name, run)
    limits = Limits(settings.max_body_bytes, settings.max_prompt_tokens, settings.max_tokens_limit)
    draft = BaseDraft(run.base.model) if settings.draft else None
    provider = RunProvider(options, model, run.base.tokenizer.wrapped, draft)
    engine = Engine(provider, settings.prompt_cache_bytes)
    try:
        access = Access(settings.api_key, frozenset(settings.allowed_hosts), frozenset(settings.allowed_origins))
        slots = Slots(settings.decode_concurrency + settings.max_queue)
        reader = RequestReader(run, models, limits, settings.max_tokens)
        service = Service(run, models, engine, reader, access, slots)
        connections = settings.decode_concurrency + settings.max_queue + IDLE_CONNECTIONS
        try:
            server = RunServer((settings.host, settings.port), service, is_stopping, connections)
        except OSError as error:
            raise _address_error(settings, error) from error
        announce(settings.host, server.server_address[1])
        server.serve_forever()
        if not engine.is_alive:
            raise Failure("the engine has ended; its error is above")
    finally:
        engine.stop_and_join()


def _check_address(settings: ServerSettings) -> None:
    """Raise UserError for an address that is taken, before the engine starts."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _address_error(settings, error) from error


def _address_error(settings: ServerSettings, error: OSError) -> UserError:
    if isinstance(error, socket.gaierror):
        return UserError(f"--host {settings.host}: no such host ({error.strerror})")
    return UserError(f"{settings.host} port {settings.port}: {error.strerror}; choose another with --host or --port")
