"""Statistics out of files: measured, written, read, applied in bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dune_fast.distill.stored_statistics import FeatureMoments, bf16_standardized, read_statistics, write_statistics


def measured(batches):
    sums = FeatureMoments()
    for batch in batches:
        sums.add(batch)
    return sums.finish()


def test_moments_do_not_depend_on_the_batches():
    torch.manual_seed(0)
    x = torch.randn(30, 9, 5, dtype=torch.float64) * torch.tensor([1e-3, 1, 5, 1, 1]) + torch.tensor([9, 0, 1e3, 0, -1])
    mean, std = measured(x.float().split([1, 20, 9]))
    torch.testing.assert_close(mean, x.flatten(0, 1).mean(0).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std, x.flatten(0, 1).std(0).float(), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="there were 1"):
        measured([torch.randn(1, 3)])


def test_bf16_rounds_after_every_operation():
    x, mean, std = torch.randn(50, 7), torch.randn(7), torch.rand(7) + 0.5
    step = np.vectorize(lambda v: float(torch.tensor(v).bfloat16()))  # exact float64, rounded once
    exact = step(step(step(x.numpy()) - step(mean.numpy())) / step(std.numpy()))
    ours = bf16_standardized(x, mean, std)
    assert ours.dtype == torch.float32
    assert np.array_equal(ours.numpy(), exact.astype(np.float32))
    assert not torch.equal(ours, ((x - mean) / std).bfloat16().float())


def test_own_and_published_files(tmp_path):
    a, b = (torch.randn(4), torch.rand(4) + 0.1), (torch.randn(6), torch.rand(6) + 0.1)
    write_statistics(tmp_path / "own.safetensors", {"a": {"patch": a}})
    paths = [str(tmp_path / f"imagenet_{part}_b.npy") for part in ("mean", "var")]
    for path, x in zip(paths, b, strict=True):
        np.save(path, x.numpy().astype(np.float64))
    own, teachers = str(tmp_path / "own.safetensors"), {"a": (4, ["patch"]), "b": (6, ["cls", "patch"])}
    found = read_statistics(own, {"b": paths}, teachers)
    for name, token, pair in (("a", "patch", a), ("b", "cls", b), ("b", "patch", b)):
        assert all(torch.equal(x, y) for x, y in zip(found[name][token], pair, strict=True))
    with pytest.raises(ValueError, match="a/cls/mean"):
        read_statistics(own, {}, {"a": (4, ["cls"])})
    with pytest.raises(ValueError, match="5 channels"):
        read_statistics(own, {}, {"a": (5, ["patch"])})
    with pytest.raises(ValueError, match="cannot be read"):
        read_statistics("", {"b": [own, own]}, {"b": (6, ["patch"])})
    (tmp_path / "empty.npy").touch()
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, a=np.ones(6))
    for name in ("empty.npy", "archive.npy"):
        with pytest.raises(ValueError, match=f"{name}, which cannot be read"):
            read_statistics("", {"b": [paths[0], str(tmp_path / name)]}, {"b": (6, ["patch"])})
    with pytest.raises(ValueError, match="measure it with `dune-fast cache statistics"):
        read_statistics(str(tmp_path / "missing"), {}, {"a": (4, ["patch"])})
    write_statistics(tmp_path / "own.safetensors", {"a": {"patch": (a[0], torch.zeros(4))}})
    with pytest.raises(ValueError, match="0 or negative"):
        read_statistics(own, {}, {"a": (4, ["patch"])})
