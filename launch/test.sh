#!/usr/bin/env bash
# bash launch/test.sh [pytest arguments …]
# Runs all tests on 8 fake CPU devices. Makes .venv if it is missing and installs the extra `test`.
# Needs: Python 3.11 or newer; the network only for pip. Time: some minutes on 2 cores.
# Tests against PyTorch need it installed (extra `parity`), and tests on real questions need ../shared/data; else they are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
ensure_venv ".[test]"
# Compilation takes most of the time, and each test keeps one core busy. Files are assigned in the order of tests/conftest.py.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
