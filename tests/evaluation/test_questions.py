"What every kind of question promises: one right answer, of the text itself, that frequency does not give away."
import json, math, re
from collections import Counter
import pytest
from made_stories import CODE, PROSE, TRAIN, story_suite, with_choices
from libmoe_nb.evaluation.pieces import PIECE
from libmoe_nb.evaluation.questions import question, suite_kind, suite_kinds
from libmoe_nb.evaluation.suites import make_suite

PROSE_KINDS, CODE_KINDS = ([k.name for k in suite_kinds.values() if side in k.of] for side in ('prose', 'code'))

@pytest.fixture(scope='module')
def suite(): return story_suite()

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
        assert len({json.dumps(with_choices(d)) for d in t.docs}) == len(t.docs)

def test_the_right_choice_is_the_text(suite):
    documents = dict(story=PROSE, source=CODE)
    plain = lambda s: ' '.join(s.split())
    for t in suite.tasks.values():
        if t.kind == 'recall': continue
        for d in t.docs:
            full = [plain(x) in plain(documents[t.domain][d['document']]) for x in with_choices(d)]
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
        for d in t.docs: assert len({len(PIECE.findall(c.lstrip())) for c in d['choices']}) == 1

def test_contexts_are_short(suite):
    for t in suite.tasks.values():
        for d in t.docs:
            if t.kind == 'last_word': assert len(PIECE.findall(d['context'])) <= 80 + 40
            if t.kind == 'continuation': assert 20 <= len(PIECE.findall(d['context'])) <= 80
    short = make_suite(PROSE, 'continuation', 20, context_words=16, continuation_words=5)
    for d in short.tasks['continuation_text'].docs: assert 4 <= len(PIECE.findall(d['context'])) <= 16

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

def test_own_kind():
    @suite_kind('echo', 'the first word again')
    def _echo(held):
        for doc, a, b in held.units('echo'):
            yield question(doc, a, held.docs[doc][a:b], [' ' + held.docs[doc][a:b].split()[0], ' nothing'])
    try: assert make_suite(PROSE, 'echo', 10).tasks['echo_text'].chance == .5
    finally: del suite_kinds['echo']
