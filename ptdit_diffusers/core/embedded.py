"""The folders and short names of the models that come with the package."""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
SAME = {"dit-128/vae": "shapes-128/vae", "diffit-128/vae": "shapes-128/vae"}  # components that are stored once


def embedded_model_names() -> list[str]:
    """Return the short names of the models in the package, sorted; each is a folder that a pipeline loads from."""
    return sorted(folder.parent.name for folder in WEIGHTS.glob("*/model_index.json"))


def embedded_model_path(name: str) -> Path:
    """Return the folder of a model that comes with the package.

    Args:
        name: Short name, as `embedded_model_names()` lists it.

    Raises:
        ValueError: There is no such model in the package; the message lists the models that there are.
    """
    if name not in embedded_model_names():
        known = ", ".join(embedded_model_names()) or "none is installed"
        raise ValueError(
            f"{name!r} is neither a folder nor a model of this package; give the path of a model folder, a Hub id of "
            f"the form owner/name, or a short name of this package: {known}."
        )
    return WEIGHTS / name


def weights_folder(component: Path) -> Path:
    """Return the folder that holds the weights of a component of a model: its own, or where they are stored once.

    Args:
        component: Folder of the component, for example .../dit-128/vae, which has its configuration in any case.
    """
    folder = component.resolve()
    if folder.parent.parent != WEIGHTS:
        return component
    same = SAME.get(f"{folder.parent.name}/{folder.name}")
    return WEIGHTS / same if same else component


def resolve_model(name_or_path: str | Path) -> str:
    """Return the folder of a short name, and a folder or Hub id (owner/name) unchanged.

    A local folder goes first, so a short name never hides one.
    """
    given = str(name_or_path)
    if isinstance(name_or_path, Path) or Path(given).is_dir() or "/" in given or "\\" in given:
        return given
    return str(embedded_model_path(given))
