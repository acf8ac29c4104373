"""LoRA beside packed linears, through peft (Hu et al., arXiv 2106.09685): y = W x + alpha/r B A x.

peft is told of `PackedLinear` as of any linear that it does not know. B is zero at first.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.personal.parameters._places import Place, packed_linears, put
from quantkit.runtime.linear import PackedLinear

NAME = "personal"  # of the adapter


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Two thin matrices beside each linear.

    Attributes:
        include: globs of the linears that get them.
        rank: r.
        alpha: how strongly they count.
        start: seed of A.
    """

    per_example: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "packed codes cannot hold the product of its matrices exactly"
    rate: ClassVar[float] = 1e-3
    include: tuple[str, ...] = ("*",)
    rank: int = 8
    alpha: int = 16
    start: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"LoRA of rank {self.rank} changes nothing; use at least 1")

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """See `Trainable`.

        Raises:
            UsageError: peft is not installed.
        """
        names = [name for name, _ in packed_linears(model, self.include)]
        place = Place(torch.zeros(0))
        put(model, "lora", place)
        with torch.random.fork_rng(devices=[]):  # peft draws from the generator of everybody
            torch.manual_seed(self.start)
            _inject(model, names, self)
        found = {}
        for name in names:
            owner, _, last = name.rpartition(".")
            layer = model.get_submodule(name)
            place.undo.append(partial(setattr, model.get_submodule(owner), last, layer.base_layer))
            for part in ("lora_A", "lora_B"):
                thin: Any = layer.get_submodule(f"{part}.{NAME}")
                thin.to(device=layer.base_layer._place(), dtype=torch.float32)  # type: ignore[union-attr, operator]
                found[f"{name}.{part}"] = thin.weight
        return found


def _inject(model: nn.Module, names: list[str], options: Lora) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora.layer import LoraLayer
    except ImportError as error:
        raise UsageError("training lora needs peft; pip install 'quantkit[lora]'") from error

    class PackedLora(nn.Module, LoraLayer):
        """A packed linear and what is beside it."""

        def __init__(self, base_layer: PackedLinear, adapter_name: str, config: Any, **options: Any) -> None:  # noqa: ANN401
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, options["r"], lora_alpha=options["lora_alpha"], config=config)

        def forward(self, inputs: Tensor) -> Tensor:
            """Return what both give together."""
            thin = self.lora_A[NAME](inputs.float())
            beside = self.lora_B[NAME](thin) * self.scaling[NAME]
            result: Tensor = self.base_layer(inputs)
            whole: Tensor = result + beside.to(result.dtype)
            return whole

    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=names)
    config._register_custom_module({PackedLinear: PackedLora})
    linears = [vars(model.get_submodule(name)) for name in names]
    for linear in linears:
        linear["qweight"] = next(iter(linear["_buffers"].values()))  # from which peft reads on what device it is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not know the class that it is told of
        inject_adapter_in_model(config, model, adapter_name=NAME)
    for linear in linears:
        del linear["qweight"]


METHOD = Lora
