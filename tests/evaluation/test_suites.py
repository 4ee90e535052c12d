"Suites: the same for the same seed, held out, and of texts that are small, foreign, code or empty."
import math, os, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from made_stories import CODE, NAMES, PROSE, TRAIN, story_suite, with_choices
from libmoe_nb.evaluation.pieces import WORD
from libmoe_nb.evaluation.questions import suite_kinds
from libmoe_nb.evaluation.suites import Suite, make_suite, share_of_best

ROOT = Path(__file__).resolve().parents[2]

PROSE_KINDS, CODE_KINDS = ([k.name for k in suite_kinds.values() if side in k.of] for side in ('prose', 'code'))

@pytest.fixture(scope='module')
def suite(): return story_suite()

def test_no_example_occurs_in_the_training_text():
    copied = PROSE[0][:len(PROSE[0]) // 2]
    train = [f'Something else before. {copied} And after.', *TRAIN]
    with_copy, without = (make_suite(PROSE[:2], ['continuation', 'word_order'], 15, train=x) for x in (train, TRAIN))
    assert sum(t.dropped for t in with_copy.tasks.values()) > sum(t.dropped for t in without.tasks.values())
    joined = [' '.join(re.findall(r'\w+', x.lower())) for x in train]
    for t in with_copy.tasks.values():
        for d in t.docs:
            for x in with_choices(d):
                w = re.findall(r'\w+', x.lower())
                n = min(13, len(w))
                assert not any(' '.join(w[i:i+n]) in j for j in joined for i in range(len(w) - n + 1))

def test_a_copied_document_is_an_error():
    with pytest.raises(ValueError, match="document 1 of 'text' .* is also a training document"):
        make_suite(PROSE, 'recall', 5, train=[PROSE[1] + '\n'])

def test_all_text_known():
    with pytest.raises(ValueError, match=r"kind 'cloze' needs 20 examples .* after \d+ were dropped that occur in the "
                       r"training text: 20 are missing"):
        make_suite(PROSE[:1], 'cloze', 20, train=[PROSE[0] + ' More.'])

def test_the_same_in_another_process(suite, tmp_path):
    path = suite.save(tmp_path/'suite.jsonl')
    code = (f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import made_stories; '
            'print(made_stories.story_suite().fingerprint)')
    other = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT,
                           check=True, env={**os.environ, 'PYTHONHASHSEED': '7'}).stdout.strip()
    assert other == suite.fingerprint == Suite.load(path).fingerprint

def test_more_examples_begin_with_the_same():
    few, many = (make_suite(PROSE, ['continuation', 'word_order', 'recall'], n) for n in (10, 30))
    for n in few.tasks: assert many.tasks[n].docs[:10] == few.tasks[n].docs
    assert make_suite(PROSE, 'cloze', 10, seed=1).fingerprint != make_suite(PROSE, 'cloze', 10).fingerprint

def test_a_suite_knows_its_own_text():
    assert make_suite(PROSE, 'recall', 10).options['text'] != make_suite(PROSE[1:], 'recall', 10).options['text']

def test_a_save_that_fails_leaves_the_old_file(suite, tmp_path, monkeypatch):
    path = suite.save(tmp_path/'suite.jsonl')
    def half(self, text, **kwargs):
        self.write_bytes(text.encode()[:500])
        raise OSError('disk full')
    with monkeypatch.context() as m, pytest.raises(OSError, match='disk full'):
        m.setattr(Path, 'write_text', half)
        suite.save(path)
    assert Suite.load(path).fingerprint == suite.fingerprint and list(tmp_path.iterdir()) == [path]

def test_a_changed_file_does_not_load(suite, tmp_path):
    path = suite.save(tmp_path/'sub'/'suite.jsonl')
    lines = path.read_text().splitlines()
    for bad in (lines[:-1], lines[1:], [lines[0], lines[1].replace('"context": "', '"context": "x'), *lines[2:]], [],
                ['nonsense'], ['[1]']):
        path.write_text('\n'.join(bad))
        with pytest.raises(ValueError, match='is damaged or no suite'): Suite.load(path)

@pytest.mark.parametrize('data', [[], [''], [' \n '], {}, dict(a=[])])
def test_no_text(data):
    with pytest.raises(ValueError, match='data holds no text'): make_suite(data)

@pytest.mark.parametrize('kind', PROSE_KINDS)
def test_tiny_text_says_what_is_missing(kind):
    with pytest.raises(ValueError, match=rf"kind '{kind}' needs 5 examples from 'text', whose 1 held-out documents of "
                       rf"2 words give 0: 5 are missing"):
        make_suite('Not enough.', kind, 5)

def test_kinds_that_a_text_cannot_have_are_named():
    res = make_suite(['Ein kurzer Satz ohne Verwandte. '
                      + ' '.join(f'Der Hund von {a} sah den alten {b} am Haus neben der Kirche.' for a in NAMES[::5]
                                 for b in NAMES[::5])], min_examples=10, num_examples=20)
    assert {'agreement_text', 'determiner_text'} <= set(res.missing) and 'continuation_text' in res.tasks
    assert all('are missing' in why for why in res.missing.values()) and 'too little text for' in repr(res)

def test_wrong_arguments():
    least = lambda n, got: f'must be a whole number of at least {n}, got {got}'
    for bad, said in [(dict(kinds='clozed'), "did you mean 'cloze'"),
                      (dict(kinds=[]), 'kinds must be some of last_word'),
                      (dict(num_examples=0), f'num_examples {least(1, 0)}'), (dict(seed=-1), f'seed {least(0, -1)}'),
                      (dict(context_words=2), f'context_words {least(8, 2)}'),
                      (dict(domains='tex'), "did you mean 'text'"), (dict(kinds='bracket'), 'are not made from it')]:
        with pytest.raises(ValueError, match=re.escape(said)): make_suite(PROSE, **bad)

GERMAN = 'Größe Straße Mädchen Bücher Vögel Äpfel Schlüssel Gärten Hütten Brüder Töchter Züge'.split()

HINDI = 'किताब लड़का पानी बाज़ार मकान शहर दोस्त रास्ता सूरज कहानी बगीचा दरवाज़ा'.split()

GREEK = 'θάλασσα βουνό σπίτι δρόμος ποταμός κήπος πόλη φίλος βιβλίο παιδί ήλιος δέντρο'.split()

@pytest.mark.parametrize('words', [GERMAN, HINDI, GREEK], ids=['german', 'hindi', 'greek'])
def test_other_languages(words, tmp_path):
    g = np.random.default_rng(0)
    words = [a + b for a in words for b in words]
    text = ' '.join(' '.join(['wo', *g.choice(words, 5), 'und', *g.choice(words, 3)]) + '. Ω' for _ in range(150))
    res = make_suite([text], num_examples=20, min_examples=20,
                     train=['wo und ' * 500 + ' '.join(g.choice(words, 2000))])
    assert {'cloze_text', 'word_order_text', 'continuation_text'} <= set(res.tasks)
    assert Suite.load(res.save(tmp_path/'s.jsonl')).fingerprint == res.fingerprint
    # whole words, marks and all
    for d in res.tasks['cloze_text'].docs: assert all(WORD.match(c.strip())[0] in words for c in d['choices'])

@given(st.lists(st.text(max_size=300), max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text_gives_a_suite_or_a_sentence(docs):
    try:
        res = make_suite(docs, num_examples=5, min_examples=1, context_words=8, continuation_words=2, num_candidates=2,
                         num_pairs=2)
    except ValueError as e: assert re.search('too little text|holds no text', str(e))
    else: assert all(len(set(with_choices(d))) == len(with_choices(d)) for t in res.tasks.values() for d in t.docs)

def test_code_can_be_named():
    assert 'bracket_a' in make_suite(dict(a=CODE, b=PROSE), ['minimal_pairs'], 10, code=['a']).tasks
    assert 'word_order_text' in make_suite(PROSE, 'minimal_pairs', 10, code=False).tasks

def test_domains_with_odd_names():
    res = make_suite({'a b': PROSE[:3], 'a/b': PROSE[3:], '': PROSE[:1]}, 'recall', 5)
    assert list(res.tasks) == ['recall_a_b', 'recall_a_b_2', 'recall_text']

def test_ties_count_as_their_share():
    assert [share_of_best([0, 0, 0, 0], a) for a in range(4)] == [.25] * 4
    assert [share_of_best([1, 0, 1], a) for a in range(3)] == [.5, 0, .5]

def test_unigram_is_at_chance_on_word_order():
    t = make_suite(PROSE, 'word_order', 60, train=TRAIN).tasks['word_order_text']
    assert t.baselines['unigram'] == .5 and t.baselines['ngram'] > .7

def test_baselines_need_training_text(suite):
    b = suite.baselines()
    assert (list(b.task) == list(suite.tasks) and b[['chance', 'unigram', 'ngram']].notna().all(axis=None)
            and ((b.unigram >= 0) & (b.ngram <= 1)).all())
    assert make_suite(PROSE, 'recall', 5).baselines()[['unigram', 'ngram']].isna().all(axis=None)
    g = suite.baselines(groups=True).set_index('task')
    names = suite.groups['minimal_pairs']
    assert (math.isclose(g.ngram['minimal_pairs'], g.ngram[names].mean())
            and g.n['all_story'] == sum(len(t) for t in suite.tasks.values() if t.domain == 'story'))

def test_imports_are_light():
    code = 'import sys, libmoe_nb.evaluation.suites; print(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT,
                            check=True).stdout.split()
    assert not {'torch', 'transformers', 'lm_eval', 'matplotlib', 'fastai'} & set(loaded)
