"""Reward hacking: ppo.py on a reward learned from few, noisy preferences, at several --kl-coef.

    python benchmark/reward_hacking.py    # results: benchmark/results/reward_hacking.json

With each seed an ensemble of reward models learns from a few pairs; PPO then maximises its score,
with and without --uncertainty-coef. Learned and true reward are those of the samples, on training
prompts, averaged over some rollouts: points on a path away from the reference.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from run import (
    RESULTS,
    TEN_SEEDS,
    average_points,
    child_seconds,
    execute,
    machine,
    read_scalars,
    run_folder,
)

REWARD_MODEL = (
    "reward_model.py --num-examples 1024 --num-samples 2 --epochs 6 --minibatch-size 8"
    " --ensemble-size 5 --save-path rm.pt"
)
PPO = "ppo.py --reward-model ../rm.pt --total-episodes 15360 --learning-rate 5e-4"
CURVES = {"kl": "charts/kl", "learned": "charts/score", "true": "charts/true_score"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=TEN_SEEDS)
    parser.add_argument("--uncertainty-coefs", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0])
    parser.add_argument("--points", type=int, default=12, help="points on each path")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        for uncertainty_coef in args.uncertainty_coefs:
            flags = f"--uncertainty-coef {uncertainty_coef}"
            with tempfile.TemporaryDirectory() as folder:
                execute(f"{REWARD_MODEL} {flags}", seed, args.threads, folder)
                for kl_coef in args.kl_coefs:
                    ppo_folder = Path(folder) / f"kl_coef_{kl_coef}"
                    ppo_folder.mkdir()
                    execute(f"{PPO} --kl-coef {kl_coef}", seed, args.threads, ppo_folder)
                    curves = read_scalars(run_folder(ppo_folder, "ppo.py"))
                    run = {"seed": seed, "uncertainty_coef": uncertainty_coef, "kl_coef": kl_coef}
                    for name, tag in CURVES.items():
                        points = average_points(curves[tag], args.points)
                        run[name] = [value for _, value in points]
                    runs.append(run)
                    ends = {name: run[name][-1] for name in CURVES}
                    print(f"seed {seed} {flags} --kl-coef {kl_coef}: {ends}", flush=True)
    results = {
        "command": f"python benchmark/reward_hacking.py --threads {args.threads}",
        "machine": machine(args.threads),
        "cpu_seconds": round(child_seconds()),
        "runs": runs,
    }
    path = RESULTS / "reward_hacking.json"
    path.write_text(json.dumps(results) + "\n")
    print(f"\nresults: benchmark/results/{path.name}; figure: python benchmark/report.py --figures")


if __name__ == "__main__":
    main()
