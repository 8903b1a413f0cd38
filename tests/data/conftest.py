"""The embedded base's tokenizer, loaded once."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from dylora_mlx import assets


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(assets.BASE)
