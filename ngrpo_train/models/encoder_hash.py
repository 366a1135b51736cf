"""Which encoders a model's directory has: a hash of them, in a fraction of a second."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

_SAMPLE = 4096  # bytes read at either end of each tensor: training anything changes them
_BOOKKEEPING = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}  # decide no number


def encoder_hash(model: Path, parts: Sequence[str]) -> str | None:
    """A hash of these folders of a directory in diffusers' layout: encoders, tokenizers, processors.

    It covers all files of tokenizers and processors, the encoders' configs, and of each weight the name, dtype, shape
    and both ends, however the weights are spread over safetensors files. None where a part is missing, as it is from a
    download of the transformer alone.
    """
    digest = hashlib.sha256()

    def add(label: str, data: bytes) -> None:
        digest.update(f"{label}\0{len(data)}\0".encode())
        digest.update(data)

    try:
        for part in sorted(parts):
            if "encoder" in part:
                config = json.loads((model / part / "config.json").read_text(encoding="utf-8"))
                decisive = {name: value for name, value in config.items() if name not in _BOOKKEEPING}
                add(part, json.dumps(decisive, sort_keys=True).encode())
                for label, sample in sorted(_weight_samples(model / part)):
                    add(label, sample)
            else:
                for path in sorted((model / part).iterdir()):
                    if path.is_file() and not path.name.startswith("."):
                        add(f"{part}/{path.name}", path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return digest.hexdigest()


def _weight_samples(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Name, dtype and shape, then the two ends, of each tensor in the safetensors files that transformers loads."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        with (directory / name).open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            for tensor, entry in json.loads(file.read(header_size)).items():
                if tensor != "__metadata__":
                    first, last = entry["data_offsets"]
                    sample = b""
                    for start in (first, max(first, last - _SAMPLE)):
                        file.seek(8 + header_size + start)
                        sample += file.read(min(_SAMPLE, last - first))
                    yield f"{tensor} {entry['dtype']} {entry['shape']}", sample
