"""Tables and figures of studies of lottery tickets (``bpfree tickets``), for ``make_results.py``."""

from folding import titled

from lightning_bpfree.cli.tickets.results import barrier_rows, figures, table_rows

CAPTIONS = {
    "pruning": "accuracy over weights left, by kind of tickets",
    "transfer": "accuracy over weights left of tickets trained by another rule",
    "connectivity": "barriers over weights left, between levels and between trainings",
}


def study_tables(found, table):
    """Return the tables of a study: the metric of its tickets, and the barriers of metric and loss."""
    blocks = [titled(f"`{found['metric']}` of trained tickets, by weights left", _two_texts(table(*table_rows(found))))]
    for of, name in (("metric", found["metric"]), ("loss", found["metric"].replace("acc", "loss"))):
        heads, rows = barrier_rows(found, of)
        if rows:
            title = f"Barriers of `{name}` on straight lines between trained networks"
            blocks.append(titled(title, _two_texts(table(heads, rows))))
    return blocks


def _two_texts(made):
    """Align the second column of a table to the left, as the first one is."""
    return made.replace("| --- | ---: |", "| --- | --- |", 1)


def drawings(path, found):
    """Yield the stem of the image and the figure, for each figure of a study."""
    for name, figure in figures(found):
        yield f"{path.stem}_{name}", figure


def images(path, found):
    """Return the stems of a study's images, without drawing them."""
    rules = {run["rule"] for run in found["runs"]} - {found["rule"]}
    transfer = ["transfer"] if len(rules) == 1 else [f"transfer_{rule}" for rule in sorted(rules)]
    names = ["pruning", *transfer, *(["connectivity"] if found["barriers"] else [])]
    return {f"{path.stem}_{name}": CAPTIONS[name.partition("_")[0]] for name in names}
