"""reward_model.py: losses and their minima by enumeration, feedback, a person, the program."""

import contextlib
import copy
import itertools
import json
import math
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import oracle
import programs
import pytest
import torch
import tyro

import grpo
import ppo
import reward_model

EOS = 10
PROMPT = (4, 3, 3)
GOOD = '{"prompt": "433", "chosen": "73", "rejected": "11"}'
TIE = '{"prompt": "433", "chosen": "73", "rejected": "11", "tie": true}'


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_gpt(seed, outputs=11):
    """A GPT whose blocks are not the identity and whose responses sometimes end early."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gpt = reward_model.GPT(outputs=outputs).requires_grad_(False)
        for parameter in gpt.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if outputs > 1:
            gpt.head.bias[EOS] += 1
    return gpt


def real_tokens(response):
    """The tokens up to and including the first EOS."""
    if EOS in response:
        return response[: response.index(EOS) + 1]
    return response


# ---------------------------------------------------------------------------- Losses
@pytest.mark.parametrize("chosen, rejected, printed", [(2.89, 3.25, 0.8893), (2.89, 2.0, 0.3441)])
def test_losses_printed_in_the_tutorial(chosen, rejected, printed):
    scores = float64(chosen, rejected)[None]
    loss, _ = reward_model.preference_loss(scores, reward_model.pair_wins(torch.tensor([False])))
    assert round(loss.item(), 4) == printed


def test_preference_loss_of_pairs_by_loops():
    chosen, rejected = random_numbers(0, 2, 9)
    rejected[3] = chosen[3]
    ties = torch.tensor([False, True, False, False, True, False, False, False, True])
    losses = []
    correct = []
    for a, b, tie in zip(chosen.tolist(), rejected.tolist(), ties.tolist(), strict=True):
        loss = -oracle.log_sigmoid(a - b)
        if tie:
            loss = (loss - oracle.log_sigmoid(b - a)) / 2
        losses.append(loss)
        correct.append(0.5 if tie or a == b else float(a > b))
    scores = torch.stack([chosen, rejected], 1)
    loss, accuracy = reward_model.preference_loss(scores, reward_model.pair_wins(ties))
    assert loss.item() == pytest.approx(sum(losses) / 9, abs=1e-9)
    assert accuracy.item() == pytest.approx(sum(correct) / 9)


def test_preference_loss_of_several_comparisons_by_loops():
    """Every judged pair counts the same, however many a prompt has; the others do not count."""
    scores = random_numbers(0, 3, 4)
    wins = torch.zeros(3, 4, 4)
    losses = []
    correct = []
    for prompt, better, worse in [(0, 2, 1), (0, 2, 0), (0, 0, 1), (0, 3, 2), (2, 1, 3)]:
        wins[prompt, better, worse] = 1
        margin = (scores[prompt, better] - scores[prompt, worse]).item()
        losses.append(-oracle.log_sigmoid(margin))
        correct.append(margin > 0)
    loss, accuracy = reward_model.preference_loss(scores, wins)
    assert loss.item() == pytest.approx(sum(losses) / 5, abs=1e-9)
    assert accuracy.item() == pytest.approx(sum(correct) / 5)
    shifted, _ = reward_model.preference_loss(scores + float64(3.0, -1.0, 2.0)[:, None], wins)
    assert shifted.item() == pytest.approx(loss.item())  # a constant per prompt is not seen


def test_a_minibatch_without_a_judged_pair_changes_nothing():
    scores = random_numbers(0, 3, 4).requires_grad_()
    loss, accuracy = reward_model.preference_loss(scores, torch.zeros(3, 4, 4))
    loss.backward()
    assert loss.item() == accuracy.item() == 0
    assert not scores.grad.any()


def test_label_loss_by_loops():
    scores = random_numbers(1, 7)
    labels = torch.tensor([True, False, False, True, True, False, True])
    losses = []
    correct = []
    for score, good in zip(scores.tolist(), labels.tolist(), strict=True):
        losses.append(-oracle.log_sigmoid(score if good else -score))
        correct.append((score > 0) == good)
    loss, accuracy = reward_model.label_loss(scores, labels)
    assert loss.item() == pytest.approx(sum(losses) / 7, abs=1e-9)
    assert accuracy.item() == pytest.approx(sum(correct) / 7)


def test_demonstration_loss_by_loops():
    scores = random_numbers(2, 5, 4)
    log_weights = random_numbers(3, 5, 4)
    losses = []
    beaten = []
    for own, weights in zip(scores.tolist(), log_weights.tolist(), strict=True):
        total = sum(math.exp(s + w) for s, w in zip(own, weights, strict=True))
        losses.append(math.log(total) - own[0] - weights[0])
        beaten += [own[0] > other for other in own[1:]]
    loss, accuracy = reward_model.demonstration_loss(scores, log_weights)
    assert loss.item() == pytest.approx(sum(losses) / 5, abs=1e-9)
    assert accuracy.item() == pytest.approx(sum(beaten) / 15)
    shifted, _ = reward_model.demonstration_loss(scores + 3, log_weights)
    assert shifted.item() == pytest.approx(loss.item())  # a constant per prompt is not seen


# ------------------------------------------------------------- What the losses make the scores be
def minimise(loss, number):
    """The scores at which a loss is least."""
    scores = torch.zeros(number, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(scores)
        value.backward()
        return value

    optimizer.step(closure)
    return scores.detach()


def distance(found, exact):
    """Largest difference between two vectors of scores, whatever constant is added to them."""
    difference = found - exact
    return (difference - difference.mean()).abs().max().item()


REWARDS = float64(1.0, 0.0, 0.4, 0.9)


def test_preferences_lead_to_the_reward_over_the_temperature_and_a_constant():
    tau = 0.5
    wins = torch.zeros(1, 4, 4, dtype=torch.float64)  # what is expected of the annotator
    for i, j in itertools.permutations(range(4), 2):
        wins[0, i, j] = oracle.sigmoid((REWARDS[i] - REWARDS[j]).item() / tau)

    def loss(scores):
        return reward_model.preference_loss(scores[None], wins)[0]

    assert distance(minimise(loss, 4), REWARDS / tau) < 1e-5


def test_labels_lead_to_the_reward_less_one_half_over_the_temperature():
    tau = 0.5

    def loss(scores):
        total = 0.0
        for i in range(4):
            chance = oracle.sigmoid((REWARDS[i].item() - 0.5) / tau)
            good, _ = reward_model.label_loss(scores[i, None], torch.tensor([True]))
            bad, _ = reward_model.label_loss(scores[i, None], torch.tensor([False]))
            total = total + chance * good + (1 - chance) * bad
        return total

    exact = (REWARDS - 0.5) / tau
    torch.testing.assert_close(minimise(loss, 4), exact, atol=1e-4, rtol=0)


def demonstration_minimiser(rewards, reference, sampler, tau, num_samples):
    """Scores that minimise the expected demonstration_loss, over all sets of samples.

    rewards, reference, sampler: a value per response.
    """
    rows = oracle.sample_sets(reference, sampler, rewards.tolist(), tau, num_samples)
    chances = float64(*[chance for chance, _ in rows])
    index = torch.tensor([candidates for _, candidates in rows])  # (number of sets, 1 + M)
    log_weights = (float64(*reference) / float64(*sampler)).log()

    def one(scores, weights):
        return reward_model.demonstration_loss(scores[None], weights[None])[0]

    def loss(scores):
        return (chances * torch.vmap(one)(scores[index], log_weights[index])).sum()

    return minimise(loss, len(rewards))


@pytest.mark.parametrize("num_samples", [1, 2, 4, 8])
@pytest.mark.parametrize("success", [0.57, 0.05])
def test_demonstrations_lead_to_the_reward_over_the_temperature_with_any_number_of_samples(
    num_samples, success
):
    reference = [success, 1 - success]
    found = demonstration_minimiser(float64(1.0, 0.0), reference, reference, 0.5, num_samples)
    assert (found[0] - found[1]).item() == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("num_samples", [2, 4, 8])
def test_demonstrations_beside_samples_of_another_policy_lead_there_too(num_samples):
    reference = [0.5, 0.2, 0.3]
    policy = [0.1, 0.6, 0.3]
    rewards = REWARDS[:3]
    found = demonstration_minimiser(rewards, reference, policy, 0.5, num_samples)
    assert distance(found, rewards / 0.5) < 1e-4


# ---------------------------------------------------------------------------- Feedback
class World:
    """A tabular reference and policy that write 11 responses; the reward of each of them."""

    def __init__(self):
        everything = oracle.responses()
        self.responses = oracle.narrow_responses()
        rows = [everything.index(y) for y in self.responses]
        probs = oracle.token_table(oracle.narrow(oracle.table(0)))[rows].sum(1).exp()
        policy_probs = oracle.token_table(oracle.narrow(oracle.table(1)))[rows].sum(1).exp()
        self.probs = {
            "reference": probs / probs.sum(),
            "policy": policy_probs / policy_probs.sum(),
        }
        self.rewards = float64(*[oracle.score(PROMPT, y, "sharp") for y in self.responses])
        self.tokens = torch.tensor([[*y, *[EOS] * (3 - len(y))] for y in self.responses])

    def generate(self, policy, prompts, temperature):
        assert temperature == 1.0
        assert len(prompts) <= 256  # a real vocabulary would fill the memory
        probs = self.probs[policy].expand(len(prompts), 11)
        return self.tokens[torch.multinomial(probs, 1).squeeze(1)]

    def index(self, responses):
        return (responses[:, None] == self.tokens).all(2).float().argmax(1)

    def reward(self, targets, responses):
        assert (targets == 10).all()
        return self.rewards[self.index(responses)].float()


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(reward_model, "generate", world.generate)
    monkeypatch.setattr(reward_model, "reward", world.reward)
    torch.manual_seed(0)
    return world


def prompts_and_targets(number):
    return torch.tensor([PROMPT]).repeat(number, 1), torch.full((number,), 10)


def test_annotator_prefers_with_the_odds_of_bradley_and_terry(world):
    asked, targets = prompts_and_targets(20_000)
    prompts, responses, wins = reward_model.sample_comparisons("policy", asked, targets, 0.25, 3)
    assert torch.equal(prompts, asked)
    rows = world.index(responses.flatten(0, 1)).view(20_000, 3)
    shares = torch.bincount(rows.flatten(), minlength=11) / 60_000
    assert (shares - world.probs["policy"]).abs().max() < 5 * 0.5 / math.sqrt(60_000)
    # Two responses are compared once if they differ, and never if they are identical.
    different = rows[:, :, None] != rows[:, None, :]
    assert set(wins.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(wins + wins.transpose(1, 2), different.float())
    counts = torch.zeros(11, 11)
    for prompt, better, worse in wins.nonzero().tolist():
        counts[rows[prompt, better], rows[prompt, worse]] += 1
    judged = counts + counts.T
    seen_often = judged >= 100
    assert seen_often.sum() > 50
    for i, j in seen_often.nonzero().tolist():
        expected = oracle.sigmoid((world.rewards[i] - world.rewards[j]).item() / 0.25)
        assert abs(counts[i, j] / judged[i, j] - expected) < 5 * 0.5 / judged[i, j].sqrt()


def test_comparisons_are_of_responses_to_one_prompt_judged_by_its_target(monkeypatch):
    def generate(policy, prompts, temperature):
        """The prompt's first digit, a random one, EOS."""
        random_digits = torch.randint(10, (len(prompts), 1))
        return torch.cat([prompts[:, :1], random_digits, torch.full_like(random_digits, EOS)], 1)

    def reward(targets, responses):
        return -((targets - responses[:, :2].sum(1)) ** 2).float()

    monkeypatch.setattr(reward_model, "generate", generate)
    monkeypatch.setattr(reward_model, "reward", reward)
    asked, targets, _, _ = reward_model.make_prompts("cpu")
    prompts, responses, wins = reward_model.sample_comparisons(None, asked, targets, 1e-3, 4)
    assert torch.equal(prompts, asked)
    rows = zip(prompts.tolist(), responses.tolist(), wins.tolist(), strict=True)
    checked = 0
    for prompt, answers, won in rows:
        errors = [abs(20 - sum(prompt) - sum(answer[:2])) for answer in answers]
        assert {answer[0] for answer in answers} == {prompt[0]}
        for i, j in itertools.permutations(range(4), 2):
            if errors[i] < errors[j]:
                assert won[i][j] == 1 and won[j][i] == 0
                checked += 1
    assert checked > 3000


def test_labels_are_good_with_the_stated_odds(world):
    asked, targets = prompts_and_targets(60_000)
    prompts, responses, labels = reward_model.sample_labels("policy", asked, targets, 0.25)
    assert torch.equal(prompts, asked)
    assert responses.shape == (60_000, 1, 3)
    assert labels.shape == (60_000, 1) and labels.dtype == torch.bool
    rows = world.index(responses.squeeze(1))
    for i in range(11):
        share = (rows == i).float().mean()
        assert abs(share - world.probs["policy"][i]) < 5 * 0.5 / math.sqrt(60_000)
        found = labels[rows == i].float().flatten()
        expected = oracle.sigmoid((world.rewards[i].item() - 0.5) / 0.25)
        assert abs(found.mean() - expected) < 5 * 0.5 / math.sqrt(len(found))


def test_demonstrator_is_the_tilted_reference_and_samples_are_the_policys(world, monkeypatch):
    log_probs = {name: probs.log() for name, probs in world.probs.items()}

    def response_logprobs(policy, prompts, responses):
        return log_probs[policy][world.index(responses)]

    monkeypatch.setattr(reward_model, "response_logprobs", response_logprobs)
    asked, targets = prompts_and_targets(40_000)
    prompts, candidates, log_weights = reward_model.sample_demonstrations(
        "policy", "reference", asked, targets, 0.25, 3
    )
    assert torch.equal(prompts, asked)
    assert candidates.shape == (40_000, 4, 3)
    tilted = world.probs["reference"] * (world.rewards / 0.25).exp()
    rows = world.index(candidates.flatten(0, 1)).view(40_000, 4)
    for column, exact in enumerate([tilted / tilted.sum(), *[world.probs["policy"]] * 3]):
        shares = torch.bincount(rows[:, column], minlength=11) / 40_000
        assert (shares - exact).abs().max() < 5 * 0.5 / math.sqrt(40_000)
    same = (rows[:, 1] == rows[:, 2]).float().mean()  # the samples are independent
    assert same.item() == pytest.approx((world.probs["policy"] ** 2).sum().item(), abs=0.02)
    expected = (log_probs["reference"] - log_probs["policy"])[rows]
    torch.testing.assert_close(log_weights, expected)


def test_demonstrations_need_rewards_of_at_most_1(monkeypatch, capsys):
    """Rejection sampling would accept too much, and give other demonstrations without a word."""
    gpt = make_gpt(1)
    asked, targets = prompts_and_targets(4)
    monkeypatch.setattr(reward_model, "reward", lambda targets, _: [1.0] * len(targets))
    reward_model.sample_demonstrations(gpt, gpt, asked, targets, 0.5, 2)
    monkeypatch.setattr(reward_model, "reward", lambda *_: [0.5, 0.9, 1.1, 0.9])
    with pytest.raises(SystemExit) as stop:
        reward_model.sample_demonstrations(gpt, gpt, asked, targets, 0.5, 2)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "exceed 1" in error


def test_demonstrations_that_are_never_good_enough_end_with_one_line(monkeypatch, capsys):
    gpt = make_gpt(1)
    asked, targets = prompts_and_targets(2)
    monkeypatch.setattr(reward_model, "generate", lambda *_: torch.zeros(2, 3, dtype=torch.long))
    monkeypatch.setattr(reward_model, "reward", lambda *_: torch.full((2,), -100.0))
    with pytest.raises(SystemExit) as stop:
        reward_model.sample_demonstrations(gpt, gpt, asked, targets, 0.5, 2)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--learn-from demonstrations" in error and "--annotator-temperature" in error


def test_log_weights_of_real_models_and_their_order():
    policy = make_gpt(1)
    reference = make_gpt(2)
    train_prompts, train_targets, _, _ = reward_model.make_prompts("cpu")
    torch.manual_seed(0)
    prompts, candidates, log_weights = reward_model.sample_demonstrations(
        policy, reference, train_prompts[:5], train_targets[:5], 0.5, 2
    )
    for i, j in itertools.product(range(5), range(3)):
        response = real_tokens(candidates[i, j].tolist())
        expected = 0.0
        for t, token in enumerate(response):
            prefix = torch.tensor([[*prompts[i].tolist(), *response[:t]]])
            for gpt, sign in ((reference, 1), (policy, -1)):
                logprobs = gpt.head(gpt(prefix))[0, -1].log_softmax(0)
                expected += sign * logprobs[token].item()
        assert log_weights[i, j].item() == pytest.approx(expected, abs=1e-4)
    own = reward_model.sample_demonstrations(
        reference, reference, train_prompts[:5], train_targets[:5], 0.5, 2
    )
    assert (own[2] == 0).all()
    assert not log_weights.requires_grad


def test_log_probabilities_of_many_responses_are_those_of_each():
    gpt = make_gpt(1)
    prompts = reward_model.make_prompts("cpu")[0][:300]
    torch.manual_seed(0)
    responses = reward_model.generate(gpt, prompts, 1.0)
    found = reward_model.response_logprobs(gpt, prompts, responses)
    assert found.shape == (300,)
    for i in (0, 255, 256, 299):
        alone = reward_model.response_logprobs(gpt, prompts[i, None], responses[i, None])
        assert found[i].item() == pytest.approx(alone.item(), abs=1e-5)
    garbage = torch.where(reward_model.response_mask(responses), responses, 3)
    assert not torch.equal(garbage, responses)
    torch.testing.assert_close(reward_model.response_logprobs(gpt, prompts, garbage), found)


# ---------------------------------------------------------------------------- Reward model
def some_responses():
    prompts = reward_model.make_prompts("cpu")[0][:200]
    torch.manual_seed(0)
    return prompts, reward_model.generate(make_gpt(3), prompts, 1.0)


@torch.no_grad()
def test_normalised_scores_have_mean_0_and_deviation_1_and_the_members_one_scale():
    members = [make_gpt(seed, outputs=1) for seed in range(3)]
    before = [reward_model.response_scores(gpt, *some_responses()) for gpt in members]
    reward_model.normalise(members, *some_responses())
    after = [reward_model.response_scores(gpt, *some_responses()) for gpt in members]
    mean = [sum(values) / 3 for values in zip(*[x.tolist() for x in after], strict=True)]
    assert sum(mean) / 200 == pytest.approx(0, abs=1e-5)
    assert oracle.deviation(mean) == pytest.approx(1, rel=1e-4)
    mean_before = [sum(values) / 3 for values in zip(*[x.tolist() for x in before], strict=True)]
    scale = oracle.deviation(mean_before)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new * scale, old - old.mean(), atol=1e-4, rtol=0)


@torch.no_grad()
def test_constant_scores_are_shifted_and_not_divided_by_0():
    gpt = make_gpt(0, outputs=1)
    gpt.head.weight.zero_()
    gpt.head.bias.fill_(5.0)
    reward_model.normalise([gpt], *some_responses())
    assert (reward_model.response_scores(gpt, *some_responses()) == 0).all()


class TabularScores:
    """Stands in for a RewardModel: the scores of two members in the world of 11 responses."""

    def __init__(self, world):
        self.world = world
        self.table = random_numbers(5, 2, 11)
        self.table[:, 3] = self.table[:, 4]  # equal scores of different responses

    def member_scores(self, prompts, responses):
        constants = torch.tensor([[100.0], [-20.0]]) * prompts[:, 0]
        return self.table[:, self.world.index(responses)] + constants

    def __call__(self, prompts, responses):
        return self.table.mean(0)[self.world.index(responses)]


def test_evaluation_agrees_with_enumeration(world):
    prompts, targets = prompts_and_targets(1500)
    scores = TabularScores(world)
    found = reward_model.evaluate_scores(scores, "policy", prompts, targets, 0.5)
    probs = world.probs["policy"].tolist()
    mean_scores = scores.table.mean(0).tolist()
    rewards = world.rewards.tolist()
    total = accuracy = bayes_accuracy = square = deviation = 0.0
    for i, j in itertools.permutations(range(11), 2):  # pairs of identical responses do not count
        weight = probs[i] * probs[j]
        chance = oracle.sigmoid((rewards[i] - rewards[j]) / 0.5)
        correct = 0.5
        if mean_scores[i] != mean_scores[j]:
            correct = chance if mean_scores[i] > mean_scores[j] else 1 - chance
        total += weight
        accuracy += weight * correct
        square += weight * correct**2
        bayes_accuracy += weight * max(chance, 1 - chance)
        margins = [(member[i] - member[j]).item() for member in scores.table]
        deviation += weight * oracle.deviation(margins)
    assert found["accuracy"] == pytest.approx(accuracy / total, abs=0.006)
    assert found["bayes_accuracy"] == pytest.approx(bayes_accuracy / total, abs=0.006)
    assert found["bayes_accuracy"] > found["accuracy"] + 0.02
    assert found["deviation"] == pytest.approx(deviation / total, abs=0.02)
    variance = square / total - (accuracy / total) ** 2
    number = 1500 * 16 * total
    assert found["accuracy_error"] == pytest.approx(math.sqrt(variance / number), rel=0.03)
    mean_r = sum(p * r for p, r in zip(probs, rewards, strict=True))
    mean_s = sum(p * s for p, s in zip(probs, mean_scores, strict=True))
    rows = list(zip(probs, mean_scores, rewards, strict=True))
    covariance = sum(p * (s - mean_s) * (r - mean_r) for p, s, r in rows)
    variance_s = sum(p * (s - mean_s) ** 2 for p, s, _ in rows)
    variance_r = sum(p * (r - mean_r) ** 2 for p, _, r in rows)
    expected = covariance / math.sqrt(variance_s * variance_r)
    assert found["correlation"] == pytest.approx(expected, abs=0.03)


def test_the_true_reward_reaches_the_bayes_accuracy(world):
    prompts, targets = prompts_and_targets(300)

    class TrueReward(TabularScores):
        def __call__(self, prompts, responses):
            return self.world.reward(targets[0], responses)

    found = reward_model.evaluate_scores(TrueReward(world), "policy", prompts, targets, 0.5)
    assert found["accuracy"] == pytest.approx(found["bayes_accuracy"])
    assert found["correlation"] == pytest.approx(1, abs=1e-5)


def test_a_reward_that_is_always_the_same_divides_nothing_by_0(world, monkeypatch):
    monkeypatch.setattr(reward_model, "reward", lambda targets, responses: torch.ones(len(targets)))
    prompts, targets = prompts_and_targets(50)
    found = reward_model.evaluate_scores(TabularScores(world), "policy", prompts, targets, 0.5)
    assert all(math.isfinite(value) for value in found.values())
    assert found["accuracy"] == found["bayes_accuracy"] == 0.5


# ---------------------------------------------------------------------------- A person judges
class Terminal:
    """The real command with a pseudo-terminal as its controlling one."""

    def __init__(self, folder, *words):
        command = [sys.executable, str(programs.ROOT / "reward_model.py"), "--sft-steps", "0"]
        command += ["--preferences", "mine.jsonl", "--annotate", *words]
        self.fd, other = pty.openpty()
        take = "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        take = f"signal.signal(signal.SIGINT, signal.SIG_DFL); {take}"  # a shell's & ignores it
        take = [sys.executable, "-c", f"import fcntl, os, signal, sys, termios; {take}"]
        ends = {"stdin": other, "stdout": other, "stderr": other, "start_new_session": True}
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*take, *command], cwd=folder, env=env, **ends)
        os.close(other)
        self.screen = ""

    def wait_for(self, text, seconds=120):
        """Read until a text shows; what came since the last one."""
        end = time.time() + seconds
        while text not in self.screen:
            assert select.select([self.fd], [], [], max(0, end - time.time()))[0], self.screen
            try:
                self.screen += os.read(self.fd, 4096).decode()
            except OSError:  # it has ended
                break
        assert text in self.screen, self.screen
        before, self.screen = self.screen.split(text, 1)
        return before

    def answer(self, keys):
        shown = self.wait_for("to quit: ")
        os.write(self.fd, keys.encode())
        return shown

    def end(self):
        self.wait_for("Learn: python reward_model.py")
        code = self.process.wait(60)
        with contextlib.suppress(OSError):  # it has ended
            while select.select([self.fd], [], [], 0)[0]:
                self.screen += os.read(self.fd, 4096).decode()
        os.close(self.fd)
        return code


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def shown_pair(screen):
    """Prompt, A and B of the question asked last, as in the file."""
    prompt, a, b = re.findall(r"\] (\d+) +A: (\S+) +B: (\S+)", screen)[-1]
    a, b = (text.replace("(nothing)", "").replace("...", "") for text in (a, b))
    return prompt, a, b


def test_annotation_in_a_terminal(tmp_path):
    terminal = Terminal(tmp_path, "6")
    first = shown_pair(terminal.answer("x\n"))
    terminal.answer("\n")
    terminal.answer("ab\n")
    terminal.answer("A\n")
    second = shown_pair(terminal.answer("b\n"))
    third = shown_pair(terminal.answer("t\n"))
    terminal.wait_for("to quit: ")
    expected = [
        {"prompt": first[0], "chosen": first[1], "rejected": first[2]},
        {"prompt": second[0], "chosen": second[2], "rejected": second[1]},
        {"prompt": third[0], "chosen": third[1], "rejected": third[2], "tie": True},
    ]
    assert read_lines(tmp_path / "mine.jsonl") == expected  # while the fourth is on the screen
    time.sleep(0.5)  # until it reads: input() sleeps on if a signal comes just before
    os.write(terminal.fd, b"\x03")  # Ctrl-C
    assert terminal.end() == 0
    assert "Traceback" not in terminal.screen
    assert read_lines(tmp_path / "mine.jsonl") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"mine.jsonl"}


DEFAULTS = {"num_examples": reward_model.Args.num_examples, "epochs": reward_model.Args.epochs}
DEFAULTS["minibatch_size"] = reward_model.Args.minibatch_size
MINE = {"preferences": Path("mine.jsonl"), "sft_steps": 0} | DEFAULTS


def judge(monkeypatch, keys, number, **flags):
    """Answer the questions of --annotate with these keys, then close the input."""
    keys = iter(keys)

    def answer(question):
        try:
            return next(keys)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    assert run(annotate=number, **MINE | flags) == {}


def test_annotation_goes_on_where_it_stopped_with_other_pairs(monkeypatch, capsys):
    judge(monkeypatch, ["a", "b"], 6)
    capsys.readouterr()
    judge(monkeypatch, [" A ", "q", "a"], 6)
    shown = capsys.readouterr().out
    assert "2 of 6" in shown
    assert "[3]" in shown
    judge(monkeypatch, "aaaaa", 6)
    lines = read_lines("mine.jsonl")
    assert len(lines) == 6  # as many as asked for: it ended by itself
    assert len({json.dumps(line) for line in lines}) == 6
    train_prompts = reward_model.make_prompts("cpu")[0].tolist()
    assert all(list(map(int, line["prompt"])) in train_prompts for line in lines)
    judge(monkeypatch, "a", 6)
    assert len(read_lines("mine.jsonl")) == 6  # nothing is left to ask


def test_what_the_judge_is_shown(monkeypatch, capsys):
    pairs = [[[7, 3, EOS], [1, 1, EOS]], [[1, 1, EOS], [1, 1, EOS]], [[EOS] * 3, [1, 2, 3]]]
    monkeypatch.setattr(reward_model, "generate", lambda *_: torch.tensor(pairs.pop(0)))
    monkeypatch.setattr("builtins.input", lambda question: "b")
    reward_model.annotate(None, torch.tensor([PROMPT]), Path("mine.jsonl"), 2)
    assert pairs == []  # the identical pair was not shown
    shown = re.findall(r"\[(\d)\] (\S+) +A: (\S+) +B: (\S+)", capsys.readouterr().out)
    assert shown == [("1", "433", "73", "11"), ("2", "433", "(nothing)", "123...")]
    lines = read_lines("mine.jsonl")
    assert lines[0] == {"prompt": "433", "chosen": "11", "rejected": "73"}
    assert lines[1] == {"prompt": "433", "chosen": "123", "rejected": ""}


def test_both_responses_shown_belong_to_the_prompt_and_are_the_policys(monkeypatch):
    calls = programs.spy(monkeypatch, reward_model, "generate")
    judge(monkeypatch, "aaa", 3)
    for (_, prompts, temperature), _, _ in calls:
        assert prompts.shape == (2, 3)
        assert prompts[0].tolist() == prompts[1].tolist()
        assert temperature == 1.0


@pytest.mark.parametrize("start", [GOOD, GOOD + "\n", "\ufeff" + GOOD + "\n\n"])
def test_a_last_line_without_an_end_is_ended_before_the_next(start, monkeypatch, capsys):
    Path("mine.jsonl").write_text(start)
    judge(monkeypatch, "ab", 3)
    assert "1 of 3" in capsys.readouterr().out
    content = Path("mine.jsonl").read_text("utf-8-sig")
    lines = [json.loads(line) for line in content.split("\n") if line]
    assert len(lines) == 3
    assert lines[0] == json.loads(GOOD)


def test_a_line_of_blanks_is_no_pair(monkeypatch, capsys):
    Path("mine.jsonl").write_text(GOOD + "\n \n")
    judge(monkeypatch, "q", 3)
    assert "1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"hello\n", b"\xff\xfe\x00", b"[1]\n"])
def test_a_file_that_holds_something_else_is_not_added_to(content, monkeypatch, capsys):
    Path("mine.jsonl").write_bytes(content)
    check_refused(capsys, "preferences", annotate=3, **MINE)
    assert Path("mine.jsonl").read_bytes() == content


def test_judging_names_the_line_that_is_bad(capsys):
    Path("mine.jsonl").write_text(GOOD + "\n\n" + GOOD[:-1] + "\n")
    with pytest.raises(SystemExit):
        run(annotate=3, **MINE)
    error = capsys.readouterr().err
    assert error == "error: --preferences mine.jsonl: line 3: is not JSON\n"


def test_a_read_only_file_is_refused_in_one_line(monkeypatch, capsys):
    Path("mine.jsonl").write_text(GOOD + "\n")
    path_open = Path.open

    def read_only(path, mode="r", *args, **more):
        if "a" in mode or "w" in mode or "+" in mode:
            raise PermissionError("read-only")
        return path_open(path, mode, *args, **more)

    monkeypatch.setattr(Path, "open", read_only)
    check_refused(capsys, "preferences", annotate=3, **MINE)
    assert Path("mine.jsonl").read_text() == GOOD + "\n"


@pytest.mark.parametrize("path", [".", "missing/mine.jsonl"])
def test_a_place_where_no_file_can_be_is_refused(path, capsys, tmp_path):
    check_refused(capsys, "preferences", annotate=3, **MINE | {"preferences": Path(path)})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- The program
@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    words = "--num-examples 64 --sft-steps 5 --epochs 1 --ensemble-size 2 --uncertainty-coef 0.5"
    folder = tmp_path_factory.mktemp("program")
    yield from programs.start(f"reward_model.py {words} --save-path rm.pt", folder)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, reward_model, ppo, grpo, held_out=8)


def run(**flags):
    """Learn from 64 examples in minibatches of 16 unless told otherwise."""
    defaults = {"num_examples": 64, "epochs": 1, "minibatch_size": 16, "sft_steps": 20}
    return reward_model.main(reward_model.Args(**defaults | {"tensorboard": False} | flags))


def check_refused(capsys, flag, **flags):
    """main() ends with status 2 and one line on stderr that names the flag."""
    with pytest.raises(SystemExit) as stop:
        run(**flags)
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--" + flag.replace("_", "-") in error


LEARN_FROM = ["preferences", "labels", "demonstrations"]
SAMPLERS = {"labels": "sample_labels", "preferences": "sample_comparisons"}
SAMPLERS["demonstrations"] = "sample_demonstrations"
LOSSES = {"labels": "label_loss", "preferences": "preference_loss"}
LOSSES["demonstrations"] = "demonstration_loss"
CODE = torch.tensor([1.0, 11.0, 121.0])


def code(prompts, responses):
    """A number that says which prompt and which response this is. Exact in float32."""
    return (prompts * CODE).sum(-1) + 1331 * (responses * CODE).sum(-1)


def coded_rows(examples):
    """What the loss should get for each example, as tuples."""
    prompts, responses, feedback = examples
    scores = code(prompts[:, None], responses)
    return [tuple(row) for row in torch.cat([scores, feedback.float().flatten(1)], 1).tolist()]


def record_training(monkeypatch, kind):
    """Record the examples of a run, and the rows that its loss function gets at each step."""
    examples = programs.spy(monkeypatch, reward_model, SAMPLERS[kind])
    batches = []
    loss_function = getattr(reward_model, LOSSES[kind])

    def coded_scores(gpt, prompts, responses):
        return code(prompts, responses) + 0 * gpt.head.bias

    def noted_loss(*columns):
        rows = torch.cat([column.detach().float().view(len(column), -1) for column in columns], 1)
        batches.append([tuple(row) for row in rows.tolist()])
        return loss_function(*columns)

    monkeypatch.setattr(reward_model, "response_scores", coded_scores)
    monkeypatch.setattr(reward_model, LOSSES[kind], noted_loss)
    return examples, batches


@pytest.mark.parametrize("kind", LEARN_FROM)
def test_every_epoch_reads_every_example_once_in_another_order(kind, monkeypatch):
    examples, batches = record_training(monkeypatch, kind)
    extra = {} if kind == "labels" else {"num_samples": 2}
    run(learn_from=kind, num_examples=50, epochs=3, minibatch_size=16, **extra)
    ((_, sampled, _),) = examples
    expected = coded_rows(sampled)
    per_epoch = math.ceil(len(expected) / 16)
    assert len(batches) == 3 * per_epoch
    orders = []
    for epoch in range(3):
        parts = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert [len(part) for part in parts[:-1]] == [16] * (per_epoch - 1)
        rows = [row for part in parts for row in part]
        assert sorted(rows) == sorted(expected)
        orders.append(tuple(rows))
    assert len({*orders, tuple(expected)}) == 4


def test_members_learn_from_bootstrap_samples(monkeypatch):
    examples, batches = record_training(monkeypatch, "labels")
    run(learn_from="labels", num_examples=64, epochs=2, minibatch_size=64, ensemble_size=2)
    ((_, sampled, _),) = examples
    known = set(coded_rows(sampled))
    first, again, second, _ = [sorted(batch) for batch in batches]
    assert len(first) == len(second) == 64  # as many, drawn with replacement
    assert first == again  # the same sample in each epoch
    assert first != second
    for batch in (first, second):
        assert set(batch) <= known
        assert len(set(batch)) < 0.85 * len(known)


def test_training_prompts_are_asked_at_random_with_their_own_targets(monkeypatch):
    calls = programs.record(monkeypatch, reward_model, "sample_comparisons")
    run(num_examples=300, annotator_temperature=0.3, num_samples=5)
    (call,) = calls["sample_comparisons"]
    train_prompts = set(map(tuple, reward_model.make_prompts("cpu")[0].tolist()))
    prompts = [tuple(prompt) for prompt in call["prompts"].tolist()]
    assert len(prompts) == 300
    assert set(prompts) <= train_prompts
    assert len(set(prompts)) > 200
    assert torch.equal(call["targets"], 20 - call["prompts"].sum(1))
    assert call["annotator_temperature"] == 0.3
    assert call["num_samples"] == 5


def record_optimizer(monkeypatch):
    """Let AdamW note its settings, and its learning rate and the gradient's norm at each step."""
    steps = []
    made = []

    class Noting(torch.optim.AdamW):
        def __init__(self, parameters, **settings):
            super().__init__(parameters, **settings)
            made.append(settings)

        def step(self):
            (group,) = self.param_groups
            gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
            steps.append((group["lr"], torch.cat(gradients).norm().item()))
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    return made, steps


def test_the_rate_rises_to_its_peak_and_falls_and_stays_above_0(monkeypatch):
    """Also when the minibatch does not divide the examples."""
    made, steps = record_optimizer(monkeypatch)
    flags = {"learn_from": "labels", "num_examples": 50, "minibatch_size": 16, "sft_steps": 0}
    run(**flags, epochs=10, learning_rate=3e-4, ensemble_size=2, weight_decay=0.3)
    num_steps = 10 * 4
    rates = [rate for rate, _ in steps]
    assert len(rates) == 2 * num_steps
    expected = [3e-4 * min(k / 4, (num_steps - k + 1) / (num_steps - 3)) for k in range(1, 41)]
    assert rates[:40] == pytest.approx(expected)
    assert rates[40:] == pytest.approx(expected)  # anew for each member
    assert max(rates) == 3e-4
    assert min(rates) > 0
    assert [settings["weight_decay"] for settings in made] == [0.3, 0.3]
    assert [settings["betas"] for settings in made] == [(0.9, 0.99), (0.9, 0.99)]


def test_gradients_are_clipped_to_the_flag(monkeypatch):
    _, steps = record_optimizer(monkeypatch)
    run(max_grad_norm=0.01, sft_steps=0)
    assert [norm for _, norm in steps] == pytest.approx([0.01] * len(steps), rel=1e-3)


def test_members_start_from_the_reference_with_a_head_of_their_own(monkeypatch):
    states = []
    normalise = reward_model.normalise
    train_prompts = {tuple(prompt) for prompt in reward_model.make_prompts("cpu")[0].tolist()}

    def noted(members, prompts, responses):
        states.extend(copy.deepcopy(gpt.state_dict()) for gpt in members)
        assert {tuple(prompt) for prompt in prompts.tolist()} <= train_prompts
        return normalise(members, prompts, responses)

    monkeypatch.setattr(reward_model, "normalise", noted)
    flags = FROM_POLICY | {"policy": save_policy("policy.pt")}  # another policy than the reference
    run(ensemble_size=2, learning_rate=1e-9, save_path=Path("rm.pt"), **flags)
    reference = torch.load("rm.pt", weights_only=True)["reference"]
    for state in states:
        for name in reference:
            if not name.startswith("head"):
                torch.testing.assert_close(state[name], reference[name], atol=1e-5, rtol=0)
    assert states[0]["head.weight"].shape == (1, 64)
    assert (states[0]["head.weight"] - states[1]["head.weight"]).abs().max() > 0.01


def test_curves_are_means_over_the_steps_since_the_last_log(monkeypatch):
    curves = programs.record_curves(monkeypatch, reward_model)
    losses = programs.spy(monkeypatch, reward_model, "label_loss")
    run(
        learn_from="labels",
        num_examples=41 * 4,
        minibatch_size=4,
        ensemble_size=2,
        learning_rate=1e-4,
        tensorboard=True,
    )
    values = [(loss.item(), accuracy.item()) for _, (loss, accuracy), _ in losses]
    assert len(values) == 82
    edges = [*range(0, 41, 4), 41, *range(45, 82, 4), 82]  # every fourth step, and each last one
    expected = [values[a:b] for a, b in itertools.pairwise(edges)]
    for place, name in enumerate(["loss", "accuracy"]):
        means = [sum(row[place] for row in part) / len(part) for part in expected]
        assert programs.values(curves[f"losses/{name}"]) == pytest.approx(means, abs=1e-5)
    steps = [step for step, _ in curves["losses/loss"]]
    assert steps == [4 * edge for edge in edges[1:]]
    assert len(curves["losses/grad_norm"]) == len(edges) - 1
    rates = programs.values(curves["charts/learning_rate"])
    assert max(rates) == pytest.approx(1e-4)
    assert rates[-1] == pytest.approx(1e-4 / 38)
    assert {"charts/examples_per_second", "eval/accuracy", "eval/correlation"} <= set(curves)


def test_progress_says_how_much_time_is_left(monkeypatch, capsys):
    programs.tick(monkeypatch, reward_model)
    run(learn_from="labels", ensemble_size=2)
    lines = capsys.readouterr().out.splitlines()[1:-1]
    found = [re.search(r"example +(\d+) .* ([\d.]+) examples/s  (\d+) s left", x) for x in lines]
    rows = [[float(x) for x in match.groups()] for match in found]
    assert [row[0] for row in rows] == list(range(16, 129, 16))
    for number, (seen, speed, left) in enumerate(rows, start=1):  # the clock adds one per reading
        assert speed == pytest.approx(seen / number, abs=0.06)
        assert left == round(number * (128 - seen) / seen)


# ---------------------------------------------------------------------------- Files
def save_policy(path, **changes):
    saved = {"policy": make_gpt(4).state_dict(), "reference": make_gpt(5).state_dict()}
    torch.save({"args": {}} | saved | changes, path)
    return Path(path)


def is_gpt(gpt, seed):
    return torch.equal(gpt.head.weight, make_gpt(seed).head.weight)


FROM_POLICY = {"sft_steps": reward_model.Args.sft_steps}


@pytest.mark.parametrize("kind", LEARN_FROM)
def test_a_saved_policy_is_judged_and_its_reference_is_the_reference(kind, monkeypatch):
    path = save_policy("policy.pt")
    sampled = programs.record(monkeypatch, reward_model, SAMPLERS[kind])[SAMPLERS[kind]]
    calls = programs.record(monkeypatch, reward_model, "evaluate_scores", "normalise", "generate")
    run(policy=path, learn_from=kind, save_path=Path("rm.pt"), **FROM_POLICY)
    assert is_gpt(sampled[0]["policy"], 4)
    if kind == "demonstrations":
        assert is_gpt(sampled[0]["reference"], 5)
    assert is_gpt(calls["evaluate_scores"][0]["policy"], 4)
    (normalised,) = calls["normalise"]
    assert normalised["responses"].shape == (1024, 3)
    samples = [call for call in calls["generate"] if len(call["prompts"]) == 1024]
    assert len(samples) == 1
    assert is_gpt(samples[0]["policy"], 5)  # scores are normalised on the reference's samples
    assert torch.equal(samples[0]["prompts"], normalised["prompts"])
    saved = torch.load("rm.pt", weights_only=True)["reference"]
    assert torch.equal(saved["head.weight"], make_gpt(5).head.weight)


def test_evaluation_is_on_held_out_prompts_with_the_penalised_score(monkeypatch):
    calls = programs.record(monkeypatch, reward_model, "evaluate_scores")["evaluate_scores"]
    curves = programs.record_curves(monkeypatch, reward_model)
    flags = {"ensemble_size": 2, "uncertainty_coef": 0.7, "annotator_temperature": 0.3}
    result = run(tensorboard=True, **flags)
    (call,) = calls
    _, _, test_prompts, test_targets = reward_model.make_prompts("cpu")
    assert torch.equal(call["prompts"], test_prompts)
    assert torch.equal(call["targets"], test_targets)
    assert call["annotator_temperature"] == 0.3
    assert call["reward_model"].uncertainty_coef == 0.7
    for name, value in result.items():
        assert programs.values(curves[f"eval/{name}"]) == [pytest.approx(value)]
    own_reference = call["reward_model"].reference.state_dict()  # its samples centre the scores
    for name, weight in call["policy"].state_dict().items():
        assert torch.equal(own_reference[name], weight)
    assert not any(p.requires_grad for p in call["reward_model"].parameters())
    assert result.keys() == {
        "accuracy",
        "accuracy_error",
        "bayes_accuracy",
        "correlation",
        "deviation",
    }


def test_a_policy_that_always_says_the_same_is_judged_by_labels():
    """No two of its responses differ, so no pair can be counted; the reward model is saved."""
    policy = make_gpt(4)
    policy.head.bias.data[3] = 1e4
    weights = {"policy": policy.state_dict(), "reference": make_gpt(5).state_dict()}
    torch.save(weights, "policy.pt")
    flags = FROM_POLICY | {"policy": Path("policy.pt"), "save_path": Path("rm.pt")}
    result = run(learn_from="labels", **flags)
    assert math.isnan(result["accuracy"]) and Path("rm.pt").exists()


def test_without_a_saved_policy_the_reference_is_judged(monkeypatch):
    calls = programs.record(monkeypatch, reward_model, "sample_demonstrations", "evaluate_scores")
    run(learn_from="demonstrations", num_samples=5)
    (sampled,) = calls["sample_demonstrations"]
    assert sampled["policy"] is sampled["reference"]
    assert sampled["num_samples"] == 5
    assert calls["evaluate_scores"][0]["policy"] is sampled["reference"]
    assert not any(p.requires_grad for p in sampled["reference"].parameters())


def test_a_person_can_judge_a_saved_policy(monkeypatch):
    path = save_policy("policy.pt")
    calls = programs.record(monkeypatch, reward_model, "annotate")["annotate"]
    judge(monkeypatch, "a", 1, policy=path, **FROM_POLICY)
    assert is_gpt(calls[0]["policy"], 4)


class Malicious:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def wrong_policy_files():
    good = save_policy("good.pt").read_bytes()
    Path("good.pt").unlink()
    nan = make_gpt(4).state_dict()
    nan["embed.weight"][9, 0] = math.nan
    infinite = make_gpt(5).state_dict()
    infinite["head.bias"][3] = math.inf
    Path("truncated.pt").write_bytes(good[: len(good) // 2])
    Path("text.pt").write_bytes(b"hello")
    Path("empty.pt").write_bytes(b"")
    save_policy("nan.pt", policy=nan)
    save_policy("infinite.pt", reference=infinite)
    save_policy("shape.pt", policy=make_gpt(4, outputs=1).state_dict())
    save_policy("malicious.pt", args=Malicious())
    torch.save({"policy": make_gpt(4).state_dict()}, "no_reference.pt")
    torch.save(make_gpt(4).state_dict(), "bare.pt")
    return sorted(path.name for path in Path().glob("*.pt"))


def test_wrong_policy_files_are_refused_in_one_line_and_nothing_is_run(capsys, tmp_path):
    names = wrong_policy_files()
    assert len(names) == 9
    for name in [*names, "missing.pt", "."]:
        check_refused(capsys, "policy", policy=Path(name), **FROM_POLICY)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("script", [ppo, grpo], ids=["ppo", "grpo"])
@pytest.mark.parametrize("ensemble_size", [1, 2])
def test_the_saved_file_is_loaded_by_the_scripts_that_train_a_policy(script, ensemble_size):
    run(ensemble_size=ensemble_size, save_path=Path("rm.pt"))
    saved = torch.load("rm.pt", weights_only=True)
    assert saved.keys() == {"args", "members", "reference", "uncertainty_coef"}
    assert len(saved["members"]) == ensemble_size
    loaded = script.load_reward_model("rm.pt", "cpu")
    prompts, responses = some_responses()
    scores = []
    for weights in saved["members"]:
        gpt = reward_model.GPT(outputs=1)
        gpt.load_state_dict(weights)
        scores.append(reward_model.response_scores(gpt, prompts, responses).detach())
    torch.testing.assert_close(loaded(prompts, responses), sum(scores) / ensemble_size)


def test_saved_scores_are_normalised_on_the_references_samples():
    run(save_path=Path("rm.pt"), learn_from="labels", ensemble_size=2)
    loaded = ppo.load_reward_model("rm.pt", "cpu")
    prompts = reward_model.make_prompts("cpu")[0].repeat(4, 1)
    torch.manual_seed(9)
    scores = loaded(prompts, reward_model.generate(loaded.reference, prompts, 1.0))
    assert scores.mean().item() == pytest.approx(0, abs=0.15)
    assert scores.std().item() == pytest.approx(1, abs=0.1)


def test_program_and_pipeline(program):
    """Learn and save by the real command; ppo.py loads the file and trains on it."""
    folder, printed = program()
    header, *progress, ending = printed.splitlines()
    date = r"\d{4}-\d{2}-\d{2}-\d{6}-\d{6}"
    assert re.match(rf"reward_model__1__{date}: ", header)
    number = r"-?\d+\.\d{3}"
    form = rf"example +\d+  loss {number}  accuracy {number}  [\d,.]+ examples/s  \d+ s left"
    for line in progress:
        assert re.fullmatch(form, line), line
    assert re.match(rf"held-out pair accuracy {number} ± {number}  Bayes accuracy {number}", ending)
    assert {path.name for path in folder.iterdir()} == {"runs", "rm.pt"}
    saved = torch.load(folder / "rm.pt", weights_only=True)
    assert saved["args"]["num_examples"] == "64"
    assert saved["uncertainty_coef"] == 0.5
    (events,) = (folder / "runs").iterdir()
    assert re.fullmatch(rf"reward_model__1__{date}", events.name)
    programs.check_hyperparameters(events, reward_model.Args(), num_examples="64", seed="1")
    flags = {"sft_steps": 5, "batch_size": 64, "total_episodes": 64, "tensorboard": False}
    result = ppo.main(ppo.Args(reward_model=folder / "rm.pt", **flags))
    assert all(math.isfinite(value) for value in result.values())


# ---------------------------------------------------------------------------- Preference files
FROM_FILE = {"preferences": Path("pairs.jsonl"), "num_examples": DEFAULTS["num_examples"]}


def write_pairs(prompts, line=GOOD):
    lines = [line.replace("433", "".join(map(str, prompt))) for prompt in prompts]
    Path("pairs.jsonl").write_text("\n".join(lines))


def test_pairs_of_a_file_are_learned_from_but_not_those_of_held_out_prompts(monkeypatch, capsys):
    train_prompts, _, test_prompts, _ = reward_model.make_prompts("cpu")
    write_pairs([*train_prompts[:6].tolist(), *test_prompts[:3].tolist()], TIE)
    with Path("pairs.jsonl").open("a") as file:
        file.write("\n" + GOOD)  # 433 is a training prompt
    losses = programs.spy(monkeypatch, reward_model, "preference_loss")
    run(**FROM_FILE)
    ((scores, wins), _, _) = losses[0]
    assert len(losses) == 1
    assert scores.shape == (7, 2)
    assert sorted(wins.tolist()) == [[[0, 0.5], [0.5, 0]]] * 6 + [[[0, 1], [0, 0]]]
    assert "3 with held-out prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        GOOD + "\n[1]\n",
        (GOOD.replace("11", "73") + "\n") * 4,  # nothing but identical responses
        GOOD.replace("433", "43"),
    ],
)
def test_files_with_nothing_to_learn_from_are_refused(content, capsys, tmp_path):
    if content is not None:
        Path("pairs.jsonl").write_text(content)
    check_refused(capsys, "preferences", **FROM_FILE)
    assert {path.name for path in tmp_path.iterdir()} <= {"pairs.jsonl"}


def test_nothing_but_ties_is_refused(capsys, tmp_path):
    """The scores would be noise, which normalisation would scale up to a deviation of 1."""
    Path("pairs.jsonl").write_text((TIE + "\n") * 4)
    with pytest.raises(SystemExit) as stop:
        run(**FROM_FILE)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "no response is preferred to another" in error
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_policy_that_always_writes_the_same_is_refused(monkeypatch, capsys):
    def same(policy, prompts, temperature):
        return torch.tensor([[1, 2, EOS]]).repeat(len(prompts), 1)

    monkeypatch.setattr(reward_model, "generate", same)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    assert "no response is preferred to another" in capsys.readouterr().err


# ---------------------------------------------------------------------------- Flags
def outcomes():
    """What comes out and the losses, by flags. The reference succeeds half of the time."""
    save_policy("policy.pt")
    choices = [
        {},
        {},
        {"learn_from": "labels"},
        {"learn_from": "demonstrations"},
        {"learn_from": "demonstrations", "num_samples": 2},
        {"num_examples": 32},
        {"epochs": 3},
        {"minibatch_size": 8},
        {"ensemble_size": 2},
        {"ensemble_size": 2, "uncertainty_coef": 1.0},
        {"annotator_temperature": 0.01},
        {"weight_decay": 100.0},
        {"learning_rate": 1e-4},
        {"max_grad_norm": 0.001},
        {"sft_steps": 0},
        {"policy": Path("policy.pt"), **FROM_POLICY},
        {"num_samples": 2},
        {"seed": 2, "sft_steps": 0},
    ]

    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        programs.shorten_runs(monkeypatch, Path.cwd(), reward_model, held_out=8)
        for flags in choices:
            curves = programs.record_curves(monkeypatch, reward_model)
            result = run(**{"sft_steps": 100, "num_examples": 128, "tensorboard": True} | flags)
            found.append((result, programs.values(curves["losses/loss"])))
    return found


@programs.beside(outcomes)
def test_same_seed_same_result_and_every_flag_changes_it(found):
    again, *others = found
    assert again == others[0]
    assert len({str(outcome) for outcome in others}) == len(others)
    results = [result for result, _ in others]
    assert all(math.isfinite(value) for result in results for value in result.values())
    assert results[0]["deviation"] == 0 < results[7]["deviation"]


def test_values_at_the_border_are_taken():
    reward_model.check_args(
        reward_model.Args(seed=0, sft_steps=0, num_examples=1, epochs=1, minibatch_size=1)
    )
    reward_model.check_args(
        reward_model.Args(seed=2**63 - 1, weight_decay=0.0, ensemble_size=2, uncertainty_coef=0.0)
    )
    reward_model.check_args(reward_model.Args(learn_from="demonstrations", num_samples=1))
    reward_model.check_args(reward_model.Args(num_samples=2))
    reward_model.check_args(reward_model.Args(annotate=1, preferences=Path("new.jsonl")))


NAN = float("nan")
BAD = [
    ("seed", {"seed": -1}),
    ("sft_steps", {"sft_steps": -1}),
    ("num_examples", {"num_examples": 0}),
    ("num_samples", {"num_samples": 0, "learn_from": "demonstrations"}),
    ("num_samples", {"num_samples": 1}),
    ("annotator_temperature", {"annotator_temperature": 0.0}),
    ("annotator_temperature", {"annotator_temperature": float("inf")}),
    ("epochs", {"epochs": 0}),
    ("minibatch_size", {"minibatch_size": 0}),
    ("learning_rate", {"learning_rate": 0.0}),
    ("learning_rate", {"learning_rate": NAN}),
    ("max_grad_norm", {"max_grad_norm": 0.0}),
    ("weight_decay", {"weight_decay": -1.0}),
    ("weight_decay", {"weight_decay": NAN}),
    ("ensemble_size", {"ensemble_size": 0}),
    ("uncertainty_coef", {"uncertainty_coef": -1.0, "ensemble_size": 2}),
    ("uncertainty_coef", {"uncertainty_coef": NAN, "ensemble_size": 2}),
    ("annotate", {"annotate": 3}),
    ("annotate", {"annotate": 0, **MINE}),
    # Flags that would not be read.
    ("uncertainty_coef", {"uncertainty_coef": 1.0}),
    ("num_samples", {"num_samples": 5, "learn_from": "labels"}),
    ("num_samples", {**FROM_FILE, "num_samples": 5}),
    ("sft_steps", {"policy": Path("policy.pt"), "sft_steps": 20}),
    ("num_examples", {"preferences": Path("pairs.jsonl"), "num_examples": 64}),
    ("learn_from", {**FROM_FILE, "learn_from": "labels"}),
    ("save_path", {"annotate": 3, **MINE, "save_path": Path("rm.pt")}),
    ("annotator_temperature", {"annotate": 3, **MINE, "annotator_temperature": 0.3}),
    ("epochs", {"annotate": 3, **MINE, "epochs": 1}),
    ("minibatch_size", {"annotate": 3, **MINE, "minibatch_size": 1}),
    ("learning_rate", {"annotate": 3, **MINE, "learning_rate": 0.1}),
    ("max_grad_norm", {"annotate": 3, **MINE, "max_grad_norm": 0.1}),
    ("weight_decay", {"annotate": 3, **MINE, "weight_decay": 0.1}),
    ("ensemble_size", {"annotate": 3, **MINE, "ensemble_size": 2}),
    ("num_examples", {"annotate": 3, **MINE, "num_examples": 64}),
    ("learn_from", {"annotate": 3, **MINE, "learn_from": "labels"}),
]


@pytest.mark.parametrize("flag, flags", BAD)
def test_bad_values_end_with_one_line_and_nothing_written(flag, flags, capsys, tmp_path):
    check_refused(capsys, flag, **{"tensorboard": True} | flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["--learn-from", "nothing"], ["--group-size", "8"], ["--annotate", "x"]]
)
def test_bad_words_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(reward_model.Args, args=words)
    assert stop.value.code == 2


def test_a_step_that_is_not_finite_stops_the_run_and_saves_nothing(monkeypatch, tmp_path, capsys):
    def broken(scores, labels):
        return (scores * math.inf).sum(), scores.mean().detach()

    monkeypatch.setattr(reward_model, "label_loss", broken)
    with pytest.raises(SystemExit) as stop:
        run(learn_from="labels", save_path=Path("rm.pt"))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "step 1" in error and "--learning-rate" in error
    assert list(tmp_path.iterdir()) == []


def easy(targets, responses):
    """Is the first digit above 4?"""
    return ((responses[:, 0] > 4) & (responses[:, 0] != EOS)).float()


def learn_an_easy_reward(kind):
    flags = {"num_examples": 2048, "minibatch_size": 16}
    if kind == "labels":  # one response per example: slower
        flags = {"num_examples": 4096, "minibatch_size": 16, "epochs": 2}
    if kind == "demonstrations":
        flags = {"num_examples": 1024, "num_samples": 3}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(reward_model, "reward", easy)
        monkeypatch.setattr(reward_model, "sft", programs.remember_sft(reward_model))
        return run(learn_from=kind, annotator_temperature=0.25, **flags)


KINDS = [
    pytest.param(kind, marks=programs.beside(learn_an_easy_reward, kind)) for kind in LEARN_FROM
]


@pytest.mark.parametrize("kind", KINDS)
def test_learning_finds_an_easy_reward(kind, found):
    """Feedback of each kind teaches it in a few steps."""
    assert found["accuracy"] > found["bayes_accuracy"] - 0.02
    assert found["correlation"] > 0.7  # scores may have a constant per prompt
