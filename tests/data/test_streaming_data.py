"Batches of a stream: the same from the same seed, wherever one starts, in memory that does not grow."

import io
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from word_tokens import word_tokenizer

from libmoe_nb.data.conversations import ConversationData
from libmoe_nb.data.streaming import StreamedData
from libmoe_nb.data.vision import vision_data


@pytest.fixture(scope='module')
def tok():
    return word_tokenizer(map(str, range(100)))


def pixels(im):
    return torch.from_numpy(np.asarray(im).copy()).permute(2, 0, 1).float()


def entries(n, broken=(), size=6):
    "The answer's first word tells the number of its pictures' colour"
    rng = np.random.default_rng(1)
    for i in range(n):
        k = int(rng.integers(0, 3))

        def bytes_of():
            Image.new('RGB', (size, size), (i % 100, 0, 0)).save(b := io.BytesIO(), 'PNG')
            return b.getvalue()

        yield dict(
            id=i,
            images=[dict(bytes=b'broken' if i in broken else bytes_of()) for _ in range(k)],
            question='what ?',
            answer=' '.join(map(str, [i % 100, *rng.integers(0, 100, rng.integers(0, 20))])),
        )


def stream(tok, n=200, buffer=32, **kw):
    return StreamedData(vision_data(lambda: entries(n, **kw), streaming=True), tok, pixels, 2, buffer=buffer)


def numbers(b, tok):
    "Of each sample: the first trained word"
    return [int(tok.decode([next(l for l in row if l != -100)])) for row in b['labels'].tolist()]


def check_pictures(b, tok):
    "Every sample has its own pictures"
    marks, given = (b['input_ids'] == 4).sum(1).tolist(), b.get('pixel_values', [])
    assert sum(marks) == 2 * len(given)
    own = [n for n, m in zip(numbers(b, tok), marks) for _ in range(m // 2)]
    assert own == [int(p[0, 0, 0]) for p in given]


@pytest.mark.parametrize('mixed', [False, True])
def test_an_epoch_has_each_sample_once_with_its_own_pictures(tok, mixed):
    seen, data, kinds = [], stream(tok), set()
    for b in data.batches(8, mixed=mixed):
        check_pictures(b, tok)
        kinds.add(tuple(sorted({m > 0 for m in (b['input_ids'] == 4).sum(1).tolist()})))
        seen += numbers(b, tok)
        if len(seen) >= 200:
            break
    assert sorted(seen) == sorted(i % 100 for i in range(200))
    assert kinds == {(False,), (True,)} if not mixed else (False, True) in kinds


def test_trap_batches_of_text_alone_have_no_picture(tok):
    for b, _ in zip(stream(tok).batches(8), range(30)):
        assert ('pixel_values' in b) == bool((b['input_ids'] == 4).any())


@pytest.mark.parametrize('buffer', [16, 50, 1000])
def test_any_start_gives_the_same_batches(tok, buffer):
    data = stream(tok, 90, buffer)
    first = [b for b, _ in zip(data.batches(8, seed=5), range(28))]
    for start in (0, 1, 11, 13, 25):
        for k, b in zip(range(start, start + 2), stream(tok, 90, buffer).batches(8, seed=5, start=start)):
            assert b.keys() == first[k].keys() and all(torch.equal(b[n], first[k][n]) for n in b)
    told = lambda seed: [numbers(b, tok) for b, _ in zip(data.batches(8, seed=seed), range(12))]
    assert told(5) == told(5) != told(6)


def test_a_start_far_away_skips_whole_passes(tok):
    passes = []

    def read():
        passes.append(1)
        return entries(40)

    data = StreamedData(vision_data(read, streaming=True), tok, pixels, 2, buffer=32)
    next(data.batches(8, start=1_000))
    assert len(passes) <= 3


def test_epochs_differ(tok):
    data = stream(tok, 64, 64)
    got = [numbers(b, tok) for b, _ in zip(data.batches(8), range(18))]
    assert got[:9] != got[9:]


def test_broken_pictures_are_named_and_the_others_keep_theirs(tok):
    data = stream(tok, 60, broken={3, 4, 5, 20, 59})
    for b, _ in zip(data.batches(4), range(40)):
        check_pictures(b, tok)
    with_pictures = {e['id'] for e in entries(60) if e['images']} & {3, 4, 5, 20, 59}
    assert {int(n) for names in data.left_out.names.values() for n in names} == with_pictures


def test_a_stream_of_broken_pictures_ends_with_an_error(tok):
    def read():
        return (e for e in entries(30, broken=range(30)) if e['images'])

    data = StreamedData(vision_data(read, streaming=True), tok, pixels, 2, buffer=16)
    with pytest.raises(ValueError, match='can be used'):
        next(data.batches(4))


def test_memory_stays_as_it_is_with_five_times_as_many(tok):
    def most(n):
        data = stream(tok, n, 32, size=40)
        tracemalloc.start()
        try:
            for _ in zip(data.batches(8), range(n // 8)):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    most(40)
    few, many = most(60), most(300)
    assert many < 1.7 * few
    # the same samples as a list would take more
    tracemalloc.start()
    held = ConversationData(vision_data(list(entries(300, size=40))), tok, pixels, 2)
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held) == 300 and whole > 1.5 * many


def test_cut_samples_of_a_stream_are_named(tok):
    data = StreamedData(vision_data(lambda: entries(40), streaming=True), tok, pixels, 2, max_length=14, buffer=16)
    for _ in zip(data.batches(4), range(20)):
        pass
    assert data.cut and f'{len(data.cut)} of them cut' in repr(data)
