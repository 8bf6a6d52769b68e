"""Every Python block of the docs and every example of the pipelines' docstrings runs against the embedded model."""

import doctest
import re
from pathlib import Path

import pytest

import ptdit_diffusers

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text(encoding="utf-8")]
PIPELINES = ("PTDiTPipeline", "PTDiTImg2ImgPipeline", "PTDiTInpaintPipeline")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), names)  # noqa: S102 (our own pages)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_example_of_a_docstring_runs(name):
    call = getattr(ptdit_diffusers, name).__call__
    finder = doctest.DocTestFinder()
    (test,) = [test for test in finder.find(call, name, globs={}) if test.examples]
    for example in test.examples:  # fewer steps than a user would take
        example.source = example.source.replace("generator=", "num_inference_steps=3, generator=")
    runner = doctest.DocTestRunner()
    assert runner.run(test).failed == 0 and len(test.examples) >= 4


def test_each_public_class_and_picture_of_the_docs_exists():
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    assert not [
        name for name in ptdit_diffusers.__all__ if name[0].isupper() and name not in text + "PTDiTPipelineOutput"
    ]
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", page.read_text(encoding="utf-8")):
            file, _, heading = target.partition("#")
            assert (DOCS / file).exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", (DOCS / file).read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


def test_the_tests_that_a_page_names_exist():
    written = "".join(path.read_text(encoding="utf-8") for path in DOCS.with_name("tests").rglob("test_*.py"))
    for page in DOCS.glob("*.md"):
        for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
            assert f"def {name}(" in written, f"{page.name} names {name}"
