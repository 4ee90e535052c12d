"Every test of this room has a cache of its own."
import pytest
from made_text import fill

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))

@pytest.fixture
def corpus(tmp_path): return fill(tmp_path/'corpus')
