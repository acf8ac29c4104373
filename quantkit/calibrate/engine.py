"""The walk over the blocks: load, reference, passes, propagate, hand over, drop.

Two streams of hidden states run side by side (OmniQuant, arXiv 2308.13137, section 3): the reference stream through the
original blocks, and the actual stream through the finished ones. A block learns to bring the actual stream back to the
reference. Resident at any time: one window of blocks and the two streams.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.passes import Pass, Window
from quantkit.calibrate.record import Recording, finish, record
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.model.activations import Activations
from quantkit.model.block import Block, Site
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton

CHECK_SEQUENCES, CHECK_TOKENS = 4, 32


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What happened to one block.

    Attributes:
        index: which block.
        error_rtn: relative squared error of the block's output with plain round-to-nearest weights.
        error: the same with the weights that were kept.
        notes: what the passes noted.
    """

    index: int
    error_rtn: float
    error: float
    notes: Mapping[str, object] = field(default_factory=dict)


class Listener(Protocol):
    """Who wants to know how far the walk is."""

    def progress(self, done: float, total: int) -> None:
        """`done` of `total` blocks are finished; fractions in between."""

    def block(self, report: BlockReport) -> None:
        """A block is finished."""


@dataclass(frozen=True, kw_only=True)
class CheckSample:
    """Token sequences (sequences, tokens) and the calibrated model's logits (sequences, tokens, vocabulary) float32.

    The logits are those of the finished weights with activations as they are, whatever the schemes say of them:
    rounding turns differences of 1e-7 between two machines into differences of its own size, and then nothing could
    be told from the logits.
    """

    tokens: Tensor
    logits: Tensor


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
    """

    skeleton: Skeleton
    checkpoint: Checkpoint
    passes: Sequence[Pass]
    schemes: Mapping[str, QuantScheme]
    scale_dtype: torch.dtype
    device: torch.device

    @property
    def storage(self) -> torch.dtype:
        """Dtype of the streams between blocks: bfloat16 where blocks compute in it."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def run(
        self, batches: Sequence[Tensor], emit: Callable[[Window], None], listener: Listener
    ) -> tuple[list[BlockReport], CheckSample]:
        """Walk over all blocks.

        Args:
            batches: calibration tokens, (batch, tokens) int64 each.
            emit: receives every finished window while its blocks are still in memory.
            listener: told about progress.

        Returns:
            One report per block, and logits of the finished model on the first sequences.
        """
        with self.skeleton.outer_weights(self.checkpoint, torch.float32, self.device):
            recording = record(self.skeleton, batches, self.device)
        reference = [hidden.to(self.storage) for hidden in recording.hidden]
        recording.hidden.clear()  # the streams move on; what they were need not stay in memory
        actual = list(reference)
        plain = actual[: _check_batches(batches)]
        reports = []
        for index in range(len(self.skeleton.blocks)):
            window = self._open(index, recording, reference, actual, listener)
            reports.append(self._process(index, window, actual))
            self._advance_plain(window, plain, actual)
            emit(window)
            del window
            release_freed()
            listener.block(reports[-1])
            listener.progress(index + 1, len(self.skeleton.blocks))
        return reports, self._check_sample(batches, plain)

    @torch.no_grad()
    def _open(
        self,
        index: int,
        recording: Recording,
        reference: list[Tensor],
        actual: list[Tensor],
        listener: Listener,
    ) -> Window:
        """Load a window and advance the reference stream through it."""
        total = len(self.skeleton.blocks)
        window = Window(
            blocks=[self._load(index)],
            inputs=actual,
            targets=reference,
            arguments=[arguments[index : index + 1] for arguments in recording.arguments],
            device=self.device,
            tick=lambda share: listener.progress(index + share, total),
        )
        for batch, hidden in enumerate(reference):
            reference[batch] = window.forward(batch, hidden=hidden, student=False).to(self.storage)
        return window

    def _process(self, index: int, window: Window, actual: list[Tensor]) -> BlockReport:
        """Apply the passes, put the quantized weights in place and advance the actual stream through them."""
        window.error_rtn = window.error({site.name: _rtn_weight(site) for site in window.sites})
        for step in self.passes:
            step.apply(window)
        for site in window.sites:
            assert site.quantized is not None, f"no pass rounded {site.name}"
            site.weight.data = site.quantized.dequantize().to(site.weight.dtype)

        def advance(batch: int, output: Tensor) -> None:
            actual[batch] = output.to(self.storage)

        error = window.error(keep=advance)
        return BlockReport(index=index, error_rtn=window.error_rtn, error=error, notes=window.notes)

    @torch.no_grad()
    def _advance_plain(self, window: Window, plain: list[Tensor], actual: Sequence[Tensor]) -> None:
        """Advance the stream of the check sample: the actual one without quantized activations."""
        quantizes = any(scheme.quantizes_activations for scheme in self.schemes.values())
        for batch, hidden in enumerate(plain):
            plain[batch] = (
                window.forward(batch, hidden=hidden, student=False).to(self.storage) if quantizes else actual[batch]
            )

    def _load(self, index: int) -> Block:
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
                    )
                )
        names = [site.local_name for site in sites]
        activations = Activations(module, names, sites[0].scheme) if sites else None
        return Block(index=index, module=module, sites=sites, activations=activations)

    def _check_sample(self, batches: Sequence[Tensor], plain: Sequence[Tensor]) -> CheckSample:
        """Return the finished model's logits at the head of the first sequences; a causal model needs no more."""
        tokens = torch.cat([batch[:, :CHECK_TOKENS] for batch in batches[: len(plain)]])[:CHECK_SEQUENCES]
        hidden = torch.cat([batch[:, :CHECK_TOKENS] for batch in plain])[:CHECK_SEQUENCES].float()
        with self.skeleton.outer_weights(self.checkpoint, torch.float32, self.device):
            # one sequence at a time: a large vocabulary makes logits the largest tensor of the whole run
            logits = [finish(self.skeleton, tokens[i : i + 1], hidden[i : i + 1]).cpu() for i in range(len(tokens))]
        return CheckSample(tokens=tokens, logits=torch.cat(logits))


def _check_batches(batches: Sequence[Tensor]) -> int:
    """Return how many batches hold the sequences of the check sample."""
    return -(-CHECK_SEQUENCES // batches[0].shape[0])


def _rtn_weight(site: Site) -> Tensor:
    quantized = round_to_nearest(site.weight, site.scheme, site.scale_dtype)
    return quantized.dequantize().to(site.weight.dtype)
