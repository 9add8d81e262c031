"""The flags that choose another algorithm, each at the other defaults, over five seeds.

    python benchmark/variants.py                     # prints a markdown table
    python benchmark/variants.py --only ppo.py dpo   # the lines that begin so

Where a line has --reward-model rm.pt, reward_model.py makes that file first, with the same seed.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
import tempfile
from pathlib import Path

import torch
import tyro
from report import place, spread
from run import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
LINES = """
ppo.py --kl-in loss --kl-estimator k2
ppo.py --kl-in loss --kl-estimator k3
ppo.py --reward sharp
ppo.py --reward distance
ppo.py --reward process
ppo.py --separate-critic
ppo.py --kl-target 0.3
ppo.py --kl-coef 0.5 --total-episodes 204800
ppo.py --sft-steps 0 --total-episodes 204800
ppo.py --update-epochs 4 --total-episodes 61440 --learning-rate 2e-3
ppo.py --reward-model rm.pt
grpo.py --reward-model rm.pt
grpo.py --loss-type dr-grpo
grpo.py --loss-type dapo
grpo.py --loss-type gspo
grpo.py --loss-type cispo
reinforce.py --reward-model rm.pt
reinforce.py --baseline none
reinforce.py --baseline batch-mean
reinforce.py --baseline running-mean
reinforce.py --baseline value
reinforce.py --objective rwr
dpo.py --loss-type ipo --beta 0.1
dpo.py --loss-type hinge
dpo.py --loss-type robust --label-smoothing 0.1
""".strip().splitlines()


def run(line, seed):
    """What main returns for a command line."""
    name, *flags = line.split()
    script = importlib.import_module(name.removesuffix(".py"))
    words = [*flags, "--seed", str(seed), "--no-tensorboard"]
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main(tyro.cli(script.Args, args=words))


def print_place(seeds):
    """What stands below a table: which seeds, and where and with what it was made."""
    threads = torch.get_num_threads()
    numbers = ", ".join(map(str, seeds))
    print(f"\nSeeds {numbers}, torch on {threads} of the cores. {place(machine(threads))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="+", default=[""])
    args = parser.parse_args()
    lines = [line for line in LINES if line.startswith(tuple(args.only))]
    print("| command | success | optimality | KL, nats |\n|-|-|-|-|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for seed in args.seeds if any("rm.pt" in line for line in lines) else ():
            run(f"reward_model.py --save-path {seed}rm.pt", seed)
        for line in lines:
            runs = [run(line.replace("rm.pt", f"{seed}rm.pt"), seed) for seed in args.seeds]
            names = "success", "optimality", "kl"
            columns = [spread([result[name] for result in runs]) for name in names]
            print(f"| `{line}` | {' | '.join(columns)} |", flush=True)
    print_place(args.seeds)


if __name__ == "__main__":
    main()
