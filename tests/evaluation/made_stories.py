"Stories and code that suites are made from, the same for the same seed."
import numpy as np
from libmoe_nb.evaluation.suites import make_suite

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

def story_suite():
    "Tasks of every kind, of stories and of code, held out"
    return make_suite(dict(story=PROSE, source=CODE), num_examples=60, train=dict(story=TRAIN[:15], source=TRAIN[15:]),
                      min_examples=10, num_candidates=4)

def with_choices(d):
    "The texts of an example: its context with each of its choices"
    return [d['context'] + c for c in d.get('choices', [d.get('target')])]
