"""REINFORCE for language models: the policy gradient, and baselines that reduce its noise.

    maximise over π:  J(π) = E[R(x, y)] - β · KL(π ‖ π_ref)    (prompts x, responses y ~ π)

Repeat: sample responses; raise the log-probability of each token in proportion to its
reward-to-go minus a baseline; take one gradient step.

REINFORCE: Williams 1992. Leave-one-out baseline (RLOO): Kool et al. 2019; for language
models Ahmadian et al. 2024 (arXiv:2402.14740). Reward-weighted regression: Peters & Schaal 2007.

The task: given three digits, write two more and EOS so that all five sum to 20. A small GPT is
first trained on correct answers (SFT). A frozen copy of it is the reference; REINFORCE trains the
original. To use your own task or model, replace the sections "Task" and "Model".

    python reinforce.py                    # held-out success 0.59 -> 0.98 (mean of 5 seeds), 30 s
    python reinforce.py --baseline none    # the same expected gradient with more noise
    python reinforce.py --reward process   # a reward per token; --help lists every flag
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

Baseline = Literal["none", "batch-mean", "running-mean", "leave-one-out", "value"]


@dataclass
class Args:
    seed: int = 1  # random seed (the train/held-out split of the prompts is fixed)
    device: Literal["cpu", "cuda"] = "cpu"  # this tiny model needs no GPU
    tensorboard: bool = True  # log curves to runs/ (view with: tensorboard --logdir runs)
    save_path: Path | None = None  # file for the final weights and the flags

    # Training
    sft_steps: int = 100  # SFT steps that train the reference; 0: random weights
    reward: Literal["outcome", "process"] = (
        "outcome"  # process: ½ for the first digit, ½ for the sum
    )
    total_episodes: int = 163_840  # sampled responses, rounded down to whole rollouts
    batch_size: int = 256  # responses per rollout
    group_size: int = 4  # responses per prompt
    learning_rate: float = 8e-4  # peak learning rate; linear warmup over 10%, then linear decay
    max_grad_norm: float = 1.0  # maximum norm for gradient clipping
    temperature: float = 1.0  # divides all logits, of the policy and the reference

    # REINFORCE
    kl_coef: float = 0.05  # β: weight of KL(policy ‖ reference), in units of reward per nat
    gamma: float = 1.0  # discount per token; usually 1, since the score is paid at the end
    baseline: Baseline = "leave-one-out"  # subtracted from the returns to reduce noise
    vf_coef: float = 0.1  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    objective: Literal["reinforce", "rwr"] = "reinforce"  # rwr: reward-weighted regression
    rwr_temperature: float = 0.5  # rwr: responses are weighted by exp(return / this)
    rwr_top_fraction: float = 1.0  # rwr: keep only the best fraction of a rollout


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
        (
            args.group_size >= 1 and args.batch_size % args.group_size == 0,
            f"--group-size {args.group_size} must be at least 1 and divide --batch-size",
        ),
        (0 < args.learning_rate < 1, f"--learning-rate {args.learning_rate} must be in (0, 1)"),
        (0 < args.max_grad_norm < 1e6, f"--max-grad-norm {args.max_grad_norm} must be in (0, 1e6)"),
        (1e-6 < args.temperature < 1e6, f"--temperature {args.temperature} must be in (1e-6, 1e6)"),
        (0 <= args.kl_coef < 1e6, f"--kl-coef {args.kl_coef} must be in [0, 1e6)"),
        (0 <= args.gamma <= 1, f"--gamma {args.gamma} must be between 0 and 1"),
        (0 <= args.vf_coef < 1e6, f"--vf-coef {args.vf_coef} must be in [0, 1e6)"),
        (0 <= args.ent_coef < 1e6, f"--ent-coef {args.ent_coef} must be in [0, 1e6)"),
        (
            1e-6 < args.rwr_temperature < 1e6,
            f"--rwr-temperature {args.rwr_temperature} must be in (1e-6, 1e6)",
        ),
        (0 < args.rwr_top_fraction <= 1, "--rwr-top-fraction must be in (0, 1]"),
    ]
    if args.save_path is not None:
        save_path = Path(os.path.realpath(args.save_path))
        is_file = save_path.is_file() or not os.path.lexists(args.save_path)  # an old or a new one
        valid = is_file and is_writable(save_path.parent)
        rules.append((valid, f"--save-path {args.save_path} must be a file in a writable folder"))
    # These baselines average over other responses, so there must be some.
    if args.baseline == "leave-one-out" and args.objective == "reinforce":
        rules.append((args.group_size >= 2, "--baseline leave-one-out needs --group-size >= 2"))
    if args.baseline == "batch-mean":
        rules.append((args.batch_size >= 2, "--baseline batch-mean needs --batch-size >= 2"))
    # Reject flags that would have no effect.
    if args.baseline != "value":
        rules.append((args.vf_coef == Args.vf_coef, "--vf-coef needs --baseline value"))
    if args.objective == "rwr":
        rules.append((args.baseline == Args.baseline, "--objective rwr uses no --baseline"))
    else:
        default = args.rwr_temperature == Args.rwr_temperature
        rules.append((default, "--rwr-temperature needs --objective rwr"))
        default = args.rwr_top_fraction == Args.rwr_top_fraction
        rules.append((default, "--rwr-top-fraction needs --objective rwr"))
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


def process_reward(targets, responses):
    """A reward per token (B, R): 1/2 for a possible first digit, and 1/2 for the sum at EOS.

    The first digit is possible if some second digit completes the sum.
    """
    first = responses[:, 0]
    second = targets - first  # the digit that would complete the sum
    possible = (first != EOS) & (second >= 0) & (second <= 9)
    rewards = torch.zeros(responses.shape, device=responses.device)
    rewards[:, 0] = 0.5 * possible
    rewards[:, 2] = 0.5 * reward(targets, responses)
    return rewards


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


# ---------------------------------------------------------------------------- REINFORCE
def token_rewards(scores, kl, mask, kl_coef):
    """Per-token rewards (B, R): -β·kl at every token, plus the score (B,) at the last one."""
    last = mask.sum(1, keepdim=True) - 1  # EOS, or the final token of a truncated response
    rewards = (-kl_coef * kl).scatter_add(1, last, scores[:, None])
    return torch.where(mask, rewards, 0.0)


def returns_to_go(rewards, mask, gamma):
    """Discounted sum of the rewards from each token on. (B, R) to (B, R), zero after EOS.

    A token is not credited with rewards paid before it. With γ < 1 the gradient of the discounted
    return would also have a factor γ^t at token t = 0, 1, ...; it is left out, as is usual.
    """
    returns = torch.zeros_like(rewards)
    next_return = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        next_return = torch.where(mask[:, t], rewards[:, t] + gamma * next_return, 0.0)
        returns[:, t] = next_return
    return returns


def leave_one_out_mean(returns, group_size):
    """For each response, the mean return of the others in its group. (B, 1) or (B, R)

    A response's own return is left out: with the mean of the whole group (G responses) and γ = 1
    the expected gradient would shrink to (G - 1) / G of what it should be. The mean of few others
    is noisy itself: with G = 2 the gradient can be noisier than without a baseline.
    """
    groups = returns.unflatten(0, (-1, group_size))
    others = groups.sum(1, keepdim=True) - groups
    return others.flatten(0, 1) / (group_size - 1)


def reinforce_loss(logprobs, advantages, mask):
    """Minus log-probability times advantage (Williams 1992). All inputs (B, R).

    Summed over tokens, averaged over responses: with unbiased advantages (γ = 1 and any of the
    baselines), its expected gradient is that of -J. A mean over the tokens of each response would
    instead give the tokens of short responses more weight.
    """
    objective = torch.where(mask, logprobs, 0.0) * advantages
    return -masked_sum(objective, mask).mean()


def rwr_weights(returns, temperature, top_fraction):
    """Weights for reward-weighted regression (Peters & Schaal 2007). (B,) to (B,)

    Proportional to exp(return / temperature) for the best fraction of the rollout's responses (and
    ties), 0 for the rest; they sum to 1. Easy prompts therefore have more weight than hard ones.
    With many responses, all kept, an update aims at π_new ∝ π · exp(return / temperature). Nothing
    changes once all responses to a prompt have the same return R - β·log(π/π_ref): with γ = 1 and
    β > 0, that is the maximum of J.
    """
    num_kept = math.ceil(top_fraction * len(returns))
    lowest = returns.topk(num_kept).values[-1]
    return torch.where(returns >= lowest, returns / temperature, -torch.inf).softmax(0)


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

    # Policy, reference, and for the value baseline a critic: a linear head on the policy's hidden
    # states. The value loss therefore trains the policy's layers, too.
    train_prompts, train_targets, test_prompts, test_targets = make_prompts(device)
    policy = GPT().to(device)
    if args.sft_steps > 0:
        sft(policy, *make_demonstrations(train_prompts, train_targets), args.sft_steps)
    reference = copy.deepcopy(policy).requires_grad_(False)
    parameters = [*policy.parameters()]
    if args.baseline == "value":
        critic = nn.Linear(policy.head.in_features, 1).to(device)
        nn.init.zeros_(critic.weight)  # at first every value is the same
        parameters.extend(critic.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    running_mean = 0.0  # of the returns
    before = evaluate(policy, reference, test_prompts, test_targets, args.temperature)

    run_name = f"reinforce__{args.seed}__{datetime.now():%Y-%m-%d-%H%M%S-%f}"
    print(f"{run_name}: {sum(p.numel() for p in parameters):,} parameters on {device}")
    writer = None
    if args.tensorboard:
        os.makedirs(f"runs/{run_name}")  # fails if the folder exists: no two runs share one
        writer = SummaryWriter(f"runs/{run_name}")
        lines = [f"|{flag}|{value}|" for flag, value in asdict(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *lines]))

    loop_start_time = time.time()
    num_groups = args.batch_size // args.group_size
    num_rollouts = args.total_episodes // args.batch_size
    warmup = max(1, num_rollouts // 10)
    recent_scores = []  # of the rollouts since the last progress line
    for rollout in range(1, num_rollouts + 1):
        # Linear warmup over the first 10% of training, then linear decay to 0.
        decay = (num_rollouts - rollout + 1) / (num_rollouts - warmup + 1)
        learning_rate = args.learning_rate * min(rollout / warmup, decay)
        optimizer.param_groups[0]["lr"] = learning_rate

        # 1. Rollout: sample a batch of responses, a group to each prompt, and score them.
        prompt_rows = torch.randint(len(train_prompts), (num_groups,), device=device)
        prompt_rows = prompt_rows.repeat_interleave(args.group_size)  # (B,)
        prompts = train_prompts[prompt_rows]  # (B, P)
        responses = generate(policy, prompts, args.temperature)  # (B, R)
        mask = response_mask(responses)  # (B, R)
        true_scores = get_scores(train_targets[prompt_rows], responses)  # (B,)
        scores = true_scores
        if args.reward == "process":
            rewards = process_reward(train_targets[prompt_rows], responses.clone())  # (B, R)
            token_scores = torch.as_tensor(rewards, dtype=torch.float32, device=device).detach()
            if token_scores.shape != responses.shape or not token_scores.isfinite().all():
                fail(f"process_reward must return finite rewards of shape {tuple(responses.shape)}")
            scores = masked_sum(token_scores, mask)
        # There is only one gradient step, so the update can reuse this forward pass.
        states = response_states(policy, prompts, responses)  # (B, R, D)
        logits = policy.head(states) / args.temperature
        logprobs = token_logprobs(logits, responses)
        with torch.no_grad():
            ref_states = response_states(reference, prompts, responses)
            ref_logprobs = token_logprobs(reference.head(ref_states) / args.temperature, responses)

        # 2. Advantages: reward-to-go minus a baseline. As long as the baseline does not depend on
        # this token or later ones, the expected gradient stays the same.
        kl = logprobs.detach() - ref_logprobs  # (B, R), an unbiased estimate of KL(π ‖ π_ref)
        if args.reward == "outcome":
            rewards = token_rewards(scores, kl, mask, args.kl_coef)
        else:
            rewards = torch.where(mask, token_scores - args.kl_coef * kl, 0.0)
        returns = returns_to_go(rewards, mask, args.gamma)
        compared = returns[:, :1]  # (B, 1): one baseline for all tokens of a response
        if args.reward == "process":
            compared = returns  # (B, R): one per position, since part of the reward is paid earlier
        if args.baseline == "none" or args.objective == "rwr":
            baseline = 0.0
        elif args.baseline == "batch-mean":  # of all other responses
            baseline = leave_one_out_mean(compared, args.batch_size)
        elif args.baseline == "running-mean":  # of the rollouts before this one
            baseline = running_mean
            running_mean = 0.9 * running_mean + 0.1 * compared.mean(0)
        elif args.baseline == "leave-one-out":  # of the other responses to the same prompt
            baseline = leave_one_out_mean(compared, args.group_size)
        elif args.baseline == "value":  # what the critic expects before this token
            values = critic(states).squeeze(2)  # (B, R)
            baseline = values.detach()
        advantages = torch.where(mask, returns - baseline, 0.0)

        # 3. Update: one gradient step.
        if args.objective == "reinforce":
            pg_loss = reinforce_loss(logprobs, advantages, mask)
        else:
            # Reward-weighted regression: SFT on the responses, of which better ones weigh more.
            weights = rwr_weights(returns[:, 0], args.rwr_temperature, args.rwr_top_fraction)
            pg_loss = -(weights * masked_sum(logprobs, mask)).sum()
        with torch.set_grad_enabled(args.ent_coef > 0):  # else it is only logged
            entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2)  # (B, R)
            entropy = masked_sum(entropy, mask).mean()
        loss = pg_loss - args.ent_coef * entropy
        metrics = {"policy_loss": pg_loss.detach(), "entropy": entropy.detach()}
        if args.baseline == "value":
            vf_loss = 0.5 * masked_sum((values - returns) ** 2, mask).mean()
            loss = loss + args.vf_coef * vf_loss
            metrics["value_loss"] = vf_loss.detach()

        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        metrics["grad_norm"] = grad_norm

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
                writer.add_scalar(f"losses/{name}", metrics[name], episodes)
            error_variance = advantages[mask].var(correction=0)
            variance = returns[mask].var(correction=0).clamp(min=1e-8)
            explained = 1 - error_variance / variance
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
