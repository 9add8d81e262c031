"""What the scripts log and print, computed again from the responses and from the updates."""

import copy
import math
import re
import statistics

import oracle
import programs
import pytest
import torch

import dpo
import grpo
import ppo
import reinforce

EOS = 10
ONLINE = [ppo, grpo, reinforce]
SHORT = {"batch_size": 64, "total_episodes": 192, "sft_steps": 20, "temperature": 0.8}
SHORT |= {"kl_coef": 0.3, "learning_rate": 0.01}
DPO_SHORT = {"sft_steps": 20, "num_pairs": 96, "epochs": 2, "minibatch_size": 16}
online_scripts = pytest.mark.parametrize("script", ONLINE, ids=lambda script: script.__name__)
all_scripts = pytest.mark.parametrize("script", [*ONLINE, dpo], ids=lambda script: script.__name__)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, *ONLINE, dpo)


def one_update(script):
    """Flags with which a script takes one gradient step per rollout."""
    if script is reinforce:
        return {}
    return {"update_epochs": 1, "num_minibatches": 1}


def train(script, **flags):
    """Train for three rollouts of 64 (dpo.py: on 96 pairs), unless the flags say otherwise."""
    short = DPO_SHORT if script is dpo else SHORT
    return script.main(script.Args(**(short | flags)))


def copy_policy(policy, prompts, temperature):
    return copy.deepcopy(policy)


def token_logprobs(policy, prompts, responses):
    """Log-probabilities (B, 3, 11) before each response token, float64."""
    states = policy.double()(torch.cat([prompts, responses], 1))[:, 2:5]
    return (policy.head(states) / SHORT["temperature"]).log_softmax(2)


def end_early(monkeypatch, script):
    """Raise the logit of EOS after SFT, so that responses differ in length."""
    sft = script.sft

    def biased(policy, prompts, responses, steps):
        sft(policy, prompts, responses, steps)
        with torch.no_grad():
            policy.head.bias[EOS] += 3

    monkeypatch.setattr(script, "sft", biased)


@torch.no_grad()
@online_scripts
def test_charts_are_means_over_the_responses(script, monkeypatch):
    end_early(monkeypatch, script)
    rollouts = programs.spy_on_rollouts(monkeypatch, script, copy_policy)
    curves = programs.record_curves(monkeypatch, script)
    with torch.enable_grad():
        train(script, **one_update(script))
    assert len(rollouts) == 3
    reference = copy.deepcopy(rollouts[0][2])
    for i, ((_, prompts, _), responses, policy) in enumerate(rollouts):
        new = token_logprobs(policy, prompts, responses)
        ref = token_logprobs(reference, prompts, responses)
        scores = []
        lengths = []
        kl = 0.0
        entropy = 0.0
        for row, (prompt, response) in enumerate(
            zip(prompts.tolist(), responses.tolist(), strict=True)
        ):
            n = min([*response, EOS].index(EOS) + 1, 3)
            scores.append(oracle.score(prompt, tuple(response[:n])))
            lengths.append(n)
            for t in range(n):
                kl += (new[row, t] - ref[row, t])[response[t]].item()
                entropy -= (new[row, t].exp() * new[row, t]).sum().item()
        expected = {
            "charts/score": statistics.mean(scores),
            "charts/true_score": statistics.mean(scores),
            "charts/kl": kl / 64,
            "charts/response_length": statistics.mean(lengths),
            "losses/entropy": entropy / 64,
        }
        for tag, value in expected.items():
            step, logged = curves[tag][i]
            assert step == 64 * (i + 1)
            assert logged == pytest.approx(value, abs=1e-4), tag
    assert len(set(programs.values(curves["charts/response_length"]))) > 1
    assert len(set(programs.values(curves["charts/score"]))) > 1
    assert abs(curves["charts/kl"][2][1]) > 0.01


LOSSES = {ppo: ("policy_loss", "value_loss"), grpo: ("grpo_loss", None)}


@pytest.mark.parametrize("script", LOSSES, ids=lambda script: script.__name__)
def test_losses_are_means_over_the_updates_of_a_rollout(script, monkeypatch):
    name, other_name = LOSSES[script]
    policy = programs.spy(monkeypatch, script, name)
    norms = programs.spy(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    curves = programs.record_curves(monkeypatch, script)
    if other_name is not None:
        other = programs.spy(monkeypatch, script, other_name)
    train(script, update_epochs=3, num_minibatches=2)
    assert len(policy) == len(norms) == 18
    for i in range(3):
        steps = slice(6 * i, 6 * i + 6)
        updates = [result for _, result, _ in policy[steps]]
        expected = {
            "policy_loss": sum(loss.item() for loss, _ in updates) / 6,
            "grad_norm": sum(norm.item() for _, norm, _ in norms[steps]) / 6,
        }
        for metric in ("approx_kl", "clipfrac", "ratio"):
            expected[metric] = sum(metrics[metric].item() for _, metrics in updates) / 6
        if other_name is not None:
            expected[other_name] = sum(loss.item() for _, loss, _ in other[steps]) / 6
        expected["ratio_first"] = updates[0][1]["ratio"].item()
        for metric, value in expected.items():
            step, logged = curves[f"losses/{metric}"][i]
            assert step == 64 * (i + 1)
            assert logged == pytest.approx(value, abs=1e-6), metric


def test_the_first_ratio_of_a_rollout_is_one(monkeypatch):
    """Not 1: rows, positions or the temperature of old and new log-probabilities differ."""
    for script in LOSSES:
        curves = programs.record_curves(monkeypatch, script)
        train(script, **one_update(script))
        for value in programs.values(curves["losses/ratio"]):
            assert value == pytest.approx(1, abs=1e-5)


def test_kl_loss_is_the_mean_over_the_updates(monkeypatch):
    """losses/kl_loss of grpo.py, from what kl_penalty() gave, with its loss_weights."""
    penalties = programs.spy(monkeypatch, grpo, "kl_penalty")
    policy = programs.record(monkeypatch, grpo, "grpo_loss")
    curves = programs.record_curves(monkeypatch, grpo)
    train(grpo, update_epochs=2, num_minibatches=2)
    assert len(penalties) == 12
    for i in range(3):
        expected = []
        for step in range(4 * i, 4 * i + 4):
            call = policy["grpo_loss"][step]
            penalty = torch.where(call["mask"], penalties[step][1].detach(), 0.0).sum(1)
            expected.append((penalty * call["loss_weights"]).mean().item())
        logged = curves["losses/kl_loss"][i][1]
        assert logged == pytest.approx(statistics.mean(expected), abs=1e-6)


def explained_variance(returns, guesses, mask):
    """1 less the variance of the error over that of the returns, on real tokens."""
    errors = (returns - guesses)[mask].tolist()
    return 1 - statistics.variance(errors) / statistics.variance(returns[mask].tolist())


def test_explained_variance_of_the_critic(monkeypatch):
    made = programs.spy(monkeypatch, ppo, "compute_gae")
    curves = programs.record_curves(monkeypatch, ppo)
    train(ppo, learning_rate=0.003)
    assert len(made) == 3
    for i, ((_, values, mask, *_), (_, returns), _) in enumerate(made):
        expected = explained_variance(returns, values, mask)
        assert curves["losses/explained_variance"][i][1] == pytest.approx(expected, abs=1e-4)


def test_explained_variance_of_the_baseline(monkeypatch):
    made = programs.spy(monkeypatch, reinforce, "returns_to_go")
    curves = programs.record_curves(monkeypatch, reinforce)
    train(reinforce, baseline="leave-one-out", group_size=4)
    assert len(made) == 3
    for i, ((_, mask, _), returns, _) in enumerate(made):
        first = returns[:, 0].tolist()
        others = [oracle.mean_without(first, 4, row) for row in range(64)]
        expected = explained_variance(returns, torch.tensor(others)[:, None], mask)
        assert curves["losses/explained_variance"][i][1] == pytest.approx(expected, abs=1e-4)


@online_scripts
def test_progress_lines_and_the_last_line(script, monkeypatch, capsys):
    """45 rollouts of 8, by a clock that goes on by a second each time it is read."""
    programs.tick(monkeypatch, script)
    curves = programs.record_curves(monkeypatch, script)
    result = train(script, batch_size=8, total_episodes=363, **one_update(script))
    header, *lines, ending = capsys.readouterr().out.splitlines()
    assert header.startswith(f"{script.__name__}__1__")
    scores = programs.values(curves["charts/score"])
    kls = programs.values(curves["charts/kl"])
    assert programs.values(curves["charts/episodes_per_second"]) == [8.0] * 45
    rollouts = range(2, 45, 2)
    assert len(lines) == len(rollouts)
    for rollout, line in zip(rollouts, lines, strict=True):
        episodes, score, kl, speed, left = re.fullmatch(programs.PROGRESS, line).groups()
        assert int(episodes) == 8 * rollout
        # The mean of the scores since the line before, and the KL of this rollout.
        assert float(score) == pytest.approx(sum(scores[rollout - 2 : rollout]) / 2, abs=6e-4)
        assert float(kl) == pytest.approx(kls[rollout - 1], abs=6e-4)
        assert speed == "8.0"
        assert left == str(45 - rollout)
    numbers = re.fullmatch(programs.ENDING, ending).groups()
    names = ["success_before", "success", "success_error", "kl", "kl_error"]
    for number, name in zip(numbers, names, strict=False):
        assert float(number) == pytest.approx(result[name], abs=6e-4), name
    assert numbers[-1] == "47.0"


def test_progress_of_dpo(monkeypatch, capsys):
    """Pairs seen, means since the line before, and the speed by a clock that ticks when read."""
    programs.tick(monkeypatch, dpo)
    curves = programs.record_curves(monkeypatch, dpo)
    losses = programs.spy(monkeypatch, dpo, "dpo_loss")
    train(dpo, num_pairs=400, rounds=2, minibatch_size=16, epochs=4)
    _, *lines, ending = capsys.readouterr().out.splitlines()
    assert re.fullmatch(programs.ENDING, ending), ending
    form = r"pair +(\d+)  loss (\d+\.\d{3})  accuracy ([01]\.\d{3})  margin (-?\d+\.\d{3})  "
    form += r"([\d,.]+) pairs/s  (\d+) s left"
    assert 10 < len(lines) < 45
    seen = 0
    start = 0
    ends = {}  # the number of gradient steps, by the number of pairs they have read
    for step, ((logratios, *_), _, _) in enumerate(losses, start=1):
        seen += len(logratios)
        ends[seen] = step
    tags = ["losses/loss", "rewards/accuracies", "rewards/margins"]
    for i, line in enumerate(lines):
        pairs, *shown, speed, left = re.fullmatch(form, line).groups()
        pairs = int(pairs)
        metrics = [result[1] for _, result, _ in losses[start : ends[pairs]]]
        start = ends[pairs]
        for tag, text in zip(tags, shown, strict=True):
            mean = statistics.mean(step[tag].item() for step in metrics)
            assert curves[tag][i] == (pairs, pytest.approx(mean, abs=1e-6))
            assert float(text) == pytest.approx(mean, abs=6e-4)
        assert curves["charts/pairs_per_second"][i] == (pairs, pytest.approx(pairs / (i + 1)))
        assert float(speed.replace(",", "")) == pytest.approx(pairs / (i + 1), abs=0.06)
    assert pairs == seen
    assert left == "0"


@all_scripts
def test_evaluations_before_and_after_are_logged(script, monkeypatch):
    curves = programs.record_curves(monkeypatch, script)
    made = programs.spy(monkeypatch, script, "evaluate")
    result = train(script)
    (_, before, _), (_, after, _) = made
    assert result == {"success_before": before["success"], **after}
    last = max(step for curve in curves.values() for step, _ in curve)
    assert last > 1
    assert set(before) == {"success", "success_error", "kl", "kl_error"}
    for name in before:
        expected = [(0, pytest.approx(before[name])), (last, pytest.approx(after[name]))]
        assert curves[f"eval/{name}"] == expected
    assert curves["eval/kl"][0][1] == 0 < curves["eval/kl"][1][1]


@all_scripts
def test_every_curve_is_finite_and_in_a_known_group(script, monkeypatch):
    curves = programs.record_curves(monkeypatch, script)
    train(script)
    groups = {"charts", "losses", "eval"}
    if script is dpo:
        groups |= {"rewards", "logps"}
    assert {tag.split("/")[0] for tag in curves} == groups
    for tag, curve in curves.items():
        assert all(math.isfinite(value) for _, value in curve), tag
        steps = [step for step, _ in curve]
        assert steps == sorted(set(steps)), tag


@online_scripts
def test_prompts_are_drawn_from_all_training_prompts(script, monkeypatch):
    """Each is as likely as another, and a group has one prompt."""
    rollouts = programs.spy_on_rollouts(monkeypatch, script)
    group_size = 1 if script is ppo else 2
    group = {} if script is ppo else {"group_size": 2}
    size = 512 * group_size
    train(script, batch_size=size, total_episodes=6 * size, **group, **one_update(script))
    prompts = torch.cat([prompts for (_, prompts, _), _, _ in rollouts])
    groups = prompts.view(-1, group_size, 3)
    assert (groups == groups[:, :1]).all()
    drawn = [tuple(prompt) for prompt in groups[:, 0].tolist()]
    known = {tuple(prompt) for prompt in script.make_prompts("cpu")[0].tolist()}
    assert len(drawn) == 6 * 512
    assert set(drawn) <= known
    assert len(set(drawn)) > 690  # of 729; a prompt is left out with probability exp(-4.2)
    assert max(drawn.count(prompt) for prompt in known) < 18  # 4.2 on average
    assert drawn[:512] != drawn[512:1024]
