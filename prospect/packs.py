"""Packs: the embedding files of a folder in a few large ones, for file systems that many small files bring to a halt.

    OUT/pack.index        where each file lies: an array of (name, part, offset, size), sorted by name
    OUT/pack-00000.bin    files as they were, one behind another, each beginning at a multiple of 64 bytes

A pack stands for its folder: a file that is not in the folder by itself is looked for in the pack under the same name.
So nothing changes in a clip file, whose `embeddings` and ids name what they named before; `data.embeddings` names OUT.
Index and parts are memory-mapped (their pages are shared by all processes of a machine), and no file is kept open.
"""

import bisect
import functools
import io
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prospect.errors import ProspectError
from prospect.files import write_whole

INDEX, PART = "pack.index", "pack-{:05d}.bin"
PART_SIZE = 1 << 32  # bytes from which on the next file goes to another part
ALIGNED = 64  # bytes: as numpy aligns the data behind the header of a .npy file
PACKED = (".npy", ".safetensors", ".json")  # endings; .json: what made an embedding file, written beside it by encode


@dataclass(frozen=True)
class Stretch:
    """The bytes of a file: `size` of them in `file` from `offset` on. Of a file by itself, all."""

    file: Path
    offset: int
    size: int
    packed: bool = True


# ---- finding and reading -------------------------------------------------------------------------


def locate(path: Path) -> Stretch:
    """Where a file is: by itself, or in the pack of one of the folders above it. Raises OSError where it is nowhere."""
    try:
        return Stretch(path, 0, path.stat().st_size, packed=False)
    except (FileNotFoundError, NotADirectoryError):
        name = path.name
        for folder in path.parents:
            if found := in_pack(folder, name):
                return found
            name = f"{folder.name}/{name}"
        raise


def in_pack(folder: Path, name: str) -> Stretch | None:
    """A file of the folder's pack; None where the folder has no pack, or the pack no such file."""
    try:
        index = _index(folder, (folder / INDEX).stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return None
    wanted = name.encode("utf-8", "surrogateescape")
    names = index["name"]
    at = bisect.bisect_left(names, wanted)
    if at == len(names) or names[at] != wanted:
        return None
    _, part, offset, size = index[at].item()
    return Stretch(folder / PART.format(part), offset, size)


@functools.lru_cache(maxsize=8)
def _index(folder: Path, changed: int) -> np.ndarray:
    """The index of a folder's pack, memory-mapped. changed: when, so that another one is read anew."""
    path = folder / INDEX
    try:
        index = np.lib.format.open_memmap(path, mode="r")
        if (
            index.dtype.names != ("name", "part", "offset", "size")
            or index.ndim != 1
            or index.dtype["name"].kind != "S"
        ):
            raise ValueError(f"it holds {index.dtype}")
        return index
    except (OSError, ValueError, SyntaxError) as error:  # numpy parses a header that anyone may have written
        what = f"is not the index of a pack: {str(error)[:200]}"
        raise ProspectError(what, where=str(path), remedy="pack the folder again") from None


def read_bytes(path: Path) -> bytes:
    """A file's content, by itself or in a pack."""
    stretch = locate(path)
    with open(stretch.file, "rb") as file:
        file.seek(stretch.offset)
        return file.read(stretch.size)


def stamp(path: Path) -> tuple[int, ...]:
    """What changes whenever a file does: its size; times (of content, of anything), inode and place of what holds it.

    Nobody can set the second time, so a file that was rewritten with its size and time restored is another, too. A file
    system whose inodes do not last (some of those in user space) makes every file another after each mount, which costs
    a check and never lets an old one stand for a new one.
    """
    stretch = locate(path)
    found = os.stat(stretch.file)
    return (stretch.size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, stretch.offset)


def map_npy(stretch: Stretch) -> np.ndarray:
    """A .npy file as a read-only memory map. Raises ValueError for a header that claims too much, and for objects."""
    with open(stretch.file, "rb", buffering=0) as file:
        file.seek(stretch.offset)
        try:
            shape, by_column, dtype, length = _header(file.read(128))  # all of it, as numpy writes it
        except ValueError:
            file.seek(stretch.offset)
            shape, by_column, dtype, length = _header(file.read(min(stretch.size, 1 << 14)))
        begin, size = stretch.offset + length, dtype.itemsize * math.prod(shape)
        if dtype.hasobject or length + size > stretch.size:
            raise ValueError("the header claims more than the file holds")
        return np.memmap(file, dtype, "r", begin, shape, "F" if by_column else "C")


@functools.lru_cache(maxsize=1024)  # numpy takes as long to read a header as the rows behind it, and many are the same
def _header(beginning: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, type and length in bytes of a .npy file's header. Raises ValueError where it is not all there."""
    file = io.BytesIO(beginning)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format")
    return *read(file), file.tell()


# ---- packing and unpacking -----------------------------------------------------------------------


def pack(folder: Path, out: Path) -> str:
    """Pack the embedding files of a folder and its subfolders into `out`; what was done, in words.

    Raises ProspectError where there is nothing to pack, a pickle (which cannot be read in part), or something in `out`.
    """
    if not folder.is_dir():
        raise ProspectError("is not a directory", where=str(folder), remedy="name the directory of embedding files")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if pickles := [path for path in paths if path.suffix == ".pkl"]:
        remedy = f"python -m prospect.embeddings convert {folder} NEW, and pack that"
        raise ProspectError(f"{len(pickles)} pickles, which cannot be packed", where=str(pickles[0]), remedy=remedy)
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.suffix in PACKED}
    if not any(not name.endswith(".json") for name in names):
        raise ProspectError("there is no .npy or .safetensors file", where=str(folder), remedy="name another directory")
    _begin(out)
    rows, todo = [], list(names.items())
    bar = tqdm(total=len(todo), desc="pack", unit="file", disable=None)
    for part in range(len(todo)):
        if len(rows) == len(todo):
            break
        with write_whole(out / PART.format(part)) as file:
            while len(rows) < len(todo) and file.tell() < PART_SIZE:
                name, path = todo[len(rows)]
                file.write(bytes(-file.tell() % ALIGNED))
                begin = file.tell()
                with open(path, "rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
                rows.append((name.encode("utf-8", "surrogateescape"), part, begin, file.tell() - begin))
                bar.update()
    bar.close()
    width = max(len(row[0]) for row in rows)
    index = np.array(sorted(rows), [("name", f"S{width}"), ("part", "<u4"), ("offset", "<u8"), ("size", "<u8")])
    with write_whole(out / INDEX) as file:  # last: without it there is no pack
        np.save(file, index, allow_pickle=False)
    return f"packed {len(rows)} files, {sum(row[3] for row in rows) / 1e9:.2f} GB, into {rows[-1][1] + 1} in {out}"


def unpack(folder: Path, out: Path) -> str:
    """Write the files of a pack into `out` as they were, byte for byte; what was done, in words."""
    names = list(packed_names(folder))
    if not names:
        raise ProspectError(f"is not a pack (no {INDEX})", where=str(folder), remedy="name the directory of a pack")
    _begin(out)
    for name in tqdm(names, desc="unpack", unit="file", disable=None):
        path = out / name
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(out)):
            raise ProspectError(f"names a file outside: {name!r}", where=str(folder / INDEX), remedy="do not unpack it")
        stretch = in_pack(folder, name)
        with open(stretch.file, "rb") as source, write_whole(path) as file:
            source.seek(stretch.offset)
            left = stretch.size
            while block := source.read(min(left, 1 << 20)):
                file.write(block)
                left -= len(block)
        if left:
            raise ProspectError("is shorter than the index says", where=str(stretch.file), remedy="copy the pack again")
    return f"unpacked {len(names)} files into {out}"


def packed_names(folder: Path) -> Iterator[str]:
    """The names of the files in a folder's pack, sorted; none where it has no pack."""
    if (folder / INDEX).exists():
        for row in _index(folder, (folder / INDEX).stat().st_mtime_ns):
            yield row["name"].decode("utf-8", "surrogateescape")


def _begin(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ProspectError("exists and is not an empty directory", where=str(out), remedy="name a new one")
