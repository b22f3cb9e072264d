"""Stream clips through a trained model, frame by frame: what it says, when, and the task state it tracks.

    python infer.py --clip FILE[:ID or INDEX] [--clip ...] [--checkpoint DIR] [--out FILE.jsonl] [section.key=value ...]
    python infer.py --stdin --clip FILE[:ID or INDEX] < lines     one JSON object per line in, one record per line out
    python infer.py --video FILE --vision DIR [--task steps.yaml] [--pace live] [--checkpoint DIR] [--out FILE] ...

A transcript goes to the terminal (time, who, text, task state). --out takes one JSON record per frame, each written in
one piece as soon as it is known: whenever the program is stopped, the file holds complete lines, one for every frame up
to there. Ctrl-C ends with status 130.

With --stdin the clip gives only the header (goal, steps, state at its start). Frames and user text come from stdin as
{"embedding": [...]} and {"user": "..."}, records go to stdout (or to --out) and the transcript to stderr. A line that
cannot be used is answered by {"error": ...}; it is not counted as a frame, and streaming continues.

With --video the frames come from a video file (or a directory of pictures, or an Arrow file) through a vision tower,
and goal, steps and what the user says from a YAML file: see prospect/vision/video.py.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import BinaryIO, TextIO

import numpy as np

from prospect.clips import Clip
from prospect.config import Config
from prospect.errors import ProspectError, run_entry_point
from prospect.load import load_job
from prospect.model import Prospect
from prospect.stream import FrameRecord, StreamSession, stream_jobs
from prospect.tokenizer import Tokenizer

DEFAULT_CHECKPOINT = "runs/sample/best"


# ---- the transcript ------------------------------------------------------------------------------


def header(clip: Clip) -> str:
    lines = [f"{clip.id}: {clip.goal}  (frames {clip.start_frame}..{clip.end_frame}, {clip.fps:g} a second)"]
    return "\n".join(lines + [f"    {step.id} {step.name} [{clip.initial_state[step.id]}]" for step in clip.steps])


def transcript(record: FrameRecord) -> Iterator[str]:
    """The lines of one frame: nothing for a silent one."""
    tenths = round(10 * record.time)
    stamp = f"{tenths // 600:3d}:{tenths % 600 / 10:04.1f}"
    if record.context_event is not None:
        event = record.context_event
        yield f"{stamp}  --         context {event.strategy}: {event.tokens_before} -> {event.tokens_after} tokens"
    for text in record.user:
        yield f"{stamp}  user       {text}"
    if record.dst_update is not None:
        refused = f"   (not applied: {record.invalid_update})" if record.invalid_update else ""
        yield f"{stamp}  state      {record.dst_update}{refused}   {state_line(record)}"
    if record.text is not None:
        yield f"{stamp}  assistant  {record.text}" + (f"   (cut: {record.text_cut})" if record.text_cut else "")


def state_line(record: FrameRecord) -> str:
    marks = {"completed": "[x]", "in_progress": "[>]", "not_started": "[ ]"}
    return " ".join(f"{marks[state]}{id}" for id, state in record.dst_state.items())


def show(record: FrameRecord, out: TextIO | None, terminal: TextIO) -> None:
    for line in transcript(record):
        # Texts come from users and models: what could steer a terminal is shown as a blank.
        print("".join(character if character.isprintable() else " " for character in line), file=terminal, flush=True)
    if out is not None:
        write_line(out, record.to_dict())


def write_line(out: TextIO, value: dict) -> None:
    out.write(json.dumps(value, ensure_ascii=False) + "\n")  # in one piece, so that a line is whole or not there
    out.flush()


# ---- frames from stdin ---------------------------------------------------------------------------


def read_live_line(line: bytes) -> np.ndarray | str:
    """A frame's embedding or the user's text. Raises ProspectError saying what is wrong with the line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProspectError(f"is not JSON: {error}") from error
    if not isinstance(value, dict) or set(value) not in ({"embedding"}, {"user"}):
        raise ProspectError('must be {"embedding": [...]} or {"user": "..."}')
    if "user" in value:
        if not isinstance(value["user"], str):
            raise ProspectError("user must be text")
        return value["user"]
    try:
        embedding = np.array(value["embedding"])
    except (ValueError, RecursionError) as error:
        raise ProspectError("embedding must be a list of numbers") from error
    if embedding.dtype.kind not in "if":
        raise ProspectError("embedding must be a list of numbers")
    with np.errstate(over="ignore"):  # what fp32 cannot hold becomes infinite, which the session refuses
        return embedding.astype(np.float32)


def live(session: StreamSession, lines: BinaryIO, out: TextIO) -> None:
    """Answer each embedding with a record, each line that cannot be used with {"error": ...}."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            given = read_live_line(line)
            if isinstance(given, str):
                session.say(given)
            else:
                show(session.feed(given), out, sys.stderr)
        except ProspectError as error:
            write_line(out, {"error": f"line {number}: {error}"})


# ---- the three modes -----------------------------------------------------------------------------


def stream_clips(arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer, model: Prospect) -> None:
    """Show every clip as it is streamed. All that can be wrong with any of them is found before the first."""
    chosen = [clip for name in arguments.clip for clip in named_clips(name, config.data)]
    jobs = []
    for source, index in chosen:
        job, warning = load_job(source, index, config.model.vision_dim)
        StreamSession(model, tokenizer, job.clip, config)  # refuses a prompt or settings that leave no room for a frame
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        jobs.append(job)
    streamed: list[tuple[Clip, list[dict]]] = []  # for --html
    thresholds = {"speaking": config.infer.speaking_threshold, "dst": config.infer.dst_threshold}
    with open_output(arguments.out, [source.file.path for source, _ in chosen], default=None) as out:
        for job in jobs:
            print(header(job.clip))
            if arguments.html:
                streamed.append((job.clip, []))
            for _, records in stream_jobs(model, tokenizer, [job], config):
                if arguments.html:
                    streamed[-1][1].extend(record.to_dict() for record in records)
                for record in records:
                    show(record, out, sys.stdout)
    if arguments.html:
        from prospect.report.timeline import timeline, write_timelines  # only here: streaming starts without it

        write_timelines(arguments.html, [timeline(records, clip, thresholds) for clip, records in streamed])


def stream_stdin(arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer, model: Prospect) -> None:
    """Stream frames from stdin under the header of one clip."""
    chosen = [clip for name in arguments.clip for clip in named_clips(name, config.data)]
    if len(chosen) != 1:
        what = f"--stdin takes the header of one clip, not of {len(chosen)}"
        raise ProspectError(what, remedy="--clip FILE:INDEX")
    [(source, index)] = chosen
    session = StreamSession(model, tokenizer, source.file.clip(index), config)
    with open_output(arguments.out, [source.file.path], default=sys.stdout) as out:
        live(session, sys.stdin.buffer, out)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
