"""Run every script over several seeds and evaluate what it saved exactly.

    python benchmark/run.py                          # everything, one run after the other
    python benchmark/run.py --only ppo.py grpo.py    # these again; the others' numbers stay
    python benchmark/run.py --seeds 1 2 --threads 1  # other seeds; torch on one thread

Each run is the command itself, `python SCRIPT.py FLAGS --seed S`, in an empty folder. Its seconds
are those of the whole command, imports included. Results go to benchmark/results/runs.json after
each command; `python benchmark/report.py` makes tables and figures of them.

variants.py, kl_coef.py, stability.py, reward_data.py and gpt2_rewards.py run other commands in the
same way.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from exact import evaluate_file
from report import largest_fall

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
FIVE_SEEDS = [1, 2, 3, 4, 5]
TEN_SEEDS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
COMMANDS = {  # and their seeds
    "reinforce.py": FIVE_SEEDS,
    "ppo.py": FIVE_SEEDS,
    "grpo.py": FIVE_SEEDS,
    "dpo.py": FIVE_SEEDS,
    "ppo.py --reward-model rm.pt": FIVE_SEEDS,
    "reward_model.py": FIVE_SEEDS,
    "reward_model.py --learn-from labels": FIVE_SEEDS,
    "reward_model.py --learn-from demonstrations": FIVE_SEEDS,
    "digits_sum20.py": TEN_SEEDS,
    "gpt2_sentiment.py": [1, 2, 3],
}
# Scripts whose saved file exact.py can evaluate.
TOY_SCRIPTS = ["reinforce.py", "ppo.py", "grpo.py", "dpo.py", "reward_model.py"]


def machine(threads):
    """Where and with what the numbers were made."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(": ")[1]
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def child_seconds():
    """Processor seconds, of all threads, of the programs that have been run and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(command, seed, threads, folder):
    """Run a command in a folder. Returns the lines that it printed, seconds and CPU seconds."""
    script, *flags = command.split()
    words = [sys.executable, str(ROOT / script), *flags, "--seed", str(seed)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    cpu_start = child_seconds()
    start = time.time()
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    seconds = time.time() - start
    if done.returncode != 0:
        sys.exit(f"{command} --seed {seed} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.splitlines(), seconds, child_seconds() - cpu_start


def run_folder(folder, script):
    """Where a script that ran in folder left its TensorBoard files."""
    (run,) = (Path(folder) / "runs").glob(f"{script.removesuffix('.py')}__*")
    return run


def read_scalars(run):
    """All TensorBoard curves in a folder: {tag: list of events with step, value, wall_time}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


def read_results(run):
    """The results that a run has logged.

    eval/NAME is called NAME here, and its value before training NAME_before. digits_sum20.py
    trains many networks: those of a row, in a folder ROW-SEED, are called ROW/TAG.
    """
    results = {}
    for tag, events in read_scalars(run).items():
        if tag.startswith("eval/"):
            name = tag.removeprefix("eval/")
            results[name] = events[-1].value
            if len(events) > 1:
                results[f"{name}_before"] = events[0].value
    for folder in sorted(path for path in run.iterdir() if path.is_dir()):
        row = folder.name.rpartition("-")[0]
        for tag, events in read_scalars(folder).items():
            results[f"{row}/{tag}"] = events[-1].value
    return results


def average_points(events, number):
    """A curve as about that many points [step, value]: means of equally many values."""
    size = max(1, len(events) // number)
    points = []
    for i in range(0, len(events) - size + 1, size):
        chunk = events[i : i + size]
        value = sum(event.value for event in chunk) / size
        points.append([chunk[-1].step, round(value, 4)])
    return points


def printed_scores(output):
    """The scores of the progress lines."""
    matches = [re.search(r"score (-?[\d.]+)", line) for line in output]
    return [float(match[1]) for match in matches if match]


def measure(command, seed, threads):
    """One run of a command: a dict of all results, and what it printed.

    success, kl, ... are exact if the script saves what exact.py evaluates; the figures that the
    script itself has sampled are then called sampled_success, sampled_kl, ... A command with
    --reward-model rm.pt gets that file from reward_model.py with the same seed; one with
    --reward-model rm, or rm64 (overfitted to 64 pairs), that folder from gpt2_reward_model.py.
    """
    script = command.split()[0]
    with tempfile.TemporaryDirectory() as folder:
        if "--reward-model rm.pt" in command:
            execute("reward_model.py --save-path rm.pt", seed, threads, folder)
        elif "--reward-model rm64" in command:
            flags = "--num-pairs 64 --epochs 40 --save-dir rm64"
            execute(f"benchmark/gpt2_reward_model.py {flags}", seed, threads, folder)
        elif "--reward-model rm" in command:
            execute("benchmark/gpt2_reward_model.py --save-dir rm", seed, threads, folder)
        full_command = command
        if script in TOY_SCRIPTS:
            full_command = f"{command} --save-path saved.pt"
        output, seconds, cpu_seconds = execute(full_command, seed, threads, folder)
        run = run_folder(folder, script)
        result = read_results(run)
        if script in TOY_SCRIPTS:
            sampled = {f"sampled_{name}": value for name, value in result.items()}
            result = {**sampled, **evaluate_file(Path(folder) / "saved.pt")}
        scalars = read_scalars(run)
        curve = average_points(scalars.get("charts/score", []), 40)
    result = {name: round(value, 5) for name, value in result.items()}
    if curve:
        result["largest_fall"] = round(largest_fall(printed_scores(output)), 3)
    if script == "gpt2_sentiment.py":  # means of five rollouts, whose rewards are noisy
        true_scores = scalars["charts/true_score"]
        points = average_points(true_scores, max(1, len(true_scores) // 5))
        result["highest_true_score"] = max(value for _, value in points)
    result["seconds"] = round(seconds, 1)
    result["cpu_seconds"] = round(cpu_seconds, 1)
    return {"seed": seed, **result, "curve": curve}, output


def load_results(path):
    """What is in a file of results: {command: {"command", "machine", "output", "runs"}}."""
    if not path.exists():
        return {}
    return json.loads(path.read_text())


def save_results(path, results):
    """Write a file of results, one line per command; never half-written."""
    lines = [f"{json.dumps(command)}: {json.dumps(results[command])}" for command in results]
    part = path.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(part, path)


def run_commands(program, description, commands):
    """The command line of run.py and its kin: measure each command and keep the results.

    program: run for benchmark/run.py. commands: each with its default seeds. The results go to
    results/PROGRAM.json (run.py: runs.json), those of one command as soon as it is done.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", nargs="+", help="run the commands that begin with these words")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the default seeds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    args = parser.parse_args()
    path = RESULTS / f"{'runs' if program == 'run' else program}.json"
    RESULTS.mkdir(exist_ok=True)
    for command, seeds in commands.items():
        if args.only and not command.startswith(tuple(args.only)):
            continue
        runs = []
        outputs = []
        for seed in args.seeds or seeds:
            result, output = measure(command, seed, args.threads)
            runs.append(result)
            outputs.append(output)
            print(f"{command} --seed {seed}: {output[-1]}", flush=True)
        results = load_results(path)  # read again: another run may have added to it
        results[command] = {
            "command": f"python benchmark/{program}.py --threads {args.threads}",
            "machine": machine(args.threads),
            "output": outputs[0],
            "runs": runs,
        }
        results = {name: results[name] for name in commands if name in results}  # in this order
        save_results(path, results)
    print(f"\nresults: {path.relative_to(ROOT)}; put into tables by python benchmark/report.py")


if __name__ == "__main__":
    run_commands("run", __doc__.splitlines()[0], COMMANDS)
