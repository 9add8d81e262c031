"""The README's worked example: its edits, made to a copy of ppo.py, give a program that learns."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RULE = "# " + "-" * 66  # begins the heading of a section


def chapter(title):
    """The part of the README under a heading."""
    return (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def replace_section(source, section):
    """The source with the section whose heading begins with the same two words replaced."""
    heading = re.match(rf"{RULE} \w+ \w+", section).group()
    assert source.count(heading) == 1, heading
    before, rest = source.split(heading)
    return before + section + "\n\n" + rest[rest.index(RULE) :]


def apply_hunks(source, diff):
    """The source with each hunk's - lines, which must occur just once, replaced by its + lines."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in "-+" for line in lines), hunk
        old, new = ("".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def test_the_edits_of_the_readme_turn_ppo_to_another_task(tmp_path):
    text = chapter("How to adapt a file to your own model")
    source = (ROOT / "ppo.py").read_text()
    for language, block in re.findall(r"```(python|diff)\n(.*?)```", text, re.DOTALL):
        source = {"python": replace_section, "diff": apply_hunks}[language](source, block)
    (tmp_path / "alphabet.py").write_text(source)
    (command,) = re.findall(r"```\n(python alphabet.py.*?)```", text, re.DOTALL)
    words = command.replace("\\\n", "").split()[1:]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    verdict = done.stdout.splitlines()[-1]
    before, after = map(float, re.findall(r"success (\S+) -> (\S+)", verdict)[0])
    assert before < 0.45 and after > before + 0.3, verdict  # standard error of each 0.02
    assert {path.name for path in tmp_path.iterdir()} == {"alphabet.py"}


def flag_tables():
    """The scripts and the flags that each table of our and other libraries' names puts first."""
    text = chapter("The same flags in the large libraries")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        first = [row.split("|")[1] for row in table.splitlines()]
        yield re.findall(r"`(\w+\.py)`", first[0]), re.findall(r"`--([a-z-]+)", "".join(first))


@pytest.mark.parametrize("scripts, flags", [*flag_tables()], ids=lambda value: value[0])
def test_every_flag_that_the_readme_maps_exists(scripts, flags):
    paths = [ROOT / script for script in scripts]
    if not all(path.exists() for path in paths):
        pytest.skip("not written yet")
    source = "".join(path.read_text() for path in paths)
    for flag in flags:
        assert re.search(rf"^    {flag.replace('-', '_')}: ", source, re.MULTILINE), flag
