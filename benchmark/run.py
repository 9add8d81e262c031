"""Run every script over several seeds and keep what came out in benchmark/results/runs.json.

    python benchmark/run.py                           # everything, one run after the other
    python benchmark/run.py --scripts ppo grpo        # these anew; the others' numbers stay
    python benchmark/run.py --threads 1               # torch on one thread, for a busy machine

Each run is a program of its own in an empty folder: `python SCRIPT.py --seed S` and no other flags
but those that stand in its name ("reward_model --learn-from labels"). Its time is that of the whole
command, imports included. `python benchmark/report.py` puts the numbers into the README and draws
the figures.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results" / "runs.json"
SEEDS = {"ppo": 5, "reinforce": 5, "grpo": 5, "dpo": 5, "reward_model": 5, "digits_sum20": 10}
SEEDS |= {f"reward_model --learn-from {kind}": 5 for kind in ("labels", "demonstrations")}
SEEDS["gpt2_sentiment"] = 3
CURVE = "charts/score"  # the curve that is kept of a run that has it
# What main returns is richer than what it prints, so main is called as the program calls it.
PROGRAM = """
import importlib, json, sys, tyro
sys.path.insert(0, sys.argv[1])
script = importlib.import_module(sys.argv[2])
result = script.main(tyro.cli(script.Args, args=sys.argv[3:]))
json.dump(result, open("result.json", "w"))
"""


def machine(threads):
    """Where and with what the numbers were made."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": names[0].split(": ")[1] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def read_curve(folder):
    """Points [episodes, value] of the curve in a TensorBoard folder, averaged down to about 40."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if CURVE not in events.Tags()["scalars"]:
        return []
    points = [(point.step, point.value) for point in events.Scalars(CURVE)]
    size = max(1, len(points) // 40)
    lots = [points[i : i + size] for i in range(0, len(points), size)]
    return [[lot[-1][0], round(sum(v for _, v in lot) / len(lot), 4)] for lot in lots]


def run(script, seed, threads):
    """One run: what main returned, the seconds of the whole command, its output and its curve."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-c", PROGRAM, str(ROOT), *script.split(), "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{script} --seed {seed} failed:\n{done.stderr}")
        result = json.loads((Path(folder) / "result.json").read_text())
        (events,) = (Path(folder) / "runs").iterdir()
        curve = read_curve(events)
    result = {name: round(value, 5) for name, value in result.items()}
    return {"seed": seed, **result, "seconds": round(seconds, 1), "curve": curve}, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    for script in args.scripts:
        runs, outputs = [], []
        for seed in range(1, SEEDS[script] + 1):
            result, output = run(script, seed, args.threads)
            runs.append(result)
            outputs.append(output)
            print(f"{script} seed {seed}: {output.splitlines()[-1]}", flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        command = f"python benchmark/run.py --scripts '{script}' --threads {args.threads}"
        results[script] = {"command": command, "machine": machine(args.threads), "runs": runs}
        if script != "digits_sum20":
            results[script]["output"] = outputs[0].splitlines()
        RESULTS.parent.mkdir(exist_ok=True)
        part = RESULTS.with_suffix(".part")
        text = re.sub(
            r"\[\s+([-.e\d]+),\s+([-.e\d]+)\s+\]", r"[\1, \2]", json.dumps(results, indent=1)
        )
        part.write_text(text + "\n")
        os.replace(part, RESULTS)


if __name__ == "__main__":
    main()
