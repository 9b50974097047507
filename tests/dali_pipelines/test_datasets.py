"""Finding images: folders, globs, lists, holdouts and the sentences for what goes wrong."""

import errno
import glob
import os

import pytest
from omegaconf import OmegaConf

from dune_fast.dali_pipelines.datasets import DataConfig, DataError, DatasetConfig, index_dataset, index_datasets
from dune_fast.dali_pipelines.listing import PathList, _is


def names(paths) -> list[str]:
    return [os.path.basename(path) for path in paths]


def test_folder_is_searched_recursively_sorted_and_without_hidden_files(tmp_path):
    for name in ("b.JPG", "a/z.png", "a/notes.txt", ".hidden.jpg", ".cache/x.jpg", "c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    dataset = index_dataset("d", DatasetConfig(root=str(tmp_path)))
    assert list(dataset.train) == [str(tmp_path / name) for name in ("a/z.png", "b.JPG", "c.webp")]
    assert len(dataset.val) == 0


def test_patterns_select_and_do_not_count_twice(tmp_path):
    for name in ("train/s1/1.png", "train/s1/2.jpg", "test/3.png", "other/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    config = DatasetConfig(root=str(tmp_path), pattern="train/**/*.png | train/*/*|test/*.png")
    assert names(index_dataset("d", config).train) == ["3.png", "1.png", "2.jpg"]


@pytest.mark.parametrize(
    "pattern",
    ["*", "**", "*/*.jpg", "**/*.jpg", "a/**/*.png", "**/b/*", "**/b/**/*.jpg", "[ab]/?/*", "a//b/1.jpg", "**/**/*"]
    + [".hid/*", "**/.hid/*", "**/.*.jpg", "a/1.jpg", "no/*.jpg", "link/*.jpg", "./a/*.jpg", "a/../a/*.png", "", "/"],
)
def test_patterns_find_what_glob_finds(tmp_path, pattern):
    for folder in ("", "a", "a/b", "a/b/c", "b", ".hid", "a/.hid"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("1.jpg", "2.png", ".3.jpg"):
            (tmp_path / folder / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    found = glob.iglob(pattern, root_dir=tmp_path, recursive=True)
    expected = sorted({os.path.normpath(path) for path in found if os.path.isfile(tmp_path / path)})
    config = DatasetConfig(root=str(tmp_path), pattern=f"{pattern}|b/2.png")
    images = index_dataset("d", config).train
    assert [os.path.normpath(images.relative(i)) for i in range(len(images))] == sorted({*expected, "b/2.png"})


@pytest.mark.parametrize("pattern", ["", "**/*.jpg", "*/*|*"])
def test_folder_that_cannot_be_listed_is_not_left_out_without_a_word(photos, monkeypatch, caplog, pattern):
    (photos / "more").mkdir()
    scandir, reason = os.scandir, [errno.ESTALE]

    def refuse(path):
        if str(path).rstrip("/").endswith("more"):
            raise OSError(reason[0], os.strerror(reason[0]), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"/more cannot be listed \(Stale file handle\).*start the same"):
        index_dataset("d", DatasetConfig(root=str(photos), pattern=pattern))
    reason[0] = errno.EACCES  # lost+found, say
    assert len(index_dataset("d", DatasetConfig(root=str(photos), pattern=pattern)).train) == 24
    assert f"{photos}/more may not be listed" in caplog.text


@pytest.mark.parametrize("reason", [errno.EACCES, errno.ESTALE])
def test_an_entry_that_cannot_be_looked_at_is_not_taken_for_nothing(photos, caplog, reason):
    """A link into a folder that is closed to us, or whose storage is gone; one that leads nowhere is nothing."""

    def look() -> bool:
        raise OSError(reason, os.strerror(reason), "album")

    if reason == errno.EACCES:
        assert not _is(look) and "album may not be listed: what is in it is left out" in caplog.text
    else:
        with pytest.raises(DataError, match="album cannot be listed"):
            _is(look)
    (photos / "x").symlink_to(photos / "y")
    (photos / "y").symlink_to(photos / "x")
    assert len(index_dataset("d", DatasetConfig(root=str(photos), pattern="*")).train) == 24


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_an_imagefolder_that_cannot_be_listed_is_a_sentence(tmp_path, monkeypatch, code):
    def refuse(path):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=rf"the folder {tmp_path} cannot be listed \({os.strerror(code)}\): see that"):
        index_dataset("d", DatasetConfig(root=f"imagefolder:{tmp_path}"))


@pytest.mark.parametrize("pattern", ["", "**/*.jpg"])
def test_links_that_lead_back_do_not_hang(tmp_path, pattern):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names(index_dataset("d", DatasetConfig(root=str(tmp_path), pattern=pattern)).train) == ["a.jpg"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_file_of_paths(tmp_path, encoding, newline):
    """Windows writes a byte order mark first: the first image was missing."""
    (tmp_path / "sub").mkdir()
    for name in ("ünï.jpg", "sub/b.jpg", "a.jpg"):
        (tmp_path / name).touch()
    lines = f"ünï.jpg\n# a comment\nsub/b.jpg\n\n{tmp_path}/a.jpg\nsub/vanished.jpg\n"
    (tmp_path / "list.txt").write_text(lines, encoding, newline=newline)
    dataset = index_dataset("d", DatasetConfig(root=str(tmp_path / "list.txt")))
    assert sorted(names(dataset.train)) == ["a.jpg", "b.jpg", "vanished.jpg", "ünï.jpg"]
    (tmp_path / "list.txt").write_text("elsewhere/b.jpg\n")
    with pytest.raises(DataError, match=r"none of the first paths.*elsewhere/b\.jpg"):
        index_dataset("d", DatasetConfig(root=str(tmp_path / "list.txt")))


def test_holdout_is_disjoint_and_does_not_depend_on_where_the_folder_is(photos, tmp_path):
    first = index_dataset("d", DatasetConfig(root=str(photos), holdout=5))
    moved = photos.rename(tmp_path / "moved")
    second = index_dataset("other", DatasetConfig(root=str(moved), holdout=5))
    assert len(first.train) == 19 and len(first.val) == 5 and not set(first.train) & set(first.val)
    assert names(first.val) == names(second.val)
    fewer = index_dataset("d", DatasetConfig(root=str(moved), holdout=3))
    assert set(fewer.val) < set(second.val), "a smaller holdout should be part of a larger one"


def test_val_root(photos, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "v.jpg").touch()
    dataset = index_dataset("d", DatasetConfig(root=str(photos), val_root=str(tmp_path / "val")))
    assert len(dataset.train) == 24 and names(dataset.val) == ["v.jpg"]


def test_glob_as_root(photos, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo_999.jpg").touch()
    dataset = index_dataset("d", DatasetConfig(root=f"{tmp_path}/*/photo_*[09].jpg"))
    assert names(dataset.train) == ["photo_999.jpg", "photo_000.jpg", "photo_009.jpg", "photo_010.jpg",
                                    "photo_019.jpg", "photo_020.jpg"]  # fmt: skip
    assert dataset.train.relative(0) == "other/photo_999.jpg"


@pytest.mark.parametrize(
    "folders, train, val",
    [
        (("train", "validation", "test"), "train", "validation"),
        (("Train", "test"), "Train", "test"),
        (("training", "dev", "notes"), "training", "dev"),
        (("train",), "train", ""),
        (("data/train", "data/val", "docs"), "data/train", "data/val"),
    ],
)
def test_imagefolder_of_hugging_face(tmp_path, folders, train, val):
    for folder in folders:
        (tmp_path / folder / "a class").mkdir(parents=True)
        (tmp_path / folder / "a class" / "1.jpg").touch()
        (tmp_path / folder / "metadata.csv").touch()
    dataset = index_dataset("d", DatasetConfig(root=f"imagefolder:{tmp_path}"))
    assert list(dataset.train) == [str(tmp_path / train / "a class" / "1.jpg")]
    assert list(dataset.val) == ([str(tmp_path / val / "a class" / "1.jpg")] if val else [])
    # without the word it is any folder: all of it is for training
    assert len(index_dataset("d", DatasetConfig(root=str(tmp_path))).train) == len(folders)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"root": ""}, r"no root.*data\.datasets\.d\.root"),
        ({"root": "/no/such/folder"}, "neither a folder nor a text file"),
        ({"pattern": "*.png"}, r"no file matches '\*\.png'.*pattern"),
        ({"holdout": 24}, "leaves nothing to train on"),
        ({"repeat": 0}, "repeat must be at least 1"),
        ({"root": "asset:no-such-asset"}, "unknown asset"),
        ({"root": "imagefolder:photos"}, "no folder train/.*without `imagefolder:`"),
        ({"root": "empty"}, r"no file ends in \.jpg, .*correct data\.datasets\.d\.root"),
        ({"root": "photos/*.jpg", "pattern": "*"}, "is a glob and there is a pattern as well"),
        ({"val_root": "photos", "holdout": 2}, "keep one"),
    ],
)
def test_mistakes_are_named(photos, monkeypatch, change, message):
    monkeypatch.chdir(photos.parent)
    (photos.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        index_dataset("d", DatasetConfig(**{"root": str(photos), **change}))


@pytest.mark.parametrize(
    "field, value",
    [("flip_probability", 1.5), ("hue", 0.6), ("crop_scale", [0.5, 0.4]), ("crop_ratio", [0, 1]), ("prefetch", 0)],
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(DataError, match=field):
        DataConfig(**{field: value})


def test_path_list_keeps_names_that_are_not_utf8():
    paths = ["a", "", "ünï/ß.jpg", os.fsdecode(b"\xff\xfe.jpg")]
    kept = PathList(paths)
    assert list(kept) == paths and len(kept) == 4
    with pytest.raises(IndexError):
        kept[4]


@pytest.mark.parametrize("name", ["demo", "folder", "shards", "dune", "in1k"])
def test_shipped_configurations_fit_the_schema(name, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_DATA", "/data")
    from importlib.resources import files

    shipped = OmegaConf.create((files("configs") / "data" / f"{name}.yaml").read_text())
    if name in ("folder", "shards"):
        shipped.datasets.images.root = "/some/where"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), shipped))
    assert all(isinstance(d, DatasetConfig) and d.root for d in config.datasets.values())
    if name == "dune":
        groups = [d.group for d in config.datasets.values()]
        assert (len(groups), groups.count("generic"), groups.count("3d"), groups.count("human")) == (19, 3, 12, 4)
        assert sum(d.expected_train for d in config.datasets.values()) == 20_717_467
    if name in ("dune", "in1k"):
        for key, own in config.datasets.items():
            assert own.expected_train > 0 and own.layout and own.licence and own.homepage.startswith("https://"), key
            assert not own.holdout or own.holdout == own.expected_val, key


def test_shards_of_dune_keep_groups_and_drop_what_concerns_files(monkeypatch):
    from dune_fast.engine.config import compose_config

    monkeypatch.setenv("DUNE_FAST_SHARDS", "s3://bucket/dune")
    files, shards = (compose_config([f"data={name}"], complete=False).data for name in ("dune", "dune_shards"))
    assert list(files.datasets) == list(shards.datasets)
    for name, dataset in shards.datasets.items():
        assert dataset.root == f"s3://bucket/dune/{name}" and dataset.group == files.datasets[name].group
        assert not (dataset.val_root or dataset.pattern or dataset.holdout or dataset.rotate or dataset.shrink)


def test_dataset_for_evaluation_alone_is_not_trained_on(photos):
    own = {"a": DatasetConfig(root=str(photos)), "b": DatasetConfig(root=str(photos), group="x", evaluation_only=True)}
    config = DataConfig(datasets=own)
    assert [dataset.name for dataset in index_datasets(config)] == ["a"] and config.groups == ["generic"]
    own["a"].evaluation_only = True
    with pytest.raises(DataError, match="there is nothing to train on: evaluation_only=true for a, b"):
        index_datasets(config)
    with pytest.raises(DataError, match=r"data\.datasets is empty"):
        index_datasets(DataConfig())
