"""Rendered rooms, which several tests of MASt3R's training read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dune_fast.heads.mast3r import scenes


@pytest.fixture(scope="session")
def rooms(tmp_path_factory) -> Path:
    """Two scenes with three views; tests do not write into it."""
    folder = tmp_path_factory.mktemp("rooms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_BANK", 3)
        patch.setattr(scenes, "_TEXELS", 64)
        scenes.make_textures.cache_clear()
        scenes.write_scenes(folder, 2, scenes.SceneConfig(size=(56, 42), views=3, samples=1))
        scenes.make_textures.cache_clear()
    return folder
