"""What made gpt2-tiny/ and gpt2-tiny-expected.safetensors: a random GPT-2, saved and run by others.

    pip install torch==2.13.0 transformers==5.23.0 tokenizers safetensors
    cd tests/data && python make_gpt2_tiny.py

transformers is needed here only: the tests read what this wrote.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

TEXTS = [
    "I love how the sea is calm",
    "Yes",
    "Today was great because we didn't lose, and it's 3:0!",
    "the café was not  good\nat all",
    "This is a bad and awful day",
]

# A byte-level BPE; as in GPT-2 the end of a text is the last token.
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator(TEXTS * 3, trainer)
tokenizer.add_special_tokens(["<|endoftext|>"])
vocab = tokenizer.get_vocab_size()
eos = tokenizer.token_to_id("<|endoftext|>")
assert eos == vocab - 1

# No weight, bias or norm is 0 or 1, the scale is that of a trained model, and the epsilon is large
# enough to be missed. No dropout: the model is only read.
torch.manual_seed(0)
config = GPT2Config(
    vocab_size=vocab,
    n_positions=40,
    n_embd=32,
    n_layer=2,
    n_head=4,
    layer_norm_epsilon=1e-3,
    bos_token_id=eos,
    eos_token_id=eos,
)
model = GPT2LMHeadModel(config).eval()
for name, p in model.named_parameters():
    scale = 0.3 if name.endswith(("wte.weight", "wpe.weight")) else 0.2
    p.data = scale * torch.randn(p.shape) + (1.0 if "ln_" in name and "weight" in name else 0.0)
model.save_pretrained("gpt2-tiny")
Path("gpt2-tiny/generation_config.json").unlink()  # of no use here
tokenizer.save("gpt2-tiny/tokenizer.json")
tokenizer.model.save("gpt2-tiny")  # the older form, vocab.json and merges.txt; the last token is
path = Path("gpt2-tiny/vocab.json")  # no part of this, but is of GPT-2's
path.write_text(path.read_text().rstrip("}") + f',"<|endoftext|>":{eos}}}')

rows = [tokenizer.encode(text).ids for text in TEXTS]
longest = max(map(len, rows))
tokens = torch.tensor([[eos] * (longest - len(row)) + row for row in rows])
mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
positions = (mask.cumsum(1) - 1).clamp(min=0)
with torch.no_grad():
    logits = model(tokens, attention_mask=mask, position_ids=positions).logits
    single = torch.cat(
        [model(torch.tensor([row])).logits[0] for row in rows]
    )  # one after the other
    greedy = model.generate(
        tokens, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None
    )
expected = {"tokens": tokens, "mask": mask, "logits": logits, "single": single}
expected["greedy"] = greedy[:, longest:].clone()
print({name: tuple(value.shape) for name, value in expected.items()})
print(f"largest difference of padded from single {(logits[mask == 1] - single).abs().max():.1e}")
print(f"standard deviation of logits {single.std():.2f}; greedy {expected['greedy'].tolist()}")
save_file(expected, "gpt2-tiny-expected.safetensors")
