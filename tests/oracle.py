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


def clipped_error(value, old_value, target, value_clip):
    """PPO's loss of the value of one token: half the worse of two squared errors."""
    moved = max(-value_clip, min(value_clip, value - old_value))
    return 0.5 * max((value - target) ** 2, (old_value + moved - target) ** 2)


def row_kl(logits, ref_logits):
    """KL(policy ‖ reference) of one distribution over tokens, each given as a list of logits."""
    total = sum(math.exp(x) for x in logits)
    ref_total = sum(math.exp(x) for x in ref_logits)
    kl = 0.0
    for x, y in zip(logits, ref_logits, strict=True):
        kl += math.exp(x) / total * (x - math.log(total) - y + math.log(ref_total))
    return kl


def narrow(logits):
    """The table with all but a few tokens made impossible, so that groups can be enumerated."""
    allowed = torch.full_like(logits, -60.0)
    for prefix in [(), *[(a,) for a in range(10)], *itertools.product(range(10), repeat=2)]:
        tokens = [(2, 7, EOS), (3, 8, EOS), (5, EOS)][len(prefix)]
        allowed[row(prefix), list(tokens)] = 0.0
    return logits + allowed


def narrow_responses():
    """The 11 responses that a narrow policy can write."""
    short = [(EOS,), (2, EOS), (7, EOS)]
    return short + list(itertools.product((2, 7), (3, 8), (5, EOS)))


def discounted(rewards, gamma):
    """Return from each token on, from the definition."""
    n = len(rewards)
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]


def mean_without(values, size, i):
    """Mean of the members of i's group of the given size but i itself; 0 if it is alone."""
    start = i - i % size
    others = [values[j] for j in range(start, start + size) if j != i]
    return sum(others) / len(others) if others else 0.0


def rwr_weights(totals, beta, fraction):
    """exp(total / beta), normalised, over those no worse than the last of the best fraction."""
    bar = sorted(totals, reverse=True)[math.ceil(fraction * len(totals)) - 1]
    weights = [math.exp(x / beta) if x >= bar else 0.0 for x in totals]
    return [w / sum(weights) for w in weights]


def deviation(values):
    """Standard deviation over N."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))


def group_advantages(scores, size, scale):
    """Score less the group's mean, over the deviation asked for; 0 where there is none."""
    advantages = []
    for i in range(0, len(scores), size):
        group = scores[i : i + size]
        by = {"none": 1.0, "group": deviation(group), "batch": deviation(scores)}[scale]
        advantages += [(x - sum(group) / size) / by if deviation(group) else 0.0 for x in group]
    return advantages


def grpo_loss(new, old, advantages, loss_type, low, high, longest):
    """Each paper's loss for responses given as lists of log-probabilities of unequal length."""
    terms = []  # one list of token terms a response
    for n, o, a in zip(new, old, advantages, strict=True):
        ratios = [(x - y).exp() for x, y in zip(n, o, strict=True)]
        if loss_type == "gspo":
            s = math.prod(ratios) ** (1 / len(ratios))
            terms.append([torch.min(s * a, s.clamp(1 - low, 1 + high) * a)])
        elif loss_type == "cispo":
            weights = [min(r.item(), 1 + high) for r in ratios]
            terms.append([w * a * x for w, x in zip(weights, n, strict=True)])
        else:
            terms.append([torch.min(r * a, r.clamp(1 - low, 1 + high) * a) for r in ratios])
    sums = [sum(t) for t in terms]
    if loss_type in ("grpo", "gspo"):
        return -sum(s / len(t) for s, t in zip(sums, terms, strict=True)) / len(sums)
    if loss_type == "dr-grpo":
        return -sum(sums) / (len(sums) * longest)
    return -sum(sums) / sum(len(t) for t in terms)


def layer_norm(x, weight, bias):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-5) * weight + bias


def gpt_states(weights, tokens, heads):
    """Hidden states of one sequence under a GPT's weights: a list of (D,), a position at a time."""
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks"))
    keys, values, states = [[] for _ in range(layers)], [[] for _ in range(layers)], []

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name, x):
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    for position, token in enumerate(tokens):
        x = weights["embed.weight"][token] + weights["position.weight"][position]
        size = len(x) // heads
        for i in range(layers):
            at = f"blocks.{i}"
            query, key, value = linear(f"{at}.qkv", norm(f"{at}.norm1", x)).chunk(3)
            keys[i].append(key)
            values[i].append(value)
            mixed = []
            for part in (slice(h * size, (h + 1) * size) for h in range(heads)):
                odds = [math.exp(query[part] @ k[part] / math.sqrt(size)) for k in keys[i]]
                mixed.append(sum(o * v[part] for o, v in zip(odds, values[i], strict=True)))
                mixed[-1] = mixed[-1] / sum(odds)
            x = x + linear(f"{at}.proj", torch.cat(mixed))
            up = linear(f"{at}.up", norm(f"{at}.norm2", x)).tolist()
            up = [0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in up]  # GELU
            x = x + linear(f"{at}.down", torch.tensor(up, dtype=torch.float64))
        states.append(norm("norm", x))
    return states


def process_rewards(prompt, response):
    """Reward of each token: half for a first digit that a second completes, half for the sum."""
    rewards = [0.0] * len(response)
    first = response[0]
    if first != EOS and any(sum(prompt) + first + second == 20 for second in range(10)):
        rewards[0] = 0.5
    rewards[-1] += 0.5 * score(prompt, response)
    return rewards


def adamw(weights, gradients, learning_rates, max_norm):
    """Weights after each step of AdamW with betas (0.9, 0.99) and no weight decay, by its formulas.

    weights: a float64 vector. gradients: one per step, scaled down to the norm max_norm.
    """
    first = torch.zeros_like(weights)
    second = torch.zeros_like(weights)
    history = []
    for step, (gradient, rate) in enumerate(zip(gradients, learning_rates, strict=True), 1):
        gradient = gradient * min(1.0, max_norm / gradient.norm().item())
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        scale = (second / (1 - 0.99**step)).sqrt() + 1e-8
        weights = weights - rate * first / (1 - 0.9**step) / scale
        history.append(weights)
    return history


def grpo_terms(new, old, advantage, loss_type, low, high):
    """Terms of the objective of one response, a list of log-probabilities, and which are clipped.

    One term per token. For gspo they are all the same, since its ratio is that of the response.
    """
    ratios = [(x - y).exp() for x, y in zip(new, old, strict=True)]
    if loss_type == "gspo":
        ratios = [math.prod(ratios) ** (1 / len(ratios))] * len(ratios)
    terms = []
    outside = []
    for ratio, logprob in zip(ratios, new, strict=True):
        if loss_type == "cispo":
            terms.append(min(ratio.item(), 1 + high) * advantage * logprob)
            outside.append(ratio.item() > 1 + high)
        else:
            clipped = ratio.clamp(1 - low, 1 + high)
            terms.append(torch.min(ratio * advantage, clipped * advantage))
            outside.append(ratio.item() > 1 + high or ratio.item() < 1 - low)
    return terms, outside


def token_weights(lengths, loss_type, longest):
    """What each token of a response weighs: one number per response of a rollout."""
    if loss_type in ("grpo", "gspo"):
        return [1 / n for n in lengths]
    if loss_type == "dr-grpo":
        return [1 / longest for _ in lengths]
    return [len(lengths) / sum(lengths) for _ in lengths]


def kl_penalty(logprob, old_logprob, ref_logprob, kind):
    """Estimate of KL(policy ‖ reference) from one sampled token; numbers or tensors."""
    d = logprob - ref_logprob
    if kind == "k2":
        return d**2 / 2
    k3 = math.e ** (-d) - 1 + d
    if kind == "k3":
        return k3
    return math.e ** (logprob - old_logprob) * k3


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def dpo_pair_loss(h, beta, loss_type, epsilon):
    """The papers' losses of one preference pair: h is the log-ratio of chosen minus rejected."""
    if loss_type == "ipo":
        return (h - 0.5 / beta) ** 2
    if loss_type == "hinge":
        return max(0.0, 1 - beta * h)
    agrees = -log_sigmoid(beta * h)
    disagrees = -log_sigmoid(-beta * h)
    if loss_type == "robust":
        return ((1 - epsilon) * agrees - epsilon * disagrees) / (1 - 2 * epsilon)
    return (1 - epsilon) * agrees + epsilon * disagrees


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def sample_sets(reference, sampler, rewards, tau, num_samples):
    """Every set of a demonstration and samples: a list of (its probability, indices of responses).

    The demonstration comes first, drawn from p ∝ reference · exp(R/tau), and then the samples, each
    drawn from the sampler. Sets that differ only in the order of the samples are one.
    """
    weights = [p * math.exp(r / tau) for p, r in zip(reference, rewards, strict=True)]
    indices = range(len(rewards))
    sets = []
    for demonstration in indices:
        for samples in itertools.combinations_with_replacement(indices, num_samples):
            chance = weights[demonstration] / sum(weights) * math.factorial(num_samples)
            for i in indices:
                count = samples.count(i)
                chance *= sampler[i] ** count / math.factorial(count)
            sets.append((chance, (demonstration, *samples)))
    return sets
