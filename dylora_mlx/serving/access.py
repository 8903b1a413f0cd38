"""Who may use the server, and how many requests at once."""

from __future__ import annotations

import hmac
import ipaddress
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dylora_mlx.serving.errors import ApiError


class Access(NamedTuple):
    """Who may use the server."""

    api_key: str | None
    """The key of every request; None for none."""
    hosts: frozenset[str]
    """Names in Host headers that mean this server, besides localhost and addresses."""
    origins: frozenset[str]
    """Origins of web pages that may use it, besides its own."""

    def check_client(self, host: str | None, origin: str | None) -> None:
        """Raise ApiError for a Host header that is not this server's, and for a web page of another origin."""
        host = (host or "").strip().lower()
        name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        if not (name == "localhost" or name in self.hosts or _is_address(name)):
            # A name that a web page made to point here (DNS rebinding) would make this server its own origin.
            message = f"the Host '{name[:80]}' is not this server's; add it with --allowed-hosts"
            raise ApiError(403, message, "forbidden_host")
        if origin is not None and origin not in self.origins and origin != f"http://{host}":
            raise ApiError(403, "web pages of other origins are not served; see --allowed-origins", "forbidden_origin")

    def check_key(self, authorization: str | None) -> None:
        """Raise ApiError for an Authorization header without the key."""
        if self.api_key is None:
            return
        if not hmac.compare_digest((authorization or "").encode(), f"Bearer {self.api_key}".encode()):
            message = "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class Slots:
    """Counts the requests at work. `limit` of them are accepted, the others refused."""

    def __init__(self, limit: int):
        self._limit, self._count, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a slot within the block. Raises ApiError if there is none."""
        with self._changed:
            if self._count >= self._limit:
                raise ApiError(429, "too many requests at once; try again soon", "busy", headers={"Retry-After": "1"})
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def wait_until_free(self, is_alive: Callable[[], bool]) -> None:
        """Wait until no request is at work, or nothing can finish them any more."""
        with self._changed:
            while self._count and is_alive():
                self._changed.wait(timeout=0.5)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
