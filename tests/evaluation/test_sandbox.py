"""The sandbox: permitted programs pass, failing ones are reported, and hostile ones are stopped without harm."""

from __future__ import annotations

import pytest

from dylora_mlx.evaluation.sandbox import SandboxLimits, run_program

LIMITS = SandboxLimits(seconds=30.0, memory=256 << 20)
GOOD = {
    "arithmetic": "assert sum(range(5)) == 10",
    "standard library": "import math, re, heapq, random, datetime, json, decimal, copy\nrandom.random(); datetime.datetime.now()",
    "a file of its own": "open('a', 'w').write('x')\nassert open('a').read() == 'x'\nimport os; os.remove('a')",
}
FAILED = {
    "a wrong answer": "assert 1 + 1 == 3",
    "no Python": "def (",
    "leaving early": "import sys; sys.exit(0)",
    "leaving early, unseen": "import os; os._exit(0)",
    "a huge allocation": "x = 'a' * 10**10",
    "growing without end": "x = []\nwhile True: x.append(' ' * 10**7)",
    "recursion": "def f(n): return f(n + 1)\nf(0)",
    "a huge file": "f = open('a', 'wb')\nfor _ in range(100): f.write(b'x' * 10**6)",
    "reading elsewhere": "open('/etc/passwd').read()",
    "reading input": "input()",
}
FORBIDDEN = {
    "forking": "import os\nwhile True: os.fork()",
    "forking, caught": "import os\ntry: os.fork()\nexcept BaseException: pass",
    "a subprocess": "import subprocess; subprocess.run(['ls'])",
    "a shell": "import os; os.system('touch VICTIM.owned')",
    "processes": "import multiprocessing as m\nm.Process(target=print).start()",
    "a socket": "import socket; socket.create_connection(('127.0.0.1', 80))",
    "a request, caught": "try:\n import urllib.request; urllib.request.urlopen('http://127.0.0.1')\nexcept BaseException: pass",
    "foreign functions": "import ctypes",
    "deleting": "import os; os.remove('VICTIM')",
    "deleting by another way": "import pathlib; pathlib.Path('VICTIM').unlink()",
    "deleting a folder": "import shutil, os; shutil.rmtree(os.path.dirname('VICTIM'), ignore_errors=True)",
    "writing over": "open('VICTIM', 'w').write('x')",
    "opening to write": "import os; os.open('VICTIM', os.O_WRONLY)",
    "renaming": "import os; os.rename('VICTIM', 'VICTIM.2')",
    "a link out, then writing": "import os; os.symlink('VICTIM', 'link'); open('link', 'w').write('x')",
    "killing": "import os; os.kill(os.getppid(), 9)",
    "raising its limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_program_passes(name):
    assert run_program(GOOD[name], LIMITS).passed


@pytest.mark.parametrize("name", FAILED)
def test_a_bad_program_fails(name):
    result = run_program(FAILED[name], LIMITS)
    assert not result.passed
    assert result.why in ("failed", "memory")


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_hostile_program_is_stopped_and_harms_nothing(name, tmp_path):
    victim = tmp_path / "home" / "victim"
    victim.parent.mkdir()
    victim.write_text("alive")
    result = run_program(FORBIDDEN[name].replace("VICTIM", str(victim)), LIMITS)
    assert not result.passed
    assert result.why == "forbidden"
    assert victim.read_text() == "alive"
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_the_time_limit_stops_a_program(program):
    assert run_program(program, SandboxLimits(seconds=1.0)) == (False, "time")


def test_many_threads_are_refused_without_waiting():
    program = "import threading, time\nfor _ in range(10000): threading.Thread(target=time.sleep, args=(60,)).start()"
    assert not run_program(program, LIMITS).passed
