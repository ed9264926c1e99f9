"""The text that the demo is trained on."""
import ast

import numpy as np
import pytest

from tools.demo_training.corpus import documents, sources, top_level_pieces


def test_a_module_is_cut_around_its_top_level_definitions_and_keeps_every_line():
    text = "import os\nX = 1\n\n@cache\ndef f():\n    pass\n\n\nclass A:\n    def g(self):\n        pass\nY = 2\n"
    pieces = top_level_pieces(text, ast.parse(text))
    assert pieces == ["import os\nX = 1\n", "@cache\ndef f():\n    pass\n", "class A:\n    def g(self):\n        pass\n", "Y = 2\n"]


@pytest.mark.slow
def test_about_a_tenth_of_the_files_is_held_out_and_no_file_is_in_both_splits():
    held_out, trained = ({path for path, _, _ in sources(is_held_out=is_held_out)} for is_held_out in (True, False))
    assert not held_out & trained
    assert 0.05 < len(held_out) / len(held_out | trained) < 0.15


def test_documents_are_not_empty_and_end_with_a_line():
    lengths = np.array([len(text.strip()) for text in documents(is_held_out=True)])
    assert lengths.min() > 0
    assert all(text.endswith("\n") and not text.endswith("\n\n") for text in documents(is_held_out=True))
