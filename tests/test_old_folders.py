"Folders that libmoe-nb 0.1 wrote (fixtures/make.py): they are opened, gone on with, and hold what they held then."
import json, shlex, shutil
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from libmoe_nb.experiments.analysis import measure_trace
from libmoe_nb.experiments.inspect import load_subject
from libmoe_nb.cli import app
from libmoe_nb.data.text import text_data
from libmoe_nb.evaluation.harness import evaluate
from libmoe_nb.evaluation.results import Evaluation
from libmoe_nb.experiments.compare import compare, print_progress, train
from libmoe_nb.experiments.reports import read_comparison
from libmoe_nb.evaluation.suites import Suite
from libmoe_nb.analysis.traces import read_trace, write_trace
from libmoe_nb.analysis.tracing import moe_layers
from libmoe_nb.evaluation.heldout import evaluate_perplexity
from libmoe_nb.training.log import read_log
from libmoe_nb.experiments.upcycle import upcycle_and_train
from libmoe_nb.models.wrapping import load_upcycled

pytestmark = pytest.mark.usefixtures('undrawn')
FIXTURES = Path(__file__).resolve().parent/'fixtures'
EXPECTED = json.loads((FIXTURES/'expected.json').read_text(encoding='utf-8'))
RUNS = {n.split('-')[0]: n for n in EXPECTED['runs']['names']}
SIZES = dict(hidden_size=8, num_attention_heads=2, head_dim=4, num_experts=4, top_k=2, moe_intermediate_size=8)
RUN = dict(SIZES, data='text', preset='tiny', vocab_size=384, sequence_length=32, batch_size=4, steps=3, warmup_steps=1,
           learning_rate=.03, device='cpu', threads=1)
UPCYCLING = dict(name='dense', data='text', steps=4, batch_size=2, sequence_length=32, lr=3e-3, num_experts=4, top_k=2,
                 device='cpu', threads=1)
INPUTS = dict(input_ids=torch.arange(18).view(2, 9) * 5 % 61 + 1)
PIXELS = dict(pixel_values=torch.linspace(-2, 2, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8))

@pytest.fixture(autouse=True)
def old(tmp_path, monkeypatch):
    "A copy of all folders as the current one, whose prepared text is used"
    shutil.copytree(FIXTURES, tmp_path/'old', ignore=shutil.ignore_patterns('make.py', '__pycache__'))
    monkeypatch.chdir(tmp_path/'old')
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'old'/'cache'))
    for p in Path().glob('upcycled_*/config.json'):           # which names the dense model by its whole path
        d = json.loads(p.read_text(encoding='utf-8'))
        assert d['run']['model'] == 'FIXTURES/dense'
        d['run']['model'] = str(Path('dense').resolve())
        p.write_text(json.dumps(d), encoding='utf-8')

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

class Told:
    "A `progress` that remembers what it is told, and says it"
    def __init__(self): self.started, self.steps, self.events = [], [], []
    def __call__(self, event, name=None, **kw):
        self.events.append(event)
        if event == 'start': self.started.append(name)
        if event == 'step': self.steps.append((name, kw['step']))
        if event == 'finish': print_progress(event, name, **kw)

def near(got, want, rel=1e-5, at=''):
    "All that is in `want`, which may not be all that is in `got`"
    if isinstance(want, dict):
        for k, v in want.items(): near(got[k], v, rel, f'{at}.{k}')
    elif isinstance(want, list):
        assert len(got) == len(want), at
        for i, (g, w) in enumerate(zip(got, want)): near(g, w, rel, f'{at}[{i}]')
    elif isinstance(want, float): assert got == pytest.approx(want, rel=rel, abs=rel and 1e-6), at
    else: assert got == want, at

def plain(df): return json.loads(df.to_json(orient='records', double_precision=15))

def means(df):
    df = df.select_dtypes('number')
    return dict(rows=len(df), **{c: None if np.isnan(v) else float(v) for c, v in df.mean().items()})

@torch.no_grad()
def output(model, **inputs):
    out = model.eval()(**inputs)[0].double()
    return [out.abs().sum().item(), *out.flatten()[:4].tolist()]

def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob('*') if p.is_file() and p.name[0] != '.'}

def libmoe(*args):
    res = CliRunner().invoke(app, [str(a) for a in args])
    assert res.exit_code == 0, (res.output, res.exception)
    return res

# comparisons

def test_comparison():
    c, want = read_comparison('runs'), EXPECTED['runs']
    assert [f.name for f in c.folders] == want['names'] and c.config['data']['fingerprint'] == want['fingerprint']
    for t in 'results domain_results runs domains'.split(): near(plain(getattr(c, t)), want[t], 0, t)
    for t in 'scores score_tests'.split(): near(plain(getattr(c, t)), want[t], at=t)
    for t in 'curves training routing loads samples score_curves change_rate saturation margin'.split():
        near(means(getattr(c, t)), want[t], at=t)
    page = c.report()
    for s in 'XMoE', 'MoE++', 'Zero-shot scores', 'Routers over training', 'How choices settle': assert s in page, s

def test_comparison_is_not_repeated(capsys):
    before, told = stamps('runs'), Told()
    c = compare([*RUNS], out='runs', evaluate=4, progress=told, **RUN)
    assert not told.started and 'evaluate' not in told.events and capsys.readouterr().out.count('finished before') == 4
    assert [f.name for f in c.folders] == EXPECTED['runs']['names']
    changed = {p.name for p, t in stamps('runs').items() if before.get(p) != t}
    assert changed == {'results.csv', 'domains.csv', 'results.json', 'report.html'}
    near(json.loads(Path('runs/results.json').read_text())['results'], EXPECTED['runs']['results'], 0)

@pytest.mark.long
def test_another_recipe_beside_finished_ones():
    told = Told()
    c = compare([*RUNS, 'tcmoe'], out='runs', evaluate=4, progress=told, **RUN)
    assert [n.split('-')[0] for n in told.started] == ['tcmoe'] and len(c.results) == 6 and len(c.scores) == 5

def test_commands_of_comparisons():
    res = libmoe('report', 'runs')
    assert 'XMoE' in res.stdout and 'Unigram' in res.stdout and Path('runs/report.html').is_file()
    again = libmoe(*shlex.split(EXPECTED['runs']['command'])[1:], '--device', 'cpu', '--json')
    assert '4 of 4 runs are finished already' in again.stderr
    near(json.loads(again.stdout)['results'], EXPECTED['runs']['results'], 0)

def test_interrupted_training_goes_on():
    told = Told()
    res = train('sharede_v3', out='interrupted', evaluate=4, progress=told, **RUN)
    assert told.steps == [('interrupted', 3)]
    near(res, EXPECTED['resumed'])
    lines = read_log('interrupted/metrics.jsonl')
    assert lines[lines.split == 'train'].step.tolist() == [1, 2, 3]
    assert not Path('interrupted/checkpoints').exists() and len([*Path('interrupted/traces').iterdir()]) == 4
    assert len(res['evaluation']['results']) > 4

# text

def test_prepared_text_is_used():
    before = stamps('cache')
    data = text_data('text', vocab_size=384, sequence_length=32)
    assert data.fingerprint == EXPECTED['runs']['fingerprint'] and data.domains == ['code', 'tales']
    text_data('text', tokenizer=AutoTokenizer.from_pretrained('dense'), sequence_length=32)
    assert {p: t for p, t in stamps('cache').items() if p.suffix != '.lock'} == before

def test_text_is_prepared_alike(tmp_path):
    was = text_data('text', vocab_size=384, sequence_length=32)
    now = text_data('text', vocab_size=384, sequence_length=32, cache_dir=tmp_path/'new')
    for side in 'train', 'valid': assert np.array_equal(getattr(was, side).tokens, getattr(now, side).tokens)
    written = [json.loads((d.folder/'tokenizer.json').read_text(encoding='utf-8')) for d in (was, now)]
    if written[0] != written[1]: pytest.skip('tokenizers writes other files now, which have another fingerprint')
    assert now.fingerprint == was.fingerprint

# models

@pytest.mark.parametrize('name', [n for n in EXPECTED['models'] if n != 'lora'])
def test_model(name):
    causal, inputs = name not in ('upcycled_bert', 'upcycled_clip'), PIXELS if 'clip' in name else INPUTS
    model = AutoModelForCausalLM.from_pretrained(f'models/{name}') if causal else load_upcycled(f'models/{name}')
    near(output(model, **inputs), EXPECTED['models'][name])
    assert len(moe_layers(model)) == (0 if name == 'dense' else 1 if name in ('xmoe_layer_1', 'upcycled_clip') else 2)
    file, = Path('models', name).glob('*.safetensors')
    model.save_pretrained('again')
    new, was = load_file(Path('again')/file.name), load_file(file)
    assert new.keys() == was.keys() and all(np.array_equal(new[n], t) for n, t in was.items())

def test_adapters():
    peft = pytest.importorskip('peft', reason='pip install peft')
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('models/smoe'), 'models/lora')
    near(output(model, **INPUTS), EXPECTED['models']['lora'])

@pytest.mark.parametrize('recipe', RUNS)
def test_trained_model(recipe):
    folder = Path('runs', RUNS[recipe], 'model')
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    data = text_data('text', vocab_size=384, sequence_length=32)
    assert tokenizer('the old harbour').input_ids == data.tokenizer('the old harbour').input_ids
    run, = [r for r in EXPECTED['runs']['runs'] if r['recipe'] == recipe]
    e = evaluate_perplexity(model, data, 16)
    near([e['perplexity'], e['loss'], e['tokens']], [run['perplexity'], run['loss'], run['valid_tokens']])

# traces, suites, scores, analyses

def test_trace(tmp_path):
    trace = read_trace('trace.safetensors')
    assert (trace.recipe, trace.domains, trace.meta['info']) == ('tcmoe', ['tales', 'code'], dict(step=7))
    near({n: means(t) for n, t in measure_trace(trace).items()}, EXPECTED['trace'])
    batch = dict(INPUTS, domain=torch.tensor([[0], [1]]).expand(2, 9))
    model = AutoModelForCausalLM.from_pretrained('models/tcmoe')
    new = write_trace(model, [batch], tmp_path/'new.safetensors', domains=trace.domains, info=trace.meta['info'])
    assert new.same_probe(trace) and {k: new.meta[k] for k in trace.meta} == trace.meta
    assert not new.columns and not trace.columns                 # which files have had since
    for a, b in zip(load_file(tmp_path/'new.safetensors').items(), load_file('trace.safetensors').items()):
        assert a[0] == b[0] and np.allclose(a[1], b[1], rtol=1e-3, atol=1e-5), a[0]   # of 16 bits, some of them

def test_suites_and_scores():
    suite, want = Suite.load('suite.jsonl'), EXPECTED['suite']
    assert suite.fingerprint == want['fingerprint'] and {n: len(t) for n, t in suite.tasks.items()} == want['tasks']
    path, = Path('runs').glob('suite-4-*.jsonl')
    assert Suite.load(path).fingerprint == read_comparison('runs').evaluations[0]['suite']['fingerprint']
    was = Evaluation.load('evaluation')
    near(plain(was.results), EXPECTED['evaluation'], 0)
    asked = was.samples.drop_duplicates(['task', 'doc', 'intervention'])
    assert len(was.documents) == len(asked) == 2 * 2 * len(suite.tasks)
    assert 'drop_top1' in was.table() and 'drop_top1' in was.score_change().index
    options = dict(intervention='drop_top1', limit=2, device='cpu', progress=False)
    now = evaluate(f"runs/{RUNS['moe_plus_plus']}", suite, **options)
    near(plain(now.results), EXPECTED['evaluation'])

def test_analysis():
    was = json.loads(Path('analysis/analysis.json').read_text(encoding='utf-8'))
    near(was['summary'], EXPECTED['analysis'])
    args = '--tokens', 256, '--out', 'again', '--device', 'cpu', '--threads', 1, '--json'
    now = json.loads(libmoe('analyze', f"runs/{RUNS['xmoe']}", *args).stdout)
    # experts at random are drawn by the bits of logits, which differ between processors
    drawn = {('output similarity', 'random'), *(('loss change: random routing', k) for k in ('value', 'meaning'))}
    near(now['summary'], [{k: v for k, v in r.items() if (r['metric'], k) not in drawn} for r in EXPECTED['analysis']])
    near({r['metric']: r['random'] for r in now['summary']}, {'output similarity': .41}, .2)
    assert now['held_out'] and now['own_data'] and now['domains'] == was['domains']
    assert {p.name for p in Path('analysis').iterdir()} <= {p.name for p in Path('again').iterdir()}
    a, b = read_trace('analysis/trace.safetensors'), read_trace('again/trace.safetensors')
    assert a.same_probe(b) and np.array_equal(a.choice, b.choice)

# upcycling

def rows(df): return plain(df.reset_index())

def test_upcycling_is_not_repeated(capsys):
    before, told = stamps('upcycled_run'), Told()
    table = upcycle_and_train(recipe='smoe', out='upcycled_run', progress=told, **UPCYCLING)
    near(rows(table), EXPECTED['upcycled']['done'], 0)
    assert not told.started and 'model' not in told.events and stamps('upcycled_run') == before
    s = load_subject('upcycled_run', device='cpu')
    e = evaluate_perplexity(s.model, text_data('text', tokenizer=s.tokenizer, sequence_length=32), 8)
    near(e['perplexity'], EXPECTED['upcycled']['done'][1]['after'])

def test_interrupted_upcycling_goes_on(capsys):
    told = Told()
    table = upcycle_and_train(recipe='sharede_v2', layers=[1], out='upcycled_interrupted', progress=told, **UPCYCLING)
    assert told.started == ['sharede_v2'] and told.steps == [('sharede_v2', 3), ('sharede_v2', 4)]
    near(rows(table), EXPECTED['upcycled']['resumed'])
    assert 'dense: perplexity' in (said := capsys.readouterr().out) and said.count('finished before') == 1
