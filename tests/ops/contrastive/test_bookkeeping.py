"""What the table of operations cannot say of ema_update_ and queue_push_."""

from __future__ import annotations

import pytest
import torch

from apt_kernels import backends, ema_update_, queue_push_, reference

EMA_BACKENDS = backends()["operations"]["ema_update_"]["cpu"]
QUEUE_BACKENDS = backends()["operations"]["queue_push_"]["cpu"]


@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_a_tied_tensor_is_updated_twice(backend):
    """Tied weights come twice in a state dict, as two tensors of one memory."""
    tied, source = torch.randn(40_000), torch.randn(40_000)
    other, other_source = torch.randn(7), torch.randn(7)
    expected, expected_other = tied.clone(), other.clone()
    for _ in range(2):
        reference.ema_update_(expected, source, 0.8)
    reference.ema_update_(expected_other, other_source, 0.8)
    ema_update_(
        [tied, other, tied.view(200, 200)],
        [source, other_source, source.view(200, 200)],
        0.8,
        backend=backend,
    )
    torch.testing.assert_close(tied, expected)
    torch.testing.assert_close(other, expected_other)


@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_modules(backend):
    """Parameters that require grad, buffers, generators; the sources stay as they are."""
    torch.manual_seed(0)

    def network():
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))

    student, teacher, expected = network(), network(), network()
    expected.load_state_dict(teacher.state_dict())
    student(torch.randn(9, 5))  # the counter of batches moves
    before = {name: t.clone() for name, t in student.state_dict().items()}
    ema_update_(teacher.parameters(), student.parameters(), 0.99, backend=backend)
    ema_update_(teacher.buffers(), student.buffers(), 0.99, backend=backend)
    for t, s in zip(expected.state_dict().values(), before.values(), strict=True):
        reference.ema_update_(t, s, 0.99)
    torch.testing.assert_close(teacher.state_dict(), expected.state_dict())
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert int(teacher[1].num_batches_tracked) == 1
    assert all(p.requires_grad and p.grad_fn is None for p in teacher.parameters())


@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_no_tensors(backend):
    assert ema_update_([], [], 0.9, backend=backend) is None


@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_nothing_changes_before_all_is_checked(backend):
    target = torch.zeros(3)
    with pytest.raises(ValueError, match=r"sources\[1\]"):
        ema_update_([target, target], [torch.ones(3), torch.ones(4)], 0.5, backend=backend)
    assert (target == 0).all()


@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_backward_through_an_updated_tensor_is_refused(backend):
    for target in (torch.ones(3), torch.ones(3, 4)[:, 1]):
        x = torch.ones(3, requires_grad=True)
        loss = (x * target).sum()
        ema_update_(target, torch.zeros(3), 0.5, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", QUEUE_BACKENDS)
def test_backward_through_an_old_queue_is_refused(backend):
    """Else the gradient would silently be one of the new keys."""
    queue, query = torch.randn(4, 10), torch.randn(2, 4, requires_grad=True)
    loss = (query @ queue).sum()
    queue_push_(queue, torch.tensor([0]), torch.randn(3, 4), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", QUEUE_BACKENDS)
def test_pushes_fill_a_ring(backend):
    """Batches that do not divide the queue: it always holds the last K keys, in order."""
    D, K = 3, 10
    offsets = torch.tensor([0.0, 0.25, 0.5])
    queue, pointer = torch.full((D, K), torch.nan), torch.tensor([0])
    stream = torch.arange(200.0)
    sent = 0
    for count in (4, 4, 4, 1, 0, 10, 7, 23, 9):
        keys = stream[sent : sent + count, None] + offsets
        queue_push_(queue, pointer, keys, backend=backend)
        sent += count
        assert int(pointer) == sent % K
        newest = torch.arange(max(0, sent - K), sent)
        torch.testing.assert_close(
            queue[:, newest % K], newest + torch.tensor([[0.0], [0.25], [0.5]])
        )
    assert sent == 62


@pytest.mark.parametrize("backend", QUEUE_BACKENDS)
def test_keys_with_a_graph_are_pushed_without_it(backend):
    queue, keys = torch.zeros(4, 10), torch.randn(3, 4, requires_grad=True)
    queue_push_(queue, torch.tensor([8]), keys, backend=backend)
    assert not queue.requires_grad
    torch.testing.assert_close(queue[:, [8, 9, 0]], keys.detach().T)
