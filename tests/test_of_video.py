"""One embedding file for a whole video, from which its clips are cut by absolute frame number."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip
from tiny import VISION_DIM, tiny_config, write_tiny_config, write_tiny_corpus

import train
from prospect import check, kept, leaks
from prospect.build import load_corpus, load_tokenizer
from prospect.clip_files import open_source, parse_clip
from prospect.embeddings import embedding_names
from prospect.errors import ProspectError
from prospect.features import features_of
from prospect.load import load_job
from prospect.packs import pack
from prospect.vision.cuts import Cut, plan_cuts

WIDTH = 3


def numbered(frames: range, vectors: int | None = None) -> np.ndarray:
    """Rows that say which frame they are, [frames, WIDTH] or [frames, vectors, WIDTH]."""
    shape = (len(frames), WIDTH) if vectors is None else (len(frames), vectors, WIDTH)
    return np.array(frames, np.float16).repeat(np.prod(shape[1:])).reshape(shape)


def clip_of(start: int, end: int, **fields) -> dict:
    return raw_clip([("assistant", "Hi", end, end)], start, end, id=f"v_{start}", video_uid="v") | fields


def source_of(folder: Path, *clips: dict, embeddings: Path | None = None):
    (folder / "embeddings").mkdir(exist_ok=True)
    (folder / "clips.json").write_text(json.dumps(clips))
    return open_source(folder / "clips.json", embeddings, False)


def frames_of(source, index: int) -> list[int]:
    return source.load(index, WIDTH)[1][:, 0, 0].tolist()


@pytest.mark.parametrize("name", ["v_embeddings.npy", "v.npy"])
def test_clips_are_cut_from_the_videos_file(tmp_path, name):
    source = source_of(tmp_path, clip_of(0, 9), clip_of(193, 299), clip_of(7, 7))
    np.save(tmp_path / "embeddings" / name, numbered(range(300)))
    assert frames_of(source, 0) == list(range(10))
    assert frames_of(source, 1) == list(range(193, 300))
    assert frames_of(source, 2) == [7]
    np.save(tmp_path / "embeddings/v_0_embeddings.npy", numbered(range(500, 510)))  # its own comes first
    assert frames_of(source, 0) == list(range(500, 510)) and frames_of(source, 2) == [7]


def test_the_clip_says_which_frame_comes_first(tmp_path):
    source = source_of(
        tmp_path,
        clip_of(193, 200, embeddings_start_frame_idx=100),  # of the file that is found by the video's name
        clip_of(40, 42, embeddings="part.npy", embeddings_start_frame_idx=40),
        clip_of(50, 59, embeddings="part.npy", embeddings_start_frame_idx=40),
        clip_of(60, 79, embeddings="own.npy"),  # as ever: row 0 is the clip's first frame
        clip_of(5, 8, id="v", embeddings_start_frame_idx=0),  # its own name and the video's are the same
    )
    np.save(tmp_path / "embeddings/v.npy", numbered(range(100, 300)))
    np.save(tmp_path / "embeddings/part.npy", numbered(range(40, 60), vectors=2))
    np.save(tmp_path / "embeddings/own.npy", numbered(range(60, 80)))
    assert frames_of(source, 0) == list(range(193, 201))
    assert frames_of(source, 1) == [40, 41, 42] and source.load(2, WIDTH)[1].shape == (10, 2, WIDTH)
    assert frames_of(source, 2) == list(range(50, 60)) and frames_of(source, 3) == list(range(60, 80))
    np.save(tmp_path / "embeddings/v.npy", numbered(range(300)))
    assert frames_of(source, 4) == [5, 6, 7, 8]


@pytest.mark.parametrize("first", [-1, 11, 2.5, "0", True])
def test_a_first_frame_that_cannot_be(first):
    clip, problems = parse_clip(clip_of(10, 19, embeddings_start_frame_idx=first), "clips.json", 0)
    [problem] = problems
    assert clip is None and problem.field == "embeddings_start_frame_idx"
    assert problem.what.startswith(f"is {first}, must be from 0 to 10," if type(first) is int else "must be a")


def test_a_video_that_ends_too_early_is_one_line(tmp_path, monkeypatch, capsys):
    clips = [clip_of(0, 9), clip_of(90, 100), clip_of(90, 101, id="a"), clip_of(200, 200, id="b")]
    source = source_of(tmp_path, *clips, clip_of(60, 79, id="c", embeddings_start_frame_idx=50))
    path = tmp_path / "embeddings/v.npy"
    np.save(path, numbered(range(100)))
    clip, rows, warning = source.load(1, WIDTH)  # written end-exclusive
    assert (clip.end_frame, clip.turns[0].end_frame, len(rows)) == (99, 99, 10)
    assert warning == f"{tmp_path}/clips.json, clip v_90: one row fewer than frames; frame 100 is not there"
    monkeypatch.setattr(sys, "argv", ["check", str(tmp_path / "clips.json")])
    assert check.main() == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error")]
    where, has = f"error: {tmp_path}/clips.json, clip ", f"{path} has 100 rows, frames 0..99"
    remedy = "(row r is frame 0 + r of the video: encode all of it, or set embeddings_start_frame_idx)"
    assert lines == [
        f"{where}a, embeddings: {has}; the clip's frames are 90..101 {remedy}",
        f"{where}b, embeddings: {has}; the clip's frames are 200..200 {remedy}",
    ]
    with pytest.raises(ProspectError, match=r"clip a: .* 100 rows, frames 0\.\.99; the clip's frames are 90\.\.101"):
        source.load(2, WIDTH)
    np.save(path, numbered(range(25)))
    with pytest.raises(ProspectError, match=r"has 25 rows, frames 50\.\.74; the clip's frames are 60\.\.79") as caught:
        open_source(tmp_path / "clips.json", None, False).load(4, WIDTH)
    assert caught.value.remedy.startswith("row r is frame 50 + r")


@pytest.mark.parametrize(("fps", "wrong"), [("2", False), ("30000/1001", True), ("1/0", False), ("many", False)])
def test_a_video_encoded_at_another_rate_is_refused(tmp_path, fps, wrong):
    """It has rows enough for every clip. encode writes its rate beside it."""
    source = source_of(tmp_path, clip_of(0, 9), clip_of(0, 99, id="v_own"))
    for name in ("v", "v_own"):  # of the clip's own, the rows are counted
        np.save(tmp_path / f"embeddings/{name}.npy", numbered(range(100)))
        (tmp_path / f"embeddings/{name}.json").write_text(json.dumps({"weights_sha256": "ab", "fps": fps}))
    first, own = (checked.problems for _, _, checked in check.check_all([source], None, 1, keep=False))
    told = f"{tmp_path}/embeddings/v.npy: encoded at 29.97 rows per second, the clip's fps is 2"
    assert [problem.what for problem in first] == [told] * wrong and own == []


def test_only_the_rows_of_the_clip_are_read(tmp_path, monkeypatch):
    """Of a file of 8 GB that takes no room on the disk. Rows that are not finite matter where a clip has them."""
    source = source_of(tmp_path, clip_of(1_999_990, 1_999_999), clip_of(5, 9))
    rows = np.lib.format.open_memmap(tmp_path / "embeddings/v.npy", "w+", np.float16, (2_000_000, 2048))
    rows[1_999_995], rows[100] = 1, np.nan
    del rows
    seen, real = [], check.check_finite
    monkeypatch.setattr(check, "check_finite", lambda rows, where: (seen.append(rows), real(rows, where)))
    found = [checked for _, _, checked in check.check_all([source], None, 1, keep=False)]
    assert [checked.problems for checked in found] == [[], []] and [len(rows) for rows in seen] == [10, 5]
    assert all(isinstance(rows.base, np.memmap) for rows in seen)
    job, _ = load_job(source, 0, 2048)
    assert job.embeddings[:, 0, 7].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert features_of([(source, 0)]).scale["mean"] == pytest.approx(0.1)


# ---- a corpus of videos --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The tiny corpus; its embeddings in videos/, one file for two clips, the second far behind the first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write_tiny_corpus(tmp_path)
    (tmp_path / "videos").mkdir()
    for split in ("train", "val"):
        clips = json.loads((tmp_path / f"{split}.json").read_text())
        films: dict[str, np.ndarray] = {}
        for number, clip in enumerate(clips):
            clip["video_uid"], shift = f"{split}-film{number // 2}", 1000 * (number % 2)
            for turn in clip["conversation"]:
                turn["start_frame"], turn["end_frame"] = turn["start_frame"] + shift, turn["end_frame"] + shift
            first, last = (clip[name] + shift for name in ("start_frame_idx", "end_frame_idx"))
            clip["start_frame_idx"], clip["end_frame_idx"] = first, last
            film = films.setdefault(clip["video_uid"], np.full((1100, VISION_DIM), np.nan, np.float32))
            film[first : last + 1] = np.load(tmp_path / f"embeddings/{clip['id']}_embeddings.npy")
        for name, film in films.items():
            np.save(tmp_path / f"videos/{name}.npy", film)
        (tmp_path / f"{split}.json").write_text(json.dumps(clips))
    load_tokenizer(tiny_config(tmp_path))
    shutil.rmtree(tmp_path / ".prospect", ignore_errors=True)
    return tmp_path


def corpus_of(folder: Path, embeddings: str, split: str = "train"):
    config = tiny_config(folder, f"data.embeddings={folder / embeddings}")
    return load_corpus(config, load_tokenizer(config), split)


@pytest.mark.parametrize("packed", [False, True])
def test_videos_give_the_sequences_that_files_of_clips_give(folder, packed):
    if packed:
        pack(folder / "videos", folder / "packed")
    for split in ("train", "val"):
        alone = corpus_of(folder, "embeddings", split)
        films = corpus_of(folder, "packed" if packed else "videos", split)
        assert len(films) == len(alone) > 2
        for index in range(len(alone)):
            one, other = alone[1, index], films[1, index]
            assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(
                one.image_embeds, other.image_embeds
            )
            assert all(np.array_equal(one.labels[key], other.labels[key]) for key in one.labels)


def test_what_was_found_about_a_video_is_kept_until_it_changes(folder, monkeypatch):
    done = []
    real = check.check_clip

    def find(source, index, given):
        done.append(index)
        return real(source, index, given)

    find.__module__ = check.__name__
    monkeypatch.setattr(check, "check_clip", find)
    monkeypatch.setattr(kept, "settled", lambda stamp, at: True)
    corpus_of(folder, "videos")
    assert sorted(done) == list(range(12))
    done.clear()
    corpus_of(folder, "videos")
    assert done == []
    path = folder / "videos/train-film2.npy"
    film = np.load(path)
    os.utime(path)
    corpus_of(folder, "videos")
    assert done == [4, 5]  # both of its clips
    done.clear()
    first = json.loads((folder / "train.json").read_text())[7]["start_frame_idx"]
    np.save(folder / "videos/clip7.npy", np.load(folder / "embeddings/clip7_embeddings.npy"))  # of its own: comes first
    film[np.isfinite(film).all(axis=1).nonzero()[0][-1]] = np.inf
    np.save(path, film)
    with pytest.raises(ProspectError, match="train.json, clip clip5.* infinite values in 1 of"):
        corpus_of(folder, "videos")
    assert done == [4, 5, 7] and first > 1000


def test_a_video_in_training_and_validation_is_a_leak(folder, monkeypatch, capsys):
    """Two clips of one file in one split are none, which the other tests show."""
    val = json.loads((folder / "val.json").read_text())
    train_clips = json.loads((folder / "train.json").read_text())
    for clip in val[:2]:
        clip["video_uid"] = train_clips[2]["video_uid"]
    (folder / "val.json").write_text(json.dumps(val))
    film, more = (np.load(folder / f"videos/{name}.npy") for name in ("train-film1", "val-film0"))
    np.save(folder / "videos/train-film1.npy", np.where(np.isfinite(more), more, film))
    config = write_tiny_config(folder, f"data.embeddings={folder / 'videos'}")
    monkeypatch.setattr(sys, "argv", ["train.py", str(config), "--dry-run"])
    monkeypatch.setattr(leaks, "digest", lambda path: pytest.fail("a file is read though the video tells"))
    with pytest.raises(ProspectError, match="2 of 3 validation clips leak .* has the same video 'train-film1'"):
        train.main()


def test_a_file_that_many_clips_share_is_read_once_to_find_leaks(tmp_path, monkeypatch):
    read, real = [], leaks.digest
    monkeypatch.setattr(leaks, "digest", lambda path: (read.append(str(path)), real(path))[1])
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "film.npy").write_text("the same rows")
    of = [leaks.Origin(f"t{n}", f"t{n}", f"film {n}", tmp_path / "train/film.npy") for n in range(50)]
    assert leaks.leaks(of, [leaks.Origin("v", "v", "another", tmp_path / "val/film.npy")]) == [
        "v has the same embeddings 'film.npy' as t49"
    ]
    assert read == [str(tmp_path / "train/film.npy"), str(tmp_path / "val/film.npy")]


# ---- names, and files that are written -----------------------------------------------------------


def test_the_names_that_are_tried():
    endings = (".pkl", ".npy", ".safetensors")
    assert embedding_names("v_0", None, "v") == [
        f"{stem}{ending}" for stem in ("v_0_embeddings", "v_0", "v_embeddings", "v") for ending in endings
    ]
    assert embedding_names("v", None, "v") == embedding_names("v", None, "a/v") == embedding_names("v", None)
    assert embedding_names("v_0", "x.npy", "v") == ["x.npy"]


def test_encoding_writes_the_video_for_clips_that_say_so(tmp_path):
    both = [clip_of(10, 19, embeddings_start_frame_idx=5), clip_of(30, 39, embeddings_start_frame_idx=5)]
    (tmp_path / "clips.json").write_text(json.dumps([*both, clip_of(50, 59), clip_of(60, 69, embeddings="own.npy")]))
    video, out = tmp_path / "v.mp4", tmp_path / "out"
    assert plan_cuts([video], out, "npy", tmp_path / "clips.json") == {
        video: [
            Cut(out / "v_embeddings.npy", 5, None),
            Cut(out / "v_50_embeddings.npy", 50, 59),
            Cut(out / "own.npy", 60, 69),
        ]
    }
    for begin in (11, -1, "5"):
        (tmp_path / "clips.json").write_text(json.dumps([clip_of(10, 19, embeddings_start_frame_idx=begin)]))
        with pytest.raises(ProspectError, match="cannot be written .run python -m prospect.check"):
            plan_cuts([video], out, "npy", tmp_path / "clips.json")
