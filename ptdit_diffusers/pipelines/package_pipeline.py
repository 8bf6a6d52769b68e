"""Loading and saving that all pipelines of this package share."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ptdit_diffusers.core.embedded import resolve_model
from ptdit_diffusers.core.model_folder import read_config

from .model_folders import check_folder
from .ptdit_remote import copy_code


class PackagePipeline(DiffusionPipeline):
    """A pipeline that also loads models of this package by their short names, and saves folders fit for the Hub."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # model_index.json names the library of each component. Our classes are registered in diffusers' namespace, and
        # only that spelling can be loaded from the Hub, so it is the one to record.
        if name in self.__dict__.get("_internal_dict", ()):
            component_class = type(getattr(value, "_orig_mod", value))
            if component_class.__module__.partition(".")[0] == __name__.partition(".")[0]:
                self.register_to_config(**{name: ("diffusers", component_class.__name__)})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "PackagePipeline":
        """Load a pipeline from a folder, a Hub id, or by the short name of a model that comes with the package.

        Args:
            pretrained_model_name_or_path: E.g. "shapes-128". A local folder of that name goes first.
            kwargs: Options of `DiffusionPipeline.from_pretrained`, e.g. `dtype` or single components.

        Raises:
            ValueError: Neither a folder, nor of the form owner/name, nor a known short name; the message lists those.
                Or the parts of the model do not fit their weights or each other.
        """
        source = resolve_model(pretrained_model_name_or_path)
        folder = Path(source)
        if not folder.is_dir():  # of the Hub: fetched here, to be checked, and then found in the cache
            folder = Path(cls.download(source, **kwargs))
            kwargs.pop("force_download", None)
        if (folder / "model_index.json").is_file():
            cls._check_kind(folder, without=kwargs)
            check_folder(folder, kwargs, kwargs.get("variant"))
        return super().from_pretrained(source, **kwargs)

    @classmethod
    def _check_kind(cls, folder: Path, without: Collection[str]) -> None:
        """Refuse the folder of a pipeline that lacks parts of this one, and name the class that loads it."""
        index = read_config(folder / "model_index.json")
        required = set(cls._get_signature_keys(cls)[0]) - set(cls._optional_components)
        if missing := sorted(required - set(index) - set(without)):
            kind = index.get("_class_name")
            raise ValueError(
                f"{folder} holds a {kind}, without the {' and '.join(missing)} of a {cls.__name__}; load it with "
                f"{kind}.from_pretrained."
            )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "PackagePipeline":
        """Make a pipeline of this class with the components of another one, which both then share.

        Their number formats stay as they are; in diffusers they become float32 where no `dtype` is given.

        Args:
            pipeline: The other pipeline.
            kwargs: Components and settings to take in place of its own, and `dtype` to convert to.

        Raises:
            TypeError: The other pipeline has not all components of this class.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        components, settings = cls._get_signature_keys(cls)
        given = {name: getattr(pipeline, name) for name in components if hasattr(pipeline, name)}
        given |= {name: pipeline.config[name] for name in settings if name in pipeline.config}
        made = cls(**(given | kwargs))
        return made if dtype is None else made.to(dtype=dtype)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save all components; a pipeline whose code came from the Hub takes that code along.

        Args:
            save_directory: Folder to write to.
            kwargs: Options of `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: A component has a LoRA.
        """
        adapters = {name: list(getattr(part, "peft_config", {})) for name, part in self.components.items()}
        for name, loaded in adapters.items():
            if loaded:
                raise ValueError(
                    f"the {name} has the LoRA {', '.join(loaded)}, whose layers a saved pipeline cannot load: call "
                    "fuse_lora() and unload_lora_weights() first to keep it in the weights, or unload_lora_weights() "
                    "alone to save the pipeline without it."
                )
        super().save_pretrained(save_directory, **kwargs)
        copy_code(type(self), save_directory)
