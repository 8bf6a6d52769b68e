"""Transformer and text encoder that are trained together."""

from torch import nn

from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel


class Networks(nn.Module):
    """Transformer and text encoder that are trained together."""

    def __init__(self, transformer: PTDiTTransformer3DModel, text_encoder: nn.Module) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder


def transformer_of(model: nn.Module) -> PTDiTTransformer3DModel:
    """Return the transformer of what is trained."""
    return model.transformer if isinstance(model, Networks) else model


def text_encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the text encoder of what is trained; None = it is not trained."""
    return model.text_encoder if isinstance(model, Networks) else None
