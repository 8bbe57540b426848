"""Masked language models of transformers train the heads that they have themselves."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.parallel import DistributedDataParallel

from apt_model.pretraining import create_mlm_pretrainer
from apt_model.pretraining.own_head import OwnMLMHead, OwnNSPHead
from support.tiny_encoders import SIZES, VOCABULARY, WIDTH, random_texts, tiny_bert
from support.trainer_checks import decayed

NARROW = {**SIZES, "embedding_size": 8}
MOBILE = {**NARROW, "intra_bottleneck_size": 8, "true_hidden_size": 8}
REM = {**SIZES, "input_embedding_size": 8, "output_embedding_size": 12}
DISTIL = dict(
    vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=24, n_layers=2, n_heads=2, dropout=0.0,
    attention_dropout=0.0, max_position_embeddings=64,
)  # fmt: skip
XLM = dict(vocab_size=VOCABULARY, emb_dim=WIDTH, n_layers=2, n_heads=2, dropout=0.0,
           attention_dropout=0.0, max_position_embeddings=64)  # fmt: skip
ESM = {**SIZES, "mask_token_id": 4, "token_dropout": True}
MODERN = {**SIZES, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
# The class before ForMaskedLM, its options, whether the loss takes the last layer's place
KINDS = {
    "Bert": (SIZES, True), "Roberta": (SIZES, True), "Albert": (NARROW, True),
    "Electra": (NARROW, True), "MobileBert": (MOBILE, False), "RemBert": (REM, True),
    "DistilBert": (DISTIL, True), "Esm": (ESM, False), "ModernBert": (MODERN, True),
    "DebertaV2": (SIZES, True), "MPNet": (SIZES, True), "RoFormer": (NARROW, True),
    "XLMRoberta": (SIZES, True),
}  # fmt: skip


def make_model(kind, heads="ForMaskedLM"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(pad_token_id=0, **KINDS[kind][0])
    model = getattr(transformers, kind + heads)(config).double()
    with torch.no_grad():  # biases of a trained model are not 0
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make(model, **options):
    options = {"vocab_size": VOCABULARY, "warmup_steps": 0, "mask_prob": 0.5, **options}
    return create_mlm_pretrainer(model, WIDTH, learning_rate=0.01, **options)


def their_step(model, ids, mask, labels, **inputs):
    """A step of transformers' own model, with the optimizer that the trainer makes."""
    optimizer = torch.optim.AdamW(decayed(model.parameters(), 0.01), lr=0.01)
    output = model(ids, attention_mask=mask, labels=labels if inputs else None, **inputs)
    if not inputs:  # transformers computes some of its losses in float32
        output.loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return output.loss.item()


def assert_same_weights(ours, theirs, tolerance=1e-9):
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_transformers_own(kind):
    model = make_model(kind)
    plain = copy.deepcopy(model)
    trainer = make(model)
    batch = random_texts()
    ids, labels, _ = trainer.create_mlm_mask(**batch)
    held_out = trainer.eval_step(**batch)
    metrics = trainer.train_step(**batch)
    loss = their_step(plain, ids, batch["attention_mask"], labels)
    assert metrics["mlm_loss"] == pytest.approx(loss, abs=1e-9)
    assert 0 < held_out["mlm_loss"] != loss
    assert_same_weights(model, plain)
    assert isinstance(trainer.mlm_head, OwnMLMHead) and not list(trainer.mlm_head.parameters())
    assert (trainer.mlm_head._layer is not None) == KINDS[kind][1]


@pytest.mark.parametrize("kind", ["Bert", "MobileBert", "Esm"])
def test_the_head_is_one_of_hidden_states_too(kind):
    model = make_model(kind)
    trainer, batch = make(model), random_texts()
    ids, labels, _ = trainer.create_mlm_mask(**batch)
    hidden = model.base_model(ids, attention_mask=batch["attention_mask"]).last_hidden_state
    output = model(ids, attention_mask=batch["attention_mask"], labels=labels)
    torch.testing.assert_close(trainer.mlm_head(hidden), output.logits, rtol=1e-9, atol=1e-9)
    loss, accuracy = trainer.compute_mlm_loss(hidden, labels)
    assert loss.item() == pytest.approx(output.loss.item(), abs=1e-9)
    right = (output.logits.argmax(-1) == labels)[labels != -100].double().mean()
    assert accuracy.item() == pytest.approx(right.item())


@pytest.mark.parametrize("kind", ["Bert", "MobileBert"])
def test_next_sentences_are_predicted_by_the_model_s_own_head(kind):
    model = make_model(kind, "ForPreTraining")
    plain = copy.deepcopy(model)
    trainer = make(model, use_nsp=True)
    assert isinstance(trainer.nsp_head, OwnNSPHead)
    batch = random_texts()
    ids, labels, _ = trainer.create_mlm_mask(**batch)
    follows = torch.tensor([0, 1, 1, 0, 1, 0])
    ends = (batch["input_ids"] == 3).long()
    types = (ends.cumsum(-1) - ends).clamp(max=1)
    metrics = trainer.train_step(**batch, nsp_labels=follows)
    more = {"next_sentence_label": follows, "token_type_ids": types}
    loss = their_step(plain, ids, batch["attention_mask"], labels, **more)
    assert metrics["total_loss"] == pytest.approx(loss, abs=1e-9)
    assert metrics["mlm_loss"] + metrics["nsp_loss"] == pytest.approx(loss, abs=1e-9)
    assert_same_weights(model, plain)
    pooled = model.base_model(ids, attention_mask=batch["attention_mask"]).pooler_output
    theirs = model(ids, attention_mask=batch["attention_mask"]).seq_relationship_logits
    expected = F.cross_entropy(theirs, follows)
    assert trainer.compute_nsp_loss(pooled, follows)[0].item() == pytest.approx(expected.item())


def test_a_model_without_a_next_sentence_head_is_given_one():
    trainer = make(make_model("Bert"), use_nsp=True)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    before = trainer.nsp_head.classifier.weight.detach().clone()
    assert trainer.train_step(**random_texts(), nsp_labels=labels)["nsp_loss"] > 0
    assert not torch.equal(trainer.nsp_head.classifier.weight, before)


@pytest.mark.parametrize("kind", ["Bert", "Albert", "MobileBert"])
def test_what_is_saved_has_the_same_loss_and_a_second_stage_goes_on(kind, tmp_path):
    trainer = make(make_model(kind))
    for step in range(3):
        trainer.train_step(**random_texts(seed=step))
    trainer.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    batch = random_texts(seed=7)
    ids, labels, _ = trainer.create_mlm_mask(**batch)
    with torch.no_grad():
        output = loaded(ids, attention_mask=batch["attention_mask"], labels=labels)
        ours = trainer.model(ids, attention_mask=batch["attention_mask"], labels=labels)
    assert output.loss.item() == ours.loss.item()
    assert make(loaded).eval_step(**batch)["mlm_loss"] == trainer.eval_step(**batch)["mlm_loss"]


def test_accumulated_and_empty_batches():
    model = make_model("Bert")
    parts, whole = make(copy.deepcopy(model), gradient_accumulation_steps=3), make(model)
    for step in range(2):
        batch = random_texts(seed=step)
        metrics = parts.train_step(**batch)
        assert metrics["mlm_loss"] == pytest.approx(whole.train_step(**batch)["mlm_loss"])
    assert_same_weights(parts.model, whole.model)
    none = make(make_model("Bert"), mask_prob=0.0)
    metrics = none.train_step(**random_texts())
    assert (metrics["mlm_loss"], metrics["num_masked"]) == (0, 0)


def test_wrapped_and_adapted_models(tmp_path):
    import peft

    batch = random_texts()
    expected = make(make_model("Bert")).train_step(**batch)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = make(DistributedDataParallel(make_model("Bert")))
        assert wrapped.train_step(**batch) == pytest.approx(expected)
    finally:
        torch.distributed.destroy_process_group()
    compiled = make(torch.compile(make_model("Bert"), backend="eager"))
    assert compiled.train_step(**batch) == pytest.approx(expected)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    adapted = make(peft.get_peft_model(make_model("Bert"), config))
    assert adapted.train_step(**batch)["mlm_loss"] == pytest.approx(expected["mlm_loss"])


def test_a_vocabulary_of_another_size_is_named():
    with pytest.raises(ValueError, match="vocab_size: expected 53"):
        make(tiny_bert(heads="mlm"), vocab_size=50)
