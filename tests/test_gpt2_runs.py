"""gpt2_sentiment.py as a program: its updates, kills and resumption, processes, flags, debris."""

import copy
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import gpt2_oracle
import oracle
import programs
import pytest
import torch
import tyro
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpt2_sentiment as gpt2

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "gpt2_sentiment.py"
TINY = ROOT / "tests" / "data" / "gpt2-tiny"
CONFIG = json.loads((TINY / "config.json").read_text())
EOS = 299
SCORE_TEXTS = gpt2.score_texts


def variety(prompts, responses, kind="sentiment", lexicon=None):
    """A reward that a random model earns some of: different characters, less the blanks."""
    if kind != "sentiment":
        return SCORE_TEXTS(prompts, responses, kind, lexicon)
    return [len(set(text)) / 4 - text.count(" ") for text in responses]


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory):
    words = "--pretrain-steps 3 --total-episodes 12 --batch-size 4 --eval-samples 5 --save-dir out"
    words += " --response-length 6 --checkpoint-every 2 --kl-target 3"
    yield from programs.start(f"gpt2_sentiment.py {words}", tmp_path_factory.mktemp("program"))


SMALL = {"model": str(TINY), "tensorboard": False, "batch_size": 8, "total_episodes": 16}
SMALL |= {"response_length": 5, "eval_samples": 8, "learning_rate": 3e-3, "kl_target": None}
SMALL |= {"update_epochs": 2, "num_minibatches": 2, "kl_coef": 0.1}

# The same batch, on two processes. target_kl is exceeded in the first rollout, not by the tokens
# of one process.
SHARED = SMALL | {"reward": "composite", "ent_coef": 0.1, "whiten_rewards": False, "top_k": 60}
SHARED |= {"target_kl": 0.3}

# The real program, but the model that the second process loads has other weights.
OTHER_WEIGHTS = """
import os, sys
import tyro
sys.path.insert(0, {root!r})
import gpt2_sentiment as gpt2

load_gpt2 = gpt2.load_gpt2

def load_other(folder):
    policy, tokenizer, score_head = load_gpt2(folder)
    for parameter in policy.parameters():
        parameter.data += 0.01 * int(os.environ["RANK"])
    return policy, tokenizer, score_head

gpt2.load_gpt2 = load_other
gpt2.main(tyro.cli(gpt2.Args))
"""


def torchrun(folder, *words):
    """Two processes of the real command, with gloo."""
    return programs.begin(
        folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words
    )


@pytest.fixture(scope="module", autouse=True)
def commands(tmp_path_factory):
    """Commands that run in the background: (process, folder) by name."""
    found = {}
    folder = tmp_path_factory.mktemp("two")
    words = ["--no-tensorboard", "--save-dir", "two"]
    for name, value in SHARED.items():
        if name not in ("tensorboard", "whiten_rewards"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--no-whiten-rewards", "--checkpoint-every", "1"]
    (folder / "other.py").write_text(OTHER_WEIGHTS.format(root=str(ROOT)))
    found["two processes"] = (torchrun(folder, "other.py", *words), folder)

    folder = tmp_path_factory.mktemp("torchrun")
    found["batch of 0"] = (torchrun(folder, SCRIPT, "--batch-size", "0"), folder)

    # No network: the address is a port of this machine that nobody listens to.
    folder = tmp_path_factory.mktemp("unknown")
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    env["HF_HOME"] = str(folder / "home")
    process = programs.begin(folder, SCRIPT, "--model", "nobody/nothing", **env)
    found["unknown model"] = (process, folder)
    yield found
    for process, _ in found.values():
        programs.end(process)


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt2, "score_texts", variety)


def load(name):
    """Policy and tokenizer of a directory."""
    policy, tokenizer, _ = gpt2.load_gpt2(Path(name))
    return policy, tokenizer


def real_tokens(row):
    """A prompt without its padding."""
    return [token for token in row.tolist() if token != gpt2.PAD]


def run(**flags):
    """Train gpt2-tiny for two rollouts of 8 unless told otherwise."""
    return gpt2.main(gpt2.Args(**(SMALL | flags)))


def spy(monkeypatch, name, module=gpt2, before=lambda *a, **k: None):
    return programs.spy(monkeypatch, module, name, before)


# ---------------------------------------------------------------- The update against the oracle


def as_stored(state):
    """Weights of a GPT2 of the script as files hold them, float64."""
    turned = {k: v.t() if ".c_" in k and "weight" in k else v for k, v in state.items()}
    return gpt2_oracle.float64(turned)


def end_sooner(monkeypatch, by=5.0):
    """Raise the logit of EOS, so that responses end before they are cut off; what is added."""
    head, push = gpt2.GPT2.head, torch.zeros(300)
    push[EOS] = by
    monkeypatch.setattr(gpt2.GPT2, "head", lambda self, states: head(self, states) + push)
    return push.double()


UPDATES = [
    {},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "micro_batch_size": 2, "ent_coef": 0.2},
    {"separate_critic": True, "normalize_advantages": False, "kl_target": 5.0, "kl_horizon": 10},
    {"missing_eos_penalty": 2.0, "advantage_clip": 0.5},
    {"whiten_rewards": False},
    {"ent_coef": 0.3, "gamma": 0.9, "gae_lambda": 0.5, "micro_batch_size": 1, "value_clip": 0.01},
]


@pytest.mark.parametrize("flags", UPDATES, ids=lambda f: " ".join(f) or "default")
def test_gradients_of_an_update_are_those_of_the_oracle(flags, monkeypatch, tmp_path):
    """All of the second rollout again: texts, scores, KL, advantages, both steps' gradients."""
    init = gpt2.Critic.__init__

    def loud(self, policy, separate):
        init(self, policy, separate)
        torch.nn.init.normal_(self.value.weight, std=0.3), torch.nn.init.ones_(self.value.bias)

    monkeypatch.setattr(gpt2.Critic, "__init__", loud)
    push = end_sooner(monkeypatch, 0.0 if "top_k" in flags else 5.0)
    weights = lambda policy, critic, *rest, **more: (  # noqa: E731
        copy.deepcopy(policy.state_dict()),
        critic and copy.deepcopy(critic.state_dict()),
    )
    rollouts = spy(monkeypatch, "sample_rollout", before=weights)
    steps = spy(
        monkeypatch,
        "clip_grad_norm_",
        torch.nn.utils,
        lambda parameters, *a: [(p.detach().clone(), p.grad.clone()) for p in parameters],
    )
    (tmp_path / "prompts").write_text("Yes\nI lo\n")
    args = SMALL | {"batch_size": 3, "total_episodes": 6, "response_length": 4} | flags
    args |= {"num_minibatches": 1, "max_grad_norm": 1e5, "prompts": tmp_path / "prompts"}
    gpt2.main(gpt2.Args(**(args | {"eval_samples": 2})))
    args = gpt2.Args(**args)

    (_, critic, _, prompts, *_), found, (old_policy, old_critic) = rollouts[1]
    responses = found[0].tolist()
    state = critic.state_dict()
    heads_last = sorted(state, key=lambda name: name.startswith("value."))
    names = [*old_policy, *[f"critic.{k}" for k in heads_last]]
    choice = args.temperature, args.top_k, args.top_p
    reference = gpt2_oracle.float64(load_file(TINY / "model.safetensors"))
    _, tokenizer = load(TINY)
    rows = [real_tokens(x) for x in prompts]
    lengths = [[*y, EOS].index(EOS) + 1 for y in responses]
    lengths = [min(n, 4) for n in lengths]
    assert min(lengths) < 4 or args.top_k  # some end before they are cut off

    def read(w, critic_w, sets=None):
        """Log-probabilities, values and entropies of the real tokens, and the sets, row by row."""
        out = []
        for i, (x, y, n) in enumerate(zip(rows, responses, lengths, strict=True)):
            states = gpt2_oracle.hidden(w, CONFIG, (x + y)[: len(x) + n - 1])[len(x) - 1 :]
            trunk = {k[4:]: v for k, v in critic_w.items() if k.startswith("gpt.")}
            seen = states
            if trunk:
                seen = gpt2_oracle.hidden(trunk, CONFIG, (x + y)[: len(x) + n - 1])[len(x) - 1 :]
            row = []
            for t in range(n):
                logits = w["wte.weight"] @ states[t] + push
                kept = sets[i][t][3] if sets else gpt2_oracle.kept(logits.tolist(), *choice)
                probs = (logits[kept] / args.temperature).softmax(0)
                value = (critic_w["value.weight"][0] @ seen[t]) + critic_w["value.bias"][0]
                entropy = -(probs * probs.log()).sum()
                row.append((probs[kept.index(y[t])].log(), value, entropy, kept))
            out.append(row)
        return out

    def critic_as_stored(state):
        trunk = {k[4:]: v for k, v in state.items() if k.startswith("gpt.")}
        rest = {k: v.double() for k, v in state.items() if k.startswith("value.")}
        return {f"gpt.{k}": v for k, v in as_stored(trunk).items()} | rest

    old = read(as_stored(old_policy), critic_as_stored(old_critic))
    ref = read(reference, critic_as_stored(old_critic), sets=old)
    beta = args.kl_coef
    if args.kl_target is not None:  # the KL of the first rollout was 0, far below the target
        beta *= 1 - 0.2 * 3 / args.kl_horizon
    rewards = []
    for x, y, n, o, r in zip(rows, responses, lengths, old, ref, strict=True):
        prompt = tokenizer.decode(x[1:])
        text = tokenizer.decode(x[1:] + y[:n])[len(prompt) :]
        row = [-beta * (a[0] - b[0]).item() for a, b in zip(o, r, strict=True)]
        row[-1] += variety([prompt], [text])[0]
        if EOS not in y:
            row[-1] -= args.missing_eos_penalty
        rewards.append(row)
    assert (
        max(
            abs((a[0] - b[0]).item())
            for x in zip(old, ref, strict=True)
            for a, b in zip(*x, strict=True)
        )
        > 1e-3
    )
    if args.whiten_rewards:
        std = oracle.deviation([r for row in rewards for r in row])
        rewards = [[r / std for r in row] for row in rewards]
    values = [[x[1].item() for x in row] for row in old]
    advantages = [
        oracle.gae(r, v, args.gamma, args.gae_lambda) for r, v in zip(rewards, values, strict=True)
    ]
    returns = [
        [a + v for a, v in zip(*x, strict=True)] for x in zip(advantages, values, strict=True)
    ]
    if args.normalize_advantages:
        every = [a for row in advantages for a in row]
        mean, std = sum(every) / len(every), oracle.deviation(every)
        advantages = [[(a - mean) / std for a in row] for row in advantages]

    if args.advantage_clip is not None:
        clip = args.advantage_clip
        assert max(abs(a) for row in advantages for a in row) > clip
        advantages = [[max(-clip, min(clip, a)) for a in row] for row in advantages]

    for step in (2, 3):
        (_, _, at) = steps[step]
        now = dict(zip(names, [p for p, _ in at], strict=True))
        w = as_stored({k: v for k, v in now.items() if not k.startswith("critic.")})
        c = critic_as_stored({k[7:]: v for k, v in now.items() if k.startswith("critic.")})
        leaves = {**w, **{f"critic.{k}": v for k, v in c.items()}}
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        new = read(w, c, sets=old)
        loss = 0.0
        for i in range(3):
            for t in range(lengths[i]):
                logprob, value, entropy, _ = new[i][t]
                ratio, a = (logprob - old[i][t][0].detach()).exp(), advantages[i][t]
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                loss = loss - torch.min(ratio * a, clipped * a)
                before, wanted = values[i][t], returns[i][t]
                near = before + (value - before).clamp(-args.value_clip, args.value_clip)
                worse = torch.max((value - wanted) ** 2, (near - wanted) ** 2)
                loss = loss + args.vf_coef * worse / 2 - args.ent_coef * entropy
        (loss / 3).backward()
        for name, (_, grad) in zip(names, at, strict=True):
            exact = leaves[name].grad
            exact = exact.t() if ".c_" in name and "weight" in name else exact
            scale = exact.norm() + 1e-12
            torch.testing.assert_close(
                grad.double() / scale, exact / scale, atol=2e-4, rtol=0, msg=f"{name}, step {step}"
            )


def check_same_weights(*folders):
    """Weights of two saved models agree to 1e-5 and are not those that training began with."""
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    start = load_file(TINY / "model.safetensors")
    for name, tensor in one.items():
        if name.endswith("c_attn.bias"):
            # A key's bias adds the same to all scores of a query: its gradient is rounding noise
            # around 0, which Adam brings to the size of any other.
            one[name][32:64] = two[name][32:64] = 0.0
        assert (tensor - start[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=name)


def save_for_each_micro_batch_size():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gpt2, "score_texts", variety)
        for size in (None, 1, 3):
            run(micro_batch_size=size, ent_coef=0.1, top_k=30, save_dir=Path(f"size{size}"))
    return Path.cwd()


@programs.beside(save_for_each_micro_batch_size)
def test_the_update_does_not_depend_on_the_micro_batches(found):
    for size in (1, 3):
        check_same_weights(found / "sizeNone", found / f"size{size}")


def test_the_metrics_do_not_depend_on_the_micro_batches(monkeypatch):
    """approx_kl is a mean over tokens: parts with more tokens count for more."""
    end_sooner(monkeypatch)  # responses of all lengths
    seen = []
    for size in (None, 1, 3):
        curves = programs.record_curves(monkeypatch, gpt2)
        run(micro_batch_size=size, learning_rate=1e-2, tensorboard=True)
        seen.append(curves)
    for name, points in seen[0].items():
        if name.startswith("losses/"):
            for curves in seen[1:]:
                expected = pytest.approx(programs.values(points), rel=1e-3, abs=1e-5)
                assert programs.values(curves[name]) == expected, name
    assert 1 < seen[0]["charts/response_length"][0][1] < 4
    assert seen[0]["losses/approx_kl"][0][1] > 1e-3


def test_advantages_are_whitened_over_the_rollout(monkeypatch):
    losses = spy(monkeypatch, "policy_loss")
    run(total_episodes=8, update_epochs=1, num_minibatches=4)
    programs.check_whitened(losses, num_minibatches=4)


# ---------------------------------------------------------------- Learning


def letters(prompts, responses, kind, lexicon):
    """A reward of 1 for every letter e."""
    return [float(text.count("e")) for text in responses]


def learn_letters():
    flags = {"total_episodes": 32 * 25, "batch_size": 32, "eval_samples": 64, "kl_coef": 0.02}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gpt2, "score_texts", letters)
        return run(**flags, response_length=6, update_epochs=4, num_minibatches=2)


@programs.beside(learn_letters)
def test_reward_rises(found):
    """From 0.1 a response to more than one."""
    assert found["reward_before"] < 0.5 < 1.0 < found["reward"]
    assert found["held_out_reward"] > found["held_out_reward_before"] + 0.5
    assert found["kl"] > 0.1 and found["win_rate"] > 0.6
    assert found["kl_before"] == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------- The same again


@pytest.fixture(scope="module")
def default_result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2, "score_texts", variety)
        return run()


def test_same_seed_same_result_other_seed_another(default_result, tmp_path):
    assert run(save_dir=tmp_path / "a") == default_result
    run(save_dir=tmp_path / "b"), run(save_dir=tmp_path / "c", seed=2)
    a, b, c = ((tmp_path / x / "model.safetensors").read_bytes() for x in "abc")
    assert a == b != c
    assert set(os.listdir(tmp_path)) == {"a", "b", "c"}


CHOICES = [
    {"reward": "positivity"},
    {"reward": "plain"},
    {"missing_eos_penalty": 1.0},
    {"advantage_clip": 0.1},
    {"reward": "composite"},
    {"response_length": 4},
    {"top_k": 5},
    {"top_p": 0.5},
    {"temperature": 0.5},
    {"update_epochs": 1},
    {"num_minibatches": 1},
    {"gamma": 0.5},
    {"gae_lambda": 0.5},
    {"clip_coef": 0.001},
    {"value_clip": 0.001},
    {"normalize_advantages": False},
    {"whiten_rewards": False},
    {"target_kl": 1e-6},
    {"ent_coef": 1.0},
    {"vf_coef": 5.0},
    {"separate_critic": True},
    {"kl_target": 0.1, "kl_horizon": 10},
    {"kl_coef": 5.0},
    {"max_grad_norm": 0.001},
    {"learning_rate": 1e-4},
    {"batch_size": 4},
    {"total_episodes": 24},
    {"eval_samples": 10},
]


@pytest.mark.parametrize("flags", CHOICES, ids=lambda f: " ".join(map(str, f)))
def test_every_flag_changes_the_outcome(flags, default_result):
    if "kl_target" in flags or "value_clip" in flags:  # these need a rollout more to be felt
        assert run(total_episodes=24, **flags) != run(total_episodes=24)
    else:
        assert run(**flags) != default_result


def test_pretraining_lowers_the_loss():
    sentences = gpt2.write_sentences(200, 1)
    torch.manual_seed(0)
    policy, tokenizer = gpt2.embedded_gpt2(sentences)

    def loss():
        total = []
        for text in sentences[:20]:
            ids = torch.tensor([[0, *tokenizer.encode(text).ids, 0]])
            logits = policy.head(policy(ids[:, :-1])).detach()
            total.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item())
        return sum(total) / len(total)

    before = loss()
    assert before == pytest.approx(math.log(tokenizer.get_vocab_size()), rel=0.1)
    gpt2.pretrain_gpt2(policy, tokenizer, sentences, 25)
    assert loss() < before - 2


def test_pretraining_warms_up_and_decays(monkeypatch):
    """40 steps: 4e-3 is reached in 2 steps (5 %), then the rate falls linearly."""
    rates = []
    step = torch.optim.AdamW.step

    def recorded_step(optimizer, *arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    sentences = gpt2.write_sentences(20, 1)
    policy, tokenizer = gpt2.embedded_gpt2(sentences)
    gpt2.pretrain_gpt2(policy, tokenizer, sentences, 40)
    expected = [0.5 * 4e-3, *(4e-3 * (40 - i) / 40 for i in range(1, 40))]
    assert rates == pytest.approx(expected)


# ---------------------------------------------------------------- Killed and resumed

LONG = {"total_episodes": 48, "checkpoint_every": 2, "kl_target": 0.5, "kl_horizon": 20}
LONG |= {"separate_critic": True, "top_k": 50}


def checkpoint():
    (folder,) = Path("runs").iterdir()
    return folder, torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Equal to the bit, tensors within dictionaries and lists too."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The last checkpoint of a run of six rollouts, and what it returned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2, "score_texts", variety)
        patch.chdir(tmp_path_factory.mktemp("uninterrupted"))
        result = run(**LONG)
        return checkpoint()[1], result


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed(function):
    """Run it in a child process that is to die by SIGKILL."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            function()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def die_at(module, name, number, after=False):
    """Let the call of that number of a function be the last thing that happens."""
    function, count = getattr(module, name), [0]

    def deadly(*arguments, **more):
        count[0] += 1
        if count[0] == number and not after:
            die()
        result = function(*arguments, **more)
        if count[0] == number:
            die()
        return result

    setattr(module, name, deadly)


def die_while_saving(number):
    """Half of what torch.save should write is on the disk."""
    save, count = torch.save, [0]

    def deadly(thing, file, *arguments, **more):
        count[0] += 1
        if count[0] < number:
            return save(thing, file, *arguments, **more)
        buffer = io.BytesIO()
        save(thing, buffer)
        with open(file, "wb") if isinstance(file, (str, Path)) else file as stream:
            stream.write(buffer.getvalue()[: buffer.tell() // 2])
            stream.flush()
            die()

    torch.save = deadly


MOMENTS = {  # six rollouts of four steps, a checkpoint after the second, fourth and sixth
    "while sampling": lambda: die_at(gpt2, "response_states", 62),
    "between two steps": lambda: die_at(torch.optim.AdamW, "step", 15),
    "in the middle of a checkpoint": lambda: die_while_saving(2),
    "before the checkpoint is renamed": lambda: die_at(os, "replace", 2),
    "after the checkpoint is renamed": lambda: die_at(os, "replace", 2, after=True),
    "while evaluating": lambda: die_at(gpt2, "distinct_2", 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_is_resumed_to_the_bit(moment, uninterrupted):
    def child():
        MOMENTS[moment]()
        run(**LONG)

    killed(child)
    folder, state = checkpoint()  # readable, whatever happened
    assert state["rollout"] in (2, 4, 6)
    for name in os.listdir(folder):  # a part has the number of its process
        assert re.fullmatch(r"checkpoint\.pt(\.\d+\.part)?", name)
    result = gpt2.main(gpt2.Args(resume=folder))
    _, final = checkpoint()
    assert same(final, uninterrupted[0])
    assert result == uninterrupted[1]
    assert os.listdir(folder) == ["checkpoint.pt"]


def test_resuming_takes_nothing_from_the_old_files(tmp_path, uninterrupted):
    """The model's folder may be gone, and other random numbers drawn; curves are continued."""
    model, saved = tmp_path / "model", tmp_path / "saved"
    shutil.copytree(TINY, model)
    flags = {"model": str(model), "save_dir": saved, "tensorboard": True}

    def child():
        die_at(torch.optim.AdamW, "step", 15)
        run(**LONG | flags)

    killed(child)
    time.sleep(1)  # TensorBoard sorts the files by the second in which they were begun
    shutil.rmtree(model)
    torch.manual_seed(77)
    folder, _ = checkpoint()
    result = gpt2.main(gpt2.Args(resume=folder))
    assert result == uninterrupted[1]
    policy, _ = load(saved)
    assert same(dict(policy.state_dict()), uninterrupted[0]["policy"])
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("charts/score")] == list(range(8, 49, 8))


def test_prompts_and_lexicon_are_those_of_the_checkpoint():
    Path("prompts").write_text("Yes\nI love how")
    Path("lexicon").write_text("e 1\nt -1")
    files = {"prompts": "prompts", "lexicon": "lexicon", "reward": "plain"}
    result = run(checkpoint_every=2, **files)
    Path("prompts").unlink()
    Path("lexicon").unlink()
    folder, _ = checkpoint()
    assert gpt2.main(gpt2.Args(resume=folder)) == result


def test_the_lexicon_of_the_file_gives_the_scores(monkeypatch):
    Path("lexicon").write_text("e 1\nt -1")
    scored = spy(monkeypatch, "score_texts")
    run(reward="plain", lexicon="lexicon")
    assert len(scored) == 6  # of two rollouts, and of four evaluations
    for (_, _, kind, lexicon), _, _ in scored:
        assert kind == "plain" and lexicon == {"e": 1.0, "t": -1.0}


def test_a_finished_run_is_evaluated_again(uninterrupted, capsys):
    result = run(**LONG | {"tensorboard": True})
    folder, _ = checkpoint()
    again = gpt2.main(gpt2.Args(resume=folder))
    assert again == result == uninterrupted[1]


def test_no_checkpoint_before_the_first(capsys):
    killed(lambda: (die_at(torch.optim.AdamW, "step", 2), run(**LONG, tensorboard=True)))
    (folder,) = Path("runs").iterdir()
    stops({"resume": folder}, "--resume", capsys)


def test_resume_takes_no_other_flags(uninterrupted, capsys):
    run(checkpoint_every=1)
    folder, _ = checkpoint()
    stops({"resume": folder, "seed": 2}, "--resume", capsys)
    stops({"resume": folder, "learning_rate": 1e-3}, "--resume", capsys)
    stops({"resume": Path("nowhere")}, "--resume", capsys)


def test_a_missing_reward_model_is_said_to_be_missing_before_pretraining(monkeypatch, capsys):
    monkeypatch.setattr(gpt2, "pretrain_gpt2", None)
    stops({"reward_model": Path("nowhere")}, "--reward-model nowhere", capsys)


def test_resume_refuses_a_checkpoint_of_another_version(tmp_path, capsys):
    torch.save({"args": {"another_flag": 1}}, tmp_path / "checkpoint.pt")
    stops({"resume": tmp_path}, "another version", capsys)


# ---------------------------------------------------------------- Several processes


def test_one_of_two_processes_says_what_is_wrong(commands):
    process, folder = commands["batch of 0"]
    printed, errors = process.communicate()
    assert process.returncode != 0 and printed == "" and list(folder.iterdir()) == []
    assert "error: --batch-size 0 must be at least 1\n" in errors


def test_two_processes_do_what_one_does(commands, capsys):
    """The same batch and the first process's weights, so the same result but for rounding."""
    process, folder = commands["two processes"]
    run(**SHARED | {"save_dir": folder / "one"})
    summaries = [line for line in capsys.readouterr().out.splitlines() if "win rate" in line]
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert printed.count("parameters on cpu") == 1  # only one of them talks
    assert summaries[0] in printed  # with the KL of all samples
    check_same_weights(folder / "one", folder / "two")
    assert sorted(os.listdir(folder)) == ["one", "other.py", "runs", "two"]


def test_processes_that_cannot_share_the_work_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    stops(SMALL, "--num-minibatches", capsys)
    stops(SMALL | {"batch_size": 6, "total_episodes": 6}, "--eval-samples", capsys)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_without_a_world_is_a_run_of_its_own(name, monkeypatch, tmp_path, default_result):
    monkeypatch.setenv(name, "2")
    assert run(save_dir=tmp_path / "saved") == default_result
    assert (tmp_path / "saved" / "model.safetensors").exists()


# ---------------------------------------------------------------- Half precision


def test_bfloat16_keeps_logprobs_values_and_losses_in_float32(monkeypatch):
    """On the processor, where it is no use but runs: rounded, and no less careful than that."""
    monkeypatch.setattr(gpt2, "check_args", lambda args: None)
    rollouts, losses = spy(monkeypatch, "sample_rollout"), spy(monkeypatch, "policy_loss")
    result = run(bf16=True, separate_critic=True, total_episodes=8)
    assert all(map(math.isfinite, result.values()))
    assert result != run(separate_critic=True, total_episodes=8)
    assert all(x.dtype == torch.float32 for _, found, _ in rollouts for x in found[1:4])
    for (logprobs, old, *_), (loss, _), _ in losses:
        assert logprobs.dtype == old.dtype == loss.dtype == torch.float32
    assert losses[0][1][1]["ratio"] == pytest.approx(1, abs=0.02)


# ---------------------------------------------------------------- Wrong values


def stops(flags, named, capsys, status=2):
    """One line, status 2, nothing on standard output."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        gpt2.main(gpt2.Args(**flags))
    out, error = capsys.readouterr()
    assert stop.value.code == status and error.count("\n") == 1, error
    assert error.startswith("error: ") and named in error and out == ""
    return error


INF, NAN = math.inf, math.nan
BAD = {
    "total_episodes": [0, -1, 7],
    "batch_size": [0, 17],
    "update_epochs": [0],
    "num_minibatches": [0, 3],
    "micro_batch_size": [0],
    "checkpoint_every": [0, -1],
    "eval_samples": [0, 1],
    "response_length": [0],
    "kl_horizon": [0],
    "learning_rate": [0.0, -1.0, INF, NAN],
    "max_grad_norm": [0.0, NAN],
    "temperature": [0.0, 1e-7, -1.0, INF, NAN],
    "clip_coef": [0.0, NAN],
    "value_clip": [0.0, NAN],
    "target_kl": [0.0, NAN],
    "kl_target": [0.0, INF],
    "seed": [-1],
    "pretrain_steps": [-1],
    "missing_eos_penalty": [-1.0, NAN],
    "advantage_clip": [0.0, NAN],
    "lexicon": [Path("missing"), Path(".")],
    "reward_model": [Path("missing")],
    "kl_coef": [-0.1, NAN],
    "vf_coef": [-1.0, INF],
    "ent_coef": [-1.0, NAN],
    "top_k": [-1],
    "top_p": [0.0, -0.5, 1.5, NAN],
    "gamma": [-0.1, 1.1, NAN],
    "gae_lambda": [-0.1, 1.1, NAN],
    "device": ["cuda"],
    "bf16": [True],
    "save_dir": [Path("missing/model"), Path(".")],
    "prompts": [Path("missing"), Path(".")],
}


@pytest.mark.parametrize("flag,value", [(f, v) for f, values in BAD.items() for v in values])
def test_bad_values_end_with_one_line_and_nothing_written(flag, value, capsys, tmp_path):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a cuda device")
    named = "total-episodes" if value == 17 else flag.replace("_", "-")
    stops(SMALL | {"tensorboard": True, flag: value}, f"--{named}", capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--reward", "fun"], ["--seed", "x"], ["--lambda", "1"]])
def test_bad_words_are_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(gpt2.Args, args=words)
    assert stop.value.code == 2


def test_an_adaptive_coefficient_cannot_start_at_zero(capsys):
    stops(SMALL | {"kl_coef": 0.0, "kl_target": 1.0}, "--kl-target", capsys)


def test_prompts_of_the_grammar():
    """The tutorial's four are trained on; the held-out ones are drawn from the rest."""
    train, held_out = gpt2.read_prompts(None)
    assert train[: len(gpt2.TUTORIAL_PROMPTS)] == gpt2.TUTORIAL_PROMPTS and len(held_out) == 10
    assert set(train) | set(held_out) == set(gpt2.OPENINGS) | set(gpt2.TUTORIAL_PROMPTS)
    assert not set(train) & set(held_out) and len(set(train)) == len(train)
    assert sorted(held_out) != sorted(set(gpt2.OPENINGS) - set(gpt2.TUTORIAL_PROMPTS))[:10]


def test_prompts_of_a_file_count_once_and_every_fifth_is_held_out(tmp_path):
    file = tmp_path / "prompts"
    file.write_text("a\nb\na\nc\nd\nb\ne\na\nf\n")
    assert gpt2.read_prompts(file) == (["a", "b", "c", "d", "f"], ["e"])
    file.write_text("a\nb\na\n")  # too few to hold one out
    assert gpt2.read_prompts(file) == (["a", "b"], gpt2.read_prompts(None)[1])


def test_prompts_that_are_of_no_use(tmp_path, capsys):
    file = tmp_path / "prompts"
    for content in (b"", b"\n \n\t\n"):
        file.write_bytes(content)
        stops(SMALL | {"prompts": file}, f"--prompts {file}", capsys)
    file.write_bytes(b"\xff\xfe\x00\x81")
    stops(SMALL | {"prompts": file}, f"--prompts {file}", capsys)


def test_prompts_longer_than_the_context(tmp_path, capsys):
    file = tmp_path / "prompts"
    file.write_text("Yes\n" + "I love how " * 12)
    error = stops(SMALL | {"prompts": file}, "I love how", capsys)
    assert "40" in error  # the context of this model
    file.write_text("Yes\n")
    error = stops(SMALL | {"prompts": file, "response_length": 60}, "--response-length", capsys)
    assert os.listdir() == ["prompts"]


def test_a_prompt_that_just_fits_is_used_and_one_token_more_is_not(tmp_path, capsys):
    _, tokenizer = load(TINY)
    prompt = "Yes" + "!" * 32  # with bos 40 - 5 tokens
    assert len(tokenizer.encode(prompt).ids) == 34
    train, held_out = tmp_path / "train", tmp_path / "held_out"
    train.write_text(prompt), held_out.write_text("a\nb\nc\nd\n" + prompt)
    run(prompts=train), run(prompts=held_out)
    train.write_text(prompt + "!"), held_out.write_text("a\nb\nc\nd\n" + prompt + "!")
    stops(SMALL | {"prompts": train}, "--response-length", capsys)
    stops(SMALL | {"prompts": held_out}, "--response-length", capsys)


def test_flags_that_would_not_be_read_or_cannot_be_written(tmp_path, capsys):
    (tmp_path / "words").write_text("good 1")
    flags = {"lexicon": tmp_path / "words", "reward": "composite"}
    stops(SMALL | flags, "--lexicon", capsys)
    stops(SMALL | {"pretrain_steps": 1}, "--pretrain-steps", capsys)
    stops(SMALL | {"kl_horizon": 1}, "--kl-horizon", capsys)
    stops(SMALL | {"save_dir": Path("x" * 201)}, "--save-dir", capsys)


def test_a_model_that_cannot_be_saved_leaves_its_results_and_itself(monkeypatch, capsys):
    """The folder of --save-dir has been filled by somebody else in the meantime."""

    def evaluate(*arguments):
        Path("saved").mkdir(exist_ok=True)
        Path("saved", "theirs").touch()
        return evaluate_texts(*arguments)

    evaluate_texts = gpt2.evaluate_texts
    monkeypatch.setattr(gpt2, "evaluate_texts", evaluate)
    with pytest.raises(SystemExit) as stop:
        run(save_dir="saved")
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and error.count("\n") == 1 and "held-out reward" in out
    (part,) = Path().glob(f"saved.{os.getpid()}.part")
    assert str(part) in error and os.listdir("saved") == ["theirs"]
    assert load(part)[0].config.n_embd == 32


def test_texts_on_an_output_that_has_only_ascii(monkeypatch):
    """It lacks tokens of a random model; they become question marks."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    words = "--pretrain-steps 1 --total-episodes 4 --batch-size 4 --eval-samples 4 --no-tensorboard"
    programs.run_as_program(SCRIPT, words, printed, monkeypatch)
    assert b"?" in printed.buffer.getvalue()


def test_the_model_is_saved_before_texts_are_printed(monkeypatch, tmp_path):
    """A full disk, say, under the file that the output goes to."""

    def full(text):
        if "held-out reward" in text:
            raise OSError("No space left")

    monkeypatch.setattr("builtins.print", full)
    with pytest.raises(OSError, match="No space left"):
        run(save_dir="saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_runs_of_one_second_have_folders_of_their_own():
    for _ in range(3):
        run(checkpoint_every=1, total_episodes=8)
    folders = list(Path("runs").iterdir())
    assert len(folders) == 3
    for folder in folders:
        assert os.listdir(folder) == ["checkpoint.pt"]


def test_paths_can_be_strings(tmp_path):
    (tmp_path / "prompts").write_text("Yes\nI love how")
    run(prompts="prompts", save_dir="out")
    assert (tmp_path / "out").is_dir()


# ---------------------------------------------------------------- A learned reward


def test_a_reward_model_is_no_policy(capsys):
    stops(SMALL | {"model": str(TINY.parent / "gpt2-tiny-rm")}, "--reward-model", capsys)


def test_a_learned_reward_is_maximised_and_the_true_one_logged(monkeypatch):
    """Scores come from the reward model of tests/data, true_score from the words."""
    curves = programs.record_curves(monkeypatch, gpt2)
    monkeypatch.setattr(gpt2.SummaryWriter, "__init__", lambda self, folder, purge_step: None)
    scores = []
    forward = gpt2.TextRewardModel.forward

    def noted(self, prompts, responses):
        scores.append((forward(self, prompts, responses), variety(prompts, responses)))
        return scores[-1][0]

    monkeypatch.setattr(gpt2.TextRewardModel, "forward", noted)
    rewards = spy(monkeypatch, "token_rewards")
    flags = {"total_episodes": 32 * 20, "batch_size": 32, "eval_samples": 32, "kl_coef": 0.02}
    result = run(reward_model=TINY.parent / "gpt2-tiny-rm", tensorboard=True, **flags)
    in_training = scores[2:-2]  # between the evaluations
    for learned, (given, *_), i in zip(
        [learned for learned, _ in in_training], [r[0] for r in rewards], range(20), strict=True
    ):
        assert torch.equal(given, learned)
        assert curves["charts/score"][i][1] == pytest.approx(learned.mean().item(), abs=1e-5)
        true = torch.tensor(in_training[i][1]).mean().item()
        assert curves["charts/true_score"][i][1] == pytest.approx(true, abs=1e-5)
    assert result["learned_reward"] > result["learned_reward_before"] + 0.3
    assert result["reward"] == pytest.approx(sum(scores[-2][1]) / 32, abs=1e-5)
    for name in ["reward", "held_out_kl"]:  # before and after training
        before, after = result[f"{name}_before"], result[name]
        assert curves[f"eval/{name}"] == [(0, pytest.approx(before)), (640, pytest.approx(after))]
    assert [step for step, _ in curves["eval/win_rate"]] == [640]


def test_a_run_that_writes_nothing_needs_no_writable_folder(monkeypatch):
    monkeypatch.setattr(gpt2, "is_writable", lambda folder: False)
    gpt2.check_args(gpt2.Args(**SMALL))


def test_a_file_named_runs_is_in_the_way(tmp_path, capsys):
    (tmp_path / "runs").write_text("")
    stops(SMALL | {"tensorboard": True}, "--no-tensorboard", capsys)
    stops(SMALL | {"checkpoint_every": 1}, "--checkpoint-every", capsys)


def test_a_model_folder_that_is_there_already(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    stops(SMALL | {"save_dir": tmp_path / "mine"}, "--save-dir", capsys)
    (tmp_path / "file").write_text("mine")
    stops(SMALL | {"save_dir": tmp_path / "file"}, "--save-dir", capsys)
    stops(SMALL | {"save_dir": tmp_path / "file" / "model"}, "--save-dir", capsys)
    assert sorted(os.listdir()) == ["file", "mine"]


def test_a_reward_that_is_not_finite_is_said(monkeypatch, capsys):
    def endless(prompts, responses, kind, lexicon):
        return [math.inf] * len(responses)

    monkeypatch.setattr(gpt2, "score_texts", endless)
    stops(SMALL, "reward", capsys)


def test_gradients_that_are_not_finite_stop_the_run(monkeypatch, capsys):
    monkeypatch.setattr(gpt2, "policy_loss", lambda logprobs, *a: (logprobs.sum() * math.nan, {}))
    with pytest.raises(SystemExit) as stop:
        run(target_kl=None)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "rollout 1" in error and "--learning-rate" in error


def test_a_tiny_target_ends_a_rollout_after_its_first_pass(monkeypatch):
    steps = spy(monkeypatch, "clip_grad_norm_", torch.nn.utils)
    run(target_kl=1e-30)
    assert len(steps) == 4  # one pass per rollout, of two steps
    steps.clear()
    run(target_kl=1e5)
    assert len(steps) == 8


# ---------------------------------------------------------------- What a run does and leaves


def test_reference_is_frozen_and_nothing_is_left_behind(monkeypatch, tmp_path):
    programs.check_reference_is_frozen(monkeypatch, run)
    assert list(tmp_path.iterdir()) == []


def test_training_prompts_are_what_is_trained_on(monkeypatch):
    calls = spy(monkeypatch, "sample_rollout")
    evaluations = spy(monkeypatch, "evaluate_texts")
    run(batch_size=64, total_episodes=128, eval_samples=20)
    _, tokenizer = load(TINY)
    train, held_out = gpt2.read_prompts(None)
    seen = set()
    for (_, _, _, prompts, *_), *_ in calls:
        for row in prompts:
            seen.add(tokenizer.decode(real_tokens(row)))
    assert seen <= set(train) and len(seen) > 15
    shown = [set(found[1]) for _, found, _ in evaluations]
    assert shown == [set(train[:20]), set(held_out)] * 2


def test_the_first_step_is_as_long_as_the_learning_rate(monkeypatch):
    """Adam's first step is the learning rate for each weight, and ten times that in the head."""
    seen = spy(
        monkeypatch,
        "clip_grad_norm_",
        torch.nn.utils,
        lambda parameters, *a: [p.detach().clone() for p in parameters],
    )
    for separate in (False, True):
        seen.clear()
        run(num_minibatches=1, total_episodes=8, separate_critic=separate)
        (_, _, start), (_, _, end) = seen
        *trunks, weight, bias = [
            (b - a).abs().max().item() for a, b in zip(start, end, strict=True)
        ]
        assert max(trunks) == pytest.approx(3e-3, rel=1e-3)
        assert [weight, bias] == pytest.approx([3e-2] * 2, rel=1e-3)


def test_evaluations_before_and_after_use_the_same_noise(monkeypatch, default_result):
    """With a learning rate that changes nothing the texts are the same: half of all is won."""
    result = run(learning_rate=1e-12)
    for name in ("reward", "held_out_reward", "distinct_2", "length"):
        assert result[name] == pytest.approx(result[f"{name}_before"], abs=1e-5)
    assert result["win_rate"] == result["held_out_win_rate"] == 0.5
    assert default_result["reward"] != default_result["reward_before"]


def logged(tag):
    """The last text of this tag that the one run in runs/ gave to TensorBoard."""
    events = EventAccumulator(str(next(Path("runs").iterdir()))).Reload()
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_results_are_what_the_texts_say(monkeypatch, capsys):
    calls = spy(monkeypatch, "evaluate_texts")
    samples = spy(monkeypatch, "generate_responses")
    kls = spy(monkeypatch, "token_kl")
    end_sooner(monkeypatch)
    result = run(eval_samples=12, response_length=8, tensorboard=True, micro_batch_size=12)
    assert len(kls) == 4
    samples = [samples[0], samples[1], *samples[-2:]]
    for (_, (metrics, *_), _), (_, (responses, _), _), (_, kl, _) in zip(
        calls, samples, kls, strict=True
    ):
        lengths = [min([*y, EOS].index(EOS) + 1, 8) for y in responses.tolist()]
        assert len(set(lengths)) > 1
        found = [sum(row[:n]) for row, n in zip(kl.tolist(), lengths, strict=True)]
        mean = sum(found) / 12
        error = math.sqrt(sum((x - mean) ** 2 for x in found) / 11 / 12)
        assert metrics["kl"] == pytest.approx(mean, abs=1e-4)
        assert metrics["kl_error"] == pytest.approx(error, abs=1e-4)
        assert metrics["length"] == pytest.approx(sum(lengths) / 12)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "paired win rate" in line]
    assert re.search(r"\d s$", lines[1]) and out.splitlines()[-1] == lines[1]
    for line, group, prefix in zip(lines, ("training", "held-out"), ("", "held_out_"), strict=True):
        r = {key: result[prefix + key] for key in result if prefix + key in result}
        said = f"{group} reward {r['reward_before']:.2f} -> "
        assert line.startswith(said + f"{r['reward']:.2f} ± {r['reward_error']:.2f}  ")
        assert f"paired win rate {r['win_rate']:.2f}" in line
        assert f"KL {r['kl']:.2f} ± {r['kl_error']:.2f}" in line
        assert f"distinct-2 {r['distinct_2_before']:.3f} -> {r['distinct_2']:.3f}" in line
    assert len(calls) == 4
    for prefix in ("", "held_out_"):
        pair = calls[1::2] if prefix else calls[0::2]
        scores = []
        for suffix, (_, (_, heads, texts, rewards), _) in zip(("_before", ""), pair, strict=True):
            rewards = rewards.tolist()
            assert rewards == pytest.approx(variety(heads, texts), abs=1e-5)
            mean = sum(rewards) / 12
            error = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 11 / 12)
            assert result[f"{prefix}reward{suffix}"] == pytest.approx(mean, abs=1e-5)
            assert result[f"{prefix}reward_error{suffix}"] == pytest.approx(error, abs=1e-5)
            assert result[f"{prefix}distinct_2{suffix}"] == gpt2.distinct_2(texts)
            scores.append(rewards)
        wins = sum(1 if b > a else 0.5 if a == b else 0 for a, b in zip(*scores, strict=True))
        assert result[f"{prefix}win_rate"] == pytest.approx(wins / 12)
        heads, olds, news = pair[0][1][1], pair[0][1][2], pair[1][1][2]
        shown = [
            f"{head} ...\n  before:{old!r}\n  after: {new!r}"
            for head, old, new in zip(heads, olds, news, strict=True)
        ]
        assert "\n\n" + "\n".join(shown[:5]) + "\n\n" in out and shown[5] not in out
        assert logged(f"eval/{prefix}texts") == "\n\n".join(shown)


def test_charts_and_losses_are_means_over_the_rollout(monkeypatch, tmp_path):
    """All that TensorBoard is told of three rollouts, from their tokens, texts and updates."""
    names = "sample_rollout decode_texts compute_gae policy_loss value_loss".split()
    calls = {name: spy(monkeypatch, name) for name in names}
    norms = spy(monkeypatch, "clip_grad_norm_", torch.nn.utils)
    end_sooner(monkeypatch)
    flags = {"total_episodes": 24, "kl_target": 4.0, "kl_horizon": 40, "micro_batch_size": 2}
    run(tensorboard=True, missing_eos_penalty=0.5, **flags)
    rollouts = [found for _, found, _ in calls["sample_rollout"]]
    texts = [found for _, found, _ in calls["decode_texts"]][2:5]  # between the evaluations
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir()))).Reload()

    def points(tag):
        assert [event.step for event in events.Scalars(tag)] == [8, 16, 24]
        return [event.value for event in events.Scalars(tag)]

    coef, expected = 0.1, {}
    for i, (y, old, ref, *_) in enumerate(rollouts):
        lengths = [min([*row, EOS].index(EOS) + 1, 5) for row in y.tolist()]
        gaps = zip((old - ref).tolist(), lengths, strict=True)
        kl = sum(sum(row[:n]) for row, n in gaps) / 8
        scores = torch.tensor(variety(*texts[i]))
        given, (_, returns), _ = calls["compute_gae"][i]
        real = [(a, n) for a, n in enumerate(lengths)]
        wanted, guessed = (
            torch.cat([x[a, :n] for a, n in real]).detach() for x in (returns, given[1])
        )
        unexplained = (wanted - guessed).var() / wanted.var()  # over N or N - 1
        parts = slice(8 * i, 8 * i + 8)  # 2 epochs of 2 minibatches, each in 2 parts
        policy = [(loss, metrics) for _, (loss, metrics), _ in calls["policy_loss"][parts]]
        tokens = [given[3].sum().item() for given, _, _ in calls["policy_loss"][parts]]

        def token_mean(name, step, policy=policy, tokens=tokens):
            """Over the tokens of a minibatch, that is of two parts."""
            total = sum(policy[part][1][name] * tokens[part] for part in (2 * step, 2 * step + 1))
            return total / (tokens[2 * step] + tokens[2 * step + 1])

        row = {
            "charts/kl": kl,
            "charts/kl_coef": coef,
            "charts/score": scores.mean(),
            "charts/true_score": scores.mean(),
            "charts/response_length": sum(lengths) / 8,
            "charts/eos_rate": sum(EOS in row for row in y.tolist()) / 8,
            "charts/distinct_2": gpt2.distinct_2(texts[i][1]),
            "losses/explained_variance": 1 - unexplained,
            "losses/policy_loss": sum(loss for loss, _ in policy) / 8,
            "losses/value_loss": sum(loss for _, loss, _ in calls["value_loss"][parts]) / 8,
            "losses/approx_kl": sum(token_mean("approx_kl", step) for step in range(4)) / 4,
            "losses/clipfrac": sum(token_mean("clipfrac", step) for step in range(4)) / 4,
            "losses/ratio": sum(token_mean("ratio", step) for step in range(4)) / 4,
            "losses/ratio_first": token_mean("ratio", 0),
            "losses/grad_norm": sum(found for _, found, _ in norms[4 * i : 4 * i + 4]) / 4,
        }
        for tag, value in row.items():
            expected.setdefault(tag, []).append(torch.as_tensor(value).item())
        coef *= 1 + min(max(kl / 4.0 - 1, -0.2), 0.2) * 8 / 40
    for tag, values in expected.items():
        assert points(tag) == pytest.approx(values, rel=1e-4, abs=1e-6), tag
    assert min(points("charts/episodes_per_second")) > 0 and min(points("losses/entropy")) > 0
    assert abs(expected["charts/kl"][1] / 4.0 - 1) < 0.2  # so that the coefficient follows the KL


def test_the_learning_rate_fits_the_model(monkeypatch):
    """If it is not given, it depends on the width of a loaded model."""
    rates = programs.record_curves(monkeypatch, gpt2)
    monkeypatch.setattr(gpt2.SummaryWriter, "__init__", lambda self, folder, purge_step: None)
    run(tensorboard=True, learning_rate=None, total_episodes=8)
    (rate,) = programs.values(rates["charts/learning_rate"])
    assert rate == pytest.approx(3.2e-4 / CONFIG["n_embd"] ** 0.5)
    rates.clear()
    written = spy(monkeypatch, "write_sentences")
    pretrained = spy(monkeypatch, "pretrain_gpt2")
    run(tensorboard=True, learning_rate=None, total_episodes=8, model="embedded", pretrain_steps=2)
    assert pretrained[0][0][3] == 2
    assert programs.values(rates["charts/learning_rate"]) == [3e-4]
    assert written[0][0] == (8_000, 1)  # number and seed of the sentences that it has read


def test_the_learning_rate_rises_then_falls(monkeypatch, capsys):
    """And what is said of the pace, by a clock that ticks when it is read: a second a rollout."""
    programs.tick(monkeypatch, gpt2)
    steps = spy(
        monkeypatch,
        "step",
        torch.optim.AdamW,
        lambda optimizer: [(group["lr"], group["betas"]) for group in optimizer.param_groups],
    )
    curves = programs.record_curves(monkeypatch, gpt2)
    flags = {"batch_size": 2, "total_episodes": 80, "num_minibatches": 1, "update_epochs": 1}
    run(tensorboard=True, eval_samples=2, response_length=2, **flags)
    expected = [3e-3 * rollout / 4 for rollout in range(1, 5)]
    expected += [3e-3 * (41 - rollout) / 37 for rollout in range(5, 41)]
    assert programs.values(curves["charts/learning_rate"]) == pytest.approx(expected)
    for rate, (_, _, groups) in zip(expected, steps, strict=True):
        assert groups == [
            (pytest.approx(rate), (0.9, 0.99)),
            (pytest.approx(10 * rate), (0.9, 0.99)),
        ]
    form = r"^episode +(\d+)  score (\S+)  KL \S+  2.0 episodes/s  (\d+) s left$"
    said = re.findall(form, capsys.readouterr().out, re.M)
    scores = programs.values(curves["charts/score"])
    for n, (episode, score, seconds_left) in enumerate(said, start=1):
        assert (int(episode), int(seconds_left)) == (4 * n, 40 - 2 * n)
        assert float(score) == pytest.approx(sum(scores[2 * n - 2 : 2 * n]) / 2, abs=6e-4)
    assert len(said) == 20


def test_program_in_a_shell(program, monkeypatch):
    """The real command with the embedded model: its output, events, checkpoint and saved model."""
    folder, printed = program()
    monkeypatch.chdir(folder)
    lines = printed.splitlines()
    assert re.fullmatch(r"gpt2_sentiment__1__[\d-]+: [\d,]+ parameters on cpu", lines[0])
    assert "\nepisode     12  score " in printed
    assert {p.name for p in folder.iterdir()} == {"runs", "out"}
    policy, tokenizer = load("out")
    assert tokenizer.id_to_token(policy.config.eos_token_id) == "<|endoftext|>"
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("gpt2_sentiment__1__")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["rollout"] == 3 and same(state["policy"], dict(policy.state_dict()))

    events = EventAccumulator(str(folder))
    events.Reload()
    charts = (
        "score true_score kl kl_coef response_length eos_rate learning_rate episodes_per_second"
    )
    losses = (
        "policy_loss value_loss entropy approx_kl clipfrac explained_variance grad_norm ratio_first"
    )
    tags = events.Tags()
    wanted = {f"charts/{t}" for t in charts.split()} | {f"losses/{t}" for t in losses.split()}
    wanted |= {f"eval/{name}" for name in ("reward", "held_out_reward", "kl", "win_rate")}
    assert wanted <= set(tags["scalars"])
    texts = [tag for tag in tags["tensors"] if "hyperparameters" not in tag]
    assert texts and len(texts) < len(tags["tensors"])
    programs.check_hyperparameters(folder, gpt2.Args(), model="embedded", seed="1")
    for event in events.Scalars("losses/ratio_first"):
        assert abs(event.value - 1) < 1e-5  # before the first step the policy is the old one
    assert abs(events.Scalars("charts/kl")[0].value) < 1e-5
    assert events.Scalars("charts/kl_coef")[1].value != events.Scalars("charts/kl_coef")[0].value


def test_an_unknown_model_in_a_shell(commands):
    process, folder = commands["unknown model"]
    printed, errors = process.communicate()
    assert process.returncode == 2 and printed == "" and "Traceback" not in errors
    assert errors.count("\n") == 1 and "--model embedded" in errors
    assert {p.name for p in folder.iterdir()} <= {"home"}
