"""A corpus and a configuration so small that complete training runs fit into a test.

    write_tiny_corpus(folder)             train.json, val.json and embeddings/ in `folder`; same arguments, same files
    tiny_config(folder, "section.key=value", ...)         a Config on that corpus
    write_tiny_config(folder, "section.key=value", ...)   the same as FOLDER/config.yaml, for `python train.py`
    filled_model(config, tokenizer)       the model with which a run of that configuration begins
    run_training(folder, "section.key=value", ..., world=2)   train.py's loop in processes of its own; exit statuses

The clips are uneven on purpose. One is ten times as long as the shortest and says a hundred times as much, and one has
nothing to learn from at all: no turn of the assistant's, no update, and so few frames that none becomes a negative.
"""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prospect.config import Config, apply_overrides, make_config, to_dict

VISION_DIM = 16
WORDS = "take the red block and put it on top of small wheel then turn bolt left until tight".split()


def tiny_clip(
    draw: np.random.Generator, name: str, frames: int, replies: int, words: int, wish: str = "I want to build it."
) -> dict:
    """A clip of `frames` frames with `replies` assistant turns of `words` words, and two steps done on the way."""
    start = int(draw.integers(0, 50))
    turns = [{"role": "user", "content": wish, "start_frame": start + 1, "end_frame": start + 1}]
    places = np.linspace(2, frames - 2, max(replies, 1)).astype(int).tolist()
    for number, place in enumerate(places[:replies]):
        text = " ".join(draw.choice(WORDS, size=words).tolist())
        turns.append(
            {"role": "assistant", "content": text, "start_frame": start + place - 1, "end_frame": start + place}
        )
        if number < 4:
            update = [{"id": f"S{number // 2 + 1}", "transition": ("start", "complete")[number % 2]}]
            turns.append(
                {"role": "DST_UPDATE", "content": update, "start_frame": start + place, "end_frame": start + place}
            )
    steps = [{"id": "S1", "name": "take the block"}, {"id": "S2", "name": "turn the bolt"}]
    return {
        "id": name, "video_uid": name, "clip_idx": 0, "dataset": "tiny", "fps": 2, "start_frame_idx": start,
        "end_frame_idx": start + frames - 1, "inferred_goal": "Build it", "conversation": turns, "dst": steps,
    }  # fmt: skip


def write_tiny_corpus(folder: Path, *, clips: int = 12, seed: int = 0) -> None:
    """`clips` training clips, three or more, and three for validation, with float32 embeddings of width VISION_DIM."""
    draw = np.random.default_rng(seed)
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    train = [
        tiny_clip(draw, "silent", frames=4, replies=0, words=0, wish=" ".join(draw.choice(WORDS, size=100).tolist())),
        tiny_clip(draw, "brief", frames=8, replies=1, words=1),
        tiny_clip(draw, "talkative", frames=40, replies=10, words=24),
    ]
    for number in range(3, clips):
        frames = int(draw.integers(8, 30))
        train.append(tiny_clip(draw, f"clip{number}", frames, replies=2 + number % 3, words=int(draw.integers(2, 8))))
    val = [tiny_clip(draw, f"val{number}", frames=12 + 6 * number, replies=3, words=4) for number in range(3)]
    for name, list_of_clips in (("train", train), ("val", val)):
        (folder / f"{name}.json").write_text(json.dumps(list_of_clips), encoding="utf-8")
        for clip in list_of_clips:
            rows = clip["end_frame_idx"] - clip["start_frame_idx"] + 1
            np.save(
                folder / "embeddings" / f"{clip['id']}_embeddings.npy",
                draw.normal(size=(rows, VISION_DIM)).astype(np.float32),
            )


def tiny_config(folder: Path, *overrides: str) -> Config:
    """Two layers of width 32, 6 steps, on the CPU; the run's directory is FOLDER/runs/tiny."""
    values = {
        "run": {"name": "tiny", "out": str(folder / "runs")},
        "model": {
            "vision_dim": VISION_DIM, "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        },
        "data": {
            "train": [str(folder / "train.json")], "val": [str(folder / "val.json")], "sample": None,
            "max_seq_len": 512, "batch_tokens": 512, "neg_frame_sampling_rate": 0.1,
        },
        "train": {
            "max_steps": 6, "learning_rate": 1e-3, "warmup_steps": 2, "eval_every": 3, "save_every": 3, "device": "cpu",
        },
        "infer": {
            "reserved": 64, "max_reply_tokens": 8, "max_summary_tokens": 8, "max_update_tokens": 20, "evidence": 0.5,
        },
    }  # fmt: skip
    return make_config(apply_overrides(values, list(overrides)), "tiny")


def write_tiny_config(folder: Path, *overrides: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(tiny_config(folder, *overrides))), encoding="utf-8")
    return path


def filled_model(config: Config, tokenizer: Any) -> Any:
    """The model that train.py begins with, on the CPU."""
    from prospect.build import new_model
    from prospect.weights import fill_model

    model, stored = new_model(config, tokenizer)
    fill_model(model, stored, "cpu", config.run.seed)
    return model


# ---- runs in processes of their own --------------------------------------------------------------

# A forkserver that has imported everything: a new process is then ready in a moment, and no state of ours is in it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "torch._dynamo"])  # which the first optimizer of a process imports


def launch(target: Callable, *args: Any, world: int = 1, log: Path | None = None, **environment: str) -> list[Any]:
    """Start `target(*args)` in `world` processes that see what torchrun would tell them, and return the processes."""
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))  # for the forkserver, which starts once
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), **environment}
    processes = [
        PROCESSES.Process(target=as_rank, args=(shared | {"RANK": str(rank)}, log, target, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any], timeout: float = 60.0) -> list[int]:
    """Wait for the processes; their exit statuses. One that is not done in time is killed, and counts as -9."""
    until = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run_training(folder: Path, *overrides: str, world: int = 1, timeout: float = 60.0, **environment: str) -> list[int]:
    """`python train.py` on the tiny configuration in `world` ranks; what they print goes to FOLDER/log."""
    return finish(launch(train_here, folder, *overrides, world=world, log=folder / "log", **environment), timeout)


def train_here(folder: Path, *overrides: str) -> int:
    """What train.py's main does with the tiny configuration, in this process; ends it with the exit status."""
    import train  # here, and not above: who only wants the corpus does not wait for torch

    config = tiny_config(folder, *overrides)
    ranks = train.start_ranks("cpu")
    try:
        return train.train(config, ranks, dry_run=False)
    finally:
        train.stop_ranks(ranks)


def as_rank(environment: dict[str, str], log: Path | None, target: Callable, args: tuple) -> None:
    import torch

    from prospect.errors import run_entry_point

    os.environ.update(environment)
    torch.set_num_threads(1)
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
    run_entry_point(lambda: target(*args))
