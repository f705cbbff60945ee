#!/usr/bin/env bash
# bash launch/test.sh [pytest arguments …]
# All tests, on 8 fake CPU devices: makes .venv if there is none, installs with the extra `test`, runs pytest.
# Needs: Python 3.11 or newer; the network only for pip. Time: some minutes on 2 cores.
# Tests against PyTorch run where it is installed (extra `parity`); tests on real questions where ../shared/data is.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
ensure_venv ".[test]"
# Compiling is most of the time, and it keeps one core busy. Files are dealt out in the order of tests/conftest.py.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
