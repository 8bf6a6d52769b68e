"""PT-DiT (Qihoo-T2X) for diffusers and ComfyUI."""

__version__ = "0.1.0"
