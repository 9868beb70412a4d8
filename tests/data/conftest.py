"""A small data set on disk that the tests of the input pipeline share."""

from __future__ import annotations

import pytest
from data_images import draw, jpeg


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A class-folder tree: cat, dog, 20 JPEG files each."""
    root = tmp_path_factory.mktemp("tree")
    for k, name in enumerate(("cat", "dog")):
        (root / name).mkdir()
        for i in range(20):
            (root / name / f"{i:02d}.jpg").write_bytes(jpeg(draw(20 * k + i)))
    return root
