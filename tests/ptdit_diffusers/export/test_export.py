"""An exported folder is whole, loads without this package, is refused without trust, and reaches a Hub over HTTP."""

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.cli import main
from ptdit_diffusers.core.embedded import embedded_model_path
from ptdit_diffusers.export.card import without_dead_links
from ptdit_diffusers.export.code import write_code
from ptdit_diffusers.export.folder import ExportError, export
from tests.hub_server import COMMIT, hub_server
from tests.processes import run

PROMPTS = ["a red star", "two blue stars"]
CALL = {"num_inference_steps": 2, "output_type": "latent"}


def load_server():
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HubServer()


@pytest.fixture(scope="module")
def exported(tiny_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    export(tiny_model_folder, folder, PROMPTS, "apache-2.0")
    return folder


class TestFolder:
    def test_the_hashes_name_every_file_but_the_card(self, exported):
        lines = [line.split("  ") for line in (exported / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]
        files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
        assert {name for _, name in lines} == files - {"README.md", "SHA256SUMS"}
        for digest, name in lines:
            assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
        assert not list(exported.parent.glob("*.part"))

    def test_it_holds_exactly_the_modules_that_the_pipelines_import(self, exported):
        names = {path.name for path in exported.glob("*.py")}
        imported = set()
        for path in exported.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level:
                    imported.add(f"{node.module}.py")
        assert names == imported | {"pipeline.py"} and len(names) > 15

    def test_the_code_imports_nothing_but_what_diffusers_brings(self, exported):
        allowed = {"torch", "diffusers", "transformers", "numpy", "PIL", *sys.stdlib_module_names}
        for path in exported.glob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            optional = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                else:
                    found = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                outside = {name.split(".")[0] for name in found} - allowed
                assert not outside or (outside <= {"ftfy", "peft"} and node in optional), path.name

    def test_the_card_has_licence_ways_to_load_and_samples(self, exported):
        card = (exported / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: diffusers\n")
        assert 'custom_pipeline="pipeline", trust_remote_code=True' in card and 'revision="COMMIT"' in card
        for seed, prompt in enumerate(PROMPTS):
            assert f"| ![{prompt}](samples/{seed}.png) | {prompt} | {seed} |" in card
            assert Image.open(exported / f"samples/{seed}.png").size == (64, 64)

    def test_the_installed_package_loads_it_without_arguments(self, exported):
        from diffusers import DiffusionPipeline

        assert type(DiffusionPipeline.from_pretrained(exported)) is PTDiTPipeline
        index = json.loads((exported / "model_index.json").read_text(encoding="utf-8"))
        assert index["_class_name"] == "PTDiTPipeline" and index["vae"][0] == "diffusers"

    def test_links_that_lead_out_of_the_folder_become_text(self, tmp_path):
        (tmp_path / "config.json").touch()
        text = "[a](../../docs/a.md#b), ![c](none.png), [d](config.json), [e](https://e.org/x), [f](#f), `g` (h)"
        assert without_dead_links(text, tmp_path) == text.replace("[a](../../docs/a.md#b), ![c](none.png)", "a, c")
        for card in embedded_model_path("shapes-128").parent.glob("*/README.md"):
            assert "](../" not in without_dead_links(card.read_text(encoding="utf-8"), card.parent), card

    @pytest.mark.slow
    def test_the_embedded_models_own_card_and_licence_are_kept(self, tmp_path, capsys):
        assert main(["export", "--output", str(tmp_path / "out"), "--prompt", "a red circle"]) == 0
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlicense: apache-2.0") and "# shapes-128" in card and "## Use" in card
        assert "saved" in capsys.readouterr().out


class TestRefusals:
    def test_weights_that_may_hold_code_are_refused_and_nothing_is_left(self, tiny_model_folder, tmp_path):
        PTDiTPipeline.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "in", safe_serialization=False)
        with pytest.raises(ExportError, match=r"diffusion_pytorch_model.bin may hold code"):
            export(tmp_path / "in", tmp_path / "out")
        assert os.listdir(tmp_path) == ["in"]

    def test_an_existing_folder_is_kept_unless_it_was_exported_and_may_be_replaced(self, tiny_model_folder, tmp_path):
        (tmp_path / "mine").mkdir()
        with pytest.raises(ExportError, match="not an exported folder"):
            export(tiny_model_folder, tmp_path / "mine", overwrite=True)
        export(tiny_model_folder, tmp_path / "out")
        with pytest.raises(ExportError, match="--overwrite"):
            export(tiny_model_folder, tmp_path / "out")
        assert "README.md" in export(tiny_model_folder, tmp_path / "out", overwrite=True)
        (tmp_path / "out" / "notes.txt").write_text("x")
        with pytest.raises(ExportError, match=r"holds notes\.txt"):
            export(tiny_model_folder, tmp_path / "out", overwrite=True)

    def test_stray_files_and_what_links_point_to_are_not_exported(self, tiny_model_folder, tmp_path):
        shutil.copytree(tiny_model_folder, tmp_path / "in")
        (tmp_path / "token").write_text("SECRET")
        (tmp_path / "in" / "tokenizer" / "notes.txt").symlink_to(tmp_path / "token")
        (tmp_path / "in" / "private.json").write_text("{}")
        names = export(tmp_path / "in", tmp_path / "out")
        assert "private.json" not in names and "tokenizer/notes.txt" not in names
        for name in ("README.md", "tokenizer/tokenizer_config.json"):
            (tmp_path / "in" / name).unlink(missing_ok=True)
            (tmp_path / "in" / name).symlink_to(tmp_path / "token")
            with pytest.raises(ExportError, match="link to a file outside"):
                export(tmp_path / "in", tmp_path / "again")
            (tmp_path / "in" / name).unlink()

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--branch", "x"], "--branch needs --push"),
            (["--pull-request"], "--pull-request needs --push"),
            (["--push", "a/b", "--branch", "x", "--pull-request"], "exclude each other"),
            (["--model", "no/such\\folder"], "is not a folder"),
        ],
    )
    def test_bad_options_are_one_line_and_write_nothing(self, tmp_path, capsys, options, message):
        assert main(["export", "--output", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err and not os.listdir(tmp_path)


WITHOUT_US = """
import sys
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "ptdit_diffusers" else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
"""
STRANGER = """
import torch
from diffusers import AutoPipelineForInpainting, DiffusionPipeline, ModularPipeline

def refused(load, *arguments, **named):
    try:
        load(*arguments, **named)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit("code was run without trust")

def draw(pipe, *arguments, **named):
    pipe.set_progress_bar_config(disable=True)
    return pipe(*arguments, generator=torch.manual_seed(0), num_inference_steps=2, output_type="latent", **named)

trusted = {"custom_pipeline": "pipeline", "trust_remote_code": True}
"""
FROM_A_FOLDER = """
refused(DiffusionPipeline.from_pretrained, FOLDER, custom_pipeline="pipeline")
refused(ModularPipeline.from_pretrained, FOLDER)
pipe = DiffusionPipeline.from_pretrained(FOLDER, **trusted)
assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe).__module__
first = draw(pipe, "a red star").images
torch.save(first, "first.pt")
assert type(AutoPipelineForInpainting.from_pipe(pipe)).__name__ == "PTDiTInpaintPipeline"
pipe.save_pretrained("again")
again = DiffusionPipeline.from_pretrained("again", **trusted)
assert torch.equal(draw(again, "a red star").images, first)
modular = ModularPipeline.from_pretrained("again", trust_remote_code=True)
assert type(modular).__module__.startswith("diffusers_modules."), type(modular).__module__
modular.load_components()
assert torch.allclose(draw(modular, prompt="a red star", output="images"), first, atol=2e-5)
assert "ptdit_diffusers" not in sys.modules
"""
FROM_THE_HUB = """
refused(DiffusionPipeline.from_pretrained, "someone/tiny", custom_pipeline="pipeline")
refused(ModularPipeline.from_pretrained, "someone/tiny")
pipe = DiffusionPipeline.from_pretrained("someone/tiny", revision=COMMIT, **trusted)
assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe).__module__
first = draw(pipe, "a red star").images
torch.save(first, "first.pt")
named = DiffusionPipeline.from_pretrained("someone/tiny", custom_pipeline="someone/tiny", trust_remote_code=True)
assert torch.equal(draw(named, "a red star").images, first)
modular = ModularPipeline.from_pretrained("someone/tiny", trust_remote_code=True)
modular.load_components()
assert torch.allclose(draw(modular, prompt="a red star", output="images"), first, atol=2e-5)
assert "ptdit_diffusers" not in sys.modules
"""
WITH_US = """
import ptdit_diffusers
import torch
from diffusers import AutoModel, AutoPipelineForText2Image, DiffusionPipeline, ModularPipeline
for loader in (DiffusionPipeline, AutoPipelineForText2Image, ptdit_diffusers.PTDiTPipeline):
    pipe = loader.from_pretrained("someone/tiny")
    assert type(pipe) is ptdit_diffusers.PTDiTPipeline
    assert type(pipe.transformer) is ptdit_diffusers.PTDiTTransformer3DModel
model = AutoModel.from_pretrained("someone/tiny", subfolder="transformer")
assert type(model) is ptdit_diffusers.PTDiTTransformer3DModel
modular = ModularPipeline.from_pretrained("someone/tiny", trust_remote_code=True)
assert type(modular) is ptdit_diffusers.PTDiTModularPipeline
pipe.set_progress_bar_config(disable=True)
arguments = {"num_inference_steps": 2, "output_type": "latent"}
torch.save(pipe("a red star", generator=torch.manual_seed(0), **arguments).images, "first.pt")
"""


def run_python(code: str, folder: Path, **environment: str) -> Tensor:
    """Run code in a fresh process with caches of its own and give back the latents that it leaves."""
    caches = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
    done = run(["-c", code], folder, real=True, **caches, **environment)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "first.pt", weights_only=True)


@pytest.fixture(scope="module")
def expected(exported) -> Tensor:
    pipe = PTDiTPipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red star", generator=torch.manual_seed(0), **CALL).images


@pytest.mark.slow
def test_a_folder_loads_runs_and_is_saved_again_where_this_package_is_missing(exported, tmp_path, expected):
    code = f"{WITHOUT_US}\nFOLDER = {str(exported)!r}\n{STRANGER}{FROM_A_FOLDER}"
    assert torch.equal(run_python(code, tmp_path), expected)
    for ending in ("*.py", "*.json"):
        saved = {path.name for path in (tmp_path / "again").glob(ending)}
        assert saved == {path.name for path in exported.glob(ending)}


@pytest.fixture
def repository(exported, tmp_path):
    """A Hub on this machine that has the exported folder as someone/tiny."""
    shutil.copytree(exported, tmp_path / "repositories" / "someone" / "tiny")
    with hub_server(tmp_path / "repositories") as server:
        yield server


def load_from(server, code: str, folder: Path) -> Tensor:
    """What code leaves that takes this server for the Hub."""
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return run_python(code, folder, HF_ENDPOINT=server.url, **settings)


@pytest.mark.slow
def test_a_hub_id_loads_where_this_package_is_missing(repository, tmp_path, expected):
    code = f"{WITHOUT_US}\nCOMMIT = {COMMIT!r}\n{STRANGER}{FROM_THE_HUB}"
    assert torch.equal(load_from(repository, code, tmp_path), expected)
    asked = Counter(name for _, name, _ in repository.asked if name.endswith(".py"))
    assert (
        "ptdit_windows.py" in asked and max(asked.values()) < 10
    )  # three loads; diffusers could ask hundreds of times


@pytest.mark.slow
def test_a_hub_id_loads_without_arguments_where_this_package_is_installed(repository, tmp_path, expected):
    assert torch.equal(load_from(repository, WITH_US, tmp_path), expected)


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine that huggingface_hub takes for the real one."""
    from huggingface_hub import constants, hf_api, lfs

    server = load_server()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module in (constants, hf_api, lfs):
        if hasattr(module, "ENDPOINT"):
            monkeypatch.setattr(module, "ENDPOINT", server.endpoint)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestPush:
    def test_the_folder_arrives_whole_and_its_card_names_repository_and_commit(self, exported, hub):
        from ptdit_diffusers.export.push import push

        address = push(exported, "someone/tiny")
        commit = address.rpartition("/")[2]
        arrived, sent = hub.repos["someone/tiny"]["main"], files_of(exported)
        card = arrived.pop("README.md").decode()
        del sent["README.md"]
        assert arrived == sent
        assert f'"someone/tiny", revision="{commit}"' in card and "OWNER/NAME" not in card

    def test_it_goes_to_a_branch_or_a_pull_request_when_asked(self, exported, hub):
        from ptdit_diffusers.export.push import push

        push(exported, "someone/tiny", branch="v2")
        assert set(hub.repos["someone/tiny"]["v2"]) == set(files_of(exported))
        assert hub.repos["someone/tiny"]["main"] == {}
        assert push(exported, "someone/tiny", pull_request=True).endswith("/discussions/1")
        assert set(hub.repos["someone/tiny"]["refs/pr/1"]) == set(files_of(exported))
        assert hub.repos["someone/tiny"]["main"] == {}

    def test_large_files_are_not_sent_twice_after_an_upload_that_broke_off(self, exported, hub):
        from ptdit_diffusers.export.push import push

        hub.commits_to_refuse = 1
        with pytest.raises(Exception, match="not now"):
            push(exported, "someone/tiny")
        once = list(hub.sent)
        assert once and hub.repos["someone/tiny"]["main"] == {}
        push(exported, "someone/tiny")
        assert hub.sent == once and set(hub.repos["someone/tiny"]["main"]) == set(files_of(exported))

    def test_nothing_is_sent_without_the_flag_and_a_refused_upload_is_one_line(
        self, tiny_model_folder, tmp_path, hub, capsys
    ):
        command = ["export", "--model", str(tiny_model_folder), "--output", str(tmp_path / "out")]
        assert main(command) == 0 and hub.requests == []
        hub.commits_to_refuse = 9
        assert main([*command, "--overwrite", "--push", "someone/tiny"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]  # after the loading bars of huggingface_hub
        assert error.startswith("ptdit: the upload to someone/tiny failed") and "is kept" in error
        assert (tmp_path / "out" / "README.md").is_file()


def test_the_code_is_the_same_each_time(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert write_code(tmp_path / "one") == write_code(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
