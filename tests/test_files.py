"""prospect/files.py: a file is complete or not there, and what is read back is what was written."""

import os
from pathlib import Path

import pytest

from prospect.errors import ProspectError
from prospect.files import read_json, tree_to_disk, write_json, write_text, write_whole


def test_a_file_takes_its_name_when_it_is_complete_and_on_the_disk(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the directory that now lists it."""
    done = []
    named = lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("sync " + named(descriptor)))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"rename {Path(b).name}"), replace(a, b)))
    path = tmp_path / "a.txt"
    path.write_text("old")
    with write_whole(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir() if p != path] == [f".a.txt.{os.getpid()}.writing"]
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    assert done == [f"sync .a.txt.{os.getpid()}.writing", "rename a.txt", f"sync {tmp_path.name}"]


def test_a_block_that_raises_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with write_whole(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_is_one_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ProspectError, match="cannot be written: File exists") as caught:
        write_text(tmp_path / "file" / "a.txt", "text")
    assert caught.value.where == str(tmp_path / "file" / "a.txt")


def test_a_tree_is_synced_to_its_last_file(tmp_path, monkeypatch):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "deeper" / "a").write_text("a")
    done = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
    )
    tree_to_disk(tmp_path / "deep")
    assert sorted(done) == ["deep", "deep/deeper", "deep/deeper/a"] and done[-1] == "deep"


def test_json_written_and_read(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [2, "ü"]})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "a": [\n    2,\n    "\\u00fc"\n  ],\n  "b": 1\n}\n'
    assert read_json(tmp_path / "a.json") == {"a": [2, "ü"], "b": 1}


@pytest.mark.parametrize("content, said", [
    (b"{", "a.json: cannot be read: it is not JSON (Expecting"),
    (b"[1]", "a.json: is not a JSON object"),
    (b'{"a": "\xff"}', "a.json: cannot be read: it is not JSON ('utf-8'"),
    (b'{"a":' + b"[" * 100_000, "a.json: cannot be read: it is not JSON ("),
    (None, "a.json: cannot be read: No such file or directory (no a.json: is this it?)"),
])  # fmt: skip
def test_json_that_cannot_be_read_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ProspectError) as caught:
        read_json(tmp_path / "a.json", if_missing="is this it?")
    assert said in str(caught.value)
