"""Read Python files with functions that are used as chat templates, without running them."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from ftdata.errors import TemplateRefused
from ftdata.storage import disk


def read_source(path: Path) -> str:
    """Return the code of a file, and a comment for each module that it imports: a file of its folder, or a package.

    The comments contain the hashes of the files and the versions of the packages, so that a build records them. Only
    import statements are followed.

    Raises:
        TemplateRefused: `template_syntax`, if the file is not valid Python.
    """
    code = _decode(path)
    _parse(code, str(path))
    files, packages, pending = set[Path](), set[str](), [(path, code)]
    for file, source in pending:
        for level, name in _imports(source):
            # Absolute imports search in the folder of the template, and relative imports in the package.
            folder = file.parents[min(level, len(file.parents)) - 1] if level else path.parent
            modules = [*_module_files(folder, name)]
            packages |= set() if modules or level else {name.partition(".")[0]}
            for module in modules:
                if module not in files and module.is_relative_to(path.parent):
                    files.add(module)
                    with suppress(TemplateRefused):
                        pending.append((module, _decode(module)))
    lines = [f"file {file.relative_to(path.parent)} {disk.hash_bytes(file.read_bytes())}" for file in sorted(files)]
    comments = "".join(f"# ftdata: {line}\n" for line in (*lines, *_versions(frozenset(packages))))
    return code + ("\n" if comments and not code.endswith("\n") else "") + comments


def find_functions(source: str, path: str) -> dict[str, ast.arguments]:
    """Return the arguments of the functions at the top level of a Python file.

    Raises:
        TemplateRefused: `template_syntax`, if the file is not valid Python.
    """
    statements = _parse(source, path).body
    return {statement.name: statement.args for statement in statements if isinstance(statement, ast.FunctionDef)}


def _decode(path: Path) -> str:
    """Read a Python file in its encoding."""
    try:
        return importlib.util.decode_source(path.read_bytes())
    except (SyntaxError, UnicodeDecodeError) as error:
        raise TemplateRefused("template_syntax", f"{path} is not valid Python: {error}") from None


def _parse(source: str, path: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise TemplateRefused("template_syntax", f"{path} is not valid Python: {error}") from None


@lru_cache(maxsize=1024)
def _imports(source: str) -> tuple[tuple[int, str], ...]:
    """Return the level (0: absolute) and the name of each imported module. Invalid code imports nothing."""
    try:
        nodes = [*ast.walk(ast.parse(source))]
    except (SyntaxError, ValueError, RecursionError):
        return ()
    absolute = [(0, alias.name) for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    from_imports = [
        (node.level, f"{node.module}.{alias.name}" if node.module else alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return (*absolute, *from_imports)


def _module_files(folder: Path, name: str) -> Iterator[Path]:
    """Yield the files in a folder that an import runs: those of the packages, and of the module itself."""
    parts = name.split(".")
    for number in range(1, len(parts) + 1):
        base = folder.joinpath(*parts[:number])
        yield from (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())


@lru_cache(maxsize=64)
def _versions(modules: frozenset[str]) -> list[str]:
    """Return the name and the version of each installed package that contains one of the modules."""
    installed = modules - sys.stdlib_module_names
    packages = importlib.metadata.packages_distributions() if installed else {}
    names = {name for module in installed for name in packages.get(module, ())}
    return [f"package {name} {importlib.metadata.version(name)}" for name in sorted(names)]
