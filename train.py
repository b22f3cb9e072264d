"""Train PROSPECT: the whole loop, by hand.

    python train.py config.yaml [section.key=value ...] [--dry-run]
    torchrun --nproc_per_node=4 train.py config.yaml

An optimizer step takes `gradient_accumulation_steps` micro-batches on each rank. Their labels are counted first, over
all micro-batches and ranks; then every loss term is a sum divided by that one count. So a step gives the same gradient
however it is cut into micro-batches and ranks, even when clips differ a hundredfold in their number of labels.

Everything random in the data is a function of (seed, epoch, clip), and the loop's position is two numbers, so a run
that is stopped or killed resumes exactly.

Exit status: 0 done, 2 a user's error, 75 stopped by SIGTERM or SIGINT with everything saved, 130 a second Ctrl-C.
"""

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from prospect import checkpoint as ckpt
from prospect.build import load_corpora, load_tokenizer, make_sample_corpus, new_model, run_directory
from prospect.check import refuse_without_updates
from prospect.checkpoint import TrainState
from prospect.config import Config, TrainConfig, load_config, to_dict
from prospect.context import check_reserved
from prospect.data import (
    Corpus,
    DataOrder,
    MicroBatches,
    StepSampler,
    contents,
    counts_line,
    label_counts,
    padding_share,
    received,
    to_device,
)
from prospect.distributed import (
    Ranks,
    StopRequest,
    any_rank,
    check_precision,
    gather_objects,
    leave_signals_to_parent,
    shard_model,
    share_model,
    start_ranks,
    stop_ranks,
    sum_named,
    together,
    whole,
    without_sync,
)  # fmt: skip
from prospect.errors import ProspectError, run_entry_point
from prospect.files import write_text
from prospect.memory import describe_memory
from prospect.model import LOSS_CLASSES, Prospect, added, count_labels, loss_terms, total_loss
from prospect.runlog import MetricsLog, report_end, validation_line
from prospect.tune import parameter_groups, set_trainable
from prospect.validation import autocast, clips_to_stream, note_validation, out_of_patience, validate
from prospect.weights import fill_model, trained_tensors

STOPPED_BY_SIGNAL = 75  # exit status after SIGTERM or SIGINT, with everything saved: start again to resume
COMPILED_LENGTHS = 64  # with train.compile, sequences are padded to a multiple of this
MAX_SKIPS = 20  # steps skipped one after another before the run stops even with train.nonfinite=skip
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


# ---- the loop ------------------------------------------------------------------------------------


def train(config: Config, ranks: Ranks, dry_run: int) -> int:
    """Train, and return the exit status. dry_run: describe a run of so many ranks and stop; 0: train."""
    # What to learn from, and the model. Rank 0 makes what is made once: the sample corpus and a trained tokenizer.
    torch.manual_seed(config.run.seed + ranks.rank)
    with together(ranks):
        check_precision(config.train.precision, ranks.device)
        if ranks.main:
            make_sample_corpus(config)
            load_tokenizer(config)
    with together(ranks):
        tokenizer = load_tokenizer(config)
    train_corpus, val_corpus, leaks = load_corpora(config, tokenizer, ranks)
    with together(ranks):
        refuse_without_updates(train_corpus.updates, config.data)
        check_reserved(tokenizer, config)
        left_out = clips_to_stream(val_corpus, config)[1]
        val_corpus.warnings += [f"not streamed in validation: {line}" for line in left_out]
        model, stored = new_model(config, tokenizer)  # shapes and types; the values follow
    order = DataOrder(train_corpus.lengths(), config.data.batch_tokens, config.run.seed)
    set_trainable(model, config.train)
    if ranks.main:
        described = dataclasses.replace(ranks, world=dry_run or ranks.world)
        print("\n".join([describe(config, model, train_corpus, val_corpus, order, described), *leaks]), flush=True)
    if dry_run:
        if ranks.main:
            print("\n".join(describe_memory(config, model, dry_run)))
            print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
            print("labels of one epoch:", counts_line(label_counts(train_corpus)))
        return 0

    # Where to resume.
    run = run_directory(config)
    per_step = ranks.world * config.train.gradient_accumulation_steps  # micro-batches
    source, state = ckpt.resume_point(run, train_corpus, val_corpus, config, ranks, per_step)
    left = order.left(state.epoch, state.position, config.train.num_epochs)
    max_steps = config.train.max_steps or state.step + math.ceil(left / per_step)
    ended = (state.step, state.evaluated_step) >= (max_steps, max_steps)
    if source and (ended or out_of_patience(state, config.train.patience)):  # then nothing is written either
        if ranks.main:
            advice = f"raise {'train.max_steps' if ended else 'train.patience'}, or choose another run.name"
            print(f"nothing to do: step {state.step} of {max_steps} is done; {advice}")
        return 0

    # The model, shared between ranks: each reads or draws the values of its own share alone. The optimizer; precision.
    model.model.activation_checkpointing = config.train.activation_checkpointing
    if config.train.compile:  # dynamic: one graph for all shapes; batch size 1 and evaluation get their own
        for block in model.model.layers:
            block.compile(dynamic=True)
    shard_model(model, config.train, ranks)
    with together(ranks):
        if source and not (source / ckpt.SHARDS).is_dir():
            stored |= trained_tensors(model, source)
        fill_model(model, stored, ranks.device, config.run.seed)
    shared = share_model(model, config.train, ranks)
    beta = (config.train.beta1, config.train.beta2)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train), betas=beta, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.train.precision == "fp16")
    if source:
        with together(ranks):
            ckpt.restore(source, model, optimizer, state, config, ranks)
        if state.scaler:  # a run that changes to fp16 here has none yet
            scaler.load_state_dict(state.scaler)
    state.world, state.micro_batches, state.made_with = ranks.world, per_step, ckpt.versions()

    batches = load_batches(train_corpus, order, state, config, ranks)
    stop = StopRequest()
    log = None
    with together(ranks):
        if ranks.main:
            write_text(run / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
            log = MetricsLog(run / "metrics.jsonl", state, config.run.tensorboard)
    bar = tqdm(total=max_steps, initial=state.step, desc="train", disable=not ranks.main, dynamic_ncols=True)
    shared.train()
    unsaved, skips_in_a_row = False, 0

    with bar:  # so that the bar is closed before an error is printed
        while True:
            # What is due after `step` steps. A run that was stopped before its validation makes up for it here.
            finished = state.step >= max_steps
            if state.evaluated_step < state.step and (finished or state.step % config.train.eval_every == 0):
                found = validate(model, val_corpus, config, ranks, stop)
                if found is not None:  # None: asked to stop meanwhile
                    *measured, example = found
                    note_validation(state, *measured, config.train.best_by)
                    unsaved = True
                    line = {"step": state.step, "evaluation": state.evaluation, "best_step": state.best_step}
                    line |= {"example": example} if example else {}
                    with together(ranks):
                        if ranks.main:
                            log.write(line)
                            bar.write(validation_line(state, config.train.patience))
            finished = finished or out_of_patience(state, config.train.patience)
            stopping = any_rank(stop.requested, ranks)
            save_due = (
                finished or stopping or state.step == state.best_step or state.step % config.train.save_every == 0
            )
            if unsaved and save_due:
                state.scaler = scaler.state_dict()
                ckpt.save(run, model, optimizer, tokenizer, state, config, ranks)
                unsaved = False
                stopping = any_rank(stop.requested, ranks)  # asked for while saving
            if finished or stopping:
                break

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, max_steps, config.train, group["peak_lr"])
            step = train_step(shared, optimizer, scaler, batches, config, ranks)
            state.epoch, state.position = order.advance(state.epoch, state.position, per_step)
            if step.finite:
                state.step, unsaved, skips_in_a_row = state.step + 1, True, 0
                if state.step % config.train.log_every == 0 or state.step == max_steps:
                    with together(ranks):
                        if ranks.main:
                            log.write(step_line(step, state, optimizer.param_groups[0]["lr"]))
                            shown = {short: f"{step.terms[name]:.3f}" for short, name in SHOWN_LOSSES.items()}
                            bar.set_postfix(shown, refresh=False)
                bar.update()
            else:
                state.skipped, skips_in_a_row = state.skipped + 1, skips_in_a_row + 1
                what = skipped_step(step, state.step + 1, skips_in_a_row, scaler, config, ranks)
                with together(ranks):
                    if ranks.main:
                        log.write({"step": state.step + 1, "skipped": what, "loss_scale": scaler.get_scale()})
                        bar.write(f"skipped: {what}")

    if ranks.main:
        report_end(run, state, max_steps, finished, config.data.val[0])
    return 0 if finished else STOPPED_BY_SIGNAL


@dataclass
class Step:
    """One optimizer step. Losses and counts are of all ranks; `micro` and `sums` are this rank's micro-batches."""

    terms: dict[str, float]  # the losses by name, see loss_terms
    loss: float  # their weighted total
    norm: float  # of the whole gradient, before clipping
    counts: dict[str, Tensor]  # labels by LOSS_CLASSES, "tokens", and "padded": tokens with padding
    finite: bool  # else the optimizer's step was left out
    micro: list[dict]  # the batches
    sums: list[dict[str, Tensor]]  # loss sums of each
    seconds: float


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterator[dict],
    config: Config,
    ranks: Ranks,
) -> Step:
    """One step of the optimizer: count the labels, run every micro-batch forward and backward, clip, update."""
    started = time.perf_counter()
    micro = [next(batches) for _ in range(config.train.gradient_accumulation_steps)]

    # Labels are counted before any backward: every term is divided by its count over the whole step.
    counts = sum_named(added(tally(batch) for batch in micro), ranks)
    sums = []
    with autocast(config.train, ranks.device):  # around them all: its 16-bit copy of each weight is made once a step
        for number, batch in enumerate(micro):
            batch = to_device(batch, ranks.device)
            last = number == len(micro) - 1  # DDP averages gradients over ranks in the last backward only
            with contextlib.nullcontext() if last else without_sync(model):
                of_batch = model(batch["input_ids"], batch["image_embeds"], targets=batch["targets"], loss=config.loss)
                with torch.autocast(ranks.device.type, enabled=False):
                    loss = total_loss(loss_terms(of_batch, counts, config.loss), config.loss.weights())
                    scaler.scale(loss * ranks.world).backward()  # averaged over ranks, while the counts are summed
            sums.append({name: value.detach() for name, value in of_batch.items()})

    scaler.unscale_(optimizer)
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip or math.inf))
    terms = loss_terms(sum_named(added(sums), ranks), counts, config.loss)
    loss = total_loss(terms, config.loss.weights())
    loss, norm, *losses = torch.stack([loss, norm, *terms.values()]).tolist()  # the step's one wait for the device
    finite = math.isfinite(loss) and math.isfinite(norm)  # the same on every rank, for both are over all ranks
    if finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return Step(dict(zip(terms, losses)), loss, norm, counts, finite, micro, sums, time.perf_counter() - started)


def step_line(step: Step, state: TrainState, rate: float) -> dict:
    """A step as one line of metrics.jsonl. rate: its learning rate."""
    return {
        "step": state.step,
        "epoch": state.epoch,
        "loss": step.loss,
        **step.terms,
        "counts": {name: int(step.counts[name]) for name in LOSS_CLASSES},
        "lr": rate,
        "grad_norm": step.norm,
        "padding": 1 - float(step.counts["tokens"] / step.counts["padded"]),
        "tokens_per_second": float(step.counts["tokens"]) / step.seconds,
    }


# ---- pieces of the loop --------------------------------------------------------------------------


def tally(batch: dict) -> dict[str, Tensor]:
    """What a micro-batch adds to its step's counts: labels by LOSS_CLASSES, tokens, and tokens with padding."""
    mask = batch["attention_mask"]
    return count_labels(batch["targets"]) | {
        "tokens": mask.sum().double(),
        "padded": torch.tensor(float(mask.numel())).double(),
    }


def load_batches(corpus: Corpus, order: DataOrder, state: TrainState, config: Config, ranks: Ranks) -> Iterator[dict]:
    """This rank's micro-batches from the state's position on, without end."""
    accumulate = config.train.gradient_accumulation_steps
    loader = DataLoader(
        MicroBatches(corpus, COMPILED_LENGTHS if config.train.compile else 1),
        sampler=StepSampler(order, state.epoch, state.position, ranks.rank, ranks.world, accumulate),
        batch_size=None,  # the sampler's keys are a whole batch
        num_workers=config.data.workers,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # its own: the loader draws a number whenever it starts
        pin_memory=ranks.device.type == "cuda",
    )
    return received(loader)


def skipped_step(
    step: Step, number: int, skips_in_a_row: int, scaler: torch.amp.GradScaler, config: Config, ranks: Ranks
) -> str:
    """What to report of a step whose loss or gradient is not finite: its number, clips and frames.

    Raises ProspectError where the run must stop: with train.nonfinite=stop, unless fp16's loss scale was merely too
    large, and after MAX_SKIPS such steps in a row.
    """
    bad = [contents(batch) for batch, sums in zip(step.micro, step.sums) if not all(map(torch.isfinite, sums.values()))]
    of_ranks = gather_objects((bad, [contents(batch) for batch in step.micro]), ranks)
    lists = [shown for bad, _ in of_ranks for shown in bad] or [shown for _, every in of_ranks for shown in every]
    names = "; ".join(sorted({sequence for shown in lists for sequence in shown}))
    finite_loss = math.isfinite(step.loss)
    what = f"the {'gradient' if finite_loss else 'loss'} of step {number} is not finite (clips {names})"
    overflow = scaler.is_enabled() and finite_loss
    if skips_in_a_row > MAX_SKIPS or (config.train.nonfinite == "stop" and not overflow):
        remedy = "look at these clips' embeddings; lower train.learning_rate; or train.nonfinite=skip"
        with together(ranks):
            raise ProspectError(what, where=str(run_directory(config)), remedy=remedy)
    return what


# ---- what a run reports --------------------------------------------------------------------------


def describe(config: Config, model: Prospect, train: Corpus, val: Corpus, order: DataOrder, ranks: Ranks) -> str:
    """The batch arithmetic, printed before the first step."""
    lengths, batches = order.lengths, order.batches(0)
    accumulate, budget = config.train.gradient_accumulation_steps, config.data.batch_tokens
    per_step = ranks.world * accumulate
    steps = config.train.max_steps or math.ceil(order.left(0, 0, config.train.num_epochs) / per_step)
    clips = len(train.clips())
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shared = f", {config.train.parallel}" if ranks.world > 1 else ""
    without = f"; ends after {config.train.patience} validations in a row without a better best"
    patience = without if config.train.patience else ""
    parts = [f"{f.path} x {f.repeat} {share:.1%}" for f, share in zip(config.data.train_files(), train.shares())]
    lines = [
        f"model      {parameters:,} parameters, {trained:,} trained, {config.train.precision} on {ranks.device}",
        f"clips      {clips} training clips in {len(train)} sequences, {len(val)} validation sequences",
        f"tokens     {int(lengths.sum()):,} an epoch, {lengths.mean():.0f} a sequence"
        f" (longest {lengths.max()} of {config.data.max_seq_len})",
        f"batches    {len(batches)} micro-batches an epoch of up to {budget:,} tokens,"
        f" {padding_share(lengths, batches):.1%} padding",
        f"step       {ranks.world} rank(s) x {accumulate} micro-batch(es) = {per_step} micro-batch(es){shared}",
        f"training   {steps:,} steps, {steps * per_step / len(batches):.1f} epochs{patience}",
    ]
    if len(parts) > 1:
        lines.insert(3, f"mixture    {', '.join(parts)} of the tokens")
    skipped = [f"skipped: {line}" for line in train.skipped + val.skipped]
    return "\n".join(lines + train.warnings + val.warnings + skipped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file; config.yaml comments every field")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    what = "print the resolved config, sizes and label counts, and stop"
    parser.add_argument("--dry-run", action="store_true", help=what)
    parser.add_argument("--ranks", type=int, help="with --dry-run: for a run of so many, not just those there are")
    arguments = parser.parse_intermixed_args()
    if arguments.ranks is not None and (arguments.ranks < 1 or not arguments.dry_run):
        remedy = "torchrun --nproc_per_node=N starts N ranks"
        raise ProspectError("is for --dry-run, and at least 1", where="--ranks", remedy=remedy)
    config = load_config(arguments.config, arguments.overrides)
    backbone = config.model.backbone
    if arguments.dry_run and backbone and not (Path(backbone) / "config.json").exists():
        # A published backbone that is not on this machine: sizes all the same.
        print("\n".join(describe_memory(config, world=arguments.ranks or 1)))
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        return 0
    ranks = start_ranks(config.train.device)
    try:
        return train(config, ranks, (arguments.ranks or ranks.world) if arguments.dry_run else 0)
    finally:
        stop_ranks(ranks)


def command() -> None:
    """What `prospect-train` runs, once the project is installed."""
    run_entry_point(main)


if __name__ == "__main__":
    command()
