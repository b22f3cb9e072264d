"""How much evidence keeps the assistant quiet where nothing happens: a choice with a certificate.

    python -m prospect.sample --out data/quiet --quiet 3
    python -m prospect.evaluate --checkpoint DIR --data FILE --quiet data/quiet/quiet.json --max-false-alarms 6

Less evidence catches more events and brings more false alarms. How many, hours in which nothing happens tell: whatever
is said or written in them is one. The certificate reads "at most N an hour, at 90 % confidence": whoever draws quiet
hours again and again and chooses by them will be wrong about N in at most one draw of ten.

It is Learn-then-Test (arXiv 2110.01052). For each evidence, the hypothesis that a minute brings an alarm with a
probability above N/60 is tested by the binomial tail: k alarmed minutes of n have the p-value P(Bin(n, N/60) <= k). The
tests go from strict to lax and end at the first that fails (fixed-sequence testing), so the error of all of them
together stays within 10 %. Whatever passed may be chosen by any other number; here, by how it does on the clips of
--data.

What it rests on: minutes are alike and independent of one another, those to come as those of the file. A minute with
several alarms counts once. The file is as quiet, as dark and as crowded as the place where the assistant will be.
"""

import functools
import math
from collections.abc import Iterator, Sequence

from prospect.config import Config
from prospect.distributed import ALONE, Ranks, gather_objects
from prospect.errors import ProspectError
from prospect.metrics import Counts
from prospect.model import Prospect
from prospect.score import cell_text, score_clip
from prospect.stream import Job, streamed_clips
from prospect.text_metrics import load_similarity
from prospect.tokenizer import Tokenizer
from prospect.tuning import EVIDENCE, best_tried, some_of, try_evidence, with_decisions

MAX_FALSE_ALARMS = 6.0  # per hour
CONFIDENCE = 0.9


def alarmed(records: Sequence[dict], fps: float) -> list[bool]:
    """Of every whole minute of a quiet clip, whether anything was said or written in it."""
    decided = [record["speaking_decision"] or record["dst_update_decision"] for record in records]
    starts = [math.ceil(minute * 60 * fps) for minute in range(int(len(records) / (60 * fps)) + 1)]
    return [any(decided[start:end]) for start, end in zip(starts, starts[1:])]


def p_value(alarms: int, minutes: int, max_per_hour: float) -> float:
    """P(Bin(minutes, max_per_hour / 60) <= alarms): how likely so few are, if the rate were just too high."""
    p = max_per_hour / 60
    log_choose = [-math.lgamma(k + 1) - math.lgamma(minutes - k + 1) for k in range(alarms + 1)]
    log_terms = [math.lgamma(minutes + 1) + c + k * math.log(p) for k, c in enumerate(log_choose)]
    return min(1.0, math.fsum(math.exp(t + (minutes - k) * math.log1p(-p)) for k, t in enumerate(log_terms)))


def passes(alarms: int, minutes: int, max_per_hour: float) -> bool:
    return p_value(alarms, minutes, max_per_hour) <= 1 - CONFIDENCE


def minutes_needed(max_per_hour: float) -> int:
    """So many minutes without any alarm are needed at least."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-max_per_hour / 60))


def check_quiet(quiet: Sequence[Job], max_per_hour: float) -> None:
    """Raises ProspectError where the clips cannot certify anything, whatever the model does."""
    if not 0 < max_per_hour < 60:
        remedy = "more than 0, less than 60: a minute counts once"
        raise ProspectError(f"at most {max_per_hour:g} false alarms an hour", where="command line", remedy=remedy)
    for job in quiet:
        if happens := [turn for turn in job.clip.turns if turn.role != "system"]:
            what = f"is not quiet: a {happens[0].role} turn at frame {happens[0].end_frame}"
            raise ProspectError(what, where=job.clip.where, remedy="give hours in which nothing is due")
    minutes = sum(int(job.num_frames / (60 * job.clip.fps)) for job in quiet)
    if minutes < minutes_needed(max_per_hour):
        what = f"{minutes} whole minutes of quiet cannot certify {max_per_hour:g} false alarms an hour"
        remedy = f"give {minutes_needed(max_per_hour)} minutes at least"
        raise ProspectError(what, where=quiet[0].clip.where, remedy=remedy)


def choose_quiet(
    model: Prospect,
    tokenizer: Tokenizer,
    quiet: Sequence[Job],
    jobs: Sequence[Job],
    config: Config,
    max_per_hour: float,
    ranks: Ranks = ALONE,
) -> float:
    """The evidence that is best on `jobs`, of all that the quiet clips certify. Prints what it costs.

    Every rank streams its share of the clips. Raises ProspectError where none is certified, or none can be.
    """
    check_quiet(quiet, max_per_hour)
    thresholds = {"speaking": config.infer.speaking_threshold, "dst": config.infer.dst_threshold}
    print("| evidence | alarmed minutes | p-value | certified |\n|---:|---:|---:|---|")
    certified: list[float] = []
    for evidence in EVIDENCE:
        clips = streamed_clips(model, tokenizer, mine(quiet, ranks), with_decisions(config, thresholds, evidence))
        alarms = [alarm for job, records in clips for alarm in alarmed(records, job.clip.fps)]
        minutes = [alarm for part in gather_objects(alarms, ranks) for alarm in part]
        ok = passes(sum(minutes), len(minutes), max_per_hour)
        p = p_value(sum(minutes), len(minutes), max_per_hour)
        print(f"| {evidence} | {sum(minutes)} of {len(minutes)} | {p:.4f} | {'yes' if ok else 'no'} |", flush=True)
        if not ok:
            break
        certified.append(evidence)
    if not certified:
        what = f"no evidence is certified for at most {max_per_hour:g} false alarms an hour"
        raise ProspectError(what, where=quiet[0].clip.where, remedy="more hours, or a larger --max-false-alarms")

    target = config.infer.tuned_for
    gather, some = functools.partial(gather_objects, ranks=ranks), list(mine(some_of(jobs), ranks))
    tried = list(try_evidence(model, tokenizer, some, config, thresholds, gather, certified))
    best = best_tried(tried, target).evidence
    print(f"\ncertified: at most {max_per_hour:g} false alarms an hour, at {CONFIDENCE:.0%} confidence")
    print(f"\n| evidence | {' | '.join(('speaking events caught', 'update events caught')[: 1 + config.data.dst])} |")
    print("|---:|" + "---:|" * (1 + config.data.dst))
    for name, evidence in (("before", config.infer.evidence), ("certified", best)):
        caught = events_caught(model, tokenizer, jobs, with_decisions(config, thresholds, evidence), ranks)
        cells = [f"{counts.matched} of {counts.reference} ({cell_text(counts.recall)})" for counts in caught.values()]
        print(f"| {name}: {evidence} | {' | '.join(cells)} |")
    return best


def mine(jobs: Sequence[Job], ranks: Ranks) -> Iterator[Job]:
    """Every so many-th, each read when it is its turn."""
    return (jobs[number] for number in range(ranks.rank, len(jobs), ranks.world))


def events_caught(
    model: Prospect, tokenizer: Tokenizer, jobs: Sequence[Job], config: Config, ranks: Ranks
) -> dict[str, Counts]:
    """Of each head, over all clips."""
    similarity, dst = load_similarity("lexical"), config.data.dst
    clips = streamed_clips(model, tokenizer, mine(jobs, ranks), config)
    events = [score_clip(job.clip, records, similarity, dst).events for job, records in clips]
    events = [of_clip for part in gather_objects(events, ranks) for of_clip in part]
    return {head: sum((of_clip[head] for of_clip in events), Counts()) for head in events[0]}
