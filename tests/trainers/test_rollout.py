"""Sampling: the policy's own distribution, with and without a KV cache, padding and end tokens."""

from types import SimpleNamespace

import pytest
import torch

from apt_model.rl.response_end import StopRules, read_end_tokens
from apt_model.rl.rollout import Rollout, Sampler
from apt_model.scoring.next_token import NextTokenScorer
from support.tiny_models import VOCABULARY, TinyCausalModel, TinyModelWithHead, tiny_llama

END = 2
PROMPT = torch.tensor([[5, 9, 4]])


def tiny_model(kind=TinyCausalModel):
    torch.manual_seed(0)
    model = kind().double()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    return model


def calm_llama():
    """A Llama whose own settings would change what is sampled."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.div_(2)
    model.generation_config.top_k = 3
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 9.0
    return model


MODELS = {"llama": calm_llama, "plain": tiny_model, "head": lambda: tiny_model(TinyModelWithHead)}


def sampler(model, eos_token_id=None, stop_strings=(), tokenizer=None, **options):
    rules = StopRules(read_end_tokens(model, eos_token_id, tokenizer), stop_strings, tokenizer)
    return Sampler(NextTokenScorer(model), torch.device("cpu"), rules=rules, **options)


def logits_of(model, ids):
    output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_the_distribution_is_the_policy_s(name, temperature):
    model = MODELS[name]()
    count = 6000
    rollout = sampler(model, eos_token_id=[])(PROMPT, None, 2, temperature, copies=count)
    assert rollout.responses.shape == (count, 5) and rollout.response_masks.all()
    with torch.no_grad():
        expected = torch.softmax(logits_of(model, PROMPT)[0, -1] / temperature, -1)
        first = int(expected.argmax())
        after = torch.cat([PROMPT, torch.tensor([[first]])], 1)
        expected_after = torch.softmax(logits_of(model, after)[0, -1] / temperature, -1)
    followed = rollout.responses[rollout.responses[:, 3] == first]
    for drawn, wanted in ((rollout.responses[:, 3], expected), (followed[:, 4], expected_after)):
        share = torch.bincount(drawn, minlength=VOCABULARY).double() / len(drawn)
        spread = (wanted * (1 - wanted) / len(drawn)).sqrt()  # 4 standard deviations of each
        assert ((share - wanted).abs() <= 4 * spread + 4 / len(drawn)).all()
    assert len(followed) > 100


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_change_what_is_sampled(name):
    model = MODELS[name]()
    prompts = torch.tensor([[5, 9, 4, 0, 0], [7, 8, 3, 11, 6]])
    masks = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    left = torch.tensor([[50, 50, 5, 9, 4], [7, 8, 3, 11, 6]])
    wide = torch.cat([torch.zeros(2, 3, dtype=torch.long), left], 1)
    left_masks = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    wide_masks = torch.cat([torch.zeros(2, 3, dtype=torch.long), left_masks], 1)
    results = []
    for ids, mask in ((prompts, masks), (left, left_masks), (wide, wide_masks)):
        torch.manual_seed(1)
        results.append(sampler(model, eos_token_id=[])(ids, mask, 6))
    for rollout in results:
        assert torch.equal(rollout.responses, results[0].responses)
        assert torch.equal(rollout.response_masks[:, :5], left_masks)
        assert torch.equal(rollout.responses[0, :5], torch.tensor([0, 0, 5, 9, 4]))
        assert torch.equal(rollout.token_mask.sum(1), torch.tensor([6, 6]))
    probabilities = []
    for row, start in ((results[0].responses[0, 2:], 3), (results[0].responses[1], 5)):
        with torch.no_grad():
            log_probs = torch.log_softmax(logits_of(model, row[None])[0], -1)
        probabilities += [log_probs[t - 1, row[t]] for t in range(start, len(row))]
    assert torch.stack(probabilities).mean() > -4.0  # drawn at random: -4.1 to -8


@pytest.mark.parametrize("name", MODELS)
def test_a_response_ends_at_an_end_token(name):
    rollout = sampler(MODELS[name](), eos_token_id=[END, 7], pad_token_id=1)(
        PROMPT, None, 20, copies=300
    )
    lengths = rollout.token_mask.sum(1)
    assert lengths.min() < 5 and not rollout.token_mask[:, :3].any()
    assert torch.equal(rollout.token_mask[:, 3:], rollout.response_masks[:, 3:])
    for row, tokens in zip(rollout.responses, rollout.token_mask, strict=True):
        response, rest = row[tokens.bool()], row[3:][~tokens[3:].bool()]
        ends = torch.isin(response, torch.tensor([END, 7]))
        assert not ends[:-1].any() and (
            ends[-1] or len(response) == rollout.token_mask.shape[1] - 3
        )
        assert (rest == 1).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_likeliest_tokens(name):
    model, ids = MODELS[name](), PROMPT
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, logits_of(model, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(sampler(model, eos_token_id=[])(PROMPT, None, 5, 0.0).responses, ids)


def test_a_cache_is_used_and_settings_and_modes_are_kept():
    model = calm_llama()
    model.train()
    widths = []
    model.model.layers[0].register_forward_hook(lambda _, a, o: widths.append(o.shape[1]))
    own = model.generation_config
    rollout = sampler(model, eos_token_id=[])(PROMPT, None, 4)
    assert widths == [3, 1, 1, 1] and rollout.responses.shape == (1, 7)
    assert model.training and model.generation_config is own
    assert not rollout.responses.requires_grad


def test_lora_policies_sample_with_their_adapter():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight.mul_(100)
        favourite = int(model(PROMPT).logits[0, -1].argmax())
        plain = int(tiny_llama()(PROMPT).logits[0, -1].argmax())
    for _ in range(2):
        rollout = sampler(model, eos_token_id=[])(PROMPT, None, 1, 1e-3)
        assert rollout.responses[0, -1] == favourite != plain


def test_end_tokens():
    """Those of the tokenizer, of the generation settings and of the configuration, lists too."""
    model = tiny_llama()
    assert read_end_tokens(model) == [2]
    model.generation_config.eos_token_id = [4, 5]
    assert read_end_tokens(model) == [4, 5, 2] and read_end_tokens(model, 9) == [9]
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert read_end_tokens(model, None, tokenizer) == [4, 5, 2, 7]
    assert read_end_tokens(model, [], tokenizer) == []
    model.config.eos_token_id = [6, 7]
    model.generation_config.eos_token_id = None
    assert read_end_tokens(model, None, tokenizer) == [6, 7]
    assert read_end_tokens(model, None, SimpleNamespace(eos_token_id=None)) == [6, 7]
    assert read_end_tokens(tiny_model()) == []


@pytest.mark.parametrize("name", MODELS)
def test_every_response_is_known_as_finished_or_cut(name):
    rollout = sampler(MODELS[name](), eos_token_id=[END, 7])(PROMPT, None, 6, copies=100)
    last = [row[kept.bool()][-1] for row, kept in zip(rollout.responses, rollout.token_mask)]
    assert rollout.finished.tolist() == [int(token) in (END, 7) for token in last]
    assert 0 < rollout.finished.sum() < 100
    endless = sampler(MODELS[name](), eos_token_id=[])(PROMPT, None, 2, copies=3)
    assert not endless.finished.any()


class Letters:
    """Token i is a Cyrillic letter; 60 is the special token <|stop|>."""

    all_special_tokens = ("<|stop|>",)
    eos_token_id = END

    def convert_tokens_to_ids(self, text):
        return {"<|stop|>": 60}[text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join("<|stop|>" if i == 60 else chr(0x430 + i) for i in ids)


@pytest.mark.parametrize("name", MODELS)
def test_a_response_ends_with_a_stop_string(name):
    model, letters = MODELS[name](), Letters()
    torch.manual_seed(0)
    free = sampler(model, eos_token_id=[])(PROMPT, None, 12, 3.0, copies=40)
    texts = [letters.decode(row[3:].tolist()) for row in free.responses]
    stops = [texts[0][3:5], texts[1][5], "<|stop|>"]
    sample = sampler(model, [], stops, letters, pad_token_id=1)
    assert sample.rules.tokens == [60] and sample.rules.strings == stops[:2]
    torch.manual_seed(0)
    rollout = sample(PROMPT, None, 12, 3.0, copies=40)
    for row, kept, finished, text in zip(
        rollout.responses, rollout.token_mask, rollout.finished, texts, strict=True
    ):
        found = [text.index(stop) + len(stop) for stop in stops if stop in text]
        written = letters.decode(row[kept.bool()].tolist())
        assert written == (text[: min(found)] if found else text)
        assert bool(finished) == bool(found)
        assert (row[3 + len(written.replace("<|stop|>", "!")) :] == 1).all()
    assert 2 <= rollout.finished.sum() < 40


def test_stop_strings_that_cannot_be():
    with pytest.raises(ValueError, match="stop_strings: expected texts, not empty"):
        StopRules([], [""], Letters())
    with pytest.raises(ValueError, match="expected a tokenizer too"):
        StopRules([], ["END"])
    assert StopRules([], "END", Letters()).strings == ["END"] and not StopRules([])


def test_the_room_for_a_response():
    model = tiny_model()
    assert sampler(model, max_length=5)(PROMPT, None, 9).responses.shape[1] == 5
    with pytest.raises(ValueError, match=r"a prompt has 3 tokens, no room .* max_length=3"):
        sampler(model, max_length=3)(PROMPT, None, 9)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        sampler(model)(PROMPT, None, 0)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("llama", [2, 16, 5]),
        ("plain", [2, 2, 2]),  # whose number of positions nobody knows
    ],
)
def test_a_long_prompt_shortens_its_own_response_alone(name, lengths):
    prompts = torch.randint(3, VOCABULARY, (3, 30))
    mask = torch.ones_like(prompts)
    mask[1, :25] = mask[2, :3] = 0  # 30, 5 and 27 tokens, of 32 with the response
    for temperature in (0.0, 1.0):
        rollout = sampler(MODELS[name](), max_length=32, eos_token_id=[])(
            prompts, mask, 16, temperature
        )
        assert rollout.token_mask.sum(1).tolist() == lengths
        assert rollout.token_mask.shape[1] == 30 + max(lengths)
        assert (rollout.response_masks.sum(1) <= 32).all()
        assert torch.equal(rollout.token_mask[:, :30], 0 * mask)


def test_no_position_beyond_the_model_s():
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32
    )
    model = transformers.GPT2LMHeadModel(config).double()
    prompts = torch.randint(3, VOCABULARY, (2, 30))
    mask = torch.ones_like(prompts)
    mask[1, :25] = 0
    for max_length, lengths in ((32, [2, 2]), (31, [1, 2]), (None, [2, 2]), (500, [2, 2])):
        rollout = sampler(model, max_length=max_length, eos_token_id=[])(prompts, mask, 16)
        assert rollout.token_mask.sum(1).tolist() == lengths
    with pytest.raises(ValueError, match=r"has 32 tokens, no room .* within the model's 32 pos"):
        sampler(model)(torch.randint(3, VOCABULARY, (1, 32)), None, 16)


@pytest.mark.parametrize("kind", [lambda *a: Rollout(*a), lambda *a: a, lambda *a: {
    "responses": a[0], "response_masks": a[1], "token_mask": a[2]}])  # fmt: skip
def test_rollouts_of_others(kind):
    ids = torch.tensor([[5, 9, 4, 8]])
    tokens = torch.tensor([[0, 0, 0, 1]])
    result = sampler(tiny_model(), rollout=lambda *a: kind(ids, torch.ones_like(ids), tokens))(
        PROMPT, None, 1
    )
    assert torch.equal(result.responses, ids) and torch.equal(result.token_mask, tokens)


def test_rollouts_that_cannot_be_used():
    with pytest.raises(TypeError, match="rollout must be callable"):
        sampler(tiny_model(), rollout=3)
    with pytest.raises(TypeError, match="rollout must return"):
        sampler(tiny_model(), rollout=lambda *a: None)(PROMPT, None, 1)
    with pytest.raises(ValueError, match="the rollout's token_mask must be"):
        sampler(tiny_model(), rollout=lambda *a: (PROMPT, PROMPT, PROMPT[:, :1]))(PROMPT, None, 1)
    with pytest.raises(ValueError, match=r"the rollout's finished must be \(1,\), got \(2,\)"):
        sampler(tiny_model(), rollout=lambda *a: {
            "responses": PROMPT, "response_masks": PROMPT, "token_mask": PROMPT,
            "finished": [True, False],
        })(PROMPT, None, 1)  # fmt: skip
