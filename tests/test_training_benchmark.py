"The benchmark of whole training loops, from end to end at a test's sizes."
import importlib.util, json, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest, torch

from libmoe_nb.data import text
from libmoe_nb.moe import config
from libmoe_nb.moe.fused import _built
from made_text import fill

SCRIPT = Path(__file__).resolve().parents[1]/'benchmarks'/'training.py'

@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    "The script as a module, with a small text and a small preset"
    spec = importlib.util.spec_from_file_location('training_benchmark', SCRIPT)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    data = text.text_data(fill(tmp_path/'texts', docs=12), vocab_size=300, sequence_length=32,
                          cache_dir=tmp_path/'cache')
    monkeypatch.setattr(text, 'text_data', lambda *args, **kwargs: data)
    small = replace(config.get_preset('tiny'), hidden_size=16, head_dim=8, vocab_size=300, sequence_length=32)
    monkeypatch.setattr(module, 'get_preset', lambda name: small)
    threads = torch.get_num_threads()
    yield module, data, small
    torch.set_num_threads(threads)

@pytest.mark.filterwarnings('ignore')
def test_rows_of_every_way(benchmark, tmp_path, monkeypatch, capsys):
    module, data, small = benchmark
    out = tmp_path/'training.json'
    monkeypatch.setattr(sys, 'argv', ['training.py', '--recipes', 'smoe,dense', '--steps', '2', '--rounds', '2',
                                      '--batch-size', '2', '--no-memory', '--json', str(out)])
    module.main()
    found = json.loads(out.read_text())
    about, rows = found['about'], found['rows']
    assert [(r['recipe'], r['way']) for r in rows] == [
        *(('smoe', w) for w in ('plain', 'ours', 'Trainer', 'dense', *(('fused',) if _built() else ()))),
        *(('dense', w) for w in ('plain', 'ours', 'Trainer'))]
    for r in rows:
        assert r['megabytes'] is None and 0 < r['low'] <= r['ratio'] <= r['high'] and r['tokens_per_second'] > 0, r
        assert r['milliseconds'] > 0 and (r['way'] != 'plain' or r['ratio'] == r['high'] == 1), r
    assert (about['batch_size'], about['steps'], about['rounds'], about['clock']) == (2, 2, 2, 'processor')
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows) + 1

@pytest.mark.filterwarnings('ignore')
def test_memory_is_the_peak_above_what_was_held(benchmark, monkeypatch):
    module, data, small = benchmark
    kilobytes, told = iter((1000, 5096)), []
    monkeypatch.setattr(module, 'peak', lambda: next(kilobytes))
    module.held('ours', 'smoe', small, data, 2, 1, SimpleNamespace(put=told.append))
    assert told == [4.0]
