"""What every operation keeps: opcheck, its reference's values, same bits, any layout, 64-bit offsets, torch.compile,
no wait for the device, CUDA graphs.

The operations and their inputs are the `examples` of the kernel files; forward and backward of the public functions are
those of the benchmark. The files' own tests check values against the references.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bench.aot import discover, kernel_module
from bench.kernel_cases import OPERATIONS, Operation, draw_upstream, outputs, run_both
from dune_fast.kernels import library
from dune_fast.kernels.fp8 import FP8Linear
from dune_fast.kernels.launching import Example

pytestmark = pytest.mark.usefixtures("poisoned")
META, BF16 = torch.device("meta"), torch.bfloat16


def shape_for(module: str, images: int) -> tuple[int, int, int]:
    """[B, N, C] of features, [B, 3, side] of images."""
    return (images, 3, 7) if module in ("resize", "augment") else (images, 2, 64)


def many(module: str, device: torch.device) -> int:
    """Images enough for several programs; few where the interpreter pays for each."""
    return 512 if device.type == "cuda" else 3 if module in ("resize", "augment") else 30


def skip_without_float8(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")


def example(module: str, index: int, device: torch.device, images: int = 3, dtype: torch.dtype = BF16) -> Example:
    if module == "fp8":
        skip_without_float8(device)
    torch.manual_seed(0)
    return list(kernel_module(module).examples(shape_for(module, images), dtype, device))[index]


CASES = [
    pytest.param(module, index, id=f"{module}: {one.label}")
    for module in discover()
    for index, one in enumerate(kernel_module(module).examples(shape_for(module, 3), BF16, META))
]
each_example = pytest.mark.parametrize(("module", "index"), CASES)


def run(op: Callable, args: tuple) -> list[Tensor]:
    """Outputs of a call; of one in place, what it leaves in its first argument."""
    result = op(*args)
    return [args[0]] if result is None else outputs(result)


def fresh(args: tuple) -> tuple:
    """Arguments for another call of an operation that may write into the first: same values and strides."""
    first = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype, device=args[0].device)
    return first.copy_(args[0]), *args[1:]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same bits; on a GPU nearly so, for a kernel compiled for other strides may sum in another order."""
    if not found[0].is_cuda:
        return assert_same_bits(found, expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        ours, theirs = ours.double(), theirs.double()
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def features(args: tuple) -> list[int]:
    """Which arguments are as large as the first."""
    return [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.shape == args[0].shape and x.ndim > 1]


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("triton", [False, True])
@each_example
def test_opcheck(module, index, triton, dtype, device, fused):
    """Schema, registration, and a fake that equals the real outputs in shape, type and strides."""
    if triton and device.type == "cpu" and not library.INTERPRETER:
        pytest.skip("needs the interpreter")
    one = example(module, index, device, 2, dtype)
    with fused() if triton else contextlib.nullcontext():
        torch.library.opcheck(one.op, one.args)


@each_example
def test_the_plain_implementation_gives_the_same_values(module, index, device, fused):
    """That of a CPU, which no public function calls. Float8 may round to the neighbour."""
    one = example(module, index, device, dtype=torch.float32)
    with fused():
        found = run(one.op, fresh(one.args))
    on_cpu = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, one.args)
    for ours, plain in zip(found, run(one.op, fresh(on_cpu)), strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        digits = 1e-5 if ours.dtype == torch.float32 else 2**-4 if ours.dtype == torch.float8_e4m3fn else 2**-7
        error = (ours.double().cpu() - plain.double()).norm()
        assert error <= digits * plain.double().norm(), error


@each_example
def test_bit_identical_from_run_to_run(module, index, device, fused):
    one = example(module, index, device, many(module, device))
    with fused():
        assert_same_bits(run(one.op, fresh(one.args)), run(one.op, fresh(one.args)))


def relaid(x: Tensor, layout: str) -> Tensor:
    """The same values in other strides, among NaN."""
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand_as(x)  # not the same values: the first image's, for all
    wider = [x.shape[0], x.shape[1] + 1, *x.shape[2:]] if layout == "slice" else [*x.shape[:-1], 2 * x.shape[-1]]
    memory = torch.full(wider, 255 if x.dtype == torch.uint8 else torch.nan, dtype=x.dtype, device=x.device)
    view = memory[:, 1:] if layout == "slice" else memory[..., ::2]
    return view.copy_(x)


each_layout = pytest.mark.parametrize("layout", ["transposed", "slice", "every other channel", "expanded"])


@each_layout
@each_example
def test_strided_inputs(module, index, layout, device, fused):
    """Each feature argument alone, then all: the bits are those of contiguous ones."""
    one = example(module, index, device)
    if one.op._schema.is_mutable and layout == "expanded":
        pytest.skip("nothing can be written into an expanded tensor")
    at = features(one.args)
    for chosen in [[i] for i in at] + [at] * (len(at) > 1):
        strided = [relaid(x, layout) if i in chosen else x for i, x in enumerate(one.args)]
        plain = [x.contiguous().clone() if i in chosen else x for i, x in enumerate(strided)]
        with fused():
            expected = run(one.op, fresh(tuple(plain)))
            found = run(one.op, tuple(strided))
        assert_same(found, expected)


@pytest.mark.parametrize(("images", "far"), [(3, 2**30 + 16), (2, 2**31 + 16)])
@each_example
def test_images_beyond_2_to_31_elements(module, index, images, far, device, fused):
    """The last image starts past what 32 bits can index; the memory between is never touched."""
    torch.use_deterministic_algorithms(False)  # no NaN into gigabytes; the `poisoned` fixture restores its state
    one = example(module, index, device, images)
    for i in features(one.args):
        x = one.args[i].contiguous()
        if x.element_size() > 2 or len(x) != images:
            continue
        memory = torch.empty((images - 1) * far + x[0].numel(), dtype=x.dtype, device=device)
        distant = memory.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)
        args = [distant if j == i else near for j, near in enumerate(one.args)]
        with fused():
            expected = run(one.op, fresh(one.args))
            found = run(one.op, tuple(args))
        assert_same(found, expected)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_capture(call: Callable[[], list[Tensor]]) -> None:
    """A call waits for nothing, and replayed from a CUDA graph it gives the same bits."""
    expected = call()  # compiles
    with no_waiting():
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for out in captured:
        out.detach().view(torch.uint8).fill_(255)  # NaN
    graph.replay()
    assert_same_bits(captured, expected)


@pytest.mark.gpu
@each_example
def test_no_synchronisation_and_graph_capture(module, index):
    device = torch.device("cuda")
    one = example(module, index, device, many(module, device))
    check_capture(lambda: run(one.op, fresh(one.args)))


def public(operation: Operation, device: torch.device) -> Callable[[], list[Tensor]]:
    """Outputs of a public function and, where it has them, the gradients of its inputs."""
    torch.manual_seed(0)
    images = many(operation.file, device)
    inputs = operation.make((images, 3, 14) if operation.on_images else (images, 2, 64), BF16, device)
    upstream = draw_upstream(operation, inputs)

    def call() -> list[Tensor]:
        given = fresh(inputs) if operation.name.endswith("_") else inputs
        found = [out.detach() for out in outputs(operation.ours(*given))]
        return found + (run_both(operation.ours, given, upstream) if upstream else [])

    return call


each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


@each_operation
def test_public_functions_compile_whole(operation, device, fused):
    torch.manual_seed(0)
    inputs = operation.make((2, 3, 14) if operation.on_images else (2, 3, 64), BF16, device)
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    torch.compiler.reset()
    compiled = torch.compile(operation.ours, fullgraph=True, backend="aot_eager")
    with fused():
        expected = outputs(operation.ours(*fresh(tuple(inputs))))
        assert_same_bits(outputs(compiled(*inputs)), expected)


@pytest.mark.gpu
@each_operation
def test_public_functions_do_not_wait_and_are_captured(operation):
    if operation.file == "fp8":
        skip_without_float8(torch.device("cuda"))
    check_capture(public(operation, torch.device("cuda")))


@pytest.mark.gpu
@torch.no_grad()
def test_a_float8_product_does_not_wait_and_is_captured():
    skip_without_float8(torch.device("cuda"))
    x, linear = torch.randn(64, 192, device="cuda", dtype=BF16), FP8Linear(torch.nn.Linear(192, 64)).cuda()
    check_capture(lambda: [linear(x)])
