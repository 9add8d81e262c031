"""ppo.py against exact values: every expectation is a sum over all 1111 responses."""

import math

import oracle
import pytest
import torch

import ppo

PROMPT = (4, 3, 3)
BETA = 0.1


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def world():
    """A tabular policy and reference, with all responses, masks, log-probabilities and scores."""
    theta = oracle.table(0).requires_grad_()
    reference = oracle.table(1)
    lists = oracle.responses()
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in lists])
    scores = float64(*[oracle.score(PROMPT, y, "sharp") for y in lists])
    return theta, reference, lists, mask, scores


def exact_gradient(theta, reference, scores, beta=BETA):
    (gradient,) = torch.autograd.grad(oracle.objective(theta, reference, scores, beta), theta)
    return gradient


def expected_gradient(theta, losses):
    """Gradient of Σ_y p(y) · loss(y), the weights held fixed."""
    weights = oracle.token_table(theta).sum(1).exp().detach()
    (gradient,) = torch.autograd.grad((weights * torch.stack(losses)).sum(), theta)
    return gradient


# ---------------------------------------------------------------- The task


def test_prompts_are_the_912_solvable_ones_and_split_without_overlap():
    train, held_out = ppo.make_prompts()
    every = {tuple(p) for p in train.tolist()} | {tuple(p) for p in held_out.tolist()}
    solvable = {
        (a, b, c)
        for a in range(10)
        for b in range(10)
        for c in range(10)
        if any(a + b + c + d + e == 20 for d in range(10) for e in range(10))
    }
    assert (len(train), len(held_out)) == (729, 183)
    assert every == solvable and len(every) == 912


def test_demonstrations_are_all_the_right_answers():
    train, _ = ppo.make_prompts()
    prompts, responses = ppo.make_demonstrations(train[:50])
    found = {(*p, *r) for p, r in zip(prompts.tolist(), responses.tolist(), strict=True)}
    expected = {
        (*p, *y)
        for p in map(tuple, train[:50].tolist())
        for y in oracle.responses()
        if oracle.score(p, y) == 1
    }
    assert found == expected and len(prompts) == len(expected)


@pytest.mark.parametrize("kind", ["exact", "sharp", "distance"])
def test_reward_of_every_response(kind):
    responses = ppo.all_responses()
    scores = ppo.reward(torch.tensor([PROMPT]).expand(len(responses), 3), responses, kind)
    expected = [oracle.score(PROMPT, y, kind) for y in map(real_tokens, responses.tolist())]
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_process_reward_pays_half_for_a_solvable_digit_and_half_for_the_sum():
    prompts = torch.tensor([PROMPT] * 6)  # 10 is missing
    responses = torch.tensor(
        [[7, 3, 10], [7, 4, 10], [0, 3, 10], [1, 9, 3], [10, 10, 10], [9, 10, 10]]
    )
    expected = [[0.5, 0, 0.5], [0.5, 0, 0], [0, 0, 0], [0.5, 0, 0], [0, 0, 0], [0.5, 0, 0]]
    torch.testing.assert_close(ppo.process_reward(prompts, responses), torch.tensor(expected))
    too_much = ppo.process_reward(torch.tensor([[9, 9, 0]]), torch.tensor([[3, 0, 10]]))
    assert too_much.sum() == 0


# ---------------------------------------------------------------- Responses and masks


def real_tokens(response):
    """A padded response as the tuple of its real tokens."""
    return tuple(response[: response.index(10) + 1]) if 10 in response else tuple(response)


def test_all_responses_are_enumerated_once():
    listed = [real_tokens(y) for y in ppo.all_responses().tolist()]
    assert len(listed) == 1111 and set(listed) == set(oracle.responses())


def test_mask_ends_with_the_first_eos():
    responses = torch.tensor(
        [[1, 2, 10], [1, 10, 10], [10, 10, 10], [1, 2, 3], [1, 10, 5], [10, 3, 10]]
    )
    expected = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert ppo.response_mask(responses).tolist() == [[bool(x) for x in r] for r in expected]


def brute_force_distribution(gpt, prompt, temperature):
    """Log-probability of each response from one forward pass a token, no sharing."""
    logprobs = {}  # of the next token, by prefix
    for prefix in {real_tokens(y)[:t] for y in ppo.all_responses().tolist() for t in range(3)}:
        if 10 not in prefix:
            logits = gpt.head(gpt(torch.tensor([[*prompt, *prefix]])))[0, -1]
            logprobs[prefix] = (logits / temperature).log_softmax(0).tolist()
    lists = [real_tokens(y) for y in ppo.all_responses().tolist()]
    return [sum(logprobs[y[:t]][token] for t, token in enumerate(y)) for y in lists]


def make_gpt(seed=3):
    torch.manual_seed(seed)
    gpt = ppo.GPT().double()
    for block in gpt.blocks:  # which are the identity at first, and would hide a mistake
        torch.nn.init.normal_(block.proj.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    return gpt


@torch.no_grad()
def test_gpt_is_the_transformer_that_it_says():
    gpt, tokens = make_gpt(), [4, 3, 3, 7, 10, 1]
    for name, x in gpt.named_parameters():  # norms and biases that do something
        if x.dim() == 1:
            torch.nn.init.normal_(x, mean=float("norm" in name and "weight" in name), std=0.3)
    expected = torch.stack(oracle.gpt_states(gpt.state_dict(), tokens, heads=4))
    for length in (1, 3, 6):
        found = gpt(torch.tensor([tokens[:length], [0] * length]))[0]
        torch.testing.assert_close(found, expected[:length], atol=1e-9, rtol=0)
        for n in range(1, length + 1):  # the last n alone
            last = gpt(torch.tensor([tokens[:length]]), n)[0]
            torch.testing.assert_close(last, expected[length - n : length], atol=1e-9, rtol=0)


@torch.no_grad()
def test_distribution_is_that_of_one_pass_a_token():
    gpt = make_gpt()
    expected = brute_force_distribution(gpt, PROMPT, 0.7)
    found = ppo.response_distribution(gpt, torch.tensor([[1, 2, 3], PROMPT]), 0.7)[1]
    torch.testing.assert_close(found, float64(*expected), atol=1e-9, rtol=0)
    assert abs(found.exp().sum().item() - 1) < 1e-12


@torch.no_grad()
def test_token_logprobs_are_those_of_the_distribution():
    gpt, responses = make_gpt(), ppo.all_responses()
    prompts = torch.tensor([PROMPT]).expand(len(responses), 3)
    logits = gpt.head(ppo.response_states(gpt, prompts, responses)) / 0.7
    logprobs = ppo.token_logprobs(logits, responses)
    total = ppo.masked_sum(logprobs, ppo.response_mask(responses))
    torch.testing.assert_close(total, ppo.response_distribution(gpt, prompts[:1], 0.7)[0])


@torch.no_grad()
@pytest.mark.parametrize("separate", [False, True])
def test_values_are_of_what_precedes_each_token(separate):
    gpt, prompts = make_gpt(), torch.tensor([PROMPT])
    critic = ppo.GPT(outputs=1).double() if separate else torch.nn.Linear(64, 1).double()
    responses = torch.tensor([[7, 3, 10]])
    states = ppo.response_states(gpt, prompts, responses)
    values = ppo.token_values(critic, states, prompts, responses)
    for t in range(3):
        tokens = torch.cat([prompts, responses[:, :t]], 1)
        torch.testing.assert_close(states[0, t], gpt(tokens)[0, -1])
        value = critic.head(critic(tokens)) if separate else critic(gpt(tokens))
        torch.testing.assert_close(values[0, t], value[0, -1, 0])


def test_samples_follow_the_distribution_at_the_temperature():
    gpt, n = make_gpt().float(), 10_000
    gpt.head.bias.data[10] = 1.0  # so that short responses occur often
    torch.manual_seed(0)
    samples, _ = ppo.generate_with_states(gpt, torch.tensor([PROMPT]).expand(n, 3), 0.5)
    assert (samples[:, 1:][samples[:, :-1] == 10] == 10).all()  # EOS stays EOS
    counts = dict.fromkeys(oracle.responses(), 0)
    for y in samples.tolist():
        counts[real_tokens(y)] += 1
    probs = ppo.response_distribution(gpt, torch.tensor([PROMPT]), 0.5)[0].exp().tolist()
    for y, p in zip(ppo.all_responses().tolist(), probs, strict=True):
        assert abs(counts[real_tokens(y)] / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-3


@torch.no_grad()
def test_samples_come_with_the_states_that_chose_them():
    gpt, (prompts, _) = make_gpt(), ppo.make_prompts()
    gpt.head.bias[10] = 1.0  # so that short responses occur often
    responses, states = ppo.generate_with_states(gpt, prompts, 0.7)
    assert len(ppo.response_mask(responses).sum(1).unique()) == 3
    torch.testing.assert_close(states, ppo.response_states(gpt, prompts, responses))


def test_what_follows_eos_does_not_reach_the_real_tokens():
    gpt = make_gpt()
    clean, dirty = torch.tensor([[1, 10, 10]]), torch.tensor([[1, 10, 7]])
    states = [ppo.response_states(gpt, torch.tensor([PROMPT]), y) for y in (clean, dirty)]
    assert torch.equal(states[0], states[1])  # the last token is never read


# ---------------------------------------------------------------- KL


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimators_are_unbiased(world, kind):
    theta, reference, _, mask, _ = world
    logprobs, ref = oracle.token_table(theta).detach(), oracle.token_table(reference)
    mean = (
        logprobs.sum(1).exp() * ppo.masked_sum(ppo.kl_estimate(logprobs, ref, kind), mask)
    ).sum()
    exact = (logprobs.sum(1).exp() * (logprobs - ref).sum(1)).sum()
    assert abs(mean - exact) < 1e-10


def test_kl_estimators_by_hand():
    logprobs, ref = float64(math.log(0.5)), float64(math.log(0.25))
    values = {kind: ppo.kl_estimate(logprobs, ref, kind).item() for kind in ("k1", "k2", "k3")}
    assert values["k1"] == pytest.approx(math.log(2))
    assert values["k2"] == pytest.approx(math.log(2) ** 2 / 2)
    assert values["k3"] == pytest.approx(0.5 - 1 + math.log(2))  # ratio π_ref/π = 0.5


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradient_of_each_estimator_as_a_loss(world, kind):
    theta, reference, lists, mask, _ = world
    logprobs, ref = oracle.token_table(theta), oracle.token_table(reference)
    kl = ppo.masked_sum(ppo.kl_estimate(logprobs, ref, kind), mask)
    found = expected_gradient(theta, list(kl))
    # The exact one: at each prefix, weighted with how often it is visited, a KL of two rows.
    policy, other = theta.log_softmax(1), reference.log_softmax(1)
    visits = torch.zeros(111, dtype=torch.float64)
    for y, p in zip(lists, logprobs.sum(1).exp().tolist(), strict=True):
        for t in range(len(y)):
            visits[oracle.row(y[:t])] += p
    rows = {
        "k1": (0.0 * policy).sum(1),
        "k2": (policy.exp() * (policy - other)).sum(1),
        "k3": (other.exp() * (other - policy)).sum(1),
    }[kind]
    (exact,) = torch.autograd.grad((visits * rows).sum(), theta)
    torch.testing.assert_close(found, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kl", [0.5, 0.21, 0.2, 0.19, 0.01])
def test_adaptive_kl(kl):
    controller = ppo.AdaptiveKL(0.05, 0.2, 1000)
    controller.update(kl, 100)
    error = max(-0.2, min(0.2, kl / 0.2 - 1))
    assert controller.coef == pytest.approx(0.05 * (1 + error * 0.1))


def test_without_a_target_the_coefficient_stays():
    controller = ppo.AdaptiveKL(0.05, None, 1000)
    controller.update(3.0, 100)
    assert controller.coef == 0.05


# ---------------------------------------------------------------- Rewards and advantages


def test_score_is_paid_at_the_last_real_token():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, math.nan], [0.1, math.nan, math.nan]])
    rewards = ppo.token_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, mask, 0.5)
    expected = [[-0.05, -0.1, 0.85], [-0.05, 1.9, 0], [2.95, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))
    process = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    rewards = ppo.token_rewards(process, kl, mask, 0.5)
    expected = [[0.95, 1.9, 2.85], [0.95, 1.9, 0], [0.95, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


@pytest.mark.parametrize("gamma,gae_lambda", [(1.0, 1.0), (1.0, 0.9), (0.9, 0.95), (0.7, 0.0)])
def test_gae_with_unequal_lengths(gamma, gae_lambda):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    lengths = [5, 1, 3, 2, 4, 5]
    mask = torch.tensor([[t < n for t in range(5)] for n in lengths])
    for garbage in (0.0, 99.0, math.nan):
        found = ppo.compute_gae(
            torch.where(mask, rewards, garbage),
            torch.where(mask, values, garbage),
            mask,
            gamma,
            gae_lambda,
        )
        for i, n in enumerate(lengths):
            expected = oracle.gae(
                rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, gae_lambda
            )
            torch.testing.assert_close(found[0][i, :n], float64(*expected))
            torch.testing.assert_close(found[1][i, :n], float64(*expected) + values[i, :n])
            assert (found[0][i, n:] == 0).all() and (found[1][i, n:] == 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_counts_real_tokens_only(shift_mean):
    x = float64(1, 2, 4, 8, 3, 3).view(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    mean, std = 15 / 4, math.sqrt((1 + 4 + 16 + 64) / 4 - (15 / 4) ** 2)
    expected = [(v - mean * shift_mean) / std for v in (1, 2, 4, 8)]
    for garbage in (0.0, math.nan):
        found = ppo.whiten(torch.where(mask, x, garbage), mask, shift_mean)
        torch.testing.assert_close(found, float64(*expected, 0, 0).view(2, 3))


# ---------------------------------------------------------------- Losses


def losses_of_all(world, values, gae_lambda):
    """PPO's loss of every single response at the old policy, KL in the reward."""
    theta, reference, _, mask, scores = world
    logprobs = oracle.token_table(theta)
    kl = ppo.kl_estimate(logprobs.detach(), oracle.token_table(reference), "k1")
    rewards = ppo.token_rewards(scores, kl, mask, BETA)
    advantages, _ = ppo.compute_gae(rewards, values, mask, 1.0, gae_lambda)
    old = logprobs.detach()
    rows = [slice(i, i + 1) for i in range(len(mask))]
    return [ppo.policy_loss(logprobs[i], old[i], advantages[i], mask[i], 0.2)[0] for i in rows]


@pytest.mark.parametrize("gae_lambda", [1.0, 0.9, 0.0])
def test_expected_gradient_with_the_exact_critic(world, gae_lambda):
    theta, reference, lists, _, scores = world
    table = oracle.state_values(theta.detach(), reference, scores, BETA)
    values = oracle.padded([[table[y[:t]] for t in range(len(y))] for y in lists])
    found = expected_gradient(theta, losses_of_all(world, values, gae_lambda))
    torch.testing.assert_close(-found, exact_gradient(theta, reference, scores), atol=1e-10, rtol=0)


def test_expected_gradient_with_any_critic_when_lambda_is_one(world):
    theta, reference, lists, _, scores = world
    table = torch.randn(111, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = oracle.padded([[table[oracle.row(y[:t])] for t in range(len(y))] for y in lists])
    found = expected_gradient(theta, losses_of_all(world, values, 1.0))
    torch.testing.assert_close(-found, exact_gradient(theta, reference, scores), atol=1e-10, rtol=0)
    biased = expected_gradient(theta, losses_of_all(world, values, 0.5))
    assert (biased - found).abs().max() > 1e-3  # λ < 1 trusts the critic


def test_exact_gradient_agrees_with_finite_differences(world):
    theta, reference, _, _, scores = world
    gradient = exact_gradient(theta, reference, scores)
    for place in ((0, 7), (8, 3), (11 + 73, 10)):
        ends = []
        for sign in (1, -1):
            moved = theta.detach().clone()
            moved[place] += sign * 1e-5
            ends.append(oracle.objective(moved, reference, scores, BETA))
        assert abs((ends[0] - ends[1]) / 2e-5 - gradient[place]) < 1e-8


def tutorial_loss(old, new, rewards):
    """The hand-worked example: advantage is the reward of the word, clip 0.1."""
    old, new, rewards = (float64(*x).view(1, -1) for x in (old, new, rewards))
    return ppo.policy_loss(new.log(), old.log(), rewards, torch.ones_like(rewards).bool(), 0.1)[
        0
    ].item()


def test_figures_of_the_tutorial():
    assert tutorial_loss([0.3], [0.6], [1]) == pytest.approx(-1.10)
    old = [0.9, 0.95, 0.4, 0.25, 0.33, 0.45, 0.4, 0.15, 0.3]
    new = [0.9, 0.95, 0.6, 0.55, 0.5, 0.65, 0.3, 0.2, 0.6]
    rewards = [0, 0, 0, 1, 0, 0, 0, 0, 1]
    old2, new2 = [0.9, 0.95, 0.3, 0.25, 0.2], [0.9, 0.95, 0.66, 0.55, 0.75]
    rewards2 = [0, 0, 0, 0, -1]
    assert tutorial_loss(old, new, rewards) == pytest.approx(-2.20)
    assert tutorial_loss(old2, new2, rewards2) == pytest.approx(3.75)
    pad = [1.0] * 4
    batch = [
        float64(*a, *b, *pad).view(2, 9) for a, b in ((old, old2), (new, new2), (rewards, rewards2))
    ]
    mask = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    loss, _ = ppo.policy_loss(batch[1].log(), batch[0].log(), batch[2], mask, 0.1)
    assert loss.item() == pytest.approx(0.775)  # printed there as -0.77


def ragged(seed=0):
    """Random log-probabilities, advantages and a mask of unequal lengths, float64."""
    generator = torch.Generator().manual_seed(seed)
    old, change, advantages = torch.randn(3, 8, 4, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([4, 1, 2, 3, 4, 4, 2, 1])
    return old, old + 0.5 * change, advantages, torch.arange(4) < lengths[:, None]


@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_policy_loss_and_its_metrics_by_loops(dual_clip):
    old, new, advantages, mask = ragged()
    for garbage in (None, 7.0, math.nan):
        fill = lambda x, g=garbage: x if g is None else torch.where(mask, x, g)  # noqa: E731
        logprobs = fill(new).requires_grad_()
        loss, metrics = ppo.policy_loss(logprobs, fill(old), fill(advantages), mask, 0.2, dual_clip)
        total, ratios = 0.0, []
        for i in range(8):
            for t in range(int(mask[i].sum())):
                ratio = (new[i, t] - old[i, t]).exp().item()
                ratios.append(ratio)
                total += oracle.clipped_objective(ratio, advantages[i, t].item(), 0.2, dual_clip)
        n = len(ratios)
        assert loss.item() == pytest.approx(-total / 8)
        assert metrics["ratio"].item() == pytest.approx(sum(ratios) / n)
        assert metrics["clipfrac"].item() == pytest.approx(
            sum(abs(r - 1) > 0.2 for r in ratios) / n
        )
        expected = sum(r - 1 - math.log(r) for r in ratios) / n
        assert metrics["approx_kl"].item() == pytest.approx(expected) and expected > 0
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert gradient.isfinite().all() and (gradient[~mask] == 0).all()


def test_dual_clip_binds():
    old, new, advantages, mask = ragged()
    plain, bounded = (ppo.policy_loss(new, old, advantages, mask, 0.2, c)[0] for c in (None, 1.2))
    assert bounded < plain


def test_value_loss_by_loops():
    old, values, returns, mask = ragged(1)
    for garbage in (0.0, math.nan):
        found = torch.where(mask, values, garbage).requires_grad_()
        rest = [torch.where(mask, x, garbage) for x in (old, returns)]
        loss = ppo.value_loss(found, *rest, mask, 0.2)
        total = 0.0
        for i in range(8):
            for t in range(int(mask[i].sum())):
                v, o, r = values[i, t].item(), old[i, t].item(), returns[i, t].item()
                clipped = o + max(-0.2, min(0.2, v - o))
                total += 0.5 * max((v - r) ** 2, (clipped - r) ** 2)
        assert loss.item() == pytest.approx(total / 8)
        (gradient,) = torch.autograd.grad(loss, found)
        assert gradient.isfinite().all() and (gradient[~mask] == 0).all()


def test_gradients_of_minibatches_average_to_that_of_the_batch():
    old, new, advantages, mask = ragged()
    new.requires_grad_()
    loss = lambda i: (  # noqa: E731
        ppo.policy_loss(new[i], old[i], advantages[i], mask[i], 0.2)[0]
        + ppo.value_loss(new[i], old[i], advantages[i], mask[i], 0.2)
    )
    (whole,) = torch.autograd.grad(loss(slice(None)), new)
    parts = [torch.autograd.grad(loss(slice(i, i + 2)), new)[0] for i in range(0, 8, 2)]
    torch.testing.assert_close(sum(parts) / 4, whole)


def test_eos_receives_gradient():
    logits = torch.zeros(1, 3, 11, requires_grad=True)
    responses = torch.tensor([[5, 10, 10]])
    logprobs = ppo.token_logprobs(logits, responses)
    mask = ppo.response_mask(responses)
    loss, _ = ppo.policy_loss(logprobs, logprobs.detach(), torch.ones(1, 3), mask, 0.2)
    loss.backward()
    assert logits.grad[0, 1, 10] < 0 and (logits.grad[0, 2] == 0).all()


# ---------------------------------------------------------------- Evaluation


def evaluate(policy, reference, prompts, score, beta, temperature):
    tables = [ppo.response_distribution(g, prompts, temperature) for g in (policy, reference)]
    return ppo.evaluate(*tables, prompts, score, beta)


def test_optimum_in_closed_form_is_the_optimum(world):
    _, reference, _, _, scores = world
    ref_logprobs = oracle.token_table(reference).sum(1)
    probs, best = oracle.optimal(ref_logprobs.tolist(), scores.tolist(), BETA)
    closed_form = BETA * torch.logsumexp(ref_logprobs + scores / BETA, 0)
    assert abs(closed_form.item() - best) < 1e-10
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # nothing near it is better
        noise = 0.1 * torch.randn(len(probs), generator=generator, dtype=torch.float64)
        moved = (float64(*probs).log() + noise).log_softmax(0)
        assert (moved.exp() * (scores - BETA * (moved - ref_logprobs))).sum() < best


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("kind", ["exact", "sharp", "process"])
def test_evaluation_by_loops(beta, kind):
    policy, reference = make_gpt(3), make_gpt(4)
    prompts = torch.tensor([PROMPT, (9, 9, 0)])
    score = ppo.process_reward if kind == "process" else lambda p, r: ppo.reward(p, r, kind)
    found = evaluate(policy, reference, prompts, score, beta, 0.9)
    expected = dict.fromkeys(("success", "score", "kl", "entropy", "objective"), 0.0)
    gain = possible = 0.0
    for prompt in prompts.tolist():
        own = brute_force_distribution(policy, prompt, 0.9)
        ref = brute_force_distribution(reference, prompt, 0.9)
        lists = [real_tokens(y) for y in ppo.all_responses().tolist()]
        if kind == "process":
            paid = [
                0.5 * (y[0] != 10 and 0 <= 20 - sum(prompt) - y[0] <= 9)
                + 0.5 * oracle.score(prompt, y)
                for y in lists
            ]
        else:
            paid = [oracle.score(prompt, y, kind) for y in lists]
        kl = sum(math.exp(a) * (a - b) for a, b in zip(own, ref, strict=True))
        mean = sum(math.exp(a) * r for a, r in zip(own, paid, strict=True))
        ref_mean = sum(math.exp(b) * r for b, r in zip(ref, paid, strict=True))
        best = oracle.optimal(ref, paid, beta)[1] if beta else max(paid)
        gain, possible = gain + mean - beta * kl - ref_mean, possible + best - ref_mean
        success = sum(
            math.exp(a) * oracle.score(prompt, y) for a, y in zip(own, lists, strict=True)
        )
        entropy = -sum(math.exp(a) * a for a in own)
        values = (success, mean, kl, entropy, mean - beta * kl)
        for name, value in zip(expected, values, strict=True):
            expected[name] += value / 2
    expected["optimality"] = gain / possible
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_reference_itself_has_optimality_zero():
    gpt = make_gpt()
    found = evaluate(gpt, gpt, torch.tensor([PROMPT]), ppo.reward, 0.05, 1.0)
    assert abs(found["optimality"]) < 1e-12 and found["kl"] == 0
