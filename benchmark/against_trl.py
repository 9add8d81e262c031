"""grpo.py, reinforce.py, dpo.py and reward_model.py side by side with TRL, on the toy task.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/against_trl.py              # results: benchmark/results/against_trl.json, .md
    python benchmark/against_trl.py --quick      # a few steps of each, to see that all of it works
    python benchmark/against_trl.py --only dpo --parts speed    # again; the other numbers stay

Both sides start from the same weights, a GPT after SFT, and take the same batches, loss, optimizer,
schedule and learning rate (the script's own). Three parts:

  speed      completions or pairs per second, the sides taking turns in one process
  learning   exact results on the held-out prompts after the same number of episodes or pairs
  race       seconds from the command, imports included, to 0.95 exact held-out success

TRL's model is transformers' GPT-2, whose output layer has no bias; ours moves into the last norm.
TRL gets every setting that makes it faster here: no bfloat16 (four times slower), plain attention
instead of sdpa (a tenth faster), no gradient checkpointing, no dropout, no logs, no workers, the
fused optimizer, the rows of a whole batch at once. A clock hooked into the optimizers notes the
time of each step, alike for both, and is stopped while a policy is evaluated.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"
STARTED = float(os.environ.get("AGAINST_TRL_STARTED", time.time()))  # when a race was started

import exact  # noqa: E402
import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from report import place, spread  # noqa: E402
from run import RESULTS, machine  # noqa: E402

import dpo  # noqa: E402
import grpo  # noqa: E402
import reward_model  # noqa: E402

EOS = grpo.EOS
GROUP_SIZE = 8
BATCH_SIZE = 64 * GROUP_SIZE  # completions per rollout
SCRIPTS = {"grpo": "grpo", "rloo": "reinforce", "dpo": "dpo", "reward": "reward_model"}
UNITS = {"grpo": "completions", "rloo": "completions", "dpo": "pairs", "reward": "pairs"}
PARTS = ["speed", "learning", "race"]
SIDES = ["ours", "TRL"]


# ---------------------------------------------------------------------------- The same model
def layer_names(number_of_layers=2):
    """Our layer names and GPT-2's."""
    names = {"embed": "wte", "position": "wpe", "norm": "ln_f"}
    for i in range(number_of_layers):
        names[f"blocks.{i}.norm1"] = f"h.{i}.ln_1"
        names[f"blocks.{i}.qkv"] = f"h.{i}.attn.c_attn"
        names[f"blocks.{i}.proj"] = f"h.{i}.attn.c_proj"
        names[f"blocks.{i}.norm2"] = f"h.{i}.ln_2"
        names[f"blocks.{i}.up"] = f"h.{i}.mlp.c_fc"
        names[f"blocks.{i}.down"] = f"h.{i}.mlp.c_proj"
    return names


def weight_names(weights):
    """Pairs of our name and GPT-2's of every weight but those of the head."""
    for ours, theirs in layer_names().items():
        for part in ["weight", "bias"]:
            if f"{ours}.{part}" in weights:  # embeddings have no bias
                yield f"{ours}.{part}", f"{theirs}.{part}"


def transposed(their_name, weight):
    """GPT-2 stores the weights of its linear layers transposed."""
    if their_name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return weight.T
    return weight


def to_gpt2(gpt, kind="GPT2LMHeadModel"):
    """A transformers model with the weights of ours: a policy, or the trunk of a reward model.

    The policy's logits W h + b become W (h + c) with W c = b, and c goes into the bias of the last
    norm. A reward model reads the last token that is not padding, so padding must not be EOS there.
    """
    import transformers

    is_policy = kind == "GPT2LMHeadModel"
    extra_tokens = 0 if is_policy else 1  # padding
    config = transformers.GPT2Config(
        n_positions=len(gpt.position.weight),
        n_embd=64,
        n_layer=2,
        n_head=4,
        vocab_size=grpo.VOCAB + extra_tokens,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS + extra_tokens,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu",
        attn_implementation="eager",  # faster than sdpa for so few tokens
        num_labels=1,
    )
    model = getattr(transformers, kind)(config)
    trunk = model.transformer.state_dict()
    weights = gpt.state_dict()
    for ours, theirs in weight_names(weights):
        weight = transposed(theirs, weights[ours])
        trunk[theirs][: len(weight)] = weight  # the padding token's embedding stays
    if is_policy:
        matrix = gpt.head.weight.double()
        bias = gpt.head.bias.double()[:, None]
        trunk["ln_f.bias"] += torch.linalg.lstsq(matrix, bias).solution.flatten().float()
        model.lm_head.load_state_dict({"weight": gpt.head.weight})
    model.transformer.load_state_dict(trunk)
    return model


def from_gpt2(model):
    """One of our models with the weights of a transformers model."""
    is_policy = hasattr(model, "lm_head")
    gpt = grpo.GPT(outputs=grpo.VOCAB if is_policy else 1)
    trunk = model.transformer.state_dict()
    weights = gpt.state_dict()
    for ours, theirs in weight_names(weights):
        weight = transposed(theirs, trunk[theirs])
        weights[ours] = weight[: len(weights[ours])].clone()
    head = model.lm_head if is_policy else model.score
    weights["head.weight"] = head.weight.detach().clone()
    weights["head.bias"] = torch.zeros_like(weights["head.bias"])
    gpt.load_state_dict(weights)
    return gpt


def make_tokenizer(pad_token="<eos>"):
    """Digits, EOS and padding as words, separated by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [str(digit) for digit in range(10)] + ["<eos>"]
    if pad_token not in words:
        words.append(pad_token)
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token=pad_token
    )


def make_reference(seed):
    """The reference that every script makes with this seed."""
    torch.manual_seed(seed)
    policy = grpo.GPT()
    prompts, targets, _, _ = grpo.make_prompts("cpu")
    grpo.sft(policy, *grpo.make_demonstrations(prompts, targets), 100)
    return policy.requires_grad_(False)


# ---------------------------------------------------------------------------- One run
@dataclass
class Job:
    """What both sides are to do alike."""

    method: str
    seed: int
    batch_size: int  # completions or pairs per gradient step
    num_rollouts: int = 0  # of BATCH_SIZE completions, for grpo and rloo
    pairs: tuple | None = None  # prompts, chosen, rejected as lists of tokens, for dpo and reward
    comparisons: tuple | None = None  # of these pairs, if several are of one prompt; for reward
    epochs: int = 1  # passes over each rollout, or over the pairs

    @property
    def script(self):
        return importlib.import_module(SCRIPTS[self.method])

    @property
    def amount(self):
        """Completions or pairs in all."""
        if self.pairs is None:
            return self.num_rollouts * BATCH_SIZE
        return self.epochs * len(self.pairs[0])

    @property
    def steps_per_rollout(self):
        return self.epochs * BATCH_SIZE // self.batch_size


def make_job(method, seed, start, steps=None, one_step=False, from_file=False):
    """A script's defaults, in rollouts of 64 prompts × 8. With steps, for speed: that many of them.

    one_step: grpo takes one gradient step per rollout, as rloo does.
    from_file: reward_model.py reads one pair per prompt from a file, as dpo.py does.
    """
    args = importlib.import_module(SCRIPTS[method]).Args
    job = Job(method, seed, BATCH_SIZE)
    if method in ("grpo", "rloo"):
        job.num_rollouts = steps or args.total_episodes // BATCH_SIZE
        if method == "grpo" and not one_step:
            job.batch_size = BATCH_SIZE // args.num_minibatches
            job.epochs = args.update_epochs
        return job
    job.batch_size = args.minibatch_size
    job.epochs = args.epochs
    number = args.num_pairs if method == "dpo" else args.num_examples
    if steps is not None:
        job.epochs = 1
        number = steps * job.batch_size
    if start is not None and method == "reward" and not from_file:
        job.comparisons = sample_comparisons(start, number, args, seed)
        job.pairs = judged_pairs(*job.comparisons)
        num_steps = number // args.minibatch_size
        job.batch_size = math.ceil(len(job.pairs[0]) / num_steps)
    elif start is not None:
        job.pairs = sample_pairs(start, number, args.annotator_temperature, seed)
    return job


def draw_prompts(number, seed):
    """Training prompts, drawn at random, and their targets. Sets the seed of what follows, too."""
    torch.manual_seed(seed)
    prompts, targets, _, _ = dpo.make_prompts("cpu")
    rows = torch.randint(len(prompts), (number,))
    return prompts[rows], targets[rows]


def sample_pairs(start, number, annotator_temperature, seed):
    """Preference pairs as dpo.py samples them: prompts, chosen, rejected, as lists of tokens."""
    prompts, targets = draw_prompts(number, seed)
    pairs = dpo.sample_preferences(start, prompts, targets, annotator_temperature)
    return tuple(column.tolist() for column in pairs[:3])


def sample_comparisons(start, number, args, seed):
    """Comparisons as reward_model.py samples them: prompts, responses to each, and which won."""
    prompts, targets = draw_prompts(number, seed)
    return reward_model.sample_comparisons(
        start, prompts, targets, args.annotator_temperature, args.num_samples
    )


def judged_pairs(prompts, responses, wins):
    """The same as pairs: prompts, chosen, rejected, as lists of tokens."""
    rows, chosen, rejected = wins.nonzero(as_tuple=True)
    columns = prompts[rows], responses[rows, chosen], responses[rows, rejected]
    return tuple(column.tolist() for column in columns)


def write_pairs(pairs, path):
    """The pairs as a file for --preferences."""
    with path.open("w") as file:
        for row in zip(*pairs, strict=True):
            line = {}
            for name, tokens in zip(["prompt", "chosen", "rejected"], row, strict=True):
                line[name] = "".join(str(token) for token in tokens if token != EOS)
            file.write(json.dumps(line) + "\n")


class GoalReached(Exception):
    """Raised from within a run to end it."""


class Clock:
    """Notes when each optimizer step of a run ended.

    look(steps) is called after each step; the time that it takes does not count.
    """

    def __init__(self, look=None):
        self.look = look
        self.times = []
        self.stopped = 0.0  # seconds spent in look

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

    def units_per_second(self, job):
        """Completions or pairs per second; the first rollout or step only warms up."""
        first = 1 if job.pairs is not None else job.steps_per_rollout
        done = job.amount * (1 - first / len(self.times))
        return done / (self.times[-1] - self.times[first - 1])


def run_ours(job, start, models, folder):
    """Run our script's main and evaluate what it saved exactly.

    start: the reference; None lets the script make its own. models: a list that gets the policy
    before it is trained, so that it can be looked at.
    """
    script = job.script
    script_sft = script.sft

    def sft(policy, prompts, responses, steps):
        if start is None:
            script_sft(policy, prompts, responses, steps)
        else:
            policy.load_state_dict(start.state_dict())
        models.append(policy)

    patches = {"sft": sft}
    flags = {"seed": job.seed, "tensorboard": False, "save_path": Path(folder) / "saved.pt"}
    if job.method in ("grpo", "rloo"):
        flags["total_episodes"] = job.amount
        flags["batch_size"] = BATCH_SIZE
        flags["group_size"] = GROUP_SIZE
        if job.method == "grpo":
            flags["num_minibatches"] = BATCH_SIZE // job.batch_size
            flags["update_epochs"] = job.epochs
    elif job.comparisons is not None:
        flags["epochs"] = job.epochs
        patches["sample_comparisons"] = lambda *_: job.comparisons
    elif job.pairs is not None:
        write_pairs(job.pairs, Path(folder) / "pairs.jsonl")
        flags["preferences"] = Path(folder) / "pairs.jsonl"
        flags["minibatch_size"] = job.batch_size
        flags["epochs"] = job.epochs
    with mock.patch.multiple(script, **patches):
        script.main(script.Args(**flags))
    return exact.evaluate_file(flags["save_path"])


def correct_answers(completion_ids, target, **_):
    """The reward, from token ids up to EOS and the sum that the two digits must have."""
    rewards = []
    for y, total in zip(completion_ids, target, strict=True):
        rewards.append(float(len(y) == 3 and y[2] == EOS and y[0] + y[1] == total))
    return rewards


def without_padding(responses):
    """Lists of tokens up to and including the first EOS."""
    return [y[: y.index(EOS) + 1] if EOS in y else y for y in responses]


def trl_trainer(job, start, folder):
    """TRL's trainer for a job, at the settings that are fastest here."""
    import datasets
    import transformers
    import trl

    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # deprecated names
    args = job.script.Args
    if job.pairs is None:
        steps = job.num_rollouts * job.steps_per_rollout
    else:
        steps = math.ceil(len(job.pairs[0]) / job.batch_size) * job.epochs
    config = {
        "output_dir": folder,
        "seed": job.seed,
        "max_steps": steps,
        "per_device_train_batch_size": job.batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",  # decay to 0 after warmup, as in the scripts
        "warmup_steps": max(1, steps // 10),
        "adam_beta2": 0.99,
        "weight_decay": getattr(args, "weight_decay", 0.0),
        "max_grad_norm": args.max_grad_norm,
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
    if job.method in ("grpo", "rloo"):
        prompts, targets, _, _ = grpo.make_prompts("cpu")
        texts = [" ".join(map(str, prompt)) for prompt in prompts.tolist()]
        data = {"prompt": texts, "target": targets.tolist()}
        config["num_generations"] = GROUP_SIZE
        config["max_completion_length"] = grpo.RESPONSE_LENGTH
        config["steps_per_generation"] = BATCH_SIZE // job.batch_size
        config["beta"] = args.kl_coef
        make_config = trl.RLOOConfig
        make_trainer = trl.RLOOTrainer
        if job.method == "grpo":
            config["loss_type"] = "grpo"
            config["num_iterations"] = job.epochs
            config["scale_rewards"] = "none"
            make_config = trl.GRPOConfig
            make_trainer = trl.GRPOTrainer
        to_gpt2(start).save_pretrained(folder)  # the trainer loads the reference from there
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
        extra = {"reward_funcs": correct_answers, "processing_class": make_tokenizer()}
    else:
        prompts = job.pairs[0]
        chosen = without_padding(job.pairs[1])
        rejected = without_padding(job.pairs[2])
        if job.method == "dpo":
            data = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
            config["beta"] = args.beta
            config["loss_type"] = ["sigmoid"]
            config["precompute_ref_log_probs"] = True
            make_config = trl.DPOConfig
            make_trainer = tokenized(trl.DPOTrainer)
            model = to_gpt2(start)
            extra = {"ref_model": to_gpt2(start), "processing_class": make_tokenizer()}
        else:
            data = {
                "chosen_ids": [x + y for x, y in zip(prompts, chosen, strict=True)],
                "rejected_ids": [x + y for x, y in zip(prompts, rejected, strict=True)],
            }
            make_config = trl.RewardConfig
            make_trainer = trl.RewardTrainer
            model = to_gpt2(start, "GPT2ForSequenceClassification")
            extra = {"processing_class": make_tokenizer("<pad>")}
    dataset = datasets.Dataset.from_dict(data)
    return make_trainer(model=model, args=make_config(**config), train_dataset=dataset, **extra)


def tokenized(trainer_class):
    """A trainer for pairs that are tokens already; TRL would add EOS to truncated responses."""

    class Tokenized(trainer_class):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    return Tokenized


def run_trl(job, start, models, folder):
    """The same job by TRL, evaluated in the same way."""
    trainer = trl_trainer(job, start, folder)
    models.append(trainer.model)
    trainer.train()
    gpt = from_gpt2(trainer.model)
    _, _, prompts, targets = grpo.make_prompts("cpu")
    args = job.script.Args
    if job.method == "reward":

        def score(prompts, responses):
            return job.script.response_scores(gpt, prompts, responses)

        temperature = args.annotator_temperature
        return exact.evaluate_reward_model(score, start, prompts, targets, temperature)
    flags = {name: getattr(args, name) for name in args.__dataclass_fields__}
    return exact.evaluate(gpt, start, prompts, targets, exact.saved_kl_coef(flags))


def run(side, job, start, look=None):
    """A job by one side: its exact results (None if look ended it) and its clock.

    look(steps, policy), if given, is called after each gradient step on the policy.
    """
    models = []

    def see(steps):
        if models:  # SFT is over
            policy = models[-1] if side == "ours" else from_gpt2(models[-1])
            look(steps, policy)

    run_side = run_ours if side == "ours" else run_trl
    results = None
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        Clock(see if look else None) as clock,
        contextlib.suppress(GoalReached),
    ):
        results = run_side(job, start, models, folder)
    return results, clock


# ---------------------------------------------------------------------------- The comparisons
def say(line):
    """Progress, out of the way of the tables."""
    print(line, file=sys.stderr, flush=True)


def measure_speed(method, turns, steps, one_step=False, from_file=False):
    """Completions or pairs per second of each side, in turn."""
    start = make_reference(1)
    job = make_job(method, 1, start, steps, one_step, from_file)
    speeds = {side: [] for side in SIDES}
    for turn in range(turns + 1):
        order = SIDES if turn % 2 == 0 else SIDES[::-1]
        for side in order:
            _, clock = run(side, job, start)
            speed = clock.units_per_second(job)
            say(f"{method}, speed, turn {turn}, {side}: {speed:,.0f} per second")
            if turn > 0:  # the first only warms up
                speeds[side].append(speed)
    return speeds


def measure_learning(method, seeds, steps=None):
    """Exact results of each side on the held-out prompts, one entry per seed."""
    results = {side: [] for side in SIDES}
    for seed in seeds:
        start = make_reference(seed)
        job = make_job(method, seed, start, steps)
        for side in SIDES:
            result, _ = run(side, job, start)
            results[side].append(result)
            shown = {name: round(value, 4) for name, value in result.items()}
            say(f"{method}, learning, seed {seed}, {side}: {shown}")
    return results


def race(side, method, seed, goal):
    """In a process of its own: seconds from its start to the goal, less those spent looking."""
    start = None
    if side == "TRL":  # our script makes its reference, and its pairs, by itself
        start = make_reference(seed)
    job = make_job(method, seed, start)
    looks = {"grpo": 32, "rloo": 4, "dpo": 10}  # every 2,048 completions or 5,120 pairs
    _, _, prompts, targets = grpo.make_prompts("cpu")
    best = 0.0

    def look(steps, policy):
        nonlocal best
        if steps % looks[method] == 0:
            success = exact.evaluate(policy, policy, prompts, targets, 0.0)["success"]
            best = max(best, success)
            if success >= goal:
                raise GoalReached

    results, clock = run(side, job, start, look)
    end = clock.times[-1] + time.time() - time.perf_counter()  # from one clock to the other
    return {"seconds": end - STARTED, "reached": results is None, "best": best}


def measure_race(method, seeds, goal, threads):
    """Seconds from the command to the goal of each side, one entry per seed."""
    results = {side: [] for side in SIDES}
    for seed in seeds:
        for side in SIDES:
            words = ["--race", side, "--only", method, "--seeds", str(seed)]
            words += ["--goal", str(goal), "--threads", str(threads)]
            env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            env["AGAINST_TRL_STARTED"] = str(time.time())
            command = [sys.executable, __file__, *words]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{method}, race, seed {seed}, {side}: {results[side][-1]}")
    return results


# ---------------------------------------------------------------------------- Report
def speed_table(speeds):
    lines = ["| units per second | ours | TRL | times faster |", "|-|-|-|-|"]
    for name, sides in speeds.items():
        ours = statistics.median(sides["ours"])
        theirs = statistics.median(sides["TRL"])
        ratios = [a / b for a, b in zip(sides["ours"], sides["TRL"], strict=True)]
        ratio = f"{ours / theirs:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        unit = UNITS[name.split(",")[0]]
        lines.append(f"| {name}: {unit} | {ours:,.0f} | {theirs:,.0f} | {ratio} |")
    return lines


def learning_table(learning):
    lines = ["| held-out, exact | metric | ours | TRL |", "|-|-|-|-|"]
    for method, sides in learning.items():
        names = ["success", "kl", "normalised_gain"]
        if method == "reward":
            names = ["accuracy", "correlation"]
        for name in names:
            cells = [spread([result[name] for result in sides[side]]) for side in SIDES]
            lines.append(f"| {method} | {name.replace('_', ' ')} | {cells[0]} | {cells[1]} |")
    return lines


def race_table(races, goal):
    lines = [f"| seconds to {goal} held-out success | ours | TRL | times faster |", "|-|-|-|-|"]
    for method, sides in races.items():
        cells = []
        means = []
        for side in SIDES:
            seconds = [run["seconds"] for run in sides[side] if run["reached"]]
            missed = len(sides[side]) - len(seconds)
            cell = spread(seconds, 1) if seconds else "never"
            if seconds and missed:
                cell += f" ({missed} never)"
            cells.append(cell)
            means.append(statistics.mean(seconds) if seconds else math.nan)
        lines.append(f"| {method} | {cells[0]} | {cells[1]} | {means[1] / means[0]:.2f} |")
    return lines


def make_tables(found):
    """The results as markdown."""
    lines = []
    if found["speed"]:
        lines += [*speed_table(found["speed"]), ""]
    if found["learning"]:
        lines += [*learning_table(found["learning"]), ""]
    if found["race"]:
        lines += [*race_table(found["race"], found["goal"]), ""]
    notes = set()
    for how in found["measured"].values():
        notes.add(f"`{how['command']}`: {how['seconds']:,} seconds. {how['place']}")
    return "\n".join([*lines, " ".join(sorted(notes))])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--turns", type=int, default=7, help="of each side, in the speed part")
    parser.add_argument("--steps", type=int, default=24, help="of a turn, in the speed part")
    parser.add_argument("--goal", type=float, default=0.95, help="held-out success of the race")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--race", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.race:
        print(json.dumps(race(args.race, args.only[0], args.seeds[0], args.goal)))
        return
    steps = None
    if args.quick:
        args.turns = 1
        args.steps = 6
        args.seeds = [1]
        args.parts = ["speed", "learning"]
        steps = args.steps

    path = RESULTS / "against_trl.json"
    found = {part: {} for part in [*PARTS, "measured"]}
    if path.exists() and not args.quick:  # keep what is not measured now
        found = json.loads(path.read_text())
    found["goal"] = args.goal
    versions = [f"{name} {version(name)}" for name in ["trl", "transformers", "accelerate"]]
    how = {
        "command": " ".join(["python benchmark/against_trl.py", *sys.argv[1:]]),
        "place": f"{', '.join(versions)}, {place(machine(args.threads))}",
        "seconds": 0,
    }
    for method in args.only:
        started = time.time()
        if "speed" in args.parts:
            found["speed"][method] = measure_speed(method, args.turns, args.steps)
            if method == "grpo":  # TRL is fastest so: it then needs no old log-probabilities
                once = measure_speed(method, args.turns, args.steps, one_step=True)
                found["speed"]["grpo, 1 step per rollout"] = once
            if method == "reward":
                pairs = measure_speed(method, args.turns, args.steps, from_file=True)
                found["speed"]["reward, a file of single pairs"] = pairs
        if "learning" in args.parts:
            found["learning"][method] = measure_learning(method, args.seeds, steps)
        if "race" in args.parts and method != "reward":
            found["race"][method] = measure_race(method, args.seeds, args.goal, args.threads)
        for part in args.parts:
            if method in found[part]:  # there is no race of reward models
                found["measured"][f"{method}, {part}"] = how
        how["seconds"] += round(time.time() - started)
        if not args.quick:  # after each method, since it takes long
            path.write_text(json.dumps(found, indent=1) + "\n")
            path.with_suffix(".md").write_text(make_tables(found) + "\n")
    print(make_tables(found))
    if not args.quick:
        print(f"\nresults: {path.relative_to(ROOT)}, {path.with_suffix('.md').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
