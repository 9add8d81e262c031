"""What several scripts are tested with: short runs, spies, a clock, the real command."""

import copy
import functools
import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
WARM = {}  # policies and states of the generator after a warm start, by script, seed and steps


def shorten_runs(monkeypatch, folder, *scripts):
    """Run in an empty folder, evaluate on 5 prompts, and warm a script up once a seed and steps:
    remembered, it leaves the same weights and the same random numbers."""

    def once(script, warm_start, policy, prompts, responses, steps):
        key = script.__name__, torch.initial_seed(), steps
        if key not in WARM:
            warm_start(policy, prompts, responses, steps)
            weights = {name: x.clone() for name, x in policy.state_dict().items()}
            WARM[key] = weights, torch.get_rng_state()
        policy.load_state_dict(WARM[key][0])
        torch.set_rng_state(WARM[key][1])

    for script in scripts:
        train, held_out = script.make_prompts()
        few = functools.partial(lambda *split: split, train, held_out[:5])
        monkeypatch.setattr(script, "make_prompts", few)
        warm = functools.partial(once, script, script.warm_start)
        monkeypatch.setattr(script, "warm_start", warm)
    monkeypatch.chdir(folder)


def record(monkeypatch, script, *names):
    """Let functions of a script note their arguments: name to one dictionary a call."""
    calls = {name: [] for name in names}

    def spy(name, function):
        arguments = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def noted(*args, **more):
            calls[name].append(dict(zip(arguments, args, strict=False)) | more)
            return function(*args, **more)

        return noted

    for name in names:
        monkeypatch.setattr(script, name, spy(name, getattr(script, name)))
    return calls


def spy(monkeypatch, module, name, before=lambda *args, **more: None, keep=lambda result: result):
    """Record, of every call of a function, its arguments, what keep() makes of its result, and what
    before() made of the arguments before it."""
    calls, function = [], getattr(module, name)

    def recorder(*arguments, **more):
        noted = before(*arguments, **more)
        result = function(*arguments, **more)
        calls.append((arguments, keep(result), noted))
        return result

    monkeypatch.setattr(module, name, recorder)
    return calls


def spy_on_samples(monkeypatch, script, before=lambda *args: None):
    """The same of the function that samples; of its results, the responses (B, R) alone."""
    if hasattr(script, "generate"):
        return spy(monkeypatch, script, "generate", before)
    return spy(monkeypatch, script, "generate_with_states", before, lambda result: result[0])


def tick(monkeypatch, script):
    """Give a script a clock that goes on by a second each time it is read."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), strftime=time.strftime)
    monkeypatch.setattr(script, "time", clock)


class NoWriter:
    """Stands in for a SummaryWriter and writes nothing."""

    def __getattr__(self, name):
        return lambda *args: None


def start(line, folder):
    """A fixture's work: the real command, begun now, to run beside the tests on another core.

    What it yields waits for the end of the command and returns its folder and what it printed.
    """
    script, *words = line.split()
    command = [sys.executable, str(ROOT / script), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # the tests have the other core
    process = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **pipes)

    def result():
        printed, errors = process.communicate()
        assert process.returncode == 0, errors
        return folder, printed

    yield result
    if process.poll() is None:  # nobody waited: end it, and its own processes, which hold the pipes
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def check_hyperparameters(folder, flags, **given):
    """The table of flags and their values in a run's events: all flags, with the values given."""
    event, *others = EventAccumulator(str(folder)).Reload().Tensors("hyperparameters/text_summary")
    (text,) = event.tensor_proto.string_val
    head, rule, *rows = text.decode().splitlines()
    assert (head, rule, others) == ("|flag|value|", "|-|-|", [])
    table = dict(row.strip("|").split("|") for row in rows)
    assert len(table) == len(rows) and table.keys() == vars(flags).keys()
    assert given.items() <= table.items()


SHORT_RUN = "--total-episodes 640 --batch-size 64 --sft-steps 20 --save-path model.pt"


def check_short_run(script, folder, printed):
    """The weights that a run of SHORT_RUN saved and its TensorBoard folder, once header, progress,
    verdict and files are as they should be."""
    lines, name = printed.splitlines(), script.__name__
    assert lines[0].startswith(f"{name}.py")
    assert len(lines) == 1 + 640 // 64 + 1  # a line of progress every rollout, as they are so few
    form = r" *(\d+)%  score ([01]\.\d{3})  KL -?\d\.\d{3}  +([\d,]+) episodes/s +(\d+) s left"
    shares, scores, speeds, left = zip(
        *(re.fullmatch(form, line).groups() for line in lines[1:-1]), strict=True
    )
    assert shares[0] == "10" and shares[-1] == "100" and left[-1] == "0"
    assert all(float(score) <= 1 for score in scores)
    assert all(int(speed.replace(",", "")) > 10 for speed in speeds)
    assert lines[-1].startswith("held-out success") and "optimality" in lines[-1]
    assert {p.name for p in folder.iterdir()} == {"runs", "model.pt"}
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved["script"] == f"{name}.py"
    (events,) = (folder / "runs").iterdir()
    assert events.name.startswith(f"{name}__1__")
    check_hyperparameters(events, script.Args(), batch_size="64", seed="1", save_path="model.pt")
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


def check_policy_images(monkeypatch, script, run):
    """The pictures of a run with TensorBoard: of each prompt π(d4, d5), d4 down and d5 right, as
    the square root, before training in the first row of pictures and after it in the second."""
    drawn, tables, table = [], [], script.response_distribution

    def keep(*args):
        tables.append(table(*args))
        return tables[-1]

    monkeypatch.setattr(script, "response_distribution", keep)
    monkeypatch.setattr(script.SummaryWriter, "add_images", lambda *a: drawn.append(a))
    run()
    ((_, tag, pictures, _),) = drawn
    before, after = tables
    assert tag == "policy" and pictures.shape == (2 * len(before), 1, 94, 94)
    number = {tuple(y): i for i, y in enumerate(script.all_responses().tolist())}
    for d4, d5 in ((0, 0), (2, 9), (9, 2), (9, 9)):
        logprobs = torch.cat([before, after])[:, number[d4, d5, script.EOS]]
        square = pictures[:, 0, 2 + 9 * d4 : 11 + 9 * d4, 2 + 9 * d5 : 11 + 9 * d5]
        expected = (logprobs / 2).exp()[:, None, None].expand_as(square)
        torch.testing.assert_close(square, expected)
    assert (pictures[:, :, :2] == 0.5).all() and (pictures[:, :, :, -2:] == 0.5).all()
