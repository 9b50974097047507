"""Shards that other tools have written: found, indexed once, read as they are, damaged ones refused."""

import io
import tarfile
from pathlib import Path

import pytest
from sharding_helpers import read, upload, webdataset

from dune_fast.dali_pipelines import foreign_shards
from dune_fast.dali_pipelines.datasets import DatasetConfig, index_dataset
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.foreign_shards import expand_braces, find_shards, open_foreign_shards, scan_tar

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def foreign(tmp_path, photos) -> tuple[Path, list[bytes]]:
    """Three tar files of the webdataset package, eight images each, and the images."""
    folder, encoded = tmp_path / "foreign", [path.read_bytes() for path in sorted(photos.iterdir())]
    folder.mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"train-{shard:03d}.tar")) as writer:
            for i in range(8 * shard, 8 * shard + 8):
                writer.write({"__key__": f"n{i % 5}/image{i}", "cls": i, "jpg": encoded[i], "json": {"label": i}})
    return folder, encoded


@pytest.mark.parametrize("root", ["{}", "{}/*.tar", "{}/train-{{000..002}}.tar", "{}/train-00{{2,1,0}}.tar"])
@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_shards_of_the_webdataset_package_are_read(foreign, scheme, root):
    folder, encoded = foreign
    base = f"{scheme}{folder}"
    if scheme == "memory://":
        upload(folder, base)
    images = index_dataset("d", DatasetConfig(root=root.format(base))).train
    assert [read(images, i) for i in range(24)] == encoded and len(images) == 24
    assert images[8].startswith(f"{base}/train-001.tar@") and images.relative(8) == images[8].removeprefix(f"{base}/")


def test_headers_are_read_once_until_a_file_changes(foreign, monkeypatch):
    folder, encoded = foreign
    config = DatasetConfig(root=str(folder))
    index_dataset("d", config)
    with monkeypatch.context() as patch:
        patch.setattr(foreign_shards, "_scan", lambda *_: pytest.fail("the headers were read again"))
        assert len(index_dataset("d", config).train) == 24
    with webdataset.TarWriter(str(folder / "train-001.tar")) as writer:
        writer.write({"__key__": "other", "jpg": encoded[0]})
    assert len(index_dataset("d", config).train) == 17


def test_many_shards_are_scanned_by_several_processes(foreign, monkeypatch):
    monkeypatch.setattr(foreign_shards, "_PARALLEL_FROM", 2)
    folder, encoded = foreign
    images = open_foreign_shards(find_shards(str(folder)), "")
    assert [read(images, i) for i in range(24)] == encoded


def test_holdout_of_shards_is_disjoint_and_does_not_depend_on_the_folder(foreign, tmp_path):
    folder, encoded = foreign
    first = index_dataset("d", DatasetConfig(root=str(folder), holdout=5))
    held = [read(first.val, i) for i in range(5)]
    rest = [read(first.train, i) for i in range(19)]
    assert sorted(held + rest) == sorted(encoded)
    second = index_dataset("d", DatasetConfig(root=str(folder.rename(tmp_path / "moved")), holdout=5))
    assert [read(second.val, i) for i in range(5)] == held


def test_cache_folder_that_cannot_be_written_is_named(foreign, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cache folder .*file cannot be written.*DUNE_FAST_CACHE"):
        index_dataset("d", DatasetConfig(root=str(foreign[0])))


def make_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_hostile_names_are_data(tmp_path, format):
    members = [("../../outside.jpg", b"a"), ("/etc/passwd.png", b"bb"), (f"{'x' * 250}/{'y' * 150}.JPG", b"ccc")]
    path = make_tar(tmp_path / "a.tar", members, format)
    images = open_foreign_shards([str(path)], "")
    assert [read(images, i) for i in range(3)] == [b"a", b"bb", b"ccc"]
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar", "cache"}


def test_one_image_of_a_sample_unless_a_pattern_says_otherwise(tmp_path):
    names = ["k1.png", "k1.jpg", "k1.txt", "k2.jpg", "k2.mask.png", "a/k2.webp", "a/.hidden.jpg", "k3.png", "k3.jpeg"]
    path = str(make_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names]))

    def found(pattern: str) -> list[str]:
        images = open_foreign_shards([path], pattern)
        return [read(images, i).decode() for i in range(len(images))]

    assert found("") == ["k1.jpg", "k2.jpg", "a/k2.webp", "k3.jpeg"]
    assert found("*.mask.png | a/*") == ["k2.mask.png", "a/k2.webp", "a/.hidden.jpg"]
    with pytest.raises(DataError, match=r"no member of .*a\.tar matches '\*\.gif'"):
        found("*.gif")


@pytest.mark.parametrize(
    "names",
    [
        ["frame.00.v1.jpg", "frame.01.v1.jpg", "frame.02.v1.jpg"],
        ["img 2.0.jpg", "img1.jpg", "img 2.2.jpg", "img3.jpg"],
        ["img.jpg", "img.1.jpg", "img.2.jpg"],
        ["a/www.site.org_1.jpeg", "a/www.site.org_2.jpeg", "b/c.d.webp"],
        ["J. Smith.jpg", "J. Doe.jpg", "K. Smith.jpg"],
        ["a.rgb.png", "b.rgb.png"],
        ["0.5.gif", "1.avif", "1.5.tif"],
    ],
)
def test_names_with_dots_are_images_of_their_own(tmp_path, names):
    """WebDataset ends a key at the first dot: such members were left out without a word."""
    path = make_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    images = open_foreign_shards([str(path)], "")
    assert [read(images, i).decode() for i in range(len(images))] == names


def test_samples_of_several_images_ask_for_a_pattern(tmp_path):
    """Depth or masks would be trained on without a word."""
    names = [f"{i}.{kind}.png" for i in range(3) for kind in ("depth", "rgb")]
    path = make_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    with pytest.raises(DataError, match=r"KEY\.depth\.\* and KEY\.rgb\.\*.*pattern='\*\.rgb\.\*'"):
        open_foreign_shards([str(path)], "")
    assert len(open_foreign_shards([str(path)], "*.rgb.*")) == 3


def test_links_and_folders_in_a_tar_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.DIRTYPE), ("c.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert len(scan_tar(str(tmp_path / "a.tar"), "")) == 0


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[: 5 * 1024 + 100], "truncated"),
        (lambda data: data[: 3 * 1024 + 10], "damaged or truncated after 3 images, at byte 3072"),
        (lambda data: data[: 3 * 1024] + b"\xff" * 512 + data[3 * 1024 + 512 :], "after 3 images, at byte 3072"),
        (lambda data: b"<html>" * 1000, "cannot be read as a tar file"),
        (lambda data: __import__("gzip").compress(data), "compressed.*decompress it"),
    ],
)
def test_damaged_tar_is_refused(tmp_path, damage, message):
    """Python's tarfile takes a broken header for the end of the archive and says nothing."""
    path = make_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(300)) for i in range(6)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        index_dataset("d", DatasetConfig(root=str(path)))


def test_braces():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"] and expand_braces("x") == ["x"]


@pytest.mark.parametrize(
    "root, message",
    [
        ("/no/such/{00..01}.tar", r"/no/such/00\.tar cannot be read: No such file"),
        ("/no/such/*.tar", r"no tar file matches /no/such/\*\.tar"),
        ("pipe:curl https://host/a.tar", "pipes and chained"),
    ],
)
def test_missing_tars_are_named(root, message):
    with pytest.raises(DataError, match=f"dataset 'd'.*{message}"):
        index_dataset("d", DatasetConfig(root=root))


def test_folder_of_images_beside_a_tar_is_a_folder_of_images(foreign):
    folder, encoded = foreign
    (folder / "a.jpg").write_bytes(encoded[0])
    assert list(index_dataset("d", DatasetConfig(root=str(folder))).train) == [str(folder / "a.jpg")]


@pytest.mark.parametrize("field, value", [("rotate", "*"), ("shrink", 64)])
def test_what_cannot_be_done_with_tars_is_refused(foreign, field, value):
    with pytest.raises(DataError, match=f"{field}=.*has to be done by `dune-fast data shard`"):
        index_dataset("d", DatasetConfig(root=str(foreign[0]), **{field: value}))


def test_damaged_copy_of_an_index_in_the_cache_is_made_again(foreign, tmp_path):
    folder, _ = foreign
    names = list(index_dataset("d", DatasetConfig(root=str(folder))).train)
    (index,) = (tmp_path / "cache" / "tar-index").glob("*.index")
    content = index.read_bytes()
    for damaged in (b"", content[:-5], content[:-1] + b"\x01"):
        index.unlink()  # the old one may still be mapped into memory
        index.write_bytes(damaged)
        assert list(index_dataset("d", DatasetConfig(root=str(folder))).train) == names
        assert index.read_bytes() == content
