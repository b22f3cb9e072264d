"""Other people's data as clips and embeddings. Each command prints the one that comes next; docs/data.md has them all.

python -m prospect.convert proassist IN.jsonl OUT.json                   ProAssist's dialogues -> clips (and back)
python -m prospect.convert features ARROW ... --clips CLIPS --out DIR    ProAssist's features -> embeddings
python -m prospect.convert steps IN OUT                                  a recipe and a dialogue -> step times
python -m prospect.convert states IN OUT                                 step times -> updates of the task state
"""

import argparse
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prospect.clip_files import open_source
from prospect.convert import proassist, states, steps
from prospect.errors import ProspectError, print_next, run_entry_point
from prospect.files import write_whole
from prospect.text_metrics import load_similarity


def write_objects(objects: Iterable[dict[str, Any]], path: Path) -> int:
    """Write JSONL where `path` ends with .jsonl, else a JSON list; returns how many.

    One object is in memory at a time. An object that is refused on the way leaves nothing behind.
    """
    before, between, after = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    count = 0
    with write_whole(path) as file:
        file.write(before.encode())
        for item in objects:
            file.write(((between if count else "") + json.dumps(item, ensure_ascii=False)).encode())
            count += 1
        file.write(after.encode())
    return count


def embed_command(clips: Path, data: Path | None = None) -> str:
    """How these clips get embeddings: from the features in the folder of a ProAssist data set, or from its frames."""
    out = shlex.join(["--clips", str(clips), "--out", str(clips.parent / "embeddings")])
    features = sorted(path for path in data.glob("features/*") if path.is_dir()) if data else []
    if features:
        return f"python -m prospect.convert features {shlex.quote(str(features[0]))} {out}"
    frames = f"{shlex.quote(str(data / 'frames'))}/*.arrow" if data and (data / "frames").is_dir() else "VIDEO ..."
    return f"python -m prospect.encode {frames} --vision VISION_DIR {out}"


def check_or_embed_command(clips: Path) -> str:
    source = open_source(clips, None, False)
    try:
        source.embeddings_path(source.file.clip(0))
    except ProspectError:
        return embed_command(clips)
    return shlex.join(["python", "-m", "prospect.check", str(clips)])


# ---- the commands --------------------------------------------------------------------------------


def convert_proassist(arguments: argparse.Namespace) -> int:
    source, out = arguments.input, arguments.output
    if arguments.reverse:
        print(f"{write_objects(proassist.prepared_of(source), out)} dialogues -> {out}")
        return 0
    print(f"{write_objects(proassist.clips_of(source), out)} clips -> {out}")
    print_next(embed_command(out, source.parent.parent))  # DATA/prepared/IN.jsonl, beside DATA/frames and DATA/features
    return 0


def convert_features(arguments: argparse.Namespace) -> int:
    from prospect.convert.features import convert_features  # only here: it needs the vision extra

    status = convert_features(arguments.sources, arguments.clips, arguments.out, arguments.tokens)
    if status == 0:
        words = ["python", "-m", "prospect.check", arguments.clips, "--embeddings", arguments.out]
        print_next(shlex.join(map(str, words)))
    return status


def convert_steps(arguments: argparse.Namespace) -> int:
    similarity, out, report = load_similarity(arguments.similarity), arguments.output, steps.Report()
    clips = steps.clips_with_steps(arguments.input, arguments.recipe, similarity, arguments.least, report)
    write_objects(clips, out)
    print(report)
    words = ["python", "-m", "prospect.convert", "states", out, out.with_stem(f"{out.stem}_states")]
    print_next(shlex.join(map(str, words)))
    return 0


def convert_states(arguments: argparse.Namespace) -> int:
    source, out, level, report = arguments.input, arguments.output, arguments.level, states.Report()
    if source.is_dir() or source.suffix == ".tsv":
        if arguments.steps is not None:
            raise ProspectError(
                "--steps belongs to clips, and IN is TSV already", where=str(source), remedy="leave it out"
            )
        clips = states.clips_of_tables(source, arguments.fps, level, report)
    else:
        clips = states.clips_with_updates(source, arguments.steps, level, arguments.replace, report)
    write_objects(clips, out)
    print(report)
    print_next(check_or_embed_command(out))
    return 0


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m prospect.convert", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, description: str | None) -> argparse.ArgumentParser:
        one = commands.add_parser(name, description=description, formatter_class=form)
        one.set_defaults(run=run)
        return one

    written = "a JSON list, or JSONL if it ends with .jsonl"
    one = command("proassist", convert_proassist, proassist.__doc__)
    one.add_argument("input", type=Path)
    one.add_argument("output", type=Path, help=written)
    one.add_argument("--reverse", action="store_true", help="from converted clips back to prepared dialogues")

    one = command("features", convert_features, "ProAssist's published features as embeddings.")
    one.add_argument("sources", nargs="+", type=Path, metavar="ARROW", help="feature files, or directories of them")
    one.add_argument("--clips", type=Path, required=True, help="clip file: its clips' rows are written")
    one.add_argument("--out", type=Path, required=True, help="directory for the embeddings, created if missing")
    what = "vectors per frame: 1 (cls, the default), 5 (cls and 2x2), 10 (cls and 3x3) or 26 (cls and 5x5)"
    one.add_argument("--tokens", type=int, choices=(1, 5, 10, 26), default=1, help=what)

    one = command("steps", convert_steps, steps.__doc__)
    one.add_argument("input", type=Path, metavar="IN", help="clip file")
    one.add_argument("output", type=Path, metavar="OUT", help=written)
    one.add_argument(
        "--recipe", type=Path, help="numbered lines, for all clips (default: each clip's inferred_knowledge)"
    )
    what = "DIR: a local sentence-transformers model"
    one.add_argument("--similarity", default="lexical", metavar="lexical|DIR", help=what)
    what = "similarity below which a turn does not name a step (default 0.3, right for lexical; a model's are higher)"
    one.add_argument("--least", type=float, default=0.3, help=what)

    one = command("states", convert_states, states.__doc__)
    one.add_argument("input", type=Path, metavar="IN", help="clip file, or TSV file, or directory of TSV files")
    one.add_argument("output", type=Path, metavar="OUT", help=written)
    one.add_argument(
        "--level", choices=states.LEVELS, default="step", help="which type of step is tracked (default step)"
    )
    what = "with clips: take the steps from VIDEO_UID.tsv, this file or in this directory"
    one.add_argument("--steps", type=Path, metavar="TSV", help=what)
    one.add_argument("--replace", action="store_true", help="make updates anew where a clip has some")
    one.add_argument("--fps", type=float, default=2, help="with TSV: frames per second of the clips (default 2)")

    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    run_entry_point(main)
