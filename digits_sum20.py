"""Imitation against trial and error, on the smallest task where RL's failures and cures all show.

Three digits are given; a network with one hidden layer answers with one of the 100 digit pairs, so
that all five digits sum to 20. What counts is its greedy answer to prompts it never trained on.
The task is that of the post "Reinforcement Learning" of Tommy's Blog, as are the first seven rows.

* Supervised learning (SL) imitates labels: cross-entropy with every right answer. It learns the
  training prompts by heart; weight decay makes it generalise.
* Reinforcement learning (RL) samples its own answers and reinforces the ones that were paid:

      loss = -E[(reward - baseline) · log π(answer | prompt)] - ent_coef · entropy(π)

  Paid only for a right answer it collapses: what is sampled is reinforced, so is sampled more.
* The entropy bonus keeps other answers alive. A reward for coming close ("distance") teaches from
  the first epoch on, but settles for near misses; a sharper one does not. SL then RL starts where
  RL is often paid.
* Beyond the post, RL without labels ("rl-improved") and with ("joint"). The loss above is least for
  π ∝ exp(reward / ent_coef). If the reward is a parabola in the sum, those logits are bilinear in
  prompt and answer, the simplest function there is for a network to carry over to new prompts. But
  near misses then cost little: sampling noise must be small (8 answers a prompt, each measured
  against the other 7: Kool et al. 2019), and the bonus must fade once it has done its work.

    python digits_sum20.py                               # the whole ladder, in about 100 s
    python digits_sum20.py --num-seeds 10                # mean ± standard deviation
    python digits_sum20.py --method rl --ent-coef 0.05   # one row, with a knob turned
    tensorboard --logdir runs                            # curves
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26", "tyro>=0.9", "tensorboard>=2.16"]
# ///

import math
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
import tyro
from torch import nn

SL = {"learning_rate": 0.01, "learning_rate_final": None, "weight_decay": 0.0}
RL = SL | {"learning_rate": 0.015, "reward": "exact", "ent_coef": 0.0, "ent_coef_final": None}
RL |= {"baseline": "none", "samples_per_prompt": 0}
SHARP = RL | {"ent_coef": 0.15, "reward": "sharp"}
IMPROVED = RL | {"reward": "square", "baseline": "rloo", "samples_per_prompt": 8}
IMPROVED |= {"ent_coef": 0.3, "ent_coef_final": 0.02, "learning_rate_final": 0.0}
# The rows of the ladder: every knob that a row reads, and its value.
METHODS = {
    "sl": SL,
    "sl-weight-decay": SL | {"weight_decay": 0.001},
    "rl": RL,
    "rl-entropy": RL | {"ent_coef": 0.15},
    "rl-distance": SHARP | {"reward": "distance"},
    "rl-sharp": SHARP,
    "sl-then-rl": SHARP | {"sft_fraction": 0.1},
    "rl-improved": IMPROVED,
    "sl-then-improved": IMPROVED | {"sft_fraction": 0.1},
    "joint": IMPROVED | {"sl_coef": 0.05, "sl_coef_final": 0.0},
}
KNOBS = tuple(METHODS["joint"] | METHODS["sl-then-rl"])
# Held-out accuracy in per cent that the post prints for its rows, of one seed; none for SL alone.
POST = dict(zip(METHODS, (None, 91.26, 18.03, 85.25, 67.76, 91.26, 98.91), strict=False))


@dataclass
class Args:
    seed: int = 1
    """seed of everything random, except the split into training and held-out prompts"""
    tensorboard: bool = True
    """write curves and hyperparameters to runs/"""
    method: Literal[("ladder", *METHODS)] = "ladder"
    """one row of the ladder, or all; a flag below that is None keeps the row's own value"""
    num_seeds: int = 1
    """runs of each row, with seeds --seed, --seed + 1, ..."""
    hidden_dim: int = 64
    """hidden units of the network"""
    epochs: int = 10_000
    """gradient steps, each on all training prompts"""

    learning_rate: float | None = None
    """step size of Adam at the first epoch (after a warm start: the first RL epoch)"""
    learning_rate_final: float | None = None
    """the same after the last epoch, linear in between; constant where the row has None"""
    weight_decay: float | None = None
    """L2 penalty, added to the gradient; with a warm start, that of the RL epochs"""
    reward: Literal["exact", "distance", "sharp", "square"] | None = None
    """what is paid for: see reward_table()"""
    ent_coef: float | None = None
    """bonus for a nat of entropy, at the first epoch"""
    ent_coef_final: float | None = None
    """the same after the last epoch, linear in between; constant where the row has None"""
    baseline: Literal["none", "batch-mean", "rloo"] | None = None
    """subtracted from a reward: nothing, the mean of all other samples, or of its own prompt's"""
    samples_per_prompt: int | None = None
    """answers sampled an epoch; 0 is the post's: as many as the prompt has right answers"""
    sft_fraction: float | None = None
    """share of the epochs for SL with weight decay, before RL"""
    sl_coef: float | None = None
    """weight of the SL loss beside the RL loss, at the first epoch"""
    sl_coef_final: float | None = None
    """the same after the last epoch, linear in between"""


def refuse(flag: str, value: object, why: str) -> NoReturn:
    """End the program, status 2, with one line: which flag, what value, why and what to do."""
    name = "--" + flag.replace("_", "-")
    print(f"{Path(sys.argv[0]).name}: error: {name} {value}: {why}", file=sys.stderr)
    raise SystemExit(2)


def choose_knobs(args: Args, method: str) -> dict:
    """The knobs of a row: its own values, replaced by the flags that were given."""
    given = {flag: getattr(args, flag) for flag in METHODS[method]}
    return METHODS[method] | {flag: value for flag, value in given.items() if value is not None}


def check_args(args: Args) -> None:
    """Refuse what cannot work or would be ignored, before anything is written."""
    for flag in KNOBS:
        value, readers = getattr(args, flag), [m for m in METHODS if flag in METHODS[m]]
        if value is not None and args.method not in readers:
            refuse(flag, value, f"--method {args.method} ignores it; try {' or '.join(readers)}")
    for flag in ("num_seeds", "hidden_dim", "epochs"):
        if getattr(args, flag) < 1:
            refuse(flag, getattr(args, flag), "must be at least 1")
    knobs = choose_knobs(args, args.method) if args.method in METHODS else {}
    for flag, value in [("seed", args.seed), *knobs.items()]:
        if isinstance(value, int | float) and not 0 <= value < float("inf"):
            refuse(flag, value, "must be a finite number, 0 or more")
    if args.learning_rate == 0:
        refuse("learning_rate", 0, "learns nothing; must be above 0")
    if knobs.get("sft_fraction", 0) >= 1:
        refuse("sft_fraction", args.sft_fraction, "leaves no RL; use --method sl-weight-decay")
    if knobs.get("baseline") == "rloo" and knobs["samples_per_prompt"] < 2:
        refuse("baseline", "rloo", "compares a prompt's answers; set --samples-per-prompt above 1")


# ---------------------------------------------------------------- The task: replace with your own

TARGET = 20


def make_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """The 912 prompts that two digits can complete, split into 729 to train on and 183 held out.

    The split does not depend on --seed: every script and every run has the same. (N, 3) each.
    """
    digits = torch.cartesian_prod(*[torch.arange(10)] * 3)
    prompts = digits[(digits.sum(1) <= TARGET) & (digits.sum(1) >= TARGET - 18)]
    order = list(range(len(prompts)))
    random.Random(TARGET).shuffle(order)
    return prompts[order[:729]], prompts[order[729:]]


def answer_sums(prompts):
    """Sum of all five digits for each of the A = 100 answers: prompts (N, 3) to (N, A).

    Answer a is the digits a // 10 and a % 10.
    """
    answers = torch.arange(100)
    return prompts.sum(1, keepdim=True) + answers // 10 + answers % 10


def reward_table(sums, kind):
    """What is paid for each sum; of this table the learner sees the answers that it samples.

    off by     0     1     2     5     10     16
    exact      1     0     0     0     0      0
    distance   1     0.9   0.8   0.5   0      0
    sharp      1     0.61  0.37  0.08  0.007  0.000
    square     1     0.99  0.96  0.75  0      -1.56
    """
    miss = (sums - TARGET).abs().float()
    if kind == "exact":
        return (miss == 0).float()
    if kind == "distance":
        return (1 - miss / 10).clamp(min=0)
    return torch.exp(-miss / 2) if kind == "sharp" else 1 - (miss / 10) ** 2


# ---------------------------------------------------------------- The policy


def one_hot(prompts):
    """Inputs of the network: prompts (N, 3) to (N, 30)."""
    return F.one_hot(prompts, 10).flatten(1).float()


def make_model(hidden_dim):
    """Network from inputs (N, 30) to the logits of all answers (N, A)."""
    return nn.Sequential(nn.Linear(30, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 100))


def sample_actions(probs, uniforms):
    """Answers (N, M) at the given quantiles (N, M) of each prompt's distribution (N, A).

    A cumulative table made once a prompt serves all of its samples. torch.multinomial, one sample
    a row, would cost several times as much as the rest of the epoch.
    """
    cumulative = probs.cumsum(1)
    quantiles = uniforms * cumulative[:, -1:]  # the last entry is 1 only up to rounding
    actions = torch.searchsorted(cumulative, quantiles, right=True)
    return actions.clamp(max=probs.shape[1] - 1)


# ---------------------------------------------------------------- The losses
# The post trains on rows, one for each right answer to each prompt. Rows of a prompt have the same
# logits, so 4,500 rows are 729 prompts with weights: the same loss for a sixth of the work.


def sample_weights(valid, samples_per_prompt):
    """Share of each sample in the mean over all samples, 0 for a slot not in use. (N, M)

    valid: (N, A), true for right answers. As in the post, a prompt is sampled as often as it has
    right answers; but that number is knowledge of labels. RL by itself knows prompts only, and
    samples all of them equally often.
    """
    counts = valid.sum(1, keepdim=True)
    if samples_per_prompt:
        counts = torch.full_like(counts, samples_per_prompt)
    return (torch.arange(counts.max()) < counts) / counts.sum()


def compute_advantages(rewards, weights, baseline):
    """Rewards (N, M) less the mean of other samples, which leaves the expected gradient as it is.

    With the sample itself in the mean, the gradient would shrink by (n - 1) / n. weights: (N, M).
    """
    if baseline == "none":
        return rewards
    dims = (0, 1) if baseline == "batch-mean" else 1
    n = (weights > 0).sum(dims, keepdim=True)
    mean = torch.where(weights > 0, rewards, 0.0).sum(dims, keepdim=True) / n
    return (rewards - mean) * n / (n - 1)  # the reward minus the mean of the other n - 1


def sl_loss(logprobs, targets):
    """Cross-entropy over all rows. logprobs, targets: (N, A); targets are shares of the rows."""
    loss = -(targets * logprobs).sum()
    return loss, {"sl_loss": loss.detach()}


def rl_loss(logprobs, probs, actions, advantages, weights, ent_coef):
    """REINFORCE with an entropy bonus.

    logprobs and probs, its exponential: (N, A). actions, advantages, weights: (N, M).
    """
    policy_loss = -(weights * advantages * logprobs.gather(1, actions)).sum()
    entropy = -(probs * logprobs).sum(1) @ weights.sum(1)
    metrics = {"policy_loss": policy_loss.detach(), "entropy": entropy.detach()}
    return policy_loss - ent_coef * entropy, metrics


# ---------------------------------------------------------------- Training and evaluation


def scheduled(knobs, name, progress):
    """Value of a knob on its line from the first epoch (progress 0) to after the last (1)."""
    first, final = knobs[name], knobs[name + "_final"]
    return first if final is None else first + (final - first) * progress


def train(model, knobs, num_epochs):
    """Train in place, by RL if the knobs have a reward, else by SL; yield metrics each step."""
    prompts, _ = make_prompts()
    inputs, sums = one_hot(prompts), answer_sums(prompts)
    valid = sums == TARGET  # (N, A)
    targets = valid / valid.sum()
    if "reward" in knobs:
        rewards = reward_table(sums, knobs["reward"])  # (N, A)
        weights = sample_weights(valid, knobs["samples_per_prompt"])  # (N, M)
    # Weight decay is the post's, added to the gradient; fused is the same arithmetic, only faster.
    weight_decay = knobs["weight_decay"]
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=weight_decay, fused=True)
    for epoch in range(num_epochs):
        progress = epoch / num_epochs
        optimizer.param_groups[0]["lr"] = scheduled(knobs, "learning_rate", progress)
        logprobs = model(inputs).log_softmax(1)
        if "reward" in knobs:
            probs, ent_coef = logprobs.exp(), scheduled(knobs, "ent_coef", progress)
            actions = sample_actions(probs.detach(), torch.rand(weights.shape))
            sampled = rewards.gather(1, actions)
            advantages = compute_advantages(sampled, weights, knobs["baseline"])
            loss, metrics = rl_loss(logprobs, probs, actions, advantages, weights, ent_coef)
            if "sl_coef" in knobs:
                imitation, more = sl_loss(logprobs, targets)
                loss = loss + scheduled(knobs, "sl_coef", progress) * imitation
                metrics |= more
        else:
            loss, metrics = sl_loss(logprobs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield metrics


@torch.no_grad()
def greedy_results(model, prompts):
    """Accuracy and number of distinct greedy answers; cross-entropy with all right answers."""
    logprobs = model(one_hot(prompts)).log_softmax(1)
    valid = answer_sums(prompts) == TARGET  # (N, A)
    answers = logprobs.argmax(1, keepdim=True)  # (N, 1)
    accuracy = valid.gather(1, answers).float().mean().item()
    cross_entropy = sl_loss(logprobs, valid / valid.sum())[0].item()
    return {"accuracy": accuracy, "distinct": len(answers.unique()), "cross_entropy": cross_entropy}


def print_predictions(model, prompts):
    """A table of greedy answers to prompts (N, 3)."""
    print("|   input   | output | sum |       |\n|-----------|--------|-----|-------|")
    answers = model(one_hot(prompts)).argmax(1)
    for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
        output = [answer // 10, answer % 10]
        total = sum(prompt + output)
        print(f"| {prompt} | {output} | {total:3} | {'right' if total == TARGET else 'wrong'} |")


def make_writer(args: "Args"):
    """TensorBoard writer on a new folder in runs/, holding the arguments as a table; or None."""
    if not args.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always there

    name = f"{Path(__file__).stem}__{args.seed}__{time.strftime('%Y-%m-%d-%H%M%S')}"
    try:
        writer = SummaryWriter(f"runs/{name}")
    except OSError as error:
        refuse("tensorboard", True, f"runs/{name}: {error.strerror}; or use --no-tensorboard")
    rows = [f"|{flag}|{value}|" for flag, value in asdict(args).items()]
    writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *rows]))
    return writer


def log(writer, name, epoch, metrics):
    """Write one point of every curve; a value that is not finite ends the program, status 1."""
    if not all(math.isfinite(value) for value in metrics.values()):
        print(f"error: {name} diverged by epoch {epoch}; lower --learning-rate", file=sys.stderr)
        raise SystemExit(1)
    for tag, value in metrics.items() if writer is not None else ():
        writer.add_scalar(f"{tag}/{name}", value, epoch)


def mean_std(values):
    """Their mean, and ± their standard deviation if there are several."""
    std = f" ± {statistics.stdev(values):4.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{std}"


def print_results(results):
    """One line a row of the ladder; the post's figure has a star if it is outside our range."""
    heads = ("row", "train %", "held-out %", "range", "distinct", "seconds", "post %")
    print("\n{:15}{:>13}{:>13}{:>13}{:>13}{:>9}{:>9}".format(*heads))
    for method, runs in results.items():
        column = {name: [run[name] for run in runs] for name in runs[0]}
        train, held_out = (
            [100 * x for x in column[k]] for k in ("train/accuracy", "eval/accuracy")
        )
        low, high, post = min(held_out), max(held_out), POST.get(method)
        star = "" if post is None or len(runs) == 1 or low <= post <= high else "*"
        print(
            f"{method:15}{mean_std(train):>13}{mean_std(held_out):>13}{f'{low:.1f}-{high:.1f}':>13}"
            f"{mean_std(column['eval/distinct']):>13}{statistics.mean(column['seconds']):9.1f}"
            f"{post or '-':>9}{star}"
        )


def main(args: Args) -> dict[str, float]:
    """Run one row, or all of them. Returns means over the seeds, by "row/result"."""
    check_args(args)
    torch.set_num_threads(1)  # the tensors are so small that a second thread only costs time
    writer, start = make_writer(args), time.perf_counter()
    methods = METHODS if args.method == "ladder" else [args.method]
    runs = [(method, args.seed + i) for method in methods for i in range(args.num_seeds)]
    train_prompts, held_out = make_prompts()
    print(
        f"digits_sum20.py: {len(runs)} runs, {args.hidden_dim} hidden units, cpu, seed {args.seed}"
    )
    print("row              seed  epoch   train  held-out  distinct  held-out loss  time left")
    results, models = {method: [] for method in methods}, {}
    for number, (method, seed) in enumerate(runs):
        torch.manual_seed(seed)
        knobs, model = choose_knobs(args, method), make_model(args.hidden_dim)
        warm, run_start = round(knobs.get("sft_fraction", 0) * args.epochs), time.perf_counter()
        phases = (METHODS["sl-weight-decay"], warm), (knobs, args.epochs - warm)
        # The generators start in turn: like the post, RL begins with a new optimizer.
        steps = chain.from_iterable(train(model, *phase) for phase in phases)
        for epoch, losses in enumerate(steps):
            last = epoch == args.epochs - 1
            if epoch % max(1, args.epochs // 100) and not last:
                continue
            metrics = {f"losses/{name}": value.item() for name, value in losses.items()}
            metrics |= {f"train/{k}": v for k, v in greedy_results(model, train_prompts).items()}
            metrics |= {f"eval/{k}": v for k, v in greedy_results(model, held_out).items()}
            log(writer, f"{method}-{seed}", epoch, metrics)
            if last or (len(runs) == 1 and epoch % max(1, args.epochs // 10) == 0):
                done = number + (epoch + 1) / args.epochs
                left = (time.perf_counter() - start) * (len(runs) / done - 1)
                print(
                    f"{method:15} {seed:5} {epoch:6} {metrics['train/accuracy']:7.1%}"
                    f" {metrics['eval/accuracy']:9.1%} {metrics['eval/distinct']:9.0f}"
                    f" {metrics['eval/cross_entropy']:14.4f}{f'{left:9.0f} s' if epoch else ''}"
                )
        metrics["seconds"] = time.perf_counter() - run_start
        results[method].append(metrics)
        models[method] = model

    print_results(results)
    best = max(models, key=lambda method: results[method][-1]["eval/accuracy"])
    collapsed = min(models, key=lambda method: results[method][-1]["eval/distinct"])
    for method in dict.fromkeys((best, collapsed)):
        print(f"\nGreedy answers of {method} to held-out prompts, seed {runs[-1][1]}:")
        print_predictions(models[method], held_out[:10])
    means = {}
    for method, rows in results.items():
        means |= {f"{method}/{k}": statistics.mean(row[k] for row in rows) for k in rows[0]}
    return means


if __name__ == "__main__":
    main(tyro.cli(Args))
