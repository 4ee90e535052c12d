"The soak of numerics, from end to end at a test's sizes: two starts, of which the second goes on."
import json, sys
from pathlib import Path

import pytest, torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
import numerics

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')

@pytest.mark.long
def test_a_soak_goes_on_and_tells(tmp_path):
    call = ['--steps', '12', '--every', '4', '--recipes', 'moe_plus_plus', '--precisions', 'bf16', '--tokens', '4096',
            '--state', str(tmp_path/'state'), '--json', str(tmp_path/'n.json'), '--growth', '1e9', '--entropy', '0']
    rows = lambda: {r['part']: r for r in json.loads((tmp_path/'n.json').read_text())['rows']}
    threads = torch.get_num_threads()
    try:
        numerics.main([*call, '--minutes', '0'])                        # one step
        assert rows()['train']['steps'] == 1 and rows()['train']['samples'] == []
        numerics.main([*call, '--minutes', '5'])
        whole = rows()
        numerics.main([*call, '--minutes', '5'])                        # nothing is left to do
    finally: torch.set_num_threads(threads)
    assert rows() == whole
    row = whole['train']
    assert row['steps'] == 12 and [s['step'] for s in row['samples']] == [4, 8, 12] and row['nonfinite'] == 0
    assert all(s['memory'] > 50 and 0 < s['entropy'] <= 1 for s in row['samples'])
    assert row['losses'][3] < row['losses'][1] and row['drift'] == 0
    assert whole['ties'] == dict(part='ties', recipe='moe_plus_plus', tokens=4096, flips=0, ok=True)

@pytest.mark.parametrize('change, bad', [(dict(memory=lambda i: 100 + 3. * i), 'memory'),
                                         (dict(dead=lambda i: 1), 'dead'),
                                         (dict(entropy=lambda i: .4), 'dead'),
                                         (dict(loss=lambda i: 5 - .1 * min(i, 16 - i)), 'drift'),
                                         (dict(nonfinite=lambda i: int(i > 3)), 'nonfinite')],
                         ids=['memory', 'dead', 'entropy', 'drift', 'nonfinite'])
def test_what_is_not_as_it_should_be(change, bad):
    from types import SimpleNamespace
    made = dict(loss=lambda i: 5 - .1 * i, dead=lambda i: i % 2, entropy=lambda i: .9, nonfinite=lambda i: 0,
                memory=lambda i: 100 + (i % 2) / 10, skipped=lambda i: 0)
    rows = lambda d: [dict(step=250 * i, session=0, **{k: f(i) for k, f in d.items()}) for i in range(1, 17)]
    a = SimpleNamespace(steps=4000, every=250, drift=.1, growth=1., entropy=.5)
    assert numerics.judged('smoe', 'fp32', rows(made), 4000, 1., a)['bad'] == []
    assert numerics.judged('smoe', 'fp32', rows(made | change), 4000, 1., a)['bad'] == [bad]
