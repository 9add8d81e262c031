"""Reward hacking: ppo.py on a reward learned from few, noisy judgements, at several --kl-coef.

    python benchmark/reward_hacking.py    # results/reward_hacking.json, figures/reward_hacking.png

An ensemble of reward models learns from a few pairs, judged by a noisy annotator; PPO then raises
its score (in standard deviations of the reference's samples), with and without
--rm-uncertainty-coef. Learned and true reward are those of each rollout, to training prompts,
averaged over --window rollouts: points on a path that leads away from the reference as KL grows.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import ppo  # noqa: E402
import reward_model  # noqa: E402

HELD_OUT = 16  # prompts of the exact evaluation at the end, which is not the point here


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
    run = {"kl_coef": kl_coef, "rm_uncertainty_coef": uncertainty_coef}
    return run | {"kl": kl, "learned": learned, "true": true}


def draw(results, path):
    """Learned reward above, true reward below, against KL; a column for each penalty."""
    penalties = sorted({run["rm_uncertainty_coef"] for run in results["runs"]})
    figure, axes = plt.subplots(2, len(penalties), figsize=(9, 6), sharex=True, sharey="row")
    for column, penalty in enumerate(penalties):
        for run in results["runs"]:
            if run["rm_uncertainty_coef"] == penalty:
                for row, name in enumerate(("learned", "true")):
                    label = f"--kl-coef {run['kl_coef']:g}"
                    axes[row, column].plot(run["kl"], run[name], marker=".", label=label)
        axes[0, column].set_title(f"--rm-uncertainty-coef {penalty:g}")
        axes[1, column].set_xlabel("KL(policy ‖ reference), nats a response")
    axes[0, 0].set_ylabel("learned reward, less the penalty")
    axes[1, 0].set_ylabel("true reward")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rm.pt"
        names = "seed num_responses group_size annotator_temperature ensemble_size".split()
        flags = {name: getattr(args, name) for name in names}
        learned = reward_model.main(reward_model.Args(tensorboard=False, save_path=path, **flags))
        learned.pop("seconds")
        runs = [
            curve(path, args.seed, args.episodes, beta, penalty, args.window)
            for penalty in args.uncertainty_coefs
            for beta in args.kl_coefs
        ]
    results = {"flags": vars(args), "reward_model": learned, "runs": runs}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "figures").mkdir(exist_ok=True)
    (HERE / "results" / "reward_hacking.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, HERE / "figures" / "reward_hacking.png")
    print("kl coef  penalty  learned        true           KL at the end")
    for run in runs:
        moved = [f"{run[n][0]:5.2f} -> {run[n][-1]:5.2f}" for n in ("learned", "true")]
        print(
            f"{run['kl_coef']:7g}  {run['rm_uncertainty_coef']:7g}", *moved, f"{run['kl'][-1]:.2f}"
        )


if __name__ == "__main__":
    main()
