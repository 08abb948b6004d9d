"""The interface of a family of transformer layers: how a layer splits into the two branches of a reversible block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_bpfree.methods.reversible_recompute.refused import RefusedStackError

Rewire = Literal["pre_norm", "scaled"]
CACHES = frozenset({"cache", "past_key_values", "past_key_value"})  # of keys and values, by the names of transformers


class Family:
    """Layers made of an attention and a feed-forward branch, each with a skip and a normalization.

    A family knows its layers by their structure rather than by their class, so that no library is imported for it. What
    it takes apart is compared with the layer's own output before it is used.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]  # attributes that all of its layers have
    norm_names: ClassVar[tuple[str, str]] = ("norm1", "norm2")
    returns_tuple: ClassVar[bool] = False
    checked: ClassVar[bool] = True  # whether the branches are to add up to the layer

    def matches(self, layer: nn.Module) -> bool:
        """Return whether the layer has this family's structure."""
        return all(getattr(layer, part, None) is not None for part in self.parts)

    def reversible(self, layer: nn.Module) -> bool:
        """Return whether the layer keeps the shape of its input."""
        return True

    def post_norm(self, layer: nn.Module) -> bool:
        """Return whether normalizations come after the skips."""
        return False

    def attention_kind(self, layer: nn.Module) -> str | None:
        """Return what models may choose the arguments of the layer by; None where all layers get the same."""
        return None

    def bind(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the input of the layer's forward, and all other arguments by name, as branches take them.

        Raises:
            ValueError: if attention weights are requested.
        """
        signature = inspect.signature(type(layer).forward)
        arguments = dict(signature.bind(layer, *args, **kwargs).arguments)
        names = list(signature.parameters)
        arguments.pop(names[0])
        x = arguments.pop(names[1])
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        if arguments.pop("output_attentions", False):
            raise RefusedStackError(
                "output_attentions=True: a reversible stack keeps no attention weights. Hook the attention modules, or "
                "query the model before its conversion."
            )
        return x, arguments

    def attention(self, layer: Any, x: Tensor, **context: Any) -> Tensor:
        """Return the attention branch of a normalized input, without its skip."""
        raise NotImplementedError

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """Return the feed-forward branch of a normalized input, without its skip."""
        raise NotImplementedError

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Return the normalizations of the attention and of the feed-forward branch."""
        first, second = self.norm_names
        return getattr(layer, first), getattr(layer, second)

    # --- what a reversible block is made of ---

    def branches(self, layer: nn.Module, rewire: Rewire | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Return ``f`` and ``g``, functions of the layer, a tensor and the context."""
        return (self.whole_attention, self.whole_feed_forward) if rewire == "scaled" else (self.first, self.second)

    def first(self, layer: nn.Module, x: Tensor, **context: Any) -> Tensor:
        """Return the attention of the normalized input."""
        return self.attention(layer, self.norms(layer)[0](x), **context)

    def second(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the feed-forward branch of the normalized input."""
        return self.feed_forward(layer, self.norms(layer)[1](x))

    def whole_attention(self, layer: nn.Module, x: Tensor, **context: Any) -> Tensor:
        """Return the attention sublayer of a post-norm layer, with its skip and normalization."""
        out: Tensor = self.norms(layer)[0](x + self.attention(layer, x, **context))
        return out

    def whole_feed_forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the feed-forward sublayer of a post-norm layer, with its skip and normalization."""
        out: Tensor = self.norms(layer)[1](x + self.feed_forward(layer, x))
        return out

    def original(self, layer: nn.Module, x: Tensor, context: Mapping[str, Any]) -> Tensor:
        """Return the layer's own output, put together from the branches."""
        if self.post_norm(layer):
            return self.whole_feed_forward(layer, self.whole_attention(layer, x, **context))
        x = x + self.first(layer, x, **context)
        return x + self.second(layer, x)

    def channels(self, layer: nn.Module) -> int:
        """Return the width of the layer's input."""
        weight = self.norms(layer)[0].weight
        assert isinstance(weight, Tensor)
        return weight.numel()


class OwnBranches(Family):
    """Layers whose branches the caller gives.

    Args:
        f: function of a layer, a tensor and keyword arguments, with its normalization inside and without its skip.
        g: likewise.
    """

    name = "branches given"
    parts = ()
    checked = False

    def __init__(self, f: Callable[..., Tensor], g: Callable[..., Tensor]) -> None:
        self.f, self.g = f, g

    def branches(self, layer: nn.Module, rewire: Rewire | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Return both."""
        return self.f, self.g

    def channels(self, layer: nn.Module) -> int:
        """Refuse: the width is not known.

        Raises:
            RefusedStackError: always.
        """
        raise RefusedStackError(
            "fusion='concat_linear' needs the width of the layers, unknown with branches=(f, g): use another fusion."
        )
