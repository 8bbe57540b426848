"""The emulator itself: that it runs CUDA's rules, and that it reports what breaks them."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from gpu.cuda_emulation import Emulation
from gpu.cuda_emulation.build import compile_object, link
from gpu.cuda_emulation.translate import translate

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

__global__ void indices_kernel(float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1000 * blockIdx.x + threadIdx.x;
}

__global__ void order_kernel(float* out) {  // each thread appends its number
  int* counter = reinterpret_cast<int*>(out);
  out[1 + (*counter)++] = threadIdx.x;
}

__global__ void reverse_kernel(float* out) {  // through shared memory, with its barrier
  __shared__ float values[256];
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

__global__ void dynamic_kernel(float* out) {
  extern __shared__ float values[];
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

__global__ void unwritten_kernel(float* out) {
  __shared__ float values[4];
  if (threadIdx.x == 1) values[1] = 5.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void shuffles_kernel(float* out) {
  const int lane = threadIdx.x % 32;
  float* row = out + threadIdx.x * 6;
  row[0] = __shfl_sync(0xffffffffu, lane, 5);
  row[1] = __shfl_xor_sync(0xffffffffu, lane, 16);
  row[2] = __shfl_down_sync(0xffffffffu, lane, 3);
  row[3] = __shfl_up_sync(0xffffffffu, lane, 3);
  row[4] = __popc(__ballot_sync(0xffffffffu, lane % 3 == 0));
  row[5] = __syncthreads_count(lane == 0);
}

__global__ void half_a_warp_kernel(float* out) {  // two masks, lanes of one may be ahead
  const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  float x = threadIdx.x;
  for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(mask, x, step);
  out[threadIdx.x] = x;
}


// what breaks a rule
__global__ void divergent_kernel(float* out) {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void missed_barrier_kernel(float* out) { if (threadIdx.x < 7) __syncthreads(); }
__global__ void deadlock_kernel(float* out) {
  if (threadIdx.x == 3) __syncthreads();
  __syncwarp();
  if (threadIdx.x != 3) __syncthreads();
}
__global__ void absent_lane_kernel(float* out) {
  if (threadIdx.x < 20) out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 0);
}
__global__ void exited_lane_kernel(float* out) {
  if (threadIdx.x == 9) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
__global__ void outside_mask_kernel(float* out) {
  if (threadIdx.x < 4) out[threadIdx.x] = __shfl_sync(0xfu, 1.0f, 4);
}
__global__ void not_in_mask_kernel(float* out) { out[threadIdx.x] = __shfl_sync(0xffu, 1.0f, 0); }
__global__ void different_lines_kernel(float* out) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(~0u, 2.0f, 1);
  }
}

extern "C" void convert(const uint16_t* bits, float* bf16, float* fp16, int n) {
  for (int i = 0; i < n; ++i) {
    bf16[i] = __bfloat162float(__nv_bfloat16{bits[i]});
    fp16[i] = __half2float(__half{bits[i]});
  }
}
extern "C" void round_to_16_bits(const float* x, uint16_t* bf16, uint16_t* fp16, int n) {
  for (int i = 0; i < n; ++i) {
    bf16[i] = __float2bfloat16_rn(x[i]).bits;
    fp16[i] = __float2half_rn(x[i]).bits;
  }
}
"""

SOURCE += "".join(
    f"""
extern "C" int {name}(float* out, int blocks, int threads) {{
  {name}_kernel<<<blocks, threads, 256>>>(out);
  return cudaGetLastError();
}}
"""
    for name in re.findall(r"void (\w+)_kernel", SOURCE)
)


class _Library(Emulation):
    def __init__(self):
        self._library = ctypes.CDLL(str(link([compile_object("emulator_test.cu", SOURCE)])))
        self._library.cuda_emulation_error.restype = ctypes.c_char_p
        self.set_order("forward")

    def run(self, name: str, size: int = 1, blocks: int = 1, threads: int = 32):
        out = torch.zeros(size)
        pointer = ctypes.c_void_p(out.data_ptr())
        if getattr(self._library, name)(pointer, blocks, threads) != 0:
            raise RuntimeError(self._library.cuda_emulation_error().decode())
        return out

    def call(self, name: str, *tensors: torch.Tensor) -> None:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        getattr(self._library, name)(*pointers, tensors[0].numel())


@pytest.fixture(scope="module")
def library():
    return _Library()


@pytest.fixture(autouse=True)
def _forward(library):
    library.set_order("forward")


def test_blocks_and_threads(library):
    out = library.run("indices", 3 * 40, blocks=3, threads=40)
    wanted = 1000 * torch.arange(3).repeat_interleave(40) + torch.arange(40).repeat(3)
    assert torch.equal(out, wanted.float())


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_orders(library, order):
    library.set_order(order, seed=1)
    ran = library.run("order", 65, threads=64)[1:].long()
    assert sorted(ran.tolist()) == list(range(64))
    if order == "random":
        assert ran.tolist() not in (list(range(64)), list(range(64))[::-1])
        library.set_order(order, seed=2)
        assert not torch.equal(ran, library.run("order", 65, threads=64)[1:].long())
    else:
        assert ran.tolist() == list(range(64))[:: 1 if order == "forward" else -1]


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_shared_memory_and_exchanges(library, order):
    library.set_order(order, seed=3)
    assert torch.equal(library.run("reverse", 200, threads=200), torch.arange(199.0, -1, -1))
    assert torch.equal(library.run("dynamic", 64, threads=64), torch.arange(64.0).roll(-1))
    lanes = torch.arange(32)
    rows = library.run("shuffles", 96 * 6, threads=96).view(3, 32, 6).long()
    for warp in rows:
        assert (warp[:, 0] == 5).all() and torch.equal(warp[:, 1], lanes ^ 16)
        assert torch.equal(warp[:, 2], torch.where(lanes + 3 < 32, lanes + 3, lanes))
        assert torch.equal(warp[:, 3], torch.where(lanes >= 3, lanes - 3, lanes))
        assert (warp[:, 4] == 11).all() and (warp[:, 5] == 3).all()
    halves = library.run("half_a_warp", 32)
    assert (halves[:16] == sum(range(16))).all() and (halves[16:] == sum(range(16, 32))).all()


def test_unwritten_shared_memory_is_nan(library):
    out = library.run("unwritten", 4, threads=4)
    assert out[1] == 5 and out[[0, 2, 3]].isnan().all()


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("divergent", "wait at different barriers.*7 at the barrier of line"),
        ("missed_barrier", "finished threads never reach.*25 finished"),
        ("deadlock", "deadlock.*1 at the barrier.*31 at the exchange"),
        ("absent_lane", "deadlock|do not exist or finished|different lines"),
        ("exited_lane", "do not exist or finished"),
        ("outside_mask", "reads from a lane outside its mask"),
        ("not_in_mask", "not in the mask"),
        ("different_lines", "at different lines"),
    ],
)
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_broken_rules_are_reported(library, kernel, message, order):
    library.set_order(order)
    with pytest.raises(RuntimeError, match=message):
        library.run(kernel, 32)
    assert torch.equal(library.run("reverse", 32), torch.arange(31.0, -1, -1))  # works again


@pytest.mark.parametrize("blocks, threads", [(0, 32), (1, 0), (1, 1025)])
def test_impossible_launches_are_refused(library, blocks, threads):
    with pytest.raises(RuntimeError, match="invalid launch configuration"):
        library.run("indices", 2048, blocks=blocks, threads=threads)


def test_16_bit_floats(library):
    """All values to float; to 16 bits, everything around every rounding boundary."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    bf16, fp16 = torch.empty(1 << 16), torch.empty(1 << 16)
    library.call("convert", bits, bf16, fp16)
    torch.testing.assert_close(
        bf16, bits.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        fp16, bits.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True
    )

    values = torch.cat([bf16, fp16])
    values = values[values.isfinite()].sort().values
    middle = ((values[1:].double() + values[:-1].double()) / 2).float()
    infinity = torch.full_like(middle, torch.inf)
    values = torch.cat(
        [values, middle, middle.nextafter(infinity), middle.nextafter(-infinity), infinity[:1]]
    )
    rounded = [torch.empty(len(values), dtype=torch.uint16) for _ in range(2)]
    library.call("round_to_16_bits", values, *rounded)
    for got, dtype in zip(rounded, (torch.bfloat16, torch.float16), strict=True):
        assert torch.equal(got.view(torch.int16), values.to(dtype).view(torch.int16)), dtype
    nan = torch.tensor([torch.nan])
    library.call("round_to_16_bits", nan, *(r[:1] for r in rounded))
    assert (
        rounded[0][:1].view(torch.bfloat16).isnan() and rounded[1][:1].view(torch.float16).isnan()
    )


def test_what_cannot_be_translated_is_refused():
    with pytest.raises(ValueError, match=r"a\.cu:2: a use of __shared__"):
        translate("int a;\n__shared__ struct { int x; } b;", "a.cu")
