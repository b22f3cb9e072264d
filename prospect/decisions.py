"""When a head fires: the causal rule between a head's probability at a frame and the decision to write.

    probability   .1   .7   .2   .8   .9   .1      of one head, frame by frame; its threshold is .5
    score         .05  .38  .29  .54  .72  .05     running mean, weight .5 on the new frame (infer.smoothing)
    fires at .6                       ^            (infer.evidence); then the mean starts again from nothing

A single noisy frame rarely says which step has changed, and a text once written stays in the context. So a head gathers
evidence. Its probability is first centred, so that its threshold, which stands for even odds, becomes one half; its
*score* is the running mean of that since something was last written. A frame right behind a user's text is decided by
itself, for the user is waiting.

The two heads know of each other: training shows an update and the reply that rests on it behind one frame, in this
order. So when one head fires and the other's score is within `infer.coupling` logits of firing, both fire.

The rule sees the past alone, frame after frame, so look-ahead and several streams at once change no decision.
"""

from dataclasses import dataclass

from prospect.clips import Clip
from prospect.config import InferConfig
from prospect.metrics import fires, logit

# What validation finds and a checkpoint stores (TrainState.thresholds), and the setting under `infer` that it fills.
SETTINGS = {"speaking": "speaking_threshold", "dst": "dst_threshold", "evidence": "evidence"}


@dataclass(frozen=True)
class Decision:
    """What is decided at one frame, and on what: the scores that were compared with `infer.evidence`."""

    speak: bool
    update: bool
    speaking_score: float
    dst_score: float | None  # None: a model without task state, or nothing left to update


@dataclass(frozen=True)
class Moments:
    """When the reference speaks and updates, in absolute frames: decisions for a model that is told when.

    So do published tables that judge the texts alone and take the time of each from the reference.
    """

    speak: frozenset[int]
    update: frozenset[int]

    def at(self, frame: int) -> tuple[bool, bool]:
        """Whether to speak, and whether to update."""
        return frame in self.speak, frame in self.update


def reference_moments(clip: Clip) -> Moments:
    """The last frame of each reply's and each update's range, behind which training mostly has its text."""
    frames = {role: frozenset(last for _, last in clip.events(role)) for role in ("assistant", "DST_UPDATE")}
    return Moments(frames["assistant"], frames["DST_UPDATE"])


@dataclass
class Evidence:
    """The scores of one stream so far, since something was last written."""

    speaking: float = 0.0
    dst: float = 0.0


def decide(
    infer: InferConfig,
    evidence: Evidence,
    speaking: float,
    dst: float | None,
    asked: bool,
    told: tuple[bool, bool] | None = None,
) -> Decision:
    """The decision at one frame; `evidence` is brought forward to the next.

    speaking, dst: the heads' probabilities, dst None where no update can be written. asked: the user's text stands
    right before this frame. told: whether to speak and to update (Moments.at), where the heads are not to decide.
    """
    weight = 1.0 if asked else infer.smoothing
    evidence.speaking += weight * (centred(speaking, infer.speaking_threshold) - evidence.speaking)
    speak, update = fires(evidence.speaking, infer.evidence), False
    if dst is not None:
        evidence.dst += weight * (centred(dst, infer.dst_threshold) - evidence.dst)
        update = fires(evidence.dst, infer.evidence)
        if speak or update:
            speak = speak or nearly(evidence.speaking, infer)
            update = update or nearly(evidence.dst, infer)
    if told is not None:
        speak, update = told[0], told[1] and dst is not None
    decision = Decision(speak, update, evidence.speaking, None if dst is None else evidence.dst)
    if speak or update:
        evidence.speaking = evidence.dst = 0.0
    return decision


def centred(probability: float, threshold: float) -> float:
    """The probability with its odds divided by those of `threshold`, which so becomes one half."""
    yes, no = probability * (1 - threshold), (1 - probability) * threshold
    return yes / (yes + no) if yes + no else 1.0


def nearly(score: float, infer: InferConfig) -> bool:
    """Whether a score is at most `infer.coupling` logits below firing, and coupling is not off (0)."""
    return infer.coupling > 0 and logit(score) >= logit(infer.evidence) - infer.coupling
