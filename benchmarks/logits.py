"""What the logits cost in memory, by the share of tokens that the LM head learns from: ours against transformers.

    python benchmarks/logits.py [--shape small] [--device cpu] [--labelled 0 0.05 0.1 0.2 0.33 0.66]

Only the end of a training step is run: from given hidden states [B,T,H], the LM head's two losses and their gradients.
Ours reads the labelled positions alone; above LM_CHUNK of them it works in chunks, each recomputed in the backward
pass. The transformers version reads all positions and masks the losses. Each share runs in its own process, which
prints the peak above the memory in use before. The gradient of the LM head is in both columns and in every row (the
row of share 0 has little else), so the growth is what the logits take.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from benchmarks.train_step import GEN_KEYS, SHAPES, make_batch, model_config
from prospect.config import LossConfig
from prospect.errors import ProspectError, run_entry_point
from prospect.model import IGNORE, LM_CHUNK, Prospect, loss_sums


def ours(model: Prospect, hidden: torch.Tensor, batch: dict) -> torch.Tensor:
    return sum(loss_sums(model, hidden, batch["targets"], LossConfig()).values())


def theirs(model: Prospect, hidden: torch.Tensor, batch: dict) -> torch.Tensor:
    """Both losses in one pass over the logits: the best that can be done when all of them are computed."""
    logits = model.lm_head(hidden).float().flatten(0, 1)  # [B*T, V]
    targets = [F.pad(batch[key], (0, 1), value=IGNORE)[:, 1:].flatten().to(hidden.device) for key in GEN_KEYS]
    return F.cross_entropy(logits, torch.maximum(*targets), ignore_index=IGNORE, reduction="sum")


def status_mib(name: str) -> float:
    """VmRSS (in memory now) or VmHWM (the peak so far) of this process, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 2**10


def peak_above(which: str, shape: str, labelled: float, device: str) -> float:
    """MiB at the peak of one forward and backward pass, above the memory in use before."""
    batch = make_batch(shape, labelled, device)
    model = Prospect(model_config(shape)).to(device)
    B, T = batch["input_ids"].shape
    hidden = torch.randn(B, T, model.config.hidden_size, device=device, requires_grad=True)
    loss = {"ours": ours, "theirs": theirs}[which]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(model, hidden, batch).backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_mib("VmRSS")
    loss(model, hidden, batch).backward()
    return status_mib("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--labelled", type=float, nargs="+", default=[0, 0.05, 0.1, 0.2, 0.33, 0.66])
    parser.add_argument("--of", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of:
        print(peak_above(arguments.of, arguments.shape, arguments.labelled[0], arguments.device))
        return
    tokens = int(make_batch(arguments.shape, 0, "cpu")["attention_mask"].sum())
    vocabulary = f"vocabulary {SHAPES[arguments.shape].vocab:,}"
    print(f"{arguments.shape} on {arguments.device}: {tokens} tokens, {vocabulary}, chunks of {LM_CHUNK}")
    print("| learned | tokens learned | ours, MiB | transformers, MiB |\n|---:|---:|---:|---:|")
    for share in arguments.labelled:
        batch = make_batch(arguments.shape, share, "cpu")
        learned = sum(int((batch[key] != IGNORE).sum()) for key in GEN_KEYS)
        peaks = []
        for which in ("ours", "theirs"):
            command = [sys.executable, __file__, "--shape", arguments.shape, "--device", arguments.device,
                       "--labelled", str(share), "--of", which]  # fmt: skip
            # One arena, fixed thresholds: freed memory returns to the system at once, so the peak is of live tensors.
            environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise ProspectError(f"the run of {which} failed: {done.stderr[-300:]}")
            peaks.append(float(done.stdout.splitlines()[-1]))
        print(f"| {learned / tokens:.0%} | {learned} | {peaks[0]:.0f} | {peaks[1]:.0f} |", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
