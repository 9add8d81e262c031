"""What β does: ppo.py at several --kl-coef.

python benchmark/kl_coef.py    # results: benchmark/results/kl_coef.json
"""

from run import FIVE_SEEDS, run_commands

if __name__ == "__main__":
    kl_coefs = [0.0, 0.02, 0.05, 0.1, 0.2, 0.5]
    commands = {f"ppo.py --kl-coef {kl_coef}": FIVE_SEEDS for kl_coef in kl_coefs}
    run_commands("kl_coef", __doc__.splitlines()[0], commands)
