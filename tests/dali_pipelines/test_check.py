"""`dune-fast data check`: counts, expectations, broken images, shards, and datasets that are not there."""

import pytest
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")

from dune_fast import cli  # noqa: E402
from dune_fast.dali_pipelines.check import check_dataset  # noqa: E402
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig  # noqa: E402


def check(root, sample=None, **fields):
    own = DatasetConfig(root=str(root), **fields)
    return check_dataset("d", DataConfig(datasets={"d": own}, num_threads=2), sample)


def test_a_good_dataset_is_ok_and_measured(photos):
    report = check(photos, holdout=4, expected_train=20, expected_val=4)
    assert (report.status, report.train, report.val, report.sampled, report.notes) == ("ok", 20, 4, 24, [])
    sizes = sorted(Image.open(path).copy().size for path in photos.iterdir())
    assert report.smallest == min(min(size) for size in sizes)
    assert report.median[0] == sorted(width for width, _ in sizes)[12]


@pytest.mark.parametrize(
    "expected, status, words",
    [
        ({"expected_train": 25}, "fail", "train: 24 images, 25 expected: 1 missing"),
        ({"expected_train": 20}, "warn", "train: 24 images, 20 expected: 4 more"),
        ({"expected_train": 24, "expected_val": 3}, "fail", "val: 0 images, 3 expected: 3 missing"),
        # a holdout of another size moves images, it loses none
        ({"expected_train": 20, "expected_val": 4, "holdout": 5}, "ok", ""),
        ({"expected_train": 40, "expected_val": 4, "holdout": 5}, "fail", "train and val: 24 images, 44 expected"),
    ],
)
def test_counts_are_compared(photos, expected, status, words):
    report = check(photos, 0, homepage="https://example.org/d", licence="CC BY 4.0", **expected)
    assert report.status == status and report.sampled == 0
    assert words in " ".join(report.notes)
    if status == "fail":
        assert "https://example.org/d (licence: CC BY 4.0)" in report.notes[0]


def test_broken_images_are_named_with_the_reason_and_the_rest_is_decoded(photos):
    paths = sorted(photos.iterdir())
    paths[0].write_bytes(b"")
    paths[5].write_bytes(b"<html>404 Not Found</html>")
    Image.open(paths[7]).save(paths[7], "PNG")
    paths[7].write_bytes(paths[7].read_bytes()[:2000])  # only decoding shows it
    report = check(photos)
    assert report.sampled == 24 and report.status == "fail"
    broken = dict(report.broken)
    assert set(broken) == {str(paths[i]) for i in (0, 5, 7)}
    assert "empty" in broken[str(paths[0])] and "truncated" in broken[str(paths[7])]
    assert "3 of 24 sampled images are broken (12.5%)" in report.notes[0]


def test_the_sample_is_the_same_each_time_and_another_with_another_seed(photos):
    for path in photos.iterdir():
        path.write_bytes(b"")
    config = DataConfig(datasets={"d": DatasetConfig(root=str(photos))}, num_threads=2)
    drawn = [[path for path, _ in check_dataset("d", config, 6, seed=seed).broken] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 6


def test_a_missing_dataset_hides_no_other_and_says_where_to_ask(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DUNE_FAST_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    own = {"root": photos, "val_root": "''", "expected_train": 24, "expected_val": 0}
    overrides = ["data=dune", *(f"data.datasets.agora.{key}={value}" for key, value in own.items())]
    assert cli.main(["data", "check", *overrides, "--only", "bedlam", "agora", "cuffs", "--sample", "3"]) == 1
    out = capsys.readouterr().out
    assert "neither a folder nor a text file" in out and "https://bedlam.is.tue.mpg.de" in out
    assert "DUNE_FAST_DATA names: set it" in out
    lines = [line.split() for line in out.splitlines()[1:4]]
    assert {line[0]: line[2] for line in lines} == {"bedlam": "fail", "agora": "ok", "cuffs": "fail"}
    assert cli.main(["data", "check", *overrides, "--only", "agora", "--sample", "3"]) == 0
    assert cli.main(["data", "check", *overrides, "--only", "ours"]) == 2
    capsys.readouterr()
    assert cli.main(["data", "check", "data=folder", f"data.datasets.images.root={tmp_path}/no"]) == 1
    assert "DUNE_FAST_DATA" not in capsys.readouterr().out


def test_shards_are_checked_and_damage_is_found_with_full(photos, tmp_path):
    from dune_fast.dali_pipelines.sharding import ShardSettings, shard_dataset

    (photos / "photo_003.jpg").write_bytes(b"")
    config = DataConfig(datasets={"d": DatasetConfig(root=str(photos))}, num_threads=2)
    settings = ShardSettings(megabytes=500, shorter_side=0, seed=0, turned_canvas="enlarge")
    shard_dataset("d", config, tmp_path / "shards", settings, 1)
    report = check(tmp_path / "shards", expected_train=24)
    assert report.train == report.sampled == 23 and not report.broken
    assert "1 broken images of the source are in no shard" in " ".join(report.notes)

    shard = next((tmp_path / "shards").glob("train-*.tar"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # the padding at the end: no image notices
    shard.write_bytes(data)
    config.datasets["d"].root = str(tmp_path / "shards")
    assert check_dataset("d", config, 0).status == "warn"
    full = check_dataset("d", config, 0, full=True)
    assert full.status == "fail" and "SHA-256" in " ".join(full.notes)
    shard.unlink()
    gone = check_dataset("d", config)
    assert gone.status == "fail" and "is missing" in gone.notes[0]


def test_list_keys_writes_a_list_that_a_dataset_reads(photos, tmp_path, capsys):
    import pickle

    names = sorted(path.name for path in photos.iterdir())
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps({name: {"box": [1, 2]} for name in reversed(names)}))
    out = tmp_path / "list.txt"
    command = ["data", "list-keys", str(tmp_path / "keys.pkl"), "--prefix", photos.name, "--out", str(out)]
    assert cli.main(command) == 0
    assert out.read_text().splitlines() == [f"{photos.name}/{name}" for name in names]
    assert check(out, expected_train=24).status == "ok"
    assert cli.main([*command[:-1], str(tmp_path / "no folder" / "list.txt")]) == 2
    assert "give --out a file in a folder that is there" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps((str(photos), names)))  # as DUNE's lists; without --prefix
    assert cli.main(["data", "list-keys", str(tmp_path / "keys.pkl"), "--out", str(out)]) == 0
    assert out.read_text().splitlines() == [str(photos / name) for name in names]
    (tmp_path / "keys.pkl").write_bytes(b"no pickle")
    assert cli.main(command) == 2
