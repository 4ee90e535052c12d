"""Runs that are killed at random points, go on, and must end with the bits of a run that nobody killed.

python benchmarks/soak.py [--kills 200] [--steps 30] [--jobs 1 | --launch 2] [--seed 0] --json benchmarks/soak.json

A tiny `libmoe compare` of two recipes saves its state after every step (`checkpoint_seconds=0`), so that about half of
the time of a run is spent saving. Its process, with `--jobs 2` also those that it started, gets SIGKILL a moment
after a random step, and the same command goes on, until it has been killed `--kills` times; a folder that is finished
in between is compared and a new one begun. Compared are all weights and the curves of training and validation with
those of a run without a kill, bit for bit. With `--launch 2` two processes train each recipe together, as
`libmoe train --launch 2` has them do it, and both get SIGKILL at once. One entry a folder: kills, those that met a
save, the step of each kill, and what differed."""
import argparse, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
from conftest import write_texts                                     # noqa: E402

CHILD = '''
import sys, warnings
warnings.filterwarnings('ignore')
from functools import partial
from libmoe_nb.experiments import compare as module
module.RunOptions = partial(module.RunOptions, checkpoint_seconds=0)
out, data, cache, steps, jobs = sys.argv[1:]
tell = lambda *a, **k: print(*a[:2], k.get('step', ''), flush=True)
size = dict(cache_dir=cache, steps=int(steps), batch_size=4, sequence_length=32, hidden_size=32, head_dim=16,
            vocab_size=300, valid_tokens=512, traces=512, threads=1, device='cpu')
if jobs == 'ranks':
    rank = int(__import__('os').environ['RANK'])
    for r in ('smoe', 'xmoe'): module.train(r, data, 'tiny', f'{out}/{r}', progress=None if rank else tell, **size)
else: module.compare('smoe,xmoe', data, 'tiny', out=out, jobs=int(jobs), progress=tell, **size)
'''
# the processes of one training, in one group, so that one signal ends all
RANKS = '''
import os, socket, subprocess, sys
n, code, *args = sys.argv[1:]
with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
env = lambda r: dict(os.environ, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=n, LOCAL_WORLD_SIZE=n,
                     MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
ranks = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, *args], env=env(r)) for r in range(int(n))]
sys.exit(max(abs(p.wait()) for p in ranks))
'''


def begin(out, box, a):
    code = ['-c', RANKS, str(a.launch), CHILD] if a.launch > 1 else ['-c', CHILD]
    return subprocess.Popen([sys.executable, '-W', 'ignore', *code, str(out), str(box/'texts'), str(box/'cache'),
                             str(a.steps), 'ranks' if a.launch > 1 else str(a.jobs)],
                            stdout=open(box/'told.txt', 'w'), stderr=open(box/'err.txt', 'w'), start_new_session=True)


def end(p, box):
    if p.wait(): sys.exit(f'the command ended with {p.returncode}: {(box/"err.txt").read_text()[-2000:]}')


def wait_for_steps(p, box, steps, more):
    "Until so many steps of training were told since this start, and `more` seconds on"
    while p.poll() is None and (box/'told.txt').read_text().count('step ') < steps: time.sleep(.005)
    time.sleep(more)


def kill(p):
    "SIGKILL for the process and all that it started; False if it was done before"
    if p.poll() is not None: return False
    try: os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError: return False
    return p.wait() == -signal.SIGKILL


def held(out):
    "Name of a run -> its weights, curve and result, without what a clock says"
    from safetensors.numpy import load_file
    from libmoe_nb.training.log import read_log, run_log_path
    res = {}
    for f in sorted(p.parent for p in out.glob('*/result.json')):
        log = [{k: v for k, v in r.items() if k not in ('seconds', 'tokens_per_second')}
               for r in read_log(run_log_path(f)).to_dict('records')]
        result = json.loads((f/'result.json').read_text())
        traces = {p.name: p.read_bytes() for p in sorted((f/'traces').glob('*.safetensors'))}
        res[f.name] = dict(weights={n: w.tobytes() for n, w in load_file(f/'model'/'model.safetensors').items()},
                           log=[json.dumps(r, sort_keys=True) for r in log], traces=traces,
                           perplexity=result['perplexity'], domains=result['domains'])
    return res


def differences(a, b):
    return [f'{n}: {k}' for n in sorted({*a, *b}) for k in ('weights', 'log', 'traces', 'perplexity', 'domains')
            if a.get(n, {}).get(k) != b.get(n, {}).get(k)]


def keep(rows, a):
    "Write down the folders so far, beside those of runs of another kind or seed"
    kind, path = (a.jobs, a.launch, a.seed), Path(a.json)
    old = json.loads(path.read_text()) if path.exists() else []
    rows = [r for r in old if (r['jobs'], r.get('launch', 1), r['seed']) != kind] + rows
    path.with_suffix('.part').write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    path.with_suffix('.part').replace(path)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--kills', type=int, default=20); p.add_argument('--steps', type=int, default=30)
    p.add_argument('--jobs', type=int, default=1); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--launch', type=int, default=1, help='processes that train each recipe together')
    p.add_argument('--json')
    a = p.parse_args()
    if a.jobs > 1 and a.launch > 1: p.error('--jobs or --launch, not both')
    rng, rows, kills = random.Random(a.seed), [], 0
    with tempfile.TemporaryDirectory(prefix='soak-') as box:
        box = Path(box)
        write_texts(box/'texts')
        end(begin(box/'whole', box, a), box)                          # prepares the text, too
        start = time.monotonic(); shutil.rmtree(box/'whole')
        end(begin(box/'whole', box, a), box)
        seconds, whole = time.monotonic() - start, held(box/'whole')
        print(f'{len(whole)} runs of {a.steps} steps, {a.jobs} at once in {a.launch} processes each, without a kill: '
              f'{seconds:.1f} s', flush=True)
        while kills < a.kills:
            out = box/f'killed-{len(rows)}'
            row = dict(jobs=a.jobs, launch=a.launch, steps=a.steps, seed=a.seed, kills=0, in_a_save=0, at=[])
            while True:
                proc = begin(out, box, a)
                if kills < a.kills:
                    wait_for_steps(proc, box, rng.randrange(1, a.steps), rng.uniform(0, .1))
                    if kill(proc):
                        kills += 1; row['kills'] += 1
                        row['in_a_save'] += bool([*out.glob('*/checkpoints/.tmp-*'), *out.glob('*/checkpoints/.trash')])
                        row['at'].append(' '.join((box/'told.txt').read_text().splitlines()[-1:]))
                        continue
                end(proc, box)
                break
            row['differences'] = differences(whole, held(out))
            left = [p.name for p in out.glob('*/checkpoints')] + [p.name for p in out.rglob('.*.tmp')]
            row['left_over'] = sorted(set(left))
            rows.append(row)
            if a.json: keep(rows, a)
            print(f"folder {len(rows)}: {row['kills']} kills, {row['in_a_save']} in a save; different: "
                  f"{', '.join(row['differences']) or 'nothing'}; left over: "
                  f"{', '.join(row['left_over']) or 'nothing'}",
                  flush=True)
    print(f'{kills} kills, {sum(r["in_a_save"] for r in rows)} of them in a save, {len(rows)} folders, '
          f'{sum(bool(r["differences"]) for r in rows)} that differ')


if __name__ == '__main__': main()
