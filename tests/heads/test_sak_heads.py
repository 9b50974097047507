"""SAK's second stage: routers, decode head, task losses, against numpy and torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dune_fast.heads.sak.decode import DecodeHead
from dune_fast.heads.sak.losses import IGNORED, LOSSES, total_loss
from dune_fast.heads.sak.router import Router, TaskRouters

DIM, EXPERTS, PATCHES = 8, 3, 5


def experts(levels=(1, 3)) -> dict[int, list[torch.Tensor]]:
    return {level: [torch.randn(2, PATCHES, DIM) for _ in range(EXPERTS)] for level in levels}


def test_a_router_weighs_an_image_and_noise_a_position():
    router = Router(DIM, EXPERTS)
    x, noise = torch.randn(2, PATCHES, DIM), torch.randn(2, EXPERTS, PATCHES)
    logits = router.module(x).mean(1).detach().double().numpy()
    clean, raw = logits[:, :EXPERTS, None], logits[:, EXPERTS:, None]
    noisy = np.exp(clean + noise.numpy() * (np.log1p(np.exp(raw)) + 0.01))
    for found, e in ((router(x, noise), noisy), (router.eval()(x, noise), np.exp(clean))):
        np.testing.assert_allclose(found.detach().numpy(), e / e.sum(1, keepdims=True), atol=1e-6)
    assert Router(DIM, EXPERTS, noisy=False)(x).shape == (2, EXPERTS, 1)


def test_noise_is_drawn_level_by_level_and_inside_a_level_task_by_task():
    routers, inputs = TaskRouters(DIM, (1, 3), ("edge", "depth"), EXPERTS), experts()
    torch.manual_seed(3)
    drawn = routers(inputs)
    torch.manual_seed(3)
    noise = {f"{level}_{task}": torch.randn(2, EXPERTS, PATCHES) for level in (1, 3) for task in ("edge", "depth")}
    given = routers(inputs, noise)
    for task in ("edge", "depth"):
        for level in (1, 3):
            assert torch.equal(drawn[task][level], given[task][level])
    sum(x.square().sum() for levels in given.values() for x in levels.values()).backward()
    assert all(p.grad.any() for p in routers.parameters())


def test_without_routers_the_experts_are_added_once_for_all_tasks():
    routers, inputs = TaskRouters(DIM, (1,), ("edge", "depth"), EXPERTS, routed=False), experts((1,))
    mixed = routers(inputs)
    assert mixed["edge"][1] is mixed["depth"][1] and not list(routers.parameters())
    torch.testing.assert_close(mixed["edge"][1], sum(inputs[1]))


def test_the_decode_head_gives_a_quarter_of_the_image():
    head = DecodeHead(DIM, 5)
    assert head([torch.randn(2, DIM, 2, 3) for _ in range(4)], (32, 48)).shape == (2, 5, 8, 12)
    with pytest.raises(ValueError, match="shorter|longer"):
        head([torch.randn(2, DIM, 2, 3)], (32, 48))


def test_task_losses_are_means_over_the_valid_pixels():
    valid = torch.rand(2, 1, 6, 7) > 0.3
    binary = torch.where(valid, (torch.rand(2, 1, 6, 7) > 0.5).float(), float(IGNORED))
    classes = torch.where(valid, torch.randint(5, (2, 1, 6, 7)).float(), float(IGNORED))
    out = {"semseg": torch.randn(2, 5, 6, 7), "sal": torch.randn(2, 2, 6, 7), "edge": torch.randn(2, 1, 6, 7),
           "normals": torch.randn(2, 3, 6, 7), "depth": torch.randn(2, 1, 6, 7)}  # fmt: skip
    labels = {"semseg": classes, "sal": binary, "edge": binary}
    labels |= {t: torch.where(valid, torch.rand_like(out[t]), float(IGNORED)) for t in ("normals", "depth")}
    chosen, at = binary[valid], valid[:, 0]
    p = float((chosen == 0).double().mean())
    weights = torch.tensor([1 - p, p])
    log_sal = F.log_softmax(out["sal"], 1).movedim(1, -1)[at]
    probability = torch.sigmoid(out["edge"][valid])
    unit = out["normals"] / out["normals"].norm(dim=1, keepdim=True)
    picked = F.log_softmax(out["semseg"], 1).movedim(1, -1)[at]
    expected = {
        "semseg": -picked[torch.arange(len(picked)), classes[valid].long()].mean(),
        "sal": -(weights[chosen.long()] * log_sal[torch.arange(len(chosen)), chosen.long()]).mean(),
        "edge": -(0.95 * chosen * probability.log() + 0.05 * (1 - chosen) * (1 - probability).log()).mean(),
        "normals": (unit - labels["normals"]).abs().movedim(1, -1)[at].sum(1).mean(),
        "depth": (out["depth"] - labels["depth"])[valid].abs().mean(),
    }
    for task, value in expected.items():
        torch.testing.assert_close(LOSSES[task][1](out[task], labels[task]), value, atol=1e-5, rtol=1e-5)
    weighted = sum(LOSSES[task][0] * value for task, value in expected.items())
    torch.testing.assert_close(total_loss(out, labels, torch.tensor(2.0), 0.5), weighted + 1.0, rtol=1e-5, atol=1e-4)
    nothing = {task: torch.full_like(x, IGNORED) for task, x in labels.items()}
    assert float(total_loss(out, nothing)) == 0
    with pytest.raises(ValueError, match="tasks albedo have no loss; choose among semseg"):
        total_loss({"albedo": out["depth"]}, labels)
