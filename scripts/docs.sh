#!/usr/bin/env bash
# Build the documentation site from the Markdown files and the docstrings: docs.sh [FOLDER]      (default: site)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prepare_environment eval docs
cd "$CHECKOUT"
"$PYTHON" -m docs.build "$@"
