"""Imitation against trial and error, on the smallest task where RL's failures and cures all show.

Three digits are given; a network with one hidden layer answers with one of the 100 digit pairs, so
that all five sum to 20. What counts is its greedy answer to prompts it was never trained on. Task,
split and first seven rows are those of the post "Reinforcement Learning" of Tommy's Blog. The loss
is -sum(credit · log π(answer | prompt)) in all rows; what differs is which answers get credit.

* Supervised learning (SL) imitates: all right answers get the same. It learns the training
  prompts by heart; weight decay makes it generalise.
* Reinforcement learning (RL) tries: sampled answers get reward - baseline, and all answers a bonus
  of ent_coef · π · -log π. Paid only for right answers it collapses: what is sampled is reinforced,
  so is sampled more. The bonus keeps other answers alive. Pay for near misses ("distance") teaches
  from the first epoch on, but settles for them; a sharper reward does not. SL then RL starts where
  pay is common.
* Beyond the post, RL that generalises almost perfectly without a label ("rl-improved"). The loss is
  least for π ∝ exp(reward / ent_coef). With a reward that is a parabola in the sum, those logits
  are linear in the prompt (its square is the same for all answers and cancels): the easiest thing
  there is to carry over to new prompts. As near misses then cost next to nothing, noise must be low
  (a baseline, a learning rate that falls to 0) and the bonus must fade in the end. Labels beside
  it ("joint") are followed early, then faded: imitation to the last would learn by heart again.

    python digits_sum20.py                               # the whole ladder, a row a core: minutes
    python digits_sum20.py --num-seeds 10                # mean ± standard deviation
    python digits_sum20.py --method rl --ent-coef 0.05   # one row, with a knob turned
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26", "tyro>=0.9", "tensorboard>=2.16"]
# ///

import math
import os
import random
import signal
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter

SL = {"learning_rate": 0.01, "learning_rate_final": None, "weight_decay": 0.0}
RL = SL | {"learning_rate": 0.015, "reward": "exact", "ent_coef": 0.0, "ent_coef_final": None}
RL |= {"baseline": "none", "samples_per_prompt": 0}
SHARP = RL | {"reward": "sharp", "ent_coef": 0.15}
IMPROVED = RL | {"reward": "square", "baseline": "rloo", "samples_per_prompt": 8}
IMPROVED |= {"ent_coef": 0.3, "ent_coef_final": 0.02, "learning_rate_final": 0.0}
METHODS = {  # the rows of the ladder: all the knobs that a row reads, and its values of them
    "sl": SL,
    "sl-weight-decay": SL | {"weight_decay": 0.001},
    "rl": RL,
    "rl-entropy": RL | {"ent_coef": 0.15},
    "rl-distance": SHARP | {"reward": "distance"},
    "rl-sharp": SHARP,
    "sl-then-rl": SHARP | {"sft_fraction": 0.1},
    "rl-improved": IMPROVED,
    "sl-then-improved": IMPROVED | {"sft_fraction": 0.1},
    "joint": IMPROVED | {"sl_coef": 0.07, "sl_coef_final": 0.0},
}
KNOBS = METHODS["joint"].keys() | METHODS["sl-then-rl"].keys()
# Held-out accuracy in per cent that the post has for its rows, of one seed each; none for plain SL.
POST = dict(zip(METHODS, (None, 91.26, 18.03, 85.25, 67.76, 91.26, 98.91), strict=False))


@dataclass
class Args:
    seed: int = 1  # seed of everything random but the split into training and held-out prompts
    tensorboard: bool = True  # write curves and more to runs/, for tensorboard --logdir runs
    method: Literal[("ladder", *METHODS)] = "ladder"  # one row of the ladder, or all of them
    num_seeds: int = 1  # runs of each row, with seeds --seed, --seed + 1, ...
    epochs: int = 10_000  # gradient steps, each on all training prompts
    hidden_dim: int = 64  # hidden units

    # The knobs. None leaves the row's own value; METHODS says which row reads which.

    learning_rate: float | None = None  # step size of Adam (a warm start has SL's own)
    learning_rate_final: float | None = None  # step size it falls to, on a line, by the last epoch
    weight_decay: float | None = None  # L2 penalty, in the gradient (a warm start has SL's own)
    reward: Literal["exact", "distance", "sharp", "square"] | None = None  # what is paid for
    ent_coef: float | None = None  # bonus for a nat of entropy
    ent_coef_final: float | None = None  # bonus it falls to, on a line, by the last epoch
    baseline: Literal["none", "rloo"] | None = None  # rloo: the mean of a prompt's other samples
    samples_per_prompt: int | None = None  # an epoch; 0: one for each right answer, as in the post
    sft_fraction: float | None = None  # share of the epochs for a warm start: SL with weight decay
    sl_coef: float | None = None  # weight of the SL loss beside the RL loss
    sl_coef_final: float | None = None  # weight it falls to, on a line, by the last epoch


def check(args, flags, valid, why):
    """End the program, status 2, with one line if a value is neither None (off) nor valid."""
    for flag in flags.split():
        value = getattr(args, flag)
        if value is not None and not valid(value):
            print(f"error: --{flag.replace('_', '-')} {value}: {why}", file=sys.stderr)
            sys.exit(2)


def choose_knobs(args, method):
    """The values of a row's knobs: its own, replaced by the flags that were given."""
    own = METHODS.get(method, {})
    return own | {flag: getattr(args, flag) for flag in own if getattr(args, flag) is not None}


def check_args(args):
    for flag in sorted(KNOBS):
        readers = [method for method in METHODS if flag in METHODS[method]]
        why = f"--method {args.method} ignores it; it is for {', '.join(readers)}"
        check(args, flag, lambda v, readers=readers: args.method in readers, why)
    check(args, "num_seeds epochs hidden_dim", lambda v: v >= 1, "must be 1 or more")
    check(args, "learning_rate", lambda v: 0 < v < 2**63, "must be above 0, and finite")
    check(args, "sft_fraction", lambda v: 0 <= v < 1, "must be 0 or more, and below 1 to leave RL")
    amounts = "seed learning_rate_final weight_decay ent_coef ent_coef_final samples_per_prompt"
    amounts += " sl_coef sl_coef_final"
    check(args, amounts, lambda v: 0 <= v < 2**63, "must be 0 or more, and finite")
    knobs = choose_knobs(args, args.method)
    if knobs.get("baseline") == "rloo":
        enough, why = knobs["samples_per_prompt"] > 1, "rloo needs --samples-per-prompt 2 or more"
        check(args, "samples_per_prompt baseline", lambda v: enough, why)
    runs = "runs" if os.path.lexists("runs") else "."
    usable = os.path.isdir(runs) and os.access(runs, os.W_OK)
    check(args, "tensorboard", lambda v: usable or not v, "cannot fill runs/; use --no-tensorboard")


# ------------------------------------------------------------------ The task: replace by your own
TARGET = 20


def split_prompts():
    """The 912 prompts that two digits can complete, (N, 3): 729 to train on, 183 held out.

    It is the post's own split, which shuffles a set. Such a set has had the same order in every
    CPython since 3.8, so its figures and ours are about the same held-out prompts.
    """
    prompts = list({p for p in product(range(10), repeat=3) if TARGET - 18 <= sum(p) <= TARGET})
    random.Random(-1).shuffle(prompts)
    return torch.tensor(prompts[:729]), torch.tensor(prompts[729:])


def answer_sums(prompts):
    """Sum of all five digits for each of the A = 100 answers, divmod(a, 10): (N, 3) to (N, A)."""
    answers = torch.arange(100)
    return prompts.sum(1, keepdim=True) + answers // 10 + answers % 10


def reward_table(sums, kind):
    """What is paid for each sum; of the table, the learner sees the answers that it samples.

    off by     0     1     2     5     10     16
    exact      1     0     0     0     0      0
    distance   1     0.9   0.8   0.5   0      0
    sharp      1     0.61  0.37  0.08  0.007  0.000
    square     1     0.99  0.96  0.75  0      -1.56
    """
    miss = (sums - TARGET).abs()
    near = {"distance": (1 - miss / 10).relu(), "sharp": (-miss / 2).exp()}
    return (near | {"exact": miss == 0, "square": 1 - (miss / 10) ** 2})[kind].float()


# ------------------------------------------------------------------ The policy
def one_hot(prompts):
    """Inputs of the network: prompts (N, 3) to (N, 30)."""
    return F.one_hot(prompts, 10).flatten(1).float()


def make_model(hidden_dim):
    """From inputs (N, 30) to the logits of all answers (N, A)."""
    return nn.Sequential(nn.Linear(30, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 100))


def sample_actions(probs, uniforms):
    """Answers (N, M) at the given quantiles (N, M) of each prompt's distribution (N, A).

    torch.multinomial, with one sample a row, would take longer than all the rest of the epoch.
    """
    cumulative = probs.cumsum(1)
    quantiles = uniforms * cumulative[:, -1:]  # the last entry is 1 only up to rounding
    return torch.searchsorted(cumulative, quantiles, right=True).clamp(max=probs.shape[1] - 1)


# ------------------------------------------------------------------ Who gets the credit
# The post trains on 4,504 rows, one for each right answer to a prompt. Those of a prompt have the
# same logits, so 729 prompts with weights give the same loss for a sixth of the work.


def sample_weights(valid, samples_per_prompt):
    """Share of each sample in the mean over all, 0 for a slot not in use: (N, A) to (N, M).

    With 0, as in the post, a prompt has as many samples as right answers (where valid is true).
    That number is a label of sorts; RL by itself treats all prompts alike.
    """
    counts = valid.sum(1, keepdim=True)
    if samples_per_prompt:
        counts = torch.full_like(counts, samples_per_prompt)
    return (torch.arange(counts.max()) < counts) / counts.sum()


def compute_advantages(rewards, baseline):
    """Rewards (N, M) minus the mean of the prompt's other samples: less noise, equal gradient."""
    if baseline == "none":
        return rewards
    # With the sample itself in the mean, the gradient would shrink by (M - 1) / M.
    return (rewards - rewards.mean(1, keepdim=True)) / (1 - 1 / rewards.shape[1])


def rl_credit(logits, probs, actions, advantages, weights, ent_coef):
    """REINFORCE with an entropy bonus. logits, probs: (N, A), as is the credit; others (N, M).

    The gradient of the entropy is that of paying -log π, as log π changes by 0 on average. For the
    same reason the logits will do: they are log π but for a constant of the prompt.
    """
    bonus = logits * probs * (-ent_coef * weights.sum(1, keepdim=True))
    return bonus.scatter_add_(1, actions, weights * advantages)


def logit_gradient(credit, probs):
    """Gradient (N, A) of the loss -sum(credit · log π), with respect to the logits.

    Written out, it takes a fifth of the time that autograd takes through log_softmax.
    """
    return probs * credit.sum(1, keepdim=True) - credit


# ------------------------------------------------------------------ Training and evaluation
def scheduled(knobs, name, progress):
    """A knob on its line from the first epoch (progress 0) to after the last (progress 1)."""
    first, final = knobs[name], knobs[name + "_final"]
    return first if final is None else first + (final - first) * progress


def train(model, prompts, knobs, num_epochs):
    """Train in place, by RL if the knobs have a reward, else by SL; pause after each epoch."""
    inputs, sums = one_hot(prompts), answer_sums(prompts)
    valid = sums == TARGET  # (N, A)
    labels = valid / valid.sum()
    if "reward" in knobs:
        rewards = reward_table(sums, knobs["reward"])  # (N, A)
        weights = sample_weights(valid, knobs["samples_per_prompt"])  # (N, M)
        used = weights > 0
    # Not AdamW: the post's weight decay is part of the gradient. Fused is the same, only faster.
    decay = knobs["weight_decay"]
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=decay, fused=True)
    for epoch in range(num_epochs):
        progress = epoch / num_epochs
        optimizer.param_groups[0]["lr"] = scheduled(knobs, "learning_rate", progress)
        logits, credit = model(inputs), labels  # (N, A)
        fixed = logits.detach()
        probs = fixed.softmax(1)
        if "reward" in knobs:
            # Slots not in use look up 0: known places are found in less time than random ones.
            actions = sample_actions(probs, torch.rand(weights.shape) * used)
            advantages = compute_advantages(rewards.gather(1, actions), knobs["baseline"])
            ent_coef = scheduled(knobs, "ent_coef", progress)
            credit = rl_credit(fixed, probs, actions, advantages, weights, ent_coef)
        if "sl_coef" in knobs:
            credit = credit + scheduled(knobs, "sl_coef", progress) * labels
        optimizer.zero_grad()
        logits.backward(logit_gradient(credit, probs))
        optimizer.step()
        yield


@torch.no_grad()
def measure(model, prompts):
    """Accuracy and number of distinct greedy answers; cross-entropy with all right answers."""
    logprobs, valid = model(one_hot(prompts)).log_softmax(1), answer_sums(prompts) == TARGET
    answers = logprobs.argmax(1, keepdim=True)  # (N, 1)
    return {
        "accuracy": valid.gather(1, answers).float().mean().item(),
        "distinct": len(answers.unique()),
        "cross_entropy": -logprobs[valid].mean().item(),
        "entropy": -(logprobs.exp() * logprobs).sum(1).mean().item(),
    }


def print_progress(method, seed, epoch, metrics, seconds_left):
    """A line about a run, below the heads that main prints."""
    print(
        f"{method:16} {seed:5} {epoch:6} {metrics['train/accuracy']:7.1%}"
        f" {metrics['eval/accuracy']:9.1%} {metrics['eval/distinct']:9}"
        f" {metrics['eval/cross_entropy']:14.4f}{seconds_left:9.0f} s"
    )


def print_predictions(prompts, answers):
    """A table of prompts (N, 3) and greedy answers (N,), both lists."""
    print("|   input   | output | sum |       |\n|-----------|--------|-----|-------|")
    for prompt, answer in zip(prompts, answers, strict=True):
        output = [answer // 10, answer % 10]
        total = sum(prompt + output)
        print(f"| {prompt} | {output} | {total:3} | {'right' if total == TARGET else 'wrong'} |")


def print_results(results):
    """Means over seeds ± standard deviation; a star marks a figure of the post out of our range."""
    heads = ("row", "train %", "held-out %", "distinct", "range", "seconds", "post %")
    print("\n{:16}{:>13}{:>13}{:>13}{:>13}{:>9}{:>9}".format(*heads))
    for method, runs in results.items():
        line = f"{method:16}"
        for name, unit in (("train/accuracy", 0.01), ("eval/accuracy", 0.01), ("eval/distinct", 1)):
            values = [run[name] / unit for run in runs]
            std = f" ± {statistics.stdev(values):4.1f}" if len(values) > 1 else ""
            line += f"{statistics.mean(values):.1f}{std}".rjust(13)
        held_out = [round(100 * run["eval/accuracy"], 2) for run in runs]  # as the post rounds
        low, high, post = min(held_out), max(held_out), POST.get(method)
        star = "*" if post and len(runs) > 1 and not low <= post <= high else ""
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"{line}{f'{low:.1f}-{high:.1f}':>13}{seconds:9.1f}{post or '-':>9}{star}")


def run(args, folder, alone, method, seed):
    """Train one row with one seed. Returns its results, and its answers to ten held-out prompts.

    Curves go to the folder, if there is one. A run that is alone says how it gets on.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)  # runs share the cores, and should not differ with their number
    torch.manual_seed(seed)
    (train_prompts, held_out), knobs = split_prompts(), choose_knobs(args, method)
    model = make_model(args.hidden_dim)
    writer = SummaryWriter(f"{folder}/{method}-{seed}") if folder else None
    warm = round(knobs.get("sft_fraction", 0) * args.epochs)
    # One generator after the other: like the post, RL begins with a new optimizer.
    warm_start = train(model, train_prompts, METHODS["sl-weight-decay"], warm)
    steps = chain(warm_start, train(model, train_prompts, knobs, args.epochs - warm))
    for epoch, _ in enumerate(steps):
        last = epoch == args.epochs - 1
        if epoch % max(1, args.epochs // 100) and not last:
            continue
        metrics = {f"train/{name}": v for name, v in measure(model, train_prompts).items()}
        metrics |= {f"eval/{name}": v for name, v in measure(model, held_out).items()}
        if not math.isfinite(metrics["train/cross_entropy"]):
            sys.exit(f"error: {method} diverged by epoch {epoch}; lower --learning-rate")
        for tag, value in metrics.items() if writer else ():
            writer.add_scalar(tag, value, epoch)
        seconds = time.perf_counter() - start
        if alone and epoch % max(1, args.epochs // 10) == 0 and not last:
            left = seconds * (args.epochs / (epoch + 1) - 1)
            print_progress(method, seed, epoch, metrics, left)
    if writer:
        writer.close()
    with torch.no_grad():
        answers = model(one_hot(held_out[:10])).argmax(1)
    return metrics | {"seconds": seconds}, answers.tolist()


def main(args: Args) -> dict[str, float]:
    """Run one row, or all of them. Returns means over the seeds, by "row/result"."""
    check_args(args)
    start = time.perf_counter()
    methods = METHODS if args.method == "ladder" else [args.method]
    runs = list(product(methods, range(args.seed, args.seed + args.num_seeds)))
    print(f"digits_sum20.py: cpu, seed {args.seed}, {len(runs)} runs, {args.hidden_dim} units")
    folder = f"runs/digits_sum20__{args.seed}__{time.strftime('%Y-%m-%d-%H%M%S')}"
    if args.tensorboard:
        rows = "".join(f"|{flag}|{value}|\n" for flag, value in vars(args).items())
        with SummaryWriter(folder) as writer:
            writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}")
    print("row               seed  epoch   train  held-out  distinct  held-out loss  time left")
    results, answers = {method: [] for method in methods}, {}
    train_one = partial(run, args, args.tensorboard and folder, len(runs) == 1)
    size, context = min(len(runs), os.cpu_count()), get_context("spawn")
    end_at_ctrl_c = signal.signal, (signal.SIGINT, signal.SIG_DFL)  # and not take up the next run
    with ProcessPoolExecutor(size, context, *end_at_ctrl_c) as pool:
        # Several runs share the cores, a process each, unless this file was imported: a process
        # would begin by running the program that imported it.
        share = pool.map if len(runs) > 1 and __name__ == "__main__" else map
        done = share(train_one, *zip(*runs, strict=True))
        for (method, seed), (metrics, answers[method]) in zip(runs, done, strict=True):
            results[method].append(metrics)
            number = sum(map(len, results.values()))
            left = (time.perf_counter() - start) * (len(runs) / number - 1)
            print_progress(method, seed, args.epochs - 1, metrics, left)
    print_results(results)
    best = max(results, key=lambda method: results[method][-1]["eval/accuracy"])
    collapsed = min(results, key=lambda method: results[method][-1]["eval/distinct"])
    for method in dict.fromkeys((best, collapsed)):
        print(f"\nGreedy answers of {method} to held-out prompts, seed {runs[-1][1]}:")
        print_predictions(split_prompts()[1][:10].tolist(), answers[method])
    return {
        f"{method}/{name}": statistics.mean(run[name] for run in rows)
        for method, rows in results.items()
        for name in rows[0]
    }


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
