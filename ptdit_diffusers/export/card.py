"""The model card of an exported folder: license, how to load the folder in each form, sample images."""

from pathlib import Path

REPO, COMMIT = "OWNER/NAME", "COMMIT"  # what `push` replaces in the card once it knows them

_FRONT_MATTER = """---
license: {license}
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, ptdit, diffusers]
---

# {title}

PT-DiT, the proxy-tokenized diffusion transformer (arXiv 2409.04005), as a model folder for diffusers.
"""

_USE = """
## Use

With the package `ptdit-diffusers` installed:

```python
import ptdit_diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("OWNER/NAME", revision="COMMIT")
```

Without the package, this repository brings its own code. Read it first; `revision` pins the version that you read:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "OWNER/NAME", revision="COMMIT", custom_pipeline="pipeline", trust_remote_code=True
)
```

Or with a guider of diffusers in place of `guidance_scale`:

```python
from diffusers import ModularPipeline

modular = ModularPipeline.from_pretrained("OWNER/NAME", revision="COMMIT", trust_remote_code=True)
modular.load_components(revision="COMMIT")
image = modular(prompt="PROMPT", output="images")[0]
```

With a `DiffusionPipeline` that was loaded in one of the first two ways:

```python
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

image = pipe("PROMPT", generator=torch.Generator("cpu").manual_seed(0)).images[0]
image_to_image = AutoPipelineForImage2Image.from_pipe(pipe)
inpainting = AutoPipelineForInpainting.from_pipe(pipe)
```

It needs diffusers 0.41 or 0.42, transformers 5, torch 2.6 or newer and accelerate; peft for LoRA, ftfy for captions
outside ASCII. Without `trust_remote_code=True` no code of this repository is run. All weights are safetensors files.
`sha256sum -c SHA256SUMS` checks every file except this card.

The code is Apache-2.0; it was generated from the package `ptdit-diffusers` {version}.
"""


def write_card(folder: Path, own_card: Path, title: str, license: str | None, images: dict[str, str]) -> None:
    """Write README.md: the model's own card if it has one, then how to load the folder and the sample images.

    Args:
        folder: Where the card goes.
        own_card: The model's card, which may be missing.
        title: Name of the model, used if there is no card.
        license: License of the weights; None keeps that of the card, or is "other".
        images: File name and prompt of each sample image.
    """
    from ptdit_diffusers import __version__

    if own_card.is_file():
        text = own_card.read_text(encoding="utf-8")
        if license is not None:
            text = set_license(text, license)
    else:
        text = _FRONT_MATTER.format(license=license or "other", title=title)
    prompt = next(iter(images.values()), "a prompt")
    use = _USE.replace("PROMPT", prompt).replace("{version}", __version__)
    rows = [f"| ![{prompt}]({name}) | {prompt} | {seed} |" for seed, (name, prompt) in enumerate(images.items())]
    if rows:
        use += (
            "\n## Samples\n\nThe first ones made, not selected.\n\n| picture | prompt | seed |\n| --- | --- | --- |\n"
        )
        use += "\n".join(rows) + "\n"
    (folder / "README.md").write_text(text.rstrip() + "\n" + use, encoding="utf-8", newline="\n")


def set_license(card: str, license: str) -> str:
    """Return the card with this license in its front matter, which is added if there is none."""
    if not card.startswith("---\n"):
        return f"---\nlicense: {license}\n---\n\n{card}"
    head, _, body = card[4:].partition("\n---")
    lines = [line for line in head.splitlines() if not line.startswith("license:")]
    return "\n".join(["---", f"license: {license}", *lines]) + "\n---" + body
