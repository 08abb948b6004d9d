"""Tables and figures of the study of concepts (tests/benchmarks/concept_study.py), for ``make_results.py``."""

import torch

from lightning_bpfree.cli.common.drawing import colors
from lightning_bpfree.cli.compare.results import confidence

IMAGES = {
    "planted": "mean absolute change of each input, for the planted concept and for the decoy",
    "plausibility": "share of changed images that show the concept by its rule and by an independent network",
    "pictures": "images before and after, changed in pixels, on a grid and in the latents of an autoencoder",
    "rules": "scores of probes over epochs, for every concept, layer and training rule",
    "rules_pictures": "the same digits, changed until networks of each rule see a closed loop",
}
RULE_COLORS = colors(["backprop", "Forward-Forward", "evolution strategy", "forward gradient"])


def over_seeds(values, digits=2):
    """Return mean ± half width of the 95 % confidence interval over seeds; without it where all are equal."""
    mean, half = sum(values) / len(values), confidence(values)
    if half is None or half < 0.5 * 10**-digits:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def concept_tables(found, table):
    """Return all tables of the study, with a line above each."""
    return [
        "**Planted network: what can be read off, and what is used**",
        table(*_planted_rows(found["planted"])),
        "**Planted network: changed inputs**",
        table(*_change_rows(found["planted"])),
        "**Images: 100 % means all**",
        table(*_image_rows(found)),
        "**Tic-tac-toe: “a win in one is there” raised from below 0.1 to 0.9**",
        table(*_board_rows(found["board"])),
        "**Text: “inside a quotation” raised from below 0.1 to 0.9**",
        table(*_text_rows(found["text"])),
        "**Breast cancer table: changed inputs at the first hidden layer**",
        table(*_table_rows(found["table"])),
        "**Digits under four rules: scores after training, last hidden layer; in brackets the first one**",
        table(*_rule_rows(found["rules"])),
        "**Correlation of what probes say of the same test images, networks of different seeds, last hidden layer**",
        table(*_agreement_rows(found["agreement"])),
    ]


def _planted_rows(runs):
    head = ["concept / layer", "score", "random labels", "effect over random directions", "used in", "TCAV sign count"]
    rows = []
    for key in runs[0]["detections"]:
        parts = [run["detections"][key] for run in runs]
        controls = [sum(p["controls"]) / len(p["controls"]) for p in parts]
        sign = over_seeds([p["tcav"]["sign_count"] for p in parts]) if "tcav" in parts[0] else "–"
        used = f"{sum(p['used'] for p in parts)} of {len(parts)}"
        cells = [over_seeds([p["score"] for p in parts]), over_seeds(controls), over_seeds([p["ratio"] for p in parts])]
        rows.append([key, *cells, used, sign])
    return head, rows


def _change_rows(runs):
    head = ["concept / penalty", "reached", "before → after", "L2 distance", "share on its features", "output moves by"]
    rows = []
    for key in runs[0]["changes"]:
        parts = [run["changes"][key] for run in runs]
        scores = " → ".join(over_seeds([p[end] for p in parts]) for end in ("before", "after"))
        cells = [over_seeds([p["reached"] for p in parts]), scores]
        cells += [over_seeds([p[name] for p in parts]) for name in ("l2", "share")]
        rows.append([key, *cells, over_seeds([p["moved"]["output"] for p in parts])])
    return head, rows


def _image_rows(found):
    head = [
        "images: way, target",
        "reached",
        "L2",
        "has it by the rule",
        "by another network",
        "autoencoder error",
        "same class",
    ]
    rows = []
    for name in ("digits", "fashion"):
        for way in found[name][0]["ways"]:
            parts = [run["ways"][way] for run in found[name]]
            names = ("reached", "l2", "true_by_rule", "seen_by_judge", "autoencoder_error_ratio", "same_class")
            rows.append([f"{name}: {way}", *(over_seeds([p[n] for p in parts]) for n in names)])
    return head, rows


def _board_rows(runs):
    head = ["search", "reached", "squares", "legal", "has it by the rules", "network sees a win, before", "after"]
    rows = []
    for way in runs[0]["ways"]:
        parts = [run["ways"][way] for run in runs]
        cells = [over_seeds([p[n] for p in parts]) for n in ("reached", "squares", "legal", "true_by_rule")]
        rows.append([way, *cells, *(over_seeds([p["predicted_win"][i] for p in parts]) for i in (0, 1))])
    return head, rows


def _text_rows(runs):
    head = ["search", "reached", "characters", "has it by the rule", "changes that touch a mark"]
    names = ("reached", "characters", "true_by_rule", "changes_that_touch_a_mark")
    return head, [[way, *(over_seeds([run["ways"][way][n] for run in runs]) for n in names)] for way in runs[0]["ways"]]


def _table_rows(runs):
    head = [
        "concept",
        "reached",
        "L2",
        "distance to the nearest row over that of rows",
        "output moves by",
        "largest changes (seed 0)",
    ]
    rows = []
    for key in runs[0]["changes"]:
        parts = [run["changes"][key] for run in runs]
        cells = [over_seeds([p[n] for p in parts]) for n in ("reached", "l2", "neighbour_ratio")]
        moved = over_seeds([run["entanglement"][key]["output"] for run in runs])
        top = ", ".join(f"{name} {value:+.1f}" for name, value in parts[0]["top"][:3])
        rows.append([key, *cells, moved, top])
    return head, rows


def _rule_rows(runs):
    concepts = list(runs[0]["rules"]["backprop"]["history"][0]["scores"])
    layers = list(runs[0]["rules"]["backprop"]["history"][0]["scores"][concepts[0]])
    head = ["rule", "test accuracy", *concepts]

    def cell(rule, concept, when):
        values = [[run["rules"][rule]["history"][when]["scores"][concept][n]["score"] for run in runs] for n in layers]
        return f"{over_seeds(values[-1])} ({over_seeds(values[0])})"

    rows = [["not trained", "–", *(cell("backprop", c, 0) for c in concepts)]]
    for rule in runs[0]["rules"]:
        accuracy = over_seeds([run["rules"][rule]["accuracy"] for run in runs], 3)
        rows.append([rule, accuracy, *(cell(rule, c, -1) for c in concepts)])
    return head, rows


def _agreement_rows(agreement):
    keys = [key for key in agreement if key.endswith(list(agreement)[-1].partition("/")[2])]
    pairs = [pair for pair in agreement[keys[0]] if "backprop |" in pair or len(set(pair.split(" | "))) == 1]
    return ["networks", *(key.partition("/")[0] for key in keys)], [
        [pair.replace(" | ", " and "), *(f"{agreement[key][pair]:.2f}" for key in keys)] for pair in pairs
    ]


# --- figures ---


def concept_images(path, _found):
    """Return the stems of the study's images, without drawing them."""
    return [f"{path.stem}_{name}" for name in IMAGES]


def concept_drawings(path, found):
    """Yield the stem of the image and the function that draws it."""
    makers = {"planted": _planted, "plausibility": _plausibility, "pictures": _pictures, "rules": _rules}
    makers["rules_pictures"] = _rules_pictures
    for name, maker in makers.items():
        yield f"{path.stem}_{name}", lambda maker=maker: maker(found)


def _figure(*size):
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained", dpi=130)


def _planted(found):
    drawing = _figure(7.2, 2.6)
    panels = drawing.subplots(1, 2, sharey=True)
    for axes, (concept, own) in zip(panels, (("planted", (0, 3)), ("decoy", (7,))), strict=True):
        deltas = torch.tensor([run["changes"][f"{concept}/l2"]["delta"] for run in found["planted"]])
        colors = ["C3" if i in own else "0.7" for i in range(8)]
        axes.bar(range(8), deltas.mean(0).tolist(), color=colors)
        for row in deltas:
            axes.plot(range(8), row.tolist(), ".", color="0.2", ms=4)
        axes.set_xticks(range(8), [f"x{i}" for i in range(8)])
        axes.set_title(
            {"planted": "planted concept x0 + x3 > 1: used", "decoy": "decoy x7 > 1/2: not used"}[concept], fontsize=9
        )
    panels[0].set_ylabel("mean |change|")
    return drawing


def _plausibility(found):
    drawing = _figure(7.2, 3.5)
    panels = drawing.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("digits", "fashion"), strict=True):
        ways = list(found[name][0]["ways"])
        for offset, (key, what, color) in enumerate(
            (("true_by_rule", "by the concept's definition", "C3"), ("seen_by_judge", "by another network", "C0"))
        ):
            values = torch.tensor([[run["ways"][way][key] for way in ways] for run in found[name]])
            places = [i + 0.36 * offset - 0.18 for i in range(len(ways))]
            axes.bar(places, values.mean(0).tolist(), 0.34, color=color, alpha=0.6, label=what)
            for row in values:
                axes.plot(places, row.tolist(), ".", color="0.2", ms=4)
        axes.set_xticks(range(len(ways)), ways, rotation=40, ha="right", fontsize=7)
        axes.set_title({"digits": "digits: closed loop", "fashion": "Fashion-MNIST: long sleeves"}[name], fontsize=9)
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("share that shows the concept")
    handles = panels[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return drawing


def _pictures(found):
    ways = ("before", "additive, 0.99", "grid, 0.99", "latent")
    drawing = _figure(9.6, 4.0)
    panels = drawing.subplots(len(ways), 12, squeeze=False)
    for block, name in enumerate(("digits", "fashion")):
        run = found[name][0]
        for i, way in enumerate(ways):
            own = way if way in run["pictures"] else list(run["pictures"])[-1]  # the highest target in latents
            for j, pixels in enumerate(run["pictures"][own][:6]):
                axes = panels[i, 6 * block + j]
                axes.imshow(torch.tensor(pixels).view(run["size"][1:]).numpy(), cmap="gray")
                axes.set_xticks([])
                axes.set_yticks([])
    for i, way in enumerate(ways):
        panels[i, 0].set_ylabel(way.replace(", ", "\n"), fontsize=8)
    return drawing


def _rules(found):
    runs = found["rules"]
    first = runs[0]["rules"]["backprop"]["history"][0]["scores"]
    concepts, layers = list(first), list(next(iter(first.values())))
    drawing = _figure(8.6, 1.75 * len(concepts) + 0.5)
    panels = drawing.subplots(len(concepts), len(layers), sharex=True, sharey="row")
    for i, concept in enumerate(concepts):
        for j, layer in enumerate(layers):
            axes = panels[i, j]
            for rule, color in RULE_COLORS.items():
                lines = []
                for run in runs:
                    history = run["rules"][rule]["history"]
                    lines.append([record["scores"][concept][layer]["score"] for record in history])
                    axes.plot([r["epoch"] for r in history], lines[-1], color=color, lw=0.6, alpha=0.45)
                mean = torch.tensor(lines).mean(0).tolist()
                axes.plot([r["epoch"] for r in history], mean, color=color, lw=1.8, label=rule)
            axes.grid(color="0.92")
            if i == 0:
                axes.set_title(f"hidden layer {j + 1}", fontsize=9)
        panels[i, 0].set_ylabel(concept, fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("epochs")
    handles, names = panels[0, 0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return drawing


def _rules_pictures(found):
    made = found["rules"][0]["pictures"]
    drawing = _figure(5.0, 4.4)
    rows = [("before", made["backprop"]["before"], None)]
    rows += [(rule, part["after"], part["scores"][1]) for rule, part in made.items()]
    panels = drawing.subplots(len(rows), 6, squeeze=False)
    for i, (name, pictures, scores) in enumerate(rows):
        for j, pixels in enumerate(pictures):
            axes = panels[i, j]
            axes.imshow(torch.tensor(pixels).view(8, 8).numpy(), cmap="gray")
            axes.set_xticks([])
            axes.set_yticks([])
            if scores is not None:
                axes.set_title(f"{scores[j]:.2f}", fontsize=6, pad=2)
        panels[i, 0].set_ylabel(name.replace(" ", "\n", 1), fontsize=7)
    return drawing
