"""digits_sum20.py against float64 loops and enumerations that share no code with it."""

import contextlib
import io
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
import torch
import torch.nn.functional as F
import tyro

import digits_sum20 as digits

REWARDS = {  # of one sum, in plain Python
    "exact": lambda total: float(total == 20),
    "distance": lambda total: max(0.0, 1 - abs(total - 20) / 10),
    "sharp": lambda total: math.exp(-abs(total - 20) / 2),
    "square": lambda total: 1 - ((total - 20) / 10) ** 2,
}


@pytest.fixture(scope="module", autouse=True)
def three_runs(tmp_path_factory):
    words = "--no-tensorboard --method rl --epochs 20 --num-seeds 3"
    yield from programs.start(f"digits_sum20.py {words}", tmp_path_factory.mktemp("program"))


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    """Tests run in an empty folder and leave the number of threads as it was."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def answers_to(prompt):
    """The right answers to a prompt, as numbers from 0 to 99."""
    return [a for a in range(100) if sum(prompt) + a // 10 + a % 10 == 20]


def some_prompts():
    """Five prompts with 1, 10, 6, 2 and 9 right answers, and logits for them in float64."""
    prompts = [[9, 9, 2], [3, 5, 3], [9, 3, 3], [1, 2, 0], [0, 6, 4]]
    assert [len(answers_to(prompt)) for prompt in prompts] == [1, 10, 6, 2, 9]
    logits = torch.randn(5, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return prompts, logits.requires_grad_()


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def rl_loss(logits, *samples):
    logprobs = logits.log_softmax(1)
    credit = digits.rl_credit(logits.detach(), logprobs.detach().exp(), *samples)
    return -(credit * logprobs).sum()


def flags(method, **given):
    return digits.Args(method=method, tensorboard=False, **given)


def results(method, epochs, seed=1, **given):
    means = digits.main(flags(method, epochs=epochs, seed=seed, **given))
    return {name.removeprefix(method + "/"): value for name, value in means.items()}


def trained(method, epochs=20, **given):
    """Weights after a few epochs, as one vector."""
    args = flags(method, epochs=epochs, **given)
    torch.manual_seed(args.seed)
    model = digits.make_model(args.hidden_dim)
    knobs = digits.choose_knobs(args, method)
    for _ in digits.train(model, digits.split_prompts()[0], knobs, epochs):
        pass
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# ---------------------------------------------------------------- The task


def test_prompts_are_split_and_complete():
    train, held_out = (list(map(tuple, prompts.tolist())) for prompts in digits.split_prompts())
    solvable = [p for p in itertools.product(range(10), repeat=3) if answers_to(p)]
    assert len(train) == 729 and len(held_out) == 183
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == solvable


def test_held_out_prompts_are_never_trained_on(monkeypatch):
    """Whatever the row, only training prompts go through the network with a gradient."""
    train, held_out = (digits.one_hot(prompts) for prompts in digits.split_prompts())
    train, held_out = ({tuple(row) for row in prompts.tolist()} for prompts in (train, held_out))
    make_model, seen = digits.make_model, []

    def watched_model(hidden_dim):
        model = make_model(hidden_dim)
        watch = lambda _, inputs: seen.append(inputs[0]) if torch.is_grad_enabled() else None  # noqa: E731
        model.register_forward_pre_hook(watch)
        return model

    monkeypatch.setattr(digits, "make_model", watched_model)
    for method in digits.METHODS:
        seen.clear()
        results(method, 10)
        assert len(seen) == 10
        trained_on = {tuple(row) for row in torch.cat(seen).tolist()}
        assert trained_on == train and not trained_on & held_out, method


def test_split_is_that_of_the_post():
    """Made as the post makes it; the losses that it printed for the first step of SL come out."""
    random.seed(-1)
    inputs = list({p for p in itertools.product(range(10), repeat=3) if answers_to(p)})
    random.shuffle(inputs)
    train, held_out = digits.split_prompts()
    assert set(map(tuple, train.tolist())) == set(inputs[:729])
    torch.manual_seed(-1)
    model = digits.make_model(64)
    steps = digits.train(model, train, digits.METHODS["sl"], 10_000)
    before = digits.measure(model, train)["cross_entropy"]
    next(steps)
    after = digits.measure(model, held_out)["cross_entropy"]
    assert (before, after) == pytest.approx((4.6133, 4.6015), abs=1e-4)


def test_seed_does_not_move_the_split():
    before = digits.split_prompts()
    random.seed(5), torch.manual_seed(5)
    assert all(map(torch.equal, before, digits.split_prompts()))


def test_answer_sums_and_inputs():
    prompts, _ = some_prompts()
    sums = digits.answer_sums(torch.tensor(prompts))
    assert sums.tolist() == [[sum(p) + a // 10 + a % 10 for a in range(100)] for p in prompts]
    inputs = digits.one_hot(torch.tensor(prompts))
    assert inputs.shape == (5, 30) and inputs.sum() == 15
    for row, prompt in zip(inputs, prompts, strict=True):
        assert row.nonzero().squeeze(1).tolist() == [10 * i + d for i, d in enumerate(prompt)]


@pytest.mark.parametrize("kind", REWARDS)
def test_rewards(kind):
    sums = torch.arange(2, 46)
    expected = torch.tensor([REWARDS[kind](total) for total in range(2, 46)])
    torch.testing.assert_close(digits.reward_table(sums, kind), expected)


def test_rewards_as_printed_in_the_post():
    sums = torch.tensor([20, 19, 21, 15, 25, 10, 30])
    distance = torch.tensor([1, 0.9, 0.9, 0.5, 0.5, 0, 0])
    sharp = torch.tensor([1, 0.61, 0.61, 0.08, 0.08, 0.007, 0.007])
    torch.testing.assert_close(digits.reward_table(sums, "distance"), distance)
    torch.testing.assert_close(digits.reward_table(sums, "sharp"), sharp, atol=0.005, rtol=0)


# ---------------------------------------------------------------- The losses


def test_logit_gradient_is_that_of_the_loss():
    torch.manual_seed(0)
    logits, credit = torch.randn(2, 7, 100, dtype=torch.float64).unbind()  # credit of any sum
    loss = -(credit * logits.requires_grad_().log_softmax(1)).sum()
    found = digits.logit_gradient(credit, logits.detach().softmax(1))
    torch.testing.assert_close(found, gradient(loss, logits), rtol=0, atol=1e-12)


def test_sl_loss_is_cross_entropy_over_all_rows():
    train, _ = digits.split_prompts()
    rows = [(i, a) for i, prompt in enumerate(train.tolist()) for a in answers_to(prompt)]
    logits = torch.randn(729, 100, dtype=torch.float64, requires_grad=True)
    index, labels = torch.tensor(rows).T
    expected = F.cross_entropy(logits[index], labels)

    valid = digits.answer_sums(train) == 20
    loss = -(valid / valid.sum() * logits.log_softmax(1)).sum()
    assert len(rows) == valid.sum() == 4504
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    exact = gradient(expected, logits)
    assert (gradient(loss, logits) - exact).abs().max() < 1e-6 * exact.abs().max()


def expected_post_gradient(prompts, logits, rows, kind, ent_coef):
    """Gradient in expectation of the post's loss: one sampled answer a row, all 100 enumerated."""
    loss = 0.0
    for prompt, n, row in zip(prompts, rows, logits, strict=True):
        logp = row - row.exp().sum().log()
        for a in range(100):
            reward = REWARDS[kind](sum(prompt) + a // 10 + a % 10)
            loss = loss - n * logp[a].exp().detach() * reward * logp[a]
            loss = loss + n * ent_coef * logp[a].exp() * logp[a]
    return gradient(loss / sum(rows), logits)


@pytest.mark.parametrize("samples_per_prompt", [0, 3])
@pytest.mark.parametrize("kind", REWARDS)
def test_expected_rl_gradient_is_that_of_the_post(kind, samples_per_prompt):
    prompts, logits = some_prompts()
    sums = digits.answer_sums(torch.tensor(prompts))
    valid = sums == 20
    weights = digits.sample_weights(valid, samples_per_prompt).double()
    rewards = digits.reward_table(sums, kind).double()
    probs, loss = logits.softmax(1).detach(), 0.0
    for a in range(100):  # every sample answers a, with the probability that it does
        actions = torch.full(weights.shape, a)
        advantages = digits.compute_advantages(rewards.gather(1, actions), "none")
        loss += rl_loss(logits, actions, advantages, weights * probs[:, a : a + 1], 0.15)
    rows = [samples_per_prompt or len(answers_to(prompt)) for prompt in prompts]
    expected = expected_post_gradient(prompts, logits, rows, kind, 0.15)
    assert (gradient(loss, logits) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_rloo_leaves_the_expected_gradient_as_it_is():
    """All 10,000 pairs of answers to one prompt, for every reward."""
    prompts, logits = some_prompts()
    for i, kind in enumerate(REWARDS):
        prompt, row = prompts[i + 1 : i + 2], logits[i + 1 : i + 2]
        rewards = digits.reward_table(digits.answer_sums(torch.tensor(prompt)), kind).double()
        pairs = torch.cartesian_prod(torch.arange(100), torch.arange(100))  # (10000, 2)
        advantages = digits.compute_advantages(rewards[0][pairs], "rloo")
        share = row.softmax(1)[0].detach()[pairs].prod(1, keepdim=True).expand(-1, 2) / 2
        loss = rl_loss(row.expand(10_000, 100), pairs, advantages, share, 0.15)
        expected = expected_post_gradient(prompt, row, [1], kind, 0.15)
        actual = gradient(loss, row)
        assert (actual - expected).abs().max() < 1e-6 * expected.abs().max(), kind


@pytest.mark.parametrize("baseline, samples_per_prompt", [("none", 0), ("none", 2), ("rloo", 2)])
def test_baselines_leave_the_expected_gradient_as_it_is(baseline, samples_per_prompt):
    """Every joint outcome of 3 or 4 samples, in a world of 4 answers to each of 2 prompts."""
    valid = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]]).bool()
    weights = digits.sample_weights(valid, samples_per_prompt).double()
    torch.manual_seed(0)
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(2, 4, dtype=torch.float64) - 1
    probs, loss = logits.softmax(1).detach(), 0.0
    for outcome in itertools.product(range(4), repeat=weights.numel()):
        actions = torch.tensor(outcome).view(weights.shape)
        share = torch.where(weights > 0, probs.gather(1, actions), 1 / 4).prod()
        sampled = torch.where(weights > 0, rewards.gather(1, actions), 1e6)  # unused: whatever
        advantages = digits.compute_advantages(sampled, baseline)
        loss += share * rl_loss(logits, actions, advantages, weights, 0.1)
    # E[R] and entropy in closed form: their gradient is what the samples must have on average.
    policy = logits.softmax(1)
    value = weights.sum(1) @ (policy * (rewards - 0.1 * policy.log())).sum(1)
    torch.testing.assert_close(
        gradient(loss, logits), -gradient(value, logits), rtol=1e-6, atol=1e-9
    )


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0], [4.0, 9.0, 9.0]])
    rloo = digits.compute_advantages(rewards, "rloo")
    torch.testing.assert_close(rloo, torch.tensor([[0.0, -1.5, 1.5], [-5.0, 2.5, 2.5]]))


def test_sample_weights():
    valid = torch.zeros(3, 100, dtype=torch.bool)
    valid[0, :4] = valid[1, 7] = valid[2, 10:13] = True
    row = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]) / 8
    torch.testing.assert_close(digits.sample_weights(valid, 0), row)
    torch.testing.assert_close(digits.sample_weights(valid, 5), torch.full((3, 5), 1 / 15))


def test_samples_follow_the_distribution():
    """Evenly spaced quantiles must land on each answer in proportion to its probability."""
    probs = torch.tensor([[0.0, 0.5, 0.25, 0.0, 0.25], [0.1, 0.2, 0.3, 0.4, 0.0]])
    uniforms = (torch.arange(10_000) / 10_000).expand(2, -1).contiguous()
    for row, p in zip(digits.sample_actions(probs, uniforms), probs, strict=True):
        shares = row.bincount(minlength=5) / 10_000
        assert (shares - p).abs().max() < 2e-4
        assert (shares[p == 0] == 0).all()  # not even at the quantiles 0 and almost 1


# ---------------------------------------------------------------- Training


@pytest.mark.parametrize("method", ["sl", "sl-weight-decay"])
def test_sl_training_is_the_plain_loop_over_rows(method):
    """Adam on one row an example, in float64: same weights after 20 epochs."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(30, 64), torch.nn.ReLU(), torch.nn.Linear(64, 100))
    model.double()
    rows = [(p, a) for p in digits.split_prompts()[0].tolist() for a in answers_to(p)]
    inputs = torch.zeros(len(rows), 30, dtype=torch.float64)
    for i, (prompt, _) in enumerate(rows):
        inputs[i, [10 * place + digit for place, digit in enumerate(prompt)]] = 1
    labels = torch.tensor([a for _, a in rows])
    decay = {"sl": 0, "sl-weight-decay": 0.001}[method]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=decay)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert (trained(method).double() - expected).abs().max() < 2e-4


@pytest.mark.parametrize("baseline, samples_per_prompt", [("none", 0), ("rloo", 3)])
def test_rl_training_is_the_plain_loop_over_rows(baseline, samples_per_prompt, monkeypatch):
    """The same with RL: the joint loss, all knobs at work, on answers drawn in advance."""
    knobs = digits.METHODS["joint"] | {"reward": "sharp", "baseline": baseline}
    knobs |= {"samples_per_prompt": samples_per_prompt, "ent_coef": 0.2, "ent_coef_final": 0.1}
    knobs |= {"weight_decay": 0.01, "learning_rate_final": 0.005, "sl_coef": 0.5}
    knobs |= {"sl_coef_final": 0.1}
    prompts = digits.split_prompts()[0].tolist()
    demonstrations = [(i, a) for i, p in enumerate(prompts) for a in answers_to(p)]
    drawn = torch.randint(
        100, (8, 729, samples_per_prompt or 10), generator=torch.Generator().manual_seed(0)
    )
    queue = iter(drawn)
    monkeypatch.setattr(digits, "sample_actions", lambda probs, uniforms: next(queue))
    actual = digits.make_model(16)
    model = digits.make_model(16)
    model.load_state_dict(actual.state_dict())
    model.double()
    list(digits.train(actual, digits.split_prompts()[0], knobs, 8))

    inputs = digits.one_hot(torch.tensor(prompts)).double()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.01)
    for epoch in range(8):
        optimizer.param_groups[0]["lr"] = 0.015 - 0.010 * epoch / 8
        samples, advantages = [], []
        for i, prompt in enumerate(prompts):
            actions = drawn[epoch][i, : samples_per_prompt or len(answers_to(prompt))].tolist()
            rewards = [REWARDS["sharp"](sum(prompt) + a // 10 + a % 10) for a in actions]
            for k, action in enumerate(actions):
                others = rewards[:k] + rewards[k + 1 :]
                mean = sum(others) / len(others) if baseline == "rloo" else 0
                samples.append((i, action))
                advantages.append(rewards[k] - mean)
        logp = model(inputs).log_softmax(1)
        index, actions = torch.tensor(samples).T
        entropy = -(logp.exp() * logp).sum(1)[index].mean()  # one for each sample
        loss = -(torch.tensor(advantages).double() * logp[index, actions]).mean()
        loss = loss - (0.2 - 0.1 * epoch / 8) * entropy
        index, labels = torch.tensor(demonstrations).T
        loss = loss + (0.5 - 0.4 * epoch / 8) * F.nll_loss(logp[index], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, theirs in zip(actual.parameters(), model.parameters(), strict=True):
        assert (mine.double() - theirs).abs().max() < 2e-4


def test_rl_samples_from_the_policy_itself(monkeypatch):
    """The probabilities sampled from are the softmax of the logits of this epoch."""
    model, seen = digits.make_model(8), []
    sample_actions = digits.sample_actions
    monkeypatch.setattr(
        digits, "sample_actions", lambda p, u: seen.append((p, u)) or sample_actions(p, u)
    )
    steps = digits.train(model, digits.split_prompts()[0], digits.METHODS["rl"], 2)
    for _ in range(2):
        inputs = digits.one_hot(digits.split_prompts()[0])
        expected = model(inputs).softmax(1).detach()
        next(steps)
        probs, uniforms = seen[-1]
        torch.testing.assert_close(probs, expected)
        rights = (digits.answer_sums(digits.split_prompts()[0]) == 20).sum(1)
        drawn = torch.arange(uniforms.shape[1]) < rights[:, None]  # a slot for each right answer
        assert not uniforms[~drawn].any()
        assert 0.49 < uniforms[drawn].mean() < 0.51 and uniforms[drawn].std() > 0.28
    assert not torch.equal(seen[0][1], seen[1][1])


def test_measure():
    model = digits.make_model(8)
    prompts, _ = digits.split_prompts()
    prompts = prompts[:60]
    right, distinct, losses, entropy = 0, set(), [], 0.0
    for prompt in prompts.tolist():
        logits = model(digits.one_hot(torch.tensor([prompt])))[0]
        right += logits.argmax().item() in answers_to(prompt)
        distinct.add(logits.argmax().item())
        losses += [-logits.log_softmax(0)[a].item() for a in answers_to(prompt)]
        entropy += torch.distributions.Categorical(logits=logits).entropy().item() / 60
    found = digits.measure(model, prompts)
    assert found["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / 60)
    assert found["distinct"] == len(distinct)
    assert found["cross_entropy"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# ---------------------------------------------------------------- The story, in short runs


@pytest.fixture(scope="module")
def short_runs():
    """Two seeds of the plain RL rows, 400 epochs."""
    names = ("rl", "rl-entropy", "rl-distance", "rl-sharp")
    return {name: [results(name, 400, seed) for seed in (1, 2)] for name in names}


def test_rl_collapses_and_entropy_prevents_it(short_runs):
    for collapsed, lively in zip(short_runs["rl"], short_runs["rl-entropy"], strict=True):
        assert collapsed["eval/distinct"] <= 8 and lively["eval/distinct"] >= 40
        assert collapsed["train/entropy"] < 0.5 < lively["train/entropy"]
        assert collapsed["train/accuracy"] < 0.4 and lively["train/accuracy"] > 0.85


def test_a_sharp_reward_beats_distance(short_runs):
    for distance, sharp in zip(short_runs["rl-distance"], short_runs["rl-sharp"], strict=True):
        assert sharp["train/accuracy"] > distance["train/accuracy"] + 0.2
        assert sharp["eval/accuracy"] > distance["eval/accuracy"] + 0.05


def test_weight_decay_generalises():
    for seed in (1, 2):
        plain, decayed = (results(name, 1000, seed) for name in ("sl", "sl-weight-decay"))
        assert plain["train/accuracy"] > 0.99 and plain["train/cross_entropy"] < 2
        assert plain["eval/cross_entropy"] > decayed["eval/cross_entropy"] + 0.3


def test_warm_start_is_sl_with_weight_decay_then_rl(monkeypatch):
    """A tenth of the epochs, in that order, on one and the same model."""
    phases = []

    def spy(model, prompts, knobs, num_epochs):
        phases.append((model, knobs, num_epochs))
        return train(model, prompts, knobs, num_epochs)

    train = digits.train
    monkeypatch.setattr(digits, "train", spy)
    results("sl-then-rl", 20, ent_coef=0.3)
    (first, knobs, warm), (second, others, rest) = [phase for phase in phases if phase[2]]
    assert first is second and (warm, rest) == (2, 18)
    assert knobs == digits.METHODS["sl-weight-decay"]
    assert others == digits.METHODS["sl-then-rl"] | {"ent_coef": 0.3}


def test_warm_start_is_often_right_from_the_first_rl_epoch():
    cold = results("rl-sharp", 1)["train/accuracy"]
    warm = results("sl-then-rl", 301, sft_fraction=0.999)["train/accuracy"]
    assert cold < 0.2 and warm > 0.7


def test_improved_rl_generalises_as_well_as_it_trains():
    for seed in (1, 2):
        run = results("rl-improved", 1000, seed)
        assert run["eval/accuracy"] > 0.65 and run["eval/distinct"] > 25
        assert abs(run["eval/accuracy"] - run["train/accuracy"]) < 0.1


# ---------------------------------------------------------------- The command line


def test_the_rows_have_the_numbers_of_the_post():
    rl = {"learning_rate": 0.015, "weight_decay": 0.0, "baseline": "none", "samples_per_prompt": 0}
    expected = {
        "sl": {"learning_rate": 0.01, "weight_decay": 0.0},
        "sl-weight-decay": {"learning_rate": 0.01, "weight_decay": 0.001},
        "rl": rl | {"reward": "exact", "ent_coef": 0.0},
        "rl-entropy": rl | {"reward": "exact", "ent_coef": 0.15},
        "rl-distance": rl | {"reward": "distance", "ent_coef": 0.15},
        "rl-sharp": rl | {"reward": "sharp", "ent_coef": 0.15},
        "sl-then-rl": rl | {"reward": "sharp", "ent_coef": 0.15, "sft_fraction": 0.1},
    }
    for method, knobs in expected.items():
        row = digits.METHODS[method]
        assert {k: v for k, v in row.items() if not k.endswith("_final")} == knobs
        assert all(v is None for k, v in row.items() if k.endswith("_final"))  # all constant
    assert list(digits.METHODS)[:7] == list(expected)
    warm = {"sft_fraction": digits.METHODS["sl-then-rl"]["sft_fraction"]}
    assert digits.METHODS["sl-then-improved"] == digits.METHODS["rl-improved"] | warm
    assert digits.Args().epochs == 10_000 and digits.Args().hidden_dim == 64
    published = dict(zip(expected, (None, 91.26, 18.03, 85.25, 67.76, 91.26, 98.91), strict=True))
    assert published == digits.POST


KNOBS = {
    "learning_rate": 0.02,
    "learning_rate_final": 0.01,
    "weight_decay": 0.1,
    "reward": "sharp",
    "ent_coef": 0.5,
    "ent_coef_final": 0.5,
    "baseline": "none",
    "samples_per_prompt": 3,
    "sl_coef": 0.5,
    "sl_coef_final": 0.5,
}


def test_every_knob_changes_the_weights():
    assert set(digits.KNOBS) == {*KNOBS, "sft_fraction"}
    plain = trained("joint")
    assert torch.equal(plain, trained("joint"))
    for flag, value in KNOBS.items():
        assert not torch.equal(plain, trained("joint", **{flag: value})), flag
    assert not torch.equal(plain, trained("joint", seed=2))
    assert trained("joint", hidden_dim=8).numel() == 30 * 8 + 8 + 8 * 100 + 100
    kinds = ("exact", "distance", "sharp", "square")
    assert len({tuple(trained("rl", reward=kind).tolist()) for kind in kinds}) == 4


def test_a_knob_is_read_or_refused_by_each_row(capsys):
    values = {**KNOBS, "sft_fraction": 0.5}
    for method, flag in itertools.product(("ladder", *digits.METHODS), digits.KNOBS):
        args = flags(method, epochs=4, **{flag: values[flag]})
        if flag in digits.METHODS.get(method, {}):
            digits.check_args(args)
            assert digits.choose_knobs(args, method)[flag] == values[flag]
        else:
            with pytest.raises(SystemExit) as stop:
                digits.check_args(args)
            assert stop.value.code == 2
            assert f"--method {method} ignores it" in capsys.readouterr().err


BAD = [
    ("--method", "sl", "--ent-coef", "0.1"),
    ("--reward", "sharp"),
    ("--num-seeds", "0"),
    ("--epochs", "0"),
    ("--hidden-dim", "-3"),
    ("--seed", "-1"),
    ("--method", "rl", "--ent-coef", "-0.1"),
    ("--method", "rl", "--learning-rate", "0"),
    ("--method", "rl", "--learning-rate", "nan"),
    ("--method", "sl", "--weight-decay", "inf"),
    ("--method", "rl-improved", "--samples-per-prompt", "1"),
    ("--method", "rl", "--samples-per-prompt", "-1"),
    ("--method", "rl", "--baseline", "rloo"),
    ("--method", "sl-then-rl", "--sft-fraction", "1"),
    ("--method", "sl-then-rl", "--sft-fraction", "-0.5"),
    ("--method", "joint", "--sl-coef", "-1"),
]


@pytest.mark.parametrize("argv", BAD, ids=" ".join)
def test_bad_values_are_refused(argv, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        digits.main(tyro.cli(digits.Args, args=argv))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith(f"error: {argv[-2]} ") and len(err) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        ("--method", "ppo"),
        ("--epochs", "many"),
        ("--method", "rl", "--reward", "none"),
        ("--method", "rl", "--baseline", "value"),
        ("--no-such-flag",),
    ],
    ids=" ".join,
)
def test_what_is_no_value_at_all_is_refused(argv, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(digits.Args, args=argv)
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert argv[-1] in capsys.readouterr().err


def test_a_run_that_diverges_says_so():
    with pytest.raises(SystemExit) as stop:
        results("rl-entropy", 50, learning_rate=1e18)
    assert "lower --learning-rate" in stop.value.code  # the message, and status 1


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """What the whole ladder returns with two seeds, what it prints, and where its curves are."""
    folder, lines = tmp_path_factory.mktemp("ladder"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(lines):
        patch.chdir(folder)
        means = digits.main(digits.Args(epochs=20, num_seeds=2))
    return means, lines.getvalue(), folder


def test_same_seed_same_results(ladder):
    """Whatever ran before."""
    means = {name: value for name, value in ladder[0].items() if "seconds" not in name}
    assert {name.split("/")[0] for name in means} == set(digits.METHODS)
    for method in digits.METHODS:
        first, other = (results(method, 20, seed) for seed in (1, 2))
        assert first["eval/cross_entropy"] != other["eval/cross_entropy"]
        for name in first.keys() - {"seconds"}:
            assert means.pop(f"{method}/{name}") == pytest.approx((first[name] + other[name]) / 2)
    assert not means


def test_progress_of_a_single_run(capsys):
    results("rl", 40)
    out = capsys.readouterr().out.splitlines()
    epochs = [int(line.split()[2]) for line in out if line.startswith("rl ") and "%" in line]
    assert epochs == [*range(0, 40, 4), 39]
    assert "64 units" in out[0] and "seed 1" in out[0]


def test_tables_of_the_ladder(ladder):
    out = ladder[1]
    lines = re.findall(r"^(\S+) +([12]) +19 +([\d.]+)% +([\d.]+)% +(\d+) .* (\d+) s$", out, re.M)
    in_turn = [(method, seed) for method in digits.METHODS for seed in "12"]
    assert [line[:2] for line in lines] == in_turn and lines[-1][-1] == "0"
    assert len([line for line in out.splitlines() if line.endswith(" s")]) == 20  # only at the end
    table = out[out.index("\nrow ", 200) :].splitlines()[1:]
    assert [line.split()[0] for line in table[1:11]] == list(digits.METHODS)
    assert all("±" in line for line in table[1:11])
    assert table[2].endswith("91.26*") and table[7].endswith("98.91*")
    held_out = {line[0]: float(line[3]) for line in lines[1::2]}  # of seed 2
    distinct = {line[0]: int(line[4]) for line in lines[1::2]}
    best, *collapsed = re.findall(r"Greedy answers of (\S+) to held-out prompts, seed 2:", out)
    assert held_out[best] == max(held_out.values()) > min(held_out.values())
    assert distinct[[best, *collapsed][-1]] == min(distinct.values()) < max(distinct.values())
    for line in out.splitlines():
        if line.endswith(("right |", "wrong |")):
            digits_shown = [
                int(c) for c in line.split("| ")[1] + line.split("| ")[2] if c.isdigit()
            ]
            total = int(line.split("|")[3])
            assert sum(digits_shown) == total and ("right" in line) == (total == 20)
            assert len(digits_shown) == 5


def test_a_figure_of_the_post_is_compared_as_it_is_rounded(capsys):
    """98.91 is 181 of 183 prompts: within a range that ends there, outside one that ends before."""
    for right, star in ((181, ""), (180, "*")):
        runs = [
            {"train/accuracy": 1, "eval/accuracy": n / 183, "eval/distinct": 9, "seconds": 1}
            for n in (170, right)
        ]
        digits.print_results({"sl-then-rl": runs})
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.endswith(f" 98.91{star}")
        mean, std = (170 + right) / 1.83 / 2, (right - 170) / 1.83 / 2**0.5
        assert f"100.0 ±  0.0  {mean:.1f} ± {std:4.1f}   9.0 ±  0.0" in line


def test_as_a_program(three_runs, capsys):
    """Several runs share the cores and come out as they do one after the other."""
    folder, printed = three_runs()
    digits.main(digits.Args(method="rl", epochs=20, num_seeds=3, tensorboard=False))
    form = r"^rl +[123] +19 .*\.\d{4}|^\| \[.*"  # all but the time: its progress, its answers
    shared, alone = (re.findall(form, x, re.M) for x in (printed, capsys.readouterr().out))
    assert shared == alone and len(shared) == 13
    assert not list(folder.iterdir())


def test_ctrl_c_ends_all_runs_at_once(tmp_path):
    words = "--method rl --epochs 1000000 --num-seeds 3".split()
    command = [sys.executable, str(programs.ROOT / "digits_sum20.py"), *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **quiet)
    try:
        while len(list(tmp_path.glob("runs/*/rl-*"))) < min(3, os.cpu_count()):  # all at work
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal sends
        assert process.wait(20) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_run_beside_others_that_diverges_says_so():
    words = "--no-tensorboard --method rl-entropy --epochs 50 --num-seeds 3 --learning-rate 1e18"
    command = [sys.executable, digits.__file__, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "%" not in done.stdout
    assert done.stderr == "error: rl-entropy diverged by epoch 0; lower --learning-rate\n"


def test_curves(ladder):
    """A folder a run, so that the runs share a chart."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (ladder[2] / "runs").iterdir()
    assert folder.name.startswith("digits_sum20__1__")
    found = {child.name: child for child in folder.iterdir() if child.is_dir()}
    assert set(found) == {f"{method}-{seed}" for method in digits.METHODS for seed in (1, 2)}
    measures = "accuracy distinct cross_entropy entropy".split()
    names = {f"{part}/{name}" for part in ("train", "eval") for name in measures}
    for child in found.values():
        assert set(EventAccumulator(str(child)).Reload().Tags()["scalars"]) == names
    digits.main(digits.Args(method="joint", epochs=200))
    (folder,) = Path("runs").iterdir()
    programs.check_hyperparameters(folder, digits.Args(), method="joint", epochs="200")
    events = EventAccumulator(str(folder / "joint-1")).Reload()
    assert [point.step for point in events.Scalars("eval/accuracy")] == [*range(0, 200, 2), 199]
