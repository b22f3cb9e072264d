"""The benchmarks start from anywhere, and the ablation counts and reports what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ablation
from prospect.clip_files import parse_clip
from prospect.score import timely_replies

ROOT = Path(__file__).resolve().parent.parent


def update(frame: int, step: str, transition: str) -> dict:
    content = [{"id": step, "transition": transition}]
    return {"role": "DST_UPDATE", "content": content, "start_frame": frame, "end_frame": frame}


def reply(frame: int, text: str) -> dict:
    return {"role": "assistant", "content": text, "start_frame": frame, "end_frame": frame}


def test_replies_are_counted_as_by_hand():
    raw = {
        "video_uid": "c", "clip_idx": 0, "fps": 2, "start_frame_idx": 100, "end_frame_idx": 159,
        "dst": [{"id": f"S{n}", "name": name, "start_ts": n, "end_ts": n + 1, "type": "step"}
                for n, name in enumerate(("boil the water", "grind the beans", "warm the pot"), 1)],
        "conversation": [
            reply(105, "First, boil the water."), update(110, "S1", "start"), update(120, "S1", "complete"),
            reply(120, "Next, grind the beans."), update(130, "S3", "start"), update(140, "S3", "complete"),
            reply(140, "Next, grind the beans."), reply(150, "Keep going: grind the beans."),
        ],
    }  # fmt: skip
    clip, _ = parse_clip(raw, "by hand", 0)
    said = {
        107: "First, boil the water.",  # 1 s late: in time, right
        119: "Now warm the pot.",  # in time, wrong, and after a completed step
        138: "Now grind the beans.",  # 1 s early: in time, right, and after a completed step
        147: "Keep going: grind the beans.",  # 1.5 s early: not in time
    }
    records = [{"frame_idx": frame, "text": said.get(frame)} for frame in range(100, 160)]
    assert sorted(timely_replies(clip, records)) == [(0, 0, True), (1, 1, False), (2, 2, True)]
    assert ablation.next_steps(clip, records) == (1, 2)


def test_tables_hold_mean_and_deviation_and_leave_the_prose_alone(tmp_path, monkeypatch):
    for n, trained in enumerate(ablation.TRAINED):
        for seed in (0, 1):
            run = tmp_path / ablation.run_name(trained, seed)
            run.mkdir()
            rows = {row.key for rows in ablation.SECTIONS.values() for row in rows if row.trained == trained}
            numbers = {"speaking_event_f1": 0.5 + 0.2 * seed, "next_step": n / 100, "replies_right_f1": 0.25}
            (run / "measured.json").write_text(json.dumps(dict.fromkeys(rows, numbers)))
    page = ablation.page([0, 1], tmp_path, "the command", 0.25)
    # 0.5 and 0.7: mean 0.6, deviation 0.1 * sqrt(2). no-dst is number 3 (from 0) of those trained.
    assert "| `dst: false` | 0.600 ± 0.141 |  |  | 0.030 ± 0.000 | 0.250 ± 0.000 |" in page
    assert (
        page.startswith("`the command`")
        and "in 0.250 of cases" in page
        and page.count("\n### ") == len(ablation.SECTIONS)
    )

    monkeypatch.setattr(ablation, "PAGE", tmp_path / "page.md")
    ablation.PAGE.write_text(f"# By hand\n\nWords.\n\n{ablation.BELOW}\n\nan old table\n")
    ablation.write_tables(page)
    assert ablation.PAGE.read_text() == f"# By hand\n\nWords.\n\n{ablation.BELOW}\n\n{page}"


def test_every_trained_variant_is_in_a_table_and_every_row_was_trained():
    in_rows = {row.trained for rows in ablation.SECTIONS.values() for row in rows}
    assert in_rows == set(ablation.TRAINED)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_start_from_anywhere(script, tmp_path):
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
