"""Output of pictures: PNG files, Weights & Biases, TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@rank_zero_only
def show(figure: Figure, name: str, step: int, *, folder: Path | None, loggers: Iterable[Any] = ()) -> None:
    """Write a figure to a folder, and to the loggers that accept images.

    Args:
        figure: the figure.
        name: its name without a file extension; ``/`` becomes ``_`` in file names.
        step: the step on the loggers' axis.
        folder: where to write the file; None writes no file.
        loggers: those of the Trainer. Loggers that accept no images are skipped.
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
