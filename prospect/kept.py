"""What is found out about every clip of a file, found out once: it is kept until something it depends on changes.

    .prospect/train.json/check-0123456789abcdef/00000.jsonl     the clips 0 to 1023, a line for each

A Task (checking clips, planning their windows) is done in all processes that the machine has cores for, and what it
finds is kept beside the clip file, or where nothing can be written there in the user's cache folder. The folder's name
is a digest of all that the findings of a file depend on together: the clip file, settings, tokenizer, libraries, and
the source of the very modules that do the task. The stamp of its embedding file (see packs.stamp) is in a clip's own
line. So a finding of anything that has changed is not found, or not believed, and only that clip is done again.

A part is written completely or not at all, when its clips are done: whatever stops a run, the next one goes on from
there. Runs that share a folder at the same time write the same parts.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prospect.clip_files import Source
from prospect.embeddings import find_embeddings
from prospect.errors import ProspectError
from prospect.files import write_whole
from prospect.packs import stamp
from prospect.processes import Processes, cores

PART = 1024  # clips in a file
CHUNK = 64  # clips that a process is sent at a time
AHEAD = 3  # parts that the processes work on while the first of them is waited for
WORTH_PROCESSES = 400  # clips to be done: in about the time that a process takes to start
TICK, COARSE_TICK = 0.1, 2.0  # seconds within which two changes of a file may have one time, see `settled`
SETTINGS_KEPT = 8  # folders of one task: as many settings can take turns


@dataclass
class Found:
    """What a task found out about a clip. value: of JSON.

    stamp: of its embedding file, taken before it was read; None: not to be kept, as where the clip is bad and will be
    changed. id, named, video: by which it is found again.
    """

    value: Any
    id: str = ""
    named: str | None = None
    video: str | None = None
    path: Path | None = None
    stamp: tuple[int, ...] | None = None

    def find(self, source: Source) -> Path:
        """Its embedding file. Raises ProspectError."""
        return find_embeddings(self.id, source.folder, self.named, self.video, allow_outside=source.allow_outside)


@dataclass(frozen=True)
class Task:
    """name: a word. find(source, index, given): a function of a module. depends_on: what `given` comes to, as JSON."""

    name: str
    find: Callable[[Source, int, Any], Found]
    given: Any
    depends_on: Any


def find_all(
    sources: Sequence[Source],
    clips: Sequence[tuple[int, int]],
    task: Task,
    workers: int | None = None,
    keep: bool = True,
) -> Iterator[Found]:
    """What the task finds out about each of the clips, (source, number) in order, or did before. Shows a progress bar.

    workers: processes, by default one for each core. keep=False: everything is found out anew, and nothing is kept.
    """
    workers = cores() if workers is None else workers
    stores = [Store(source, task) if keep else None for source in sources]
    work = (task.find, sources, task.given)
    parts: dict[tuple[int, int], list[int]] = {}
    for number, index in clips:
        parts.setdefault((number, index // PART), []).append(index)
    bar = tqdm(total=len(clips), desc=task.name, unit="clip", disable=None, delay=1, dynamic_ncols=True)
    waiting: deque[Part] = deque()
    with contextlib.ExitStack() as stack:
        stack.callback(bar.close)
        processes = None
        for (number, place), indices in parts.items():
            part = Part(sources[number], stores[number], place, indices)
            missing = [index for index in indices if index not in part.known]
            if processes is None and min(len(missing) // WORTH_PROCESSES + 1, workers) > 1:
                processes = stack.enter_context(Processes(do_chunk, work, workers))
            for begin in range(0, len(missing), CHUNK):
                chunk = (number, missing[begin : begin + CHUNK])
                do_here = functools.partial(do_chunk, work, chunk)
                part.chunks.append(processes.submit(chunk).result if processes else do_here)
            waiting.append(part)
            if len(waiting) > AHEAD or processes is None:
                yield from waiting.popleft().finish(bar)
        while waiting:
            yield from waiting.popleft().finish(bar)


def do_chunk(work: tuple[Callable, Sequence[Source], Any], chunk: tuple[int, list[int]]) -> list[Found]:
    find, sources, given = work
    number, indices = chunk
    return [find(sources[number], index, given) for index in indices]


class Part:
    """Clips of one file that are kept together: those that are known already, and chunks of the others, to be done."""

    def __init__(self, source: Source, store: "Store | None", place: int, indices: list[int]):
        self.store, self.place, self.indices = store, place, indices
        self.chunks: list[Callable[[], list[Found]]] = []
        self.began = time.time()
        self.known: dict[int, Found] = {}
        self.lines: dict[int, str] = {} if store is None else store.read(place)  # also those of clips not wanted now
        for index in indices:
            if index in self.lines and (found := still_true(source, self.lines[index])):
                self.known[index] = found

    def finish(self, bar: tqdm) -> Iterator[Found]:
        """All of them in order. What is new is kept, also when this is interrupted."""
        todo = (found for done in self.chunks for found in done())
        changed = False
        try:
            for index in self.indices:
                found = self.known.get(index)
                if found is None:
                    found = next(todo)
                    self.lines.pop(index, None)
                    if found.stamp and settled(found.stamp, self.began):
                        line = [index, found.id, found.named, found.video, found.stamp, found.value]
                        self.lines[index] = json.dumps(line)
                        changed = True
                bar.update()
                yield found
        finally:
            if changed and self.store is not None:
                self.store.write(self.place, self.lines)


def still_true(source: Source, line: str) -> Found | None:
    """What a line says, where the clip's embedding file is the same as it was; else None."""
    _, id, named, video, kept, value = json.loads(line)
    found = Found(value, id, named, video)
    try:
        found.path = found.find(source)
        found.stamp = stamp(found.path)
    except (ProspectError, OSError):
        return None
    return found if list(found.stamp) == kept else None


def settled(stamp: tuple[int, ...], at: float) -> bool:
    """Whether a file was left alone for so long, `at` (seconds of the epoch), that its next change has another time.

    Times come from a clock that ticks a hundred times a second, and some file systems keep but whole seconds, or two.
    """
    coarse = all(nanoseconds % 1_000_000 == 0 for nanoseconds in stamp[1:3])
    return max(stamp[1:3]) < (at - (COARSE_TICK if coarse else TICK)) * 1e9


# ---- on the disk ---------------------------------------------------------------------------------


class Store:
    """Where a task's findings about one clip file are kept."""

    def __init__(self, source: Source, task: Task):
        file, folder = source.file, source.folder
        on = [code_version(task.find), file.stamp, str(file.path), str(folder), source.allow_outside, task.depends_on]
        key = hashlib.sha256(json.dumps(on).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        whose = hashlib.sha256(str(file.path.resolve()).encode()).hexdigest()[:16]
        self.task = task.name
        self.places = [
            place / f"{task.name}-{key}"
            for place in (file.path.parent / ".prospect" / file.path.name, cache / "prospect" / whose)
        ]
        self.settled = settled(file.stamp, time.time())

    def read(self, part: int) -> dict[int, str]:
        """The lines of a part by their clip's number; none where nothing is kept, or not what was written."""
        for path in sorted((place / f"{part:05d}.jsonl" for place in self.places), key=_changed, reverse=True):
            with contextlib.suppress(OSError, ValueError):
                digest, _, text = path.read_text(encoding="utf-8").partition("\n")
                if digest == hashlib.sha256(text.encode()).hexdigest():
                    return {int(line[1 : line.index(",")]): line for line in text.splitlines()}
        return {}

    def write(self, part: int, lines: dict[int, str]) -> None:
        """Keep the lines of a part, at the first place where that is possible; or report that it is not, and why."""
        text = "".join(f"{lines[index]}\n" for index in sorted(lines))
        for place in self.places if self.settled else ():
            try:
                with write_whole(place / f"{part:05d}.jsonl") as file:
                    file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())
            except ProspectError as error:
                refused = error
                continue
            others = [path for path in place.parent.glob(f"{self.task}-*") if path != place]
            for old in sorted(others, key=_changed)[: -SETTINGS_KEPT + 1]:
                shutil.rmtree(old, ignore_errors=True)
            return
        if self.settled:
            _report_once(f"what was found about the clips is not kept, the next start begins anew: {refused.what}")


@functools.cache
def _report_once(what: str) -> None:
    tqdm.write(f"warning: {what}", file=sys.stderr)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed by another run meanwhile
        return 0.0


@functools.cache
def code_version(find: Callable) -> str:
    """A digest of the module that `find` is in, of every module of ours that it imports, and of what these rest on."""
    root = Path(__file__).parent
    names, sources = [find.__module__.removeprefix("prospect.")], {}
    while names:
        name = names.pop()
        if name not in sources:
            sources[name] = (root / f"{name}.py").read_text(encoding="utf-8")
            names += re.findall(r"^from prospect\.(\w+) import", sources[name], re.MULTILINE)
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode())
    digest.update("".join(version(name) for name in ("numpy", "safetensors", "tokenizers")).encode())
    return digest.hexdigest()
