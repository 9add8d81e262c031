"""What gpt2_sentiment.py should compute, once more: float64, one row and one token at a time.

Nothing here imports the script or uses a torch module; weights are as Hugging Face's files hold
them, matrices of linear layers (in, out). Tensors only so that gradients can be had.
"""

import math
import re

import torch


def float64(weights, grad=False):
    """Weights by name without "transformer.", as float64 leaves."""
    found = {name.removeprefix("transformer."): x.double() for name, x in weights.items()}
    return {name: x.clone().requires_grad_(grad) for name, x in found.items()}


def layer_norm(x, weight, bias, epsilon):
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / (variance + epsilon).sqrt() * weight + bias


def hidden(w, config, ids):
    """Hidden states of one sequence without padding, a list of (D,), one position after another."""
    heads, width, epsilon = config["n_head"], config["n_embd"], config["layer_norm_epsilon"]
    size, layers = width // heads, config["n_layer"]
    keys, values = [[] for _ in range(layers)], [[] for _ in range(layers)]
    blocks = [
        {name.removeprefix(f"h.{i}."): x for name, x in w.items() if name.startswith(f"h.{i}.")}
        for i in range(layers)
    ]
    states = []
    for position, token in enumerate(ids):
        x = w["wte.weight"][token] + w["wpe.weight"][position]
        for layer, at in enumerate(blocks):
            y = layer_norm(x, at["ln_1.weight"], at["ln_1.bias"], epsilon)
            y = y @ at["attn.c_attn.weight"] + at["attn.c_attn.bias"]
            query, key, value = y[:width], y[width : 2 * width], y[2 * width :]
            keys[layer].append(key), values[layer].append(value)
            mixed = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                seen = torch.stack(keys[layer])[:, part], torch.stack(values[layer])[:, part]
                weights = (seen[0] @ query[part] / math.sqrt(size)).exp()
                mixed.append(weights / weights.sum() @ seen[1])
            x = x + torch.cat(mixed) @ at["attn.c_proj.weight"] + at["attn.c_proj.bias"]
            y = layer_norm(x, at["ln_2.weight"], at["ln_2.bias"], epsilon)
            y = y @ at["mlp.c_fc.weight"] + at["mlp.c_fc.bias"]
            y = 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())
            x = x + y @ at["mlp.c_proj.weight"] + at["mlp.c_proj.bias"]
        states.append(layer_norm(x, w["ln_f.weight"], w["ln_f.bias"], epsilon))
    return states


def logits(w, config, ids):
    """Logits of one sequence, (T, V)."""
    return torch.stack([w["wte.weight"] @ state for state in hidden(w, config, ids)])


def kept(values, temperature=1.0, top_k=0, top_p=1.0):
    """The tokens that may be drawn: the k likeliest, of these the fewest that make up p."""
    order = sorted(range(len(values)), key=lambda token: -values[token])
    if top_k:
        order = order[:top_k]
    weights = [math.exp((values[token] - values[order[0]]) / temperature) for token in order]
    found, total = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        found.append(token)
        total += weight / sum(weights)
        if total >= top_p and top_p < 1:
            break
    return found


def distribution(values, temperature=1.0, top_k=0, top_p=1.0):
    """Probability of each token under the policy that draws from those that are kept."""
    probs = [0.0] * len(values)
    tokens = kept(values, temperature, top_k, top_p)
    for token in tokens:
        probs[token] = math.exp((values[token] - max(values)) / temperature)
    return [p / sum(probs) for p in probs]


# The tutorial's words and what they are worth.
GOOD = """good 1 great 2 excellent 3 wonderful 3 amazing 3 happy 2 glad 1 love 3 like 1 awesome 2
fun 2 super 2 incredible 3 perfect 3"""
BAD = "bad 1 awful 2 terrible 3 angry 2 horrible 3 lame 1 hate 3 gross 2 sad 1 upset 2"


def split(text):
    """Words between blanks, in lower case, without what is no letter or digit at their ends."""
    found = [re.sub(r"^\W+|\W+$", "", word) for word in text.lower().split()]
    return [word for word in found if word]


def worth(table):
    items = table.split()
    return {word: int(value) for word, value in zip(items[::2], items[1::2], strict=True)}


def sentiment(text):
    total = 0.0
    for word in split(text):
        total += 5 * worth(GOOD).get(word, 0) - worth(BAD).get(word, 0)
    return max(0.1, total)


def positivity(text):
    found, total = split(text), 0.0
    for i, word in enumerate(found):
        if word in ("good", "great", "excellent", "wonderful", "amazing"):
            negated = i > 0 and found[i - 1] in ("not", "never", "don't", "no")
            total += -0.5 if negated else 1.0
    count = max(len(found), 1)
    return min(1.0, max(0.0, total / count * (len(set(found)) / count)))


def composite(prompt, response):
    """The weighted sum, and its three parts."""
    count = len(response.split())
    length = count / 50 if count < 50 else 1.0 if count <= 500 else max(0.0, 2 - count / 500)
    asked, said = set(split(prompt)), set(split(response))
    relevance = sum(word in said for word in asked) / max(len(asked), 1)
    formatting = ("\n\n" in response) + (re.search(r"[.!?]\s+[A-Z]", response) is not None)
    first = response.removeprefix(" ")[:1]  # a continuation begins with a blank
    formatting += first.isascii() and first.isupper()
    return 0.2 * length + 0.5 * relevance + 0.3 * formatting / 3, length, relevance, formatting / 3


def distinct_2(texts):
    """Distinct pairs of neighbouring words over all pairs."""
    pairs = []
    for text in texts:
        found = split(text)
        pairs += [(found[i], found[i + 1]) for i in range(len(found) - 1)]
    return len(set(pairs)) / len(pairs)
