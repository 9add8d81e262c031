"""The flags that choose another algorithm, each with the other flags at their defaults.

    python benchmark/variants.py                     # all of them, over five seeds
    python benchmark/variants.py --only ppo.py dpo   # the commands that begin with these words

Results go to benchmark/results/variants.json. Where a command has --reward-model rm.pt,
reward_model.py makes that file first, with the same seed.
"""

from run import FIVE_SEEDS, run_commands

COMMANDS = [
    "reinforce.py --baseline none",
    "reinforce.py --baseline batch-mean",
    "reinforce.py --baseline running-mean",
    "reinforce.py --baseline value",
    "reinforce.py --reward process",
    "reinforce.py --objective rwr",
    "ppo.py --normalize-advantages",
    "ppo.py --gae-lambda 1",
    "grpo.py --loss-type dr-grpo",
    "grpo.py --loss-type dapo",
    "grpo.py --loss-type gspo --clip-coef 3e-4 --clip-coef-high 4e-4",
    "grpo.py --loss-type cispo",
    "grpo.py --scale-rewards group",
    "grpo.py --scale-rewards group --kl-estimator k3",
    "grpo.py --kl-estimator full",
    "dpo.py --loss-type ipo --beta 0.1",
    "dpo.py --loss-type hinge",
    "dpo.py --loss-type robust --label-smoothing 0.05",
    "dpo.py --label-smoothing 0.1",
    "dpo.py --length-normalize --beta 0.75",
    "dpo.py --rounds 3",
]

if __name__ == "__main__":
    commands = dict.fromkeys(COMMANDS, FIVE_SEEDS)
    run_commands("variants", __doc__.splitlines()[0], commands)
