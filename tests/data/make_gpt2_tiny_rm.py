"""What made gpt2-tiny-rm/: a random GPT2ForSequenceClassification and its scores of some texts.

    pip install torch==2.13.0 transformers==5.23.0 tokenizers safetensors
    cd tests/data && python make_gpt2_tiny_rm.py

transformers is needed here only: the tests read what this wrote.
"""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification

PAIRS = [
    ("I love how", " the sea is calm"),
    ("Yes", ""),
    ("Today was great because", " we didn't lose, and it's 3:0!"),
    ("the café was not", "  good\nat all"),
    ("This is a", " bad and awful day"),
]

tokenizer = Tokenizer.from_file("gpt2-tiny/tokenizer.json")
eos = tokenizer.token_to_id("<|endoftext|>")
torch.manual_seed(1)
config = GPT2Config(
    vocab_size=tokenizer.get_vocab_size(),
    n_positions=40,
    n_embd=32,
    n_layer=1,
    n_head=4,
    layer_norm_epsilon=1e-3,
    bos_token_id=eos,
    eos_token_id=eos,
    pad_token_id=eos,
    num_labels=1,
)
model = GPT2ForSequenceClassification(config).eval()
for name, p in model.named_parameters():
    p.data = 0.2 * torch.randn(p.shape) + (1.0 if "ln_" in name and "weight" in name else 0.0)
model.half().save_pretrained("gpt2-tiny-rm")  # half, so that the file is small
model.float()
shutil.copy("gpt2-tiny/tokenizer.json", "gpt2-tiny-rm/tokenizer.json")

rows = [tokenizer.encode(prompt + response).ids for prompt, response in PAIRS]
width = max(len(row) for row in rows)
tokens = torch.tensor([row + [eos] * (width - len(row)) for row in rows])  # padded on the right
mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
with torch.no_grad():
    scores = model(tokens, attention_mask=mask).logits.squeeze(1).tolist()
expected = [[*pair, score] for pair, score in zip(PAIRS, scores, strict=True)]
Path("gpt2-tiny-rm/expected.json").write_text(json.dumps(expected, indent=1))
print(expected)
