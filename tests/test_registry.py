"""Registries: registered names and functions from files."""

import pytest

from ftdata.errors import UsageError
from ftdata.registry import Registry


def test_registry_loads_functions_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def shape():\n    return 4\n")
    registry = Registry("ftdata.tests", "shape")
    assert registry.get(f"{path}:shape")() == 4
    with pytest.raises(UsageError, match="did you mean 'shape'"):
        registry.get(f"{path}:shap")
    with pytest.raises(UsageError, match="does not exist"):
        registry.get(f"{tmp_path}/none.py:shape")
