"""Tests of comfyui_nodes/labels.py: text stands beside the sheet, which stays as it is."""

import torch

from comfyui_nodes.labels import STRIP, labeled


def test_the_sheet_stays_and_each_row_and_panel_has_a_label():
    sheet = torch.randint(0, 256, (2 * 192 + 6, 4 * 192 + 18, 3)) / 255
    named = labeled(sheet, blocks=[0, 11], level=0.5, gap=6)
    assert named.shape == (sheet.shape[0] + 2 * STRIP, sheet.shape[1] + STRIP, 3)
    torch.testing.assert_close(named[2 * STRIP :, STRIP:], sheet, atol=1e-6, rtol=0)
    above, left = named[STRIP : 2 * STRIP, STRIP:], named[2 * STRIP :, :STRIP]
    assert all(above[:, 198 * panel : 198 * panel + 190].min() < 0.5 for panel in range(4))
    assert all(left[198 * row : 198 * row + 20].min() < 0.5 for row in range(2))
    assert not torch.equal(labeled(sheet, [0, 11], 0.25, 6)[:STRIP], named[:STRIP])
