"""Checkpoints: one directory a step, written aside and renamed, of safetensors and JSON only.

    runs/NAME/step-000400/
        config.json, model.safetensors, ...  the weights as weights.py describes them
        tokenizer.json, tokenizer_config.json
        config.yaml                          the run's configuration, which infer.py uses
        optimizer.safetensors                AdamW's moments, by parameter name
        rng.safetensors                      torch's random states of every rank
        state.json                           everything else the loop needs to resume (TrainState)
        shards/                              with train.sharded_checkpoints, instead of the weights and the moments
    runs/NAME/last, best                     links to the newest and to the best of them

A directory is renamed to its final name only when every file in it is on the disk. So a `step-...`
directory is always complete, even after a crash.

A sharded checkpoint is written by all ranks at once, each its own part, onto a disk that all of them see. Any number of
ranks can resume from it; `python -m prospect.checkpoint DIR` turns it into a full one, which infer.py reads.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from prospect.config import Config, TrainConfig, make_config, to_dict, without_retired
from prospect.data import Corpus
from prospect.distributed import Ranks, gather_objects, local, own_rows, together, whole
from prospect.errors import ProspectError, run_entry_point
from prospect.features import CLIPS, Features, difference, evenly, features_of, warnings
from prospect.files import WRITING, read_json, to_disk, tree_to_disk, write_json, write_text
from prospect.model import Prospect
from prospect.sequence import generator
from prospect.tokenizer import Tokenizer
from prospect.tune import checkpoint_names
from prospect.weights import hf_config, parse_config, save_state, tensors_of

# Fields that an older checkpoint lacks.
NEWER = ("best_by", "best_value", "loss_of_best", "highest", "since_best", "features", "scale", "prompts")
STEP_NAME = re.compile(r"step-(\d{6,})")
SHARDS, WEIGHTS, MOMENTS = "shards", "weights.", "optimizer."  # a folder, and what names in it begin with


@dataclass
class TrainState:
    """Everything the loop needs to resume, beside weights, optimizer moments and random states."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # of the next micro-batch
    position: int = 0  # micro-batches of that epoch already consumed, over all ranks
    scaler: dict[str, float] = field(default_factory=dict)  # fp16's loss scale
    skipped: int = 0  # steps not taken because a gradient was not finite
    evaluated_step: int = 0  # the step after which validation last ran
    evaluation: dict[str, float] = field(default_factory=dict)  # what it found
    thresholds: dict[str, float] = field(default_factory=dict)  # of each head, the best on validation
    best_step: int | None = None
    best_by: str = "loss"  # what the best was chosen by
    best_value: float | None = None  # and its value, larger being better: of a loss, its negative
    loss_of_best: float | None = None  # its validation loss, which decides between values that are alike
    highest: float | None = None  # the largest value there was
    since_best: int = 0  # validations since the best
    world: int = 1  # ranks
    micro_batches: int = 1  # of a step, over all ranks
    data: dict[str, str] = field(default_factory=dict)  # the data files' fingerprint
    features: dict[str, str] = field(default_factory=dict)  # what made the embeddings, see prospect/features.py
    scale: dict[str, float] = field(default_factory=dict)  # and how large they are
    prompts: dict[str, float] = field(default_factory=dict)  # share of the training clips with each part of a prompt
    made_with: dict[str, str] = field(default_factory=dict)  # library versions and git commit


# ---- directories that are whole or absent --------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in run.glob("step-*") if STEP_NAME.fullmatch(path.name) and (path / "state.json").exists()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def step_directory(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def staged(final: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return final.with_name(f".{final.name}{WRITING}")


def replaced(final: Path) -> Path:
    """Where a checkpoint goes while the same step, say with its evaluation, takes its place."""
    return final.with_name(f".{final.name}.replaced")


def begin_checkpoint(final: Path) -> Path:
    """An empty directory aside, to write into."""
    with disk_errors(final):
        shutil.rmtree(staged(final), ignore_errors=True)
        staged(final).mkdir(parents=True)
    return staged(final)


def finish_checkpoint(final: Path) -> None:
    """Put what was written aside on the disk, give it its name, and point `last` to it."""
    with disk_errors(final):
        tree_to_disk(staged(final))
        if final.exists():
            os.rename(final, replaced(final))
        os.rename(staged(final), final)
        to_disk(final.parent)
        replace_symlink(final.parent / "last", final.name)
        shutil.rmtree(replaced(final), ignore_errors=True)


@contextlib.contextmanager
def disk_errors(final: Path) -> Iterator[None]:
    """A full or read-only disk as one ProspectError; what was written aside is removed, earlier checkpoints stay."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException, ProspectError) as error:
        shutil.rmtree(staged(final), ignore_errors=True)
        with contextlib.suppress(OSError):  # the next start tries again
            take_back(final)
        if isinstance(error, CheckpointException):  # of shards: what went wrong first, on whichever rank
            error, _ = next(iter(error.failures.values()))
        reason = getattr(error, "strerror", None) or getattr(error, "what", None) or str(error)
        remedy = "make room and start again: earlier checkpoints are intact"
        what = f"the checkpoint could not be written: {reason}"
        raise ProspectError(what, where=str(final), remedy=remedy) from error


def take_back(final: Path) -> None:
    """Undo a replacement that was not finished: of the two, the earlier one is complete and has no other name."""
    if replaced(final).exists() and not final.exists():
        os.rename(replaced(final), final)


def replace_symlink(link: Path, target: str) -> None:
    """Make `link` lead to `target`, in one step that is never half done."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    beside = link.with_name(f".{link.name}.link")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, link)


def prune(run: Path, keep: int, best_step: int | None) -> None:
    """Keep the `keep` newest checkpoints and the best. Renamed first: one half removed is not taken for one."""
    for path in checkpoints(run)[:-keep]:
        if step_of(path) != best_step:
            os.rename(path, path.with_name(f".{path.name}.removing"))
    for leftover in run.glob(".step-*.removing"):
        shutil.rmtree(leftover, ignore_errors=True)


def clean_up_after_crash(run: Path) -> None:
    """Put a killed run's directory in order; one that is in order stays untouched.

    Takes back a checkpoint that was just being replaced, clears away what is half written or half removed, and points
    `last` and `best` where the newest checkpoint says: the kill may have come between its name and these links.
    """
    for path in run.glob(".step-*.replaced"):
        take_back(run / path.name.removeprefix(".").removesuffix(".replaced"))
    unfinished = (f".*{WRITING}", f"tokenizer/.*{WRITING}", ".*.link", ".step-*.removing", ".step-*.replaced")
    for leftover in [path for pattern in unfinished for path in run.glob(pattern)]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    if found := checkpoints(run):
        best = read_state(found[-1]).best_step
        for name, step in (("last", step_of(found[-1])), ("best", best)):
            if step is not None and step_directory(run, step).exists():
                replace_symlink(run / name, step_directory(run, step).name)


# ---- where to resume -----------------------------------------------------------------------------


def find_resume(wanted: str, run: Path) -> Path | None:
    """The checkpoint to resume from: wanted is `auto`, `never` or a checkpoint directory.

    Raises ProspectError where resuming would silently overwrite checkpoints that the run has.
    """
    found = checkpoints(run)
    if wanted == "auto":
        return found[-1] if found else None
    source = None if wanted == "never" else Path(wanted).resolve()
    begin = -1 if source is None else read_state(source).step
    later = [path.name for path in found if step_of(path) > begin]
    if later:
        what = f"the run has checkpoints already that train.resume={wanted} would overwrite: {', '.join(later)}"
        remedy = "train.resume=auto resumes from the newest; or choose another run.name"
        raise ProspectError(what, where=str(run), remedy=remedy)
    return source


def check_resumable(directory: Path, state: TrainState, config: Config, data: dict[str, str]) -> list[str]:
    """Refuse to resume with other data or another model; returns the other settings that have changed, to be reported.

    Raises ProspectError naming all that differs.
    """
    own = read_config(directory)
    then, now = flatten(to_dict(own)), flatten(to_dict(config))
    changed = {key: f"{key} was {then[key]}, is {now[key]}" for key in now if then[key] != now[key]}
    refused = [text for key, text in changed.items() if must_not_change(key, config)]
    refused += [f"{name} has changed" for name in data if data[name] != state.data.get(name)]
    refused += [f"{name} is gone" for name in state.data if name not in data]
    were, are = ([file.repeat for file in of.data.train_files()] for of in (own, config))
    refused += [f"the repeats of data.train were {were}, are {are}"] if were != are else []
    if refused:
        what = f"cannot resume from this checkpoint: {'; '.join(refused)}"
        remedy = "set it back, or choose another run.name to start afresh"
        raise ProspectError(what, where=str(directory), remedy=remedy)
    return [text for key, text in changed.items() if not key.startswith(("run.", "infer.", "data."))]


def must_not_change(key: str, config: Config) -> bool:
    """Whether a setting decides what the model is or what each step of the data holds."""
    files = ("data.train", "data.val", "data.embeddings", "data.embeddings_outside", "data.sample")
    if key in (*files, "data.allow_leaks", "data.workers"):
        return False  # where files lie does not matter: their fingerprint does
    if key == "model.backbone":  # of a fully trained model nothing is read from there any more
        return config.train.tune != "full"
    shape_of_adapters = ("train.tune", "train.lora_rank", "train.lora_alpha", "train.lora_targets")
    return key.startswith(("model.", "data.")) or key in ("run.seed", *shape_of_adapters)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def fingerprint(corpus: Corpus, name: str) -> dict[str, str]:
    """What a corpus read, as digests by file: each clip file's bytes, and the names and sizes of its embedding files.

    Embeddings are not read, which would take minutes: another file of the same size under the same name passes.
    """
    digests = {}
    for number, (clips, embeddings) in enumerate(corpus.plan.digests):
        digests[f"data.{name} file {number}"] = clips
        digests[f"the embeddings of data.{name} file {number}"] = embeddings
    return digests


def versions() -> dict[str, str]:
    """Library versions, and the git commit of this code where there is one (`+` after it: with changes)."""
    found = {name: version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")}
    found["python"] = platform.python_version()
    git = ["git", "-C", str(Path(__file__).parent)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], stderr=subprocess.DEVNULL, text=True)
        changes = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True)
        found["git"] = commit.strip() + ("+" if changes else "")
    return found


# ---- the files -----------------------------------------------------------------------------------


def write_state(directory: Path, state: TrainState, config: Config) -> None:
    write_json(directory / "state.json", asdict(state))
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    write_text(directory / "config.yaml", text)


def read_state(directory: Path) -> TrainState:
    """Raises ProspectError where the directory is no checkpoint, or its state is not all there."""
    path = directory / "state.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it must be an object")
        if (best_loss := values.pop("best_loss", None)) is not None:  # of older checkpoints
            values["best_value"] = -best_loss
        if values.get("best_by", "loss") == "loss" and (value := values.get("best_value")) is not None:
            values = {"loss_of_best": -value, "highest": value} | values  # likewise
        state = TrainState(**values)
        for name, hint in typing.get_type_hints(TrainState).items():
            if name not in values and name not in NEWER:
                raise TypeError(f"{name} is missing")
            if not _is_a(getattr(state, name), hint):
                raise TypeError(f"{name} is {getattr(state, name)!r:.80}")
        for name, value in state.thresholds.items():
            if not 0 <= value <= 1:  # NaN is not either
                raise ValueError(f"thresholds: {name} is {value}, must be between 0 and 1")
        return state
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "is not a checkpoint (no state.json)"
        raise ProspectError(what, where=str(directory), remedy="name a step-... directory") from error
    except (ValueError, TypeError) as error:
        raise ProspectError(f"cannot be read: {error}", where=str(path), remedy="use another checkpoint") from error


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value read from state.json has its field's type: int, `float | None`, dict[str, float] and the like."""
    if typing.get_origin(hint) is not dict:
        return isinstance(value, hint)
    _, item = typing.get_args(hint)
    return isinstance(value, dict) and all(
        isinstance(v, int | float if item is float else item) for v in value.values()
    )


def read_config(directory: Path) -> Config:
    """The configuration a checkpoint was trained with."""
    path = directory / "config.yaml"
    try:
        return make_config(without_retired(yaml.safe_load(path.read_text(encoding="utf-8"))), str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "is not a checkpoint (no config.yaml)"
        raise ProspectError(what, where=str(directory), remedy="name a step-... directory") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise ProspectError(f"is not YAML: {error}", where=str(path), remedy="use another checkpoint") from error


def write_optimizer(directory: Path, moments: dict[str, Tensor]) -> None:
    """AdamW's state: `NAME.exp_avg`, `NAME.exp_avg_sq` and `NAME.step` of every trained parameter."""
    save_file({name: value.cpu().contiguous() for name, value in moments.items()}, directory / "optimizer.safetensors")


def read_optimizer(directory: Path, moments: dict[str, Tensor]) -> None:
    """Fill `moments` in place, on each rank the rows that it holds. Raises ProspectError for another model's."""
    with reading(path := directory / "optimizer.safetensors"), safe_open(path, framework="pt") as file:
        if set(file.keys()) != moments.keys():
            what = "optimizer.safetensors is of another model"
            raise ProspectError(what, where=str(directory), remedy="use another checkpoint")
        for name, moment in moments.items():
            local(moment).copy_(file.get_slice(name)[own_rows(moment)])


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong in reading a safetensors file, as one ProspectError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = "resume from another checkpoint"
        raise ProspectError(f"cannot be read: {error}", where=str(path), remedy=remedy) from error


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This rank's random states: `cpu`, and on a GPU `cuda`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def write_rng(directory: Path, states: list[dict[str, Tensor]]) -> None:
    """states: `rng_state` of every rank, in rank order."""
    tensors = {f"{rank}.{key}": value for rank, state in enumerate(states) for key, value in state.items()}
    save_file(tensors, directory / "rng.safetensors")


def set_rng_state(directory: Path, rank: int, device: torch.device) -> None:
    with reading(path := directory / "rng.safetensors"):
        states = load_file(path)
    torch.set_rng_state(states[f"{rank}.cpu"])
    if device.type == "cuda" and f"{rank}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{rank}.cuda"], device)


# ---- sharded checkpoints -------------------------------------------------------------------------


def write_shards(final: Path, tensors: dict[str, Tensor]) -> None:
    """Every rank writes its part of all tensors, as one safetensors file that says which part it is."""
    with disk_errors(final):
        writer = HuggingFaceStorageWriter(str(staged(final) / SHARDS), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())


def read_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place, however many ranks wrote the shards and however `tensors` are laid out here."""
    try:
        reader = HuggingFaceStorageReader(str(directory / SHARDS))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, SafetensorError, RuntimeError) as error:
        what = f"the shards cannot be read: {error}"
        raise ProspectError(what, where=str(directory), remedy="resume from another checkpoint") from error


def make_full(directory: Path, out: Path) -> None:
    """Write a sharded checkpoint as a full one, in one process that need not have been part of the run."""
    config = parse_config(values := read_json(directory / "config.json"), str(directory / "config.json"))
    if not (directory / SHARDS).is_dir():
        remedy = "a full one needs no conversion"
        raise ProspectError("is not a sharded checkpoint", where=str(directory), remedy=remedy)
    if out.exists():
        raise ProspectError("exists already", where=str(out), remedy="name a new directory")
    stored = HuggingFaceStorageReader(str(directory / SHARDS)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in stored.items()}
    read_shards(directory, tensors)
    with disk_errors(out):
        shutil.copytree(directory, begin_checkpoint(out), ignore=shutil.ignore_patterns(SHARDS), dirs_exist_ok=True)
        save_state(with_prefix(tensors, WEIGHTS), config, staged(out), eos_token_id=values["eos_token_id"])
        write_optimizer(staged(out), with_prefix(tensors, MOMENTS))
        os.rename(staged(out), out)


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ---- saving and restoring a run ------------------------------------------------------------------


def adam_moments(model: Prospect, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step` of every trained parameter."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {f"{name}.{key}": value for name, p in trained.items() for key, value in optimizer.state[p].items()}


def trained_weights(model: Prospect, config: TrainConfig) -> dict[str, Tensor]:
    """What a checkpoint holds of the model: all, or what `tune` trains beside a backbone that stays where it is."""
    names = checkpoint_names(model, config)
    return {name: tensor for name, tensor in tensors_of(model).items() if names is None or name in names}


def named_shards(weights: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both in one dict, for a sharded checkpoint."""
    named = {WEIGHTS + name: tensor for name, tensor in weights.items()}
    return named | {MOMENTS + name: tensor for name, tensor in moments.items()}


def gathered(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors in full and on the host, on rank 0; one by one, so that a GPU never holds two whole."""
    full = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        if ranks.main:
            full[name] = tensor.cpu()
    return full


def save(
    run: Path,
    model: Prospect,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    state: TrainState,
    config: Config,
    ranks: Ranks,
) -> None:
    """Everything the loop needs to resume, as one checkpoint directory. Ranks give what they hold, rank 0 writes it."""
    final = step_directory(run, state.step)
    weights, moments = trained_weights(model, config.train), adam_moments(model, optimizer)
    random_states = gather_objects(rng_state(ranks.device), ranks)
    with together(ranks):
        if ranks.main:
            begin_checkpoint(final)
    if config.train.sharded_checkpoints:
        with together(ranks):
            write_shards(final, named_shards(weights, moments))
    else:
        weights, moments = gathered(weights, ranks), gathered(moments, ranks)
    with together(ranks):
        if ranks.main:
            with disk_errors(final):
                directory = staged(final)
                if config.train.sharded_checkpoints:
                    write_json(directory / "config.json", hf_config(model.config, tokenizer.end_id))
                else:
                    save_state(weights, model.config, directory, eos_token_id=tokenizer.end_id)
                    write_optimizer(directory, moments)
                tokenizer.save(directory)
                write_rng(directory, random_states)
                write_state(directory, state, config)
            finish_checkpoint(final)
            with disk_errors(final):
                if state.best_step == state.step:
                    replace_symlink(run / "best", final.name)
                prune(run, config.train.keep, state.best_step)


def resume_point(
    run: Path, train: Corpus, val: Corpus, config: Config, ranks: Ranks, micro_batches: int
) -> tuple[Path | None, TrainState]:
    """The checkpoint to resume from (None: start afresh) and its state, checked against the data and the settings.

    A worker that torchrun has restarted always resumes, whatever train.resume says. micro_batches: of a step, over all
    ranks. Raises ProspectError where resuming is refused.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    with together(ranks):
        if ranks.main:
            clean_up_after_crash(run)
    with together(ranks):
        source = find_resume("auto" if restarted else config.train.resume, run)
        state = read_state(source) if source else TrainState()
    with together(ranks):
        if ranks.main:
            data = fingerprint(train, "train") | fingerprint(val, "val")
            if source:
                changed = check_resumable(source, state, config, data)
                print("\n".join(resumed_lines(source, state, changed, ranks, micro_batches)), flush=True)
            state.data, state.prompts = data, train.prompts
            note_features(state, train, val, source)
    return source, state


def note_features(state: TrainState, train: Corpus, val: Corpus, source: Path | None) -> None:
    """Put the training embeddings' features into the state, and warn where they are others than before, or than val's.

    source: the checkpoint that the state is from.
    """
    chosen = ((of, of.clips()[evenly(len(of.clips()), CLIPS)].tolist()) for of in (train, val))
    found, of_val = (features_of([(of.sources[f], c) for f, c in clips]) for of, clips in chosen)
    lines = warnings(found, Features(state.features, state.scale), source) if source else []
    if what := difference(of_val, found):
        lines.append(f"the embeddings of data.val are not like those of data.train: {what}")
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    state.features, state.scale = found.made, found.scale


@torch.no_grad()
def restore(
    source: Path, model: Prospect, optimizer: torch.optim.Optimizer, state: TrainState, config: Config, ranks: Ranks
) -> None:
    """Fill the optimizer, and from a sharded checkpoint the model, and set this rank's random state."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        zeros = torch.zeros_like(parameter)
        step = torch.zeros((), device=parameter.device)
        optimizer.state[parameter] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    moments = adam_moments(model, optimizer)
    if (source / SHARDS).is_dir():
        read_shards(source, named_shards(trained_weights(model, config.train), moments))
    else:
        read_optimizer(source, moments)
    if state.world == ranks.world:
        set_rng_state(source, ranks.rank, ranks.device)
    else:
        torch.manual_seed(int(generator(config.run.seed, "resumed", state.step, ranks.rank).integers(2**62)))


def resumed_lines(source: Path, state: TrainState, changed: list[str], ranks: Ranks, per_step: int) -> list[str]:
    """What a resumed run says about itself."""
    lines = [f"resuming from {source}, step {state.step}"]
    if changed:
        lines.append(f"changed since then: {', '.join(changed)}")
    if state.world != ranks.world:
        now = f"{state.world} rank(s) then, {ranks.world} now"
        lines.append(f"{now}: the data resumes at the same place; dropout is drawn anew")
    if state.micro_batches != per_step:
        now = f"a step was {state.micro_batches} micro-batches and is now {per_step}"
        lines.append(f"{now} (see train.gradient_accumulation_steps)")
    return lines


def main() -> int:
    what = "Turn a sharded checkpoint into a full one."
    parser = argparse.ArgumentParser(prog="python -m prospect.checkpoint", description=what)
    parser.add_argument("checkpoint", type=Path, help="a step-... directory with shards/")
    parser.add_argument("out", type=Path, help="the directory to write")
    arguments = parser.parse_args()
    make_full(arguments.checkpoint, arguments.out)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
