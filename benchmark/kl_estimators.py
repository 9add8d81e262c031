"""How right and how noisy is the gradient of each KL estimator? Exactly, by enumeration.

    python benchmark/kl_estimators.py    # results: benchmark/results/kl_estimators.md

What is wanted is the gradient of KL(π ‖ π_ref), of whole responses, with respect to the logits
after each prefix. It is compared with what one sampled response gives on average at the first
gradient step after a rollout (π = π_old), where d = log π/π_ref of the sampled token:

  in the loss    the gradient of Σ_t k_t, as grpo.py has it (k1 is in the table as a warning)
  in the reward  Σ_t (Σ_{s ≥ t} k_s) ∇log π(y_t), as ppo.py and reinforce.py have it with k1

Error: length of (mean - wanted) relative to the length of the wanted gradient. Noise: square root
of the trace of the covariance of one response, in the same unit. Both over all held-out prompts.
The policy is the reference with normal noise (deviation 1) on its logits. Last column: the length
of ∇E[R] - β · mean at the π* of β = 0.5, relative to ∇E[R] at the reference. It is 0 if training
rests at π*; otherwise it leaves the optimum.
"""

import time

import torch
import torch.nn.functional as F
from exact import all_responses, next_token_logprobs
from gradient_variance import NUM_PREFIXES, prefix_rows
from report import place
from run import RESULTS, machine

from ppo import GPT, make_demonstrations, make_prompts, response_mask, reward, sft

KL_COEF = 0.5  # at a small β, ∇E[R] is near 0 at π*, and no estimator is far off
LOSSES = ["k1", "k2", "k3", "k3-iw", "full"]
REWARDS = ["k1", "k3", "full"]
RESPONSES = all_responses()
ROWS = prefix_rows(RESPONSES)  # (Y, R)
MASK = response_mask(RESPONSES)  # (Y, R)


# Shapes: Y = 1111 responses, R response tokens, V vocabulary size. A table is (111, V): the
# log-probabilities of all tokens after each prefix.
def to_table(logprobs):
    """From log-probabilities (Y, R, V), which repeat those of a prefix in many places."""
    table = torch.zeros(NUM_PREFIXES, logprobs.shape[2], dtype=logprobs.dtype)
    table[ROWS.flatten()] = logprobs.flatten(0, 1)
    return table


def sequence_logprobs(table):
    """Log-probability of each response: (Y,)."""
    taken = table[ROWS].gather(2, RESPONSES[:, :, None]).squeeze(2)
    return torch.where(MASK, taken, 0.0).sum(1)


def best_table(ref_table, rewards, kl_coef):
    """The table of π* ∝ π_ref · exp(R/β): each token's share of the mass of its prefix."""
    mass = (sequence_logprobs(ref_table) + rewards / kl_coef).softmax(0)  # (Y,)
    table = torch.full_like(ref_table, 1e-300)  # where no response goes
    for t in range(RESPONSES.shape[1]):
        real = MASK[:, t]
        table.index_put_((ROWS[real, t], RESPONSES[real, t]), mass[real], accumulate=True)
    return (table / table.sum(1, keepdim=True)).log()


def exact_gradients(table, ref_table, rewards):
    """∇KL(π ‖ π_ref) and ∇E[R] with respect to the logits, (111, V) each, by autograd."""
    logits = table.clone().requires_grad_(True)
    logprobs = sequence_logprobs(logits.log_softmax(1))
    kl = (logprobs.exp() * (logprobs - sequence_logprobs(ref_table))).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (reward_gradient,) = torch.autograd.grad((logprobs.exp() * rewards).sum(), logits)
    return kl_gradient, reward_gradient


def sampled_gradients(table, ref_table, place_of_kl, kind):
    """The gradient that each response gives, at the places of its tokens: (Y, R, V)."""
    logprobs = table[ROWS]  # (Y, R, V)
    d_all = logprobs - ref_table[ROWS]  # of every token that could have been sampled
    d = d_all.gather(2, RESPONSES[:, :, None]).squeeze(2)  # (Y, R)
    probs = logprobs.exp()
    full = (probs * d_all).sum(2)  # (Y, R)
    grad_logprob = F.one_hot(RESPONSES, probs.shape[2]) - probs  # (Y, R, V)
    k3 = torch.exp(-d) - 1 + d
    if place_of_kl == "reward":
        kl = {"k1": d, "k3": k3, "full": full}[kind]
        kl = torch.where(MASK, kl, 0.0)
        to_go = kl.flip(1).cumsum(1).flip(1)
        gradients = to_go[:, :, None] * grad_logprob
    elif kind == "full":
        gradients = probs * (d_all - full[:, :, None])
    else:
        slopes = {
            "k1": torch.ones_like(d),
            "k2": d,
            "k3": 1 - torch.exp(-d),
            "k3-iw": k3 + 1 - torch.exp(-d),  # by the product rule, at a ratio of 1; this is d
        }
        gradients = slopes[kind][:, :, None] * grad_logprob
    return torch.where(MASK[:, :, None], gradients, 0.0)


def moments(gradients, probs):
    """Mean over responses, (111, V), and trace of the covariance."""
    weighted = probs[:, None, None] * gradients
    average = torch.zeros(NUM_PREFIXES, gradients.shape[2], dtype=gradients.dtype)
    average.index_add_(0, ROWS.flatten(), weighted.flatten(0, 1))
    # The prefixes of one response are distinct, so the squares of its tokens add up.
    second_moment = (probs * (gradients**2).sum((1, 2))).sum()
    return average, second_moment - (average**2).sum()


def compare(ref_tables, rewards, noise):
    """Rows of the table below, from a table of the reference and rewards (Y,) per prompt."""
    rows = []
    for place_of_kl, kind in [*[("loss", k) for k in LOSSES], *[("reward", k) for k in REWARDS]]:
        sums = torch.zeros(5, dtype=torch.float64)
        for i, ref_table in enumerate(ref_tables):
            table = (ref_table + noise[i]).log_softmax(1)
            wanted, _ = exact_gradients(table, ref_table, rewards[i])
            gradients = sampled_gradients(table, ref_table, place_of_kl, kind)
            average, variance = moments(gradients, sequence_logprobs(table).exp())
            sums[0] += ((average - wanted) ** 2).sum()
            sums[1] += variance
            sums[2] += (wanted**2).sum()

            best = best_table(ref_table, rewards[i], KL_COEF)
            _, reward_gradient = exact_gradients(best, ref_table, rewards[i])
            gradients = sampled_gradients(best, ref_table, place_of_kl, kind)
            average, _ = moments(gradients, sequence_logprobs(best).exp())
            sums[3] += ((reward_gradient - KL_COEF * average) ** 2).sum()
            _, first_gradient = exact_gradients(ref_table, ref_table, rewards[i])
            sums[4] += (first_gradient**2).sum()
        error = (sums[0] / sums[2]).sqrt().item()
        deviation = (sums[1] / sums[2]).sqrt().item()
        rows.append((place_of_kl, kind, error, deviation, (sums[3] / sums[4]).sqrt().item()))
    return rows


def main():
    torch.manual_seed(1)
    train_prompts, train_targets, prompts, targets = make_prompts("cpu")
    reference = GPT()
    sft(reference, *make_demonstrations(train_prompts, train_targets), 100)
    ref_tables = []
    rewards = []
    for prompt, target in zip(prompts, targets, strict=True):
        ref_tables.append(to_table(next_token_logprobs(reference, prompt[None], 1.0)[0]))
        rewards.append(reward(target.expand(len(RESPONSES)), RESPONSES).double())
    noise = torch.randn(len(prompts), *ref_tables[0].shape, dtype=torch.float64)
    lines = [
        "| KL | estimator | error | noise | gradient left at π* |",
        "|-|-|-|-|-|",
    ]
    for place_of_kl, kind, error, deviation, at_best in compare(ref_tables, rewards, noise):
        lines.append(
            f"| in the {place_of_kl} | {kind} | {error:.3f} | {deviation:.2f} | {at_best:.3f} |"
        )
    command = "`python benchmark/kl_estimators.py`"
    where = place(machine(torch.get_num_threads()))
    lines += ["", f"{command}, {time.process_time():.0f} CPU seconds. {where}"]
    path = RESULTS / "kl_estimators.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nresults: benchmark/results/{path.name}")


if __name__ == "__main__":
    main()
