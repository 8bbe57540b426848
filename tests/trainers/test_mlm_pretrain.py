"""The MLM trainer against BERT's losses written out here, and what its contract promises."""

import copy
import os
import warnings

import pytest
import torch
import torch.nn.functional as F

from apt_kernels import mlm_mask
from apt_model.pretraining import MLMConfig, MLMPretrainer, create_mlm_pretrainer
from apt_model.pretraining.mlm_pretrain import MLMHead, NSPDataBuilder, NSPHead
from support import processes
from support.tiny_encoders import (
    ANSWERS,
    READY_SCHEDULERS,
    VOCABULARY,
    WIDTH,
    WITH_POSITIONS,
    ShowsEmbedding,
    TakesHiddenStates,
    random_texts,
    shifted_right,
    tiny_bert,
    tiny_encoder,
)
from support.tiny_models import parameters_of
from support.trainer_checks import decayed

SMALL = {"vocab_size": VOCABULARY, "warmup_steps": 0, "learning_rate": 0.01, "mask_prob": 0.4}
METRICS = ["total_loss", "mlm_loss", "mlm_accuracy", "num_masked"]


def make(model=None, **options):
    model = tiny_encoder() if model is None else model
    torch.manual_seed(7)
    return create_mlm_pretrainer(model, WIDTH, **{**SMALL, **options})


def nsp_batch(seed=0, **options):
    batch = random_texts(seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (len(batch["input_ids"]),), generator=generator)
    return {**batch, "nsp_labels": labels}


def assert_same_parameters(module, expected, tolerance=0.0):
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), expected[name], rtol=tolerance, atol=tolerance, msg=name
        )


def hidden_in(output):
    if isinstance(output, dict):
        return output.get("last_hidden_state", output.get("hidden_states", [None])[-1])
    if isinstance(output, tuple):
        return output[0]
    if isinstance(output, torch.Tensor):
        return output
    last = getattr(output, "last_hidden_state", None)
    return output.hidden_states[-1] if last is None else last


def paper_mlm(model, head, ids, mask, chosen_ids, chosen):
    """Devlin et al. 2018: softmax over the vocabulary at every chosen place, one by one."""
    hidden = hidden_in(model(input_ids=chosen_ids, attention_mask=mask))
    losses, right = [], 0
    for row, place in chosen.nonzero().tolist():
        x = F.gelu(F.linear(hidden[row, place], head.dense.weight, head.dense.bias))
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-12)
        x = x * head.layer_norm.weight + head.layer_norm.bias
        logits = head.decoder.weight @ x + head.decoder.bias
        losses.append(torch.logsumexp(logits, 0) - logits[ids[row, place]])
        right += int(logits.argmax() == ids[row, place])
    return torch.stack(losses).mean(), right / len(losses), hidden


MODELS = {
    **{name: lambda answer=answer: tiny_encoder(answer=answer) for name, answer in ANSWERS.items()},
    "asked": lambda: tiny_encoder(kind=TakesHiddenStates),
    "BERT": tiny_bert,
}


@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_the_paper_in_plain_pytorch(name):
    model = MODELS[name]()
    trainer = make(model)
    plain, head = copy.deepcopy(model), copy.deepcopy(trainer.mlm_head)
    if name == "asked":
        base = plain
        plain = lambda **inputs: base(**inputs, output_hidden_states=True)  # noqa: E731
    trained = [*(base if name == "asked" else plain).parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(decayed(trained, 0.01), lr=0.01)
    for step in range(3):
        batch = random_texts(seed=step)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        masked_ids, labels, chosen = trainer.create_mlm_mask(ids, mask)
        assert torch.equal(labels[chosen], ids[chosen]) and (labels[~chosen] == -100).all()
        loss, accuracy, _ = paper_mlm(plain, head, ids, mask, masked_ids, chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        metrics = trainer.train_step(**batch)
        assert list(metrics) == METRICS
        assert type(metrics["num_masked"]) is int and type(metrics["mlm_loss"]) is float
        assert metrics["num_masked"] == int(chosen.sum()) > 5
        assert metrics["mlm_loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["total_loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["mlm_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert_same_parameters(trainer.mlm_head, dict(head.named_parameters()), 1e-9)
    theirs = base if name == "asked" else plain
    assert_same_parameters(model, dict(theirs.named_parameters()), 1e-9)
    assert trainer.get_statistics() == {
        "total_steps": 3,
        "mean_mlm_loss": metrics["mlm_loss"],
        "mean_mlm_accuracy": metrics["mlm_accuracy"],
        "mean_nsp_loss": 0.0,
        "mean_nsp_accuracy": 0.0,
    }
    trainer.get_statistics()["total_steps"] = 100
    assert trainer.get_statistics()["total_steps"] == 3


@pytest.mark.parametrize("kind", ["bare", "BERT"])
def test_steps_with_next_sentences_equal_the_paper(kind):
    model = tiny_encoder() if kind == "bare" else tiny_bert()
    trainer = make(model, use_nsp=True, mlm_loss_weight=0.7, nsp_loss_weight=1.3)
    plain, head = copy.deepcopy(model), copy.deepcopy(trainer.mlm_head)
    nsp = copy.deepcopy(trainer.nsp_head)
    trained = [*plain.parameters(), *head.parameters(), *nsp.parameters()]
    optimizer = torch.optim.AdamW(decayed(trained, 0.01), lr=0.01)

    def run(input_ids, attention_mask):
        if kind == "bare":
            return plain(input_ids, attention_mask)
        types = torch.zeros_like(input_ids)  # the second segment, written out row by row
        for row in range(len(input_ids)):
            types[row, 7:] = attention_mask[row, 7:]
        return plain(input_ids, attention_mask=attention_mask, token_type_ids=types)

    for step in range(2):
        batch = nsp_batch(step)
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["nsp_labels"]
        masked_ids, _, chosen = trainer.create_mlm_mask(ids, mask)
        found = []

        def spied(found=found, **inputs):
            found.append(run(**inputs))
            return found[0]

        mlm_loss, _, hidden = paper_mlm(spied, head, ids, mask, masked_ids, chosen)
        pooled = hidden[:, 0] if kind == "bare" else found[0].pooler_output
        logits = pooled @ nsp.classifier.weight.T + nsp.classifier.bias
        nsp_loss = torch.stack(
            [torch.logsumexp(row, 0) - row[y] for row, y in zip(logits, labels, strict=True)]
        ).mean()
        loss = 0.7 * mlm_loss + 1.3 * nsp_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        metrics = trainer.train_step(**batch)
        assert sorted(metrics) == sorted([*METRICS, "nsp_loss", "nsp_accuracy"])
        assert metrics["total_loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["nsp_loss"] == pytest.approx(nsp_loss.item(), abs=1e-9)
        right = (logits.argmax(-1) == labels).double().mean().item()
        assert metrics["nsp_accuracy"] == pytest.approx(right)
    assert_same_parameters(model, dict(plain.named_parameters()), 1e-9)
    assert_same_parameters(trainer.nsp_head, dict(nsp.named_parameters()), 1e-9)
    assert trainer.get_statistics()["mean_nsp_loss"] == metrics["nsp_loss"]
    loss, accuracy = trainer.compute_nsp_loss(pooled.detach(), labels)
    assert loss.requires_grad and 0 <= accuracy.item() <= 1


@pytest.mark.parametrize("given", ["decoder", "whole head"])
def test_the_loss_is_that_of_hugging_face_on_the_same_masks(given):
    model = tiny_bert(heads="mlm")
    plain = copy.deepcopy(model)
    batch = random_texts()
    if given == "whole head":
        trainer = make(model, lm_head=model.cls)
    else:
        trainer = make(model, lm_head=model.get_output_embeddings())
        theirs = plain.cls.predictions
        with torch.no_grad():
            theirs.transform.dense.weight.copy_(trainer.mlm_head.dense.weight)
            theirs.transform.dense.bias.copy_(trainer.mlm_head.dense.bias)
            theirs.transform.LayerNorm.weight.copy_(trainer.mlm_head.layer_norm.weight)
    masked_ids, labels, _ = trainer.create_mlm_mask(**batch)
    output = plain(masked_ids, attention_mask=batch["attention_mask"], labels=labels)
    output.loss.backward()
    hidden = model.bert(masked_ids, attention_mask=batch["attention_mask"]).last_hidden_state
    loss, _ = trainer.compute_mlm_loss(hidden, labels)
    assert loss.item() == pytest.approx(output.loss.item(), abs=1e-9)
    loss.backward()
    for (name, ours), theirs in zip(
        model.bert.named_parameters(), plain.bert.parameters(), strict=True
    ):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)
    other = copy.deepcopy(model)
    cut = make(other, lm_head=other.cls, gradient_accumulation_steps=3)
    decoded = []
    plain_decoder = model.cls.predictions.decoder
    plain_decoder.register_forward_hook(lambda _m, inputs, _o: decoded.append(len(inputs[0])))
    metrics = trainer.train_step(**batch)
    assert metrics["mlm_loss"] == pytest.approx(output.loss.item(), abs=1e-9)
    # The model's own head does not run: only what was given, at the masked tokens
    assert decoded == ([metrics["num_masked"]] if given == "whole head" else [])
    if given == "whole head":
        assert cut.train_step(**batch) == pytest.approx(metrics, abs=1e-9)
        assert_same_parameters(cut.model, parameters_of(model), 1e-9)


def test_a_tied_decoder_stays_tied():
    model = tiny_encoder(kind=ShowsEmbedding)
    trainer = make(model, lm_head=model.get_input_embeddings())
    assert trainer.mlm_head.decoder.weight is model.embedding.weight
    start = model.embedding.weight.detach().clone()
    batch = random_texts()
    masked_ids, labels, chosen = trainer.create_mlm_mask(**batch)
    hidden = model(masked_ids, batch["attention_mask"])
    features = trainer.mlm_head.layer_norm(F.gelu(trainer.mlm_head.dense(hidden[chosen])))
    logits = features @ model.embedding.weight.T + trainer.mlm_head.decoder.bias
    expected = F.cross_entropy(logits, labels[chosen])
    grad = torch.autograd.grad(expected, model.embedding.weight)[0]
    loss, _ = trainer.compute_mlm_loss(model(masked_ids, batch["attention_mask"]), labels)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    ours = torch.autograd.grad(loss, model.embedding.weight)[0]
    torch.testing.assert_close(ours, grad, rtol=1e-9, atol=1e-9)
    trainer.train_step(**batch)
    assert trainer.mlm_head.decoder.weight is model.embedding.weight
    assert not torch.equal(model.embedding.weight, start)
    resumed = make(tiny_encoder(3, kind=ShowsEmbedding))
    with pytest.raises(ValueError, match=r"lm_head has a weight \(53, 16\)"):
        make(tiny_encoder(), lm_head=model.embedding, vocab_size=50)
    with pytest.raises(ValueError, match=r"makes \(53,\) logits, vocab_size is 52"):
        make(tiny_encoder(), lm_head=torch.nn.Sequential(resumed.mlm_head), vocab_size=52)


# Masks


def test_masks_depend_on_step_and_sample_alone():
    trainer = make()
    batch = random_texts(rows=6)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    before = ids.clone()
    whole = trainer.create_mlm_mask(ids, mask, sample_ids=torch.arange(10, 16))
    assert torch.equal(ids, before)
    for rows in (slice(0, 1), slice(2, 5)):
        part = trainer.create_mlm_mask(ids[rows], mask[rows], sample_ids=torch.arange(10, 16)[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))
    other_step = trainer.create_mlm_mask(ids, mask, sample_ids=torch.arange(10, 16), step=1)
    assert not torch.equal(other_step[2], whole[2])
    expected = mlm_mask(
        ids, mask_token_id=4, vocab_size=VOCABULARY, mask_prob=0.4, special_token_ids=(0, 2, 3),
        attention_mask=mask, sample_ids=torch.arange(10, 16), seed=0, step=0,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(whole, expected, strict=True))
    trainer.train_step(**batch)
    after_one = trainer.create_mlm_mask(ids, mask)
    assert torch.equal(after_one[2], trainer.create_mlm_mask(ids, mask, step=1)[2])


def test_rates_and_specials_of_the_masks():
    trainer = make(mask_prob=0.15, special_token_ids=[5])
    ids = torch.randint(0, VOCABULARY, (400, 100))
    masked_ids, labels, chosen = trainer.create_mlm_mask(ids)
    special = torch.isin(ids, torch.tensor([0, 2, 3, 4, 5]))
    assert not (chosen & special).any()
    rate = chosen.sum() / (~special).sum()
    assert rate.item() == pytest.approx(0.15, abs=0.006)
    of_chosen = masked_ids[chosen]
    assert (of_chosen == 4).double().mean().item() == pytest.approx(0.8, abs=0.02)
    changed = (of_chosen != 4) & (of_chosen != labels[chosen])
    assert changed.double().mean().item() == pytest.approx(0.1 * 47 / 48, abs=0.015)
    assert not torch.isin(of_chosen[changed], torch.tensor([0, 2, 3, 4, 5])).any()
    assert torch.equal(masked_ids[~chosen], ids[~chosen])


def test_whole_words():
    trainer = make()
    ids = torch.randint(5, VOCABULARY, (50, 12))
    words = torch.arange(12).div(3, rounding_mode="floor").expand(50, 12)
    chosen = trainer.create_mlm_mask(ids, word_ids=words)[2]
    by_word = chosen.view(50, 4, 3)
    assert torch.equal(by_word.any(-1), by_word.all(-1)) and 30 < by_word.any(-1).sum() < 130
    metrics = trainer.train_step(ids, word_ids=words)
    assert metrics["num_masked"] == int(chosen.sum())


def test_ids_of_padding_do_not_matter():
    batch = random_texts()
    spoiled = dict(batch)
    spoiled["input_ids"] = torch.where(batch["attention_mask"] == 0, -7, batch["input_ids"])
    assert make().train_step(**spoiled) == make().train_step(**batch)


@pytest.mark.parametrize("name", WITH_POSITIONS)
def test_left_padding_changes_nothing_where_positions_are_learned(name):
    everywhere = {"mask_prob": 1.0, "mask_token_prob": 1.0, "random_token_prob": 0.0}
    trainer = make(WITH_POSITIONS[name](), **everywhere, keep_token_prob=None)
    batch = random_texts()
    expected = trainer.eval_step(**batch)
    for padding in (0, 1):
        metrics = trainer.eval_step(**shifted_right(batch, 5, padding))
        assert metrics["num_masked"] == expected["num_masked"] > 20
        assert metrics["mlm_loss"] == pytest.approx(expected["mlm_loss"], abs=1e-9)


@pytest.mark.parametrize("use_nsp", [False, True])
def test_no_masked_token(use_nsp):
    trainer = make(use_nsp=use_nsp, weight_decay=0.0)
    start = parameters_of(trainer.model), parameters_of(trainer.mlm_head)
    ids = torch.tensor([[2, 3, 3, 0]])  # specials alone
    nsp = {"nsp_labels": torch.tensor([1])} if use_nsp else {}
    metrics = trainer.train_step(ids, **nsp)
    assert metrics["mlm_loss"] == 0 and metrics["num_masked"] == 0 and metrics["mlm_accuracy"] == 0
    assert_same_parameters(trainer.mlm_head, start[1])
    assert (metrics["total_loss"] == 0) == (not use_nsp)
    if not use_nsp:
        assert_same_parameters(trainer.model, start[0])
        for parameter in trainer.mlm_head.parameters():
            assert parameter.grad is None or (parameter.grad == 0).all()
    labels = torch.full((1, 4), -100)
    loss, accuracy = trainer.compute_mlm_loss(torch.randn(1, 4, WIDTH).double(), labels)
    assert loss.item() == 0 and accuracy.item() == 0 and loss.requires_grad
    assert trainer.train_step(**nsp_batch() if use_nsp else random_texts())["num_masked"] > 0


# Accumulation, resume, distribution


@pytest.mark.parametrize("use_nsp", [False, True])
def test_micro_batches_equal_one_large_batch(use_nsp):
    batch = nsp_batch(rows=5) if use_nsp else random_texts(rows=5)
    results = []
    for steps in (1, 3, 8):
        trainer = make(use_nsp=use_nsp, gradient_accumulation_steps=steps)
        metrics = [trainer.train_step(**batch) for _ in range(2)][-1]
        results.append((metrics, trainer))
    for metrics, trainer in results[1:]:
        assert metrics == pytest.approx(results[0][0], abs=1e-10)
        assert_same_parameters(trainer.model, parameters_of(results[0][1].model), 1e-10)
        assert_same_parameters(trainer.mlm_head, parameters_of(results[0][1].mlm_head), 1e-10)


def test_micro_batches_of_their_own_widths_and_counts_equal_one_large_batch():
    batch = random_texts(rows=4)
    batch["attention_mask"][0, 5:] = 0
    batch["input_ids"][0, 5:] = 0
    first = {name: tensor[:1, :5] for name, tensor in batch.items()}
    rest = {name: tensor[1:] for name, tensor in batch.items()}
    one, cut = make(), make()
    metrics = cut.train_micro_batches([first, rest])
    assert metrics == pytest.approx(one.train_step(**batch), abs=1e-10)
    assert_same_parameters(cut.model, parameters_of(one.model), 1e-10)
    counts = [int(one.create_mlm_mask(**part, step=0)[2].sum()) for part in (first, batch)]
    assert 0 < counts[0] < counts[1] - counts[0]


def make_resumable(seed):
    model = tiny_encoder(seed, kind=ShowsEmbedding, dropout=0.3)
    torch.manual_seed(seed)
    return create_mlm_pretrainer(
        model, WIDTH, {**SMALL, "use_nsp": True, "warmup_steps": 4}, lm_head=model.embedding
    )


def test_a_resumed_run_is_bit_identical(tmp_path):
    trainer = make_resumable(0)
    torch.manual_seed(3)
    for step in range(2):
        trainer.train_step(**nsp_batch(step))
    in_memory = trainer.state_dict()
    torch.save(in_memory, tmp_path / "state.pt")
    never_stopped = [trainer.train_step(**nsp_batch(step)) for step in range(2, 5)]
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), in_memory):
        torch.manual_seed(99)
        resumed = make_resumable(1)
        resumed.load_state_dict(state)
        assert [resumed.train_step(**nsp_batch(step)) for step in range(2, 5)] == never_stopped
        for name in ("model", "mlm_head", "nsp_head"):
            assert_same_parameters(getattr(resumed, name), parameters_of(getattr(trainer, name)))
        assert resumed.get_statistics() == trainer.get_statistics()
        assert resumed.curves.columns == trainer.curves.columns
    with pytest.raises(ValueError, match="both have a scheduler, or neither"):
        make().load_state_dict(in_memory)


def wrapped(kind):
    """The model, what is in it, and the tied decoder, which a sharded model cannot have."""
    inner = tiny_encoder(kind=ShowsEmbedding)
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(inner), inner, inner.embedding
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(inner, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="shares parameters with an FSDP2-sharded model"):
        make(inner, lm_head=inner.embedding)
    return inner, inner, None


def run_data_parallel(rank, folder):
    results = {}
    for kind in ("ddp", "fsdp2"):
        model, inner, head = wrapped(kind)
        torch.manual_seed(7 + 10 * rank)  # heads made from other random numbers become alike
        trainer = create_mlm_pretrainer(
            model, WIDTH, {**SMALL, "use_nsp": True}, lm_head=head, gradient_accumulation_steps=2
        )
        batch = {**nsp_batch(rows=5), "sample_ids": torch.arange(5)}
        rows = slice(0, 2) if rank == 0 else slice(2, 5)  # uneven on purpose
        batch = {k: v[rows] for k, v in batch.items()}
        metrics = [trainer.train_step(**batch) for _ in range(2)] + [trainer.eval_step(**batch)]
        modules = {"model": inner, "mlm_head": trainer.mlm_head, "nsp_head": trainer.nsp_head}
        parameters = {
            name: {
                k: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
                for k, p in module.named_parameters()
            }
            for name, module in modules.items()
        }
        own_masks = int(trainer._batch(0, **nsp_batch(rows=2)).positions.sum())
        results[kind] = metrics, parameters, own_masks
    torch.save(results, f"{folder}/result{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    processes.run(run_data_parallel, tmp_path, arguments=(str(tmp_path),))
    results = [torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in (0, 1)]
    for kind in ("ddp", "fsdp2"):
        model = tiny_encoder(kind=ShowsEmbedding)
        torch.manual_seed(7)
        head = model.embedding if kind == "ddp" else None
        trainer = create_mlm_pretrainer(model, WIDTH, {**SMALL, "use_nsp": True}, lm_head=head)
        batch = {**nsp_batch(rows=5), "sample_ids": torch.arange(5)}
        expected = [trainer.train_step(**batch) for _ in range(2)] + [trainer.eval_step(**batch)]
        for metrics, parameters, _ in (result[kind] for result in results):
            for ours, theirs in zip(metrics, expected, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-9)
            for name, module in parameters.items():
                assert_same_parameters(getattr(trainer, name), module, 1e-9)
        # Without sample_ids every process has its own masks
        assert results[0][kind][2] != results[1][kind][2]


# Options


def test_warmup_and_given_schedules():
    trainer = make(warmup_steps=4)
    rates = []
    for _ in range(6):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.train_step(**random_texts())
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert make().scheduler is None
    given = make(
        warmup_steps=4, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)
    )
    given.train_step(**random_texts())
    assert given.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_heads_join_a_given_optimizer():
    model = tiny_encoder(kind=ShowsEmbedding)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = MLMPretrainer(
        model, WIDTH, optimizer, {**SMALL, "use_nsp": True}, "cpu", lm_head=model.embedding
    )
    assert trainer.optimizer is optimizer and trainer.device == torch.device("cpu")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    start = parameters_of(trainer.mlm_head), parameters_of(trainer.nsp_head)
    trainer.train_step(**nsp_batch())
    for module, before in zip((trainer.mlm_head, trainer.nsp_head), start, strict=True):
        for name, parameter in module.named_parameters():
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("kind", READY_SCHEDULERS)
def test_a_ready_scheduler_also_steers_the_heads(kind):
    model = tiny_encoder()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr": 0.01}], lr=7.0)
    scheduler = READY_SCHEDULERS[kind](optimizer)
    trainer = make(model, optimizer=optimizer, scheduler=scheduler, max_grad_norm=None)
    for step in range(3):
        start, rate = parameters_of(trainer.mlm_head), scheduler.get_last_lr()[0]
        trainer.train_step(**random_texts(seed=step))
        for name, p in trainer.mlm_head.named_parameters():
            torch.testing.assert_close(p.detach(), start[name] - rate * p.grad, msg=name)
        assert trainer.curves.columns["learning_rate"][-1] == rate < 1
    assert len(set(trainer.curves.columns["learning_rate"].tolist())) == 3


def test_heads_as_modules():
    head = MLMHead(WIDTH, VOCABULARY)
    hidden = torch.randn(2, 3, WIDTH)
    x = head.layer_norm(F.gelu(head.dense(hidden)))
    torch.testing.assert_close(head(hidden), head.decoder(x))
    assert head(hidden).shape == (2, 3, VOCABULARY)
    nsp = NSPHead(WIDTH)
    torch.testing.assert_close(nsp(hidden[:, 0]), nsp.classifier(hidden[:, 0]))
    assert isinstance(MLMHead(WIDTH, 9, hidden_act="relu").activation, torch.nn.ReLU)
    with pytest.raises(ValueError, match="hidden_act"):
        MLMHead(WIDTH, 9, hidden_act="gelo")


def test_autocast_bf16_is_close_and_fp16_steps():
    exact, rounded = (make(tiny_encoder().float(), autocast_dtype=d) for d in (None, "bf16"))
    batch = random_texts()
    expected = exact.train_step(**batch)["mlm_loss"]
    assert rounded.train_step(**batch)["mlm_loss"] == pytest.approx(expected, rel=0.03)
    half = make(tiny_encoder().float(), autocast_dtype="fp16")
    start = parameters_of(half.mlm_head)
    half.train_step(**batch)
    assert not torch.equal(half.mlm_head.dense.weight, start["dense.weight"])


def test_a_peft_model_is_trained():
    from peft import LoraConfig, get_peft_model

    base = tiny_bert()
    model = get_peft_model(base, LoraConfig(target_modules=["query", "value"], r=4))
    trainer = make(model)
    start = parameters_of(model)
    trainer.train_step(**random_texts())
    trainer.train_step(**random_texts())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == ("lora" not in name), name


def test_eval_step_trains_nothing():
    trainer = make(tiny_encoder(dropout=0.5), use_nsp=True)
    start = parameters_of(trainer.model)
    first, second = (trainer.eval_step(**nsp_batch()) for _ in range(2))
    assert first == second and set(first) == {*METRICS, "nsp_loss", "nsp_accuracy"}
    assert_same_parameters(trainer.model, start)
    assert trainer.total_steps == 0 and trainer.model.training


def test_eval_step_of_a_given_head_with_dropout():
    layers = torch.nn.Linear(WIDTH, VOCABULARY), torch.nn.Dropout(0.5)
    trainer = make(lm_head=torch.nn.Sequential(*layers))
    trainer.train_step(**random_texts())
    first, second = (trainer.eval_step(**random_texts()) for _ in range(2))
    assert first == second
    assert all(part.training for part in (*trainer.model.modules(), *trainer.mlm_head.modules()))
    trainer.mlm_head.eval()
    assert trainer.eval_step(**random_texts()) == first and not trainer.mlm_head.training


class Scores(torch.nn.Module):
    """A head that has no parameters of its own."""

    def __init__(self, words):
        super().__init__()
        self.words = [words]  # not registered

    def forward(self, hidden):
        return hidden @ self.words[0].T


def test_a_given_head_without_parameters():
    model = tiny_encoder()
    trainer = make(model, lm_head=Scores(model.embedding.weight))
    batch = random_texts()
    masked_ids, labels, chosen = trainer.create_mlm_mask(**batch)
    logits = model(masked_ids, batch["attention_mask"])[chosen] @ model.embedding.weight.T
    expected = F.cross_entropy(logits, labels[chosen]).item()
    assert trainer.train_step(**batch)["mlm_loss"] == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match=r"makes \(16,\) logits, vocab_size is 53"):
        make(lm_head=torch.nn.Identity())


CONFIG_ERRORS = [
    ({"mask_prob": 1.5}, "mask_prob"),
    ({"mask_prob": -0.1}, "mask_prob"),
    ({"mask_token_prob": 0.9, "random_token_prob": 0.3}, "at most 1"),
    ({"keep_token_prob": 0.3}, "keep_token_prob is what"),
    ({"mask_token_prob": 0.7}, "keep_token_prob is what"),
    ({"warmup_steps": -1}, "warmup_steps"),
    ({"warmup_steps": 1.5}, "warmup_steps"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"mask_token_id": VOCABULARY}, "mask_token_id"),
    ({"sep_token_id": -1}, "sep_token_id"),
    ({"special_token_ids": [7, VOCABULARY]}, "special_token_ids"),
    ({"learning_rate": -1}, "learning_rate"),
    ({"nsp_loss_weight": float("nan")}, "nsp_loss_weight"),
    ({"max_grad_norm": 0}, "max_grad_norm"),
    ({"use_nsp": 1}, "use_nsp"),
    ({"masked_prob": 0.1}, r"'masked_prob'.*mask_prob, mask_token_prob"),
]


@pytest.mark.parametrize(("options", "message"), CONFIG_ERRORS)
def test_impossible_options_are_refused_at_construction(options, message):
    options = {"vocab_size": VOCABULARY, **options}
    with pytest.raises(ValueError, match=message):
        MLMPretrainer(tiny_encoder(), WIDTH, config=options)
    with pytest.raises(ValueError, match=message):
        create_mlm_pretrainer(tiny_encoder(), WIDTH, **options)


def test_configurations_of_every_kind():
    config = MLMConfig(vocab_size=VOCABULARY)
    assert MLMPretrainer(tiny_encoder(), WIDTH, config=config).config is config
    defaults = MLMConfig()
    assert (defaults.mask_prob, defaults.mask_token_prob, defaults.random_token_prob) == (
        0.15, 0.8, 0.1,
    )  # fmt: skip
    assert (defaults.keep_token_prob, defaults.learning_rate, defaults.weight_decay) == (
        0.1, 5e-5, 0.01,
    )  # fmt: skip
    assert (defaults.warmup_steps, defaults.vocab_size, defaults.max_grad_norm) == (10000, 50000, 1)
    assert (defaults.mask_token_id, defaults.pad_token_id) == (4, 0)
    assert (defaults.cls_token_id, defaults.sep_token_id, defaults.use_nsp) == (2, 3, False)
    MLMConfig(mask_token_prob=0.6, random_token_prob=0.2, keep_token_prob=None)
    assert make().scheduler is None and make().nsp_head is None
    assert MLMPretrainer(tiny_encoder(), WIDTH).mlm_head.decoder.out_features == 50000


def test_a_vocabulary_smaller_than_the_configuration():
    with pytest.raises(ValueError, match="vocab_size is 54, the model's embedding has 53 rows"):
        make(tiny_encoder(kind=ShowsEmbedding), vocab_size=54)


BATCH = random_texts()
REFUSED_BATCHES = {
    r"input_ids must be a tensor \(B, S\)": {"input_ids": BATCH["input_ids"][0]},
    "of integers": {"input_ids": BATCH["input_ids"].float()},
    "not empty": {"input_ids": torch.zeros(0, 5, dtype=torch.long), "attention_mask": None},
    "attention_mask must be": {"attention_mask": torch.ones(6, 11)},
    rf"\[0, {VOCABULARY}\).*0 to {VOCABULARY}": {
        "input_ids": BATCH["input_ids"].index_fill(1, torch.tensor([1]), VOCABULARY)
    },
    "word_ids must be": {"word_ids": torch.ones(6)},
    "sample_ids must be": {"sample_ids": torch.arange(5)},
    "use_nsp = False": {"nsp_labels": torch.zeros(6, dtype=torch.long)},
}


@pytest.mark.parametrize("message", REFUSED_BATCHES)
def test_a_batch_that_does_not_fit_is_refused(message):
    trainer = make()
    start = parameters_of(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train_step(**{**BATCH, **REFUSED_BATCHES[message]})
    assert_same_parameters(trainer.model, start)
    assert trainer.total_steps == 0 and not trainer.optimizer.state


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "nsp_labels are needed"),
        (torch.zeros(5, dtype=torch.long), "nsp_labels must be a tensor"),
        (torch.zeros(6), "must be integers"),
        (torch.tensor([0, 1, 2, 0, 1, 0]), r"got \[0, 1, 2\]"),
    ],
)
def test_labels_of_next_sentences_that_do_not_fit(labels, message):
    trainer = make(use_nsp=True)
    start = parameters_of(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train_step(**BATCH, nsp_labels=labels)
    assert_same_parameters(trainer.model, start)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match=r"hidden states must be \(B, S, 16\)"):
        make(tiny_encoder(width=8)).train_step(**BATCH)
    with pytest.raises(TypeError, match="must return its hidden states"):
        make(tiny_encoder(answer=lambda hidden: None)).train_step(**BATCH)


def test_a_loss_that_is_not_finite_is_refused():
    trainer = make()
    with torch.no_grad():
        trainer.model.mix.bias[0] = torch.nan
    start = parameters_of(trainer.mlm_head)
    with pytest.raises(FloatingPointError, match=r"step 1 .*nan"):
        trainer.train_step(**BATCH)
    assert_same_parameters(trainer.mlm_head, start)


# Pairs of sentences


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(48))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


SENTENCES = [f"w{i} w{i + 1}" for i in range(0, 40, 2)]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_pairs_of_sentences(tokenizer, ratio):
    ids, mask, labels = NSPDataBuilder.create_nsp_pairs(SENTENCES, tokenizer, 32, ratio)
    assert ids.shape == (19, 7) and labels.sum() == round(ratio * 19)
    drawn = [NSPDataBuilder.create_nsp_pairs(SENTENCES, tokenizer, 32, ratio) for _ in range(20)]
    ids, mask, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    for index, (row, real, label) in enumerate(zip(ids, mask, labels, strict=True)):
        number, row = index % 19, row[real.bool()].tolist()
        assert [row[0], row[3], row[6]] == [2, 3, 3]
        assert row[1:3] == [5 + 2 * number, 6 + 2 * number]
        follows = row[4:6] == [7 + 2 * number, 8 + 2 * number]
        assert follows == (label == 0) and row[4:6] != row[1:3]


def test_pairs_are_reproducible_cut_and_of_several_documents(tokenizer):
    def pairs(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return NSPDataBuilder.create_nsp_pairs(SENTENCES, tokenizer, generator=generator, **options)

    assert all(torch.equal(a, b) for a, b in zip(pairs(1), pairs(1), strict=True))
    assert not torch.equal(pairs(1)[0], pairs(2)[0])
    documents = [["w1 w2 w3 w4 w5", "w6"], ["w7", "w8 w9"]]
    ids, mask, labels = NSPDataBuilder.create_nsp_pairs(documents, tokenizer, 7, 0.0)
    assert ids.tolist() == [[2, 6, 7, 8, 3, 11, 3], [2, 12, 3, 13, 14, 3, 0]]
    assert mask.sum(1).tolist() == [7, 6] and labels.tolist() == [0, 0]
    for sentences, options, message in (
        (["w1"], {}, "follows another"),
        (["w1", "w2"], {"negative_ratio": 1.0}, "a third one"),
        (["w1", "", "w2"], {}, "sentence 1 has no tokens"),
        (SENTENCES, {"negative_ratio": 2}, "negative_ratio"),
        (SENTENCES, {"max_length": 4}, "max_length"),
    ):
        with pytest.raises(ValueError, match=message):
            NSPDataBuilder.create_nsp_pairs(sentences, tokenizer, **options)


def test_trainer_learns_masked_tokens_and_next_sentences(tmp_path):
    """Rows of one token repeated: a masked one is seen from its neighbours."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    trainer = create_mlm_pretrainer(
        BertModel(config), 32, vocab_size=VOCABULARY, use_nsp=True, learning_rate=3e-3,
        warmup_steps=10, weight_decay=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def batch(rows):
        first = torch.randint(5, VOCABULARY, (rows, 1), generator=generator)
        labels = torch.randint(0, 2, (rows,), generator=generator)
        other = 5 + (first - 5 + 24) % 48
        second = torch.where(labels[:, None] == 1, other, first)
        cls, sep = torch.full((rows, 1), 2), torch.full((rows, 1), 3)
        ids = torch.cat([cls, first.expand(-1, 6), sep, second.expand(-1, 6), sep], 1)
        return {"input_ids": ids, "nsp_labels": labels}

    held_out = batch(128)
    before = trainer.eval_step(**held_out)
    for _ in range(400):
        trainer.train_step(**batch(64))
    after = trainer.eval_step(**held_out)
    assert before["mlm_accuracy"] < 0.1 and after["mlm_accuracy"] > 0.8, (before, after)
    assert 0.3 < before["nsp_accuracy"] < 0.7 and after["nsp_accuracy"] > 0.9, (before, after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.plot_curves(os.fspath(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
