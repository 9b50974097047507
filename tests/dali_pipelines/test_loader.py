"""The loader: ranks, restarts, broken images, validation."""

import dataclasses
import errno
import io
import itertools
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")

from dali_pipelines.augmentation import Geometry, colour_params, draw_words  # noqa: E402
from dali_pipelines.datasets import DataConfig, DataError, DatasetConfig  # noqa: E402
from dali_pipelines.loader import TrainLoader, ValLoader  # noqa: E402
from dali_pipelines.pipeline import Decoder  # noqa: E402
from dali_pipelines.storage import Reader  # noqa: E402
from kernels.augment import ColourParams, augment_colour  # noqa: E402

CPU = torch.device("cpu")


def config(*roots, **options) -> DataConfig:
    holdout = options.pop("holdout", 0)
    datasets = {f"d{i}": DatasetConfig(root=str(root), group=f"g{i}", holdout=holdout) for i, root in enumerate(roots)}
    return DataConfig(datasets=datasets, num_threads=2, **options)


def take(data: DataConfig, steps: int, start: int = 0, batch: int = 8, rank: int = 0, world: int = 1, seed: int = 0):
    with TrainLoader(data, 32, batch, rank, world, seed, CPU) as loader:
        batches = loader.batches(start)
        return [next(batches) for _ in range(steps)]


@pytest.fixture
def two_folders(tmp_path, write_folder):
    return write_folder(tmp_path / "a", 11), write_folder(tmp_path / "b", 6, first_seed=50)


def test_batch_has_the_documented_fields(two_folders):
    batch = take(config(*two_folders), 1)[0]
    assert batch.images.shape == (8, 3, 32, 32) and batch.images.dtype == torch.float32 and batch.images.is_contiguous()
    assert batch.positions.tolist() == list(range(8)) and batch.step == 0 and len(batch) == 8
    for index, path in zip(batch.dataset.tolist(), batch.paths, strict=True):
        assert path.startswith(str(two_folders[index]))
    assert batch.group.tolist() == batch.dataset.tolist() and sorted(batch.group.tolist()) == [0] * 4 + [1] * 4
    assert torch.isfinite(batch.images).all() and float(batch.images.std()) > 0.1


def stream(data: DataConfig, start: int, steps: int, world: int) -> list[dict[str, object]]:
    """What all ranks together do in every step: who sees what, how it is cut and coloured, and the images' bits."""
    ranks = []
    for rank in range(world):
        with TrainLoader(data, 32, 12, rank, world, 0, CPU) as loader:
            batches = list(itertools.islice(loader.batches(start), steps))
            ranks.append([(batch, loader._plan(batch.step)) for batch in batches])
    found = []
    for parts in zip(*ranks, strict=True):
        step: dict[str, object] = {"paths": [path for batch, _ in parts for path in batch.paths]}
        step["step"] = {batch.step for batch, _ in parts}
        for name in ("images", "positions", "group", "dataset"):
            step[name] = torch.cat([getattr(batch, name) for batch, _ in parts])
        for name in (field.name for field in dataclasses.fields(Geometry)):
            step[name] = torch.from_numpy(np.concatenate([getattr(plan.geometry, name) for _, plan in parts]))
        for name in (field.name for field in dataclasses.fields(ColourParams)):
            step[name] = torch.cat([getattr(plan.colour, name) for _, plan in parts])
        found.append(step)
    return found


def assert_same_bits(found: list[dict[str, object]], expected: list[dict[str, object]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            same = torch.equal(values, other[name]) if isinstance(values, torch.Tensor) else values == other[name]
            assert same, (one["step"], name)


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_stream_is_the_same_to_the_bit_on_any_number_of_ranks_and_after_a_resume(kind, request):
    """One process without a break, against 1, 2 and 3 ranks that stop after two steps and go on as 3, 1 and 2."""
    roots = request.getfixturevalue("two_folders") if kind == "files" else [request.getfixturevalue("sharded")]
    data = config(*roots)
    whole = stream(data, 0, 4, 1)
    assert [step["step"] for step in whole] == [{0}, {1}, {2}, {3}] and whole[0]["images"].shape == (12, 3, 32, 32)
    assert all((".tar@" in path) == (kind == "shards") for step in whole for path in step["paths"])
    assert not torch.equal(whole[0]["brightness"], whole[1]["brightness"])
    for before, after in ((1, 3), (2, 1), (3, 2)):
        assert_same_bits(stream(data, 0, 2, before) + stream(data, 2, 2, after), whole)
    other = take(data, 1, batch=12, seed=1)[0]
    assert not torch.equal(other.images, whole[0]["images"])


def test_batch_is_decoded_pixels_through_the_colour_augmentation(tmp_path, photo):
    """With crops switched off the batch can be made by hand from the file."""
    photo(0, 32, 32).save(tmp_path / "only.png")
    data = config(tmp_path, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip_probability=0.0)
    batch = take(data, 1, start=3, batch=4)[0]
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "only.png")))[None].expand(4, -1, -1, -1)
    params = colour_params(draw_words(0, np.arange(12, 16)), data)
    torch.testing.assert_close(batch.images, augment_colour(pixels, params), atol=1e-5, rtol=0)


def damage(path, how: str) -> None:
    """Ways in which files are broken; the last three pass a look at the header and kill DALI's pipeline."""
    data = path.read_bytes()
    if how == "vanished":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "forbidden":
        path.chmod(0)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_bytes(b"<html>404 Not Found</html>")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "truncated with a thumbnail":  # which has an end marker of its own
        path.write_bytes(data[:2] + b"\xff\xfe\x00\x06..\xff\xd9" + data[2 : len(data) // 2])
    elif how == "GIF":
        Image.open(path).save(path, "GIF")
    elif how == "half a PNG":
        Image.open(path).save(path, "PNG")
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])


def refuse_to_open(path: str, monkeypatch) -> None:
    """What the system says to a user who may not read a file."""
    real = open

    def refuse(file, *arguments, **options):
        if str(file) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)


@pytest.mark.parametrize(
    "how, reason",
    [
        ("vanished", "No such file"),
        ("a folder", "Is a directory"),
        ("forbidden", "Permission denied"),
        ("empty", "the file is empty"),
        ("text", "no known image format"),
        ("truncated", "ends too early"),
        ("truncated with a thumbnail", "truncated"),
        ("GIF", "DALI cannot decode"),
        ("half a PNG", "truncated"),
    ],
)
def test_broken_image_is_replaced_and_named_and_changes_nothing_else(photos, how, reason, caplog, monkeypatch):
    data = config(photos)
    with TrainLoader(data, 32, 4, 0, 1, 0, CPU) as loader:  # indexed while all was well
        clean = take(data, 4, batch=4)
        victim = clean[1].paths[3]
        damage(Path(victim), how)
        if how == "forbidden" and os.access(victim, os.R_OK):  # permissions do not bind root
            refuse_to_open(victim, monkeypatch)
        with caplog.at_level(logging.WARNING):
            batches = loader.batches(0)
            found = [next(batches) for _ in range(4)]
        warnings = [record.getMessage() for record in caplog.records if victim in record.getMessage()]
        assert loader.broken == {"d0": 1} and loader.broken_paths == [victim]
        # found again from nothing, in the middle: the same replacement
        with TrainLoader(data, 32, 4, 0, 1, 0, CPU, datasets=loader.datasets) as again:
            resumed = next(again.batches(1))
    assert len(warnings) == 1 and "dataset d0: broken image" in warnings[0] and reason in warnings[0]
    for before, after in zip(clean, found, strict=True):
        assert len(after) == 4 and victim not in after.paths
        for i, path in enumerate(before.paths):
            if path != victim:
                assert after.paths[i] == path
                torch.testing.assert_close(after.images[i], before.images[i], atol=1e-6, rtol=0)
    assert resumed.paths == found[1].paths
    torch.testing.assert_close(resumed.images, found[1].images, atol=1e-6, rtol=0)


def test_shards_bring_their_own_validation_images_and_show_each_image_once_a_pass(sharded):
    assert len({path for batch in take(config(sharded), 2) for path in batch.paths}) == 16
    with ValLoader(config(sharded), 32, 3, 0, 1, CPU) as loader:
        assert loader.num_images == 4 and sum(len(batch) for batch in loader) == 4


def test_sizes_that_the_index_knows_are_not_kept_a_second_time(sharded):
    """8 bytes an image would be 0.17 GB in every process for DUNE's; of other files they are kept."""
    with TrainLoader(config(sharded), 32, 8, 0, 1, 0, CPU) as loader:
        train = loader.datasets[0].train
        for i in range(len(train)):
            data, size = loader._source.read(0, i)
            assert size == train.size(i) == Image.open(io.BytesIO(data)).size
        assert not loader._source._sizes[0].any()


def test_image_in_a_shard_is_the_image_of_the_file(sharded, photos):
    """The same bytes, decoded the same way, whatever they came from; without crops, since the places differ."""
    still = {"crop_scale": [1.0, 1.0], "flip_probability": 0.0, "jitter_probability": 0.0, "blur_probability": 0.0}
    still |= {"grayscale_probability": 0.0, "solarize_probability": 0.0, "crop_ratio": [1.0, 1.0]}
    loose = {tuple(image.flatten().tolist()) for batch in take(config(photos, **still), 3) for image in batch.images}
    shards = {tuple(image.flatten().tolist()) for batch in take(config(sharded, **still), 3) for image in batch.images}
    assert len(shards) == 20 and shards < loose


@pytest.mark.parametrize("how", ["a byte", "the end"])
def test_damaged_shard_costs_its_images_alone(sharded, how):
    """A flipped byte would decode to a slightly wrong picture: only the checksum tells."""
    data = config(sharded, max_broken_share=0.9)
    clean = take(data, 4)
    with TrainLoader(data, 32, 8, 0, 1, 0, CPU) as loader:  # opened while all was well
        victim = clean[1].paths[3]
        shard, _, offset = victim.rpartition("@")
        with open(shard, "r+b") as file:
            if how == "a byte":
                file.seek(int(offset) + 700)
                byte = file.read(1)
                file.seek(int(offset) + 700)
                file.write(bytes([byte[0] ^ 1]))
            else:
                file.truncate(int(offset) + 700)
        lost = {victim} if how == "a byte" else {
            path for batch in clean for path in batch.paths
            if path.startswith(shard) and int(path.rpartition("@")[2]) >= int(offset)
        }  # fmt: skip
        batches = loader.batches()
        found = [next(batches) for _ in range(4)]
        assert set(loader.broken_paths) == lost and loader.broken == {"d0": len(lost)}
    for before, after in zip(clean, found, strict=True):
        assert len(after) == 8 and not lost & set(after.paths)
        for i, path in enumerate(before.paths):
            if path not in lost:
                assert after.paths[i] == path
                torch.testing.assert_close(after.images[i], before.images[i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["ours", "of another tool"])
def test_shard_that_was_replaced_costs_its_images_alone_and_stops_a_run_with_the_reason(sharded, kind, caplog):
    """An index that does not match its tar: of the same size, so only its images can tell."""
    victim = sharded / "train-000001.tar"
    reason = "the checksum differs" if kind == "ours" else "no known image format"
    if kind == "of another tool":  # whose index is made from the tar's headers, without checksums
        for path in sharded.iterdir():
            if not path.name.startswith("train-0"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    with TrainLoader(config(sharded, max_broken_share=0.9), 32, 8, 0, 1, 0, CPU) as loader:
        train = loader.datasets[0].train
        lost = {path for path in train if path.startswith(str(victim))}
        victim.write_bytes(b"other" * (victim.stat().st_size // 5) + bytes(victim.stat().st_size % 5))
        batches = list(itertools.islice(loader.batches(), 4))
        assert set(loader.broken_paths) == lost and 4 < len(lost) < len(train)
        seen = {path for batch in batches for path in batch.paths}
        assert seen == set(train) - lost and all(len(batch) == 8 for batch in batches)
    warnings = [line for line in (record.getMessage() for record in caplog.records) if "broken image" in line]
    assert len(warnings) == len(lost) and all(reason in line for line in warnings)
    with (
        TrainLoader(config(sharded), 32, 8, 0, 1, 0, CPU, datasets=loader.datasets) as strict,
        pytest.raises(DataError, match=rf"[5-9] of 20 images are broken, 4 are tolerated.*{reason}"),
    ):
        list(itertools.islice(strict.batches(), 4))


@pytest.mark.parametrize("when", ["before the first batch", "in the middle"])
def test_vanished_shard_stops_the_run_with_a_sentence(sharded, when):
    with TrainLoader(config(sharded), 32, 8, 0, 1, 0, CPU) as loader:
        loader._source._reader = Reader(0, open_files=1)  # a shard that is still open could be read to its end
        batches = loader.batches()
        if when == "in the middle":
            assert len(next(batches)) == 8
        (sharded / "train-000001.tar").unlink()
        with pytest.raises(DataError, match=r"shard .*train-000001\.tar cannot be opened any more.*put it back"):
            list(itertools.islice(batches, 12))
        assert loader.broken == {"d0": 0}
    with pytest.raises(DataError, match=r"train-000001\.tar is missing: copy it again"):  # the next start says so
        take(config(sharded), 1)


def test_storage_that_fails_for_a_while_costs_nothing(sharded, monkeypatch):
    expected, pread, failures = take(config(sharded), 3), os.pread, iter(range(5))

    def stale(*arguments):
        if next(failures, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", stale)
    with TrainLoader(config(sharded), 32, 8, 0, 1, 0, CPU) as loader:
        found = list(itertools.islice(loader.batches(), 3))
        assert loader.broken == {"d0": 0}
    assert next(failures, None) is None
    assert [batch.paths for batch in found] == [batch.paths for batch in expected]


def test_read_ahead_changes_nothing(photos):
    damage(sorted(photos.iterdir())[3], "truncated with a thumbnail")
    expected = take(config(photos, read_ahead=1), 5)
    for batch, other in zip(take(config(photos, read_ahead=6), 5), expected, strict=True):
        assert batch.paths == other.paths and torch.equal(batch.images, other.images)


def test_read_ahead_is_bounded_and_overlaps_the_step(photos, monkeypatch):
    """While the caller is busy, files are read until every place is taken; then its batches are there at once."""
    read, seen = Reader(0).read, []
    with TrainLoader(config(photos, read_ahead=5, prefetch=3), 32, 2, 0, 1, 0, CPU) as loader:
        monkeypatch.setattr(loader._source._reader, "read", lambda location: seen.append(1) or read(location))
        batches = loader.batches()
        next(batches)
        # one was taken, three are ready, one waits for a place, two are in DALI, five are read
        expected, deadline = 2 * (1 + 3 + 1 + 2 + 5), time.monotonic() + 30
        while len(seen) < expected and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert len(seen) == expected
        before = loader.waited_s
        assert before > 0
        for _ in range(3):
            next(batches)
        assert loader.waited_s - before < 0.1


def test_run_that_goes_on_knows_what_was_broken(photos, tmp_path, monkeypatch):
    """On other ranks as well: the same batches, and DALI does not have to fail again."""
    with TrainLoader(config(photos), 32, 8, 0, 1, 0, CPU, folder=tmp_path / "run") as loader:
        for path in sorted(photos.iterdir())[:2]:
            damage(path, "truncated with a thumbnail")
        expected = list(itertools.islice(loader.batches(), 4))
        assert loader.broken == {"d0": 2}
    monkeypatch.setattr(Decoder, "find_broken", lambda *_: pytest.fail("a known image was decoded"))
    for rank in range(2):
        with TrainLoader(config(photos), 32, 8, rank, 2, 0, CPU, folder=tmp_path / "run") as again:
            assert again.broken == {"d0": 2}
            for batch, whole in zip(itertools.islice(again.batches(), 4), expected, strict=True):
                assert batch.paths == whole.paths[4 * rank : 4 * rank + 4]


def test_too_many_broken_images_stop_the_run_with_a_sentence(photos):
    for path in sorted(photos.iterdir())[:6]:
        damage(path, "empty")
    with pytest.raises(
        DataError,
        match=r"dataset 'd0': [56] of 24 images are broken, 4 are tolerated.*the file is empty.*max_broken_share",
    ):
        take(config(photos), 6)
    batches = take(config(photos, max_broken_share=0.25), 6)
    assert all(len(batch) == 8 for batch in batches)


def test_failure_without_a_culprit_is_raised_not_swallowed(photos, monkeypatch):
    damage(sorted(photos.iterdir())[0], "truncated with a thumbnail")
    monkeypatch.setattr(Decoder, "find_broken", lambda self, encoded, geometry: {})
    with pytest.raises(DataError, match="every image in flight can be decoded on its own"):
        take(config(photos), 6)


def test_groups_follow_their_weights_and_repeats(two_folders):
    data = config(*two_folders, group_weights={"g0": 3, "g1": 1})
    assert torch.stack([batch.group for batch in take(data, 2)]).float().mean() == 0.25
    data.datasets["d1"].group, data.group_weights = "g0", {}
    data.datasets["d1"].repeat = 2
    seen = [path for batch in take(data, 1, batch=23) for path in batch.paths]  # one pass: 11 + 2 * 6
    assert {seen.count(path) for path in seen if path.startswith(str(two_folders[1]))} == {2}
    assert len(set(seen)) == 17
    data.group_weights = {"g1": 1.0}
    with pytest.raises(DataError, match=r"names the groups \['g1'\], the datasets have \['g0'\]"):
        take(data, 1)


def test_turned_images_are_turned_back(tmp_path):
    """BEDLAM's close-ups: the left edge of the stored image becomes the top."""
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[:, :30] = 255
    for name in ("plain.png", "closeup.png"):
        Image.fromarray(stored).save(tmp_path / name)
    data = config(tmp_path, holdout=0)
    data.datasets["d0"].val_root, data.datasets["d0"].rotate = str(tmp_path), "*closeup*"
    with ValLoader(data, 16, 2, 0, 1, CPU) as loader:
        batch = next(iter(loader))
    images = dict(zip((path.rsplit("/", 1)[1] for path in batch.paths), batch.images, strict=True))
    assert (images["closeup.png"][:, 0] > 0).all() and (images["closeup.png"][:, -1] < 0).all()
    assert (images["plain.png"][:, :, 0] > 0).all() and (images["plain.png"][:, :, -1] < 0).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_sees_every_image_once_over_all_ranks(two_folders, world):
    data = config(*two_folders, holdout=5)
    seen, positions = [], []
    for rank in range(world):
        with ValLoader(data, 32, 3, rank, world, CPU) as loader:
            batches = list(loader)
            assert len(batches) == len(loader) and all(len(batch) <= 3 for batch in batches) and loader.num_images == 10
            assert [batch.images.shape[0] for batch in batches] == [len(batch) for batch in batches]
        seen += [path for batch in batches for path in batch.paths]
        positions += [p for batch in batches for p in batch.positions.tolist()]
    assert len(seen) == len(set(seen)) == 10 and sorted(positions) == list(range(10))
    trained = {path for batch in take(data, 4) for path in batch.paths}
    assert not trained & set(seen)


def test_validation_leaves_broken_images_out_and_can_run_twice(photos):
    data = config(photos, holdout=7)
    with ValLoader(data, 32, 2, 0, 1, CPU) as loader:
        victims = [batch.paths for batch in loader][1]
        for path, how in zip(victims, ("truncated with a thumbnail", "empty"), strict=True):
            damage(photos / path.rsplit("/", 1)[1], how)
        rest = [path for batch in loader for path in batch.paths]
        assert len(rest) == 5 and not set(rest) & set(victims) and loader.broken == {"d0": 2}
        assert [path for batch in loader for path in batch.paths] == rest


def test_no_validation_images_is_no_error(photos):
    with ValLoader(config(photos), 32, 2, 0, 1, CPU) as loader:
        assert loader.num_images == len(loader) == 0 and list(loader) == []


def test_threads_end_with_the_iterator_and_with_close(photos):
    before = threading.active_count()
    loader = TrainLoader(config(photos), 32, 4, 0, 1, 0, CPU)
    batches = loader.batches()
    next(batches)
    assert loader.waited_s > 0
    batches.close()
    assert not any(thread.name == "decode-images" for thread in threading.enumerate())
    unfinished = loader.batches()
    next(unfinished)
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_process_that_forgets_to_close_ends_without_an_abort(photos):
    """A thread inside DALI at exit: "terminate called without an active exception", and a core dump."""
    code = (
        "import sys, torch\n"
        "from dali_pipelines.datasets import DataConfig, DatasetConfig\n"
        "from dali_pipelines.loader import TrainLoader\n"
        "config = DataConfig(datasets={'d': DatasetConfig(root=sys.argv[1])})\n"
        "batches = TrainLoader(config, 32, 8, 0, 1, 0, torch.device('cpu')).batches()\n"
        "next(batches)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(photos)], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr


def test_wrong_batch_and_size_are_refused(photos):
    with pytest.raises(DataError, match="multiple of 3"):
        TrainLoader(config(photos), 32, 8, 0, 3, 0, CPU)
    with pytest.raises(DataError, match="image size is 4"):
        TrainLoader(config(photos), 4, 8, 0, 1, 0, CPU)


def test_real_photographs_with_shrunk_copies(real_photos, tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, real_photos)))
    data = config(tmp_path / "list.txt")
    data.datasets["d0"].shrink = 256
    batch = take(data, 1, batch=12)[0]
    assert len(set(batch.paths)) == 12 and batch.images.shape == (12, 3, 32, 32)
    assert len(list((tmp_path / "cache" / "shrunk").iterdir())) == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_batches_equal_the_cpus(photos):
    """nvJPEG and the GPU's resize round differently, by a level or two of 255; 1 / std is 4.4."""
    expected = take(config(photos), 3)
    damage(photos / sorted(set(path.rsplit("/", 1)[1] for path in expected[0].paths))[0], "truncated with a thumbnail")
    with TrainLoader(config(photos), 32, 8, 0, 1, 0, torch.device("cuda", 0)) as loader:
        batches = loader.batches()
        for before in expected:
            batch = next(batches)
            same = [i for i, path in enumerate(batch.paths) if path == before.paths[i]]
            assert batch.images.is_cuda and batch.positions.is_cuda and len(same) >= 6
            assert float((batch.images.cpu() - before.images)[same].abs().mean()) < 0.05
