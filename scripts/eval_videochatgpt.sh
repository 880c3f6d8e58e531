#!/usr/bin/env bash
# Evaluate an experiment on Video-ChatGPT: eval_videochatgpt.sh [CONFIG] [section.key=value ...]
# Without a config: the bundled tiny model on the offline stand-in, at five retention ratios, on any machine.
# The answers are scored by a judge, a language model behind an OpenAI-compatible address: OPENAI_API_KEY holds its key,
# evaluation.judge.base_url and evaluation.judge.model say where and which it is, if not lmms-eval's own choice.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
evaluate videochatgpt configs/tiny_videomme.yaml "$@"
