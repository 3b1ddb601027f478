"""Checkpoints as the peers write and read them: their files through our readers, our files through theirs."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

import weights_convert
from ldm.presets import preset
from tests.checkpoints import same, tensors_of
from tests.measure import relative_error
from weights_convert.naming import to_foreign

pytestmark = pytest.mark.reference


def test_diffusers_folders_of_today_are_read_and_rewritten_so_that_diffusers_loads_them(tiny_diffusers, tmp_path):
    from diffusers import StableDiffusionPipeline

    checkpoint = weights_convert.read(tiny_diffusers)
    assert checkpoint.components["safety"].naming == "transformers-5"
    assert weights_convert.write(checkpoint, tmp_path / "d", "diffusers") == []
    before, after = (StableDiffusionPipeline.from_pretrained(path) for path in (tiny_diffusers, tmp_path / "d"))
    for part in ("unet", "vae", "text_encoder", "safety_checker"):
        expected, found = (getattr(pipeline, part).state_dict() for pipeline in (before, after))
        assert same(found, expected), part
    prompt = "a red cube"
    assert before.tokenizer(prompt).input_ids == after.tokenizer(prompt).input_ids
    assert dict(before.scheduler.config)["beta_end"] == dict(after.scheduler.config)["beta_end"]
    assert after.feature_extractor.crop_size == before.feature_extractor.crop_size


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"variant": "fp16"}], ids=str)
def test_bin_files_and_variants_are_read(tiny_diffusers, vocabulary_folder, tmp_path, options):
    from tests import peers

    peers.write_folder(tmp_path / "d", preset("tiny"), vocabulary_folder, **options)
    ending = "bin" if "safe_serialization" in options else "fp16.safetensors"
    assert (tmp_path / "d" / "unet" / f"diffusion_pytorch_model.{ending}").exists()
    assert same(tensors_of(tmp_path / "d"), tensors_of(tiny_diffusers))


def test_diffusers_own_conversion_of_our_compvis_file_agrees(tiny_diffusers, tmp_path):
    """diffusers reads the CompVis names by tables of its own, written by other people."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    weights_convert.write(weights_convert.read(tiny_diffusers), tmp_path / "c.safetensors", "compvis")
    state = load_file(tmp_path / "c.safetensors")
    unet = UNet2DConditionModel.from_pretrained(tiny_diffusers / "unet")
    vae = AutoencoderKL.from_pretrained(tiny_diffusers / "vae")
    assert same(convert_ldm_unet_checkpoint(dict(state), dict(unet.config)), unet.state_dict())
    converted = convert_ldm_vae_checkpoint(dict(state), dict(vae.config))
    assert set(converted) == set(vae.state_dict())
    assert all(relative_error(converted[n].reshape(t.shape), t) == 0 for n, t in vae.state_dict().items())


def test_old_diffusers_autoencoder_names_are_read(tiny_diffusers, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(tiny_diffusers, old)
    vae = weights_convert.read(tiny_diffusers).components["autoencoder"]
    foreign = to_foreign(vae.architecture, "diffusers-old", vae.tensors)
    save_file(foreign, old / "vae" / "diffusion_pytorch_model.safetensors")
    checkpoint = weights_convert.read(old)
    assert checkpoint.components["autoencoder"].naming == "diffusers-old"
    assert same(tensors_of(old), tensors_of(tiny_diffusers))
