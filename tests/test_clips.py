"""Clip files: what is read, what is repaired with a warning, and what is refused, naming file, clip, turn and field."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip, read

from prospect import clip_files
from prospect.clip_files import ClipFile, fit_rows, load_embeddings, open_source, parse_clip
from prospect.errors import ProspectError

REAL_CLIP = Path(__file__).resolve().parents[2] / "shared" / "data" / "assembly101_clip.json"


def update(*pairs: str) -> list[dict]:
    """update("S1 start") is the content of a DST_UPDATE turn."""
    return [dict(zip(("id", "transition"), pair.split(), strict=True)) for pair in pairs]


def problems_of(raw) -> list:
    return parse_clip(raw, "clips.json", 0)[1]


def test_a_clip_in_full():
    raw = raw_clip(
        [("system", "Be kind.", 0, 1), ("user", " Hi ", 10, 12), ("DST_UPDATE", update("S1 start"), 11, 12)],
        10,
        20,
        inferred_goal="A goal",
        inferred_knowledge="A recipe",
        dataset="d",
        quality=3.5,
    )
    raw["dst"][0] |= {"start_ts": 5.5, "end_ts": 6, "type": "step"}
    clip = read(raw)
    assert (clip.id, clip.video_uid, clip.dataset, clip.fps) == ("clip", "clip", "d", 2)
    assert (clip.start_frame, clip.end_frame, clip.num_frames) == (10, 20, 11)
    assert (clip.goal, clip.knowledge, clip.extra) == ("A goal", "A recipe", {"quality": 3.5})
    assert [(t.role, t.text, t.start_frame, t.end_frame, t.index) for t in clip.turns] == [
        ("system", "Be kind.", 0, 0, 0),  # prompt text: its frames 0..1 mean nothing
        ("user", "Hi", 10, 12, 1),
        ("DST_UPDATE", "", 11, 12, 2),
    ]
    assert [(t.id, t.transition) for t in clip.turns[2].transitions] == [("S1", "start")]
    assert [(s.id, s.name, s.start_ts, s.end_ts) for s in clip.steps] == [
        ("S1", "one", 5.5, 6),
        ("S2", "two", None, None),
    ]
    assert clip.seconds(13) == 6.5


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"video_uid": "v", "clip_idx": 3}, "v_3"),
        ({"video_uid": "v"}, "v_0"),
        ({"video_uid": "v", "clip_idx": 3, "id": "own"}, "own"),
        ({"video_uid": "v", "clip_idx": 3, "id": None}, "v_3"),
        ({"id": 7}, "7"),
    ],
)
def test_the_id(fields, expected):
    raw = raw_clip([], 0, 1)
    del raw["id"]
    assert read(raw | fields).id == expected


def test_a_turn_in_other_names():
    """`from`, `value` and `timestamp` are `role`, `content` and `time`, alone or beside them, if they agree."""
    raw = raw_clip([], 190, 410)
    raw["conversation"] = [
        {"from": "user", "value": "Hi", "timestamp": 97.2},
        {"from": "DST_UPDATE", "value": update("S1 start"), "time": 106.8},
        {"role": "assistant", "from": "assistant", "content": "Go.", "value": "Go.", "time": 112.7, "timestamp": 112.7},
        {"from": None, "role": "user", "content": "Now?", "value": None, "time": 120, "timestamp": None},
    ]
    given = json.dumps(raw)
    assert [(turn.role, turn.text, turn.start_frame, turn.end_frame) for turn in read(raw).turns] == [
        ("user", "Hi", 193, 195),  # int(96.7 * 2), int(97.7 * 2)
        ("DST_UPDATE", "", 212, 214),
        ("assistant", "Go.", 224, 226),
        ("user", "Now?", 239, 241),
    ]
    assert json.dumps(raw) == given  # the caller's object is not written to


@pytest.mark.parametrize("ours, other", [("role", "from"), ("content", "value"), ("time", "timestamp")])
def test_a_field_with_two_values(ours, other):
    turn = {"role": "user", "content": "Hi", "time": 97.2}
    values = {"role": "assistant", "content": "Ho", "time": 97.3}
    raw = raw_clip([], 190, 410)
    raw["conversation"] = [turn | {other: values[ours]}]
    clip, [problem] = parse_clip(raw, "clips.json", 0)
    assert clip is None and (problem.kind, problem.field) == ("two values", f"turn 0, {ours}")
    assert repr(turn[ours]) in problem.what and repr(values[ours]) in problem.what and f"`{other}`" in problem.what


@pytest.mark.parametrize(
    "time, fps, frames",
    [
        (97.2, 2, (193, 195)),  # int(96.7*2), int(97.7*2)
        (106.8, 2, (212, 214)),
        (112.7, 2, (224, 226)),
        (100, 2, (199, 201)),
        (100.25, 4, (399, 403)),
    ],
)
def test_a_turn_with_only_a_time(time, fps, frames):
    raw = raw_clip([], 190, 410, fps=fps)
    raw["conversation"] = [{"role": "assistant", "content": "Hi", "time": time}]
    [turn] = read(raw).turns
    assert (turn.start_frame, turn.end_frame) == frames


def test_frames_are_believed_before_time():
    raw = raw_clip([("user", "Hi", 5, 6)], 0, 20)
    raw["conversation"][0]["time"] = 8.0
    [turn] = read(raw).turns
    assert (turn.start_frame, turn.end_frame) == (5, 6)


@pytest.mark.parametrize(
    "given, kept",
    [((8, 12), (10, 12)), ((19, 25), (19, 20)), ((8, 10), (10, 10)), ((20, 22), (20, 20)), ((1, 99), (10, 20))],
)
def test_a_turn_that_reaches_outside_is_clamped_and_said(given, kept):
    clip, problems = parse_clip(raw_clip([("user", "Hi", *given)], 10, 20), "clips.json", 0)
    assert (clip.turns[0].start_frame, clip.turns[0].end_frame) == kept
    [problem] = problems
    assert not problem.fatal
    assert str(problem.error()) == (
        f"clips.json, clip clip, turn 0: frames {given[0]}..{given[1]} reach outside the clip's 10..20 "
        "and were clamped (mend the range)"
    )


@pytest.mark.parametrize("given", [(8, 9), (21, 22)])
def test_a_turn_wholly_outside_is_an_error(given):
    [problem] = problems_of(raw_clip([("user", "Hi", *given)], 10, 20))
    assert problem.fatal and f"frames {given[0]}..{given[1]} lie outside the clip's 10..20" in problem.what


def broken(**fields) -> dict:
    return raw_clip([], 10, 20) | fields


def turn(**fields) -> dict:
    return broken(conversation=[{"role": "user", "content": "Hi", "start_frame": 10, "end_frame": 11} | fields])


@pytest.mark.parametrize(
    "raw, field, what",
    [
        (3, "", "must be a JSON object, not int"),
        ([], "", "must be a JSON object, not list"),
        (broken(fps=0), "fps", "above 0"),
        (broken(fps="2"), "fps", "must be a number"),
        (broken(fps=True), "fps", "must be a number"),
        (broken(fps=float("inf")), "fps", "out of range"),
        (broken(end_frame_idx=10**400), "end_frame_idx", "out of range"),
        (broken(start_frame_idx=None), "start_frame_idx", "must be a number, not None"),
        (broken(start_frame_idx=10.5), "start_frame_idx", "whole number"),
        (broken(start_frame_idx=-1), "start_frame_idx", "is -1"),
        (broken(start_frame_idx=21), "end_frame_idx", "20 is before start_frame_idx 21"),
        (broken(end_frame_idx=3_000_000), "end_frame_idx", "more than 2000000"),
        (broken(id=["a"]), "id", "must be text"),
        (broken(id=""), "id", "is empty"),
        (broken(embeddings=3), "embeddings", "must be a path"),
        (broken(conversation=None), "conversation", "is missing"),
        (broken(conversation={}), "conversation", "must be a list"),
        (broken(dst={"id": "S1"}), "dst", "must be a list of steps"),
        (broken(dst=[{"id": "S1", "name": "a"}, {"id": "S1", "name": "b"}]), "dst[1], id", "occurs twice"),
        (broken(dst=[{"id": "S1,S2", "name": "a"}]), "dst[0], id", "cannot be written in an update"),
        (broken(dst=[{"id": "S->1", "name": "a"}]), "dst[0], id", "cannot be written in an update"),
        (broken(dst=[{"id": "S1"}]), "dst[0], name", "must be text"),
        (broken(inferred_goal=3), "inferred_goal", "must be text"),
        (turn(role="frames"), "turn 0, role", "unknown role 'frames'"),
        (turn(role=["user"]), "turn 0, role", "unknown role"),
        (turn(content=None), "turn 0, content", "must be text"),
        (turn(content=" \n"), "turn 0, content", "is empty"),
        (turn(content="\ud800"), "turn 0, content", "half a surrogate pair"),
        (turn(content="a" * 100_001), "turn 0, content", "more than 100000"),
        (turn(start_frame=None, end_frame=None), "turn 0", "has neither"),
        (turn(end_frame=None), "turn 0, end_frame", "must be a number"),
        (turn(end_frame=9), "turn 0, end_frame", "9 is before start_frame 10"),
        (turn(end_frame=10.5), "turn 0, end_frame", "whole number"),
        (turn(role="DST_UPDATE", content=[]), "turn 0, content", "not empty"),
        (turn(role="DST_UPDATE", content="S1"), "turn 0, content", "not of the form"),
        (turn(role="DST_UPDATE", content=[{"id": "S1", "transition": []}]), "turn 0, content", "cannot read"),
        (turn(role="DST_UPDATE", content=[{"id": "S1", "transition": "stop"}]), "turn 0, content", "cannot read"),
        (turn(role="DST_UPDATE", content=update("S9 start")), "turn 0", "unknown step 'S9'"),
        (turn(role="DST_UPDATE", content=update("S1 start", "S1 start")), "turn 0", "cannot start S1"),
        (broken(conversation=[3]), "turn 0", "must be an object"),
    ],
)
def test_what_is_refused(raw, field, what):
    fatal = [problem for problem in problems_of(raw) if problem.fatal]
    assert [problem.field for problem in fatal] == [field]
    assert what in fatal[0].what
    line = str(fatal[0].error())
    assert line.startswith("clips.json, clip ") and "\n" not in line and line.endswith(")")


def test_all_problems_are_told_at_once():
    raw = broken(fps=0, conversation=[{"role": "boss"}, {"role": "user", "content": ""}], dst=[{"id": 1, "name": "a"}])
    assert {problem.field for problem in problems_of(raw)} >= {"fps", "turn 0, role", "turn 1, content", "dst[0], id"}


def test_deep_nesting_is_refused_and_does_not_exhaust_the_stack():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert problems_of(broken(extra=deep))[0].kind == "nested too deeply"


# ---- the state -----------------------------------------------------------------------------------


def test_the_initial_state_by_each_kind_of_evidence():
    raw = raw_clip(
        [
            ("DST_UPDATE", update("S1 complete"), 110, 111),
            ("DST_UPDATE", update("S2 start"), 112, 113),
            ("assistant", "Well done.", 114, 115),
        ],
        100,
        120,
        steps=6,
        initial_dst_state={"S2": "completed"},  # in real files the state at the end: never read
    )
    raw["conversation"][2]["dst_state"] = {"S1": "completed", "S3": "completed"}
    raw["dst"][3] |= {"start_ts": 10.0, "end_ts": 49.5}  # over before 100 / 2 fps = 50 s
    raw["dst"][4] |= {"start_ts": 49.5, "end_ts": 90.0}
    clip = read(raw)
    assert clip.initial_state == {
        "S1": "in_progress",  # it is completed first
        "S2": "not_started",  # it is started first
        "S3": "completed",  # a snapshot says so, and it never moves
        "S4": "completed",  # by its times
        "S5": "in_progress",
        "S6": "not_started",
    }


def test_a_snapshot_before_or_after_its_turn_is_believed_in_silence():
    raw = raw_clip([("DST_UPDATE", update("S1 start"), 1, 2), ("DST_UPDATE", update("S1 complete"), 3, 4)], 0, 9)
    raw["conversation"][0]["dst_state"] = {"S1": "not_started"}  # before
    raw["conversation"][1]["dst_state"] = {"S1": "completed"}  # after
    assert problems_of(raw) == []


def test_a_snapshot_that_is_neither_is_reported_and_not_followed():
    raw = raw_clip([("DST_UPDATE", update("S1 start"), 1, 2)], 0, 9)
    raw["conversation"][0]["dst_state"] = {"S1": "completed", "S2": "not_started"}
    clip, [problem] = parse_clip(raw, "clips.json", 0)
    assert not problem.fatal and problem.what == "says S1 is 'completed'; by the transitions it is in_progress"
    assert clip.state_before(9) == {"S1": "in_progress", "S2": "not_started"}


def test_an_unreadable_snapshot_is_a_warning():
    raw = raw_clip([("user", "Hi", 1, 2)], 0, 9)
    raw["conversation"][0]["dst_state"] = {"S1": ["completed"]}
    [problem] = problems_of(raw)
    assert not problem.fatal and problem.kind == "bad snapshot"


def test_the_state_before_a_frame():
    turns = [
        ("DST_UPDATE", update("S1 start"), 1, 3),
        ("DST_UPDATE", update("S1 complete"), 5, 6),
        ("DST_UPDATE", "S2->start", 5, 6),
    ]
    clip = read(raw_clip(turns, 0, 9))
    states = [tuple(clip.state_before(frame).values()) for frame in range(10)]
    assert states[:4] == [("not_started", "not_started")] * 4  # the update stands at frame 3: 3 itself comes before it
    assert states[4:7] == [("in_progress", "not_started")] * 3
    assert states[7:] == [("completed", "in_progress")] * 3


def test_the_states_after_each_frame_and_from_the_text_on():
    turns = [("DST_UPDATE", "S1->start", 11, 13), ("DST_UPDATE", "S1->complete, S2->start", 14, 16)]
    clip = read(raw_clip(turns, 10, 17))
    first = [state["S1"] for state in clip.states_after()]  # by default from the last frame of the turn on
    assert first == ["not_started"] * 3 + ["in_progress"] * 3 + ["completed"] * 2
    #                                          10 11 12 13 14 15 16 17
    assert clip.latest_step_state().tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    texts = {13: 12, 16: 15}  # where the texts stand, by the turn's last frame
    first = [state["S1"] for state in clip.states_after(lambda turn: texts[turn.end_frame])]
    assert first == ["not_started"] * 2 + ["in_progress"] * 3 + ["completed"] * 3
    assert clip.latest_step_state(lambda turn: texts[turn.end_frame]).tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    done = read(raw_clip([("DST_UPDATE", "S1->start", 11, 13), ("DST_UPDATE", "S1->complete", 14, 16)], 10, 17))
    assert done.latest_step_state(lambda turn: texts[turn.end_frame]).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]


def test_updates_act_in_the_order_of_frames_not_of_the_file():
    turns = [("DST_UPDATE", update("S1 complete"), 5, 6), ("DST_UPDATE", update("S1 start"), 1, 3)]
    clip = read(raw_clip(turns, 0, 9))
    assert [t.transitions[0].transition for t in clip.updates()] == ["start", "complete"]
    assert clip.initial_state["S1"] == "not_started"


# ---- the files -----------------------------------------------------------------------------------


def write(path: Path, value) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_a_list_an_object_and_lines_are_the_same_clips(tmp_path):
    clips = [raw_clip([("user", "é 漢字\u2028 🙂", 3, 4)], 0, 9, id=name) for name in ("a", "b")]
    lines = "\n\n".join(json.dumps(clip, ensure_ascii=False) for clip in clips) + "\n"
    files = [
        write(tmp_path / "list.json", clips),
        write(tmp_path / "lines.jsonl", lines),
        write(tmp_path / "lines.json", lines),
        write(tmp_path / "bom.jsonl", "\ufeff" + lines.replace("\n", "\r\n")),
    ]
    for path in files:
        file = ClipFile(path)
        assert len(file) == 2
        assert [file.clip(i).id for i in range(2)] == ["a", "b"]
        assert file.clip(1).turns[0].text == "é 漢字\u2028 🙂"
        assert (file.find("b"), file.find("0"), file.find("-1")) == (1, 0, 1)
    one = ClipFile(write(tmp_path / "one.json", clips[0]))
    assert len(one) == 1 and one.clip(0).id == "a"


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
def test_a_list_is_indexed_wherever_its_blocks_end(tmp_path, monkeypatch, block):
    """Also what only looks like the end of an item, a list, or a number."""
    monkeypatch.setattr(clip_files, "BLOCK", block)
    values = [
        {"a": '],[{"\\\\', "b": [[], {}]}, {"é": "漢字 🙂\u2028"}, 12345, -1.5e3, True, None, "x, ]", [1, [2]], {},
        {"n": 0},
    ]  # fmt: skip
    for indent in (None, 1):
        for ascii in (True, False):
            text = json.dumps(values, indent=indent, ensure_ascii=ascii)
            for written in (text, f"\ufeff \r\n{text}\n ", text.replace("\n", "\r\n").replace("[", "[ \t", 1)):
                path = tmp_path / "list.json"
                path.write_bytes(written.encode())
                assert list(ClipFile(path)) == values
    for broken in (
        text[:-1],
        text[:-20],
        text + "]",
        text + " 3",
        "[1 2]",
        "[1,]",
        "[,1]",
        "[1,,2]",
        '["a": 1]',
        "[NaN]",
    ):
        path.write_bytes(broken.encode())
        with pytest.raises(ProspectError, match="is not JSON"):
            ClipFile(path)


def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path):
    path = write(tmp_path / "list.json", [raw_clip([], 0, 9, id=name) for name in "ab"])
    file = ClipFile(path)
    write(path, [raw_clip([], 0, 9, id=name) for name in "bca"])
    with pytest.raises(ProspectError, match=r"list.json: has changed since it was opened \(start again\)"):
        file.clip(1)


def test_a_jsonl_line_is_read_only_when_asked_for(tmp_path):
    path = write(tmp_path / "lines.jsonl", json.dumps(raw_clip([], 0, 9)) + "\n{broken\n")
    file = ClipFile(path)
    assert len(file) == 2 and file.clip(0).id == "clip"
    with pytest.raises(ProspectError, match="lines.jsonl, clip 1: is not JSON"):
        file.clip(1)


@pytest.mark.parametrize("name", ["2", "-3", "²", "--1", "1" * 5000, "nobody"])
def test_a_clip_that_is_not_there(tmp_path, name):
    file = ClipFile(write(tmp_path / "list.json", [raw_clip([], 0, 9, id=i) for i in ("a", "b")]))
    with pytest.raises(ProspectError, match="no clip"):
        file.find(name)


@pytest.mark.parametrize(
    "content, what",
    [
        ("", "is not JSON"),
        ("[]", "holds no clip"),
        ("3", "holds a int, not clips"),
        ('[{"id": "a"', "is not JSON"),
        ('[{"fps": NaN}]', "NaN is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_refused(tmp_path, content, what):
    path = write(tmp_path / "clips.json", content)
    with pytest.raises(ProspectError) as caught:
        ClipFile(path)
    assert what in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(ProspectError, match="no such clip file"):
        ClipFile(tmp_path / "none.json")
    with pytest.raises(ProspectError, match="cannot be read"):
        ClipFile(tmp_path)
    (tmp_path / "latin.json").write_bytes("[é]".encode("latin-1"))
    with pytest.raises(ProspectError, match=r"is not UTF-8 \(byte 1\)"):
        ClipFile(tmp_path / "latin.json")


# ---- the embeddings ------------------------------------------------------------------------------


def test_as_many_rows_as_frames():
    clip = read(raw_clip([], 193, 451))
    assert fit_rows(clip, 259) == (clip, None)


def test_a_file_written_end_exclusive_has_lost_its_last_frame():
    turns = [("DST_UPDATE", update("S1 complete"), 451, 451), ("DST_UPDATE", update("S1 start"), 449, 450)]
    clip, warning = fit_rows(read(raw_clip([*turns, ("system", "Hi", 0, 1)], 193, 451)), 258)
    assert (clip.end_frame, clip.num_frames) == (450, 258)
    assert warning == "clips.json, clip clip: one row fewer than frames; frame 451 is not there"
    assert [(t.transitions[0].transition, t.start_frame, t.end_frame) for t in clip.updates()] == [
        ("start", 449, 450),
        ("complete", 450, 450),  # said at the last frame there is, and still after the start
    ]
    assert clip.state_before(451)["S1"] == "completed"


@pytest.mark.parametrize("rows", [0, 1, 257, 260, 518])
def test_any_other_count_names_both_numbers(rows):
    with pytest.raises(ProspectError, match=f"has {rows} rows, frames 193..451 are 259"):
        fit_rows(read(raw_clip([], 193, 451)), rows)


def test_a_clip_of_one_frame_cannot_lose_it():
    with pytest.raises(ProspectError, match="has 0 rows, frames 5..5 are 1"):
        fit_rows(read(raw_clip([], 5, 5)), 0)


def test_embeddings_are_rows_of_vectors_of_the_right_width(tmp_path):
    clip = read(raw_clip([], 0, 3))
    np.save(tmp_path / "clip_embeddings.npy", np.ones((4, 6), np.float16))
    assert load_embeddings(clip, tmp_path, 6).shape == (4, 1, 6)
    with pytest.raises(ProspectError, match="6 wide, model.vision_dim is 8") as caught:
        load_embeddings(clip, tmp_path, 8)
    assert "model.vision_dim=6" in str(caught.value)
    np.save(tmp_path / "clip_embeddings.npy", np.ones((4, 5, 6), np.float16))
    assert load_embeddings(clip, tmp_path, 6).shape == (4, 5, 6)


# ---- the real clip -------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_CLIP.exists(), reason="the real clip is not part of the project")
def test_the_real_clip_has_no_problem():
    clip, problems = parse_clip(json.loads(REAL_CLIP.read_text(encoding="utf-8")), "real", 0)
    assert problems == []
    assert clip.initial_state == dict.fromkeys(["S1", "S2", "S3", "S4", "S5", "S6"], "not_started")
    assert clip.state_before(452) == dict.fromkeys(["S1", "S2", "S3", "S4", "S5", "S6"], "completed")
    assert (clip.start_frame, clip.end_frame, clip.num_frames) == (193, 451, 259)
    assert [turn.role for turn in clip.turns].count("assistant") == 8
    assert [turn.role for turn in clip.turns].count("DST_UPDATE") == 12
    assert clip.id.endswith("mono10bit_0")


def test_a_source_finds_locates_and_loads_a_clip(tmp_path):
    clips = [raw_clip([("assistant", "Hi", 8, 8)], 5, 8, id=id) for id in ("a", "b")]
    path = write(tmp_path / "clips.json", clips)
    (tmp_path / "embeddings").mkdir()
    np.save(tmp_path / "embeddings" / "b.npy", np.arange(12, dtype=np.float32).reshape(3, 4))  # one row is missing
    source = open_source(path, None, False)
    assert source.find("b") == source.find("1") == 1
    clip, rows, warning = source.load(1, 4)
    assert source.embeddings_path(clip) == tmp_path / "embeddings" / "b.npy"
    assert rows.shape == (3, 1, 4) and rows[2, 0].tolist() == [8, 9, 10, 11]
    assert (clip.id, clip.end_frame, clip.turns[0].end_frame) == ("b", 7, 7)
    assert warning == f"{path}, clip b: one row fewer than frames; frame 8 is not there"

    (tmp_path / "elsewhere").mkdir()
    np.save(tmp_path / "elsewhere" / "a.npy", np.ones((4, 4), np.float32))
    clip, rows, warning = open_source(path, tmp_path / "elsewhere", False).load(0, 4)
    assert (clip.end_frame, len(rows), warning) == (8, 4, None)
