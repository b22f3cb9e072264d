"""What the model sees and what it is trained on, token by token: how a reader checks that the labels are right.

    python -m prospect.show config.yaml [--clip FILE[:ID or INDEX]] [--split train|val] [--all] [section.key=value ...]
    python -m prospect.show config.yaml --html PAGE.html [--versus section.key=value ...]     the same as a page

Prints one clip's sequence as a table: position, token, the frame at each <image>, and the four labels where something
is learned, with assistant turns in green and updates in blue; then the label counts of the clip and of one epoch of the
corpus, which are those that train.py logs. Long runs of frames with equal labels are folded unless --all. The page
shows every token; with --versus, the clip is shown under two configurations side by side.
"""

import argparse
import sys

from prospect.build import load_corpus, load_tokenizer, make_sample_corpus
from prospect.clip_files import parse_clip_name
from prospect.config import Config, load_config
from prospect.data import Corpus, collate, counts_line, label_counts
from prospect.errors import ProspectError, run_entry_point
from prospect.model import IGNORE, added, count_labels
from prospect.report import Setting, token_table, write_settings
from prospect.sequence import LABEL_KEYS, Sample
from prospect.tokenizer import Tokenizer

GREEN, BLUE, DIM, PLAIN = "\033[32m", "\033[34m", "\033[2m", "\033[0m"


def rows(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, ...]]:
    """(position, token, frame, speaking_gen, speaking, dst_gen, dst_update, dst_state) of every token, as text."""
    frame_at = {int(position): int(frame) for position, frame in zip(sample.decision_positions, sample.frames)}
    table = []
    for position, id in enumerate(sample.input_ids.tolist()):
        labels = [sample.labels[key][position] for key in LABEL_KEYS]
        written = []
        for key, label in zip(LABEL_KEYS, labels):
            if label == IGNORE:
                written.append("")
            else:
                written.append(tokenizer.decode([int(label)]) if key.endswith("gen_labels") else str(label))
        frame = f"f{frame_at[position]}" if position in frame_at else ""
        table.append((str(position), visible(tokenizer.decode([id])), frame, *map(visible, written)))
    return table


def visible(text: str) -> str:
    """Line breaks and other unprintable characters shown as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_table(table: list[tuple[str, ...]], colour: bool, fold: bool) -> None:
    titles = ("position", "token", "frame", "speaking_gen", "speaking", "dst_gen", "dst_update", "dst_state")
    widths = [max(len(title), *(len(row[i]) for row in table)) for i, title in enumerate(titles)]
    print("  ".join(title.ljust(width) for title, width in zip(titles, widths)))
    hidden = 0
    for number, row in enumerate(table):
        alike = 0 < number < len(table) - 1 and row[2] and table[number - 1][2] and table[number + 1][2]
        if fold and alike and row[3:] == table[number - 1][3:] == table[number + 1][3:]:
            hidden += 1
            continue
        if hidden:
            print(f"{'':{widths[0]}}  ... {hidden} more frames like these")
            hidden = 0
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        if colour:
            line = (GREEN if row[3] or row[4] == "1" else BLUE if row[5] or row[6] == "1" else DIM) + line + PLAIN
        print(line)


def chosen_sequences(corpus: Corpus, which: str | None) -> list[int]:
    """The sequences (windows) of the clip with this id or number; by default of the first clip."""
    wanted = corpus.entries[0].clip if which is None else corpus.sources[0].find(which)
    found = [i for i, entry in enumerate(corpus.entries) if entry.file == 0 and entry.clip == wanted]
    if not found:
        raise ProspectError(
            "the clip gives no sequence", where=str(corpus.sources[0].file.path), remedy="has it any turn?"
        )
    return found


def open_corpus(config: Config, clip: str | None, split: str) -> tuple[Corpus, str | None, Tokenizer]:
    """The corpus of the split, or of the file that --clip names, and which of its clips is meant."""
    make_sample_corpus(config)
    tokenizer = load_tokenizer(config)
    which = None
    if clip is not None:
        path, which = parse_clip_name(clip)
        setattr(config.data, split, [path])
    return load_corpus(config, tokenizer, split), which, tokenizer


def setting(config: Config, clip: str | None, split: str, title: str) -> Setting:
    """A clip's sequences and label counts under one configuration, for the page."""
    corpus, which, tokenizer = open_corpus(config, clip, split)
    samples = [corpus[(0, index)] for index in chosen_sequences(corpus, which)]
    counts = added(count_labels(collate([sample], tokenizer.pad_id)) for sample in samples)
    counts = {name: int(count) for name, count in counts.items()}
    return Setting(title, [token_table(sample, tokenizer) for sample in samples], counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("--clip", metavar="FILE[:ID|INDEX]", help="default: the first clip of the split")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--all", action="store_true", help="every frame on a line of its own")
    parser.add_argument("--html", metavar="PAGE.html", help="write a page instead of the table")
    what = "for --html: what a second column changes; may be given several times"
    parser.add_argument("--versus", action="append", default=[], metavar="section.key=value", help=what)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.versus and not arguments.html:
        raise ProspectError("--versus is for the page", where="command line", remedy="add --html PAGE.html")
    if arguments.html:
        settings = [setting(config, arguments.clip, arguments.split, " ".join(["as configured", *arguments.overrides]))]
        if arguments.versus:
            other = load_config(arguments.config, arguments.overrides + arguments.versus)
            settings.append(setting(other, arguments.clip, arguments.split, "with " + " ".join(arguments.versus)))
        write_settings(arguments.html, f"{settings[0].sequences[0].clip_id}, as it is trained on", settings)
        return 0
    corpus, which, tokenizer = open_corpus(config, arguments.clip, arguments.split)
    for index in chosen_sequences(corpus, which):
        sample = corpus[(0, index)]
        print(f"\n{sample.clip_id}: {len(sample.input_ids)} tokens, {len(sample.frames)} frames")
        print_table(rows(sample, tokenizer), sys.stdout.isatty(), fold=not arguments.all)
        print("labels of this sequence:   ", counts_line(count_labels(collate([sample], tokenizer.pad_id))))
    print("labels of one epoch:       ", counts_line(label_counts(corpus)))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
