"""Imitation (SL) against trial and error (RL): the experiments of a blog post, on a small network.

    loss = -mean[A(x, y) · log π(y | x) + c · H(π(· | x))]

Supervised learning (SL): y runs over the correct answers to prompt x, A = 1 and c = 0.
Reinforcement learning (RL): y is sampled from π, A = reward - baseline, and c weighs an entropy
bonus. Every epoch is one gradient step on all training prompts.

The task: given three digits, answer with two more so that all five sum to 20. We measure how often
the most probable answer to a held-out prompt is correct. Of the methods below, the first seven are
those of the post "Reinforcement Learning" of Tommy's Blog. Beside each: its held-out accuracy after
10,000 epochs, a mean over ten seeds.

    sl                 62%  learns the answers to the training prompts by heart
    sl-weight-decay    87%  weight decay makes it generalise
    rl                 17%  reward for correct answers only: collapses onto a few answers
    rl-entropy         83%  the entropy bonus keeps the policy exploring
    rl-distance        74%  reward for near misses too: learns early, but settles for near misses
    rl-sharp           95%  a reward that falls steeply with the distance does not settle
    sl-then-rl         94%  10% of the epochs SL, then rl-sharp: starts where rewards are common
    rl-improved       100%  square reward, leave-one-out baseline; learning rate and entropy decay
    sl-then-improved   99%  10% of the epochs SL, then rl-improved
    joint              99%  rl-improved plus an SL loss whose weight decays to 0

    python digits_sum20.py                               # all, one process per core: 2 minutes
    python digits_sum20.py --num-seeds 10                # mean ± standard deviation over ten seeds
    python digits_sum20.py --method rl --ent-coef 0.05   # one, with one of its values changed
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26", "tyro>=0.9", "tensorboard>=2.16"]
# ///

import itertools
import multiprocessing
import os
import random
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    seed: int = 1  # random seed (the train/held-out split of the prompts is fixed)
    tensorboard: bool = True  # log curves to runs/ (view with: tensorboard --logdir runs)
    method: Literal[
        "ladder",
        "sl",
        "sl-weight-decay",
        "rl",
        "rl-entropy",
        "rl-distance",
        "rl-sharp",
        "sl-then-rl",
        "rl-improved",
        "sl-then-improved",
        "joint",
    ] = "ladder"  # the method to run; ladder runs all of them
    num_seeds: int = 1  # runs of each method, with seeds --seed, --seed + 1, ...
    epochs: int = 10_000  # gradient steps, each on all training prompts
    hidden_dim: int = 64  # hidden units of the network

    # The values of one method. None: the method's own value in METHODS.
    learning_rate: float | None = None  # Adam step size (SL before RL has that of sl-weight-decay)
    learning_rate_final: float | None = None  # the learning rate decays linearly to this
    weight_decay: float | None = None  # L2 penalty (SL before RL has that of sl-weight-decay)
    reward: Literal["exact", "distance", "sharp", "square"] | None = None  # reward of an answer
    ent_coef: float | None = None  # weight of the entropy bonus
    ent_coef_final: float | None = None  # ent_coef decays linearly to this
    baseline: Literal["none", "rloo"] | None = None  # rloo: mean reward of a prompt's other samples
    samples_per_prompt: int | None = None  # per epoch; 0: as many as the prompt has correct answers
    sft_fraction: float | None = None  # share of the epochs spent on SL before RL
    sl_coef: float | None = None  # weight of the SL loss added to the RL loss
    sl_coef_final: float | None = None  # the weight of the SL loss decays linearly to this


# A method reads the flags listed for it and no others; without a reward it is SL.
METHODS = {
    "sl": {
        "learning_rate": 0.01,
        "weight_decay": 0.0,
    },
    "sl-weight-decay": {
        "learning_rate": 0.01,
        "weight_decay": 0.001,
    },
    "rl": {
        "learning_rate": 0.015,
        "weight_decay": 0.0,
        "reward": "exact",
        "ent_coef": 0.0,
        "baseline": "none",
        "samples_per_prompt": 0,
    },
    "rl-entropy": {
        "learning_rate": 0.015,
        "weight_decay": 0.0,
        "reward": "exact",
        "ent_coef": 0.15,
        "baseline": "none",
        "samples_per_prompt": 0,
    },
    "rl-distance": {
        "learning_rate": 0.015,
        "weight_decay": 0.0,
        "reward": "distance",
        "ent_coef": 0.15,
        "baseline": "none",
        "samples_per_prompt": 0,
    },
    "rl-sharp": {
        "learning_rate": 0.015,
        "weight_decay": 0.0,
        "reward": "sharp",
        "ent_coef": 0.15,
        "baseline": "none",
        "samples_per_prompt": 0,
    },
    "sl-then-rl": {
        "sft_fraction": 0.1,
        "learning_rate": 0.015,
        "weight_decay": 0.0,
        "reward": "sharp",
        "ent_coef": 0.15,
        "baseline": "none",
        "samples_per_prompt": 0,
    },
    "rl-improved": {
        "learning_rate": 0.015,
        "learning_rate_final": 0.0,
        "weight_decay": 0.0,
        "reward": "square",
        "ent_coef": 0.3,
        "ent_coef_final": 0.02,
        "baseline": "rloo",
        "samples_per_prompt": 8,
    },
    "sl-then-improved": {
        "sft_fraction": 0.1,
        "learning_rate": 0.015,
        "learning_rate_final": 0.0,
        "weight_decay": 0.0,
        "reward": "square",
        "ent_coef": 0.3,
        "ent_coef_final": 0.02,
        "baseline": "rloo",
        "samples_per_prompt": 8,
    },
    "joint": {
        "learning_rate": 0.015,
        "learning_rate_final": 0.0,
        "weight_decay": 0.0,
        "reward": "square",
        "ent_coef": 0.3,
        "ent_coef_final": 0.02,
        "baseline": "rloo",
        "samples_per_prompt": 8,
        "sl_coef": 0.07,
        "sl_coef_final": 0.0,
    },
}

# Held-out accuracy that the post reports, in percent, for one seed. It reports none for plain SL.
POST = {
    "sl-weight-decay": 91.26,
    "rl": 18.03,
    "rl-entropy": 85.25,
    "rl-distance": 67.76,
    "rl-sharp": 91.26,
    "sl-then-rl": 98.91,
}


def method_args(args, method, seed):
    """The flags of one run. Where the command line gives no value, the method's own is used."""
    values = {}
    for flag, own_value in METHODS[method].items():
        given = getattr(args, flag)
        values[flag] = own_value if given is None else given
    return replace(args, method=method, seed=seed, **values)


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_args(args):
    """Exit with an error if a flag's value makes no sense."""
    runs = "runs" if os.path.lexists("runs") else "."
    writable = os.path.isdir(runs) and os.access(runs, os.W_OK)
    rules = [
        (not args.tensorboard or writable, "runs/ is not writable; use --no-tensorboard"),
        (0 <= args.seed < 2**63, f"--seed {args.seed} must be in [0, 2**63)"),
        (args.num_seeds >= 1, f"--num-seeds {args.num_seeds} must be at least 1"),
        (args.epochs >= 1, f"--epochs {args.epochs} must be at least 1"),
        (args.hidden_dim >= 1, f"--hidden-dim {args.hidden_dim} must be at least 1"),
    ]
    for flag, value in asdict(args).items():
        readers = [method for method, values in METHODS.items() if flag in values]
        ignored = readers and value is not None and args.method not in readers
        name = flag.replace("_", "-")
        rules.append((not ignored, f"--{name} is only for --method {', '.join(readers)}"))

    # The flags of the run. None: a flag that the method does not read.
    job = args if args.method == "ladder" else method_args(args, args.method, args.seed)
    if job.learning_rate is not None:
        valid = 0 < job.learning_rate < 1
        rules.append((valid, f"--learning-rate {job.learning_rate} must be in (0, 1)"))
    for flag in (
        "learning_rate_final",
        "weight_decay",
        "ent_coef",
        "ent_coef_final",
        "samples_per_prompt",
        "sl_coef",
        "sl_coef_final",
    ):
        value = getattr(job, flag)
        valid = value is None or 0 <= value < 1e6
        rules.append((valid, f"--{flag.replace('_', '-')} {value} must be in [0, 1e6)"))
    if job.baseline == "rloo":
        enough = job.samples_per_prompt is not None and job.samples_per_prompt >= 2
        rules.append((enough, "--baseline rloo needs --samples-per-prompt 2 or more"))
    if job.sft_fraction is not None:
        valid = 0 <= job.sft_fraction < 1 and round(job.sft_fraction * job.epochs) < job.epochs
        rules.append((valid, f"--sft-fraction {job.sft_fraction} must leave epochs for RL"))
    for valid, error in rules:
        if not valid:
            fail(error)


# ---------------------------------------------------------------------------- Task
# Shapes: N prompts, M samples per prompt. Answer number a of the 100 is the digits divmod(a, 10).
TARGET = 20


def split_prompts():
    """All 912 solvable prompts: 729 to train on, (729, 3), and 183 held out, (183, 3).

    This is the split of the post, which shuffles a set of tuples. Such a set has had the same order
    in every CPython since 3.8, so the post's figures are for exactly these held-out prompts.
    """
    solvable = set()
    for prompt in itertools.product(range(10), repeat=3):
        if 0 <= TARGET - sum(prompt) <= 18:
            solvable.add(prompt)
    prompts = list(solvable)
    random.Random(-1).shuffle(prompts)
    return torch.tensor(prompts[:729]), torch.tensor(prompts[729:])


def answer_sums(prompts):
    """The sum of all five digits, for every prompt with every answer: (N, 3) to (N, 100)."""
    answers = torch.arange(100)
    return prompts.sum(1, keepdim=True) + answers // 10 + answers % 10


def shaped_reward(sums, kind):
    """The reward of answers with these sums of five digits. Any shape.

    distance from 20   0     1     2     5     10     18
    exact              1     0     0     0     0      0
    distance           1     0.9   0.8   0.5   0      0
    sharp              1     0.61  0.37  0.08  0.007  0.000
    square             1     0.99  0.96  0.75  0      -2.24

    Why square generalises best in rl-improved: with an entropy bonus c the optimal policy is
    π ∝ exp(reward / c). If s is the sum of the prompt and a that of the answer, the squared
    distance is (s - 20)² + 2·(s - 20)·a + a². The first term is the same for all answers, so it
    drops out of π. What is left is linear in s, and a linear function is the easiest to extend to
    new prompts.
    """
    distance = (sums - TARGET).abs()
    if kind == "exact":
        return (distance == 0).float()
    if kind == "distance":
        return (1 - distance / 10).clamp(min=0)
    if kind == "sharp":
        return (-distance / 2).exp()
    return 1 - (distance / 10) ** 2


# ---------------------------------------------------------------------------- Model
def one_hot(prompts):
    """The network's inputs: prompts (N, 3) to (N, 30)."""
    return F.one_hot(prompts, 10).flatten(1).float()


def make_model(hidden_dim):
    """From inputs (N, 30) to the logits of all answers (N, 100)."""
    return nn.Sequential(nn.Linear(30, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 100))


# ---------------------------------------------------------------------------- SL and RL
def sl_loss(logprobs, correct):
    """Cross-entropy, averaged over all correct answers to all prompts. Both inputs (N, 100).

    The post trains on 4,504 examples: one for every correct answer to every training prompt. The
    examples of a prompt have the same logits, so one row per prompt gives the same loss in a sixth
    of the time.
    """
    return -(logprobs * correct).sum() / correct.sum()


def sample_weights(correct, samples_per_prompt):
    """The weight of each sample in the mean over all samples. correct: (N, 100); returns (N, M).

    With samples_per_prompt = 0 a prompt has as many samples as correct answers, as in the post. M
    is then the largest such number, and the surplus samples of the other prompts get weight 0: with
    2 and 3 correct answers, the weights are [[1, 1, 0], [1, 1, 1]] / 5.
    """
    counts = correct.sum(1, keepdim=True)  # (N, 1)
    if samples_per_prompt > 0:
        counts = torch.full_like(counts, samples_per_prompt)
    used = torch.arange(counts.max()) < counts  # (N, M)
    return used / counts.sum()


def leave_one_out(rewards):
    """Rewards minus the mean reward of the prompt's other samples. (N, M) to (N, M)

    The gradient has the same expectation as with the rewards themselves and, as a rule, less noise.
    """
    num_others = rewards.shape[1] - 1
    mean_of_others = (rewards.sum(1, keepdim=True) - rewards) / num_others
    return rewards - mean_of_others


def rl_loss(logprobs, answers, advantages, weights, ent_coef):
    """REINFORCE with an entropy bonus. logprobs: (N, 100); answers, advantages, weights: (N, M)."""
    answer_logprobs = logprobs.gather(1, answers)  # (N, M)
    entropy = -(logprobs.exp() * logprobs).sum(1, keepdim=True)  # (N, 1)
    return -(weights * (advantages * answer_logprobs + ent_coef * entropy)).sum()


def linear_decay(start, end, progress):
    """From start at progress 0 to end at progress 1. An end of None: constant."""
    if end is None:
        return start
    return start + (end - start) * progress


def pretrain(model, inputs, correct, epochs):
    """SL before RL, with the values of sl-weight-decay."""
    values = METHODS["sl-weight-decay"]
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=values["learning_rate"],
        weight_decay=values["weight_decay"],
        fused=True,
    )
    for _ in range(epochs):
        loss = sl_loss(model(inputs).log_softmax(1), correct)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def measure(model, prompts):
    """How well the model answers the prompts.

    accuracy: share of the most probable answers that are correct. distinct: number of different
    most probable answers. cross_entropy: the SL loss. entropy: of the policy, in nats, averaged
    over the prompts.
    """
    logprobs = model(one_hot(prompts)).log_softmax(1)  # (N, 100)
    correct = answer_sums(prompts) == TARGET  # (N, 100)
    answers = logprobs.argmax(1, keepdim=True)  # (N, 1)
    return {
        "accuracy": correct.gather(1, answers).float().mean().item(),
        "distinct": len(answers.unique()),
        "cross_entropy": sl_loss(logprobs, correct).item(),
        "entropy": -(logprobs.exp() * logprobs).sum(1).mean().item(),
    }


# ---------------------------------------------------------------------------- Output
def print_progress(args, epoch, metrics, seconds_left):
    print(
        f"{args.method:16}  seed {args.seed:<3d}  epoch {epoch:6d}"
        f"  train {metrics['train/accuracy']:6.1%}  held-out {metrics['eval/accuracy']:6.1%}"
        f"  distinct {metrics['eval/distinct']:3d}  {seconds_left:.0f} s left"
    )


def mean_and_std(values):
    """As text: the mean, and the standard deviation (over N - 1) if there are several values."""
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):4.1f}"
    return text


def print_results(results):
    """A table of the results over the seeds. results: method to the final metrics of its runs."""
    print()
    print("method                train %   held-out %     distinct        range  seconds   post %")
    for method, runs in results.items():
        train_accuracy = [100 * run["train/accuracy"] for run in runs]
        test_accuracy = [100 * run["eval/accuracy"] for run in runs]
        distinct = [run["eval/distinct"] for run in runs]
        test_range = f"{min(test_accuracy):.1f}-{max(test_accuracy):.1f}"
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(
            f"{method:16}{mean_and_std(train_accuracy):>13}{mean_and_std(test_accuracy):>13}"
            f"{mean_and_std(distinct):>13}{test_range:>13}{seconds:9.1f}{POST.get(method, '-'):>9}"
        )


def print_answers(prompts, answers):
    """A table of prompts (N, 3) and answers (N,), both lists."""
    print("|   input   | output | sum |       |")
    print("|-----------|--------|-----|-------|")
    for prompt, answer in zip(prompts, answers, strict=True):
        output = [answer // 10, answer % 10]
        total = sum(prompt) + sum(output)
        verdict = "right" if total == TARGET else "wrong"
        print(f"| {prompt} | {output} | {total:3d} | {verdict} |")


# ---------------------------------------------------------------------------- Training
def train(args, folder, verbose):
    """One run: train one method with one seed.

    Curves go to the folder unless it is None. Returns the final metrics, and the most probable
    answers to the first ten held-out prompts.
    """
    torch.set_num_threads(1)  # so that the results do not depend on the number of cores
    torch.manual_seed(args.seed)
    start_time = time.time()

    train_prompts, test_prompts = split_prompts()
    inputs = one_hot(train_prompts)  # (N, 30)
    sums = answer_sums(train_prompts)  # (N, 100)
    correct = sums == TARGET  # (N, 100)
    if args.reward is not None:
        reward_table = shaped_reward(sums, args.reward)  # (N, 100)
        weights = sample_weights(correct, args.samples_per_prompt)  # (N, M)
    writer = None
    if folder is not None:
        writer = SummaryWriter(folder)

    model = make_model(args.hidden_dim)
    sft_epochs = 0
    if args.sft_fraction is not None:
        sft_epochs = round(args.sft_fraction * args.epochs)
        pretrain(model, inputs, correct, sft_epochs)
    # Not AdamW: in the post weight decay is part of the gradient. fused=True only makes it faster.
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=args.weight_decay, fused=True)

    log_every = max(1, args.epochs // 100)
    for epoch in range(sft_epochs, args.epochs):
        progress = (epoch - sft_epochs) / (args.epochs - sft_epochs)
        learning_rate = linear_decay(args.learning_rate, args.learning_rate_final, progress)
        optimizer.param_groups[0]["lr"] = learning_rate
        logprobs = model(inputs).log_softmax(1)  # (N, 100)

        if args.reward is None:
            loss = sl_loss(logprobs, correct)
        else:
            # 1. Sample answers from the policy. It sees only the rewards of its samples.
            probs = logprobs.detach().exp()
            answers = torch.multinomial(probs, weights.shape[1], replacement=True)  # (N, M)
            rewards = reward_table.gather(1, answers)  # (N, M)

            # 2. Advantages: what is reinforced, and how much.
            advantages = rewards
            if args.baseline == "rloo":
                advantages = leave_one_out(rewards)
            ent_coef = linear_decay(args.ent_coef, args.ent_coef_final, progress)
            loss = rl_loss(logprobs, answers, advantages, weights, ent_coef)
            if args.sl_coef is not None:
                sl_coef = linear_decay(args.sl_coef, args.sl_coef_final, progress)
                loss = loss + sl_coef * sl_loss(logprobs, correct)

        # 3. Update: one gradient step.
        if not loss.isfinite():
            raise FloatingPointError(f"loss of {args.method} not finite in epoch {epoch}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # 4. Log a hundred times, and at the end.
        last = epoch == args.epochs - 1
        if epoch % log_every == 0 or last:
            metrics = {}
            for name, value in measure(model, train_prompts).items():
                metrics[f"train/{name}"] = value
            for name, value in measure(model, test_prompts).items():
                metrics[f"eval/{name}"] = value
            seconds = time.time() - start_time
            if writer:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, epoch)
            if verbose and epoch % (5 * log_every) == 0 and not last:
                seconds_left = seconds * (args.epochs / (epoch + 1) - 1)
                print_progress(args, epoch, metrics, seconds_left)

    if writer:
        writer.close()
    with torch.no_grad():
        answers = model(one_hot(test_prompts[:10])).argmax(1)
    return {**metrics, "seconds": seconds}, answers.tolist()


def end_with_main_process():
    """Wait until the main process has ended, then end this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker():
    """A worker process ends at once on Ctrl-C, and with the main process, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_main_process, daemon=True).start()


def train_in_parallel(jobs, folders):
    """Train side by side, one process per core. Yields what train returns, in the order of jobs."""
    num_workers = min(len(jobs), os.cpu_count())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=start_worker) as pool:
        try:
            yield from pool.map(train, jobs, folders, [False] * len(jobs))
        except BrokenProcessPool:
            fail("a worker process was killed, perhaps for lack of memory")
        finally:
            # After an error or Ctrl-C, don't wait for the runs that are still going.
            for worker in multiprocessing.active_children():
                worker.kill()


def main(args):
    check_args(args)
    start_time = time.time()

    # A job is the flags of one run. Jobs: every method with every seed.
    methods = [args.method]
    if args.method == "ladder":
        methods = list(METHODS)
    jobs = []
    for method in methods:
        for seed in range(args.seed, args.seed + args.num_seeds):
            jobs.append(method_args(args, method, seed))

    run_name = f"digits_sum20__{args.seed}__{datetime.now():%Y-%m-%d-%H%M%S-%f}"
    print(f"{run_name}: {len(jobs)} runs of {args.epochs:,} epochs, {args.hidden_dim} hidden units")
    folders = [None] * len(jobs)
    if args.tensorboard:
        run_folder = f"runs/{run_name}"
        os.makedirs(run_folder)  # fails if the folder exists: no two runs share one
        folders = [f"{run_folder}/{job.method}-{job.seed}" for job in jobs]
        writer = SummaryWriter(run_folder)
        lines = [f"|{flag}|{value}|" for flag, value in asdict(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *lines]))
        writer.close()

    # In parallel only if this file is the main program. A spawned worker first imports the main
    # program; one without the guard at the end of this file would start everything again.
    if len(jobs) > 1 and __name__ == "__main__":
        outcomes = train_in_parallel(jobs, folders)
    else:
        verbose = len(jobs) == 1
        outcomes = (train(job, folder, verbose) for job, folder in zip(jobs, folders, strict=True))

    results = {method: [] for method in methods}
    answers = {}
    for num_done, (metrics, job_answers) in enumerate(outcomes, start=1):
        job = jobs[num_done - 1]
        results[job.method].append(metrics)
        answers[job.method] = job_answers  # of the last seed
        seconds_left = (time.time() - start_time) * (len(jobs) - num_done) / num_done
        print_progress(job, args.epochs - 1, metrics, seconds_left)

    # Report.
    print_results(results)
    shown = [args.method]
    if args.method == "ladder":
        shown = ["rl", "rl-improved"]  # one that collapsed, one that did not
    _, test_prompts = split_prompts()
    for method in shown:
        last_seed = args.seed + args.num_seeds - 1
        print(f"\nMost probable answers of {method} to held-out prompts, seed {last_seed}:")
        print_answers(test_prompts[:10].tolist(), answers[method])
    means = {}
    for method, runs in results.items():
        for name in runs[0]:
            means[f"{method}/{name}"] = statistics.mean(run[name] for run in runs)
    return means


if __name__ == "__main__":
    # Flush every line; print ? for characters that the output's encoding lacks.
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(tyro.cli(Args, description=__doc__))
    except (FloatingPointError, OSError) as error:  # a loss not finite, a full disk, a closed pipe
        fail(error)
