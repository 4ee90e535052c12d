"Texts that the tests of this room are made from, and short ways to read them."
import bz2, gzip, json, lzma, os, random, subprocess, sys
import numpy as np, pytest
from libmoe_nb.data.sources import load_documents
from libmoe_nb.data.text import text_data

WORDS = 'the of and light darkness Zürich naïve 三 🐈 house river walked spoke under over tree'.split()

def words(n, seed):
    "A line of n words, the same for the same seed"
    r = random.Random(seed)
    return ' '.join(r.choice(WORDS) for _ in range(n)) + '\n'

def plain_words(n, seed):
    "n words without an end of line"
    r = random.Random(seed)
    return ' '.join(r.choice('the of light darkness Zürich 三 river walked under over tree'.split()) for _ in range(n))

def fill(folder, domains=('a', 'b', 'c'), docs=30, n=60):
    "A folder of small files, a subfolder a domain"
    for d in domains:
        (folder/d).mkdir(parents=True, exist_ok=True)
        for i in range(docs): (folder/d/f'{i}.txt').write_text(f'{d}{i} ' + words(n, f'{d}{i}'), encoding='utf-8')
    return folder

def line(text, **kw): return json.dumps(dict(text=text, **kw)).encode() + b'\n'

def pack(suffix, data):
    "Bytes as a file with that suffix holds them"
    if suffix != '.zst':
        return {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress}[suffix](data)
    return pytest.importorskip('zstandard').ZstdCompressor().compress(data)

def prep(data, **kw):
    "Small blocks and a small vocabulary"
    return text_data(data, **{**dict(vocab_size=300, sequence_length=32), **kw})

def texts(data, **kw): return [d.text for d in load_documents(data, **kw)]

def refused(data, *says, **kw):
    "Reading ends in one sentence that says all of it"
    with pytest.raises(ValueError) as e: texts(data, **kw)
    assert ('\n' not in str(e.value) and not isinstance(e.value, UnicodeError)
            and all(s in str(e.value) for s in says)), repr(e.value)

def saved(rows, path, **kw):
    "Rows as a folder of `Dataset.save_to_disk`"
    datasets = pytest.importorskip('datasets')
    datasets.Dataset.from_list(rows).save_to_disk(path, **kw)
    return path

def stream(ds): return np.asarray(ds.tokens).astype(np.int64)

def decoded(data, ds):
    "The documents of one side, out of its tokens"
    return [data.tokenizer.decode(stream(ds)[a+1:b]) for a,b in zip(ds.starts[:-1], ds.starts[1:])]

def python(code, **env):
    "Python code in a process of its own, started"
    return subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
