"""Bad input of every kind through the real entry points: one line that names the place, status 2, nothing half-written.

Each case breaks one thing of a sound corpus, configuration or checkpoint, and says which words the line must hold.
"""

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from tiny import VISION_DIM, tiny_clip, tiny_config, write_tiny_config, write_tiny_corpus

import infer
import train
from prospect import check, evaluate
from prospect.clip_files import ClipFile
from prospect.config import _BOUNDS
from prospect.data import Corpus, collate
from prospect.distributed import pick_device
from prospect.errors import ProspectError, run_entry_point
from prospect.load import load_for_inference
from prospect.model import LoraConfig, find_targets
from prospect.stream import StreamSession
from prospect.tokenizer import Piece, Tokenizer
from prospect.tune import add_lora

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with the tiny corpus, its configuration, and a checkpoint of one step, runs/tiny/last."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny_corpus(folder, clips=3)
    train.train(tiny_config(folder, "train.max_steps=1"), train.start_ranks("cpu"), dry_run=False)
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_tiny_corpus(tmp_path, clips=3)
    return tmp_path


def run(main: Callable[[], int], monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of an entry point, in this process."""
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_entry_point(main)
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def refused(main: Callable[[], int], monkeypatch, capsys, *arguments: object) -> str:
    """The one line with which an entry point refuses."""
    status, _, err = run(main, monkeypatch, capsys, *arguments)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and err.strip().isprintable()
    return err


def train_and_check_refuse(folder: Path, monkeypatch, capsys, *parts: str) -> None:
    """Both name the place in one line, and no run is begun."""
    line = refused(train.main, monkeypatch, capsys, write_tiny_config(folder))
    assert all(part in line for part in parts), line
    assert not (folder / "runs").exists()
    status, out, err = run(check.main, monkeypatch, capsys, folder / "train.json", "--vision-dim", VISION_DIM)
    assert status == 2 and err == ""
    assert any(found.startswith("error: ") and all(part in found for part in parts) for found in out.splitlines()), out


# ---- fields of a clip ----------------------------------------------------------------------------


def turn(**fields) -> dict:
    """A clip whose third turn (a user's, at the clip's first frame) has these fields. The clip begins at frame 25."""
    return {"third turn": {"role": "user", "content": "Hi", "start_frame": 25, "end_frame": 25} | fields}


S1 = {"id": "S1", "name": "take the block"}
NESTED = [0]
for _ in range(150):
    NESTED = [NESTED]

FIELDS = {
    "no frames per second": ({"fps": 0}, "fps: must be above 0"),
    "fps as text": ({"fps": "2"}, "fps: must be a number"),
    "endless fps": ({"fps": 1e300}, "fps: is out of range"),
    "no start": ({"start_frame_idx": None}, "start_frame_idx: must be a number, not None"),
    "half a frame": ({"start_frame_idx": 24.5}, "start_frame_idx: must be a whole number"),
    "before the video": ({"start_frame_idx": -1}, "start_frame_idx: is -1"),
    "ends before it starts": ({"end_frame_idx": 3}, "end_frame_idx: 3 is before start_frame_idx"),
    "eleven days": ({"end_frame_idx": 9_000_000}, "end_frame_idx: 8999977 frames, more than 2000000"),
    "no conversation": ({"conversation": None}, "conversation: is missing"),
    "conversation as text": ({"conversation": "Hi"}, "conversation: must be a list of turns"),
    "too many turns": ({"conversation": [{}] * 20_001}, "conversation: 20001 turns, more than 20000"),
    "a turn that is a list": ({"conversation": [[]]}, "turn 0: must be an object, not list"),
    "steps as an object": ({"dst": {"S1": "a"}}, "dst: must be a list of steps"),
    "a step twice": ({"dst": [S1, S1, {"id": "S2", "name": "b"}]}, "dst[1], id: 'S1' occurs twice"),
    "a step without a name": ({"dst": [S1, {"id": "S2"}]}, "dst[1], name: must be text"),
    "a step no update can name": ({"dst": [S1, {"id": "S2->", "name": "b"}]}, "dst[1], id: 'S2->' cannot be written"),
    "a step's time as text": ({"dst": [S1 | {"start_ts": "now"}]}, "dst[0], start_ts: must be a number"),
    "a goal that is a number": ({"inferred_goal": 3}, "inferred_goal: must be text"),
    "a recipe too long": ({"inferred_knowledge": "x" * 100_001}, "inferred_knowledge: has 100001 characters"),
    "half a surrogate pair": ({"inferred_goal": "a\ud83d"}, "inferred_goal: holds half a surrogate pair at 1"),
    "embeddings that are no path": ({"embeddings": 7}, "embeddings: must be a path"),
    "nested too deeply": ({"notes": NESTED}, "is nested more than 100 deep"),
    "an unknown role": (turn(role="narrator"), "turn 2, role: unknown role 'narrator'"),
    "no role": (turn(role=None), "turn 2, role: unknown role None"),
    "nothing said": (turn(content=" \n"), "turn 2, content: is empty"),
    "a number said": (turn(content=5), "turn 2, content: must be text, not int"),
    "a text too long": (turn(content="x" * 100_001), "turn 2, content: has 100001 characters"),
    "an update in prose": (turn(role="DST_UPDATE", content="did S1"), "turn 2, content: not of the form S1->start"),
    "an empty update": (turn(role="DST_UPDATE", content=[]), "turn 2, content: must be a list of {id, transition}"),
    "an unknown transition": (
        turn(role="DST_UPDATE", content=[{"id": "S1", "transition": "undo"}]), "turn 2, content: cannot read"),
    "an unknown step": (
        turn(role="DST_UPDATE", content=[{"id": "S9", "transition": "start"}]), "turn 2: unknown step 'S9'"),
    "a step done twice": (
        turn(role="DST_UPDATE", content="S1->start, S1->start"), "turn 2: cannot start S1, which is in_progress"),
    "a turn outside": (turn(start_frame=900, end_frame=901), "turn 2: frames 900..901 lie outside"),
    "a turn backwards": (turn(start_frame=27, end_frame=26), "turn 2, end_frame: 26 is before start_frame 27"),
    "a turn nowhere": (turn(start_frame=None, end_frame=None), "turn 2: has neither start_frame and end_frame nor"),
    "half a range": (turn(end_frame=None), "turn 2, end_frame: must be a number, not None"),
    "a time that is text": (turn(start_frame=None, end_frame=None, time="0:12"), "turn 2, time: must be a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_a_bad_field_of_a_clip(case, corpus, monkeypatch, capsys):
    fields, said = FIELDS[case]
    clips = json.loads((corpus / "train.json").read_text())
    clip = next(clip for clip in clips if clip["id"] == "brief")
    shift = 24 - clip["start_frame_idx"]  # so that the cases above can name frames
    clip["start_frame_idx"] += shift
    clip["end_frame_idx"] += shift
    clip["conversation"] = [
        {"role": role, "content": "Hi", "start_frame": 25, "end_frame": 25} for role in ("user", "assistant")
    ]
    if "third turn" in fields:
        clip["conversation"].append(fields["third turn"])
    else:
        clip |= fields
    (corpus / "train.json").write_text(json.dumps(clips))
    train_and_check_refuse(corpus, monkeypatch, capsys, f"{corpus}/train.json, clip brief", said)


def test_an_id_that_names_no_clip(corpus, monkeypatch, capsys):
    clips = json.loads((corpus / "train.json").read_text())
    for id, said in (
        (["a"], "id: must be text"),
        ("", "id: is empty"),
        ("../up", "the clip's id cannot be part of a file name"),
    ):
        clips[1]["id"] = id
        (corpus / "train.json").write_text(json.dumps(clips))
        train_and_check_refuse(corpus, monkeypatch, capsys, f"{corpus}/train.json, clip ", said)


# ---- clip files ----------------------------------------------------------------------------------

FILES = {
    "empty": (b"", "is not JSON"),
    "white space": (b" \n ", "is not JSON"),
    "no clips": (b"[]", "holds no clip"),
    "a number": (b"7", "holds a int, not clips"),
    "cut off": (b'[{"id": "a", "fps": 2', "is not JSON"),
    "not UTF-8": (b'[{"id": "\xff"}]', "is not UTF-8 (byte 9)"),
    "UTF-16": ('[{"id": "a"}]'.encode("utf-16"), "is not UTF-8 (byte 0)"),
    "NaN": (b'[{"id": "a", "fps": NaN}]', "NaN is not a JSON number"),
    "nested without end": (b"[" * 100_000, "is nested too deeply"),
    "digits without end": (b"[" + b"9" * 5000 + b"]", "is not JSON"),
    "a list of texts": (b'["clip"]', "clip 0: a clip must be a JSON object, not str"),
    "zeros": (b"\0" * 64, "is not JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_clip_file(case, corpus, monkeypatch, capsys):
    content, said = FILES[case]
    (corpus / "train.json").write_bytes(content)
    train_and_check_refuse(corpus, monkeypatch, capsys, f"{corpus}/train.json", said)


def test_a_bad_line_of_a_jsonl_file(corpus, monkeypatch, capsys):
    clips = json.loads((corpus / "train.json").read_text())
    path = corpus / "lines.jsonl"
    for line, said in (
        (b'{"id": ', "clip 1: is not JSON"),
        (b'{"id": "\xfe"}', "clip 1: is not UTF-8"),
        (b"[]", "clip 1: a clip must be"),
    ):
        path.write_bytes(json.dumps(clips[0]).encode() + b"\n" + line + b"\n")
        line = refused(train.main, monkeypatch, capsys, write_tiny_config(corpus), f"data.train={path}")
        assert f"{path}, {said}" in line
        assert not (corpus / "runs").exists()


def test_a_clip_file_that_is_none(corpus, monkeypatch, capsys):
    (corpus / "train.json").unlink()
    train_and_check_refuse(corpus, monkeypatch, capsys, f"{corpus}/train.json: no such clip file")
    (corpus / "train.json").mkdir()
    what = f"{corpus}/train.json: the folder holds no .json or .jsonl file"  # refused before any clip is checked
    assert what in refused(train.main, monkeypatch, capsys, write_tiny_config(corpus))
    assert what in refused(check.main, monkeypatch, capsys, corpus / "train.json")


def test_a_bad_validation_file_stops_before_anything_is_trained(corpus, monkeypatch, capsys):
    (corpus / "val.json").write_text("[")
    assert f"{corpus}/val.json: is not JSON" in refused(train.main, monkeypatch, capsys, write_tiny_config(corpus))
    assert [path.name for path in (corpus / "runs" / "tiny").iterdir()] == [
        "tokenizer"
    ]  # which is whole, and of good clips


def test_two_clips_of_one_id(corpus, monkeypatch, capsys):
    clips = json.loads((corpus / "train.json").read_text())
    (corpus / "train.json").write_text(json.dumps([*clips, clips[1]]))
    train_and_check_refuse(corpus, monkeypatch, capsys, "clip brief, id: the id 'brief' occurs twice")


# ---- embeddings ----------------------------------------------------------------------------------

ROWS = np.ones((8, VISION_DIM), np.float32)  # the clip `brief` has 8 frames


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def with_value(value: float) -> np.ndarray:
    array = ROWS.copy()
    array[3, 2] = value
    return array


class Gadget:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch was-here",)


EMBEDDINGS = {
    "empty": ("npy", b"", "the file is empty"),
    "no array": ("npy", b"hello, this is no array", "broken .npy file"),
    "cut off": ("npy", npy(ROWS)[:-1], "broken .npy file"),
    "bytes behind the array": ("npy", npy(ROWS) + b"\0", "the header accounts for"),
    "a header that claims too much": ("npy", npy(ROWS).replace(b"(8, 16)", b"(9, 16)"), "broken .npy file"),
    "whole numbers": ("npy", npy(ROWS.astype(np.int32)), "has dtype int32"),
    "complex numbers": ("npy", npy(ROWS.astype(np.complex64)), "has dtype complex64"),
    "one dimension": ("npy", npy(ROWS[0]), "has shape [16]"),
    "four dimensions": ("npy", npy(ROWS[None, None]), "has shape [1, 1, 8, 16]"),
    "no rows": ("npy", npy(ROWS[:0]), "there is nothing in it"),
    "too few rows": ("npy", npy(ROWS[:6]), "the embedding file has 6 rows, frames"),
    "too many rows": ("npy", npy(np.ones((9, VISION_DIM), np.float32)), "the embedding file has 9 rows, frames"),
    "too narrow": ("npy", npy(ROWS[:, :8]), "embeddings are 8 wide, model.vision_dim is 16"),
    "not a number": ("npy", npy(with_value(np.nan)), "1 NaN and 0 infinite values in 1 of 8 rows, first in row 3"),
    "infinity": ("npy", npy(with_value(-np.inf)), "0 NaN and 1 infinite values in 1 of 8 rows, first in row 3"),
    "beyond float32": ("npy", npy(ROWS.astype(np.float64) * 1e300), "numbers too large for float32"),
    "objects": ("npy", npy(np.array([[None]])), "broken .npy file"),
    "safetensors cut off": ("safetensors", safetensors.numpy.save({"a": ROWS})[:-1], "broken .safetensors file"),
    "safetensors of bytes": ("safetensors", safetensors.numpy.save({"a": ROWS.astype(np.uint8)}), "has dtype U8"),
    "two tensors": ("safetensors", safetensors.numpy.save({"a": ROWS, "b": ROWS}), "holds 2 tensors ('a', 'b')"),
    "a pickle that runs something": (
        "pkl",
        pickle.dumps(Gadget()),
        "which no plain numpy array needs; nothing was run",
    ),
    "a pickle cut off": ("pkl", pickle.dumps(ROWS)[:-20], "broken pickle"),
    "a pickled list": ("pkl", pickle.dumps([[1.0] * 16] * 8), "not a plain numpy array"),
    "a pickled tensor": ("pkl", pickle.dumps(torch.ones(8, 16)), "which no plain numpy array needs"),
}


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_a_bad_embedding_file(case, corpus, monkeypatch, capsys):
    ending, content, said = EMBEDDINGS[case]
    monkeypatch.chdir(corpus)
    (corpus / "embeddings" / "brief_embeddings.npy").unlink()
    (corpus / "embeddings" / f"brief_embeddings.{ending}").write_bytes(content)
    train_and_check_refuse(corpus, monkeypatch, capsys, f"{corpus}/train.json, clip brief", said)
    assert not (corpus / "was-here").exists()


@pytest.mark.parametrize(
    "named, said",
    [
        ("../secret.npy", "lie outside the directory"),
        ("/etc/passwd", "lie outside the directory"),
        ("link.npy", "lie outside the directory"),
        ("none.npy", "no embeddings at"),
        ("brief_embeddings.txt", "no known format of embeddings ends in '.txt'"),
        ("a\0b.npy", "no embeddings at"),
        ("folder.npy", "is not a regular file"),
    ],
)
def test_a_bad_path_to_embeddings(named, said, corpus, monkeypatch, capsys):
    np.save(corpus / "secret.npy", ROWS)
    (corpus / "embeddings" / "link.npy").symlink_to(corpus / "secret.npy")
    (corpus / "embeddings" / "folder.npy").mkdir()
    (corpus / "embeddings" / "brief_embeddings.txt").write_text("1 2 3")
    clips = json.loads((corpus / "train.json").read_text())
    clips[1]["embeddings"] = named
    (corpus / "train.json").write_text(json.dumps(clips))
    train_and_check_refuse(corpus, monkeypatch, capsys, f"{corpus}/train.json, clip brief", said)


# ---- configuration and overrides -----------------------------------------------------------------

CONFIGS = {
    "not YAML": (b"run: [", "is not YAML"),
    "a tab": (b"run:\n\tname: a", "is not YAML"),
    "not UTF-8": (b"run: {name: \xff}", "cannot be read"),
    "a list": (b"- run", "must hold sections"),
    "a Python object": (b"run: !!python/object/apply:os.system ['touch was-here']", "is not YAML"),
    "an unknown section": (b"modle: {}", "unknown key modle (did you mean model?)"),
    "an unknown key": (
        b"train: {learning_rat: 1}",
        "unknown key train.learning_rat (did you mean train.learning_rate?)",
    ),
    "a key that is no text": (b"train: {1: 2}", "unknown key train.1"),
    "a section that is a number": (b"train: 3", "train must be a section of keys"),
    "text for a number": (b"train: {max_steps: many}", "train.max_steps must be int, not 'many'"),
    "text for yes or no": (b"data: {dst: 'False'}", "data.dst must be bool, not 'False'"),
    "a fraction of a step": (b"train: {max_steps: 1.5}", "train.max_steps must be int, not 1.5"),
    "no such choice": (b"data: {layout: spiral}", "data.layout must be one of stream, turns, not 'spiral'"),
    "a choice that is a list": (b"data: {layout: [stream]}", "data.layout must be one of stream, turns"),
    "out of bounds": (b"data: {overlap: 1.5}", "data.overlap must lie between 0 and 0.9, not 1.5"),
    "not a number": (b"train: {learning_rate: .nan}", "train.learning_rate must lie between"),
    "no clips": (b"data: {train: []}", "data.train must be "),
    "a batch that cannot hold a sequence": (
        b"data: {max_seq_len: 9000}",
        "data.batch_tokens 4096 cannot hold one sequence",
    ),
    "odd heads": (
        b"model: {hidden_size: 130, num_attention_heads: 4}",
        "is not a multiple of model.num_attention_heads",
    ),
    "LoRA from scratch": (b"train: {tune: lora}", "needs a pretrained model.backbone"),
    "an alias without end": (b"run: &a\n  name: *a", "run.name must be str"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_configuration(case, tmp_path, monkeypatch, capsys):
    content, said = CONFIGS[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    line = refused(train.main, monkeypatch, capsys, "config.yaml")
    assert line.startswith("error: config.yaml: ") and said in line
    assert os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.max_steps", "command line: cannot read 'train.max_steps' (write section.key=value)"),
        ("max_steps=3", "command line: cannot read 'max_steps=3'"),
        ("train.max_steps=[", "command line: cannot read the value of 'train.max_steps=['"),
        ("train.max_step=3", "unknown key train.max_step (did you mean train.max_steps?)"),
        ("train.max_steps.of=3", "command line: train.max_steps.of is not a section's key"),
        ("train.max_steps=0", "train.max_steps must lie between 1 and 1000000000, not 0"),
        ("train.max_steps=yes", "train.max_steps must be int, not True"),
        ("data.train=none.json", "none.json: no such clip file"),
        ("data.max_seq_len=65", "the prompt and what is said at frame"),
        ("data.template=chatml", "data.template=chatml belongs to a pretrained backbone"),
        ("model.backbone=nowhere", "nowhere: no tokenizer.json"),
        ("train.device=tpu0", "config: unknown device 'tpu0'"),
        ("train.resume=nowhere", "nowhere: is not a checkpoint"),
        ("train.beta1=1.0", "train.beta1 must lie between 0 and 0.999999, not 1.0"),
        ("model.intermediate_size=-5", "model.intermediate_size must lie between 1 and 10000000, not -5"),
        ("run.seed=123456789012345678901234", "run.seed must lie between"),
        ("data.hybrid.speaking_window=.inf", "data.hybrid.speaking_window must lie between 0 and 1000000, not inf"),
        ("loss.dst_gen_weight=-1 train.weight_decay=-1", "loss.dst_gen_weight must lie between"),
        ("model.hidden_size=1000000", "GB of memory, this machine has"),
        ("infer.reserved=20", "infer.reserved 20 cannot hold what may be said at a frame"),
        ("infer.reserved=490 infer.evidence=null", "of the prompt and 1 of a frame do not fit into 22"),
    ],
)
def test_a_bad_override(override, said, corpus, monkeypatch, capsys):
    line = refused(train.main, monkeypatch, capsys, write_tiny_config(corpus), *override.split())
    assert said in line
    assert not list(corpus.glob("runs/*/step-*")) and not list(corpus.glob("runs/*/metrics.jsonl"))


@pytest.mark.parametrize(
    "device, local_world, said",
    [
        (
            "cuda:1",
            4,
            "config: cuda:1 would be the one device of 4 ranks (train.device=cuda: each rank takes one of its own)",
        ),
        ("cuda:2", 1, "config: there is no cuda:2, this machine has 2 CUDA device(s)"),
        ("auto", 3, "torchrun: 3 ranks, but this machine has 2 CUDA device(s) (--nproc_per_node=2)"),
    ],
)
def test_a_device_that_ranks_cannot_have(device, local_world, said, corpus, monkeypatch, capsys):
    """On a machine that is said to have two. Every rank finds the same: none waits for one that has gone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", str(local_world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
    config = write_tiny_config(corpus, f"train.device={device}")
    for local_rank in range(local_world):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert said in refused(train.main, monkeypatch, capsys, config)


@pytest.mark.parametrize(
    "wanted, local_rank, local_world, index", [("auto", 1, 2, 1), ("cuda", 0, 1, 0), ("cuda:1", 0, 1, 1)]
)
def test_a_device_that_is_there(wanted, local_rank, local_world, index, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device(wanted, local_rank, local_world) == torch.device("cuda", index) == chosen[0]


@pytest.mark.slow
@pytest.mark.parametrize("key", _BOUNDS)
def test_the_least_that_every_number_may_be(key, corpus, monkeypatch, capsys):
    """A run with it ends well, or with one line."""
    overrides = ["train.max_steps=1", "data.frames=hybrid", f"{key}={_BOUNDS[key][0]}"]
    status, _, err = run(train.main, monkeypatch, capsys, write_tiny_config(corpus), *overrides)
    assert status == 0 or (status == 2 and err.startswith("error: ") and err.count("\n") == 1), err


def test_no_configuration(tmp_path, monkeypatch, capsys):
    assert "none.yaml: no such config file" in refused(train.main, monkeypatch, capsys, tmp_path / "none.yaml")
    assert "cannot be read" in refused(train.main, monkeypatch, capsys, tmp_path)


# ---- checkpoints, tokenizers, command lines ------------------------------------------------------


def state_with(**fields) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | fields).encode()


def without_end(content: bytes) -> bytes:
    return json.dumps({**json.loads(content), "eos_token": "<nowhere>"}).encode()


# Half a config.yaml is not among them: half of YAML is YAML.
GARBAGE = [
    ("empty", lambda content: b""),
    ("cut off", lambda content: content[: len(content) // 2]),
    ("not text", lambda content: b"\xff" * 40),
]
CHECKPOINT_FILES = [
    "config.json", "state.json", "config.yaml", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    "prospect.safetensors",
]  # fmt: skip
CHECKPOINTS = {
    **{f"{name} {how}": (name, change, name) for how, change in GARBAGE for name in CHECKPOINT_FILES
       if (name, how) != ("config.yaml", "cut off")},
    **{f"no {name}": (name, None, said) for name, said in (
        ("config.json", "no config.json"), ("state.json", "no state.json"), ("config.yaml", "no config.yaml"),
        ("tokenizer.json", "no tokenizer.json"), ("model.safetensors", "no model.safetensors"),
        ("prospect.safetensors", "missing: dst_state_head.bias"))},
    "a state that is a list": ("state.json", lambda content: b"[]", "state.json"),
    "a state with a key too many": ("state.json", state_with(colour="red"), "state.json"),
    "thresholds that are a list": ("state.json", state_with(thresholds=[0.5]), "state.json"),
    "a threshold that is text": ("state.json", state_with(thresholds={"speaking": "low"}), "state.json"),
    "a step that is text": ("state.json", state_with(step="ten"), "state.json"),
    "a model of another width": ("config.json", state_with(hidden_size=64), "tensors do not fit"),
    "another family": ("config.json", state_with(model_type="gpt2"), "model_type 'gpt2'"),
    "an unknown key": ("config.yaml", lambda content: content + b"\ncolour: red\n", "unknown key colour"),
    "no end token": ("tokenizer_config.json", without_end, "the plain template needs an eos_token"),
    "a tokenizer that is a list": ("tokenizer.json", lambda content: b"[]", "tokenizer.json"),
    "tokenizer settings that are a list": ("tokenizer_config.json", lambda content: b"[]", "tokenizer_config.json"),
}  # fmt: skip


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained / "runs" / "tiny" / "last", tmp_path / "checkpoint"))


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_bad_checkpoint(case, checkpoint, trained, monkeypatch, capsys):
    name, change, said = CHECKPOINTS[case]
    file, out = checkpoint / name, checkpoint.parent / "out.jsonl"
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    line = refused(
        infer.main, monkeypatch, capsys, "--clip", f"{trained}/val.json:0", "--checkpoint", checkpoint, "--out", out
    )
    assert str(checkpoint) in line and said in line, line
    assert not out.exists()


def test_a_sound_checkpoint_is_streamed(checkpoint, trained, monkeypatch, capsys):
    """What the cases here break is sound before they do."""
    out = checkpoint.parent / "out.jsonl"
    status, _, err = run(
        infer.main, monkeypatch, capsys, "--clip", f"{trained}/val.json:0", "--checkpoint", checkpoint, "--out", out
    )
    assert (status, err) == (0, "")
    assert len(out.read_text().splitlines()) == 12  # the clip's frames


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--clip", "none.json"], "none.json: no such clip file"),
        (["--clip", "{val}:nobody"], "val.json: no clip 'nobody' (an id, or a number from 0 to 2)"),
        (["--clip", "{val}:3"], "val.json: no clip '3'"),
        (["--clip", "{val}:0", "--live", "--clip", "{val}:1"], "--stdin takes the header of one clip, not of 2"),
        (["--clip", "{val}:0", "--checkpoint", "nowhere"], "nowhere: is not a checkpoint"),
        (["--clip", "{val}:0", "--out", "{folder}/no/out.jsonl"], "out.jsonl: cannot be written"),
        (["--clip", "{val}:0", "--out", "{val}"], "--out is the clip file itself"),
        (["--clip", "{val}:0", "infer.speaking_threshold=2"], "infer.speaking_threshold must lie between 0 and 1"),
        (["--clip", "{val}:0", "infer.strategy=forget"], "infer.strategy must be one of"),
        (["--clip", "{val}:0", "infer.reserved=5"], "infer.reserved 5 cannot hold what may be said at a frame"),
        (["--clip", "{val}:0", "data.dst=false"], "data.dst is False, but the model was made with True"),
        (["--clip", "{val}:0", "infer.device=abacus"], "unknown device 'abacus'"),
        (["--clip", "{val}:0", "model.hidden_size=64"], "checkpoint: model.hidden_size cannot be changed any more"),
        (["--clip", "{val}:0", "run.seed=1", "infer.lookahead=1", "data.frames=turns"], "run.seed, data.frames cannot"),
        (["--clip", "{folder}/nan.json"], "1 NaN and 0 infinite values in 1 of 8 rows, first in row 3"),
        (["--clip", "{folder}/narrow.json"], "embeddings are 8 wide, model.vision_dim is 16"),
    ],
)
def test_a_bad_command_line_of_infer(arguments, said, checkpoint, trained, monkeypatch, capsys):
    folder = checkpoint.parent
    brief = json.loads((trained / "train.json").read_text())[1]
    (folder / "embeddings").mkdir()
    for name, rows in (("nan", with_value(np.nan)), ("narrow", ROWS[:, :8])):
        (folder / f"{name}.json").write_text(json.dumps(brief | {"embeddings": f"{name}.npy"}))
        np.save(folder / "embeddings" / f"{name}.npy", rows)
    before = (trained / "val.json").read_bytes()
    arguments = [word.format(val=trained / "val.json", folder=folder) for word in arguments]
    arguments += [] if "--checkpoint" in arguments else ["--checkpoint", str(checkpoint)]
    arguments += [] if "--out" in arguments else ["--out", str(folder / "out.jsonl")]
    assert said in refused(infer.main, monkeypatch, capsys, *arguments)
    assert not (folder / "out.jsonl").exists() and (trained / "val.json").read_bytes() == before


def wordy_corpus(folder: Path, trained: Path) -> Path:
    """A clip whose prompt fits into a training sequence of 512 tokens but leaves none of a stream's 448, and a brief
    one, in the file whose path is returned."""
    draw = np.random.default_rng(0)
    wordy, brief = (tiny_clip(draw, name, frames=8, replies=1, words=1) for name in ("wordy", "brief"))
    tokenizer = Tokenizer(trained / "runs" / "tiny" / "last", "plain")
    while len(tokenizer.encode([Piece(wordy["inferred_goal"])])) < 365:
        wordy["inferred_goal"] += " and build it"
    (folder / "clips.json").write_text(json.dumps([wordy, brief]))
    (folder / "embeddings").mkdir()
    for name in ("wordy", "brief"):
        np.save(folder / "embeddings" / f"{name}.npy", ROWS)
    return folder / "clips.json"


def test_a_clip_that_can_be_learned_from_but_not_streamed(checkpoint, trained, monkeypatch, capsys):
    """Found before the first clip is streamed; with on_bad=skip it is left out and named. Training has it."""
    file, out = wordy_corpus(checkpoint.parent, trained), checkpoint.parent / "scores"
    words = ["--checkpoint", checkpoint, "--data", file, "--out", out]
    line = refused(evaluate.main, monkeypatch, capsys, *words)
    assert f"{file}, clip wordy: " in line and "of a frame do not fit into 448" in line and not out.exists()

    status, shown, err = run(evaluate.main, monkeypatch, capsys, *words, "data.on_bad=skip")
    assert status == 0 and [path.name for path in (out / "records").iterdir()] == ["brief.jsonl"]
    assert [line.split(": ")[:2] for line in err.splitlines() if "clip wordy" in line] == [
        ["skipped", f"{file}, clip wordy"]]  # fmt: skip

    line = refused(infer.main, monkeypatch, capsys, "--checkpoint", checkpoint, "--clip", file)
    assert f"{file}, clip wordy: " in line
    config, tokenizer, _ = load_for_inference(checkpoint)
    corpus = Corpus([str(file)], config.data, tokenizer, VISION_DIM, rate=1.0, seed=0)
    assert {entry.clip for entry in corpus.entries} == {0, 1}


def test_a_text_in_a_clip_that_finds_no_place_is_found_first(checkpoint, monkeypatch, capsys):
    """The user says 440 tokens: less than the context, and more than it has room for beside a prompt."""
    brief = tiny_clip(np.random.default_rng(0), "brief", frames=8, replies=1, words=1, wish="q" * 400)
    (checkpoint.parent / "clips.json").write_text(json.dumps(brief))
    (checkpoint.parent / "embeddings").mkdir()
    np.save(checkpoint.parent / "embeddings" / "brief.npy", ROWS)
    said = f"what the user says at frame {brief['start_frame_idx'] + 1} has "
    for name in ("--data", "--clip"):
        main = evaluate.main if name == "--data" else infer.main
        words = ["--checkpoint", checkpoint, name, checkpoint.parent / "clips.json"]
        assert said in refused(main, monkeypatch, capsys, *words)


def test_more_clips_than_a_process_may_open_files(checkpoint, monkeypatch, capsys):
    """Clips are opened when their turn comes and let go: forty of them where twenty files may be open."""
    folder, draw = checkpoint.parent, np.random.default_rng(0)
    clips = [tiny_clip(draw, f"clip{n}", frames=4, replies=0, words=0) for n in range(40)]
    (folder / "clips.json").write_text(json.dumps(clips))
    (folder / "embeddings").mkdir()
    for clip in clips:
        np.save(folder / "embeddings" / f"{clip['id']}.npy", ROWS[:4])
    silent = ["--checkpoint", checkpoint, "infer.speaking_threshold=1", "infer.dst_threshold=1"]
    for words in (["--data", folder / "clips.json"], ["--clip", folder / "clips.json"]):
        main = evaluate.main if words[0] == "--data" else infer.main
        before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), set(map(int, os.listdir("/proc/self/fd")))
        limit = [number for number in range(1000) if number not in taken][20]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        try:
            status, shown, err = run(main, monkeypatch, capsys, *silent, *words)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert status == 0 and "error" not in err, err
        assert "| 40 |" in shown or "40 clips" in shown or shown.count("Build it") == 40, shown


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def fails(error: Exception) -> Callable[[], int]:
        def main() -> int:
            raise error

        return main

    for error in (
        MemoryError("Unable to allocate 3.64 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:113] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        line = refused(fails(error), monkeypatch, capsys)
        assert "out of memory: " in line and "lower data.batch_tokens" in line
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_entry_point(fails(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_evaluation_of_bad_clips_writes_nothing(checkpoint, monkeypatch, capsys):
    folder = checkpoint.parent
    brief = tiny_clip(np.random.default_rng(0), "brief", frames=8, replies=1, words=1)
    (folder / "clips.json").write_text(json.dumps(brief))
    (folder / "embeddings").mkdir()
    np.save(folder / "embeddings" / "brief.npy", with_value(np.nan))
    for data, said in (
        ("clips.json", "1 NaN and 0 infinite values in 1 of 8 rows, first in row 3"),
        ("none.json", "no such clip file"),
    ):
        line = refused(
            evaluate.main, monkeypatch, capsys,
            "--checkpoint", checkpoint, "--data", folder / data, "--out", folder / "scores",
        )  # fmt: skip
        assert f"{folder}/{data}" in line and said in line
    assert not (folder / "scores").exists()


@pytest.mark.parametrize(
    "main, arguments, said",
    [
        (train.main, [], "required: config"),
        (train.main, ["a.yaml", "--faster"], "unrecognized arguments: --faster"),
        (infer.main, [], "--clip --video is required"),
        (check.main, [], "required: FILE"),
        (check.main, ["a.json", "--workers", "two"], "argument --workers: invalid int value: 'two'"),
        (check.main, ["a.json", "--workers", "0"], "--workers must be at least 1, not 0"),
        (check.main, ["a.json", "--vision-dim", "-5"], "--vision-dim must be at least 1, not -5"),
    ],
)
def test_a_bad_command_line(main, arguments, said, monkeypatch, capsys):
    status, _, err = run(main, monkeypatch, capsys, *arguments)
    assert status == 2 and said in err.splitlines()[-1] and "Traceback" not in err


def test_resuming_from_a_broken_checkpoint_changes_nothing(trained, tmp_path, monkeypatch, capsys):
    for name, content in (
        ("optimizer.safetensors", b""),
        ("rng.safetensors", b"\0" * 9),
        ("state.json", b"{"),
        ("config.yaml", b"- a"),
    ):
        folder = tmp_path / name
        shutil.copytree(trained, folder, symlinks=True)
        step = (folder / "runs" / "tiny" / "last").resolve()
        (step / name).write_bytes(content)
        before = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
        line = refused(train.main, monkeypatch, capsys, write_tiny_config(folder, "train.max_steps=2"))
        assert f"{step.name}/{name}" in line or str(step) in line
        assert {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()} == before


# ---- live input ----------------------------------------------------------------------------------

LIVE = {
    "not JSON": (b"hello", "is not JSON"),
    "cut off": (b'{"user": "Hi', "is not JSON"),
    "not UTF-8": (b'{"user": "\xff"}', "is not JSON"),
    "nested without end": (b"[" * 100_000, "is not JSON"),
    "a list": (b"[1, 2]", 'must be {"embedding": [...]} or {"user": "..."}'),
    "both": (b'{"user": "Hi", "embedding": [1]}', 'must be {"embedding": [...]} or {"user": "..."}'),
    "neither": (b"{}", 'must be {"embedding": [...]} or {"user": "..."}'),
    "a number said": (b'{"user": 3}', "user must be text"),
    "nothing said": (b'{"user": " "}', "the user said nothing"),
    "half a surrogate pair": (b'{"user": "\\ud800"}', "half a surrogate pair"),
    "too much said": (b'{"user": "' + b"a b " * 4000 + b'"}', "the context has room for"),
    "too narrow": (b'{"embedding": [1, 2, 3]}', "an embedding of shape [3], a frame is [16]"),
    "text in an embedding": (json.dumps({"embedding": ["1"] * 16}).encode(), "embedding must be a list of numbers"),
    "yes and no": (json.dumps({"embedding": [True] * 16}).encode(), "embedding must be a list of numbers"),
    "uneven lists": (b'{"embedding": [[1, 2], [3]]}', "embedding must be a list of numbers"),
    "nothing": (b'{"embedding": []}', "an embedding"),
    "not a number": (json.dumps({"embedding": [float("nan")] * 16}).encode(), "not finite"),
    "infinity": (json.dumps({"embedding": [1e39] * 16}).encode(), "not finite"),
    "digits without end": (b'{"embedding": [' + b"9" * 5000 + b"]}", "is not JSON"),
    "a large whole number": (json.dumps({"embedding": [10**30] * 16}).encode(), "embedding must be a list of numbers"),
}


@pytest.fixture(scope="session")
def listening(trained):
    """A model that listens, ready for a session."""
    config, tokenizer, model = load_for_inference(
        trained / "runs" / "tiny" / "last", ["infer.speaking_threshold=1", "infer.dst_threshold=1"]
    )
    clip = ClipFile(trained / "val.json").clip(0)
    return lambda: StreamSession(model, tokenizer, clip, config)


def test_megabytes_of_live_text_are_refused_before_they_are_tokenized(listening):
    out, line = io.StringIO(), json.dumps({"user": "take the red block " * 330_000}).encode()  # 6.3 MB
    started = time.process_time()
    infer.live(listening(), io.BytesIO(line), out)
    assert time.process_time() - started < 2
    assert "has 6269999 characters, the context has room for 100000 at most" in out.getvalue()


@pytest.mark.parametrize("case", LIVE)
def test_a_bad_live_line_is_answered_and_the_stream_goes_on(case, listening):
    line, said = LIVE[case]
    frame = json.dumps({"embedding": [0.5] * VISION_DIM}).encode()
    out = io.StringIO()
    infer.live(listening(), io.BytesIO(b"\n".join([frame, line, b"", frame, b""])), out)
    first, error, second = map(json.loads, out.getvalue().splitlines())
    assert set(error) == {"error"} and error["error"].startswith("line 2: ") and said in error["error"]
    assert second["frame_idx"] == first["frame_idx"] + 1 and second["user"] == []


# ---- the model's own door ------------------------------------------------------------------------


def test_rows_and_image_tokens_that_differ_in_number(trained):
    _, tokenizer, model = load_for_inference(trained / "runs" / "tiny" / "last")
    ids, rows = torch.tensor([[5, tokenizer.image_id, 7, tokenizer.image_id]]), torch.ones(3, VISION_DIM)
    assert model(ids, rows[:2]).shape == (1, 4, 32) and model(ids[:, :1]).shape == (1, 1, 32)
    for images, given, said in (
        (ids, rows, "2 <image> tokens for 3 rows of image_embeds"),
        (ids, rows[:1], "2 <image> tokens for 1 rows"),
        (ids, None, "2 <image> tokens for 0 rows"),
        (ids[:, :1], rows[:1], "0 <image> tokens for 1 rows"),
    ):
        with pytest.raises(ProspectError, match=said):
            model(images, given)


def test_padding_that_real_tokens_would_see(trained):
    """Padding belongs on the right: causal attention is all that hides it."""
    config, tokenizer, _ = load_for_inference(trained / "runs" / "tiny" / "last")
    corpus = Corpus(config.data.val, config.data, tokenizer, VISION_DIM, rate=1.0, seed=0)
    batch = collate([corpus[(0, 0)], corpus[(0, 1)]], tokenizer.pad_id)
    assert not batch["attention_mask"].all()
    find_targets(batch)
    by_token = [key for key, value in batch.items() if torch.is_tensor(value) and key != "image_embeds"]  # [B,T]
    turned = batch | {key: batch[key].flip(1) for key in by_token}
    with pytest.raises(ProspectError, match="padding before a token"):
        find_targets(turned)


def test_an_adapter_wider_than_the_model(trained):
    _, _, model = load_for_inference(trained / "runs" / "tiny" / "last")
    with pytest.raises(ProspectError, match="33 is more than the model's width, 32"):
        add_lora(model, LoraConfig(rank=33, alpha=32.0, dropout=0.0, targets=["q_proj"]))


# ---- in processes of their own -------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_real_process(corpus):
    """The same end when Python itself ends: status 2, one line, nothing else on stderr."""
    clips = json.loads((corpus / "train.json").read_text())
    clips[1]["fps"] = "\x1b[31mtwo"
    (corpus / "train.json").write_text(json.dumps(clips))
    config = write_tiny_config(corpus)
    for command, said in (
        ([ROOT / "train.py", config], "clip brief, fps: must be a number"),
        ([ROOT / "train.py", corpus / "none.yaml"], "none.yaml: no such config file"),
        ([ROOT / "infer.py", "--clip", "a.json", "--checkpoint", corpus], "is not a checkpoint"),
    ):
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=corpus)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert said in done.stderr and "\x1b" not in done.stderr
    command = [sys.executable, "-m", "prospect.check", str(corpus / "train.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=corpus
    )
    assert (done.returncode, done.stderr) == (2, "") and "clip brief, fps: must be a number" in done.stdout
    assert not (corpus / "runs").exists()
