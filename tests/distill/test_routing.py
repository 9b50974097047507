"""Teachers on the images that count for them alone: the same losses and gradients as masking, with less work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.toy.conv_patchify import toy_teacher
from dune_fast.dali_pipelines.order import SampleOrder, rank_slots
from dune_fast.distill.objective import ObjectiveConfig, ownership
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.kernels.moments import moments
from dune_fast.kernels.nn.routing import make_routes, union, within
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import build_student
from dune_fast.teachers.ensemble import TeacherEnsemble

GROUPS = ["3d", "generic", "human"]
TEACHERS = {
    "dino": toy_teacher("random:1", 14, 24, groups=["generic"]),
    "mast3r": toy_teacher("random:2", 16, 32, ["patch"], mean=[0.5] * 3, groups=["3d"]),
    "hmr": toy_teacher("random:3", 14, 16, ["patch"], groups=["human"]),
}
GROUP = np.array([1, 0, 2, 1, 0, 2, 0, 2, 1])  # a third of each


class Distillation:
    """A student, three teachers with the images that each has seen, and their step."""

    def __init__(
        self, route: bool, sharing: str, convention: str = "dune", projector: str = "tp", **objective
    ) -> None:
        self.widths = {name: (t.num_features, t.token_types) for name, t in TEACHERS.items()}
        self.student = build_student(
            ViTConfig(image_size=28, embed_dim=48, depth=2, num_heads=3),
            ProjectorConfig(projector, hidden_dim=32, last_hidden_dim=32), self.widths,
        )  # fmt: skip
        self.teachers = TeacherEnsemble(TEACHERS, 14)
        self.seen: dict[str, int] = {}
        for name, teacher in self.teachers.teachers.items():
            hook = lambda _, args, name=name: self.seen.__setitem__(name, len(args[0]))  # noqa: E731
            teacher.trunk.register_forward_pre_hook(hook)
        self.statistics = TeacherStatistics(self.widths, convention)
        for _, _, normalizer in self.statistics.items():
            draw = torch.Generator().manual_seed(len(normalizer.mean))
            normalizer.mean.normal_(generator=draw)
            normalizer.std.uniform_(0.5, 2.0, generator=draw)
        cfg = ObjectiveConfig(sharing=sharing, route_by_dataset=route, **objective)
        own = ownership({n: t.groups for n, t in TEACHERS.items()}, GROUPS, cfg)
        self.step = DistillationStep(self.student, self.teachers, self.statistics, own, cfg)

    def __call__(self, images: torch.Tensor, group: np.ndarray = GROUP, momentum: float = 0.0):
        self.student.zero_grad(set_to_none=True)
        positions = np.arange(len(group))
        on_device = torch.from_numpy(group), torch.from_numpy(positions)
        output = self.step(images, *on_device, 0, momentum, group, positions_on_host=positions)
        output.loss.backward()
        return output, {name: p.grad for name, p in self.student.named_parameters() if p.requires_grad}


@pytest.fixture
def images():
    return torch.randn(9, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("sharing", "seen"), [("none", [3, 3, 3]), ("generic", [3, 6, 6])])
@pytest.mark.parametrize("projector", ["tp", "lp", "sp"])
def test_same_losses_and_gradients_as_masking(sharing, seen, projector, images):
    masked, routed = (Distillation(route, sharing, projector=projector) for route in (False, True))
    (expected, gradients), (found, ours) = masked(images), routed(images)
    assert list(masked.seen.values()) == [9, 9, 9] and list(routed.seen.values()) == seen
    torch.testing.assert_close(found.loss, expected.loss)
    own = masked.step.own[:, torch.from_numpy(GROUP)]
    torch.testing.assert_close(found.images.losses[own], expected.images.losses[own])
    assert torch.all(found.images.losses[~own] == 0) and torch.all(expected.images.losses[~own] > 0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for i, name in enumerate(TEACHERS):
        torch.testing.assert_close(found.metrics[f"loss/{name}"], expected.images.losses[i, own[i]].mean())
        torch.testing.assert_close(found.metrics[f"share/{name}"], expected.metrics[f"share/{name}"])
    assert found.metrics.keys() == expected.metrics.keys()


def test_unic_trains_with_the_statistics_from_before_so_losses_are_the_same(images):
    masked, routed = (Distillation(route, "none", "unic") for route in (False, True))
    expected, found = masked(images, momentum=0.5)[0], routed(images, momentum=0.5)[0]
    torch.testing.assert_close(found.loss, expected.loss)
    assert not torch.equal(masked.statistics.hmr.normalizers.patch.mean, routed.statistics.hmr.normalizers.patch.mean)


def test_statistics_are_those_of_what_a_teacher_saw(images):
    routed = Distillation(True, "none")
    routed(images, momentum=1.0)
    for name, groups in (("dino", 1), ("mast3r", 0), ("hmr", 2)):
        x = routed.teachers(images)[name]["patch"][torch.from_numpy(groups == GROUP)]
        mean, m2 = moments(x)
        normalizer = routed.statistics.get_submodule(f"{name}.normalizers.patch")
        torch.testing.assert_close(normalizer.mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(normalizer.std, (m2 / (3 * 4 - 1)).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projector", ["tp", "lp", "sp"])
def test_a_teacher_without_any_image_does_not_run_and_stays_as_it_was(projector, images):
    routed, masked = (Distillation(route, "none", projector=projector) for route in (True, False))
    before = {k: v.clone() for k, v in routed.statistics.state_dict().items() if k.startswith("hmr")}
    group = np.array([0, 1] * 4 + [0])
    expected = masked(images, group)[0]
    assert torch.isclose(routed(images, group)[0].loss, expected.loss)
    output, gradients = routed(images, group, momentum=0.5)
    assert routed.seen == {"dino": 4, "mast3r": 5}
    assert all(torch.equal(v, routed.statistics.state_dict()[k]) for k, v in before.items())
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(torch.all(g == 0) for name, g in gradients.items() if name.startswith("projectors.hmr"))
    assert all(torch.isfinite(value) for value in output.metrics.values())
    assert output.metrics["loss/hmr"] == output.metrics["loss/hmr/patch/cosine"] == 0


def test_a_trunk_of_two_teachers_runs_once_on_the_images_of_either(images):
    shared = {
        "a": toy_teacher("random:1", 14, 24, ["cls"]),
        "b": toy_teacher("random:1", 14, 24, ["patch"]),
    }
    ensemble = TeacherEnsemble(shared, 14)
    seen = []
    ensemble.trunks[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    whole = ensemble(images)
    indices = {"a": np.array([0, 3, 4]), "b": np.array([3, 8])}
    routed = ensemble(images, make_routes(indices, 9, images.device))
    assert seen == [9, 4]
    torch.testing.assert_close(routed["a"]["cls"], whole["a"]["cls"][[0, 3, 4]])
    torch.testing.assert_close(routed["b"]["patch"], whole["b"]["patch"][[3, 8]])
    routed = ensemble(images, make_routes({"a": np.array([2]), "b": np.array([], np.int64)}, 9, images.device))
    assert seen[-1] == 1 and routed["b"]["patch"].shape == (0, 4, 24)
    torch.testing.assert_close(routed["a"]["cls"], whole["a"]["cls"][[2]])


def test_routes_take_and_put_back():
    routes = make_routes({"a": np.array([1, 4]), "b": np.array([0, 4])}, 6, torch.device("cpu"))
    x = torch.randn(6, 3, requires_grad=True)
    assert torch.equal(routes["a"].take(x), x[[1, 4]])
    whole = union(list(routes.values()))
    assert whole.host.tolist() == whole.device.tolist() == [0, 1, 4]
    inside = within(routes["b"], whole)
    assert inside.host.tolist() == inside.device.tolist() == [0, 2] and inside.batch == 3
    spread = routes["a"].spread(routes["a"].take(x).sum(1))
    assert torch.equal(spread, torch.zeros(6).index_copy(0, torch.tensor([1, 4]), x[[1, 4]].sum(1)))
    spread.sum().backward()
    assert x.grad.sum(1).tolist() == [0, 3, 0, 0, 3, 0]


def test_routing_needs_images_that_do_not_count():
    with pytest.raises(ValueError, match="sharing=full every teacher counts on every image"):
        ObjectiveConfig(route_by_dataset=True)


@pytest.mark.parametrize("weights", [(1, 1, 1), (19, 1.2, 3.7)])
@pytest.mark.parametrize(("batch", "ranks"), [(128, 1), (256, 8)])
def test_a_teacher_gets_at_most_two_numbers_of_images(weights, batch, ranks):
    """So that what is made for every shape (cuDNN's plans for attention, CUDA graphs, compiled code) stays little."""
    order = SampleOrder([1000] * 3, weights, 0, batch)
    counts = {(rank, group): set() for rank in range(ranks) for group in range(3)}
    for step in range(order.shares.period):
        groups, _ = order.step(step)
        for rank, group in counts:
            counts[rank, group].add(int((groups[rank_slots(batch, rank, ranks)] == group).sum()))
    assert all(1 <= len(found) <= 2 for found in counts.values())
