"""digits_sum20.py against float64 loops and enumerations that share no code with it."""

import dataclasses
import itertools
import math
import os
import random
import re
import signal
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import programs
import pytest
import torch
import torch.nn.functional as F
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import digits_sum20 as digits

ROOT = Path(__file__).parent.parent
REWARDS = ["exact", "distance", "sharp", "square"]

# A value of each flag that only some rows read; none of them is a row's own value.
VALUES = {
    "learning_rate": 0.02,
    "learning_rate_final": 0.01,
    "weight_decay": 0.1,
    "reward": "distance",
    "ent_coef": 0.5,
    "ent_coef_final": 0.5,
    "baseline": "none",
    "samples_per_prompt": 3,
    "sft_fraction": 0.5,
    "sl_coef": 0.5,
    "sl_coef_final": 0.5,
}


def start_program(folder, words, script=ROOT / "digits_sum20.py"):
    """Start the command, on an output that can only show ASCII."""
    return programs.begin(folder, script, *words.split(), PYTHONIOENCODING="ascii")


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory):
    """Two programs that run in the background: (process, folder) by name."""
    found = {}
    folder = tmp_path_factory.mktemp("three")
    words = "--no-tensorboard --method rl --epochs 20 --num-seeds 3"
    found["three runs"] = (start_program(folder, words), folder)

    # A reward that is not a number, as somebody's own reward may be.
    folder = tmp_path_factory.mktemp("broken")
    source = (ROOT / "digits_sum20.py").read_text(encoding="utf-8")
    broken = source.replace("return (-distance / 2).exp()", "return distance * float('nan')")
    assert broken != source
    script = folder / "broken.py"
    script.write_text(broken, encoding="utf-8")
    words = "--no-tensorboard --method rl-sharp --epochs 50 --num-seeds 2"
    found["broken"] = (start_program(folder, words, script), folder)
    yield found
    for process, _ in found.values():
        programs.end(process)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Tests run in an empty folder and leave the number of threads as it was."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def expected_reward(total, kind):
    """The reward of a sum of five digits, in plain Python."""
    distance = abs(total - 20)
    if kind == "exact":
        return 1.0 if distance == 0 else 0.0
    if kind == "distance":
        return max(0.0, 1 - distance / 10)
    if kind == "sharp":
        return math.exp(-distance / 2)
    return 1 - distance * distance / 100


def total_of(prompt, answer):
    return sum(prompt) + answer // 10 + answer % 10


def correct_answers(prompt):
    return [answer for answer in range(100) if total_of(prompt, answer) == 20]


def few_prompts():
    """Five prompts with 1, 10, 6, 2 and 9 correct answers, and logits (5, 100) in float64."""
    prompts = [[9, 9, 2], [3, 5, 3], [9, 3, 3], [1, 2, 0], [0, 6, 4]]
    assert [len(correct_answers(prompt)) for prompt in prompts] == [1, 10, 6, 2, 9]
    logits = torch.randn(5, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return prompts, logits.requires_grad_()


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def assert_same_gradient(found, expected):
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def flags(method, **given):
    return digits.Args(method=method, tensorboard=False, **given)


def job(method, seed=1, **given):
    return digits.method_args(flags(method, **given), method, seed)


def results(method, epochs, seed=1, **given):
    """What main returns for one row, without the name of the row."""
    means = digits.main(flags(method, epochs=epochs, seed=seed, **given))
    return {name.removeprefix(f"{method}/"): value for name, value in means.items()}


def flatten(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def keep_models(monkeypatch):
    """The list that every model is put in, with a copy of its first weights."""
    models = []
    make_model = digits.make_model

    def make(hidden_dim):
        model = make_model(hidden_dim)
        models.append((model, flatten(model)))
        return model

    monkeypatch.setattr(digits, "make_model", make)
    return models


def weights_after(method, epochs=20, seed=1, **given):
    """The weights after training, as one vector."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        models = keep_models(monkeypatch)
        digits.train(job(method, seed, epochs=epochs, **given), None, False)
    ((model, _),) = models
    return flatten(model)


# ---------------------------------------------------------------------------- Task
def test_prompts_are_split_and_complete():
    train, test = digits.split_prompts()
    train = [tuple(prompt) for prompt in train.tolist()]
    test = [tuple(prompt) for prompt in test.tolist()]
    every = itertools.product(range(10), repeat=3)
    assert len(train) == 729 and len(test) == 183
    assert sorted(train + test) == [prompt for prompt in every if correct_answers(prompt)]


def test_split_is_that_of_the_post():
    """Made as the post makes it; the losses that it printed for the first step of SL come out."""
    data = []
    for prompt in itertools.product(range(10), repeat=3):
        for answer in correct_answers(prompt):
            data.append([*prompt, answer // 10, answer % 10])
    assert len(data) == 5631
    random.seed(-1)
    inputs = list({(d1, d2, d3) for d1, d2, d3, *_ in data})
    random.shuffle(inputs)
    train, test = digits.split_prompts()
    assert [tuple(prompt) for prompt in train.tolist()] == inputs[: int(0.8 * 912)]
    assert [tuple(prompt) for prompt in test.tolist()] == inputs[int(0.8 * 912) :]
    torch.manual_seed(-1)
    model = digits.make_model(64)
    before = digits.measure(model, train)["cross_entropy"]
    digits.pretrain(model, digits.one_hot(train), digits.answer_sums(train) == 20, 1)
    after = digits.measure(model, test)["cross_entropy"]
    assert before == pytest.approx(4.6133, abs=1e-4)
    assert after == pytest.approx(4.6015, abs=2e-4)


def test_seed_does_not_move_the_split():
    before = digits.split_prompts()
    random.seed(5)
    torch.manual_seed(5)
    after = digits.split_prompts()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_held_out_prompts_are_never_trained_on(monkeypatch):
    """In every row, only training prompts go through the network with a gradient."""
    train, test = digits.split_prompts()
    train = {tuple(row) for row in digits.one_hot(train).tolist()}
    test = {tuple(row) for row in digits.one_hot(test).tolist()}
    seen = []
    make_model = digits.make_model

    def watch(_, inputs):
        if torch.is_grad_enabled():
            seen.append(inputs[0])

    def watched_model(hidden_dim):
        model = make_model(hidden_dim)
        model.register_forward_pre_hook(watch)
        return model

    monkeypatch.setattr(digits, "make_model", watched_model)
    for method in digits.METHODS:
        seen.clear()
        results(method, 10)
        assert len(seen) == 10  # one gradient step per epoch, SL before RL included
        trained_on = {tuple(row) for row in torch.cat(seen).tolist()}
        assert trained_on == train and not trained_on & test, method


def test_answer_sums_and_inputs():
    prompts, _ = few_prompts()
    sums = digits.answer_sums(torch.tensor(prompts)).tolist()
    for i, prompt in enumerate(prompts):
        assert sums[i] == [total_of(prompt, answer) for answer in range(100)]
    inputs = digits.one_hot(torch.tensor(prompts))
    assert inputs.shape == (5, 30) and inputs.sum() == 15
    for row, prompt in zip(inputs, prompts, strict=True):
        ones = row.nonzero().squeeze(1).tolist()
        assert ones == [10 * place + digit for place, digit in enumerate(prompt)]


@pytest.mark.parametrize("kind", REWARDS)
def test_reward_of_every_sum(kind):
    """Of sums that no prompt can reach too: however far off, only the square is below 0."""
    sums = torch.arange(-40, 80)
    expected = torch.tensor([expected_reward(total, kind) for total in range(-40, 80)])
    found = digits.shaped_reward(sums, kind)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert (found.min() < 0) == (kind == "square")


def test_rewards_as_printed_in_the_post():
    sums = torch.tensor([20, 19, 21, 15, 25, 10, 30])
    distance = torch.tensor([1, 0.9, 0.9, 0.5, 0.5, 0, 0])
    sharp = torch.tensor([1, 0.61, 0.61, 0.08, 0.08, 0.007, 0.007])
    torch.testing.assert_close(digits.shaped_reward(sums, "distance"), distance)
    torch.testing.assert_close(digits.shaped_reward(sums, "sharp"), sharp, atol=0.005, rtol=0)


def test_rewards_as_printed_in_the_docstring():
    """Each row of the table, cut off after the digits that it shows."""
    table = re.findall(r"^ *(distance from 20|\w+)((?: +-?[\d.]+)+)$", docstring(), re.M)
    (_, misses), *rows = table
    assert [name for name, _ in rows] == REWARDS
    for name, shown in rows:
        for miss, text in zip(misses.split(), shown.split(), strict=True):
            places = len(text.partition(".")[2])
            reward = expected_reward(20 + int(miss), name)
            assert float(text) == pytest.approx(reward, abs=0.51 * 10**-places), (name, miss)


def docstring():
    return digits.shaped_reward.__doc__


# ---------------------------------------------------------------------------- Losses
def test_sl_loss_is_cross_entropy_over_all_examples():
    train, _ = digits.split_prompts()
    examples = []
    for i, prompt in enumerate(train.tolist()):
        for answer in correct_answers(prompt):
            examples.append((i, answer))
    logits = torch.randn(729, 100, dtype=torch.float64, requires_grad=True)
    index, labels = torch.tensor(examples).T
    expected = F.cross_entropy(logits[index], labels)

    correct = digits.answer_sums(train) == 20
    loss = digits.sl_loss(logits.log_softmax(1), correct)
    assert len(examples) == correct.sum() == 4504
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_same_gradient(gradient(loss, logits), gradient(expected, logits))


def expected_post_gradient(prompts, logits, counts, kind, ent_coef):
    """The expected gradient of the post's loss, with every answer enumerated.

    A prompt has so many examples as counts says, and an example has one sampled answer.
    """
    loss = 0.0
    for prompt, count, row in zip(prompts, counts, logits, strict=True):
        logprobs = row - row.exp().sum().log()
        for answer in range(100):
            prob = logprobs[answer].exp()
            reward = expected_reward(total_of(prompt, answer), kind)
            loss = loss - count * prob.detach() * reward * logprobs[answer]
            loss = loss + count * ent_coef * prob * logprobs[answer]
    return gradient(loss / sum(counts), logits)


@pytest.mark.parametrize("samples_per_prompt", [0, 3])
@pytest.mark.parametrize("kind", REWARDS)
def test_expected_rl_gradient_is_that_of_the_post(kind, samples_per_prompt):
    prompts, logits = few_prompts()
    sums = digits.answer_sums(torch.tensor(prompts))
    weights = digits.sample_weights(sums == 20, samples_per_prompt).double()
    reward_table = digits.shaped_reward(sums, kind).double()
    logprobs = logits.log_softmax(1)
    probs = logprobs.detach().exp()
    loss = 0.0
    for answer in range(100):  # every sample is this answer, with its probability
        answers = torch.full(weights.shape, answer)
        rewards = reward_table.gather(1, answers)
        weights_of_answer = weights * probs[:, answer : answer + 1]
        loss = loss + digits.rl_loss(logprobs, answers, rewards, weights_of_answer, 0.15)
    counts = [samples_per_prompt] * 5
    if samples_per_prompt == 0:
        counts = [len(correct_answers(prompt)) for prompt in prompts]
    expected = expected_post_gradient(prompts, logits, counts, kind, 0.15)
    assert_same_gradient(gradient(loss, logits), expected)


@pytest.mark.parametrize("kind", REWARDS)
def test_leave_one_out_does_not_change_the_expected_gradient(kind):
    """All 10,000 pairs of answers to one prompt."""
    prompts, logits = few_prompts()
    number = REWARDS.index(kind) + 1
    prompt = prompts[number : number + 1]
    row = logits[number : number + 1]
    rewards = digits.shaped_reward(digits.answer_sums(torch.tensor(prompt)), kind).double()[0]
    pairs = torch.cartesian_prod(torch.arange(100), torch.arange(100))  # (10000, 2)
    advantages = digits.leave_one_out(rewards[pairs])
    probs = row.softmax(1)[0].detach()
    weights = (probs[pairs[:, 0]] * probs[pairs[:, 1]])[:, None].expand(-1, 2) / 2
    logprobs = row.expand(10_000, 100).log_softmax(1)
    loss = digits.rl_loss(logprobs, pairs, advantages, weights, 0.15)
    expected = expected_post_gradient(prompt, row, [1], kind, 0.15)
    assert_same_gradient(gradient(loss, row), expected)


@pytest.mark.parametrize("baseline, samples_per_prompt", [("none", 0), ("none", 2), ("rloo", 2)])
def test_gradient_over_every_joint_outcome(baseline, samples_per_prompt):
    """3 or 4 samples in a world of 4 answers to each of 2 prompts, against E[R] in closed form."""
    correct = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]]).bool()
    weights = digits.sample_weights(correct, samples_per_prompt).double()
    torch.manual_seed(0)
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(2, 4, dtype=torch.float64) - 1
    logprobs = logits.log_softmax(1)
    probs = logprobs.detach().exp()
    loss = 0.0
    for outcome in itertools.product(range(4), repeat=weights.numel()):
        answers = torch.tensor(outcome).view(weights.shape)
        used = weights > 0
        probability = torch.where(used, probs.gather(1, answers), 1 / 4).prod()
        # A sample that is not used may have any reward.
        advantages = torch.where(used, rewards.gather(1, answers), 1e6)
        if baseline == "rloo":
            advantages = digits.leave_one_out(advantages)
        loss = loss + probability * digits.rl_loss(logprobs, answers, advantages, weights, 0.1)
    policy = logits.softmax(1)
    value = weights.sum(1) @ (policy * (rewards - 0.1 * policy.log())).sum(1)
    expected = -gradient(value, logits)
    torch.testing.assert_close(gradient(loss, logits), expected, rtol=1e-6, atol=1e-9)


def test_optimal_policy_of_the_quadratic_reward_is_linear_in_the_prompt():
    """Where the RL loss is least, π ∝ exp(reward / c), whose log is linear in the prompt's sum."""
    ent_coef = 0.3
    sums = torch.arange(2, 21)[:, None] + digits.answer_sums(torch.zeros(1, 3, dtype=torch.long))
    rewards = digits.shaped_reward(sums, "square").double()
    logits = (rewards / ent_coef).requires_grad_()
    policy = logits.softmax(1)
    value = (policy * (rewards - ent_coef * policy.log())).sum()
    assert gradient(value, logits).abs().max() < 1e-10
    differences = (logits - logits[:, :1]).detach().diff(dim=0)  # of one prompt's sum to the next
    torch.testing.assert_close(differences[1:], differences[:-1], atol=1e-5, rtol=0)


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0], [4.0, 9.0, 9.0]])
    expected = torch.tensor([[0.0, -1.5, 1.5], [-5.0, 2.5, 2.5]])
    torch.testing.assert_close(digits.leave_one_out(rewards), expected)


def test_sample_weights_by_hand():
    correct = torch.zeros(3, 100, dtype=torch.bool)
    correct[0, :4] = True
    correct[1, 7] = True
    correct[2, 10:13] = True
    expected = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]) / 8
    torch.testing.assert_close(digits.sample_weights(correct, 0), expected)
    torch.testing.assert_close(digits.sample_weights(correct, 1), torch.full((3, 1), 1 / 3))
    torch.testing.assert_close(digits.sample_weights(correct, 5), torch.full((3, 5), 1 / 15))


def test_linear_decay():
    assert digits.linear_decay(0.3, None, 0.5) == 0.3
    assert digits.linear_decay(0.3, 0.02, 0.0) == 0.3
    assert digits.linear_decay(0.3, 0.02, 0.25) == pytest.approx(0.23)
    assert digits.linear_decay(0.3, 0.0, 1.0) == 0


# ---------------------------------------------------------------------------- Training
def reference_training(model, args, drawn):
    """Train by a plain loop over examples, in float64. Its samples are drawn[epoch] (729, M)."""
    prompts = digits.split_prompts()[0].tolist()
    inputs = torch.zeros(729, 30, dtype=torch.float64)
    examples = []
    for i, prompt in enumerate(prompts):
        for place, digit in enumerate(prompt):
            inputs[i, 10 * place + digit] = 1
        for answer in correct_answers(prompt):
            examples.append((i, answer))
    index, labels = torch.tensor(examples).T

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    sft_epochs = 0
    if args.sft_fraction is not None:
        sft_epochs = int(args.sft_fraction * args.epochs)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.001)
        for _ in range(sft_epochs):
            step(optimizer, F.cross_entropy(model(inputs[index]), labels))

    rl_epochs = args.epochs - sft_epochs
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=args.weight_decay)
    for epoch in range(rl_epochs):
        learning_rate = args.learning_rate
        if args.learning_rate_final is not None:
            slope = (args.learning_rate_final - args.learning_rate) / rl_epochs
            learning_rate = args.learning_rate + slope * epoch
        optimizer.param_groups[0]["lr"] = learning_rate
        if args.reward is None:
            step(optimizer, F.cross_entropy(model(inputs[index]), labels))
            continue
        samples = []
        advantages = []
        for i, prompt in enumerate(prompts):
            count = args.samples_per_prompt
            if count == 0:
                count = len(correct_answers(prompt))
            answers = drawn[epoch][i, :count].tolist()
            rewards = [expected_reward(total_of(prompt, a), args.reward) for a in answers]
            for k, answer in enumerate(answers):
                others = rewards[:k] + rewards[k + 1 :]
                baseline = sum(others) / len(others) if args.baseline == "rloo" else 0
                samples.append((i, answer))
                advantages.append(rewards[k] - baseline)
        logprobs = model(inputs).log_softmax(1)
        rows, answers = torch.tensor(samples).T
        advantages = torch.tensor(advantages, dtype=torch.float64)
        ent_coef = args.ent_coef
        if args.ent_coef_final is not None:
            ent_coef += (args.ent_coef_final - args.ent_coef) * epoch / rl_epochs
        entropy = -(logprobs.exp() * logprobs).sum(1)[rows].mean()  # one for each sample
        loss = -(advantages * logprobs[rows, answers]).mean() - ent_coef * entropy
        if args.sl_coef is not None:
            sl_coef = args.sl_coef + (args.sl_coef_final - args.sl_coef) * epoch / rl_epochs
            loss = loss + sl_coef * F.nll_loss(logprobs[index], labels)
        step(optimizer, loss)


DECAYS = {"learning_rate_final": 0.005, "ent_coef_final": 0.1}
CASES = [
    ("sl", {}),
    ("sl", {"weight_decay": 0.02, "learning_rate": 0.03}),
    ("sl-weight-decay", {}),
    ("rl", {"ent_coef": 0.1, "weight_decay": 0.01}),
    ("rl-sharp", {"samples_per_prompt": 2}),
    ("rl-distance", {"baseline": "rloo", "samples_per_prompt": 2}),
    ("sl-then-rl", {"sft_fraction": 0.25}),
    ("sl-then-improved", {"sft_fraction": 0.5, **DECAYS}),
    ("rl-improved", DECAYS),
    ("joint", {**DECAYS, "weight_decay": 0.01, "sl_coef": 0.5, "sl_coef_final": 0.1}),
    ("joint", {"reward": "exact", "baseline": "none", "samples_per_prompt": 0, "sl_coef": 1.0}),
]


@pytest.mark.parametrize("method, given", CASES)
def test_training_is_the_plain_loop_over_examples(method, given, monkeypatch):
    """The same weights after eight epochs, with answers that are drawn in advance."""
    args = job(method, epochs=8, hidden_dim=16, **given)
    slots = 10 if args.samples_per_prompt in (None, 0) else args.samples_per_prompt
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(100, (8, 729, slots), generator=generator)
    asked = []

    def multinomial(probs, num_samples, replacement):
        asked.append((probs, num_samples, replacement))
        return drawn[len(asked) - 1]

    monkeypatch.setattr(torch, "multinomial", multinomial)
    models = keep_models(monkeypatch)
    digits.train(args, None, False)
    ((model, first_weights),) = models
    reference = torch.nn.Sequential(
        torch.nn.Linear(30, 16), torch.nn.ReLU(), torch.nn.Linear(16, 100)
    )
    torch.nn.utils.vector_to_parameters(first_weights, reference.parameters())
    reference.double()
    reference_training(reference, args, drawn)
    moved = (flatten(reference) - first_weights).abs().max()
    assert moved > 0.02 and (flatten(model) - flatten(reference)).abs().max() < 2e-4
    for probs, num_samples, replacement in asked:
        assert probs.shape == (729, 100) and not probs.requires_grad
        assert num_samples == slots and replacement
        torch.testing.assert_close(probs.sum(1), torch.ones(729))
    if args.reward is not None:
        assert len(asked) == 8 - int((args.sft_fraction or 0) * 8)


def test_samples_come_from_the_policy_of_the_epoch(monkeypatch):
    """Training begins at the first weights of the seed, and samples from their softmax."""
    calls = programs.spy(monkeypatch, torch, "multinomial")
    models = keep_models(monkeypatch)
    digits.train(job("rl", epochs=2), None, False)
    torch.manual_seed(1)
    first = digits.make_model(64)
    assert torch.equal(models[0][1], models[1][1])
    inputs = digits.one_hot(digits.split_prompts()[0])
    ((probs, _), answers, _), ((next_probs, _), next_answers, _) = calls
    torch.testing.assert_close(probs, first(inputs).softmax(1).detach())
    assert not torch.equal(probs, next_probs) and not torch.equal(answers, next_answers)
    assert answers.shape == (729, 10) and len(answers.unique()) == 100


def test_measure_on_every_prompt():
    torch.manual_seed(0)
    model = digits.make_model(8)
    prompts = digits.split_prompts()[0][:60]
    right = 0
    distinct = set()
    losses = []
    entropies = []
    for prompt in prompts.tolist():
        logits = model(digits.one_hot(torch.tensor([prompt])))[0].double()
        answer = logits.argmax().item()
        right += answer in correct_answers(prompt)
        distinct.add(answer)
        losses += [-logits.log_softmax(0)[a].item() for a in correct_answers(prompt)]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().item())
    found = digits.measure(model, prompts)
    assert 0 < right < 60 and len(distinct) > 1
    assert found == {
        "accuracy": pytest.approx(right / 60),
        "distinct": len(distinct),
        "cross_entropy": pytest.approx(sum(losses) / len(losses), rel=1e-5),
        "entropy": pytest.approx(sum(entropies) / 60, rel=1e-5),
    }


def test_metrics_are_of_the_trained_model_on_both_sets(monkeypatch):
    models = keep_models(monkeypatch)
    found, answers = digits.train(job("rl-improved", epochs=150), None, False)
    model = models[0][0]
    train, test = digits.split_prompts()
    assert found.pop("seconds") > 0
    expected = {f"train/{name}": value for name, value in digits.measure(model, train).items()}
    for name, value in digits.measure(model, test).items():
        expected[f"eval/{name}"] = value
    assert found == expected
    assert answers == model(digits.one_hot(test)).argmax(1)[:10].tolist()


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch):
    def broken_reward(sums, kind):
        return torch.where(sums == 20, math.nan, 1.0)

    monkeypatch.setattr(digits, "shaped_reward", broken_reward)
    with pytest.raises(FloatingPointError, match="loss of rl not finite in epoch 0"):
        results("rl", 10)


def test_a_run_takes_one_thread():
    torch.set_num_threads(2)
    digits.train(job("sl", epochs=1), None, False)
    assert torch.get_num_threads() == 1


# ---------------------------------------------------------------------------- What the rows show
def two_rows(epochs, *methods):
    return [results(method, epochs) for method in methods]


@programs.beside(two_rows, 400, "rl", "rl-entropy")
def test_rl_collapses_and_entropy_prevents_it(found):
    collapsed, lively = found
    assert collapsed["eval/distinct"] <= 8 and lively["eval/distinct"] >= 40
    assert collapsed["train/entropy"] < 0.5 < lively["train/entropy"]
    assert collapsed["train/accuracy"] < 0.4 and lively["train/accuracy"] > 0.85


@programs.beside(two_rows, 400, "rl-distance", "rl-sharp")
def test_a_sharp_reward_beats_distance(found):
    distance, sharp = found
    assert sharp["train/accuracy"] > distance["train/accuracy"] + 0.15
    assert sharp["eval/accuracy"] > distance["eval/accuracy"]


@programs.beside(two_rows, 1000, "sl", "sl-weight-decay")
def test_weight_decay_generalises(found):
    plain, decayed = found
    assert plain["train/accuracy"] > 0.99 and plain["train/cross_entropy"] < 2
    assert plain["eval/cross_entropy"] > decayed["eval/cross_entropy"] + 0.3


def test_after_sl_the_first_rl_epoch_is_often_right():
    assert results("rl-sharp", 1)["train/accuracy"] < 0.2
    assert results("sl-then-rl", 301, sft_fraction=0.997)["train/accuracy"] > 0.7


@programs.beside(results, "rl-improved", 1000)
def test_improved_rl_generalises_as_well_as_it_trains(found):
    assert found["eval/accuracy"] > 0.65 and found["eval/distinct"] > 25
    assert abs(found["eval/accuracy"] - found["train/accuracy"]) < 0.1


# ---------------------------------------------------------------------------- Flags
def test_rows_have_the_values_of_the_post():
    rl = {"learning_rate": 0.015, "weight_decay": 0.0, "baseline": "none", "samples_per_prompt": 0}
    expected = {
        "sl": {"learning_rate": 0.01, "weight_decay": 0.0},
        "sl-weight-decay": {"learning_rate": 0.01, "weight_decay": 0.001},
        "rl": {**rl, "reward": "exact", "ent_coef": 0.0},
        "rl-entropy": {**rl, "reward": "exact", "ent_coef": 0.15},
        "rl-distance": {**rl, "reward": "distance", "ent_coef": 0.15},
        "rl-sharp": {**rl, "reward": "sharp", "ent_coef": 0.15},
        "sl-then-rl": {**rl, "reward": "sharp", "ent_coef": 0.15, "sft_fraction": 0.1},
    }
    for method, row in expected.items():
        assert digits.METHODS[method] == row
    assert list(digits.METHODS)[:7] == list(expected)
    assert digits.Args().epochs == 10_000 and digits.Args().hidden_dim == 64
    published = [91.26, 18.03, 85.25, 67.76, 91.26, 98.91]
    assert dict(zip(list(expected)[1:], published, strict=True)) == digits.POST


def test_every_row_can_be_chosen_and_is_explained():
    names = typing.get_args(typing.get_type_hints(digits.Args)["method"])
    assert list(names) == ["ladder", *digits.METHODS]
    explained = re.findall(r"^    (\S+) +\d+%  \S", digits.__doc__, re.M)
    assert explained == list(digits.METHODS)


def test_every_value_of_a_row_changes_the_weights():
    for method in ("joint", "sl-then-improved", "sl-weight-decay"):
        own = weights_after(method)
        assert torch.equal(own, weights_after(method))
        assert not torch.equal(own, weights_after(method, seed=2))
        for flag in digits.METHODS[method]:
            changed = weights_after(method, **{flag: VALUES[flag]})
            assert not torch.equal(own, changed), flag
    assert weights_after("joint", hidden_dim=8).numel() == 30 * 8 + 8 + 8 * 100 + 100
    with_reward = [tuple(weights_after("rl", reward=kind).tolist()) for kind in REWARDS]
    assert len(set(with_reward)) == 4


def test_a_row_reads_a_flag_or_refuses_it(capsys):
    assert set(VALUES) == {f.name for f in dataclasses.fields(digits.Args) if f.default is None}
    for method in ("ladder", *digits.METHODS):
        for flag, value in VALUES.items():
            args = flags(method, epochs=4, **{flag: value})
            if flag in digits.METHODS.get(method, {}):
                digits.check_args(args)
                row = dataclasses.asdict(digits.method_args(args, method, 3))
                others = {**digits.METHODS[method], flag: value}
                assert row == {**dataclasses.asdict(args), **others, "seed": 3}
            else:
                with pytest.raises(SystemExit) as stop:
                    digits.check_args(args)
                error = capsys.readouterr().err
                name = flag.replace("_", "-")
                readers = [m for m in digits.METHODS if flag in digits.METHODS[m]]
                assert stop.value.code == 2
                assert error == f"error: --{name} is only for --method {', '.join(readers)}\n"


REFUSED = [
    "--method sl --ent-coef 0.1",
    "--method sl --learning-rate-final 0.1",
    "--reward sharp",
    "--num-seeds 0",
    "--epochs 0",
    "--hidden-dim -3",
    "--hidden-dim 0",
    "--seed -1",
    "--method rl --ent-coef -0.1",
    "--method rl --ent-coef nan",
    "--method rl --learning-rate 0",
    "--method rl --learning-rate 1",
    "--method rl --learning-rate nan",
    "--method rl-improved --learning-rate-final -0.1",
    "--method rl-improved --ent-coef-final inf",
    "--method sl --weight-decay inf",
    "--method sl --weight-decay -1",
    "--method rl-improved --samples-per-prompt 1",
    "--method rl-improved --samples-per-prompt 0",
    "--method rl --samples-per-prompt -1",
    "--method rl --baseline rloo",
    "--method sl-then-rl --sft-fraction 1",
    "--method sl-then-rl --sft-fraction -0.5",
    "--method sl-then-rl --epochs 10 --sft-fraction 0.96",
    "--method joint --sl-coef -1",
    "--method joint --sl-coef-final -1",
]


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_values_are_refused_in_one_line(words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        digits.main(tyro.cli(digits.Args, args=words.split()))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("error: --") and words.split()[-2] in err
    assert not list(tmp_path.iterdir())


ACCEPTED = [
    "--method rl --learning-rate 0.99 --ent-coef 0 --weight-decay 0",
    "--method rl --baseline rloo --samples-per-prompt 2",
    "--method rl --samples-per-prompt 1",
    "--method sl-then-rl --epochs 10 --sft-fraction 0.94",
    "--method sl-then-rl --epochs 1 --sft-fraction 0",
    "--method joint --sl-coef 0 --learning-rate-final 0 --ent-coef-final 0",
    "--method rl-improved --baseline none --samples-per-prompt 0",
    "--seed 0 --epochs 1 --hidden-dim 1 --num-seeds 1",
    "--method sl-then-rl --learning-rate 0.02 --weight-decay 3e-6 --num-seeds 10",
]


@pytest.mark.parametrize("words", ACCEPTED)
def test_values_at_the_edge_are_accepted(words):
    digits.check_args(tyro.cli(digits.Args, args=words.split()))


WRONG_WORDS = [
    "--method ppo",
    "--epochs many",
    "--method rl --reward none",
    "--method rl --baseline value",
    "--no-such-flag",
]


@pytest.mark.parametrize("words", WRONG_WORDS)
def test_what_is_no_value_at_all_is_refused(words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(digits.Args, args=words.split())
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert words.split()[-1] in capsys.readouterr().err


# ---------------------------------------------------------------------------- Output
LINE = re.compile(
    r"(\S+) +seed (\d+) +epoch +(\d+)  train +([\d.]+)%  held-out +([\d.]+)%"
    r"  distinct +(\d+)  (\d+) s left"
)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """All rows with two seeds: what main returns, what it prints, and its folder."""
    folder = tmp_path_factory.mktemp("ladder")
    lines = []

    def keep(*words, **more):
        lines.append(" ".join(words))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(digits, "print", keep, raising=False)
        means = digits.main(digits.Args(epochs=20, num_seeds=2))
    return means, "\n".join(lines).splitlines(), folder


def test_same_seed_same_results(ladder):
    """Whatever ran before. Returned are the means over the seeds."""
    means = {name: value for name, value in ladder[0].items() if "seconds" not in name}
    assert {name.split("/")[0] for name in means} == set(digits.METHODS)
    for method in digits.METHODS:
        first = results(method, 20, 1)
        second = results(method, 20, 2)
        assert first["eval/cross_entropy"] != second["eval/cross_entropy"]
        for name in first.keys() - {"seconds"}:
            mean = (first[name] + second[name]) / 2
            assert means.pop(f"{method}/{name}") == pytest.approx(mean)
    assert not means


def test_progress_of_a_single_run(monkeypatch, capsys):
    """Twenty lines and the last epoch's, by a clock that goes on by a second at each reading."""
    programs.tick(monkeypatch, digits)
    results("rl", 41)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("digits_sum20__1__") and "1 runs of 41 epochs" in out[0]
    found = [
        LINE.fullmatch(line).groups() for line in out if line.startswith("rl ") and "%" in line
    ]
    epochs = [int(line[2]) for line in found]
    assert epochs == [*range(0, 40, 5), 40]
    assert {line[:2] for line in found} == {("rl", "1")}
    for (*_, seconds_left), epoch in zip(found[:-1], epochs, strict=False):
        assert int(seconds_left) == round((epoch + 1) * (41 / (epoch + 1) - 1))
    assert found[-1][-1] == "0"


def test_long_runs_measure_a_hundred_times(monkeypatch):
    """Measured in turn on training and held-out prompts."""
    calls = programs.spy(monkeypatch, digits, "measure")
    results("rl", 400, hidden_dim=2)
    assert [len(prompts) for (_, prompts), _, _ in calls] == [729, 183] * 101


def test_progress_of_all_rows(ladder):
    _, lines, _ = ladder
    assert "20 runs of 20 epochs" in lines[0]
    found = [LINE.fullmatch(line) for line in lines[1:21]]
    expected = [(method, seed) for method in digits.METHODS for seed in ("1", "2")]
    assert [(match[1], match[2]) for match in found] == expected
    assert {match[3] for match in found} == {"19"} and found[-1][7] == "0"
    assert lines[21] == ""


def test_time_left_of_several_runs(monkeypatch, capsys):
    """Three runs; each reads the clock twice at the start and the log, and main once after it."""
    programs.tick(monkeypatch, digits)
    results("rl", 1, num_seeds=3)
    lines = [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [int(line[7]) for line in lines] == [round(3 * 2 / 1), round(6 * 1 / 2), 0]


def test_table_of_results(ladder, capsys):
    means, lines, _ = ladder
    start = lines.index("") + 1
    assert lines[start].split() == "method train % held-out % distinct range seconds post %".split()
    table = lines[start + 1 : start + 11]
    assert [line.split()[0] for line in table] == list(digits.METHODS)
    for line in table:
        method, train, sign, _, test, _, _, distinct, _, _, test_range, _, post = line.split()
        assert sign == "±"
        low, high = test_range.split("-")
        accuracy = 100 * means[f"{method}/eval/accuracy"]
        assert float(train) == pytest.approx(100 * means[f"{method}/train/accuracy"], abs=0.06)
        assert float(test) == pytest.approx(accuracy, abs=0.06)
        assert (float(low) + float(high)) / 2 == pytest.approx(accuracy, abs=0.11)
        assert float(distinct) == pytest.approx(means[f"{method}/eval/distinct"], abs=0.06)
        assert post == str(digits.POST.get(method, "-"))


def test_mean_and_standard_deviation():
    assert digits.mean_and_std([90.0]) == "90.0"
    assert digits.mean_and_std([90.0, 93.0, 99.0]) == "94.0 ±  4.6"


def test_tables_of_answers(ladder):
    _, lines, _ = ladder
    (first, second) = [i for i, line in enumerate(lines) if line.startswith("Most probable")]
    assert " rl to held-out prompts, seed 2:" in lines[first]
    assert " rl-improved to held-out prompts, seed 2:" in lines[second]
    _, test_prompts = digits.split_prompts()
    for start, method in ((first, "rl"), (second, "rl-improved")):
        _, answers = digits.train(job(method, 2, epochs=20), None, False)
        rows = lines[start + 3 : start + 13]
        for row, prompt, answer in zip(rows, test_prompts.tolist(), answers, strict=False):
            shown, output, total, verdict = [cell.strip() for cell in row.strip("|").split("|")]
            assert shown == str(prompt) and output == f"[{answer // 10}, {answer % 10}]"
            assert int(total) == total_of(prompt, answer)
            assert verdict == ("right" if int(total) == 20 else "wrong")
    assert len(lines) == second + 13


def test_curves(ladder):
    """One folder per run, so that TensorBoard draws the runs into one chart."""
    (folder,) = (ladder[2] / "runs").iterdir()
    assert re.fullmatch(r"digits_sum20__1__\d{4}-\d\d-\d\d-\d{6}-\d{6}", folder.name)
    found = {child.name: child for child in folder.iterdir() if child.is_dir()}
    assert set(found) == {f"{method}-{seed}" for method in digits.METHODS for seed in (1, 2)}
    measures = ["accuracy", "distinct", "cross_entropy", "entropy"]
    tags = {f"{group}/{name}" for group in ("train", "eval") for name in measures}
    for child in found.values():
        assert set(EventAccumulator(str(child)).Reload().Tags()["scalars"]) == tags


def test_points_of_the_curves():
    means = digits.main(digits.Args(method="joint", epochs=200))
    (folder,) = Path("runs").iterdir()
    programs.check_hyperparameters(folder, digits.Args(), method="joint", epochs="200")
    events = EventAccumulator(str(folder / "joint-1")).Reload()
    points = events.Scalars("eval/accuracy")
    assert [point.step for point in points] == [*range(0, 200, 2), 199]
    for tag in events.Tags()["scalars"]:
        assert events.Scalars(tag)[-1].value == pytest.approx(means[f"joint/{tag}"], rel=1e-6)


def test_curves_begin_after_sl():
    digits.main(digits.Args(method="sl-then-rl", epochs=200, sft_fraction=0.5))
    (folder,) = Path("runs").iterdir()
    points = EventAccumulator(str(folder / "sl-then-rl-1")).Reload().Scalars("eval/accuracy")
    assert [point.step for point in points] == [*range(100, 200, 2), 199]


# ---------------------------------------------------------------------------- As a program
def test_several_runs_share_the_cores(started, capsys):
    """They come out as they do one after the other, on an output that can only show ASCII."""
    process, folder = started["three runs"]
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == ""
    digits.main(digits.Args(method="rl", epochs=20, num_seeds=3, tensorboard=False))
    expected = capsys.readouterr().out
    form = r"^rl +seed .* distinct +\d+|^\| .*"  # all but the times
    assert re.findall(form, printed, re.M) == re.findall(form, expected, re.M)
    assert len(re.findall(form, printed, re.M)) == 3 + 11
    assert " ? " in printed and " ± " in expected
    assert not list(folder.iterdir())


def test_an_error_in_a_worker_is_one_line(started):
    process, _ = started["broken"]
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "%" not in printed
    assert errors == "error: loss of rl-sharp not finite in epoch 0\n"


def command_of(pid):
    """The command line of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def workers_at_work(process, folder):
    """The ids of the worker processes, once each has begun a run."""
    num_workers = min(2, os.cpu_count())
    while len(list(folder.glob("runs/*/rl-*/events*"))) < num_workers:
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if "spawn_main" in command_of(pid)]
    assert len(workers) == num_workers
    return workers


def assert_all_end(workers):
    deadline = time.time() + 20
    while any("spawn_main" in command_of(pid) for pid in workers):
        assert time.time() < deadline, "a worker goes on"
        time.sleep(0.05)


def end_program(process, how, folder):
    """Ctrl-C or SIGTERM, sent to the main process alone, or a worker that somebody kills."""
    workers = workers_at_work(process, folder)
    if how == "killed worker":
        os.kill(workers[0], signal.SIGINT)  # ends it at once, as Ctrl-C in a terminal does
    else:
        process.send_signal(getattr(signal, how))
    assert process.wait(30) != 0
    assert_all_end(workers)
    if how == "killed worker":
        errors = process.communicate()[1]
        assert process.returncode == 2
        assert errors == "error: a worker process was killed, perhaps for lack of memory\n"


@pytest.fixture(scope="module", autouse=True)
def programs_that_end(tmp_path_factory):
    """Beside the tests, programs with workers are started and ended: a future by how."""
    words = "--method rl --epochs 100000000 --num-seeds 2"
    # Tests that run in the background may ignore Ctrl-C, and so would the programs that they start.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with ThreadPoolExecutor() as pool:
        processes = []
        found = {}
        for how in ["SIGINT", "SIGTERM", "killed worker"]:
            folder = tmp_path_factory.mktemp("ended")
            process = start_program(folder, words)
            processes.append(process)
            found[how] = pool.submit(end_program, process, how, folder)
        signal.signal(signal.SIGINT, handler)
        yield found
        for process in processes:
            programs.end(process)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "killed worker"])
def test_no_worker_outlives_the_program(how, programs_that_end):
    programs_that_end[how].result()
