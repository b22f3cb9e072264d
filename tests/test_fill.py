"""A model is opened without memory, shared between ranks, and filled: each rank with its own rows of every tensor.

Expected values are the files' own, and for what is new the formulas written down once more.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import finish, launch

from prospect import checkpoint
from prospect.config import Config, TrainConfig
from prospect.distributed import Ranks, local, shard_model, start_ranks, stop_ranks, whole
from prospect.model import ModelConfig, Prospect
from prospect.tune import meta_model, parameter_groups, set_trainable, storage_dtype
from prospect.weights import fill_model, hf_config, open_model, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread_and_usual_signals")

BACKBONES = Path(__file__).parent / "fixtures" / "backbones"
SETTINGS = {"vision_dim": 16, "image_token_id": 288, "speaking_head": True, "dst": True, "dst_state_head": True}
SCRATCH = ModelConfig(259, 32, 48, 2, 2, 1, 16, tie_word_embeddings=True, vision_dim=16, dst_state_head=True)
CASES = {  # how it is trained; its backbone, None: from scratch
    "scratch": (TrainConfig(tune="full"), None),
    "full, tied": (TrainConfig(tune="full", precision="bf16"), "llama-3.2"),
    "full, untied, sharded files": (TrainConfig(tune="full"), "sharded-bf16"),
    "lora, tied": (TrainConfig(tune="lora", precision="bf16", lora_rank=3), "llama-3.2"),
    "heads, biases": (TrainConfig(tune="heads", precision="fp16"), "biases"),
    "full, biases of q, k, v": (TrainConfig(tune="full"), "qwen2.5"),
    "lora, norms of q, k": (TrainConfig(tune="lora", precision="bf16", lora_rank=3), "qwen3"),
}
LAYERS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
HEADS = ["speaking_decision_head", "dst_update_head", "dst_state_head"]


def filled(case: str, ranks: Ranks) -> Prospect:
    """The model that a run begins with, as train.py makes it."""
    config, backbone = CASES[case]
    if backbone is None:
        model, stored = meta_model(dataclasses.replace(SCRATCH)), {}
    else:
        model, stored = open_model(BACKBONES / backbone, SETTINGS, storage_dtype(config))
    set_trainable(model, config)
    shard_model(model, dataclasses.replace(config, parallel="fsdp"), ranks)
    assert all(tensor.is_meta for tensor in model.parameters())
    fill_model(model, stored, ranks.device, 5)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    return model


def write_filled(folder: Path) -> int:
    """For each case, what this rank holds, and the same put together from all ranks."""
    ranks = start_ranks("cpu")
    for case in CASES:
        model = filled(case, ranks)
        tensors = tensors_of(model)
        save_file(
            {name: local(tensor).contiguous() for name, tensor in tensors.items()}, folder / f"{case} {ranks.rank}"
        )
        together = {name: whole(tensor).contiguous() for name, tensor in tensors.items()}
        if ranks.main:
            save_file(together | {"rope": model.model.rope_frequencies}, folder / case)
            trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            (folder / f"{case} trained").write_text(json.dumps(trained))
    stop_ranks(ranks)
    return 0


def by_hand(case: str, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Every value of a case's model, as it is told in prose: from its file, or drawn in the order of the layers."""
    config, backbone = CASES[case]
    expected, depth = {}, 2
    if backbone is not None:
        for file in (BACKBONES / backbone).glob("model*.safetensors"):
            expected |= load_file(file)
        depth = 1 + max(int(name.split(".")[2]) for name in expected if name.startswith("model.layers."))
    expected = {name: tensor.to(storage_dtype(config)) for name, tensor in expected.items()}
    blocks = [f"model.layers.{n}.{layer}" for n in range(depth) for layer in LAYERS]
    draw = torch.Generator().manual_seed(5)
    new = ["mm_projector.0", "mm_projector.2", *(["model.embed_tokens", *blocks] if backbone is None else []), *HEADS]
    for layer in new:
        std = shapes[f"{layer}.weight"][1] ** -0.5 * (0.5 if layer.endswith(("o_proj", "down_proj")) else 1)  # 2 layers
        expected[f"{layer}.weight"] = torch.empty(shapes[f"{layer}.weight"]).normal_(0, std, generator=draw)
        if f"{layer}.bias" in shapes:
            expected[f"{layer}.bias"] = torch.zeros(shapes[f"{layer}.bias"])
    draw = torch.Generator().manual_seed(5)
    for layer in blocks if config.tune == "lora" else []:
        shape = shapes[f"{layer}.lora_A.weight"]
        expected[f"{layer}.lora_A.weight"] = torch.empty(shape).uniform_(
            -(shape[1] ** -0.5), shape[1] ** -0.5, generator=draw
        )
        expected[f"{layer}.lora_B.weight"] = torch.zeros(shapes[f"{layer}.lora_B.weight"])
    if backbone is None:
        expected |= {name: torch.ones(shape) for name, shape in shapes.items() if "norm" in name}
    return expected


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_ranks_hold_their_rows_of_the_one_model(tmp_path, world):
    """On three ranks rows are dealt out unevenly, and of a head's single row two ranks get nothing."""
    assert finish(launch(write_filled, tmp_path, world=world, log=tmp_path / "log")) == [0] * world
    for case, (config, _) in CASES.items():
        found = load_file(tmp_path / case)
        rope = found.pop("rope")
        expected = by_hand(case, {name: tensor.shape for name, tensor in found.items()})
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (case, name)
        assert rope.dtype == torch.float32 and rope[0] == 1 and (rope.diff() < 0).all()
        for rank in range(world):
            held = load_file(tmp_path / f"{case} {rank}")
            for name, tensor in expected.items():
                rows = (*tensor.chunk(world), *[tensor[:0]] * world)[rank]
                assert torch.equal(held[name], rows), (case, name, rank)
        ours = {name for name in expected if name.startswith(("mm_projector.", *HEADS)) or ".lora_" in name}
        trained = set(json.loads((tmp_path / f"{case} trained").read_text()))
        assert trained == (set(expected) if config.tune == "full" else ours)


# ---- memory --------------------------------------------------------------------------------------

WIDE = ModelConfig(8192, 1024, 4096, 2, 16, 16, 64, vision_dim=16)  # 50 million parameters, 203 MB


def peak() -> int:
    """Bytes of this process at their highest, memory-mapped files that it has read included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_filling(folder: Path) -> int:
    """What a rank's memory grows by when a run of `tune: full` is filled, and resumes from a checkpoint's moments."""
    ranks, config = start_ranks("cpu"), Config(train=TrainConfig(parallel="fsdp", device="cpu"))
    filled("lora, tied", ranks)  # what torch imports for it is not counted
    before = peak()
    model, stored = open_model(folder, {"vision_dim": 16, "image_token_id": 0}, torch.float32)
    set_trainable(model, config.train)
    shard_model(model, config.train, ranks)
    fill_model(model, stored, ranks.device, 0)
    for parameter in model.parameters():
        local(parameter.detach()).sum()  # touches what is mapped
    grown = [peak() - before]
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train))
    checkpoint.restore(folder, model, optimizer, checkpoint.TrainState(world=9), config, ranks)
    (folder / f"grown{ranks.rank}").write_text(json.dumps([*grown, peak() - before]))
    stop_ranks(ranks)
    return 0


@pytest.mark.slow
def test_a_rank_takes_the_memory_of_its_share(tmp_path):
    """Of weights of 203 MB and moments of twice that, two ranks read and hold one half each, and never more.

    What is read counts as well: the file is mapped into memory, up to a quarter more of it than is touched.
    """
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in tensors_of(meta_model(WIDE)).items()}
    size = sum(4 * tensor.numel() for tensor in tensors.values())
    backbone = {name: tensor for name, tensor in tensors.items() if name.startswith(("model.", "lm_head."))}
    save_file(backbone, tmp_path / "model.safetensors")
    values = hf_config(WIDE, None)
    del values["prospect"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    moments = {f"{name}.{key}": tensor for name, tensor in tensors.items() for key in ("exp_avg", "exp_avg_sq")}
    moments |= {f"{name}.step": torch.ones(()) for name in tensors}
    save_file({name: tensor.clone() for name, tensor in moments.items()}, tmp_path / "optimizer.safetensors")
    del tensors, backbone, moments
    assert finish(launch(measure_filling, tmp_path, world=2, log=tmp_path / "log")) == [0, 0]
    for rank in range(2):
        weights, resumed = (grown / size for grown in json.loads((tmp_path / f"grown{rank}").read_text()))
        assert 0.5 + 0.4 < weights < 0.5 + 0.75  # held, and read; if it is less, the measurement is wrong
        assert 1.5 + 0.9 < resumed < 1.5 + 1.6  # weights and moments held, and moments read
