"""Compile templates without evaluating constant expressions.

By default, Jinja evaluates constant expressions while it compiles a template. A constant expression in a hostile
template could run forever or exhaust memory.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.meta import TrackingCodeGenerator


class UnfoldedCodeGenerator(CodeGenerator):
    """A Jinja code generator that does not evaluate constant expressions during compilation."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.optimizer = None

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return CodeGenerator._output_child_to_const(self, node, frame, finalize)


class _VariableFinder(TrackingCodeGenerator):
    _output_child_to_const = UnfoldedCodeGenerator._output_child_to_const

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.optimizer = None


def template_variables(syntax: nodes.Template) -> frozenset[str]:
    """Return the names of the variables that a template reads."""
    assert syntax.environment is not None
    finder = _VariableFinder(syntax.environment)
    finder.visit(syntax)
    return frozenset(finder.undeclared_identifiers)
