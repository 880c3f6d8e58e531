#!/usr/bin/env bash
# Lint, format check, type check and tests: test.sh [arguments for pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prepare_environment eval dev
cd "$CHECKOUT"
"$PYTHON" -m ruff check
"$PYTHON" -m ruff format --check
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
