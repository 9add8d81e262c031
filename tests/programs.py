"""What is checked of several scripts alike: the real command, and the frozen reference."""

import copy
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def run_in_a_shell(script, folder):
    """A short run of a script's real command in an empty folder: its output, the weights it saved
    and its TensorBoard folder, once header, progress, verdict and files are as they should be."""
    words = "--total-episodes 640 --batch-size 64 --sft-steps 20 --save-path model.pt".split()
    command = [sys.executable, str(ROOT / f"{script}.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{script}.py") and "100%" in lines[-2]
    assert lines[-1].startswith("held-out success") and "optimality" in lines[-1]
    assert {p.name for p in folder.iterdir()} == {"runs", "model.pt"}
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved["script"] == f"{script}.py"
    (events,) = (folder / "runs").iterdir()
    assert events.name.startswith(f"{script}__1__") and any(events.iterdir())
    return saved, events


def check_reference_is_frozen(monkeypatch, run):
    """During run(), the one deep copy of the policy keeps its weights to the bit."""
    made, deepcopy = [], copy.deepcopy

    def keep(policy):
        reference = deepcopy(policy)
        made.append((reference, {k: v.clone() for k, v in reference.state_dict().items()}))
        return reference

    monkeypatch.setattr(copy, "deepcopy", keep)
    run()
    ((reference, before),) = made
    after = reference.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in reference.parameters())
