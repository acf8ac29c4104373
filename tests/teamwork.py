"""What several processes do in the tests of teams: `python teamwork.py DIRECTORY` writes DIRECTORY/RANK.pt.

In one go, because every process takes seconds to import torch. What is run here is run by one process, too, in the
tests themselves.
"""

import math
import sys
from pathlib import Path

import torch
from local_tasks import CHOOSE, COMPLETE, write_task
from torch import nn
from windows import make_window

from quantkit import api
from quantkit.calibrate.passes import Window
from quantkit.calibrate.statistics import Hessian, Range, groups_in_order, input_statistics
from quantkit.calibrate.team import Team
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.names import resolve
from quantkit.pipeline import execute, prepare
from quantkit.train.fit import ParameterGroup, fit

SCHEME = QuantScheme.parse("w3a16g32")
RUNS = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "gptq-self": {"method": "gptq", "calibration": "self", "target_bpw": 3.5},
    "omniquant": {"method": "omniquant", "options": {"updates": 2, "let": True}},
    "balanced": {"preset": "balanced", "options": {"updates": 4, "distill.updates": 2}},
}
AGAIN = ("gptq", "balanced")  # are run twice


def tokens(batches=2, rows=4, length=16):
    """Return batches of tokens, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(500, (rows, length), generator=generator) for _ in range(batches)]


def exchanges(team):
    """Return what the operations of a team give this process."""
    mine = float(team.rank + 1)
    total, low, high = torch.full((2, 3), mine), torch.tensor([mine, -mine]), torch.tensor([mine, -mine])
    team.sum(total)
    team.minimum(low)
    team.maximum(high)
    kinds = [torch.full((3, 2), mine, dtype=dtype).T for dtype in (torch.bfloat16, torch.int8, torch.bool, torch.int64)]
    kinds += [torch.tensor(mine), torch.zeros(0)]
    team.broadcast(*kinds, source=team.size - 1)
    given = team.give({"a": torch.arange(3.0), "b": torch.ones(2, 1, dtype=torch.int8)} if team.leads else None)
    refused = ""
    try:
        team.agree("numbers", str(team.rank))
    except UsageError as error:
        refused = str(error)
    team.agree("numbers", "same")
    return {
        "sum": total,
        "minimum": low,
        "maximum": high,
        "kinds": kinds,
        "given": given,
        "said": team.say({"rank": team.rank}, source=team.size - 1),
        "divided": team.divide(range(5), lambda item: {"by": torch.tensor([item, team.rank])}),
        "totals": team.total(0.1, 2),
        "refused": refused,
        "rows": team.rows(torch.arange(8)),
    }


def fitted(team, *, spoiled=None):
    """Return the losses and the end of a regression on this process's rows; the last batches of one may be spoiled."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, 5, generator=generator)
    weight, unused = nn.Parameter(torch.eye(5)), nn.Parameter(torch.ones(2))
    calls = []

    def loss(batch):
        calls.append(batch)
        found = (team.rows(inputs[batch]) @ weight - team.rows(targets[batch])).square().mean()
        return found * (math.nan if spoiled == team.rank and len(calls) > 7 else 1.0)

    groups = [ParameterGroup(parameters=[weight, unused], lr=1e-3, weight_decay=0.1)]
    options = {"updates": 12, "tick": lambda share: None, "generator": torch.Generator().manual_seed(1)}
    result = fit(groups, loss, batches=3, team=team, **options)
    return {"losses": result.losses, "diverged": result.diverged, "weight": weight.detach(), "unused": unused.detach()}


def measured(team):
    """Return the statistics of a window whose rows are split, and its error."""
    whole = make_window(resolve("tiny").path, SCHEME, tokens(), noise=0.05)
    window = share(whole, team)
    hessians, ranges = input_statistics(window, Hessian), input_statistics(window, Range)
    nobody = {"hessian": Hessian(), "range": Range()}
    for number, statistic in enumerate(nobody.values()):
        if team.rank == team.size - 1:  # only the last process hears anything
            statistic.add(torch.arange(6.0).view(2, 3) - number)
        statistic.merge(team, torch.zeros(0, 3))
    return {
        "hessians": {name: (found.tokens, found.value) for name, found in hessians.items()},
        "ranges": {name: (r.tokens, r.low, r.high, r.mean_magnitude) for name, r in ranges.items()},
        "order": [[site.name for site in sites] for sites in groups_in_order(window)],
        "error": window.error(),
        "batch_size": window.batch_size,
        "late": (nobody["hessian"].value, nobody["range"].low, nobody["range"].mean_magnitude),
    }


def share(window, team):
    """Return the window with this process's rows."""

    def rows(batches):
        return [team.rows(batch) for batch in batches]

    return Window(
        blocks=window.blocks,
        inputs=rows(window.inputs),
        references=[rows(reference) for reference in window.references],
        arguments=window.arguments,
        device=window.device,
        team=team,
    )


def quantized(team, directory, name):
    """Run a recipe of `RUNS` and return its report."""
    how = {"calibration": "embedded", "wbits": 3, "group_size": 32, "samples": 8, "batch_size": 4, "seqlen": 32}
    how |= RUNS[name]
    if "target_bpw" in how:
        del how["wbits"]
    return execute(prepare(api.make_recipe("tiny", **how), "cpu", team=team), directory / name, overwrite=True)


def judged(team, directory):
    """Return perplexity and scores of the embedded model."""
    folder = directory / f"tasks-{team.rank}"
    folder.mkdir(exist_ok=True)
    for name, template in (("pick", CHOOSE), ("complete", COMPLETE)):
        write_task(folder, name, template)
    found = api.evaluate("tiny", text="embedded-test", seqlen=48, windows=45, device="cpu", team=team)
    how = {"include_path": folder, "num_fewshot": 2, "limit": 11, "device": "cpu", "team": team}
    scores = api.evaluate_tasks("tiny", ["pick", "complete"], **how)
    refused = ""
    try:
        api.evaluate_tasks("tiny", ["pick"], **how | {"limit": 1})
    except UsageError as error:
        refused = str(error)
    return {"loss": found.loss, "tokens": found.tokens, "scores": scores.scores, "refused": refused}


def main():
    """Do all of it."""
    directory, runs = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    with Team.join() as team:
        found = {
            "exchanges": exchanges(team),
            "fitted": fitted(team),
            "spoiled": fitted(team, spoiled=team.size - 1),
            "measured": measured(team),
            "reports": {name: quantized(team, directory, name) for name in runs},
            "judged": judged(team, directory),
        }
        for name in AGAIN if set(AGAIN) <= {*runs} else ():
            quantized(team, directory / "again", name)
        torch.save(found, directory / f"{team.rank}.pt")


if __name__ == "__main__":
    main()
