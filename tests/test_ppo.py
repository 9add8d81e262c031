"""ppo.py against exact values: every expectation is a sum over all 1111 responses."""

import copy
import math
import pickle

import exact
import oracle
import programs
import pytest
import torch

import ppo

PROMPT = (4, 3, 3)
BETA = 0.1
EOS = 10


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def real_tokens(response):
    """A padded response as the tuple of its real tokens."""
    if EOS in response:
        return tuple(response[: response.index(EOS) + 1])
    return tuple(response)


def make_gpt(seed=3, outputs=11):
    torch.manual_seed(seed)
    gpt = ppo.GPT(outputs=outputs).double()
    for block in gpt.blocks:  # they start as the identity, which would hide a mistake
        torch.nn.init.normal_(block.proj.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    return gpt


def response_logprob(gpt, prompt, response, temperature):
    """Log-probability of a response, one forward pass per token."""
    total = 0.0
    for t, token in enumerate(response):
        tokens = torch.tensor([[*prompt, *response[:t]]])
        logits = gpt.head(gpt(tokens))[0, -1] / temperature
        total += logits.log_softmax(0)[token].item()
    return total


@pytest.fixture
def world():
    """A tabular policy and reference, with all responses, masks, log-probabilities and scores."""
    theta = oracle.table(0).requires_grad_()
    reference = oracle.table(1)
    responses = oracle.responses()
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in responses])
    scores = float64(*[oracle.score(PROMPT, y, "sharp") for y in responses])
    return theta, reference, responses, mask, scores


def exact_gradient(theta, reference, scores, beta=BETA):
    (gradient,) = torch.autograd.grad(oracle.objective(theta, reference, scores, beta), theta)
    return gradient


def expected_gradient(theta, losses):
    """Gradient of Σ_y p(y) · loss(y), with p held fixed."""
    probs = oracle.token_table(theta).sum(1).exp().detach()
    (gradient,) = torch.autograd.grad((probs * torch.stack(losses)).sum(), theta)
    return gradient


# ---------------------------------------------------------------------------- Task
def test_prompts_are_the_912_solvable_ones_in_a_fixed_split():
    train, train_targets, test, test_targets = ppo.make_prompts("cpu")
    prompts = [tuple(prompt) for prompt in torch.cat([train, test]).tolist()]
    solvable = set()
    for a in range(10):
        for b in range(10):
            for c in range(10):
                if any(a + b + c + d + e == 20 for d in range(10) for e in range(10)):
                    solvable.add((a, b, c))
    assert (len(train), len(test), len(prompts)) == (729, 183, 912)
    assert set(prompts) == solvable
    assert torch.cat([train_targets, test_targets]).tolist() == [20 - sum(p) for p in prompts]
    torch.manual_seed(99)
    assert torch.equal(ppo.make_prompts("cpu")[2], test)
    assert len({p[0] for p in prompts[:100]}) == 10  # in random order


def test_demonstrations_are_all_the_correct_responses():
    train, targets, _, _ = ppo.make_prompts("cpu")
    prompts, responses = ppo.make_demonstrations(train[:50], targets[:50])
    found = [(*x, *y) for x, y in zip(prompts.tolist(), responses.tolist(), strict=True)]
    expected = []
    for prompt in train[:50].tolist():
        expected += [(*prompt, *y) for y in oracle.responses() if oracle.score(prompt, y) == 1]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("prompt", [PROMPT, (9, 9, 0), (0, 2, 0), (0, 1, 9)])
def test_reward_of_every_response(prompt):
    responses = exact.all_responses()
    targets = torch.full((len(responses),), 20 - sum(prompt))
    expected = [oracle.score(prompt, real_tokens(y)) for y in responses.tolist()]
    assert ppo.reward(targets, responses).tolist() == expected


# ---------------------------------------------------------------------------- Model
@torch.no_grad()
def test_gpt_is_a_pre_ln_transformer():
    gpt = make_gpt()
    tokens = [4, 3, 3, 7, 10, 1]
    for name, weight in gpt.named_parameters():  # norms and biases that do something
        if weight.dim() == 1:
            is_scale = "norm" in name and "weight" in name
            torch.nn.init.normal_(weight, mean=float(is_scale), std=0.3)
    expected = torch.stack(oracle.gpt_states(gpt.state_dict(), tokens, heads=4))
    for length in (1, 3, 6):
        found = gpt(torch.tensor([tokens[:length], [0] * length]))[0]
        torch.testing.assert_close(found, expected[:length], atol=1e-9, rtol=0)


@torch.no_grad()
def test_blocks_start_as_the_identity():
    torch.manual_seed(0)
    gpt = ppo.GPT()
    x = torch.randn(2, 6, 64)
    for block in gpt.blocks:
        block.proj.bias.zero_()
        block.down.bias.zero_()
        assert torch.equal(block(x), x)
    assert len(gpt.blocks) == 2
    assert gpt.embed.weight.std() == pytest.approx(0.2, rel=0.2)
    assert gpt.position.weight.std() == pytest.approx(0.2, rel=0.2)


# ---------------------------------------------------------------------------- Sampling
def test_mask_ends_with_the_first_eos():
    responses = torch.tensor(
        [[1, 2, 10], [1, 10, 10], [10, 10, 10], [1, 2, 3], [1, 10, 5], [10, 3, 10]]
    )
    expected = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    mask = ppo.response_mask(responses)
    assert mask.dtype == torch.bool
    assert mask.long().tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("prompt", [PROMPT, (4, 3)])
def test_logprobs_of_a_response_are_those_of_one_pass_per_token(prompt):
    gpt = make_gpt()
    responses = [[7, 3, 10], [7, 10, 10], [10, 10, 10], [0, 9, 5], [7, 10, 4]]
    prompts = torch.tensor([prompt] * len(responses))
    logits = gpt.head(ppo.response_states(gpt, prompts, torch.tensor(responses))) / 0.7
    logprobs = ppo.token_logprobs(logits, torch.tensor(responses))
    mask = ppo.response_mask(torch.tensor(responses))
    for row, response in enumerate(responses):
        expected = response_logprob(gpt, prompt, real_tokens(response), 0.7)
        assert ppo.masked_sum(logprobs, mask)[row].item() == pytest.approx(expected, abs=1e-9)


@torch.no_grad()
def test_states_are_those_before_each_token():
    gpt = make_gpt()
    prompts = torch.tensor([PROMPT])
    responses = torch.tensor([[7, 3, 10]])
    states = ppo.response_states(gpt, prompts, responses)
    assert states.shape == (1, 3, 64)
    for t in range(3):
        before = torch.cat([prompts, responses[:, :t]], 1)
        torch.testing.assert_close(states[0, t], gpt(before)[0, -1])


@torch.no_grad()
def test_what_follows_eos_does_not_reach_the_real_tokens():
    gpt = make_gpt()
    prompts = torch.tensor([PROMPT])
    clean = ppo.response_states(gpt, prompts, torch.tensor([[1, 10, 10]]))
    dirty = ppo.response_states(gpt, prompts, torch.tensor([[1, 3, 7]]))
    torch.testing.assert_close(clean[:, :2], dirty[:, :2])


@pytest.mark.parametrize("prompt", [PROMPT, (4, 3)])
def test_samples_follow_the_distribution_at_the_temperature(prompt):
    gpt = make_gpt().float()
    gpt.head.bias.data[EOS] = 1.0  # so that short responses are frequent
    n = 10_000
    torch.manual_seed(0)
    samples = ppo.generate(gpt, torch.tensor([prompt]).expand(n, -1), 0.5)
    assert samples.shape == (n, 3)
    assert (samples[:, 1:][samples[:, :-1] == EOS] == EOS).all()  # padded with EOS
    counts = dict.fromkeys(oracle.responses(), 0)
    for y in samples.tolist():
        counts[real_tokens(y)] += 1
    frequent = sorted(counts, key=counts.get)[-20:]
    for y in [*frequent, (EOS,), (0, EOS), (9, EOS), (0, 0, EOS), (9, 9, 9)]:
        p = math.exp(response_logprob(gpt, prompt, y, 0.5))
        error = math.sqrt(p * (1 - p) / n)
        assert abs(counts[y] / n - p) < 5 * error + 1e-3


@torch.no_grad()
def test_samples_of_each_row_are_for_its_own_prompt():
    gpt = make_gpt().float()
    gpt.head.weight.mul_(20)  # nearly greedy
    prompts = ppo.make_prompts("cpu")[2]
    samples = ppo.generate(gpt, prompts, 1e-3)
    for t in range(3):
        states = gpt(torch.cat([prompts, samples[:, :t]], 1))[:, -1]
        ended = (samples[:, :t] == EOS).any(1)
        assert torch.equal(samples[:, t], torch.where(ended, EOS, gpt.head(states).argmax(1)))


@torch.no_grad()
@pytest.mark.parametrize("prompt", [PROMPT, (4, 3)])
def test_a_response_is_scored_at_its_last_real_token(prompt):
    gpt = make_gpt(outputs=1)
    responses = [[7, 3, 10], [7, 10, 10], [10, 10, 10], [0, 9, 5], [7, 10, 4]]
    prompts = torch.tensor([prompt] * len(responses))
    scores = ppo.response_scores(gpt, prompts, torch.tensor(responses))
    assert scores.shape == (5,)
    for row, response in enumerate(responses):
        tokens = torch.tensor([[*prompt, *real_tokens(response)]])
        torch.testing.assert_close(scores[row], gpt.head(gpt(tokens))[0, -1, 0])


def test_kl_of_each_token_over_the_vocabulary():
    logits, ref_logits = torch.randn(2, 4, 3, 11, dtype=torch.float64).unbind()
    found = ppo.token_kl(logits, ref_logits)
    for row in range(4):
        for t in range(3):
            kl = oracle.row_kl(logits[row, t].tolist(), ref_logits[row, t].tolist())
            assert found[row, t].item() == pytest.approx(kl)
    assert ppo.token_kl(logits, logits).abs().max() < 1e-12


def test_expected_token_kl_is_the_kl_of_the_responses(world):
    theta, reference, responses, mask, _ = world
    logits = torch.zeros(2, len(responses), 3, 11, dtype=torch.float64)
    for i, y in enumerate(responses):
        for t in range(len(y)):
            logits[0, i, t] = theta[oracle.row(y[:t])].detach()
            logits[1, i, t] = reference[oracle.row(y[:t])]
    logprobs = oracle.token_table(theta).sum(1).detach()
    kl = ppo.masked_sum(ppo.token_kl(*logits), mask)
    expected = (logprobs.exp() * (logprobs - oracle.token_table(reference).sum(1))).sum()
    assert (logprobs.exp() * kl).sum().item() == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("garbage", [0.0, 99.0, math.nan, math.inf])
def test_masked_statistics_count_real_tokens_only(garbage):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    x = torch.where(mask, float64(1, 2, 4, 8, 3, 3).view(2, 3), garbage)
    assert ppo.masked_sum(x, mask).tolist() == [7, 8]
    assert ppo.masked_mean(x, mask).item() == 15 / 4
    std = math.sqrt((1 + 4 + 16 + 64) / 4 - (15 / 4) ** 2)
    expected = [(value - 15 / 4) / std for value in (1, 2, 4, 8)]
    torch.testing.assert_close(ppo.whiten(x, mask), float64(*expected, 0, 0).view(2, 3))


def test_whitening_equal_values_gives_zeros():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert (ppo.whiten(torch.full((2, 3), 0.5), mask) == 0).all()


def test_sft_is_maximum_likelihood_with_adamw():
    policy = make_gpt()
    twin = copy.deepcopy(policy)
    prompts = torch.randint(10, (30, 3))
    responses = torch.randint(11, (30, 3))  # some end early, with garbage after EOS
    torch.manual_seed(1)
    ppo.sft(policy, prompts, responses, 3)

    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1.7e-3)
    for _ in range(3):
        rows = torch.randint(30, (256,))
        logits = twin.head(twin(torch.cat([prompts, responses], 1)))[rows, 2:5].log_softmax(2)
        loss = 0.0
        for t in range(3):
            chosen = logits[:, t].gather(1, responses[rows, t : t + 1])
            ended = (responses[rows, :t] == EOS).any(1)
            loss = loss - chosen[~ended].sum() / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for found, expected in zip(policy.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


# ---------------------------------------------------------------------------- Evaluation
@pytest.fixture(scope="module")
def trained():
    """A policy that often succeeds, and a reference that does so less often."""
    train, targets, _, _ = ppo.make_prompts("cpu")
    torch.manual_seed(5)
    reference = ppo.GPT()
    ppo.sft(reference, *ppo.make_demonstrations(train, targets), 40)
    policy = copy.deepcopy(reference)
    ppo.sft(policy, *ppo.make_demonstrations(train, targets), 40)
    return policy, reference


def test_sampled_evaluation_agrees_with_the_exact_one(trained):
    _, _, prompts, targets = ppo.make_prompts("cpu")
    prompts = prompts[:40]
    targets = targets[:40]
    torch.manual_seed(0)
    sampled = ppo.evaluate(*trained, prompts, targets, 0.8)
    expected = exact.evaluate(*trained, prompts, targets, 0.05, 0.8)
    assert expected["success"] > 0.2
    assert expected["kl"] > 0.05
    for name in ("success", "kl"):
        assert 0 < sampled[f"{name}_error"] < 0.05
        assert abs(sampled[name] - expected[name]) < 4 * sampled[f"{name}_error"], name


def test_standard_errors_are_those_of_repeated_evaluations(trained):
    """Of the same prompts: how much the prompts differ does not count."""
    _, _, prompts, targets = ppo.make_prompts("cpu")
    prompts = prompts[:8]
    targets = targets[:8]
    torch.manual_seed(0)
    results = [ppo.evaluate(*trained, prompts, targets, 1.0) for _ in range(100)]
    for name in ("success", "kl"):
        spread = torch.tensor([result[name] for result in results]).std().item()
        error = sum(result[f"{name}_error"] for result in results) / 100
        assert spread == pytest.approx(error, rel=0.25), name


def test_evaluation_samples_16_responses_per_prompt(monkeypatch):
    """Which responses are sampled is told by hand; the figures follow from a calculator."""
    policy = ppo.GPT()
    asked = []

    def generate(policy, prompts, temperature):
        asked.append((prompts, temperature))
        responses = torch.tensor([[1, 2, 10]]).repeat(len(prompts), 1)
        first = 256 * (len(asked) - 1)  # number of the first of these 800 responses
        number = torch.arange(first, first + len(prompts))
        responses[number >= 400, 1] = 3  # the last 8 responses to each prompt sum to 4
        return responses

    monkeypatch.setattr(ppo, "generate", generate)
    prompts = torch.randint(10, (50, 3))
    # Half of the responses to 10 prompts are right, and none of those to the others.
    targets = torch.tensor([3] * 5 + [4] * 5 + [5] * 40)
    result = ppo.evaluate(policy, policy, prompts, targets, 0.7)
    rows = torch.cat([prompts for prompts, _ in asked])
    assert sorted(rows.tolist()) == sorted(prompts.tolist() * 16)
    assert {temperature for _, temperature in asked} == {0.7}
    assert result["success"] == pytest.approx(0.1)
    variance = 16 * 0.25 / 15  # of the responses to one of the 10 prompts
    assert result["success_error"] == pytest.approx(math.sqrt(variance * 10 / 50 / 800))
    assert result["kl"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------- Reward model
def make_reward_model(members=3, uncertainty_coef=0.5):
    model = ppo.RewardModel(members, uncertainty_coef)
    model.members = torch.nn.ModuleList([make_gpt(seed, outputs=1) for seed in range(members)])
    model.reference = make_gpt(9)
    with torch.no_grad():
        model.reference.head.bias[EOS] += 1  # so that some of its responses are short
    return model


def member_score(gpt, prompt, response):
    """Score of a response, given by its real tokens, from one pass over these."""
    return gpt.head(gpt(torch.tensor([[*prompt, *response]])))[0, -1, 0].item()


@torch.no_grad()
def test_score_is_the_mean_less_the_deviation_of_centred_scores(monkeypatch):
    """Centred on four responses of the reference to the same prompt."""
    model = make_reward_model()
    cases = [(PROMPT, (7, 3, 10)), (PROMPT, (10,)), ((9, 9, 0), (2, 10)), ((1, 2, 3), (4, 5, 6))]
    prompts = torch.tensor([prompt for prompt, _ in cases])
    responses = torch.tensor([[*y, 10, 10][:3] for _, y in cases])
    samples = programs.spy(monkeypatch, ppo, "generate")
    found = model(prompts, responses)
    assert len(samples) == 4
    for (policy, sampled_for, temperature), _, _ in samples:
        assert policy is model.reference
        assert torch.equal(sampled_for, prompts)
        assert temperature == 1.0
    assert len({tuple(sample.flatten().tolist()) for _, sample, _ in samples}) == 4
    for row, (prompt, response) in enumerate(cases):
        scores = [member_score(gpt, prompt, response) for gpt in model.members]
        centred = list(scores)
        for k, gpt in enumerate(model.members):
            for _, sample, _ in samples:
                centred[k] -= member_score(gpt, prompt, real_tokens(sample[row].tolist())) / 4
        expected = sum(scores) / 3 - 0.5 * oracle.deviation(centred)
        assert oracle.deviation(centred) > 0.01
        assert found[row].item() == pytest.approx(expected, abs=1e-9)


@torch.no_grad()
def test_a_constant_of_a_member_and_a_prompt_does_not_count(monkeypatch):
    """Preferences say nothing about it, so it may not count as disagreement either."""
    model = make_reward_model()
    prompts = torch.tensor([PROMPT, PROMPT, (9, 9, 0)])
    responses = torch.tensor([[7, 3, 10], [7, 10, 10], [2, 0, 10]])
    torch.manual_seed(0)
    before = model(prompts, responses)
    response_scores = ppo.response_scores

    def shifted(gpt, prompts, responses):
        scores = response_scores(gpt, prompts, responses)
        if gpt is model.members[1]:
            scores = scores + 3.0 * prompts[:, 0] + 1.0
        return scores

    monkeypatch.setattr(ppo, "response_scores", shifted)
    torch.manual_seed(0)
    after = model(prompts, responses)
    shift = (3.0 * prompts[:, 0] + 1.0) / 3  # of the mean of three members
    torch.testing.assert_close(after, before + shift)


@torch.no_grad()
@pytest.mark.parametrize("members, uncertainty_coef", [(1, 0.0), (1, 2.0), (3, 0.0)])
def test_score_without_uncertainty_is_the_mean(members, uncertainty_coef):
    model = make_reward_model(members, uncertainty_coef)
    prompts = torch.tensor([PROMPT, (9, 9, 0)])
    responses = torch.tensor([[7, 3, 10], [2, 10, 10]])
    scores = [ppo.response_scores(gpt, prompts, responses) for gpt in model.members]
    torch.testing.assert_close(model(prompts, responses), torch.stack(scores).mean(0))


def reward_model_file(**changes):
    """What reward_model.py saves, with changes."""
    model = make_reward_model().float()
    members = [copy.deepcopy(member.state_dict()) for member in model.members]
    reference = copy.deepcopy(model.reference.state_dict())
    saved = {"members": members, "reference": reference, "uncertainty_coef": 0.5}
    return saved | {"args": {"seed": "1"}} | changes


@torch.no_grad()
@pytest.mark.parametrize("members", [1, 3])
def test_a_saved_reward_model_is_loaded(members, tmp_path):
    saved = reward_model_file()
    saved["members"] = saved["members"][:members]
    torch.save(saved, tmp_path / "model.pt")
    loaded = ppo.load_reward_model(tmp_path / "model.pt", "cpu")
    prompts, _, _, _ = ppo.make_prompts("cpu")
    responses = exact.all_responses()[:729]
    original = make_reward_model(members).float()
    torch.manual_seed(0)
    expected = original(prompts, responses)
    torch.manual_seed(0)
    torch.testing.assert_close(loaded(prompts, responses), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def wrong_files():
    """Contents of files that are no reward model, by name."""
    nan = reward_model_file()
    nan["members"][2]["norm.bias"][5] = math.nan
    nan_row = reward_model_file()
    nan_row["members"][1]["embed.weight"][9, 3] = math.nan  # of a token that few responses have
    infinite = reward_model_file()
    infinite["members"][0]["embed.weight"][0, 0] = math.inf
    missing = reward_model_file()
    del missing["members"][1]["head.bias"]
    wide = reward_model_file()
    wide["members"][0]["head.weight"] = torch.zeros(11, 64)
    no_members = reward_model_file()
    del no_members["members"]
    no_reference = reward_model_file()
    del no_reference["reference"]
    nan_reference = reward_model_file()
    nan_reference["reference"]["position.weight"][5, 0] = math.nan
    gpt = ppo.GPT().state_dict()
    return {
        "policy": {"args": {}, "policy": gpt, "reference": gpt},
        "policies as members": reward_model_file(members=[gpt]),
        "nan": nan,
        "nan in one row": nan_row,
        "infinite": infinite,
        "missing weight": missing,
        "wrong shape": wide,
        "no members": no_members,
        "no ensemble": reward_model_file(members=[]),
        "nan coefficient": reward_model_file(uncertainty_coef=math.nan),
        "negative coefficient": reward_model_file(uncertainty_coef=-1.0),
        "text coefficient": reward_model_file(uncertainty_coef="high"),
        "infinite coefficient": reward_model_file(uncertainty_coef=math.inf),
        "no reference": no_reference,
        "reference without weights": reward_model_file(reference={}),
        "nan in the reference": nan_reference,
        "a list": [1, 2, 3],
        "code": reward_model_file(extra=Malicious("created")),
    }


WRONG = wrong_files()


def check_refused(path, capsys):
    with pytest.raises(SystemExit) as stop:
        ppo.load_reward_model(path, "cpu")
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert error.startswith(f"error: --reward-model {path}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", WRONG)
def test_wrong_reward_models_are_refused_in_one_line(name, tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.pt"
    torch.save(WRONG[name], path)
    monkeypatch.chdir(tmp_path)
    check_refused(path, capsys)
    assert list(tmp_path.iterdir()) == [path]  # no code of the file was run


def test_damaged_reward_models_are_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "model.pt"
    check_refused(path, capsys)  # missing
    check_refused(tmp_path, capsys)  # a folder
    path.write_bytes(b"")
    check_refused(path, capsys)
    path.write_bytes(b"garbage" * 100)
    check_refused(path, capsys)
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "created")))
    check_refused(path, capsys)
    torch.save(reward_model_file(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    check_refused(path, capsys)
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------- Advantages
@pytest.mark.parametrize("garbage", [0.3, math.nan])
def test_score_is_paid_at_the_last_real_token(garbage):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    kl = torch.where(mask, torch.tensor([[0.1, 0.2, 0.3]]), garbage)
    rewards = ppo.token_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, mask, 0.5)
    expected = [[-0.05, -0.1, 0.85], [-0.05, 1.9, 0], [2.95, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 1.0), (1.0, 0.9), (0.9, 0.95), (0.7, 0.0)])
@pytest.mark.parametrize("garbage", [0.0, 99.0, math.nan])
def test_gae_with_unequal_lengths(gamma, gae_lambda, garbage):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    lengths = [5, 1, 3, 2, 4, 5]
    mask = torch.tensor([[t < n for t in range(5)] for n in lengths])
    advantages, returns = ppo.compute_gae(
        torch.where(mask, rewards, garbage),
        torch.where(mask, values, garbage),
        mask,
        gamma,
        gae_lambda,
    )
    for i, n in enumerate(lengths):
        expected = oracle.gae(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, gae_lambda)
        torch.testing.assert_close(advantages[i, :n], float64(*expected))
        torch.testing.assert_close(returns[i, :n], float64(*expected) + values[i, :n])
        assert (advantages[i, n:] == 0).all()
        assert (returns[i, n:] == 0).all()


# ---------------------------------------------------------------------------- Expected gradients
def losses_of_all(world, values, gae_lambda):
    """PPO's loss of every single response, at the old policy, with the KL in the reward."""
    theta, reference, _, mask, scores = world
    logprobs = oracle.token_table(theta)
    old_logprobs = logprobs.detach()
    kl = old_logprobs - oracle.token_table(reference)
    rewards = ppo.token_rewards(scores, kl, mask, BETA)
    advantages, _ = ppo.compute_gae(rewards, values, mask, 1.0, gae_lambda)
    losses = []
    for i in range(len(mask)):
        row = slice(i, i + 1)
        loss, _ = ppo.policy_loss(logprobs[row], old_logprobs[row], advantages[row], mask[row], 0.2)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("gae_lambda", [1.0, 0.9, 0.0])
def test_expected_gradient_with_the_exact_critic(world, gae_lambda):
    theta, reference, responses, _, scores = world
    table = oracle.state_values(theta.detach(), reference, scores, BETA)
    values = oracle.padded([[table[y[:t]] for t in range(len(y))] for y in responses])
    found = expected_gradient(theta, losses_of_all(world, values, gae_lambda))
    torch.testing.assert_close(-found, exact_gradient(theta, reference, scores), atol=1e-10, rtol=0)


def test_expected_gradient_with_any_critic_when_lambda_is_one(world):
    theta, reference, responses, _, scores = world
    table = torch.randn(111, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = oracle.padded([[table[oracle.row(y[:t])] for t in range(len(y))] for y in responses])
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


# ---------------------------------------------------------------------------- Losses
def tutorial_loss(old, new, rewards):
    """The hand-worked example: advantage is the reward of the word, clip 0.1."""
    old = float64(*old).view(1, -1)
    new = float64(*new).view(1, -1)
    rewards = float64(*rewards).view(1, -1)
    mask = torch.ones_like(rewards).bool()
    loss, _ = ppo.policy_loss(new.log(), old.log(), rewards, mask, 0.1)
    return loss.item()


def test_figures_of_the_tutorial():
    assert tutorial_loss([0.3], [0.6], [1]) == pytest.approx(-1.10)
    old = [0.9, 0.95, 0.4, 0.25, 0.33, 0.45, 0.4, 0.15, 0.3]
    new = [0.9, 0.95, 0.6, 0.55, 0.5, 0.65, 0.3, 0.2, 0.6]
    rewards = [0, 0, 0, 1, 0, 0, 0, 0, 1]
    old2 = [0.9, 0.95, 0.3, 0.25, 0.2]
    new2 = [0.9, 0.95, 0.66, 0.55, 0.75]
    rewards2 = [0, 0, 0, 0, -1]
    assert tutorial_loss(old, new, rewards) == pytest.approx(-2.20)
    assert tutorial_loss(old2, new2, rewards2) == pytest.approx(3.75)
    padding = [1.0] * 4
    olds = float64(*old, *old2, *padding).view(2, 9)
    news = float64(*new, *new2, *padding).view(2, 9)
    advantages = float64(*rewards, *rewards2, *padding).view(2, 9)
    mask = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    loss, _ = ppo.policy_loss(news.log(), olds.log(), advantages, mask, 0.1)
    assert loss.item() == pytest.approx(0.775)  # printed there as -0.77


def ragged(seed=0):
    """Old and new log-probabilities (or values), advantages and a mask of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    old, change, advantages = torch.randn(3, 8, 4, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([4, 1, 2, 3, 4, 4, 2, 1])
    return old, old + 0.5 * change, advantages, torch.arange(4) < lengths[:, None]


GARBAGE = [0.0, 7.0, math.nan, math.inf]


@pytest.mark.parametrize("dual_clip", [None, 1.1, 1.6])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_policy_loss_and_its_gradient_by_loops(dual_clip, garbage):
    old, new, advantages, mask = ragged()
    logprobs = torch.where(mask, new, garbage).requires_grad_()
    old_logprobs = torch.where(mask, old, garbage)
    padded_advantages = torch.where(mask, advantages, garbage)
    inputs = [logprobs, old_logprobs, padded_advantages, mask, 0.2]
    if dual_clip is None:
        loss, _ = ppo.policy_loss(*inputs)
    else:
        loss = ppo.dual_clip_loss(*inputs, dual_clip)
    total = 0.0
    expected_gradient = torch.zeros_like(new)
    clipped = set()
    for i in range(8):
        for t in range(int(mask[i].sum())):
            ratio = (new[i, t] - old[i, t]).exp().item()
            advantage = advantages[i, t].item()
            value = oracle.clipped_objective(ratio, advantage, 0.2, dual_clip)
            total += value
            if value == ratio * advantage:
                expected_gradient[i, t] = -value / 8
            else:
                clipped.add(advantage > 0)
    assert loss.item() == pytest.approx(-total / 8)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, expected_gradient)
    assert clipped == {True, False}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_policy_metrics_by_loops(garbage):
    old, new, advantages, mask = ragged()
    logprobs = torch.where(mask, new, garbage).requires_grad_()
    _, metrics = ppo.policy_loss(logprobs, torch.where(mask, old, garbage), advantages, mask, 0.2)
    ratios = (new - old).exp()[mask].tolist()
    n = len(ratios)
    expected = sum(r - 1 - math.log(r) for r in ratios) / n
    assert metrics["approx_kl"].item() == pytest.approx(expected)
    assert metrics["clipfrac"].item() == pytest.approx(sum(abs(r - 1) > 0.2 for r in ratios) / n)
    assert metrics["ratio"].item() == pytest.approx(sum(ratios) / n)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    old = torch.zeros(1, 1, dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for ratio, expected in ((1.5, 3.0), (2.999, 5.998), (3.001, 6.0), (50.0, 6.0)):
        new = old + math.log(ratio)
        loss = ppo.dual_clip_loss(new, old, old - 2.0, mask, 0.2, 3.0)
        assert loss.item() == pytest.approx(expected)
    good = ppo.dual_clip_loss(old + math.log(50.0), old, old + 2.0, mask, 0.2, 3.0)
    assert good.item() == pytest.approx(-2 * 1.2)  # A > 0 is clipped from above, as ever
    rare = ppo.dual_clip_loss(old + math.log(0.1), old, old - 2.0, mask, 0.2, 3.0)
    assert rare.item() == pytest.approx(2 * 0.8)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("value_clip", [0.2, 0.5, 100.0])
def test_value_loss_and_its_gradient_by_loops(garbage, value_clip):
    old_values, values, returns, mask = ragged(1)
    found = torch.where(mask, values, garbage).requires_grad_()
    padded_old = torch.where(mask, old_values, garbage)
    padded_returns = torch.where(mask, returns, garbage)
    loss = ppo.value_loss(found, padded_old, padded_returns, mask, value_clip)
    total = 0.0
    expected_gradient = torch.zeros_like(values)
    for i in range(8):
        for t in range(int(mask[i].sum())):
            value, old, target = (x[i, t].item() for x in (values, old_values, returns))
            error = oracle.clipped_error(value, old, target, value_clip)
            total += error
            if abs(value - old) <= value_clip or error == 0.5 * (value - target) ** 2:
                expected_gradient[i, t] = (value - target) / 8
    assert loss.item() == pytest.approx(total / 8)
    loss.backward()
    torch.testing.assert_close(found.grad, expected_gradient)


def test_gradients_of_minibatches_average_to_that_of_the_batch():
    old, new, advantages, mask = ragged()
    new.requires_grad_()

    def loss(rows):
        pg_loss, _ = ppo.policy_loss(new[rows], old[rows], advantages[rows], mask[rows], 0.2)
        return pg_loss + ppo.value_loss(new[rows], old[rows], advantages[rows], mask[rows], 0.2)

    (whole,) = torch.autograd.grad(loss(slice(None)), new)
    parts = [torch.autograd.grad(loss(slice(i, i + 2)), new)[0] for i in range(0, 8, 2)]
    torch.testing.assert_close(sum(parts) / 4, whole)


def test_eos_receives_gradient_and_padding_none():
    logits = torch.zeros(1, 3, 11, requires_grad=True)
    responses = torch.tensor([[5, 10, 10]])
    logprobs = ppo.token_logprobs(logits, responses)
    mask = ppo.response_mask(responses)
    loss, _ = ppo.policy_loss(logprobs, logprobs.detach(), torch.ones(1, 3), mask, 0.2)
    loss.backward()
    assert logits.grad[0, 1, 10] < 0
    assert (logits.grad[0, 2] == 0).all()
