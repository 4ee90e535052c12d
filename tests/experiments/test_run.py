"One run: its folder, its observer, what it refuses, what an interruption leaves."
import dataclasses, json, random
from collections import Counter

import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM

from libmoe_nb.data.text import text_data
from libmoe_nb.evaluation.suites import make_suite
from libmoe_nb.experiments.compare import compare, make_plan, train
from libmoe_nb.experiments.run import Run, RunOptions, run_config, run_hash, run_name
from libmoe_nb.experiments.upcycle import upcycle_and_train
from libmoe_nb.moe.config import get_preset

pytestmark = pytest.mark.usefixtures('undrawn')
SMALL = dict(hidden_size=16, head_dim=8, batch_size=2, sequence_length=32, steps=6, warmup_steps=1, valid_tokens=512)

@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    "Two subfolders of documents, none of which is another once more"
    folder, rng = tmp_path_factory.mktemp('texts'), random.Random(0)
    words = [a + b for a in 'ba de ki lo mu na po ru'.split() for b in 'ran sel tin vor lum'.split()]
    for name in (f'{d}/{i}.txt' for d in ('tales', 'notes') for i in range(12)):
        (folder/name).parent.mkdir(exist_ok=True)
        sentences = (' '.join(rng.choices(words, k=12)).capitalize() + '.' for _ in range(30))
        (folder/name).write_text(' '.join(sentences))
    return folder

@pytest.fixture(scope='module')
def data(texts, tmp_path_factory):
    return text_data(texts, vocab_size=300, sequence_length=32, cache_dir=tmp_path_factory.mktemp('cache'))

@pytest.fixture(scope='module')
def plan(data): return make_plan('smoe,xmoe', 'tiny', device='cpu', **SMALL).read(data, print, threads=1)

@pytest.fixture(scope='module')
def config(plan): return plan.config('smoe', 0)

@pytest.fixture(scope='module')
def done(config, data, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp('runs')/run_name(config), config, data)
    run.fit()
    return run

class Listener:
    "An observer that keeps all it is told, and may raise at a step"
    def __init__(self, stop_at=None, error=KeyboardInterrupt): self.told, self.stop_at, self.error = [], stop_at, error
    def __call__(self, event, name=None, **facts):
        self.told.append((event, name, facts))
        if event == 'step' and facts['step'] == self.stop_at: raise self.error('enough')
    events = property(lambda self: [e for e, _, _ in self.told])
    steps = property(lambda self: [f['step'] for e, _, f in self.told if e == 'step'])
    def facts(self, event): return {frozenset(f) for e, _, f in self.told if e == event}

def checkpoints(run): return [p.name for p in (run.folder/'checkpoints').glob('step-*')]

class Text:
    "What a configuration reads of a text"
    fingerprint, domains, vocab_size, sequence_length = 'f' * 32, ['tales'], 1024, 128

# what determines it

def test_names_do_not_change():
    "Else finished work would be repeated"
    config = run_config('smoe', 0, get_preset('tiny'), Text())
    assert list(config) == 'format recipe seed preset layer options moe bf16 device valid_tokens data'.split()
    names = [run_name(run_config(r, 3, get_preset(p), Text(), dict(router_init_std=.1), bf16=True))
             for r, p in (('smoe', 'tiny'), ('sharede_v3', 'mini'))]
    assert [run_name(config), *names] == ['smoe-0-11aaa9f8', 'smoe-3-91c1ba54', 'sharede_v3-3-9e2840cb']

def test_wishes_are_no_part_of_it(done, config, data, plan, tmp_path):
    other = plan.run(tmp_path, 'smoe', 0, RunOptions(traces=False, keep_model=False, log='tensorboard'))
    assert other.name == done.name == f'smoe-0-{run_hash(config)}'
    assert other.fit()['loss'] == done.result['loss']
    assert {p.name for p in other.folder.iterdir()} >= {'tensorboard', 'result.json'}
    assert not (other.folder/'traces').exists() and not (other.folder/'model').exists()

@pytest.mark.parametrize('wish, says', [
    (dict(traces=-1), 'traces must be True, False or a number of tokens, got -1'),
    (dict(traces='all'), "traces must be True, False or a number of tokens, got 'all'"),
    (dict(traces=.5), 'traces must be True, False or a number of tokens, got 0.5'),
    (dict(log='tensorbord'), "did you mean 'tensorboard'"),
    (dict(checkpoint_seconds=-1), 'checkpoint_seconds must be a number of at least 0, got -1')])
def test_wishes_are_checked_when_they_are_made(wish, says):
    with pytest.raises(ValueError, match=says): RunOptions(**wish)
    with pytest.raises(dataclasses.FrozenInstanceError): RunOptions().traces = False

# its folder

def test_a_folder_is_a_run(done, config):
    "What is finished is read without text or configuration"
    run = Run(done.folder)
    assert run.config == config and run.finished and run.result == done.result and run.evaluation is None
    assert run.preset == done.preset and run.fit() == done.result

def test_what_a_run_says_of_itself(done, config, data, tmp_path):
    run = Run(tmp_path/'x', config, data)
    assert repr(run) == 'Run(x: not begun)' and run.result is None and not run.finished
    run.claim()
    assert repr(run) == 'Run(x: begun)'
    assert repr(done) == f"Run({done.name}: perplexity {done.result['perplexity']:.1f})"
    (tmp_path/'x'/'result.json').write_text(json.dumps(dict(done.result, perplexity=None)))
    assert repr(run) == 'Run(x: diverged)'

def test_refusals_leave_nothing_behind(done, config, plan, data, texts, tmp_path):
    shorter = text_data(texts, vocab_size=290, sequence_length=32, cache_dir=tmp_path/'cache')
    for other, says in (None, 'data must be given'), (shorter, 'data must be the text of the configuration'):
        with pytest.raises(ValueError, match=says): Run(tmp_path/'x', config, other).fit()
        assert not (tmp_path/'x').exists()
    before = {p: p.stat().st_mtime_ns for p in done.folder.rglob('*')}
    with pytest.raises(ValueError, match="another configuration: its recipe is 'smoe', not 'xmoe'"):
        Run(done.folder, plan.config('xmoe', 0), data).fit()
    assert {p: p.stat().st_mtime_ns for p in done.folder.rglob('*')} == before
    (tmp_path/'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match='neither empty nor the folder of a run'): Run(tmp_path, config, data).fit()
    assert [p.name for p in tmp_path.iterdir() if p.name != 'cache'] == ['thesis.txt']

# interruptions

def test_ctrl_c_loses_no_step(done, config, data, tmp_path):
    run = Run(tmp_path/'x', config, data, progress=Listener(4))
    with pytest.raises(KeyboardInterrupt): run.fit()
    assert checkpoints(run) == ['step-00000004'] and not run.finished
    again = Run(run.folder, config, data, progress=(told := Listener()))
    assert again.fit()['loss'] == done.result['loss'] and told.steps == [5, 6]
    assert not (run.folder/'checkpoints').exists()

@pytest.mark.parametrize('seconds, kept', [(0, ['step-00000004']), (60, [])])
def test_a_crash_loses_what_was_not_saved(seconds, kept, config, data, tmp_path):
    run = Run(tmp_path/'x', config, data, RunOptions(checkpoint_seconds=seconds), Listener(4, RuntimeError))
    with pytest.raises(RuntimeError): run.fit()
    assert checkpoints(run) == kept

def test_start_over(done, config, plan, data, tmp_path):
    run = Run(tmp_path/'x', config, data, progress=Listener(3))
    with pytest.raises(KeyboardInterrupt): run.fit()
    kept = sorted(run.folder.rglob('*'))
    Run(run.folder, plan.config('xmoe', 0), data).start_over()            # of another configuration
    assert sorted(run.folder.rglob('*')) == kept
    run.start_over()
    assert [p.name for p in run.folder.iterdir()] == ['config.json']
    again = Run(run.folder, config, data, progress=(told := Listener()))
    assert again.fit()['loss'] == done.result['loss'] and told.steps == [1, 2, 3, 4, 5, 6]
    again.start_over()                                                     # finished
    assert again.finished and (run.folder/'model').is_dir()

# who is told

def test_a_run_tells_what_it_does(config, data, tmp_path):
    told, suite = Listener(), make_suite(data, ['cloze', 'word_order'], num_examples=2)
    Run(tmp_path/'x', config, data, progress=told).fit()
    assert told.events == ['start', *['step'] * 6, 'finish'] and {n for _, n, _ in told.told} == {'x'}
    asked = Run(tmp_path/'x', config, data, RunOptions(suite=suite), told := Listener())
    for events in (['evaluate', 'finish'], ['finish']):
        told.told.clear()
        asked.fit()
        assert told.events == events and told.told[-1][2]['reused']
    assert asked.evaluation['suite']['fingerprint'] == suite.fingerprint

def test_one_observer_for_everything(texts, data, tmp_path, monkeypatch):
    "A comparison, a training and an upcycling tell the same facts of the same events"
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(
        'llama', vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path/'dense')
    data.tokenizer.save_pretrained(tmp_path/'dense')
    a, b, c = (Listener() for _ in range(3))
    compare('dense,smoe', texts, 'tiny', out=tmp_path/'runs', vocab_size=300, progress=a, threads=1, **SMALL)
    train('smoe', texts, 'tiny', out=tmp_path/'one', vocab_size=300, progress=b, threads=1, **SMALL)
    upcycle_and_train(tmp_path/'dense', 'smoe', texts, 6, tmp_path/'up', sequence_length=32, valid_tokens=512,
                      progress=c, threads=1)
    both = ['start', *['step'] * 6, 'finish'] * 2
    assert a.events == ['data', 'plan', *both, 'report'] and c.events == ['data', 'plan', 'model', *both]
    assert b.events == ['data', 'plan', *both[:8]]
    for event in ('plan', 'start', 'step', 'finish'):
        assert a.facts(event) == b.facts(event) == c.facts(event) and len(a.facts(event)) == 1
    assert Counter(n for _, n, _ in c.told) == {None: 3, 'dense': 8, 'smoe': 8}
