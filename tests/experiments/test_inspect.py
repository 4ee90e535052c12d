"`libmoe analyze` as a user types it: runs of ours, models of every supported transformers class, bad input."
import json, os, shlex, shutil

import numpy as np, pandas as pd, pytest, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from libmoe_nb.analysis.tiny_models import tiny_moe
from libmoe_nb.experiments.analysis import measure_trace, random_like
from libmoe_nb.experiments.inspect import analyze, load_subject
from libmoe_nb.cli import app
from libmoe_nb.data.text import text_data
from libmoe_nb.experiments.compare import compare, train
from libmoe_nb.experiments.reports import read_comparison
from libmoe_nb.analysis.metrics import expert_allocation_entropy
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.analysis.traces import make_trace, read_trace
from test_adapters import FAMILIES

pytestmark = pytest.mark.usefixtures('undrawn')
transformers.logging.set_verbosity_error()
# every class that the installed transformers has; a few otherwise
ALL = os.environ.get('LIBMOE_ALL_FAMILIES')
FEW = 'mixtral olmoe qwen3_moe gpt_oss deepseek_v3 llama4_text granitemoe longcat_flash'.split()
SMALL = dict(preset='tiny', steps=6, batch_size=4, sequence_length=64, vocab_size=300, threads=1, progress=None)


@pytest.fixture(autouse=True, scope='module')
def surroundings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('LIBMOE_CACHE', str(tmp_path_factory.mktemp('cache')))
        m.setenv('HF_HUB_OFFLINE', '1')
        m.setenv('OMP_NUM_THREADS', os.environ.get('OMP_NUM_THREADS', '2'))
        yield


@pytest.fixture(scope='module')
def runs(texts, tmp_path_factory):
    "A folder of two runs"
    return compare('smoe,moe_plus_plus', texts, out=tmp_path_factory.mktemp('runs'), **SMALL)


@pytest.fixture(scope='module')
def tokenizer():
    "Letters"
    t = Tokenizer(models.WordLevel({'<s>': 0, '?': 1, **{chr(c): c - 29 for c in range(32, 123)}}, unk_token='?'))
    t.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<s>', unk_token='?',
                                                clean_up_tokenization_spaces=False)


def libmoe(*args):
    res = CliRunner().invoke(app, [str(a) for a in args])
    assert res.exception is None or isinstance(res.exception, SystemExit), res.exception
    return res


def refused(says, *args):
    "Exit code 2, one sentence on stderr, nothing on stdout"
    res = libmoe('analyze', *args)
    last = res.stderr.strip().splitlines()[-1]
    assert (res.exit_code, res.stdout) == (2, ''), res.stderr
    assert says in last and last.startswith('libmoe: ') and 'Traceback' not in res.stderr, res.stderr


# our own

def test_a_run(runs, tmp_path, drawn):
    res = libmoe('analyze', runs.folders[0], '--out', tmp_path/'a', '--tokens', 1500, '--json', '--threads', 1)
    assert res.exit_code == 0, res.stderr
    d = json.loads(res.stdout)                            # stdout is the JSON and nothing else
    assert (d['held_out'] and set(d['domains']) == {'tales', 'notes'} and 1000 < d['tokens'] <= 1500
            and d['recipe'] == 'smoe')
    value = {r['metric']: r['value'] for r in d['summary']}
    assert 1 < value['perplexity'] < 400 and 0 < value['allocation entropy'] < 1 and value['dead experts'] < 1
    t = read_trace(tmp_path/'a'/'trace.safetensors')
    assert t.num_tokens == d['tokens'] and t.recipe == 'smoe'
    assert np.isclose(pd.read_csv(tmp_path/'a'/'by_layer.csv').allocation_entropy,
                      expert_allocation_entropy(t, by_domain=False).entropy).all()
    page = (tmp_path/'a'/'report.html').read_text()
    assert ('random routing' in page and page.count('data:image/svg') > 8 and 'src="http' not in page
            and '<script' not in page)
    assert {p.name for p in (tmp_path/'a').iterdir()} >= {'summary.csv', 'co_activation.csv', 'perturbation.csv',
                                                          'vocabulary_specialisation.csv', 'analysis.json',
                                                          'report.html'}
    again = libmoe('analyze', runs.folders[0]/'model', '--out', tmp_path/'b', '--tokens', 1500, '--no-perturb',
                   '--threads', 1)
    assert (again.exit_code == 0 and 'allocation entropy' in again.stdout
            and str(tmp_path/'b'/'report.html') in again.stdout)
    assert (np.asarray(read_trace(tmp_path/'b'/'trace.safetensors').choice) == np.asarray(t.choice)).all()


def test_the_text_of_a_run_is_held_out(runs, texts):
    "What is analysed is what the run was validated on, whether it is asked for by name or not"
    a, b = (analyze(runs.folders[1], num_tokens=1000, perturb=False),
            analyze(str(runs.folders[1]), str(texts), num_tokens=1000, perturb=False))
    assert a.trace.same_probe(b.trace) and a.info['held_out'] and b.info['held_out']
    # a part of it, split anew: who knows
    other = analyze(runs.folders[1], str(texts/'tales'), num_tokens=500, perturb=False)
    assert not other.info['held_out'] and '--data' in other.command()
    s = load_subject(runs.folders[1])
    valid = ''.join((texts/d/f'{i}.txt').read_text() for d in ('tales', 'notes') for i in range(12))
    assert s.tokenizer.decode(a.trace.token[1:20]).strip()[:12] in valid


def test_the_command_makes_it_again(runs, tmp_path):
    "What the report says to type asks the same: the run's own text is not named, and each unusual option is"
    args = ['--out', tmp_path/'a', '--tokens', 700, '--batch-size', 3, '--sequence-length', 50, '--no-perturb']
    words = shlex.split(json.loads(libmoe('analyze', runs.folders[0], *args, '--json', '--threads',
                                          1).stdout)['command'])
    assert words[:3] == ['libmoe', 'analyze', str(runs.folders[0])] and sorted(words[3:]) == sorted(map(str, args))
    a = np.array(read_trace(tmp_path/'a'/'trace.safetensors').choice)
    shutil.rmtree(tmp_path/'a')
    assert libmoe(*words[1:], '--threads', 1).exit_code == 0
    assert ((np.asarray(read_trace(tmp_path/'a'/'trace.safetensors').choice) == a).all()
            and not (tmp_path/'a'/'perturbation.csv').exists())


def test_text_of_which_nobody_knows_whether_it_was_trained_on(texts, tmp_path):
    "A model that does not say so may have been trained on any text; objects in memory have no command"
    data = text_data(str(texts), vocab_size=300, sequence_length=64)
    a = analyze(from_scratch('smoe', 'tiny', vocab_size=data.vocab_size, seed=0), data, num_tokens=300, perturb=False,
                out=tmp_path/'a')
    assert (not a.info['held_out'] and a.command() is None
            and json.loads((tmp_path/'a'/'analysis.json').read_text())['command'] is None)
    assert 'not known: perplexity is not a score' in a.report()


def test_a_trace_is_copied_whole_or_not_at_all(runs, tmp_path, monkeypatch):
    a = analyze(runs.folders[0], num_tokens=300, perturb=False)
    def half(src, dst):
        with open(dst, 'wb') as f: f.write(open(src, 'rb').read(50))
        raise OSError('disk full')
    with monkeypatch.context() as m, pytest.raises(OSError, match='disk full'):
        m.setattr(shutil, 'copy', half)
        a.save(tmp_path/'a')
    assert not list((tmp_path/'a').iterdir())
    a.save(tmp_path/'a')
    assert read_trace(tmp_path/'a'/'trace.safetensors').same_probe(a.trace)


def test_choices_that_are_no_expert(runs, tmp_path):
    a = analyze(runs.folders[1], num_tokens=600, out=tmp_path/'a')
    assert a.trace.recipe == 'moe_plus_plus' and a.info['num_choices'] != a.info['num_experts']
    assert len(a.report()) > 10_000 and (a.by_layer().allocation_entropy_random > .97).all()


def test_runs_keep_traces(runs, tmp_path, texts):
    c = read_comparison(runs.out)
    assert all(len(ts) >= 5 for ts in c.traces.values())
    assert (set(c.saturation[c.saturation.step == 6].saturation) == {1.}
            and c.change_rate.change_rate.between(0, 1).all())
    assert 'How choices settle' in (runs.out/'report.html').read_text()
    for p in (runs.folders[0]/'traces').iterdir(): assert p.stat().st_size < 1e6
    # the same runs, whatever is asked about traces
    old = compare('smoe,moe_plus_plus', texts, out=runs.out, traces=0, **SMALL)
    assert len(old.folders) == 2 and all(len(ts) >= 5 for ts in old.traces.values())


def test_a_trace_that_was_half_written_is_in_nobodys_way(texts, tmp_path):
    "A process killed while it writes leaves a hidden folder; the next one removes it and goes on"
    def stop(event, name=None, step=None, **kw):
        if event == 'step' and step == 3: raise KeyboardInterrupt
    kw = dict(SMALL, progress=stop)
    with pytest.raises(KeyboardInterrupt): train('smoe', texts, out=tmp_path/'run', **kw)
    (tmp_path/'run'/'traces'/'.step-000004.safetensors.x1').mkdir()
    (tmp_path/'run'/'traces'/'.step-000004.safetensors.x1'/'0.bin').write_bytes(b'half')
    train('smoe', texts, out=tmp_path/'run', **SMALL)
    train('smoe', texts, out=tmp_path/'whole', **SMALL)
    assert sorted(os.listdir(tmp_path/'run'/'traces')) == sorted(os.listdir(tmp_path/'whole'/'traces'))
    for n in os.listdir(tmp_path/'whole'/'traces'):
        x, y = (read_trace(tmp_path/f/'traces'/n) for f in ('run', 'whole'))
        assert all((np.asarray(getattr(x, k)) == np.asarray(getattr(y, k))).all()
                   for k in ('choice', 'weight', 'score', 'token'))


# transformers' own

@pytest.mark.parametrize('family', list(FAMILIES) if ALL else FEW)
def test_a_class_of_transformers(family, tokenizer, texts, tmp_path):
    if family not in transformers.CONFIG_MAPPING: pytest.skip('not in this transformers')
    model = tiny_moe(family, seed=1)
    model.save_pretrained(tmp_path/family)
    tokenizer.save_pretrained(tmp_path/family)
    if family in FEW[:2] or ALL:                          # through the command, from the folder
        res = libmoe('analyze', tmp_path/family, '--data', texts, '--tokens', 300, '--sequence-length', 50, '--out',
                     tmp_path/'out', '--json', '--threads', 1)
        assert res.exit_code == 0, res.stderr
        d, name = json.loads(res.stdout), (tmp_path/'out'/'report.html').read_text()
        assert family in name and not d['held_out'] and len(d['by_layer']) == d['layers'] >= 1
    a = analyze(model, texts, tokenizer=tokenizer, num_tokens=300, sequence_length=50)
    assert a.trace.num_tokens == 300 and set(a.trace.domains) == {'tales', 'notes'}
    rows = a.summary().set_index('metric')
    assert rows.value[['allocation entropy', 'router margin', 'parameter similarity']].notna().all()
    if model.can_generate() and not model.config.is_encoder_decoder:
        assert 0 < rows.value['perplexity'] < 1e6 and any('drop top-1' in m for m in rows.index)
    assert a.info['parameters'] > a.info['active_parameters'] > 0


# metrics and their references

def test_random_like_keeps_what_the_probe_set_decides():
    choice = np.random.default_rng(0).integers(0, 6, (2, 400, 3))
    t = make_trace(choice, num_experts=6, top_k=2, token=np.arange(400) % 9, domain=np.arange(400) % 3,
                   domains=['a', 'b', 'c'])
    r = random_like(t, seed=3)
    assert (r.same_probe(t) and (r.domain == t.domain).all()
            and not np.array_equal(r.choice, random_like(t, seed=4).choice))
    assert np.array_equal(r.choice, random_like(t, seed=3).choice)
    rows = lambda trace: {n: len(df) for n, df in measure_trace(trace).items()
                          if n not in ('co_activation', 'vocabulary_specialisation')}
    assert rows(r) == rows(t)


# bad input

@pytest.fixture(scope='module')
def folders(tmp_path_factory, tokenizer):
    box = tmp_path_factory.mktemp('folders')
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      vocab_size=96)
    transformers.LlamaForCausalLM(config).save_pretrained(box/'dense')
    tokenizer.save_pretrained(box/'dense')
    tiny_moe('mixtral').save_pretrained(box/'mute')
    for n in ('small', 'torn'):
        tiny_moe('mixtral', vocab_size=60 if n == 'small' else 96).save_pretrained(box/n)
        tokenizer.save_pretrained(box/n)
    weights = box/'torn'/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:2000])
    (box/'empty').mkdir()
    return box


@pytest.mark.parametrize('name, says',
                         [('dense', 'no mixture-of-experts layers (LlamaForCausalLM): `libmoe upcycle'),
                          ('mute', 'has no tokenizer in'), ('small', 'it is the tokenizer of another model'),
                          ('torn', 'has no model that can be loaded'), ('empty', 'is a folder without a config.json'),
                          ('nowhere', 'does not exist'), ('dense/config.json', 'is a file')])
def test_bad_model(name, says, folders, texts, tmp_path):
    refused(says, folders/name, '--data', texts, '--tokens', 300, '--out', tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_a_name_on_the_hub_without_a_network(texts, tmp_path):
    refused('is no folder here, and the Hugging Face hub gave no', 'somebody/some-moe', '--data', texts, '--out',
            tmp_path/'out')


def test_a_folder_of_runs(runs, tmp_path):
    refused('holds 2 models: name one, for instance', runs.out, '--out', tmp_path/'out')


@pytest.mark.parametrize('args, says', [(['--tokens', '0'], 'num_tokens must be a whole number'),
                                        (['--batch-size', '0'], 'batch_size must be'),
                                        (['--sequence-length', '1'], 'sequence_length must be'),
                                        (['--threads', '0'], 'threads'), (['--data', 'nowhere.txt'], 'does not exist')])
def test_bad_options(args, says, runs, tmp_path):
    refused(says, runs.folders[0], *args, '--out', tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_unwritable_folder(runs, tmp_path):
    (tmp_path/'file').write_text('x')
    for out in ('file', 'file/below'): refused('cannot be written', runs.folders[0], '--out', tmp_path/out)


def test_another_tokenizer(folders, texts, tmp_path):
    res = libmoe('analyze', folders/'mute', '--tokenizer', folders/'dense', '--data', texts, '--tokens', 200,
                 '--no-perturb', '--out', tmp_path/'out', '--threads', 1)
    assert res.exit_code == 0, res.stderr
