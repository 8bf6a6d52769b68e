"""The example workflows: sound files, and on a real ComfyUI those of the embedded model draw what was asked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .graph import EMBEDDED as EMBEDDED_FOLDER
from .graph import Server

FILES = sorted((Path(__file__).parents[2] / "example_workflows").glob("*.json"))
EMBEDDED = [file for file in FILES if "embedded" in file.stem]
NOTES = ("Note", "MarkdownNote")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a choice that brings inputs of its own
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC}


def widget_values(name: str, kind: str | list, options: dict, values: Iterator) -> dict[str, Any]:
    """A widget's value as the page orders them, and those of the inputs that a dynamic choice brings."""
    if not (isinstance(kind, list) or kind in WIDGETS):
        return {}
    value = next(values, options.get("default"))
    if value is None:
        return {}
    found = {name: value}
    if options.get("control_after_generate"):
        next(values, None)
    for option in options.get("options", ()) if kind == DYNAMIC else ():
        for group in option["inputs"].values() if option["key"] == value else ():
            for key, (inner, *more) in group.items():
                found |= widget_values(f"{name}.{key}", inner, more[0] if more else {}, values)
    return found


def to_graph(workflow: dict, known: dict) -> dict:
    """A workflow as the page saves it -> the form that the server runs; skips where a node pack is missing."""
    missing = {node["type"] for node in workflow["nodes"]} - set(NOTES) - set(known)
    if missing:
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(missing))}: COMFYUI_GGUF names no checkout")
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        values = iter(node["widgets_values"])
        linked = {each["name"]: sources[each["link"]] for each in node["inputs"] if each["link"] is not None}
        inputs = {}
        for group in ("required", "optional"):
            for name, (kind, *options) in known[node["type"]]["input"].get(group, {}).items():
                inputs |= widget_values(name, kind, options[0] if options else {}, values)
                if name in linked:
                    inputs[name] = linked[name]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_workflow_is_whole(file):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, slot, target, place, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == number and nodes[source]["outputs"][slot]["type"] == kind
    assert any(node["type"] == "SaveImage" for node in nodes.values())
    assert any(node["type"] in NOTES and len(node["widgets_values"][0]) > 50 for node in nodes.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nodes_have_room_in_both_layouts_of_the_page(file):
    """Heights are those of the files, which the page keeps; the newer layout needs up to 50 pixels more."""
    boxes = []
    for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((node["type"], x, y - 30, x + width, y + height + 50))  # the title lies above the position
    for number, (name, left, top, right, bottom) in enumerate(boxes):
        for other, left2, top2, right2, bottom2 in boxes[number + 1 :]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, f"{name} and {other} overlap"


@pytest.mark.parametrize("file", [file for file in FILES if file not in EMBEDDED], ids=lambda file: file.stem)
def test_files_to_download_are_linked_in_the_loader_and_in_the_note(file):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    (note,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    links = [link for node in workflow["nodes"] for link in node["properties"].get("models", ())]
    for node in workflow["nodes"]:
        for link in node["properties"].get("models", ()):
            assert link["name"] in node["widgets_values"] and link["directory"] in note
            assert f"[{link['name']}]({link['url']})" in note and link["url"].startswith("https://")
    assert links
    loaders = [node for node in workflow["nodes"] if "Loader" in node["type"]]
    assert all(node["widgets_values"][0] in note for node in loaders)


@pytest.mark.comfy
@pytest.mark.parametrize("file", EMBEDDED, ids=lambda file: file.stem)
def test_a_workflow_of_the_embedded_model_draws_pictures(server: Server, file):
    from PIL import Image

    workflow = json.loads(file.read_text(encoding="utf-8"))
    result = server.queue(to_graph(workflow, server.get("/object_info")))
    assert result["ok"], result["message"]
    pictures = [path for path in server.files(result) if path.suffix == ".png"]
    assert len(pictures) >= sum(node["type"] == "SaveImage" for node in workflow["nodes"])
    for path in pictures:
        with Image.open(path) as picture:  # green on brown differs in its channels, hardly in its grey
            assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 60, f"{path.name}: one color"


@pytest.mark.comfy
@pytest.mark.parametrize("file", [file for file in FILES if file not in EMBEDDED], ids=lambda file: file.stem)
def test_a_workflow_of_the_official_model_uses_nodes_that_exist_and_runs_where_its_files_are(server: Server, file):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    known = server.get("/object_info")
    graph = to_graph(workflow, known)
    for node in graph.values():
        assert set(node["inputs"]) >= set(known[node["class_type"]]["input"]["required"])
    result = server.queue(graph, seconds=3600)
    if "value_not_in_list" in result["message"]:
        pytest.skip("the official files are not in ComfyUI's models folder")
    assert result["ok"], result["message"]


def with_stand_ins(graph: dict) -> dict:
    """A graph of the official model with tiny random files in its place, small pictures and two steps."""
    values = {"vae_name": "official.ckpt", "lora_name": "comfy.safetensors", "steps": 2, "classes": "2"}
    values |= {"width": 128, "height": 128}
    encoders = {number for number, node in graph.items() if node["class_type"].startswith("CLIPLoader")}
    for number, node in graph.items():
        values["unet_name"] = "wide-q4_k.gguf" if node["class_type"] == "UnetLoaderGGUF" else "tiny.pt"
        if "DiT-XL" in node["inputs"].get("unet_name", ""):
            values["unet_name"] = "dit_official.pt"
        if node["class_type"] == "VAELoader":  # of Stable Diffusion, whose latents have four channels, too
            node["class_type"] = "PTDiTVAELoader"
        if number in encoders:
            node.update(class_type="PTDiTFolderLoader", inputs={"folder": EMBEDDED_FOLDER, "weight_dtype": "default"})
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in encoders:
                node["inputs"][name] = [value[0], 1]
            elif not isinstance(value, list):
                node["inputs"][name] = values.get(name, value)
    return graph


@pytest.mark.comfy
@pytest.mark.parametrize("file", [file for file in FILES if file not in EMBEDDED], ids=lambda file: file.stem)
def test_a_workflow_of_the_official_model_runs_with_stand_ins(server: Server, file):
    graph = to_graph(json.loads(file.read_text(encoding="utf-8")), server.get("/object_info"))
    result = server.queue(with_stand_ins(graph))
    assert result["ok"], result["message"]
    assert any(path.suffix == ".png" for path in server.files(result))
