"""Repairs of Triton's interpreter, so that kernels run on the CPU as they would on a GPU.

Used with TRITON_INTERPRET=1, which must be set before the kernels are imported. As it comes
(3.7), the interpreter computes with the raw bits of bfloat16, truncates when it rounds to it,
rounds twice in `tl.fma`, and lets every stray access and every race pass. `install()` mends
the arithmetic and adds the checks: an access outside the tensors of the launch is an error, and so
is an element that one program writes and another one reads or writes.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


NOBODY, SEVERAL = -1, -2  # instead of the number of a program
PAGE = 2**16  # bytes whose readers and writers are noted together: most of a tensor is untouched


class LaunchError(Exception):
    """What a GPU would answer with a fault, or with another result every time."""


def bfloat16_to_float32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values):
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bfloat16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    if not _is_bfloat16(handle):
        return handle
    return Handle(bfloat16_to_float32(handle.data), tl.float32)


def _repair_casts():
    plain_cast, plain_float_cast = Builder.cast_impl, Builder.create_fp_to_fp

    def cast(self, source, target):
        scalar = target.scalar
        if source.dtype.scalar == scalar:
            return source
        source = _widened(source)
        if scalar == tl.bfloat16:
            return Handle(float32_to_bfloat16(source.data.astype(np.float32)), scalar)
        return source if source.dtype.scalar == scalar else plain_cast(self, source, target)

    def float_cast(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return plain_float_cast(self, source, target, rounding)

    Builder.cast_impl, Builder.create_fp_to_fp = cast, float_cast


def _repair_arithmetic():
    plain_binary, plain_unary = Builder.binary_op, Builder.unary_op

    def binary(self, left, right, operation):
        if not (_is_bfloat16(left) or _is_bfloat16(right)):
            return plain_binary(self, left, right, operation)
        result = operation(_widened(left).data, _widened(right).data)
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(float32_to_bfloat16(result), tl.bfloat16)

    def unary(self, value, operation):
        if not _is_bfloat16(value):
            return plain_unary(self, value, operation)
        return Handle(float32_to_bfloat16(operation(_widened(value).data)), tl.bfloat16)

    def fma(self, x, y, z):
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return Handle(wide.astype(z.data.dtype), z.dtype.scalar)

    def dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
        # One fused addition after the other, so that a pair has the same product in every tile: a
        # BLAS picks its order by the shape, and forward and backward pass would differ.
        left, right = (_widened(x).data.astype(np.float64) for x in (a, b))
        total = accumulator.data
        for k in range(left.shape[-1]):
            term = left[..., :, k, None] * right[..., None, k, :]
            total = (total + term).astype(np.float32)
        return Handle(total, accumulator.dtype.scalar)

    Builder.binary_op, Builder.unary_op = binary, unary
    Builder.create_fma, Builder.create_dot = fma, dot


def _scan_in_parallel():
    # As it comes, the interpreter calls the function of an associative scan once an element: a
    # second for a thousand. Here log2(n) times, each element with the one 1, 2, 4, ... before it,
    # as the threads of a GPU would: a function that is not associative gives another result.
    def scan(self, inputs):
        types, arrays = [x.dtype for x in inputs], [x.handle.data for x in inputs]
        length = arrays[0].shape[self.axis]
        place = np.arange(length).reshape(
            [-1 if i == self.axis else 1 for i in range(arrays[0].ndim)]
        )
        step = 1
        while step < length:
            earlier = [np.roll(a, step, self.axis) for a in arrays]
            given = map(self.to_tensor, (*earlier, *arrays), (*types, *types))
            joined = self.combine_fn.fn(*given)
            joined = joined if isinstance(joined, tuple) else (joined,)
            arrays = [
                np.where(place < step, a, j.handle.data).astype(a.dtype)
                for a, j in zip(arrays, joined, strict=True)
            ]
            step *= 2
        return [self.to_tensor(a, t) for a, t in zip(arrays, types, strict=True)]

    interpreter.ScanOps.generic_scan = scan


class _Memory:
    """The tensors of one launch, and which program wrote and read each of their bytes."""

    def __init__(self, tensors):
        spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors if t.numel())
        self.starts = np.array([start for start, _ in spans], np.uint64)
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))
        self.pages = {}  # number of a page -> the writer and the reader of each of its bytes

    def check(self, pointers, mask, size, program, writes):
        lanes = np.broadcast_to(mask, pointers.shape).astype(bool)
        address = np.atleast_1d(pointers)[np.atleast_1d(lanes)].astype(np.uint64).ravel()
        if not address.size:
            return
        place = np.searchsorted(self.starts, address, "right") - 1
        inside = (place >= 0) & (address + np.uint64(size) <= self.ends[place])
        if not inside.all():
            kind = "store" if writes else "load"
            raise LaunchError(f"{kind} outside the tensors by {int((~inside).sum())} lanes")
        number = address // np.uint64(PAGE)
        for page in np.unique(number):
            self._own(int(page), address[number == page], program, writes)

    def _own(self, page, address, program, writes):
        if page not in self.pages:
            self.pages[page] = np.full((2, PAGE), NOBODY, np.int64)
        writer, reader = self.pages[page]
        offset = (address % np.uint64(PAGE)).astype(np.int64)
        wrote, read = writer[offset], reader[offset]
        race = (wrote != NOBODY) & (wrote != program)
        if writes:
            race |= (read != NOBODY) & (read != program)
        if race.any():
            kind = "writes" if writes else "reads"
            raise LaunchError(f"race: a program {kind} what another one writes or reads")
        if writes:
            writer[offset] = program
        else:
            alone = (read == NOBODY) | (read == program)
            reader[offset] = np.where(alone, program, SEVERAL)


def _extent(tensor):
    """Bytes from the first to the last element of a tensor."""
    elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size()


def _check_accesses():
    executor = interpreter.GridExecutor
    plain_arguments = executor._init_args_hst
    plain_load, plain_store = Builder.create_masked_load, Builder.create_masked_store
    memory = None

    def arguments(self, values, options):
        nonlocal memory
        values, options = plain_arguments(self, values, options)
        given = []
        for value in (*values, *options.values()):
            given += value if isinstance(value, (tuple, list)) else (value,)
        memory = _Memory([v for v in given if hasattr(v, "data_ptr")])
        return values, options

    def check(builder, pointers, mask, writes):
        x, y, z = builder.grid_idx
        program = (z * builder.grid_dim[1] + y) * builder.grid_dim[0] + x
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        memory.check(pointers.data, mask.data, size, program, writes)

    def load(self, pointers, mask, *rest):
        check(self, pointers, mask, writes=False)
        return plain_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        check(self, pointers, mask, writes=True)
        return plain_store(self, pointers, value, mask, *rest)

    executor._init_args_hst = arguments
    Builder.create_masked_load, Builder.create_masked_store = load, store


def _do_not_copy_back():
    # CPU tensors were not copied to begin with; copying a sparse one onto itself makes it dense.
    interpreter.GridExecutor._restore_args_dev = lambda self, *arguments: None


def _patch_language_once_a_launch():
    # As it comes, every call of a function from a kernel patches all of triton.language again,
    # which takes most of the time of a test.
    plain_patch, executor = interpreter._patch_lang, interpreter.GridExecutor
    plain_launch = executor.__call__
    patched = set()

    def patch(function):
        modules = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        return plain_patch(function)

    def launch(self, *values, **options):
        patched.clear()
        return plain_launch(self, *values, **options)

    interpreter._patch_lang, executor.__call__ = patch, launch


def install():
    """Mends the interpreter of this process; a second call does nothing."""
    if getattr(Builder, "is_mended", False):
        return
    Builder.is_mended = True
    np.seterr(all="ignore")  # a kernel's -inf - -inf is as silent here as on a GPU
    _repair_casts()
    _repair_arithmetic()
    _scan_in_parallel()
    _check_accesses()
    _do_not_copy_back()
    _patch_language_once_a_launch()
