"""Windows over the first blocks of a model, as a walk would make them, for tests of what passes do to a window."""

import torch

from quantkit.calibrate.engine import Engine
from quantkit.calibrate.passes import Window
from quantkit.calibrate.record import record
from quantkit.calibrate.walk import rounded_to_nearest
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.train.trainables import WeightQuantizer

CPU = torch.device("cpu")


def make_engine(model, scheme, passes=(), *, scale_dtype=torch.bfloat16):
    """Return an engine that quantizes all linears of all blocks of the model in a directory."""
    skeleton = Skeleton(model)
    names = [skeleton.module_name(i, name) for i in range(len(skeleton.blocks)) for name in skeleton.block_linears(i)]
    return Engine(
        skeleton=skeleton,
        checkpoint=Checkpoint(model),
        passes=passes,
        schemes=dict.fromkeys(names, scheme),
        scale_dtype=scale_dtype,
        device=CPU,
    )


@torch.no_grad()
def make_window(model, scheme, tokens, *, blocks=1, noise=0.0):
    """Return a window over the first blocks.

    Args:
        model: the model's directory.
        scheme: that of all linears.
        tokens: per batch, (batch, tokens) int64.
        blocks: how many.
        noise: how far the actual stream is from the reference, as a share of its standard deviation.
    """
    engine = make_engine(model, scheme)
    with engine.outer_weights():
        recording = record(engine.skeleton, tokens, CPU)
    window = Window(
        blocks=[engine.load(index) for index in range(blocks)],
        inputs=recording.hidden,
        references=[[] for _ in range(blocks)],
        arguments=[arguments[:blocks] for arguments in recording.arguments],
        device=CPU,
        fresh=blocks,
    )
    for batch, hidden in enumerate(recording.hidden):
        value = hidden
        for place in range(blocks):
            value = window.step(place, batch, value)
            window.references[place].append(value)
    generator = torch.Generator().manual_seed(1)
    window.inputs = [h + noise * h.std() * torch.randn(h.shape, generator=generator) for h in recording.hidden]
    window.error_rtn = window.error(rounded_to_nearest(window.sites))
    return window


def kept_error(window):
    """Return the window's error with what its sites hold."""
    return window.error({site.parameter: site.quantized.dequantize().float() for site in window.sites})


def learned_by(site):
    """Return the quantizer that OmniQuant left about a site."""
    kept = dict(site.learned)
    weight = kept.pop("weight", site.weight.detach())
    quantizer = WeightQuantizer(weight, site.scheme, site.scale_dtype, offset="offset" in kept)
    quantizer.go_on(kept)
    return quantizer
