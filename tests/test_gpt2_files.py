"""gpt2_sentiment.py: models from directories and from the hub, saved ones, checkpoints, errors."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import gpt2_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file

import gpt2_sentiment as gpt2

TINY = Path(__file__).parent / "data" / "gpt2-tiny"
EXPECTED = load_file(TINY.parent / "gpt2-tiny-expected.safetensors")
ROW = EXPECTED["tokens"][:1]


def load(name):
    """Policy and tokenizer of a directory or of a name on the hub."""
    policy, tokenizer, _ = gpt2.load_gpt2(gpt2.find_folder(name))
    return policy, tokenizer


def right(loaded):
    """Are policy and tokenizer those of gpt2-tiny, with its very logits?"""
    policy, tokenizer = loaded
    padded = ROW.masked_fill(~EXPECTED["mask"].bool()[:1], gpt2.PAD)
    with torch.no_grad():
        logits = policy.head(policy(padded))[0]
    real = EXPECTED["mask"].bool()[0]
    torch.testing.assert_close(logits[real], EXPECTED["logits"][0][real], atol=1e-5, rtol=0)
    ids = tokenizer.encode("the café was not  good\nat all", add_special_tokens=False).ids
    assert ids == EXPECTED["tokens"][3][EXPECTED["mask"].bool()[3]].tolist()
    assert tokenizer.encode("Yes<|endoftext|>").ids[-1] == 299
    return all(p.dtype == torch.float32 for p in policy.parameters())


@pytest.fixture
def model(tmp_path):
    """A copy of gpt2-tiny to spoil."""
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def change_config(model, **changes):
    path = model / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))


def change_weights(model, function):
    path = model / "model.safetensors"
    weights = load_file(path)
    save_file(function(weights) or weights, path)


def refused(name, capfd, *said):
    """Loading ends with status 2 and one line that names the model and says why."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        load(str(name))
    out, error = capfd.readouterr()
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and out == "" and error.endswith(line + "\n")
    assert line.startswith("error: --model ") and Path(name).name in line
    for words in said:
        assert words in line, line
    return error


# ---------------------------------------------------------------- Directories


def test_a_directory(capfd):
    assert right(load(str(TINY)))
    config = load(str(TINY))[0].config
    assert (config.n_layer, config.n_head, config.layer_norm_epsilon) == (2, 4, 1e-3)
    assert (config.bos_token_id, config.eos_token_id, config.n_positions) == (299, 299, 40)
    assert capfd.readouterr() == ("", "")


def test_vocab_and_merges_in_place_of_the_tokenizer_file(model):
    (model / "tokenizer.json").unlink()
    assert right(load(str(model)))


def test_a_pickled_file(model):
    (model / "model.safetensors").unlink()
    torch.save(load_file(TINY / "model.safetensors"), model / "pytorch_model.bin")
    assert right(load(str(model)))


class Harm:
    """What a pickle may hold: a call."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_pickled_file_runs_nothing(model, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (model / "model.safetensors").unlink()
    torch.save({"wte.weight": Harm()}, model / "pytorch_model.bin")
    refused(model, capfd, "pytorch_model.bin")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    refused(model, capfd, "pytorch_model.bin")
    assert not Path("harm").exists()


def test_names_as_in_the_first_files_of_gpt2(model):
    """Without "transformer.", with the causal masks and with the output layer beside its twin."""

    def change(weights):
        weights = {name.removeprefix("transformer."): x for name, x in weights.items()}
        for layer in range(2):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
            weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return weights | {"lm_head.weight": weights["wte.weight"].clone()}

    change_weights(model, change)
    assert right(load(str(model)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halved_weights_are_computed_with_in_full(model, dtype):
    change_weights(model, lambda weights: {k: v.to(dtype) for k, v in weights.items()})
    policy, _ = load(str(model))
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    exact = load_file(TINY / "model.safetensors")["transformer.wte.weight"].to(dtype).float()
    assert torch.equal(policy.wte.weight.detach(), exact)


def test_a_config_that_leaves_out_what_is_usual(model):
    change_config(
        model,
        activation_function="absent",
        n_inner=128,
        scale_attn_weights="absent",
        tie_word_embeddings="absent",
        n_ctx=40,
    )
    assert right(load(str(model)))


def test_an_empty_config_is_that_of_the_first_gpt2(tmp_path):
    """The defaults of transformers' GPT2Config; of ours, for the embedded model, the same ε."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2"}))
    numbers = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    numbers |= {"layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256}
    assert vars(gpt2.read_config(path)) == numbers
    assert gpt2.Config(vocab_size=300).layer_norm_epsilon == 1e-5


def test_a_vocabulary_padded_for_speed(model):
    def change(weights):
        wte = weights["transformer.wte.weight"]
        weights["transformer.wte.weight"] = torch.cat([wte, torch.zeros(20, 32)])

    change_weights(model, change)
    change_config(model, vocab_size=320)
    policy, _ = load(str(model))
    assert policy.wte.weight.shape == (320, 32)


def test_too_many_rows_are_no_padding(model, capfd):
    """128 of them: even a multiple of 128 is never that far away."""
    tokenizer = gpt2.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.save(str(model / "tokenizer.json"))

    def change(weights):
        wte = weights["transformer.wte.weight"]
        weights["transformer.wte.weight"] = torch.cat([wte, torch.zeros(148, 32)])

    change_weights(model, change)
    change_config(model, vocab_size=448)
    refused(model, capfd, "tokenizer has 320 tokens", "448")


BAD_CONFIGS = [
    ({"model_type": "llama"}, "model_type"),
    ({"model_type": "absent"}, "model_type"),
    ({"activation_function": "relu"}, "activation_function"),
    ({"n_inner": 64}, "n_inner"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"n_head": 5}, "n_head"),
    ({"n_head": 0}, ""),
    ({"n_layer": "2"}, "n_layer"),
    ({"n_layer": -1}, "n_layer"),
    ({"n_embd": None}, "n_embd"),
    ({"n_positions": 2.5}, "n_positions"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
    ({"eos_token_id": 300}, "eos_token_id"),
    ({"vocab_size": True}, "vocab_size"),
]


@pytest.mark.parametrize("changes,said", BAD_CONFIGS, ids=lambda x: str(x))
def test_configs_of_other_models(model, capfd, changes, said):
    change_config(model, **changes)
    refused(model, capfd, "config.json", said)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\udcff"])
def test_broken_configs(model, capfd, content):
    (model / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(model, capfd, "config.json")


@pytest.mark.parametrize(
    "changes",
    [{"n_layer": 3}, {"n_layer": 1}, {"n_embd": 64}, {"n_positions": 41}, {"vocab_size": 301}],
)
def test_a_config_of_another_size(model, capfd, changes):
    change_config(model, **changes)
    refused(model, capfd, "model.safetensors", "h." if "n_layer" in changes else "size mismatch")


def turn(name):
    def change(weights):
        weights[name] = weights[name].t().contiguous()

    return change


def rename(old, new):
    def change(weights):
        weights[new] = weights.pop(old)

    return change


def untie(weights):
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1e-3


QKV = "transformer.h.1.attn.c_attn.weight"
SPOILED = {
    "turned": (turn(QKV), "h.1.attn.c_attn.weight"),
    "renamed": (rename(QKV, "transformer.h.1.attn.q.weight"), "h.1.attn.q.weight"),
    "missing": (
        lambda weights: {name: x for name, x in weights.items() if name != QKV},
        'Missing key(s) in state_dict: "h.1.attn.c_attn.weight"',
    ),
    "superfluous": (lambda w: w | {"h.2.ln_1.bias": torch.zeros(32)}, "h.2.ln_1.bias"),
    "untied": (untie, "lm_head.weight"),
    "of one bias": (lambda w: w | {"transformer.ln_f.bias": torch.zeros(31)}, "ln_f.bias"),
    "none": (lambda w: {"x": torch.zeros(1)}, "Missing key(s)"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_names_and_shapes_are_checked(model, capfd, kind):
    function, said = SPOILED[kind]
    change_weights(model, function)
    refused(model, capfd, "model.safetensors", said)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json"])
@pytest.mark.parametrize("how", ["empty", "cut short", "garbage"])
def test_broken_files(model, capfd, name, how):
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
        torch.save(load_file(TINY / "model.safetensors"), model / name)
    whole = (model / name).read_bytes()
    broken = {"empty": b"", "cut short": whole[: len(whole) // 2], "garbage": whole[::-1]}
    (model / name).write_bytes(broken[how])
    refused(model, capfd, name)


def test_a_pickle_of_something_else(model, capfd):
    (model / "model.safetensors").unlink()
    for thing in ([1, 2], {"wte.weight": 3}, torch.zeros(2)):
        torch.save(thing, model / "pytorch_model.bin")
        refused(model, capfd, "pytorch_model.bin")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_files(model, capfd, name):
    (model / name).unlink()
    if name == "tokenizer.json":
        (model / "vocab.json").unlink()
    refused(model, capfd, name)


def test_merges_without_or_beside_a_vocabulary(model, capfd):
    (model / "tokenizer.json").unlink()
    (model / "merges.txt").write_text("#version: 0.2\nno such\n")
    refused(model, capfd)
    (model / "merges.txt").unlink()
    refused(model, capfd, "merges.txt")


def test_a_tokenizer_of_another_model(model, capfd):
    other = gpt2.train_tokenizer(["a good day"] * 9, 262)
    other.save(str(model / "tokenizer.json"))
    refused(model, capfd, "tokenizer", str(other.get_vocab_size()), "300")
    other = gpt2.train_tokenizer(gpt2.write_sentences(300, 1), 320)
    other.save(str(model / "tokenizer.json"))
    refused(model, capfd, "tokenizer", "320", "300")


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c"])
def test_directories_that_are_not_there(name, capfd):
    refused(name, capfd, "directory")


def test_an_empty_directory_and_a_file(tmp_path, capfd):
    refused(tmp_path, capfd, "config.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", capfd)


def test_truncation_and_padding_in_the_tokenizer_file_are_switched_off(model):
    tokenizer = gpt2.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(model / "tokenizer.json"))
    assert right(load(str(model)))


def test_files_with_a_byte_order_mark(model):
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_bytes(b"\xef\xbb\xbf" + (model / name).read_bytes())
    assert right(load(str(model)))


def test_tied_weights_under_the_name_of_the_head(model):
    change_weights(model, rename("transformer.wte.weight", "lm_head.weight"))
    assert right(load(str(model)))


def test_a_value_head_is_left_out(model):
    change_weights(model, lambda w: w | {"v_head.summary.weight": torch.zeros(1, 32)})
    assert right(load(str(model)))


def split_weights(model):
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: weights[name] for name in chosen}, model / file)
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()


def test_sharded_weights(model, capfd):
    split_weights(model)
    assert right(load(str(model)))
    (model / "model-2-of-2.safetensors").unlink()
    refused(model, capfd, "model.safetensors.index.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model, capfd, value):
    def spoil(weights):
        weights[QKV][3, 5] = value

    change_weights(model, spoil)
    refused(model, capfd, "model.safetensors", QKV)


# ---------------------------------------------------------------- Reward models

REWARD_MODEL = TINY.parent / "gpt2-tiny-rm"


def test_scores_are_those_of_transformers():
    """Of texts of different lengths, one by one and together; see make_gpt2_tiny_rm.py."""
    expected = json.loads((REWARD_MODEL / "expected.json").read_text())
    reward_model = gpt2.load_text_reward_model(REWARD_MODEL, "cpu")
    prompts = [prompt for prompt, _, _ in expected]
    responses = [response for _, response, _ in expected]
    scores = torch.tensor([score for _, _, score in expected])
    assert scores.std() > 0.1
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(reward_model(prompts, responses), scores, **close)
    for prompt, response, score in expected:
        torch.testing.assert_close(
            reward_model([prompt], [response]), torch.tensor([score]), **close
        )


def test_a_text_longer_than_the_context_is_read_from_its_end():
    reward_model = gpt2.load_text_reward_model(REWARD_MODEL, "cpu")
    tail = "abcdefgh" * 5  # a token per letter: the 40 of the context
    assert torch.equal(reward_model(["xyz" * 20], [tail]), reward_model([""], [tail]))
    assert reward_model([""], [""]).isfinite().all()


def refused_reward_model(folder, capsys, *said):
    with pytest.raises(SystemExit) as stop:
        gpt2.load_text_reward_model(folder, "cpu")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: --reward-model {folder}: ")
    for words in said:
        assert words in error


def test_what_is_no_reward_model(tmp_path, capsys):
    refused_reward_model(TINY, capsys, "score.weight")  # a language model
    refused_reward_model(tmp_path, capsys, "config.json")
    folder = tmp_path / "two_outputs"
    shutil.copytree(REWARD_MODEL, folder)
    change_weights(folder, lambda weights: weights | {"score.weight": torch.zeros(2, 32)})
    refused_reward_model(folder, capsys, "score.weight")


# ---------------------------------------------------------------- Saving


def test_a_saved_model_is_the_same_to_the_bit(tmp_path):
    policy, tokenizer = load(str(TINY))
    assert gpt2.save_gpt2(policy, tokenizer, tmp_path / "saved") is None
    assert os.listdir(tmp_path) == ["saved"]
    ids = gpt2.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json")).encode("Yes").ids
    assert ids == [299, *tokenizer.encode("Yes").ids]  # as the prompts of the training
    before, after = (load_file(d / "model.safetensors") for d in (TINY, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert right(load(str(tmp_path / "saved")))

    before, after = (
        json.loads((d / "config.json").read_text()) for d in (TINY, tmp_path / "saved")
    )
    wanted = "architectures model_type activation_function n_embd n_head n_layer n_positions "
    wanted += "n_inner layer_norm_epsilon vocab_size bos_token_id eos_token_id tie_word_embeddings"
    assert [after[key] for key in wanted.split()] == [before[key] for key in wanted.split()]
    # No dropout, as in training.
    assert [after[f"{part}_pdrop"] for part in ("attn", "embd", "resid")] == [0, 0, 0]
    said = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert said["eos_token"] == said["bos_token"] == "<|endoftext|>"


def test_the_embedded_model_is_saved_and_loaded(tmp_path):
    policy, tokenizer = gpt2.embedded_gpt2(gpt2.write_sentences(200, 1))
    gpt2.save_gpt2(policy, tokenizer, tmp_path / "saved")
    again, same = load(str(tmp_path / "saved"))
    assert again.config == policy.config and same.get_vocab() == tokenizer.get_vocab()
    assert all(
        torch.equal(again.state_dict()[name], tensor)
        for name, tensor in policy.state_dict().items()
    )


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes: writes then fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("size", [0, 900, 20_000])
def test_saving_on_a_full_disk_leaves_nothing(tmp_path, size):
    policy, tokenizer = load(str(TINY))
    with full_disk(size):
        error = gpt2.save_gpt2(policy, tokenizer, tmp_path / "saved")
    assert "\n" not in error and error.startswith("--save-dir")
    assert os.listdir(tmp_path) == []


def test_saving_overwrites_nothing(tmp_path):
    policy, tokenizer = load(str(TINY))
    mine = tmp_path / "saved" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    error = gpt2.save_gpt2(policy, tokenizer, tmp_path / "saved")
    assert "\n" not in error and error.startswith("--save-dir")
    assert mine.read_text() == "mine"
    (part,) = [path for path in tmp_path.iterdir() if path.name != "saved"]
    assert str(part) in error  # the model is not lost
    assert right(load(str(part)))


# ---------------------------------------------------------------- Checkpoints


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, capsys):
    path = tmp_path / "runs" / "one" / "checkpoint.pt"
    args = gpt2.Args(seed=3, prompts=Path("a", "b"), top_p=0.5)
    path.parent.mkdir(parents=True)
    gpt2.save_checkpoint(path, {"rollout": 1, "policy": torch.zeros(30_000)}, args)
    with full_disk(50_000), pytest.raises(SystemExit) as stop:
        gpt2.save_checkpoint(path, {"rollout": 2, "policy": torch.zeros(30_000)}, args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "checkpoint" in error
    assert os.listdir(path.parent) == ["checkpoint.pt"]
    state, same = gpt2.load_checkpoint(path.parent)
    assert state["rollout"] == 1 and same == args


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_broken_checkpoints(tmp_path, capsys, content):
    path = tmp_path / "checkpoint.pt"
    torch.save({"rollout": 1} if content is None else Harm(), path)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        gpt2.load_checkpoint(tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--resume" in error


# ---------------------------------------------------------------- The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with gpt2-tiny, no other address to ask, no patience, and an empty cache."""
    lookup = socket.getaddrinfo

    def only_here(host, *arguments, **more):
        assert host in ("127.0.0.1", b"127.0.0.1"), f"{host} was asked"
        return lookup(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    with gpt2_hub.Hub(files).running() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
            "AGENT_HARNESSES_PATH": str(tmp_path / "home" / "harnesses"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value, raising=False)
            if hasattr(file_download, name):  # older versions keep a copy of some
                monkeypatch.setattr(file_download, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def test_a_hub_model_is_fetched_once(hub):
    assert right(load(gpt2_hub.REPOSITORY))
    wanted = "config.json merges.txt model.safetensors tokenizer.json vocab.json".split()
    assert sorted(hub.fetched()) == wanted
    assert right(load(gpt2_hub.REPOSITORY))
    assert len(hub.fetched()) == len(wanted)


def test_a_hub_model_in_the_cache_needs_no_hub(hub):
    load(gpt2_hub.REPOSITORY)
    hub.error = (503, None)
    assert right(load(gpt2_hub.REPOSITORY))
    hub.stop()
    assert right(load(gpt2_hub.REPOSITORY))


def test_older_files_on_the_hub(hub, tmp_path):
    """pytorch_model.bin, vocab.json and merges.txt, from the hub and then from the cache."""
    del hub.files["model.safetensors"], hub.files["tokenizer.json"]
    torch.save(load_file(TINY / "model.safetensors"), tmp_path / "weights")
    hub.files["pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    assert right(load(gpt2_hub.REPOSITORY))
    hub.stop()
    assert right(load(gpt2_hub.REPOSITORY))


def test_unknown_models(hub, capfd):
    for name in ("nobody/nothing", "nothing"):
        refused(name, capfd)
    assert hub.fetched() == []


def test_a_gated_model(hub, capfd):
    for status in (401, 403):
        hub.error = (status, "GatedRepo")
        refused(gpt2_hub.REPOSITORY, capfd)


def test_the_hub_does_not_answer(hub, capfd, monkeypatch):
    """The program ends at once: it does not try again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    hub.stop()
    refused(gpt2_hub.REPOSITORY, capfd)


def test_a_hub_in_trouble(hub, capfd):
    hub.error = (500, None)
    refused(gpt2_hub.REPOSITORY, capfd)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_broken_files_on_the_hub(hub, capfd, name):
    hub.files[name] = hub.files[name][: len(hub.files[name]) // 2]
    refused(gpt2_hub.REPOSITORY, capfd, name)


def test_a_repository_without_weights(hub, capfd):
    del hub.files["model.safetensors"]
    refused(gpt2_hub.REPOSITORY, capfd, "model.safetensors")


@pytest.mark.parametrize("name", ["", "no blanks", "a//b", "x" * 200])
def test_names_that_no_model_can_have(hub, capfd, name):
    refused(name, capfd)
