"""What streaming starts from: a checkpoint ready to run, and a clip ready to be streamed."""

import functools
from pathlib import Path

import torch

from prospect.checkpoint import read_config, read_state
from prospect.clip_files import Source, load_embeddings
from prospect.config import Config, apply_overrides, make_config, to_dict, torch_dtype
from prospect.decisions import SETTINGS
from prospect.distributed import pick_device
from prospect.embeddings import check_finite
from prospect.errors import ProspectError
from prospect.model import Prospect
from prospect.stream import Job
from prospect.tokenizer import Tokenizer

# Of a trained checkpoint these settings may be changed; the others made it what it is, and would change nothing.
APPLY = (
    "data.embeddings", "data.embeddings_outside", "data.on_bad", "data.workers", "data.batch_tokens",
    "data.template", "data.dst", "data.dst_format", "data.recipe", "data.max_seq_len", "data.overlap",
)  # fmt: skip


def load_for_inference(directory: str | Path, overrides: list[str] = ()) -> tuple[Config, Tokenizer, Prospect]:
    """A checkpoint ready to stream: its configuration with overrides, its tokenizer, its model in eval mode.

    Raises ProspectError for an override that does not apply to a checkpoint.

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
    found = read_state(directory).thresholds if config.infer.decision == own.infer.decision else {}
    for name, setting in SETTINGS.items():
        if getattr(config.infer, setting) is None:
            setattr(config.infer, setting, found.get(name, 0.5))
    tokenizer = Tokenizer(directory, config.data.template)
    dtype = torch_dtype(config.infer.precision)
    model = Prospect.from_pretrained(directory, dtype=dtype).to(pick_device(config.infer.device), dtype).eval()
    store_wide_weights_by_column(model)
    return config, tokenizer, model


def store_wide_weights_by_column(model: Prospect) -> None:
    """On a CPU in fp32, store weights [out,in] with out > in column after column: the same numbers, other strides.

    A silent frame multiplies every weight by a single row and so takes as long as reading them. A product with one row
    reads few long columns faster than many short rows, 1.7 times at 1408 x 512. A tied LM head stays: its rows are
    looked up.
    """
    looked_up = model.model.embed_tokens.weight
    for layer in model.modules():
        if not isinstance(layer, torch.nn.Linear) or layer.weight is looked_up:
            continue
        weight = layer.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and layer.out_features > layer.in_features:
            weight.data = weight.data.t().contiguous().t()


def load_job(source: Source, index: int, vision_dim: int) -> tuple[Job, str | None]:
    """A clip ready to be streamed, its embeddings checked, and a warning where the two differ by the last frame."""
    clip, embeddings, warning = source.load(index, vision_dim)
    check_finite(embeddings, clip.where)
    read = functools.partial(load_embeddings, clip, source.folder, vision_dim, allow_outside=source.allow_outside)
    return Job(clip, read), warning
