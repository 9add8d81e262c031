"""Milliseconds per epoch of digits_sum20.py, beside a plain loop with one row per example.

    python benchmark/digits_speed.py

The two alternate on one thread, so that whatever else the machine does disturbs both alike. Times
are medians over the turns, and so is the ratio, which is taken turn by turn. The time of
digits_sum20.py includes the measurements for its curves.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from report import place
from run import machine

sys.path.insert(0, str(Path(__file__).parents[1]))
import digits_sum20 as digits


def straightforward(method, epochs):
    """The post's loop: one row for every correct answer to every prompt, one sample per row."""
    prompts = digits.split_prompts()[0]
    index, labels = torch.where(digits.answer_sums(prompts) == digits.TARGET)
    inputs = digits.one_hot(prompts[index])  # (4504, 30)
    model = digits.make_model(64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        logits = model(inputs)
        if method == "sl":
            loss = F.cross_entropy(logits, labels)
        else:
            logprobs = F.log_softmax(logits, dim=1)
            probs = logprobs.exp()
            actions = torch.multinomial(probs, 1).squeeze()
            chosen = logprobs[range(len(actions)), actions]
            d1, d2, d3 = inputs.view(-1, 3, 10).argmax(2).T
            sums = d1 + d2 + d3 + actions // 10 + actions % 10
            rewards = torch.exp(-torch.abs(sums - 20) / 2).clamp(min=0)
            entropy = -(probs * logprobs).sum(1).mean()
            loss = -(rewards * chosen).mean() - 0.15 * entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ours(method, epochs):
    """The same epochs in digits_sum20.py."""
    args = digits.method_args(digits.Args(epochs=epochs), method, seed=1)
    digits.train(args, folder=None, verbose=False)


def milliseconds(loop, method, epochs):
    """Time per epoch."""
    start = time.perf_counter()
    loop(method, epochs)
    return (time.perf_counter() - start) / epochs * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)  # as digits_sum20.py does
    print("| epoch | one row per example, ms | digits_sum20.py, ms | times faster |")
    print("|-|-|-|-|")
    for method in ("sl", "rl-sharp"):
        plain_times = []
        times = []
        ratios = []
        for turn in range(args.turns + 1):
            plain_time = milliseconds(straightforward, method, 50)
            our_time = milliseconds(ours, method, 2000)
            if turn > 0:  # the first turn warms up
                plain_times.append(plain_time)
                times.append(our_time)
                ratios.append(plain_time / our_time)
        print(
            f"| {method} | {statistics.median(plain_times):.2f} | {statistics.median(times):.2f} "
            f"| {statistics.median(ratios):.1f} |",
            flush=True,
        )
    print(f"\n{time.process_time():.0f} CPU seconds. {place(machine(1))}")


if __name__ == "__main__":
    main()
