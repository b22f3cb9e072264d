"""Frame embeddings on disk: find a clip's file, read it, and trust nothing that is written in it.

A clip's frames were embedded once by a vision encoder and stored as one array, [rows, D], or [rows, I, D] when a
frame is I vectors. Three formats are read, chosen by the ending of the name:

    .npy            memory-mapped: only the rows that are used are ever read
    .safetensors    one tensor, or the one named "embeddings"
    .pkl            what ``pickle.dump(array, file)`` wrote, without running it as a program (prospect/pickles.py)

Convert a directory of pickles once, and never open one again:

    python -m prospect.embeddings convert DIR OUT [--format safetensors|npy]

and tens of thousands of files can be packed into a few (prospect/packs.py), and unpacked:

    python -m prospect.embeddings pack DIR OUT
    python -m prospect.embeddings unpack OUT DIR

The .npy format is numpy's NEP 1.
"""

import argparse
import os
import pickle
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from prospect.errors import ProspectError, run_entry_point
from prospect.files import write_whole
from prospect.packs import Stretch, in_pack, locate, map_npy, pack, read_bytes, unpack
from prospect.pickles import RESAVE, read_pickle, refusal

ENDINGS = (".pkl", ".npy", ".safetensors")  # in the order in which they are looked for
SAFETENSORS_DTYPES = ("F16", "BF16", "F32", "F64")


# ---- finding a clip's file -----------------------------------------------------------------------


def embedding_names(clip_id: str, named: str | None, video_uid: str | None = None) -> list[str]:
    """The names that a clip's embedding file may have, relative to the folder, in the order in which they are tried.

    `named` is the clip's own ``embeddings`` field; without it the names are ``{clip_id}_embeddings`` and ``{clip_id}``
    with the endings .pkl, .npy and .safetensors, and then the same of its video, where `video_uid` is given.
    Raises ProspectError for an id that cannot be part of a file name.
    """
    if named is not None:
        return [named]
    # A separator would make the id a path.
    owners = [of for of in dict.fromkeys((clip_id, video_uid)) if of and not any(mark in of for mark in "/\\\0")]
    if clip_id not in owners:
        remedy = "give the clip an `embeddings` field, or an id without / and \\"
        raise ProspectError("the clip's id cannot be part of a file name", where=f"clip {clip_id!r}", remedy=remedy)
    return [f"{of}{middle}{ending}" for of in owners for middle in ("_embeddings", "") for ending in ENDINGS]


def find_embeddings(
    clip_id: str, folder: Path, named: str | None, video_uid: str | None = None, *, allow_outside: bool = False
) -> Path:
    """The embedding file of a clip, or of its video.

    The first of `embedding_names` that exists in `folder`, or in its pack, is taken. Wherever ``..``, an absolute path
    or a symbolic link leads, the file must be inside `folder`, unless `allow_outside`.

    Raises ProspectError when the file is outside or there is none (every path tried is named).
    """
    where = f"clip {clip_id!r}"
    names = embedding_names(clip_id, named, video_uid)
    first = folder / names[0]
    try:
        found = next((path for n in names if (path := folder / n).exists() or in_pack(folder, n)), None)
        # The default names have no folder in them: then only a link could lead outside.
        inside = found is None or (named is None and not found.is_symlink())
        inside = inside or found.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # too long, no permission; a NUL byte; a loop of links
        what = f"cannot look for embeddings at {str(first)!r}: {error}"
        remedy = "check the id, the `embeddings` field and the permissions of the directory"
        raise ProspectError(what, where=where, remedy=remedy) from None
    if found is None and named is not None and not allow_outside:
        # A path that leads outside is refused for that reason even where no file exists.
        inside = Path(os.path.abspath(first)).is_relative_to(os.path.abspath(folder))
    if not inside and not allow_outside:
        what = f"embeddings {str(found or first)!r} lie outside the directory {str(folder)!r}"
        remedy = "move the file inside, or set data.embeddings_outside=true in the config if you trust the clip file"
        raise ProspectError(what, where=where, remedy=remedy)
    if found is None:
        remedy = "put the file there, or set data.embeddings to the directory that holds it"
        raise ProspectError(f"no embeddings at {', '.join(str(folder / n) for n in names)}", where=where, remedy=remedy)
    return found


# ---- reading -------------------------------------------------------------------------------------


def read_embeddings(path: Path) -> np.ndarray:
    """The array of an embedding file, [rows, D] or [rows, I, D], read-only, float16 or float32 in native byte order.

    .npy and .safetensors stay on disk until rows are used, as long as they need no conversion: float64 and, in
    safetensors, bfloat16 become float32. Each array that stays on disk keeps its file open.
    Raises ProspectError, and nothing else, whatever the bytes of the file are.
    """
    path = Path(path)
    with _refusing(path) as stretch:
        if path.suffix == ".npy":
            array = _map_npy(path, stretch)
        elif path.suffix == ".safetensors" and stretch.packed:
            tensors = dict(safetensors.deserialize(read_bytes(path)))
            name, dtype = _checked_header({n: (of["dtype"], tuple(of["shape"])) for n, of in tensors.items()}, path)
            array = _from_bytes(tensors[name]["data"], dtype).reshape(tensors[name]["shape"])
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                headers = {name: file.get_slice(name) for name in file.keys()}
                shapes = {name: (header.get_dtype(), tuple(header.get_shape())) for name, header in headers.items()}
                name, dtype = _checked_header(shapes, path)
                tensor = file.get_tensor(name)  # through torch, because numpy has no bfloat16
            array = (tensor.float() if dtype == "BF16" else tensor).numpy()
        else:
            array = read_pickle(path)
            _check_shape(array.shape, path)
        if array.dtype.itemsize == 8:
            with np.errstate(over="raise"):  # a finite float64 must not turn into infinity on the way
                array = array.astype(np.float32)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        array.flags.writeable = False
        return array


def check_finite(array: np.ndarray, where: str) -> None:
    """Raise ProspectError, with the counts and the first bad row, when the array holds NaN or infinity."""
    finite = np.isfinite(array)  # [rows, ..., D]
    if finite.all():
        return
    nan = int(np.isnan(array).sum())
    infinite = finite.size - int(finite.sum()) - nan
    bad_rows = np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))
    share = f"{len(bad_rows)} of {len(array)} rows"
    what = f"{nan} NaN and {infinite} infinite values in {share}, first in row {bad_rows[0]}"
    raise ProspectError(what, where=where, remedy="embed these frames again; float16 overflows above 65504")


@contextmanager
def _refusing(path: Path) -> Iterator[Stretch]:
    """Where a file's bytes are, if it is a regular one of a known format. A failure inside becomes a ProspectError."""
    try:
        if path.suffix not in ENDINGS:
            raise refusal(path, f"no known format of embeddings ends in {path.suffix!r}", f"use {', '.join(ENDINGS)}")
        stretch = locate(path)
        file = stretch.file.stat()
        if not stat.S_ISREG(file.st_mode):  # a pipe would block for ever, /dev/zero would never end
            raise refusal(path, "is not a regular file", "name the embedding file itself")
        if stretch.size == 0:
            raise refusal(path, "the file is empty", "copy or compute it again")
        if stretch.offset + stretch.size > file.st_size:
            raise refusal(path, f"{stretch.file.name} is shorter than its index says", "copy the pack again")
        yield stretch
    except ProspectError:
        raise
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise refusal(path, what, "check that it exists and may be read") from None
    except MemoryError:
        raise refusal(path, "does not fit into memory", "convert it to .npy, which is read row by row") from None
    except FloatingPointError:
        raise refusal(path, "holds numbers too large for float32", "check how the embeddings were computed") from None
    except Exception as error:
        # Here two libraries parse bytes that anyone may have written (numpy's header alone raises ValueError,
        # TypeError, SyntaxError and TokenError); whichever way they fail, the file is bad, and that is reported.
        what = f"broken {path.suffix} file: {str(error)[:200]!r}"
        raise refusal(path, what, f"copy it again, or {RESAVE}") from None


def _check_shape(shape: tuple[int, ...], path: Path) -> None:
    if len(shape) not in (2, 3):
        raise refusal(path, f"has shape {list(shape)[:8]}, wanted [rows, D] or [rows, I, D]")
    if 0 in shape:
        raise refusal(path, f"has shape {list(shape)}: there is nothing in it", "compute the embeddings again")


def _map_npy(path: Path, stretch: Stretch) -> np.ndarray:
    """A .npy file as a read-only memory map; its header must account for every byte of the file."""
    array = map_npy(stretch)  # refuses pickled objects and headers that claim too much
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise refusal(path, f"has dtype {str(array.dtype)[:80]}, wanted float16 or float32")
    _check_shape(array.shape, path)
    accounted = array.offset + array.nbytes - stretch.offset
    if accounted != stretch.size:
        raise refusal(path, f"the header accounts for {accounted} bytes, the file has {stretch.size}")
    return array


def _from_bytes(data: bytes, dtype: str) -> np.ndarray:
    """The numbers of a tensor in safetensors. bfloat16 is the upper half of float32, which it becomes."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])


def _checked_header(tensors: dict[str, tuple[str, tuple[int, ...]]], path: Path) -> tuple[str, str]:
    """Name and dtype of the tensor that holds the embeddings, checked. tensors: a file's, by name (dtype, shape)."""
    names = sorted(tensors)
    if len(names) != 1 and "embeddings" not in names:
        what = f"holds {len(names)} tensors ({', '.join(map(repr, names[:5]))[:200]}), none named 'embeddings'"
        raise refusal(path, what, "leave one tensor in the file, or name the right one 'embeddings'")
    name = names[0] if len(names) == 1 else "embeddings"
    dtype, shape = tensors[name]
    if dtype not in SAFETENSORS_DTYPES:
        raise refusal(path, f"has dtype {dtype}, wanted one of {', '.join(SAFETENSORS_DTYPES)}")
    _check_shape(shape, path)
    return name, dtype


# ---- writing, and converting a directory once ----------------------------------------------------


def write_embeddings(rows: np.ndarray, path: Path) -> None:
    """Write `rows` as .npy, .pkl or .safetensors, by `path`'s ending, completely or not at all; folders are created."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "name another directory"
        raise ProspectError(f"cannot be created: {error.strerror}", where=str(path.parent), remedy=remedy) from None
    with write_whole(path) as file:
        if path.suffix == ".npy":
            np.save(file, rows, allow_pickle=False)
        elif path.suffix == ".safetensors":
            file.write(safetensors.numpy.save({"embeddings": np.ascontiguousarray(rows)}))
        else:
            # As a plain array, so that the pickle does not name the class of a memory map.
            pickle.dump(np.array(rows), file)


def convert(directory: Path, out: Path, file_format: str) -> int:
    """Write every .pkl of `directory` to `out` as `file_format`; broken files are reported on stderr and left out.

    A file appears complete or not at all, so an interrupted conversion can simply be run again. Returns the exit
    status: 2 if any file was broken, else 0. Raises ProspectError when nothing can be read or written at all.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".pkl")
    except OSError as error:
        what = f"cannot be listed: {error.strerror}"
        raise ProspectError(what, where=str(directory), remedy="name a directory") from None
    if not paths:
        raise ProspectError("there is no .pkl file", where=str(directory), remedy="name the directory that holds them")

    broken = 0
    for path in tqdm(paths, desc="convert", unit="file", disable=None):
        try:
            array = np.ascontiguousarray(read_embeddings(path))
            check_finite(array, str(path))
        except ProspectError as error:
            broken += 1
            tqdm.write(f"broken: {error}", file=sys.stderr)
            continue
        write_embeddings(array, out / f"{path.stem}.{file_format}")
    print(f"converted {len(paths) - broken} of {len(paths)} files to {out}; {broken} broken")
    return 2 if broken else 0


def main() -> int:
    description = "Convert pickled embeddings, pack a folder of embeddings into a few large files, or unpack it."
    parser = argparse.ArgumentParser(prog="python -m prospect.embeddings", description=description)
    parser.add_argument("command", choices=["convert", "pack", "unpack"])
    parser.add_argument("directory", type=Path, help="directory of .pkl files, of files to be packed, or of a pack")
    parser.add_argument("out", type=Path, help="directory for what is written, created if missing")
    what = "of converted files"
    parser.add_argument(
        "--format", choices=["safetensors", "npy"], default="safetensors", dest="file_format", help=what
    )
    arguments = parser.parse_args()
    if arguments.command == "convert":
        return convert(arguments.directory, arguments.out, arguments.file_format)
    print((pack if arguments.command == "pack" else unpack)(arguments.directory, arguments.out))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
