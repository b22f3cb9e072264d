"""Updates from step times: what happens when, at which level, and what is refused. Expected turns are by hand."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import raw_clip, read

from prospect.convert import __main__ as convert
from prospect.convert.states import Report, clips_of_tables, clips_with_updates, read_steps, with_updates
from prospect.errors import ProspectError

REAL = Path(__file__).parents[2] / "shared" / "data" / "assembly101_clip.json"


def step(id: str | None, start: float | None, end: float | None, **fields: object) -> dict:
    named = {} if id is None else {"id": id}
    return {**named, "name": f"do {id}", "start_ts": start, "end_ts": end, **fields}


def convert_one(clip: dict, level: str = "step") -> tuple[list[tuple], Report]:
    """(text, time, first frame, last frame) of each update of the converted clip, in the file's order."""
    report = Report()
    made = with_updates(clip, "clips.json", 0, level, report)
    turns = [turn for turn in made["conversation"] if turn["role"] == "DST_UPDATE"]
    text = [", ".join(f"{t['id']}->{t['transition']}" for t in turn["content"]) for turn in turns]
    return [
        (said, turn["time"], turn["start_frame"], turn["end_frame"]) for said, turn in zip(text, turns)
    ], report  # fmt: skip


def test_a_step_starts_at_its_start_and_is_complete_at_its_end():
    clip = raw_clip([("user", "Hi", 4, 4)], 0, 99, dst=[step("S1", 10.0, 20.0), step("S2", 20.0, 30.3)])
    found, report = convert_one(clip)
    # Two frames a second: 10 s is frame 20, and half a second more and less are 19 and 21.
    assert found == [
        ("S1->start", 10.0, 19, 21),
        ("S1->complete, S2->start", 20.0, 39, 41),
        ("S2->complete", 30.3, 59, 61),
    ]
    assert str(report) == "1 clips: 3 updates made"


def test_steps_overlap_and_one_ends_as_it_starts():
    steps = [step("A", 10.0, 30.0), step("B", 20.0, 20.0), step("C", 15.0, 20.0), step("D", 20.0, 40.0)]
    found, _ = convert_one(raw_clip([], 0, 99, dst=steps))
    assert [(text, time) for text, time, *_ in found] == [
        ("A->start", 10.0),
        ("C->start", 15.0),
        ("C->complete, B->start, D->start, B->complete", 20.0),
        ("A->complete", 30.0),
        ("D->complete", 40.0),
    ]


def test_steps_before_after_and_across_the_clip():
    """The clip is 20.0 .. 30.0 s: what is over before is its first state, what comes after it is left out."""
    steps = [step("A", 2.0, 12.0), step("B", 15.0, 25.0), step("C", 26.0, 40.0), step("D", 50.0, 60.0)]
    clip = raw_clip([], 40, 59, dst=steps)
    found, _ = convert_one(clip)
    assert [text for text, *_ in found] == ["B->complete", "C->start"]
    made = read(with_updates(clip, "clips.json", 0, "step", Report()))
    assert made.initial_state == {"A": "completed", "B": "in_progress", "C": "not_started", "D": "not_started"}
    # At the edge a turn is clamped: 20.2 s is 39..41 at half a second around it.
    assert convert_one(raw_clip([], 40, 59, dst=[step("A", 20.2, 22.0)]))[0][0] == ("A->start", 20.2, 40, 41)


def test_an_update_falls_together_with_the_reply_beside_it():
    """50 frames; the reply ends at frame 20, the step starts at 10.3 s: frames 19..21, so it ends at 20, before it."""
    clip = raw_clip([("user", "Hi", 15, 20), ("assistant", "Go", 20, 20)], 0, 49, dst=[step("A", 10.3, 20.0)])
    found, _ = convert_one(clip)
    assert found == [("A->start", 10.3, 19, 20), ("A->complete", 20.0, 39, 41)]
    roles = [turn["role"] for turn in with_updates(clip, "f", 0, "step", Report())["conversation"]]
    assert roles == ["DST_UPDATE", "user", "assistant", "DST_UPDATE"]


def test_steps_without_times_are_reported_and_never_updated():
    steps = [step("A", None, None), step("B", 5.0, None), step("C", None, 9.0), step("D", 10.0, 12.0)]
    found, report = convert_one(raw_clip([], 0, 49, dst=steps))
    assert [text for text, *_ in found] == ["B->start", "D->start", "D->complete"]
    assert report.notes == ["clips.json, clip clip: no start_ts, so no update moves them: A, C"]
    assert convert_one(raw_clip([], 0, 49, dst=[]))[1].notes == ["clips.json, clip clip: it has no steps"]


NESTED = [
    step("S1", 5.0, 15.0, type="STEP"),
    step("S1.1", 5.0, 10.0, type="SUBSTEP"),
    step("S1.2", 10.0, 15.0, type="SUBSTEP"),
    step("S1.2.a", 11.0, 11.0, type="ACTION"),
]


@pytest.mark.parametrize(
    "level, wanted",
    [
        ("step", ["S1->start", "S1->complete"]),
        ("substep", ["S1.1->start", "S1.1->complete, S1.2->start", "S1.2->complete"]),
        ("action", ["S1.2.a->start, S1.2.a->complete"]),
    ],
)
def test_one_level_is_tracked_and_the_others_leave(level, wanted):
    clip = raw_clip([], 0, 49, dst=NESTED)
    assert [text for text, *_ in convert_one(clip, level)[0]] == wanted
    kept = with_updates(clip, "f", 0, level, Report())["dst"]
    assert [item["id"] for item in kept] == [item["id"] for item in NESTED if item["type"] == level.upper()]


def test_steps_get_ids_that_no_other_has():
    steps = [step(None, 1.0, 2.0), step("S1", 2.0, 3.0), step(None, 3.0, 4.0)]
    made = with_updates(raw_clip([], 0, 49, dst=steps), "f", 0, "step", Report())
    assert [item["id"] for item in made["dst"]] == ["S2", "S1", "S3"]


@pytest.mark.parametrize(
    "dst, said",
    [
        ([step("A", 5000.0, 9000.0)], "times lie behind it.*first is 5000.*divide milliseconds by 1000"),
        ([step("A", 9.0, 5.0)], "step A ends at 5 s, before it starts at 9 s .swap"),
        ([step("A", 5.0, 9.0, type="substep")], "no step is of type step .--level substep"),
        ([step("A", "5", 9.0)], "start_ts: must be a number"),
        (["A"], "must be an object"),
    ],
)
def test_steps_that_cannot_be_used(dst, said):
    with pytest.raises(ProspectError) as caught:
        convert_one(raw_clip([], 0, 49, dst=dst))
    line = str(caught.value)
    assert "clips.json, clip clip" in line and re.search(said, line), line


def test_clips_that_have_updates_keep_them(tmp_path):
    given = raw_clip([("DST_UPDATE", "A->start", 30, 31)], 0, 49, dst=[step("A", 5.0, 9.0)])
    (tmp_path / "clips.json").write_text(json.dumps([given, given | {"id": "b", "conversation": []}]))
    report = Report()
    kept, made = clips_with_updates(tmp_path / "clips.json", None, "step", False, report)
    assert kept == given and len(made["conversation"]) == 2
    assert str(report).endswith(
        "2 clips: 2 updates made; 1 clips have updates already and keep them (--replace makes them anew)"
    )
    anew, _ = clips_with_updates(tmp_path / "clips.json", None, "step", True, Report())
    assert [turn["time"] for turn in anew["conversation"]] == [5.0, 9.0]


@pytest.mark.skipif(not REAL.exists(), reason="the real clip is not part of the project")
def test_the_real_clip_gives_back_the_updates_it_had():
    clip = json.loads(REAL.read_text())
    turns = clip["conversation"]
    had = [
        (t["id"], t["transition"], turn["time"])
        for turn in turns
        if turn["role"] == "DST_UPDATE"
        for t in turn["content"]
    ]
    bare = clip | {"conversation": [turn for turn in turns if turn["role"] != "DST_UPDATE"]}
    made = with_updates(bare, "clips.json", 0, "step", Report())
    found = [turn for turn in made["conversation"] if turn["role"] == "DST_UPDATE"]
    assert len(had) == 12
    assert [(t["id"], t["transition"]) for turn in found for t in turn["content"]] == [
        (id, move) for id, move, _ in had
    ]
    times = [turn["time"] for turn in found for _ in turn["content"]]
    assert all(abs(time - before) <= 1 for time, (_, _, before) in zip(times, had, strict=True))
    assert read(made).states_after() == read(clip).states_after()


# ---- TSV files -----------------------------------------------------------------------------------


def test_tables_become_clips_without_a_dialogue(tmp_path):
    (tmp_path / "kitchen.tsv").write_text(
        "type\tid\tstart_ts\tend_ts\tname\nSTEP\tS7\t1.0\t9.8\tBoil\naction\t\t2\t2\tTurn\n"
    )
    report = Report()
    [made] = clips_of_tables(tmp_path, 2.0, "step", report)
    # 9.8 s is between frames 19 (9.5 s) and 20.
    assert (made["video_uid"], made["fps"], made["start_frame_idx"], made["end_frame_idx"]) == ("kitchen", 2, 0, 19)
    assert made["dst"] == [{"type": "STEP", "id": "S7", "name": "Boil", "start_ts": 1.0, "end_ts": 9.8}]
    assert [(turn["time"], turn["start_frame"], turn["end_frame"]) for turn in made["conversation"]] == [
        (1.0, 1, 3),
        (9.8, 18, 19),
    ]
    assert read(made).id == "kitchen_0"


def test_tables_give_clips_their_steps(tmp_path):
    (tmp_path / "kitchen.tsv").write_text("start_ts\tend_ts\tname\n1.0\t\tBoil\n")
    clips = [raw_clip([], 0, 49, video_uid=video, id=video, dst=[]) for video in ("kitchen", "garden")]
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    report = Report()
    kitchen, garden = clips_with_updates(tmp_path / "clips.json", tmp_path, "step", False, report)
    assert kitchen["dst"] == [{"name": "Boil", "start_ts": 1.0, "end_ts": None, "id": "S1"}]
    assert len(kitchen["conversation"]) == 1 and garden["conversation"] == []
    assert report.notes == [f"{tmp_path}/clips.json, clip garden: it has no steps"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("step\t1\t2\tBoil\n", "has no column start_ts, end_ts, name (its first line names the columns"),
        ("start_ts,end_ts,name\n1,2,Boil\n", "has no column"),
        ("start_ts\tend_ts\tname\n1\t2\tBoil\n0:03\t4\tPour\n", "line 3, start_ts: '0:03' is not a number"),
        ("", "has no column"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, text, said):
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(ProspectError) as caught:
        read_steps(tmp_path / "a.tsv")
    assert said in str(caught.value)


def test_the_command(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "clips.json", tmp_path / "out.json"
    path.write_text(json.dumps([raw_clip([], 0, 49, dst=[step("A", 5.0, 9.0)])]))
    monkeypatch.setattr(sys, "argv", ["convert", "states", str(path), str(out)])
    assert convert.main() == 0
    embeddings = tmp_path / "embeddings"
    encode = f"python -m prospect.encode VIDEO ... --vision VISION_DIR --clips {out} --out {embeddings}"
    assert capsys.readouterr().out == f"1 clips: 2 updates made\nnext:\n{encode}\n"
    embeddings.mkdir()
    (embeddings / "clip_embeddings.npy").touch()
    assert convert.main() == 0
    assert capsys.readouterr().out.endswith(f"next:\npython -m prospect.check {out}\n")
    assert len(json.loads(out.read_text())[0]["conversation"]) == 2
