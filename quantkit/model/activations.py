"""Quantized activations of a module that somebody else wrote: the inputs of its linears, and queries, keys and values.

Which they are follows arXiv 2308.13137, section 4.1: the input of every quantized linear per token, and Q and K after
the rotary embedding and V per token and head. The softmax's output, norms, embeddings and the head are left alone.

Q, K and V are met where transformers' attention modules hand them to an attention function, which they ask of the
mapping `ALL_ATTENTION_FUNCTIONS`. Some families do not (Falcon, Bloom, GPT-J, MPT): there `attentions` finds nothing,
only the linears' inputs are quantized, and whoever plans a run says so.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from quantkit.core.activation import fake_quantize_tokens
from quantkit.core.scheme import UNQUANTIZED, QuantScheme

INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def attentions(module: nn.Module) -> list[nn.Module]:
    """Return the modules inside `module` whose code asks transformers' mapping for its attention function."""
    return [part for part in module.modules() if INTERFACE in _names(_forward(part))]


class Activations:
    """The activations of one module that a scheme quantizes; found once, quantized inside `quantized()`.

        activations = Activations(block, names, scheme)
        with activations.quantized():
            output = block(hidden)

    Outside the context the module is as it was. Inside, gradients flow, also through `torch.func.functional_call`.
    """

    def __init__(self, module: nn.Module, linears: Iterable[str], scheme: QuantScheme, *, heads: bool = True) -> None:
        """Find what `scheme` quantizes around the `linears` of `module`, given by their names inside it.

        An attention module is meant if one of the linears is inside it: where all of them stay dense, it does too.
        Without `heads` the inputs of linears are quantized alone, as runtimes do it.
        """
        self.scheme = scheme
        self.linears = [module.get_submodule(name) for name in linears]
        meant = {id(linear) for linear in self.linears}
        candidates = attentions(module) if heads else []
        self.attentions = [found for found in candidates if any(id(part) in meant for part in found.modules())]

    @contextmanager
    def quantized(self) -> Iterator[None]:
        """Quantize the activations until the end of the context, which leaves nothing behind however it ends."""
        with ExitStack() as stack:
            if self.scheme.activation_bits != UNQUANTIZED:
                shared = _Shared(self.scheme)
                for linear in self.linears:
                    stack.callback(linear.register_forward_pre_hook(shared.quantize).remove)
            if self.scheme.key_value_bits != UNQUANTIZED:
                stack.enter_context(changed_heads(self.attentions, lambda _, *heads: self._quantize_heads(*heads)))
            yield

    def _quantize_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V, (batch, heads, tokens, features) each, per token and head.

        Heads that share keys and values are quantized before they are repeated, which is the same.
        """
        scheme = self.scheme
        if scheme.activation_bits != UNQUANTIZED:
            query = fake_quantize_tokens(query, scheme.activation_bits, symmetric=scheme.activation_symmetric)
        key, value = (
            fake_quantize_tokens(part, scheme.key_value_bits, symmetric=scheme.activation_symmetric)
            for part in (key, value)
        )
        return query, key, value


def quantize_activations(model: nn.Module, linears: Iterable[str], scheme: QuantScheme, *, heads: bool = True) -> None:
    """Let every later call of `model` quantize its activations as `scheme` says; nothing is hooked between calls.

    Arguments as of `Activations`.
    """
    activations, forward = Activations(model, linears, scheme, heads=heads), model.forward

    @wraps(forward)  # `generate` looks at the signature
    def quantizing(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with activations.quantized():
            return forward(*args, **kwargs)

    model.forward = quantizing


@contextmanager
def changed_heads(found: Sequence[nn.Module], change: Callable[..., tuple[Tensor, ...]]) -> Iterator[None]:
    """Let the attention modules `found` attend with change(module, Q, K, V) until the end of the context.

    Q, K and V are (batch, heads, tokens, features), keys after the rotary embedding; what is cached stays as it is.
    """
    with ExitStack() as stack:
        for interface in {id(each): each for each in map(_interface, found)}.values():
            stack.enter_context(_replaced(interface, {id(each) for each in found}, change))
        yield


@contextmanager
def _replaced(
    interface: Any,  # noqa: ANN401  transformers' mapping of functions
    meant: set[int],
    change: Callable[..., tuple[Tensor, ...]],
) -> Iterator[None]:
    """Let `interface` answer with functions that change the heads first, for the attention modules that are meant."""
    before, original = vars(interface).get("get_interface"), interface.get_interface

    def get_interface(*args: Any, **kwargs: Any) -> Callable[..., Any]:  # noqa: ANN401
        attend: Callable[..., Any] = original(*args, **kwargs)

        def changing(asking: nn.Module, *heads: Tensor, **named: Any) -> Any:  # noqa: ANN401
            """Attend with the first three of `heads`, Q, K and V, changed; what follows them is not."""
            if id(asking) in meant:
                heads = (*change(asking, *heads[:3]), *heads[3:])
            return attend(asking, *heads, **named)

        return changing

    interface.get_interface = get_interface
    try:
        yield
    finally:
        if before is None:
            del interface.get_interface  # the class's own is underneath
        else:
            interface.get_interface = before


class _Shared:
    """Quantizes the inputs of linears, one that several of them share (q, k and v; gate and up) only once."""

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme
        self.seen: tuple[Tensor, int, Tensor] | None = None

    def quantize(self, linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG002  a hook's arguments
        """Return the arguments of a linear with the first one quantized."""
        values, *rest = args
        version = -1 if values.is_inference() else values._version  # counts changes in place
        if self.seen is None or self.seen[0] is not values or self.seen[1] != version or version < 0:
            bits, symmetric = self.scheme.activation_bits, self.scheme.activation_symmetric
            self.seen = values, version, fake_quantize_tokens(values, bits, symmetric=symmetric)
        return self.seen[2], *rest


def _forward(module: nn.Module) -> Any:  # noqa: ANN401
    """Return the function that `module` runs, without decorators."""
    return inspect.unwrap(type(module).forward)


def _names(function: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Return the global names that the code of `function` reads, none for what is not written in Python."""
    return getattr(getattr(function, "__code__", None), "co_names", ())


def _interface(attention: nn.Module) -> Any:  # noqa: ANN401
    """Return the mapping that an attention module asks; nearly all share one, some families have their own."""
    return _forward(attention).__globals__[INTERFACE]
