"""The contrastive losses over 2 and 4 processes: loss and gradients are those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import apt_kernels
from support import processes

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch without gloo"
)
SIZES = {
    2: ([4, 4], [3, 5], [0, 6], [1, 1]),
    3: ([2, 0, 5],),
    4: ([3, 3, 3, 3], [4, 1, 6, 2], [0, 5, 3, 0], [1, 1, 1, 1]),
}
INTERPRETED = {3: [2, 0, 5], 4: [4, 1, 3, 2]}
WIDTH = 10
WIDE = 64  # so that rows are far larger than the statistics of rows


def _symmetric(x, y, **options):
    return apt_kernels.info_nce(x, y, symmetric=True, **options)


def _queue(x, y, **options):
    negatives = torch.randn(12, x.shape[1], generator=torch.Generator().manual_seed(3)).to(x.dtype)
    return apt_kernels.info_nce(x, y, negatives=negatives, **options)


LOSSES = {
    "info_nce": apt_kernels.info_nce,
    "symmetric": _symmetric,
    "queue": _queue,
    "nt_xent": apt_kernels.nt_xent,
    "siglip_loss": apt_kernels.siglip_loss,
}
BACKENDS = ("native", "reference")


def _data(total: int, dtype: torch.dtype, width: int = WIDTH):
    generator = torch.Generator().manual_seed(total)
    x = torch.randn(total, width, generator=generator)
    y = x + 2 * torch.randn(total, width, generator=generator)
    labels = torch.randint(0, 3, (total,), generator=generator)
    return x.to(dtype), y.to(dtype), labels


def _results(name, x, y, labels, frozen=(), **options):
    """Loss, right predictions and the gradients of the rows and of the temperature."""
    x, y = x.clone().requires_grad_("x" not in frozen), y.clone().requires_grad_("y" not in frozen)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    temperature = torch.tensor(0.3, dtype=wide, requires_grad=True)
    options = {"temperature": temperature, "return_correct": True, **options}
    if name == "sup_con_loss":
        loss, correct = apt_kernels.sup_con_loss(x, labels, **options)
        leaves = (x, temperature)
    else:
        loss, correct = LOSSES[name](x, y, **options)
        leaves = [leaf for leaf in (x, y, temperature) if leaf.requires_grad]
    upstream = 0.7 + 0.1 * torch.arange(loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    grads = torch.autograd.grad(loss, leaves, upstream)
    return loss.detach(), correct, *grads


class _Watch(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns, and of the largest message."""

    def __enter__(self):
        self.tensor = self.message = 0
        self.exchange = dist.batch_isend_irecv
        dist.batch_isend_irecv = self._count
        return super().__enter__()

    def __exit__(self, *error):
        dist.batch_isend_irecv = self.exchange
        return super().__exit__(*error)

    def _count(self, operations):
        self.message = max(self.message, *(o.tensor.nbytes for o in operations))
        return self.exchange(operations)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.tensor = max(self.tensor, result.untyped_storage().nbytes())
        return results


def _sizes(name, rank, world, group):
    """What a rank allocates and exchanges at most for one loss of wide rows, with gradients."""
    sizes = SIZES[world][0]
    begin = sum(sizes[:rank])
    data = [t[begin : begin + sizes[rank]] for t in _data(sum(sizes), torch.float32, WIDE)]
    with _Watch() as watch:
        _results(name, *data, process_group=group)
    return watch.tensor, watch.message


def _ties(sizes, rank, group):
    """Right predictions of equal embeddings: their products are exact in any order of sums."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.ones(sizes[rank], 16, dtype=dtype)
        labels = torch.arange(sizes[rank]) + 100 * rank
        for name in ("info_nce", "symmetric", "nt_xent", "siglip_loss", "sup_con_loss"):
            for backend in BACKENDS:
                other = labels // 2 if name == "sup_con_loss" else x
                options = {"process_group": group, "backend": backend, "return_correct": True}
                loss = LOSSES.get(name, apt_kernels.sup_con_loss)
                yield (name, dtype, backend), loss(x, other, **options)[1]


def _rank(rank: int, world: int, output: str) -> None:
    found = {}
    for index, sizes in enumerate(SIZES[world]):
        begin = sum(sizes[:rank])
        local = slice(begin, begin + sizes[rank])
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            data = [t[local] for t in _data(sum(sizes), dtype)]
            for name in (*LOSSES, "sup_con_loss"):
                for reduction in ("mean", "sum", "none")[: 1 if dtype == torch.bfloat16 else 3]:
                    for backend in BACKENDS:
                        options = {"reduction": reduction, "backend": backend}
                        case = (index, dtype, name, reduction, backend)
                        found[case] = _results(
                            name, *data, process_group=dist.group.WORLD, **options
                        )
                if name in ("sup_con_loss", "queue") or dtype != torch.float64:
                    continue
                for frozen in ("x", "y", "xy"):
                    found[index, name, frozen] = _results(
                        name, *data, frozen=frozen, process_group=dist.group.WORLD
                    )
        found["ties", index] = dict(_ties(sizes, rank, dist.group.WORLD))
    for name in (*LOSSES, "sup_con_loss"):
        found["sizes", name] = _sizes(name, rank, world, dist.group.WORLD)
    torch.save(found, f"{output}/{rank}.pt")


def _interpreted_rank(rank: int, world: int, output: str) -> None:
    """As `_rank`, with Triton's kernels: TRITON_INTERPRET=1 is set."""
    from gpu import triton_interpreter

    triton_interpreter.install()
    sizes = INTERPRETED[world]
    begin = sum(sizes[:rank])
    data = [t[begin : begin + sizes[rank]] for t in _data(sum(sizes), torch.float32)]
    options = {"process_group": dist.group.WORLD, "backend": "triton"}
    found = {name: _results(name, *data, **options) for name in (*LOSSES, "sup_con_loss")}
    torch.save(found, f"{output}/{rank}.pt")


@pytest.fixture(scope="module", params=sorted(SIZES))
def ranks(request, tmp_path_factory):
    """What every rank found, all cases of one number of processes in one start of them."""
    folder = tmp_path_factory.mktemp(f"world_{request.param}")
    processes.run(_rank, folder, request.param, arguments=(request.param, str(folder)))
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def _same_averages(parts, whole, dtype):
    loss = torch.stack([part[0] for part in parts]).mean()
    torch.testing.assert_close(loss, whole[0], **_tolerance(dtype))
    temperature = torch.stack([part[-1] for part in parts]).mean()
    torch.testing.assert_close(temperature, whole[-1], **_tolerance(dtype))
    for k in range(2, len(whole) - 1):  # rows, of which every rank has its own
        rows = torch.cat([part[k] for part in parts]) / len(parts)
        torch.testing.assert_close(rows, whole[k], **_tolerance(dtype))
    assert sum(part[1] for part in parts) == whole[1]  # right predictions add up


def _tolerance(dtype):
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    return {"rtol": bound, "atol": bound}


@pytest.mark.parametrize("name", (*LOSSES, "sup_con_loss"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_averages_over_ranks_are_those_of_one_process(ranks, name, dtype):
    for index, sizes in enumerate(SIZES[len(ranks)]):
        whole = _results(name, *_data(sum(sizes), dtype), backend="reference")
        for backend in BACKENDS:
            parts = [found[index, dtype, name, "mean", backend] for found in ranks]
            _same_averages(parts, whole, dtype)


@pytest.mark.parametrize("world", sorted(INTERPRETED))
def test_triton_kernels(world, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    processes.run(_interpreted_rank, tmp_path, world, arguments=(world, str(tmp_path)))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name in found[0]:
        data = _data(sum(INTERPRETED[world]), torch.float32)
        whole = _results(name, *data, backend="reference")
        _same_averages([part[name] for part in found], whole, torch.float32)


@pytest.mark.parametrize("name", (*LOSSES, "sup_con_loss"))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_rank_finds_what_the_reference_finds(ranks, name, reduction):
    for index, _ in enumerate(SIZES[len(ranks)]):
        for dtype in (torch.float64, torch.float32):
            for found in ranks:
                native, plain = (found[index, dtype, name, reduction, b] for b in BACKENDS)
                for got, wanted in zip(native, plain, strict=True):
                    torch.testing.assert_close(got, wanted, **_tolerance(dtype))


@pytest.mark.parametrize("name", ("info_nce", "symmetric", "nt_xent", "siglip_loss"))
def test_rows_without_gradient_change_no_other_gradient(ranks, name):
    for index, _ in enumerate(SIZES[len(ranks)]):
        for found in ranks:
            whole = found[index, torch.float64, name, "mean", "native"]
            for frozen in ("x", "y", "xy"):
                kept = [whole[2]] * ("x" not in frozen) + [whole[3]] * ("y" not in frozen)
                wanted = (*whole[:2], *kept, whole[4])
                some = found[index, name, frozen]
                for got, expected in zip(some, wanted, strict=True):
                    torch.testing.assert_close(got, expected, **_tolerance(torch.float64))


def test_equal_embeddings_are_never_right(ranks):
    for index, sizes in enumerate(SIZES[len(ranks)]):
        for found in ranks:
            for case, correct in found["ties", index].items():
                assert correct == 0 or sum(sizes) < 2, (sizes, case, correct)


@pytest.mark.parametrize(
    "name", ("info_nce", "symmetric", "nt_xent", "siglip_loss", "sup_con_loss")
)
def test_no_rank_holds_the_rows_of_all(ranks, name):
    sizes = SIZES[len(ranks)][0]
    views = 2 if name == "nt_xent" else 1
    block = views * max(sizes) * WIDE * 4
    tensors, messages = zip(*(found["sizes", name] for found in ranks), strict=True)
    assert max(tensors) <= block < views * sum(sizes) * WIDE * 4
    assert max(messages) == block


def test_options_that_ranks_cannot_have_are_refused(tmp_path):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        x, y = torch.randn(4, 6), torch.randn(7, 6)
        group = dist.group.WORLD
        for loss in (apt_kernels.info_nce, apt_kernels.siglip_loss):
            with pytest.raises(ValueError, match="key: expected 4 rows with process_group"):
                loss(x, y, process_group=group)
            with pytest.raises(ValueError, match="label_offset: expected 0 with process_group"):
                loss(x, y[:4], label_offset=1, process_group=group)
            alone = loss(x, y[:4], process_group=group)
            torch.testing.assert_close(alone, loss(x, y[:4]), rtol=0, atol=0)
    finally:
        dist.destroy_process_group()
