"""The drawing of DiT's blocks shows what the code computes."""

from pathlib import Path

from scripts.draw_dit_blocks import main, shapes_of

DRAWING = Path(__file__).resolve().parents[2] / "docs" / "dit" / "blocks.svg"


def test_the_shapes_are_those_of_the_network():
    shapes, parameters = shapes_of("cross_attention")
    assert shapes["CROSS_ATTN"] == [(256, 1152), (2, 1152), (256, 1152)] and parameters == 597_991_712
    assert shapes_of("adaln_zero")[0]["ADALN_MODULATION"] == [(1152,), (6 * 1152,)]
    assert shapes_of("in_context")[0]["ATTN"][0] == (258, 1152)


def test_the_drawing_in_the_docs_is_the_present_one(tmp_path):
    assert main(["--output", str(tmp_path / "blocks.svg")]) == 0
    drawn, kept = (path.read_text(encoding="utf-8") for path in (tmp_path / "blocks.svg", DRAWING))
    texts = [[line for line in text.splitlines() if "<text" in line] for text in (drawn, kept)]
    assert texts[0] == texts[1] and any("674,834,720 parameters" in line for line in texts[0])
