"""The model: cache and full forward, rotary positions, joint embedding, greedy generation, and the losses by hand."""

import math

import pytest
import torch
from torch import Tensor

from prospect import model as model_file
from prospect.config import LossConfig
from prospect.model import (
    IGNORE,
    LOSS_CLASSES,
    KVCache,
    ModelConfig,
    Prospect,
    RopeScaling,
    count_labels,
    find_targets,
    init_weights,
    labelled,
    loss_sums,
    loss_terms,
    repeats,
    rope_frequencies,
    rotate,
)

VOCAB, IMAGE, END, VISION = 40, 40, 1, 6  # <image> lies beyond the vocabulary, as after loading a pretrained backbone


def make_model(seed: int = 0, **fields) -> Prospect:
    """A small model with weights large enough that every position matters."""
    shape = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=6, vision_dim=VISION, image_token_id=IMAGE)  # fmt: skip
    model = Prospect(ModelConfig(**{**shape, **fields}))
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=draw)
    return model.eval()


def empty_cache(model: Prospect, batch: int, capacity: int = 64) -> KVCache:
    return KVCache(model.config, batch, capacity, torch.device("cpu"), torch.float32)


# ---- the KV cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 7], [1, 2, 3, 6], [11, 1]])
@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "attention_bias": True}])
@torch.inference_mode()
def test_cached_equals_full_forward_however_it_is_cut(chunks, fields):
    model = make_model(**fields)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (1, 12), generator=draw)
    ids[0, [3, 4, 9]] = IMAGE
    rows = torch.randn(3, VISION, generator=draw)
    full = model(ids, rows)

    cache, parts, begin, seen = empty_cache(model, 2), [], 0, 0
    for length in chunks:
        part = ids[:, begin : begin + length]
        images = int((part == IMAGE).sum())
        parts.append(model(part, rows[seen : seen + images] if images else None, cache=cache, streams=[1]))
        begin, seen = begin + length, seen + images
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=1e-5)
    assert cache.lengths == [0, 12]


@torch.inference_mode()
def test_rows_at_different_positions_and_rollback():
    """Streams in one cache, each forward padded to its longest, whole or in part rolled back, equal fresh forwards."""
    model, draw = make_model(), torch.Generator().manual_seed(2)
    cache, held = empty_cache(model, 4), [[] for _ in range(4)]

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    for _ in range(40):
        rows = [row for row in range(4) if number(0, 1)] or [2]  # neighbours or not, one or several
        new = [[number(2, VOCAB - 1) for _ in range(number(1, 5))] for _ in rows]
        T = max(map(len, new))
        hidden = model(torch.tensor([ids + [0] * (T - len(ids)) for ids in new]), cache=cache, streams=rows)
        for b, (row, ids) in enumerate(zip(rows, new)):
            held[row] += ids
            fresh = model(torch.tensor([held[row]]))[0, -len(ids) :]
            torch.testing.assert_close(hidden[b, : len(ids)], fresh, atol=1e-5, rtol=1e-5)
            held[row] = held[row][: len(held[row]) - number(0, len(ids))] if len(held[row]) < 50 else []
            cache.lengths[row] = len(held[row])


@torch.inference_mode()
def test_padding_may_reach_beyond_the_capacity():
    model = make_model()
    cache = empty_cache(model, 2, capacity=10)
    model(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]), cache=cache, streams=[0])
    hidden = model(torch.tensor([[13, 0, 0, 0, 0], [14, 15, 16, 17, 18]]), cache=cache, streams=[0, 1])
    cache.lengths = [9, 5]
    last = model(torch.tensor([[19]]), cache=cache, streams=[0])
    full = model(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 19]]))
    torch.testing.assert_close(hidden[0, 0], full[0, 8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last[0, 0], full[0, 9], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden[1], model(torch.tensor([[14, 15, 16, 17, 18]]))[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_full_forward_is_causal_and_right_padding_changes_nothing():
    model = make_model()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    changed = torch.tensor([[5, 6, 7, 8, 20, 21]])
    assert torch.allclose(model(ids)[:, :4], model(changed)[:, :4], atol=1e-6)
    assert not torch.allclose(model(ids)[:, 4:], model(changed)[:, 4:], atol=1e-2)


# ---- rotary positions ----------------------------------------------------------------------------


def rope_config(head_dim: int, scaling: RopeScaling | None = None) -> ModelConfig:
    return ModelConfig(vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
                       num_key_value_heads=1, head_dim=head_dim, rope_theta=10000.0, rope_scaling=scaling)  # fmt: skip


def test_rope_frequencies():
    assert rope_frequencies(rope_config(8)).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_llama3_scaling():
    """2048 tokens are 325.9, 32.6, 3.259 and 0.326 turns: kept, kept, between 1 and 4 turns, slowed 8 times.

    Between: a share of (3.2595 - 1) / (4 - 1) = 0.75316 is kept, so 0.01 * (0.75316 + 0.24684 / 8) = 0.0078402.
    """
    scaling = RopeScaling(8.0, 1.0, 4.0, 2048)
    assert rope_frequencies(rope_config(8, scaling)).tolist() == pytest.approx(
        [1.0, 0.1, 0.0078402, 0.000125], rel=1e-5
    )


def test_rotate_turns_pairs_half_a_head_apart():
    """Dimensions 0, 2 turn by 0.5 radians, 1, 3 by 2: cos and sin are 0.877583, 0.479426 and -0.416147, 0.909297."""
    angles = torch.tensor([0.5, 2.0, 0.5, 2.0]).view(1, 1, 1, 4)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    turned = rotate(x, angles.cos(), angles.sin() * torch.tensor([-1, -1, 1, 1])).flatten().tolist()
    assert turned == pytest.approx([0.877583, -0.909297, 0.479426, -0.416147], abs=1e-6)


def test_frequencies_stay_in_fp32_when_the_model_does_not():
    model = make_model()
    before = model.model.rope_frequencies.clone()
    model.to(torch.bfloat16)
    assert model.model.rope_frequencies.dtype == torch.float32 and torch.equal(model.model.rope_frequencies, before)


# ---- joint_embed ---------------------------------------------------------------------------------


@torch.inference_mode()
def test_joint_embed_puts_rows_at_images_in_reading_order():
    model = make_model()
    ids = torch.tensor([[5, IMAGE, 6, IMAGE], [IMAGE, 7, 8, 9]])
    rows = torch.randn(3, VISION)
    embeds = model.joint_embed(ids, rows)
    table, project = model.model.embed_tokens.weight, model.mm_projector
    for (b, t), row in {(0, 1): 0, (0, 3): 1, (1, 0): 2}.items():
        torch.testing.assert_close(embeds[b, t], project(rows[row]))
    for b, t in [(0, 0), (0, 2), (1, 1), (1, 2), (1, 3)]:
        assert torch.equal(embeds[b, t], table[ids[b, t]])


# ---- generation ----------------------------------------------------------------------------------


def naive_greedy(model: Prospect, ids: list[int], forbidden: set[int], limit: int) -> list[int]:
    """The likeliest token again and again, each time by one forward over everything."""
    written = []
    while len(written) < limit:
        logits = model.lm_head(model(torch.tensor([ids + written]))[0, -1]).tolist()
        best = max((token for token in range(VOCAB) if token not in forbidden), key=logits.__getitem__)
        if best == END:
            break
        written.append(best)
    return written


@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_generation_equals_a_naive_loop_without_cache(seed):
    model = make_model(seed)
    model.lm_head.weight[END] *= 2  # so that some turns end before the limit
    contexts, header, ends = [[4, 5, 6], [7], [8, 9, 10, 11, 12]], [20, 21], [END, 22]
    cache = empty_cache(model, 4)
    for row, ids in enumerate(contexts):
        model(torch.tensor([ids]), cache=cache, streams=[row])
    turns = model.fast_greedy_generate(
        header, cache, [0, 1, 2], end_ids=ends, max_new_tokens=9, forbidden=torch.tensor([0, 2])
    )
    for row, (ids, turn) in enumerate(zip(contexts, turns)):
        assert turn.ids == naive_greedy(model, ids + header, {0, 2}, 9)
        assert turn.cut == (
            "limit" if len(turn.ids) == 9 and naive_greedy(model, ids + header, {0, 2}, 10) != turn.ids else None
        )
        # Header, text and end tokens are all in the cache: the next token sees what it would see in training.
        everything = ids + header + turn.ids + ends
        assert cache.lengths[row] == len(everything)
        after = model(torch.tensor([[25]]), cache=cache, streams=[row])
        torch.testing.assert_close(after[0, 0], model(torch.tensor([everything + [25]]))[0, -1], atol=1e-5, rtol=1e-5)
    assert cache.lengths[3] == 0


@torch.inference_mode()
def test_generation_writes_only_what_is_allowed():
    model = make_model()
    cache = empty_cache(model, 2)
    script = {0: [5], 1: [6, 7], 2: [END]}
    seen: list[list[int]] = []

    def allowed(ids: list[int]) -> list[int]:
        seen.append(list(ids))
        return script[len(ids)]

    turns = model.fast_greedy_generate([20], cache, [0, 1], end_ids=[END], max_new_tokens=9,
                                       forbidden=torch.tensor([0]), allowed=[allowed, lambda ids: [END]])  # fmt: skip
    assert turns[0].ids[0] == 5 and turns[0].ids[1] in (6, 7) and len(turns[0].ids) == 2 and turns[1].ids == []
    assert seen == [[], [5], turns[0].ids]


def test_repeats():
    assert not repeats([1, 1, 1, 1])  # "10000" in digits
    assert not repeats([9] + [1] * 15)
    assert repeats([9] + [1] * 16)
    assert repeats([9, 8] + [1, 2] * 8)
    assert not repeats([9, 8] + [1, 2] * 7 + [1, 3])
    assert repeats([7] + [1, 2, 3, 4, 5] * 4)
    assert not repeats([7] + [1, 2, 3, 4, 5] * 3)
    assert repeats(list(range(16)) * 4)
    assert not repeats(list(range(17)) * 4)
    assert not repeats([])


# ---- the losses ----------------------------------------------------------------------------------


def test_labelled_shifts_generation_by_one_and_decisions_not_at_all():
    """Two sequences of four: index = row * 4 + column of the hidden state that is read."""
    x = IGNORE
    generation = torch.tensor([[x, x, 7, 8], [9, x, x, 5]])  # 9 stands first: nothing stands before it to learn it
    index, label = labelled(generation, shift=True)
    assert (index.tolist(), label.tolist()) == ([1, 2, 6], [7, 8, 5])
    decisions = torch.tensor([[x, 1, x, 0], [0, x, x, 1]])
    index, label = labelled(decisions, shift=False)
    assert (index.tolist(), label.tolist()) == ([1, 3, 4, 7], [1, 0, 0, 1])


def hand_model(**fields) -> Prospect:
    """H = 2 and heads that read the hidden state: both decisions' logit is h[0]; token logits are h[0], h[1], 0."""
    model = make_model(vocab_size=3, hidden_size=2, num_attention_heads=1, num_key_value_heads=1, head_dim=2, **fields)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        for head in (model.speaking_decision_head, model.dst_update_head):
            if head is not None:
                head.weight.copy_(torch.tensor([[1.0, 0.0]]))
                head.bias.zero_()
        if model.dst_state_head is not None:
            model.dst_state_head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
            model.dst_state_head.bias.zero_()
    return model


def no_labels(B: int, T: int) -> dict[str, Tensor]:
    keys = ("speaking_gen_labels", "speaking_labels", "dst_gen_labels", "dst_update_labels", "dst_state_labels")
    return {key: torch.full((B, T), IGNORE) for key in keys}


def values(sums: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in sums.items()}


def hand_case() -> tuple[Tensor, dict[str, Tensor]]:
    """One sequence of five. ln 3 as a logit is a probability of 3/4."""
    hidden = torch.tensor(
        [[[math.log(3), 0.0], [0.0, 0.0], [-math.log(3), 0.0], [math.log(2), math.log(5)], [0.0, 0.0]]]
    )
    labels = no_labels(1, 5)
    labels["speaking_labels"][0] = torch.tensor([1, 0, 1, IGNORE, IGNORE])  # given 3/4, 1/2 and 1/4 to "speak"
    labels["dst_update_labels"][0] = torch.tensor([IGNORE, 1, 0, 0, IGNORE])  # given 1/2, 1/4 and 2/3 to "update"
    labels["speaking_gen_labels"][0] = torch.tensor([IGNORE, 0, IGNORE, IGNORE, 1])  # read at 0: 3/5; at 3: 5/8
    labels["dst_gen_labels"][0] = torch.tensor([IGNORE, IGNORE, 2, IGNORE, IGNORE])  # read at 1: 1/3
    labels["dst_state_labels"][0] = torch.tensor([IGNORE, IGNORE, IGNORE, 0, IGNORE])  # read at 3: 2/8
    return hidden, find_targets(labels)


def nll(*probabilities: float) -> float:
    return -sum(math.log(p) for p in probabilities)


def test_every_loss_class_by_hand():
    hidden, targets = hand_case()
    sums = loss_sums(hand_model(dst_state_head=True), hidden, targets, LossConfig())
    expected = [nll(3 / 5, 5 / 8), nll(3 / 4, 1 / 4), nll(1 / 2), nll(1 / 3), nll(1 / 2), nll(3 / 4, 1 / 3), nll(1 / 4)]
    assert values(sums) == pytest.approx(dict(zip(LOSS_CLASSES, expected, strict=True)), rel=1e-5)
    assert all(value.dtype == torch.float32 for value in sums.values())
    assert [int(count) for count in count_labels(targets).values()] == [2, 2, 1, 1, 1, 2, 1]


def test_mean_and_balanced_by_hand():
    hidden, targets = hand_case()
    sums, counts = loss_sums(hand_model(dst_state_head=True), hidden, targets, LossConfig()), count_labels(targets)
    mean = {name: float(value) for name, value in loss_terms(sums, counts, LossConfig()).items()}
    assert mean == pytest.approx({
        "speaking_gen": nll(3 / 5, 5 / 8) / 2,
        "speaking_binary": nll(3 / 4, 1 / 4, 1 / 2) / 3,
        "dst_gen": nll(1 / 3),
        "dst_binary": nll(1 / 2, 3 / 4, 1 / 3) / 3,
        "dst_state": nll(1 / 4),
    }, rel=1e-5)  # fmt: skip
    balanced = loss_terms(sums, counts, LossConfig(bce="balanced"))
    assert float(balanced["speaking_binary"]) == pytest.approx((nll(3 / 4, 1 / 4) / 2 + nll(1 / 2)) / 2, rel=1e-5)
    assert float(balanced["dst_binary"]) == pytest.approx((nll(1 / 2) + nll(3 / 4, 1 / 3) / 2) / 2, rel=1e-5)


def test_focal_by_hand():
    """alpha (1 - p)^2 (-log p): 0.25 for positives, 0.75 for negatives; p is what the right answer was given."""
    hidden, targets = hand_case()
    sums = values(loss_sums(hand_model(), hidden, targets, LossConfig(bce="focal")))
    positives = 0.25 * (0.25**2 * nll(3 / 4) + 0.75**2 * nll(1 / 4))
    assert sums["speaking_pos"] == pytest.approx(positives, rel=1e-5)
    assert sums["speaking_neg"] == pytest.approx(0.75 * 0.5**2 * nll(1 / 2), rel=1e-5)
    assert sums["speaking_gen"] == pytest.approx(nll(3 / 5, 5 / 8), rel=1e-5)  # generation is no decision


def test_focal_parameters_by_hand():
    """alpha 0.9, gamma 1: 0.9 for positives, 0.1 for negatives, times 1 - p. The state head has gamma alone."""
    hidden, targets = hand_case()
    loss = LossConfig(bce="focal", focal_alpha=0.9, focal_gamma=1.0, dst_state_focal=True)
    sums = values(loss_sums(hand_model(dst_state_head=True), hidden, targets, loss))
    assert sums["speaking_pos"] == pytest.approx(0.9 * (0.25 * nll(3 / 4) + 0.75 * nll(1 / 4)), rel=1e-5)
    assert sums["speaking_neg"] == pytest.approx(0.1 * 0.5 * nll(1 / 2), rel=1e-5)
    assert sums["dst_pos"] == pytest.approx(0.9 * 0.5 * nll(1 / 2), rel=1e-5)
    assert sums["dst_neg"] == pytest.approx(0.1 * (0.25 * nll(3 / 4) + 2 / 3 * nll(1 / 3)), rel=1e-5)
    assert sums["dst_state"] == pytest.approx(0.75 * nll(1 / 4), rel=1e-5)
    loss = LossConfig(bce="focal", dst_state_focal=True)  # gamma 2
    assert values(loss_sums(hand_model(dst_state_head=True), hidden, targets, loss))["dst_state"] == pytest.approx(
        0.75**2 * nll(1 / 4), rel=1e-5
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_certain_answers_has_a_finite_gradient(gamma):
    """At p = 1 the derivative of (1 - p)^0.5 is infinite; that of the loss is not."""
    losses = torch.tensor([0.0, 1e-30, 1.0], requires_grad=True)
    model_file.focal(losses, gamma).sum().backward()
    assert losses.grad.isfinite().all()
    p = math.exp(-1)  # by the product rule: gamma (1 - p)^(gamma - 1) p * 1 + (1 - p)^gamma
    assert float(losses.grad[2]) == pytest.approx(gamma * (1 - p) ** (gamma - 1) * p + (1 - p) ** gamma, rel=1e-5)


@pytest.mark.parametrize("bce", ["mean", "balanced", "focal"])
def test_without_labels_every_term_is_zero_and_every_parameter_has_a_gradient(bce):
    model = make_model(dst_state_head=True)
    targets, ids = find_targets(no_labels(2, 5)), torch.tensor([[5, IMAGE, 6, 7, 8], [9, 10, 11, 12, 13]])
    loss = LossConfig(bce=bce, dst_state_focal=bce == "focal")
    terms = loss_terms(model(ids, torch.randn(1, VISION), targets=targets, loss=loss), count_labels(targets), loss)
    assert [float(term.detach()) for term in terms.values()] == [0.0] * 5
    sum(terms.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(float(parameter.grad.abs().sum()) == 0.0 for parameter in model.parameters())


def test_model_without_task_state():
    model = make_model(dst=False)
    labels, ids = no_labels(1, 4), torch.tensor([[5, IMAGE, 6, 7]])
    labels["speaking_labels"][0, 1] = 1
    sums = values(model(ids, torch.randn(1, VISION), targets=find_targets(labels)))
    assert model.dst_update_head is None and sums["speaking_pos"] > 0
    assert [sums[name] for name in ("dst_gen", "dst_pos", "dst_neg", "dst_state")] == [0.0] * 4


@pytest.mark.parametrize("dst", [True, False])
def test_model_without_speaking_head(dst):
    """The LM's own answer is all there is to decide by; the other losses are those of a model that has the head."""
    model = make_model(speaking_head=False, dst=dst)
    assert model.speaking_decision_head is None
    labels, ids = no_labels(1, 4), torch.tensor([[5, IMAGE, 6, 7]])
    labels["speaking_labels"][0, 1], labels["dst_update_labels"][0, 1], labels["speaking_gen_labels"][0, 2] = 1, 1, 6
    rows = torch.randn(1, VISION)
    sums = values(model(ids, rows, targets=find_targets(labels)))
    assert (sums["speaking_pos"], sums["speaking_neg"]) == (0.0, 0.0) and sums["speaking_gen"] > 0
    assert (sums["dst_pos"] > 0) == dst
    with torch.no_grad():
        hidden = model(ids, rows)
        found = model.decision_probabilities(hidden, "lm", END)
        expected = 1 - model.lm_head(hidden).softmax(-1)[..., END]
    assert found.keys() == ({"speaking", "dst"} if dst else {"speaking"})
    torch.testing.assert_close(found["speaking"], expected)


def test_lm_head_sees_only_labelled_positions():
    model = make_model()
    hidden, labels = torch.randn(2, 50, 24), no_labels(2, 50)
    labels["speaking_gen_labels"][0, 10:13] = 5
    labels["speaking_gen_labels"][1, 0] = 5  # cannot be learned: nothing stands before it
    labels["dst_gen_labels"][1, 20:22] = 6
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].numel() // 24))
    loss_sums(model, hidden, find_targets(labels), LossConfig())
    assert rows == [3 + 2]  # replies and updates in one call


def test_chunked_generation_loss_equals_unchunked(monkeypatch):
    model, labels = make_model(), no_labels(2, 12)
    drawn = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    labels["speaking_gen_labels"][:, :8] = drawn[
        :, :8
    ]  # 14 learned positions, and 8 of updates: a chunk of 5 holds both
    labels["dst_gen_labels"][:, 8:] = drawn[:, 8:]
    hidden = torch.randn(2, 12, 24, requires_grad=True)
    found = []
    for chunk in (4096, 5):
        monkeypatch.setattr(model_file, "LM_CHUNK", chunk)
        model.zero_grad()
        hidden.grad = None
        sums = loss_sums(model, hidden, find_targets(labels), LossConfig())
        (sums["speaking_gen"] + 2 * sums["dst_gen"]).backward()
        both = torch.stack((sums["speaking_gen"], sums["dst_gen"])).detach()
        found.append((both, hidden.grad, model.lm_head.weight.grad.clone()))
    logits = model.lm_head(hidden).log_softmax(-1).detach()
    by_hand = [
        -sum(float(logits[b, t - 1, drawn[b, t]]) for b in range(2) for t in turn)
        for turn in (range(1, 8), range(8, 12))
    ]
    torch.testing.assert_close(found[0][0], torch.tensor(by_hand), atol=1e-4, rtol=1e-5)
    for whole, cut in zip(*found):
        torch.testing.assert_close(cut, whole, atol=1e-4, rtol=1e-5)


def test_losses_come_from_fp32_logits():
    """1000 tokens at -log(1/3): a bf16 running sum would stop growing long before 1098.6."""
    model = hand_model().to(torch.bfloat16)
    labels = no_labels(1, 1001)
    labels["speaking_gen_labels"][0, 1:] = 2
    sums = loss_sums(model, torch.zeros(1, 1001, 2, dtype=torch.bfloat16), find_targets(labels), LossConfig())
    assert sums["speaking_gen"].dtype == torch.float32 and float(sums["speaking_gen"]) == pytest.approx(
        1000 * math.log(3), rel=1e-4
    )


def test_init_weights_is_seeded_and_scales_the_residual_stream():
    first, second = make_model(1, hidden_size=128, head_dim=32), make_model(2, hidden_size=128, head_dim=32)
    for model in (first, second):
        init_weights(model, 7)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    block = first.model.layers[0]
    assert float(block.self_attn.q_proj.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(block.self_attn.o_proj.weight.detach().std()) == pytest.approx(128**-0.5 / 2, rel=0.05)  # 2 layers
    assert float(block.input_layernorm.weight.detach().min()) == 1.0
    assert float(first.speaking_decision_head.bias.detach()) == 0.0
