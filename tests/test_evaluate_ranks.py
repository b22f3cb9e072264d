"""Evaluation on several ranks: the numbers of one, whatever is interrupted, full, broken or long.

Ranks are processes that talk through gloo, as `torchrun` would start them.
"""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import DST, SPEAKING, make_checkpoint, records_of, results_of, write_clips
from tiny import VISION_DIM, finish, launch, tiny_clip

from prospect import evaluate
from prospect.checkpoint import read_state
from prospect.jobs import deal

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), speaking=SPEAKING, dst=DST)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Nine clips of 8 to 40 frames, of two datasets."""
    draw = np.random.default_rng(3)
    made = [tiny_clip(draw, f"clip{n}", 8 + 4 * (n * 5 % 9), replies=3, words=4) for n in range(9)]
    for clip in made[::2]:
        clip |= {"dataset": "wtag", "fps": 4}
    return write_clips(tmp_path_factory.mktemp("clips"), "clips.json", made)


def evaluate_here(*words: str) -> int:
    sys.argv = ["evaluate", *words]
    return evaluate.main()


def run(log: Path, *words: object, world: int = 1, target=evaluate_here, status: int = 0, timeout: float = 60.0) -> str:
    """`python -m prospect.evaluate` on so many ranks, each of which ends with this status; what they print."""
    log.unlink(missing_ok=True)
    statuses = finish(launch(target, *map(str, words), world=world, log=log), timeout)
    shown = log.read_text()
    assert statuses == [status] * world, shown
    return shown


def table_of(shown: str) -> str:
    assert shown.count("command: `python") == 1
    return shown[shown.index("| | ") :]


@pytest.fixture(scope="module")
def alone(checkpoint, clips, tmp_path_factory) -> tuple[Path, str]:
    """What one process leaves, and prints."""
    out = tmp_path_factory.mktemp("alone") / "out"
    words = ["--checkpoint", checkpoint, "--data", clips, "--out", out, "--moments", "reference"]
    return out, run(out.parent / "log", *words)


def assert_same_results(out: Path, other: Path) -> None:
    """Files but records byte for byte; and records but the last digits of what depends on a batch's company."""
    for name in ("metrics.json", "metrics.md", "clips.jsonl", "settings.json", "references.jsonl"):
        assert (out / name).read_bytes().replace(bytes(out), b"") == (other / name).read_bytes(), name
    for folder in ("records", "records-reference"):
        assert sorted(os.listdir(out / folder)) == sorted(os.listdir(other / folder))
        for path in (out / folder).iterdir():
            for mine, theirs in zip(records_of(path), records_of(other / folder / path.name), strict=True):
                assert mine == theirs | {
                    name: pytest.approx(value, abs=1e-5) for name, value in theirs.items() if isinstance(value, float)
                }


# ---- the same numbers ----------------------------------------------------------------------------


def test_clips_are_dealt_by_length_the_longest_first():
    # 9, 7 and 5 to one each; then 4 to the 5, 3 to the 7, 2 to the first of two that have 9, 1 to the other.
    assert deal([2, 9, 1, 5, 3, 7, 4], 3) == [[1, 0], [5, 4], [3, 6, 2]]
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, ranks = rng.integers(1, 1000, rng.integers(1, 60)).tolist(), int(rng.integers(1, 9))
        shares = deal(lengths, ranks)
        assert sorted(number for share in shares for number in share) == list(range(len(lengths)))
        loads = [sum(lengths[number] for number in share) for share in shares]
        assert max(loads) - min(loads) <= max(lengths) and max(loads) <= 4 / 3 * max(sum(lengths) / ranks, max(lengths))
        assert all([lengths[n] for n in share] == sorted((lengths[n] for n in share), reverse=True) for share in shares)


@pytest.mark.parametrize("world", [2, pytest.param(11, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_numbers_of_one(world, checkpoint, clips, alone, tmp_path):
    """With more ranks than clips, too. Rank 0 alone prints."""
    out, shown_by_one = alone
    words = ["--checkpoint", checkpoint, "--data", clips, "--out", tmp_path / "out", "--moments", "reference"]
    shown = run(tmp_path / "log", *words, world=world)
    assert table_of(shown) == table_of(shown_by_one) and shown.count("frames in ") == 2
    assert_same_results(tmp_path / "out", out)
    assert sum(record["text"] is not None for path in (out / "records").iterdir() for record in records_of(path)) > 10

    again = run(tmp_path / "log", "--records", tmp_path / "out", world=2)
    assert table_of(again).split("command:")[0] == table_of(shown).split("command:")[0]


def waits_after_two(*words: str) -> int:
    """Every rank streams two clips, notes that it has, and waits to be killed."""
    whole = evaluate.streamed_clips

    def waits(*arguments, **options):
        for number, found in enumerate(whole(*arguments, **options)):
            if number == 2:
                Path(words[-1], f"rank{os.environ['RANK']}").touch()
                time.sleep(600)
            yield found

    evaluate.streamed_clips = waits
    return evaluate_here(*words)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_killed_and_resumed_with_another_number_of_ranks(world, checkpoint, clips, alone, tmp_path):
    words = ["--checkpoint", checkpoint, "--data", clips, "--moments", "reference", "--streams", 2, "--out"]
    out = tmp_path / "out"
    processes = launch(waits_after_two, *map(str, words), str(out), world=2, log=tmp_path / "log")
    until = time.monotonic() + 60
    while len(list(out.glob("rank?"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    for process in processes:
        process.kill()
    assert finish(processes) == [-signal.SIGKILL] * 2, (tmp_path / "log").read_text()
    finished = {path: path.read_bytes() for path in (out / "records").glob("*.jsonl")}
    assert len(finished) == 4
    shown = run(tmp_path / "log", *words, out, world=world)
    assert f"4 of 9 clips are streamed already, in {out / 'records'}\n" in shown
    assert all(path.read_bytes() == was for path, was in finished.items())
    assert results_of(out) == results_of(alone[0]) and len(list((out / "records").iterdir())) == 9


@pytest.mark.slow
@pytest.mark.parametrize("choose", [["--sweep"], ["--quiet", "QUIET", "--max-false-alarms", 59]])
def test_what_is_chosen_on_several_ranks_is_what_one_chooses(choose, clips, tmp_path):
    quiet = write_clips(tmp_path / "quiet", "quiet.json", [
        tiny_clip(np.random.default_rng(n), f"quiet{n}", 121, 0, 0) | {"conversation": []} for n in range(3)
    ])  # fmt: skip
    choose = [quiet if word == "QUIET" else word for word in choose]
    shown, found = [], []
    for world in (1, 2):
        checkpoint = make_checkpoint(tmp_path / f"{world}" / "step", "infer.evidence=null", speaking=0.5, dst=0.5)
        words = ["--checkpoint", checkpoint, "--data", clips, *choose, "infer.max_reply_tokens=2"]
        shown.append(run(tmp_path / "log", *words, world=world).replace(str(checkpoint), ""))
        found.append(read_state(checkpoint).thresholds)
    lines = [[line for line in text.splitlines() if line.startswith("|") or "chosen" in line] for text in shown]
    assert lines[0] == lines[1] and len(lines[0]) > 4 and "evidence" in found[0]
    assert found[0] == pytest.approx(found[1], abs=1e-9)


@pytest.mark.slow
def test_under_torchrun(checkpoint, clips, alone, tmp_path):
    """Also when a rank fails: torchrun then ends with its own report, ours is one line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "prospect.evaluate"]
    command += ["--checkpoint", checkpoint, "--data", clips, "--out", tmp_path, "--moments", "reference"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_results(tmp_path, alone[0])
    done = subprocess.run([*map(str, command), "infer.lookahead=x"], cwd=ROOT, env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode != 0 and len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


# ---- what goes wrong -----------------------------------------------------------------------------


def disk_of_rank_1_is_full(*words: str) -> int:
    """Rank 1 fails at its first records; rank 0 has finished one clip by then, and waits for that before the second."""
    real, stream, failed = evaluate.write_text, evaluate.streamed_clips, Path(words[-1]).with_name("failed")

    def full(path: Path, text: str) -> None:
        if os.environ["RANK"] == "1" and path.suffix == ".jsonl":
            failed.touch()
            raise evaluate.ProspectError(os.strerror(errno.ENOSPC), where=str(path))
        real(path, text)

    def waits(*arguments, **options):
        for number, found in enumerate(stream(*arguments, **options)):
            while number == 1 and not failed.exists():
                time.sleep(0.02)
            time.sleep(0.5 * (number == 1))  # for the news
            yield found

    evaluate.write_text, evaluate.streamed_clips = full, waits
    return evaluate_here(*words)


def test_an_error_on_one_rank_ends_all_with_one_line(checkpoint, clips, tmp_path):
    words = ["--checkpoint", checkpoint, "--data", clips, "--streams", 1, "--out", tmp_path / "out"]
    shown = run(tmp_path / "log", *words, world=2, target=disk_of_rank_1_is_full, status=2)
    assert shown.count("error: ") == 1 and "No space left on device" in shown and "Traceback" not in shown
    # Rank 0 heard of it soon, and left what it had finished.
    assert len(list((tmp_path / "out" / "records").iterdir())) in (1, 2)
    shown = run(tmp_path / "log", *words[:2], "--data", tmp_path / "none.json", world=2, status=2)
    assert shown.count("\n") == 1 and "no such clip file" in shown
    assert run(tmp_path / "log", "--sweep", world=2, status=2).count("\n") == 1


@pytest.fixture
def too_long(clips, tmp_path) -> Path:
    """The nine clips, and one in which the user says more than a context of 512 tokens holds."""
    raws = json.loads(clips.read_text())
    wordy = tiny_clip(np.random.default_rng(1), "wordy", 20, replies=1, words=3, wish="take the block " * 300)
    return write_clips(shutil.copytree(clips.parent, tmp_path / "in"), "clips.json", [*raws[:4], wordy, *raws[4:]])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_clip_that_cannot_be_streamed_is_found_before_the_first_is(world, checkpoint, too_long, tmp_path):
    words = ["--checkpoint", checkpoint, "--data", too_long, "--out", tmp_path / "out"]
    shown = run(tmp_path / "log", *words, world=world, status=2)
    assert shown.count("\n") == 1 and "clip wordy" in shown and not (tmp_path / "out").exists()
    shown = run(tmp_path / "log", *words, "data.on_bad=skip", world=world)
    assert shown.count("skipped: ") == 1 and "clip wordy" in shown and "| clips | 4 | 5 |  |" in shown
    assert len(list((tmp_path / "out" / "records").iterdir())) == 9


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_clip_whose_answer_is_not_finite(world, checkpoint, clips, tmp_path):
    """Finite embeddings so large that the model's sums are not: no check finds them before."""
    raws = json.loads(clips.read_text())
    clip = tiny_clip(np.random.default_rng(1), "huge", 20, replies=1, words=3)
    file = write_clips(shutil.copytree(clips.parent, tmp_path / "in"), "clips.json", [*raws[:4], clip, *raws[4:]])
    embeddings = file.parent / "embeddings" / "huge_embeddings.npy"
    rows = np.load(embeddings)
    rows[11] = 3e38
    np.save(embeddings, rows)
    few = file.with_name("few.json")  # the others, with the embeddings that they have
    few.write_text(json.dumps(raws))

    words = ["--checkpoint", checkpoint, "--data", file, "--out", tmp_path / "out", "--moments", "reference"]
    shown = run(tmp_path / "log", *words, world=world, status=2)
    assert shown.count("error: ") == 1 and "clip huge, frame" in shown and "the model's answer is not finite" in shown
    words.append("data.on_bad=skip")
    shutil.rmtree(tmp_path / "out")
    shown = run(tmp_path / "log", *words, world=world)
    assert shown.count("skipped: ") == 2 and shown.count("clip huge, frame") == 2  # in both passes
    assert not (tmp_path / "out" / "records" / "huge.jsonl").exists()
    words[3], words[5] = few, tmp_path / "few"
    run(tmp_path / "log", *words, world=world)
    assert results_of(tmp_path / "out") == results_of(tmp_path / "few")
    again = run(tmp_path / "log", "--records", tmp_path / "out")
    assert table_of(again).split("command:")[0] == table_of(shown).split("command:")[0]


# ---- many clips ----------------------------------------------------------------------------------

FRAMES = 12


def many_clips(folder: Path, count: int, width: int) -> Path:
    """A JSONL file of so many clips, with embeddings that are pickled and mapped by turns."""
    (folder / "embeddings").mkdir(parents=True)
    draw = np.random.default_rng(0)
    with open(folder / "clips.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            clip = tiny_clip(draw, f"clip{number}", FRAMES, replies=1, words=2)
            file.write(json.dumps(clip) + "\n")
            rows = draw.normal(size=(FRAMES, width)).astype(np.float32)
            name = folder / "embeddings" / f"clip{number}_embeddings"
            if number % 2:
                np.save(name.with_suffix(".npy"), rows)
            else:
                name.with_suffix(".pkl").write_bytes(pickle.dumps(rows))
    return folder / "clips.jsonl"


def with_few_files(*words: str) -> int:
    """At most 48 files open at once. Leaves the largest memory this process ever had beside --out, in KB."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    status = evaluate_here(*words)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(words[words.index("--out") + 1]).with_suffix(".peak").write_text(str(peak))
    return status


QUIET = ["infer.speaking_threshold=1", "infer.dst_threshold=1", "infer.coupling=0"]


def test_more_clips_than_files_may_be_open(checkpoint, tmp_path):
    file = many_clips(tmp_path / "in", 110, VISION_DIM)
    shown = run(tmp_path / "log", "--checkpoint", checkpoint, "--data", file, "--out", tmp_path / "out", *QUIET,
                target=with_few_files)  # fmt: skip
    assert "| clips | 110 |" in shown


@pytest.mark.slow
def test_ten_times_as_many_clips_take_the_same_memory(tmp_path):
    """200 and 2,000 clips of 98 KB each, as long as no more than the first are kept."""
    checkpoint = make_checkpoint(tmp_path / "step", "model.vision_dim=2048")
    peaks = []
    for count in (200, 2000):
        file, out = many_clips(tmp_path / f"{count}", count, 2048), tmp_path / f"out{count}"
        words = ["--checkpoint", checkpoint, "--data", file, "--out", out, *QUIET]
        assert f"| clips | {count} |" in run(tmp_path / "log", *words, target=with_few_files, timeout=600)
        peaks.append(int(out.with_suffix(".peak").read_text()))
    assert peaks[1] < 1.1 * peaks[0], peaks
