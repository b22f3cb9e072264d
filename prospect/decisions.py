"""When a head fires: the causal rule between a head's probability at a frame and the decision to write.

    raw probability   .1  .7  .2  .8  .9  .1        of one head, frame by frame
    score             .05 .38 .29 .54 .72 .05       running mean, weight .5 on the new frame (infer.smoothing)
    fires at .6                       ^             then the evidence starts again from nothing

A single noisy frame rarely says which step has changed, and a text that is written once stays in the context. So a head
gathers evidence: its *score* is a running mean of its probabilities since something was last written. A frame right
behind a user's text is decided by itself, for the user is waiting.

The two heads know of each other: training shows an update and the reply that rests on it behind one frame, in this
order. So when one head fires and the other's score is within `infer.coupling` logits of its own threshold, both fire.

The rule sees the past alone, frame after frame, so look-ahead and several streams at once change no decision.
"""

from dataclasses import dataclass

from prospect.config import InferConfig
from prospect.metrics import fires, logit

HEADS = {"speaking": "assistant", "dst": "DST_UPDATE"}  # each head, and the role whose turns it decides


@dataclass(frozen=True)
class Decision:
    """What is decided at one frame, and on what: the scores that were compared with the thresholds."""

    speak: bool
    update: bool
    speaking_score: float
    dst_score: float | None  # None: a model without task state, or nothing left to update


@dataclass
class Evidence:
    """The scores of one stream so far, since something was last written."""

    speaking: float = 0.0
    dst: float = 0.0


def decide(infer: InferConfig, evidence: Evidence, speaking: float, dst: float | None, asked: bool) -> Decision:
    """The decision at one frame; `evidence` is brought forward to the next.

    speaking, dst: the heads' probabilities, dst None where no update can be written. asked: the user's text stands
    right before this frame.
    """
    weight = 1.0 if asked else infer.smoothing
    evidence.speaking = weight * speaking + (1 - weight) * evidence.speaking
    speak, update = fires(evidence.speaking, infer.speaking_threshold), False
    if dst is not None:
        evidence.dst = weight * dst + (1 - weight) * evidence.dst
        update = fires(evidence.dst, infer.dst_threshold)
        if update and not speak:
            speak = nearly(evidence.speaking, infer.speaking_threshold, infer.coupling)
        elif speak and not update:
            update = nearly(evidence.dst, infer.dst_threshold, infer.coupling)
    decision = Decision(speak, update, evidence.speaking, None if dst is None else evidence.dst)
    if speak or update:
        evidence.speaking = evidence.dst = 0.0
    return decision


def nearly(score: float, threshold: float, logits: float) -> bool:
    """Whether a score is at most so many logits below its threshold. None at all: 0 logits."""
    return logits > 0 and logit(score) >= logit(threshold) - logits
