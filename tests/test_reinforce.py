"""reinforce.py: expected gradients against exact ones, and the program as a whole."""

import math

import oracle
import programs
import pytest
import torch
import tyro

import ppo
import reinforce
from benchmark import gradient_variance as noise

PROMPT, OTHER_PROMPT = (4, 3, 3), (5, 5, 4)
BETA = 0.1


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- Expected gradients


class World:
    """A tabular policy that can write 11 responses, all of them, and what they earn."""

    def __init__(self, prompt=PROMPT, theta=None):
        self.lists = oracle.narrow_responses()
        self.theta = oracle.narrow(oracle.table(0)).requires_grad_() if theta is None else theta
        self.reference = oracle.narrow(oracle.table(1))
        everything = oracle.responses()
        rows = [everything.index(y) for y in self.lists]
        self.all_scores = float64(*[oracle.score(prompt, y, "sharp") for y in everything])
        self.scores = self.all_scores[rows]
        self.mask = torch.tensor([[t < len(y) for t in range(3)] for y in self.lists])
        self.logprobs = oracle.token_table(self.theta)[rows]
        self.ref_logprobs = oracle.token_table(self.reference)[rows]
        self.probs = self.logprobs.sum(1).exp().detach()

    def exact_gradient(self):
        value = oracle.objective(self.theta, self.reference, self.all_scores, BETA)
        return torch.autograd.grad(value, self.theta, retain_graph=True)[0]

    def returns(self, gamma=1.0):
        kl = (self.logprobs - self.ref_logprobs).detach()
        rewards = reinforce.token_rewards(self.scores, kl, self.mask, BETA)
        return reinforce.returns_to_go(rewards, self.mask, gamma)


def expected_gradient(theta, parts, advantages):
    """Mean of minus the loss gradient over all batches whose i-th response is any of parts[i]'s."""
    index = torch.cartesian_prod(*[torch.arange(11)] * len(parts)).view(-1, len(parts))
    chance = math.prod(part.probs[index[:, i]] for i, part in enumerate(parts))
    assert abs(chance.sum() - 1) < 1e-12
    pick = lambda name: torch.stack(  # noqa: E731
        [getattr(part, name)[index[:, i]] for i, part in enumerate(parts)], 1
    ).flatten(0, 1)
    weights = (len(index) * chance).repeat_interleave(len(parts))[:, None]
    returns = torch.stack([part.returns()[index[:, i]] for i, part in enumerate(parts)], 1)
    loss = reinforce.reinforce_loss(
        pick("logprobs"), weights * advantages(returns.flatten(0, 1), index), pick("mask")
    )
    return -torch.autograd.grad(loss, theta, retain_graph=True)[0]


def close(found, exact):
    torch.testing.assert_close(found, exact, atol=1e-9, rtol=0)


def test_policy_has_no_other_responses():
    world = World()
    assert abs(world.probs.sum() - 1) < 1e-12
    assert (world.probs > 1e-3).all()


@pytest.mark.parametrize("constant", [0.0, 0.7, -3.0])
def test_no_baseline_and_running_mean_are_unbiased(constant):
    world = World()
    found = expected_gradient(world.theta, [world], lambda returns, _: returns - constant)
    close(found, world.exact_gradient())


def test_value_baseline_is_unbiased_whatever_the_critic_says():
    world = World()
    table = torch.randn(111, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = [[table[oracle.row(y[:t])] for t in range(len(y))] for y in world.lists]
    values = oracle.padded(values, math.nan)
    found = expected_gradient(world.theta, [world], lambda r, index: r - values[index[:, 0]])
    close(found, world.exact_gradient())


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_is_unbiased_over_all_groups(size):
    world = World()
    baseline = lambda r, _: r - reinforce.mean_of_others(r[:, 0], size)[:, None]  # noqa: E731
    close(expected_gradient(world.theta, [world] * size, baseline), world.exact_gradient())


def test_batch_mean_over_two_prompts_is_unbiased():
    world = World()
    parts = [world, World(OTHER_PROMPT, world.theta)]
    baseline = lambda r, _: r - reinforce.mean_of_others(r[:, 0], 2)[:, None]  # noqa: E731
    exact = sum(part.exact_gradient() for part in parts) / 2
    close(expected_gradient(world.theta, parts, baseline), exact)
    assert (parts[0].exact_gradient() - exact).abs().max() > 0.01


@pytest.mark.parametrize("size", [2, 3])
def test_a_mean_that_includes_the_response_itself_shrinks_the_gradient(size):
    world = World()

    def with_itself(returns, _):
        return returns - returns[:, 0].view(-1, size).mean(1).repeat_interleave(size)[:, None]

    found = expected_gradient(world.theta, [world] * size, with_itself)
    close(found, (size - 1) / size * world.exact_gradient())


def test_a_baseline_that_looks_ahead_is_biased():
    world = World()
    found = expected_gradient(world.theta, [world], lambda r, _: r - 0.5 * r[:, -1:])
    assert (found - world.exact_gradient()).abs().max() > 1e-3


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
def test_returns_to_go_of_unequal_lengths(gamma):
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = [4, 1, 2, 3, 4]
    mask = torch.tensor([[t < n for t in range(4)] for n in lengths])
    for garbage in (0.0, 9.0, math.nan):
        found = reinforce.returns_to_go(torch.where(mask, rewards, garbage), mask, gamma)
        for i, n in enumerate(lengths):
            expected = oracle.discounted(rewards[i, :n].tolist(), gamma)
            torch.testing.assert_close(found[i], float64(*expected, *[0.0] * (4 - n)))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_mean_of_others_by_loops(size):
    totals = float64(1, 5, 2, -3, 0.5, 7)
    expected = [oracle.mean_without(totals.tolist(), size, i) for i in range(6)]
    torch.testing.assert_close(reinforce.mean_of_others(totals, size), float64(*expected))


def test_loss_by_loops_and_no_gradient_through_advantages():
    generator = torch.Generator().manual_seed(0)
    logprobs, advantages = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    lengths = [3, 1, 2, 3]
    mask = torch.tensor([[t < n for t in range(3)] for n in lengths])
    expected = -sum(
        (logprobs[i, t] * advantages[i, t]).item() for i, n in enumerate(lengths) for t in range(n)
    )
    for garbage in (0.0, 9.0, math.nan):
        x, a = (
            torch.where(mask, v, garbage).requires_grad_(r)
            for v, r in ((logprobs, True), (advantages, True))
        )
        loss = reinforce.reinforce_loss(x, a, mask)
        assert loss.item() == pytest.approx(expected / 4)
        loss.backward()
        torch.testing.assert_close(x.grad, torch.where(mask, -advantages / 4, 0.0))
        assert a.grad is None


@pytest.mark.parametrize("size", [2, 3])
def test_gradient_noise_of_the_benchmark_by_enumerating_groups(size):
    world = World()
    grads = []  # of each response: of its log-probability, once
    for total in world.logprobs.sum(1):
        grads.append(torch.autograd.grad(total, world.theta, retain_graph=True)[0].flatten())
    grads, mean = torch.stack(grads), (world.probs * world.scores).sum()
    index = torch.cartesian_prod(*[torch.arange(11)] * size)
    chance, scores = world.probs[index].prod(1), world.scores[index]
    others = (scores.sum(1, keepdim=True) - scores) / (size - 1)
    each = (scores - others)[:, :, None] * grads[index]  # (groups, G, parameters)
    exact = (world.probs * world.scores) @ grads
    alone = (chance[:, None] * (each - exact).square().sum(2)).sum() / size
    together = (chance * (each.mean(1) - exact).square().sum(1)).sum() * size

    everything = torch.tensor([[*y, 10, 10][:3] for y in oracle.responses()])
    mask = reinforce.response_mask(everything)
    rows = noise.prefix_rows(everything)
    assert rows[mask].tolist() == [
        oracle.row(y[:t]) for y in oracle.responses() for t in range(len(y))
    ]
    choices = world.theta.detach().log_softmax(1)[rows]
    variance = (world.probs * world.scores**2).sum() - mean**2
    given = choices, everything, mask, world.all_scores, mean, variance / (size - 1)
    second, square = noise.gradient_moments(*given)
    assert square.item() == pytest.approx(exact.square().sum().item())
    assert (second - square).item() == pytest.approx(alone.item())
    assert (second - square + square / (size - 1)).item() == pytest.approx(together.item())

    values = oracle.state_values(world.theta.detach(), world.theta.detach(), world.all_scores, 0.0)
    probs = oracle.token_table(world.theta.detach()).sum(1).exp()
    found = noise.prefix_values(probs, everything, mask, world.all_scores)
    expected = oracle.padded([[values[y[:t]] for t in range(len(y))] for y in oracle.responses()])
    likely = mask & (probs > 1e-6)[:, None]
    torch.testing.assert_close(found[likely], expected[likely])


# ---------------------------------------------------------------- Reward-weighted regression


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
def test_rwr_weights_by_loops(beta, fraction):
    totals = float64(0.1, 1.0, -0.5, 1.0, 0.9, 0.0, 1.0, 0.3)  # three tie for the best
    found = reinforce.rwr_weights(totals, beta, fraction)
    expected = oracle.rwr_weights(totals.tolist(), beta, fraction)
    torch.testing.assert_close(found, float64(*expected))
    assert abs(found.sum() - 1) < 1e-12
    assert (found > 0).sum() == {0.01: 3, 0.3: 3, 0.5: 4, 1.0: 8}[fraction]


def test_rwr_weights_of_large_returns_are_finite():
    found = reinforce.rwr_weights(float64(1000.0, 999.0), 0.01, 1.0)
    assert found.tolist() == pytest.approx([1.0, 0.0])


def test_at_the_optimum_every_response_earns_the_same():
    """So no weighted regression, and no baseline but noise, has anything left to do there."""
    reference = oracle.table(1)
    scores = [oracle.score(PROMPT, y, "sharp") for y in oracle.responses()]
    ref_logprobs = oracle.token_table(reference)
    probs, best = oracle.optimal(ref_logprobs.sum(1).tolist(), scores, BETA)
    theta = torch.zeros(111, 11, dtype=torch.float64)
    for y, p in zip(oracle.responses(), probs, strict=True):
        for t, token in enumerate(y):
            theta[oracle.row(y[:t]), token] += p
    logprobs = oracle.token_table(theta.log())
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in oracle.responses()])
    rewards = reinforce.token_rewards(float64(*scores), logprobs - ref_logprobs, mask, BETA)
    totals = reinforce.returns_to_go(rewards, mask, 1.0)[:, 0]
    torch.testing.assert_close(totals, torch.full_like(totals, best))
    weights = reinforce.rwr_weights(totals, 0.3, 1.0)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 1111))


# ---------------------------------------------------------------- The program


warm_start = reinforce.warm_start


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    yield from programs.start(
        f"reinforce.py {programs.SHORT_RUN}", tmp_path_factory.mktemp("program")
    )


@pytest.fixture(autouse=True)
def short_runs(monkeypatch, tmp_path):
    programs.shorten_runs(monkeypatch, tmp_path, reinforce)


def run(**flags):
    """Train for two rollouts of 64 unless told otherwise; the result without the time taken."""
    defaults = {"batch_size": 64, "total_episodes": 128, "sft_steps": 20, "tensorboard": False}
    result = reinforce.main(reinforce.Args(**(defaults | flags)))
    return {name: value for name, value in result.items() if name != "seconds"}


def logged(calls, name):
    """The curve of one metric."""
    return [
        float(torch.as_tensor(c["metrics"][name]).detach())
        for c in calls["write"]
        if name in c["metrics"]
    ]


@pytest.mark.parametrize("baseline", ["none", "batch-mean", "running-mean", "rloo", "value"])
@pytest.mark.parametrize("objective", ["reinforce", "rwr"])
def test_advantages_in_the_loop(monkeypatch, baseline, objective):
    if objective == "rwr" and baseline != "rloo":
        return  # refused
    calls = programs.record(
        monkeypatch, reinforce, "token_rewards", "reinforce_loss", "reward", "write"
    )
    flags = {"total_episodes": 96, "batch_size": 32, "group_size": 4, "gamma": 0.9}
    if objective == "rwr":
        flags |= {"objective": "rwr", "rwr_beta": 0.2, "rwr_top_fraction": 0.5}
    run(baseline=baseline, kl_coef=0.5, reward="sharp", temperature=0.8, **flags)
    rollouts = [c for c in calls["reward"] if len(c["prompts"]) == 32]
    running = [0.0]
    for step in range(3):
        given, loss = calls["token_rewards"][step], calls["reinforce_loss"][step]
        prompts = rollouts[step]["prompts"].view(8, 4, 3)
        assert (prompts == prompts[:, :1]).all() and len(prompts.unique(dim=0)) > 1
        assert (given["kl"] == 0).all() if step == 0 else (given["kl"] != 0).any()
        assert given["kl_coef"] == 0.5 and given["kl"].requires_grad is False
        mask, returns = given["mask"], []
        for i in range(32):
            n = int(mask[i].sum())
            rewards = [-0.5 * k for k in given["kl"][i, :n].tolist()]
            rewards[-1] += given["scores"][i].item()
            returns.append(oracle.discounted(rewards, 0.9))
        totals = [r[0] for r in returns]
        others = lambda size, totals=totals: [  # noqa: E731
            oracle.mean_without(totals, size, i) for i in range(32)
        ]
        subtracted = oracle.padded(returns) - loss["advantages"].double()
        if objective == "rwr":
            weights = oracle.rwr_weights(totals, 0.2, 0.5)
            found = torch.where(mask, loss["advantages"], 0.0)
            expected = [[32 * w] * len(r) for w, r in zip(weights, returns, strict=True)]
            torch.testing.assert_close(found.double(), oracle.padded(expected), atol=1e-4, rtol=0)
        elif baseline == "value":
            first = subtracted[:, 0].view(8, 4)
            torch.testing.assert_close(first, first[:, :1].expand(8, 4), atol=1e-5, rtol=0)
            assert step == 0 or first.std() > 1e-4  # by prompt
            assert loss["advantages"].requires_grad is False
        else:
            expected = {
                "none": [0.0] * 32,
                "batch-mean": others(32),
                "running-mean": [sum(running[1:]) / max(1, len(running) - 1)] * 32,
                "rloo": others(4),
            }[baseline]
            rows = [[b] * len(r) for b, r in zip(expected, returns, strict=True)]
            torch.testing.assert_close(subtracted, oracle.padded(rows), atol=1e-5, rtol=0)
        running.append(sum(totals) / 32)


def test_normalized_advantages_have_variance_one(monkeypatch):
    calls = programs.record(monkeypatch, reinforce, "reinforce_loss")
    run(normalize_advantages=True)
    for call in calls["reinforce_loss"]:
        real = call["advantages"][call["mask"]]
        assert abs(real.mean()) < 1e-5 and abs(real.std(correction=0) - 1) < 1e-4


def test_without_a_baseline_nothing_is_explained_and_the_critic_learns(monkeypatch):
    calls = programs.record(monkeypatch, reinforce, "write")
    run(baseline="none")
    assert all(abs(x) < 1e-6 for x in logged(calls, "explained_variance"))
    calls = programs.record(monkeypatch, reinforce, "write")
    run(baseline="value", vf_coef=1.0, total_episodes=2560, sft_steps=100)
    errors = logged(calls, "value_loss")
    assert sum(errors[-10:]) / 10 < 0.7 * errors[0]


def test_bonuses_and_penalties_have_the_right_sign(monkeypatch):
    flags = {"total_episodes": 1280, "learning_rate": 5e-4}
    base = run(**flags)
    assert run(ent_coef=1.0, **flags)["entropy"] > base["entropy"] + 0.1
    assert run(kl_coef=2.0, **flags)["kl"] < 0.7 * base["kl"]
    calls = programs.record(monkeypatch, reinforce, "reinforce_loss", "write")
    run(baseline="value", vf_coef=0.0)
    plain = [c["logprobs"].sum().item() for c in calls["reinforce_loss"]]
    run(baseline="value", vf_coef=10.0)
    moved = [c["logprobs"].sum().item() for c in calls["reinforce_loss"][2:]]
    assert plain[0] == moved[0] and plain[1] != moved[1]


def test_values_are_read_from_the_states_of_their_own_rows(monkeypatch):
    """The critic is linear, so what is subtracted is a linear function of the right states."""
    found = programs.spy(monkeypatch, reinforce, "response_states", keep=torch.detach)
    calls = programs.record(monkeypatch, reinforce, "reinforce_loss")
    returns = programs.spy(monkeypatch, reinforce, "returns_to_go")
    sampled = programs.spy_on_samples(monkeypatch, reinforce)
    run(baseline="value", total_episodes=192)
    (policy, *_), *_ = sampled[0]
    states = [x for (gpt, prompts, _), x, _ in found if gpt is policy and len(prompts) == 64]
    loss, (_, totals, _) = calls["reinforce_loss"][-1], returns[-1]
    mask = loss["mask"]
    assert len(states) == 3 and mask.sum() > 150
    inputs = torch.nn.functional.pad(states[-1][mask], (0, 1), value=1.0).double()  # (n, D + 1)
    values = (totals - loss["advantages"])[mask].double()
    fit = inputs @ torch.linalg.lstsq(inputs, values).solution
    assert (fit - values).norm() < 1e-3 * (values - values.mean()).norm()


@pytest.mark.parametrize("vf_coef", [0.0, 1.0])
def test_the_value_loss_trains_the_policy_under_the_critic(monkeypatch, vf_coef):
    monkeypatch.setattr(reinforce, "reinforce_loss", lambda logprobs, *_: 0 * logprobs.sum())
    weights = lambda policy, *_: policy.blocks[0].qkv.weight.clone()  # noqa: E731
    sampled = programs.spy(monkeypatch, reinforce, "generate", weights)
    run(baseline="value", vf_coef=vf_coef, total_episodes=192)
    _, second, third = (noted for *_, noted in sampled)  # at first the critic reads nothing
    decay = 1 - 0.01 * reinforce.Args.learning_rate * 0.5  # of AdamW, at half the rate
    assert torch.allclose(third, second * decay, rtol=0, atol=1e-6) == (vf_coef == 0)


@torch.no_grad()
def test_samples_are_those_of_ppo():
    """The sampling of ppo.py, tested there, without the states that it keeps."""
    torch.manual_seed(3)
    gpt, (prompts, _) = reinforce.GPT(), reinforce.make_prompts()
    for parameter in gpt.parameters():  # blocks that are not the identity, and an EOS now and then
        parameter += 0.2 * torch.randn_like(parameter)
    torch.manual_seed(0)
    responses = reinforce.generate(gpt, prompts, 0.7)
    assert len(reinforce.response_mask(responses).sum(1).unique()) == 3
    torch.manual_seed(0)
    assert torch.equal(responses, ppo.generate_with_states(gpt, prompts, 0.7)[0])


def test_success_rises_from_the_warm_start():
    result = reinforce.main(
        reinforce.Args(total_episodes=10_240, batch_size=128, learning_rate=1e-3, tensorboard=False)
    )
    assert 0.4 < result["success_before"] < 0.8
    assert result["success"] > result["success_before"] + 0.1
    assert 0.2 < result["optimality"] <= 1
    assert result["objective"] == pytest.approx(result["score"] - 0.05 * result["kl"])


def test_regression_learns_too():
    flags = {"objective": "rwr", "rwr_beta": 0.5, "learning_rate": 5e-4, "total_episodes": 7_680}
    result = reinforce.main(reinforce.Args(tensorboard=False, **flags))
    assert result["success"] > result["success_before"] + 0.05


def test_same_seed_same_result_other_seed_another(monkeypatch):
    first = run()
    monkeypatch.setattr(reinforce, "warm_start", warm_start)
    assert run() == first
    assert run(seed=2) != first


CHOICES = [
    {"reward": "sharp"},
    {"reward": "distance"},
    {"group_size": 8},
    {"baseline": "none"},
    {"baseline": "batch-mean"},
    {"baseline": "running-mean"},
    {"baseline": "value"},
    {"gamma": 0.9},
    {"normalize_advantages": True},
    {"ent_coef": 0.1},
    {"baseline": "value", "vf_coef": 1.0},
    {"objective": "rwr"},
    {"objective": "rwr", "rwr_beta": 2.0},
    {"objective": "rwr", "rwr_top_fraction": 0.2},
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


def test_values_at_the_border_are_taken():
    check, args = reinforce.check_args, reinforce.Args
    check(args(seed=0, kl_coef=0.0, sft_steps=0, gamma=0.0, group_size=2))
    check(args(seed=2**63 - 1, gamma=1.0, total_episodes=256, group_size=256))
    check(args(baseline="batch-mean", batch_size=2, group_size=1))
    check(args(baseline="value", vf_coef=0.0))
    check(args(objective="rwr", rwr_top_fraction=1.0))


BAD = {
    "batch_size": [0, 1000],
    "total_episodes": [0, 10],
    "group_size": [0, 7, 1],
    "learning_rate": [0.0, float("nan"), float("inf")],
    "max_grad_norm": [0.0],
    "temperature": [0.0],
    "kl_coef": [-1.0],
    "seed": [-1],
    "sft_steps": [-1],
    "gamma": [2.0, -0.1],
    "ent_coef": [-0.1],
    "vf_coef": [-0.1, 0.5],
    "rwr_beta": [0.0, 1.0],
    "rwr_top_fraction": [0.0, 1.5, 0.5],
    "device": ["cuda"],
}
TOGETHER = [
    ({"objective": "rwr", "baseline": "none"}, "--baseline none"),
    ({"objective": "rwr", "normalize_advantages": True}, "--normalize-advantages True"),
    ({"objective": "rwr", "vf_coef": 0.5}, "--vf-coef 0.5"),
    ({"objective": "rwr", "rwr_top_fraction": 1.5}, "--rwr-top-fraction 1.5"),
    ({"baseline": "batch-mean", "batch_size": 1, "group_size": 1}, "--baseline batch-mean"),
    ({"baseline": "rloo", "group_size": 1}, "--baseline rloo"),
]
NAMED = {("batch_size", 1000): "--total-episodes", ("group_size", 1): "--baseline rloo"}


@pytest.mark.parametrize(
    "flags,named",
    [
        *[
            ({f: v}, NAMED.get((f, v), f"--{f.replace('_', '-')} {v}"))
            for f, values in BAD.items()
            for v in values
        ],
        *TOGETHER,
    ],
)
def test_bad_values_end_with_one_line_and_nothing_written(flags, named, capsys, tmp_path):
    if flags.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a cuda device")
    with pytest.raises(SystemExit) as stop:
        run(**({"tensorboard": True} | flags))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert error.count("\n") == 1 and named in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--baseline", "best"], ["--objective", "ppo"], ["--clip", "1"]])
def test_bad_words_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(reinforce.Args, args=words)
    assert stop.value.code == 2


def test_program_in_a_shell(program):
    """The real command: header, progress, verdict; events and a saved model that loads safely."""
    saved, _ = programs.check_short_run(reinforce, *program())
    reinforce.GPT().load_state_dict(saved["policy"])
    assert saved["args"]["baseline"] == "rloo"


def test_logged_metrics(monkeypatch):
    calls = programs.record(monkeypatch, reinforce, "write")
    run()
    found = {(c["group"], name) for c in calls["write"] for name in c["metrics"]}
    charts = "score score_std kl kl_coef response_length eos_rate learning_rate episodes_per_second"
    losses = "policy_loss value_loss entropy explained_variance grad_norm"
    wanted = {("charts", name) for name in charts.split()}
    assert wanted | {("losses", name) for name in losses.split()} <= found


def test_the_learning_rate_rises_then_falls(monkeypatch):
    calls = programs.record(monkeypatch, reinforce, "write")
    run(batch_size=64, total_episodes=20 * 64)
    done = [(k + 0.5) / 20 for k in range(20)]
    rates = [reinforce.Args.learning_rate * (10 * p if p < 1 / 11 else 1 - p) for p in done]
    assert logged(calls, "learning_rate") == pytest.approx(rates)


def test_the_pictures_show_the_policy_before_and_after(monkeypatch):
    programs.check_policy_images(monkeypatch, reinforce, lambda: run(tensorboard=True))


def test_reference_is_frozen_and_nothing_is_left_behind(monkeypatch, tmp_path):
    programs.check_reference_is_frozen(monkeypatch, run)
    assert list(tmp_path.iterdir()) == []


def test_one_gradient_step_a_rollout_and_a_bad_one_stops_the_run(monkeypatch):
    steps = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: steps.append(1) or clip(*a))
    run()
    assert len(steps) == 2
    infinite = lambda p, r, kind="exact": torch.full((len(p),), torch.inf)  # noqa: E731
    monkeypatch.setattr(reinforce, "reward", infinite)
    with pytest.raises(SystemExit) as stop:
        run()
    assert "rollout 1" in str(stop.value.code) and "--learning-rate" in str(stop.value.code)
