"""Embedding files: what is read, what is refused, and that a pickle never runs anything.

Expected values are written by hand or are the arrays that numpy itself pickled. A malicious pickle would, if any part
of it ran, append to `TOUCHED` or create a file; each test looks at both afterwards.
"""

import builtins
import codecs
import copyreg
import functools
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from prospect.embeddings import check_finite, convert, find_embeddings, read_embeddings
from prospect.errors import ProspectError

ROOT = Path(__file__).resolve().parents[1]
TOUCHED: list[str] = []


def touch(*arguments) -> np.ndarray:
    """What a malicious pickle of these tests tries to run."""
    TOUCHED.append(repr(arguments))
    return np.ones((2, 2), np.float32)


def refused(path: Path) -> str:
    """The error on `path`, which must name the file and a remedy."""
    with pytest.raises(ProspectError) as caught:
        read_embeddings(path)
    assert path.name in str(caught.value) and caught.value.remedy and "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- What is read --------------------------------------------------------------------------------

# Written by hand, as numpy 1 under protocol 3 would: [[1, 2, 3]] in float32. 1.0 is 00 00 80 3f, little end first.
NUMPY1_PROTOCOL3 = (
    b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    b"(K\x01K\x01K\x03\x86cnumpy\ndtype\nX\x02\x00\x00\x00f4K\x00K\x01\x87R"
    b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89C\x0c\x00\x00\x80\x3f\x00\x00\x00\x40\x00\x00\x40\x40tb."
)
# The same array, big end first, as numpy 1 under protocol 5 would write it.
NUMPY1_PROTOCOL5 = (
    b"\x80\x05\x8c\x12numpy.core.numeric\x8c\x0b_frombuffer\x93"
    b"(\x96\x0c\x00\x00\x00\x00\x00\x00\x00\x3f\x80\x00\x00\x40\x00\x00\x00\x40\x40\x00\x00"
    b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f4\x89\x88\x87R"
    b"(K\x03\x8c\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"K\x01K\x03\x86\x8c\x01CtR."
)


@pytest.mark.parametrize("data", [NUMPY1_PROTOCOL3, NUMPY1_PROTOCOL5])
def test_handwritten_pickles_have_the_values_written_in_them(tmp_path, data):
    array = read_embeddings(write(tmp_path / "a.pkl", data))
    assert array.tolist() == [[1.0, 2.0, 3.0]] and array.dtype == np.float32 and array.dtype.isnative


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
def test_every_layout_and_protocol_of_a_pickle_keeps_its_values(tmp_path, protocol, dtype):
    block = np.arange(24).reshape(2, 3, 4).astype(dtype)
    layouts = [block, block[0], np.asfortranarray(block), block[0].T]
    layouts += [block.transpose(2, 0, 1), block[:, ::2], block[1:, 1:]]
    for array in layouts:
        for dump in (pickle.dumps, pickle._dumps):  # the C pickler, and Python's, which makes other choices
            path = write(tmp_path / "a.pkl", dump(array, protocol))
            read = read_embeddings(path)
            assert read.shape == array.shape and np.array_equal(read, array)
            assert read.dtype == (np.float16 if dtype.endswith("2") else np.float32) and read.dtype.isnative
            assert not read.flags.writeable


@pytest.mark.parametrize("protocol", range(5))
def test_pickles_of_numpy_1_and_2_read_the_same(tmp_path, protocol):
    array = np.float32([[1, 2], [3, 4]])
    new = pickle._dumps(array, protocol)  # without C's framing the name's length is the only byte to correct
    old = new.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    old = old.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    if protocol == 4:
        old = old[:3] + struct.pack("<Q", len(old) - 11) + old[11:]
    assert b"numpy._core" in new and b"numpy.core" in old
    assert read_embeddings(write(tmp_path / "a.pkl", old)).tolist() == [[1, 2], [3, 4]]


def test_npy_stays_on_disk(tmp_path):
    np.save(tmp_path / "a.npy", np.float16([[1, 2, 3], [4, 5, 6]]))
    array = read_embeddings(tmp_path / "a.npy")
    assert isinstance(array, np.memmap) and array.mode == "r" and not array.flags.writeable
    assert array.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f2"])
def test_npy_of_other_widths_and_byte_orders_is_converted(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.asfortranarray(np.array([[1, 2, 3], [4, 5, 6]], dtype)))
    array = read_embeddings(tmp_path / "a.npy")
    assert array.tolist() == [[1, 2, 3], [4, 5, 6]] and array.dtype.isnative and array.dtype.itemsize <= 4


@pytest.mark.parametrize(
    "dtype, wanted", [(torch.float16, "f2"), (torch.bfloat16, "f4"), (torch.float32, "f4"), (torch.float64, "f4")]
)
def test_safetensors_dtypes(tmp_path, dtype, wanted):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"anything": torch.tensor([[1.5, -2.0], [0.25, 3.0]], dtype=dtype)}, path)
    array = read_embeddings(path)
    assert array.dtype == wanted and array.tolist() == [[1.5, -2.0], [0.25, 3.0]] and not array.flags.writeable


def test_safetensors_with_several_tensors_gives_the_one_named_embeddings(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.zeros((3, 3), "f4"), "embeddings": np.float32([[7, 8]])}, path)
    assert read_embeddings(path).tolist() == [[7, 8]]
    safetensors.numpy.save_file({"a": np.zeros((3, 3), "f4"), "b": np.float32([[7, 8]])}, path)
    assert "2 tensors" in refused(path)


# ---- What a malicious pickle asks for, and does not get ------------------------------------------


class Reduces:
    """Pickles as `function(*arguments)`, with `state` for BUILD if given: whatever the attacker likes."""

    def __init__(self, function, arguments: tuple, state=None):
        self.wanted = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.wanted

    def __call__(self):
        raise AssertionError("only so that the pickler takes one of these for a function")


class ReducesOnState:
    """A __setstate__ gadget: unpickling makes an instance and hands it the state."""

    def __setstate__(self, state):
        touch(state)

    def __getstate__(self):
        return {"command": "touch"}


class Subclass(np.ndarray):
    """An array that would run code when numpy fills it."""

    def __setstate__(self, state):
        touch(state)
        super().__setstate__(state)


reconstruct = np._core.multiarray._reconstruct
frombuffer = np._core.numeric._frombuffer
BLANK = (np.ndarray, (0,), b"b")
FLOAT32 = np.dtype("f4")


def attacks(marker: Path) -> dict[str, object]:
    """Objects whose pickles run something when loaded by the standard library."""
    command = f"echo run > {marker}"
    bomb = Reduces(os.system, (command,))
    holder = np.empty((1, 1), object)
    holder[0, 0] = bomb
    record = np.zeros((1, 1), [("x", "f4"), ("o", object)])
    record["o"][0, 0] = bomb
    return {
        "os.system": bomb,
        "subprocess.Popen": Reduces(subprocess.Popen, (["sh", "-c", command],)),
        "our own function": Reduces(touch, (1,)),
        "eval": Reduces(eval, (f"open({str(marker)!r}, 'w')",)),
        "exec": Reduces(exec, (f"open({str(marker)!r}, 'w')",)),
        "open": Reduces(open, (str(marker), "w")),
        "getattr": Reduces(getattr, (bomb, "x")),
        "import": Reduces(builtins.__import__, ("os",)),
        "apply of a nested function": Reduces(Reduces(getattr, (bomb, "x")), (command,)),
        "functools.partial": Reduces(functools.partial, (os.system, command)),
        "map": Reduces(list, (Reduces(map, (os.system, [command])),)),
        "copyreg._reconstructor": Reduces(copyreg._reconstructor, (ReducesOnState, object, None), {"a": 1}),
        "__setstate__ gadget": ReducesOnState(),
        "in a list": [np.zeros((1, 1), "f4"), bomb],
        "in a dict": {"embeddings": np.zeros((1, 1), "f4"), "x": bomb},
        "in a tuple": (np.zeros((1, 1), "f4"), bomb),
        "in an object array": holder,
        "in a structured array": record,
        "in a list in the array state": Reduces(reconstruct, BLANK, (1, (1, 1), np.dtype("O"), False, [bomb])),
        "as the data of a float array": Reduces(reconstruct, BLANK, (1, (1, 1), FLOAT32, False, bomb)),
        "as the shape": Reduces(reconstruct, BLANK, (1, bomb, FLOAT32, False, b"\0\0\0\0")),
        "as the dtype": Reduces(reconstruct, BLANK, (1, (1, 1), bomb, False, b"\0\0\0\0")),
        "in the metadata of a dtype": Reduces(
            reconstruct, BLANK, (1, (1, 1), Reduces(np.dtype, ("f4", False, True), ({"x": bomb},)), False, b"\0\0\0\0")
        ),
        "as the subtype of _reconstruct": Reduces(
            reconstruct, (bomb, (0,), b"b"), (1, (1, 1), FLOAT32, False, b"\0\0\0\0")
        ),
        "a subclass through _reconstruct": np.ones((1, 1), "f4").view(Subclass),
        "as the buffer of _frombuffer": Reduces(frombuffer, (bomb, FLOAT32, (1, 1), "C")),
        "as the axes of _frombuffer": Reduces(frombuffer, (b"\0\0\0\0", FLOAT32, (1, 1), "K", (bomb, 0))),
        "numpy.load": Reduces(np.load, (str(marker), None, True)),
        "scalar with an object": Reduces(np._core.multiarray.scalar, (np.dtype("O"), pickle.dumps(bomb))),
        "numpy.frombuffer": Reduces(np.frombuffer, (b"\0\0\0\0",)),
        "codecs.decode": Reduces(codecs.decode, (b"00", "hex")),
        "as the text of encode": Reduces(codecs.encode, (bomb, "latin1")),
        "a torch tensor": torch.ones(2, 2),
        "a number": 3,
        "a string": "numpy",
        "a list of arrays": [np.zeros((2, 2), "f4"), np.zeros((2, 2), "f4")],
        "a function": touch,
        "numpy.dtype alone": np.dtype("f4"),
        "numpy.ndarray alone": np.ndarray,
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", attacks(Path("marker")))
def test_malicious_pickle_runs_nothing(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    path = write(tmp_path / "a.pkl", pickle.dumps(attacks(marker)[name], protocol))
    TOUCHED.clear()
    message = refused(path)
    assert not TOUCHED and not marker.exists()
    if name == "os.system":
        assert "system" in message  # the user learns what the file wanted


def test_the_attacks_are_real(tmp_path):
    """The standard library runs what the test above sees refused: its markers do work."""
    marker = tmp_path / "marker"
    TOUCHED.clear()
    for name in ("os.system", "in an object array", "as the subtype of _reconstruct", "functools.partial", "map"):
        data = pickle.dumps(attacks(marker)[name])
        try:
            loaded = pickle.loads(data)
            loaded() if name == "functools.partial" else None
        except TypeError:
            pass
        assert marker.exists(), name
        marker.unlink()
    pickle.loads(pickle.dumps(attacks(marker)["our own function"]))
    pickle.loads(pickle.dumps(attacks(marker)["__setstate__ gadget"]))
    assert len(TOUCHED) == 2


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


DTYPE_STATE = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
COMMAND = b"X\x04\x00\x00\x00true"
HANDMADE = {
    "dotted name, protocol 4": b"\x80\x04" + short("numpy") + short("core.multiarray.os.system") + b"\x93)R.",
    "dotted name, ndarray": b"\x80\x04" + short("numpy") + short("ndarray.__init_subclass__") + b"\x93)R.",
    "dotted name, dtype": b"\x80\x04" + short("numpy") + short("dtype.__class__.__base__") + b"\x93)R.",
    "dotted module": b"cnumpy.core.multiarray.sys\nmodules\n.",
    "module hidden in the name": b"\x80\x04" + short("") + short("numpy dtype") + b"\x93.",
    "name hidden in the module": b"\x80\x04" + short("numpy dtype") + short("") + b"\x93.",
    "module is a tuple": b"\x80\x04)" + short("dtype") + b"\x93.",
    "module is numpy's own object": b"\x80\x04cnumpy\nndarray\n" + short("dtype") + b"\x93.",
    "other case": b"cNumpy\nndarray\n.",
    "posix.system": b"cposix\nsystem\n" + COMMAND + b"\x85R.",
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + COMMAND + b"o.",
    "NEWOBJ": b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04cnumpy\nndarray\n)}\x92.",
    "ndarray called with a giant shape": b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R.",
    "dtype called with a comma string": b"cnumpy\ndtype\nX\x05\x00\x00\x00f4,f4\x85R.",
    "persistent id": b"Pnumpy\n.",
    "binary persistent id": b"X\x01\x00\x00\x00aQ.",
    "extension code 1": b"\x80\x02\x82\x01.",
    "extension code 2": b"\x80\x02\x83\x01\x00.",
    "extension code 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "BUILD on ndarray itself": b"cnumpy\nndarray\n}b.",
    "BUILD on text": b"X\x01\x00\x00\x00a)b.",
    "second BUILD": NUMPY1_PROTOCOL3.replace(DTYPE_STATE, DTYPE_STATE + DTYPE_STATE),
    "two arrays, the second wins": NUMPY1_PROTOCOL3[:-1] + b"0" + NUMPY1_PROTOCOL3[2:],
    "two objects left, None first": b"N" + NUMPY1_PROTOCOL3[2:],
    "two objects left, the array first": NUMPY1_PROTOCOL3[:-1] + b"N.",
    "trailing bytes": NUMPY1_PROTOCOL3 + b"\0",
    "a second pickle behind": NUMPY1_PROTOCOL3 + NUMPY1_PROTOCOL3,
    "no STOP": NUMPY1_PROTOCOL3[:-1],
    "only STOP": b".",
    "MARK alone": b"(.",
    "memo that is not there": b"h\x05.",
    "tuple without mark": b"NNt.",
    "encode to another codec": NUMPY1_PROTOCOL3.replace(
        b"C\x01b", b"c_codecs\nencode\nX\x01\x00\x00\x00bX\x03\x00\x00\x00hex\x86R"
    ),
    "text that is not latin-1": NUMPY1_PROTOCOL3.replace(
        b"C\x01b", b"c_codecs\nencode\nX\x02\x00\x00\x00\xc4\x80X\x06\x00\x00\x00latin1\x86R"
    ),
    "nothing like a pickle": b"hello, this is not a pickle",
    "an HTML page": b"<html><body>404</body></html>",
    "UTF-16 text": "embeddings".encode("utf-16"),
    "text that is not UTF-8": b"X\x02\x00\x00\x00\xff\xfe.",
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "a dimension of 4000 digits": NUMPY1_PROTOCOL3.replace(b"K\x01K\x03\x86", b"I" + b"9" * 4000 + b"\nK\x03\x86"),
    "negative dimensions": NUMPY1_PROTOCOL3.replace(b"K\x01K\x03\x86", b"J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86"),
    "a boolean dimension": NUMPY1_PROTOCOL3.replace(b"K\x01K\x03\x86", b"\x88K\x03\x86"),
    "a dimension that is text": NUMPY1_PROTOCOL3.replace(b"K\x01K\x03\x86", b"X\x01\x00\x00\x001K\x03\x86"),
    "an axis order that is none": NUMPY1_PROTOCOL5.replace(b"\x8c\x01CtR.", b"\x8c\x01KK\x00K\x00\x86tR."),
    "an axis order of booleans": NUMPY1_PROTOCOL5.replace(b"\x8c\x01CtR.", b"\x8c\x01K\x88\x89\x86tR."),
    "an axis order of texts": NUMPY1_PROTOCOL5.replace(b"\x8c\x01CtR.", b"\x8c\x01K\x8c\x010\x8c\x011\x86tR."),
    "a recursive state": b"cnumpy\ndtype\n)R\x94h\x00\x85b.",
}


@pytest.mark.parametrize("name", HANDMADE)
def test_handmade_pickle_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr(os, "system", touch)
    assert HANDMADE[name] not in (NUMPY1_PROTOCOL3, NUMPY1_PROTOCOL5)  # the replacements above took place
    TOUCHED.clear()
    message = refused(write(tmp_path / "a.pkl", HANDMADE[name]))
    assert not TOUCHED
    assert "nothing was run" in message or not name.startswith("dotted")


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((2, 2), "i8"), "'i8'"),
        (np.zeros((2, 2), "c8"), "'c8'"),
        (np.zeros((2, 2), "S4"), "'S4'"),
        (np.zeros((2, 2), "M8[s]"), "'M8'"),
        (np.zeros((2, 2), [("x", "f4")]), "EMPTY_DICT"),
        (np.zeros(4, "f4"), "[4]"),
        (np.zeros((1, 2, 2, 2), "f4"), "shape"),
        (np.array(1, "f4"), "[]"),
        (np.zeros((0, 4), "f4"), "[0, 4]"),
        (np.zeros((4, 0), "f4"), "[4, 0]"),
        (np.full((2, 2), 1e300), "too large for float32"),
        (np.ma.masked_array(np.zeros((2, 2), "f4")), "numpy.ma.core _mareconstruct"),
    ],
)
def test_arrays_that_are_no_embeddings(tmp_path, array, said):
    path = write(tmp_path / "a.pkl", pickle.dumps(array, 4))
    with pytest.raises(ProspectError) as error:
        read_embeddings(path)
    assert said in str(error.value)
    if type(array) is np.ndarray:
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ProspectError):
            read_embeddings(tmp_path / "a.npy")


# ---- Bombs: memory is bounded by the file, time by the number of instructions --------------------

DEEP = b")" + b"q\x63h\x63h\x63\x87" * 19  # a tuple thrice in a tuple, 19 times: to compare two takes 3**19 steps
BOMBS = {
    "a terabyte claimed by the array": NUMPY1_PROTOCOL3.replace(b"K\x01K\x03\x86", b"J\0\0\1\0J\0\0\1\0\x86"),
    "a terabyte claimed by the bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc",
    "2**62 claimed by the text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"abc",
    "a terabyte claimed by a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc",
    "a frame of 2**63": b"\x80\x04\x95" + struct.pack("<Q", 1 << 63) + b"N.",
    "100,000 nested marks": b"(" * 100_000 + b"t" * 100_000 + b".",
    "100,000 nested tuples": b")" + b"\x85" * 100_000 + b".",
    "2**90 leaves through the memo": b")" + b"\x94h%c\x86" * 40 % tuple(range(40)) + b".",
    "a memo index of 2**31": b"Nr\xff\xff\xff\x7f0.",
    "two axes of 3**19 leaves each": NUMPY1_PROTOCOL5.replace(b"\x8c\x01CtR.", b"\x8c\x01K" + DEEP + DEEP + b"\x86tR."),
    "one text encoded 100,000 times": b"c_codecs\nencode\nq\x00X\xe8\x03\x00\x00"
    + b"a" * 1000
    + b"X\x06\x00\x00\x00latin1\x86q\x01"
    + b"h\x00h\x01R" * 100_000
    + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_little_memory_and_time(tmp_path, name):
    path = write(tmp_path / "a.pkl", BOMBS[name])
    start = time.perf_counter()
    tracemalloc.start()
    try:
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(BOMBS[name]) + 500_000 and time.perf_counter() - start < 3


def test_memory_for_a_good_pickle_is_a_small_multiple_of_the_file(tmp_path):
    array = np.ones((500, 1000), np.float32)
    for protocol in range(6):
        path = write(tmp_path / "a.pkl", pickle.dumps(array, protocol))
        tracemalloc.start()
        try:
            read_embeddings(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 5 * path.stat().st_size


# ---- Other broken files --------------------------------------------------------------------------


def npy(header: str, data: bytes = b"\0" * 16, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def tensors(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD_NPY = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }\n")
ONE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
BROKEN = {
    "empty.npy": b"",
    "empty.pkl": b"",
    "empty.safetensors": b"",
    "magic.npy": b"\x93NUMPX" + GOOD_NPY[6:],
    "truncated header.npy": GOOD_NPY[:20],
    "truncated data.npy": GOOD_NPY[:-1],
    "trailing.npy": GOOD_NPY + b"\0",
    "version 9.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }\n", version=b"\x09\x00"),
    "a pickle.npy": NUMPY1_PROTOCOL3,
    "objects.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }\n", pickle.dumps([1, 2, 3, 4])),
    "integers.npy": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (2, 2), }\n"),
    "float128.npy": npy("{'descr': '<f16', 'fortran_order': False, 'shape': (1, 1), }\n"),
    "structured.npy": npy("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (2, 2), }\n"),
    "zip.npy": b"PK\x03\x04" + b"\0" * 30,
    "terabyte.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1048576, 1048576), }\n"),
    "overflow.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }\n"),
    "huge extent.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (%s, 2), }\n" % ("9" * 60)),
    "negative.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2), }\n"),
    "one dimension.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }\n"),
    "no rows.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4), }\n", b""),
    "code in the header.npy": npy("{'descr': __import__('os').system('x'), 'fortran_order': False, 'shape': (2, 2)}\n"),
    "unclosed header.npy": npy("{'descr': '<f4', 'fortran_order': (((\n"),
    "nested header.npy": npy("(" * 9000),
    "other keys.npy": npy("{'descr': '<f4', 'shape': (2, 2), }\n"),
    "short.safetensors": b"\x10\0\0",
    "lying length.safetensors": struct.pack("<Q", 1 << 40) + b"{}",
    "length 2**64.safetensors": b"\xff" * 8 + b"{}",
    "not json.safetensors": tensors(b"{not json}", b""),
    "not utf-8.safetensors": tensors(b'{"\xff\xfe": {}}', b""),
    "nested json.safetensors": tensors(b'{"a":' * 2000 + b"1" + b"}" * 2000, b""),
    "no tensor.safetensors": tensors({}, b""),
    "truncated.safetensors": tensors({"a": ONE}, b"\0" * 15),
    "trailing.safetensors": tensors({"a": ONE}, b"\0" * 17),
    "offsets outside.safetensors": tensors({"a": {**ONE, "data_offsets": [16, 32]}}, b"\0" * 16),
    "offsets backwards.safetensors": tensors({"a": {**ONE, "data_offsets": [16, 0]}}, b"\0" * 16),
    "shape too large.safetensors": tensors({"a": {**ONE, "shape": [1 << 20, 1 << 20]}}, b"\0" * 16),
    "shape overflows.safetensors": tensors({"a": {**ONE, "shape": [1 << 33, 1 << 33]}}, b"\0" * 16),
    "unknown dtype.safetensors": tensors({"a": {**ONE, "dtype": "X9"}}, b"\0" * 16),
    "integers.safetensors": tensors({"a": {**ONE, "dtype": "I32"}}, b"\0" * 16),
    "float8.safetensors": tensors({"a": {**ONE, "dtype": "F8_E4M3", "data_offsets": [0, 4]}}, b"\0" * 4),
    "one dimension.safetensors": tensors({"a": {**ONE, "shape": [4]}}, b"\0" * 16),
    "no rows.safetensors": tensors({"a": {**ONE, "shape": [0, 4], "data_offsets": [0, 0]}}, b""),
    "a pickle.safetensors": NUMPY1_PROTOCOL3,
    "an array.txt": b"1 2 3",
    "no ending": GOOD_NPY,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused(tmp_path, name):
    refused(write(tmp_path / name, BROKEN[name]))


def test_the_good_files_that_the_broken_ones_are_made_of_are_read(tmp_path):
    assert read_embeddings(write(tmp_path / "a.npy", GOOD_NPY)).tolist() == [[0, 0], [0, 0]]
    path = write(tmp_path / "a.safetensors", tensors({"a": ONE}, b"\0" * 16))
    assert read_embeddings(path).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("ending", [".pkl", ".npy", ".safetensors"])
def test_what_is_no_file(tmp_path, ending, monkeypatch):
    assert "No such file" in refused(tmp_path / f"missing{ending}")
    (tmp_path / f"folder{ending}").mkdir()
    assert "not a regular file" in refused(tmp_path / f"folder{ending}")
    os.mkfifo(tmp_path / f"pipe{ending}")  # opening it would wait for ever
    assert "not a regular file" in refused(tmp_path / f"pipe{ending}")
    (tmp_path / f"zeros{ending}").symlink_to("/dev/zero")
    assert "not a regular file" in refused(tmp_path / f"zeros{ending}")
    (tmp_path / f"loop{ending}").symlink_to(tmp_path / f"loop{ending}")
    refused(tmp_path / f"loop{ending}")
    refused(tmp_path / ("x" * 300 + ending))

    def denied(self, **ignored):  # root may read everything, so a permission cannot be taken away for real
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", denied)
    assert "Permission denied" in refused(write(tmp_path / f"locked{ending}", GOOD_NPY))


# ---- Fuzz: valid files, mutated ------------------------------------------------------------------

PERMUTED = np.arange(12, dtype=">f2").reshape(2, 3, 2).transpose(1, 0, 2)
VALID = [
    *((".pkl", pickle.dumps(np.float32([[1, 2], [3, 4]]), protocol)) for protocol in range(6)),
    *((".pkl", pickle.dumps(PERMUTED, protocol)) for protocol in (4, 5)),
    (".npy", GOOD_NPY),
    (".safetensors", tensors({"a": ONE}, b"\0" * 16)),
    (".safetensors", safetensors.torch.save({"embeddings": torch.ones(2, 2).bfloat16(), "x": torch.ones(3)})),
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four edits: a byte changed, removed, doubled or inserted, a stretch moved, the tail cut."""
    edited = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, to = sorted((rng.randrange(len(edited) + 1), rng.randrange(len(edited) + 1)))
        match rng.randrange(6):
            case 0 if at < len(edited):
                edited[at] = rng.randrange(256)
            case 1:
                del edited[at : at + rng.randint(1, 3)]
            case 2:
                edited[at:at] = edited[at:to]
            case 3:
                edited[at:at] = rng.choice([b"R", b"b", b".", b"(", b"t", b"0", b"2", b"}", b"N", rng.randbytes(4)])
            case 4:
                del edited[at:to]
            case 5:
                del edited[at:]
    return bytes(edited)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # in text that the edits made
@pytest.mark.parametrize("index", range(len(VALID)))
def test_fuzz_ends_in_a_valid_array_or_our_own_error(tmp_path, index):
    ending, data = VALID[index]
    path = tmp_path / f"a{ending}"
    rng = random.Random(index)
    good = 0
    for _ in range(300):
        write(path, mutated(data, rng))
        try:
            array = read_embeddings(path)
            assert array.ndim in (2, 3) and array.size
            assert array.dtype in (np.float16, np.float32) and array.dtype.isnative
            assert array.nbytes <= 2 * path.stat().st_size
            good += 1
        except ProspectError as error:
            assert path.name in str(error) and error.remedy
    assert good < 300  # the edits do break files


@pytest.mark.parametrize("index", range(len(VALID)))
def test_every_truncation_is_refused(tmp_path, index):
    ending, data = VALID[index]
    for length in range(len(data)):
        with pytest.raises(ProspectError):
            read_embeddings(write(tmp_path / f"a{ending}", data[:length]))


# ---- NaN and infinity ----------------------------------------------------------------------------


def test_check_finite_counts_and_locates():
    array = np.zeros((4, 2, 3), np.float16)
    check_finite(array, "here")
    array[2, 0, 1] = np.nan
    array[2, 1, 1] = np.inf
    array[3, 0, 0] = -np.inf
    with pytest.raises(ProspectError) as error:
        check_finite(array, "a.npy")
    assert str(error.value).startswith("a.npy: 1 NaN and 2 infinite values in 2 of 4 rows, first in row 2 (")


# ---- Finding a clip's file -----------------------------------------------------------------------


DEFAULT_NAMES = ["c_embeddings.pkl", "c_embeddings.npy", "c_embeddings.safetensors", "c.pkl", "c.npy", "c.safetensors"]


def test_the_order_in_which_a_clips_file_is_looked_for(tmp_path):
    for name in reversed(DEFAULT_NAMES):
        write(tmp_path / name, b"x")
        assert find_embeddings("c", tmp_path, None) == tmp_path / name
    write(tmp_path / "other.npy", b"x")
    assert find_embeddings("c", tmp_path, "other.npy") == tmp_path / "other.npy"
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/a.npy", b"x")
    for named in ("sub/a.npy", "sub/../sub/a.npy", str(tmp_path / "sub/a.npy")):
        assert find_embeddings("c", tmp_path, named).samefile(tmp_path / "sub/a.npy")


def test_a_missing_file_names_every_path_tried(tmp_path):
    with pytest.raises(ProspectError) as error:
        find_embeddings("c", tmp_path, None)
    for name in DEFAULT_NAMES:
        assert str(tmp_path / name) in str(error.value)
    assert "clip 'c'" in str(error.value)
    with pytest.raises(ProspectError, match="named.npy"):
        find_embeddings("c", tmp_path, "named.npy")


def test_a_path_that_leaves_the_folder_is_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "data-other").mkdir()  # shares the folder's name as a prefix
    for name in ("secret.npy", "data-other/secret.npy"):
        write(tmp_path / name, b"x")
    (folder / "link.npy").symlink_to(tmp_path / "secret.npy")
    (folder / "up").symlink_to(tmp_path)
    (folder / "c.npy").symlink_to(tmp_path / "secret.npy")
    secret = str(tmp_path / "secret.npy")
    for named in ("../secret.npy", secret, "link.npy", "up/secret.npy", "up/data/../secret.npy"):
        with pytest.raises(ProspectError, match="outside"):
            find_embeddings("c", folder, named)
        assert find_embeddings("c", folder, named, allow_outside=True).samefile(secret)
    with pytest.raises(ProspectError, match="outside"):
        find_embeddings("c", folder, "../data-other/secret.npy")
    with pytest.raises(ProspectError, match="outside"):  # also where the link has the clip's own name
        find_embeddings("c", folder, None)
    for named in ("../nothing.npy", "/nothing.npy"):  # whether something lies there is not told
        with pytest.raises(ProspectError, match="outside"):
            find_embeddings("c", folder, named)


@pytest.mark.parametrize("clip_id", ["../secret", "/etc/passwd", "a/b", "a\\b", "", "a\0b", "x" * 300, "\ud800"])
def test_a_clip_id_cannot_leave_the_folder(tmp_path, clip_id):
    (tmp_path / "data/a").mkdir(parents=True)
    for name in ("secret.npy", "secret_embeddings.pkl", "data/a/b.npy"):
        write(tmp_path / name, b"x")
    with pytest.raises(ProspectError):
        find_embeddings(clip_id, tmp_path / "data", None)


@pytest.mark.parametrize("named", ["a\0b.npy", "x" * 300 + ".npy", "loop.npy", "\ud800.npy"])
def test_odd_names_are_our_own_error(tmp_path, named):
    (tmp_path / "loop.npy").symlink_to(tmp_path / "loop.npy")
    with pytest.raises(ProspectError):
        find_embeddings("c", tmp_path, named)


# ---- Converting ----------------------------------------------------------------------------------


def run_convert(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "prospect.embeddings", "convert", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_convert_writes_the_good_and_counts_the_broken(tmp_path):
    source, out = tmp_path / "pickles", tmp_path / "new/out"
    source.mkdir()
    first, second = np.float16([[1, 2], [3, 4]]), np.asfortranarray(np.float32([[5, 6, 7], [8, 9, 10]]))
    write(source / "a_0_embeddings.pkl", pickle.dumps(first))
    write(source / "b_0_embeddings.pkl", pickle.dumps(second))
    write(source / "bad.pkl", pickle.dumps(Reduces(os.system, (f"touch {tmp_path}/marker",))))
    write(source / "nan.pkl", pickle.dumps(np.float32([[0, np.nan]])))
    write(source / "notes.txt", b"not mine")

    for file_format in ("safetensors", "npy"):
        done = run_convert(str(source), str(out), "--format", file_format)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"converted 2 of 4 files to {out}; 2 broken" in done.stdout
        assert "bad.pkl" in done.stderr and "nan.pkl" in done.stderr and "first in row 0" in done.stderr
        read = read_embeddings(find_embeddings("a_0", out, f"a_0_embeddings.{file_format}"))
        assert read.tolist() == [[1, 2], [3, 4]] and read.dtype == np.float16
        assert read_embeddings(out / f"b_0_embeddings.{file_format}").tolist() == [[5, 6, 7], [8, 9, 10]]
    written = [f"{clip}_embeddings.{ending}" for clip in ("a_0", "b_0") for ending in ("npy", "safetensors")]
    assert sorted(path.name for path in out.iterdir()) == written
    assert not (tmp_path / "marker").exists()
    assert sorted(path.name for path in source.iterdir())[:2] == ["a_0_embeddings.pkl", "b_0_embeddings.pkl"]

    for name in ("bad.pkl", "nan.pkl"):
        (source / name).unlink()
    assert run_convert(str(source), str(out)).returncode == 0  # safetensors, over the files that are there


def test_convert_on_nothing_is_one_line_and_exit_2(tmp_path):
    write(tmp_path / "file", b"")
    write(tmp_path / "a.pkl", NUMPY1_PROTOCOL3)
    (tmp_path / "nothing").mkdir()
    for source, out in (("missing", "o"), ("file", "o"), ("nothing", "o"), (".", "file")):
        done = run_convert(str(tmp_path / source), str(tmp_path / out))
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_write_that_fails_leaves_the_old_file_and_nothing_aside(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    write(tmp_path / "a.pkl", NUMPY1_PROTOCOL3)
    write(out / "a.npy", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProspectError, match="No space left"):
        convert(tmp_path, out, "npy")
    assert [path.name for path in out.iterdir()] == ["a.npy"] and (out / "a.npy").read_bytes() == b"old"
