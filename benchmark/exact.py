"""Exact evaluation of a saved policy or reward model, by summing over all 1111 responses.

    python ppo.py --save-path policy.pt
    python benchmark/exact.py policy.pt                  # on the held-out prompts
    python benchmark/exact.py policy.pt --map map.png    # and draw the policy before and after
    python benchmark/exact.py reward_model.pt            # a file of reward_model.py

A policy maximises J(π) = E[R] - β · KL(π ‖ π_ref). The best one is π* ∝ π_ref · exp(R/β), and it
attains J* = β · log E_ref[exp(R/β)] (for β = 0: the highest reward). We report

    normalised gain = (J(π) - J(π_ref)) / (J* - J(π_ref)),

which is 0 for the reference and 1 for π*. All three are means over the prompts. Where nothing can
be gained (every response has the same reward) the normalised gain is undefined: nan.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ppo import (  # noqa: E402
    EOS,
    GPT,
    TARGET,
    VOCAB,
    load_reward_model,
    make_prompts,
    response_mask,
    reward,
)


# ---------------------------------------------------------------------------- Enumeration
# Shapes: N prompts, P prompt tokens, Y = 1111 responses, R response tokens, V vocabulary size.
def all_responses():
    """Every response: EOS; a digit and EOS; two digits and any token. Padded with EOS. (Y, R)"""
    tokens = torch.arange(VOCAB)
    triples = torch.cartesian_prod(tokens, tokens, tokens)
    padded = response_mask(triples) | (triples == EOS)  # nothing but EOS after the first EOS
    return triples[padded.all(1)]


def prefix_logits(policy, prompts):
    """Logits after each prefix that a response has: all pairs of digits. (N, 100, R, V)"""
    digits = torch.arange(10, device=prompts.device)
    pairs = torch.cartesian_prod(digits, digits)  # (100, 2)
    tokens = torch.cat([prompts.repeat_interleave(100, 0), pairs.repeat(len(prompts), 1)], 1)
    chunks = []
    for chunk in tokens.split(1024):  # nearly twice as fast as all at once
        states = policy(chunk)[:, prompts.shape[1] - 1 :]  # (1024, R, D)
        chunks.append(policy.head(states))
    logits = torch.cat(chunks)  # (N · 100, R, V)
    return logits.view(len(prompts), 100, *logits.shape[1:])


@torch.no_grad()
def next_token_logprobs(policy, prompts, temperature):
    """Log-probabilities of all tokens at each place of each response: (N, Y, R, V), float64.

    For gradient_variance.py and kl_estimators.py.
    """
    logprobs = (prefix_logits(policy, prompts).double() / temperature).log_softmax(3)
    # The row of a pair that begins with the same tokens. Where a response has EOS, any digit will
    # do: nothing after EOS counts.
    responses = all_responses().to(prompts.device).clamp(max=9)
    return logprobs[:, 10 * responses[:, 0] + responses[:, 1]]


def response_logprobs(policy, prompts, temperature, dtype=torch.float64):
    """Log-probability of each response to each prompt, in the order of all_responses(). (N, Y)"""
    logprobs = (prefix_logits(policy, prompts).to(dtype) / temperature).log_softmax(3)
    logprobs = logprobs.unflatten(1, (10, 10))  # (N, 10, 10, R, V)
    first = logprobs[:, 0, 0, 0]  # (N, V)
    second = logprobs[:, :, 0, 1]  # (N, 10, V), after each first digit
    third = logprobs[:, :, :, 2]  # (N, 10, 10, V), after each pair
    one_digit = first[:, :10] + second[:, :, EOS]  # (N, 10)
    three_tokens = first[:, :10, None, None] + second[:, :, :10, None] + third
    longer = torch.cat([three_tokens.flatten(2), one_digit[:, :, None]], 2)  # (N, 10, 111)
    return torch.cat([longer.flatten(1), first[:, EOS:]], 1)


def response_table(function, inputs, responses):
    """function(inputs, responses), (B,), for each row of inputs with each response: (N, Y)."""
    rows = inputs.repeat_interleave(len(responses), 0)
    columns = responses.repeat(len(inputs), 1)
    values = []
    for chunk in torch.arange(len(rows), device=rows.device).split(1024):
        values.append(function(rows[chunk], columns[chunk]))
    return torch.cat(values).double().view(len(inputs), len(responses))


# ---------------------------------------------------------------------------- Policies
@torch.no_grad()
def evaluate(policy, reference, prompts, targets, kl_coef, temperature=1.0, score=None):
    """Exact expectations under the policy, averaged over the prompts.

    success: probability of a correct response. score: E[R], where R is the task's reward, or
    score(prompts, responses) where that is given. kl and entropy: nats per response.
    objective: J. normalised_gain: defined at the top of this file.
    """
    responses = all_responses().to(prompts.device)
    success = response_table(reward, targets, responses)
    scores = success
    if score is not None:
        scores = response_table(score, prompts, responses)
    logprobs = response_logprobs(policy, prompts, temperature)
    ref_logprobs = response_logprobs(reference, prompts, temperature)

    probs = logprobs.exp()  # (N, Y)
    mean_score = (probs * scores).sum(1).mean().item()
    kl = (probs * (logprobs - ref_logprobs)).sum(1).mean().item()
    objective = mean_score - kl_coef * kl
    ref_objective = (ref_logprobs.exp() * scores).sum(1).mean().item()
    if kl_coef > 0:
        best = kl_coef * torch.logsumexp(ref_logprobs + scores / kl_coef, 1)
    else:
        best = scores.amax(1)
    possible = best.mean().item() - ref_objective
    return {
        "success": (probs * success).sum(1).mean().item(),
        "score": mean_score,
        "kl": kl,
        "entropy": -(probs * logprobs).sum(1).mean().item(),
        "objective": objective,
        "normalised_gain": (objective - ref_objective) / possible if possible > 1e-9 else math.nan,
    }


def load_policy(saved, name):
    """The policy or the reference of a file that a script has saved."""
    gpt = GPT()
    gpt.load_state_dict(saved[name])
    return gpt.requires_grad_(False)


def saved_kl_coef(args):
    """β of the objective. args: the saved flags, as text.

    DPO maximises E[R/τ] - β · KL, where R/τ are the scores that explain the annotator's choices.
    Multiplied by τ, this is E[R] - τβ · KL: in units of R, the coefficient is τ · β.
    """
    if "kl_coef" in args:
        return float(args["kl_coef"])
    return float(args["annotator_temperature"]) * float(args["beta"])


def process_score(prompts, responses):
    """The sum of the rewards per token that reinforce.py --reward process pays. (B,)"""
    import reinforce

    return reinforce.process_reward(TARGET - prompts.sum(1), responses).sum(1)


def evaluate_policy(saved):
    """Exact metrics of a saved policy and of its reference, on the held-out prompts.

    Always for the true reward, also where the policy was trained on a learned one.
    """
    _, _, prompts, targets = make_prompts("cpu")
    policy = load_policy(saved, "policy")
    reference = load_policy(saved, "reference")
    kl_coef = saved_kl_coef(saved["args"])
    temperature = float(saved["args"].get("temperature", 1.0))
    score = process_score if saved["args"].get("reward") == "process" else None
    before = evaluate(reference, reference, prompts, targets, kl_coef, temperature, score)
    after = evaluate(policy, reference, prompts, targets, kl_coef, temperature, score)
    return {"success_before": before["success"], **after}


def draw_policy(saved, path):
    """π(d4, d5), the probability of each pair of digits, before and after; six held-out prompts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, _, prompts, _ = make_prompts("cpu")
    prompts = prompts[:6]
    two_digits = (all_responses() != EOS).sum(1) == 2  # and then EOS: 100 responses
    figure, axes = plt.subplots(2, 6, figsize=(10, 4), layout="constrained")
    for row, name in enumerate(["reference", "policy"]):
        logprobs = response_logprobs(load_policy(saved, name), prompts, 1.0)
        probs = logprobs[:, two_digits].exp().view(6, 10, 10)
        for column, prompt in enumerate(prompts.tolist()):
            # The square root, so that small probabilities show.
            pixels = probs[column].sqrt().tolist()
            image = axes[row, column].imshow(
                pixels, cmap="viridis", vmin=0, vmax=0.6, origin="lower"
            )
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            if row == 0:
                axes[row, column].set_title(" ".join(map(str, prompt)) + " _ _", fontsize=10)
    axes[0, 0].set_ylabel("before\nfourth digit, 0 to 9", fontsize=9)
    axes[1, 0].set_ylabel("after\nfourth digit, 0 to 9", fontsize=9)
    figure.supxlabel("fifth digit, 0 to 9; correct answers lie on a diagonal", fontsize=9)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.01**0.5, 0.1**0.5, 0.6], fraction=0.02)
    bar.ax.set_yticklabels(["0", "0.01", "0.1", "≥ 0.36"], fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------- Reward models
def fit_scale(margins, truth, weights):
    """The factor s, up to 100, that makes σ(s · margins) predict truth best (minimal log loss).

    The loss is convex in s; bisection finds where its derivative is 0. All inputs (N, Y, Y).
    """
    low = 0.0
    high = 100.0
    for _ in range(40):
        scale = (low + high) / 2
        derivative = (weights * margins * ((scale * margins).sigmoid() - truth)).sum()
        if derivative > 0:
            high = scale
        else:
            low = scale
    return scale


def pair_metrics(scores, rewards, probs, annotator_temperature):
    """How well scores predict which of two sampled responses the annotator prefers.

    scores, rewards, probs: (N, Y). Sums over all pairs of different responses, weighted by their
    probability. accuracy: how often the annotator prefers the response with the higher score.
    bayes_accuracy: the same for the higher reward; no scores can do better, since the annotator
    errs at random. calibration_error: the expected calibration error with ten bins of width 0.1,
    after the scores are multiplied by one fitted factor.
    """
    weights = probs[:, :, None] * probs[:, None]  # (N, Y, Y)
    weights.diagonal(dim1=1, dim2=2).zero_()  # two identical responses are not compared
    weights = weights / weights.sum()
    truth = ((rewards[:, :, None] - rewards[:, None]) / annotator_temperature).sigmoid()
    margins = scores[:, :, None] - scores[:, None]
    accuracy = (weights * (0.5 + (truth - 0.5) * margins.sign())).sum()
    bayes_accuracy = (weights * torch.maximum(truth, 1 - truth)).sum()

    scale = fit_scale(margins, truth, weights)
    predicted = (scale * margins).sigmoid()
    gaps = torch.zeros(10, dtype=weights.dtype)
    bins = (predicted * 10).long().clamp(max=9)
    gaps.index_add_(0, bins.flatten(), (weights * (predicted - truth)).flatten())
    return {
        "accuracy": accuracy.item(),
        "bayes_accuracy": bayes_accuracy.item(),
        "calibration_error": gaps.abs().sum().item(),
        "scale": scale,
    }


def correlation(x, y, probs):
    """Pearson correlation over all prompts and responses. All inputs (N, Y)."""
    weights = probs / probs.sum()
    x = x - (weights * x).sum()
    y = y - (weights * y).sum()
    covariance = (weights * x * y).sum()
    return (covariance / ((weights * x**2).sum() * (weights * y**2).sum()).sqrt()).item()


def best_of_n(scores, rewards, probs, n):
    """Mean reward of the response with the highest score among n samples. All inputs (N, Y)."""
    order = scores.argsort(1)
    cumulative = probs.gather(1, order).cumsum(1)
    # A response is the best of n if all n are among it and those below, but not all below it.
    best_probs = (cumulative**n).diff(dim=1, prepend=torch.zeros(len(probs), 1))
    return (best_probs * rewards.gather(1, order)).sum(1).mean().item()


def distance_per_prompt(x, y, probs):
    """Root mean square of x - y, after subtracting the mean for each prompt. All inputs (N, Y)."""
    difference = x - y
    difference = difference - (probs * difference).sum(1, keepdim=True)
    return (probs * difference**2).sum(1).mean().sqrt().item()


@torch.no_grad()
def evaluate_reward_model(reward_model, reference, prompts, targets, annotator_temperature):
    """Exact metrics of a reward model on the reference's responses.

    The 1000 truncated responses, which the reference writes about once in 200 times, are left out:
    the tables of all pairs would be a hundred times as large. With an uncertainty_coef above 0 the
    scores themselves are random: they depend on responses that the reward model samples.

    Beside pair_metrics and correlation: best_of_16 and best_of_16_by_reward, the mean reward of the
    best of 16 samples by score and by reward. gap: root mean square distance of the scores, times
    the fitted factor, from R/τ, apart from a constant per prompt. gap_of_zero: the same for scores
    of 0, the size of R/τ.
    """
    responses = all_responses()
    ended = (responses == EOS).any(1)
    responses = responses[ended]  # (111, R)
    logprobs = response_logprobs(reference, prompts, 1.0)[:, ended]
    probs = logprobs.softmax(1)  # of those that end; sums to 1
    rewards = response_table(reward, targets, responses)
    scores = response_table(reward_model, prompts, responses)
    metrics = pair_metrics(scores, rewards, probs, annotator_temperature)
    logits = metrics.pop("scale") * scores
    true_logits = rewards / annotator_temperature
    return {
        **metrics,
        "correlation": correlation(scores, rewards, probs),
        "best_of_16": best_of_n(scores, rewards, probs, 16),
        "best_of_16_by_reward": best_of_n(rewards, rewards, probs, 16),
        "gap": distance_per_prompt(logits, true_logits, probs),
        "gap_of_zero": distance_per_prompt(torch.zeros_like(scores), true_logits, probs),
    }


# ---------------------------------------------------------------------------- Files
def evaluate_file(path):
    """Exact metrics of a file saved by one of the scripts, on the held-out prompts."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    torch.manual_seed(1)  # with --uncertainty-coef, a reward model samples
    if "policy" in saved:
        return evaluate_policy(saved)
    _, _, prompts, targets = make_prompts("cpu")
    reward_model = load_reward_model(path, "cpu")
    reference = load_policy(saved, "reference")
    annotator_temperature = float(saved["args"]["annotator_temperature"])
    return evaluate_reward_model(reward_model, reference, prompts, targets, annotator_temperature)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="file saved by a script's --save-path")
    parser.add_argument("--map", type=Path, help="draw the policy before and after to this file")
    args = parser.parse_args()
    if args.map is not None:
        saved = torch.load(args.path, map_location="cpu", weights_only=True)
        if "policy" not in saved:
            parser.error("--map draws policies, and this file holds a reward model")
        draw_policy(saved, args.map)
    for name, value in evaluate_file(args.path).items():
        print(f"{name.replace('_', ' '):20s} {value:8.4f}")


if __name__ == "__main__":
    main()
