"""Train PROSPECT: the whole loop, by hand.

    python train.py config.yaml [section.key=value ...] [--dry-run]
    torchrun --nproc_per_node=4 train.py config.yaml

An optimizer step takes `gradient_accumulation_steps` micro-batches on each rank. Their labels are counted first, over
all micro-batches and ranks; then every loss term is a sum divided by that one count. So a step gives the same gradient
however it is cut into micro-batches and ranks, also when clips differ a hundredfold in what there is to learn.

Everything random in the data is a function of (seed, epoch, clip), and where the loop stands in it is two numbers: a
run that is stopped, or killed, and started again goes on as if nothing had happened.

Exit status: 0 done, 2 a user's error, 75 stopped by SIGTERM or SIGINT with everything saved, 130 a second Ctrl-C.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from prospect import checkpoint as ckpt
from prospect.build import build_model, load_corpus, load_tokenizer, make_sample_corpus, run_directory
from prospect.checkpoint import TrainState
from prospect.config import Config, TrainConfig, load_config, to_dict
from prospect.data import (
    Corpus,
    DataOrder,
    MicroBatches,
    StepSampler,
    counts_line,
    label_counts,
    ordered_batches,
    padding_share,
    received,
)
from prospect.decisions import decision_report, teacher_forced, traces
from prospect.distributed import (
    Ranks,
    StopRequest,
    all_sum,
    any_rank,
    gather_objects,
    leave_signals_to_parent,
    on_main,
    release,
    share_model,
    start_ranks,
    stop_ranks,
    together,
    whole,
    without_sync,
)  # fmt: skip
from prospect.errors import ProspectError, run_entry_point
from prospect.files import read_lines, written_whole
from prospect.memory import describe_memory
from prospect.model import LOSS_CLASSES, Prospect, count_labels, loss_terms
from prospect.tune import parameter_groups, set_trainable
from prospect.weights import load_state

STOPPED_BY_SIGNAL = 75  # exit status after SIGTERM or SIGINT, with everything saved: start again to go on
COMPILED_LENGTHS = 64  # with train.compile, sequences are padded to a multiple of this
MAX_SKIPS = 20  # with train.nonfinite=skip, steps skipped one after another before the run stops all the same
SHOWN_LOSSES = {"say": "speaking_gen", "speak?": "speaking_binary", "upd": "dst_gen", "upd?": "dst_binary"}


# ---- pure functions of the step ------------------------------------------------------------------


def learning_rate(step: int, max_steps: int, config: TrainConfig, peak: float) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up to its peak, then down to a share of it by the schedule."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    fall = {"cosine": cosine, "linear": 1 - progress, "constant": 1.0}[config.schedule]
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)


def total_loss(terms: dict[str, Tensor], config: Config) -> Tensor:
    weights = config.loss
    return (
        weights.speaking_gen_weight * terms["speaking_gen"]
        + weights.speaking_binary_weight * terms["speaking_binary"]
        + weights.dst_gen_weight * terms["dst_gen"]
        + weights.dst_binary_weight * terms["dst_binary"]
        + weights.dst_state_weight * terms["dst_state"]
    )


# ---- the order of the data -----------------------------------------------------------------------


# ---- pieces of the loop --------------------------------------------------------------------------


def make_autocast(config: TrainConfig, device: torch.device):
    """A context for forward passes: matrices in bf16 or fp16, sums and losses in fp32."""
    if config.precision == "fp32":
        return contextlib.nullcontext
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)


def to_device(batch: dict, device: torch.device) -> dict:
    """Inputs to the device; labels stay on the host, where finding them waits for nothing (see loss_sums)."""
    return batch | {key: batch[key].to(device, non_blocking=True) for key in ("input_ids", "image_embeds")}


def tally(batch: dict) -> Tensor:
    """What a micro-batch adds to its step's counts, [9]: labels by LOSS_CLASSES, tokens, tokens with padding."""
    mask = batch["attention_mask"]
    return torch.cat((count_labels(batch), torch.tensor([mask.sum(), mask.numel()], dtype=torch.float64)))


@torch.no_grad()
def evaluate(
    model: nn.Module, corpus: Corpus, config: Config, ranks: Ranks, autocast, stop: StopRequest
) -> tuple[dict[str, float], dict[str, float]] | None:
    """Validation losses and decision metrics over all ranks, and each head's best threshold; None if asked to stop."""
    was_training = model.training
    model.eval()
    batches = list(ordered_batches(corpus.lengths(), config.data.batch_tokens))
    sums, counts = torch.zeros(2, len(LOSS_CLASSES), dtype=torch.float64)
    rows, stopped = [], False
    for first in range(0, len(batches), ranks.world):
        stopped = any_rank(stop.requested, ranks)
        if stopped:
            break
        # A rank for which no batch is left runs the first all the same, without counting it: FSDP needs every rank's
        # share of the weights for every forward.
        mine = first + ranks.rank
        batch = batches[mine] if mine < len(batches) else batches[0]
        part = teacher_forced(model, corpus, [batch], ranks.device, config.loss.bce, config.infer.decision, autocast)
        if mine < len(batches):
            sums, counts, rows = sums + part[0], counts + part[1], rows + part[2]
    release(model)
    model.train(was_training)
    if stopped:
        return None
    sums, counts = all_sum(sums, ranks), all_sum(counts, ranks)
    terms = loss_terms(sums.float(), counts, config.loss.bce)
    numbers = {f"loss_{name}": float(value) for name, value in terms.items()}
    numbers["loss"] = float(total_loss(terms, config))
    clips = traces(corpus, [row for part in gather_objects(rows, ranks) for row in part])
    decisions, thresholds = decision_report(clips, ("speaking", "dst") if config.data.dst else ("speaking",))
    return numbers | decisions, thresholds


def describe(config: Config, model: Prospect, train: Corpus, val: Corpus, order: DataOrder, ranks: Ranks) -> str:
    """The batch arithmetic, printed before the first step."""
    lengths, batches = order.lengths, order.batches(0)
    accumulate, budget = config.train.gradient_accumulation_steps, config.data.batch_tokens
    per_step = ranks.world * accumulate
    steps = config.train.max_steps or math.ceil(order.left(0, 0, config.train.num_epochs) / per_step)
    clips = len({(entry.file, entry.clip) for entry in train.entries})
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shared = f", {config.train.parallel}" if ranks.world > 1 else ""
    lines = [
        f"model      {parameters:,} parameters, {trained:,} trained, {config.train.precision} on {ranks.device}",
        f"clips      {clips} training clips in {len(train)} sequences, {len(val)} validation sequences",
        f"tokens     {int(lengths.sum()):,} an epoch, {lengths.mean():.0f} a sequence"
        f" (longest {lengths.max()} of {config.data.max_seq_len})",
        f"batches    {len(batches)} micro-batches an epoch of up to {budget:,} tokens,"
        f" {padding_share(lengths, batches):.1%} padding",
        f"step       {ranks.world} rank(s) x {accumulate} micro-batch(es) = {per_step} micro-batch(es){shared}",
        f"training   {steps:,} steps, {steps * per_step / len(batches):.1f} epochs",
    ]
    skipped = [f"skipped: {line}" for line in train.skipped + val.skipped]
    return "\n".join(lines + train.warnings + val.warnings + skipped)


def evaluation_line(step: int, numbers: dict[str, float]) -> str:
    heads = [head for head in ("speaking", "dst") if f"{head}_event_f1" in numbers]
    f1, threshold = "{}_event_f1", "{}_threshold"
    shown = [f"{h} event F1 {numbers[f1.format(h)]:.3f} at {numbers[threshold.format(h)]:.2f}" for h in heads]
    return "  ".join([f"step {step}: validation loss {numbers['loss']:.4f}", *shown])


class MetricsLog:
    """metrics.jsonl: one JSON object a line. On resume, what was logged after the checkpoint is cut off."""

    def __init__(self, path: Path, state: TrainState):
        kept = []
        if path.exists():
            for line in read_lines(path):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line half-written
                    numbers = json.loads(line)
                    if numbers["step"] <= (state.evaluated_step if "evaluation" in numbers else state.step):
                        kept.append(line + "\n")
        with written_whole(path) as file:
            file.write("".join(kept).encode())
        self.file = open(path, "a", encoding="utf-8")

    def write(self, numbers: dict) -> None:
        try:
            self.file.write(json.dumps(numbers) + "\n")
            self.file.flush()
        except OSError as error:
            what, remedy = f"cannot be written: {error.strerror}", "make room and start again"
            raise ProspectError(what, where=self.file.name, remedy=remedy) from error


# ---- saving --------------------------------------------------------------------------------------


# ---- the loop ------------------------------------------------------------------------------------


def train(config: Config, ranks: Ranks, dry_run: bool) -> int:
    if dry_run and config.model.backbone and not (Path(config.model.backbone) / "config.json").exists():
        print(
            "\n".join(describe_memory(config))
        )  # a published backbone that is not on this machine: sizes all the same
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        return 0

    # What to learn from, and the model.
    torch.manual_seed(config.run.seed + ranks.rank)
    run = run_directory(config)
    on_main(lambda: (make_sample_corpus(config), load_tokenizer(config)), ranks)
    tokenizer = load_tokenizer(config)
    train_corpus = together(lambda: load_corpus(config, tokenizer, "train"), ranks)
    val_corpus = together(lambda: load_corpus(config, tokenizer, "val"), ranks)
    order = DataOrder(train_corpus.lengths(), config.data.batch_tokens, config.run.seed)
    model = together(lambda: build_model(config, tokenizer), ranks)
    set_trainable(model, config.train, config.run.seed)
    if ranks.main:
        print(describe(config, model, train_corpus, val_corpus, order, ranks), flush=True)
    if dry_run:
        if ranks.main:
            print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
            print("labels of one epoch:", counts_line(label_counts(train_corpus)))
        return 0

    # Where to go on from. A worker that torchrun has started again goes on, whatever it was told at first.
    accumulate = config.train.gradient_accumulation_steps
    per_step = ranks.world * accumulate  # micro-batches
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    on_main(lambda: ckpt.mend(run), ranks)
    source = together(lambda: ckpt.find_resume("auto" if restarted else config.train.resume, run), ranks)
    data = on_main(lambda: ckpt.fingerprint(train_corpus, "train") | ckpt.fingerprint(val_corpus, "val"), ranks)
    state = TrainState()
    if source:
        state = together(lambda: ckpt.read_state(source), ranks)
        changed = on_main(lambda: ckpt.check_resumable(source, state, config, data), ranks)
        if not (source / ckpt.SHARDS).is_dir():
            together(lambda: load_state(model, source), ranks)
        if ranks.main:
            print("\n".join(ckpt.resumed_lines(source, state, changed, ranks, per_step)), flush=True)
    left = order.left(state.epoch, state.position, config.train.num_epochs)
    max_steps = config.train.max_steps or state.step + math.ceil(left / per_step)

    # The model on its device, shared between ranks; the optimizer; precision.
    model.to(ranks.device)
    model.model.activation_checkpointing = config.train.activation_checkpointing
    if config.train.compile:  # one graph for all shapes, but with a batch of one another, and in evaluation others
        for block in model.model.layers:
            block.compile(dynamic=True)
    shared = share_model(model, config.train, ranks)
    beta = (config.train.beta1, config.train.beta2)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train), betas=beta, fused=True)
    autocast = make_autocast(config.train, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")
    if source:
        together(lambda: ckpt.restore(source, model, optimizer, state, config, ranks), ranks)
        if state.scaler:  # a run that goes over to fp16 here has none yet
            scaler.load_state_dict(state.scaler)
    state.world, state.micro_batches, state.data, state.made_with = ranks.world, per_step, data, ckpt.versions()

    batches = received(DataLoader(
        MicroBatches(train_corpus, COMPILED_LENGTHS if config.train.compile else 1),
        sampler=StepSampler(order, state.epoch, state.position, ranks.rank, ranks.world, accumulate),
        batch_size=None,  # the sampler's keys are a whole batch
        num_workers=config.data.workers,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # its own: the loader draws a number whenever it starts
        pin_memory=ranks.device.type == "cuda",
    ))  # fmt: skip
    stop = StopRequest()
    if ranks.main:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
        log = MetricsLog(run / "metrics.jsonl", state)
    bar = tqdm(total=max_steps, initial=state.step, desc="train", disable=not ranks.main, dynamic_ncols=True)
    shared.train()
    begun_at, unsaved, skips = state.step, False, 0

    with bar:  # closed also before an error's line
        while True:
            # What is due after `step` steps. A run that was stopped before its evaluation makes up for it here.
            finished = state.step >= max_steps
            if state.evaluated_step < state.step and (finished or state.step % config.train.eval_every == 0):
                found = evaluate(model, val_corpus, config, ranks, autocast, stop)
                if found is not None:
                    state.evaluation, state.thresholds = found
                    state.evaluated_step, unsaved = state.step, True
                    if state.best_loss is None or state.evaluation["loss"] < state.best_loss:
                        state.best_loss, state.best_step = state.evaluation["loss"], state.step
                    if ranks.main:
                        log.write({"step": state.step, "evaluation": state.evaluation})
                        bar.write(evaluation_line(state.step, state.evaluation))
            stopping = any_rank(stop.requested, ranks)
            due = finished or stopping or state.step == state.best_step or state.step % config.train.save_every == 0
            if unsaved and due:
                state.scaler = scaler.state_dict()
                ckpt.save(run, model, optimizer, tokenizer, state, config, ranks)
                unsaved = False
                stopping = any_rank(stop.requested, ranks)  # asked for while saving
            if finished or stopping:
                break

            # Count the step's labels before any backward: every term is divided by its count over the whole step.
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, max_steps, config.train, group["peak_lr"])
            micro = [next(batches) for _ in range(accumulate)]
            *counts, tokens, padded = all_sum(sum(tally(batch) for batch in micro), ranks)
            counts = torch.stack(counts)  # [7]

            parts = []  # loss sums of each micro-batch, [7]
            for number, batch in enumerate(micro):
                batch = to_device(batch, ranks.device)
                with contextlib.nullcontext() if number == accumulate - 1 else without_sync(shared):
                    with autocast():
                        # Loss sums by LOSS_CLASSES, [7].
                        sums = shared(batch["input_ids"], batch["image_embeds"], labels=batch, bce=config.loss.bce)
                    loss = total_loss(loss_terms(sums, counts, config.loss.bce), config)
                    scaler.scale(loss * ranks.world).backward()  # gradients are averaged over ranks; the counts are not
                parts.append(sums.detach())

            scaler.unscale_(optimizer)
            norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip or math.inf))
            terms = loss_terms(all_sum(torch.stack(parts).sum(0), ranks), counts, config.loss.bce)
            loss = total_loss(terms, config)
            taken = bool(torch.isfinite(loss + norm))  # the same on every rank, for both are over all ranks
            if taken:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.epoch, state.position = order.advance(state.epoch, state.position, per_step)

            if taken:
                state.step, unsaved, skips = state.step + 1, True, 0
                if ranks.main and (state.step % config.train.log_every == 0 or state.step == max_steps):
                    shown = {name: float(value) for name, value in terms.items()}
                    log.write({
                        "step": state.step, "epoch": state.epoch, "loss": float(loss), **shown,
                        "counts": {name: int(count) for name, count in zip(LOSS_CLASSES, counts)},
                        "lr": optimizer.param_groups[0]["lr"], "grad_norm": float(norm),
                        "padding": 1 - float(tokens / padded),
                        "tokens_per_second": float(tokens) / (time.perf_counter() - started),
                    })  # fmt: skip
                    postfix = {short: f"{shown[name]:.3f}" for short, name in SHOWN_LOSSES.items()}
                    bar.set_postfix(postfix, refresh=False)
                bar.update()
            else:
                state.skipped, skips = state.skipped + 1, skips + 1
                overflow = scaler.is_enabled() and bool(torch.isfinite(loss))  # fp16: the loss scale was too large
                line = not_finite(state.step + 1, micro, parts, loss, ranks)
                if skips > MAX_SKIPS or (config.train.nonfinite == "stop" and not overflow):
                    remedy = "look at these clips' embeddings; lower train.learning_rate; or train.nonfinite=skip"
                    together(lambda: refuse(line, str(run), remedy), ranks)
                if ranks.main:
                    log.write({"step": state.step + 1, "skipped": line, "loss_scale": scaler.get_scale()})
                    bar.write(f"skipped: {line}")

    if ranks.main:
        if not finished:
            print(f"stopped by a signal after step {state.step}; start again to go on", file=sys.stderr)
        elif state.step == begun_at:
            advice = "raise train.max_steps, or choose another run.name"
            print(f"nothing to do: step {state.step} of {max_steps} is done; {advice}")
        else:
            print(f"done: {max_steps} steps; the best checkpoint is {run / 'best'} (step {state.best_step})")
    return 0 if finished else STOPPED_BY_SIGNAL


def not_finite(step: int, micro: list[dict], parts: list[Tensor], loss: Tensor, ranks: Ranks) -> str:
    """Which step, and which clips: those of the micro-batches whose loss is not finite, or else all of the step's."""
    bad = [batch["clip_ids"] for batch, sums in zip(micro, parts) if not torch.isfinite(sums).all()]
    of_ranks = gather_objects((bad, [batch["clip_ids"] for batch in micro]), ranks)
    lists = [ids for bad, _ in of_ranks for ids in bad] or [ids for _, every in of_ranks for ids in every]
    names = ", ".join(sorted({name for ids in lists for name in ids}))
    return f"the {'gradient' if torch.isfinite(loss) else 'loss'} of step {step} is not finite (clips {names})"


def refuse(what: str, where: str, remedy: str) -> None:
    raise ProspectError(what, where=where, remedy=remedy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file; config.yaml comments every field")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    what = "print the resolved config, sizes and label counts, and stop"
    parser.add_argument("--dry-run", action="store_true", help=what)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    ranks = start_ranks(config.train.device)
    try:
        return train(config, ranks, arguments.dry_run)
    finally:
        stop_ranks(ranks)


if __name__ == "__main__":
    run_entry_point(main)
