"""Reward hacking: ppo.py on a reward learned from few, noisy judgements, at several --kl-coef.

    python benchmark/reward_hacking.py    # prints a table; results/reward_hacking.json, a figure

With each seed an ensemble of reward models learns from a few pairs, judged by a noisy annotator;
PPO then raises its score (in standard deviations of the reference's samples), with and without
--rm-uncertainty-coef. Learned and true reward are those of each rollout, to training prompts,
averaged over --window rollouts: points on a path that leads away from the reference as KL grows.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import FIGURES, RESULTS, hacking_table
from run import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo
import reward_model

COEFS = "rm_uncertainty_coef", "kl_coef"
HELD_OUT = 2  # prompts of the exact evaluation at the end, which is not the point here


def few_held_out(script):
    """Let a script evaluate on some of the held-out prompts."""
    train, held_out = script.make_prompts()
    script.make_prompts = lambda: (train, held_out[:HELD_OUT])


def curve(path, seed, episodes, kl_coef, uncertainty_coef, window):
    """Means over windows of the rollouts of one run: KL, learned and true reward."""
    rows = []

    def keep(writer, group, metrics, step):
        if group == "charts":
            names = "kl", "score", "gold_score"
            rows.append([float(torch.as_tensor(metrics[name])) for name in names])

    ppo.write = keep
    flags = {"reward_model": path, "rm_uncertainty_coef": uncertainty_coef, "kl_coef": kl_coef}
    flags["learning_rate"] = 5e-4  # gentle, so that the path leads away step by step
    ppo.main(ppo.Args(seed=seed, total_episodes=episodes, tensorboard=False, **flags))
    rows = torch.tensor(rows)
    rows = rows[: len(rows) // window * window].view(-1, window, 3).mean(1)
    kl, learned, true = ([round(x, 4) for x in column.tolist()] for column in rows.T)
    run = {"seed": seed, "kl_coef": kl_coef, "rm_uncertainty_coef": uncertainty_coef}
    return run | {"kl": kl, "learned": learned, "true": true}


def draw(runs, path):
    """Learned reward above, true reward below, against KL; a column for each penalty.

    The mean over seeds, and each seed as a thin line.
    """
    penalties, betas = (sorted({run[name] for run in runs}) for name in COEFS)
    figure, axes = plt.subplots(2, len(penalties), figsize=(9, 6), sharex=True, sharey="row")
    for column, penalty in enumerate(penalties):
        for number, beta in enumerate(betas):
            seeds = [run for run in runs if [run[name] for name in COEFS] == [penalty, beta]]
            for row, name in enumerate(("learned", "true")):
                line = {"color": f"C{number}", "label": f"--kl-coef {beta:g}"}
                kl, reward = (torch.tensor([run[x] for run in seeds]) for x in ("kl", name))
                axes[row, column].plot(kl.T, reward.T, color=line["color"], alpha=0.25, lw=0.8)
                axes[row, column].plot(kl.mean(0), reward.mean(0), marker=".", **line)
        axes[0, column].set_title(f"--rm-uncertainty-coef {penalty:g}")
        axes[1, column].set_xlabel("KL(policy ‖ reference), nats a response")
    axes[0, 0].set_ylabel("learned reward, less the penalty")
    axes[1, 0].set_ylabel("true reward")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--num-responses", type=int, default=2_048)
    parser.add_argument("--group-size", type=int, default=2)
    parser.add_argument("--annotator-temperature", type=float, default=0.5)
    parser.add_argument("--ensemble-size", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=15_360)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0])
    parser.add_argument("--uncertainty-coefs", type=float, nargs="+", default=[0.0, 1.0])
    args = parser.parse_args()
    few_held_out(ppo)
    few_held_out(reward_model)
    names = "num_responses group_size annotator_temperature ensemble_size".split()
    flags, runs = {name: getattr(args, name) for name in names}, []
    with tempfile.TemporaryDirectory() as folder:
        flags["save_path"] = path = Path(folder) / "rm.pt"
        for seed in args.seeds:
            reward_model.main(reward_model.Args(seed=seed, tensorboard=False, **flags))
            for penalty, beta in itertools.product(args.uncertainty_coefs, args.kl_coefs):
                runs.append(curve(path, seed, args.episodes, beta, penalty, args.window))
    results = {"flags": vars(args), "machine": machine(torch.get_num_threads()), "runs": runs}
    (RESULTS / "reward_hacking.json").write_text(json.dumps(results) + "\n")
    draw(runs, FIGURES / "reward_hacking.png")
    print(hacking_table(None))


if __name__ == "__main__":
    main()
