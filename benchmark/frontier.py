"""Reward against KL, exactly: the best that is possible, best-of-n, and where the scripts end.

    python benchmark/frontier.py    # results: benchmark/results/frontier.json; then report.py

The reward is 1 or 0, so per prompt all that counts is p, the reference's probability of a correct
response. Both of these only shift it to some q and leave the proportions within the correct and
within the wrong responses as they are; hence KL = q·log(q/p) + (1-q)·log((1-q)/(1-p)):

  π* ∝ π_ref · exp(R/β)                  q = p·e^(1/β) / (p·e^(1/β) + 1 - p)
  best of n samples of the reference     q = 1 - (1-p)^n

No policy has more reward at the same KL than π* of some β. Means over the held-out prompts and over
the references of seeds 1 to 5, which the scripts start from.
"""

import json
import math
import sys

import torch
from exact import all_responses, response_logprobs, response_table
from run import RESULTS, machine

from ppo import GPT, make_demonstrations, make_prompts, reward, sft

SEEDS = [1, 2, 3, 4, 5]
KL_COEFS = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0]
NUM_SAMPLES = [1, 2, 3, 4, 6, 8, 16, 32, 64]


def reference_success(seed):
    """p for each held-out prompt: (N,)."""
    torch.manual_seed(seed)
    train_prompts, train_targets, prompts, targets = make_prompts("cpu")
    reference = GPT()
    sft(reference, *make_demonstrations(train_prompts, train_targets), 100)
    correct = response_table(reward, targets, all_responses())
    probs = response_logprobs(reference, prompts, 1.0).exp()
    return (probs * correct).sum(1).detach()


def shifted_kl(q, p):
    """KL to the reference when the probability of a correct response goes from p to q."""
    return torch.special.xlogy(q, q / p) + torch.special.xlogy(1 - q, (1 - q) / (1 - p))


def tilted(p, kl_coef):
    """Probability of a correct response under π*."""
    return torch.sigmoid(torch.logit(p) + 1 / kl_coef)


def best_of(p, num_samples):
    """Probability that one of several samples is correct, so that a correct one is picked."""
    return 1 - (1 - p) ** num_samples


def main():
    p = torch.cat([reference_success(seed) for seed in SEEDS])
    found = {"command": " ".join(["python benchmark/frontier.py", *sys.argv[1:]])}
    found["seeds"] = SEEDS
    found["machine"] = machine(torch.get_num_threads())
    found["optimal"] = [[0.0, p.mean().item(), math.inf]]  # KL, success, β
    for kl_coef in reversed(KL_COEFS):
        q = tilted(p, kl_coef)
        found["optimal"].append([shifted_kl(q, p).mean().item(), q.mean().item(), kl_coef])
    found["best_of_n"] = []  # KL, success, n
    for num_samples in NUM_SAMPLES:
        q = best_of(p, num_samples)
        found["best_of_n"].append([shifted_kl(q, p).mean().item(), q.mean().item(), num_samples])
    (RESULTS / "frontier.json").write_text(json.dumps(found, indent=1) + "\n")
    for name in ["optimal", "best_of_n"]:
        print(name)
        for kl, success, setting in found[name]:
            print(f"  {setting:6.2f}  KL {kl:.3f}  success {success:.4f}")
    print("\nresults: benchmark/results/frontier.json")


if __name__ == "__main__":
    main()
