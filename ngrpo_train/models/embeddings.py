"""A directory of encoded prompts, which `ngrpo embed` writes and training reads in place of text encoders.

It holds
- `embeddings_00000.safetensors`, ...: shards with a row per prompt, bfloat16: `prompt_embeds` [rows, L, E], `pooled`
  [rows, F]; their metadata has the hashes of their prompts, in order.
- `index.json`: every shard's size and prompts. It is replaced whole when all shards are there, so it always describes
  what can be read, also while `ngrpo embed` adds more.
- `manifest.json`: the format, which text encoders made the rows, and their shapes.

All L rows of a prompt are kept: FLUX attends to T5's padding, whose features depend on the prompt. That is 4 MiB for
each prompt of FLUX.1 at 512 tokens.
"""

# P prompts, L text tokens, E features of T5, F features of CLIP.

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ngrpo_train.models.encoders import TextFeatures
from ngrpo_train.models.sizes import TEXT_PARTS

FORMAT = 1  # of a directory of embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Description of the rows of a directory of embeddings."""

    format: int = FORMAT
    encoder: str  # as from `encoder_hash`
    max_sequence_length: int  # L
    features: int  # E
    pooled_features: int  # F

    @staticmethod
    def read(directory: Path) -> Manifest | None:
        """The manifest of a directory; None without one. Raises ValueError, which says what is wrong, for a bad one."""
        try:
            entries = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"has a manifest.json that cannot be read ({error})") from error
        version = entries.get("format") if isinstance(entries, dict) else None
        if version != FORMAT or entries.keys() != {field.name for field in fields(Manifest)}:
            raise ValueError(f"is of format {version}, and this version of ngrpo knows {FORMAT}")
        return Manifest(**entries)

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def refuse_other(self, encoder: str | None, max_sequence_length: int) -> None:
        """Raise ValueError, which says the difference, unless the rows are of this length and encoder (None: any)."""
        if self.max_sequence_length != max_sequence_length:
            raise ValueError(
                f"has prompts of {self.max_sequence_length} tokens, and sampling.max_sequence_length is "
                f"{max_sequence_length}"
            )
        if encoder is not None and self.encoder != encoder:
            raise ValueError("was made by other text encoders or tokenizers than those of model.name_or_path")


class EmbeddingCache:
    """The prompts that `ngrpo embed` encoded into a directory; no text encoder is loaded.

    Only the rows asked for are read. They are bfloat16: what the encoders give on a GPU, as it is (in batches of
    another size, which may move a last bit), or what they give on a CPU in float32, rounded.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_sequence_length: int,
        encoder: str | None,
    ) -> None:
        """`encoder` is the `encoder_hash` of the model in use, None where its files are not at hand to compare with.

        Raises ValueError, naming `prompts.embeddings` and what to do, for a directory that is missing, unfinished,
        damaged, or of other encoders or another length.
        """
        self.directory, self.device, self.dtype = directory, device, dtype
        try:
            manifest = Manifest.read(directory)
            if manifest:
                manifest.refuse_other(encoder, max_sequence_length)
        except ValueError as error:
            raise self._refusal(
                str(error), "write another directory with `ngrpo embed RECIPE --out DIRECTORY`"
            ) from error
        if not manifest:
            raise self._refusal("is no directory of embeddings", f"{self._command()} writes one")
        self._places: dict[str, tuple[str, int]] = {}  # hash of a prompt -> shard, row
        try:
            index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
            for shard, entry in index.items():
                if (directory / shard).stat().st_size != entry["bytes"]:
                    raise ValueError(f"{shard} has another size than when it was written")
                self._places |= {key: (shard, row) for row, key in enumerate(entry["prompts"])}
        except (OSError, ValueError) as error:
            what = "is damaged" if (directory / "index.json").exists() else "is unfinished"
            raise self._refusal(f"{what} ({error})", f"{self._command()} completes it") from error

    def refuse_missing(self, prompts: Sequence[str]) -> None:
        """Raise ValueError, naming one of them and what to do, where any of these prompts are not there."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt_hash(prompt) not in self._places]
        if missing:
            others = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
            raise self._refusal(f"lacks the prompt {missing[0]!r}{others}", f"{self._command()} adds what is missing")

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """The rows of P prompts, on the device. Raises ValueError as `refuse_missing` does, and for a damaged shard."""
        self.refuse_missing(prompts)
        rows = [self._row(prompt_hash(prompt)) for prompt in prompts]
        embeds, pooled = (torch.stack(parts) for parts in zip(*rows, strict=True))
        if self.device.type == "cuda":  # so that the copy need not wait for the device
            embeds, pooled = embeds.pin_memory(), pooled.pin_memory()
        return TextFeatures.of(
            embeds.to(self.device, non_blocking=True).to(self.dtype),
            pooled.to(self.device, non_blocking=True).to(self.dtype),
        )

    def _row(self, key: str) -> tuple[Tensor, Tensor]:
        """`prompt_embeds` [L, E] and `pooled` [F] of a prompt, mapped from the file and not read yet."""
        shard, row = self._places[key]
        try:
            with safe_open(self.directory / shard, "pt") as file:
                if hashes_in(file)[row : row + 1] != [key]:  # else another prompt's rows would train, unnoticed
                    raise ValueError("not what index.json says is in it")
                return file.get_slice("prompt_embeds")[row], file.get_slice("pooled")[row]
        except (OSError, ValueError, SafetensorError) as error:
            raise self._refusal(f"is damaged ({shard}: {error})", f"{self._command()} mends it") from error

    def _refusal(self, cause: str, remedy: str) -> ValueError:
        return ValueError(f"prompts.embeddings = {str(self.directory)!r} {cause}: {remedy}")

    def _command(self) -> str:
        return f"`ngrpo embed RECIPE --out {shlex.quote(str(self.directory))}`"


def prompt_hash(prompt: str) -> str:
    """Name of a prompt in a directory of embeddings: its SHA-256 in hexadecimal."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()


def hashes_in(shard: Any) -> list[str]:
    """The hashes of the prompts in a shard that `safe_open` opened, in order."""
    return (shard.metadata() or {}).get("prompts", "").split()


# --- which text encoders these are

_SAMPLE = 4096  # bytes read at either end of each tensor: training anything changes them
_BOOKKEEPING = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}  # decide no number


def encoder_hash(model: Path) -> str | None:
    """A hash of both text encoders and tokenizers in a directory of FLUX.1's layout, in a fraction of a second.

    It covers the tokenizers' files, the encoders' configs, and of each weight the name, dtype, shape and both ends,
    however the weights are spread over safetensors files. None where a part is missing, as it is from a download of
    the transformer alone.
    """
    digest = hashlib.sha256()

    def add(label: str, data: bytes) -> None:
        digest.update(f"{label}\0{len(data)}\0".encode())
        digest.update(data)

    try:
        for tokenizer in (part for part in TEXT_PARTS if part.startswith("tokenizer")):
            for path in sorted((model / tokenizer).iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    add(f"{tokenizer}/{path.name}", path.read_bytes())
        for encoder in (part for part in TEXT_PARTS if part.startswith("text_encoder")):
            config = json.loads((model / encoder / "config.json").read_text(encoding="utf-8"))
            decisive = {name: value for name, value in config.items() if name not in _BOOKKEEPING}
            add(encoder, json.dumps(decisive, sort_keys=True).encode())
            for label, sample in sorted(_weight_samples(model / encoder)):
                add(label, sample)
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
