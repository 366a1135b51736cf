#!/usr/bin/env bash
# What a machine with an NVIDIA GPU should run, in parts of under 10 minutes:
#
#   bash benchmarks/gpu.sh PART OUT [SECONDS]
#
#   quick      for a GPU of 141 GB that is there for a quarter of an hour: what is worth most of all that is below, within
#              SECONDS (570 by default); called again with the same OUT, it goes on where it stopped
#   rehearse   the same at tiny size, on a machine without a GPU too
#
# Of ngrpo_kernels:
#
#   tests     the gpu-marked tests of ngrpo_kernels and, where its packages are installed, of ngrpo_train
#   kernels   the benchmarks of ngrpo_kernels: OUT/kernels_gpu.csv
#   profile   the loss's forward and backward under torch.profiler and, where it is installed, Nsight Compute
#   all       the kernels' tests, kernels and profile, in under 10 minutes together
#
# Training FLUX.1-dev at full size on a GPU of 141 GB, rows in OUT/train_gpu.csv, in order of what is best known first:
#
#   train-smoke         every kind of iteration with a tiny model: whether anything breaks, in 5 minutes
#   train-iteration     the iteration of the target: 1 optimizer step for each rollout, and 4
#   train-algorithms    iterations of Neighbor GRPO in the paper's three settings, and of BranchGRPO (Table 3)
#   train-baselines     iterations of DanceGRPO, MixGRPO and MixGRPO-Flash (Table 3)
#   train-peer          an iteration built as other trainers are
#   train-forward       forwards by batch, attention backend and dtype; how far apart their velocities are; attention alone
#   train-activations   forward and backward by what is kept in between
#   train-variants      the iteration with blocks computed again, a float8 rollout, LoRA
#   train-stream        the iteration of two prompts, streamed and not
#   train-sharded       the iteration through FSDP2 in one process
#   train-decode        the VAE
#   train-rewards       the scorers of the paper's three rewards, and as the official packages score
#   train-optimizer     one step of all parameters
#   train-profile       `ngrpo profile` of the target's iteration: OUT/train_profile
#
# Parts that follow each other on one machine find what the others compiled, in PyTorch's default cache.
#
# Takes torch, triton, numpy, pytest, pytest-xdist, pytest-benchmark and hypothesis; training takes what pyproject.toml
# names, with torchao. PYTHON names the interpreter, else .venv's or python3. OUT gets at most eight files. No network is
# used, and no setting of the GPU is changed. The exit status is 1 if a part failed or ran out of time (what it measured
# is kept), 2 if nothing could be run.
set -uo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
[[ $# -eq 2 || $# -eq 3 && $1 =~ ^(quick|rehearse)$ && $3 =~ ^[0-9]+$ ]] || usage
part=$1 seconds=${3:-570}
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

# probe: whether a GPU can be used with this PYTORCH_ALLOC_CONF; the status is 3 where there is none.
probe() {
    "$PYTHON" -c 'import sys, torch; torch.cuda.is_available() or sys.exit(3); torch.ones(1 << 28, device="cuda").sum().item()' 2>/dev/null
}

# provenance FILE: machine and versions, at the end of a file in OUT.
provenance() {
    {
        date --iso-8601=seconds
        echo "PYTORCH_ALLOC_CONF: ${PYTORCH_ALLOC_CONF-}"
        echo "commit: $(git describe --always --dirty 2>/dev/null || echo unknown)"
        "$PYTHON" --version
        "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)'
        nvidia-smi -q | grep -E '^ +(Product Name|Product Architecture|Driver Version|Graphics|SM|Memory|Total|Current Power Limit|Instantaneous Power Draw|Average Power Draw|GPU Current Temp|MIG Mode|Current|ECC Mode|Performance State|SW Power Cap|HW Slowdown) +:|Driver Version|CUDA Version'
    } >>"$out/$1" 2>&1
}

tests() {
    run "$1" tests.log "$PYTHON" -m pytest tests/kernels -m gpu -q -p no:cacheprovider --durations=10
}

train_tests() {
    if "$PYTHON" -c 'import accelerate, diffusers, peft, transformers, tyro' 2>/dev/null; then
        # Files of tests for optional packages that are not installed here must not keep the others from running.
        run "$1" tests.log "$PYTHON" -m pytest tests/train -m gpu -q -p no:cacheprovider --durations=10 \
            --continue-on-collection-errors
    else
        echo "== no tests of ngrpo_train: its packages are not installed" | tee -a "$out/tests.log"
    fi
}

kernels() {
    run "$1" kernels.log "$PYTHON" -m pytest benchmarks/bench_objective.py benchmarks/bench_distances.py \
        benchmarks/bench_gaussian.py --benchmark-only --benchmark-columns=median,iqr,rounds -q -p no:cacheprovider \
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

# train SECONDS PART ARGUMENT...: of benchmarks.train_parts, in a process of its own, so that a GPU error ends there.
train() {
    local seconds=$1; shift
    run "$seconds" "train-$1.log" "$PYTHON" -m benchmarks.train_parts "$@" --out "$out/train_gpu.csv"
}

# quick ARGUMENT...: of benchmarks.quick, which has what is left of the seconds.
quick() {
    "$PYTHON" -m benchmarks.quick "$out" --seconds $((seconds - SECONDS)) "$@" || failed=1
}

case $part in
    quick | rehearse | tests | kernels | profile | all) ;;
    train-smoke | train-iteration | train-algorithms | train-baselines) ;;
    train-peer | train-forward | train-activations) ;;
    train-variants | train-stream | train-sharded | train-decode | train-rewards | train-optimizer | train-profile) ;;
    *) usage ;;
esac
if [[ $part == rehearse ]]; then
    quick --tiny
    exit "$failed"
fi
# Memory in segments that grow, where the driver has them: the phases of an iteration need blocks of unlike sizes.
allocator=${PYTORCH_ALLOC_CONF-expandable_segments:True}
PYTORCH_ALLOC_CONF=$allocator probe
found=$?
if [[ $found -ne 0 && $found -ne 3 ]]; then
    allocator=
    PYTORCH_ALLOC_CONF='' probe
    found=$?
fi
if [[ $found -ne 0 ]]; then
    echo "gpu.sh: $PYTHON finds no CUDA device (or no torch); nothing was run" >&2
    exit 2
fi
case $part in quick | train-*) export PYTORCH_ALLOC_CONF=$allocator ;; esac
case $part in quick) provenance quick.log & ;; *) provenance provenance.txt ;; esac
case $part in
    quick) quick ;;
    tests) tests 280; train_tests 280 ;;
    kernels) kernels 560 2 ;;
    profile) profile 120 ;;
    all) tests 190; kernels 330 1; profile 45 ;;
    train-smoke) quick --only smoke ;;
    # Assumed, for no GPU has measured it: 40 s to import, build and draw weights, 170 s to compile blocks, decoder and
    # optimizer with Triton's share, 11 s for each of 7 iterations; then the 2nd process finds most of it compiled.
    train-iteration) train 320 iteration --only "1 update"; train 250 iteration --only "4 updates" ;;
    train-algorithms) train 300 algorithms --only Neighbor; train 270 algorithms --only BranchGRPO ;;
    train-baselines) train 220 algorithms --only DanceGRPO; train 350 algorithms --only MixGRPO ;;
    train-peer) train 290 peer --only float32; train 280 peer --only bfloat16 ;;
    train-forward) train 500 forward; train 70 attention ;;
    train-activations) train 570 activations ;;
    train-variants) train 190 variants --only again; train 160 variants --only float8; train 235 variants --only LoRA ;;
    train-stream) train 570 variants --only prompts ;;
    train-sharded) train 570 sharded ;;
    train-decode) train 400 decode ;;
    train-rewards) train 300 rewards ;;
    train-optimizer) train 240 optimizer ;;
    train-profile) train 570 profile ;;
esac
wait
echo "results in $out"
exit "$failed"
