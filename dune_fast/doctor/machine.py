"""Checks of the machine and of what is installed; none needs a configuration."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import queue
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dune_fast.doctor import FAIL, OK, WARN, Check, Finding
from dune_fast.engine.devices import peak_tflops
from dune_fast.engine.provenance import driver_version
from dune_fast.teachers.files import cache_dir

_DRIVERS = {13: 580, 12: 525}  # CUDA's major version -> the oldest driver branch that runs it
_SHARED_MEMORY = 2**30
_OPEN_FILES = 4096
_COLLECTIVE_SECONDS = 90.0
_ATTENTION_TOLERANCE = 2e-2  # bf16, against float32


def has_nvidia_device() -> bool:
    """Whether the operating system knows an NVIDIA GPU, whatever torch thinks."""
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists()


def python() -> Finding:
    """The interpreter's version."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding("python", OK, found)
    return Finding("python", FAIL, f"{found}; 3.11 and 3.12 are supported", "make a virtual environment of one of them")


def gpu() -> Iterator[Finding]:
    """Devices that torch sees."""
    if not torch.cuda.is_available():
        if has_nvidia_device() and torch.version.cuda is None:
            text = f"this machine has one, but torch {torch.__version__} is built without CUDA"
            yield Finding("gpu", FAIL, text, "install torch from an index that has its CUDA builds")
        elif has_nvidia_device():
            text = f"this machine has one, but torch (CUDA {torch.version.cuda}) cannot use it"
            cure = "look at nvidia-smi, at CUDA_VISIBLE_DEVICES and, in a container, at its option for GPUs"
            yield Finding("gpu", FAIL, text, cure)
        else:
            yield Finding("gpu", WARN, "none: training runs on the CPU", "that serves demos and tests; else use a GPU")
        return
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for i, device in enumerate(properties):
        text = f"{i}: {device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
        if (device.major, device.minor) < (8, 0):
            yield Finding("gpu", WARN, f"{text}, without bf16 units", "set train.precision=fp32, or use sm_80 or newer")
        elif peak_tflops(device.name) is None:
            yield Finding("gpu", OK, f"{text} (peak not known: a run shows no MFU)")
        else:
            yield Finding("gpu", OK, text)
    if len({device.name for device in properties}) > 1:
        yield Finding("gpu", WARN, "unlike devices: every step waits for the slowest", "choose by CUDA_VISIBLE_DEVICES")


def driver() -> Finding:
    """NVIDIA's driver against what this torch needs."""
    found, cuda = driver_version(), torch.version.cuda
    if found is None:
        if has_nvidia_device():
            return Finding("driver", WARN, "a GPU, but the driver's version cannot be read", "look at nvidia-smi")
        return Finding("driver", OK, "not needed without a GPU")
    needed = _DRIVERS.get(int(cuda.split(".")[0])) if cuda else None
    if needed is not None and int(found.split(".")[0]) < needed:
        text = f"{found}, but torch's CUDA {cuda} needs {needed} or newer"
        return Finding("driver", FAIL, text, "update the driver, or install a torch for an older CUDA")
    return Finding("driver", OK, f"{found}, CUDA {cuda}" if cuda else found)


def packages(constraints: Path | None = None) -> Finding:
    """Installed versions against the tested set."""
    path = constraints or Path(__file__).resolve().parents[2] / "constraints.txt"
    if not path.exists():
        return Finding("packages", OK, f"torch {torch.__version__}; the list of tested versions is not installed")
    others, missing = [], []
    for name, tested in re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found.partition("+")[0] != tested:
            others.append(f"{name} {found} (tested: {tested})")
    if others:
        cure = "pip install -c constraints.txt -e . brings the tested versions; others may work"
        return Finding("packages", WARN, "; ".join(others), cure)
    left_out = f"; not installed, as far as tested: {', '.join(missing)}" if missing else ""
    return Finding("packages", OK, f"torch {torch.__version__}, all of the tested versions{left_out}")


def triton() -> Finding:
    """Compiles and runs one of our kernels where there is a GPU."""
    try:
        import triton as package
    except ImportError as error:
        if torch.cuda.is_available():
            return Finding("triton", FAIL, str(error), "pip install -c constraints.txt triton")
        return Finding("triton", OK, "not installed; without a GPU the reference formulas serve")
    if not torch.cuda.is_available():
        return Finding("triton", OK, f"{package.__version__}; its kernels need a GPU, reference formulas serve here")
    from dune_fast.kernels.moments import moments

    x = torch.arange(64 * 192, device="cuda", dtype=torch.float32).view(1, 64, 192).sin()
    mean, m2 = moments(x)
    rows = x.flatten(0, 1).double()
    squares = (rows - rows.mean(0)).square().sum(0)
    wrong = max(float((mean - rows.mean(0)).abs().max()), float((m2 - squares).abs().max()) / 64)
    if not wrong < 1e-5:
        cure = "reinstall torch and triton together from constraints.txt; empty triton's cache (~/.triton)"
        return Finding("triton", FAIL, f"{package.__version__}: a kernel is wrong by {wrong:.1e}", cure)
    return Finding("triton", OK, f"{package.__version__}: a kernel was compiled and is right")


def attention() -> Finding:
    """Runs the implementation that is chosen here and compares it with the formula."""
    from dune_fast.kernels.attention import attention as attend
    from dune_fast.kernels.attention import resolve_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    qkv = torch.linspace(0, 40, 197 * 3 * 2 * 64, device=device).sin().view(1, 197, 3, 2, 64)
    low = qkv.bfloat16()
    chosen = resolve_backend("auto", low)
    shown = "torch's scaled_dot_product_attention" if chosen == "auto" else chosen
    error = float((attend(low).float() - attend(qkv, "math")).abs().max())
    if not error < _ATTENTION_TOLERANCE:
        cure = "remove flash-attn, or install a build for this torch and device"
        return Finding("attention", FAIL, f"{shown} is wrong by {error:.1e}", cure)
    return Finding("attention", OK, f"{shown} in bf16, within {error:.0e} of float32")


def dali() -> Finding:
    """Decodes a small JPEG as a training does."""
    from dune_fast.dali_pipelines.augmentation import validation_geometry
    from dune_fast.dali_pipelines.errors import DataError
    from dune_fast.dali_pipelines.pipeline import Decoder, import_dali

    try:
        version = import_dali().__version__
    except DataError as error:
        return Finding("dali", FAIL, "NVIDIA DALI cannot be imported", str(error).rpartition("; ")[2])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    encoded = np.frombuffer(_jpeg((90, 120, 150)), np.uint8)
    decoder = Decoder(1, 32, 1, device)
    try:
        decoder.submit([encoded], validation_geometry(np.array([[32, 32]]), np.zeros(1, bool), 32))
        images, event = decoder.receive()
        if event is not None:
            event.synchronize()
        error = int((images.cpu().int() - torch.tensor([90, 120, 150])).abs().max())
    except RuntimeError as failure:
        cure = "install the DALI for the driver's CUDA: pip install nvidia-dali-cuda130, or nvidia-dali-cuda120"
        return Finding("dali", FAIL, f"{version} cannot decode on {device.type}: {failure}".splitlines()[0], cure)
    finally:
        decoder.close()
    if error > 3:
        return Finding("dali", FAIL, f"{version} decodes a plain JPEG wrong by {error} levels", "reinstall it")
    return Finding("dali", OK, f"{version}: decoded a JPEG on {device.type}")


def _jpeg(colour: tuple[int, int, int]) -> bytes:
    """A plain image of 32 x 32 pixels."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _all_reduce(rank: int, size: int, backend: str, store: str, results: multiprocessing.Queue) -> None:
    """One process of a group: sums its rank's number over the group."""
    import torch.distributed as dist

    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
        x = torch.full((1024,), rank + 1.0, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(x)
        results.put((rank, float(x.sum()) / 1024))
        dist.destroy_process_group()
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))


def collectives(backend: str, size: int, seconds: float = _COLLECTIVE_SECONDS) -> Finding:
    """An all-reduce over `size` processes of their own."""
    context = multiprocessing.get_context("spawn")
    cure = "run again with NCCL_DEBUG=INFO" if backend == "nccl" else "look whether a firewall closes the local network"
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        arguments = (size, backend, os.path.join(folder, "store"), results)
        processes = [context.Process(target=_all_reduce, args=(rank, *arguments), daemon=True) for rank in range(size)]
        for process in processes:
            process.start()
        try:
            answers = dict(results.get(timeout=seconds) for _ in processes)
            for process in processes:
                process.join(5)
        except queue.Empty:
            return Finding(backend, FAIL, f"{size} processes did not sum a number in {seconds:.0f} s", cure)
        finally:
            for process in processes:
                process.kill()
    if wrong := [str(answer) for answer in answers.values() if answer != size * (size + 1) / 2]:
        return Finding(backend, FAIL, wrong[0].splitlines()[0], cure)
    return Finding(backend, OK, f"{size} processes summed numbers")


def shared_memory(folder: str = "/dev/shm") -> Finding:
    """Where processes of one machine exchange tensors."""
    try:
        free = os.statvfs(folder)
    except OSError:
        return Finding("shared memory", WARN, f"there is no {folder}", "mount it, NCCL and gloo want it")
    size = free.f_frsize * free.f_bavail
    if size < _SHARED_MEMORY:
        cure = "docker: --shm-size=8g or --ipc=host; Kubernetes: an emptyDir with medium: Memory at /dev/shm"
        return Finding("shared memory", WARN, f"{size / 2**20:.0f} MiB free in {folder}, NCCL may stop for want", cure)
    return Finding("shared memory", OK, f"{size / 2**30:.1f} GiB free in {folder}")


def open_files() -> Finding:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        cure = f"ulimit -n {_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, 16 * _OPEN_FILES)}"
        return Finding("open files", WARN, f"at most {soft} a process; many shards or readers need more", cure)
    return Finding("open files", OK, "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft} a process")


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def writable(name: str, folder: Path, otherwise: str, cure: str) -> Finding:
    """Whether a folder can be written, now or once it is made, `otherwise` if not; nothing is left there."""
    there = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return Finding(name, otherwise, f"{folder} cannot be written: {error}", cure)
    state = "exists" if there == folder.expanduser().absolute() else "will be made"
    return Finding(name, OK, f"{folder} {state} and can be written")


def cache() -> Finding:
    """Where fetched teachers and demo images, and the listings of shards, are kept."""
    return writable("cache", cache_dir(), WARN, "set DUNE_FAST_CACHE to another folder, or change its rights")


def checks() -> list[tuple[str, Check]]:
    """All of the above, the quick ones first."""
    listed: list[tuple[str, Check]] = [
        ("python", python),
        ("packages", packages),
        ("gpu", lambda: list(gpu())),
        ("driver", driver),
        ("shared memory", shared_memory),
        ("open files", open_files),
        ("cache", cache),
        ("triton", triton),
        ("attention", attention),
        ("dali", dali),
        ("gloo", lambda: collectives("gloo", 2)),
    ]
    if torch.cuda.is_available():
        listed.append(("nccl", lambda: collectives("nccl", torch.cuda.device_count())))
    return listed
