"""Run one untrusted program with limits: no network, no processes, no files outside its folder. Started by
`sandbox.py`.

    python -I -S guard.py PROGRAM CPU_SECONDS MEMORY_BYTES FILE_BYTES

The program runs in a thread of its own, so that none of its frames leads back to this module. A forbidden operation
ends the process at once, so the program cannot catch it. The guard reads a token from standard input, and writes it to
standard output only if the program runs to its end.
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
"""Prefixes of the audit events (PEP 578) that end the program."""
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
"""Modules whose import ends the program: they bypass the audit events or do what these forbid."""
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
           "os.lchown", "os.lchmod", "os.utime", "os.setxattr", "os.removexattr", "os.chflags", "os.mkfifo", "os.mknod",
           "os.chdir", "os.chroot", "shutil.")  # fmt: skip
"""Prefixes of the audit events whose paths must lie in the program's folder."""
READABLE = ("/dev/urandom", "/dev/null", "/usr/share/zoneinfo", "/etc/localtime")
"""Paths that a program may read besides its folder and the Python installation."""


def limit(kind: int, value: int) -> None:
    """Set a resource limit. If the system does not know it, the parent's watch over time and memory remains."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, value))


def fence(folder: str):
    """Return the audit hook that ends the process on anything forbidden. `folder` is the program's folder."""
    exit_process, realpath, join = os._exit, os.path.realpath, os.path.join
    readable = tuple(realpath(path) for path in {sys.prefix, sys.base_prefix, *sys.path[1:], folder} if path) + READABLE
    write_flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def within(path, roots) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str):
            return isinstance(path, int) or path is None
        resolved = realpath(join(folder, path))
        return any(resolved == root or resolved.startswith(root.rstrip("/") + "/") for root in roots)

    def hook(event: str, arguments) -> None:
        if event == "import":
            if arguments[0].partition(".")[0] in MODULES:
                exit_process(70)
        elif event == "open":
            path, mode, flags = arguments
            changes = bool((flags or 0) & write_flags) or (isinstance(mode, str) and any(c in mode for c in "wax+"))
            if changes and not within(path, (folder,)):
                exit_process(71)
            if not within(path, readable):
                raise PermissionError(f"{path}: outside of the program's folder")
        elif event.startswith(CHANGES):
            if not all(within(path, (folder,)) for path in arguments if isinstance(path, str | bytes)):
                exit_process(72)
        elif event.startswith(FORBIDDEN):
            exit_process(73)

    return hook


def main() -> None:
    path, seconds, memory, file_size = sys.argv[1], *map(int, sys.argv[2:5])
    token = sys.stdin.buffer.readline()
    with open(path, encoding="utf-8") as file:
        source = file.read()
    # Keep the parent's pipe under another descriptor; the program itself gets /dev/null.
    stdout, devnull = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(devnull, number)
    limit(resource.RLIMIT_CPU, seconds)
    limit(resource.RLIMIT_AS, memory)
    limit(resource.RLIMIT_DATA, memory)
    limit(resource.RLIMIT_FSIZE, file_size)
    limit(resource.RLIMIT_NOFILE, 32)
    limit(resource.RLIMIT_CORE, 0)
    finished, may_start = [], threading.Event()

    def run() -> None:
        may_start.wait()
        names = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(source, "program.py", "exec"), names)
        finished.append(True)

    threading.stack_size(16 << 20)
    thread = threading.Thread(target=run, daemon=True)
    threading.excepthook = lambda _: None
    thread.start()
    # Set after the thread has started: on Linux a thread counts as a process.
    limit(resource.RLIMIT_NPROC, 0)
    # The hook comes last, because it forbids resource.setrlimit as well.
    sys.addaudithook(fence(os.getcwd()))
    may_start.set()
    thread.join()
    if finished:
        os.write(stdout, token)
    os._exit(0 if finished else 1)


if __name__ == "__main__":
    main()
