"""Installed with pip, the two commands run from any folder, and the pages find their templates."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_an_installed_copy_has_everything(tmp_path):
    pytest.importorskip("setuptools")
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "prospect", source / "prospect", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "infer.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)  # pip leaves its build folder beside them
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, str(source)], check=True)
    files = [path.relative_to(ROOT) for path in (ROOT / "prospect").rglob("*.*") if path.suffix != ".pyc"]
    assert len(files) > 40 and [path for path in files if not (target / path).is_file()] == []

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(target / "bin" / command), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    refused = run("prospect-train", "nothing.yaml")
    assert refused.returncode == 2 and refused.stderr.startswith("error: nothing.yaml: no such config file")
    assert "--clip" in run("prospect-infer", "--help").stdout
