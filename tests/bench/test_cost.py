"""bench.cost: arithmetic, the rule of what is level, verdicts, the page, a step at DUNE's proportions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench.cost.__main__ import RESULTS, main
from bench.cost.arithmetic import Arithmetic, arithmetic_of_rows, pays_off_after
from bench.cost.figure import spread_out, write_figure
from bench.cost.options import CACHES, DRAWN, LIVE, cache_words, cost_cells, options, smoke_options, views
from bench.cost.step import LIVE as LIVE_STEP
from bench.cost.step import in_turns, reduced_config, time_variants
from bench.cost.table import differences, page, rows_of, standing, verdicts
from bench.proof.cells import SMOKE, Cell, Settings, read_results, seconds_of_steps
from bench.step_variants import Variant
from dune_fast.cache.store import Store
from dune_fast.engine.config import compose_config

TERA = 10**12
COSTS = {
    DRAWN: Arithmetic(5 * TERA, 12 * TERA),
    LIVE: Arithmetic(5 * TERA, 12 * TERA),
    "cached": Arithmetic(0, 6 * TERA, 20 * TERA, 0.27),
    "half cached": Arithmetic(0, 3 * TERA, 20 * TERA, 0.14),
    "short": Arithmetic(2 * TERA, 4 * TERA, at_dune=1 / 3),
    "middling": Arithmetic(3 * TERA, 8 * TERA, at_dune=0.6),
}
SEEDS = range(8)


def made_up(**levels: float) -> tuple[list[Cell], dict]:
    """Cells and results: 0.5 in every metric but for `levels`, seeds far apart and differences between rows small."""
    cells = [Cell(row, "student", seed, "cost", 120) for seed in SEEDS for row in COSTS]
    results = {}
    for cell in cells:
        at = {DRAWN: 0.2}.get(cell.row, 0.5) + levels.get(cell.row.replace(" ", "_"), 0.0)
        wobble = 0.0 if cell.row == LIVE else 0.004 * (-1) ** cell.seed
        value = at + 0.05 * cell.seed + wobble
        results[cell.name] = {
            "values": {"knn_cls": value, "iou": value, "match": value},
            "seconds": {"training": 60.0, "steps": 50.0, "evaluation": 9.0},
            "machine": {"device": "cpu", "threads": 1},
        }
    return cells, results


def rows_like(**levels: float) -> dict:
    return rows_of(*made_up(**levels), COSTS)


def test_operations_of_the_options():
    chosen = [LIVE, "cached", "progressive", "half scale", "a third of the steps", "cached, two thirds of the steps"]
    cells = cost_cells(options(), 1)
    chosen.append("cached, batches of eight, no dropping")
    found = arithmetic_of_rows([cell for cell in cells if cell.row in chosen], Settings())
    live, cached = found[LIVE], found["cached"]
    assert live.build == 0 and live.first == live.run
    assert cached.teachers == 0 and cached.run == live.run - live.teachers
    # a build sees every image once, a run of 120 steps 1,920
    assert cached.build * 120 * 16 == live.teachers * 7000
    assert pays_off_after(cached, live) == pytest.approx(7000 / 1920)
    assert 3 * found["a third of the steps"].run == live.run
    assert found[chosen[-1]].run == found["cached, two thirds of the steps"].run  # images count, not steps
    # DUNE's teachers are 73 % of its arithmetic; 168 of 336 px for half of the steps are a little under 5/8 of it
    assert (live.at_dune, round(cached.at_dune, 2)) == (1.0, 0.27)
    assert 0.6 < found["progressive"].at_dune < 0.63 and 0.43 < found["half scale"].at_dune < 0.45


def test_rows_are_compared_seed_by_seed():
    """Seeds are 0.1 apart, and still a difference of 0.02 shows; one of 0.001 does not."""
    found = differences(rows_like(short=-0.02, cached=0.001, middling=0.02))
    value, own, limit = found["short"]["iou"]
    assert value == pytest.approx(-0.02) and own == pytest.approx(0.004276, abs=1e-5)
    assert limit == pytest.approx(2 * 0.004276 / 8**0.5, abs=1e-5)  # pooled: all rows differ alike
    stands = {row: standing(diffs["iou"]) for row, diffs in found.items()}
    assert (stands["short"], stands["cached"], stands["middling"], stands[DRAWN]) == (
        "below",
        "level",
        "above",
        "below",
    )
    assert LIVE not in found


def test_a_few_seeds_say_nothing_of_what_is_level():
    cells, results = made_up(short=-0.02)
    found = differences(rows_of(cells, {name: r for name, r in results.items() if name[-1] in "01"}, COSTS))
    assert found["short"]["iou"][2] is None and standing(found["short"]["iou"]) == ""
    assert verdicts(rows_of(cells, {}, COSTS)) == []


def test_the_noise_of_the_row_from_drawn_weights_widens_no_limit():
    cells, results = made_up()
    for seed in SEEDS:
        results[f"live_from_drawn_weights-{seed}"]["values"]["iou"] = 0.9 * (seed % 2)
    assert differences(rows_of(cells, results, COSTS))["short"]["iou"][2] < 0.01


def test_verdicts_pass_and_fail():
    ratios = {"cached, int8": 3.6, "cached, fp32": 2.9}
    checks = verdicts(rows_like(), {"ratios": ratios})
    assert [holds for holds, _ in checks] == [True, True, True, True, True, False]
    assert "`short` (0.33)" in checks[0][1] and "`half cached` (0.25)" in checks[1][1]
    # a run by itself pays for the build: no cached row may take its place
    checks = verdicts(rows_like(short=-0.02))
    assert [holds for holds, _ in checks] == [False, True, True, True] and "IoU -0.020" in checks[0][1]
    checks = verdicts(rows_like(short=-0.02, half_cached=-0.01))
    assert [holds for holds, _ in checks] == [False, False, True, True] and "`cached` (0.27)" in checks[2][1]
    checks = verdicts(rows_like(short=-0.4))
    assert not checks[3][0] and "against `live, from drawn weights`" in checks[3][1]


def test_one_metric_below_is_enough_to_fail():
    cells, results = made_up(short=0.02)
    for seed in SEEDS:
        results[f"short-{seed}"]["values"]["match"] -= 0.05
    assert not verdicts(rows_of(cells, results, COSTS))[0][0]


def test_the_page_from_jsons_alone(tmp_path):
    cells, results = made_up(middling=-0.02)
    del results["short-1"]
    step = {
        "about": "How.", "ratios": {"cached, int8": 4.0},
        "steps": {
            "live": {"seconds": 2.0, "range": [1.9, 2.1], "arithmetic": 1.0},
            "cached, int8": {"seconds": 0.5, "range": [0.5, 0.5], "arithmetic": 3.7},
        },
    }  # fmt: skip
    text = page(cells, results, COSTS, Settings(), 16, step)
    assert "| cached | 8 | 120 | 0.00 | 6.00 | 0.50 | 2.17 | 0.27 | 50 | 0.675 ± " in text
    assert (
        "| middling | 8 | -0.020 ± 0.004 below |" in text
        and "| cached, int8 | 0.50 (0.50 to 0.50) | 4.00 | 3.70 |" in text
    )
    assert "pays off after 4.0 such runs" in text and "Not run yet: short-1." in text and "47 of 48 cells" in text
    write_figure(tmp_path, rows_of(cells, results, COSTS))
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "quality.csv").read_text().count("\n") == 1 + len(COSTS)


def test_labels_meet_neither_each_other_nor_a_point():
    points = [(0.5, 0.5), (0.5, 0.5), (0.51, 0.5), (0.02, 0.98), (0.98, 0.02)]
    placed = spread_out(points, (0.05, 0.05))
    for i, (x, y) in enumerate(placed):
        assert 0 <= x <= 1 and 0 <= y <= 1
        assert all(abs(x - a) >= 0.05 or abs(y - b) >= 0.05 for a, b in placed[:i])
        assert all(abs(x - a) > 0.02 or abs(y - b) > 0.02 for a, b in points)


def test_seconds_are_of_the_steps_alone(tmp_path):
    records = [{"step": 1, "step_seconds": 2.0}, {"step": 20, "step_seconds": 0.5}, {"step": 20, "held_out_images": 3}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert seconds_of_steps(tmp_path / "metrics.jsonl") == 2.0 + 19 * 0.5


def test_the_smoke_run_has_the_same_rows_in_short():
    whole, small = options(), smoke_options(SMOKE)
    assert [o.row for o in small] == [o.row for o in whole] and max(o.steps for o in small) <= 10
    names = [cell.name for cell in cost_cells(whole)]
    assert len(set(names)) == len(names)
    cached = next(cell for cell in cost_cells(whole) if cell.row == "cached")
    assert cache_words(cached) == [f"cache.folder=${{oc.env:{CACHES}}}/seed0", "data.views=1"]
    assert not cache_words(dataclasses.replace(cached, overrides=("data.views=1",)))


def test_caches_of_other_images_or_views_lie_elsewhere_and_are_counted():
    cells = {cell.row: cell for cell in cost_cells(options(), 1)}
    names = ("cached", "few images, cached", "few images, cached, four views")
    folders = {next(w for w in cells[name].overrides if w.startswith("cache.folder=")) for name in names}
    assert len(folders) == 3
    assert [views(cells[name], Settings()) for name in names] == [7000, 300, 1200]
    few = [word for word in cells["few images"].overrides if word.startswith("data.datasets.")]
    assert len(few) == 3 and set(few) < set(cache_words(cells["few images, cached"]))  # its build is of them alone
    cfg = compose_config(["experiment=proof", "start.teacher=", *few])
    assert cfg.data.datasets["objects"].pattern == "00[0-1]*.jpg"


def test_steps_take_turns():
    order = []
    found = in_turns({name: (lambda i, name=name: order.append((i, name))) for name in "ab"}, 2)
    assert order == [(i, name) for i in range(3) for name in "ab"] and [len(v) for v in found.values()] == [2, 2]


def test_a_reduced_step_has_dunes_proportions_and_reads_a_cache(tmp_path, monkeypatch):
    """Some seconds: three trainers, of a student of 12 blocks and three teachers of 24."""
    read = []
    monkeypatch.setattr(Store, "read", lambda self, views, *a, of=Store.read: read.append(views) or of(self, views, *a))
    cfg = reduced_config(tmp_path, narrower=16, batch=3)
    assert cfg.image_size == 84 and cfg.student.depth == 12 and cfg.student.embed_dim == 48
    found = time_variants(cfg, tmp_path, (Variant(LIVE_STEP, ""),), ("int8",), {"smaller": 2}, 1)
    assert set(found["steps"]) == {"live", "cached, int8", "smaller"} and all(len(views) == 3 for views in read)
    assert len(read) >= 2  # decoded ahead
    assert found["teachers_share"] == pytest.approx(0.726, abs=0.02)
    assert found["steps"]["cached, int8"]["arithmetic"] == pytest.approx(1 / (1 - found["teachers_share"]))
    assert found["steps"]["smaller"]["arithmetic"] > 3


@pytest.mark.slow
def test_the_committed_page_is_that_of_the_committed_jsons(tmp_path):
    cells = cost_cells(options())
    results = read_results(RESULTS, cells)
    (tmp_path / "cells").mkdir()
    for path in [*(RESULTS / "cells").glob("*.json"), RESULTS / "step.json"]:
        (tmp_path / path.relative_to(RESULTS)).write_bytes(path.read_bytes())
    assert results and main(["--table", "--results", str(tmp_path)]) == 0
    for name in ("README.md", "quality.csv"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


@pytest.mark.slow
def test_the_command_from_images_to_page(tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = ["--smoke", "--work", str(tmp_path), "--only", "live-0,cached-0,progressive-0", "--jobs", "1"]
    assert main(arguments) == 0
    folder: Path = tmp_path / "cost_smoke" / "results"
    text = (folder / "README.md").read_text()
    assert all(f"| {row} | 1 |" in text for row in ("live", "cached", "progressive"))
    assert (folder / "quality.png").is_file() and (
        tmp_path / "cost_smoke" / "caches" / "seed0" / "cache.json"
    ).is_file()
    caplog.clear()
    assert main([*arguments, "--list"]) == 0
    assert caplog.text.count("finished") == 3
