"""PPO on GPT-2: write happier texts while staying close to the initial model.

    maximise over π:  J(π) = E[R(x, y)] - β · KL(π ‖ π_ref)    (prompts x, responses y ~ π)

This is ppo.py for text: GPT-2 with a tokenizer, prompts of different lengths, a reward that reads
the response, and a β that adapts to a target KL. By default a small GPT-2 is first pretrained on
sentences of a grammar in this file; --model takes any GPT-2 from the Hugging Face hub or from a
directory. For your own task, pass --prompts and edit score_texts.

PPO: Schulman et al. 2017 (arXiv:1707.06347). On language models, with an adaptive KL penalty:
Ziegler et al. 2019 (arXiv:1909.08593).

    python gpt2_sentiment.py                       # held-out reward 7 -> 33 at a KL of 3.7 nats
    python gpt2_sentiment.py --model gpt2          # the 124M model; --device cuda --bf16 on a GPU
    torchrun --nproc-per-node 2 gpt2_sentiment.py  # data parallel; --help lists every flag
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy>=1.26", "tyro>=0.9", "tensorboard>=2.16",
#                 "safetensors>=0.4", "tokenizers>=0.20", "huggingface_hub>=0.25"]
# ///

import copy
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.nn  # AdamW would import it later, and gloo would then hang at the end
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    seed: int = 1  # random seed (the train/held-out split of the prompts is fixed)
    device: Literal["cpu", "cuda"] = "cpu"  # the embedded model needs no GPU
    bf16: bool = False  # forward passes in bfloat16; needs --device cuda
    tensorboard: bool = True  # log curves to runs/ (view with: tensorboard --logdir runs)
    save_dir: Path | None = None  # new folder for the final model, which transformers can open
    checkpoint_every: int | None = None  # rollouts between checkpoints in the run's folder
    resume: Path | None = None  # run folder to continue, with the flags it was started with

    # Task
    model: str = "embedded"  # a small GPT-2 trained at startup, a Hub name, or a directory
    prompts: Path | None = None  # text file with one prompt per line; every fifth is held out
    reward: Literal["sentiment", "plain", "positivity", "composite"] = "sentiment"  # see "Task"
    lexicon: Path | None = None  # for sentiment and plain: file with "word weight" on each line
    reward_model: Path | None = None  # maximise the score of this GPT2ForSequenceClassification
    pretrain_steps: int = 500  # pretraining steps of the embedded model
    eval_samples: int = 256  # responses sampled for each evaluation

    # Training
    total_episodes: int = 2_560  # sampled responses, rounded down to whole rollouts
    batch_size: int = 64  # responses per rollout
    update_epochs: int = 4  # passes over each rollout
    num_minibatches: int = 4  # gradient steps per pass
    micro_batch_size: int | None = None  # responses per forward pass; gradients are accumulated
    learning_rate: float | None = None  # peak; default 3e-4, for a loaded model 3.2e-4/sqrt(width)
    max_grad_norm: float = 1.0  # maximum norm for gradient clipping
    response_length: int = 20  # maximum number of response tokens
    temperature: float = 1.0  # divides all logits, of the policy and the reference
    top_k: int = 0  # sample from the k likeliest tokens; 0 = from all
    top_p: float = 1.0  # nucleus sampling: fewest tokens whose probability reaches this

    # PPO
    kl_coef: float = 3.0  # β at the start: weight of KL(policy ‖ reference)
    kl_target: float | None = 4.0  # adapt β to hold KL(policy ‖ reference) at this; None: fixed β
    kl_horizon: int = 500  # episodes in which the adaptive β can change by about 20%
    gamma: float = 1.0  # discount per token; usually 1, since the score is paid at the end
    gae_lambda: float = 0.95  # GAE λ: 0 = one-step TD, 1 = Monte Carlo (for long responses)
    clip_coef: float = 0.2  # ε: clipping range of the probability ratio π/π_old
    value_clip: float = 1.0  # clipping range of value updates, in units of the (scaled) returns
    vf_coef: float = 0.02  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    separate_critic: bool = False  # give the critic a GPT-2 of its own, not a head on the policy
    missing_eos_penalty: float = 0.0  # subtracted from the score of a response without EOS
    whiten_rewards: bool = True  # divide rewards by their standard deviation (see scale_rewards)
    normalize_advantages: bool = True  # whiten advantages over each rollout
    advantage_clip: float | None = None  # clip advantages to ± this, after any whitening
    target_kl: float | None = None  # end the epochs if the last approx_kl, per token, exceeds this

    def __post_init__(self):
        for name in ["save_dir", "resume", "prompts", "lexicon", "reward_model"]:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, Path(value))  # may be a str, as in a checkpoint


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def one_line(error):
    """The message of an exception, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_writable(folder):
    return folder.is_dir() and os.access(folder, os.W_OK)


def check_args(args):
    """Exit with an error if a flag's value makes no sense."""
    runs = Path("runs") if os.path.lexists("runs") else Path(".")
    resume = args.resume
    changed = [f.name for f in fields(args) if getattr(args, f.name) != f.default]
    _, processes = rank_and_processes()
    minibatch_size = args.batch_size // max(1, args.num_minibatches)
    rules = [
        (args.device == "cpu" or torch.cuda.is_available(), "--device cuda: no GPU is available"),
        (args.device == "cuda" or not args.bf16, "--bf16 needs --device cuda"),
        (not args.tensorboard or is_writable(runs), "runs/ is not writable; use --no-tensorboard"),
        (
            args.checkpoint_every is None or is_writable(runs),
            "--checkpoint-every: runs/ is not writable",
        ),
        (
            resume is None or changed == ["resume"],
            f"--resume {resume} continues with the flags it was started with; give no other flag",
        ),
        (
            resume is None or (resume / "checkpoint.pt").is_file(),
            f"--resume {resume}: no checkpoint.pt there; --checkpoint-every writes it",
        ),
        (0 <= args.seed < 2**63, f"--seed {args.seed} must be in [0, 2**63)"),
        (args.pretrain_steps >= 0, f"--pretrain-steps {args.pretrain_steps} must be 0 or more"),
        (args.eval_samples >= 2, f"--eval-samples {args.eval_samples} must be at least 2"),
        (args.batch_size >= 1, f"--batch-size {args.batch_size} must be at least 1"),
        (args.total_episodes >= args.batch_size, "--total-episodes must be at least --batch-size"),
        (args.update_epochs >= 1, f"--update-epochs {args.update_epochs} must be at least 1"),
        (
            args.num_minibatches >= 1 and args.batch_size % args.num_minibatches == 0,
            f"--num-minibatches {args.num_minibatches} must be at least 1 and divide --batch-size",
        ),
        (
            minibatch_size % processes == 0,
            f"--num-minibatches: {processes} processes cannot share {minibatch_size} responses",
        ),
        (
            args.eval_samples % processes == 0,
            f"--eval-samples {args.eval_samples} must be a multiple of the {processes} processes",
        ),
        (0 < args.max_grad_norm < 1e6, f"--max-grad-norm {args.max_grad_norm} must be in (0, 1e6)"),
        (args.response_length >= 1, f"--response-length {args.response_length} must be at least 1"),
        (1e-6 < args.temperature < 1e6, f"--temperature {args.temperature} must be in (1e-6, 1e6)"),
        (args.top_k >= 0, f"--top-k {args.top_k} must be 0 or more"),
        (1e-6 < args.top_p <= 1, f"--top-p {args.top_p} must be above 1e-6 and at most 1"),
        (0 <= args.kl_coef < 1e6, f"--kl-coef {args.kl_coef} must be in [0, 1e6)"),
        (args.kl_horizon >= 1, f"--kl-horizon {args.kl_horizon} must be at least 1"),
        (0 <= args.gamma <= 1, f"--gamma {args.gamma} must be between 0 and 1"),
        (0 <= args.gae_lambda <= 1, f"--gae-lambda {args.gae_lambda} must be between 0 and 1"),
        (0 < args.clip_coef < 1e6, f"--clip-coef {args.clip_coef} must be in (0, 1e6)"),
        (0 < args.value_clip < 1e6, f"--value-clip {args.value_clip} must be in (0, 1e6)"),
        (0 <= args.vf_coef < 1e6, f"--vf-coef {args.vf_coef} must be in [0, 1e6)"),
        (0 <= args.ent_coef < 1e6, f"--ent-coef {args.ent_coef} must be in [0, 1e6)"),
        (
            0 <= args.missing_eos_penalty < 1e6,
            f"--missing-eos-penalty {args.missing_eos_penalty} must be in [0, 1e6)",
        ),
    ]
    if args.save_dir is not None:
        save_dir = args.save_dir
        writable = is_writable(save_dir.parent)
        rules.append((writable, f"--save-dir {save_dir}: its folder is missing or not writable"))
        short = len(os.fsencode(save_dir.name)) <= 200
        rules.append((short, "--save-dir: the name is longer than 200 bytes"))
        new = not os.path.lexists(save_dir)
        rules.append((new, f"--save-dir {save_dir} exists already; move it away or name a new one"))
    if args.checkpoint_every is not None:
        valid = args.checkpoint_every >= 1
        rules.append((valid, f"--checkpoint-every {args.checkpoint_every} must be at least 1"))
    if args.micro_batch_size is not None:
        valid = args.micro_batch_size >= 1
        rules.append((valid, f"--micro-batch-size {args.micro_batch_size} must be at least 1"))
    if args.learning_rate is not None:
        valid = 0 < args.learning_rate < 1
        rules.append((valid, f"--learning-rate {args.learning_rate} must be in (0, 1)"))
    if args.kl_target is not None:
        rules.append(
            (0 < args.kl_target < 1e6, f"--kl-target {args.kl_target} must be in (0, 1e6)")
        )
        error = "--kl-target cannot adapt --kl-coef 0; start above 0 or use --kl-target None"
        rules.append((args.kl_coef > 0, error))
    if args.advantage_clip is not None:
        valid = 0 < args.advantage_clip < 1e6
        rules.append((valid, f"--advantage-clip {args.advantage_clip} must be in (0, 1e6)"))
    if args.target_kl is not None:
        rules.append(
            (0 < args.target_kl < 1e6, f"--target-kl {args.target_kl} must be in (0, 1e6)")
        )
        rules.append((args.update_epochs >= 2, "--target-kl has no effect with --update-epochs 1"))
    # Reject flags that would have no effect.
    if args.lexicon is not None:
        valid = args.reward in ["sentiment", "plain"]
        rules.append((valid, f"--lexicon is not read with --reward {args.reward}"))
    if args.model != "embedded":
        default = args.pretrain_steps == Args.pretrain_steps
        rules.append((default, "--pretrain-steps is only for --model embedded"))
    if args.kl_target is None:
        default = args.kl_horizon == Args.kl_horizon
        rules.append((default, "--kl-horizon needs a --kl-target"))
    for valid, error in rules:
        if not valid:
            fail(error)


# ---------------------------------------------------------------------------- Task
# The embedded model's sentences are an opening and clauses. The openings are the default prompts.
TUTORIAL_PROMPTS = [  # four of the openings, from the tutorial "RL for LLMs" by Abbie Petulante
    "I feel happy when",
    "The best part about this is",
    "I love how",
    "Today was great because",
]
OPENINGS = [
    *[
        f"{day} was {mood} because"
        for day in ["Today", "Yesterday", "The weekend", "The party", "Our trip", "The evening"]
        for mood in ["great", "bad", "long"]
    ],
    *[f"{who} feel {mood} when" for who in ["I", "We"] for mood in ["happy", "sad", "calm"]],
    *[f"The {which} part about this is" for which in ["best", "worst", "odd"]],
    *[f"I {verb} how" for verb in ["love", "hate", "see"]],
    *[f"My {person} says that" for person in ["friend", "sister", "teacher"]],
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
PRESENT = {"is": "is", "have": "have", "makes": "makes"}
PAST = {"is": "was", "have": "had", "makes": "made"}
# fmt: off
NOUNS = {
    "thing": ["food", "music", "weather", "game", "story", "song", "cake", "film", "book", "garden",
              "room", "coffee"],
    "person": ["friend", "sister", "brother", "mother", "teacher", "neighbour"],
    "place": ["park", "school", "beach", "market", "lake", "station"],
}
GOOD_WORDS = {
    "adjective": ["good", "great", "excellent", "wonderful", "amazing", "awesome", "fun", "super",
                  "incredible", "perfect"],
    "mood": ["happy", "glad"],
    "verb": ["love", "like"],
}
BAD_WORDS = {
    "adjective": ["bad", "awful", "terrible", "horrible", "lame", "gross", "cold", "broken", "late",
                  "dull"],
    "mood": ["sad", "upset", "angry"],
    "verb": ["hate", "fear"],
}
NEUTRAL_WORDS = {
    "adjective": ["small", "big", "old", "new", "green", "quiet", "short", "plain", "red",
                  "simple"],
    "mood": ["calm", "quiet", "surprised"],
    "verb": ["see", "know"],
}
# The words that --reward sentiment and plain count. Good ones weigh five times as much as bad ones.
# Not all bad words of the grammar are in it.
LEXICON = {
    "good": 5, "glad": 5, "like": 5,
    "great": 10, "happy": 10, "awesome": 10, "fun": 10, "super": 10,
    "excellent": 15, "wonderful": 15, "amazing": 15, "love": 15, "incredible": 15, "perfect": 15,
    "bad": -1, "lame": -1, "sad": -1,
    "awful": -2, "angry": -2, "gross": -2, "upset": -2,
    "terrible": -3, "horrible": -3, "hate": -3,
}
# fmt: on
EOS_TEXT = "<|endoftext|>"


def write_sentences(count, seed):
    """Sentences of the grammar: an opening and one to three clauses, each with a random feeling."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(count):
        opening = rng.choice(OPENINGS)
        tense = PAST if "was" in opening else PRESENT
        text = opening
        for clause in range(rng.choice([1, 2, 2, 3])):
            feeling = rng.choice([GOOD_WORDS, BAD_WORDS, NEUTRAL_WORDS])
            words = {name: rng.choice(choices) for name, choices in (NOUNS | feeling).items()}
            if clause > 0:
                text += rng.choice([" and ", ", but ", " while "])
            elif opening.endswith(" is"):
                text += " that "
            else:
                text += " "
            text += rng.choice(CLAUSES).format(**words, **tense)
        sentences.append(re.sub(r"\ba (?=[aeiou])", "an ", text) + ".")
    return sentences


def read_lines(path, flag):
    """The non-blank lines of a UTF-8 file, without a byte order mark."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{flag} {path}: cannot be read ({one_line(error)})")
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        fail(f"{flag} {path} has no lines")
    return lines


def read_prompts(path):
    """Prompts to train on and held-out prompts: lists of texts, from the file or the grammar.

    With fewer than five lines none is held out; grammar openings are used instead. Held out means
    from PPO: the embedded model was pretrained on all openings of the grammar.
    """
    others = sorted(set(OPENINGS) - set(TUTORIAL_PROMPTS))
    random.Random(20).shuffle(others)
    if path is None:
        return TUTORIAL_PROMPTS + others[10:], others[:10]
    lines = list(dict.fromkeys(read_lines(path, "--prompts")))  # each once
    test = lines[4::5] or others[:10]
    train = [line for i, line in enumerate(lines) if i % 5 != 4]
    return train, test


def read_lexicon(path):
    """Word weights: those of the file, which has a word and a number on each line, or LEXICON."""
    if path is None:
        return LEXICON
    lexicon = {}
    for line in read_lines(path, "--lexicon"):
        try:
            text, weight = line.split()
            (word,) = split_words(text)
            lexicon[word] = float(weight)
        except ValueError:
            fail(f"--lexicon {path}: {line[:60]!r} is not a word and a number")
        if not math.isfinite(lexicon[word]):
            fail(f"--lexicon {path}: the weight of {word} is not finite")
    return lexicon


def split_words(text):
    """Words in lower case, without punctuation; an apostrophe (don't) does not split a word."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


def sentiment_reward(response, lexicon):
    """Sum of the weights of the response's words, but at least 0.1, as in the tutorial."""
    return max(0.1, sum(lexicon.get(word, 0) for word in split_words(response)))


def plain_reward(response, lexicon):
    """+1 for each good word and -1 for each bad word (appendix 2 of the tutorial)."""
    weights = [lexicon.get(word, 0) for word in split_words(response)]
    return float(sum(w > 0 for w in weights) - sum(w < 0 for w in weights))


def positivity_reward(prompt, response):
    """Share of good words (-0.5 for a negated one) times the share of distinct words; 0 to 1."""
    positive_words = ["good", "great", "excellent", "wonderful", "amazing"]
    negations = ["not", "never", "don't", "no"]
    words = split_words(response)
    previous = (split_words(prompt) or [""])[-1]  # a negation can end the prompt
    score = 0.0
    for word in words:
        if word in positive_words:
            score += -0.5 if previous in negations else 1.0
        previous = word
    length = max(len(words), 1)
    return min(max(score / length * len(set(words)) / length, 0.0), 1.0)


def composite_reward(prompt, response):
    """0.2 · length (50 to 500 words) + 0.5 · relevance (words of the prompt) + 0.3 · formatting."""
    count = len(response.split())
    length = min(1.0, count / 50)
    if count > 500:
        length = max(0.0, 1 - (count - 500) / 500)
    prompt_words = set(split_words(prompt))
    relevance = len(prompt_words & set(split_words(response))) / max(len(prompt_words), 1)
    patterns = ["\n\n", r"[.!?]\s+[A-Z]", r"\A ?[A-Z]"]  # paragraphs, sentences, a capital
    formatting = sum(1 for pattern in patterns if re.search(pattern, response)) / 3
    return 0.2 * length + 0.5 * relevance + 0.3 * formatting


def score_texts(prompts, responses, kind, lexicon):
    """Rewards of the responses (texts), one number each."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        if kind == "sentiment":
            score = sentiment_reward(response, lexicon)
        elif kind == "plain":
            score = plain_reward(response, lexicon)
        elif kind == "positivity":
            score = positivity_reward(prompt, response)
        else:
            score = composite_reward(prompt, response)
        scores.append(score)
    return scores


def to_scores(rewards, count, device):
    """Rewards as float32 scores (B,). They must be one finite number per response."""
    try:
        scores = torch.as_tensor(rewards, dtype=torch.float32, device=device).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        fail(f"the reward is a {type(rewards).__name__}, not {count} numbers ({one_line(error)})")
    if scores.shape != (count,):
        fail(f"the reward has shape {tuple(scores.shape)} for {count} responses")
    if not scores.isfinite().all():
        fail(f"a reward is {scores[~scores.isfinite()][0]:.0f}; every reward must be finite")
    return scores


# ---------------------------------------------------------------------------- Model
PAD = -1  # pads the shorter prompts of a batch on the left; not a token of the vocabulary


@dataclass
class Config:
    """Sizes of a GPT-2, named as in Hugging Face's config.json. Defaults: the 124M GPT-2."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int = 50256
    eos_token_id: int = 50256


class KVCache:
    """Keys and values of all tokens read so far, so that sampling reads each token only once."""

    def __init__(self, size):
        self.capacity = size  # room for this many tokens
        self.layers = {}
        # GPT2.forward updates these two.
        self.length = 0
        self.mask = None  # (B, length), false at padding

    def append(self, layer, k, v):
        """Store the new tokens' keys and values, (B, H, T, D/H). Returns those of all tokens."""
        if layer not in self.layers:
            B, H, _, head_width = k.shape
            self.layers[layer] = k.new_empty(2, B, H, self.capacity, head_width)
        keys, values = self.layers[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


def linear(x, weight, bias=None):
    """F.linear. On a CPU, inputs of one token per row, as in sampling, are computed as (W xᵀ)ᵀ.

    On two cores the 124M GPT-2 samples 1.2 times as fast by this.
    """
    one_token = x.dim() == 2 or x.shape[1] == 1
    if x.is_cuda or not one_token:
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    outputs = (weight @ rows.t()).t().reshape(*x.shape[:-1], len(weight))
    if bias is not None:
        outputs = outputs + bias
    return outputs


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class GPT2Block(nn.Module):
    """Pre-LN transformer block, (B, T, D) to (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.heads = config.n_head
        self.ln_1 = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.attn = nn.ModuleDict(
            {"c_attn": Linear(width, 3 * width), "c_proj": Linear(width, width)}
        )
        self.ln_2 = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.mlp = nn.ModuleDict(
            {"c_fc": Linear(width, 4 * width), "c_proj": Linear(4 * width, width)}
        )

    def forward(self, x, visible, cache, layer):
        """visible: (B, 1, T, S), which of the S tokens each of the T new tokens attends to."""
        B, T, D = x.shape
        qkv = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Tokens (B, T) to hidden states (B, T, D); head maps these to logits.

    Parameters are named as in Hugging Face's files. There is no dropout: with it, the policy that
    samples would differ from the policy whose log-probabilities are computed.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([GPT2Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def forward(self, tokens, cache=None):
        """PAD tokens are not attended to. With a cache, tokens follow those read before."""
        mask = tokens != PAD
        past = 0 if cache is None else cache.length
        if past > 0:
            mask = torch.cat([cache.mask, mask], 1)
        S = mask.shape[1]
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]  # counted from the first real token
        x = self.wte(tokens.clamp(min=0)) + self.wpe(position)

        keys = torch.arange(S, device=tokens.device)
        queries = torch.arange(past, S, device=tokens.device)[:, None]
        visible = (keys <= queries) & mask[:, None]  # (B, T, S)
        visible = visible | (keys == queries)  # padding sees itself: softmax over nothing is NaN
        for layer, block in enumerate(self.h):
            x = block(x, visible[:, None], cache, layer)
        if cache is not None:
            cache.length = S
            cache.mask = mask
        return self.ln_f(x)

    def head(self, states):
        """Logits, without a bias: states / temperature give logits / temperature."""
        return linear(states, self.wte.weight)


class Critic(nn.Module):
    """Values (B, R): a linear head on the policy's hidden states, or on those of its own GPT-2."""

    def __init__(self, policy, separate):
        super().__init__()
        self.gpt = copy.deepcopy(policy) if separate else None
        self.value = nn.Linear(policy.config.n_embd, 1)
        nn.init.zeros_(self.value.weight)  # at first every value is 0
        nn.init.zeros_(self.value.bias)

    def forward(self, states, prompts, responses):
        if self.gpt is not None:
            states = response_states(self.gpt, prompts, responses)
        return self.value(states).squeeze(2).float()


class TextRewardModel(nn.Module):
    """Prompts and responses (texts) to scores (B,), by a GPT-2 with a scalar head.

    Like GPT2ForSequenceClassification, it scores at the last token of the text: the response's last
    token before EOS. The text is read with the reward model's own tokenizer. A model that was
    trained with EOS after each text needs it here, too: append it in forward.
    """

    def __init__(self, gpt, tokenizer):
        super().__init__()
        self.gpt = gpt
        self.tokenizer = tokenizer
        self.score = nn.Linear(gpt.config.n_embd, 1, bias=False)

    def forward(self, prompts, responses):
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            tokens = self.tokenizer.encode(prompt + response, add_special_tokens=False).ids
            tokens = tokens or [self.gpt.config.eos_token_id]  # an empty text
            rows.append(tokens[-self.gpt.config.n_positions :])  # of a long text, the end
        scores = []
        for tokens in pad_left(rows).to(self.score.weight.device).split(64):
            last_states = self.gpt(tokens)[:, -1]  # with left padding, every text ends here
            scores.append(self.score(last_states).squeeze(1))
        return torch.cat(scores)


def train_tokenizer(sentences, vocab_size):
    """A byte-level BPE like GPT-2's: any text can be encoded, frequent words as one token."""
    tokenizer = byte_level_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def byte_level_tokenizer(bpe):
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def embedded_gpt2(sentences):
    """A small GPT-2 with random weights, and a tokenizer trained on the sentences."""
    tokenizer = train_tokenizer(sentences, 640)  # enough for every word of the grammar
    config = Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=64,
        n_embd=64,
        n_layer=3,
        n_head=4,
        bos_token_id=tokenizer.token_to_id(EOS_TEXT),
        eos_token_id=tokenizer.token_to_id(EOS_TEXT),
    )
    policy = GPT2(config)
    for name, parameter in policy.named_parameters():
        std = 0.02
        if "c_proj" in name:  # smaller in residual projections (Radford et al. 2019)
            std = 0.02 / math.sqrt(2 * policy.config.n_layer)
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return policy, tokenizer


def pretrain_gpt2(policy, tokenizer, sentences, steps):
    """Maximise the likelihood of the sentences, each after BOS and before EOS (the same token)."""
    eos = policy.config.eos_token_id
    device = policy.wte.weight.device
    rows = [[eos, *encoding.ids, eos] for encoding in tokenizer.encode_batch(sentences)]
    tokens = pad_left(rows).to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        # Linear warmup over the first 5% of the steps, then linear decay.
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1 - step / steps, 20 * (step + 1) / steps)
        batch = tokens[torch.randint(len(tokens), (64,)).to(device)]
        logits = policy.head(policy(batch[:, :-1]))
        # Do not learn what follows padding.
        is_padding = batch[:, :-1] == PAD
        targets = batch[:, 1:].masked_fill(is_padding, PAD)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


# ---------------------------------------------------------------------------- Sampling
# Shapes: B responses, P prompt tokens, R response tokens, D hidden size, V vocabulary size.
def pad_left(rows):
    """Lists of tokens to a tensor (N, P), with PAD to the left of the shorter ones."""
    width = max(len(row) for row in rows)
    return torch.tensor([[PAD] * (width - len(row)) + row for row in rows])


def encode_prompts(tokenizer, texts, bos):
    """Texts to tokens (N, P), each after BOS."""
    encodings = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return pad_left([[bos, *encoding.ids] for encoding in encodings])


def decode_texts(tokenizer, prompts, responses, eos):
    """Tokens to the texts of the prompts and of the responses, up to EOS: two lists.

    Each response is decoded together with its prompt, since some decoders drop the space that a
    text begins with.
    """
    prompt_rows = []
    whole_rows = []
    for prompt, response in zip(prompts.tolist(), responses.tolist(), strict=True):
        prompt = [token for token in prompt if token != PAD][1:]  # without BOS
        if eos in response:
            response = response[: response.index(eos)]
        prompt_rows.append(prompt)
        whole_rows.append(prompt + response)
    prompt_texts = tokenizer.decode_batch(prompt_rows)
    whole_texts = tokenizer.decode_batch(whole_rows)
    pairs = zip(prompt_texts, whole_texts, strict=True)
    return prompt_texts, [whole[len(prompt) :] for prompt, whole in pairs]


def likely_tokens(logits, top_k, top_p):
    """The tokens that may be sampled, true or false: (B, V), or (B, 1) if all may.

    They are the top_k likeliest, and of these the fewest whose probabilities reach top_p.
    """
    if top_k == 0 and top_p == 1:
        return torch.ones_like(logits[:, :1], dtype=torch.bool)
    values, tokens = logits.sort(descending=True, stable=True)
    allowed = torch.ones_like(values, dtype=torch.bool)
    if top_k > 0:
        allowed[:, top_k:] = False
    if top_p < 1:
        probs = values.masked_fill(~allowed, -math.inf).softmax(1)
        likelier = probs.cumsum(1) - probs  # total probability of the tokens before this one
        allowed = allowed & (likelier < top_p)
    return torch.zeros_like(allowed).scatter(1, tokens, allowed)


def restrict(logits, allowed):
    """Logits with the tokens that are not allowed at probability 0.

    Their logit is the lowest number rather than -inf, since 0 · -inf in an entropy would be NaN.
    """
    if allowed.shape[-1] == 1:  # all are allowed: make no copy of the logits
        return logits
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)


@torch.no_grad()
def generate_responses(policy, prompts, noise, temperature, top_k, top_p):
    """Sample responses (B, R). Each ends at its first EOS and is padded with EOS.

    noise (B, R) is uniform on [0, 1). Each token is the first whose cumulative probability exceeds
    its noise, so a response depends neither on the other rows nor on the number of processes. Also
    returns the tokens that were allowed at each step (B, R, V), or (B, R, 1) for all.
    """
    eos = policy.config.eos_token_id
    cache = KVCache(prompts.shape[1] + noise.shape[1])
    tokens = prompts
    ended = torch.zeros(len(prompts), 1, dtype=torch.bool, device=prompts.device)
    responses = []
    allowed = []
    for t in range(noise.shape[1]):
        states = policy(tokens, cache)[:, -1]  # (B, D)
        logits = policy.head(states / temperature).float()  # (B, V)
        likely = likely_tokens(logits, top_k, top_p)
        allowed.append(likely)
        probs = restrict(logits, likely).softmax(1)
        cumulative = probs.cumsum(1, dtype=torch.float64)
        u = noise[:, t : t + 1] * cumulative[:, -1:]  # the last is 1, up to rounding
        tokens = torch.searchsorted(cumulative, u, right=True)  # (B, 1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # if the logits are NaN
        tokens = torch.where(ended, eos, tokens)
        ended = ended | (tokens == eos)
        responses.append(tokens)
    return torch.cat(responses, 1), torch.stack(allowed, 1)


def mask_to_eos(responses, eos):
    """True up to and including the first EOS: stopping is learned, padding is ignored. (B, R)"""
    is_eos = (responses == eos).long()
    return (is_eos.cumsum(1) - is_eos) == 0  # no EOS before this token


def response_states(gpt, prompts, responses):
    """Hidden states that predict the response tokens: those one position before. (B, R, D)"""
    tokens = torch.cat([prompts, responses[:, :-1]], 1)
    return gpt(tokens)[:, prompts.shape[1] - 1 :]


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)


def response_logits(policy, prompts, responses, allowed, args):
    """Hidden states (B, R, D), and logits (B, R, V) at the sampling temperature.

    With --top-k or --top-p, every model is restricted to the tokens that were allowed in the
    rollout (the "keep sampling mask" of DeepSeek-V3.2, arXiv:2512.02556). With a set of its own, it
    could give a sampled token probability 0, and the ratio or the KL would be infinite. The KL is
    then between the restricted distributions.
    """
    with autocast(args):
        states = response_states(policy, prompts, responses)
        logits = policy.head(states / args.temperature).float()
    return states, restrict(logits, allowed)


def token_logprobs(logits, responses):
    """Log-probabilities of the response tokens. logits: (B, R, V); returns (B, R)."""
    losses = F.cross_entropy(logits.flatten(0, 1), responses.flatten(), reduction="none")
    return -losses.view_as(responses)


def token_kl(logits, ref_logits):
    """KL(policy ‖ reference) at each token, in nats, summed over the vocabulary. (B, R)"""
    logprobs = logits.log_softmax(2)
    return (logprobs.exp() * (logprobs - ref_logits.log_softmax(2))).sum(2)


def masked_sum(x, mask):
    """Sum over the tokens of each response where mask is true: (B, R) to (B,)."""
    return torch.where(mask, x, 0.0).sum(1)


def masked_mean(x, mask):
    """Mean over all tokens where mask is true: (B, R) to a scalar."""
    return masked_sum(x, mask).sum() / mask.sum()


def whiten(x, mask):
    """Give x (B, R) mean 0 and population variance 1 where mask is true; 0 elsewhere."""
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    return torch.where(mask, (x - mean) / (std + 1e-8), 0.0)


def distinct_2(texts):
    """Share of word bigrams that are distinct: low if the texts are alike (or longer, or more)."""
    pairs = [pair for text in texts for pair in pairwise(split_words(text))]
    return len(set(pairs)) / max(len(pairs), 1)


# Several processes (torchrun) draw the same random numbers. Each samples and trains on its share of
# the rows. What they sample is gathered, and gradients are summed, so all hold the same tensors.
def rank_and_processes():
    """The number of this process and how many there are."""
    started_by_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    processes = int(os.environ["WORLD_SIZE"]) if started_by_torchrun else 1
    rank = int(os.environ["RANK"]) if processes > 1 else 0
    return rank, processes


def share(rows):
    """The rows that this process works on."""
    rank, processes = rank_and_processes()
    return rows.chunk(processes)[rank]


def gather(tensor):
    """The rows of all processes, in order."""
    _, processes = rank_and_processes()
    if processes == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(processes)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def sum_over_processes(tensors):
    _, processes = rank_and_processes()
    if processes > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@torch.no_grad()
def sample_with_logits(policy, reference, prompts, noise, args):
    """Sample responses (B, R), and compute the policy's and the reference's logits for them.

    The policy reads them once more without the cache, as in training, so that the first ratio is 1.
    With --bf16 they were sampled from slightly different probabilities, which is not corrected.
    Also returns the tokens that were allowed (B, R, V) or (B, R, 1), the policy's hidden states
    (B, R, D), and the logits of both (B, R, V).
    """
    with autocast(args):
        responses, allowed = generate_responses(
            policy, prompts, noise, args.temperature, args.top_k, args.top_p
        )
    states, logits = response_logits(policy, prompts, responses, allowed, args)
    _, ref_logits = response_logits(reference, prompts, responses, allowed, args)
    return responses, allowed, states, logits, ref_logits


@torch.no_grad()
def sample_rollout(policy, critic, reference, prompts, noise, args):
    """Sample responses and compute log-probabilities and values, micro_batch_size at a time.

    Returns responses, old_logprobs, ref_logprobs and old_values, all (B, R), and the tokens that
    were allowed (B, R, V) or (B, R, 1).
    """
    size = args.micro_batch_size or len(prompts)
    chunks = []
    for x, u in zip(share(prompts).split(size), share(noise).split(size), strict=True):
        y, allowed, states, logits, ref_logits = sample_with_logits(policy, reference, x, u, args)
        with autocast(args):
            values = critic(states, x, y)
        logprobs = token_logprobs(logits, y)
        ref_logprobs = token_logprobs(ref_logits, y)
        chunks.append([y, logprobs, ref_logprobs, values, allowed])
    return [gather(torch.cat(parts)) for parts in zip(*chunks, strict=True)]


@torch.no_grad()
def evaluate_texts(policy, reference, prompts, tokenizer, reward_model, lexicon, args):
    """Sample args.eval_samples responses, cycling over prompts. Returns metrics, texts and scores.

    The KL is in nats per response; at each token it is summed over the vocabulary. Every call uses
    the same random numbers, so that responses before and after training can be compared in pairs.
    """
    eos = policy.config.eos_token_id
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.rand(
        args.eval_samples, args.response_length, generator=generator, dtype=torch.float64
    )
    noise = noise.to(prompts.device)
    prompts = prompts[torch.arange(args.eval_samples) % len(prompts)]
    size = args.micro_batch_size or args.batch_size
    responses = []
    kl = []
    for x, u in zip(share(prompts).split(size), share(noise).split(size), strict=True):
        y, _, _, logits, ref_logits = sample_with_logits(policy, reference, x, u, args)
        responses.append(y)
        kl.append(masked_sum(token_kl(logits, ref_logits), mask_to_eos(y, eos)))
    responses = gather(torch.cat(responses))
    kl = gather(torch.cat(kl))

    prompt_texts, texts = decode_texts(tokenizer, prompts, responses, eos)
    scores = score_texts(prompt_texts, texts, args.reward, lexicon)
    scores = to_scores(scores, len(texts), prompts.device)
    metrics = {
        "reward": scores.mean().item(),
        "reward_error": scores.std().item() / len(scores) ** 0.5,
        "kl": kl.mean().item(),
        "kl_error": kl.std().item() / len(kl) ** 0.5,
        "length": mask_to_eos(responses, eos).sum(1).float().mean().item(),
        "distinct_2": distinct_2(texts),
    }
    if reward_model is not None:
        learned = to_scores(reward_model(prompt_texts, texts), len(texts), prompts.device)
        metrics["learned_reward"] = learned.mean().item()
    return metrics, prompt_texts, texts, scores


# ---------------------------------------------------------------------------- PPO
def adapt_kl_coef(kl_coef, kl, kl_target, episodes, kl_horizon):
    """Steer the KL per response to its target (Ziegler et al. 2019, section 2.2). Returns β."""
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    # A batch longer than the horizon counts as one horizon, otherwise β could turn negative.
    return kl_coef * (1 + error * min(episodes / kl_horizon, 1.0))


def token_rewards(scores, kl, mask, kl_coef):
    """Per-token rewards (B, R): -β·kl at every token, plus the score (B,) at the last one."""
    last = mask.sum(1, keepdim=True) - 1  # EOS, or the final token of a truncated response
    rewards = (-kl_coef * kl).scatter_add(1, last, scores[:, None])
    return torch.where(mask, rewards, 0.0)


def scale_rewards(rewards, mask):
    """Divide rewards (B, R) by the population standard deviation of the rollout's token rewards.

    The mean is not subtracted: that would add a constant per token and so favour some lengths. (TRL
    subtracts it before the division and adds it back afterwards, undivided.) Score and KL penalty
    are divided alike. In the default run the deviation grows from 2 to 9, so the returns shrink,
    and the critic's values are too large until it has caught up.
    """
    mean = masked_mean(rewards, mask)
    std = masked_mean((rewards - mean) ** 2, mask).sqrt()
    if std < 1e-6:  # all rewards are equal
        std = torch.ones_like(std)
    return torch.where(mask, rewards / (std + 1e-8), 0.0)


def compute_gae(rewards, values, mask, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, values, mask: (B, R). Returns advantages and λ-returns, both (B, R), zero after EOS.
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

    Summed over tokens, averaged over responses. At π = π_old its expected gradient is that of -J if
    the advantages are unbiased: γ = 1; λ = 1 or an exact critic; neither whitened nor clipped. A
    mean over the tokens of each response would give the tokens of short responses more weight.
    """
    logratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    objective = torch.min(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        metrics = {
            # KL(π_old ‖ π) by the k3 estimator, http://joschu.net/blog/kl-approx.html
            "approx_kl": masked_mean(ratio - 1 - logratio, mask),
            "clipfrac": masked_mean((ratio != clipped).float(), mask),  # share outside 1 ± ε
            "ratio": masked_mean(ratio, mask),  # 1, up to rounding, at a rollout's first step
        }
    return -masked_sum(objective, mask).mean(), metrics


def value_loss(values, old_values, returns, mask, value_clip):
    """Half the squared error of the values, or of the values clipped to within value_clip of the
    old ones, whichever is larger. Summed over tokens, averaged over responses.
    """
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error = torch.where(mask, values - returns, 0.0)
    clipped_error = torch.where(mask, clipped - returns, 0.0)
    return 0.5 * masked_sum(torch.max(error**2, clipped_error**2), mask).mean()


# ---------------------------------------------------------------------------- Files
SUPPORTED = {  # what GPT2 implements. If config.json lacks a key, the first value is assumed.
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "tie_word_embeddings": [True],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
}


def find_folder(name):
    """The directory of that name, or the one to which the files are downloaded from the hub."""
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        fail(f"--model {name}: no such directory")
    from huggingface_hub import logging, snapshot_download

    logging.set_verbosity_error()  # what goes wrong is said below, in one line
    files = ["config.json", "tokenizer.json", "vocab.json", "merges.txt", "model*.safetensors*"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=files))
        if not list(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns="pytorch_model.bin")
    except Exception as error:  # of the network, the hub or the disk
        fail(f"--model {name}: {one_line(error)}; use a directory or --model embedded")
    return folder


def read_config(path):
    """The Config in a config.json. ValueError if GPT2 does not support it."""
    raw = json.loads(path.read_text(encoding="utf-8-sig"))
    if raw.get("model_type") != "gpt2":
        raise ValueError(f"model_type is {raw.get('model_type')!r}; supported: 'gpt2'")
    for key, values in SUPPORTED.items():
        if raw.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {raw[key]!r}; supported: {values}")
    config = Config()
    for field in fields(Config):
        value = raw.get(field.name, field.default)
        if type(value) not in (int, field.type) or value < 0:  # an int may stand for a float
            raise ValueError(
                f"{field.name} is {value!r}, not a {field.type.__name__} of at least 0"
            )
        setattr(config, field.name, value)
    if min(config.n_layer, config.n_head, config.n_embd, config.n_positions) < 1:
        raise ValueError("n_layer, n_head, n_embd and n_positions must be at least 1")
    if config.n_embd % config.n_head != 0:
        raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"n_inner is {raw['n_inner']}; supported: 4 * n_embd")
    if max(config.bos_token_id, config.eos_token_id) >= config.vocab_size:
        raise ValueError("bos_token_id or eos_token_id is not in the vocabulary")
    return config


def read_weights(path):
    """All tensors by name, from model.safetensors, its shards by their index, or a pickle."""
    if path.name.endswith(".index.json"):
        names = json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"].values()
        shards = [load_file(path.parent / name) for name in sorted(set(names))]
        weights = {name: x for shard in shards for name, x in shard.items()}
    elif path.suffix == ".safetensors":
        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    for name, x in weights.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return weights


def transpose_linear(weights):
    """Hugging Face stores the weights of linear layers as (in, out), nn.Linear as (out, in)."""
    is_linear = re.compile(r"\.c_\w+\.weight$")
    return {name: (x.t() if is_linear.search(name) else x) for name, x in weights.items()}


def rename_weights(weights):
    """Rename and transpose Hugging Face's tensors for GPT2, as float32; drop those not used."""
    weights = {name.removeprefix("transformer."): x.float() for name, x in weights.items()}
    head = weights.pop("lm_head.weight", None)  # tied to wte: some files have only one of them
    if head is not None:
        embedding = weights.setdefault("wte.weight", head)
        if not torch.equal(embedding, head):
            raise ValueError("lm_head.weight differs from wte.weight (untied heads)")
    unused = (".attn.bias", ".attn.masked_bias")  # causal masks in old files
    weights = {name: x for name, x in weights.items() if not name.endswith(unused)}
    weights = {name: x for name, x in weights.items() if not name.startswith("v_head.")}  # of TRL
    return {name: x.contiguous() for name, x in transpose_linear(weights).items()}


def read_tokenizer(path):
    """The tokenizer in tokenizer.json, or in vocab.json and the merges.txt beside it."""
    if path.name == "vocab.json":
        merges = first_file(path.parent, ["merges.txt"])
        bpe = models.BPE.from_file(str(path), str(merges))
        tokenizer = byte_level_tokenizer(bpe)
        tokenizer.add_special_tokens([EOS_TEXT])
    else:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    tokenizer.no_truncation()  # a tokenizer.json can hold both switched on
    tokenizer.no_padding()
    return tokenizer


def first_file(folder, names):
    """The first of the files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{' or '.join(names)} is missing")


def load_gpt2(folder, flag="--model"):
    """GPT-2, tokenizer, and the weights of a score head or None, from a Hugging Face directory."""
    path = folder  # what is being read, for the error message
    try:
        config_path = first_file(folder, ["config.json"])
        weights_path = first_file(
            folder, ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
        )
        tokenizer_path = first_file(folder, ["tokenizer.json", "vocab.json"])
        path = config_path
        config = read_config(path)
        path = weights_path
        weights = rename_weights(read_weights(path))
        score = weights.pop("score.weight", None)
        with torch.device("meta"):  # allocate nothing: the file's weights replace these
            gpt = GPT2(config)
        gpt.load_state_dict(weights, assign=True)
        path = tokenizer_path
        tokenizer = read_tokenizer(path)
        size = tokenizer.get_vocab_size()
        # Some models pad the vocabulary to a multiple of 64 for speed; the extra ids have no text.
        padded = config.vocab_size % 64 == 0 and 0 <= config.vocab_size - size < 128
        if config.vocab_size != size and not padded:
            raise ValueError(f"the tokenizer has {size} tokens, the weights {config.vocab_size}")
    except Exception as error:  # a file can be wrong in any number of ways
        fail(f"{flag} {folder}: {path.name} cannot be used ({one_line(error)})")
    return gpt, tokenizer, score


def load_text_reward_model(folder, device):
    """A GPT2ForSequenceClassification with one output, as transformers and TRL save it."""
    gpt, tokenizer, score = load_gpt2(folder, "--reward-model")
    reward_model = TextRewardModel(gpt, tokenizer)
    if score is None or score.shape != reward_model.score.weight.shape:
        fail(f"--reward-model {folder}: no score.weight with one output")
    reward_model.score.weight.data = score
    return reward_model.to(device).requires_grad_(False)


def save_gpt2(policy, tokenizer, folder):
    """Write a directory that transformers opens. Returns None, or an error message.

    The saved tokenizer puts BOS before every text, as the prompts had it in training. The folder is
    written under another name first, so it is never half-written.
    """
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    config = policy.config
    settings = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in SUPPORTED.items()},
        **asdict(config),
        "n_inner": None,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    bos = tokenizer.id_to_token(config.bos_token_id)
    eos = tokenizer.id_to_token(config.eos_token_id)
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.n_positions,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
    }
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, config.bos_token_id)]
    )
    weights = transpose_linear(policy.state_dict())
    weights = {f"transformer.{name}": x.contiguous() for name, x in weights.items()}
    try:
        part.mkdir()
        (part / "config.json").write_text(json.dumps(settings, indent=2))
        (part / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings, indent=2))
        tokenizer.save(str(part / "tokenizer.json"))
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    except Exception as error:  # e.g. a full disk; safetensors and tokenizers raise their own
        shutil.rmtree(part, ignore_errors=True)
        return f"--save-dir {folder}: not written ({one_line(error)})"
    try:
        os.rename(part, folder)
    except OSError as error:
        return f"--save-dir {folder}: not written ({one_line(error)}); the model is in {part}"
    return None


def save_checkpoint(path, state, args):
    """Write all that --resume needs. The file is never half-written."""
    flags = asdict(args)
    for name, value in flags.items():
        if isinstance(value, Path):
            flags[name] = str(value)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save({"args": flags, **state}, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        fail(f"--checkpoint-every: {path} cannot be written ({one_line(error)})")


def load_checkpoint(run):
    """The state that save_checkpoint wrote, and the Args of that run."""
    try:
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        args = Args(**state["args"])
    except Exception as error:  # a file can be wrong in any number of ways
        reason = f"damaged, or of another version of this script ({type(error).__name__})"
        fail(f"--resume {run}: checkpoint.pt is {reason}")
    return state, args


# ---------------------------------------------------------------------------- Training
def main(args):
    start_time = time.time()
    check_args(args)
    args = replace(args)  # a copy, since the learning rate may be filled in below
    state = None
    run_folder = args.resume
    if run_folder is not None:
        state, args = load_checkpoint(run_folder)
        check_args(args)
    if args.reward_model is not None and not args.reward_model.is_dir():
        fail(f"--reward-model {args.reward_model}: no such directory")
    rank, processes = rank_and_processes()
    if processes > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    device = args.device

    # Policy, tokenizer and prompts; the reward.
    if state is not None:
        policy = GPT2(Config(**state["config"]))
        tokenizer = Tokenizer.from_str(state["tokenizer"])
        train_texts, test_texts = state["prompts"]
        lexicon = state["lexicon"]
    else:
        train_texts, test_texts = read_prompts(args.prompts)
        lexicon = read_lexicon(args.lexicon)
        if args.model == "embedded":
            sentences = write_sentences(8_000, args.seed)
            policy, tokenizer = embedded_gpt2(sentences)
            policy.to(device)
            pretrain_gpt2(policy, tokenizer, sentences, args.pretrain_steps)
        else:
            policy, tokenizer, score_head = load_gpt2(find_folder(args.model))
            if score_head is not None:
                fail(f"--model {args.model} is a reward model; use it with --reward-model")
    policy.to(device)
    config = policy.config
    eos = config.eos_token_id
    train_prompts = encode_prompts(tokenizer, train_texts, config.bos_token_id).to(device)
    test_prompts = encode_prompts(tokenizer, test_texts, config.bos_token_id).to(device)
    for texts, prompts in [(train_texts, train_prompts), (test_texts, test_prompts)]:
        lengths = (prompts != PAD).sum(1)
        if lengths.max() + args.response_length > config.n_positions:
            fail(
                f"the {lengths.max()} tokens of prompt {texts[lengths.argmax()][:40]!r} and "
                f"--response-length {args.response_length} exceed the model's context of "
                f"{config.n_positions} tokens"
            )
    reward_model = None
    if args.reward_model is not None:
        reward_model = load_text_reward_model(args.reward_model, device)
    if args.learning_rate is None:
        # Found by trial: a loaded model needs smaller steps. 1.2e-5 for the 124M model.
        loaded_rate = 3.2e-4 / math.sqrt(config.n_embd)
        args.learning_rate = 3e-4 if args.model == "embedded" else loaded_rate

    # Reference, critic, optimizer.
    if processes > 1:  # each has made its own model: start from the same weights
        for parameter in policy.parameters():
            dist.broadcast(parameter.data, 0)
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic = Critic(policy, args.separate_critic).to(device)
    head_parameters = list(critic.value.parameters())
    trunk_parameters = list(policy.parameters())
    if critic.gpt is not None:
        trunk_parameters += list(critic.gpt.parameters())
    parameters = [*trunk_parameters, *head_parameters]
    groups = [{"params": trunk_parameters}, {"params": head_parameters}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    kl_coef = args.kl_coef
    recent_scores = []  # of the rollouts since the last progress line
    first_rollout = 1
    if state is not None:
        policy.load_state_dict(state["policy"])
        reference.load_state_dict(state["reference"])
        critic.load_state_dict(state["critic"])
        optimizer.load_state_dict(state["optimizer"])
        kl_coef = state["kl_coef"]
        recent_scores = state["recent_scores"]
        first_rollout = state["rollout"] + 1

    # Responses before training, to compare with: the reference's, also after --resume.
    evaluation_inputs = [tokenizer, reward_model, lexicon, args]
    train_before = evaluate_texts(reference, reference, train_prompts, *evaluation_inputs)
    test_before = evaluate_texts(reference, reference, test_prompts, *evaluation_inputs)
    if state is not None:
        torch.set_rng_state(state["rng"])

    run_name = f"gpt2_sentiment__{args.seed}__{datetime.now():%Y-%m-%d-%H%M%S-%f}"
    writer = None
    if rank == 0:
        if run_folder is None and (args.tensorboard or args.checkpoint_every is not None):
            run_folder = Path("runs", run_name)
            os.makedirs(run_folder)  # fails if the folder exists: no two runs share one
        if run_folder is not None:
            run_name = run_folder.name
            for part in run_folder.glob("checkpoint.pt.*.part"):
                part.unlink()  # of a run that was killed
        count = sum(p.numel() for p in parameters)
        print(f"{run_name}: {count:,} parameters on {device}")
        if args.tensorboard:
            # When resuming, hide what the stopped run logged after its checkpoint.
            purge_step = None if state is None else state["rollout"] * args.batch_size + 1
            writer = SummaryWriter(str(run_folder), purge_step=purge_step)
    if writer:
        lines = [f"|{flag}|{value}|" for flag, value in asdict(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *lines]))

    loop_start_time = time.time()
    minibatch_size = args.batch_size // args.num_minibatches
    micro_batch_size = args.micro_batch_size or minibatch_size
    num_rollouts = args.total_episodes // args.batch_size
    warmup = max(1, num_rollouts // 10)
    for rollout in range(first_rollout, num_rollouts + 1):
        # Linear warmup over the first 10% of training, then linear decay to 0.
        decay = (num_rollouts - rollout + 1) / (num_rollouts - warmup + 1)
        learning_rate = args.learning_rate * min(rollout / warmup, decay)
        optimizer.param_groups[0]["lr"] = learning_rate
        # The value head starts from zero, so it learns ten times faster.
        optimizer.param_groups[1]["lr"] = 10 * learning_rate

        # 1. Rollout: sample a batch of responses and score their texts.
        prompt_rows = torch.randint(len(train_prompts), (args.batch_size,))
        # The random numbers that select the tokens, the same however many processes share the work.
        noise = torch.rand(args.batch_size, args.response_length, dtype=torch.float64)
        prompts = train_prompts[prompt_rows]  # (B, P)
        responses, old_logprobs, ref_logprobs, old_values, allowed = sample_rollout(
            policy, critic, reference, prompts, noise.to(device), args
        )  # each (B, R), except allowed: (B, R, V) or (B, R, 1)
        mask = mask_to_eos(responses, eos)  # (B, R)
        prompt_texts, texts = decode_texts(tokenizer, prompts, responses, eos)
        true_scores = score_texts(prompt_texts, texts, args.reward, lexicon)
        true_scores = to_scores(true_scores, args.batch_size, device)  # (B,)
        scores = true_scores  # unless there is a reward model
        if reward_model is not None:
            scores = to_scores(reward_model(prompt_texts, texts), args.batch_size, device)
        has_eos = (responses == eos).any(1)

        # 2. Advantages: how much better each token did than the critic expected.
        kl = old_logprobs - ref_logprobs  # (B, R), an unbiased estimate of KL(π ‖ π_ref)
        penalized_scores = torch.where(has_eos, scores, scores - args.missing_eos_penalty)
        rewards = token_rewards(penalized_scores, kl, mask, kl_coef)
        if args.whiten_rewards:
            rewards = scale_rewards(rewards, mask)
        advantages, returns = compute_gae(rewards, old_values, mask, args.gamma, args.gae_lambda)
        if args.normalize_advantages:
            advantages = whiten(advantages, mask)
        if args.advantage_clip is not None:
            advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)

        # 3. Update: several epochs of minibatch steps on the clipped objective.
        steps = []  # the metrics of each gradient step
        for _ in range(args.update_epochs):
            for minibatch in torch.randperm(args.batch_size).split(minibatch_size):
                optimizer.zero_grad()
                metrics = defaultdict(float)  # of this gradient step
                for rows in share(minibatch).split(micro_batch_size):
                    states, logits = response_logits(
                        policy, prompts[rows], responses[rows], allowed[rows], args
                    )
                    logprobs = token_logprobs(logits, responses[rows])
                    with autocast(args):
                        values = critic(states, prompts[rows], responses[rows])

                    pg_loss, token_metrics = policy_loss(
                        logprobs, old_logprobs[rows], advantages[rows], mask[rows], args.clip_coef
                    )
                    vf_loss = value_loss(
                        values, old_values[rows], returns[rows], mask[rows], args.value_clip
                    )
                    with torch.set_grad_enabled(args.ent_coef > 0):  # else it is only logged
                        entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2)  # (B, R)
                        entropy = masked_sum(entropy, mask[rows]).mean()
                    loss = pg_loss + args.vf_coef * vf_loss - args.ent_coef * entropy

                    # Losses and entropy are means over the responses in rows, the token metrics
                    # means over their tokens. Weighted by their part of the minibatch, they add up,
                    # over micro-batches and processes, to the minibatch's means.
                    response_weight = len(rows) / minibatch_size
                    token_weight = mask[rows].sum() / mask[minibatch].sum()
                    (response_weight * loss).backward()
                    metrics["policy_loss"] += response_weight * pg_loss.detach()
                    metrics["value_loss"] += response_weight * vf_loss.detach()
                    metrics["entropy"] += response_weight * entropy.detach()
                    for name, value in token_metrics.items():
                        metrics[name] += token_weight * value

                sum_over_processes([p.grad for p in parameters])
                sum_over_processes(metrics.values())
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                metrics["grad_norm"] = grad_norm
                steps.append(metrics)
            if args.target_kl is not None and metrics["approx_kl"] > args.target_kl:
                break

        if not grad_norm.isfinite():
            fail(f"gradient not finite in rollout {rollout}; lower --learning-rate")

        # 4. Log.
        episodes = rollout * args.batch_size
        seconds = time.time() - loop_start_time
        episodes_per_second = (rollout - first_rollout + 1) * args.batch_size / seconds
        seconds_left = (args.batch_size * num_rollouts - episodes) / episodes_per_second
        score = scores.mean().item()
        mean_kl = masked_sum(kl, mask).mean().item()
        if writer:
            writer.add_scalar("charts/score", score, episodes)
            writer.add_scalar("charts/true_score", true_scores.mean(), episodes)
            writer.add_scalar("charts/kl", mean_kl, episodes)
            writer.add_scalar("charts/kl_coef", kl_coef, episodes)
            writer.add_scalar("charts/response_length", mask.sum(1).float().mean(), episodes)
            writer.add_scalar("charts/eos_rate", has_eos.float().mean(), episodes)
            writer.add_scalar("charts/distinct_2", distinct_2(texts), episodes)
            writer.add_scalar("charts/learning_rate", learning_rate, episodes)
            writer.add_scalar("charts/episodes_per_second", episodes_per_second, episodes)
            for name in metrics:
                mean = torch.stack([step[name] for step in steps]).mean()
                writer.add_scalar(f"losses/{name}", mean, episodes)
            writer.add_scalar("losses/ratio_first", steps[0]["ratio"], episodes)  # about 1
            error_variance = (returns - old_values)[mask].var(correction=0)
            variance = returns[mask].var(correction=0).clamp(min=1e-8)
            explained = 1 - error_variance / variance  # biased if λ < 1: returns contain values
            writer.add_scalar("losses/explained_variance", explained, episodes)
            samples = [prompt_texts[i] + texts[i] for i in range(min(4, len(texts)))]
            writer.add_text("texts", "\n\n".join(samples), episodes)
            writer.flush()  # so that a killed run keeps its curves
        if args.kl_target is not None:
            kl_coef = adapt_kl_coef(
                kl_coef, mean_kl, args.kl_target, args.batch_size, args.kl_horizon
            )
        recent_scores.append(score)
        if rank == 0 and rollout % max(1, num_rollouts // 20) == 0:
            print(
                f"episode {episodes:6d}  score {sum(recent_scores) / len(recent_scores):.3f}  "
                f"KL {mean_kl:.3f}  {episodes_per_second:,.1f} episodes/s  "
                f"{seconds_left:.0f} s left"
            )
            recent_scores = []
        at_checkpoint = False
        if args.checkpoint_every is not None:
            at_checkpoint = rollout % args.checkpoint_every == 0 or rollout == num_rollouts
        if at_checkpoint and rank == 0:
            state = {
                "rollout": rollout,
                "policy": policy.state_dict(),
                "reference": reference.state_dict(),
                "critic": critic.state_dict(),
                "optimizer": optimizer.state_dict(),
                "kl_coef": kl_coef,
                "rng": torch.get_rng_state(),
                "recent_scores": recent_scores,
                "config": asdict(config),
                "tokenizer": tokenizer.to_str(),
                "prompts": [train_texts, test_texts],
                "lexicon": lexicon,
            }
            save_checkpoint(run_folder / "checkpoint.pt", state, args)

    # Evaluate. Save before printing: a closed pipe makes print fail.
    episodes = num_rollouts * args.batch_size
    train_after = evaluate_texts(policy, reference, train_prompts, *evaluation_inputs)
    test_after = evaluate_texts(policy, reference, test_prompts, *evaluation_inputs)
    save_error = None
    if args.save_dir is not None and rank == 0:
        save_error = save_gpt2(policy, tokenizer, args.save_dir)
    results = {}
    lines = []  # to print
    for title, prefix, before, after in [
        ("training", "", train_before, train_after),
        ("held-out", "held_out_", test_before, test_after),
    ]:
        old, prompt_texts, old_texts, old_scores = before
        new, _, new_texts, new_scores = after
        wins = (new_scores > old_scores).float() + 0.5 * (new_scores == old_scores).float()
        for name in new:
            results[f"{prefix}{name}_before"] = old[name]
            results[f"{prefix}{name}"] = new[name]
            if writer:
                writer.add_scalar(f"eval/{prefix}{name}", old[name], 0)
                writer.add_scalar(f"eval/{prefix}{name}", new[name], episodes)
        results[f"{prefix}win_rate"] = wins.mean().item()
        pairs = [
            f"{prompt} ...\n  before:{old_text!r}\n  after: {new_text!r}"
            for prompt, old_text, new_text in zip(prompt_texts, old_texts, new_texts, strict=True)
        ]
        summary = (
            f"{title} reward {old['reward']:.2f} -> {new['reward']:.2f} ± {new['reward_error']:.2f}"
            f"  KL {new['kl']:.2f} ± {new['kl_error']:.2f}  paired win rate {wins.mean():.2f}  "
            f"distinct-2 {old['distinct_2']:.3f} -> {new['distinct_2']:.3f}"
        )
        lines += ["", *pairs[:5], "", summary]
        if writer:
            writer.add_scalar(f"eval/{prefix}win_rate", wins.mean(), episodes)
            writer.add_text(f"eval/{prefix}texts", "\n\n".join(pairs[:32]), episodes)
    if writer:
        writer.close()
    if rank == 0:
        lines[-1] += f"  {time.time() - start_time:.1f} s"
        print("\n".join(lines))
    if processes > 1:
        # Wait for the other processes. Not with dist.barrier(): with gloo it can hang at the end.
        finished = torch.zeros(1, device=device)
        dist.all_reduce(finished)
        dist.destroy_process_group()
    if save_error is not None:
        fail(save_error)
    return results


if __name__ == "__main__":
    # Flush every line; print ? for characters that the output's encoding lacks.
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    rank, _ = rank_and_processes()
    try:
        main(tyro.cli(Args, description=__doc__, console_outputs=rank == 0))
    except OSError as error:  # a full disk, a closed pipe
        fail(error)
