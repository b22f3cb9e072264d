"""Summaries: the memory of an assistant that keeps no task state (ProAssist, arXiv 2506.05904).

A full context may start again from a summary that the model wrote of it (infer.strategy=summarize_and_drop). What the
model writes it has to learn, and in the very shape in which it is asked: with data.summaries, windows of a long clip
end with the request and the summary, and begin with the one before.

    window 0   <prompt>                        a b c d e   User: Summarize…  Assistant: Done: fit the boom. …
    window 1   <prompt> So far: Done: fit…     f g h i j   User: Summarize…  Assistant: Done: fit the boom; turn the…
    window 2   <prompt> So far: Done: fit…     k l m
"""

from prospect.clips import Clip

SUMMARY_REQUEST = "Summarize what has been done so far."  # in the user's role


def can_be_summarized(clip: Clip) -> bool:
    """Whether a clip says what has been done: it lists its steps, or its turns carry `progress`."""
    return bool(clip.steps) or any(turn.progress for turn in clip.turns)


def reference_summary(clip: Clip, frame: int) -> str:
    """What has been done when `frame` is about to be seen, in words.

    The `progress` of the newest turn before it, where the clip's turns carry one, as ProAssist's dialogues do. Else it
    is written from the reference state: the completed steps, then those under way, in the order of the clip's list.
    The goal is not among it, since the prompt has it.
    """
    told = [turn for turn in clip.turns if turn.progress and turn.end_frame < frame]
    if told:
        return max(told, key=lambda turn: turn.end_frame).progress
    state = clip.state_before(frame)
    done, under_way = (
        "; ".join(step.name for step in clip.steps if state[step.id] == reached)
        for reached in ("completed", "in_progress")
    )
    return f"Done: {done or 'nothing yet'}." + (f" Under way: {under_way}." if under_way else "")
