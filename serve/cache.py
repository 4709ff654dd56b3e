"""The prefix cache: snapshots of sequences in a tree over their tokens, so that no prompt is read twice.

Rule: a snapshot is used only for exactly the tokens that led to it, and continues as if they had been read
again. The state of a RetNet has one size, however much was read: a remembered book costs what a remembered word does. When the
budget is spent, the snapshot that was used longest ago goes.

Where a prompt parts from those seen before is only known when the second one comes: the tree knows the place, and the cache
asks for a snapshot there. The third prompt finds it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.generate.state import Snapshot

Tokens = NDArray[np.int64]

STRIDE = 512
"""Tokens between snapshots inside a long prompt, at least."""
MOST = 8
"""Snapshots inside one prompt, at most: the distance doubles until they suffice."""
WORTH = 16
"""Tokens that a snapshot must spare to be taken where two prompts part."""


@dataclass(eq=False)
class _Node:
    """The end of a sequence that is remembered, or the place where some part.

    Attributes:
        edge: the tokens from the parent to here.
        depth: tokens from the root to here.
    """

    parent: _Node | None
    edge: Tokens
    depth: int
    children: dict[int, _Node] = field(default_factory=dict)
    snapshot: Snapshot | None = None


class PrefixCache:
    """Snapshots by their tokens, within a budget. Safe to use from several threads.

    Args:
        budget: bytes of all snapshots together.

    Attributes:
        bytes: of those that are held.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self._root = _Node(None, np.zeros(0, np.int64), 0)
        self._by_use: OrderedDict[_Node, None] = OrderedDict()
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._by_use)

    def find(self, tokens: Sequence[int]) -> tuple[int, Snapshot | None]:
        """The longest remembered beginning of a sequence: its length and its snapshot; 0 and None if there is none."""
        with self._guard:
            best = None
            for node, matched in self._path(_array(tokens)):
                if node.snapshot is not None and matched == len(node.edge):
                    best = node
            if best is None:
                return 0, None
            self._by_use.move_to_end(best)
            return best.depth, best.snapshot

    def wanted(self, tokens: Sequence[int], start: int) -> Sequence[int]:
        """Token counts beyond `start` where a snapshot will be of use: where these tokens part from others, and every so far."""
        with self._guard:
            shared = max((node.depth - len(node.edge) + matched for node, matched in self._path(_array(tokens))), default=0)
        stride = STRIDE
        while len(tokens) > stride * MOST:
            stride *= 2
        places = set(range(stride, len(tokens), stride))
        if shared >= WORTH:
            places.add(shared)
        return sorted(place for place in places if place > start)

    def keep(self, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """Remember a sequence; nothing happens if it is empty or alone more than the budget."""
        size = bytes_of(snapshot)
        if not len(tokens) or size > self.budget:
            return
        with self._guard:
            node = self._node(_array(tokens))
            if node.snapshot is not None:
                self.bytes -= bytes_of(node.snapshot)
            node.snapshot = snapshot
            self.bytes += size
            self._by_use[node] = None
            self._by_use.move_to_end(node)
            while self.bytes > self.budget:
                self._forget(next(iter(self._by_use)))

    def entries(self) -> list[tuple[Tokens, Snapshot]]:
        """All that is held, the last used first."""
        with self._guard:
            return [(self._tokens(node), node.snapshot) for node in reversed(self._by_use) if node.snapshot is not None]

    def _path(self, tokens: Tokens) -> Iterator[tuple[_Node, int]]:
        """The nodes that tokens lead through, and how much of each one's edge they match: all, but for the last."""
        node, rest = self._root, tokens
        while len(rest) and (following := node.children.get(int(rest[0]))) is not None:
            matched = _shared(following.edge, rest)
            yield following, matched
            if matched < len(following.edge):
                return
            node, rest = following, rest[matched:]

    def _node(self, tokens: Tokens) -> _Node:
        """The node at the end of tokens, made if it is not there."""
        node, depth = self._root, 0
        for following, matched in list(self._path(tokens)):
            if matched < len(following.edge):
                following = _split(following, matched)
            node, depth = following, following.depth
        if depth < len(tokens):
            child = _Node(node, tokens[depth:], len(tokens))
            node.children[int(tokens[depth])] = child
            node = child
        return node

    def _forget(self, node: _Node) -> None:
        assert node.snapshot is not None
        self.bytes -= bytes_of(node.snapshot)
        node.snapshot = None
        del self._by_use[node]
        # What leads nowhere goes, and what is no longer a parting is joined to its only child.
        while node.parent is not None and node.snapshot is None and not node.children:
            del node.parent.children[int(node.edge[0])]
            node = node.parent
        if node.parent is not None and node.snapshot is None and len(node.children) == 1:
            (child,) = node.children.values()
            child.edge, child.parent = np.concatenate([node.edge, child.edge]), node.parent
            node.parent.children[int(child.edge[0])] = child

    def _tokens(self, node: _Node) -> Tokens:
        edges = []
        above: _Node | None = node
        while above is not None:
            edges.append(above.edge)
            above = above.parent
        return np.concatenate(edges[::-1])


def bytes_of(snapshot: Snapshot) -> int:
    """What holding a snapshot costs."""
    logits = 0 if snapshot.logits is None else snapshot.logits.nbytes
    return snapshot.bytes + snapshot.read.nbytes + snapshot.history.nbytes + logits


def _split(node: _Node, at: int) -> _Node:
    """A new node in the middle of a node's edge."""
    assert node.parent is not None
    middle = _Node(node.parent, node.edge[:at], node.depth - len(node.edge) + at)
    node.parent.children[int(node.edge[0])] = middle
    node.parent, node.edge = middle, node.edge[at:]
    middle.children[int(node.edge[0])] = node
    return middle


def _shared(edge: Tokens, tokens: Tokens) -> int:
    """How many of the first tokens are the same."""
    count = min(len(edge), len(tokens))
    differ = edge[:count] != tokens[:count]
    return int(differ.argmax()) if differ.any() else count


def _array(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, np.int64)
