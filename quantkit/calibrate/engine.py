"""A run over a model: what reaches the blocks, the walk over them, what needs the whole model, and the check sample.

Resident at any time: one window of blocks and the streams (`calibrate/walk.py`); with a pass over the whole model also
the codes of all blocks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quantkit.calibrate.gradients import Samples
from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.passes import Pass, Window
from quantkit.calibrate.record import finish, make_head, record
from quantkit.calibrate.streams import Streams
from quantkit.calibrate.team import Team, unite
from quantkit.calibrate.walk import BlockReport, Listener, Walk
from quantkit.core.masks import Sparsity
from quantkit.core.scheme import QuantScheme
from quantkit.model.activations import Activations
from quantkit.model.block import Block, Site
from quantkit.model.checkpoint import TORCH_DTYPES, Checkpoint
from quantkit.model.rotation import Rotation
from quantkit.model.skeleton import Skeleton

CHECK_SEQUENCES, CHECK_TOKENS = 4, 32


@dataclass(frozen=True, kw_only=True)
class CheckSample:
    """Token sequences (sequences, tokens) and the calibrated model's logits (sequences, tokens, vocabulary) float32.

    The logits are those of the finished weights with activations as they are, whatever the schemes say of them:
    rounding turns differences of 1e-7 between two machines into differences of its own size, and then nothing could
    be told from the logits.
    """

    tokens: Tensor
    logits: Tensor


class Keeper(Protocol):
    """Who keeps what is finished, so that another process can go on behind it.

    Attributes:
        finished: how many blocks an earlier process finished.
    """

    finished: int

    def restore(self, block: Block) -> BlockReport:
        """Give a finished block what was decided about it."""

    def reopen(self, blocks: Sequence[Block]) -> Mapping[str, object]:
        """Give the blocks that were in the window with the last finished one what they had; return that one's notes."""

    def keep(self, block: Block, report: BlockReport, walk: Walk) -> None:
        """Keep a block that is finished, and what is in the window of `walk` with it; compare one that was kept."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Everything the walk needs.

    Attributes:
        skeleton: the model without weights.
        checkpoint: its weights.
        passes: what is done to each window, in order.
        schemes: module name → scheme of every linear that is quantized.
        scale_dtype: dtype in which scales are stored.
        device: where blocks are computed.
        seed: seed of everything random.
        sparsity: module name → how much of it a pruning pass drops, of every linear that is pruned.
        samples: module name → what gradients of the whole model's loss in it are made of, where a pass asked for them.
        rotation: rotates the residual stream of the model, of both streams alike; None: no rotation.
        streams: where the hidden states between blocks are kept.
        team: the processes that share the run; each holds the streams of its own rows of every batch.
    """

    skeleton: Skeleton
    checkpoint: Checkpoint
    passes: Sequence[Pass]
    schemes: Mapping[str, QuantScheme]
    scale_dtype: torch.dtype
    device: torch.device
    seed: int = 0
    sparsity: Mapping[str, Sparsity] = field(default_factory=dict)
    samples: Mapping[str, Samples] = field(default_factory=dict)
    rotation: Rotation | None = None
    streams: Streams = field(default_factory=Streams)
    team: Team = field(default_factory=Team)

    @property
    def storage(self) -> torch.dtype:
        """Dtype of the streams between blocks: bfloat16 where blocks compute in it."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def run(
        self,
        batches: Sequence[Tensor],
        emit: Callable[[Block], None],
        listener: Listener,
        notes: dict[str, object] | None = None,
        keeper: Keeper | None = None,
    ) -> tuple[list[BlockReport], CheckSample]:
        """Walk over all blocks.

        Args:
            batches: calibration tokens, (batch, tokens) int64 each; this process's rows of them.
            emit: receives every finished block while it is still in memory.
            listener: told about progress.
            notes: receives what the passes over the whole model note.
            keeper: keeps what is finished, and has what an earlier process finished; None: nobody does.

        Returns:
            One report per block, and logits of the finished model on this process's first sequences.
        """
        actual = self.streams.new(self.storage)
        with self.outer_weights():
            recording = record(self.skeleton, batches, self.device, actual)
        whole = [step for step in self.passes if not step.blocks_at_once]
        start = actual.copy() if whole else actual[:0]
        plain = actual[: -(-CHECK_SEQUENCES // batches[0].shape[0])]  # batches that hold that many sequences
        walk = Walk(
            self.load,
            [step for step in self.passes if step.blocks_at_once],
            recording.arguments,
            actual,
            plain,
            device=self.device,
            seed=self.seed,
            listener=listener,
            team=self.team,
        )
        reports, finished = self._finish_blocks(walk, emit, listener, keeper, whole=bool(whole))
        if whole:
            window = walk.whole(finished, start)
            listener.stage("distilling")
            self._apply_to_whole(whole, window, batches)
            (notes if notes is not None else {}).update(window.notes)
            plain = start[: len(plain)]
            for place, block in enumerate(finished):  # one block's weights at a time
                weights = dense(block.sites)
                for batch, hidden in enumerate(plain):
                    plain[batch] = window.step(place, batch, hidden.to(self.device), weights)
            for block in finished:
                emit(block)
        return reports, self._check_sample(batches, plain)

    def _finish_blocks(
        self, walk: Walk, emit: Callable[[Block], None], listener: Listener, keeper: Keeper | None, *, whole: bool
    ) -> tuple[list[BlockReport], list[Block]]:
        """Finish one block after the other; return their reports, and for passes over the whole model the blocks."""
        reports, blocks = [], []
        before, total = keeper.finished if keeper else 0, len(self.skeleton.blocks)
        if before:
            listener.stage("catching up")
        for index in range(total):
            if keeper and index < before:
                block, report = walk.replay(index, keeper.restore)
            else:
                if keeper and index == before > 0:
                    listener.stage("calibrating")
                    walk.reopen(index, keeper.reopen)
                block, report = walk.advance(index)
                if not whole:
                    emit(block)
                listener.block(report)
            if keeper:
                keeper.keep(block, report, walk)
            reports.append(report)
            if whole:
                _drop_dense(block)
                blocks.append(block)
            del block
            release_freed()
            listener.progress(index + 1, total)
        return reports, blocks

    def _apply_to_whole(self, passes: Sequence[Pass], window: Window, batches: Sequence[Tensor]) -> None:
        """Apply the passes that need the model from end to end."""
        with self.outer_weights():
            head = make_head(self.skeleton, self.device)
            window.head = lambda batch, row, hidden: head(batches[batch][row : row + 1], hidden)
            for step in passes:
                step.apply(window)
        unite(self.team, window.blocks, sliding=False)
        window.head = None

    @contextmanager
    def outer_weights(self) -> Iterator[dict[str, Tensor]]:
        """Fill everything outside the blocks for the duration of the context.

        Yields the parameters that differ from the checkpoint's, by full name, in the dtype in which they are stored.
        """
        changed: dict[str, Tensor] = {}
        with self.skeleton.outer_weights(self.checkpoint, torch.float32, self.device):
            if self.rotation:
                dtype = self.skeleton.config.dtype
                for name in self.rotation.rotate_outer(self.skeleton.model):
                    parameter = self.skeleton.model.get_parameter(name)
                    changed[name] = parameter.data.to(self._stored_dtype(name) or dtype)
                    parameter.data = changed[name].to(parameter.dtype)
            yield changed

    def _stored_dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of the stored parameter `name` (full name), None if it is not stored."""
        source = self.skeleton.stored_name(name, self.checkpoint)
        return TORCH_DTYPES[self.checkpoint.tensors[source].dtype] if source else None

    def load(self, index: int) -> Block:
        """Return block `index` with its weights in float32 and its sites."""
        module = self.skeleton.load_block(index, self.checkpoint, torch.float32, self.device)
        family = self.skeleton.architecture
        sites = []
        for local_name in self.skeleton.block_linears(index):
            name = self.skeleton.module_name(index, local_name)
            if name in self.schemes:
                sites.append(
                    Site(
                        name=name,
                        local_name=local_name,
                        linear=module.get_submodule(local_name),
                        group=family.group_of(local_name) if family else local_name,
                        scheme=self.schemes[name],
                        scale_dtype=self.scale_dtype,
                        sparsity=self.sparsity.get(name),
                        samples=self.samples.get(name),
                    )
                )
        prefix = self.skeleton.module_name(index, "")
        dtypes = {n: dtype for n, _ in module.named_parameters() if (dtype := self._stored_dtype(prefix + n))}
        names = [site.local_name for site in sites]
        block = Block(
            index=index,
            name=prefix.rstrip("."),
            module=module,
            sites=sites,
            dtypes=dtypes,
            architecture=family,
            config=self.skeleton.config,
            activations=Activations(module, names, sites[0].scheme) if sites else None,
        )
        if self.rotation:
            block.changed |= {*self.rotation.rotate_block(module)} - {f"{name}.weight" for name in names}
            for name in block.changed:  # what is calibrated is what is stored
                parameter = module.get_parameter(name)
                parameter.data = parameter.data.to(dtypes[name]).to(parameter.dtype)
        return block

    def _check_sample(self, batches: Sequence[Tensor], plain: Sequence[Tensor]) -> CheckSample:
        """Return the finished model's logits at the head of the first sequences; a causal model needs no more."""
        tokens = torch.cat([batch[:, :CHECK_TOKENS] for batch in batches[: len(plain)]])[:CHECK_SEQUENCES]
        hidden = torch.cat([batch[:, :CHECK_TOKENS] for batch in plain])[:CHECK_SEQUENCES].float()
        with self.outer_weights():
            # one sequence at a time: a large vocabulary makes logits the largest tensor of the whole run
            logits = [
                finish(self.skeleton, tokens[i : i + 1], hidden[i : i + 1].to(self.device)).cpu()
                for i in range(len(tokens))
            ]
        return CheckSample(tokens=tokens, logits=torch.cat(logits))


def _drop_dense(block: Block) -> None:
    """Free the dense weights of a finished block: its codes say the same."""
    for site in block.sites:
        site.learned = None
        site.weight.data = torch.empty(0, device=site.weight.device)


def dense(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return the weights that the sites' codes stand for, by full parameter name, in float32."""
    return {site.parameter: site.quantized.dequantize().float() for site in sites if site.quantized is not None}
