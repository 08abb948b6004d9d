"""What the site needs of mkdocs beyond its settings: patterns in the navigation, public names, roles in docstrings."""

import ast
import re
from pathlib import Path

PUBLIC = re.compile(r"<!-- public names of (?P<file>\S+) -->")
ROLE = re.compile(r":(?:class|meth|func):(?=<code>)")  # docstrings say :class:`Name`, which Markdown does not know


def on_config(config):
    """Replace every pattern of the navigation by the pages that fit it."""
    config.nav = _expanded(config.nav, Path(config.docs_dir))
    return config


def _expanded(entry, docs):
    if isinstance(entry, list):
        lists = [_expanded(part, docs) for part in entry]
        return [page for part in lists for page in (part if isinstance(part, list) else [part])]
    if isinstance(entry, dict):
        return {title: _expanded(part, docs) for title, part in entry.items()}
    return sorted(path.relative_to(docs).as_posix() for path in docs.glob(entry)) if "*" in entry else entry


def on_page_markdown(markdown, config, **_):
    """Describe every name that a file exports, where a page asks for it: a new rule needs no line in the page."""
    root = Path(config.docs_dir).parent
    return PUBLIC.sub(lambda found: "\n\n".join(f"::: {name}" for name in exported(root / found["file"])), markdown)


def exported(file):
    """Return the full names of what a file exports by ``from place import name as name``."""
    statements = ast.parse(file.read_text(encoding="utf-8")).body
    imports = [statement for statement in statements if isinstance(statement, ast.ImportFrom)]
    return [f"{statement.module}.{name.name}" for statement in imports for name in statement.names if name.asname]


def on_page_content(html, **_):
    """Keep of a role the name alone."""
    return ROLE.sub("", html)
