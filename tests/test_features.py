"""Features that know where they come from: their scale and their make, compared wherever a model meets others."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip
from test_check import run as run_check
from test_check import write_clips
from tiny import train_here, write_tiny_corpus

import infer
from prospect import evaluate
from prospect.checkpoint import read_state
from prospect.clip_files import open_source
from prospect.features import ROWS, Features, difference, evenly, features_of, scale_of
from prospect.sample import clean_frames, make_clips, world_looks

STREAMABLE = ("infer.max_reply_tokens=8", "infer.max_update_tokens=20", "infer.evidence=0.5")
pytestmark = pytest.mark.usefixtures("one_thread_in_module")
SIGLIP = {"model": "siglip", "weights_sha256": "5161", "pool": "pooled", "vectors_per_frame": 1, "width": 16}
CLIP = SIGLIP | {"model": "clip", "weights_sha256": "c11b"}


def note_make(folder: Path, facts: dict) -> None:
    """What encode writes beside every embedding file, with what differs from file to file."""
    for number, path in enumerate(sorted((folder / "embeddings").glob("*.npy"))):
        of_file = {"source": f"{path.stem}.mp4", "rows": number, "first_frame": number, "revision": None, "fps": "2"}
        path.with_suffix(".json").write_text(json.dumps(facts | of_file))


def scaled(folder: Path, copy: Path, factor: float) -> Path:
    """A copy of the tiny corpus whose embeddings are multiplied by `factor`."""
    write_tiny_corpus(copy)
    for path in (folder / "embeddings").glob("*.npy"):
        np.save(copy / "embeddings" / path.name, np.load(path) * np.float32(factor))
    return copy


def all_clips(path: Path) -> list:
    source = open_source(path, None, False)
    return [(source, index) for index in range(len(source.file))]


# ---- what is measured ----------------------------------------------------------------------------


def test_the_scale_by_hand(tmp_path):
    """Clip a: rows (3, 4) and (0, 0) of norms 5 and 0. Clip b: one row (1, 1) of norm sqrt 2. Both count the same."""
    a, b = raw_clip([], 0, 1, id="a"), raw_clip([], 0, 0, id="b")
    path = write_clips(tmp_path / "clips.json", [a, b])
    np.save(tmp_path / "embeddings/a_embeddings.npy", np.float16([[3, 4], [0, 0]]))
    np.save(tmp_path / "embeddings/b_embeddings.npy", np.float16([[1, 1]]))
    found = features_of(all_clips(path))
    assert found.made == {}
    mean, square = (7 / 4 + 1) / 2, (25 / 4 + 1) / 2
    expected = {"norm": (5 / 2 + 2**0.5) / 2, "mean": mean, "deviation": (square - mean**2) ** 0.5}
    assert found.scale == pytest.approx(expected)


def test_few_clips_and_few_rows_are_read_and_always_the_same(tmp_path, monkeypatch):
    assert evenly(5, 64).tolist() == [0, 1, 2, 3, 4] and evenly(129, 65).tolist() == list(range(0, 129, 2))
    path = write_clips(tmp_path / "clips.jsonl", [raw_clip([], 0, 40, id=f"c{i}") for i in range(100)])
    opened, rows = [], []
    from prospect import features

    read, measure = features.read_embeddings, features.scale_of
    monkeypatch.setattr(features, "read_embeddings", lambda path: opened.append(path.name) or read(path))
    monkeypatch.setattr(features, "scale_of", lambda parts: rows.extend(map(len, parts)) or measure(parts))
    clips = all_clips(path)
    assert features_of(clips) == features_of(clips)
    assert len(opened) == 2 * 64 and opened[:64] == opened[64:] and rows == [16] * 128


def test_what_differs_by_hand():
    scale = {"norm": 10.0, "mean": 0.0, "deviation": 2.0}
    one = Features({name: str(value) for name, value in SIGLIP.items()}, scale)

    def other(made: dict = {}, **changed: float) -> Features:  # noqa: B006
        return Features(one.made | made, scale | changed)

    assert difference(one, one) == ""
    assert difference(other({"pool": "mean"}), one) == "pool mean, not pooled"
    assert difference(other({"model": "clip", "weights_sha256": "c11b"}), one) == (
        "model clip, not siglip; weights_sha256 c11b, not 5161")  # fmt: skip
    assert difference(other({"model": "copy-of-siglip"}), one) == ""  # a directory renamed
    assert difference(other({"resized": "bicubic"}), one) == ""  # a fact that the other does not know
    assert difference(other(norm=12.4, deviation=1.7, mean=0.4), one) == ""  # a little
    assert difference(other(norm=12.6), one) == "norm 12.6, not 10"
    assert difference(other(norm=7.9), one) == "norm 7.9, not 10"
    assert difference(other(deviation=0.0, mean=-0.6), one) == "deviation 0, not 2; mean -0.6, not 0"
    assert difference(Features({}, scale), one) == ""
    assert difference(Features({}, {}), one) == difference(one, Features({}, {})) == ""  # an older checkpoint


def test_the_sample_s_clips_are_alike_at_any_seed_and_not_at_three_times_the_scale():
    """Statistics alone, of a clip or two: as few as infer.py is ever given."""
    clean = clean_frames(world_looks(), "easy")
    corpora = [("train", 2, 0), ("val", 1, 0), ("train", 1, 1)]  # split, clips, seed
    frames = [[rows for _, rows in make_clips(split, count, seed, "easy", clean)] for split, count, seed in corpora]
    train, val, other = (Features({}, scale_of([rows[evenly(len(rows), ROWS)] for rows in clips])) for clips in frames)
    assert difference(val, train) == difference(other, train) == ""
    assert difference(Features({}, scale_of([3 * rows for rows in frames[1]])), train).startswith("norm ")


# ---- the checker ---------------------------------------------------------------------------------


def test_check_reports_the_scale_of_each_data_set_and_warns_of_other_features(tmp_path, monkeypatch, capsys):
    clips = [raw_clip([], 0, 9, id=f"c{i}", dataset=("ego4d", "wtag")[i % 2]) for i in range(4)]
    path = write_clips(tmp_path / "train.json", clips)
    for clip in clips[1::2]:
        np.save(tmp_path / "embeddings" / f"{clip['id']}_embeddings.npy", np.full((10, 4), 3, np.float16))
    other = write_clips(tmp_path / "val.json", [raw_clip([], 0, 9, id="d", dataset="ego4d")])
    status, lines = run_check(monkeypatch, capsys, path, other)
    what = "the embeddings are not like those of {}, ego4d: norm 6, not 2; mean 3, not 1"
    remedy = "encode all of them in one way"
    assert status == 0 and lines[0] == f"warning: {path}, wtag: {what.format(path)} ({remedy})"
    assert [line for line in lines if "mean norm" in line] == [
        f"{path}, ego4d: mean norm 2, mean 1, deviation 0",
        f"{path}, wtag: mean norm 6, mean 3, deviation 0",
        f"{other}: mean norm 2, mean 1, deviation 0",
    ]
    assert run_check(monkeypatch, capsys, path, other, "--strict")[0] == 2
    assert run_check(monkeypatch, capsys, other, "--strict")[0] == 0


# ---- a checkpoint and what it is given -----------------------------------------------------------


@pytest.fixture(scope="module")
def trained(one_thread_in_module, tmp_path_factory) -> dict[str, Path]:
    """A step on embeddings of unknown make, and one on those that are SigLIP's by what is written beside them."""
    found = {}
    for name in ("unknown", "siglip"):
        folder = found[name] = tmp_path_factory.mktemp(name)
        write_tiny_corpus(folder)
        if name == "siglip":
            note_make(folder, SIGLIP)
        assert train_here(folder, *STREAMABLE, "train.max_steps=1") == 0
    return found


def streamed(monkeypatch, capsys, checkpoint: Path, clips: Path, out: Path) -> tuple[list[str], str]:
    """The warnings of infer.py and of evaluate on these clips, which must be one and the same; and the records."""
    monkeypatch.setattr(
        sys, "argv", ["infer", "--checkpoint", str(checkpoint), "--clip", f"{clips}:0", "--out", str(out)]
    )
    assert infer.main() == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", str(checkpoint), "--data", str(clips)])
    assert evaluate.main() == 0
    again = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == len(again) <= 1
    return [line.partition(" was trained on: ")[2] for line in told], out.read_text()


def test_a_model_of_siglip_s_features_warns_of_clip_s_and_refuses_nothing(trained, tmp_path, monkeypatch, capsys):
    checkpoint = trained["siglip"] / "runs/tiny/last"
    assert read_state(checkpoint).features == {name: str(value) for name, value in SIGLIP.items()}
    clips = scaled(trained["siglip"], tmp_path / "clip", 1) / "val.json"  # the same numbers, so the same records
    own, records = streamed(monkeypatch, capsys, checkpoint, trained["siglip"] / "val.json", tmp_path / "own.jsonl")
    assert own == [] and records
    note_make(clips.parent, CLIP)
    told = streamed(monkeypatch, capsys, checkpoint, clips, tmp_path / "clip.jsonl")
    assert told == (["model clip, not siglip; weights_sha256 c11b, not 5161"], records)


def test_of_unknown_make_another_seed_is_silent_and_another_scale_is_not(trained, tmp_path, monkeypatch, capsys):
    folder = trained["unknown"]
    checkpoint = folder / "runs/tiny/last"
    assert read_state(checkpoint).features == {}
    write_tiny_corpus(tmp_path / "seed", seed=7)
    for clips in (folder / "val.json", tmp_path / "seed/val.json", trained["siglip"] / "val.json"):
        assert streamed(monkeypatch, capsys, checkpoint, clips, tmp_path / "out.jsonl")[0] == []
    clips = scaled(folder, tmp_path / "scaled", 3) / "val.json"
    [told], _ = streamed(monkeypatch, capsys, checkpoint, clips, tmp_path / "out.jsonl")
    assert told.startswith("norm ") and "deviation" in told


@pytest.mark.parametrize("factor", [1, 3])
def test_embeddings_from_stdin_are_judged_by_the_first_sixteen(trained, capsys, factor):
    checkpoint = trained["siglip"] / "runs/tiny/last"
    config, tokenizer, model = infer.load_for_inference(checkpoint)
    source, index = all_clips(trained["siglip"] / "val.json")[2]  # of 24 frames
    clip, rows, _ = source.load(index, 16)
    lines = [json.dumps({"embedding": (factor * row).tolist()}).encode() for row in rows[:, 0]]
    infer.live(infer.StreamSession(model, tokenizer, clip, config), lines, io.StringIO(), str(checkpoint))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [("norm " in line, "was trained on" in line) for line in told] == [(True, True)] * (factor > 1)


def test_training_warns_of_a_validation_set_that_is_not_like_it_and_of_features_that_changed(tmp_path, capsys):
    def told(max_steps: int) -> list[str]:
        assert train_here(tmp_path, *STREAMABLE, f"train.max_steps={max_steps}") == 0
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    def scale(pattern: str, factor: int) -> None:
        """As many bytes as before: resuming is not refused."""
        for path in (tmp_path / "embeddings").glob(pattern):
            np.save(path, np.load(path) * np.float32(factor))

    write_tiny_corpus(tmp_path)
    assert told(1) == []
    scale("val*.npy", 3)
    [of_val] = told(2)
    assert "data.val are not like those of data.train: norm" in of_val
    scale("*.npy", 9)
    then, of_val = told(3)
    assert "step-000002 was trained on: norm" in then and "data.val" in of_val
