"""The configuration: dataclasses whose fields carry meaning and unit, from YAML and `section.key=value` overrides.

Unknown keys and values of the wrong type are errors; all of them are reported together. config.yaml at the root holds
every field with the same comment as here.
"""

import dataclasses
import difflib
import types
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from prospect.errors import ProspectError
from prospect.names import clip_file_names

IGNORE = -100  # the label of a position where nothing is learned


@dataclass
class RunConfig:
    name: str = "sample"  # checkpoints and logs go to {out}/{name}
    out: str = "runs"
    seed: int = 0  # of weights, data order and negative sampling
    tensorboard: bool = False  # metrics.jsonl for TensorBoard too (requirements-tensorboard.txt)


@dataclass
class ModelSection:
    """A backbone directory, or the shape of a small model trained from scratch."""

    backbone: str | None = None  # a Hugging Face directory (Llama, Qwen, SmolLM2, SmolVLM2); null: train from scratch
    vision_dim: int = 2048  # width of a frame embedding: 2048 SmolVLM2, 1152 SigLIP, 1024 CLIP
    speaking_head: bool = True  # false: the LM decides when to speak (infer.decision=lm, data.silence_lm=true)
    dst_state_head: bool = True  # a third head, with data.dst: the state of the most recently started step
    # used only from scratch; a backbone brings its own
    vocab_size: int = 1024  # tokens of the byte-level BPE trained on the training clips
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True  # the LM head shares the token embeddings' weights


@dataclass
class Repeated:
    """A file of training clips, and how often an epoch shows each: every time with other negatives and text places."""

    path: str
    repeat: int


@dataclass
class HybridConfig:
    """The frames kept by `data.frames: hybrid`, besides the key frames: those of task-state updates, and the first and
    last of each step that has times."""

    speaking_window: float = 1.0  # seconds kept before and after each assistant turn
    key_frame_interval: int = 25  # every n-th frame of a step that has times
    regular_interval: int = 50  # every n-th frame of the clip
    random_share: float = 0.2  # of the remaining frames
    max_frames_per_clip: int = 200


@dataclass
class DataConfig:
    # clip files (JSON list, clip or JSONL), folders of them, or patterns (data/*.json), as docs/data.md says;
    # {path: FILE, repeat: 6} shows an epoch each of its clips six times
    train: list[str | Repeated] = field(default_factory=lambda: ["data/sample/train.json"])
    val: list[str] = field(default_factory=lambda: ["data/sample/val.json"])
    embeddings: str | None = None  # folder of embedding files; null: embeddings/ beside each clip file
    embeddings_outside: bool = False  # allow a clip's own `embeddings` path to leave that folder
    # make the sample corpus, at this difficulty, when data.train is absent: easy, long, hard or null
    sample: Literal["easy", "long", "hard"] | None = None
    on_bad: Literal["stop", "skip"] = "stop"  # at a bad clip: stop, or skip it and report it
    allow_leaks: bool = False  # train although validation clips, or their videos, are among the training clips
    workers: int = 0  # processes that prepare batches beside the training loop
    # the sequence
    layout: Literal["stream", "turns"] = "stream"  # stream: every frame once; turns: each turn's frames, then its text
    # in training: all; turns: only frames of turns; hybrid: sampled as below. Validation and streaming see all frames
    frames: Literal["all", "turns", "hybrid"] = "all"
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    template: Literal["plain", "chatml", "llama3", "smolvlm"] = "plain"  # plain, chatml, llama3 or smolvlm
    dst: bool = True  # false: no steps in the prompt, no updates, no second head (ProAssist's architecture)
    dst_format: Literal["arrow", "json"] = "arrow"  # arrow (S5->complete) or json
    recipe: bool = False  # put the clip's inferred_knowledge into the prompt
    max_seq_len: int = 1024  # tokens of a sequence, in training and when streaming
    long_clips: Literal["split", "truncate"] = "split"  # split a longer clip into windows, or truncate it by priority
    overlap: float = 0.25  # share of a window repeated, unlearned, at the start of the next
    # share of the long clips whose windows end with a summary, which is learned, and begin with the one before, in
    # place of the overlap: what summarize_and_drop and summarize_with_dst need (ProAssist's memory)
    summaries: float = 0.0
    # the labels
    binary_at: Literal["frames", "text"] = "frames"  # decide at <image> tokens, or (text) on every token of a turn
    # where a reply or an update stands, and its head learns 1: drawn from the middle of the turn's range on;
    # last, behind its last frame alone; range, the same but 1 from its start on (to compare: not what is streamed)
    text_at: Literal["drawn", "last", "range"] = "drawn"
    neg_frame_sampling_rate: float = 0.5  # share of a clip's silent frames learned from, in training
    val_neg_frame_sampling_rate: float = 1.0  # and in validation
    silence_lm: bool = False  # sampled negatives also teach the LM head the end token (ProAssist's decisions)
    # the batches
    # tokens of a micro-batch, padding included; 2 * max_seq_len is two sequences of full length, or more shorter ones
    batch_tokens: int = 4096

    def train_files(self) -> list[Repeated]:
        return [Repeated(file, 1) if isinstance(file, str) else file for file in self.train]


@dataclass
class LossConfig:
    speaking_gen_weight: float = 1.0  # what to say
    speaking_binary_weight: float = 1.0  # speak now?
    dst_gen_weight: float = 1.0  # which step changes
    dst_binary_weight: float = 1.0  # update now?
    dst_state_weight: float = 1.0  # only with model.dst_state_head
    bce: Literal["mean", "balanced", "focal"] = "mean"  # of the binary losses: mean, balanced or focal
    focal_alpha: float = 0.25  # weight of the positives in the focal loss; of the negatives, 1 - focal_alpha
    focal_gamma: float = 2.0  # a label counts (1 - p)^gamma in it, p being what the head gives it
    dst_state_focal: bool = False  # focal loss for the state head too, without alpha: its weight is dst_state_weight

    def weights(self) -> dict[str, float]:
        """By the names of the loss terms: speaking_gen, speaking_binary, dst_gen, dst_binary, dst_state."""
        return {key.removesuffix("_weight"): value for key, value in vars(self).items() if key.endswith("_weight")}


@dataclass
class TrainConfig:
    max_steps: int | None = None  # optimizer steps; null: as many as num_epochs need
    num_epochs: int = 10  # used when max_steps is null
    learning_rate: float = 3e-3  # its peak
    projector_learning_rate: float | None = None  # peak for the projector; null: learning_rate
    heads_learning_rate: float | None = None  # peak for the decision heads; null: learning_rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # cosine, linear or constant
    warmup_steps: int = 20
    min_lr_ratio: float = 0.05  # the schedule ends at this share of the peak
    weight_decay: float = 0.01  # on matrices, never on norms and biases
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    gradient_accumulation_steps: int = 1  # micro-batches of an optimizer step, on each rank
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # fp32, bf16, or fp16 (for cards without bf16)
    tune: Literal["full", "heads", "lora"] = "full"  # full, heads or lora; the last two freeze a backbone
    # used only with tune: lora
    lora_rank: int = 16
    lora_alpha: float = 32.0  # an adapter's output is multiplied by alpha / rank
    lora_dropout: float = 0.0  # of an adapter's input, in training
    lora_targets: list[str] = field(  # layers that get an adapter
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    # the machine
    activation_checkpointing: bool = False  # recompute blocks in backward: less memory, a third more time
    compile: bool = False  # torch.compile the blocks
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun each rank holds the whole model, or (fsdp) a share of it
    nonfinite: Literal["stop", "skip"] = "stop"  # at a loss or gradient that is not finite: stop, or skip that step
    device: str = "auto"  # auto: cuda when there is one, else cpu
    log_every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int = 200  # steps; and after the last
    save_every: int = 200  # steps; and after the last
    keep: int = 2  # newest checkpoints kept, besides the best
    # what the best is chosen by: combined, the combined score of streamed validation clips (where none are streamed,
    # the mean of the heads' teacher-forced event F1), and within 0.03 the lower loss; or loss, the total on validation
    best_by: Literal["combined", "loss"] = "combined"
    patience: int | None = None  # validations in a row without a better best after which the run ends; null: none do
    # every rank writes its share; `python -m prospect.checkpoint DIR OUT` makes a full checkpoint of it
    sharded_checkpoints: bool = False
    resume: str = "auto"  # auto: resume from the run's newest checkpoint; never; or a checkpoint directory


@dataclass
class InferConfig:
    # when the context is full: slide (just what training shows), none (an error), drop_all, drop_middle,
    # summarize_and_drop or summarize_with_dst
    strategy: Literal["none", "drop_all", "drop_middle", "summarize_and_drop", "summarize_with_dst", "slide"] = "slide"
    decision: Literal["heads", "lm"] = "heads"  # heads, or lm: speak when P(end token) falls below 1 - threshold
    speaking_threshold: float | None = None  # even odds; null: found on validation, stored in the checkpoint
    dst_threshold: float | None = None  # null: likewise
    # a head fires when its score, the running mean of its centred probability, reaches this; null: the best on streamed
    # validation clips, stored in the checkpoint
    evidence: float | None = None
    smoothing: float = 0.5  # weight of the new frame in that mean; 1: every frame is decided by itself
    coupling: float = 2.0  # logits: when one head fires, so does the other if it is this close to firing; 0: never
    # what evidence is chosen for, on streamed validation clips: events (their F1), replies (right ones, F1), state
    # (joint goal accuracy), or the mean of those that the model has
    tuned_for: Literal["mean", "events", "replies", "state"] = "mean"
    reserved: int = 128  # tokens of the context kept free for what is written at one frame
    max_reply_tokens: int = 64
    max_summary_tokens: int = 256  # with the strategies that summarize
    max_update_tokens: int = 40
    constrain_dst: bool = False  # allow only tokens that continue an update legal in the current state
    lookahead: int = 32  # frames run at once while the model is silent; 1: one by one
    # of weights, cache and arithmetic; null: as trained (train.precision), so that what trains on a card streams on it
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    device: str = "auto"  # auto: cuda when there is one, else cpu


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)  # total = sum of weight * loss
    train: TrainConfig = field(default_factory=TrainConfig)
    infer: InferConfig = field(default_factory=InferConfig)


RETIRED = {  # settings that only older checkpoints have
    "data": ("positive_frames",),
    "train": ("backbone_learning_rate", "adapter_learning_rate", "max_skips"),
}

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # our names of precisions, and torch's


# The bounds of every number, by field: (lowest, highest), both allowed. Neither infinity nor NaN lies between two.
_BOUNDS = {
    "run.seed": (0, 10**18), "model.intermediate_size": (1, 10**7), "model.rope_theta": (1, 10**12),
    "data.hybrid.speaking_window": (0, 10**6),
    "loss.speaking_gen_weight": (0, 10**6), "loss.speaking_binary_weight": (0, 10**6),
    "loss.dst_gen_weight": (0, 10**6), "loss.dst_binary_weight": (0, 10**6), "loss.dst_state_weight": (0, 10**6),
    "train.weight_decay": (0, 100), "train.beta1": (0, 0.999999), "train.beta2": (0, 0.999999),
    "model.vision_dim": (1, 10**6), "model.vocab_size": (259, 10**7), "model.hidden_size": (1, 10**6),
    "model.num_hidden_layers": (1, 10**4), "model.num_attention_heads": (1, 10**4),
    "model.num_key_value_heads": (1, 10**4),
    "data.workers": (0, 1024), "data.max_seq_len": (16, 10**7), "data.overlap": (0, 0.9), "data.summaries": (0, 1),
    "data.neg_frame_sampling_rate": (0, 1), "data.val_neg_frame_sampling_rate": (0, 1),
    "data.batch_tokens": (16, 10**8), "data.hybrid.random_share": (0, 1),
    "data.hybrid.key_frame_interval": (1, 10**6), "data.hybrid.regular_interval": (1, 10**6),
    "data.hybrid.max_frames_per_clip": (1, 10**7),
    "loss.focal_alpha": (0, 1), "loss.focal_gamma": (0, 100),
    "train.max_steps": (1, 10**9), "train.num_epochs": (1, 10**6), "train.learning_rate": (0, 10),
    "train.min_lr_ratio": (0, 1), "train.warmup_steps": (0, 10**9),
    "train.gradient_accumulation_steps": (1, 10**6), "train.log_every": (1, 10**9), "train.eval_every": (1, 10**9),
    "train.save_every": (1, 10**9), "train.keep": (1, 10**6), "train.grad_clip": (0, 10**9),
    "train.patience": (1, 10**6),
    "train.lora_rank": (1, 10**5), "train.lora_alpha": (0, 10**6), "train.lora_dropout": (0, 0.99),
    "train.projector_learning_rate": (0, 10), "train.heads_learning_rate": (0, 10),
    "infer.speaking_threshold": (0, 1), "infer.dst_threshold": (0, 1), "infer.evidence": (0, 1),
    "infer.smoothing": (0.01, 1),
    "infer.coupling": (0, 100), "infer.reserved": (1, 10**7),
    "infer.max_reply_tokens": (1, 10**6), "infer.max_summary_tokens": (1, 10**6),
    "infer.max_update_tokens": (1, 10**6), "infer.lookahead": (1, 10**6),
}  # fmt: skip


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """The configuration in a YAML file, with overrides like `train.learning_rate=3e-4` on top.

    Folders and patterns in data.train and data.val become the files that they stand for (prospect/names.py).
    Raises ProspectError naming every unknown key and every value of a wrong type or out of bounds.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProspectError("no such config file", where=str(path), remedy="python train.py config.yaml") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ProspectError(f"cannot be read: {error}", where=str(path)) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ProspectError(f"is not YAML: {error}", where=str(path), remedy="mind indentation and colons") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ProspectError("must hold sections (run, model, data, ...)", where=str(path))
    config = make_config(apply_overrides(values, overrides), str(path))
    config.data.train = [of for entry in config.data.train for of in _with_names(entry)]
    config.data.val = clip_file_names(config.data.val)
    count = Counter(file.path for file in config.data.train_files())
    if twice := [name for name in count if count[name] > 1]:
        what = f"data.train names {', '.join(twice)} twice"
        raise ProspectError(what, where=str(path), remedy=f"{{path: {twice[0]}, repeat: 2}} repeats it")
    return config


def _with_names(entry: str | Repeated) -> list[str | Repeated]:
    """An entry of data.train for each file that it stands for."""
    if isinstance(entry, str):
        return clip_file_names([entry])
    return [Repeated(name, entry.repeat) for name in clip_file_names([entry.path])]


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or "." not in key:
            raise ProspectError(f"cannot read {override!r}", where="command line", remedy="write section.key=value")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ProspectError(f"cannot read the value of {override!r}", where="command line") from error
        section, *middle, last = key.split(".")
        node = values
        for name in (section, *middle):
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ProspectError(f"{key} is not a section's key", where="command line")
        node[last] = value
    return values


def make_config(values: dict[str, Any], where: str) -> Config:
    problems: list[str] = []
    config = _fill(Config, values, "", problems)
    if not problems:
        problems += _cross_checks(config)
    if problems:
        raise ProspectError("; ".join(problems), where=where, remedy="config.yaml comments every key")
    return config


def _fill(kind: type, values: Any, prefix: str, problems: list[str]) -> Any:
    """A dataclass of `kind` from a dict, nested dataclasses too; what does not fit is appended to `problems`."""
    if not isinstance(values, dict):
        problems.append(f"{prefix.rstrip('.')} must be a section of keys")
        return kind()
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            problems.append(f"unknown key {prefix}{key}" + (f" (did you mean {prefix}{close[0]}?)" if close else ""))
    filled = {}
    for key, hint in hints.items():
        if key not in values:
            continue
        if dataclasses.is_dataclass(hint):
            filled[key] = _fill(hint, values[key], f"{prefix}{key}.", problems)
            continue
        try:
            filled[key] = _coerce(values[key], hint)
        except ValueError as error:
            problems.append(f"{prefix}{key} {error}")
            continue
        low, high = _BOUNDS.get(prefix + key, (None, None))
        if low is not None and filled[key] is not None and not low <= filled[key] <= high:
            problems.append(f"{prefix}{key} must lie between {low} and {high}, not {filled[key]}")
    return kind(**filled)


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as its field's type, strictly: "False" is no bool, 1.5 no int. Raises ValueError (what it must be)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _coerce(value, next(option for option in options if option is not type(None)))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(map(str, choices))}, not {value!r}")
        return value
    if hint == list[str]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
            raise ValueError(f"must be text or a list of texts, not {value!r}")
        return items
    if hint == list[str | Repeated]:
        items = value if isinstance(value, list) and value else [value]
        return [item if isinstance(item, str) else _repeated(item) for item in items]
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # run.name=3
    raise ValueError(f"must be {hint.__name__}, not {value!r}")


def _repeated(value: Any) -> Repeated:
    match value:
        case {"path": str(path), "repeat": int(repeat)} if len(value) == 2 and repeat >= 1 and repeat is not True:
            return Repeated(path, repeat)
    raise ValueError(f"must be clip files, each FILE or {{path: FILE, repeat: N}} with N >= 1, not {value!r}")


def _cross_checks(config: Config) -> list[str]:
    problems = []
    m, d = config.model, config.data
    if d.max_seq_len > d.batch_tokens:
        what = f"cannot hold one sequence of data.max_seq_len {d.max_seq_len}"
        problems.append(f"data.batch_tokens {d.batch_tokens} {what}")
    if config.infer.reserved >= d.max_seq_len:
        problems.append(f"infer.reserved {config.infer.reserved} leaves nothing of data.max_seq_len {d.max_seq_len}")
    if m.backbone is None and m.hidden_size % m.num_attention_heads:
        what = f"is not a multiple of model.num_attention_heads {m.num_attention_heads}"
        problems.append(f"model.hidden_size {m.hidden_size} {what}")
    elif m.backbone is None and (m.hidden_size // m.num_attention_heads) % 2:
        problems.append("model.hidden_size / model.num_attention_heads must be even (RoPE turns pairs)")
    if m.backbone is None and m.num_attention_heads % m.num_key_value_heads:
        problems.append("model.num_attention_heads is not a multiple of model.num_key_value_heads")
    if m.backbone is None and config.train.tune != "full":
        what = "needs a pretrained model.backbone; from scratch everything is trained"
        problems.append(f"train.tune={config.train.tune} {what}")
    if not m.speaking_head:
        needed = {"infer.decision=lm": config.infer.decision == "lm", "data.silence_lm=true": d.silence_lm}
        needed["train.tune=lora or full"] = config.train.tune != "heads"  # else the LM never learns to be silent
        missing = [setting for setting, given in needed.items() if not given]
        problems += [f"model.speaking_head=false leaves the decision to the LM: it needs {need}" for need in missing]
    if config.train.sharded_checkpoints and config.train.tune != "full":
        problems.append("train.sharded_checkpoints is for train.tune=full: what the others save is small")
    if d.frames != "all" and d.layout == "turns":
        problems.append("data.frames belongs to data.layout=stream; the turns layout has its own frames")
    return problems


def without_retired(values: Any) -> Any:
    """The values of an older checkpoint's config.yaml, without settings that no longer exist."""
    for section, keys in RETIRED.items():
        found = values.get(section) if isinstance(values, dict) else None
        for key in keys if isinstance(found, dict) else ():
            found.pop(key, None)
    return values


def torch_dtype(precision: str) -> "torch.dtype":  # noqa: F821
    """fp32, bf16 or fp16 as torch's type."""
    import torch  # here, because checking clips needs this file, but neither torch nor its memory

    return getattr(torch, DTYPES[precision])


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)
