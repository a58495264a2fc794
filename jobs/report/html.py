"""The HTML of a report: one file, nothing loaded from outside, no script."""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from jobs.report.run_data import RunData
from jobs.report.statistics import ClassFigures, RunStats, data_set, ending, moment, percent
from jobs.text import duration, number

OPEN_ROWS = 30  # rows of a table that stand open; a longer one is folded

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --grey: #616e7c; --pale: #e4e7eb; --back: #fff; --card: #f5f7fa;
  --loud: #b34700; --good: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --grey: #9aa5b1; --pale: #323f4b; --back: #14191f;
  --card: #1f2730; --loud: #ff9d5c; --good: #6cc0f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 903px; padding: 20px 24px 48px; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4em 0 .1em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2em 0 .6em; }
p { margin: 0 0 .8em; }
.grey { color: var(--grey); }
.notice { border: 2px solid var(--loud); border-radius: 8px; color: var(--loud); font-weight: 700; padding: 8px 14px; }
.cards { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr));
  margin: 1.2em 0; padding: 0; }
.cards div { background: var(--card); border-radius: 8px; padding: 10px 14px; }
.cards dt { color: var(--grey); font-size: .85rem; }
.cards dd { font-size: 1.3rem; font-weight: 650; margin: 0; white-space: nowrap; }
.facts { display: grid; gap: 2px 20px; grid-template-columns: max-content 1fr; margin: 0 0 1.8em; }
.facts dt { color: var(--grey); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0 0 1.6em; }
figure img { background: #fff; border-radius: 8px; display: block; height: auto; width: 100%; }
.framed img { border: 1px solid var(--pale); }
figcaption { color: var(--grey); margin-top: .4em; }
.wide { margin-bottom: .6em; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { border-bottom: 1px solid var(--pale); padding: 5px 18px 5px 0; text-align: right; vertical-align: top;
  white-space: nowrap; }
th { color: var(--grey); font-weight: 500; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td ~ td.text { white-space: normal; }
td.best { color: var(--good); font-weight: 700; }
summary { cursor: pointer; }
.settings { columns: 2; column-gap: 40px; }
.settings section { break-inside: avoid; margin-bottom: 1em; }
.settings h3 { font-size: .95rem; margin: 0 0 .2em; }
.settings dl { font: 13.5px/1.5 ui-monospace, Menlo, Consolas, monospace; grid-template-columns: minmax(9em, 45%) 1fr; }
@media (max-width: 600px) { body { padding: 12px 14px 40px; } .settings { columns: 1; }
  .wide img { min-width: 560px; } .facts { column-gap: 12px; } th, td { padding-right: 14px; } }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""


def document(title: str, body: Iterable[str]) -> bytes:
    """A whole page; `body` is HTML, `title` plain text."""
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    )
    return (head + "\n".join(body) + "\n</body>\n</html>\n").encode()


def picture(png: bytes, words: str, wide: bool = False) -> str:
    """A picture inside the page, with a sentence below; a `wide` one is scrolled sideways on a phone, not shrunk."""
    source = base64.b64encode(png).decode()
    inside = f'<img alt="{escape(words)}" src="data:image/png;base64,{source}">'
    return (
        f'<figure class="framed"><div class="{"wide" if wide else ""}">{inside}</div>'
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )


def notice(record: RunData) -> list[str]:
    """The loud line of a run on a stand-in for the real data; nothing for others."""
    data = data_set(record)
    return [f'<p class="notice">{escape(data.words)}</p>'] if data.is_synthetic else []


def table(heads: list[str], rows: list[list[str]], text: set[int], best: Mapping[int, set[int]] | None = None) -> str:
    """A table of plain text; the columns in `text` are words, `best[column]` are the rows to mark."""
    best = best or {}
    classes = [' class="text"' if column in text else "" for column in range(len(heads))]
    parts = ["<tr>", *(f"<th{kind}>{escape(head)}</th>" for kind, head in zip(classes, heads, strict=True)), "</tr>"]
    for place, row in enumerate(rows):
        parts.append("<tr>")
        for column, cell in enumerate(row):
            marked = place in best.get(column, ())
            kind = ' class="best"' if marked else classes[column]
            parts.append(f"<td{kind}>{escape(cell)}{' ★' if marked else ''}</td>")
        parts.append("</tr>")
    return f'<div class="wide"><table>{"".join(parts)}</table></div>'


def describe(record: RunData, figures: RunStats) -> dict[str, str]:
    """What the page and the terminal say about a run, in order: label -> words."""
    running = figures.train_loss is None
    loss = record.steps.loss[-1] if running and record.steps.loss.size else figures.train_loss
    return {
        "data set": data_set(record).words,
        "epochs": number(figures.epochs),
        "loss of the last step" if running else "train loss": number(loss, 4),
        "test loss": number(figures.test_loss, 4),
        "test accuracy": percent(figures.test_accuracy),
        "samples/s": number(figures.samples_per_second),
        "world size": figures.world_size,
        "slowest rank": figures.slowest_rank,
        "device": str(record.manifest.get("device", "not recorded")),
        "end": ending(record),
    }


def head(record: RunData, figures: RunStats) -> list[str]:
    """The run's facts: a row of figures, then how it was made."""
    said = describe(record, figures)
    below = ("data set", "slowest rank", "device", "end")
    cards = {label: words for label, words in said.items() if label not in below}
    manifest = record.manifest
    data, git = manifest.get("dataset", {}), manifest.get("git", {})
    sizes = [
        f"{data[key]:,} {word}" for key, word in (("train_count", "training"), ("test_count", "test")) if data.get(key)
    ]
    commit = git.get("commit")
    rest = {
        "data set": f"{said['data set']}{': ' if sizes else ''}{' and '.join(sizes)}{' images' if sizes else ''}",
        "end": said["end"],
        "steps": f"{figures.steps:,}",
        "training time": f"{duration(figures.training_seconds)}, started {moment(record.started)}",
        "slowest rank": said["slowest rank"],
        "device": said["device"],
        "git commit": f"{commit}{', with changes not committed' if git.get('dirty') else ''}"
        if commit
        else "not recorded",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
        or "not recorded",
    }
    if isinstance(data.get("sha256"), str):
        rest["data sha256"] = f"{data['sha256'][:16]}…"
    if manifest.get("resumed_from"):
        rest["resumed from"] = str(manifest["resumed_from"])
    return [
        f"<h1>{escape(record.run.name)}</h1>",
        f'<p class="grey">{escape(said["data set"])} · {escape(said["end"])}</p>',
        *notice(record),
        definitions(cards, "cards"),
        definitions(rest, "facts"),
    ]


def definitions(pairs: Mapping[str, str], kind: str) -> str:
    """Label and words, one below the other."""
    wrap = ("<div>", "</div>") if kind == "cards" else ("", "")
    inside = "".join(
        f"{wrap[0]}<dt>{escape(label)}</dt><dd>{escape(words)}</dd>{wrap[1]}" for label, words in pairs.items()
    )
    return f'<dl class="{kind}">{inside}</dl>'


def class_table(rows: list[ClassFigures]) -> str:
    """Precision, recall and count of each class; folded where there are many."""
    cells = [
        [
            row.name,
            percent(row.precision),
            percent(row.recall),
            number(row.count),
            f"{row.taken_for} ({row.taken_for_count:,})" if row.taken_for else "–",
        ]
        for row in rows
    ]
    inside = table(["class", "precision", "recall", "images", "most often taken for"], cells, text={0, 4})
    if len(rows) > OPEN_ROWS:
        return f"<details><summary>all {len(rows):,} classes</summary>{inside}</details>"
    return inside


def settings(config: Mapping[str, Any]) -> str:
    """Every setting, section by section."""
    sections = []
    for section, values in config.items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        said = {str(key): show(value) for key, value in pairs}
        sections.append(f"<section><h3>{escape(section)}</h3>{definitions(said, 'facts')}</section>")
    return f'<div class="settings">{"".join(sections)}</div>'


def show(value: object) -> str:
    """A setting as people write it."""
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
