"The script for a GPU, from end to end at a test's sizes on the CPU."
import json, os, runpy, subprocess, sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from typer.testing import CliRunner

from libmoe_nb.cli import app
from libmoe_nb.training.stages import vision_presets

ROOT = Path(__file__).resolve().parents[1]

PARTS = 'checks', 'kernels', 'vision', 'precision', 'train'

@pytest.fixture
def at_once(monkeypatch):
    "What the script would begin in a process of its own runs in this one; the commands so far"
    seen, preset = [], vision_presets['tiny-vlm']
    few = tuple(replace(s, steps=2, warmup_steps=1, batch_size=4) for s in preset.stages)
    monkeypatch.setitem(vision_presets, 'tiny-vlm', replace(preset, stages=few, scenes=16, test_scenes=6))
    def run(call, env, **kw):
        assert call[:2] == [sys.executable, '-c'] and 'libmoe_nb.cli import main' in call[2]
        seen.append(call[3:])
        with monkeypatch.context() as m:
            m.setenv('XDG_CACHE_HOME', str(env['XDG_CACHE_HOME']))
            res = CliRunner().invoke(app, call[3:])
        return CompletedProcess(call, res.exit_code, res.stdout, res.stderr)
    monkeypatch.setattr(subprocess, 'run', run)
    return seen

@pytest.mark.long
@pytest.mark.filterwarnings('ignore')
@pytest.mark.usefixtures('undrawn')
def test_gpu_script_runs_without_one(tmp_path, monkeypatch, request, capsys):
    out = tmp_path/'gpu.json'
    args = ['--device', 'cpu', '--tiny', '--seconds', '.2', '--rounds', '2', '--recipes', 'smoe', 'tcmoe',
            '--compile', '--vision', 'xmoe', '--cache', str(tmp_path), '--json', str(out)]
    script, *args = subprocess.run(['bash', ROOT/'benchmarks/gpu.sh', *args], capture_output=True,
                                   text=True, check=True,
                                   env=dict(os.environ, PYTHON='echo')).stdout.split()
    commands = request.getfixturevalue('at_once')
    monkeypatch.setattr(sys, 'argv', [script, *args])
    with pytest.raises(SystemExit) as ended: runpy.run_path(str(ROOT/script), run_name='__main__')
    assert ended.value.code == 0, capsys.readouterr().out[-3000:]
    assert [c[:2] for c in commands] == [['compare', '--preset'], ['vlm', 'compare']]
    found = json.loads(out.read_text())
    rows = found['rows']
    assert found['machine']['device'] == 'cpu' and {r['part'] for r in rows} == set(PARTS)
    assert ({r['recipe'] for r in rows if r['part'] == 'train'} == {'smoe', 'tcmoe'}
            and all(r['tokens_per_second'] > 0 and 0 <= r['masked_steps'] <= r['steps'] for r in rows
                    if r['part'] == 'train'))
    seen, command = [r for r in rows if r['part'] == 'vision']
    assert seen['ok'] and seen['same_gradients'] and seen['error'] < 1e-6 and command['ok']
    half = [r for r in rows if r['part'] == 'precision']
    assert len(half) == 4 and all(r['ok'] and 0 < r['loss_gap'] < .1 for r in half)
    errors = [r['error'] for r in rows if r['part'] == 'checks' and 'error' in r]
    assert len(errors) > 50 and max(errors) > 0
    assert any(r['recipe'] == 'libmoe compare' for r in rows if r['part'] == 'checks')
