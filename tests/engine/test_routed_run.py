"""A whole run whose teachers see only the images that count for them."""

from __future__ import annotations

import pytest

from dune_fast.dali_pipelines.datasets import DatasetConfig
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import Trainer


def test_a_routed_run_trains_and_its_teachers_see_their_own_images(overrides, photos, tmp_path):
    cfg = compose_config([
        *overrides, "objective.sharing=none", "objective.route_by_dataset=true", "teachers.two.groups=[3d]",
        "train.steps=4", "evaluation.held_out=false",
    ])  # fmt: skip
    cfg.data.datasets["more"] = DatasetConfig(str(photos), group="3d")
    trainer = Trainer(cfg)
    seen, wanted = [], []
    plain = trainer.train_step
    trainer.train_step = lambda batch: (wanted.append((batch.group == 1, batch.group_on_host)), plain(batch))[1]
    for name in cfg.teachers:
        trunk = trainer.teachers.teachers[name].trunk
        trunk.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, len(args[0]))))
    trainer.run()
    assert trainer.loader.groups == ["3d", "generic"]
    assert seen[:2] == [("one", 1), ("two", 1)]  # what counts the operations, before the first step
    for (generic, on_host), of_one, of_two in zip(wanted, seen[2::2], seen[3::2], strict=True):
        assert on_host.tolist() == generic.long().tolist()
        assert of_one == ("one", int(generic.sum())) and of_two == ("two", 8 - int(generic.sum()))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 4 and all(0 < record["share/two"] < 1 for record in records)


def test_routing_of_shared_data_is_refused(overrides):
    with pytest.raises(ConfigError, match="route_by_dataset is true, but with objective.sharing=full"):
        compose_config([*overrides, "objective.route_by_dataset=true"])
