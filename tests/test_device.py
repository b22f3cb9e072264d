"""The real code with its tensors on a pretended card (tests/device_counts.py): on the right device, and never waiting.

What is not covered is said there.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import test_naive
import torch
import torch.nn.functional as F
from conftest import raw_clip, read
from device_counts import Counts, PretendedCard, counted, pretended_card
from test_model import test_rows_at_different_positions_and_rollback as streams_at_different_positions
from test_stream import VISION, random_model, stream_config
from tiny import tiny_config, write_tiny_corpus
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from prospect import graph, validation
from prospect.distributed import Ranks
from prospect.stream import Frame, StreamSession, advance, make_cache

REAL_AUTOCAST, REAL_SCALER, REAL_STEP = train.autocast, torch.amp.GradScaler, train.train_step
pytestmark = pytest.mark.usefixtures("one_thread_and_usual_signals")


@pytest.fixture
def card(monkeypatch):
    """A card whose graphs are not recorded: what would be replayed runs again, on the same buffers."""
    monkeypatch.setattr(graph, "recorded", lambda forward: forward)
    monkeypatch.setattr(graph, "STRETCH", 64)
    with pretended_card() as card:
        yield card


# ---- the card that is pretended ------------------------------------------------------------------

SEEN = {
    "a copy": (lambda card, x: torch.ones(2).to(card), Counts(1, 1)),
    "a copy called non_blocking, but not pinned": (
        lambda card, x: torch.ones(2).to(card, non_blocking=True), Counts(1, 1)),
    "a pinned copy that blocks": (lambda card, x: torch.ones(2).pin_memory().to(card), Counts(1, 1)),
    "a pinned copy": (lambda card, x: torch.ones(2).pin_memory().to(card, non_blocking=True), Counts(1, 0)),
    "copy_ to the card": (lambda card, x: x.copy_(torch.ones(3)), Counts(1, 1)),
    "copy_ to the host": (lambda card, x: torch.ones(3).copy_(x), Counts(1, 1)),
    "pinned copy_ to the card": (lambda card, x: x.copy_(torch.ones(3).pin_memory(), non_blocking=True), Counts(1, 0)),
    "a list made a tensor": (lambda card, x: torch.tensor([1, 2], device=card), Counts(1, 1)),
    "cpu": (lambda card, x: x.cpu(), Counts(1, 1)),
    "to cpu": (lambda card, x: x.to("cpu", torch.float64), Counts(1, 1)),
    "like a tensor of the host": (lambda card, x: x.to(torch.ones(1)), Counts(1, 1)),
    "tolist": (lambda card, x: x.tolist(), Counts(1, 1)),
    "item": (lambda card, x: x[0].item(), Counts(0, 1)),
    "float": (lambda card, x: float(x.sum()), Counts(0, 1)),
    "if": (lambda card, x: bool((x > 0).any()), Counts(0, 1)),
    "nonzero": (lambda card, x: x.nonzero(), Counts(0, 1)),
    "a mask as an index": (lambda card, x: x[x > 0], Counts(0, 1)),
    "an index of the host": (lambda card, x: x[torch.tensor([0, 1])], Counts(1, 1)),
    "an index of the host, written": (lambda card, x: x.__setitem__(torch.tensor([0]), 1.0), Counts(1, 1)),
    "a tensor where it already is": (lambda card, x: x.to(card).to(x), Counts(0, 0)),
    "a tensor made there": (lambda card, x: torch.arange(3, device=card) + x.new_zeros(()), Counts(0, 0)),
    "a number of the host": (lambda card, x: x * torch.tensor(2.0), Counts(0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("what", SEEN)
def test_what_passes_between_host_and_card_is_counted(card, what):
    x = torch.arange(3.0, device=card.device)
    action, expected = SEEN[what]
    action(card.device, x)
    assert card.counts() == expected, card.report()
    assert x.device == card.device and (x + 1).device == card.device and x.cpu().device.type == "cpu"


def test_tensors_of_the_host_and_of_the_card_do_not_mix(card):
    x = torch.ones(3, device=card.device)
    for action in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(1)]), lambda: torch.ones(3)[x.long()]):
        with pytest.raises(AssertionError, match="of the host"):
            action()


def test_backward_on_the_card_has_the_cpus_gradient(card):
    def gradient(device: torch.device) -> torch.Tensor:
        weight = torch.linspace(-1, 1, 12).view(4, 3).to(device).requires_grad_()
        embeds = torch.zeros(5, 3, device=device).index_select(0, torch.arange(4, device=device))
        mask = torch.tensor([True, False, True, True]).to(device)
        (embeds.masked_scatter(mask[:, None], weight) ** 2).sum().backward()
        return weight.grad

    expected = gradient(torch.device("cpu"))
    card.events.clear()
    found = gradient(card.device)
    assert found.device == card.device and torch.equal(found.cpu(), expected)
    assert "masked_scatter_backward" in card.report()  # it selects by a mask


# ---- training ------------------------------------------------------------------------------------

WAYS = {
    "fp32": [],
    "fp16": ["train.precision=fp16"],
    "bf16, checkpointing, accumulation": [
        "train.precision=bf16", "train.activation_checkpointing=true", "train.gradient_accumulation_steps=2",
        "loss.bce=focal", "model.tie_word_embeddings=true",
    ],
}  # fmt: skip
MICRO_BATCH = Counts(copies=7, waits=0)  # tokens, frames, and five kinds of targets, all from pinned memory
STEP = Counts(copies=1, waits=1)  # besides: losses and norm, by which the step is taken or not


def trained(folder: Path, device: torch.device, *overrides: str) -> list[dict]:
    """metrics.jsonl of a tiny run, without what a clock has put there."""
    write_tiny_corpus(folder)
    config = tiny_config(folder, "train.max_steps=4", "train.eval_every=4", "train.save_every=4", *overrides)
    assert train.train(config, Ranks(0, 1, device), dry_run=False) == 0
    lines = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def counted_steps(card: PretendedCard, run: Callable[[], list[dict]]) -> tuple[list[dict], list[Counts]]:
    """What a run gives, and what passes in each step, up to the next one: its line in the log is part of it."""
    begun = []

    def step(*arguments):
        begun.append(len(card.events))
        return REAL_STEP(*arguments)

    with mock.patch.object(train, "train_step", step):
        found = run()
    return found, [counted(card.events[first:last]) for first, last in itertools.pairwise(begun)]


def compare_runs(way: str, folder: Path) -> None:
    cpu = torch.device("cpu")
    expected = trained(folder / "cpu", cpu, *WAYS[way])
    with pretended_card() as card:
        found, steps = counted_steps(card, lambda: trained(folder / "card", card.device, *WAYS[way]))
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4 if way == "fp32" else 0.02), (ours["step"], name)
    micro_batches = 2 if "accumulation" in way else 1
    assert steps == [Counts(micro_batches * MICRO_BATCH.copies + STEP.copies, STEP.waits)] * 3, card.report()


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way[:2] == "fp" else way for way in WAYS])
def test_a_run_on_the_card_is_that_on_the_cpu_and_a_micro_batch_never_waits(way, tmp_path, monkeypatch):
    """The whole loop: data, forward, backward, clipping, AdamW, log, validation, checkpoint."""
    for module in (train, validation):  # cuda's autocast and loss scale turn themselves off without one
        monkeypatch.setattr(module, "autocast", lambda config, device: REAL_AUTOCAST(config, torch.device("cpu")))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: REAL_SCALER("cpu", 1024.0, enabled=enabled))
    compare_runs(way, tmp_path)


# ---- streaming -----------------------------------------------------------------------------------


LONGER = [pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 10, 15)]


@pytest.mark.parametrize("seed", [18, *LONGER])
def test_streams_on_the_card_are_those_of_a_naive_engine_on_the_cpu(tokenizer_dir, seed, monkeypatch):
    """Live and as whole clips, side by side, looking ahead, with texts generated, constrained and fed again."""
    monkeypatch.setattr(graph, "recorded", lambda forward: forward)
    monkeypatch.setattr(graph, "STRETCH", 64)
    case = test_naive.random_case(seed, tokenizer_dir).stream_naively()
    with pretended_card() as card:
        case.model.to(card.device)
        test_naive.compare_ways(case)


def stream_on(card: PretendedCard, tokenizer, streams: int, dtype=torch.float32) -> list[StreamSession]:
    """Sessions on the card, one frame already seen by each, that stay silent."""
    config = stream_config()
    model = random_model(tokenizer, 0, dst_state_head=True).to(card.device, dtype)
    clip = read(raw_clip([], 0, 40, inferred_goal="Build it"))
    cache = make_cache(model, config, streams)
    sessions = [StreamSession(model, tokenizer, clip, config, cache=cache, stream=s) for s in range(streams)]
    advance(sessions, [frames(1) for _ in sessions])
    card.events.clear()
    return sessions


def frames(count: int) -> list[Frame]:
    return [Frame(torch.from_numpy(row)) for row in np.ones((count, VISION), np.float32)]


SILENT = {"one": (1, 1), "looking ahead": (1, 8), "several streams": (3, 1)}


@pytest.mark.parametrize("way", SILENT)
def test_a_silent_frame_copies_embeddings_and_places_in_and_waits_for_its_probabilities(card, plain, way):
    streams, ahead = SILENT[way]
    sessions = stream_on(card, plain, streams)
    records = advance(sessions, [frames(ahead) for _ in sessions])
    assert [len(taken) for taken in records] == [ahead] * streams
    assert not any(record.speaking_decision or record.dst_update_decision for taken in records for record in taken)
    assert card.counts() == Counts(3, 1), card.report()


def test_a_frame_behind_a_users_text_also_copies_tokens_and_where_heads_are_read(card, plain):
    [session] = stream_on(card, plain, 1)
    session.say("What now?")
    session.feed(frames(1)[0].embedding)
    assert card.counts() == Counts(5, 1), card.report()


@pytest.mark.parametrize("constrained", [False, True])
def test_a_written_token_copies_itself_and_its_place_in_and_waits_once(card, plain, constrained):
    """Constrained, what is allowed as well."""
    sessions = stream_on(card, plain, 2)
    first = sessions[0]
    allowed = [lambda ids: [65 + len(ids)]] * 2 if constrained else None

    def counts(tokens: int) -> Counts:
        card.events.clear()
        turns = first.model.fast_greedy_generate(
            first.headers["assistant"],
            first.cache,
            [0, 1],
            end_ids=first.end_ids,
            max_new_tokens=tokens,
            forbidden=first.forbidden,
            allowed=allowed,
        )
        assert [len(turn.ids) for turn in turns] == [tokens] * 2
        return card.counts()

    three, eight = counts(3), counts(8)
    assert eight.copies - three.copies == 5 * (4 if constrained else 3), card.report()
    assert eight.waits - three.waits == 5, card.report()


# ---- attention -----------------------------------------------------------------------------------


def cuda_kernel(q, k, v, mask=None, *, is_causal=False, enable_gqa=False) -> str | None:
    """Which fused kernel of CUDA takes these, by the conditions in torch 2.11's transformers/cuda/sdp_utils.cpp.

    None: only the math kernel does, which writes down all scores, T x S for every head. Flash attention needs a card of
    capability 8.0 or more. Those know bf16; fp16 may be on an older one.
    """
    dense = all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v)) and q.shape[-1] <= 256
    square = not is_causal or q.shape[2] == k.shape[2]
    heads = q.shape[1] == k.shape[1] == v.shape[1]
    if dense and square and mask is None and q.dtype == torch.bfloat16 and (heads or enable_gqa):
        return "flash"
    if dense and square and heads and (mask is None or mask.dtype == q.dtype):
        return "memory-efficient"
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_attention_of_grouped_queries_has_a_fused_kernel_on_cuda(card, plain, dtype, monkeypatch):
    """Training, the prompt, one silent frame, several ahead, several streams."""
    attention, kernels = F.scaled_dot_product_attention, []

    def spy(q, k, v, *mask, **options):
        kernels.append(cuda_kernel(q, k, v, *mask, **options))
        return attention(q, k, v, *mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = random_model(plain, 0).to(card.device, dtype)
    model(torch.ones(2, 9, dtype=torch.long, device=card.device))
    assert kernels == ["flash" if dtype == torch.bfloat16 else "memory-efficient"] * 2  # layers
    for streams, ahead in SILENT.values():
        sessions = stream_on(card, plain, streams, dtype)
        advance(sessions, [frames(ahead) for _ in sessions])
    assert len(kernels) > 20 and None not in kernels


def test_attention_on_a_cpu_is_fused_too():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        streams_at_different_positions()
