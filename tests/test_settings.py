"""Every setting, given every way, with values that are wrong in every way.

It is read with the right type, or refused in one sentence before any work."""
import dataclasses, decimal, json, math, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings as how, strategies as st
from typer.testing import CliRunner

from conftest import write_texts
from processes import run_forked, run_unheard
from libmoe_nb.moe import config
from libmoe_nb import cli, listing, options
from libmoe_nb.cli import app
from libmoe_nb.core.settings import known_interventions, read_setting, settings
from libmoe_nb.moe.config import apply_overrides, MoESpec, Preset, get_preset, presets, recipes
from libmoe_nb.data.text import text_data
from libmoe_nb.core.machine import use_threads
from libmoe_nb.experiments.compare import compare
from libmoe_nb.moe.recipes import build_layer, recipe_options
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.models.configuration import MoEConfig
from libmoe_nb.models.counting import count_parameters
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.models.initialisations import initialisations
from libmoe_nb.models.upcycling import upcycle

pytestmark = pytest.mark.usefixtures('undrawn')
LAYER = [f.name for f in dataclasses.fields(MoESpec)]
MODEL = [f.name for f in dataclasses.fields(Preset)]

class Broken:
    "Cannot be shown or compared"
    def __repr__(self): return 1 / 0
    def __eq__(self, other): return 1 / 0

BROKEN = Broken()
NASTY = [None, True, False, -1, 0, 1, 2, .5, 1., -1., 1e18, 1e300, 10**400, -10**400, 10**5000, math.nan, math.inf,
         -math.inf, 5e-324, '', ' ', 'no', 'off', 'yes', 'abc', 'NaN', '-1', '0', '1', '1e400', '0.9,0.95', '[0.9]',
         '[0.9, 0.95]', '{"a": 1}', '{}', 'null', '\0', '\ud800', 'é', '9' * 5000, '[' * 50_000, [], [1], [.1, .2],
         [.1, 'x'], (.1, .2), (math.nan, 0), [[.1], [.2]], {}, {1: 2}, {'num_zero': 1}, {.1: 1, .2: 2}, set(), b'1', 1j,
         decimal.Decimal(1), np.float32(.5), np.int64(3), np.nan, np.array(1.), np.array([.1, .2]), np.bool_(True),
         torch.tensor(1), torch.tensor([1, 2]), object(), BROKEN, len, int]

def told(e, name):
    "One sentence that names the setting and what was expected"
    s = str(e.value if hasattr(e, 'value') else e)
    assert s.startswith(f'{name} must be ') and ', got ' in s and '\n' not in s and len(s) < 400, s

def right(kind, v):
    "Has a value that was read the type that its kind promises?"
    if v is None: return True
    if kind is settings['gated']: return type(v) is bool
    e = kind.expected
    if e.startswith('a whole number'): return type(v) is int
    if e.startswith('two numbers'):
        return type(v) is tuple and len(v) == 2 and all(type(x) in (int, float) and math.isfinite(x) for x in v)
    if e.startswith(('a number', 'above', 'a finite')): return type(v) in (int, float) and math.isfinite(v)
    return isinstance(v, (str, dict, bool))

@pytest.mark.parametrize('name', settings)
def test_a_setting_is_read_or_refused(name):
    for value in NASTY:
        try: v = read_setting(name, value)
        except ValueError as e: told(e, name)
        else:
            assert right(settings[name], v), (name, value, v)
            assert name == 'options' or read_setting(name, v) == v

@pytest.mark.parametrize('cls, name', [*((MoESpec, n) for n in LAYER), *((Preset, n) for n in MODEL)])
def test_fields_in_python(cls, name):
    base = {} if cls is MoESpec else dataclasses.asdict(get_preset('tiny'))
    default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
    for value in NASTY:
        try: made = cls(**base | {name: value})
        except ValueError as e: assert ' must be ' in str(e) and '\n' not in str(e), str(e)
        else: assert value is None and default is None or right(settings[name], getattr(made, name)), (name, value)

@how(max_examples=300, deadline=None)
@given(st.sampled_from([n for n in {*LAYER, *MODEL} if n not in ('name', 'recipe', 'options')]),
       st.one_of(st.text(max_size=12), st.sampled_from([v for v in NASTY if isinstance(v, str)]), st.floats().map(str),
       st.integers().map(str),
       st.lists(st.floats()).map(str), st.recursive(st.none() | st.booleans() | st.floats(), st.lists).map(json.dumps)))
def test_set_on_the_command_line(name, text):
    try: kw = options.read_options(dict(max_bytes=0, set=[f'{name}={text}']))
    except ValueError as e: return told(e, name)
    assert right(settings[name], kw[name])
    try:
        p, layer = apply_overrides('tiny', {name: kw[name]})
        p.spec('smoe', **layer)
    except ValueError as e: assert ' must be ' in str(e)

def test_every_field_is_in_the_table():
    assert {*LAYER, *MODEL} <= {*settings}
    for r in config.own_recipes:
        known = recipe_options(r)                                    # a list: none of ours takes whatever it is given
        assert {*known} <= {*settings} and {*known} <= {*options.recipe_option_names}, r
        with pytest.raises(ValueError, match=f"unknown option of {r} 'shraed_gate'"):
            from_scratch(r, 'tiny', shraed_gate=1)
    for f in [f for c in (MoESpec, Preset) for f in dataclasses.fields(c) if f.default is not dataclasses.MISSING
              and f.default is not None]:
        assert read_setting(f.name, f.default) == f.default
    for p in presets.values(): assert dataclasses.replace(p) == p

def test_words():
    for v in ('no', 'off', '0', 'false', 'No', ' FALSE '): assert MoESpec(norm_topk_prob=v).norm_topk_prob is False
    for v in ('yes', 'on', '1', 'true'): assert MoESpec(gated=v).gated is True
    assert from_scratch('smoe', 'tiny', norm_topk_prob='no').config.spec.norm_topk_prob is False

@pytest.mark.parametrize('bad', [dict(grad_clip=-1), dict(weight_decay=-.1), dict(router_z_loss_coef=-1),
                                 dict(warmup_steps=-5), dict(final_lr_fraction=5), dict(betas=.9), dict(betas=(.9, 1.)),
                                 dict(expert_init_std=.02),
                                 dict(gated='perhaps'), dict(router_aux_loss_coef='abc'), dict(learning_rate=math.nan),
                                 dict(router_init_std=1e300), dict(num_experts=10**9), dict(steps=10**400),
                                 dict(bf16='maybe'), dict(valid_tokens=0),
                                 dict(threads=10**9), dict(device='foo'), dict(device='cuda:77'), dict(text_field=3),
                                 dict(seeds=1.5), dict(seeds=[-1]), dict(options=dict(xmoe=dict(temperature=0))),
                                 dict(options=dict(smoe=dict(n_group='x')))])
def test_compare_in_python(bad, tmp_path):
    with pytest.raises(ValueError, match=' must be | is not to be had') as e:
        compare('smoe,xmoe', 'python', 'tiny', out=tmp_path/'runs', progress=lambda event, *a, **k: pytest.fail(event),
                **bad)
    assert not (tmp_path/'runs').exists() and '\n' not in str(e.value)

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    box = tmp_path_factory.mktemp('data')
    return text_data(write_texts(box/'texts'), vocab_size=300, sequence_length=32, cache_dir=box/'cache')

@pytest.mark.parametrize('name', ['batch_size', 'steps', 'lr', 'weight_decay', 'betas', 'grad_clip',
                                  'warmup_steps', 'final_lr_fraction', 'grad_accum', 'bf16', 'fp16', 'nonfinite',
                                  'expert_bias_rate', 'seed',
                                  'valid_batch_size', 'valid_steps', 'domains'])
def test_moe_learner(name, data):
    model = from_scratch('smoe', 'tiny', vocab_size=data.vocab_size)
    for bad in (-1, 'abc', math.nan, math.inf, [1], BROKEN):
        with pytest.raises(ValueError) as e: moe_learner(model, data, preset='tiny', **{name: bad})
        told(e, name)
    learn = moe_learner(model, data, preset='tiny', device='cpu', betas=[.8, .9], bf16='no')
    assert learn.bf16 is False
    for bad in (dict(final_lr_fraction=2), dict(warmup_steps=-1), dict(lr=-1)):
        with pytest.raises(ValueError, match='must be'): learn.fit_cosine(1, **bad)
    with pytest.raises(ValueError, match='device must be'): moe_learner(model, data, preset='tiny', device='foo')

@pytest.mark.parametrize('kw', [dict(init='drop', drop_ratio=2), dict(init='drop', drop_ratio='x'), dict(noise=-1),
                                dict(rescale='perhaps'), dict(exact=3), dict(seed=-1), dict(router_init_std=-1),
                                dict(top_k=1.5)])
def test_upcycle(kw):
    model = from_scratch('dense', 'tiny')
    with pytest.raises(ValueError, match=' must be '): upcycle(model, 'smoe', **dict(num_experts=4) | kw)

def test_what_was_saved(tmp_path):
    "In a file a word once meant yes, whatever it said: it is no number that changes in silence"
    moe = MoESpec(norm_topk_prob=False).to_dict()
    assert MoEConfig(moe=json.loads(json.dumps(moe))).spec.norm_topk_prob is False
    with pytest.raises(ValueError, match="norm_topk_prob must be true or false where it was saved, got 'no'"):
        MoEConfig(moe=moe | dict(norm_topk_prob='no'))
    with pytest.raises(ValueError, match='router_init_std must be'): MoEConfig(moe=moe | dict(router_init_std='x'))

# what is known before torch is

def test_lists_that_are_written_twice():
    from libmoe_nb.moe.experts import activations
    from libmoe_nb.evaluation.perturbations import intervention_makers
    from libmoe_nb.training.trackers import trackers
    assert {n: r.title for n, r in recipes.items() if n in config.own_recipes} == config.own_recipes
    for n in activations: assert read_setting('hidden_act', n) == n
    for n in ('copy', 'drop', 'split', 'virtual_group', 'random', 'shared_only'):
        assert n in initialisations and n in options.init_names
    assert {*intervention_makers} == {*known_interventions} and {*trackers} == {*options.tracker_names}
    for r in config.sharing_recipes:
        with pytest.raises(ValueError, match='at least 1'): build_layer(MoESpec(r, num_shared_experts=0))
    for p in presets:
        for r in config.own_recipes:
            with torch.device('meta'): c = count_parameters(from_scratch(r, p))
            assert listing.parameter_count(r, presets[p]) == dict(total=c['total'], active=c['active']), (p, r)

TYPOS = ['compare --recipes smo', 'compare --preset huge', 'compare --steps 0', 'compare --seeds 0',
         'compare --data /nope', 'compare --data a.txt', 'compare --device foo', 'compare --threads 0',
         'compare --threads -1', 'compare --threads 1000000000',
         'compare --set grad_clip=-1', 'compare --set stesp=3', 'compare --set betas=0.9', 'compare --examples 0',
         'compare --num-experts 4 --top-k 5', 'compare --learning-rate nan', 'compare --out /dev/null/x',
         'compare --log wanb', 'compare --set seeds=3',
         'compare --set progress=1', 'train smo', 'train sharede_v3 --top-k 1', 'train smoe --device gpu',
         'train smoe --batch-size 0', 'train smoe --seed -1', 'train smoe --set norm_topk_prob=perhaps',
         'upcycle /nope', 'upcycle smollm2 --recipe smo', 'upcycle smollm2 --init cop',
         'upcycle smollm2 --set drop_ratio=2', 'upcycle smollm2 --set inplace=1', 'upcycle smollm2 --steps 0',
         'upcycle smollm2 --device foo', 'upcycle smollm2 --data /nope',
         'upcycle smollm2 --learning-rate -1', 'upcycle smollm2 --threads 0', 'analyze /nope', 'analyze . --device foo',
         'analyze . --threads -1', 'analyze . --tokens 0', 'analyze . --batch-size 0', 'analyze . --data /nope',
         'analyze . --max-bytes -1',
         'evaluate /nope --data python', 'evaluate . --data python --device foo',
         'evaluate . --data python --threads -1', 'evaluate . --data python --examples 0',
         'evaluate . --data python --limit 0', 'evaluate . --data python --limit inf',
         'evaluate . --data python --limit 1.5', 'evaluate . --data /nope', 'evaluate . --suite /nope',
         'evaluate . --tasks x --intervene dropp', 'evaluate . --tasks x --batch-size ²',
         'evaluate . --tasks x --num-fewshot -1', 'evaluate .', 'report /nope']
HEAVY = 'torch transformers pandas matplotlib fastai datasets tokenizers lm_eval scipy'.split()

def test_typos_are_told_without_heavy_modules(tmp_path):
    code = ('import sys, json\nfrom typer.testing import CliRunner\nfrom libmoe_nb.cli import app\n'
            'for a in json.loads(sys.argv[1]) + [["list"], ["list", "--json"], ["-h"], ["train", "-h"], '
            '["--version"]]:\n'
            '    r = CliRunner().invoke(app, a, prog_name="libmoe")\n'
            f'    print(json.dumps([a, r.exit_code, r.stdout, r.stderr, repr(r.exception), [m for m in {HEAVY} if m in '
            f'sys.modules]]))\n')
    res = subprocess.run([sys.executable, '-c', code, json.dumps([t.split() for t in TYPOS])], capture_output=True,
                         text=True, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(Path(cli.__file__).parents[1])))
    rows = [json.loads(l) for l in res.stdout.splitlines()]
    assert len(rows) == len(TYPOS) + 5, res.stderr
    for args, code, out, err, exception, heavy in rows:
        assert not heavy, (args, heavy)
        if args in (['list'], ['list', '--json'], ['-h'], ['train', '-h'], ['--version']): assert code == 0 and out
        else:
            assert (code == 2 and out == '' and err.startswith('libmoe: ')
                    and err.count('\n') == 1), (args, code, out, err, exception)
    assert not list(tmp_path.iterdir())
    assert 'train [OPTIONS] RECIPE' in rows[-2][2] and '{' not in rows[-2][2]

@pytest.mark.parametrize('command', ['analyze', 'evaluate', 'upcycle', 'train', 'compare'])
def test_devices_that_are_not_here(command, tmp_path, data):
    "A GPU that is not here is refused before anything is read"
    model = from_scratch('dense' if command == 'upcycle' else 'smoe', 'tiny', vocab_size=data.vocab_size)
    model.save_pretrained(tmp_path/'model'); data.tokenizer.save_pretrained(tmp_path/'model')
    args = dict(analyze=[str(tmp_path/'model')], evaluate=[str(tmp_path/'model')], upcycle=[str(tmp_path/'model')],
                train=['smoe'], compare=[])[command]
    for device in ('cuda:77', 'foo', *([] if torch.cuda.is_available() else ['cuda'])):
        out = ['--out', str(tmp_path/'out')]
        res = CliRunner().invoke(app, [command, *args, '--data', 'python', '--device', device, *out])
        assert (res.exit_code == 2 and res.stderr.startswith('libmoe: device')
                and res.stderr.count('\n') == 1), res.stderr
    assert not (tmp_path/'out').exists()

def test_threads():
    before = torch.get_num_threads()
    for bad in (-1, 0, 10**9, 1.5, 'x', True):
        with pytest.raises(ValueError, match='threads must be'): use_threads(bad)
    assert torch.get_num_threads() == before

# sizes at the edge

SMALL = '--preset tiny --steps 2 --batch-size 4 --sequence-length 64 --vocab-size 300 --threads 1 --traces 256'.split()

@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
    return str(write_texts(tmp_path/'texts'))

def test_shared_experts_concern_recipes_that_have_them(texts, tmp_path):
    for args in (['smoe', '--top-k', '1'], ['xmoe', '--top-k', '1', '--num-experts', '1']):
        res = CliRunner().invoke(app, ['train', *args, '--data', texts, *SMALL, '--out',
                                       str(tmp_path/'-'.join(args)), '--json'])
        assert res.exit_code == 0, res.stderr
    res = CliRunner().invoke(app, ['analyze', str(tmp_path/'-'.join(args)), '--tokens', '300', '--out',
                                   str(tmp_path/'analysis')])
    # a mixture of one expert
    assert res.exit_code == 0 and (tmp_path/'analysis'/'report.html').exists(), res.stderr

# where words go

MAIN = 'from libmoe_nb.cli import main; main()'

def test_words_go_to_any_terminal(texts, tmp_path):
    args = ['compare', '--data', texts, '--recipes', 'smoe', '--seeds', '2', *SMALL, '--out', tmp_path/'runs']
    env = dict(os.environ, PYTHONIOENCODING='ascii')
    res = run_forked(MAIN, *args, env=env)
    assert res.returncode == 0, res.stderr
    assert '+/-' in res.stdout and 'report:' in res.stdout and (res.stdout + res.stderr).isascii()
    assert run_unheard(MAIN, 'report', tmp_path/'runs', env=env) == 0

# a command that imports nothing heavy says as much to each of them as one that takes ten seconds
ENDS = [('list', 0, end) for end in ('>&- 2>&-', '| true', '2>&1 | true', '>&-', '2>&-')]
ENDS += [('train smo', 2, end) for end in ('2>&1 | true', '2>&-')]

@pytest.mark.parametrize('command, code, end', [
    pytest.param(*e, marks=[pytest.mark.long] * (e not in (ENDS[0], ENDS[5]))) for e in ENDS])
def test_words_go_to_nobody(command, code, end):
    shell = f'"{sys.executable}" -W ignore -c "{MAIN}"'
    env = dict(os.environ, PYTHONIOENCODING='ascii', LC_ALL='C')
    r = subprocess.run(['bash', '-c', f'{shell} {command} {end}; exit ${{PIPESTATUS[0]}}'], capture_output=True,
                       text=True, timeout=300, env=env)
    assert r.returncode == code and 'Traceback' not in r.stderr and 'Error' not in r.stderr, (r.returncode, r.stderr)
