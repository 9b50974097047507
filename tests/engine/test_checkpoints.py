"""The container of checkpoints: checksums, atomic and asynchronous saves, fallback, pruning."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dune_fast.engine import checkpoints
from dune_fast.engine.checkpoints import write_tensors
from dune_fast.teachers.run_files import CheckpointError, Manifest, Piece, Reader, find_fault, newest_good
from tests.engine.conftest import build, full_disk, same_weights, train


def test_the_file_is_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5), "empty": torch.zeros(0), "scalar": torch.tensor(7), "flag": torch.tensor([True, False]),
        "half": torch.randn(4).bfloat16(), "double": torch.randn(2, 1, 3).double(),
    }  # fmt: skip
    info = write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], x) and found[k].dtype == x.dtype for k, x in tensors.items())
    assert info.bytes == (tmp_path / "x.safetensors").stat().st_size


def test_a_reader_joins_the_pieces_of_other_ranks(tmp_path):
    whole = torch.arange(10.0)
    for rank, (start, end) in enumerate(((0, 3), (3, 4), (4, 10))):
        write_tensors(tmp_path / f"r{rank}", {"weight/p": whole[start:end].clone()})
    pieces = {"p": [Piece("r0", 0, 3), Piece("r1", 3, 1), Piece("r2", 4, 6)]}
    manifest = Manifest(1, 1, 3, 1, "", {}, {"p": [10]}, pieces=pieces)
    reader = Reader(tmp_path, manifest)
    for start in range(10):
        for numel in range(1, 11 - start):
            assert torch.equal(reader.read("weight", "p", start, numel), whole[start : start + numel])
    with pytest.raises(CheckpointError, match="10 of 11 elements of weight/p"):
        reader.read("weight", "p", 0, 11)


def test_a_checkpoint_is_small_and_explicit(finished):
    folder = finished / "checkpoints" / "step_0000006"
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "rank_00000.safetensors", "state.safetensors"}
    assert (folder.parent / "latest").read_text() == "step_0000006\n"
    manifest = Manifest.read(folder)
    assert (manifest.step, manifest.updates, manifest.world_size, manifest.zero_stage) == (6, 6, 1, 0)
    assert len(manifest.config_hash) == 64 and manifest.config["train"]["global_batch"] == 8
    assert all(sum(p.numel for p in manifest.pieces[n]) == torch.Size(s).numel() for n, s in manifest.shapes.items())
    held = load_file(folder / "rank_00000.safetensors")
    assert held.keys() == {f"{kind}/{n}" for n in manifest.shapes for kind in ("weight", "exp_avg", "exp_avg_sq")}
    exported = load_file(finished / "student.safetensors")
    for name in manifest.shapes:
        assert torch.equal(held[f"weight/{name}"], exported[name].flatten())
    small = load_file(folder / "state.safetensors")
    assert torch.equal(small["statistics/one.normalizers.cls.mean"], exported["teacher_norms.one.normalizers.cls.mean"])
    assert "student/encoder.norm.weight" in small


def damage(folder: Path, how: str) -> None:
    path = folder / ("rank_00000.safetensors" if how in ("checksum", "truncated", "missing") else "manifest.json")
    content = path.read_bytes()
    if how in ("missing", "no manifest"):
        path.unlink()
    elif how == "checksum":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif how == "digit":
        path.write_bytes(content.replace(b'"updates": 6', b'"updates": 7'))
    else:
        path.write_bytes(content[:-1] if how == "truncated" else content[:200])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("checksum", "the checksum of rank_00000.safetensors does not match"),
        ("truncated", "rank_00000.safetensors has .* bytes instead of"),
        ("missing", "rank_00000.safetensors is missing"),
        ("no manifest", "manifest.json is missing"),
        ("manifest", "manifest.json is damaged"),
        ("digit", r"manifest.json is damaged \(its checksum does not match\)"),
    ],
)
def test_every_damage_is_found_and_named(finished, how, words, caplog):
    damage(finished / "checkpoints" / "step_0000006", how)
    with caplog.at_level(logging.WARNING):
        assert newest_good(finished) == 3
    assert re.search(f"step_0000006 is broken .*{words}", caplog.text)


def test_a_run_goes_on_from_the_one_before_a_broken_one_to_the_same_weights(overrides, finished, trained_run):
    damage(finished / "checkpoints" / "step_0000006", "checksum")
    trainer = build(overrides)
    assert trainer.step == 3
    trainer.run()
    assert not find_fault(finished / "checkpoints" / "step_0000006") and same_weights(finished, trained_run)


def test_a_run_with_broken_checkpoints_alone_is_not_started_anew_unasked(overrides, finished):
    for step in (3, 6):
        damage(finished / "checkpoints" / checkpoints.tag(step), "missing")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .*step_0000003.*train.overwrite=true"):
        build(overrides)


@pytest.mark.parametrize("at", ["write_tensors", "write_whole"])
def test_what_a_kill_cuts_short_is_not_taken_for_a_checkpoint(overrides, tmp_path, monkeypatch, at):
    """The process ends inside a save: at the data, at the record, at the manifest."""
    plain, calls = getattr(checkpoints, at), []

    def killed(path, *arguments):
        calls.append(path)
        if "step_0000006" in str(path):
            raise SystemExit("killed")
        return plain(path, *arguments)

    monkeypatch.setattr(checkpoints, at, killed)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    train(overrides)
    folder = tmp_path / "run" / "checkpoints"
    assert calls and (folder / "step_0000006.part").is_dir() and checkpoints.complete_steps(tmp_path / "run") == [3]
    monkeypatch.undo()
    assert build(overrides).step == 3 and not (folder / "step_0000006.part").exists()


def test_a_full_disk_is_warned_of_and_the_next_save_tries_again(overrides, tmp_path, monkeypatch, caplog):
    plain = checkpoints.write_tensors

    def full(path, tensors, metadata=None):
        if "step_0000004" in str(path):
            raise OSError(28, "No space left on device")
        return plain(path, tensors, metadata)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with caplog.at_level(logging.WARNING):
        train(overrides, "train.checkpoint_every=2", "train.keep_checkpoints=9")
    assert "step 4 could not be saved (OSError: [Errno 28] No space left on device)" in caplog.text
    assert checkpoints.complete_steps(tmp_path / "run") == [2, 6]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.part"))


def test_a_failed_last_save_is_an_error(overrides, tmp_path, monkeypatch):
    def full(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(CheckpointError, match="could not be saved .*No space left.* there is no checkpoint yet"):
        train(overrides)


def test_a_step_does_not_wait_for_the_disk(overrides, monkeypatch):
    """The training thread goes on while the disk is busy, and the copy that is written does not change under it."""
    gate, plain = threading.Event(), checkpoints.write_tensors
    monkeypatch.setattr(checkpoints, "write_tensors", lambda *arguments: (gate.wait(30), plain(*arguments))[1])
    trainer = build(overrides, "logging.conflicts=false")
    batches = trainer.task.loader.batches(0)
    trainer.train_step(next(batches))
    then = {name: p.detach().clone() for name, p in trainer.engine.module.named_parameters()}
    trainer._save()
    trainer.train_step(next(batches))
    assert not gate.is_set()
    gate.set()
    assert trainer.saver.wait()
    trainer.task.loader.close()
    held = load_file(trainer.run_dir / "checkpoints" / "step_0000001" / "rank_00000.safetensors")
    for name in trainer.engine.shapes:
        assert torch.equal(held[f"weight/{name}"], then[name].flatten())


def test_the_last_ones_and_every_nth_are_kept_and_what_is_later_than_the_newest_is_not(tmp_path):
    """What is later is broken: the run went back from 12 to 9, and has saved 10."""
    folder = tmp_path / "checkpoints"
    for name in (*map(checkpoints.tag, range(1, 13)), "step_0000007.part", "step_0000011.part"):
        (folder / name).mkdir(parents=True)
    checkpoints.prune(tmp_path, 10, keep=2, keep_every=4)
    assert checkpoints.complete_steps(tmp_path) == [4, 8, 9, 10]
    assert [p.name for p in folder.glob("*.part")] == ["step_0000011.part"]


def test_a_disk_that_is_full_at_the_end_costs_nothing(overrides, finished, monkeypatch):
    """The weights cannot be exported: an error of the system, nothing half written, and the next start does it."""
    (finished / "student.safetensors").unlink()
    trainer = build(overrides)
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        trainer.run()
    assert not list(finished.glob(".*.part")) and not (finished / "student.safetensors").exists()
    train(overrides)
    assert (finished / "student.safetensors").exists()
