"""Recurrent networks whose connections are a random graph, and the properties of such graphs.

A graph of Watts and Strogatz or of Barabási and Albert becomes acyclic by pointing every edge from the node with the
smaller number to that with the larger. A node's layer is one more than the last layer of the nodes that point to it;
the sources are layer 0. Each layer is a recurrent layer of its nodes, whose inputs are all nodes of all layers before
it, masked to the graph's edges; within a layer every node sees every node of the step before. Sources see the embedded
letter, and the last layer is what the classifier reads.
"""

import random
import statistics
from dataclasses import dataclass

import networkx
import torch
from rnn_training import Classifier, recurrent
from torch import Tensor, nn

from quantkit import Masks, apply_masks

FAMILIES = {"ws": "Watts–Strogatz", "ba": "Barabási–Albert"}
PROPERTIES = (
    *("nodes", "edges", "source nodes", "density", "diameter", "average shortest path"),
    *("degree variance", "closeness variance", "node betweenness variance", "edge betweenness variance"),
)


@dataclass(frozen=True)
class Graph:
    """A connected undirected graph whose nodes are 0, 1, …; `layers` and `sources` are those of its acyclic form."""

    family: str
    graph: networkx.Graph

    @property
    def layers(self) -> list[list[int]]:
        """The nodes of each layer, in their order."""
        layer: dict[int, int] = {}
        for node in sorted(self.graph):
            layer[node] = 1 + max((layer[other] for other in self.parents(node)), default=-1)
        return [[node for node in layer if layer[node] == index] for index in range(1 + max(layer.values()))]

    def parents(self, node: int) -> list[int]:
        """Return the nodes that point to `node`."""
        return sorted(other for other in self.graph[node] if other < node)

    def properties(self) -> dict[str, float]:
        """Return the figures of `PROPERTIES`; variances are those of a sample, over nodes or edges."""
        graph, nodes = self.graph, len(self.graph)
        figures = (
            nodes,
            graph.number_of_edges(),
            len(self.layers[0]),
            graph.number_of_edges() / (nodes * (nodes - 1)),
            networkx.diameter(graph),
            networkx.average_shortest_path_length(graph),
            statistics.variance(networkx.degree_centrality(graph).values()),
            statistics.variance(networkx.closeness_centrality(graph).values()),
            statistics.variance(networkx.betweenness_centrality(graph).values()),
            statistics.variance(networkx.edge_betweenness_centrality(graph).values()),
        )
        return dict(zip(PROPERTIES, map(float, figures), strict=True))


def random_graph(family: str, *, seed: int, smallest: int = 10, largest: int = 50) -> Graph:
    """Return a graph of a family of `FAMILIES` with a random number of nodes, as the study draws them.

    Watts–Strogatz: connected, n // 5 neighbours, every edge rewired; Barabási–Albert: n // 10 edges of each new node.
    """
    nodes = random.Random(seed).randint(smallest, largest)
    if family == "ws":
        return Graph(family, networkx.connected_watts_strogatz_graph(nodes, nodes // 5, 1.0, tries=100, seed=seed))
    return Graph(family, networkx.barabasi_albert_graph(nodes, nodes // 10, seed=seed))


class Layered(nn.Module):
    """Recurrent layers, each of which sees the states of all layers before it at the same letter."""

    def __init__(self, kind: str, sizes: list[int]) -> None:
        super().__init__()
        inputs = [sizes[0], *(sum(sizes[:index]) for index in range(1, len(sizes)))]
        self.layers = nn.ModuleList(recurrent(kind, width, size) for width, size in zip(inputs, sizes, strict=True))

    def forward(self, letters: Tensor) -> Tensor:
        """Return the states of the last layer (batch, letters, nodes of the last layer)."""
        states = self.layers[0](letters)[0]
        for layer in self.layers[1:]:
            new = layer(states)[0]
            states = torch.cat([states, new], dim=-1)
        return new if len(self.layers) > 1 else states


def graph_network(kind: str, graph: Graph, *, seed: int) -> tuple[Classifier, Masks]:
    """Return an untrained network with the connections of `graph`, and the masks that keep others out of it."""
    layers = graph.layers
    torch.manual_seed(seed)
    network = Classifier(Layered(kind, [len(layer) for layer in layers]), len(layers[0]), len(layers[-1]))
    masks, before = {}, [*layers[0]]
    for index, layer in enumerate(layers[1:], start=1):
        edges = torch.tensor([[other in graph.graph[node] for other in before] for node in layer])
        name = f"body.layers.{index}.weight_ih_l0"
        gates = network.get_parameter(name).shape[0] // len(layer)
        masks[name] = edges.repeat(gates, 1)
        before += layer
    return network, apply_masks(network, masks)


def pearson(first: list[float], second: list[float]) -> float:
    """Return Pearson's correlation; nan where one of them does not vary."""
    if any(len(set(values)) < 2 for values in (first, second)):
        return float("nan")
    return statistics.correlation(first, second)
