"""Files that are written completely or not at all, and how text and JSON are read back from them.

A file or directory that is still being written has a hidden name of its own, `.NAME...` with the ending `WRITING`, and
gets its real name when it is complete and on the disk. A name without that ending is never a half-written file.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prospect.errors import ProspectError

WRITING = ".writing"


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Writing into `path`: what the operating system refuses (no room, no permission) is a ProspectError."""
    try:
        yield
    except BrokenPipeError:  # whoever read what we print has left: no failure, see run_entry_point
        raise
    except OSError as error:
        what, remedy = f"cannot be written: {error.strerror}", "check the directory and the free space"
        raise ProspectError(what, where=str(path), remedy=remedy) from None


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes into, which replaces `path` when the block ends.

    A reader sees the old file, or none, or the complete new one, also after a crash. A block that raises leaves nothing
    behind. Raises ProspectError when the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{WRITING}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            to_disk(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with write_whole(path) as file:
        file.write(text.encode())


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def to_disk(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tree_to_disk(folder: Path) -> None:
    """`to_disk` for a directory and everything in it, before it gets the name of a complete one."""
    for path in [*folder.rglob("*"), folder]:
        to_disk(path)


def read_lines(path: Path) -> list[str]:
    """The lines of a JSONL file. Only a line feed ends one: JSON may hold U+2028, at which str.splitlines would cut.

    Raises OSError and UnicodeDecodeError, as Path.read_text does.
    """
    text = path.read_text(encoding="utf-8").removesuffix("\n")
    return text.split("\n") if text else []


def read_json(path: Path, *, if_missing: str = "name the directory that holds it") -> dict[str, Any]:
    """The object in a JSON file. Raises ProspectError; if_missing: the remedy where there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        remedy = f"no {path.name}: {if_missing}" if absent else "check that it is a file you may read"
        raise ProspectError(f"cannot be read: {error.strerror}", where=str(path), remedy=remedy) from None
    except (ValueError, RecursionError) as error:
        what = f"cannot be read: it is not JSON ({error})"
        raise ProspectError(what, where=str(path), remedy="copy the file again") from None
    if not isinstance(values, dict):
        raise ProspectError("is not a JSON object", where=str(path), remedy="copy the file again")
    return values
