"""What a checkpoint holds beside tensors: loaded as plain data, whatever wrote it, and never by running it."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import pathlib
import random
import types

import numpy as np
import pytest
import torch

from dune_fast.teachers.containers import TeacherWeightsError, container_state, read_container

WEIGHTS = {"blocks.0.norm1.weight": torch.arange(3.0)}

SAME = {  # written -> read, equal
    "float64": (np.float64(0.5), 0.5),
    "float32": (np.float32(0.5), 0.5),
    "int64": (np.int64(3), 3),
    "bool": (np.bool_(True), True),
    "string": (np.str_("ab"), "ab"),
    "path": (pathlib.PosixPath("/data/x"), pathlib.PurePosixPath("/data/x")),
    "windows path": (pathlib.PureWindowsPath("c:/x"), pathlib.PureWindowsPath("c:/x")),
    "defaultdict": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "empty defaultdict": (collections.defaultdict(float), {}),
    "deque": (collections.deque([1, 2], maxlen=4), [1, 2]),
    "ordered": (collections.OrderedDict(a=np.float64(1)), {"a": 1.0}),
    "counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
    "sets": ((frozenset([1]), {2}), (frozenset([1]), {2})),
    "time": (datetime.datetime(2024, 5, 6, tzinfo=datetime.UTC),) * 2,
    "span": (datetime.timedelta(seconds=3),) * 2,
    "numbers": ((decimal.Decimal("1.5"), fractions.Fraction(1, 3), 1 + 2j, 2**80),) * 2,
    "namespaces": (
        argparse.Namespace(lr=np.float32(0.5), more=types.SimpleNamespace(p=pathlib.PosixPath("a"))),
        argparse.Namespace(lr=0.5, more=types.SimpleNamespace(p=pathlib.PurePosixPath("a"))),
    ),
    "nested": ([{"a": (np.int32(1), [np.float64(2)])}], [{"a": (1, [2.0])}]),
    "python's generator": (random.getstate(),) * 2,
    "torch's version": (torch.__version__, str(torch.__version__)),
    "dtype": (np.dtype("float32"),) * 2,
    "bytes": ((b"", b"ab"),) * 2,
}


def saved(tmp_path, value, **options):
    path = tmp_path / "w.pth"
    torch.save({"model": WEIGHTS, "x": value}, path, **options)
    return path


@pytest.mark.parametrize("name", SAME)
def test_harmless_values_load_as_plain_data(name, tmp_path):
    written, expected = SAME[name]
    content = read_container(saved(tmp_path, written))
    assert content["x"] == expected
    assert torch.equal(container_state(content, "w.pth")["blocks.0.norm1.weight"], torch.arange(3.0))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(3, dtype=np.uint32),
        np.arange(3, dtype=">i4"), np.array(5.0), np.empty((0, 3)), np.ones(2, np.float16), np.array(["a", "bc"]),
        np.array([1, "a", None], dtype=object), np.array([True, False]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)  # fmt: skip
def test_arrays_of_numpy(array, tmp_path):
    (found,) = read_container(saved(tmp_path, [array]))["x"]
    assert isinstance(found, np.ndarray) and found.dtype == array.dtype and found.shape == array.shape
    assert np.array_equal(found, array)


def test_weights_as_arrays_of_numpy_are_a_state_dict(tmp_path):
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(2.0), "c": torch.ones(1)}
    torch.save({"model": state, "rng": np.random.get_state()}, tmp_path / "w.pth")
    found = container_state(read_container(tmp_path / "w.pth"), "w.pth")
    assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3)) and found["b"].shape == ()


def test_weights_with_other_values_between_them(tmp_path):
    torch.save({**WEIGHTS, "epoch": 3, "best": np.float64(0.5)}, tmp_path / "w.pth")
    assert container_state(read_container(tmp_path / "w.pth"), "w.pth").keys() == WEIGHTS.keys()


def test_generators_of_numpy_are_passed_over(tmp_path):
    for value in (np.random.RandomState(0), np.random.default_rng(0)):
        read_container(saved(tmp_path, value))


class Own:
    """A type that no list can know."""


@pytest.mark.parametrize(
    ("value", "options", "words"),
    [
        (Own(), {}, r"asks for the type \S*test_safe_types.Own .*torch.save\(model.state_dict\(\)"),
        (1, {"pickle_protocol": 4}, "another pickle protocol.*save it again without `pickle_protocol`"),
        (np.zeros(2, [("a", "f4")]), {}, "arrays of the type 'V4' are not read; where .* made, save torch.from_numpy"),
    ],
)
def test_what_is_refused_says_what_and_how_to_convert_it(value, options, words, tmp_path):
    with pytest.raises(TeacherWeightsError, match=words) as caught:
        read_container(saved(tmp_path, value, **options))
    text = str(caught.value)
    assert "weights_only" not in text and "safe_globals" not in text and "\n" not in text
    assert "damaged" not in text or "pickle" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_says_how_to_convert_it(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(TeacherWeightsError, match=r"TorchScript archive.*torch.jit.load\(FILE\).state_dict") as caught:
        read_container(tmp_path / "w.pt")
    assert "weights_only" not in str(caught.value)


class Built:
    """Pickles into a call with a state."""

    def __init__(self, function, args, state):
        self.parts = (function, args, state)

    def __reduce__(self):
        return self.parts


def test_a_dtype_that_lies_about_objects_reads_no_memory(tmp_path):
    """NumPy believes the flags of a pickled dtype: bytes would become pointers."""
    dtype = Built(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
    array = Built(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), dtype, False, b"\x41" * 8))
    with pytest.raises(TeacherWeightsError, match="an array of objects without objects"):
        read_container(saved(tmp_path, [array]))


def test_a_pickle_within_itself(tmp_path):
    loop = [1]
    loop.append(loop)
    found = read_container(saved(tmp_path, loop))["x"]
    assert found[0] == 1 and found[1] is found
    deep = []
    for _ in range(400):
        deep = [deep]
    with pytest.raises(TeacherWeightsError, match="nested too deeply"):
        read_container(saved(tmp_path, deep))

