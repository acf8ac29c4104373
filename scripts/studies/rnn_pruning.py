"""Sparse recurrent networks: prune RNN-Tanh, RNN-ReLU, LSTM and GRU by threshold, and wire them as random graphs.

    python scripts/studies/rnn_pruning.py --quick                            # minutes
    python scripts/studies/rnn_pruning.py --scale docs --plots docs          # for docs/rnn-pruning.md, half an hour
    python scripts/studies/rnn_pruning.py --scale long --kinds relu lstm     # for its table of longer training
    python scripts/studies/rnn_pruning.py                                    # the study's sizes: a day on one core

The study is H. Darji, Investigating Sparsity in Recurrent Neural Networks (2021, arXiv 2407.20601). Finished
configurations are lines of results.jsonl in --work: a run that was stopped goes on where it was, and --table prints
what is there. Needs `pip install quantkit[study]`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import reber
import rnn_report
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rnn_graphs import FAMILIES, graph_network, random_graph
from rnn_training import KINDS, Classifier, Strings, accuracy, classifier, train_epoch

from quantkit import Masks, apply_masks, prune_module
from quantkit.model.matrices import TARGETS, find_matrices

LEVELS = range(10, 101, 10)
RECOVERED = 0.002  # retraining ends when the test accuracy is at most this far below that of the dense network
Job = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that decides what is computed; the defaults are the study's.

    `strings` and `graph_strings`, those of the random structures, count strings to train on and to judge on together.
    Training ends before `epochs` after one in which `enough` of the strings that it saw were judged rightly.
    """

    strings: int = 25_000
    hidden: int = 50
    layers: int = 3
    batch: int = 32
    rate: float = 1e-3
    epochs: int = 50
    enough: float = 2.0
    retrain: int = 10
    graphs: int = 100
    graph_strings: int = 25_000
    graph_epochs: int = 15
    graph_batch: int = 128
    graph_rate: float = 1e-3
    seed: int = 0


GRAPHS = {"graphs": 15, "graph_strings": 3200, "graph_epochs": 10, "graph_batch": 64, "graph_rate": 0.01}
SCALES = {
    "study": Sizes(),
    "docs": Sizes(strings=6000, epochs=25, enough=0.999, **GRAPHS),
    "long": Sizes(strings=6000, epochs=60, retrain=1, graphs=0),
    "quick": Sizes(
        strings=2000, hidden=24, layers=2, rate=5e-3, epochs=15, enough=0.99, retrain=2, **GRAPHS | {"graphs": 3}
    ),
}


class Study:
    """The jobs of a study and how each is computed; what is finished is kept in `work`."""

    def __init__(self, sizes: Sizes, kinds: list[str], work: Path) -> None:
        self.sizes, self.kinds, self.work = sizes, kinds, work
        self.file = work / "results.jsonl"

    @property
    def settings(self) -> dict[str, float]:
        """What decides the figures of one job: all sizes but how many graphs there are."""
        return {name: value for name, value in asdict(self.sizes).items() if name != "graphs"}

    def jobs(self) -> Iterator[Job]:
        """Yield every configuration, in the order in which they need each other."""
        for kind in self.kinds:
            yield {"part": "train", "kind": kind}
            for target in TARGETS:
                yield from ({"part": "prune", "kind": kind, "target": target, "percent": level} for level in LEVELS)
        for number in range(self.sizes.graphs):
            for family in FAMILIES:
                yield from ({"part": "graph", "kind": kind, "family": family, "number": number} for kind in self.kinds)

    def finished(self) -> list[tuple[Job, dict[str, Any]]]:
        """Return jobs and figures of the file that were computed with these settings; half a line is ignored."""
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["settings"] == self.settings:
                found.append((entry["job"], entry["figures"]))
        return found

    def run(self, tick: Callable[[str], None]) -> None:
        """Compute what is not finished, a line each."""
        self.work.mkdir(parents=True, exist_ok=True)
        done = [job for job, _ in self.finished()]
        for job in self.jobs():
            tick(" ".join(map(str, job.values())))
            if job in done and not (job["part"] == "train" and not self._saved(job["kind"]).exists()):
                continue
            start = time.process_time()
            figures = {"train": self._train, "prune": self._prune, "graph": self._graph}[job["part"]](job)
            figures["seconds"] = round(time.process_time() - start, 2)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"settings": self.settings, "job": job, "figures": figures}) + "\n")

    def _train(self, job: Job) -> dict[str, Any]:
        network = self._dense(job["kind"])
        optimizer = torch.optim.Adam(network.parameters(), lr=self.sizes.rate)
        generator = torch.Generator().manual_seed(self.sizes.seed)
        accuracies, learned = [], 0.0
        while learned < self.sizes.enough and len(accuracies) < self.sizes.epochs:
            learned = train_epoch(network, self.training, optimizer, generator, self.sizes.batch)
            accuracies.append(accuracy(network, self.test))
        torch.save(network.state_dict(), self._saved(job["kind"]))
        return {"accuracies": accuracies, "memoryless": memoryless(self.test)}

    def _prune(self, job: Job) -> dict[str, Any]:
        """Return the test accuracies: of the dense network, right after pruning, after each epoch with the mask."""
        network = self._dense(job["kind"])
        network.load_state_dict(torch.load(self._saved(job["kind"])))
        accuracies = [accuracy(network, self.test)]
        masks = pruned(network, job["target"], job["percent"])
        accuracies.append(accuracy(network, self.test))
        optimizer = torch.optim.Adam(network.parameters(), lr=self.sizes.rate)
        generator = torch.Generator().manual_seed(self.sizes.seed + 1)
        with masks.keep(optimizer):
            for epoch in range(self.sizes.retrain):
                if epoch and accuracies[-1] >= accuracies[0] - RECOVERED:
                    break
                train_epoch(network, self.training, optimizer, generator, self.sizes.batch)
                accuracies.append(accuracy(network, self.test))
        return {"accuracies": accuracies, "sparsity": masks.sparsity}

    def _graph(self, job: Job) -> dict[str, Any]:
        graph = random_graph(job["family"], seed=1000 * self.sizes.seed + job["number"])
        training, test = self.graph_strings
        network, masks = graph_network(job["kind"], graph, seed=self.sizes.seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.sizes.graph_rate)
        generator = torch.Generator().manual_seed(self.sizes.seed)
        with masks.keep(optimizer):
            for _ in range(self.sizes.graph_epochs):
                train_epoch(network, training, optimizer, generator, self.sizes.graph_batch)
        return {"accuracy": accuracy(network, test), "layers": len(graph.layers), "properties": graph.properties()}

    def _dense(self, kind: str) -> Classifier:
        return classifier(kind, hidden=self.sizes.hidden, layers=self.sizes.layers, seed=self.sizes.seed)

    def _saved(self, kind: str) -> Path:
        """Return where the trained network of a kind is; another file for other settings."""
        settings = "-".join(f"{value:g}" for value in self.settings.values())
        return self.work / f"{kind}-{settings}.pt"

    @cached_property
    def _strings(self) -> tuple[Strings, Strings]:
        return split(self.sizes.strings, self.sizes.seed)

    @property
    def training(self) -> Strings:
        """The three quarters of the strings that networks are trained on."""
        return self._strings[0]

    @property
    def test(self) -> Strings:
        """The quarter of the strings that networks are judged on."""
        return self._strings[1]

    @cached_property
    def graph_strings(self) -> tuple[Strings, Strings]:
        """The strings that the random structures are trained and judged on."""
        return split(self.sizes.graph_strings, self.sizes.seed)


def split(count: int, seed: int) -> tuple[Strings, Strings]:
    """Return three quarters of `count` strings to train on and a quarter to judge on."""
    made = reber.examples(count, seed=seed)
    return Strings.of(made[: count * 3 // 4]), Strings.of(made[count * 3 // 4 :])


def pruned(network: Classifier, target: str, percent: int) -> Masks:
    """Prune the recurrent layers of `network` to `percent`, each matrix by itself, and return the masks."""
    if percent < 100:
        return prune_module(network, sparsity=percent / 100, target=target)
    found = find_matrices(network, target=target)
    return apply_masks(network, {matrix.name: torch.zeros_like(matrix.weight, dtype=torch.bool) for matrix in found})


def memoryless(strings: Strings) -> float:
    """Return the best accuracy of a rule that sees nothing but the last letter."""
    last = strings.codes[torch.arange(len(strings)), strings.lengths - 1]
    right = sum(int(strings.labels[last == letter].bincount().max()) for letter in last.unique())
    return right / len(strings)


def main() -> None:
    """Compute what is missing, print the tables, draw the plots."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    study = Study(SCALES[args.scale], args.kinds, args.work)
    if not args.table:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=sum(1 for _ in study.jobs()), completed=-1)
            study.run(lambda job: progress.update(task, advance=1, description=job))
            progress.update(task, advance=1, description="done")
    print(rnn_report.tables(study.finished()))
    if args.plots:
        for path in rnn_report.plots(study.finished(), args.plots):
            print(f"drawn: {path}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--scale", choices=SCALES, default="study")
    made.add_argument("--quick", dest="scale", action="store_const", const="quick", help="the same as --scale quick")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--work", type=Path, default=Path(".rnn-study"), help="where finished configurations are kept")
    made.add_argument("--plots", type=Path, help="directory to draw into")
    made.add_argument("--table", action="store_true", help="run nothing, show what is there")
    return made.parse_args()


if __name__ == "__main__":
    main()
