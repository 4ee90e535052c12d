"What of `core` needs other processes, faults or many cases: ranks, locks, killed writers, modes of odd models."
import json, math, os, random, signal, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings as how, strategies as st
from torch import nn

from processes import ready
from libmoe_nb.core.errors import check, did_you_mean, differences, first_line, shown, tell_differences
from libmoe_nb.core.files import (atomic_path, check_writable, file_digest, jsonable, locked_folder, make_folder,
                                  read_json, write_json)
from libmoe_nb.core.machine import available_cores
from libmoe_nb.core.modes import autocast, evaluating, seeded, unwrap
from libmoe_nb.core.ranks import (all_or_none, is_main, mean_over_ranks, of_all_ranks, rank, sum_over_ranks,
                                  world_size)
from libmoe_nb.core.settings import read_intervention
from libmoe_nb.core.words import format_duration, format_millions, format_number, format_percent, join_some

def python(code, *args, **kw):
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], stdout=subprocess.PIPE,
                            text=True, **kw)

def test_nothing_heavy_is_imported():
    code = ('import sys\nfrom libmoe_nb.core import errors, files, machine, modes, ranks, settings, words\n'
            'print(*[m for m in "torch numpy pandas transformers matplotlib fastai".split() if m in sys.modules])')
    assert python(code).communicate()[0].strip() == ''

# ranks

def in_a_group(n, world, path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}/init', rank=n, world_size=world)
    x = torch.tensor([1., 10.]) * (n + 1)
    got = dict(rank=rank(), world=world_size(), main=is_main(), sum=sum_over_ranks(x).tolist(),
               mean=mean_over_ranks(x).tolist(), x=x.tolist(), counts=sum_over_ranks(torch.tensor([n, 2])).tolist())
    got['said'], got['failed'] = of_all_ranks(f'I am {n}'), []
    for bad in 1, None:
        try:
            with all_or_none():
                if n == bad: raise OSError('no space')
        except (OSError, RuntimeError) as e: got['failed'].append(f'{type(e).__name__}: {e}')
    Path(path, f'{n}.json').write_text(json.dumps(got))
    torch.distributed.destroy_process_group()
    assert (rank(), world_size()) == (0, 1)

def test_two_processes_sum(tmp_path):
    ready()
    torch.multiprocessing.start_processes(in_a_group, (2, str(tmp_path)), nprocs=2, start_method='forkserver')
    a, b = (json.loads((tmp_path/f'{n}.json').read_text()) for n in (0, 1))
    assert (a['rank'], a['world'], a['main'], b['rank'], b['world'], b['main']) == (0, 2, True, 1, 2, False)
    for r in (a, b): assert (r['sum'], r['mean'], r['counts']) == ([3, 30], [1.5, 15], [1, 4])
    assert (a['x'], b['x']) == ([1, 10], [2, 20])             # what was given is left as it is
    for r in (a, b): assert r['said'] == ['I am 0', 'I am 1']
    assert b['failed'] == ['OSError: no space'] and a['failed'] == ['RuntimeError: process 1 failed: OSError: no space']

# files

WRITER = '''
import sys, time
from libmoe_nb.core.files import atomic_path
with atomic_path(sys.argv[1]) as tmp:
    with open(tmp, 'w') as f:
        f.write('half of it'); f.flush()
        print('writing', flush=True); time.sleep(60)
'''

@pytest.mark.parametrize('kill', [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_writer_leaves_the_old_file(kill, tmp_path):
    path = tmp_path/'result.json'
    write_json(path, dict(a=1))
    p = python(WRITER, path)
    assert p.stdout.readline() == 'writing\n'
    p.send_signal(kill); p.wait(20)
    assert read_json(path) == dict(a=1)
    write_json(path, dict(a=2))                               # what the killed one left is in nobody's way
    assert read_json(path) == dict(a=2)

def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path/'a.json'
    write_json(path, [0] * 20_000)
    code = ('import sys\nfrom libmoe_nb.core.files import write_json\nprint("go", flush=True)\n'
            'for i in range(40): write_json(sys.argv[1], [i] * 20_000)')
    p = python(code, path)
    p.stdout.readline()
    seen = 0
    while p.poll() is None or not seen:
        found = read_json(path)
        assert len(found) == 20_000 and len(set(found)) == 1
        seen += 1
    assert read_json(path) == [39] * 20_000 and os.listdir(tmp_path) == ['a.json']

def test_a_failed_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_path(tmp_path/'a') as tmp:
        tmp.write_text('x')
        raise KeyError
    assert os.listdir(tmp_path) == []

OWNER = '''
import sys, time
from pathlib import Path
from libmoe_nb.core.files import locked_folder
with locked_folder(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)
'''

def test_a_folder_that_another_process_holds(tmp_path):
    out = tmp_path/'runs'
    p = python(OWNER, out)
    assert p.stdout.readline() == 'mine\n'
    with pytest.raises(ValueError, match=f'in use by process {p.pid}: wait until it ends'), locked_folder(out): pass
    p.kill(); p.wait(20)
    with locked_folder(out): assert (out/'.owner').read_text() == str(os.getpid())   # the dead hold nothing

@pytest.mark.skipif(os.name != 'posix' or os.getuid() == 0, reason='everything is allowed here')
def test_a_folder_without_permission(tmp_path):
    (tmp_path/'closed').mkdir(mode=0o500)
    with pytest.raises(ValueError, match='permission denied'): check_writable(tmp_path/'closed'/'runs')
    with pytest.raises(ValueError, match='Permission denied'): make_folder(tmp_path/'closed'/'runs')

def test_json_of_everything(tmp_path):
    odd = {1: np.float64(2), 'a': (np.int64(3), torch.tensor(.5), True), 'b': [math.nan, -math.inf], 'c': Path('d')}
    want = {'1': 2., 'a': [3, .5, True], 'b': [None, None], 'c': 'd'}
    assert jsonable(odd) == want
    write_json(tmp_path/'a', odd)
    assert read_json(tmp_path/'a') == want
    with pytest.raises(TypeError): write_json(tmp_path/'a', object())
    assert read_json(tmp_path/'a') == want and os.listdir(tmp_path) == ['a']

def test_a_digest_sees_one_bit(tmp_path):
    a = tmp_path/'a'
    data = bytearray(random.Random(0).randbytes(9_000_000))
    a.write_bytes(data)
    before = file_digest(a)
    data[-1] ^= 1
    a.write_bytes(data)
    assert file_digest(a) != before and len(before) == 32

# modes

class Odd(nn.Module):
    "Parts in every mode, one of them used twice, and one that minds being switched"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Dropout(), nn.BatchNorm1d(2), nn.Linear(2, 2)
        self.again, self.deep = self.c, nn.Sequential(nn.Sequential(nn.Dropout()), nn.Dropout())
        self.b.eval(); self.deep[0][0].eval()

def test_every_module_gets_its_own_mode_back():
    model = Odd()
    before = {n: m.training for n, m in model.named_modules()}
    assert len(set(before.values())) == 2
    with evaluating(model) as device:
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        assert device == torch.device('cpu')
        with evaluating(model.deep): pass                     # within each other
        assert not any(m.training for m in model.modules())
    assert {n: m.training for n, m in model.named_modules()} == before and torch.is_grad_enabled()
    with pytest.raises(KeyError), evaluating(model): raise KeyError
    assert {n: m.training for n, m in model.named_modules()} == before and torch.is_grad_enabled()
    with evaluating(nn.Identity()) as device: assert device.type == 'cpu'       # without a parameter

@pytest.mark.parametrize('everything', [False, True])
def test_a_seed_is_nobody_elses(everything):
    draw = lambda: (torch.rand(1).item(), random.random(), np.random.rand())
    def outside():
        torch.manual_seed(1); random.seed(1); np.random.seed(1)
    outside(); want = draw()
    outside()
    with seeded(7, everything):
        a = torch.rand(3)
        with seeded(7, everything): assert torch.equal(torch.rand(3), a)        # within each other
        b = torch.rand(3)
    assert draw() == want
    with seeded(7, everything): assert torch.equal(torch.rand(3), a) and torch.equal(torch.rand(3), b)
    outside()
    with pytest.raises(KeyError), seeded(8, everything): torch.rand(5); raise KeyError
    assert draw() == want
    outside()
    with seeded(None, everything): torch.rand(1)
    assert torch.rand(1).item() != want[0]                    # without a seed nothing is put back

def test_large_seeds():
    for seed in (0, 2**32, 2**63 - 1):
        with seeded(seed, everything=True): a = np.random.rand()
        with seeded(seed, everything=True): assert np.random.rand() == a

def test_unwrapping_and_autocast():
    model = nn.Linear(2, 2)
    assert unwrap(model) is model
    with autocast(torch.device('cpu'), True):
        with autocast(torch.device('cpu'), False): assert model(torch.ones(1, 2)).dtype == torch.float32
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16

# words and errors

class Broken:
    "Cannot be shown"
    def __repr__(self): raise MemoryError

@how(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.binary(), st.floats(), st.lists(st.text()), st.just(Broken())), st.integers(4, 100))
def test_whatever_is_shown_is_one_short_line(value, most):
    s = shown(value, most)
    assert len(s) <= most or type(value) is Broken
    assert len(s.splitlines()) <= 1 or not s.isprintable()
    with pytest.raises(ValueError, match='^name must be another, got '): check(False, 'name', value, 'another')

@given(st.one_of(st.none(), st.floats(-1e100, 1e100), st.sampled_from([math.inf, -math.inf, math.nan]),
                 st.integers(-10**15, 10**15)))
def test_any_number_has_a_format(v):
    known = v is not None and math.isfinite(v)
    said = [format_number(v), format_millions(v), format_percent(v), format_duration(v)]
    assert all((s != '–') == known for s in said) and not any('nan' in s or 'inf' in s for s in said)
    if known and abs(v) <= 1e15: assert max(map(len, said)) < 30

def test_names_and_differences():
    assert did_you_mean('recipe', 3, ['smoe']) == "unknown recipe '3': known are smoe"
    assert first_line(ValueError('\n\n  first\nsecond')) == 'first' and first_line(KeyError()) == 'KeyError'
    deep = dict(a=dict(b=dict(c=1)), d=[1, 2])
    assert differences(deep, deep) == {} and tell_differences({}) == ''
    assert differences(deep, dict(a=dict(b=dict(c=2)), d=[2])) == {'a.b.c': (1, 2), 'd': ([1, 2], [2])}
    assert differences(deep, dict(a=1)) == {'a': (deep['a'], 1), 'd': ([1, 2], None)}
    assert join_some(['x']) == 'x'

@pytest.mark.parametrize('text, says', [
    ('', 'unknown intervention'), ('drop_top', "'drop_top' needs a value"), ('top_k=x', 'must be a number'),
    ('drop_top12=1', 'takes no value'), ('ban=1+', 'must be a number'), ('temprature=1', "did you mean 'temperature'")])
def test_interventions_that_cannot_be_read(text, says):
    with pytest.raises(ValueError, match=says.replace('?', r'\?')): read_intervention(text)

def test_cores_in_a_container(monkeypatch):
    "The quota of a container counts where there is one, and its absence or nonsense does not matter"
    everything = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    for text, want in [('max 100000', everything), ('50000 100000', 1), ('x', everything), ('100000 100000', 1)]:
        monkeypatch.setattr(Path, 'read_text', lambda self, *a, text=text, **k: text)
        assert available_cores() == want

def test_quiet_bars_load_nothing():
    code = ('import sys\nfrom libmoe_nb.core.modes import quiet_bars\nwith quiet_bars(): pass\n'
            'print("transformers" in sys.modules)\nfrom transformers.utils import logging\n'
            'for shown in (True, False):\n'
            '    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()\n'
            '    with quiet_bars(): print(logging.is_progress_bar_enabled())\n'
            '    print(logging.is_progress_bar_enabled())')
    assert python(code).communicate()[0].split() == ['False', 'False', 'True', 'False', 'False']
