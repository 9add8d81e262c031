"""dpo.py: losses against loops, its optimum by enumeration, files of judgements, the program."""

import copy
import itertools
import json
import math
import random
import re
from pathlib import Path

import oracle
import programs
import pytest
import torch
import tyro

import dpo

KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.2)]
NO_TIES = torch.zeros(1, dtype=torch.bool)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss_at(h, beta, *kind, ties=NO_TIES):
    """Loss and metrics of pairs whose margins h (B,) are of the policy's making alone."""
    logprobs = torch.stack([h - 3, torch.full_like(h, -3.0)])
    return dpo.dpo_loss(logprobs, torch.full_like(logprobs, -3.0), ties, beta, *kind)


# ---------------------------------------------------------------- Losses against loops


def ragged(length_normalize):
    """Token log-probabilities of 12 responses of 1 to 4 tokens under two policies, and their mask;
    the same as lists, and what these say of the whole responses."""
    generator = torch.Generator().manual_seed(0)
    new, ref = -torch.rand(2, 12, 4, generator=generator, dtype=torch.float64) * 3
    lengths = [1, 4, 2, 3, 2, 2, 4, 1, 3, 3, 1, 2]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    whole = []
    for rows in (new.tolist(), ref.tolist()):
        sums = [sum(row[:n]) for row, n in zip(rows, lengths, strict=True)]
        whole.append([s / n if length_normalize else s for s, n in zip(sums, lengths, strict=True)])
    return new, ref, mask, whole


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def pair_loss(h, beta, loss_type, epsilon):
    """The papers' losses of one pair, judged once."""
    if loss_type == "ipo":
        return (h - 0.5 / beta) ** 2
    if loss_type == "hinge":
        return max(0.0, 1 - beta * h)
    ahead, behind = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
    if loss_type == "robust":
        return ((1 - epsilon) * ahead - epsilon * behind) / (1 - 2 * epsilon)
    return (1 - epsilon) * ahead + epsilon * behind


@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_losses_metrics_and_gradients_by_loops(kind, beta, length_normalize):
    new, ref, mask, whole = ragged(length_normalize)
    ties = torch.tensor([False, True, False, False, True, False])
    h, chosen, rejected = [], [], []
    for i in range(6):  # responses i and i + 6 are a pair
        chosen.append(beta * (whole[0][i] - whole[1][i]))
        rejected.append(beta * (whole[0][i + 6] - whole[1][i + 6]))
        h.append((chosen[i] - rejected[i]) / beta)
    each = [
        (pair_loss(x, beta, *kind) + pair_loss(-x, beta, *kind)) / 2
        if tie
        else pair_loss(x, beta, *kind)
        for x, tie in zip(h, ties.tolist(), strict=True)
    ]
    wins = [0.5 if tie else float(x > 0) for x, tie in zip(h, ties.tolist(), strict=True)]
    for garbage in (0.0, 7.0, math.nan):
        x, y = (torch.where(mask, table, garbage) for table in (new, ref))
        x.requires_grad_()
        found = [dpo.response_logprobs(table, mask, length_normalize) for table in (x, y)]
        for sums, expected in zip(found, whole, strict=True):
            assert sums.tolist() == pytest.approx(expected, abs=1e-9)
        loss, metrics = dpo.dpo_loss(*[s.view(2, 6) for s in found], ties, beta, *kind)
        assert loss.item() == pytest.approx(sum(each) / 6, abs=1e-9)
        assert metrics["chosen"].item() == pytest.approx(sum(chosen) / 6)
        assert metrics["rejected"].item() == pytest.approx(sum(rejected) / 6)
        assert metrics["margins"].item() == pytest.approx(beta * sum(h) / 6)
        assert metrics["accuracies"].item() == pytest.approx(sum(wins) / 6)
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.isfinite().all() and (gradient[~mask] == 0).all()


def test_kinds_differ_from_each_other():
    h = float64(0.3, -1.0, 2.0)
    losses = [loss_at(h, 0.5, *kind)[0].item() for kind in KINDS]
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-3


def test_printed_bradley_terry_losses():
    """The reward model's tutorial: scores 2.89 against 3.25, and against 2.00."""
    for scores, printed in (((2.89, 3.25), 0.8893), ((2.89, 2.0), 0.3441)):
        table = float64(*scores).view(2, 1)  # implicit rewards, with beta = 1
        loss, _ = dpo.dpo_loss(table, torch.zeros_like(table), NO_TIES, 1.0)
        assert round(loss.item(), 4) == printed


@pytest.mark.parametrize("kind", [("sigmoid", 0.0), ("sigmoid", 0.3), ("robust", 0.3)])
def test_loss_at_the_reference_is_log_2(kind):
    loss, metrics = loss_at(torch.zeros(4, dtype=torch.float64), 0.3, *kind)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert metrics["accuracies"] == 0.5 and metrics["margins"] == 0
    for h in (2.0, -2.0):  # nor can anybody be right about a tie
        assert loss_at(float64(h), 0.3, *kind, ties=~NO_TIES)[1]["accuracies"] == 0.5


def test_gradient_of_the_sigmoid_loss_is_the_papers():
    """-β σ(r(l) - r(w)) [∇ log π(w) - ∇ log π(l)], by hand for a tabular policy."""
    theta, ref, beta = oracle.table(0).requires_grad_(), oracle.table(1), 0.7
    won, lost = [(3, 4, 10), (5, 10), (7, 7, 7)], [(3, 5, 10), (10,), (7, 10)]
    tables = [
        torch.stack([sum(oracle.logprob_list(t, y)) for y in won + lost]).view(2, 3)
        for t in (theta, ref)
    ]
    loss, _ = dpo.dpo_loss(*tables, NO_TIES, beta)
    expected = torch.zeros_like(theta)
    for w, l in zip(won, lost, strict=True):  # noqa: E741
        r_w, r_l = (
            beta * (sum(oracle.logprob_list(theta, y)) - sum(oracle.logprob_list(ref, y))).item()
            for y in (w, l)
        )
        for y, sign in ((w, 1), (l, -1)):
            for t, token in enumerate(y):  # ∇ log softmax = one-hot - probabilities
                score = -theta.detach()[oracle.row(y[:t])].softmax(0)
                score[token] += 1
                weight = beta / (1 + math.exp(r_w - r_l))
                expected[oracle.row(y[:t])] -= sign * weight * score / 3
    found = torch.autograd.grad(loss, theta)[0]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_robust_loss_is_unbiased_under_flipped_judgements(epsilon):
    """Mean over all 8 ways to flip 3 judgements, each with chance ε: the loss of the true ones."""
    h, mean = float64(0.4, -2.0, 1.3), 0.0
    for flips in itertools.product([1, -1], repeat=3):
        chance = math.prod(epsilon if f < 0 else 1 - epsilon for f in flips)
        mean += chance * loss_at(h * float64(*flips), 0.6, "robust", epsilon)[0].item()
    assert mean == pytest.approx(loss_at(h, 0.6)[0].item(), abs=1e-9)


def test_where_each_loss_stops_pushing():
    def push(h, *kind, tie=False):
        h = float64(h).requires_grad_()
        loss, _ = loss_at(h, 0.5, *kind, ties=torch.tensor([tie]))
        return -torch.autograd.grad(loss, h)[0].item()

    assert push(0.99, "ipo") > 0 > push(1.01, "ipo")  # 1 / (2β)
    assert push(1.99, "hinge") == 0.5 and push(2.01, "hinge") == 0
    h = math.log(0.8 / 0.2) / 0.5  # smoothed: β·h ends at the log-odds of 1 - ε
    assert push(h - 0.01, "sigmoid", 0.2) > 0 > push(h + 0.01, "sigmoid", 0.2)
    assert push(10.0) > 0 and push(10.0, "robust", 0.2) > 0
    for kind in KINDS:  # a tie pulls the margin back to nothing
        assert push(1.0, *kind, tie=True) <= 0 <= push(-1.0, *kind, tie=True)
        assert kind[0] == "hinge" or push(1.0, *kind, tie=True) < 0


# ---------------------------------------------------------------- The optimum


class World:
    """Two prompts, a tabular policy that can write 11 responses to each, and their scores."""

    def __init__(self):
        self.lists = oracle.narrow_responses()
        self.ref = [oracle.narrow(oracle.table(seed)) for seed in (0, 1)]
        scores = [[oracle.score(x, y, "sharp") for y in self.lists] for x in ((4, 3, 3), (2, 1, 2))]
        self.scores = float64(*scores)  # (2, 11)
        self.ref_logprobs = self.logprobs(self.ref)
        self.pairs = torch.cartesian_prod(torch.arange(11), torch.arange(11)).T  # (2, 121)

    def logprobs(self, tables):
        whole = [[sum(oracle.logprob_list(t, y)) for y in self.lists] for t in tables]
        return torch.stack([torch.stack(row) for row in whole])  # (2, 11)

    def expected_loss(self, logprobs, tau, beta, kind):
        """Mean loss over all pairs that the reference can write and both ways to judge them."""
        each = torch.vmap(lambda *sides: dpo.dpo_loss(*sides, NO_TIES, beta, *kind)[0])
        first, second = self.pairs
        loss = 0.0
        for x in range(2):
            chance = self.ref_logprobs[x].exp()[self.pairs].prod(0)
            wins = ((self.scores[x][first] - self.scores[x][second]) / tau).sigmoid()
            ways = [
                [t[x][p].T[..., None] for t in (logprobs, self.ref_logprobs)]
                for p in (self.pairs, self.pairs.flip(0))
            ]  # (121, 2, 1)
            right, wrong = each(*ways[0]), each(*ways[1])
            loss = loss + (chance * (wins * right + (1 - wins) * wrong)).sum() / 2
        return loss

    def train(self, tau, beta, *kind):
        """Exact gradient descent (L-BFGS) from the reference; log-probabilities at the end."""
        tables = [t.clone().requires_grad_() for t in self.ref]
        settings = {"max_iter": 60, "tolerance_grad": 1e-9, "line_search_fn": "strong_wolfe"}
        optimizer = torch.optim.LBFGS(tables, **settings)

        def closure():
            optimizer.zero_grad()
            loss = self.expected_loss(self.logprobs(tables), tau, beta, kind)
            loss.backward()
            return loss

        optimizer.step(closure)
        return self.logprobs(tables).detach()


@pytest.mark.parametrize("tau,beta", [(0.5, 0.5), (0.3, 1.0)])
def test_exact_training_ends_at_the_closed_form(tau, beta):
    """Bradley–Terry judgements: π* = π_ref·exp(R/(τβ)), to 1e-3 nats; the reference is far off."""
    world = World()
    found = world.train(tau, beta)
    for x in range(2):
        ref, scores = world.ref_logprobs[x].tolist(), world.scores[x].tolist()
        probs, _ = oracle.optimal(ref, scores, tau * beta)
        best = float64(*probs)
        assert (best * (best.log() - world.ref_logprobs[x])).sum() > 0.05
        assert (best * (best.log() - found[x])).sum() < 1e-3
        assert (found[x].exp() * (found[x] - best.log())).sum() < 1e-3


def test_closed_form_is_a_stationary_point_of_sigmoid_alone():
    world, tau, beta = World(), 0.5, 0.5
    slopes = {}
    for kind in KINDS:
        logits = (world.ref_logprobs + world.scores / (tau * beta)).requires_grad_()
        loss = world.expected_loss(logits.log_softmax(1), tau, beta, kind)
        slopes[kind] = torch.autograd.grad(loss, logits)[0].abs().max().item()
    assert slopes.pop(("sigmoid", 0.0)) < 1e-12
    assert min(slopes.values()) > 1e-4


def test_ipo_leads_to_its_own_minimiser():
    """Of a pair always judged alike h = 1/(2β); judged so with chance p, h = (2p - 1)/(2β)."""
    beta, p = 0.4, 0.8
    h = float64(0.0).requires_grad_()
    optimizer = torch.optim.SGD([h], lr=0.25)
    for chance, expected in ((1.0, 0.5 / beta), (p, (2 * p - 1) / (2 * beta))):
        for _ in range(100):
            optimizer.zero_grad()
            both = [loss_at(sign * h, beta, "ipo")[0] for sign in (1, -1)]
            (chance * both[0] + (1 - chance) * both[1]).backward()
            optimizer.step()
        assert h.item() == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- Judgements


def test_annotator_prefers_as_bradley_and_terry_say():
    """Over many groups: the share of right responses preferred to wrong ones is σ(1/τ), equals are
    even, and judging both ways round is done with the same odds."""
    torch.manual_seed(0)
    prompts = dpo.make_prompts()[0][:40]
    policy = dpo.GPT()
    dpo.warm_start(policy, *dpo.make_demonstrations(prompts), 60)
    tau = 0.7
    x, chosen, rejected, ties = dpo.sample_comparisons(policy, prompts.repeat(8, 1), 6, tau)
    assert not ties.any() and (chosen != rejected).any(1).all()
    assert (
        x.shape == chosen.shape == rejected.shape == (len(ties), 3)
        and x.unique(dim=0).shape[0] == 40
    )
    won, lost = (
        torch.tensor(
            [
                oracle.score(p, [t for i, t in enumerate(r) if dpo.EOS not in r[:i]])
                for p, r in zip(x.tolist(), y.tolist(), strict=True)
            ]
        )
        for y in (chosen, rejected)
    )
    unequal = won != lost
    count, share = unequal.sum().item(), (won > lost)[unequal].double().mean().item()
    p = 1 / (1 + math.exp(-1 / tau))
    assert count > 500 and abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)
    # Two unequal ones stand in either order as often, were they not judged: 5 tokens of each kind.
    even = ~unequal
    first = (chosen[even] * torch.tensor([121, 11, 1])).sum(1)
    second = (rejected[even] * torch.tensor([121, 11, 1])).sum(1)
    share = (first > second).double().mean().item()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / even.sum().item())


def test_all_pairs_of_each_group_but_like_ones(monkeypatch):
    """Every pair once; each of them judged on its own."""
    monkeypatch.setattr(
        dpo,
        "generate",
        lambda policy, x, temperature: (
            torch.tensor([[1, 2, 10], [3, 4, 10], [5, 10, 10]] * 2)
            if (temperature, x.tolist()) == (1.0, [[4, 3, 3]] * 3 + [[2, 1, 2]] * 3)
            else pytest.fail("not the prompts of the groups, at temperature 1")
        ),
    )
    prompts = torch.tensor([[4, 3, 3], [2, 1, 2]])
    seen = set()
    for _ in range(40):
        x, chosen, rejected, _ = dpo.sample_comparisons(None, prompts, 3, 0.5)
        assert x.tolist() == [[4, 3, 3]] * 3 + [[2, 1, 2]] * 3
        pairs = [
            frozenset([tuple(a), tuple(b)])
            for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)
        ]
        assert len(set(pairs[:3])) == len(set(pairs[3:])) == 3
        seen.add(tuple(c[0] for c in chosen.tolist()))
    assert len(seen) > 20  # of 2^6 outcomes
    monkeypatch.setattr(
        dpo, "generate", lambda *_: torch.tensor([[1, 10, 10], [2, 10, 10], [1, 10, 10]])
    )
    assert len(dpo.sample_comparisons(None, prompts[:1], 3, 0.5)[3]) == 2


def test_judgements_from_lines_of_json(tmp_path):
    path = tmp_path / "judged.jsonl"
    lines = [
        {"prompt": "433", "chosen": "73", "rejected": "7"},
        {"prompt": "212", "chosen": "", "rejected": "733", "tie": True},
        {"prompt": "000", "chosen": "99", "rejected": "1", "tie": False, "who": "me"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts, chosen, rejected, ties = dpo.read_preferences(path)
    assert prompts.tolist() == [[4, 3, 3], [2, 1, 2], [0, 0, 0]]
    assert chosen.tolist() == [[7, 3, 10], [10, 10, 10], [9, 9, 10]]
    assert rejected.tolist() == [[7, 10, 10], [7, 3, 3], [1, 10, 10]]
    assert ties.tolist() == [False, True, False] and ties.dtype == torch.bool


GOOD = '{"prompt": "433", "chosen": "73", "rejected": "11"}'
BAD_LINES = {
    "not json": "JSON",
    "": "JSON",
    "[" * 100_000: "JSON",
    "[1, 2]": "object",
    '{"prompt": "43", "chosen": "73", "rejected": "11"}': "prompt",
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
    path = tmp_path / "judged.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(SystemExit) as stop:
        run(preferences=path, tensorboard=True)
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and error.count("\n") == 1
    assert "--preferences" in error and "line 3:" in error and BAD_LINES[line] in error
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_file_that_holds_nothing_to_read(content, capsys, tmp_path):
    path = tmp_path / "judged.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(preferences=path, tensorboard=True)
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and error.count("\n") == 1
    assert "--preferences" in error and not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- The program


warm_start, make_prompts = dpo.warm_start, dpo.make_prompts


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    words = "--num-responses 160 --epochs 1 --minibatch-size 64 --sft-steps 20 --save-path model.pt"
    yield from programs.start(f"dpo.py {words}", tmp_path_factory.mktemp("program"))


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, dpo)


def run(**flags):
    """Two passes over the pairs of 16 groups of 4 unless told otherwise; no time in the result."""
    defaults = {"num_responses": 64, "group_size": 4, "epochs": 2, "minibatch_size": 32}
    if "preferences" in flags:
        defaults = {"epochs": 2}
    result = dpo.main(dpo.Args(**({"sft_steps": 20, "tensorboard": False} | defaults | flags)))
    return {name: value for name, value in result.items() if name != "seconds"}


def logged(calls, name):
    """The curve of one metric."""
    found = [c["metrics"][name] for c in calls["write"] if name in c["metrics"]]
    return [float(torch.as_tensor(value)) for value in found]


def judged(path, seed=0, number=40):
    """A file of judgements of random responses to random training prompts, and its lines."""
    draw, prompts = random.Random(seed), make_prompts()[0].tolist()
    text = lambda: "".join(map(str, draw.choices(range(10), k=draw.randrange(4))))  # noqa: E731
    lines = []
    for _ in range(number):
        prompt = "".join(map(str, draw.choice(prompts[:10])))
        lines.append({"prompt": prompt, "chosen": text(), "rejected": text()})
        lines[-1]["tie"] = draw.random() < 0.3
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_a_response_is_read_about_once_a_pass(monkeypatch):
    """A group stays together: only at the seams of minibatches is a response read again."""
    calls = programs.record(monkeypatch, dpo, "response_logprobs")["response_logprobs"]
    run(epochs=1, group_size=4)
    (distinct, *read) = [len(call["logprobs"]) for call in calls]
    assert len(read) > 2 and distinct <= sum(read) <= distinct + 4 * (len(read) - 1)


@pytest.mark.parametrize("length_normalize", [False, True])
def test_what_the_loop_passes_on(monkeypatch, tmp_path, length_normalize):
    """From a file: the log-probabilities of each pair, by another way, at the first step and under
    the reference ever after; each judgement once a pass."""
    path = tmp_path / "judged.jsonl"
    lines = judged(path)
    calls, made, deepcopy = programs.record(monkeypatch, dpo, "dpo_loss"), [], copy.deepcopy
    keep = lambda x, *memo: made.append(deepcopy(x, *memo)) or made[-1]  # noqa: E731
    monkeypatch.setattr(copy, "deepcopy", keep)
    flags = {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.1, "minibatch_size": 15}
    run(preferences=path, length_normalize=length_normalize, **flags)
    assert len(calls["dpo_loss"]) == 2 * 3
    reference = next(copied for copied in made if isinstance(copied, dpo.GPT))
    expected = []
    for line in lines:
        row = []
        for side in ("chosen", "rejected"):
            tokens = [int(t) for t in line["prompt"] + line[side]] + [10] * (len(line[side]) < 3)
            with torch.no_grad():
                states = reference(torch.tensor([tokens[:-1]]))
                table = reference.head(states)[0].log_softmax(1)
            each = [table[t - 1, tokens[t]].item() for t in range(3, len(tokens))]
            row.append(sum(each) / (len(each) if length_normalize else 1))
        expected.append((*row, line["tie"]))
    for k in (0, 3):
        found = []
        for call in calls["dpo_loss"][k : k + 3]:
            assert (call["beta"], call["loss_type"], call["label_smoothing"]) == (
                0.3,
                "robust",
                0.1,
            )
            assert call["logprobs"].requires_grad and not call["ref_logprobs"].requires_grad
            assert 13 <= len(call["ties"]) <= 14
            found += zip(*call["ref_logprobs"].tolist(), call["ties"].tolist(), strict=True)
        for x, y in zip(sorted(found), sorted(expected), strict=True):
            assert x == pytest.approx(y, abs=1e-4)
    first, last = calls["dpo_loss"][0], calls["dpo_loss"][-1]
    torch.testing.assert_close(first["logprobs"].detach(), first["ref_logprobs"])
    assert not torch.allclose(last["logprobs"], last["ref_logprobs"])
    assert not torch.equal(first["ties"], calls["dpo_loss"][3]["ties"])  # another order


def test_a_group_stands_together(monkeypatch):
    calls = programs.record(monkeypatch, dpo, "response_states", "dpo_loss")
    run(num_responses=256, group_size=8, minibatch_size=112)
    steps = [c for c in calls["response_states"] if c["responses"].requires_grad is False]
    trained = [c for c in steps if len(c["prompts"]) < 112][-len(calls["dpo_loss"]) :]
    for c in trained:  # at most 5 groups of 28 pairs, each response once
        assert len(c["prompts"].unique(dim=0)) <= 7
        texts = torch.cat([c["prompts"], c["responses"]], 1)
        assert len(texts.unique(dim=0)) == len(texts)


def test_lines_that_follow_each_other_on_a_prompt_stand_together(monkeypatch, tmp_path):
    """Not all of a prompt: groups of two lines, on two prompts in turn, two lines a step."""
    prompts = ["".join(map(str, prompt)) for prompt in dpo.make_prompts()[0][:2].tolist()]
    lines = [
        {"prompt": prompts[k // 2 % 2], "chosen": f"{k}1", "rejected": f"{k}2"} for k in range(10)
    ]
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    calls = programs.record(monkeypatch, dpo, "response_states")["response_states"]
    run(preferences=path, minibatch_size=2, epochs=3)
    found = [
        sorted({y[0] for y in c["responses"].tolist()}) for c in calls if len(c["prompts"]) == 4
    ]
    passes = [found[:5], found[5:10], found[10:]]
    groups = [[k, k + 1] for k in range(0, 10, 2)]
    assert all(sorted(each) == groups for each in passes) and passes[0] != passes[1] != passes[2]
    turns = [[group[0] // 2 % 2 for group in each] for each in passes]
    assert any(turn not in (sorted(turn), sorted(turn)[::-1]) for turn in turns)


def test_held_out_prompts_of_a_file_are_left_out(monkeypatch, tmp_path, capsys):
    path, (train, held_out) = tmp_path / "judged.jsonl", dpo.make_prompts()
    text = lambda row: "".join(map(str, row.tolist()))  # noqa: E731
    line = lambda row: json.dumps({"prompt": text(row), "chosen": "73", "rejected": "11"})  # noqa: E731
    path.write_text(
        "\n".join([line(held_out[0]), line(train[0]), line(train[1]), line(held_out[1])])
    )
    calls = programs.record(monkeypatch, dpo, "dpo_loss", "response_states")
    run(preferences=path)
    assert "left out 2 of 4" in capsys.readouterr().out
    assert all(c["logprobs"].shape == (2, 2) for c in calls["dpo_loss"])
    seen = [c["prompts"] for c in calls["response_states"] if len(c["prompts"]) == 4]
    assert len(seen) == 1 + 2 and all(
        sorted(set(map(text, x))) == sorted(map(text, train[:2])) for x in seen
    )
    path.write_text(line(held_out[0]))
    with pytest.raises(SystemExit) as stop:
        run(preferences=path)
    assert stop.value.code == 2 and "held-out" in capsys.readouterr().err


def test_first_loss_is_log_2_and_metrics_are_logged(monkeypatch):
    calls = programs.record(monkeypatch, dpo, "write", "dpo_loss", "evaluate")
    run(annotator_temperature=0.3, beta=0.4)
    assert logged(calls, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(c["kl_coef"] == pytest.approx(0.12) for c in calls["evaluate"])
    found = {(c["group"], name) for c in calls["write"] for name in c["metrics"]}
    wanted = {("rewards", n) for n in ("chosen", "rejected", "margins", "accuracies")}
    wanted |= {("losses", n) for n in "loss grad_norm chosen_logprobs rejected_logprobs".split()}
    assert wanted | {("charts", "learning_rate"), ("charts", "steps_per_second")} <= found
    first = calls["dpo_loss"][0]["logprobs"].detach().mean(1).tolist()
    found = [logged(calls, f"{side}_logprobs")[0] for side in ("chosen", "rejected")]
    assert found == pytest.approx(first)
    steps = len(calls["dpo_loss"])
    done = [(k + 0.5) / steps for k in range(steps)]
    rates = [dpo.Args.learning_rate * (2 * p if p < 1 / 2 else 2 - 2 * p) for p in done]
    assert logged(calls, "learning_rate") == pytest.approx(rates)


def test_success_rises_though_the_chosen_become_less_likely(monkeypatch):
    """A short run; by its end the chosen responses, too, are less likely than at the start."""
    calls = programs.record(monkeypatch, dpo, "write")
    monkeypatch.setattr(dpo, "make_prompts", make_prompts)  # five would say little
    flags = {"num_responses": 2_912, "epochs": 3, "minibatch_size": 128, "learning_rate": 2e-4}
    result = dpo.main(dpo.Args(tensorboard=False, beta=0.5, annotator_temperature=0.1, **flags))
    assert 0.4 < result["success_before"] < 0.8
    assert result["success"] > result["success_before"] + 0.05
    assert 0 < result["optimality"] <= 1
    assert result["objective"] == pytest.approx(result["score"] - 0.05 * result["kl"])
    chosen, rejected = (logged(calls, name)[-1] for name in ("chosen", "rejected"))
    assert rejected < chosen < 0 and logged(calls, "accuracies")[-1] > 0.6


def test_same_seed_same_result_other_seed_another(monkeypatch):
    first = run()
    monkeypatch.setattr(dpo, "warm_start", warm_start)
    assert run() == first
    assert run(seed=2) != first


CHOICES = [
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    {"loss_type": "robust", "label_smoothing": 0.2},
    {"label_smoothing": 0.2},
    {"length_normalize": True},
    {"beta": 0.1},
    {"annotator_temperature": 0.01},
    {"num_responses": 96},
    {"group_size": 2},
    {"epochs": 3},
    {"minibatch_size": 16},
    {"max_grad_norm": 0.001},
    {"learning_rate": 1e-4},
    {"sft_steps": 0},
]


def test_every_flag_and_choice_changes_the_outcome(tmp_path):
    judged(tmp_path / "judged.jsonl")
    choices = [*CHOICES, {"preferences": tmp_path / "judged.jsonl"}]
    results = [run(), *[run(**flags) for flags in choices]]
    assert all(math.isfinite(value) for result in results for value in result.values())
    assert len({result["entropy"] for result in results}) == len(results)


def test_large_beta_holds_the_policy_back():
    assert run(beta=3.0, epochs=10)["kl"] < 0.5 * run(beta=0.3, epochs=10)["kl"]


def test_values_at_the_border_are_taken():
    check, args = dpo.check_args, dpo.Args
    check(args(seed=0, sft_steps=0, num_responses=2, group_size=2, epochs=1, minibatch_size=1))
    check(args(seed=2**63 - 1, loss_type="robust", label_smoothing=0.49))


BAD = [
    *[("num_responses", v) for v in (0, 3)],
    *[("group_size", v) for v in (0, 1)],
    ("epochs", 0),
    ("minibatch_size", 0),
    *[("learning_rate", v) for v in (0.0, math.nan, math.inf)],
    ("max_grad_norm", 0.0),
    *[("beta", v) for v in (0.0, -1.0, math.nan, math.inf)],
    *[("annotator_temperature", v) for v in (0.0, math.nan)],
    *[("label_smoothing", v) for v in (-0.1, 0.5, math.nan)],
    ("seed", -1),
    ("sft_steps", -1),
    ("device", "cuda"),
    ("loss_type", "robust"),
    ("preferences", Path("missing.jsonl")),
]


def refused(capsys, flag, **flags):
    with pytest.raises(SystemExit) as stop:
        run(**({"tensorboard": True} | flags))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert error.count("\n") == 1 and f"--{flag.replace('_', '-')}" in error


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
    judged(tmp_path / "judged.jsonl")
    for flag, value in (("num_responses", 96), ("group_size", 4)):
        refused(capsys, flag, preferences=tmp_path / "judged.jsonl", **{flag: value})


def test_nothing_to_compare_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(dpo, "generate", lambda policy, x, temperature: torch.full_like(x, 10))
    refused(capsys, "num_responses")


@pytest.mark.parametrize("words", [["--loss-type", "dpo"], ["--kl-coef", "1"], ["--beta", "x"]])
def test_bad_words_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(dpo.Args, args=words)
    assert stop.value.code == 2


def test_program_in_a_shell(program):
    """The real command: header, progress, verdict; events and a saved model that loads safely."""
    folder, printed = program()
    lines = printed.splitlines()
    assert lines[0].startswith("dpo.py") and "accuracies" in lines[-2]
    speed, left = re.fullmatch(r"100%  loss .* (\d+) steps/s +(\d+) s left", lines[-2]).groups()
    assert int(speed) > 0 and left == "0"
    assert lines[-1].startswith("held-out success") and "optimality" in lines[-1]
    assert {p.name for p in folder.iterdir()} == {"runs", "model.pt"}
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved["script"] == "dpo.py" and saved["args"]["num_responses"] == "160"
    dpo.GPT().load_state_dict(saved["policy"])
    (events,) = (folder / "runs").iterdir()
    assert events.name.startswith("dpo__1__")
    programs.check_hyperparameters(events, dpo.Args(), num_responses="160", seed="1")


def test_the_pictures_show_the_policy_before_and_after(monkeypatch):
    programs.check_policy_images(monkeypatch, dpo, lambda: run(tensorboard=True))


def test_reference_is_frozen_and_nothing_is_left_behind(monkeypatch, tmp_path):
    programs.check_reference_is_frozen(monkeypatch, run)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_step_stops_the_run(monkeypatch):
    loss = dpo.dpo_loss
    monkeypatch.setattr(dpo, "dpo_loss", lambda x, *rest: loss(x * math.inf, *rest))
    with pytest.raises(SystemExit) as stop:
        run()
    assert "step 1" in str(stop.value.code) and "--learning-rate" in str(stop.value.code)
