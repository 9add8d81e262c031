"""What the tests of several scripts share: short runs, spies, a clock, the real command."""

import contextlib
import copy
import functools
import hashlib
import importlib
import inspect
import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent

# The weights and the generator's state after SFT, by everything that they depend on.
WARM = {}


def fingerprint(*tensors):
    """A name for the contents of these tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def remember_sft(script):
    """The script's sft(), which trains only once from the same state on the same data.

    Later calls, of any script whose sft() is the same, copy the weights and the state of the
    random generator that the first one left.
    """
    train = script.sft

    @functools.wraps(train)
    def sft(policy, prompts, responses, steps):
        start = [*policy.state_dict().values(), torch.get_rng_state(), prompts, responses]
        key = (inspect.getsource(train), steps, fingerprint(*start))
        if key not in WARM:
            train(policy, prompts, responses, steps)
            WARM[key] = (copy.deepcopy(policy.state_dict()), torch.get_rng_state())
        weights, rng_state = WARM[key]
        policy.load_state_dict(weights)
        torch.set_rng_state(rng_state)

    return sft


def shorten_runs(monkeypatch, folder, *scripts, held_out=3):
    """Run in an empty folder, evaluate on few prompts, and remember what SFT leaves."""

    def keep_few(make_prompts):
        @functools.wraps(make_prompts)
        def few(device):
            train_prompts, train_targets, test_prompts, test_targets = make_prompts(device)
            return train_prompts, train_targets, test_prompts[:held_out], test_targets[:held_out]

        return few

    for script in scripts:
        monkeypatch.setattr(script, "make_prompts", keep_few(script.make_prompts))
        monkeypatch.setattr(script, "sft", remember_sft(script))
    monkeypatch.chdir(folder)


def record(monkeypatch, script, *names):
    """Note the arguments of every call of these functions: {name: [{parameter: argument}]}."""
    calls = {name: [] for name in names}

    def noting(name, function):
        parameters = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def noted(*args, **more):
            calls[name].append(dict(zip(parameters, args, strict=False)) | more)
            return function(*args, **more)

        return noted

    for name in names:
        monkeypatch.setattr(script, name, noting(name, getattr(script, name)))
    return calls


def nothing(*args, **more):
    return None


def unchanged(result):
    return result


def spy(monkeypatch, module, name, before=nothing, keep=unchanged):
    """Note every call of a function: its arguments, keep(its result) and before(its arguments)."""
    calls = []
    function = getattr(module, name)

    @functools.wraps(function)
    def recorder(*arguments, **more):
        noted = before(*arguments, **more)
        result = function(*arguments, **more)
        calls.append((arguments, keep(result), noted))
        return result

    monkeypatch.setattr(module, name, recorder)
    return calls


def spy_on_samples(monkeypatch, script, before=nothing):
    """The same for generate(): ((policy, prompts, temperature), responses, before(arguments)).

    evaluate() samples too: spy_on_rollouts() leaves its calls out.
    """
    return spy(monkeypatch, script, "generate", before)


def spy_on_rollouts(monkeypatch, script, before=nothing):
    """spy_on_samples() without the samples of evaluate(), before and after training."""
    rollouts = []
    samples = spy_on_samples(monkeypatch, script, before)
    evaluate = script.evaluate

    @functools.wraps(evaluate)
    def evaluate_unseen(*args, **more):
        rollouts.extend(samples)
        result = evaluate(*args, **more)
        samples.clear()
        return result

    monkeypatch.setattr(script, "evaluate", evaluate_unseen)
    return rollouts


def tick(monkeypatch, script):
    """Give a script a clock that goes on by a second each time it is read."""
    ticks = itertools.count()

    def read():
        return float(next(ticks))

    clock = SimpleNamespace(time=read, perf_counter=read, strftime=time.strftime)
    monkeypatch.setattr(script, "time", clock)


class NoWriter:
    """Stands in for a SummaryWriter and writes nothing."""

    def __getattr__(self, name):
        return nothing


def record_curves(monkeypatch, script):
    """Let a script write its curves to a dictionary, {tag: [(step, value), ...]}, and no file."""
    curves = {}

    class Recorder(NoWriter):
        def __init__(self, folder, purge_step=None):
            self.folder = folder

        def add_scalar(self, tag, value, step):
            curves.setdefault(tag, []).append((int(step), float(value)))

    monkeypatch.setattr(script, "SummaryWriter", Recorder)
    return curves


def values(curve):
    """The values of a curve, without their steps."""
    return [value for _, value in curve]


def beside(function, *args, **more):
    """The mark of a test that takes long: a second process calls the function meanwhile.

    The test finds what the function returns in its fixture found.
    """
    return pytest.mark.beside.with_args(function, *args, **more)


def long_run(name, **flags):
    """Run a script with these flags. Returns what main() returns, and the curves."""
    script = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script, "sft", remember_sft(script))
        curves = record_curves(monkeypatch, script)
        return script.main(script.Args(**flags)), curves


def check_whitened(policy_losses, num_minibatches):
    """Advantages have mean 0 and deviation 1 over a rollout, not over a single minibatch."""
    first_epoch = [given for given, _, _ in policy_losses[:num_minibatches]]
    parts = [advantages[mask] for _, _, advantages, mask, _ in first_epoch]
    rollout = torch.cat(parts)
    assert abs(rollout.mean()) < 1e-5
    assert abs(rollout.std(correction=0) - 1) < 1e-4
    assert max(abs(part.mean()) for part in parts) > 0.01


def begin(folder, *words, stdout=subprocess.PIPE, **env):
    """Start python with these words. It runs in the background, while the tests go on."""
    command = [sys.executable, *map(str, words)]
    pipes = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}  # the other core has work, too
    return subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **pipes)


def end(process):
    """End a program with all its processes, if it is still going."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start(line, folder):
    """A fixture's work: the real command, started now.

    Yields a function that waits for the command's end and returns its folder and its output.
    """
    script, *words = line.split()
    process = begin(folder, ROOT / script, *words)

    def result():
        printed, errors = process.communicate()
        assert process.returncode == 0, errors
        return folder, printed

    yield result
    end(process)


def run_as_program(path, words, stdout, monkeypatch):
    """What the command does, in this process."""
    path = str(path)
    monkeypatch.setattr(sys, "argv", [path, *words.split()])
    monkeypatch.setattr(sys, "stdout", stdout)
    runpy.run_path(path, run_name="__main__")


def check_hyperparameters(folder, flags, **given):
    """The table of flags in a run's events has every flag, and the values given."""
    event, *others = EventAccumulator(str(folder)).Reload().Tensors("hyperparameters/text_summary")
    (text,) = event.tensor_proto.string_val
    head, rule, *rows = text.decode().splitlines()
    assert (head, rule, others) == ("|flag|value|", "|-|-|", [])
    table = dict(row.strip("|").split("|") for row in rows)
    assert len(table) == len(rows)
    assert table.keys() == vars(flags).keys()
    assert given.items() <= table.items()


SHORT_RUN = "--total-episodes 640 --batch-size 64 --sft-steps 20 --save-path model.pt"
PROGRESS = (
    r"episode +(\d+)  score (-?\d+\.\d{3})  KL (-?\d+\.\d{3})  "
    r"([\d,.]+) episodes/s  (\d+) s left"
)
ENDING = (
    r"held-out success ([01]\.\d{3}) -> ([01]\.\d{3}) ± (0\.\d{3})  "
    r"KL (-?\d+\.\d{3}) ± (\d+\.\d{3})  (\d+\.\d) s"
)


def check_short_run(script, folder, printed):
    """Check what a run of SHORT_RUN printed and wrote. Returns the saved file and events folder."""
    name = script.__name__
    header, *progress, ending = printed.splitlines()
    date = r"\d{4}-\d{2}-\d{2}-\d{6}-\d{6}"
    assert re.fullmatch(rf"{name}__1__{date}: [\d,]+ parameters on cpu", header), header

    rows = [re.fullmatch(PROGRESS, line).groups() for line in progress]
    episodes, scores, _, speeds, seconds_left = zip(*rows, strict=True)
    assert [int(x) for x in episodes] == list(range(64, 641, 64))  # every rollout: they are few
    assert all(0 <= float(score) <= 1 for score in scores)
    assert all(float(speed.replace(",", "")) > 10 for speed in speeds)
    assert seconds_left[-1] == "0"
    assert re.fullmatch(ENDING, ending), ending

    assert {path.name for path in folder.iterdir()} == {"runs", "model.pt"}
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved.keys() == {"args", "policy", "reference"}
    (events,) = (folder / "runs").iterdir()
    assert re.fullmatch(rf"{name}__1__{date}", events.name)
    check_hyperparameters(events, script.Args(), batch_size="64", seed="1", save_path="model.pt")
    return saved, events


def check_reference_is_frozen(monkeypatch, run):
    """During run(), the one deep copy of the policy keeps its weights to the bit."""
    copies = []
    deepcopy = copy.deepcopy

    def keep(model, *memo):
        made = deepcopy(model, *memo)
        if isinstance(model, torch.nn.Module) and not memo:  # with a memo it is a part of a copy
            copies.append((made, {k: v.clone() for k, v in made.state_dict().items()}))
        return made

    monkeypatch.setattr(copy, "deepcopy", keep)
    run()
    ((reference, before),) = copies
    after = reference.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
