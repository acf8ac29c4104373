"""Private runs from end to end: what is trained, what is promised, what the delta tells, what is refused."""

import json
import math

import pytest
import torch
from tinies import batch, packed, write_rows

import quantkit
from quantkit.errors import DataError, UsageError
from quantkit.personal import choices
from quantkit.personal.data import Example
from quantkit.personal.delta import Delta
from quantkit.personal.gradients._examples import example_gradients
from quantkit.personal.gradients.dp import Dp
from quantkit.personal.loop import Loop, Pace, State
from quantkit.personal.objectives.language_model import LanguageModel
from quantkit.personal.parameters._places import Place
from quantkit.personal.protocols import Batch, Losses, per_example
from quantkit.personal.sampling import Poisson
from quantkit.personal.start import Start
from quantkit.personal.updates import Updates


def part(whole, row):
    fields = ("tokens", "attention", "scored", "label")
    return Batch(**{name: getattr(whole, name)[row : row + 1] for name in fields})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    words = [[f"The {a} is {b}." for a in ("fox", "hen", "cow")] for b in ("red", "old", "here")]
    return write_rows(tmp_path_factory.mktemp("rows") / "mine.jsonl", [{"text": t} for w in words for t in w] * 5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2", "bloom", "phi"])
@pytest.mark.parametrize("kind", [n for n in choices.names("parameters") if choices.find("parameters", n).per_example])
def test_every_example_has_the_gradient_that_it_has_alone(family, kind, tmp_path):
    """A padded batch through packed linears, against one example after the other."""
    model = quantkit.load(packed(family, tmp_path), device="cpu")
    parameters = choices.build("parameters", kind).attach(model)
    for parameter in parameters.values():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    given = batch()
    together, losses = example_gradients(Losses(LanguageModel(), model, given), parameters)
    for row in range(3):
        loss = LanguageModel()(model, part(given, row))
        torch.testing.assert_close(loss[0], losses[row], rtol=1e-4, atol=1e-4)
        alone = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), alone, strict=True):
            expected = torch.zeros_like(parameter) if gradient is None else gradient
            torch.testing.assert_close(together[name][row], expected, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: n + m)


def test_a_place_that_does_not_see_every_token_is_refused():
    place = Place(torch.zeros(3))
    model = torch.nn.ModuleList([place])
    with per_example(model, examples=2, tokens=4):
        assert place.over(torch.zeros(8, 3)).shape == (8, 3)
        for seen in (5, 6):  # as an expert does, which sees some tokens and not whose they are
            with pytest.raises(UsageError, match="experts do not know whose tokens they see"):
                place.over(torch.zeros(seen, 3))


def test_a_private_run_says_what_it_gave_away_and_nothing_else(tiny_rtn_w4, rows, tmp_path):
    told = []
    made = quantkit.personalize(
        tiny_rtn_w4, rows, output=tmp_path / "d.safetensors", gradient="dp", epsilon=3, delta=1e-3, steps=4,
        progress=told.append,
    )  # fmt: skip
    delta = Delta.read(made.output)
    assert delta.ledger.startswith("epsilon 3 (PLD; ") or delta.ledger.startswith("epsilon 2.9")
    privacy = delta.report["privacy"]
    assert privacy["private"]
    assert 0 < privacy["epsilon_pld"] <= 3
    assert (privacy["steps"], privacy["sampling"]) == (4, "poisson")
    assert privacy["clipping"]["clipping"] == "auto-s"
    text = json.dumps(delta.report)
    assert not any(word in text for word in ("loss", "forwards", "validations", "key"))
    assert math.isfinite(told[-1]["validation"])  # the owner sees how it goes


def test_without_a_seed_no_private_run_is_like_another(tiny_rtn_w4, rows, tmp_path):
    settings = {"gradient": "dp", "noise": 1.0, "delta": 1e-3, "steps": 1}
    made = {}
    for name, seeded in (("a", False), ("b", False), ("c", True), ("d", True)):
        output = tmp_path / f"{name}.safetensors"
        quantkit.personalize(tiny_rtn_w4, rows, output=output, seeded=seeded, **settings)
        made[name] = Delta.read(output)
    first = {name: next(iter(delta.tensors.values())) for name, delta in made.items()}
    assert not torch.equal(first["a"], first["b"])
    assert torch.equal(first["c"], first["d"])
    assert made["c"].ledger.startswith("not private: the noise has a fixed seed")


def test_dice_runs_with_its_own_account(tiny_rtn_w4, rows, tmp_path):
    settings = {"gradient": "dice", "epsilon": 8, "delta": 1e-3, "steps": 2}
    made = quantkit.personalize(tiny_rtn_w4, rows, output=tmp_path / "d.safetensors", **settings)
    privacy = Delta.read(made.output).report["privacy"]
    assert privacy["epsilon_gaussian"] == pytest.approx(8, rel=1e-3)
    assert privacy["sampling"] == "none claimed"
    assert "error" not in privacy["clipping"]


def test_an_example_that_is_not_finite_does_not_end_a_private_run():
    model = torch.nn.Module()
    value = torch.nn.Parameter(torch.zeros(3))

    class Silent(Dp):
        def estimate(self, losses, parameters, *, step):
            value.grad = torch.ones(3)
            return math.nan

    def run(private):
        sampler = Poisson(examples=2, batch_size=2, key=b"")
        begun = Start(estimator=Silent(noise=1, expected=2), sampler=sampler, private=private)
        loop = Loop(
            *(model, {"x": value}, None, begun), train=[Example((1, 2), 1)] * 2, validation=[],
            updates=Updates(steps=3, rate=0.1), pace=Pace(), device=torch.device("cpu"),
        )  # fmt: skip
        loop.run(State(None, {}), lambda _: None)
        return loop.progress

    assert run(private=True).step == 3
    with pytest.raises(DataError, match="the loss is not finite at step 0"):
        run(private=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "dp"}, "a private run needs a budget or a noise; give --epsilon 3, or --noise 1"),
        ({"gradient": "backprop", "epsilon": 3}, "--epsilon is a promise that backprop cannot keep"),
        ({"gradient": "dp", "epsilon": 3, "sampling": "shuffled"}, "not for shuffled batches; use --sampling poisson"),
        ({"gradient": "dp", "epsilon": 3, "delta": 0.1}, "lets one of 41 examples be published as it is"),
        ({"gradient": "dp", "epsilon": 1e-4, "delta": 1e-9}, "out of reach"),
        (
            {"gradient": "dp", "epsilon": 3, "patience": 2},
            "--patience ends a run by examples that dp should keep secret",
        ),
        (
            {"gradient": "dp", "epsilon": 3, "options": {"noise": 0}},
            "noise of dp is what privacy is counted with; use --noise",
        ),
        (
            {"gradient": "dp", "epsilon": 3, "options": {"key": b"1"}},
            "key of dp is what privacy is counted with; use --seed",
        ),
        (
            {"gradient": "dp", "epsilon": 3, "options": {"clipping": "autos"}},
            "unknown clipping 'autos' (did you mean auto-s",
        ),
        ({"gradient": "dp", "epsilon": 3, "train": "lora"}, "gradients of single examples, which lora does not have"),
    ],
)
def test_what_cannot_be_promised_is_refused_before_anything_is_written(settings, message, tiny_rtn_w4, rows, tmp_path):
    with pytest.raises(UsageError) as refused:
        quantkit.personalize(
            tiny_rtn_w4, rows, output=tmp_path / "d.safetensors", steps=4, **{"delta": 1e-3} | settings
        )
    assert message in str(refused.value)
    assert not (tmp_path / "d.safetensors").exists()
