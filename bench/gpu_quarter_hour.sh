#!/usr/bin/env bash
# A quarter of an hour on a rented GPU, in two calls of at most eight minutes:
#   bash bench/gpu_quarter_hour.sh                 # the first: build, warm-up, smoke, figures
#   bash bench/gpu_quarter_hour.sh second          # the second: the same, then tests, sanitizer, profile
#   bash bench/gpu_quarter_hour.sh first --rehearse --out r         # anywhere, in a few minutes: that every step runs
# Needs PyTorch, Triton, NumPy, Pillow, timm, tqdm, safetensors, huggingface_hub, pybind11, setuptools, a C++ compiler and
# nvcc; matplotlib for the chart, pytest for the tests. No network, and no installation: it builds the package itself.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:-first}
shift || true
case $call in
first) stages=(build warm-up smoke figures) ;;
second) stages=(build warm-up smoke figures tests sanitizer profile) ;;
*)
    echo "usage: bash bench/gpu_quarter_hour.sh [first|second] [--rehearse] [--out STEM] [--budget S]; got '$call'" >&2
    exit 2
    ;;
esac
export PYTHONUNBUFFERED=1
python3 -m bench.gpu_report "${stages[@]/#/--stage=}" "$@"
status=$?
echo
case "$status $*" in
"0 "*--rehearse*)
    echo "Every step runs; the lines that begin with skipped say what did not run. On the GPU: bash bench/gpu_quarter_hour.sh"
    ;;
"0 "*)
    echo "Everything that ran agrees; the lines that begin with skipped say what did not run. Commit bench/results/, put the"
    echo "outcomes beside the predictions in bench/NOTES.md."
    ;;
"1 "*)
    echo "Something failed: the lines that begin with FAILED say what. Mend it at home, prove the mend in the interpreter"
    echo "(pytest tests/test_kernels*.py), then make the second call. Rows without a failure are good: commit them."
    ;;
"124 "* | "130 "* | "137 "* | "143 "*) echo "The report was ended from outside: its JSON file holds every row that was known by then." ;;
*) echo "The report did not run; the last lines above say why." ;;
esac
if [ "$call" = first ] && [ "$status" -lt 2 ] && [[ "$*" != *--rehearse* ]]; then
    echo "Next: the row that misses its goal by most; tune it (lift_fast.tune), then: bash bench/gpu_quarter_hour.sh second"
fi
exit $status
