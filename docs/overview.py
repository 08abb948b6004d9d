"""The overview of all comparisons: one row each, with a link to the page and heading where it stands."""

import os
import re

PART = re.compile(r"<!-- results:(?P<name>\w+) -->")
BUDGETS = {"epochs": "epochs", "forwards": "forward passes"}
HEADING = re.compile(r"^#{1,6} (?P<title>.+)$")


def homes(docs):
    """Return by name of a comparison its page, heading and anchor; pages of studies come before all others."""
    found = {}
    pages = sorted(docs.rglob("*.md"), key=lambda page: (page.parent.name != "studies", page.as_posix()))
    for page in pages:
        title, in_code = "", False
        for line in page.read_text(encoding="utf-8").splitlines():
            in_code ^= line.startswith("```")
            if (heading := HEADING.match(line)) and not in_code:
                title = heading["title"]
            elif (part := PART.match(line)) and part["name"] not in found:
                found[part["name"]] = page, title
    return found


def anchor(title):
    """Return the anchor that mkdocs gives a heading.

    Examples:
        >>> anchor("Digits, and noise in their training set")
        'digits-and-noise-in-their-training-set'
    """
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def page_title(page):
    """Return the first heading of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return next((heading["title"] for line in lines if (heading := HEADING.match(line))), page.stem)


def overview_rows(comparisons, docs, page):
    """Return the head and the rows of the overview, sorted by page and heading.

    Args:
        comparisons: what the files hold, by name.
        docs: the folder of the pages.
        page: the page on which the overview stands.
    """
    where, rows = homes(docs), []
    for name, found in comparisons.items():
        budget, cells = next(iter(found["summary"].items()))
        base, *others = [cell for cell in cells if cell.get("condition") == cells[0].get("condition")]
        sign = 1 if found.get("larger_is_better", True) else -1
        best = max((row for row in others if row["mean"] is not None), key=lambda row: sign * row["mean"], default=None)
        home, title = where.get(name, (None, name))
        link, page_name = title, ""
        if home is not None:
            target = os.path.relpath(home, page.parent) if home != page else ""
            link, page_name = f"[{title}]({target}#{anchor(title)})", page_title(home)
        texts = [f"`{found['metric']}`, the same {BUDGETS.get(budget, budget)}", _result(base, found, budget)]
        texts.append(_result(best, found, budget) if best else "–")
        rows.append([f"{page_name}: {link}" if page_name else link, *texts, len(found["seeds"])])
    return ["comparison", "metric and budget", "baseline", "best other rule", "seeds"], sorted(rows)


def _result(row, found, budget):
    """Return the label of a rule, and its mean with the lowest and the highest seed."""
    if row["mean"] is None:
        return f"`{row['label']}`<br>failed"
    rules = found["conditions"][0]["rules"] if "conditions" in found else found["rules"]
    runs = next((rule.get("runs", ()) for rule in rules if rule["label"] == row["label"]), ())
    values = [run["metrics"][found["metric"]] for run in runs if run["budget"] == budget and run["error"] is None]
    digits = 3 if abs(row["mean"]) < 10 else 0
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"`{row['label']}`<br>{row['mean']:.{digits}f}{spread}"
