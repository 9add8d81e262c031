"""Reward models: learn from people's judgements what to pay, for ppo.py, grpo.py or reinforce.py.

    minimise over r:  -E[log σ(h)],  h = r(x, y_chosen) - r(x, y_rejected)

A GPT reads prompt and response; its one output at the last real token is the score r(x, y). Three
kinds of judgements can teach it, and all make it tend to R/τ, the true reward R in units of the
judge's noise τ:

  preferences     A is preferred to B with odds exp((R(A) - R(B)) / τ) (Bradley & Terry 1952;
                  Christiano et al. 2017, arXiv:1706.03741). Fixes r up to a constant a prompt.
  labels          y is called good with odds exp((R(y) - ½) / τ): compared, so to speak, with a
                  response worth ½. A binary classifier; its logit is r, without the constant.
  demonstrations  y is written with probability ∝ π_ref(y|x) exp(R(y) / τ). Maximum-entropy inverse
                  RL (Ziebart et al. 2008) with π_ref as prior: maximise log p(y|x) for
                  p ∝ π_ref exp(r). At the optimum r = log p/π_ref, the demonstrator's
                  log-probability beyond the reference's, up to a constant a prompt.

The task: given three digits, write two more and EOS, so that all five sum to 20. A small GPT is
fitted to right answers and frozen as the reference; its samples are judged. To adapt it, replace
task, policy, and the synthetic annotator by people: --annotate, or a file of their judgements.

    python reward_model.py --save-path rm.pt && python ppo.py --reward-model rm.pt    # 0.59 -> 0.99
    python reward_model.py --annotate 50 --preferences mine.jsonl    # judge pairs yourself, then
    python reward_model.py --preferences mine.jsonl                  # learn; --help lists all flags
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26", "tyro>=0.9", "tensorboard>=2.16"]
# ///

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
    learning_rate: float = 1e-3  # of AdamW; rises over a tenth of the run, then falls to 0
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down to it

    learn_from: Literal["preferences", "labels", "demonstrations"] = "preferences"  # see above
    num_responses: int = 11_664  # sampled for the annotator, prompts in turn; or demonstrations
    group_size: int = 8  # responses to one prompt; with preferences all their pairs are judged
    annotator_temperature: float = 0.5  # τ: prefers A to B with odds exp((R(A) - R(B)) / τ)
    preferences: Path | None = None  # file of judgements, JSON lines; without it, an annotator's
    annotate: int | None = None  # let a person judge until --preferences holds so many, then stop
    epochs: int = 6  # passes over the judgements
    minibatch_size: int = 8  # prompts a gradient step, each with all judgements about it
    weight_decay: float = 1.0  # of AdamW: without a strong one the noise of the judge is learned
    ensemble_size: int = 1  # models; where they disagree, none of them is to be trusted


def check(args, flags, valid, why):
    """End the program, status 2, with one line if a value is neither None (off) nor valid."""
    for flag in flags.split():
        value = getattr(args, flag)
        if value is not None and not valid(value):
            print(f"error: --{flag.replace('_', '-')} {value}: {why}", file=sys.stderr)
            sys.exit(2)


def check_args(args):
    counts = "num_responses annotate epochs minibatch_size ensemble_size"
    check(args, counts, lambda v: v >= 1, "must be 1 or more")
    positive = "learning_rate max_grad_norm annotator_temperature"
    check(args, positive, lambda v: 0 < v < 2**63, "must be above 0, and finite")
    amounts = "seed sft_steps weight_decay"
    check(args, amounts, lambda v: 0 <= v < 2**63, "must be 0 or more, and finite")
    size = args.group_size
    check(args, "group_size", lambda v: v >= 2, "must be 2 or more, to compare")
    check(args, "num_responses", lambda v: v >= size, f"is less than one --group-size {size}")
    path = args.preferences
    usable = path is not None and os.access(path.parent, os.W_OK) and not path.is_dir()
    check(args, "annotate", lambda v: usable, "needs a --preferences FILE that can be written")
    ignored = [] if args.preferences is None else ["num_responses", "group_size", "learn_from"]
    if args.annotate is not None:
        ignored += "learning_rate max_grad_norm annotator_temperature epochs".split()
        ignored += "minibatch_size weight_decay ensemble_size save_path".split()
    for flag in ignored:
        default, why = getattr(Args, flag), "is not read with the other flags; leave it out"
        check(args, flag, lambda v, default=default: v == default, why)
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


def judge_pairs(policy, prompts, path, number):
    """Ask a person which response is better until the file holds that many judgements. Each is a
    line on disk before the next is asked for, so that stopping, however rudely, loses nothing."""
    text = path.read_text() if path.exists() else ""
    judged = read_preferences(path) if text else ()
    rows = [[tuple(row) for row in column.tolist()] for column in judged[:3]]
    seen = {(x, frozenset(pair)) for x, *pair in zip(*rows, strict=True)}
    count = len(judged[0]) if judged else 0
    keys, question = list("abtq"), "a, b, t for a tie, or q to quit: "

    def digits(tokens):
        return "".join(str(token) for token in tokens if token != EOS)

    def shown(response):  # the dots: it did not end
        return (digits(response) or "(nothing)") + ("" if EOS in response else "...")

    print(f"{count} of {number} judged. Five digits should sum to {TARGET}: which end is better?")
    with path.open("a") as file:
        file.write("\n" if text and not text.endswith("\n") else "")
        try:
            while count < number:
                x = prompts[torch.randint(len(prompts), (1,))].expand(2, -1)
                a, b = map(tuple, generate(policy, x, 1.0).tolist())
                x = tuple(x[0].tolist())
                pair = x, frozenset([a, b])
                if a == b or pair in seen:  # nothing to compare, or judged before
                    continue
                print(f"\n[{count + 1}] {digits(x)}    A: {shown(a)}    B: {shown(b)}")
                while (key := input(question).strip().lower()) not in keys:
                    print("please type one of these letters")
                if key == "q":
                    break
                chosen, rejected = (b, a) if key == "b" else (a, b)
                line = {"prompt": x, "chosen": chosen, "rejected": rejected}
                line = {name: digits(tokens) for name, tokens in line.items()}
                file.write(json.dumps(line | ({"tie": True} if key == "t" else {})) + "\n")
                file.flush()
                count += 1
                seen.add(pair)
        except (EOFError, KeyboardInterrupt):
            print()
    print(f"{path} holds {count} judgements: python reward_model.py --preferences {path}")


# ------------------------------------------------------------------ Labels and demonstrations
def sample_labels(policy, prompts, group_size, annotator_temperature):
    """Sampled responses called good with odds exp((R - ½) / τ): prompts, responses, labels (N,)."""
    prompts = prompts.repeat_interleave(group_size, 0)  # (N, P)
    responses = generate(policy, prompts, 1.0)  # (N, R)
    odds = (reward(prompts, responses) - 0.5) / annotator_temperature
    return prompts, responses, torch.rand_like(odds) < odds.sigmoid()


def sample_demonstrations(policy, prompts, group_size, annotator_temperature):
    """Responses (N, R) of a demonstrator ∝ π_ref · exp(R/τ), and as many of π_ref: (N, M, R), the
    same M = group_size for each of the group.

    Exact, by rejection: as R ≤ 1, a sample is kept with probability exp((R - 1) / τ), else redrawn.
    """
    prompts = prompts.repeat_interleave(group_size, 0)  # (N, P)
    responses, samples = generate(policy, prompts, 1.0), generate(policy, prompts, 1.0)
    redraw = torch.arange(len(prompts), device=prompts.device)
    while len(redraw):
        chance = ((reward(prompts[redraw], responses[redraw]) - 1) / annotator_temperature).exp()
        redraw = redraw[torch.rand_like(chance) >= chance]
        responses[redraw] = generate(policy, prompts[redraw], 1.0)
    samples = samples.view(-1, group_size, RESPONSE_LENGTH).repeat_interleave(group_size, 0)
    return prompts, responses, samples


# ------------------------------------------------------------------ The reward model
def response_scores(gpt, prompts, responses):
    """Scores (B,): the output at the last real token, EOS or where the response was cut off.

    Attention looks back only, so nothing that follows EOS can change them.
    """
    states = gpt(torch.cat([prompts, responses], 1), responses.shape[1])  # (B, R, D)
    last = response_mask(responses).sum(1) - 1
    return gpt.head(states[torch.arange(len(last)), last]).squeeze(1)


def preference_loss(chosen, rejected, ties):
    """Bradley–Terry: -log σ(chosen - rejected); a tie is half a vote for each. All (B,)."""
    margins = chosen - rejected
    votes = torch.where(ties, 0.5, 1.0)
    loss = -votes * F.logsigmoid(margins) - (1 - votes) * F.logsigmoid(-margins)
    return loss.mean(), reward_metrics(chosen, rejected, margins)


def label_loss(scores, labels):
    """Direct assessment: -log σ(score) of responses called good, -log σ(-score) of others. (B,)"""
    loss = F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))
    margins = torch.where(labels, scores, -scores)
    return loss, reward_metrics(scores[labels], scores[~labels], margins)


def log_partition(scores):
    """log Z (B,), Z = E_ref[exp(r)], from scores (B, M) of the reference's samples.

    Unbiased for Z; as log is concave, too low for log Z, by about Var(exp r) / (2 M Z²).
    """
    return scores.logsumexp(1) - math.log(scores.shape[1])


def demonstration_loss(demonstrated, sampled):
    """Minus the log-likelihood of p = π_ref exp(r) / Z but for log π_ref, which has no gradient.

    demonstrated: (B,), sampled: (B, M), scores of responses to the same prompt.
    """
    loss = (log_partition(sampled) - demonstrated).mean()
    margins = demonstrated[:, None] - sampled
    return loss, reward_metrics(demonstrated, sampled, margins)


def reward_metrics(chosen, rejected, margins):
    """Mean score of the better and of the worse, by how much, and how often, the model agrees."""
    accuracies = (margins > 0).float().mean() + (margins == 0).float().mean() / 2
    means = {"chosen": chosen.mean(), "rejected": rejected.mean(), "margins": margins.mean()}
    return {name: x.detach() for name, x in (means | {"accuracies": accuracies}).items()}


@torch.no_grad()
def normalise(gpt, prompts, responses):
    """Shift and scale the head, in place, to mean 0 and standard deviation 1 on these responses.

    Only differences of r mean anything; normalised, models can be compared and a --kl-coef kept.
    """
    std, mean = torch.std_mean(response_scores(gpt, prompts, responses), correction=0)
    std = std.clamp(min=1e-8)
    gpt.head.weight /= std
    gpt.head.bias.copy_((gpt.head.bias - mean) / std)
    return std


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


@torch.no_grad()
def score_table(gpt, prompts, responses):
    """Scores (N, Y), float64, of each response (Y, R) to each prompt (N, P)."""
    rows = prompts.repeat_interleave(len(responses), 0), responses.repeat(len(prompts), 1)
    rows = zip(*(x.split(1024) for x in rows), strict=True)
    scores = torch.cat([response_scores(gpt, *some) for some in rows])
    return scores.double().view(len(prompts), len(responses))


def pair_metrics(scores, rewards, probs, annotator_temperature):
    """How well scores (N, Y) predict the annotator on pairs from probs, summed over all pairs.

    The annotator is random: knowing R itself, one is right in max(P, 1 - P) of judgements
    (attainable). Calibration: in each tenth of predicted P(A ≻ B) its mean against the true one.
    """
    weights = probs[:, :, None] * probs[:, None] / len(probs)  # (N, Y, Y)
    truth = ((rewards[:, :, None] - rewards[:, None]) / annotator_temperature).sigmoid()
    margins = scores[:, :, None] - scores[:, None]
    accuracy = (weights * (0.5 + (truth - 0.5) * margins.sign())).sum()
    attainable = (weights * (0.5 + (truth - 0.5).abs())).sum()
    predicted = margins.sigmoid()
    gaps = torch.zeros(10, dtype=weights.dtype, device=weights.device)
    tenth = (predicted * 10).long().clamp(max=9)
    gaps.index_add_(0, tenth.flatten(), (weights * (predicted - truth)).flatten())
    return {"accuracy": accuracy, "attainable": attainable, "calibration_error": gaps.abs().sum()}


def correlation(scores, rewards, probs):
    """Pearson correlation over all prompts and responses. All (N, Y)."""
    weights = probs / len(probs)
    scores, rewards = (x - (weights * x).sum() for x in (scores, rewards))
    variances = [(weights * x**2).sum() for x in (scores, rewards)]
    return (weights * scores * rewards).sum() / (variances[0] * variances[1]).sqrt()


def best_of_n(scores, rewards, probs, n):
    """Mean true reward of the one with the highest score among n samples. All (N, Y).

    The best ranks r-th from below or lower with probability F_r^n, F cumulative in that order.
    """
    order = scores.argsort(1)
    lower = F.pad(probs.gather(1, order).cumsum(1) ** n, (1, 0))  # (N, 1 + Y)
    return (lower.diff(dim=1) * rewards.gather(1, order)).sum(1).mean()


def evaluate_scores(tables, stds, rewards, probs, annotator_temperature):
    """Exact means over pairs and samples from probs. tables (K, N, Y): normalised scores of each
    model; stds (K,): their scales in units of the judge's noise, in which a difference is a logit.
    """
    logits = (tables * stds[:, None, None]).mean(0)  # (N, Y)
    means = pair_metrics(logits, rewards, probs, annotator_temperature)
    means["correlation"] = correlation(logits, rewards, probs)
    means["best_of_16"] = best_of_n(logits, rewards, probs, 16)
    means["best_of_16_attainable"] = best_of_n(rewards, rewards, probs, 16)
    means["disagreement"] = (tables.std(0, correction=0) * probs).sum(1).mean()
    return {name: value.item() for name, value in means.items()}


# ------------------------------------------------------------------ Training
def write(writer, group, metrics, step):
    """Add a point to the curve of each metric."""
    for name, value in metrics.items() if writer else ():
        writer.add_scalar(f"{group}/{name}", value, step)


def main(args: Args) -> dict[str, float]:
    """Learn a reward, and return its exact evaluation on the held-out prompts."""
    check_args(args)
    start, device = time.perf_counter(), args.device
    torch.manual_seed(args.seed)
    train_prompts, held_out = (prompts.to(device) for prompts in make_prompts())
    if args.preferences is not None and args.annotate is None:
        judgements = [column.to(device) for column in read_preferences(args.preferences, held_out)]
    reference = GPT().to(device)
    warm_start(reference, *make_demonstrations(train_prompts), args.sft_steps)
    reference.requires_grad_(False)
    if args.annotate is not None:
        judge_pairs(reference, train_prompts, args.preferences, args.annotate)
        return {}

    if args.preferences is None:
        kinds = {"labels": sample_labels, "demonstrations": sample_demonstrations}
        sample = kinds.get(args.learn_from, sample_comparisons)
        turns = torch.randperm(args.num_responses // args.group_size) % len(train_prompts)
        how = args.group_size, args.annotator_temperature
        blocks = [sample(reference, train_prompts[i], *how) for i in turns.split(32)]
        judgements = [torch.cat(columns) for columns in zip(*blocks, strict=True)]
        check(args, "num_responses", lambda _: len(judgements[0]), "gave no two unlike ones")
    x = train_prompts[torch.randint(len(train_prompts), (1024,))]
    samples = x, generate(reference, x, 1.0)  # to normalise the scores on

    # Each response once, with its prompt. Judgements about one prompt stay together, so that a
    # response in many of them is read but once a step (arXiv:2203.02155, section 3.5).
    prompts, *columns = judgements  # (N, P)
    verdicts = columns.pop() if args.learn_from != "demonstrations" else None  # (N,) ties or labels
    responses = torch.cat([y.view(len(y), -1, RESPONSE_LENGTH) for y in columns], 1)  # (N, K, R)
    texts = torch.cat([prompts[:, None].expand(-1, responses.shape[1], -1), responses], 2)
    texts, index = texts.flatten(0, 1).unique(dim=0, return_inverse=True)  # (U, P + R), (N·K,)
    x, y = texts.split([prompts.shape[1], RESPONSE_LENGTH], 1)
    index, prompt = index.view(len(prompts), -1), prompts.unique(dim=0, return_inverse=True)[1]
    groups = prompt.argsort().split(prompt.bincount().tolist())  # of each prompt, its rows of index

    script, size = Path(__file__).stem, sum(p.numel() for p in GPT(outputs=1).parameters())
    print(f"{script}.py: {device}, seed {args.seed}, {args.ensemble_size} × {size:,} parameters")
    run = f"runs/{script}__{args.seed}__{time.strftime('%Y-%m-%d-%H%M%S')}"
    writer = SummaryWriter(run) if args.tensorboard else None
    if writer:
        flags = "".join(f"|{flag}|{value}|\n" for flag, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}")
    number, begin = len(groups), time.perf_counter()
    steps_each = args.epochs * math.ceil(number / args.minibatch_size)
    num_steps, step, models, stds, updates = steps_each * args.ensemble_size, 0, [], [], []
    for _ in range(args.ensemble_size):
        # Begin as the reference, which knows its way about the task, with a new head. In it, in the
        # order of prompts, and in which (as many, with replacement) members of an ensemble differ.
        model = GPT(outputs=1).to(device)
        trunk = {name: w for name, w in reference.state_dict().items() if name[:4] != "head"}
        model.load_state_dict(trunk, strict=False)
        parameters = [*model.parameters()]
        decay = args.weight_decay
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=decay, fused=True)
        drawn = torch.randint(number, (number,)) if args.ensemble_size > 1 else torch.arange(number)
        orders = [drawn[torch.randperm(number)] for _ in range(args.epochs)]
        batches = [batch for order in orders for batch in order.split(args.minibatch_size)]
        for member_step, batch in enumerate(batches, 1):
            progress = (member_step - 0.5) / steps_each
            learning_rate = args.learning_rate * min(10 * progress, 1 - progress)
            optimizer.param_groups[0]["lr"] = learning_rate
            rows = torch.cat([groups[i] for i in batch.tolist()])  # (B,)
            read, inverse = index[rows].unique(return_inverse=True)  # (u,), (B, K)
            scores = response_scores(model, x[read], y[read])[inverse]  # (B, K)
            if args.learn_from == "preferences":
                loss, metrics = preference_loss(*scores.T, verdicts[rows])
            elif args.learn_from == "labels":
                loss, metrics = label_loss(scores[:, 0], verdicts[rows])
            else:
                loss, metrics = demonstration_loss(scores[:, 0], scores[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            step += 1
            if not grad_norm.isfinite():
                sys.exit(f"error: gradient not finite in step {step}; lower --learning-rate")

            # Log the means since the last line.
            updates.append(metrics | {"loss": loss.detach(), "grad_norm": grad_norm})
            if step % max(1, num_steps // 20) and step < num_steps:
                continue
            means = {name: torch.stack([m[name] for m in updates]).mean() for name in updates[0]}
            losses = {name: means.pop(name) for name in ("loss", "grad_norm")}
            updates, speed = [], step / (time.perf_counter() - begin)
            write(writer, "losses", losses, step)
            write(writer, "rewards", means, step)
            write(writer, "charts", {"learning_rate": learning_rate}, step)
            line = f"{step / num_steps:4.0%}  loss {losses['loss']:.3f}"
            line += f"  accuracy {means['accuracies']:.3f}  margin {means['margins']:6.3f}"
            print(f"{line}  {speed:5.0f} steps/s  {(num_steps - step) / speed:3.0f} s left")
        stds.append(normalise(model, *samples))
        models.append(model)

    # Exact over the 111 responses that end. The 1000 that are cut off, which the reference writes
    # once in 200 times, would take ten times as long.
    responses = all_responses().to(device)
    ended = (responses == EOS).any(1)
    responses, table = responses[ended], response_distribution(reference, held_out, 1.0)[:, ended]
    probs = table.softmax(1)  # (N, Y)
    tables = torch.stack([score_table(model, held_out, responses) for model in models])
    rows = held_out.repeat_interleave(len(responses), 0), responses.repeat(len(held_out), 1)
    rewards = reward(*rows).double().view_as(probs)
    after = evaluate_scores(tables, torch.stack(stds), rewards, probs, args.annotator_temperature)
    if writer:
        write(writer, "eval", after, step)
        writer.close()
    if args.save_path is not None:  # whole or not at all
        part = args.save_path.with_name(args.save_path.name + ".part")
        flags = {flag: str(value) for flag, value in asdict(args).items()}
        weights = [model.state_dict() for model in models]
        torch.save({"script": f"{script}.py", "args": flags, "models": weights}, part)
        os.replace(part, args.save_path)
    line = f"held-out pair accuracy {after['accuracy']:.3f} of {after['attainable']:.3f}"
    line += f"  correlation {after['correlation']:.3f}"
    line += f"  calibration error {after['calibration_error']:.3f}"
    best = f"best of 16 {after['best_of_16']:.3f} of {after['best_of_16_attainable']:.3f}"
    line += f"  disagreement {after['disagreement']:.3f}" if args.ensemble_size > 1 else ""
    after["seconds"] = time.perf_counter() - start
    print(f"{line}  {best}  {after['seconds']:.1f} s")
    return after


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
