"""The embedded base's tokenizer, loaded once."""

from __future__ import annotations

import pytest

from dylora_mlx import assets
from dylora_mlx.model.base.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(assets.BASE)
