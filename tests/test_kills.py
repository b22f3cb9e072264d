"""A hundred kills: a run is killed at every change it makes to the disk, and the disk is full from every change on.

A change is a system call of a rank within the run's folder, from the start to the next checkpoint, as the kernel
reports them (tests/syscalls.py). Each is attacked once by SIGKILL and once by ENOSPC. Whatever that leaves, the run
started again must end as the undisturbed one: the same weights, moments, random states, place in the data,
metrics.jsonl, `best` and `last`, byte for byte, and no file besides. The run of 30 steps is attacked in three states:

    nothing    from its first file on, tokenizer and first checkpoint
    stopped    just before its validation of step 24. It makes up for that and saves step 24 once more: over itself, as
               the new best, with an older one to remove. So this one save does all that a save can do. (On one rank up
               to the save after the next checkpoint, which has a new name.)
    torn       as killed in that save between the two renames: what is attacked is the recovery

What a resumed run does depends on its folder alone, and it begins by tidying that up. So the test tidies up first, by
the same function, and of folders that are then alike resumes one.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import syscalls
from safetensors.torch import load_file
from tiny import as_rank, finish, launch, tiny_config, train_here, write_tiny_corpus

import train
from prospect.build import load_corpus, load_tokenizer, new_model
from prospect.checkpoint import checkpoints, clean_up_after_crash, read_state, step_directory

pytestmark = pytest.mark.skipif(not syscalls.can_trap(), reason="needs Linux with seccomp notifications")

# By loss the newest is the best, so that a save moves the link to the best, too.
SETTINGS = ["train.max_steps=30", "train.save_every=3", "train.eval_every=3", "train.keep=1", "infer.evidence=0.5"]
SETTINGS += ["train.best_by=loss"]
SHARDED = "train.sharded_checkpoints=true"

# Of each layout: ranks, settings, and the attacks: the state, the rank, and what the first change no longer attacked
# names. On two ranks that is the one save, and of rank 1 what it writes: its shard.
LAYOUTS = {
    "one rank": (1, [], [
        ("nothing", 0, "step-000006"), ("stopped", 0, "step-000030"), ("torn", 0, "tiny/.config.yaml")]),
    "one rank, sharded": (1, [SHARDED], [("stopped", 0, "step-000027"), ("torn", 0, "tiny/.config.yaml")]),
    "two ranks": (2, [], [("stopped", 0, "step-000027")]),
    "two ranks, sharded": (2, [SHARDED, "train.parallel=fsdp"], [
        ("stopped", 0, "step-000027"), ("stopped", 1, "step-000027")]),
}  # fmt: skip
RUN = Path("runs/tiny")
TORN = "rename tiny/step-000024"  # the change before which the state `torn` ends


# ---- ranks as forks of a process that has everything ready ---------------------------------------


@dataclass
class Ended:
    statuses: list[int]  # of each rank; -9: killed by the attack; -99: left behind, and killed by us
    changes: list[str]  # of the watched rank
    log: str
    outlived: float  # seconds from the watched rank's end to the last one's


def run_ranks(
    folder: Path,
    world: int,
    settings: list[str],
    *,
    prepare: Callable[[], None] | None = None,
    watched: int = 0,
    attacked: int | str | None = None,
    error: int | None = None,
) -> Ended:
    """`python train.py` in `folder` on `world` ranks. prepare: called in each; the others: see syscalls.watch."""
    (folder / "log").unlink(missing_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": str(world)}
    here, there = socket.socketpair()
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1] == 0:
            here.close()
            as_a_fork(folder, shared | {"RANK": str(rank)}, settings, prepare, there if rank == watched else None)
    there.close()
    _, [listener], _, _ = socket.recv_fds(here, 1, 1)
    changes = syscalls.watch(listener, (folder / "runs").resolve(), pids[watched], attacked, error)
    os.close(listener)
    here.close()
    since = time.monotonic()
    statuses = [wait_for(pid, since + 20) for pid in pids]
    return Ended(statuses, changes, (folder / "log").read_text(), time.monotonic() - since)


def as_a_fork(
    folder: Path, shared: dict[str, str], settings: list[str], prepare: Callable | None, to: socket.socket | None
) -> None:
    """What a fork does, to its end. to: where the listener goes, if its changes are watched."""
    status: int | str | None = 1
    try:
        os.chdir(folder)
        if to is not None:
            listener = syscalls.trap()
            socket.send_fds(to, [b" "], [listener])
            os.close(listener)
        if prepare is not None:
            prepare()
        as_rank(shared, Path("log"), train_here, (Path("."), *settings))
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(pid: int, until: float) -> int:
    """The exit status of a child; one that is not done by `until` is killed and counts as -99."""
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -99


def load_once(folder: Path, settings: list[str]) -> None:
    """Let the forks of this process find corpora and model loaded, and no time go into asking git for the version."""
    os.chdir(folder)
    config = tiny_config(Path("."), *settings)
    tokenizer = load_tokenizer(config)
    corpora = {split: load_corpus(config, tokenizer, split) for split in ("train", "val")}
    model = new_model(config, tokenizer)
    train.load_tokenizer = lambda config: tokenizer
    train.load_corpora = lambda config, tokenizer, ranks: (corpora["train"], corpora["val"], [])
    train.new_model = lambda config, tokenizer: model


def stop_in_validation(number: int) -> None:
    """Have this rank asked to stop, by SIGTERM, in its validation of that number."""
    real, calls = train.validate, []

    def validate(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    train.validate = validate


# ---- what is on the disk -------------------------------------------------------------------------


def tree(run: Path) -> dict[str, str]:
    """Each file, folder and link by name, and what it holds; without what a clock or a process number has put there."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = re.sub(r"\.\d+\.writing$", ".writing", str(path.relative_to(run)))
        name = re.sub(r"\.tmp\w{6}$", ".tmp", name)  # of safetensors
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            content = path.read_bytes()
            if path.name == "metrics.jsonl":
                content = re.sub(rb', "tokens_per_second": [\d.e+-]+', b"", content)
            if path.suffix == ".safetensors":  # torch's shards have their header in any order
                end = 8 + int.from_bytes(content[:8], "little")
                content = json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def assert_nothing_is_lost(run: Path, before: str) -> None:
    """Every checkpoint that has a name loads, `last` and `best` lead to one, and the newest is not before `before`."""
    found = checkpoints(run)
    assert found and found[-1].name >= before, found
    for path in [*found, run / "last", run / "best"]:
        assert read_state(path).step == int(path.resolve().name.removeprefix("step-"))
        assert all(load_file(file) for file in path.rglob("*.safetensors"))


def put_back(folder: Path, state: str) -> None:
    """Let the runs of `folder` be what is kept there as `state`."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    if state != "nothing":
        shutil.copytree(folder / state, folder / "runs", symlinks=True)


# ---- the attacks, in processes of their own ------------------------------------------------------


def make_states(folder: Path, world: int, settings: list[str], attacks: list[tuple[str, int, str]]) -> None:
    """In `folder`: `undisturbed`, all 30 steps; `stopped` and `torn`; and as `changes` what each attack meets."""
    train.ckpt.versions = dict
    whole = run_ranks(folder, world, settings)
    assert whole.statuses == [0] * world, whole.log
    (folder / "runs").rename(folder / "undisturbed")
    stopped = run_ranks(folder, world, settings, prepare=lambda: stop_in_validation(8))
    assert stopped.statuses == [75] * world, stopped.log
    (folder / "runs").rename(folder / "stopped")
    put_back(folder, "stopped")
    assert run_ranks(folder, world, settings, attacked=TORN).statuses[0] == -signal.SIGKILL
    (folder / "runs").rename(folder / "torn")
    changes = []
    for state, rank, until in attacks:
        calm = whole
        if state != "nothing":
            put_back(folder, state)
            calm = run_ranks(folder, world, settings, watched=rank)
            assert calm.statuses == [0] * world, calm.log
            assert tree(folder / RUN) == tree(folder / "undisturbed/tiny")
        places = [place for place, change in enumerate(calm.changes) if until in change]
        changes.append(calm.changes[: places[0] if places else None])
    (folder / "changes").write_text(json.dumps(changes))


def attack(
    folder: Path, world: int, settings: list[str], state: str, watched: int, numbers: list[int], error: int | None
) -> None:
    """Attack a run started in `state` at each of the changes `numbers`, and resume what is left."""
    put_back(folder, state if state != "nothing" else "undisturbed")
    train.ckpt.versions = dict
    if state != "nothing":
        load_once(folder, settings)
    seen, refused, longest = set(), 0, 0.0
    undisturbed = tree(folder / "undisturbed/tiny")
    for number in numbers:
        put_back(folder, state)
        ended = run_ranks(folder, world, settings, watched=watched, attacked=number, error=error)
        case = f"{state}, change {number}, {ended.changes[number]}: {ended.statuses}\n{ended.log[-3000:]}"
        longest = max(longest, ended.outlived)
        assert -99 not in ended.statuses, case
        if error is None:
            assert ended.statuses[watched] == -signal.SIGKILL and len(ended.changes) == number + 1, case
        else:  # an operation without which the run can do is not missed: status 0
            errors = [line for line in ended.log.splitlines() if line.startswith("error:")]
            assert ended.statuses in ([0] * world, [2] * world) and "Traceback" not in ended.log, case
            assert len(errors) == (2 in ended.statuses), case
            refused += len(errors)
            if state == "stopped":
                assert_nothing_is_lost(folder / RUN, "step-000030" if not errors else "step-000024")
        clean_up_after_crash(folder / RUN)
        if state != "nothing":
            assert_nothing_is_lost(folder / RUN, "step-000024")
            newest = checkpoints(folder / RUN)[-1]
            best = step_directory(newest.parent, read_state(newest).best_step)
            assert [os.readlink(folder / RUN / name) for name in ("last", "best")] == [newest.name, best.name], case
        left = json.dumps(tree(folder / RUN))
        if left not in seen:
            seen.add(left)
            again = run_ranks(folder, world, settings)
            assert again.statuses == [0] * world, f"{case}\nresumed: {again.log[-3000:]}"
            assert tree(folder / RUN) == undisturbed, case
    result = {"attacks": len(numbers), "one line": refused, "resumed": len(seen), "outlived": round(longest, 1)}
    (folder / "result").write_text(json.dumps(result))


@pytest.fixture(scope="module", params=LAYOUTS)
def prepared(request, tmp_path_factory) -> tuple[Path, str]:
    """A folder with a corpus and the states to start from, and the name of the layout."""
    folder = tmp_path_factory.mktemp("kills")
    write_small_corpus(folder)
    world, settings, attacks = LAYOUTS[request.param]
    [process] = launch(make_states, folder, world, [*SETTINGS, *settings], attacks, log=folder / "worker.log")
    assert finish([process], 300) == [0], said(folder)
    return folder, request.param


def write_small_corpus(folder: Path) -> None:
    """The tiny corpus without its longest clip and with one for validation: a step takes no time."""
    write_tiny_corpus(folder, clips=4)
    for name, keep in (("train", (0, 1, 3)), ("val", (0,))):
        clips = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps([clips[place] for place in keep]))


def said(folder: Path) -> str:
    return (folder / "worker.log").read_text()[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("error", [None, errno.ENOSPC], ids=["killed", "full"])
def test_at_every_change_to_the_disk(prepared, error):
    folder, layout = prepared
    world, settings, attacks = LAYOUTS[layout]
    for (state, rank, _), changes in zip(attacks, json.loads((folder / "changes").read_text()), strict=True):
        if (state, rank) == ("stopped", 0):  # the save does all that a save can do
            names = (".step-000024.replaced", "step-000024", "best", ".step-000021.removing")
            assert {f"rename tiny/{name}" for name in names} <= set(changes)
        copies = [folder.with_name(f"{folder.name}.{half}") for half in (0, 1)]  # two at once
        processes = []
        for half, copy in enumerate(copies):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy, symlinks=True)
            numbers = list(range(half, len(changes), 2))
            arguments = (world, [*SETTINGS, *settings], state, rank, numbers, error)
            processes += launch(attack, copy, *arguments, log=copy / "worker.log")
        assert finish(processes, 1200) == [0, 0], "\n".join(map(said, copies))
        done = [json.loads((copy / "result").read_text()) for copy in copies]
        assert sum(one["attacks"] for one in done) == len(changes) > 0
        print(f"{layout}, {state}, rank {rank}, {len(changes)} changes:", *done)


# ---- and one of them for every day ---------------------------------------------------------------


def killed_before_the_links(folder: Path) -> None:
    settings = ["train.max_steps=2", "train.eval_every=2", "infer.evidence=0.5"]
    train.ckpt.versions = dict
    ended = run_ranks(folder, 1, settings, attacked="symlink tiny/.last.link")
    assert ended.statuses == [-signal.SIGKILL] and not os.path.lexists(folder / RUN / "last"), ended.log
    again = run_ranks(folder, 1, settings)
    assert again.statuses == [0] and "nothing to do" in again.log, again.log
    assert not any(re.search("step|metrics|config", change) for change in again.changes if "link" not in change)
    assert_nothing_is_lost(folder / RUN, "step-000002")


def test_a_kill_between_a_checkpoints_name_and_its_links(tmp_path):
    write_small_corpus(tmp_path)
    assert finish(launch(killed_before_the_links, tmp_path, log=tmp_path / "worker.log")) == [0], said(tmp_path)
