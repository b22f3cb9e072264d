"""The loop's parts: schedule, order of the data, precision, compilation; and the script as a user runs it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from tiny import tiny_config, train_here, write_tiny_config, write_tiny_corpus
from torch.utils._python_dispatch import TorchDispatchMode

import train
from prospect import data, thresholds, tuning
from prospect.build import load_corpus
from prospect.checkpoint import TrainState, read_state
from prospect.config import TrainConfig
from prospect.data import COUNTED, DataOrder, StepSampler, collate
from prospect.errors import ProspectError
from prospect.load import load_for_inference, load_job
from prospect.sequence import LABEL_KEYS, Sample, clip_prompt, prompt_pieces
from prospect.stream import StreamSession
from prospect.tuning import EVIDENCE, best_tried, try_evidence
from prospect.validation import note_validation, out_of_patience

SCRIPT = Path(train.__file__)
STREAMED = "infer.evidence=null"  # found on streamed validation clips


pytestmark = pytest.mark.usefixtures("one_thread_and_usual_signals")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_tiny_corpus(folder)
    return folder


def losses(folder: Path, name: str, *overrides: str) -> list[dict]:
    assert train_here(folder, f"run.name={name}", *overrides) == 0
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


# ---- pure functions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]),  # half-way through the fall: (1 + 0.1) / 2
        ("linear", [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_schedule_by_hand(schedule, expected):
    config = TrainConfig(warmup_steps=2, min_lr_ratio=0.1, schedule=schedule)
    steps = [0, 1, 2, 6, 10, 99]  # the fall is from step 2 to step 10
    assert [train.learning_rate(step, 10, config, 1.0) for step in steps] == pytest.approx(expected)
    assert train.learning_rate(1, 10, config, 3.0) == 3.0
    quarter = train.learning_rate(4, 10, config, 1.0)
    assert quarter == pytest.approx(
        {"cosine": 0.1 + 0.9 * 0.853553, "linear": 0.775, "constant": 1.0}[schedule], rel=1e-5
    )


# Ten sequences of 10, 20, ... 100 tokens and 100 tokens a micro-batch.
ORDER = DataOrder(np.arange(10, 101, 10), batch_tokens=100, seed=0)


def taken(
    world: int, accumulate: int, steps: int, place: tuple[int, int] = (0, 0)
) -> list[list[list[list[tuple[int, int]]]]]:
    """Steps x ranks x micro-batches x keys."""
    samplers = [iter(StepSampler(ORDER, *place, r, world, accumulate)) for r in range(world)]
    return [[[next(sampler) for _ in range(accumulate)] for sampler in samplers] for _ in range(steps)]


def flat(steps) -> list[tuple[int, int]]:
    return sorted(key for step in steps for rank in step for micro in rank for key in micro)


def test_an_epoch_shows_every_sequence_once_and_epochs_differ():
    per_epoch = len(ORDER.batches(0))
    stream = ORDER.stream(0, 0)
    first = [next(stream) for _ in range(per_epoch)]
    assert {epoch for epoch, _ in first} == {0}
    assert sorted(index for _, batch in first for index in batch) == list(range(10))
    assert next(stream)[0] == 1
    assert ORDER.batches(0) != ORDER.batches(1)
    assert all(ORDER.lengths[batch].max() * len(batch) <= 100 for batch in ORDER.batches(0))


def test_places_count_over_epochs():
    per_epoch = len(ORDER.batches(0))
    assert ORDER.advance(0, 0, 1) == (0, 1)
    assert ORDER.advance(0, per_epoch - 1, 1) == (1, 0)
    assert ORDER.advance(0, 0, per_epoch + len(ORDER.batches(1)) + 2) == (2, 2)
    assert ORDER.left(0, 0, 1) == per_epoch and ORDER.left(0, 3, 1) == per_epoch - 3 and ORDER.left(1, 0, 1) == 0


def test_the_end_of_very_many_epochs_is_known_at_once_and_stays_where_it_is(monkeypatch):
    counted = sum(len(ORDER.batches(epoch)) for epoch in range(COUNTED))
    assert ORDER.left(0, 0, 10**9) == counted + (10**9 - COUNTED) * len(ORDER.batches(0))
    monkeypatch.setattr(data, "COUNTED", 3)
    order = DataOrder(np.random.default_rng(0).integers(5, 50, size=100), batch_tokens=100, seed=0)
    sizes = [len(order.batches(epoch)) for epoch in range(20)]
    whole = sum(sizes[:3]) + 17 * sizes[0]
    assert whole != sum(sizes)
    taken, place = 0, (0, 0)
    while taken < whole:
        assert order.left(*place, 20) == whole - taken
        taken, place = taken + 1, order.advance(*place, 1)
    assert order.left(*place, 20) == 0


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 4), (2, 2), (4, 1), (3, 2)])
def test_ranks_share_each_step_without_gap_or_repetition(world, accumulate):
    steps = taken(world, accumulate, 3)
    stream = ORDER.stream(0, 0)
    for step in steps:
        expected = [next(stream) for _ in range(world * accumulate)]
        assert flat([step]) == sorted((epoch, index) for epoch, batch in expected for index in batch)
        assert [len(rank) for rank in step] == [accumulate] * world


def test_another_number_of_ranks_goes_on_at_the_same_place():
    """Two steps of two ranks are eight sequences' batches; then one rank: no batch is missed, none is seen twice."""
    place = ORDER.advance(0, 0, 2 * 2 * 1)
    together = flat(taken(2, 1, 2)) + flat(taken(1, 1, 6, place))
    assert sorted(together) == flat(taken(1, 1, 10))


def test_work_is_dealt_out_by_tokens():
    """Four micro-batches by size a >= b >= c >= d: one rank gets a and d, the other b and c."""
    (step,) = taken(2, 2, 1)
    sizes = [[max(ORDER.lengths[index] for _, index in micro) * len(micro) for micro in rank] for rank in step]
    a, b, c, d = sorted((size for rank in sizes for size in rank), reverse=True)
    assert sizes == [[a, d], [b, c]]


def test_padding_to_a_multiple_adds_nothing_to_learn():
    def sample(ids: list[int]) -> Sample:
        labels = {key: np.array([1, 0, -100][: len(ids)]) for key in LABEL_KEYS}
        nothing = np.zeros(0)
        return Sample("a", "a", np.array(ids), np.zeros((0, 2)), labels, nothing, nothing, nothing, None)

    samples = [sample([5, 6, 7]), sample([5])]
    padded = collate(samples, 9, multiple=4)
    assert padded["input_ids"].tolist() == [[5, 6, 7, 9], [5, 9, 9, 9]]
    assert padded["attention_mask"].tolist() == [[True, True, True, False], [True, False, False, False]]
    assert all(padded[key].tolist() == [[1, 0, -100, -100], [1, -100, -100, -100]] for key in LABEL_KEYS)
    # Read at: row * 4 + column, tokens one earlier (the first has nothing before it).
    learned = {key: target.tolist() for key, target in padded["targets"].items()}
    tokens, decisions = [[0], [0]], [[0, 1, 4], [1, 0, 1]]
    assert learned == {
        "speaking_gen_labels": tokens, "speaking_labels": decisions, "dst_gen_labels": tokens,
        "dst_update_labels": decisions, "dst_state_labels": decisions,
    }  # fmt: skip
    assert collate(samples, 9)["input_ids"].shape == collate(samples, 9, multiple=3)["input_ids"].shape == (2, 3)
    # labels by class, tokens, tokens with padding
    assert [float(count) for count in train.tally(padded).values()] == [1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 3.0, 4.0, 8.0]


# ---- the loop ------------------------------------------------------------------------------------


def test_data_workers_change_nothing(corpus):
    alone = losses(corpus, "alone", "train.max_steps=4")
    assert losses(corpus, "workers", "train.max_steps=4", "data.workers=2") == alone


def test_a_bad_clip_found_by_a_worker_is_one_error(tmp_path, monkeypatch):
    """The clip was good when the run began; the error crosses the process boundary whole."""
    write_tiny_corpus(tmp_path)
    schedule = train.learning_rate

    def spoil(step, *rest):
        if step == 0:
            for path in (tmp_path / "embeddings").glob("clip*"):
                path.write_bytes(b"nothing")
        return schedule(step, *rest)

    monkeypatch.setattr(train, "learning_rate", spoil)
    with pytest.raises(ProspectError) as caught:
        train_here(tmp_path, "data.workers=1", "train.max_steps=30")
    assert "_embeddings.npy" in str(caught.value) and "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()  # a worker ignores SIGTERM: one that is left would hang the exit


def test_half_precision_follows_full(corpus):
    """To 1 % of the loss over six steps: 8 bits of each product, sums in fp32."""
    full = [line["loss"] for line in losses(corpus, "full", "train.eval_every=99") if "lr" in line]
    half = [
        line["loss"] for line in losses(corpus, "bf16", "train.precision=bf16", "train.eval_every=99") if "lr" in line
    ]
    assert half == pytest.approx(full, rel=0.01) and half != full


def test_streams_of_float16_rows_are_tuned_in_bf16(tmp_path):
    """As published features are stored. Autocast on a CPU refuses to concatenate float16."""
    write_tiny_corpus(tmp_path)
    for path in (tmp_path / "embeddings").iterdir():
        np.save(path, np.load(path).astype(np.float16))
    assert train_here(tmp_path, "train.precision=bf16", "train.max_steps=1", STREAMED) == 0
    assert read_state(tmp_path / "runs" / "tiny" / "best").thresholds["evidence"] in EVIDENCE


def test_a_step_copies_each_weight_to_16_bits_once(corpus, monkeypatch):
    """However many micro-batches it has, and though checkpointing runs every block twice."""
    step, copied = train.train_step, []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
                copied[-1].append(kwargs["dtype"])
            return func(*args, **(kwargs or {}))

    def watched(*arguments):
        copied.append([])
        with Copies():
            return step(*arguments)

    monkeypatch.setattr(train, "train_step", watched)
    cut = ("train.gradient_accumulation_steps=4", "train.activation_checkpointing=true")
    losses(corpus, "cast", "train.precision=bf16", "train.max_steps=2", *cut)
    # Seven matrices in each of two layers; weights and biases of two projector layers and of three heads; the LM head.
    assert copied == [[torch.bfloat16] * (2 * 7 + 2 * 2 + 3 * 2 + 1)] * 2


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_from_a_handful_of_graphs(corpus, monkeypatch):
    """Every micro-batch has another shape. The backend only counts graphs and runs them as they are."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, backend=counting, **options))
    torch._dynamo.reset()
    eager = losses(corpus, "eager", "train.max_steps=9", STREAMED)
    compiled = losses(corpus, "compiled", "train.max_steps=9", "train.compile=true", STREAMED)
    for a, b in zip(eager, compiled, strict=True):
        assert a["step"] == b["step"]
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["counts"] == a["counts"]
    # Two layers; each while training and while evaluating; for batches of one and of more. Streaming compiles nothing.
    assert 2 <= len(graphs) <= 2 * 2 * 2
    assert not any("keys" in graph.code for graph in graphs)  # of a cache


@pytest.mark.slow
def test_inductor_gives_the_same_losses(corpus):
    eager = losses(corpus, "eager2", "train.max_steps=3")
    compiled = losses(corpus, "inductor", "train.max_steps=3", "train.compile=true")
    for a, b in zip(eager, compiled, strict=True):
        assert b.get("loss", 0) == pytest.approx(a.get("loss", 0), rel=1e-5)


def test_a_gradient_that_is_not_finite_stops_before_the_update_or_is_skipped_with_a_bound(corpus, monkeypatch):
    """The loss is finite, so every clip of the step is named; nothing of it reaches the weights."""
    clip = nn.utils.clip_grad_norm_
    calls = []

    def poisoned(parameters, limit):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) >= 3:
            parameters[0].grad[0, 0] = torch.inf
        return clip(parameters, limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", poisoned)
    often = ("train.save_every=1", "train.eval_every=99")
    with pytest.raises(ProspectError, match=r"the gradient of step 3 is not finite \(clips \w+"):
        train_here(corpus, "run.name=stop", *often)
    assert read_state(corpus / "runs/stop/last").step == 2
    calls.clear()
    monkeypatch.setattr(train, "MAX_SKIPS", 4)
    with pytest.raises(ProspectError, match="the gradient of step 3"):
        train_here(corpus, "run.name=skip", *often, "train.nonfinite=skip")
    lines = [json.loads(line) for line in (corpus / "runs/skip/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 3, 3] and len(calls) == 7
    assert len({line["skipped"] for line in lines[2:]}) > 1  # the data goes on


def test_a_loss_that_is_not_finite_names_clip_and_frames(tmp_path):
    """Values that are finite as stored, and overflow in the projector."""
    write_tiny_corpus(tmp_path)
    [brief] = [clip for clip in json.loads((tmp_path / "train.json").read_text()) if clip["id"] == "brief"]
    first, last = brief["start_frame_idx"], brief["end_frame_idx"]
    np.save(tmp_path / "embeddings/brief_embeddings.npy", np.full((last - first + 1, 16), 3e38, np.float32))
    with pytest.raises(ProspectError, match=r"the loss of step \d is not finite") as caught:
        train_here(tmp_path, "data.batch_tokens=512", "train.max_steps=9", "train.eval_every=99")
    assert f"brief: frames {first}..{last} of video brief, {first / 2:.1f} to {last / 2:.1f} s" in str(caught.value)


def test_without_a_speaking_head_the_lm_decides_in_training_and_live(corpus, tmp_path, monkeypatch):
    """Trained, validated, stopped, resumed, streamed: everywhere the probability of speaking is 1 - P(end token)."""
    monkeypatch.setattr(tuning, "EVIDENCE", (0.5,))
    lm = ("model.speaking_head=false", "data.silence_lm=true", "infer.decision=lm", STREAMED)
    whole = losses(corpus, "headless", *lm, "train.eval_every=99")
    unstreamed = ("infer.evidence=0.5", "train.eval_every=99")
    assert losses(corpus, "halved", *lm, *unstreamed, "train.max_steps=3")[-1]["step"] == 3
    halved = losses(corpus, "halved", *lm, *unstreamed)
    assert [line["loss"] for line in halved if "lr" in line][3:] == [line["loss"] for line in whole if "lr" in line][3:]
    assert {line["speaking_binary"] for line in whole if "lr" in line} == {0.0}
    assert any(line["counts"]["speaking_pos"] for line in whole if "lr" in line)  # the labels are there all the same
    evaluation = whole[-1]["evaluation"]
    assert {"speaking_event_f1", "dst_event_f1", "streamed_speaking_event_f1"} <= evaluation.keys()

    checkpoint = corpus / "runs/headless/last"
    with safe_open(checkpoint / "prospect.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("speaking_decision_head")]
    config, tokenizer, model = load_for_inference(checkpoint)
    assert config.infer.speaking_threshold == evaluation["speaking_even_odds"]
    job, _ = load_job(load_corpus(config, tokenizer, "val").sources[0], 0, config.model.vision_dim)
    session = StreamSession(model, tokenizer, job.clip, config)
    probability = session.feed(np.array(job.embeddings[0])).speaking_prob
    ids = tokenizer.encode(prompt_pieces(clip_prompt(job.clip, job.clip.initial_state, config.data), tokenizer))
    with torch.no_grad():
        last = model(torch.tensor([[*ids, tokenizer.image_id]]), torch.from_numpy(np.array(job.embeddings[0])))[0, -1]
        assert probability == pytest.approx(1 - float(model.lm_head(last).softmax(-1)[tokenizer.end_id]), abs=1e-5)

    for override, told in (
        ("infer.decision=heads", "it needs infer.decision=lm"),
        ("data.silence_lm=false", "it needs data.silence_lm=true"),
        ("train.tune=heads", "it needs train.tune=lora or full"),
    ):
        with pytest.raises(ProspectError, match=told):
            tiny_config(tmp_path, *lm, override)
    with pytest.raises(ProspectError, match="it needs infer.decision=lm"):
        load_for_inference(checkpoint, ["infer.decision=heads"])
    with pytest.raises(ProspectError, match="the model has no speaking head"):
        StreamSession(model, tokenizer, job.clip, replace(config, infer=replace(config.infer, decision="heads")))


def test_a_run_as_long_as_its_epochs(corpus):
    """Two epochs of nine micro-batches."""
    assert (
        losses(corpus, "epochs", "train.max_steps=null", "train.num_epochs=2", "train.eval_every=99")[-1]["step"] == 18
    )


# ---- validation ----------------------------------------------------------------------------------


def test_validation_streams_and_stores_the_evidence_that_did_best(corpus, capsys):
    lines = [line["evaluation"] for line in losses(corpus, "streamed", STREAMED) if "evaluation" in line]
    shown = [line for line in capsys.readouterr().out.splitlines() if "validation loss" in line]
    assert len(lines) == len(shown) == 2
    names = {"speaking_event_f1": "speaking F1", "dst_event_f1": "update F1", "joint_goal_accuracy": "joint goal",
             "replies_right_f1": "replies right"}  # fmt: skip
    for evaluation, line in zip(lines, shown):
        for name in ("speaking_event_precision", "valid_update_ratio", "state_head_accuracy"):
            assert f"streamed_{name}" in evaluation
        for name, title in names.items():
            assert f"{title} {evaluation[f'streamed_{name}']:.3f}" in line

    state = read_state(corpus / "runs/streamed/last")
    odds = {head: lines[-1][f"{head}_even_odds"] for head in ("speaking", "dst")}
    assert state.thresholds == odds | {"evidence": state.thresholds["evidence"]}
    assert state.thresholds["evidence"] in EVIDENCE

    # The checkpoint, loaded and searched again, gives the same evidence and the same numbers.
    config, tokenizer, model = load_for_inference(corpus / "runs/streamed/last")
    val = load_corpus(config, tokenizer, "val")
    jobs = [load_job(val.sources[entry.file], entry.clip, config.model.vision_dim)[0] for entry in val.entries]
    best = best_tried(list(try_evidence(model, tokenizer, jobs, config, odds)), "mean")
    assert best.evidence == state.thresholds["evidence"]
    assert {f"streamed_{name}": value for name, value in best.numbers.items()} == pytest.approx(
        {name: value for name, value in lines[-1].items() if name.startswith("streamed_")})  # fmt: skip


def test_validation_data_is_made_by_the_workers_and_the_numbers_stay(corpus, tmp_path, monkeypatch):
    made, real = tmp_path / "made", thresholds.make_batch

    def noted(*arguments):
        with open(made, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        return real(*arguments)

    monkeypatch.setattr(thresholds, "make_batch", noted)
    short = ["train.max_steps=1"]
    found = []
    for workers in (0, 2):
        made.unlink(missing_ok=True)
        found.append(losses(corpus, f"workers{workers}", *short, f"data.workers={workers}"))
        assert (str(os.getpid()) in made.read_text().split()) == (workers == 0)
    assert found[0] == found[1] and found[0][-1]["evaluation"]["loss"] > 0


def test_streaming_leaves_training_as_it_was(corpus):
    """The same losses with and without it: it draws nothing, and changes no weight and no mode."""
    streamed = [line["loss"] for line in losses(corpus, "with", STREAMED, "train.eval_every=1") if "loss" in line]
    without = [line["loss"] for line in losses(corpus, "without", "train.eval_every=99") if "loss" in line]
    assert streamed == without


def test_with_evidence_set_nothing_is_streamed(corpus):
    lines = [line for line in losses(corpus, "set", "infer.evidence=0.6") if "evaluation" in line]
    assert lines and not any(name.startswith("streamed_") for line in lines for name in line["evaluation"])
    assert read_state(corpus / "runs/set/last").thresholds.keys() == {"speaking", "dst"}
    assert load_for_inference(corpus / "runs/set/last")[0].infer.evidence == 0.6


def test_where_clips_cannot_be_streamed_evidence_is_not_chosen(corpus, capsys):
    """One line says so, and why; the run goes on."""
    settings = (STREAMED, "data.on_bad=skip", "infer.reserved=490")
    lines = [line["evaluation"] for line in losses(corpus, "forced", *settings) if "evaluation" in line]
    shown = capsys.readouterr().out.splitlines()
    told = [line for line in shown if "infer.evidence is not chosen" in line]
    assert len(told) == len(lines) == 2 and all(
        "of the prompt and 1 of a frame do not fit into 22" in line for line in told
    )
    assert sum(line.startswith("not streamed in validation: ") and "clip val" in line for line in shown) == 3
    assert not any(name.startswith("streamed_") for name in lines[-1])
    odds = {head: lines[-1][f"{head}_even_odds"] for head in ("speaking", "dst")}
    assert read_state(corpus / "runs/forced/last").thresholds == odds
    [*_, last] = [line for line in shown if "validation loss" in line]
    assert f"speaking F1 {lines[-1]['speaking_event_f1']:.3f}" in last and "joint goal" not in last


def test_the_best_is_chosen_by_loss_or_by_the_combined_score():
    """Written by hand: the second validation has the better score, the third the lower loss; then streaming ends."""
    validations = [(2.0, 0.50), (2.5, 0.75), (1.5, 0.70), (1.0, None), (0.9, None)]
    chosen = {"loss": [1, 1, 3, 4, 5], "combined": [1, 2, 2, 4, 5]}  # the last two have the same F1
    for best_by, steps in chosen.items():
        state = TrainState()
        for step, (loss, score) in enumerate(validations, start=1):
            state.step = step
            numbers = {"loss": loss, "speaking_event_f1": 0.9, "dst_event_f1": 0.4}  # teacher-forced, always the same
            note_validation(state, numbers | ({"streamed_combined_score": score} if score else {}), {}, best_by)
            assert state.best_step == steps[step - 1], (best_by, step)
            assert out_of_patience(state, 1) == (step != state.best_step) and not out_of_patience(state, None)
        assert (state.best_by, state.best_value) == {
            "loss": ("loss", -0.9), "combined": ("teacher-forced event F1", 0.65)}[best_by]  # fmt: skip


def test_of_like_scores_the_lowest_loss_is_best_and_what_brings_no_better_one_is_counted():
    """Written by hand."""
    validations = [(2.0, 0.5), (2.1, 0.5), (1.9, 0.5), (1.0, 0.4), (1.9, 0.5), (3.0, 0.6)]
    validations += [(2.5, 0.58), (2.4, 0.56), (2.6, 0.59), (2.3, 0.62)]  # within 0.03 of 0.6, and not of 0.58
    state, found = TrainState(), []
    for step, (loss, score) in enumerate(validations, start=1):
        state.step = step
        numbers = {"loss": loss, "streamed_combined_score": score}
        note_validation(state, numbers, {}, "combined")
        found.append((state.best_step, state.since_best, state.loss_of_best))
        assert [out_of_patience(state, n) for n in (1, 2)] == [state.since_best >= n for n in (1, 2)]
    assert found[:6] == [(1, 0, 2.0), (1, 1, 2.0), (3, 0, 1.9), (3, 1, 1.9), (3, 2, 1.9), (6, 0, 3.0)]
    assert found[6:] == [(7, 0, 2.5), (7, 1, 2.5), (7, 2, 2.5), (10, 0, 2.3)] and state.highest == 0.62
    state.loss_of_best, state.highest, state.step = None, None, 11  # as an older checkpoint has it
    note_validation(state, {"loss": 9.0, "streamed_combined_score": 0.62}, {}, "combined")
    assert (state.best_step, state.loss_of_best) == (11, 9.0)
    state.since_best, state.step = 3, 12
    note_validation(state, {"loss": 5.0, "streamed_combined_score": 0.9}, {}, "loss")  # resumed with another measure
    assert (state.best_step, state.best_by, state.best_value, state.since_best) == (12, "loss", -5.0, 0)


def test_a_run_that_gets_no_better_ends_early_and_resumes_as_if_never_stopped(corpus, capsys):
    """A learning rate of 0 leaves every validation as the first was."""
    still = ["train.learning_rate=0", "train.eval_every=1", "train.save_every=2", "train.patience=3"]
    validations = [line for line in losses(corpus, "still", *still) if "evaluation" in line]
    assert [(line["step"], line["best_step"]) for line in validations] == [(1, 1), (2, 1), (3, 1), (4, 1)]
    printed = capsys.readouterr().out
    f1 = f"{(validations[0]['evaluation']['speaking_event_f1'] + validations[0]['evaluation']['dst_event_f1']) / 2:.4f}"
    assert f"best so far: teacher-forced event F1 {f1} at step 1  patience 2 of 3\n" in printed
    assert "done: 4 steps of 6, then out of patience (train.patience); the best checkpoint is" in printed
    assert "steps, 0.7 epochs; ends after 3 validations in a row without a better best\n" in printed

    losses(corpus, "halfway", *still, "train.max_steps=3")  # which is saved, as the last step is
    assert losses(corpus, "halfway", *still) == losses(corpus, "still", *still)
    whole, halves = (read_state(corpus / "runs" / name / "last") for name in ("still", "halfway"))
    assert (whole.step, whole.since_best) == (4, 3) and whole == halves
    assert "nothing to do: step 4 of 6 is done; raise train.patience, or" in capsys.readouterr().out
    assert [line["step"] for line in losses(corpus, "still", *still, "train.patience=4")][-1] == 5


def test_a_run_keeps_the_checkpoint_of_the_best_combined_score(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "EVIDENCE", (0.5,))  # streamed once at each validation
    lines = losses(corpus, "combined", STREAMED, "train.eval_every=2", "train.keep=1")  # chosen by it by default
    scores = {line["step"]: line["evaluation"]["streamed_combined_score"] for line in lines if "evaluation" in line}
    of_loss = {line["step"]: line["evaluation"]["loss"] for line in lines if "evaluation" in line}
    best = min((step for step in scores if scores[step] >= max(scores.values()) - 0.03), key=of_loss.get)
    assert len(scores) == 3 and [line["best_step"] for line in lines if "best_step" in line][-1] == best
    checkpoint = corpus / "runs/combined/best"
    state = read_state(checkpoint)
    assert (state.step, state.best_step, state.best_value) == (best, best, scores[best])
    printed = capsys.readouterr().out
    assert f"(step {best}, by combined score of streamed clips)" in printed
    shown = [line.partition("best so far: ")[2] for line in printed.splitlines() if "best so far: " in line]
    assert len(shown) == 3 and shown[2].startswith(
        f"combined score of streamed clips {scores[best]:.4f} at step {best}"
    )

    stored = json.loads((checkpoint / "state.json").read_text())  # as it was before there was a choice
    del stored["best_by"], stored["best_value"], stored["loss_of_best"], stored["highest"], stored["since_best"]
    for best_loss, value in ((1.25, -1.25), (None, None)):
        (tmp_path / "state.json").write_text(json.dumps(stored | {"best_loss": best_loss}))
        old = read_state(tmp_path)
        assert (old.best_by, old.best_value, old.highest, old.loss_of_best) == ("loss", value, value, best_loss)


# ---- the script itself ---------------------------------------------------------------------------


def script(*arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=environment, **pipes, **options)


def test_ctrl_c_saves_and_the_next_start_goes_on(tmp_path):
    write_tiny_corpus(tmp_path)
    config = str(write_tiny_config(tmp_path, "train.max_steps=100000", "train.eval_every=50", "train.save_every=50"))
    running = script(config)
    log = tmp_path / "runs/tiny/metrics.jsonl"
    until = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 75 and "start again to resume" in errors and "Traceback" not in errors
    step = read_state(tmp_path / "runs/tiny/last").step
    output, errors = script(config, f"train.max_steps={step + 2}").communicate(timeout=60)
    assert f"step {step}\n" in output and f"done: {step + 2} steps" in output, errors


def test_mistakes_end_with_one_line_and_status_2(tmp_path):
    write_tiny_corpus(tmp_path)
    config = str(write_tiny_config(tmp_path))
    for arguments, expected in (
        (
            (config, "train.learning_rat=1", "train.paralel=ddp"),
            "unknown key train.learning_rat (did you mean train.learning_rate?)",
        ),
        ((config, f"data.train={tmp_path / 'no.json'}"), "no such clip file"),
    ):
        running = script(*arguments)
        output, errors = running.communicate(timeout=60)
        assert running.returncode == 2 and expected in errors, errors
        assert errors.startswith("error: ") and errors.count("\n") == 1
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists()
