"""GRPO for language models: PPO without a critic; a response is measured against its group.

    maximise over π:  J(π) = E[R(x, y)] - β · KL(π ‖ π_ref)

Sample several responses to each prompt; the advantage of all tokens of one is its score less the
group's mean; then steps on the clipped ratio. GRPO: Shao et al. 2024 (arXiv:2402.03300). It leaves
out of PPO the critic, as costly as the policy and hard to fit when one score is paid at the end,
and with it GAE; the KL moves from the reward, where it would blur the scores compared, to the loss.

The task: given three digits, write two more and EOS, so that all five sum to 20. A small GPT is
fitted to demonstrations, frozen as the reference, then tuned. All its responses can be enumerated,
so the evaluation is exact and knows the best attainable J. To adapt it, replace task and policy.

    python grpo.py                        # held-out success 0.59 -> 0.98 in 15 s on two cores
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
    total_episodes: int = 89_600  # responses sampled in all
    batch_size: int = 256  # responses a rollout
    learning_rate: float = 2.4e-3  # of AdamW; rises over a tenth of the run, then falls to 0
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down to it
    temperature: float = 1.0  # divides the logits, in sampling and in every log-probability alike
    kl_coef: float = 0.05  # β, the price in reward of a nat of KL(policy ‖ reference) a response

    reward: Literal["exact", "sharp", "distance"] = "exact"  # what is paid for
    reward_model: Path | None = None  # pay what this file of reward_model.py says, not --reward
    rm_uncertainty_coef: float = 0.0  # take off so many standard deviations between its models
    group_size: int = 4  # responses sampled for each prompt of a rollout
    update_epochs: int = 1  # passes over each rollout
    num_minibatches: int = 4  # gradient steps a pass
    loss_type: Literal["grpo", "dr-grpo", "dapo", "gspo", "cispo"] = "grpo"  # mean, ratio and clip
    scale_rewards: Literal["group", "batch", "none"] = "none"  # by whose standard deviation
    clip_coef: float = 0.2  # ε: no gain from moving the ratio π/π_old further; not read by cispo
    clip_coef_high: float | None = None  # ε upwards; None: as clip_coef; DAPO's paper: 0.28
    kl_estimator: Literal["k2", "k3", "k3-unbiased"] = "k3-unbiased"  # of the KL in the loss


def check(args, flags, valid, why):
    """End the program, status 2, with one line if a value is neither None (off) nor valid."""
    for flag in flags.split():
        value = getattr(args, flag)
        if value is not None and not valid(value):
            print(f"error: --{flag.replace('_', '-')} {value}: {why}", file=sys.stderr)
            sys.exit(2)


def check_args(args):
    counts = "total_episodes batch_size update_epochs num_minibatches"
    check(args, counts, lambda v: v >= 1, "must be 1 or more")
    check(args, "group_size", lambda v: v >= 2, "must be 2 or more, to compare scores in a group")
    positive = "learning_rate max_grad_norm temperature clip_coef clip_coef_high"
    check(args, positive, lambda v: 0 < v < 2**63, "must be above 0, and finite")
    amounts = "seed sft_steps kl_coef rm_uncertainty_coef"
    check(args, amounts, lambda v: 0 <= v < 2**63, "must be 0 or more, and finite")
    size = args.batch_size
    check(args, "total_episodes", lambda v: v >= size, f"is less than one --batch-size {size}")
    divisors = "group_size num_minibatches"
    check(args, divisors, lambda v: size % v == 0, f"must divide --batch-size {size}")
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


# ------------------------------------------------------------------ GRPO
def kl_estimate(logprobs, ref_logprobs, kind):
    """KL(policy ‖ reference) in nats at each token (B, R), from the sampled ones (joschu.net/blog).

    In value k1 and k3 are unbiased. In a loss the gradient counts, which is, for a token with its
    prefix fixed: E[∇k1] = 0, E[∇k2] = ∇KL(π ‖ π_ref), E[∇k3] = ∇KL(π_ref ‖ π), the other direction.
    No loss sees that a token decides which prefixes come next; k1 in the reward does, and is right.
    """
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]


def group_advantages(scores, group_size, scale):
    """Advantages (B,): score less the group's mean, over a standard deviation unless scale is none.

    Which one? That over N: two unlike responses get ±1 (over N-1 it would be ±0.71). Of the group
    (arXiv:2402.03300): pays most for prompts nearly always or nearly never solved, and so moves the
    maximum of J. Of the batch (arXiv:2508.08221): scales all prompts alike, so only β is another.
    None (arXiv:2503.20783): J itself, but that a response counts in the mean it is compared with:
    the expected gradient is (G-1)/G of the reward's. Also returned: each group's deviation.
    """
    groups = scores.view(-1, group_size)
    # All alike, or alone: nothing to compare. Exactly 0, not rounding errors over a tiny deviation.
    alike = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    advantages = torch.where(alike, 0.0, groups - groups.mean(1, keepdim=True))
    std = torch.where(alike, 0.0, groups.std(1, correction=0, keepdim=True))
    scales = {"group": std, "batch": scores.std(correction=0), "none": torch.ones_like(std)}
    return (advantages / (scales[scale] + 1e-8 * (scale != "none"))).flatten(), std.flatten()


def token_weights(mask, loss_type):
    """What a token of each response weighs in the loss (B,), found once for a whole rollout.

    grpo, gspo: mean over a response, then over responses, so tokens of longer ones count less
    (arXiv:2402.03300, eq. 3; arXiv:2507.18071, eq. 5). dr-grpo: sum over a constant, which leaves
    the policy gradient as it is (arXiv:2503.20783). dapo, cispo: mean over all tokens, another
    constant for this rollout (arXiv:2503.14476, eq. 8; arXiv:2506.13585, eq. 4).
    """
    lengths = mask.sum(1).float()
    if loss_type == "dr-grpo":
        lengths = torch.full_like(lengths, mask.shape[1])
    elif loss_type in ("dapo", "cispo"):
        lengths = lengths.mean().expand_as(lengths)
    return 1 / lengths


def grpo_loss(logprobs, old_logprobs, advantages, mask, weights, loss_type, clip_low, clip_high):
    """Minus the clipped objective. logprobs, mask: (B, R); advantages, weights: (B,).

    gspo has one ratio a response, the geometric mean of its tokens' (arXiv:2507.18071, eq. 7), and
    wants a smaller clip (there: 3e-4). cispo clips the weight of log π, not the objective, so that
    no token loses its gradient (arXiv:2506.13585, eq. 5); bounded above only, as there.
    """
    logratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    if loss_type == "gspo":
        logratio = (logratio.sum(1) / mask.sum(1))[:, None].expand_as(mask)
    ratio, advantages = logratio.exp(), advantages[:, None]
    if loss_type == "cispo":
        clipped = ratio.clamp(max=1 + clip_high)
        objective = clipped.detach() * advantages * torch.where(mask, logprobs, 0.0)
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        objective = torch.min(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        approx_kl = masked_mean(ratio - 1 - logratio, mask)  # k3 of old ‖ new: never negative
        clipfrac = masked_mean((ratio != clipped).float(), mask)
        metrics = {"approx_kl": approx_kl, "clipfrac": clipfrac, "ratio": masked_mean(ratio, mask)}
    return -(masked_sum(objective, mask) * weights).mean(), metrics


def kl_loss(logprobs, old_logprobs, ref_logprobs, mask, weights, kind):
    """KL(policy ‖ reference) as a loss, weighed as the policy loss is. (B, R) but weights (B,).

    k3-unbiased is ratio · k3: as π_old · ratio = π, its gradient is that of E_π[k3], the KL itself.
    """
    logratio, d = (torch.where(mask, logprobs - x, 0.0) for x in (old_logprobs, ref_logprobs))
    kl = kl_estimate(d, torch.zeros_like(d), kind[:2])
    kl = logratio.exp() * kl if kind == "k3-unbiased" else kl
    return (masked_sum(kl, mask) * weights).mean()


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
    parameters = [*policy.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), fused=True)
    score = partial(reward, kind=args.reward)
    if args.reward_model is not None:
        score = load_reward_model(args.reward_model, args.rm_uncertainty_coef, device)
    clip_high = args.clip_coef if args.clip_coef_high is None else args.clip_coef_high
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

        # Rollout: sample responses, score them, note what the reference thinks of them.
        prompts = train_prompts[turns[rollout - 1]].repeat_interleave(args.group_size, 0)  # (B, P)
        responses, states = generate_with_states(policy, prompts, args.temperature)
        mask, cut_off = response_mask(responses), (responses != EOS).all(1)  # (B, R), (B,)
        scores = score(prompts, responses)  # (B,)
        with torch.no_grad():
            old_logprobs = token_logprobs(policy.head(states) / args.temperature, responses)
            ref_logits = reference.head(response_states(reference, prompts, responses))
            ref_logprobs = token_logprobs(ref_logits / args.temperature, responses)

        # Advantages: one for all tokens of a response. After this, minibatches may split a group.
        advantages, stds = group_advantages(scores, args.group_size, args.scale_rewards)
        weights = token_weights(mask, args.loss_type)

        # Update: several passes over the rollout, held near the old policy by the clipped ratio.
        # Why is the loss 0? Before the first step each ratio is 1, so the policy loss is minus the
        # mean advantage, and advantages sum to 0 by construction; the KL starts at 0 as well. The
        # gradient is not 0, unless all groups are (groups/frac_zero_std). Watch charts/score.
        data = prompts, responses, mask, old_logprobs, ref_logprobs, advantages, weights
        epochs = torch.stack([torch.randperm(args.batch_size) for _ in range(args.update_epochs)])
        updates = []
        for rows in epochs.view(-1, args.batch_size // args.num_minibatches):
            x, y, real, old, ref, adv, weight = (tensor[rows] for tensor in data)
            logits = policy.head(response_states(policy, x, y)) / args.temperature
            logprobs = token_logprobs(logits, y)
            how = args.loss_type, args.clip_coef, clip_high
            pg_loss, metrics = grpo_loss(logprobs, old, adv, real, weight, *how)
            kl = kl_loss(logprobs, old, ref, real, weight, args.kl_estimator)
            optimizer.zero_grad()
            (pg_loss + args.kl_coef * kl).backward()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2)  # (B, R)
            entropy = masked_sum(entropy, real).mean()
            metrics |= {"policy_loss": pg_loss, "kl_loss": kl, "entropy": entropy}
            updates.append({name: value.detach() for name, value in metrics.items()})
        if not updates[-1]["grad_norm"].isfinite():
            sys.exit(f"error: gradient not finite in rollout {rollout}; lower --learning-rate")

        # Log the means over the rollout.
        kl = masked_sum(kl_estimate(old_logprobs, ref_logprobs, "k1"), mask).mean()
        losses = {name: torch.stack([m[name] for m in updates]).mean() for name in updates[0]}
        losses["ratio_first"] = updates[0]["ratio"]  # not 1: rows or positions are mixed up
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
        groups = {"reward_std": stds.mean(), "frac_zero_std": (stds == 0).float().mean()}
        write(writer, "groups", groups, episodes)
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
