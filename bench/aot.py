"""Compiles every kernel for GPUs that are not there; reads registers, spills and shared memory off the machine code.

The `examples` of each file of `kernels/` run on meta tensors of real shapes while launches are recorded. Every distinct
launch is compiled with the specialization that triton would choose for it: integers equal to 1 are constants, multiples
of 16 and aligned pointers are marked so. Needs triton without its interpreter, no GPU.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from dune_fast import kernels
from dune_fast.kernels.launching import Example, Recorded, recording

TARGETS = ("sm_80", "sm_90", "sm_100")
_NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "u1",
    torch.float8_e4m3fn: "fp8e4nv", torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Resources(NamedTuple):
    """What one compiled kernel takes; `error` is empty unless it did not compile."""

    module: str
    case: str
    kernel: str
    target: str
    registers: int = 0
    spilled: int = 0
    """Bytes of stack and local memory a thread."""
    shared: int = 0
    """Bytes a program."""
    threads: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and self.spilled == 0


def kernel_module(name: str) -> ModuleType:
    """A file of `kernels/`, imported."""
    return importlib.import_module(f"dune_fast.kernels.{name}")


def discover(only: str | None = None) -> list[str]:
    """Names of the modules of `kernels/` with kernels to compile; ValueError if `only` is none of them."""
    names = [
        module.name
        for module in pkgutil.iter_modules(kernels.__path__)
        if hasattr(kernel_module(module.name), "examples")
    ]
    if only is not None and only not in names:
        raise ValueError(f"no kernels named {only!r}; choose one of {', '.join(names)}")
    return names if only is None else [only]


def cases(module: str) -> list[tuple[str, Example]]:
    """Labels and examples, on meta tensors, of what to compile of a module; call it under `recording` of the target."""
    chosen = kernel_module(module)
    return [
        (f"{example.label} {list(shape)} {str(dtype)[6:]}", example)
        for shape, dtype in chosen.AOT
        for example in chosen.examples(shape, dtype, torch.device("meta"))
    ]


class Source(NamedTuple):
    """A launch as the compiler sees it; two equal ones are one kernel."""

    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list]]
    options: dict[str, Any]


def specialize(recorded: Recorded) -> Source:
    """Types and specialization of a recorded launch, as triton derives them from the arguments of a call."""
    parameters = recorded.kernel.params
    named = dict(zip((p.name for p in parameters), recorded.args, strict=False)) | recorded.options
    source = Source({}, {}, {}, {key: named.pop(key) for key in _OPTIONS if key in named})
    for parameter in parameters:
        value, free = named.pop(parameter.name, parameter.default), not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            source.signature[parameter.name] = "constexpr"
            source.constants[parameter.name] = value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        source.signature[parameter.name] = _type(value)
        at = value.storage_offset() * value.element_size() if is_tensor else value
        if free and type(at) is int and at % 16 == 0:
            source.attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    assert not named, f"{recorded.kernel.__name__} has no parameter {', '.join(named)}"
    return source


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), type(value)
    return "fp32"


def compile_case(module: str, index: int, targets: Sequence[str]) -> list[Resources]:
    """Compiles what one example of a module launches, for every target."""
    results = []
    for target in targets:
        with recording(target) as launches:
            chosen = cases(module)[index : index + 1]  # none: the target lacks the type
            for _, example in chosen:
                example.op(*example.args)
            launches = list(launches)
        done: list[tuple[Any, Source]] = []
        for recorded in launches:
            try:
                source = specialize(recorded)
                if (recorded.kernel, source) in done:
                    continue
                done.append((recorded.kernel, source))
                used = resources(compile_source(recorded.kernel, source, target))
            except Exception as error:  # one that does not compile is a line of the report, the others still count
                text = (str(error).strip() or repr(error)).splitlines()[-1]
                used = {"error": f"{type(error).__name__}: {text}"}
            results.append(Resources(module, chosen[0][0], recorded.kernel.__name__, target, **used))
    return results


def compile_source(kernel: Any, source: Source, target: str) -> Any:
    """triton's compiled kernel: `asm["cubin"]` and `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    return triton.compile(
        ASTSource(kernel, source.signature, source.constants, source.attributes),
        target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options=source.options,
    )


def resources(compiled: Any) -> dict[str, int]:
    """Registers and spilled bytes a thread, shared memory and threads a program, by triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
    }


def check_targets(targets: Sequence[str]) -> None:
    """ValueError where a target is unknown, triton is absent or its interpreter is on."""
    from dune_fast.kernels.library import INTERPRETER, triton

    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"target {target!r} is unknown; choose from {', '.join(TARGETS)}")
    if triton is None or INTERPRETER:
        raise ValueError("compiling ahead of time needs triton, and TRITON_INTERPRET not set when python starts")


def compile_all(targets: Sequence[str], only: str | None = None, quick: bool = False) -> list[Resources]:
    """Compiles all kernels, in as many processes as there are processors; `quick` takes the first case of each file.

    Raises:
        ValueError: an unknown target or module, or triton is absent or its interpreter is on.
    """
    check_targets(targets)
    counts = {module: 1 if quick else len(cases(module)) for module in discover(only)}
    tasks = [(module, i, tuple(targets)) for module, count in counts.items() for i in range(count)]
    return run_all(compile_case, tasks)


def run_all(function: Callable[..., list], tasks: Sequence[tuple]) -> list:
    """The lists that the calls return, one after the other; as many processes as processors do the work."""
    # spawned, for triton's compiler and torch keep threads; one compiler a processor
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        return [line for future in futures for line in future.result()]
