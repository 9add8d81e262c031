"""What ppo.py, grpo.py and reinforce.py log and say, counted again from responses and updates."""

import copy
import statistics

import oracle
import programs
import pytest
import torch

import dpo
import grpo
import ppo
import reinforce

EOS, KL_COEF = 10, 0.3
SHORT = {"batch_size": 64, "total_episodes": 192, "sft_steps": 20, "tensorboard": False}
SHORT |= {"temperature": 0.8, "reward": "sharp", "kl_coef": KL_COEF, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, ppo, grpo, reinforce, dpo)


def curves(monkeypatch, script, **flags):
    """Train, unless told otherwise for three rollouts of 64: each curve, a value a rollout."""
    calls, logged = programs.record(monkeypatch, script, "write"), {}
    script.main(script.Args(**(SHORT | flags)))
    for call in calls["write"]:
        for name, value in call["metrics"].items():
            logged.setdefault(f"{call['group']}/{name}", []).append(torch.as_tensor(value).item())
    steps = [call["step"] for call in calls["write"] if call["group"] == "charts"]
    size = (SHORT | flags)["batch_size"]
    assert steps == [size * (i + 1) for i in range(len(steps))]
    return logged


def token_logprobs(policy, prompts, responses):
    """Log-probabilities (B, 3, 11) before each token of a response, float64, from all positions."""
    states = policy.double()(torch.cat([prompts, responses[:, :-1]], 1))[:, 2:]
    return (policy.head(states) / SHORT["temperature"]).log_softmax(2)


@pytest.mark.parametrize("script", [ppo, grpo, reinforce], ids=lambda script: script.__name__)
def test_charts_are_means_over_the_responses(script, monkeypatch):
    rollouts = programs.spy_on_samples(monkeypatch, script, lambda *args: copy.deepcopy(args))
    once = {} if script is reinforce else {"update_epochs": 1, "num_minibatches": 1}
    logged = curves(monkeypatch, script, **once)
    assert len(rollouts) == 3
    reference = copy.deepcopy(rollouts[0][2][0])
    for i, (_, responses, (policy, prompts, _)) in enumerate(rollouts):
        rows = responses.tolist()
        lengths = [min([*y, EOS].index(EOS) + 1, 3) for y in rows]
        pairs = zip(prompts.tolist(), rows, lengths, strict=True)
        scores = [oracle.score(x, tuple(y[:n]), "sharp") for x, y, n in pairs]
        with torch.no_grad():
            new, ref = (token_logprobs(p, prompts, responses) for p in (policy, reference))
        gaps = (new - ref).gather(2, responses[:, :, None]).squeeze(2).tolist()
        each = -(new.exp() * new).sum(2)
        expected = {
            "charts/score": statistics.mean(scores),
            "charts/score_std": statistics.stdev(scores),
            "charts/kl": sum(sum(row[:n]) for row, n in zip(gaps, lengths, strict=True)) / 64,
            "charts/kl_coef": KL_COEF,
            "charts/response_length": sum(lengths) / 64,
            "charts/eos_rate": sum(EOS in y for y in rows) / 64,
            "losses/entropy": sum(row[:n].sum() for row, n in zip(each, lengths, strict=True)) / 64,
        }
        for name, value in expected.items():
            assert logged[name][i] == pytest.approx(float(value), abs=1e-4), name
    assert len(set(logged["charts/response_length"])) > 1 and min(logged["charts/eos_rate"]) < 1
    assert abs(logged["charts/kl"][2]) > 0.01


@pytest.mark.parametrize("script", [ppo, grpo], ids=lambda script: script.__name__)
def test_losses_are_means_over_the_updates(script, monkeypatch):
    names = ("policy_loss", "value_loss") if script is ppo else ("grpo_loss", "kl_loss")
    policy, other = (programs.spy(monkeypatch, script, name) for name in names)
    norms = programs.spy(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    logged = curves(monkeypatch, script, update_epochs=3, num_minibatches=2)
    assert len(policy) == len(other) == len(norms) == 18
    for i in range(3):
        calls = slice(6 * i, 6 * i + 6)
        updates = [loss for _, loss, _ in policy[calls]]
        expected = {
            "policy_loss": sum(loss for loss, _ in updates) / 6,
            names[1]: sum(loss for _, loss, _ in other[calls]) / 6,
            "grad_norm": sum(norm for _, norm, _ in norms[calls]) / 6,
            "ratio_first": updates[0][1]["ratio"],
        }
        for name in ("approx_kl", "clipfrac", "ratio"):
            expected[name] = sum(metrics[name] for _, metrics in updates) / 6
        for name, value in expected.items():
            assert logged[f"losses/{name}"][i] == pytest.approx(value.item(), abs=1e-6), name


def explained(returns, guesses, mask):
    """1 less the variance of the error over that of the returns, on real tokens."""
    errors, wanted = (returns - guesses)[mask].tolist(), returns[mask].tolist()
    return 1 - statistics.variance(errors) / statistics.variance(wanted)


def test_explained_variance_of_the_critic(monkeypatch):
    made = programs.spy(monkeypatch, ppo, "compute_gae")
    logged = curves(monkeypatch, ppo, learning_rate=0.003)
    for i, ((_, values, mask, *_), (_, returns), _) in enumerate(made):
        expected = explained(returns, values, mask)
        assert logged["losses/explained_variance"][i] == pytest.approx(expected, abs=1e-4)
    assert len(made) == 3 and len(set(logged["losses/explained_variance"])) == 3


def test_explained_variance_of_the_baseline(monkeypatch):
    made = programs.spy(monkeypatch, reinforce, "returns_to_go")
    logged = curves(monkeypatch, reinforce, baseline="rloo", group_size=4)
    for i, ((_, mask, _), returns, _) in enumerate(made):
        totals = returns[:, 0].tolist()
        others = [oracle.mean_without(totals, 4, row) for row in range(64)]
        expected = explained(returns, torch.tensor(others)[:, None], mask)
        assert logged["losses/explained_variance"][i] == pytest.approx(expected, abs=1e-4)
    assert len(made) == 3


@pytest.mark.parametrize("script", [ppo, grpo, reinforce], ids=lambda script: script.__name__)
def test_progress_and_verdict(script, monkeypatch, capsys):
    """45 rollouts of 8, each a second by a clock that ticks when it is read."""
    programs.tick(monkeypatch, script)
    once = {} if script is reinforce else {"update_epochs": 1, "num_minibatches": 1}
    logged = curves(monkeypatch, script, batch_size=8, total_episodes=363, **once)
    assert logged["charts/episodes_per_second"] == [8.0] * 45
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{script.__name__}.py: cpu, seed 1, 10")
    rollouts = [*range(2, 45, 2), 45]
    assert len(lines) == len(rollouts)
    for rollout, line in zip(rollouts, lines, strict=True):
        score, kl = logged["charts/score"][rollout - 1], logged["charts/kl"][rollout - 1]
        said = f"{rollout / 45:4.0%}  score {score:.3f}  KL {kl:.3f}"
        assert line == said + f"       8 episodes/s  {45 - rollout:3} s left"
    assert last.startswith("held-out success 0.") and last.endswith(" 47.0 s")


@pytest.mark.parametrize("script", [ppo, grpo, reinforce, dpo], ids=lambda script: script.__name__)
def test_evaluations_before_and_after_are_logged(script, monkeypatch):
    monkeypatch.setattr(script, "SummaryWriter", lambda run: programs.NoWriter())
    calls = programs.record(monkeypatch, script, "write")
    flags = {"batch_size": 64, "total_episodes": 128}
    if script is dpo:
        flags = {"num_responses": 64, "group_size": 4, "epochs": 1, "minibatch_size": 16}
    result = script.main(script.Args(sft_steps=20, **flags))
    before, after = [call for call in calls["write"] if call["group"] == "eval"]
    last = max(call["step"] for call in calls["write"])
    assert (before["step"], after["step"]) == (0, last) and last > 1
    assert before["metrics"]["success"] == result["success_before"] != result["success"]
    assert before["metrics"]["kl"] == 0 < after["metrics"]["kl"]
    for name, value in after["metrics"].items():
        assert value == result["success" if name == "gold_score" else name]
    for metrics in (before["metrics"], after["metrics"]):
        assert {"success", "kl", "objective", "optimality"} <= metrics.keys()
        assert metrics.get("gold_score", metrics["success"]) == metrics["success"]


@pytest.mark.parametrize("script", [ppo, grpo, reinforce], ids=lambda script: script.__name__)
def test_prompts_come_in_turn(script, monkeypatch):
    """All training prompts, in an order of chance, before any comes again, in another order."""
    rollouts = programs.spy_on_samples(monkeypatch, script)
    once = {} if script is reinforce else {"update_epochs": 1, "num_minibatches": 1}
    size = 1 if script is ppo else 4
    group = {} if script is ppo else {"group_size": size}
    number = len(script.make_prompts()[0])
    flags = {"batch_size": 64 * size, "total_episodes": 31 * 64 * size, "sft_steps": 1}
    script.main(script.Args(tensorboard=False, **flags, **group, **once))
    prompts = torch.cat([prompts for (_, prompts, _), _, _ in rollouts]).view(-1, size, 3)
    assert len(prompts) == 31 * 64 and (prompts == prompts[:, :1]).all()
    taken = [tuple(prompt) for prompt in prompts[:, 0].tolist()]
    first, second, third = taken[:number], taken[number : 2 * number], taken[2 * number :]
    everything = {tuple(prompt) for prompt in script.make_prompts()[0].tolist()}
    assert set(first) == set(second) == everything and set(third) < everything
    assert len(set(third)) == len(third) > 300
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    assert abs(statistics.mean(100 * a + 10 * b + c for a, b, c in first[:200]) - 500) < 100
