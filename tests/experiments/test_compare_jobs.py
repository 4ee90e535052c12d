"Runs of a comparison side by side: the same to the bit as one after the other, whatever happens to some of them."
import json, shutil

import pytest

from libmoe_nb.data.text import text_data
from libmoe_nb.experiments import compare as chapter, jobs
from libmoe_nb.experiments.compare import compare
from libmoe_nb.experiments.jobs import TasksFailed
from libmoe_nb.moe.config import recipe, recipes
from made_text import fill

pytestmark = pytest.mark.usefixtures('undrawn')
SMALL = dict(preset='tiny', hidden_size=16, head_dim=8, batch_size=2, steps=40, warmup_steps=1, valid_tokens=512)
names = lambda res: [f.name for f in res.folders]

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('texts')
    return text_data(fill(folder/'texts', docs=12), vocab_size=300, sequence_length=32, cache_dir=folder/'cache')

def files(folder):
    "What must be equal: all but times and speeds"
    result = json.loads((folder/'result.json').read_text())
    told = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    for d in (result, *told):
        for k in 'seconds', 'tokens_per_second', 'evaluation_seconds', 'finished', 'time': d.pop(k, None)
    same = {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*.safetensors')}
    return dict(result=result, told=told, **{str(k): v for k, v in same.items()})

def test_two_at_once_are_the_same_to_the_bit(data, at_once, tmp_path):
    kw = dict(SMALL, data=data, steps=4, threads=1, progress=None)
    plain, res = (compare('dense,smoe', jobs=n, out=tmp_path/str(n), **kw) for n in (1, 2))
    assert names(res) == names(plain)
    for a, b in zip(res.folders, plain.folders): assert files(a) == files(b), a.name

@pytest.mark.long
def test_interrupted_failed_and_the_same_to_the_bit(data, at_once, tmp_path):
    kw = dict(SMALL, data=data, threads=1, out=tmp_path/'runs', released_losses='vision', released_schedule=True)
    plain = compare('dense,smoe,xmoe', jobs=1, progress=None, **dict(kw, out=tmp_path/'plain'))
    (alien := tmp_path/'runs'/names(plain)[0]).mkdir(parents=True)
    (alien/'thesis.txt').write_text('years of work')
    def stop(event, name=None, step=0, **facts):
        if event == 'step' and step == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): compare('dense,smoe,xmoe', jobs=2, progress=stop, **kw)
    saved = {p.parents[1].name: int(p.name[5:]) for p in (tmp_path/'runs').glob('*/checkpoints/step-*')}
    assert saved
    told = []
    says = f'1 of 3 runs failed, the others are done. {alien.name}: .*neither empty nor.*Do the same again'
    with pytest.raises(TasksFailed, match=says) as e:
        compare('dense,smoe,xmoe', jobs=2, progress=lambda event, name=None, **f: told.append((event, name, f)), **kw)
    assert [o.name for o in e.value.outcomes.values() if o.error] == [alien.name]
    assert {n for event, n, _ in told if event == 'finish'} == {*names(plain)[1:]}
    first = {n: min(f['step'] for event, name, f in told if (event, name) == ('step', n)) for n in names(plain)[1:]}
    assert first == {n: saved.get(n, 0) + 1 for n in first}
    shutil.rmtree(alien)
    res = compare('dense,smoe,xmoe', jobs=2, progress=None, **kw)
    assert names(res) == names(plain)
    for a, b in zip(res.folders, plain.folders): assert files(a) == files(b), a.name
    infos = [json.loads((f/'config.json').read_text())['info'] for f in res.folders]
    assert [i['threads'] for i in infos] == [1] * 3 and [i['jobs'] for i in infos] == [2] * 3

class Asked(Exception): pass

@pytest.fixture
def asked(monkeypatch, data, tmp_path):
    "What `side_by_side` is asked for, with four cores; None if it is not asked"
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(jobs, 'available_cores', lambda: 4)
    monkeypatch.setattr(chapter, 'use_threads', lambda n=None: n or 4)
    def refuse(tasks, n, threads, *args, **kwargs): raise Asked(n, threads, tasks)
    monkeypatch.setattr(chapter, 'side_by_side', refuse)
    monkeypatch.setattr(chapter.Run, 'fit', lambda self: None)
    monkeypatch.setattr(chapter, '_reported', lambda *args: None)
    def ask(recipes, **kw):
        try: return compare(recipes, data, out=tmp_path, progress=None, **dict(SMALL, **kw))
        except Asked as e: return e.args
    return ask

def test_as_many_as_pay_off(asked):
    assert asked('dense,smoe') is None                                             # too short
    assert asked('dense,smoe', steps=100_000)[:2] == (2, 2)
    assert asked('dense,smoe,xmoe,tcmoe', steps=100_000)[:2] == (4, 1)
    assert asked('dense,smoe', steps=100_000, threads=4) is None
    assert asked('dense,smoe', jobs=2)[:2] == (2, 2) and asked('dense,smoe', jobs=2, threads=1)[:2] == (2, 1)
    assert asked('dense,smoe', jobs=1, steps=100_000) is None
    with pytest.raises(ValueError, match='jobs must be a whole number of at least 1, got 0'): asked('smoe', jobs=0)

def mine(spec): return recipes['dense'].build(spec)

def test_recipes_of_others(asked, monkeypatch):
    try:
        recipe('mine')(mine)
        _, _, tasks = asked('dense,mine', steps=100_000)
        assert [[*t.kwargs['foreign']] for t in tasks] == [['mine']] * 2
        monkeypatch.setattr(mine, '__module__', '__main__')
        assert asked('dense,mine', steps=100_000) is None
        with pytest.raises(ValueError, match="jobs must be 1 for recipe 'mine', since this script or notebook defines"):
            asked('dense,mine', jobs=2)
        recipe('mine')(lambda spec: recipes['dense'].build(spec))
        assert asked('dense,mine', steps=100_000) is None
    finally: del recipes['mine']
