#!/usr/bin/env bash
# Train a tiny Video-LLM from its seed, continue an interrupted run, and write the checkpoint and its card.
#
#     bash scripts/train_tiny.sh [OUT] [--size tiny-wide] [--seed 1] [--workers N] [--device cuda --workers 1] ...
#
# OUT is runs/tiny where nothing is said. The cards of the bundled models say what each was made with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
OUT="runs/tiny"
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
    OUT="$1"
    shift
fi
prepare_environment eval
cd "$CHECKOUT"
"$PYTHON" -m eval.train_tiny --out "$OUT" "$@"
"$PYTHON" -m eval.export_tiny --run "$OUT" --to "$OUT/checkpoint"
echo "The checkpoint is in $OUT/checkpoint"
