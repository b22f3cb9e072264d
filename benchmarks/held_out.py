"""The trained sample model on clips it has never seen, and on two controls that blind it.

    python benchmarks/held_out.py [--checkpoint runs/sample/best] [--clips 40]

Streams a sample corpus generated with another seed (same tasks, new people and stories), then again with each clip's
embeddings shuffled in time, and with the embeddings of another clip. A system that merely knew when assistants usually
speak would do as well on the controls; this one must do worse.

    replies right   a reply is right when it comes within 1 s of its reference's range and names the same step; F1, and
                    how many replies were right, said, and due

Finally, an unscripted question: the user asks "What now?" at a random frame at which nothing happens.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from prospect.clips import Turn
from prospect.errors import run_entry_point
from prospect.jobs import load_jobs
from prospect.load import load_for_inference
from prospect.metrics import Counts
from prospect.sample import DIFFICULTIES, write_sample
from prospect.score import decision_numbers, named_step, score_clip
from prospect.sequence import generator
from prospect.stream import Job, streamed_clips
from prospect.text_metrics import load_similarity

CORPUS_SEED = 1000  # the default run trains on seed 0


def shuffled(job: Job) -> Job:
    """The clip with its frames in random order."""
    return Job(job.clip, job.embeddings[generator(CORPUS_SEED, job.clip.id).permutation(job.num_frames)])


def swapped(jobs: list[Job]) -> list[Job]:
    """Each clip with the frames of the next one, repeated or cut to its own length."""
    return [
        Job(job.clip, np.resize(other.embeddings, job.embeddings.shape))
        for job, other in zip(jobs, jobs[1:] + jobs[:1])
    ]


def with_question(job: Job) -> tuple[Job, int, int | None]:
    """The clip with a question 5 s or more from every turn; its frame; the index of the step a right answer names."""
    draw, clip = generator(CORPUS_SEED, "question", job.clip.id), job.clip
    taken = [turn.end_frame for turn in clip.turns if turn.role != "system"]
    quiet = [
        f for f in range(clip.start_frame + 10, clip.end_frame - 10) if all(abs(f - t) >= 5 * clip.fps for t in taken)
    ]
    frame = int(draw.choice(quiet))
    state = list(clip.state_before(frame).values())
    under_way = [i for i, now in enumerate(state) if now == "in_progress"]
    still_open = [i for i, now in enumerate(state) if now != "completed"]
    right = (under_way or still_open or [None])[0]
    question = Turn("user", "What now?", (), frame, frame, len(clip.turns))
    return Job(replace(clip, turns=(*clip.turns, question)), job.embeddings), frame, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/sample/best"))
    parser.add_argument("--difficulty", default="easy", choices=tuple(DIFFICULTIES))
    parser.add_argument("--clips", type=int, default=40)
    arguments = parser.parse_args()
    config, tokenizer, model = load_for_inference(arguments.checkpoint)
    similarity = load_similarity("lexical")
    print("| | speaking event F1 | update event F1 | joint goal accuracy | replies right |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "held_out"
        write_sample(corpus, seed=CORPUS_SEED, difficulty=arguments.difficulty, clips=1, val_clips=arguments.clips)
        jobs = list(load_jobs([str(corpus / "val.json")], config, tokenizer))
        for name, shown in (
            ("held-out clips", jobs),
            ("frames shuffled", [shuffled(job) for job in jobs]),
            ("frames of another clip", swapped(jobs)),
        ):
            clips = streamed_clips(model, tokenizer, shown, config)
            scores = [score_clip(job.clip, records, similarity, config.data.dst) for job, records in clips]
            numbers, replies = decision_numbers(scores), sum((score.replies for score in scores), Counts())
            columns = ("speaking_event_f1", "dst_event_f1", "joint_goal_accuracy", "replies_right_f1")
            cells = " | ".join(f"{numbers[column]:.3f}" for column in columns if column in numbers)
            counts = f"{replies.matched} of {replies.predicted}, due {replies.reference}"
            print(f"| {name} | {cells} ({counts}) |", flush=True)

        answered, named = 0, 0
        asked = {id(job): (job, frame, right) for job, frame, right in map(with_question, jobs)}
        for job, records in streamed_clips(model, tokenizer, [job for job, _, _ in asked.values()], config):
            _, frame, right = asked[id(job)]
            reply = records[frame - job.clip.start_frame]["text"]
            if reply is not None:
                answered += 1
                named += named_step(reply, [step.name for step in job.clip.steps]) == right
        at_once = f"{answered} of {len(asked)} questions answered at once"
        print(f"\nasked at an unplanned moment: {at_once}, {named} with the right step")


if __name__ == "__main__":
    run_entry_point(main)
