"""What all pages share: assembling the file, the names of the losses, numbers as JSON can hold them."""

import html
import json
import math
from pathlib import Path
from typing import Any

from prospect.files import write_whole

# What the model learns, by loss, in the words that every page and prospect.show use; in the order of LABEL_KEYS.
LOSS_NAMES = {
    "speaking_gen": "reply text (LM)", "speaking_binary": "speak now?", "dst_gen": "update text (LM)",
    "dst_binary": "update now?", "dst_state": "step state",
}  # fmt: skip


def write_page(path: str | Path, kind: str, title: str, data: Any) -> None:
    """Write the page `kind` (a script in prospect/report/) with its data to `path`, whole or not at all.

    The data is escaped so that no text in it can end the script element that holds it; the page shows text as text.
    Raises ProspectError when the file cannot be written.
    """
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "style": page_source("page.css"), "data": embedded}
    parts["script"] = page_source("common.js") + page_source(f"{kind}.js")
    skeleton = page_source("page.html").split("{{")
    page = skeleton[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in skeleton[1:]))
    with write_whole(Path(path)) as file:
        # "replace": JSON strings may contain half of a surrogate pair, a file may not
        file.write(page.encode("utf-8", "replace"))


def page_source(name: str) -> str:
    """One of the files beside this one that a page is assembled from."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def number(value: Any, digits: int = 6) -> float | int | None:
    """A number for the page, to so many significant digits; None where it is missing or not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")
