"""grpo.py, reinforce.py, dpo.py and reward_model.py side by side with TRL, on the toy task.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/against_trl.py              # tables, and benchmark/results/against_trl.json
    python benchmark/against_trl.py --quick      # a few steps of each, to see that all of it works
    python benchmark/against_trl.py --methods dpo --seeds 1 2    # anew; the rest of the file stays

Both sides start from the same weights, a GPT fitted to demonstrations, and take the same batches,
losses, optimizer and schedule. What is measured, and --parts chooses from:

  rates      success on training prompts over learning rates, of other seeds, for grpo and rloo:
             both sides then take the one that is best for TRL. dpo and reward take the script's
             own, since TRL's loss, optimizer and schedule are the same.
  speed      completions or pairs a second, the sides taking turns in one process
  learning   exact results on the held-out prompts after the same number of episodes or pairs
  race       seconds from the command, with imports and all, to 0.95 exact held-out success

TRL's model is transformers' GPT-2, which has no bias on its output layer; ours moves into the last
norm. TRL gets every setting that makes it quicker here: no bfloat16 (four times slower), plain
attention instead of sdpa (a tenth quicker), no gradient checkpointing, no dropout, no logs, no
workers, the fused optimizer, rows of the whole batch at once. A clock hooked into the optimizers
notes the time of each step, of both alike, and is stopped while a policy is evaluated.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
STARTED = float(os.environ.get("AGAINST_TRL_STARTED", time.time()))  # when a race was started

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from report import spread  # noqa: E402

import dpo  # noqa: E402
import grpo  # noqa: E402

PROMPTS, GROUP = 64, 8  # a rollout
BATCH, BETA, EOS = PROMPTS * GROUP, 0.05, grpo.EOS
METHODS = ["grpo", "rloo", "dpo", "reward"]
SCRIPTS = {"grpo": "grpo", "rloo": "reinforce", "dpo": "dpo", "reward": "reward_model"}


# ------------------------------------------------------------------ The same model for both
def layers(count=2):
    """Our layer names to GPT-2's."""
    yield from {"embed": "wte", "position": "wpe", "norm": "ln_f"}.items()
    parts = {"norm1": "ln_1", "qkv": "attn.c_attn", "proj": "attn.c_proj", "norm2": "ln_2"}
    parts |= {"up": "mlp.c_fc", "down": "mlp.c_proj"}
    for i in range(count):
        yield from ((f"blocks.{i}.{ours}", f"h.{i}.{theirs}") for ours, theirs in parts.items())


def turned(name, weight):
    """GPT-2 stores the weights of its linear layers the other way round."""
    return weight.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight


def to_gpt2(gpt, kind="GPT2LMHeadModel"):
    """A transformers model with the weights of ours: a policy, or the trunk of a reward model.

    The policy's logits W h + b become W (h + c) with W c = b, c added to the bias of the last norm.
    A reward model reads the last token that is not padding: padding must be another than EOS there.
    """
    import transformers

    policy = kind == "GPT2LMHeadModel"
    shape = {"n_positions": len(gpt.position.weight), "n_embd": 64, "n_layer": 2, "n_head": 4}
    shape |= {"vocab_size": grpo.VOCAB + (not policy), "tie_word_embeddings": False}
    tokens = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS + (not policy)}
    dropout = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    shape |= tokens | dropout | {"activation_function": "gelu"}
    shape |= {"attn_implementation": "eager"}  # quicker than sdpa for so few tokens
    config = transformers.GPT2Config(**shape, num_labels=1)
    model = getattr(transformers, kind)(config)
    trunk, weights = model.transformer.state_dict(), gpt.state_dict()
    for ours, theirs in layers():
        for part in ("weight", "bias"):
            if f"{ours}.{part}" in weights:
                name, weight = f"{theirs}.{part}", weights[f"{ours}.{part}"]
                trunk[name][: len(turned(name, weight))] = turned(name, weight)
    if policy:
        matrix, bias = gpt.head.weight.double(), gpt.head.bias.double()
        trunk["ln_f.bias"] += torch.linalg.lstsq(matrix, bias[:, None]).solution.flatten().float()
        model.lm_head.load_state_dict({"weight": gpt.head.weight})
    model.transformer.load_state_dict(trunk)
    return model


def from_gpt2(model):
    """One of our models with the weights of a transformers model."""
    policy = hasattr(model, "lm_head")
    gpt = grpo.GPT(outputs=grpo.VOCAB if policy else 1)
    trunk, weights = model.transformer.state_dict(), gpt.state_dict()
    for ours, theirs in layers():
        for part in ("weight", "bias"):
            if f"{ours}.{part}" in weights:
                name = f"{theirs}.{part}"
                weight = turned(name, trunk[name])
                weights[f"{ours}.{part}"] = weight[: len(weights[f"{ours}.{part}"])].clone()
    weights["head.weight"] = (model.lm_head if policy else model.score).weight.detach().clone()
    weights["head.bias"] = torch.zeros_like(weights["head.bias"])
    gpt.load_state_dict(weights)
    return gpt


def make_tokenizer(pad="<eos>"):
    """Digits, EOS and padding as words, separated by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [str(digit) for digit in range(10)] + ["<eos>", "<pad>"][: 1 + (pad == "<pad>")]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token=pad)


def warm_start(seed):
    """The reference that a script makes by itself with this seed."""
    torch.manual_seed(seed)
    policy = grpo.GPT()
    grpo.warm_start(policy, *grpo.make_demonstrations(grpo.make_prompts()[0]), 100)
    return policy


# ------------------------------------------------------------------ One run of either side
@dataclass
class Job:
    """What both sides are to do alike."""

    method: str
    seed: int
    learning_rate: float
    batch: int  # completions or pairs a gradient step
    rollouts: int = 0  # of 64 prompts × 8, for grpo and rloo
    pairs: tuple | None = None  # prompts, chosen, rejected, for dpo and reward
    epochs: int = 1  # passes over the pairs
    weight_decay: float = 0.01

    @property
    def module(self):
        return __import__(SCRIPTS[self.method])

    @property
    def amount(self):
        """Completions or pairs in all."""
        return self.rollouts * BATCH if self.pairs is None else self.epochs * len(self.pairs[0])


class Reached(Exception):
    """Raised from within a run to end it."""


class Clock:
    """Seconds at which each optimizer step of a run ended.

    What is spent in look(steps) does not count.
    """

    def __init__(self, look=None):
        self.look, self.times, self.stopped = look, [], 0.0

    def __enter__(self):
        self.hook = register_optimizer_step_post_hook(self.tick)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def tick(self, *_):
        now = time.perf_counter()
        self.times.append(now - self.stopped)
        if self.look is not None:
            self.look(len(self.times))
            self.stopped += time.perf_counter() - now

    def rate(self, job):
        """Units a second; the first rollout or step warms up."""
        first = 1 if job.pairs is not None else BATCH // job.batch
        done = job.amount * (1 - first / len(self.times))
        return done / (self.times[-1] - self.times[first - 1])


def draw_pairs(start, groups, size, temperature, seed):
    """Groups of the reference's samples to training prompts, all unlike pairs of a group judged by
    the annotator of dpo.py and reward_model.py. Prompts, chosen, rejected: lists of tokens."""
    torch.manual_seed(seed)
    train_prompts = grpo.make_prompts()[0]
    turns = torch.randperm(groups) % len(train_prompts)
    prompts = train_prompts[turns].repeat_interleave(size, 0)
    responses = torch.cat([dpo.generate(start, x, 1.0) for x in prompts.split(4096)])
    scores = grpo.reward(prompts, responses).view(groups, size)
    first, second = torch.triu_indices(size, size, 1)
    responses = responses.view(groups, size, -1)
    margin = (scores[:, first] - scores[:, second]) / temperature  # (groups, pairs of a group)
    wins = (torch.rand_like(margin) < margin.sigmoid())[:, :, None]
    sides = responses[:, first], responses[:, second]
    unlike = (sides[0] != sides[1]).any(2)
    prompts = prompts[::size, None].expand(groups, len(first), 3)
    columns = prompts, torch.where(wins, *sides), torch.where(wins, *sides[::-1])
    return tuple(column[unlike].tolist() for column in columns)


def write_pairs(pairs, path):
    """The pairs as a file for --preferences."""
    names = "prompt", "chosen", "rejected"
    with path.open("w") as file:
        for row in zip(*pairs, strict=True):
            texts = ["".join(str(token) for token in x if token != EOS) for x in row]
            file.write(json.dumps(dict(zip(names, texts, strict=True))) + "\n")


def run_ours(job, start, holder, folder):
    """Our script's own main, from the given weights: what it returns.

    holder: a list that gets the policy while it is trained, to be looked at. Without a start the
    script makes its own.
    """
    module = job.module
    fit = module.warm_start

    def begin(policy, *how):
        if start is None:
            fit(policy, *how)
        else:
            policy.load_state_dict(start.state_dict())
        holder.append(policy)

    flags = {"seed": job.seed, "tensorboard": False, "learning_rate": job.learning_rate}
    if job.method in ("grpo", "rloo"):
        flags |= {"total_episodes": job.amount, "batch_size": BATCH, "group_size": GROUP}
        flags |= {"kl_coef": BETA}
        flags |= {"num_minibatches": BATCH // job.batch} if job.method == "grpo" else {}
    elif job.pairs is not None:
        write_pairs(job.pairs, Path(folder) / "pairs.jsonl")
        flags |= {"preferences": Path(folder) / "pairs.jsonl"}
        flags |= {"minibatch_size": job.batch, "epochs": job.epochs}
        if job.method == "reward":  # it counts prompts, with all pairs about them
            each = len(job.pairs[0]) / len({tuple(x) for x in job.pairs[0]})
            flags["minibatch_size"] = max(1, round(job.batch / each))
    with mock.patch.object(module, "warm_start", begin):
        return module.main(module.Args(**flags))


def right_answers(completion_ids, total, **_):
    """The reward, from token ids up to EOS and the sum of the prompt."""
    return [
        float(len(y) == 3 and y[2] == EOS and x + y[0] + y[1] == grpo.TARGET)
        for x, y in zip(total, completion_ids, strict=True)
    ]


def trl_trainer(job, start, folder):
    """TRL's trainer for a job, at the settings that are quickest here."""
    import datasets
    import transformers
    import trl

    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of names that will be others in the next versions
    steps = math.ceil(job.amount / job.epochs / job.batch) * job.epochs
    # The scripts' own schedules: the rate rises over 1/2 or 1/11 of the steps, to this height.
    part, highest = (2, 1.0) if job.method == "dpo" else (11, 10 / 11)
    config = {
        "output_dir": folder,
        "seed": job.seed,
        "max_steps": steps,
        "per_device_train_batch_size": job.batch,
        "learning_rate": job.learning_rate * highest,
        "lr_scheduler_type": "linear",
        "warmup_steps": steps // part,
        "adam_beta2": 0.99,
        "weight_decay": job.weight_decay,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    if job.pairs is None:
        prompts = grpo.make_prompts()[0].tolist()
        texts = [" ".join(map(str, prompt)) for prompt in prompts]
        rows = {"prompt": texts, "total": [sum(prompt) for prompt in prompts]}
        config |= {"num_generations": GROUP, "max_completion_length": grpo.RESPONSE_LENGTH}
        config |= {"steps_per_generation": BATCH // job.batch, "beta": BETA}
        if job.method == "grpo":
            config |= {"loss_type": "grpo", "scale_rewards": "none"}
            make_config, make = trl.GRPOConfig, trl.GRPOTrainer
        else:
            make_config, make = trl.RLOOConfig, trl.RLOOTrainer
        to_gpt2(start).save_pretrained(folder)  # the trainer loads the reference from there
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
        extra = {"reward_funcs": right_answers, "processing_class": make_tokenizer()}
    else:
        answers = [
            [y[: y.index(EOS) + 1] if EOS in y else y for y in side] for side in job.pairs[1:]
        ]
        rows = {"chosen_ids": answers[0], "rejected_ids": answers[1]}
        if job.method == "dpo":
            rows |= {"prompt_ids": job.pairs[0]}
            config |= {"beta": job.module.Args.beta, "loss_type": ["sigmoid"]}
            config |= {"precompute_ref_log_probs": True}
            make_config, make, model = trl.DPOConfig, tokenized(trl.DPOTrainer), to_gpt2(start)
            extra = {"ref_model": to_gpt2(start), "processing_class": make_tokenizer()}
        else:
            rows = {
                name: [x + y for x, y in zip(job.pairs[0], side, strict=True)]
                for name, side in rows.items()
            }
            model = to_gpt2(start, "GPT2ForSequenceClassification")
            make_config, make = trl.RewardConfig, trl.RewardTrainer
            extra = {"processing_class": make_tokenizer("<pad>")}
    rows = datasets.Dataset.from_dict(rows)
    return make(model=model, args=make_config(**config), train_dataset=rows, **extra)


def tokenized(trainer):
    """A trainer for pairs that are tokens already; TRL would add EOS to responses cut off."""

    class Tokenized(trainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    return Tokenized


def run_trl(job, start, holder, folder):
    """The same job by TRL: the exact evaluation of what came out."""
    trainer = trl_trainer(job, start, folder)
    holder.append(trainer.model)
    trainer.train()
    trained = from_gpt2(trainer.model)
    if job.method == "reward":
        return evaluate_reward(trained, start, job.module)
    return evaluate_policy(trained, start, job)


def evaluate_policy(policy, start, job, prompts=None):
    """The scripts' own evaluation, on the held-out prompts if not on others."""
    prompts = grpo.make_prompts()[1] if prompts is None else prompts
    tables = [grpo.response_distribution(x, prompts, 1.0) for x in (policy, start)]
    args = job.module.Args
    kl_coef = args.annotator_temperature * args.beta if job.method == "dpo" else BETA
    return grpo.evaluate(*tables, prompts, grpo.reward, kl_coef)


def evaluate_reward(model, start, module):
    """The evaluation at the end of reward_model.py."""
    train_prompts, held_out = module.make_prompts()
    prompts = train_prompts[torch.randint(len(train_prompts), (4096,))]
    std = module.normalise(model, prompts, module.generate(start, prompts, 1.0))
    responses = module.all_responses()
    ended = (responses == EOS).any(1)
    responses, table = responses[ended], module.response_distribution(start, held_out, 1.0)
    probs = table[:, ended].softmax(1)
    with torch.no_grad():
        scores = module.score_table(model, held_out, responses)
    rows = held_out.repeat_interleave(len(responses), 0), responses.repeat(len(held_out), 1)
    rewards = module.reward(*rows).double().view_as(probs)
    temperature = module.Args.annotator_temperature
    return module.evaluate_scores(scores[None], std[None], rewards, probs, temperature)


def run(side, job, start, look=None):
    """A job by "ours" or "TRL": its results, clock and policy. look(steps, policy) is called."""
    holder, results = [], None
    policy = lambda: holder[-1] if side == "ours" else from_gpt2(holder[-1])  # noqa: E731

    def see(steps):
        if holder:  # the warm start is over
            look(steps, policy())

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        clock = stack.enter_context(Clock(see if look else None))
        stack.enter_context(contextlib.suppress(Reached))
        results = (run_ours if side == "ours" else run_trl)(job, start, holder, folder)
    return results, clock, policy()


# ------------------------------------------------------------------ The comparisons
UNITS = {"grpo": "completions", "rloo": "completions", "dpo": "pairs", "reward": "pairs"}
SIDES = ["ours", "TRL"]
MIXED = "dpo, mixed order"


def make_job(method, seed, start, steps=None, learning_rate=None, minibatches=4, mixed=False):
    """The scripts' defaults, in rollouts of 64 prompts × 8. With steps, for speed: so many of them.

    minibatches: gradient steps a rollout of grpo. mixed: the pairs stand in random order, so that
    dpo.py, as TRL always does, mixes them in a minibatch; it keeps together those that follow each
    other on a prompt. For speed the reward model gets larger batches than by default, at which TRL
    is quicker.
    """
    args = __import__(SCRIPTS[method]).Args
    job = Job(method, seed, learning_rate or args.learning_rate, BATCH)
    if method in ("grpo", "rloo"):
        job.rollouts = steps or args.total_episodes // BATCH
        job.batch = BATCH // minibatches if method == "grpo" else BATCH
        return job
    job.batch, job.epochs = args.minibatch_size, args.epochs
    groups, size = args.num_responses // args.group_size, args.group_size
    if method == "reward":
        job.weight_decay = args.weight_decay
        job.batch *= math.ceil(groups / 729) * size * (size - 1) // 2  # pairs about so many prompts
    if steps is not None:
        job.batch, job.epochs = max(job.batch, 256), 1
        groups = steps * job.batch // (size * (size - 1) // 2)
    if start is not None:
        job.pairs = draw_pairs(start, groups, size, args.annotator_temperature, seed)
    if mixed:
        rows = random.Random(seed).sample(range(len(job.pairs[0])), len(job.pairs[0]))
        job.pairs = tuple([column[i] for i in rows] for column in job.pairs)
    return job


def choose_rates(method, seeds, rates):
    """Success on training prompts of each side, one entry a seed, at each learning rate."""
    found = {side: {str(rate): [] for rate in rates} for side in SIDES}
    prompts = grpo.make_prompts()[0][:183]
    for seed in seeds:
        start = warm_start(seed)
        for rate in rates:
            for side in SIDES:
                job = make_job(method, seed, start, learning_rate=rate)
                policy = run(side, job, start)[2]
                success = evaluate_policy(policy, start, job, prompts)["success"]
                found[side][str(rate)].append(success)
                say(f"{method}, learning rate {rate}, seed {seed}, {side}: {success:.4f}")
    return found


def best_rate(found, method):
    """The learning rate with TRL's best mean, of those tried; else the script's own."""
    tried = found.get("rates", {}).get(method, {}).get("TRL")
    return float(max(tried, key=lambda x: statistics.mean(tried[x]))) if tried else None


def measure_learning(method, seeds, rate, steps=None, **how):
    """What each side attains on the held-out prompts, one entry a seed."""
    results = {side: [] for side in SIDES}
    for seed in seeds:
        start = warm_start(seed)
        for side in SIDES:
            job = make_job(method, seed, start, steps, rate, **how)
            results[side].append(run(side, job, start)[0])
            shown = {name: round(x, 4) for name, x in results[side][-1].items()}
            say(f"{method}, learning, seed {seed}, {side}: {shown}")
    return results


def measure_speed(method, turns, steps, **how):
    """Completions or pairs a second of each side, in turn."""
    start = warm_start(1)
    job = make_job(method, 1, start, steps, **how)
    rates = {side: [] for side in SIDES}
    for turn in range(turns + 1):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            rate = run(side, job, start)[1].rate(job)
            say(f"{method}, speed, turn {turn}, {side}: {rate:,.0f} a second")
            if turn:  # the first only warms up
                rates[side].append(rate)
    return rates


def race(side, method, seed, goal, learning_rate):
    """In a process of its own: seconds from its start to the goal; looking does not count."""
    start = warm_start(seed) if side == "TRL" else None  # our script makes its own, and the pairs
    job = make_job(method, seed, start, learning_rate=learning_rate)
    every = {"grpo": 16, "rloo": 4, "dpo": 20}[method]  # steps: 2,048 completions, 10,240 pairs
    best, prompts = [0.0], grpo.make_prompts()[1]

    def look(steps, policy):
        if steps % every == 0:
            table = grpo.response_distribution(policy, prompts, 1.0)
            success = grpo.evaluate(table, table, prompts, grpo.reward, BETA)["success"]
            best.append(max(success, best[-1]))
            if success >= goal:
                raise Reached

    results, clock, _ = run(side, job, start, look)
    ended = clock.times[-1] + time.time() - time.perf_counter()  # the one clock to the other
    return {"seconds": ended - STARTED, "reached": results is None, "best": best[-1]}


def measure_race(method, seeds, goal, rate, threads):
    """Seconds from the command to the goal of each side, one entry a seed."""
    results = {side: [] for side in SIDES}
    for seed in seeds:
        for side in SIDES:
            words = f"--race {side} --methods {method} --seeds {seed} --goal {goal}".split()
            words += ["--threads", str(threads)]
            words += ["--rates", str(rate)] if rate else []
            environment = os.environ | {"AGAINST_TRL_STARTED": str(time.time())}
            environment |= {"OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(
                [sys.executable, __file__, *words],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{method}, race, seed {seed}, {side}: {results[side][-1]}")
    return results


def say(line):
    """Progress, out of the way of the tables."""
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------ Report
def machine():
    """Where and with what this was measured."""
    names = ["torch", "trl", "transformers", "datasets", "accelerate", "numpy"]
    from importlib.metadata import version

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "versions": {"python": platform.python_version()} | {x: version(x) for x in names},
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip(),
        "command": "python " + " ".join([os.path.relpath(__file__, ROOT), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "load": os.getloadavg()[0],
    }


def tables(found):
    """The results as markdown."""
    lines = []
    if found.get("speed"):
        lines += ["| units a second | ours | TRL | times faster |", "|-|-|-|-|"]
        for method, rates in found["speed"].items():
            ours, theirs = (statistics.median(rates[side]) for side in SIDES)
            ratios = sorted(a / b for a, b in zip(*rates.values(), strict=True))
            ratio = f"{ours / theirs:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            name = f"{method}, {UNITS[method.split(',')[0]]}"
            lines.append(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ratio} |")
        lines.append("")
    if found.get("rates"):
        lines += ["| success on training prompts by learning rate | ours | TRL |", "|-|-|-|"]
        for method, tried in found["rates"].items():
            for rate in tried["ours"]:
                cells = [spread(tried[side][rate], 4) for side in SIDES]
                lines.append(f"| {method}, {rate} | {cells[0]} | {cells[1]} |")
        lines.append("")
    if found.get("learning"):
        lines += ["| held-out, exact | measure | ours | TRL |", "|-|-|-|-|"]
        for method, results in found["learning"].items():
            names = ["accuracy", "correlation", "best_of_16"]
            names = names if method == "reward" else ["success", "kl", "optimality"]
            for name in names:
                cells = [spread([r[name] for r in results[side]]) for side in SIDES]
                lines.append(f"| {method} | {name} | {cells[0]} | {cells[1]} |")
        lines.append("")
    if found.get("race"):
        lines += [f"| seconds to {found['goal']} held-out success | ours | TRL |", "|-|-|-|"]
        for method, results in found["race"].items():
            cells = []
            for side in SIDES:
                times = [r["seconds"] for r in results[side] if r["reached"]]
                missed = len(results[side]) - len(times)
                cell = spread(times, 1) if times else "never"
                cells.append(cell + (f" ({missed} never)" if times and missed else ""))
            lines.append(f"| {method} | {cells[0]} | {cells[1]} |")
        lines.append("")
    commands = {}
    for how in found["measured"].values():
        versions = [f"{name} {version}" for name, version in how["versions"].items()]
        place = f"{how['cpu']}, {how['cores']} cores, {', '.join(versions)}, {how['date'][:10]}"
        commands[f"`{how['command']}`, commit {how['commit']}"] = place
    return "\n".join([*lines, "; ".join(commands) + f". {place}."])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    available = [m for m in METHODS if (ROOT / f"{SCRIPTS[m]}.py").exists()]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=available)
    parts = ["speed", "rates", "learning", "race"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--turns", type=int, default=7, help="of each side, in the speed part")
    parser.add_argument("--steps", type=int, default=24, help="of a turn, in the speed part")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--goal", type=float, default=0.95, help="held-out success of the race")
    tried = "learning rates to try grpo and rloo at, on training prompts; dpo and reward, of "
    tried += "which TRL's loss and optimizer are the same, take the script's own"
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3], help=tried)
    parser.add_argument("--rate-seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--race", choices=SIDES, help=argparse.SUPPRESS)
    results = ROOT / "benchmark" / "results" / "against_trl.json"
    parser.add_argument("--output", type=Path, default=results)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.race:
        chosen = args.rates[0] if len(args.rates) == 1 else None
        print(json.dumps(race(args.race, args.methods[0], args.seeds[0], args.goal, chosen)))
        return
    if args.quick:
        args.turns, args.steps, args.seeds, args.parts = 1, 6, [1], ["speed", "learning"]
        args.output = None
    found = {}
    if args.output is not None and args.output.exists():  # of other methods and parts
        found = json.loads(args.output.read_text())
    found |= {part: found.get(part, {}) for part in [*args.parts, "measured"]}
    found["goal"], here = args.goal, machine()  # before the results change the tree
    for method in args.methods:
        found["measured"] |= {f"{method}, {part}": here for part in args.parts}
        if "speed" in args.parts:
            found["speed"][method] = measure_speed(method, args.turns, args.steps)
            if method == "grpo":  # TRL is quickest so, and then needs no old log-probabilities
                once = measure_speed(method, args.turns, args.steps, minibatches=1)
                found["speed"]["grpo, 1 step a rollout"] = once
            if method == "dpo":
                found["speed"][MIXED] = measure_speed(method, args.turns, args.steps, mixed=True)
        if "rates" in args.parts and method in ("grpo", "rloo"):
            found["rates"][method] = choose_rates(method, args.rate_seeds, args.rates)
        rate = best_rate(found, method)
        if "learning" in args.parts:
            steps = args.steps if args.quick else None
            found["learning"][method] = measure_learning(method, args.seeds, rate, steps)
            if method == "dpo":
                mixed = measure_learning(method, args.seeds, rate, steps, mixed=True)
                found["learning"][MIXED] = mixed
        if "race" in args.parts and method != "reward":
            times = measure_race(method, args.seeds, args.goal, rate, args.threads)
            found["race"][method] = times
        if args.output is not None:  # after each method, for it takes long
            args.output.parent.mkdir(exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
