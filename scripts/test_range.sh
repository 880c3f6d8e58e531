#!/usr/bin/env bash
# Run the fast tests at both ends of the supported range, each in an environment of its own:
# test_range.sh [python | transformers | all | NAME ...] [--folder DIR]; `--help` lists the names.
#
# pip gets what it is set up for, PIP_CONSTRAINT included. From PyPI torch on Linux is a CUDA build of 6 GB for each
# environment; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes it a CPU build of 1 GB.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
python="$(find_python)"
exec "$python" "$CHECKOUT/scripts/test_range.py" "$@"
