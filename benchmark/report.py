"""Put the numbers in benchmark/results/ into the README, between its markers, and draw the figures.

    python benchmark/report.py             # the README only
    python benchmark/report.py --figures   # benchmark/figures/ too (needs matplotlib)

A table of results/runs.json is made here. A results/NAME.md is what another program of this folder
printed, and goes in as it is. tests/test_readme.py fails when README and results differ.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmark" / "results"
FIGURES = ROOT / "benchmark" / "figures"
ABOUT = {  # objective, supervision needed, models in memory
    "reinforce": (
        "token log-probability times return; five baselines, or reward-weighted regression",
        "a reward",
        "policy, reference",
    ),
    "ppo": ("clipped ratio times advantage (GAE)", "a reward", "policy, reference, critic"),
    "grpo": (
        "clipped ratio times the score relative to its group; five losses",
        "a reward",
        "policy, reference",
    ),
    "dpo": (
        "log-odds that the preferred response is preferred; four losses",
        "comparisons",
        "policy, reference",
    ),
}


def spread(values, digits=3):
    """Mean ± standard deviation over seeds; of one value, the value."""
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def column(result, name):
    return [run[name] for run in result["runs"]]


def place(machine):
    """Where and with what numbers were made, from what machine() of run.py says."""
    return "{cpu}, {cores} cores, Python {python}, torch {torch}, {date}, commit {commit}.".format(
        **machine
    )


def where(results, scripts):
    """The small print under a table of these scripts."""
    m, seeds = results[scripts[0]]["machine"], len(results[scripts[0]]["runs"])
    commits = ", ".join(sorted({results[script]["machine"]["commit"] for script in scripts}))
    dates = " and ".join(sorted({results[script]["machine"]["date"] for script in scripts}))
    names = " ".join(f"'{script}'" if " " in script else script for script in scripts)
    return (
        f"`python benchmark/run.py --scripts {names} --threads {m['threads']}`: seeds 1"
        f" to {seeds}, mean ± standard deviation. {place(m | {'date': dates, 'commit': commits})}"
    )


def scripts_table(results):
    lines = [
        "| script | objective | learns from | models in memory | held-out success | optimality |",
        "|-|-|-|-|-|-|",
    ]
    present = [script for script in ABOUT if script in results]
    for script in present:
        result = results[script]
        before = mean(column(result, "success_before"))
        success, optimality = (spread(column(result, k)) for k in ("success", "optimality"))
        line = " | ".join([f"`{script}.py`", *ABOUT[script], f"{before:.2f} → {success}"])
        lines.append(f"| {line} | {optimality} |")
    return "\n".join([*lines, "", where(results, present)])


def reward_model_table(results):
    lines = [
        "| learns from | pair accuracy | attainable | correlation | calibration error"
        " | best of 16 | attainable |",
        "|-|-|-|-|-|-|-|",
    ]
    present = [script for script in results if script.startswith("reward_model")]
    names = ["accuracy", "attainable", "correlation", "calibration_error"]
    names += ["best_of_16", "best_of_16_attainable"]
    for script in present:
        cells = [spread(column(results[script], name)) for name in names]
        kind = script.split()[-1] if " " in script else "preferences"
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", where(results, present)])


def gpt2_table(results):
    result = results["gpt2_sentiment"]
    lines = [
        "| prompts | reward before | after | KL, nats | win rate | distinct-2 | repetition |",
        "|-|-|-|-|-|-|-|",
    ]
    for title, group in ("training", ""), ("held out", "held_out_"):
        before, after, kl = (
            spread(column(result, group + name), 1) for name in ("reward_before", "reward", "kl")
        )
        changes = [
            f"{mean(column(result, f'{group}{name}_before')):.2f} → "
            f"{mean(column(result, group + name)):.2f}"
            for name in ("distinct_2", "repetition")
        ]
        wins = f"{mean(column(result, group + 'win_rate')):.2f}"
        lines.append(f"| {' | '.join([title, before, after, kl, wins, *changes])} |")
    lines = "\n".join([*lines, "", where(results, ["gpt2_sentiment"])])
    output = result["output"]
    first = next(i for i, line in enumerate(output) if line.endswith(" ..."))
    return "\n".join([lines, "", "```", *output[first : first + 6], "```"])


def digits_table(results):
    import digits_sum20 as digits

    result = results["digits_sum20"]
    lines = [
        "| row | training | held-out | range | distinct answers | seconds | the post, one seed |",
        "|-|-|-|-|-|-|-|",
    ]
    for row in digits.METHODS:
        train, held_out = (
            [round(100 * v, 2) for v in column(result, f"{row}/{on}/accuracy")]  # as the post does
            for on in ("train", "eval")
        )
        distinct, seconds = (
            mean(column(result, f"{row}/{k}")) for k in ("eval/distinct", "seconds")
        )
        post = digits.POST.get(row) or ""
        if post and not min(held_out) <= post <= max(held_out):
            post = f"{post} (outside our range)"
        spreads = f"{spread(train, 1)} | {spread(held_out, 1)}"
        low_high = f"{min(held_out):.1f}–{max(held_out):.1f}"
        lines.append(
            f"| {row} | {spreads} | {low_high} | {distinct:.1f} | {seconds:.0f} | {post} |"
        )
    return "\n".join([*lines, "", where(results, ["digits_sum20"])])


def hacking_table(_):
    """Rewards of the first and the last rollouts, from what reward_hacking.py left."""
    found = json.loads((RESULTS / "reward_hacking.json").read_text())
    names = [f"{when} {name}" for name in ("learned", "true") for when in ("first", "last")]
    heads = ["`--rm-uncertainty-coef`", "`--kl-coef`", *names, "last KL"]
    lines = [f"| {' | '.join(heads)} |", "|-" * len(heads) + "|"]
    groups = {}
    for run in found["runs"]:
        groups.setdefault((run["rm_uncertainty_coef"], run["kl_coef"]), []).append(run)
    for coefs, runs in groups.items():
        ends = [[run[name][i] for run in runs] for name in ("learned", "true") for i in (0, -1)]
        ends.append([run["kl"][-1] for run in runs])
        cells = [f"{coef:g}" for coef in coefs] + [spread(values, 2) for values in ends]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = ", ".join(str(seed) for seed in found["flags"]["seeds"])
    return "\n".join([*lines, "", f"Seeds {seeds}. {place(found['machine'])}"])


def ppo_output(results):
    lines = results["ppo"]["output"]
    return "\n".join(["```", *lines[:4], "...", *lines[-3:], "```"])


TABLES = {"output": ppo_output, "scripts": scripts_table, "digits": digits_table}
TABLES |= {"reward_model": reward_model_table, "hacking": hacking_table, "gpt2": gpt2_table}


def render(readme):
    """The README with everything between its markers made anew."""
    results = json.loads((RESULTS / "runs.json").read_text())

    def fill(match):
        name, file = match[1], RESULTS / f"{match[1]}.md"
        table = TABLES[name](results) if name in TABLES else file.read_text().strip()
        return f"<!-- begin {name} -->\n{table}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", fill, readme, flags=re.S)


def learning_curves(results, plt):
    """Score of the samples against episodes, mean and range over seeds."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for script in ("ppo", "grpo", "reinforce"):
        curves = column(results[script], "curve")
        episodes = [x for x, _ in curves[0]]
        values = [[y for _, y in curve] for curve in curves]
        low, middle, high = ([f(v) for v in zip(*values, strict=True)] for f in (min, mean, max))
        (line,) = axes.plot(episodes, middle, label=f"{script}.py")
        axes.fill_between(episodes, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="episodes", ylabel="score of the samples", ylim=(0, 1.01))
    axes.legend(loc="lower right")
    axes.set_title(f"Learning curves: mean and range over {len(curves)} seeds")
    figure.tight_layout()
    figure.savefig(FIGURES / "learning_curves.png", dpi=110)


def digits_ladder(results, plt):
    """Held-out accuracy of each row, a dot a seed, beside the post's figure."""
    import digits_sum20 as digits

    figure, axes = plt.subplots(figsize=(7, 4))
    rows = list(digits.METHODS)
    for y, row in enumerate(rows):
        values = [100 * v for v in column(results["digits_sum20"], f"{row}/eval/accuracy")]
        (bar,) = axes.barh(y, mean(values), color="tab:blue", alpha=0.35)
        axes.plot(values, [y] * len(values), "o", color="tab:blue", markersize=4)
        if digits.POST.get(row):
            axes.plot(digits.POST[row], y, "x", color="tab:red", markersize=9, markeredgewidth=2)
    bar.set_label("mean")
    axes.plot([], [], "o", color="tab:blue", markersize=4, label="a seed")
    axes.plot([], [], "x", color="tab:red", markersize=9, markeredgewidth=2, label="the post")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(xlabel="held-out accuracy, %", xlim=(0, 101))
    axes.set_title("The digits ladder", loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(FIGURES / "digits_ladder.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
    if args.figures:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        FIGURES.mkdir(exist_ok=True)
        results = json.loads((RESULTS / "runs.json").read_text())
        learning_curves(results, plt)
        if "digits_sum20" in results:
            digits_ladder(results, plt)


if __name__ == "__main__":
    main()
