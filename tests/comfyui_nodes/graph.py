"""Building ComfyUI graphs in API form, and a real headless ComfyUI to run them.

The server is found by COMFYUI_DIR (a checkout); COMFYUI_PYTHON names a Python with its requirements, by default this
one. It runs on the CPU, on this machine alone, in a private folder.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from .events import PREVIEW, Events

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = {"execution_success", "execution_error", "execution_interrupted"}
EMBEDDED = "shapes-128 (comes with the nodes)"

# Lets a torchvision built for CUDA be imported beside a torch for CPUs, and stands in for a missing torchaudio:
# neither is used by these graphs.
LAUNCHER = """
import importlib.util, os, runpy, sys, types
import torch
if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            pass
if importlib.util.find_spec("torchaudio") is None:
    import importlib.machinery
    for name in ("torchaudio", "torchaudio.transforms", "torchaudio.functional"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Graph:
    """Collects nodes: `graph("KSampler", model=m, seed=1)` returns the node's first output."""

    def __init__(self):
        self.nodes: dict[str, dict] = {}
        self.numbers = itertools.count(1)

    def __call__(self, class_type: str, **inputs: Any) -> tuple[str, int]:
        number = str(next(self.numbers))
        links = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
        self.nodes[number] = {"class_type": class_type, "inputs": links}
        return number, 0


def output(node: tuple[str, int], number: int) -> tuple[str, int]:
    """Another output of a node."""
    return node[0], number


class Server:
    """A running ComfyUI with this repository as a custom node."""

    def __init__(self, comfy: Path, base: Path, pack: Path = ROOT, python: str | None = None):
        self.base, self.python = base, python or os.environ.get("COMFYUI_PYTHON") or sys.executable
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "pt-dit.pack-1").symlink_to(pack, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        launcher = base / "launch.py"
        launcher.write_text(LAUNCHER)
        # PyTorch's attention, as it is with CUDA: ComfyUI's own for CPUs breaks compiled graphs at each call.
        arguments = [
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(base),
            "--database-url",
            f"sqlite:///{base}/user/comfyui.db",
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--preview-method",
            "latent2rgb",
            "--use-pytorch-cross-attention",
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(base / "hub"), "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)
        if "COMFYUI_PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.environ["COMFYUI_PYTHONPATH"]
        self.log = open(base / "server.log", "wb")
        self.process = subprocess.Popen(
            [self.python, str(launcher), str(comfy / "main.py"), *arguments],
            cwd=comfy, env=environment, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.wait()

    def wait(self, seconds: float = 300) -> None:
        """Until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not start:\n{self.text()[-3000:]}")

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()

    def text(self) -> str:
        """Its log so far."""
        return re.sub(r"\x1b\[[0-9;]*m", "", (self.base / "server.log").read_text(errors="replace"))

    def cpu_seconds(self) -> float:
        """CPU time of the server so far; only Linux tells it, elsewhere 0."""
        status = Path(f"/proc/{self.process.pid}/stat")
        if not status.is_file():
            return 0.0
        user, system = status.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def read(self, path: str, body: Any = None) -> bytes:
        """What one request brings; with a body it is a POST of JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str, body: Any = None) -> Any:
        """JSON of one request."""
        text = self.read(path, body)
        return json.loads(text) if text else None

    def queue(self, graph: Graph | dict, seconds: float = 900, interrupt: bool = False) -> dict:
        """Run a graph as the page does: {"ok", "message", "outputs", "seconds", "previews", "steps", "order"}.

        `message` is what a node or the check of inputs says, `steps` the progress numbers and `order` the nodes that
        ran. With `interrupt` the run is cancelled as soon as sampling has begun.
        """
        nodes, client = graph.nodes if isinstance(graph, Graph) else graph, uuid.uuid4().hex
        result = {"ok": False, "message": "", "outputs": {}, "seconds": 0.0, "previews": 0, "steps": [], "order": []}
        begin = time.monotonic()
        with Events(self.port, client, seconds) as events:
            try:
                number = self.get("/prompt", {"prompt": nodes, "client_id": client})["prompt_id"]
            except urllib.error.HTTPError as error:
                return {**result, "message": error.read().decode()}
            for name, data in iter(events.next, None):
                if name == PREVIEW:
                    result["previews"] += 1
                elif data.get("prompt_id", number) != number:
                    continue
                elif name == "progress":
                    result["steps"].append((data["value"], data["max"]))
                    if interrupt:
                        self.get("/interrupt", {})
                        interrupt = False
                elif name == "executing" and data["node"] is not None:
                    result["order"].append(data["node"])
                elif name == "execution_error":
                    result["message"] = data["exception_message"]
                elif name == "execution_interrupted":
                    result["message"] = "interrupted"
                if name in ENDINGS:
                    break
                if time.monotonic() > begin + seconds:
                    raise TimeoutError(f"no result after {seconds} s:\n{self.text()[-2000:]}")
        result["seconds"] = time.monotonic() - begin
        while number not in (history := self.get(f"/history/{number}")):
            time.sleep(0.05)
        ok = history[number]["status"]["status_str"] == "success"
        return {**result, "ok": ok, "outputs": history[number]["outputs"]}

    def files(self, result: dict) -> list[Path]:
        """Files that a run saved."""
        saved = []
        for outputs in result["outputs"].values():
            for items in outputs.values():
                for item in items if isinstance(items, list) else ():
                    if isinstance(item, dict) and "filename" in item:
                        saved.append(self.base / item["type"] / item.get("subfolder", "") / item["filename"])
        return saved


def wrong_in(picture: Path, prompt: str) -> tuple[str, ...]:
    """What a saved picture of shapes lacks of its prompt, by the verifier that reads only pixels."""
    import numpy
    from PIL import Image

    from scripts.verifiers.pictures.figures import read_picture
    from scripts.verifiers.pictures.prompt import read_prompt
    from scripts.verifiers.pictures.verdict import verify_picture

    pixels = numpy.asarray(Image.open(picture).convert("RGB"))
    return verify_picture(read_picture(pixels), read_prompt(prompt)).wrong
