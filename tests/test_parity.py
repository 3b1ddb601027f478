"""Live parity with diffusers and transformers, on the tiny model: the same files, both implementations, float64.

Full size is in `test_parity_full_size.py`. The only help a peer gets is float64 sinusoids (`peers.ExactTimesteps`), since
diffusers keeps its own in float32 even in a float64 model; a test below shows that nothing else differs.
"""

import pytest
import torch

import ldm
from ldm.models import unet_blocks
from ldm.models.clip import pool
from tests import seeded
from tests.measure import relative_error

pytestmark = pytest.mark.reference
TOLERANCE = 1e-10  # rounding leaves about 1e-15
PROMPTS = ["a red cube on top of a blue sphere", "", "word " * 90]


@pytest.fixture(scope="module")
def ours(tiny_diffusers):
    return ldm.load(tiny_diffusers, dtype=torch.float64)


@pytest.fixture(scope="module")
def theirs(tiny_diffusers):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusers, torch_dtype=torch.float64)
    pipeline.safety_checker.double()
    return pipeline


@pytest.fixture(scope="module")
def context(ours):
    return ours.text_encoder(ours.tokenizer(PROMPTS).ids)


def unet_error(ours, peer, t, batch, size, context):
    x = seeded.tensor(f"x {batch} {size}", batch, 4, *size).double()
    t = torch.as_tensor(t, dtype=torch.float64)
    return relative_error(ours.unet(x, t, context[:batch]), peer(x, t, context[:batch]).sample)


def test_text_hidden_states_and_pooled_output(ours, theirs):
    ids = ours.tokenizer(PROMPTS).ids
    expected = theirs.text_encoder(ids)
    hidden = ours.text_encoder(ids)
    assert relative_error(hidden, expected.last_hidden_state) < TOLERANCE
    assert relative_error(pool(hidden, ids, ours.tokenizer.end), expected.pooler_output) < TOLERANCE


def test_token_ids(ours, theirs):
    expected = theirs.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ours.tokenizer(PROMPTS).ids, expected)


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (12, 20), (7, 9)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("t", [0, 1, 500, 981, 999, 123.75])
def test_unet_eps(ours, theirs, context, t, batch, size):
    from tests import peers

    assert unet_error(ours, peers.exact_timesteps(theirs.unet), t, batch, size, context) < TOLERANCE


def test_unet_eps_with_a_timestep_for_each_sample(ours, theirs, context):
    from tests import peers

    assert unet_error(ours, peers.exact_timesteps(theirs.unet), [1, 500, 999], 3, (8, 8), context) < TOLERANCE


def test_without_help_the_peer_differs_by_its_float32_sinusoids_and_by_nothing_else(ours, theirs, context, monkeypatch):
    from diffusers.models.embeddings import Timesteps

    theirs.unet.time_proj = Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0)
    error = unet_error(ours, theirs.unet, 981, 2, (8, 8), context)
    assert 1e-9 < error < 1e-4
    monkeypatch.setattr(unet_blocks, "timestep_embedding", lambda t, width: theirs.unet.time_proj(t))
    assert unet_error(ours, theirs.unet, 981, 2, (8, 8), context) < TOLERANCE


def test_autoencoder_moments_and_decode(ours, theirs):
    images = seeded.tensor("images", 2, 3, 32, 48).double()
    found, expected = ours.autoencoder.encode(images), theirs.vae.encode(images).latent_dist
    assert relative_error(found.mean, expected.mean) < TOLERANCE
    assert relative_error(found.log_variance, expected.logvar) < TOLERANCE
    noise = seeded.tensor("noise", *found.mean.shape).double()
    assert relative_error(found.sample(noise), expected.mean + expected.std * noise) < TOLERANCE
    assert relative_error(found.kl(), expected.kl()) < TOLERANCE
    latents = seeded.tensor("latents", 2, 4, 4, 6).double()
    assert relative_error(ours.autoencoder.decode(latents), theirs.vae.decode(latents).sample) < TOLERANCE


def test_image_embedding_and_concept_cosines(ours, theirs):
    from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance

    pixels = seeded.tensor("pixels", 2, 3, 28, 28).double()
    embedding = theirs.safety_checker.visual_projection(theirs.safety_checker.vision_model(pixels)[1])
    assert relative_error(ours.safety.image_encoder(pixels), embedding) < TOLERANCE
    concepts, special = ours.safety(pixels)
    assert relative_error(concepts, cosine_distance(embedding, theirs.safety_checker.concept_embeds)) < TOLERANCE
    assert relative_error(special, cosine_distance(embedding, theirs.safety_checker.special_care_embeds)) < TOLERANCE


def test_the_schedule(ours, theirs):
    from ldm.diffusion.schedule import alpha_bar, betas

    assert relative_error(betas(ours.schedule), theirs.scheduler.betas) < 1e-6  # theirs is float32
    assert relative_error(alpha_bar(ours.schedule), theirs.scheduler.alphas_cumprod) < 1e-5
