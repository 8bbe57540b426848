"""The loss of transformers' models made from hidden states, against the models' own."""

import copy
import inspect
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from apt_kernels.integrations.transformers import apply_to_transformers

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
DECODER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "Llama": ("ForCausalLM", DECODER),
    "Qwen3": ("ForCausalLM", DECODER | {"head_dim": 8, "tie_word_embeddings": True}),
    "Phi": ("ForCausalLM", DECODER | {"num_key_value_heads": 2}),  # an output layer with a bias
    "GPT2": ("LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "GPTNeoX": ("ForCausalLM", DECODER),
    "Gemma2": ("ForCausalLM", DECODER | {"head_dim": 8, "final_logit_softcapping": 0.5}),
    "Granite": ("ForCausalLM", DECODER | {"logits_scaling": 4.0}),
    "Cohere": ("ForCausalLM", DECODER | {"logit_scale": 0.25}),
    "Mixtral": (
        "ForCausalLM",
        DECODER | {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True},
    ),
    "Bert": ("ForMaskedLM", ENCODER),
    "Roberta": ("ForMaskedLM", ENCODER),
    "ModernBert": ("ForMaskedLM", ENCODER | {"sparse_prediction": True}),
    "DistilBert": ("ForMaskedLM", {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}),
    "Electra": ("ForMaskedLM", ENCODER | {"embedding_size": 8}),
    "Albert": ("ForMaskedLM", ENCODER | {"embedding_size": 8}),
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}


def model_of(family, seed=0, **options):
    """A model without dropout, of weights large enough for logits that differ."""
    suffix, sizes = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, **sizes, **SPECIAL, sep_token_id=2, **options
    )
    for name in vars(config):
        if "dropout" in name or "pdrop" in name:
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = getattr(transformers, family + suffix)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
            elif "bias" in name:
                parameter.normal_()
    return model.train()


def batch(seed=0, rows=3, length=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def step(model, given):
    """The loss and the gradients of one pass."""
    model.zero_grad()
    outputs = model(**given)
    outputs.loss.backward()
    return outputs, [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same_step(model, given, **tolerance):
    """The fused step is the plain one; gives the fused outputs."""
    plain, wanted = step(model, given)
    applied = apply_to_transformers(model)
    fused, grads = step(model, given)
    assert applied.report() == {"taken": 1, "with_logits": 0, "refused": {}}
    applied.undo()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} | tolerance
    torch.testing.assert_close(fused.loss, plain.loss, **tolerance)
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected, **tolerance)
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)
    return fused


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family):
    fused = assert_same_step(model_of(family), batch())
    assert fused.logits is None


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_counts_and_shifted_labels_of_the_caller(family):
    given = batch()
    shifted = torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
    for count in (7, torch.tensor(7), 1):
        assert_same_step(model_of(family), given | {"num_items_in_batch": count})
    assert_same_step(model_of(family), given | {"shift_labels": shifted})


@pytest.mark.parametrize("family", ["Llama", "Bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(family, dtype):
    model, given = model_of(family), batch()
    applied = apply_to_transformers(model)
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].dtype)
    )
    with torch.autocast("cpu", dtype):
        fused = model(**given).loss
    fused.backward()
    hook.remove()
    assert seen and applied.report()["taken"] == 1 and fused.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    applied.undo()
    with torch.autocast("cpu", dtype):
        plain = model(**given).loss
    torch.testing.assert_close(fused, plain, rtol=2e-2, atol=1e-2)


def test_a_tuple_is_returned_where_it_is_asked_for():
    model, given = model_of("Llama"), batch()
    apply_to_transformers(model)
    loss, *_ = model(**given, return_dict=False)
    torch.testing.assert_close(loss, model(**given).loss)
    ids, mask, labels = given.values()
    place = list(inspect.signature(model.forward).parameters).index("labels")
    positional = model(ids, mask, *[None] * (place - 2), labels).loss
    torch.testing.assert_close(loss, positional)


def test_evaluation_returns_logits_unless_told_otherwise():
    model, given = model_of("Llama").eval(), batch()
    plain = model(**given)
    applied = apply_to_transformers(model)
    outputs = model(**given)
    torch.testing.assert_close(outputs.logits, plain.logits)
    torch.testing.assert_close(outputs.loss, plain.loss)
    assert applied.report() == {"taken": 0, "with_logits": 1, "refused": {}}
    applied.undo()
    apply_to_transformers(model, logits="never")
    outputs = model(**given)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, plain.loss)
    generated = model.generate(given["input_ids"], max_new_tokens=3, do_sample=False)
    assert generated.shape == (3, 12), "without labels the model is as it was"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [None, 5])
def test_label_smoothing_is_the_trainers(training, count):
    from transformers.trainer_pt_utils import LabelSmoother

    model, given = model_of("Cohere").train(training), batch()
    logits = model(**{k: v for k, v in given.items() if k != "labels"})
    more = {} if count is None else {"num_items_in_batch": count}
    wanted = LabelSmoother(0.2)(logits, given["labels"], shift_labels=True, **more)
    apply_to_transformers(model, label_smoothing=0.2)
    torch.testing.assert_close(model(**given, **more).loss, wanted)


def test_nothing_counts():
    model, given = model_of("Bert"), batch()
    apply_to_transformers(model)
    outputs, grads = step(model, given | {"labels": torch.full_like(given["labels"], -100)})
    assert outputs.loss == 0
    assert all((grad == 0).all() for grad in grads if grad is not None)


def test_applied_twice_copied_pickled_and_undone():
    model, given = model_of("Llama"), batch()
    kind, wanted = type(model), model(**given).loss
    applied = apply_to_transformers(model)
    changed = type(model)
    assert apply_to_transformers(model).report() == applied.report()
    with pytest.raises(ValueError, match="undo it"):
        apply_to_transformers(model, logits="never")
    assert type(model) is changed and type(model).__name__ == kind.__name__
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        outputs = made(**given)
        assert outputs.logits is None
        torch.testing.assert_close(outputs.loss, wanted)
        outputs.loss.backward()
    assert applied.report()["taken"] == 0 and model.lm_head.weight.grad is None
    applied.undo()
    applied.undo()
    assert type(model) is kind and model(**given).logits is not None
    assert applied.report()["taken"] == 0


def test_saved_as_the_model_that_it_is(tmp_path):
    model, given = model_of("Llama"), batch()
    wanted = model(**given).loss
    apply_to_transformers(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(again(**given).loss, wanted)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_one_graph_for_all_lengths(compiled_first):
    torch._dynamo.reset()
    model = model_of("Llama")
    wanted = [step(model, batch(length=length)) for length in (9, 10, 12)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    if compiled_first:
        applied = apply_to_transformers(compiled)
    else:
        applied = apply_to_transformers(model)
    for length, (plain, grads) in zip((9, 10, 12), wanted, strict=True):
        fused, got = step(compiled, batch(length=length))
        assert fused.logits is None
        torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
        for grad, expected in zip(got, grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2, "one static graph, one for all other lengths"
    assert applied.report()["taken"] == 0, "calls of a compiled model are not counted"


def test_within_an_adapter_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_of("Llama"), config)
    fused = assert_same_step(model, batch())
    assert fused.logits is None


def test_an_adapter_on_the_output_layer_is_not_lost():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    base, given = model_of("Llama"), batch()
    applied = apply_to_transformers(base)
    model = peft.get_peft_model(base, config)
    with pytest.warns(UserWarning, match=r"output layer is a peft\."):
        fused = model(**given)
    model(**given)
    (count,) = applied.report()["refused"].values()
    assert count == 2 and applied.report()["taken"] == 0
    applied.undo()
    torch.testing.assert_close(fused.loss, model(**given).loss)
    with pytest.raises(ValueError, match=r"output layer is a peft\."):
        apply_to_transformers(model)


def test_calls_that_are_refused_warn_once_and_are_counted():
    model, given = model_of("Llama"), batch()
    applied = apply_to_transformers(model)
    unlabelled = {k: v for k, v in given.items() if k != "labels"}
    with pytest.warns(UserWarning, match="no labels"):
        model(**unlabelled)
    assert model(**unlabelled).logits is not None
    with pytest.warns(UserWarning, match="logits_to_keep"):
        assert model(**unlabelled, labels=given["labels"], logits_to_keep=9).logits is not None
    assert sorted(applied.report()["refused"].values()) == [1, 2]


class _Penalised(transformers.LlamaForCausalLM):
    """A model whose loss is more than its cross-entropy."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + outputs.logits.square().mean()
        return outputs


class _Bounded(transformers.LlamaForCausalLM):
    """A model that does to its logits what no head here does."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.clamp(max=1.0)
        return outputs


def _llama(kind):
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **DECODER)
    return kind(config)


REFUSED = {
    "an encoder-decoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=31, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    ),
    "mean cross-entropy": lambda: _llama(_Penalised),
    "more than a scale and a tanh cap": lambda: _llama(_Bounded),
    "a trial with eight tokens failed": lambda: transformers.BertForPreTraining(
        transformers.BertConfig(vocab_size=31, **ENCODER)
    ),
    "output layer is a builtins.NoneType": lambda: _llama(transformers.LlamaModel),
    "got a Linear": lambda: torch.nn.Linear(2, 2),
    "meta device": lambda: _llama(transformers.LlamaForCausalLM).to("meta"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_are_not_understood_are_refused(message):
    with pytest.raises(ValueError, match=message):
        apply_to_transformers(REFUSED[message]())


def test_another_patch_is_named():
    model = model_of("Llama")
    model.forward = model.forward
    with pytest.raises(ValueError, match="undo that patch"):
        apply_to_transformers(model)


def test_the_trial_leaves_no_trace():
    model = model_of("Llama")
    model.model.layers[0].eval()
    state, random = [m.training for m in model.modules()], torch.get_rng_state()
    apply_to_transformers(model)
    assert [m.training for m in model.modules()] == state
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
