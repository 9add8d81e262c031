"""benchmark/exact.py against a second enumeration, by loops, and against sampling."""

import importlib
import itertools
import math
import sys

import exact
import frontier
import gpt2_rewards
import kl_estimators
import oracle
import programs
import pytest
import report
import run
import torch
import tyro
import variants

import ppo

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


# ---------------------------------------------------------------------------- Policies
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
    flags = {"sft_steps": 60, "total_episodes": 2_560, "temperature": 0.9, "kl_coef": 0.1}
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
        distances = {"success": [], "kl": []}
        for seed in range(12):
            torch.manual_seed(seed)
            found = ppo.evaluate(policy, reference, prompts, targets, temperature)
            for name in distances:
                distance = (found[name] - expected[name]) / found[f"{name}_error"]
                distances[name].append(distance)
        for values in distances.values():
            # Their mean is within four of its own standard errors, and they scatter by about 1.
            assert abs(sum(values)) / 12 < 4 / 12**0.5
            assert 0.1 < (sum(x**2 for x in values) / 12) ** 0.5 < 2


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


def test_policies_of_process_rewards_are_judged_by_these(trained, few_prompts, tmp_path):
    saved = torch.load(trained, weights_only=True)
    saved["args"]["reward"] = "process"
    torch.save(saved, tmp_path / "process.pt")
    found = exact.evaluate_file(tmp_path / "process.pt")
    plain = exact.evaluate_file(trained)
    assert found["success"] == pytest.approx(plain["success"])
    assert found["score"] > found["success"]  # half the reward is easier to get
    prompts = torch.tensor([(4, 3, 3)] * 4)  # the two digits must have the sum 10
    responses = torch.tensor([(7, 3, 10), (7, 4, 10), (0, 10, 10), (10, 10, 10)])
    assert exact.process_score(prompts, responses).tolist() == [1.0, 0.5, 0.0, 0.0]


# ---------------------------------------------------------------------------- Reward models
@pytest.fixture
def tables():
    """Scores, rewards and probabilities (2, 6) of six responses to two prompts."""
    torch.manual_seed(0)
    scores = torch.randn(2, 6, dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 1]], dtype=torch.float64)
    probs = torch.rand(2, 6, dtype=torch.float64)
    return scores, rewards, probs / probs.sum(1, keepdim=True)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pairs_of(tables, temperature):
    """Every pair of different responses: (weight, score margin, P(first is preferred))."""
    scores, rewards, probs = (table.tolist() for table in tables)
    pairs = []
    for s, r, p in zip(scores, rewards, probs, strict=True):
        for i in range(6):
            for j in range(6):
                if i != j:
                    pairs.append((p[i] * p[j], s[i] - s[j], sigmoid((r[i] - r[j]) / temperature)))
    total = sum(weight for weight, _, _ in pairs)
    return [(weight / total, margin, truth) for weight, margin, truth in pairs]


def test_pair_metrics_by_loops(tables):
    found = exact.pair_metrics(*tables, 0.5)
    pairs = pairs_of(tables, 0.5)
    accuracy = sum(w * (truth if margin > 0 else 1 - truth) for w, margin, truth in pairs)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["bayes_accuracy"] == pytest.approx(sum(w * max(t, 1 - t) for w, _, t in pairs))
    gaps = [0.0] * 10
    for weight, margin, truth in pairs:
        predicted = sigmoid(found["scale"] * margin)
        gaps[int(10 * predicted)] += weight * (predicted - truth)
    assert found["calibration_error"] == pytest.approx(sum(map(abs, gaps)))


def test_the_scale_has_the_lowest_log_loss(tables):
    scores, rewards, probs = tables
    tables = scores + 3 * rewards, rewards, probs
    pairs = pairs_of(tables, 0.5)

    def loss(scale):
        return sum(
            -w * (t * math.log(sigmoid(scale * m)) + (1 - t) * math.log(sigmoid(-scale * m)))
            for w, m, t in pairs
        )

    scale = exact.pair_metrics(*tables, 0.5)["scale"]
    assert 0.1 < scale < 10
    assert loss(scale) < min(loss(0.99 * scale), loss(1.01 * scale))


def test_the_true_reward_is_the_perfect_reward_model(tables):
    _, rewards, probs = tables
    scores = 7 * rewards + torch.tensor([[3.0], [-2.0]])  # in another unit, with constants
    found = exact.pair_metrics(scores, rewards, probs, 0.5)
    assert found["scale"] == pytest.approx(1 / (7 * 0.5), abs=1e-6)
    assert found["calibration_error"] < 1e-9
    logits = found["scale"] * scores
    assert exact.distance_per_prompt(logits, rewards / 0.5, probs) < 1e-6
    # Equal scores are decided by a coin, and equal rewards by the annotator's.
    assert found["accuracy"] == pytest.approx(found["bayes_accuracy"])
    constant = exact.pair_metrics(0 * scores, rewards, probs, 0.5)
    assert constant["accuracy"] == pytest.approx(0.5)


def test_correlation_and_distance_by_loops(tables):
    scores, rewards, probs = (table.tolist() for table in tables)
    rows = []
    square = 0.0
    for s, r, p in zip(scores, rewards, probs, strict=True):
        rows += [(p[i] / 2, s[i], r[i]) for i in range(6)]
        mean = sum(p[i] * (s[i] - r[i]) for i in range(6))
        square += sum(p[i] * (s[i] - r[i] - mean) ** 2 for i in range(6)) / 2
    mean_s = sum(w * s for w, s, _ in rows)
    mean_r = sum(w * r for w, _, r in rows)
    covariance = sum(w * (s - mean_s) * (r - mean_r) for w, s, r in rows)
    variance_s = sum(w * (s - mean_s) ** 2 for w, s, _ in rows)
    variance_r = sum(w * (r - mean_r) ** 2 for w, _, r in rows)
    expected = covariance / math.sqrt(variance_s * variance_r)
    assert exact.correlation(*tables) == pytest.approx(expected)
    assert exact.distance_per_prompt(*tables) == pytest.approx(math.sqrt(square))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_by_enumerating_the_samples(tables, n):
    scores, rewards, probs = (table.tolist() for table in tables)
    expected = 0.0
    for s, r, p in zip(scores, rewards, probs, strict=True):
        for sample in itertools.product(range(6), repeat=n):
            best = max(sample, key=s.__getitem__)
            expected += math.prod(p[i] for i in sample) * r[best] / 2
    assert exact.best_of_n(*tables, n) == pytest.approx(expected)


def test_a_file_of_a_reward_model_is_evaluated(few_prompts, tmp_path):
    members = [make_gpt(seed, outputs=1).float() for seed in [1, 2]]
    reference = make_gpt(3).float()
    reference.head.bias[ppo.EOS] = 2.0  # so that few responses are truncated
    saved = {
        "members": [gpt.state_dict() for gpt in members],
        "reference": reference.state_dict(),
        "uncertainty_coef": 0.0,
        "args": {"annotator_temperature": "0.7"},
    }
    torch.save(saved, tmp_path / "rm.pt")
    found = exact.evaluate_file(tmp_path / "rm.pt")

    model = ppo.RewardModel(2, 0.0).requires_grad_(False)
    model.members = torch.nn.ModuleList(members)
    all_responses = exact.all_responses()
    columns = [i for i, y in enumerate(all_responses.tolist()) if ppo.EOS in y]
    responses = all_responses[columns]
    scores = []
    rewards = []
    probs = []
    for prompt, target in zip(*few_prompts, strict=True):
        scores.append(model(prompt.expand(len(responses), 3), responses).double())
        rewards.append(ppo.reward(target.expand(len(responses)), responses).double())
        prob = exact.response_logprobs(reference, prompt[None], 1.0)[0, columns].exp()
        probs.append(prob / prob.sum())
    tables = torch.stack(scores), torch.stack(rewards), torch.stack(probs)
    expected = exact.pair_metrics(*tables, 0.7)
    scale = expected.pop("scale")
    expected["correlation"] = exact.correlation(*tables)
    expected["best_of_16"] = exact.best_of_n(*tables, 16)
    expected["best_of_16_by_reward"] = exact.best_of_n(tables[1], tables[1], tables[2], 16)
    true_logits = tables[1] / 0.7
    expected["gap"] = exact.distance_per_prompt(scale * tables[0], true_logits, tables[2])
    expected["gap_of_zero"] = exact.distance_per_prompt(0 * tables[0], true_logits, tables[2])
    assert found == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------- The command
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


# ---------------------------------------------------------------------------- The benchmarks
def test_commands_of_the_benchmarks_are_understood():
    commands = [*run.COMMANDS, *variants.COMMANDS, *gpt2_rewards.COMMANDS]
    assert len(commands) > 30
    for command in commands:
        script, *flags = command.split()
        module = importlib.import_module(script.removesuffix(".py"))
        args = tyro.cli(module.Args, args=flags)
        if script in run.TOY_SCRIPTS:
            module.check_args(args)


def test_the_largest_fall_is_below_the_best_so_far():
    scores = [0.5, 0.7, 0.65, 0.9, 0.8, 0.85]
    output = [f"episode  256  score {score:.3f}  KL 0.1" for score in scores]
    assert run.largest_fall(
        run.printed_scores(["ppo__1: 100 parameters", *output])
    ) == pytest.approx(0.1)
    assert run.largest_fall(run.printed_scores(output[:2])) == 0


BENCHMARK = "ppo.py --total-episodes 512 --batch-size 128 --sft-steps 20"


@programs.beside(run.measure, BENCHMARK, seed=3, threads=1)
def test_a_run_of_the_benchmark_has_exact_and_sampled_results(found):
    result, output = found
    assert output[-1].startswith("held-out success")
    assert result["sampled_success"] == pytest.approx(float(output[-1].split()[4]), abs=6e-4)
    assert abs(result["sampled_success"] - result["success"]) < 5 * result["sampled_success_error"]
    assert abs(result["sampled_kl"] - result["kl"]) < 5 * result["sampled_kl_error"]
    assert [episodes for episodes, _ in result["curve"]] == [128, 256, 384, 512]
    assert result["seed"] == 3 and result["cpu_seconds"] > 0


def test_tables_are_made_of_results_and_stay_without_them(tmp_path, monkeypatch):
    text = "a\n<!-- begin kl_coef -->\nold\n<!-- end kl_coef -->\nb"
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.render(text) == text
    metrics = {"success": 0.9, "normalised_gain": 0.8, "kl": 0.5, "entropy": 1.5}
    metrics["cpu_seconds"] = 2.5
    runs = [{"seed": seed, **metrics} for seed in [1, 2, 3]]
    result = {"command": "python x.py", "machine": run.machine(1), "output": [], "runs": runs}
    run.save_results(tmp_path / "kl_coef.json", {"ppo.py --kl-coef 0.1": result})
    table = report.render(text)
    assert "| `ppo.py --kl-coef 0.1` | 0.900 ± 0.000 | 0.800 ± 0.000 |" in table
    assert "`python x.py`: seeds 1 to 3, mean ± standard deviation; 8 CPU seconds." in table
    assert "old" not in table
    assert report.render(table) == table


# ---------------------------------------------------------------------------- Frontier, estimators
def small_reference():
    torch.manual_seed(3)
    reference = ppo.GPT()
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    return reference


def test_frontier_is_that_of_the_enumerated_policies():
    """π* and best-of-n, enumerated response by response, have the success and KL of formulas."""
    _, _, prompts, targets = ppo.make_prompts("cpu")
    prompts = prompts[:5]
    targets = targets[:5]
    logprobs = exact.response_logprobs(small_reference(), prompts, 1.0)
    correct = exact.response_table(ppo.reward, targets, exact.all_responses())
    probs = logprobs.exp()
    p = (probs * correct).sum(1)
    for kl_coef in (0.05, 0.3, 2.0):
        best = (logprobs + correct / kl_coef).log_softmax(1)
        q = frontier.tilted(p, kl_coef)
        torch.testing.assert_close((best.exp() * correct).sum(1), q)
        kl = (best.exp() * (best - logprobs)).sum(1)
        torch.testing.assert_close(kl, frontier.shifted_kl(q, p), atol=1e-9, rtol=1e-6)
    for number in (1, 2, 5):
        # The first correct one of n samples, or the last of n wrong ones.
        wrong = 1 - p
        found = sum(wrong**i for i in range(number))[:, None] * probs * correct
        found = found + (wrong ** (number - 1))[:, None] * probs * (1 - correct)
        torch.testing.assert_close(found.sum(1), torch.ones_like(p))
        q = frontier.best_of(p, number)
        torch.testing.assert_close((found * correct).sum(1), q)
        kl = torch.special.xlogy(found, found / probs).sum(1)
        torch.testing.assert_close(kl, frontier.shifted_kl(q, p), atol=1e-9, rtol=1e-6)


def test_kl_estimators_against_autograd():
    """The mean gradients, by automatic differentiation of the expectations that they belong to."""
    _, _, prompts, _ = ppo.make_prompts("cpu")
    logprobs = exact.next_token_logprobs(small_reference(), prompts[:1], 1.0)[0]
    ref_table = kl_estimators.to_table(logprobs)
    table = (ref_table + torch.randn(ref_table.shape, dtype=torch.float64)).log_softmax(1)
    rows, mask, responses = kl_estimators.ROWS, kl_estimators.MASK, kl_estimators.RESPONSES
    torch.testing.assert_close(ref_table[rows], logprobs)
    probs = kl_estimators.sequence_logprobs(table).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-12)
    wanted, _ = kl_estimators.exact_gradients(table, ref_table, torch.zeros(len(probs)).double())

    def mean(place, kind):
        gradients = kl_estimators.sampled_gradients(table, ref_table, place, kind)
        return kl_estimators.moments(gradients, probs)[0]

    def by_autograd(loss):
        """Of Σ_y π_old(y) Σ_t loss(new, ref), with π_old constant. loss returns (Y, R)."""
        logits = table.clone().requires_grad_(True)
        new = logits.log_softmax(1)[rows]
        value = torch.where(mask, loss(new, ref_table[rows]), 0.0).sum(1)
        return torch.autograd.grad((probs * value).sum(), logits)[0]

    def taken(x):
        return x.gather(2, responses[:, :, None]).squeeze(2)

    def k3_iw(new, ref):
        d = taken(new - ref)
        return taken(new - table[rows]).exp() * (torch.exp(-d) - 1 + d)

    losses = {
        "k1": lambda new, ref: taken(new - ref),
        "k2": lambda new, ref: taken(new - ref) ** 2 / 2,
        "k3": lambda new, ref: torch.exp(-taken(new - ref)) - 1 + taken(new - ref),
        "k3-iw": k3_iw,
        "full": lambda new, ref: (new.exp() * (new - ref)).sum(2),
    }
    for kind, loss in losses.items():
        torch.testing.assert_close(mean("loss", kind), by_autograd(loss), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(mean("reward", "k1"), wanted, atol=1e-9, rtol=1e-7)
    for kind in ("k1", "k2", "k3", "k3-iw", "full"):
        assert (mean("loss", kind) - wanted).norm() > 0.05 * wanted.norm()
    torch.testing.assert_close(mean("loss", "k1"), torch.zeros_like(wanted), atol=1e-9, rtol=0)


def test_the_best_policy_as_a_table():
    _, _, prompts, targets = ppo.make_prompts("cpu")
    logprobs = exact.next_token_logprobs(small_reference(), prompts[:1], 1.0)[0]
    ref_table = kl_estimators.to_table(logprobs)
    responses = kl_estimators.RESPONSES
    rewards = ppo.reward(targets[0].expand(len(responses)), responses).double()
    best = kl_estimators.best_table(ref_table, rewards, 0.3)
    expected = kl_estimators.sequence_logprobs(ref_table) + rewards / 0.3
    found = kl_estimators.sequence_logprobs(best)
    torch.testing.assert_close(found, expected.log_softmax(0), atol=1e-9, rtol=1e-9)


def test_the_covariance_of_a_gradient_by_definition():
    torch.manual_seed(4)
    gradients = torch.randn(1111, 3, 11, dtype=torch.float64)
    gradients = torch.where(kl_estimators.MASK[:, :, None], gradients, 0.0)
    probs = torch.rand(1111, dtype=torch.float64).softmax(0)
    average, variance = kl_estimators.moments(gradients, probs)
    tables = torch.zeros(1111, kl_estimators.NUM_PREFIXES, 11, dtype=torch.float64)
    for y in range(1111):
        for t in range(3):
            if kl_estimators.MASK[y, t]:
                tables[y, kl_estimators.ROWS[y, t]] = gradients[y, t]
    expected = (probs[:, None, None] * tables).sum(0)
    torch.testing.assert_close(average, expected)
    spread = (probs[:, None, None] * (tables - expected) ** 2).sum()
    assert variance.item() == pytest.approx(spread.item(), rel=1e-9)
