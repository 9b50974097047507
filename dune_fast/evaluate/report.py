"""`report.html` of a run: one file that needs no other, with what the run's folder holds.

Its pictures are inline, it has no script, and what comes out of files is escaped. At most one narrow column is needed:
tables and the configuration scroll on their own.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.config import ConfigError, RunConfig, load_config
from dune_fast.engine.metrics import duration
from dune_fast.engine.run_log import NAME as LOG
from dune_fast.evaluate.figure_numbers import Records
from dune_fast.evaluate.pictures import CAPTIONS, Picture

_WARNING = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ (WARNING|ERROR|CRITICAL) ")
_SHOWN_WARNINGS = 100

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2024; background: #f4f5f7; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid #dde0e4; border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.muted { color: #596270; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #eceef1; }
td { overflow-wrap: anywhere; min-width: 4rem; }
td:first-child { overflow-wrap: normal; }
td.n, th.n { text-align: right; white-space: nowrap; overflow-wrap: normal; }
figure { margin: 0 0 1.2rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: #596270; font-size: .9rem; margin-top: .3rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 0 1.2rem; }
.curves .wide { grid-column: 1 / -1; min-width: 0; }
.wide img { min-width: 720px; }
pre { font: 13px/1.45 ui-monospace, monospace; background: #f4f5f7; padding: .8rem; overflow-x: auto; }
pre { margin: .5rem 0 0; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
"""
_WIDE = ("conflicts", "pca", "attention", "variance")


def write_report(
    run: Path, path: Path, records: Records, pictures: Iterable[Picture], missing: Sequence[str] = ()
) -> None:
    """Writes the report.

    Args:
        run: folder of the run.
        path: of the report.
        records: of its `metrics.jsonl`.
        pictures: to show, in any order.
        missing: sentences on figures that were left out.
    """
    try:
        cfg = load_config(run / "config.yaml")
    except ConfigError:  # of another version: the text is shown all the same
        cfg = None
    name = cfg.name if cfg else run.name
    sections = [
        ("Configuration", _configuration(run, cfg)),
        ("Curves and figures", _figures(pictures, missing)),
        ("Evaluation", _evaluation(run, records)),
        ("Machine", _machine(run)),
        ("Warnings", _warnings(run)),
    ]
    body = "\n".join(f"<section>\n<h2>{title}</h2>\n{text}\n</section>" for title, text in sections)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: report of a run</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(name)}</h1>\n<p class=\"muted\">{escape(_state(run, cfg, records))}</p>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )
    write_whole(path, page.encode())


def _state(run: Path, cfg: RunConfig | None, records: Records) -> str:
    """How far the run is, and when that was."""
    last = max((record["step"] for record in records), default=0)
    total = f" of {cfg.steps:,}" if cfg else ""
    exported = "head.safetensors" if cfg and cfg.head.kind else "student.safetensors"
    ended = (run / exported).is_file() and (cfg is None or last >= cfg.steps)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{'Finished' if ended else 'Not finished'}, step {last:,}{total}; report of {now}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) >= 1000 or 0 < abs(value) < 1e-3 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cell(tag: str, value: Any, right: bool) -> str:
    side = ' class="n"' if right else ""
    return f"<{tag}{side}>{escape('' if value is None else _number(value))}</{tag}>"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers, and the titles above them, stand on the right; everything is escaped."""
    rows = [list(row) for row in rows]
    numeric = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = ["".join(_cell("th", name, right) for name, right in zip(header, numeric, strict=True))] if header else []
    lines += ["".join(_cell("td", value, isinstance(value, (int, float))) for value in row) for row in rows]
    text = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table>\n{text}</table></div>'


def _read_json(path: Path) -> Any:
    """None for a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _optimizer(cfg: RunConfig) -> str:
    """Name, peak of the rate, schedule."""
    peak = cfg.optimizer.peak(cfg.train.global_batch)
    return f"{cfg.optimizer.name}, learning rate {peak:g}, schedule {cfg.optimizer.schedule}"


def _configuration(run: Path, cfg: RunConfig | None) -> str:
    parts = []
    if cfg is not None and cfg.head.kind:
        rows = [
            ("head", cfg.head.kind),
            ("frozen encoder", cfg.head.encoder),
            ("starts from", cfg.head.weights or f"initial weights, seed {cfg.train.seed}"),
            ("length", f"{cfg.steps:,} steps of {cfg.train.global_batch:,} examples"),
            ("optimizer", _optimizer(cfg)),
        ]
        parts.append(_table((), rows))
    elif cfg is not None:
        s, projector = cfg.student, f"{cfg.projector.kind}, {cfg.objective.sharing} data sharing"
        narrowed = f"{cfg.start.blocks} blocks out of teacher {cfg.start.teacher}" if cfg.start.teacher else ""
        weights = cfg.student_weights or narrowed or f"initial weights, seed {cfg.train.seed}"
        fitted = ", projectors fitted" if cfg.start.fit_projectors else ""
        rows = [
            ("student", f"{s.depth} blocks of {s.embed_dim} channels, patches of {s.patch_size} px, "
             f"{s.num_registers} registers, images of {cfg.image_size} px"),
            ("starts from", weights + fitted),
            ("projectors", projector),
            *((f"teacher {name}", f"{t.family}, {t.weights or t.model}, {t.num_features} channels, "
               f"{' and '.join(t.token_types)} tokens") for name, t in cfg.teachers.items()),
            ("data", ", ".join(cfg.data.datasets)),
            ("length", f"{cfg.steps:,} steps of {cfg.train.global_batch:,} images"),
            ("optimizer", f"{_optimizer(cfg)}, {cfg.train.precision}"),
            ("teacher dropping", f"{cfg.objective.drop_probability:g}"
             f"{', drawn before the forward pass' if cfg.objective.presample else ''}"),
        ]  # fmt: skip
        parts.append(_table((), rows))
    try:
        text = (run / "config.yaml").read_text(errors="replace")
    except OSError:
        text = "missing"
    parts.append(f"<details>\n<summary>config.yaml</summary>\n<pre>{escape(text)}</pre>\n</details>")
    return "\n".join(parts)


def _figures(pictures: Iterable[Picture], missing: Sequence[str]) -> str:
    given = {picture.name: picture for picture in pictures}
    shown = []
    for name, caption in CAPTIONS.items():
        if name in given:
            data = base64.b64encode(given[name].png).decode()
            wide = ' class="wide"' if name in _WIDE else ""
            shown.append(
                f'<figure{wide}>\n<div class="scroll"><img alt="{escape(caption)}" '
                f'src="data:image/png;base64,{data}"></div>\n<figcaption>{escape(caption)}</figcaption>\n</figure>'
            )
    notes = [f'<p class="muted">Left out: {escape(text)}</p>' for text in missing]
    if not {"attention", "variance"} & given.keys() and not missing:
        notes.append('<p class="muted"><code>dune-fast figures RUN</code> adds the figures of features.</p>')
    return "\n".join([f'<div class="curves">\n{chr(10).join(shown)}\n</div>', *notes])


def _evaluation(run: Path, records: Records) -> str:
    parts = []
    held_out = _read_json(run / "held_out.json")
    if isinstance(held_out, dict):
        windows = held_out.pop("window_knn", None)
        students = {name: found for name, found in held_out.items() if isinstance(found, dict)}
        first = next(iter(students.values()), {})
        rows = [
            [teacher, token, *(cosines.get(teacher, {}).get(token) for cosines in students.values())]
            for teacher, tokens in first.items()
            for token in tokens
        ]
        parts.append("<h3>Cosine similarity to the teachers on held-out images</h3>")
        parts.append(_table(["teacher", "tokens", *students], rows))
        parts.append(f'<p class="muted">{escape(_number(held_out.get("images")))} images</p>')
        if isinstance(windows, dict) and windows:
            parts.append("<h3>k-NN: windows that find their own photograph</h3>")
            parts.append(_table(["features", "share"], windows.items()))
    for path in sorted((run / "evaluation").glob("*.json")):
        result = _read_json(path)
        metrics = result.get("metrics") if isinstance(result, dict) else None
        if not isinstance(metrics, dict):
            continue
        options = result.get("options") if isinstance(result.get("options"), dict) else {}
        changed = result.get("changed") or []
        parts.append(f"<h3>{escape(str(result.get('task', path.stem)))}: {escape(str(options.get('data', '')))}</h3>")
        parts.append(_table(["metric", "value"], metrics.items()))
        if changed:
            parts.append(f'<p class="muted">Not by the recipe: {escape(", ".join(map(str, changed)))}</p>')
    evaluations = [r for r in records if "evaluation_seconds" in r or "held_out_images" in r]
    if evaluations:
        last = evaluations[-1]
        left_out = ("step", "images", "evaluation_seconds")
        parts.append(f"<h3>While the run went on, after step {escape(_number(last['step']))}</h3>")
        parts.append(_table(["metric", "value"], [(k, v) for k, v in last.items() if k not in left_out]))
    nothing = '<p class="muted">Nothing has been evaluated yet: <code>dune-fast evaluate RUN</code>.</p>'
    return "\n".join(parts) or nothing


def _machine(run: Path) -> str:
    record = _read_json(run / "run.json")
    starts = record.get("starts") if isinstance(record, dict) else None
    starts = [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    if not starts:
        return '<p class="muted">run.json is missing or damaged.</p>'
    last = starts[-1]
    rows = [(key, last.get(key)) for key in ("host", "platform")]
    world = last.get("world") or {}
    hosts = world.get("hosts") or {}
    rows += [(f"devices of {host}", ", ".join(map(str, devices))) for host, devices in hosts.items()]
    rows += [("processes", f"{world.get('ranks', '?')} ({world.get('backend', '?')})")]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in (last.get("versions") or {}).items()))]
    if git := last.get("git"):
        changed = f", {len(git['changed'])} files changed" if git.get("changed") else ""
        rows += [("source", f"{git.get('commit')} ({git.get('branch')}){changed}")]
    rows += [("arguments", " ".join(map(str, last.get("arguments") or [])))]
    if estimate := last.get("estimate"):
        rate, hours = estimate.get("images_per_second"), estimate.get("hours")
        if isinstance(rate, (int, float)) and isinstance(hours, (int, float)):
            rows += [("estimate", f"{rate:.1f} images/s, {duration(3600 * hours)} for the whole run")]
    parts = [_table((), rows)]
    if len(starts) > 1:
        parts.append("<h3>Starts</h3>")
        rows = [[start.get(key) for key in ("time", "step", "host")] for start in starts]
        parts.append(_table(["time", "after step", "host"], rows))
    return "\n".join(parts)


def _warnings(run: Path) -> str:
    try:
        lines = (run / LOG).read_text(errors="replace").splitlines()
    except OSError:
        return f'<p class="muted">{LOG} is missing.</p>'
    found = [line for line in lines if _WARNING.match(line)]
    if not found:
        return f'<p class="muted">None in {LOG}.</p>'
    shown = found[-_SHOWN_WARNINGS:]
    note = "" if shown == found else f'<p class="muted">The last {len(shown)} of {len(found):,}.</p>\n'
    text = escape("\n".join(shown))
    return f'{note}<pre class="wrap">{text}</pre>'
