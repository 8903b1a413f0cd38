"""A cable between two network namespaces: whatever goes in at one end comes out at the other after a delay, at a rate.

Each end is a TUN device, whose packets a thread of this process carries over. So TCP sees a slow network, as with tc's netem,
which many kernels lack. Linux, as root, with iproute2.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from dylora_mlx.errors import Failure, UserError

ADDRESSES = ("10.213.77.1", "10.213.77.2")
MTU = 1500
"""Bytes of a packet at most, as on Ethernet."""
TUNSETIFF, TUN, BARE = 0x400454CA, 0x0001, 0x1000
"""Linux's request to make a device: of packets, without a header of its own."""


def check() -> None:
    """Raises UserError where no cable can be made."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise UserError("network namespaces need Linux and root; run it there, with sudo")
    if shutil.which("ip") is None:
        raise UserError("ip: not installed; on Debian: apt-get install iproute2")
    if not os.path.exists("/dev/net/tun"):
        raise UserError("/dev/net/tun: this kernel has no TUN devices; run it on another machine")


@contextmanager
def joined(delay: float, rate: float | None) -> Iterator[list[str]]:
    """The names of two namespaces joined by a cable, which has ADDRESSES at its ends. delay: seconds each way; rate: bytes a
    second each way, None for no limit. All is gone afterwards."""
    names, ends = [f"dylora-{os.getpid()}-{end}" for end in range(2)], []
    stop = threading.Event()
    try:
        for end, name in enumerate(names):
            _do(f"ip netns add {name}")
            ends.append(_device(f"dy{os.getpid()}-{end}", name, ADDRESSES[end]))
        carrier = threading.Thread(target=_carry, args=(ends, delay, rate, stop), daemon=True)
        carrier.start()
        yield names
        stop.set()
        carrier.join()
    finally:
        stop.set()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for end in ends:
            os.close(end)


def _device(device: str, name: str, address: str) -> int:
    """A TUN device in a namespace, up; the descriptor of its packets."""
    found = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(found, TUNSETIFF, struct.pack("16sH", device.encode(), TUN | BARE))
    _do(f"ip link set {device} netns {name}")
    _do(f"ip -n {name} addr add {address}/24 dev {device}")
    _do(f"ip -n {name} link set {device} mtu {MTU} txqueuelen 10000 up")
    _do(f"ip -n {name} link set lo up")
    return found


def _carry(ends: list[int], delay: float, rate: float | None, stop: threading.Event) -> None:
    """Take packets from either end to the other, each when it is due."""
    waiting: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    free = [0.0, 0.0]  # when the cable has room for the next packet
    while not stop.is_set():
        due = min((queue[0][0] for queue in waiting if queue), default=time.perf_counter() + 0.1)
        ready, _, _ = select.select(ends, [], [], max(0.0, due - time.perf_counter()))
        now = time.perf_counter()
        for end in (ends.index(found) for found in ready):
            packet = os.read(ends[end], MTU + 64)
            free[end] = max(free[end], now) + (len(packet) / rate if rate else 0.0)
            waiting[end].append((free[end] + delay, packet))
        for end, queue in enumerate(waiting):
            while queue and queue[0][0] <= time.perf_counter():
                os.write(ends[1 - end], queue.popleft()[1])


def _do(words: str) -> None:
    ran = subprocess.run(words.split(), capture_output=True, text=True)
    if ran.returncode:
        raise Failure(f"{words}: {ran.stderr.strip() or 'failed'}; run it on a machine that may make namespaces")
