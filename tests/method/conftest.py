import jax
import pytest
from toy_with_head import TOY

from layermatch_jax.method import policies


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def toy(monkeypatch):
    """Registers the policy `toy`, so that a config can name it."""
    monkeypatch.setitem(policies.POLICIES, "toy", TOY)
