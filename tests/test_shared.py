"""What holds for every script: one code under one name, flags that are read, honest headers."""

import ast
import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
OWN = {"Args", "check_args", "main"}  # the only names that may differ from script to script
COMMON = "seed device tensorboard save_path sft_steps total_episodes batch_size".split()
COMMON += "max_grad_norm temperature kl_coef reward_model rm_uncertainty_coef".split()
COMMON += ["annotator_temperature", "preferences"]
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def definitions(path):
    """Source of every function and class at the top of a script, by name."""
    source = path.read_text()
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {n.name: segment(source, n) for n in nodes}


def segment(source, node):
    """Source of a node with its decorators."""
    first = min([node.lineno, *[d.lineno for d in node.decorator_list]])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def fields(path):
    """The flags of a script: name to annotation, in order."""
    (args,) = [n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "Args"]
    return {n.target.id: n for n in args.body if isinstance(n, ast.AnnAssign)}


def test_same_name_same_code():
    seen = {}
    for path in SCRIPTS:
        for name, source in definitions(path).items():
            if name not in OWN:
                other, before = seen.setdefault(name, (path.name, source))
                assert source == before, f"{name} differs in {path.name} and {other}"


def test_common_flags_have_one_type_and_one_help():
    seen = {}
    for path in SCRIPTS:
        source = path.read_text().splitlines()
        for name, node in fields(path).items():
            if name in COMMON:
                help_text = source[node.end_lineno - 1].split("#")[-1]
                # Where it may be None, a setting fits the model that is chosen.
                found = (ast.unparse(node.annotation).removesuffix(" | None"), help_text)
                assert seen.setdefault(name, found) == found, f"--{name} in {path.name}"


@each_script
def test_every_flag_is_read(path):
    source = path.read_text()
    for name in fields(path):  # the ladder of digits_sum20.py reads its knobs from a dictionary
        knob = re.escape(name.removesuffix("_final"))
        assert re.search(rf'\bargs\.{name}\b|\bknobs(\[|\.get\(|, )"{knob}"', source), name


@each_script
def test_every_flag_has_a_line_of_help(path):
    lines = path.read_text().splitlines()
    for name, node in fields(path).items():
        assert re.search(r"  # \S.{5,}", lines[node.lineno - 1]), f"{name} has no help"


@each_script
def test_no_script_imports_another(path):
    names = {p.stem for p in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not names & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in names and node.level == 0


@each_script
def test_inline_dependencies_agree_with_the_requirements(path):
    source = path.read_text()
    block = re.search(r"# /// script\n(.*?)# ///", source, re.S).group(1)
    inline = set(re.findall(r'"([a-z_]+[<>=].*?)"', block)) - {">=3.10"}
    required = (ROOT / "requirements.txt").read_text().split()
    assert inline and inline <= set(required)
    wanted = {"torch", "tyro", "tensorboard"}
    assert wanted <= {re.match(r"[a-z_]+", line).group() for line in inline}


@each_script
def test_help_lists_every_flag_and_importing_does_nothing(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    out, error = capsys.readouterr()
    assert stop.value.code == 0 and error == ""
    for name in fields(path):
        assert f"--{name.replace('_', '-')}" in out
    assert list(tmp_path.iterdir()) == []
    body = ast.parse(path.read_text()).body
    calls = [n for n in body if isinstance(n, ast.Expr) and not isinstance(n.value, ast.Constant)]
    assert not calls


@each_script
def test_a_file_named_runs_is_in_the_way(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("")
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(path.stem)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args())
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and error.startswith("error: --tensorboard True:")
    assert "--no-tensorboard" in error and error.count("\n") == 1


@each_script
@pytest.mark.parametrize("name", ["missing/model.pt", "note.txt/model.pt", "."])
def test_weights_are_saved_where_they_can_be(path, name, tmp_path, monkeypatch, capsys):
    if "save_path" not in fields(path):
        return
    (tmp_path / "note.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(path.stem)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(save_path=Path(name)))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and error.startswith(f"error: --save-path {name}: ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["note.txt"]


@each_script
def test_no_line_is_wider_than_the_rule(path):
    assert max(len(line) for line in path.read_text().splitlines()) <= 100
