"""A numpy array out of a pickle, without running the pickle.

A pickle is a program for a small stack machine, two of whose instructions call whatever function the file names.
Loading a stranger's pickle is running a stranger's code, and an allow-list of functions handed to ``pickle.Unpickler``
still runs that machine: it calls the allowed functions with arguments of the file's choosing, and reaches setters,
``__setstate__`` methods and memory through them. So the machine is not run here. Three steps replace it:

    1. `_replay` walks the instructions and *writes down* what the file asks for: a tree made only of numbers, strings,
       bytes, tuples and `Call` notes. Nothing is imported, called, or allocated because the file asks for it. An
       instruction or a function name that no numpy array needs ends the walk; so does instruction MAX_OPCODES.
    2. `_array_of` compares that tree with the only two forms in which numpy has ever pickled a plain array.
    3. The array is a view of bytes that were in the file, after their number was compared with shape times width.

To verify the claim, read `GLOBALS`, the ``match`` in `_replay` and the ``match`` in `_array_of`: there is no path from
a pickle to any function but ``str.encode`` and ``numpy.frombuffer`` (``pickletools`` only decodes numbers and text).
Memory stays within a few times the file's size.

Sources: the opcodes are documented in the ``pickletools`` module of Python's standard library and PEP 307, 3154 and
574 (protocols 2, 4, 5); the two array forms are numpy's ``ndarray.__reduce__`` and ``ndarray.__reduce_ex__``.
"""

import enum
import math
import pickletools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prospect.errors import ProspectError

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
    """A note that the file wants `function(*arguments)` called, and `state` set on the result."""

    function: Name
    arguments: tuple
    state: tuple | None = None


def read_pickle(path: Path) -> np.ndarray:
    """The array that a pickle describes, in the file's own byte order and float width, of any shape up to three axes.

    Raises ProspectError for any other pickle, OSError where the file cannot be read.
    """
    data = path.read_bytes()
    try:
        return _array_of(_replay(data, path), path)
    except (ValueError, LookupError) as error:  # truncated, unknown opcode, stack or memo too small, bad text
        raise refusal(path, f"broken pickle: {str(error)[:200]!r}", f"copy it again, or {RESAVE}") from None


def refusal(path: Path, what: str, remedy: str = RESAVE) -> ProspectError:
    return ProspectError(what, where=str(path), remedy=remedy)


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
            raise refusal(path, f"more than {MAX_OPCODES} pickle instructions; one numpy array needs about 70")
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
                    raise refusal(path, "names a function by something that is not text")
                stack.append(_allowed_name(f"{module} {name}", path))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not (isinstance(function, Name) and isinstance(arguments, tuple)):
                    raise refusal(path, "calls something that is not a numpy function")
                stack.append(Call(function, arguments))
            case "BUILD":
                state = stack.pop()
                call = stack[-1]
                if not (isinstance(call, Call) and call.state is None and isinstance(state, tuple)):
                    raise refusal(path, "sets the state of something that is not a new numpy object")
                call.state = state
            case "STOP":
                if position + 1 != len(data):
                    raise refusal(path, f"{len(data) - position - 1} bytes follow the end of the pickle")
                if len(stack) != 1:
                    raise refusal(path, f"the pickle ends with {len(stack)} objects, wanted 1")
                return stack[0]
            case other:
                raise refusal(path, f"pickle instruction {other} at byte {position}: not a plain numpy array")
    raise AssertionError("genops ends with STOP or raises ValueError")


def _allowed_name(name: str, path: Path) -> Name:
    if name not in GLOBALS:
        what = f"the pickle names {name[:80]!r}, which no plain numpy array needs; nothing was run"
        remedy = f"do not load this file with pickle unless you trust its author; ask for a .npy file, or {RESAVE}"
        raise refusal(path, what, remedy)
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
            raise refusal(path, "the pickle does not hold exactly one plain numpy array")

    match dtype:
        # "f4", align, copy; and the state: version, byte order, no sub-array, no field names, no fields, no flags
        case Call(
            Name.DTYPE,
            (("f2" | "f4" | "f8") as code, int(), int()),
            (3, ("<" | ">") as endian, None, None, None, -1, -1, 0),
        ):
            data_type = np.dtype(endian + code)
        case Call(Name.DTYPE, (str(code), *_)):
            raise refusal(path, f"has dtype {code[:20]!r}, wanted float16 ('f2') or float32 ('f4')")
        case _:
            raise refusal(path, "has a dtype that is not a plain number")

    buffer = _bytes_of(data)
    if buffer is None:
        raise refusal(path, "the array's values are not plain bytes")
    if len(shape) > 3 or any(type(extent) is not int or not 0 <= extent <= sys.maxsize for extent in shape):
        raise refusal(path, "its shape is not one that embeddings have, wanted [rows, D] or [rows, I, D]")
    claimed = math.prod(shape) * data_type.itemsize
    if claimed != len(buffer):
        raise refusal(path, f"shape {list(shape)} takes {claimed} bytes, the file has {len(buffer)}", "copy it again")
    array = np.frombuffer(buffer, data_type).reshape(shape, order=order)
    if axes is not None:
        if any(type(axis) is not int for axis in axes) or sorted(axes) != list(range(len(shape))):
            raise refusal(path, "the order of the axes is not a permutation")
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
