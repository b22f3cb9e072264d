"""What training and validation share: each sign by itself, and what train.py makes of it."""

import json
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_config, write_tiny_corpus

import train
from prospect.errors import ProspectError, run_entry_point
from prospect.leaks import Origin, check_leaks, leaks


def origin(folder: Path, id: str, video: str | None = None, name: str | None = None, content: str = "") -> Origin:
    path = folder / (name or f"{id}_embeddings.npy")
    path.parent.mkdir(exist_ok=True)
    path.write_text(content or f"rows of {folder.name}'s {id}")
    return Origin(f"{folder.name}.json, clip {id}", id, video or id, path)


def test_each_sign_by_itself(tmp_path):
    train, val = tmp_path / "train", tmp_path / "val"
    seen = [
        origin(train, "a_0"),
        origin(train, "b_0", video="b"),
        origin(train, "c", name="c.npy", content="rows of c"),
        origin(train, "d", name="d.npy", content="one thing"),
        origin(train, "e", name="e.npy", content="rows of e"),
    ]
    found = leaks(seen, [
        origin(val, "a_0", video="elsewhere"),
        origin(val, "b_1", video="b"),
        origin(val, "see", name="c.npy", content="rows of c"),
        origin(val, "d of val", name="d.npy", content="another thing"),  # a name says nothing by itself
        origin(val, "e of val", name="other.npy", content="rows of e"),  # only files of one name are read
        origin(val, "f"),
    ])  # fmt: skip
    assert found == [
        "val.json, clip a_0 has the same id as train.json, clip a_0",
        "val.json, clip b_1 has the same video 'b' as train.json, clip b_0",
        "val.json, clip see has the same embeddings 'c.npy' as train.json, clip c",
    ]


def test_leaks_are_refused_or_told(tmp_path):
    seen = [origin(tmp_path / "train", f"c{n}") for n in range(9)]
    held_out = [origin(tmp_path / "val", f"c{n}") for n in range(7)] + [origin(tmp_path / "val", "other")]
    with pytest.raises(
        ProspectError, match="data.val: 7 of 8 validation clips leak into training: val.json, clip c0"
    ) as e:
        check_leaks(seen, held_out, allowed=False)
    assert "clip c4 has" in str(e.value) and "clip c5" not in str(e.value) and "; and 2 more" in str(e.value)
    assert "set data.allow_leaks=true" in str(e.value)
    [told] = check_leaks(seen, held_out, allowed=True)
    assert told.startswith("data.val: 7 of 8 validation clips leak") and "; and 2 more" in told
    assert check_leaks(seen, held_out[7:], allowed=False) == []


def test_no_file_is_read_but_those_of_one_name():
    seen = [Origin("", f"v{n}_0", f"v{n}", Path(f"nowhere/v{n}_0.npy")) for n in range(9)]
    held_out = [Origin("", f"w{n}_0", f"w{n}", Path(f"nowhere/w{n}_0.npy")) for n in range(9)]
    assert leaks(seen, held_out) == []
    assert len(leaks(seen, seen)) == 9  # the ids tell


def call(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_entry_point(train.main)
    return end.value.code


def test_train_refuses_a_leak_before_anything_is_written(tmp_path, monkeypatch, capsys):
    write_tiny_corpus(tmp_path)
    clips = json.loads((tmp_path / "val.json").read_text())
    clips[1]["video_uid"] = "talkative"  # the training clip's
    (tmp_path / "val.json").write_text(json.dumps(clips))
    config = write_tiny_config(tmp_path)
    assert call(monkeypatch, config) == 2
    error = capsys.readouterr().err
    shared = f"{tmp_path}/val.json, clip val1 has the same video 'talkative' as {tmp_path}/train.json, clip talkative"
    assert f"error: data.val: 1 of 3 validation clips leak into training: {shared} (leave them out of" in error
    assert not list((tmp_path / "runs").rglob("step-*"))
    assert call(monkeypatch, config, "data.allow_leaks=true", "--dry-run") == 0
    assert f"data.val: 1 of 3 validation clips leak into training: {shared}\n" in capsys.readouterr().out


def test_a_mixture_is_told_with_its_shares(tmp_path, monkeypatch, capsys):
    write_tiny_corpus(tmp_path)
    clips = json.loads((tmp_path / "train.json").read_text())
    for name, part in (("a", clips[:1]), ("b", clips[1:2])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    config, a, b = write_tiny_config(tmp_path), tmp_path / "a.json", tmp_path / "b.json"
    assert call(monkeypatch, config, f"data.train=[{a}, {{path: {b}, repeat: 3}}]", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "clips      2 training clips in 4 sequences, 3 validation sequences\n" in printed
    assert f"mixture    {a} x 1 " in printed and f"%, {b} x 3 " in printed
