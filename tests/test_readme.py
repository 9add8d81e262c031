"""The README says what benchmark/results/ holds, and its commands are commands of the scripts."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
spec = importlib.util.spec_from_file_location("report", ROOT / "benchmark" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

# Every command of a script in the README and in the headers of the scripts.
SOURCES = [README, *(path.read_text().split('"""')[1] for path in sorted(ROOT.glob("*.py")))]
COMMANDS = re.findall(r"python (\w+\.py) ?([^#`\n]*)", "\n".join(SOURCES).replace("\\\n", ""))


def test_numbers_are_those_of_the_results():
    assert report.render(README) == README, "run: python benchmark/report.py"
    tables = re.findall(r"<!-- begin (\w+) -->\n(.*?)<!-- end \1 -->", README, re.S)
    assert len(tables) >= 3
    for name, table in tables:  # none is empty, as where a results file was cut short
        assert table.count("\n") > 3, name


def test_a_number_typed_in_by_hand_is_seen():
    table = re.search(r"<!-- begin scripts -->(.*?)<!-- end", README, re.S)[1]
    typed = README.replace(table, table.replace(" ± 0.", " ± 1.", 1))
    assert typed != README and report.render(typed) == README


def test_figures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size < 300_000, path


@pytest.mark.parametrize("script, words", sorted(set(COMMANDS)))
def test_commands_are_understood(script, words):
    if not (ROOT / script).exists():  # a copy that the reader makes
        assert script == "alphabet.py"
        return
    words = shlex.split(words.split("&&")[0].replace(";", ""))
    module = importlib.import_module(script.removesuffix(".py"))
    if "--help" not in words:
        tyro.cli(module.Args, args=words)
