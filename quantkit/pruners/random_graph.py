"""Random structures: a seeded graph says which groups of outputs read which groups of inputs, whatever the weights are.

Watts and Strogatz, Nature 393 (1998), and Barabási and Albert, Science 286 (1999), as structures of networks: You et
al., arXiv 2007.06559. Inputs and outputs are dealt out to the nodes in order; weights between nodes that an edge joins,
and within a node, stay. The number of edges comes as near to what is asked for as the graph allows, and what is missing
or too much is drawn at random, so that counts are exact. A structure to start training from, or to compare with.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import networkx
import torch
from jaxtyping import Bool
from torch import Tensor

from quantkit.calibrate.passes import Window
from quantkit.core.masks import Sparsity, choose
from quantkit.errors import UsageError
from quantkit.model.block import Site
from quantkit.pruners._pruner import Pruner, take

Kind = Literal["watts-strogatz", "barabasi-albert"]
KINDS: tuple[Kind, ...] = ("watts-strogatz", "barabasi-albert")


def random_graph(kind: Kind, nodes: int, kept: float, *, rewired: float = 1.0, seed: int = 0) -> networkx.Graph:
    """Return a connected graph whose share of joined pairs, each node with itself too, is as near to `kept` as it can.

    Args:
        kind: of Watts and Strogatz, a ring whose edges are rewired; or of Barabási and Albert, where the many get more.
        nodes: how many, at least 3.
        kept: share of the pairs.
        rewired: probability that an edge of the ring is.
        seed: of everything random.
    """
    wanted = kept * nodes - 1  # neighbours of a node
    if kind == "watts-strogatz":
        neighbours = min(max(2, 2 * round(wanted / 2)), nodes - 1)
        return networkx.connected_watts_strogatz_graph(nodes, neighbours, rewired, tries=1000, seed=seed)
    attached = range(1, nodes)
    best = min(attached, key=lambda m: abs(2 * m * (nodes - m) / nodes - wanted))  # m edges come with every node
    return networkx.barabasi_albert_graph(nodes, best, seed=seed)


def mask_of(
    graph: networkx.Graph, shape: tuple[int, int], sparsity: Sparsity, *, seed: int = 0
) -> Bool[Tensor, "out in"]:
    """Return the mask of a weight (out, in) that keeps what the graph joins; exactly as much as is asked for."""
    joined = torch.from_numpy(networkx.to_numpy_array(graph, dtype="float32", weight=None))
    joined.fill_diagonal_(1)
    of_rows, of_columns = (torch.arange(size) * len(joined) // size for size in shape)
    chance = torch.rand(shape, generator=torch.Generator().manual_seed(seed))  # below 1: an edge counts more
    return choose(joined[of_rows][:, of_columns] + chance, sparsity)


@dataclass(frozen=True, kw_only=True)
class RandomGraph(Pruner):
    """Masks of random graphs, another one for each linear.

    Attributes:
        graph: the kind.
        nodes: how many nodes a graph has, at most as many as the smaller side of the weight.
        rewired: probability that an edge of a ring of Watts and Strogatz is rewired.
    """

    learns: ClassVar[bool] = False

    graph: Kind = "watts-strogatz"
    nodes: int = 64
    rewired: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.graph not in KINDS:
            raise UsageError(f"graph must be one of {', '.join(KINDS)}, not {self.graph!r}")
        if self.nodes < 3:
            raise UsageError(f"nodes must be at least 3, not {self.nodes}")
        if not 0 <= self.rewired <= 1:
            raise UsageError(f"rewired is a probability, not {self.rewired}")

    def prune(self, window: Window, sites: Sequence[Site]) -> None:
        """Keep what the graphs join."""
        for site in sites:
            assert site.sparsity is not None
            rows, columns = site.weight.T.shape if site.transposed else site.weight.shape
            seed = (window.seed << 32) + zlib.crc32(site.name.encode())
            nodes = min(self.nodes, rows, columns)
            graph = random_graph(self.graph, nodes, 1 - site.sparsity.share, rewired=self.rewired, seed=seed)
            mask = mask_of(graph, (rows, columns), site.sparsity, seed=seed)
            mask = mask.T.contiguous() if site.transposed else mask
            take(site, mask.to(site.weight.device))


METHOD = RandomGraph
