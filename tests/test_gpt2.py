"""gpt2_sentiment.py: the model against transformers, sampling and rewards against loops."""

import json
import math
import random
import re
from pathlib import Path

import gpt2_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file

import gpt2_sentiment as gpt2

DATA = Path(__file__).parent / "data"
TINY = DATA / "gpt2-tiny"
EXPECTED = load_file(DATA / "gpt2-tiny-expected.safetensors")  # see make_gpt2_tiny.py
TOKENS, MASK = EXPECTED["tokens"], EXPECTED["mask"].bool()
WEIGHTS = oracle.float64(load_file(DATA / "gpt2-tiny" / "model.safetensors"))
CONFIG = json.loads((DATA / "gpt2-tiny" / "config.json").read_text())
EOS = 299
PADDED = TOKENS.masked_fill(~MASK, gpt2.PAD)


@pytest.fixture(scope="module")
def loaded():
    return gpt2.load_gpt2(TINY)


@pytest.fixture(scope="module")
def policy(loaded):
    return loaded[0].requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def close(found, exact, atol=1e-5):
    torch.testing.assert_close(found.double(), exact.double(), atol=atol, rtol=0)


def sample(policy, prompts, noise, temperature=1.0, top_k=0, top_p=1.0):
    return gpt2.generate_responses(policy, prompts, noise, temperature, top_k, top_p)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    logits = logits / temperature
    if top_k > 0 or top_p < 1:
        logits = gpt2.restrict(logits, gpt2.likely_tokens(logits, top_k, top_p))
    return logits


def uniform(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- The model


@pytest.mark.parametrize("shape", [(3, 8), (3, 1, 8), (2, 3, 8)])
def test_the_turned_product_is_that_of_torch(shape):
    """One token and several; value and gradients."""
    torch.manual_seed(1)
    layer = gpt2.Linear(8, 2500).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = [x, *layer.parameters()]
    found = layer(x)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((found * weights).sum(), parameters)
    expected = torch.autograd.grad((expected * weights).sum(), parameters)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        gpt2.linear(x, layer.weight), torch.nn.functional.linear(x, layer.weight)
    )


def test_the_embedded_model_begins_as_gpt2_did():
    """Radford et al. 2019: 0.02, and where the L layers' outputs add up 0.02 / √(2L)."""
    torch.manual_seed(1)
    policy, _ = gpt2.embedded_gpt2(["a b c"] * 10)
    for name, parameter in policy.named_parameters():
        if parameter.dim() == 2:
            wanted = 0.02 / 6**0.5 if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0


def test_the_oracle_agrees_with_transformers():
    rows = [row[real].tolist() for row, real in zip(TOKENS[:2], MASK[:2], strict=True)]
    found = torch.cat([oracle.logits(WEIGHTS, CONFIG, row) for row in rows])
    close(found, EXPECTED["single"][: len(found)])


def test_logits_are_those_of_transformers_one_by_one(policy):
    rows = [row[real] for row, real in zip(TOKENS, MASK, strict=True)]
    close(torch.cat([policy.head(policy(row[None]))[0] for row in rows]), EXPECTED["single"])


def test_logits_are_those_of_transformers_in_a_padded_batch(policy):
    found = policy.head(policy(PADDED))
    close(found[MASK], EXPECTED["logits"][MASK])
    assert found.isfinite().all()  # padding too: a NaN there would spread through the gradients


def test_greedy_continuations_are_those_of_transformers(policy):
    """With one token to draw from, sampling is greedy, and it goes through the cache."""
    found, _ = sample(policy, PADDED, uniform(5, 10), 1.0, 1, 1.0)
    assert found.tolist() == EXPECTED["greedy"].tolist()


@pytest.mark.parametrize("cuts", [[26], [1] * 26, [3, 20, 1, 2], [25, 1]])
def test_reading_in_pieces_through_the_cache_changes_nothing(policy, cuts):
    cache, states, begin = gpt2.KVCache(26), [], 0
    for cut in cuts:
        end = begin + cut
        states.append(policy(PADDED[:, begin:end], cache))
        begin = end
        assert cache.length == end
    found = torch.cat(states, 1)
    close(found[MASK], policy(PADDED)[MASK])


def test_left_padding_changes_nothing(policy):
    row = TOKENS[2][MASK[2]]
    bare = policy(row[None])[0]
    for count in (1, 5, 14):
        padded = torch.cat([torch.full((count,), gpt2.PAD), row])[None]
        close(policy(padded)[0, count:], bare)
        behind = torch.cat([row, torch.full((count,), gpt2.PAD)])[None]
        close(policy(behind)[0, :-count], bare)


def test_a_token_sees_nothing_of_what_follows(policy):
    other = PADDED.clone()
    other[:, 20:] = 5
    close(policy(other)[:, :20][MASK[:, :20]], policy(PADDED)[:, :20][MASK[:, :20]])


def test_gradients_are_finite_in_padded_batches_and_reach_every_weight():
    policy, _, _ = gpt2.load_gpt2(TINY)
    policy.head(policy(PADDED))[MASK].logsumexp(1).sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_gradients_are_those_of_the_oracle():
    """Through attention, norms and the tied layer, of a loss on every logit of one sequence."""
    policy, _, _ = gpt2.load_gpt2(TINY)
    ids = TOKENS[4][MASK[4]][:6]
    weigh = torch.randn(6, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (policy.head(policy(ids[None]))[0] * weigh.float()).sum().backward()
    exact = {k: v.clone().requires_grad_() for k, v in WEIGHTS.items()}
    (oracle.logits(exact, CONFIG, ids.tolist()) * weigh).sum().backward()
    for name, parameter in policy.named_parameters():
        grad = exact[name].grad.t() if ".c_" in name and "weight" in name else exact[name].grad
        close(parameter.grad / grad.norm(), grad / grad.norm(), 1e-6)


# ---------------------------------------------------------------- The distribution drawn from

CHOICES = [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (1.7, 5, 1.0),
    (0.8, 0, 0.7),
    (1.3, 12, 0.8),
    (1.0, 1, 1.0),
]
CHOICES += [(1.0, 0, 0.01), (2.0, 300, 1.0), (1.0, 1000, 0.999), (0.5, 299, 0.5)]


@pytest.mark.parametrize("choice", CHOICES)
def test_filtered_logits_are_the_renormalised_distribution(choice):
    values = EXPECTED["single"][::7].double()
    found = filter_logits(values, *choice).softmax(1)
    for probs, row in zip(found, values.tolist(), strict=True):
        close(probs, torch.tensor(oracle.distribution(row, *choice), dtype=torch.float64), 1e-9)


def test_filtering_of_a_distribution_worked_by_hand():
    """Probabilities 0.5 0.25 0.125 0.125: the fewest tokens that reach p, then renormalised."""
    values = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64).log()[None]
    a, b = 0.5**0.5, 2**0.5  # at temperature 2 the roots count, in proportion to that of 0.25
    for choice, right in {
        (1.0, 2, 1.0): [0, 2 / 3, 1 / 3, 0],
        (1.0, 0, 0.49): [0, 1, 0, 0],
        (1.0, 0, 0.51): [0, 2 / 3, 1 / 3, 0],
        (1.0, 2, 0.66): [0, 1, 0, 0],  # 0.5 of the 0.75 that top-k leaves is two thirds
        (0.5, 0, 0.7): [0, 1, 0, 0],  # 0.5² of the sum of squares 0.34375 is 0.727
        (2.0, 0, 0.7): [a / (1 + a + b), b / (1 + a + b), 1 / (1 + a + b), 0],
    }.items():
        found = filter_logits(values, *choice).softmax(1)[0]
        close(found, torch.tensor(right, dtype=torch.float64), 1e-12)


def test_ties_keep_no_more_than_k():
    found = filter_logits(torch.zeros(2, 9), 1.0, 3, 1.0).softmax(1)
    assert ((found > 0).sum(1) == 3).all() and (found.sum(1) - 1).abs().max() < 1e-6
    assert ((filter_logits(torch.zeros(1, 10), 1.0, 0, 0.35).softmax(1) > 0).sum(1) == 4).all()


FEW = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 6, 1.0), (1.2, 0, 0.6), (1.3, 9, 0.8)]


@pytest.mark.parametrize("choice", FEW)
def test_tokens_are_drawn_as_often_as_their_probability_says(policy, choice):
    """Noise on a grid of 4000 points: each token is drawn by as many as its probability says."""
    points, row = 4000, TOKENS[4][MASK[4]]
    noise = (torch.arange(points, dtype=torch.float64)[:, None] + 0.5) / points
    prompts = row.repeat(points, 1)
    found, _ = sample(policy, prompts, noise, *choice)
    exact = oracle.distribution(EXPECTED["single"][-1].tolist(), *choice)
    counts = found[:, 0].bincount(minlength=300)
    assert (counts - points * torch.tensor(exact)).abs().max() < 1.5


@pytest.mark.parametrize("choice", FEW)
def test_logprobs_entropies_and_sets_are_those_of_the_oracle(policy, choice):
    """Sampled through the cache in a padded batch, scored in one pass: both as one row alone."""
    temperature, top_k, top_p = choice
    responses, allowed = sample(policy, PADDED, uniform(5, 4), *choice)
    if top_k == 0 and top_p == 1:
        assert allowed.shape == (5, 4, 1) and allowed.all()
    args = gpt2.Args(temperature=temperature)
    states, logits = gpt2.response_logits(policy, PADDED, responses, allowed, args)
    assert torch.equal(states, gpt2.response_states(policy, PADDED, responses))
    logprobs = gpt2.token_logprobs(logits, responses)
    entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2)
    for i in (1, 3):  # the oracle is slow
        ids = TOKENS[i][MASK[i]].tolist()
        values = oracle.logits(WEIGHTS, CONFIG, ids + responses[i].tolist())
        for t, token in enumerate(responses[i].tolist()):
            probs = oracle.distribution(values[len(ids) + t - 1].tolist(), *choice)
            assert logprobs[i, t].item() == pytest.approx(math.log(probs[token]), abs=1e-4)
            exact = -sum(p * math.log(p) for p in probs if p > 0)
            assert entropy[i, t].item() == pytest.approx(exact, abs=1e-4)
            close(logits[i, t].softmax(0), torch.tensor(probs))
            if top_k > 0 or top_p < 1:
                assert allowed[i, t].tolist() == [p > 0 for p in probs]


def test_noise_chooses_by_the_inverse_of_the_distribution_function(policy):
    exact = torch.tensor(oracle.distribution(EXPECTED["single"][-1].tolist()))
    ends = exact.cumsum(0)
    row = TOKENS[4][MASK[4]][None]
    for token in exact.topk(4).indices.tolist():
        middle = torch.tensor([[ends[token] - exact[token] / 2]], dtype=torch.float64)
        found, _ = sample(policy, row, middle)
        assert found.item() == token


@pytest.mark.parametrize("choice", FEW)
@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_noise_draw_tokens_that_can_be_drawn(policy, choice, u):
    noise = torch.full((5, 2), u, dtype=torch.float64)
    responses, allowed = sample(policy, PADDED, noise, *choice)
    assert ((responses >= 0) & (responses < 300)).all()
    mask = gpt2.mask_to_eos(responses, EOS)
    if allowed.shape[2] > 1:
        assert allowed.gather(2, responses[:, :, None])[mask].all()
    args = gpt2.Args(temperature=choice[0])
    _, logits = gpt2.response_logits(policy, PADDED, responses, allowed, args)
    logprobs = gpt2.token_logprobs(logits, responses)
    assert (logprobs[mask] > -50).all() and logprobs.isfinite().all()


def test_a_response_does_not_depend_on_the_other_rows(policy):
    noise = uniform(5, 10)
    together, sets = sample(policy, PADDED, noise, 1.0, 20, 0.9)
    for i in range(5):
        row = PADDED[i : i + 1]
        for x in (row, row[:, MASK[i]]):
            alone, kept = sample(policy, x, noise[i : i + 1], 1.0, 20, 0.9)
            assert torch.equal(alone[0], together[i]) and torch.equal(kept[0], sets[i])


def test_after_eos_there_is_only_eos(policy, monkeypatch):
    head = gpt2.GPT2.head
    push = torch.nn.functional.one_hot(torch.tensor(EOS), 300) * 6.0
    monkeypatch.setattr(gpt2.GPT2, "head", lambda self, states: head(self, states) + push)
    prompts = PADDED.repeat(8, 1)
    found, allowed = sample(policy, prompts, uniform(40, 12), 1.0, 7, 1.0)
    ends = (found == EOS).int()
    assert ends.any(1).sum() > 4 and ends[:, 0].sum() < 40
    assert (ends.cummax(1).values == ends).all()
    mask = gpt2.mask_to_eos(found, EOS)
    assert allowed.gather(2, found[:, :, None])[mask].all()
    assert not any(p.requires_grad for p in (found, allowed))


def test_mask_to_eos():
    x = torch.tensor([[5, 9, 9, 9], [9, 1, 9, 2], [1, 2, 3, 4], [1, 2, 3, 9]])
    right = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert gpt2.mask_to_eos(x, 9).int().tolist() == right


def test_what_follows_eos_changes_no_state_before_it(policy):
    responses, _ = sample(policy, PADDED, uniform(5, 6))
    other = responses.clone()
    other[:, 3:] = 17
    first, second = (gpt2.response_states(policy, PADDED, y) for y in (responses, other))
    close(first[:, :4], second[:, :4])
    assert first.shape == (5, 6, 32)


def test_critic_starts_at_zero_and_reads_what_the_policy_reads(policy):
    responses, _ = sample(policy, PADDED, uniform(5, 6))
    states = gpt2.response_states(policy, PADDED, responses)
    heads = []
    for separate in (False, True):
        critic = gpt2.Critic(policy, separate)
        assert (critic(states, PADDED, responses) == 0).all()
        torch.manual_seed(0)
        torch.nn.init.normal_(critic.value.weight)
        values = critic(states, PADDED, responses)
        close(values, states @ critic.value.weight[0])
        heads.append(critic)
    shared, own = heads
    assert shared.gpt is None
    ours = {p.data_ptr() for p in policy.parameters()}
    assert not ours & {p.data_ptr() for p in own.parameters()}


# ---------------------------------------------------------------- Prompts and texts


def test_prompts_are_padded_on_the_left(tokenizer):
    texts = ["I love how", "Yes", "the café was not  good\nat all"]
    tokens = gpt2.encode_prompts(tokenizer, texts, EOS)
    for row, text in zip(tokens.tolist(), texts, strict=True):
        ids = [EOS, *tokenizer.encode(text).ids]
        assert row == [-1] * (len(row) - len(ids)) + ids
    assert (tokens != gpt2.PAD).any(0).all()


def test_tokens_are_those_of_the_stored_texts(tokenizer):
    text = "the café was not  good\nat all"
    assert tokenizer.encode(text).ids == TOKENS[3][MASK[3]].tolist()


def test_texts_are_the_prompt_and_what_follows_up_to_eos(tokenizer):
    texts = ["Yes", "the café"]
    prompts = gpt2.encode_prompts(tokenizer, texts, EOS)
    said = [tokenizer.encode(x).ids for x in (" is good", " day and day")]
    width = max(map(len, said)) + 1
    responses = torch.tensor([row + [EOS] * (width - len(row)) for row in said])
    responses[0, -1] = 5  # what follows EOS is no text
    found = gpt2.decode_texts(tokenizer, prompts, responses, EOS)
    assert found == (texts, [" is good", " day and day"])
    nothing = torch.full((2, 3), EOS)
    assert gpt2.decode_texts(tokenizer, prompts, nothing, EOS) == (texts, ["", ""])


def test_sentences_of_the_grammar():
    sentences = gpt2.write_sentences(3000, 1)
    assert sentences == gpt2.write_sentences(3000, 1) != gpt2.write_sentences(3000, 2)
    assert all(text.endswith(".") and "{" not in text and "  " not in text for text in sentences)
    assert not any(f" a {vowel}" in text for text in sentences for vowel in "aeiou")
    clauses = [len(re.findall(" and |, but | while ", text)) + 1 for text in sentences]
    for number, share in [(1, 0.25), (2, 0.5), (3, 0.25)]:
        assert clauses.count(number) / len(clauses) == pytest.approx(share, abs=0.04)
    train, held_out = gpt2.read_prompts(None)
    assert set(gpt2.TUTORIAL_PROMPTS) <= set(train) and not set(train) & set(held_out)
    assert len(held_out) >= 5
    for prompt in train + held_out:  # the model has read them all
        assert any(text.startswith(prompt + " ") for text in sentences), prompt
    counts = {
        words: sum(w in words for text in sentences for w in oracle.split(text))
        for words in (frozenset(oracle.worth(oracle.GOOD)), frozenset(oracle.worth(oracle.BAD)))
    }
    good, bad = counts.values()
    assert 0.6 < bad / good < 1.1  # neither feeling is taught more than the other by much


def test_tokenizer_of_the_grammar():
    sentences = gpt2.write_sentences(300, 1)
    tokenizer = gpt2.train_tokenizer(sentences, 400)
    assert tokenizer.token_to_id("<|endoftext|>") == 0 and tokenizer.get_vocab_size() == 400
    for text in [*sentences[:20], "Ωmega über 東京 \t\n 🙂"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\n\n  b \nc\nd\ne\n\t\nf\ng\n", encoding="utf-8")
    assert gpt2.read_prompts(file) == (["a", "b", "c", "d", "f", "g"], ["e"])
    file.write_text("ä\nb", encoding="utf-8")
    train, held_out = gpt2.read_prompts(file)
    assert train == ["ä", "b"] and held_out == gpt2.read_prompts(None)[1]


# ---------------------------------------------------------------- Rewards


def score(kind, prompts, responses, lexicon=None):
    return gpt2.score_texts(prompts, responses, kind, lexicon or gpt2.LEXICON)


def one(kind, response, prompt=""):
    (found,) = score(kind, [prompt], [response])
    return found


def test_sentiment_as_printed_in_the_tutorial():
    """Texts with their prompts, as there; for the tutorial a word ends at a blank."""
    printed = {
        'I feel happy when she is interested in contributing."\n\nWhen asked about others': 10,
        "The best part about this is you can make it very nationalful. Again, it's all true.": 0.1,
        "I love how Cyprus redlines it, especially giving immigrants an arrangement for a": 15,
        'Today was great because we knew we could create more labor for people," Smith said.': 10,
        "I love how tragic this was\n\nI love it so much I feel like the tornado": 35,
        "I feel happy when I keep seeing Lisp. I like it. It's a joy to work": 15,
        "I love how they have tried. I love that they wore their mark on their hat with": 30,
        "I feel happy when my sleep. I feel happy when I I I be happy uncertain uncertain": 30,
        "I love how it. Ourld literally bind for a happy it to per chance or for": 25,
        "I love how I look at how I look at grabbing at back grabbing at back grabbing": 15,
        "Today was great because malarkey women and men changed.The grateful ones had": 10,
        "Today was great because of the freshandfreshlight You've commanduedTheOfGoodTheAvoid": 10,
        "I love how Snowman looks too when she looks like Rocky Simon Newell. I love": 35,
        "Today was great because of was amazing and appreciated and astounding were all": 25,
    }
    assert score("sentiment", [""] * len(printed), list(printed)) == list(printed.values())


def test_sentiment_by_hand():
    reward = "sentiment"
    assert one(reward, "Good, GREAT! (wonderful) food.") == 5 * (1 + 2 + 3)
    assert one(reward, "a good, great, but terrible and awful day") == 15 - 3 - 2
    assert one(reward, "bad bad bad") == one(reward, "") == one(reward, "goodness") == 0.1
    assert one(reward, "it is", prompt="great great great") == 0.1  # only the response counts
    for table, sign in ((oracle.GOOD, 5), (oracle.BAD, -1)):
        for word, value in oracle.worth(table).items():
            assert one(reward, f"love, {word}.") == 15 + sign * value


def test_positivity_as_printed_in_the_tutorial():
    for text, printed in {
        "This is good and helpful.": 0.2,
        "This is not good at all.": 0.0,
        "good good good good good": 0.2,
        "The explanation was clear and helpful, making it incredibly beneficial.": 0.0,
    }.items():
        assert one("positivity", text) == pytest.approx(printed, abs=5e-4)


def test_positivity_by_hand():
    reward = "positivity"
    assert one(reward, "great, and never bad") == 1 / 4
    for negation in ("not", "never", "don't", "don’t", "no"):
        assert one(reward, f"{negation} good, but it is amazing") == 0.5 / 6
        # A negation that ends the prompt stands before the first word.
        assert one(reward, "good but it is amazing", f"It is {negation}") == 0.5 / 5
        assert one(reward, f"good {negation}. excellent") == 0.5 / 3
    assert one(reward, "good but it is amazing", "It is never said") == 2 / 5
    assert one(reward, "") == one(reward, "!!") == one(reward, "not good") == 0.0
    assert one(reward, "good") == 1.0


PHOTOSYNTHESIS = """
Photosynthesis is the process by which plants convert sunlight into energy.

The process involves chlorophyll in the leaves capturing sunlight. This energy
is used to convert water and carbon dioxide into glucose and oxygen.

Plants use glucose for energy and release oxygen as a byproduct.
"""


def test_composite_as_printed_in_the_tutorial():
    prompt = "Explain how photosynthesis works."
    for response, printed in {
        PHOTOSYNTHESIS: (0.505, 0.900, 0.250, 0.667),
        "plants make food from sun": (0.020, 0.100, 0.000, 0.000),
    }.items():
        assert one("composite", response, prompt) == pytest.approx(printed[0], abs=5e-4)
        found = oracle.composite(prompt, response)
        assert found == pytest.approx(printed, abs=5e-4)  # and so the oracle is right


def test_composite_by_hand():
    reward = "composite"
    assert one(reward, "Works? photosynthesis", "photosynthesis works.") == pytest.approx(
        0.2 * 2 / 50 + 0.5 + 0.1
    )
    for count, length in {49: 0.98, 50: 1, 500: 1, 501: 0.998, 750: 0.5, 1000: 0, 1200: 0}.items():
        found = one(reward, "x " * count, "nothing of it")
        assert found == pytest.approx(0.2 * length, abs=1e-12)
    assert one(reward, "", "") == 0
    assert one(reward, " Yes", "q") == pytest.approx(0.2 / 50 + 0.1)  # as it follows a prompt
    assert one(reward, "a. B\n\nc", "q") == pytest.approx(0.2 * 3 / 50 + 0.3 * 2 / 3)
    assert one(reward, "a.B\nC", "q") == pytest.approx(0.2 * 2 / 50)


def test_rewards_on_random_texts():
    rng = random.Random(0)
    vocabulary = [*oracle.worth(oracle.GOOD), *oracle.worth(oracle.BAD), "not", "never", "don't"]
    vocabulary += "no the it's was sea Works how. \n\n Day! GREAT, (good) bad; not-so, ...".split(
        " "
    )
    texts = [" ".join(rng.choices(vocabulary, k=rng.randrange(70))) for _ in range(300)]
    texts = [text.replace("not-so", "not") for text in texts]
    prompts = [" ".join(rng.choices("how the sea works is".split(), k=4)) for _ in texts]
    found = score("sentiment", prompts, texts)
    assert found == pytest.approx([oracle.sentiment(text) for text in texts])
    found = score("positivity", prompts, texts)
    assert found == pytest.approx([oracle.positivity(text) for text in texts])
    assert 0.0 < max(found) <= 1.0 and min(found) == 0.0
    found = score("composite", prompts, texts)
    assert found == pytest.approx(
        [oracle.composite(*x)[0] for x in zip(prompts, texts, strict=True)]
    )
    for few in (texts[:3], texts):
        assert gpt2.distinct_2(few) == pytest.approx(oracle.distinct_2(few))


def test_diversity_by_hand():
    assert gpt2.distinct_2(["great great great great"]) == 1 / 3
    assert gpt2.distinct_2(["a b c", "b c d", ""]) == 3 / 4  # pairs do not span two texts
    assert gpt2.distinct_2([""]) == 0  # nothing to divide by


# ---------------------------------------------------------------- Rewards per token and their scale


@pytest.mark.parametrize("garbage", [0.0, math.nan])
def test_scaled_rewards_are_divided_by_their_deviation(garbage):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    rewards = torch.where(mask, torch.tensor([[1.0, 2, 4], [8, 3, 3]]), garbage)
    std = math.sqrt((1 + 4 + 16 + 64) / 4 - (15 / 4) ** 2)
    expected = torch.tensor([[1.0, 2, 4], [8, 0, 0]]) / std
    torch.testing.assert_close(gpt2.scale_rewards(rewards, mask), expected)


def test_equal_rewards_are_not_scaled():
    rewards = torch.full((3, 1), 0.1)
    assert torch.equal(gpt2.scale_rewards(rewards, rewards > 0), rewards)


@pytest.mark.parametrize("kl", [0.5, 0.21, 0.2, 0.19, 0.01])
def test_adaptive_kl(kl):
    error = max(-0.2, min(0.2, kl / 0.2 - 1))
    found = gpt2.adapt_kl_coef(0.05, kl, 0.2, 100, 1000)
    assert found == pytest.approx(0.05 * (1 + error * 0.1))


@pytest.mark.parametrize("episodes", [1_000, 5_000, 10_000, 1_000_000])
def test_adaptive_kl_stays_positive_however_large_the_batch(episodes):
    assert gpt2.adapt_kl_coef(0.05, 0.0, 0.2, episodes, 1000) == pytest.approx(0.04)
    assert gpt2.adapt_kl_coef(0.05, 1.0, 0.2, episodes, 1000) == pytest.approx(0.06)


def test_plain_reward_counts_good_and_bad_words():
    """+1 and -1 whatever the weight; negative where the bad ones prevail."""
    for text, expected in {"Great, good!": 2, "a terrible, bad film": -2, "love hate": 0}.items():
        assert one("plain", text) == expected
    assert one("plain", "it is", prompt="great") == 0  # only the response counts


def test_a_lexicon_from_a_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeffMoon 2.5\n\nsun\t-1\ndon’t 3\n", encoding="utf-8")
    lexicon = gpt2.read_lexicon(file)
    assert lexicon == {"moon": 2.5, "sun": -1.0, "don't": 3.0}  # words as in split_words
    texts = ["The moon, the MOON and the sun", "sun sun", "good"]
    assert score("sentiment", [""] * 3, texts, lexicon) == [4.0, 0.1, 0.1]
    assert score("plain", [""] * 3, texts, lexicon) == [1.0, -2.0, 0.0]


@pytest.mark.parametrize(
    "content", ["good", "good 1 2", "good x", "", "good nan", "bad -inf", "ice-cream 1", "! 1"]
)
def test_a_lexicon_that_is_of_no_use(tmp_path, capsys, content):
    file = tmp_path / "words.txt"
    file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        gpt2.read_lexicon(file)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"--lexicon {file}" in error


def test_prompts_have_no_byte_order_mark_and_end_at_newlines_only(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\ntwo\u2028three\x0cfour\n".encode())
    assert gpt2.read_prompts(file)[0] == ["one", "two\u2028three\x0cfour"]


@pytest.mark.parametrize("rewards", [[1, 0, 2], [True, False, True], torch.ones(3).bfloat16()])
def test_what_can_be_a_score_is_made_float32(rewards):
    found = gpt2.to_scores(rewards, 3, "cpu")
    assert found.dtype == torch.float32 and found.tolist() == [float(x) for x in rewards]


BAD_REWARDS = [[1.0, 2.0], [[1.0], [2.0], [3.0]], torch.ones(3, 1), 1.0, None, ["a", "b", "c"]]
BAD_REWARDS += [[1.0, math.nan, 0.0], [1.0, math.inf, 0.0]]


@pytest.mark.parametrize("rewards", BAD_REWARDS, ids=str)
def test_what_cannot_be_a_score_ends_with_one_line(rewards, capsys):
    with pytest.raises(SystemExit) as stop:
        gpt2.to_scores(rewards, 3, "cpu")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "reward" in error
