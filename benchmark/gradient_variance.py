"""How noisy is the policy gradient under each baseline of reinforce.py? Exactly, by enumeration.

At the reference, where the KL is 0, a sampled response has the gradient Σ_t (R - b) ∇log π(y_t)
with respect to the logits after each prefix. Whatever the baseline b, its mean is ∇J. The noise is
the trace of its covariance, summed over all 1111 responses and averaged over held-out prompts. The
mean over the B responses of a rollout has 1/B of that noise, and a little more where the responses
are each other's baseline; B times it is the column "in a rollout".

    python benchmark/gradient_variance.py    # results: benchmark/results/gradient_variance.md
"""

import argparse
import time

import torch
import torch.nn.functional as F
from exact import all_responses, next_token_logprobs
from report import place
from run import RESULTS, machine

from ppo import GPT, make_demonstrations, make_prompts, response_mask, reward, sft

NUM_PREFIXES = 111  # no digit, one digit, two digits


# Shapes: Y = 1111 responses, R response tokens, V vocabulary size.
def prefix_rows(responses):
    """A number for the prefix before each token of the responses: (Y, R)."""
    first = responses[:, 0].clamp(max=9)
    second = responses[:, 1].clamp(max=9)
    return torch.stack([torch.zeros_like(first), 1 + first, 11 + 10 * first + second], 1)


def response_probs(logprobs, responses, mask):
    """Probabilities (Y,) of the responses, from log-probabilities (Y, R, V) of all tokens."""
    taken = logprobs.gather(2, responses[:, :, None]).squeeze(2)  # (Y, R)
    return torch.where(mask, taken, 0.0).sum(1).exp()


def gradient_moments(logprobs, responses, mask, rewards, baseline, baseline_variance=0.0):
    """For one prompt: E‖g‖² and ‖E g‖² of the gradient g of one response, by enumeration.

    logprobs: (Y, R, V), of all tokens at each place. rewards: (Y,). baseline: a number or (Y, R),
    the mean of the baseline; baseline_variance: its variance, where it is random (made of other
    responses, hence independent of this one).
    """
    probs = response_probs(logprobs, responses, mask)
    grad_logprobs = F.one_hot(responses, logprobs.shape[2]) - logprobs.exp()  # (Y, R, V)
    advantages = rewards[:, None] - baseline  # (Y, 1) or (Y, R)
    squares = (advantages**2 + baseline_variance) * (grad_logprobs**2).sum(2)  # (Y, R)
    # The prefixes of one response are distinct, so the squares of its tokens add up.
    second_moment = (probs * torch.where(mask, squares, 0.0).sum(1)).sum()

    weights = torch.where(mask, (probs * rewards)[:, None], 0.0)  # (Y, R)
    terms = weights[:, :, None] * grad_logprobs
    mean = torch.zeros(NUM_PREFIXES, logprobs.shape[2], dtype=logprobs.dtype)
    mean.index_add_(0, prefix_rows(responses).flatten(), terms.flatten(0, 1))
    return second_moment, (mean**2).sum()


def prefix_values(probs, responses, mask, rewards):
    """The exact critic (Y, R): the mean reward of all responses that share a token's prefix."""
    rows = prefix_rows(responses)
    mass = torch.zeros(NUM_PREFIXES, dtype=probs.dtype)
    earned = torch.zeros(NUM_PREFIXES, dtype=probs.dtype)
    for t in range(rows.shape[1]):
        real = mask[:, t]
        mass.index_add_(0, rows[real, t], probs[real])
        earned.index_add_(0, rows[real, t], (probs * rewards)[real])
    return (earned / mass)[rows]


class Prompt:
    """Everything about one prompt that the baselines need."""

    def __init__(self, policy, prompt, target):
        self.responses = all_responses()
        self.mask = response_mask(self.responses)
        self.rewards = reward(target.expand(len(self.responses)), self.responses).double()
        self.logprobs = next_token_logprobs(policy, prompt[None], 1.0)[0]
        self.probs = response_probs(self.logprobs, self.responses, self.mask)
        self.mean = (self.probs * self.rewards).sum()
        self.variance = (self.probs * (self.rewards - self.mean) ** 2).sum()
        self.values = prefix_values(self.probs, self.responses, self.mask, self.rewards)


def noise(prompts, baselines, num_others=None):
    """Noise of one response, noise in a rollout and ‖∇J‖², averaged over the prompts.

    baselines: (mean, variance) of the baseline for each prompt. num_others: the size of a group
    less one, where the responses of a group are each other's baseline.
    """
    noises = []
    squares = []
    for prompt, (baseline, variance) in zip(prompts, baselines, strict=True):
        second_moment, square = gradient_moments(
            prompt.logprobs, prompt.responses, prompt.mask, prompt.rewards, baseline, variance
        )
        noises.append((second_moment - square).item())
        squares.append(square.item())
    noise_of_one = sum(noises) / len(prompts)
    square = sum(squares) / len(prompts)
    # The baseline of i holds the reward of j and that of j holds the reward of i, so that
    # Cov(g_i, g_j) = ‖∇J‖² / num_others². There are num_others such j.
    shared = square / num_others if num_others else 0.0
    return noise_of_one, noise_of_one + shared, square


def compare(prompts, batch_size, group_sizes):
    """Rows (name, noise of one response, noise in a rollout, ‖∇J‖²)."""
    means = torch.stack([prompt.mean for prompt in prompts])
    variances = torch.stack([prompt.variance for prompt in prompts])
    mean = means.mean()
    variance = variances.mean() + means.var(correction=0)  # of a reward, over prompts as well
    size = batch_size - 1

    rows = [("none", *noise(prompts, [(0.0, 0.0)] * len(prompts)))]
    baselines = [(mean, variance / size)] * len(prompts)
    rows.append((f"batch-mean (of {size} others)", *noise(prompts, baselines)))
    rows.append(("running-mean (settled)", *noise(prompts, [(mean, 0.0)] * len(prompts))))
    for group_size in group_sizes:
        others = group_size - 1
        baselines = [(prompt.mean, prompt.variance / others) for prompt in prompts]
        name = f"leave-one-out, group size {group_size}"
        rows.append((name, *noise(prompts, baselines, others)))
    baselines = [(prompt.values, 0.0) for prompt in prompts]
    rows.append(("value (exact critic)", *noise(prompts, baselines)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train_prompts, train_targets, test_prompts, test_targets = make_prompts("cpu")
    policy = GPT()
    sft(policy, *make_demonstrations(train_prompts, train_targets), 100)
    prompts = []
    for prompt, target in zip(test_prompts, test_targets, strict=True):
        prompts.append(Prompt(policy, prompt, target))
    rows = compare(prompts, 256, [2, 4, 8, 16])

    success = sum(prompt.mean.item() for prompt in prompts) / len(prompts)
    lines = [
        f"Reference of seed {args.seed}: held-out success {success:.3f}, ‖∇J‖² {rows[0][3]:.4f}.",
        "",
        "| baseline | noise of one response | in a rollout | relative to none | noise / ‖∇J‖² |",
        "|-|-|-|-|-|",
    ]
    for name, one, rollout, square in rows:
        relative = rollout / rows[0][2]
        lines.append(
            f"| {name} | {one:.4f} | {rollout:.4f} | {relative:.2f} | {rollout / square:.1f} |"
        )
    command = f"`python benchmark/gradient_variance.py --seed {args.seed}`"
    where = place(machine(torch.get_num_threads()))
    lines += ["", f"{command}, {time.process_time():.0f} CPU seconds. {where}"]
    path = RESULTS / "gradient_variance.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nresults: benchmark/results/{path.name}")


if __name__ == "__main__":
    main()
