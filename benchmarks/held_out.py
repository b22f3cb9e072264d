"""The trained sample model on clips it has never seen, and on two controls that take its sight away.

    python benchmarks/held_out.py [--checkpoint runs/sample/best] [--clips 40]

Streams a sample corpus of another seed (the same world, other people and stories), and again with each clip's
embeddings shuffled in time, and with the embeddings of another clip. A system that merely knew when assistants usually
speak would do as well on the controls; this one must fall.

    replies right   share of all replies that come within +-1 s of a reference reply and name the same step

Last, a question that no clip has: the user asks "What now?" at a random frame at which nothing happens.
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
from prospect.evaluate import load_jobs
from prospect.load import load_for_inference
from prospect.metrics import match_events
from prospect.sample import DIFFICULTIES, write_sample
from prospect.score import named_step, says_the_same, score_clip, summarise
from prospect.sequence import generator
from prospect.stream import Job, stream_jobs
from prospect.text_metrics import load_similarity

CORPUS_SEED = 1000  # the default run trains on seed 0


def shuffled(job: Job) -> Job:
    """The clip with its frames in random order."""
    return Job(job.clip, job.embeddings[generator(CORPUS_SEED, job.clip.id).permutation(len(job.embeddings))])


def swapped(jobs: list[Job]) -> list[Job]:
    """Each clip with the frames of the next one, repeated or cut to its own length."""
    return [
        Job(job.clip, np.resize(other.embeddings, job.embeddings.shape))
        for job, other in zip(jobs, jobs[1:] + jobs[:1])
    ]


def replies_right(job: Job, records: list[dict]) -> tuple[int, int]:
    """(replies that are right, replies)"""
    said = [(record["frame_idx"], record["text"]) for record in records if record["text"] is not None]
    wanted = [(turn.end_frame, turn.text) for turn in job.clip.turns if turn.role == "assistant"]
    names = [step.name for step in job.clip.steps]
    pairs = match_events([frame for frame, _ in said], [frame for frame, _ in wanted], int(job.clip.fps))
    return sum(says_the_same(said[p][1], wanted[r][1], names) for p, r in pairs), len(said)


def with_question(job: Job) -> tuple[Job, int, int | None]:
    """The clip with a question at a frame 5 s or more from every turn; that frame, and the step a right answer names."""
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
    print("| | speaking event F1 | update event F1 | joint goal accuracy | replies right |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "held_out"
        write_sample(corpus, seed=CORPUS_SEED, difficulty=arguments.difficulty, clips=1, val_clips=arguments.clips)
        jobs = load_jobs([str(corpus / "val.json")], config)
        for name, shown in (
            ("held-out clips", jobs),
            ("frames shuffled", [shuffled(job) for job in jobs]),
            ("frames of another clip", swapped(jobs)),
        ):
            collected: dict[int, list[dict]] = {id(job): [] for job in shown}
            for job, records in stream_jobs(model, tokenizer, shown, config, streams=8):
                collected[id(job)] += [record.to_dict() for record in records]
            numbers = summarise(
                [score_clip(job.clip, collected[id(job)], similarity, config.data.dst) for job in shown]
            )
            right, said = np.sum([replies_right(job, collected[id(job)]) for job in shown], axis=0)
            print(
                f"| {name} | {numbers['speaking_event_f1']:.3f} | {numbers['dst_event_f1']:.3f} | {numbers['joint_goal_accuracy']:.3f} "
                f"| {right}/{said} = {right / max(said, 1):.3f} |",
                flush=True,
            )

        answered, named = 0, 0
        asked = {id(job): (job, frame, right) for job, frame, right in map(with_question, jobs)}
        for job, records in stream_jobs(model, tokenizer, [job for job, _, _ in asked.values()], config, streams=8):
            _, frame, right = asked[id(job)]
            for record in records:
                if record.frame_idx == frame and record.text is not None:
                    answered += 1
                    named += named_step(record.text, [step.name for step in job.clip.steps]) == right
        print(
            f"\nasked at an unplanned moment: {answered} of {len(asked)} questions answered at once, {named} with the right step"
        )


if __name__ == "__main__":
    run_entry_point(main)
