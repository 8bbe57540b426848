"""The contrastive losses over 2 and 4 processes: loss and gradients are those of one process."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import apt_kernels

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch without gloo"
)
SIZES = {2: ([4, 4], [3, 5], [0, 6]), 4: ([3, 3, 3, 3], [4, 1, 6, 2])}
WIDTH = 10


def _symmetric(x, y, **options):
    return apt_kernels.info_nce(x, y, symmetric=True, **options)


def _queue(x, y, **options):
    negatives = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    return apt_kernels.info_nce(x, y, negatives=negatives, **options)


LOSSES = {
    "info_nce": apt_kernels.info_nce,
    "symmetric": _symmetric,
    "queue": _queue,
    "nt_xent": apt_kernels.nt_xent,
    "siglip_loss": apt_kernels.siglip_loss,
}
BACKENDS = ("native", "reference")


def _data(total: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(total)
    x = torch.randn(total, WIDTH, generator=generator)
    y = x + 2 * torch.randn(total, WIDTH, generator=generator)
    labels = torch.randint(0, 3, (total,), generator=generator)
    return x.to(dtype), y.to(dtype), labels


def _results(name, x, y, labels, **options):
    """Loss, accuracy and the gradients of the rows and of the temperature."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    temperature = torch.tensor(0.3, dtype=wide, requires_grad=True)
    options = {"temperature": temperature, **options}
    if name == "sup_con_loss":
        loss, accuracy = apt_kernels.sup_con_loss(x, labels, **options)
        leaves = (x, temperature)
    else:
        loss, accuracy = LOSSES[name](x, y, **options)
        leaves = (x, y, temperature)
    upstream = 0.7 + 0.1 * torch.arange(loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    grads = torch.autograd.grad(loss, leaves, upstream)
    return loss.detach(), accuracy, *grads


def _rank(rank: int, world: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    found = {}
    for index, sizes in enumerate(SIZES[world]):
        begin = sum(sizes[:rank])
        local = slice(begin, begin + sizes[rank])
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            data = [t[local] for t in _data(sum(sizes), dtype)]
            for name in (*LOSSES, "sup_con_loss"):
                for reduction in ("mean", "sum", "none"):
                    for backend in BACKENDS:
                        options = {"reduction": reduction, "backend": backend}
                        case = (index, dtype, name, reduction, backend)
                        found[case] = _results(
                            name, *data, process_group=dist.group.WORLD, **options
                        )
    torch.save(found, f"{output}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(SIZES))
def ranks(request, tmp_path_factory):
    """What every rank found, all cases of one number of processes in one start of them."""
    folder = tmp_path_factory.mktemp(f"world_{request.param}")
    arguments = (request.param, str(folder / "store"), str(folder))
    torch.multiprocessing.spawn(_rank, arguments, nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


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
            loss = torch.stack([part[0] for part in parts]).mean()
            torch.testing.assert_close(loss, whole[0], **_tolerance(dtype))
            temperature = torch.stack([part[-1] for part in parts]).mean()
            torch.testing.assert_close(temperature, whole[-1], **_tolerance(dtype))
            for k in range(2, len(whole) - 1):  # rows, of which every rank has its own
                rows = torch.cat([part[k] for part in parts]) / len(ranks)
                torch.testing.assert_close(rows, whole[k], **_tolerance(dtype))
            if name == "sup_con_loss":
                continue
            right = sum(part[1] * n for part, n in zip(parts, sizes, strict=True)) / sum(sizes)
            torch.testing.assert_close(right, whole[1])


@pytest.mark.parametrize("name", (*LOSSES, "sup_con_loss"))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_rank_finds_what_the_reference_finds(ranks, name, reduction):
    for index, _ in enumerate(SIZES[len(ranks)]):
        for dtype in (torch.float64, torch.float32):
            for found in ranks:
                native, plain = (found[index, dtype, name, reduction, b] for b in BACKENDS)
                for got, wanted in zip(native, plain, strict=True):
                    torch.testing.assert_close(got, wanted, **_tolerance(dtype))


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
