"Training on a stream: interrupted and gone on with, it ends with the same bits."
import gzip, json, random, shutil

import pytest, torch
from safetensors.torch import load_file

from libmoe_nb.experiments.compare import train

SMALL = dict(preset='tiny', stream=True, steps=16, batch_size=4, sequence_length=32, vocab_size=400, max_bytes=60_000,
             traces=0, device='cpu', threads=1)

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('corpus'), random.Random(0)
    words = [''.join(rng.choices('etaoinshr', k=rng.randint(2, 6))) for _ in range(400)]
    for k in range(6):
        texts = [' '.join(rng.choices(words, k=rng.randint(5, 40))) for _ in range(150)]
        lines = '\n'.join(json.dumps(dict(text=t)) for t in texts)
        (folder/f'part-{k}-of-6.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    return folder

class StopAt:
    def __init__(self, *steps): self.steps = steps
    def __call__(self, event, name=None, step=None, **facts):
        if event == 'step' and step in self.steps: raise KeyboardInterrupt

def weights(out): return load_file(out/'model'/'model.safetensors')

@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'whole'
    return out, train('smoe', str(corpus), out=out, progress=None, **SMALL)

def test_interrupted_twice_it_ends_with_the_same_bits(corpus, whole, tmp_path):
    out = tmp_path/'run'
    for stop, workers in ((5, 0), (11, 1)):
        with pytest.raises(KeyboardInterrupt):
            train('smoe', str(corpus), out=out, progress=StopAt(stop), workers=workers, **SMALL)
        saved, = (out/'checkpoints').glob('step-*')
        info = json.loads((saved/'checkpoint.json').read_text())
        assert info['bookmark'][0] == info['position'] == stop and len(info['bookmark'][1]) == 4
    res = train('smoe', f'file://{corpus}', out=out, progress=None, **SMALL)
    assert res['perplexity'] == whole[1]['perplexity']
    a, b = weights(out), weights(whole[0])
    assert all(torch.equal(a[n], b[n]) for n in b)

def test_other_shards_are_refused(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train('smoe', str(corpus), out=tmp_path/'run', progress=StopAt(2), **SMALL)
    (other := tmp_path/'other').mkdir()
    for i, p in enumerate(sorted(corpus.glob('part-[0-4]*'))): shutil.copy(p, other/f"{i}{''.join(p.suffixes)}")
    with pytest.raises(ValueError, match='another configuration'):
        train('smoe', str(other), out=tmp_path/'run', progress=None, **SMALL)
