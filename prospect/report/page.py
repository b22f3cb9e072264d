"""What all pages share: assembling the file, the names of the losses, numbers as JSON can hold them."""

import datetime
import html
import json
import math
import os
from pathlib import Path
from typing import Any

from prospect.files import write_text, write_whole
from prospect.records import file_name

# What the model learns, by loss, in the words that every page and prospect.show use; in the order of LABEL_KEYS.
LOSS_NAMES = {
    "speaking_gen": "reply text (LM)", "speaking_binary": "speak now?", "dst_gen": "update text (LM)",
    "dst_binary": "update now?", "dst_state": "step state",
}  # fmt: skip


def write_page(path: str | Path, kind: str, title: str, data: dict[str, Any]) -> None:
    """Write the page `kind` (a script in prospect/report/) with its data to `path`, whole or not at all.

    The data is escaped so that no text in it can end the script element that holds it; the page shows text as text.
    Raises ProspectError when the file cannot be written.
    """
    data |= {"written": {"path": str(path), "time": datetime.datetime.now().astimezone().isoformat(" ", "minutes")}}
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "style": page_source("page.css"), "data": embedded}
    parts["script"] = page_source("common.js") + page_source(f"{kind}.js")
    skeleton = page_source("page.html").split("{{")
    page = skeleton[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in skeleton[1:]))
    with write_whole(Path(path)) as file:
        # "replace": JSON strings may contain half of a surrogate pair, a file may not
        file.write(page.encode("utf-8", "replace"))


def write_figures(folder: Path, figures: dict[str, str]) -> None:
    """Every figure of a page as a file of its own: NAME.svg."""
    for name, svg in figures.items():
        write_text(folder / f"{file_name(name)}.svg", svg)


def said_where(path: str | Path) -> str:
    """What the terminal says of a page that has been written."""
    return f"page: {path}  ({os.path.getsize(path) / 1000:.0f} kB)"


def page_source(name: str) -> str:
    """One of the files beside this one that a page is assembled from."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def differing(settings: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same everywhere, by name, each with its values; "–" where there is none."""
    names = sorted({name for one in settings for name in one})
    values = [
        (name, [json.dumps(one[name], default=str) if name in one else "–" for one in settings]) for name in names
    ]
    return [(name, of) for name, of in values if len(set(of)) > 1]


def number(value: Any, digits: int = 6) -> float | int | None:
    """A number for the page, to so many significant digits; None where it is missing or not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")
