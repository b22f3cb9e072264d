"""The pages: what is put into them, written out by hand, and how a real browser shows it.

The browser tests need Chromium with its driver and the package selenium (requirements-dev.txt). They open the page from
a file, read the browser's own log of errors and requests, and use the page as a reader would: pointer, then keyboard.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EOS, IMAGE, raw_clip, read, sample_of
from tiny import write_tiny_config, write_tiny_corpus

from prospect import show
from prospect.errors import ProspectError
from prospect.files import write_json
from prospect.records import made_by
from prospect.report import curves
from prospect.report.__main__ import main as report_main
from prospect.report.__main__ import reference_clips
from prospect.report.curves import COUNTS_OF, evaluation_names, evaluation_title, read_run
from prospect.report.page import LOSS_NAMES, differing
from prospect.report.svg import Line, clock, plot, scale_of, thinned
from prospect.report.timeline import (
    evidence_bounds,
    read_records,
    reliability,
    thumbnails,
    timeline,
    timeline_svg,
    write_timelines,
)
from prospect.report.tokens import token_table
from prospect.sequence import LABEL_KEYS
from prospect.stream import ContextEvent, FrameRecord

NASTY = [
    "</script><script>window.stolen = 1</script>",
    "He said \"no\" & 'yes' <b>bold</b>",
    "مرحبا بالعالم, step 1",
    "<!--",
    "\ud83d",
]


def record(row: int, state: str = "not_started", **given) -> FrameRecord:
    """The record of a frame of the clip below, silent unless told otherwise: frame 10 is row 0, two frames a second."""
    silent = {
        "clip_id": "c", "frame_idx": 10 + row, "time": (10 + row) / 2, "speaking_prob": 0.1, "dst_update_prob": 0.2,
        "speaking_score": 0.05, "dst_update_score": 0.15, "speaking_decision": False, "dst_update_decision": False,
        "text": None, "dst_update": None, "dst_state": {"S1": state}, "context_tokens": 50 + row,
    }  # fmt: skip
    return FrameRecord(**silent | given)


def says(row: int, text: str, probability: float = 0.9, score: float = 0.7, **given) -> FrameRecord:
    return record(row, text=text, speaking_prob=probability, speaking_score=score, speaking_decision=True, **given)


def updates(row: int, update: str, probability: float, score: float, **given) -> FrameRecord:
    read = {"dst_update_prob": probability, "dst_update_score": score, "dst_update_decision": True}
    return record(row, dst_update=update, **read, **given)


def hand_records(first_text: str = "pour the water") -> list[dict]:
    """Twenty frames. Replies at rows 4 (0.5 s late), 10 (other words) and 17 (nothing due); an update a frame early.

    The state head reads that a step is in progress from row 10 on.
    """
    records = [record(row) for row in range(20)]
    records[2].user = ["hello"]
    records[4] = says(4, first_text)
    records[10] = says(10, "xyz", probability=0.6, score=0.55)
    records[17] = says(17, "well done", text_cut="limit")
    records[6] = updates(6, "S1->start", 0.8, 0.65)
    records[12] = updates(12, "S1->start", 0.7, 0.6, invalid_update="cannot start S1")
    records[15].context_event = ContextEvent("slide", 64, 30, None, 0.1)
    for row in range(6, 20):
        records[row].dst_state = {"S1": "in_progress"}
    for row, one in enumerate(records):
        one.step_state = "in_progress" if row >= 10 else "not_started"
    return [one.to_dict() for one in records]


def hand_turns(first_text: str) -> list[tuple]:
    return [
        ("assistant", first_text, 13, 13), ("DST_UPDATE", "S1->start", 17, 17), ("assistant", "stir", 20, 20),
        ("assistant", "taste", 24, 24), ("DST_UPDATE", "S1->complete", 29, 29),
    ]  # fmt: skip


def hand_clip(first_text: str = "pour the water", goal: str = "Make tea"):
    """The reference: replies at rows 3, 10 and 14, S1 started at row 7 and completed at row 19."""
    return read(raw_clip(hand_turns(first_text), 10, 29, steps=1, id="c", inferred_goal=goal))


def test_the_reference_is_found_whose_file_and_id_hold_colons(tmp_path):
    file = tmp_path / "a:b.json"
    file.write_text(json.dumps([raw_clip([], 10, 29, id=id) for id in ("c", "kitchen:12:a", "unseen")]))
    for which in ("kitchen:12:a", "1"):
        found = reference_clips(f"{file}:{which}", ["c", "kitchen:12:a"])
        assert {name: clip.id for name, clip in found.items()} == {"kitchen:12:a": "kitchen:12:a"}
    assert list(reference_clips(str(file), ["c", "kitchen:12:a"])) == ["c", "kitchen:12:a"]


def embedded(page: Path):
    """The data inside a page, found as a browser finds it: from the data element to the first end of a script."""
    text = page.read_text(encoding="utf-8")
    begin = text.index('id="data">') + len('id="data">')
    return json.loads(text[begin : text.index("</script>", begin)])


# ---- the scripts ---------------------------------------------------------------------------------


def test_scripts_have_the_form_of_the_python():
    scripts = sorted((Path(show.__file__).parent / "report").glob("*.js"))
    assert [script.name for script in scripts] == ["common.js", "curves.js", "timeline.js", "tokens.js"]
    for script in scripts:
        for at, line in enumerate(script.read_text(encoding="utf-8").splitlines(), start=1):
            assert len(line) <= 120, f"{script.name}, line {at}: {len(line)} columns"
            if re.match(r"//.*(--|==)", line):
                assert re.fullmatch(r"// ---- [a-z ]+ -+", line) and len(line) == 100, (
                    f"{script.name}, line {at}: {line}"
                )


def test_streaming_starts_without_the_pages():
    loaded = "import sys, infer; print([name for name in sys.modules if name.startswith('prospect.report')])"
    root = Path(show.__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", loaded], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_one_loss_has_one_name_on_every_page():
    assert dict(zip(LABEL_KEYS, LOSS_NAMES.values())) == {
        "speaking_gen_labels": "reply text (LM)", "speaking_labels": "speak now?",
        "dst_gen_labels": "update text (LM)", "dst_update_labels": "update now?", "dst_state_labels": "step state",
    }  # fmt: skip
    assert set(COUNTS_OF) == set(LOSS_NAMES)
    assert show.TITLES[4:] == ("reply text (LM)", "speak now?", "update text (LM)", "update now?", "step state")
    assert evaluation_title("loss") == "validation loss"
    assert evaluation_title("loss_dst_binary") == "validation: update now?"
    assert evaluation_title("dst_event_f1") == "update event F1"
    assert evaluation_title("speaking_auroc") == "speaking AUROC"
    assert evaluation_title("streamed_dst_event_f1") == "streamed: update event F1"
    assert evaluation_title("streamed_replies_right_f1") == "streamed: replies right F1"
    assert evaluation_title("streamed_joint_goal_accuracy") == "streamed: joint goal accuracy"


# ---- what a time line says -----------------------------------------------------------------------


def test_every_mark_of_a_clip_written_by_hand():
    shown = timeline(hand_records(), hand_clip())
    assert [(e.row, e.lane, e.text, e.status, e.note) for e in shown.events] == [
        (2, "user", "hello", "", ""),
        (3, "wanted", "pour the water", "right", ""),
        (4, "said", "pour the water", "right", "0.5 s late"),
        (6, "update", "S1->start", "right", "0.5 s early"),
        (7, "update_wanted", "S1->start", "right", ""),
        (10, "wanted", "stir", "wrong_words", ""),
        (10, "said", "xyz", "wrong_words", "on time"),
        (12, "update", "S1->start", "illegal", "not applied: cannot start S1"),
        (14, "wanted", "taste", "missed", ""),
        (15, "context", "", "", "slide: 64 to 30 tokens"),
        (17, "said", "well done", "redundant", "cut off: limit"),
        (19, "update_wanted", "S1->complete", "missed", ""),
    ]
    assert (shown.goal, shown.first, shown.fps, shown.seconds) == ("Make tea", 10, 2, 5.0)
    assert (shown.speaking.fired, shown.update.fired) == ([4, 10, 17], [6, 12])
    assert shown.speaking.probability == [0.9 if row in (4, 17) else 0.6 if row == 10 else 0.1 for row in range(20)]
    assert shown.speaking.score == [0.7 if row in (4, 17) else 0.55 if row == 10 else 0.05 for row in range(20)]
    assert shown.update.score == [0.65 if row == 6 else 0.6 if row == 12 else 0.15 for row in range(20)]
    assert shown.tokens == list(range(50, 70))


def test_states_and_numbers_of_a_clip_written_by_hand():
    shown = timeline(hand_records(), hand_clip())
    [step] = shown.steps
    assert (step.id, step.name) == ("S1", "one")
    assert step.predicted == [(0, 5, 0), (6, 19, 1)]
    assert step.reference == [(0, 6, 0), (7, 18, 1), (19, 19, 2)]
    assert shown.step_state.predicted == [(0, 9, 0), (10, 19, 1)]
    assert shown.step_state.reference == [(0, 6, 0), (7, 18, 1), (19, 19, 2)]
    numbers = dict(shown.metrics)
    assert numbers["dialogue F1"] == "0.333"  # one correct pair: 2 * 1 / (3 said + 3 wanted)
    assert numbers["replies right (F1)"] == "0.333"  # the first of three, of three
    assert numbers["joint goal accuracy"] == "0.950"  # wrong at row 6 of twenty; at row 19 the update is only due
    assert numbers["state head accuracy"] == "0.900"  # wrong at rows 8 and 9; at rows 7 and 19 an update is due
    assert numbers["valid updates"] == "0.500"
    assert numbers["context refreshes"] == "1"


def test_reliability_of_clips_written_by_hand(tmp_path):
    """Of 20 rows, the replies are due at rows 3, 10 and 14: the hand clip's ranges are single frames."""
    shown = timeline(hand_records(), hand_clip())
    due = [one["speaking_prob"] for row, one in enumerate(hand_records()) if row in (3, 10, 14)]
    assert sum(shown.calibration["speaking"].positive) == len(due) == 3
    [speaking, update] = reliability([shown.calibration, shown.calibration, {}])
    assert (speaking["head"], update["head"]) == ("speaking", "dst")
    # Seventeen rows say 0.1, of which two are due; one says 0.6 and is; two say 0.9, none is. Twice, for two clips.
    assert speaking["curve"] == [(0.1, pytest.approx(2 / 17, abs=1e-6), 34), (0.6, 1.0, 2), (0.9, 0.0, 4)]
    assert speaking["error"] == pytest.approx((abs(1.7 - 2) + 0.4 + 1.8) / 20, abs=1e-6)
    assert reliability([timeline(hand_records(), None).calibration]) == []


def test_an_evaluation_s_directory_is_one_page(tmp_path, monkeypatch):
    (tmp_path / "out" / "records").mkdir(parents=True)
    clips = [raw_clip([], 10, 29, id=id) for id in ("a", "b")]
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    for id in ("a", "b"):
        lines = [json.dumps(one | {"clip_id": id}) + "\n" for one in hand_records()]
        (tmp_path / "out" / "records" / f"{id}.jsonl").write_text("".join(lines))
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "out"), "--clip", str(tmp_path / "clips.json")])
    assert report_main() == 0
    page = embedded(tmp_path / "out" / "timeline.html")
    assert [clip["id"] for clip in page["clips"]] == ["a", "b"]
    assert [(one["head"], one["curve"][0][2]) for one in page["reliability"]] == [
        ("speaking", 34),
        ("dst", 36),
    ]  # rows that say 0.1, 0.2


def test_evidence_is_as_close_as_the_records_tell():
    records = hand_records()
    assert timeline(records, None).evidence == (0.15, 0.55)
    assert timeline(records, None, {"infer.evidence": 0.5}).evidence == (0.5, 0.5)
    assert evidence_bounds(records[:3]) == (0.15, 1.0)  # nothing fired


def test_a_head_drawn_along_by_the_other_does_not_lower_the_evidence():
    """At row 4 the reply's score of 0.7 lets an update of 0.3 fire too; at row 5 an update of 0.4 is silent."""
    records = [record(row, dst_update_score=0.4) for row in range(6)]
    records[4] = updates(4, "S1->start", 0.4, 0.3, speaking_score=0.7, speaking_decision=True, text="Good.")
    assert evidence_bounds([one.to_dict() for one in records]) == (0.4, 0.7)
    records[2] = says(2, "Hi", score=0.6, dst_update_score=None)  # by itself, with nothing left to update
    assert evidence_bounds([one.to_dict() for one in records]) == (0.4, 0.6)


def test_without_a_reference_nothing_is_judged():
    shown = timeline(hand_records(), None)
    assert {event.status for event in shown.events} == {"", "illegal"}
    assert (shown.has_reference, shown.metrics, shown.fps) == (False, [], 2.0)
    assert [(step.id, step.reference) for step in shown.steps] == [("S1", None)]
    assert (shown.step_state.predicted, shown.step_state.reference) == ([(0, 9, 0), (10, 19, 1)], None)


def test_of_a_header_only_goal_and_steps_are_taken():
    shown = timeline(hand_records(), hand_clip(), header_only=True)
    assert (shown.goal, shown.has_reference, shown.metrics) == ("Make tea", False, [])
    assert [(step.name, step.predicted, step.reference) for step in shown.steps] == [
        ("one", [(0, 5, 0), (6, 19, 1)], None)
    ]
    assert [event.lane for event in shown.events] == ["user", "said", "update", "said", "update", "context", "said"]


def test_a_model_without_task_state_has_no_lanes_for_it():
    records = hand_records()
    for one in records:
        one |= {
            "dst_update_prob": None,
            "dst_update_score": None,
            "dst_update_decision": False,
            "dst_update": None,
            "invalid_update": None,
            "dst_state": {},
            "step_state": None,
        }
    shown = timeline(records, read(raw_clip([("assistant", "stir", 20, 20)], 10, 29, steps=0, id="c")))
    assert (shown.update, shown.steps, shown.step_state, shown.evidence) == (None, [], None, (0.05, 0.55))
    assert "state head accuracy" not in dict(shown.metrics)


def test_a_stream_that_was_stopped_is_compared_with_what_it_saw():
    shown = timeline(hand_records()[:9], hand_clip())
    assert [(e.row, e.lane) for e in shown.events if e.lane.endswith("wanted")] == [(3, "wanted"), (7, "update_wanted")]
    with pytest.raises(ProspectError, match="frames 11..29"):
        timeline(hand_records()[1:], hand_clip())


def test_records_that_are_none_are_named(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = [json.dumps(one) for one in hand_records()]
    for content, said in (
        ("\n".join([lines[0], "{}"]), "line 2.*clip_id"),
        ("", "no record"),
        ("\n".join([lines[0], lines[2]]), "follow"),
    ):
        path.write_text(content)
        with pytest.raises(ProspectError, match=said):
            read_records(path)
    path.write_text("\n".join(lines))
    assert list(read_records(path)) == ["c"] and len(read_records(path)["c"]) == 20


def test_no_text_can_leave_its_place(tmp_path):
    """Whatever a text holds, the page has its three elements of script and style, no more, and gives the text back."""
    text = " ".join(NASTY[:-1])
    page = tmp_path / "page.html"
    write_timelines(page, [timeline(hand_records(text), hand_clip(text, goal=NASTY[0]))])
    source = page.read_text(encoding="utf-8")
    assert source.count("</script>") == source.count("<script") == 2
    assert "<title>&lt;/script&gt;&lt;script&gt;" in source
    [clip] = embedded(page)["clips"]
    assert clip["goal"] == NASTY[0]
    assert [event["text"] for event in clip["events"] if event["row"] == 4] == [text]
    write_timelines(page, [timeline(hand_records(NASTY[-1]), None)])  # half a character cannot be written
    assert embedded(page)["clips"][0]["events"][1]["text"] == "?"


def test_pictures_are_few_and_at_their_frames(tmp_path):
    """Two hundred grey frames, each its own shade: every third is taken, and shows the shade of its frame."""
    Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow (requirements-vision.txt)")
    for frame in range(210):
        Image.new("L", (8, 4), frame).save(tmp_path / f"{frame}.png")
    found = thumbnails(str(tmp_path), fps=2.0, first=10, F=200)
    assert [row for row, _ in found] == list(range(0, 200, 3))
    found_too = thumbnails(str(tmp_path), fps=2.0, first=10, F=200, events=[7, 7, 9, 151])
    assert [row for row, _ in found_too] == sorted({*range(0, 200, 3), 7, 151})
    import base64
    import io

    row, uri = found[20]
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert image.size == (144, 72) and abs(image.getpixel((70, 30))[0] - (10 + row)) <= 2


# ---- tokens, curves ------------------------------------------------------------------------------


def test_the_tokens_of_a_clip_written_by_hand(plain):
    """Frames 7 and 8, two <image> tokens each, and "Hi" after the second: with this tokenizer an id is a byte."""
    clip = read(raw_clip([("assistant", "Hi", 8, 8)], 7, 8, steps=0))
    sample = sample_of(clip, plain, rate=1.0, per_frame=2, dst=False)
    table = token_table(sample, plain)
    begin = table.ids.index(IMAGE)
    assert table.frames[begin : begin + 5] == [7, 7, 8, 8, None]
    assert table.frames[:begin] == [None] * begin
    assert table.labels["speaking_labels"][begin : begin + 5] == [None, 0, None, 1, None]
    reply = "Assistant: Hi"
    assert table.texts[begin + 4 :] == [*reply, "<eos>"]
    assert table.labels["speaking_gen_labels"][begin + 4 :] == [*reply.encode(), EOS]
    assert table.starts[begin : begin + 5] == [
        begin + 4 + at for at in (0, 7, 14, 21, 28)
    ]  # <eos> before them: 5 characters, 1 token


def test_curves_of_a_log_written_by_hand(tmp_path):
    counts = {
        "speaking_gen": 7,
        "speaking_pos": 2,
        "speaking_neg": 3,
        "dst_gen": 0,
        "dst_pos": 0,
        "dst_neg": 5,
        "dst_state": 0,
    }
    lines = [
        {
            "step": 1,
            "loss": 4.0,
            "speaking_gen": 3.0,
            "speaking_binary": 1.0,
            "dst_state": 0.0,
            "counts": counts,
            "lr": 0.1,
        },
        {"step": 2, "evaluation": {"loss": 2.0, "speaking_auroc": 0.5}},
        {"step": 3, "skipped": "not finite", "loss_scale": 1.0},
        {
            "step": 3,
            "loss": float("nan"),
            "speaking_gen": 2.0,
            "speaking_binary": 0.5,
            "dst_state": 0.0,
            "counts": counts,
            "lr": 0.2,
        },
        {"step": 4, "evaluation": {"loss": 1.5, "speaking_auroc": 0.75}},
        {"step": 6, "evaluation": {"loss": 1.5, "speaking_auroc": 1.0}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo')
    run = read_run(tmp_path)
    assert (run.steps, run.skipped, run.evaluated, run.best_step) == ([1, 3], [3], [2, 4, 6], 4)
    lines[-1]["best_step"] = 6  # chosen by something else than the loss
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(tmp_path).best_step == 6
    assert run.curves == {
        "loss": [4.0, None],
        "speaking_gen": [3.0, 2.0],
        "speaking_binary": [1.0, 0.5],
        "lr": [0.1, 0.2],
    }
    assert run.counts == {"speaking_gen": [7, 7], "speaking_binary": [5, 5]}
    assert run.evaluation == {"loss": [2.0, 1.5, 1.5], "speaking_auroc": [0.5, 0.75, 1.0]}
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(ProspectError, match="line 1"):
        read_run(tmp_path)


def test_what_streamed_clips_scored_is_shown_first():
    logged = {
        "loss_dst_binary": 1.0, "loss": 2.0, "speaking_auroc": 0.5, "streamed_speaking_event_precision": 0.5,
        "streamed_speaking_event_f1": 0.4, "streamed_dst_event_f1": 0.3, "streamed_replies_right_f1": 0.0,
        "streamed_joint_goal_accuracy": 0.1, "streamed_transition_f1": 0.0,
    }  # fmt: skip
    assert evaluation_names([(1, {"loss": 3.0}), (2, logged)]) == [
        "streamed_speaking_event_f1", "streamed_dst_event_f1", "streamed_joint_goal_accuracy",
        "streamed_replies_right_f1", "loss", "loss_dst_binary", "speaking_auroc", "streamed_speaking_event_precision",
    ]  # fmt: skip


def test_a_long_run_is_averaged_over_equal_stretches(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "MAX_POINTS", 3)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in range(1, 8))
    )
    run = read_run(tmp_path)
    assert (run.steps, run.curves["loss"]) == ([2, 5, 7], [2, 5, 7])  # 1 2 3, 4 5 6, 7


def test_the_settings_that_differ_between_runs(tmp_path):
    for name, text in (("a", "data: {fps: 2, dst: true}\nrun: {seed: 0}\n"), ("b", "data: {fps: 2}\nrun: {seed: 1}\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        (tmp_path / name / "config.yaml").write_text(text)
    settings = [read_run(tmp_path / name).settings for name in "ab"]
    assert differing(settings) == [("data.dst", ["true", "–"]), ("run.seed", ["0", "1"])]
    assert differing([settings[0], settings[0]]) == []
    for broken in ("a: [", "words", ""):
        (tmp_path / "a" / "config.yaml").write_text(broken)
        assert read_run(tmp_path / "a").settings == {}


# ---- thresholds, and several checkpoints ---------------------------------------------------------

MADE = {
    "infer.evidence": 0.5,
    "infer.speaking_threshold": 0.3,
    "infer.dst_threshold": 0.4,
    "checkpoint": "one",
    "step": 7,
}


def test_settings_lie_beside_a_file_of_records_or_an_evaluation(tmp_path):
    (tmp_path / "out" / "records").mkdir(parents=True)
    write_json(tmp_path / "out" / "settings.json", MADE)
    write_json(tmp_path / "alone.settings.json", {"infer.evidence": 0.25})
    assert made_by(tmp_path / "out" / "records" / "clip.jsonl") == MADE
    assert made_by(tmp_path / "alone.jsonl") == {"infer.evidence": 0.25}
    assert made_by(tmp_path / "unknown.jsonl") == {}


def two_streams(folder: Path) -> None:
    """a.jsonl: the records written by hand. b.jsonl: the same, but silent at row 10 and with "taste" at row 14."""
    silent = hand_records()
    silent[10], silent[14] = record(10).to_dict(), says(14, "taste").to_dict()
    for row in (10, 14):
        silent[row] |= {"dst_state": {"S1": "in_progress"}, "step_state": "in_progress"}
    for name, records in (("a", hand_records()), ("b", silent)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    write_json(folder / "a.settings.json", MADE)
    write_json(folder / "b.settings.json", MADE | {"checkpoint": "two", "infer.evidence": 0.6})
    turns = hand_turns("pour the water")
    (folder / "clip.json").write_text(json.dumps([raw_clip(turns, 10, 29, steps=1, id="c", inferred_goal="Make tea")]))


def test_two_checkpoints_on_one_clip_are_one_page(tmp_path, monkeypatch):
    two_streams(tmp_path)
    words = ["report", "a.jsonl", "b.jsonl", "--clip", "clip.json", "--svg", "figures"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    assert report_main() == 0
    page = embedded(tmp_path / "a.html")
    [clip] = page["clips"]
    [beside] = clip["beside"]
    assert (clip["made_by"], beside["made_by"]) == ("one, step 7", "two, step 7")
    assert (clip["evidence"], beside["evidence"]) == ([0.5, 0.5], [0.6, 0.6])
    assert (clip["speaking"]["even_odds"], clip["update"]["even_odds"]) == (0.3, 0.4)
    assert page["differing"] == [["checkpoint", ['"one"', '"two"']], ["infer.evidence", ["0.5", "0.6"]]]
    said = [[(e["row"], e["status"]) for e in take["events"] if e["lane"] == "said"] for take in (clip, beside)]
    assert said == [
        [(4, "right"), (10, "wrong_words"), (17, "redundant")],
        [(4, "right"), (14, "right"), (17, "redundant")],
    ]
    assert page["written"]["path"] == "a.html"

    (tmp_path / "short.jsonl").write_text("".join((tmp_path / "b.jsonl").read_text().splitlines(True)[:9]))
    other = [json.dumps(one | {"clip_id": "d"}) + "\n" for one in hand_records()]
    (tmp_path / "other.jsonl").write_text("".join(other))
    for name, told in (
        ("short.jsonl", "has other frames of clip c than a.jsonl"),
        ("other.jsonl", "have no clip in common"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", "a.jsonl", name])
        with pytest.raises(ProspectError, match=told):
            report_main()


def test_a_rate_of_nothing_is_a_dash():
    silent = [record(row).to_dict() for row in range(20)]
    numbers = dict(timeline(silent, read(raw_clip([], 10, 29, steps=1, id="c"))).metrics)
    shown = [numbers[name] for name in ("dialogue F1", "time difference, s", "speaking event F1", "transition F1")]
    assert shown == ["–"] * 4 and numbers["joint goal accuracy"] == "1.000"
    numbers = dict(timeline(silent, hand_clip()).metrics)  # something is due: nothing is right
    assert [numbers[name] for name in ("dialogue F1", "precision", "recall", "redundant")] == [
        "0.000",
        "–",
        "0.000",
        "–",
    ]


def test_the_clip_with_most_mistakes_comes_first(tmp_path):
    good = timeline(hand_records()[:10], hand_clip())  # one reply and one update due, and right
    silent = timeline([record(row).to_dict() for row in range(20)], read(raw_clip([], 10, 29, steps=1, id="c")))
    write_timelines(tmp_path / "page.html", [silent, good, timeline(hand_records(), hand_clip())])
    shares = [clip["share_right"] for clip in embedded(tmp_path / "page.html")["clips"]]
    # Of the whole clip: 3 + 2 due, 3 + 2 written, of which one reply and one update are right.
    assert shares == [pytest.approx(2 * 2 / 10), 1.0, None]


# ---- figures -------------------------------------------------------------------------------------


def drawn(source: str):
    """The root of an SVG, with its namespace left out."""
    from xml.etree import ElementTree

    return ElementTree.fromstring(source.replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def test_the_figure_of_a_time_line_drawn_by_hand():
    root = drawn(timeline_svg(timeline(hand_records(), hand_clip(goal=NASTY[0]), MADE)))
    assert (root.get("width"), root.get("viewBox").split()[2]) == ("241pt", "241")
    texts = [(node.text, float(node.get("x"))) for node in root.iter("text")]
    assert texts[0][0] == NASTY[0]
    at = {row: 66 + (row + 0.5) / 20 * (241 - 4 - 66) for row in range(20)}
    marks = [(text, x) for text, x in texts if len(text) == 1]
    expected = "+3 w10 -14 +4 w10 x17 +7 -19 +6 !12".split()  # due and said; due and written
    assert marks == [(mark[0], pytest.approx(at[int(mark[1:])], abs=0.06)) for mark in expected]
    assert len(list(root.iter("circle"))) == 3 + 2  # where the heads fired
    dashed = [node for node in root.iter("line") if node.get("stroke-dasharray") == "2 1.5"]
    assert len(dashed) == 2 and {node.get("y1") for node in dashed} == {
        f"{14 + 28 - 12:.1f}",
        f"{14 + 52 + 28 - 12:.1f}",
    }
    assert [text for text, _ in texts if ":" in text] == ["0:06", "0:08", "0:10", "0:12", "0:14"]  # 5 s to 15 s


def test_the_figure_of_a_plot_drawn_by_hand():
    """Values of 0..4 over 0..10: the plot is 34..233 wide and 16..116 high."""
    lines = [Line("one <1>", [(0, 0.0), (5, 2.0), None, (10, 4.0)], dots=True), Line("two", [(0, 9.0), (10, 1.0)])]
    root = drawn(plot("title & more", lines, "step", 10.0, (0.0, 4.0)))
    paths = [node.get("d") for node in root.iter("path")]
    assert paths[0] == "M34.0 116.0L133.5 66.0M233.0 16.0"
    assert paths[2] == paths[3] == "M233.0 91.0"  # 9 is above the scale
    assert [(node.get("cx"), node.get("cy")) for node in root.iter("circle")] == [
        ("34.0", "116.0"), ("133.5", "66.0"), ("233.0", "16.0")
    ]  # fmt: skip
    texts = [node.text for node in root.iter("text")]
    assert texts[0] == "title & more" and {"one <1>", "two", "step", "0", "1", "4", "5", "10"} <= set(texts)
    patterns = {node.get("stroke-dasharray") for node in root.iter("path")}
    assert len(patterns) == 2  # two runs are told apart without colours


def test_first_losses_set_no_scale():
    lines = [Line("", [(step, 1000.0 if step <= 10 else 5.0 - step / 100) for step in range(1, 101)])]
    assert scale_of(lines, 100.0, falls=True) == (4.0, 4.89)
    assert scale_of(lines, 100.0, falls=False) == (0.0, 1000.0)
    assert scale_of([Line("", [(1, 3.0)])], 100.0, falls=True) == (2.7, 3.3)  # nothing else is there


def test_a_long_curve_keeps_its_peaks():
    points = [(row, 1.0 if row == 777 else 0.0) for row in range(10_000)]
    found = thinned(points)
    assert len(found) <= 500 and (777, 1.0) in found
    assert thinned(points[:100]) == points[:100]
    gap = thinned([None] * 5000 + points[:5000])
    assert gap[0] is None and (777, 1.0) in gap


def test_times_of_an_hour_and_more():
    assert [clock(s) for s in (0, 59.94, 60, 1047.5, 3599.96, 3600, 7200, 7265.5)] == [
        "0:00", "0:59.9", "1:00", "17:27.5", "1:00:00", "1:00:00", "2:00:00", "2:01:05.5"
    ]  # fmt: skip


# ---- a real browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    selenium = pytest.importorskip(
        "selenium.webdriver", reason="the browser tests need selenium (requirements-dev.txt)"
    )
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("the browser tests need chromium and chromedriver on the path")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    quiet += " disable-component-update disable-sync"
    for flag in [*quiet.split(), f"user-data-dir={tmp_path_factory.mktemp('browser')}", "window-size=1280,900"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = selenium.Chrome(service=Service(driver), options=options)
    yield chrome
    chrome.quit()


def open_page(browser, page: Path) -> None:
    """Open a page and see that it is quiet: no line in the console, no request but for the page itself."""
    browser.get("about:blank")  # the browser's own first page asks for its own parts
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(page.as_uri())
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    requests = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in requests if not url.startswith("data:")} == {page.as_uri()}
    assert browser.get_log("browser") == []


def press(browser, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def count(browser, selector: str) -> int:
    return len(browser.find_elements("css selector", selector))


def text_of(browser, selector: str) -> str:
    return browser.find_element("css selector", selector).text


def hover(browser, selector: str, row: int, rows: int) -> None:
    """Move the pointer over the middle of a frame of the time line."""
    box = browser.execute_script(
        "return (b => [b.left, b.top, b.width])(document.querySelector(arguments[0]).getBoundingClientRect())", selector
    )
    move = {"type": "mouseMoved", "x": box[0] + box[2] * (row + 0.5) / rows, "y": box[1] + 40}
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", move)


def test_a_browser_shows_as_many_marks_as_there_are_and_the_frame_under_the_pointer(browser, tmp_path):
    page = tmp_path / "hand.html"
    write_timelines(page, [timeline(hand_records(), hand_clip())])
    open_page(browser, page)
    marks = {"user": 1, "wanted": 3, "said": 3, "update_wanted": 2, "update": 2, "context": 1}
    assert {lane: count(browser, f"[data-lane={lane}] .chip") for lane in marks} == marks
    assert count(browser, "[data-lane=speaking] .fired") == 3 and count(browser, "[data-lane=speaking] .reference") == 3
    assert count(browser, "[data-lane=dst] .fired") == 2 and count(browser, "[data-lane=dst] .reference") == 2
    assert count(browser, "[data-lane=S1] .above") == 2 and count(browser, "[data-lane=S1] .below") == 3
    runs = browser.find_elements("css selector", "[data-lane=step_state] i")
    assert [run.get_attribute("title") for run in runs] == [
        "predicted: not started, frames 10–19", "predicted: in progress, frames 20–29",
        "reference: not started, frames 10–16", "reference: in progress, frames 17–28",
        "reference: completed, frames 29–29",
    ]  # fmt: skip
    assert count(browser, "#events li") == 12

    assert count(browser, "[data-reliability=speaking] .point") == 3
    assert text_of(browser, "[data-reliability=speaking] figcaption p") == "calibration error 0.1250"

    hover(browser, "#time", 10, 20)
    assert text_of(browser, "#frame-number") == "Frame 20"
    assert text_of(browser, "#frame-speak-probability") == "0.6000"
    assert text_of(browser, "#frame-speak") == "0.5500 fired" and text_of(browser, "#frame-tokens") == "60 tokens"
    assert text_of(browser, "#frame-step-state") == "in progress"
    assert "xyz" in text_of(browser, "#frame") and "wrong words" in text_of(browser, "#frame")
    hover(browser, "#time", 19, 20)
    assert text_of(browser, "#frame-update-probability") == "0.2000" and text_of(browser, "#frame-update") == "0.1500"
    assert text_of(browser, "#frame-step-state") == "in progress ≠ completed"
    assert "≠ completed" in text_of(browser, "#frame .steps")


def test_the_score_that_decides_is_drawn_over_the_probability(browser, tmp_path):
    """From row 13 on nothing is left to update: the score's curve ends there, the probability's does not."""
    records = hand_records()
    for one in records[13:]:
        one["dst_update_score"] = None
    page = tmp_path / "hand.html"
    for made, label, exact in ((None, "fires from 0.15–0.55", 0), ({"infer.evidence": 0.5}, "fires from 0.500", 2)):
        write_timelines(page, [timeline(records, hand_clip(), made)])
        open_page(browser, page)
        assert text_of(browser, ".name.tall small") == label and count(browser, ".evidence.exact") == exact
    area, probability, score = [
        path.get_attribute("d").split("L") for path in browser.find_elements("css selector", "[data-lane=dst] path")
    ]
    assert (len(probability), probability[6], probability[-1]) == (20, "6.5 0.2000", "19.5 0.8000")
    assert (len(score), score[6], score[-1]) == (13, "6.5 0.3500", "12.5 0.4000")
    assert area[12:14] == ["12.5 0.4000", "13.5 1.0000"]
    hover(browser, "#time", 19, 20)
    assert text_of(browser, "#frame-update") == "–"


def test_without_a_state_head_there_is_no_lane_for_it(browser, tmp_path):
    page = tmp_path / "hand.html"
    write_timelines(page, [timeline([one | {"step_state": None} for one in hand_records()], hand_clip())])
    open_page(browser, page)
    assert count(browser, "[data-lane=step_state]") == count(browser, "#frame-step-state") == 0


def test_a_narrow_window_shows_all_of_the_page_without_scrolling_sideways(browser, tmp_path):
    page = tmp_path / "hand.html"
    write_timelines(page, [timeline(hand_records(), hand_clip())])
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    open_page(browser, page)
    assert browser.execute_script("return (root => root.scrollWidth - root.clientWidth)(document.documentElement)") == 0
    assert browser.find_element("css selector", ".scroll").size["width"] > 200
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_time_line_is_used_by_keyboard_alone(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    page = tmp_path / "hand.html"
    write_timelines(page, [timeline(hand_records(), hand_clip())])
    open_page(browser, page)
    for _ in range(8):  # the buttons stand before the time line
        press(browser, Keys.TAB)
        if browser.switch_to.active_element.get_attribute("id") == "time":
            break

    def frame() -> int:
        return int(browser.find_element("id", "time").get_attribute("aria-valuenow"))

    assert frame() == 10
    press(browser, Keys.ARROW_RIGHT)
    assert frame() == 11 and text_of(browser, "#frame-number") == "Frame 11"
    press(browser, "n", "n", "n")  # rows 2, 3, 4
    assert frame() == 14 and "0.5 s late" in text_of(browser, "#frame")
    assert text_of(browser, "#events [aria-selected=true] .what") == "pour the water"
    press(browser, Keys.END, "p")
    assert frame() == 27
    width = browser.find_element("id", "time").size["width"]
    press(browser, "+")
    assert browser.find_element("id", "time").size["width"] == pytest.approx(2 * width, abs=2) or width >= 24 * 20 / 2
    press(browser, Keys.TAB, Keys.ARROW_UP)  # on to the list
    assert browser.switch_to.active_element.get_attribute("id") == "events" and frame() == 25


def test_a_browser_shows_text_as_text(browser, tmp_path):
    text = " ".join(NASTY[:-1])
    page = tmp_path / "nasty.html"
    write_timelines(page, [timeline(hand_records(text), hand_clip(text, goal=text))])
    open_page(browser, page)
    assert browser.execute_script("return window.stolen") is None
    assert browser.find_element("css selector", "h1").text == text
    assert (
        browser.execute_script("return [...document.querySelectorAll('#events .what')].map(e => e.textContent)").count(
            text
        )
        == 2
    )
    assert count(browser, "#events b") == 12  # the names of the lanes, and nothing that a text brought along


def test_two_thousand_frames_open_fast_and_small(browser, tmp_path):
    """Under 2 MB, and less than a second of script, layout and painting, with 200 replies and 20 steps."""
    from selenium.webdriver.common.keys import Keys

    state = {f"S{i}": "completed" for i in range(20)}
    records = [record(row, dst_state=state) for row in range(2000)]
    for row in range(5, 2000, 10):
        records[row] = says(row, "Now pour the water slowly, in circles, until all of it is wet.", dst_state=state)
    page = tmp_path / "long.html"
    write_timelines(page, [timeline([one.to_dict() for one in records], None)])
    assert page.stat().st_size < 2_000_000
    open_page(browser, page)
    assert count(browser, "[data-lane=said] .chip") == 200
    browser.execute_cdp_cmd(
        "Performance.enable", {"timeDomain": "threadTicks"}
    )  # the page's own time, whatever else is at work
    browser.get(page.as_uri())
    spent = {
        metric["name"]: metric["value"] for metric in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    }
    assert spent["TaskDuration"] < 1.0
    browser.find_element("id", "time").send_keys(Keys.END)
    assert text_of(browser, "#frame-number") == "Frame 2009"


def test_a_link_to_a_frame_and_keys_without_a_click(browser, tmp_path):
    """The address follows the reader; opened again it leads there. Keys work wherever the focus is."""
    page = tmp_path / "hand.html"
    write_timelines(page, [timeline(hand_records(), hand_clip())])
    open_page(browser, page)
    assert browser.current_url == page.as_uri()
    press(browser, "n", "n")  # rows 2, 3
    assert text_of(browser, "#frame-number") == "Frame 13" and browser.current_url == page.as_uri() + "#frame=13"
    browser.get("about:blank")
    browser.get(page.as_uri() + "#frame=27")
    assert text_of(browser, "#frame-number") == "Frame 27" and "well done" in text_of(browser, "#frame")
    for wrong, frame in (("9999", 29), ("-3", 10), ("x", 10)):
        browser.get("about:blank")
        browser.get(page.as_uri() + f"#frame={wrong}")
        assert text_of(browser, "#frame-number") == f"Frame {frame}"
    assert browser.execute_script("return [59.94, 3600, 7265.5].map(clock)") == ["0:59.9", "1:00:00", "2:01:05.5"]

    others = [timeline([one | {"clip_id": id} for one in hand_records()], hand_clip()) for id in ("a b", "c&d")]
    write_timelines(page, others)
    browser.get("about:blank")
    browser.get(page.as_uri() + "#clip=c%26d&frame=15")
    assert (text_of(browser, "#frame-number"), browser.find_element("id", "clip").get_property("value")) == (
        "Frame 15",
        "1",
    )
    assert count(browser, "#clips li") == 2 and text_of(browser, "#clips b") == "0.400"
    browser.find_element("css selector", "#clips button").click()
    assert browser.find_element("id", "clip").get_property("value") == "0"
    assert f"Written to {page}, " in text_of(browser, ".written")


def test_lanes_of_two_checkpoints_and_the_figure_behind_the_button(browser, tmp_path, monkeypatch):
    two_streams(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "a.jsonl", "b.jsonl", "--clip", "clip.json", "--svg", "figures"])
    report_main()
    open_page(browser, tmp_path / "a.html")
    lanes = {"speaking": 2, "dst": 2, "said": 2, "wanted": 2, "update": 2, "S1": 2, "step_state": 2, "user": 1}
    assert {lane: count(browser, f"[data-lane={lane}]") for lane in lanes} == lanes
    assert count(browser, "[data-lane=speaking] .fired") == 6 and count(browser, ".odds") == 4
    assert [node.text for node in browser.find_elements("css selector", ".name.tall small")][:2] == [
        "fires from 0.500", "fires from 0.600"
    ]  # fmt: skip
    assert text_of(browser, "#differing").split("\n")[-1] == "infer.evidence 0.5 0.6"
    script = "URL.createObjectURL = (blob) => { window.handed = blob.text(); return 'data:,'; };"
    browser.execute_script(script)
    browser.find_element("css selector", "header .svg").click()
    handed = browser.execute_async_script("handed.then(arguments[0])")
    assert handed == (tmp_path / "figures" / "c.svg").read_text() and handed.count("one, step 7") == 1
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "c.svg", "reliability-dst.svg", "reliability-speaking.svg"
    ]  # fmt: skip


def test_both_themes(browser, tmp_path):
    page = tmp_path / "hand.html"
    write_timelines(page, [timeline(hand_records(), None)])

    def paper() -> str:
        return browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")

    seen = {}
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        open_page(browser, page)
        seen[scheme] = paper()
    assert seen == {"light": "rgb(251, 250, 247)", "dark": "rgb(21, 23, 27)"}
    browser.find_element("id", "theme").click()
    assert paper() == seen["light"]


def test_the_page_of_show_has_every_token(browser, tmp_path, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    write_tiny_corpus(tmp_path)
    page = tmp_path / "tokens.html"
    monkeypatch.setattr(
        sys, "argv", ["show", str(write_tiny_config(tmp_path)), "--html", str(page), "--versus", "data.layout=turns"]
    )
    show.main()
    settings = embedded(page)["settings"]
    assert [setting["title"].split()[0] for setting in settings] == ["as", "with"]
    tokens = [sum(len(sequence["ids"]) for sequence in setting["sequences"]) for setting in settings]
    open_page(browser, page)
    columns = browser.find_elements("css selector", ".setting")
    assert [len(column.find_elements("css selector", ".tok")) for column in columns] == tokens
    press(browser, Keys.TAB, Keys.TAB, Keys.END)  # past the theme, into the first sequence, to its last token
    last = f"position\n{len(settings[0]['sequences'][0]['ids']) - 1}\n"
    assert last in text_of(browser, "#inspect") + "\n"
    open_page(browser, page)
    press(browser, Keys.END)  # without a click
    assert last in text_of(browser, "#inspect") + "\n"


def test_the_page_of_runs(browser, tmp_path, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    for name, scale in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        lines = [
            {"step": step, "loss": scale / step, "speaking_gen": 1.0, "counts": {"speaking_gen": 9}}
            for step in range(1, 11)
        ]
        lines += [{"step": step, "evaluation": {"loss": value}} for step, value in ((5, 0.5), (10, 0.75))]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "curves.html"
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(page)])
    report_main()
    open_page(browser, page)
    assert count(browser, "[data-chart=loss] path.raw") == 2
    assert (
        count(browser, "[data-chart='validation loss'] .best") == 2
        and count(browser, "[data-chart='validation loss'] .point") == 2
    )

    def read_off() -> list[str]:
        return [span.text for span in browser.find_elements("css selector", "[data-chart=loss] figcaption span")]

    assert read_off() == ["0.1000", "0.2000"]
    press(browser, Keys.TAB, Keys.TAB, Keys.TAB, Keys.TAB, Keys.TAB)  # theme, two runs, logarithmic losses, the charts
    press(browser, Keys.HOME, Keys.ARROW_RIGHT)
    assert text_of(browser, "#step") == "step 2"
    assert read_off() == ["0.5000", "1"]
    assert "9 labels" in text_of(browser, "[data-chart='reply text (LM)'] figcaption p")
    assert count(browser, ".chart button.svg") == 3
    figures = embedded(page)["figures"]
    assert sorted(figures) == ["loss", "speaking_gen", "validation-loss"] and all(map(drawn, figures.values()))
