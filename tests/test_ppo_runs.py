"""ppo.py as a program: each step against a second implementation, its flags, files and refusals."""

import copy
import math
import os
import sys
from pathlib import Path

import oracle
import programs
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import ppo

ROOT = Path(__file__).parent.parent
EOS = 10


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    yield from programs.start(f"ppo.py {programs.SHORT_RUN}", tmp_path_factory.mktemp("program"))


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, ppo)


SHORT = {"batch_size": 64, "total_episodes": 128, "sft_steps": 20, "tensorboard": False}


def run(**flags):
    """Train for two rollouts of 64, unless the flags say otherwise."""
    return ppo.main(ppo.Args(**(SHORT | flags)))


# ---------------------------------------------------------------------------- One update
class Updates:
    """The state of policy and critic at each gradient step of a run, and its gradient."""

    def __init__(self, monkeypatch):
        self.rollouts = programs.spy_on_rollouts(monkeypatch, ppo, self.copy_policy)
        self.weights = []
        self.gradients = []
        self.norms = []
        clip = nn.utils.clip_grad_norm_

        def clip_grad_norm_(parameters, max_norm):
            self.weights.append([parameter.detach().clone() for parameter in parameters])
            self.gradients.append([parameter.grad.clone() for parameter in parameters])
            self.norms.append(max_norm)
            return clip(parameters, max_norm)

        monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip_grad_norm_)

    @staticmethod
    def copy_policy(policy, prompts, temperature):
        return copy.deepcopy(policy)

    def models(self, step):
        """Policy and critic, float64, just before a gradient step."""
        *weights, weight, bias = self.weights[step]
        policy = ppo.GPT()
        with torch.no_grad():
            for parameter, value in zip(policy.parameters(), weights, strict=True):
                parameter.copy_(value)
        critic = nn.Linear(64, 1)
        critic.weight = nn.Parameter(weight.clone())
        critic.bias = nn.Parameter(bias.clone())
        return policy.double(), critic.double()


def assess(policy, critic, prompts, responses, temperature):
    """Log-probabilities of all tokens before each response token (B, 3, V), and values (B, 3)."""
    states = policy(torch.cat([prompts, responses], 1))[:, 2:5]
    logprobs = (policy.head(states) / temperature).log_softmax(2)
    return logprobs, critic(states)[:, :, 0]


def chosen(logprobs, responses):
    return logprobs.gather(2, responses[:, :, None])[:, :, 0]


def expected_loss(args, rollout, old_models, models, reference):
    """PPO's loss of a whole rollout, written a second time with loops."""
    (_, prompts, _), responses, _ = rollout
    with torch.no_grad():
        old_logprobs, old_values = assess(*old_models, prompts, responses, args.temperature)
        ref_logprobs, _ = assess(reference, old_models[1], prompts, responses, args.temperature)
    logprobs, values = assess(*models, prompts, responses, args.temperature)
    old = chosen(old_logprobs, responses)
    kl = old - chosen(ref_logprobs, responses)
    new = chosen(logprobs, responses)
    entropy = -(logprobs.exp() * logprobs).sum(2)

    lengths = []
    advantages = []
    for i, response in enumerate(responses.tolist()):
        n = min([*response, EOS].index(EOS) + 1, 3)
        rewards = [-args.kl_coef * kl[i, t].item() for t in range(n)]
        rewards[-1] += oracle.score(prompts[i].tolist(), tuple(response[:n]))
        advantages.append(
            oracle.gae(rewards, old_values[i, :n].tolist(), args.gamma, args.gae_lambda)
        )
        lengths.append(n)
    returns = [
        [a + v for a, v in zip(row, old_values[i].tolist(), strict=False)]
        for i, row in enumerate(advantages)
    ]
    if args.normalize_advantages:
        everything = [a for row in advantages for a in row]
        mean = sum(everything) / len(everything)
        std = oracle.deviation(everything)
        advantages = [[(a - mean) / std for a in row] for row in advantages]
    if args.advantage_clip is not None:
        bound = args.advantage_clip
        advantages = [[max(-bound, min(bound, a)) for a in row] for row in advantages]

    loss = 0.0
    for i, n in enumerate(lengths):
        for t in range(n):
            ratio = (new[i, t] - old[i, t]).exp()
            a = advantages[i][t]
            low = torch.tensor(1 - args.clip_coef).double()
            high = torch.tensor(1 + args.clip_coef).double()
            objective = torch.min(ratio * a, torch.max(torch.min(ratio, high), low) * a)
            if args.dual_clip is not None and a < 0:
                objective = torch.max(objective, torch.tensor(args.dual_clip * a).double())
            value = values[i, t]
            old_value = old_values[i, t]
            moved = (value - old_value).clamp(-args.value_clip, args.value_clip)
            target = returns[i][t]
            error = torch.max((value - target) ** 2, (old_value + moved - target) ** 2)
            loss = loss - objective + args.vf_coef * error / 2 - args.ent_coef * entropy[i, t]
    return loss / len(lengths)


SETTINGS = [
    {},
    {"kl_coef": 0.7, "gamma": 0.9, "gae_lambda": 0.8, "temperature": 0.7, "ent_coef": 0.3},
    {"normalize_advantages": True, "advantage_clip": 1.2, "vf_coef": 2.0},
    {"clip_coef": 0.02, "dual_clip": 1.1, "value_clip": 0.01, "vf_coef": 1.0},
]


@pytest.mark.parametrize("flags", SETTINGS, ids=[" ".join(flags) for flags in SETTINGS])
def test_gradients_are_those_of_a_second_implementation(flags, monkeypatch):
    """Of two rollouts and two epochs each, with one minibatch: the whole rollout."""
    flags = {"num_minibatches": 1, "update_epochs": 2, "learning_rate": 5e-3} | flags
    updates = Updates(monkeypatch)
    args = ppo.Args(**(SHORT | flags))
    ppo.main(args)
    assert len(updates.rollouts) == 2
    assert len(updates.gradients) == 4
    reference = updates.rollouts[0][2].double()
    for step in range(4):
        old_step = step - step % 2  # the first step of a rollout starts from the old policy
        old_models = updates.models(old_step)
        models = updates.models(step)
        loss = expected_loss(args, updates.rollouts[step // 2], old_models, models, reference)
        loss.backward()
        policy, critic = models
        parameters = [*policy.parameters(), *critic.parameters()]
        scale = max(parameter.grad.abs().max() for parameter in parameters)
        for parameter, gradient in zip(parameters, updates.gradients[step], strict=True):
            error = (parameter.grad - gradient.double()).abs().max() / scale
            assert error < 1e-4
    old_policy = updates.rollouts[1][2]  # what sampled is what the first step then found
    for weight, parameter in zip(updates.weights[2], old_policy.parameters(), strict=False):
        assert torch.equal(weight, parameter)


def test_steps_are_adams_with_a_rate_that_peaks_and_decays(monkeypatch):
    """Every step of a run by the formulas of Adam, from the gradients that it had."""
    updates = Updates(monkeypatch)
    flags = {"batch_size": 16, "total_episodes": 16 * 20, "num_minibatches": 1}
    run(**flags, update_epochs=1, max_grad_norm=0.5, learning_rate=2e-3)
    assert set(updates.norms) == {0.5}
    rates = [0.5, 1.0] + [(20 - i) / 19 for i in range(2, 20)]  # 19/19 is the peak
    first = [torch.zeros_like(weight) for weight in updates.weights[0]]
    second = [torch.zeros_like(weight) for weight in updates.weights[0]]
    clipped = 0
    for step in range(19):
        gradients = updates.gradients[step]
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        clipped += norm > 0.5
        for i, gradient in enumerate(gradients):
            g = gradient * min(1.0, 0.5 / norm)
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.99 * second[i] + 0.01 * g**2
            mean = first[i] / (1 - 0.9 ** (step + 1))
            scale = (second[i] / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
            expected = updates.weights[step][i] - 2e-3 * rates[step] * mean / scale
            torch.testing.assert_close(updates.weights[step + 1][i], expected, atol=3e-6, rtol=0)
    assert 0 < clipped < 19


@pytest.mark.parametrize("rollouts", [1, 2, 5, 15, 40])
def test_the_flag_is_the_peak_of_the_learning_rate_and_is_reached(rollouts, monkeypatch):
    curves = programs.record_curves(monkeypatch, ppo)
    flags = {"batch_size": 8, "num_minibatches": 1, "update_epochs": 1, "sft_steps": 0}
    run(**flags, total_episodes=8 * rollouts, learning_rate=3e-4, tensorboard=True)
    rates = programs.values(curves["charts/learning_rate"])
    peak = max(1, rollouts // 10) - 1
    assert len(rates) == rollouts
    assert max(rates) == rates[peak] == pytest.approx(3e-4)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] <= 3e-4 / (rollouts - peak) + 1e-12
    assert rates[0] > 0


def test_each_epoch_reads_every_response_once_in_a_new_order(monkeypatch):
    rollouts = programs.spy_on_rollouts(monkeypatch, ppo)
    losses = programs.spy(monkeypatch, ppo, "policy_loss")
    values = programs.spy(monkeypatch, ppo, "value_loss")
    states = programs.spy(monkeypatch, ppo, "response_states")
    run(batch_size=60, total_episodes=60, update_epochs=3, num_minibatches=4)
    assert len(losses) == len(values) == 12
    ((_, prompts, _), responses, _) = rollouts[0]
    everything = sorted(torch.cat([prompts, responses], 1).tolist())
    minibatches = [arguments[1:] for arguments, _, _ in states if len(arguments[1]) == 15]
    orders = []
    for epoch in range(3):
        read = [torch.cat(pair, 1) for pair in minibatches[4 * epoch : 4 * epoch + 4]]
        orders.append(torch.cat(read).tolist())
        assert sorted(orders[-1]) == everything
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_values_and_logprobs_are_of_the_same_rows_as_the_old_ones(monkeypatch):
    """Before the first step nothing has changed, so that they must agree row by row."""
    losses = programs.record(monkeypatch, ppo, "policy_loss", "value_loss")
    run(num_minibatches=4, update_epochs=1, learning_rate=0.02)
    for rollout in range(2):
        policy = losses["policy_loss"][4 * rollout]
        value = losses["value_loss"][4 * rollout]
        mask = policy["mask"]
        new = policy["logprobs"].detach()
        torch.testing.assert_close(new[mask], policy["old_logprobs"][mask], atol=1e-5, rtol=0)
        torch.testing.assert_close(value["values"].detach(), value["old_values"])
        advantages = value["returns"] - value["old_values"]
        torch.testing.assert_close(policy["advantages"][mask], advantages[mask])
        assert torch.equal(value["mask"], mask)
    assert losses["value_loss"][4]["values"].std() > 0


def test_the_critic_starts_without_an_opinion(monkeypatch):
    calls = programs.record(monkeypatch, ppo, "compute_gae")
    run(total_episodes=64)
    assert calls["compute_gae"][0]["values"].unique().numel() == 1  # its bias


def test_returns_are_those_before_whitening_and_clipping(monkeypatch):
    made = programs.spy(monkeypatch, ppo, "compute_gae")
    calls = programs.record(monkeypatch, ppo, "value_loss", "policy_loss")
    run(normalize_advantages=True, advantage_clip=0.5, num_minibatches=1, update_epochs=1)
    for i, (_, (_, returns), _) in enumerate(made):
        used = calls["value_loss"][i]["returns"]
        assert torch.equal(used.sort(0).values, returns.sort(0).values)
        assert calls["policy_loss"][i]["advantages"].abs().max() == 0.5


# ---------------------------------------------------------------------------- Learning
@programs.beside(programs.long_run, "ppo", total_episodes=7_680)
def test_success_rises_from_that_of_the_reference(found):
    result, _ = found
    assert 0.4 < result["success_before"] < 0.8
    assert result["success"] > result["success_before"] + 0.1
    assert 0 < result["kl"] < 2


@pytest.fixture(scope="module")
def default_result(tmp_path_factory):
    """Computed once: what run() returns with no flags."""
    with pytest.MonkeyPatch.context() as patch:
        programs.shorten_runs(patch, tmp_path_factory.mktemp("default"), ppo)
        return run()


def test_same_seed_same_result_and_another_seed_another(default_result):
    assert run() == default_result
    assert run(seed=2) != default_result


def test_memory_of_sft_changes_nothing(default_result, monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "WARM", {})
    assert run() == default_result  # trained again
    assert len(programs.WARM) == 1
    run(sft_steps=10)
    run(seed=2)
    assert len(programs.WARM) == 3
    make_demonstrations = ppo.make_demonstrations

    def fewer(prompts, targets):
        prompts, responses = make_demonstrations(prompts, targets)
        return prompts[:50], responses[:50]

    monkeypatch.setattr(ppo, "make_demonstrations", fewer)
    assert run() != default_result
    assert len(programs.WARM) == 4


CHOICES = [
    {"update_epochs": 1},
    {"num_minibatches": 1},
    {"gamma": 0.9},
    {"gae_lambda": 0.5},
    {"clip_coef": 0.01},
    {"dual_clip": 1.0001},
    {"value_clip": 0.001},
    {"normalize_advantages": True},
    {"advantage_clip": 0.1},
    {"target_kl": 1e-6},
    {"ent_coef": 0.1},
    {"vf_coef": 1.0},
    {"kl_coef": 1.0},
    {"temperature": 0.5},
    {"max_grad_norm": 0.001},
    {"learning_rate": 1e-4},
    {"batch_size": 32},
    {"total_episodes": 192},
    {"sft_steps": 0},
]


@pytest.mark.parametrize("flags", CHOICES, ids=[" ".join(flags) for flags in CHOICES])
def test_every_flag_changes_the_outcome(flags, default_result):
    base = default_result
    if "dual_clip" in flags:  # only binds where the ratio's own clipping does not
        base = run(clip_coef=10.0, learning_rate=0.02)
        flags = flags | {"clip_coef": 10.0, "learning_rate": 0.02}
    result = run(**flags)
    assert all(math.isfinite(value) for value in result.values())
    assert result["kl"] != base["kl"]


def test_value_clipping_has_a_flag_of_its_own(monkeypatch):
    calls = programs.record(monkeypatch, ppo, "policy_loss", "value_loss", "dual_clip_loss")
    run(clip_coef=0.3, value_clip=7.0, dual_clip=3.0, total_episodes=64)
    assert {call["clip_coef"] for call in calls["policy_loss"]} == {0.3}
    assert {call["value_clip"] for call in calls["value_loss"]} == {7.0}
    assert {call["dual_clip"] for call in calls["dual_clip_loss"]} == {3.0}


def test_the_dual_clip_is_what_is_trained_on(monkeypatch):
    """All rows and masks of the second loss are those of the first."""
    calls = programs.record(monkeypatch, ppo, "policy_loss", "dual_clip_loss")
    run(dual_clip=3.0, total_episodes=64)
    assert len(calls["policy_loss"]) == 2 * len(calls["dual_clip_loss"]) == 8
    for call, plain in zip(calls["dual_clip_loss"], calls["policy_loss"][::2], strict=True):
        for name in ("logprobs", "old_logprobs", "advantages", "mask"):
            assert torch.equal(call[name], plain[name])


def test_an_entropy_bonus_raises_the_entropy(monkeypatch):
    curves = programs.record_curves(monkeypatch, ppo)
    entropies = []
    for ent_coef in (0.0, 5.0):
        curves.clear()
        run(ent_coef=ent_coef, tensorboard=True)
        entropies.append(programs.values(curves["losses/entropy"])[-1])
    assert entropies[1] > entropies[0] + 0.01


def test_a_high_price_of_the_kl_keeps_the_policy_close():
    near = run(kl_coef=5.0, total_episodes=640)
    far = run(kl_coef=0.0, total_episodes=640)
    assert near["kl"] < 0.5 * far["kl"]


def test_target_kl_ends_the_updates_on_a_rollout(monkeypatch):
    losses = programs.spy(monkeypatch, ppo, "policy_loss")
    run(update_epochs=4, num_minibatches=4)
    assert len(losses) == 2 * 16
    losses.clear()
    run(update_epochs=4, num_minibatches=4, target_kl=1e-9)
    assert len(losses) == 2 * 4  # after each epoch it is asked whether to go on
    losses.clear()
    run(update_epochs=4, num_minibatches=4, target_kl=0.05, total_episodes=256)
    for rollout in losses_by_rollout(losses):
        kls = [metrics["approx_kl"].item() for _, (_, metrics), _ in rollout]
        ends = kls[3::4]  # of the last minibatch of each epoch
        assert all(kl <= 0.05 for kl in ends[:-1])
        assert ends[-1] > 0.05 or len(ends) == 4
    assert 16 < len(losses) < 64


def losses_by_rollout(losses):
    """The calls of policy_loss, split where the old log-probabilities are of another rollout."""
    rollouts = []
    for call in losses:
        (logprobs, old_logprobs, _, mask, _), _, _ = call
        starts = (logprobs - old_logprobs)[mask].abs().max() < 1e-5
        if starts:
            rollouts.append([])
        rollouts[-1].append(call)
    return rollouts


def test_training_prompts_are_what_is_trained_on(monkeypatch):
    train, targets, _, _ = ppo.make_prompts("cpu")
    rollouts = programs.spy_on_rollouts(monkeypatch, ppo)
    rewards = programs.record(monkeypatch, ppo, "reward", "make_demonstrations")
    run(batch_size=512, total_episodes=1024)
    known = {tuple(prompt) for prompt in train.tolist()}
    seen = set()
    for (_, prompts, _), responses, _ in rollouts:
        seen |= {tuple(prompt) for prompt in prompts.tolist()}
        (call,) = [call for call in rewards["reward"] if torch.equal(call["responses"], responses)]
        assert torch.equal(call["targets"], 20 - prompts.sum(1))
    assert seen <= known
    assert len(seen) > 400
    (call,) = rewards["make_demonstrations"]
    assert torch.equal(call["prompts"], train)
    assert torch.equal(call["targets"], targets)


def test_evaluation_is_of_the_held_out_prompts_before_and_after(monkeypatch):
    calls = programs.spy(
        monkeypatch, ppo, "evaluate", lambda *args: [copy.deepcopy(model) for model in args[:2]]
    )
    result = run(temperature=0.7)
    _, _, test, targets = ppo.make_prompts("cpu")
    (_, before, start), (_, after, end) = calls
    for arguments, _, _ in calls:
        assert torch.equal(arguments[2], test)
        assert torch.equal(arguments[3], targets)
        assert arguments[4] == 0.7
    assert result == {"success_before": before["success"], **after}
    assert before["kl"] == 0
    weights = [model.embed.weight for model in (*start, *end)]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[3])
    assert not torch.equal(weights[0], weights[2])


def test_reference_is_frozen_and_nothing_is_left_behind(monkeypatch, tmp_path):
    programs.check_reference_is_frozen(monkeypatch, run)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- Odd rewards
def constant_reward(value):
    def reward(targets, responses):
        return torch.full((len(responses),), value)

    return reward


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_rewards_divide_by_zero_nowhere(value, kl_coef, monkeypatch):
    monkeypatch.setattr(ppo, "reward", constant_reward(value))
    curves = programs.record_curves(monkeypatch, ppo)
    result = run(
        kl_coef=kl_coef, normalize_advantages=True, advantage_clip=1.0, tensorboard=True, gamma=1.0
    )
    for tag, curve in curves.items():
        assert all(math.isfinite(x) for x in programs.values(curve)), tag
    assert all(math.isfinite(x) for x in result.values())


def test_equal_rewards_and_no_kl_leave_the_policy_alone(monkeypatch):
    monkeypatch.setattr(ppo, "reward", constant_reward(0.0))
    monkeypatch.setattr(nn.Linear, "reset_parameters", zero_bias(nn.Linear.reset_parameters))
    result = run(kl_coef=0.0)
    assert result["kl"] == pytest.approx(0, abs=1e-6)


def zero_bias(reset_parameters):
    """So that the values of a new critic are 0, and with them the advantages."""

    def reset(linear):
        reset_parameters(linear)
        nn.init.zeros_(linear.bias)

    return reset


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch, capsys):
    def infinite(rewards, values, mask, *_):
        return torch.full_like(rewards, math.inf), values

    monkeypatch.setattr(ppo, "compute_gae", infinite)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "rollout 1" in error and "--learning-rate" in error


# ---------------------------------------------------------------------------- Reward model
def save_reward_model(path):
    torch.manual_seed(7)
    members = [ppo.GPT(outputs=1).state_dict() for _ in range(2)]
    reference = ppo.GPT().state_dict()
    torch.save({"members": members, "reference": reference, "uncertainty_coef": 0.5}, path)


def test_a_reward_model_is_what_is_maximised(monkeypatch, tmp_path):
    save_reward_model(tmp_path / "reward.pt")
    rollouts = programs.spy_on_rollouts(monkeypatch, ppo, Updates.copy_policy)
    judged = programs.spy(monkeypatch, ppo.RewardModel, "forward")
    paid = programs.record(monkeypatch, ppo, "token_rewards")
    curves = programs.record_curves(monkeypatch, ppo)
    run(reward_model=tmp_path / "reward.pt", tensorboard=True)
    (model, *_), _, _ = judged[0]
    assert model.uncertainty_coef == 0.5
    samples = [call for call in rollouts if call[0][0] is not model.reference]
    assert len(samples) == len(judged) == 2
    for i, ((_, prompts, _), responses, _) in enumerate(samples):
        (_, judged_prompts, judged_responses), scores, _ = judged[i]
        assert torch.equal(judged_prompts, prompts)
        assert torch.equal(judged_responses, responses)
        assert torch.equal(paid["token_rewards"][i]["scores"], scores)
        assert curves["charts/score"][i][1] == pytest.approx(scores.mean().item(), abs=1e-5)
        true_score = ppo.reward(20 - prompts.sum(1), responses).mean().item()
        assert curves["charts/true_score"][i][1] == pytest.approx(true_score)
        assert not scores.requires_grad
    assert 0 <= programs.values(curves["eval/success"])[1] <= 1


def test_a_wrong_reward_model_ends_the_run_with_nothing_written(tmp_path, capsys):
    torch.save({"policy": ppo.GPT().state_dict()}, tmp_path / "policy.pt")
    with pytest.raises(SystemExit) as stop:
        run(reward_model=tmp_path / "policy.pt", tensorboard=True, save_path=Path("new.pt"))
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert error.count("\n") == 1
    assert "policy.pt" in error
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt"]


# ---------------------------------------------------------------------------- Files
def test_advantages_are_whitened_over_the_rollout(monkeypatch):
    losses = programs.spy(monkeypatch, ppo, "policy_loss")
    run(normalize_advantages=True, total_episodes=64, num_minibatches=4)
    programs.check_whitened(losses, num_minibatches=4)


def test_the_saved_file_holds_policy_reference_and_flags(monkeypatch, tmp_path):
    rollouts = programs.spy_on_samples(
        monkeypatch, ppo, lambda policy, *args: copy.deepcopy(policy)
    )
    run(save_path=tmp_path / "model.pt", kl_coef=0.25)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved.keys() == {"args", "policy", "reference"}
    for name, i in (("reference", 0), ("policy", -1)):  # of the first and the last evaluation
        model = rollouts[i][2].state_dict()
        assert saved[name].keys() == model.keys()
        assert all(torch.equal(saved[name][key], model[key]) for key in model)
    expected = ppo.Args(**(SHORT | {"save_path": tmp_path / "model.pt", "kl_coef": 0.25}))
    assert saved["args"] == {flag: str(value) for flag, value in vars(expected).items()}
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_an_old_file_is_replaced_whole_or_not_at_all(monkeypatch, tmp_path, capsys):
    path = tmp_path / "model.pt"
    path.write_text("old")
    save = torch.save

    def half(state, file):
        save(state, file)
        Path(file).write_bytes(Path(file).read_bytes()[:100])
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match=r"--save-path .*no space left"):
        run(save_path=path, total_episodes=64)
    assert capsys.readouterr().out.splitlines()[-1].startswith("held-out success")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(torch, "save", save)
    run(save_path=path, total_episodes=64)
    assert torch.load(path, weights_only=True)["args"]["batch_size"] == "64"


def test_program_in_a_shell(program):
    """The real command: header, progress, ending; events and a file that loads safely."""
    saved, folder = programs.check_short_run(ppo, *program())
    ppo.GPT().load_state_dict(saved["policy"])
    ppo.GPT().load_state_dict(saved["reference"])
    assert saved["args"]["batch_size"] == "64"
    events = EventAccumulator(str(folder)).Reload()
    charts = ["score", "true_score", "kl", "response_length", "learning_rate"]
    losses = ["policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "ratio"]
    losses += ["ratio_first", "grad_norm", "explained_variance"]
    expected = {f"charts/{name}" for name in [*charts, "episodes_per_second"]}
    expected |= {f"losses/{name}" for name in losses}
    evaluation = ["success", "success_error", "kl", "kl_error"]
    expected |= {f"eval/{name}" for name in evaluation}
    assert set(events.Tags()["scalars"]) == expected
    for name in evaluation:
        assert [point.step for point in events.Scalars(f"eval/{name}")] == [0, 640]


def test_a_bad_value_ends_the_program(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        programs.run_as_program(ROOT / "ppo.py", "--num-minibatches 7", sys.stdout, monkeypatch)
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- Flags
NAN = math.nan
BAD = {
    "batch_size": [0, -1, 1000],
    "total_episodes": [0, 10, 63],
    "num_minibatches": [0, -1, 7],
    "update_epochs": [0, -1],
    "learning_rate": [0.0, -1.0, 1.0, NAN, math.inf],
    "max_grad_norm": [0.0, -1.0, NAN, math.inf],
    "temperature": [0.0, 1e-7, -1.0, NAN, math.inf],
    "kl_coef": [-1.0, -1e-9, NAN, math.inf],
    "seed": [-1, 2**63],
    "sft_steps": [-1],
    "gamma": [1.01, -0.01, NAN],
    "gae_lambda": [1.01, -0.01, NAN],
    "clip_coef": [0.0, -1.0, NAN, math.inf],
    "value_clip": [0.0, -1.0, NAN, math.inf],
    "dual_clip": [1.0, 0.5, NAN, math.inf],
    "advantage_clip": [0.0, -1.0, NAN, math.inf],
    "target_kl": [0.0, -1.0, NAN, math.inf],
    "vf_coef": [-0.1, NAN, math.inf],
    "ent_coef": [-0.1, NAN, math.inf],
    "device": ["cuda"],
}


def check_refused(flags, named, capsys, folder):
    """One line on stderr names the flag, the status is 2, and nothing is written."""
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as stop:
        run(**({"tensorboard": True} | flags))
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("flag, value", [(f, v) for f, values in BAD.items() for v in values])
def test_bad_values_are_refused_in_one_line(flag, value, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    named = f"--{flag.replace('_', '-')}"
    check_refused({flag: value}, named, capsys, tmp_path)


def test_values_at_the_border_are_taken():
    border = {"seed": 0, "kl_coef": 0.0, "gamma": 0.0, "gae_lambda": 0.0, "vf_coef": 0.0}
    ppo.check_args(ppo.Args(**border, ent_coef=0.0, dual_clip=1.001, sft_steps=0))
    ppo.check_args(ppo.Args(seed=2**63 - 1, gamma=1.0, gae_lambda=1.0, num_minibatches=256))
    ppo.check_args(ppo.Args(total_episodes=256, update_epochs=1, num_minibatches=1))
    ppo.check_args(ppo.Args(batch_size=1, num_minibatches=1, save_path=Path("model.pt")))


def test_folders_without_permission_are_refused(tmp_path, capsys, monkeypatch):
    """As root may write anywhere, the answer of the operating system is given by hand."""
    forbidden = {"runs", "closed"}
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name not in forbidden and access(path, mode)
    )
    (tmp_path / "closed").mkdir()
    check_refused({"save_path": Path("closed/model.pt")}, "--save-path", capsys, tmp_path)
    (tmp_path / "runs").mkdir()
    check_refused({}, "--no-tensorboard", capsys, tmp_path)


@pytest.mark.parametrize("words", [["--device", "tpu"], ["--seed", "x"], ["--lambda", "1"]])
def test_bad_words_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(ppo.Args, args=words)
    assert stop.value.code == 2
