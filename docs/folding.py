"""Parts of a page that open at a click: long tables, and how results were made."""

import re

OPEN_ROWS = 6  # a longer table is folded


def folded(summary, *blocks):
    """Return blocks of Markdown below a summary that opens them, for mkdocs (`md_in_html`) and for GitHub.

    Examples:
        >>> print(folded("`loss` of every rule", "| a |"))
        <details markdown="1">
        <summary><code>loss</code> of every rule</summary>
        <BLANKLINE>
        | a |
        <BLANKLINE>
        </details>
    """
    summary = re.sub(r"`([^`]*)`", r"<code>\1</code>", summary)
    return "\n\n".join([f'<details markdown="1">\n<summary>{summary}</summary>', *blocks, "</details>"])


def titled(title, made, *more):
    """Return a table under its title: folded if it has more than six rows, in bold if not."""
    rows = made.count("\n|") - 1
    return folded(title, made, *more) if rows > OPEN_ROWS else "\n\n".join([f"**{title}**", made, *more])
