"""Which encoded data a run is trained on, and the card of its model, which says so."""

from pathlib import Path
from typing import Any

from ptdit_diffusers.core.documents import read_mapping
from ptdit_diffusers.training.own_data.settings import NEW, OwnDataSettings, by_source


def data_notes(settings: OwnDataSettings) -> list[Path]:
    """Return the files in the folder of a run that name the version of the encoded data, one of each source."""
    count = len(by_source(settings))
    return [
        settings.folder / ("data.json" if number == 1 else f"data-{number}.json") for number in range(1, count + 1)
    ]


def noted_version(settings: OwnDataSettings, note: Path) -> Path:
    """Return the version of the encoded data that a note names.

    Raises:
        ValueError: It is gone.
    """
    version = Path(read_mapping(note)["version"])
    version = version if version.is_absolute() else settings.encoded / version
    if not (version / "manifest.json").is_file():
        raise ValueError(f"the encoded data of this run are gone ({version}); begin anew in another output.")
    return version


def vae_note(settings: OwnDataSettings) -> Path:
    """Return the file that counts the pictures of its own that the VAE was trained on."""
    return settings.folder / "vae" / "pictures.json"


def card(settings: OwnDataSettings, name: str, step: int, average: str) -> str:
    """Return the text of a model's README.md.

    Args:
        settings: Of the run.
        name: Of the model.
        step: After which the weights are taken.
        average: What the weights are, in words.
    """
    stages = [f"{each.steps} steps of {each.batch} at {each.resolution} pixels" for each in settings.stages]
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-image", "---", "", f"# {name}", ""]
    lines.append(f"Trained with `ptdit train` from {parts_text(settings)}: {', then '.join(stages)}.")
    lines += [f"Weights after step {step}: {average}.", "", "## Data", ""]
    for note in data_notes(settings):
        try:
            manifest = read_mapping(noted_version(settings, note) / "manifest.json")
        except (ValueError, OSError):
            lines.append("- Data that are not here any more.")
            continue
        lines.append(f"- {manifest['count']} pictures or clips. {licences_text(manifest)}")
    if settings.vae.source or vae_note(settings).is_file():
        facts = read_mapping(vae_note(settings)) if vae_note(settings).is_file() else {}
        count = facts.get("count", "not counted")
        lines.append(f"- Other pictures, which the VAE was trained on: {count}. {licences_text(facts)}")
    return "\n".join([*lines, ""])


def parts_text(settings: OwnDataSettings) -> str:
    """Return what the training began with, and which of VAE and text encoder were trained, too."""
    base = Path(settings.components).name if Path(settings.components).is_absolute() else settings.components
    start = "new weights" if settings.start == NEW else f"`{base}` (`train: {settings.train}`)"
    vae = {"new": "a new VAE", "decoder": f"the VAE of `{base}`, its decoder trained on"}
    text = ["with more words"] * settings.text.grow + ["trained with the transformer"] * settings.text.train
    return (
        f"{start}, {vae.get(settings.vae.train, f'the VAE of `{base}`')}, and the text encoder of `{base}`"
        + f", {' and '.join(text)}" * bool(text)
    )


def licences_text(facts: dict[str, Any]) -> str:
    """Return which licences were counted."""
    licences = {licence: count for licence, count in facts.get("licences", {}).items() if licence}
    known = ", ".join(f"{licence} ({count})" for licence, count in licences.items())
    return f"Licences: {known or 'not given'}."
