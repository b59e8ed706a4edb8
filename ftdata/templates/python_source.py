"""Read Python files with functions that are used as chat templates, without running them."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from ftdata.errors import TemplateRefused
from ftdata.storage import disk


def read_source(path: Path) -> str:
    """Return the code of a file, and a comment for each module that it imports: a file of its folder, or a package.

    The comments contain the hashes of the files and the versions of the packages, so that a build records them.

    Raises:
        TemplateRefused: `template_syntax`, if the file is not valid Python.
    """
    code = path.read_bytes().decode("utf-8", "replace")
    root = path.resolve().parent
    files, packages, pending = set[Path](), set[str](), [(path.resolve(), _parse(code, str(path)))]
    for file, tree in pending:
        for folder, name in _imported_modules(tree, file):
            found = [module for module in _module_files(folder, name) if module.is_relative_to(root)]
            packages |= set() if found else {name.partition(".")[0]}
            for module in found:
                if module not in files:
                    files.add(module)
                    with suppress(TemplateRefused):
                        pending.append((module, _parse(module.read_text("utf-8", "replace"), str(module))))
    lines = [f"file {file.relative_to(root)} {disk.hash_bytes(file.read_bytes())}" for file in sorted(files)]
    comments = "".join(f"# ftdata: {line}\n" for line in (*lines, *_versions(frozenset(packages))))
    return code + ("\n" if comments and not code.endswith("\n") else "") + comments


def find_functions(source: str, path: str) -> dict[str, ast.arguments]:
    """Return the arguments of the functions at the top level of a Python file.

    Raises:
        TemplateRefused: `template_syntax`, if the file is not valid Python.
    """
    statements = _parse(source, path).body
    return {statement.name: statement.args for statement in statements if isinstance(statement, ast.FunctionDef)}


def _parse(source: str, path: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise TemplateRefused("template_syntax", f"{path} is not valid Python: {error}") from None


def _imported_modules(tree: ast.Module, file: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folder in which an import searches first, and the name of the imported module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((file.parent, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level <= len(file.parents):
            folder = file.parents[max(node.level - 1, 0)]
            module = f"{node.module}." if node.module else ""
            yield from ((folder, f"{module}{alias.name}") for alias in node.names)


def _module_files(folder: Path, name: str) -> Iterator[Path]:
    """Yield the files in a folder that an import runs: those of the packages, and of the module itself."""
    parts = name.split(".")
    for number in range(1, len(parts) + 1):
        base = folder.joinpath(*parts[:number])
        yield from (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())


@lru_cache(maxsize=64)
def _versions(modules: frozenset[str]) -> list[str]:
    """Return the name and the version of each installed package that contains one of the modules."""
    others = modules - sys.stdlib_module_names
    packages = importlib.metadata.packages_distributions() if others else {}
    names = {name for module in others for name in packages.get(module, ())}
    return [f"package {name} {importlib.metadata.version(name)}" for name in sorted(names)]
