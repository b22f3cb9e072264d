"""What a run trains, how that is stored, and low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685).

`train.tune` chooses what a run trains, and so what its checkpoints hold:

    tune    transformer, LM head    adapters    projector, heads
    heads   frozen                  -           trained
    lora    frozen                  trained     trained
    full    trained                 -           trained

What is frozen may be stored in 16 bits, because it is only read. What is trained is in fp32, where small steps are not
rounded away; so forward passes of such a mixed model run under autocast.

An adapter puts a trainable product beside a frozen weight W [out,in], of rank r much smaller than either side:

    y = x W^T + (alpha / r) * dropout(x) A^T B^T          A [r,in], B [out,r], B = 0 at the start

so nothing changes at the start. Streaming and an export add the product to W when they load a checkpoint, and
inference costs nothing extra; the checkpoint itself keeps the two apart.
"""

import math
from collections.abc import Container, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from prospect.config import TrainConfig, torch_dtype
from prospect.errors import ProspectError
from prospect.model import LoraConfig, ModelConfig, Prospect

PEFT_PREFIX = "base_model.model."  # peft's wrappers around a model add this to every name
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_adapter(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def is_ours(name: str) -> bool:
    """Whether a tensor belongs to the projector or a decision head: what a backbone does not have."""
    return not name.startswith(("model.", "lm_head."))


def part_of(name: str) -> str:
    """backbone, adapters, projector or heads."""
    if is_ours(name):
        return "projector" if name.startswith("mm_projector.") else "heads"
    return "adapters" if is_adapter(name) else "backbone"


def meta_model(config: ModelConfig) -> Prospect:
    """A model on the meta device, adapters included: it has names and shapes, but no memory."""
    with torch.device("meta"):
        model = Prospect(config)
        if config.lora:
            add_lora(model, config.lora)
    return model


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of a model of this shape by part. Nothing is allocated."""
    return count_parts(meta_model(config))


def count_parts(model: Prospect) -> dict[str, int]:
    """Parameters by part: backbone, adapters, projector, heads."""
    counts = {"backbone": 0, "adapters": 0, "projector": 0, "heads": 0}
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


# ---- adapters ------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """A linear layer with an adapter. Its own weight and bias keep their names; lora_A and lora_B are added."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        nn.Module.__init__(self)  # not Linear's, which would allocate a weight: ours is the base layer's own
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Linear(self.in_features, config.rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(config.rank, self.out_features, bias=False, device=base.weight.device)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        dropped = F.dropout(x, self.dropout, self.training)
        if not torch.is_autocast_enabled(x.device.type):  # autocast chooses types by itself
            dropped = dropped.to(self.lora_A.weight.dtype)
        update = self.lora_B(self.lora_A(dropped) * self.scale)
        out = F.linear(x, self.weight, self.bias)
        return out + update.to(out.dtype)


def linear_layers(model: Prospect) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every layer of the transformer that can have an adapter."""
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name in TARGETS:
                if hasattr(parent, name):
                    yield parent, name, getattr(parent, name)


@torch.no_grad()
def add_lora(model: Prospect, config: LoraConfig, seed: int = 0) -> None:
    """Put an adapter beside every layer named in `config.targets`: A drawn from `seed` as peft draws it, B zero.

    A model that has these adapters already (from a LoRA checkpoint) keeps them as they are. Raises ProspectError when
    it has others, or when a target does not exist.
    """
    unknown = sorted(set(config.targets) - set(TARGETS))
    if unknown:
        what = f"no such layers to adapt: {', '.join(unknown)}"
        raise ProspectError(what, where="train.lora_targets", remedy=f"choose from {', '.join(TARGETS)}")
    if has_adapters(model):
        old = model.config.lora
        if (old.rank, old.alpha, set(old.targets)) != (config.rank, config.alpha, set(config.targets)):
            what = f"the backbone has adapters already, of rank {old.rank} and alpha {old.alpha:g}"
            remedy = "keep their rank, alpha and targets, or export it first: that merges them"
            raise ProspectError(what, where="train.lora_rank", remedy=remedy)
        for _, _, layer in linear_layers(model):
            layer.dropout = config.dropout
        model.config.lora = config
        return
    if config.rank > model.config.hidden_size:
        what = f"{config.rank} is more than the model's width, {model.config.hidden_size}"
        raise ProspectError(what, where="train.lora_rank", remedy="16 is usual; train.tune=full trains everything")
    for parent, name, layer in linear_layers(model):
        if name in config.targets:
            setattr(parent, name, LoRALinear(layer, config))
    model.config.lora = config
    if not model.lm_head.weight.is_meta:  # there, values follow
        parameters = dict(model.named_parameters())
        for name, value in drawn_adapters(model, seed, parameters):
            parameters[name].copy_(value)


def drawn_adapters(model: Prospect, seed: int, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of the new adapters among `names`: A by Kaiming's uniform rule, as peft draws it, and B zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_adapter(name) and name in names:
            value = torch.zeros(parameter.shape)
            if name.endswith(".lora_A.weight"):
                bound = 1 / math.sqrt(parameter.shape[1])  # a = sqrt(5)
                value.uniform_(-bound, bound, generator=generator)
            yield name, value


def has_adapters(model: Prospect) -> bool:
    return any(isinstance(layer, LoRALinear) for _, _, layer in linear_layers(model))


@torch.no_grad()
def merge_lora(model: Prospect) -> None:
    """Add every adapter to its weight, W + (alpha / r) B A, computed in fp32, and remove the adapters."""
    for parent, name, layer in linear_layers(model):
        if isinstance(layer, LoRALinear):
            update = layer.scale * (layer.lora_B.weight.float() @ layer.lora_A.weight.float())  # [out,in]
            merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            merged.weight = nn.Parameter((layer.weight.float() + update).to(layer.weight.dtype))
            merged.bias = layer.bias
            setattr(parent, name, merged)
    model.config.lora = None


def peft_config(config: ModelConfig) -> dict[str, Any]:
    """adapter_config.json, as peft writes it."""
    lora = config.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.backbone,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


# ---- what is trained -----------------------------------------------------------------------------


def storage_dtype(config: TrainConfig) -> torch.dtype:
    """How to store the backbone on the device: 16 bits where it is frozen and the precision allows it, else fp32."""
    if config.tune == "full":
        return torch.float32
    return torch_dtype(config.precision)


def lora_config(config: TrainConfig) -> LoraConfig:
    return LoraConfig(config.lora_rank, config.lora_alpha, config.lora_dropout, list(config.lora_targets))


def set_trainable(model: Prospect, config: TrainConfig, seed: int = 0) -> None:
    """Freeze what `tune` does not train, add the adapters where it is lora, and keep what is trained in fp32."""
    if config.tune == "full" and has_adapters(model):
        what = "train.tune=full on a backbone with adapters"
        remedy = "python -m prospect.weights export merges them; or train.tune=lora"
        raise ProspectError(what, where="config", remedy=remedy)
    if config.tune == "lora":
        add_lora(model, lora_config(config), seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.tune == "full" or is_ours(name) or (config.tune == "lora" and is_adapter(name)))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def checkpoint_names(model: Prospect, config: TrainConfig) -> set[str] | None:
    """The tensors that a checkpoint holds: None is all of them, else the projector, the heads and the adapters."""
    if config.tune == "full":
        return None
    return {name for name in model.state_dict() if is_ours(name) or is_adapter(name)}


def parameter_groups(model: Prospect, config: TrainConfig) -> list[dict[str, Any]]:
    """What is trained, as the optimizer's groups: each part with its own peak learning rate (`peak_lr`, which the
    schedule multiplies), and no weight decay on norms and biases."""
    rates = {"projector": config.projector_learning_rate, "heads": config.heads_learning_rate}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((part_of(name), parameter.ndim >= 2), []).append(parameter)
    groups = []
    for (part, decayed), parameters in members.items():
        rate = config.learning_rate if rates.get(part) is None else rates[part]
        decay = config.weight_decay if decayed else 0.0
        groups.append({"name": part, "params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    return groups
