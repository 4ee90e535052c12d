"Training: killed, damaged and resumed runs; values of telemetry and expert biases by hand; several processes."
import json, math, os, shutil, signal, subprocess, sys
from pathlib import Path

import pytest

import torch  # noqa: E402
from libmoe_nb import training as T  # noqa: E402
from libmoe_nb.moe.config import recipes  # noqa: E402
from libmoe_nb.data.text import text_data  # noqa: E402
from libmoe_nb.models.causal import from_scratch  # noqa: E402
from libmoe_nb.analysis.tracing import moe_layers, record_routing  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')
ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, moe_intermediate_size=8,
             vocab_size=300)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

@pytest.fixture(scope='module')
def data(cache): return text_data('python', vocab_size=300, sequence_length=32, max_bytes=100_000, cache_dir=cache)

def make(recipe, data, *, seed=0, dropout=True, steps=3, batch_size=4, cbs=(), model=None, **kwargs):
    model = model or from_scratch(recipe, 'tiny', seed=seed, **SMALL)
    for m in model.modules():
        if dropout and hasattr(m, 'attention_dropout'): m.attention_dropout = .2
    return T.moe_learner(model, data, preset='tiny', batch_size=batch_size, steps=steps, valid_steps=2,
                         cbs=list(cbs), **kwargs)

def fit(learn, how='fit_cosine', epochs=3, **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(epochs, **kwargs)
    return learn

class Stop(T.Callback):
    "Ends the fit after a step, as a killed process would: nothing runs after it"
    order = 100
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.learn.training and self.learn.step == self.at: raise KeyboardInterrupt

def state(learn):
    "All tensors that training goes on from, and its curve"
    opt = {f'{i}.{k}': torch.as_tensor(v) for i, s in learn.opt.state_dict()['state'].items() for k, v in s.items()}
    return dict(learn.model.state_dict(), **opt, losses=torch.stack(learn.recorder.losses), rng=torch.get_rng_state())

def assert_same(a, b):
    assert sorted(a) == sorted(b)
    different = [n for n in a if not torch.equal(a[n], b[n])]
    assert not different

# in one process

def killed_and_resumed(recipe, data, folder, at, every=2, how='fit_cosine', model=lambda seed: None, **kwargs):
    with pytest.raises(KeyboardInterrupt):
        fit(make(recipe, data, model=model(0), cbs=[T.Checkpoint(folder, every), Stop(at)], **kwargs), how)
    torch.manual_seed(123)
    learn = make(recipe, data, seed=7, model=model(7), cbs=[T.Checkpoint(folder, every)], **kwargs)
    path = T.resume(learn, folder)
    assert learn.step == at // every * every == int(path.name[5:])
    return fit(learn, how)

@pytest.mark.parametrize('recipe', recipes)
def test_every_recipe_resumes_to_the_same_bits(recipe, data, tmp_path):
    straight = state(fit(make(recipe, data)))
    assert_same(straight, state(killed_and_resumed(recipe, data, tmp_path, at=5)))

@pytest.mark.parametrize('how, at', [('fit_cosine', 1), ('fit_cosine', 3), ('fit_cosine', 8), ('fit_one_cycle', 3),
                                     ('fit_one_cycle', 8), ('fit', 4), ('fit_flat_cos', 5)])
def test_every_schedule_resumes(how, at, data, tmp_path):
    straight = fit(make('smoe', data), how)
    resumed = killed_and_resumed('smoe', data, tmp_path, at, every=1, how=how)
    assert_same(state(straight), state(resumed))
    assert straight.recorder.lrs == resumed.recorder.lrs
    assert straight.recorder.hps == resumed.recorder.hps if hasattr(straight.recorder, 'hps') else how == 'fit'
    assert straight.history().drop(columns='tokens/s').equals(resumed.history().drop(columns='tokens/s'))

@pytest.mark.parametrize('kwargs', [dict(grad_accum=3), dict(bf16=True)], ids=str)
def test_options_resume(kwargs, data, tmp_path):
    assert_same(state(fit(make('smoe', data, **kwargs))),
                state(killed_and_resumed('smoe', data, tmp_path, at=4, **kwargs)))

def test_expert_biases_and_gradient_checkpointing_resume(data, tmp_path):
    def model(seed):
        m = from_scratch('sharede_v3', 'tiny', seed=seed, expert_bias=True, **SMALL)
        m.gradient_checkpointing_enable(dict(use_reentrant=False))
        return m
    straight = fit(make(None, data, model=model(0)))
    biases = {n: t for n, t in straight.model.state_dict().items() if n.endswith('expert_bias')}
    assert len(biases) == 2 and all(t.abs().sum() > 0 for t in biases.values())
    assert_same(state(straight), state(killed_and_resumed(None, data, tmp_path, at=5, model=model)))

def test_a_finished_run_is_not_trained_again(data, tmp_path):
    done = fit(make('smoe', data, cbs=[T.Checkpoint(tmp_path)]))
    again = make('smoe', data, seed=3, cbs=[T.Checkpoint(tmp_path)])
    T.resume(again, tmp_path)
    assert_same(state(done), state(fit(again)))
    assert again.step == 9 and [p.name for p in T.checkpoints(tmp_path)] == ['step-00000009']

def test_a_second_fit_goes_on_with_the_data(data):
    twice = make('smoe', data)
    seen = [b[0]['input_ids'] for b in T.TrainBatches(data.train, 4, 18)]
    class Look(T.Callback):
        order, got = 90, []
        def after_batch(self):
            if self.learn.training: self.got.append(self.learn.xb[0]['input_ids'])
    fit(twice, cbs=[Look]); fit(twice, 'fit', cbs=[Look])
    assert twice.step == 18 and all(torch.equal(a, b) for a, b in zip(seen, Look.got, strict=True))

def test_keep_last_and_leftovers(data, tmp_path):
    (tmp_path/'.tmp-1').mkdir(); (tmp_path/'.tmp-1'/'model.safetensors').write_text('half')
    fit(make('smoe', data, cbs=[T.Checkpoint(tmp_path, every=2, keep_last=3)]))
    assert sorted(os.listdir(tmp_path)) == ['step-00000006', 'step-00000008', 'step-00000009']

def test_nothing_is_pickled(data, tmp_path, monkeypatch):
    import pickle
    def never(*a, **k): raise AssertionError('pickle was used')
    learn = make('smoe', data, cbs=[T.Checkpoint(tmp_path)])
    for name in ('dump', 'dumps', 'load', 'loads', 'Pickler', 'Unpickler'): monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, 'save', never); monkeypatch.setattr(torch, 'load', never)
    fit(learn, epochs=1)
    T.resume(make('smoe', data), tmp_path)
    assert {p.suffix for p in T.checkpoints(tmp_path)[0].iterdir()} == {'.json', '.safetensors'}

def test_a_save_may_stop_anywhere(data, tmp_path, monkeypatch):
    "Whichever file operation of a save is the last one, a valid checkpoint is left"
    learn, calls = make('smoe', data, cbs=[T.Checkpoint(tmp_path, every=1, keep_last=1), Stop(2)]), [0, None]
    with pytest.raises(KeyboardInterrupt): fit(learn)
    def counted(f):
        def g(*args, **kwargs):
            calls[0] += 1
            if calls[0] == calls[1]: raise KeyboardInterrupt
            return f(*args, **kwargs)
        return g
    for owner, name in [(T, '_fsync'), (T, 'save_file'), (T, 'save_model'), (Path, 'rename'), (Path, 'mkdir'),
                        (Path, 'write_text'), (shutil, 'rmtree')]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    def save(stop=None):
        calls[:] = 0, stop
        learn.checkpoint.save()
        return calls[0]
    for step in (2, 3):                     # written over, and new
        learn.step = step
        for stop in range(1, save() + 1):
            learn.step = step
            with pytest.raises(KeyboardInterrupt): save(stop)
            calls[1] = None
            other = make('smoe', data)
            assert T.resume(other, tmp_path) and other.step in (2, 3), stop
            save()
            assert os.listdir(tmp_path) == [f'step-{step:08d}']

# damaged and foreign

@pytest.fixture(scope='module')
def saved(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    fit(make('smoe', data, cbs=[T.Checkpoint(folder, every=2, keep_last=9)]))
    return folder

def copy(saved, to, *names):
    for n in names: shutil.copytree(saved/f'step-{n:08d}', to/f'step-{n:08d}')
    return to

def damage(path, how):
    if how == 'missing': path.unlink()
    elif how == 'empty': path.write_bytes(b'')
    elif how == 'short': path.write_bytes(path.read_bytes()[:-1])
    elif how == 'long': path.write_bytes(path.read_bytes() + b' ')
    else:
        b = bytearray(path.read_bytes()); b[len(b)//2] ^= 4; path.write_bytes(b)

@pytest.mark.parametrize('file', ['model.safetensors', 'training.safetensors', 'checkpoint.json', 'config.json'])
@pytest.mark.parametrize('how', ['missing', 'empty', 'short', 'long', 'flipped'])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(file, how, saved, data, tmp_path):
    if (file, how) == ('checkpoint.json', 'long'): pytest.skip('a blank after JSON is no damage')
    folder = copy(saved, tmp_path, 6, 8)
    damage(folder/'step-00000008'/file, how)
    learn = make('smoe', data)
    with pytest.warns(UserWarning, match='step-00000008 is .*damaged'): path = T.resume(learn, folder)
    assert path.name == 'step-00000006' and learn.step == 6

def test_all_damaged_is_an_error_that_names_each(saved, data, tmp_path):
    folder = copy(saved, tmp_path, 6, 8)
    for p in T.checkpoints(folder): damage(p/'model.safetensors', 'flipped')
    with pytest.raises(ValueError, match='step-00000008 is damaged: model.safetensors.*step-00000006 is damaged'):
        T.resume(make('smoe', data), folder)

def test_foreign_checkpoints_are_refused(saved, data, cache, tmp_path):
    folder = copy(saved, tmp_path, 8)
    for other, what in [(make('xmoe', data), 'model'), (make('smoe', data, batch_size=2), 'batch_size'),
                        (make('smoe', data, steps=5), 'steps'),
                        (make('smoe', text_data('python', vocab_size=300, sequence_length=16, max_bytes=100_000,
                                                cache_dir=cache)), 'sequence_length'),
                        (make('smoe', text_data('python', vocab_size=300, sequence_length=32, max_bytes=90_000,
                                                cache_dir=cache)), 'data')]:
        before = {n: t.clone() for n, t in other.model.state_dict().items()}
        with pytest.raises(ValueError, match=f'of another run: its {what} is'): T.resume(other, folder)
        assert_same(before, other.model.state_dict())
    (folder/'step-00000009').mkdir(); (folder/'step-00000009'/'checkpoint.json').write_text('{"epoch": 1}')
    with pytest.warns(UserWarning, match='step-00000009 is no libmoe checkpoint'):
        assert T.resume(make('smoe', data), folder).name == 'step-00000008'

def test_no_checkpoint_is_a_fresh_start(data, tmp_path):
    assert T.resume(make('smoe', data), tmp_path) is None
    assert T.resume(make('smoe', data), tmp_path/'missing') is None

# the metrics file

def test_metrics_of_a_resumed_run_are_those_of_a_straight_one(data, tmp_path):
    def cbs(name):
        return [T.RoutingTelemetry(2), T.MetricsWriter(tmp_path/name/'metrics.jsonl'),
                T.Checkpoint(tmp_path/name, every=2)]
    fit(make('smoe', data, cbs=cbs('a')))
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, cbs=[*cbs('b'), Stop(5)]))
    with open(tmp_path/'b'/'metrics.jsonl', 'a') as f: f.write('{"step": 5, "split": "tr')
    learn = make('smoe', data, cbs=cbs('b'))
    T.resume(learn, tmp_path/'b'); fit(learn)
    a, b = (T.read_metrics(tmp_path/n/'metrics.jsonl').drop(columns=['seconds', 'tokens_per_second']) for n in 'ab')
    assert a.equals(b)
    assert len(learn.routing_telemetry.table()) == (a.split == 'routing').sum() == 2 * 5

def test_metrics_lines_are_json_even_where_the_loss_is_not_a_number(data, tmp_path):
    learn = make('smoe', data, cbs=[T.MetricsWriter(tmp_path/'m.jsonl')])
    with torch.no_grad(): next(learn.model.parameters()).fill_(math.nan)
    with pytest.warns(UserWarning, match='the loss is nan at step 1: training stops here'): fit(learn, epochs=2)
    def never(c): raise AssertionError(c)
    rows = [json.loads(line, parse_constant=never) for line in open(tmp_path/'m.jsonl')]
    assert ([r['loss'] for r in rows] == [None] * 2 and [r['split'] for r in rows] == ['train', 'valid']
            and learn.diverged == 1)

# values by hand

def test_expert_bias_update_by_hand(data):
    "Three steps of two parts: bias += rate * sign(mean load - load), loads as the model before each step would choose"
    rate, model = .01, from_scratch('smoe_sigmoid', 'tiny', seed=0, expert_bias=True, **SMALL)
    loads = []
    class Look(T.Callback):
        order = -50
        def before_batch(self):
            if not self.learn.training: return
            with torch.no_grad(), record_routing(self.learn.model) as records:
                self.learn.model(self.learn.xb[0]['input_ids'], use_cache=False)
            loads.append({n: torch.bincount(r.top_k_index.flatten(), minlength=8).float()
                          for n, (r,) in records.items()})
    fit(make(None, data, model=model, dropout=False, steps=3, grad_accum=2, cbs=[Look()], expert_bias_rate=rate),
        epochs=1)
    for n, layer in moe_layers(model).items():
        expected = sum(rate * torch.sign(step[n].mean() - step[n]) for step in loads)
        assert torch.allclose(layer.router.expert_bias, expected, atol=1e-8) and expected.abs().max() > 0
        assert loads[0][n].sum() == 4 * 32 * 4

def test_expert_bias_counts_each_token_once_under_activation_checkpointing(data):
    def biases(on):
        model = from_scratch('sharede_v3', 'tiny', seed=0, expert_bias=True, **SMALL)
        if on: model.gradient_checkpointing_enable(dict(use_reentrant=False))
        counted = []
        class CountForwards(T.Callback):
            order, uses_routing = 40, True
            def after_step(self): counted.append([len(rs) for rs in self.learn.routings.values()])
        fit(make(None, data, model=model, cbs=[CountForwards()]), epochs=1)
        assert counted == [[1, 1]] * 3
        return model.state_dict()
    assert_same(biases(False), biases(True))

def test_telemetry_by_hand(data):
    rows, model = [], from_scratch('smoe', 'tiny', seed=1, router_init_std=.3, **SMALL)
    telemetry = T.RoutingTelemetry(every=2)
    class Look(T.Callback):
        order = -50
        def before_batch(self):
            if not self.learn.training: return
            with torch.no_grad(), record_routing(self.learn.model) as records:
                self.learn.model(self.learn.xb[0]['input_ids'], use_cache=False)
            for i, (r,) in enumerate(records.values()):
                f = torch.zeros(8)
                for t in range(r.num_tokens):
                    for e in r.top_k_index[t].tolist(): f[e] += 1
                p = f / f.sum()
                top = r.scores.sort(-1, descending=True).values
                s = r.scores.view(4, 32, 8).mean(1)
                counts = torch.stack([torch.bincount(x.flatten(), minlength=8)
                                      for x in r.top_k_index.view(4, 32, 4)]) / 128
                rows.append([i, (f.max() / f.mean()).item(), (f == 0).sum().item(),
                             -sum(x * math.log(x) for x in p.tolist() if x) / math.log(8),
                             (top[:, 0] - top[:, 1]).mean().item(), 1., (8 * (counts * s).sum(-1)).mean().item()])
    fit(make(None, data, model=model, dropout=False, steps=3, grad_accum=2, cbs=[Look(), telemetry]), epochs=1)
    expected = [r for i, r in enumerate(rows) if i // 2 + 1 in (1, 2)]
    table = telemetry.table()
    assert list(table.step) == [1, 1, 2, 2] and list(table.tokens) == [128, 128, 256, 256]
    got = (table['layer load_max_mean dead_experts entropy margin weight_sum load_balancing_loss'.split()]
           .values.tolist())
    assert torch.allclose(torch.tensor(got), torch.tensor(expected), atol=1e-5)

def test_telemetry_leaves_padding_out():
    scores = torch.tensor([[.7, .2, .1], [.1, .2, .7], [.1, .2, .7]])
    r = T.Routing(scores.log(), scores, scores.argmax(-1, keepdim=True), torch.ones(3, 1), 3, shape=(1, 3))
    s = T.routing_stats(r, torch.tensor([[True, True, False]]))
    assert (s['dead_experts'] == 1 and abs(s['load_max_mean'] - 1.5) < 1e-6
            and abs(s['entropy'] - math.log(2)/math.log(3)) < 1e-6)

def test_aux_loss_reaches_the_gradient_and_not_the_loss(data):
    def one(coef):
        learn = make('smoe', data, dropout=False, steps=1,
                     model=from_scratch('smoe', 'tiny', seed=0, router_aux_loss_coef=coef, **SMALL))
        class GradsOfStep(T.Callback):
            order = -50
            def before_step(self): self.grads = {n: p.grad.clone() for n, p in self.learn.model.named_parameters()}
        learn.add_cb(GradsOfStep()); fit(learn, epochs=1)
        return learn
    without, with_ = one(0.), one(10.)
    assert (without.recorder.losses == with_.recorder.losses and with_.history().aux_loss[0] > 9
            and without.history().aux_loss[0] == 0)
    different = {n for n, g in with_.grads_of_step.grads.items() if not torch.equal(g, without.grads_of_step.grads[n])}
    assert any('router' in n for n in different) and 'base.lm_head.weight' not in different

def test_padding_counts_in_no_loss(data):
    "Two parts, one of which is mostly padding, are one batch: gradient and loss are means over its tokens"
    class Padded:
        sequence_length = 32
        def batches(self, B, seed=0, start=0):
            for b in data.train.batches(B, seed, start):
                b['labels'][0, 3:], b['domain'][0, 3:], b['input_ids'][0, 3:] = -100, -1, 0
                yield b
    def grads(k):
        learn = make('dense', data, dropout=False, steps=1, grad_accum=k, grad_clip=0)
        learn.dls.train.dataset = Padded()
        class GradsOfStep(T.Callback):
            def before_step(self): self.grads = [p.grad.clone() for p in self.learn.model.parameters()]
        learn.add_cb(GradsOfStep()); fit(learn, epochs=1)
        return learn.grads_of_step.grads, learn.recorder.losses
    (a, la), (b, lb) = grads(1), grads(4)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b)) and abs(la[0] - lb[0]) < 1e-5

def test_any_causal_language_model_trains(data):
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2,
                                       bos_token_id=None, eos_token_id=None))
    before = T.evaluate_perplexity(model, data, steps=2)['loss']
    learn = fit(T.moe_learner(model, data, preset='tiny', batch_size=8, steps=10, valid_steps=2), 'fit_one_cycle', 1,
                lr_max=1e-2)
    assert T.evaluate_perplexity(model, data, steps=2)['loss'] < before - .5 and learn.history().aux_loss[0] == 0

def test_mixtures_of_transformers_train_and_are_watched(data):
    from transformers import MixtralConfig, MixtralForCausalLM
    model = MixtralForCausalLM(MixtralConfig(vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=.5,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None))
    telemetry = T.RoutingTelemetry(2)
    learn = fit(T.moe_learner(model, data, preset='tiny', batch_size=4, steps=4, valid_steps=2, cbs=telemetry),
                epochs=1)
    assert learn.aux_loss.weight == .5 and learn.history().aux_loss[0] > .9
    table = telemetry.table()
    assert len(table) == 2 * 3 and (table.load_max_mean >= 1).all() and (abs(table.weight_sum - 1) < 1e-5).all()
    assert T.routing_loads(model, data, steps=2).groupby('layer').share.sum().round(6).tolist() == [1., 1.]

def test_perplexity_by_domain_adds_up(data, tmp_path, cache):
    for n in 'ab':
        (tmp_path/f'{n}.txt').write_text('\n\n'.join(f'{n} {i} ' + 'word ' * (i % 7 + 3) for i in range(2000)))
    two = text_data([str(tmp_path/'a.txt'), str(tmp_path/'b.txt')], vocab_size=280, sequence_length=32, cache_dir=cache,
                    valid_fraction=.2)
    model = from_scratch('tcmoe', 'tiny', seed=0, **SMALL)
    res = T.evaluate_perplexity(model, two, batch_size=3, routing=True)
    total = sum(d['loss'] * d['tokens'] for d in res['domains'].values())
    assert (abs(total / res['tokens'] - res['loss']) < 1e-9
            and sum(d['tokens'] for d in res['domains'].values()) == res['tokens'])
    assert abs(T.evaluate_perplexity(model, two, batch_size=16)['loss'] - res['loss']) < 1e-5
    for (_, d), t in res['routing'].groupby(['layer', 'domain']):
        assert len(t) == 8 and t.share.sum() <= 1 + 1e-9 and abs(t['load'].mean() - 1) < 1e-6

# in fresh processes

SCRIPT = r'''
import sys, os, json, signal, warnings
warnings.simplefilter('ignore')
sys.path.insert(0, {tests!r}); sys.path.insert(0, {root!r})
import torch, test_training as t
from pathlib import Path
T, args = t.T, json.loads(sys.argv[1])
torch.set_num_threads(1)
data = t.text_data('python', vocab_size=300, sequence_length=32, max_bytes=100_000, cache_dir=args['cache'])
class Kill(T.Callback):
    order = 100
    def after_batch(self):
        if self.learn.training and self.learn.step == args.get('kill_at'): os.kill(os.getpid(), signal.SIGKILL)
saves, fsync = [], T._fsync
def killing(path):
    if Path(path).name.startswith('.tmp-'):
        saves.append(path)
        if len(saves) == args.get('kill_in_save'): os.kill(os.getpid(), signal.SIGKILL)
    return fsync(path)
T._fsync = killing
folder = Path(args['folder'])
kw = dict(expert_bias=True) if args['recipe'] in ('sharede_v3', 'smoe_sigmoid') else dict()
learn = t.make(None, data, model=t.from_scratch(args['recipe'], 'tiny', seed=args.get('seed', 0), **kw, **t.SMALL), cbs=[T.MetricsWriter(folder/'metrics.jsonl'), T.Checkpoint(folder/'checkpoints', every=2), Kill()])
path = T.resume(learn, folder/'checkpoints')
t.fit(learn)
from safetensors.torch import save_file
save_file({{n: x.contiguous().clone() for n, x in t.state(learn).items()}}, folder/'state.safetensors')
print(path and path.name)
'''

def process(tmp_path, **args):
    code = SCRIPT.format(tests=str(ROOT/'tests'), root=str(ROOT))
    return subprocess.run([sys.executable, '-c', code, json.dumps(args)], capture_output=True, text=True, cwd=tmp_path,
                          timeout=300,
                          env=dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1'))

def state_of(folder):
    from safetensors.torch import load_file
    return load_file(folder/'state.safetensors')

@pytest.mark.parametrize('recipe', ['sharede_v3', 'moe_plus_plus'])
def test_sigkill_in_the_middle_and_a_fresh_process(recipe, data, cache, tmp_path):
    args = dict(recipe=recipe, cache=str(cache))
    assert process(tmp_path, folder=str(tmp_path/'a'), **args).returncode == 0
    killed = process(tmp_path, folder=str(tmp_path/'b'), kill_at=5, **args)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in T.checkpoints(tmp_path/'b'/'checkpoints')] == ['step-00000004', 'step-00000002']
    resumed = process(tmp_path, folder=str(tmp_path/'b'), seed=9, **args)
    assert resumed.returncode == 0 and resumed.stdout.split()[-1] == 'step-00000004', resumed.stderr
    a, b = state_of(tmp_path/'a'), state_of(tmp_path/'b')
    assert_same(a, b)
    a, b = (T.read_metrics(tmp_path/n/'metrics.jsonl').drop(columns=['seconds', 'tokens_per_second']) for n in 'ab')
    assert a.equals(b)

def test_sigkill_while_saving(data, cache, tmp_path):
    args = dict(recipe='xmoe', cache=str(cache), folder=str(tmp_path/'run'))
    # the second checkpoint, at step 4, is written but not yet renamed
    killed = process(tmp_path, kill_in_save=2, **args)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path/'run'/'checkpoints'
    assert [p.name for p in T.checkpoints(folder)] == ['step-00000002'] and list(folder.glob('.tmp-*'))
    resumed = process(tmp_path, **args)
    assert resumed.returncode == 0 and resumed.stdout.split()[-1] == 'step-00000002', resumed.stderr
    assert not list(folder.glob('.tmp-*')) and T.checkpoints(folder)[0].name == 'step-00000009'
    assert_same(state(fit(make('xmoe', data))), state_of(tmp_path/'run'))

TWO = r'''
import sys, os, json, warnings
warnings.simplefilter('ignore')
sys.path.insert(0, {tests!r}); sys.path.insert(0, {root!r})
import torch, test_training as t
from pathlib import Path
torch.set_num_threads(1)
folder = Path(sys.argv[1])
data = t.text_data('python', vocab_size=300, sequence_length=32, max_bytes=100_000, cache_dir=sys.argv[2])
learn = t.make(None, data, dropout=False, model=t.from_scratch('sharede_v3', 'tiny', seed=0, expert_bias=True, **t.SMALL), cbs=[t.T.Checkpoint(folder/'checkpoints')]).distribute(cpu=True)
assert learn.dls.train.world == 2
t.fit(learn)
from safetensors.torch import save_file
save_file({{n: x.contiguous().clone() for n, x in learn.model.state_dict().items()}}, folder/f'state{{os.environ["RANK"]}}.safetensors')
import torch.distributed as dist; dist.destroy_process_group()
'''

def test_two_processes_train_as_one(data, cache, tmp_path):
    from safetensors.torch import load_file
    code = TWO.format(tests=str(ROOT/'tests'), root=str(ROOT))
    (tmp_path/'two.py').write_text(code)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                           str(tmp_path/'two.py'), str(tmp_path), str(cache)],
                          capture_output=True, text=True, timeout=300,
                          env=dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (load_file(tmp_path/f'state{r}.safetensors') for r in range(2))
    assert_same(a, b)
    one = fit(make(None, data, dropout=False,
                   model=from_scratch('sharede_v3', 'tiny', seed=0, expert_bias=True, **SMALL))).model.state_dict()
    assert all(torch.allclose(one[n], a[n], atol=2e-3) for n in a)
    assert [p.name for p in T.checkpoints(tmp_path/'checkpoints')] == ['step-00000009']

# settings of a resumed run

CHANGES = [('lr', dict(lr=1e-4), '0.005, not 0.0001'), ('weight_decay', dict(weight_decay=.5), 'not 0.5'),
           ('betas', dict(betas=(.8, .99)), '0.9, not 0.8'), ('betas', dict(betas=(.9, .5)), 'not 0.5'),
           ('grad_clip', dict(grad_clip=.01), 'not 0.01'), ('warmup_steps', dict(warmup_steps=2), 'not 2'),
           ('final_lr_fraction', dict(final_lr_fraction=.9), 'not 0.9'), ('bf16', dict(bf16=True), 'False, not True')]

@pytest.mark.parametrize('name, kw, said', CHANGES, ids=str)
def test_another_setting_is_refused_or_applied_by_name(name, kw, said, saved, data, tmp_path):
    folder = copy(saved, tmp_path, 6)
    learn = make('smoe', data, **kw)
    T.resume(learn, folder)
    with pytest.raises(ValueError, match=f'other settings: its {name}.*{said}.*change='): fit(learn)
    assert learn.step == 6 and learn.resumed                  # nothing was done, and it can still go on
    T.resume(learn, folder, change=name)
    with pytest.warns(UserWarning, match=f'going on from step-00000006 with other settings: {name}'): fit(learn)
    h = learn.opt.hypers[0]
    assert learn.step == 9 and (h['wd'], h['mom'], h['sqr_mom']) == (kw.get('weight_decay', learn.wd),
                                                                     *kw.get('betas', (h['mom'], h['sqr_mom'])))

@pytest.mark.parametrize('how, kw, name',
                         [('fit_cosine', dict(lr=1e-4), 'lr'), ('fit_cosine', dict(wd=.3), 'weight_decay'),
                          ('fit_cosine', dict(warmup_steps=1), 'warmup_steps'), ('fit_one_cycle', {}, 'schedule of'),
                          ('fit', {}, 'lr')])
def test_what_the_fit_is_told_counts_too(how, kw, name, saved, data, tmp_path):
    folder = tmp_path
    if how == 'fit_cosine': copy(saved, tmp_path, 6)
    else: killed(data, tmp_path, how)
    learn = make('smoe', data)
    T.resume(learn, folder)
    other = dict(kw) if how == 'fit_cosine' else dict(lr_max=1e-4) if how == 'fit_one_cycle' else dict(lr=1e-4)
    with pytest.raises(ValueError, match=f'other settings: its {name}'): fit(learn, how, **other)
    fit(learn, how)                                           # as it was asked at first
    assert learn.step == 9

def killed(data, folder, how):
    with pytest.raises(KeyboardInterrupt): fit(make('smoe', data, cbs=[T.Checkpoint(folder, every=6), Stop(6)]), how)

def test_epochs_losses_and_configuration_are_settings(saved, data, tmp_path):
    folder = copy(saved, tmp_path, 6)
    for other, epochs, name in [(make('smoe', data), 4, 'epochs'),
                                (make('smoe', data, model=from_scratch('smoe', 'tiny', router_aux_loss_coef=.5,
                                                                       **SMALL)), 3, 'model.moe.router_aux_loss_coef'),
                                (make('smoe', data, model=from_scratch('smoe', 'tiny', top_k=2, **SMALL)),
                                 3, 'model.moe.top_k'),
                                (make('smoe', data, model=from_scratch('smoe', 'tiny', routed_scaling_factor=2.,
                                                                       **SMALL)), 3, 'model.moe.options')]:
        T.resume(other, folder)
        with pytest.raises(ValueError, match=name): fit(other, epochs=epochs)

def test_what_changes_roundings_only_is_applied_and_said(saved, data, tmp_path):
    folder = copy(saved, tmp_path, 6)
    same, parts = make('smoe', data, dropout=False), make('smoe', data, dropout=False, grad_accum=2)
    for l in (same, parts): T.resume(l, folder)
    fit(same)
    with pytest.warns(UserWarning, match='grad_accum is 2, was 1'): fit(parts)
    assert all(torch.allclose(a, b, atol=1e-3)
               for a, b in zip(same.model.state_dict().values(), parts.model.state_dict().values()))

def test_checkpoints_without_settings_go_on(saved, data, tmp_path):
    path = copy(saved, tmp_path, 6)/'step-00000006'/'checkpoint.json'
    info = json.loads(path.read_text()); del info['settings'], info['seal']
    path.write_text(json.dumps(dict(info, seal=T._seal(info))))
    learn = make('smoe', data)
    T.resume(learn, tmp_path)
    assert fit(learn).step == 9

# diverged runs

@pytest.mark.parametrize('grad_clip', [0, 1.])
def test_a_diverged_run_stops_and_keeps_its_checkpoints(grad_clip, data, tmp_path):
    class Ruin(T.Callback):
        order = -50
        def before_batch(self):
            if self.learn.training and self.learn.step == 5:
                with torch.no_grad(): self.learn.model.get_input_embeddings().weight.fill_(math.inf)
    learn = make('smoe', data, grad_clip=grad_clip,
                 cbs=[Ruin(), T.MetricsWriter(tmp_path/'m.jsonl'), T.Checkpoint(tmp_path/'c', every=1)])
    with pytest.warns(UserWarning, match='the loss is nan at step 6: training stops here'): fit(learn)
    assert (learn.step == learn.diverged == 6
            and [p.name for p in T.checkpoints(tmp_path/'c')] == ['step-00000005', 'step-00000004'])
    rows = T.read_metrics(tmp_path/'m.jsonl')
    assert (rows[rows.split == 'train'].step.tolist() == [1, 2, 3, 4, 5, 6] and (rows.split == 'valid').sum() == 2
            and rows.loss.isna().sum() == 2)
    again = make('smoe', data, grad_clip=grad_clip, lr=1e-3)
    T.resume(again, tmp_path/'c', change='lr')
    with pytest.warns(UserWarning, match='lr is 0.001, was 0.005'):
        assert fit(again).step == 9 and again.diverged is None

def test_weights_that_are_no_numbers_push_out_no_checkpoint(data, tmp_path):
    class Ruin(T.Callback):
        order = 40
        def after_step(self):
            if self.learn.step == 9:
                with torch.no_grad(): self.learn.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.warns(UserWarning, match='no checkpoint was saved at step 9'):
        fit(make('smoe', data, cbs=[Ruin(), T.Checkpoint(tmp_path, every=3)]))
    assert [p.name for p in T.checkpoints(tmp_path)] == ['step-00000006', 'step-00000003']

def test_the_search_for_a_rate_may_diverge(data):
    import warnings
    learn = make('smoe', data)
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.filterwarnings('error', message='the loss is')
        learn.lr_find(num_it=12, end_lr=1e30, stop_div=False, show_plot=False)
    assert learn.diverged is None and fit(learn, epochs=1).step == 3

# folders of runs, in Python and on the command line

def test_a_folder_says_what_differs(tmp_path):
    from libmoe_nb.experiments import compare as experiments
    (tmp_path/'texts').mkdir()
    (tmp_path/'texts'/'a.txt').write_text('\n\n'.join(f'line {i} ' + 'word ' * (i % 7 + 3) for i in range(3000)))
    small = dict(preset='tiny', out=tmp_path/'run', progress=None, steps=4, batch_size=2, sequence_length=16,
                 hidden_size=16, head_dim=8, vocab_size=300, valid_tokens=256, cache_dir=tmp_path/'cache')
    def killed(**kw): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        experiments.train('smoe', tmp_path/'texts', **dict(small, progress=lambda what, *a, **k: killed()
                                                           if what == 'step' and k['step'] == 2 else None))
    for kw, told in [(dict(learning_rate=1e-4), 'preset.learning_rate is 0.005, not 0.0001'),
                     (dict(weight_decay=.3), 'preset.weight_decay is .*, not 0.3'),
                     (dict(grad_clip=.2), 'preset.grad_clip is .*, not 0.2'),
                     (dict(warmup_steps=3), 'preset.warmup_steps is .*, not 3'),
                     (dict(bf16=True), 'bf16 is False, not True'),
                     (dict(betas=(.8, .9)), 'preset.betas is .*, not .0.8, 0.9.')]:
        with pytest.raises(ValueError, match=f'another configuration: its {told}'):
            experiments.train('smoe', tmp_path/'texts', **dict(small, **kw))
    assert T.checkpoints(tmp_path/'run'/'checkpoints')[0].name == 'step-00000002'
    assert experiments.train('smoe', tmp_path/'texts', **small)['tokens'] == 4 * 2 * 16
