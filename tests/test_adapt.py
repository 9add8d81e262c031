"""The README's worked example: its edits, made to a copy of ppo.py, give a program that learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parent.parent
RULE = "# " + "-" * 76 + " "  # begins the heading of a section


def chapter(title):
    """The part of the README under a heading."""
    return (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def replace_section(source, section):
    """The source with the section that has the same heading replaced."""
    heading, _, _ = section.partition("\n")
    lines = source.splitlines()
    assert lines.count(heading) == 1, heading
    before, after = source.split(f"{heading}\n")
    return f"{before}{section.strip()}\n\n\n{after[after.index(RULE) :]}"


def apply_hunks(source, diff):
    """The source with each hunk's - lines, which must occur just once, replaced by its + lines."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in "-+" for line in lines), hunk
        old = "".join(line[1:] for line in lines if line[0] == "-")
        new = "".join(line[1:] for line in lines if line[0] == "+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def adapt(source, text):
    """The source after all edits that a text makes: sections of Python, and hunks of a diff."""
    edits = 0
    for language, block in re.findall(r"```(python|diff)\n(.*?)```", text, re.DOTALL):
        if language == "diff":
            source = apply_hunks(source, block)
            edits += 1
        elif block.startswith(RULE):
            source = replace_section(source, block)
            edits += 1
        else:  # code that is shown, and not part of this example
            compile(block, "README.md", "exec")
    assert edits > 0
    return source


def test_the_edits_of_the_readme_turn_ppo_to_another_task(tmp_path):
    text = chapter("How to adapt a file to your own model")
    source = adapt((ROOT / "ppo.py").read_text(), text)
    (tmp_path / "alphabet.py").write_text(source)
    (command,) = re.findall(r"```\n(python alphabet.py.*?)```", text, re.DOTALL)
    words = command.replace("\\\n", "").split()[1:]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the tensors are tiny: a second one only costs
    )
    assert done.returncode == 0, done.stderr
    ending = done.stdout.splitlines()[-1]
    before, after, *_ = map(float, re.fullmatch(programs.ENDING, ending).groups())
    assert before < 0.45, ending
    assert after > before + 0.2, ending  # the standard error is 0.006
    assert {path.name for path in tmp_path.iterdir()} == {"alphabet.py"}


def test_main_knows_nothing_of_the_toy():
    """What another task replaces is not named in the other sections."""
    for script in ("reinforce.py", "ppo.py", "grpo.py"):
        source = (ROOT / script).read_text()
        main = source[source.index("\ndef main(") :]
        for name in ("EOS", "VOCAB", "TARGET", "RESPONSE_LENGTH"):
            assert not re.search(rf"\b{name}\b", main), f"{name} in main of {script}"
        calls = re.findall(r"\bpolicy\((?!tokens)", main)
        assert calls == [], script  # only generate and response_states call the policy


def flag_tables():
    """The scripts and the flags that each table of our and other libraries' names puts first."""
    path = ROOT / "docs" / "libraries.md"
    if not path.exists():
        return
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
        first = [row.split("|")[1] for row in table.splitlines()]
        yield re.findall(r"`(\w+\.py)`", first[0]), re.findall(r"`--([a-z-]+)", "".join(first))


@pytest.mark.parametrize("scripts, flags", [*flag_tables()], ids=lambda value: value[0])
def test_every_flag_that_is_mapped_to_other_libraries_exists(scripts, flags):
    assert scripts
    assert flags
    source = "".join((ROOT / script).read_text() for script in scripts)
    for flag in flags:
        assert re.search(rf"^    {flag.replace('-', '_')}: ", source, re.MULTILINE), flag
