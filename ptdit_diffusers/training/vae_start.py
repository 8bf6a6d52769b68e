"""The first weights of a VAE that is trained from nothing."""

import torch

from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan


@torch.no_grad()
def start_as_identity(model: AutoencoderKLOpenSoraPlan) -> None:
    """Let the untrained VAE pass the picture, subsampled, through its first channels; it learns colors from there.

    Residual blocks and attention begin as the identity, the convolutions between them as Dirac kernels plus a little
    of their random values. Only the newest of three time taps is used, since a picture sees them as one.
    """
    for name, weight in model.named_parameters():
        if weight.ndim < 4:
            continue
        kernel = weight if weight.ndim == 4 else weight[:, :, -1]
        if weight.ndim == 5:
            weight[:, :, :-1] = 0
        if "conv2." in name or "proj_out." in name:
            kernel.zero_()
        elif not any(part in name for part in ("conv1.", ".q.", ".k.", ".v.")):
            kernel.mul_(0.3).add_(torch.nn.init.dirac_(torch.empty_like(kernel)))
    model.quant_conv.conv.bias[model.config.z_channels :] = -6  # begin with little posterior noise
