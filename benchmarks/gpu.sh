#!/usr/bin/env bash
# Everything about a GPU in one go, at most eight minutes on one H100: checks, timings, training, one JSON.
#     bash benchmarks/gpu.sh                            # on the GPU, into benchmarks/gpu.json
#     bash benchmarks/gpu.sh --device cpu --tiny        # the same path in a minute without one
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" benchmarks/gpu.py --json benchmarks/gpu.json "$@"
