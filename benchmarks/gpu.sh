#!/usr/bin/env bash
# What needs a GPU, in pieces that end within 10 minutes each and go on where they stopped:
#   bash benchmarks/gpu.sh tests|speed|train OUT [DATA]
# OUT: folder for records and logs. DATA: folder with CIFAR-10 (torchvision's layout) or cifar10-jpeg/{train,test}/...
# `train` may be called again and again: finished jobs of OUT/results are not repeated.
set -euo pipefail
piece=${1:?tests, speed or train}
out=${2:?a folder for what comes out}
data=${3:-}
mkdir -p "$out"
out=$(realpath "$out")
data=${data:+$(realpath "$data")}
cd "$(dirname "$0")/.."
case $piece in
  tests)
    python -m pytest -m gpu tests 2>&1 | tee "$out/tests.log"
    ;;
  speed)
    python benchmarks/p1_train.py --device cuda --arch preact_resnet18 --batch 512 --steps 20 --output p1_train_cuda.json
    cp benchmarks/results/p1_train_cuda.json docs/performance.md "$out/"
    ;;
  train)
    name=cifar10
    if [ -d "${data:?the folder with the images}/cifar10-jpeg" ]; then name=folder:cifar10-jpeg; fi
    mkdir -p "$out/results"
    # ended from outside before the limit, so that everything finished is written down
    timeout --signal=TERM 560 python -m bench run specs/cifar10_gpu.yaml --dataset "$name" --data-dir "$data" \
      --results-dir "$out/results" --device cuda || ended=$?
    # 124: time was up; 1: some jobs failed, and the table says which
    case ${ended:-0} in 0 | 1 | 124) ;; *) exit "$ended" ;; esac
    python -m bench leaderboard --results-dir "$out/results" --output "$out/leaderboard.md"
    ;;
  *)
    echo "error: piece is '$piece'; expected tests, speed or train" >&2
    exit 2
    ;;
esac
