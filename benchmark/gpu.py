"""On a GPU: the same numbers as on the CPU, and speed.

    python benchmark/gpu.py > benchmark/results/gpu.md    # about eight minutes
    python benchmark/gpu.py --device cpu                  # tries this program, with short runs

1. The same weights and inputs on both devices: how far logits, loss and gradient lie apart.
2. ppo.py and gpt2_sentiment.py from command to verdict on both devices. The random numbers differ,
   so the results agree within the standard errors that the scripts print, not to the digit.
3. 124M parameters (random weights) in bfloat16: gpt2_speed.py, with transformers' generate in the
   same run, then 200 PPO iterations of gpt2_sentiment.py on that model.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from gpt2_speed import random_gpt2  # noqa: E402

import gpt2_sentiment as gpt2  # noqa: E402
import ppo  # noqa: E402


def gap(x, y):
    """Largest difference, relative to the largest value of y."""
    y = y.detach().cpu()
    return ((x.detach().cpu() - y).abs().max() / y.abs().max()).item()


def ppo_step(policy, prompts, responses, advantages):
    """Logits, loss and gradient of one step of ppo.py, away from the old policy."""
    mask = ppo.response_mask(responses)
    logits = policy.head(ppo.response_states(policy, prompts, responses))
    logprobs = ppo.token_logprobs(logits, responses)
    old_logprobs = logprobs.detach() + 0.1 * advantages
    loss, _ = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    return logits, loss, gradient


def compare_devices(device):
    """Print how far the two devices lie apart, in float32."""
    torch.manual_seed(1)
    prompts, targets, _, _ = ppo.make_prompts("cpu")
    policy = ppo.GPT()
    ppo.sft(policy, *ppo.make_demonstrations(prompts, targets), 50)
    other_policy = copy.deepcopy(policy).to(device)
    prompts = prompts[:256]
    responses = ppo.generate(policy, prompts, 1.0)
    advantages = torch.randn(responses.shape)
    inputs = [prompts, responses, advantages]
    policy.zero_grad()
    expected = ppo_step(policy, *inputs)
    found = ppo_step(other_policy, *[tensor.to(device) for tensor in inputs])
    print(f"| float32, {device} beside cpu | relative difference | allowed |\n|-|-|-|")
    for name, x, y in zip(["logits", "loss", "gradient"], found, expected, strict=True):
        print(f"| ppo.py: {name} | {gap(x, y):.1e} | 1e-4 |")

    policy, tokenizer = gpt2.embedded_gpt2(gpt2.write_sentences(500, 1))
    other_policy = copy.deepcopy(policy).to(device)
    prompts = gpt2.encode_prompts(tokenizer, ["I feel happy when", "The best"], 0).repeat(32, 1)
    noise = torch.rand(64, 20, dtype=torch.float64)
    with torch.no_grad():
        logits = policy.head(policy(prompts))
        other_logits = other_policy.head(other_policy(prompts.to(device)))
    print(f"| gpt2_sentiment.py: logits | {gap(other_logits, logits):.1e} | 1e-4 |")
    responses, _ = gpt2.generate_responses(policy, prompts, noise, 1.0, 0, 1.0)
    other_responses, _ = gpt2.generate_responses(
        other_policy, prompts.to(device), noise.to(device), 1.0, 0, 1.0
    )
    different = (responses != other_responses.cpu()).any(1).float().mean().item()
    # A token is another one only where rounding moves a boundary across the random number.
    print(f"| gpt2_sentiment.py: responses that differ, same noise | {different:.3f} | 0.05 |\n")


def run(command, folder, last_lines=1):
    """Run a script, and print its command, its seconds and the end of its output."""
    script, *flags = command.split()
    start = time.time()
    line = [sys.executable, str(ROOT / script), *flags, "--no-tensorboard"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    print(f"`python {command}`: {time.time() - start:.0f} s\n")
    print("```\n" + "\n".join((done.stdout + done.stderr).splitlines()[-last_lines:]) + "\n```\n")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is available; --device cpu tries this program without one")
    on_gpu = device == "cuda"
    bf16 = " --bf16" if on_gpu else ""
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if on_gpu else 'cpu'}\n")
    compare_devices(device)

    with tempfile.TemporaryDirectory() as folder:
        short = "" if on_gpu else " --total-episodes 2560"
        for name in ["cpu", device]:
            run(f"ppo.py --device {name}{short}", folder)
        short = "" if on_gpu else " --total-episodes 128 --pretrain-steps 50"
        for name in ["cpu", device]:
            run(f"gpt2_sentiment.py --device {name}{short}", folder, 12)

        if on_gpu:
            speed = [sys.executable, str(ROOT / "benchmark" / "gpt2_speed.py")]
            done = subprocess.run([*speed, "--device", "cuda", "--bf16"], capture_output=True)
            print((done.stdout + done.stderr).decode())
        model = random_gpt2("cpu")
        tokenizer = gpt2.train_tokenizer(gpt2.write_sentences(500, 1), 640)
        tokenizer.add_tokens([f"<{i}>" for i in range(50257 - tokenizer.get_vocab_size())])
        gpt2.save_gpt2(model, tokenizer, Path(folder, "gpt2"))
        iterations = 200 if on_gpu else 1
        batch = 64 if on_gpu else 4
        flags = f"--batch-size {batch} --total-episodes {iterations * batch} --eval-samples 16"
        run(f"gpt2_sentiment.py --model gpt2 --device {device}{bf16} {flags}", folder, 2)


if __name__ == "__main__":
    main()
