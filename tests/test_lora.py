"""Adapters: what they compute, what they leave alone, where they are kept, and what is trained at which rate."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from test_evaluate import DST, SPEAKING, make_checkpoint, write_clips
from tiny import tiny_clip

from prospect.config import TrainConfig, load_config
from prospect.distributed import check_precision
from prospect.errors import ProspectError
from prospect.jobs import load_jobs
from prospect.load import load_for_inference
from prospect.memory import Memory, describe_memory, memory_of, planned_model
from prospect.model import LoraConfig, ModelConfig, Prospect, init_weights
from prospect.stream import streamed_clips
from prospect.tune import (
    LoRALinear,
    add_lora,
    checkpoint_names,
    is_adapter,
    is_ours,
    merge_lora,
    parameter_groups,
    set_trainable,
    storage_dtype,
)
from prospect.weights import fill_model, load_model, open_model, read_config, save_model, trained_tensors

BACKBONES = Path(__file__).parent / "fixtures" / "backbones"
CONFIGS = Path(__file__).parent.parent / "configs"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(name: str = "llama-3.2", **settings) -> Prospect:
    return load_model(BACKBONES / name, vision_dim=16, image_token_id=288, **settings)


def lora_config(**changes) -> TrainConfig:
    return TrainConfig(
        **{"tune": "lora", "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_targets": ALL} | changes
    )


def stir(model: Prospect) -> None:
    """Give every adapter's B some values, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.normal_(0, 0.1, generator=generator)


def answer(model: Prospect) -> torch.Tensor:
    """LM logits of a fixed sequence with two frames in it, [1,T,V]."""
    ids = torch.arange(1, 41)[None]
    ids[0, 5:7] = 288
    with torch.no_grad():
        return model.lm_head(model(ids, torch.linspace(-1, 1, 32).reshape(2, 16)))


def loss(model: Prospect) -> torch.Tensor:
    ids = torch.arange(1, 41)[None]
    ids[0, 5:7] = 288
    hidden = model(ids, torch.linspace(-1, 1, 32).reshape(2, 16))  # [1,T,H]
    decisions = torch.cat((model.speaking_decision_head(hidden), model.dst_update_head(hidden)), dim=-1)  # [1,T,2]
    return (
        F.cross_entropy(model.lm_head(hidden)[0, :-1].float(), ids[0, 1:].clamp(max=287))
        + decisions.float().square().mean()
    )


def contents(model: Prospect) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


# ---- what they compute ---------------------------------------------------------------------------


def test_the_formula_by_hand():
    base = nn.Linear(2, 2)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        base.bias.copy_(torch.tensor([0.5, -0.5]))
    layer = LoRALinear(base, LoraConfig(rank=1, alpha=3.0, dropout=0.0, targets=["q_proj"]))
    with torch.no_grad():
        layer.lora_A.weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.weight.copy_(torch.tensor([[10.0], [20.0]]))
    # x = (5, 2): W x + b = (9.5, 22.5); A x = 3; 3/1 * B * 3 = (90, 180)
    assert layer(torch.tensor([5.0, 2.0])).tolist() == [99.5, 202.5]


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed():
    plain, a, b, c = load(), load(), load(), load()
    add_lora(a, LoraConfig(4, 8.0, 0.0, ALL), seed=1)
    add_lora(b, LoraConfig(4, 8.0, 0.0, ALL), seed=1)
    add_lora(c, LoraConfig(4, 8.0, 0.0, ALL), seed=2)
    assert torch.equal(answer(plain), answer(a))
    first = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(a.state_dict()[first], b.state_dict()[first])
    assert not torch.equal(a.state_dict()[first], c.state_dict()[first])
    bound = 32**-0.5  # 1 / sqrt(in)
    assert 0.9 * bound < a.state_dict()[first].abs().max() <= bound


def test_dropout_follows_torchs_random_state_and_rests_in_evaluation():
    model = load()
    add_lora(model, LoraConfig(4, 8.0, 0.5, ALL))
    stir(model)
    model.train()
    torch.manual_seed(3)
    first, second = answer(model), answer(model)
    torch.manual_seed(3)
    assert torch.equal(answer(model), first) and torch.equal(answer(model), second)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(answer(model), answer(model))


@pytest.mark.parametrize("name", ["llama-3.2", "biases"])
def test_merging_changes_no_answer(name):
    model = load(name)
    plain = answer(model)
    add_lora(model, LoraConfig(4, 8.0, 0.3, ALL))
    stir(model)
    model.eval()
    adapted = answer(model)
    assert (adapted - plain).abs().max() > 0.1
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules()) and model.config.lora is None
    assert (answer(model) - adapted).abs().max() < 1e-4


def test_merging_adds_in_fp32_also_to_a_bf16_weight():
    model = load(dtype=torch.bfloat16)
    add_lora(model, LoraConfig(1, 1.0, 0.0, ["q_proj"]))
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.weight.fill_(0.98828125)
        layer.lora_A.weight.fill_(1.0625)
        layer.lora_B.weight.fill_(1.0625)
    merge_lora(model)
    # The product is 1.12890625, the sum 2.1171875, which rounds to 2.125 in bf16 (steps of 1/64, halves to even).
    # Were the product rounded too, to 1.125, the sum would be 2.11328125 and round to 2.109375.
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16 and merged.unique().tolist() == [2.125]


def test_targets_are_checked():
    with pytest.raises(ProspectError, match="no such layers to adapt: lm_head, q "):
        add_lora(load(), LoraConfig(4, 8.0, 0.0, ["q", "lm_head", "k_proj"]))


def test_adapters_stand_beside_their_targets_alone():
    model = load()
    add_lora(model, LoraConfig(4, 8.0, 0.0, ["v_proj", "up_proj"]))
    expected = {
        f"model.layers.{layer}.{name}.lora_{part}.weight"
        for layer in (0, 1)
        for name in ("self_attn.v_proj", "mlp.up_proj")
        for part in "AB"
    }
    assert {name for name in model.state_dict() if is_adapter(name)} == expected


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["heads", "lora", "full"])
def test_training_changes_what_it_says_and_nothing_else_by_a_single_byte(tune):
    model = load()
    set_trainable(model, lora_config(tune=tune))
    before = contents(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lora_config(tune=tune, learning_rate=1e-2)))
    model.train()
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = contents(model)
    changed = {name for name in before if before[name] != after[name]}
    expected = {
        "heads": {name for name in before if is_ours(name)},
        "lora": {name for name in before if is_ours(name) or "lora_" in name},
        "full": set(before),
    }[tune]
    assert changed == expected


def test_groups_have_their_own_rates_and_decay_matrices_alone():
    config = lora_config(learning_rate=2.0, weight_decay=0.1, projector_learning_rate=1.0, heads_learning_rate=4.0)
    model = load("biases")
    set_trainable(model, config)
    groups = parameter_groups(model, config)
    by_part = {(group["name"], group["weight_decay"]): group for group in groups}
    assert {key: (group["lr"], group["peak_lr"]) for key, group in by_part.items()} == {
        ("adapters", 0.1): (2.0, 2.0),
        ("projector", 0.1): (1.0, 1.0),
        ("projector", 0.0): (1.0, 1.0),
        ("heads", 0.1): (4.0, 4.0),
        ("heads", 0.0): (4.0, 4.0),
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_group = {key: sorted(names[id(parameter)] for parameter in group["params"]) for key, group in by_part.items()}
    assert in_group["projector", 0.0] == ["mm_projector.0.bias", "mm_projector.2.bias"]
    assert in_group["heads", 0.1] == ["dst_update_head.weight", "speaking_decision_head.weight"]
    assert len(in_group["adapters", 0.1]) == 2 * 7 * 2

    full = lora_config(tune="full", learning_rate=0.25, weight_decay=0.1)
    model = load("biases")
    set_trainable(model, full)
    groups = parameter_groups(model, full)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))  # each once
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    undecayed = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert undecayed == {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert {group["lr"] for group in groups if group["name"] == "backbone"} == {0.25}


@pytest.mark.parametrize(
    "precision, stored", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_frozen_backbone_is_stored_small_and_trained_in_fp32(precision, stored):
    config = lora_config(precision=precision)
    assert storage_dtype(config) == stored
    assert storage_dtype(lora_config(tune="full", precision=precision)) == torch.float32
    model = load(dtype=storage_dtype(config))
    set_trainable(model, config)
    for name, parameter in model.named_parameters():
        trained = is_ours(name) or is_adapter(name)
        assert parameter.requires_grad == trained and parameter.dtype == (torch.float32 if trained else stored), name
    if precision == "bf16":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model)
        value.backward()
        grads = {parameter.grad.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert grads == {torch.float32}
        assert model.model.layers[1].mlp.down_proj.lora_B.weight.grad.abs().max() > 0


def test_bf16_adapters_answer_without_autocast_too():
    model = load(dtype=torch.bfloat16)
    add_lora(model, LoraConfig(4, 8.0, 0.0, ALL))  # in fp32, beside bf16 weights
    stir(model)
    reference = load()
    add_lora(reference, LoraConfig(4, 8.0, 0.0, ALL))
    stir(reference)
    difference = (answer(model).float() - answer(reference)).abs().mean()
    assert difference < 0.05 * answer(reference).abs().mean()


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["heads", "lora"])
def test_a_checkpoint_holds_only_what_was_trained(tmp_path, tune):
    config = lora_config(tune=tune)
    model = load()
    set_trainable(model, config)
    stir(model)
    save_model(model, tmp_path, names=checkpoint_names(model, config))
    adapters = {"adapter_config.json", "adapter_model.safetensors"} if tune == "lora" else set()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "prospect.safetensors"} | adapters
    # in fp32: projector 16*32+32 + 32*32+32, two heads 33 each; adapters of two blocks, rank 4 on in+out of each layer
    ours = 16 * 32 + 32 + 32 * 32 + 32 + 2 * 33
    ends = (
        (32 + 48) + (32 + 24) + (32 + 24) + (48 + 32) + (32 + 64) + (32 + 64) + (64 + 32)
    )  # q k v o gate up down, head_dim 12
    sizes = {"prospect.safetensors": 4 * ours, "adapter_model.safetensors": 4 * 2 * 4 * ends}
    for file in tmp_path.glob("*.safetensors"):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size - header == sizes[file.name]
    if tune == "lora":  # what peft goes by
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (written["peft_type"], written["task_type"], written["bias"]) == ("LORA", "CAUSAL_LM", "none")
        assert (written["r"], written["lora_alpha"], written["target_modules"]) == (4, 8.0, ALL)
        names = load_file(tmp_path / "adapter_model.safetensors").keys()
        assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names and len(names) == 2 * 7 * 2
    again = load_model(tmp_path).eval()
    assert torch.equal(answer(again), answer(model.eval()))

    fresh, stored = open_model(BACKBONES / "llama-3.2", {"vision_dim": 16, "image_token_id": 288}, torch.float32)
    set_trainable(fresh, config)
    fill_model(fresh, stored | trained_tensors(fresh, tmp_path), "cpu", seed=9)  # what a resumed run does
    assert torch.equal(answer(fresh.eval()), answer(model))


def test_full_tuning_is_saved_whole():
    config = lora_config(tune="full")
    assert checkpoint_names(load(), config) is None


def test_a_lora_checkpoint_as_backbone_goes_on_with_its_adapters(tmp_path):
    config = lora_config()
    model = load()
    set_trainable(model, config)
    stir(model)
    save_model(model, tmp_path, names=checkpoint_names(model, config))

    again = load_model(tmp_path)
    set_trainable(again, lora_config(lora_dropout=0.25))
    assert torch.equal(answer(again.eval()), answer(model.eval()))
    assert again.model.layers[0].mlp.up_proj.dropout == 0.25 and again.config.lora.dropout == 0.25
    with pytest.raises(ProspectError, match="adapters already, of rank 4"):
        set_trainable(load_model(tmp_path), lora_config(lora_rank=8))
    with pytest.raises(ProspectError, match="tune=full on a backbone with adapters"):
        set_trainable(load_model(tmp_path), lora_config(tune="full"))

    heads = load_model(tmp_path)  # heads alone: the adapters stay as they are, and stay in the checkpoint
    set_trainable(heads, lora_config(tune="heads"))
    save_model(heads, tmp_path / "next", names=checkpoint_names(heads, lora_config(tune="heads")))
    assert torch.equal(answer(load_model(tmp_path / "next").eval()), answer(model))


@pytest.mark.parametrize("name", ["llama-3.2", "biases", "qwen2.5", "qwen3"])
def test_adapters_open_in_peft_and_answer_the_same(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    peft = pytest.importorskip("peft", reason="pip install -r requirements-dev.txt")
    config = lora_config(lora_targets=["q_proj", "o_proj", "gate_proj", "down_proj"], lora_dropout=0.1)
    model = load(name)
    set_trainable(model, config)
    stir(model)
    save_model(model, tmp_path, names=checkpoint_names(model, config))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(BACKBONES / name, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    saved = set(peft.get_peft_model_state_dict(theirs))
    assert saved == {"base_model.model." + name for name in model.state_dict() if is_adapter(name)}
    ids = torch.arange(1, 49).reshape(2, 24)
    model.eval()
    with torch.no_grad():
        ours = model.lm_head(model(ids))
        assert (theirs(input_ids=ids).logits - ours).abs().max() < 1e-4
        assert (theirs.merge_and_unload()(input_ids=ids).logits - ours).abs().max() < 1e-4


# ---- memory --------------------------------------------------------------------------------------


def kept_bytes(tune: str, precision: str, dropout: float, kind: str, head_dim: int, layers: int) -> int:
    """What autograd keeps of 96 tokens in a model of so many layers, 256 wide with 896 inside; weights apart."""
    config = lora_config(tune=tune, precision=precision, lora_dropout=dropout)
    shape = ModelConfig(64, 256, 896, layers, 8, 2, head_dim, model_type=kind, vision_dim=16, image_token_id=64)
    model = Prospect(shape)
    init_weights(model, 0)
    model.to(storage_dtype(config))
    set_trainable(model, config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and 96 in tensor.shape:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    embeds = torch.randn(1, 96, 256, dtype=model.model.embed_tokens.weight.dtype, requires_grad=True)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        model.train().model(embeds, None, None)
        return sum(kept.values())


@pytest.mark.parametrize(
    "tune, precision, dropout",
    [
        ("full", "bf16", 0.0),
        ("lora", "bf16", 0.0),
        ("lora", "bf16", 0.1),
        ("heads", "bf16", 0.0),
        ("full", "fp32", 0.0),
    ],
)
@pytest.mark.parametrize("kind, head_dim", [("llama", 32), ("qwen3", 48)])  # 8 heads: as wide as the layer, and wider
def test_the_memory_a_dry_run_announces_is_what_autograd_keeps(tune, precision, dropout, kind, head_dim, tmp_path):
    three, one = (kept_bytes(tune, precision, dropout, kind, head_dim, layers) for layers in (3, 1))
    per_layer = (three - one) / 2
    shape = {
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
    }
    shape |= {"model_type": kind, "num_key_value_heads": 2, "head_dim": head_dim}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = load_config(CONFIGS.parent / "config.yaml")
    config.model.backbone, config.data.batch_tokens = str(tmp_path), 960_000  # 10 layers, 10,000 times the tokens
    config.train = lora_config(tune=tune, precision=precision, lora_dropout=dropout)
    announced = float(describe_memory(config)[1].split(" activations")[0].split()[-1]) * 1e9
    assert 0.9 < announced / (per_layer * 10 * 10_000) < 1.1


# Llama-3.1-8B, 2,048 tokens with activation checkpointing, in parameters. A block: q and o, k and v, the MLP, norms.
BLOCK = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096  # 218,112,000, 32 times
ADAPTERS = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # of rank 16 in a block
OURS = 1152 * 4096 + 4096 + 4096 * 4096 + 4096 + 5 * 4097  # the projector and three heads
BACKBONE = 32 * BLOCK + 2 * 128256 * 4096 + 4096
REST = BACKBONE - 32 * BLOCK + OURS  # embeddings, LM head, the last norm, projector, heads


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        # 16 bytes of every parameter divided by 8. The rest's weights and gradient in fp32, and its bf16 copy; in bf16
        # two blocks, one's gradient. In fp32: the gradient of the rest. Tokens: 32 inputs of blocks in fp32, and one
        # block.
        (["tune=full", "parallel=fsdp", "precision=bf16"], 8, Memory(
            0, 2 * (BACKBONE + OURS), (4 + 4 + 2) * REST + 2 * 3 * BLOCK + 4 * REST,
            2048 * (32 * 4 * 4096 + 30 * 4096 + 8 * 14336))),
        (["tune=full", "parallel=fsdp", "precision=fp32"], 8, Memory(
            0, 2 * (BACKBONE + OURS), 4 * (2 * REST + 3 * BLOCK) + 4 * REST,
            2048 * (32 * 4 * 4096 + 32 * 4096 + 16 * 14336))),
        (["tune=full", "parallel=ddp", "precision=bf16"], 8, Memory(
            0, 18 * (BACKBONE + OURS), 0, 2048 * (32 * 4 * 4096 + 30 * 4096 + 8 * 14336))),
        (["tune=full", "parallel=fsdp", "precision=bf16"], 1, Memory(  # a single rank shares with nobody
            0, 18 * (BACKBONE + OURS), 0, 2048 * (32 * 4 * 4096 + 30 * 4096 + 8 * 14336))),
        (["tune=lora", "parallel=fsdp", "precision=bf16"], 4, Memory(
            2 * BACKBONE / 4, 4 * (32 * ADAPTERS + OURS),
            2 * (REST - OURS) + 10 * OURS + 2 * (2 * (BLOCK + ADAPTERS) + ADAPTERS) + 4 * OURS,
            2048 * (32 * 2 * 4096 + 16 * 4096 + 8 * 14336))),
        (["tune=lora", "parallel=ddp", "precision=fp16"], 4, Memory(
            2 * BACKBONE, 18 * (32 * ADAPTERS + OURS), 0, 2048 * (32 * 2 * 4096 + 16 * 4096 + 8 * 14336))),
    ],
)  # fmt: skip
def test_memory_of_each_gpu_by_hand(overrides, world, expected):
    config = load_config(CONFIGS / "llama-3.1-8b.yaml", [f"train.{override}" for override in overrides])
    assert memory_of(planned_model(config), config, world) == expected


@pytest.mark.parametrize(
    "name, trained, card",  # parameters trained, worked out by hand from the published shapes; the card's GB
    [
        # a projector D x H + H + H x H + H, heads of H + 1, H + 1, 3 (H + 1); adapters: rank x (in + out), seven layers
        ("smolvlm2-2.2b", 2048 * 2048 * 2 + 2 * 2048 + 5 * 2049 + 64 * 24 * (4 * 4096 + 3 * 10240), 24),
        ("llama-3.2-1b", 1235814400 + 2048 * 2048 * 2 + 2 * 2048 + 5 * 2049, 40),
        (
            "llama-3.2-3b",
            1152 * 3072 + 3072 * 3072 + 2 * 3072 + 5 * 3073 + 128 * 28 * (2 * 6144 + 2 * 4096 + 3 * 11264),
            40,
        ),
        (  # 32 heads of 128 are wider than the hidden state, 2560
            "qwen3-4b",
            1152 * 2560 + 2560 * 2560 + 2 * 2560 + 5 * 2561 + 64 * 36 * (2 * 6656 + 2 * 3584 + 3 * 12288),
            40,
        ),
        (
            "llama-3.1-8b",
            1152 * 4096 + 4096 * 4096 + 2 * 4096 + 5 * 4097 + 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432),
            24,
        ),
        (
            "llama-3.1-8b-80gb",
            1152 * 4096 + 4096 * 4096 + 2 * 4096 + 5 * 4097 + 128 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432),
            80,
        ),
    ],
)
def test_the_configs_fit_the_cards_they_name(name, trained, card):
    config = load_config(CONFIGS / f"{name}.yaml")
    parameters, memory = describe_memory(config)  # without weights: by the backbone's name
    assert f"; {trained / 1e6:,.1f} M are trained" in parameters
    total = float(memory.split()[1])
    vocabulary = 151936 if "qwen" in name else 128256
    # of a third of the tokens: bf16, fp32, and fp32 for the gradient
    logits = config.data.batch_tokens / 3 * vocabulary * 10 / 1e9
    assert 0.5 * card < total + logits < 0.9 * card
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert f"card of {card} GB" in text or f"each card {card} GB" in text
    for number in memory.replace(":", ",").split(", ")[1:]:  # the parts, as the file's own comment gives them
        value = number.split()[0]
        assert float(value) == 0 or f"{value} GB" in text, (value, name)
    config.train.precision = {"bf16": "fp16", "fp16": "bf16"}[config.train.precision]  # on another card
    assert describe_memory(config) == [parameters, memory]


# ---- streaming -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint with adapters as train.py leaves it, its backbone being another checkpoint; and clips."""
    folder = tmp_path_factory.mktemp("adapted")
    base, directory = make_checkpoint(folder / "base", speaking=SPEAKING, dst=DST), folder / "step"
    model, config = load_model(base), lora_config()
    set_trainable(model, config)
    stir(model)
    save_model(model, directory, names=checkpoint_names(model, config))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.yaml", "state.json"):
        shutil.copy(base / name, directory / name)
    draw = np.random.default_rng(7)
    clips = [tiny_clip(draw, f"clip{n}", 12 + 3 * n, replies=3, words=4) for n in range(4)]
    return directory, write_clips(folder, "clips.json", clips)


def records_by(model: Prospect, directory: Path, clips: Path, *overrides: str) -> list[dict]:
    config, tokenizer, _ = load_for_inference(directory, list(overrides))
    jobs = load_jobs([str(clips)], config, tokenizer)
    return [record for _, records in streamed_clips(model, tokenizer, jobs, config) for record in records]


def test_nothing_of_an_adapter_remains_when_it_streams_and_the_records_are_the_same(adapted):
    """Merged in fp32, a probability differs by less than 1e-5, and no decision or text does."""
    directory, clips = adapted
    before = {path: path.read_bytes() for path in directory.iterdir()}
    _, _, merged = load_for_inference(directory)
    assert not any(is_adapter(name) for name in merged.state_dict()) and merged.config.lora is None
    beside = load_model(directory).eval()
    assert any(is_adapter(name) for name in beside.state_dict())
    found, expected = (records_by(model, directory, clips) for model in (merged, beside))
    for mine, other in zip(found, expected, strict=True):
        assert mine == other | {
            name: pytest.approx(value, abs=1e-5) for name, value in other.items() if isinstance(value, float)
        }
    without = records_by(load_for_inference(read_config(directory).backbone)[2], directory, clips)
    assert [record["text"] for record in without] != [record["text"] for record in found]  # the adapters matter
    assert sum(record["text"] is not None for record in found) > 5
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_merged_in_bf16_it_is_as_near_to_fp32_as_beside(adapted):
    directory, clips = adapted
    quiet = ["infer.speaking_threshold=1", "infer.dst_threshold=1", "infer.coupling=0"]
    exact = records_by(load_for_inference(directory)[2], directory, clips, *quiet)
    merged = load_for_inference(directory, ["infer.precision=bf16"])[2]
    beside = load_model(directory, dtype=torch.bfloat16).eval()
    away = []
    for model in (merged, beside):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        found = records_by(model, directory, clips, *quiet)
        away.append(np.mean([abs(a["speaking_prob"] - b["speaking_prob"]) for a, b in zip(found, exact, strict=True)]))
    assert 0 < away[0] < 1.5 * away[1] and away[0] < 0.02


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trained, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_checkpoint_streams_in_the_precision_that_it_was_trained_in(trained, dtype, adapted, tmp_path):
    directory, clips = shutil.copytree(adapted[0], tmp_path / "step"), adapted[1]
    text = (directory / "config.yaml").read_text()
    assert text.count("precision: fp32") == 1 and text.count("precision: null") == 1
    (directory / "config.yaml").write_text(text.replace("precision: fp32", f"precision: {trained}"))
    config, _, model = load_for_inference(directory)
    assert config.infer.precision == trained and {p.dtype for p in model.parameters()} == {dtype}
    records = records_by(model, directory, clips)
    exact = load_for_inference(directory, ["infer.precision=fp32"])
    assert exact[0].infer.precision == "fp32" and {p.dtype for p in exact[2].parameters()} == {torch.float32}
    first = records_by(exact[2], directory, clips)[0]["speaking_prob"]
    assert records[0]["speaking_prob"] == pytest.approx(first, abs={"fp32": 1e-9, "bf16": 0.03, "fp16": 0.005}[trained])


def test_bf16_on_a_card_without_it_is_refused(monkeypatch):
    """torch would imitate it, many times slower, and say nothing."""
    card, asked = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    with pytest.raises(ProspectError, match="cuda:0 has no bf16") as caught:
        check_precision("bf16", card)
    assert "train.precision=fp16" in caught.value.remedy and asked == [False]
    for precision, device in (("fp16", card), ("fp32", card), ("bf16", torch.device("cpu"))):
        check_precision(precision, device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check_precision("bf16", card)
