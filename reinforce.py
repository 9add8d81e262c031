"""REINFORCE for language models: the policy gradient, and the baselines that make it usable.

    maximise over π:  J(π) = E[R(x, y)] - β · KL(π ‖ π_ref)

Sample responses, raise each token's log-probability in proportion to what was earned from there on,
beyond a baseline; one gradient step, then sample anew. REINFORCE: Williams 1992. The others' mean
as baseline (RLOO): Kool et al. 2019, for language models Ahmadian et al. 2024 (arXiv:2402.14740).
Reward-weighted regression: Peters & Schaal 2007.

The task: given three digits, write two more and EOS, so that all five sum to 20. A small GPT is
fitted to demonstrations, frozen as the reference, then tuned. All its responses can be enumerated,
so the evaluation is exact and knows the best attainable J. To adapt it, replace task and policy.

    python reinforce.py                    # held-out success 0.59 -> 0.98 in 17 s on two cores
    python reinforce.py --baseline none    # the same gradient with more noise; see --help
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
    total_episodes: int = 122_880  # responses sampled in all
    batch_size: int = 256  # responses a rollout
    learning_rate: float = 1.8e-3  # of AdamW; rises over a tenth of the run, then falls to 0
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down to it
    temperature: float = 1.0  # divides the logits, in sampling and in every log-probability alike
    kl_coef: float = 0.05  # β, the price in reward of a nat of KL(policy ‖ reference) a response

    reward: Literal["exact", "sharp", "distance"] = "exact"  # what is paid for
    reward_model: Path | None = None  # pay what this file of reward_model.py says, not --reward
    rm_uncertainty_coef: float = 0.0  # take off so many standard deviations between its models
    group_size: int = 4  # responses sampled for each prompt of a rollout
    baseline: Literal["none", "batch-mean", "running-mean", "rloo", "value"] = "rloo"  # see below
    gamma: float = 1.0  # discount a token; 1 is usual, as only the finished response counts
    normalize_advantages: bool = False  # whiten, which scales reward against any KL in the loss
    ent_coef: float = 0.0  # bonus for a nat of entropy a response
    vf_coef: float = 0.1  # weight of the value loss, with --baseline value
    objective: Literal["reinforce", "rwr"] = "reinforce"  # rwr: reward-weighted regression
    rwr_beta: float = 0.5  # rwr: responses weigh exp(return / this); small follows only the best
    rwr_top_fraction: float = 1.0  # rwr: imitate only this share of the rollout, the best


def check(args, flags, valid, why):
    """End the program, status 2, with one line if a value is neither None (off) nor valid."""
    for flag in flags.split():
        value = getattr(args, flag)
        if value is not None and not valid(value):
            print(f"error: --{flag.replace('_', '-')} {value}: {why}", file=sys.stderr)
            sys.exit(2)


def check_args(args):
    counts = "total_episodes batch_size group_size"
    check(args, counts, lambda v: v >= 1, "must be 1 or more")
    positive = "learning_rate max_grad_norm temperature rwr_beta rwr_top_fraction"
    check(args, positive, lambda v: 0 < v < 2**63, "must be above 0, and finite")
    amounts = "seed sft_steps kl_coef rm_uncertainty_coef vf_coef ent_coef"
    check(args, amounts, lambda v: 0 <= v < 2**63, "must be 0 or more, and finite")
    check(args, "gamma rwr_top_fraction", lambda v: 0 <= v <= 1, "must be between 0 and 1")
    size = args.batch_size
    check(args, "total_episodes", lambda v: v >= size, f"is less than one --batch-size {size}")
    check(args, "group_size", lambda v: size % v == 0, f"must divide --batch-size {size}")
    others = {"rloo": args.group_size, "batch-mean": args.batch_size}.get(args.baseline, 2)
    check(args, "baseline", lambda v: others > 1, "needs 2 responses or more to compare")
    rwr = args.objective == "rwr"
    ignored = "baseline normalize_advantages" if rwr else "rwr_beta rwr_top_fraction"
    ignored += "" if args.baseline == "value" else " vf_coef"
    why = f"is not read with --objective {args.objective} --baseline {args.baseline}"
    for flag in ignored.split():
        check(args, flag, getattr(Args, flag).__eq__, why)
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
def generate(policy, prompts, temperature):
    """Sample responses (B, R). EOS ends one; as padding it fills the places behind."""
    responses = prompts[:, :0]  # (B, 0)
    for _ in range(RESPONSE_LENGTH):
        states = policy(torch.cat([prompts, responses], 1), 1)  # (B, 1, D)
        logits = policy.head(states[:, 0]) / temperature  # (B, V)
        token = torch.multinomial(logits.softmax(1), 1)  # (B, 1)
        ended = (responses == EOS).any(1, keepdim=True)
        responses = torch.cat([responses, torch.where(ended, EOS, token)], 1)
    return responses


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


# ------------------------------------------------------------------ REINFORCE
def token_rewards(scores, kl, mask, kl_coef):
    """Rewards (B, R): scores (B,), paid at the last real token, or (B, R), less β times the KL."""
    if scores.dim() == 1:
        last = mask.sum(1, keepdim=True) - 1  # EOS, or where the response was cut off
        scores = torch.zeros_like(kl).scatter(1, last, scores[:, None])
    return torch.where(mask, scores - kl_coef * kl, 0.0)


def returns_to_go(rewards, mask, gamma):
    """Discounted sums (B, R) of the rewards from each token on: a token cannot earn what was paid
    before it. With γ < 1 we leave out, as is usual, the factor γ^t on the t-th token's gradient."""
    returns, after = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])  # (B, R), (B,)
    for t in reversed(range(rewards.shape[1])):
        returns[:, t] = after = torch.where(mask[:, t], rewards[:, t] + gamma * after, 0.0)
    return returns


def mean_of_others(totals, group_size):
    """Mean (B,) of the whole returns of the other members of each response's group; 0 if none.

    Others are independent of the response, so as baseline they leave the expected gradient alone,
    at every token. A mean that includes the response itself would shrink it by 1 - 1/group_size.
    """
    groups = totals.view(-1, group_size)
    others = groups.sum(1, keepdim=True) - groups
    return others.flatten() / max(group_size - 1, 1)


def rwr_weights(totals, beta, top_fraction):
    """Weights (B,) that sum to 1: softmax of return / beta over the best of the rollout, ties kept.

    With all of it kept, the best fit is π_new ∝ π · exp(return / beta). As the KL is part of the
    return, only the maximum of J is a fixed point, whatever beta.
    """
    kept = math.ceil(top_fraction * len(totals))
    worst = totals.topk(kept).values[-1]
    return torch.where(totals >= worst, totals / beta, -torch.inf).softmax(0)


def reinforce_loss(logprobs, advantages, mask):
    """Minus log-probability times advantage: its gradient is, in expectation, minus that of J.

    All (B, R). Summed over tokens, then averaged over responses. A mean over tokens would favour
    tokens of short responses. The advantages are constants: no gradient flows through them.
    """
    logprobs, advantages = (torch.where(mask, x, 0.0) for x in (logprobs, advantages.detach()))
    return -masked_sum(logprobs * advantages, mask).mean()


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
    critic = nn.Linear(64, 1).to(device)  # a head on the policy, trained with --baseline value
    nn.init.zeros_(critic.weight)  # no noise at first
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), fused=True)
    running_mean = torch.zeros((), device=device)
    score = partial(reward, kind=args.reward)
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
    passes = args.total_episodes // args.group_size // len(train_prompts) + 1
    turns = torch.cat([torch.randperm(len(train_prompts)) for _ in range(passes)])
    turns = turns.split(args.batch_size // args.group_size)  # each rollout's prompts, all in turn
    num_rollouts, begin = args.total_episodes // args.batch_size, time.perf_counter()
    for rollout in range(1, num_rollouts + 1):
        progress = (rollout - 0.5) / num_rollouts
        learning_rate = args.learning_rate * min(10 * progress, 1 - progress)
        optimizer.param_groups[0]["lr"] = learning_rate

        # Rollout: sample responses, score them, note what the models think of them.
        prompts = train_prompts[turns[rollout - 1]].repeat_interleave(args.group_size, 0)  # (B, P)
        responses = generate(policy, prompts, args.temperature)  # (B, R)
        mask, cut_off = response_mask(responses), (responses != EOS).all(1)  # (B, R), (B,)
        scores = score(prompts, responses)  # (B,)
        states = response_states(policy, prompts, responses)  # (B, R, D)
        logits, values = policy.head(states) / args.temperature, critic(states).squeeze(2)
        logprobs = token_logprobs(logits, responses)
        ref_logits = reference.head(response_states(reference, prompts, responses))
        ref_logprobs = token_logprobs(ref_logits / args.temperature, responses)

        # Advantages: what was earned from each token on, less a baseline. Any baseline leaves the
        # expected gradient as it is, so long as it does not depend on this or a later token.
        kl = (logprobs - ref_logprobs).detach()  # k1; here, in the reward, right in gradient too
        rewards = token_rewards(scores, kl, mask, args.kl_coef)
        returns = returns_to_go(rewards, mask, args.gamma)  # (B, R)
        totals = returns[:, 0]  # (B,)
        baseline = {
            "none": torch.zeros_like(returns),
            "batch-mean": mean_of_others(totals, args.batch_size)[:, None],  # all other responses
            "running-mean": running_mean,  # of earlier rollouts
            "rloo": mean_of_others(totals, args.group_size)[:, None],  # those to the same prompt
            "value": values.detach(),  # the critic's guess from the tokens before this one
        }[args.baseline]
        running_mean = running_mean + (totals.mean() - running_mean) / min(rollout, 10)
        advantages = torch.where(mask, returns - baseline, 0.0)
        explained = 1 - advantages[mask].var() / returns[mask].var()
        if args.normalize_advantages:
            advantages = whiten(advantages, mask)
        if args.objective == "rwr":  # imitate: each response as a whole, as much as it weighs
            weights = rwr_weights(totals, args.rwr_beta, args.rwr_top_fraction)
            advantages = (len(weights) * weights)[:, None].expand_as(mask)

        # Update: one step, for now the policy is another and the samples are no longer its own.
        pg_loss = reinforce_loss(logprobs, advantages, mask)
        vf_loss = masked_sum((values - returns) ** 2, mask).mean() / 2
        entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2)  # (B, R)
        entropy = masked_sum(entropy, mask).mean()
        vf_coef = args.vf_coef if args.baseline == "value" else 0.0
        optimizer.zero_grad()
        (pg_loss + vf_coef * vf_loss - args.ent_coef * entropy).backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        if not grad_norm.isfinite():
            sys.exit(f"error: gradient not finite in rollout {rollout}; lower --learning-rate")

        # Log the means over the rollout.
        kl = masked_sum(kl, mask).mean()
        losses = {"policy_loss": pg_loss, "value_loss": vf_loss, "entropy": entropy}
        losses |= {"grad_norm": grad_norm, "explained_variance": explained}
        charts = {"score": scores.mean(), "score_std": scores.std(), "kl": kl}
        charts |= {"response_length": mask.sum(1).float().mean(), "learning_rate": learning_rate}
        charts["kl_coef"] = args.kl_coef
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
    after = evaluate(table, ref_table, held_out, score, args.kl_coef)
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
