#!/usr/bin/env bash
# Every check, in the order of their price; stops at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
# DeepSpeed compiles its CPU Adam at first use on a machine, for 80 s: here on the second core, while mypy has the first.
DS_ACCELERATOR=cpu python -c "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)" \
    >/dev/null 2>&1 &
mypy
wait # the tests that need it compile it themselves if that failed
# What needs no cluster of its own runs on both cores at once, by files; the rest would only be in its own way.
python -m pytest -q -n 2 --dist loadfile -m "not ray and not slow and not long"
python -m pytest -q -m "(ray or slow) and not long"
