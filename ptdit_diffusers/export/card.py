"""The model card of an exported folder: license, how to load the folder in each form, sample images."""

import json
import re
from pathlib import Path

from ptdit_diffusers.core.folder_files import CLASS_PIPELINES

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

_CLASS_FRONT_MATTER = """---
license: {license}
library_name: diffusers
tags: [class-conditional, dit, diffusers]
---

# {title}

{what} as a model folder for diffusers.
"""
_WHAT = {  # pipeline -> what its folder holds
    "ClassToImagePipeline": "A class-conditional diffusion transformer",
    "DiffiTImagePipeline": "The image-space model of DiffiT (arXiv 2312.02139), of which no code was released. Heads, "
    "groups of the norms, the merge of skip connections, resampling, and the widths below 64 pixels are our choice, "
    "as the paper does not fix them, so its results are no reproduction of the paper's. This is such a model",
}

_USE = """
## Use

With the package `ptdit-diffusers` installed from a clone of its repository (it is not on PyPI):

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
"""

_END = """
It needs diffusers 0.41 or 0.42, transformers 5, torch 2.6 or newer and accelerate; peft for LoRA, ftfy for captions
outside ASCII. Without `trust_remote_code=True` no code of this repository is run. All weights are safetensors files.
`sha256sum -c SHA256SUMS` checks every file except this card.

The code is Apache-2.0; it was generated from the package `ptdit-diffusers` {version}.
"""

_TEXT_USE = """
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
"""

_CLASS_USE = """
With a pipeline that was loaded in one of these ways:

```python
import torch

image = pipe("PROMPT", generator=torch.Generator("cpu").manual_seed(0)).images[0]
```
"""


def write_card(
    folder: Path,
    own_card: Path,
    title: str,
    license: str | None,
    images: dict[str, str],
    pipeline: str = "PTDiTPipeline",
) -> None:
    """Write README.md: the model's own card if it has one, then how to load the folder and the sample images.

    Args:
        folder: Where the card goes.
        own_card: The model's card, which may be missing.
        title: Name of the model, used if there is no card.
        license: License of the weights; None keeps that of the card, or is "other".
        images: File name and prompt, or class, of each sample image.
        pipeline: Name of the folder's pipeline class.
    """
    from ptdit_diffusers import __version__

    of_classes = pipeline in CLASS_PIPELINES
    if own_card.is_file():
        text = own_card.read_text(encoding="utf-8")
        text = without_dead_links(text, folder)
        if license is not None:
            text = set_license(text, license)
    else:
        front_matter = _CLASS_FRONT_MATTER if of_classes else _FRONT_MATTER
        text = front_matter.format(license=license or "other", title=title, what=_WHAT.get(pipeline))
    prompt = next(iter(images.values()), "a class" if of_classes else "a prompt")
    use = "".join([_USE, _CLASS_USE if of_classes else _TEXT_USE, _END])
    quoted = json.dumps(prompt, ensure_ascii=False)
    use = use.replace('"PROMPT"', quoted).replace("{version}", __version__)
    shown = {name: in_table(prompt) for name, prompt in images.items()}
    rows = [f"| ![{prompt}]({name}) | {prompt} | {seed} |" for seed, (name, prompt) in enumerate(shown.items())]
    if rows:
        use += (
            "\n## Samples\n\nThe first ones made, not selected.\n\n| picture | prompt | seed |\n| --- | --- | --- |\n"
        )
        use += "\n".join(rows) + "\n"
    (folder / "README.md").write_text(text.rstrip() + "\n" + use, encoding="utf-8", newline="\n")


def without_dead_links(text: str, folder: Path) -> str:
    """Return a card with plain text in place of links to files that are not in the folder: dead links on the Hub."""

    def link(found: re.Match) -> str:
        target = found["target"].partition("#")[0]
        here = not target or (".." not in target.split("/") and (folder / target).is_file())
        return found[0] if here or "://" in target or target.startswith("mailto:") else found["text"]

    return re.sub(r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]*)\)", link, text)


def in_table(text: str) -> str:
    """Return a text that cannot leave its cell of a table."""
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("[", "\\[").replace("]", "\\]").replace("<", "&lt;")


def set_license(card: str, license: str) -> str:
    """Return the card with this license in its front matter, which is added if there is none."""
    if not card.startswith("---\n"):
        return f"---\nlicense: {license}\n---\n\n{card}"
    head, _, body = card[4:].partition("\n---")
    lines = [line for line in head.splitlines() if not line.startswith("license:")]
    return "\n".join(["---", f"license: {license}", *lines]) + "\n---" + body
