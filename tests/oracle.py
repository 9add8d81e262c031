"""What the scripts should compute, written a second time: float64, loops and full enumeration.

Nothing here imports a script. A tabular policy stands for the GPT: one row of logits for each
prefix, so every response, expectation and gradient can be written down exactly.
"""

import itertools
import math

import torch

EOS = 10


def responses():
    """All 1111 responses as tuples of their real tokens: EOS, digit EOS, digit digit anything."""
    digits = range(10)
    short = [(EOS,)] + [(a, EOS) for a in digits]
    return short + [(a, b, c) for a, b in itertools.product(digits, digits) for c in range(11)]


def score(prompt, response, kind="exact"):
    """The reward of one response, from the words of the task."""
    if len(response) != 3 or EOS in response[:2] or response[2] != EOS:
        return 0.0
    miss = abs(sum(prompt) + response[0] + response[1] - 20)
    return {
        "exact": float(miss == 0),
        "sharp": math.exp(-miss / 2),
        "distance": max(0.0, 1 - miss / 10),
    }[kind]


def row(prefix):
    """Row of the logits table for a prefix of no, one or two digits."""
    return [0, 1 + sum(prefix[:1]), 11 + int("".join(map(str, prefix)) or 0)][len(prefix)]


def table(seed, scale=1.0):
    """Random logits (111, 11) of a tabular policy."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(111, 11, generator=generator, dtype=torch.float64)


def logprob_list(logits, response):
    """Log-probability of each token of a response, as a list of scalars."""
    logprobs = logits.log_softmax(1)
    return [logprobs[row(response[:t]), token] for t, token in enumerate(response)]


def padded(rows, fill=0.0):
    """Lists of unequal length to a tensor (B, 3)."""
    rows = [[torch.as_tensor(x, dtype=torch.float64) for x in r] for r in rows]
    fill = torch.tensor(fill, dtype=torch.float64)
    return torch.stack([torch.stack([*r, *[fill] * (3 - len(r))]) for r in rows])


def token_table(logits):
    """Log-probabilities (1111, 3) of all responses, token by token, zero after EOS."""
    logprobs = logits.log_softmax(1)
    rows, columns = zip(
        *[
            ([row(y[:t]) for t in range(len(y))] + [0] * (3 - len(y)), [*y] + [0] * (3 - len(y)))
            for y in responses()
        ],
        strict=True,
    )
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in responses()])
    return torch.where(mask, logprobs[torch.tensor(rows), torch.tensor(columns)], 0.0)


def objective(logits, ref_logits, scores, beta):
    """J = E[R] - beta · KL(policy ‖ reference), by summing over all responses."""
    logprobs, ref_logprobs = token_table(logits).sum(1), token_table(ref_logits).sum(1)
    return (logprobs.exp() * (scores - beta * (logprobs - ref_logprobs))).sum()


def optimal(ref_logprobs, scores, beta):
    """π* ∝ π_ref · exp(R/beta), normalised by hand, and the J it attains. Lists of floats."""
    weights = [math.exp(lp + r / beta) for lp, r in zip(ref_logprobs, scores, strict=True)]
    probs = [w / sum(weights) for w in weights]
    value = sum(
        p * (r - beta * (math.log(p) - lp))
        for p, r, lp in zip(probs, scores, ref_logprobs, strict=True)
    )
    return probs, value


def state_values(logits, ref_logits, scores, beta):
    """Expected reward still to come, less beta · k1 of the tokens still to come, at each prefix."""
    probs = logits.softmax(1).tolist()
    logprobs, ref_logprobs = logits.log_softmax(1).tolist(), ref_logits.log_softmax(1).tolist()
    paid = dict(zip(responses(), scores.tolist(), strict=True))

    def value(prefix):
        total = 0.0
        for token in range(11):
            r = row(prefix)
            gain = -beta * (logprobs[r][token] - ref_logprobs[r][token])
            response = (*prefix, token)
            gain += paid[response] if response in paid else value(response)
            total += probs[r][token] * gain
        return total

    return {prefix: value(prefix) for prefix in {y[:t] for y in responses() for t in range(len(y))}}


def gae(rewards, values, gamma, gae_lambda):
    """Advantages of one response from the definition: discounted sums of temporal differences."""
    n = len(rewards)
    values = [*values, 0.0]  # nothing follows the end
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def clipped_objective(ratio, advantage, clip_coef, dual_clip=None):
    """PPO's objective for one token."""
    value = min(ratio * advantage, min(max(ratio, 1 - clip_coef), 1 + clip_coef) * advantage)
    if dual_clip is not None and advantage < 0:
        value = max(value, dual_clip * advantage)
    return value
