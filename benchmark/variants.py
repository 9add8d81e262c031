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
    "ppo.py --dual-clip 3",
    "ppo.py --advantage-clip 0.5",
    "ppo.py --update-epochs 4",
    "ppo.py --update-epochs 4 --target-kl 0.01",
    "ppo.py --gae-lambda 1",
    "ppo.py --kl-coef 0.5 --total-episodes 204800",
    "ppo.py --sft-steps 0 --total-episodes 204800",
    "grpo.py --loss-type dr-grpo",
    "grpo.py --loss-type dapo",
    "grpo.py --loss-type dapo --clip-coef-high 0.28",
    "grpo.py --loss-type gspo",
    "grpo.py --loss-type gspo --clip-coef 3e-4 --clip-coef-high 4e-4",
    "grpo.py --loss-type cispo",
    "grpo.py --scale-rewards group",
    "grpo.py --scale-rewards group --kl-estimator k3",
    "grpo.py --scale-rewards batch",
    "grpo.py --kl-estimator k2",
    "grpo.py --kl-estimator k3",
    "grpo.py --kl-estimator full",
    "grpo.py --reward-model rm.pt",
    "dpo.py --loss-type ipo --beta 0.1",
    "dpo.py --loss-type hinge",
    "dpo.py --loss-type robust --label-smoothing 0.05",
    "dpo.py --label-smoothing 0.1",
    "dpo.py --length-normalize --beta 1.2",
    "dpo.py --rounds 3",
]

if __name__ == "__main__":
    commands = dict.fromkeys(COMMANDS, FIVE_SEEDS)
    run_commands("variants", __doc__.splitlines()[0], commands)
