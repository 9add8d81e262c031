"""reward_model.py: losses against loops, reports against enumeration, a person in a terminal."""

import contextlib
import itertools
import json
import math
import os
import pickle
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
import reinforce
import reward_model

EOS = 10
PROMPT = (4, 3, 3)
TRAINERS = [ppo, grpo, reinforce]


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def draws(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- Losses


@pytest.mark.parametrize("chosen,rejected,printed", [(2.89, 3.25, 0.8893), (2.89, 2.0, 0.3441)])
def test_losses_printed_in_the_tutorial(chosen, rejected, printed):
    no_tie = torch.tensor([False])
    loss, _ = reward_model.preference_loss(float64(chosen), float64(rejected), no_tie)
    assert round(loss.item(), 4) == printed


def test_bradley_terry_with_ties_by_loops():
    chosen, rejected = draws(0, 2, 9)
    ties = torch.tensor([False, True, False, True, True, False, False, False, True])
    expected = []
    for a, b, tie in zip(chosen.tolist(), rejected.tolist(), ties.tolist(), strict=True):
        one, other = -math.log(sigmoid(a - b)), -math.log(sigmoid(b - a))
        expected.append((one + other) / 2 if tie else one)
    loss, metrics = reward_model.preference_loss(chosen, rejected, ties)
    assert loss.item() == pytest.approx(sum(expected) / 9, abs=1e-9)
    gaps = (chosen - rejected).tolist()
    assert metrics["chosen"].item() == pytest.approx(sum(chosen.tolist()) / 9)
    assert metrics["rejected"].item() == pytest.approx(sum(rejected.tolist()) / 9)
    assert metrics["margins"].item() == pytest.approx(sum(gaps) / 9)
    assert metrics["accuracies"].item() == pytest.approx(sum(g > 0 for g in gaps) / 9)
    equal = reward_model.preference_loss(chosen, chosen, ties)[1]
    assert equal["accuracies"] == 0.5  # undecided is half right


def test_classifier_by_loops():
    scores, labels = draws(1, 7), torch.tensor([True, False, False, True, True, False, True])
    terms = [
        -math.log(sigmoid(s) if good else 1 - sigmoid(s))
        for s, good in zip(scores.tolist(), labels.tolist(), strict=True)
    ]
    loss, metrics = reward_model.label_loss(scores, labels)
    assert loss.item() == pytest.approx(sum(terms) / 7, abs=1e-9)
    right = [(s > 0) == good for s, good in zip(scores.tolist(), labels.tolist(), strict=True)]
    assert metrics["accuracies"].item() == pytest.approx(sum(right) / 7)
    good = [s for s, g in zip(scores.tolist(), labels.tolist(), strict=True) if g]
    assert metrics["chosen"].item() == pytest.approx(sum(good) / len(good))


def test_demonstration_loss_by_loops():
    demonstrated, sampled = draws(2, 5), draws(3, 5, 4)
    terms = []
    for own, others in zip(demonstrated.tolist(), sampled.tolist(), strict=True):
        terms.append(-own + math.log(sum(math.exp(x) for x in others) / 4))
    loss, metrics = reward_model.demonstration_loss(demonstrated, sampled)
    assert loss.item() == pytest.approx(sum(terms) / 5, abs=1e-9)
    beaten = [a > b for a, row in zip(demonstrated, sampled, strict=True) for b in row]
    assert metrics["accuracies"].item() == pytest.approx(sum(beaten) / 20)
    assert reward_model.demonstration_loss(demonstrated + 3, sampled + 3)[0].item() == (
        pytest.approx(loss.item())  # a constant a prompt is not seen
    )


# ---------------------------------------------------------------- What the losses make r tend to


class World:
    """A tabular reference that writes 11 responses to one prompt, and what they earn."""

    def __init__(self):
        everything, self.lists = oracle.responses(), oracle.narrow_responses()
        logits = oracle.narrow(oracle.table(0))
        rows = [everything.index(y) for y in self.lists]
        self.logprobs = oracle.token_table(logits)[rows].sum(1)
        self.probs = self.logprobs.exp() / self.logprobs.exp().sum()
        self.rewards = float64(*[oracle.score(PROMPT, y, "sharp") for y in self.lists])
        self.tokens = torch.tensor([[*y, *[EOS] * (3 - len(y))] for y in self.lists])


def minimise(loss):
    """The 11 scores at which a loss is least."""
    scores = torch.zeros(11, dtype=torch.float64, requires_grad=True)
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


def expected_pair_loss(votes):
    """votes (11, 11): how often i was preferred to j. The script's loss on all those judgements."""
    first, second = torch.cartesian_prod(torch.arange(11), torch.arange(11)).T
    no_tie = torch.tensor([False])
    one = lambda a, b: reward_model.preference_loss(a[None], b[None], no_tie)[0]  # noqa: E731

    def loss(scores):
        each = torch.vmap(one)(scores[first], scores[second])
        return (each * votes[first, second]).sum() / votes.sum()

    return loss


def spread(found, exact):
    """Deviation between two vectors of scores but for a constant."""
    return (found - exact).std(correction=0).item()


def test_bradley_terry_tends_to_the_true_reward_over_temperature_but_for_a_constant():
    """Exactly at the expected loss; with N judgements the error falls as one over the root of N."""
    world, temperature = World(), 0.5
    truth = world.rewards / temperature
    prefers = (truth[:, None] - truth).sigmoid()
    assert spread(minimise(expected_pair_loss(prefers)), truth) < 1e-5
    generator, errors = torch.Generator().manual_seed(0), []
    for number in (10**3, 10**5, 10**7):  # each pair alike often; counts are nearly normal
        mean, variance = number / 121 * prefers, number / 121 * prefers * (1 - prefers)
        votes = torch.normal(mean, variance.sqrt(), generator=generator).clamp(min=0)
        errors.append(spread(minimise(expected_pair_loss(votes)), truth))
    assert errors[0] < 1 and errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4


def test_a_tie_is_half_a_judgement_each_way():
    a, b = draws(4, 2, 6)
    yes, no = torch.ones(6).bool(), torch.zeros(6).bool()
    tie, one, other = (
        reward_model.preference_loss(*pair)[0].item()
        for pair in ((a, b, yes), (a, b, no), (b, a, no))
    )
    assert tie == pytest.approx((one + other) / 2)


def test_labels_tend_to_the_true_reward_less_one_half_over_temperature():
    world, temperature = World(), 0.5
    good = ((world.rewards - 0.5) / temperature).sigmoid()

    def loss(scores):
        total = 0
        for label, chance in ((True, good), (False, 1 - good)):
            for i in range(11):
                one = reward_model.label_loss(scores[i, None], torch.tensor([label]))[0]
                total = total + chance[i] * one
        return total

    exact = (world.rewards - 0.5) / temperature
    torch.testing.assert_close(minimise(loss), exact, atol=1e-4, rtol=0)


def test_demonstrations_tend_to_log_demonstrator_over_reference():
    """With so many samples that the reference's shares are those of its probabilities."""
    world, temperature = World(), 0.5
    shares = (world.probs * 1000).round().long().clamp(min=1)
    sampled = torch.arange(11).repeat_interleave(shares)
    reference = shares / shares.sum()
    demonstrator = reference * (world.rewards / temperature).exp()
    demonstrator = demonstrator / demonstrator.sum()

    def loss(scores):
        rows = scores[sampled].expand(11, -1)
        one = [reward_model.demonstration_loss(scores[i, None], rows[:1])[0] for i in range(11)]
        return sum(p * x for p, x in zip(demonstrator, one, strict=True))

    found = minimise(loss)
    assert spread(found, (demonstrator / reference).log()) < 1e-4
    assert spread(found, world.rewards / temperature) < 1e-4


def test_partition_function_is_unbiased_and_its_logarithm_converges():
    world = World()
    scores = world.rewards
    exact = sum(p * math.exp(s) for p, s in zip(world.probs.tolist(), scores.tolist(), strict=True))
    biases = []
    for number in (1, 2, 4):
        index = torch.cartesian_prod(*[torch.arange(11)] * number).view(-1, number)
        chance = world.probs[index].prod(1)
        logs = reward_model.log_partition(scores[index])
        assert (chance * logs.exp()).sum().item() == pytest.approx(exact, abs=1e-9)
        biases.append(math.log(exact) - (chance * logs).sum().item())
    assert biases[0] > 1.4 * biases[1] > 1.4 * 1.4 * biases[2] > 0
    variance = (world.probs * (scores.exp() - exact) ** 2).sum().item()
    assert biases[2] == pytest.approx(variance / (2 * 4 * exact**2), rel=0.2)
    many = torch.multinomial(world.probs, 10**6, True, generator=torch.Generator().manual_seed(0))
    found = reward_model.log_partition(scores[many][None]).item()
    assert found == pytest.approx(math.log(exact), abs=0.01)


# ---------------------------------------------------------------- Judgements that are made up


@pytest.fixture
def world(monkeypatch):
    """Let generate draw from the tabular reference; the reward is the oracle's sharp one."""
    world = World()

    def generate(policy, prompts, temperature):
        assert temperature == 1.0
        return world.tokens[torch.multinomial(world.probs.expand(len(prompts), 11), 1).squeeze(1)]

    monkeypatch.setattr(reward_model, "generate", generate)
    rewards = reward_model.reward
    monkeypatch.setattr(reward_model, "reward", lambda p, r: rewards(p, r, "sharp"))
    torch.manual_seed(0)
    return world


def index_of(world, responses):
    return (responses[:, None] == world.tokens).all(2).float().argmax(1)


PROMPTS = torch.tensor([PROMPT])


def test_annotator_prefers_with_the_odds_of_bradley_and_terry(world):
    prompts = PROMPTS.repeat(20_000, 1)
    x, chosen, rejected, ties = reward_model.sample_comparisons(None, prompts, 8, 0.25)
    assert x.shape == chosen.shape == rejected.shape == (len(ties), 3) and not ties.any()
    unlike = 1 - (world.probs**2).sum().item()  # of 28 pairs a group
    assert len(ties) / (28 * 20_000) == pytest.approx(unlike, abs=0.01)
    first, second = index_of(world, chosen), index_of(world, rejected)
    seen = torch.zeros(11, 11).index_put((first, second), torch.tensor(1.0), accumulate=True)
    for i, j in itertools.combinations(range(11), 2):
        both = seen[i, j] + seen[j, i]
        assert both > 0 and seen[i, i] == seen[j, j] == 0
        expected = sigmoid((world.rewards[i] - world.rewards[j]) / 0.25)
        assert abs(seen[i, j] / both - expected) < 5 * 0.5 / both.sqrt()


def test_labels_are_good_with_the_stated_odds(world):
    x, responses, labels = reward_model.sample_labels(None, PROMPTS.repeat(50_000, 1), 4, 0.25)
    assert x.shape == responses.shape == (200_000, 3) and labels.dtype == torch.bool
    rows = index_of(world, responses)
    for i in range(11):
        own = labels[rows == i].float()
        expected = sigmoid((world.rewards[i] - 0.5) / 0.25)
        assert abs(own.mean() - expected) < 5 * 0.5 / math.sqrt(len(own))


def test_demonstrator_is_the_tilted_reference_and_samples_are_the_reference(world):
    prompts = torch.cat([PROMPTS, torch.tensor([[2, 1, 2]])])
    how = None, prompts, 3, 0.25
    x, responses, samples = reward_model.sample_demonstrations(*how)
    assert x.tolist() == [[4, 3, 3]] * 3 + [[2, 1, 2]] * 3
    assert (samples[:3] == samples[0]).all() and (samples[3:] == samples[3]).all()
    how = None, PROMPTS.repeat(33_334, 1), 3, 0.25
    x, responses, samples = reward_model.sample_demonstrations(*how)
    assert x.shape == responses.shape == (100_002, 3) and samples.shape == (100_002, 3, 3)
    tilted = world.probs * (world.rewards / 0.25).exp()
    for found, exact in (
        (responses, tilted / tilted.sum()),
        (samples[::3].flatten(0, 1), world.probs),  # each group's are the same
    ):
        shares = torch.bincount(index_of(world, found), minlength=11) / len(found)
        assert (shares - exact).abs().max() < 5 * 0.5 / math.sqrt(100_000)


# ---------------------------------------------------------------- The model


def random_model(seed=0):
    """A reward model whose blocks are not the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = reward_model.GPT(outputs=1).requires_grad_(False)
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def everything(number=4):
    """Some prompts with all 1111 responses to each."""
    prompts = reward_model.make_prompts()[1][:number]
    responses = reward_model.all_responses()
    return prompts.repeat_interleave(1111, 0), responses.repeat(number, 1)


def test_score_is_read_at_the_last_real_token():
    model, (prompts, responses) = random_model(), everything(1)
    found = reward_model.response_scores(model, prompts, responses)
    assert found.shape == (1111,)
    for i in range(0, 1111, 7):
        real = [t for k, t in enumerate(responses[i].tolist()) if EOS not in responses[i, :k]]
        tokens = torch.tensor([prompts[i].tolist() + real])
        alone = model.head(model(tokens))[0, -1, 0]
        assert found[i].item() == pytest.approx(alone.item(), abs=1e-5)


def test_score_does_not_depend_on_what_follows_eos_or_on_the_batch():
    model, (prompts, responses) = random_model(), everything(2)
    scores = reward_model.response_scores(model, prompts, responses)
    real = reward_model.response_mask(responses)
    assert (~real).any()
    garbage = torch.where(real, responses, torch.randint(0, 11, responses.shape))
    torch.testing.assert_close(reward_model.response_scores(model, prompts, garbage), scores)
    for size in (1, 3, 500):
        rows = slice(10, 10 + size)
        some = reward_model.response_scores(model, prompts[rows], responses[rows])
        torch.testing.assert_close(some, scores[rows], atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.1


def test_normalise_shifts_and_scales_and_says_by_how_much():
    model, (prompts, responses) = random_model(), everything(1)
    before = reward_model.response_scores(model, prompts, responses).double()
    std = reward_model.normalise(model, prompts, responses)
    after = reward_model.response_scores(model, prompts, responses).double()
    assert std.item() == pytest.approx(oracle.deviation(before.tolist()), rel=1e-4)
    assert abs(after.mean()) < 1e-4 and oracle.deviation(after.tolist()) == pytest.approx(1, 1e-4)
    torch.testing.assert_close(after * std, before - before.mean(), atol=1e-4, rtol=0)


def test_score_table_is_in_the_order_of_prompts_and_responses():
    model = random_model()
    prompts, responses = reward_model.make_prompts()[1][:3], reward_model.all_responses()
    table = reward_model.score_table(model, prompts, responses)
    flat = reward_model.response_scores(model, *everything(3)).double()
    torch.testing.assert_close(table, flat.view(3, 1111), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- The reports


def tables(seed=0):
    """Scores, true rewards and probabilities (2, 5), with equal scores and equal rewards."""
    scores = draws(seed, 2, 5)
    scores[0, 1] = scores[0, 3]
    rewards = float64([1, 0, 0.5, 0.5, 0], [0, 1, 1, 0.2, 0.2])
    return scores, rewards, draws(seed + 1, 2, 5).softmax(1)


def test_pair_metrics_by_loops():
    scores, rewards, probs = tables()
    right = best = 0.0
    bins = [[0.0, 0.0] for _ in range(10)]
    for n, i, j in itertools.product(range(2), range(5), range(5)):
        weight = (probs[n, i] * probs[n, j]).item() / 2
        truth = sigmoid((rewards[n, i] - rewards[n, j]).item() / 0.5)
        gap = (scores[n, i] - scores[n, j]).item()
        right += weight * (truth if gap > 0 else 1 - truth if gap < 0 else 0.5)
        best += weight * max(truth, 1 - truth)
        cell = bins[min(int(10 * sigmoid(gap)), 9)]
        cell[0] += weight * sigmoid(gap)
        cell[1] += weight * truth
    found = reward_model.pair_metrics(scores, rewards, probs, 0.5)
    assert found["accuracy"].item() == pytest.approx(right, abs=1e-9)
    assert found["attainable"].item() == pytest.approx(best, abs=1e-9)
    error = sum(abs(a - b) for a, b in bins)
    assert found["calibration_error"].item() == pytest.approx(error, abs=1e-9) and error > 0.05


def test_the_true_reward_attains_what_is_attainable_and_is_calibrated():
    _, rewards, probs = tables()
    found = reward_model.pair_metrics(rewards / 0.5, rewards, probs, 0.5)
    assert found["accuracy"].item() == pytest.approx(found["attainable"].item())
    assert found["calibration_error"] < 1e-9
    sure = reward_model.pair_metrics(rewards, rewards, probs, 1e-3)
    alike = sum(
        (p[r == v].sum() ** 2).item()
        for p, r in zip(probs, rewards, strict=True)
        for v in r.unique()
    )
    assert sure["attainable"].item() == pytest.approx(1 - alike / 4)  # ties are a coin's


def test_correlation_by_loops():
    scores, rewards, probs = tables()
    rows = [
        (probs[n, i].item() / 2, scores[n, i].item(), rewards[n, i].item())
        for n, i in itertools.product(range(2), range(5))
    ]
    mean_s, mean_r = (
        sum(w * row for w, *row in [(r[0], r[k]) for r in rows] for row in row) for k in (1, 2)
    )
    cov = sum(w * (s - mean_s) * (r - mean_r) for w, s, r in rows)
    var_s, var_r = (
        sum(w * (s - mean_s) ** 2 for w, s, _ in rows),
        sum(w * (r - mean_r) ** 2 for w, _, r in rows),
    )
    found = reward_model.correlation(scores, rewards, probs).item()
    assert found == pytest.approx(cov / math.sqrt(var_s * var_r), abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_by_enumerating_all_samples(n):
    scores, rewards, probs = tables(3)
    scores = draws(9, 2, 5)
    expected = 0.0
    for row in range(2):
        for drawn in itertools.product(range(5), repeat=n):
            chance = math.prod(probs[row, i].item() for i in drawn)
            expected += chance * rewards[row, max(drawn, key=lambda i: scores[row, i])].item() / 2
    found = reward_model.best_of_n(scores, rewards, probs, n).item()
    assert found == pytest.approx(expected, abs=1e-9)
    own = reward_model.best_of_n(rewards, rewards, probs, n).item()
    assert own >= found


def test_evaluation_of_an_ensemble():
    _, rewards, probs = tables()
    members, stds = torch.stack([draws(5, 2, 5), draws(6, 2, 5)]), float64(2.0, 0.5)
    found = reward_model.evaluate_scores(members, stds, rewards, probs, 0.5)
    logits = (2 * members[0] + 0.5 * members[1]) / 2
    expected = reward_model.pair_metrics(logits, rewards, probs, 0.5)
    assert all(found[name] == pytest.approx(x.item()) for name, x in expected.items())
    assert found["correlation"] == pytest.approx(
        reward_model.correlation(logits, rewards, probs).item()
    )
    gaps = (members[0] - members[1]).abs() / 2  # deviation of two over N
    assert found["disagreement"] == pytest.approx((gaps * probs).sum().item() / 2)
    for name, judge in (("best_of_16", logits), ("best_of_16_attainable", rewards)):
        best = reward_model.best_of_n(judge, rewards, probs, 16).item()
        assert found[name] == pytest.approx(best, rel=1e-12)
    assert found["best_of_16"] < found["best_of_16_attainable"]


# ---------------------------------------------------------------- Files of judgements

GOOD = '{"prompt": "433", "chosen": "73", "rejected": "11"}'


@pytest.mark.parametrize(
    "text,tokens", [("73", [7, 3, EOS]), ("7", [7, EOS, EOS]), ("", [EOS] * 3), ("733", [7, 3, 3])]
)
def test_judgements_are_parsed(text, tokens):
    line = json.dumps({"prompt": "433", "chosen": text, "rejected": "11", "note": 5})
    assert reward_model.parse_judgement(line) == ([4, 3, 3], tokens, [1, 1, EOS], False)
    assert reward_model.parse_judgement(GOOD[:-1] + ', "tie": true}')[3] is True


def test_file_becomes_tensors(tmp_path):
    path = tmp_path / "judged.jsonl"
    path.write_text(GOOD + "\n" + GOOD.replace("73", "7")[:-1] + ', "tie": true}')
    prompts, chosen, rejected, ties = reward_model.read_preferences(path)
    assert prompts.tolist() == [[4, 3, 3]] * 2 and rejected.tolist() == [[1, 1, EOS]] * 2
    assert chosen.tolist() == [[7, 3, EOS], [7, EOS, EOS]] and ties.tolist() == [False, True]


BAD_LINES = [
    ("{", "is not JSON"),
    ("", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[1]", "is not an object"),
    (GOOD.replace("433", "43"), '"prompt"'),
    (GOOD.replace("433", "4333"), '"prompt"'),
    (GOOD.replace('"433"', "433"), '"prompt"'),
    (GOOD.replace("73", "7a"), '"chosen"'),
    (GOOD.replace("73", "٣٣"), '"chosen"'),
    (GOOD.replace("11", "1111"), '"rejected"'),
    ('{"prompt": "433", "chosen": "73"}', '"rejected"'),
    (GOOD[:-1] + ', "tie": "yes"}', '"tie"'),
]


@pytest.mark.parametrize("line,reason", BAD_LINES)
def test_a_bad_line_is_named_with_its_number(line, reason, tmp_path, capsys):
    path = tmp_path / "judged.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(SystemExit) as stop:
        reward_model.read_preferences(path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "line 3" in error and reason in error and "--preferences" in error


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_file_that_is_missing_empty_or_no_text(content, tmp_path, capsys):
    path = tmp_path / "judged.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        reward_model.read_preferences(path)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------- A person in a terminal


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
        self.wait_for("judgements: python reward_model.py")
        code = self.process.wait(60)
        with contextlib.suppress(OSError):  # it has ended
            while select.select([self.fd], [], [], 0)[0]:
                self.screen += os.read(self.fd, 4096).decode()
        os.close(self.fd)
        return code


def shown_pair(screen):
    """Prompt, A and B of the question asked last, as in the file."""
    prompt, a, b = re.findall(r"\] (\d+) +A: (\S+) +B: (\S+)", screen)[-1]
    texts = [text.replace("(nothing)", "").replace("...", "") for text in (a, b)]
    return prompt, *texts


def test_annotation_in_a_terminal(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.jsonl"
    lines = lambda: [json.loads(x) for x in file.read_text().splitlines()]  # noqa: E731

    first = Terminal(tmp_path, "6")
    pairs = [shown_pair(first.answer("x\n"))]
    assert "one of these letters" in first.answer("\n") + first.answer("ab\n") + first.answer("A\n")
    pairs.append(shown_pair(first.answer("b\n")))
    first.wait_for("to quit: ")
    assert len(lines()) == 2  # on disk while the third is on the screen
    time.sleep(0.5)  # until it reads: input() sleeps on if a signal comes just before
    os.write(first.fd, b"\x03")  # Ctrl-C
    assert first.end() == 0 and "Traceback" not in first.screen
    (p1, a1, b1), (p2, a2, b2) = pairs
    assert lines() == [
        {"prompt": p1, "chosen": a1, "rejected": b1},
        {"prompt": p2, "chosen": b2, "rejected": a2},
    ]

    second = Terminal(tmp_path, "6")
    shown = second.answer("t\n")
    assert "2 of 6" in shown and "[3]" in shown
    pairs.append(shown_pair(shown))
    pairs.append(shown_pair(second.answer("a\n")))
    second.wait_for("to quit: ")
    os.write(second.fd, b"\x04")  # end of input
    assert second.end() == 0
    p3, a3, b3 = pairs[2]
    assert lines()[2] == {"prompt": p3, "chosen": a3, "rejected": b3, "tie": True}

    def annotate(keys, seed):  # the same without a terminal, which is quicker
        keys = iter(keys)
        monkeypatch.setattr("builtins.input", lambda _: next(keys))
        run(**PLAIN | {"annotate": 6, "preferences": file, "sft_steps": 0, "seed": seed})
        return capsys.readouterr().out

    pairs.append(shown_pair(annotate("Bq", 2).split("[6]")[0]))
    assert len(lines()) == 5
    pairs.append(shown_pair(annotate("a", 1)))
    assert len(lines()) == 6  # as many as asked for: it ended by itself
    train = {"".join(map(str, p)) for p in reward_model.make_prompts()[0].tolist()}
    assert all(x["prompt"] in train for x in lines())
    assert {p.name for p in tmp_path.iterdir()} == {"mine.jsonl"}

    result = run(preferences=file, epochs=2, minibatch_size=2, num_responses=FILE["num_responses"])
    assert math.isfinite(result["accuracy"])
    assert "left out" not in capsys.readouterr().out


def test_no_pair_is_asked_for_twice(tmp_path, monkeypatch, capsys):
    eos = reward_model.EOS
    one, other, third = [7, 3, eos], [1, 1, eos], [9, eos, eos]
    drawn = [[one, other], [other, one], [one, one], [one, other], [third, one]]
    monkeypatch.setattr(reward_model, "generate", lambda *_: torch.tensor(drawn.pop(0)))
    monkeypatch.setattr("builtins.input", lambda _: "b")
    path = tmp_path / "mine.jsonl"
    reward_model.judge_pairs(None, torch.tensor([[4, 3, 3]]), path, 2)
    assert drawn == [] and len(path.read_text().splitlines()) == 2
    drawn += [[one, third], [third, other]]  # nor when it goes on
    reward_model.judge_pairs(None, torch.tensor([[4, 3, 3]]), path, 3)
    assert drawn == []
    judged = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["chosen"], line["rejected"]) for line in judged] == [
        ("11", "73"),
        ("73", "9"),
        ("11", "9"),
    ]


def test_a_line_without_an_end_is_ended_before_the_next(tmp_path, monkeypatch):
    path = Path("mine.jsonl")
    path.write_text(GOOD)
    monkeypatch.setattr("builtins.input", lambda _: "a")
    run(
        annotate=3,
        preferences=path,
        num_responses=reward_model.Args.num_responses,
        epochs=reward_model.Args.epochs,
        minibatch_size=reward_model.Args.minibatch_size,
    )
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and all(map(reward_model.parse_judgement, lines)) and lines[0] == GOOD


# ---------------------------------------------------------------- The program


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    words = "--num-responses 64 --sft-steps 5 --epochs 1 --ensemble-size 2 --save-path rm.pt"
    yield from programs.start(f"reward_model.py {words}", tmp_path_factory.mktemp("program"))


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, reward_model, *TRAINERS)


def run(**flags):
    """Learn from 8 groups of 8 unless told otherwise; the result without the time taken."""
    defaults = {"num_responses": 64, "epochs": 1, "minibatch_size": 2, "sft_steps": 20}
    result = reward_model.main(reward_model.Args(**(defaults | {"tensorboard": False} | flags)))
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("kind", ["preferences", "labels", "demonstrations"])
def test_a_step_reads_each_response_once_for_all_judgements_about_its_prompts(kind, monkeypatch):
    """Scores are made to say of which prompt and response they are."""
    train, held_out = reward_model.make_prompts()
    monkeypatch.setattr(reward_model, "make_prompts", lambda: (train[:3], held_out))
    judged, learned, asked, steps, place = [], [], [], [], torch.tensor([1, 11, 121])

    def coded(x, y):
        prompt, response = (x * place).sum(1), (y * place).sum(-1)
        return prompt.view(-1, *[1] * (response.dim() - 1)) + 1331 * response

    def rows(columns):
        return map(tuple, torch.cat([c.long().view(len(c), -1) for c in columns], 1).tolist())

    def noted_sample(policy, x, *how):
        asked.extend(map(tuple, x.tolist()))
        x, *columns = sample(policy, x, *how)
        if kind == "preferences":
            columns[2][::3] = True  # some ties
        judged.extend(rows([c if c.dtype == torch.bool else coded(x, c) for c in columns]))
        return x, *columns

    def scores(model, x, y):
        steps.append(coded(x, y).tolist())
        return coded(x, y) + 0 * model.head.bias

    def noted_loss(*columns):
        steps.append([*rows(columns)])
        learned.extend(steps[-1])
        return loss(*columns)

    sampler = "sample_" + kind.replace("preferences", "comparisons")
    sample, loss = getattr(reward_model, sampler), getattr(reward_model, f"{kind[:-1]}_loss")
    monkeypatch.setattr(reward_model, sampler, noted_sample)
    monkeypatch.setattr(reward_model, "response_scores", scores)
    monkeypatch.setattr(reward_model, f"{kind[:-1]}_loss", noted_loss)
    run(learn_from=kind, num_responses=48, minibatch_size=1)
    assert sorted(asked) == sorted(map(tuple, train[:3].tolist() * 2))  # in turn, twice each
    assert sorted(learned) == sorted(judged) and len(judged) >= 48
    prompts = set()
    for read, batch in zip(steps[0:6:2], steps[1:6:2], strict=True):
        scored = [code for row in batch for code in (row if kind == "demonstrations" else row[:-1])]
        assert sorted(read) == sorted(set(scored))
        prompts.add(*{code % 1331 for code in read})  # of one prompt
    assert len(prompts) == 3


DEMONSTRATIONS = {"learn_from": "demonstrations"}
CHOICES = [
    {"learn_from": "labels"},
    DEMONSTRATIONS,
    DEMONSTRATIONS | {"group_size": 4},
    {"num_responses": 32},
    {"group_size": 4},
    {"epochs": 2},
    {"minibatch_size": 4},
    {"ensemble_size": 2},
    {"annotator_temperature": 0.01},
    {"weight_decay": 100.0},
    {"learning_rate": 1e-4},
    {"max_grad_norm": 0.001},
    {"sft_steps": 0},
    {"seed": 2},
]


def test_every_flag_and_choice_changes_the_outcome_and_the_same_seed_does_not():
    results = [run(), *[run(**flags) for flags in CHOICES]]
    assert all(math.isfinite(value) for result in results for value in result.values())
    assert len({result["correlation"] for result in results}) == len(results)
    assert run() == results[0] and run(**DEMONSTRATIONS) == results[2]
    assert results[0]["disagreement"] == 0 < results[8]["disagreement"]


def test_held_out_prompts_of_a_file_are_not_learned_from(capsys, monkeypatch):
    train, held_out = reward_model.make_prompts()
    digits = lambda row: "".join(map(str, row.tolist()))  # noqa: E731
    lines = [GOOD.replace("433", digits(row)) for row in (*train[:6], *held_out[:3])]
    losses, seen = reward_model.preference_loss, []
    monkeypatch.setattr(
        reward_model, "preference_loss", lambda a, *rest: seen.append(len(a)) or losses(a, *rest)
    )
    Path("f.jsonl").write_text("\n".join(lines))
    number = reward_model.Args.num_responses
    run(preferences=Path("f.jsonl"), num_responses=number, minibatch_size=6)
    assert seen == [6] and "left out 3 of 9 judgements" in capsys.readouterr().out
    Path("f.jsonl").write_text("\n".join(lines[6:]))
    with pytest.raises(SystemExit) as stop:
        run(preferences=Path("f.jsonl"), num_responses=number)
    assert stop.value.code == 2 and "held-out" in capsys.readouterr().err


FILE = {"preferences": Path("missing.jsonl"), "num_responses": reward_model.Args.num_responses}
PLAIN = {name: getattr(reward_model.Args, name) for name in ("epochs", "minibatch_size")} | FILE


def test_values_at_the_border_are_taken(tmp_path):
    check, args = reward_model.check_args, reward_model.Args
    check(args(seed=0, sft_steps=0, num_responses=2, group_size=2, epochs=1, minibatch_size=1))
    check(args(seed=2**63 - 1, weight_decay=0.0, ensemble_size=1))
    check(args(annotate=1, preferences=tmp_path / "new.jsonl"))


BAD = [
    ({"num_responses": 0}, "num-responses"),
    ({"num_responses": 7}, "num-responses"),
    ({"group_size": 1}, "group-size"),
    ({"epochs": 0}, "epochs"),
    ({"minibatch_size": 0}, "minibatch-size"),
    ({"ensemble_size": 0}, "ensemble-size"),
    ({"learning_rate": 0.0}, "learning-rate"),
    ({"learning_rate": float("nan")}, "learning-rate"),
    ({"max_grad_norm": 0.0}, "max-grad-norm"),
    ({"annotator_temperature": 0.0}, "annotator-temperature"),
    ({"annotator_temperature": float("inf")}, "annotator-temperature"),
    ({"weight_decay": -1.0}, "weight-decay"),
    ({"seed": -1}, "seed"),
    ({"sft_steps": -1}, "sft-steps"),
    ({"annotate": 3}, "annotate"),
    (PLAIN | {"annotate": 0}, "annotate"),
    (PLAIN | {"annotate": 3, "preferences": Path("missing/f.jsonl")}, "annotate"),
    (PLAIN | {"annotate": 3, "save_path": Path("rm.pt")}, "save-path"),
    (PLAIN | {"annotate": 3, "ensemble_size": 2}, "ensemble-size"),
    (FILE, "preferences"),
    (FILE | {"num_responses": 64}, "num-responses"),
    (FILE | {"group_size": 4}, "group-size"),
    (FILE | {"learn_from": "labels"}, "learn-from"),
    ({"device": "cuda"}, "device"),
]


@pytest.mark.parametrize("flags,named", BAD)
def test_bad_values_end_with_one_line_and_nothing_written(flags, named, capsys, tmp_path):
    if flags.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a cuda device")
    with pytest.raises(SystemExit) as stop:
        run(**({"tensorboard": True} | flags))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert error.count("\n") == 1 and f"--{named}" in error
    assert list(tmp_path.iterdir()) == []


def test_bad_words_are_refused_by_the_parser():
    for words in (["--learn-from", "nothing"], ["--reward", "exact"], ["--annotate", "x"]):
        with pytest.raises(SystemExit) as stop:
            tyro.cli(reward_model.Args, args=words)
        assert stop.value.code == 2


def test_a_step_that_is_not_finite_stops_the_run(monkeypatch):
    broken = lambda a, b, t: ((a * math.inf).sum(), {})  # noqa: E731
    monkeypatch.setattr(reward_model, "preference_loss", broken)
    with pytest.raises(SystemExit) as stop:
        run()
    assert "step 1" in str(stop.value.code) and "--learning-rate" in str(stop.value.code)


def test_rewards_are_logged_and_the_rate_rises_and_falls(monkeypatch):
    curves, write = {}, reward_model.write

    def noted(writer, group, metrics, step):
        for name, value in metrics.items():
            curves.setdefault(f"{group}/{name}", []).append(float(value))
        write(writer, group, metrics, step)

    monkeypatch.setattr(reward_model, "write", noted)
    run(epochs=5, learning_rate=1e-4, ensemble_size=2)
    for name in "chosen rejected margins accuracies".split():
        assert len(curves[f"rewards/{name}"]) == 20  # two steps each
    gaps = zip(curves["rewards/chosen"], curves["rewards/rejected"], strict=True)
    assert [a - b for a, b in gaps] == pytest.approx(curves["rewards/margins"], abs=1e-5)
    rates = curves["charts/learning_rate"]
    for own in (rates[:10], rates[10:]):  # the second step of each two; for each member anew
        middle = [k - 0.5 for k in range(2, 21, 2)]
        assert own == pytest.approx([1e-4 * min(k / 2, (20 - k) / 20) for k in middle])
    assert {"losses/loss", "losses/grad_norm"} <= set(curves)


def test_learning_finds_an_easy_reward(monkeypatch):
    """Is the first digit above 4? All three kinds of judgements teach it in a few steps."""
    easy = lambda p, r: ((r[:, 0] > 4) & (r[:, 0] != EOS)).float()  # noqa: E731
    monkeypatch.setattr(reward_model, "reward", easy)
    flags = {"minibatch_size": 4, "annotator_temperature": 0.25, "num_responses": 2048}
    for kind in ("preferences", "labels", "demonstrations"):
        result = run(learn_from=kind, **flags)
        assert result["accuracy"] > result["attainable"] - 0.02, kind
        assert result["correlation"] > 0.6, kind  # r may be off by a constant a prompt
        assert result["calibration_error"] < 0.1, kind
        assert result["best_of_16"] > 0.98 * result["best_of_16_attainable"], kind


# ---------------------------------------------------------------- Its file, in the other scripts


def save(path, seeds=(0, 1), **changes):
    models = [random_model(seed).state_dict() for seed in seeds]
    torch.save({"script": "reward_model.py", "args": {}, "models": models} | changes, path)
    return path


@pytest.mark.parametrize("coef", [0.0, 0.7])
@pytest.mark.parametrize("script", TRAINERS, ids=lambda script: script.__name__)
def test_loaded_score_is_the_mean_less_the_deviation(script, coef, tmp_path):
    score = script.load_reward_model(save(tmp_path / "rm.pt", (0, 1, 2)), coef, "cpu")
    prompts, responses = everything(2)
    rows = torch.randint(len(prompts), (3000,))
    each = [reward_model.response_scores(random_model(s), prompts, responses) for s in range(3)]
    expected = []
    for values in zip(*(x.tolist() for x in each), strict=True):
        expected.append(sum(values) / 3 - coef * oracle.deviation(values))
    expected = torch.tensor(expected)
    torch.testing.assert_close(score(prompts[:5], responses[:5]), expected[:5], atol=1e-5, rtol=0)
    found = score(prompts[rows], responses[rows])  # some looked up, some new, some twice
    torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=0)
    assert not found.requires_grad


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def bad_files(folder):
    good = save(folder / "good.pt").read_bytes()
    weights = random_model().state_dict()
    other = {**weights, "head.bias": torch.tensor([torch.nan])}
    files = {"cut.pt": good[: len(good) // 2], "text.pt": b"hello", "empty.pt": b""}
    files["pickle.pt"] = pickle.dumps({"script": "reward_model.py", "models": [Payload()]})
    for name, content in files.items():
        (folder / name).write_bytes(content)
    save(folder / "code.pt", args=Payload())
    save(folder / "none.pt", models=[])
    save(folder / "nan.pt", models=[other])
    save(folder / "shape.pt", models=[reward_model.GPT().state_dict()])
    save(folder / "script.pt", script="ppo.py")
    torch.save({"script": "ppo.py", "args": {}, "policy": weights}, folder / "ppo.pt")
    torch.save(weights, folder / "bare.pt")
    (folder / "good.pt").unlink()
    return ["missing.pt", ".", *sorted(p.name for p in folder.glob("*.pt"))]


@pytest.mark.parametrize("script", TRAINERS, ids=lambda script: script.__name__)
def test_wrong_files_are_refused_in_one_line_and_nothing_is_run(script, tmp_path, capsys):
    names = bad_files(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert len(names) >= 12
    for name in names:
        args = script.Args(reward_model=Path(name), sft_steps=1, batch_size=64, total_episodes=64)
        with pytest.raises(SystemExit) as stop:
            script.main(args)
        out, error = capsys.readouterr()
        assert stop.value.code == 2 and out == "", name
        assert error.count("\n") == 1 and f"--reward-model {name}" in error, error
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("script", TRAINERS, ids=lambda script: script.__name__)
def test_flags_that_would_not_be_read_are_refused(script, tmp_path, capsys):
    one, path = save(tmp_path / "one.pt", (0,)), save(tmp_path / "two.pt")
    kinds = ["sharp", "process"] if script is ppo else ["sharp"]
    cases = [({"reward": kind, "reward_model": path}, "--reward") for kind in kinds]
    coefs = [{"rm_uncertainty_coef": v, "reward_model": path} for v in (-1.0, math.nan)]
    coefs += [{"rm_uncertainty_coef": 0.5}, {"rm_uncertainty_coef": 0.5, "reward_model": one}]
    for flags, named in [*cases, *[(flags, "--rm-uncertainty-coef") for flags in coefs]]:
        small = {"sft_steps": 1, "batch_size": 64, "total_episodes": 64}
        with pytest.raises(SystemExit) as stop:
            script.main(script.Args(**small, **flags))
        out, error = capsys.readouterr()
        assert stop.value.code == 2 and out == ""
        assert error.count("\n") == 1 and f"{named} " in error
        assert {p.name for p in tmp_path.iterdir()} == {"one.pt", "two.pt"}


@pytest.mark.parametrize("script", TRAINERS, ids=lambda script: script.__name__)
def test_learned_score_is_trained_on_and_the_true_one_logged(script, tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "rm.pt")
    curves = {}

    def noted(writer, group, metrics, step):
        for name, value in metrics.items():
            curves.setdefault(f"{group}/{name}", []).append(float(torch.as_tensor(value).detach()))

    monkeypatch.setattr(script, "write", noted)
    rolled = programs.spy_on_samples(monkeypatch, script)
    small = {"sft_steps": 20, "batch_size": 64, "total_episodes": 128}
    plain = script.main(script.Args(tensorboard=False, **small))
    assert "charts/gold_score" not in curves
    capsys.readouterr()
    curves.clear(), rolled.clear()
    monkeypatch.setattr(script, "SummaryWriter", lambda run: programs.NoWriter())
    results = [
        script.main(script.Args(reward_model=path, rm_uncertainty_coef=coef, **small))
        for coef in (0.0, 1.0)
    ]
    for i, ((_, prompts, _), responses, _) in enumerate(rolled):
        learned = script.load_reward_model(path, float(i >= 2), "cpu")(prompts, responses)
        gold = [
            oracle.score(x, tuple(y))
            for x, y in zip(prompts.tolist(), responses.tolist(), strict=True)
        ]
        assert curves["charts/score"][i] == pytest.approx(learned.mean().item(), abs=1e-5)
        assert curves["charts/gold_score"][i] == pytest.approx(sum(gold) / 64)
    assert len(rolled) == 4 and "gold 0." in capsys.readouterr().out
    assert curves["eval/gold_score"] == pytest.approx(curves["eval/success"])
    assert len({r["entropy"] for r in (plain, *results)}) == 3
    assert plain["success_before"] == results[0]["success_before"]  # of the true reward
    assert plain["score"] != results[0]["score"] != results[1]["score"]


def test_pipeline(program):
    """Learn and save by the real command, load and train on it."""
    folder, printed = program()
    lines = printed.splitlines()
    assert lines[0].startswith("reward_model.py")
    speed, left = re.fullmatch(r"100%  loss .* (\d+) steps/s +(\d+) s left", lines[-2]).groups()
    assert int(speed) > 0 and left == "0"
    assert lines[-1].startswith("held-out pair accuracy") and "best of 16" in lines[-1]
    assert {p.name for p in folder.iterdir()} == {"runs", "rm.pt"}
    saved = torch.load(folder / "rm.pt", weights_only=True)
    assert saved["script"] == "reward_model.py" and saved["args"]["num_responses"] == "64"
    first, second = saved["models"]
    assert not torch.equal(first["head.weight"], second["head.weight"])
    (events,) = (folder / "runs").iterdir()
    assert events.name.startswith("reward_model__1__")
    programs.check_hyperparameters(events, reward_model.Args(), num_responses="64", seed="1")
    flags = {"sft_steps": 5, "batch_size": 64, "total_episodes": 64, "rm_uncertainty_coef": 0.5}
    result = ppo.main(ppo.Args(reward_model=folder / "rm.pt", tensorboard=False, **flags))
    assert all(math.isfinite(value) for value in result.values())
