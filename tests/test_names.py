"""The names of clip files: files, folders and patterns, alone and in the commands that take them."""

import json
import sys
from pathlib import Path

import pytest
from tiny import VISION_DIM, write_tiny_config, write_tiny_corpus

import infer
import train
from prospect import check
from prospect.config import DataConfig, Repeated, load_config
from prospect.errors import ProspectError
from prospect.names import clip_file_names, parse_clip_name
from prospect.report.__main__ import reference_clips


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("[]")


def test_folders_and_patterns(here):
    touch("a/b.json", "a/B.json", "a/c.jsonl", "a/a2.json", "a/a10.json", "a/.hidden.json", "a/notes.txt", "a/x.npy")
    touch("a/sub/d.json", "a/sub/.prospect/e.json", "a/folder.json/f.json", "empty/x.npy")
    touch("odd/[1].json", "odd[1]/g.json")
    folder = ["a/B.json", "a/a10.json", "a/a2.json", "a/b.json", "a/c.jsonl"]  # by code point; files alone
    assert clip_file_names(["a"]) == clip_file_names(["a/"]) == folder
    assert clip_file_names(["a/*.json"]) == folder[:-1]
    assert clip_file_names(["a/a?.json", "a/*.jsonl", "b/none.json"]) == ["a/a2.json", "a/c.jsonl", "b/none.json"]
    assert clip_file_names(["a/**/*.json"]) == [*folder[:-1], "a/folder.json/f.json", "a/sub/d.json"]
    assert clip_file_names(["a/[bB].json", "a/b.json"]) == ["a/B.json", "a/b.json", "a/b.json"]
    assert clip_file_names(["odd/[1].json"]) == ["odd/[1].json"]  # a file of that very name
    assert clip_file_names(["odd[1]"]) == ["odd[1]/g.json"]  # and a folder
    assert clip_file_names([here / "a"]) == [str(here / name) for name in folder]
    for name, what in (
        ("empty", "the folder holds no .json or .jsonl file"),
        ("a/*.yaml", "no file matches this pattern"),
        ("none/*.json", "no file matches this pattern"),
        ("a/folder*", "no file matches this pattern"),  # which is a folder
    ):
        with pytest.raises(ProspectError) as caught:
            clip_file_names(["a", name])
        assert str(caught.value) == f"{name}: {what} (check data.train / data.val / --data / --clip)"


def test_names_of_clips(here):
    touch("a.json", "a:b.json", "a:b.json:c")
    assert parse_clip_name("a.json") == ("a.json", None)
    assert parse_clip_name("a.json:x:1") == ("a.json", "x:1")
    assert parse_clip_name("a.json:") == ("a.json", "")
    assert parse_clip_name("a:b.json:d:e") == ("a:b.json", "d:e")
    assert parse_clip_name("a:b.json:c") == ("a:b.json:c", None)  # a file of that name comes first
    assert parse_clip_name("absent.json:0") == ("absent.json:0", None)


# ---- where they are taken ------------------------------------------------------------------------


@pytest.fixture
def split(here) -> Path:
    """The tiny corpus with its training clips in two files of a folder, of four and of eight clips."""
    write_tiny_corpus(here)
    clips = json.loads(Path("train.json").read_text())
    Path("parts").mkdir()
    Path("parts/one.json").write_text(json.dumps(clips[:4]))
    Path("parts/two.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips[4:]))
    Path("parts/embeddings").symlink_to(here / "embeddings")
    return here


def test_the_configuration_names_the_files(split, capsys, monkeypatch):
    config = write_tiny_config(split)
    both = ["parts/one.json", "parts/two.jsonl"]
    assert load_config(config, ["data.train=parts"]).data.train == both
    loaded = load_config(config, ["data.train=[{path: parts, repeat: 3}, train.json]", "data.val=v*.json"]).data
    assert loaded.train == [Repeated(both[0], 3), Repeated(both[1], 3), "train.json"] and loaded.val == ["val.json"]
    with pytest.raises(ProspectError, match="data.train names parts/two.jsonl twice"):
        load_config(config, ["data.train=[parts, {path: parts/*.jsonl, repeat: 2}]"])

    monkeypatch.setattr(sys, "argv", ["train.py", str(config), "data.train=parts", "data.val=v*.json", "--dry-run"])
    assert train.main() == 0
    shown = capsys.readouterr().out
    assert "clips      12 training clips" in shown and "mixture    parts/one.json x 1 " in shown
    assert "- parts/two.jsonl\n" in shown and "- val.json\n" in shown  # as it is kept


def test_the_commands_take_a_folder(split, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check", "parts", "val*"])
    assert check.main() == 0
    shown = capsys.readouterr().out
    assert "15 clips" in shown and "\npython train.py config.yaml run.name=one " in shown
    assert f"data.train=parts 'data.val=val*' model.vision_dim={VISION_DIM}" in shown
    chosen = [(source.file.path.name, index) for source, index in infer.named_clips("parts", DataConfig())]
    assert chosen == [("one.json", i) for i in range(4)] + [("two.jsonl", i) for i in range(8)]
    assert [index for _, index in infer.named_clips("parts/two.jsonl:1", DataConfig())] == [1]
    clips = reference_clips("parts", ["clip11", "talkative"])
    assert [(id, clip.id) for id, clip in clips.items()] == [("clip11", "clip11"), ("talkative", "talkative")]
    with pytest.raises(ProspectError, match="parts: no clip 'val0'"):
        reference_clips("parts", ["talkative", "val0"])
