"""reinforce.py: expected gradients against exact ones, and every step of training by hand."""

import math
import statistics
import typing
from pathlib import Path

import exact
import oracle
import programs
import pytest
import torch
import tyro

import reinforce

PROMPT = (4, 3, 3)
OTHER_PROMPT = (5, 5, 4)
BETA = 0.1
EOS = 10


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def real_tokens(response):
    """A padded response as the tuple of its real tokens."""
    if EOS in response:
        return tuple(response[: response.index(EOS) + 1])
    return tuple(response)


def ragged(seed=0):
    """Two random arrays (5, 4), the lengths of five responses, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    lengths = [4, 1, 2, 3, 4]
    mask = torch.tensor([[t < n for t in range(4)] for n in lengths])
    return first, second, lengths, mask


# ---------------------------------------------------------------------------- Task
@pytest.mark.parametrize("prompt", [PROMPT, (9, 9, 0), (0, 2, 0), (0, 1, 9)])
def test_process_reward_of_every_response(prompt):
    responses = exact.all_responses()
    targets = torch.full((len(responses),), 20 - sum(prompt))
    found = reinforce.process_reward(targets, responses)
    mask = reinforce.response_mask(responses)
    for i, response in enumerate(responses.tolist()):
        expected = oracle.process_rewards(prompt, real_tokens(response))
        assert found[i, mask[i]].tolist() == expected
    assert (found[~mask] == 0).all()


def test_process_reward_adds_up_to_the_reward_of_a_correct_response():
    _, _, prompts, targets = reinforce.make_prompts("cpu")
    prompts, responses = reinforce.make_demonstrations(prompts, targets)
    token_scores = reinforce.process_reward(20 - prompts.sum(1), responses)
    assert (token_scores.sum(1) == 1).all()


# ---------------------------------------------------------------------------- Expected gradients
class World:
    """A tabular policy that can write 11 responses to a prompt; these responses; their rewards."""

    def __init__(self, prompt=PROMPT, theta=None, process=False):
        if theta is None:
            theta = oracle.narrow(oracle.table(0)).requires_grad_()
        self.theta = theta
        self.reference = oracle.narrow(oracle.table(1))
        everything = oracle.responses()
        self.responses = oracle.narrow_responses()
        rows = [everything.index(y) for y in self.responses]
        self.mask = torch.tensor([[t < len(y) for t in range(3)] for y in self.responses])
        self.logprobs = oracle.token_table(self.theta)[rows]
        self.probs = self.logprobs.sum(1).exp().detach()
        kl = (self.logprobs - oracle.token_table(self.reference)[rows]).detach()
        if process:
            token_scores = oracle.padded([oracle.process_rewards(prompt, y) for y in everything])
            self.all_scores = token_scores.sum(1)
            rewards = torch.where(self.mask, token_scores[rows] - BETA * kl, 0.0)
        else:
            self.all_scores = float64(*[oracle.score(prompt, y, "sharp") for y in everything])
            rewards = reinforce.token_rewards(self.all_scores[rows], kl, self.mask, BETA)
        self.scores = self.all_scores[rows]
        self.returns = reinforce.returns_to_go(rewards, self.mask, 1.0)

    def exact_gradient(self):
        value = oracle.objective(self.theta, self.reference, self.all_scores, BETA)
        return torch.autograd.grad(value, self.theta, retain_graph=True)[0]


def expected_gradient(worlds, baseline):
    """Mean of minus the gradient of the loss, over all batches of one response of each world.

    baseline: a function of the returns (N, B, 3) of N batches of B responses and of the numbers
    (N, B) of these responses.
    """
    size = len(worlds)
    numbers = torch.cartesian_prod(*[torch.arange(11)] * size).view(-1, size)
    parts = [(world, numbers[:, i]) for i, world in enumerate(worlds)]
    probs = torch.stack([world.probs[column] for world, column in parts]).prod(0)
    assert abs(probs.sum() - 1) < 1e-12
    logprobs = torch.stack([world.logprobs[column] for world, column in parts], 1)
    returns = torch.stack([world.returns[column] for world, column in parts], 1)
    mask = torch.stack([world.mask[column] for world, column in parts], 1)
    advantages = torch.where(mask, returns - baseline(returns, numbers), 0.0)
    # The loss is linear in the advantages and a mean over batches, so it can weigh the batches.
    weighted = len(probs) * probs[:, None, None] * advantages
    loss = reinforce.reinforce_loss(
        logprobs.flatten(0, 1), weighted.flatten(0, 1), mask.flatten(0, 1)
    )
    return -torch.autograd.grad(loss, worlds[0].theta, retain_graph=True)[0]


def leave_one_out_by_position(returns, numbers):
    """Each batch is a group."""
    size = returns.shape[1]
    return reinforce.leave_one_out_mean(returns.flatten(0, 1), size).view_as(returns)


def leave_one_out(returns, numbers):
    return leave_one_out_by_position(returns[:, :, :1], numbers)


def check_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize("constant", [0.0, 0.7, -3.0])
def test_no_baseline_and_the_running_mean_are_unbiased(constant, process):
    world = World(process=process)

    def baseline(returns, numbers):
        return constant

    check_close(expected_gradient([world], baseline), world.exact_gradient())


@pytest.mark.parametrize("process", [False, True])
def test_the_value_baseline_is_unbiased_for_any_critic(process):
    world = World(process=process)
    table = torch.randn(111, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = [[table[oracle.row(y[:t])] for t in range(len(y))] for y in world.responses]
    values = oracle.padded(values, math.nan)

    def baseline(returns, numbers):
        return values[numbers]

    check_close(expected_gradient([world], baseline), world.exact_gradient())


@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_is_unbiased(size, process):
    world = World(process=process)
    for baseline in (leave_one_out, leave_one_out_by_position):
        check_close(expected_gradient([world] * size, baseline), world.exact_gradient())


def test_the_batch_mean_is_unbiased_over_two_prompts():
    world = World()
    other = World(OTHER_PROMPT, world.theta)
    expected = (world.exact_gradient() + other.exact_gradient()) / 2
    check_close(expected_gradient([world, other], leave_one_out), expected)
    assert (world.exact_gradient() - expected).abs().max() > 0.01


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_of_the_whole_group_shrinks_the_gradient(size):
    world = World()

    def mean_of_all(returns, numbers):
        return returns[:, :, :1].mean(1, keepdim=True)

    found = expected_gradient([world] * size, mean_of_all)
    check_close(found, (size - 1) / size * world.exact_gradient())


def test_a_baseline_that_looks_ahead_is_biased():
    world = World()

    def last_return(returns, numbers):
        return 0.5 * returns[:, :, -1:]

    found = expected_gradient([world], last_return)
    assert (found - world.exact_gradient()).abs().max() > 1e-3


def test_a_mean_over_tokens_is_biased_towards_short_responses():
    """Only a mean over the tokens of each response: over all tokens, it scales the gradient."""
    world = World()
    lengths = world.mask.sum(1)

    def gradient(scale):
        advantages = (len(lengths) * world.probs * scale)[:, None] * world.returns
        loss = reinforce.reinforce_loss(world.logprobs, advantages, world.mask)
        return -torch.autograd.grad(loss, world.theta, retain_graph=True)[0]

    expected = world.exact_gradient()
    check_close(gradient(1.0), expected)
    per_response = gradient(1 / lengths)
    ratio = (per_response * expected).sum() / (expected * expected).sum()
    assert (per_response - ratio * expected).abs().max() > 1e-3
    mean_length = (world.probs * lengths).sum()
    check_close(gradient(1 / mean_length), expected / mean_length)


@pytest.mark.parametrize("size", [2, 3])
def test_gradient_noise_of_the_benchmark_by_enumerating_groups(size):
    from benchmark import gradient_variance

    world = World()
    gradients = []  # of each response's log-probability
    for total in world.logprobs.sum(1):
        gradient = torch.autograd.grad(total, world.theta, retain_graph=True)[0]
        gradients.append(gradient.flatten())
    gradients = torch.stack(gradients)
    numbers = torch.cartesian_prod(*[torch.arange(11)] * size)
    probs = world.probs[numbers].prod(1)
    scores = world.scores[numbers]
    others = (scores.sum(1, keepdim=True) - scores) / (size - 1)
    per_response = (scores - others)[:, :, None] * gradients[numbers]  # (groups, G, parameters)
    expected = (world.probs * world.scores) @ gradients
    alone = (probs[:, None] * (per_response - expected).square().sum(2)).sum() / size
    together = (probs * (per_response.mean(1) - expected).square().sum(1)).sum() * size

    everything = torch.tensor([[*y, EOS, EOS][:3] for y in oracle.responses()])
    mask = reinforce.response_mask(everything)
    rows = gradient_variance.prefix_rows(everything)
    prefixes = [oracle.row(y[:t]) for y in oracle.responses() for t in range(len(y))]
    assert rows[mask].tolist() == prefixes
    theta = world.theta.detach()
    choices = theta.log_softmax(1)[rows]
    mean = (world.probs * world.scores).sum()
    variance = (world.probs * world.scores**2).sum() - mean**2
    second, square = gradient_variance.gradient_moments(
        choices, everything, mask, world.all_scores, mean, variance / (size - 1)
    )
    assert square.item() == pytest.approx(expected.square().sum().item())
    assert (second - square).item() == pytest.approx(alone.item())
    assert (second - square + square / (size - 1)).item() == pytest.approx(together.item())

    values = oracle.state_values(theta, theta, world.all_scores, 0.0)
    probs = oracle.token_table(theta).sum(1).exp()
    found = gradient_variance.prefix_values(probs, everything, mask, world.all_scores)
    values = oracle.padded([[values[y[:t]] for t in range(len(y))] for y in oracle.responses()])
    likely = mask & (probs > 1e-6)[:, None]
    torch.testing.assert_close(found[likely], values[likely])


# ---------------------------------------------------------------------------- Functions by loops
GARBAGE = [0.0, 9.0, math.nan, math.inf]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
def test_returns_to_go_of_unequal_lengths(gamma, garbage):
    rewards, _, lengths, mask = ragged()
    found = reinforce.returns_to_go(torch.where(mask, rewards, garbage), mask, gamma)
    for i, n in enumerate(lengths):
        expected = oracle.discounted(rewards[i, :n].tolist(), gamma)
        torch.testing.assert_close(found[i], float64(*expected, *[0.0] * (4 - n)))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_leave_one_out_mean_by_loops(size):
    returns = [1.0, 5.0, 2.0, -3.0, 0.5, 7.0]
    expected = float64(*[oracle.mean_without(returns, size, i) for i in range(6)])[:, None]
    found = reinforce.leave_one_out_mean(float64(*returns)[:, None] * float64(1, 10), size)
    torch.testing.assert_close(found, expected * float64(1, 10))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_loss_and_its_gradient_by_loops(garbage):
    values, advantages, lengths, mask = ragged()
    logprobs = torch.where(mask, values, garbage).requires_grad_()
    padded_advantages = torch.where(mask, advantages, garbage)
    loss = reinforce.reinforce_loss(logprobs, padded_advantages, mask)
    total = 0.0
    for i, n in enumerate(lengths):
        for t in range(n):
            total += values[i, t].item() * advantages[i, t].item()
    assert loss.item() == pytest.approx(-total / 5)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages / 5, 0.0))


# ---------------------------------------------------------------------------- RWR
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("fraction, kept", [(0.01, 3), (0.3, 3), (0.5, 4), (0.55, 5), (1.0, 8)])
def test_rwr_weights_by_loops(temperature, fraction, kept):
    returns = [0.1, 1.0, -0.5, 1.0, 0.9, 0.0, 1.0, 0.3]  # three tie for the best
    found = reinforce.rwr_weights(float64(*returns), temperature, fraction)
    expected = oracle.rwr_weights(returns, temperature, fraction)
    torch.testing.assert_close(found, float64(*expected))
    assert abs(found.sum() - 1) < 1e-12
    assert (found > 0).sum() == kept


def test_rwr_weights_of_large_returns_are_finite():
    found = reinforce.rwr_weights(float64(1000.0, 999.0), 0.01, 1.0)
    assert found.tolist() == pytest.approx([1.0, 0.0])


def test_rwr_weights_of_equal_returns_are_equal():
    for fraction in (0.1, 1.0):
        found = reinforce.rwr_weights(torch.full((8,), 0.5), 0.1, fraction)
        torch.testing.assert_close(found, torch.full((8,), 1 / 8))


def tabular(probs):
    """Logits (111, 11) of the policy with these probabilities of all responses."""
    table = torch.zeros(111, 11, dtype=torch.float64)
    for response, p in zip(oracle.responses(), probs, strict=True):
        for t, token in enumerate(response):
            table[oracle.row(response[:t]), token] += p
    return table.log()


def test_rwr_fits_the_policy_times_the_exponential_of_the_return():
    temperature = 0.7
    returns = float64(*[oracle.score(PROMPT, y, "sharp") for y in oracle.responses()])
    logprobs = oracle.token_table(oracle.table(0)).sum(1)
    probs = (logprobs + returns / temperature).softmax(0)
    theta = tabular(probs.tolist()).requires_grad_()
    # Every response once: its probability, too, must be in its weight.
    weights = reinforce.rwr_weights(returns + temperature * logprobs, temperature, 1.0)
    loss = -(weights * oracle.token_table(theta).sum(1)).sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.abs().max() < 1e-12


def test_at_the_maximum_of_j_every_response_has_the_same_return():
    """So reward-weighted regression leaves the policy as it is there."""
    ref_logprobs = oracle.token_table(oracle.table(1))
    scores = [oracle.score(PROMPT, y, "sharp") for y in oracle.responses()]
    probs, best = oracle.optimal(ref_logprobs.sum(1).tolist(), scores, BETA)
    logprobs = oracle.token_table(tabular(probs))
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in oracle.responses()])
    rewards = reinforce.token_rewards(float64(*scores), logprobs - ref_logprobs, mask, BETA)
    returns = reinforce.returns_to_go(rewards, mask, 1.0)[:, 0]
    torch.testing.assert_close(returns, torch.full_like(returns, best))
    weights = reinforce.rwr_weights(returns, 0.3, 1.0)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 1111))


# ---------------------------------------------------------------------------- Training by hand
@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    command = f"reinforce.py {programs.SHORT_RUN}"
    yield from programs.start(command, tmp_path_factory.mktemp("program"))


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, reinforce)


SFT = reinforce.sft
SHORT = {"batch_size": 64, "total_episodes": 128, "sft_steps": 40, "tensorboard": False}


def run(**flags):
    """Train for two rollouts of 64 unless the flags say otherwise."""
    return reinforce.main(reinforce.Args(**(SHORT | flags)))


def weights_and_gradients(parameters, max_norm):
    """What is known of a gradient step before it is taken: (weights, gradients)."""
    weights = [parameter.detach().clone() for parameter in parameters]
    gradients = [parameter.grad.clone() for parameter in parameters]
    return weights, gradients


def load(module, weights):
    """The module with these weights, in float64."""
    module = module.double()
    for parameter, weight in zip(module.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    return module


def flatten(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def baselines(args, returns, values, running_mean):
    """The baseline of each token of each response, as lists."""
    rows = []
    for i, row in enumerate(returns):
        row_baselines = []
        for t in range(len(row)):
            place = t if args.reward == "process" else 0  # the place of the returns to average
            column = [other[place] if place < len(other) else 0.0 for other in returns]
            if args.baseline == "value":
                row_baselines.append(values[i][t].item())
            elif args.baseline == "batch-mean":
                row_baselines.append(oracle.mean_without(column, len(column), i))
            elif args.baseline == "running-mean":
                row_baselines.append(running_mean[place])
            elif args.baseline == "leave-one-out":
                row_baselines.append(oracle.mean_without(column, args.group_size, i))
            else:
                row_baselines.append(0.0)
        rows.append(row_baselines)
    return rows


def loss_by_hand(args, policy, critic, reference, prompts, responses, running_mean):
    """The loss of a rollout, token by token. Returns it and the metrics that should be logged."""
    tokens = torch.cat([prompts, responses], 1)
    states = policy(tokens)
    table = (policy.head(states) / args.temperature).log_softmax(2)
    with torch.no_grad():
        ref_table = (reference.head(reference(tokens)) / args.temperature).log_softmax(2)
    logprobs = []  # of each response, a list of its tokens' numbers; likewise below
    returns = []
    values = []
    scores = []
    true_scores = []
    kls = []
    entropy = 0.0
    for i, response in enumerate(responses.tolist()):
        prompt = prompts[i].tolist()
        response = real_tokens(response)
        places = range(2, 2 + len(response))  # of the token before: there are 3 prompt tokens
        logprobs.append([table[i, p, y] for p, y in zip(places, response, strict=True)])
        ref_logprobs = [ref_table[i, p, y].item() for p, y in zip(places, response, strict=True)]
        if critic is not None:
            values.append([critic(states[i, p])[0] for p in places])
        entropy = entropy - sum((table[i, p].exp() * table[i, p]).sum() for p in places)
        true_scores.append(oracle.score(prompt, response))
        rewards = [0.0] * len(response)
        rewards[-1] = true_scores[-1]
        if args.reward == "process":
            rewards = oracle.process_rewards(prompt, response)
        scores.append(sum(rewards))
        kl = [x.item() - y for x, y in zip(logprobs[-1], ref_logprobs, strict=True)]
        kls.append(sum(kl))
        rewards = [r - args.kl_coef * k for r, k in zip(rewards, kl, strict=True)]
        returns.append(oracle.discounted(rewards, args.gamma))

    size = len(returns)
    wholes = [row[0] for row in returns]
    expected = baselines(args, returns, values, running_mean)
    if args.objective == "rwr":
        weights = oracle.rwr_weights(wholes, args.rwr_temperature, args.rwr_top_fraction)
        expected = [[0.0] * len(row) for row in returns]
    policy_loss = 0.0
    value_loss = 0.0
    advantages = []
    for i in range(size):
        for t in range(len(returns[i])):
            advantage = returns[i][t] - expected[i][t]
            advantages.append(advantage)
            weight = size * weights[i] if args.objective == "rwr" else advantage
            policy_loss = policy_loss - weight * logprobs[i][t] / size
            if args.baseline == "value":
                value_loss = value_loss + 0.5 * (values[i][t] - returns[i][t]) ** 2 / size
    entropy = entropy / size
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    all_returns = [x for row in returns for x in row]
    unexplained = statistics.variance(advantages) / statistics.variance(all_returns)
    metrics = {
        "charts/score": sum(scores) / size,
        "charts/true_score": sum(true_scores) / size,
        "charts/kl": sum(kls) / size,
        "charts/response_length": sum(len(row) for row in returns) / size,
        "losses/policy_loss": policy_loss.item(),
        "losses/entropy": entropy.item(),
        "losses/explained_variance": 1 - unexplained,
    }
    if args.baseline == "value":
        metrics["losses/value_loss"] = value_loss.item()
    means = [sum(row[t] for row in returns if t < len(row)) / size for t in range(3)]
    return loss, metrics, means


VARIANTS = [
    {},
    {"group_size": 8, "temperature": 0.7},
    {"baseline": "none"},
    {"baseline": "batch-mean", "group_size": 1},
    {"baseline": "running-mean"},
    {"baseline": "value", "vf_coef": 0.5},
    {"gamma": 0.8},
    {"ent_coef": 0.3},
    {"reward": "process", "gamma": 0.8},
    {"reward": "process", "baseline": "value"},
    {"reward": "process", "baseline": "batch-mean"},
    {"reward": "process", "baseline": "running-mean"},
    {"objective": "rwr"},
    {"objective": "rwr", "rwr_temperature": 0.1, "rwr_top_fraction": 0.4, "reward": "process"},
]


@pytest.mark.parametrize("flags", VARIANTS, ids=str)
def test_every_step_of_training_by_hand(monkeypatch, tmp_path, flags):
    """Three rollouts: the gradients, the optimizer's steps, what is logged and what is saved."""
    args = reinforce.Args(
        batch_size=32,
        total_episodes=96,
        sft_steps=40,
        kl_coef=0.4,
        learning_rate=3e-3,
        max_grad_norm=0.3,
        save_path=tmp_path / "policy.pt",
        **flags,
    )
    rollouts = programs.spy_on_rollouts(monkeypatch, reinforce)
    curves = programs.record_curves(monkeypatch, reinforce)
    steps = programs.spy(
        monkeypatch, torch.nn.utils, "clip_grad_norm_", before=weights_and_gradients
    )
    reinforce.main(args)
    assert len(rollouts) == len(steps) == 3

    num_weights = len(list(reinforce.GPT().parameters()))
    reference = load(reinforce.GPT(), steps[0][2][0][:num_weights])
    running_mean = [0.0] * 3  # by position
    for i in range(3):
        (_, prompts, temperature), responses, _ = rollouts[i]
        (_, max_norm), grad_norm, (weights, gradients) = steps[i]
        assert temperature == args.temperature
        assert max_norm == 0.3
        policy = load(reinforce.GPT(), weights[:num_weights])
        critic = None
        parameters = list(policy.parameters())
        if args.baseline == "value":
            critic = load(torch.nn.Linear(64, 1), weights[num_weights:])
            parameters += list(critic.parameters())
        assert len(weights) == len(parameters)
        loss, metrics, mean_returns = loss_by_hand(
            args, policy, critic, reference, prompts, responses, running_mean
        )
        expected = torch.autograd.grad(loss, parameters)
        for found, gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found.double(), gradient, atol=1e-5, rtol=1e-3)
        metrics["losses/grad_norm"] = grad_norm.item()
        assert grad_norm.item() == pytest.approx(flatten(gradients).norm().item(), rel=1e-5)
        for tag, value in metrics.items():
            step, logged = curves[tag][i]
            assert step == 32 * (i + 1)
            assert logged == pytest.approx(value, abs=2e-5), tag
        running_mean = [0.9 * a + 0.1 * b for a, b in zip(running_mean, mean_returns, strict=True)]
    if args.baseline == "value":
        assert (steps[0][2][0][-2] == 0).all()  # the critic's weight at first

    # The steps: AdamW at the scheduled learning rates. There is no warmup in three rollouts.
    rates = [3e-3, 2e-3, 1e-3]
    assert programs.values(curves["charts/learning_rate"]) == pytest.approx(rates)
    starts = [flatten(noted[0]) for _, _, noted in steps]
    gradients = [flatten(noted[1]) for _, _, noted in steps]
    history = oracle.adamw(starts[0], gradients, rates, 0.3)
    for found, expected in zip(starts[1:], history, strict=False):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    saved = torch.load(tmp_path / "policy.pt", weights_only=True)
    policy = reinforce.GPT()
    policy.load_state_dict(saved["policy"])
    found = flatten(policy.parameters())
    torch.testing.assert_close(found, history[-1][: len(found)], atol=1e-6, rtol=0)
    policy.load_state_dict(saved["reference"])
    assert torch.equal(flatten(policy.parameters()), flatten(reference.parameters()))


# ---------------------------------------------------------------------------- Training as a whole
def test_the_learning_rate_rises_to_its_peak_and_falls_to_0(monkeypatch):
    curves = programs.record_curves(monkeypatch, reinforce)
    run(batch_size=8, total_episodes=20 * 8 + 7, learning_rate=1e-3, tensorboard=True)
    rates = [1e-3 / 2] + [1e-3 * (21 - rollout) / 19 for rollout in range(2, 21)]
    assert programs.values(curves["charts/learning_rate"]) == pytest.approx(rates)
    assert max(rates) == 1e-3


def test_policy_and_reference_are_evaluated_on_held_out_prompts(monkeypatch):
    _, _, test_prompts, test_targets = reinforce.make_prompts("cpu")
    calls = programs.spy(monkeypatch, reinforce, "evaluate")
    curves = programs.record_curves(monkeypatch, reinforce)
    run_result = run(temperature=0.8, tensorboard=True)
    assert len(calls) == 2
    for (policy, reference, prompts, targets, temperature), _, _ in calls:
        assert policy is calls[0][0][0]
        assert reference is calls[0][0][1]
        assert policy is not reference
        assert torch.equal(prompts, test_prompts)
        assert torch.equal(targets, test_targets)
        assert temperature == 0.8
    before = calls[0][1]
    after = calls[1][1]
    assert before["kl"] == 0
    assert after["kl"] > 0
    assert run_result == {"success_before": before["success"], **after}
    for name in ("success", "kl"):
        assert [step for step, _ in curves[f"eval/{name}"]] == [0, 128]
        logged = programs.values(curves[f"eval/{name}"])
        assert logged == pytest.approx([before[name], after[name]])


LEARNING = {"total_episodes": 10_240, "batch_size": 128, "learning_rate": 1e-3}


@programs.beside(programs.long_run, "reinforce", **LEARNING)
def test_success_rises(found):
    result, _ = found
    assert 0.4 < result["success_before"] < 0.8
    assert result["success"] > result["success_before"] + 0.1
    assert 0 < result["kl"] < 3


SHORTER = LEARNING | {"total_episodes": 40 * 128}  # 40 rollouts


@programs.beside(programs.long_run, "reinforce", objective="rwr", **SHORTER)
def test_reward_weighted_regression_learns(found):
    _, curves = found
    scores = programs.values(curves["charts/score"])
    assert sum(scores[-10:]) / 10 > sum(scores[:3]) / 3 + 0.04


@programs.beside(programs.long_run, "reinforce", reward="process", baseline="value", **SHORTER)
def test_a_process_reward_is_learned(found):
    _, curves = found
    scores = programs.values(curves["charts/true_score"])
    assert sum(scores[-10:]) / 10 > sum(scores[:3]) / 3 + 0.08


VALUE = {"baseline": "value", "vf_coef": 1.0, "batch_size": 128, "total_episodes": 3840}


@programs.beside(programs.long_run, "reinforce", **VALUE)
def test_the_critic_learns(found):
    _, curves = found
    errors = programs.values(curves["losses/value_loss"])
    assert sum(errors[-10:]) / 10 < 0.7 * errors[0]


def last_values(*tags, **flags):
    """Means over the last five of 40 rollouts."""
    flags |= {"total_episodes": 2560, "batch_size": 64, "sft_steps": 40, "learning_rate": 5e-4}
    _, curves = programs.long_run("reinforce", **flags)
    return [sum(programs.values(curves[tag])[-5:]) / 5 for tag in tags]


def with_and_without_a_price():
    kl, entropy = last_values("charts/kl", "losses/entropy")
    (kl_with_penalty,) = last_values("charts/kl", kl_coef=2.0)
    (entropy_with_bonus,) = last_values("losses/entropy", ent_coef=1.0)
    return kl, kl_with_penalty, entropy, entropy_with_bonus


@programs.beside(with_and_without_a_price)
def test_a_kl_penalty_keeps_the_policy_near_and_a_bonus_raises_the_entropy(found):
    kl, kl_with_penalty, entropy, entropy_with_bonus = found
    assert kl_with_penalty < 0.4 * kl
    assert entropy_with_bonus > entropy + 1


def test_same_seed_same_result(monkeypatch):
    first = run()
    assert run() == first  # with what SFT left the first time
    monkeypatch.setattr(reinforce, "sft", SFT)
    assert run() == first


def outcomes():
    choices = [
        {},
        {"seed": 2},
        {"reward": "process"},
        {"group_size": 8},
        {"baseline": "none"},
        {"baseline": "batch-mean"},
        {"baseline": "running-mean"},
        {"baseline": "value"},
        {"baseline": "value", "vf_coef": 1.0},
        {"gamma": 0.9},
        {"ent_coef": 0.1},
        {"objective": "rwr"},
        {"objective": "rwr", "rwr_temperature": 2.0},
        {"objective": "rwr", "rwr_top_fraction": 0.2},
        {"kl_coef": 1.0},
        {"temperature": 0.5},
        {"max_grad_norm": 0.001},
        {"learning_rate": 1e-4},
        {"batch_size": 32},
        {"total_episodes": 192},
        {"sft_steps": 0},
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        programs.shorten_runs(monkeypatch, Path.cwd(), reinforce)
        return [run(**flags) for flags in choices]


@programs.beside(outcomes)
def test_every_choice_changes_the_outcome(found):
    assert all(math.isfinite(value) for result in found for value in result.values())
    assert len({result["kl"] for result in found}) == len(found)


@pytest.mark.parametrize("baseline", typing.get_args(reinforce.Baseline))
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_reward_that_is_the_same_for_all(monkeypatch, baseline, score):
    def constant(targets, responses):
        return torch.full((len(responses),), score)

    monkeypatch.setattr(reinforce, "reward", constant)
    curves = programs.record_curves(monkeypatch, reinforce)
    result = run(baseline=baseline, kl_coef=0.0, tensorboard=True)
    assert all(math.isfinite(value) for value in result.values())
    for tag, curve in curves.items():
        assert all(math.isfinite(value) for value in programs.values(curve)), tag
    if baseline in ("batch-mean", "leave-one-out"):
        assert programs.values(curves["losses/grad_norm"]) == [0.0, 0.0]
        assert result["kl"] == 0.0


def test_reward_weighted_regression_on_equal_rewards(monkeypatch):
    def zero(targets, responses):
        return torch.zeros(len(responses))

    monkeypatch.setattr(reinforce, "reward", zero)
    result = run(objective="rwr", kl_coef=0.0, rwr_top_fraction=0.1)
    assert all(math.isfinite(value) for value in result.values())


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch, capsys):
    def infinite(rewards, mask, gamma):
        return torch.full_like(rewards, torch.inf)

    monkeypatch.setattr(reinforce, "returns_to_go", infinite)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "rollout 1" in error and "--learning-rate" in error


def test_reference_is_frozen_and_nothing_is_left_behind(monkeypatch, tmp_path):
    programs.check_reference_is_frozen(monkeypatch, run)
    assert list(tmp_path.iterdir()) == []


def test_program_in_a_shell(program):
    """The real command: header, progress, ending; curves and a saved policy that loads safely."""
    saved, _ = programs.check_short_run(reinforce, *program())
    reinforce.GPT().load_state_dict(saved["policy"])
    assert saved["args"]["baseline"] == "leave-one-out"


# ---------------------------------------------------------------------------- Flags
def test_values_at_the_border_are_accepted():
    for flags in (
        {"seed": 0, "kl_coef": 0.0, "sft_steps": 0, "gamma": 0.0, "group_size": 2},
        {"seed": 2**63 - 1, "gamma": 1.0, "total_episodes": 256, "group_size": 256},
        {"baseline": "batch-mean", "batch_size": 2, "group_size": 1},
        {"baseline": "none", "batch_size": 1, "total_episodes": 1, "group_size": 1},
        {"baseline": "value", "vf_coef": 0.0, "ent_coef": 0.0},
        {"objective": "rwr", "rwr_top_fraction": 1.0, "group_size": 1},
        {"objective": "rwr", "rwr_top_fraction": 0.001, "rwr_temperature": 0.01},
    ):
        reinforce.check_args(reinforce.Args(**flags))


NAN = float("nan")
BAD = [
    ({"batch_size": 0}, "--batch-size"),
    ({"batch_size": -4}, "--batch-size"),
    ({"total_episodes": 0}, "--total-episodes"),
    ({"total_episodes": 63}, "--total-episodes"),
    ({"group_size": 0}, "--group-size"),
    ({"group_size": -4}, "--group-size"),
    ({"group_size": 7}, "--group-size"),
    ({"group_size": 1}, "--baseline leave-one-out"),
    ({"baseline": "batch-mean", "batch_size": 1, "group_size": 1}, "--baseline batch-mean"),
    ({"learning_rate": 0.0}, "--learning-rate"),
    ({"learning_rate": 1.0}, "--learning-rate"),
    ({"learning_rate": NAN}, "--learning-rate"),
    ({"max_grad_norm": 0.0}, "--max-grad-norm"),
    ({"max_grad_norm": NAN}, "--max-grad-norm"),
    ({"temperature": 0.0}, "--temperature"),
    ({"temperature": math.inf}, "--temperature"),
    ({"kl_coef": -0.1}, "--kl-coef"),
    ({"kl_coef": NAN}, "--kl-coef"),
    ({"seed": -1}, "--seed"),
    ({"seed": 2**63}, "--seed"),
    ({"sft_steps": -1}, "--sft-steps"),
    ({"gamma": 1.1}, "--gamma"),
    ({"gamma": -0.1}, "--gamma"),
    ({"ent_coef": -0.1}, "--ent-coef"),
    ({"baseline": "value", "vf_coef": -0.1}, "--vf-coef"),
    ({"vf_coef": 0.5}, "--vf-coef"),
    ({"objective": "rwr", "vf_coef": 0.5}, "--vf-coef"),
    ({"objective": "rwr", "baseline": "none"}, "--baseline"),
    ({"objective": "rwr", "baseline": "value"}, "--baseline"),
    ({"rwr_temperature": 1.0}, "--rwr-temperature"),
    ({"objective": "rwr", "rwr_temperature": 0.0}, "--rwr-temperature"),
    ({"rwr_top_fraction": 0.5}, "--rwr-top-fraction"),
    ({"objective": "rwr", "rwr_top_fraction": 0.0}, "--rwr-top-fraction"),
    ({"objective": "rwr", "rwr_top_fraction": 1.1}, "--rwr-top-fraction"),
    ({"device": "cuda"}, "--device cuda"),
]


@pytest.mark.parametrize("flags, named", BAD, ids=str)
def test_bad_flags_end_with_one_line_and_nothing_written(flags, named, capsys, tmp_path):
    if "device" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stop:
        run(**({"tensorboard": True, "save_path": tmp_path / "policy.pt"} | flags))
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--baseline", "best"], ["--objective", "ppo"], ["--clip", "1"]])
def test_the_parser_refuses_unknown_words(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(reinforce.Args, args=words)
    assert stop.value.code == 2
