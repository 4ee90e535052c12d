"Features on disk: the same bits as without, whole or made again, and never those of another tower."

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from word_tokens import FIRST, word_tokenizer

from libmoe_nb.data.conversations import ConversationData, Sample
from libmoe_nb.data.features import FeatureCache, tower_digest
from libmoe_nb.data.streaming import StreamedData

def llava():
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(**small, image_size=16, patch_size=8, vision_use_head=False),
            text_config=LlamaConfig(**small, vocab_size=len(FIRST) + 8),
            image_token_index=4,
            vision_feature_layer=-1,
            vision_feature_select_strategy='full',
        )
    )


def pixels(im):
    return torch.from_numpy(np.asarray(im.resize((16, 16))).copy()).permute(2, 0, 1).float() / 127.5 - 1


def picture(i):
    x = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(x).save(b := io.BytesIO(), 'PNG')
    return b.getvalue()


SAMPLES = [
    Sample(
        str(i),
        (('user', '<image>\nwhat ?' if i % 4 else 'what ?'), ('assistant', ' '.join('abcdefgh'[: 1 + i % 5]))),
        (picture(i),) if i % 4 else (),
    )
    for i in range(24)
]


def tower_of(model):
    "What goes into the projector"

    def features(x):
        got = []
        hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, a: got.append(a[0]))
        try:
            model.model.get_image_features(pixel_values=x, return_dict=True)
        finally:
            hook.remove()
        return got[0]

    return features


def trained(kind, folder=None, data_class=ConversationData, seed=3):
    "Weights of the projector after some steps in which it alone is trained"
    model = llava()
    for n, p in model.named_parameters():
        p.requires_grad_('multi_modal_projector' in n)
    cache = FeatureCache(folder, tower_of(model), model.model.vision_tower) if kind == 'cache' else None
    data = data_class(SAMPLES, word_tokenizer('abcdefgh'), pixels, 4, features=cache)
    opt = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), 1e-2)
    for b, _ in zip(data.batches(4, seed=seed), range(9)):
        kept = b.pop('image_features', None)
        assert kind == 'plain' or 'pixel_values' not in b
        if kept is not None:
            image = BaseModelOutputWithPooling(pooler_output=list(model.model.multi_modal_projector(kept)))
            b['mm_encoder_outputs'] = dict(image=image)
        loss = model(**b).loss
        opt.zero_grad()
        loss.backward() if loss.requires_grad else None
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.model.multi_modal_projector.parameters()]), cache


@pytest.mark.parametrize('data_class', [ConversationData, StreamedData])
def test_a_projector_learns_the_same_to_the_bit(tmp_path, data_class):
    plain, _ = trained('plain', data_class=data_class)
    none, _ = trained('cache', data_class=data_class)
    first, cache = trained('cache', tmp_path, data_class)
    again, later = trained('cache', tmp_path, data_class)
    assert torch.equal(none, first) and torch.equal(first, again)
    assert cache.computed == 18 and later.computed == 0 and later.read > 0
    torch.testing.assert_close(plain, first, atol=1e-5, rtol=1e-4)
    start = torch.cat([p.detach().flatten() for p in llava().model.multi_modal_projector.parameters()])
    assert not torch.allclose(start, first, atol=1e-3)


def made(folder, weights=None, **kw):
    tower = torch.nn.Conv2d(3, 8, 4, 4) if weights is None else weights
    return FeatureCache(folder, lambda x: tower(x).flatten(2).mT, tower, **kw), tower


@pytest.mark.parametrize('harm', ['empty', 'half', 'last byte', 'first byte', 'zeros', 'another image', 'no metadata'])
def test_damage_is_noticed_and_mended(tmp_path, harm):
    cache, tower = made(tmp_path)
    a, b = cache(picture(0), pixels), cache(picture(1), pixels)
    files = sorted(cache.folder.glob('*/*.safetensors'), key=lambda f: f.stat().st_mtime_ns)
    whole = files[0].read_bytes()
    from safetensors.torch import save

    files[0].write_bytes(
        dict(
            [
                ('empty', b''),
                ('half', whole[: len(whole) // 2]),
                ('last byte', whole[:-1] + bytes([whole[-1] ^ 1])),
                ('first byte', bytes([whole[0] ^ 255]) + whole[1:]),
                ('zeros', bytes(len(whole))),
                ('no metadata', save(dict(features=a + 1))),
                # swapped whole: its own digest holds, but it is for another tower
                ('another image', save(dict(features=b), metadata=dict(digest='0' * 32))),
            ]
        )[harm]
    )
    later, _ = made(tmp_path, tower)
    assert torch.equal(later(picture(0), pixels), a) and torch.equal(later(picture(1), pixels), b)
    assert later.damaged == [files[0].name] and files[0].read_bytes() == whole and '1 file damaged' in repr(later)
    assert later.bytes == sum(f.stat().st_size for f in files)


def test_half_written_files_are_not_read(tmp_path, monkeypatch):
    "A process that dies while it writes leaves no file of that name"
    import libmoe_nb.data.features as features

    cache, tower = made(tmp_path)

    def dies(tensors, path, metadata):
        open(path, 'wb').write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(features, 'save_file', dies)
    with pytest.raises(OSError):
        cache(picture(0), pixels)
    assert not list(cache.folder.glob('*/*')) and cache.bytes == 0


def test_another_tower_or_other_settings_find_nothing(tmp_path):
    cache, tower = made(tmp_path, settings=dict(size=16))
    cache(picture(0), pixels)
    for other in (
        made(tmp_path, settings=dict(size=16)),
        made(tmp_path, tower, settings=dict(size=32)),
        made(tmp_path, tower),
    ):
        other[0](picture(0), pixels)
        assert (other[0].read, other[0].computed) == (0, 1)
    assert tower_digest(tower) != tower_digest({k: v.double() for k, v in tower.state_dict().items()})


def test_a_tower_that_is_trained_is_refused(tmp_path):
    cache, tower = made(tmp_path)
    cache(picture(0), pixels)
    opt = torch.optim.SGD(tower.parameters(), 0.1)
    tower(torch.ones(1, 3, 4, 4)).sum().backward()
    opt.step()
    with pytest.raises(ValueError, match='a tower that is trained'):
        cache(picture(0), pixels)


def test_modes_and_gradients_stay(tmp_path):
    cache, tower = made(tmp_path)
    tower.train()
    x = cache(picture(0), pixels)
    assert tower.training and not x.requires_grad and torch.is_grad_enabled()


def test_half_precision_and_bounds(tmp_path):
    cache, tower = made(tmp_path, torch.nn.Conv2d(3, 8, 4, 4).bfloat16(), most_bytes=2_000)
    half = lambda im: pixels(im).bfloat16()
    first = [cache(picture(i), half) for i in range(8)]
    assert first[0].dtype == torch.bfloat16 and cache.unkept > 0
    assert all(torch.equal(cache(picture(i), half), x) for i, x in enumerate(first))
    assert sum(f.stat().st_size for f in tmp_path.rglob('*.safetensors')) == cache.bytes <= 2_000


def test_broken_images_are_left_out_by_name(tmp_path):
    cache, tower = made(tmp_path)
    some = [
        *SAMPLES[:8],
        Sample('broken', SAMPLES[1].turns, (b'no picture',)),
        Sample('gone', SAMPLES[1].turns, ('none.png',)),
    ]
    data = ConversationData(some, word_tokenizer('abcdefgh'), pixels, 16, features=cache)
    for b, _ in zip(data.batches(2), range(8)):
        n = (b['input_ids'] == 4).sum().item()
        assert n == 16 * len(b['image_features']) if n else 'image_features' not in b
    assert 'broken' in repr(data.left_out) and 'gone' in repr(data.left_out) and len(data.left_out) == 2
    assert cache.computed == 6
