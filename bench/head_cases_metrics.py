"""Reference cases of the metrics of poses, through the code that `dune-fast evaluate --task mapfree | pose` runs."""

from __future__ import annotations

import torch

from bench.case import Case, Check, relative_error
from dune_fast.evaluate.pose_metrics import MAA_THRESHOLDS, direction_errors, pose_accuracies, rotation_errors
from dune_fast.evaluate.relocalisation import Pose, mapfree_metrics, scene_errors

TOLERANCE = 1e-6


def run_mapfree_metric(case: Case) -> list[Check]:
    names = {"trans_err": "translation", "rot_err": "rotation", "reproj_err": "reprojection"}
    checks, scenes, missing = [], [], 0
    for scene in range(case.info["scenes"]):
        rows = case[f"in/scene{scene}"]
        kept = rows[rows[:, -1] == 0]
        missing += len(rows) - len(kept)
        poses = [[Pose(tuple(r[:4]), tuple(r[4:7]), r[14]) for r in part.tolist()] for part in (
            kept, torch.cat([kept[:, 7:14], kept[:, 7:]], 1)
        )]  # fmt: skip
        fx, cx, cy = kept[:, 15:18].unbind(1)
        size = torch.tensor(case.info["size"], dtype=torch.float64).expand(len(kept), 2)
        scenes.append(scene_errors(poses[1], poses[0], torch.cat([torch.stack([fx, fx, cx, cy], 1), size], 1)))
        expected = case.under(f"out/scene{scene}")
        checks += [
            Check(f"scene{scene}/{name}", relative_error(getattr(scenes[-1], names.get(name, name)), x), TOLERANCE)
            for name, x in expected.items()
        ]
    assert missing == case.info["failures"]
    return checks + _numbers(mapfree_metrics(scenes, missing), case.info["aggregate"])


def run_pose_maa(case: Case) -> list[Check]:
    rotation = rotation_errors(case["in/R_est"], case["in/R_true"])
    translation = direction_errors(case["in/t_est"], case["in/t_true"])
    found = {"rotation_error": rotation, "translation_error": translation}
    checks = [Check(name, relative_error(x, case[f"out/{name}"]), TOLERANCE) for name, x in found.items()]
    expected = {f"RRA@{t}": value for t, value in case.info["rra"].items()}
    expected |= {f"RTA@{t}": value for t, value in case.info["rta"].items()}
    expected |= {f"mAA({t})": case.info["maa"][str(t)] for t in MAA_THRESHOLDS}
    return checks + _numbers(pose_accuracies(rotation, translation), expected)


def _numbers(ours: dict[str, float], expected: dict[str, float]) -> list[Check]:
    """A check of each expected number, by its name."""
    assert ours.keys() == expected.keys()
    return [
        Check(name, relative_error(torch.tensor(ours[name]), torch.tensor(value)), TOLERANCE)
        for name, value in expected.items()
    ]


RUNNERS = {"mapfree_metric": run_mapfree_metric, "pose_maa": run_pose_maa}
"""Kind of a case -> what recomputes it."""
