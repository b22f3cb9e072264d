"""Stream clips through a trained model, frame by frame: what it says, when, and the task state it tracks.

    python infer.py --clip FILE[:ID or INDEX] [--clip ...] [--checkpoint DIR] [--out FILE.jsonl] [section.key=value ...]
    python infer.py --stdin --clip FILE[:ID or INDEX] < lines     one JSON object per line in, one record per line out
    python infer.py --video FILE --vision DIR [--task steps.yaml] [--pace live] [--checkpoint DIR] [--out FILE] ...

A transcript goes to the terminal (time, who, text, task state). --out takes one JSON record per frame, each written in
one piece as soon as it is known: whenever the program is stopped, the file holds complete lines, one for every frame so
far; X.settings.json beside X.jsonl tells the checkpoint, the thresholds and all settings. Ctrl-C ends with status 130.

With --stdin the clip gives only the header (goal, steps, state at its start). Frames and user text come from stdin as
{"embedding": [...]} and {"user": "..."}, records go to stdout (or to --out) and the transcript to stderr. A line that
cannot be used is answered by {"error": ...}; it is not counted as a frame, and streaming continues.

With --video the frames come from a video file (or a directory of pictures, or an Arrow file) through a vision tower,
and goal, steps and what the user says from a YAML file: see prospect/vision/video.py.
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from prospect.checkpoint import flatten, read_state
from prospect.clip_files import Source, open_source
from prospect.clips import Clip
from prospect.config import Config, DataConfig, to_dict
from prospect.context import check_streamable
from prospect.errors import ProspectError, print_next, run_entry_point
from prospect.features import ROWS, Features, features_of, scale_of, warnings
from prospect.files import write_json, writing
from prospect.load import load_for_inference, load_job, trained_on, unlike_training
from prospect.model import Prospect
from prospect.names import clip_file_names, parse_clip_name
from prospect.records import settings_beside
from prospect.stream import FrameRecord, StreamSession, stream_jobs
from prospect.tokenizer import Tokenizer

DEFAULT_CHECKPOINT = "runs/sample/best"


# ---- the transcript ------------------------------------------------------------------------------


def header(clip: Clip) -> str:
    lines = [f"{clip.id}: {clip.goal}  (frames {clip.start_frame}..{clip.end_frame}, {clip.fps:g} per second)"]
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
    with writing(getattr(out, "name", "output")):
        out.write(json.dumps(value, ensure_ascii=False) + "\n")  # in one piece, so that a line is complete or absent
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


def live(session: StreamSession, lines: BinaryIO, out: TextIO, checkpoint: str | None = None) -> None:
    """Answer each embedding with a record, each line that cannot be used with {"error": ...}.

    checkpoint: whose training features the first embeddings are compared with.
    """
    first: list[np.ndarray] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            given = read_live_line(line)
            if isinstance(given, str):
                session.say(given)
            else:
                show(session.feed(given), out, sys.stderr)
                first += [given] if len(first) < ROWS else []
                if checkpoint is not None and len(first) == ROWS:
                    warn(warnings(Features({}, scale_of(first)), trained_on(checkpoint), checkpoint))
                    checkpoint = None  # once
        except ProspectError as error:
            write_line(out, {"error": f"line {number}: {error}"})


# ---- the three modes -----------------------------------------------------------------------------


def stream_clips(arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer, model: Prospect) -> None:
    """Show every clip as it is streamed. All that can be wrong with any of them is found before the first."""
    chosen = [clip for name in arguments.clip for clip in named_clips(name, config.data)]
    jobs = []
    for source, index in chosen:
        job, warning = load_job(source, index, config.model.vision_dim)
        check_streamable(job.clip, job.embeddings.shape[1], tokenizer, config)
        warn([warning] if warning else [])
        jobs.append(job)
    StreamSession(model, tokenizer, jobs[0].clip, config)  # refuses settings that do not fit the model
    warn(unlike_training(arguments.checkpoint, [job.clip for job in jobs], config, features_of(chosen)))
    streamed: list[tuple[Clip, list[dict]]] = []
    with open_output(arguments, config, [source.file.path for source, _ in chosen], default=None) as out:
        for job in jobs:
            print(header(job.clip))
            streamed.append((job.clip, []))
            for _, records in stream_jobs(model, tokenizer, [job], config):
                streamed[-1][1].extend(record.to_dict() for record in records)
                for record in records:
                    show(record, out, sys.stdout)
    if arguments.html:
        from prospect.report.page import said_where  # only here: streaming starts without it
        from prospect.report.timeline import timeline, write_timelines

        made = made_with(arguments.checkpoint, config)
        write_timelines(arguments.html, [timeline(records, clip, made) for clip, records in streamed])
        print(said_where(arguments.html))
    files = dict.fromkeys(str(source.file.path) for source, _ in chosen)
    checkpoint, out = arguments.checkpoint, Path(arguments.checkpoint).parent / "evaluation"
    words = ["python", "-m", "prospect.evaluate", "--checkpoint", checkpoint, "--data", *files, "--out", str(out)]
    print_next(shlex.join(words))


def stream_stdin(arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer, model: Prospect) -> None:
    """Stream frames from stdin under the header of one clip."""
    chosen = [clip for name in arguments.clip for clip in named_clips(name, config.data)]
    if len(chosen) != 1:
        what = f"--stdin takes the header of one clip, not of {len(chosen)}"
        raise ProspectError(what, remedy="--clip FILE:INDEX")
    [(source, index)] = chosen
    session = StreamSession(model, tokenizer, source.file.clip(index), config)
    warn(unlike_training(arguments.checkpoint, [source.file.clip(index)], config))
    with open_output(arguments, config, [source.file.path], default=sys.stdout) as out:
        live(session, sys.stdin.buffer, out, arguments.checkpoint)


def stream_video(arguments: argparse.Namespace, config: Config, tokenizer: Tokenizer, model: Prospect) -> None:
    """Show what is said at a video as it happens, and in the end, however it comes, how well real time was kept."""
    from prospect.vision.video import Pace, load_encoder, read_task, tower_features, unheard, watch

    video, task, fps = Path(arguments.video), arguments.task and Path(arguments.task), arguments.fps
    clip, said = read_task(task, video, fps)
    session = StreamSession(model, tokenizer, clip, config)
    encoder = load_encoder(Path(arguments.vision), arguments.pool, arguments.tokens, session)
    features = tower_features(encoder, Path(arguments.vision), video, fps, trained_on(arguments.checkpoint))
    warn(unlike_training(arguments.checkpoint, [clip], config, features))
    pace, records = Pace(fps), []
    with open_output(arguments, config, [path for path in (video, task) if path is not None], default=None) as out:
        print(header(clip))
        try:
            for record in watch(session, encoder, video, said, fps, arguments.pace == "live", pace, arguments.max_lag):
                show(record, out, sys.stdout)
                if arguments.html:
                    records.append(record.to_dict())
        finally:
            print(f"{video}: {pace}")
    if records:
        from prospect.report.page import said_where
        from prospect.report.timeline import timeline, write_timelines

        made = made_with(arguments.checkpoint, config)
        write_timelines(arguments.html, [timeline(records, clip, made, pictures=str(video), header_only=True)])
        print(said_where(arguments.html))
    warn([f"the user said {text!r} after the last frame" for text in unheard(said, session.frame_idx)])


def made_with(checkpoint: str, config: Config) -> dict[str, Any]:
    """The settings that decide what the records are, by name, as an evaluation's settings.json has them."""
    return flatten(to_dict(config)) | {"checkpoint": checkpoint, "step": read_state(Path(checkpoint)).step}


def warn(lines: list[str]) -> None:
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def named_clips(name: str, data: DataConfig) -> list[tuple[Source, int]]:
    """FILE, a folder or a pattern: all clips; FILE:ID or FILE:INDEX: one of them."""
    path, which = parse_clip_name(name)
    sources = [open_source(file, data.embeddings, data.embeddings_outside) for file in clip_file_names([path])]
    if which is not None:
        return [(sources[0], sources[0].find(which))]
    return [(source, index) for source in sources for index in range(len(source.file))]


@contextlib.contextmanager
def open_output(
    arguments: argparse.Namespace, config: Config, inputs: list[Path], default: TextIO | None
) -> Iterator[TextIO | None]:
    """The file of --out, with the settings that make its records beside it; or without --out `default`."""
    path = arguments.out
    if path is None:
        yield default
        return
    if Path(path).resolve() in [file.resolve() for file in inputs]:
        raise ProspectError("--out is the clip file itself, or another input", where=path, remedy="name another file")
    with writing(path):
        file = open(path, "w", encoding="utf-8")
    if Path(path).is_file():  # a pipe or a device has nothing beside it
        write_json(settings_beside(Path(path)), made_with(arguments.checkpoint, config))
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # every line is flushed: left is at most one that was refused already
            file.close()


# ---- main ----------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clip", action="append", metavar="FILE[:ID|INDEX]", help="repeatable")
    source.add_argument("--video", metavar="FILE", help="a video, a directory of pictures, or an Arrow file")
    add = parser.add_argument
    add("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="DIR")
    add("--out", metavar="FILE.jsonl", help="one record per frame")
    add("--html", metavar="PAGE.html", help="a time line of what was said and, with --clip, should have been said")
    add("--stdin", "--live", action="store_true", help="with --clip: read frames and user text from stdin")
    add = parser.add_argument_group("with --video").add_argument
    add("--vision", metavar="DIR", help="the SigLIP, CLIP or SmolVLM2 that made the training embeddings")
    add("--task", metavar="FILE.yaml", help="goal, steps, and what the user says when")
    add("--pace", choices=("fast", "live"), default="fast", help="live: at the speed of the video")
    what = "with --pace live: leave out frames that have waited longer; by default none is left out"
    add("--max-lag", type=seconds, default=math.inf, metavar="SECONDS", help=what)
    add("--fps", type=rate, default=Fraction(2), help="frames per second, as trained (default 2)")
    add("--pool", help="as it was given to prospect.encode")
    add("--tokens", type=int, help="as it was given to prospect.encode")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def rate(text: str) -> Fraction:
    from prospect.vision.encode import parse_fps

    return parse_fps(text)


def seconds(text: str) -> float:
    if not 0 < (value := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def refuse_what_does_not_go_together(arguments: argparse.Namespace) -> None:
    if arguments.video and (arguments.stdin or not arguments.vision):
        raise ProspectError("--video needs --vision, and takes no --stdin", remedy="for real time: --pace live")
    if arguments.max_lag < math.inf and arguments.pace != "live":
        raise ProspectError("--max-lag is for --pace live", remedy="without a clock nothing comes late")
    if arguments.html and (arguments.stdin or arguments.max_lag < math.inf):
        what = "--html shows a clip or a video with all its frames"
        raise ProspectError(what, remedy="leave --stdin and --max-lag away")
    if arguments.clip and (arguments.vision or arguments.task):
        raise ProspectError("--vision and --task belong to --video", remedy="a clip has its own embeddings and steps")


def main() -> int:
    arguments = parse_arguments()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    refuse_what_does_not_go_together(arguments)
    config, tokenizer, model = load_for_inference(arguments.checkpoint, arguments.overrides)
    mode = stream_video if arguments.video else stream_stdin if arguments.stdin else stream_clips
    mode(arguments, config, tokenizer, model)
    return 0


def command() -> None:
    """What `prospect-infer` runs, once the project is installed."""
    run_entry_point(main)


if __name__ == "__main__":
    command()
