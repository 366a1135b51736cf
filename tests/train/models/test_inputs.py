"""What a velocity takes: FLUX.1's own arithmetic of sizes against its pipeline, and errors for what has no plan."""

import pytest
import torch
from torch import Tensor

from ngrpo_train.models.inputs import inputs_of, text_calls
from ngrpo_train.models.outline import Outline
from ngrpo_train.models.sizes import KNOWN, Architecture
from ngrpo_train.recipe.sections import Sampling

DEV = KNOWN["flux-dev"]
SAMPLING = Sampling(height=256, width=384, max_sequence_length=64)


def test_flux_is_given_what_its_pipeline_gives() -> None:
    ours, its = inputs_of(DEV, SAMPLING, torch.bfloat16, 2), Outline(DEV.configs, SAMPLING, torch.bfloat16)
    assert ours.latent_shape == its.latent_shape == (16 * 24, 64)
    (call,), (other,) = ours.velocity, its.velocity_calls(2)
    assert (call.part, call.method) == (other.part, other.method)
    for name, x in call.named.items():
        if isinstance(x, Tensor):
            assert other.named[name].shape == x.shape, name
    (decode,), (drawn,) = ours.decode, its.decode_calls(2)
    assert decode.arguments[0].shape == drawn.arguments[0].shape == (2, 16, 32, 48)


def test_encoders_get_texts_of_their_lengths() -> None:
    clip, t5 = text_calls(DEV, 64)
    assert (clip.part, clip.named["input_ids"].shape) == ("text_encoder", (1, 77))
    assert (t5.part, t5.named["input_ids"].shape) == ("text_encoder_2", (1, 64))
    calls = {call.part: call for call in text_calls(KNOWN["wan21-i2v-14b-480p"], 512)}
    assert calls["image_encoder"].named["pixel_values"].shape == (1, 3, 224, 224)


def test_what_has_no_plan_is_refused_in_one_line() -> None:
    qwen = KNOWN["qwen-image"]
    unknown = Architecture({**qwen.configs, "model_index": {"_class_name": "NewPipeline"}})
    with pytest.raises(ValueError, match=r"^model\.name_or_path is a NewPipeline, which diffusers .* does not have$"):
        inputs_of(unknown, SAMPLING, torch.bfloat16)
    parts = Architecture({part: qwen.configs[part] for part in qwen.parts})
    with pytest.raises(ValueError, match=r"^model\.name_or_path has no model_index\.json or no scheduler/"):
        inputs_of(parts, SAMPLING, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^sampling\.num_frames = 9: "):
        inputs_of(qwen, Sampling(num_frames=9), torch.bfloat16)
