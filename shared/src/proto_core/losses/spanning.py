"""Components of an image as a threshold moves: persistence pairs, and pairs of pixels that an edge joins.

Both are Kruskal's algorithm: regions merge along edges in the order of their values. On the host, for the losses of
:mod:`proto_core.losses.topology`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

__all__ = ["component_pairs", "spanning_pairs"]


def component_pairs(f: Float[np.ndarray, "H W"]) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """Where components of the sub-level sets are born and where they die (8-connected, dimension 0, finite pairs).

    Of two components that meet the one with the higher minimum dies; pairs without persistence are left out, equal
    values come in the order of the pixels. Every pixel first goes down to its local minimum, so that only saddles
    between minima have to be looked at.

    Args:
        f: values.

    Returns:
        Flat places of births and deaths, in the order of the deaths.

    Example:
        >>> import numpy as np
        >>> from proto_core.losses.spanning import component_pairs
        >>> birth, death = component_pairs(np.array([[0.0, 0.9, 0.2]]))
        >>> birth.tolist(), death.tolist()
        ([2], [1])
    """
    height, width = f.shape
    flat = f.reshape(-1)
    rank = np.empty(flat.size, dtype=np.int64)
    rank[np.argsort(flat, kind="stable")] = np.arange(flat.size)
    grid = rank.reshape(height, width)
    place = np.arange(flat.size).reshape(height, width)
    around = np.pad(grid, 1, constant_values=flat.size)
    around_place = np.pad(place, 1, constant_values=-1)
    offsets = [(r, c) for r in range(3) for c in range(3) if (r, c) != (1, 1)]
    ranks = np.stack([around[r : r + height, c : c + width] for r, c in offsets])
    places = np.stack([around_place[r : r + height, c : c + width] for r, c in offsets])
    lowest = ranks.argmin(axis=0)
    below = np.take_along_axis(ranks, lowest[None], 0)[0] < grid
    basin = np.where(below, np.take_along_axis(places, lowest[None], 0)[0], place).reshape(-1)
    while True:
        further = basin[basin]
        if (further == basin).all():
            break
        basin = further
    # saddles: a pixel with a lower neighbour in another basin
    own = np.broadcast_to(basin.reshape(height, width), ranks.shape)
    other = np.where(places >= 0, basin[places], own)
    saddle = (ranks < grid) & (other != own)
    top = np.broadcast_to(place, ranks.shape)[saddle]
    order = np.argsort(rank[top], kind="stable")
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.get(node, node) != node:
            parent[node] = parent.get(parent[node], parent[node])
            node = parent[node]
        return node

    births, deaths = [], []
    for pixel, one, two in zip(top[order].tolist(), own[saddle][order].tolist(), other[saddle][order].tolist()):
        a, b = root(one), root(two)
        if a == b:
            continue
        if rank[a] < rank[b]:
            a, b = b, a
        parent[a] = b  # the younger dies
        if flat[pixel] > flat[a]:
            births.append(a)
            deaths.append(pixel)
    return np.array(births, dtype=np.int64), np.array(deaths, dtype=np.int64)


def spanning_pairs(
    one: Int[np.ndarray, "E"], two: Int[np.ndarray, "E"], cost: Float[np.ndarray, "E"], labels: Int[np.ndarray, "V"]
) -> tuple[Float[np.ndarray, "E"], Float[np.ndarray, "E"]]:
    """How many pairs of nodes each edge joins in a maximum spanning forest: of one label, and of two.

    Edges come in decreasing cost, equal ones as they stand. Label 0 takes part in no pair.

    Args:
        one: one end of each edge.
        two: the other end.
        cost: of the edges.
        labels: of the nodes, from 0.

    Returns:
        Numbers of pairs of equal and of different labels, by edge.

    Example:
        >>> import numpy as np
        >>> from proto_core.losses.spanning import spanning_pairs
        >>> edges = np.array([0, 1]), np.array([1, 2]), np.array([1.0, 2.0])
        >>> same, other = spanning_pairs(*edges, np.array([1, 1, 2]))
        >>> same.tolist(), other.tolist()
        ([1.0, 0.0], [1.0, 1.0])
    """
    same, other = np.zeros(len(cost)), np.zeros(len(cost))
    parent = list(range(len(labels)))
    counts: list[dict[int, int]] = [{} if name == 0 else {name: 1} for name in labels.tolist()]
    totals = [0 if name == 0 else 1 for name in labels.tolist()]
    order = np.argsort(-cost, kind="stable")
    for edge, a, b in zip(order.tolist(), one[order].tolist(), two[order].tolist()):
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a == b:
            continue
        if len(counts[a]) < len(counts[b]):
            a, b = b, a
        equal = sum(counts[a].get(name, 0) * count for name, count in counts[b].items())
        same[edge], other[edge] = equal, totals[a] * totals[b] - equal
        for name, count in counts[b].items():
            counts[a][name] = counts[a].get(name, 0) + count
        totals[a] += totals[b]
        parent[b] = a
    return same, other
