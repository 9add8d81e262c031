"""What real use does to the scripts: consoles, disks, sweeps, users' rewards."""

import copy
import inspect
import io
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy
import programs
import pytest
import torch

import digits_sum20
import dpo
import gpt2_sentiment
import grpo
import ppo
import reinforce
import reward_model

SCRIPTS = [reinforce, ppo, grpo, dpo, reward_model]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
each_of_all_scripts = pytest.mark.parametrize(
    "script", [*SCRIPTS, digits_sum20, gpt2_sentiment], ids=lambda script: script.__name__
)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, *SCRIPTS)


def few(script, **flags):
    """Flags of a very short run."""
    values = {"tensorboard": False, "sft_steps": 2}
    if script is dpo:
        values |= {"num_pairs": 32, "epochs": 1}
    elif script is reward_model:
        values |= {"num_examples": 32, "epochs": 1}
    else:
        values |= {"total_episodes": 32, "batch_size": 32}
    return script.Args(**values | flags)


def refused(script, capsys, **flags):
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as stop:
        script.main(few(script, **flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def path_of(script):
    return programs.ROOT / f"{script.__name__}.py"


# ---------------------------------------------------------------------------- What a reward returns
def constant_reward(value, form):
    def reward(targets, responses):
        return form([value] * len(responses))

    return reward


FORMS = {
    "list": list,
    "ints": torch.tensor,
    "bools": lambda values: torch.tensor(values) > 0,
    "numpy": lambda values: numpy.array(values, dtype=numpy.float64),
    "bfloat16": lambda values: torch.tensor(values, dtype=torch.bfloat16),
    "tensors": lambda values: [torch.tensor(value) for value in values],
    "with a gradient": lambda values: torch.tensor(values).float().requires_grad_() * 1.0,
}


@each_script
@pytest.mark.parametrize("form", FORMS)
def test_rewards_of_any_numeric_form_become_float32(script, form, monkeypatch):
    monkeypatch.setattr(script, "reward", constant_reward(1, FORMS[form]))
    scores = script.get_scores(torch.zeros(3), torch.zeros(3, 3))
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0, 1.0, 1.0]
    assert not scores.requires_grad  # a reward model's: nothing is learned through the reward


@each_script
def test_a_run_takes_a_list_of_whole_numbers(script, monkeypatch):
    """A constant reward, too: nothing is divided by its deviation of 0."""
    monkeypatch.setattr(script, "reward", constant_reward(1, list))
    if script is reward_model:  # its correlation with a constant reward is 0
        assert script.main(few(script))["correlation"] == 0
    else:
        assert script.main(few(script))["success"] == 1


UNFIT = {
    "column": (lambda values: torch.ones(len(values), 1), "shape"),
    "one short": (lambda values: torch.ones(len(values) - 1), "shape"),
    "one for all": (lambda values: 1.0, "shape"),
    "words": (lambda values: ["good"] * len(values), "str"),
    "huge": (lambda values: [10**400] * len(values), "too large"),
    "nothing": (lambda values: None, "NoneType"),
    "infinite": (lambda values: [1.0] * (len(values) - 1) + [float("inf")], "inf"),
    "not a number": (lambda values: torch.full((len(values),), torch.nan), "nan"),
}


@each_script
@pytest.mark.parametrize("kind", UNFIT)
def test_rewards_that_do_not_fit_are_named(script, kind, monkeypatch, capsys):
    form, said = UNFIT[kind]
    monkeypatch.setattr(script, "reward", constant_reward(1, form))
    error = refused(script, capsys)
    assert "reward must return finite numbers of shape" in error and said in error


@each_script
def test_a_reward_may_change_what_it_gets(script, monkeypatch):
    def reward(_, responses):
        responses.fill_(3)
        return torch.ones(len(responses))

    monkeypatch.setattr(script, "reward", reward)
    responses = torch.zeros(2, 3, dtype=torch.long)
    script.get_scores(torch.zeros(2), responses)
    assert responses.max() == 0


@pytest.mark.parametrize("kind", ["column", "infinite"])
def test_process_rewards_that_do_not_fit_are_named(kind, monkeypatch, capsys):
    rewards = torch.full((32, 1), 1.0) if kind == "column" else torch.full((32, 3), torch.inf)
    monkeypatch.setattr(reinforce, "process_reward", lambda *_: rewards)
    error = refused(reinforce, capsys, reward="process")
    assert "process_reward" in error and "(32, 3)" in error


def test_process_rewards_of_any_numeric_form_are_taken(monkeypatch):
    learned = torch.ones(32, 3, requires_grad=True) * 1.0
    expected = None
    for rewards in [torch.ones(32, 3), [[1, 1, 1]] * 32, numpy.ones((32, 3)), learned]:
        monkeypatch.setattr(reinforce, "process_reward", lambda *_, rewards=rewards: rewards)
        flags = {"reward": "process", "baseline": "running-mean", "total_episodes": 64}
        result = reinforce.main(few(reinforce, **flags))
        expected = expected or result
        assert result == expected


def test_a_process_reward_may_change_what_it_gets(monkeypatch):
    def spoil(_, responses):
        responses.fill_(3)
        return torch.ones(32, 3)

    monkeypatch.setattr(reinforce, "process_reward", lambda *_: torch.ones(32, 3))
    expected = reinforce.main(few(reinforce, reward="process"))
    monkeypatch.setattr(reinforce, "process_reward", spoil)
    assert reinforce.main(few(reinforce, reward="process")) == expected


# ---------------------------------------------------------------------------- Another task
@each_script
def test_a_task_with_other_sums_is_split_in_the_same_way(script, monkeypatch):
    """In a copy the constants of the task may change."""
    for target, count in {14: 575, 20: 912, 22: 945}.items():
        monkeypatch.setattr(script, "TARGET", target)
        make_prompts = inspect.unwrap(script.make_prompts)  # all held-out prompts
        train, train_targets, test, test_targets = make_prompts("cpu")
        prompts = torch.cat([train, test])
        assert (len(train), len(prompts)) == (count * 4 // 5, count)
        assert len(prompts.unique(dim=0)) == count
        sums = prompts.sum(1) + torch.cat([train_targets, test_targets])
        assert (sums == target).all()


# ---------------------------------------------------------------------------- SFT
@each_script
def test_sft_takes_as_many_steps_as_the_flag_says(script, monkeypatch):
    taken = []
    monkeypatch.setattr(script, "sft", lambda *inputs: taken.append(inputs[-1]))
    for steps in (0, 1, 2):
        script.main(few(script, sft_steps=steps))
    assert taken == [1, 2]  # without SFT, a task of one's own needs no demonstrations


# ---------------------------------------------------------------------------- Files
@each_script
def test_a_run_that_writes_nothing_needs_no_writable_folder(script, monkeypatch):
    monkeypatch.setattr(script, "is_writable", lambda folder: False)
    script.check_args(few(script))
    with pytest.raises(SystemExit):
        script.check_args(few(script, tensorboard=True))


@each_script
def test_two_runs_of_the_same_second_share_no_events(script, monkeypatch, tmp_path):
    now = datetime(2026, 1, 2, 3, 4, 5)
    times = iter([now, now.replace(microsecond=1), now])
    monkeypatch.setattr(script, "datetime", SimpleNamespace(now=lambda: next(times)))
    for _ in range(2):
        script.main(few(script, tensorboard=True))
    folders = sorted((tmp_path / "runs").iterdir())
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]
    name = f"{script.__name__}__1__2026-01-02-030405"
    assert [folder.name for folder in folders] == [f"{name}-000000", f"{name}-000001"]
    with pytest.raises(FileExistsError):
        script.main(few(script, tensorboard=True))


@each_script
def test_paths_may_be_strings(script, tmp_path):
    flags = {"save_path": str(tmp_path / "saved.pt")}
    if script in (ppo, grpo):
        reward_model.main(few(reward_model, save_path=str(tmp_path / "rm.pt")))
        flags["reward_model"] = str(tmp_path / "rm.pt")
    if script in (dpo, reward_model):
        pair = '{"prompt": "123", "chosen": "95", "rejected": "94"}\n'
        (tmp_path / "pairs.jsonl").write_text(pair)
        flags["preferences"] = str(tmp_path / "pairs.jsonl")
        default = "num_pairs" if script is dpo else "num_examples"
        flags[default] = getattr(script.Args, default)
    script.main(few(script, **flags))
    assert torch.load(tmp_path / "saved.pt", weights_only=True)["args"]["seed"] == "1"


@each_script
def test_a_link_is_followed_and_stays(script, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "saved.pt").write_text("old")
    (tmp_path / "link.pt").symlink_to(tmp_path / "far" / "saved.pt")
    script.main(few(script, save_path=tmp_path / "link.pt"))
    assert (tmp_path / "link.pt").is_symlink()
    torch.load(tmp_path / "far" / "saved.pt", weights_only=True)
    assert os.listdir(tmp_path / "far") == ["saved.pt"]


@each_script
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "dangling link"])
def test_what_is_not_a_file_is_never_replaced(script, kind, tmp_path, capsys):
    path = tmp_path / "there"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    assert "--save-path" in refused(script, capsys, save_path=path)
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        (ppo, "reward_model"),
        (grpo, "reward_model"),
        (dpo, "preferences"),
        (reward_model, "preferences"),
        (reward_model, "policy"),
    ],
)
def test_an_input_is_never_overwritten(script, flag, tmp_path, capsys):
    (tmp_path / "input").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "input")
    for save_path in ["input", "./input", str(tmp_path / "input"), "link"]:
        error = refused(script, capsys, **{flag: Path("input"), "save_path": Path(save_path)})
        assert f"would overwrite --{flag.replace('_', '-')}" in error
    assert (tmp_path / "input").read_text() == "mine"


@each_script
def test_if_the_file_cannot_get_its_name_the_weights_stay(script, monkeypatch, tmp_path, capsys):
    save = torch.save

    def obstructed(contents, path):
        save(contents, path)
        Path("saved.pt").mkdir()

    monkeypatch.setattr(torch, "save", obstructed)
    with pytest.raises(OSError) as error:
        script.main(few(script, save_path=Path("saved.pt")))
    assert "held-out" in capsys.readouterr().out
    (part,) = tmp_path.glob("*.part")
    assert part.name == f"saved.pt.{os.getpid()}.part"  # no two runs write to one
    assert str(part) in str(error.value)
    torch.load(part, weights_only=True)


@each_script
@pytest.mark.parametrize("error", [OSError, RuntimeError])  # torch.save raises either
def test_a_full_disk_leaves_no_part(script, error, monkeypatch, tmp_path, capsys):
    def broken(contents, path):
        Path(path).write_text("half")
        raise error("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match=r"--save-path .*no space left"):
        script.main(few(script, save_path=Path("saved.pt")))
    assert "held-out" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@each_script
def test_a_name_that_is_too_long_ends_with_the_result_and_one_line(script, tmp_path, capsys):
    """The name of the part is longer than that of the file, which the flags' check lets pass."""
    with pytest.raises(OSError, match=f"too long.*{'x' * 250}"):
        script.main(few(script, save_path=Path("x" * 250)))
    assert "held-out" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@each_script
def test_a_folder_that_went_away_ends_with_the_result_and_one_line(script, monkeypatch, capsys):
    Path("new").mkdir()
    save = script.save

    def gone(*inputs):
        Path("new").rmdir()
        save(*inputs)

    monkeypatch.setattr(script, "save", gone)
    with pytest.raises(OSError, match=r"--save-path .*saved.pt cannot be written"):
        script.main(few(script, save_path=Path("new/saved.pt")))
    assert "held-out" in capsys.readouterr().out


def test_where_saving_fails_a_run_ends_with_the_result_and_one_line(monkeypatch, capsys):
    words = f"--sft-steps 2 --no-tensorboard --total-episodes 256 --save-path {'x' * 250}"
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop:
        programs.run_as_program(path_of(ppo), words, printed, monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "held-out" in printed.getvalue()
    assert error.startswith("error: ") and "too long" in error and error.count("\n") == 1


def test_a_copy_under_another_name_makes_files_that_the_others_read(tmp_path, monkeypatch):
    copy = tmp_path / "my_rm.py"
    shutil.copy(path_of(reward_model), copy)
    words = "--num-examples 32 --epochs 1 --sft-steps 2 --no-tensorboard --save-path rm.pt"
    programs.run_as_program(copy, words, sys.stdout, monkeypatch)
    ppo.main(few(ppo, reward_model=tmp_path / "rm.pt"))


# ---------------------------------------------------------------------------- Output
@each_of_all_scripts
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_is_printed_whatever_the_encoding(script, encoding, monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with pytest.raises(SystemExit) as stop:
        programs.run_as_program(path_of(script), "--help", printed, monkeypatch)
    assert stop.value.code == 0 and b"--seed" in printed.buffer.getvalue()
    assert b"?" in printed.buffer.getvalue()  # for the Greek letters


@each_of_all_scripts
def test_help_is_printed_in_a_notebook(script, monkeypatch):
    """There the standard output has no reconfigure."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop:
        programs.run_as_program(path_of(script), "--help", printed, monkeypatch)
    assert stop.value.code == 0 and "--seed" in printed.getvalue()


@pytest.mark.parametrize("script", [ppo, reward_model], ids=["ppo", "reward_model"])
def test_a_run_ends_well_where_the_output_is_ascii(script, monkeypatch, capsys):
    words = "--sft-steps 2 --no-tensorboard --save-path saved.pt"
    if script is ppo:
        words += " --total-episodes 256"
    else:
        words += " --num-examples 32 --epochs 1 --ensemble-size 1"
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    programs.run_as_program(path_of(script), words, printed, monkeypatch)
    assert b"held-out" in printed.buffer.getvalue() and capsys.readouterr().err == ""
    assert Path("saved.pt").exists()


def test_all_scripts_of_the_toy_start_main_alike():
    endings = [inspect.getsource(script).partition("if __name__")[2] for script in SCRIPTS]
    assert len(endings[0]) > 100 and set(endings) == {endings[0]}


@pytest.fixture(scope="module", autouse=True)
def with_a_closed_pipe(tmp_path_factory):
    """Commands whose output nobody reads; they run in the background."""
    folder = tmp_path_factory.mktemp("pipe")
    reader, writer = os.pipe()
    os.close(reader)
    tiny = programs.ROOT / "tests" / "data" / "gpt2-tiny"
    flags = {
        ppo: ["--sft-steps", "2"],
        digits_sum20: ["--epochs", "200", "--method", "rl"],
        gpt2_sentiment: ["--model", tiny, "--response-length", "5"],
    }
    started = {}
    for script, words in flags.items():
        words = [path_of(script), "--no-tensorboard", *words]
        started[script] = programs.begin(folder, *words, stdout=writer)
    os.close(writer)
    yield started
    for process in started.values():
        programs.end(process)


@pytest.mark.parametrize(
    "script", [ppo, digits_sum20, gpt2_sentiment], ids=lambda script: script.__name__
)
def test_a_closed_pipe_ends_a_run_in_one_line(script, with_a_closed_pipe):
    process = with_a_closed_pipe[script]
    _, error = process.communicate()
    assert process.returncode == 2 and error == "error: [Errno 32] Broken pipe\n"


def test_a_full_disk_under_the_curves_is_one_line(monkeypatch):
    class Writer(programs.NoWriter):
        def __init__(self, folder):
            raise OSError(28, "No space left on device", folder)

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
    with pytest.raises(SystemExit) as stop:
        programs.run_as_program(path_of(ppo), "--sft-steps 0", sys.stdout, monkeypatch)
    assert stop.value.code == 2


def test_curves_are_on_disk_while_the_run_goes_on(monkeypatch):
    """So a run that is killed loses nothing but what follows its last logged step."""
    flushed = []

    class Writer(programs.NoWriter):
        def __init__(self, folder):
            pass

        def flush(self):
            flushed.append(True)

    for script in SCRIPTS:
        monkeypatch.setattr(script, "SummaryWriter", Writer)
        flushed.clear()
        script.main(few(script, tensorboard=True))
        assert flushed


def test_a_closed_keyboard_ends_the_questions(monkeypatch, capsys):
    words = "--annotate 3 --preferences mine.jsonl --sft-steps 2"
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        programs.run_as_program(path_of(reward_model), words, sys.stdout, monkeypatch)
    assert capsys.readouterr().err == ""
    assert Path("mine.jsonl").read_text() == ""


def test_without_a_keyboard_nothing_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    flags = {"num_examples": reward_model.Args.num_examples, "epochs": reward_model.Args.epochs}
    error = refused(reward_model, capsys, annotate=3, preferences=Path("mine.jsonl"), **flags)
    assert "standard input" in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [ppo, grpo], ids=["ppo", "grpo"])
def test_a_missing_reward_model_is_said_to_be_missing(script, capsys):
    error = refused(script, capsys, reward_model=Path("nowhere.pt"))
    assert "--reward-model nowhere.pt: missing" in error


def test_a_missing_policy_is_said_to_be_missing(capsys):
    error = refused(reward_model, capsys, policy=Path("nowhere.pt"), sft_steps=100)
    assert "--policy nowhere.pt: missing" in error


def ask(answers, policy):
    """Let a person with these answers (bytes) judge two pairs of the policy's responses."""
    prompts = reward_model.make_prompts("cpu")[0]
    stdin = io.TextIOWrapper(io.BytesIO(answers), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        reward_model.annotate(policy, prompts, "mine.jsonl", 2)
    return Path("mine.jsonl").read_text().count("\n")


def test_an_answer_that_cannot_be_read_ends_the_questions():
    torch.manual_seed(1)
    assert ask(b"a\n\xff\na\n", reward_model.GPT()) <= 1


def test_a_policy_without_two_responses_ends_the_questions(monkeypatch, capsys):
    def generate(_, prompts, temperature):
        return torch.zeros(len(prompts), 3, dtype=torch.long)

    monkeypatch.setattr(reward_model, "generate", generate)
    with pytest.raises(SystemExit) as stop:
        ask(b"a\n", None)
    assert stop.value.code == 2 and "--annotate" in capsys.readouterr().err


def test_questions_refuse_a_file_in_another_encoding(tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    error = refused(
        reward_model,
        capsys,
        annotate=3,
        preferences=Path("mine.jsonl"),
        num_examples=reward_model.Args.num_examples,
        epochs=reward_model.Args.epochs,
    )
    assert "--preferences mine.jsonl" in error


# ---------------------------------------------------------------------------- What main() passes on
@each_script
def test_sft_is_on_training_prompts_only(script, monkeypatch):
    calls = programs.record(monkeypatch, script, "make_demonstrations")["make_demonstrations"]
    script.main(few(script))
    prompts, targets, _, _ = script.make_prompts("cpu")
    (call,) = calls
    assert torch.equal(call["prompts"], prompts)
    assert torch.equal(call["targets"], targets)


@pytest.mark.parametrize("script", SCRIPTS[:4], ids=lambda script: script.__name__)
def test_the_saved_weights_are_those_that_were_evaluated(script, monkeypatch):
    def weights(policy, reference, *_):
        return [copy.deepcopy(policy.state_dict()), copy.deepcopy(reference.state_dict())]

    calls = programs.spy(monkeypatch, script, "evaluate", before=weights)
    script.main(few(script, save_path=Path("saved.pt")))
    saved = torch.load("saved.pt", weights_only=True)
    policy, reference = calls[-1][2]
    for name in policy:
        assert torch.equal(saved["policy"][name], policy[name])
        assert torch.equal(saved["reference"][name], reference[name])
        assert torch.equal(saved["reference"][name], calls[0][2][0][name])
    assert not torch.equal(saved["policy"]["head.weight"], saved["reference"]["head.weight"])


@each_script
def test_adam_has_betas_of_0_9_and_0_99(script, monkeypatch):
    made = programs.spy(monkeypatch, torch.optim.AdamW, "step", before=lambda self: self.defaults)
    script.main(few(script, sft_steps=0))
    assert {settings["betas"] for _, _, settings in made} == {(0.9, 0.99)}
