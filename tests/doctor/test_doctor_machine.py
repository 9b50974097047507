"""Every check of the machine, sound and under a simulated fault."""

from __future__ import annotations

import io
import os
import types

import pytest
import torch

import dune_fast.kernels.attention  # noqa: F401
import dune_fast.kernels.moments  # noqa: F401
from dune_fast import kernels
from dune_fast.dali_pipelines import pipeline
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.doctor import FAIL, OK, WARN, Finding, examine, machine

NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="simulates a machine without a GPU")


def statuses(findings) -> list[str]:
    return [finding.status for finding in findings]


def pretend_gpu(monkeypatch, name: str = "NVIDIA H100 80GB HBM3", capability=(9, 0), count: int = 1) -> None:
    device = types.SimpleNamespace(name=name, total_memory=80 * 2**30, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: device)


def test_this_machine_passes_its_own_checks():
    for name, check in machine.checks():
        if name not in ("gloo", "gpu", "packages", "shared memory", "open files"):
            assert statuses(examine([(name, check)])) == [OK], name


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "new"))
    assert machine.cache().status == OK and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "file"))
    assert machine.cache().status == WARN and "DUNE_FAST_CACHE" in machine.cache().cure


@pytest.mark.parametrize(("version", "status"), [((3, 10, 1), FAIL), ((3, 11, 0), OK), ((3, 13, 0), FAIL)])
def test_python(version, status, monkeypatch):
    monkeypatch.setattr(machine.sys, "version_info", version)
    assert machine.python().status == status


@NEEDS_NO_GPU
def test_a_gpu_that_torch_cannot_use_is_a_failure_and_none_a_warning(monkeypatch):
    monkeypatch.setattr(machine, "has_nvidia_device", lambda: False)
    assert statuses(machine.gpu()) == [WARN]
    monkeypatch.setattr(machine, "has_nvidia_device", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = machine.gpu()
    assert finding.status == FAIL and "without CUDA" in finding.text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (finding,) = machine.gpu()
    assert finding.status == FAIL and "CUDA_VISIBLE_DEVICES" in finding.cure


def test_devices_are_named_and_old_or_mixed_ones_warned_of(monkeypatch):
    pretend_gpu(monkeypatch)
    (finding,) = machine.gpu()
    assert finding == Finding("gpu", OK, "0: NVIDIA H100 80GB HBM3, 80 GiB, sm_90")
    pretend_gpu(monkeypatch, "Tesla V100", (7, 0))
    (finding,) = machine.gpu()
    assert finding.status == WARN and "fp32" in finding.cure
    pretend_gpu(monkeypatch, "NVIDIA Something New", (12, 0))
    (finding,) = machine.gpu()
    assert finding.status == OK and "no MFU" in finding.text
    pretend_gpu(monkeypatch, count=2)
    devices = [types.SimpleNamespace(name=n, total_memory=2**35, major=9, minor=0) for n in ("H100", "H200")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: devices[i])
    assert statuses(machine.gpu()) == [OK, OK, WARN]


@pytest.mark.parametrize(
    ("found", "cuda", "device", "status"),
    [
        ("580.82.07", "13.0", True, OK),
        ("570.133.20", "13.0", True, FAIL),
        ("570.133.20", "12.8", True, OK),
        ("515.1", "12.8", True, FAIL),
        (None, "13.0", True, WARN),
        (None, "13.0", False, OK),
    ],
)
def test_driver(found, cuda, device, status, monkeypatch):
    monkeypatch.setattr(machine, "driver_version", lambda: found)
    monkeypatch.setattr(machine, "has_nvidia_device", lambda: device)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert machine.driver().status == status


def test_packages_of_other_versions_are_named(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"# tested\ntorch=={torch.__version__.partition('+')[0]}\nno-such-package==1.0\n")
    finding = machine.packages(constraints)
    assert finding.status == OK and "no-such-package" in finding.text
    constraints.write_text("torch==1.0.0\nnumpy==1.0\n")
    finding = machine.packages(constraints)
    assert finding.status == WARN and "tested: 1.0.0" in finding.text and "numpy" in finding.text


@NEEDS_NO_GPU
def test_a_triton_kernel_that_is_wrong_or_missing_on_a_gpu_is_a_failure(monkeypatch):
    pretend_gpu(monkeypatch)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, device, **kwargs: arange(*args, **kwargs))
    assert machine.triton().status == OK
    right = kernels.moments.moments
    monkeypatch.setattr(kernels.moments, "moments", lambda x: tuple(m * 1.001 for m in right(x)))
    finding = machine.triton()
    assert finding.status == FAIL and "wrong by" in finding.text
    monkeypatch.setitem(machine.sys.modules, "triton", None)
    assert machine.triton().status == FAIL


def test_attention_that_is_wrong_is_a_failure(monkeypatch):
    right = kernels.attention.attention
    monkeypatch.setattr(
        kernels.attention, "attention", lambda qkv, backend="auto": right(qkv, backend) * (1 + (backend == "auto"))
    )
    finding = machine.attention()
    assert finding.status == FAIL and "wrong by" in finding.text


def test_dali_that_is_missing_or_decodes_wrong_is_a_failure(monkeypatch):
    receive = pipeline.Decoder.receive

    def darker(self):
        images, event = receive(self)
        return images // 2, event

    monkeypatch.setattr(pipeline.Decoder, "receive", darker)
    assert machine.dali().status == FAIL

    def broken(self):
        raise pipeline.DecodeError("nvJPEG: no such function\nlong trace")

    monkeypatch.setattr(pipeline.Decoder, "receive", broken)
    finding = machine.dali()
    assert finding.status == FAIL and "nvJPEG" in finding.text and "trace" not in finding.text

    def missing():
        raise DataError("DALI cannot be imported (no module); install it with: pip install nvidia-dali-cuda130")

    monkeypatch.setattr(pipeline, "import_dali", missing)
    finding = machine.dali()
    assert finding.status == FAIL and finding.cure.startswith("install it with")


def test_a_jpeg_is_built_in():
    from PIL import Image

    with Image.open(io.BytesIO(machine._jpeg((1, 2, 3)))) as image:
        assert image.format == "JPEG" and image.size == (32, 32)


def test_two_processes_sum_over_gloo_and_a_group_that_does_not_meet_is_a_failure():
    assert machine.collectives("gloo", 2) == Finding("gloo", OK, "2 processes summed numbers")
    finding = machine.collectives("gloo", 2, seconds=0.01)
    assert finding.status == FAIL and "did not sum" in finding.text


def test_a_backend_that_cannot_start_says_why():
    finding = machine.collectives("no-such-backend", 1)
    assert finding.status == FAIL and "no-such-backend" in finding.text


@pytest.mark.parametrize(("free", "status"), [(64 * 2**20, WARN), (2**33, OK)])
def test_shared_memory(free, status, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda folder: types.SimpleNamespace(f_frsize=4096, f_bavail=free // 4096))
    finding = machine.shared_memory()
    assert finding.status == status and (status == OK or "--shm-size" in finding.cure)


def test_shared_memory_that_is_not_mounted(tmp_path):
    assert machine.shared_memory(str(tmp_path / "none")).status == WARN


@pytest.mark.parametrize(
    ("limits", "status", "cure"),
    [((1024, 524288), WARN, "ulimit -n 65536"), ((65536, 65536), OK, ""), ((-1, -1), OK, "")],
)
def test_open_files(limits, status, cure, monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: limits)
    finding = machine.open_files()
    assert (finding.status, finding.cure) == (status, cure)


def test_a_check_that_breaks_down_is_a_failure_and_the_others_go_on():
    def broken():
        raise RuntimeError("undefined symbol: cublasLt\nmore")

    found = list(examine([("one", broken), ("two", lambda: [Finding("two", OK, "fine")] * 2)]))
    assert statuses(found) == [FAIL, OK, OK] and found[0].text == "undefined symbol: cublasLt"
