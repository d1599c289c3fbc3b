#!/usr/bin/env bash
# Every check, in the order of their price; stops at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
mypy
python -m pytest -q "$@"
