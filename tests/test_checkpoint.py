"""Checkpoint directories: whole or absent, and never gone on from with another model or other data."""

import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import train_here, write_tiny_corpus

import train
from prospect import checkpoint as ckpt
from prospect.errors import ProspectError
from prospect.load import load_for_inference
from prospect.model import Prospect

pytestmark = pytest.mark.usefixtures("one_thread_and_usual_signals")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A corpus and a finished run of four steps with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny_corpus(folder)
    assert train_here(folder, "train.max_steps=4", "train.save_every=1", "train.eval_every=2", "train.keep=9") == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, symlinks=True)
    return tmp_path


def write(final: Path, text: str = "weights", best: int | None = None) -> None:
    """A checkpoint of one file beside its state, in which `best` is the best step."""
    directory = ckpt.begin_checkpoint(final)
    (directory / "model.safetensors").write_text(text)
    (directory / "deeper").mkdir()
    (directory / "deeper" / "shard").write_text(text)
    state = ckpt.TrainState(step=ckpt.step_of(final), best_step=best)
    (directory / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
    ckpt.finish_checkpoint(final)


def test_an_older_configuration_is_read_without_the_settings_that_are_gone(copy):
    path = copy / "runs/tiny/last/config.yaml"
    config = ckpt.read_config(path.parent)
    older = "\ntrain:\n  adapter_learning_rate: null\n  backbone_learning_rate: null\n  max_skips: 20\n"
    path.write_text(path.read_text().replace("\ntrain:\n", older))
    assert "  max_skips: 20\n" in path.read_text() and ckpt.read_config(path.parent) == config
    path.write_text("- 1")
    with pytest.raises(ProspectError, match="must be a section"):
        ckpt.read_config(path.parent)


def test_every_file_is_on_the_disk_before_the_directory_gets_its_name(tmp_path, monkeypatch):
    """A power cut after the rename must find the files' bytes there: fsync of each file and folder comes first."""
    done: list[str] = []

    def record_sync(descriptor: int) -> None:
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", record_sync)
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(f"rename {Path(b).name}"), rename(a, b)))
    write(tmp_path / "step-000001")
    before = done[: done.index("rename step-000001")]
    expected = ["sync .step-000001.writing", "sync deeper", "sync model.safetensors", "sync shard", "sync state.json"]
    assert sorted(before) == expected
    assert done[len(before) :] == ["rename step-000001", f"sync {tmp_path.name}"]


def test_what_is_half_written_or_half_removed_is_not_taken_for_a_checkpoint(tmp_path):
    write(tmp_path / "step-000004")
    for name in (".step-000009.writing", ".step-000003.removing", "step-000010", "step-12", "step-000011.copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / ".step-000009.writing" / "state.json").write_text("{}")
    assert ckpt.checkpoints(tmp_path) == [tmp_path / "step-000004"]
    assert ckpt.find_resume("auto", tmp_path) == tmp_path / "step-000004"
    ckpt.clean_up_after_crash(tmp_path)
    assert not (tmp_path / ".step-000009.writing").exists() and not (tmp_path / ".step-000003.removing").exists()
    assert (tmp_path / "last").resolve().name == "step-000004"


def test_a_step_saved_again_replaces_itself_and_survives_a_kill_in_between(tmp_path, monkeypatch):
    final = tmp_path / "step-000002"
    write(final, "old")
    write(final, "new")
    assert (final / "model.safetensors").read_text() == "new" and not list(tmp_path.glob(".step*"))
    os.rename(final, tmp_path / ".step-000002.replaced")  # as if killed between the two renames
    ckpt.clean_up_after_crash(tmp_path)
    assert (final / "model.safetensors").read_text() == "new"


def test_a_kill_before_the_links_leaves_none_that_leads_nowhere(tmp_path):
    """Killed when step 4 had its name: `last` and `best` still lead to step 3, which the next save removes."""
    write(tmp_path / "step-000003", best=3)
    ckpt.replace_symlink(tmp_path / "best", "step-000003")
    write(tmp_path / "step-000004", best=4)
    ckpt.replace_symlink(tmp_path / "last", "step-000003")
    (tmp_path / ".last.link").symlink_to("step-000004")
    ckpt.clean_up_after_crash(tmp_path)
    assert {name: os.readlink(tmp_path / name) for name in ("last", "best")} == dict.fromkeys(
        ("last", "best"), "step-000004"
    )
    write(tmp_path / "step-000005", best=4)
    ckpt.prune(tmp_path, keep=1, best_step=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step-000004", "step-000005"]
    assert (tmp_path / "best").exists() and (tmp_path / "last").exists()

    shutil.rmtree(tmp_path / "step-000004")  # by hand: then no link is made to it
    os.unlink(tmp_path / "best")
    ckpt.clean_up_after_crash(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-000005"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        write(tmp_path / f"step-{step:06d}")
        ckpt.prune(tmp_path, keep=2, best_step=2)
    assert [path.name for path in ckpt.checkpoints(tmp_path)] == ["step-000002", "step-000005", "step-000006"]


def test_a_disk_without_room_is_one_error_and_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path / "step-000001")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProspectError, match="could not be written: No space left on device") as caught:
        write(tmp_path / "step-000002")
    assert caught.value.where.endswith("step-000002")
    assert [path.name for path in tmp_path.iterdir() if path.name != "last"] == ["step-000001"]


def test_never_does_not_overwrite_and_an_older_checkpoint_is_not_rewound_silently(trained):
    run = trained / "runs/tiny"
    with pytest.raises(ProspectError, match="step-000001, step-000002, step-000003, step-000004"):
        ckpt.find_resume("never", run)
    with pytest.raises(ProspectError, match="overwrite: step-000003, step-000004"):
        ckpt.find_resume(str(run / "step-000002"), run)
    assert ckpt.find_resume(str(run / "step-000002"), run.parent / "another") == run / "step-000002"
    assert ckpt.find_resume("never", run.parent / "another") is None
    with pytest.raises(ProspectError, match="is not a checkpoint"):
        train_here(trained, f"train.resume={trained}", "run.name=another")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_size=64"], "model.hidden_size was 32, is 64"),
        (["data.batch_tokens=1024", "run.seed=1"], "run.seed was 0, is 1; data.batch_tokens was 512, is 1024"),
        (["data.dst=false"], "data.dst was True, is False"),
        (["data.train={path: FOLDER/train.json, repeat: 2}"], "the repeats of data.train were [1], are [2]"),
    ],
)
def test_another_model_or_another_cut_of_the_data_is_refused(copy, overrides, message):
    with pytest.raises(ProspectError, match="cannot resume from this checkpoint") as caught:
        train_here(copy, "train.max_steps=9", *[text.replace("FOLDER", str(copy)) for text in overrides])
    assert message in str(caught.value)


def test_other_data_files_are_refused_by_name(copy):
    clips = json.loads((copy / "train.json").read_text())
    clips[2]["conversation"][1]["content"] += " now"
    (copy / "train.json").write_text(json.dumps(clips))
    np.save(copy / "embeddings/val1_embeddings.npy", np.zeros((18, 16), np.float16))
    with pytest.raises(ProspectError) as caught:
        train_here(copy, "train.max_steps=9")
    assert "data.train file 0 has changed; the embeddings of data.val file 0 has changed" in str(caught.value)


def test_the_same_files_elsewhere_are_the_same_data(copy, capsys):
    os.rename(copy / "train.json", copy / "elsewhere.json")
    overrides = ["train.max_steps=5", f"data.train={copy / 'elsewhere.json'}", "train.learning_rate=0.002"]
    assert train_here(copy, *overrides) == 0
    printed = capsys.readouterr().out
    assert "resuming from" in printed and "changed since then: train.max_steps was 4, is 5" in printed
    assert "train.learning_rate was 0.001, is 0.002" in printed


def test_a_checkpoint_says_what_it_was_made_with(trained):
    state = ckpt.read_state(trained / "runs/tiny/last")
    assert state.made_with["torch"] == torch.__version__ and "python" in state.made_with
    assert all(len(digest) == 64 for digest in state.data.values()) and len(state.data) == 4
    assert state.prompts == {"system text": 0, "goal": 1, "list of steps": 1, "recipe": 0}
    assert (state.step, state.world, state.micro_batches, state.evaluated_step) == (4, 1, 1, 4)
    assert ckpt.read_config(trained / "runs/tiny/last").train.max_steps == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"thresholds": {"speaking": math.nan}}, "thresholds: speaking is nan, must be between 0 and 1"),
        ({"thresholds": {"speaking": 0.5, "evidence": 7}}, "thresholds: evidence is 7, must be between 0 and 1"),
        ({"thresholds": {"dst": -0.1}}, "thresholds: dst is -0.1, must be between 0 and 1"),
        ({"thresholds": None}, "thresholds is None"),
        ({"position": "gone"}, "position is 'gone'"),
    ],
)
def test_a_state_that_cannot_be_true_is_refused_by_name(copy, change, said):
    path = copy / "runs/tiny/step-000004/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for read in (ckpt.read_state, load_for_inference):
        with pytest.raises(ProspectError) as caught:
            read(path.parent)
        assert str(caught.value).startswith(f"{path}: cannot be read: {said}")


def test_a_state_that_lacks_a_field_is_refused_by_name(copy):
    path = copy / "runs/tiny/step-000004/state.json"
    values = json.loads(path.read_text())
    for lacking, said in (
        ({}, "step is missing"),
        (values | {"epoch": None}, "epoch is None"),
        ([], "must be an object"),
    ):
        path.write_text(json.dumps(lacking))
        with pytest.raises(ProspectError, match=said):
            ckpt.read_state(path.parent)
    for name in values:
        path.write_text(json.dumps({key: value for key, value in values.items() if key != name}))
        if name in ckpt.NEWER:
            ckpt.read_state(path.parent)
            continue
        with pytest.raises(ProspectError, match=f"{name} is missing"):
            ckpt.read_state(path.parent)


def test_thresholds_that_validation_must_have_left_are_missed(copy, capsys):
    """With none, both heads would fire at one half, which is right only before the first validation."""
    path = copy / "runs/tiny/step-000004/state.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"thresholds": {"speaking": 0.3}}))
    with pytest.raises(ProspectError, match="lacks what its validation found for infer.dst_threshold"):
        load_for_inference(path.parent)
    infer = load_for_inference(path.parent, ["infer.dst_threshold=0.4"])[0].infer
    assert (infer.speaking_threshold, infer.dst_threshold, infer.evidence) == (0.3, 0.4, 0.5)
    assert capsys.readouterr().err == ""
    infer = load_for_inference(copy / "runs/tiny/step-000001")[0].infer
    assert (infer.speaking_threshold, infer.dst_threshold) == (0.5, 0.5)
    said = "no validation before this checkpoint: infer.speaking_threshold and infer.dst_threshold is one half"
    assert said in capsys.readouterr().err


def test_a_checkpoint_cut_short_on_the_disk_is_an_error_that_names_the_file(copy):
    path = copy / "runs/tiny/step-000004/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ProspectError, match=r"optimizer.safetensors: cannot be read"):
        train_here(copy, "train.max_steps=9")


def test_a_finished_run_has_nothing_to_do_and_a_longer_one_goes_on(copy, capsys):
    """Nothing at all is written then: settings under which no step was taken are not those of the run."""
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (copy / "runs").rglob("*")}
    for overrides in (["train.max_steps=4"], ["train.max_steps=3", "train.learning_rate=0.5", "infer.evidence=0.9"]):
        assert train_here(copy, *overrides) == 0
        assert "nothing to do: step 4 of" in capsys.readouterr().out
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (copy / "runs").rglob("*")} == before
    assert train_here(copy, "train.max_steps=6") == 0
    assert ckpt.read_state(copy / "runs/tiny/last").step == 6


def test_a_sharded_checkpoint_becomes_a_full_one(copy, tmp_path):
    shards = ["train.max_steps=5", "train.sharded_checkpoints=true", "train.eval_every=9"]
    assert train_here(copy, *shards) == 0
    assert (
        train_here(
            copy,
            "train.max_steps=5",
            "train.eval_every=9",
            f"train.resume={copy / 'runs/tiny/step-000004'}",
            "run.name=full",
        )
        == 0
    )
    ckpt.make_full(copy / "runs/tiny/step-000005", copy / "out")
    for name in ("model.safetensors", "prospect.safetensors", "optimizer.safetensors"):
        mine, theirs = load_file(copy / "out" / name), load_file(copy / "runs/full/step-000005" / name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert Prospect.from_pretrained(copy / "out").config.hidden_size == 32
    with pytest.raises(ProspectError, match="is not a sharded checkpoint"):
        ckpt.make_full(copy / "out", copy / "out2")


def test_metrics_of_steps_after_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 3}', '{"step": 4}', '{"step": 4, "evaluation": {}}', '{"step": 5}', '{"step": 6, "lo']
    path.write_text("\n".join(lines))
    log = train.MetricsLog(path, ckpt.TrainState(step=4, evaluated_step=2))
    log.write({"step": 5})
    assert path.read_text().splitlines() == ['{"step": 3}', '{"step": 4}', '{"step": 5}']
    train.MetricsLog(path, ckpt.TrainState(step=3))
    assert path.read_text() == '{"step": 3}\n'


def test_tensorboard_holds_every_step_once(tmp_path):
    """A run that resumes at step 4 writes step 5 again: its first attempt is gone, as it is from metrics.jsonl."""
    pytest.importorskip("tensorboard", reason="requirements-tensorboard.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "config.yaml").write_text("run:\n  name: x\n")
    path, evaluation = tmp_path / "metrics.jsonl", {"loss": 0.5, "streamed_f1": 0.25}
    log = train.MetricsLog(path, ckpt.TrainState(), tensorboard=True)
    for step in (3, 4, 5):
        log.write({"step": step, "loss": step / 4, "counts": {"dst_pos": 7}})
    log.write({"step": 5, "skipped": "the loss is not finite", "loss_scale": 1.0})
    log.board.close()
    log = train.MetricsLog(path, ckpt.TrainState(step=4, evaluated_step=2), tensorboard=True)
    log.write({"step": 4, "evaluation": evaluation, "best_step": 4, "example": "clip\n  1.0 s  said  *Hi*"})
    log.write({"step": 5, "loss": 9.0, "counts": {"dst_pos": 8}})
    log.board.close()

    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert scalars == {
        "train/loss": [(3, 0.75), (4, 1.0), (5, 9.0)], "counts/dst_pos": [(3, 7.0), (4, 7.0), (5, 8.0)],
        "validation/loss": [(4, 0.5)], "validation/streamed_f1": [(4, 0.25)], "train/best_step": [(4, 4.0)],
    }  # fmt: skip
    texts = {name: found.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in found.Tags()["tensors"]}
    assert texts == {
        "settings/text_summary": "    run:\n      name: x\n    \n",
        "example/text_summary": "    clip\n      1.0 s  said  *Hi*\n",
    }


def test_tensorboard_without_its_package(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ProspectError, match="needs the package tensorboard.*requirements-tensorboard.txt"):
        train.MetricsLog(tmp_path / "metrics.jsonl", ckpt.TrainState(), tensorboard=True)
