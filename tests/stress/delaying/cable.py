"""A virtual cable between two network namespaces, with a given delay and bandwidth.

Each end is a TUN device. A thread of this process copies packets from one to the other, each after the delay. TCP then sees a
slow network, as with tc's netem, which many kernels lack. Needs Linux, root and iproute2.
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
"""Maximum size of a packet in bytes, as on Ethernet."""
TUNSETIFF, TUN, BARE = 0x400454CA, 0x0001, 0x1000
"""Constants of Linux: the ioctl that creates a TUN device, and its flags IFF_TUN and IFF_NO_PI (no extra header)."""


def check() -> None:
    """Raise UserError if this machine cannot create a cable."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise UserError("network namespaces need Linux and root; run it there, with sudo")
    if shutil.which("ip") is None:
        raise UserError("ip: not installed; on Debian: apt-get install iproute2")
    if not os.path.exists("/dev/net/tun"):
        raise UserError("/dev/net/tun: this kernel has no TUN devices; run it on another machine")


@contextmanager
def joined(delay: float, rate: float | None) -> Iterator[list[str]]:
    """Create two namespaces connected by a cable, and yield their names. Removes them afterwards.

    The ends of the cable have ADDRESSES.

    Args:
        delay: seconds each way.
        rate: bytes per second each way; None for no limit.
    """
    names, ends = [f"dylora-{os.getpid()}-{end}" for end in range(2)], []
    stop = threading.Event()
    try:
        for end, name in enumerate(names):
            _run(f"ip netns add {name}")
            ends.append(_create_device(f"dy{os.getpid()}-{end}", name, ADDRESSES[end]))
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


def _create_device(device: str, namespace: str, address: str) -> int:
    """Create a TUN device in a namespace and bring it up. Returns the file descriptor of its packets."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", device.encode(), TUN | BARE))
    _run(f"ip link set {device} netns {namespace}")
    _run(f"ip -n {namespace} addr add {address}/24 dev {device}")
    _run(f"ip -n {namespace} link set {device} mtu {MTU} txqueuelen 10000 up")
    _run(f"ip -n {namespace} link set lo up")
    return descriptor


def _carry(ends: list[int], delay: float, rate: float | None, stop: threading.Event) -> None:
    """Copy packets from each end to the other when they are due, until `stop` is set."""
    queues: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    free = [0.0, 0.0]  # time at which each direction has sent its last packet, at the given rate
    while not stop.is_set():
        due = min((queue[0][0] for queue in queues if queue), default=time.perf_counter() + 0.1)
        ready, _, _ = select.select(ends, [], [], max(0.0, due - time.perf_counter()))
        now = time.perf_counter()
        for end in (ends.index(descriptor) for descriptor in ready):
            packet = os.read(ends[end], MTU + 64)
            free[end] = max(free[end], now) + (len(packet) / rate if rate else 0.0)
            queues[end].append((free[end] + delay, packet))
        for end, queue in enumerate(queues):
            while queue and queue[0][0] <= time.perf_counter():
                os.write(ends[1 - end], queue.popleft()[1])


def _run(command: str) -> None:
    result = subprocess.run(command.split(), capture_output=True, text=True)
    if result.returncode:
        raise Failure(
            f"{command}: {result.stderr.strip() or 'failed'}; run it on a machine where you may create network namespaces"
        )
