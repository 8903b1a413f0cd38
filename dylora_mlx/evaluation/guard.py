"""Runs one untrusted program: limits, no network, no processes, no files but in its own folder. Started by `sandbox.py`.

    python -I -S guard.py PROGRAM CPU_SECONDS MEMORY_BYTES FILE_BYTES

The program runs in a thread of its own, so that no frame of it leads back here. What it must not do ends the process at
once, whatever it would have caught. Only a program that runs to its end gets the word from standard input written to
standard output.
"""

import contextlib
import os
import resource
import sys
import threading

FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill",
    "os.putenv", "os.unsetenv", "pty.spawn", "ctypes.", "signal.pthread_kill", "sys._current_frames", "gc.get_", "mmap.",
    "sys.addaudithook", "urllib.Request", "http.client", "ftplib.", "smtplib.", "telnetlib.", "webbrowser.", "syslog.",
    "code.__new__", "resource.setrlimit", "resource.prlimit", "cpython.run_",
)  # fmt: skip
"""Beginnings of audit events (PEP 578) that end the program."""
MODULES = {
    "ctypes",
    "_ctypes",
    "_posixsubprocess",
    "_multiprocessing",
    "_socket",
    "resource",
    "fcntl",
    "_testcapi",
    "readline",
}
"""That lead around the events, or to what they forbid."""
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
           "os.lchown", "os.lchmod", "os.utime", "os.setxattr", "os.removexattr", "os.chflags", "os.mkfifo", "os.mknod",
           "os.chdir", "os.chroot", "shutil.")  # fmt: skip
"""Events whose paths must lie in the program's folder."""
READABLE = ("/dev/urandom", "/dev/null", "/usr/share/zoneinfo", "/etc/localtime")


def limit(kind: int, value: int) -> None:
    """Where a system does not know a limit, the parent's watch over time and memory is what is left."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, value))


def fence(folder: str):
    """The audit hook: ends the process at anything forbidden."""
    end, real, join = os._exit, os.path.realpath, os.path.join
    readable = tuple(real(path) for path in {sys.prefix, sys.base_prefix, *sys.path[1:], folder} if path) + READABLE
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def within(path, places) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str):
            return isinstance(path, int) or path is None
        found = real(join(folder, path))
        return any(found == place or found.startswith(place.rstrip("/") + "/") for place in places)

    def hook(event: str, arguments) -> None:
        if event == "import":
            if arguments[0].partition(".")[0] in MODULES:
                end(70)
        elif event == "open":
            path, mode, flags = arguments
            changes = bool((flags or 0) & writing) or (isinstance(mode, str) and any(c in mode for c in "wax+"))
            if changes and not within(path, (folder,)):
                end(71)
            if not within(path, readable):
                raise PermissionError(f"{path}: outside of the program's folder")
        elif event.startswith(CHANGES):
            if not all(within(path, (folder,)) for path in arguments if isinstance(path, str | bytes)):
                end(72)
        elif event.startswith(FORBIDDEN):
            end(73)

    return hook


def main() -> None:
    path, seconds, memory, size = sys.argv[1], *map(int, sys.argv[2:5])
    word = sys.stdin.buffer.readline()
    with open(path, encoding="utf-8") as file:
        source = file.read()
    answer, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    limit(resource.RLIMIT_CPU, seconds)
    limit(resource.RLIMIT_AS, memory)
    limit(resource.RLIMIT_DATA, memory)
    limit(resource.RLIMIT_FSIZE, size)
    limit(resource.RLIMIT_NOFILE, 32)
    limit(resource.RLIMIT_CORE, 0)
    finished, begin = [], threading.Event()

    def run() -> None:
        begin.wait()
        names = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(source, "program.py", "exec"), names)
        finished.append(True)

    threading.stack_size(16 << 20)
    thread = threading.Thread(target=run, daemon=True)
    threading.excepthook = lambda _: None
    thread.start()
    # Only now: on Linux a thread counts as a process.
    limit(resource.RLIMIT_NPROC, 0)
    sys.addaudithook(fence(os.getcwd()))
    begin.set()
    thread.join()
    if finished:
        os.write(answer, word)
    os._exit(0 if finished else 1)


if __name__ == "__main__":
    main()
