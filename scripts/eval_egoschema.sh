#!/usr/bin/env bash
# Evaluate an experiment on all questions of EgoSchema, whose answers its server scores: eval_egoschema.sh [CONFIG] [section.key=value ...]
# Without a config: the bundled tiny model on the offline stand-in, at five retention ratios, on any machine.
# The 500 questions with public answers: evaluation.benchmark=egoschema_subset
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
evaluate egoschema configs/tiny_videomme.yaml "$@"
