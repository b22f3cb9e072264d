"""Frame embeddings on disk: find a clip's file, read it, and trust nothing that is written in it.

A clip's frames were embedded once by a vision encoder and stored as one array, [rows, D], or [rows, I, D] when a
frame is I vectors. Three formats are read, and the ending of the name says which:

    .npy            memory-mapped: only the rows that are used are ever read
    .safetensors    one tensor, or the one named "embeddings"
    .pkl            what ``pickle.dump(array, file)`` wrote; the format in which embeddings are mostly passed around

A pickle is a program for a small stack machine, two of whose instructions call whatever function the file names.
Loading a stranger's pickle is running a stranger's code, and an allow-list of functions handed to ``pickle.Unpickler``
still runs that machine: it calls the allowed functions with arguments of the file's choosing, and reaches setters,
``__setstate__`` methods and memory through them. So the machine is not run here. Three steps replace it:

    1. `_replay` walks the instructions and *writes down* what the file asks for: a tree made only of numbers, strings,
       bytes, tuples and `Call` notes. Nothing is imported, called, or allocated on the word of the file. An
       instruction or a function name that no numpy array needs ends the walk; so does instruction MAX_OPCODES.
    2. `_array_of` compares that tree with the only two forms in which numpy has ever pickled a plain array.
    3. The array is a view of bytes that were in the file, after their number was compared with shape times width.

To verify the claim, read `GLOBALS`, the ``match`` in `_replay` and the ``match`` in `_array_of`: there is no path from
a pickle to any function but ``str.encode`` and ``numpy.frombuffer`` (``pickletools`` only decodes numbers and text).
Memory stays within a few times the file's size.

Convert a directory of pickles once, and never open one again:

    python -m prospect.embeddings convert DIR OUT [--format safetensors|npy]

Sources: the opcodes are documented in the ``pickletools`` module of Python's standard library and PEP 307, 3154 and
574 (protocols 2, 4, 5); the two array forms are numpy's ``ndarray.__reduce__`` and ``ndarray.__reduce_ex__``; the
.npy format is numpy's NEP 1.
"""

import argparse
import enum
import math
import os
import pickle
import pickletools
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from prospect.errors import ProspectError, run_entry_point
from prospect.files import written_whole

ENDINGS = (".pkl", ".npy", ".safetensors")  # in the order in which they are looked for
SAFETENSORS_DTYPES = ("F16", "BF16", "F32", "F64")
MAX_OPCODES = 200  # the longest pickle of a plain array has 70 instructions (protocol 0 with many PUTs)
RESAVE = "save it again as one float16 or float32 array [rows, D] with numpy.save or safetensors"


class Name(enum.Enum):
    """The things a numpy array's pickle may name. They are only ever compared, never called."""

    RECONSTRUCT = enum.auto()
    FROMBUFFER = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    ENCODE = enum.auto()


# Keys are "module name" with one space. A dotted name (an attribute chain) has no entry, nor has anything else.
GLOBALS = {
    "numpy.core.multiarray _reconstruct": Name.RECONSTRUCT,  # numpy 1
    "numpy._core.multiarray _reconstruct": Name.RECONSTRUCT,  # numpy 2
    "numpy.core.numeric _frombuffer": Name.FROMBUFFER,  # protocol 5, numpy 1
    "numpy._core.numeric _frombuffer": Name.FROMBUFFER,  # protocol 5, numpy 2
    "numpy ndarray": Name.NDARRAY,
    "numpy dtype": Name.DTYPE,
    "_codecs encode": Name.ENCODE,  # protocols 0 to 2 have no bytes: they hold text and ask for text.encode("latin1")
}


@dataclass(eq=False)
class Call:
    """A note that the file wants `function(*arguments)` called, and `state` put into what comes back."""

    function: Name
    arguments: tuple
    state: tuple | None = None


# ---- Finding a clip's file -----------------------------------------------------------------------


def find_embeddings(clip_id: str, folder: Path, named: str | None, *, allow_outside: bool = False) -> Path:
    """The embedding file of a clip.

    `named` is the clip's own ``embeddings`` field, relative to `folder`; without it the first that exists of
    ``{clip_id}_embeddings`` and ``{clip_id}`` with the endings .pkl, .npy and .safetensors is taken. Wherever ``..``,
    an absolute path or a symbolic link leads, the file has to lie inside `folder`, unless `allow_outside`.

    Raises ProspectError when the file lies outside or there is none (every path tried is named).
    """
    where = f"clip {clip_id!r}"
    if named is None:
        if not clip_id or any(character in clip_id for character in "/\\\0"):  # a separator would make the id a path
            raise ProspectError(
                "the clip's id cannot be part of a file name",
                where=where,
                remedy="give the clip an `embeddings` field, or an id without / and \\",
            )
        tried = [folder / f"{clip_id}{middle}{ending}" for middle in ("_embeddings", "") for ending in ENDINGS]
    else:
        tried = [folder / named]

    try:
        found = next((path for path in tried if path.exists()), None)
        inside = found is None or found.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # too long, no permission; a NUL byte; a loop of links
        raise ProspectError(
            f"cannot look for embeddings at {str(tried[0])!r}: {error}",
            where=where,
            remedy="check the id, the `embeddings` field and the permissions of the directory",
        ) from None
    if found is None and named is not None and not allow_outside:
        # A path that leads outside is refused for that reason even where nothing lies there.
        inside = Path(os.path.abspath(tried[0])).is_relative_to(os.path.abspath(folder))
    if not inside and not allow_outside:
        raise ProspectError(
            f"embeddings {str(found or tried[0])!r} lie outside the directory {str(folder)!r}",
            where=where,
            remedy="move the file inside, or set data.embeddings_outside=true in the config if you trust the clip file",
        )
    if found is None:
        raise ProspectError(
            f"no embeddings at {', '.join(str(path) for path in tried)}",
            where=where,
            remedy="put the file there, or set data.embeddings to the directory that holds it",
        )
    return found


# ---- Reading -------------------------------------------------------------------------------------


def read_embeddings(path: Path) -> np.ndarray:
    """The array of an embedding file, [rows, D] or [rows, I, D], read-only, float16 or float32 in native byte order.

    .npy and .safetensors stay on disk until rows are used, as long as they need no conversion: float64 and, in
    safetensors, bfloat16 become float32. Each array that stays on disk keeps its file open.
    Raises ProspectError, and nothing else, whatever the bytes of the file are.
    """
    path = Path(path)
    with _refusing(path):
        if path.suffix == ".npy":
            array = _map_npy(path)
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                name, dtype, _ = _checked_header(file, path)
                tensor = file.get_tensor(name)  # through torch, because numpy has no bfloat16
            array = (tensor.float() if dtype == "BF16" else tensor).numpy()
        else:
            array = _read_pickle(path)
        if array.dtype.itemsize == 8:
            with np.errstate(over="raise"):  # a finite float64 must not turn into infinity on the way
                array = array.astype(np.float32)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        array.flags.writeable = False
        return array


def embeddings_shape(path: Path) -> tuple[int, ...]:
    """The shape of an embedding file, (rows, D) or (rows, I, D); only a pickle has to be read whole for it.

    Raises ProspectError, and nothing else, whatever the bytes of the file are.
    """
    path = Path(path)
    with _refusing(path):
        if path.suffix == ".npy":
            return _map_npy(path).shape
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return _checked_header(file, path)[2]
        return _read_pickle(path).shape


def check_finite(array: np.ndarray, where: str) -> None:
    """Raise ProspectError, with the counts and the first bad row, when the array holds NaN or infinity."""
    finite = np.isfinite(array)  # [rows, ..., D]
    if finite.all():
        return
    nan = int(np.isnan(array).sum())
    infinite = finite.size - int(finite.sum()) - nan
    bad_rows = np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))
    raise ProspectError(
        f"{nan} NaN and {infinite} infinite values in {len(bad_rows)} of {len(array)} rows, first in row {bad_rows[0]}",
        where=where,
        remedy="embed these frames again; float16 overflows above 65504",
    )


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Open only a regular file of a known format, and turn every failure inside into a ProspectError on `path`."""
    try:
        if path.suffix not in ENDINGS:
            raise _refusal(path, f"no known format of embeddings ends in {path.suffix!r}", f"use {', '.join(ENDINGS)}")
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block for ever, /dev/zero never end
            raise _refusal(path, "is not a regular file", "name the embedding file itself")
        if path.stat().st_size == 0:
            raise _refusal(path, "the file is empty", "copy or compute it again")
        yield
    except ProspectError:
        raise
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise _refusal(path, what, "check that it exists and may be read") from None
    except MemoryError:
        raise _refusal(path, "does not fit into memory", "convert it to .npy, which is read row by row") from None
    except FloatingPointError:
        raise _refusal(path, "holds numbers too large for float32", "check how the embeddings were computed") from None
    except Exception as error:
        # Here two libraries parse bytes that anyone may have written (numpy's header alone raises ValueError,
        # TypeError, SyntaxError and TokenError); whichever way they fail, the file is bad and the user is told so.
        what = f"broken {path.suffix} file: {str(error)[:200]!r}"
        raise _refusal(path, what, f"copy it again, or {RESAVE}") from None


def _refusal(path: Path, what: str, remedy: str = RESAVE) -> ProspectError:
    return ProspectError(what, where=str(path), remedy=remedy)


def _check_shape(shape: tuple[int, ...], path: Path) -> None:
    if len(shape) not in (2, 3):
        raise _refusal(path, f"has shape {list(shape)[:8]}, wanted [rows, D] or [rows, I, D]")
    if 0 in shape:
        raise _refusal(path, f"has shape {list(shape)}: there is nothing in it", "compute the embeddings again")


def _map_npy(path: Path) -> np.ndarray:
    """A .npy file as a read-only memory map; its header must account for every byte of the file."""
    with np.errstate(over="ignore"):  # numpy warns when the sizes of a lying header overflow, and then refuses it
        array = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects and headers that claim too much
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise _refusal(path, f"has dtype {str(array.dtype)[:80]}, wanted float16 or float32")
    _check_shape(array.shape, path)
    size = path.stat().st_size
    if array.offset + array.nbytes != size:
        raise _refusal(path, f"the header accounts for {array.offset + array.nbytes} bytes, the file has {size}")
    return array


def _checked_header(file: safetensors.safe_open, path: Path) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and shape of the tensor that holds the embeddings, all from the header, the last two checked."""
    names = sorted(file.keys())
    if len(names) != 1 and "embeddings" not in names:
        raise _refusal(
            path,
            f"holds {len(names)} tensors ({', '.join(map(repr, names[:5]))[:200]}), none named 'embeddings'",
            "leave one tensor in the file, or name the right one 'embeddings'",
        )
    name = names[0] if len(names) == 1 else "embeddings"
    header = file.get_slice(name)
    dtype, shape = header.get_dtype(), tuple(header.get_shape())
    if dtype not in SAFETENSORS_DTYPES:
        raise _refusal(path, f"has dtype {dtype}, wanted one of {', '.join(SAFETENSORS_DTYPES)}")
    _check_shape(shape, path)
    return name, dtype, shape


# ---- Pickles -------------------------------------------------------------------------------------


def _read_pickle(path: Path) -> np.ndarray:
    """The array that a pickle describes, in the file's own byte order and float width."""
    data = path.read_bytes()
    try:
        array = _array_of(_replay(data, path), path)
    except (ValueError, LookupError) as error:  # truncated, unknown opcode, stack or memo too small, bad text
        raise _refusal(path, f"broken pickle: {str(error)[:200]!r}", f"copy it again, or {RESAVE}") from None
    _check_shape(array.shape, path)
    return array


def _replay(data: bytes, path: Path) -> object:
    """Walk the pickle and return the tree it describes, without calling, importing or building any of it.

    Only instructions that appear in the pickle of a numpy array are known. Lists, dicts and sets, persistent ids,
    extension codes, class instances (NEWOBJ, INST, OBJ) and out-of-band buffers are not among them.
    """
    stack: list[object] = []
    memo: dict[int, object] = {}
    mark = object()  # MARK puts it on the stack; TUPLE takes everything above it
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        if count == MAX_OPCODES:
            raise _refusal(path, f"more than {MAX_OPCODES} pickle instructions; one numpy array needs about 70")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(mark)
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "INT" | "BININT" | "BININT1" | "BININT2":
                stack.append(argument)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack.append(tuple([stack.pop() for _ in range(size)][::-1]))
            case "TUPLE":
                items = []
                while (item := stack.pop()) is not mark:
                    items.append(item)
                stack.append(tuple(items[::-1]))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_allowed_name(argument, path))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not (isinstance(module, str) and isinstance(name, str)):
                    raise _refusal(path, "names a function by something that is not text")
                stack.append(_allowed_name(f"{module} {name}", path))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not (isinstance(function, Name) and isinstance(arguments, tuple)):
                    raise _refusal(path, "calls something that is not a function of numpy's")
                stack.append(Call(function, arguments))
            case "BUILD":
                state = stack.pop()
                call = stack[-1]
                if not (isinstance(call, Call) and call.state is None and isinstance(state, tuple)):
                    raise _refusal(path, "sets the state of something that is not a new numpy object")
                call.state = state
            case "STOP":
                if position + 1 != len(data):
                    raise _refusal(path, f"{len(data) - position - 1} bytes follow the end of the pickle")
                if len(stack) != 1:
                    raise _refusal(path, f"the pickle ends with {len(stack)} objects, wanted 1")
                return stack[0]
            case other:
                raise _refusal(path, f"pickle instruction {other} at byte {position}: not a plain numpy array")
    raise AssertionError("genops ends with STOP or raises ValueError")


def _allowed_name(name: str, path: Path) -> Name:
    if name not in GLOBALS:
        raise _refusal(
            path,
            f"the pickle names {name[:80]!r}, which no plain numpy array needs; nothing was run",
            f"do not load this file with pickle unless you trust its author; ask for a .npy file, or {RESAVE}",
        )
    return GLOBALS[name]


def _array_of(tree: object, path: Path) -> np.ndarray:
    """The array that the tree of `_replay` stands for, when it has one of numpy's two forms; else ProspectError.

    form 1, protocols 0 to 5              form 2, protocol 5, contiguous arrays
    _reconstruct(ndarray, (0,), b"b")     _frombuffer(data, dtype, shape, "C" or "F")
    with state                            _frombuffer(data, dtype, shape, "K", axes)
    (1, shape, dtype, is_fortran, data)   K: stored as a C array of that shape whose axes are then permuted
    """
    axes = None
    match tree:
        case Call(
            Name.RECONSTRUCT, (Name.NDARRAY, (0,), typecode), (1, tuple(shape), Call() as dtype, int(is_fortran), data)
        ) if _bytes_of(typecode) == b"b":
            order = "F" if is_fortran else "C"
        case Call(Name.FROMBUFFER, (data, Call() as dtype, tuple(shape), ("C" | "F") as order), None):
            pass
        case Call(Name.FROMBUFFER, (data, Call() as dtype, tuple(shape), "K", tuple(axes)), None):
            order = "C"
        case _:
            raise _refusal(path, "the pickle does not hold exactly one plain numpy array")

    match dtype:
        # "f4", align, copy; and the state: version, byte order, no sub-array, no field names, no fields, no flags
        case Call(
            Name.DTYPE,
            (("f2" | "f4" | "f8") as code, int(), int()),
            (3, ("<" | ">") as endian, None, None, None, -1, -1, 0),
        ):
            data_type = np.dtype(endian + code)
        case Call(Name.DTYPE, (str(code), *_)):
            raise _refusal(path, f"has dtype {code[:20]!r}, wanted float16 ('f2') or float32 ('f4')")
        case _:
            raise _refusal(path, "has a dtype that is not a plain number")

    buffer = _bytes_of(data)
    if buffer is None:
        raise _refusal(path, "the array's values are not plain bytes")
    if len(shape) > 3 or any(type(extent) is not int or not 0 <= extent <= sys.maxsize for extent in shape):
        raise _refusal(path, "its shape is none that embeddings have, wanted [rows, D] or [rows, I, D]")
    claimed = math.prod(shape) * data_type.itemsize
    if claimed != len(buffer):
        raise _refusal(path, f"shape {list(shape)} takes {claimed} bytes, the file has {len(buffer)}", "copy it again")
    array = np.frombuffer(buffer, data_type).reshape(shape, order=order)
    if axes is not None:
        if any(type(axis) is not int for axis in axes) or sorted(axes) != list(range(len(shape))):
            raise _refusal(path, "the order of the axes is not a permutation")
        array = array.transpose(axes)
    return array


def _bytes_of(data: object) -> bytes | bytearray | None:
    """Bytes as they are, or as protocols 0 to 2 spell them: a call of encode(text, "latin1"). None: not bytes."""
    match data:
        case bytes() | bytearray():
            return data
        case Call(Name.ENCODE, (str(text), "latin1"), None):
            return text.encode("latin1")  # UnicodeEncodeError is a ValueError: a broken pickle
    return None


# ---- Writing, and converting a directory once ----------------------------------------------------


def write_embeddings(rows: np.ndarray, path: Path) -> None:
    """`rows` as .npy, .pkl or .safetensors, after the ending of `path`, whole or not at all; folders are made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "name another directory"
        raise ProspectError(f"cannot be made: {error.strerror}", where=str(path.parent), remedy=remedy) from None
    with written_whole(path) as file:
        if path.suffix == ".npy":
            np.save(file, rows, allow_pickle=False)
        elif path.suffix == ".safetensors":
            file.write(safetensors.numpy.save({"embeddings": np.ascontiguousarray(rows)}))
        else:
            # As plain array: the memory map's class is no business of whoever reads the pickle.
            pickle.dump(np.array(rows), file)


def convert(directory: Path, out: Path, file_format: str) -> int:
    """Write every .pkl of `directory` to `out` as `file_format`; broken files are reported on stderr and left out.

    A file appears whole or not at all, so that an interrupted conversion is simply run again. Returns the exit
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
    parser = argparse.ArgumentParser(prog="python -m prospect.embeddings", description="Convert embeddings once.")
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("directory", type=Path, help="directory of .pkl files, one array each")
    parser.add_argument("out", type=Path, help="directory for the converted files, made if missing")
    parser.add_argument("--format", choices=["safetensors", "npy"], default="safetensors", dest="file_format")
    arguments = parser.parse_args()
    return convert(arguments.directory, arguments.out, arguments.file_format)


if __name__ == "__main__":
    run_entry_point(main)
