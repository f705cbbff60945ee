"""Each notebook runs in a new kernel to its end, in a folder with the repository's structure. The repository has
no outputs.
"""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
import quick
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file, tmp_path):
    notebook = nbformat.read(file, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) <= 15 and not any(cell.outputs or cell.execution_count for cell in code)
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment = {  # one device; fast compilation and the cache of the other tests
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "XLA_FLAGS": quick.FLAGS,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | environment)  # raises CellExecutionError, with the cell and its traceback
    shown = [output for cell in code for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"] and any(
        (folder / "runs").iterdir()
    )
    # progress is one line that is overwritten, and not on stderr, which notebooks show in red
    assert [
        output["data"]["text/plain"]
        for output in shown
        if "step " in output.get("data", {}).get("text/plain", "")
    ]
    assert not [output for output in shown if output.get("name") == "stderr" and "step " in output.text]


def test_there_are_three():
    assert [file.stem for file in NOTEBOOKS] == ["first_steps", "own_data_own_reward", "reading_a_run"]
