"The `libmoe` command as a user types it: results, bad input, exit codes, interruptions."
import json, os, shutil, signal, subprocess, sys, time

import pytest
from typer.testing import CliRunner

from libmoe_nb.cli import app
from libmoe_nb.training.log import run_log_path
from processes import Forked

pytestmark = pytest.mark.usefixtures('undrawn')
SMALL = '--preset tiny --steps 4 --batch-size 4 --sequence-length 64 --vocab-size 300 --threads 1'.split()

@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('LIBMOE_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield

def libmoe(*args):
    res = CliRunner().invoke(app, [str(a) for a in args])
    assert res.exception is None or isinstance(res.exception, SystemExit), res.exception
    return res

def refused(says, *args):
    "Exit code 2, one sentence on stderr, nothing on stdout"
    res = libmoe(*args)
    assert (res.exit_code, res.stdout) == (2, '')
    last = res.stderr.strip().splitlines()[-1]
    assert says in last and last.startswith('libmoe: '), res.stderr
    assert 'Traceback' not in res.stderr

def process(*args): return Forked('from libmoe_nb.cli import main; main()', *args)

# results

def test_compare_on_a_users_folder(texts, tmp_path, drawn):
    res = libmoe('compare', '--data', texts, '--recipes', 'dense,smoe,moe_plus_plus', *SMALL, '--out',
                 tmp_path/'runs', '--json')
    assert res.exit_code == 0, res.stderr
    result = json.loads(res.stdout)                       # stdout is the JSON and nothing else
    rows = {r['recipe']: r for r in result['results']}
    assert ({'dense', 'smoe', 'moe_plus_plus'} <= set(rows)
            and {(r['recipe'], r['domain']) for r in result['domains'] if r['perplexity'] > 1}
            >= {('smoe', 'notes'), ('smoe', 'tales'), ('unigram', 'tales')})
    page = (tmp_path/'runs'/'report.html').read_text()
    assert 'tales' in page and page.count('data:image/') >= 3 and 'src="http' not in page and '<script src' not in page
    again = libmoe('compare', '--data', texts, '--recipes', 'dense,smoe,moe_plus_plus', *SMALL, '--out',
                   tmp_path/'runs', '--json')
    assert 'finished already' in again.stderr
    assert [r.get('perplexity')
            for r in json.loads(again.stdout)['results']] == [r.get('perplexity') for r in result['results']]
    table = libmoe('report', tmp_path/'runs')
    assert table.exit_code == 0 and 'MoE++' in table.stdout and 'Unigram' in table.stdout

def test_train_leaves_a_model(texts, tmp_path):
    res = libmoe('train', 'sharede_v3', '--data', texts, *SMALL, '--out', tmp_path/'run', '--json')
    assert res.exit_code == 0, res.stderr
    result = json.loads(res.stdout)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    import libmoe_nb.models.causal  # noqa: F401  (registers the architecture)
    model, tok = AutoModelForCausalLM.from_pretrained(result['model']), AutoTokenizer.from_pretrained(result['model'])
    out = model.generate(**tok('the tales of', return_tensors='pt', return_token_type_ids=False), max_new_tokens=5,
                         do_sample=False)
    assert out.shape[1] > 5 and tok.decode(out[0])
    refused('another configuration', 'train', 'smoe', '--data', texts, *SMALL, '--out', tmp_path/'run')

def test_list():
    d = json.loads(libmoe('list', '--json').stdout)
    assert [r['name'] for r in d['recipes']][:2] == ['dense', 'smoe'] and len(d['recipes']) >= 8
    sizes = {p['name']: p['parameters'] for p in d['presets']}
    assert (round(sizes['paper-0.15b']['smoe']['total'] / 1e6) == 158
            and round(sizes['paper-0.15b']['dense']['active'] / 1e6) == 36)
    text = libmoe('list').stdout
    assert 'moe_plus_plus' in text and 'paper-0.68b' in text and 'sotu' in text

def test_help_and_version():
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', 'from libmoe_nb.cli import main; main()', '--help'],
                       capture_output=True, text=True, timeout=60)
    out = p.stdout
    assert p.returncode == 0 and 'compare' in out and 'train' in out
    from libmoe_nb import __version__
    assert libmoe('--version').stdout.split() == ['libmoe-nb', __version__]

# bad input: the budget

@pytest.mark.parametrize('args, says', [
    (['--recipes', 'smoe_sigmiod'], "did you mean 'smoe_sigmoid'"), (['--preset', 'minni'], "did you mean 'mini'"),
    (['--num-experts', '4', '--top-k', '5'], 'top_k must be at most num_experts=4, got 5'),
    (['--num-experts', '4', '--top-k', '4', '--num-shared-experts', '4'],
     'num_shared_experts must be at least 0 and below num_experts=4, got 4'),
    (['--steps', '0'], 'steps'), (['--steps', '-3'], 'steps'), (['--batch-size', '0'], 'batch_size'),
    (['--learning-rate', '-1'], 'learning_rate'),
    (['--seeds', '0'], 'seeds'), (['--threads', '0'], 'threads'),
    (['--set', 'router_aux_los_coef=1'], "did you mean 'router_aux_loss_coef'"), (['--set', 'x'], 'NAME=VALUE')])
def test_bad_budget(args, says, tmp_path):
    refused(says, 'compare', *args, '--out', tmp_path/'runs')
    assert not (tmp_path/'runs').exists()                 # refused before any work

def test_unknown_option():
    res = libmoe('compare', '--stesp', '3')
    assert res.exit_code == 2 and '--stesp' in res.stderr and 'Traceback' not in res.stderr

# bad input: the text

def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path

@pytest.mark.parametrize('name, data, says', [
    ('empty.txt', '', 'empty'), ('picture.txt', b'\x89PNG\0\0\0' * 50, 'binary'),
    ('latin.txt', 'façade '.encode('latin-1') * 50, 'not UTF-8'),
    ('rows.jsonl', '{"content": "a text"}\n' * 5, 'content'), ('odd.xyz', 'text ' * 50, '.xyz'),
    ('short.txt', 'one two three four\n' * 3, 'vocab')])
def test_bad_text(name, data, says, tmp_path):
    refused(says, 'compare', '--data', write(tmp_path/name, data), '--preset', 'tiny', '--out', tmp_path/'runs')

def test_missing_path(tmp_path):
    refused('does not exist', 'compare', '--data', tmp_path/'nowhere.txt', '--out', tmp_path/'runs')

def test_vocabulary_larger_than_the_corpus_supports(texts, tmp_path):
    refused('vocab_size=5000', 'compare', '--data', texts, '--preset', 'tiny', '--vocab-size', '5000', '--out',
            tmp_path/'runs')

def test_sequence_longer_than_the_corpus(texts, tmp_path):
    refused('sequence_length=1000000', 'compare', '--data', texts, '--preset', 'tiny', '--vocab-size', '300',
            '--sequence-length', '1000000', '--out', tmp_path/'runs')

# bad input: folders

def test_output_folder(texts, tmp_path):
    refused('cannot be written', 'compare', '--data', texts, *SMALL, '--out', write(tmp_path/'file', 'x'))
    refused('cannot be written', 'compare', '--data', texts, *SMALL, '--out', tmp_path/'file'/'below')
    refused('nowhere', 'report', tmp_path/'nowhere')

def test_a_run_folder_of_another_config(texts, tmp_path):
    args = ['compare', '--data', texts, '--recipes', 'smoe', *SMALL, '--out', tmp_path/'runs']
    assert libmoe(*args).exit_code == 0
    run, = [p.parent for p in (tmp_path/'runs').glob('*/config.json')]
    config = json.loads((run/'config.json').read_text())
    config['run']['seed'] = 7
    (run/'config.json').write_text(json.dumps(config))
    refused('another configuration', *args)

# interruptions

LONG = '--preset tiny --steps 400 --batch-size 8 --sequence-length 64 --vocab-size 300 --threads 1'.split()

def wait_for(condition, p, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert p.poll() is None, p.communicate()
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(.05)

def logged(out):
    "Folders of runs in `out` that have begun to write a log"
    return [f.parent for f in out.glob('*/config.json')
            if run_log_path(f.parent).exists() and run_log_path(f.parent).stat().st_size]

def test_control_c_is_kind(texts, tmp_path):
    p = process('compare', '--data', texts, '--recipes', 'smoe', *LONG, '--out', tmp_path/'runs')
    wait_for(lambda: logged(tmp_path/'runs'), p)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'go on from here' in err and 'Traceback' not in err and out == ''
    assert list((tmp_path/'runs').glob('*/checkpoints/step-*'))

@pytest.mark.long
def test_killed_in_the_middle_and_finished_by_the_next_call(texts, tmp_path):
    args = ['compare', '--data', texts, '--recipes', 'dense,smoe', *LONG, '--set', 'steps=60', '--json']
    args = [a for a in args if a not in ('--steps', '400')] + ['--out']
    whole = libmoe(*args, tmp_path/'whole')
    assert whole.exit_code == 0, whole.stderr
    p = process(*args, tmp_path/'killed')
    wait_for(lambda: any('smoe' in f.name for f in logged(tmp_path/'killed')), p)
    os.kill(p.pid, signal.SIGKILL)
    p.communicate()
    done = {f.parent.name: f.stat().st_mtime_ns for f in (tmp_path/'killed').glob('*/result.json')}
    assert len(done) == 1                                   # dense was finished, smoe was not
    again = libmoe(*args, tmp_path/'killed')
    assert again.exit_code == 0, again.stderr
    assert {n: (tmp_path/'killed'/n/'result.json').stat().st_mtime_ns for n in done} == done
    losses = lambda res: {r['recipe']: r['perplexity'] for r in json.loads(res.stdout)['results']}
    assert losses(again) == losses(whole)                   # the same bits as if nothing had happened

def test_one_process_at_a_time(texts, tmp_path):
    p = process('compare', '--data', texts, '--recipes', 'smoe', *LONG, '--out', tmp_path/'runs')
    try:
        wait_for(lambda: logged(tmp_path/'runs'), p)
        refused('in use by process', 'compare', '--data', texts, '--recipes', 'smoe', *LONG, '--out', tmp_path/'runs')
    finally: p.kill(); p.communicate()

@pytest.mark.long
def test_an_interrupted_run_goes_on_or_starts_over(texts, tmp_path):
    args = ['train', 'smoe', '--data', texts, *LONG, '--steps', '80', '--out']
    p = process(*args, tmp_path/'run')
    wait_for(lambda: (f := run_log_path(tmp_path/'run')).exists() and f.read_text().count('\n') > 2, p)
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=120)
    assert (p.returncode == 130 and list((tmp_path/'run').glob('checkpoints/step-*'))
            and not (tmp_path/'run'/'result.json').exists())
    first = lambda name: run_log_path(tmp_path/name).read_text().splitlines()[1]
    before = first('run')                                  # with the seconds it took, which are never the same
    shutil.copytree(tmp_path/'run', tmp_path/'over')
    (tmp_path/'over'/'notes.txt').write_text('mine')
    refused('another configuration', 'train', 'xmoe', '--data', texts, *LONG, '--no-resume', '--out', tmp_path/'over')
    assert first('over') == before
    results = {}
    for name, flag in dict(run='--resume', over='--no-resume').items():
        res = libmoe(*args, tmp_path/name, flag, '--json')
        assert res.exit_code == 0, res.stderr
        results[name] = json.loads(res.stdout)
    assert first('run') == before != first('over') and (tmp_path/'over'/'notes.txt').read_text() == 'mine'
    assert results['run']['perplexity'] == results['over']['perplexity']
    again = libmoe(*args, tmp_path/'over', '--no-resume', '--json')
    assert 'finished already' in again.stderr and json.loads(again.stdout)['finished'] == results['over']['finished']
    card = (tmp_path/'run'/'model'/'README.md').read_text()
    for fact in ('| recipe | smoe |', '| steps | 80 |', '| optimizer | AdamW |', '## Evaluation', '| perplexity |',
                 '| perplexity by domain / tales |'):
        assert fact in card, fact
