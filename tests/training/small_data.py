"A plugin of pytest with what the tests of training share: one thread, and a small text."
import pytest, torch
from libmoe_nb.data.text import text_data

@pytest.fixture(scope='module')
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

@pytest.fixture(scope='module')
def data(cache): return text_data('python', vocab_size=300, sequence_length=32, max_bytes=100_000, cache_dir=cache)
