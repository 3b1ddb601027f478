"""How well an autoencoder remakes pictures: PSNR and SSIM, on pixels as they are seen, 0 to 255.

PSNR is 10 log10(255^2 / MSE), in dB. SSIM: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
Similarity", with a Gaussian window of 11 pixels and sigma 1.5, through torchmetrics (extra `eval`). Both of each picture, then
averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.models.autoencoder import Autoencoder
from ldm.pipelines import autoencoding


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """psnr in dB and ssim (at most 1), means over `count` pictures."""

    psnr: float
    ssim: float
    count: int

    @classmethod
    def mean(cls, parts: Sequence["Reconstruction"]) -> "Reconstruction":
        """Of all pictures of several parts."""
        count = sum(part.count for part in parts)
        psnr, ssim = (sum(getattr(part, name) * part.count for part in parts) / count for name in ("psnr", "ssim"))
        return cls(psnr=psnr, ssim=ssim, count=count)


@torch.no_grad()
def reconstruction(autoencoder: Autoencoder, pixels: Tensor) -> Reconstruction:
    """Of uint8 pictures (b, 3, h, w), through the posterior's mode."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise ImportError("SSIM needs the eval extra; install it with: pip install 'ldm[eval]'") from None
    given = pixels.to(autoencoder.quant_conv.weight) / 127.5 - 1
    latents = autoencoding.encode(autoencoder, given, None).mode() * autoencoder.config.scaling_factor
    remade = autoencoding.decode(autoencoder, latents, None).float().cpu()
    seen, there = ((remade / 2 + 0.5).clamp(0, 1) * 255).round(), pixels.cpu().float()
    errors = (seen - there).square().mean(dim=(1, 2, 3))
    psnr = 10 * torch.log10(255**2 / errors.clamp(min=1e-12))
    ssim = structural_similarity_index_measure(seen, there, data_range=255.0, reduction="none")
    return Reconstruction(psnr=psnr.mean().item(), ssim=ssim.mean().item(), count=len(pixels))
