"""Everything that this repository claims of a GPU, measured on one, in stages; the tables are in benchmarks/GPU.md.

    pip install -r requirements-dev.txt -r requirements-vision.txt
    python benchmarks/gpu.py                         all stages without a result, one after another; then GPU.md
    python benchmarks/gpu.py --stage train-3b        this stage, also where it has a result
    python benchmarks/gpu.py --trial --out FOLDER    the same on a CPU in tiny shapes: that it runs, not how fast

A stage is a process of its own that has 8 minutes, and leaves OUT/STAGE.json (by default in runs/gpu). So the work can
be cut anywhere: what is there is kept and skipped. Correctness comes first, against the CPU; where the card computes
something else, nothing else is measured. All weights are random but those of the default run. What transformers does is
measured in the same process, on the same weights, in the same shapes.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository itself, not installed

from benchmarks.gpu_page import Row, page
from benchmarks.limits import matmul_flops, read_bandwidth, synchronise
from benchmarks.stream import Workload, engine, frame_bytes, transformers_loop, transformers_model, workload
from benchmarks.train_step import GEN_KEYS, flop_parts, make_batch, model_config, time_once, transformers_step
from prospect.config import Config, TrainConfig
from prospect.distributed import Ranks
from prospect.errors import ProspectError, run_entry_point
from prospect.files import read_json, read_lines, write_json, write_text
from prospect.memory import memory_of
from prospect.model import IGNORE, Prospect
from prospect.stream import Frame, advance
from prospect.tune import TARGETS, is_adapter, meta_model, parameter_groups, set_trainable, storage_dtype
from prospect.weights import fill_model
from train import train_step

PAGE = ROOT / "benchmarks" / "GPU.md"
SECONDS = 480  # that a stage may take
NEEDED = ("transformers", "peft")  # packages, beside those of requirements.txt
LABELLED = 0.33  # share of tokens that the LM head learns
TOKENS = 32  # of a generated turn
PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}  # dense bf16, FLOP/s, of NVIDIA's data sheets

Step = Callable[[], float]  # takes a step of the optimizer and returns the loss


@dataclass(frozen=True)
class Scale:
    """How large all of it is: on a card, or to try the flow."""

    device: str
    backend: str  # of torch.compile
    shapes: dict[str, str]  # by the names of the stages
    steps: int  # that are timed
    frames: int
    streams: tuple[int, ...]
    tower: tuple[int, int]  # pictures at a time, blocks
    clips: int  # that the default run's model streams
    default_run: tuple[str, ...]  # settings of that run


NAMES = {"3b": "llama-3.2-3b", "1.7b": "smollm2-1.7b", "8b": "llama-3.1-8b"}
TUNED = {"3b": "full", "1.7b": "full", "8b": "lora"}
CARD = Scale("cuda", "inductor", NAMES, 10, 256, (1, 8, 64), (32, 27), 3, ())
SHORT = ("train.max_steps=2", "train.eval_every=2", "infer.evidence=0.5")
TRIAL = Scale("cpu", "aot_eager", {"3b": "tiny", "8b": "tiny"}, 2, 40, (1, 2), (1, 1), 1, SHORT)


# ---- correctness ---------------------------------------------------------------------------------


def new_model(shape: str, config: TrainConfig, device: str) -> Prospect:
    """Random weights, drawn on the CPU from one seed, as train.py would keep them on the device."""
    model = meta_model(model_config(shape)).to(storage_dtype(config))
    set_trainable(model, config)
    fill_model(model, {}, device, 0)
    return model.train()


def our_steps(model: Prospect, config: Config, optimizer: torch.optim.Optimizer, batch: dict) -> Callable[[], Any]:
    """train.py's own step on the same batch again and again."""
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return functools.partial(train_step, model, optimizer, scaler, itertools.repeat(batch), config, Ranks(0, 1, device))


def losses_and_gradients(model: Prospect, precision: str, batch: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a step that moves nothing, and its gradients by name, on the host."""
    config = Config(train=TrainConfig(precision=precision, grad_clip=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda set_to_none: None  # the gradients stay, to be looked at
    step = our_steps(model, config, optimizer, batch)()
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return [float(term) for term in step.terms.values()], gradients


def apart(first: tuple, second: tuple) -> tuple[float, float]:
    """How far losses are apart, of their size; and gradients, of the largest number in each tensor."""
    losses = max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(first[0], second[0]))
    gradients = max(float((g - second[1][n]).abs().max() / g.abs().max().clamp(min=1e-9)) for n, g in first[1].items())
    return losses, gradients


def correctness(scale: Scale) -> list[Row]:
    """Losses, gradients and decisions, against the CPU's in fp32. In bf16 the card may be twice as far off as it is."""
    shape = "tiny" if scale.device == "cpu" else "small"
    batch = make_batch(shape, LABELLED, "cpu")
    model = new_model(shape, TrainConfig(), "cpu")
    on_card = copy.deepcopy(model).to(scale.device)
    exact, rounded = (losses_and_gradients(model, precision, batch) for precision in ("fp32", "bf16"))
    limits = {"fp32": (1e-5, 1e-3), "bf16": tuple(2 * value + 1e-3 for value in apart(exact, rounded))}
    rows = []
    for precision in limits:
        found = apart(exact, losses_and_gradients(on_card, precision, batch))
        for what, difference, limit in zip(("losses", "gradients"), found, limits[precision]):
            rows.append({"what": f"{what} of a step, {precision}", "difference": difference, "limit": limit})

    work, reference = (workload(shape, device, "fp32", scale.frames) for device in (scale.device, "cpu"))
    work.make_ready()
    expected = probabilities(reference, 1, 1, False)  # [1,F,2]
    for streams, lookahead, graphs in ((1, 1, False), (1, 1, True), (1, 32, True), (scale.streams[1], 1, True)):
        difference = float(np.abs(probabilities(work, streams, lookahead, graphs) - expected).max())
        how = f"{streams} stream(s), {lookahead} frame(s) at once, graphs {'on' if graphs else 'off'}"
        rows.append({"what": f"probabilities of a stream, fp32: {how}", "difference": difference, "limit": 1e-4})
    return rows


@torch.inference_mode()
def probabilities(work: Workload, streams: int, lookahead: int, graphs: bool) -> np.ndarray:
    """Of speaking and of updating, at every frame of every stream, [streams,F,2]."""
    sessions, found, at = work.sessions(work.cache(streams, graphs)), [], 0
    while at < len(work.frames):
        records = advance(sessions, [[Frame(row) for row in work.frames[at : at + lookahead]] for _ in sessions])
        found.append([[(record.speaking_prob, record.dst_update_prob) for record in taken] for taken in records])
        at += len(records[0])
    return np.concatenate(found, axis=1)


def default_run(scale: Scale, out: Path) -> list[Row]:
    """The two commands of the README on this machine; what is streamed, against the same checkpoint on the CPU."""
    folder = out / "default-run"
    shutil.rmtree(folder, ignore_errors=True)
    data = [f"data.train={folder}/sample/train.json", f"data.val={folder}/sample/val.json", f"run.out={folder}/runs"]
    seconds = command(["train.py", "config.yaml", *data, f"train.device={scale.device}", *scale.default_run])
    checkpoint = folder / "runs/sample/best"
    rows = [{"what": "`python train.py config.yaml`", "seconds": seconds, "evaluation": evaluation(checkpoint)}]
    streamed: dict[str, list[dict]] = {}
    for name, device, lookahead in (("cpu", "cpu", 32), ("ahead", scale.device, 32), ("each", scale.device, 1)):
        file = folder / f"{name}.jsonl"
        clips = [part for index in range(scale.clips) for part in ("--clip", f"{folder}/sample/val.json:{index}")]
        how = [f"infer.device={device}", f"infer.lookahead={lookahead}", "infer.precision=fp32"]
        seconds = command(["infer.py", *clips, "--checkpoint", str(checkpoint), "--out", str(file), *how])
        streamed[name] = [json.loads(line) for line in read_lines(file)]
        row = {"what": f"`python infer.py` on the {device}, {lookahead} frame(s) at once", "seconds": seconds}
        rows.append(row | {"frames": len(streamed[name])} | records_apart(streamed["cpu"], streamed[name]))
    return rows


def command(arguments: list[str]) -> float:
    """Run a script of ours; the seconds that it took, start of Python included."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ProspectError(f"{arguments[0]} failed: {done.stderr.strip()[-500:]}", where="default-run")
    return time.perf_counter() - started


def evaluation(checkpoint: Path) -> dict[str, float]:
    """What the run found in its last validation."""
    found = read_json(checkpoint / "state.json")["evaluation"]
    return {
        name: found[name] for name in ("loss", "streamed_speaking_event_f1", "streamed_dst_event_f1") if name in found
    }


def records_apart(first: list[dict], second: list[dict]) -> Row:
    """Frames at which two streams differ in what is said, updated or decided; and how far probabilities are apart."""
    said = ("clip_id", "frame_idx", "speaking_decision", "dst_update_decision", "text", "dst_update", "dst_state")
    differ = sum([a[key] for key in said] != [b[key] for key in said] for a, b in zip(first, second, strict=True))
    probabilities = ("speaking_prob", "dst_update_prob")
    difference = max(abs(a[key] - b[key]) for a, b in zip(first, second) for key in probabilities)
    return {"differ": differ, "difference": difference, "limit": 1e-3}


# ---- training ------------------------------------------------------------------------------------


def training(scale: Scale, name: str) -> list[Row]:
    """Tokens per second of a training step: fp32 weights and bf16 arithmetic, as train.py has them; or LoRA in bf16."""
    shape, device = scale.shapes[name], scale.device
    config = Config(
        train=TrainConfig(tune=TUNED[name], precision="bf16", learning_rate=0.0)
    )  # all see the same weights
    batch = make_batch(shape, LABELLED, "cpu")
    config.data.batch_tokens = tokens = int(batch["attention_mask"].sum())
    model = new_model(shape, config.train, device)
    card = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 1e12
    config.train.activation_checkpointing = memory_of(model, config, 1).total > 0.8 * card
    adapters = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    learned = sum(int((batch[key] != IGNORE).sum()) for key in GEN_KEYS)
    given = {
        "shape": f"{shape}, {f'LoRA, rank {config.train.lora_rank}' if adapters else 'all of it'}",
        "tokens": tokens, "learned": learned, "checkpointing": config.train.activation_checkpointing,
        "estimate": memory_of(model, config, 1).total, "flops": flop_parts(shape, batch, adapters),
        "matmul": matmul_flops(device, torch.bfloat16), "peak": peak_flops(device),
    }  # fmt: skip
    makers = {"ours": ours, "ours, compiled": functools.partial(compiled, backend=scale.backend)}
    makers["transformers"] = theirs
    return [given | {"who": who} | measured_steps(make, model, config, batch, scale) for who, make in makers.items()]


def measured_steps(make: Callable[..., Step], model: Prospect, config: Config, batch: dict, scale: Scale) -> Row:
    """Seconds of steps, their first loss, and the peak of memory; or that it does not fit."""
    on_card = scale.device == "cuda"
    model.zero_grad()
    if on_card:
        torch.cuda.empty_cache()
    try:
        step = make(model, config, batch)
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        _, loss = time_once(step, scale.device)
        time_once(step, scale.device)  # the second allocates as all others do
        seconds = [time_once(step, scale.device)[0] for _ in range(scale.steps)]
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    return {"seconds": seconds, "loss": loss, "memory": torch.cuda.max_memory_allocated() if on_card else None}


def ours(model: Prospect, config: Config, batch: dict) -> Step:
    model.model.activation_checkpointing = config.train.activation_checkpointing
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train), fused=True)
    step = our_steps(model, config, optimizer, batch)
    return lambda: float(step().loss)


def compiled(model: Prospect, config: Config, batch: dict, backend: str) -> Step:
    for block in model.model.layers:  # as train.compile=true does
        block.compile(dynamic=True, backend=backend)
    return ours(model, config, batch)


def theirs(model: Prospect, config: Config, batch: dict) -> Step:
    """LlamaForCausalLM, for LoRA with peft's adapters, under the same autocast; both losses in one pass over logits.

    It takes the weights over: the model is ours no longer.
    """
    t, device = config.train, next(model.parameters()).device
    peer = transformers_model(model).requires_grad_(t.tune == "full")
    del model.model, model.lm_head
    if t.tune == "lora":
        import peft

        wanted = peft.LoraConfig(r=t.lora_rank, lora_alpha=t.lora_alpha, target_modules=list(TARGETS))
        peer = peft.get_peft_model(peer, wanted)
    batch = batch | {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "image_embeds")}
    step = transformers_step(peer, model, batch, t.activation_checkpointing, one_pass=True)

    def under_autocast() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            return float(step())

    return under_autocast


def peak_flops(device: str) -> float | None:
    """What NVIDIA says that the card can do, bf16 without sparsity; None for a card that is not in PEAKS."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


# ---- streaming -----------------------------------------------------------------------------------


@torch.inference_mode()
def streaming(scale: Scale, name: str) -> list[Row]:
    """Silent frames, in bf16, for one stream and several, with CUDA graphs and without; then transformers' loop."""
    work = workload(scale.shapes[name], scale.device, "bf16", scale.frames)
    given = {"shape": scale.shapes[name], "frames": len(work.frames), "prompt": len(work.prompt)}
    given["bytes"] = frame_bytes(work.model, len(work.prompt) + len(work.frames) // 2)
    given["bandwidth"] = read_bandwidth(scale.device, torch.bfloat16)
    peer = transformers_model(work.model)
    work.make_ready()
    rows = []
    for streams, lookahead, graphs in [*itertools.product(scale.streams, [1], [True, False]), (1, 32, True)]:
        cache = work.cache(streams, graphs)
        engine(work.sessions(cache), work.frames, lookahead)  # records the graphs of all lengths
        seconds, speaking = engine(work.sessions(cache), work.frames, lookahead)
        graphs = cache.graph is not None
        ahead = f", {lookahead} frames at once" if lookahead > 1 else ""
        row = {"who": f"ours{ahead}", "streams": streams, "graphs": graphs, "seconds": seconds, "speaking": speaking}
        rows.append(given | row | {"shown": streams * len(work.frames)})
    for read_lm_head in (True, False):
        for frames in (work.frames[:1], work.frames):  # the first warms up
            seconds, speaking = transformers_loop(peer, work.model, work.prompt, frames, scale.device, read_lm_head)
        row = {"who": "transformers, LM head" if read_lm_head else "transformers, two heads", "streams": 1}
        row |= {"graphs": None, "seconds": seconds, "speaking": speaking}
        rows.append(given | row | {"shown": len(work.frames)})
    return rows


@torch.inference_mode()
def generation(scale: Scale, name: str) -> list[Row]:
    """Tokens of turns written in all streams at once, in bf16; then transformers, greedily with a growing cache."""
    work = workload(scale.shapes[name], scale.device, "bf16", scale.frames)
    model, device = work.model, torch.device(scale.device)
    peer = transformers_model(model)
    work.make_ready()
    given, rows = {"shape": scale.shapes[name]}, []
    forbidden = torch.tensor([work.tokenizer.image_id, work.tokenizer.end_id], device=device)
    for streams, graphs in itertools.product(scale.streams, [True, False]):
        cache = work.cache(streams, graphs)
        work.sessions(cache)  # read the prompt
        graphs, times = cache.graph is not None, []
        for _ in range(scale.steps + 1):
            started = time.perf_counter()
            turns = model.fast_greedy_generate(
                work.prompt[:4], cache, list(range(streams)), end_ids=[work.tokenizer.end_id],
                max_new_tokens=TOKENS, forbidden=forbidden)  # fmt: skip
            synchronise(scale.device)
            times.append((time.perf_counter() - started, sum(len(turn.ids) for turn in turns)))
            for stream in range(streams):  # the turn is forgotten, so that all are written behind as many tokens
                cache.lengths[stream] = len(work.prompt)
        rows.append(given | {"who": "ours", "streams": streams, "graphs": graphs, "turns": times[1:]})
    times = [their_turn(peer, work.prompt, scale.device) for _ in range(scale.steps + 1)]
    return [*rows, given | {"who": "transformers", "streams": 1, "graphs": None, "turns": times[1:]}]


def their_turn(peer: Any, prompt: list[int], device: str) -> tuple[float, int]:
    """Seconds of TOKENS tokens behind a prompt, and their number."""
    from transformers import DynamicCache

    cache = DynamicCache(config=peer.config)
    peer.model(input_ids=torch.tensor([prompt], device=device), past_key_values=cache, use_cache=True)
    fed = torch.tensor([prompt[:4]], device=device)
    synchronise(device)
    started = time.perf_counter()
    for _ in range(TOKENS):
        hidden = peer.model(input_ids=fed, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        token = int(peer.lm_head(hidden).argmax(-1))
        fed = torch.tensor([[token]], device=device)
    return time.perf_counter() - started, TOKENS


def encoding(scale: Scale) -> list[Row]:
    """Pictures through SigLIP's tower, in fp16."""
    from benchmarks.encode import compare  # here, because it asks for transformers and pillow when it is imported

    batch, layers = scale.tower
    found = compare(torch.device(scale.device), batch, scale.steps, layers)
    given = {"batch": batch, "layers": layers, "flops": found.flops, "difference": found.difference}
    given |= {"matmul": matmul_flops(scale.device, torch.float16), "preparing": found.preparing}
    return [given | {"who": "ours", "rate": found.ours}, given | {"who": "transformers", "rate": found.theirs}]


# ---- stages --------------------------------------------------------------------------------------


def stages(scale: Scale, out: Path) -> dict[str, Callable[[], list[Row]]]:
    """Everything, in the order in which it is done."""
    works = {
        "correctness": functools.partial(correctness, scale),
        "default-run": functools.partial(default_run, scale, out),
    }
    for name in scale.shapes:
        for kind, work in (("train", training), ("stream", streaming), ("generate", generation)):
            works[f"{kind}-{name}"] = functools.partial(work, scale, name)
    return works | {"encode": functools.partial(encoding, scale)}


def machine(scale: Scale) -> str:
    """The card, its driver, and the versions that were measured."""
    from transformers import __version__ as transformers_version

    card = "CPU (a trial of the flow: the figures mean nothing)"
    if scale.device == "cuda":
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0"
        driver = subprocess.run(query, shell=True, capture_output=True, text=True).stdout.strip() or "unknown"
        card = f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"
    return f"{card}; torch {torch.__version__}, transformers {transformers_version}"


def run_stage(name: str, scale: Scale, out: Path) -> None:
    """In a process of its own: measure a stage, and write OUT/NAME.json."""
    started = time.perf_counter()
    rows = stages(scale, out)[name]()
    result = {"stage": name, "machine": machine(scale), "rows": rows, "seconds": time.perf_counter() - started}
    write_json(out / f"{name}.json", result)


def wrong(result: dict[str, Any]) -> list[str]:
    """What of a stage's rows is farther from the CPU's than allowed (NaN is), or says something else."""
    rows = [row for row in result["rows"] if "limit" in row]
    return [row["what"] for row in rows if not row["difference"] <= row["limit"] or row.get("differ")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", choices=list(stages(CARD, Path())), help="this one alone, also where it has a result"
    )
    parser.add_argument("--trial", action="store_true", help="on the CPU, in tiny shapes; needs --out")
    parser.add_argument("--out", type=Path, help="folder of the results and, with --trial, of the page")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale = TRIAL if arguments.trial else CARD
    if arguments.trial and arguments.out is None:
        raise ProspectError("a trial's figures are nobody's", where="--trial", remedy="--out FOLDER")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ProspectError(f"not installed: {', '.join(missing)}", remedy="pip install -r requirements-dev.txt")
    if not arguments.trial and not torch.cuda.is_available():
        raise ProspectError("there is no CUDA device", where="benchmarks/gpu.py", remedy="--trial --out FOLDER")
    out = arguments.out or ROOT / "runs" / "gpu"
    if arguments.child:
        run_stage(arguments.stage, scale, out)
        return 0

    unfinished = []
    for name in [arguments.stage] if arguments.stage else stages(scale, out):
        file = out / f"{name}.json"
        if file.exists() and not arguments.stage:
            print(f"{name}: has a result, {file}", flush=True)
        else:
            print(f"{name}: at most {SECONDS} s", flush=True)
            unfinished += [] if run_child(name, arguments, out) else [name]
        write_text(out / "GPU.md" if arguments.trial else PAGE, page(results(out), list(stages(CARD, out))))
        if file.exists() and (differ := wrong(read_json(file))):
            what = f"not what the CPU computes: {'; '.join(differ)}"
            raise ProspectError(what, where=name, remedy="find out why before anything is measured")
    if unfinished:
        raise ProspectError(f"without a result: {', '.join(unfinished)}", remedy="the lines above say why")
    return 0


def run_child(name: str, arguments: argparse.Namespace, out: Path) -> bool:
    """Run a stage in a process of its own; whether it has left a result."""
    command = [sys.executable, __file__, "--child", "--stage", name, "--out", str(out)]
    command += ["--trial"] if arguments.trial else []
    (out / f"{name}.json").unlink(missing_ok=True)
    child = subprocess.Popen(command, start_new_session=True)
    try:
        return child.wait(SECONDS) == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {SECONDS} s", file=sys.stderr)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and what it has started
        child.wait()


def results(out: Path) -> dict[str, dict[str, Any]]:
    """The stages that have a result."""
    return {name: read_json(out / f"{name}.json") for name in stages(CARD, out) if (out / f"{name}.json").exists()}


if __name__ == "__main__":
    run_entry_point(main)
