"""What the model sees and what it is trained on, token by token: how a reader checks that the labels are right.

    python -m prospect.show config.yaml [--clip FILE[:ID or INDEX]] [--split train|val] [--all] [section.key=value ...]
    python -m prospect.show config.yaml --html PAGE.html [--versus section.key=value ...]     the same as a page

Prints one clip's sequence as a table: position, token, the frame at each <image> and its time, and the labels where
something is learned, with assistant turns in green and updates in blue; then the label counts of the clip and of one
epoch of the corpus, which are those that train.py logs. Long runs of frames with equal labels are folded unless --all.
The page shows every token; with --versus, it shows the clip under two configurations side by side.
"""

import argparse
import sys
from dataclasses import astuple, dataclass

from prospect.build import load_corpus, load_tokenizer, make_sample_corpus
from prospect.config import Config, load_config
from prospect.data import Corpus, collate, contents, counts_line, label_counts
from prospect.errors import ProspectError, run_entry_point
from prospect.model import IGNORE, added, count_labels
from prospect.names import clip_file_names, parse_clip_name
from prospect.report.page import LOSS_NAMES
from prospect.report.tokens import Setting, token_table, write_settings
from prospect.sequence import LABEL_KEYS, Sample
from prospect.tokenizer import Tokenizer

GREEN, BLUE, DIM, PLAIN = "\033[32m", "\033[34m", "\033[2m", "\033[0m"


@dataclass
class TokenRow:
    """A token as the table shows it. Every cell is text: "" where there is no frame or nothing is learned."""

    position: str
    token: str
    frame: str
    time: str
    reply_text: str
    speak_now: str
    update_text: str
    update_now: str
    step_state: str

    def labels(self) -> tuple[str, ...]:
        return self.reply_text, self.speak_now, self.update_text, self.update_now, self.step_state

    def colour(self) -> str:
        if self.reply_text or self.speak_now == "1":
            return GREEN
        return BLUE if self.update_text or self.update_now == "1" else DIM


TITLES = ("position", "token", "frame", "time", *LOSS_NAMES.values())


def token_rows(sample: Sample, tokenizer: Tokenizer) -> list[TokenRow]:
    moments = zip(sample.decision_positions.tolist(), sample.frames, sample.times)
    moment_at = {position: (f"f{frame}", f"{time:.1f}s") for position, frame, time in moments}
    rows = []
    for position, id in enumerate(sample.input_ids.tolist()):
        labels = []
        for key in LABEL_KEYS:
            label = int(sample.labels[key][position])
            if label == IGNORE:
                labels.append("")
            else:
                labels.append(visible(tokenizer.decode([label])) if key.endswith("gen_labels") else str(label))
        token = visible(tokenizer.decode([id]))
        rows.append(TokenRow(str(position), token, *moment_at.get(position, ("", "")), *labels))
    return rows


def visible(text: str) -> str:
    """Line breaks and other unprintable characters shown as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_table(rows: list[TokenRow], colour: bool, fold: bool) -> None:
    """Print the rows; with `fold`, a frame between two frames with the same labels is only counted."""
    widths = [max(len(title), *map(len, column)) for title, column in zip(TITLES, zip(*map(astuple, rows)))]
    print("  ".join(title.ljust(width) for title, width in zip(TITLES, widths)))
    hidden = 0
    for number, row in enumerate(rows):
        around = rows[max(0, number - 1) : number + 2]
        if fold and len(around) == 3 and all(near.frame and near.labels() == row.labels() for near in around):
            hidden += 1
            continue
        if hidden:
            print(f"{'':{widths[0]}}  ... {hidden} more frames like these")
            hidden = 0
        line = "  ".join(cell.ljust(width) for cell, width in zip(astuple(row), widths)).rstrip()
        print(row.colour() + line + PLAIN if colour else line)


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
        setattr(config.data, split, clip_file_names([path]))
    return load_corpus(config, tokenizer, split), which, tokenizer


def setting(config: Config, clip: str | None, split: str, title: str) -> Setting:
    """A clip's sequences and label counts under one configuration, for the page."""
    corpus, which, tokenizer = open_corpus(config, clip, split)
    samples = [corpus[(0, index)] for index in chosen_sequences(corpus, which)]
    counts = added(count_labels(collate([sample], tokenizer.pad_id)["targets"]) for sample in samples)
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
        batch = collate([sample], tokenizer.pad_id)
        size = f"{len(sample.input_ids)} tokens, {len(sample.frames)} frames"
        print(f"\n{contents(batch)[0]}; {size}; text places and negatives as drawn for epoch 0")
        print_table(token_rows(sample, tokenizer), sys.stdout.isatty(), fold=not arguments.all)
        print("labels of this sequence:   ", counts_line(count_labels(batch["targets"])))
    print("labels of one epoch:       ", counts_line(label_counts(corpus)))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
