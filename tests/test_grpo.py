"""grpo.py: its losses against loops, its biases against exact gradients, the program as a whole."""

import itertools
import math

import oracle
import programs
import pytest
import torch
import tyro

import grpo

PROMPT, OTHER_PROMPT = (4, 3, 3), (2, 1, 2)
LOSS_TYPES = ["grpo", "dr-grpo", "dapo", "gspo", "cispo"]


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- Expected gradients


class World:
    """A tabular policy that can write 11 responses, all of them, and their scores."""

    def __init__(self, kind="exact", prompt=PROMPT):
        self.lists = oracle.narrow_responses()
        self.theta = oracle.narrow(oracle.table(0)).requires_grad_()
        everything = oracle.responses()
        rows = [everything.index(y) for y in self.lists]
        self.scores = float64(*[oracle.score(prompt, y, kind) for y in self.lists])
        self.mask = torch.tensor([[t < len(y) for t in range(3)] for y in self.lists])
        self.logprobs = oracle.token_table(self.theta)[rows]
        self.probs = self.logprobs.sum(1).exp().detach()
        self.lengths = self.mask.sum(1)

    def gradient(self, values):
        """Exact gradient of Σ_y p(y) · value(y), by the score function; values: (11,) or (11, 1)"""
        total = self.probs * values * self.logprobs.sum(1)
        return torch.autograd.grad(total.sum(), self.theta, retain_graph=True)[0]

    def expected_gradient(self, size, loss_type, scale):
        """Mean of minus the loss gradient at the old policy, over all groups of the given size."""
        index = torch.cartesian_prod(*[torch.arange(11)] * size)  # (11^G, G)
        chance = self.probs[index].prod(1)
        assert abs(chance.sum() - 1) < 1e-12
        rows = index.flatten()
        # Every group on its own, as a rollout of one group, were it not for the batch scale.
        advantages, _ = grpo.group_advantages(self.scores[rows], size, scale)
        advantages = advantages * (len(index) * chance).repeat_interleave(size)
        logprobs, mask = self.logprobs[rows], self.mask[rows]
        weights = grpo.token_weights(mask, loss_type)
        if loss_type in ("dapo", "cispo"):  # the mean length is that of the one group
            weights = (1 / mask.sum(1).view(-1, size).double().mean(1)).repeat_interleave(size)
        old = logprobs.detach()
        loss, _ = grpo.grpo_loss(logprobs, old, advantages, mask, weights, loss_type, 0.2, 0.2)
        return -torch.autograd.grad(loss, self.theta, retain_graph=True)[0]


def close(found, exact, atol=1e-7):
    torch.testing.assert_close(found, exact, atol=atol, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["exact", "sharp"])
def test_without_scaling_and_with_a_constant_divisor_it_is_the_policy_gradient(size, kind):
    world = World(kind)
    found = world.expected_gradient(size, "dr-grpo", "none")
    close(3 * found, (size - 1) / size * world.gradient(world.scores))


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_bias_of_the_mean_over_each_response(loss_type):
    """Each token's share shrinks with the length of its response: short ones are favoured."""
    world, size = World("sharp"), 3
    found = world.expected_gradient(size, loss_type, "none")
    centred = world.scores - (world.probs * world.scores).sum()
    biased = (size - 1) / size * world.gradient(centred / world.lengths)
    close(found, biased)
    exact = (size - 1) / size * world.gradient(world.scores)
    cosine = torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
    assert 0.5 < cosine < 0.99  # no mere change of scale
    even = torch.cosine_similarity(
        world.expected_gradient(size, "dr-grpo", "none").flatten(), exact.flatten(), dim=0
    )
    assert even > 1 - 1e-9


def solved_by(prompt):
    world = World("exact", prompt)
    return (world.probs * world.scores).sum().item()


def deviation_factor(p, size):
    """What dividing by the group's deviation makes of the gradient of a prompt solved with
    probability p: the mean gap between the advantages of a right and a wrong response."""
    factor = 0.0
    for right in range(size):  # right ones among the others
        chance = math.comb(size - 1, right) * p**right * (1 - p) ** (size - 1 - right)
        gap = 0.0
        for own in (1, 0):
            group = [1.0] * (right + own) + [0.0] * (size - right - own)
            if oracle.deviation(group):
                advantage = (own - sum(group) / size) / oracle.deviation(group)
                gap += advantage if own else -advantage
        factor += chance * gap
    return factor


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("prompt", [PROMPT, OTHER_PROMPT])
def test_bias_of_dividing_by_the_deviation_of_the_group(size, prompt):
    """Each prompt's gradient is multiplied with a factor that depends on how often it is solved."""
    world = World("exact", prompt)
    assert 0.01 < solved_by(prompt) < 0.99
    found = 3 * world.expected_gradient(size, "dr-grpo", "group")
    close(found, deviation_factor(solved_by(prompt), size) * world.gradient(world.scores), 1e-6)


def test_deviation_of_the_group_favours_extreme_prompts_from_four_responses_on():
    hard, even = deviation_factor(0.05, 8), deviation_factor(0.5, 8)
    assert hard > 1.3 * even > 1.3 * 1.8
    for size in (2, 3):  # one against the rest, always: the same for all prompts
        assert deviation_factor(0.05, size) == pytest.approx(deviation_factor(0.5, size))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_all_losses_have_the_policy_gradient_when_responses_are_of_one_length(loss_type):
    theta = oracle.table(0).requires_grad_()
    logprobs = oracle.token_table(theta)[11:]
    advantages = torch.randn(1100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(1100, 3).bool()
    weights = grpo.token_weights(mask, loss_type)
    old = logprobs.detach()
    loss, _ = grpo.grpo_loss(logprobs, old, advantages, mask, weights, loss_type, 0.2, 0.2)
    plain = -(logprobs.sum(1) * advantages).mean() / 3
    close(*(torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (loss, plain)))


# ---------------------------------------------------------------- Group advantages

SCORES = (1, 0, 0, 0, 0.3, 0.3, 0.3, 0.3, 0.9, 0.1, 0.5, 0.5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_advantages_by_loops(scale, size, dtype):
    scores = torch.tensor(SCORES, dtype=dtype)
    found, std = grpo.group_advantages(scores, size, scale)
    expected = oracle.group_advantages(list(SCORES), size, scale)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(found.double(), float64(*expected), atol=tolerance, rtol=0)
    groups = [SCORES[i : i + size] for i in range(0, 12, size)]
    stds = float64(*[oracle.deviation(g) for g in groups])
    torch.testing.assert_close(std.double(), stds, atol=tolerance, rtol=0)
    for i, group in enumerate(groups):
        if len(set(group)) == 1:
            assert (found[i * size : (i + 1) * size] == 0).all() and std[i] == 0


def test_scales_differ_from_each_other():
    found = [
        tuple(grpo.group_advantages(float64(*SCORES), 4, s)[0].tolist())
        for s in ("group", "batch", "none")
    ]
    assert len(set(found)) == 3


def test_two_unlike_responses_get_plus_and_minus_one():
    assert grpo.group_advantages(float64(0, 1), 2, "group")[0].tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("score", [0.0, 1.0, 0.1, 1e30])
def test_nothing_to_compare_gives_exactly_zero(scale, score):
    scores = torch.full((9,), score)  # the mean of three 0.1 is not 0.1
    for size in (1, 3, 9):
        advantages, std = grpo.group_advantages(scores, size, scale)
        assert (advantages == 0).all() and (std == 0).all()
    alone, _ = grpo.group_advantages(torch.randn(9), 1, scale)
    assert (alone == 0).all()


# ---------------------------------------------------------------- Losses


def ragged(seed=0):
    """Log-probabilities, advantages (B,) and a mask of unequal lengths, float64."""
    generator = torch.Generator().manual_seed(seed)
    old, change = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    scores = torch.rand(8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([4, 1, 2, 3, 4, 4, 2, 1])
    return old, old + 0.5 * change, scores, torch.arange(4) < lengths[:, None]


def found_loss(new, old, advantages, mask, loss_type, low=0.2, high=0.3):
    weights = grpo.token_weights(mask, loss_type)
    return grpo.grpo_loss(new, old, advantages, mask, weights, loss_type, low, high)


def lists_of(x, mask):
    return [list(row[real]) for row, real in zip(x, mask, strict=True)]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_and_gradients_by_loops(loss_type, scale):
    old, new, scores, mask = ragged()
    advantages = float64(*oracle.group_advantages(scores.tolist(), 4, scale))
    new.requires_grad_()
    lists = lists_of(new, mask), lists_of(old, mask)
    expected = oracle.grpo_loss(*lists, advantages, loss_type, 0.2, 0.3, 4)
    (gradient,) = torch.autograd.grad(expected, new)
    own, _ = grpo.group_advantages(scores, 4, scale)
    for garbage in (None, 7.0, math.nan):
        fill = lambda x, g=garbage: x if g is None else torch.where(mask, x, g)  # noqa: E731
        x = fill(new.detach()).requires_grad_()
        loss, _ = found_loss(x, fill(old), own, mask, loss_type)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        close(torch.autograd.grad(loss, x)[0], gradient)


def test_losses_differ_from_each_other():
    old, new, scores, mask = ragged()
    losses = {}
    for loss_type, scale in itertools.product(LOSS_TYPES, ["group", "batch", "none"]):
        advantages, _ = grpo.group_advantages(scores, 4, scale)
        losses[loss_type, scale] = found_loss(new, old, advantages, mask, loss_type)[0].item()
    pairs = itertools.combinations(losses.values(), 2)
    assert min(abs(a - b) for a, b in pairs) > 1e-4


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_metrics_of_the_ratio(loss_type):
    old, new, scores, mask = ragged()
    metrics = found_loss(new, old, scores, mask, loss_type)[1]
    ratios = []
    for n, o in zip(lists_of(new, mask), lists_of(old, mask), strict=True):
        own = [math.exp(x - y) for x, y in zip(n, o, strict=True)]
        ratios += [math.prod(own) ** (1 / len(own))] * len(own) if loss_type == "gspo" else own
    outside = [r > 1.3 or (r < 0.8 and loss_type != "cispo") for r in ratios]
    assert metrics["ratio"].item() == pytest.approx(sum(ratios) / len(ratios))
    assert metrics["clipfrac"].item() == pytest.approx(sum(outside) / len(ratios))
    kl = sum(r - 1 - math.log(r) for r in ratios) / len(ratios)
    assert metrics["approx_kl"].item() == pytest.approx(kl) and kl > 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_clipping_each_way(loss_type):
    """Gradient of one token with ratio r and advantage a: where each loss stops pushing."""

    def push(ratio, advantage):
        x = float64(math.log(ratio)).view(1, 1).requires_grad_()
        one = torch.ones(1, 1).bool()
        loss, _ = found_loss(x, torch.zeros_like(x), float64(advantage), one, loss_type)
        return -torch.autograd.grad(loss, x)[0].item()

    if loss_type == "cispo":  # never stops; the weight is bounded above
        for ratio, weight in ((0.1, 0.1), (1.0, 1.0), (1.29, 1.29), (1.31, 1.3), (9.0, 1.3)):
            assert push(ratio, 2.0) == pytest.approx(2 * weight)
            assert push(ratio, -2.0) == pytest.approx(-2 * weight)
        return
    assert push(1.29, 2.0) == pytest.approx(2 * 1.29) and push(1.31, 2.0) == 0
    assert push(0.81, -2.0) == pytest.approx(-2 * 0.81) and push(0.79, -2.0) == 0
    assert push(0.1, 2.0) == pytest.approx(0.2) and push(9.0, -2.0) == pytest.approx(-18)


@pytest.mark.parametrize("loss_type,factor", [("grpo", 0.5), ("gspo", 0.5), ("dr-grpo", 1.0)])
def test_twice_the_tokens(loss_type, factor):
    """A response said twice over: half the pull on each token under grpo, the same under dr-grpo"""
    old = torch.zeros(2, 6, dtype=torch.float64)
    gradients = []
    for lengths in ([2, 3], [4, 3]):
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        new = old.clone().requires_grad_()
        loss, _ = found_loss(new, old, float64(1, -1), mask, loss_type)
        gradients.append(torch.autograd.grad(loss, new)[0])
    assert gradients[1][0, 0] == pytest.approx(factor * gradients[0][0, 0].item())
    assert gradients[1][1, 0] == pytest.approx(gradients[0][1, 0].item())  # the other response
    assert gradients[1][0, 3] == gradients[1][0, 0] != 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kind", ["k2", "k3", "k3-unbiased"])
def test_gradients_of_minibatches_average_to_that_of_the_rollout(loss_type, kind):
    old, new, scores, mask = ragged()
    new.requires_grad_()
    advantages, _ = grpo.group_advantages(scores, 4, "group")
    weights, ref = grpo.token_weights(mask, loss_type), old.flip(0)

    def loss(i):
        rows = (new[i], old[i], advantages[i], mask[i], weights[i])
        kl = grpo.kl_loss(new[i], old[i], ref[i], mask[i], weights[i], kind)
        return grpo.grpo_loss(*rows, loss_type, 0.2, 0.2)[0] + kl

    (whole,) = torch.autograd.grad(loss(slice(None)), new)
    parts = [torch.autograd.grad(loss([i, 7 - i]), new)[0] for i in range(4)]  # groups are split
    torch.testing.assert_close(sum(parts) / 4, whole)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_starts_at_zero_but_not_its_gradient(loss_type):
    old, _, scores, _ = ragged()
    new, mask = old.clone().requires_grad_(), torch.ones(8, 4).bool()
    advantages, _ = grpo.group_advantages(scores, 4, "group")
    loss, metrics = found_loss(new, old, advantages, mask, loss_type)
    assert metrics["ratio"] == 1 and metrics["clipfrac"] == 0 and metrics["approx_kl"] == 0
    assert loss_type == "cispo" or abs(loss.item()) < 1e-7  # cispo's is A log π
    assert torch.autograd.grad(loss, new)[0].abs().max() > 0.01


# ---------------------------------------------------------------- The KL in the loss


def visits(logits):
    """How often each of the 111 prefixes is visited."""
    found = torch.zeros(111, dtype=torch.float64)
    for y, p in zip(
        oracle.responses(), oracle.token_table(logits).sum(1).exp().tolist(), strict=True
    ):
        for t in range(len(y)):
            found[oracle.row(y[:t])] += p
    return found


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", ["k2", "k3", "k3-unbiased"])
def test_gradient_of_the_kl_by_enumeration(kind, moved):
    """With the prefixes those of the old policy: exact also away from it for k3-unbiased alone."""
    old, reference = oracle.table(0), oracle.table(1)
    theta = (old + (0.5 * oracle.table(2) if moved else 0.0)).requires_grad_()
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in oracle.responses()])
    tables = [oracle.token_table(x) for x in (theta, old, reference)]
    chance = tables[1].sum(1).exp()
    loss = grpo.kl_loss(*tables, mask, 1111 * chance, kind)
    (found,) = torch.autograd.grad(loss, theta, retain_graph=True)
    policy, other = theta.log_softmax(1), reference.log_softmax(1)
    rows = {
        True: (policy.exp() * (policy - other)).sum(1),
        False: (other.exp() * (other - policy)).sum(1),
    }
    forward = (visits(old) * rows[True]).sum()
    (exact,) = torch.autograd.grad(forward, theta, retain_graph=True)
    (reverse,) = torch.autograd.grad((visits(old) * rows[False]).sum(), theta)
    if kind == "k3-unbiased":
        assert loss.item() == pytest.approx(forward.item())  # right in value, too
        close(found, exact)
    elif kind == "k3":
        assert (found - exact).abs().max() > 1e-2
        if not moved:
            close(found, reverse)
    elif not moved:
        close(found, exact)
    else:
        assert (found - exact).abs().max() > 1e-3


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kind", ["k2", "k3", "k3-unbiased"])
def test_kl_by_loops_weighed_as_the_policy_loss(kind, loss_type):
    old, new, _, mask = ragged()
    ref = ragged(1)[0]
    terms = []
    for n, o, r in zip(*(lists_of(x, mask) for x in (new, old, ref)), strict=True):
        row = []
        for x, y, z in zip(n, o, r, strict=True):
            k3 = math.exp(z - x) - 1 + x - z
            row.append(
                {"k2": (x - z) ** 2 / 2, "k3": k3, "k3-unbiased": math.exp(x - y) * k3}[kind]
            )
        terms.append(row)
    length = {"dr-grpo": 4, "dapo": mask.sum() / 8, "cispo": mask.sum() / 8}
    expected = sum(sum(row) / length.get(loss_type, len(row)) for row in terms) / 8
    weights = grpo.token_weights(mask, loss_type)
    for garbage in (0.0, math.nan):
        x = torch.where(mask, new, garbage).requires_grad_()
        rest = [torch.where(mask, v, garbage) for v in (old, ref)]
        loss = grpo.kl_loss(x, *rest, mask, weights, kind)
        assert loss.item() == pytest.approx(float(expected), abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.isfinite().all() and (gradient[~mask] == 0).all()


# ---------------------------------------------------------------- The program


warm_start = grpo.warm_start


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    yield from programs.start(f"grpo.py {programs.SHORT_RUN}", tmp_path_factory.mktemp("program"))


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, grpo)


def run(**flags):
    """Train for two rollouts of 64 unless told otherwise; the result without the time taken."""
    defaults = {"batch_size": 64, "total_episodes": 128, "sft_steps": 20, "tensorboard": False}
    result = grpo.main(grpo.Args(**(defaults | {"num_minibatches": 2} | flags)))
    return {name: value for name, value in result.items() if name != "seconds"}


def logged(calls, name):
    """The curve of one metric."""
    return [
        float(torch.as_tensor(c["metrics"][name]).detach())
        for c in calls["write"]
        if name in c["metrics"]
    ]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_the_loop_passes_on(monkeypatch, loss_type):
    names = "reward group_advantages grpo_loss kl_loss token_weights write"
    calls = programs.record(monkeypatch, grpo, *names.split())
    run(
        loss_type=loss_type,
        scale_rewards="group",
        kl_estimator="k3",
        clip_coef=0.1,
        clip_coef_high=0.4,
        group_size=4,
        update_epochs=3,
        temperature=0.7,
        reward="sharp",
    )
    rollouts = [c for c in calls["reward"] if len(c["prompts"]) == 64]
    assert len(calls["group_advantages"]) == len(calls["token_weights"]) == 2
    assert len(calls["grpo_loss"]) == len(calls["kl_loss"]) == 2 * 3 * 2
    for step in range(2):
        prompts = rollouts[step]["prompts"].view(16, 4, 3)
        assert (prompts == prompts[:, :1]).all() and len(prompts.unique(dim=0)) > 8
        given = calls["group_advantages"][step]
        assert given["group_size"] == 4 and given["scale"] == "group"
        expected = oracle.group_advantages(given["scores"].tolist(), 4, "group")
        losses, kls = (calls[n][6 * step : 6 * step + 6] for n in ("grpo_loss", "kl_loss"))
        for epoch in range(3):  # each response once a pass
            found = torch.cat([c["advantages"] for c in losses[2 * epoch : 2 * epoch + 2]])
            assert sorted(found.tolist()) == pytest.approx(sorted(expected), abs=1e-4)
        for c, k in zip(losses, kls, strict=True):
            assert (c["clip_low"], c["clip_high"], c["loss_type"]) == (0.1, 0.4, loss_type)
            assert k["kind"] == "k3" and torch.equal(c["weights"], k["weights"])
            assert torch.equal(c["logprobs"], k["logprobs"]) and c["logprobs"].requires_grad
            assert torch.equal(c["old_logprobs"], k["old_logprobs"])
            if step == 0:  # the reference is still the old policy
                real = k["mask"]
                torch.testing.assert_close(k["ref_logprobs"][real], k["old_logprobs"][real])
        first, real = losses[0], losses[0]["mask"]
        torch.testing.assert_close(first["logprobs"][real], first["old_logprobs"][real])
        assert not torch.allclose(losses[-1]["logprobs"], losses[-1]["old_logprobs"])
    assert not torch.allclose(kls[0]["ref_logprobs"], kls[0]["old_logprobs"])
    assert logged(calls, "ratio_first") == pytest.approx([1, 1], abs=1e-6)
    assert logged(calls, "kl_loss")[0] > 0


def test_upper_clip_is_the_lower_one_unless_given(monkeypatch):
    calls = programs.record(monkeypatch, grpo, "grpo_loss")
    run(clip_coef=0.3)
    assert all(c["clip_low"] == c["clip_high"] == 0.3 for c in calls["grpo_loss"])


def test_group_statistics_are_logged(monkeypatch):
    calls = programs.record(monkeypatch, grpo, "write", "group_advantages")
    run(group_size=4)
    for step in range(2):
        scores = calls["group_advantages"][step]["scores"].view(16, 4).tolist()
        stds = [oracle.deviation(g) for g in scores]
        assert logged(calls, "reward_std")[step] == pytest.approx(sum(stds) / 16, abs=1e-6)
        zeros = sum(len(set(g)) == 1 for g in scores) / 16
        assert logged(calls, "frac_zero_std")[step] == pytest.approx(zeros)
        assert 0 < zeros < 1


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_groups_of_equal_scores_leave_the_policy_where_it_is(monkeypatch, loss_type):
    advantages = grpo.group_advantages
    equal = lambda scores, *how: advantages(torch.full_like(scores, 0.3), *how)  # noqa: E731
    monkeypatch.setattr(grpo, "group_advantages", equal)
    result = run(kl_coef=0.0, loss_type=loss_type)
    assert abs(result["kl"]) < 1e-3  # nothing but weight decay moves it
    assert all(math.isfinite(v) for name, v in result.items() if name != "optimality")


def test_kl_coefficient_holds_the_policy_back():
    flags = {"total_episodes": 960, "learning_rate": 5e-4}
    assert run(kl_coef=2.0, **flags)["kl"] < 0.5 * run(**flags)["kl"]


def test_success_rises_from_the_warm_start():
    result = grpo.main(grpo.Args(total_episodes=7_680, learning_rate=1e-3, tensorboard=False))
    assert 0.4 < result["success_before"] < 0.8
    assert result["success"] > result["success_before"] + 0.1
    assert 0.2 < result["optimality"] <= 1
    assert result["objective"] == pytest.approx(result["score"] - 0.05 * result["kl"])


def test_same_seed_same_result_other_seed_another(monkeypatch):
    first = run()
    monkeypatch.setattr(grpo, "warm_start", warm_start)
    assert run() == first
    assert run(seed=2) != first


CHOICES = [
    {"reward": "sharp"},
    {"reward": "distance"},
    {"group_size": 8},
    {"group_size": 2},
    {"update_epochs": 2},
    {"num_minibatches": 1},
    {"scale_rewards": "group"},
    {"scale_rewards": "batch"},
    {"clip_coef": 0.01},
    {"clip_coef_high": 0.01},
    {"kl_estimator": "k2"},
    {"kl_estimator": "k3"},
    {"kl_coef": 1.0},
    {"temperature": 0.5},
    {"max_grad_norm": 0.001},
    {"learning_rate": 1e-4},
    {"batch_size": 32},
    {"total_episodes": 192},
    {"sft_steps": 0},
]


def test_every_flag_and_choice_changes_the_outcome():
    results = [run(), *[run(**flags) for flags in CHOICES]]
    assert all(math.isfinite(value) for result in results for value in result.values())
    assert len({result["entropy"] for result in results}) == len(results)


def test_every_loss_type_trains_to_another_policy():
    flags = {"clip_coef": 0.05, "sft_steps": 10, "reward": "distance"}
    results = [run(loss_type=kind, **flags)["entropy"] for kind in LOSS_TYPES]
    assert len(set(results)) == 5 and all(map(math.isfinite, results))


BAD = {
    "batch_size": [0, 1000],
    "total_episodes": [0, 10],
    "group_size": [0, 1, 7],
    "num_minibatches": [0, 7],
    "update_epochs": [0],
    "learning_rate": [0.0, float("nan"), float("inf")],
    "max_grad_norm": [0.0],
    "temperature": [0.0],
    "kl_coef": [-1.0],
    "seed": [-1],
    "sft_steps": [-1],
    "clip_coef": [0.0],
    "clip_coef_high": [0.0, float("nan")],
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
    grpo.check_args(grpo.Args(seed=0, kl_coef=0.0, sft_steps=0, group_size=2, update_epochs=1))
    grpo.check_args(grpo.Args(seed=2**63 - 1, total_episodes=256, num_minibatches=256))


@pytest.mark.parametrize(
    "words", [["--loss-type", "ppo"], ["--kl-estimator", "k1"], ["--gae", "1"]]
)
def test_bad_words_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(grpo.Args, args=words)
    assert stop.value.code == 2


def test_program_in_a_shell(program):
    """The real command: header, progress, verdict; events and a saved model that loads safely."""
    saved, _ = programs.check_short_run(grpo, *program())
    grpo.GPT().load_state_dict(saved["policy"])
    assert saved["args"]["batch_size"] == "64"


def test_logged_metrics(monkeypatch):
    calls = programs.record(monkeypatch, grpo, "write")
    run()
    found = {(c["group"], name) for c in calls["write"] for name in c["metrics"]}
    charts = "score score_std kl kl_coef response_length eos_rate learning_rate episodes_per_second"
    losses = "policy_loss kl_loss entropy approx_kl clipfrac grad_norm ratio_first"
    wanted = {("charts", name) for name in charts.split()}
    assert wanted | {("losses", name) for name in losses.split()} <= found


def test_the_learning_rate_rises_then_falls(monkeypatch):
    calls = programs.record(monkeypatch, grpo, "write")
    run(batch_size=64, total_episodes=20 * 64)
    done = [(k + 0.5) / 20 for k in range(20)]
    rates = [grpo.Args.learning_rate * (10 * p if p < 1 / 11 else 1 - p) for p in done]
    assert logged(calls, "learning_rate") == pytest.approx(rates)


def test_the_pictures_show_the_policy_before_and_after(monkeypatch):
    programs.check_policy_images(monkeypatch, grpo, lambda: run(tensorboard=True))


def test_reference_is_frozen_and_nothing_is_left_behind(monkeypatch, tmp_path):
    programs.check_reference_is_frozen(monkeypatch, run)
    assert list(tmp_path.iterdir()) == []


def test_steps_taken_and_a_bad_one_stops_the_run(monkeypatch):
    steps = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: steps.append(1) or clip(*a))
    run(update_epochs=3, num_minibatches=4)
    assert len(steps) == 2 * 3 * 4
    infinite = lambda p, r, kind="exact": torch.where(p[:, 0] > 4, torch.inf, 0.0)  # noqa: E731
    monkeypatch.setattr(grpo, "group_advantages", lambda s, *_: (s * math.inf, s[:1]))
    monkeypatch.setattr(grpo, "reward", infinite)
    with pytest.raises(SystemExit) as stop:
        run()
    assert "rollout 1" in str(stop.value.code) and "--learning-rate" in str(stop.value.code)
