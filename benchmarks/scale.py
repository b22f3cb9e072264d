"""Seconds from the start of a training to its first step, cold and warm, and memory per rank, by clips and ranks.

    python benchmarks/scale.py [--clips 1000 10000 100000] [--ranks 1 2 4] [--folder DIR] [--json] [--packed]

The clips are generated, of small width: 220 frames and 40 texts each, so that what is measured is the work per clip,
not the reading of embeddings. Cold: nothing was found out about them yet. Warm: everything was, and nothing changed.
Each in seconds, and in seconds of processor time over all ranks and processes, which other load changes less.
A rank's memory is what it has to itself (RssAnon) after the first step. The row of 10 clips says what a start takes
that has nothing to do with their number: imports, the model, the step. Corpora and measured rows stay in the folder, so
a benchmark that was stopped resumes; without --folder all of it is removed at the end. 100,000 clips take 1.3 GB.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository itself, not installed

from prospect.errors import ProspectError, run_entry_point
from prospect.files import read_json, write_json
from prospect.tokenizer import train_tokenizer

FRAMES, WIDTH = 220, 16
REPLY = "Well done. Now take the next wheel, put it on the axle and turn the screw until the wheel is tight."
SETTLED = 2.5  # seconds after which what is found out about a file is kept


def write_clips(path: Path, clips: int) -> None:
    """A clip file, JSONL or a JSON list by its name, and an .npy file for each clip."""
    embeddings = path.parent / "embeddings"
    embeddings.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(0).standard_normal((FRAMES, WIDTH)).astype(np.float16)
    before, between, after = ("", "", "") if path.suffix == ".jsonl" else ("[", ",", "]")
    with open(path, "w", encoding="utf-8") as file:
        for c in range(clips):
            name = f"{path.stem}{c}"
            file.write((between if c else before) + json.dumps(clip(name)) + "\n")
            np.save(embeddings / f"{name}_embeddings.npy", rows)
        file.write(after)


def clip(name: str) -> dict:
    steps = [f"S{i + 1}" for i in range(FRAMES // 22)]
    conversation = []
    for i, step in enumerate(steps):
        for frame, transition in ((110 + 22 * i, "start"), (120 + 22 * i, "complete")):
            turn = {"start_frame": frame - 2, "end_frame": frame}
            update = [{"id": step, "transition": transition}]
            conversation.append({"role": "DST_UPDATE", "content": update, **turn})
            conversation.append({"role": "assistant", "content": f"{name}, {step}: {REPLY}", **turn})
    named = [{"id": step, "name": f"Screw wheel {step} to the chassis."} for step in steps]
    return {
        "id": name, "start_frame_idx": 100, "end_frame_idx": 99 + FRAMES, "conversation": conversation, "dst": named,
        "inferred_goal": "Assembling a toy truck",
    }  # fmt: skip


def settings(corpus: Path, run: Path, ending: str, packed: bool) -> list[str]:
    """A model that is nothing beside its data."""
    values = {
        "run.name": run.name, "run.out": run.parent, "data.train": corpus / f"train.{ending}",
        "data.val": corpus / f"val.{ending}", "data.sample": "null", "data.max_seq_len": 4096,
        "data.embeddings": corpus / ("packed" if packed else "embeddings"), "model.vision_dim": WIDTH,
        "model.vocab_size": 512, "model.hidden_size": 32, "model.intermediate_size": 32, "model.num_hidden_layers": 1,
        "model.num_attention_heads": 1, "model.num_key_value_heads": 1, "train.max_steps": 100000,
        "train.device": "cpu", "infer.evidence": 0.5, "train.eval_every": 100000, "train.save_every": 100000,
    }  # fmt: skip
    return [f"{name}={value}" for name, value in values.items()]


def first_step(words: list[str], run: Path, ranks: int) -> dict[str, float]:
    """Start a training on so many ranks: seconds to its first step, also of processor time, and a rank's MiB then."""
    (run / "metrics.jsonl").unlink(missing_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "train.py", str(ROOT / "config.yaml"), *words]
    began, used = time.perf_counter(), processor_time()
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
            for process in processes:
                if process.poll() is not None:
                    raise ProspectError(f"the run ended before its first step: {process.stderr.read()[-300:]}")
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        memory = max(own_memory(process.pid) for process in processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
    return {"seconds": seconds, "processor": processor_time() - used, "memory": memory}


def processor_time() -> float:
    """Seconds of it that ended processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def own_memory(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def measure(folder: Path, clips: int, ranks: int, ending: str, packed: bool) -> dict[str, dict[str, float]]:
    """One row: cold, then warm."""
    corpus, run = folder / f"{clips}", folder / "runs" / f"{clips}"
    if not (corpus / f"val.{ending}").exists():
        write_clips(corpus / f"train.{ending}", clips)
        write_clips(corpus / f"val.{ending}", 10)
        time.sleep(SETTLED)
    if packed and not (corpus / "packed").exists():
        command = [sys.executable, "-m", "prospect.embeddings", "pack", corpus / "embeddings", corpus / "packed"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(SETTLED)
    texts = (turn["content"] for turn in clip("train0")["conversation"] if turn["role"] == "assistant")
    train_tokenizer(texts, 512, run / "tokenizer")
    shutil.rmtree(corpus / ".prospect", ignore_errors=True)
    words = settings(corpus, run, ending, packed)
    return {"cold": first_step(words, run, ranks), "warm": first_step(words, run, ranks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, help="keep corpora and rows here")
    parser.add_argument("--json", action="store_true", help="clip files are JSON lists instead of JSONL")
    parser.add_argument("--packed", action="store_true", help="embeddings are packed")
    arguments = parser.parse_args()
    ending = "json" if arguments.json else "jsonl"
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        print("| clips | ranks | cold, s | of processor time | warm, s | of processor time | memory of a rank, MiB |")
        print("|---:" * 7 + "|")
        for clips in [10, *arguments.clips]:
            for ranks in arguments.ranks:
                stored = folder / f"row-{clips}-{ranks}-{ending}{'-packed' if arguments.packed else ''}.json"
                if not stored.exists():
                    write_json(stored, measure(folder, clips, ranks, ending, arguments.packed))
                row = read_json(stored)
                seconds = [f"{row[kind][of]:.1f}" for kind in ("cold", "warm") for of in ("seconds", "processor")]
                print(f"| {clips:,} | {ranks} | {' | '.join(seconds)} | {row['warm']['memory']:.0f} |", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
