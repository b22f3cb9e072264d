"""How much memory a run will take: of a GPU, even on a backbone that is not downloaded yet; and of this machine."""

import dataclasses
import os
from pathlib import Path

import torch

from prospect.config import Config
from prospect.errors import ProspectError
from prospect.model import ModelConfig
from prospect.tune import count_parameters, lora_config, storage_dtype
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
}  # fmt: skip


def published_config(backbone: str) -> ModelConfig:
    """The shape of a backbone not yet downloaded, by its directory name. Raises ProspectError for an unknown name."""
    name = Path(backbone).name.removeprefix("Meta-")
    known = [key for key in PUBLISHED if name.startswith(key)]
    if not known:
        what = f"no such directory, and no published shape of that name ({', '.join(PUBLISHED)})"
        raise ProspectError(what, where=backbone, remedy="download the model there, or correct model.backbone")
    return parse_config(PUBLISHED[known[0]] | {"model_type": "llama"}, backbone)


# What a block keeps of one token until its backward pass, in bytes: (for each of H, for each of intermediate_size).
# In 16 bits a frozen layer does not keep its input, and its residual stream is 16 bits wide too. Dropout makes every
# adapter keep a copy of its input and a mask.
BLOCK_BYTES = {"full": (30, 8), "lora": (16, 8), "lora with dropout": (37, 10), "heads": (12, 6)}
BLOCK_BYTES_FP32 = (32, 16)


def describe_memory(config: Config) -> list[str]:
    """What a run keeps in each GPU's memory, in two lines for `--dry-run`: parameters, and GB (10^9 bytes).

    Frozen weights take the bytes of their type. What is trained takes 16 bytes per parameter (weight, gradient and
    AdamW's two moments in fp32) and in bf16 or fp16 two more, the copy that autocast computes with. With activation
    checkpointing only a block's input is kept, and one block at a time is recomputed. Raises ProspectError for a
    backbone that is neither there nor in PUBLISHED.
    """
    m, t = config.model, config.train
    shape = read_config(m.backbone) if (Path(m.backbone) / "config.json").exists() else published_config(m.backbone)
    lora = lora_config(t) if t.tune == "lora" else shape.lora
    ours = {
        "vision_dim": m.vision_dim,
        "speaking_head": m.speaking_head,
        "dst": config.data.dst,
        "dst_state_head": m.dst_state_head and config.data.dst,
        "lora": lora,
    }
    shape = dataclasses.replace(shape, **ours)
    counts = count_parameters(shape)
    total = sum(counts.values())
    trained = total if t.tune == "full" else total - counts["backbone"]
    kind = "lora with dropout" if t.tune == "lora" and t.lora_dropout else t.tune
    by_hidden, by_inner = BLOCK_BYTES_FP32 if t.precision == "fp32" else BLOCK_BYTES[kind]
    block = by_hidden * shape.hidden_size + by_inner * shape.intermediate_size
    block_input = storage_dtype(t).itemsize * shape.hidden_size
    layers, tokens = shape.num_hidden_layers, config.data.batch_tokens
    kept = layers * block_input + block if t.activation_checkpointing else layers * block
    frozen_gb = (total - trained) * storage_dtype(t).itemsize / 1e9
    trained_gb = trained * (16 if t.precision == "fp32" else 18) / 1e9
    kept_gb = kept * tokens / 1e9
    parts = ", ".join(f"{count:,} {part}" for part, count in counts.items() if count)
    return [
        f"parameters {total / 1e9:.3f} B: {parts}; {trained / 1e6:,.1f} M are trained",
        f"memory     {frozen_gb + trained_gb + kept_gb:.1f} GB: {frozen_gb:.1f} frozen weights, "
        f"{trained_gb:.1f} trained parameters with AdamW, {kept_gb:.1f} activations of {tokens:,} tokens; "
        "logits and workspace come on top",
    ]


# ---- this machine --------------------------------------------------------------------------------


def check_model_fits(shape: ModelConfig) -> None:
    """Raise ProspectError when this machine cannot hold a model that is trained from scratch.

    It is made here in fp32, 4 bytes per parameter; training it here adds the gradient and AdamW's two moments, 16 in
    all.
    """
    parameters, each = sum(count_parameters(shape).values()), 4 if torch.cuda.is_available() else 16
    what = f"{parameters:,} parameters of {each} bytes each"
    check_fits(parameters * each, what, "lower model.hidden_size or another size of the model")


def check_fits(needed: int, what: str, remedy: str) -> None:
    """Raise ProspectError when so many bytes are more than this machine has: it would kill the process without a word.

    (A GPU reports by itself when it is full.)
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > machine:
        what = f"{what} take {needed / 1e9:,.0f} GB of memory, this machine has {machine / 1e9:,.0f}"
        raise ProspectError(what, where="config", remedy=remedy)
