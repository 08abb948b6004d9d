"""Write the results parts of the pages, and their figures, from the files in docs/results; ``--check`` only looks.

A page marks a part by ``<!-- results:NAME -->`` and ``<!-- /results -->``; what stands between is replaced. NAME is

- ``comparisons``: an overview of all comparisons, a row each; or the name of one, such as ``quickstart_comparison`` for
  the file ``docs/results/quickstart_comparison.json``, which is a ``comparison.json`` of ``bpfree compare``;
- ``NAME:figure`` or ``NAME:curves`` for such a file: the figure and its caption alone;
- ``NAME:paired`` for such a file: differences between its rules, paired by seed;
- ``NAME_study``: the tables and figures of a ``tickets.json`` of ``bpfree tickets``; ``NAME_study:FIGURE``: one of its
  figures;
- ``NAME_concepts``: the tables of tests/benchmarks/concept_study.py; ``NAME_concepts:FIGURE``: one of its figures;
- ``benchmarks``: all rows of ``docs/results/benchmarks.json``; or ``benchmarks:TEXT``, those with TEXT in their name;
  ``NAME_benchmarks:depths``: the figure of memory against depth; ``NAME_benchmarks:bars``: bars with limits.

Tables of more than six rows, and how results were made, are folded: a click opens them.

``--check`` writes nothing, and fails if a page or a figure is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # this file is run as a script and loaded by path: its neighbor is found either way

import bars  # noqa: E402
from concepts import IMAGES as CONCEPT_IMAGES  # noqa: E402
from concepts import concept_tables  # noqa: E402
from figures import TITLES, draw, stale_figures  # noqa: E402
from folding import OPEN_ROWS, folded, titled  # noqa: E402
from overview import overview_rows  # noqa: E402
from paired import paired_tables  # noqa: E402
from studies import images, study_tables  # noqa: E402

from lightning_bpfree.cli.common.tables import counted  # noqa: E402
from lightning_bpfree.cli.compare import curves as compare_curves  # noqa: E402

RESULTS, IMAGES = DOCS / "results", DOCS / "img"
PART = re.compile(r"(<!-- results:(?P<name>[^>]+?) -->\n).*?(<!-- /results -->)", re.DOTALL)
MISSING = "Not measured yet.\n"


def number(value, digits=3):
    """Return a number in ``digits`` significant digits, a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def table(head, rows):
    """Return a Markdown table; the first column is text, the others are numbers."""
    cells = [list(map(str, row)) for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def provenance(found, command, extra=""):
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"`{command}`, {found['date'][:10]}{extra}; {versions}."


def comparison_part(name, found, page):
    """Return the figure, the tables, and folded the tuned values and where it all comes from."""
    varied = "vary" in found
    blocks = [comparison_figure(name, found, page)]
    if len(found["seeds"]) > 1:
        blocks[0] += " Tables: mean ± half width of the 95 % confidence interval (Student's t)."
    blocks += condition_tables(found) if varied else budget_tables(found)
    if "curve" in found:
        blocks += curve_blocks(name, found, page)
    how, rules = [], found["conditions"][0]["rules"] if varied else found["rules"]
    chosen = [f"`{rule['label']}`: {_settings(rule['chosen'])}" for rule in rules if rule.get("chosen")]
    if chosen:
        at = f", at `{found['vary']['values'][0]}` alone" if varied else ""
        how.append(f"Tuned by {found['tuning_metric']} on seed {found['tuning_seed']}{at}: {'; '.join(chosen)}.")
    if any(found.get("grids", {}).values()):  # older files do not have them
        how.append(grids_block(found))
    measured = [rule for rule in rules if rule.get("device")]
    if measured and not varied:
        how.append(f"Peak memory {measured[0]['peak_memory_kind']}.")
    device = f", {measured[0]['device']}, {counted(found['machine']['threads'], 'thread')}" if measured else ""
    how.append(provenance(found, shlex.join(found["command"]), device))
    blocks.append(folded("Command, versions" + (", learning rates" if chosen else ""), *how))
    return "\n\n".join(blocks) + "\n"


def _settings(chosen):
    return ", ".join(f"`{key}={value}`" for key, value in chosen.items())


def comparison_figure(name, found, page, kind=""):
    """Return the figure of a comparison, or of its curves, with its caption."""
    over = f" over {found['vary']['key']}" if "vary" in found else ""
    metric = found["metric"]
    if kind:
        over, metric = " over training batches", found["curve"]["metric"]
    figure = os.path.relpath(IMAGES / f"{name}{kind}.png", page.parent)
    seeds = len(found["seeds"])
    of = f"{seeds} seeds" if seeds > 1 else "1 seed, no interval"
    caption = f"`{metric}` over {of}."
    if seeds > 1:
        caption += " Figure: mean, 95 % bootstrap interval, and each seed."
    return f"![{metric} of every rule{over}, with confidence intervals]({figure})\n\n{caption}"


def alone(figure):
    """Return a figure and its caption for a page about something else, which shows it smaller (docs/extra.css)."""
    return f'<figure markdown="1">\n\n{figure}\n\n</figure>\n'


def curve_blocks(name, found, page):
    """Return a table per budget of the batches until a value is reached, and the figure of the curves."""
    blocks, metric = [], found["curve"]["metric"]
    note = (
        "Training batches until a validation first reached the value: mean ± half width of the 95 % confidence "
        "interval over the seeds that reached it."
    )
    for budget in found["summary"] if found["curve"]["reach"] else ():
        head, rows = compare_curves.reach_table(found, budget)
        made = table(head, [[f"`{label}`", *texts] for label, *texts in rows])
        blocks.append(
            titled(f"Batches until `{metric}` reaches a value, with {TITLES.get(budget, budget)}", made, note)
        )
    return [*blocks, comparison_figure(name, found, page, "_curves")]


def grids_block(found):
    """Return how many trials each rule had, and the grids, each with the rules that have it."""
    grids, trials = found["grids"], found["trials"]
    equal = len(set(trials.values())) == 1
    sharing = {}
    for label, grid in grids.items():
        sharing.setdefault(json.dumps(grid), []).append(label)
    lines = [
        ", ".join(f"`{label}`" for label in labels)
        + ("" if equal else f" ({trials[labels[0]]} trials)")
        + ": "
        + ("; ".join(f"`{key}` in {', '.join(values)}" for key, values in grids[labels[0]].items()) or "not tuned")
        for labels in sharing.values()
    ]
    head = f"{trials[next(iter(trials))]} trials each" if equal else "Not the same number of trials for all"
    return "\n".join([f"{head}:", "", *(f"- {line}" for line in lines)])


def study_part(name, found, text, page):
    """Return the tables and figures of a study of lottery tickets, or its figure TEXT, and where it all comes from."""
    seeds = len(found["seeds"])
    caption = f"{seeds} seed{'s' * (seeds > 1)}. Figures: mean and 95 % bootstrap interval."
    shown = {
        image: f"![{about}]({os.path.relpath(IMAGES / f'{image}.png', page.parent)})"
        for image, about in images(RESULTS / f"{name}.json", found).items()
    }
    if text:
        return alone(f"{shown[f'{name}_{text}']}\n\n{caption}")
    tables = "Tables: mean ± half width of the 95 % confidence interval (Student's t)."
    blocks = [*shown.values(), f"{caption} {tables}", *study_tables(found, table)]
    how = provenance(found, shlex.join(found["command"]), f", {counted(found['machine']['threads'], 'thread')}")
    return "\n\n".join([*blocks, folded("Command, versions", how)]) + "\n"


def concepts_part(name, found, text, page):
    """Return the tables of the study of concepts, or its figure TEXT, and where they come from."""
    if text:
        return f"![{CONCEPT_IMAGES[text]}]({os.path.relpath(IMAGES / f'{name}_{text}.png', page.parent)})\n"
    blocks = concept_tables(found, table)
    blocks.append(f"{len(found['seeds'])} seeds, mean ± half width of the 95 % confidence interval.")
    blocks.append(provenance(found, found["command"], f", {counted(found['machine']['threads'], 'thread')}"))
    return "\n\n".join(blocks) + "\n"


def budget_tables(found):
    """Return a table per budget, a rule a row."""
    blocks = []
    for budget, rows in found["summary"].items():
        metric = found["metric"]
        head = ["rule", metric, "gap to backprop", "forward passes", "seconds", "peak MiB", "cosine to backprop"]
        lines = []
        for row in rows:
            gap = "–" if row["gap"] is None else f"{row['gap']:+.4f}"
            costs = [number(row[key]) for key in ("forward_evals", "seconds", "peak_memory_mib", "mean_cosine")]
            lines.append([f"`{row['label']}`", result(row), gap, *costs])
        blocks.append(titled(f"`{metric}` after {TITLES.get(budget, budget)}", table(head, lines)))
        blocks += [f"`{row['label']}`: {row['error'].splitlines()[0]}" for row in rows if row["error"]]
    return blocks


def condition_tables(found):
    """Return two tables per budget, of the metric and of how much worse it is than under the first condition."""
    blocks, metric, values = [], found["metric"], found["vary"]["values"]
    head = ["rule", *(f"`{value}`" for value in values)]
    for budget, cells in found["summary"].items():
        after, rows = TITLES.get(budget, budget), {}
        for cell in cells:
            rows.setdefault(f"`{cell['label']}`", {})[cell["condition"]] = cell
        lines = [[label, *(result(row.get(value)) for value in values)] for label, row in rows.items()]
        blocks.append(titled(f"`{metric}` after {after}, by `{found['vary']['key']}`", table(head, lines)))
        lines = [[label, *(drop(row.get(value)) for value in values[1:])] for label, row in rows.items()]
        title = f"By how much `{metric}` is worse than at `{values[0]}` after {after}, paired by seed"
        blocks.append(titled(title, table([head[0], *head[2:]], lines)))
        failed = [cell for cell in cells if cell["error"]]
        blocks += [f"`{cell['label']}`, `{cell['condition']}`: {cell['error'].splitlines()[0]}" for cell in failed]
    return blocks


def result(row):
    """Return the metric of a rule with its interval; a dash for a rule that has not been trained."""
    if row is None or row["mean"] is None:
        return "–" if row is None else "failed"
    return f"{row['mean']:.4f}" + ("" if row["ci95"] is None else f" ± {row['ci95']:.4f}")


def drop(cell):
    if cell is None or cell["drop"] is None:
        return "–"
    return f"{cell['drop']:+.4f}" + ("" if cell["drop_ci95"] is None else f" ± {cell['drop_ci95']:.4f}")


def benchmarks_part(name, found, text, page):
    if text == "depths":
        figure = os.path.relpath(IMAGES / f"{name}_depths.png", page.parent)
        return f"![memory over the number of blocks, for every schedule]({figure})\n"
    if text == "bars":
        figure = os.path.relpath(IMAGES / f"{name}_bars.png", page.parent)
        return f"![measurements as bars, with limits]({figure})\n\n{bars.caption(name, found)}\n"
    rows = [row for row in found["rows"] if text in row["name"]]
    if not rows:
        return MISSING
    made, how = rows_table(rows), provenance(found, found["command"], f", {found['device']}")
    if len(rows) <= OPEN_ROWS:
        return f"{made}\n\n{folded('Command, versions', how)}\n"
    missed = sum(row["reached"] is False for row in rows)
    limits = sum(row["limit"] is not None for row in rows)
    kept = f", {limits} with a limit, {missed} of them missed" if limits else ""
    return folded(f"{len(rows)} measurements{kept}", made, how) + "\n"


def rows_table(rows):
    """Return rows of a benchmark as a table; clauses that several have in common stand once below it, as notes."""
    kept = {True: "yes", False: "**missed**", None: "–"}
    clauses = [row["what"].split("; ") for row in rows]
    counts = Counter(clause for row in clauses for clause in row)
    notes = [clause for clause, count in counts.items() if count > 1]
    columns = {"measured": [row["name"].replace("ours over", "this package over") for row in rows]}
    own = ["; ".join(clause for clause in row if clause not in notes) for row in clauses]
    if any(own):
        columns["what"] = own
    numbers = [", ".join(str(index) for index, note in enumerate(notes, 1) if note in row) for row in clauses]
    if len(set(numbers)) > 1:
        columns["notes"] = numbers
    columns["value"] = [f"{number(row['value'])} {row['unit']}".strip() for row in rows]
    if any(row["limit"] is not None for row in rows):
        columns |= {"limit": [number(row["limit"]) for row in rows], "kept": [kept[row["reached"]] for row in rows]}
    made = table(list(columns), zip(*columns.values(), strict=True))
    if any(own):
        made = made.replace("| --- | ---: |", "| --- | --- |", 1)  # the second column is text as well
    return "\n".join([made, *([""] if notes else []), *(f"{index}. {note}" for index, note in enumerate(notes, 1))])


def part(name, page):
    """Return what belongs into the part NAME of a page."""
    name, _, text = name.partition(":")
    if name == "comparisons":
        files = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*comparison*.json"))}
        made = table(*overview_rows(files, DOCS, page))
        return made.replace("| --- | ---: | ---: | ---: |", "| --- | --- | --- | --- |", 1) + "\n" if files else MISSING
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return MISSING
    found = json.loads(path.read_text(encoding="utf-8"))
    if text == "paired":
        return paired_tables(found, table)
    if name.endswith("_concepts"):
        return concepts_part(name, found, text, page)
    if "barriers" in found:
        return study_part(name, found, text, page)
    if text in ("figure", "curves"):
        return alone(comparison_figure(name, found, page, "_curves" if text == "curves" else ""))
    return benchmarks_part(name, found, text, page) if "rows" in found else comparison_part(name, found, page)


def stale_pages():
    """Yield the pages that are out of date, with what should be in them."""
    for page in [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        new = PART.sub(lambda found, page=page: f"{found[1]}\n{part(found['name'], page)}\n{found[3]}", old)
        if new != old:
            yield page, new


def main(arguments=None):
    """Bring pages and figures up to date, or with ``--check`` return 1 if they are not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for page, text in stale_pages():
        stale.append(page)
        if not check:
            page.write_text(text, encoding="utf-8")
    for figure, path, digest in stale_figures(RESULTS, IMAGES):
        stale.append(figure)
        if not check:
            draw(figure, path, digest)
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path.relative_to(DOCS.parent)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
