#!/usr/bin/env bash
# What a machine with an NVIDIA GPU should run, in parts of under 10 minutes:
#
#   bash benchmarks/gpu.sh PART OUT
#
#   tests     the gpu-marked tests of ngrpo_kernels
#   kernels   the benchmarks of ngrpo_kernels: OUT/kernels_gpu.csv
#   profile   one forward and backward under torch.profiler and, where it is installed, Nsight Compute
#   all       the three, in under 10 minutes together
#
# Takes torch, triton, numpy, pytest, pytest-benchmark and hypothesis. PYTHON names the interpreter, else .venv's or
# python3. OUT gets at most six files. No network is used, and no setting of the GPU is changed. The exit status is 1 if
# a part failed or ran out of time (what it measured is kept), 2 if nothing could be run.
set -uo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
[[ $# -eq 2 ]] || usage
part=$1
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [[ -z ${PYTHON:-} ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
unset TRITON_INTERPRET
export HF_HUB_OFFLINE=1
failed=0

# run SECONDS LOG COMMAND...: the command's output goes to the log as well, and its failure is remembered.
run() {
    local seconds=$1 log=$2; shift 2
    echo "== $*" | tee -a "$out/$log"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$out/$log"
    local status=${PIPESTATUS[0]}
    if [[ $status -ne 0 ]]; then
        echo "== failed: exit status $status$([[ $status -eq 124 ]] && echo ", out of time after $seconds s")" |
            tee -a "$out/$log"
        failed=1
    fi
}

provenance() {
    {
        date --iso-8601=seconds
        echo "commit: $(git describe --always --dirty 2>/dev/null || echo unknown)"
        "$PYTHON" --version
        "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)'
        nvidia-smi -q | grep -E '^ +(Product Name|Product Architecture|Driver Version|Graphics|SM|Memory|Total|Current Power Limit|Instantaneous Power Draw|Average Power Draw|GPU Current Temp|MIG Mode|Current|ECC Mode|Performance State|SW Power Cap|HW Slowdown) +:|Driver Version|CUDA Version'
    } >"$out/provenance.txt" 2>&1
}

tests() {
    run "$1" tests.log "$PYTHON" -m pytest tests/kernels -m gpu -q -p no:cacheprovider --durations=10
}

kernels() {
    run "$1" kernels.log "$PYTHON" -m pytest benchmarks/bench_objective.py benchmarks/bench_distances.py \
        --benchmark-only --benchmark-columns=median,iqr,rounds -q -p no:cacheprovider \
        --seconds "$2" --results "$out/kernels_gpu.csv"
}

profile() {
    run "$1" profile.txt "$PYTHON" -m benchmarks.profile_loss
    local command=("$PYTHON" -m benchmarks.profile_loss --quiet)
    local ncu=(ncu --profile-from-start off --clock-control none --set basic "${command[@]}")
    echo "== for a timeline: nsys profile --capture-range cudaProfilerApi --output loss ${command[*]}" | tee -a "$out/profile.txt"
    # Its counters are closed to many users and virtual machines: no failure of ours.
    if command -v ncu >/dev/null; then
        echo "== ${ncu[*]}" | tee -a "$out/profile.txt"
        timeout --kill-after=10 "$1" "${ncu[@]}" >"$out/ncu.txt" 2>&1 || echo "== ncu failed, see ncu.txt" | tee -a "$out/profile.txt"
    fi
}

case $part in tests | kernels | profile | all) ;; *) usage ;; esac
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $PYTHON finds no CUDA device (or no torch); nothing was run" >&2
    exit 2
fi
provenance
case $part in
    tests) tests 280 ;;
    kernels) kernels 560 2 ;;
    profile) profile 120 ;;
    all) tests 200; kernels 280 1; profile 45 ;;
esac
echo "results in $out"
exit "$failed"
