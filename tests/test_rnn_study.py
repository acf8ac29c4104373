"""The study of sparse RNNs: the grammar against a regular expression, graphs, and a run that resumes."""

import json
import re
import sys
from pathlib import Path

import networkx
import pytest
import torch

import quantkit

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts" / "studies"))
import reber
import rnn_pruning
import rnn_report
from rnn_graphs import FAMILIES, Graph, graph_network, pearson, random_graph
from rnn_training import KINDS, Strings, accuracy, classifier, recurrent, train_epoch

# the grammar once more, as an expression: what follows X from either side is a loop, then S, or X T* V V
LOOP = "(XT*VP)*(S|XT*VV)"
GRAMMAR = re.compile(f"B(TS*X{LOOP}|PT*V(V|P{LOOP}))E")
TINY = rnn_pruning.Sizes(
    strings=160, hidden=6, layers=1, epochs=1, retrain=1, graphs=1, graph_strings=80, graph_epochs=1, rate=0.01
)


@pytest.fixture(scope="module")
def made():
    return reber.examples(900, seed=3)


def test_true_strings_are_those_of_the_grammar(made):
    assert sum(example.valid for example in made) == 450
    for example in made:
        assert bool(GRAMMAR.fullmatch(example.text)) == example.valid == reber.valid(example.text)
        assert 10 <= len(example.text) <= 54


def test_the_checker_agrees_with_the_expression_near_the_grammar():
    assert reber.valid("BTXSE")
    assert reber.valid("BPVVE")
    for text in ("", "B", "BTXS", "BTXSEE", "BTXSEB", "XTXSE", "BTSSE", "BPTTE", "BPVPE", "btxse", "BTXSE "):
        assert not reber.valid(text)
        assert not GRAMMAR.fullmatch(text)


def test_strings_are_different_seeded_and_tell_nothing_by_their_length_or_ends(made):
    assert len({example.text for example in made}) == len(made)
    assert made == reber.examples(900, seed=3) != reber.examples(900, seed=4)
    lengths = {valid: [len(example.text) for example in made if example.valid == valid] for valid in (True, False)}
    mean = {valid: sum(found) / len(found) for valid, found in lengths.items()}
    assert abs(mean[True] - mean[False]) < 1
    strings = Strings.of(made)
    assert rnn_pruning.memoryless(strings) < 0.55
    assert {example.text for example in made[:300]} != {example.text for example in sorted(made, key=str)[:300]}


def test_every_string_is_in_one_batch_with_its_own_length(made):
    strings = Strings.of(made)
    for generator in (None, torch.Generator().manual_seed(0)):
        seen = []
        for batch in strings.batches(64, generator):
            rows = zip(batch.codes.tolist(), batch.lengths.tolist(), batch.labels.tolist(), strict=True)
            seen += [(bytes(codes[:length]).decode(), bool(label)) for codes, length, label in rows]
        assert sorted(seen) == sorted((example.text, example.valid) for example in made)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    network = classifier(kind, hidden=5, layers=2, seed=0)
    alone, beside = (
        Strings.of([reber.Example(text, valid=True) for text in texts]) for texts in (["BTXSE"], ["BTXSE", "BTSSSXSE"])
    )
    assert torch.allclose(network(alone)[0], network(beside)[0], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 5])
def test_layers_follow_the_edges(family, seed):
    graph = random_graph(family, seed=seed)
    assert networkx.is_connected(graph.graph)
    assert 10 <= len(graph.graph) <= 50
    acyclic = networkx.DiGraph((min(edge), max(edge)) for edge in graph.graph.edges)
    assert [sorted(layer) for layer in graph.layers] == [
        sorted(layer) for layer in networkx.topological_generations(acyclic)
    ]
    assert graph.properties() == random_graph(family, seed=seed).properties()


@pytest.mark.parametrize(("kind", "gates"), [("tanh", 1), ("lstm", 4), ("gru", 3)])
def test_a_network_has_the_edges_of_its_graph(kind, gates):
    # 0 and 1 are sources, 2 sees 0, 3 sees 1 and 2: with a layer between, 1 → 3 skips one
    graph = Graph("ws", networkx.Graph([(0, 2), (1, 3), (2, 3)]))
    assert graph.layers == [[0, 1], [2], [3]]
    network, masks = graph_network(kind, graph, seed=0)
    assert {name: mask[: len(mask) // gates].int().tolist() for name, mask in masks.items()} == {
        "body.layers.1.weight_ih_l0": [[1, 0]],
        "body.layers.2.weight_ih_l0": [[0, 1, 1]],
    }
    assert all(torch.equal(mask, mask[:1].repeat(gates, 1)) for mask in masks.values())
    assert not network.body.layers[1].weight_ih_l0[:, 1].any()


def test_properties_of_a_star():
    star = Graph("ba", networkx.star_graph(4)).properties()
    assert (star["nodes"], star["edges"], star["source nodes"], star["diameter"]) == (5, 4, 1, 2)
    assert star["density"] == 0.2  # as the study counts it: edges of n (n - 1)
    assert star["average shortest path"] == pytest.approx((4 * 1 + 6 * 2) / 10)
    assert star["degree variance"] == pytest.approx(0.75**2 / 5)
    assert star["edge betweenness variance"] == pytest.approx(0)


def test_pearson():
    assert pearson([1, 2, 3], [2, 4, 7]) == pytest.approx(0.9933992678)
    assert str(pearson([1, 1], [2, 3])) == "nan"


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(rnn_pruning, "LEVELS", [60, 100])
    ticks = []
    study = rnn_pruning.Study(TINY, ["lstm"], tmp_path)
    study.run(ticks.append)
    jobs = [*study.jobs()]
    assert len(ticks) == len(jobs) == 1 + 3 * 2 + 2
    first = study.finished()
    assert [job for job, _ in first] == jobs
    lines = study.file.read_text().splitlines()
    study.file.write_text("\n".join([*lines[:4], lines[4][:50]]) + "\n")  # stopped while a line was written
    study.run(lambda job: None)
    again = study.finished()
    assert [job for job, _ in again] == jobs
    without_time = [[{**run, "seconds": 0} for _, run in found] for found in (first, again)]
    assert without_time[0] == without_time[1]
    assert len(study.file.read_text().splitlines()) == len(lines) + 1  # and half a line
    assert rnn_pruning.Study(rnn_pruning.Sizes(), ["lstm"], tmp_path).finished() == []


def test_tables_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(rnn_pruning.SCALES, "quick", TINY)
    monkeypatch.setattr(
        sys, "argv", ["rnn_pruning.py", "--quick", "--kinds", "lstm", "--work", str(tmp_path), "--plots", str(tmp_path)]
    )
    monkeypatch.setattr(rnn_pruning, "LEVELS", [60, 100])
    rnn_pruning.main()
    printed = capsys.readouterr().out
    assert "| both 60 % | – | – | 0." in printed
    assert "| both, published | 80 % | 70 % | 60 % | 80 % |" in printed
    assert printed.count("| network | epochs |") == printed.count("| mean accuracy |") == 1
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert set(drawn) == {f"rnn-pruning-{name}.svg" for name in ("levels", "recovery", "graphs")}
    entries = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rnn_report.plots([(entry["job"], entry["figures"]) for entry in entries], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == drawn


def test_a_safe_level_ends_at_the_first_loss():
    job = {"part": "prune", "kind": "gru", "target": "both"}
    levels = {10: [1, 1, 1], 20: [1, 0.995, 1], 30: [1, 0.9, 1], 40: [1, 1, 1]}
    finished = [({**job, "percent": percent}, {"accuracies": run}) for percent, run in levels.items()]
    table = rnn_report.safe(finished)
    assert "| both, right after | none | none | none | 20 % |" in table
    assert "| both, one epoch later | none | none | none | 40 % |" in table


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_one_masked_epoch_brings_the_accuracy_back(kind):
    """The study's main finding, on a network of seconds: 60 % of both go, one epoch later nothing is lost."""
    training, test = rnn_pruning.split(2000, 0)
    network = classifier(kind, hidden=24, layers=1, seed=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        train_epoch(network, training, optimizer, generator, 32)
    dense = accuracy(network, test)
    assert dense > 0.97
    masks = quantkit.prune_module(network, sparsity=0.6, target="both")
    with masks.keep(optimizer):
        train_epoch(network, training, optimizer, generator, 32)
    assert accuracy(network, test) >= dense - 0.01
    for name, mask in masks.items():
        weight = network.get_parameter(name)
        assert int((weight == 0).sum()) == int((~mask).sum()) == round(0.6 * weight.numel())


def test_kinds_are_torchs_own_layers():
    assert [type(recurrent(kind, 2, 3)).__name__ for kind in KINDS] == ["RNN", "RNN", "LSTM", "GRU"]
    assert [recurrent(kind, 2, 3).nonlinearity for kind in ("tanh", "relu")] == ["tanh", "relu"]
