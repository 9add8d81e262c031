"""How noisy is the policy gradient under each baseline of reinforce.py? Exactly, by enumeration.

At the reference policy, where the KL is 0, a sampled response has the gradient
Σ_t (R - b) ∇log π(y_t) with respect to the logits after each prefix; whatever the baseline b, its
mean is ∇J. The noise is the trace of its covariance: summed over all 1111 responses, averaged over
held-out prompts. The mean over B responses has 1/B of that noise, and a little more where they are
each other's baseline; B times it is the column "in a rollout".

    python benchmark/gradient_variance.py            # prints a markdown table, in 15 s
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import reinforce


def prefix_rows(responses):
    """For each token of (Y, R) responses the row of its prefix in a table of 111: (Y, R)."""
    first, second = responses[:, 0].clamp(max=9), responses[:, 1].clamp(max=9)
    return torch.stack([0 * first, 1 + first, 11 + 10 * first + second], 1)


def gradient_moments(choices, responses, mask, totals, value, spread=0.0):
    """For one prompt: E‖g‖² and ‖E g‖² of the gradient of one response, by enumeration.

    choices: (Y, R, V) log-probabilities of all tokens at each place. totals: (Y,) what a response
    earns. value: () or (Y, R), the baseline's mean; spread: its variance, if it is random, made of
    other responses.
    """
    chosen = choices.gather(2, responses[:, :, None]).squeeze(2)  # (Y, R)
    probs = torch.where(mask, chosen, 0.0).sum(1).exp()  # (Y,)
    scores = torch.nn.functional.one_hot(responses, choices.shape[2]) - choices.exp()  # ∇ log π
    advantages = totals[:, None] - value
    squares = (advantages**2 + spread) * (scores**2).sum(2)  # (Y, R); prefixes of a y are distinct
    second = (probs * torch.where(mask, squares, 0.0).sum(1)).sum()
    terms = torch.where(mask[:, :, None], (probs * totals)[:, None, None] * scores, 0.0)
    mean = torch.zeros(111, choices.shape[2], dtype=choices.dtype)
    mean.index_add_(0, prefix_rows(responses).flatten(), terms.flatten(0, 1))
    return second, (mean**2).sum()


def prefix_values(probs, responses, mask, totals):
    """The exact critic (Y, R): mean earnings of all responses that share a token's prefix."""
    rows = prefix_rows(responses)
    weight, earned = torch.zeros(2, 111, dtype=probs.dtype)
    for t in range(rows.shape[1]):
        real = mask[:, t]
        weight.index_add_(0, rows[real, t], probs[real])
        earned.index_add_(0, rows[real, t], (probs * totals)[real])
    return (earned / weight)[rows]


@torch.no_grad()
def table(seed, batch_size, group_sizes):
    """Rows (name, noise of one response, noise in a rollout, ‖∇J‖²), averaged over prompts."""
    torch.manual_seed(seed)
    train_prompts, held_out = reinforce.make_prompts()
    policy = reinforce.GPT()
    with torch.enable_grad():
        reinforce.warm_start(policy, *reinforce.make_demonstrations(train_prompts), 100)
    responses = reinforce.all_responses()
    mask = reinforce.response_mask(responses)
    worlds = []
    for prompt in held_out:
        prompts = prompt.expand(len(responses), 3)
        states = reinforce.response_states(policy, prompts, responses)
        choices = policy.head(states).double().log_softmax(2)
        logprobs = -torch.nn.functional.cross_entropy(
            choices.transpose(1, 2), responses, reduction="none"
        )
        probs = torch.where(mask, logprobs, 0.0).sum(1).exp()
        totals = reinforce.reward(prompts, responses).double()
        mean = (probs * totals).sum()
        worlds.append((choices, probs, totals, mean, (probs * totals**2).sum() - mean**2))
    means, variances = (torch.stack([w[i] for w in worlds]) for i in (3, 4))
    over_all = means.mean()
    scatter = variances.mean() + means.var(correction=0)  # of a reward, the prompt being drawn too

    def row(name, baseline, others=None):
        """baseline: prompt's data to mean and variance; others: group members but the response."""
        moments = [gradient_moments(w[0], responses, mask, w[2], *baseline(w)) for w in worlds]
        second, square = (torch.stack(x).mean().item() for x in zip(*moments, strict=True))
        # i's baseline holds j's earnings and j's holds i's: Cov(g_i, g_j) = ‖∇J‖² / others².
        shared = square / others if others else 0.0
        return name, second - square, second - square + shared, square

    rows = [row("none", lambda w: (torch.tensor(0.0),))]
    n = batch_size - 1
    rows.append(row(f"batch-mean (of {n})", lambda w: (over_all, scatter / n)))
    rows.append(row("running-mean (settled)", lambda w: (over_all,)))
    for g in group_sizes:
        spread = lambda w, n=g - 1: (w[3], w[4] / n)  # noqa: E731
        rows.append(row(f"rloo, group size {g}", spread, g - 1))
    critic = lambda w: (prefix_values(w[1], responses, mask, w[2]),)  # noqa: E731
    rows.append(row("value (exact critic)", critic))
    return rows, over_all.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    rows, success = table(seed, 256, (2, 4, 8, 16))
    print(f"reference of seed {seed}: held-out success {success:.3f}, ‖∇J‖² {rows[0][3]:.4f}\n")
    print("| baseline | noise of one response | in a rollout | against none | noise / ‖∇J‖² |")
    print("|---|---|---|---|---|")
    for name, one, rollout, square in rows:
        print(
            f"| {name} | {one:.4f} | {rollout:.4f} | {rollout / rows[0][2]:.2f} "
            f"| {rollout / square:.1f} |"
        )
