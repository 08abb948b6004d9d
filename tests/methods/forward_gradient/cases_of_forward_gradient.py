"""Forward gradients in settings of their own, for the properties of every rule."""

from functools import partial

from lightning_bpfree import ForwardGradient, LocalLoss

RULES = {
    "forward_gradient_one": ForwardGradient,
    "forward_gradient_loop": partial(ForwardGradient, 3, chunk_size=1, orthogonal=True),
    "forward_gradient_vectorised": partial(ForwardGradient, 3, chunk_size=2, directions="rademacher"),
    "local_guess_weights": partial(ForwardGradient, guess=LocalLoss(update="freeze")),
    "local_guess_activations": partial(ForwardGradient, guess=LocalLoss(update="freeze"), space="activations"),
    "local_guess_local": partial(
        ForwardGradient, guess=LocalLoss("mlp", update="reset"), target="local", space="activations"
    ),
}
VARIANTS = {"forward_gradient_loop", "local_guess_activations", "local_guess_local"}
EXCEPTIONS = {
    (f"local_guess_{name}", "several_dataloaders"): "labels are those of one call"
    for name in ("weights", "activations", "local")
}

ANY_MODULE = {
    "forward_gradient": partial(ForwardGradient, 2),
    "one_by_one": partial(ForwardGradient, 2, chunk_size=1),
}
RANKS = {
    "loop": partial(ForwardGradient, 4, chunk_size=1),
    "vectorized": partial(ForwardGradient, 4, chunk_size=4),
}
SHARED_RANKS = {
    **{f"loop{num}": partial(ForwardGradient, num, chunk_size=1) for num in (4, 3, 1)},
    **{f"vectorized{num}": partial(ForwardGradient, num, chunk_size=num) for num in (4, 3)},
    **{f"auto{num}": partial(ForwardGradient, num) for num in (4, 3)},
}
LOCAL_RANKS = {
    "guess in weights": partial(ForwardGradient, guess=LocalLoss(optimizer="sgd", lr=0.1)),
    "guess at outputs": partial(ForwardGradient, guess=LocalLoss(optimizer="sgd", lr=0.1), space="activations"),
    "guess in activations": partial(
        ForwardGradient, guess=LocalLoss("mlp", optimizer="sgd", lr=0.1), target="local", space="activations"
    ),
}
KILLED = {
    "forward_gradient": (ForwardGradient, {}),
    "four_directions": (partial(ForwardGradient, 4, chunk_size=1), {}),
    "local_guess": (partial(ForwardGradient, guess=LocalLoss("mlp", lr=0.01)), {}),
    "stopped_rule": (partial(ForwardGradient, 2, chunk_size=1, stop_epoch=2), {}),
}
