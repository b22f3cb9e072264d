"""Validation while training: losses, how well the heads separate, and how much evidence streamed decisions need.

Every validation sees the same draw of text places and negatives, that of epoch 0, so its numbers can be compared.
"""

import contextlib
import functools
import math
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from prospect.checkpoint import TrainState
from prospect.config import Config, TrainConfig, torch_dtype
from prospect.context import check_streamable
from prospect.data import Corpus, ordered_batches, received
from prospect.distributed import (
    Ranks,
    StopRequest,
    any_rank,
    gather_objects,
    leave_signals_to_parent,
    release,
    sum_named,
)
from prospect.errors import ProspectError
from prospect.model import LOSS_CLASSES, Prospect, added, loss_terms, total_loss
from prospect.thresholds import ForcedBatches, decision_report, teacher_forced, traces

if TYPE_CHECKING:
    from prospect.tuning import Tried

ALIKE = 0.03  # scores that differ by no more: about the standard error of a score of eight clips


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """A context for forward passes: matrices in bf16 or fp16, sums and losses in fp32."""
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch_dtype(config.precision))


@torch.no_grad()
def validate(
    model: Prospect, corpus: Corpus, config: Config, ranks: Ranks, stop: StopRequest
) -> tuple[dict[str, float], dict[str, float], str] | None:
    """Validation losses and decision metrics over all ranks, each head's best threshold, and a streamed clip to read
    ("" where none is streamed); None if asked to stop."""
    was_training = model.training
    model.eval()
    batches = list(ordered_batches(corpus.lengths(), config.data.batch_tokens))
    # A rank for which no batch is left runs the first all the same, without counting it: FSDP needs every rank's share
    # of the weights for every forward.
    mine = batches[ranks.rank :: ranks.world]
    shown = mine + batches[:1] * (math.ceil(len(batches) / ranks.world) - len(mine))
    loader = DataLoader(
        ForcedBatches(corpus),
        sampler=shown,
        batch_size=None,  # one of `shown` is a whole batch
        num_workers=config.data.workers,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # its own: the loader draws a number whenever it starts
        pin_memory=ranks.device.type == "cuda",
    )
    parts, stopped = [], False
    for batch in received(loader):
        stopped = any_rank(stop.requested, ranks)
        if stopped:
            break
        parts.append(teacher_forced(model, corpus, batch, config, autocast(config.train, ranks.device)))
    parts = parts[: len(mine)]
    release(model)
    model.train(was_training)
    if stopped:
        return None
    nothing = {name: torch.zeros((), dtype=torch.float64) for name in LOSS_CLASSES}
    sums = sum_named(added([nothing, *(part.sums for part in parts)]), ranks)
    counts = sum_named(added([nothing, *(part.counts for part in parts)]), ranks)
    terms = loss_terms({name: value.float() for name, value in sums.items()}, counts, config.loss)
    numbers = {f"loss_{name}": float(value) for name, value in terms.items()}
    numbers["loss"] = float(total_loss(terms, config.loss.weights()))
    sequences = gather_objects([sequence for part in parts for sequence in part.sequences], ranks)
    clips = traces(corpus, [sequence for part in sequences for sequence in part])  # by head
    numbers |= decision_report(clips)
    thresholds = {head: numbers[f"{head}_even_odds"] for head in clips}
    tuned = tune_on_stream(model, corpus, config, thresholds, ranks, stop)
    if any_rank(stop.requested, ranks):
        return None
    if tuned is None:
        return numbers, thresholds, ""
    thresholds["evidence"] = tuned.evidence
    numbers |= {f"streamed_{name}": value for name, value in tuned.numbers.items()}
    return numbers, thresholds, tuned.example


def clips_to_stream(corpus: Corpus, config: Config) -> tuple[list[tuple[int, int]], list[str]]:
    """The validation clips, as (file, clip), on which evidence is chosen, and why others of the few are left out.

    None where infer.evidence is set. Called before the first step too: with `data.on_bad: stop` a clip that does not
    fit into the context of a stream raises ProspectError; with `skip` it is left out.
    """
    from prospect.tuning import some_of  # here, so that the trainer starts without the streaming engine

    clips, left_out = [], []
    if config.infer.evidence is not None:
        return clips, left_out
    for file, index in some_of(corpus.clips().tolist()):
        clip, embeddings = corpus.load(file, index)
        try:
            check_streamable(clip, embeddings.shape[1], corpus.tokenizer, config)
        except ProspectError as error:
            if config.data.on_bad == "stop":
                raise
            left_out.append(str(error))
            continue
        clips.append((file, index))
    return clips, left_out


def tune_on_stream(
    model: Prospect, corpus: Corpus, config: Config, thresholds: dict[str, float], ranks: Ranks, stop: StopRequest
) -> "Tried | None":
    """How much evidence decisions need, as prospect/tuning.py finds on a few validation clips, and what these scored.

    None where nothing is streamed: with `infer.evidence` set, there is nothing to choose; under FSDP ranks can only run
    forward together; a clip may be one that cannot be streamed with these settings; or the run was asked to stop.
    """
    if config.infer.evidence is not None or (ranks.world > 1 and config.train.parallel == "fsdp"):
        return None
    from prospect.load import load_job  # here, so that the trainer starts without the streaming engine
    from prospect.tuning import best_tried, try_evidence

    clips, left_out = clips_to_stream(corpus, config)
    jobs = [load_job(corpus.sources[f], c, config.model.vision_dim)[0] for f, c in clips[ranks.rank :: ranks.world]]
    tried = []
    was_training = model.training
    model.eval()
    try:
        if not clips:
            raise ProspectError(left_out[0])
        with autocast(config.train, ranks.device):
            gather = functools.partial(gather_objects, ranks=ranks)
            for one in try_evidence(model, corpus.tokenizer, jobs, config, thresholds, gather):
                tried.append(one)
                if any_rank(stop.requested, ranks):
                    return None
    except ProspectError as error:
        if ranks.main:
            tqdm.write(f"infer.evidence is not chosen, for the validation clips cannot be streamed: {error}")
        return None
    finally:
        model.train(was_training)
    return best_tried(tried, config.infer.tuned_for)


def note_validation(state: TrainState, numbers: dict[str, float], thresholds: dict[str, float], best_by: str) -> None:
    """Keep what a validation found, and whether its checkpoint is the best. best_by: `train.best_by`.

    Of those whose value is alike the highest it is the one with the lowest loss, for a few streamed clips cannot tell
    them apart (Breiman et al. 1984, the one-standard-error rule). By loss it is the one with the lowest.
    """
    state.evaluation, state.thresholds, state.evaluated_step = numbers, thresholds, state.step
    by, value = worth(numbers, best_by)
    loss = numbers["loss"]
    anew = state.highest is None or by != state.best_by  # another measure begins anew
    state.highest = value if anew else max(value, state.highest)
    enough = state.highest - ALIKE
    state.since_best += 1
    if anew or (value >= enough and (loss < state.loss_of_best or state.best_value < enough)):
        state.best_by, state.best_value, state.loss_of_best = by, value, loss
        state.best_step, state.since_best = state.step, 0


def out_of_patience(state: TrainState, patience: int | None) -> bool:
    """Whether the run ends early. patience: `train.patience`."""
    return patience is not None and state.since_best >= patience


def worth(numbers: dict[str, float], best_by: str) -> tuple[str, float]:
    """What the best checkpoint is chosen by, in words, and its value at one validation: larger is better.

    Where no clips are streamed (see `tune_on_stream`), the heads' teacher-forced event F1 stands in for `combined`.
    """
    if best_by == "loss":
        return "loss", -numbers["loss"]
    if "streamed_combined_score" in numbers:
        return "combined score of streamed clips", numbers["streamed_combined_score"]
    f1 = [numbers[name] for name in ("speaking_event_f1", "dst_event_f1") if name in numbers]
    return "teacher-forced event F1", sum(f1) / len(f1)
