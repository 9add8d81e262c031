"""ppo.py as a program: it learns, repeats itself, refuses what cannot work, leaves no debris."""

import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    yield from programs.start(f"ppo.py {programs.SHORT_RUN}", tmp_path_factory.mktemp("program"))


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, ppo)


def run(**flags):
    """Train for two rollouts of 64 unless told otherwise; the result without the time taken."""
    defaults = {"batch_size": 64, "total_episodes": 128, "sft_steps": 20, "tensorboard": False}
    result = ppo.main(ppo.Args(**(defaults | flags)))
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.fixture(scope="module")
def default_result(tmp_path_factory):
    """Computed once: what run() returns with no flags."""
    with pytest.MonkeyPatch.context() as patch:
        programs.shorten_runs(patch, tmp_path_factory.mktemp("default"), ppo)
        return run()


def test_success_rises_from_the_warm_start():
    result = ppo.main(ppo.Args(total_episodes=7_680, tensorboard=False))
    assert 0.4 < result["success_before"] < 0.8
    assert result["success"] > result["success_before"] + 0.1
    assert 0.2 < result["optimality"] <= 1
    assert result["objective"] == pytest.approx(result["score"] - 0.05 * result["kl"])


def test_same_seed_same_result_other_seed_another(default_result):
    assert run() == default_result
    assert run(seed=2) != default_result


CHOICES = [
    {"reward": "sharp"},
    {"reward": "distance"},
    {"reward": "process"},
    {"missing_eos_penalty": 1.0, "sft_steps": 0},
    {"update_epochs": 1},
    {"num_minibatches": 1},
    {"gamma": 0.9},
    {"gae_lambda": 0.5},
    {"clip_coef": 0.01},
    {"dual_clip": 1.0001, "clip_coef": 10.0, "update_epochs": 10},
    {"normalize_advantages": True},
    {"advantage_clip": 0.1},
    {"whiten_rewards": True},
    {"target_kl": 1e-6},
    {"ent_coef": 0.1},
    {"vf_coef": 1.0},
    {"separate_critic": True},
    {"kl_in": "loss", "kl_estimator": "k2"},
    {"kl_in": "loss", "kl_estimator": "k3"},
    {"kl_target": 0.1, "kl_horizon": 100, "total_episodes": 256},
    {"kl_coef": 1.0},
    {"temperature": 0.5},
    {"max_grad_norm": 0.001},
    {"learning_rate": 1e-4},
]


@pytest.mark.parametrize("flags", CHOICES, ids=lambda f: " ".join(map(str, f)))
def test_every_flag_changes_the_outcome(flags, default_result):
    twin = {k: v for k, v in flags.items() if k in ("sft_steps", "total_episodes", "update_epochs")}
    if set(flags) - set(twin):  # compare with a run that differs in the flag under test alone
        rest = {"clip_coef": 10.0} if "dual_clip" in flags else {}
        base = run(**twin, **rest) if twin or rest else default_result
    else:
        base = default_result
    result = run(**flags)
    assert all(torch.isfinite(torch.tensor(value)) for value in result.values())
    assert result["entropy"] != base["entropy"]


def test_estimators_in_the_loss_differ():
    k2, k3 = (run(kl_in="loss", kl_estimator=kind) for kind in ("k2", "k3"))
    assert k2["entropy"] != k3["entropy"]


BAD = {
    "batch_size": [0, -1, 1000],
    "total_episodes": [0, 10],
    "num_minibatches": [0, 7],
    "update_epochs": [0],
    "learning_rate": [0.0, -1.0, float("nan"), float("inf")],
    "max_grad_norm": [0.0],
    "temperature": [0.0],
    "kl_coef": [-1.0, float("nan")],
    "seed": [-1, 2**63],
    "sft_steps": [-1],
    "gamma": [2.0, -0.1],
    "gae_lambda": [1.5],
    "clip_coef": [0.0],
    "dual_clip": [1.0],
    "advantage_clip": [0.0],
    "target_kl": [0.0],
    "vf_coef": [-0.1],
    "ent_coef": [-0.1],
    "missing_eos_penalty": [-1.0],
    "kl_target": [0.0],
    "kl_horizon": [0],
    "kl_estimator": ["k2", "k3"],
    "device": ["cuda"],
}


@pytest.mark.parametrize("flag,value", [(f, v) for f, values in BAD.items() for v in values])
def test_bad_values_end_with_one_line_and_nothing_written(flag, value, capsys, tmp_path):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a cuda device")
    with pytest.raises(SystemExit) as stop:
        run(**({"tensorboard": True} | {flag: value}))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    named = {"batch_size": "total-episodes"}.get(flag) if value == 1000 else flag
    assert error.count("\n") == 1 and f"--{named.replace('_', '-')}" in error
    assert list(tmp_path.iterdir()) == []


def test_values_at_the_border_are_taken():
    ppo.check_args(ppo.Args(seed=0, kl_coef=0.0, gamma=0.0, gae_lambda=0.0, vf_coef=0.0))
    ppo.check_args(ppo.Args(seed=2**63 - 1, gamma=1.0, gae_lambda=1.0, num_minibatches=256))
    ppo.check_args(ppo.Args(total_episodes=256, update_epochs=1, num_minibatches=1, sft_steps=0))


@pytest.mark.parametrize(
    "flags,named",
    [
        ({"kl_in": "loss"}, "--kl-estimator k1"),
        ({"kl_target": 0.1, "kl_coef": 0.0}, "--kl-target 0.1"),
    ],
)
def test_values_that_do_not_go_together(flags, named, capsys):
    with pytest.raises(SystemExit) as stop:
        run(**flags)
    assert stop.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--reward", "fun"], ["--seed", "x"], ["--lambda", "1"]])
def test_bad_words_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(ppo.Args, args=words)
    assert stop.value.code == 2


def test_program_in_a_shell(program):
    """The real command: header, progress, verdict; events and a saved model that loads safely."""
    saved, folder = programs.check_short_run(ppo, *program())
    ppo.GPT().load_state_dict(saved["policy"])
    assert saved["args"]["batch_size"] == "64"

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    charts = "score score_std kl kl_coef response_length eos_rate learning_rate episodes_per_second"
    losses = (
        "policy_loss value_loss entropy approx_kl clipfrac explained_variance grad_norm ratio_first"
    )
    evals = "success kl objective optimality"
    wanted = {f"charts/{t}" for t in charts.split()} | {f"losses/{t}" for t in losses.split()}
    wanted |= {f"eval/{t}" for t in evals.split()}
    tags = events.Tags()
    assert wanted <= set(tags["scalars"]) and tags["images"] == ["policy"]
    for event in events.Scalars("losses/ratio_first"):
        assert abs(event.value - 1) < 1e-6  # before the first step the policy is the old one
    assert all(len(events.Scalars(f"eval/{t}")) == 2 for t in evals.split())


def test_policy_starts_at_the_reference_at_any_temperature(tmp_path):
    run(temperature=0.5, tensorboard=True, sft_steps=50)
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    events.Reload()
    first, second = (point.value for point in events.Scalars("charts/kl"))
    assert abs(first) < 1e-6 < abs(second)
    assert abs(events.Scalars("losses/ratio_first")[0].value - 1) < 1e-6


def test_bad_value_in_a_shell(tmp_path):
    command = [sys.executable, str(ROOT / "ppo.py"), "--num-minibatches", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_pictures_show_the_policy_before_and_after(monkeypatch):
    programs.check_policy_images(monkeypatch, ppo, lambda: run(tensorboard=True))


def test_reference_is_frozen_and_nothing_is_left_behind(monkeypatch, tmp_path):
    programs.check_reference_is_frozen(monkeypatch, run)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_explode_stop_the_run(monkeypatch, capsys):
    monkeypatch.setattr(ppo, "reward", lambda p, r, kind="exact": torch.full((len(p),), torch.inf))
    with pytest.raises(SystemExit) as stop:
        run()
    assert "rollout 1" in str(stop.value.code) and "--learning-rate" in str(stop.value.code)


def test_early_stop_ends_the_updates(monkeypatch):
    steps = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: steps.append(1) or clip(*a))
    run(update_epochs=4, num_minibatches=4)
    assert len(steps) == 2 * 16
    steps.clear()
    run(update_epochs=4, num_minibatches=4, target_kl=1e-9)
    assert len(steps) == 2  # the first step moves the policy, the second is not taken


def test_the_kl_is_charged_once(monkeypatch):
    calls = programs.spy(monkeypatch, ppo, "token_rewards")
    run()
    assert {arguments[3] for arguments, *_ in calls} == {0.05}
    calls.clear()
    light, heavy = (run(kl_in="loss", kl_estimator="k2", kl_coef=beta) for beta in (0.01, 5.0))
    assert {arguments[3] for arguments, *_ in calls} == {0.0}
    assert heavy["kl"] < light["kl"]


def test_an_entropy_bonus_raises_the_entropy(default_result):
    assert run(ent_coef=5.0)["entropy"] > default_result["entropy"] + 0.01


def test_only_responses_without_eos_pay_the_penalty(monkeypatch):
    sampled = programs.spy_on_samples(monkeypatch, ppo)
    rewarded = programs.spy(monkeypatch, ppo, "compute_gae")
    run(missing_eos_penalty=7.0, sft_steps=0, kl_coef=0.0)
    for (_, responses, _), ((rewards, *_), *_) in zip(sampled, rewarded, strict=True):
        cut_off = (responses != ppo.EOS).all(1)
        assert 0 < cut_off.sum() < len(cut_off)
        assert (rewards[cut_off] == torch.tensor([0, 0, -7])).all()
        assert (rewards[~cut_off] >= 0).all()


@pytest.mark.parametrize("separate", [False, True])
def test_the_critic_starts_without_an_opinion(monkeypatch, separate):
    calls = programs.spy(monkeypatch, ppo, "compute_gae")
    run(separate_critic=separate, total_episodes=64)
    (_, values, *_), *_ = calls[0]
    assert values.unique().numel() == 1  # its bias


@pytest.mark.parametrize("separate", [False, True])
def test_values_are_of_their_own_rows_and_train_what_they_are_read_from(monkeypatch, separate):
    sampled, function, reached = programs.spy_on_samples(monkeypatch, ppo), ppo.value_loss, []

    def value_loss(values, old_values, returns, mask, clip_coef):
        torch.testing.assert_close(values, old_values)  # no step has been taken since the rollout
        loss = function(values, old_values, returns, mask, clip_coef)
        (policy, *_), *_ = sampled[0]
        of = policy.blocks[0].qkv.weight
        (gradient,) = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
        reached.append(values.std() > 0 and gradient is not None and bool((gradient != 0).any()))
        return loss

    monkeypatch.setattr(ppo, "value_loss", value_loss)
    run(separate_critic=separate, num_minibatches=1, update_epochs=1)
    assert reached == [False, not separate]  # at first the critic has no opinion


def test_the_score_of_a_response_is_the_sum_of_its_rewards(monkeypatch, tmp_path):
    calls = programs.spy(monkeypatch, ppo, "process_reward")
    run(reward="process", tensorboard=True, total_episodes=64)
    (_, paid, _), *_ = [call for call in calls if len(call[1]) == 64]
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    events.Reload()
    assert events.Scalars("charts/score")[0].value == pytest.approx(paid.sum(1).mean().item())


def test_returns_are_those_before_whitening(monkeypatch):
    names = "compute_gae", "value_loss", "policy_loss"
    made, used, weighed = (programs.spy(monkeypatch, ppo, name) for name in names)
    run(normalize_advantages=True, num_minibatches=1, update_epochs=1)
    for (_, (advantages, returns), _), (arguments, *_), (other, *_) in zip(
        made, used, weighed, strict=True
    ):
        assert torch.equal(arguments[2].sort(0).values, returns.sort(0).values)
        assert abs(other[2][other[3]].mean()) < 1e-6 and advantages.abs().sum() > 0


def test_training_prompts_are_what_is_trained_on(monkeypatch):
    train, _ = ppo.make_prompts()
    calls = programs.spy_on_samples(monkeypatch, ppo)
    run(batch_size=512, total_episodes=1024)
    known = {tuple(prompt) for prompt in train.tolist()}
    assert {tuple(prompt) for (_, prompts, _), *_ in calls for prompt in prompts.tolist()} <= known


def test_the_learning_rate_rises_then_falls(tmp_path):
    run(tensorboard=True, batch_size=16, total_episodes=640, num_minibatches=1, update_epochs=1)
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    events.Reload()
    points = events.Scalars("charts/learning_rate")
    rates = [point.value / ppo.Args.learning_rate for point in points]
    assert rates[0] == pytest.approx(5 / 40) and rates[-1] == pytest.approx(0.5 / 40)
    assert max(rates) == rates[4] == pytest.approx(35.5 / 40)
    assert rates[:5] == sorted(rates[:5]) and rates[4:] == sorted(rates[4:], reverse=True)
