"""The fused loss against float64 and torch's own: values, gradients, layouts, edge cases, tracing, the objective."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from dune_fast.distill.objective import ObjectiveConfig, coefficients, combine, teacher_losses
from dune_fast.distill.standardization import Standardizer
from dune_fast.kernels import distill_loss as module
from dune_fast.kernels import distill_loss_kernels, library
from dune_fast.kernels.distill_loss import distill_loss, distill_loss_reference

pytestmark = pytest.mark.usefixtures("poisoned")
CONFIG = ObjectiveConfig()
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(2, 5, 7), (3, 33), (1, 4), (2, 1, 96), (1, 37, 65), (3, 3, 300), (2, 1030)]
TYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (BF16, FP32)]  # of student and teacher
KINDS = {
    "random": lambda s, t: (s, t),
    "constant student": lambda s, t: (torch.full_like(s, 0.7), t),
    "zero student": lambda s, t: (torch.zeros_like(s), t),
    "zero teacher": lambda s, t: (s, torch.zeros_like(t)),
    "both zero": lambda s, t: (torch.zeros_like(s), torch.zeros_like(t)),
    "some zero rows": lambda s, t: (s * (torch.arange(s.shape[0]) % 2).view(-1, *[1] * (s.ndim - 1)), t),
    "large": lambda s, t: (s * 1e15, t * 1e15),
    "tiny": lambda s, t: (s * 1e-10, t),
    "the same": lambda s, t: (s, s + 1e-2 * t),
}


def arguments(shape, types=(FP32, FP32), device="cpu", standardized=False):
    """(student, teacher, mean, inv_std) of raw features with a mean and a spread of their own."""
    torch.manual_seed(0)
    student, teacher = torch.randn(shape), torch.randn(shape) * 3 + 1
    statistics = (None, None) if standardized else (torch.randn(shape[-1]), torch.rand(shape[-1]) + 0.3)
    made = (student.to(types[0]), teacher.to(types[1]), *statistics)
    return tuple(x if x is None else x.to(device) for x in made)


def in_float64(inputs):
    return tuple(x if x is None else x.double() for x in inputs)


def losses_and_gradient(function, inputs, *terms, upstream=None) -> list[Tensor]:
    student = inputs[0].detach().requires_grad_()
    loss = function(student, *inputs[1:], *terms)
    upstream = torch.linspace(-1, 2, len(student), device=student.device) if upstream is None else upstream
    (gradient,) = torch.autograd.grad(loss.total, student, upstream.to(loss.total.dtype))
    assert not loss.cosine.requires_grad and not loss.smooth_l1.requires_grad
    return [*(part.detach() for part in loss), gradient]


def assert_right(inputs, fused, no_worse, *terms, upstream=None) -> None:
    eager = losses_and_gradient(distill_loss_reference, inputs, *terms, upstream=upstream)
    exact = losses_and_gradient(distill_loss_reference, in_float64(inputs), *terms, upstream=upstream)
    with fused():
        ours = losses_and_gradient(distill_loss, inputs, *terms, upstream=upstream)
    assert [x.dtype for x in ours] == [FP32, FP32, FP32, inputs[0].dtype]
    for found, other, truth in zip(ours, eager, exact, strict=True):
        no_worse(found, other, truth)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_types(shape, types, device, fused, no_worse):
    assert_right(arguments(shape, types, device), fused, no_worse)


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind, device, fused, no_worse):
    inputs = arguments((3, 4, 40), standardized=True)
    inputs = (*(x.to(device) for x in KINDS[kind](*inputs[:2])), None, None)
    assert_right(inputs, fused, no_worse)
    with fused():
        assert all(x.isfinite().all() for x in losses_and_gradient(distill_loss, inputs))


@pytest.mark.parametrize(
    "terms", [(0.5, 0.5, 1.0), (1.0, 0.0, 1.0), (0.9, 0.1, 0.3), (0.0, 2.0, 0.0), (1.0, 1.0, 100.0)]
)
def test_weights_and_beta(terms, device, fused, no_worse):
    assert_right(arguments((2, 5, 24), device=device), fused, no_worse, *terms)


@pytest.mark.parametrize("beta", [0.0, 1e-42])
def test_equal_features_at_beta_zero(beta, device, fused):
    """The sign of 0 is 0, and 0 over a beta of which float32 has no inverse is not NaN."""
    x = torch.randn(2, 3, 8, device=device)
    with fused():
        total, _, _, gradient = losses_and_gradient(distill_loss, (x, x.clone(), None, None), 0.0, 1.0, beta)
    assert not total.any() and not gradient.any()


@pytest.mark.parametrize("types", [(FP32, FP32), (BF16, FP32)])
def test_slices_of_tokens_are_read_where_they_lie(types, device, fused, no_worse, monkeypatch):
    student, teacher, mean, inv_std = arguments((4, 9, 24), types, device)
    contiguous = Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("copied"))
    for cut in (lambda x: x[:, 1:], lambda x: x[:, 0], lambda x: x[1:2, 2:], lambda x: x[:1].expand(3, 9, 24)):
        assert_right((cut(student), cut(teacher), mean, inv_std), fused, no_worse)
        assert_right((cut(student), contiguous(cut(teacher)), mean, inv_std), fused, no_worse)
    monkeypatch.undo()
    assert_right((student[..., ::2], teacher[..., 1::2], mean[::2], inv_std[1::2]), fused, no_worse)


def test_gradient_takes_an_upstream_of_any_layout(device, fused, no_worse):
    inputs = arguments((3, 4, 16), device=device)
    for upstream in (torch.ones(1, device=device).expand(3), torch.randn(3, 4, device=device)[:, 1]):
        assert_right(inputs, fused, no_worse, upstream=upstream)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter's numpy
def test_overflowing_square_stays_finite(device, fused):
    """As in torch, where a feature over an infinite norm is 0."""
    inputs = (torch.full((1, 2, 4), 1e25, device=device), torch.randn(1, 2, 4, device=device), None, None)
    with fused():
        ours = losses_and_gradient(distill_loss, inputs)
    for found, expected in zip(ours, losses_and_gradient(distill_loss_reference, inputs), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected)


def test_nan_stays_in_its_image(device, fused):
    student, *rest = arguments((3, 4, 8), device=device)
    student[1, 2, 5] = torch.nan
    with fused():
        total, cosine, smooth_l1, gradient = losses_and_gradient(distill_loss, (student, *rest))
    for loss in (total, cosine, smooth_l1):
        assert loss.isnan().tolist() == [False, True, False]
    assert gradient[[0, 2]].isfinite().all() and gradient[1, 2].isnan().all()


def test_more_tiles_than_programs_and_patches_than_a_block(device, fused, no_worse, monkeypatch):
    monkeypatch.setattr(distill_loss_kernels, "processors", lambda device: 1)
    assert_right(arguments((1, 1100, 8), device=device), fused, no_worse)


def test_no_images(device, fused):
    student = torch.zeros(0, 4, 8, device=device, requires_grad=True)
    with fused():
        loss = distill_loss(student, student.detach())
    assert loss.total.shape == (0,)
    loss.total.sum().backward()
    assert student.grad.shape == student.shape


@pytest.mark.parametrize("terms", [(0.5, 0.5, 1.0), (0.9, 0.1, 0.3), (0.0, 1.0, 0.0)])
def test_references_agree_in_float64(terms):
    """Autograd of the forward, finite differences, and the backward written out."""
    inputs = in_float64(arguments((2, 3, 5)))
    student = inputs[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distill_loss_reference(s, *inputs[1:], *terms).total, student)
    *expected, gradient = losses_and_gradient(distill_loss_reference, inputs, *terms)
    *found, saved = module._forward_reference(student.detach(), *inputs[1:], *terms)
    upstream = torch.linspace(-1, 2, 2).double()
    found.append(module._backward_reference(student.detach(), *inputs[1:], saved, upstream, *terms))
    for a, b in zip(found, [*expected, gradient], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def objective(student, teacher, mean, inv_std, step):
    """One teacher's cls and patch tokens, twice, through losses, dropping and the mean."""
    cut = {"cls": (lambda x: x[:, 0]), "patch": (lambda x: x[:, 1:])}
    projections = {t: {k: f(student * (i + 1)) for k, f in cut.items()} for i, t in enumerate("ab")}
    features = {t: {k: f(teacher) for k, f in cut.items()} for t in "ab"}
    standardizers = {t: dict.fromkeys(cut, Standardizer(mean, inv_std)) for t in "ab"}
    losses, _ = teacher_losses(projections, features, standardizers, CONFIG)
    images = torch.arange(len(student), device=student.device)
    c = coefficients(
        losses, torch.ones(2, 1, dtype=torch.bool, device=student.device), images * 0, images, step, 3, CONFIG
    )
    return combine(losses, c)


@pytest.mark.slow
def test_objective_compiles_whole_and_once(device, fused):
    inputs = arguments((3, 5, 16), (BF16, BF16), device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    with fused():
        for step in (4, 5, 6, 2**31 + 7):
            results = []
            for function in (compiled, objective):
                student = inputs[0].detach().requires_grad_()
                loss = function(student, *inputs[1:], step)
                results.append((loss.detach(), *torch.autograd.grad(loss, student)))
            for found, expected in zip(*results, strict=True):
                torch.testing.assert_close(found, expected)
    assert counter.frame_count <= 2  # the second call makes the step a symbol


def test_checkpointing_and_autocast(device, fused):
    inputs = arguments((2, 3, 16), device=device)
    expected = losses_and_gradient(distill_loss_reference, inputs)

    def checkpointed(student, *rest):
        run = torch.utils.checkpoint.checkpoint
        return module.TokenLoss(*run(lambda s: tuple(distill_loss(s, *rest)), student, use_reentrant=False))

    with fused(), torch.autocast(device.type, torch.bfloat16):
        found = losses_and_gradient(checkpointed, inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_teacher_that_wants_a_gradient_gets_one(device, fused):
    student, teacher, mean, inv_std = arguments((2, 3, 8), device=device)
    teacher.requires_grad_()
    with fused():
        distill_loss(student, teacher, mean, inv_std).total.sum().backward()
    assert teacher.grad.abs().sum() > 0


def test_wide_features_take_the_reference(device, fused):
    x = torch.randn(1, module.MAX_CHANNELS + 1, device=device)
    with fused():
        assert torch.equal(distill_loss(x, x + 1).total, distill_loss_reference(x, x + 1).total)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t, m, i: (s[:1], t, m, i), r"one shape \[B, P, C\] or \[B, C\]; got student float32 \[1, 3, 8\]"),
        (lambda s, t, m, i: (s[0, 0], t[0, 0], m, i), "one shape"),
        (lambda s, t, m, i: (s, t, m, None), "both or neither"),
        (lambda s, t, m, i: (s, t, m[:4], i), r"mean and inv_std \[C\].*mean float32 \[4\]"),
        (lambda s, t, m, i: (s, t.to("meta"), m, i), "one device.*teacher float32 .* on meta"),
        (lambda s, t, m, i: (s, t, m, i, 0.5, 0.5, -1.0), "beta >= 0, got -1.0"),
    ],
)
def test_messages(change, words, fused):
    with fused(), pytest.raises(ValueError, match=words):
        distill_loss(*change(*arguments((2, 3, 8))))


@pytest.mark.gpu
def test_keeps_no_standardized_features():
    assert not library.INTERPRETER
    student, teacher, mean, inv_std = arguments((64, 577, 768), (BF16, BF16), "cuda")
    student, teacher = student[:, 1:].requires_grad_(), teacher[:, 1:]
    distill_loss(student, teacher, mean, inv_std).total.sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = distill_loss(student, teacher, mean, inv_std)  # noqa: F841  holds what is saved
    assert torch.cuda.max_memory_allocated() - before < 32 * 64 * 576 + 2**16
