"""What holds for every script: one code under one name, flags that are read, honest headers."""

import ast
import functools
import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
NAMES = {path.stem for path in SCRIPTS}
OWN = {"Args", "check_args", "main"}  # the only definitions that may differ between scripts
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)

# The scripts of the toy task. digits_sum20.py and gpt2_sentiment.py have flags of their own, except
# for these.
TOY = {"reinforce.py", "ppo.py", "grpo.py", "dpo.py", "reward_model.py"}
COMMON_WITH_DIGITS = {"seed", "tensorboard"}
# Flags whose meaning is another one in another script.
MEANING_DIFFERS = {"loss_type", "reward", "baseline"}


@functools.cache
def parse(path):
    return ast.parse(path.read_text()).body


def segment(source, node):
    """Source of a definition with its decorators."""
    first = min([node.lineno, *[d.lineno for d in node.decorator_list]])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def definitions(path):
    """Source of every function and class at the top of a script, by name."""
    source = path.read_text()
    found = {}
    for node in parse(path):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = segment(source, node)
    return found


def constants(path):
    """Source of the value of every constant at the top of a script, by name."""
    found = {}
    for node in parse(path):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.unparse(node.value)
    return found


def fields(path):
    """The flags of a script, as nodes, by name."""
    (args,) = [node for node in parse(path) if getattr(node, "name", "") == "Args"]
    return {node.target.id: node for node in args.body if isinstance(node, ast.AnnAssign)}


def help_text(path, node):
    """The comment behind the last line of a flag."""
    line = path.read_text().splitlines()[node.end_lineno - 1]
    return line.partition("  # ")[2]


def shared_functions():
    """The names of functions that stand in several scripts, and in which."""
    scripts = {}
    for path in SCRIPTS:
        for name in definitions(path):
            scripts.setdefault(name, []).append(path)
    return {name: paths for name, paths in scripts.items() if len(paths) > 1 and name not in OWN}


# ---------------------------------------------------------------------------- Shared code
def differences(parts):
    """Names that have another source in another script. parts(path): {name: source}."""
    seen = {}
    different = []
    for path in SCRIPTS:
        for name, source in parts(path).items():
            other, known = seen.setdefault(name, (path.name, source))
            if source != known and name not in OWN:
                different.append(f"{name} in {path.name} and in {other}")
    return different


def test_same_name_same_code():
    assert differences(definitions) == []


def test_same_constant_same_value():
    assert differences(constants) == []


def optional_parameters(function):
    """Name and position of the parameters with a default."""
    parameters = function.args
    positional = [*parameters.posonlyargs, *parameters.args]
    first = len(positional) - len(parameters.defaults)
    found = [(p.arg, first + i) for i, p in enumerate(positional[first:])]
    pairs = zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)
    found += [(p.arg, None) for p, default in pairs if default is not None]
    return found


def passes(call, name, position):
    """Whether a call gives a value to the parameter of this name and position."""
    if any(keyword.arg in (name, None) for keyword in call.keywords):
        return True
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    return position is not None and (starred or len(call.args) > position)


def unused_options(paths):
    """Optional parameters of functions of several of these scripts that one of them never sets."""
    functions = {}
    calls = {}
    for path in paths:
        for node in parse(path):
            if isinstance(node, ast.FunctionDef):
                functions.setdefault(node.name, []).append((path, node))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                calls.setdefault((path, node.func.id), []).append(node)
    unused = []
    for name, places in functions.items():
        if len(places) == 1 or name in OWN:
            continue
        for path, function in places:
            for parameter, position in optional_parameters(function):
                mine = calls.get((path, name), [])
                if not any(passes(call, parameter, position) for call in mine):
                    unused.append(f"{name}({parameter}) in {path.name}")
    return unused


def test_options_of_shared_functions_are_used_by_every_script():
    """A shared function has only what every script that holds it needs."""
    assert unused_options(SCRIPTS) == []


def test_an_unused_option_is_found(tmp_path):
    one = tmp_path / "one.py"
    two = tmp_path / "two.py"
    function = "def f(x, y=1, *, z=2):\n    return x\n\n\n"
    one.write_text(function + "f(1, 2, z=3)\n")
    two.write_text(function + "f(1)\nf(1, z=3)\n")
    assert unused_options([one, two]) == ["f(y) in two.py"]
    two.write_text(function + "f(*both, z=3)\n")
    assert unused_options([one, two]) == []


@each_script
def test_every_function_and_constant_is_used(path):
    source = path.read_text()
    for name in [*definitions(path), *constants(path)]:
        assert len(re.findall(rf"\b{name}\b", source)) > 1, name


@each_script
def test_no_script_imports_another(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not NAMES & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in NAMES
            assert node.level == 0


# ---------------------------------------------------------------------------- Flags
def test_flags_of_one_name_have_one_type_and_one_help_text():
    seen = {}
    different = []
    for path in SCRIPTS:
        for name, node in fields(path).items():
            compared = name not in MEANING_DIFFERS and path.name in TOY
            if compared or (path.name == "digits_sum20.py" and name in COMMON_WITH_DIGITS):
                found = (ast.unparse(node.annotation), help_text(path, node))
                other, known = seen.setdefault(name, (path.name, found))
                if found != known:
                    different.append(f"--{name} in {path.name} and in {other}")
    assert different == []


@each_script
def test_every_flag_is_read(path):
    source = path.read_text()
    for name in fields(path):
        assert re.search(rf"\bargs\.{name}\b", source), name


@each_script
def test_help_lists_every_flag_and_importing_does_nothing(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    out, error = capsys.readouterr()
    assert stop.value.code == 0
    assert error == ""
    for name in fields(path):
        assert f"--{name.replace('_', '-')}" in out
    assert list(tmp_path.iterdir()) == []
    for node in parse(path):  # nothing is called at the top of a script
        assert not isinstance(node, ast.Expr) or isinstance(node.value, ast.Constant)


def check_refused(path, flags, expected, monkeypatch, capsys):
    """main() ends at once with status 2, one line on stderr and nothing on stdout."""

    def work_begins(seed):
        raise AssertionError("the flags were not refused")

    monkeypatch.setattr(torch, "manual_seed", work_begins)
    script = importlib.import_module(path.stem)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(**flags))
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error


@each_script
def test_a_file_named_runs_is_in_the_way(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("")
    monkeypatch.chdir(tmp_path)
    check_refused(path, {}, "--no-tensorboard", monkeypatch, capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]


WITH_SAVE_PATH = [path for path in SCRIPTS if "save_path" in fields(path)]


@pytest.mark.parametrize("path", WITH_SAVE_PATH, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["missing/model.pt", "note.txt/model.pt", "."])
def test_a_save_path_that_cannot_be_written_is_refused(path, name, tmp_path, monkeypatch, capsys):
    (tmp_path / "note.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    flags = {"save_path": Path(name)}
    check_refused(path, flags, f"--save-path {name}", monkeypatch, capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("path", WITH_SAVE_PATH, ids=lambda path: path.name)
def test_no_gpu_is_said_in_one_line(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    check_refused(path, {"device": "cuda"}, "--device cuda", monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- Headers
@each_script
def test_inline_dependencies_agree_with_the_requirements(path):
    block = re.search(r"# /// script\n(.*?)# ///", path.read_text(), re.S).group(1)
    inline = set(re.findall(r'"([a-z_]+[<>=].*?)"', block)) - {">=3.10"}
    required = (ROOT / "requirements.txt").read_text().split()
    assert inline
    assert inline <= set(required)
    packages = {re.match(r"[a-z_]+", line).group() for line in inline}
    assert {"torch", "tyro", "tensorboard"} <= packages
