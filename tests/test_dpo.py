"""dpo.py: losses against loops, the optimum by enumeration, preference files, the program."""

import itertools
import json
import math
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import oracle
import programs
import pytest
import torch
import tyro

import dpo

KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.2)]
NO_TIE = torch.tensor([False])
make_prompts = dpo.make_prompts


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss_at(h, beta, loss_type="sigmoid", epsilon=0.0, ties=NO_TIE):
    """Loss and metrics of pairs with log-ratios h and 0."""
    return dpo.dpo_loss(h, torch.zeros_like(h), ties, beta, loss_type, epsilon)


# ---------------------------------------------------------------------------- The losses
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_loss_metrics_and_gradient_by_loops(kind, beta):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 6, generator=generator, dtype=torch.float64) * 3
    ties = torch.tensor([False, True, False, False, True, False])
    chosen.requires_grad_()
    loss, metrics = dpo.dpo_loss(chosen, rejected, ties, beta, *kind)
    (gradient,) = torch.autograd.grad(loss, chosen)

    def expected_loss(h, tie):
        value = oracle.dpo_pair_loss(h, beta, *kind)
        if tie:
            value = (value + oracle.dpo_pair_loss(-h, beta, *kind)) / 2
        return value

    h = (chosen - rejected).tolist()
    losses = [expected_loss(x, tie) for x, tie in zip(h, ties.tolist(), strict=True)]
    correct = [0.5 if tie else float(x > 0) for x, tie in zip(h, ties.tolist(), strict=True)]
    assert loss.item() == pytest.approx(sum(losses) / 6, abs=1e-9)
    assert metrics["losses/loss"].item() == loss.item()
    assert metrics["rewards/chosen"].item() == pytest.approx(beta * chosen.mean().item())
    assert metrics["rewards/rejected"].item() == pytest.approx(beta * rejected.mean().item())
    assert metrics["rewards/margins"].item() == pytest.approx(beta * sum(h) / 6)
    assert metrics["rewards/accuracies"].item() == pytest.approx(sum(correct) / 6)
    assert not any(value.requires_grad for value in metrics.values())
    for i in range(6):
        tie = ties[i].item()
        slope = (expected_loss(h[i] + 1e-5, tie) - expected_loss(h[i] - 1e-5, tie)) / 2e-5
        assert gradient[i].item() == pytest.approx(slope / 6, abs=1e-6)


def test_printed_bradley_terry_losses():
    """The reward model's tutorial: scores 2.89 against 3.25, and against 2.00."""
    for scores, printed in (((2.89, 3.25), 0.8893), ((2.89, 2.0), 0.3441)):
        chosen, rejected = float64(*scores).view(2, 1)
        loss, _ = dpo.dpo_loss(chosen, rejected, NO_TIE, 1.0, "sigmoid", 0.0)
        assert round(loss.item(), 4) == printed


@pytest.mark.parametrize("kind", [("sigmoid", 0.0), ("sigmoid", 0.3), ("robust", 0.3)])
def test_loss_at_the_reference_is_log_2(kind):
    loss, metrics = loss_at(torch.zeros(4, dtype=torch.float64), 0.3, *kind)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/margins"] == 0


def test_gradient_of_the_sigmoid_loss_is_the_papers():
    """-β σ(r(l) - r(w)) [∇ log π(w) - ∇ log π(l)], by hand for a tabular policy."""
    theta = oracle.table(0).requires_grad_()
    ref = oracle.table(1)
    beta = 0.7
    chosen = [(3, 4, 10), (5, 10), (7, 7, 7)]
    rejected = [(3, 5, 10), (10,), (7, 10)]

    def logratio(response):
        logprob = sum(oracle.logprob_list(theta, response))
        return logprob - sum(oracle.logprob_list(ref, response))

    chosen_logratios = torch.stack([logratio(y) for y in chosen])
    rejected_logratios = torch.stack([logratio(y) for y in rejected])
    loss, _ = dpo.dpo_loss(chosen_logratios, rejected_logratios, NO_TIE, beta, "sigmoid", 0.0)
    expected = torch.zeros_like(theta)
    for y_w, y_l in zip(chosen, rejected, strict=True):
        weight = beta / (1 + math.exp(beta * (logratio(y_w) - logratio(y_l)).item()))
        for y, sign in ((y_w, 1), (y_l, -1)):
            for t, token in enumerate(y):  # ∇ log softmax = one-hot - probabilities
                gradient = -theta.detach()[oracle.row(y[:t])].softmax(0)
                gradient[token] += 1
                expected[oracle.row(y[:t])] -= sign * weight * gradient / 3
    (found,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_robust_loss_is_unbiased_under_flipped_judgements(epsilon):
    """The mean over all 8 ways to flip 3 judgements, each with probability ε, is the sigmoid loss
    of the true judgements."""
    h = float64(0.4, -2.0, 1.3)
    mean = 0.0
    for flips in itertools.product([1, -1], repeat=3):
        probability = math.prod(epsilon if flip < 0 else 1 - epsilon for flip in flips)
        mean += probability * loss_at(h * float64(*flips), 0.6, "robust", epsilon)[0].item()
    assert mean == pytest.approx(loss_at(h, 0.6)[0].item(), abs=1e-9)


def test_where_each_loss_stops_pushing():
    def push(h, loss_type="sigmoid", epsilon=0.0, tie=False):
        h = float64(h).requires_grad_()
        loss, _ = loss_at(h, 0.5, loss_type, epsilon, ties=torch.tensor([tie]))
        return -torch.autograd.grad(loss, h)[0].item()

    assert push(0.99, "ipo") > 0 > push(1.01, "ipo")  # 1/(2β) = 1
    assert push(1.99, "hinge") == 0.5
    assert push(2.01, "hinge") == 0
    h = math.log(0.8 / 0.2) / 0.5  # with smoothing, β·h ends at the log-odds of 1 - ε
    assert push(h - 0.01, "sigmoid", 0.2) > 0 > push(h + 0.01, "sigmoid", 0.2)
    assert push(10.0) > 0
    assert push(10.0, "robust", 0.2) > 0
    for kind in KINDS:  # a tie pulls h back to 0
        assert push(1.0, *kind, tie=True) <= 0 <= push(-1.0, *kind, tie=True)
        assert kind[0] == "hinge" or push(1.0, *kind, tie=True) < 0


def test_ipo_leads_to_its_own_minimiser():
    """h = 1/(2β) if a pair is always judged alike; (2p - 1)/(2β) if so with probability p."""
    beta = 0.4
    h = float64(0.0).requires_grad_()
    optimizer = torch.optim.SGD([h], lr=0.25)
    for p, expected in ((1.0, 0.5 / beta), (0.8, 0.6 / (2 * beta))):
        for _ in range(100):
            optimizer.zero_grad()
            loss = p * loss_at(h, beta, "ipo")[0] + (1 - p) * loss_at(-h, beta, "ipo")[0]
            loss.backward()
            optimizer.step()
        assert h.item() == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------------------- Log-probabilities
def random_gpt(seed=0):
    torch.manual_seed(seed)
    gpt = dpo.GPT(width=16, layers=1, heads=2).double()
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt


PROMPTS = torch.tensor([[4, 3, 3], [2, 1, 2], [9, 9, 0], [0, 5, 5]])
CHOSEN = torch.tensor([[7, 3, 10], [5, 10, 10], [10, 10, 10], [1, 2, 3]])
REJECTED = torch.tensor([[1, 10, 10], [8, 7, 10], [1, 1, 1], [10, 10, 10]])


@pytest.mark.parametrize("length_normalize", [False, True])
def test_pair_logprobs_by_loops(length_normalize):
    """Token by token, through the oracle's own GPT; padding after EOS is not counted."""
    gpt = random_gpt()
    weights = {name: x.double() for name, x in gpt.state_dict().items()}
    found = dpo.pair_logprobs(gpt, PROMPTS, CHOSEN, REJECTED, length_normalize)
    for logprobs, responses in zip(found, (CHOSEN, REJECTED), strict=True):
        assert logprobs.shape == (4,)
        for i in range(4):
            prompt = PROMPTS[i].tolist()
            response = responses[i].tolist()
            if 10 in response:
                response = response[: response.index(10) + 1]
            states = oracle.gpt_states(weights, prompt + response, heads=2)
            total = 0.0
            for t, token in enumerate(response):
                logits = weights["head.weight"] @ states[2 + t] + weights["head.bias"]
                total += logits.log_softmax(0)[token].item()
            if length_normalize:
                total /= len(response)
            assert logprobs[i].item() == pytest.approx(total, abs=1e-9)


class UndefinedAfterEOS(torch.nn.Module):
    """A GPT whose hidden states are NaN at EOS and after it."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self.head = gpt.head

    def forward(self, tokens):
        ended = (tokens == dpo.EOS).cumsum(1) > 0
        return torch.where(ended[:, :, None], math.nan, self.gpt(tokens))


@pytest.mark.parametrize("length_normalize", [False, True])
def test_what_stands_after_eos_changes_nothing(length_normalize):
    gpt = random_gpt()
    expected = torch.stack(dpo.pair_logprobs(gpt, PROMPTS, CHOSEN, REJECTED, length_normalize))
    garbage = CHOSEN.clone()
    garbage[1, 2] = 4
    garbage[2, 1:] = torch.tensor([6, 3])
    found = torch.stack(dpo.pair_logprobs(gpt, PROMPTS, garbage, REJECTED, length_normalize))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    undefined = UndefinedAfterEOS(gpt)
    found = torch.stack(dpo.pair_logprobs(undefined, PROMPTS, CHOSEN, REJECTED, length_normalize))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length_normalize", [False, True])
def test_reference_logprobs_are_pair_logprobs_in_minibatches(monkeypatch, length_normalize):
    """600 pairs are two full minibatches and a remainder. There is no gradient to the model."""
    reference = random_gpt()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, (600, 3), generator=generator)
    chosen = torch.randint(11, (600, 3), generator=generator)
    rejected = torch.randint(11, (600, 3), generator=generator)
    pairs = (prompts, chosen, rejected, length_normalize)
    expected = dpo.pair_logprobs(reference, *pairs)
    calls = programs.record(monkeypatch, dpo, "pair_logprobs")["pair_logprobs"]
    found = dpo.reference_logprobs(reference, *pairs, 256)
    assert [len(call["prompts"]) for call in calls] == [256, 256, 88]
    for logprobs, expected_logprobs in zip(found, expected, strict=True):
        assert logprobs.shape == (600,)
        assert expected_logprobs.requires_grad  # as the model's weights do
        assert not logprobs.requires_grad
        torch.testing.assert_close(logprobs, expected_logprobs.detach(), atol=1e-12, rtol=0)


# ---------------------------------------------------------------------------- The optimum
class World:
    """Two prompts, a tabular policy that can write 11 responses to each, and their scores."""

    def __init__(self, kind):
        self.responses = oracle.narrow_responses()
        self.ref_tables = [oracle.narrow(oracle.table(seed)) for seed in (0, 1)]
        prompts = ((4, 3, 3), (2, 1, 2))
        self.scores = float64(
            *[[oracle.score(x, y, kind) for y in self.responses] for x in prompts]
        )
        self.ref_logprobs = self.logprobs(self.ref_tables)
        indices = torch.arange(len(self.responses))
        self.first, self.second = torch.cartesian_prod(indices, indices).T  # all 121 pairs

    def logprobs(self, tables):
        """log π(y|x) of all responses to both prompts. (2, 11)"""
        rows = []
        for table in tables:
            rows.append(torch.stack([sum(oracle.logprob_list(table, y)) for y in self.responses]))
        return torch.stack(rows)

    def expected_loss(self, logprobs, tau, beta, kind):
        """Mean loss over all pairs that the reference can write and both ways to judge them."""

        def one_loss(chosen_logratio, rejected_logratio):
            chosen = chosen_logratio[None]
            rejected = rejected_logratio[None]
            return dpo.dpo_loss(chosen, rejected, NO_TIE, beta, *kind)[0]

        each_loss = torch.vmap(one_loss)
        total = 0.0
        for x in range(2):
            logratios = logprobs[x] - self.ref_logprobs[x]
            probs = self.ref_logprobs[x].exp()
            first_wins = (
                (self.scores[x][self.first] - self.scores[x][self.second]) / tau
            ).sigmoid()
            first_chosen = each_loss(logratios[self.first], logratios[self.second])
            second_chosen = each_loss(logratios[self.second], logratios[self.first])
            losses = first_wins * first_chosen + (1 - first_wins) * second_chosen
            total = total + (probs[self.first] * probs[self.second] * losses).sum() / 2
        return total

    def train(self, tau, beta, kind):
        """Exact gradient descent (L-BFGS) from the reference. Returns log π(y|x) at its end."""
        tables = [table.clone().requires_grad_() for table in self.ref_tables]
        optimizer = torch.optim.LBFGS(
            tables, max_iter=60, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = self.expected_loss(self.logprobs(tables), tau, beta, kind)
            loss.backward()
            return loss

        optimizer.step(closure)
        return self.logprobs(tables).detach()


@pytest.mark.parametrize("tau,beta", [(0.5, 0.5), (0.3, 1.0)])
def test_exact_training_ends_at_the_closed_form(tau, beta):
    """Bradley-Terry judgements lead to π* = π_ref·exp(R/(τβ)), to 1e-3 nats."""
    world = World("sharp")
    found = world.train(tau, beta, ("sigmoid", 0.0))
    for x in range(2):
        ref_logprobs = world.ref_logprobs[x]
        probs, _ = oracle.optimal(ref_logprobs.tolist(), world.scores[x].tolist(), tau * beta)
        best = float64(*probs)
        assert (best * (best.log() - ref_logprobs)).sum() > 0.05  # the reference is far off
        assert (best * (best.log() - found[x])).sum() < 1e-3
        assert (found[x].exp() * (found[x] - best.log())).sum() < 1e-3


def test_closed_form_is_a_stationary_point_of_sigmoid_alone():
    world = World("sharp")
    tau = 0.5
    beta = 0.5
    slopes = {}
    for kind in KINDS:
        logits = (world.ref_logprobs + world.scores / (tau * beta)).requires_grad_()
        loss = world.expected_loss(logits.log_softmax(1), tau, beta, kind)
        slopes[kind] = torch.autograd.grad(loss, logits)[0].abs().max().item()
    assert slopes.pop(("sigmoid", 0.0)) < 1e-12
    assert min(slopes.values()) > 1e-4


def expected_robust_loss(h, tau, beta, epsilon):
    """Mean over both judgements of a right response against a wrong one."""
    p = 1 / (1 + math.exp(-1 / tau))
    agrees = loss_at(float64(h), beta, "robust", epsilon)[0].item()
    disagrees = loss_at(float64(-h), beta, "robust", epsilon)[0].item()
    return p * agrees + (1 - p) * disagrees


@pytest.mark.parametrize("tau", [0.2, 0.5, 2.0])
def test_robust_loss_has_a_minimum_below_the_annotators_error_rate_alone(tau):
    """With ε < σ(-1/τ) the minimum is where σ(β·h) = (σ(1/τ) - ε)/(1 - 2ε). With more smoothing,
    the expected loss falls for ever, and check_args refuses it."""
    beta = 0.4
    error_rate = 1 / (1 + math.exp(1 / tau))
    for share in (0.5, 0.9, 0.99):
        epsilon = share * error_rate
        odds = (1 - error_rate - epsilon) / (error_rate - epsilon)
        best = math.log(odds) / beta
        loss = expected_robust_loss(best, tau, beta, epsilon)
        assert loss < expected_robust_loss(best - 1, tau, beta, epsilon)
        assert loss < expected_robust_loss(best + 1, tau, beta, epsilon)
        dpo.check_args(
            dpo.Args(loss_type="robust", label_smoothing=epsilon, annotator_temperature=tau)
        )
    for share in (1.001, 1.01, 1.05):
        epsilon = min(share * error_rate, 0.499)
        losses = [expected_robust_loss(h, tau, beta, epsilon) for h in range(-40, 80, 4)]
        assert losses == sorted(losses, reverse=True)
        assert len(set(losses)) == len(losses)
        with pytest.raises(SystemExit):
            dpo.check_args(
                dpo.Args(loss_type="robust", label_smoothing=epsilon, annotator_temperature=tau)
            )


def test_robust_training_ends_where_its_range_says():
    """Rewards of 0 and 1, ε below σ(-1/τ): π ∝ π_ref·exp(R·h), h at the minimum of a pair."""
    tau = 0.5
    beta = 0.5
    epsilon = 0.05
    world = World("exact")
    found = world.train(tau, beta, ("robust", epsilon))
    error_rate = 1 / (1 + math.exp(1 / tau))
    h = math.log((1 - error_rate - epsilon) / (error_rate - epsilon)) / beta
    best = (world.ref_logprobs + h * world.scores).log_softmax(1)
    assert world.scores.sum() > 0
    assert (best.exp() * (best - found)).sum(1).max() < 1e-3


# ---------------------------------------------------------------------------- Preference pairs
def scores_of(prompts, responses):
    scores = []
    for prompt, response in zip(prompts.tolist(), responses.tolist(), strict=True):
        if 10 in response:
            response = response[: response.index(10) + 1]
        scores.append(oracle.score(prompt, tuple(response)))
    return torch.tensor(scores)


def test_annotator_prefers_as_bradley_and_terry_say():
    """The share of right responses preferred to wrong ones is σ(1/τ); equals are a coin toss."""
    torch.manual_seed(0)
    prompts, targets, _, _ = make_prompts("cpu")
    policy = dpo.GPT()
    dpo.sft(policy, *dpo.make_demonstrations(prompts[:40], targets[:40]), 60)
    rows = torch.arange(40).repeat(80)
    tau = 0.7
    prompts, chosen, rejected, ties = dpo.sample_preferences(
        policy, prompts[rows], targets[rows], tau
    )
    count = len(prompts)
    assert 2000 < count < 3200
    assert prompts.shape == chosen.shape == rejected.shape == (count, 3)
    assert ties.tolist() == [False] * count
    assert (chosen != rejected).any(1).all()
    assert len(prompts.unique(dim=0)) == 40
    chosen_scores = scores_of(prompts, chosen)
    rejected_scores = scores_of(prompts, rejected)
    unequal = chosen_scores != rejected_scores
    count = unequal.sum().item()
    share = (chosen_scores > rejected_scores)[unequal].double().mean().item()
    p = 1 / (1 + math.exp(-1 / tau))
    assert count > 500
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)
    place_value = torch.tensor([121, 11, 1])
    larger = (chosen * place_value).sum(1) > (rejected * place_value).sum(1)
    share = larger[~unequal].double().mean().item()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / (~unequal).sum().item())


def test_pairs_are_independent_and_keep_their_prompts_and_targets(monkeypatch):
    """Two samples per prompt at temperature 1; only identical responses are dropped."""
    calls = programs.spy(monkeypatch, dpo, "generate")
    torch.manual_seed(0)
    policy = dpo.GPT()
    prompts, targets, _, _ = make_prompts("cpu")
    prompts = prompts[:600]
    targets = targets[:600]
    x, chosen, rejected, _ = dpo.sample_preferences(policy, prompts, targets, 1e-3)
    assert all(arguments[2] == 1.0 for arguments, _, _ in calls)
    assert max(len(arguments[1]) for arguments, _, _ in calls) <= 256  # not all at once
    samples = torch.cat([result for _, result, _ in calls])
    assert len(samples) == 1200
    pairs = torch.stack([samples[:600], samples[600:]], 1)  # (600, 2, 3)
    different = (pairs[:, 0] != pairs[:, 1]).any(1)
    pairs = pairs[different]
    assert x.tolist() == prompts[different].tolist()
    first_wins = (chosen == pairs[:, 0]).all(1)
    assert (torch.where(first_wins[:, None], pairs[:, 1], pairs[:, 0]) == rejected).all()
    assert ((chosen == pairs[:, 1]).all(1) | first_wins).all()
    # At so low an annotator temperature the better response always wins.
    assert (scores_of(x, chosen) >= scores_of(x, rejected)).all()


def test_identical_pairs_are_dropped_and_the_rest_stay_aligned(monkeypatch):
    first = torch.tensor([[9, 1, 10], [7, 3, 10], [7, 3, 10], [1, 10, 10]])
    second = torch.tensor([[9, 1, 10], [1, 1, 10], [7, 3, 10], [8, 7, 10]])
    samples = iter([first, second])
    monkeypatch.setattr(dpo, "generate", lambda policy, prompts, temperature: next(samples))
    prompts = torch.tensor([[5, 5, 5], [4, 3, 3], [4, 3, 3], [2, 1, 2]])
    x, chosen, rejected, ties = dpo.sample_preferences(None, prompts, 20 - prompts.sum(1), 1e-3)
    assert x.tolist() == [[4, 3, 3], [2, 1, 2]]
    assert chosen.tolist() == [[7, 3, 10], [8, 7, 10]]
    assert rejected.tolist() == [[1, 1, 10], [1, 10, 10]]
    assert ties.tolist() == [False, False]


NO_PROMPTS = torch.zeros(0, 3, dtype=torch.long)


def test_preferences_from_lines_of_json(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": "433", "chosen": "73", "rejected": "7"},
        {"prompt": "212", "chosen": "", "rejected": "733", "tie": True},
        {"prompt": "000", "chosen": "99", "rejected": "1", "tie": False, "who": "me"},
        {"prompt": "123", "chosen": "5", "rejected": "5", "tie": True},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts, chosen, rejected, ties = dpo.read_preferences(path, NO_PROMPTS)
    assert prompts.tolist() == [[4, 3, 3], [2, 1, 2], [0, 0, 0], [1, 2, 3]]
    assert chosen.tolist() == [[7, 3, 10], [10, 10, 10], [9, 9, 10], [5, 10, 10]]
    assert rejected.tolist() == [[7, 10, 10], [7, 3, 3], [1, 10, 10], [5, 10, 10]]
    assert ties.tolist() == [False, True, False, True]
    assert ties.dtype == torch.bool
    assert capsys.readouterr().out == ""  # nothing was left out


PAIR = '{"prompt": "433", "chosen": "73", "rejected": "11"}'


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + PAIR.encode(),  # a byte order mark
        PAIR.encode() + b"\r\n\r\n",
        b"\n  \n" + PAIR.encode() + b"\n\n",
        PAIR.replace("}", ', "comment": "a\u2028b\x85c\u2029d"}').encode(),
    ],
)
def test_unusual_files_are_read_as_one_pair(content, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    prompts, chosen, rejected, ties = dpo.read_preferences(path, NO_PROMPTS)
    assert prompts.tolist() == [[4, 3, 3]]
    assert chosen.tolist() == [[7, 3, 10]]
    assert rejected.tolist() == [[1, 1, 10]]
    assert ties.tolist() == [False]


BAD_LINES = {
    "not json": "JSON",
    "[" * 100_000: "JSON",
    PAIR + "\r" + PAIR: "JSON",  # only "\n" ends a line
    "[1, 2]": "object",
    '{"prompt": "43", "chosen": "73", "rejected": "11"}': "prompt",
    '{"prompt": "4333", "chosen": "73", "rejected": "11"}': "prompt",
    '{"prompt": 433, "chosen": "73", "rejected": "11"}': "prompt",
    '{"chosen": "73", "rejected": "11"}': "prompt",
    '{"prompt": "433", "chosen": "7333", "rejected": "11"}': "chosen",
    '{"prompt": "433", "chosen": "73", "rejected": "x"}': "rejected",
    '{"prompt": "433", "chosen": "73", "rejected": "٣"}': "rejected",
    '{"prompt": "433", "chosen": "73", "rejected": "11\\n"}': "rejected",
    '{"prompt": "433", "chosen": "73"}': "rejected",
    '{"prompt": "433", "chosen": "73", "rejected": "11", "tie": 1}': "tie",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line_is_named_with_its_number_and_reason(line, capsys, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(f"{PAIR}\n\n{line}\n{PAIR}\n".encode())
    assert BAD_LINES[line] in refused(capsys, "preferences", preferences=path)
    with pytest.raises(SystemExit):
        dpo.read_preferences(path, NO_PROMPTS)
    assert f"{path}: line 3: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe"])
def test_file_that_holds_nothing_to_read(content, capsys, tmp_path):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    refused(capsys, "preferences", preferences=path)
    assert not (tmp_path / "runs").exists()


def text_of(tokens):
    return "".join(str(token) for token in tokens.tolist() if token != 10)


def pair_line(prompt, chosen="73", rejected="11"):
    return json.dumps({"prompt": text_of(prompt), "chosen": chosen, "rejected": rejected}) + "\n"


def test_held_out_prompts_and_identical_responses_are_left_out_and_counted(tmp_path, capsys):
    train_prompts, _, test_prompts, _ = make_prompts("cpu")
    path = tmp_path / "pairs.jsonl"
    lines = [
        pair_line(test_prompts[0]),
        pair_line(train_prompts[0]),
        pair_line(train_prompts[1], "12", "12"),
        pair_line(train_prompts[2], "5", "6"),
        pair_line(test_prompts[1]),
    ]
    path.write_text("".join(lines))
    prompts, chosen, _, _ = dpo.read_preferences(path, test_prompts)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "2 with held-out prompts" in out
    assert "1 of identical responses" in out
    assert prompts.tolist() == [train_prompts[0].tolist(), train_prompts[2].tolist()]
    assert chosen.tolist() == [[7, 3, 10], [5, 10, 10]]
    path.write_text(pair_line(test_prompts[0]) + pair_line(train_prompts[0], "1", "1"))
    with pytest.raises(SystemExit) as stop:
        dpo.read_preferences(path, test_prompts)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 with held-out prompts" in captured.err
    assert "1 of identical responses" in captured.err


# ---------------------------------------------------------------------------- The program
@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    words = "--num-pairs 160 --rounds 2 --epochs 1 --minibatch-size 8 --sft-steps 20"
    folder = tmp_path_factory.mktemp("program")
    yield from programs.start(f"dpo.py {words} --save-path model.pt", folder)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, dpo)


def run(**flags):
    """Two passes over 96 pairs, unless told otherwise."""
    defaults = {"epochs": 2, "minibatch_size": 32, "learning_rate": 1e-3}
    defaults.update({"sft_steps": 20, "tensorboard": False})
    if "preferences" not in flags:
        defaults["num_pairs"] = 96
    return dpo.main(dpo.Args(**(defaults | flags)))


def random_preferences(path, number=40):
    """A file of judged random responses to random training prompts. Returns its lines."""
    draw = random.Random(0)
    prompts = make_prompts("cpu")[0][:10].tolist()
    lines = []
    while len(lines) < number:
        line = {
            "prompt": "".join(map(str, draw.choice(prompts))),
            "chosen": "".join(draw.choices("0123456789", k=draw.randrange(4))),
            "rejected": "".join(draw.choices("0123456789", k=draw.randrange(4))),
            "tie": draw.random() < 0.3,
        }
        if line["chosen"] != line["rejected"]:
            lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def keys_of(prompts, chosen, rejected):
    """A sorted list of pairs that can be compared."""
    return sorted(torch.cat([prompts, chosen, rejected], 1).tolist())


def test_every_epoch_reads_every_pair_once_in_another_order(monkeypatch, tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = random_preferences(path)
    calls = programs.record(monkeypatch, dpo, "pair_logprobs", "dpo_loss")
    flags = {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.2, "minibatch_size": 15}
    run(preferences=path, length_normalize=True, epochs=3, **flags)
    losses = calls["dpo_loss"]
    assert [len(call["ties"]) for call in losses] == [15, 15, 10] * 3
    for call in losses:
        assert (call["beta"], call["loss_type"], call["label_smoothing"]) == (0.3, "robust", 0.2)
        assert call["chosen_logratios"].requires_grad
    # The reference reads each pair once, before training.
    reference_calls = calls["pair_logprobs"][:3]
    policy_calls = calls["pair_logprobs"][3:]
    assert [len(call["prompts"]) for call in reference_calls] == [15, 15, 10]
    assert len(policy_calls) == 9
    assert all(call["length_normalize"] is True for call in calls["pair_logprobs"])
    assert len({id(call["gpt"]) for call in policy_calls}) == 1
    assert all(p.requires_grad for p in policy_calls[0]["gpt"].parameters())
    assert len({id(call["gpt"]) for call in reference_calls}) == 1
    assert not any(p.requires_grad for p in reference_calls[0]["gpt"].parameters())

    preferences = dpo.read_preferences(path, NO_PROMPTS)
    for name, column in zip(("prompts", "chosen", "rejected"), preferences[:3], strict=True):
        assert torch.equal(torch.cat([call[name] for call in reference_calls]), column)
    orders = []
    for epoch in range(3):
        calls_now = policy_calls[3 * epoch : 3 * epoch + 3]
        columns = []
        for name in ("prompts", "chosen", "rejected"):
            columns.append(torch.cat([call[name] for call in calls_now]))
        ties = torch.cat([call["ties"] for call in losses[3 * epoch : 3 * epoch + 3]])
        order = torch.cat([*columns, ties[:, None]], 1).tolist()
        assert sorted(order) == sorted(
            torch.cat([*preferences[:3], ties_column(preferences)], 1).tolist()
        )
        orders.append(order)
    assert len(lines) == len(orders[0])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def ties_column(preferences):
    return preferences[3][:, None]


def steps_of_two_rounds(monkeypatch, length_normalize=False):
    """Train for two rounds. Returns the reference and a list of gradient steps for each round.

    A step has the arguments of its forward pass, its two results and the arguments of dpo_loss.
    """
    references = programs.record(monkeypatch, dpo, "reference_logprobs")["reference_logprobs"]
    forward_passes = programs.spy(monkeypatch, dpo, "pair_logprobs")
    losses = programs.record(monkeypatch, dpo, "dpo_loss")["dpo_loss"]
    run(rounds=2, minibatch_size=10, length_normalize=length_normalize)
    assert len(references) == 2
    reference = references[0]["reference"]
    assert references[1]["reference"] is reference
    rounds = []
    calls = iter(losses)
    before_training = False
    for arguments, results, _ in forward_passes:
        if arguments[0] is not reference:
            rounds[-1].append((arguments, results, next(calls)))
        elif not before_training:  # the reference reads the pairs of a new round
            rounds.append([])
        before_training = arguments[0] is reference
    assert [*calls] == []
    assert len(rounds) == 2
    assert len(rounds[1]) > len(rounds[0]) > 1
    return reference, rounds


@pytest.mark.parametrize("length_normalize", [False, True])
def test_the_loss_gets_log_ratios_to_the_reference_of_its_own_rows(monkeypatch, length_normalize):
    """In both rounds, and though the rows are shuffled: another forward pass of the reference."""
    reference, rounds = steps_of_two_rounds(monkeypatch, length_normalize)
    for arguments, results, loss_call in rounds[0] + rounds[1]:
        assert arguments[4] == length_normalize
        with torch.no_grad():
            ref_chosen, ref_rejected = dpo.pair_logprobs(reference, *arguments[1:])
        chosen, rejected = results
        close = {"atol": 1e-4, "rtol": 0}
        torch.testing.assert_close(loss_call["chosen_logratios"], chosen - ref_chosen, **close)
        torch.testing.assert_close(
            loss_call["rejected_logratios"], rejected - ref_rejected, **close
        )
        # Neither another row's value nor that of the pair's other response would pass.
        assert (ref_chosen - ref_chosen.roll(1)).abs().max() > 0.01
        assert (ref_chosen - ref_rejected).abs().max() > 0.01


def test_log_ratios_are_zero_in_the_first_step_of_round_1_alone(monkeypatch):
    """The policy starts as the reference: with the references of chosen and rejected swapped, the
    log-ratios would not be 0. In round 2 it has moved: with the policy for the reference they
    would be 0 again."""
    _, rounds = steps_of_two_rounds(monkeypatch)
    first = rounds[0][0][2]
    assert first["chosen_logratios"].abs().max() < 1e-5
    assert first["rejected_logratios"].abs().max() < 1e-5
    for call in (rounds[0][-1][2], rounds[1][0][2], rounds[1][-1][2]):
        assert call["chosen_logratios"].abs().max() > 1e-2
        assert call["rejected_logratios"].abs().max() > 1e-2


def test_rounds_sample_from_the_current_policy_and_share_the_number_of_pairs(monkeypatch):
    def weights_before(policy, *_):
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    calls = programs.spy(monkeypatch, dpo, "sample_preferences", before=weights_before)
    logprobs = programs.record(monkeypatch, dpo, "pair_logprobs")["pair_logprobs"]
    run(num_pairs=96, rounds=3, annotator_temperature=0.3, epochs=1, minibatch_size=1000)
    assert len(calls) == 3
    assert len(logprobs) == 6
    reference = torch.cat([p.flatten() for p in logprobs[0]["gpt"].parameters()])
    train_prompts, train_targets, _, _ = make_prompts("cpu")
    sampled = []
    expected_targets = dict(zip(map(tuple, train_prompts.tolist()), train_targets, strict=True))
    for number, (arguments, result, weights) in enumerate(calls):
        policy, prompts, targets, annotator_temperature = arguments
        assert policy is logprobs[1]["gpt"]
        assert len(prompts) == len(targets) == 32
        assert annotator_temperature == 0.3
        assert targets.tolist() == [expected_targets[tuple(x)] for x in prompts.tolist()]
        assert torch.equal(weights, reference) == (number == 0)  # round 1: from the reference
        sampled.append(result)
        so_far = [torch.cat([pairs[column] for pairs in sampled]) for column in range(3)]
        referred = logprobs[2 * number]  # each round: the reference, then one gradient step
        trained = logprobs[2 * number + 1]
        assert referred["gpt"] is logprobs[0]["gpt"]
        assert trained["gpt"] is logprobs[1]["gpt"]
        for call in (referred, trained):
            pairs = keys_of(call["prompts"], call["chosen"], call["rejected"])
            assert pairs == keys_of(*so_far)
    assert not torch.equal(calls[0][0][1], calls[1][0][1])  # other prompts in each round


def test_curves_are_means_over_the_steps_since_the_last_log(monkeypatch, tmp_path):
    """40 steps: logged every second one, at the number of pairs seen."""
    path = tmp_path / "pairs.jsonl"
    random_preferences(path, 19)
    losses = programs.spy(monkeypatch, dpo, "dpo_loss")
    logprobs = programs.spy(monkeypatch, dpo, "pair_logprobs")
    curves = programs.record_curves(monkeypatch, dpo)
    programs.tick(monkeypatch, dpo)
    run(preferences=path, minibatch_size=2, epochs=4, tensorboard=True, learning_rate=0.01)
    assert len(losses) == 40
    assert [step for step, _ in curves["losses/loss"]] == [
        *(19 * epoch + pairs for epoch in range(4) for pairs in (4, 8, 12, 16, 19))
    ]
    metrics = [result[1] for _, result, _ in losses]
    for name in metrics[0]:
        expected = [(metrics[2 * i][name] + metrics[2 * i + 1][name]).item() / 2 for i in range(20)]
        assert programs.values(curves[name]) == pytest.approx(expected, abs=1e-5)
    for name, side in (("logps/chosen", 0), ("logps/rejected", 1)):
        # The reference reads the 19 pairs in 10 minibatches, before training.
        means = [result[side].mean().item() for _, result, _ in logprobs[10:]]
        expected = [(means[2 * i] + means[2 * i + 1]) / 2 for i in range(20)]
        assert programs.values(curves[name]) == pytest.approx(expected, abs=1e-5)
    assert all(value > 0 for value in programs.values(curves["losses/grad_norm"]))
    tags = "losses/grad_norm charts/learning_rate charts/pairs_per_second"
    for tag in tags.split():
        assert len(curves[tag]) == 20

    # The rate rises linearly to the flag's value in 4 steps (a tenth of 40), then falls linearly.
    expected = [0.01 * min(step / 4, (41 - step) / 37) for step in range(2, 41, 2)]
    assert programs.values(curves["charts/learning_rate"]) == pytest.approx(expected)
    assert max(programs.values(curves["charts/learning_rate"])) == pytest.approx(0.01)
    # One second passes between two logs.
    expected = [pairs / (i + 1) for i, (pairs, _) in enumerate(curves["losses/loss"])]
    assert programs.values(curves["charts/pairs_per_second"]) == pytest.approx(expected)
    assert [step for step, _ in curves["eval/success"]] == [0, 76]


def test_the_last_step_is_logged_too(monkeypatch, tmp_path):
    """Of 41 steps, every second one is logged (41 // 20 = 2), and the last."""
    path = tmp_path / "pairs.jsonl"
    random_preferences(path, 41)
    curves = programs.record_curves(monkeypatch, dpo)
    run(preferences=path, minibatch_size=1, epochs=1, tensorboard=True, sft_steps=0)
    assert [step for step, _ in curves["losses/loss"]] == [*range(2, 41, 2), 41]


def test_each_round_has_its_own_schedule_and_its_share_of_the_logs(monkeypatch, tmp_path, capsys):
    """Rounds of 20 and 40 steps: 2 and 4 steps of warmup, then linear decay; 10 logs each."""
    rates = []
    step = torch.optim.AdamW.step

    def noted(optimizer, *args, **more):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["weight_decay"] == 0
        return step(optimizer, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    path = tmp_path / "pairs.jsonl"
    random_preferences(path, 20)
    monkeypatch.setattr(
        dpo, "sample_preferences", lambda *_: dpo.read_preferences(path, NO_PROMPTS)
    )
    clock = SimpleNamespace(time=lambda: float(len(rates)), strftime=time.strftime)
    monkeypatch.setattr(dpo, "time", clock)  # a second per step
    run(rounds=2, num_pairs=40, minibatch_size=1, epochs=1, learning_rate=0.01, sft_steps=0)
    expected = []
    for num_steps, warmup in ((20, 2), (40, 4)):
        for i in range(1, num_steps + 1):
            decay = (num_steps + 1 - i) / (num_steps + 1 - warmup)
            expected.append(0.01 * min(i / warmup, decay))
    assert rates == pytest.approx(expected)
    progress = re.findall(PROGRESS, capsys.readouterr().out)
    assert [int(row[0]) for row in progress] == [*range(2, 21, 2), *range(24, 61, 4)]
    assert [int(row[5]) for row in progress] == [60 - int(row[0]) for row in progress]


def test_gradients_are_clipped_to_the_flag(monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def noted(optimizer, *args, **more):
        gradients = [p.grad.flatten() for p in optimizer.param_groups[0]["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(optimizer, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    curves = programs.record_curves(monkeypatch, dpo)
    run(max_grad_norm=1e-3, sft_steps=0, tensorboard=True)
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)
    assert min(programs.values(curves["losses/grad_norm"])) > 1e-3  # logged before clipping


def test_curves_of_a_run_have_trls_names(monkeypatch):
    curves = programs.record_curves(monkeypatch, dpo)
    result = run(tensorboard=True)
    tags = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    tags.update({"losses/loss", "losses/grad_norm", "logps/chosen", "logps/rejected"})
    tags.update({"charts/learning_rate", "charts/pairs_per_second"})
    tags.update(f"eval/{name}" for name in result if name != "success_before")
    assert curves.keys() == tags
    assert programs.values(curves["losses/loss"])[0] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("success", "kl", "success_error", "kl_error"):
        assert curves[f"eval/{name}"][1][1] == pytest.approx(result[name])
    assert curves["eval/success"][0] == (0, pytest.approx(result["success_before"]))
    assert curves["eval/kl"][0][1] == pytest.approx(0, abs=1e-6)


def test_evaluation_is_on_held_out_prompts_at_temperature_1(monkeypatch):
    calls = programs.record(monkeypatch, dpo, "evaluate")["evaluate"]
    run()
    assert len(calls) == 2
    _, _, test_prompts, test_targets = make_prompts("cpu")
    for call in calls:
        assert torch.equal(call["prompts"], test_prompts[:3])
        assert torch.equal(call["targets"], test_targets[:3])
        assert call["temperature"] == 1.0
        assert all(p.requires_grad for p in call["policy"].parameters())
        assert not any(p.requires_grad for p in call["reference"].parameters())


LEARNING = {"num_pairs": 6000, "epochs": 2, "minibatch_size": 128, "learning_rate": 1e-3}
LEARNING |= {"beta": 1.0, "annotator_temperature": 0.1}


@programs.beside(programs.long_run, "dpo", **LEARNING)
def test_success_rises(found):
    """The policy learns what the pairs say."""
    result, curves = found
    assert 0.4 < result["success_before"] < 0.8
    assert result["success"] > result["success_before"] + 0.08
    chosen = programs.values(curves["rewards/chosen"])[-1]
    rejected = programs.values(curves["rewards/rejected"])[-1]
    assert rejected < chosen - 0.3
    accuracies = programs.values(curves["rewards/accuracies"])
    assert sum(accuracies[-5:]) / 5 > sum(accuracies[:2]) / 2 + 0.04


def test_same_seed_same_result_other_seed_another():
    first = run()
    assert run() == first
    assert run(seed=2) != first


CHOICES = [
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"label_smoothing": 0.1},
    {"length_normalize": True},
    {"beta": 0.1},
    {"annotator_temperature": 0.01},
    {"num_pairs": 128},
    {"rounds": 2},
    {"epochs": 3},
    {"minibatch_size": 16},
    {"max_grad_norm": 0.001},
    {"learning_rate": 1e-4},
    {"sft_steps": 0},
    {"sft_steps": 1},
]


def outcomes():
    random_preferences(Path("pairs.jsonl"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        programs.shorten_runs(monkeypatch, Path.cwd(), dpo)
        return [run(**flags) for flags in [{}, *CHOICES, {"preferences": Path("pairs.jsonl")}]]


@programs.beside(outcomes)
def test_every_flag_and_choice_changes_the_outcome(found):
    assert all(math.isfinite(value) for result in found for value in result.values())
    assert len({result["kl"] for result in found}) == len(found)


def test_large_beta_holds_the_policy_back():
    assert run(beta=3.0, epochs=10)["kl"] < 0.5 * run(beta=0.3, epochs=10)["kl"]


BORDER = [
    {"seed": 0, "sft_steps": 0, "num_pairs": 1, "epochs": 1, "minibatch_size": 1},
    {"seed": 2**63 - 1, "loss_type": "robust", "label_smoothing": 0.119},
    {"loss_type": "sigmoid", "label_smoothing": 0.49},
    {"rounds": 4, "num_pairs": 4},
    {"preferences": Path("pairs.jsonl"), "loss_type": "robust", "label_smoothing": 0.49},
    {"annotator_temperature": 1e-4},
]


@pytest.mark.parametrize("flags", BORDER)
def test_values_at_the_border_are_taken(flags):
    dpo.check_args(dpo.Args(**flags))


BAD = [
    *[("num_pairs", value) for value in (0, -3)],
    *[("rounds", value) for value in (0, -1, 5, 200)],  # 5 does not divide 96
    ("epochs", 0),
    ("minibatch_size", 0),
    *[("learning_rate", value) for value in (0.0, 1.0, math.nan, math.inf)],
    *[("max_grad_norm", value) for value in (0.0, math.nan, math.inf)],
    *[("beta", value) for value in (0.0, -1.0, math.nan, math.inf)],
    *[("annotator_temperature", value) for value in (0.0, math.nan, math.inf)],
    *[("label_smoothing", value) for value in (-0.1, 0.5, math.nan)],
    *[("seed", value) for value in (-1, 2**63)],
    ("sft_steps", -1),
    ("device", "cuda"),
    ("loss_type", "robust"),  # without label smoothing it is sigmoid
    ("preferences", Path("missing.jsonl")),
    *[("save_path", Path(name)) for name in ("missing/model.pt", ".")],
]


def refused(capsys, flag, **flags):
    """The program ends with status 2 and one line that names the flag. Returns the line."""
    with pytest.raises(SystemExit) as stop:
        run(**({"tensorboard": True} | flags))
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert error.count("\n") == 1
    assert f"--{flag.replace('_', '-')}" in error
    return error


@pytest.mark.parametrize("flag,value", BAD)
def test_bad_values_end_with_one_line_and_nothing_written(flag, value, capsys, tmp_path):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a cuda device")
    refused(capsys, flag, **{flag: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loss_type", ["ipo", "hinge"])
def test_smoothing_is_refused_where_it_would_be_ignored(loss_type, capsys):
    refused(capsys, "label_smoothing", label_smoothing=0.1, loss_type=loss_type)


def test_flags_that_a_file_makes_idle_are_refused(capsys, tmp_path):
    path = tmp_path / "pairs.jsonl"
    random_preferences(path)
    for flag, value in (("num_pairs", 96), ("annotator_temperature", 0.3), ("rounds", 2)):
        refused(capsys, flag, preferences=path, **{flag: value})


def test_robust_smoothing_is_bounded_by_the_annotator_but_not_with_a_file(capsys, tmp_path):
    refused(capsys, "label_smoothing", loss_type="robust", label_smoothing=0.12)
    path = tmp_path / "pairs.jsonl"
    random_preferences(path)
    run(preferences=path, loss_type="robust", label_smoothing=0.12)
    capsys.readouterr()
    refused(capsys, "label_smoothing", preferences=path, loss_type="robust", label_smoothing=0.5)


def test_runs_that_cannot_be_written_are_refused(capsys, tmp_path, monkeypatch):
    real_access = dpo.os.access
    monkeypatch.setattr(
        dpo.os, "access", lambda path, mode: str(path) != "runs" and real_access(path, mode)
    )
    (tmp_path / "runs").mkdir()
    refused(capsys, "no-tensorboard")
    run(tensorboard=False)


def test_nothing_to_compare_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(dpo, "generate", lambda policy, prompts, _: torch.full_like(prompts, 10))
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    assert "identical" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--loss-type", "dpo"], ["--group-size", "8"], ["--beta", "x"]])
def test_bad_words_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(dpo.Args, args=words)
    assert stop.value.code == 2


PROGRESS = (
    r"pair +(\d+)  loss (\d+\.\d{3})  accuracy ([01]\.\d{3})  margin (-?\d+\.\d{3})  "
    r"([\d,.]+) pairs/s  (\d+) s left"
)


def test_program_in_a_shell(program):
    """The real command: header, progress, ending; events and a saved file that loads safely."""
    folder, printed = program()
    header, *progress, ending = printed.splitlines()
    assert re.fullmatch(r"dpo__1__[-\d]+: [\d,]+ parameters on cpu", header)
    rows = [re.fullmatch(PROGRESS, line).groups() for line in progress]
    pairs = [int(row[0]) for row in rows]
    assert 10 <= len(rows) < 30
    assert pairs == sorted(pairs)
    assert 160 < pairs[-1] <= 80 + 160
    assert rows[-1][5] == "0"
    assert re.fullmatch(programs.ENDING, ending)
    assert {path.name for path in folder.iterdir()} == {"runs", "model.pt"}
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved.keys() == {"args", "policy", "reference"}
    assert saved["args"]["num_pairs"] == "160"
    dpo.GPT().load_state_dict(saved["policy"])
    dpo.GPT().load_state_dict(saved["reference"])
    assert not torch.equal(saved["policy"]["head.weight"], saved["reference"]["head.weight"])
    (events,) = (folder / "runs").iterdir()
    assert events.name.startswith("dpo__1__")
    programs.check_hyperparameters(events, dpo.Args(), num_pairs="160", seed="1", rounds="2")


def test_saved_reference_is_the_policy_after_sft(monkeypatch, tmp_path):
    """And the saved policy is the trained one."""
    calls = programs.record(monkeypatch, dpo, "evaluate")["evaluate"]
    sft_weights = []
    sft = dpo.sft

    def noted(policy, *args):
        sft(policy, *args)
        sft_weights.append(policy.head.weight.detach().clone())

    monkeypatch.setattr(dpo, "sft", noted)
    run(save_path=tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(saved["reference"]["head.weight"], sft_weights[0])
    assert torch.equal(saved["policy"]["head.weight"], calls[-1]["policy"].head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_reference_is_frozen_and_nothing_is_left_behind(monkeypatch, tmp_path):
    programs.check_reference_is_frozen(monkeypatch, lambda: run(rounds=2))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_step_stops_the_run(monkeypatch, capsys):
    loss = dpo.dpo_loss
    monkeypatch.setattr(dpo, "dpo_loss", lambda x, *rest: loss(x * math.inf, *rest))
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "step 1" in error and "--learning-rate" in error


def test_main_learns_from_no_pair_of_a_held_out_prompt(monkeypatch):
    train_prompts, _, test_prompts, _ = dpo.make_prompts("cpu")
    path = Path("pairs.jsonl")
    path.write_text("".join(map(pair_line, [*train_prompts[:5], *test_prompts[:3]])))
    losses = programs.record(monkeypatch, dpo, "dpo_loss")["dpo_loss"]
    run(preferences=path, epochs=1)
    (call,) = losses
    assert len(call["ties"]) == 5
    assert call["chosen_logratios"].requires_grad and call["rejected_logratios"].requires_grad
