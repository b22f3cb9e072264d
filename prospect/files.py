"""Files that are written whole or not at all, and lines read back from them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from prospect.errors import ProspectError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes into, which takes `path`'s place when the block ends.

    A reader sees the old file, or none, or the whole new one. A block that raises leaves nothing behind. Raises
    ProspectError where the disk refuses.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with open(aside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        remedy = "check the directory and the free space"
        raise ProspectError(f"cannot be written: {error.strerror}", where=str(path), remedy=remedy) from None


def read_lines(path: Path) -> list[str]:
    """The lines of a JSONL file. Only a line feed ends one: JSON may hold U+2028, at which str.splitlines would cut.

    Raises OSError and UnicodeDecodeError, as Path.read_text does.
    """
    text = path.read_text(encoding="utf-8").removesuffix("\n")
    return text.split("\n") if text else []
