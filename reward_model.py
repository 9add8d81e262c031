"""Reward models for language models: learn from human feedback what makes a response good.

    minimise over r:  L(r) = -E[log σ(r(x, chosen) - r(x, rejected))]

A GPT reads prompt and response; its one output at the last token is the score r(x, y). Collect
feedback, then take gradient steps on the loss for that kind of feedback. R is the true reward and
τ how noisy the annotator is:

  preferences     The policy writes M responses to a prompt, and every two are compared. A is
                  preferred to B with probability σ((R(A) - R(B)) / τ) (Bradley & Terry 1952;
                  Christiano et al. 2017, arXiv:1706.03741). Loss: the one above. Minimum: R/τ plus
                  any constant per prompt, since the loss sees differences only.
  labels          The policy writes a response y; it is called good with probability
                  σ((R(y) - ½) / τ). Loss: binary cross-entropy. Minimum: (R - ½)/τ, with no
                  constant left free.
  demonstrations  An expert writes y with probability ∝ π_ref(y|x) · exp(R(y) / τ): maximum-entropy
                  inverse RL (Ziebart et al. 2008) with π_ref as prior. Loss: cross-entropy of
                  telling y from M responses of the policy (ranking NCE: Ma & Collins 2018,
                  arXiv:1809.01812). Minimum: R/τ plus any constant per prompt.

These are the minima for unlimited data. With less, r can memorise the annotator's noise; the weight
decay, high by default, limits this.

Finally the scores are normalised to mean 0 and standard deviation 1 on the reference's responses
(before `--uncertainty-coef` subtracts anything).

The task: given three digits, write two more and EOS so that all five sum to 20. A small GPT is
first trained on correct answers (SFT): the reference, and also the policy. With `--policy`, both
come from that file. A simulated annotator gives the feedback, or you do. To use your own task or
model, replace the sections "Task" and "Model".

    python reward_model.py --save-path rm.pt    # learn a reward; --help lists every flag
    python ppo.py --reward-model rm.pt          # maximise it: held-out success 0.59 -> 0.99
    python reward_model.py --annotate 50 --preferences mine.jsonl    # judge 50 pairs yourself
    python reward_model.py --preferences mine.jsonl                  # learn from them

A line of the file: {"prompt": "433", "chosen": "73", "rejected": "11"}; a tie also has "tie": true.
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

    # Feedback
    sft_steps: int = 100  # SFT steps that train the reference; 0: random weights
    policy: Path | None = None  # file with the policy that responds, and its reference
    learn_from: Literal["preferences", "labels", "demonstrations"] = "preferences"  # see above
    num_examples: int = 32_768  # prompts drawn, each with its preferences, label or demonstration
    num_samples: int = 4  # M: responses per prompt, compared in pairs or with a demonstration
    annotator_temperature: float = 0.5  # τ: prefers A to B with probability σ((R(A) - R(B))/τ)
    preferences: Path | None = None  # JSON Lines of pairs; default: simulate an annotator
    annotate: int | None = None  # judge pairs yourself until --preferences has this many, then stop

    # Training
    epochs: int = 2  # passes over the examples
    minibatch_size: int = 64  # examples per gradient step
    learning_rate: float = 1e-3  # peak learning rate; linear warmup over 10%, then linear decay
    max_grad_norm: float = 1.0  # maximum norm for gradient clipping
    weight_decay: float = 1.0  # of AdamW; against memorising the annotator's noise

    # Ensemble
    ensemble_size: int = 1  # number of models, trained one after another; their mean is the score
    uncertainty_coef: float = 0.0  # subtract this many standard deviations of the ensemble's scores


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
        (args.num_examples >= 1, f"--num-examples {args.num_examples} must be at least 1"),
        (args.num_samples >= 1, f"--num-samples {args.num_samples} must be at least 1"),
        (
            1e-6 < args.annotator_temperature < 1e6,
            f"--annotator-temperature {args.annotator_temperature} must be in (1e-6, 1e6)",
        ),
        (args.epochs >= 1, f"--epochs {args.epochs} must be at least 1"),
        (args.minibatch_size >= 1, f"--minibatch-size {args.minibatch_size} must be at least 1"),
        (0 < args.learning_rate < 1, f"--learning-rate {args.learning_rate} must be in (0, 1)"),
        (0 < args.max_grad_norm < 1e6, f"--max-grad-norm {args.max_grad_norm} must be in (0, 1e6)"),
        (0 <= args.weight_decay < 1e3, f"--weight-decay {args.weight_decay} must be in [0, 1000)"),
        (args.ensemble_size >= 1, f"--ensemble-size {args.ensemble_size} must be at least 1"),
        (
            0 <= args.uncertainty_coef < 1e6,
            f"--uncertainty-coef {args.uncertainty_coef} must be in [0, 1e6)",
        ),
    ]
    if args.learn_from == "preferences":
        rules.append((args.num_samples >= 2, "--num-samples 1: to compare, use 2 or more"))
    if args.save_path is not None:
        save_path = Path(os.path.realpath(args.save_path))
        is_file = save_path.is_file() or not os.path.lexists(args.save_path)  # an old or a new one
        valid = is_file and is_writable(save_path.parent)
        rules.append((valid, f"--save-path {args.save_path} must be a file in a writable folder"))
        new = args.preferences is None or str(save_path) != os.path.realpath(args.preferences)
        rules.append((new, "--save-path would overwrite --preferences; choose another file"))
        new = args.policy is None or str(save_path) != os.path.realpath(args.policy)
        rules.append((new, "--save-path would overwrite --policy; choose another file"))
    if args.annotate is not None:
        rules.append((args.annotate >= 1, f"--annotate {args.annotate} must be at least 1"))
        rules.append((args.preferences is not None, "--annotate needs --preferences FILE"))
        rules.append((sys.stdin is not None, "--annotate cannot ask: standard input is closed"))

    # Reject flags that would have no effect.
    unused = []
    if args.policy is not None:
        unused += ["sft_steps"]
    if args.ensemble_size == 1:
        unused += ["uncertainty_coef"]
    if args.learn_from == "labels":
        unused += ["num_samples"]
    if args.preferences is not None:
        unused += ["learn_from", "num_examples", "num_samples"]
    if args.annotate is not None:
        unused += ["save_path", "annotator_temperature", "epochs", "minibatch_size"]
        unused += ["learning_rate", "max_grad_norm", "weight_decay", "ensemble_size"]
    for flag in unused:
        is_default = getattr(args, flag) == getattr(Args, flag)
        name = flag.replace("_", "-")
        rules.append((is_default, f"--{name} has no effect with the other flags; leave it out"))

    for valid, error in rules:
        if not valid:
            fail(error)


# ---------------------------------------------------------------------------- Task
# Tokens 0 to 9 are the digits.
EOS = 10
VOCAB = 11
TARGET = 20
RESPONSE_LENGTH = 3  # two digits and EOS
INSTRUCTIONS = f"All five digits should sum to {TARGET}."  # for a human annotator


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


def parse_preference(line):
    """Read {"prompt": "433", "chosen": "73", "rejected": "11"}; a tie also has "tie": true.

    Returns the tokens of prompt, chosen and rejected as lists, and tie as a bool. Raises
    ValueError with what is wrong with the line.
    """
    try:
        preference = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(preference, dict):
        raise ValueError("is not a JSON object")
    for name in ("prompt", "chosen", "rejected"):
        text = preference.get(name)
        if not isinstance(text, str) or not re.fullmatch("[0-9]{0,3}", text):
            raise ValueError(f'"{name}" must be a string of at most 3 digits')
    if len(preference["prompt"]) != 3:
        raise ValueError('"prompt" must have 3 digits')
    tie = preference.get("tie", False)
    if not isinstance(tie, bool):
        raise ValueError('"tie" must be true or false')
    prompt = [int(digit) for digit in preference["prompt"]]
    chosen = [int(digit) for digit in preference["chosen"]]
    rejected = [int(digit) for digit in preference["rejected"]]
    chosen += [EOS] * (RESPONSE_LENGTH - len(chosen))  # three digits have no EOS
    rejected += [EOS] * (RESPONSE_LENGTH - len(rejected))
    return prompt, chosen, rejected, tie


def to_text(tokens):
    """The digits of a prompt or a response as a string, without EOS and padding."""
    return "".join(str(token) for token in tokens if token != EOS)


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


def load_policy(path, device):
    """Load policy and reference from a file saved by ppo.py, grpo.py, dpo.py or reinforce.py.

    Exits with an error on any other file.
    """
    policy = GPT().to(device).requires_grad_(False)
    reference = GPT().to(device).requires_grad_(False)
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        policy.load_state_dict(saved["policy"])
        reference.load_state_dict(saved["reference"])
        for weight in [*policy.parameters(), *reference.parameters()]:
            if not weight.isfinite().all():
                raise ValueError
    except Exception as error:  # a file can be wrong in any number of ways
        reason = f"missing, damaged, or without policy and reference ({type(error).__name__})"
        fail(f"--policy {path}: {reason}")
    return policy, reference


def sample_responses(policy, prompts):
    """Sample a response to each prompt at temperature 1, in chunks that fit into memory. (N, R)"""
    return torch.cat([generate(policy, chunk, 1.0) for chunk in prompts.split(256)])


# ---------------------------------------------------------------------------- Preferences
def sample_comparisons(policy, prompts, targets, annotator_temperature, num_samples):
    """Sample M responses to each prompt; for every two, a noisy annotator says which is better.

    The annotator prefers A to B with probability σ((reward of A - reward of B) / τ)
    (Bradley–Terry). Two identical responses teach nothing and are not compared.
    Returns prompts (N, P), responses (N, M, R) and wins (N, M, M): wins[n, i, j] is 1 if response i
    was preferred to response j, else 0.
    """
    responses = sample_responses(policy, prompts.repeat_interleave(num_samples, 0))  # (N · M, R)
    rewards = get_scores(targets.repeat_interleave(num_samples), responses)
    responses = responses.view(-1, num_samples, RESPONSE_LENGTH)  # (N, M, R)
    rewards = rewards.view(-1, num_samples)  # (N, M)

    # Row i and column j compare response i with response j. Each pair is judged once, where i < j.
    differences = rewards[:, :, None] - rewards[:, None, :]  # (N, M, M)
    first_wins = torch.rand_like(differences) < (differences / annotator_temperature).sigmoid()
    different = (responses[:, :, None] != responses[:, None, :]).any(3)
    judged = different.triu(diagonal=1)
    wins = judged & first_wins
    second_wins = judged & ~first_wins
    wins = wins | second_wins.transpose(1, 2)
    return prompts, responses, wins.float()


def read_preferences(path, test_prompts):
    """Read preference pairs from a JSON Lines file.

    Leaves out pairs of held-out prompts (so that the evaluation stays clean) and pairs of
    identical responses that are not marked as ties, and prints their number. Exits on a bad line.
    Returns prompts (N, P), chosen (N, R), rejected (N, R) and ties (N,), true where neither is
    better.
    """
    held_out = {tuple(prompt) for prompt in test_prompts.tolist()}
    preferences = []
    num_held_out = 0
    num_identical = 0
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--preferences {path}: cannot be read ({error})")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt, chosen, rejected, tie = parse_preference(line)
        except ValueError as error:
            fail(f"--preferences {path}: line {number}: {error}")
        if tuple(prompt) in held_out:
            num_held_out += 1
        elif chosen == rejected and not tie:
            num_identical += 1
        else:
            preferences.append((prompt, chosen, rejected, tie))
    counts = f"{num_held_out} with held-out prompts, {num_identical} of identical responses"
    if not preferences:
        fail(f"--preferences {path}: no pair to learn from ({counts})")
    if num_held_out + num_identical > 0:
        print(f"{path}: left out pairs: {counts}")
    device = test_prompts.device
    return tuple(torch.tensor(column, device=device) for column in zip(*preferences, strict=True))


def pair_wins(ties):
    """Wins (N, 2, 2) for N pairs of a chosen and a rejected response; a tie is half a win each."""
    wins = torch.zeros(len(ties), 2, 2, device=ties.device)
    wins[:, 0, 1] = torch.where(ties, 0.5, 1.0)
    wins[:, 1, 0] = torch.where(ties, 0.5, 0.0)
    return wins


def is_higher(scores, other_scores):
    """1 where a score is higher than the other, 0.5 where they are equal, 0 where it is lower."""
    return 0.5 + 0.5 * (scores - other_scores).sign()


def preference_loss(scores, wins):
    """Bradley–Terry: -log σ(score of the preferred response - score of the other).

    scores: (B, K). wins: (B, K, K), see sample_comparisons. The model reads each of the K responses
    once, for all its pairs, as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155).
    Returns the mean loss over the judged pairs, and the accuracy: how often the preferred response
    has the higher score.
    """
    margins = scores[:, :, None] - scores[:, None, :]  # (B, K, K)
    num_pairs = wins.sum().clamp(min=1)  # 0 only if no prompt has two different responses
    loss = -(wins * F.logsigmoid(margins)).sum() / num_pairs
    accuracy = (wins * is_higher(margins, 0.0)).sum() / num_pairs
    return loss, accuracy


# ---------------------------------------------------------------------------- Pointwise labels
def sample_labels(policy, prompts, targets, annotator_temperature):
    """Sample a response to each prompt and let a noisy annotator say whether it is good.

    The annotator says so with probability σ((R - ½) / τ).
    Returns prompts (N, P), responses (N, 1, R) and labels (N, 1), true where a response is good.
    """
    responses = sample_responses(policy, prompts)
    logits = (get_scores(targets, responses) - 0.5) / annotator_temperature  # (N,)
    labels = torch.rand_like(logits) < logits.sigmoid()
    return prompts, responses[:, None], labels[:, None]


def label_loss(scores, labels):
    """Binary cross-entropy: -log σ(score) if labelled good, else -log σ(-score). Both (B, 1).

    Returns the mean loss, and the accuracy: how often the score's sign agrees with the label.
    """
    margins = torch.where(labels, scores, -scores)
    accuracy = is_higher(margins, 0.0).mean()
    return -F.logsigmoid(margins).mean(), accuracy


# ---------------------------------------------------------------------------- Demonstrations
@torch.no_grad()
def response_logprobs(policy, prompts, responses):
    """Log-probability of each response, summed over its tokens. (N,)"""
    logprobs = []
    for rows in torch.arange(len(prompts), device=prompts.device).split(256):
        logits = policy.head(response_states(policy, prompts[rows], responses[rows]))
        mask = response_mask(responses[rows])
        logprobs.append(masked_sum(token_logprobs(logits, responses[rows]), mask))
    return torch.cat(logprobs)


def sample_demonstrations(policy, reference, prompts, targets, annotator_temperature, num_samples):
    """For each prompt a demonstration, drawn from p ∝ π_ref · exp(R/τ), and M policy samples.

    Returns prompts (N, P), candidates (N, 1 + M, R) with the demonstration first, and
    log_weights (N, 1 + M) = log π_ref - log π: importance weights that correct for sampling from
    the policy instead of the reference. If the policy is the reference, they are 0.
    """
    # Rejection sampling: as R ≤ 1, accept a sample of π_ref with probability exp((R - 1) / τ).
    demonstrations = prompts.new_zeros(len(prompts), RESPONSE_LENGTH)
    missing = torch.arange(len(prompts), device=prompts.device)
    attempts = 0
    while len(missing) > 0:
        attempts += 1
        if attempts > 10_000:
            fail("--learn-from demonstrations: too few are good; raise --annotator-temperature")
        responses = sample_responses(reference, prompts[missing])
        rewards = get_scores(targets[missing], responses)
        if rewards.max() > 1:
            fail("--learn-from demonstrations: no reward may exceed 1")
        accepted = torch.rand_like(rewards) < ((rewards - 1) / annotator_temperature).exp()
        demonstrations[missing[accepted]] = responses[accepted]
        missing = missing[~accepted]

    samples = sample_responses(policy, prompts.repeat_interleave(num_samples, 0))  # (N · M, R)
    samples = samples.view(len(prompts), num_samples, RESPONSE_LENGTH)
    candidates = torch.cat([demonstrations[:, None], samples], 1)

    repeated = prompts.repeat_interleave(1 + num_samples, 0)  # (N · (1 + M), P)
    ref_logprobs = response_logprobs(reference, repeated, candidates.flatten(0, 1))
    logprobs = response_logprobs(policy, repeated, candidates.flatten(0, 1))
    log_weights = (ref_logprobs - logprobs).view(len(prompts), 1 + num_samples)
    return prompts, candidates, log_weights


def demonstration_loss(scores, log_weights):
    """Ranking NCE: -log of the probability that the first candidate is the demonstration.

    scores, log_weights: (B, 1 + M). The probabilities are softmax(scores + log_weights). Because
    the softmax includes the demonstration, the minimum is at R/τ, plus any constant per prompt, for
    every M. Over the samples alone, the scores would grow too large.
    Returns the mean loss and the accuracy: how often the demonstration has a higher score than
    a sample.
    """
    losses = -(scores + log_weights).log_softmax(1)[:, 0]
    accuracy = is_higher(scores[:, :1], scores[:, 1:]).mean()
    return losses.mean(), accuracy


# ---------------------------------------------------------------------------- Evaluation
@torch.no_grad()
def normalise(members, prompts, responses):
    """Give the ensemble's mean score mean 0 and standard deviation 1 on these responses.

    The shift does not change the optimal policy. The scale makes one --kl-coef of ppo.py or grpo.py
    mean about the same for every reward model; only about, as the constants per prompt add to the
    standard deviation. The members share one scale, since all estimate the same R/τ.
    """
    scores = torch.stack([response_scores(gpt, prompts, responses) for gpt in members])  # (E, B)
    std = scores.mean(0).std(correction=0)
    if std < 1e-6:  # every response has the same score
        std = torch.ones_like(std)
    for gpt, mean in zip(members, scores.mean(1), strict=True):
        gpt.head.weight /= std
        gpt.head.bias.copy_((gpt.head.bias - mean) / std)


@torch.no_grad()
def evaluate_scores(reward_model, policy, prompts, targets, annotator_temperature):
    """Compare scores with the annotator and with the true reward, on 16 sampled pairs per prompt.

    accuracy: probability that the simulated annotator (also if a person gave the feedback) prefers
    the response with the higher score, and its standard error (treating the pairs as independent).
    bayes_accuracy: the same for the true reward; no scores can do better. deviation: standard
    deviation over the ensemble of a pair's margin (difference of scores). Pairs of identical
    responses do not count. correlation: of scores and true rewards over all prompts; the
    meaningless constants per prompt lower it.
    """
    correct = []
    bayes_correct = []
    deviation = []
    scores = []
    rewards = []
    for rows in torch.arange(len(prompts)).repeat(16).split(256):
        first = generate(policy, prompts[rows], 1.0)
        second = generate(policy, prompts[rows], 1.0)
        first_scores = reward_model(prompts[rows], first)
        second_scores = reward_model(prompts[rows], second)
        first_rewards = get_scores(targets[rows], first)
        second_rewards = get_scores(targets[rows], second)
        scores.append(first_scores)
        rewards.append(first_rewards)

        # The probability that the annotator prefers the first, and whether the scores prefer it.
        prob_first = ((first_rewards - second_rewards) / annotator_temperature).sigmoid()
        choice = is_higher(first_scores, second_scores)
        different = (first != second).any(1)
        correct.append((choice * prob_first + (1 - choice) * (1 - prob_first))[different])
        bayes_correct.append(torch.maximum(prob_first, 1 - prob_first)[different])

        first_member_scores = reward_model.member_scores(prompts[rows], first)  # (E, B)
        second_member_scores = reward_model.member_scores(prompts[rows], second)
        margins = first_member_scores - second_member_scores  # without the prompt's constant
        deviation.append(margins.std(0, correction=0)[different])
    correct = torch.cat(correct)
    scores = torch.cat(scores)
    rewards = torch.cat(rewards)
    scores = scores - scores.mean()
    rewards = rewards - rewards.mean()
    correlation = (scores * rewards).sum() / (scores.norm() * rewards.norm()).clamp(min=1e-8)
    return {
        "accuracy": correct.mean().item(),
        "accuracy_error": (correct.var() / len(correct)).sqrt().item(),
        "bayes_accuracy": torch.cat(bayes_correct).mean().item(),
        "correlation": correlation.item(),
        "deviation": torch.cat(deviation).mean().item(),
    }


# ---------------------------------------------------------------------------- Human annotator
def shown(response):
    """A response as the person sees it. One that was truncated ends in dots."""
    if EOS not in response:
        return to_text(response) + "..."
    return to_text(response) or "(nothing)"


def annotate(policy, prompts, path, number):
    """Ask a person which of two responses is better, until the file has this many pairs.

    Each pair is on disk before the next question, so stopping at any time loses nothing.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig") if path.exists() else ""
        file = path.open("a", encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--preferences {path}: cannot be continued ({error})")
    if text.strip():
        read_preferences(path, prompts[:0])  # exits on a bad line; no prompt is held out here
    if text and not text.endswith("\n"):
        file.write("\n")

    count = len([line for line in text.split("\n") if line.strip()])
    torch.manual_seed(torch.initial_seed() + count)  # other pairs than in earlier sessions
    print(f"{path} has {count} of {number} pairs. {INSTRUCTIONS}")
    num_identical = 0  # in a row
    try:
        while count < number:
            row = torch.randint(len(prompts), (1,))
            first, second = generate(policy, prompts[row].repeat(2, 1), 1.0).tolist()
            if first == second:
                num_identical += 1
                if num_identical == 10_000:
                    fail("--annotate: the policy hardly ever writes two different responses")
                continue
            num_identical = 0
            prompt = to_text(prompts[row][0].tolist())
            print(f"\n[{count + 1}] {prompt}    A: {shown(first)}    B: {shown(second)}")
            answer = ""
            while answer not in ("a", "b", "t", "q"):
                answer = input("Which is better? a, b, t for a tie, q to quit: ").strip().lower()
            if answer == "q":
                break
            pair = {"prompt": prompt, "chosen": to_text(first), "rejected": to_text(second)}
            if answer == "b":
                pair = {"prompt": prompt, "chosen": to_text(second), "rejected": to_text(first)}
            if answer == "t":
                pair["tie"] = True
            file.write(json.dumps(pair) + "\n")
            file.flush()
            count += 1
    except (EOFError, KeyboardInterrupt, UnicodeDecodeError):
        print()
    file.close()
    print(f"{path} has {count} pairs. Learn: python reward_model.py --preferences {path}")


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

    train_prompts, train_targets, test_prompts, test_targets = make_prompts(device)
    # Read the file before the SFT, so that a bad line is reported at once.
    if args.preferences is not None and args.annotate is None:
        preferences = read_preferences(args.preferences, test_prompts)

    # Reference, and the policy whose responses are judged.
    if args.policy is not None:
        policy, reference = load_policy(args.policy, device)
    else:
        reference = GPT().to(device)
        if args.sft_steps > 0:
            sft(reference, *make_demonstrations(train_prompts, train_targets), args.sft_steps)
        reference.requires_grad_(False)
        policy = reference
    if args.annotate is not None:
        annotate(policy, train_prompts, args.preferences, args.annotate)
        return {}

    # 1. Feedback. An example is a prompt, K responses to it, and their wins, label or log_weights.
    rows = torch.randint(len(train_prompts), (args.num_examples,), device=device)
    prompts = train_prompts[rows]
    targets = train_targets[rows]
    if args.preferences is not None:
        prompts, chosen, rejected, ties = preferences
        examples = (prompts, torch.stack([chosen, rejected], 1), pair_wins(ties))
    elif args.learn_from == "preferences":
        examples = sample_comparisons(
            policy, prompts, targets, args.annotator_temperature, args.num_samples
        )
    elif args.learn_from == "labels":
        examples = sample_labels(policy, prompts, targets, args.annotator_temperature)
    else:
        examples = sample_demonstrations(
            policy, reference, prompts, targets, args.annotator_temperature, args.num_samples
        )
    num_examples = len(examples[0])
    if args.learn_from == "preferences":
        wins = examples[2]
        if torch.equal(wins, wins.transpose(1, 2)):  # only ties or identical responses
            fail("preferences: no response is preferred to another, so there is nothing to learn")

    reward_model = RewardModel(args.ensemble_size, args.uncertainty_coef).to(device)
    reward_model.reference.load_state_dict(reference.state_dict())
    run_name = f"reward_model__{args.seed}__{datetime.now():%Y-%m-%d-%H%M%S-%f}"
    num_parameters = sum(p.numel() for p in reward_model.members.parameters())
    print(f"{run_name}: {num_parameters:,} parameters on {device}, {num_examples:,} examples")
    writer = None
    if args.tensorboard:
        os.makedirs(f"runs/{run_name}")  # fails if the folder exists: no two runs share one
        writer = SummaryWriter(f"runs/{run_name}")
        lines = [f"|{flag}|{value}|" for flag, value in asdict(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *lines]))

    loop_start_time = time.time()
    examples_seen = 0
    num_steps = args.epochs * math.ceil(num_examples / args.minibatch_size)
    warmup = max(1, num_steps // 10)
    log_interval = max(1, num_steps * args.ensemble_size // 20)
    for number, gpt in enumerate(reward_model.members):
        # Start from the reference's weights with a new head. Ensemble members differ in the
        # head's initialisation, the data order and the bootstrap sample.
        own_head = {"head.weight": gpt.head.weight, "head.bias": gpt.head.bias}
        gpt.load_state_dict({**reference.state_dict(), **own_head})
        parameters = [*gpt.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True
        )
        sample = torch.arange(num_examples, device=device)
        if args.ensemble_size > 1:
            sample = torch.randint(num_examples, (num_examples,), device=device)

        step = 0
        steps = []  # the metrics of each gradient step since the last log
        for _ in range(args.epochs):
            order = sample[torch.randperm(num_examples, device=device)]
            for rows in order.split(args.minibatch_size):
                # Linear warmup over the first 10% of this model's training, then linear decay to 0.
                step += 1
                decay = (num_steps - step + 1) / (num_steps - warmup + 1)
                learning_rate = args.learning_rate * min(step / warmup, decay)
                optimizer.param_groups[0]["lr"] = learning_rate

                # 2. Update: a gradient step on the loss for the kind of feedback.
                prompts, responses, feedback = [column[rows] for column in examples]
                repeated = prompts.repeat_interleave(responses.shape[1], 0)  # (B · K, P)
                scores = response_scores(gpt, repeated, responses.flatten(0, 1))
                scores = scores.view(responses.shape[:2])  # (B, K)
                if args.learn_from == "preferences":
                    loss, accuracy = preference_loss(scores, feedback)
                elif args.learn_from == "labels":
                    loss, accuracy = label_loss(scores, feedback)
                else:
                    loss, accuracy = demonstration_loss(scores, feedback)

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()

                metrics = {
                    "loss": loss.detach(),
                    "accuracy": accuracy.detach(),
                    "grad_norm": grad_norm,
                }
                steps.append(metrics)
                examples_seen += len(rows)

                # 3. Log, about twenty times.
                if step % log_interval != 0 and step < num_steps:
                    continue
                if not grad_norm.isfinite():
                    fail(f"gradient not finite by step {step}; lower --learning-rate")
                seconds = time.time() - loop_start_time
                progress = (number + step / num_steps) / args.ensemble_size
                seconds_left = seconds * (1 - progress) / progress
                means = {}
                for name in metrics:
                    means[name] = torch.stack([step_metrics[name] for step_metrics in steps]).mean()
                steps = []
                speed = examples_seen / seconds
                if writer:
                    for name in means:
                        writer.add_scalar(f"losses/{name}", means[name], examples_seen)
                    writer.add_scalar("charts/learning_rate", learning_rate, examples_seen)
                    writer.add_scalar("charts/examples_per_second", speed, examples_seen)
                    writer.flush()  # so that a killed run keeps its curves
                print(
                    f"example {examples_seen:7d}  loss {means['loss']:.3f}  "
                    f"accuracy {means['accuracy']:.3f}  "
                    f"{speed:,.1f} examples/s  {seconds_left:.0f} s left"
                )

    # Normalise on the reference's samples, evaluate on the held-out prompts, print, and save.
    reward_model.requires_grad_(False)
    rows = torch.randint(len(train_prompts), (1024,), device=device)
    responses = generate(reference, train_prompts[rows], 1.0)
    normalise(reward_model.members, train_prompts[rows], responses)
    results = evaluate_scores(
        reward_model, policy, test_prompts, test_targets, args.annotator_temperature
    )
    print(
        f"held-out pair accuracy {results['accuracy']:.3f} ± {results['accuracy_error']:.3f}  "
        f"Bayes accuracy {results['bayes_accuracy']:.3f}  "
        f"correlation {results['correlation']:.3f}  deviation {results['deviation']:.3f}  "
        f"{time.time() - start_time:.1f} s"
    )
    if args.save_path is not None:
        flags = {flag: str(value) for flag, value in asdict(args).items()}
        weights = {
            "members": [gpt.state_dict() for gpt in reward_model.members],
            "uncertainty_coef": args.uncertainty_coef,
            "reference": reference.state_dict(),
        }
        save(args.save_path, {"args": flags, **weights})
    if writer:
        for name in results:
            writer.add_scalar(f"eval/{name}", results[name], examples_seen)
        writer.close()
    return results


if __name__ == "__main__":
    # Flush every line; print ? for characters that the output's encoding lacks.
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:  # a full disk, a closed pipe
        fail(error)
