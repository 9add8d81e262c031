"""Draw what ppo.py does to the policy: π(d4, d5) of some held-out prompts, before and after.

python benchmark/policy_map.py    # trains ppo.py, seed 1; writes figures/policy_map.png
"""

import copy
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppo  # noqa: E402


def main():
    models, deepcopy = [], copy.deepcopy

    def keep(policy):  # main copies its policy once, to be the reference
        models[:] = [deepcopy(policy), policy]
        return models[0]

    copy.deepcopy = keep
    ppo.main(ppo.Args(tensorboard=False))
    prompts = ppo.make_prompts()[1][:6]
    pairs = (ppo.all_responses() != ppo.EOS).sum(1) == 2  # two digits and EOS
    figure, axes = plt.subplots(2, len(prompts), figsize=(10, 4), sharex=True, sharey=True)
    for row, (model, title) in zip(
        axes, zip(models, ("before", "after"), strict=True), strict=True
    ):
        table = ppo.response_distribution(model, prompts, 1.0)[:, pairs].exp().view(-1, 10, 10)
        for ax, grid, prompt in zip(row, table, prompts.tolist(), strict=True):
            ax.imshow(grid.sqrt(), cmap="viridis", vmin=0, vmax=0.6, origin="lower")
            ax.set_xticks([]), ax.set_yticks([])
            if title == "before":
                ax.set_title(f"{prompt[0]} {prompt[1]} {prompt[2]} _ _", fontsize=10)
        row[0].set_ylabel(f"{title}\nfourth digit, 0 to 9", fontsize=9)
    figure.supxlabel("fifth digit, 0 to 9; right answers lie on a diagonal", fontsize=9)
    figure.tight_layout()
    figure.savefig(ROOT / "benchmark" / "figures" / "policy_map.png", dpi=110)


if __name__ == "__main__":
    main()
