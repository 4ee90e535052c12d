"One model in several processes: the command is stopped by a batch system, and one process ends what two began."
import json, os, random, signal, sys, threading

import pytest, torch
from safetensors.torch import load_file

from libmoe_nb.cli import main
from libmoe_nb.core.ranks import joined, launched, world_size
from libmoe_nb.experiments.compare import train
from libmoe_nb.experiments.jobs import Task, TasksFailed, together
import job_functions as f
from processes import run_ranks

SMALL = dict(data='python', preset='tiny', steps=24, batch_size=4, sequence_length=64, traces=1024, max_bytes=150_000,
             device='cpu', threads=1, progress=None)

def stopped(out, least, monkeypatch, data='python', *more):
    "The exit code of the command, told by a batch system to end when the log has so many steps"
    args = ['train', 'sharede_v3', '--preset', 'tiny', '--data', str(data), '--out', str(out), '--device', 'cpu',
            '--launch', '2', '--threads', '1', '--steps', '24', '--batch-size', '4', '--sequence-length', '64',
            '--traces', '1024', '--max-bytes', '150000', *more]
    monkeypatch.setattr(sys, 'argv', ['libmoe', *args])
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail('the command does not hear'))
    def ask():
        while steps_of(out) < least and not ended.wait(.02): pass
        if not ended.is_set(): os.kill(os.getpid(), signal.SIGTERM)
    (asking := threading.Thread(target=ask, daemon=True)).start()
    try:
        with pytest.raises(SystemExit) as e: main()
    finally:
        ended.set()
        asking.join()
        signal.signal(signal.SIGTERM, before)
    return e.value.code

def steps_of(out):
    try: return sum('"train"' in l for l in (out/'log.jsonl').read_text().splitlines())
    except OSError: return 0

@pytest.mark.parametrize('interrupted', [(3,), pytest.param((3, 8), marks=pytest.mark.long)])
@pytest.mark.filterwarnings('ignore:going on from')
def test_what_two_processes_began_one_ends(interrupted, tmp_path, at_once, monkeypatch, capsys):
    out = tmp_path/'two'
    for least in interrupted:                       # begun by two, gone on with by two
        code, wrong = stopped(out, least, monkeypatch), capsys.readouterr().err
        assert code == 130 and 'stopping after this step' in wrong and 'Traceback' not in wrong, wrong
        assert [*(out/'checkpoints').glob('step-*')] and not (out/'result.json').exists()
    began = steps_of(out)
    ended_by_one(tmp_path, least <= began < 24, SMALL)

def ended_by_one(folder, began, settings):
    "What is in `two` is ended by this process, and equals what it does alone"
    ended, whole = (train('sharede_v3', out=folder/n, **settings) for n in ('two', 'one'))
    assert began and steps_of(folder/'two') == steps_of(folder/'one') == settings['steps']
    assert abs(ended['perplexity'] / whole['perplexity'] - 1) < 1e-3 and ended['tokens'] == whole['tokens']
    a, b = (load_file(folder/n/'model'/'model.safetensors') for n in ('two', 'one'))
    assert all(torch.allclose(a[n], b[n], atol=2e-3) for n in b)

@pytest.mark.long
@pytest.mark.filterwarnings('ignore:going on from')
def test_a_stream_that_two_processes_read_is_read_on_by_one(tmp_path, at_once, monkeypatch, capsys):
    (corpus := tmp_path/'corpus').mkdir()
    words = random.Random(0).choices('a few words of a corpus that is read in lanes by each process'.split(), k=30_000)
    for k in range(5):
        mine = words[6000 * k:6000 * k + 6000]
        (corpus/f'{k}.jsonl').write_text('\n'.join(json.dumps(dict(text=' '.join(mine[i:i + 40])))
                                                   for i in range(0, 6000, 40)))
    code = stopped(tmp_path/'two', 4, monkeypatch, corpus, '--stream', '--workers', '1', '--vocab-size', '300')
    wrong, began = capsys.readouterr().err, steps_of(tmp_path/'two')
    assert code == 130 and 'Traceback' not in wrong, wrong
    ended_by_one(tmp_path, 4 <= began < 24, dict(SMALL, data=str(corpus), stream=True, vocab_size=300))

def test_a_batch_that_cannot_be_shared_out_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match='batch_size must be a multiple of the number of processes, 3'):
        train('smoe', out=tmp_path/'x', processes=3, **SMALL)
    assert not (tmp_path/'x'/'config.json').exists()

def test_the_reason_of_a_failure_is_told():
    with pytest.raises(TasksFailed, match='its process was killed'): together(Task('x', f.kill_one_of_two), 2, 1)

def test_one_process_is_no_group(monkeypatch):
    for n in ('RANK', 'WORLD_SIZE'): monkeypatch.delenv(n, raising=False)
    with joined(): assert launched() == (0, 1) and world_size() == 1

MANY = '''
import time, torch
from libmoe_nb.core.ranks import *
for k in range(30):
    with joined():
        assert of_all_ranks((rank(), k)) == [(0, k), (1, k)]
        if rank() == k % 2: time.sleep(.02)                       # they leave one after the other
print('done', world_size())
'''

def test_one_group_after_another_does_not_meet_the_one_before():
    for p in run_ranks(MANY, timeout=100):
        assert (p.returncode, p.stdout.split()) == (0, ['done', '1']), p.stderr[-2000:]
