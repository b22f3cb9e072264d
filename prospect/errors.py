"""The one error a user can cause, and how an entry point ends: on it, or by naming the command that comes next.

Everything a user can get wrong (a config key, a clip, an embedding file, a checkpoint) raises
ProspectError with three parts: *what* is wrong, *where* it is (file, clip, turn, field) and the
*remedy*. Entry points print it as one line and exit with status 2. Asserts are for invariants of
our own code and are never meant to be read by a user.
"""

import os
import sys
from collections.abc import Callable

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # in torch's words, on a GPU and on a CPU


class ProspectError(Exception):
    """What went wrong, where, and what to do about it, printed as one line: ``where: what (remedy)``."""

    def __init__(self, what: str, *, where: str = "", remedy: str = ""):
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{line} ({self.remedy})" if self.remedy else line
        line = " ".join(line.split())  # one line, whatever a file's own text contained
        return "".join(c if c.isprintable() else "?" for c in line)  # and no escape sequence reaches the terminal

    def __reduce__(self):  # keeps where and remedy when a data worker hands the error to its parent
        return (_rebuild, (self.what, self.where, self.remedy))


def _rebuild(what: str, where: str, remedy: str) -> ProspectError:
    return ProspectError(what, where=where, remedy=remedy)


def print_next(command: str) -> None:
    """The command that comes next on the way from raw data to an evaluation, on a line of its own, to be pasted."""
    print(f"next:\n{command}")


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its status: 2 after a ProspectError (one line on stderr), 130 after Ctrl-C.

    What the operating system refuses, wherever that is, ends like a ProspectError: a full disk is no fault of ours.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
    except ProspectError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except (MemoryError, RuntimeError) as error:  # torch's have no type of their own on a CPU
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        remedy = "lower data.batch_tokens, data.max_seq_len, --streams or a size of the model"
        print(f"error: {ProspectError(f'out of memory: {error}', remedy=remedy)}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output (head, less) has closed it: not a failure
        status = 0
    except OSError as error:
        where, remedy = str(error.filename or ""), "check the path, the permissions and the free space"
        print(f"error: {ProspectError(error.strerror or str(error), where=where, remedy=remedy)}", file=sys.stderr)
        status = 2
    try:
        sys.stdout.flush()
    except OSError:  # what cannot be printed must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
