"""PPO on GPT-2: make its texts happier without letting them drift from where they began.

    maximise over π:  J(π) = E[R(x, y)] - β · KL(π ‖ π_ref)

The algorithm of ppo.py on a language model of words: GPT-2 in plain torch, a reward that reads the
text, a value head, a frozen reference. By default a small GPT-2 is first pretrained on sentences
from a little grammar in this file; --model takes any GPT-2 from the Hugging Face hub or from a
directory. PPO: Schulman et al. 2017 (arXiv:1707.06347). On language models, with an adaptive KL
penalty: Ziegler et al. 2019 (arXiv:1909.08593). To adapt it, replace reward and prompts.

    python gpt2_sentiment.py                       # held-out reward 7 -> 33 at a KL of 3.9 nats
    python gpt2_sentiment.py --model gpt2          # the 124M model; --device cuda --bf16 on a GPU
    torchrun --nproc-per-node 2 gpt2_sentiment.py  # data parallel; --help lists every flag
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26", "tyro>=0.9", "tensorboard>=2.16",
#                 "safetensors>=0.4", "tokenizers>=0.19", "huggingface_hub>=0.25"]
# ///

import copy
import errno
import json
import os
import random
import re
import shutil
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, it would keep the gloo threads alive at exit
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    seed: int = 1  # seed of everything random but the split into training and held-out prompts
    device: Literal["cpu", "cuda"] = "cpu"  # for the toy's tiny tensors cpu is the faster one
    tensorboard: bool = True  # write curves and more to runs/, for tensorboard --logdir runs
    model: str = "embedded"  # a small GPT-2 made at start, a hub name (gpt2), or a directory
    prompts: Path | None = None  # file of prompts, one a line; every fifth is held out
    save_dir: Path | None = None  # folder for the final model, as transformers opens it
    checkpoint_every: int | None = None  # rollouts between checkpoints in runs/, to resume from
    resume: Path | None = None  # folder in runs/ to continue, with the flags it was started with
    bf16: bool = False  # compute in bfloat16 where that is safe; needs --device cuda
    pretrain_steps: int = 500  # supervised steps that make the embedded model
    total_episodes: int | None = None  # responses sampled in all
    batch_size: int | None = None  # responses a rollout
    learning_rate: float | None = None  # step size of AdamW at its highest; by default fits --model
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down to it
    temperature: float = 1.0  # divides the logits, in sampling and in every log-probability alike
    kl_coef: float = 3.0  # β, the price in reward of a nat of KL(policy ‖ reference) a response

    reward: Literal["sentiment", "positivity", "composite"] = "sentiment"  # what is paid for
    response_length: int = 20  # tokens of a response, unless it ends before
    top_k: int = 0  # draw among the k likeliest tokens; 0 draws among all
    top_p: float = 1.0  # draw among the likeliest tokens that make up this probability
    update_epochs: int = 4  # passes over each rollout
    num_minibatches: int = 4  # gradient steps a pass
    micro_batch_size: int | None = None  # responses in memory at once; gradients add up
    gamma: float = 1.0  # discount a token; 1 is usual, as only the finished response counts
    gae_lambda: float = 0.95  # λ: 1 trusts sampled returns (no bias), 0 the critic (low variance)
    clip_coef: float = 0.2  # ε: no gain from moving the ratio π/π_old further
    vf_clip_coef: float = 1.0  # no gain from moving a value further than this
    normalize_advantages: bool = True  # whiten, so that the scale of the reward does not matter
    whiten_rewards: bool = True  # divide rewards by their standard deviation, keep their mean
    target_kl: float | None = None  # end a rollout's updates at this KL(π_old ‖ π) a token
    ent_coef: float = 0.0  # bonus for a nat of entropy a response
    vf_coef: float = 0.02  # weight of the value loss
    separate_critic: bool = False  # give the critic a GPT of its own, not a head on the policy's
    kl_target: float | None = 4.0  # adapt β until KL is this many nats a response
    kl_horizon: int = 500  # episodes in which the adaptive β reacts
    eval_samples: int = 256  # responses of each model to training and to held-out prompts


def stop(message):
    """End the program, status 2, with one line."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)  # the first process speaks for all, and torchrun then ends the others
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def require(args, flags, valid, why):
    """End the program if a value is neither None (off) nor valid."""
    for flag in flags.split():
        value = getattr(args, flag)
        if value is not None and not valid(value):
            stop(f"--{flag.replace('_', '-')} {value}: {why}")


def check_args(args):
    if args.resume is not None:
        other = [f.name for f in fields(args) if getattr(args, f.name) != f.default]
        why = "continues with the flags it was started with; give no other"
        require(args, "resume", lambda v: other == ["resume"], why)
        why = "has no checkpoint.pt; --checkpoint-every writes it to a folder in runs/"
        require(args, "resume", lambda v: (v / "checkpoint.pt").is_file(), why)
        return
    counts = "total_episodes batch_size update_epochs num_minibatches kl_horizon response_length"
    counts += " micro_batch_size checkpoint_every"
    require(args, counts, lambda v: v >= 1, "must be 1 or more")
    positive = "learning_rate max_grad_norm temperature clip_coef vf_clip_coef target_kl kl_target"
    require(args, positive, lambda v: 0 < v < 2**63, "must be above 0, and finite")
    amounts = "seed pretrain_steps kl_coef vf_coef ent_coef top_k"
    require(args, amounts, lambda v: 0 <= v < 2**63, "must be 0 or more, and finite")
    require(args, "eval_samples", lambda v: v >= 2, "must be 2 or more, for a standard error")
    require(args, "gamma gae_lambda", lambda v: 0 <= v <= 1, "must be between 0 and 1")
    require(args, "top_p", lambda v: 0 < v <= 1, "must be above 0 and at most 1")
    why = "cannot adapt --kl-coef 0; start that above 0, or give --kl-target None"
    require(args, "kl_target", lambda v: args.kl_coef > 0, why)
    require(
        args, "device", lambda v: v == "cpu" or torch.cuda.is_available(), "is not here; use cpu"
    )
    require(args, "bf16", lambda v: args.device == "cuda" or not v, "needs --device cuda")
    runs = "runs" if os.path.lexists("runs") else "."
    usable = os.path.isdir(runs) and os.access(runs, os.W_OK)
    require(
        args, "tensorboard", lambda v: usable or not v, "cannot fill runs/; use --no-tensorboard"
    )
    require(args, "checkpoint_every", lambda v: usable, "cannot fill runs/; leave it out")
    why = "cannot be made; name a new folder in a folder that exists"
    require(args, "save_dir", lambda v: v.parent.is_dir() and os.access(v.parent, os.W_OK), why)
    why = "is there already; name a new folder"
    require(args, "save_dir", lambda v: not os.path.lexists(v), why)


# ------------------------------------------------------------------ The task: replace by your own
TUTORIAL = ["I feel happy when", "The best part about this is", "I love how"]
TUTORIAL += ["Today was great because"]
DAYS = "Today, Yesterday, The weekend, The party, Our trip, The evening".split(", ")
OPENINGS = [f"{day} was {mood} because" for day in DAYS for mood in ("great", "bad", "long")]
OPENINGS += [f"{who} feel {mood} when" for who in ("I", "We") for mood in ("happy", "sad", "calm")]
OPENINGS += [f"The {which} part about this is" for which in ("best", "worst", "odd")]
OPENINGS += [f"I {verb} how" for verb in ("love", "hate", "see")]
OPENINGS += [f"My {person} says that" for person in ("friend", "sister", "teacher")]
FEELINGS = [  # adjectives, moods, verbs: good, bad and neither, equally often
    "good great excellent wonderful amazing awesome fun super incredible perfect; happy glad; "
    "love like",
    "bad awful terrible horrible lame gross cold broken late dull; sad upset angry; hate fear",
    "small big old new green quiet short plain red simple; calm quiet surprised; see know",
]
CLAUSES = [
    "the {thing} {is} {adjective}",
    "the {thing} {is} really {adjective}",
    "we {have} a {adjective} {thing}",
    "my {person} {makes} a {adjective} {thing}",
    "the {adjective} {thing} {is} at the {place}",
    "my {person} {is} {mood} about the {thing}",
    "I {verb} the {thing}",
]
WORDS = {
    "thing": "food music weather game story song cake film book garden room coffee".split(),
    "person": "friend sister brother mother teacher neighbour".split(),
    "place": "park school beach market lake station".split(),
}
TENSES = {"is": ("is", "was"), "have": ("have", "had"), "makes": ("makes", "made")}
EOS_TEXT = "<|endoftext|>"


def write_sentences(count, seed):
    """Sentences of the grammar: an opening, one to three clauses, each of its own feeling."""
    rng, sentences = random.Random(seed), []
    for _ in range(count):
        opening = rng.choice(OPENINGS)
        text, past = opening, "was" in opening
        for clause in range(rng.choice([1, 2, 2, 3])):
            feeling = [words.split() for words in FEELINGS[rng.randrange(3)].split(";")]
            slots = {name: rng.choice(words) for name, words in WORDS.items()}
            slots |= {name: forms[past] for name, forms in TENSES.items()}
            kinds = zip(("adjective", "mood", "verb"), feeling, strict=True)
            slots |= {kind: rng.choice(words) for kind, words in kinds}
            start = " that " if opening.endswith(" is") else " "
            text += rng.choice([" and ", ", but ", " while "]) if clause else start
            text += rng.choice(CLAUSES).format(**slots)
        sentences.append(re.sub(r"\ba (?=[aeiou])", "an ", text) + ".")
    return sentences


def read_prompts(path):
    """Prompts to train on and held-out ones, from the file, or else from the grammar."""
    others = sorted(set(OPENINGS) - set(TUTORIAL))
    random.Random(20).shuffle(others)
    if path is None:
        return TUTORIAL + others[10:], others[:10]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        stop(f"--prompts {path}: cannot be read ({one_line(error)}); name a text file")
    lines = [line for line in lines if line]
    if not lines:
        stop(f"--prompts {path}: holds no prompt; write one a line")
    held_out = lines[4::5]
    return [line for i, line in enumerate(lines) if i % 5 != 4], held_out or others[:10]


POSITIVE = dict.fromkeys("good glad like".split(), 1)
POSITIVE |= dict.fromkeys("great happy awesome fun super".split(), 2)
POSITIVE |= dict.fromkeys("excellent wonderful amazing love incredible perfect".split(), 3)
NEGATIVE = dict.fromkeys("bad lame sad".split(), 1)
NEGATIVE |= dict.fromkeys("awful angry gross upset".split(), 2)
NEGATIVE |= dict.fromkeys("terrible horrible hate".split(), 3)


def words(text):
    """Words in lower case; punctuation hides none, and an apostrophe (don't) splits none."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


def sentiment_reward(prompts, responses):
    """Five times the weights of the good words less those of the bad ones, at least 0.1.

    Only the response counts: the words of a prompt are the same whatever the policy does.
    """
    scores = []
    for text in map(words, responses):
        good = sum(POSITIVE.get(word, 0) for word in text)
        scores.append(max(0.1, 5.0 * good - sum(NEGATIVE.get(word, 0) for word in text)))
    return scores


def positivity_reward(prompts, responses):
    """Share of good words, less half the negated ones, times that of different words; 0 to 1."""
    scores = []
    for prompt, text in zip(prompts, map(words, responses), strict=True):
        before = [*words(prompt)[-1:], *text] if words(prompt) else ["", *text]
        good = {"good", "great", "excellent", "wonderful", "amazing"}
        negations = {"not", "never", "don't", "no"}
        pairs = zip(before, text, strict=False)  # each word behind the one before it
        score = sum(-0.5 if last in negations else 1.0 for last, word in pairs if word in good)
        length = max(len(text), 1)
        scores.append(min(max(score / length * len(set(text)) / length, 0.0), 1.0))
    return scores


def composite_reward(prompts, responses):
    """0.2 length + 0.5 relevance + 0.3 formatting: 50 words, the prompt's, in paragraphs."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        count, wanted = len(response.split()), set(words(prompt))
        length = min(1.0, count / 50) if count <= 500 else max(0.0, 1 - (count - 500) / 500)
        relevance = len(wanted & set(words(response))) / max(len(wanted), 1)
        marks = "\n\n", r"[.!?]\s+[A-Z]", r"\A ?[A-Z]"
        formatting = sum(bool(re.search(mark, response)) for mark in marks) / 3
        scores.append(0.2 * length + 0.5 * relevance + 0.3 * formatting)
    return scores


REWARDS = {
    "sentiment": sentiment_reward,
    "positivity": positivity_reward,
    "composite": composite_reward,
}


# ------------------------------------------------------------------ The policy: GPT-2
@dataclass
class Config:
    vocab_size: int
    n_positions: int = 64
    n_embd: int = 64
    n_layer: int = 3
    n_head: int = 4
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int = 0
    eos_token_id: int = 0


class KVCache:
    """Keys and values of the tokens read so far, with room for size tokens in all."""

    def __init__(self, size):
        self.size, self.length, self.layers = size, 0, {}

    def append(self, layer, k, v):
        """Store those of the new tokens, (B, H, T, D/H), and return those of all."""
        if layer not in self.layers:
            self.layers[layer] = k.new_empty(2, *k.shape[:2], self.size, k.shape[3])
        end = self.length + k.shape[2]
        keys, values = self.layers[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


def linear(x, weight, bias=None):
    """F.linear. On a CPU a few rows, as in generation, go through large weights in two thirds of
    the time if the product is turned round and made in pieces that fit a cache."""
    rows = x.flatten(0, -2)
    if x.is_cuda or len(rows) > 128:
        return F.linear(x, weight, bias)
    y = torch.cat([piece @ rows.t() for piece in weight.split(1024)])  # (outputs, rows)
    y = y.t().contiguous().view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class GPT2Block(nn.Module):
    """Pre-LN transformer block, (B, T, D) to (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config.n_embd, config.n_head
        self.ln_1 = nn.LayerNorm(width, config.layer_norm_epsilon)
        c_attn, c_proj = Linear(width, 3 * width), Linear(width, width)
        self.attn = nn.ModuleDict({"c_attn": c_attn, "c_proj": c_proj})
        self.ln_2 = nn.LayerNorm(width, config.layer_norm_epsilon)
        c_fc, c_proj = Linear(width, 4 * width), Linear(4 * width, width)
        self.mlp = nn.ModuleDict({"c_fc": c_fc, "c_proj": c_proj})

    def forward(self, x, keep, cache, layer):
        qkv = self.attn.c_attn(self.ln_1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        x = x + self.attn.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Tokens (B, T) to hidden states (B, T, D); head turns these into logits.

    Parameters are named as in Hugging Face's files. No dropout: with it the policy that samples
    would not be the one that is scored.
    """

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.n_embd
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.n_positions, width)
        self.h = nn.ModuleList([GPT2Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(width, config.layer_norm_epsilon)

    def forward(self, tokens, mask=None, cache=None):
        """mask: (B, S) over cached and new tokens, false on left padding. Appends to the cache."""
        past = 0 if cache is None else cache.length
        if mask is None:
            mask = tokens.new_ones(len(tokens), past + tokens.shape[1], dtype=torch.bool)
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]  # from the first real token
        x = self.wte(tokens) + self.wpe(position)
        seen = torch.ones(tokens.shape[1], mask.shape[1], dtype=torch.bool, device=x.device)
        # Padding sees only itself: a softmax over nothing would be NaN.
        itself = seen.triu(past) & seen.tril(past)
        keep = ((seen.tril(past) & mask[:, None]) | itself)[:, None]  # (B, 1, T, S)
        for layer, block in enumerate(self.h):
            x = block(x, keep, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.ln_f(x)

    def head(self, states):
        return linear(states, self.wte.weight)


# ------------------------------------------------------------------ Making, loading, saving it
def byte_level_tokenizer(bpe):
    """As GPT-2's: every text has tokens, frequent words have one."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(sentences, vocab_size):
    """A tokenizer whose vocabulary is EOS, the 256 bytes and what the sentences hold most often."""
    tokenizer = byte_level_tokenizer(models.BPE())
    known = {"special_tokens": [EOS_TEXT], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **known)
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def embedded_gpt2(sentences):
    """A small GPT-2 with random weights, and a tokenizer trained on the sentences."""
    tokenizer = train_tokenizer(sentences, 640)  # more than it finds: every word becomes a token
    policy = GPT2(Config(vocab_size=tokenizer.get_vocab_size()))
    for name, parameter in policy.named_parameters():
        if parameter.dim() == 2:  # as Radford et al. 2019: smaller where the layers' outputs add up
            scale = (2 * policy.config.n_layer) ** -0.5 if "c_proj" in name else 1.0
            nn.init.normal_(parameter, std=0.02 * scale)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return policy, tokenizer


def pretrain_gpt2(policy, tokenizer, sentences, steps):
    """Fit the policy, in place, to the sentences by maximum likelihood."""
    eos, device = policy.config.eos_token_id, policy.wte.weight.device
    ids = [[eos, *encoding.ids, eos] for encoding in tokenizer.encode_batch(sentences)]
    width = max(map(len, ids))
    tokens = torch.tensor([row + [-100] * (width - len(row)) for row in ids], device=device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, betas=(0.9, 0.99), fused=True)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1 - (step - 1) / steps, 20 * step / steps)
        batch = tokens[torch.randint(len(tokens), (64,)).to(device)]
        logits = policy.head(policy(batch[:, :-1].clamp(min=0)))
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())  # ignores -100
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


OTHERWISE = "give the directory of a GPT-2, or --model embedded"


def one_line(error):
    """What an exception says, on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 200)


def model_folder(name):
    """The directory of that name, or the one in the cache to which the hub's files are fetched."""
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        stop(f"--model {name}: is no directory; {OTHERWISE}")
    from huggingface_hub import errors, logging, snapshot_download

    logging.set_verbosity_error()  # what goes wrong is said below, in one line
    files = ["config.json", "tokenizer.json", "vocab.json", "merges.txt", "model.safetensors"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=files))
        if not (folder / files[-1]).is_file():
            snapshot_download(name, allow_patterns="pytorch_model.bin")
        return folder
    except errors.LocalEntryNotFoundError:
        stop(f"--model {name}: is not in the cache, and the hub does not answer; {OTHERWISE}")
    except errors.GatedRepoError:
        stop(f"--model {name}: needs a login that may read it, hf auth login; {OTHERWISE}")
    except errors.RepositoryNotFoundError:
        stop(f"--model {name}: the hub has no such model; {OTHERWISE}")
    except Exception as error:  # from the network, the hub, the disk
        stop(f"--model {name}: cannot be fetched ({one_line(error)}); {OTHERWISE}")


def read_config(raw):
    """The Config in config.json's dictionary; ValueError if this GPT-2 is not ours."""
    # What config.json leaves out is as in the first GPT-2.
    config = Config(50257, 1024, 768, 12, 12, 1e-5, 50256, 50256)
    for field in fields(Config):
        value = raw.get(field.name, getattr(config, field.name))
        if type(value) not in (int, field.type) or value < 0:
            raise ValueError(f"{field.name} is {value!r}, not {field.type.__name__}")
        setattr(config, field.name, value)
    known = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"]}
    known |= {"n_inner": [None, 4 * config.n_embd], "tie_word_embeddings": [True]}
    known |= {"scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False]}
    known |= {"add_cross_attention": [False]}
    for key, values in known.items():
        value = raw.get(key, None if key == "model_type" else values[0])
        if value not in values:
            raise ValueError(f"{key} is {value!r}, and only {values[-1]!r} is known here")
    if min(config.n_layer, config.n_head, config.n_embd, config.n_positions) < 1:
        raise ValueError("a size is 0")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    if max(config.bos_token_id, config.eos_token_id) >= config.vocab_size:
        raise ValueError("bos_token_id or eos_token_id is not in the vocabulary")
    return config


def read_weights(path):
    """The tensors in a file, by name; pickled ones without running what the pickle says."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def turn(weights):
    """Weights of linear layers turned round: (out, in) here, (in, out) in Hugging Face's files."""
    linear = re.compile(r"\.c_\w+\.weight$")
    return {k: (x.t() if linear.search(k) else x).contiguous() for k, x in weights.items()}


def convert_weights(weights):
    """Hugging Face's tensors as this policy's, in float32; the policy checks names and shapes."""
    weights = {name.removeprefix("transformer."): x.float() for name, x in weights.items()}
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights.get("wte.weight", head)):
        raise ValueError("lm_head.weight differs from wte.weight: not a tied output layer")
    masks = ".attn.bias", ".attn.masked_bias"  # the causal ones, which old files hold too
    return turn({name: x for name, x in weights.items() if not name.endswith(masks)})


def read_tokenizer(path, merges):
    """The tokenizer in tokenizer.json, or in vocab.json and merges.txt."""
    if not merges:
        return Tokenizer.from_file(str(path))
    tokenizer = byte_level_tokenizer(models.BPE.from_file(str(path), str(merges)))
    tokenizer.add_special_tokens([EOS_TEXT])
    return tokenizer


def load_gpt2(name):
    """Policy and tokenizer in a directory, or of that name on the hub, which keeps a copy here."""
    folder = model_folder(name)

    def find(*files):
        path = next((folder / file for file in files if (folder / file).is_file()), None)
        return path or stop(f"--model {name}: has no {' or '.join(files)}; {OTHERWISE}")

    try:
        path = find("config.json")
        with torch.device("meta"):
            policy = GPT2(read_config(json.loads(path.read_text(encoding="utf-8"))))
        path = find("model.safetensors", "pytorch_model.bin")
        policy.load_state_dict(convert_weights(read_weights(path)), assign=True)
        path = find("tokenizer.json", "vocab.json")
        tokenizer = read_tokenizer(path, path.name == "vocab.json" and find("merges.txt"))
    except Exception as error:  # parsers of broken files raise all sorts
        stop(f"--model {name}: {path.name} is of no use ({one_line(error)}); {OTHERWISE}")
    size, rows = tokenizer.get_vocab_size(), policy.config.vocab_size
    if size > rows or (size < rows and (rows % 64 or rows - size >= 128)):  # 64: padded for speed
        why = f"the tokenizer has {size} tokens, the weights have {rows}"
        stop(f"--model {name}: {why}; take both from one model, or --model embedded")
    return policy, tokenizer


def save_gpt2(policy, tokenizer, directory):
    """Write a directory that transformers opens, whole or not at all."""
    from safetensors.torch import save_file

    directory, config = Path(directory), policy.config
    part = directory.with_name(f"{directory.name}.{os.getpid()}.part")  # nobody else's
    described = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | asdict(config)
    described |= {"n_inner": None, "activation_function": "gelu_new", "tie_word_embeddings": True}
    described |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    bos, eos = map(tokenizer.id_to_token, (config.bos_token_id, config.eos_token_id))
    ours = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.n_positions}
    ours |= {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    weights = {f"transformer.{name}": x for name, x in turn(policy.state_dict()).items()}
    try:
        part.mkdir()
        (part / "config.json").write_text(json.dumps(described, indent=2))
        (part / "tokenizer_config.json").write_text(json.dumps(ours, indent=2))
        tokenizer.save(str(part / "tokenizer.json"))
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        os.replace(part, directory)
    except Exception as error:  # a full disk, a folder that is in the way
        shutil.rmtree(part, ignore_errors=True)
        stop(f"--save-dir {directory}: cannot be written ({one_line(error)}); name another")


# ------------------------------------------------------------------ Rollout
def encode_prompts(tokenizer, texts, bos):
    """Tokens (N, P), padded on the left, and the mask (N, P) of real ones, of which bos is one."""
    ids = [[bos, *tokenizer.encode(text, add_special_tokens=False).ids] for text in texts]
    width = max(map(len, ids))
    tokens = torch.tensor([[bos] * (width - len(row)) + row for row in ids])
    lengths = torch.tensor([len(row) for row in ids])
    return tokens, torch.arange(width) >= width - lengths[:, None]


def decode_responses(tokenizer, prompts, prompt_mask, responses, eos):
    """Texts of prompts and of what follows each, as read in one piece: (list, list)."""
    heads, wholes = [], []
    rows = zip(prompts.tolist(), prompt_mask.tolist(), responses.tolist(), strict=True)
    for prompt, real, response in rows:
        prompt = prompt[real.index(True) + 1 :]  # without padding and bos
        heads.append(prompt)
        wholes.append(prompt + response[: [*response, eos].index(eos)])
    heads, wholes = tokenizer.decode_batch(heads), tokenizer.decode_batch(wholes)
    return heads, [text[len(head) :] for head, text in zip(heads, wholes, strict=True)]


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (..., V) of the distribution that is drawn from: tempered, and only of the likeliest.

    top_k keeps k tokens, then top_p the fewest whose probabilities reach p. The others get the
    lowest number there is, whose probability is 0, and not -inf: 0 · -inf in an entropy is NaN.
    """
    logits = logits / temperature
    lowest = torch.finfo(logits.dtype).min
    if 0 < top_k < logits.shape[-1]:
        values, tokens = logits.topk(top_k)
        logits = torch.full_like(logits, lowest).scatter(-1, tokens, values)
    if top_p < 1:
        values, tokens = logits.sort(descending=True, stable=True)
        probs = values.softmax(-1)
        enough = probs.cumsum(-1) - probs >= top_p  # what comes before reaches p already
        logits = logits.scatter(-1, tokens, values.masked_fill(enough, lowest))
    return logits


@torch.no_grad()
def sample_responses(policy, prompts, prompt_mask, noise, temperature=1.0, top_k=0, top_p=1.0):
    """Responses (B, R) and the sets (B, R, V) they were drawn from, None if those hold all tokens.

    noise (B, R), uniform on [0, 1), picks each token by the inverse of the distribution function:
    so a response depends neither on the other rows nor on how many processes share them.
    """
    eos, size = policy.config.eos_token_id, prompts.shape[1] + noise.shape[1] - 1
    cache, mask = KVCache(size), F.pad(prompt_mask, (0, noise.shape[1] - 1), value=True)
    tokens, ended = prompts, torch.zeros_like(prompts[:, :1], dtype=torch.bool)
    responses, allowed = [], []
    for u in noise.split(1, 1):
        states = policy(tokens, mask[:, : cache.length + tokens.shape[1]], cache)
        logits = filter_logits(policy.head(states[:, -1]).float(), temperature, top_k, top_p)
        total = logits.softmax(1).cumsum(1, dtype=torch.float64)  # (B, V)
        tokens = torch.searchsorted(total, u * total[:, -1:], right=True)  # (B, 1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # the last, too, where all is NaN
        tokens = torch.where(ended, eos, tokens)  # EOS ends a response; as padding it fills it up
        ended = ended | (tokens == eos)
        responses.append(tokens)
        if top_k > 0 or top_p < 1:
            allowed.append((logits > torch.finfo(logits.dtype).min).scatter(1, tokens, True))
    return torch.cat(responses, 1), torch.stack(allowed, 1) if allowed else None


def real_mask(responses, eos):
    """True up to and including the first EOS: stopping is learned too, padding is not. (B, R)"""
    return ((responses == eos).cumsum(1) - (responses == eos).long()) == 0


def continuation_states(model, prompts, prompt_mask, responses):
    """Hidden states (B, R, D) that choose the response tokens: those at positions P-1 to T-2."""
    mask = F.pad(prompt_mask, (0, responses.shape[1] - 1), value=True)
    return model(torch.cat([prompts, responses[:, :-1]], 1), mask)[:, prompts.shape[1] - 1 :]


def response_logits(policy, states, temperature, allowed):
    """Logits (B, R, V) of the distribution that responses are drawn from.

    With --top-k or --top-p, allowed (B, R, V) are the sets that the rollout drew from, and the new
    policy and the reference are renormalised over them too. By its own set, a later policy (or the
    reference) could give a drawn token probability 0: an infinite log-ratio (or KL). And the choice
    that is improved is the one that was made, among these tokens. The KL is then that of these
    choices, and no gradient flows through which tokens are in a set.
    """
    logits = policy.head(states / temperature).float()  # fewer numbers to divide than the logits
    if allowed is not None:
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    return logits


def masked_sum(x, mask):
    """Sum over the unmasked tokens of each response: (B, R) to (B,)."""
    return torch.where(mask, x, 0.0).sum(1)


def masked_mean(x, mask):
    """Mean over all unmasked tokens: (B, R) to a scalar."""
    return masked_sum(x, mask).sum() / mask.sum()


def whiten(x, mask):
    """Normalise x (B, R) to mean 0 and variance 1 (over N) of the unmasked tokens; 0 elsewhere."""
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    return torch.where(mask, (x - mean) / (std + 1e-8), 0.0)


def scale_rewards(rewards, mask):
    """Divide rewards (B, R) by their standard deviation on real tokens; 0 after EOS."""
    std = masked_mean((rewards - masked_mean(rewards, mask)) ** 2, mask).sqrt()
    return torch.where(mask, rewards / (std + 1e-8), 0.0)


# ------------------------------------------------------------------ PPO
def kl_estimate(logprobs, ref_logprobs, kind):
    """KL(policy ‖ reference) in nats at each token (B, R), from the sampled ones (joschu.net/blog).

    In value k1 and k3 are unbiased. In a loss the gradient counts, which is, for a token with its
    prefix fixed: E[∇k1] = 0, E[∇k2] = ∇KL(π ‖ π_ref), E[∇k3] = ∇KL(π_ref ‖ π), the other direction.
    No loss sees that a token decides which prefixes come next; k1 in the reward does, and is right.
    """
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]


def token_rewards(scores, kl, mask, kl_coef):
    """Per-token rewards (B, R): -β·KL at every token, plus the score (B,) at the last one."""
    last = mask.sum(1, keepdim=True) - 1  # EOS, or the final token of a truncated response
    rewards = (-kl_coef * kl).scatter_add(1, last, scores[:, None])
    return torch.where(mask, rewards, 0.0)


def compute_gae(rewards, values, mask, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, values, mask: (B, R). Returns advantages and returns, both (B, R), zero after EOS.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Padding contributes nothing: the value and advantage carried back from it are zero.
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_coef):
    """Clipped surrogate objective (Schulman et al. 2017, eq. 7), negated. All inputs (B, R).

    Summed over tokens, averaged over responses: at π = π_old, and with unbiased advantages, its
    gradient is exactly the policy gradient of J. A mean over the tokens of each response would
    instead give the tokens of short responses more weight.
    """
    logratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    objective = torch.min(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        metrics = {
            # KL(π_old ‖ π) by the k3 estimator, http://joschu.net/blog/kl-approx.html
            "approx_kl": masked_mean(ratio - 1 - logratio, mask),
            "clipfrac": masked_mean(((ratio - 1).abs() > clip_coef).float(), mask),
            "ratio": masked_mean(ratio, mask),  # exactly 1 at a rollout's first gradient step
        }
    return -masked_sum(objective, mask).mean(), metrics


def value_loss(values, old_values, returns, mask, value_clip):
    """Half the squared error of the values, clipped to within value_clip of the old ones."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error = torch.where(mask, values - returns, 0.0)
    clipped_error = torch.where(mask, clipped - returns, 0.0)
    return 0.5 * masked_sum(torch.max(error**2, clipped_error**2), mask).mean()


class AdaptiveKL:
    """β that steers the KL a response towards a target (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, episodes):
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            # A batch longer than the horizon counts as one horizon, or β could turn negative.
            self.coef *= 1 + error * min(episodes / self.horizon, 1.0)


# ------------------------------------------------------------------ Several processes
def share(rows):
    """The part of the rows that this process works on."""
    return rows.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else rows


def gather(tensor):
    """The rows of all processes, in order."""
    if tensor is None or not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def add_up(tensors):
    """Sum each tensor, in place, over the processes."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


# ------------------------------------------------------------------ Evaluation
def distinct_2(texts):
    """Different pairs of neighbouring words over all such pairs: low where texts are alike."""
    pairs = [pair for text in map(words, texts) for pair in pairwise(text)]
    return len(set(pairs)) / max(len(pairs), 1)


def repetition(texts):
    """Share of the words that their text had before: near 1 for "great great great"."""
    split = [words(text) for text in texts]
    repeats = sum(len(text) - len(set(text)) for text in split)
    return repeats / max(sum(map(len, split)), 1)


def evaluate_texts(policy, reference, prompts, prompt_mask, tokenizer, args):
    """Metrics, prompts, responses, scores; prompts in turn, with the same noise at each call."""
    generator, rows = torch.Generator().manual_seed(args.seed), torch.arange(args.eval_samples)
    noise = torch.rand(len(rows), args.response_length, generator=generator, dtype=torch.float64)
    x, real = prompts[rows % len(prompts)], prompt_mask[rows % len(prompts)]
    responses, _, logprobs, ref_logprobs, _, entropy = rollout(
        policy, None, reference, x, real, noise, args
    )
    mask = real_mask(responses, policy.config.eos_token_id)
    heads, texts = decode_responses(tokenizer, x, real, responses, policy.config.eos_token_id)
    scores = torch.tensor(REWARDS[args.reward](heads, texts))
    metrics = {"reward": scores.mean(), "reward_se": scores.std() / len(scores) ** 0.5}
    metrics |= {"kl": masked_sum(logprobs - ref_logprobs, mask).mean()}
    metrics |= {"entropy": masked_sum(entropy, mask).mean(), "length": mask.sum(1).float().mean()}
    metrics = {name: value.item() for name, value in metrics.items()}
    metrics |= {"distinct_2": distinct_2(texts), "repetition": repetition(texts)}
    return metrics, heads, texts, scores.tolist()


def describe(results, name, title):
    """One line on what training did to the responses to one group of prompts."""
    r = {key.removeprefix(name): value for key, value in results.items() if key.startswith(name)}
    line = f"{title}: reward {r['reward_before']:.2f} ± {r['reward_se_before']:.2f} -> "
    line += f"{r['reward']:.2f} ± {r['reward_se']:.2f}  win rate {r['win_rate']:.2f}  KL "
    line += f"{r['kl']:.2f}  distinct-2 {r['distinct_2_before']:.3f} -> {r['distinct_2']:.3f}"
    return f"{line}  repetition {r['repetition_before']:.3f} -> {r['repetition']:.3f}"


# ------------------------------------------------------------------ Training
class Critic(nn.Module):
    """Values (B, R), from the policy's hidden states or from those of a GPT-2 of its own."""

    def __init__(self, policy, separate):
        super().__init__()
        self.trunk = copy.deepcopy(policy) if separate else None
        self.value = nn.Linear(policy.config.n_embd, 1)
        nn.init.zeros_(self.value.weight), nn.init.zeros_(self.value.bias)  # no noise at first

    def forward(self, states, prompts, prompt_mask, responses):
        if self.trunk is not None:
            states = continuation_states(self.trunk, prompts, prompt_mask, responses)
        return self.value(states).squeeze(2).float()


def precision(args):
    """The context of forward passes; log-probabilities and losses are float32 in any case."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)


def assess(policy, critic, prompts, prompt_mask, responses, allowed, args):
    """Log-probabilities, values (None without a critic) and entropies of responses, (B, R)."""
    with precision(args):
        states = continuation_states(policy, prompts, prompt_mask, responses)
        values = None if critic is None else critic(states, prompts, prompt_mask, responses)
        logits = response_logits(policy, states, args.temperature, allowed)
    each = logits.log_softmax(2)  # (B, R, V)
    logprobs = each.gather(2, responses[:, :, None]).squeeze(2)
    with torch.set_grad_enabled(torch.is_grad_enabled() and args.ent_coef > 0):  # or only logged
        return logprobs, values, -(each.exp() * each).sum(2)


@torch.no_grad()
def rollout(policy, critic, reference, prompts, prompt_mask, noise, args):
    """Sample responses and note what the models think of them, each process of its share.

    Returns responses, the sets they were drawn from or None, log-probabilities of the policy and of
    the reference, values (None without a critic) and entropies, of all processes.
    """
    tensors, parts = [share(x).to(args.device) for x in (prompts, prompt_mask, noise)], []
    size = args.micro_batch_size or len(noise)
    for x, real, u in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        drawn_from = args.temperature, args.top_k, args.top_p
        with precision(args):
            y, allowed = sample_responses(policy, x, real, u, *drawn_from)
        logprobs, values, entropy = assess(policy, critic, x, real, y, allowed, args)
        ref_logprobs = assess(reference, None, x, real, y, allowed, args)[0]
        parts.append((y, allowed, logprobs, ref_logprobs, values, entropy))
    columns = [None if c[0] is None else torch.cat(c) for c in zip(*parts, strict=True)]
    return [gather(column) for column in columns]


def write(writer, group, metrics, step):
    """Add a point to the curve of each metric."""
    for name, value in metrics.items() if writer else ():
        writer.add_scalar(f"{group}/{name}", value, step)


def save_checkpoint(path, state, args):
    """Write a checkpoint, whole or not at all."""
    paths = {name: str(value) for name, value in asdict(args).items() if isinstance(value, Path)}
    state = state | {"args": asdict(args) | dict.fromkeys(paths), "paths": paths}
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it has the name
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # a full disk
        part.unlink(missing_ok=True)
        stop(f"--checkpoint-every: {path} cannot be written ({one_line(error)}); make room")


def load_checkpoint(run):
    """The state that save_checkpoint wrote, and the Args it was started with."""
    try:
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        paths = {name: Path(value) for name, value in state["paths"].items()}
        return state, Args(**state["args"] | paths)
    except Exception as error:  # broken files raise all sorts
        stop(f"--resume {run}: checkpoint.pt is of no use ({one_line(error)}); start anew")


def main(args: Args) -> dict[str, float]:
    """Train, and return what the texts are like before and after."""
    check_args(args)
    start, state, resumed = time.perf_counter(), None, args.resume
    if resumed is not None:
        state, args = load_checkpoint(resumed)
        check_args(args)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    torch.manual_seed(args.seed)

    # The model, the settings that fit it, the prompts.
    device, embedded = args.device, args.model == "embedded"
    if state is not None:
        policy, tokenizer = GPT2(Config(**state["config"])), Tokenizer.from_str(state["tokenizer"])
        lines = state["prompts"]
    else:
        lines = read_prompts(args.prompts)
        sentences = write_sentences(8_000, args.seed) if embedded else None
        policy, tokenizer = embedded_gpt2(sentences) if embedded else load_gpt2(args.model)
    config, eos = policy.config, policy.config.eos_token_id
    large = sum(p.numel() for p in policy.parameters()) > 20e6
    # Measured 64 wide, where 2e-4 breaks a loaded model; 768 wide this is 1.2e-5, a usual value.
    fitting = {"learning_rate": 3e-4 if embedded else 3.2e-4 / config.n_embd**0.5}
    fitting |= {"batch_size": 32 if large else 64, "total_episodes": 6_400 if large else 2_560}
    unset = {name: value for name, value in fitting.items() if getattr(args, name) is None}
    args = replace(args, **unset)
    size, part = args.batch_size, args.batch_size // args.num_minibatches
    require(args, "total_episodes", lambda v: v >= size, f"is less than one --batch-size {size}")
    require(args, "num_minibatches", lambda v: size % v == 0, f"must divide --batch-size {size}")
    why = f"leaves {part} responses for {processes} processes to share; choose a multiple"
    require(args, "num_minibatches", lambda v: part % processes == 0, why)
    why = f"must be a multiple of the {processes} processes"
    require(args, "eval_samples", lambda v: v % processes == 0, why)
    groups = {}
    for name, texts in zip(("", "held_out_"), lines, strict=True):
        prompts, prompt_mask = encode_prompts(tokenizer, texts, config.bos_token_id)
        groups[name], lengths = (prompts.to(device), prompt_mask.to(device)), prompt_mask.sum(1)
        if lengths.max() + args.response_length > config.n_positions:
            why = f"and {args.response_length} of --response-length exceed {config.n_positions}"
            longest = f"prompt {texts[lengths.argmax()][:40]!r}: its {lengths.max()} tokens"
            stop(f"{longest} {why}, the context of the model; shorten either")

    # Policy, reference, critic: made, or as they were at the checkpoint.
    script, count = Path(__file__).stem, sum(p.numel() for p in policy.parameters())
    if rank == 0:
        print(f"{script}.py: {device}, seed {args.seed}, {count:,} parameters", flush=True)
    policy.to(device)
    if embedded and state is None:
        pretrain_gpt2(policy, tokenizer, sentences, args.pretrain_steps)
    for parameter in policy.parameters() if processes > 1 else ():
        dist.broadcast(parameter.data, 0)
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic = Critic(policy, args.separate_critic).to(device)
    parameters = [*policy.parameters(), *critic.parameters()]
    two = [{"params": [*model.parameters()]} for model in (policy, critic)]
    optimizer = torch.optim.AdamW(two, betas=(0.9, 0.99), fused=True)
    adaptive_kl = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
    learners = {"policy": policy, "reference": reference, "critic": critic, "optimizer": optimizer}
    first, run = 1, Path(f"runs/{script}__{args.seed}__{time.strftime('%Y-%m-%d-%H%M%S')}")
    if state is not None:
        for name, learner in learners.items():
            learner.load_state_dict(state[name])
        adaptive_kl.coef, before, run = state["kl_coef"], state["before"], resumed
        first = state["rollout"] + 1
        torch.set_rng_state(state["rng"])
    else:
        frozen = reference, reference
        before = {k: evaluate_texts(*frozen, *v, tokenizer, args) for k, v in groups.items()}
    purge = (first - 1) * args.batch_size + 1 if state is not None else None
    writer = SummaryWriter(str(run), purge_step=purge) if args.tensorboard and rank == 0 else None
    num_rollouts, begin = args.total_episodes // size, time.perf_counter()
    for step in range(first, num_rollouts + 1):
        progress = (step - 0.5) / num_rollouts
        learning_rate = args.learning_rate * min(10 * progress, 1 - progress)
        for group, factor in zip(optimizer.param_groups, (1, 10), strict=True):
            group["lr"] = learning_rate * factor  # the critic starts from nothing

        # Rollout. All processes draw the same random numbers and end up with the same tensors.
        prompts, prompt_mask = groups[""]
        rows = torch.randint(len(prompts), (size,))
        noise = torch.rand(size, args.response_length, dtype=torch.float64)
        prompts, prompt_mask = prompts[rows], prompt_mask[rows]  # (B, P)
        responses, allowed, old_logprobs, ref_logprobs, old_values, _ = rollout(
            policy, critic, reference, prompts, prompt_mask, noise, args
        )  # (B, R)
        mask = real_mask(responses, eos)
        heads, texts = decode_responses(tokenizer, prompts, prompt_mask, responses, eos)
        scores = torch.tensor(REWARDS[args.reward](heads, texts), device=device)  # (B,)

        # Advantages: what each token earned beyond what the critic expected.
        kl, kl_coef = kl_estimate(old_logprobs, ref_logprobs, "k1"), adaptive_kl.coef
        rewards = token_rewards(scores, kl, mask, kl_coef)
        if args.whiten_rewards:
            rewards = scale_rewards(rewards, mask)
        advantages, returns = compute_gae(rewards, old_values, mask, args.gamma, args.gae_lambda)
        if args.normalize_advantages:
            advantages = whiten(advantages, mask)

        # Update: several passes over the rollout, held near the old policy by the clipped ratio.
        data = prompts, prompt_mask, responses, mask, old_logprobs, old_values, advantages, returns
        epochs = torch.stack([torch.randperm(size) for _ in range(args.update_epochs)])
        updates = []
        for minibatch in epochs.view(-1, part):
            optimizer.zero_grad()
            metrics = {}
            for rows in share(minibatch).split(args.micro_batch_size or part):
                x, x_real, y, real, old, old_v, adv, ret = (tensor[rows] for tensor in data)
                kept = None if allowed is None else allowed[rows]
                logprobs, values, entropy = assess(policy, critic, x, x_real, y, kept, args)
                pg_loss, new = policy_loss(logprobs, old, adv, real, args.clip_coef)
                vf_loss = value_loss(values, old_v, ret, real, args.vf_clip_coef)
                entropy = masked_sum(entropy, real).mean()
                loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * entropy
                weight = len(rows) / part  # the losses are means over responses
                (weight * loss).backward()
                new |= {"policy_loss": pg_loss, "value_loss": vf_loss, "entropy": entropy}
                for name, value in new.items():
                    metrics[name] = metrics.get(name, 0.0) + weight * value.detach()
            # Losses and gradients are exact sums; means over tokens count each part alike.
            add_up([*(p.grad for p in parameters), *metrics.values()])
            if updates and args.target_kl is not None and metrics["approx_kl"] > args.target_kl:
                break
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            updates.append(metrics)
        if not updates[-1]["grad_norm"].isfinite():
            sys.exit(f"error: gradient not finite in rollout {step}; lower --learning-rate")

        # Log the means over the rollout.
        kl = masked_sum(kl, mask).mean()
        adaptive_kl.update(kl.item(), size)
        losses = {name: torch.stack([m[name] for m in updates]).mean() for name in updates[0]}
        losses["ratio_first"] = updates[0]["ratio"]  # not 1: rows or positions are mixed up
        losses["explained_variance"] = 1 - (returns - old_values)[mask].var() / returns[mask].var()
        charts = {"score": scores.mean(), "score_std": scores.std(), "kl": kl}
        charts |= {"response_length": mask.sum(1).float().mean(), "learning_rate": learning_rate}
        charts |= {"kl_coef": kl_coef, "distinct_2": distinct_2(texts)}
        charts["eos_rate"] = (responses == eos).any(1).float().mean()
        episodes, seconds = step * size, time.perf_counter() - begin
        speed = (step - first + 1) * size / seconds
        left, charts["episodes_per_second"] = (num_rollouts - step) * size / speed, speed
        write(writer, "losses", losses, episodes)
        write(writer, "charts", charts, episodes)
        if writer:
            samples = zip(heads[:4], texts[:4], strict=True)
            writer.add_text("texts", "\n\n".join(map("".join, samples)), episodes)
        every = args.checkpoint_every
        if every is not None and rank == 0 and (step % every == 0 or step == num_rollouts):
            state = {name: learner.state_dict() for name, learner in learners.items()}
            state |= {"rollout": step, "kl_coef": adaptive_kl.coef, "rng": torch.get_rng_state()}
            state |= {"config": asdict(config), "tokenizer": tokenizer.to_str()}
            state |= {"prompts": list(lines), "before": before}
            save_checkpoint(run / "checkpoint.pt", state, args)
        if rank == 0 and (step % max(1, num_rollouts // 20) == 0 or step == num_rollouts):
            line = f"{step / num_rollouts:4.0%}  score {scores.mean():6.2f}  KL {kl:6.2f}"
            print(f"{line}  {speed:6,.1f} episodes/s  {left:3.0f} s left", flush=True)

    results = {}
    for name, group in groups.items():
        old, new = before[name], evaluate_texts(policy, reference, *group, tokenizer, args)
        results |= {f"{name}{key}_before": value for key, value in old[0].items()}
        results |= {f"{name}{key}": value for key, value in new[0].items()}
        wins = [(a > b) + (a == b) / 2 for a, b in zip(new[3], old[3], strict=True)]
        results[f"{name}win_rate"] = sum(wins) / len(wins)
        pairs = [
            f"{head} ...\n  before:{a!r}\n  after: {b!r}"
            for head, a, b in zip(new[1], old[2], new[2], strict=True)
        ]
        if rank == 0:
            print("", *pairs[:5], sep="\n")
        if writer:
            writer.add_text(f"{name}texts", "\n\n".join(pairs[:32]), num_rollouts * size)
    if writer:
        flags = "".join(f"|{flag}|{value}|\n" for flag, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}")
        write(writer, "eval", results, num_rollouts * size)
        writer.close()
    if args.save_dir is not None and rank == 0:
        save_gpt2(policy, tokenizer, args.save_dir)
    if processes > 1:
        dist.destroy_process_group()
    results["seconds"] = time.perf_counter() - start
    if rank == 0:
        print("\n" + describe(results, "", "training"))
        print(describe(results, "held_out_", "held-out") + f"  {results['seconds']:.1f} s")
    return results


if __name__ == "__main__":
    try:
        first = int(os.environ.get("RANK", 0)) == 0  # of the processes of torchrun
        main(tyro.cli(Args, description=__doc__, console_outputs=first))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        stop("no room on the disk for the events in runs/; make some, or use --no-tensorboard")
