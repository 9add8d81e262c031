"""What β does: ppo.py at several --kl-coef, evaluated exactly on the held-out prompts.

python benchmark/kl_coef.py    # prints a markdown table
"""

import argparse
from statistics import mean

from variants import run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    print("| `--kl-coef` | success | KL, nats a response | entropy | optimality, each seed |")
    print("|-|-|-|-|-|")
    for kl_coef in args.kl_coefs:
        runs = [run(f"ppo.py --kl-coef {kl_coef}", seed) for seed in args.seeds]
        means = [mean(result[name] for result in runs) for name in ("success", "kl", "entropy")]
        cells = " | ".join(f"{value:.3f}" for value in means)
        each = ", ".join(f"{result['optimality']:.3f}" for result in runs)
        print(f"| {kl_coef} | {cells} | {each} |", flush=True)


if __name__ == "__main__":
    main()
