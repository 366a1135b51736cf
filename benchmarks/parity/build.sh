#!/usr/bin/env bash
# Two virtual environments: DIR/ngrpo has ngrpo and, beside its transformers, the official packages hpsv2 and
# image-reward; DIR/transformers-4 has image-reward alone, on the newest transformers that it runs on unmodified.
#
#   bash benchmarks/parity/build.sh DIR
#   DIR/ngrpo/bin/python -m benchmarks.parity.run --transformers-4 DIR/transformers-4/bin/python
#
# What the packages require cannot be installed beside ngrpo, so they come without it, and what they really import is
# named here. PYTHON names the interpreter the environments are made from, PIP_ARGS anything else for pip, such as
# another index. torchvision may be built for CUDA where torch is not: the comparison copes with that, on a CPU.
set -euo pipefail
[[ $# -eq 1 ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
mkdir -p "$1" && directory=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

make_environment() {
    environment=$directory/$1
    "${PYTHON:-python3}" -m venv --clear "$environment"
    packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
}
install() { "$environment/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} "$@"; }
image_reward_imports=(datasets tqdm wheel "setuptools<81")
install_image_reward() {
    install --no-deps torchvision==0.28.0
    install --no-deps --no-build-isolation image-reward==1.5 fairscale==0.4.13 timm==0.6.13
    rm -r "$packages/benchmarks"    # fairscale's, which would hide ours
}

make_environment ngrpo
install torch==2.13.0 --editable . "${image_reward_imports[@]}" clint ftfy regex requests
install_image_reward
install --no-deps hpsv2==1.2.0 open_clip_torch==3.3.0
# hpsv2's wheel lacks the vocabulary that its tokenizer reads; open_clip's has it.
vocabulary=bpe_simple_vocab_16e6.txt.gz
cp "$packages/open_clip/$vocabulary" "$packages/hpsv2/src/open_clip/"
echo "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a  $packages/hpsv2/src/open_clip/$vocabulary" |
    sha256sum --check --quiet

make_environment transformers-4
install torch==2.13.0 transformers==4.55.4 diffusers==0.35.2 accelerate "${image_reward_imports[@]}"
install_image_reward
