"""Work dealt out to processes of one thread each, which come up in a moment and hold little.

A process is a fresh Python that imports what the work needs and nothing else. (multiprocessing would import the main
script again in each: torch, in 5 seconds and 300 MB. A fork would copy the locks of torch's and gloo's threads, but not
the threads.) It is sent the work once and then short messages, and sends back one answer to each, through its pipes.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prospect.errors import ProspectError

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Processes:
    """`count` processes, to be left as a context: `submit(message)` gives work(given, message) in the future.

    work: a function of a module, which each process imports; given, messages and answers can be pickled. The future
    raises a ProspectError of the work, and one where the process was killed.
    """

    def __init__(self, work: Callable[[Any, Any], Any], given: Any, count: int):
        self.job = pickle.dumps((os.getpid(), work, given))
        self.idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self.started: list[subprocess.Popen] = []
        self.threads = ThreadPoolExecutor(count, initializer=self._start)  # a thread waits for each

    def submit(self, message: Any) -> Future:
        return self.threads.submit(self._ask, message)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *raised: Any) -> None:
        for process in self.started:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.started:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait()

    def _start(self) -> None:
        root = str(Path(__file__).parents[1])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        # -P: not what happens to be named `prospect` in the current directory.
        command = [sys.executable, "-P", "-c", "from prospect.processes import serve; serve()"]
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.started.append(process)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self.job)
        self.idle.put(process)

    def _ask(self, message: Any) -> Any:
        process = self.idle.get()
        try:
            pickle.dump(message, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            what = "a process that checks clips was killed, perhaps for lack of memory"
            raise ProspectError(what, remedy="start again: what was checked is kept") from error
        finally:
            self.idle.put(process)
        if isinstance(answer, ProspectError):
            raise answer
        return answer


def serve() -> None:
    """What one of the processes does, until nobody sends it messages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    receive, send = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    with contextlib.suppress(EOFError, BrokenPipeError):
        parent, work, given = pickle.load(receive)
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
        while True:
            message = pickle.load(receive)
            try:
                answer = work(given, message)
            except ProspectError as error:
                answer = error
            pickle.dump(answer, send)
            send.flush()


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone, killed perhaps, also in the middle of long work."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
