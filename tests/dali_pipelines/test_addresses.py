"""Addresses: storages that hang, refuse, forget credentials or are slow, by an fsspec file system that does so."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from loader_helpers import CPU

from dune_fast.dali_pipelines import addresses, patience
from dune_fast.dali_pipelines.addresses import open_address
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig, index_dataset
from dune_fast.dali_pipelines.errors import DataError, StorageError
from dune_fast.dali_pipelines.patience import Threads, answered, patiently
from dune_fast.dali_pipelines.storage import Location, Reader


class Moody(LocalFileSystem):
    """Local files, by way of `mood(number of the instance, name of the call)`."""

    protocol = "moody"
    made = 0
    mood = staticmethod(lambda number, call: None)

    def __init__(self, **options):
        super().__init__(**options)
        type(self).made += 1
        self.number = type(self).made

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("moody://"))

    def unstrip_protocol(self, path):
        return f"moody://{self._strip_protocol(path)}"

    def _asked(name):
        def call(self, *arguments, **options):
            self.mood(self.number, name)
            return getattr(LocalFileSystem, name)(self, *arguments, **options)

        return call

    info, ls, cat_file = map(_asked, ("info", "ls", "cat_file"))


@pytest.fixture
def moody(monkeypatch):
    """The class; its mood is good."""
    fsspec.register_implementation("moody", Moody, clobber=True)
    monkeypatch.setattr(Moody, "made", 0)
    monkeypatch.setattr(Moody, "mood", staticmethod(lambda number, call: None))
    monkeypatch.setattr(addresses, "_CLIENTS", addresses._Clients())
    return Moody


@pytest.fixture
def hang(moody, monkeypatch):
    """Makes calls of a kind hang until the test ends."""
    over = threading.Event()
    monkeypatch.setattr(addresses, "PATIENCE", 0.3)
    monkeypatch.setattr(addresses, "LISTING", 0.3)
    monkeypatch.setattr(patience, "_GRACE", 0.1)

    def start(name: str) -> None:
        moody.mood = staticmethod(lambda number, call: over.wait() if call == name else None)

    yield start
    over.set()


def seconds_said(error: BaseException) -> float:
    return float(re.search(r"for (\d+) s", str(error))[1])


@pytest.mark.parametrize(
    ("kind", "call"),
    [("folder", "info"), ("folder", "ls"), ("tar", "info"), ("tar", "cat_file"), ("glob", "ls"), ("shards", "info"),
     ("shards", "ls"), ("shards", "cat_file")],
)  # fmt: skip
def test_storage_that_never_answers_is_given_up_at_the_start(photos, sharded, tmp_path, hang, call, kind):
    if kind in ("tar", "glob"):  # an index in the cache would do without reading
        (tmp_path / "a.tar").write_bytes(sorted(sharded.glob("*.tar"))[0].read_bytes())
    root = {"folder": photos, "tar": tmp_path / "a.tar", "glob": tmp_path / "*.tar", "shards": sharded}[kind]
    hang(call)
    began = time.monotonic()
    with pytest.raises(StorageError, match="no answer"):
        index_dataset("d", DatasetConfig(root=f"moody://{root}"))
    assert time.monotonic() - began < 5


def test_storage_that_hangs_during_training_ends_the_batches(photos, hang):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")
    from dune_fast.dali_pipelines.loader import TrainLoader

    data = DataConfig(datasets={"d": DatasetConfig(root=f"moody://{photos}")}, num_threads=1, read_patience=0.5)
    with TrainLoader(data, 32, 4, 0, 1, 0, CPU) as loader:
        batches = loader.batches()
        next(batches)
        hang("cat_file")
        began = time.monotonic()
        with pytest.raises(StorageError, match="no answer") as caught:
            for _ in batches:
                pass
        took = time.monotonic() - began
        assert took < 5 and abs(seconds_said(caught.value) - took) < 2 and loader.broken == {"d": 0}
        loader.close()
        assert time.monotonic() - began < 8, "threads that hang are left behind"


def test_local_disk_that_hangs_ends_the_batches_too(photos, monkeypatch):
    """A network folder that was mounted "hard" never gives up by itself."""
    over, locations = threading.Event(), [Location(str(path)) for path in sorted(photos.iterdir())[:6]]
    reader = Reader(0.3, threads=2)
    monkeypatch.setattr(reader, "_read_once", lambda location: over.wait())
    try:
        reads = [reader.start(location) for location in locations]
        for read in reversed(reads):  # the last ones are not begun at all
            with pytest.raises(StorageError, match="no answer"):
                read.result()
    finally:
        over.set()
        reader.close()


def test_nobody_waits_for_a_read_that_is_not_wanted(photos, hang):
    hang("cat_file")
    reader = Reader(100)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.read, Location(f"moody://{next(photos.iterdir())}"))
        time.sleep(0.3)
        reader.stop_waiting()
        with pytest.raises(StorageError, match="not wanted"):
            reading.result(5)


def test_all_tries_share_one_deadline_and_the_message_says_the_true_time():
    def slow_failure():
        time.sleep(0.4)
        raise ConnectionError("503 Slow Down")

    began = time.monotonic()
    with pytest.raises(StorageError, match="503 Slow Down") as caught:
        answered(slow_failure, "x", 1.0)
    took = time.monotonic() - began
    assert took < 2.5 and abs(seconds_said(caught.value) - took) <= 1


def test_listing_that_was_getting_on_is_not_given_up_at_its_first_failure(monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.01)
    tries = []

    def pages():
        tries.append(1)
        if len(tries) == 1:
            time.sleep(0.5)  # many pages, then one fails
            raise ConnectionError("reset")
        return "all"

    assert answered(pages, "x", 0.2, longest=10) == "all"
    tries.clear()
    with pytest.raises(StorageError, match="reset"):
        patiently(pages, "x", 0.2)


class Answer(Exception):
    """As botocore's ClientError."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code, "Message": code}}


def refuse(code: str) -> None:
    raise PermissionError("Access denied") from Answer(code)


@pytest.mark.parametrize("code", ["ExpiredToken", "400"])
def test_expired_credentials_are_renewed_once_for_all_threads(photos, moody, monkeypatch, code):
    """Each of them would make a client of its own. 400: to a HEAD request S3 says no more."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.01)
    paths = [f"moody://{path}" for path in photos.iterdir()]
    moody.mood = staticmethod(lambda number, call: refuse(code) if number == 1 else None)
    reader = Reader(10, threads=8)
    assert all(len(read.result()) for read in [reader.start(Location(path)) for path in paths])
    assert moody.made == 2
    reader.close()


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize("error", [PermissionError("Access Denied"), NoCredentialsError("Unable to locate them")])
def test_refusals_are_said_at_once_and_not_tried_again(photos, moody, error):
    def mood(number, call):
        tries.append(call)
        raise error

    tries, moody.mood = [], staticmethod(mood)
    with pytest.raises(StorageError, match=f"{error}.*give credentials"):
        Reader(60).read(Location(f"moody://{next(photos.iterdir())}"))
    assert len(tries) == 1
    with pytest.raises(StorageError, match=f"moody://.*{error}.*give credentials"):
        index_dataset("d", DatasetConfig(root=f"moody://{photos}"))
    assert len(tries) == 2


def test_what_is_not_there_is_named(moody, tmp_path):
    with pytest.raises(DataError, match="nothing is not there.*correct the address"):
        index_dataset("d", DatasetConfig(root=f"moody://{tmp_path}/nothing"))


def test_missing_package_and_unknown_scheme_say_what_to_do(monkeypatch):
    monkeypatch.setattr(addresses, "_CLIENTS", addresses._Clients())
    fsspec.register_implementation("nodriver", "no_such_package.FileSystem", clobber=True, errtxt="Install x")
    for address, said in (("nodriver://bucket/a", "Install x"), ("nowhere://bucket/a", "Protocol not known")):
        with pytest.raises(DataError, match=f"{said}.*install the package"):
            index_dataset("d", DatasetConfig(root=address))


def test_large_files_are_read_in_pieces_each_with_its_own_patience(tmp_path, moody, monkeypatch):
    monkeypatch.setattr(addresses, "_PIECE", 1000)
    monkeypatch.setattr(addresses, "PATIENCE", 0.5)
    data = bytes(range(256)) * 17
    (tmp_path / "a.bin").write_bytes(data)
    moody.mood = staticmethod(lambda number, call: time.sleep(0.2))  # all of it takes longer than the patience
    with open_address(f"moody://{tmp_path}/a.bin") as stream:
        assert stream.read() == data
        assert stream.seek(-10, 2) == len(data) - 10 and stream.read(100) == data[-10:] and stream.read(1) == b""
        stream.seek(1500)
        assert stream.read(700) == data[1500:2200]


def test_reads_wait_at_once_however_few_threads_decode(photos, moody):
    """By two threads, 200 ms of latency make ten images a second."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")
    from dune_fast.dali_pipelines.loader import TrainLoader

    together = threading.Barrier(8)  # breaks, and the reads fail, unless eight arrive in its time
    data = DataConfig(
        datasets={"d": DatasetConfig(root=f"moody://{photos}")}, num_threads=1, read_threads=8, read_ahead=2, prefetch=1
    )
    with TrainLoader(data, 32, 8, 0, 1, 0, CPU) as loader:
        batches = loader.batches()
        next(batches)  # index the folder in good mood
        moody.mood = staticmethod(lambda number, call: together.wait(20) if call == "cat_file" else None)
        for _ in range(6):
            next(batches)
        assert not together.broken
        loader._source.stop_waiting()
        together.abort()


def test_threads_are_started_as_needed_and_end():
    def alive() -> int:
        return sum(thread.name == "few" for thread in threading.enumerate())

    threads = Threads(3, "few")
    assert [threads.submit(lambda i=i: i, "x", 1).result() for i in range(5)] == list(range(5))
    assert 1 <= alive() <= 3  # a call may begin before the thread of the one before is free
    waiting = threading.Event()
    pending = [threads.submit(waiting.wait, "x", 5) for _ in range(10)]
    assert alive() == 3
    waiting.set()
    assert all(call.result() for call in pending)
    threads.close()
    assert alive() == 0
