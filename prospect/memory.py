"""How much memory a run will take: of a GPU, even on a backbone that is not downloaded yet; and of this machine."""

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from prospect.config import Config, torch_dtype
from prospect.errors import ProspectError
from prospect.model import ModelConfig, Prospect
from prospect.tune import count_parameters, count_parts, meta_model, set_trainable, storage_dtype
from prospect.weights import parse_config, read_config

# Sizes of the models that configs/ is made for, as their config.json has them: enough to estimate a run's memory.
PUBLISHED = {
    "SmolLM2-1.7B": {
        "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": True},
    "SmolVLM2-2.2B": {  # its text model
        "vocab_size": 49280, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False},
    "Llama-3.2-1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "Llama-3.2-3B": {
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "Llama-3.1-8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    "Qwen2.5-3B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2.5-7B": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "Qwen3-4B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "Qwen3-8B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
}  # fmt: skip


def published_config(backbone: str) -> ModelConfig:
    """The shape of a backbone not yet downloaded, by its directory name. Raises ProspectError for an unknown name."""
    name = Path(backbone).name.removeprefix("Meta-")
    known = [key for key in PUBLISHED if name.startswith(key)]
    if not known:
        what = f"no such directory, and no published shape of that name ({', '.join(PUBLISHED)})"
        raise ProspectError(what, where=backbone, remedy="download the model there, or correct model.backbone")
    return parse_config({"model_type": "llama"} | PUBLISHED[known[0]], backbone)


# What a block keeps of one token until its backward pass, in bytes: (for each of H, for each of intermediate_size).
# In 16 bits a frozen layer does not keep its input, and its residual stream is 16 bits wide too. Dropout makes every
# adapter keep a copy of its input and a mask.
BLOCK_BYTES = {"full": (30, 8), "lora": (16, 8), "lora with dropout": (37, 10), "heads": (12, 6)}
BLOCK_BYTES_FP32 = (32, 16)


@dataclass(frozen=True)
class Memory:
    """What a run keeps in the memory of each GPU, in bytes; logits and workspace come on top."""

    frozen: float  # weights
    trained: float  # weights, gradients, AdamW's moments, and the copy that autocast computes with
    gathered: float  # what FSDP holds in full for a while
    activations: float

    @property
    def total(self) -> float:
        return self.frozen + self.trained + self.gathered + self.activations


def memory_of(model: Prospect, config: Config, world: int) -> Memory:
    """What a run of a model takes on each of `world` GPUs. What of it is frozen, and in which type, is already set.

    What is trained takes 16 bytes per parameter (weight, gradient and AdamW's two moments in fp32) and in bf16 or fp16
    two more, the copy that autocast computes with. FSDP divides the 16 by the ranks. It gathers all that is not in a
    block (weights, gradient and autocast's copy, until backward is done); in the type of the arithmetic two blocks'
    weights and one's gradient; and in fp32 the larger of those gradients while ranks add it up. With activation
    checkpointing only a block's input is kept, and one block at a time is recomputed.
    """
    t, shape = config.train, model.config
    sharded = t.parallel == "fsdp" and world > 1
    frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    total, trained = numbers(model.parameters())
    block, block_trained = numbers(model.model.layers[0].parameters())
    layers, size = shape.num_hidden_layers, torch_dtype(t.precision).itemsize
    root, root_trained = total - layers * block, trained - layers * block_trained
    of_trained = 8 if t.precision == "fp32" else 10  # weight and gradient, and autocast's copy
    gathered = storage_dtype(t).itemsize * (root - root_trained) + of_trained * root_trained
    gathered += size * (2 * block + block_trained) + 4 * max(root_trained, block_trained)

    kind = "lora with dropout" if t.tune == "lora" and t.lora_dropout else t.tune
    by_hidden, by_inner = BLOCK_BYTES_FP32 if t.precision == "fp32" else BLOCK_BYTES[kind]
    of_block = by_hidden * shape.hidden_size + by_inner * shape.intermediate_size
    queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    of_block += 2 * size * (queries - shape.hidden_size)  # queries, and what they found, where heads are wider
    if shape.model_type == "qwen3":  # norms keep their input in fp32 and, where trained, their output
        of_block += (4 + (size if t.tune == "full" else 0)) * (queries + keys)
    block_input = storage_dtype(t).itemsize * shape.hidden_size
    of_token = layers * block_input + of_block if t.activation_checkpointing else layers * of_block
    activations = of_token * config.data.batch_tokens
    if sharded:
        return Memory(frozen / world, 16 * trained / world, gathered, activations)
    return Memory(frozen, (16 if t.precision == "fp32" else 18) * trained, 0, activations)


def numbers(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """How many numbers parameters hold: all, and those that are trained."""
    parameters = list(parameters)
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def planned_model(config: Config) -> Prospect:
    """A run's model on the meta device, by its backbone's config.json or, where that is not there, its published shape.

    Raises ProspectError for a backbone that is neither there nor in PUBLISHED.
    """
    m = config.model
    shape = read_config(m.backbone) if (Path(m.backbone) / "config.json").exists() else published_config(m.backbone)
    heads = {"speaking_head": m.speaking_head, "dst": config.data.dst}
    heads["dst_state_head"] = m.dst_state_head and config.data.dst
    model = meta_model(dataclasses.replace(shape, vision_dim=m.vision_dim, **heads)).to(storage_dtype(config.train))
    set_trainable(model, config.train)
    return model


def describe_memory(config: Config, model: Prospect | None = None, world: int = 1) -> list[str]:
    """`memory_of` a run in two lines for `--dry-run`: parameters, and GB (10^9 bytes).

    model: the run's, None for `planned_model`.
    """
    model = planned_model(config) if model is None else model
    counts, (total, trained) = count_parts(model), numbers(model.parameters())
    parts = ", ".join(f"{count:,} {part}" for part, count in counts.items() if count)
    memory = memory_of(model, config, world)
    frozen_gb, trained_gb, gathered_gb, kept_gb = (part / 1e9 for part in dataclasses.astuple(memory))
    each = f" on each of {world} GPUs ({config.train.parallel})" if world > 1 else ""
    gathered = f"{gathered_gb:.1f} gathered, " if gathered_gb else ""
    return [
        f"parameters {total / 1e9:.3f} B: {parts}; {trained / 1e6:,.1f} M are trained",
        f"memory     {memory.total / 1e9:.1f} GB{each}: {frozen_gb:.1f} frozen weights, "
        f"{trained_gb:.1f} trained parameters with AdamW, {gathered}{kept_gb:.1f} activations "
        f"of {config.data.batch_tokens:,} tokens; logits and workspace come on top",
    ]


# ---- this machine --------------------------------------------------------------------------------


def check_model_fits(shape: ModelConfig) -> None:
    """Raise ProspectError when this machine cannot train a model from scratch without a GPU: 16 bytes per parameter."""
    parameters = sum(count_parameters(shape).values())
    if not torch.cuda.is_available():
        what = f"{parameters:,} parameters of 16 bytes each"
        check_fits(16 * parameters, what, "lower model.hidden_size or another size of the model")


def check_fits(needed: int, what: str, remedy: str) -> None:
    """Raise ProspectError when so many bytes are more than this machine has: it would kill the process without a word.

    (A GPU reports by itself when it is full.)
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > machine:
        what = f"{what} take {needed / 1e9:,.0f} GB of memory, this machine has {machine / 1e9:,.0f}"
        raise ProspectError(what, where="config", remedy=remedy)
