#!/usr/bin/env bash
# Lint, then the test suite. Arguments go to pytest: bash scripts/run_tests.sh tests/mim -k hog
set -euo pipefail
source "$(dirname "$0")/env.sh"
use_environment requirements-dev.txt
bash scripts/browser.sh --install > /dev/null || echo "the tests of the report page in a browser will be skipped"

ruff check .
ruff format --check .
# A process a core, at most four; tests of one file stay together, since they share what takes long to build, and the
# slowest files begin first (tests/conftest.py).
python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
