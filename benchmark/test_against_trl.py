"""Our losses are TRL's: its own code, on its own trainers, on random batches of unequal lengths.

Skipped without TRL (pip install -r benchmark/requirements.txt). Where the two differ by convention,
the factor stands in the test, and in its name or docstring; benchmark/README.md has a list.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent))

import against_trl as bench
import exact
import torch

import dpo
import grpo
import ppo
import reinforce
import reward_model

EOS = grpo.EOS
LONGEST = 7
PAIRS = [[[4, 3, 3]], [[2, 8, EOS]], [[1, EOS]]]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def random_gpt(outputs=grpo.VOCAB):
    """A GPT in which nothing is zero, or one."""
    gpt = grpo.GPT(outputs)
    for weights in gpt.parameters():
        torch.nn.init.normal_(weights, mean=0.05, std=0.25)
    return gpt


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """TRL's trainer of a method, as the benchmark makes it; and our GPT of the same weights."""
    torch.manual_seed(0)
    gpt = random_gpt()
    made = {}

    def get(method):
        if method not in made:
            job = bench.Job(method, 1, 64, num_rollouts=8)
            if method not in ("grpo", "rloo"):
                job.pairs = PAIRS
            trainer = bench.trl_trainer(job, gpt, str(tmp_path_factory.mktemp(method)))
            trainer.current_gradient_accumulation_steps = 1
            trainer.model.train()
            made[method] = trainer
        return made[method], gpt

    return get


def float64(*shape, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


def ragged(rows, longest=LONGEST):
    """A mask (rows, longest) of lengths 1 to longest, the extremes among them."""
    lengths = torch.randint(1, longest + 1, (rows,))
    lengths[:2] = torch.tensor([1, longest])
    return torch.arange(longest) < lengths[:, None]


def gradient(loss, of):
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


def assert_same(ours, theirs, of, tolerance=1e-10):
    """Value and gradient agree."""
    assert abs(ours - theirs) < tolerance and abs(ours) > 1e-4
    torch.testing.assert_close(gradient(ours, of), gradient(theirs, of), rtol=0, atol=tolerance)
    assert gradient(ours, of).abs().max() > 1e-4


# ---------------------------------------------------------------- GRPO
THEIR_NAMES = {"dr-grpo": "dr_grpo", "gspo": "grpo"}


def their_grpo(trainer, new, old, ref, advantages, mask, loss_type, monkeypatch, **settings):
    """TRL's loss of given log-probabilities; garbage where there are no tokens."""
    new = torch.where(mask, new, 3 * new.detach())
    old = torch.where(mask, old, 3 * old)
    ref = torch.where(mask, ref, 3 * ref)

    def logprobs(*_, **__):
        return new, torch.zeros_like(new), None

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", logprobs)
    tokens = settings.pop("tokens", mask.sum())
    defaults = {
        "loss_type": THEIR_NAMES.get(loss_type, loss_type),
        "max_completion_length": LONGEST,
        "importance_sampling_level": "sequence" if loss_type == "gspo" else "token",
        "steps_per_generation": 1,
    }
    for name, value in {**defaults, **settings}.items():
        on_args = name in ("delta", "use_bias_correction_kl", "steps_per_generation")
        monkeypatch.setattr(trainer.args if on_args else trainer, name, value)
    rows = len(mask)
    inputs = {
        "prompt_ids": torch.zeros(rows, 3, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
        "completion_ids": torch.zeros(rows, mask.shape[1], dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": tokens,
    }
    return trainer._compute_loss(trainer.model, inputs)


def grpo_batch(rows=12):
    mask = ragged(rows)
    old = float64(rows, LONGEST) - 2
    new = old + float64(rows, LONGEST, scale=0.4)
    ref = old + float64(rows, LONGEST, scale=0.4)
    return new.requires_grad_(), old, ref, float64(rows), mask


@pytest.mark.parametrize("loss_type", ["grpo", "dr-grpo", "dapo", "gspo", "cispo"])
def test_grpo_policy_loss(trainers, monkeypatch, loss_type):
    """TRL's epsilon_high of cispo is the largest weight itself; ours is what it exceeds 1 by."""
    trainer, _ = trainers("grpo")
    new, old, ref, advantages, mask = grpo_batch()
    settings = {"epsilon_low": 0.1, "epsilon_high": 0.28, "beta": 0.0}
    if loss_type == "cispo":
        settings["epsilon_high"] = 1.28
    batch = new, old, ref, advantages, mask, loss_type, monkeypatch
    theirs = their_grpo(trainer, *batch, **settings)
    weights = grpo.compute_loss_weights(mask, loss_type).double()
    ours, metrics = grpo.grpo_loss(new, old, advantages, mask, weights, loss_type, 0.1, 0.28)
    assert metrics["clipfrac"] > 0.1
    assert_same(ours, theirs, new, 1e-7)  # the weights are float32


def kl_loss(new, old, ref, mask, weights, estimator):
    """The KL in the loss of grpo.py."""
    penalty = grpo.kl_penalty(new, old, ref, mask, estimator)
    return (grpo.masked_sum(penalty, mask) * weights).mean()


@pytest.mark.parametrize("loss_type", ["grpo", "dr-grpo", "dapo", "cispo"])
@pytest.mark.parametrize("estimator", ["k3", "k3-iw"])
def test_grpo_kl(trainers, monkeypatch, loss_type, estimator):
    """k3-iw is TRL's use_bias_correction_kl, its default. TRL has neither k2 nor full."""
    trainer, _ = trainers("grpo")
    new, old, ref, advantages, mask = grpo_batch()
    settings = {"beta": 0.7, "use_bias_correction_kl": estimator == "k3-iw"}
    theirs = their_grpo(
        trainer, new, old, ref, 0 * advantages, mask, loss_type, monkeypatch, **settings
    )
    weights = grpo.compute_loss_weights(mask, loss_type).double()
    ours = kl_loss(new, old, ref, mask, weights, estimator)
    assert_same(0.7 * ours, theirs, new, 1e-7)


def test_gspo_kl_has_the_ratio_of_the_response_in_trl(trainers, monkeypatch):
    """Ours keeps the ratio of the token, which makes the gradient unbiased."""
    trainer, _ = trainers("grpo")
    new, old, ref, advantages, mask = grpo_batch()
    settings = {"beta": 0.7, "use_bias_correction_kl": True}
    theirs = their_grpo(
        trainer, new, old, ref, 0 * advantages, mask, "gspo", monkeypatch, **settings
    )
    weights = grpo.compute_loss_weights(mask, "gspo").double()
    ratio = (grpo.masked_sum(new - old, mask) / mask.sum(1)).exp()
    k3 = grpo.kl_penalty(new, old, ref, mask, "k3")
    assert_same(0.7 * (ratio * grpo.masked_sum(k3, mask) * weights).mean(), theirs, new, 1e-7)
    assert abs(0.7 * kl_loss(new, old, ref, mask, weights, "k3-iw") - theirs) > 1e-3


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_grpo_token_mean_is_of_the_whole_rollout_not_of_the_minibatch(
    trainers, monkeypatch, loss_type
):
    trainer, _ = trainers("grpo")
    new, old, ref, advantages, mask = grpo_batch()
    weights = grpo.compute_loss_weights(mask, loss_type).double()
    rows = torch.tensor([1, 4, 6, 7, 9, 11])
    settings = {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2}
    if loss_type == "cispo":
        settings["epsilon_high"] = 1.2
    settings["steps_per_generation"] = 2
    settings["tokens"] = mask.sum()
    minibatch = [x[rows] for x in (new, old, ref, advantages, mask)]
    theirs = their_grpo(trainer, *minibatch, loss_type, monkeypatch, **settings)
    ours, _ = grpo.grpo_loss(
        new[rows],
        old[rows],
        advantages[rows],
        mask[rows],
        weights[rows],
        loss_type,
        0.2,
        0.2,
    )
    assert_same(ours, theirs, new, 1e-7)


def test_two_sided_clip_is_ppos_dual_clip(trainers, monkeypatch):
    """TRL's delta. Its dr_grpo divides by the longest length, we (in ppo.py) only by responses."""
    trainer, _ = trainers("grpo")
    new, old, ref, advantages, mask = grpo_batch(40)
    settings = {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": 1.5}
    theirs = their_grpo(
        trainer, new, old, ref, advantages, mask, "dr-grpo", monkeypatch, **settings
    )
    token_advantages = advantages[:, None].expand_as(mask)
    ours = ppo.dual_clip_loss(new, old, token_advantages, mask, 0.2, 1.5)
    assert_same(ours, LONGEST * theirs, new)
    without, _ = ppo.policy_loss(new, old, token_advantages, mask, 0.2)
    assert abs(ours - without) > 1e-3


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_but_for_the_standard_deviation(trainers, monkeypatch, scale):
    """TRL's is over N-1 and has 1e-4 added, ours over N and has 1e-8 added."""
    trainer, _ = trainers("grpo")
    size = 8
    rows = trainer._train_batch_size
    scores = torch.rand(rows, dtype=torch.float64)
    scores[:size] = 1.0
    scores[size : 2 * size] = (torch.arange(size) < 3).double()
    monkeypatch.setattr(trainer, "scale_rewards", scale)
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: scores[:, None])
    monkeypatch.setattr(trainer, "reward_weights", torch.ones(1, dtype=torch.float64))
    theirs = trainer._generate_and_score_completions(rollout_rows(rows))["advantages"]
    ours = grpo.group_advantages(scores, size, scale)
    if scale != "none":
        groups = scores.view(-1, size) if scale == "group" else scores[None]
        ours = ours.view(len(groups), -1)
        ours = ours * (groups.std(1, correction=0, keepdim=True) + 1e-8)
        ours = ours / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(ours.flatten(), theirs, rtol=0, atol=1e-6)
    assert theirs.abs().max() > 0.1


def rollout_rows(rows):
    """What TRL's sampler hands over: each prompt as often as it is answered."""
    prompts, targets, _, _ = grpo.make_prompts("cpu")
    data = []
    for prompt, target in zip(prompts[: rows // 8].tolist(), targets.tolist(), strict=False):
        data += [{"prompt": " ".join(map(str, prompt)), "target": target}] * 8
    return data


def test_grpo_from_sampling_to_gradient(trainers, monkeypatch):
    """A rollout sampled by TRL: masks, log-probabilities, loss and gradient of the weights."""
    trainer, reference = trainers("grpo")
    rows = trainer._train_batch_size
    scores = torch.rand(rows)
    monkeypatch.setattr(trainer, "scale_rewards", "none")
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: scores[:, None])
    inputs = trainer._generate_and_score_completions(rollout_rows(rows))
    x = inputs["prompt_ids"]
    y = inputs["completion_ids"]
    mask = grpo.response_mask(y)
    assert torch.equal(mask, inputs["completion_mask"].bool())
    assert len(set(mask.sum(1).tolist())) > 1
    before = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    with torch.no_grad():
        for weights in trainer.model.parameters():
            weights += 0.02 * torch.randn_like(weights)
    policy = bench.from_gpt2(trainer.model)

    def logprobs(gpt):
        return grpo.token_logprobs(gpt.head(grpo.response_states(gpt, x, y)), y)

    with torch.no_grad():
        old = logprobs(policy) + 0.1 * torch.randn(mask.shape)
        ref = logprobs(reference)
    real = torch.where(mask, ref - inputs["ref_per_token_logps"], 0.0)
    assert real.abs().max() < 1e-4
    trainer.model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, {**inputs, "old_per_token_logps": old})
    theirs.backward()
    new = logprobs(policy)
    advantages = grpo.group_advantages(scores, 8, "none")
    weights = grpo.compute_loss_weights(mask, "grpo")
    ours, _ = grpo.grpo_loss(new, old, advantages, mask, weights, "grpo", 0.2, 0.2)
    ours = ours + grpo.Args.kl_coef * kl_loss(new, old, ref, mask, weights, "k3-iw")
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    got = trainer.model.transformer.h[0].attn.c_attn.weight.grad.T
    torch.testing.assert_close(policy.blocks[0].qkv.weight.grad, got, rtol=1e-4, atol=1e-6)
    assert got.abs().max() > 1e-4
    trainer.model.load_state_dict(before)


# ---------------------------------------------------------------- RLOO
def test_rloo(trainers, monkeypatch):
    """Equal gradients but for the KL: TRL charges every token for the KL of the whole response, we
    only for the KL from there on. What was paid before has expectation 0."""
    trainer, _ = trainers("rloo")
    rows = trainer._train_batch_size
    beta = 0.3
    scores = torch.rand(rows, dtype=torch.float64)
    old = float64(rows, 3) - 2
    ref = float64(rows, 3) - 2
    found = iter([(old, None, None), (ref, None, None)])
    monkeypatch.setattr(trainer, "beta", beta)
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: scores[:, None])
    monkeypatch.setattr(trainer, "reward_weights", torch.ones(1, dtype=torch.float64))
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: next(found))
    responses = reinforce.generate(random_gpt(), torch.zeros(rows, 3, dtype=torch.long), 1.0)
    mask = reinforce.response_mask(responses)
    lists = [y[real].tolist() for y, real in zip(responses, mask, strict=True)]
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *_: lists)
    inputs = trainer._generate_and_score_completions(rollout_rows(rows))

    rewards = reinforce.token_rewards(scores, old - ref, mask, beta)
    returns = reinforce.returns_to_go(rewards, mask, 1.0)
    totals = returns[:, 0]
    baseline = reinforce.leave_one_out_mean(totals[:, None], 8).squeeze(1)
    torch.testing.assert_close(inputs["advantages"], totals - baseline, rtol=0, atol=1e-10)

    new = old.clone().requires_grad_()
    found = iter([(new, torch.zeros_like(new), None)])
    theirs = trainer._compute_loss(trainer.model, inputs)
    whole = (totals - baseline)[:, None].expand_as(mask)
    ours = reinforce.reinforce_loss(new, whole, mask)
    torch.testing.assert_close(gradient(ours, new), gradient(theirs, new), rtol=0, atol=1e-10)
    assert abs(theirs + whole[:, 0].mean()) < 1e-10  # its value: the ratio is 1, so minus the mean

    paid_before = torch.where(mask, returns - totals[:, None], 0.0)
    ours = reinforce.reinforce_loss(new, returns - baseline[:, None], mask)
    ours = ours - reinforce.reinforce_loss(new, paid_before, mask)
    torch.testing.assert_close(gradient(ours, new), gradient(theirs, new), rtol=0, atol=1e-10)


# ---------------------------------------------------------------- DPO
def their_dpo(trainer, new, ref, mask, loss_type, monkeypatch, **settings):
    """TRL's loss of log-probabilities (2B, R) of chosen and rejected; prompts have 3 tokens."""
    rows = len(mask)
    mask = torch.cat([torch.zeros(rows, 3, dtype=torch.long), mask.long()], 1)

    def model(logprobs):
        def forward(input_ids, labels, **_):
            assert torch.equal(labels[:, 3:] != -100, mask[:, 3:].bool())
            scored = torch.cat(
                [torch.zeros(rows, 2), torch.where(mask[:, 3:] > 0, logprobs, 0.0)], 1
            )
            none = torch.zeros(rows, scored.shape[1])
            return SimpleNamespace(
                log_probs=scored, entropy=none, mean_logits=none, is_top1=none.bool()
            )

        return forward

    defaults = {
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "precompute_ref_logps": False,
        "ref_model": model(ref),
    }
    for name, value in {**defaults, **settings}.items():
        monkeypatch.setattr(trainer, name, value, raising=False)
    inputs = {"input_ids": torch.zeros(mask.shape, dtype=torch.long), "completion_mask": mask}
    inputs["attention_mask"] = torch.ones_like(mask)
    return trainer._compute_loss(model(new), inputs, False)


def dpo_batch(rows=12):
    mask = torch.cat([ragged(rows), ragged(rows).flip(0)])
    new = float64(2 * rows, LONGEST) - 2
    ref = float64(2 * rows, LONGEST) - 2
    return new.requires_grad_(), ref, mask


def our_dpo(new, ref, mask, beta, loss_type, label_smoothing=0.0, length_normalize=False):
    logratios = dpo.masked_sum(new - ref, mask)  # (2B,)
    if length_normalize:
        logratios = logratios / mask.sum(1)
    chosen, rejected = logratios.chunk(2)
    ties = torch.zeros(len(chosen), dtype=torch.bool)
    loss, _ = dpo.dpo_loss(chosen, rejected, ties, beta, loss_type, label_smoothing)
    return loss


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust"])
def test_dpo(trainers, monkeypatch, loss_type):
    trainer, _ = trainers("dpo")
    new, ref, mask = dpo_batch()
    settings = {"beta": 0.3, "label_smoothing": 0.15 if loss_type == "robust" else 0.0}
    theirs = their_dpo(trainer, new, ref, mask, loss_type, monkeypatch, **settings)
    ours = our_dpo(new, ref, mask, 0.3, loss_type, settings["label_smoothing"])
    assert_same(ours, theirs, new)


def test_ipo_is_of_means_over_tokens_in_trl(trainers, monkeypatch):
    """So it is our --length-normalize. By default ours sums, as the paper writes π(y|x)."""
    trainer, _ = trainers("dpo")
    new, ref, mask = dpo_batch()
    theirs = their_dpo(trainer, new, ref, mask, "ipo", monkeypatch, beta=0.3)
    assert_same(our_dpo(new, ref, mask, 0.3, "ipo", length_normalize=True), theirs, new)
    assert abs(our_dpo(new, ref, mask, 0.3, "ipo") - theirs) > 0.1
    mask[:] = True  # all of one length: the mean is the sum over LONGEST, which β can undo
    theirs = their_dpo(trainer, new, ref, mask, "ipo", monkeypatch, beta=0.3 * LONGEST)
    assert_same(our_dpo(new, ref, mask, 0.3, "ipo") / LONGEST**2, theirs, new)


def test_length_normalized_sigmoid_is_trls_sigmoid_norm(trainers, monkeypatch):
    trainer, _ = trainers("dpo")
    new, ref, mask = dpo_batch()
    theirs = their_dpo(trainer, new, ref, mask, "sigmoid_norm", monkeypatch, beta=0.3)
    assert_same(our_dpo(new, ref, mask, 0.3, "sigmoid", length_normalize=True), theirs, new)


def test_smoothed_sigmoid_is_silently_not_smoothed_in_trl(trainers, monkeypatch):
    """Its aot, which sorts the margins of a batch, is the smoothed sigmoid of one pair."""
    trainer, _ = trainers("dpo")
    new, ref, mask = dpo_batch()
    settings = {"beta": 0.3, "label_smoothing": 0.15}
    theirs = their_dpo(trainer, new, ref, mask, "sigmoid", monkeypatch, **settings)
    assert abs(our_dpo(new, ref, mask, 0.3, "sigmoid", 0.0) - theirs) < 1e-10
    assert abs(our_dpo(new, ref, mask, 0.3, "sigmoid", 0.15) - theirs) > 1e-2
    rows = len(mask) // 2
    losses = []
    for i in range(rows):
        pair = [x[[i, rows + i]] for x in (new, ref, mask)]
        losses.append(their_dpo(trainer, *pair, "aot", monkeypatch, **settings))
    assert_same(our_dpo(new, ref, mask, 0.3, "sigmoid", 0.15), sum(losses) / rows, new)


def test_dpo_from_tokens_to_loss(trainers, monkeypatch):
    """Its collator, padding and models, on pairs of unequal length."""
    trainer, reference = trainers("dpo")
    policy = random_gpt()
    before = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(bench.to_gpt2(policy).state_dict())
    prompts = grpo.make_prompts("cpu")[0][:16]
    chosen = reinforce.generate(reference, prompts, 1.0)
    rejected = reinforce.generate(reference, prompts, 1.0)
    lengths = [grpo.response_mask(y).sum(1).tolist() for y in (chosen, rejected)]
    assert lengths[0] != lengths[1]
    examples = []
    for x, w, y in zip(
        prompts.tolist(),
        bench.without_padding(chosen.tolist()),
        bench.without_padding(rejected.tolist()),
        strict=True,
    ):
        examples.append({"prompt_ids": x, "chosen_ids": w, "rejected_ids": y})
    batch = trainer.data_collator(examples)
    monkeypatch.setattr(trainer, "precompute_ref_logps", False)
    monkeypatch.setattr(trainer, "ref_model", with_head(bench.to_gpt2(reference)))
    theirs = trainer._compute_loss(trainer.model, batch, False)
    new = dpo.pair_logprobs(policy, prompts, chosen, rejected, False)
    ref = dpo.pair_logprobs(reference, prompts, chosen, rejected, False)
    ties = torch.zeros(16, dtype=torch.bool)
    beta = dpo.Args.beta
    ours, _ = dpo.dpo_loss(new[0] - ref[0], new[1] - ref[1], ties, beta, "sigmoid", 0.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    trainer.model.load_state_dict(before)


def with_head(model):
    """A model as TRL's trainers change it."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    return model


# ---------------------------------------------------------------- Reward model
def test_reward_loss(trainers):
    trainer, _ = trainers("reward")
    scores = float64(12, 3).requires_grad_()
    different = torch.rand(12, 3, 3) < 0.8
    first_wins = torch.rand(12, 3, 3) < 0.5
    judged = different.triu(1)
    wins = (judged & first_wins) | (judged & ~first_wins).mT
    rows, chosen, rejected = wins.nonzero(as_tuple=True)
    pairs = torch.cat([scores[rows, chosen], scores[rows, rejected]])

    def model(**_):
        return SimpleNamespace(logits=pairs[:, None])

    theirs = trainer.compute_loss(model, {"attention_mask": torch.ones(len(pairs), 6)})
    ours, _ = reward_model.preference_loss(scores, wins.double())
    assert_same(ours, theirs, scores)


def test_reward_is_read_at_eos_if_padding_is_another_token(trainers):
    trainer, _ = trainers("reward")
    gpt = bench.from_gpt2(trainer.model)
    prompts = grpo.make_prompts("cpu")[0][:16]
    policy = random_gpt()
    policy.head.bias.data[EOS] = 2.0  # so that lengths differ
    y = reinforce.generate(policy, prompts, 1.0)
    mask = grpo.response_mask(y)
    assert len(set(mask.sum(1).tolist())) > 1
    texts = []
    for prompt, response in zip(prompts.tolist(), bench.without_padding(y.tolist()), strict=True):
        texts.append(prompt + response)
    batch = trainer.data_collator([{"chosen_ids": x, "rejected_ids": x} for x in texts])
    with torch.no_grad():
        theirs = trainer.model(**batch).logits.flatten()[:16]
        ours = reward_model.response_scores(gpt, prompts, y)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        batch["input_ids"][batch["input_ids"] == EOS + 1] = EOS
        trainer.model.config.pad_token_id = EOS  # as is often done
        wrong = trainer.model(**batch).logits.flatten()[:16]
        trainer.model.config.pad_token_id = EOS + 1
    ended = (y == EOS).any(1)
    assert ended.any() and ((ours - wrong).abs() > 1e-4)[ended].all()


# ---------------------------------------------------------------- The benchmark itself
def test_gpt2_of_our_weights_has_our_logits():
    gpt = random_gpt()
    model = bench.to_gpt2(gpt).eval()
    tokens = torch.randint(grpo.VOCAB, (64, 6))
    with torch.no_grad():
        ours, back = (x.head(x(tokens)) for x in (gpt, bench.from_gpt2(model)))
        theirs = model(tokens).logits
    assert gpt.head.bias.abs().max() > 0.1 and theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(back, theirs, rtol=0, atol=1e-4)


def test_rewards_are_the_tasks():
    targets = grpo.make_prompts("cpu")[1]
    responses = exact.all_responses()
    unpadded = bench.without_padding(responses.tolist())
    for target in targets[:20]:
        ours = grpo.reward(target.expand(len(responses)), responses).tolist()
        assert bench.correct_answers(unpadded, [target.item()] * len(unpadded)) == ours


def test_pairs_file_is_read_back(tmp_path):
    pairs = bench.sample_pairs(random_gpt(), 100, 0.5, seed=3)
    assert 50 < len(pairs[0]) <= 100
    bench.write_pairs(pairs, tmp_path / "pairs.jsonl")
    _, _, test_prompts, _ = dpo.make_prompts("cpu")
    columns = dpo.read_preferences(tmp_path / "pairs.jsonl", test_prompts)
    assert tuple(column.tolist() for column in columns[:3]) == pairs
    assert not columns[3].any()


def test_pairs_are_those_that_were_compared():
    args = reward_model.Args(num_samples=4)
    prompts, responses, wins = bench.sample_comparisons(random_gpt(), 100, args, seed=3)
    pairs = bench.judged_pairs(prompts, responses, wins)
    expected = []
    for row, i, j in wins.nonzero().tolist():
        expected.append((prompts[row], responses[row, i], responses[row, j]))
    assert 400 < len(pairs[0]) == len(expected)
    for got, wanted in zip(zip(*pairs, strict=True), expected, strict=True):
        assert list(got) == [tokens.tolist() for tokens in wanted]


def test_the_clock_leaves_out_what_is_looked_at():
    weights = torch.zeros(1, requires_grad=True)
    weights.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weights], 0.1)
    with bench.Clock(lambda steps: time.sleep(0.05)) as clock:
        for _ in range(4):
            optimizer.step()
    optimizer.step()
    assert len(clock.times) == 4 and clock.times[-1] - clock.times[0] < 0.05


def test_speed_is_of_all_rollouts_but_the_first():
    job = bench.Job("grpo", 1, bench.BATCH_SIZE // 4, num_rollouts=3)
    clock = bench.Clock()
    # 4 s to sample, then 1 s per step
    clock.times = [10.0, 11, 12, 13, 17, 18, 19, 20, 24, 25, 26, 27]
    assert clock.units_per_second(job) == pytest.approx(2 * bench.BATCH_SIZE / 14)
    job = bench.Job("dpo", 1, 2, pairs=([0] * 10, [0] * 10, [0] * 10), epochs=2)
    clock.times = [float(t) for t in range(10)]
    assert clock.units_per_second(job) == pytest.approx(2.0)
