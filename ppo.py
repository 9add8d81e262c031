"""PPO for language models: raise a policy's reward without letting it drift from where it began.

    maximise over π:  J(π) = E[R(x, y)] - β · KL(π ‖ π_ref)

Sample responses, credit each token with an advantage, take some steps on the clipped ratio π/π_old,
repeat. PPO: Schulman et al. 2017 (arXiv:1707.06347). GAE: Schulman et al. 2016 (arXiv:1506.02438).
KL penalty with adaptive β: Ziegler et al. 2019 (arXiv:1909.08593).

The task: given three digits, write two more and EOS, so that all five sum to 20. A small GPT is
fitted to demonstrations, frozen as the reference, then tuned. All its responses can be enumerated,
so the evaluation is exact and knows the best attainable J. To adapt it, replace task and policy.

    python ppo.py                  # held-out success 0.59 -> 0.99 in 19 s on two cores
    python ppo.py --kl-coef 0.2    # stay closer to the reference; --help lists every flag
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
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    seed: int = 1  # seed of everything random but the split into training and held-out prompts
    device: Literal["cpu", "cuda"] = "cpu"  # for the toy's tiny tensors cpu is the faster one
    tensorboard: bool = True  # write curves and more to runs/, for tensorboard --logdir runs
    save_path: Path | None = None  # file for the final weights and arguments
    sft_steps: int = 100  # supervised steps that make the reference; 0 starts from scratch
    total_episodes: int = 92_160  # responses sampled in all
    batch_size: int = 256  # responses a rollout
    learning_rate: float = 3e-3  # of AdamW; rises over a tenth of the run, then falls to 0
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down to it
    temperature: float = 1.0  # divides the logits, in sampling and in every log-probability alike
    kl_coef: float = 0.05  # β, the price in reward of a nat of KL(policy ‖ reference) a response

    reward: Literal["exact", "sharp", "distance", "process"] = "exact"  # what is paid for
    reward_model: Path | None = None  # pay what this file of reward_model.py says, not --reward
    rm_uncertainty_coef: float = 0.0  # take off so many standard deviations between its models
    missing_eos_penalty: float = 0.0  # taken from the reward of a response that does not end
    update_epochs: int = 2  # passes over each rollout
    num_minibatches: int = 2  # gradient steps a pass
    gamma: float = 1.0  # discount a token; 1 is usual, as only the finished response counts
    gae_lambda: float = 0.6  # λ: 1 trusts sampled returns (no bias), 0 the critic (low variance)
    clip_coef: float = 0.2  # ε: no gain from moving the ratio π/π_old (or a value) further
    dual_clip: float | None = None  # c > 1: bound -c·A on the loss of a token with advantage A < 0
    normalize_advantages: bool = False  # whiten, which scales reward against any KL in the loss
    advantage_clip: float | None = None  # bound on advantages, after whitening
    whiten_rewards: bool = False  # divide rewards by their standard deviation, keep their mean
    target_kl: float | None = None  # end a rollout's updates at this KL(π_old ‖ π) a token
    ent_coef: float = 0.0  # bonus for a nat of entropy a response
    vf_coef: float = 0.1  # weight of the value loss
    separate_critic: bool = False  # give the critic a GPT of its own, not a head on the policy's
    kl_in: Literal["reward", "loss"] = "reward"  # where the KL is charged
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # k1 in the reward; k2 or k3 in the loss
    kl_target: float | None = None  # adapt β until KL is this many nats a response
    kl_horizon: int = 2_000  # episodes in which the adaptive β reacts


def check(args, flags, valid, why):
    """End the program, status 2, with one line if a value is neither None (off) nor valid."""
    for flag in flags.split():
        value = getattr(args, flag)
        if value is not None and not valid(value):
            print(f"error: --{flag.replace('_', '-')} {value}: {why}", file=sys.stderr)
            sys.exit(2)


def check_args(args):
    counts = "total_episodes batch_size update_epochs num_minibatches kl_horizon"
    check(args, counts, lambda v: v >= 1, "must be 1 or more")
    positive = "learning_rate max_grad_norm temperature clip_coef advantage_clip target_kl"
    check(args, positive + " kl_target", lambda v: 0 < v < 2**63, "must be above 0, and finite")
    amounts = "seed sft_steps kl_coef rm_uncertainty_coef vf_coef ent_coef missing_eos_penalty"
    check(args, amounts, lambda v: 0 <= v < 2**63, "must be 0 or more, and finite")
    check(args, "gamma gae_lambda", lambda v: 0 <= v <= 1, "must be between 0 and 1")
    check(args, "dual_clip", lambda v: 1 < v < 2**63, "must be above 1, and finite")
    size = args.batch_size
    check(args, "total_episodes", lambda v: v >= size, f"is less than one --batch-size {size}")
    check(args, "num_minibatches", lambda v: size % v == 0, f"must divide --batch-size {size}")
    check(args, "kl_target", lambda v: args.kl_coef > 0, "cannot adapt --kl-coef 0; start above 0")
    right = ["k1"] if args.kl_in == "reward" else ["k2", "k3"]
    why = f"has the wrong gradient in the {args.kl_in}; there, use {' or '.join(right)}"
    check(args, "kl_estimator", lambda v: v in right, why)
    learned = args.reward_model is not None
    why = "is not read with --reward-model"
    check(args, "reward", lambda v: v == Args.reward or not learned, why)
    check(args, "rm_uncertainty_coef", lambda v: v == 0 or learned, "needs a --reward-model FILE")
    check(args, "device", lambda v: v == "cpu" or torch.cuda.is_available(), "is not here; use cpu")
    runs = "runs" if os.path.lexists("runs") else "."
    usable = os.path.isdir(runs) and os.access(runs, os.W_OK)
    check(args, "tensorboard", lambda v: usable or not v, "cannot fill runs/; use --no-tensorboard")
    why = "cannot be written; name a file in a folder that exists"
    check(args, "save_path", lambda v: v.parent.is_dir() and not v.is_dir(), why)
    check(args, "save_path", lambda v: os.access(v.parent, os.W_OK), why)


# ------------------------------------------------------------------ The task: replace by your own
EOS, VOCAB, TARGET = 10, 11, 20  # the digits 0 to 9 are their own tokens
RESPONSE_LENGTH = 3  # two digits and EOS


def make_prompts():
    """The 912 prompts that two digits can complete, split alike whatever the seed: (N, 3) each."""
    prompts = torch.cartesian_prod(*[torch.arange(10)] * 3)
    prompts = prompts[(prompts.sum(1) <= TARGET) & (prompts.sum(1) >= TARGET - 18)]
    prompts = prompts[random.Random(TARGET).sample(range(912), 912)]
    return prompts[:729], prompts[729:]  # to train on, held out


def make_demonstrations(prompts):
    """Every right answer to every prompt: prompts (N, 3), responses (N, 3)."""
    pairs = torch.cartesian_prod(*[torch.arange(10, device=prompts.device)] * 2)
    row, pair = torch.where(prompts.sum(1)[:, None] + pairs.sum(1) == TARGET)
    return prompts[row], F.pad(pairs[pair], (0, 1), value=EOS)


def reward(prompts, responses, kind="exact"):
    """Scores (B,) of whole responses. Malformed ones, not two digits and EOS, score 0."""
    well_formed = (responses[:, :2] != EOS).all(1) & (responses[:, 2] == EOS)
    miss = (prompts.sum(1) + responses[:, :2].sum(1) - TARGET).abs()
    scores = {"exact": miss == 0, "sharp": (-miss / 2).exp(), "distance": (1 - miss / 10).relu()}
    return torch.where(well_formed, scores[kind], 0.0)


def process_reward(prompts, responses):
    """Rewards (B, R) of tokens: half for a first digit that can be completed, half for the sum."""
    rest = TARGET - prompts.sum(1) - responses[:, 0]
    solvable = (responses[:, 0] != EOS) & (rest >= 0) & (rest <= 9)
    return torch.stack([solvable / 2, torch.zeros_like(rest), reward(prompts, responses) / 2], 1)


# ------------------------------------------------------------------ The policy: a small GPT
class Block(nn.Module):
    """Pre-LN transformer block: (B, T, D) to (B, n, D), the last n of T; at first the identity."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.proj.weight), nn.init.zeros_(self.down.weight)

    def forward(self, x, n):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        past = torch.ones(n, x.shape[1], dtype=torch.bool, device=x.device).tril(x.shape[1] - n)
        mixed = F.scaled_dot_product_attention(q[:, :, -n:], k, v, attn_mask=past)  # (B, H, n, D/H)
        x = x[:, -n:] + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tokens (B, T) to hidden states (B, n, D) of the last n (all, if None), which self.head turns
    into logits (or into values)."""

    def __init__(self, outputs=VOCAB, width=64, layers=2, heads=4, context=6):
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)
        nn.init.normal_(self.embed.weight, std=0.2), nn.init.normal_(self.position.weight, std=0.2)

    def forward(self, tokens, n=None):
        length = tokens.shape[1]
        x = self.embed(tokens) + self.position.weight[:length]
        for block in self.blocks[:-1]:
            x = block(x, length)
        return self.norm(self.blocks[-1](x, n or length))


# ------------------------------------------------------------------ Rollout
def response_states(gpt, prompts, responses):
    """Hidden states (B, R, D) that choose the response tokens: those at positions P-1 to T-2."""
    return gpt(torch.cat([prompts, responses[:, :-1]], 1), responses.shape[1])


@torch.no_grad()
def generate_with_states(policy, prompts, temperature):
    """Sample responses (B, R). EOS ends one; as padding it fills the places behind.

    With them come the hidden states (B, R, D) that chose their tokens, which saves the pass over
    whole responses that response_states would take.
    """
    responses, states = prompts[:, :0], []  # (B, 0)
    for _ in range(RESPONSE_LENGTH):
        states.append(policy(torch.cat([prompts, responses], 1), 1))  # (B, 1, D)
        logits = policy.head(states[-1][:, 0]) / temperature  # (B, V)
        token = torch.multinomial(logits.softmax(1), 1)  # (B, 1)
        ended = (responses == EOS).any(1, keepdim=True)
        responses = torch.cat([responses, torch.where(ended, EOS, token)], 1)
    return responses, torch.cat(states, 1)


def response_mask(responses):
    """True up to and including the first EOS: stopping is learned too, padding is not. (B, R)"""
    return ((responses == EOS).cumsum(1) - (responses == EOS).long()) == 0


def token_logprobs(logits, responses):
    """Log-probabilities (B, R) of the tokens under logits (B, R, V)."""
    return -F.cross_entropy(logits.transpose(1, 2), responses, reduction="none")


def masked_sum(x, mask):
    """Sum of x (B, R) over the real tokens of each response. (B,)"""
    return torch.where(mask, x, 0.0).sum(1)


def masked_mean(x, mask):
    """Mean of x (B, R) over the real tokens of all responses. ()"""
    return masked_sum(x, mask).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """Scale x (B, R) to variance 1 (over N, not N-1) and mean 0 on real tokens; 0 after EOS."""
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    return torch.where(mask, (x - mean if shift_mean else x) / (std + 1e-8), 0.0)


def warm_start(policy, prompts, responses, steps):
    """Fit the policy, in place, to demonstrations by maximum likelihood."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.7e-3)
    for _ in range(steps):
        rows = torch.randint(len(prompts), (256,), device=prompts.device)
        logits = policy.head(response_states(policy, prompts[rows], responses[rows]))
        logprobs = token_logprobs(logits, responses[rows])
        loss = -masked_sum(logprobs, response_mask(responses[rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ------------------------------------------------------------------ The learned reward
def response_scores(gpt, prompts, responses):
    """Scores (B,): the output at the last real token, EOS or where the response was cut off.

    Attention looks back only, so nothing that follows EOS can change them.
    """
    states = gpt(torch.cat([prompts, responses], 1), responses.shape[1])  # (B, R, D)
    last = response_mask(responses).sum(1) - 1
    return gpt.head(states[torch.arange(len(last)), last]).squeeze(1)


def load_reward_model(path, uncertainty_coef, device):
    """What a file of reward_model.py pays, as a function of prompts (B, P) and responses (B, R):
    the mean of its models' scores less uncertainty_coef times their standard deviation. (B,)"""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)  # runs no code in it
        models = [GPT(outputs=1).to(device).requires_grad_(False) for _ in saved["models"]]
        for model, weights in zip(models, saved["models"], strict=True):
            model.load_state_dict(weights)
        finite = [x.isfinite().all() for model in models for x in model.parameters()]
        if saved["script"] != "reward_model.py" or not finite or not all(finite):
            raise ValueError
    except Exception as error:  # there is no end to what can be wrong with a file
        why = "is no file of reward_model.py, or a broken one"
        print(f"error: --reward-model {path}: {why} ({type(error).__name__})", file=sys.stderr)
        sys.exit(2)
    if uncertainty_coef > 0 and len(models) == 1:
        why = f"needs several models; {path} holds one (see reward_model.py --ensemble-size)"
        print(f"error: --rm-uncertainty-coef {uncertainty_coef}: {why}", file=sys.stderr)
        sys.exit(2)
    # The models are frozen and the sequences few, so each is scored once and then looked up.
    known = torch.full([VOCAB] * len(models[0].position.weight), torch.nan, device=device)

    @torch.no_grad()
    def score(prompts, responses):
        tokens = torch.cat([prompts, responses], 1)  # (B, T)
        new = tokens[known[tokens.unbind(1)].isnan()]
        for some in new.split(1024) if len(new) else ():
            pair = some[:, : prompts.shape[1]], some[:, prompts.shape[1] :]
            scores = torch.stack([response_scores(model, *pair) for model in models])
            uncertainty = scores.std(0, correction=0)
            known[some.unbind(1)] = scores.mean(0) - uncertainty_coef * uncertainty
        return known[tokens.unbind(1)]

    return score


# ------------------------------------------------------------------ PPO
def kl_estimate(logprobs, ref_logprobs, kind):
    """KL(policy ‖ reference) in nats at each token (B, R), from the sampled ones (joschu.net/blog).

    In value k1 and k3 are unbiased. In a loss the gradient counts, which is, for a token with its
    prefix fixed: E[∇k1] = 0, E[∇k2] = ∇KL(π ‖ π_ref), E[∇k3] = ∇KL(π_ref ‖ π), the other direction.
    No loss sees that a token decides which prefixes come next; k1 in the reward does, and is right.
    """
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]


def token_rewards(scores, kl, mask, kl_coef):
    """Rewards (B, R): scores (B,), paid at the last real token, or (B, R), less β times the KL."""
    if scores.dim() == 1:
        last = mask.sum(1, keepdim=True) - 1  # EOS, or where the response was cut off
        scores = torch.zeros_like(kl).scatter(1, last, scores[:, None])
    return torch.where(mask, scores - kl_coef * kl, 0.0)


def compute_gae(rewards, values, mask, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), responses of unequal length.

    rewards, values, mask: (B, R). Returns advantages and returns, (B, R), zero after EOS.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Nothing follows EOS, so there is nothing to bootstrap from: both carries are zero there.
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_coef, dual_clip=None):
    """Clipped objective (Schulman et al. 2017, eq. 7), negated; dual clip: arXiv:1912.09729, eq. 5.

    All (B, R). Summed over tokens, then averaged over responses: at the old policy its gradient is
    the policy gradient of J itself. A mean over tokens would favour tokens of short responses.
    """
    logratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    objective = torch.min(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        bounded = torch.max(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    with torch.no_grad():
        approx_kl = masked_mean(ratio - 1 - logratio, mask)  # k3 of old ‖ new: never negative
        clipfrac = masked_mean(((ratio - 1).abs() > clip_coef).float(), mask)
        metrics = {"approx_kl": approx_kl, "clipfrac": clipfrac, "ratio": masked_mean(ratio, mask)}
    return -masked_sum(objective, mask).mean(), metrics


def value_loss(values, old_values, returns, mask, clip_coef):
    """Half the squared error, values clipped around the old ones; summed and averaged likewise."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    loss = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return masked_sum(loss, mask).mean()


class AdaptiveKL:
    """β that steers the KL a response towards a target (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, episodes):
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon


# ------------------------------------------------------------------ Evaluation by enumeration
def all_responses():
    """Every response there is (Y = 1111, R): EOS; a digit and EOS; two digits and any token."""
    triples = torch.cartesian_prod(*[torch.arange(VOCAB)] * 3)
    return triples[(response_mask(triples) | (triples == EOS)).all(1)]


@torch.no_grad()
def response_distribution(policy, prompts, temperature):
    """Log-probabilities (N, Y) of all responses, float64, from one pass over all token pairs."""
    responses = all_responses().to(prompts.device)
    pairs = torch.cartesian_prod(*[torch.arange(VOCAB, device=prompts.device)] * 2)
    padded = F.pad(pairs, (0, 1)).repeat(len(prompts), 1)  # what stands third is not read
    states = response_states(policy, prompts.repeat_interleave(len(pairs), 0), padded)
    logprobs = (policy.head(states).double() / temperature).log_softmax(2)
    logprobs = logprobs.view(len(prompts), len(pairs), RESPONSE_LENGTH, VOCAB)
    prefix = responses[:, :1] * VOCAB + responses[:, 1:2]  # (Y, 1), row of its pair
    chosen = logprobs[:, prefix, torch.arange(RESPONSE_LENGTH), responses]  # (N, Y, R)
    return torch.where(response_mask(responses), chosen, 0.0).sum(2)


def evaluate(logprobs, ref_logprobs, prompts, score, kl_coef):
    """Exact means over all responses, from their log-probabilities (N, Y); KL, entropy in nats.

    No policy beats π* ∝ π_ref · exp(R/β), which attains J* = β · log E_ref[exp(R/β)]; optimality
    is (J - J_ref) / (J* - J_ref), 1 when nothing is left to gain.
    """
    responses = all_responses().to(prompts.device).repeat(len(prompts), 1)  # (N·Y, R)
    pairs = prompts.repeat_interleave(logprobs.shape[1], 0), responses
    totals = score(*pairs).double().view(*logprobs.shape, -1).sum(2)  # (N, Y)
    right = reward(*pairs).double().view_as(totals)
    best = totals.amax(1)
    if kl_coef > 0:
        best = kl_coef * torch.logsumexp(ref_logprobs + totals / kl_coef, 1)
    each = {"success": right, "score": totals, "kl": logprobs - ref_logprobs, "entropy": -logprobs}
    means = {name: (logprobs.exp() * x).sum(1).mean().item() for name, x in each.items()}
    ref_score = (ref_logprobs.exp() * totals).sum(1).mean().item()
    means["objective"] = means["score"] - kl_coef * means["kl"]
    means["optimality"] = (means["objective"] - ref_score) / (best.mean().item() - ref_score)
    return means


# ------------------------------------------------------------------ Training
def token_values(critic, states, prompts, responses):
    """Values (B, R) from before each token. critic: a head on the policy's states, or a GPT."""
    if isinstance(critic, GPT):
        return critic.head(response_states(critic, prompts, responses)).squeeze(2)
    return critic(states).squeeze(2)


def write(writer, group, metrics, step):
    """Add a point to the curve of each metric."""
    for name, value in metrics.items() if writer else ():
        writer.add_scalar(f"{group}/{name}", value, step)


def main(args: Args) -> dict[str, float]:
    """Train, and return the exact evaluation on the held-out prompts."""
    check_args(args)
    start, device = time.perf_counter(), args.device
    torch.manual_seed(args.seed)
    train_prompts, held_out = (prompts.to(device) for prompts in make_prompts())
    policy = GPT().to(device)
    warm_start(policy, *make_demonstrations(train_prompts), args.sft_steps)
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic = (GPT(outputs=1) if args.separate_critic else nn.Linear(64, 1)).to(device)
    nn.init.zeros_((critic.head if args.separate_critic else critic).weight)  # no noise at first
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), fused=True)
    adaptive_kl = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
    score = process_reward if args.reward == "process" else partial(reward, kind=args.reward)
    if args.reward_model is not None:
        score = load_reward_model(args.reward_model, args.rm_uncertainty_coef, device)
    ref_table = response_distribution(reference, held_out, args.temperature)  # (N, Y)
    before = evaluate(ref_table, ref_table, held_out, score, args.kl_coef)

    script, size = Path(__file__).stem, sum(p.numel() for p in parameters)
    print(f"{script}.py: {device}, seed {args.seed}, {size:,} parameters")
    run = f"runs/{script}__{args.seed}__{time.strftime('%Y-%m-%d-%H%M%S')}"
    writer = SummaryWriter(run) if args.tensorboard else None
    if writer:
        flags = "".join(f"|{flag}|{value}|\n" for flag, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}")
    passes = args.total_episodes // len(train_prompts) + 1
    turns = torch.cat([torch.randperm(len(train_prompts)) for _ in range(passes)])
    turns = turns.split(args.batch_size)  # each rollout's prompts, all in turn
    num_rollouts, begin = args.total_episodes // args.batch_size, time.perf_counter()
    for rollout in range(1, num_rollouts + 1):
        progress = (rollout - 0.5) / num_rollouts
        learning_rate = args.learning_rate * min(10 * progress, 1 - progress)
        optimizer.param_groups[0]["lr"] = learning_rate

        # Rollout: sample responses, score them, note what the models think of them.
        prompts = train_prompts[turns[rollout - 1]]  # (B, P)
        responses, states = generate_with_states(policy, prompts, args.temperature)
        mask, cut_off = response_mask(responses), (responses != EOS).all(1)  # (B, R), (B,)
        scores = score(prompts, responses)  # (B,), or (B, R) for a process reward
        with torch.no_grad():
            old_logprobs = token_logprobs(policy.head(states) / args.temperature, responses)
            old_values = token_values(critic, states, prompts, responses)  # (B, R)
            ref_logits = reference.head(response_states(reference, prompts, responses))
            ref_logprobs = token_logprobs(ref_logits / args.temperature, responses)

        # Advantages: what each token earned beyond what the critic expected.
        kl, kl_coef = kl_estimate(old_logprobs, ref_logprobs, "k1"), adaptive_kl.coef
        rewards = token_rewards(scores, kl, mask, kl_coef if args.kl_in == "reward" else 0.0)
        rewards[:, -1] -= args.missing_eos_penalty * cut_off  # these fill all R places
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = compute_gae(rewards, old_values, mask, args.gamma, args.gae_lambda)
        if args.normalize_advantages:
            advantages = whiten(advantages, mask)
        if args.advantage_clip is not None:
            advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)

        # Update: several passes over the rollout, held near the old policy by the clipped ratio.
        data = prompts, responses, mask, old_logprobs, ref_logprobs, old_values, advantages, returns
        epochs = torch.stack([torch.randperm(args.batch_size) for _ in range(args.update_epochs)])
        updates = []
        for rows in epochs.view(-1, args.batch_size // args.num_minibatches):
            x, y, real, old, ref, old_v, adv, ret = (tensor[rows] for tensor in data)
            states = response_states(policy, x, y)
            logits = policy.head(states) / args.temperature
            logprobs, values = token_logprobs(logits, y), token_values(critic, states, x, y)
            pg_loss, metrics = policy_loss(logprobs, old, adv, real, args.clip_coef, args.dual_clip)
            if updates and args.target_kl is not None and metrics["approx_kl"] > args.target_kl:
                break
            vf_loss = value_loss(values, old_v, ret, real, args.clip_coef)
            entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2)  # (B, R)
            entropy = masked_sum(entropy, real).mean()
            loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * entropy
            if args.kl_in == "loss":
                penalty = kl_estimate(logprobs, ref, args.kl_estimator)
                loss = loss + kl_coef * masked_sum(penalty, real).mean()
            optimizer.zero_grad()
            loss.backward()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            metrics |= {"policy_loss": pg_loss, "value_loss": vf_loss, "entropy": entropy}
            updates.append({name: value.detach() for name, value in metrics.items()})
        if not updates[-1]["grad_norm"].isfinite():
            sys.exit(f"error: gradient not finite in rollout {rollout}; lower --learning-rate")

        # Log the means over the rollout.
        kl, scores = masked_sum(kl, mask).mean(), scores.view(len(mask), -1).sum(1)
        adaptive_kl.update(kl.item(), args.batch_size)
        losses = {name: torch.stack([m[name] for m in updates]).mean() for name in updates[0]}
        losses["ratio_first"] = updates[0]["ratio"]  # not 1: rows or positions are mixed up
        losses["explained_variance"] = 1 - (returns - old_values)[mask].var() / returns[mask].var()
        charts = {"score": scores.mean(), "score_std": scores.std(), "kl": kl}
        charts |= {"response_length": mask.sum(1).float().mean(), "learning_rate": learning_rate}
        charts["kl_coef"] = kl_coef
        episodes, seconds = rollout * args.batch_size, time.perf_counter() - begin
        speed, left = episodes / seconds, seconds * (num_rollouts / rollout - 1)
        charts |= {"eos_rate": 1 - cut_off.float().mean(), "episodes_per_second": speed}
        gold = ""
        if args.reward_model is not None:  # the true reward beside the learned: is it hacked?
            charts["gold_score"] = reward(prompts, responses).mean()
            gold = f"  gold {charts['gold_score']:.3f}"
        write(writer, "losses", losses, episodes)
        write(writer, "charts", charts, episodes)
        if rollout % max(1, num_rollouts // 20) == 0 or rollout == num_rollouts:
            line = f"{rollout / num_rollouts:4.0%}  score {scores.mean():.3f}{gold}  KL {kl:.3f}"
            print(f"{line}  {speed:6,.0f} episodes/s  {left:3.0f} s left")

    table = response_distribution(policy, held_out, args.temperature)
    after = evaluate(table, ref_table, held_out, score, adaptive_kl.coef)
    if writer:
        write(writer, "eval", before | {"gold_score": before["success"]}, 0)
        write(writer, "eval", after | {"gold_score": after["success"]}, episodes)
        # π(d4, d5) for 8 held-out prompts, above before, below after: d4 down, d5 right.
        maps = torch.stack([ref_table, table])[:, :8, (all_responses() != EOS).sum(1) == 2].exp()
        maps = maps.view(-1, 1, 10, 10).sqrt().repeat_interleave(9, 2).repeat_interleave(9, 3)
        writer.add_images("policy", F.pad(maps, (2, 2, 2, 2), value=0.5), episodes)
        writer.close()
    if args.save_path is not None:  # whole or not at all
        part = args.save_path.with_name(args.save_path.name + ".part")
        flags = {flag: str(value) for flag, value in asdict(args).items()}
        torch.save({"script": f"{script}.py", "args": flags, "policy": policy.state_dict()}, part)
        os.replace(part, args.save_path)
    seconds = time.perf_counter() - start
    success = f"held-out success {before['success']:.3f} -> {after['success']:.3f}"
    print(f"{success}  KL {after['kl']:.3f}  optimality {after['optimality']:.3f}  {seconds:.1f} s")
    return {"success_before": before["success"], **after, "seconds": seconds}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
