"""Differences between rules from runs of the same seeds, with confidence intervals: what a claim is judged by."""

import itertools
import math

from folding import titled

from lightning_bpfree.cli.compare.results import confidence


def by_seed(rule, budget, metric):
    """Return the metric of a rule's runs by seed."""
    runs = [run for run in rule["runs"] if run["budget"] == budget and run["error"] is None]
    return {run["seed"]: run["metrics"][metric] for run in runs}


def difference(left, right):
    """Return the mean of ``left - right`` over the seeds of both, with the half width of its 95 % interval."""
    values = [left[seed] - right[seed] for seed in left if seed in right]
    if not values:
        return "–"
    half = confidence(values)
    mark = "**" if half is not None and abs(math.fsum(values) / len(values)) > half else ""
    return f"{mark}{math.fsum(values) / len(values):+.4f}{mark}" + ("" if half is None else f" ± {half:.4f}")


def paired_tables(found, table):
    """Return tables of the differences between all pairs of rules, by condition if there are any.

    With conditions there is a second table: how much more than backprop a rule loses against the first condition.
    """
    metric, varied = found["metric"], "conditions" in found
    conditions = found["conditions"] if varied else [{"value": "all", "rules": found["rules"]}]
    blocks = []
    for budget in found["summary"]:
        runs = [{rule["label"]: by_seed(rule, budget, metric) for rule in one["rules"]} for one in conditions]
        labels = list(runs[0])
        pairs = [(b, a) for a, b in itertools.combinations(labels, 2)]
        lines = [[f"`{a}` - `{b}`", *(difference(one.get(a, {}), one.get(b, {})) for one in runs)] for a, b in pairs]
        values = [f"`{one['value']}`" for one in conditions] if varied else ["difference"]
        title = f"Differences of `{metric}`, paired by seed; bold where the 95 % interval excludes 0"
        blocks.append(titled(title, table(["rules", *values], lines)))
        if not varied:
            continue
        losses = [{label: _lost(runs[0][label], one.get(label, {})) for label in labels} for one in runs]
        lines = [
            [f"`{label}`", *(difference(one[label], one[labels[0]]) for one in losses[1:])] for label in labels[1:]
        ]
        title = f"How much more a rule loses than `{labels[0]}`, from `{conditions[0]['value']}` to each other value"
        blocks.append(titled(title, table(["rule", *values[1:]], lines)))
    return "\n\n".join(blocks) + "\n"


def _lost(before, after):
    return {seed: before[seed] - after[seed] for seed in before if seed in after}
