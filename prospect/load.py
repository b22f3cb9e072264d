"""What streaming starts from: a checkpoint ready to run, and a clip ready to be streamed."""

import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from prospect.checkpoint import read_config, read_state
from prospect.clip_files import Source, load_embeddings
from prospect.clips import Clip
from prospect.config import Config, apply_overrides, make_config, to_dict, torch_dtype
from prospect.decisions import SETTINGS
from prospect.distributed import check_precision, pick_device
from prospect.embeddings import check_finite
from prospect.errors import ProspectError
from prospect.features import Features, warnings
from prospect.model import Prospect
from prospect.prepared import prepare
from prospect.sequence import prompt_parts
from prospect.stream import Job
from prospect.tokenizer import Tokenizer
from prospect.tune import merge_lora

# Of a trained checkpoint these settings may be changed; the others made it what it is, and would change nothing.
APPLY = (
    "data.embeddings", "data.embeddings_outside", "data.on_bad", "data.workers", "data.batch_tokens",
    "data.template", "data.dst", "data.dst_format", "data.recipe", "data.max_seq_len", "data.overlap",
)  # fmt: skip


def load_for_inference(directory: str | Path, overrides: list[str] = ()) -> tuple[Config, Tokenizer, Prospect]:
    """A checkpoint ready to stream: its configuration with overrides, its tokenizer, its model in eval mode.

    Adapters are added to their weights, so that a frame costs what it costs without them. Raises ProspectError for an
    override that does not apply to a checkpoint, and where the GPU cannot compute in the precision asked for.

    Decisions that the configuration leaves open (thresholds, evidence) are those found best on validation, stored in
    the checkpoint. They were found for the checkpoint's own infer.decision; for another they are one half.
    """
    directory = Path(directory)
    own = read_config(directory)
    config = make_config(apply_overrides(to_dict(own), overrides), str(directory / "config.yaml"))
    keys = [override.partition("=")[0] for override in overrides]
    if fixed := [key for key in keys if key not in APPLY and not key.startswith("infer.")]:
        what = f"{', '.join(fixed)} cannot be changed any more"
        remedy = f"what applies to a checkpoint: infer.*, {', '.join(APPLY)}"
        raise ProspectError(what, where=str(directory), remedy=remedy)
    found = stored_decisions(directory, config) if config.infer.decision == own.infer.decision else {}
    for name, setting in SETTINGS.items():
        if getattr(config.infer, setting) is None:
            setattr(config.infer, setting, found.get(name, 0.5))
    tokenizer = Tokenizer(directory, config.data.template)
    config.infer.precision = config.infer.precision or config.train.precision
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = pick_device(config.infer.device, local_rank, local_world)
    check_precision(config.infer.precision, device)
    dtype = torch_dtype(config.infer.precision)
    model = Prospect.from_pretrained(directory, dtype=dtype).to(device, dtype)
    merge_lora(model)
    prepare(model.eval())
    return config, tokenizer, model


def stored_decisions(directory: Path, config: Config) -> dict[str, float]:
    """What validation found, by the names of SETTINGS; of a checkpoint from before the first, nothing, which is said.

    Raises ProspectError where a validation has run and a threshold that the configuration leaves open is not there.
    """
    state = read_state(directory)
    heads = ("speaking", "dst") if config.data.dst else ("speaking",)
    settings = [SETTINGS[head] for head in heads if head not in state.thresholds]
    absent = " and ".join(f"infer.{setting}" for setting in settings if getattr(config.infer, setting) is None)
    if absent and state.evaluated_step:
        where, remedy = str(directory / "state.json"), f"use another checkpoint, or set {absent}"
        raise ProspectError(f"lacks what its validation found for {absent}", where=where, remedy=remedy)
    if absent:
        print(f"{directory}: no validation before this checkpoint: {absent} is one half", file=sys.stderr)
    return state.thresholds


def trained_on(directory: str | Path) -> Features:
    """The features that a checkpoint was trained on."""
    state = read_state(Path(directory))
    return Features(state.features, state.scale)


def unlike_training(
    directory: str | Path, clips: Iterable[Clip], config: Config, features: Features | None = None
) -> list[str]:
    """How a stream of the clips, and their features where given, would differ from training: a line each, or none."""
    found = [*prompts_unlike_training(directory, clips, config), *untaught_strategy(config)]
    return found if features is None else [*warnings(features, trained_on(directory), directory), *found]


def prompts_unlike_training(directory: str | Path, clips: Iterable[Clip], config: Config) -> list[str]:
    """One line, or none: which parts the clips' prompts have that no training clip had, or lack that every one had.

    Nothing is said about a checkpoint that does not know what it was trained on, since it is older.
    """
    found, shapes = [], [(clip.id, prompt_parts(clip, config.data)) for clip in clips]
    for part, share in read_state(Path(directory)).prompts.items():
        odd = [id for id, parts in shapes if share in (0, 1) and parts.get(part) is (share == 0)]
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            lacks, had = ("no", "every") if share else ("a", "no")
            found.append(f"{lacks} {part} in {odd[0]}{more} ({had} training clip had one)")
    return [f"prompts are not as in training: {'; '.join(found)}"] if found else []


def untaught_strategy(config: Config) -> list[str]:
    """One line, or none: whether a full context starts again in a shape that training never showed."""
    strategy, summaries, dst = config.infer.strategy, config.data.summaries, config.data.dst
    taught = {
        "none": True,
        "slide": summaries < 1,
        "drop_all": not dst,  # the prompt tells the state with which the stream began
        "summarize_and_drop": summaries > 0 and not dst,  # likewise
        "summarize_with_dst": summaries > 0,
    }.get(strategy, False)
    how = f"data.summaries={summaries:g}, data.dst={str(dst).lower()}"
    line = f"infer.strategy={strategy}: training showed no context that starts again as a full one will ({how})"
    return [] if taught else [line]


def load_job(source: Source, index: int, vision_dim: int) -> tuple[Job, str | None]:
    """A clip ready to be streamed, its embeddings checked, and a warning where the two differ by the last frame."""
    clip, embeddings, warning = source.load(index, vision_dim)
    check_finite(embeddings, clip.where)
    read = functools.partial(load_embeddings, clip, source.folder, vision_dim, allow_outside=source.allow_outside)
    return Job(clip, read), warning
