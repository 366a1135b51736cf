"""image-reward as it is, on the transformers it was made for: `python -m benchmarks.parity.unmodified PICTURES OUT`.

Runs in an environment of its own, in a directory with ImageReward.pt, med_config.json and bert-base-uncased/.
PICTURES is a JSON list of [picture, prompt]; OUT gets the scores, and what gave them.
"""

import importlib
import json
import sys
import types
from importlib.metadata import version
from pathlib import Path


def main(pictures: Path, out: Path) -> None:
    sys.modules["clip"] = types.ModuleType("clip")  # imported, and not used for this score
    model = importlib.import_module("ImageReward").load("ImageReward.pt", "cpu", med_config="med_config.json")
    scores = [model.score(prompt, picture) for picture, prompt in json.loads(pictures.read_text())]
    name = f"image-reward {version('image-reward')}, transformers {version('transformers')}"
    out.write_text(json.dumps({"reference": name, "scores": scores}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
