"""Coarse pictures of all families: those of the same model at a smaller size, from noise that stands for the same."""

from dataclasses import replace

import pytest
import torch

from ngrpo_train.models.coarse import averaged, enlarged
from ngrpo_train.models.model import FlowModel
from ngrpo_train.recipe.explore import Explore
from ngrpo_train.recipe.sections import Sampling
from ngrpo_train.sampling.coarse import coarse_pictures

from ...families import FAMILIES
from .family_case import Cases, make_cases

HOW = Explore(candidates=3, num_inference_steps=2)
PACKED = {"kontext", "fill", "chroma", "qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "ltx"}
PACKED |= {"flux2", "flux2_klein", "flux2_klein_distilled"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return make_cases(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in ("sd35", "qwen_image") else pytest.mark.slow) for name in FAMILIES],
)
def test_coarse_pictures_are_those_of_a_smaller_model(cases: Cases, family: str) -> None:
    """To the bit, and enlarged to the size of whole ones. Models of packed tokens are refused, all but FLUX.1."""
    case, small = cases(family), cases(family).model
    large = case.load(replace(case.sampling, height=2 * case.sampling.height, width=2 * case.sampling.width))
    if family in PACKED:
        with pytest.raises(ValueError, match=r"^algorithm\.explore\.scale = 0\.5 needs latents whose last axes are h"):
            large.coarser(2)
        return
    prompts = case.prompts
    noise_PCS = torch.randn(2, 2, *large.latent_shape, generator=torch.Generator().manual_seed(0))
    pictures = coarse_pictures(large, prompts, noise_PCS, replace(HOW, scale=0.5), shift=3.0)
    noise_NS = large.averaged(noise_PCS.flatten(0, 1), 2)
    theirs = coarse_pictures(small, prompts, noise_NS.unflatten(0, (2, 2)), HOW, shift=3.0)
    assert torch.equal(pictures, enlarged(theirs, 2))
    if len(large.latent_shape) > 2:
        assert torch.equal(noise_NS, averaged(noise_PCS.flatten(0, 1), 2))
    whole = large.decode(noise_PCS.flatten(0, 1))
    assert whole.shape == pictures.shape, "the large model is as it was"


def test_a_size_that_the_pipeline_does_not_draw_is_refused(cases: Cases) -> None:
    model: FlowModel = cases("sd35").load(Sampling(height=48, width=48, guidance_scale=1.0))
    with pytest.raises(ValueError, match=r"^algorithm\.explore\.scale = 0\.5 cannot be had: sampling\.height"):
        model.coarser(2)
