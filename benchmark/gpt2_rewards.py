"""gpt2_sentiment.py with other rewards: negative ones, and one that was learned from preferences.

    python benchmark/gpt2_rewards.py    # results: benchmark/results/gpt2_rewards.json

The reward model is trained by gpt2_reward_model.py with the same seed; PPO never sees the true
reward. One that is overfitted to 64 pairs is over-optimised: the true reward falls again.
"""

from run import FIVE_SEEDS, run_commands

NO_PENALTY = "--kl-coef 0 --kl-target None --total-episodes 5120 --learning-rate 1e-3"
COMMANDS = [
    "gpt2_sentiment.py --reward plain",
    "gpt2_sentiment.py --reward plain --kl-coef 0.3",
    "gpt2_sentiment.py --reward plain --kl-coef 0.3 --advantage-clip 1",
    "gpt2_sentiment.py --reward-model rm --kl-coef 0.5",
    f"gpt2_sentiment.py --reward-model rm {NO_PENALTY}",
    "gpt2_sentiment.py --reward-model rm64 --kl-coef 0.5",
    f"gpt2_sentiment.py --reward-model rm64 {NO_PENALTY}",
]

if __name__ == "__main__":
    commands = dict.fromkeys(COMMANDS, FIVE_SEEDS)
    run_commands("gpt2_rewards", __doc__.splitlines()[0], commands)
