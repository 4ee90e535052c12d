"""Suites: determinism, what every kind of task promises, texts that are small, foreign, code or empty, and the baselines."""
import json, math, re, subprocess, sys, unicodedata
from collections import Counter
from pathlib import Path

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from libmoe_nb.evaluation import suites as S
from libmoe_nb.evaluation.suites import Suite, make_suite, suite_kinds

ROOT = Path(__file__).resolve().parents[2]
FIRST = ('harbour winter garden engine teacher window village doctor market letter river mountain captain soldier '
         'farmer painter bridge castle forest island'.split())
SYLLABLES = [a + b for a in 'bdfgklmn' for b in 'aeiou']
NOUNS = FIRST + [a + b for a in SYLLABLES for b in SYLLABLES[::5]]
NAMES = [a + b for a in 'Ann Bor Clar Dav Edith Frank Gret Henr Iren Jam Kar Lou'.split()
         for b in 'a is en ius or elle'.split()]
VERBS = 'watched followed painted repaired visited remembered described defended admired measured'.split()


def story(seed, sentences=60):
    "Prose with names, numbers of verbs and determiners, the same for the same seed"
    g = np.random.default_rng(seed)
    pick = lambda words: words[g.integers(len(words))]
    def sentence():
        a, b, c, n, m = pick(NOUNS), pick(NOUNS), pick(NOUNS), pick(NAMES), pick(NAMES)
        return [f'{n} {pick(VERBS)} the old {a} near the {b} before {m} {pick(VERBS)} the {c}.',
                f'The {a} was behind the {b}, and the {c}s of {n} were larger than this {a}.',
                f'{n} is a friend of the {a}, but these {b}s are in the {c} of {m}.',
                f'The {a} has {pick(["an angry", "a cold"])} {b} that the {c}s of the {pick(NOUNS)} have never '
                f'seen.'][g.integers(4)]
    return ' '.join(sentence() for _ in range(sentences))


def module(seed, functions=25):
    "Python code, the same for the same seed"
    g = np.random.default_rng(seed)
    pick = lambda: NOUNS[g.integers(len(NOUNS))]
    def function():
        a, b, c = pick(), pick(), pick()
        return (f'def {pick()}{g.integers(1000)}({a}, {b}, {c}):\n    """Look at '
                f'{a}."""\n    if {a} in {b}:\n        {c} = compute({b}[0], {a})\n        total = [{a}, {c}[{a}]]\n'
                f'    else:\n        total = dict(first={{{b}: 1}})\n    return report(total, {c})\n')
    return 'import os\n\n' + '\n'.join(function() for _ in range(functions))


PROSE, CODE = [story(i) for i in range(6)], [module(i) for i in range(4)]
TRAIN = [story(i) for i in range(100, 115)] + [module(i) for i in range(100, 110)]
PROSE_KINDS, CODE_KINDS = ([k.name for k in suite_kinds.values() if side in k.of] for side in ('prose', 'code'))


@pytest.fixture(scope='module')
def suite():
    return make_suite(dict(story=PROSE, source=CODE), num_examples=60, train=dict(story=TRAIN[:15], source=TRAIN[15:]),
                      min_examples=10, num_candidates=4)


def texts(d): return [d['context'] + c for c in d.get('choices', [d.get('target')])]


# what every kind promises

def test_every_kind_is_there(suite):
    assert {t.kind for t in suite.tasks.values() if t.domain == 'story'} == set(PROSE_KINDS)
    assert {t.kind for t in suite.tasks.values() if t.domain == 'source'} == set(CODE_KINDS)
    assert all(n == f'{t.kind}_{t.domain}' for n, t in suite.tasks.items())
    assert not [n for n in suite.tasks if re.search('lambada|cbt|blimp|hellaswag', n, re.I)]


def test_one_right_choice_in_even_places(suite):
    for t in suite.tasks.values():
        for d in t.docs:
            if t.output_type == 'loglikelihood': assert set(d) == {'context', 'target', 'document', 'at'}; continue
            assert set(d) == {'context', 'choices', 'answer', 'document', 'at'}
            assert len(set(d['choices'])) == len(d['choices']) == round(1 / t.chance)
            assert all(c.strip() for c in d['choices']) and not re.search(r'\s\Z', d['context'])
        if t.output_type == 'multiple_choice':
            counts = Counter(d['answer'] for d in t.docs)
            assert max(counts.values()) - min(counts[a] for a in range(round(1 / t.chance))) <= 1
        assert len({json.dumps(texts(d)) for d in t.docs}) == len(t.docs)


def test_the_right_choice_is_the_text(suite):
    documents = dict(story=PROSE, source=CODE)
    plain = lambda s: ' '.join(s.split())
    for t in suite.tasks.values():
        if t.kind == 'recall': continue
        for d in t.docs:
            full = [plain(x) in plain(documents[t.domain][d['document']]) for x in texts(d)]
            assert full[d.get('answer', 0)], (t.name, d)
            if t.kind != 'indentation': assert sum(full) == 1, (t.name, d)     # white space is all that differs there


@pytest.mark.parametrize('kind', ['agreement', 'determiner', 'word_order', 'bracket', 'name', 'indentation'])
def test_pairs_differ_in_one_edit(suite, kind):
    t = next(t for t in suite.tasks.values() if t.kind == kind)
    assert t.group == 'minimal_pairs' and t.chance == .5
    for d in t.docs:
        good, bad = d['choices'][d['answer']], d['choices'][1 - d['answer']]
        if kind == 'word_order':
            a, b = good.split(), bad.split()
            diff = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
            assert (sorted(re.findall(r'\w+', good)) == sorted(re.findall(r'\w+', bad)) and len(diff) == 2
                    and diff[1] == diff[0] + 1 and diff[0] > 0)
        elif kind == 'indentation': assert good.strip() == bad.strip() and good != bad
        else:
            a, b = (re.findall(r'\w+|[^\w]', s) for s in (good, bad))
            assert len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1


def test_edited_code_is_wrong(suite):
    "A document with the edited line does not compile, as it does with the right one"
    for t in suite.tasks.values():
        if t.kind not in ('bracket', 'indentation'): continue
        for d in t.docs:
            text, at = CODE[d['document']], d['at']
            good, bad = d['choices'][d['answer']], d['choices'][1 - d['answer']]
            start = text.index(good, at - len(good) + len(good.lstrip()))
            compile(text, 'x', 'exec')
            with pytest.raises(SyntaxError): compile(text[:start] + bad + text[start + len(good):], 'x', 'exec')


def test_couples_hide_frequency(suite):
    for t in suite.tasks.values():
        if t.kind in ('agreement', 'determiner', 'bracket', 'word_order') and not t.dropped and len(t) % 2 == 0:
            assert t.baselines['unigram'] == .5, t.name


def test_cloze_and_last_word_are_in_the_context(suite):
    for t in suite.tasks.values():
        for d in t.docs:
            if t.kind == 'last_word': assert re.search(rf'\b{d["target"].strip()}\b', d['context'])
            if t.kind == 'cloze':
                rest = [c.lstrip() for c in d['choices']]
                words = [re.match(r'\w+', r)[0] for r in rest]
                assert len(set(words)) == 4 and len({r[len(w):] for r, w in zip(rest, words)}) == 1
                assert all(re.search(rf'\b{w}\b', d['context']) for w in words)


def test_continuations_are_equally_long(suite):
    for t in suite.tasks.values():
        if t.kind != 'continuation': continue
        assert t.normalise and t.chance == .25
        for d in t.docs: assert len({len(S._piece.findall(c.lstrip())) for c in d['choices']}) == 1


def test_contexts_are_short(suite):
    for t in suite.tasks.values():
        for d in t.docs:
            if t.kind == 'last_word': assert len(S._piece.findall(d['context'])) <= 80 + 40
            if t.kind == 'continuation': assert 20 <= len(S._piece.findall(d['context'])) <= 80
    short = make_suite(PROSE, 'continuation', 20, context_words=16, continuation_words=5)
    for d in short.tasks['continuation_text'].docs: assert 4 <= len(S._piece.findall(d['context'])) <= 16


def test_recall_is_answered_by_the_context(suite):
    for t in suite.tasks.values():
        if t.kind != 'recall': continue
        places = []
        for d in t.docs:
            *lines, asked = d['context'].splitlines()
            assert (len(lines) == 8 and f'{asked}{d["choices"][d["answer"]]}' in lines
                    and len({l.split()[0] for l in lines}) == 8)
            places.append([l.startswith(asked + ' ') for l in lines].index(True))
        assert len(set(places)) == 8


def test_recall_has_no_bias():
    "Neither frequency nor place of the right value is a cue"
    t = make_suite(PROSE, 'recall', 400, train=TRAIN).tasks['recall_text']
    assert abs(t.baselines['unigram'] - 1/8) < 4 * math.sqrt(7/64/400)


# held out

def test_no_example_occurs_in_the_training_text():
    copied = PROSE[0][:len(PROSE[0]) // 2]
    train = [f'Something else before. {copied} And after.', *TRAIN]
    with_copy, without = (make_suite(PROSE[:2], ['continuation', 'word_order'], 15, train=x) for x in (train, TRAIN))
    assert sum(t.dropped for t in with_copy.tasks.values()) > sum(t.dropped for t in without.tasks.values())
    joined = [' '.join(re.findall(r'\w+', x.lower())) for x in train]
    for t in with_copy.tasks.values():
        for d in t.docs:
            for x in texts(d):
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


@given(st.lists(st.sampled_from('abcdef'), min_size=1, max_size=60),
       st.lists(st.sampled_from('abcdef'), min_size=1, max_size=60), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_known_against_a_plain_search(train, words, longest):
    n = min(longest, len(words))
    run = lambda w: {tuple(w[i:i+n]) for i in range(len(w) - n + 1)}
    assert (' '.join(words) in S._Known([' '.join(train)], longest)) == bool(run(train) & run(words))


# the same for the same seed

def test_the_same_in_another_process(suite, tmp_path):
    path = suite.save(tmp_path/'suite.jsonl')
    code = f'import sys; sys.path.insert(0, {str(ROOT/"tests")!r}); import test_suites as t; from libmoe_nb.evaluation.suites import make_suite\n' \
        "print(make_suite(dict(story=t.PROSE, source=t.CODE), num_examples=60, train=dict(story=t.TRAIN[:15], source=t.TRAIN[15:]), min_examples=10, num_candidates=4).fingerprint)"
    other = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT,
                           check=True, env={**__import__('os').environ, 'PYTHONHASHSEED': '7'}).stdout.strip()
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


# texts of all sorts

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
    for bad, said in [(dict(kinds='clozed'), "did you mean 'cloze'"), (dict(kinds=[]), 'names nothing'),
                      (dict(num_examples=0), 'num_examples=0'), (dict(seed=-1), 'seed=-1'),
                      (dict(context_words=2), 'context_words=2'), (dict(domains='tex'), "did you mean 'text'"),
                      (dict(kinds='bracket'), 'are not made from it')]:
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
    for d in res.tasks['cloze_text'].docs: assert all(S._word.match(c.strip())[0] in words for c in d['choices'])


@given(st.lists(st.text(max_size=300), max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text_gives_a_suite_or_a_sentence(docs):
    try:
        res = make_suite(docs, num_examples=5, min_examples=1, context_words=8, continuation_words=2, num_candidates=2,
                         num_pairs=2)
    except ValueError as e: assert re.search('too little text|holds no text', str(e))
    else: assert all(len(set(texts(d))) == len(texts(d)) for t in res.tasks.values() for d in t.docs)


@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_cutting_text(text):
    for a, b in S._sentences(text): assert text[a:b].strip() and not text[a].isspace()
    for line in S._lines(text): assert 0 <= line.start < line.end <= len(text) and line.tokens
    assert (''.join(S._piece.findall(text)) == ''.join(re.findall(r'\n[ \t]*|[^\s]', text))
            or any(unicodedata.category(c)[0] == 'M' for c in text))


def test_code_from_the_middle():
    "A document that begins inside of a function and ends inside of a bracket"
    text = CODE[0][CODE[0].index('        total'):] + '\nprint((1,\n'
    lines = [text[l.start:l.end] for l in S._lines(text)]
    assert len(lines) > 100 and all(not l.startswith('"') or l.endswith('"') for l in lines)
    assert make_suite([text], ['bracket', 'indentation', 'name'], 15,
                      code=True).tasks.keys() == {'bracket_text', 'indentation_text', 'name_text'}


def test_code_can_be_named():
    assert 'bracket_a' in make_suite(dict(a=CODE, b=PROSE), ['minimal_pairs'], 10, code=['a']).tasks
    assert 'word_order_text' in make_suite(PROSE, 'minimal_pairs', 10, code=False).tasks


def test_domains_with_odd_names():
    res = make_suite({'a b': PROSE[:3], 'a/b': PROSE[3:], '': PROSE[:1]}, 'recall', 5)
    assert list(res.tasks) == ['recall_a_b', 'recall_a_b_2', 'recall_text']


# baselines

@given(st.lists(st.lists(st.sampled_from('abc'), max_size=12), min_size=1, max_size=4),
       st.lists(st.sampled_from('abcd'), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_ngram_against_plain_counts(docs, query):
    m = S._NGram([' '.join(d) for d in docs])
    stream = [0, 0] + [x for d in docs for x in [*d, 0, 0]]
    V = len(set(stream) - {0}) + 2
    def p(w, h):
        if not h: return (stream.count(w) + 1) / (len(stream) + V)
        runs = [tuple(stream[i:i+len(h)+1]) for i in range(len(stream) - len(h))]
        seen = [r[-1] for r in runs if r[:-1] == tuple(h)]
        if not seen: return p(w, h[1:])
        return (seen.count(w) + len(set(seen)) * p(w, h[1:])) / (len(seen) + len(set(seen)))
    history = [0, 0, *query[:-1]][-2:]
    assert math.isclose(math.exp(m.log_likelihood(m.history(' '.join(query[:-1])), query[-1])), p(query[-1], history),
                        rel_tol=1e-9)


def test_ties_count_as_their_share():
    assert [S._credit([0, 0, 0, 0], a) for a in range(4)] == [.25] * 4
    assert [S._credit([1, 0, 1], a) for a in range(3)] == [.5, 0, .5]


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


def test_own_kind():
    @S.suite_kind('echo', 'the first word again')
    def _echo(held):
        for doc, a, b in held.units('echo'):
            yield S._example(doc, a, held.docs[doc][a:b], [' ' + held.docs[doc][a:b].split()[0], ' nothing'])
    try: assert make_suite(PROSE, 'echo', 10).tasks['echo_text'].chance == .5
    finally: del suite_kinds['echo']


def test_imports_are_light():
    code = 'import sys, libmoe_nb.evaluation.suites; print(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT,
                            check=True).stdout.split()
    assert not {'torch', 'transformers', 'lm_eval', 'matplotlib', 'fastai'} & set(loaded)
