"What a log of `.ci/run` says of the README's commands."
import json, runpy, sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1]/'benchmarks'/'commands.py'
LOG = ('== [1 s] First\nx\n== [30 s] Second: tests\n12 passed, 1 skipped in 3s\n3 passed in 1s\n'
       '== [90 s] Third\n== [100 s] All good\n 3 passed in 1s\n 12 passed\n')

def run(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name='__main__')

def test_steps_last_until_the_next(tmp_path, monkeypatch):
    (tmp_path/'log').write_text(LOG)
    run(monkeypatch, tmp_path/'log', '--json', tmp_path/'out.json')
    res = json.loads((tmp_path/'out.json').read_text())
    assert [(r['step'], r['seconds']) for r in res['rows']] == [('First', 29), ('Second: tests', 60), ('Third', 10)]
    assert res['about']['tests'] == 15 and res['about']['seconds'] == 99

def test_a_run_that_failed_is_no_measurement(tmp_path, monkeypatch):
    (tmp_path/'log').write_text(LOG.replace('All good', 'Fourth'))
    with pytest.raises(SystemExit): run(monkeypatch, tmp_path/'log')
