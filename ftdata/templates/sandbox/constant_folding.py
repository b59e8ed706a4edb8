"""Compile without computing: what is written out in a template may take for ever, or fill the memory.

Jinja works constant expressions out while it compiles, which nothing limits.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.meta import TrackingCodeGenerator


class UnfoldedCodeGenerator(CodeGenerator):
    """Writes the code of templates as they stand: of constants, it joins nothing but the template's own text."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.optimizer = None

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return CodeGenerator._output_child_to_const(self, node, frame, finalize)


class _Names(TrackingCodeGenerator):
    _output_child_to_const = UnfoldedCodeGenerator._output_child_to_const

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.optimizer = None


def template_variables(syntax: nodes.Template) -> frozenset[str]:
    """Return the variables that a template reads."""
    assert syntax.environment is not None
    found = _Names(syntax.environment)
    found.visit(syntax)
    return frozenset(found.undeclared_identifiers)
