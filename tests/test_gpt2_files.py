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
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import gpt2_sentiment as gpt2

TINY = Path(__file__).parent / "data" / "gpt2-tiny"
EXPECTED = load_file(TINY.parent / "gpt2-tiny-expected.safetensors")
ROW = EXPECTED["tokens"][:1]


def right(loaded):
    """Are policy and tokenizer those of gpt2-tiny, with its very logits?"""
    policy, tokenizer = loaded
    with torch.no_grad():
        logits = policy.head(policy(ROW, EXPECTED["mask"].bool()[:1]))[0]
    real = EXPECTED["mask"].bool()[0]
    torch.testing.assert_close(logits[real], EXPECTED["logits"][0][real], atol=1e-5, rtol=0)
    ids = tokenizer.encode("the café was not  good\nat all").ids
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
    """Loading ends with status 2 and one line that names the model, says why and the way out."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        gpt2.load_gpt2(str(name))
    out, error = capfd.readouterr()
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and out == "" and error.endswith(line + "\n")
    assert line.startswith(f"error: --model {name}: ") and "--model embedded" in line
    for words in said:
        assert words in line, line
    return error


# ---------------------------------------------------------------- Directories


def test_a_directory(capfd):
    assert right(gpt2.load_gpt2(str(TINY)))
    config = gpt2.load_gpt2(str(TINY))[0].config
    assert (config.n_layer, config.n_head, config.layer_norm_epsilon) == (2, 4, 1e-3)
    assert (config.bos_token_id, config.eos_token_id, config.n_positions) == (299, 299, 40)
    assert capfd.readouterr() == ("", "")


def test_vocab_and_merges_in_place_of_the_tokenizer_file(model):
    (model / "tokenizer.json").unlink()
    assert right(gpt2.load_gpt2(str(model)))


def test_a_pickled_file(model):
    (model / "model.safetensors").unlink()
    torch.save(load_file(TINY / "model.safetensors"), model / "pytorch_model.bin")
    assert right(gpt2.load_gpt2(str(model)))


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
    assert right(gpt2.load_gpt2(str(model)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halved_weights_are_computed_with_in_full(model, dtype):
    change_weights(model, lambda weights: {k: v.to(dtype) for k, v in weights.items()})
    policy, _ = gpt2.load_gpt2(str(model))
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
    assert right(gpt2.load_gpt2(str(model)))


def test_an_empty_config_is_that_of_the_first_gpt2():
    """The defaults of transformers' GPT2Config; of ours, for the embedded model, the same ε."""
    numbers = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    numbers |= {"layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256}
    assert vars(gpt2.read_config({"model_type": "gpt2"})) == numbers
    assert gpt2.Config(vocab_size=300).layer_norm_epsilon == 1e-5


def test_a_vocabulary_padded_for_speed(model):
    def change(weights):
        wte = weights["transformer.wte.weight"]
        weights["transformer.wte.weight"] = torch.cat([wte, torch.zeros(20, 32)])

    change_weights(model, change)
    change_config(model, vocab_size=320)
    policy, _ = gpt2.load_gpt2(str(model))
    assert policy.wte.weight.shape == (320, 32)


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
        lambda w: w.pop(QKV) is None,
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
    if kind == "missing":
        change_weights(model, lambda w: {k: v for k, v in w.items() if k != QKV})
    else:
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


# ---------------------------------------------------------------- Saving


def test_a_saved_model_is_the_same_to_the_bit(tmp_path):
    policy, tokenizer = gpt2.load_gpt2(str(TINY))
    gpt2.save_gpt2(policy, tokenizer, tmp_path / "saved")
    assert os.listdir(tmp_path) == ["saved"]
    before, after = (load_file(d / "model.safetensors") for d in (TINY, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert right(gpt2.load_gpt2(str(tmp_path / "saved")))

    before, after = (
        json.loads((d / "config.json").read_text()) for d in (TINY, tmp_path / "saved")
    )
    wanted = "architectures model_type activation_function n_embd n_head n_layer n_positions "
    wanted += "n_inner layer_norm_epsilon vocab_size bos_token_id eos_token_id tie_word_embeddings"
    assert [after[key] for key in wanted.split()] == [before[key] for key in wanted.split()]
    said = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert said["eos_token"] == said["bos_token"] == "<|endoftext|>"


def test_the_embedded_model_is_saved_and_loaded(tmp_path):
    policy, tokenizer = gpt2.embedded_gpt2(gpt2.write_sentences(200, 1))
    gpt2.save_gpt2(policy, tokenizer, tmp_path / "saved")
    again, same = gpt2.load_gpt2(str(tmp_path / "saved"))
    assert again.config == policy.config and same.to_str() == tokenizer.to_str()
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
def test_saving_on_a_full_disk_leaves_nothing(tmp_path, capsys, size):
    policy, tokenizer = gpt2.load_gpt2(str(TINY))
    with full_disk(size), pytest.raises(SystemExit) as stop:
        gpt2.save_gpt2(policy, tokenizer, tmp_path / "saved")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--save-dir" in error
    assert os.listdir(tmp_path) == []


def test_saving_overwrites_nothing(tmp_path, capsys):
    policy, tokenizer = gpt2.load_gpt2(str(TINY))
    mine = tmp_path / "saved" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        gpt2.save_gpt2(policy, tokenizer, tmp_path / "saved")
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["saved"] and mine.read_text() == "mine"


# ---------------------------------------------------------------- Checkpoints


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, capsys):
    path = tmp_path / "runs" / "one" / "checkpoint.pt"
    args = gpt2.Args(seed=3, prompts=Path("a", "b"), top_p=0.5)
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
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def test_a_hub_model_is_fetched_once(hub):
    assert right(gpt2.load_gpt2(gpt2_hub.REPOSITORY))
    wanted = "config.json merges.txt model.safetensors tokenizer.json vocab.json".split()
    assert sorted(hub.fetched()) == wanted
    assert right(gpt2.load_gpt2(gpt2_hub.REPOSITORY))
    assert len(hub.fetched()) == len(wanted)


def test_a_hub_model_in_the_cache_needs_no_hub(hub):
    gpt2.load_gpt2(gpt2_hub.REPOSITORY)
    hub.error = (503, None)
    assert right(gpt2.load_gpt2(gpt2_hub.REPOSITORY))
    hub.stop()
    assert right(gpt2.load_gpt2(gpt2_hub.REPOSITORY))


def test_older_files_on_the_hub(hub, tmp_path):
    """pytorch_model.bin, vocab.json and merges.txt, from the hub and then from the cache."""
    del hub.files["model.safetensors"], hub.files["tokenizer.json"]
    torch.save(load_file(TINY / "model.safetensors"), tmp_path / "weights")
    hub.files["pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    assert right(gpt2.load_gpt2(gpt2_hub.REPOSITORY))
    hub.stop()
    assert right(gpt2.load_gpt2(gpt2_hub.REPOSITORY))


def test_unknown_models(hub, capfd):
    for name in ("nobody/nothing", "nothing"):
        refused(name, capfd, "no such model")
    assert hub.fetched() == []


def test_a_gated_model(hub, capfd):
    for status in (401, 403):
        hub.error = (status, "GatedRepo")
        refused(gpt2_hub.REPOSITORY, capfd, "needs a login")


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
