"""A corpus ten times as large takes the same memory and no more open files, in the trainer and in its workers."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip
from tiny import VISION_DIM, tiny_config, write_tiny_corpus

from prospect.build import load_corpus, load_tokenizer
from prospect.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]

# Of this process, and of its worker after a tenth of an epoch and at its end: memory that is not of files, in MiB.
EPOCH = """
import os, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from prospect.config import DataConfig
from prospect.data import Corpus, DataOrder, MicroBatches, StepSampler
from prospect.tokenizer import Tokenizer

def own(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

folder, name = sys.argv[1:]
tokenizer = Tokenizer(f"{folder}/tokenizer", "plain")
corpus = Corpus([f"{folder}/{name}"], DataConfig(max_seq_len=400), tokenizer, 4, rate=0.5, seed=0)
order = DataOrder(corpus.lengths(), 2000, 0)
sampler = StepSampler(order, 0, 0, 0, 1, 1)
batches = iter(DataLoader(MicroBatches(corpus, 1), sampler=sampler, batch_size=None, num_workers=1))
worker = batches._workers[0].pid
for number in range(len(order.batches(0))):
    next(batches)
    if number == len(order.batches(0)) // 10:
        early = own(worker)
print(len(corpus), own(os.getpid()), early, own(worker))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_corpus_nor_over_an_epoch(tmp_path):
    np.save(tmp_path / "rows.npy", np.ones((60, 4), np.float16))
    train_tokenizer(["Hello, hello."], 300, tmp_path / "tokenizer")
    turns = [("assistant", f"Hello {n}", 5 + n, 6 + n) for n in range(3)]
    used = {}
    for clips in (500, 5000):
        lines = [
            json.dumps(raw_clip(turns, 5, 64, id=f"clip{n}", embeddings="../rows.npy", notes=["x"] * 1000))
            for n in range(clips)
        ]
        (tmp_path / f"{clips}.json").write_text(f"[{','.join(lines)}]")
        (tmp_path / "embeddings").mkdir(exist_ok=True)
        script = EPOCH.replace("max_seq_len=400", "max_seq_len=400, embeddings_outside=True")
        command = [sys.executable, "-c", script, str(tmp_path), f"{clips}.json"]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        sequences, *used[clips] = map(float, done.stdout.split())
        assert sequences == clips
    print(used)
    (small, _, _), (large, early, late) = used[500], used[5000]
    assert large < 1.1 * small and late < 1.1 * early, used


def test_a_corpus_needs_few_open_files(tmp_path):
    write_tiny_corpus(tmp_path, clips=80)
    config = tiny_config(tmp_path)
    tokenizer = load_tokenizer(config)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        corpus = load_corpus(config, tokenizer, "train")
        assert len({sample.clip_id for sample in (corpus[0, index] for index in range(len(corpus)))}) == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert corpus.load(0, 79)[1].shape[2] == VISION_DIM
