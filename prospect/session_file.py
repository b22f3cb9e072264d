"""A stream put down and taken up again: a session as one safetensors file, its JSON in the header.

    save_session(session, path)                                          after any frame
    session = load_session(path, model, tokenizer, clip, config)         in another process, on another machine

The cache is not stored. What stands in it is known, token by token and row by row, so one forward builds it again, as
after a refresh of the context. A session restored behind any frame gives the records that the first one would have
given. The file is replaced in one piece: a process killed while it saves leaves the previous one.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from prospect.checkpoint import flatten
from prospect.clips import Clip
from prospect.config import Config, to_dict
from prospect.decisions import Evidence
from prospect.errors import ProspectError
from prospect.files import write_whole
from prospect.model import Prospect
from prospect.stream import StreamSession, Unit
from prospect.tokenizer import Tokenizer

FREE = ("infer.lookahead", "infer.device")  # settings that change no record


def save_session(session: StreamSession, path: Path) -> None:
    """Write the session to `path`. Raises ProspectError when it cannot be written."""
    units = [dataclasses.asdict(unit) | {"rows": len(unit.rows)} for unit in session.units]
    values = {
        "clip": session.clip.id,
        "settings": settings(session.config),
        "prompt": session.prompt,
        "units": units,
        "frame_idx": session.frame_idx,
        "state": session.state,
        "pending": session.pending,
        "evidence": dataclasses.asdict(session.evidence),
    }
    rows = torch.cat(
        [unit.rows for unit in session.units] or [torch.empty(0, session.model.config.vision_dim)]
    )  # [F,D]
    with write_whole(path) as file:
        file.write(save({"rows": rows.contiguous()}, {"session": json.dumps(values)}))


def load_session(path: Path, model: Prospect, tokenizer: Tokenizer, clip: Clip, config: Config) -> StreamSession:
    """The session of a file, ready for its next frame.

    Raises ProspectError for a file that save_session did not write, and when the clip or a setting that changes records
    is another one than when the session was saved.
    """
    try:
        with safe_open(path, "pt") as file:
            values, rows = json.loads((file.metadata() or {})["session"]), file.get_tensor("rows")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        what = f"is not a saved session: {error}"
        raise ProspectError(what, where=str(path), remedy="name a file that save_session wrote") from error
    then, now = values["settings"], settings(config)
    names = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    differ = [f"{name} was {then.get(name)}, is {now.get(name)}" for name in names]
    if values["clip"] != clip.id:
        differ = [f"the clip was {values['clip']}, is {clip.id}"]
    if differ:
        what = f"was saved with other settings: {'; '.join(differ)}"
        raise ProspectError(what, where=str(path), remedy="load it with those, or begin a new stream")

    session = StreamSession(model, tokenizer, clip, config)
    parts = rows.split([unit["rows"] for unit in values["units"]])
    session.rebuild(values["prompt"], [Unit(**unit | {"rows": part}) for unit, part in zip(values["units"], parts)])
    session.frame_idx, session.state, session.pending = values["frame_idx"], values["state"], values["pending"]
    session.evidence = Evidence(**values["evidence"])
    return session


def settings(config: Config) -> dict[str, object]:
    """The settings that a session's records depend on, by name."""
    values = to_dict(config)
    found = flatten({"data": values["data"], "infer": values["infer"]})
    files = ("data.train", "data.val", "data.embeddings")
    return {name: value for name, value in found.items() if name not in FREE and not name.startswith(files)}
