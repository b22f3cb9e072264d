"""The checker: every problem of every clip as one line, the same checks before training, and little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip, read
from tiny import tiny_config, train_here, write_tiny_corpus

from prospect import check, kept
from prospect.build import load_corpus, load_tokenizer
from prospect.clip_files import parse_clip
from prospect.config import DataConfig
from prospect.data import Corpus
from prospect.errors import ProspectError

ROOT = Path(__file__).parents[1]


def write_clips(path: Path, clips: list, width: int = 4) -> Path:
    """The clips as JSON or JSONL, and embeddings [frames, width] of ones for each that has none yet."""
    path.parent.mkdir(exist_ok=True)
    (path.parent / "embeddings").mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    else:
        path.write_text(json.dumps(clips))
    for clip in clips:
        file = path.parent / "embeddings" / f"{clip['id']}_embeddings.npy"
        if not file.exists():
            np.save(file, np.ones((clip["end_frame_idx"] - clip["start_frame_idx"] + 1, width), np.float16))
    return path


def good(id: str) -> dict:
    return raw_clip([("user", "Hi", 5, 6), ("assistant", "Hello", 6, 7)], 5, 9, id=id)


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, list[str]]:
    """Exit status and lines of `python -m prospect.check ...`, but for the two that name the next command after status
    0; nothing may go to stderr."""
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
    status = check.main()
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    if status == 0:
        assert lines[-2] == "next:" and lines[-1].startswith("python train.py config.yaml ")
        del lines[-2:]
    assert "next:" not in lines
    return status, lines


@pytest.mark.parametrize("name", ["clips.json", "clips.jsonl"])
def test_a_good_file_is_two_lines(tmp_path, monkeypatch, capsys, name):
    path = write_clips(tmp_path / name, [good("a"), good("b")])
    scale = f"{path}: mean norm 2, mean 1, deviation 0"  # vectors of four ones
    total = "2 clips, 10 frames: 0 errors, 0 warnings; embeddings 4 wide"
    assert run(monkeypatch, capsys, path) == (0, [scale, total])


def corrupt(folder: Path) -> Path:
    """Clips a to e with two problems of the clip itself, one warning, three of embeddings, and one id twice."""
    a = raw_clip([("boss", "Hi", 5, 6), ("user", "", 5, 6)], 5, 9, id="a")
    c = raw_clip([("user", "Hi", 3, 6)], 5, 9, id="c")
    path = write_clips(folder / "clips.json", [a, good("b"), c, good("d"), good("e"), good("b")])
    np.save(folder / "embeddings" / "a_embeddings.npy", np.float16([[1, 1], [np.nan, np.inf], [1, np.nan]]))
    np.save(folder / "embeddings" / "d_embeddings.npy", np.ones((2, 4), np.float16))
    (folder / "embeddings" / "e_embeddings.npy").unlink()
    return path


def test_every_problem_is_a_line_that_names_file_clip_turn_and_field(tmp_path, monkeypatch, capsys):
    path, rows = corrupt(tmp_path), tmp_path / "embeddings"
    status, lines = run(monkeypatch, capsys, path, "--vision-dim", 4)
    assert status == 2
    tried = ", ".join(
        str(rows / f"e{middle}{end}") for middle in ("_embeddings", "") for end in (".pkl", ".npy", ".safetensors")
    )
    assert lines == [
        f"error: {path}, clip a, turn 0, role: unknown role 'boss' (one of system, user, assistant, DST_UPDATE)",
        f"error: {path}, clip a, turn 1, content: is empty (give it text or leave the turn out)",
        f"error: {path}, clip a, embeddings: {rows}/a_embeddings.npy: embeddings are 2 wide, model.vision_dim is 4"
        " (set model.vision_dim=2 or encode again)",
        f"error: {path}, clip a, embeddings: {rows}/a_embeddings.npy: 2 NaN and 1 infinite values in 2 of 3 rows,"
        " first in row 1 (embed these frames again; float16 overflows above 65504)",
        f"warning: {path}, clip c, turn 0: frames 3..6 reach outside the clip's 5..9 and were clamped (mend the range)",
        f"error: {path}, clip d, embeddings: the embedding file has 2 rows, frames 5..9 are 5"
        " (row r is frame start_frame_idx + r: encode the clip again)",
        f"error: {path}, clip e, embeddings: no embeddings at {tried}"
        " (put the file there, or set data.embeddings to the directory that holds it)",
        f"error: {path}, clip b, id: the id 'b' occurs twice (also in {path}) (give each clip an id of its own)",
        "kind of problem               errors  warnings",
        "duplicate id                       1         0",
        "empty text                         1         0",
        "no embeddings                      1         0",
        "not finite                         1         0",
        "unknown role                       1         0",
        "wrong row count                    1         0",
        "wrong width                        1         0",
        "turn clamped                       0         1",
        f"{path}: mean norm 2, mean 1, deviation 0",
        "6 clips, 25 frames: 7 errors, 1 warnings; embeddings 2, 4 wide",
    ]


def test_strict_takes_warnings_for_errors(tmp_path, monkeypatch, capsys):
    path = write_clips(tmp_path / "clips.json", [raw_clip([("user", "Hi", 3, 6)], 5, 9, id="c")])
    np.save(tmp_path / "embeddings" / "c_embeddings.npy", np.ones((4, 4), np.float16))
    status, lines = run(monkeypatch, capsys, path)
    assert status == 0 and lines[-1] == "1 clips, 5 frames: 0 errors, 2 warnings; embeddings 4 wide"
    assert lines[1].startswith(f"warning: {path}, clip c: one row fewer than frames; frame 9 is not there (")
    assert run(monkeypatch, capsys, path, "--strict") == (2, lines)


def test_several_files_and_one_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    one = write_clips(tmp_path / "one" / "clips.json", [good("a")])
    two = write_clips(tmp_path / "two" / "clips.jsonl", [good("a"), good("b")])
    with open(two, "a") as file:
        file.write('{"id": "c", ')
    status, lines = run(monkeypatch, capsys, one, tmp_path / "none.json", two)
    assert status == 2
    assert lines[0] == f"error: {tmp_path}/none.json: no such clip file (check data.train / data.val / --clip)"
    assert (
        lines[1]
        == f"error: {two}, clip a, id: the id 'a' occurs twice (also in {one}) (give each clip an id of its own)"
    )
    assert lines[2].startswith(f"error: {two}, clip 2: is not JSON: ")
    assert lines[-1] == "4 clips, 15 frames: 3 errors, 0 warnings; embeddings 4 wide"


def test_one_folder_for_all_embeddings_and_files_outside(tmp_path, monkeypatch, capsys):
    path = write_clips(tmp_path / "a" / "clips.json", [good("a") | {"embeddings": "../x.npy"}])
    np.save(tmp_path / "x.npy", np.ones((5, 4), np.float16))
    folder = tmp_path / "other"
    folder.mkdir()
    status, lines = run(monkeypatch, capsys, path, "--embeddings", folder)
    assert status == 2 and "lie outside the directory" in lines[0]
    status, lines = run(monkeypatch, capsys, path, "--embeddings", folder, "--embeddings-outside")
    assert status == 0


def test_widths_must_agree_where_none_is_asked_for(tmp_path, monkeypatch, capsys):
    path = write_clips(tmp_path / "clips.json", [good("a"), good("b"), good("c")])
    np.save(tmp_path / "embeddings" / "b_embeddings.npy", np.ones((5, 3), np.float16))
    status, lines = run(monkeypatch, capsys, path)
    assert status == 2
    assert lines[0].startswith("error: embeddings are not all of one width: 2 files of 4, 1 files of 3 (")


def test_processes_find_the_same_in_the_same_order(tmp_path, monkeypatch, capsys):
    path = corrupt(tmp_path)
    more = write_clips(tmp_path / "more.jsonl", [good(f"more{i}") for i in range(40)] + [good("c")])
    alone = run(monkeypatch, capsys, path, more, "--workers", 1)
    monkeypatch.setattr(kept, "WORTH_PROCESSES", 1)
    assert run(monkeypatch, capsys, path, more, "--workers", 2) == alone
    assert alone[0] == 2 and alone[1][-1].startswith("47 clips, 230 frames: 8 errors")


def test_the_next_command_trains_on_what_was_checked(tmp_path, monkeypatch, capsys):
    update = [("DST_UPDATE", "S1->start", 5, 6)]
    train, val = (
        write_clips(tmp_path / f"{name}.json", [raw_clip(turns, 5, 9, id=name)], width=8)
        for name, turns in (("one", update), ("two", []))
    )

    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
        assert check.main() == 0
        return capsys.readouterr().out.split("next:\n")[1]

    begin = "python train.py config.yaml run.name=one data.sample=null"
    assert command(train, val) == f"{begin} data.train={train} data.val={val} model.vision_dim=8\n"
    folder = tmp_path / "embeddings"
    assert command(val, "--embeddings", folder) == (
        f"{begin.replace('one', 'two')} data.train={val} data.val=VAL.json data.embeddings={folder} model.vision_dim=8"
        " data.dst=false\n"  # there is no update in it
    )


# ---- steps' times against updates ----------------------------------------------------------------


def timed(*times: tuple[float | None, float | None], turns: tuple = ()) -> dict:
    steps = [{"id": f"S{n}", "name": "do", "start_ts": start, "end_ts": end} for n, (start, end) in enumerate(times, 1)]
    return raw_clip(turns, 0, 99, dst=steps)


START, COMPLETE = ("DST_UPDATE", "S1->start", 19, 21), ("DST_UPDATE", "S1->complete", 39, 41)  # 10 and 20 s


@pytest.mark.parametrize(
    "clip, said",
    [
        (timed((10.0, 20.0), turns=[START, COMPLETE]), None),
        (timed((7.6, 22.4), turns=[START, COMPLETE]), None),  # within two seconds of 9.5 and 20.5 s
        (timed((7.4, 20.0), turns=[START, COMPLETE]), "S1 has its start at 7.4 s, and the update at 10.5 s"),
        (timed((110.0, 120.0), turns=[START, COMPLETE]), "start at 110 s, and the update at 10.5 s; and 1 more"),
        (timed((10000.0, 20000.0), turns=[START, COMPLETE]), "start at 10000 s, and the update at 10.5 s; and 1 more"),
        (timed((10.0, 20.0), turns=[START]), "S1 has its complete at 20 s, and no update"),
        (timed((10.0, 49.0), turns=[START]), None),  # at the very end of the clip, 50 s, it may be missing
        (timed((10.0, None), (None, None)), "its steps have times, but no DST_UPDATE turn moves them"),
        (timed((110.0, 120.0)), None),  # the steps of another part of the video
        (timed((None, None)), None),
    ],
)
def test_times_and_updates_that_disagree_are_a_warning(tmp_path, clip, said):
    found = check.step_time_problems(read(clip), tmp_path / "clips.json")
    assert [problem.fatal for problem in found] == ([] if said is None else [False])
    for problem in found:
        assert said in problem.what
        assert f"python -m prospect.convert states {tmp_path}/clips.json OUT.json" in problem.remedy


# ---- the documentation ---------------------------------------------------------------------------


def test_the_clips_of_the_documentation_are_valid_and_the_smallest_has_no_field_too_many():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    smallest, full = (json.loads(block.split("```")[0]) for block in page.split("```json\n")[1:])
    for raw in (smallest, full):
        assert parse_clip(raw, "docs/data.md", 0)[1] == []
    for name in smallest:
        left = {field: value for field, value in smallest.items() if field != name}
        assert parse_clip(left, "docs/data.md", 0)[0] is None, name
    assert check.step_time_problems(read(full), ROOT / "x.json") == []


# ---- a researcher's first wrong turns ------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, said",
    [
        (750, "750 rows, frames 0..49 are 50 (about 30 rows for a second of the clip, not 2: encode at the clip's fps"),
        (25, "25 rows, frames 0..49 are 50 (about 1 rows for a second of the clip, not 2: encode at the clip's fps"),
        (48, "48 rows, frames 0..49 are 50 (row r is frame start_frame_idx + r: encode the clip again)"),
        (49, "one row fewer than frames; frame 49 is not there (nothing to do where the file's end_frame_idx is excl"),
    ],
)
def test_features_for_another_fps_and_a_missing_frame(tmp_path, monkeypatch, capsys, rows, said):
    path = write_clips(tmp_path / "clips.json", [raw_clip([], 0, 49, id="a")])
    np.save(tmp_path / "embeddings" / "a_embeddings.npy", np.ones((rows, 4), np.float16))
    status, lines = run(monkeypatch, capsys, path)
    assert status == (0 if rows == 49 else 2) and said in lines[0] and sum("row" in line for line in lines) == 2


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"dst": [{"name": "do"}]}, "dst[0], id: is missing (an id like S1; python -m prospect.convert states IN OUT"),
        (
            {"conversation": [{"role": "user", "content": "Hi", "time": 3000}]},
            "frames 5999..6001 lie outside the clip's 5..9 (times are seconds; divide milliseconds by 1000)",
        ),
        (
            {"conversation": [{"role": "user", "content": "Hi", "time": 30}]},
            "frames 59..61 lie outside the clip's 5..9 (frame numbers are absolute; fix or leave out the turn)",
        ),
    ],
)
def test_steps_without_ids_and_times_in_milliseconds(tmp_path, monkeypatch, capsys, fields, said):
    path = write_clips(tmp_path / "clips.json", [good("a") | fields])
    status, lines = run(monkeypatch, capsys, path)
    assert status == 2 and said in lines[0] and lines[-1].startswith("1 clips, 0 frames: 1 errors, 0 warnings")


# ---- before training -----------------------------------------------------------------------------


def corpus_of(path: Path, tokenizer, **config) -> Corpus:
    return Corpus([str(path)], DataConfig(max_seq_len=400, **config), tokenizer, 4, rate=0.5, seed=0)


def test_training_stops_at_the_first_and_counts_the_others(tmp_path, plain):
    path = corrupt(tmp_path)
    with pytest.raises(ProspectError) as raised:
        corpus_of(path, plain)
    assert str(raised.value) == (
        f"{path}, clip a, turn 0, role: unknown role 'boss' (one of system, user, assistant, DST_UPDATE; "
        f"6 more problem(s), in 4 clip(s) in all: python -m prospect.check {path} --vision-dim 4)"
    )


def test_training_leaves_bad_clips_out_and_names_them(tmp_path, plain):
    path = corrupt(tmp_path)
    corpus = corpus_of(path, plain, on_bad="skip")
    assert [entry.clip for entry in corpus.entries] == [1, 2]
    clips = [line.removeprefix(f"{path}, clip ")[0] for line in corpus.skipped]
    assert clips == ["a", "d", "e", "b"]
    assert corpus.skipped[0].endswith("DST_UPDATE); and 3 more problem(s) of this clip")
    assert "clip c, turn 0: frames 3..6" in corpus.warnings[0]
    assert corpus.warnings[1:] == ["4 of 6 clips are skipped (data.on_bad=skip)"]


def test_warnings_are_told_once_of_a_kind(tmp_path, plain):
    path = write_clips(tmp_path / "clips.json", [raw_clip([("user", "Hi", 3, 6)], 5, 9, id=id) for id in "abc"])
    [warning] = corpus_of(path, plain).warnings
    assert "clip a, turn 0: frames 3..6" in warning
    assert warning.endswith(f"; and 2 more like it: python -m prospect.check {path} --vision-dim 4")


# ---- one line, one terminal ----------------------------------------------------------------------


def test_an_error_line_has_nothing_that_could_steer_a_terminal():
    error = ProspectError("unknown role '\x1b[2J\x9b\u202e\x00\x07'", where="a\nb\u2028c", remedy="é 積木 \U0001f642\r")
    assert str(error) == "a b c: unknown role '?[2J????' (é 積木 \U0001f642 )"


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_jsonl_file_is_never_in_memory(tmp_path):
    """200 MB in 2,000 lines: the process grows by a few clips' worth over what it takes for a small file."""
    np.save(tmp_path / "rows.npy", np.ones((5, 4), np.float16))
    for name, count in (("small", 2), ("large", 2000)):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for number in range(count):
                clip = good(f"clip{number}") | {"embeddings": "rows.npy", "notes": "x" * 100_000}
                file.write(json.dumps(clip) + "\n")
    assert os.path.getsize(tmp_path / "large.jsonl") > 200e6
    code = (
        "import resource, sys; from prospect import check; sys.argv[0] = 'check'; status = check.main(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    peaks = {}
    for name, clips in (("small", 2), ("large", 2000)):
        command = [
            sys.executable,
            "-c",
            code,
            str(tmp_path / f"{name}.jsonl"),
            "--embeddings",
            str(tmp_path),
            "--workers",
            "1",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        *_, total, _, _, peak = done.stdout.splitlines()
        assert total == f"{clips} clips, {5 * clips} frames: 0 errors, 0 warnings; embeddings 4 wide"
        peaks[name] = int(peak) / 1024  # MB
    assert peaks["large"] < peaks["small"] + 20, peaks


# ---- task state without updates ------------------------------------------------------------------


def test_task_state_is_not_learned_from_clips_without_updates(tmp_path):
    write_tiny_corpus(tmp_path)
    for name in ("train", "val"):
        clips = json.loads((tmp_path / f"{name}.json").read_text())
        for clip in clips:
            clip["conversation"] = [turn for turn in clip["conversation"] if turn["role"] != "DST_UPDATE"]
        (tmp_path / f"{name}.json").write_text(json.dumps(clips))
    config = tiny_config(tmp_path)
    with pytest.raises(ProspectError) as raised:
        load_tokenizer(config)
    assert str(raised.value) == (
        f"{tmp_path}/train.json: no clip has a DST_UPDATE turn: with data.dst=true a model would learn never to update"
        " (make them from step times, python -m prospect.convert states IN OUT; step times from dialogues,"
        " python -m prospect.convert steps IN OUT; or train without task state, data.dst=false)"
    )
    assert not (tmp_path / "runs").exists()
    tokenizer = load_tokenizer(tiny_config(tmp_path, "data.dst=false"))
    assert len(load_corpus(tiny_config(tmp_path, "data.dst=false"), tokenizer, "train"))
    with pytest.raises(ProspectError, match="no clip has a DST_UPDATE turn"):  # a tokenizer is there already
        train_here(tmp_path)
    assert len(load_corpus(config, tokenizer, "train"))  # to look at such clips is no mistake
