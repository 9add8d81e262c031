"""Speed of gpt2_sentiment.py at the size of GPT-2 (124M parameters, random weights).

    python benchmark/gpt2_speed.py                 # with as many threads as torch takes by itself
    python benchmark/gpt2_speed.py --device cuda --bf16

Generation beside transformers' generate in the same run, where transformers can be imported; then
one PPO iteration in its parts, beside the time that its matrix products alone would take at the
speed of the two matrix products that a GPT-2 spends most of its time in, and beside the iteration
of TRL's former PPOTrainer, where that can be imported:

    pip install trl==0.11.4 transformers==4.45.2 rich
"""

import argparse
import contextlib
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import place
from run import machine

import gpt2_sentiment as gpt2


def seconds(work, turns, device):
    """Time of the fastest of some turns: what else the machine is doing disturbs it least."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matrix_speed(device, dtype, turns):
    """FLOP/s of the products of a layer and of the output layer, at the rows of an iteration."""
    matrices = []
    flop = 0
    for rows, inner, outer in [(320, 768, 3072), (320, 3072, 768), (240, 768, 50257)]:
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        weight = torch.randn(outer, inner, device=device, dtype=dtype)
        matrices.append((x, weight))
        flop += 2 * rows * inner * outer

    def products():
        for x, weight in matrices:
            x @ weight.T

    return flop / seconds(products, 3 * turns, device)


def tokens_per_second(policy, folder, args):
    """Of ours and of transformers' generate, 16 prompts of 5 tokens and 48 new ones each."""
    prompts = torch.randint(50257, (16, 5), device=args.device)
    noise = torch.rand(16, 48).double().to(args.device)
    policy.config.eos_token_id = -1  # never sampled: all responses have 48 tokens

    def ours():
        with gpt2.autocast(args):
            gpt2.generate_responses(policy, prompts, noise, 1.0, 0, 1.0)

    print("| tokens per second | |\n|-|-|", flush=True)
    theirs = None
    with contextlib.suppress(ImportError):
        from transformers import GPT2LMHeadModel, __version__

        other = GPT2LMHeadModel.from_pretrained(folder).to(args.device)
        tokens = torch.randint(50257, (2, 20), device=args.device)
        with torch.no_grad():
            gap = (other(tokens).logits - policy.head(policy(tokens))).abs().max().item()

        def theirs():
            with gpt2.autocast(args):
                other.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    do_sample=True,
                    top_k=0,
                    min_new_tokens=48,
                    max_new_tokens=48,
                    pad_token_id=0,
                )

    our_times = []
    their_times = []
    for _ in range(args.turns):  # by turns, so that both meet the same disturbances
        our_times.append(seconds(ours, 1, args.device))
        if theirs is not None:
            their_times.append(seconds(theirs, 1, args.device))
    our_speed = 16 * 48 / min(our_times)
    print(f"| gpt2_sentiment.py | {our_speed:.0f} |")
    if theirs is not None:
        their_speed = 16 * 48 / min(their_times)
        print(f"| generate of transformers {__version__} | {their_speed:.0f} |")
        print(f"| ratio | {our_speed / their_speed:.2f} |\n\nlargest gap of logits: {gap:.1e}")
    policy.config.eos_token_id = 0


def trl_iteration(folder, prompts, args):
    """The two parts of an iteration of the PPOTrainer that TRL had up to 0.11; {} without it."""
    try:
        from transformers import AutoTokenizer
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

        sizes = {"batch_size": 16, "mini_batch_size": 16, "ppo_epochs": 4}
        config = PPOConfig(learning_rate=1e-6, max_grad_norm=1.0, **sizes)
    except (ImportError, RuntimeError, TypeError):  # no trl, or one of another time
        return {}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder))
    reference = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder))
    trainer = PPOTrainer(config, model, reference, AutoTokenizer.from_pretrained(folder))
    prompts = list(prompts)
    scores = list(torch.zeros(16))
    made = {}
    flags = {
        "do_sample": True,
        "top_k": 0,
        "min_new_tokens": 15,
        "max_new_tokens": 15,
        "pad_token_id": 0,
        "return_prompt": False,
    }

    def generation():
        made["y"] = trainer.generate(prompts, batch_size=16, **flags)

    def step():
        trainer.step(prompts, made["y"], scores)

    return {"generate": generation, "step": step}


def iteration(policy, folder, args):
    """Seconds of generation, scoring and update of one PPO iteration: its tokens and passes."""
    reference = gpt2.copy.deepcopy(policy).requires_grad_(False)
    critic = gpt2.Critic(policy, separate=False).to(args.device)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.99), fused=True)
    x = torch.randint(50257, (16, 5), device=args.device)
    mask = torch.ones(16, 15, dtype=torch.bool, device=args.device)
    noise = torch.rand(16, 15).double().to(args.device)
    made = {}

    def generation():
        with gpt2.autocast(args):
            generated = gpt2.generate_responses(policy, x, noise, 1.0, 0, 1.0)
        made["y"], made["allowed"] = generated

    def read(model):
        states, logits = gpt2.response_logits(model, x, made["y"], made["allowed"], args)
        return states, logits, gpt2.token_logprobs(logits, made["y"])

    @torch.no_grad()
    def scoring():
        states, _, made["old"] = read(policy)
        made["v"] = critic(states, x, made["y"])
        _, _, ref = read(reference)
        scores = torch.zeros(16, device=args.device)
        rewards = gpt2.token_rewards(scores, made["old"] - ref, mask, 0.2)
        made["adv"], made["ret"] = gpt2.compute_gae(rewards, made["v"], mask, 1.0, 0.95)

    def update():
        for _ in range(4):
            optimizer.zero_grad()
            states, logits, logprobs = read(policy)
            values = critic(states, x, made["y"])
            advantages = gpt2.whiten(made["adv"], mask)
            loss, _ = gpt2.policy_loss(logprobs, made["old"], advantages, mask, 0.2)
            loss = loss + 0.1 * gpt2.value_loss(values, made["v"], made["ret"], mask, 0.2)
            with torch.no_grad():  # as in the script, where it is logged
                (logits.softmax(2) * logits.log_softmax(2)).sum(2)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    works = {"generation": generation, "scoring": scoring, "update": update}
    theirs = trl_iteration(folder, x, args) if args.device == "cpu" else {}
    times = {name: [] for name in works | theirs}
    for _ in range(args.turns + 1):  # the first turn makes the optimizers' states
        for name, work in (works | theirs).items():
            times[name].append(seconds(work, 1, args.device))
    times = {name: min(turns[1:]) for name, turns in times.items()}
    parts = {name: times[name] for name in works}

    # Weights times rows: 85M in the blocks at 19 positions, 39M in the output layer at 15.
    blocks = sum(p.numel() for p in policy.h.parameters() if p.dim() == 2)
    forward = 2 * 16 * (19 * blocks + 15 * policy.wte.weight.numel())
    flop = {"generation": forward, "scoring": 2 * forward, "update": 4 * 3 * forward}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    speed = matrix_speed(args.device, dtype, args.turns)
    print(f"\nmatrix products: {speed / 1e9:.0f} GFLOP/s")
    print("\n| part | seconds | GFLOP | ideal seconds | ratio |\n|-|-|-|-|-|")
    parts["whole"], flop["whole"] = sum(parts.values()), sum(flop.values())
    for name, took in parts.items():
        ideal = flop[name] / speed
        print(
            f"| {name} | {took:.2f} | {flop[name] / 1e9:.0f} | {ideal:.2f} | {took / ideal:.2f} |"
        )
    if theirs:
        generate, step = times["generate"], times["step"]
        print(f"| TRL's generate and step | {generate + step:.2f} | | | |")
        print(f"\nTRL's iteration takes {(generate + step) / parts['whole']:.2f} times as long")


def random_gpt2(device):
    """A GPT-2 of 124M parameters with random weights."""
    policy = gpt2.GPT2(gpt2.Config(bos_token_id=0, eos_token_id=0)).to(device)
    for parameter in policy.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return policy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(namespace=gpt2.Args())
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads\n", flush=True)
    policy = random_gpt2(args.device)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "gpt2")
        gpt2.save_gpt2(policy, gpt2.train_tokenizer(["any"], 300), folder)
        tokens_per_second(policy, folder, args)
        iteration(policy, folder, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"\npeak memory: {peak:.1f} GiB\n")
    print(f"{time.process_time():.0f} CPU seconds. {place(machine(args.threads))}")


if __name__ == "__main__":
    main()
