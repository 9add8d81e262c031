"""The edits of "Use your own model" and docs/own_model.md give programs that learn."""

import contextlib
import functools
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path

import programs
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
RULE = "# " + "-" * 76 + " "  # begins the heading of a section


def chapter(path, title):
    """The part of a page under a heading."""
    return (ROOT / path).read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def replace_section(source, section):
    """The source with the section that has the same heading replaced."""
    heading, _, _ = section.partition("\n")
    lines = source.splitlines()
    assert lines.count(heading) == 1, heading
    before, after = source.split(f"{heading}\n")
    return f"{before}{section.strip()}\n\n\n{after[after.index(RULE) :]}"


def apply_hunks(source, diff):
    """The source with each hunk's - lines, which must occur just once, replaced by its + lines."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in "-+" for line in lines), hunk
        old = "".join(line[1:] for line in lines if line[0] == "-")
        new = "".join(line[1:] for line in lines if line[0] == "+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def adapt(source, text):
    """The source after all edits that a text makes: sections of Python, and hunks of a diff."""
    for language, block in re.findall(r"```(python|diff)\n(.*?)```", text, re.DOTALL):
        source = (
            apply_hunks(source, block) if language == "diff" else replace_section(source, block)
        )
    return source


def load(name, source):
    """The script with this source as a module, imported from the working folder."""
    Path(f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses looks there
    spec.loader.exec_module(module)
    return module


README = chapter("README.md", "Use your own model")
MEMORY = chapter("docs/own_model.md", "Less memory, and texts in TensorBoard")


# ---------------------------------------------------------------------------- Tiny real models
MODELS = tempfile.TemporaryDirectory()
KINDS = ["llama", "gpt2"]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)


@functools.cache
def tiny_model(kind):
    """A folder with a random Llama or GPT-2 of transformers and a byte-level BPE tokenizer."""
    import transformers  # no requirement of the scripts
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["name a colour", "say something long and blue or red"], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    torch.manual_seed(1)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.1,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.1,
        )
        model = transformers.GPT2LMHeadModel(config)
    folder = Path(MODELS.name) / kind
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def working_folder(kind):
    """Work in a folder with a model, questions and pairs; the edits name the model tiny."""
    examples = []
    pairs = []
    for i in range(20):
        question = f"say {'something long and ' * (i % 3)}blue or red {i}"
        examples.append({"question": question, "answer": "e"})
        pairs.append({"prompt": question, "chosen": "a blue one", "rejected": "red" * (i % 2 + 1)})
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        Path("tiny").symlink_to(tiny_model(kind))
        Path("examples.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in examples))
        Path("pairs.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in pairs))
        yield monkeypatch


@pytest.fixture(params=[pytest.param(kind, marks=needs_transformers) for kind in KINDS])
def folder(request):
    with working_folder(request.param):
        yield


def load_tiny(name, source):
    """load() with the tiny model and short responses."""
    source = re.sub(r'MODEL = ".*?"', 'MODEL = "tiny"', source)
    return load(name, source.replace("RESPONSE_LENGTH = 24", "RESPONSE_LENGTH = 6"))


def make_grpo(more=MEMORY):
    """grpo.py with the README's edits and more."""
    return load_tiny("my_grpo", adapt((ROOT / "grpo.py").read_text(), README + more))


def make_other(script, chapter_title, wanted):
    """A script with the README's wanted edits and those of its chapter in docs/own_model.md."""
    source = (ROOT / script).read_text()
    for block in re.findall(r"```(?:python|diff)\n.*?```", README + MEMORY, re.DOTALL):
        if any(heading in block for heading in wanted):
            source = adapt(source, block)
    source = adapt(source, chapter("docs/own_model.md", chapter_title))
    return load_tiny(f"my_{script.removesuffix('.py')}", source)


def make_ppo():
    return make_other("ppo.py", "ppo.py", ["- Task\n", "- Model\n", "@@ generate", "@@ gradient"])


def make_reinforce():
    return make_other("reinforce.py", "reinforce.py", ["- Task\n", "- Model\n", "@@ generate"])


def make_reward_model():
    wanted = ["- Task\n", "- Model\n"]
    return make_other("reward_model.py", "reward_model.py", wanted)


def make_dpo():
    return make_other("dpo.py", "dpo.py, on pairs of texts", ["- Model\n", "@@ generate"])


PPO_FLAGS = {
    "tensorboard": False,
    "sft_steps": 0,
    "learning_rate": 3e-3,
    "batch_size": 32,
    "num_minibatches": 4,
    "update_epochs": 1,
    "total_episodes": 32 * 45,
    "kl_coef": 0.01,
}
GRPO_FLAGS = PPO_FLAGS | {"group_size": 8}


def alone(model, prompt, response, pad):
    """Log-probabilities of a response's tokens by the bare model, without padding."""
    prompt = prompt[prompt != pad]
    tokens = torch.cat([prompt, response])[None]
    logprobs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(1)
    return logprobs.gather(1, response[:, None]).squeeze(1)


def learns(function):
    """For a test on two kinds of model: a second process calls the function with each."""
    kinds = [
        pytest.param(kind, marks=[needs_transformers, programs.beside(function, kind)])
        for kind in KINDS
    ]
    return pytest.mark.parametrize("kind", kinds)


def run_grpo(kind):
    with working_folder(kind) as monkeypatch:
        script = make_grpo()
        curves = programs.record_curves(monkeypatch, script)
        losses = programs.spy(monkeypatch, script, "grpo_loss")
        result = script.main(script.Args(**GRPO_FLAGS | {"tensorboard": True}))
    return result, programs.values(curves["charts/score"]), losses[0][1][1]["ratio"].item()


@learns(run_grpo)
def test_grpo_learns_on_a_hugging_face_model(kind, found):
    result, scores, first_ratio = found
    assert first_ratio == pytest.approx(1, abs=1e-5)
    assert sum(scores[:3]) / 3 < 0.7
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.2
    assert result["success"] > result["success_before"] + 0.2


def test_padding_changes_nothing_in_grpo(folder):
    """Log-probabilities and loss of a batch are those of each prompt alone in the bare model."""
    script = make_grpo()
    torch.manual_seed(2)
    policy = script.GPT()
    prompts, *_ = script.make_prompts("cpu")
    lengths = (prompts != script.PAD).sum(1)
    assert lengths.min() < lengths.max()
    responses = script.generate(policy, prompts, 1.0)
    mask = script.response_mask(responses)
    states = script.response_states(policy, prompts, responses)
    logprobs = script.token_logprobs(policy.head(states), responses)
    rows = zip(prompts, responses, strict=True)
    expected = torch.stack([alone(policy.model, x, y, script.PAD) for x, y in rows])
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)

    advantages = torch.randn(len(prompts))
    weights = script.compute_loss_weights(mask, "grpo")
    old = expected.detach() - 0.1
    settings = (advantages, mask, weights, "grpo", 0.2, 0.2)
    loss, _ = script.grpo_loss(logprobs, old, *settings)
    expected_loss, _ = script.grpo_loss(expected, old, *settings)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)


def test_cached_generation_draws_from_the_same_distribution(folder):
    """At a temperature near 0, what the cache writes is the likeliest token at every position."""
    script = make_grpo()
    policy = script.GPT()
    prompts, *_ = script.make_prompts("cpu")
    responses = script.generate(policy, prompts, 1e-4)
    logits = policy.head(script.response_states(policy, prompts, responses))
    mask = script.response_mask(responses)
    assert responses.shape == (len(prompts), script.RESPONSE_LENGTH)
    assert torch.equal(logits.argmax(2)[mask], responses[mask])
    assert (responses[~mask] == script.EOS).all()


def test_generation_cuts_no_token_off_and_pads_with_eos(folder, monkeypatch):
    script = make_grpo()
    policy = script.GPT()
    prompts, *_ = script.make_prompts("cpu")
    prompts = prompts.repeat(4, 1)
    responses = script.generate(policy, prompts, 1.0)
    logits = policy.head(script.response_states(policy, prompts, responses))
    chosen = logits.gather(2, responses[:, :, None])
    ranks = (logits > chosen).sum(2)
    assert ranks[script.response_mask(responses)].max() > 50  # top-k would leave these out

    def all_end_at_once(tokens, **_):
        return F.pad(tokens, (0, 1), value=script.EOS)

    monkeypatch.setattr(policy.model, "generate", all_end_at_once)
    responses = script.generate(policy, prompts, 1.0)
    assert responses.tolist() == [[script.EOS] * script.RESPONSE_LENGTH] * len(prompts)


def test_each_response_is_compared_with_the_answer_to_its_prompt(folder):
    examples = [{"question": f"{i}?", "answer": str(i)} for i in range(10)]
    Path("examples.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in examples))
    script = make_grpo()
    prompts, targets, test_prompts, test_targets = script.make_prompts("cpu")
    for questions, rows in [(prompts, targets), (test_prompts, test_targets)]:
        digits = [question[question != script.PAD][:1] for question in questions]  # i of "i?"
        responses = torch.stack(digits)
        assert script.get_scores(rows, responses).tolist() == [1] * len(rows)
        assert script.get_scores(rows, responses.roll(1, 0)).tolist() == [0] * len(rows)
    assert (len(prompts), len(test_prompts)) == (8, 2)


def test_accumulated_gradients_are_those_of_the_whole_batch(folder):
    """4 minibatches per step give the weights that one minibatch of 4 times the size gives."""
    flags = GRPO_FLAGS | {"total_episodes": 64}
    saved = []
    for more, minibatches in [(MEMORY, 4), ("", 1)]:
        script = make_grpo(more)
        path = Path(f"{minibatches}.pt")
        script.main(script.Args(**flags | {"num_minibatches": minibatches, "save_path": path}))
        saved.append(torch.load(path, weights_only=True))
    for name, weight in saved[0]["policy"].items():
        torch.testing.assert_close(weight, saved[1]["policy"][name], atol=2e-4, rtol=0)
        moved = (weight - saved[0]["reference"][name]).abs().max()
        assert moved > 1e-3 or "bias" in name


def test_the_check_of_the_logits_sees_a_wrong_model(folder, monkeypatch):
    script = make_grpo()
    (check,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    exec(check, vars(script))
    forward = script.GPT.forward
    for wrong in (
        lambda self, x: forward(self, x.clamp(min=0)),
        lambda self, x: 2 * forward(self, x),
    ):
        monkeypatch.setattr(script.GPT, "forward", wrong)
        with pytest.raises(AssertionError):
            exec(check, vars(script))


def learning_rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def run_ppo(kind):
    with working_folder(kind) as monkeypatch:
        script = make_ppo()
        steps = programs.spy(monkeypatch, torch.optim.AdamW, "step", before=learning_rates)
        result = script.main(script.Args(**PPO_FLAGS | {"gae_lambda": 1.0}))
    return result, [noted for _, _, noted in steps]


@learns(run_ppo)
def test_ppo_learns_on_a_hugging_face_model(kind, found):
    result, rates = found
    assert len(rates) == 45 and all(critic == 1e-3 for _, critic in rates)
    assert max(policy for policy, _ in rates) == 3e-3
    assert result["success"] > result["success_before"] + 0.2


def run_reinforce(kind):
    names = ("tensorboard", "sft_steps", "learning_rate", "batch_size", "total_episodes", "kl_coef")
    with working_folder(kind):
        script = make_reinforce()
        return script.main(script.Args(**{name: PPO_FLAGS[name] for name in names}))


@learns(run_reinforce)
def test_reinforce_learns_on_a_hugging_face_model(kind, found):
    assert found["success"] > found["success_before"] + 0.2


def run_with_reward_model(kind):
    path = Path("rm.pt")
    with working_folder(kind) as monkeypatch:
        learner = make_reward_model()
        learner.main(
            learner.Args(
                tensorboard=False,
                sft_steps=0,
                num_examples=1024,
                minibatch_size=32,
                annotator_temperature=0.1,
                learning_rate=1e-2,
                weight_decay=0.1,
                save_path=path,
            )
        )
        script = make_ppo()
        curves = programs.record_curves(monkeypatch, script)
        flags = {"tensorboard": True, "reward_model": path}
        script.main(script.Args(**PPO_FLAGS | flags))
    return programs.values(curves["charts/true_score"])


@needs_transformers
@programs.beside(run_with_reward_model, "llama")
def test_a_reward_model_is_learned_and_maximised_on_a_hugging_face_model(found):
    assert sum(found[-5:]) / 5 > sum(found[:5]) / 5 + 0.4


def test_an_ensemble_of_hugging_face_models_gives_the_lower_bound_of_its_scores(folder):
    path = Path("rm.pt")
    flags = {"tensorboard": False, "sft_steps": 0, "num_examples": 32, "ensemble_size": 2}
    learner = make_reward_model()
    learner.main(learner.Args(uncertainty_coef=0.5, save_path=path, **flags))
    script = make_ppo()
    reward_model = script.load_reward_model(path, "cpu")
    assert len(reward_model.members) == 2
    _, _, prompts, _ = script.make_prompts("cpu")
    responses = script.generate(script.GPT(), prompts, 1.0)
    bounds = reward_model(prompts, responses)
    means = reward_model.member_scores(prompts, responses).mean(0)
    assert bounds.shape == (len(prompts),) and (bounds < means).all()


def test_dpo_learns_from_pairs_of_texts(folder):
    script = make_dpo()
    result = script.main(
        script.Args(
            tensorboard=False,
            sft_steps=0,
            learning_rate=1e-2,
            minibatch_size=8,
            epochs=5,
            preferences=Path("pairs.jsonl"),
        )
    )
    assert result["success_before"] == 0.5
    assert result["success"] == 1.0


def test_padding_changes_nothing_in_dpo(folder):
    script = make_dpo()
    policy = script.GPT()
    _, _, prompts, targets = script.make_prompts("cpu")
    lengths = (prompts != script.PAD).sum(1)
    assert lengths.min() < lengths.max() < script.PROMPT_LENGTH
    chosen, rejected = targets.unbind(1)
    found = script.pair_logprobs(policy, prompts, chosen, rejected, False)
    for responses, logprobs in zip([chosen, rejected], found, strict=True):
        mask = script.response_mask(responses)
        rows = zip(prompts, responses, mask, strict=True)
        expected = [alone(policy.model, x, y, script.PAD)[real].sum() for x, y, real in rows]
        torch.testing.assert_close(logprobs, torch.stack(expected), atol=1e-5, rtol=1e-6)
        assert mask.sum(1).min() < mask.sum(1).max() or responses is chosen


def test_main_knows_nothing_of_the_toy():
    """What another task replaces is not named in the other sections."""
    for script in ("reinforce.py", "ppo.py", "grpo.py"):
        source = (ROOT / script).read_text()
        main = source[source.index("\ndef main(") :]
        for name in ("EOS", "VOCAB", "TARGET", "RESPONSE_LENGTH"):
            assert not re.search(rf"\b{name}\b", main), f"{name} in main of {script}"
        calls = re.findall(r"\bpolicy\((?!tokens)", main)
        assert calls == [], script  # only generate and response_states call the policy


def flag_tables():
    """The scripts and the flags that each table of our and other libraries' names puts first."""
    path = ROOT / "docs" / "libraries.md"
    if not path.exists():
        return
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
        first = [row.split("|")[1] for row in table.splitlines()]
        yield re.findall(r"`(\w+\.py)`", first[0]), re.findall(r"`--([a-z-]+)", "".join(first))


@pytest.mark.parametrize("scripts, flags", [*flag_tables()], ids=lambda value: value[0])
def test_every_flag_that_is_mapped_to_other_libraries_exists(scripts, flags):
    assert scripts
    assert flags
    source = "".join((ROOT / script).read_text() for script in scripts)
    for flag in flags:
        assert re.search(rf"^    {flag.replace('-', '_')}: ", source, re.MULTILINE), flag
