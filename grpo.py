"""GRPO for language models: PPO without a critic. Each response is compared with its group.

    maximise over π:  J(π) = E[R(x, y)] - β · KL(π ‖ π_ref)    (prompts x, responses y ~ π)

Repeat: sample a group of responses to each prompt; the advantage of every token is its response's
score minus the group's mean; take a few gradient steps on the clipped probability ratio π/π_old,
with the KL to the reference as a loss term.

This maximises J only roughly: by default the tokens of short responses count more (see
compute_loss_weights), β acts like β·G/(G-1) (group_advantages), and the KL loss ignores a token's
effect on later ones (kl_penalty).

The default is GRPO without the division by the group's standard deviation, and with a KL estimator
whose expected gradient is that of the KL at each token (k3-iw). The losses as published:

  GRPO      --scale-rewards group --kl-estimator k3                         (arXiv:2402.03300)
  Dr. GRPO  --loss-type dr-grpo --kl-coef 0                                 (arXiv:2503.20783)
  DAPO      --loss-type dapo --scale-rewards group --kl-coef 0              (arXiv:2503.14476)
            --clip-coef-high 0.28
  GSPO      --loss-type gspo --scale-rewards group --kl-coef 0              (arXiv:2507.18071)
            --clip-coef 3e-4 --clip-coef-high 4e-4
  CISPO     --loss-type cispo --scale-rewards group --kl-coef 0             (arXiv:2506.13585)
            (the paper does not give its --clip-coef-high)

Left out: GRPO's process supervision and iterative training (new reference and reward model); the
dynamic sampling and the penalty for overlong responses of DAPO, which CISPO's paper also uses.

The task: given three digits, write two more and EOS so that all five sum to 20. A small GPT is
first trained on correct answers (SFT). A frozen copy of it is the reference; GRPO trains the
original. To use your own task or model, replace the sections "Task" and "Model".

    python grpo.py                        # held-out success 0.59 -> 0.98 (mean of 5 seeds), 30 s
    python grpo.py --loss-type dr-grpo    # or dapo, gspo, cispo; --help lists every flag
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26", "tyro>=0.9", "tensorboard>=2.16"]
# ///

import copy
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    seed: int = 1  # random seed (the train/held-out split of the prompts is fixed)
    device: Literal["cpu", "cuda"] = "cpu"  # this tiny model needs no GPU
    tensorboard: bool = True  # log curves to runs/ (view with: tensorboard --logdir runs)
    save_path: Path | None = None  # file for the final weights and the flags

    # Training
    sft_steps: int = 100  # SFT steps that train the reference; 0: random weights
    reward_model: Path | None = None  # maximise the score of a model saved by reward_model.py
    total_episodes: int = 112_640  # sampled responses, rounded down to whole rollouts
    batch_size: int = 512  # responses per rollout
    update_epochs: int = 2  # passes over each rollout
    num_minibatches: int = 4  # gradient steps per pass
    learning_rate: float = 7e-4  # peak learning rate; linear warmup over 10%, then linear decay
    max_grad_norm: float = 1.0  # maximum norm for gradient clipping
    temperature: float = 1.0  # divides all logits, of the policy and the reference

    # GRPO
    group_size: int = 4  # responses per prompt
    kl_coef: float = 0.05  # β: weight of KL(policy ‖ reference), in units of reward per nat
    loss_type: Literal["grpo", "dr-grpo", "dapo", "gspo", "cispo"] = "grpo"  # see grpo_loss
    scale_rewards: Literal["none", "group", "batch"] = "none"  # divide advantages by this std
    clip_coef: float = 0.2  # ε: clipping range of the probability ratio π/π_old
    clip_coef_high: float | None = None  # upper ε, the only one that cispo uses; default: clip_coef
    kl_estimator: Literal["k2", "k3", "k3-iw", "full"] = "k3-iw"  # of the KL in the loss


def is_writable(folder):
    return folder.is_dir() and os.access(folder, os.W_OK)


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_args(args):
    """Exit with an error if a flag's value makes no sense."""
    runs = Path("runs") if os.path.lexists("runs") else Path(".")
    rules = [
        (args.device == "cpu" or torch.cuda.is_available(), "--device cuda: no GPU is available"),
        (not args.tensorboard or is_writable(runs), "runs/ is not writable; use --no-tensorboard"),
        (0 <= args.seed < 2**63, f"--seed {args.seed} must be in [0, 2**63)"),
        (args.sft_steps >= 0, f"--sft-steps {args.sft_steps} must be 0 or more"),
        (args.batch_size >= 1, f"--batch-size {args.batch_size} must be at least 1"),
        (args.total_episodes >= args.batch_size, "--total-episodes must be at least --batch-size"),
        (args.update_epochs >= 1, f"--update-epochs {args.update_epochs} must be at least 1"),
        (
            args.num_minibatches >= 1 and args.batch_size % args.num_minibatches == 0,
            f"--num-minibatches {args.num_minibatches} must be at least 1 and divide --batch-size",
        ),
        (0 < args.learning_rate < 1, f"--learning-rate {args.learning_rate} must be in (0, 1)"),
        (0 < args.max_grad_norm < 1e6, f"--max-grad-norm {args.max_grad_norm} must be in (0, 1e6)"),
        (1e-6 < args.temperature < 1e6, f"--temperature {args.temperature} must be in (1e-6, 1e6)"),
        (args.group_size >= 2, f"--group-size {args.group_size} must be at least 2"),
        (args.batch_size % max(1, args.group_size) == 0, "--group-size must divide --batch-size"),
        (0 <= args.kl_coef < 1e6, f"--kl-coef {args.kl_coef} must be in [0, 1e6)"),
        (0 < args.clip_coef < 1e6, f"--clip-coef {args.clip_coef} must be in (0, 1e6)"),
    ]
    if args.save_path is not None:
        save_path = Path(os.path.realpath(args.save_path))
        is_file = save_path.is_file() or not os.path.lexists(args.save_path)  # an old or a new one
        valid = is_file and is_writable(save_path.parent)
        rules.append((valid, f"--save-path {args.save_path} must be a file in a writable folder"))
        new = args.reward_model is None or str(save_path) != os.path.realpath(args.reward_model)
        rules.append((new, "--save-path would overwrite --reward-model; choose another file"))
    if args.clip_coef_high is not None:
        valid = 0 < args.clip_coef_high < 1e6
        rules.append((valid, f"--clip-coef-high {args.clip_coef_high} must be in (0, 1e6)"))
    for valid, error in rules:
        if not valid:
            fail(error)


# ---------------------------------------------------------------------------- Task
# Tokens 0 to 9 are the digits.
EOS = 10
VOCAB = 11
TARGET = 20
RESPONSE_LENGTH = 3  # two digits and EOS


def make_prompts(device):
    """All 912 solvable prompts, in a fixed random order: 729 to train on, 183 held out.

    Returns training prompts (729, 3) and targets (729,), then the held-out ones. The target is the
    sum that the two digits of the response must have.
    """
    digits = torch.arange(10)
    prompts = torch.cartesian_prod(digits, digits, digits)
    targets = TARGET - prompts.sum(1)
    solvable = (targets >= 0) & (targets <= 18)
    prompts = prompts[solvable].to(device)
    targets = targets[solvable].to(device)
    count = len(prompts)
    order = random.Random(20).sample(range(count), count)
    train = order[: 4 * count // 5]
    test = order[4 * count // 5 :]
    return prompts[train], targets[train], prompts[test], targets[test]


def make_demonstrations(prompts, targets):
    """Every correct response to every prompt: prompts (N, 3) and responses (N, 3)."""
    digits = torch.arange(10, device=prompts.device)
    pairs = torch.cartesian_prod(digits, digits)
    row, pair = torch.where(targets[:, None] == pairs.sum(1))
    return prompts[row], F.pad(pairs[pair], (0, 1), value=EOS)


def reward(targets, responses):
    """1 if the response is two digits that sum to the target, then EOS; else 0. (B,)"""
    well_formed = (responses[:, :2] != EOS).all(1) & (responses[:, 2] == EOS)
    return (well_formed & (responses[:, :2].sum(1) == targets)).float()


# ---------------------------------------------------------------------------- Model
class Block(nn.Module):
    """Pre-LN transformer block, (B, T, D) to (B, T, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        nn.init.zeros_(self.proj.weight)  # at first, a block adds only its biases
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tokens (B, T) to hidden states (B, T, D); head maps these to logits (or to a score)."""

    def __init__(self, outputs=VOCAB, width=64, layers=2, heads=4, context=3 + RESPONSE_LENGTH):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.embed.weight, std=0.2)
        nn.init.normal_(self.position.weight, std=0.2)

    def forward(self, tokens):
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---------------------------------------------------------------------------- Reward model
class RewardModel(nn.Module):
    """Prompts (B, P) and responses (B, R) to scores (B,), learned by reward_model.py.

    The score is the mean of an ensemble of E members, minus uncertainty_coef times their population
    standard deviation: a lower confidence bound, like that of Coste et al. 2023 (arXiv:2310.02743),
    who subtract the variance. With a coefficient above 0, scores are slightly random, since they
    depend on a few responses sampled from the reference.
    """

    def __init__(self, ensemble_size, uncertainty_coef):
        super().__init__()
        self.members = nn.ModuleList([GPT(outputs=1) for _ in range(ensemble_size)])
        self.reference = GPT()  # forward samples from it to remove each prompt's constant
        self.uncertainty_coef = uncertainty_coef

    def member_scores(self, prompts, responses):
        return torch.stack([response_scores(gpt, prompts, responses) for gpt in self.members])

    def forward(self, prompts, responses):
        scores = self.member_scores(prompts, responses)  # (E, B)
        if self.uncertainty_coef == 0:
            return scores.mean(0)
        # A loss on preferences or demonstrations sees only differences between responses to one
        # prompt, so each member may add any constant per prompt. To keep it out of the deviation,
        # subtract each member's mean score of four responses of the reference to the same prompt.
        mean_scores = torch.zeros_like(scores)
        for _ in range(4):
            samples = generate(self.reference, prompts, 1.0)
            mean_scores += self.member_scores(prompts, samples) / 4
        deviation = (scores - mean_scores).std(0, correction=0)
        return scores.mean(0) - self.uncertainty_coef * deviation


def load_reward_model(path, device):
    """Load what reward_model.py saved. Exits with an error on any other file."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        reward_model = RewardModel(len(saved["members"]), float(saved["uncertainty_coef"]))
        reward_model.reference.load_state_dict(saved["reference"])
        for gpt, weights in zip(reward_model.members, saved["members"], strict=True):
            gpt.load_state_dict(weights)
        finite = all(weight.isfinite().all() for weight in reward_model.parameters())
        if not finite or len(reward_model.members) == 0:
            raise ValueError
        if not 0 <= reward_model.uncertainty_coef < 1e6:
            raise ValueError
    except Exception as error:  # a file can be wrong in any number of ways
        reason = f"missing, damaged, or not saved by reward_model.py ({type(error).__name__})"
        fail(f"--reward-model {path}: {reason}")
    return reward_model.to(device).requires_grad_(False)


# ---------------------------------------------------------------------------- Sampling
# Shapes: B responses, P prompt tokens, R response tokens, D hidden size, V vocabulary size.
@torch.no_grad()
def generate(policy, prompts, temperature):
    """Sample responses (B, R). Each ends at its first EOS and is padded with EOS."""
    tokens = prompts
    ended = torch.zeros(len(prompts), 1, dtype=torch.bool, device=prompts.device)
    for _ in range(RESPONSE_LENGTH):
        logits = policy.head(policy(tokens)[:, -1]) / temperature  # (B, V)
        token = torch.multinomial(logits.softmax(1), 1)  # (B, 1)
        token = torch.where(ended, EOS, token)
        ended = ended | (token == EOS)
        tokens = torch.cat([tokens, token], 1)
    return tokens[:, prompts.shape[1] :]


def get_scores(targets, responses):
    """Rewards as float32 scores (B,). Exits unless there is one finite number per response."""
    rewards = reward(targets, responses.clone())  # reward may change its copy
    try:
        scores = torch.as_tensor(rewards, dtype=torch.float32, device=responses.device).detach()
        if scores.shape != (len(responses),) or not scores.isfinite().all():
            raise ValueError(f"got shape {tuple(scores.shape)}, sum {scores.sum()}")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        fail(f"reward must return finite numbers of shape ({len(responses)},); {error}")
    return scores


def response_mask(responses):
    """True up to and including the first EOS: stopping is learned, padding is ignored. (B, R)"""
    is_eos = (responses == EOS).long()
    return (is_eos.cumsum(1) - is_eos) == 0  # no EOS before this token


def response_states(gpt, prompts, responses):
    """Hidden states that predict the response tokens: those one position before. (B, R, D)"""
    tokens = torch.cat([prompts, responses[:, :-1]], 1)
    return gpt(tokens)[:, prompts.shape[1] - 1 :]


def response_scores(gpt, prompts, responses):
    """Reward-model scores (B,): the model's output at the last token of each response."""
    outputs = gpt.head(gpt(torch.cat([prompts, responses], 1)))  # (B, P + R, 1)
    last = prompts.shape[1] + response_mask(responses).sum(1) - 1
    return outputs[torch.arange(len(last)), last].squeeze(1)


def token_logprobs(logits, responses):
    """Log-probabilities of the response tokens. logits: (B, R, V); returns (B, R)."""
    losses = F.cross_entropy(logits.flatten(0, 1), responses.flatten(), reduction="none")
    return -losses.view_as(responses)


def token_kl(logits, ref_logits):
    """KL(policy ‖ reference) at each token, in nats, summed over the vocabulary. (B, R)"""
    logprobs = logits.log_softmax(2)
    return (logprobs.exp() * (logprobs - ref_logits.log_softmax(2))).sum(2)


def masked_sum(x, mask):
    """Sum over the tokens of each response where mask is true: (B, R) to (B,)."""
    return torch.where(mask, x, 0.0).sum(1)


def masked_mean(x, mask):
    """Mean over all tokens where mask is true: (B, R) to a scalar."""
    return masked_sum(x, mask).sum() / mask.sum()


def sft(policy, prompts, responses, steps):
    """Supervised fine-tuning: maximise the likelihood of the demonstrations."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.7e-3)
    for _ in range(steps):
        rows = torch.randint(len(prompts), (256,), device=prompts.device)
        logits = policy.head(response_states(policy, prompts[rows], responses[rows]))
        logprobs = token_logprobs(logits, responses[rows])
        loss = -masked_sum(logprobs, response_mask(responses[rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(policy, reference, prompts, targets, temperature):
    """Success rate and KL(policy ‖ reference), in nats per response, of sampled responses.

    Samples 16 responses per prompt. Returns both means and their standard errors, which cover the
    sampling of responses but not the choice of prompts.
    """
    success = []
    kl = []
    for rows in torch.arange(len(prompts)).repeat(16).split(256):
        responses = generate(policy, prompts[rows], temperature)
        logits = policy.head(response_states(policy, prompts[rows], responses))
        ref_logits = reference.head(response_states(reference, prompts[rows], responses))
        kl_per_token = token_kl(logits / temperature, ref_logits / temperature)
        success.append(get_scores(targets[rows], responses))
        kl.append(masked_sum(kl_per_token, response_mask(responses)))
    success = torch.cat(success).view(-1, len(prompts))  # (16, number of prompts)
    kl = torch.cat(kl).view(-1, len(prompts))
    return {
        "success": success.mean().item(),
        "success_error": (success.var(0).mean() / success.numel()).sqrt().item(),
        "kl": kl.mean().item(),
        "kl_error": (kl.var(0).mean() / kl.numel()).sqrt().item(),
    }


# ---------------------------------------------------------------------------- GRPO
# G responses per prompt.
def group_advantages(scores, group_size, scale_rewards):
    """Score minus the mean score of the group. scores: (B,), groups adjacent; returns (B,).

    Then optionally divided by a population standard deviation of the scores:
    none   (arXiv:2503.20783): not divided. Each score is part of its own baseline, so at π = π_old
           the expected gradient of the reward is (G-1)/G of what it would be with the mean of the
           others, and β acts like β·G/(G-1). To undo this, multiply --kl-coef by (G-1)/G.
    group  (arXiv:2402.03300): of the group. For scores of 0 and 1 that is at most ½ and the KL is
           not divided, so β counts for less: for G = 4 it acts like 0.6·β. Prompts that are nearly
           always or nearly never solved weigh more: 7 % for G = 4, and more for larger groups. So
           training no longer aims at the maximum of J.
    batch  (arXiv:2508.08221): of the batch, the same for every prompt. It shrinks as the scores
           become equal: the advantages then grow, and β counts for less.
    """
    groups = scores.view(-1, group_size)
    # Subtract the group's lowest score first, so that equal scores give an advantage of exactly 0.
    # A rounding error (the mean of three 0.9 isn't 0.9) would be divided by a tiny deviation.
    groups = groups - groups.amin(1, keepdim=True)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (groups.std(1, correction=0, keepdim=True) + 1e-8)
    elif scale_rewards == "batch":
        advantages = advantages / (scores.std(correction=0) + 1e-8)
    return advantages.flatten()


def compute_loss_weights(mask, loss_type):
    """Loss weight of the tokens of each response (B,), from the mask (B, R) of a whole rollout.

    grpo, gspo:   mean over the tokens of each response, then over responses (arXiv:2402.03300,
                  eq. 3). Tokens of short responses count more. The tokens of a response have one
                  ratio with gspo, so this is arXiv:2507.18071, eq. 5.
    dr-grpo:      sum over tokens divided by the maximum length, R (arXiv:2503.20783).
    dapo, cispo:  mean over all tokens of the rollout (in arXiv:2503.14476, eq. 8, and
                  arXiv:2506.13585, eq. 4, of the group). All tokens count alike, as for dr-grpo.
    """
    lengths = mask.sum(1).float()
    if loss_type in ("grpo", "gspo"):
        divisor = lengths
    elif loss_type == "dr-grpo":
        divisor = torch.full_like(lengths, mask.shape[1])
    else:
        divisor = lengths.mean().expand_as(lengths)
    return 1 / divisor


def grpo_loss(
    logprobs, old_logprobs, advantages, mask, loss_weights, loss_type, clip_low, clip_high
):
    """Clipped surrogate objective, negated.

    logprobs, old_logprobs, mask: (B, R); advantages, loss_weights: (B,).
    grpo, dr-grpo, dapo: clip the ratio of each token, as PPO does. They differ only in
            loss_weights.
    gspo:   clips one ratio per response, the geometric mean of its token ratios (arXiv:2507.18071,
            eq. 7). It varies less, so the paper clips at 3e-4 below and 4e-4 above.
    cispo:  clips the ratio and takes it as a constant factor of log π, so no token loses its
            gradient (arXiv:2506.13585, eq. 5). As in the paper there is no lower bound.
    """
    logratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    token_ratio = logratio.exp()
    token_advantages = advantages[:, None].expand_as(logratio)
    ratio = token_ratio
    if loss_type == "gspo":
        mean_logratio = logratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        ratio = mean_logratio.exp().expand_as(logratio)
    if loss_type == "cispo":
        clipped = ratio.clamp(max=1 + clip_high)
        objective = clipped.detach() * token_advantages * torch.where(mask, logprobs, 0.0)
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        objective = torch.min(ratio * token_advantages, clipped * token_advantages)
    with torch.no_grad():
        metrics = {
            # KL(π_old ‖ π) by the k3 estimator, from the token ratios whatever the loss
            "approx_kl": masked_mean(token_ratio - 1 - logratio, mask),
            # share of tokens whose ratio (for gspo that of the response) is outside the range
            "clipfrac": masked_mean((ratio != clipped).float(), mask),
            "ratio": masked_mean(token_ratio, mask),  # 1, up to rounding, at a rollout's first step
        }
    return -(masked_sum(objective, mask) * loss_weights).mean(), metrics


def kl_penalty(logprobs, old_logprobs, ref_logprobs, mask, kl_estimator):
    """KL(policy ‖ reference) at each token, for the loss, from the sampled tokens. (B, R)

    Estimators by http://joschu.net/blog/kl-approx.html, with d = log π - log π_ref. After each: its
    expected gradient over the sampled token, given the tokens before it.
    k1     d: 0 at π = π_old. It does not hold the policy near π_ref, so it is not offered.
    k2     d²/2: that of KL(π ‖ π_ref), as long as π = π_old.
    k3     exp(-d) - 1 + d: that of KL(π_ref ‖ π), the other direction, as long as π = π_old.
    k3-iw  k3 · π/π_old, importance-weighted: that of KL(π ‖ π_ref), also after π has moved
           (DeepSeek-V3.2, arXiv:2512.02556). For each sample it is k2's gradient times π/π_old.
    full   token_kl, not this function: that of KL(π ‖ π_ref), without the noise of sampling the
           token.

    A per-token KL loss ignores a token's effect on later prefixes; charging k1 in the reward
    (ppo.py, reinforce.py) accounts for it.
    """
    d = torch.where(mask, logprobs - ref_logprobs, 0.0)
    if kl_estimator == "k2":
        return d**2 / 2
    k3 = torch.exp(-d) - 1 + d
    if kl_estimator == "k3":
        return k3
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    return ratio * k3


# ---------------------------------------------------------------------------- Training
def save(path, contents):
    """Write a file atomically: all of it or nothing. Raises OSError."""
    target = os.path.realpath(path)  # write through a link, do not replace it
    part = Path(f"{target}.{os.getpid()}.part")
    try:
        torch.save(contents, part)
    except (OSError, RuntimeError) as error:  # a full disk, for example
        part.unlink(missing_ok=True)
        raise OSError(f"--save-path {path} cannot be written ({error})") from None
    part.replace(target)  # if this fails, part stays, and the error names it


def main(args):
    check_args(args)
    torch.manual_seed(args.seed)
    device = args.device
    start_time = time.time()

    # Policy, reference, reward model.
    train_prompts, train_targets, test_prompts, test_targets = make_prompts(device)
    policy = GPT().to(device)
    if args.sft_steps > 0:
        sft(policy, *make_demonstrations(train_prompts, train_targets), args.sft_steps)
    reference = copy.deepcopy(policy).requires_grad_(False)
    parameters = [*policy.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    reward_model = None
    if args.reward_model is not None:
        reward_model = load_reward_model(args.reward_model, device)
    clip_coef_high = args.clip_coef
    if args.clip_coef_high is not None:
        clip_coef_high = args.clip_coef_high
    before = evaluate(policy, reference, test_prompts, test_targets, args.temperature)

    run_name = f"grpo__{args.seed}__{datetime.now():%Y-%m-%d-%H%M%S-%f}"
    print(f"{run_name}: {sum(p.numel() for p in parameters):,} parameters on {device}")
    writer = None
    if args.tensorboard:
        os.makedirs(f"runs/{run_name}")  # fails if the folder exists: no two runs share one
        writer = SummaryWriter(f"runs/{run_name}")
        lines = [f"|{flag}|{value}|" for flag, value in asdict(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *lines]))

    loop_start_time = time.time()
    num_groups = args.batch_size // args.group_size
    minibatch_size = args.batch_size // args.num_minibatches
    num_rollouts = args.total_episodes // args.batch_size
    warmup = max(1, num_rollouts // 10)
    recent_scores = []  # of the rollouts since the last progress line
    for rollout in range(1, num_rollouts + 1):
        # Linear warmup over the first 10% of training, then linear decay to 0.
        decay = (num_rollouts - rollout + 1) / (num_rollouts - warmup + 1)
        learning_rate = args.learning_rate * min(rollout / warmup, decay)
        optimizer.param_groups[0]["lr"] = learning_rate

        # 1. Rollout: sample a group of responses to each prompt and score them.
        prompt_rows = torch.randint(len(train_prompts), (num_groups,), device=device)
        prompt_rows = prompt_rows.repeat_interleave(args.group_size)  # (B,), groups adjacent
        prompts = train_prompts[prompt_rows]  # (B, P)
        responses = generate(policy, prompts, args.temperature)  # (B, R)
        mask = response_mask(responses)  # (B, R)
        true_scores = get_scores(train_targets[prompt_rows], responses)  # (B,)
        scores = true_scores  # unless there is a reward model
        with torch.no_grad():
            if reward_model is not None:
                scores = reward_model(prompts, responses)
            states = response_states(policy, prompts, responses)  # (B, R, D)
            old_logprobs = token_logprobs(policy.head(states) / args.temperature, responses)
            ref_states = response_states(reference, prompts, responses)
            ref_logprobs = token_logprobs(reference.head(ref_states) / args.temperature, responses)

        # 2. Advantages: how much better each response did than its group.
        advantages = group_advantages(scores, args.group_size, args.scale_rewards)  # (B,)
        loss_weights = compute_loss_weights(mask, args.loss_type)  # (B,)

        # 3. Update: several epochs of minibatch steps on the clipped objective. A minibatch may
        # split a group, as the advantages are already known.
        steps = []  # the metrics of each gradient step
        for _ in range(args.update_epochs):
            for rows in torch.randperm(args.batch_size, device=device).split(minibatch_size):
                states = response_states(policy, prompts[rows], responses[rows])
                logits = policy.head(states) / args.temperature
                logprobs = token_logprobs(logits, responses[rows])

                pg_loss, metrics = grpo_loss(
                    logprobs,
                    old_logprobs[rows],
                    advantages[rows],
                    mask[rows],
                    loss_weights[rows],
                    args.loss_type,
                    args.clip_coef,
                    clip_coef_high,
                )
                if args.kl_estimator == "full":
                    ref_logits = reference.head(ref_states[rows]) / args.temperature
                    penalty = token_kl(logits, ref_logits)  # (B, R)
                else:
                    penalty = kl_penalty(
                        logprobs,
                        old_logprobs[rows],
                        ref_logprobs[rows],
                        mask[rows],
                        args.kl_estimator,
                    )
                kl_loss = (masked_sum(penalty, mask[rows]) * loss_weights[rows]).mean()
                loss = pg_loss + args.kl_coef * kl_loss

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()

                with torch.no_grad():
                    entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2)  # (B, R)
                    entropy = masked_sum(entropy, mask[rows]).mean()
                metrics["grad_norm"] = grad_norm
                metrics["policy_loss"] = pg_loss.detach()
                metrics["kl_loss"] = kl_loss.detach()
                metrics["entropy"] = entropy
                steps.append(metrics)

        if not grad_norm.isfinite():
            fail(f"gradient not finite in rollout {rollout}; lower --learning-rate")

        # 4. Log.
        episodes = rollout * args.batch_size
        seconds = time.time() - loop_start_time
        seconds_left = seconds * (num_rollouts - rollout) / rollout
        score = scores.mean().item()
        kl = old_logprobs - ref_logprobs  # (B, R), an unbiased estimate of KL(π ‖ π_ref)
        mean_kl = masked_sum(kl, mask).mean().item()
        if writer:
            writer.add_scalar("charts/score", score, episodes)
            writer.add_scalar("charts/true_score", true_scores.mean(), episodes)
            writer.add_scalar("charts/kl", mean_kl, episodes)
            writer.add_scalar("charts/response_length", mask.sum(1).float().mean(), episodes)
            writer.add_scalar("charts/learning_rate", learning_rate, episodes)
            writer.add_scalar("charts/episodes_per_second", episodes / seconds, episodes)
            for name in metrics:
                mean = torch.stack([step[name] for step in steps]).mean()
                writer.add_scalar(f"losses/{name}", mean, episodes)
            writer.add_scalar("losses/ratio_first", steps[0]["ratio"], episodes)  # about 1
            # The share of groups whose scores are all equal: they have no policy gradient.
            equal = (advantages.view(-1, args.group_size) == 0).all(1)
            writer.add_scalar("charts/equal_groups", equal.float().mean(), episodes)
            writer.flush()  # so that a killed run keeps its curves
        recent_scores.append(score)
        if rollout % max(1, num_rollouts // 20) == 0:
            print(
                f"episode {episodes:6d}  score {sum(recent_scores) / len(recent_scores):.3f}  "
                f"KL {mean_kl:.3f}  {episodes / seconds:,.1f} episodes/s  {seconds_left:.0f} s left"
            )
            recent_scores = []

    # Evaluate on the held-out prompts, print, and save.
    after = evaluate(policy, reference, test_prompts, test_targets, args.temperature)
    print(
        f"held-out success {before['success']:.3f} -> {after['success']:.3f} "
        f"± {after['success_error']:.3f}  KL {after['kl']:.3f} ± {after['kl_error']:.3f}  "
        f"{time.time() - start_time:.1f} s"
    )
    if args.save_path is not None:
        flags = {flag: str(value) for flag, value in asdict(args).items()}
        weights = {"policy": policy.state_dict(), "reference": reference.state_dict()}
        save(args.save_path, {"args": flags, **weights})
    if writer:
        for name in after:
            writer.add_scalar(f"eval/{name}", before[name], 0)
            writer.add_scalar(f"eval/{name}", after[name], episodes)
        writer.close()
    return {"success_before": before["success"], **after}


if __name__ == "__main__":
    # Flush every line; print ? for characters that the output's encoding lacks.
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:  # a full disk, a closed pipe
        fail(error)
