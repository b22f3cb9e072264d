"""Every change that a process makes to a folder on the disk: written down, refused, or made its last.

    listener = trap()                    in the process to be watched, which hands the descriptor to another
    watch(listener, folder, pid, ...)    in that other one: one line for each change, until the process ends

The kernel stops the process at the entry of each such system call and asks (seccomp's user notification, Linux 5.5 and
later). So nothing escapes, whichever library writes: Python, safetensors in Rust, torch. A change is what makes, fills,
names, links or removes a file or directory, or waits until one is on the disk. Whoever opens to read changes nothing.
"""

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import struct
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)

# Of every call: its number on x86-64 and on arm64, and where among its arguments the (last) path stands: the descriptor
# it starts from, and its text; None: there is none.
CALLS = {
    "open": (2, None, None, 0), "openat": (257, 56, 0, 1), "creat": (85, None, None, 0), "write": (1, 64, 0, None),
    "pwrite64": (18, 68, 0, None), "writev": (20, 66, 0, None), "pwritev": (296, 70, 0, None),
    "pwritev2": (328, 287, 0, None), "sendfile": (40, 71, 0, None), "copy_file_range": (326, 285, 2, None),
    "truncate": (76, 45, None, 0), "ftruncate": (77, 46, 0, None), "fallocate": (285, 47, 0, None),
    "fsync": (74, 82, 0, None), "fdatasync": (75, 83, 0, None), "rename": (82, None, None, 1),
    "renameat": (264, 38, 2, 3), "renameat2": (316, 276, 2, 3), "link": (86, None, None, 1), "linkat": (265, 37, 2, 3),
    "symlink": (88, None, None, 1), "symlinkat": (266, 36, 1, 2), "unlink": (87, None, None, 0),
    "unlinkat": (263, 35, 0, 1), "rmdir": (84, None, None, 0), "mkdir": (83, None, None, 0),
    "mkdirat": (258, 34, 0, 1), "chmod": (90, None, None, 0), "fchmod": (91, 52, 0, None), "fchmodat": (268, 53, 0, 1),
}  # fmt: skip
TAKES_NO_ROOM = {"unlink", "unlinkat", "rmdir", "rename", "renameat", "renameat2", "fsync", "fdatasync", "chmod"}

MACHINE = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
NAMES = {} if MACHINE is None else {call[MACHINE]: name for name, call in CALLS.items() if call[MACHINE] is not None}
SECCOMP, ARCHITECTURE = ((317, 0xC000003E), (277, 0xC00000B7))[MACHINE or 0]
NEW_LISTENER, RECEIVE, SEND, LET_PASS = 8, 0xC0502100, 0xC0182101, 1
NO_NEW_PRIVILEGES = 38


# ---- in the watched process ----------------------------------------------------------------------


def trap() -> int:
    """From now on this thread, and those it starts, stop at every change. Returns the descriptor to listen on."""
    load, equal, give_back = 0x20, 0x15, 0x06
    allow, notify = 0x7FFF0000, 0x7FC00000
    numbers = sorted(NAMES)
    filters = [(load, 0, 0, 4), (equal, 0, len(numbers) + 1, ARCHITECTURE), (load, 0, 0, 0)]  # 4, 0: offsets
    filters += [(equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    filters += [(give_back, 0, 0, allow), (give_back, 0, 0, notify)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *filter) for filter in filters))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(filters), ctypes.addressof(code)))
    LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    listener = LIBC.syscall(SECCOMP, 1, NEW_LISTENER, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "no seccomp notification")
    return listener


def can_trap() -> bool:
    """Whether this kernel lets a process be watched so: some containers forbid it. Tried in a process of its own."""
    if MACHINE is None or platform.system() != "Linux":
        return False
    child = os.fork()
    if child == 0:
        try:
            trap()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- in the watching process ---------------------------------------------------------------------


def watch(
    listener: int, folder: Path, pid: int, attacked: int | str | None = None, error: int | None = None
) -> list[str]:
    """Let the changes within `folder` happen until the process `pid` has ended, and return them, one line each.

    attacked: the change, its number from 0 or its line, at which the process is killed; or with `error` (an errno),
    which is refused, as is from then on everything that takes room. Changes elsewhere are let pass and not counted.
    """
    changes: list[str] = []
    reached = False
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while any(events & select.POLLIN for _, events in poll.poll()):  # else nobody is left who could ask
        notice = bytearray(80)
        try:
            fcntl.ioctl(listener, RECEIVE, notice)
            ticket, thread, _, number, _, _, *arguments = struct.unpack("=QIIiIQ6Q", notice)
            name, path = NAMES[number], path_of(thread, NAMES[number], arguments)
            refused = 0
            if path is not None and path.is_relative_to(folder):
                line = f"{name} {path.relative_to(folder)}"
                now = not reached and attacked in (len(changes), line)
                reached = reached or now
                changes.append(line)
                if now and error is None:
                    os.kill(pid, signal.SIGKILL)
                    continue
                if now or (reached and name not in TAKES_NO_ROOM):
                    refused = error
            answer = struct.pack("=QqiI", ticket, 0, -refused, 0 if refused else LET_PASS)
            fcntl.ioctl(listener, SEND, answer)
        except OSError as gone:
            if gone.errno not in (errno.ENOENT, errno.ESRCH):  # the process has been killed meanwhile
                raise
    return changes


def path_of(thread: int, name: str, arguments: list[int]) -> Path | None:
    """What a call changes; None where it only opens a file to read."""
    if name in ("open", "openat"):
        flags = arguments[1 if name == "open" else 2]
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return None
    _, _, start, text = CALLS[name]
    begin = "cwd"
    if start is not None and (descriptor := ctypes.c_int32(arguments[start]).value) >= 0:
        begin = f"fd/{descriptor}"  # else AT_FDCWD
    folder = Path(os.readlink(f"/proc/{thread}/{begin}"))
    return folder if text is None else Path(os.path.normpath(folder / text_at(thread, arguments[text])))


def text_at(thread: int, address: int) -> str:
    """The text that ends with a zero byte in another process's memory."""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return os.fsdecode(memory.read(4096 - address % 4096 + 4096).split(b"\0")[0])
