"""Seconds of each script's default command, one after the other, on an otherwise idle machine.

    python benchmark/seconds.py                # with as many threads as torch takes by itself
    python benchmark/seconds.py --threads 1

Wall seconds are from command to verdict; processor seconds add up all threads. Prints markdown.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import place
from run import machine

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["reinforce", "ppo", "grpo", "dpo", "reward_model", "digits_sum20", "gpt2_sentiment"]


def processor_seconds():
    """Of all programs that have been run and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    print(f"| script | seconds, {args.threads} threads | processor seconds |\n|-|-|-|")
    for script in args.scripts:
        words = [sys.executable, str(ROOT / f"{script}.py")]
        with tempfile.TemporaryDirectory() as folder:
            start, before = time.perf_counter(), processor_seconds()
            subprocess.run(words, cwd=folder, env=env, stdout=subprocess.DEVNULL, check=True)
            seconds, used = time.perf_counter() - start, processor_seconds() - before
        print(f"| `{script}.py` | {seconds:.0f} | {used:.0f} |", flush=True)
    print(f"\n{place(machine(args.threads))}")


if __name__ == "__main__":
    main()
