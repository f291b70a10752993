# SPDX-License-Identifier: Apache-2.0
"""`make notebook`: run the notebook from nothing, and write its outputs into it.

What differs from run to run stays out: times, paths, versions. A cell that fails or warns leaves
the file as it was.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

import nbformat
from nbclient import NotebookClient

from tests.notebook.cells import NOTEBOOK, code_cells, digest


def main() -> None:
    start = time.perf_counter()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # of this environment, and nobody's own settings or kernels
        os.environ |= {"IPYTHONDIR": folder, "JUPYTER_DATA_DIR": folder}
        os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, without ipywidgets
        NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=ERROR"],  # it warns of TCP on this machine
        ).execute()
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.get("name") == "stderr":
                sys.exit(f"{NOTEBOOK.name}: a cell warns\n{output.text}")
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.digest = digest(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
