"""Which hooks of Lightning a user's class defines."""

from __future__ import annotations

from typing import Any

_LIGHTNINGS = {"LightningModule", "LightningDataModule", "ModelHooks", "DataHooks", "CheckpointHooks"}


def overridden(hook: str, owner: Any) -> bool:
    """Return whether a class of the user's defines the hook.

    By the names of Lightning's classes, since those of ``lightning.pytorch`` and ``pytorch_lightning`` differ.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> overridden("training_step", BoringModel()), overridden("on_after_backward", BoringModel())
        (True, False)
    """
    for kind in type(owner).__mro__:
        if hook in vars(kind):
            return kind.__name__ not in _LIGHTNINGS
    return False
