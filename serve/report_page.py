"""A gate's report as one page: figures beside their limits, the course of the training, the answers.

It stands alone: no script, and nothing is fetched.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2430}
h1{font-size:1.4rem} h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%} td,th{padding:.3rem .6rem;border-bottom:1px solid #dde3ea;text-align:left}
.ok{color:#13734a}.short{color:#b3261e} svg{width:100%;height:auto;background:#f7f9fb}
"""
_ROWS = (
    ("recall", "facts recalled, wordings never trained on", "recall", True),
    ("reverse", "asked the other way round", "reverse", True),
    ("earlier", "what the version before held", "earlier", True),
    ("leak", "unknown people given a trained fact", "leak", False),
    ("nll_rise", "loss on unrelated text, rise", "nll_rise", False),
)
_LINES = (("loss", "#1c5fa8"), ("answer loss", "#c25a00"), ("KL to the base", "#4b8b3b"))
_WIDTH, _HEIGHT, _EDGE = 800, 260, 40


def page(report: Mapping[str, Any]) -> str:
    """The page of a consolidation's report as ``GET /v1/jobs/{id}/report`` answers it."""
    name, passed = report["adapter"], not report["short"]
    verdict = "passed" if passed else "; ".join(report["short"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>{_STYLE}</style><h1>Adapter {escape(name)}: "
        f'<span class="{"ok" if passed else "short"}">{escape(verdict)}</span></h1>'
        f"<p>Job {escape(report['job'])}, {escape(report['state'])}</p>"
        f"<h2>Figures</h2>{_bars(report['figures'], report['limits'])}"
        f"<h2>Training</h2>{_curves(report['history'])}"
        f"<h2>Answers</h2>{_answers(report['answers'])}</html>"
    )


def _bars(figures: Mapping[str, float | None], limits: Mapping[str, float]) -> str:
    rows = []
    for key, text, limit, is_least in _ROWS:
        value = figures.get(key)
        if value is None:
            continue
        bound = limits[limit]
        good = value >= bound if is_least else value <= bound
        width = max(0.0, min(1.0, value)) * 240
        mark = max(0.0, min(1.0, bound)) * 240
        bar = (
            '<svg viewBox="0 0 240 14" style="width:240px"><title>limit '
            f'{bound:.0%}</title><rect width="{width:.1f}" height="14" '
            f'fill="{"#7fbf9f" if good else "#e0958f"}"/>'
            f'<line x1="{mark:.1f}" x2="{mark:.1f}" y2="14" stroke="#1c2430" stroke-width="2"/></svg>'
        )
        sign = "≥" if is_least else "≤"
        rows.append(
            f'<tr><td>{escape(text)}<td class="{"ok" if good else "short"}">{value:.1%}'
            f"<td>{sign} {bound:.0%}<td>{bar}"
        )
    return f"<table><tr><th>what<th>found<th>limit<th>{''.join(rows)}</table>"


def _curves(history: Sequence[Sequence[float]]) -> str:
    if len(history) < 2:
        return "<p>Fewer than two steps.</p>"
    highest = max(value for step in history for value in step) or 1.0
    wide, high = _WIDTH - 2 * _EDGE, _HEIGHT - 2 * _EDGE
    lines, legend = [], []
    for column, (text, colour) in enumerate(_LINES):
        points = " ".join(
            f"{_EDGE + wide * i / (len(history) - 1):.1f},{_EDGE + high * (1 - step[column] / highest):.1f}"
            for i, step in enumerate(history)
        )
        lines.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>'
        )
        legend.append(
            f'<text x="{_EDGE + 10 + 150 * column}" y="20" fill="{colour}">{escape(text)}</text>'
        )
    base = _HEIGHT - _EDGE
    axes = (
        f'<line x1="{_EDGE}" y1="{base}" x2="{_WIDTH - _EDGE}" y2="{base}" stroke="#8794a5"/>'
        f'<line x1="{_EDGE}" y1="{_EDGE}" x2="{_EDGE}" y2="{base}" stroke="#8794a5"/>'
        f'<text x="4" y="{_EDGE + 5}" font-size="12">{highest:.2f}</text>'
        f'<text x="4" y="{base}" font-size="12">0</text>'
        f'<text x="{_WIDTH - _EDGE - 60}" y="{base + 18}" font-size="12">{len(history)} steps</text>'
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="loss by step">'
        f"{axes}{''.join(lines)}{''.join(legend)}</svg>"
    )


def _answers(answers: Sequence[Mapping[str, Any]] | None) -> str:
    if answers is None:
        return "<p>A memory that they speak of has changed or is gone, and they went with it.</p>"
    rows = []
    for answer in answers:
        good = answer["holds"] != (answer["kind"] == "leak")
        rows.append(
            f"<tr><td>{escape(answer['kind'])}<td>{escape(answer['question'])}"
            f'<td class="{"ok" if good else "short"}">{escape(answer["said"])}'
            f"<td>{escape(', '.join(answer['expected']))}"
        )
    return f"<table><tr><th>kind<th>asked<th>said<th>expected{''.join(rows)}</table>"
