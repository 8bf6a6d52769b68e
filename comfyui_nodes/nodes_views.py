"""Nodes for views of one object: apart into pictures before decoding, and onto one sheet after it."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ptdit_diffusers.core.views import sheet_columns

from .schema import fit, integer, schema


class PTDiTViewsToBatch(io.ComfyNode):
    """Views, which are the frames of a latent, as a batch of pictures."""

    @classmethod
    def define_schema(cls) -> Any:
        """Inputs and outputs."""
        return schema(
            "PTDiTViewsToBatch",
            "PT-DiT Views to Batch",
            "latent",
            "Splits the views of a sampled latent into single pictures, so that VAE Decode decodes each view alone "
            "and the views do not blend. Connect VAE Decode, then PT-DiT Contact Sheet, or Create Video for a "
            "turntable.",
            [fit(io.Latent.Input, "latent", tooltip="From a sampler. Its size comes from PT-DiT Empty Latent with "
                 "views.")],
            [
                fit(io.Latent.Output, display_name="latent", tooltip="(objects * views, 4, height / 8, width / 8)"),
                fit(io.Int.Output, display_name="views", tooltip="Number of views of each object. View i is seen from "
                    "azimuth i * 360 / views degrees."),
            ],
            search_aliases=["multi-view", "turntable", "frames to batch"],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent: dict) -> Any:
        """(B, C, V, h, w) to (B * V, C, h, w); a noise mask or batch numbers no longer fit and are left out."""
        samples = latent["samples"]
        if samples.ndim != 5:
            raise ValueError(
                f"the latent has {samples.ndim} axes, so it is a picture; views are frames: use PT-DiT Empty Latent "
                "with views."
            )
        views = samples.shape[2]
        kept = {key: value for key, value in latent.items() if key not in ("noise_mask", "batch_index")}
        pictures = samples.transpose(1, 2).flatten(0, 1)
        return io.NodeOutput({**kept, "samples": pictures}, views)


class PTDiTContactSheet(io.ComfyNode):
    """Many pictures on one."""

    @classmethod
    def define_schema(cls) -> Any:
        """Inputs and outputs."""
        return schema(
            "PTDiTContactSheet",
            "PT-DiT Contact Sheet",
            "image",
            "Puts pictures (views of an object, frames of a video) side by side on one sheet, row by row.",
            [
                fit(io.Image.Input, "images", tooltip="A batch of pictures, for example from VAE Decode."),
                integer("columns", 0, 0, 1024, "Pictures per row; 0 = a sheet that is as square as possible.",
                        optional=True),
                integer("per_sheet", 0, 0, 4096, "Pictures per sheet. For one sheet per object, connect `views` of "
                        "PT-DiT Views to Batch. 0 = all.", optional=True),
            ],
            [fit(io.Image.Output, display_name="sheets", tooltip="One picture per sheet; empty cells are white.")],
            search_aliases=["grid", "montage", "multi-view"],
        )  # fmt: skip

    @classmethod
    def execute(cls, images: torch.Tensor, columns: int = 0, per_sheet: int = 0) -> Any:
        """Tile the batch."""
        return io.NodeOutput(contact_sheets(images, columns, per_sheet or len(images)))


def contact_sheets(images: torch.Tensor, columns: int, per_sheet: int) -> torch.Tensor:
    """(N, H, W, C) in 0..1 to (N / per_sheet, rows * H, columns * W, C); columns 0 gives the squarest sheet.

    Raises:
        ValueError: N is no multiple of `per_sheet`.
    """
    count, height, width, channels = images.shape
    if count % per_sheet:
        legal = [number for number in range(1, count + 1) if count % number == 0]
        nearest = min(legal, key=lambda number: abs(number - per_sheet))
        raise ValueError(f"per_sheet={per_sheet} does not divide the {count} pictures; nearest: {nearest} (0 = all).")
    columns = columns or sheet_columns(per_sheet)
    rows = -(-per_sheet // columns)
    sheets = images.new_ones(count // per_sheet, rows * columns, height, width, channels)
    sheets[:, :per_sheet] = images.unflatten(0, (-1, per_sheet))
    cells = sheets.unflatten(1, (rows, columns)).transpose(2, 3)  # (sheets, rows, H, columns, W, C)
    return cells.reshape(-1, rows * height, columns * width, channels)
