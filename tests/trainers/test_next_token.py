"""Scoring without logits against the model's own logits, for models that do more to them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from apt_kernels import dispatch
from apt_model.scoring import next_token
from apt_model.scoring.model_access import vocabulary_size
from apt_model.scoring.next_token import NextTokenScorer
from support.tiny_models import VOCABULARY, TinyCausalModel, TinyModelWithHead, tiny_llama

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def family(config, model, **options):
    import transformers

    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **options}))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return built


def gpt2():
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


FAMILIES = {
    "llama": (lambda: tiny_llama(), 1.0, None),
    "tied llama": (lambda: tiny_llama(tie_word_embeddings=True), 1.0, None),
    "gpt2": (gpt2, 1.0, None),
    "gemma2": (
        lambda: family(
            "Gemma2Config", "Gemma2ForCausalLM", head_dim=8, final_logit_softcapping=2.0
        ),
        1.0,
        2.0,
    ),
    "cohere": (lambda: family("CohereConfig", "CohereForCausalLM", logit_scale=0.3), 0.3, None),
    "granite": (
        lambda: family("GraniteConfig", "GraniteForCausalLM", logits_scaling=7.0),
        1 / 7,
        None,
    ),
}


def batch_of(pad_left):
    ids = torch.randint(1, VOCABULARY - 1, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return (ids, mask) if pad_left else (ids, mask.flip(1))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pad_left", [False, True])
def test_hidden_states_score_as_logits_do(name, pad_left):
    make, scale, softcap = FAMILIES[name]
    # Gemma's attention overflows to NaN in float64 at a row that sees no token
    model = make().to(torch.float32 if name == "gemma2" else torch.float64).eval()
    ids, mask = batch_of(pad_left)
    scored = mask.bool() & F.pad(mask[:, :-1].bool(), (1, 0))
    by_hidden, by_logits = NextTokenScorer(model), NextTokenScorer(model, use_hidden_states=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logps = by_hidden(ids, mask, scored)
    assert by_hidden.uses_hidden_states and not by_logits.uses_hidden_states
    assert by_hidden._head.logit_scale == pytest.approx(scale, rel=1e-6)
    assert by_hidden._head.softcap == (None if softcap is None else pytest.approx(softcap))
    expected = by_logits(ids, mask, scored)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert logps.abs().max() > 1 and (logps[~scored[:, 1:]] == 0).all()
    weights = torch.randn(logps.shape)
    ours = torch.autograd.grad((logps * weights).sum(), model.parameters(), allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), model.parameters(), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_model_makes_no_logits(monkeypatch):
    model = tiny_llama(layers=1)
    ids = torch.randint(0, VOCABULARY, (2, 20))
    scorer = NextTokenScorer(model)
    scorer(ids)
    given = []

    def score(hidden, weight, token_ids, **options):
        given.append((hidden.shape, weight, options["mask"]))
        return hidden.sum(-1)

    monkeypatch.setattr(next_token, "linear_token_logprobs", score)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Sizes():
        scorer(ids, mask=torch.ones_like(ids).bool().index_fill(1, torch.arange(9), False))
    ((shape, weight, mask),) = given
    assert shape == (2, 20, 16) and weight is model.lm_head.weight
    assert mask.sum() == 2 * 11 and not mask[:, -1].any()
    assert 0 < max(sizes) < 2 * 20 * VOCABULARY
    assert "forward" not in vars(model.lm_head)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "tied, dtype, dense",
    [
        (True, torch.float32, False),
        (True, torch.float64, False),
        (True, torch.bfloat16, True),
        (False, torch.float32, True),
    ],
)
def test_a_tied_embedding_adds_rows_to_the_gradient_of_the_head(tied, dtype, dense):
    model = tiny_llama(layers=1, tie_word_embeddings=tied).to(dtype)
    embedding = model.get_input_embeddings()
    ids = torch.randint(0, VOCABULARY, (2, 20))
    ids[:, 5:9] = 3  # a token that comes again
    by_hidden, by_logits = NextTokenScorer(model), NextTokenScorer(model, use_hidden_states=False)
    grads = []
    for scorer in (by_hidden, by_logits):
        model.zero_grad()
        for _ in range(2):  # onto what is there
            loss = scorer(ids).square().sum()
            assert not embedding.sparse
            with Calls() as calls:
                loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        if scorer is by_hidden:
            assert ("embedding_dense_backward" in calls.names) == dense
    for name, grad in grads[0].items():
        assert grad.layout == torch.strided
        if dtype != torch.bfloat16:
            tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
            torch.testing.assert_close(grad, grads[1][name], rtol=tolerance, atol=tolerance)


def test_the_gradient_of_a_tied_layer_takes_the_rows_in_place(monkeypatch):
    model = tiny_llama(layers=1, tie_word_embeddings=True)
    made, name = [], ("linear_token_logprobs_bwd", "native")
    backward = dispatch._KERNELS.get(name)
    if backward is None:
        pytest.skip("without native kernels the gradient is autograd's")

    def noted(*arguments):
        grads = backward(*arguments)
        made.append(grads[1].data_ptr())
        return grads

    monkeypatch.setitem(dispatch._KERNELS, name, noted)
    NextTokenScorer(model)(torch.randint(0, VOCABULARY, (2, 20))).sum().backward()
    assert made == [model.lm_head.weight.grad.data_ptr()]


class Changed(TinyModelWithHead):
    """A model whose logits are not those of its output embedding."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, input_ids, attention_mask=None):
        return self.change(super().forward(input_ids, attention_mask))


def masked_columns(logits):
    return torch.cat([logits[..., :-3], logits[..., -3:] - 1e6], dim=-1)


def padded_vocabulary(value):
    """The last columns are of no token."""

    def change(logits):
        return logits.masked_fill(torch.arange(logits.shape[-1]) >= VOCABULARY - 3, value)

    return lambda: Changed(change)


UNTRUSTED = {
    "padding of -inf": (padded_vocabulary(-torch.inf), "some of its logits"),
    "padding of -1e4": (padded_vocabulary(-1e4), "some of its logits"),
    "padding of the least number": (
        padded_vocabulary(torch.finfo(torch.float64).min),
        "some of its logits",
    ),
    "cut columns": (lambda: Changed(lambda logits: logits[..., : VOCABULARY - 1]), "logits from"),
    "masked columns": (lambda: Changed(masked_columns), "more than a scale|differ"),
    "squares": (lambda: Changed(lambda logits: logits + 0.1 * logits**2), "more than a scale"),
    "bias": (lambda: Changed(lambda logits: logits + 0.1 * torch.arange(VOCABULARY)), "replaced"),
    "temperature by position": (
        lambda: Changed(lambda logits: logits * torch.arange(1, logits.shape[1] + 1)[:, None]),
        "some of its logits",
    ),
}


@pytest.mark.parametrize("name", UNTRUSTED)
def test_a_head_that_cannot_be_trusted_is_given_up(name):
    make, reason = UNTRUSTED[name]
    torch.manual_seed(0)
    model = make().double()
    ids, mask = batch_of(False)
    ids = ids % (VOCABULARY - 3)
    with pytest.warns(UserWarning, match=reason):
        logps = NextTokenScorer(model)(ids, mask)
    expected = F.log_softmax(model(ids, mask)[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-9)


def test_a_head_that_another_library_has_changed_is_given_up():
    model = TinyModelWithHead().double()
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * original(hidden)
    ids, _ = batch_of(False)
    with pytest.warns(UserWarning, match="plain nn.Linear"):
        logps = NextTokenScorer(model)(ids)
    expected = F.log_softmax(model(ids)[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-9)


def test_a_head_that_is_not_called_is_given_up():
    model = TinyModelWithHead().double()
    model.lm_head, unused = torch.nn.Sequential(model.lm_head), model.lm_head
    model.get_output_embeddings = lambda: torch.nn.Linear(16, VOCABULARY).double()
    ids, _ = batch_of(False)
    with pytest.warns(UserWarning, match="replaced"):
        scorer = NextTokenScorer(model)
        logps = scorer(ids)
    expected = F.log_softmax(model(ids)[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-9)
    assert unused is model.lm_head[0]


def test_the_first_check_leaves_the_random_state():
    model = TinyModelWithHead(dropout=0.5)
    ids, _ = batch_of(False)
    scorer = NextTokenScorer(model)
    states = []
    for _ in range(2):  # the first call checks, the second does not
        torch.manual_seed(1)
        states.append((scorer(ids).detach(), torch.get_rng_state()))
    assert scorer.uses_hidden_states
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])


def test_bfloat16_is_trusted():
    model = tiny_llama().bfloat16()
    ids, mask = batch_of(False)
    scorer = NextTokenScorer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logps = scorer(ids, mask)
    assert scorer.uses_hidden_states and logps.dtype is torch.float32


def test_autocast_reaches_the_head(monkeypatch):
    seen = []
    score = next_token.linear_token_logprobs

    def spied(hidden, weight, *args, **options):
        seen.append((hidden.dtype, weight.dtype))
        return score(hidden, weight, *args, **options)

    monkeypatch.setattr(next_token, "linear_token_logprobs", spied)
    ids, mask = batch_of(False)
    for model, dtype in (
        (tiny_llama().float(), torch.bfloat16),
        (tiny_llama(), torch.float64),  # which autocast leaves alone
    ):
        scorer = NextTokenScorer(model)
        with torch.autocast("cpu", torch.bfloat16):
            logps = scorer(ids, mask)
        assert scorer.uses_hidden_states and seen[-1] == (dtype, dtype)
        logps.sum().backward()
        assert model.lm_head.weight.grad.abs().max() > 0
    scorer(ids, mask)
    assert seen[-1] == (torch.float64, torch.float64)


def test_prompt_learning_adapters_and_their_virtual_tokens():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny_llama(), config).double().eval()
    ids, mask = batch_of(False)
    scored = mask.bool() & F.pad(mask[:, :-1].bool(), (1, 0))
    scorer = NextTokenScorer(model)
    logps = scorer(ids, mask, scored)
    logits = model(ids, attention_mask=mask).logits
    assert logits.shape[1] == ids.shape[1] + 4 and scorer.uses_hidden_states
    expected = F.log_softmax(logits[:, 4:-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logps, expected * scored[:, 1:], rtol=0, atol=1e-9)


def test_vocabulary_size():
    assert vocabulary_size(tiny_llama()) == VOCABULARY
    assert vocabulary_size(TinyModelWithHead(vocabulary=7)) == 7
    assert vocabulary_size(TinyCausalModel()) is None
