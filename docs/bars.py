"""Bar charts of benchmarks, a bar for each measurement, with the limit drawn in: what is drawn, and how."""

import re

# By file: panels of a pattern that selects rows by name (its group is the label of the bar), and a title.
PANELS = {
    "evolution_peers_benchmarks": [
        (
            r"(.* ours over .*), MLP 784-256-10, N = 512$",
            "time divided by the peer's, MLP 784-256-10, N = 512",
        ),
        (
            r"(.* ours over .*), MLP 64-256-256-256-10, N = 512$",
            "time divided by the peer's, MLP 64-256-256-256-10, N = 512",
        ),
    ],
    "benchmarks": [
        (r"memory, (.*), depth 32$", "memory above inference, in copies of the parameters"),
        (r"time of a step, (.*)", "time of a step, in forward passes"),
    ],
    "evolution_benchmarks": [
        (r"full rank, (?!noise)(.*)$", "full rank: time divided by that of N + 1 forward passes"),
        (r"rank 1, (.* samples) a member$", "rank 1: time divided by that of one pass of all samples"),
        (r"rank 4, (.* samples) a member$", "rank 4: time divided by that of one pass of all samples"),
    ],
    "fflib_benchmarks": [
        (r"(.*), time of a step$", "time of a step, divided by backprop's"),
        (r"(.*), time of a prediction$", "time of a prediction, in forward passes"),
        (r"(.*), test error$", "test error on the digits, %"),
    ],
    "local_learning_benchmarks": [
        (
            r"step(?: with Adam)?, (Forward-Forward.*|Integrated.*|checkpointed.*)",
            "time of a step, divided by backprop's",
        ),
        (r"prediction (by .*)", "time of a prediction, in forward passes"),
    ],
    "reversible_benchmarks": [
        (r"step, (.*), dropout 0$", "time of a step, divided by autograd's, no dropout"),
        (r"step, (.*), dropout 0.1$", "time of a step, divided by autograd's, dropout 0.1"),
    ],
    "reversible_peers_benchmarks": [
        (r"step, (.*), dropout 0.1$", "time of a step, divided by autograd's, dropout 0.1"),
        (r"peak memory, (.*), dropout 0.1$", "peak memory in MiB, dropout 0.1"),
    ],
    "team_benchmarks": [(r"update, (.*)", "time of an update, divided by that of a NumPy loop")],
}
KEPT, MISSED, PLAIN, PEER = "tab:green", "tab:red", "tab:blue", "0.6"
OWN = re.compile(
    "lightning_bpfree|zeroth order|forward gradient|full rank"
    "|^(rank|Forward-Forward|Integrated|sequential|parallel|by )"
)


def bars(stem, found):
    """Return the panels of a file: a title and pairs of label and row."""
    panels = []
    for pattern, title in PANELS.get(stem, ()):
        matches = [(re.match(pattern, row["name"]), row) for row in found["rows"]]
        if any(match for match, _ in matches):
            panels.append((title, [(_label(match, row), row) for match, row in matches if match]))
    return panels


def _label(match, row):
    return match[1].replace("ours over", "vs") + (", with Adam" if row["name"].startswith("step with Adam") else "")


def figure(stem, found):
    """Return a panel of horizontal bars for each group of rows."""
    from matplotlib.figure import Figure

    panels = bars(stem, found)
    heights = [len(rows) + 1.6 for _, rows in panels]
    drawing = Figure(figsize=(5.6, 0.27 * sum(heights)), layout="constrained", dpi=130)
    axes_of = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(axes_of, panels, strict=True):
        longest = max(max(row["value"], row["limit"] or 0) for _, row in rows)
        for place, (label, row) in enumerate(rows):
            colors = {True: KEPT, False: MISSED, None: PLAIN if OWN.search(label) or "ours" in row["name"] else PEER}
            axes.barh(place, row["value"], color=colors[row["reached"]], height=0.7)
            near = row["limit"] is not None and 0 < row["limit"] - row["value"] < 0.15 * longest
            end = row["limit"] if near else row["value"]  # so that the mark does not cross the number
            if row["limit"] is not None:
                axes.plot([row["limit"]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            at = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
            axes.annotate(f"{row['value']:.3g}", (end, place), **at, bbox=behind)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_title(title, fontsize=10, loc="right")
        axes.spines[["top", "right"]].set_visible(False)
    return drawing


def caption(stem, found):
    """Return what colors and marks of the figure mean."""
    rows = [row for _, panel in bars(stem, found) for _, row in panel]
    said = "Blue: this package; gray: others."
    if any(row["limit"] is not None for row in rows):
        said += " A black mark is a limit: green bars meet it, red bars miss it."
    return said
