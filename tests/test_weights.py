"""Loading, saving and exporting weights. Reference numbers are transformers' own, stored beside the tiny checkpoints in
tests/fixtures/backbones by make_backbone_fixtures.py; nothing here needs transformers except the two tests that open an
export with it."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from prospect import weights
from prospect.errors import ProspectError, run_entry_point
from prospect.memory import published_config
from prospect.model import KVCache, LoraConfig, ModelConfig, Prospect, RopeScaling
from prospect.prepared import prepare
from prospect.tune import add_lora, count_parameters, is_ours
from prospect.weights import fill_model, hf_config, load_model, open_model, read_config, save_model, trained_tensors

ROOT = Path(__file__).parent.parent
BACKBONES = ROOT / "tests" / "fixtures" / "backbones"
VARIANTS = ["llama-2", "llama-3", "llama-3.1", "llama-3.2", "qwen2.5", "qwen3", "smollm2", "smolvlm2", "biases",
            "sharded-bf16"]  # fmt: skip
NEVER = 0  # the token that the reference continuations leave out


def load(name: str, **settings) -> Prospect:
    return load_model(BACKBONES / name, vision_dim=16, image_token_id=288, **settings).eval()


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_logits_and_greedy_continuation_are_those_of_transformers(name, prepared):
    model, reference = load(name), load_file(BACKBONES / name / "reference.safetensors")
    logits = model.lm_head(model(reference["input_ids"]))  # [B,T,V]
    assert reference["logits"].std() > 1  # the numbers compared are not small to begin with
    assert (logits - reference["logits"]).abs().max() < 1e-4

    if prepared:
        prepare(model)  # merged products, as streaming runs them
    cache = KVCache(model.config, 1, 64, torch.device("cpu"), torch.float32)
    feed, written = reference["input_ids"][:1], []
    for _ in range(len(reference["continuation"])):
        logits = model.lm_head(model(feed, cache=cache))  # [1,T,V]
        if feed.shape[1] > 1:
            assert (logits - reference["logits"][:1]).abs().max() < 1e-4
        last = logits[0, -1]  # [V]
        last[NEVER] = -torch.inf
        written.append(int(last.argmax()))
        feed = torch.tensor([written[-1:]])
    assert written == reference["continuation"].tolist()


@pytest.mark.parametrize(
    "name, tensors",  # beside embeddings and the last norm: nine in each of two blocks, and an LM head where untied
    [("llama-3.2", 2 * 9), ("qwen2.5", 2 * (9 + 3)), ("qwen3", 2 * (9 + 2) + 1)],
)
def test_gradients_are_those_of_transformers(name, tensors):
    model, reference = load(name), load_file(BACKBONES / name / "reference.safetensors")
    ids = reference["input_ids"]  # [B,T]
    logits = model.lm_head(model(ids))  # [B,T,V]
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if not is_ours(name):
            assert (parameter.grad - reference[f"grad.{name}"]).abs().max() < 1e-4, name
            compared += 1
    assert compared == 2 + tensors


def test_a_bf16_checkpoint_stays_bf16_when_asked_and_close():
    model, reference = (
        load("sharded-bf16", dtype=torch.bfloat16),
        load_file(BACKBONES / "sharded-bf16" / "reference.safetensors"),
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = model.lm_head(model(reference["input_ids"])).float()
    assert (logits - reference["logits"]).abs().mean() < 0.02 * reference["logits"].abs().mean()


# ---- config.json ---------------------------------------------------------------------------------


def test_old_and_new_config_styles_say_the_same(tmp_path):
    # llama-3.1 is written in the old style, llama-3.2 in the new one; llama-3.2 differs in these fields alone.
    expected = ModelConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    )
    assert read_config(BACKBONES / "llama-3.1") == expected
    scaling = replace(expected.rope_scaling, factor=32.0)
    assert read_config(BACKBONES / "llama-3.2") == replace(
        expected, head_dim=12, rope_scaling=scaling, tie_word_embeddings=True
    )
    assert "rope_parameters" not in json.loads((BACKBONES / "llama-3.1" / "config.json").read_text())
    assert "rope_scaling" not in json.loads((BACKBONES / "llama-3.2" / "config.json").read_text())


def test_qwens_own_fields():
    """qwen2.5 is written as it was published: it names a window that it does not use. qwen3 leaves out nothing."""
    qwen2, qwen3 = (json.loads((BACKBONES / name / "config.json").read_text()) for name in ("qwen2.5", "qwen3"))
    assert (qwen2["sliding_window"], qwen2["use_sliding_window"], qwen2["max_window_layers"]) == (16, False, 1)
    small = dict(vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6)  # fmt: skip
    assert weights.parse_config(qwen2, "here") == ModelConfig(
        **small, head_dim=8, tie_word_embeddings=True, model_type="qwen2"
    )
    assert weights.parse_config(qwen3, "here") == ModelConfig(**small, head_dim=12, model_type="qwen3")
    del qwen3["head_dim"]  # Qwen3Config's own default is no share of the width
    assert weights.parse_config(qwen3, "here").head_dim == 128


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize(
    "changes, named",
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than full_attention"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"model_type": "qwen2_5_vl", "text_config": {}}, "model_type 'qwen2_5_vl'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_type 'yarn'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_qwen_models_have_and_model_py_does_not_compute_is_refused_by_name(name, changes, named):
    values = json.loads((BACKBONES / name / "config.json").read_text())
    with pytest.raises(ProspectError) as caught:
        weights.parse_config(values | changes, "config.json")
    assert named in str(caught.value)


def test_a_smolvlm2_text_config_may_leave_out_what_equals_the_defaults():
    # SmolVLM2-2.2B's names neither heads nor the inner width; the numbers are LlamaConfig's documented defaults.
    text = {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "rms_norm_eps": 1e-5,
    }
    config = weights.parse_config({"model_type": "smolvlm", "text_config": text}, "here")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size) == (
        32,
        32,
        64,
        11008,
    )
    assert (config.rope_theta, config.tie_word_embeddings) == (10000.0, False)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures ['Qwen2ForCausalLM']"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type 'linear'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor None"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"hidden_size": "32"}, "hidden_size '32'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
        ({"rope_scaling": "llama3"}, "rope_scaling 'llama3'"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(changes, named):
    values = json.loads((BACKBONES / "llama-2" / "config.json").read_text()) | changes
    with pytest.raises(ProspectError) as caught:
        weights.parse_config(values, "config.json")
    assert named in str(caught.value)


def test_all_refusals_are_told_at_once():
    values = json.loads((BACKBONES / "llama-2" / "config.json").read_text())
    with pytest.raises(ProspectError) as caught:
        weights.parse_config(
            values | {"sliding_window": 64, "hidden_act": "relu", "model_type": "mistral"}, "config.json"
        )
    assert all(text in str(caught.value) for text in ("sliding_window 64", "hidden_act 'relu'", "model_type 'mistral'"))


@pytest.mark.parametrize(
    "name, parameters",  # as the model cards give them
    [
        ("SmolLM2-1.7B-Instruct", 1.711e9),
        ("Llama-3.2-1B", 1.236e9),
        ("Llama-3.2-3B-Instruct", 3.213e9),
        ("Meta-Llama-3.1-8B", 8.030e9),
        ("Qwen2.5-3B-Instruct", 3.086e9),
        ("Qwen2.5-7B-Instruct", 7.616e9),
        ("Qwen3-4B-Instruct-2507", 4.022e9),
        ("Qwen3-8B", 8.191e9),
    ],
)
def test_parameter_counts_of_published_models(name, parameters):
    assert abs(count_parameters(published_config(f"models/{name}"))["backbone"] - parameters) < 0.0005e9


def test_an_unknown_backbone_has_no_published_shape():
    with pytest.raises(ProspectError, match="no such directory"):
        published_config("models/Mistral-7B")


# ---- round trips ---------------------------------------------------------------------------------


def make_checkpoint(directory: Path, name: str = "llama-3.2", seed: int = 3) -> Prospect:
    """A checkpoint of `tune: full` with a tokenizer beside it, and its model."""
    model = load(name, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_model(model, directory, eos_token_id=[5, 6])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BACKBONES / "llama-3" / file, directory / file)
    return model


def assert_same_tensors(a: Prospect, b: Prospect) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", ["llama-3.2", "smolvlm2", "biases", "qwen2.5", "qwen3"])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, name):
    model = make_checkpoint(tmp_path, name)
    again = load_model(tmp_path)
    assert_same_tensors(model, again)
    expected = replace(model.config, backbone=again.config.backbone, backbone_mark=again.config.backbone_mark)
    assert again.config == expected

    other, stored = open_model(BACKBONES / name, {"vision_dim": 16, "image_token_id": 288}, torch.float32)
    assert all(tensor.is_meta for tensor in other.state_dict().values())
    fill_model(other, stored | trained_tensors(other, tmp_path), "cpu", seed=99)  # what a resumed run does
    assert_same_tensors(model, other)


def test_the_transformer_is_written_under_hugging_faces_names(tmp_path):
    make_checkpoint(tmp_path)
    names = load_file(BACKBONES / "llama-3.2" / "model.safetensors").keys()
    assert load_file(tmp_path / "model.safetensors").keys() == names  # a tied head once
    assert sorted(load_file(tmp_path / "prospect.safetensors")) == [
        "dst_update_head.bias",
        "dst_update_head.weight",
        "mm_projector.0.bias",
        "mm_projector.0.weight",
        "mm_projector.2.bias",
        "mm_projector.2.weight",
        "speaking_decision_head.bias",
        "speaking_decision_head.weight",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [5, 6]
    files = [tmp_path / name for name in ("config.json", "model.safetensors", "prospect.safetensors")]
    assert len({file.stat().st_mode for file in files}) == 1  # who may read the one may read the others


def test_tied_heads_stay_tied(tmp_path):
    model = make_checkpoint(tmp_path)
    again = load_model(tmp_path)
    for tied in (model, again):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = load("llama-3")
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_a_tied_file_may_hold_the_head_twice_when_both_agree(tmp_path):
    shutil.copytree(BACKBONES / "llama-3.2", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert_same_tensors(load("llama-3.2"), load_model(tmp_path, vision_dim=16, image_token_id=288))
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ProspectError, match="lm_head.weight differs"):
        load_model(tmp_path)


def test_old_rotary_buffers_in_a_file_are_left_alone(tmp_path):
    shutil.copytree(BACKBONES / "llama-2", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    assert_same_tensors(load("llama-2"), load_model(tmp_path, vision_dim=16, image_token_id=288))


def test_new_parts_depend_on_the_seed_alone():
    a, b, c = load("llama-3", seed=1), load("llama-3.1", seed=1), load("llama-3", seed=2)
    for name, tensor in a.state_dict().items():
        if is_ours(name):
            assert torch.equal(tensor, b.state_dict()[name])
            assert name.endswith("bias") == torch.equal(tensor, c.state_dict()[name])  # biases begin at 0
    assert 0.2 < a.mm_projector[0].weight.std() < 0.3  # 1 / sqrt(16), as from scratch


def test_a_checkpoint_has_its_own_settings(tmp_path):
    make_checkpoint(tmp_path)
    assert load_model(tmp_path, vision_dim=16, dst=True).config.vision_dim == 16
    with pytest.raises(ProspectError) as caught:
        load_model(tmp_path, vision_dim=1152, dst=False)
    assert "vision_dim 16, not 1152" in str(caught.value) and "dst True, not False" in str(caught.value)


def test_without_dst_there_is_one_head(tmp_path):
    model = load("llama-3", dst=False)
    assert model.dst_update_head is None
    save_model(model, tmp_path)
    assert load_model(tmp_path).dst_update_head is None


def test_training_a_loaded_model_leaves_its_file_alone(tmp_path):
    shutil.copytree(BACKBONES / "llama-3.2", tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load_model(tmp_path, vision_dim=16, image_token_id=288)
    with torch.no_grad():
        model.model.norm.weight.add_(1)  # the tensors are mapped from the file: a write must go to a copy
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_values_beyond_fp16_are_an_error(tmp_path):
    shutil.copytree(BACKBONES / "llama-3.2", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = 70000.0
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ProspectError, match="model.norm.weight holds values beyond fp16"):
        load_model(tmp_path, dtype=torch.float16)


def test_rope_frequencies_are_those_of_llama3_and_stay_in_fp32():
    model = load("llama-3.2")
    before = model.model.rope_frequencies.clone()
    # head_dim 12, theta 500000: 500000^(-i/6) turns the pairs i = 0..5. In 64 tokens the first turns 64 / 2 pi = 10.2
    # times, more than 4: it stays. The second turns 1.143 times: (1.143 - 1) / (4 - 1) = 0.0477 of it stays, the rest
    # is slowed by 32. The others turn less than once: all of them are slowed by 32.
    plain = [500000 ** (-i / 6) for i in range(6)]
    keep = (64 * plain[1] / (2 * math.pi) - 1) / 3
    assert 0.047 < keep < 0.048
    expected = [1.0, keep * plain[1] + (1 - keep) * plain[1] / 32, *(value / 32 for value in plain[2:])]
    assert torch.allclose(before, torch.tensor(expected), rtol=1e-5, atol=0)
    assert before.dtype == torch.float32 and before.device.type == "cpu"
    for cast in (model.bfloat16, model.half, lambda: model.to(torch.float64), model.float):
        cast()
        assert torch.equal(model.model.rope_frequencies, before) and model.model.rope_frequencies.dtype == torch.float32
    assert "model.rope_frequencies" not in model.state_dict()


# ---- memory --------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from prospect.weights import load_model
torch.set_num_threads(1)

def peak():  # of this process alone; resource.getrusage would begin with what the process that started it had
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

load_model(sys.argv[2], dtype=torch.bfloat16)  # a tiny one first: what torch imports for it is counted beforehand
before = peak()
model = load_model(sys.argv[1], vision_dim=16, dtype=torch.bfloat16)
for parameter in model.parameters():
    parameter.detach().view(torch.int16).max()  # touch every page, without a copy
print(peak() - before)
"""


def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    config = ModelConfig(16384, 1024, 4096, 4, 16, 16, 64, vision_dim=16)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Prospect(config).state_dict().items() if not is_ours(name)}
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    values = hf_config(config, None)
    del values["prospect"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 190e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(BACKBONES / "llama-2")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert 0.9 < int(done.stdout) / size < 1.15  # below 0.9 the measurement itself would be wrong


# ---- broken directories --------------------------------------------------------------------------


def run_check(capsys, monkeypatch, *arguments: str) -> tuple[int, list[str]]:
    """Exit status and stderr lines of `python -m prospect.weights ...`."""
    monkeypatch.setattr(sys, "argv", ["weights", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_entry_point(weights.main)
    return exit.value.code, capsys.readouterr().err.splitlines()


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, **changes) -> None:
    """Replace tensors of a safetensors file; None removes one. `__` in a keyword stands for a dot."""
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def drop_shard_from_index(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if not file.startswith("model-00002")
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {  # what is done to a good directory, and what the one line must say
    "no config": ("smollm2", lambda d: (d / "config.json").unlink(), "no config.json"),
    "config is not JSON": ("smollm2", lambda d: truncate(d / "config.json", 0.5), "cannot be read"),
    "config is a list": ("smollm2", lambda d: (d / "config.json").write_text("[1]"), "is not a JSON object"),
    "other architecture": (
        "smollm2",
        lambda d: edit_json(d / "config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        "model_type 'gpt2'",
    ),
    "no weights": ("smollm2", lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    "only .bin": ("smollm2", lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "convert the .bin"),
    "truncated file": ("smollm2", lambda d: truncate(d / "model.safetensors", 0.9), "cannot be read"),
    "empty file": ("smollm2", lambda d: truncate(d / "model.safetensors", 0), "cannot be read"),
    "garbage": ("smollm2", lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 4096), "cannot be read"),
    "missing shard": (
        "sharded",
        lambda d: (d / "model-00003-of-00004.safetensors").unlink(),
        "missing shards: model-00003",
    ),
    "shard outside": (
        "sharded",
        lambda d: edit_json(d / "model.safetensors.index.json", weight_map={"model.norm.weight": "../x.safetensors"}),
        "weight_map",
    ),
    "shard not in index": ("sharded", drop_shard_from_index, "missing: "),
    "missing tensor": (
        "smollm2",
        lambda d: edit_tensors(d / "model.safetensors", model__norm__weight=None),
        "missing: model.norm.weight",
    ),
    "unexpected tensor": (
        "smollm2",
        lambda d: edit_tensors(d / "model.safetensors", model__layers__0__self_attn__q_norm__weight=torch.ones(8)),
        "unexpected: model.layers.0.self_attn.q_norm.weight",
    ),
    "wrong shape": (
        "smollm2",
        lambda d: edit_tensors(d / "model.safetensors", model__norm__weight=torch.ones(33)),
        "model.norm.weight is [33], not [32]",
    ),
    "wrong type": (
        "smollm2",
        lambda d: edit_tensors(d / "model.safetensors", model__norm__weight=torch.ones(32, dtype=torch.int8)),
        "model.norm.weight is stored as I8",
    ),
    "no tokenizer": ("smollm2", lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
    "broken tokenizer": ("smollm2", lambda d: truncate(d / "tokenizer.json", 0.5), "tokenizer.json"),
    "another config": (
        "smollm2",
        lambda d: shutil.copy(BACKBONES / "llama-2" / "config.json", d),
        "tensors do not fit",
    ),
}


def make_broken(name: str, directory: Path) -> str:
    kind, damage, expected = BROKEN[name]
    shutil.copytree(BACKBONES / ("sharded-bf16" if kind == "sharded" else kind), directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BACKBONES / "smollm2" / file, directory / file)
    damage(directory)
    return expected


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_ends_in_one_clear_line(name, tmp_path, capsys, monkeypatch):
    expected = make_broken(name, tmp_path / "broken")
    status, lines = run_check(capsys, monkeypatch, "check", str(tmp_path / "broken"))
    assert status == 2
    assert len(lines) == 1 and expected in lines[0] and str(tmp_path / "broken") in lines[0]


def test_the_real_command_ends_in_one_line_too(tmp_path):
    expected = make_broken("missing shard", tmp_path / "broken")
    command = [sys.executable, "-m", "prospect.weights", "check", str(tmp_path / "broken")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and expected in done.stderr


def test_missing_unexpected_and_misshaped_tensors_are_told_together(tmp_path):
    shutil.copytree(BACKBONES / "smollm2", tmp_path, dirs_exist_ok=True)
    edit_tensors(
        tmp_path / "model.safetensors",
        model__norm__weight=None,
        model__extra=torch.ones(1),
        model__embed_tokens__weight=torch.ones(7, 32),
    )
    with pytest.raises(ProspectError) as caught:
        load_model(tmp_path)
    line = str(caught.value)
    assert (
        "missing: model.norm.weight" in line
        and "unexpected: model.extra" in line
        and "model.embed_tokens.weight is [7, 32], not [288, 32]" in line
    )


def test_a_tokenizer_of_another_model_is_noticed(tmp_path, capsys, monkeypatch):
    shutil.copytree(BACKBONES / "smollm2", tmp_path / "small")
    edit_json(tmp_path / "small" / "config.json", vocab_size=287)
    edit_tensors(tmp_path / "small" / "model.safetensors", model__embed_tokens__weight=torch.ones(287, 32))
    status, lines = run_check(capsys, monkeypatch, "check", str(tmp_path / "small"), "--template", "chatml")
    assert status == 2 and "<|im_end|> lie beyond the model's vocabulary of 287" in lines[0]


# ---- export --------------------------------------------------------------------------------------


def make_lora_checkpoint(directory: Path, name: str = "llama-3.2") -> Prospect:
    model = load(name)
    add_lora(model, LoraConfig(rank=4, alpha=8.0, dropout=0.1, targets=["q_proj", "v_proj", "down_proj"]), seed=1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    save_model(model, directory, eos_token_id=287, names={n for n in model.state_dict() if is_ours(n) or "lora" in n})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BACKBONES / "llama-3" / file, directory / file)
    return model.eval()


@torch.inference_mode()
def test_a_lora_checkpoint_is_put_together_with_its_backbone(tmp_path):
    model = make_lora_checkpoint(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = load_model(tmp_path).eval()
    assert_same_tensors(model, again)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), again(ids))


def test_a_lora_checkpoint_knows_its_backbone(tmp_path):
    backbone = tmp_path / "backbone"
    shutil.copytree(BACKBONES / "llama-3.2", backbone)
    model = load_model(backbone, vision_dim=16, image_token_id=288)
    checkpoint = tmp_path / "checkpoint"
    save_model(model, checkpoint, names={name for name in model.state_dict() if is_ours(name)})
    load_model(checkpoint)

    backbone.rename(tmp_path / "moved")
    with pytest.raises(ProspectError, match="is not at .*backbone"):
        load_model(checkpoint)
    shutil.copytree(BACKBONES / "llama-3.1", backbone)  # another shape in its place
    with pytest.raises(ProspectError, match="head_dim 8, not 12"):
        load_model(checkpoint)
    shutil.rmtree(backbone)
    shutil.copytree(tmp_path / "moved", backbone)  # the same shape, fine-tuned
    tensors = load_file(backbone / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 0.01
    save_file(tensors, backbone / "model.safetensors")
    with pytest.raises(ProspectError, match="is not the backbone that this checkpoint was trained on: backbone_mark"):
        load_model(checkpoint)


def test_export_prints_differences_and_can_be_loaded(tmp_path, capsys, monkeypatch):
    model = make_lora_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(sys, "argv", ["weights", "export", str(tmp_path / "checkpoint"), str(tmp_path / "out")])
    weights.main()
    out = capsys.readouterr().out
    for pair in ("adapter and merged", "merged and reloaded", "adapter and reloaded"):
        assert float(out.split(pair)[1].split()[0]) < 1e-4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "prospect.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not any(path.name.endswith(".writing") for path in tmp_path.iterdir())
    exported = load_model(tmp_path / "out").eval()
    assert exported.config.lora is None
    with torch.inference_mode():
        assert (weights.probe(model) - weights.probe(exported)).abs().max() < 1e-4
    plain = load("llama-3.2")
    changed = exported.model.layers[0].self_attn.q_proj.weight - plain.model.layers[0].self_attn.q_proj.weight
    adapted = model.model.layers[0].self_attn.q_proj
    expected = 8.0 / 4 * adapted.lora_B.weight @ adapted.lora_A.weight
    assert changed.abs().max() > 0.01 and torch.allclose(changed, expected, atol=1e-6)
    assert torch.equal(exported.model.layers[0].self_attn.k_proj.weight, plain.model.layers[0].self_attn.k_proj.weight)


def test_export_in_bf16_says_what_rounding_costs(tmp_path):
    make_lora_checkpoint(tmp_path / "checkpoint")
    differences = weights.export(tmp_path / "checkpoint", tmp_path / "out", torch.bfloat16)
    assert differences["adapter and merged"] < 1e-4 < differences["merged and reloaded"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", ["backbone", "exists", "no tokenizer"])
def test_export_refuses(case, tmp_path, capsys, monkeypatch):
    make_lora_checkpoint(tmp_path / "checkpoint")
    source, out, expected = tmp_path / "checkpoint", tmp_path / "out", ""
    if case == "backbone":
        source, expected = BACKBONES / "llama-3", "not a checkpoint"
    elif case == "exists":
        out.mkdir()
        expected = "exists already"
    else:
        (source / "tokenizer.json").unlink()
        expected = "no tokenizer.json"
    status, lines = run_check(capsys, monkeypatch, "export", str(source), str(out))
    assert status == 2 and len(lines) == 1 and expected in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"] + ["out"] * (case == "exists")


@pytest.mark.parametrize("name", ["llama-3.2", "llama-3.1", "smolvlm2", "biases", "qwen2.5", "qwen3"])
def test_an_export_opens_in_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    model = make_lora_checkpoint(tmp_path / "checkpoint", name)
    weights.export(tmp_path / "checkpoint", tmp_path / "out")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    kinds = {"qwen2.5": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    assert type(theirs).__name__ == kinds.get(name, "LlamaForCausalLM")
    assert not any(report.values()), report  # nothing missing, unexpected or mis-shaped
    ids = torch.arange(1, 49).reshape(2, 24)
    with torch.inference_mode():
        assert (theirs.eval()(input_ids=ids).logits - model.lm_head(model(ids))).abs().max() < 1e-4
    assert theirs.config.eos_token_id == 287
    assert (theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()) == (
        name in ("llama-3.2", "qwen2.5")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") == 286


def test_a_checkpoint_of_full_tuning_opens_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    model = make_checkpoint(tmp_path, "llama-3")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(1, 49).reshape(2, 24)
    with torch.inference_mode():
        assert (theirs(input_ids=ids).logits - model.lm_head(model(ids))).abs().max() < 1e-4
