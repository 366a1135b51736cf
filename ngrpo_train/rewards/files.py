"""What the shipped scorers read from the hub where a recipe gives them no other path."""

from __future__ import annotations

# reward -> (repository, its files that are read), weights first
HUB_FILES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "aesthetic": (
        ("camenduru/improved-aesthetic-predictor", ("sac+logos+ava1-l14-linearMSE.pth",)),
        ("openai/clip-vit-large-patch14", ("config.json", "model.safetensors")),
    ),
    "clip": (
        (
            "apple/DFN5B-CLIP-ViT-H-14-384",
            ("open_clip_config.json", "open_clip_pytorch_model.bin", "tokenizer.json"),
        ),
    ),
    "hpsv2_1": (
        ("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("tokenizer.json",)),
    ),
    "image_reward": (
        ("THUDM/ImageReward", ("ImageReward.pt",)),
        ("google-bert/bert-base-uncased", ("vocab.txt",)),
    ),
    "pickscore": (
        ("yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors")),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("tokenizer.json",)),
    ),
}


def download_command(repository: str, names: tuple[str, ...]) -> str:
    return f"hf download {repository} {' '.join(names)}"
