"""Stream clips through a trained model, frame by frame: what it says, when, and the task state it tracks.

    python infer.py --clip FILE[:ID or INDEX] [--clip ...] [--checkpoint DIR] [--out FILE.jsonl] [section.key=value ...]
    python infer.py --live --clip FILE[:ID or INDEX] < lines      one JSON object a line, one record a line at once
    python infer.py --video FILE --vision DIR [--task steps.yaml] [--pace live] [--checkpoint DIR] [--out FILE] ...

A transcript goes to the terminal (time, who, text, task state). --out takes one JSON record a frame, each written in
one piece as soon as it is known: whenever the program is stopped, the file holds whole lines, one for every frame up to
there. Ctrl-C ends with status 130.

With --live the clip gives only the header (goal, steps, state at its start). Frames and user text come from stdin as
{"embedding": [...]} and {"user": "..."}, records go to stdout (or to --out) and the transcript to stderr. A line that
cannot be used is answered by {"error": ...}; it counts as no frame, and the stream goes on.

With --video the frames come from a video file (or a directory of pictures, or an Arrow file) through a vision tower,
and goal, steps and what the user says from a YAML file: see prospect/vision/video.py.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from prospect.clips import Clip, ClipFile
from prospect.config import Config
from prospect.errors import ProspectError, run_entry_point
from prospect.load import load_for_inference, load_job
from prospect.model import Prospect
from prospect.stream import FrameRecord, StreamSession, stream_jobs
from prospect.tokenizer import Tokenizer
from prospect.vision.encode import parse_fps
from prospect.vision.video import Report, load_encoder, read_task, unheard, watch

DEFAULT_CHECKPOINT = "runs/sample/best"


def named_clips(name: str) -> list[tuple[ClipFile, int]]:
    """FILE: all its clips; FILE:ID or FILE:INDEX: one of them. Both a file's name and an id may hold colons."""
    cut = next((i for i, character in enumerate(name) if character == ":" and Path(name[:i]).is_file()), None)
    if cut is None or Path(name).is_file():
        file = ClipFile(name)
        return [(file, index) for index in range(len(file))]
    file = ClipFile(name[:cut])
    return [(file, file.find(name[cut + 1 :]))]


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


# ---- live input ----------------------------------------------------------------------------------


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


# ---- videos --------------------------------------------------------------------------------------


def stream_video(arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer, model: Prospect) -> None:
    """Show what is said at a video as it happens, and in the end, however it comes, how real time was kept."""
    video, task, fps = Path(arguments.video), arguments.task and Path(arguments.task), arguments.fps
    clip, said = read_task(task, video, fps)
    session = StreamSession(model, tokenizer, clip, config)
    encoder = load_encoder(Path(arguments.vision), arguments.pool, arguments.tokens, session)
    report = Report(fps)
    inputs = [path for path in (video, task) if path is not None]
    with open_output(arguments.out, inputs) if arguments.out else contextlib.nullcontext() as out:
        print(header(clip))
        try:
            for record in watch(session, encoder, video, said, fps, arguments.pace == "live", report):
                show(record, out, sys.stdout)
        finally:
            print(f"{video}: {report}")
    for text in unheard(said, report.frames):
        print(f"warning: the user said {text!r} after the last frame", file=sys.stderr)


# ---- main ----------------------------------------------------------------------------------------


def open_output(path: str, inputs: list[Path]) -> TextIO:
    if Path(path).resolve() in [file.resolve() for file in inputs]:
        raise ProspectError("--out is the clip file itself, or another input", where=path, remedy="name another file")
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        remedy = "name a file in a folder that exists"
        raise ProspectError(f"cannot be written: {error.strerror}", where=path, remedy=remedy) from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clip", action="append", metavar="FILE[:ID|INDEX]", help="repeatable")
    source.add_argument("--video", metavar="FILE", help="a video, a directory of pictures, or an Arrow file")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="DIR")
    parser.add_argument("--out", metavar="FILE.jsonl", help="one record a frame")
    parser.add_argument(
        "--html", metavar="PAGE.html", help="with --clip: a time line of what was said and what should have been"
    )
    parser.add_argument("--live", action="store_true", help="read frames and user text from stdin")
    of_video = parser.add_argument_group("with --video")
    of_video.add_argument("--vision", metavar="DIR", help="the SigLIP or SmolVLM2 that made the training embeddings")
    of_video.add_argument("--task", metavar="FILE.yaml", help="goal, steps, and what the user says when")
    of_video.add_argument("--pace", choices=("fast", "live"), default="fast", help="live: as slow as the video")
    of_video.add_argument("--fps", type=parse_fps, default="2", help="frames a second, as trained (default 2)")
    of_video.add_argument("--pool", help="as it was given to prospect.encode")
    of_video.add_argument("--tokens", type=int, help="as it was given to prospect.encode")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    if arguments.video and (arguments.live or not arguments.vision):
        raise ProspectError("--video needs --vision, and takes no --live", remedy="for real time: --pace live")
    if arguments.html and (arguments.video or arguments.live):
        raise ProspectError("--html shows clips beside their reference", remedy="--clip FILE:INDEX, without --live")
    if arguments.clip and (arguments.vision or arguments.task):
        raise ProspectError("--vision and --task belong to --video", remedy="a clip has its own embeddings and steps")

    config, tokenizer, model = load_for_inference(arguments.checkpoint, arguments.overrides)
    if arguments.video:
        stream_video(arguments, config, tokenizer, model)
        return 0
    chosen = [clip for name in arguments.clip for clip in named_clips(name)]
    inputs = [file.path for file, _ in chosen]
    if arguments.live:
        if len(chosen) != 1:
            what = f"--live takes the header of one clip, not of {len(chosen)}"
            raise ProspectError(what, remedy="--clip FILE:INDEX")
        [(file, index)] = chosen
        session = StreamSession(model, tokenizer, file.clip(index), config)
        with open_output(arguments.out, inputs) if arguments.out else contextlib.nullcontext(sys.stdout) as out:
            live(session, sys.stdin.buffer, out)
        return 0

    for file, index in chosen:  # all that can be wrong with the clips is found before the first of them is streamed
        job, warning = load_job(file, index, config)
        StreamSession(model, tokenizer, job.clip, config)  # refuses a prompt or settings that leave no room for a frame
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    streamed: list[tuple[Clip, list[dict]]] = []  # for --html
    thresholds = {"speaking": config.infer.speaking_threshold, "dst": config.infer.dst_threshold}
    with open_output(arguments.out, inputs) if arguments.out else contextlib.nullcontext() as out:
        for file, index in chosen:
            job, _ = load_job(file, index, config)
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
    return 0


if __name__ == "__main__":
    run_entry_point(main)
