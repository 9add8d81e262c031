"""Put the numbers of benchmark/results/ into README.md and docs/results.md, and draw the figures.

    python benchmark/report.py             # the tables between the markers, in both files
    python benchmark/report.py --figures   # benchmark/figures/ too (needs matplotlib)

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. NAME is one of TABLES below,
made from the results/*.json that run.py and its kin left, or a results/NAME.md, which another
program of this folder wrote. Where there are no results, the text stays as it is.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmark" / "results"
FIGURES = ROOT / "benchmark" / "figures"
POLICY_SCRIPTS = ["reinforce.py", "ppo.py", "grpo.py", "dpo.py"]
ABOUT = {
    "reinforce.py": "policy gradient with a baseline",
    "ppo.py": "clipped policy gradient with a critic",
    "grpo.py": "PPO with the group's mean instead of a critic",
    "dpo.py": "learn from preference pairs, without a reward model",
    "reward_model.py": "learn the reward from preferences, labels or demonstrations",
    "digits_sum20.py": "imitation against trial and error, on an MLP",
    "gpt2_sentiment.py": "PPO on a small GPT-2, pretrained on a toy grammar: write positive texts",
}


# ---------------------------------------------------------------------------- Cells and rows
def spread(values, digits=3):
    """Mean ± standard deviation (over N - 1) over seeds; of one value, the value."""
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text


def column(result, name):
    """One metric of all runs of a command."""
    return [run[name] for run in result["runs"]]


def row(cells):
    return f"| {' | '.join(cells)} |"


def header(cells):
    return [row(cells), "|-" * len(cells) + "|"]


def place(machine):
    """Where and with what numbers were made, from what machine() of run.py says."""
    return "{cpu}, {cores} cores, Python {python}, torch {torch}, {date}, commit {commit}.".format(
        **machine
    )


def largest_fall(scores):
    """How far a score falls at most below its best so far."""
    best = -math.inf
    fall = 0.0
    for score in scores:
        best = max(best, score)
        fall = max(fall, best - score)
    return fall


def seed_range(seeds):
    """1 to 5, or 1, 3, 7."""
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def footnote(results):
    """What stands below a table: commands, seeds, CPU seconds. Machine, date: provenance_table."""
    commands = sorted({result["command"] for result in results.values()})
    commands = ", ".join(f"`{command}`" for command in commands)
    seeds = sorted({seed_range(column(result, "seed")) for result in results.values()})
    seeds = " and ".join(seeds)
    seconds = sum(sum(column(result, "cpu_seconds")) for result in results.values())
    return f"{commands}: seeds {seeds}, mean ± standard deviation; {seconds:,.0f} CPU seconds."


def load(name):
    """The results of one program: {command: result}; empty if there are none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text())


# With these flags the loss has another aim than J with the β of the command.
OTHER_AIMS = [
    "--reward process",
    "--scale-rewards",
    "--loss-type ipo",
    "--loss-type hinge",
    "--label-smoothing",
    "--length-normalize",
]


def metrics_table(results, first, columns):
    """A row per command, a column per metric. columns: {title: metric}."""
    if not results:
        return None
    lines = header([first, *columns])
    for command, result in results.items():
        cells = [f"`{command}`"]
        for metric in columns.values():
            if metric == "normalised_gain" and any(flag in command for flag in OTHER_AIMS):
                cells.append("–")
            else:
                cells.append(spread(column(result, metric)))
        lines.append(row(cells))
    return "\n".join([*lines, "", footnote(results)])


# ---------------------------------------------------------------------------- Tables
POLICY_COLUMNS = {
    "held-out success": "success",
    "normalised gain": "normalised_gain",
    "KL, nats per response": "kl",
}


def output_table():
    """What `python ppo.py` prints, on an idle machine: `python ppo.py > results/output.txt`."""
    path = RESULTS / "output.txt"
    if not path.exists():
        return None
    lines = path.read_text().splitlines()
    return "\n".join(["```", *lines[:4], "...", *lines[-3:], "```"])


def scripts_table():
    """For the README: what each script does, what comes out, and how long it takes."""
    results = load("runs")
    results = {script: results[script] for script in ABOUT if script in results}
    if not results:
        return None
    lines = header(["script", "what it does", "held out", "seeds", "CPU seconds"])
    for script, result in results.items():
        outcome = ""
        if script in POLICY_SCRIPTS:
            before = mean(column(result, "success_before"))
            outcome = f"success {before:.2f} → {spread(column(result, 'success'))}"
        if script == "reward_model.py":
            accuracy = spread(column(result, "accuracy"))
            best = mean(column(result, "bayes_accuracy"))
            outcome = f"pair accuracy {accuracy} (best possible: {best:.3f})"
        if script == "digits_sum20.py":
            parts = []
            for method in ["sl", "sl-weight-decay", "rl", "rl-improved"]:
                values = [100 * x for x in column(result, f"{method}/eval/accuracy")]
                parts.append(f"{method} {spread(values, 1)} %")
            outcome = f"greedy answers correct: {', '.join(parts)}"
        if script == "gpt2_sentiment.py":
            before = mean(column(result, "held_out_reward_before"))
            after = spread(column(result, "held_out_reward"), 1)
            kl = mean(column(result, "held_out_kl"))
            outcome = f"reward {before:.1f} → {after}, KL {kl:.1f}"
        seconds = ""
        if "cpu_seconds" in result["runs"][0]:
            seconds = f"{mean(column(result, 'cpu_seconds')):.0f}"
        seeds = str(len(result["runs"]))
        lines.append(row([f"`{script}`", ABOUT[script], outcome, seeds, seconds]))
    note = (
        "`python benchmark/run.py --threads 1`: mean ± standard deviation over seeds 1, 2, ... "
        "Numbers of episodes and learning rates differ, so this is no ranking."
    )
    return "\n".join([*lines, "", note])


def policies_table():
    """Exact results of the scripts that train a policy, and of the whole pipeline."""
    results = load("runs")
    results = {c: results[c] for c in results if c.split()[0] in POLICY_SCRIPTS}
    columns = {"success before": "success_before", **POLICY_COLUMNS, "entropy, nats": "entropy"}
    return metrics_table(results, "command", columns)


def sampled_table():
    """Are the figures that the scripts sample within their standard errors of the exact ones?"""
    results = load("runs")
    results = {script: results[script] for script in POLICY_SCRIPTS if script in results}
    if not results:
        return None
    lines = header(["metric", "runs", "mean distance", "root mean square", "largest"])
    for name in ["success", "kl"]:
        distances = []
        for result in results.values():
            for run in result["runs"]:
                distance = run[f"sampled_{name}"] - run[name]
                distances.append(distance / run[f"sampled_{name}_error"])
        rms = mean(distance**2 for distance in distances) ** 0.5
        largest = max(map(abs, distances))
        cells = [f"{mean(distances):.2f}", f"{rms:.2f}", f"{largest:.2f}"]
        lines.append(row([name, str(len(distances)), *cells]))
    return "\n".join([*lines, "", footnote(results)])


def reward_model_table():
    results = load("runs")
    results = {c: results[c] for c in results if c.startswith("reward_model.py")}
    columns = {
        "pair accuracy": "accuracy",
        "Bayes accuracy": "bayes_accuracy",
        "calibration error": "calibration_error",
        "correlation with R": "correlation",
    }
    return metrics_table(results, "command", columns)


def reward_data_table():
    columns = {
        "distance of s · r from R/τ": "gap",
        "size of R/τ": "gap_of_zero",
        "pair accuracy": "accuracy",
    }
    return metrics_table(load("reward_data"), "command", columns)


def variants_table():
    return metrics_table(load("variants"), "command", POLICY_COLUMNS)


def kl_coef_table():
    columns = {**POLICY_COLUMNS, "entropy, nats": "entropy"}
    return metrics_table(load("kl_coef"), "command", columns)


def stability_table():
    """Falls of the score: the seeds of run.py, and those of stability.py.

    largest_fall is from the twenty progress lines of a run, the last column from the forty points
    of its curve.
    """
    results = load("runs")
    more_results = load("stability")
    heads = ["script", "seeds", "largest fall of any seed", "mean over seeds"]
    lines = header([*heads, "lowest success", "mean success", "largest fall between fortieths"])
    used = {}
    for script in ["reinforce.py", "ppo.py", "grpo.py"]:
        if script not in results:
            return None
        used[script] = results[script]
        runs = list(results[script]["runs"])
        if script in more_results:
            runs += more_results[script]["runs"]
            used[f"{script}, more seeds"] = more_results[script]
        falls = [run["largest_fall"] for run in runs]
        success = [run["success"] for run in runs]
        cells = [f"`{script}`", str(len(runs)), f"{max(falls):.3f}", spread(falls)]
        fine_falls = [largest_fall([score for _, score in run["curve"]]) for run in runs]
        cells += [f"{min(success):.3f}", spread(success), f"{max(fine_falls):.3f}"]
        lines.append(row(cells))
    return "\n".join([*lines, "", footnote(used)])


def hacking_table():
    """Rewards of the first and the last rollouts, from what reward_hacking.py left."""
    found = load("reward_hacking")
    if not found:
        return None
    heads = ["`--uncertainty-coef`", "`--kl-coef`"]
    for name in ["learned", "true"]:
        heads += [f"{name} reward, first", "last"]
    lines = header([*heads, "KL, last"])
    groups = {}
    for run in found["runs"]:
        groups.setdefault((run["uncertainty_coef"], run["kl_coef"]), []).append(run)
    for (uncertainty_coef, kl_coef), runs in groups.items():
        cells = [f"{uncertainty_coef:g}", f"{kl_coef:g}"]
        for name in ["learned", "true"]:
            cells.append(spread([run[name][0] for run in runs], 2))
            cells.append(spread([run[name][-1] for run in runs], 2))
        lines.append(row([*cells, spread([run["kl"][-1] for run in runs], 2)]))
    seeds = seed_range(sorted({run["seed"] for run in found["runs"]}))
    seconds = f"{found['cpu_seconds']:,} CPU seconds"
    note = f"`{found['command']}`: seeds {seeds}, mean ± standard deviation; {seconds}."
    return "\n".join([*lines, "", note])


def optimizers_table():
    """The scripts with AdamW and with Muon, and training on the exact gradient."""
    results = load("optimizers")
    if not results:
        return None
    lines = header(["training", "optimizer", "episodes", "seeds", "CPU seconds", *POLICY_COLUMNS])
    for name, result in results.items():
        training, optimizer = name.split()
        episodes = f"{result['runs'][0]['episodes']:,}"
        if training == "exact":
            training = "exact gradient"
            episodes = "none"
        else:
            training = f"`{training}`"
        optimizer = {"adamw": "AdamW", "muon": "Muon"}[optimizer]
        cells = [training, optimizer, episodes, seed_range(column(result, "seed"))]
        cells.append(spread(column(result, "cpu_seconds"), 0))
        cells += [spread(column(result, metric)) for metric in POLICY_COLUMNS.values()]
        lines.append(row(cells))
    commands = sorted({f"`{result['command']}`" for result in results.values()})
    return "\n".join([*lines, "", f"{', '.join(commands)}: mean ± standard deviation."])


def provenance_table():
    """Which command made the numbers of a page, when, from which commit, and on what machine."""
    rows = set()
    machines = set()
    names = [
        "runs",
        "variants",
        "kl_coef",
        "stability",
        "reward_data",
        "gpt2_rewards",
        "optimizers",
    ]
    for name in names:
        for result in load(name).values():
            machine = result["machine"]
            rows.add((f"`{result['command']}`", machine["date"], machine["commit"]))
            machines.add("{cpu}, {cores} cores, Python {python}, torch {torch}".format(**machine))
    for name in ["reward_hacking", "frontier"]:
        found = load(name)
        if found:
            machine = found["machine"]
            rows.add((f"`{found['command']}`", machine["date"], machine["commit"]))
    if not rows:
        return None
    lines = header(["command", "date", "commit"]) + [row(cells) for cells in sorted(rows)]
    return "\n".join([*lines, "", f"{'; '.join(sorted(machines))}."])


def gpt2_table():
    results = load("runs")
    if "gpt2_sentiment.py" not in results:
        return None
    result = results["gpt2_sentiment.py"]
    lines = header(["prompts", "reward before", "after", "KL", "win rate", "distinct-2"])
    for title, group in [("training", ""), ("held out", "held_out_")]:
        cells = [title]
        for name in ["reward_before", "reward", "kl"]:
            cells.append(spread(column(result, group + name), 1))
        cells.append(f"{mean(column(result, group + 'win_rate')):.2f}")
        before = mean(column(result, f"{group}distinct_2_before"))
        cells.append(f"{before:.2f} → {mean(column(result, group + 'distinct_2')):.2f}")
        lines.append(row(cells))
    lines += ["", footnote({"gpt2_sentiment.py": result})]
    output = result["output"]
    for number, line in enumerate(output):
        if line.endswith(" ..."):  # a text before and after
            return "\n".join([*lines, "", "```", *output[number : number + 6], "```"])
    return "\n".join(lines)


def gpt2_rewards_table():
    """True rewards before, at their highest (of five rollouts in a row) and after."""
    results = load("gpt2_rewards")
    if not results:
        return None
    heads = ["true reward before", "highest", "after", "held out", "learned reward", "KL"]
    lines = header(["flags", *heads])
    for command, result in results.items():
        flags = command.removeprefix("gpt2_sentiment.py ")
        cells = [f"`{flags}`"]
        for name in ["reward_before", "highest_true_score", "reward", "held_out_reward"]:
            cells.append(spread(column(result, name), 1))
        learned = ""
        if "learned_reward" in result["runs"][0]:
            before = mean(column(result, "learned_reward_before"))
            learned = f"{before:.1f} → {spread(column(result, 'learned_reward'), 1)}"
        cells.append(learned)
        cells.append(spread(column(result, "kl"), 1))
        lines.append(row(cells))
    return "\n".join([*lines, "", footnote(results)])


def digits_table():
    import digits_sum20 as digits

    results = load("runs")
    if "digits_sum20.py" not in results:
        return None
    result = results["digits_sum20.py"]
    heads = ["method", "training", "held-out", "range", "distinct answers"]
    lines = header([*heads, "the post, one seed"])
    for method in digits.METHODS:
        # Rounded to hundredths of a per cent, as in the post.
        train = [round(100 * x, 2) for x in column(result, f"{method}/train/accuracy")]
        held_out = [round(100 * x, 2) for x in column(result, f"{method}/eval/accuracy")]
        distinct = mean(column(result, f"{method}/eval/distinct"))
        post = digits.POST.get(method) or ""
        if post and not min(held_out) <= post <= max(held_out):
            post = f"{post} (outside our range)"
        cells = [method, spread(train, 1), spread(held_out, 1)]
        cells.append(f"{min(held_out):.1f}–{max(held_out):.1f}")
        lines.append(row([*cells, f"{distinct:.1f}", str(post)]))
    return "\n".join([*lines, "", footnote({"digits_sum20.py": result})])


TABLES = {
    "output": output_table,
    "scripts": scripts_table,
    "policies": policies_table,
    "sampled": sampled_table,
    "reward_model": reward_model_table,
    "reward_data": reward_data_table,
    "variants": variants_table,
    "kl_coef": kl_coef_table,
    "stability": stability_table,
    "hacking": hacking_table,
    "optimizers": optimizers_table,
    "provenance": provenance_table,
    "gpt2": gpt2_table,
    "gpt2_rewards": gpt2_rewards_table,
    "digits": digits_table,
}


def make_table(name):
    """The table of a marker; None where there are no results."""
    if name in TABLES:
        return TABLES[name]()
    path = RESULTS / f"{name}.md"
    if path.exists():
        return path.read_text().strip()
    return None


def render(text):
    """The text with every table between its markers made anew."""

    def fill(match):
        table = make_table(match[1])
        if table is None:
            return match[0]
        return f"<!-- begin {match[1]} -->\n{table}\n<!-- end {match[1]} -->"

    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", fill, text, flags=re.S)


# ---------------------------------------------------------------------------- Figures
def draw_learning_curves(plt):
    """Score of the samples against episodes, mean and range over seeds."""
    results = load("runs")
    more_results = load("stability")
    figure, axes = plt.subplots(figsize=(7, 4))
    styles = ["-", "--", ":"]  # so that it can be read in black and white
    for script, style in zip(["ppo.py", "grpo.py", "reinforce.py"], styles, strict=True):
        if script not in results:
            continue
        curves = column(results[script], "curve")
        if script in more_results:
            curves += column(more_results[script], "curve")
        episodes = [step for step, _ in curves[0]]
        points = list(zip(*[[value for _, value in curve] for curve in curves], strict=True))
        lowest = [min(values) for values in points]
        highest = [max(values) for values in points]
        label = f"{script}, {len(curves)} seeds"
        (line,) = axes.plot(episodes, [mean(values) for values in points], style, label=label)
        axes.fill_between(episodes, lowest, highest, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="episodes", ylabel="score of the samples", ylim=(0.5, 1.01))
    axes.legend(loc="lower right")
    axes.set_title("Learning curves: mean and range over seeds")
    figure.tight_layout()
    figure.savefig(FIGURES / "learning_curves.png", dpi=110)


def draw_frontier(plt):
    """Success against KL: the best possible, best of n, and the ends of the default runs."""
    found = load("frontier")
    results = load("runs")
    if not found:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    kl, success, _ = zip(*found["optimal"], strict=True)
    axes.plot(kl, success, "-", color="black", label="π*, any β")
    kl, success, numbers = zip(*found["best_of_n"], strict=True)
    axes.plot(kl, success, "o", color="gray", markersize=5, label="best of n")
    for x, y, number in zip(kl, success, numbers, strict=True):
        if number <= 8:
            axes.annotate(f"{number}", (x, y), xytext=(5, -11), textcoords="offset points")
    for script, marker in zip(POLICY_SCRIPTS, ["s", "D", "^", "v"], strict=True):
        if script in results:
            x = mean(column(results[script], "kl"))
            y = mean(column(results[script], "success"))
            axes.plot(x, y, marker, markersize=8, label=script, linestyle="none")
    axes.set(xlabel="KL to the reference, nats per response", ylabel="held-out success")
    axes.legend(loc="lower right")
    axes.set_title("Reward against KL, exact")
    figure.tight_layout()
    figure.savefig(FIGURES / "frontier.png", dpi=110)


def draw_digits_ladder(plt):
    """Held-out accuracy of each method, one dot per seed, beside the post's figure."""
    import digits_sum20 as digits

    results = load("runs")
    if "digits_sum20.py" not in results:
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    methods = list(digits.METHODS)
    for y, method in enumerate(methods):
        values = [100 * x for x in column(results["digits_sum20.py"], f"{method}/eval/accuracy")]
        (bar,) = axes.barh(y, mean(values), color="tab:blue", alpha=0.35)
        axes.plot(values, [y] * len(values), "o", color="tab:blue", markersize=4)
        if digits.POST.get(method):
            axes.plot(digits.POST[method], y, "x", color="tab:red", markersize=9, mew=2)
    bar.set_label("mean")
    axes.plot([], [], "o", color="tab:blue", markersize=4, label="one seed")
    axes.plot([], [], "x", color="tab:red", markersize=9, mew=2, label="the post")
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set(xlabel="held-out accuracy, %", xlim=(0, 101))
    axes.set_title("The digits ladder", loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(FIGURES / "digits_ladder.png", dpi=110)


def draw_reward_hacking(plt):
    """Learned reward above, true reward below, against KL; a column per --uncertainty-coef."""
    found = load("reward_hacking")
    if not found:
        return
    coefs = sorted({run["uncertainty_coef"] for run in found["runs"]})
    kl_coefs = sorted({run["kl_coef"] for run in found["runs"]})
    figure, axes = plt.subplots(2, len(coefs), figsize=(9, 6), sharex=True, sharey="row")
    for i, coef in enumerate(coefs):
        for number, kl_coef in enumerate(kl_coefs):
            runs = []
            for run in found["runs"]:
                if run["uncertainty_coef"] == coef and run["kl_coef"] == kl_coef:
                    runs.append(run)
            style = ["o-", "s--", "^-.", "D:"][number]  # so that it can be read in black and white
            mean_kl = [mean(values) for values in zip(*[r["kl"] for r in runs], strict=True)]
            for j, name in enumerate(["learned", "true"]):
                for run in runs:
                    axes[j, i].plot(run["kl"], run[name], color=f"C{number}", alpha=0.25, lw=0.8)
                rewards = [mean(values) for values in zip(*[r[name] for r in runs], strict=True)]
                label = f"--kl-coef {kl_coef:g}"
                axes[j, i].plot(mean_kl, rewards, style, color=f"C{number}", ms=4, label=label)
        axes[0, i].set_title(f"--uncertainty-coef {coef:g}")
        axes[1, i].set_xlabel("KL(policy ‖ reference), nats per response")
    axes[0, 0].set_ylabel("learned reward")
    axes[1, 0].set_ylabel("true reward")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(FIGURES / "reward_hacking.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", action="store_true", help="draw the figures too")
    args = parser.parse_args()
    for path in [ROOT / "README.md", ROOT / "docs" / "results.md"]:
        if path.exists():
            path.write_text(render(path.read_text()))
            print(f"tables: {path.relative_to(ROOT)}")
    if args.figures:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        FIGURES.mkdir(exist_ok=True)
        draw_learning_curves(plt)
        draw_frontier(plt)
        draw_digits_ladder(plt)
        draw_reward_hacking(plt)
        print(f"figures: {FIGURES.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
