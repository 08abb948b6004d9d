"""Where pictures go: PNG files, Weights & Biases, TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@rank_zero_only
def show(figure: Figure, name: str, step: int, *, folder: Path | None, loggers: Iterable[Any] = ()) -> None:
    """Write a figure to a folder, and to the loggers that take images.

    Args:
        figure: the figure.
        name: without an ending; ``/`` becomes ``_`` in file names.
        step: of the loggers' axis.
        folder: None writes no file.
        loggers: of the Trainer. Those that take no images are left out.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name.replace('/', '_').replace(' ', '_')}.png")
    for logger in loggers:
        kind = {base.__name__ for base in type(logger).__mro__}
        if "WandbLogger" in kind:
            logger.log_image(key=name, images=[_rgb(figure)], step=step)
        elif "TensorBoardLogger" in kind:
            logger.experiment.add_image(name, _rgb(figure), step, dataformats="HWC")


def _rgb(figure: Figure) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # optional

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    import numpy as np  # noqa: PLC0415

    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
