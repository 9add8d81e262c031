"""PPO for language models: maximise a reward while staying close to a reference policy.

    maximise over π:  J(π) = E[R(x, y)] - β · KL(π ‖ π_ref)    (prompts x, responses y ~ π)

Repeat: sample responses; score them and compute per-token advantages with a critic (GAE); take a
few gradient steps on the clipped probability ratio π/π_old.

PPO: Schulman et al. 2017 (arXiv:1707.06347). GAE: Schulman et al. 2016 (arXiv:1506.02438).
KL penalty for language models: Ziegler et al. 2019 (arXiv:1909.08593).

The task: given three digits, write two more and EOS so that all five sum to 20. A small GPT is
first trained on correct answers (SFT). A frozen copy of it is the reference; PPO trains the
original. To use your own task or model, replace the sections "Task" and "Model".

    python ppo.py                  # held-out success 0.59 -> 0.99 (mean of 5 seeds), 30 s
    python ppo.py --kl-coef 0.2    # stay closer to the reference; --help lists every flag
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26", "tyro>=0.9", "tensorboard>=2.16"]
# ///

import copy
import math
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
    total_episodes: int = 122_880  # sampled responses, rounded down to whole rollouts
    batch_size: int = 256  # responses per rollout
    update_epochs: int = 2  # passes over each rollout
    num_minibatches: int = 2  # gradient steps per pass
    learning_rate: float = 7e-4  # peak learning rate; linear warmup over 10%, then linear decay
    max_grad_norm: float = 1.0  # maximum norm for gradient clipping
    temperature: float = 1.0  # divides all logits, of the policy and the reference

    # PPO
    kl_coef: float = 0.05  # β: weight of KL(policy ‖ reference), in units of reward per nat
    gamma: float = 1.0  # discount per token; usually 1, since the score is paid at the end
    gae_lambda: float = 0.95  # GAE λ: 0 = one-step TD, 1 = Monte Carlo (for long responses)
    clip_coef: float = 0.2  # ε: clipping range of the probability ratio π/π_old
    dual_clip: float | None = None  # also bound the loss at dual_clip · |A| when A < 0; e.g. 3
    value_clip: float = 0.2  # clipping range of value updates, in units of reward
    vf_coef: float = 0.1  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    normalize_advantages: bool = False  # whiten advantages over each rollout
    advantage_clip: float | None = None  # clip advantages to ± this, after any whitening
    target_kl: float | None = None  # end the epochs if the last approx_kl, per token, exceeds this


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
        (0 <= args.kl_coef < 1e6, f"--kl-coef {args.kl_coef} must be in [0, 1e6)"),
        (0 <= args.gamma <= 1, f"--gamma {args.gamma} must be between 0 and 1"),
        (0 <= args.gae_lambda <= 1, f"--gae-lambda {args.gae_lambda} must be between 0 and 1"),
        (0 < args.clip_coef < 1e6, f"--clip-coef {args.clip_coef} must be in (0, 1e6)"),
        (0 < args.value_clip < 1e6, f"--value-clip {args.value_clip} must be in (0, 1e6)"),
        (0 <= args.vf_coef < 1e6, f"--vf-coef {args.vf_coef} must be in [0, 1e6)"),
        (0 <= args.ent_coef < 1e6, f"--ent-coef {args.ent_coef} must be in [0, 1e6)"),
    ]
    if args.save_path is not None:
        save_path = Path(os.path.realpath(args.save_path))
        is_file = save_path.is_file() or not os.path.lexists(args.save_path)  # an old or a new one
        valid = is_file and is_writable(save_path.parent)
        rules.append((valid, f"--save-path {args.save_path} must be a file in a writable folder"))
        new = args.reward_model is None or str(save_path) != os.path.realpath(args.reward_model)
        rules.append((new, "--save-path would overwrite --reward-model; choose another file"))
    if args.dual_clip is not None:
        valid = 1 < args.dual_clip < 1e6
        rules.append((valid, f"--dual-clip {args.dual_clip} must be in (1, 1e6)"))
    if args.advantage_clip is not None:
        valid = 0 < args.advantage_clip < 1e6
        rules.append((valid, f"--advantage-clip {args.advantage_clip} must be in (0, 1e6)"))
    if args.target_kl is not None:
        rules.append(
            (0 < args.target_kl < 1e6, f"--target-kl {args.target_kl} must be in (0, 1e6)")
        )
        rules.append((args.update_epochs >= 2, "--target-kl has no effect with --update-epochs 1"))
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


def whiten(x, mask):
    """Give x (B, R) mean 0 and population variance 1 where mask is true; 0 elsewhere."""
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    return torch.where(mask, (x - mean) / (std + 1e-8), 0.0)


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


# ---------------------------------------------------------------------------- PPO
def token_rewards(scores, kl, mask, kl_coef):
    """Per-token rewards (B, R): -β·kl at every token, plus the score (B,) at the last one."""
    last = mask.sum(1, keepdim=True) - 1  # EOS, or the final token of a truncated response
    rewards = (-kl_coef * kl).scatter_add(1, last, scores[:, None])
    return torch.where(mask, rewards, 0.0)


def compute_gae(rewards, values, mask, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, values, mask: (B, R). Returns advantages and λ-returns, both (B, R), zero after EOS.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Padding contributes nothing: the value and advantage carried back from it are zero.
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_coef):
    """Clipped surrogate objective (Schulman et al. 2017, eq. 7), negated. All inputs (B, R).

    Summed over tokens, averaged over responses. At π = π_old its expected gradient is that of -J if
    the advantages are unbiased: γ = 1; λ = 1 or an exact critic; neither whitened nor clipped. A
    mean over the tokens of each response would give the tokens of short responses more weight.
    """
    logratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    objective = torch.min(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        metrics = {
            # KL(π_old ‖ π) by the k3 estimator, http://joschu.net/blog/kl-approx.html
            "approx_kl": masked_mean(ratio - 1 - logratio, mask),
            "clipfrac": masked_mean((ratio != clipped).float(), mask),  # share outside 1 ± ε
            "ratio": masked_mean(ratio, mask),  # 1, up to rounding, at a rollout's first step
        }
    return -masked_sum(objective, mask).mean(), metrics


def dual_clip_loss(logprobs, old_logprobs, advantages, mask, clip_coef, dual_clip):
    """policy_loss, bounded by dual_clip · |A| for tokens with A < 0 (arXiv:1912.09729, eq. 5).

    The ratio of a token with A < 0 is clipped from below only, so its loss has no bound: a token
    that has become far more likely since it was sampled could dominate the batch. Here its ratio is
    bounded by dual_clip, which bounds the loss.
    """
    bound = old_logprobs + math.log(dual_clip)
    bounded = torch.where(advantages < 0, logprobs.minimum(bound), logprobs)
    loss, _ = policy_loss(bounded, old_logprobs, advantages, mask, clip_coef)
    return loss


def value_loss(values, old_values, returns, mask, value_clip):
    """Half the squared error of the values, or of the values clipped to within value_clip of the
    old ones, whichever is larger. Summed over tokens, averaged over responses.
    """
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error = torch.where(mask, values - returns, 0.0)
    clipped_error = torch.where(mask, clipped - returns, 0.0)
    return 0.5 * masked_sum(torch.max(error**2, clipped_error**2), mask).mean()


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

    # Policy, reference, reward model, and the critic: a linear head on the policy's hidden states.
    # The value loss therefore trains the policy's layers, too.
    train_prompts, train_targets, test_prompts, test_targets = make_prompts(device)
    policy = GPT().to(device)
    if args.sft_steps > 0:
        sft(policy, *make_demonstrations(train_prompts, train_targets), args.sft_steps)
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic = nn.Linear(policy.head.in_features, 1).to(device)
    nn.init.zeros_(critic.weight)  # at first every value is the same
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    reward_model = None
    if args.reward_model is not None:
        reward_model = load_reward_model(args.reward_model, device)
    before = evaluate(policy, reference, test_prompts, test_targets, args.temperature)

    run_name = f"ppo__{args.seed}__{datetime.now():%Y-%m-%d-%H%M%S-%f}"
    print(f"{run_name}: {sum(p.numel() for p in parameters):,} parameters on {device}")
    writer = None
    if args.tensorboard:
        os.makedirs(f"runs/{run_name}")  # fails if the folder exists: no two runs share one
        writer = SummaryWriter(f"runs/{run_name}")
        lines = [f"|{flag}|{value}|" for flag, value in asdict(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *lines]))

    loop_start_time = time.time()
    minibatch_size = args.batch_size // args.num_minibatches
    num_rollouts = args.total_episodes // args.batch_size
    warmup = max(1, num_rollouts // 10)
    recent_scores = []  # of the rollouts since the last progress line
    for rollout in range(1, num_rollouts + 1):
        # Linear warmup over the first 10% of training, then linear decay to 0.
        decay = (num_rollouts - rollout + 1) / (num_rollouts - warmup + 1)
        learning_rate = args.learning_rate * min(rollout / warmup, decay)
        optimizer.param_groups[0]["lr"] = learning_rate

        # 1. Rollout: sample a batch of responses and score them.
        prompt_rows = torch.randint(len(train_prompts), (args.batch_size,), device=device)
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
            old_values = critic(states).squeeze(2)  # (B, R)
            ref_states = response_states(reference, prompts, responses)
            ref_logprobs = token_logprobs(reference.head(ref_states) / args.temperature, responses)

        # 2. Advantages: how much better each token did than the critic expected.
        kl = old_logprobs - ref_logprobs  # (B, R), an unbiased estimate of KL(π ‖ π_ref)
        rewards = token_rewards(scores, kl, mask, args.kl_coef)
        advantages, returns = compute_gae(rewards, old_values, mask, args.gamma, args.gae_lambda)
        if args.normalize_advantages:
            advantages = whiten(advantages, mask)
        if args.advantage_clip is not None:
            advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)

        # 3. Update: several epochs of minibatch steps on the clipped objective.
        steps = []  # the metrics of each gradient step
        for _ in range(args.update_epochs):
            for rows in torch.randperm(args.batch_size, device=device).split(minibatch_size):
                states = response_states(policy, prompts[rows], responses[rows])
                logits = policy.head(states) / args.temperature
                logprobs = token_logprobs(logits, responses[rows])
                values = critic(states).squeeze(2)

                pg_loss, metrics = policy_loss(
                    logprobs, old_logprobs[rows], advantages[rows], mask[rows], args.clip_coef
                )
                if args.dual_clip is not None:
                    pg_loss = dual_clip_loss(
                        logprobs,
                        old_logprobs[rows],
                        advantages[rows],
                        mask[rows],
                        args.clip_coef,
                        args.dual_clip,
                    )
                vf_loss = value_loss(
                    values, old_values[rows], returns[rows], mask[rows], args.value_clip
                )
                with torch.set_grad_enabled(args.ent_coef > 0):  # else it is only logged
                    entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2)  # (B, R)
                    entropy = masked_sum(entropy, mask[rows]).mean()
                loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * entropy

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()

                metrics["grad_norm"] = grad_norm
                metrics["policy_loss"] = pg_loss.detach()
                metrics["value_loss"] = vf_loss.detach()
                metrics["entropy"] = entropy.detach()
                steps.append(metrics)
            if args.target_kl is not None and metrics["approx_kl"] > args.target_kl:
                break

        if not grad_norm.isfinite():
            fail(f"gradient not finite in rollout {rollout}; lower --learning-rate")

        # 4. Log.
        episodes = rollout * args.batch_size
        seconds = time.time() - loop_start_time
        seconds_left = seconds * (num_rollouts - rollout) / rollout
        score = scores.mean().item()
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
            error_variance = (returns - old_values)[mask].var(correction=0)
            variance = returns[mask].var(correction=0).clamp(min=1e-8)
            explained = 1 - error_variance / variance  # biased if λ < 1: returns contain values
            writer.add_scalar("losses/explained_variance", explained, episodes)
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
