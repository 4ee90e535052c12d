"What several test files use."
import os
import pytest

# two workers run side by side (pyproject.toml): with a thread each, or the threads of one would wait for those of the
# other
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')

# the files that take longest: begun first, so that no worker waits long for the other one at the end
LONG = [f'test_{n}.py' for n in (
    'causal', 'upcycling', 'steps', 'parity', 'gpu_benchmark', 'stages', 'smollm2', 'dependencies', 'jupyter', 'vision',
    'upcycle_command', 'cli', 'old_folders', 'vision_commands', 'checkpoints', 'compare_evaluate', 'harness',
    'settings', 'wrapping', 'adapters', 'packing', 'compare_jobs')]

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))

def write_texts(folder):
    "A user's folder: two subfolders of .txt files"
    for d in ('tales', 'notes'):
        (folder/d).mkdir(parents=True)
        for i in range(12):
            words = ' '.join(f'{w}{(i * j) % 7}' for j in range(60)
                             for w in ('the', d, 'of', 'house', 'river', 'stone'))
            (folder/d/f'{i}.txt').write_text(f'{d} number {i}.\n{words}\n' * 2)
    return folder

@pytest.fixture
def at_once(monkeypatch):
    "Workers of `side_by_side` and `together` start at once"
    from libmoe_nb.experiments import jobs
    from processes import Piped
    def start(threads, more):
        return Piped('from libmoe_nb.experiments.jobs import work; work()',
                     env=dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), **more))
    monkeypatch.setattr(jobs, '_start_process', start)

@pytest.fixture
def drawn(): "Figures of pages are drawn here, though the other tests of a file leave that out"

@pytest.fixture
def undrawn(request, monkeypatch):
    "Figures of pages are made and not drawn, which takes longest of all: for tests that are about something else"
    if 'drawn' in request.fixturenames: return
    from libmoe_nb.plots import style
    monkeypatch.setattr(style, 'figure_uri', lambda fig: style.close_figure(fig) and 'data:image/svg+xml;base64,')

@pytest.fixture(scope='module')
def texts(tmp_path_factory): return write_texts(tmp_path_factory.mktemp('texts'))
