#!/usr/bin/env bash
# Evaluate an experiment on Video-MMMU: eval_videommmu.sh [CONFIG] [section.key=value ...]
# Without a config: the bundled tiny model on the offline stand-in, at five retention ratios, on any machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
evaluate videommmu configs/tiny_videomme.yaml "$@"
