"""Does the learned reward become the true one, up to a constant of each prompt, as data grows?

    python benchmark/reward_data.py > benchmark/results/reward_data.md

The annotator's judgements are those of R/τ. So the gap is that between learned r and R/τ, both less
their mean over the reference's responses to the same prompt: root mean square over held-out
prompts and these responses, beside that of R/τ itself (which is what r = 0 would get).
"""

import argparse
import contextlib
import io
import statistics
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reward_model


def gap(**flags):
    """Of one run of reward_model.py, and the size of what it is to find."""
    seen = {}

    def note(tables, stds, rewards, probs, annotator_temperature):
        learned, truth = (tables * stds[:, None, None]).mean(0), rewards / annotator_temperature
        for name, x in (("gap", learned - truth), ("size", truth)):
            x = x - (probs * x).sum(1, keepdim=True)
            seen[name] = (probs * x**2).sum(1).mean().sqrt().item()
        return evaluate_scores(tables, stds, rewards, probs, annotator_temperature)

    evaluate_scores = reward_model.evaluate_scores
    noted = mock.patch.object(reward_model, "evaluate_scores", note)
    with noted, contextlib.redirect_stdout(io.StringIO()):
        reward_model.main(reward_model.Args(tensorboard=False, **flags))
    return seen["gap"], seen["size"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--amounts", type=int, nargs="+", default=[2_916, 11_664, 46_656])
    args = parser.parse_args()
    print("| responses | gap, each seed | size of R/τ |\n|-|-|-|", flush=True)
    for amount in args.amounts:
        found = [gap(seed=seed, num_responses=amount) for seed in args.seeds]
        gaps, size = ", ".join(f"{x:.3f}" for x, _ in found), statistics.mean(y for _, y in found)
        print(f"| {amount:,} | {gaps} | {size:.3f} |", flush=True)


if __name__ == "__main__":
    main()
