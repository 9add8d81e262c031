"""Does the learned reward tend to the true one as the data grow?

    python benchmark/reward_data.py    # results: benchmark/results/reward_data.json

The annotator judges by R/τ, so preferences determine R/τ up to a constant per prompt. exact.py
measures how far the learned reward is from it. All take about the same number of gradient steps.
"""

from run import run_commands

if __name__ == "__main__":
    amounts = ["2048 --epochs 32", "8192 --epochs 8", "32768 --epochs 2"]
    commands = {f"reward_model.py --num-examples {amount}": [1, 2, 3] for amount in amounts}
    run_commands("reward_data", __doc__.splitlines()[0], commands)
