"""Several processes of one run against one process with the same batches; see `teamwork` for what they do."""

import json
import subprocess
import sys

import launch
import pytest
import teamwork
import torch
from safetensors.torch import load_file
from windows import make_window

from quantkit import api
from quantkit.calibrate.statistics import Hessian, Range, groups_in_order, input_statistics
from quantkit.calibrate.team import Team
from quantkit.errors import TeamError, UsageError
from quantkit.model.names import resolve
from quantkit.pipeline import prepare

LEARNED = 0.1  # sign descent and AdamW turn rounding of 1e-7 into steps: block errors of 4 updates differ so much
EXACT = 1e-4  # sums in another order, and a weight in a thousand that lies between two levels
ALONE = Team()


def together(directory, count, *runs):
    """Return what each of `count` processes found."""
    ended = launch.launch(count, str(launch.TESTS / "teamwork.py"), str(directory), *runs)
    assert [code for code, _, _ in ended] == [0] * count, ended
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(count)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    (directory / "again").mkdir()
    return directory, together(directory, 2, *teamwork.RUNS)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    directory = tmp_path_factory.mktemp("four")
    return directory, together(directory, 4, "gptq")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The directory of the runs of a single process, made when asked for."""
    directory, made = tmp_path_factory.mktemp("one"), {}

    def run(name):
        if name not in made:
            made[name] = teamwork.quantized(ALONE, directory, name)
        return directory / name, made[name]

    return run


@pytest.fixture(params=["two", "four"])
def found(request):
    return request.getfixturevalue(request.param)[1]


def test_exchanges(found):
    size = len(found)
    largest, below = float(size), float(size * (size + 1) // 2)
    for rank, each in enumerate(process["exchanges"] for process in found):
        assert each["sum"].eq(below).all()
        assert each["minimum"].tolist() == [1.0, -largest]
        assert each["maximum"].tolist() == [largest, -1.0]
        bfloat16, int8, flag, int64, number, nothing = each["kinds"]
        for values in (bfloat16, int8, int64):
            assert values.eq(largest).all()
        assert flag.all()
        assert float(number) == largest
        assert nothing.shape == (0,)
        assert each["given"]["a"].tolist() == [0.0, 1.0, 2.0]
        assert each["given"]["b"].dtype == torch.int8
        assert each["said"] == {"rank": size - 1}
        assert [part["by"].tolist() for part in each["divided"]] == [[i, i % size] for i in range(5)]
        assert each["totals"] == [pytest.approx(0.1 * size, rel=1e-15), 2.0 * size]
        assert each["refused"] == "the processes have different numbers; start all of them with the same command"
        assert each["rows"].tolist() == list(range(rank * 8 // size, (rank + 1) * 8 // size))


def test_gradients_and_losses_are_means(found):
    expected = teamwork.fitted(ALONE)
    for each in (process["fitted"] for process in found):
        assert each["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert torch.allclose(each["weight"], expected["weight"], atol=1e-5)
        assert each["unused"].equal(torch.ones(2)), "AdamW leaves alone what no loss depends on"
        assert each["weight"].equal(found[0]["fitted"]["weight"]), "the same bits everywhere"


def test_a_loss_that_one_process_cannot_compute_ends_the_fit_of_all(found):
    for each in (process["spoiled"] for process in found):
        assert each["diverged"]
        assert len(each["losses"]) == 2
        assert each["weight"].equal(found[0]["spoiled"]["weight"])
        assert each["weight"].isfinite().all()


def test_statistics_are_those_of_all_rows(found):
    window = make_window(resolve("tiny").path, teamwork.SCHEME, teamwork.tokens(), noise=0.05)
    hessians, ranges = input_statistics(window, Hessian), input_statistics(window, Range)
    for each in (process["measured"] for process in found):
        for name, (count, hessian) in each["hessians"].items():
            assert count == hessians[name].tokens
            assert torch.allclose(hessian, hessians[name].value, rtol=1e-4, atol=1e-5 * float(hessian.abs().max()))
            assert hessian.equal(found[0]["measured"]["hessians"][name][1])
        for name, (count, low, high, magnitude) in each["ranges"].items():
            expected = ranges[name]
            assert count == expected.tokens
            assert low.equal(expected.low)
            assert high.equal(expected.high)
            assert torch.allclose(magnitude, expected.mean_magnitude, rtol=1e-5)
        assert each["order"] == [[site.name for site in sites] for sites in groups_in_order(window)]
        assert each["error"] == pytest.approx(window.error(), rel=1e-6)
        assert each["batch_size"] == len(window.inputs[0])


def test_statistics_of_an_input_that_reaches_one_process(found):
    tokens = torch.arange(6.0).view(2, 3)
    for each in (process["measured"] for process in found):
        hessian, low, magnitude = each["late"]
        assert hessian.equal(tokens.T @ tokens)
        assert low.tolist() == [-1.0, 0.0, 1.0]
        assert magnitude.tolist() == (tokens - 1).abs().mean(dim=0).tolist()


@pytest.mark.parametrize("name", list(teamwork.RUNS))
def test_two_processes_make_what_one_makes(name, two, one):
    directory, ranks = two
    output, expected = one(name)
    report = ranks[0]["reports"][name]
    learns = name in ("omniquant", "balanced")
    for mine, its in zip(report["blocks"], expected["blocks"], strict=True):
        assert mine["error_rtn"] == pytest.approx(its["error_rtn"], rel=LEARNED if learns else EXACT)
        assert mine["error"] == pytest.approx(its["error"], rel=LEARNED if learns else EXACT)
        assert mine["notes"].keys() == its["notes"].keys()
    assert same_codes(directory / name, output) > (0.9 if learns else 0.999)
    assert (report["processes"], expected["processes"]) == (2, 1)
    assert ranks[1]["reports"][name] == {}, "one process writes"
    if learns:
        assert report["blocks"][1]["error"] < report["blocks"][1]["error_rtn"], "and it does learn"


def test_four_processes_make_what_one_makes(four, one):
    directory, ranks = four
    output, expected = one("gptq")
    errors = [block["error"] for block in ranks[0]["reports"]["gptq"]["blocks"]]
    assert errors == pytest.approx([block["error"] for block in expected["blocks"]], rel=EXACT)
    assert same_codes(directory / "gptq", output) > 0.999


def test_two_runs_give_the_same_bytes(two):
    directory, ranks = two
    for name in teamwork.AGAIN:
        again = json.loads((directory / "again" / name / "report.json").read_text())
        assert again["sha256"] == ranks[0]["reports"][name]["sha256"]


def test_an_output_of_several_processes_passes_the_check(two):
    result = api.check(two[0] / "balanced", device="cpu")
    assert not result.faults


def test_perplexity_and_scores_are_those_of_one_process(two, four, tmp_path):
    expected = teamwork.judged(ALONE, tmp_path)
    for ranks in (two[1], four[1]):
        first = ranks[0]["judged"]
        assert first["tokens"] == expected["tokens"]
        assert first["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        for mine, its in zip(first["scores"], expected["scores"], strict=True):
            assert mine.key == its.key
            assert mine.value == pytest.approx(its.value, rel=1e-6)
            assert mine.right == its.right, "in the order of the documents"
        assert all(each["judged"]["scores"] == () for each in ranks[1:])
        assert all("1 documents for" in each["judged"]["refused"] for each in ranks)


def same_codes(output, other):
    """Return the share of the stored numbers of two outputs that are the same."""
    tensors = [
        {k: v for file in sorted(each.glob("*.safetensors")) for k, v in load_file(file).items()}
        for each in (output, other)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    same = total = 0
    for name, tensor in tensors[0].items():
        equal = tensor.eq(tensors[1][name])
        same, total = same + int(equal.sum()), total + equal.numel()
    return same / total


@pytest.mark.parametrize(("samples", "batch_size"), [(samples, size) for samples in (6, 8) for size in (1, 3, 4)])
def test_what_cannot_be_split_is_refused(samples, batch_size):
    team = Team(rank=0, size=4)
    if samples == 8 and batch_size == 4:
        team.refuse_uneven(samples, batch_size)
        return
    with pytest.raises(UsageError, match=r"--batch-size 4, 8 or 16" if batch_size != 4 else r"use --samples 4$"):
        team.refuse_uneven(samples, batch_size)


def test_an_uneven_batch_is_refused_before_anything_is_read():
    recipe = api.make_recipe("no-such-model", samples=8, batch_size=3)
    with pytest.raises(UsageError, match="cannot be split over 2 processes"):
        prepare(recipe, "cpu", team=Team(size=2))


def test_a_process_without_a_launcher_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Team.join() as team:
        assert team == Team.current() == Team()
        values = torch.arange(3.0)
        team.sum(values)
        team.broadcast(values)
        assert values.tolist() == [0.0, 1.0, 2.0]
        assert team.rows(values) is not None
        assert team.device("cuda:1") == "cuda:1"


DIES = """
import os, signal
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line does before it imports torch
from quantkit.calibrate.walk import Walk
advance = Walk.advance
def dying(walk, index):
    if index == 2 and os.environ["RANK"] == "{victim}":
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(walk, index)
Walk.advance = dying
from quantkit.cli import main
main()
"""
QUANTIZE = ["quantize", "tiny", "--method", "gptq", "--calibration", "embedded", "--seqlen", "32", "--group-size", "32"]


@pytest.mark.parametrize(
    ("count", "victim"),
    [(2, 1), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_a_process_that_dies_ends_the_others_with_one_line(count, victim, tmp_path):
    output = tmp_path / "out"
    options = [*QUANTIZE, "--samples", "4", "--batch-size", "4", "-o", str(output)]
    ended = launch.launch(count, "-c", DIES.format(victim=victim), *options)
    codes = [code for code, _, _ in ended]
    assert codes == [-9 if rank == victim else TeamError.exit_code for rank in range(count)]
    (line,) = [text for _, _, text in ended if text]
    assert line == f"error: process {victim} of {count}, counted from 0, ended; start the same command again\n"
    assert not output.exists()


def test_what_all_processes_meet_is_said_once(tmp_path):
    ended = launch.launch(2, "-m", "quantkit", *QUANTIZE, "--samples", "4", "-o", str(tmp_path / "out"))
    assert [code for code, _, _ in ended] == [UsageError.exit_code] * 2
    assert ended[0][2].startswith("error: --batch-size 1 cannot be split over 2 processes; ")
    assert ended[1][1:] == ("", "")


def test_what_one_process_meets_is_said_by_it():
    fails = (
        "import os, sys; from quantkit.model import skeleton; from quantkit.errors import ModelError\n"
        "def refuse(*_): raise ModelError('this machine has no such file')\n"
        "if os.environ['RANK'] == '1': skeleton.Skeleton.load_block = refuse\n"
        "from quantkit.cli import main; main()"
    )
    ended = launch.launch(2, "-c", fails, *QUANTIZE, "--samples", "4", "--batch-size", "2", "-o", "unused")
    assert [text for _, _, text in ended] == ["", "error: this machine has no such file\n"]
    assert all(code for code, _, _ in ended)


def test_a_command_for_one_process_refuses_several():
    ended = launch.launch(2, "-m", "quantkit", "check", "nowhere")
    assert [text for _, _, text in ended] == [
        "error: this command runs in one process, not in 2; start it without the launcher\n",
        "",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(launcher, tmp_path):
    options = [*QUANTIZE, "--samples", "4", "--batch-size", "2", "--json", "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", *launcher, "-m", "quantkit", *options]
    ended = subprocess.run(command, env=launch.environment(), capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["processes"] == 2
