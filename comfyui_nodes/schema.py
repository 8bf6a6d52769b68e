"""Node schemas for every supported ComfyUI: keywords that an older one does not know are left out."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from comfy_api.latest import io

ALIASES = ["ptdit", "pt-dit", "qihoo", "t2x", "proxy"]


def fit(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call with the keywords that this version of `function` knows."""
    known = inspect.signature(function).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in known.values()):
        kwargs = {name: value for name, value in kwargs.items() if name in known}
    return function(*args, **kwargs)


def schema(node_id: str, title: str, category: str, description: str, inputs: list, outputs: list, **more: Any) -> Any:
    """Schema of one of our nodes."""
    more["search_aliases"] = [*ALIASES, *more.get("search_aliases", [])]
    return fit(
        io.Schema,
        node_id=node_id,
        display_name=title,
        category=f"PT-DiT/{category}",
        description=description,
        inputs=inputs,
        outputs=outputs,
        **more,
    )


def integer(name: str, default: int, low: int, high: int, tooltip: str, **more: Any) -> Any:
    """A whole number."""
    return fit(io.Int.Input, name, default=default, min=low, max=high, tooltip=tooltip, **more)


def number(name: str, default: float, low: float, high: float, tooltip: str, **more: Any) -> Any:
    """A number."""
    more.setdefault("step", 0.01)
    return fit(io.Float.Input, name, default=default, min=low, max=high, tooltip=tooltip, **more)


def choice(name: str, options: list[str], tooltip: str, **more: Any) -> Any:
    """One of several names; the first is the default unless another is given."""
    default = more.pop("default", options[0] if options else None)
    return fit(io.Combo.Input, name, options=options, default=default, tooltip=tooltip, **more)


def switch(name: str, default: bool, tooltip: str, **more: Any) -> Any:
    """Yes or no."""
    return fit(io.Boolean.Input, name, default=default, tooltip=tooltip, **more)


def check_choice(name: str, value: str, options: Iterable[str]) -> None:
    """ComfyUI checks choices before a run; 0.3.64 does not check those of nodes like ours.

    Raises:
        ValueError: The value is not one of the options.
    """
    if value not in options:
        raise ValueError(f"{name}={value!r} is not in the list; choose one of {', '.join(options)}.")


def show(node: Any, text: str) -> None:
    """Show text on the node that runs, where this ComfyUI can; the node's schema must ask for its number."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    number = getattr(getattr(node, "hidden", None), "unique_id", None)
    if number is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, number)
