"""The streaming engine against tests/naive.py, the same engine without cache, look-ahead or neighbours.

And the losses of a batch against the same by hand. Everything is random: models, clips, what a user says live, and
every setting that streaming reads. Several streams share a cache that was full of NaN before they came.
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sample_of
from naive import REQUEST, Naive
from test_stream import ROUNDED, STRATEGIES, firing, random_clip, random_model, rows_of, stream_config

from prospect.clips import Clip, Turn
from prospect.config import Config
from prospect.data import collate
from prospect.decisions import reference_moments
from prospect.dst import STATES
from prospect.errors import ProspectError
from prospect.model import IGNORE, LOSS_CLASSES, Prospect, RopeScaling
from prospect.prepared import prepare
from prospect.sequence import Sample, clip_prompt, prompt_pieces
from prospect.stream import Job, StreamSession, advance, make_cache, stream_jobs
from prospect.tokenizer import Piece, Tokenizer

BACKBONES = Path(__file__).parent / "fixtures" / "backbones"  # tokenizers with merges; in two <image> comes last
BYTES = "one token for each byte"
TOKENIZERS = [
    (BYTES, "plain"), (BYTES, "chatml"), (BYTES, "llama3"), ("smollm2", "chatml"), ("llama-3", "llama3"),
    ("smolvlm2", "smolvlm"),
]  # fmt: skip
SAYINGS = ["What now?", "積木 \U0001f600", "<image>", "S1->start", "no"]
STRETCHED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@dataclass
class Case:
    """What is streamed, and how; and what the naive engine records of each clip and why it ended early, if it did."""

    model: Prospect
    tokenizer: Tokenizer
    jobs: list[Job]
    config: Config
    draw: np.random.Generator
    margin: float = 0.0
    expected: dict[str, tuple[list[dict], str | None]] | None = None

    @property
    def decided(self) -> bool:
        """Whether no decision is so close that rounding takes it."""
        return self.margin >= 1e-5

    def stream_naively(self) -> "Case":
        naive = Naive(self.model, self.tokenizer, self.config)
        self.expected = {
            job.clip.id: naive.stream(job.clip, job.embeddings, job.moments is not None) for job in self.jobs
        }
        self.margin = naive.margin
        return self

    def records(self) -> list[dict]:
        return [record for records, _ in self.expected.values() for record in records]


# ---- random cases --------------------------------------------------------------------------------


def talked_to(draw: np.random.Generator, clip: Clip) -> Clip:
    """The clip with up to four more texts of the user at random frames, two of them perhaps at one."""
    turns = []
    for number in range(int(draw.integers(0, 5))):
        frame = clip.start_frame + int(draw.integers(0, clip.num_frames))
        frame = turns[-1].end_frame if turns and draw.random() < 0.2 else frame
        turns.append(Turn("user", SAYINGS[int(draw.integers(len(SAYINGS)))], (), frame, frame, 100 + number))
    return replace(clip, turns=(*clip.turns, *turns))


def random_case(
    seed: int, tokenizer_dir: Path, *, large: bool = False, more_room: int = 0, kind: str = "llama", **fixed
) -> Case:
    """Two or three clips with a model and settings of their own; fixed: settings of InferConfig that are not drawn.

    large: one long clip of ten tokens a frame, in a context of more than a thousand. more_room: tokens of the context.
    kind: of transformer, ModelConfig.model_type.
    """
    draw = np.random.default_rng([16, seed])

    def pick(*options):
        return options[int(draw.integers(len(options)))]

    folder, template = TOKENIZERS[seed % len(TOKENIZERS)]
    tokenizer = Tokenizer(tokenizer_dir if folder == BYTES else BACKBONES / folder, template)
    dst, per_frame = bool(draw.random() < 0.85), 10 if large else pick(1, 1, 2, 3, 10)
    last = tokenizer.image_id == tokenizer.vocab_size - 1  # then the model need not know it
    model = random_model(
        tokenizer, seed, dst=dst, dst_state_head=dst and pick(True, False), num_hidden_layers=pick(1, 2, 3),
        vocab_size=tokenizer.vocab_size + pick(0, 0, 7, -1 if last else 0), num_key_value_heads=pick(1, 2, 4),
        attention_bias=pick(True, False), mlp_bias=pick(True, False), tie_word_embeddings=pick(True, False, False),
        rope_scaling=pick(None, None, STRETCHED), model_type=kind,
    )  # fmt: skip
    model.lm_head.weight.data[tokenizer.end_id] *= pick(1.0, 1.6)
    if seed % 4 == 1:  # it would rather write role marks and frames than words
        others = [id for id in tokenizer.control_ids() if id != tokenizer.end_id and id < model.config.vocab_size]
        model.lm_head.weight.data[others] *= 3.0
    jobs = []
    for number in range(1 if large else pick(2, 2, 3)):
        clip = talked_to(draw, random_clip(draw, f"clip{number}", 150 if large else int(draw.integers(1, 36))))
        moments = reference_moments(clip) if seed % 7 == 4 else None  # then the reference decides when to write
        jobs.append(Job(clip, rows_of(draw, clip.num_frames, per_frame), moments))

    constrained = dst and bool(draw.random() < 0.35)
    infer = dict(
        strategy=pick(*STRATEGIES, "slide", "slide", "slide", "none"), decision=pick("heads", "heads", "heads", "lm"),
        smoothing=pick(1.0, 0.5, 0.3), coupling=pick(0.0, 0.5, 2.0, 100.0), max_reply_tokens=pick(4, 8, 24),
        max_update_tokens=60 if constrained else pick(4, 8), constrain_dst=constrained,
    )  # fmt: skip
    infer["max_summary_tokens"] = {4: 8, 8: 24, 24: 4}[infer["max_reply_tokens"]]
    infer |= fixed
    data = dict(
        dst=dst, dst_format=pick("arrow", "json"), overlap=pick(0.0, 0.25, 0.5, 0.9), recipe=pick(True, False, False)
    )
    wide = stream_config(
        **(infer | {"strategy": "slide"}), data=data | {"max_seq_len": 2000}
    )  # in which no stream ends
    wide = firing(model, tokenizer, jobs, wide, pick(0.03, 0.1, 0.2))
    config = replace(wide, infer=replace(wide.infer, strategy=infer["strategy"]))

    # Room for the longest prompt, for what may be said at a frame, and for a few frames more.
    def tokens(pieces: list[Piece]) -> int:
        return len(tokenizer.encode(pieces))

    summarized, template = infer["strategy"].startswith("summarize"), tokenizer.template
    header = tokens(template.header("DST_UPDATE")) + tokens(template.suffix()) + 1
    request = tokens(template.turn("user", REQUEST) + template.suffix())
    replying = infer["max_reply_tokens"] + header + (infer["max_update_tokens"] + header if dst else 0)
    summarizing = infer["max_summary_tokens"] + header + request if summarized else 0
    config.infer.reserved = max(replying, summarizing) + pick(0, 20)
    longest = replace(config.data, recipe=config.data.recipe or summarized)
    summary = "x" * 3 * infer["max_summary_tokens"] if summarized else ""
    prompts = [
        clip_prompt(job.clip, dict.fromkeys(job.clip.initial_state, state), longest, summary)
        for job in jobs
        for state in STATES
    ]
    said = [tokens([piece for text in texts for piece in template.turn("user", text) + template.suffix()])
            for job in jobs for texts in job.said.values()]  # fmt: skip
    room = max([1, *said]) * (4 if infer["strategy"] == "drop_middle" else 1) + 1050 * large + more_room
    room += per_frame * int(draw.integers(1, 9)) + pick(0, 30)
    prompt = max(tokens(prompt_pieces(text, tokenizer)) for text in prompts)
    config.data.max_seq_len = prompt + room + config.infer.reserved
    return Case(model, tokenizer, jobs, config, draw)


# ---- the engine, in two ways ---------------------------------------------------------------------

Found = dict[str, tuple[list[dict], ProspectError | None]]  # by clip: its records, and the error that ended it early


def as_jobs(case: Case, lookahead: int, streams: int) -> Found:
    """Whole clips, side by side; one by one where one of them will be refused."""
    config, found = copy.deepcopy(case.config), {job.clip.id: ([], None) for job in case.jobs}
    config.infer.lookahead = lookahead
    refusals = any(refused for _, refused in case.expected.values())
    for jobs in [[job] for job in case.jobs] if refusals else [case.jobs]:
        try:
            for job, records in stream_jobs(case.model, case.tokenizer, jobs, config, streams=streams):
                found[job.clip.id][0].extend(record.to_dict() for record in records)
        except ProspectError as error:
            [job] = jobs
            found[job.clip.id] = found[job.clip.id][0], error
    return found


def live(case: Case) -> Found:
    """Frame by frame through `say` and `feed`, now this stream and now that; or several in one step.

    The sessions do not know what the users will say. Their cache has held other things before.
    """
    draw, cache = case.draw, make_cache(case.model, case.config, len(case.jobs) + 1)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    rows = draw.permutation(len(case.jobs) + 1).tolist()
    running: list[tuple[Job, StreamSession]] = []
    found: Found = {}
    for job, row in zip(case.jobs, rows):
        header = replace(job.clip, turns=tuple(turn for turn in job.clip.turns if turn.role == "system"))
        found[job.clip.id] = [], None
        session = StreamSession(
            case.model, case.tokenizer, header, case.config, cache=cache, stream=row, moments=job.moments
        )
        running.append((job, session))
    refusals = any(refused for _, refused in case.expected.values())
    while running:
        if not refusals and draw.random() < 0.3:
            step = sorted(running, key=lambda pair: pair[1].stream)[: int(draw.integers(1, len(running) + 1))]
            upcoming = [job.frames(session.next_row, 1) for job, session in step]
            for (job, _), [record] in zip(step, advance([session for _, session in step], upcoming)):
                found[job.clip.id][0].append(record.to_dict())
        else:
            job, session = running[int(draw.integers(len(running)))]
            row = session.next_row
            try:
                for text in job.said.get(row, []):
                    session.say(text)
                found[job.clip.id][0].append(session.feed(job.embeddings[row]).to_dict())
            except ProspectError as error:
                found[job.clip.id] = found[job.clip.id][0], error
                running.remove((job, session))
        running = [(job, session) for job, session in running if session.next_row < len(job.embeddings)]
    return found


def compare(case: Case, found: Found, way: str) -> None:
    """Hold all that the engine has recorded against the naive records."""
    for name, (records, refused) in case.expected.items():
        ours, error = found[name]
        assert len(ours) == len(records), (name, way, error)
        for ours_here, theirs in zip(ours, records):
            compare_record(ours_here, theirs, name, f"{name}, frame {theirs['frame_idx']}, {way}")
        assert (error is None) == (refused is None), (name, way, error)
        if refused:
            [job] = [job for job in case.jobs if job.clip.id == name]
            assert f"frame {job.clip.start_frame + len(records)}" in str(error), (name, way)


def compare_record(ours: dict, theirs: dict, name: str, where: str) -> None:
    ours, theirs = dict(ours), dict(theirs)
    assert ours.pop("clip_id") == name
    invalid, event = ours.pop("invalid_update"), dict(ours["context_event"] or {})
    if event:
        assert event.pop("seconds") > 0
    ours["context_event"] = event or None
    theirs["context_event"] = theirs.pop("event")
    assert theirs.pop("invalid") == (None if ours["dst_update"] is None else invalid is not None), where
    numbers = [[record.pop(field) or 0.0 for field in ROUNDED] for record in (ours, theirs)]
    np.testing.assert_allclose(*numbers, atol=1e-4, err_msg=where)
    assert ours == theirs, where


def compare_ways(case: Case) -> None:
    """Live, and as whole clips; by then at the latest with the layers that streaming uses."""
    if case.draw.random() < 0.5:
        prepare(case.model)
    compare(case, live(case), f"live, prepared: {case.model.model.prepared is not None}")
    prepare(case.model)
    lookahead, streams = (1, 2, 7, 32)[int(case.draw.integers(4))], int(case.draw.integers(1, 4))
    compare(case, as_jobs(case, lookahead, streams), f"look-ahead {lookahead}, {streams} streams")


# ---- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed, kind", [(1, "llama"), (10, "qwen2"), (15, "qwen3"), (18, "llama")]
)  # small ones; the last is told when to write
def test_streaming_equals_a_naive_engine(tokenizer_dir, seed, kind):
    case = random_case(seed, tokenizer_dir, kind=kind).stream_naively()
    records = case.records()
    assert case.decided and any(record["event"] for record in records)
    assert sum(record["speaking_decision"] for record in records) >= 3
    compare_ways(case)


BLOCKS, OF = 8, 25  # 200 cases


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_streaming_equals_a_naive_engine_hundreds_of_times(tokenizer_dir, block):
    names = ("speaking_decision", "dst_update_decision", "event", "user", "text_cut", "dst_update_cut", "invalid")
    counts = dict.fromkeys(names, 0)
    undecided = applied = refused = 0
    for seed in range(100 + block * OF, 100 + block * OF + OF):
        case = random_case(seed, tokenizer_dir, kind=("llama", "qwen2", "qwen3")[seed % 5 % 3]).stream_naively()
        if not case.decided:
            undecided += 1
            continue
        compare_ways(case)
        refused += sum(why is not None for _, why in case.expected.values())
        applied += sum(record["invalid"] is False for record in case.records())
        for what in counts:
            counts[what] += sum(bool(record[what]) for record in case.records())
    print(counts, "applied", applied, "refused", refused, "not compared", undecided)
    assert undecided <= OF // 5 and applied and all(count > 5 for count in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_drop_middle_keeps_512_tokens_of_a_large_context(tokenizer_dir, seed):
    case = random_case(seed, tokenizer_dir, large=True, strategy="drop_middle").stream_naively()
    events = [record["event"] for record in case.records() if record["event"]]
    assert case.decided and events and all(event["tokens_before"] - event["tokens_after"] > 400 for event in events)
    compare_ways(case)


# ---- the losses ----------------------------------------------------------------------------------


def losses_by_hand(model: Prospect, sample: Sample) -> dict[str, float]:
    """Summed losses by LOSS_CLASSES, label by label: a token is predicted from the one before it."""
    sums = dict.fromkeys(LOSS_CLASSES, 0.0)
    with torch.no_grad():
        hidden = model(torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.image_embeds))[0]
        for name in ("speaking", "dst"):
            for at, token in enumerate(sample.labels[f"{name}_gen_labels"].tolist()):
                if token != IGNORE:
                    sums[f"{name}_gen"] -= model.lm_head(hidden[at - 1]).log_softmax(-1)[token].item()
        heads = {"speaking": model.speaking_decision_head, "dst": model.dst_update_head}
        for name, key in (("speaking", "speaking_labels"), ("dst", "dst_update_labels")):
            for at, label in enumerate(sample.labels[key].tolist()):
                if label != IGNORE:
                    right = torch.sigmoid(heads[name](hidden[at])).item()
                    right = right if label == 1 else 1 - right
                    sums[f"{name}_{'pos' if label == 1 else 'neg'}"] -= math.log(right)
        for at, state in enumerate(sample.labels["dst_state_labels"].tolist()):
            if state != IGNORE:
                sums["dst_state"] -= model.dst_state_head(hidden[at]).log_softmax(-1)[state].item()
    return sums


def compare_losses(seed: int, tokenizer: Tokenizer) -> None:
    """A batch of three clips against the sum of theirs by hand."""
    draw = np.random.default_rng([17, seed])
    model = random_model(tokenizer, seed, vision_dim=2, dst_state_head=True)
    samples = [sample_of(random_clip(draw, f"clip{number}", 12), tokenizer, rate=1.0) for number in range(3)]
    batch = collate([replace(sample, image_embeds=sample.image_embeds / 100) for sample in samples], tokenizer.pad_id)
    with torch.no_grad():
        found = model(batch["input_ids"], batch["image_embeds"], targets=batch["targets"])
    by_hand = [losses_by_hand(model, replace(one, image_embeds=one.image_embeds / 100)) for one in samples]
    for name in LOSS_CLASSES:
        assert found[name].item() == pytest.approx(sum(sums[name] for sums in by_hand), rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("seed", range(3))
def test_losses_of_a_batch_equal_those_by_hand(seed, plain):
    compare_losses(seed, plain)
