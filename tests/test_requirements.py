"""setup.cfg against the package's own imports."""

import ast
import configparser
import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# imported where a setting asks for them, or in a notebook, which has IPython
OPTIONAL = {"tensorboardX", "wandb", "trackio", "IPython", "pydicom", "openpyxl"}
MODULES = {
    "orbax-checkpoint": "orbax",
    "pyyaml": "yaml",
    "pillow": "PIL",
}  # where a distribution's name is not its module's


def imported(source: str) -> set[str]:
    """The top-level modules that a file imports, at whatever depth, but for relative ones."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
    return {name.partition(".")[0] for name in names}


def test_what_is_imported_is_what_is_required():
    imports = set().union(
        *(imported(path.read_text(encoding="utf-8")) for path in (ROOT / "medrlvr_jax").rglob("*.py"))
    )
    imports -= {*sys.stdlib_module_names, "medrlvr_jax", *OPTIONAL}
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = {
        re.split(r"[\[<>=!~; ]", line)[0]
        for line in config["options"]["install_requires"].split("\n")
        if line
    }
    modules = {MODULES.get(name, name.replace("-", "_")) for name in required}
    missing, unused = sorted(imports - modules), sorted(modules - imports)
    assert not missing, (
        f"imported, and not in setup.cfg's install_requires: add {missing} there (or to OPTIONAL, if an extra has it)"
    )
    assert not unused, f"in setup.cfg's install_requires, and imported nowhere: take {unused} out"
    here = importlib.metadata.packages_distributions()
    for name in required:
        module = MODULES.get(name, name.replace("-", "_"))
        normal = {re.sub(r"[-_.]+", "-", found).lower() for found in here[module]}
        assert re.sub(r"[-_.]+", "-", name) in normal, (
            f"module {module} comes from {sorted(normal)}, which setup.cfg should name"
        )
