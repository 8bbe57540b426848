"""What the table of operations cannot say of ema_update_ and queue_push_."""

from __future__ import annotations

import pytest
import torch

from apt_kernels import backends, ema_update_, queue_push_, reference

EMA_BACKENDS = backends()["operations"]["ema_update_"]["cpu"]
QUEUE_BACKENDS = backends()["operations"]["queue_push_"]["cpu"]


@pytest.fixture
def threads():
    """Sets PyTorch's threads, and back to one after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


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


def _in_turn(targets, sources, momentum):
    """The definition: one pair after the other, each from the values that it finds."""
    for target, source in zip(targets, sources, strict=True):
        found = source.clone().double()
        if target.is_floating_point():
            found = target.double() + (1 - momentum) * (found - target.double())
        target.copy_(found)


def _that_share_memory():
    """Names, and tensors made of one buffer of floats: targets and their sources."""

    def chain(x):
        return [x[:9], x[20:29], x[40:49]], [x[10:19], x[:9], x[20:29]]

    def chain_of_columns(x):
        x = x[:99].view(33, 3)
        return [x[:, 0], x[:, 1]], [x[:, 2], x[:, 0]]

    def written_after_it_was_read(x):
        return [x[:9], x[10:19]], [x[10:19], x[20:29]]

    def parts(x):
        return [x[:10], x[30:40]], [x[20:30], x[5:15]]

    def other_dtypes(x):
        integers, halves = torch.arange(9), torch.arange(9.0).bfloat16()
        return [x[:9], integers, halves, x[9:18]], [halves, x[:9], x[:9], halves]

    def shifted(x):
        return [x[:90]], [x[1:91]]

    def turned(x):
        return [x[:81].view(9, 9)], [x[:81].view(9, 9).T]

    def itself(x):
        return [x[:50], x[50:]], [x[:50], x[:50]]

    def twice_in_a_row(x):
        return [x[:9], x[:3], x[:9]], [x[10:19], x[3:6], x[:9]]

    def large(x):
        x = torch.linspace(0, 1, 400_000)
        return [x[:100_000], x[100_000:200_000]], [x[200_000:300_000], x[:100_000]]

    cases = (chain, chain_of_columns, written_after_it_was_read, parts, other_dtypes, shifted)
    return {case.__name__: case for case in (*cases, turned, itself, twice_in_a_row, large)}


@pytest.mark.parametrize("momentum", [0.5, 0, 1, 0.9])
@pytest.mark.parametrize("name", _that_share_memory())
@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_pairs_that_share_memory_take_effect_in_turn(backend, name, momentum, threads):
    case = _that_share_memory()[name]
    for count in (1, 2):
        threads(count)
        got, wanted = (case(torch.linspace(-1, 1, 100)) for _ in range(2))
        ema_update_(*got, momentum, backend=backend)
        _in_turn(*wanted, momentum)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_random_pairs_of_one_buffer_take_effect_in_turn(backend):
    generator = torch.Generator().manual_seed(0)
    for _ in range(30 if backend == "triton" else 200):  # by the interpreter: slow
        pairs = int(torch.randint(1, 9, (), generator=generator))
        places = torch.randint(0, 90, (pairs, 2), generator=generator).tolist()
        sizes = torch.randint(0, 10, (pairs,), generator=generator).tolist()

        def of(x, places=places, sizes=sizes):
            ranges = [[(p, p + n) for p in ps] for ps, n in zip(places, sizes, strict=True)]
            return [[x[slice(*r[i])] for r in ranges] for i in range(2)]

        x, y = torch.linspace(-1, 1, 100), torch.linspace(-1, 1, 100)
        ema_update_(*of(x), 0.75, backend=backend)
        _in_turn(*of(y), 0.75)
        torch.testing.assert_close(x, y)


def test_a_source_that_is_an_earlier_target_under_compile():
    def update(a, b, m):
        ema_update_([a, b], [m, a], 0.5)
        return a + b

    a, b, m = torch.zeros(4), torch.zeros(4), torch.full((4,), 8.0)
    torch._dynamo.reset()
    assert (torch.compile(update, fullgraph=True)(a, b, m) == 6).all()
    assert (a == 4).all() and (b == 2).all()


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(3, 1).expand(3, 4),
        torch.zeros(8).as_strided((3, 4), (1, 1)),
        torch.zeros(9).as_strided((2, 3), (2, 2)),
    ],
    ids=["expanded", "overlapping", "interleaved"],
)
@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_elements_that_share_memory_are_refused_before_anything_changes(target, backend):
    first, ones = torch.zeros(2), torch.ones(target.shape)
    for momentum in (0.5, 0):
        with pytest.raises(ValueError, match=r"targets\[1\]: expected .* do not share memory.*got"):
            ema_update_([first, target], [torch.ones(2), ones], momentum, backend=backend)
        assert not first.any() and not target.any()
    if backend in QUEUE_BACKENDS:
        with pytest.raises(ValueError, match=r"queue: expected .* do not share memory"):
            queue_push_(target, torch.tensor([0]), torch.ones(2, len(target)), backend=backend)
        assert not target.any()


@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_elements_between_those_of_others_are_no_overlap(backend):
    target = torch.zeros(6).as_strided((2, 2), (2, 3))
    ema_update_(target, torch.ones(2, 2), 0.5, backend=backend)
    assert (target == 0.5).all()


@pytest.mark.parametrize("backend", QUEUE_BACKENDS)
def test_keys_that_are_columns_of_the_queue(backend):
    queue = torch.arange(12.0).view(2, 6).clone()
    queue_push_(queue, torch.tensor([1]), queue[:, :4].T, backend=backend)
    assert queue.tolist() == [[0, 0, 1, 2, 3, 5], [6, 6, 7, 8, 9, 11]]


@pytest.mark.parametrize("backend", EMA_BACKENDS)
def test_many_tensors_on_many_threads(backend, threads):
    """A thread begins in the middle of a tensor, and of many."""
    sizes = [1, 7, 40_000, 3, 0, 100_000, 65_536, 5, 33_333] + [17] * 3000
    sources = [torch.full((n,), float(i + 1)) for i, n in enumerate(sizes)]
    for count in (1, 2, 3, 8):
        threads(count)
        targets = [torch.zeros(n) for n in sizes]
        ema_update_(targets, sources, 0.5, backend=backend)
        for i, target in enumerate(targets):
            assert (target == (i + 1) / 2).all(), (count, i)
