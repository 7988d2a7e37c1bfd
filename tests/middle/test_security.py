"""No code from data: what must not stand in this project's Python and shell files, found by reading them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted(p for part in ("hacl_llava", "scripts", "benchmarks") for p in (ROOT / part).rglob("*.py"))
SHELL = sorted((ROOT / "scripts").glob("*.sh"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# called as a plain name, or as module.name
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive",
    "tarfile.open", "zipfile.ZipFile", "tempfile.mktemp",
}  # fmt: skip
METHODS = {"extractall"}


def dotted(node):
    """``a.b.c`` of a name or an attribute of one; None of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return None


def problems(source):
    """``[(line, what)]`` that a Python file should not hold. Names are followed through ``import ... as``."""
    tree = ast.parse(source)
    names, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            for alias in node.names:
                whole = f"{module}.{alias.name}" if module else alias.name
                names[alias.asname or alias.name] = whole
                if PICKLES & {whole.split(".")[0]}:
                    found.append((node.lineno, f"import of {whole}"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func) or ""
        first, _, rest = called.partition(".")
        called = f"{names.get(first, first)}{'.' + rest if rest else ''}"
        given = {k.arg: k.value for k in node.keywords}

        def is_true(name, given=given):
            return name in given and not (isinstance(given[name], ast.Constant) and not given[name].value)

        if called in CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
            found.append((node.lineno, called or node.func.attr))
        if called == "torch.load" and not (
            isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True
        ):
            found.append((node.lineno, "torch.load without weights_only=True"))
        if called in ("numpy.load", "np.load") and is_true("allow_pickle"):
            found.append((node.lineno, "numpy.load with allow_pickle"))
        if is_true("shell"):
            found.append((node.lineno, "shell=True"))
    for node in ast.walk(tree):
        # A flag of the user's may be handed on, and is off unless given; a True of our own may not.
        pairs = zip(node.keys, node.values) if isinstance(node, ast.Dict) else ()
        pairs = [(k.value, v) for k, v in pairs if isinstance(k, ast.Constant)]
        pairs += [(k.arg, k.value) for k in getattr(node, "keywords", ())]
        for name, value in pairs:
            if name == "trust_remote_code" and isinstance(value, ast.Constant) and value.value:
                found.append((node.lineno, "trust_remote_code=True"))
    return sorted(found)


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_runs_no_code_from_data(path):
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "eval(text)",
        "exec(text)",
        "import os as o\no.system(text)",
        "from os import popen as p\np(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import subprocess\nsubprocess.run(text, shell=flag)",
        "from subprocess import getoutput\ngetoutput(text)",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "from torch import load\nload(path, weights_only=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "Model.from_pretrained(name, trust_remote_code=True)",
        "more = {'trust_remote_code': True}",
        "import tarfile\ntarfile.open(path)",
        "archive.extractall(folder)",
        "import shutil\nshutil.unpack_archive(path)",
    ],
)
def test_control_planted_ones_are_found(planted):
    assert problems(f"def f():\n    pass\n\n\n{planted}\n")


@pytest.mark.parametrize(
    "fine",
    [
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
        "import json\njson.load(file)",
        "import subprocess\nsubprocess.run(['git', name], shell=False)",
        "import re\nre.compile(text)",
        "model.eval()",
    ],
)
def test_control_what_is_fine_is_not(fine):
    assert problems(fine) == []


def shell_problems(text):
    """What a shell script should not hold: code made of data, or expansions that split it into words."""
    code = re.sub(r"^\s*#.*$", "", text, flags=re.M)
    found = re.findall(r"\beval\b|\b(?:ba)?sh\s+-c\b|`|\bcurl\b[^\n]*\|", code)
    # $NAME and ${NAME...} outside double quotes, where they are words of their own; ((...)) and [[...]] do not split.
    code = re.sub(r"\$\(\(.*?\)\)", "0", code)
    bare = re.sub(r'"(?:\\.|\$\([^()]*\)|[^"\\])*"', '""', code)
    bare = re.sub(r"'[^']*'|^\s*case .* in\b|(?<![\w-])\w+\+?=\S*", "", bare, flags=re.M)
    # ${X:+--flag="$X"} quotes the value where it stands.
    return found + re.findall(r"\$\{?\w+(?::[-=?][^}]*)?\}?", re.sub(r'\$\{\w+:\+[^}]*""\}', "", bare))


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_shell_scripts_quote_what_they_are_given(path):
    assert shell_problems(path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        'eval "$X"',
        'bash -c "run $X"',
        "run $X",
        "run ${X:-a}",
        "run --flag=$X",
        "[ -r $X ] || run",
        'X="a"; run "$X" $Y',
        "run `cat x`",
    ],
)
def test_control_planted_in_a_script(planted):
    assert shell_problems(f"#!/bin/bash\nset -e\n{planted}\n")


def test_every_shell_script_stops_at_the_first_error():
    assert all("set -euo pipefail" in p.read_text() for p in SHELL if p.read_text().startswith("#!"))
