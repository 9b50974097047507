"""Lists of images in pickles: what pickle itself would give, and nothing executed."""

import collections
import os
import pickle

import numpy as np
import pytest

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.pickle_keys import pickle_paths


class Annotation:
    def __init__(self, name):
        self.name, self.keypoints = name, np.zeros((3, 2))


class Hostile:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def write(path, content, protocol):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, lambda d: collections.defaultdict(list, d)])
def test_keys_equal_those_of_the_unpickled_dictionary(tmp_path, protocol, kind):
    same = Annotation("shared")
    content = kind(
        {f"videos/ü_{i}.png": {"boxes": [1, 2.5, None], "nested": {"inner": i}, "who": same} for i in range(2500)}
    )
    content["one more"] = (Annotation("videos/no_key.png"), {"a set"}, b"bytes", frozenset({1}), True)
    assert pickle_paths(write(tmp_path / "a.pkl", content, protocol)) == ("", list(content))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_hostile_pickle_gives_its_keys_and_runs_nothing(tmp_path, protocol):
    folder = tmp_path / "made by the pickle"
    path = write(tmp_path / "a.pkl", {"a.png": Hostile(str(folder)), "b.png": 1}, protocol)
    assert pickle_paths(path) == ("", ["a.png", "b.png"]) and not folder.exists()
    pickle.loads(path.read_bytes())
    assert folder.exists(), "the pickle would have done harm"


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"a": 1})[:-3],
        b"\x89PNG\r\n\x1a\n",
        b"",
        b"h\x07.",  # something from the memo that nobody put there
        b"u.",  # items without a mark
    ],
)
def test_other_files_are_refused_with_a_sentence(tmp_path, data):
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(DataError, match="not a whole pickle"):
        pickle_paths(tmp_path / "a.pkl")
    with pytest.raises(DataError, match="cannot be read"):
        pickle_paths(tmp_path / "missing.pkl")


def test_strings_of_python_2_and_persistent_objects_are_read(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"(dp0\nS'a.png'\np1\nPsomewhere\nsS'\\xc3\\xbc.png'\nI1\ns.")
    assert pickle_paths(tmp_path / "a.pkl") == ("", ["a.png", "ü.png"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_and_pairs_of_a_folder_and_a_list_are_read(tmp_path, protocol, kind):
    names = kind(f"a/ü_{i}.jpg" for i in range(2500))
    path = tmp_path / "a.pkl"
    assert pickle_paths(write(path, names, protocol)) == ("", list(names))
    assert pickle_paths(write(path, ("/data/sets", names), protocol)) == ("/data/sets", list(names))
    assert pickle_paths(write(path, ["/data/sets", names], protocol)) == ("/data/sets", list(names))
    assert pickle_paths(write(path, kind((name, 3) for name in names), protocol)) == ("", list(names))
    assert pickle_paths(write(path, dict.fromkeys(names, 1), protocol)) == ("", list(names))
    assert pickle_paths(write(path, ["one.jpg"], protocol)) == ("", ["one.jpg"])
    assert pickle_paths(write(path, ["one.jpg", "two.jpg"], protocol)) == ("", ["one.jpg", "two.jpg"])


def test_pickles_without_a_list_are_refused_with_a_sentence(tmp_path):
    for content in ([], [1, 2], "a.jpg", ("/data", []), {1: 2}, None):
        with pytest.raises(DataError, match="holds no list of images"):
            pickle_paths(write(tmp_path / "a.pkl", content, 4))
