"""The prompts of a fine-tuning, encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bpfree.methods.diffusion_adjoint.families import Family, Prompts

Embeddings = str | Path | Mapping[str, Tensor]


def encoded(
    family: Family, prompts: Sequence[str] | None, negative: str, embeddings: Embeddings | None
) -> tuple[Prompts, Prompts]:
    """Return the conditioning of K prompts, and that of the empty prompt, by the names of the pipeline's arguments.

    Args:
        family: of the pipeline.
        prompts: texts; None for none, or where ``embeddings`` are given.
        negative: the text that guidance leads away from.
        embeddings: encoded prompts, or a file of safetensors with them: ``prompt_embeds`` of shape (K, ...), and
            ``negative_prompt_embeds`` of shape (1, ...).

    Raises:
        ValueError: for both, or for names that the pipeline does not have.
        FileNotFoundError: there is no such file.
    """
    if prompts is not None and embeddings is not None:
        raise ValueError("prompts and embeddings are both given: keep one.")
    if prompts is not None:
        with torch.no_grad():
            table, without = family.encode(list(prompts), [negative] * len(prompts))
        return _cloned(table), _cloned(without or {})
    given = {} if embeddings is None else _loaded(embeddings)
    wanted = {*family.embeddings, *(f"negative_{name}" for name in family.embeddings)}
    if not set(given) <= wanted:
        raise ValueError(f"embeddings have {sorted(given)}: the names that this pipeline knows are {sorted(wanted)}.")
    table = {name: value for name, value in given.items() if not name.startswith("negative_")}
    without = {name.removeprefix("negative_"): value for name, value in given.items() if name.startswith("negative_")}
    if len({len(value) for value in table.values()}) > 1:
        raise ValueError("embeddings have different numbers of prompts: give (K, ...) for all of them.")
    return _cloned(table), _cloned(without)


def _loaded(embeddings: Embeddings) -> Mapping[str, Tensor]:
    if isinstance(embeddings, Mapping):
        return embeddings
    if not Path(embeddings).is_file():
        raise FileNotFoundError(f"embeddings={str(embeddings)!r}: there is no such file.")
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(str(embeddings))
    return tensors


def _cloned(table: Mapping[str, Tensor]) -> Prompts:
    # Tensors of an encoder in inference mode would refuse a gradient later.
    return {name: value.detach().clone() for name, value in table.items()}


def rows(table: Mapping[str, Tensor], index: Tensor) -> Prompts | None:
    """Return the conditioning of prompts by their numbers; None where there is none."""
    return {name: value[index] for name, value in table.items()} or None


def check_table(table: Prompts, family: Any, trains_prompts: bool) -> None:
    """Raise ValueError if there are no embeddings to train."""
    if trains_prompts and "prompt_embeds" not in table:
        raise ValueError(
            f"optimize='prompt_embeds' starts from prompts, of which {type(family.pipe).__name__} got none: give "
            "prompts or embeddings."
        )
