#!/usr/bin/env bash
# Lint, format check, type check, documentation and tests: test.sh [arguments for pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prepare_environment eval dev docs
cd "$CHECKOUT"
"$PYTHON" -m ruff check
"$PYTHON" -m ruff format --check
"$PYTHON" -m mypy
"$PYTHON" -m docs.methods --check
"$PYTHON" -m docs.build
"$PYTHON" -m pytest "$@"
