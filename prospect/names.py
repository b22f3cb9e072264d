"""What the name of a clip file stands for, in the configuration and on the command line.

data/train.json     this file
data                a folder: its .json and .jsonl files, without hidden ones and subfolders
data/*/train.json   a pattern of *, ?, [...] and **, as shells have them: the files that it matches
data/val.json:3     this clip of a file, where one clip can be meant, by id or number
"""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from prospect.errors import ProspectError


def clip_file_names(names: Iterable[str | Path]) -> list[str]:
    """The files that the names stand for, in the order of the names; those of one folder or pattern are sorted.

    Whether a file that is named itself exists is left to whoever opens it. Raises ProspectError for a folder or a
    pattern without a file.
    """
    files = []
    for name in map(str, names):
        folder = os.path.isdir(name)
        if os.path.isfile(name) or not (folder or any(mark in name for mark in "*?[")):
            files.append(name)
            continue
        patterns = [os.path.join(glob.escape(name), f"*{end}") for end in (".json", ".jsonl")] if folder else [name]
        found = {path for pattern in patterns for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
        if not found:
            what = "the folder holds no .json or .jsonl file" if folder else "no file matches this pattern"
            remedy = "check data.train / data.val / --data / --clip"
            raise ProspectError(what, where=name, remedy=remedy)
        files += sorted(found)
    return files


def parse_clip_name(name: str) -> tuple[str, str | None]:
    """FILE, FILE:ID or FILE:INDEX as (FILE, None or the id or index). File names and ids may both contain colons."""
    cuts = [i for i, character in enumerate(name) if character == ":" and Path(name[:i]).is_file()]
    if not cuts or Path(name).is_file():
        return name, None
    return name[: cuts[0]], name[cuts[0] + 1 :]
