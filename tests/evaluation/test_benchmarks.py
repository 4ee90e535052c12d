"The paper's benchmarks on files in the columns of the published data sets: prompts word by word, scores by hand."
import json, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest
from lm_eval.api.model import LM

from libmoe_nb.evaluation.benchmarks import tasks_folder
from libmoe_nb.evaluation.harness import evaluate, task_manager

ROOT = Path(__file__).resolve().parents[2]

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

@pytest.mark.long
def test_paper_tasks_are_the_registrys():
    "Names and data sets agree with lm-eval's whole registry, and our names replace none of its"
    whole, own = task_manager(True), [p.stem for p in (tasks_folder()/'paper_lm').glob('[!_]*.yaml')]
    assert set(whole.task_index['paper_lm'].cfg['task']) <= set(whole.all_tasks)
    for name in 'lambada_openai blimp hellaswag piqa arc_easy'.split():
        assert ('lm_eval' in str(whole.task_index[name].yaml_path)
                and str(whole.task_index[name].yaml_path) == str(task_manager().task_index[name].yaml_path))
    for name in own:
        assert Path(whole.task_index[name].yaml_path).parent == tasks_folder()/'paper_lm' and name.startswith('paper_')
    for ours, theirs in dict(paper_social_iqa='social_iqa', paper_commonsense_qa='commonsense_qa').items():
        assert whole.task_index[ours].cfg['dataset_path'] == whole.task_index[theirs].cfg['dataset_path']
    with pytest.raises(ValueError, match="unknown task 'helaswag': did you mean 'hellaswag'"):
        evaluate(Rule(len), 'helaswag', progress=False)

@pytest.mark.parametrize('task, data', [('paper_cbt', "'cam-cst/cbt' (configuration CN)"),
                                        ('blimp', "'nyu-mll/blimp' (configuration adjunct_island)"),
                                        ('paper_race_middle', "'ehovy/race' (configuration middle)")])
def test_data_out_of_reach_are_named(task, data, monkeypatch):
    import datasets
    def unreachable(path, name=None, **kwargs): raise ConnectionError('no route to host')
    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    with pytest.raises(ValueError) as e: evaluate(Rule(len), task, progress=False)
    assert data in str(e.value) and '\n' not in str(e.value)

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
