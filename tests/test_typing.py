"""What type checkers see of names that are imported when they are first used."""

import ast
import inspect

import pytest

import dmin
import dmin.models


@pytest.mark.parametrize("package", [dmin, dmin.models], ids=lambda p: p.__name__)
def test_lazy_names_are_declared_as_what_they_are(package):
    declared = {}
    for node in ast.walk(ast.parse(inspect.getsource(package))):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            imports = [each for each in node.body if isinstance(each, ast.ImportFrom)]
            declared = {a.asname: each.module for each in imports for a in each.names}
    lazy = getattr(package, "_PUBLIC", None) or {
        name: f"dmin.models.{module}" for name, module in package._FAMILIES.items()
    }
    assert declared == lazy
    assert set(lazy) <= set(dir(package))
