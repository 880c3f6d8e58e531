#!/usr/bin/env bash
# Tests of models of transformers with its oldest supported version: test_hf_oldest.sh [arguments for pytest]
# It is laid over the environment, in .range/, so that little is downloaded; test_range.sh tests whole environments.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prepare_environment eval dev docs
cd "$CHECKOUT"
OLDEST="$(sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)"
LAYER="$CHECKOUT/.range/transformers-$OLDEST"
if [ ! -e "$LAYER/complete" ]; then
    rm -rf "$LAYER"
    # The newest of the two that it depends on do not suit it.
    "$PYTHON" -m pip install -q --no-deps --target "$LAYER" \
        "transformers==$OLDEST" "tokenizers<=0.23.0" "huggingface_hub<2" ||
        fail "transformers $OLDEST could not be installed in $LAYER; run this again where pip has a network"
    touch "$LAYER/complete"
fi
PYTHONPATH="$LAYER${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m pytest -q -m "not slow" \
    tests/llava/test_hf_*.py tests/llava/test_serving.py "$@"
