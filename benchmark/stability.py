"""Does the score rise steadily? The largest fall below its best so far, over ten seeds.

    python benchmark/stability.py    # results: benchmark/results/stability.json

The score is that of one rollout, as printed in each of about twenty progress lines. With 256
responses it has a standard error of 0.03 at a success rate of 0.6 and of 0.01 at 0.97.
"""

from run import run_commands

if __name__ == "__main__":
    seeds = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    commands = dict.fromkeys(["reinforce.py", "ppo.py", "grpo.py"], seeds)
    run_commands("stability", __doc__.splitlines()[0], commands)
