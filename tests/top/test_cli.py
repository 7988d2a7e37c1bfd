"""hacl-llava: options and help, env, patch; and the wheel."""

import argparse
import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hacl_llava import __version__, cli, patching
from hacl_llava.common.options import add_options, argument, option, whole
from hacl_llava.demo import free_port

ROOT = Path(__file__).parents[2]
LOADED, KEYS = "how the checkpoint is loaded", "endpoints (keys come from the environment alone)"
GROUPS = {
    "hallucinate": ("what is asked for", "how the run goes", "source api (the key comes from the environment alone)"),
    "check-data": ("images", "texts", "what is written"),
    "analyze": (LOADED,),
    "export": (LOADED, "model card and hub"),
    "card": ("model card and hub",),
    "chat": (LOADED,),
    "eval": (LOADED, "tasks, one or more", KEYS),
}


def ended(capsys, *argv):
    """Exit status, stdout, stderr of a command line that argparse ends."""
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    return stop.value.code, *capsys.readouterr()


def test_help_names_every_command(capsys):
    status, out, _ = ended(capsys, "--help")
    assert status == 0
    assert re.findall(r"^    ([\w-]+)\b", out, re.M) == list(cli.COMMANDS) and "eval" in cli.COMMANDS
    assert __version__ in ended(capsys, "--version")[1]
    status, _, err = ended(capsys, "nothing")
    assert status == 2 and "argument COMMAND: invalid choice: 'nothing'" in err
    assert ended(capsys)[0] == 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_fits_a_screen(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = ended(capsys, name, "--help")
    lines = out.splitlines()
    assert status == 0 and len(lines) <= (50 if name in ("hallucinate", "eval") else 40)
    assert max(map(len, lines)) <= 80 and lines[0].startswith(f"usage: hacl-llava {name} [options]")
    titles = re.findall(r"^(\S.*):\n  \S", out, re.M)
    assert [t for t in titles if t not in ("positional arguments", "options")] == list(GROUPS.get(name, ()))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_options_of_a_bare_line_are_the_defaults_in_python(name):
    options, line, given = inspect.signature(cli.COMMANDS[name]).parameters["options"].annotation, [], {}
    for field in dataclasses.fields(options):
        if field.init and field.default is dataclasses.MISSING:
            value = "llava" if field.name == "to" else "x"
            line += [f"--{field.name}", value] if field.kw_only else [value]
            given[field.name] = [value] if field.type == list[str] else value
    assert cli.parse([name, *line]) == (cli.COMMANDS[name], options(**given))


@dataclasses.dataclass
class Several:
    place: list[str] = argument("where", nargs="+", metavar="PLACE")
    kind: str = option("of what", required=True, choices=("a", "b"))
    many: int = option("how many", 0, type=whole)
    share: float | None = option("of all (default: none)", group="fine")
    up: bool = option("upwards", False, either="way")
    down: bool = option("downwards", False, either="way", group="fine")
    words: list[str] | None = option("said", flag="--word", action="append", metavar="W")
    fixed: str | None = dataclasses.field(default=None, init=False)


def test_a_parser_is_made_from_a_dataclass(capsys):
    parser = argparse.ArgumentParser(prog="p")
    add_options(parser, Several)
    read = lambda line: Several(**vars(parser.parse_args(line.split())))  # noqa: E731
    assert read("x y --kind a") == Several(["x", "y"], kind="a")
    assert read("x --kind b --many 3 --share 1.5 --down --word u --word v") == Several(
        ["x"], kind="b", many=3, share=1.5, down=True, words=["u", "v"]
    )
    for line, said in (
        ("x", "the following arguments are required: --kind"),
        ("x --kind c", "argument --kind: invalid choice: 'c'"),
        ("x --kind a --many 0", "argument --many: '0': allowed is a whole number from 1"),
        ("x --kind a --share y", "argument --share: invalid float value: 'y'"),
        ("x --kind a --up --down", "argument --down: not allowed with argument --up"),
        ("x --kind a --fixed y", "unrecognized arguments: --fixed y"),
    ):
        with pytest.raises(SystemExit):
            read(line)
        err = capsys.readouterr().err
        assert err.startswith("usage: p [options] PLACE ... --kind {a,b}\n") and said in err
    text = parser.format_help()
    assert "how many (default: 0)\n" in text and "of all (default: none)\n" in text and "upwards\n" in text


def test_env(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("torch", "transformers", "deepspeed", "llava", "devices"):
        assert f"\n{name} " in out
    assert "tested together" in out and "llava: imports" in out


def test_env_without_llava(capsys, monkeypatch):
    monkeypatch.delattr("hacl_llava.compat")
    monkeypatch.setitem(sys.modules, "hacl_llava.compat", None)
    assert cli.main(["env"]) == 1
    assert "- llava: " in capsys.readouterr().out


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with the train.py of the installed llava, which is that of v1.2.2.post1 and of the last commit."""
    import llava

    folder = tmp_path / "LLaVA"
    (folder / "llava/train").mkdir(parents=True)
    shutil.copy(Path(llava.__path__[0]) / "train/train.py", folder / "llava/train/train.py")
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_patch_command_equals_the_patch_file_and_goes_again(checkout, capsys):
    file = checkout / "llava/train/train.py"
    before = file.read_bytes()
    patch = ROOT / "patches/use_hacl.patch"
    subprocess.run(["git", "apply", "--check", patch], cwd=checkout, check=True)
    subprocess.run(["git", "apply", patch], cwd=checkout, check=True)
    by_git = file.read_bytes()
    assert cli.main(["patch", str(checkout), "--check"]) == 0 and "has the patch" in capsys.readouterr().out
    subprocess.run(["git", "apply", "-R", patch], cwd=checkout, check=True)
    assert file.read_bytes() == before

    assert cli.main(["patch", str(checkout), "--check"]) == 0 and "can be patched" in capsys.readouterr().out
    assert file.read_bytes() == before
    for path in (checkout, checkout / "llava", checkout / "llava/train", file):
        assert cli.main(["patch", str(path)]) == 0
        assert file.read_bytes() == by_git
    assert "already" in capsys.readouterr().out
    assert len(by_git.splitlines()) == len(before.splitlines()) + 2
    assert cli.main(["patch", str(checkout), "--revert"]) == 0
    assert file.read_bytes() == before
    assert cli.main(["patch", str(checkout), "--revert"]) == 0 and "nothing done" in capsys.readouterr().out
    assert [p.name for p in file.parent.iterdir()] == ["train.py"]


def test_patch_keeps_windows_line_ends(checkout):
    file = checkout / "llava/train/train.py"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    before = file.read_bytes()
    patching.patch(checkout)
    after = file.read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") == before.count(b"\n") + 2
    patching.patch(checkout, revert=True)
    assert file.read_bytes() == before


def test_patch_refuses_what_it_does_not_know(tmp_path, capsys):
    assert cli.main(["patch", str(tmp_path)]) == 2
    assert "has no llava/train/train.py; give a LLaVA checkout" in capsys.readouterr().err
    (tmp_path / "train.py").write_text("def train():\n    pass\n")
    assert cli.main(["patch", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "0 times, expected once" in err and str(tmp_path) in err
    assert (tmp_path / "train.py").read_text() == "def train():\n    pass\n"


@pytest.mark.once
@pytest.mark.e2e
def test_wheel_in_a_clean_environment(tmp_path):
    """The built wheel, in an environment that has its dependencies (from this one) and nothing of this folder."""
    run = lambda *a, **k: subprocess.run(a, check=True, capture_output=True, text=True, timeout=300, **k)  # noqa: E731
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".venv*", ".git", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(source))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", str(wheel))
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    here = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(site, "dependencies.pth").write_text(here + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = run(str(python), "-c", "import hacl_llava; print(hacl_llava.__file__)", cwd=tmp_path, env=env).stdout
    assert str(tmp_path / "venv") in out
    assert "patch" in run(str(tmp_path / "venv/bin/hacl-llava"), "--help", cwd=tmp_path, env=env).stdout
    # An installed package has no scripts/: the launcher takes the module.
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", free_port())
    out = run(str(python), *launcher, "--module", "hacl_llava.train", "--help", cwd=tmp_path, env=env).stdout
    assert "--hacl_weight FLOAT" in out and "deepspeed scripts/pretrain_hacl.py" in out
    Path(tmp_path, "in.json").write_bytes((ROOT / "tests/data/coco_captions.json").read_bytes())
    more = ("hallucinate", "in.json", "out.json", "--limit", "5", "--choose", "random")
    out = run(str(tmp_path / "venv/bin/hacl-llava"), *more, cwd=tmp_path, env=env).stdout
    assert "5 of 401 records have hallucinated captions" in out  # the vocabulary is in the wheel
    words = "from hacl_llava.evaluation.chair import read_synonyms as r; print(r().category['polar bear'])"
    assert run(str(python), "-c", words, cwd=tmp_path, env=env).stdout == "bear\n"  # and the words for COCO's objects
    points = "import importlib.metadata as m; print(m.entry_points(group='lmms_eval.models')['hacl_llava'].value)"
    out = run(str(python), "-c", points, cwd=tmp_path, env=env).stdout
    assert out == "hacl_llava.evaluation.lmms:manifest\n"
