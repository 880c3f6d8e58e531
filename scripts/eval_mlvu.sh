#!/usr/bin/env bash
# Evaluate an experiment on MLVU, its dev split: eval_mlvu.sh [CONFIG] [section.key=value ...]
# Without a config: the bundled tiny model on the offline stand-in, at five retention ratios, on any machine.
# Its test split: evaluation.benchmark=mlvu_test
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
evaluate mlvu_dev configs/tiny_videomme.yaml "$@"
