#!/usr/bin/env bash
# Time, memory and operations of every stage: efficiency.sh [CONFIG...] [section.key=value ...]
# Without a config: the bundled tiny model on the CPU, in about a minute. Results go to results/efficiency/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
CONFIGS=()
for argument in "$@"; do
    if [[ "$argument" != *=* ]]; then CONFIGS+=("$argument"); fi
done
if [ ${#CONFIGS[@]} -eq 0 ]; then
    set -- "$CHECKOUT/configs/efficiency/tiny_cpu.yaml" "$@"
fi
prepare_environment
PYTHONPATH="$CHECKOUT${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m eval.efficiency "$@"
