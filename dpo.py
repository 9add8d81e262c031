"""DPO for language models: learn from comparisons, without a reward model or sampling on the way.

    minimise over π:  L(π) = -E[log σ(β·h)],  h = log π(w|x)/π_ref(w|x) - log π(l|x)/π_ref(l|x)

where response w was preferred to l. DPO: Rafailov et al. 2023 (arXiv:2305.18290). Judgements that
prefer A to B with odds exp((R(A) - R(B)) / τ) make π* ∝ π_ref · exp(R / (τβ)) its optimum, which is
that of J = E[R] - τβ · KL(π ‖ π_ref): reward and policy are learned at once. Other losses, length
normalisation and the judgements of a file have other optima; J is then but a yardstick.

What does what. β: large stays close to the reference; small asks for log-ratios of 1/(τβ) nats. As
only differences are trained, chosen responses, too, become less likely, and what no pair shows can
take their place: too small a β succeeds less, not more. Kind of pairs: those of equal reward are no
waste, as they hold alike what is alike; without them the KL grows. Number: to judge all pairs of a
group costs no more passes, as a response is read once a step for all its pairs (for reward models
Ouyang et al. 2022, arXiv:2203.02155, section 3.5). In mixed order, as those of a file may be, pairs
take several times as long and teach a little more. Learning rate: too high a one throws the policy
off, and it does not come back, as there are no new samples to correct it. Early steps do it most
easily, so the rate rises slowly, over half the run.

The task: given three digits, write two more and EOS, so that all five sum to 20. A small GPT is
fitted to demonstrations, frozen as the reference, then tuned. All its responses can be enumerated,
so the evaluation is exact and knows the best attainable J. To adapt it, replace task and policy.

    python dpo.py                     # held-out success 0.59 -> 0.96 in 12 s on two cores
    python dpo.py --loss-type ipo     # or hinge, robust; --help lists every flag
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26", "tyro>=0.9", "tensorboard>=2.16"]
# ///

import copy
import json
import math
import os
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
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
    learning_rate: float = 2e-3  # of AdamW; rises over half the run, then falls to 0
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down to it

    preferences: Path | None = None  # file of judgements, JSON lines; without it, an annotator's
    annotator_temperature: float = 0.5  # τ: prefers A to B with odds exp((R(A) - R(B)) / τ)
    num_responses: int = 23_328  # sampled from the reference for the annotator, prompts in turn
    group_size: int = 8  # responses to one prompt of which the annotator judges all pairs
    epochs: int = 6  # passes over the judgements
    minibatch_size: int = 512  # judgements a gradient step
    beta: float = 0.4  # β: large stays close to the reference, small follows the judgements further
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"  # of a pair's margin h
    label_smoothing: float = 0.0  # share of judgements taken to be wrong; for sigmoid and robust
    length_normalize: bool = False  # mean over tokens instead of log π(y|x): another objective


def check(args, flags, valid, why):
    """End the program, status 2, with one line if a value is neither None (off) nor valid."""
    for flag in flags.split():
        value = getattr(args, flag)
        if value is not None and not valid(value):
            print(f"error: --{flag.replace('_', '-')} {value}: {why}", file=sys.stderr)
            sys.exit(2)


def check_args(args):
    counts = "num_responses epochs minibatch_size"
    check(args, counts, lambda v: v >= 1, "must be 1 or more")
    check(args, "group_size", lambda v: v >= 2, "must be 2 or more, to compare")
    positive = "learning_rate max_grad_norm annotator_temperature beta"
    check(args, positive, lambda v: 0 < v < 2**63, "must be above 0, and finite")
    check(args, "seed sft_steps", lambda v: 0 <= v < 2**63, "must be 0 or more, and finite")
    size = args.group_size
    check(args, "num_responses", lambda v: v >= size, f"is less than one --group-size {size}")
    check(args, "label_smoothing", lambda v: 0 <= v < 0.5, "must be 0 or more, and below 0.5")
    smooth, why = args.label_smoothing > 0, f"is not read with --loss-type {args.loss_type}"
    check(args, "label_smoothing", lambda v: v == 0 or args.loss_type in ("sigmoid", "robust"), why)
    why = "needs --label-smoothing above 0; without it, it is sigmoid"
    check(args, "loss_type", lambda v: v != "robust" or smooth, why)
    for flag in ("num_responses", "group_size") if args.preferences else ():
        check(args, flag, getattr(Args, flag).__eq__, "is not read with --preferences")
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


# ------------------------------------------------------------------ Preferences
def sample_comparisons(policy, prompts, group_size, annotator_temperature):
    """A group of sampled responses a prompt, all pairs of unlike ones judged by a noisy annotator,
    P(A ≻ B) = σ((R(A) - R(B)) / τ). Returns prompts (N, P), chosen and rejected (N, R), ties (N,).
    """
    first, second = torch.triu_indices(group_size, group_size, 1, device=prompts.device)
    responses = generate(policy, prompts.repeat_interleave(group_size, 0), 1.0)
    responses = responses.view(len(prompts), group_size, RESPONSE_LENGTH)
    prompts = prompts.repeat_interleave(len(first), 0)  # (N, P)
    first, second = (responses[:, i].flatten(0, 1) for i in (first, second))  # (N, R)
    # Two like responses have h = 0, whatever the policy, and so no gradient. Which pairs are left
    # out depends on neither order nor judgement: the others' odds are still the annotator's.
    unlike = (first != second).any(1)
    prompts, first, second = prompts[unlike], first[unlike], second[unlike]
    margin = (reward(prompts, first) - reward(prompts, second)) / annotator_temperature  # (N,)
    first_wins = (torch.rand_like(margin) < margin.sigmoid())[:, None]  # (N, 1)
    chosen = torch.where(first_wins, first, second)
    rejected = torch.where(first_wins, second, first)
    return prompts, chosen, rejected, torch.zeros_like(margin, dtype=torch.bool)


def parse_judgement(line):
    """Prompt, chosen, rejected (lists of tokens) and tie of one line of JSON, or a ValueError."""
    try:
        judgement = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(judgement, dict):
        example = '{"prompt": "433", "chosen": "73", "rejected": "11"}'
        raise ValueError(f"is not an object like {example}")
    rows = []
    for name, length in ("prompt", 3), ("chosen", RESPONSE_LENGTH), ("rejected", RESPONSE_LENGTH):
        text = judgement.get(name)
        if not isinstance(text, str) or not re.fullmatch(f"[0-9]{{0,{length}}}", text):
            raise ValueError(f'needs a "{name}" of at most {length} digits in quotes')
        rows.append([int(digit) for digit in text] + [EOS] * (length - len(text)))
    if EOS in rows[0]:
        raise ValueError('needs a "prompt" of 3 digits')
    tie = judgement.get("tie", False)
    if not isinstance(tie, bool):
        raise ValueError('needs true or false as "tie"')
    return *rows, tie


def read_preferences(path, held_out=()):
    """Preferences from a file of JSON lines: prompts (N, P), chosen and rejected (N, R), ties (N,).
    A line is {"prompt": "433", "chosen": "73", "rejected": "11"}, and perhaps has "tie": true.
    Those of held-out prompts (M, P) are left out, so that the evaluation stays clean."""
    judgements, held_out = [], {tuple(map(int, prompt)) for prompt in held_out}
    try:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                judgements.append(parse_judgement(line))
            except ValueError as error:
                print(f"error: --preferences {path}, line {number}: {error}", file=sys.stderr)
                sys.exit(2)
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: --preferences {path}: cannot be read ({error})", file=sys.stderr)
        sys.exit(2)
    kept = [row for row in judgements if tuple(row[0]) not in held_out]
    if len(kept) < len(judgements):
        left_out = f"left out {len(judgements) - len(kept)} of {len(judgements)} judgements"
        print(f"{path}: {left_out}, as their prompts are held out")
    if not kept:
        why = "holds no judgement, or only of held-out prompts"
        print(f"error: --preferences {path}: {why}", file=sys.stderr)
        sys.exit(2)
    return tuple(torch.tensor(column) for column in zip(*kept, strict=True))


# ------------------------------------------------------------------ DPO
def response_logprobs(logprobs, mask, length_normalize):
    """Log-probabilities (B,) of whole responses from those of their tokens (B, R).

    The sum, as π(y|x) is a product. The mean over tokens is another objective, which does not give
    long responses, whose sums vary more, the larger say; its optimum is not the closed form.
    """
    total = masked_sum(logprobs, mask)
    return total / mask.sum(1) if length_normalize else total


def dpo_loss(logprobs, ref_logprobs, ties, beta, loss_type="sigmoid", label_smoothing=0.0):
    """Loss of pairs from log π(y|x), (2, B): chosen, rejected. Ties (B,) count half each way.

    sigmoid: arXiv:2305.18290, eq. 7. Smoothed, it is the cross-entropy to 1 - ε (conservative DPO,
    Mitchell 2023). robust: arXiv:2403.00409, its mean over judgements flipped with chance ε is the
    sigmoid loss of the true ones. ipo: h is led to 1/(2β), not on and on if a pair is always judged
    alike (arXiv:2310.12036, eq. 17). hinge: no gradient once β·h > 1 (SLiC, arXiv:2305.10425, on
    log-ratios as in arXiv:2309.06657).
    """
    logratios = logprobs - ref_logprobs  # (2, B)
    h = logratios[0] - logratios[1]  # (B,)
    if loss_type == "ipo":
        ahead, behind = (h - 1 / (2 * beta)) ** 2, (h + 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        ahead, behind = (1 - beta * h).relu(), (1 + beta * h).relu()
    else:
        ahead, behind = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    right = 1 - label_smoothing
    if loss_type == "robust":
        right = right / (1 - 2 * label_smoothing)  # above 1: the loss behind is subtracted
    right = torch.full_like(h, right).masked_fill(ties, 0.5)
    loss = (right * ahead + (1 - right) * behind).mean()
    with torch.no_grad():
        chosen, rejected = beta * logratios.mean(1)  # implicit rewards β·log π/π_ref
        agrees = torch.where(ties, 0.5, (h.sign() + 1) / 2)  # no opinion counts half
        metrics = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        metrics["accuracies"] = agrees.mean()
    return loss, metrics


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
    if args.preferences is not None:
        judgements = [column.to(device) for column in read_preferences(args.preferences, held_out)]
    policy = GPT().to(device)
    warm_start(policy, *make_demonstrations(train_prompts), args.sft_steps)
    reference = copy.deepcopy(policy).requires_grad_(False)
    if args.preferences is None:  # of the reference's own responses, never of the trained policy's
        turns = torch.randperm(args.num_responses // args.group_size) % len(train_prompts)
        how = args.group_size, args.annotator_temperature
        blocks = [sample_comparisons(reference, train_prompts[i], *how) for i in turns.split(32)]
        judgements = [torch.cat(columns) for columns in zip(*blocks, strict=True)]
        check(args, "num_responses", lambda _: len(judgements[0]), "gave no two unlike ones")
    parameters = [*policy.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), fused=True)
    kl_coef = args.annotator_temperature * args.beta
    ref_table = response_distribution(reference, held_out, 1.0)  # (N, Y)
    before = evaluate(ref_table, ref_table, held_out, reward, kl_coef)

    script, size = Path(__file__).stem, sum(p.numel() for p in parameters)
    print(f"{script}.py: {device}, seed {args.seed}, {size:,} parameters")
    run = f"runs/{script}__{args.seed}__{time.strftime('%Y-%m-%d-%H%M%S')}"
    writer = SummaryWriter(run) if args.tensorboard else None
    if writer:
        flags = "".join(f"|{flag}|{value}|\n" for flag, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}")

    # Each response once, with its prompt and its log-probability under the reference.
    prompts, chosen, rejected, ties = judgements  # (N, P), (N, R), (N, R), (N,)
    pairs = torch.stack([torch.cat([prompts, y], 1) for y in (chosen, rejected)])  # (2, N, P + R)
    texts, index = pairs.flatten(0, 1).unique(dim=0, return_inverse=True)  # (U, P + R), (2N,)
    x, y = texts.split([prompts.shape[1], RESPONSE_LENGTH], 1)
    index, mask = index.view(2, -1), response_mask(y)  # (2, N), (U, R)
    groups = F.pad((prompts[1:] != prompts[:-1]).any(1), (1, 0)).cumsum(0)  # (N,)
    with torch.no_grad():
        logits = reference.head(response_states(reference, x, y))
        ref_logprobs = response_logprobs(token_logprobs(logits, y), mask, args.length_normalize)

    # Update: passes over the judgements in random order, but for those that follow each other and
    # share a prompt: a group stays together, so that its responses are read but once a step.
    minibatches, updates = math.ceil(len(ties) / args.minibatch_size), []
    num_steps, begin = args.epochs * minibatches, time.perf_counter()
    for step in range(1, num_steps + 1):
        if step % minibatches == 1 % minibatches:
            order = torch.randperm(len(ties), device=device)[groups].argsort()  # (N,)
            parts = order.tensor_split(minibatches)
        rows = parts[(step - 1) % minibatches]  # (B,)
        progress = (step - 0.5) / num_steps
        learning_rate = args.learning_rate * 2 * min(progress, 1 - progress)
        optimizer.param_groups[0]["lr"] = learning_rate
        read, inverse = index[:, rows].unique(return_inverse=True)  # (u,), (2, B)
        logits = policy.head(response_states(policy, x[read], y[read]))
        logprobs = token_logprobs(logits, y[read])
        logprobs = response_logprobs(logprobs, mask[read], args.length_normalize)[inverse]
        how = args.beta, args.loss_type, args.label_smoothing
        loss, metrics = dpo_loss(logprobs, ref_logprobs[read][inverse], ties[rows], *how)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        chosen, rejected = logprobs.detach().mean(1)
        losses = {"loss": loss.detach(), "grad_norm": grad_norm}
        losses |= {"chosen_logprobs": chosen, "rejected_logprobs": rejected}
        updates.append((losses, metrics))

        # Log the means over a twentieth of the run.
        if step % max(1, num_steps // 20) and step < num_steps:
            continue
        if not grad_norm.isfinite():
            sys.exit(f"error: gradient not finite in step {step}; lower --learning-rate")
        losses, rewards = (
            {name: torch.stack([m[name] for m in each]).mean() for name in each[0]}
            for each in zip(*updates, strict=True)
        )
        updates, seconds = [], time.perf_counter() - begin
        speed, left = step / seconds, seconds * (num_steps / step - 1)
        charts = {"learning_rate": learning_rate, "steps_per_second": speed}
        write(writer, "losses", losses, step)
        write(writer, "rewards", rewards, step)
        write(writer, "charts", charts, step)
        line = f"{step / num_steps:4.0%}  loss {losses['loss']:.3f}  "
        line += "  ".join(f"{name} {value:.3f}" for name, value in rewards.items())
        print(f"{line}  {speed:4.0f} steps/s  {left:3.0f} s left")

    table = response_distribution(policy, held_out, 1.0)
    after = evaluate(table, ref_table, held_out, reward, kl_coef)
    if writer:
        write(writer, "eval", before, 0)
        write(writer, "eval", after, step)
        # π(d4, d5) for 8 held-out prompts, above before, below after: d4 down, d5 right.
        maps = torch.stack([ref_table, table])[:, :8, (all_responses() != EOS).sum(1) == 2].exp()
        maps = maps.view(-1, 1, 10, 10).sqrt().repeat_interleave(9, 2).repeat_interleave(9, 3)
        writer.add_images("policy", F.pad(maps, (2, 2, 2, 2), value=0.5), step)
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
