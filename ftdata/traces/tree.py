"""Find the contexts of a session whose records form a tree: each path from the root to a leaf is a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ftdata.traces.steps import SKIP_SESSION, BadRecord, Step


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
        root: the first node of the conversation.
    """

    parent: Node | None
    is_response: bool
    is_injected: bool = False
    steps: list[Step] = field(default_factory=list)
    later_steps: list[Step] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)
    root: Node = field(init=False)

    def __post_init__(self) -> None:
        self.root = self if self.parent is None else self.parent.root

    def path(self) -> list[Node]:
        """Return the nodes from the root to this node."""
        nodes, node = [self], self.parent
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def missing_parent(record: int, parent: object, field: str) -> BadRecord:
    """Return the error for a record whose parent is not in the session."""
    problem = f"the session does not contain the record {parent} that the record continues"
    hint = f"add the missing records; otherwise {SKIP_SESSION}"
    return BadRecord(record, "missing_parent", problem, field=field, hint=hint)


def connect_nodes(nodes: Iterable[Node]) -> None:
    """Set the children of all nodes, in the order of the nodes."""
    for node in nodes:
        if node.parent is not None:
            node.parent.children.append(node)


def move_injected_into_path(nodes: Sequence[Node]) -> None:
    """Move each message that the program added in front of the node after it.

    Such messages have the same parent as the node after them. They are not branches, because no response follows them.
    """
    for parent in nodes:
        children, parent.children = parent.children, []
        last: Node | None = None
        for child in children:
            is_leaf = not child.children
            owner = parent if last is None else last
            owner.children.append(child)
            child.parent = owner
            last = child if child.is_injected and is_leaf else None


def remove_retried_responses(nodes: Sequence[Node]) -> set[Node]:
    """Remove responses that were generated again before anything continued them. Return the removed nodes."""
    removed = set[Node]()
    for node in nodes:
        if not node.is_response or node.children or node.later_steps or node.parent is None:
            continue
        siblings = node.parent.children
        if any(sibling.is_response for sibling in siblings[siblings.index(node) + 1 :]):
            siblings.remove(node)
            removed.add(node)
    return removed


def remove_if_leaf(nodes: Iterable[Node]) -> set[Node]:
    """Remove the nodes without children from the tree, and return them."""
    removed = set[Node]()
    for node in nodes:
        if not node.children:
            removed.add(node)
            if node.parent is not None and node in node.parent.children:
                node.parent.children.remove(node)
    return removed


def find_abandoned(nodes: Sequence[Node]) -> set[Node]:
    """Return the nodes on branches that the user left.

    Args:
        nodes: all nodes, each after its parent.
    """
    last = dict[Node, int]()
    for node in reversed(nodes):
        last_record = -1 if node.is_injected and not node.children else node.records[-1]
        last[node] = max([last_record, *(last[child] for child in node.children)])
    abandoned = set[Node]()
    for node in nodes:
        latest = max((last[child] for child in node.children), default=-1)
        abandoned.update(child for child in node.children if last[child] < latest or node in abandoned)
    return abandoned


def leaf_paths(nodes: Iterable[Node]) -> list[list[Node]]:
    """Return the path of each leaf, in the order of the last records of the leaves."""
    leaves = [node for node in nodes if not node.children]
    return [leaf.path() for leaf in sorted(leaves, key=lambda leaf: leaf.records[-1])]


def path_steps(path: Iterable[Node]) -> list[Step]:
    """Return the steps of a path."""
    return [step for node in path for step in (*node.steps, *node.later_steps)]
