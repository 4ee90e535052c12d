"The script for a GPU, from end to end at a test's sizes on the CPU."
import json, os, subprocess
from pathlib import Path

from processes import run_forked

ROOT = Path(__file__).resolve().parents[1]

PARTS = 'checks', 'kernels', 'vision', 'precision', 'train'

def test_gpu_script_runs_without_one(tmp_path):
    out = tmp_path/'gpu.json'
    args = ['--device', 'cpu', '--tiny', '--seconds', '.2', '--rounds', '2', '--recipes', 'smoe', 'tcmoe',
            '--compile', '--vision', 'xmoe',
            '--cache', tmp_path, '--json', out]
    script, *args = subprocess.run(['bash', ROOT/'benchmarks/gpu.sh', *args], capture_output=True,
                                   text=True, check=True,
                                   env=dict(os.environ, PYTHON='echo')).stdout.split()
    code = 'import runpy, sys; sys.path.insert(0, "benchmarks"); runpy.run_path(sys.argv.pop(1), run_name="__main__")'
    run = run_forked(code, script, *args, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
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
