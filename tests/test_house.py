"""The wings: which folder may import which. Held by reading the imports, so it holds for those inside
functions too.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1] / "medrlvr_jax"
# lowest first
CORE = (
    "host",
    "config",
    "types",
    "sharding",
    "model",
    "data",
    "rewards",
    "build",
    "rollout",
    "model_rewards",
    "runs",
    "evaluation",
    "rl",
)
# may import all of the core, and each other
AROUND = {"__init__", "__main__", "api", "cli", "tools", "plan", "report", "studies", "world"}
# the package's own __init__: its version and its folder are for everybody, its functions are not
FACE = "medrlvr_jax"


def module_names() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = {path.relative_to(ROOT.parent).with_suffix(""): path for path in ROOT.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in files.items()}


def imports_of(path: Path, modules: dict[str, Path]) -> list[tuple[str, int]]:
    """The package's modules that a file imports, each with its line."""
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out += [
                (alias.name, node.lineno)
                for alias in node.names
                if alias.name in modules and alias.name != FACE
            ]
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                out.append((inner if inner in modules else node.module, node.lineno))
    return out


def wing(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def complaints(modules: dict[str, Path], imports: dict[str, list[tuple[str, int]]]) -> list[str]:
    out = []
    for module, targets in imports.items():
        here = wing(module)
        if here not in CORE and here not in AROUND:
            out.append(
                f"{modules[module]}: no wing of that name: put it into one, or add its folder to CORE or AROUND here"
            )
        for target, line in targets:
            there = wing(target)
            if here not in CORE or there == here:
                continue
            where = f"{modules[module]}:{line}: {module} imports {target}: "
            if there in AROUND:
                out.append(
                    where
                    + f"the core imports nothing of {there}; pass what is needed in, or move it down into {here}"
                )
            elif CORE.index(there) > CORE.index(here):
                out.append(
                    where
                    + f"{there} stands above {here}; move what is needed down, or this function up into {there}"
                )
    return out


def test_imports_only_point_upward():
    modules = module_names()
    assert not (
        wrong := complaints(modules, {name: imports_of(path, modules) for name, path in modules.items()})
    ), "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others():
    modules = module_names()
    try:
        TopologicalSorter(
            {name: [t for t, _ in imports_of(path, modules)] for name, path in modules.items()}
        ).prepare()
    except CycleError as e:
        raise AssertionError(
            f"{' imports '.join(reversed(e.args[1]))}: put what they share into a module below both"
        ) from None


def test_a_wrong_import_is_named(tmp_path):
    file = tmp_path / "load.py"
    file.write_text(
        "import json\n\n\ndef read():\n    from medrlvr_jax.rl.train import train\n    from medrlvr_jax import cli\n"
    )
    modules = {
        "medrlvr_jax.data.load": file,
        "medrlvr_jax.rl.train": tmp_path,
        "medrlvr_jax.cli": tmp_path,
        "medrlvr_jax": tmp_path,
    }
    found = imports_of(file, modules)
    assert found == [("medrlvr_jax.rl.train", 5), ("medrlvr_jax.cli", 6)]
    below, outside = complaints(modules, {"medrlvr_jax.data.load": found})
    assert below == f"{file}:5: medrlvr_jax.data.load imports medrlvr_jax.rl.train: " + (
        "rl stands above data; move what is needed down, or this function up into rl"
    )
    assert outside.startswith(f"{file}:6: ") and "the core imports nothing of cli" in outside
