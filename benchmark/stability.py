"""Does the score rise steadily? Five more seeds of the scripts that sample while they learn.

    python benchmark/stability.py    # results: benchmark/results/stability.json

With the five of run.py that makes ten. The largest fall is that of the score below its best so far,
over the progress lines, each of which averages about a twentieth of the run.
"""

from run import run_commands

if __name__ == "__main__":
    seeds = [6, 7, 8, 9, 10]
    commands = {"reinforce.py": seeds, "ppo.py": seeds, "grpo.py": seeds}
    run_commands("stability", __doc__.splitlines()[0], commands)
