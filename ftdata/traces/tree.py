"""Find the contexts of a session whose records form a tree: each path from the root to a leaf is a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ftdata.traces.steps import Step


@dataclass(eq=False, slots=True)
class Node:
    """A response of the model with the results of its calls, or a message of another role.

    Attributes:
        parent: the node before this node in the conversation; `None` for the first.
        is_response: whether the node is a response of the model.
        is_injected: whether the program added the message, or inserted it into a running turn.
        steps: the parts of the response, or the message.
        later_steps: the results of the response's calls, and messages that were recorded together with them.
        records: indices of all records of the node, in order.
        children: the nodes after this node; more than one if the conversation branches.
    """

    parent: Node | None
    is_response: bool
    is_injected: bool = False
    steps: list[Step] = field(default_factory=list)
    later_steps: list[Step] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def path(self) -> list[Node]:
        """Return the nodes from the root to this node."""
        nodes, node = [self], self.parent
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def connect_nodes(nodes: Iterable[Node]) -> None:
    """Set the children of all nodes, in the order of the nodes."""
    for node in nodes:
        if node.parent is not None:
            node.parent.children.append(node)


def chain_injected(nodes: Sequence[Node]) -> None:
    """Insert messages that the program added into the path of the next node.

    Such a message has the same parent as the node after it. It is not a branch, because no response follows it.
    """
    for node in nodes:
        if node.parent is None or node.children or not node.is_injected:
            continue
        siblings = node.parent.children
        following = siblings[siblings.index(node) + 1 :]
        if following:
            siblings.remove(following[0])
            node.children.append(following[0])
            following[0].parent = node


def remove_retried(nodes: Sequence[Node]) -> list[Node]:
    """Remove responses that were generated again before anything continued them. Return the removed nodes."""
    removed = list[Node]()
    for node in nodes:
        if not node.is_response or node.children or node.later_steps or node.parent is None:
            continue
        siblings = node.parent.children
        if any(sibling.is_response for sibling in siblings[siblings.index(node) + 1 :]):
            siblings.remove(node)
            removed.append(node)
    return removed


def leaf_paths(nodes: Iterable[Node]) -> list[list[Node]]:
    """Return the path of each leaf, in the order of the last records of the leaves."""
    leaves = [node for node in nodes if not node.children]
    return [leaf.path() for leaf in sorted(leaves, key=lambda leaf: leaf.records[-1])]


def is_abandoned(path: Sequence[Node]) -> bool:
    """Return whether the session went on from an earlier node of the path, in another branch."""
    return any(node.parent is not None and _last_record(node) < _last_record(node.parent) for node in path)


def _last_record(root: Node) -> int:
    """Return the last record of a node and all nodes after it."""
    last, nodes = root.records[-1], [root]
    while nodes:
        node = nodes.pop()
        last = max(last, node.records[-1])
        nodes += node.children
    return last


def path_steps(path: Iterable[Node], insert: Callable[[Node], Iterable[Step]] = lambda _: ()) -> list[Step]:
    """Return the steps of a path. After each node, add the steps that `insert` returns for it."""
    steps = list[Step]()
    for node in path:
        steps += [*node.steps, *node.later_steps, *insert(node)]
    return steps
