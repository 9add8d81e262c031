"""What β does: ppo.py at several --kl-coef, evaluated exactly on the held-out prompts.

python benchmark/kl_coef.py    # prints a markdown table
"""

import argparse

from report import spread
from variants import print_place, run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    print("| `--kl-coef` | success | KL, nats a response | entropy | optimality |")
    print("|-|-|-|-|-|")
    for kl_coef in args.kl_coefs:
        runs = [run(f"ppo.py --kl-coef {kl_coef}", seed) for seed in args.seeds]
        names = "success", "kl", "entropy", "optimality"
        columns = [spread([result[name] for result in runs]) for name in names]
        print(f"| {kl_coef} | {' | '.join(columns)} |", flush=True)
    print_place(args.seeds)


if __name__ == "__main__":
    main()
