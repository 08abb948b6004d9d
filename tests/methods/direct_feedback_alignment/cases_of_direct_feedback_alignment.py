"""Direct feedback alignment in settings of its own, for the properties of every rule."""

from functools import partial

from lightning_bpfree import DirectFeedbackAlignment

RULES = {
    "feedback_direct": DirectFeedbackAlignment,
    "feedback_layerwise": partial(DirectFeedbackAlignment, [["first"], ["second"]], feedback="layerwise"),
}
LOCAL_RANKS = {
    "feedback direct": DirectFeedbackAlignment,
    "feedback layerwise": partial(DirectFeedbackAlignment, feedback="layerwise"),
}
KILLED = {"feedback": (DirectFeedbackAlignment, {})}
