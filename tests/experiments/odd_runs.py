"Comparisons with names that nobody would choose, and one that diverged; each trained once in a session."
import functools, json, random, tempfile
from pathlib import Path

from test_suites import PROSE

from libmoe_nb.data.text import text_data
from libmoe_nb.evaluation.suites import make_suite
from libmoe_nb.experiments.compare import compare

NAMES = ['all', 'std', 'mean', 'perplexity', 'perplexity_std', 'recipe', 'seed', 'rank', 'unknown', 'nan', '1',
         '_hidden', 'with space', 'a/b', 'größe', '日本', '$x$ & <b>']
SMALL = dict(steps=6, hidden_size=32, batch_size=4, warmup_steps=1, progress=None)

def write(folder, names, docs=12):
    "A .jsonl file with a domain field"
    rows, rng = [], random.Random(0)
    for d in names:
        for i in range(docs):
            sentences = [' '.join(['The', d, *rng.choices(['house', 'river', 'stone', 'of', 'and', 'little', 'green',
                                                           'under', 'walks', 'sees'], k=8)]) + '.' for _ in range(12)]
            rows.append(dict(domain=d, text=f'{d} number {i}.\n' + ' '.join(sentences)))
    (folder/'texts.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return text_data(str(folder/'texts.jsonl'), vocab_size=300, sequence_length=64, domain_field='domain',
                     cache_dir=folder/'cache')

def questions(names): return make_suite(dict.fromkeys(names, PROSE), 'cloze', num_examples=4)

@functools.cache
def _folder(): return tempfile.TemporaryDirectory()          # removed when the session ends

def folder(name):
    (path := Path(_folder().name, name)).mkdir()
    return path

@functools.cache
def named():
    "Data and a comparison with domains of such names"
    data = write(box := folder('named'), NAMES)
    return data, compare('dense,smoe', data, 'tiny', out=box/'runs', evaluate=questions(NAMES), **SMALL)

@functools.cache
def page():
    "Its page"
    return named()[1].report()

@functools.cache
def lost():
    "Two recipes that diverge with both seeds"
    data = write(box := folder('lost'), ['a', 'b'])
    suite = questions(['a', 'b'])
    return data, suite, box/'runs', compare('dense,smoe', data, 'tiny', seeds=2, learning_rate=1e18, out=box/'runs',
                                            evaluate=suite, **SMALL)
