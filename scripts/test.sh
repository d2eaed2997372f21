#!/usr/bin/env bash
# Install, lint and run all tests; arguments are passed to pytest:
#     bash scripts/test.sh [-k reader]
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh tests/requirements.txt
.venv/bin/python -m ruff check .
.venv/bin/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder "$@" # many tests wait for others
