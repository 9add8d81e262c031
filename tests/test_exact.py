"""benchmark/exact.py against a second enumeration, by loops, and against sampling."""

import math
import sys
from pathlib import Path

import oracle
import pytest
import torch

import ppo

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import exact

PROMPTS = torch.tensor([(4, 3, 3), (9, 9, 0)])
TARGETS = 20 - PROMPTS.sum(1)


def real_tokens(response):
    """The tokens up to and including the first EOS, as a tuple."""
    response = [int(token) for token in response]
    if ppo.EOS in response:
        response = response[: response.index(ppo.EOS) + 1]
    return tuple(response)


def make_gpt(seed, outputs=ppo.VOCAB):
    """A float64 GPT with random blocks (which are the identity at first)."""
    torch.manual_seed(seed)
    gpt = ppo.GPT(outputs=outputs).double()
    for block in gpt.blocks:
        torch.nn.init.normal_(block.proj.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    return gpt.requires_grad_(False)


class TablePolicy:
    """A policy given by a table of logits (111, 11), one row per prefix (oracle.row)."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, tokens):
        states = torch.zeros(tokens.shape, dtype=torch.long)
        for i, sequence in enumerate(tokens.tolist()):
            for t in range(3, len(sequence) + 1):
                states[i, t - 1] = oracle.row(tuple(sequence[3:t]))
        return states

    def head(self, states):
        return self.logits[states]


def brute_force_logprobs(gpt, prompt, temperature):
    """Log-probability of each response of oracle.responses(), one forward pass per prefix."""
    next_token = {}
    for response in oracle.responses():
        for t in range(len(response)):
            prefix = response[:t]
            if prefix not in next_token:
                logits = gpt.head(gpt(torch.tensor([[*prompt, *prefix]])))[0, -1]
                next_token[prefix] = (logits / temperature).log_softmax(0).tolist()
    logprobs = {}
    for response in oracle.responses():
        terms = [next_token[response[:t]][token] for t, token in enumerate(response)]
        logprobs[response] = sum(terms)
    return logprobs


def test_all_responses_are_those_that_can_be_sampled():
    responses = exact.all_responses()
    assert responses.shape == (1111, 3)
    assert sorted(map(real_tokens, responses)) == sorted(oracle.responses())
    after_eos = ~ppo.response_mask(responses)
    assert after_eos.any() and (responses[after_eos] == ppo.EOS).all()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_logprobs_are_those_of_one_pass_per_prefix(temperature):
    gpt = make_gpt(3)
    found = exact.response_logprobs(gpt, PROMPTS, temperature)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2).double(), atol=1e-12, rtol=0)
    for i, prompt in enumerate(PROMPTS.tolist()):
        expected = brute_force_logprobs(gpt, prompt, temperature)
        for response, logprob in zip(exact.all_responses(), found[i], strict=True):
            assert logprob.item() == pytest.approx(expected[real_tokens(response)], abs=1e-9)


def test_logprobs_are_those_that_the_scripts_train_on():
    gpt = make_gpt(3)
    responses = exact.all_responses()
    prompts = PROMPTS[:1].expand(len(responses), 3)
    logits = gpt.head(ppo.response_states(gpt, prompts, responses)) / 0.7
    logprobs = ppo.token_logprobs(logits, responses)
    expected = ppo.masked_sum(logprobs, ppo.response_mask(responses))
    torch.testing.assert_close(exact.response_logprobs(gpt, PROMPTS[:1], 0.7)[0], expected)


def test_only_the_interface_of_a_policy_is_used():
    logits = oracle.table(5)
    found = exact.response_logprobs(TablePolicy(logits), PROMPTS, 1.0)
    for i, response in enumerate(map(real_tokens, exact.all_responses())):
        expected = sum(oracle.logprob_list(logits, response)).item()
        assert found[0, i].item() == pytest.approx(expected, abs=1e-12)
        assert found[1, i].item() == pytest.approx(expected, abs=1e-12)


def odd_score(prompts, responses):
    """A score with many values, that depends on the prompt."""
    return (prompts[:, 0] * responses[:, 0] + responses[:, 1]) / 50


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("score", [None, odd_score])
def test_evaluation_by_loops(kl_coef, score):
    policy = make_gpt(3)
    reference = make_gpt(4)
    found = exact.evaluate(policy, reference, PROMPTS, TARGETS, kl_coef, 0.9, score)
    expected = dict.fromkeys(["success", "score", "kl", "entropy", "objective"], 0.0)
    gain = 0.0
    possible = 0.0
    for prompt in PROMPTS.tolist():
        logprobs = brute_force_logprobs(policy, prompt, 0.9)
        ref_logprobs = brute_force_logprobs(reference, prompt, 0.9)
        paid = {}
        for y in oracle.responses():
            paid[y] = oracle.score(prompt, y)
            if score is not None:
                second = y[1] if len(y) > 1 else ppo.EOS
                paid[y] = (prompt[0] * y[0] + second) / 50
        mean = sum(math.exp(logprobs[y]) * paid[y] for y in paid)
        ref_mean = sum(math.exp(ref_logprobs[y]) * paid[y] for y in paid)
        kl = sum(math.exp(logprobs[y]) * (logprobs[y] - ref_logprobs[y]) for y in paid)
        best = max(paid.values())
        if kl_coef > 0:
            best = oracle.optimal(list(ref_logprobs.values()), list(paid.values()), kl_coef)[1]
        gain += mean - kl_coef * kl - ref_mean
        possible += best - ref_mean
        success = sum(math.exp(logprobs[y]) * oracle.score(prompt, y) for y in paid)
        expected["success"] += success / 2
        expected["score"] += mean / 2
        expected["kl"] += kl / 2
        expected["entropy"] += sum(-math.exp(logprobs[y]) * logprobs[y] for y in paid) / 2
        expected["objective"] += (mean - kl_coef * kl) / 2
    expected["normalised_gain"] = gain / possible
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_reference_gains_nothing():
    gpt = make_gpt(3)
    found = exact.evaluate(gpt, gpt, PROMPTS, TARGETS, 0.05)
    assert found["normalised_gain"] == pytest.approx(0, abs=1e-12)
    assert found["kl"] == 0


def test_the_optimal_policy_gains_all():
    ref_logits = oracle.table(6)
    prompt = (4, 3, 3)
    ref_logprobs = oracle.token_table(ref_logits).sum(1)
    scores = [oracle.score(prompt, y) for y in oracle.responses()]
    probs, best = oracle.optimal(ref_logprobs.tolist(), scores, 0.1)
    # The tokens' conditional probabilities under π*: sums of π*(y) over all y with a prefix.
    logits = torch.full((111, 11), -100.0, dtype=torch.float64)
    mass = {}
    for response, prob in zip(oracle.responses(), probs, strict=True):
        for t in range(len(response)):
            key = (response[:t], response[t])
            mass[key] = mass.get(key, 0.0) + prob
    for (prefix, token), prob in mass.items():
        logits[oracle.row(prefix), token] = math.log(prob)
    found = exact.evaluate(
        TablePolicy(logits), TablePolicy(ref_logits), PROMPTS[:1], TARGETS[:1], 0.1
    )
    assert found["normalised_gain"] == pytest.approx(1, abs=1e-9)
    assert found["objective"] == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_with_a_constant_reward_there_is_nothing_to_gain(kl_coef, constant):
    def score(prompts, responses):
        return torch.full((len(responses),), constant)

    found = exact.evaluate(make_gpt(3), make_gpt(4), PROMPTS, TARGETS, kl_coef, score=score)
    assert math.isnan(found.pop("normalised_gain"))
    assert found["score"] == pytest.approx(constant)
    assert all(math.isfinite(value) for value in found.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A file saved by a short run of ppo.py."""
    path = tmp_path_factory.mktemp("trained") / "policy.pt"
    flags = {"sft_steps": 60, "total_episodes": 5_120, "temperature": 0.9, "kl_coef": 0.1}
    ppo.main(ppo.Args(tensorboard=False, save_path=path, **flags))
    return path


@pytest.fixture
def few_prompts(monkeypatch):
    """Evaluate files on 20 held-out prompts only."""
    prompts, targets = [x[:20] for x in ppo.make_prompts("cpu")[2:]]
    monkeypatch.setattr(exact, "make_prompts", lambda device: (None, None, prompts, targets))
    return prompts, targets


def test_sampled_figures_agree_with_the_exact_ones(trained):
    saved = torch.load(trained, weights_only=True)
    policy = exact.load_policy(saved, "policy")
    reference = exact.load_policy(saved, "reference")
    prompts, targets = [x[:40] for x in ppo.make_prompts("cpu")[2:]]
    for temperature in [0.9, 1.5]:
        expected = exact.evaluate(policy, reference, prompts, targets, 0.1, temperature)
        assert 0.1 < expected["success"] < 0.95 and expected["kl"] > 0.02
        for name in ["success", "kl"]:
            distances = []
            for seed in range(20):
                torch.manual_seed(seed)
                found = ppo.evaluate(policy, reference, prompts, targets, temperature)
                distances.append((found[name] - expected[name]) / found[f"{name}_error"])
            # Their mean is within four of its own standard errors. They scatter by 1 at most: by
            # less, since each prompt is sampled equally often, which the standard error ignores.
            assert abs(sum(distances)) / 20 < 4 / 20**0.5
            assert 0.3 < (sum(x**2 for x in distances) / 20) ** 0.5 < 1.4


def test_a_file_is_evaluated_with_its_own_flags(trained, few_prompts):
    saved = torch.load(trained, weights_only=True)
    policy = exact.load_policy(saved, "policy")
    reference = exact.load_policy(saved, "reference")
    prompts, targets = few_prompts
    found = exact.evaluate_file(trained)
    before = exact.evaluate(reference, reference, prompts, targets, 0.1, 0.9)["success"]
    assert found.pop("success_before") == pytest.approx(before)
    assert found == exact.evaluate(policy, reference, prompts, targets, 0.1, 0.9)
    assert found["success"] > before + 0.05


def test_beta_of_dpo_is_one_of_the_reward_in_units_of_the_annotators_noise():
    assert exact.saved_kl_coef({"annotator_temperature": "0.5", "beta": "0.1"}) == 0.05
    assert exact.saved_kl_coef({"kl_coef": "0.2"}) == 0.2


def test_command_prints_every_metric_and_draws_the_policy(
    trained, few_prompts, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "map.png"
    monkeypatch.setattr(sys, "argv", ["exact.py", str(trained), "--map", str(figure)])
    exact.main()
    printed = capsys.readouterr().out
    for name, value in exact.evaluate_file(trained).items():
        assert name.replace("_", " ") in printed and f"{value:.4f}" in printed
    assert figure.stat().st_size > 1000
