"""What was found out about clips is kept: nothing changes by it, nothing old is believed, nothing is lost in a kill."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import syscalls
from tiny import VISION_DIM, finish, launch, tiny_config, train_here, write_tiny_corpus

from prospect import check, kept, plan
from prospect.build import load_corpora, load_corpus, load_tokenizer
from prospect.data import Corpus
from prospect.distributed import Ranks, start_ranks, stop_ranks
from prospect.errors import ProspectError
from prospect.processes import Processes
from prospect.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread_and_usual_signals")

ROOT = Path(__file__).parents[1]
CLIPS = 12


@pytest.fixture
def done(monkeypatch) -> list[tuple[str, int]]:
    """(task, clip) of all that is found out, in order. Files are small, and kept at once, however new a clip is."""
    found = []
    for module, name in ((check, "check_clip"), (plan, "find_windows")):
        real = getattr(module, name)

        def find(source, index, given, real=real):
            found.append((real.__name__, index))
            return real(source, index, given)

        find.__module__ = module.__name__
        monkeypatch.setattr(module, name, find)
    monkeypatch.setattr(kept, "PART", 5)
    monkeypatch.setattr(kept, "CHUNK", 2)
    monkeypatch.setattr(kept, "settled", lambda stamp, at: True)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write_tiny_corpus(tmp_path / "data", clips=CLIPS)
    load_tokenizer(tiny_config(tmp_path / "data"))
    shutil.rmtree(tmp_path / "data/.prospect", ignore_errors=True)
    return tmp_path / "data"


def corpus_of(folder: Path, *overrides: str) -> Corpus:
    config = tiny_config(folder, *overrides)
    return load_corpus(config, Tokenizer(folder / "runs/tiny/tokenizer", "plain"), "train")


def as_values(corpus: Corpus) -> dict:
    """All that a plan holds."""
    values = vars(corpus.plan) | {
        "table": corpus.plan.table.tolist(),
        "origins": list(map(asdict, corpus.plan.origins)),
    }
    return values | {"spans": [spans.tolist() for spans in corpus.plan.spans]}


EVERYTHING = [(name, index) for name in ("check_clip", "find_windows") for index in range(CLIPS)]


# ---- the same result, found once -----------------------------------------------------------------


@pytest.mark.parametrize("cut", ["data.long_clips=truncate", "data.summaries=1"])
def test_a_second_start_finds_nothing_out_and_has_the_same_plan_and_sequences(folder, done, cut):
    overrides = ["data.max_seq_len=200" if "truncate" in cut else "data.max_seq_len=450", cut]  # so that clips are cut
    clips = json.loads((folder / "train.json").read_text())
    clips[3]["conversation"][0]["end_frame"] += 100  # clamped, and reported
    (folder / "train.json").write_text(json.dumps(clips))
    cold = corpus_of(folder, *overrides)
    assert sorted(done) == EVERYTHING and "clamped" in cold.warnings[0]
    assert cold.plan.units if "truncate" in cut else any(entry.window.summarized for entry in cold.entries)
    done.clear()
    warm = corpus_of(folder, *overrides)
    assert done == [] and as_values(warm) == as_values(cold)
    for index in range(len(cold)):
        one, other = cold[1, index], warm[1, index]
        assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.image_embeds, other.image_embeds)
        assert all(np.array_equal(one.labels[key], other.labels[key]) for key in one.labels)


def test_training_steps_are_the_same_bits(folder, done):
    def steps(name: str) -> list[dict]:
        config = tiny_config(folder, f"run.name={name}", "train.max_steps=2", "train.eval_every=100")
        shutil.copytree(folder / "runs/tiny/tokenizer", folder / f"runs/{name}/tokenizer", dirs_exist_ok=True)
        assert train_here(folder, f"run.name={name}", "train.max_steps=2", "train.eval_every=100") == 0
        lines = (Path(config.run.out) / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]

    cold = steps("cold")
    assert len(done) == 2 * (CLIPS + 3)
    done.clear()
    assert steps("warm") == cold and done == []


# ---- nothing old is believed ---------------------------------------------------------------------


def test_an_embedding_file_that_changed_is_checked_again_alone(folder, done):
    corpus_of(folder)
    path = folder / "embeddings/clip7_embeddings.npy"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size, and the same time
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    done.clear()
    with pytest.raises(ProspectError, match="1 NaN and 0 infinite values in 1 of"):
        corpus_of(folder)
    assert done == [("check_clip", 7)]


def test_another_file_under_the_same_name_is_not_taken_for_the_first(folder, done):
    """A .pkl is looked for before an .npy, and a file that is moved there may have the first one's size and time."""
    corpus_of(folder)
    done.clear()
    path = folder / "embeddings/clip7_embeddings.npy"
    aside, before = folder / "other.npy", path.stat()
    np.save(aside, np.load(path) + 1)
    os.utime(aside, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(aside, path)
    np.load(folder / "embeddings/clip8_embeddings.npy").dump(folder / "embeddings/clip8_embeddings.pkl")
    (folder / "embeddings/clip9_embeddings.npy").unlink()
    corpus = corpus_of(folder, "data.on_bad=skip")
    assert done == [("check_clip", 7), ("check_clip", 8), ("check_clip", 9), ("find_windows", 7), ("find_windows", 8)]
    assert "no embeddings at" in corpus.skipped[0] and len(corpus.skipped) == 1


@pytest.mark.parametrize(
    "change, again",
    [
        ("data.max_seq_len=400", ["find_windows"]),
        ("data.overlap=0.5", ["find_windows"]),
        ("model.vision_dim=17", ["check_clip"]),  # of which none passes
        ("run.seed=1", ["find_windows"]),  # from which frames, and summaries, may be drawn
        ("data.batch_tokens=600", []),
        ("data.neg_frame_sampling_rate=0.3", []),
        ("clips", ["check_clip", "find_windows"]),
        ("tokenizer", ["find_windows"]),
        ("code", ["check_clip", "find_windows"]),
    ],
)
def test_what_depends_on_a_change_is_found_out_again(folder, done, monkeypatch, change, again):
    corpus_of(folder)
    done.clear()
    if change == "clips":
        (folder / "train.json").write_text((folder / "train.json").read_text() + "\n")
    elif change == "tokenizer":
        path = folder / "runs/tiny/tokenizer/tokenizer.json"
        path.write_text(path.read_text() + "\n")
    elif change == "code":
        monkeypatch.setattr(kept, "code_version", lambda find: "another")
    try:
        corpus_of(folder, *([change] if "=" in change else []))
    except ProspectError as error:
        assert "wide, model.vision_dim is 17" in str(error)
    assert done == [(name, index) for name in again for index in range(CLIPS)]


def test_the_code_version_is_of_every_module_that_takes_part(tmp_path):
    """Each of them is changed on the disk, in a copy of the package."""
    script = (
        "import sys; from pathlib import Path; from prospect import check, kept, plan; root = Path('prospect')\n"
        "versions = lambda: tuple(kept.code_version.__wrapped__(f) for f in (check.check_clip, plan.find_windows))\n"
        "before = versions()\n"
        "for name in sys.argv[1:]:\n"
        "    path = root / name; text = path.read_text(); path.write_text(text + '# changed')\n"
        "    print(*[int(a != b) for a, b in zip(versions(), before)]); path.write_text(text)"
    )
    names = [
        "check.py",
        "clip_files.py",
        "embeddings.py",
        "packs.py",
        "dst.py",
        "sequence.py",
        "tokenizer.py",
        "model.py",
    ]
    shutil.copytree(ROOT / "prospect", tmp_path / "prospect")
    command = [sys.executable, "-c", script, *names]
    changed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert changed == ["1 1", "1 1", "1 1", "1 1", "1 1", "0 1", "0 1", "0 0"]


def test_a_kept_file_that_is_not_as_it_was_written_is_not_believed(folder, done):
    corpus_of(folder)
    parts = sorted(folder.glob(".prospect/train.json/*/*.jsonl"))
    assert len(parts) == 2 * 3  # of 5 clips each
    text = parts[0].read_text()
    parts[0].write_text(text.replace('"S', '"T') if '"S' in text else text.replace("16", "17"))
    parts[1].write_bytes(parts[1].read_bytes()[:-20])
    parts[2].write_bytes(b"\xff\x00")
    parts[3].write_text("")
    done.clear()
    corpus_of(folder)
    assert len(done) == 5 + 5 + 2 + 5


def test_a_file_may_change_twice_within_a_tick(folder):
    """The first change is read, the second has the same size and time: what was found out is not kept so soon."""
    now = time.time()
    stamp = (100, int(now * 1e9) // 1000 * 1000 + 7, int(now * 1e9), 1, 0)
    assert not kept.settled(stamp, now + 0.05) and kept.settled(stamp, now + 0.2)
    whole = int(now) * 10**9  # a file system of whole seconds
    assert not kept.settled((100, whole, whole, 1, 0), now + 0.9) and kept.settled((100, whole, whole, 1, 0), now + 2.1)
    corpus_of(folder)
    assert not list(folder.glob(".prospect/train.json/*/*")) or time.time() - now > kept.TICK


def test_settings_that_are_long_gone_are_removed(folder, done):
    for length in range(400, 412):
        corpus_of(folder, f"data.max_seq_len={length}")
    kept_folders = sorted(path.name.split("-")[0] for path in (folder / ".prospect/train.json").iterdir())
    assert kept_folders == ["check", *["windows"] * kept.SETTINGS_KEPT]
    done.clear()
    corpus_of(folder, "data.max_seq_len=411")
    assert done == []


def test_a_bad_clip_is_checked_until_it_is_good(folder, done):
    clips = json.loads((folder / "train.json").read_text())
    clips[4]["fps"] = -1
    (folder / "train.json").write_text(json.dumps(clips))
    for _ in range(2):
        done.clear()
        corpus = corpus_of(folder, "data.on_bad=skip")
        assert len(corpus.skipped) == 1 and "clip clip4, fps" in corpus.skipped[0]
    assert done == [("check_clip", 4)]


def test_the_checker_itself_believes_nothing(folder, done, monkeypatch, capsys):
    corpus_of(folder)
    done.clear()
    monkeypatch.setattr(sys, "argv", ["check", str(folder / "train.json"), "--vision-dim", str(VISION_DIM)])
    assert check.main() == 0 and done == EVERYTHING[:CLIPS]


# ---- interrupted, shared, read-only, full --------------------------------------------------------


@pytest.mark.parametrize("how", [KeyboardInterrupt, signal.SIGKILL])
def test_interrupted_it_resumes_where_it_was(folder, done, monkeypatch, how):
    real = check.check_clip

    def find(source, index, given):
        if index == 8 and how is KeyboardInterrupt:
            raise KeyboardInterrupt
        if index == 8:
            os.kill(os.getpid(), how)
        return real(source, index, given)

    find.__module__ = "prospect.check"
    with monkeypatch.context() as patched:
        patched.setattr(check, "check_clip", find)
        if how is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                corpus_of(folder)
        elif (child := os.fork()) == 0:
            corpus_of(folder)
            os._exit(0)
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -how
    done.clear()
    corpus_of(folder)
    # The first part is kept; of the second, after Ctrl-C, the chunk that was done when it came.
    first = 7 if how is KeyboardInterrupt else 5
    assert done == [pair for pair in EVERYTHING if pair[0] == "find_windows" or pair[1] >= first]


def test_where_nothing_can_be_written_beside_the_data_it_is_kept_in_the_users_folder(folder, done):
    (folder / ".prospect").write_text("")  # no folder can be made: as in a read-only one, also for root
    corpus_of(folder)
    assert len(list((folder.parent / "home/prospect").rglob("*.jsonl"))) == 6
    done.clear()
    corpus_of(folder)
    assert done == []


def test_where_it_cannot_be_kept_at_all_one_line_says_so(folder, done, monkeypatch, capsys):
    (folder / ".prospect").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / ".prospect"))
    kept._report_once.cache_clear()
    first = corpus_of(folder)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: what was found about the clips is not kept, the next start begins anew: ")
    done.clear()
    assert as_values(corpus_of(folder)) == as_values(first) and done == EVERYTHING


def plan_watched(folder: Path, attacked: int | None, error: int | None) -> tuple[int, list[str]]:
    """Plan in a fork, whose changes to the disk are watched: its exit status, and the changes."""
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            listener = syscalls.trap()
            socket.send_fds(there, [b" "], [listener])
            os.close(listener)
            corpus_of(folder)
            status = 0
        finally:
            os._exit(status)
    there.close()
    _, [listener], _, _ = socket.recv_fds(here, 1, 1)
    changes = syscalls.watch(listener, folder.resolve(), child, attacked, error)
    os.close(listener)
    here.close()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), changes


def attack_every_change(folder: Path) -> None:
    """Kill a plan, or fill its disk, at each change it makes; whatever that leaves, the next one is right."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "home")
    kept.PART, kept.CHUNK, kept.settled = 5, 2, lambda stamp, at: True
    expected = as_values(corpus_of(folder))
    shutil.rmtree(folder / ".prospect")
    status, calm = plan_watched(folder, None, None)
    assert status == 0 and sum("rename" in change for change in calm) == 6, calm
    shutil.rmtree(folder / ".prospect")
    for error, ends in ((None, -signal.SIGKILL), (errno.ENOSPC, 0)):
        for number in range(len(calm)):
            status, changes = plan_watched(folder, number, error)
            assert status == ends, (number, changes)
            complete = list(folder.rglob(".prospect/**/*.jsonl"))
            assert error is None or not list(folder.rglob("*.writing")), (number, changes)
            assert all(len(path.read_text().splitlines()) in (3, 6) for path in complete), (number, changes)
            assert as_values(corpus_of(folder)) == expected, (number, changes)
            shutil.rmtree(folder / ".prospect", ignore_errors=True)
            shutil.rmtree(folder / "home", ignore_errors=True)


@pytest.mark.skipif(not syscalls.can_trap(), reason="needs Linux with seccomp notifications")
@pytest.mark.slow
def test_killed_or_full_at_every_change_to_the_disk(folder):
    log = folder.parent / "log"  # not where changes are watched
    assert finish(launch(attack_every_change, folder, log=log), 300) == [0], log.read_text()


def plan_at_once(folder: Path, out: Path) -> None:
    kept.PART, kept.CHUNK, kept.settled = 2, 1, lambda stamp, at: True
    while len(list(out.parent.glob("*.here"))) < 2:  # so that both begin together
        out.with_suffix(".here").touch()
        time.sleep(0.001)
    out.write_text(json.dumps(as_values(corpus_of(folder)), default=str))


def test_two_runs_share_what_they_find_at_the_same_time(folder, done):
    processes = [
        p for name in ("a", "b") for p in launch(plan_at_once, folder, folder / f"{name}.plan", log=folder / "log")
    ]
    assert finish(processes) == [0, 0], (folder / "log").read_text()
    assert (folder / "a.plan").read_text() == (folder / "b.plan").read_text()
    assert not list(folder.rglob("*.writing"))
    kept.PART = 2
    corpus = corpus_of(folder)
    assert done == [] and json.dumps(as_values(corpus), default=str) == (folder / "a.plan").read_text()


# ---- processes and ranks -------------------------------------------------------------------------


def test_processes_plan_what_one_does(folder, monkeypatch):
    (folder / "prospect.py").write_text("another module of this name, in the current directory")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(kept, "settled", lambda stamp, at: False)  # nothing is kept
    alone = corpus_of(folder)
    monkeypatch.setattr(kept, "WORTH_PROCESSES", 1)
    monkeypatch.setattr(kept, "CHUNK", 2)
    monkeypatch.setattr(kept, "cores", lambda: 2)
    assert as_values(corpus_of(folder)) == as_values(alone)
    assert not (folder / ".prospect").exists()


ERRANDS = """
import os
from prospect.errors import ProspectError
def run(given, message):
    if message == 3:
        os._exit(1)
    if message == 2:
        raise ProspectError("two", where="here")
    return given + message
"""


def test_what_goes_wrong_in_a_process_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "errands.py").write_text(ERRANDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import errands

    with Processes(errands.run, 10, 1) as processes:
        answers = [processes.submit(number) for number in (1, 2, 3)]
        assert answers[0].result() == 11
        with pytest.raises(ProspectError, match="two") as raised:
            answers[1].result()
        assert raised.value.where == "here"
        with pytest.raises(ProspectError, match="was killed, perhaps for lack of memory"):
            answers[2].result()


def test_no_process_outlives_the_one_that_started_it(tmp_path):
    (tmp_path / "errands.py").write_text("import os, time\ndef run(given, message): print(os.getpid()); time.sleep(60)")
    script = "import sys, errands; sys.path.insert(0, sys.argv[1]); from prospect.processes import Processes\n"
    script += "with Processes(errands.run, 0, 1) as processes: processes.submit(0).result()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", script, str(ROOT)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        child = int(process.stderr.readline())  # which prints where it does not disturb the answers
        assert Path(f"/proc/{child}").exists()
        process.kill()
    until = time.monotonic() + 20
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < until
        time.sleep(0.05)


def plan_as_rank(folder: Path) -> None:
    ranks = start_ranks("cpu")
    found, real = [], plan.make_plan
    plan.make_plan = lambda wanted: found.append(1) or real(wanted)
    config = tiny_config(folder)
    train, val, _ = load_corpora(config, load_tokenizer(config), ranks)
    values = {name: value for name, value in as_values(train).items() if name != "origins"}
    (folder / f"rank{ranks.rank}").write_text(
        json.dumps([len(found), len(val), values, train[0, 3].input_ids.tolist()])
    )
    stop_ranks(ranks)


def test_one_rank_plans_and_the_others_receive_its_plan(folder):
    assert finish(launch(plan_as_rank, folder, world=2, log=folder / "log")) == [0, 0], (folder / "log").read_text()
    first, second = (json.loads((folder / f"rank{rank}").read_text()) for rank in (0, 1))
    assert (first[0], second[0]) == (2, 0) and first[1:] == second[1:]


def test_large_files_are_planned_in_a_process_of_its_own(folder, monkeypatch):
    config = tiny_config(folder)
    here = [as_values(corpus) for corpus in load_corpora(config, load_tokenizer(config), Ranks(0, 1, "cpu"))[:2]]
    monkeypatch.setattr(plan, "LARGE", 0)
    monkeypatch.setattr(plan, "make_plan", None)  # not here
    assert [
        as_values(corpus) for corpus in load_corpora(config, load_tokenizer(config), Ranks(0, 1, "cpu"))[:2]
    ] == here
    (folder / "train.json").write_text("[1]")
    with pytest.raises(ProspectError, match="clip 0: a clip must be a JSON object, not int"):
        load_corpora(config, load_tokenizer(config), Ranks(0, 1, "cpu"))


def test_a_rank_that_sees_another_file_says_so(folder):
    corpus = corpus_of(folder)
    (folder / "train.json").write_text((folder / "train.json").read_text() + " ")
    with pytest.raises(ProspectError, match=r"train.json: has \d+ bytes, and \d+ for rank 0"):
        plan.open_planned([str(folder / "train.json")], corpus.config, corpus.plan)
