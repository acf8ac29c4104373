"""A model without its blocks' weights: transformers' own modules on the `meta` device, filled block by block.

The skeleton holds real buffers and, inside `outer_weights`, the real embedding, final norm and head. Blocks
are copied out of it one at a time, loaded, used and dropped, so the whole model is never in memory.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.errors import ModelError, UsageError
from quantkit.model import architecture
from quantkit.model.checkpoint import Checkpoint
from quantkit.untrusted import parse_json, read_document

MOST_MODULES = 1000  # layers, or experts of one; the deepest published model has 126 layers, the broadest 512 experts
LINEARS = (nn.Linear, Conv1D)
# what transformers raises for a config.json with values that it cannot use
_CONFIG_FAULTS = (
    *(
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        ArithmeticError,
        AssertionError,
    ),
    StrictDataclassError,
)
_DENSE_3D = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Skeleton:
    """A causal language model on `meta`.

    Attributes:
        config: the model's configuration.
        model: the transformers model; parameters on `meta`, buffers real.
        blocks_name: module name of the list of decoder layers, for example `model.layers`.
        blocks: that list.
        architecture: facts of the family, None if no file of the model zoo describes it.
    """

    def __init__(self, directory: Path, *, packed: bool = False) -> None:
        """Build the skeleton from `config.json` alone; no weight is read.

        With `packed` the directory is an output of quantkit; what `config.json` says of quantization is ignored.

        Raises:
            ModelError: no usable config.json, an architecture that transformers does not know or that
                quantkit cannot quantize whole.
        """
        self.config = read_config(directory)
        if packed:
            vars(self.config).pop("quantization_config", None)
        _refuse_shared_attention(self.config)
        self.model = _empty_model(self.config, directory)
        model_type = self.config.model_type
        self.architecture = architecture.find(self.model.config.to_dict())
        named = self.architecture and _get_module_list(self.model, self.architecture.blocks)
        self.blocks_name, self.blocks = named or _largest_module_list(self.model, model_type)
        _refuse_fused_experts(self.blocks, model_type)
        for block in self.blocks:
            _refuse_misfit(block, self.architecture)

    def block_linears(self, index: int) -> dict[str, nn.Module]:
        """Return the linears of block `index` by their name inside the block, in the order of the code."""
        return {name: module for name, module in self.blocks[index].named_modules() if isinstance(module, LINEARS)}

    def module_name(self, index: int, name: str) -> str:
        """Return the full module name of `name` inside block `index`."""
        return f"{self.blocks_name}.{index}.{name}"

    def outer_parameters(self, *, every_name: bool = False) -> dict[str, nn.Parameter]:
        """Return the parameters outside the blocks by module name, tied ones once or under every name."""
        prefix = f"{self.blocks_name}."
        named = self.model.named_parameters(remove_duplicate=not every_name)
        return {name: value for name, value in named if not name.startswith(prefix)}

    def stored_name(self, name: str, checkpoint: Checkpoint) -> str | None:
        """Return the name under which `checkpoint` stores the module tensor `name`, None if it does not.

        Checkpoints may leave out the name of the base model (`h.0.…` for `transformer.h.0.…`) or spell it out
        where the module does not have it, and may differ in the ways that the architecture file lists.
        """
        prefix = f"{self.model.base_model_prefix}."
        renamed = self.architecture.stored_names(name) if self.architecture else ()
        return next((n for n in (*renamed, name, name.removeprefix(prefix), prefix + name) if n in checkpoint), None)

    def load_block(self, index: int, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return a copy of block `index` with its weights; the skeleton stays empty.

        Raises:
            ModelError: the checkpoint lacks a tensor of the block, or has it in another shape.
        """
        module, stored = copy.deepcopy(self.blocks[index]), self._stored_names(index, checkpoint)
        loaded = checkpoint.load(stored.values(), dtype)
        module.load_state_dict({name: loaded[source] for name, source in stored.items()}, strict=False, assign=True)
        return module.to(device).eval().requires_grad_(False)

    def refuse_incomplete(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that does not fill all blocks, from its headers alone.

        Raises:
            ModelError: as `load_block`.
        """
        for index in range(len(self.blocks)):
            self._stored_names(index, checkpoint)

    def _stored_names(self, index: int, checkpoint: Checkpoint) -> dict[str, str]:
        """Return name inside block `index` → stored name of all that the checkpoint has of it."""
        stored: dict[str, str] = {}
        for name, empty in self.blocks[index].state_dict().items():
            full = self.module_name(index, name)
            source = self.stored_name(full, checkpoint)
            if source is not None:
                _refuse_other_shape(source, checkpoint, empty)
                stored[name] = source
            elif empty.is_meta:
                raise ModelError(f"{checkpoint.directory} has no tensor for {full}; the checkpoint is incomplete")
        return stored

    def fill(self, checkpoint: Checkpoint, dtype_of: Callable[[str], torch.dtype | None]) -> None:
        """Read every parameter and buffer of the model that `checkpoint` has, for good and on the CPU.

        `dtype_of` gives the dtype of a tensor by its name in the model, None for the one in which it is stored.

        Raises:
            ModelError: a tensor is nowhere, or has another shape.
        """
        absent = set()
        for name, empty in self.model.state_dict().items():
            source = self.stored_name(name, checkpoint)
            if source is None:
                absent.add(name)
                continue
            _refuse_other_shape(source, checkpoint, empty)
            _assign(self.model, name, checkpoint.load([source], dtype_of(name))[source])
        self._tie(absent)
        if missing := [name for name, value in self.model.state_dict().items() if value.is_meta]:
            raise ModelError(f"{checkpoint.directory} has no tensor for {missing[0]}; the checkpoint is incomplete")

    @contextmanager
    def outer_weights(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
        """Fill everything outside the blocks for the duration of the context, then empty it again.

        Raises:
            ModelError: the checkpoint lacks a tensor, or has it in another shape.
        """
        outer = self.outer_parameters(every_name=True)
        stored = {name: self.stored_name(name, checkpoint) for name in outer}
        for name, source in stored.items():
            if source is not None:
                _refuse_other_shape(source, checkpoint, outer[name])
        loaded = checkpoint.load([source for source in stored.values() if source], dtype)
        try:
            for name, source in stored.items():
                if source is not None:
                    _assign(self.model, name, loaded[source].to(device))
            del loaded
            self._tie({name for name, source in stored.items() if source is None})
            if missing := [name for name, value in self.outer_parameters().items() if value.is_meta]:
                raise ModelError(f"{checkpoint.directory} has no tensor for {missing[0]}; the checkpoint is incomplete")
            _move_buffers(self.model, self.blocks, device)
            yield
        finally:
            for name, value in outer.items():
                _assign(self.model, name, value)

    def _tie(self, absent: set[str]) -> None:
        """Tie, as from_pretrained does, what is not stored, and what is stored twice with equal values."""
        self.model.tie_weights(missing_keys=absent, recompute_mapping=False)


def read_config(directory: Path) -> PretrainedConfig:
    """Return the configuration in `directory`.

    Raises:
        ModelError: no config.json, not JSON, or a model type that this transformers does not know.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json; give the directory of a transformers model")
    try:
        _refuse_endless(parse_json(read_document(directory / "config.json")))
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except _CONFIG_FAULTS as error:
        raise ModelError(f"{directory / 'config.json'} cannot be used: {_reason(error)}") from error
    read_generation_config(directory)  # transformers would refuse to load the model, or what is made of it
    if not isinstance(config, PretrainedConfig):  # pragma: no cover  transformers' promise
        raise ModelError(f"{directory / 'config.json'} describes no transformers model")
    return config


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """Return how the model in `directory` continues a text, None where it does not say.

    Raises:
        ModelError: its generation_config.json cannot be used.
    """
    file = directory / "generation_config.json"
    if not file.is_file():
        return None
    try:
        parse_json(read_document(file))
        return GenerationConfig.from_pretrained(directory)
    except _CONFIG_FAULTS as error:
        raise ModelError(f"{file} cannot be used: {_reason(error)}; correct it, or remove it") from error


def _refuse_endless(entries: object) -> None:
    """Raise ValueError for so many layers or experts that building their modules would not end."""
    if isinstance(entries, Mapping):
        for name, value in entries.items():
            if isinstance(value, int) and value > MOST_MODULES and ("layer" in name or "expert" in name):
                raise ValueError(f"{name} is {value}, more than any model has")
            _refuse_endless(value)


def _empty_model(config: PretrainedConfig, directory: Path) -> PreTrainedModel:
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{directory} is quantized already; give the original model")
    try:
        # buffers such as rotary frequencies are no weights: keep them
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except _CONFIG_FAULTS as error:
        raise ModelError(
            f"{directory} is no causal language model that transformers can build: {_reason(error)}"
        ) from error
    model.tie_weights()  # inside the context above every assignment makes a parameter of its own
    model.config.use_cache = False
    empty: PreTrainedModel = model.eval().requires_grad_(False)
    return empty


def _reason(error: Exception) -> str:
    """Return the first paragraph of what `error` says, in one line."""
    return " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__


def _get_module_list(model: nn.Module, name: str) -> tuple[str, nn.ModuleList] | None:
    """Return the named list of blocks, None if the model does not have it."""
    module: Any = dict(model.named_modules()).get(name)
    return (name, module) if isinstance(module, nn.ModuleList) and len(module) else None


def _largest_module_list(model: nn.Module, model_type: str) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers of an unknown family: the outermost list of one class with most weights.

    A wrong guess does not go far: `record` refuses lists that are not the chain of blocks.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and any(isinstance(part, LINEARS) for part in module.modules())
    }
    if not lists:
        raise ModelError(
            f"no list of decoder layers was found in a {model_type} model; it cannot be quantized by block"
        )
    name = max(lists, key=lambda name: (sum(p.numel() for p in lists[name].parameters()), -name.count(".")))
    return name, lists[name]


def _refuse_misfit(block: nn.Module, family: architecture.Architecture | None) -> None:
    """Raise UsageError if linears that the architecture file says share an input have inputs of different widths."""
    if family is None:
        return
    for group in family.groups:
        found = [module for name, module in block.named_modules() if name in group.linears]
        widths = {m.weight.shape[0 if isinstance(m, Conv1D) else 1] for m in found if isinstance(m, LINEARS)}
        if len(widths) > 1:
            raise UsageError(
                f"the architecture file {family.name}.toml does not fit the model: the linears of the group "
                f"{group.name} have inputs of different widths, {sorted(widths)}"
            )


def _refuse_shared_attention(config: PretrainedConfig) -> None:
    """Refuse blocks that read other blocks' keys and values: the reference stream would meet quantized ones."""
    shared = getattr(config.get_text_config(), "num_kv_shared_layers", 0)
    if shared:
        raise ModelError(
            f"{shared} blocks of this {config.model_type} model use the keys and values of other blocks, "
            "so they cannot be quantized one at a time; such models are not supported yet"
        )


def _refuse_fused_experts(blocks: nn.ModuleList, model_type: str) -> None:
    """Refuse blocks whose experts are 3-D parameters: their linears would silently stay unquantized."""
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, _DENSE_3D):
                continue
            for parameter, value in module.named_parameters(recurse=False):
                if value.ndim >= 3:
                    raise ModelError(
                        f"{model_type} keeps weights in the {value.ndim}-D parameter {name}.{parameter}, as "
                        "mixtures of experts do; that is not supported yet, and quantizing a part is refused"
                    )


def _refuse_other_shape(source: str, checkpoint: Checkpoint, expected: torch.Tensor) -> None:
    info = checkpoint.tensors[source]
    if info.shape != tuple(expected.shape):
        raise ModelError(
            f"{source} in {info.shard} has shape {info.shape} "
            f"but config.json asks for {tuple(expected.shape)}; "
            "the config and the weights belong to different models"
        )


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put `value` in the place of the parameter or buffer `name`."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._buffers:
        module._buffers[attribute] = value
    else:
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        module._parameters[attribute] = parameter


def _move_buffers(model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
    inside = {id(module) for module in blocks.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
