"""Loader nodes: a model folder, and the VAE that the stock loader does not know."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ptdit_diffusers.core.model_folder import check_layers

from .folders import (
    WEIGHT_DTYPES,
    check_parts,
    default_folder,
    load_folder_clip,
    load_folder_model,
    load_folder_vae,
    makes_videos,
    model_folders,
    named_folder,
    network_config,
)
from .schema import check_choice, choice, fit, schema, switch
from .vae import DTYPES, load_vae

VAE_DTYPES = ("auto", *DTYPES)
ENCODE_AS = AUTO, PICTURES, VIDEO = ("auto", "pictures", "video")


def newest(folder: Path) -> float:
    """Return the time of the last change below a folder, so that ComfyUI loads replaced files again."""
    return max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=0.0)


def newest_file(path: str | None) -> float:
    """Return the time of the last change of a file, 0 if there is none."""
    return os.path.getmtime(path) if path and os.path.exists(path) else 0.0


class PTDiTFolderLoader(io.ComfyNode):
    """Node that loads MODEL, CLIP and VAE from a folder in diffusers' layout."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the schema of inputs and outputs."""
        folders = list(model_folders())
        return schema(
            "PTDiTFolderLoader",
            "PT-DiT Folder Loader",
            "loaders",
            "Loads a model folder of PT-DiT, DiT or DiffiT in diffusers' layout: a model that comes with the nodes, a "
            "folder in models/diffusers, or a Hugging Face Hub snapshot that is already on disk. Connect PT-DiT Text "
            "Encode, for DiT and DiffiT DiT Class, and KSampler.",
            [
                choice(
                    "folder",
                    folders,
                    "The folders found: with the nodes, in models/diffusers, and in the Hub's cache. Nothing is "
                    "downloaded.",
                    **({"default": default_folder(folders)} if folders else {}),
                ),
                choice(
                    "weight_dtype",
                    list(WEIGHT_DTYPES),
                    "Number format of the network's weights. fp8 needs half the memory of 16 bit and costs some "
                    "quality; 'fast' also multiplies in fp8 on GPUs that can.",
                    optional=True,
                    advanced=True,
                ),
                choice(
                    "encode_as",
                    list(ENCODE_AS),
                    "How VAE Encode reads a batch of images. pictures: one by one. video: as the 4n + 1 frames of one "
                    "video. auto: video if the model makes clips.",
                    optional=True,
                    advanced=True,
                ),
            ],
            [
                fit(io.Model.Output, display_name="model", tooltip="The network, for KSampler and model nodes."),
                fit(
                    io.Clip.Output,
                    display_name="clip",
                    tooltip="The folder's T5 text encoder, for text nodes. DiT and DiffiT have none.",
                ),
                fit(io.Vae.Output, display_name="vae", tooltip="The folder's VAE, for VAE Decode and Encode."),
            ],
            search_aliases=["diffusers", "load checkpoint", "load model", "shapes-128", "clips-128", "views-96"],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, weight_dtype: str = "default", encode_as: str = AUTO) -> Any:
        """Return a value that changes when a file below the folder changes."""
        found = model_folders().get(folder)
        return (folder, weight_dtype, encode_as, newest(found) if found else 0.0)

    @classmethod
    def execute(cls, folder: str, weight_dtype: str = "default", encode_as: str = AUTO) -> Any:
        """Load the three components."""
        check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES)
        check_choice("encode_as", encode_as, ENCODE_AS)
        path = named_folder(folder)
        check_layers(path)
        check_parts(path)
        video = makes_videos(path) if encode_as == AUTO else encode_as == VIDEO
        vae = load_folder_vae(path, pictures=not video)
        model = load_folder_model(str(path), weight_dtype, network_config(path, vae))
        return io.NodeOutput(model, load_folder_clip(path), vae)


class PTDiTVAELoader(io.ComfyNode):
    """Node that loads the causal video VAE from models/vae."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the schema of inputs and outputs."""
        return schema(
            "PTDiTVAELoader",
            "Load PT-DiT VAE",
            "loaders",
            "Loads the causal video VAE of Open-Sora-Plan v1.2 (official .ckpt or converted .safetensors), which "
            "ComfyUI's Load VAE cannot read. Connect VAE Decode, VAE Encode or their tiled forms.",
            [
                choice("vae_name", folder_paths.get_filename_list("vae"), "A file in models/vae."),
                choice(
                    "dtype",
                    list(VAE_DTYPES),
                    "Number format of the VAE. auto: ComfyUI chooses for the device. fp32 needs twice the memory of "
                    "16 bit.",
                    optional=True,
                    advanced=True,
                ),
                switch(
                    "video",
                    False,
                    "How VAE Encode reads a batch of images. Off: as single pictures. On: as the 4n + 1 frames of "
                    "one video.",
                    optional=True,
                ),
            ],
            [
                fit(
                    io.Vae.Output,
                    display_name="vae",
                    tooltip="For VAE Decode and VAE Encode. Compresses 8x in space and 4x in time.",
                )
            ],
            search_aliases=["open-sora-plan", "causal vae", "video vae", "load vae"],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, dtype: str = "auto", video: bool = False) -> Any:
        """Return a value that changes when the file changes."""
        path = folder_paths.get_full_path("vae", vae_name)
        return (vae_name, dtype, video, newest_file(path))

    @classmethod
    def execute(cls, vae_name: str, dtype: str = "auto", video: bool = False) -> Any:
        """Load and check the file."""
        check_choice("dtype", dtype, VAE_DTYPES)
        path = folder_paths.get_full_path_or_raise("vae", vae_name)
        return io.NodeOutput(load_vae(path, pictures=not video, dtype_name=dtype))
