"""A small trained-looking model and a folder of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_pictures import make_pictures
from small_models import micro_model

from dove_fast.jobs import LoadedModel


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    model = micro_model()
    return LoadedModel(model, model.fingerprint())


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_pictures(tmp_path / "photos")
