"""The benchmarks start from anywhere, and the ablation counts and reports what it should."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_stream import firing, plain_records, random_clip, random_model, rows_of, stream_config

from benchmarks import ablation, controls, gpu, gpu_page, train_step
from prospect.clip_files import parse_clip
from prospect.clips import Clip
from prospect.config import Config
from prospect.errors import ProspectError
from prospect.metrics import Counts
from prospect.model import Prospect
from prospect.score import timely_replies
from prospect.stream import FrameRecord, Job, StreamSession, streamed_clips
from prospect.text_metrics import load_similarity
from prospect.tokenizer import Tokenizer

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


def test_a_paired_bootstrap_by_hand():
    """Where every clip and seed differs by the same, so does every draw; noise that both share cancels out."""
    rng, corpora = np.random.default_rng(1), ["a"] * 30 + ["b"] * 30
    asked = np.full((5, 60), 10)
    right = rng.integers(2, 8, (5, 60))
    one, other = np.stack([right + 1, asked], -1), np.stack([right, asked], -1)  # always one of ten more
    assert ablation.paired_bootstrap(one, other, corpora, 500) == pytest.approx((0.1, 0.1, 0.1))

    # Two seeds, one clip in each corpus; one is right everywhere, other with the first seed alone. Drawn seeds: both
    # the first (no difference), both the second (1), or one of each (1/2): 0, 1 and 1/2 with 1/4, 1/4 and 1/2.
    one, other = np.ones((2, 2, 2), int), np.array([[[1, 1], [1, 1]], [[0, 1], [0, 1]]])
    assert ablation.paired_bootstrap(one, other, ["a", "b"]) == (0.5, 0.0, 1.0)


def test_an_interval_holds_the_true_difference_as_often_as_it_says():
    """400 experiments: clips are harder and seeds better than others, and one row is right 0.1 more often. With 5
    seeds an interval from drawing them again is too narrow: it holds the truth somewhat less often than 95 in 100."""
    rng, held, corpora = np.random.default_rng(2), 0, ["a"] * 20 + ["b"] * 20
    for _ in range(400):
        clip, (one, other) = rng.normal(0, 0.1, 40), rng.normal(0, 0.02, (2, 5, 1))
        counts = [
            np.stack([rng.binomial(12, np.clip(p + clip + seed, 0, 1)), np.full((5, 40), 12)], -1)
            for p, seed in ((0.6, one), (0.5, other))
        ]
        _, low, high = ablation.paired_bootstrap(*counts, corpora, 200)
        held += low <= 0.1 <= high
    assert 0.85 < held / 400 < 0.99, held


def test_the_page_holds_mean_deviation_and_interval_and_leaves_the_prose_alone(tmp_path, monkeypatch):
    for row in ablation.ROWS.values():
        for seed in (0, 1):
            file = ablation.measured_file(row, ablation.Run(row.trained, "noisy", seed), tmp_path)
            file.parent.mkdir(exist_ok=True)
            right = 5 + 2 * seed if row.key == "state" else 4
            clips = {"1000/a": {"next_step": [right, 10], "replies_right_f1": [2, 8]}, "1001/a": {"next_step": [0, 0]}}
            if row.key == "summaries":
                clips["1001/a"] |= {"summary_precision": [3, 4], "summary_recall": [3, 6]}
            file.write_text(json.dumps(clips))
    monkeypatch.setattr(
        ablation,
        "measure_blind",
        lambda *_: {"1000/a": {"next_step": [1, 4], "replies_right_f1": [0, 0]}, "1001/a": {}},
    )
    found = ablation.results("noisy", list(ablation.TRAINED), [0, 1], tmp_path)
    page = ablation.page({"noisy": found}, {"noisy": 0.25}, [0, 1], "the command")
    # 0.5 and 0.7: mean 0.6, deviation 0.1 * sqrt(2).
    assert "| task state |  |  |  | 0.600 ± 0.141 | 0.250 ± 0.000 |" in page
    assert "| always silent |  |  |  | 0.250 | – |" in page
    assert "| task state − neither | **+0.200 [+0.100, +0.300]** | +0.000 [+0.000, +0.000] |" in page
    assert "| learned summaries (ProAssist's memory) | 0.750 ± 0.000 | 0.500 ± 0.000 |" in page
    assert page.startswith("`the command`") and "in 0.250 of cases" in page

    monkeypatch.setattr(ablation, "PAGE", tmp_path / "page.md")
    ablation.PAGE.write_text(f"# By hand\n\nWords.\n\n{ablation.BELOW}\n\nan old table\n")
    ablation.write_tables(page)
    assert ablation.PAGE.read_text() == f"# By hand\n\nWords.\n\n{ablation.BELOW}\n\n{page}"


def test_every_trained_variant_is_in_a_table_and_every_row_was_trained():
    assert {row.trained for row in ablation.MEMORY} == set(ablation.TRAINED)
    assert {row.trained for row in ablation.ROWS.values()} <= set(ablation.TRAINED)
    assert {key for pair in ablation.PAIRS for key in pair} <= {row.key for row in ablation.MEMORY}


def test_step_names_in_summaries_are_counted_as_by_hand():
    raw = {
        "video_uid": "c", "clip_idx": 0, "fps": 2, "start_frame_idx": 100, "end_frame_idx": 159,
        "dst": [{"id": f"S{n}", "name": name, "start_ts": 60 + n, "end_ts": 61 + n, "type": "step"}
                for n, name in enumerate(("boil the water", "grind the beans", "warm the pot"), 1)],
        "conversation": [update(110, "S1", "start"), update(120, "S1", "complete"), update(130, "S3", "start")],
    }  # fmt: skip
    clip, _ = parse_clip(raw, "by hand", 0)
    summary = "Done: boil the water; grind the beans; boil the water. Under way: warm the pot."  # two, one of them due
    written = {frame: {"context_event": {"summary": text}, "frame_idx": frame} for frame, text in
               ((115, "Done: nothing yet."), (140, summary), (141, None))}  # fmt: skip
    records = [written.get(frame, {"context_event": None, "frame_idx": frame}) for frame in range(100, 160)]
    assert ablation.steps_in_summaries(clip, records) == Counts(matched=1, predicted=2, reference=1)


def test_summaries_that_name_nothing_count_as_having_missed_it():
    raw = {
        "video_uid": "c", "clip_idx": 0, "fps": 2, "start_frame_idx": 100, "end_frame_idx": 109,
        "dst": [{"id": "S1", "name": "boil the water", "start_ts": 60, "end_ts": 61, "type": "step"}],
        "conversation": [update(101, "S1", "start"), update(102, "S1", "complete")],
    }  # fmt: skip
    clip, _ = parse_clip(raw, "by hand", 0)
    records = [record | {"context_event": None} for record in controls.spoken(clip, {})]
    records[5]["context_event"] = {"summary": "Done: nothing yet."}
    found = ablation.ratios(clip, records, load_similarity("lexical"), dst=False)
    assert found["summary_precision"] == (0, 0) and found["summary_recall"] == (0, 1)


# ---- streams that nobody would use ---------------------------------------------------------------


def test_a_corrupted_state_has_so_many_steps_wrong_and_leaves_the_clip_alone():
    steps = [{"id": f"S{n}", "name": f"step {n}", "start_ts": 60, "end_ts": 61, "type": "step"} for n in range(10)]
    raw = {
        "video_uid": "c", "clip_idx": 0, "fps": 2, "start_frame_idx": 0, "end_frame_idx": 999, "dst": steps,
        "conversation": [update(10, "S1", "start"), update(500, "S1", "complete")],
    }  # fmt: skip
    clip, _ = parse_clip(raw, "by hand", 0)
    before, corrupted, wrong = dict(clip.initial_state), controls.corrupted_state(0.2), Counter()
    for frame in range(1000):
        true, found = controls.true_state(clip, frame), corrupted(clip, frame)
        assert found == corrupted(clip, frame)
        wrong.update((true[step], found[step]) for step in true if found[step] != true[step])
    assert sum(wrong.values()) == pytest.approx(2000, abs=160)  # of 10,000: four standard deviations
    assert wrong["not_started", "completed"] == pytest.approx(wrong["not_started", "in_progress"], rel=0.2)
    assert clip.initial_state == before == controls.no_state(clip, 500)


@pytest.fixture(scope="module")
def streamed_case(tokenizer_dir) -> tuple[Prospect, Tokenizer, list[Job], Config]:
    """Three clips whose context is refreshed on the way, and decisions that some of their frames bring about."""
    tokenizer, draw = Tokenizer(tokenizer_dir, "plain"), np.random.default_rng(5)
    clips = [clip for n in range(9) if (clip := random_clip(draw, f"clip{n}", 150)).steps][:3]
    model, jobs = random_model(tokenizer, 2), [Job(clip, rows_of(draw, 150)) for clip in clips]
    config = firing(model, tokenizer, jobs, stream_config(data={"max_seq_len": 480}), 0.06)
    return model, tokenizer, jobs, replace(config, infer=replace(config.infer, lookahead=16))


def test_a_stream_that_nothing_changes_is_the_stream(streamed_case):
    model, tokenizer, jobs, config = streamed_case
    plain, other = (
        plain_records({job.clip.id: [FrameRecord(**record) for record in records] for job, records in found})
        for found in (
            streamed_clips(model, tokenizer, jobs, config, streams=1),
            controls.streamed(model, tokenizer, jobs, config, lambda session, new: None),
        )
    )
    assert plain[0] == other[0] and any(record["text"] for records in plain[0].values() for record in records)
    np.testing.assert_allclose(plain[1], other[1], atol=1e-4)


@pytest.mark.parametrize("state", ["completed", "in_progress"])
def test_a_refreshed_context_reports_the_state_that_is_put_there(streamed_case, state):
    """In every prompt but the first; what was predicted stays in the records."""
    model, tokenizer, jobs, config = streamed_case
    put = controls.report_state(lambda clip, frame: dict.fromkeys(clip.initial_state, state))
    refreshed, records = [], []

    def change(session: StreamSession, new: int) -> None:
        put(session, new)
        if session.units[0].state_before and len(session.units) < session.frame_idx - session.clip.start_frame:
            refreshed.append((session.prompt.count(f"[{state}]"), len(session.clip.steps)))

    for _, of in controls.streamed(model, tokenizer, jobs, config, change):
        records += of
    assert len(refreshed) > 3 and all(reported == steps for reported, steps in refreshed)
    assert any(other != state for record in records for other in record["dst_state"].values())


def test_a_stream_that_forgets_holds_four_frames(streamed_case, monkeypatch):
    """And sees one at a time: a frame further ahead would be seen with more than four before it."""
    model, tokenizer, jobs, config = streamed_case
    forget, held = controls.forget, []

    def change(session: StreamSession, new: int) -> None:
        forget(session, new)
        assert new == 1
        assert session.num_tokens == session.prompt_tokens + sum(unit.num_tokens for unit in session.units)
        held.append(len(session.units))

    monkeypatch.setattr(controls, "forget", change)
    list(controls.streamed(model, tokenizer, jobs[:1], config, change))
    assert held == [1, 2, 3] + [4] * 147


def test_the_timer_says_what_usually_comes_when_it_usually_comes():
    def clip(first: int, *replies: tuple[int, str]) -> Clip:
        raw = {
            "video_uid": f"c{first}", "clip_idx": 0, "fps": 2, "start_frame_idx": first, "end_frame_idx": first + 40,
            "inferred_goal": "Coffee", "dst": [], "conversation": [reply(first + at, text) for at, text in replies],
        }  # fmt: skip
        return parse_clip(raw, "by hand", 0)[0]

    train = [clip(0, (5, "a"), (20, "b")), clip(100, (9, "a"), (30, "c"), (35, "d")), clip(50, (7, "x"), (22, "c"))]
    # First replies after 5, 9 and 7 frames: a, a and x. Second ones after 20, 30 and 22: b, c and c. One has a third.
    assert controls.timer(clip(1000), train) == {1007: "a", 1022: "c"}
    assert controls.silent(clip(0), train) == {}
    said = controls.always(clip(1000), train)  # a and c come twice each, a first
    assert said == dict.fromkeys(range(1000, 1041), "a")
    records = controls.spoken(clip(1000), {1007: "a"})
    assert [record["frame_idx"] for record in records if record["speaking_decision"]] == [1007]
    assert len(records) == 41 and records[7]["text"] == "a" and records[8]["text"] is None


# ---- on a GPU ------------------------------------------------------------------------------------


def test_the_operations_of_a_step_by_hand():
    """Tiny: 2 layers 64 wide, 4 heads and 2 for keys of 16 each, 128 inside, 1024 words; sequences of 60 and 80."""
    batch = train_step.make_batch("tiny", 0.33, "cpu")
    block = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, the MLP
    frames, learned = 19 + 25, 19 + 26  # 0.32 of the tokens, and 0.33 of them
    projector = frames * (2 * 2 * 2048 * 64 + 3 * 2 * 64 * 64)  # the embeddings get no gradient
    attention = 3 * 2 * 2 * 2 * 64 * (60**2 + 80**2) / 2  # three times; scores and sums; 2 layers; half a square
    full = 6 * 140 * 2 * block + 6 * learned * 64 * 1024 + projector + attention
    assert train_step.needed_flops("tiny", batch) == full
    # With the transformer frozen its weights need no gradient: 4 in place of 6; and 1000 weights of adapters.
    lora = 4 * 140 * 2 * block + 4 * learned * 64 * 1024 + projector + attention + 6 * 140 * 1000
    assert sum(train_step.flop_parts("tiny", batch, 1000).values()) == lora


def row(**changes) -> gpu_page.Row:
    return {
        "shape": "3b", "who": "ours", "tokens": 4096, "learned": 900, "checkpointing": False, "estimate": 76.5e9,
        "flops": {"6 x 4,096 tokens": 60e12, "6 x 900": 20e12}, "matmul": 800e12, "peak": 1000e12,
        "seconds": [0.1, 0.2, 0.9], "loss": 12.3456, "memory": 80.25e9} | changes  # fmt: skip


def test_a_table_of_training_by_hand():
    """80 TFLOP in 0.2 s are 400 TFLOP per second; half of what fits in the time of transformers, 0.4 s."""
    rows = [row(), row(who="transformers", seconds=[0.4]), row(shape="8b", who="ours", failed="out of memory")]
    table = gpu_page.training_table(rows)
    assert table[2] == "| 3b | ours | 200.0 | 20,480 | 2.00x | 40% (50%) | 80.2 | 76.5 | 12.3456 |"
    assert table[4] == "| 8b | ours | out of memory |  |  |  |  | 76.5 |  |"
    assert "- 3b: 80.00 TFLOP = 6 x 4,096 tokens + 6 x 900" in table


def test_tables_of_streams_and_turns_by_hand():
    given = {"shape": "3b", "who": "ours", "graphs": True, "frames": 3, "prompt": 9, "bytes": 6e9, "bandwidth": 4e12}
    alone = given | {"streams": 1, "seconds": [0.003, 0.003, 0.004], "shown": 3}
    [*_, line] = gpu_page.streaming_table([alone])
    assert line == "| 3b, 3 frames after 9 tokens | ours | on | 1 | 3.00 | 3.90 | 300 | 50% |"
    [*_, line] = gpu_page.streaming_table([alone | {"streams": 8, "shown": 24, "graphs": False}])
    assert line == "| 3b, 3 frames after 9 tokens | ours | off | 8 | 3.00 | 3.90 | 2,400 |  |"
    turns = {"shape": "3b", "who": "ours", "graphs": None, "streams": 8, "turns": [[0.1, 160], [0.1, 240]]}
    [*_, line] = gpu_page.generation_table([turns])  # of one stream, 20 tokens and 30
    assert line == "| 3b | ours |  | 8 | 4.17 | 4.92 | 2,000 |"


def test_the_committed_page_is_measured_or_says_that_it_is_not():
    nothing = gpu_page.page({}, list(gpu.stages(gpu.CARD, Path())))
    assert nothing.count("not yet measured (`python benchmarks/gpu.py --stage ") == len(gpu.stages(gpu.CARD, Path()))
    committed = gpu.PAGE.read_text()
    measured = [("| ---" in part, "not yet measured" in part) for part in committed.split("\n## ")[1:]]
    assert len(measured) == nothing.count("\n## ") and all(map(any, measured))  # every section has one or the other
    assert committed == nothing or "Machine: " in committed


def test_finished_stages_are_skipped_and_a_wrong_card_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "NEEDED", ())  # nothing is measured
    done, differences = [], {"correctness": 1e-9}

    def child(name: str, arguments, out: Path) -> bool:
        done.append(name)
        rows = [{"what": "losses", "difference": differences[name], "limit": 1e-5}] if name in differences else []
        result = {"stage": name, "machine": "a card", "rows": rows, "seconds": 1.0}
        (out / f"{name}.json").write_text(json.dumps(result))
        return name != "train-3b"  # which fails

    monkeypatch.setattr(gpu, "run_child", child)
    stages = list(gpu.stages(gpu.TRIAL, tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--trial", "--out", str(tmp_path)])
    with pytest.raises(ProspectError, match="without a result: train-3b"):
        gpu.main()
    assert done == stages and stages[0] == "correctness"
    (tmp_path / "encode.json").unlink()
    assert gpu.main() == 0 and done == [*stages, "encode"]
    assert "Machine: a card." in (tmp_path / "GPU.md").read_text()

    for bad in (2e-5, math.nan):
        differences["correctness"] = bad
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--trial", "--out", str(tmp_path), "--stage", "correctness"])
        with pytest.raises(ProspectError, match="not what the CPU computes: losses"):
            gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--trial", "--out", str(tmp_path)])
    with pytest.raises(ProspectError, match="not what the CPU computes: losses"):
        gpu.main()
    assert done == [*stages, "encode", "correctness", "correctness"]
    assert gpu.wrong({"rows": [{"what": "records", "difference": 0.0, "limit": 1e-3, "differ": 2}]}) == ["records"]


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu_in_tiny_shapes(tmp_path):
    for package in ("transformers", "peft", "PIL"):
        pytest.importorskip(package, reason="pip install -r requirements-dev.txt")
    command = [sys.executable, "benchmarks/gpu.py", "--trial", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "GPU.md").read_text()
    assert page.count("not yet measured") == 3  # a trial leaves one of the three models out
    rows = json.loads((tmp_path / "train-3b.json").read_text())["rows"]
    assert [row["who"] for row in rows] == ["ours", "ours, compiled", "transformers"]
    lora = json.loads((tmp_path / "train-8b.json").read_text())["rows"]
    for losses in ([row["loss"] for row in rows], [row["loss"] for row in lora]):  # one computation, in bf16
        assert max(losses) - min(losses) < 2e-3 * losses[0]
    streams = json.loads((tmp_path / "stream-3b.json").read_text())["rows"]
    assert max(row["speaking"] for row in streams) - min(row["speaking"] for row in streams) < 0.02


# ---- all -----------------------------------------------------------------------------------------


SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_benchmarks_start_from_anywhere(script, tmp_path):
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
