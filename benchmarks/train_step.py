"""One training step, ours against transformers, on the same weights and the same batch.

    python benchmarks/train_step.py [--shape small] [--device cpu] [--repeats 5] [--labelled 0.33]
    python benchmarks/train_step.py --shape llama-3.2-3b --device cuda --precision bf16

The transformers version is what a user would otherwise run, and what similar projects do: LlamaForCausalLM with a
projector and two heads, an attention mask, logits of the full vocabulary at every position, and its own loss function,
once for replies and once for updates. "One pass" is the same with both losses computed by hand in one pass over the
logits. Forward, backward and AdamW (fused in both) are timed, alternating in one process; peak memory is measured in a
separate process for each. One row divides the operations that a step needs (padding, and logits that nothing is learned
from, do not count) by the rate of a large matrix product on this machine. Needs transformers (requirements-dev.txt).
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from benchmarks.limits import matmul_flops, synchronise
from prospect.config import LossConfig, torch_dtype
from prospect.data import to_device
from prospect.errors import ProspectError, run_entry_point
from prospect.model import IGNORE, ModelConfig, Prospect, count_labels, find_targets, init_weights, loss_terms
from prospect.weights import save_model


@dataclass(frozen=True)
class Shape:
    """A model's widths and counts, and the batch it is trained on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    sequences: int = 1  # in the batch
    shortest: int = 4096  # sequence, in tokens; the others are spread evenly up to the longest
    longest: int = 4096
    tied: bool = True  # the LM head is the embedding matrix


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 1024, sequences=2, shortest=60, longest=80),  # to try the script
    "small": Shape(512, 1408, 6, 8, 4, 49152, sequences=4, shortest=640, longest=818),
    "smollm2-1.7b": Shape(2048, 8192, 24, 32, 32, 49152),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128256),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, tied=False),
}
D = 2048  # width of a frame embedding
FRAMES = 0.32  # share of a sequence's tokens that are frames, as in the real clip
GEN_KEYS = ("speaking_gen_labels", "dst_gen_labels")
PRECISIONS = ["fp32", "bf16"]


def model_config(shape: str) -> ModelConfig:
    s = SHAPES[shape]
    return ModelConfig(vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.intermediate,
                       num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads,
                       head_dim=s.hidden // s.heads, tie_word_embeddings=s.tied, vision_dim=D,
                       image_token_id=1)  # fmt: skip


def make_batch(shape: str, labelled: float, device: str) -> dict[str, torch.Tensor]:
    """A right-padded batch of frames among text; decisions at frames; a share `labelled` of all tokens is learned."""
    s, draw = SHAPES[shape], torch.Generator().manual_seed(0)
    lengths = torch.linspace(s.shortest, s.longest, s.sequences).long()
    B, T = s.sequences, int(lengths.max())
    ids = torch.randint(2, s.vocab, (B, T), generator=draw)
    gen, speaking = torch.full((B, T), IGNORE), torch.full((B, T), IGNORE)
    mask = torch.arange(T) < lengths[:, None]
    for b, length in enumerate(lengths.tolist()):
        frames = torch.randperm(length, generator=draw)[: int(FRAMES * length)]
        ids[b, frames] = 1
        speaking[b, frames[::2]] = (torch.rand(len(frames[::2]), generator=draw) < 0.2).long()
        text = (ids[b, :length] != 1).nonzero()[1:, 0]
        learned = text[: int(labelled * length)]
        gen[b, learned] = ids[b, learned]
    ids[~mask] = 0
    half = torch.arange(T) % 2 == 0  # replies and updates: disjoint text
    labels = {
        "speaking_gen_labels": gen.masked_fill(~half, IGNORE), "speaking_labels": speaking,
        "dst_gen_labels": gen.masked_fill(half, IGNORE), "dst_update_labels": speaking,
        "dst_state_labels": torch.full((B, T), IGNORE),
    }  # fmt: skip
    batch = {
        "input_ids": ids, "attention_mask": mask.to(device), **labels, "targets": find_targets(labels),
        "image_embeds": torch.randn(int((ids == 1).sum()), D, generator=draw).half(),
    }  # fmt: skip
    return to_device(batch, torch.device(device))


def our_step(directory: str, batch: dict, device: str, dtype: torch.dtype, checkpointing: bool) -> Callable[[], float]:
    model = Prospect.from_pretrained(directory, dtype=dtype).to(device).train()
    model.model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    counts = count_labels(batch["targets"])

    def step() -> float:
        sums = model(batch["input_ids"], batch["image_embeds"], targets=batch["targets"])
        loss = sum(loss_terms(sums, counts, LossConfig()).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def their_step(
    directory: str, batch: dict, device: str, dtype: torch.dtype, checkpointing: bool, one_pass: bool = False
) -> Callable[[], float]:
    try:
        from transformers import LlamaForCausalLM
    except ImportError as error:
        raise ProspectError("transformers is not installed", remedy="pip install -r requirements-dev.txt") from error
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype).to(device)
    parts = Prospect.from_pretrained(directory, dtype=dtype).to(device)
    return transformers_step(model, parts, batch, checkpointing, one_pass)


def transformers_step(model, parts: Prospect, batch: dict, checkpointing: bool, one_pass: bool) -> Callable[[], float]:
    """A training step of LlamaForCausalLM, with peft's adapters or without, beside the projector and heads of ours."""
    projector, speaking_head, dst_head = parts.mm_projector, parts.speaking_decision_head, parts.dst_update_head
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parameters = [*model.parameters(), *projector.parameters(), *speaking_head.parameters(), *dst_head.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-5, fused=True)
    device = batch["input_ids"].device
    labels = {key: value.to(device) for key, value in batch.items() if key.endswith("labels")}

    def masked_bce(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        loss = F.binary_cross_entropy_with_logits(logits.squeeze(-1).float(), label.float(), reduction="none")
        return loss[label != IGNORE].mean()

    def step() -> float:
        embeds = model.get_input_embeddings()(batch["input_ids"])
        frames = projector(batch["image_embeds"].to(projector[0].weight.dtype))
        embeds[batch["input_ids"] == 1] = frames.to(embeds.dtype)
        out = model(
            inputs_embeds=embeds,
            attention_mask=batch["attention_mask"].long(),
            output_hidden_states=True,
            use_cache=False,
        )
        loss = masked_bce(speaking_head(out.hidden_states[-1]), labels["speaking_labels"])
        loss = loss + masked_bce(dst_head(out.hidden_states[-1]), labels["dst_update_labels"])
        if one_pass:  # no position carries both labels
            targets = [F.pad(labels[key], (0, 1), value=IGNORE)[:, 1:].flatten() for key in GEN_KEYS]
            tokens = F.cross_entropy(
                out.logits.float().flatten(0, 1), torch.maximum(*targets), ignore_index=IGNORE, reduction="none"
            )
            loss = loss + sum(tokens[target != IGNORE].mean() for target in targets)
        else:
            loss = loss + sum(model.loss_function(out.logits, labels[key], model.config.vocab_size) for key in GEN_KEYS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def time_once(step: Callable[[], float], device: str) -> tuple[float, float]:
    synchronise(device)
    started = time.perf_counter()
    loss = float(step())
    synchronise(device)
    return time.perf_counter() - started, loss


def flop_parts(shape: str, batch: dict, adapters: int = 0) -> dict[str, float]:
    """Floating-point operations that a step needs, by their arithmetic in words.

    6 per weight and token: 2 forward, 2 for the gradient of what goes in and 2 for that of the weight, which a frozen
    one does not need. adapters: their weights, where the transformer and the LM head are frozen (LoRA).
    """
    c = model_config(shape)
    H, V, D, L = c.hidden_size, c.vocab_size, c.vision_dim, c.num_hidden_layers
    heads, kv_heads = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    weights, per_weight = L * H * (2 * heads + 2 * kv_heads + 3 * c.intermediate_size), 4 if adapters else 6
    lengths = batch["attention_mask"].sum(1).long()
    tokens, squares = int(lengths.sum()), int((lengths**2).sum())
    frames = int((batch["input_ids"] == c.image_token_id).sum())
    learned = sum(int((batch[key] != IGNORE).sum()) for key in GEN_KEYS)
    parts = {
        f"{per_weight} x {tokens:,} tokens x {weights:,} weights of the blocks": per_weight * tokens * weights,
        f"{per_weight} x {learned:,} learned tokens x {H * V:,} of the LM head": per_weight * learned * H * V,
        # embeddings need no gradient
        f"{frames:,} frames x (4 x {D * H:,} + 6 x {H * H:,}) of the projector": frames * (4 * D * H + 6 * H * H),
        # half of a T x T square, scores and sums, 2 operations each; three times that with the backward pass
        f"6 x {L} layers x {heads:,} wide x {squares:,} pairs of tokens": 6 * L * heads * squares,
    }
    if adapters:
        parts[f"6 x {tokens:,} tokens x {adapters:,} of the adapters"] = 6 * tokens * adapters
    return parts


def needed_flops(shape: str, batch: dict) -> float:
    """Floating-point operations that a step needs, all of it trained."""
    return sum(flop_parts(shape, batch).values())


def peak_memory(which: str, arguments: argparse.Namespace, directory: str) -> float:
    """GiB at the peak of two steps, in a separate process."""
    command = [sys.executable, __file__, "--shape", arguments.shape, "--device", arguments.device,
               "--labelled", str(arguments.labelled), "--precision", arguments.precision,
               "--memory-of", which, "--directory", directory]  # fmt: skip
    if arguments.checkpointing:
        command.append("--checkpointing")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ProspectError(f"the memory run of {which} failed: {done.stderr[-300:]}")
    return float(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of weights and arithmetic, in both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--labelled", type=float, default=0.33, help="share of tokens that the LM head learns")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in both")
    parser.add_argument("--memory-of", choices=("ours", "theirs", "one pass"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = torch_dtype(arguments.precision)
    batch = make_batch(arguments.shape, arguments.labelled, arguments.device)
    makers = {"ours": our_step, "theirs": their_step, "one pass": functools.partial(their_step, one_pass=True)}

    if arguments.memory_of:
        step = makers[arguments.memory_of](arguments.directory, batch, arguments.device, dtype, arguments.checkpointing)
        for _ in range(2):
            step()
        if arguments.device == "cuda":
            print(torch.cuda.max_memory_allocated() / 2**30)
        else:
            # VmHWM, not ru_maxrss, which starts at the size of the parent process.
            status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
            print(int(status.split()[0]) / 2**20)
        return 0

    with tempfile.TemporaryDirectory() as directory:
        model = Prospect(model_config(arguments.shape))
        init_weights(model, 0)
        save_model(model.to(dtype), Path(directory))
        del model
        steps = {
            name: make(directory, batch, arguments.device, dtype, arguments.checkpointing)
            for name, make in makers.items()
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        losses: dict[str, float] = {}
        for repeat in range(arguments.repeats + 1):  # the first is warm-up
            for name, step in steps.items():
                seconds, loss = time_once(step, arguments.device)
                losses.setdefault(name, loss)
                if repeat:
                    times[name].append(seconds)
        del steps
        memory = {name: peak_memory(name, arguments, directory) for name in makers}

    tokens = int(batch["attention_mask"].sum())
    median = {name: statistics.median(values) for name, values in times.items()}
    gen = sum(int((batch[key] != IGNORE).sum()) for key in GEN_KEYS)
    print(
        f"{arguments.shape} on {arguments.device}, {arguments.precision}: "
        f"{tokens} tokens, {gen} of them learned by the LM head ({gen / tokens:.0%}); "
        f"first losses {', '.join(f'{loss:.4f}' for loss in losses.values())}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    needed, rate = needed_flops(arguments.shape, batch), matmul_flops(arguments.device, dtype)
    columns: dict[str, Callable[[str], str]] = {
        f"step, s (median of {arguments.repeats})": lambda name: f"{median[name]:.3f}",
        "tokens/s": lambda name: f"{tokens / median[name]:.0f}",
        "speed-up of ours": lambda name: f"{median[name] / median['ours']:.2f}",
        f"TFLOP/s, of {needed / 1e12:.2f} TFLOP per step": lambda name: f"{needed / median[name] / 1e12:.3f}",
        f"share of {rate / 1e12:.3f} TFLOP/s (large matrix product)": lambda name: (
            f"{needed / median[name] / rate:.0%}"
        ),
        "peak memory, GiB": lambda name: f"{memory[name]:.2f}",
        "share of it that ours takes": lambda name: f"{memory['ours'] / memory[name]:.2f}",
    }
    print("| | ours | transformers | transformers, one pass |\n|---|---:|---:|---:|")
    for title, value in columns.items():
        print(f"| {title} | " + " | ".join(value(name) for name in makers) + " |")
    print(json.dumps({"times": times, "memory": memory}))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
