"""The report of a run: one well-formed page without scripts, which nothing in the run's files can break."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
from html.parser import HTMLParser

import pytest
from PIL import Image

from dune_fast import train
from dune_fast.engine.config import compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate import live_report, pictures
from dune_fast.evaluate.in_run import InRunEvaluation
from dune_fast.evaluate.live_report import LiveReport
from dune_fast.evaluate.pictures import curves
from dune_fast.evaluate.report import write_report
from tests.engine.conftest import overrides, small_run

__all__ = ["overrides"]  # fixture

EVIL = "<script>alert('x')</script>\"&<b>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in order and keeps what is in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(run, **options) -> Page:
    records = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    write_report(run, run / "report.html", records, list(curves(records)), **options)
    return Page((run / "report.html").read_text())


def test_the_page_needs_no_other_file(finished):
    page = report(finished)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not any(name.startswith("on") or name in ("href", "srcset", "style") for name, _ in page.attributes)
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 2 and page.tags.count("img") == 2
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))).verify()
    style = re.search(r"<style>(.*?)</style>", (finished / "report.html").read_text(), re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert ("name", "viewport") in page.attributes


def test_it_holds_configuration_machine_evaluation_and_warnings(finished):
    (finished / "held_out.json").write_text(
        json.dumps({"images": 4, "before": {"one": {"cls": 0.1234}}, "after": {"one": {"cls": 0.8765}}})
    )
    (finished / "evaluation").mkdir()
    result = {"task": "knn", "metrics": {"cls/k=10": 0.4321}, "options": {"data": "/pets"}, "changed": ["batch"]}
    (finished / "evaluation" / "knn_pets.json").write_text(json.dumps(result))
    with (finished / "log.txt").open("a") as log:
        log.write("2026-01-01 00:00:00,000 INFO harmless\n2026-01-01 00:00:00,000 WARNING the disk is full\n")
    text = report(finished, missing=["pca: no teacher"]).text
    start = json.loads((finished / "run.json").read_text())["starts"][-1]
    for expected in (
        "Finished, step 6 of 6", "teacher two", "6 steps of 8 images", "output_dir:", "0.1234", "0.8765", "knn: /pets",
        "0.4321", "Not by the recipe: batch", start["host"], start["versions"]["torch"], "the disk is full",
        "Left out: pca: no teacher", "adamw, learning rate 0.0015625, schedule dune, fp32",
    ):  # fmt: skip
        assert expected in text, expected
    assert "harmless" not in text


def test_a_run_that_goes_on_says_so(finished):
    (finished / "student.safetensors").unlink()
    assert "Not finished, step 6 of 6" in report(finished).text


def test_what_comes_out_of_files_is_escaped(finished):
    config = (finished / "config.yaml").read_text()
    (finished / "config.yaml").write_text(
        config.replace("name: run\n", f"name: {json.dumps(EVIL)}\n").replace("  two:", f"  {json.dumps(EVIL)}:")
    )
    (finished / "held_out.json").write_text(json.dumps({"images": EVIL, EVIL: {EVIL: {EVIL: EVIL}}}))
    (finished / "evaluation").mkdir()
    result = {"task": EVIL, "metrics": {EVIL: EVIL}, "options": {"data": EVIL}, "changed": [EVIL]}
    (finished / "evaluation" / "x.json").write_text(json.dumps(result))
    start = {
        "host": EVIL, "platform": EVIL, "world": {"ranks": EVIL, "backend": EVIL, "hosts": {EVIL: [EVIL]}},
        "versions": {EVIL: EVIL}, "git": {"commit": EVIL, "branch": EVIL, "changed": []}, "arguments": [EVIL],
        "time": EVIL, "step": EVIL, "estimate": {"images_per_second": EVIL},
    }  # fmt: skip
    (finished / "run.json").write_text(json.dumps({"starts": [start, start]}))
    (finished / "log.txt").write_text(f"2026-01-01 00:00:00,000 WARNING {EVIL}\n")
    records = [{"step": 1, "evaluation_seconds": 1.0, f"held_out/{EVIL}": EVIL}]
    write_report(finished, finished / "report.html", records, [], [EVIL])
    page = Page((finished / "report.html").read_text())
    assert not {"script", "b"} & set(page.tags)
    assert page.text.count(EVIL) > 25


@pytest.mark.parametrize("damage", ["missing", "no JSON", "[1, 2]", '{"starts": [3, {"world": null}], "before": 1}'])
def test_files_that_are_missing_or_damaged_cost_their_section_alone(finished, damage):
    (finished / "evaluation").mkdir()
    for name in ("run.json", "held_out.json", "evaluation/knn.json", "log.txt", "config.yaml", "metrics.jsonl"):
        if damage == "missing":
            (finished / name).unlink(missing_ok=True)
        elif name != "metrics.jsonl":
            (finished / name).write_text(damage)
    page = report(finished)
    assert page.tags.count("section") == 5


def test_a_report_that_fails_costs_a_warning(finished, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(pictures, "curves", broken)
    LiveReport(finished).write(finished=True)
    assert "report.html could not be written: no fonts" in caplog.text
    assert not (finished / "report.html").exists()


def test_reports_take_a_hundredth_of_the_time(finished, monkeypatch):
    now, cost = [1000.0], 2.0
    monkeypatch.setattr(live_report.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pictures, "curves", lambda records: now.__setitem__(0, now[0] + cost) or [])
    path, live = finished / "report.html", LiveReport(finished)

    def written(after: float, **options) -> bool:
        now[0] += after
        path.unlink(missing_ok=True)
        live.write(**options)
        return path.exists()

    assert written(0)
    assert not written(199)
    assert written(2)
    assert written(0, finished=True)


def test_a_long_run_is_thinned_while_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(live_report, "_RECORDS", 10)
    lines = [json.dumps({"step": i, "loss": 1.0}) for i in range(101)]
    lines.insert(50, json.dumps({"step": 49, "evaluation_seconds": 1.0}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 101, "lo')
    found = live_report._some_records(tmp_path / "metrics.jsonl")
    steps = [record["step"] for record in found]
    assert 9 <= len(found) <= 12 and steps == sorted(steps) and any("loss" not in record for record in found)


def test_the_report_while_a_run_goes_on_has_the_evaluation(overrides, tmp_path, monkeypatch):
    pages = []
    write = LiveReport.write

    def kept(self, *args, **options):
        write(self, *args, **options)
        pages.append((tmp_path / "run" / "report.html").read_text())

    monkeypatch.setattr(LiveReport, "write", kept)
    cfg = compose_config([*overrides, "logging.tensorboard=false", "evaluation.every=4"])
    with InRunEvaluation(cfg) as evaluate:
        Trainer(cfg, evaluate).run()
    assert len(pages) == 2  # the second one is too soon and leaves the first one there
    first = Page(pages[0])
    assert "Not finished, step 4 of 6" in first.text and "held_out/one" in first.text
    assert first.tags.count("img") == 3 and pages[1] == pages[0]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_ends_with_a_report_and_no_drawing_fails_it(photos, tmp_path, monkeypatch, fails):
    from dune_fast.evaluate import figures

    run = tmp_path / "run"
    if fails:
        monkeypatch.setattr(figures, "_save", lambda *_, **__: 1 / 0)
    arguments = [*small_run(photos, run), "logging.tensorboard=false", "evaluation.figures=true", "train.steps=2"]
    assert train.main(arguments) == 0
    assert (run / "student.safetensors").is_file() and (run / "held_out.json").is_file()
    assert (run / "report.html").is_file() is not fails
    if fails:
        warnings = re.findall("WARNING (.*): division by zero", (run / "log.txt").read_text())
        assert warnings == ["the figures could not be drawn", f"{run / 'report.html'} could not be written"]
    else:
        page = Page((run / "report.html").read_text())
        assert "Finished, step 2 of 2" in page.text and page.tags.count("img") == 3  # with pca.png


def test_a_run_that_a_signal_stops_leaves_a_report(photos, tmp_path, monkeypatch):
    step = Trainer.train_step

    def stopping(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    run = tmp_path / "run"
    assert train.main([*small_run(photos, run), "logging.tensorboard=false"]) == 0
    assert "Not finished, step 3 of 6" in Page((run / "report.html").read_text()).text
