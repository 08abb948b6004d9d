"""Zeroth order in settings of its own, for the properties of every rule."""

from functools import partial

from lightning_bpfree import ZerothOrder

RULES = {
    "zeroth_order_central": partial(ZerothOrder, 2),
    "zeroth_order_forward": partial(ZerothOrder, 2, scheme="forward", directions="rademacher"),
}
VARIANTS = {"zeroth_order_forward"}

ANY_MODULE = {"zeroth_order": partial(ZerothOrder, 2)}
RANKS = {"zeroth": partial(ZerothOrder, 4)}
SHARED_RANKS = {
    **{f"zeroth{num}": partial(ZerothOrder, num) for num in (4, 3, 1)},
    "forward_scheme3": partial(ZerothOrder, 3, scheme="forward"),
}
KILLED = {
    "zeroth_order": (partial(ZerothOrder, 2), {}),
    "accumulated": (partial(ZerothOrder, 2), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
}
