"""What prose and code say of each other: the README's tree and commands, the pictures, the imports, the form."""

import ast
import contextlib
import functools
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest

from prospect.config import Config, to_dict

ROOT = Path(__file__).parent.parent
PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    path
    for path in sorted((ROOT / "prospect").rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
]  # fmt: skip
TREE = "## Where to find what"  # the README's section with a line for every file

# (importing, imported): the imports, inside functions, that point up. Everything else points down.
UPWARD = {("prospect.model", "prospect.weights")}


# ---- prose ---------------------------------------------------------------------------------------


def test_the_readmes_tree_and_the_files_name_each_other():
    """A line names a file by its path, or a folder and then its files: `prospect/report/   page.py, timeline.py`."""
    section = (ROOT / "README.md").read_text().split(f"{TREE}\n")[1].split("\n## ")[0]
    named = set()
    for line in section.splitlines():
        folder = re.match(r" *((?:\w+/)+)(?!\S)|", line)[1] or ""
        named |= {folder + name for name in re.findall(r"[\w/.-]+\.(?:py|yaml|md)\b", line)}
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []
    assert sorted({str(path.relative_to(ROOT)) for path in MODULES} - named) == []


def commands(text: str) -> list[tuple[str, str]]:
    """(module or script of ours, what follows it) of every command in a text, at the shell or between backticks."""
    pattern = r"(?:python3?|torchrun)\b(?! -m pytest).*?(?:-m (prospect[\w.]*)|((?:[a-z]+/)?\w+\.py)\b)(.*)"
    pieces = re.split(r"&&|[`|\n]", text.replace("\\\n", " "))
    found = [match.groups() for piece in pieces if (match := re.search(pattern, piece))]
    return [(module or script, arguments) for module, script, arguments in found]


def test_commands_are_found_wherever_they_stand():
    text = (
        "Run `python -m prospect.show A --all` or\n\n    ci/bin/python train.py c && python3 docs/x.py --b \\\n  --c\n"
    )
    text += "| this | `torchrun --nnodes=2 train.py c --d` | python -m pytest -q |"
    expected = [
        ("prospect.show", " A --all"),
        ("train.py", " c "),
        ("docs/x.py", " --b    --c"),
        ("train.py", " c --d"),
    ]
    assert commands(text) == expected


@functools.cache
def help_of(name: str, *arguments: str) -> str:
    """What `--help` of a module or script prints, run in this process: torch is then imported once for all."""
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, *arguments, "--help"]),
        mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
        contextlib.redirect_stdout(output),
        warnings.catch_warnings(action="ignore"),  # runpy: "found in sys.modules"
        pytest.raises(SystemExit) as ended,
    ):
        if name.endswith(".py"):
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0, (name, output.getvalue())
    return output.getvalue()


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_every_command_in_prose_runs_and_knows_its_flags(path):
    for name, arguments in commands(path.read_text()):
        known = help_of(name)
        first = arguments.split()[0] if arguments.split() else ""
        if re.search(rf"[{{,]{re.escape(first)}[,}}]", known):  # a subcommand has a parser of its own
            known += help_of(name, first)
        flags = re.findall(r"(?<!\S)--[a-z][\w-]*", arguments)
        missing = [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", known)]
        assert not missing, f"{path.name}: {name}{arguments}: no {', '.join(missing)}"


def test_every_setting_in_prose_exists():
    sections = to_dict(Config())
    for path in [*PROSE, ROOT / "config.yaml", *(ROOT / "configs").glob("*.yaml")]:
        for section, key in re.findall(rf"\b({'|'.join(sections)})\.(\w+(?:\.\w+)?)=", path.read_text()):
            value = sections[section]
            for name in key.split("."):
                assert name in value, f"{path.name}: {section}.{key}"
                value = value[name]


def test_every_test_that_the_promises_name_exists():
    """docs/reliability.md, and whatever else names a test as tests/FILE.py::NAME; each promise names one."""
    for path in PROSE:
        for file, name in re.findall(r"\btests/([a-z]\w+\.py)::(\w+)", path.read_text()):
            source = ROOT / "tests" / file
            assert source.is_file() and f"\ndef {name}(" in source.read_text(), f"{path.name}: {file}::{name}"
    rows = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise |")]
    assert len(promises) > 50 and [row for row in promises if not re.search(r"`tests/\w+\.py::\w+`", row)] == []


def test_every_picture_in_docs_is_shown():
    prose = "".join(path.read_text() for path in PROSE)
    pictures = [path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".svg", ".jpg", ".gif")]
    assert sorted(name for name in pictures if name not in prose) == []


# ---- imports -------------------------------------------------------------------------------------


def test_the_trainer_stands_on_neither_pages_nor_streaming():
    script = "import sys, train; print(*[name for name in sys.modules if name.startswith('prospect.')])"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, check=True).stdout.split()  # fmt: skip
    assert "prospect.model" in loaded
    unwanted = ("prospect.report", "prospect.show", "prospect.evaluate", "prospect.stream")
    assert [name for name in loaded if name.startswith(unwanted)] == []


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The modules of ours that a file imports: when it is loaded, and inside its functions."""
    names = {".".join(module.relative_to(ROOT).with_suffix("").parts) for module in MODULES}
    names |= {
        ".".join(package.relative_to(ROOT).parts) for package in (ROOT / "prospect").iterdir() if package.is_dir()
    }
    tree = ast.parse(path.read_text())
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    at_load, later = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):  # `from prospect import check` names a module, `from x import y` is in one
            found = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found = {alias.name for alias in node.names}
        else:
            continue
        (later if id(node) in inside else at_load).update(found & names)
    return at_load, later - at_load


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, the last being the first again; empty where there are none."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        for other in sorted(graph.get(name, set()) if name not in done else ()):
            if found := walk(other, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_circles_are_found():
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c", "b"]


def test_every_import_points_down_but_the_declared_one():
    graph, upward = {}, set()
    for path in (ROOT / "prospect").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        at_load, later = imports(path)
        upward |= {(name, other) for other in later} & UPWARD
        graph[name] = {other for other in at_load | later if (name, other) not in UPWARD}
    assert circle(graph) == []
    assert upward == UPWARD  # still there, and still inside functions


# ---- form ----------------------------------------------------------------------------------------


def test_section_dividers_have_one_form():
    wrong = []
    for folder in (".", "prospect", "prospect/*", "tests", "tests/*", "benchmarks", "docs"):
        for path in ROOT.glob(f"{folder}/*.py"):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                divides = re.match(r"# ?[-=#*_]{3,}", line)
                if divides and not (re.fullmatch(r"# ---- \S.*\S -+", line) and len(line) == 100):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line}")
    assert wrong == []
