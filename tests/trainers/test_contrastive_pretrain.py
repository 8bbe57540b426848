"""The contrastive trainer against SimCLR and MoCo written out here, and its contract."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apt_model.pretraining import (
    ContrastiveConfig,
    ContrastivePretrainer,
    create_contrastive_pretrainer,
)
from apt_model.pretraining.contrastive_pretrain import ProjectionHead
from apt_model.pretraining.known_negatives import moco_loss as our_moco_loss
from apt_model.pretraining.momentum import MomentumNetworks
from support import processes
from support.peers import peer_results
from support.tiny_encoders import (
    ANSWERS,
    READY_SCHEDULERS,
    VOCABULARY,
    WIDTH,
    WITH_POSITIONS,
    ShowsEmbedding,
    TakesHiddenStates,
    TinyEncoder,
    random_texts,
    shifted_right,
    tiny_bert,
    tiny_encoder,
)
from support.tiny_models import parameters_of
from support.trainer_checks import decayed

SMALL = {"projection_dim": 6, "hidden_dim": 12, "learning_rate": 0.01, "queue_size": 10}
MOCO = {**SMALL, "use_momentum_encoder": True, "momentum": 0.9, "temperature": 0.2}
BATCHED = {"batch_norm": False}


def make(encoder=None, **options):
    encoder = tiny_encoder() if encoder is None else encoder
    torch.manual_seed(7)
    return create_contrastive_pretrainer(encoder, WIDTH, **{**SMALL, **options})


def two_views(rows=5, seed=0, widths=(12, 12)):
    first = random_texts(rows=rows, width=widths[0], seed=seed)
    second = random_texts(rows=rows, width=widths[1], seed=seed + 100)
    return {
        "input_ids_1": first["input_ids"],
        "input_ids_2": second["input_ids"],
        "attention_mask_1": first["attention_mask"],
        "attention_mask_2": second["attention_mask"],
    }


def rows_of(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


def assert_same_parameters(module, expected, tolerance=0.0):
    for name, tensor in module.named_parameters():
        assert_same(name, tensor.detach(), expected[name].detach(), tolerance)


def assert_same(name, tensor, expected, tolerance):
    """A bias before batch norm has no gradient, and Adam turns its rounding into steps."""
    if name == "net.0.bias" and tolerance:
        tolerance = 1e-6
    torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance, msg=name)


def hidden_in(output):
    if isinstance(output, dict):
        return output.get("last_hidden_state", output.get("hidden_states", [None])[-1])
    if isinstance(output, tuple):
        return output[0]
    if isinstance(output, torch.Tensor):
        return output
    last = getattr(output, "last_hidden_state", None)
    return output.hidden_states[-1] if last is None else last


def plain_embeddings(encoder, projection, ids, mask, pooling="mean"):
    """Row by row: the mean of the real tokens (or the first), projected, of unit length."""
    hidden = hidden_in(encoder(input_ids=ids, attention_mask=mask))
    pooled = torch.stack(
        [
            row[real.bool()].mean(0) if pooling == "mean" else row[0]
            for row, real in zip(hidden, mask, strict=True)
        ]
    )
    z = projection(pooled)
    return z / z.norm(dim=1, keepdim=True)


def simclr_loss(z_i, z_j, temperature=0.07):
    """Chen et al. 2020, equation 1, one row at a time."""
    z = torch.cat([z_i, z_j])
    n, losses, right = len(z_i), [], 0
    for row in range(2 * n):
        logits = z @ z[row] / temperature
        others = torch.cat([logits[:row], logits[row + 1 :]])
        positive = logits[(row + n) % (2 * n)]
        losses.append(torch.logsumexp(others, 0) - positive)
        right += int(positive >= others.max())
    return torch.stack(losses).mean(), right / (2 * n)


def moco_loss(query, key, queue, temperature=0.2):
    """He et al. 2020, equation 1."""
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1) / temperature
    losses = torch.logsumexp(logits, 1) - logits[:, 0]
    return losses.mean(), (logits.argmax(1) == 0).double().mean().item()


MODELS = {
    **{name: lambda answer=answer: tiny_encoder(answer=answer) for name, answer in ANSWERS.items()},
    "asked": lambda: tiny_encoder(kind=TakesHiddenStates),
    "BERT": tiny_bert,
}


@pytest.mark.parametrize("name", MODELS)
def test_simclr_steps_equal_the_paper_in_plain_pytorch(name):
    encoder = MODELS[name]()
    trainer = make(encoder, pooling="first" if name == "tuple" else "mean")
    plain, projection = copy.deepcopy(encoder), copy.deepcopy(trainer.projection)
    call = plain
    if name == "asked":
        call = lambda **inputs: plain(**inputs, output_hidden_states=True)  # noqa: E731
    trained = [*plain.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(decayed(trained, 1e-6), lr=0.01)
    for step in range(3):
        batch = two_views(seed=step, widths=(12, 9))
        z_i, z_j = (
            plain_embeddings(
                call, projection, batch[f"input_ids_{k}"], batch[f"attention_mask_{k}"],
                trainer.config.pooling,
            )
            for k in (1, 2)
        )  # fmt: skip
        loss, accuracy = simclr_loss(z_i, z_j)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        metrics = trainer.train_step(**batch)
        assert list(metrics) == ["loss", "accuracy"]
        assert all(type(value) is float for value in metrics.values())
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["accuracy"] == pytest.approx(accuracy)
    assert_same_parameters(encoder, dict(plain.named_parameters()), 1e-9)
    assert_same_parameters(trainer.projection, dict(projection.named_parameters()), 1e-9)
    assert trainer.get_statistics() == {
        "total_steps": 3,
        "mean_loss": metrics["loss"],
        "mean_accuracy": metrics["accuracy"],
    }
    trainer.get_statistics()["total_steps"] = 100
    assert trainer.get_statistics()["total_steps"] == 3
    assert trainer.queue is None and trainer.encoder_momentum is None and trainer.queue_ptr == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_moco_steps_equal_the_paper_in_plain_pytorch(symmetric):
    encoder = tiny_encoder()
    trainer = make(encoder, **MOCO, symmetric_loss=symmetric)
    networks = copy.deepcopy((encoder, trainer.projection))
    slow = copy.deepcopy(networks)
    for module in slow:
        module.eval()
    queue, pointer = trainer.queue.clone(), 0
    assert queue.shape == (6, 10)
    torch.testing.assert_close(queue.norm(dim=0), torch.ones(10).double())
    trained = [p for module in networks for p in module.parameters()]
    optimizer = torch.optim.AdamW(decayed(trained, 1e-6), lr=0.01)
    for step in range(4):
        batch = two_views(seed=step, rows=4)
        views = [(batch[f"input_ids_{k}"], batch[f"attention_mask_{k}"]) for k in (1, 2)]
        with torch.no_grad():
            keys = [plain_embeddings(*slow, *view) for view in views]
        queries = [plain_embeddings(*networks, *view) for view in views[: 1 + symmetric]]
        results = [moco_loss(queries[0], keys[1], queue)]
        if symmetric:
            results.append(moco_loss(queries[1], keys[0], queue))
        loss = sum(result[0] for result in results) / len(results)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():  # after the optimizer's step
            for module, copied in zip(networks, slow, strict=True):
                for p, q in zip(module.parameters(), copied.parameters(), strict=True):
                    q.mul_(0.9).add_(0.1 * p)
                for p, q in zip(module.buffers(), copied.buffers(), strict=True):
                    q.copy_(p)
        metrics = trainer.train_step(**batch)
        for key in torch.cat(keys if symmetric else keys[1:]):
            queue[:, pointer] = key
            pointer = (pointer + 1) % 10
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
        expected = sum(result[1] for result in results) / len(results)
        assert metrics["accuracy"] == pytest.approx(expected, abs=1e-7)
        torch.testing.assert_close(trainer.queue, queue, rtol=0, atol=1e-9)
        assert trainer.queue_ptr == pointer and type(trainer.queue_ptr) is int
    ours = (encoder, trainer.projection, trainer.encoder_momentum, trainer.projection_momentum)
    for module, expected in zip(ours, (*networks, *slow), strict=True):
        for name, tensor in module.state_dict().items():
            assert_same(name, tensor, expected.state_dict()[name], 1e-9)
    for module in ours[2:]:
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert encoder.training
    embeddings = trainer.encode(*views[0], use_momentum=True)
    torch.testing.assert_close(embeddings, plain_embeddings(*slow, *views[0]))
    trainer.register_queue()
    assert trainer.queue_ptr == 0 and not torch.equal(trainer.queue, queue)


def test_the_losses_are_lightly_s():
    results = peer_results("lightly", "fixture")
    inputs = results["inputs"]
    trainer = make(temperature=inputs["temperature"])
    loss, accuracy = trainer.compute_infonce_loss(inputs["a"], inputs["b"])
    assert loss.item() == pytest.approx(results["cases"]["nt_xent"]["loss"], rel=1e-7)
    expected = simclr_loss(
        F.normalize(inputs["a"], dim=1), F.normalize(inputs["b"], dim=1), inputs["temperature"]
    )
    assert loss.item() == pytest.approx(expected[0].item(), abs=1e-9)
    assert accuracy.item() == pytest.approx(expected[1])
    loss, _ = trainer.compute_infonce_loss(inputs["a"], inputs["b"], inputs["queue"].T)
    assert loss.item() == pytest.approx(results["cases"]["moco"]["loss"], rel=1e-7)


def masked_moco_loss(query, key, queue, same, temperature=0.2):
    """He et al. 2020, equation 1, a row at a time, without the keys of the row's own sample."""
    losses, right = [], 0
    for q, k, keys in zip(query, key, (queue[:, ~row] for row in same), strict=True):
        logits = torch.cat([(q * k).sum()[None], q @ keys]) / temperature
        losses.append(torch.logsumexp(logits, 0) - logits[0])
        right += int((logits[0] > logits[1:]).all())
    return torch.stack(losses).mean(), right / len(query)


@pytest.mark.parametrize("symmetric", [True, False])
def test_moco_takes_no_key_of_the_same_sample_as_a_negative(symmetric):
    trainer = make(**MOCO, **BATCHED, symmetric_loss=symmetric)
    known = torch.full((10,), -1)  # of the keys in the queue
    pointer = 0
    for step, ids in enumerate(([0, 1, 2, 3], [1, 1, 7, 8], None, [0, 1, 2, 3], [9, 10, 11, 3])):
        batch = two_views(seed=step, rows=4)
        views = [(batch[f"input_ids_{k}"], batch[f"attention_mask_{k}"]) for k in (1, 2)]
        keys = [trainer.encode(*view, use_momentum=True) for view in views]
        given = torch.full((4,), -1) if ids is None else torch.tensor(ids)
        same = (given[:, None] == known) & (given >= 0)[:, None]
        results = [masked_moco_loss(trainer.encode(*views[0]), keys[1], trainer.queue, same)]
        if symmetric:
            results.append(
                masked_moco_loss(trainer.encode(*views[1]), keys[0], trainer.queue, same)
            )
        loss, accuracy = (sum(values) / len(results) for values in zip(*results, strict=True))
        metrics = trainer.train_step(**batch, sample_ids=ids)
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9), step
        assert metrics["accuracy"] == pytest.approx(accuracy)
        for _ in range(1 + symmetric):
            for number in given:
                known[pointer] = number
                pointer = (pointer + 1) % 10
    assert same.any() and not same.all()  # the last step had such keys, and others
    again = make(**MOCO, **BATCHED, symmetric_loss=symmetric)
    again.load_state_dict(trainer.state_dict())
    more = {**two_views(seed=9, rows=4), "sample_ids": [3, 9, 10, 50]}
    assert again.train_step(**more) == trainer.train_step(**more)


def test_the_gradient_without_known_keys_is_of_the_others():
    query, key, queue = (
        F.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(i)).double(), dim=1)
        for i in (1, 2, 3)
    )
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[0, 2] = same[3, 0] = same[3, 1] = True
    gradients = []
    for loss_of in (our_moco_loss, masked_moco_loss):
        rows = query.clone().requires_grad_()
        loss_of(rows / rows.norm(dim=1, keepdim=True), key, queue.T, same,
                temperature=0.2)[0].backward()  # fmt: skip
        gradients.append(rows.grad)
    torch.testing.assert_close(*gradients)


def test_numbers_of_samples_that_do_not_fit():
    batch = two_views(rows=4)
    with pytest.raises(ValueError, match="each id once in a batch, got 5 2 times"):
        make().train_step(**batch, sample_ids=[5, 1, 5, 2])
    for trainer in (make(), make(**MOCO)):
        for ids, message in (
            ([1, 2], "expected 4 integers"), ([1.0, 2.0, 3.0, 4.0], "expected 4 integers"),
            ([0, 1, 2, -1], "at least 0, got -1"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"sample_ids: expected.*{message}|{message}"):
                trainer.train_step(**batch, sample_ids=ids)
            with pytest.raises(ValueError, match=message):
                trainer.eval_step(**batch, sample_ids=ids)
        assert trainer.total_steps == 0


def test_encode():
    encoder = tiny_encoder()
    trainer = make(encoder)
    trainer.projection.eval()
    batch = random_texts()
    z = trainer.encode(batch["input_ids"], batch["attention_mask"])
    assert z.shape == (6, 6) and z.requires_grad
    torch.testing.assert_close(z.norm(dim=1), torch.ones(6).double())
    torch.testing.assert_close(z, plain_embeddings(encoder, trainer.projection, *batch.values()))
    shifted = {name: F.pad(tensor, (3, 0)) for name, tensor in batch.items()}
    for pooling in ("mean", "first"):
        trainer = make(encoder, pooling=pooling)
        trainer.projection.eval()
        torch.testing.assert_close(
            trainer.encode(**shifted), trainer.encode(**batch), rtol=1e-9, atol=1e-9
        )
    assert make(encoder, use_projection=False).encode(**batch).shape == (6, WIDTH)
    with pytest.raises(ValueError, match="no momentum encoder"):
        trainer.encode(**batch, use_momentum=True)


@pytest.mark.parametrize("name", WITH_POSITIONS)
@pytest.mark.parametrize("use_momentum", [False, True])
def test_left_padding_changes_nothing_where_positions_are_learned(name, use_momentum):
    trainer = make(WITH_POSITIONS[name](), **MOCO)
    trainer.projection.eval()
    batch = random_texts()
    alone = torch.cat(
        [
            trainer.encode(row[None, real.bool()], use_momentum=use_momentum)
            for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    )
    for padded in (batch, shifted_right(batch, 5), shifted_right(batch, 5, padding=1)):
        torch.testing.assert_close(
            trainer.encode(**padded, use_momentum=use_momentum), alone, rtol=1e-9, atol=1e-9
        )


class TinyConv(nn.Module):
    """An encoder of images, its argument named as one likes; returns `(B, H)`."""

    def __init__(self, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTH, 3)
        self.norm = nn.BatchNorm2d(WIDTH) if norm else nn.Identity()

    def forward(self, images):
        return torch.relu(self.norm(self.conv(images))).mean((2, 3))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("moco", [False, True])
def test_image_encoders(norm, moco):
    torch.manual_seed(0)
    encoder = TinyConv(norm).double()
    trainer = make(encoder, **(MOCO if moco else {}))
    plain, projection = copy.deepcopy(encoder), copy.deepcopy(trainer.projection)
    views = torch.randn(2, 6, 1, 8, 8).double()
    z_i, z_j = (F.normalize(projection(plain(view)), dim=1) for view in views)
    if moco:
        slow = copy.deepcopy((encoder, trainer.projection))
        with torch.no_grad():
            k_i, k_j = (F.normalize(slow[1].eval()(slow[0].eval()(view)), dim=1) for view in views)
        directions = [moco_loss(q, k, trainer.queue)[0] for q, k in ((z_i, k_j), (z_j, k_i))]
        expected = sum(directions) / 2
    else:
        expected, _ = simclr_loss(z_i, z_j)
    assert trainer.train_step(*views)["loss"] == pytest.approx(expected.item(), abs=1e-9)
    if norm:  # statistics of each view, not of both
        torch.testing.assert_close(encoder.norm.running_var, plain.norm.running_var)
        assert int(encoder.norm.num_batches_tracked) == 2
    if norm and moco:
        copied = trainer.encoder_momentum.norm
        assert torch.equal(copied.running_mean, encoder.norm.running_mean)
        assert int(copied.num_batches_tracked) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_images_are_cast_to_the_encoder_s_dtype(dtype):
    views = torch.randn(2, 6, 1, 8, 8)
    encoder = TinyConv().to(dtype)
    for more in ({}, MOCO, {"cache_chunk": 4}):
        given, cast = (make(copy.deepcopy(encoder), **more) for _ in range(2))
        assert given.train_step(*views) == cast.train_step(*views.to(dtype))
        assert given.eval_step(*views.double()) == cast.eval_step(*views.double().to(dtype))


def test_without_a_projection_and_of_any_size():
    encoder = tiny_encoder()
    trainer = make(encoder, **MOCO, use_projection=False)
    assert trainer.queue.shape == (WIDTH, 10)
    for rows in (1, 3, 23):  # 46 keys for a queue of 10
        trainer.train_step(**two_views(rows=rows))
    assert trainer.queue_ptr == 2 * (1 + 3 + 23) % 10
    batch = two_views(rows=3)
    with torch.no_grad():
        z_i, z_j = (
            plain_embeddings(encoder, nn.Identity(), batch[f"input_ids_{k}"],
                             batch[f"attention_mask_{k}"])
            for k in (1, 2)
        )  # fmt: skip
    simclr = make(encoder, use_projection=False)
    assert simclr.train_step(**batch)["loss"] == pytest.approx(
        simclr_loss(z_i, z_j)[0].item(), abs=1e-9
    )


# Parts of a batch


@pytest.mark.parametrize("moco", [False, True])
@pytest.mark.parametrize("option", [{"cache_chunk": 3}, {"gradient_accumulation_steps": 4}])
def test_gradient_caching_gives_the_same_update(option, moco):
    more = MOCO if moco else {}
    whole, parts = make(**more), make(**more, **option)
    sizes = []
    forward = parts.encoder.forward
    parts.encoder.forward = lambda **batch: (
        sizes.append(len(batch["input_ids"])) or forward(**batch)
    )
    for step in range(2):
        batch = two_views(seed=step)
        assert parts.train_step(**batch) == pytest.approx(whole.train_step(**batch), abs=1e-10)
    assert_same_parameters(parts.encoder, parameters_of(whole.encoder), 1e-10)
    assert_same_parameters(parts.projection, parameters_of(whole.projection), 1e-10)
    assert max(sizes) == 3 and sum(sizes) == 2 * 2 * 10
    if moco:
        torch.testing.assert_close(parts.queue, whole.queue, rtol=0, atol=1e-10)


def test_gradient_caching_repeats_its_random_numbers():
    """With dropout a part's second pass must be its first one again."""
    torch.manual_seed(0)
    encoder = tiny_encoder(dropout=0.5)
    trainer = make(encoder, cache_chunk=4)
    encoder.train()
    batch = two_views()
    views = [(batch[f"input_ids_{k}"], batch[f"attention_mask_{k}"]) for k in (1, 2)]
    ids, mask = (torch.cat(parts) for parts in zip(*views, strict=True))
    torch.manual_seed(5)
    plain = copy.deepcopy((encoder, trainer.projection))
    hidden = torch.cat([plain[0](ids[i:j], mask[i:j]) for i, j in ((0, 3), (3, 6), (6, 10))])
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    z_i, z_j = (F.normalize(plain[1](part), dim=1) for part in pooled.split(5))
    loss, _ = simclr_loss(z_i, z_j)
    loss.backward()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    seen = {}
    trainer._step = lambda totals: (
        seen.update({n: p.grad.clone() for n, p in encoder.named_parameters()}, loss=totals["loss"])
        or {"loss": 0.0}
    )
    trainer.train_step(**batch)
    assert seen["loss"].item() == pytest.approx(loss.item(), abs=1e-9)
    for name, parameter in plain[0].named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert torch.equal(torch.rand(1), drawn)


def test_gradient_caching_of_a_batch_norm_warns():
    with pytest.warns(UserWarning, match="batch norm"):
        make(TinyConv(norm=True).double(), cache_chunk=2)


# Resume and distribution


def make_resumable(seed, moco):
    encoder = tiny_encoder(seed, dropout=0.3)
    torch.manual_seed(seed)
    return create_contrastive_pretrainer(
        encoder,
        WIDTH,
        MOCO if moco else SMALL,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        cache_chunk=4,
    )


@pytest.mark.parametrize("moco", [False, True])
def test_a_resumed_run_is_bit_identical(tmp_path, moco):
    trainer = make_resumable(0, moco)
    torch.manual_seed(3)
    for step in range(2):
        trainer.train_step(**two_views(seed=step))
    in_memory = trainer.state_dict()
    torch.save(in_memory, tmp_path / "state.pt")
    never_stopped = [trainer.train_step(**two_views(seed=step)) for step in range(2, 5)]
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), in_memory):
        torch.manual_seed(99)
        resumed = make_resumable(1, moco)
        resumed.load_state_dict(state)
        assert [resumed.train_step(**two_views(seed=step)) for step in range(2, 5)] == never_stopped
        names = ["encoder", "projection"]
        names += ["encoder_momentum", "projection_momentum"] if moco else []
        for name in names:
            ours, theirs = (getattr(t, name).state_dict() for t in (resumed, trainer))
            assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        if moco:
            assert torch.equal(resumed.queue, trainer.queue)
            assert resumed.queue_ptr == trainer.queue_ptr
        assert resumed.get_statistics() == trainer.get_statistics()
    if moco:
        other = make(**{**MOCO, "queue_size": 11}, scheduler=make_scheduler)
        with pytest.raises(ValueError, match=r"a queue \(6, 10\)"):
            other.load_state_dict(in_memory)


def test_a_state_of_the_other_method_is_refused_before_anything_is_loaded():
    simclr, moco = make(), make(tiny_encoder(1), **MOCO)
    for trainer, steps in ((simclr, 1), (moco, 2)):
        for _ in range(steps):
            trainer.train_step(**two_views())
    for trainer, other, steps in ((simclr, moco, 1), (moco, simclr, 2)):
        before = trainer.state_dict()
        with pytest.raises(ValueError, match=r"another kind of trainer: .*\['momentum'\]"):
            trainer.load_state_dict(other.state_dict())
        after = trainer.state_dict()
        assert after["total_steps"] == len(after["curves"]["loss"]) == steps
        for name, module in before["modules"].items():
            assert all(torch.equal(after["modules"][name][k], v) for k, v in module.items())


def make_scheduler(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer)


DISTRIBUTED = {
    "simclr": {**SMALL, **BATCHED},
    "simclr in parts": {**SMALL, **BATCHED, "cache_chunk": 2},
    "moco": {**MOCO, **BATCHED},
}


def run_data_parallel(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for wrap in ("ddp", "fsdp2"):
        for name, options in DISTRIBUTED.items():
            inner, more = tiny_encoder(), {}
            if wrap == "ddp":
                encoder = torch.nn.parallel.DistributedDataParallel(inner)
            else:
                encoder = fully_shard(inner, mesh=mesh)
                if name == "moco":
                    with pytest.raises(ValueError, match="cannot be copied"):
                        create_contrastive_pretrainer(encoder, WIDTH, **options)
                    more = {"encoder_momentum": fully_shard(tiny_encoder(5), mesh=mesh)}
            torch.manual_seed(7 + 10 * rank)
            trainer = create_contrastive_pretrainer(encoder, WIDTH, **options, **more)
            if name == "moco":  # all get the keys that the first process draws
                torch.manual_seed(3 + rank)
                trainer.register_queue()
            batch = two_views(rows=5)
            rows = slice(0, 2) if rank == 0 else slice(2, 5)  # uneven on purpose
            metrics = [trainer.train_step(**rows_of(batch, rows)) for _ in range(2)]
            metrics.append(trainer.eval_step(**rows_of(batch, rows)))
            modules = {"encoder": inner, "projection": trainer.projection}
            if name == "moco":
                modules["encoder_momentum"] = trainer.encoder_momentum
            parameters = {
                key: {
                    k: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
                    for k, p in module.named_parameters()
                }
                for key, module in modules.items()
            }
            results[wrap, name] = metrics, parameters, trainer.queue
    torch.save(results, f"{folder}/result{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    processes.run(run_data_parallel, tmp_path, arguments=(str(tmp_path),))
    results = [torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, options in DISTRIBUTED.items():
        torch.manual_seed(7)
        encoder = tiny_encoder()
        torch.manual_seed(7)
        alone = {key: value for key, value in options.items() if key != "cache_chunk"}
        one = create_contrastive_pretrainer(encoder, WIDTH, alone)
        if name == "moco":
            torch.manual_seed(3)
            one.register_queue()
        expected = [one.train_step(**two_views(rows=5)) for _ in range(2)]
        expected.append(one.eval_step(**two_views(rows=5)))
        for wrap in ("ddp", "fsdp2"):
            for metrics, parameters, queue in (result[wrap, name] for result in results):
                for ours, theirs in zip(metrics, expected, strict=True):
                    assert ours == pytest.approx(theirs, abs=1e-7)
                for key, values in parameters.items():
                    assert_same_parameters(getattr(one, key), values, 1e-9)
                if name == "moco":
                    # Symmetric: both keys of the first process, then both of the second
                    assert queue.shape == one.queue.shape
                    assert torch.equal(queue, results[0][wrap, name][2])
                    ours = sorted(queue.T.tolist())
                    for a, b in zip(ours, sorted(one.queue.T.tolist()), strict=True):
                        assert a == pytest.approx(b, abs=1e-9)


# Options and refusals


def test_moco_v1_and_v2_by_options():
    v1 = make(**{**MOCO, "hidden_dim": None, "symmetric_loss": False})
    assert [type(layer) for layer in v1.projection.net] == [nn.Linear]
    v2 = make(**MOCO, batch_norm=False)
    assert [type(layer) for layer in v2.projection.net] == [nn.Linear, nn.ReLU, nn.Linear]
    head = ProjectionHead(WIDTH)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in head.net] == kinds
    assert head(torch.randn(3, WIDTH)).shape == (3, 128)
    assert head.net[0].out_features == 2048


def test_the_projection_joins_a_given_optimizer():
    encoder = tiny_encoder()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    trainer = ContrastivePretrainer(encoder, WIDTH, optimizer, MOCO, "cpu")
    assert trainer.optimizer is optimizer and trainer.device == torch.device("cpu")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for module in (encoder, trainer.projection) for p in module.parameters()}
    start = parameters_of(trainer.projection)
    trainer.train_step(**two_views())
    for name, parameter in trainer.projection.named_parameters():
        assert not torch.equal(parameter, start[name]) or name == "net.0.bias", name


@pytest.mark.parametrize("kind", READY_SCHEDULERS)
def test_a_ready_scheduler_also_steers_the_projection(kind):
    encoder = tiny_encoder()
    optimizer = torch.optim.SGD([{"params": list(encoder.parameters()), "lr": 0.01}], lr=7.0)
    scheduler = READY_SCHEDULERS[kind](optimizer)
    trainer = make(encoder, optimizer=optimizer, scheduler=scheduler, max_grad_norm=None)
    for step in range(3):
        start, rate = trainer.projection.net[3].weight.detach().clone(), scheduler.get_last_lr()[0]
        trainer.train_step(**two_views(seed=step))
        weight = trainer.projection.net[3].weight
        torch.testing.assert_close(weight.detach(), start - rate * weight.grad)
        assert trainer.curves.columns["learning_rate"][-1] == rate < 1
    assert len(set(trainer.curves.columns["learning_rate"].tolist())) == 3


def test_a_frozen_encoder_is_left_alone():
    encoder = tiny_encoder().requires_grad_(False)
    start = parameters_of(encoder)
    whole, parts = make(encoder), make(encoder, cache_chunk=3)
    before = parameters_of(whole.projection)
    metrics = whole.train_step(**two_views())
    assert parts.train_step(**two_views()) == pytest.approx(metrics, abs=1e-10)
    assert_same_parameters(encoder, start)
    assert_same_parameters(parts.projection, parameters_of(whole.projection), 1e-10)
    assert not torch.equal(whole.projection.net[3].weight, before["net.3.weight"])


def test_autocast_is_close():
    exact, rounded = (make(tiny_encoder().float(), autocast_dtype=d) for d in (None, "bf16"))
    batch = two_views(rows=8)
    expected = exact.train_step(**batch)["loss"]
    assert rounded.train_step(**batch)["loss"] == pytest.approx(expected, rel=0.1)


def test_eval_step_trains_nothing():
    trainer = make(tiny_encoder(dropout=0.5), **MOCO)
    start, queue = parameters_of(trainer.encoder), trainer.queue.clone()
    first, second = (trainer.eval_step(**two_views()) for _ in range(2))
    assert first == second and set(first) == {"loss", "accuracy"}
    assert_same_parameters(trainer.encoder, start)
    assert torch.equal(trainer.queue, queue) and trainer.total_steps == 0


@pytest.mark.parametrize("moco", [False, True])
def test_eval_step_is_nt_xent_of_the_batch_whatever_is_in_the_queue(moco):
    fixed = {"learning_rate": 0.0, "weight_decay": 0.0}
    trainer = make(**{**(MOCO if moco else SMALL), **fixed, **BATCHED})
    held_out = two_views(rows=4, seed=50)
    with torch.no_grad():
        views = [(held_out[f"input_ids_{k}"], held_out[f"attention_mask_{k}"]) for k in (1, 2)]
        z_i, z_j = (plain_embeddings(trainer.encoder, trainer.projection, *view) for view in views)
    loss, accuracy = simclr_loss(z_i, z_j, trainer.config.temperature)
    for step in range(3):
        metrics = trainer.eval_step(**held_out)
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["accuracy"] == pytest.approx(accuracy)
        trainer.train_step(**two_views(seed=step))  # fills the queue, changes no parameter


CONFIG_ERRORS = [
    ({"temperature": 0}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"projection_dim": 0}, "projection_dim"),
    ({"hidden_dim": 2.5}, "hidden_dim"),
    ({"queue_size": 0}, "queue_size"),
    ({"momentum": 1.5}, "momentum"),
    ({"momentum": -0.1}, "momentum"),
    ({"pooling": "avg"}, "pooling"),
    ({"use_projection": "yes"}, "use_projection"),
    ({"learning_rate": float("inf")}, "learning_rate"),
    ({"weight_decay": -1}, "weight_decay"),
    ({"max_grad_norm": 0}, "max_grad_norm"),
    ({"temprature": 0.1}, r"'temprature'.*temperature, projection_dim"),
]


@pytest.mark.parametrize(("options", "message"), CONFIG_ERRORS)
def test_impossible_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastivePretrainer(tiny_encoder(), WIDTH, config=options)
    with pytest.raises(ValueError, match=message):
        create_contrastive_pretrainer(tiny_encoder(), WIDTH, **options)


def test_options_of_the_trainer_that_cannot_be():
    with pytest.raises(ValueError, match="cache_chunk"):
        make(cache_chunk=0)
    with pytest.raises(ValueError, match="encoder_momentum"):
        make(encoder_momentum=tiny_encoder())
    with pytest.raises(ValueError, match="no queue"):
        make().register_queue()


def test_configurations_of_every_kind():
    config = ContrastiveConfig(temperature=0.1)
    assert ContrastivePretrainer(tiny_encoder(), WIDTH, config=config).config is config
    d = ContrastiveConfig()
    assert (d.temperature, d.projection_dim, d.hidden_dim) == (0.07, 128, 2048)
    assert (d.learning_rate, d.weight_decay, d.max_grad_norm) == (1e-4, 1e-6, 1.0)
    assert (d.momentum, d.queue_size, d.symmetric_loss) == (0.999, 65536, True)
    assert (d.use_projection, d.use_momentum_encoder) == (True, False)


BATCH = two_views()
REFUSED_BATCHES = {
    "input_ids_2 must have 5 rows": {
        "input_ids_2": BATCH["input_ids_2"][:4], "attention_mask_2": None,
    },
    r"input_ids_1 must be a tensor \(B, …\)": {"input_ids_1": BATCH["input_ids_1"][0]},
    "integers must be": {"input_ids_1": BATCH["input_ids_1"][None]},
    "attention_mask of input_ids_2": {"attention_mask_2": torch.ones(5, 3)},
    "input_ids_1: row 2 has no real token": {
        "attention_mask_1": BATCH["attention_mask_1"].index_fill(0, torch.tensor([2]), 0)
    },
    rf"\[0, {VOCABULARY}\).*to {VOCABULARY}": {
        "input_ids_1": BATCH["input_ids_1"].index_fill(1, torch.tensor([1]), VOCABULARY)
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED_BATCHES)
def test_a_batch_that_does_not_fit_is_refused(message):
    trainer = make(tiny_encoder(kind=ShowsEmbedding), **MOCO)
    start, queue = parameters_of(trainer.encoder), trainer.queue.clone()
    with pytest.raises(ValueError, match=message):
        trainer.train_step(**{**BATCH, **REFUSED_BATCHES[message]})
    assert_same_parameters(trainer.encoder, start)
    assert torch.equal(trainer.queue, queue)
    assert trainer.total_steps == 0 and not trainer.optimizer.state


def test_a_batch_of_one_with_batch_norm_is_refused():
    trainer = make()
    before = {k: v.clone() for k, v in trainer.projection.state_dict().items()}
    with pytest.raises(ValueError, match="batch norm in the projection head needs two samples"):
        trainer.train_step(**rows_of(BATCH, slice(0, 1)))
    assert all(torch.equal(v, before[k]) for k, v in trainer.projection.state_dict().items())
    one = make(batch_norm=False).train_step(**rows_of(BATCH, slice(0, 1)))
    assert one == {"loss": 0.0, "accuracy": 1.0}


def test_an_encoder_of_another_width_is_refused():
    with pytest.raises(ValueError, match="has width 8, hidden_size is 16"):
        make(tiny_encoder(width=8)).train_step(**BATCH)
    with pytest.raises(ValueError, match=r"must return \(B, S, H\) or \(B, H\)"):
        make(tiny_encoder(answer=lambda hidden: hidden[..., None, None])).train_step(**BATCH)


def test_a_loss_that_is_not_finite_is_refused():
    trainer = make(**MOCO)
    trainer.train_step(**BATCH)
    with torch.no_grad():
        trainer.encoder.mix.bias[0] = torch.nan
    start, queue = parameters_of(trainer.encoder_momentum), trainer.queue.clone()
    pointer = trainer.queue_ptr
    with pytest.raises(FloatingPointError, match=r"step 2 .*nan"):
        trainer.train_step(**BATCH)
    assert_same_parameters(trainer.encoder_momentum, start)
    assert torch.equal(trainer.queue, queue) and trainer.queue_ptr == pointer


def test_momentum_of_an_encoder_with_frozen_parts():
    encoder = tiny_encoder()
    encoder.embedding.requires_grad_(False)
    trainer = make(encoder, **MOCO)
    trainer.train_step(**BATCH)
    copied = trainer.encoder_momentum
    assert torch.equal(copied.embedding.weight, encoder.embedding.weight)
    assert not torch.equal(copied.mix.weight, encoder.mix.weight)
    assert isinstance(trainer._momentum, MomentumNetworks)


@pytest.mark.parametrize("moco", [False, True])
def test_trainer_learns(moco):
    """Rows of a few words that tell them apart among many that do not."""
    torch.manual_seed(0)
    encoder = TinyEncoder().float()
    more = {**MOCO, "queue_size": 64, "momentum": 0.99} if moco else {"temperature": 0.2}
    trainer = create_contrastive_pretrainer(encoder, WIDTH, {**SMALL, **more, **BATCHED})
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(10, VOCABULARY, (64, 4), generator=generator)

    def batch(rows):
        ids = kinds[torch.randperm(64, generator=generator)[:rows]]
        noise = torch.randint(0, 10, (2, rows, 24), generator=generator)
        views = torch.cat([ids.expand(2, -1, -1), noise], -1)
        return tuple(views)

    def retrieval():
        encoder.eval()
        with torch.no_grad():
            a, b = (encoder(view).mean(1) for view in batch(64))
        a, b = (F.normalize(x - x.mean(0), dim=1) for x in (a, b))
        return ((a @ b.T).argmax(1) == torch.arange(64)).float().mean().item()

    before = retrieval()
    first = trainer.train_step(*batch(32))
    for _ in range(300):
        last = trainer.train_step(*batch(32))
    assert retrieval() > before + 0.2, (before, retrieval())
    if not moco:  # its first queue is random and easily told apart
        assert last["accuracy"] > first["accuracy"] and last["loss"] < first["loss"]


def test_ids_of_padding_do_not_matter():
    spoiled = dict(BATCH)
    for k in (1, 2):
        mask = BATCH[f"attention_mask_{k}"]
        spoiled[f"input_ids_{k}"] = torch.where(mask == 0, -7, BATCH[f"input_ids_{k}"])
    assert make().train_step(**spoiled) == make().train_step(**BATCH)
