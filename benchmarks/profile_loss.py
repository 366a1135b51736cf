"""One forward and backward of the loss under torch.profiler: `python -m benchmarks.profile_loss`.

Calls of CUDA's profiler interface surround the profiled call, so that Nsight records it and nothing else:

    ncu --profile-from-start off --clock-control none --set basic python -m benchmarks.profile_loss --quiet
    nsys profile --capture-range cudaProfilerApi --output loss python -m benchmarks.profile_loss --quiet
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.providers import LOSS, LOSS_SETTINGS, PROVIDERS, gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="720x720", choices=[setting.name for setting in LOSS_SETTINGS])
    parser.add_argument("--provider", choices=PROVIDERS, help="default: the kernels of this machine, else exact")
    parser.add_argument(
        "--quiet", action="store_true", help="do not use torch.profiler, which cannot share the GPU with Nsight"
    )
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    providers = LOSS.providers(device)
    name = args.provider or next((name for name in ("triton", "cpp") if name in providers), "exact")
    if name not in providers:
        parser.error(f"there is no {name} here, only {', '.join(providers)}")
    setting = next(setting for setting in LOSS_SETTINGS if setting.name == args.setting)
    inputs = LOSS.make_inputs(setting, device)

    def call() -> None:
        gradient(inputs, providers[name](inputs))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):  # compile, and fill the allocator's cache
        call()
    if args.quiet:
        if device.type == "cuda":
            torch.cuda.profiler.start()
        call()
        if device.type == "cuda":
            torch.cuda.profiler.stop()
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        call()
    print(f"loss, {setting.name}, {name}, one forward and backward on {device}")
    print(recorded.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25))


if __name__ == "__main__":
    main()
