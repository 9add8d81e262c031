"""What keeps a policy from the best one: the noise of its gradient, or the optimizer?

    python benchmark/optimizers.py                     # results: results/optimizers.json
    python benchmark/optimizers.py --only exact ppo.py # these again; the others' numbers stay

Every script trains as it is, with AdamW, and again with Muon for the matrices of the transformer
blocks (torch.optim.Muon; Jordan et al. 2024). Its updates are scaled to the size of AdamW's
(arXiv:2502.16982), so that the scripts' learning rates suit both. A step of Muon takes longer, so
with it a script gets fewer episodes: about as many as take the same processor seconds.

The control, "exact": the objective of reinforce.py, J = E[R] - β · KL, with the same steps, prompts
per step and learning rates, but on the exact gradient for these prompts, by enumeration. What is
still missing at its end is not the fault of sampling responses.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from exact import all_responses, evaluate, evaluate_file, response_logprobs, response_table
from run import RESULTS, TEN_SEEDS, load_results, machine, save_results

import grpo
import ppo
import reinforce

SCRIPTS = {"reinforce.py": reinforce, "ppo.py": ppo, "grpo.py": grpo}
# With Muon. For the seconds of AdamW with the default number, as the table shows.
MUON_EPISODES = {"reinforce.py": 149_760, "ppo.py": 97_024, "grpo.py": 88_064}
OPTIMIZERS = ["adamw", "muon"]
AdamW = torch.optim.AdamW


class Muon:
    """Muon for the matrices of the blocks, AdamW for everything else; made and used as AdamW is."""

    def __init__(self, parameters, lr=1e-3, **flags):
        matrices = []
        others = []
        for parameter in parameters:
            # Embeddings and heads are matrices too, but one side of theirs is a vocabulary or 1.
            if parameter.dim() == 2 and min(parameter.shape) >= 64:
                matrices.append(parameter)
            else:
                others.append(parameter)
        muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.optimizers = [muon, AdamW(others, **flags)]
        self.param_groups = [{"lr": lr}]

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


def make_optimizer(name, parameters, **flags):
    """AdamW or Muon for training. SFT, which does not ask for fused=True, keeps AdamW."""
    if name == "muon" and "fused" in flags:
        return Muon(parameters, **flags)
    return AdamW(parameters, **flags)


def train_script(script, optimizer, seed, episodes):
    """Run a script's main. Returns exact metrics of its policy and processor seconds."""
    make = functools.partial(make_optimizer, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "policy.pt")
        flags = {"seed": seed, "total_episodes": episodes, "save_path": path, "tensorboard": False}
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), mock.patch("torch.optim.AdamW", make):
            script.main(script.Args(**flags))
        seconds = time.process_time() - start
        return evaluate_file(path), seconds


def train_exact(optimizer_name, seed):
    """Train as reinforce.py does, on the exact gradient. Returns exact metrics and seconds."""
    args = reinforce.Args(seed=seed)
    torch.manual_seed(seed)
    train_prompts, train_targets, test_prompts, test_targets = reinforce.make_prompts("cpu")
    policy = reinforce.GPT()
    demonstrations = reinforce.make_demonstrations(train_prompts, train_targets)
    reinforce.sft(policy, *demonstrations, args.sft_steps)
    reference = reinforce.GPT().requires_grad_(False)
    reference.load_state_dict(policy.state_dict())
    parameters = list(policy.parameters())
    optimizer = make_optimizer(
        optimizer_name, parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )

    start = time.process_time()
    responses = all_responses()
    num_steps = args.total_episodes // args.batch_size
    warmup = max(1, num_steps // 10)
    for step in range(1, num_steps + 1):
        decay = (num_steps - step + 1) / (num_steps - warmup + 1)
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(step / warmup, decay)
        rows = torch.randint(len(train_prompts), (args.batch_size // args.group_size,))
        prompts = train_prompts[rows]
        rewards = response_table(reinforce.reward, train_targets[rows], responses)  # (N, Y)
        with torch.no_grad():
            ref_logprobs = response_logprobs(reference, prompts, 1.0, torch.float32)
        logprobs = response_logprobs(policy, prompts, 1.0, torch.float32)  # (N, Y)
        returns = rewards - args.kl_coef * (logprobs - ref_logprobs)
        loss = -(logprobs.exp() * returns).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
    seconds = time.process_time() - start
    return evaluate(policy, reference, test_prompts, test_targets, args.kl_coef), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["exact", *SCRIPTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=TEN_SEEDS)
    args = parser.parse_args()
    path = RESULTS / "optimizers.json"
    command = " ".join(["python benchmark/optimizers.py", *sys.argv[1:]])
    for name in args.only:
        for optimizer in args.optimizers:
            if name == "exact":
                episodes = 0
            elif optimizer == "adamw":
                episodes = SCRIPTS[name].Args.total_episodes
            else:
                episodes = MUON_EPISODES[name]
            runs = []
            for seed in args.seeds:
                if name == "exact":
                    metrics, seconds = train_exact(optimizer, seed)
                else:
                    metrics, seconds = train_script(SCRIPTS[name], optimizer, seed, episodes)
                run = {"seed": seed, "episodes": episodes, "cpu_seconds": round(seconds, 1)}
                for metric in ["success", "kl", "normalised_gain"]:
                    run[metric] = round(metrics[metric], 5)
                runs.append(run)
                print(f"{name} {optimizer} {json.dumps(run)}", flush=True)
            results = load_results(path)  # read again: another run may have added to it
            results[f"{name} {optimizer}"] = {
                "command": command,
                "machine": machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))),
                "runs": runs,
            }
            save_results(path, results)
    print("\nresults: benchmark/results/optimizers.json; put into tables by report.py")


if __name__ == "__main__":
    main()
