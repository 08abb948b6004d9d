"""What the site needs of mkdocs beyond its settings: patterns in the navigation, public names, roles in docstrings."""

import ast
import re
from pathlib import Path

PUBLIC = re.compile(r"<!-- public names of (?P<file>\S+) -->")
# Headings of the API page by the module of a name; the first pattern that fits counts.
GROUPS = (
    ("Training rules", re.compile(r"\.methods\.\w+\.rule\.")),
    ("Other methods", re.compile(r"\.methods\.\w+\.callback\.")),
    ("With every rule", re.compile(r"\.training\.(gradient_alignment|scalar_sync)\.")),
    ("Federated learning", re.compile(r"\.federated\.")),
    ("Parts of evolution strategies", re.compile(r"\.methods\.evolution_strategy\.")),
    ("Parts of forward gradients", re.compile(r"\.methods\.forward_gradient\.")),
    ("Parts of lottery tickets", re.compile(r"\.methods\.lottery_ticket\.")),
    ("Parts of reversible networks", re.compile(r"\.methods\.reversible_recompute\.")),
    ("Parts of teams", re.compile(r"\.methods\.team_reinforce\.")),
    ("Parts of learnable architectures", re.compile(r"\.methods\.learnable_architecture\.")),
    ("Parts of ensembles", re.compile(r"\.methods\.deep_ensemble\.")),
    ("Diffusion samplers", re.compile(r"\.methods\.diffusion_adjoint\.")),
    ("Concepts", re.compile(r"\.methods\.concept_backprop\.")),
    ("For rules of your own", re.compile(r"\.(core|training)\.")),
    ("Other names", re.compile("")),
)
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

    def described(found):
        names = exported(root / found["file"])
        return "\n\n".join(_by_group(names) if found["file"].endswith("public.py") else (f"::: {n}" for n in names))

    return PUBLIC.sub(described, markdown)


def _by_group(names):
    """Return headings and names: rules come first, and each heading only if it has names."""
    left, parts = list(names), []
    for title, pattern in GROUPS:
        own = sorted((name for name in left if pattern.search(name)), key=lambda name: name.rpartition(".")[2])
        left = [name for name in left if name not in own]
        parts += [f"## {title}"] * bool(own) + [f"::: {name}" for name in own]
    return parts


def exported(file):
    """Return the full names of what a file exports by ``from place import name as name``."""
    statements = ast.parse(file.read_text(encoding="utf-8")).body
    imports = [statement for statement in statements if isinstance(statement, ast.ImportFrom)]
    return [f"{statement.module}.{name.name}" for statement in imports for name in statement.names if name.asname]


def on_page_content(html, **_):
    """Keep of a role the name alone."""
    return ROLE.sub("", html)
