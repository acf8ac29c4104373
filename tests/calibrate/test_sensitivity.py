"""Measured losses against the whole model run with hooks, without blocks, skeleton or recording."""

import pytest
import torch
from families import VOCABULARY, save_tiny

from quantkit.allocation import tied_linears
from quantkit.calibrate import sensitivity
from quantkit.calibrate.sensitivity import SHRINK, Sensitivity, TiedLinears, clipped_to_nearest
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton

SCHEMES = tuple(QuantScheme(bits=bits, group_size=32, symmetric=True) for bits in (2, 3, 4, 8))
CPU = torch.device("cpu")


def some_tokens(sequences=2, length=16):
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(0))


def measure(directory, tokens, shrink=(1.0,), progress=lambda done, total: None):
    skeleton = Skeleton(directory)
    names = [name for name, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear)]
    return Sensitivity(
        skeleton=skeleton,
        checkpoint=Checkpoint(directory),
        ties=tied_linears(skeleton, names),
        schemes=SCHEMES,
        shrink=shrink,
        scale_dtype=torch.float16,
        device=CPU,
    ).run(tokens, progress)


@torch.no_grad()
def block_outputs(model, tokens):
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, inputs, output: seen.append(output)) for block in model.base_model.layers
    ]
    model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_it_is_the_error_of_the_blocks_output_in_the_whole_model(tmp_path, family):
    model, tokens = save_tiny(family, tmp_path), some_tokens()
    losses = measure(tmp_path, tokens)
    before = block_outputs(model, tokens)
    for tie, of_scheme in losses.items():
        for scheme, measured in of_scheme.items():
            weights = [model.get_submodule(name).weight for name in tie.linears]
            originals = [weight.detach().clone() for weight in weights]
            for weight in weights:
                weight.data = round_to_nearest(weight.data, scheme, torch.float16).dequantize().float()
            after = block_outputs(model, tokens)[tie.block]
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original
            difference = (after - before[tie.block]).norm(dim=-1) / before[tie.block].norm(dim=-1)
            assert measured == pytest.approx(float(difference.square().mean()), rel=1e-3)


def test_linears_that_share_an_input_are_one_item(tmp_path):
    save_tiny("llama", tmp_path)
    losses = measure(tmp_path, some_tokens())
    assert [(tie.block, tie.group) for tie in losses] == [
        (block, group) for block in (0, 1) for group in ("attention", "output", "mlp", "down")
    ]
    attention = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert TiedLinears(1, "attention", tuple(attention)) in losses


def test_without_an_architecture_file_each_linear_is_its_own(tmp_path):
    save_tiny("stablelm", tmp_path)
    losses = measure(tmp_path, some_tokens())
    assert len(losses) == 14
    assert all(len(tie.linears) == 1 for tie in losses)


def test_more_bits_lose_less(tmp_path):
    save_tiny("llama", tmp_path)
    for of_scheme in measure(tmp_path, some_tokens()).values():
        values = list(of_scheme.values())
        assert values == sorted(values, reverse=True)
        assert values[0] > 100 * values[-1] > 0


def test_only_the_head_of_the_text_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "SEQUENCES", 2)
    monkeypatch.setattr(sensitivity, "TOKENS", 16)
    save_tiny("llama", tmp_path)
    tokens = some_tokens(2, 16)
    longer = torch.cat([torch.cat([tokens, tokens.flip(1)], dim=1), tokens.flip(0).repeat(1, 2)])
    assert measure(tmp_path, longer) == measure(tmp_path, tokens)


def test_progress_ends_with_the_last_block(tmp_path):
    save_tiny("llama", tmp_path)
    told = []
    measure(tmp_path, some_tokens(), progress=lambda done, total: told.append((done, total)))
    assert told == [(step / 4, 2) for step in range(1, 9)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_group_of_weights_takes_its_best_factor(scheme):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)) ** 3
    errors = torch.stack(
        [
            (clipped_to_nearest(weight, scheme, (factor,), torch.float16) - weight)
            .square()
            .unflatten(1, (2, -1))
            .sum(-1)
            for factor in SHRINK
        ]
    )
    best = (clipped_to_nearest(weight, scheme, SHRINK, torch.float16) - weight).square().unflatten(1, (2, -1)).sum(-1)
    assert torch.equal(best, errors.min(0).values)
    plain = round_to_nearest(weight, scheme, torch.float16).dequantize().float()
    assert torch.equal(clipped_to_nearest(weight, scheme, (1.0,), torch.float16), plain)
