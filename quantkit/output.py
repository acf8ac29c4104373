"""What a run writes: finished blocks as they come, everything else behind them, and the files beside the weights."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.engine import CheckSample
from quantkit.evaluation.manifest import CHECK, RECIPE, REPORT, check_document
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.block import Block, Site
from quantkit.model.checkpoint import SAFETENSORS_DTYPES, TORCH_DTYPES, Checkpoint, side_files
from quantkit.model.rotation import Rotation
from quantkit.model.skeleton import Skeleton
from quantkit.model.writer import Shards, Writer
from quantkit.planning import Plan
from quantkit.recipe import Recipe

_WRITTEN = {"config.json", RECIPE, REPORT, CHECK}


class Sink:
    """Encodes finished blocks into shards, then copies everything that no block replaced.

    Attributes:
        replaced: names of the source's tensors that something else takes the place of.
        zeros: module name → weights of a linear that were pruned.
        written: tensor name → (safetensors dtype, shape) of everything that was written.
    """

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint, shards: Shards, *, rounds: bool = True) -> None:
        """Begin with nothing; unless the run `rounds`, linears are among the parameters that a block changed."""
        self.skeleton, self.checkpoint, self.shards, self.rounds = skeleton, checkpoint, shards, rounds
        self.replaced: set[str] = set()
        self.written: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.zeros: dict[str, int] = {}

    def emit(self, block: Block) -> None:
        """Write the tensors that were made of a block under the names that the source gave them."""
        exporter = CompressedTensors()
        self.zeros |= {site.name: int((~site.mask).sum()) for site in block.sites if site.mask is not None}
        for site in block.sites if self.rounds else ():
            assert site.quantized is not None, f"{site.name} was not rounded"
            prefix, _ = self._enter_site(site)
            for end, tensor in exporter.encode(site.quantized).items():
                self.shards.add(prefix + end, tensor)
        for name, stored in self._enter_changed(block).items():
            kind = TORCH_DTYPES[self.checkpoint.tensors[stored].dtype]
            self.shards.add(stored, block.module.get_parameter(name).to(kind))
        self.shards.flush()

    def restore(self, block: Block, changed: Iterable[str]) -> None:
        """Give a block what was written of it; `changed` are its parameters that `block.changed` named."""
        exporter = CompressedTensors()
        for site in block.sites if self.rounds else ():
            prefix, ends = self._enter_site(site)
            tensors = self.shards.load([prefix + end for end in ends])
            device = site.weight.device
            parts = {name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items()}
            site.quantized = exporter.decode(parts, site.scheme)
        block.changed |= {*changed}
        stored = self._enter_changed(block)
        tensors = self.shards.load(stored.values())
        for name, source in stored.items():
            parameter = block.module.get_parameter(name)
            parameter.data = tensors[source].to(parameter)

    def emit_outer(self, changed: Mapping[str, Tensor]) -> None:
        """Write parameters from outside the blocks; a head that was tied gets a tensor of its own."""
        for name, tensor in changed.items():
            stored = self.skeleton.stored_name(name, self.checkpoint) or name
            self.replaced.add(stored)
            self.written[stored] = (SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape))
            self.shards.add(stored, tensor)

    def copy_rest(self) -> None:
        """Copy every other tensor of the source, known to the model or not, byte for byte.

        A head that repeats tied embeddings is left out: loaders then need not reconcile the two.
        """
        dropped = _tied_duplicate(self.skeleton, self.checkpoint)
        for name, info in self.checkpoint.tensors.items():
            if name not in self.replaced and name != dropped:
                self.shards.add(name, self.checkpoint.load([name])[name])
                self.written[name] = (info.dtype, info.shape)

    def _enter_site(self, site: Site) -> tuple[str, list[str]]:
        """Note the tensors of a linear; return how their names begin and how they end."""
        stored = self.skeleton.stored_name(site.parameter, self.checkpoint)
        assert stored is not None, f"{site.name} was loaded but is not in the checkpoint"
        self.replaced.add(stored)
        prefix = stored.removesuffix("weight")
        scale = "BF16" if site.scale_dtype == torch.bfloat16 else "F16"
        rows, columns = site.quantized.codes.shape if site.quantized else site.weight.shape  # one may be dropped
        layout = CompressedTensors().layout((rows, columns), site.scheme, scale)
        self.written |= {prefix + end: entry for end, entry in layout.items()}
        return prefix, [*layout]

    def _enter_changed(self, block: Block) -> dict[str, str]:
        """Note the other parameters that a block changed; return their stored names by their names inside it."""
        names = {}
        for name in sorted(block.changed):
            stored = self.skeleton.stored_name(f"{block.name}.{name}", self.checkpoint)
            assert stored is not None, f"{name} was loaded but is not in the checkpoint"
            info = self.checkpoint.tensors[stored]
            self.replaced.add(stored)
            self.written[stored] = (info.dtype, info.shape)
            names[name] = stored
        return names


def _tied_duplicate(skeleton: Skeleton, checkpoint: Checkpoint) -> str | None:
    """Return the stored name of a head that repeats tied embeddings."""
    head, embedding = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    if not skeleton.config.get_text_config().tie_word_embeddings or head is None:
        return None
    of = {id(module): name for name, module in skeleton.model.named_modules()}
    stored = [skeleton.stored_name(f"{of[id(module)]}.weight", checkpoint) for module in (head, embedding)]
    if None in stored or stored[0] == stored[1]:
        return None
    pair = [checkpoint.load([name])[name] for name in stored if name]
    return stored[0] if torch.equal(*pair) else None


def write_side_files(
    writer: Writer, source: Path, recipe: Recipe, plan: Plan, rotation: Rotation | None, sample: CheckSample
) -> None:
    """Write everything beside the weights but the report."""
    for path in side_files(source, but=_WRITTEN):
        writer.copy(path)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if rotation:  # said even where it is the family's default
        config["tie_word_embeddings"] = False
    if plan.rounds:
        config["quantization_config"] = CompressedTensors().config(plan.schemes, plan.classes, plan.dense)
    writer.write_text("config.json", as_json(config))
    writer.write_text(RECIPE, recipe.to_toml())
    writer.write_text(CHECK, json.dumps(check_document(sample.tokens, sample.logits)) + "\n")


def as_json(value: Any) -> str:  # noqa: ANN401
    """Return the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
