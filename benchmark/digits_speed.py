"""Milliseconds an epoch of digits_sum20.py, beside a straightforward loop with one row an example.

    python benchmark/digits_speed.py

The two take turns, with equally many threads, so that what else the machine is doing disturbs both
alike. Times are medians over the turns; so is the ratio, which is taken turn by turn. The script
itself gives each run one thread, as it runs several side by side.
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
    """The post's loop, operation by operation: a row for every right answer, one sample a row."""
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
    """The same epochs as digits_sum20.py runs them."""
    model, prompts = digits.make_model(64), digits.split_prompts()[0]
    for _ in digits.train(model, prompts, digits.METHODS[method], epochs):
        pass


def milliseconds(loop, method, epochs, threads):
    """Time of an epoch, in a turn of so many."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    loop(method, epochs)
    return (time.perf_counter() - start) / epochs * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(1)
    print("| epoch | threads | straightforward, ms | digits_sum20.py, ms | times faster |")
    print("|-|-|-|-|-|")
    for threads in sorted({1, torch.get_num_threads()}):
        for method in ("sl", "rl-sharp", "rl-improved"):
            turns = []
            for _ in range(args.turns + 1):
                plain = milliseconds(straightforward, method, 20, threads)
                turns.append((plain, milliseconds(ours, method, 200, threads)))
            del turns[0]  # it only warms up
            plain, fast = map(statistics.median, zip(*turns, strict=True))
            ratio = statistics.median(a / b for a, b in turns)
            print(f"| {method} | {threads} | {plain:.2f} | {fast:.2f} | {ratio:.1f} |", flush=True)
    print(f"\n{place(machine(torch.get_num_threads()))}")


if __name__ == "__main__":
    main()
