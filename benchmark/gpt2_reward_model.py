"""Train a reward model on text from preference pairs, for gpt2_sentiment.py --reward-model.

    python benchmark/gpt2_reward_model.py --save-dir rm
    python gpt2_sentiment.py --reward-model rm --kl-coef 0.5

The embedded GPT-2 writes two responses to each prompt. An annotator who sees only the sentiment
(the true reward) prefers one of them, with the probability of Bradley-Terry. A GPT-2 with a scalar
head then learns to score: loss = -log σ(score of chosen - score of rejected). It starts from the
weights of the model that wrote the texts, and is saved as transformers saves a
GPT2ForSequenceClassification.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt2_sentiment as gpt2

RESPONSE_LENGTH = 20


def sample_pairs(policy, tokenizer, prompts, count, annotator_temperature):
    """Prompts, chosen and rejected responses: three lists of count texts."""
    rows = torch.randint(len(prompts), (count,))
    pairs = []
    for _ in range(2):
        noise = torch.rand(count, RESPONSE_LENGTH, dtype=torch.float64)
        responses, _ = gpt2.generate_responses(policy, prompts[rows], noise, 1.0, 0, 1.0)
        eos = policy.config.eos_token_id
        texts, responses = gpt2.decode_texts(tokenizer, prompts[rows], responses, eos)
        pairs.append(responses)
    scores = [
        torch.tensor(gpt2.score_texts(texts, responses, "sentiment", gpt2.LEXICON))
        for responses in pairs
    ]
    probability = ((scores[0] - scores[1]) / annotator_temperature).sigmoid()
    first_wins = (torch.rand(count) < probability).tolist()
    chosen = []
    rejected = []
    for first, second, wins in zip(*pairs, first_wins, strict=True):
        chosen.append(first if wins else second)
        rejected.append(second if wins else first)
    return texts, chosen, rejected


def bradley_terry_loss(reward_model, texts, chosen, rejected):
    """Returns the loss and the share of pairs whose chosen response has the higher score."""
    scores = reward_model(texts + texts, chosen + rejected)
    difference = scores[: len(texts)] - scores[len(texts) :]
    return -F.logsigmoid(difference).mean(), (difference > 0).float().mean()


def train(reward_model, texts, chosen, rejected, epochs, learning_rate):
    optimizer = torch.optim.AdamW(reward_model.parameters(), weight_decay=0.01)
    batches = epochs * (len(texts) // 64)
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(texts)).split(64)[: len(texts) // 64]:
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / batches)
            batch = [[column[i] for i in rows] for column in (texts, chosen, rejected)]
            loss, _ = bradley_terry_loss(reward_model, *batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
            optimizer.step()
            step += 1


def save(reward_model, folder):
    """As transformers saves a GPT2ForSequenceClassification with one output."""
    error = gpt2.save_gpt2(reward_model.gpt, reward_model.tokenizer, folder)
    if error is not None:
        gpt2.fail(error)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["GPT2ForSequenceClassification"]
    config["num_labels"] = 1
    config["id2label"] = {"0": "LABEL_0"}
    config["label2id"] = {"LABEL_0": 0}
    config["pad_token_id"] = config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    reward_model.tokenizer.save(str(folder / "tokenizer.json"))  # without BOS, as it was trained
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = reward_model.score.weight.detach()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1, help="of the embedded model too")
    parser.add_argument("--pretrain-steps", type=int, default=500)
    parser.add_argument("--num-pairs", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--annotator-temperature", type=float, default=5.0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    sentences = gpt2.write_sentences(8_000, args.seed)
    policy, tokenizer = gpt2.embedded_gpt2(sentences)
    gpt2.pretrain_gpt2(policy, tokenizer, sentences, args.pretrain_steps)
    train_texts, test_texts = gpt2.read_prompts(None)
    bos = policy.config.bos_token_id
    data = []
    for texts, count in [(train_texts, args.num_pairs), (test_texts, 1024)]:
        prompts = gpt2.encode_prompts(tokenizer, texts, bos)
        data.append(sample_pairs(policy, tokenizer, prompts, count, args.annotator_temperature))
    reward_model = gpt2.TextRewardModel(copy.deepcopy(policy), tokenizer)
    torch.nn.init.zeros_(reward_model.score.weight)
    train(reward_model, *data[0], args.epochs, args.learning_rate)
    with torch.no_grad():
        loss, accuracy = bradley_terry_loss(reward_model, *data[1])
    save(reward_model, args.save_dir)
    print(f"held-out pairs: loss {loss:.3f}  accuracy {accuracy:.3f}  saved {args.save_dir}")


if __name__ == "__main__":
    main()
