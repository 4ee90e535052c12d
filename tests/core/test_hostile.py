"Harmful and damaged input: a few inputs of each target of `hostile.py`, and each that fell once."
import json, os, re, resource, shutil, struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from typer.testing import CliRunner

import hostile
from hostile import (CONFIG, DEEP, FIXTURES, LOG, MODEL, RESULT, TALK, TRACE, dumps, join_header, lines,
                     split_header, targets)

# inputs of each target here; `benchmarks/fuzz.py` takes as many as there is time for
FEW = {'run configuration': 1, 'run result': 1, 'run scores': 1, 'run tables': 1, 'run log': 1,
       'model configuration': 2, 'model weights': 3, 'command line': 6, 'tokenizer': 3, 'saved dataset': 6, 'trace': 10}

@pytest.mark.parametrize('name', targets)
def test_what_is_fed_is_read_or_refused_in_one_sentence(name):
    @settings(max_examples=FEW.get(name, 15), deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck), derandomize=True)
    @given(targets[name].inputs)
    def feed(given):
        why = targets[name].tell(given)
        assert why is None, why
    feed()

def test_a_fall_is_told():
    "The test above could not fail otherwise"
    def bad(e):
        def read(given, box): raise e
        return hostile.Target('bad', None, read).tell(None)
    assert bad(KeyError('x')).startswith('KeyError') and bad(RecursionError('deep')).startswith('RecursionError')
    assert bad(ValueError('two\nlines')) and bad(ValueError('')) and bad(UnicodeDecodeError('utf-8', b'', 0, 1, 'x'))
    assert bad(ValueError('lr must be above 0, got -1')) is None

# what fell over once

def fed(name, given): assert targets[name].tell(given) is None

def trace_with(name, *values):
    "A trace with other numbers at the beginning of an array"
    header, body = split_header(TRACE)
    a = header[name]['data_offsets'][0]
    return join_header(header, body[:a] + struct.pack(f'<{len(values)}h', *values) + body[a + 2 * len(values):])

def trace_that_says(**meta):
    header, body = split_header(TRACE)
    header['__metadata__'] |= {k: dumps(v).decode() for k, v in meta.items()}
    return join_header(header, body)

def model_that_has(key, value):
    "The configuration of a model with another size, wherever it stands"
    return re.sub(rf'"{key}": \d+', f'"{key}": {value}', (MODEL/'config.json').read_text()).encode()

def column_of_no_name():
    "A Parquet file with a name of a column that is no UTF-8"
    data = hostile.parquet()
    at = data.index(b'text')
    return data[:at] + b'te\xba\xa1' + data[at + 4:]

ASKED = TALK[0]['conversations']
ONCE = [('json', b'[' * 100_000), ('json', dumps(DEEP)), ('preset', {}), ('preset', dict(name='x')),
        ('model configuration', b'3'), ('model configuration', dumps(DEEP)),
        *[('model configuration', model_that_has(k, v)) for k, v in
            (('num_hidden_layers', 2**31), ('vocab_size', 10**8), ('num_experts', 10**6))],
        ('run result', b'3'), ('run result', b'{}'), ('run scores', b'"x"'), ('run log', b''), ('run log', b'[1]\n'),
        ('run result', dumps(dict(RESULT, domains={d: 'x' * 3000 for d in RESULT['domains']}))),
        ('run result', dumps(dict(RESULT, load_max_mean='x' * 3000))), ('Parquet corpus', column_of_no_name()),
        ('run log', lines([LOG[0], dict(LOG[1], loss='x' * 3000), *LOG[2:]])),
        ('run configuration', dict(CONFIG, run=dict(CONFIG['run'], recipe='x' * 3000))),
        ('run log', b'\xff\n'), ('run log', b'{"step": 0, "split": 3}\n'),
        ('run tables', ('loads__csv', b'\xa0ayer,n')),
        ('run configuration', dict(CONFIG, info='x')),
        ('run configuration', dict(CONFIG, run=dict(CONFIG['run'], layer='x'))),
        ('trace', trace_with('choice', -32768)), ('trace', trace_with('choice', 3, 3200)),
        ('trace', trace_with('expert_of', 999)),
        ('trace', trace_that_says(info=DEEP)), ('trace', trace_that_says(top_k=[1.5, 1.5])),
        ('saved dataset', ('state.json', b'{"_data_files": 5}')),
        ('saved dataset', ('state.json', dumps(dict(_data_files=[dict(filename='\ud800')])))),
        ('suite', lines([dict(hostile.SUITE[0], missing=3), *hostile.SUITE[1:]])),
        ('saved dataset', ('state.json', dumps(dict(_data_files=['/etc/x'])))),
        *[('conversations', ('.json', [dumps(e)] * 2)) for e in (
            [dict(id=['x'])], [dict(id={}, image='\ud800', conversations=ASKED)], [DEEP],
            [dict(id=0, image='x/' * 3000, conversations=ASKED)],
            [dict(id='\ud800')], [dict(image=3, conversations=ASKED)],
            [dict(image={'bytes': '/etc/passwd'}, conversations=ASKED)],
            [dict(image={'path': {'path': '/etc/passwd'}}, conversations=ASKED)])],
        ('conversations', ('.json', [b'[{"id": ' + b'9' * 5000 + b'}]'] * 2)),
        ('conversations', ('.json', [b'[{"id": "\xd0"}]'] * 2))]

@pytest.mark.parametrize('name, given', ONCE, ids=[f'{n} {i}' for i, (n, _) in enumerate(ONCE)])
def test_what_fell_over_once(name, given): fed(name, given)

@pytest.mark.parametrize('change', [dict(answer=9), dict(answer=-1), dict(answer=1.5), dict(choices=[]),
                                    dict(choices=3), dict(context=None), dict(choices=['', 'x']),
                                    dict(context='half a character \ud83d')], ids=ascii)
def test_a_suite_whose_questions_cannot_be_asked(change, tmp_path):
    from libmoe_nb.evaluation.suites import Suite
    head, *docs = json.loads(json.dumps(hostile.SUITE))
    next(d for d in docs if 'choices' in d).update(change)
    with pytest.raises(ValueError, match='is damaged or no suite'): Suite.load(suite_of(head, docs, tmp_path))

def test_half_a_character_in_the_domain_of_a_suite(tmp_path):
    from libmoe_nb.evaluation.suites import Suite
    head, *docs = json.loads(json.dumps(hostile.SUITE))
    Suite.load(suite_of(head, docs, tmp_path))
    head['tasks'][0]['domain'] = '\ud83d'
    with pytest.raises(ValueError, match='is damaged or no suite'): Suite.load(suite_of(head, docs, tmp_path))

def suite_of(head, docs, folder):
    "A file with a fingerprint that fits"
    from hashlib import blake2b
    tasks = [dict(t, docs=[{k: v for k, v in d.items() if k != 'task'} for d in docs if d['task'] == t['name']])
             for t in head['tasks']]
    head['fingerprint'] = blake2b(json.dumps(tasks, sort_keys=True).encode(), digest_size=16).hexdigest()
    (folder/'s.jsonl').write_bytes(lines([head, *docs]))
    return folder/'s.jsonl'

# names in data cannot leave their folder

@pytest.fixture
def pictures(tmp_path):
    "A folder of pictures, with links, and a secret beside it"
    for p in ('data/images/in', 'secret'): (tmp_path/p).mkdir(parents=True)
    for p in ('data/images/a.png', 'data/images/in/b.png', 'secret/c.png'):
        (tmp_path/p).write_bytes(hostile.pictures()['PNG'])
    (tmp_path/'data/images/link.png').symlink_to(tmp_path/'secret'/'c.png')
    (tmp_path/'data/images/out').symlink_to(tmp_path/'secret')
    (tmp_path/'data/images/again.png').symlink_to('a.png')
    return tmp_path

def found(folder, *names, **kw):
    from libmoe_nb.data.vision import vision_data
    (folder/'data'/'a.json').write_text(json.dumps([dict(id=n, image=n, conversations=ASKED) for n in names]))
    res = vision_data(folder/'data'/'a.json', **kw)
    return [s.id for s in res], res.left_out.names

def test_images_stay_in_their_folder(pictures):
    out = ['../../secret/c.png', str(pictures/'secret'/'c.png'), 'in/../../../secret/c.png', '/etc/passwd', '..', '']
    inside = ['a.png', 'in/b.png', 'in/../a.png', 'again.png', str(pictures/'data'/'images'/'a.png'), 'link.png',
              'out/c.png', 'out/../a.png']                           # links are the user's own, and none leads up
    ids, left = found(pictures, *out, *inside)
    assert ids == inside and {*left} == {'an image lies outside of the folder of images'}
    assert list(*left.values()) == out

def test_names_in_python_are_one_s_own(pictures):
    from libmoe_nb.data.vision import vision_data
    sample, = vision_data([dict(image=str(pictures/'secret'/'c.png'), conversations=ASKED)])
    assert sample.images == (pictures/'secret'/'c.png',)

def test_a_pipe_is_no_picture_and_text_is_no_bytes(tmp_path):
    from libmoe_nb.data.images import BadImage, image_digest, read_image
    os.mkfifo(tmp_path/'pipe.png')
    (tmp_path/'a.png').write_bytes(hostile.pictures()['PNG'])
    for bad in (tmp_path/'pipe.png', dict(bytes=str(tmp_path/'a.png')), 0, True, '/dev/zero'):
        for f in (read_image, image_digest):
            with hostile.limited(5), pytest.raises(BadImage): f(bad)

def test_a_picture_starts_no_program_and_no_gigabytes(tmp_path, monkeypatch):
    import subprocess, zlib
    from PIL import Image
    from libmoe_nb.data.images import BadImage, read_image
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: pytest.fail('a program was started'))
    Image.new('RGB', (8, 8)).save(tmp_path/'a.eps', 'EPS')
    shutil.copy(tmp_path/'a.eps', tmp_path/'a.png')                  # Ghostscript would run it
    for p in ('a.eps', 'a.png'):
        with pytest.raises(BadImage, match='cannot be read'): read_image(tmp_path/p)
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    for w, h in ((60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        head = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
        bomb = b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')
        with pytest.raises(BadImage, match='at most|cannot be read'): read_image(bomb)

def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    import gzip
    from libmoe_nb.data import files
    from libmoe_nb.data.sources import load_documents
    monkeypatch.setattr(files, 'LONGEST_LINE', 1000)
    with gzip.open(tmp_path/'a.jsonl.gz', 'wb') as f: f.write(lines([dict(text='x')]) + b'{"text": "' + b'a' * 10**6)
    with pytest.raises(ValueError, match=r'a.jsonl.gz line 2 is longer than 1,000 bytes'):
        list(load_documents(tmp_path/'a.jsonl.gz'))

@pytest.mark.parametrize('size', [2**31, 2**60, 2**64 - 1])
def test_a_header_that_claims_more_than_there_is(size, tmp_path):
    for name, data in (('trace', join_header(*split_header(TRACE), size)),
                       ('model weights', join_header(*split_header((MODEL/'model.safetensors').read_bytes()), size))):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fed(name, data)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000      # KB

# reports and the terminal

EVIL = '<script>alert(1)</script> "><img src=x onerror=alert(1)> $\\frac{$ [/red] \x1b[2J'

def evil_folder(box):
    "Two runs on text whose domains have nasty names"
    from libmoe_nb.experiments.run import run_name
    for f in FIXTURES.glob('runs/*-*-*'):
        if not f.name.startswith(('dense', 'smoe')): continue
        shutil.copytree(f, box/f.name)
        shutil.rmtree(box/f.name/'traces', ignore_errors=True)
        (box/f.name/'evaluation.json').unlink()
        for p in (box/f.name).glob('*.*'):
            if p.suffix in ('.json', '.jsonl', '.csv'):
                text, quoted = p.read_text(), json.dumps(EVIL)[1:-1]
                p.write_text(text.replace('tales', EVIL.replace('"', '') if p.suffix == '.csv' else quoted))
        config = json.loads((box/f.name/'config.json').read_text())
        (box/f.name).rename(box/run_name(config['run']))
    return box

def test_reports_escape_what_came_from_data(tmp_path):
    from libmoe_nb.cli import app
    r = CliRunner().invoke(app, ['report', str(evil_folder(tmp_path))], prog_name='libmoe')
    assert r.exit_code == 0, (r.output, r.exception)
    html = (tmp_path/'report.html').read_text()
    assert '&lt;script&gt;alert(1)' in html and not re.search(r'<script|<img src=x', html)
    assert '\x1b' not in r.output and '[/red]' in r.output

def test_nothing_is_unpickled_or_evaluated():
    "But for what `experiments.jobs` sends through its own pipes"
    root = Path(hostile.__file__).resolve().parents[1]/'libmoe_nb'
    code = {p.relative_to(root).as_posix(): p.read_text(encoding='utf-8') for p in root.rglob('*.py')}
    calls = {n: re.findall(r'(?:torch|np|numpy)\.load\([^\n]*', s) for n, s in code.items()}
    assert all('weights_only=True' in c or 'allow_pickle=False' in c for found in calls.values() for c in found)
    assert {n for n, s in code.items() if re.search(r'pickle\.loads?\(', s)} == {'experiments/jobs.py'}
    runs = r'(?<![\w.])(?:eval|exec)\(|yaml\.load\(|shell=True|os\.system\('
    assert not [n for n, s in code.items() if re.search(runs, s)]
    assert not [n for n, s in code.items() if re.search(r'trust_remote_code=True', s)]
