"""docs/cluster.md: its table is what --dry-run computes, and its Slurm script does what the page says."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_tiny_config, write_tiny_corpus

from prospect.checkpoint import read_state

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cluster.md").read_text()


HARDWARE = runpy.run_path(str(ROOT / "docs" / "hardware.py"))


@pytest.mark.slow
def test_the_table_is_what_a_dry_run_computes():
    assert HARDWARE["BEGIN"] + HARDWARE["table"]() + HARDWARE["END"] in PAGE


def test_a_cell_of_the_table_by_hand():
    # Llama-3.1-8B on 8 cards as tests/test_lora.py adds it up by hand, but of 4,096 tokens in place of 2,048, and with
    # embeddings 2048 wide in place of 1152, whose weights take 16 / 8 bytes, and 14 gathered.
    expected = 16.1036 + 16.3195 + 2 * 1.5603 + 16 * 896 * 4096 / 1e9 + 4096 / 3 * 128256 * 10 / 1e9
    assert abs(HARDWARE["gigabytes"]("Llama-3.1-8B", "full")[True, 8] - expected) < 0.001
    assert re.search(rf"Llama-3.1-8B \| all \| yes \|.*\| {expected:.1f}: 80 GB \|\n", PAGE)
    assert [HARDWARE["cell"](needed) for needed in (21.6, 21.7, 127.0)] == ["21.6: 24 GB", "21.7: 40 GB", "127.0: none"]


# ---- Slurm ---------------------------------------------------------------------------------------

# What a cluster would bring: srun starts the tasks, hands on signals and exits with the largest status of them.
SRUN = """#!{python}
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--")]
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
for n in range(int(os.environ["SLURM_NTASKS"])):
    tasks.append(subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}}))
open("{folder}/srun.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!{python}
import sys
if sys.argv[1] == "show":
    assert sys.argv[2:] == ["hostnames", "node[1-2]"]
    print("127.0.0.1\\nnode2")
else:
    open("{folder}/requeued", "a").write(" ".join(sys.argv[1:]))
"""


def write_script(folder: Path) -> Path:
    [script] = re.findall(r"```bash\n(#!/bin/bash.*?)```", PAGE, re.DOTALL)
    (folder / "train.slurm").write_text(script)
    return folder / "train.slurm"


def test_the_slurm_script_is_bash(tmp_path):
    script = write_script(tmp_path)
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().startswith("#!/bin/bash\n#SBATCH ")  # directives end at the first command


@pytest.mark.slow
def test_a_slurm_job_that_is_out_of_time_saves_is_requeued_and_resumes(tmp_path):
    write_tiny_corpus(tmp_path)
    config = write_tiny_config(tmp_path, "train.save_every=100000", "train.eval_every=100000", "train.parallel=fsdp")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text.format(python=sys.executable, folder=tmp_path))
        (tools / name).chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    command = ["bash", str(write_script(tmp_path)), str(config)]
    steps = "train.max_steps=100000"
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen([*command, steps], cwd=ROOT, env=environment, stdout=log, stderr=log)
        metrics = tmp_path / "runs/tiny/metrics.jsonl"
        until = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5) and time.monotonic() < until:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)  # the shell outlives it
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
        assert job.wait(60) == 75, (tmp_path / "log").read_text()[-2000:]
    assert (tmp_path / "requeued").read_text() == "requeue 4711"
    saved = read_state(tmp_path / "runs/tiny/last").step
    assert saved >= 5

    done = subprocess.run([*command, f"train.max_steps={saved + 2}"], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0 and b"resuming from" in done.stdout
    assert (tmp_path / "requeued").read_text() == "requeue 4711"  # a run that is done is not
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, saved + 3))
