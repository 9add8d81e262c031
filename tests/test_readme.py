"""README and docs say what benchmark/results/ holds, and their commands are the scripts' own."""

import importlib
import importlib.util
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import tyro

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
PLACEHOLDERS = {"X.py"}  # any script
spec = importlib.util.spec_from_file_location("report", ROOT / "benchmark" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def commands():
    """Every command of a script, in the pages and in the headers of the scripts."""
    texts = [path.read_text() for path in PAGES]
    texts += [path.read_text().split('"""')[1] for path in SCRIPTS]
    text = "\n".join(texts).replace("\\\n", "").replace("&&", "\n")
    found = re.findall(r"(?:python|torchrun --nproc-per-node \d) (\w+\.py)([^#`\n;]*)", text)
    return sorted({(script, words.strip()) for script, words in found})


# ---------------------------------------------------------------------------- Results
@each_page
def test_numbers_are_those_of_the_results(path):
    text = path.read_text()
    assert report.render(text) == text, "run: python benchmark/report.py"
    for name, table in re.findall(r"<!-- begin (\w+) -->\n(.*?)<!-- end \1 -->", text, re.S):
        assert table.count("\n") > 3, name  # none is empty


def test_a_number_typed_in_by_hand_is_seen():
    (table,) = re.findall(r"<!-- begin scripts -->(.*?)<!-- end", README, re.S)
    typed = README.replace(table, table.replace(" ± 0.", " ± 1.", 1))
    assert typed != README
    assert report.render(typed) == README


@each_page
def test_links_and_figures_are_there(path):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if link.startswith("http"):
            continue
        target = path.parent / link
        assert target.exists(), link
        assert target.suffix != ".png" or target.stat().st_size < 300_000, link


# ---------------------------------------------------------------------------- Commands
@pytest.mark.parametrize("script, words", commands())
def test_commands_are_understood(script, words, tmp_path, monkeypatch):
    """The flags are parsed, and not refused, where the files that are read are there."""
    script = script.removeprefix("my_")  # a copy
    if script in PLACEHOLDERS:
        assert not (ROOT / script).exists()
        return
    assert (ROOT / script).exists(), script
    words = shlex.split(words)
    if "--help" in words:
        return
    module = importlib.import_module(script.removesuffix(".py"))
    args = tyro.cli(module.Args, args=words)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flag, value in vars(args).items():
        if isinstance(value, Path) and not flag.startswith("save"):
            Path(value).touch()
    module.check_args(args)


def test_commands_of_the_benchmark_exist():
    text = "\n".join(path.read_text() for path in PAGES)
    for path in re.findall(r"python (benchmark/\S+\.py)", text):
        assert (ROOT / path).exists(), path


FLAGS_OF_OTHERS = {"logdir", "nproc-per-node", "help", "no-tensorboard"}


def test_every_flag_in_the_readme_exists():
    flags = {field.name for path in SCRIPTS for field in fields(args_of(path))}
    for flag in re.findall(r"`--([a-z0-9-]+)", README):
        assert flag.replace("-", "_") in flags or flag in FLAGS_OF_OTHERS, flag


def args_of(path):
    return importlib.import_module(path.stem).Args
