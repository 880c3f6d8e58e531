#!/usr/bin/env bash
# Run the grid behind the paper's tables and write them: reproduce_tables.sh [--table N] [--config FILE] [section.key=value ...]
# Without arguments and without a GPU: every method on the bundled tiny model, in minutes, and the state of all other cells.
# Tables: 1 to 7, figure4, since (later methods), methods (the bundled model). --only-write runs nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prepare_environment eval plot
PYTHONPATH="$CHECKOUT${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m eval.tables "$@"
