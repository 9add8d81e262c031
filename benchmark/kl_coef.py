"""What β does: ppo.py at several --kl-coef, evaluated exactly on the held-out prompts.

python benchmark/kl_coef.py    # prints a markdown table
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    print("| `--kl-coef` | success | KL, nats a response | entropy | optimality, each seed |")
    print("|-|-|-|-|-|")
    for kl_coef in args.kl_coefs:
        runs = []
        for seed in args.seeds:
            with contextlib.redirect_stdout(io.StringIO()):
                runs.append(ppo.main(ppo.Args(seed=seed, kl_coef=kl_coef, tensorboard=False)))
        means = [mean(run[name] for run in runs) for name in ("success", "kl", "entropy")]
        cells = " | ".join(f"{value:.3f}" for value in means)
        each = ", ".join(f"{run['optimality']:.3f}" for run in runs)
        print(f"| {kl_coef} | {cells} | {each} |", flush=True)


if __name__ == "__main__":
    main()
