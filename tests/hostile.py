"""Input that somebody made to do harm, or that was damaged: targets, what is fed to them, and what must hold.

A target takes an input and reads it as a user's command would. It may give a result or a `ValueError` of one sentence.
Anything else is a fall: another exception, a `ValueError` that Python or a library wrote, a hang. `tests/` tries a few
inputs of each target, `benchmarks/fuzz.py` as many as there is time for."""
import copy, functools, io, json, os, shutil, signal, struct, tempfile, traceback, warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

FIXTURES = Path(__file__).resolve().parent/'fixtures'
DEEP = '@deep@'                                                      # in JSON: a list in a list in a list ...
NASTY = [None, True, False, -1, 0, 1, 3, .5, 2**31, 2**63, 10**30, 1e308, float('nan'), float('-inf'), '', ' ', 'x',
         'x' * 5000, '\0', '\ud800', '\x1b[31m', '../../../../etc/passwd', '/etc/passwd', '/dev/zero', 'nowhere/' * 600,
         '<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', '[/red]', '[bold]', r'$\frac{$', '%s{}{0}',
         [], [[]], [None], ['x'], [1, 2], {}, {'x': 1}, {'': {}}, {'__class__': 1}, DEEP]

class Fall(AssertionError): "What must not happen."

def kind(e):
    "Is it a `ValueError` of one sentence, as ours are?"
    s = str(e)
    odd = '\n' in s or len(s) > 3000 or s[:1] in '"{' or not s.strip()
    return isinstance(e, ValueError) and not isinstance(e, (UnicodeError, json.JSONDecodeError)) and not odd

@contextmanager
def limited(seconds=30):
    "An end to what computes longer, or does nothing for four times as long (other processes may be busy)"
    def ring(*_): raise Fall(f'took more than {seconds} s')
    before = [signal.signal(n, ring) for n in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds); signal.alarm(4 * seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0); signal.alarm(0)
        for n, f in zip((signal.SIGPROF, signal.SIGALRM), before): signal.signal(n, f)

@dataclass(frozen=True)
class Target:
    name: str
    inputs: object  # a strategy
    read: callable  # (input, folder), for what it raises
    def tell(self, given):
        "None, or what fell over: the exception and where"
        with tempfile.TemporaryDirectory(prefix='hostile-') as box, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                with limited(): self.read(given, Path(box))
            except BaseException as e:
                if isinstance(e, KeyboardInterrupt) or kind(e): return
                at = [f for f in traceback.extract_tb(e.__traceback__) if 'libmoe_nb' in f.filename]
                place = f'{Path(at[-1].filename).name}:{at[-1].lineno}' if at else 'outside'
                return f'{type(e).__name__} in {place}: {str(e).replace(box, ".")[:200]!r}'

targets = {}
def target(name, inputs):
    "Register `f(input, folder)`"
    def add(f):
        targets[name] = Target(name, inputs, f)
        return f
    return add

# what is fed

def dumps(o):
    "JSON as bytes, with what is too deep for any parser"
    return json.dumps(o).replace(f'"{DEEP}"', '[' * 100_000 + ']' * 100_000).encode()

def places(o, path=()):
    "Paths to everything in nested dicts and lists"
    if path: yield path
    for k, v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ():
        yield from places(v, (*path, k))

@st.composite
def changed(draw, value, most=2):
    "A JSON value of which one or two places are gone, or hold something nasty"
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, most))):
        if not (spots := list(places(value))): return value
        *path, last = draw(st.sampled_from(spots))
        inside = functools.reduce(lambda o, k: o[k], path, value)
        if draw(st.integers(0, 3)) == 0: del inside[last]
        else: inside[last] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    return value

@st.composite
def damaged(draw, data):
    "Bytes that were cut, flipped, doubled, or written over"
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(['cut', 'flip', 'insert', 'zero']))
        if how == 'cut': del data[i:]
        elif how == 'flip' and data: data[i] = draw(st.integers(0, 255))
        elif how == 'insert': data[i:i] = draw(st.binary(min_size=1, max_size=8))
        elif data: data[i:i + 8] = bytes(len(data[i:i + 8]))
    return bytes(data)

def json_file(value):
    odd = st.sampled_from([*map(dumps, NASTY), b'[' * 100_000, b'9' * 5000])
    return st.one_of(changed(value).map(dumps), damaged(dumps(value)), odd, st.binary(max_size=40))

def split_header(data):
    "The header of a safetensors file as a dict, and its tensors"
    n = struct.unpack('<Q', data[:8])[0]
    return json.loads(data[8:8 + n]), data[8 + n:]

def join_header(header, body, size=None):
    h = header if isinstance(header, bytes) else dumps(header)
    return struct.pack('<Q', len(h) if size is None else size) + h + body

def safetensors_file(data):
    "A safetensors file whose header was changed, or lies about its length, or whose bytes were damaged"
    header, body = split_header(data)
    sizes = st.sampled_from([0, 1, 2**31, 2**60, 2**63, 2**64 - 1]).map(lambda n: join_header(header, body, n))
    return st.one_of(changed(header).map(lambda h: join_header(h, body)), sizes, damaged(data))

# JSON

def sample(path): return json.loads((FIXTURES/path).read_text(encoding='utf-8'))
RUN = next(FIXTURES.glob('runs/smoe-*'))
CONFIG, RESULT = sample(RUN/'config.json'), sample(RUN/'result.json')

@target('json', json_file({'a': [1, {'b': 'c'}]}))
def _(data, box):
    from libmoe_nb.core.files import read_json
    (box/'a.json').write_bytes(data)
    read_json(box/'a.json')

@target('preset', changed(CONFIG['run']['preset'], 3))
def _(d, box):
    from libmoe_nb.moe.config import Preset, from_saved
    p = from_saved(Preset, d, 'Preset')
    p.spec('smoe')

@target('layer', changed(CONFIG['run']['moe'], 3))
def _(d, box):
    from libmoe_nb.moe.config import MoESpec
    MoESpec.from_dict(d).validate()

# models

def copied(source, box, name, data):
    "A copy of a folder of which one file is another"
    shutil.copytree(source, box/'it')
    (box/'it'/name).write_bytes(data)
    return box/'it'

MODEL = FIXTURES/'models'/'smoe'

@target('model configuration', json_file(sample(MODEL/'config.json')))
def _(data, box):
    from libmoe_nb.models.loading import load_model
    load_model(copied(MODEL, box, 'config.json', data), tokenizer=False, device='cpu')

@target('model weights', safetensors_file((MODEL/'model.safetensors').read_bytes()))
def _(data, box):
    from libmoe_nb.models.loading import load_model
    load_model(copied(MODEL, box, 'model.safetensors', data), tokenizer=False, device='cpu')

@target('tokenizer', st.one_of(damaged((FIXTURES/'dense'/'tokenizer.json').read_bytes()),
                               changed(sample('dense/tokenizer.json')).map(dumps)))
def _(data, box):
    from libmoe_nb.models.loading import load_tokenizer
    load_tokenizer(copied(FIXTURES/'dense', box, 'tokenizer.json', data))

# runs: read, drawn up, and told in the shell

def run_folder(box, config=None, **files):
    "Folders of two runs, one of which holds other files; it is named after its configuration, if that can be told"
    from libmoe_nb.experiments.run import run_name
    out = box/'runs'
    for f in FIXTURES.glob('runs/*-*-*'):
        if not f.name.startswith(('dense', 'smoe')): continue
        shutil.copytree(f, out/f.name)
        if not {*files} & {'evaluation__json', 'samples__csv'}: (out/f.name/'evaluation.json').unlink()
    for name, data in files.items(): (out/RUN.name/name.replace('__', '.')).write_bytes(data)
    if config is not None:
        (out/RUN.name/'config.json').write_bytes(dumps(config))
        try: (out/RUN.name).rename(out/run_name(config['run']))
        except Exception: pass
    return out

def tables(out):
    "What `libmoe report` reads and tells, without its figures"
    from libmoe_nb.experiments.comparison import verdict
    from libmoe_nb.experiments.reports import read_comparison
    res = read_comparison(out)
    res.to_dict(), repr(res), verdict(res.runs)
    for name in 'curves training routing loads score_curves'.split(): getattr(res, name)

@target('run configuration', changed(CONFIG))
def _(d, box): tables(run_folder(box, d))

@target('run result', json_file(RESULT))
def _(data, box): tables(run_folder(box, result__json=data))

@target('run scores', json_file(sample(RUN/'evaluation.json')))
def _(data, box): tables(run_folder(box, evaluation__json=data))

@target('run tables', st.one_of(damaged((RUN/'loads.csv').read_bytes()).map(lambda b: ('loads__csv', b)),
                                damaged((RUN/'samples.csv').read_bytes()).map(lambda b: ('samples__csv', b))))
def _(given, box): tables(run_folder(box, **dict([given])))

LOG = [json.loads(l) for l in (RUN/'metrics.jsonl').read_text().splitlines()]
def lines(rows): return b''.join(dumps(r) + b'\n' for r in rows)

@target('run log', st.one_of(changed(LOG).map(lines), damaged(lines(LOG))))
def _(data, box): tables(run_folder(box, metrics__jsonl=data))

# traces

TRACE = (FIXTURES/'trace.safetensors').read_bytes()

@st.composite
def trace_file(draw):
    "A trace whose arrays or whose header do not fit"
    header, body = split_header(TRACE)
    meta = {k: json.loads(v) if k not in ('format', 'version') else v for k, v in header['__metadata__'].items()}
    if draw(st.booleans()):                                          # what it says
        meta = draw(changed(meta))
        header['__metadata__'] = {k: dumps(v).decode() if k not in ('format', 'version') else str(v)
                                  for k, v in meta.items()} if isinstance(meta, dict) else {}
    else:                                                            # what it holds
        body, name = bytearray(body), draw(st.sampled_from([k for k in header if k != '__metadata__']))
        a, b = header[name]['data_offsets']
        for _ in range(draw(st.integers(1, 4))):
            i = draw(st.integers(a, b - 2))
            body[i:i + 2] = struct.pack('<h', draw(st.sampled_from([-32768, -1, 0, 3, 4, 100, 32767])))
    return join_header(header, bytes(body))

@target('trace', st.one_of(trace_file(), safetensors_file(TRACE)))
def _(data, box):
    from libmoe_nb.analysis import metrics
    from libmoe_nb.analysis.traces import read_trace
    (box/'t.safetensors').write_bytes(data)
    t = read_trace(box/'t.safetensors')
    repr(t), list(t), t.by('domain'), t.same_probe(t)
    for f in metrics.trace_metrics.values():
        f(t, **(dict(min_count=1) if 'min_count' in f.__code__.co_varnames else {}))
    metrics.expert_change_rate(t, t), metrics.router_saturation(t, t)

# corpora

def documents(box, name, data, **kw):
    from libmoe_nb.data.sources import load_documents
    (box/name).write_bytes(data)
    return sum(len(d.text) for d in load_documents(box/name, **kw))

ROWS = [dict(text=f'The {w} of the house.', kind='a', meta=dict(kind=w)) for w in ('river', 'stone', 'light')]
FIELDS = st.sampled_from([dict(), dict(domain_field='kind'), dict(domain_field='meta.kind'),
                          dict(text_field='meta.kind')])

@target('jsonl corpus', st.tuples(st.one_of(changed(ROWS).map(lines), damaged(lines(ROWS))), FIELDS))
def _(given, box): documents(box, 'a.jsonl', given[0], **given[1])

def packed(suffix):
    import bz2, gzip, lzma, zstandard
    return {'.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress,
            '.zst': zstandard.ZstdCompressor().compress}[suffix](lines(ROWS * 20))

@target('packed corpus', st.sampled_from(['.gz', '.bz2', '.xz', '.zst']).flatmap(
    lambda s: st.tuples(st.just(s), damaged(packed(s)))))
def _(given, box): documents(box, f'a.jsonl{given[0]}', given[1])

@functools.cache
def parquet():
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist(ROWS * 30), out := io.BytesIO(), row_group_size=40)
    return out.getvalue()

@target('Parquet corpus', st.deferred(lambda: damaged(parquet())))
def _(data, box): documents(box, 'a.parquet', data)

@target('text corpus', st.tuples(st.sampled_from(['.txt', '.md', '.py']), st.binary(max_size=200)))
def _(given, box): documents(box, f'a{given[0]}', given[1])

@functools.cache
def saved_dataset():
    import datasets
    with tempfile.TemporaryDirectory() as box:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(ROWS).save_to_disk(box)
        return {p.name: p.read_bytes() for p in Path(box).iterdir()}

@target('saved dataset', st.deferred(lambda: st.sampled_from(sorted(saved_dataset())).flatmap(
    lambda n: st.tuples(st.just(n), json_file(json.loads(saved_dataset()[n])) if n.endswith('.json')
                        else damaged(saved_dataset()[n])))))
def _(given, box):
    from libmoe_nb.data.sources import load_documents
    for n, b in (saved_dataset() | dict([given])).items(): (box/n).write_bytes(b)
    list(load_documents(box))

# pictures and what is said about them

@functools.cache
def pictures():
    from PIL import Image
    im, res = Image.fromarray((np.arange(16 * 12 * 3) % 251).astype(np.uint8).reshape(12, 16, 3)), {}
    for f in ('PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'TGA', 'ICO'):
        im.save(b := io.BytesIO(), f)
        res[f] = b.getvalue()
    return res

@target('picture', st.deferred(lambda: st.sampled_from(sorted(pictures())).flatmap(lambda f: damaged(pictures()[f]))))
def _(data, box):
    from libmoe_nb.data.images import image_digest, read_image
    (box/'a.png').write_bytes(data)
    image_digest(box/'a.png')
    assert max(read_image(box/'a.png').size) < 1e8

TALK = [dict(id=str(i), image=f'{i}.png', conversations=[{'from': 'human', 'value': '<image>\nWhat is it?'},
                                                         {'from': 'gpt', 'value': 'A river.'}]) for i in range(3)]
TALK += [dict(id='m', messages=[dict(role='user', content=[dict(type='image', path='0.png'),
                                                           dict(type='text', text='?')]),
                                dict(role='assistant', content='Stone.')]),
         dict(image='1.png', question='what?', answer='light'), dict(file_name='2.png', text='a caption')]

@target('conversations', st.tuples(st.sampled_from(['.json', '.jsonl']),
                                   st.one_of(changed(TALK, 3).map(lambda o: (dumps(o), lines(o))),
                                             damaged(dumps(TALK)).map(lambda b: (b, b)),
                                             damaged(lines(TALK)).map(lambda b: (b, b)))))
def _(given, box):
    from libmoe_nb.data.images import BadImage, read_image
    from libmoe_nb.data.vision import vision_data
    suffix, two = given
    (box/'images').mkdir()
    for i in range(3): (box/'images'/f'{i}.png').write_bytes(pictures()['PNG'])
    (box/f'a{suffix}').write_bytes(two[suffix == '.jsonl'])
    found = vision_data(box/f'a{suffix}')
    repr(found), repr(found.left_out)
    for s in found:
        for f in s.images:
            inside = os.path.realpath(f).startswith(os.path.realpath(box) + os.sep)
            if not inside: raise Fall(f'{f} is outside of the folder')
            try: read_image(f)
            except BadImage: pass

# suites

SUITE = [json.loads(l) for l in (FIXTURES/'suite.jsonl').read_text().splitlines()]

@st.composite
def suite_file(draw):
    "A suite that was changed, with the fingerprint of what it holds now"
    from hashlib import blake2b
    rows = draw(changed(SUITE))
    try:
        head, *docs = rows
        tasks = [dict(t, docs=[{k: v for k, v in d.items() if k != 'task'} for d in docs if d['task'] == t['name']])
                 for t in head['tasks']]
        head['fingerprint'] = blake2b(json.dumps(tasks, sort_keys=True).encode(), digest_size=16).hexdigest()
    except Exception: pass
    return lines(rows)

@target('suite', st.one_of(suite_file(), damaged(lines(SUITE))))
def _(data, box):
    from libmoe_nb.evaluation.ngrams import NGram
    from libmoe_nb.evaluation.suites import Suite
    (box/'s.jsonl').write_bytes(data)
    s = Suite.load(box/'s.jsonl')
    repr(s), len(s), s.groups, s.baselines(), s.save(box/'again.jsonl')
    known = NGram(['the river of the house'])
    for t in s.tasks.values():
        for d in t.docs:                                             # as a model would be asked
            if t.output_type == 'loglikelihood': assert known.next_word(d['context'], 1) != d['target'].strip() + '.'
            else: [known.log_likelihood(known.history(d['context']), c, 1) / len(c) for c in d['choices']][d['answer']]

# the command line

WORDS = ['--data', '--out', '--steps', '--set', '--recipes', '--preset', '--seeds', '--seed', '--examples', '--json',
         '--evaluate', '--threads', '--device', '--traces', '--log', '--jobs', '--init', '--layers', '--tokens',
         '--suite', '--tasks', '--intervene', '--limit', '--batch-size', '--images', '--text-field', '--max-bytes',
         '--help', '--']
VALUES = ['-1', '0', '3', '1e400', 'nan', 'smoe', 'dense,xmoe', 'nowhere.txt', 'nowhere.parquet', '/dev/null', '/etc',
          '../..', 'x' * 3000, '=', 'a=b', 'steps=' + '9' * 5000, 'options=' + '[' * 3000, 'top_k=', '{}', '[/red]',
          '[bold]x', '\x1b[31m', 'é', '\ud800', '-', '--', "'", '$HOME', 'ban=', 'ban=1+', 'temperature=x', '%', '',
          'hf:', 'hf:/nowhere', 'hf:x::', ',', 'every 0th', 'first x', '9' * 400]
COMMANDS = ['compare', 'train', 'upcycle', 'analyze', 'evaluate', 'report', 'ask', 'vlm compare', 'vlm train',
            'vlm import', 'vlm evaluate', 'vlm data', 'reproduce', 'list', 'plan', 'consolidate', 'nonsense', '']
# each of these is refused before any work, so that no command begins to train
REFUSED = {'compare': ['--steps', '0'], 'train': ['--steps', '0'], 'upcycle': ['--steps', '0'],
           'reproduce': ['--nonsense'], 'vlm compare': ['--nonsense'], 'vlm train': ['--nonsense'],
           'plan': ['--nonsense']}

@target('command line', st.tuples(st.sampled_from(COMMANDS),
                                  st.lists(st.sampled_from(WORDS + VALUES) | st.text(max_size=6), max_size=6)))
def _(given, box):
    from typer.testing import CliRunner
    from libmoe_nb.cli import app
    command, words = given
    before = os.getcwd()
    os.chdir(box)
    try: r = CliRunner().invoke(app, [*command.split(), *words, *REFUSED.get(command, [])], prog_name='libmoe')
    finally: os.chdir(before)
    if r.exception is not None and not isinstance(r.exception, SystemExit): raise r.exception
    if 'Traceback' in r.output or r.exit_code not in (0, 1, 2):
        raise Fall(f'exit code {r.exit_code}: {r.output[-300:]}')
