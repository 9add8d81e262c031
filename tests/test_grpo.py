"""grpo.py: losses against loops, expected gradients against exact ones, training step by step."""

import copy
import itertools
import math
from pathlib import Path

import oracle
import programs
import pytest
import torch
import tyro

import grpo

PROMPT = (4, 3, 3)
OTHER_PROMPT = (2, 1, 2)
EOS = 10
LOSS_TYPES = ["grpo", "dr-grpo", "dapo", "gspo", "cispo"]
SCALES = ["none", "group", "batch"]
SAMPLED_ESTIMATORS = ["k2", "k3", "k3-iw"]


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, exact, atol=1e-7):
    torch.testing.assert_close(found, exact, atol=atol, rtol=0)


# ---------------------------------------------------------------------------- Expected gradients
class World:
    """A tabular policy that can write 11 responses, and the score of each."""

    def __init__(self, kind="exact", prompt=PROMPT):
        responses = oracle.narrow_responses()
        everything = oracle.responses()
        rows = [everything.index(y) for y in responses]
        self.theta = oracle.narrow(oracle.table(0)).requires_grad_()
        self.reference = oracle.narrow(oracle.table(1))
        self.scores = float64(*[oracle.score(prompt, y, kind) for y in responses])
        self.mask = torch.tensor([[t < len(y) for t in range(3)] for y in responses])
        self.logprobs = oracle.token_table(self.theta)[rows]
        self.ref_logprobs = oracle.token_table(self.reference)[rows]
        self.probs = self.logprobs.sum(1).exp().detach()
        self.lengths = self.mask.sum(1)

    def gradient(self, values):
        """Exact gradient of Σ_y p(y) · value(y), where the values (11,) are constants."""
        total = (self.probs * values * self.logprobs.sum(1)).sum()
        return torch.autograd.grad(total, self.theta, retain_graph=True)[0]

    def expected_gradient(self, group_size, loss_type, scale_rewards):
        """Mean of minus the loss's gradient at π = π_old, over all groups of the given size."""
        groups = torch.cartesian_prod(*[torch.arange(11)] * group_size)  # (11^G, G)
        chance = self.probs[groups].prod(1)
        assert abs(chance.sum() - 1) < 1e-12
        rows = groups.flatten()
        mask = self.mask[rows]
        logprobs = self.logprobs[rows]
        advantages = grpo.group_advantages(self.scores[rows], group_size, scale_rewards)
        # The loss is a mean over the groups. Turn it into the sum of chance times loss.
        advantages = advantages * (len(groups) * chance).repeat_interleave(group_size)
        weights = grpo.compute_loss_weights(mask, loss_type)
        if loss_type in ("dapo", "cispo"):  # each group is a rollout of its own
            mean_length = mask.sum(1).view(-1, group_size).double().mean(1)
            weights = (1 / mean_length).repeat_interleave(group_size)
        old_logprobs = logprobs.detach()
        loss, _ = grpo.grpo_loss(
            logprobs, old_logprobs, advantages, mask, weights, loss_type, 0.2, 0.2
        )
        return -torch.autograd.grad(loss, self.theta, retain_graph=True)[0]


def cosine(x, y):
    return torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["exact", "sharp"])
def test_dr_grpo_without_scaling_is_the_policy_gradient_shrunk_to_its_share(size, kind):
    world = World(kind)
    found = 3 * world.expected_gradient(size, "dr-grpo", "none")
    close(found, (size - 1) / size * world.gradient(world.scores), 1e-8)


def test_multiplying_the_kl_coefficient_by_the_same_share_undoes_the_shrinking():
    """Reward and KL then have the gradient of R - β·KL, times (G-1)/G."""
    world = World("sharp")
    size = 3
    beta = 0.3
    share = (size - 1) / size
    chance = 11 * world.probs
    penalty = grpo.kl_penalty(
        world.logprobs, world.logprobs.detach(), world.ref_logprobs, world.mask, "k3-iw"
    )
    kl = (grpo.masked_sum(penalty, world.mask) * chance).mean()
    (kl_gradient,) = torch.autograd.grad(kl, world.theta, retain_graph=True)
    found = 3 * world.expected_gradient(size, "dr-grpo", "none") - share * beta * kl_gradient
    close(found, share * (world.gradient(world.scores) - beta * kl_gradient))
    shrunk = 3 * world.expected_gradient(size, "dr-grpo", "none") - beta * kl_gradient
    close(shrunk, share * (world.gradient(world.scores) - beta / share * kl_gradient))


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_a_mean_over_each_response_favours_short_ones(loss_type):
    """The gradient is that of score / length. Weighing all tokens alike has no such bias."""
    world = World("sharp")
    size = 3
    found = world.expected_gradient(size, loss_type, "none")
    centred = world.scores - (world.probs * world.scores).sum()
    close(found, (size - 1) / size * world.gradient(centred / world.lengths), 1e-8)
    exact = world.gradient(world.scores)
    assert 0.5 < cosine(found, exact) < 0.99  # no mere change of scale
    assert cosine(world.expected_gradient(size, "dr-grpo", "none"), exact) > 1 - 1e-9


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_a_mean_over_all_tokens_of_a_large_rollout_has_no_such_bias(loss_type):
    """With one divisor for the rollout it is dr-grpo's gradient times 3 / mean length."""
    world = World("sharp")
    mask = world.mask.repeat(3, 1)
    scores = world.scores.repeat(3)
    logprobs = world.logprobs.repeat(3, 1)
    chance = world.probs.repeat(3)
    gradients = []
    for name in (loss_type, "dr-grpo"):
        weights = grpo.compute_loss_weights(mask, name)
        loss, _ = grpo.grpo_loss(
            logprobs, logprobs.detach(), chance * scores, mask, weights, name, 0.2, 0.2
        )
        gradients.append(torch.autograd.grad(loss, world.theta, retain_graph=True)[0])
    close(gradients[0], gradients[1] * 3 / mask.sum(1).double().mean())


def success_probability(prompt):
    world = World("exact", prompt)
    return (world.probs * world.scores).sum().item()


def deviation_factor(p, size):
    """By what dividing by the group's deviation multiplies the gradient of a prompt.

    The prompt is solved with probability p. The factor is the mean gap between the advantages of a
    right and a wrong response in a group whose other members are sampled.
    """
    factor = 0.0
    for right in range(size):  # right ones among the other members
        chance = math.comb(size - 1, right) * p**right * (1 - p) ** (size - 1 - right)
        gap = 0.0
        for own in (1, 0):
            group = [1.0] * (right + own) + [0.0] * (size - right - own)
            if oracle.deviation(group) > 0:
                advantage = (own - sum(group) / size) / oracle.deviation(group)
                gap += advantage if own == 1 else -advantage
        factor += chance * gap
    return factor


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("prompt", [PROMPT, OTHER_PROMPT])
def test_dividing_by_the_deviation_of_the_group_weighs_prompts_by_how_often_they_are_solved(
    size, prompt
):
    world = World("exact", prompt)
    p = success_probability(prompt)
    assert 0.01 < p < 0.99
    found = 3 * world.expected_gradient(size, "dr-grpo", "group")
    close(found, deviation_factor(p, size) * world.gradient(world.scores))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_all_losses_have_the_policy_gradient_when_responses_have_one_length(loss_type):
    theta = oracle.table(0).requires_grad_()
    logprobs = oracle.token_table(theta)[11:]
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(1100, generator=generator, dtype=torch.float64)
    mask = torch.ones(1100, 3, dtype=torch.bool)
    weights = grpo.compute_loss_weights(mask, loss_type)
    loss, _ = grpo.grpo_loss(
        logprobs, logprobs.detach(), advantages, mask, weights, loss_type, 0.2, 0.2
    )
    plain = -(logprobs.sum(1) * advantages).mean() / 3
    (found,) = torch.autograd.grad(loss, theta, retain_graph=True)
    (exact,) = torch.autograd.grad(plain, theta)
    close(found, exact)


# ---------------------------------------------------------------------------- Group advantages
SCORES = (1, 0, 0, 0, 0.3, 0.3, 0.3, 0.3, 0.9, 0.1, 0.5, 0.5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_advantages_by_loops(scale, size, dtype):
    found = grpo.group_advantages(torch.tensor(SCORES, dtype=dtype), size, scale)
    expected = float64(*oracle.group_advantages(list(SCORES), size, scale))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-7
    close(found.double(), expected, tolerance)
    assert found.shape == (12,)


def test_two_unlike_responses_get_plus_and_minus_one():
    """The deviation is over N; over N - 1 they would get ± 0.71."""
    assert grpo.group_advantages(float64(0, 1), 2, "group").tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("score", [0.0, 1.0, 0.1, -3.7, 1e30])
@pytest.mark.parametrize("size", [2, 3, 9, 18])
def test_equal_scores_have_an_advantage_of_exactly_zero(scale, score, size):
    scores = torch.full((18,), score)  # in floating point the mean of three 0.1 is not 0.1
    assert (grpo.group_advantages(scores, size, scale) == 0).all()


@pytest.mark.parametrize("scale", SCALES)
def test_one_group_of_equal_scores_beside_others(scale):
    scores = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.2, 0.1])
    advantages = grpo.group_advantages(scores, 3, scale)
    assert (advantages[:3] == 0).all()
    assert (advantages[3:].abs() > 1e-3).all()


@pytest.mark.parametrize("scale", SCALES)
def test_a_constant_for_each_prompt_changes_no_advantage_unless_scaled_by_the_batch(scale):
    scores = float64(*SCORES)
    shift = float64(5.0, -2.0, 0.5).repeat_interleave(4)
    before = grpo.group_advantages(scores, 4, scale)
    after = grpo.group_advantages(scores + shift, 4, scale)
    assert torch.allclose(before, after, atol=1e-6) == (scale != "batch")


# ---------------------------------------------------------------------------- Losses
def ragged(seed=0):
    """Old and new log-probabilities (8, 4), scores (8,) and a mask of unequal lengths; float64."""
    generator = torch.Generator().manual_seed(seed)
    old, change = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    scores = torch.rand(8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([4, 1, 2, 3, 4, 4, 2, 1])
    mask = torch.arange(4) < lengths[:, None]
    return old, old + 0.5 * change, scores, mask


def loss_and_metrics(new, old, advantages, mask, loss_type, low=0.2, high=0.3):
    weights = grpo.compute_loss_weights(mask, loss_type)
    return grpo.grpo_loss(new, old, advantages, mask, weights, loss_type, low, high)


def token_lists(x, mask):
    """The unmasked tokens of each response, as lists."""
    return [list(row[real]) for row, real in zip(x, mask, strict=True)]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_weights_by_loops(loss_type):
    *_, mask = ragged()
    weights = grpo.compute_loss_weights(mask, loss_type)
    lengths = [4, 1, 2, 3, 4, 4, 2, 1]
    close(weights.double(), float64(*oracle.token_weights(lengths, loss_type, 4)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_and_gradients_by_loops(loss_type, scale):
    old, new, scores, mask = ragged()
    new.requires_grad_()
    advantages = float64(*oracle.group_advantages(scores.tolist(), 4, scale))
    expected = oracle.grpo_loss(
        token_lists(new, mask), token_lists(old, mask), advantages, loss_type, 0.2, 0.3, 4
    )
    (gradient,) = torch.autograd.grad(expected, new)
    found_advantages = grpo.group_advantages(scores, 4, scale)
    for garbage in (0.0, 7.0, math.nan):  # what lies after EOS changes nothing
        x = torch.where(mask, new.detach(), garbage).requires_grad_()
        y = torch.where(mask, old, garbage)
        loss, metrics = loss_and_metrics(x, y, found_advantages, mask, loss_type)
        close(loss.double(), expected.detach())
        close(torch.autograd.grad(loss, x)[0], gradient)
        assert all(metric.isfinite() for metric in metrics.values())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_metrics_by_loops(loss_type):
    """approx_kl and ratio are of the token ratios whatever the loss clips; clipfrac is of that."""
    old, new, scores, mask = ragged()
    _, metrics = loss_and_metrics(new, old, scores, mask, loss_type)
    token_ratios = []
    outside = []
    for new_list, old_list in zip(token_lists(new, mask), token_lists(old, mask), strict=True):
        ratios = [math.exp(x - y) for x, y in zip(new_list, old_list, strict=True)]
        token_ratios += ratios
        if loss_type == "gspo":
            ratios = [math.prod(ratios) ** (1 / len(ratios))] * len(ratios)
        for ratio in ratios:
            outside.append(ratio > 1.3 or (ratio < 0.8 and loss_type != "cispo"))
    n = len(token_ratios)
    kl = sum(ratio - 1 - math.log(ratio) for ratio in token_ratios) / n
    assert metrics["approx_kl"].item() == pytest.approx(kl, abs=1e-9)
    assert metrics["ratio"].item() == pytest.approx(sum(token_ratios) / n, abs=1e-9)
    assert metrics["clipfrac"].item() == pytest.approx(sum(outside) / n, abs=1e-6)
    assert 0 < sum(outside) < n
    assert not any(metric.requires_grad for metric in metrics.values())


def test_approx_kl_of_gspo_is_not_that_of_the_mean_ratio():
    """Tokens that move in opposite directions leave the response's ratio at 1."""
    new = float64(0.3, -0.3).view(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    _, metrics = loss_and_metrics(new, torch.zeros_like(new), float64(1.0), mask, "gspo")
    assert metrics["approx_kl"].item() == pytest.approx(math.cosh(0.3) - 1)
    assert metrics["clipfrac"] == 0


def token_push(ratio, advantage, loss_type, low, high):
    """Minus the loss's gradient in log π of the one token of a response."""
    x = float64(math.log(ratio)).view(1, 1).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = loss_and_metrics(
        x, torch.zeros_like(x), float64(advantage), mask, loss_type, low, high
    )
    return -torch.autograd.grad(loss, x)[0].item()


@pytest.mark.parametrize("loss_type", ["grpo", "dr-grpo", "dapo", "gspo"])
def test_the_push_stops_at_the_bound_that_the_advantage_points_to(loss_type):
    limits = (loss_type, 0.2, 0.3)
    assert token_push(1.29, 2.0, *limits) == pytest.approx(2 * 1.29)
    assert token_push(1.31, 2.0, *limits) == 0
    assert token_push(0.81, -2.0, *limits) == pytest.approx(-2 * 0.81)
    assert token_push(0.79, -2.0, *limits) == 0
    assert token_push(0.1, 2.0, *limits) == pytest.approx(0.2)
    assert token_push(9.0, -2.0, *limits) == pytest.approx(-18)


@pytest.mark.parametrize("low", [0.2, 0.9])
def test_cispo_never_stops_pushing_and_reads_only_the_upper_bound(low):
    for ratio, weight in ((0.1, 0.1), (1.0, 1.0), (1.29, 1.29), (1.31, 1.3), (9.0, 1.3)):
        assert token_push(ratio, 2.0, "cispo", low, 0.3) == pytest.approx(2 * weight)
        assert token_push(ratio, -2.0, "cispo", low, 0.3) == pytest.approx(-2 * weight)
    assert token_push(9.0, 2.0, "cispo", low, 0.5) == pytest.approx(2 * 1.5)


@pytest.mark.parametrize("loss_type,factor", [("grpo", 0.5), ("gspo", 0.5), ("dr-grpo", 1.0)])
def test_a_response_of_twice_the_tokens(loss_type, factor):
    """Each of its tokens is pushed half as much under grpo and gspo, as much under dr-grpo."""
    gradients = []
    for lengths in ([2, 3], [4, 3]):
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        new = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
        loss, _ = loss_and_metrics(new, new.detach(), float64(1, -1), mask, loss_type)
        gradients.append(torch.autograd.grad(loss, new)[0])
    short, long = gradients
    assert long[0, 0].item() == pytest.approx(factor * short[0, 0].item())
    assert long[1, 0].item() == pytest.approx(short[1, 0].item())  # the other response
    assert long[0, 3] == long[0, 0] != 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("estimator", SAMPLED_ESTIMATORS)
def test_gradients_of_minibatches_average_to_that_of_the_rollout(loss_type, estimator):
    old, new, scores, mask = ragged()
    new.requires_grad_()
    ref = old.flip(0)
    advantages = grpo.group_advantages(scores, 4, "group")
    weights = grpo.compute_loss_weights(mask, loss_type)

    def gradient(rows):
        loss, _ = grpo.grpo_loss(
            new[rows], old[rows], advantages[rows], mask[rows], weights[rows], loss_type, 0.2, 0.2
        )
        penalty = grpo.kl_penalty(new[rows], old[rows], ref[rows], mask[rows], estimator)
        kl_loss = (grpo.masked_sum(penalty, mask[rows]) * weights[rows]).mean()
        return torch.autograd.grad(loss + kl_loss, new)[0]

    whole = gradient(list(range(8)))
    parts = [gradient([i, 7 - i]) for i in range(4)]  # groups are split
    close(sum(parts) / 4, whole)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_value_of_the_loss_at_the_first_step(loss_type):
    """Zero for the means over each response; for the others only if all lengths are equal."""
    old, _, scores, mask = ragged()
    new = old.clone().requires_grad_()
    advantages = grpo.group_advantages(scores, 4, "group")
    loss, metrics = loss_and_metrics(new, old, advantages, mask, loss_type)
    assert metrics["ratio"] == 1
    assert metrics["clipfrac"] == 0
    assert metrics["approx_kl"] == 0
    assert (abs(loss.item()) < 1e-7) == (loss_type in ("grpo", "gspo"))
    assert torch.autograd.grad(loss, new)[0].abs().max() > 0.01


# ---------------------------------------------------------------------------- The KL in the loss
def prefix_visits(logits):
    """Expected number of visits to each of the 111 prefixes."""
    visits = torch.zeros(111, dtype=torch.float64)
    probs = oracle.token_table(logits).sum(1).exp().tolist()
    for response, p in zip(oracle.responses(), probs, strict=True):
        for t in range(len(response)):
            visits[oracle.row(response[:t])] += p
    return visits


def padded_table(table):
    """Rows (1111, 3, 11) of a table of logits at the prefixes of all responses, 0 after EOS."""
    rows = torch.zeros(1111, 3, 11, dtype=torch.float64)
    for i, response in enumerate(oracle.responses()):
        for t in range(len(response)):
            rows[i, t] = table[oracle.row(response[:t])]
    return rows


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("estimator", [*SAMPLED_ESTIMATORS, "full"])
def test_gradient_of_the_kl_by_enumeration(estimator, moved):
    """With prefixes of the old policy. Away from it, only k3-iw and full are right."""
    old = oracle.table(0)
    reference = oracle.table(1)
    theta = (old + 0.5 * moved * oracle.table(2)).requires_grad_()
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in oracle.responses()])
    chance = oracle.token_table(old).sum(1).exp()
    if estimator == "full":
        penalty = grpo.token_kl(padded_table(theta), padded_table(reference))
    else:
        tables = [oracle.token_table(x) for x in (theta, old, reference)]
        penalty = grpo.kl_penalty(*tables, mask, estimator)
    loss = (grpo.masked_sum(penalty, mask) * 1111 * chance).mean()
    (found,) = torch.autograd.grad(loss, theta, retain_graph=True)

    log_p = theta.log_softmax(1)
    log_q = reference.log_softmax(1)
    visits = prefix_visits(old)
    forward = (visits * (log_p.exp() * (log_p - log_q)).sum(1)).sum()
    reverse = (visits * (log_q.exp() * (log_q - log_p)).sum(1)).sum()
    (exact,) = torch.autograd.grad(forward, theta, retain_graph=True)
    (reverse_gradient,) = torch.autograd.grad(reverse, theta)
    if estimator in ("k3-iw", "full"):
        assert loss.item() == pytest.approx(forward.item())  # right in value, too
        close(found, exact, 1e-9)
    elif estimator == "k3":
        assert (found - exact).abs().max() > 1e-2
        if not moved:
            close(found, reverse_gradient, 1e-9)
    elif not moved:
        close(found, exact, 1e-9)
    else:
        assert (found - exact).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", SAMPLED_ESTIMATORS)
def test_kl_penalty_by_loops(estimator):
    old, new, _, mask = ragged()
    ref = ragged(1)[0]
    expected = torch.zeros(8, 4, dtype=torch.float64)
    for i, t in itertools.product(range(8), range(4)):
        if mask[i, t]:
            tokens = (new[i, t].item(), old[i, t].item(), ref[i, t].item())
            expected[i, t] = oracle.kl_penalty(*tokens, estimator)
    for garbage in (0.0, math.nan, -math.inf):
        x = torch.where(mask, new, garbage).requires_grad_()
        y = torch.where(mask, old, garbage)
        z = torch.where(mask, ref, garbage)
        penalty = grpo.kl_penalty(x, y, z, mask, estimator)
        close(torch.where(mask, penalty, 0.0), expected, 1e-9)
        (gradient,) = torch.autograd.grad(grpo.masked_sum(penalty, mask).sum(), x)
        assert gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).all()


# ---------------------------------------------------------------------------- Training, replayed
sft = grpo.sft


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, grpo)


def run(**flags):
    """Train for two rollouts of 64 unless told otherwise."""
    defaults = {
        "batch_size": 64,
        "total_episodes": 128,
        "num_minibatches": 2,
        "update_epochs": 1,
        "learning_rate": 2e-3,
        "sft_steps": 20,
        "tensorboard": False,
    }
    return grpo.main(grpo.Args(**(defaults | flags)))


def all_logits(policy, prompts, responses, temperature):
    """Logits (B, 3, 11) of each response token, from the policy's outputs at all positions."""
    tokens = torch.cat([prompts, responses], 1)
    return policy.head(policy(tokens))[:, 2:5] / temperature


def three_scores(targets, responses):
    """Stands for the task's reward: 0, ½ or 1, whatever the length, so that groups are mixed."""
    return ((targets + responses[:, 0]) % 3) / 2


def learned_scores(prompts, responses):
    """Stands for a reward model; its scores are of another scale than the task's."""
    return (5 * (prompts * responses).double().sin().sum(1)).detach()


class Adam:
    """Adam by its definition (Kingma & Ba 2015, algorithm 1), without weight decay."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.means = [torch.zeros_like(p) for p in parameters]
        self.squares = [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients, learning_rate):
        self.steps += 1
        for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            self.means[i] = 0.9 * self.means[i] + 0.1 * gradient
            self.squares[i] = 0.99 * self.squares[i] + 0.01 * gradient**2
            mean = self.means[i] / (1 - 0.9**self.steps)
            square = self.squares[i] / (1 - 0.99**self.steps)
            parameter -= learning_rate * mean / (square.sqrt() + 1e-8)


def replay(args, policy, rollouts, permutations):
    """Train the policy by loops on the responses that the script sampled. Returns the curves.

    rollouts: (prompts, responses) of each rollout. permutations: one for each pass over a rollout.
    """
    reference = copy.deepcopy(policy)
    parameters = list(policy.parameters())
    optimizer = Adam(parameters)
    permutations = iter(permutations)
    high = args.clip_coef if args.clip_coef_high is None else args.clip_coef_high
    size = args.batch_size
    minibatch_size = size // args.num_minibatches
    curves = {}

    def log(tag, value):
        curves.setdefault(tag, []).append(value)

    def mean(values):
        return sum(values) / len(values)

    for rollout, (prompts, responses) in enumerate(rollouts):
        lists = [tuple(y) for y in responses.tolist()]
        lengths = [[*y, EOS].index(EOS) + 1 for y in lists]
        lengths = [min(n, 3) for n in lengths]
        targets = [20 - sum(prompt) for prompt in prompts.tolist()]
        true_scores = [((x + y[0]) % 3) / 2 for x, y in zip(targets, lists, strict=True)]
        scores = true_scores
        if args.reward_model is not None:
            scores = learned_scores(prompts, responses).tolist()
        advantages = oracle.group_advantages(scores, args.group_size, args.scale_rewards)
        weights = oracle.token_weights(lengths, args.loss_type, 3)
        with torch.no_grad():
            old = all_logits(policy, prompts, responses, args.temperature).log_softmax(2)
            ref = all_logits(reference, prompts, responses, args.temperature).log_softmax(2)

        # Peak after a tenth of the rollouts, here the first one; then linear decay.
        learning_rate = args.learning_rate * (len(rollouts) - rollout) / len(rollouts)
        steps = []
        for _ in range(args.update_epochs):
            permutation = next(permutations).tolist()
            for start in range(0, size, minibatch_size):
                minibatch = permutation[start : start + minibatch_size]
                logits = all_logits(
                    policy, prompts[minibatch], responses[minibatch], args.temperature
                )
                new = logits.log_softmax(2)
                policy_loss = 0.0
                kl_loss = 0.0
                entropy = 0.0
                log_ratios = []
                clipped = []
                for row, i in enumerate(minibatch):
                    tokens = range(lengths[i])
                    new_list = [new[row, t, lists[i][t]] for t in tokens]
                    old_list = [old[i, t, lists[i][t]] for t in tokens]
                    ref_list = [ref[i, t, lists[i][t]] for t in tokens]
                    terms, outside = oracle.grpo_terms(
                        new_list, old_list, advantages[i], args.loss_type, args.clip_coef, high
                    )
                    policy_loss = policy_loss - weights[i] * sum(terms) / minibatch_size
                    for t in tokens:
                        if args.kl_estimator == "full":
                            kl = (new[row, t].exp() * (new[row, t] - ref[i, t])).sum()
                        else:
                            kl = oracle.kl_penalty(
                                new_list[t], old_list[t], ref_list[t], args.kl_estimator
                            )
                        kl_loss = kl_loss + weights[i] * kl / minibatch_size
                        entropy -= (new[row, t].exp() * new[row, t]).sum().item() / minibatch_size
                        log_ratios.append((new_list[t] - old_list[t]).item())
                    clipped += outside
                loss = policy_loss + args.kl_coef * kl_loss
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                gradients = [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(parameters, gradients, strict=True)
                ]
                norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
                scale = min(1.0, args.max_grad_norm / norm)
                optimizer.step([scale * g for g in gradients], learning_rate)
                steps.append(
                    {
                        "policy_loss": policy_loss.item(),
                        "kl_loss": kl_loss.item(),
                        "entropy": entropy,
                        "grad_norm": norm,
                        "approx_kl": mean([math.exp(x) - 1 - x for x in log_ratios]),
                        "clipfrac": mean([float(x) for x in clipped]),
                        "ratio": mean([math.exp(x) for x in log_ratios]),
                    }
                )

        kl = 0.0
        for i in range(size):
            for t in range(lengths[i]):
                kl += float(old[i, t, lists[i][t]] - ref[i, t, lists[i][t]]) / size
        groups = [scores[i : i + args.group_size] for i in range(0, size, args.group_size)]
        log("charts/score", mean(scores))
        log("charts/true_score", mean(true_scores))
        log("charts/kl", kl)
        log("charts/response_length", mean(lengths))
        log("charts/learning_rate", learning_rate)
        log("charts/equal_groups", mean([float(len(set(group)) == 1) for group in groups]))
        for name in steps[0]:
            log(f"losses/{name}", mean([step[name] for step in steps]))
        log("losses/ratio_first", steps[0]["ratio"])
    return curves


@pytest.fixture
def double():
    """Scripts make their policies in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


REPLAYED = [
    {},
    {"loss_type": "dapo", "kl_estimator": "full", "scale_rewards": "group", "temperature": 0.7},
    {"loss_type": "gspo", "kl_estimator": "k3", "scale_rewards": "batch", "clip_coef": 0.02},
    {"loss_type": "cispo", "kl_estimator": "k2", "group_size": 8, "clip_coef": 0.02},
    {"loss_type": "dr-grpo", "kl_estimator": "full", "reward_model": Path("some.pt")},
    {"clip_coef": 0.03, "clip_coef_high": 0.01, "max_grad_norm": 0.05, "temperature": 1.3},
]


@pytest.mark.parametrize("flags", REPLAYED, ids=str)
def test_training_by_loops(monkeypatch, double, flags):
    """Every number that a run logs, and the policy that it ends with, from its responses."""
    args = grpo.Args(
        **(
            {
                "batch_size": 24,
                "total_episodes": 72,
                "num_minibatches": 3,
                "update_epochs": 2,
                "learning_rate": 3e-3,
                "kl_coef": 0.4,
                "sft_steps": 2,
                "seed": 6,
            }
            | flags
        )
    )
    loaded = []

    def load(path, device):
        loaded.append((path, device))
        return learned_scores

    monkeypatch.setattr(grpo, "load_reward_model", load)
    monkeypatch.setattr(grpo, "reward", three_scores)
    curves = programs.record_curves(monkeypatch, grpo)
    rollouts = programs.spy_on_rollouts(monkeypatch, grpo, before=lambda *a: copy.deepcopy(a[0]))
    evaluations = programs.record(monkeypatch, grpo, "evaluate")["evaluate"]
    permutations = programs.spy(monkeypatch, torch, "randperm")
    grpo.main(args)

    assert loaded == [(path, "cpu") for path in [args.reward_model] if path is not None]
    assert len(rollouts) == 3
    assert len(permutations) == 6
    for (_, prompts, temperature), _, _ in rollouts:
        groups = prompts.view(-1, args.group_size, 3)
        assert (groups == groups[:, :1]).all()
        assert temperature == args.temperature
    data = [(prompts, responses) for (_, prompts, _), responses, _ in rollouts]
    policy = rollouts[0][2]
    found = evaluations[1]["policy"]
    expected = replay(args, policy, data, [result for _, result, _ in permutations])

    for tag, values in expected.items():
        assert programs.values(curves[tag]) == pytest.approx(values, rel=1e-5, abs=2e-5), tag
        assert [step for step, _ in curves[tag]] == [24, 48, 72]
    other = {"charts/episodes_per_second"}
    other |= {f"eval/{name}" for name in ("success", "success_error", "kl", "kl_error")}
    assert curves.keys() == expected.keys() | other
    prompts, responses = data[-1]
    with torch.no_grad():
        close(
            all_logits(found, prompts, responses, 1.0),
            all_logits(policy, prompts, responses, 1.0),
            2e-5,
        )
    for call in evaluations:
        assert call["temperature"] == args.temperature
        assert len(call["prompts"]) == 3  # the held-out ones that shorten_runs() leaves
    assert len(set(expected["charts/response_length"])) > 1  # responses of unequal lengths
    assert expected["losses/clipfrac"][-1] > 0


# ---------------------------------------------------------------------------- The program
@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    yield from programs.start(f"grpo.py {programs.SHORT_RUN}", tmp_path_factory.mktemp("program"))


def test_program_in_a_shell(program):
    """The real command: what it prints, its events, and a saved file that loads safely."""
    saved, _ = programs.check_short_run(grpo, *program())
    policy = grpo.GPT()
    policy.load_state_dict(saved["policy"])
    grpo.GPT().load_state_dict(saved["reference"])
    assert saved["args"]["batch_size"] == "64"
    assert not torch.equal(saved["policy"]["head.weight"], saved["reference"]["head.weight"])


def test_learning_rate_reaches_its_peak_and_decays(monkeypatch):
    curves = programs.record_curves(monkeypatch, grpo)
    run(
        batch_size=8, total_episodes=40 * 8, learning_rate=0.1, max_grad_norm=1e-9, tensorboard=True
    )
    rates = programs.values(curves["charts/learning_rate"])
    expected = [0.025, 0.05, 0.075, 0.1]
    for rollout in range(5, 41):
        expected.append(0.1 * (41 - rollout) / 37)
    assert rates == pytest.approx(expected)
    assert max(rates) == pytest.approx(0.1)


def test_the_split_is_used_as_it_is_meant(monkeypatch):
    """SFT and rollouts see training prompts alone; the evaluations see held-out ones."""
    train, _, test, _ = grpo.make_prompts("cpu")
    train = {tuple(prompt) for prompt in train.tolist()}
    fitted = programs.record(monkeypatch, grpo, "sft")["sft"]
    rollouts = programs.spy_on_rollouts(monkeypatch, grpo)
    evaluations = programs.record(monkeypatch, grpo, "evaluate")["evaluate"]
    run(sft_steps=3, batch_size=2048, total_episodes=2048, group_size=2)
    assert fitted[0]["steps"] == 3
    assert {tuple(prompt) for prompt in fitted[0]["prompts"].tolist()} == train
    for call in evaluations:
        assert torch.equal(call["prompts"], test)
    ((_, prompts, _), _, _) = rollouts[0]
    seen = {tuple(prompt) for prompt in prompts.tolist()}
    assert seen <= train
    assert len(seen) > 500  # of 729, in 1024 draws


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equal_scores_leave_the_policy_where_it_is(monkeypatch, loss_type):
    """No advantage, no KL penalty and no weight decay: not a bit of it changes."""
    monkeypatch.setattr(grpo, "reward", lambda targets, responses: torch.full((len(targets),), 0.1))
    result = run(kl_coef=0.0, loss_type=loss_type, scale_rewards="group", save_path=Path("p.pt"))
    assert result["kl"] == 0
    saved = torch.load("p.pt", weights_only=True)
    for name, weight in saved["reference"].items():
        assert torch.equal(weight, saved["policy"][name]), name


def test_kl_coefficient_holds_the_policy_back():
    flags = {"total_episodes": 960, "learning_rate": 5e-4}
    assert run(kl_coef=2.0, **flags)["kl"] < 0.5 * run(**flags)["kl"]


@programs.beside(programs.long_run, "grpo", total_episodes=6_400, batch_size=128)
def test_success_rises(found):
    result, _ = found
    assert 0.4 < result["success_before"] < 0.8
    assert result["success"] > result["success_before"] + 0.1


def test_same_seed_same_result_other_seed_another(monkeypatch):
    first = run()
    monkeypatch.setattr(grpo, "sft", sft)
    assert run() == first
    assert run(seed=2) != first


CHOICES = [
    {"group_size": 8},
    {"update_epochs": 2},
    {"num_minibatches": 1},
    {"scale_rewards": "group"},
    {"scale_rewards": "batch"},
    {"loss_type": "dr-grpo"},
    {"loss_type": "dapo"},
    {"loss_type": "gspo"},
    {"loss_type": "cispo"},
    {"clip_coef": 0.01},
    {"clip_coef_high": 0.01},
    {"loss_type": "cispo", "clip_coef": 0.01},
    {"kl_estimator": "k2"},
    {"kl_estimator": "k3"},
    {"kl_estimator": "full"},
    {"kl_coef": 1.0},
    {"temperature": 0.5},
    {"max_grad_norm": 0.001},
    {"learning_rate": 1e-4},
    {"batch_size": 32},
    {"total_episodes": 192},
    {"sft_steps": 0},
]


def outcomes():
    with pytest.MonkeyPatch.context() as monkeypatch:
        programs.shorten_runs(monkeypatch, Path.cwd(), grpo)
        monkeypatch.setattr(grpo, "reward", three_scores)
        return [run(sft_steps=2), *[run(**({"sft_steps": 2} | flags)) for flags in CHOICES]]


@programs.beside(outcomes)
def test_every_flag_and_choice_changes_the_outcome(found):
    for result in found:
        assert all(math.isfinite(value) for value in result.values())
    assert len({result["kl"] for result in found}) == len(found)


BAD = {
    "batch_size": [0, 1000],
    "total_episodes": [0, 10],
    "group_size": [0, 1, 7, -4],
    "num_minibatches": [0, 7, -2],
    "update_epochs": [0],
    "learning_rate": [0.0, 1.0, float("nan"), float("inf")],
    "max_grad_norm": [0.0, float("nan")],
    "temperature": [0.0, float("inf")],
    "kl_coef": [-1.0, float("nan")],
    "seed": [-1, 2**63],
    "sft_steps": [-1],
    "clip_coef": [0.0, float("inf")],
    "clip_coef_high": [0.0, float("nan")],
    "device": ["cuda"],
    "save_path": [Path("missing/p.pt"), Path("note.txt/p.pt"), Path(".")],
}


@pytest.mark.parametrize("flag,value", [(f, v) for f, values in BAD.items() for v in values])
def test_bad_values_end_with_one_line_and_nothing_written(flag, value, capsys, tmp_path):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(SystemExit) as stop:
        run(**({"tensorboard": True} | {flag: value}))
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    named = "total-episodes" if value == 1000 else flag.replace("_", "-")
    assert error.startswith(f"error: --{named}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_values_at_the_border_are_taken():
    grpo.check_args(grpo.Args(seed=0, kl_coef=0.0, sft_steps=0, group_size=2, update_epochs=1))
    grpo.check_args(grpo.Args(seed=2**63 - 1, total_episodes=64, batch_size=64, num_minibatches=64))
    grpo.check_args(grpo.Args(batch_size=64, group_size=64, num_minibatches=1, clip_coef_high=2.0))


@pytest.mark.parametrize(
    "words", [["--loss-type", "ppo"], ["--kl-estimator", "k1"], ["--gae-lambda", "1"]]
)
def test_unknown_words_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(grpo.Args, args=words)
    assert stop.value.code == 2


def test_reference_is_frozen_and_nothing_is_left_behind(monkeypatch, tmp_path):
    programs.check_reference_is_frozen(monkeypatch, run)
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch, capsys):
    def infinite(scores, *_):
        return torch.full_like(scores, math.inf)

    monkeypatch.setattr(grpo, "group_advantages", infinite)
    with pytest.raises(SystemExit) as stop:
        run(save_path=Path("p.pt"))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "rollout 1" in error and "--learning-rate" in error
    assert not Path("p.pt").exists()
